"""The structure of docs/design.md: a room imports from lower floors only, rooms on one floor do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import dflash_dist

PACKAGE = Path(dflash_dist.__file__).parent
FLOORS = {
    "typed_yaml": -1,
    "config": 0,
    "batch": 0,
    "watchdog": 0,
    "files": 0,
    "reading": 0,
    "machine": 0,
    "options": 1,
    "ranks": 1,
    "data": 1,
    "kernels": 1,
    "draft": 2,
    "objective": 2,
    "target": 3,
    "contract": 4,
    "decoding": 4,
    "answers": 5,
    "training": 5,
    "prepare": 6,
    "export": 6,
    "evaluate": 6,
    "cost": 6,
    "demo": 7,
    "__main__": 7,
}


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def imported_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("dflash_dist.")} & FLOORS.keys()


def test_rooms_import_from_lower_floors_only() -> None:
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        seen.add(room)
        for other in imported_rooms(path) - {room}:
            assert FLOORS[other] < FLOORS[room], f"{path.relative_to(PACKAGE)} imports {other}"
    assert seen == FLOORS.keys(), "every room has a floor"


def test_the_mathematics_does_not_know_the_config() -> None:
    for room in ("kernels", "draft", "objective"):
        for path in (PACKAGE / room).rglob("*.py"):
            assert imported_rooms(path) <= {"batch", "kernels", room}


def test_no_two_files_import_each_other() -> None:
    """Nor a longer circle; imports inside of functions count."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    imports = {name: imported_modules(path) & files.keys() - {name} for name, path in files.items()}

    def reached(name: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        for other in imports[name] - seen:
            seen = reached(other, seen | {other})
        return seen

    assert not [name for name in files if name in reached(name)]
