"""The structure of docs/design.md: a room imports from lower floors only, rooms on one floor do not know each other, no
two files need each other, and a function is short enough to be read at once."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPOSITORY

FLOORS = {
    "typed_yaml": -1,
    "files": -1,
    "config": 0,
    "batch": 0,
    "logs": 0,
    "reading": 0,
    "machine": 0,
    "stopping": 0,
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
    "init": 7,
    "__main__": 7,
}
LONGEST = 60  # lines of a function, its docstring aside


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    """The files of both packages, named from `root`."""
    for package in ("dflash_dist", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root), ast.parse(path.read_text())


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """What each import of a file names, also inside of a function: the module that this may be, and the one that holds
    it if it is none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)


def needed_files(root: Path) -> dict[str, set[str]]:
    """The modules of both packages that each of them imports; a package stands for its __init__.py."""
    trees = {module_name(path): tree for path, tree in sources(root)}
    return {
        module: {next(name for name in names if name in trees) for names in imported(tree) if trees.keys() & names}
        for module, tree in trees.items()
    }


def imported_rooms(tree: ast.Module) -> set[str]:
    names = {names[0] for names in imported(tree)}
    return {name.split(".")[1] for name in names if name.startswith("dflash_dist.")} & FLOORS.keys()


def test_rooms_import_from_lower_floors_only() -> None:
    seen = set()
    for path, tree in sources(REPOSITORY):
        room = path.parts[1].removesuffix(".py")
        if path.parts[0] != "dflash_dist" or room == "__init__":
            continue
        seen.add(room)
        for other in imported_rooms(tree) - {room}:
            assert FLOORS[other] < FLOORS[room], f"{path} imports {other}"
    assert seen == FLOORS.keys(), "every room has a floor"


def test_the_mathematics_does_not_know_the_config() -> None:
    rooms = ("kernels", "draft", "objective")
    for path, tree in sources(REPOSITORY):
        if (room := path.parts[1]) in rooms:
            assert imported_rooms(tree) <= {"batch", "kernels", room}


def find_cycle(needed: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(needed).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_file_imports_one_that_needs_it() -> None:
    needed = needed_files(REPOSITORY)
    assert needed["dflash_dist.ranks.world"] >= {"dflash_dist.machine", "dflash_dist.ranks.watchdog"}
    assert not find_cycle({module: names for module, names in needed.items()})


def test_a_cycle_inside_of_functions_is_found(tmp_path: Path) -> None:
    files = {
        "dflash_dist/room/__init__.py": "from dflash_dist.room.one import a",
        "dflash_dist/room/one.py": "from dflash_dist.room import two",
        "dflash_dist/room/two.py": "def b():\n    import launch.three",
        "launch/three.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert not find_cycle(needed_files(tmp_path))
    (tmp_path / "launch/three.py").write_text("def c():\n    from dflash_dist.room.one import a")
    assert set(find_cycle(needed_files(tmp_path))) == {"dflash_dist.room.one", "dflash_dist.room.two", "launch.three"}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno
    begin = function.body[0]
    if ast.get_docstring(function) is not None:
        return function.end_lineno - function.lineno - (begin.end_lineno or 0) + begin.lineno
    return function.end_lineno - function.lineno + 1


def test_functions_can_be_read_at_once() -> None:
    long = {
        f"{path}: {node.name}"
        for path, tree in sources(REPOSITORY)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node) > LONGEST
    }
    assert not long
