"""The mutation run, `make mutants`: every fault of tests/mutants/, one at a time, and the first test that notices it.

    python -m tests.mutate [ROOM ...] [--only TEXT]

Works on a copy of the repository, in one process at a time, with the tests that a mutant names; writes docs/mutants.md,
where rooms that were not asked for stay as they are. `--only` takes mutants whose promise, file or fault holds TEXT and
writes nothing.
"""

from __future__ import annotations

import argparse
import os
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
BOUND = 300  # [s] after which tests count as hanging, which is noticed too
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
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return HANGS
        time.sleep(0.05)
    failed = notes.read_text().split("\n")[0]
    if not failed and ended[1] != 0:  # a crash, or no test of that name
        return f"pytest ends with {os.waitstatus_to_exitcode(ended[1])}: {output.read_text()[-500:]}"
    return failed


def run_tests(copy: Path, tests: Sequence[str], notes: Path, output: Path) -> None:
    """Becomes a pytest in the tree `copy`, with its modules and not with those of this program."""
    os.setsid()
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in PARTS]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != REPOSITORY)]
    # No bytecode is written: a file changed within a second and of the same size would be taken for the old one.
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Notice(notes)])
    finally:
        sys.stdout.flush()
        os._exit(code)


def notice(copy: Path, mutant: Mutant) -> str:
    """Who notices `mutant`: a test, HANGS or SURVIVED."""
    file = copy / mutant.file
    source = file.read_text()
    if source.count(mutant.old) != 1:
        sys.exit(f"{mutant.file} does not hold this once, so nothing was tried: {mutant.old!r}")
    file.write_text(source.replace(mutant.old, mutant.new))
    try:
        return first_failure(copy, mutant.tests.split()) or SURVIVED
    finally:
        file.write_text(source)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def to_section(mutants: list[Mutant], noticed: list[str]) -> str:
    """What docs/mutants.md says of a room: its count, its survivors and its table."""
    real = [by for mutant, by in zip(mutants, noticed) if not mutant.equivalent]
    lines = [f"{sum(by != SURVIVED for by in real)} of {len(real)} noticed.", ""]
    for mutant, by in zip(mutants, noticed):
        if by == SURVIVED:
            why = mutant.equivalent and f", which changes nothing: {mutant.equivalent}"
            lines.append(f"* survived: `{cell(mutant.new)}` for `{cell(mutant.old)}` in {mutant.file}{why}")
    lines += ["", "| promise | broken in | noticed by |", "|---|---|---|"]
    for mutant, by in zip(mutants, noticed):
        test = by.removeprefix("tests/").split("[")[0].replace("::", " ")
        lines.append(f"| {cell(mutant.promise)} | {mutant.file.removeprefix('dflash_dist/')} | {cell(test)} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def write_table(sections: dict[str, str]) -> None:
    """Into docs/mutants.md, beside the rooms that it has already."""
    head, *old = TABLE.read_text().split("\n## ") if TABLE.is_file() else [""]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(rooms)}; all without one")
    parser.add_argument("--only", default="", metavar="TEXT")
    arguments = parser.parse_args()
    import torch  # noqa: F401 - loaded once, before the forks
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    sections = {}
    with tempfile.TemporaryDirectory(prefix="dflash-mutants-") as scratch:
        copy = Path(scratch)
        for part in PARTS:
            if (REPOSITORY / part).is_dir():
                shutil.copytree(REPOSITORY / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPOSITORY / part, copy / part)
        for room in arguments.rooms or rooms:
            mutants = [each for each in rooms[room] if arguments.only in f"{each.promise} {each.file} {each.old}"]
            # Without a fault all must pass, or nothing would be told by a failure.
            tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
            if tests and (failed := first_failure(copy, tests)):
                sys.exit(f"{room}: {failed} fails without a mutant")
            noticed = []
            for mutant in mutants:
                begin = time.monotonic()
                noticed.append(notice(copy, mutant))
                seconds = f"{time.monotonic() - begin:4.0f} s"
                print(f"{room:10} {seconds}  {noticed[-1]:70.120}  {cell(mutant.new):.80}", flush=True)
            sections[room] = to_section(mutants, noticed)
    if not arguments.only:
        write_table(sections)


if __name__ == "__main__":
    main()
