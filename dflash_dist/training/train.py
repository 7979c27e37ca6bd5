"""Trains a draft: `python -m dflash_dist train --config C.yaml [a.b=c ...]`, alone or under torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dflash_dist.config import describe, json_schema
from dflash_dist.logs import keep_logs, show_status
from dflash_dist.options import ConfigOptions, option, parse


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ConfigOptions):
    config: str = option("YAML file, or the name of a shipped one, such as qwen3-8b", "")
    check: bool = option("do all that comes before the first step and needs no GPU, say what the run would be", False)
    json_schema: bool = option("print the JSON schema of config files, for editors, and end", False)

    def __post_init__(self) -> None:
        if not self.config and not self.json_schema:
            raise ValueError("the following arguments are required: --config")


def main(argv: list[str]) -> None:
    knobs = f"knobs, as YAML sections or overrides:\n{describe()}"
    options = parse(TrainOptions, "train", __doc__, argv, epilog=knobs)
    if options.json_schema:
        print(json_schema())
        return
    config = options.load()
    with keep_logs(Path(config.output_dir)):
        show_status("starting")
        # Imported here, since it takes seconds: what is mistyped is told at once.
        from dflash_dist.training.trainer import check, train

        (check if options.check else train)(config)
