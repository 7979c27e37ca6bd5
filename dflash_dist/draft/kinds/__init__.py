"""The kinds of draft, a file each."""

from __future__ import annotations

from dflash_dist.draft.base import Draft
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.kinds.dflash2 import DFlash2DraftModel
from dflash_dist.draft.kinds.domino import DominoDraftModel
from dflash_dist.draft.kinds.dspark import DSparkDraftModel
from dflash_dist.draft.kinds.lilicorr import LiLiCorrDraftModel

# By the name that draft.kind gives them.
KINDS: dict[str, type[Draft]] = {
    "dflash": DFlashDraftModel,
    "dflash2": DFlash2DraftModel,
    "dspark": DSparkDraftModel,
    "lilicorr": LiLiCorrDraftModel,
    "domino": DominoDraftModel,
}


def kind_of(name: str) -> type[Draft]:
    """
    Raises:
        ValueError: there is no such kind.
    """
    if name not in KINDS:
        raise ValueError(f"draft.kind: {name!r} is no kind of draft: choose one of {', '.join(KINDS)}")
    return KINDS[name]
