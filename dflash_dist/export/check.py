"""Whether serving engines will run a draft folder as it was trained: `python -m dflash_dist check DIR [--target T]`.

Reads config.json and the headers of the weights. A line for each rule that it breaks: `FAULT` where an engine would
refuse the draft or serve another one, `note` where that depends on how the draft was trained; then how many rules hold.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from dflash_dist.contract.folder import find_draft, from_config, read_config, read_headers
from dflash_dist.export.rules import COMPLETE, RULES, TARGET_RULES, Folder, Rule
from dflash_dist.options import argument, option, parse
from dflash_dist.target.load import read_info

SHOWN = 4  # of what breaks one rule


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    draft: str = argument("draft folder or hub id, exported here or published")
    target: str | None = option("model folder or hub id of the target that it will be served with", None)
    trust_remote_code: bool = option("run Python code that the target brings", False)
    verbose: bool = option("a line for each rule that holds, too", False)


def main(argv: list[str]) -> None:
    options = parse(CheckOptions, "check", __doc__, argv)
    lines = check(find_draft(options.draft), options.target, options.trust_remote_code)
    for line in lines:
        if line.found or options.verbose:
            print(line)
    held, more = sum(not line.found for line in lines), "" if options.target else "; --target asks for those about it"
    print(f"{held}{f' of {len(lines)}' * (held < len(lines))} rules hold{more}")
    faults = sum(line.kind == "FAULT" for line in lines)
    if faults:
        sys.exit(f"{options.draft} has {faults} fault{'s' * (faults > 1)}")


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


def check(folder: Path, target: str | None = None, trust_remote_code: bool = False) -> list[Line]:
    """Applies every rule; those about the target only if it is given.

    Raises:
        ValueError: the folder is no draft at all, or the target cannot be read.
    """
    info = read_info(target, trust_remote_code=trust_remote_code) if target else None
    config = read_config(folder, info.text.num_hidden_layers if info else None)
    tensors, trained = read_headers(folder)
    try:
        shape = from_config(config)
    except ValueError as error:  # and without a shape there is nothing to compare the rest with
        return [judge(COMPLETE, [str(error)])]
    draft = Folder(folder, config, shape, tensors, trained, info)
    rules = RULES + TARGET_RULES if info else RULES
    return [judge(COMPLETE, []), *(judge(rule, rule.problems(draft)) for rule in rules)]


def judge(rule: Rule, found: list[str]) -> Line:
    return Line(rule.kind if found else "ok", rule.name, found, rule.engines)
