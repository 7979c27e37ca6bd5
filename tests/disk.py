"""What a loss of power could show and a kill cannot: in which order the disk is told."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest


def watch_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What happens to the disk from now on, in order: ("sync", name, names of files in it or its size),
    ("rename", from, to) and ("remove", name of a file); without the random part of names."""
    events: list[tuple[str, ...]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def name_of(path: Any) -> str:
        return re.sub(r"\.[0-9a-f]{8}\.partial$", ".partial", Path(path).name)

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        content = " ".join(sorted(os.listdir(path))) if path.is_dir() else str(path.stat().st_size)
        events.append(("sync", name_of(path), content))

    def note_rename(old: Any, new: Any, **options: Any) -> None:
        rename(old, new, **options)
        events.append(("rename", name_of(old), name_of(new)))

    def note_unlink(path: Any, **options: Any) -> None:
        unlink(path, **options)
        events.append(("remove", name_of(path)))

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "unlink", note_unlink)
    return events
