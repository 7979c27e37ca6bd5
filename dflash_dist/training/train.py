"""Trains a draft: `python -m dflash_dist train --config C.yaml [a.b=c ...]`, alone or under torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path

from dflash_dist.config import describe, load_config
from dflash_dist.logs import keep_logs


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dflash_dist train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"knobs, as YAML sections or overrides:\n{describe()}",
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="knobs set on the command line")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    with keep_logs(Path(config.output_dir)):
        # Imported here, since it takes seconds: what is mistyped is told at once.
        from dflash_dist.training.trainer import train

        train(config)
