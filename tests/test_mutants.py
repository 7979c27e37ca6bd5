"""The list of mutants does not rot: each still has its place."""

from __future__ import annotations

from collections import Counter

from tests.conftest import REPOSITORY
from tests.mutants import read_mutants


def test_every_mutant_has_its_place() -> None:
    for room, mutants in read_mutants().items():
        named = Counter((mutant.promise, mutant.file) for mutant in mutants)
        assert not [name for name, count in named.items() if count > 1], "the table tells mutants apart by these"
        for mutant in mutants:
            where = f"tests/mutants/{room}.py, {mutant.file}: {mutant.old!r}"
            assert (REPOSITORY / mutant.file).read_text().count(mutant.old) == 1, f"not there once: {where}"
            assert mutant.new != mutant.old, where
            for test in mutant.tests.split():
                assert (REPOSITORY / test.split("::")[0]).is_file(), f"no test {test}: {where}"
