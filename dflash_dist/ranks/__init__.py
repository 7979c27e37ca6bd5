"""The ranks of a run: what they do together, and who of them hangs."""

from dflash_dist.ranks.world import World, join_world

__all__ = ["World", "join_world"]
