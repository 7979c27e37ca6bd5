"""What a draft is judged on: built-in suites, which are data sets of the hub, and conversations of one's own."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dflash_dist.data.account import BadRow
from dflash_dist.data.conversations import Conversation, name_row, read_conversations
from dflash_dist.data.sources import FileSource, HubSource
from dflash_dist.reading import is_kind


@dataclass(frozen=True)
class Prompt:
    """What the target is asked."""

    suite: str
    number: int  # in its suite, from 0
    asked: Conversation  # ends with a question
    later: Sequence[str] = ()  # further questions, each asked after the target's own answer to the one before
    answered: Conversation | None = None  # as the data has it, with the data's answer

    @property
    def question(self) -> str:
        """What it asks first."""
        return str(self.asked.messages[-1]["content"])


Check = Callable[[Prompt], None]


@dataclass(frozen=True)
class Suite:
    """A data set of questions, and how they are asked."""

    hub: str  # as `data.path` names it: org/name[/subset]:split@commit
    columns: tuple[str, ...]  # of a question, or of several asked one after the other; the first that a row has
    wording: str = "{}"

    def questions(self, row: dict[str, Any]) -> list[str]:
        """What a row asks.

        Raises:
            ValueError: nothing.
        """
        asked = next((row[column] for column in self.columns if column in row), None)
        asked = [asked] if isinstance(asked, str) else asked
        if not asked or not is_kind(asked, list[str]):
            raise ValueError(f"its {' or '.join(map(repr, self.columns))} is no question")
        return [self.wording.format(question) for question in asked]


# Asked as DFlash's own benchmark asks it (z-lab/dflash, benchmark.py), so that figures compare.
SUITES = {
    "humaneval": Suite(  # MIT, 164 problems
        "openai/openai_humaneval:test@7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        ("prompt",),
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```",
    ),
    "mtbench": Suite(  # Apache-2.0, 80 conversations of 2 turns
        "HuggingFaceH4/mt_bench_prompts:train@e3a795c5e9a82ee40611c416b8a7786c73198991",
        ("prompt", "turns"),  # on the hub, and in the question.jsonl of its authors
    ),
    "gsm8k": Suite(  # MIT, 1,319 problems
        "openai/gsm8k/main:test@740312add88f781978c0658806c59bc2815b9866",
        ("question",),
        "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    ),
}


def read_prompts(
    suites: Sequence[str], files: Sequence[str], limit: int | None = None, check: Check | None = None
) -> list[Prompt]:
    """The prompts of built-in suites and of files of conversations, each suite named once.

    Args:
        suites: of `SUITES`; `name=FILE` where a file of the data set lies here already.
        files: as the training data, each a suite called by its name; a conversation is cut before its last answer.
        limit: of each, the first N only.
        check: refuses a prompt with a ValueError.

    Raises:
        ValueError: there is no such suite, its prompts cannot be had, two have one name, or one is refused; names file
            and row.
    """
    asked: dict[str, Iterator[tuple[int, Prompt]]] = {}
    where: dict[str, Callable[[int], str]] = {}
    for text in suites:
        name, _, file = text.partition("=")
        if name not in SUITES:
            raise ValueError(
                f"there is no suite {name!r}, only {', '.join(SUITES)}; name files of your own by --prompts"
            )
        asked[name], where[name] = _of_suite(name, file), partial("suite {}, row {}".format, name)
    for file in files:
        name = Path(file).name.split(".")[0]
        if name in asked:
            raise ValueError(f"two suites are called {name}, and their figures would mix: rename {file}")
        asked[name], where[name] = _of_file(name, file), partial(name_row, file)
    taken = []
    for name, prompts in asked.items():
        for row, prompt in itertools.islice(prompts, limit):
            try:
                if check:
                    check(prompt)
            except ValueError as error:
                raise ValueError(f"{where[name](row)}: {error}") from error
            taken.append(prompt)
    return taken


def _of_suite(name: str, file: str) -> Iterator[tuple[int, Prompt]]:
    suite = SUITES[name]
    for number, (line, row) in enumerate(_rows(name, file)):
        try:
            if isinstance(row, BadRow):
                raise row
            first, *later = suite.questions(row)
        except ValueError as error:
            raise ValueError(f"suite {name}, row {line} of {file or suite.hub}: {error}") from error
        yield line, Prompt(name, number, Conversation([{"role": "user", "content": first}]), later)


def _rows(name: str, file: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    source = FileSource(Path(file)) if file else HubSource(SUITES[name].hub)
    try:
        for chunk in source.chunks():
            yield from chunk.parsed(Counter())
    except ValueError as error:
        advice = f"give a file of this data set, JSONL or Parquet, as --suite {name}=FILE"
        raise ValueError(f"suite {name}: {error}; {advice}") from error


def _of_file(name: str, file: str) -> Iterator[tuple[int, Prompt]]:
    for number, (line, row) in enumerate(read_conversations(file)):
        asked = row.asked
        if all(message["role"] not in ("user", "tool") for message in asked):
            raise ValueError(f"{name_row(file, line)}: nothing to answer, since nobody asks anything")
        question = replace(row, messages=asked)
        yield line, Prompt(name, number, question, answered=row if asked != row.messages else None)
