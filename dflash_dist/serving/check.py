"""Whether serving engines will run a draft folder as it was trained: `python -m dflash_dist check DIR [--target T]`.

Reads config.json and the headers of the weights. One line a rule: `ok`, `FAULT` where an engine would refuse the draft
or serve another one, `note` where that depends on how the draft was trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dflash_dist.contract.folder import SHAPE, find_draft, from_config, read_config, weight_files
from dflash_dist.serving.rules import COMPLETE, RULES, TARGET_RULES, Draft, Rule
from dflash_dist.target.load import read_info

SHOWN = 4  # of what breaks one rule


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dflash_dist check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("draft", help="draft folder or hub id, exported here or published")
    parser.add_argument("--target", help="model folder or hub id of the target that it will be served with")
    args = parser.parse_args(argv)
    lines = check(find_draft(args.draft), args.target)
    for line in lines:
        print(line)
    faults = sum(line.kind == "FAULT" for line in lines)
    if faults:
        sys.exit(f"{args.draft} has {faults} fault{'s' * (faults > 1)}")


@dataclass(frozen=True)
class Line:
    """What came of one rule."""

    kind: str  # ok, note or FAULT
    rule: str
    found: list[str]
    engines: str  # what they make of it

    def __str__(self) -> str:
        if not self.found:
            return f"{self.kind:<6} {self.rule}"
        more = [f"and {len(self.found) - SHOWN} more"] if len(self.found) > SHOWN else []
        return f"{self.kind:<6} {self.rule}: {'; '.join(self.found[:SHOWN] + more)} ({self.engines})"


def check(folder: Path, target: str | None = None) -> list[Line]:
    """Applies every rule; those about the target only if it is given.

    Raises:
        ValueError: the folder is no draft at all, or the target cannot be read.
    """
    info = read_info(target) if target else None
    config = read_config(folder, info.text.num_hidden_layers if info else None)
    tensors, trained = read_headers(folder)
    try:
        shape = from_config(config)
    except ValueError as error:  # and without a shape there is nothing to compare the rest with
        return [judge(COMPLETE, [str(error)])]
    draft = Draft(folder, config, shape, tensors, trained, info)
    rules = RULES + TARGET_RULES if info else RULES
    return [judge(COMPLETE, []), *(judge(rule, rule.problems(draft)) for rule in rules)]


def judge(rule: Rule, found: list[str]) -> Line:
    return Line(rule.kind if found else "ok", rule.name, found, rule.engines)


def read_headers(folder: Path) -> tuple[dict[str, tuple[list[int], str]], dict[str, Any] | None]:
    """Shapes and dtypes of the tensors, and the shape that they were trained in, from the weights' headers.

    Raises:
        ValueError: a file is missing or damaged.
    """
    tensors, trained = {}, None
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as header:
                for name in header.keys():  # noqa: SIM118, it is no dict
                    tensor = header.get_slice(name)
                    tensors[name] = (tensor.get_shape(), tensor.get_dtype())
                trained = (header.metadata() or {}).get(SHAPE, trained)
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}): export or download it again") from error
    return tensors, json.loads(trained) if trained else None
