"""All that the frozen target does: load and shard, give its layer features, write answers."""

from dflash_dist.target.capture import DFlashTargetBatch, HFDFlashTargetModel

__all__ = ["DFlashTargetBatch", "HFDFlashTargetModel"]
