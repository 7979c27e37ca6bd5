"""The mutation run, `make mutants`: every fault of tests/mutants/, one at a time, and the first test that notices it.

    python -m tests.mutate [ROOM ...] [--new] [--only TEXT]

Works on a copy of the repository, in one process at a time, with the tests that a mutant names. Writes docs/mutants.md,
where the rows of mutants that were not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib
import os
import py_compile
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutants import Mutant, read_mutants

REPOSITORY = Path(__file__).parent.parent
TABLE = REPOSITORY / "docs/mutants.md"
PARTS = ("dflash_dist", "tests", "configs", "launch", "docs", "Makefile", "README.md", "pyproject.toml")
BOUND = 600  # [s] after which tests count as hanging, which is noticed too
# Loaded once, before the forks.
LIBRARIES = (
    "hypothesis",
    "torch.nn.attention.flex_attention",
    "torch.utils.tensorboard",
    "transformers.models.qwen3.modeling_qwen3",
)
SURVIVED, HANGS = "SURVIVED", "hangs"


class Notice:
    """A plugin for pytest that writes down what fails."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            with self.file.open("a") as file:
                file.write(f"{report.nodeid}\n")


def first_failure(copy: Path, tests: Sequence[str]) -> str:
    """The first of `tests` that fails in the tree `copy`, HANGS, or nothing. A fork: the libraries are loaded once."""
    notes, output = copy / "notes", copy / "output"
    notes.write_text("")
    child = os.fork()
    if child == 0:
        run_tests(copy, tests, notes, output)
    until = time.monotonic() + BOUND
    try:
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > until:
                return HANGS
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with all that it started, also when this program is stopped
    failed = notes.read_text().split("\n")[0]
    if not failed and ended[1] != 0:  # a crash, or no test of that name
        return f"pytest ends with {os.waitstatus_to_exitcode(ended[1])}: {output.read_text()[-500:]}"
    return failed


def run_tests(copy: Path, tests: Sequence[str], notes: Path, output: Path) -> None:
    """Becomes a pytest in the tree `copy`, with its modules and not with those of this program."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in PARTS]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != REPOSITORY)]
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", *tests], plugins=[Notice(notes)])
    finally:
        sys.stdout.flush()
        os._exit(code)


def notice(copy: Path, mutant: Mutant) -> str:
    """Who notices `mutant`: a test, HANGS or SURVIVED."""
    file = copy / mutant.file
    source = file.read_text()
    if source.count(mutant.old) != 1:
        sys.exit(f"{mutant.file} does not hold this once, so nothing was tried: {mutant.old!r}")
    broken = source.replace(mutant.old, mutant.new)
    if file.suffix == ".py":
        compile(broken, mutant.file, "exec")  # a fault that is no program would be noticed by anybody
    file.write_text(broken)
    try:
        return first_failure(copy, mutant.tests.split()) or SURVIVED
    finally:
        file.write_text(source)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def row_of(mutant: Mutant, by: str) -> str:
    """The mutant's row in the table, up to who notices it, and that."""
    test = by.removeprefix("tests/").split("[")[0].replace("::", " ")
    return f"| {cell(mutant.promise)} | {mutant.file.removeprefix('dflash_dist/')} | {cell(test)} |"


def to_section(noticed: list[tuple[Mutant, str]]) -> str:
    """What docs/mutants.md says of a room: its count, its survivors and its table."""
    real = [by for mutant, by in noticed if not mutant.equivalent]
    lines = [f"{sum(by != SURVIVED for by in real)} of {len(real)} noticed.", ""]
    for mutant, by in noticed:
        if by == SURVIVED:
            why = mutant.equivalent and f", which changes nothing: {mutant.equivalent}"
            lines.append(f"* survived: `{cell(mutant.new)}` for `{cell(mutant.old)}` in {mutant.file}{why}")
    lines += ["", "| promise | broken in | noticed by |", "|---|---|---|", *(row_of(*each) for each in noticed)]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def known(text: str, mutant: Mutant) -> str | None:
    """Who noticed `mutant` when `text`, docs/mutants.md, was written."""
    begin = row_of(mutant, "").removesuffix(" |")
    return next((line[len(begin) :].strip(" |") for line in text.split("\n") if line.startswith(begin)), None)


def read_table() -> str:
    return TABLE.read_text() if TABLE.is_file() else ""


def write_table(sections: dict[str, str]) -> None:
    """Into docs/mutants.md, beside the rooms that it has already."""
    old = read_table().split("\n## ")[1:]
    sections = dict(section.split("\n\n", 1) for section in old) | sections
    counts = [[int(n) for n in re.findall(r"\d+", section.split("\n")[0])] for section in sections.values()]
    noticed, of = (sum(count) for count in zip(*counts))
    head = (
        "# Mutants\n\n"
        "What the tests notice: faults of one line, one at a time, each against a promise of README.md, docs/ or a\n"
        "docstring (`make mutants`; the faults stand in [tests/mutants](../tests/mutants)). A fault that changes\n"
        "nothing that can be seen is not counted.\n\n"
        f"**{noticed} of {of} noticed, {noticed / of:.0%}.**\n"
    )
    bodies = [f"\n## {room}\n\n{section.strip()}\n" for room, section in sorted(sections.items())]
    TABLE.write_text(head + "".join(bodies))


def main() -> None:
    rooms = read_mutants()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(rooms)}; all without one")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose promise, file or fault holds it")
    parser.add_argument("--new", action="store_true", help="mutants that the table does not have, or that survived")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    text = read_table()
    for library in LIBRARIES:
        importlib.import_module(library)

    with tempfile.TemporaryDirectory(prefix="dflash-mutants-") as scratch:
        copy = Path(scratch)
        for part in PARTS:
            if (REPOSITORY / part).is_dir():
                shutil.copytree(REPOSITORY / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPOSITORY / part, copy / part)
        # Told from its source by a hash: by its time and size, a file might be taken for what it was before.
        compileall.compile_dir(copy, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        for room in arguments.rooms or rooms:
            before = [known(text, mutant) for mutant in rooms[room]]
            asked = [
                arguments.only in f"{mutant.promise} {mutant.file} {mutant.old}"
                and not (arguments.new and by not in (None, SURVIVED))
                for mutant, by in zip(rooms[room], before)
            ]
            # Without a fault all must pass, or nothing would be told by a failure.
            tests = sorted({test for mutant, now in zip(rooms[room], asked) if now for test in mutant.tests.split()})
            if tests and (failed := first_failure(copy, tests)):
                sys.exit(f"{room}: {failed} fails without a mutant")
            noticed = []
            for mutant, by, now in zip(rooms[room], before, asked):
                if now:
                    begin = time.monotonic()
                    by = notice(copy, mutant)
                    seconds = f"{time.monotonic() - begin:4.0f} s"
                    print(f"{room:10} {seconds}  {by:70.120}  {cell(mutant.new):.80}", flush=True)
                if by is not None:
                    noticed.append((mutant, by))
            write_table({room: to_section(noticed)})


if __name__ == "__main__":
    main()
