"""The list of mutants does not rot: each still has its place."""

from __future__ import annotations

from collections import Counter

from tests.conftest import REPOSITORY
from tests.mutants import read_mutants


def test_every_mutant_has_its_place() -> None:
    lost = []  # all at once: code that was rewritten takes several along
    for room, mutants in read_mutants().items():
        named = Counter((mutant.promise, mutant.file) for mutant in mutants)
        assert not [name for name, count in named.items() if count > 1], "the table tells mutants apart by these"
        for mutant in mutants:
            file, tests = REPOSITORY / mutant.file, (REPOSITORY / test.split("::")[0] for test in mutant.tests.split())
            if not file.is_file() or file.read_text().count(mutant.old) != 1:
                lost.append(f"tests/mutants/{room}.py: not once in {mutant.file}: {mutant.old!r}")
            lost += [f"tests/mutants/{room}.py: no {test}" for test in tests if not test.is_file()]
            assert mutant.new != mutant.old
    assert not lost, "\n".join(lost)
