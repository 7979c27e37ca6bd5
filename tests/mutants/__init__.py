"""Mutants: one-line faults, each of which breaks a promise; one module a topic. tests/mutate.py applies them."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault that a tired engineer could make."""

    promise: str  # the sentence of README.md, docs/ or a docstring that it breaks, quoted or in short
    file: str  # from the root of the repository
    old: str  # stands exactly once in `file`
    new: str
    tests: str  # what should notice: files or tests as pytest takes them, with blanks between
    equivalent: str = ""  # why nothing can notice, where nothing can


def read_mutants() -> dict[str, list[Mutant]]:
    """The mutants of each topic."""
    rooms = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {room: importlib.import_module(f"{__name__}.{room}").MUTANTS for room in rooms}
