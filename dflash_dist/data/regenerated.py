"""Data that `regenerate` wrote: the settings beside it tell whether a run takes it as it was written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflash_dist.config import Config
from dflash_dist.data.sources import FileSource, find_sources
from dflash_dist.reading import check_fields, read_object

RESULT = "result"  # in the settings of finished answers: "rows", and how many of these are "cut" by the length limit
MANY_CUT = 0.1  # share of the rows above which that is worth a warning


def settings_file(out: Path) -> Path:
    """Lies beside answers, and says how they are written."""
    return out.with_name(out.name + ".settings.json")


def warnings(config: Config) -> Iterator[str]:
    """Where a run takes its data otherwise than it was written, a line each."""
    paths = config.data.path if isinstance(config.data.path, dict) else [config.data.path]
    for source in (source for path in (*paths, config.data.val_path) if path for source in find_sources(path)):
        if not isinstance(source, FileSource) or not (written := _read(settings_file(source.path))):
            continue
        target, arguments, result = written["target"], written["template_args"], written.get(RESULT) or {}
        if Path(target).name != Path(config.target.path).name:  # at a server, other folders may stand before it
            yield (
                f"warning: {source.name} was written by {target}, and target.path is {config.target.path}: a draft must"
                " foretell its own target, so let that write the answers (`regenerate`)"
            )
        if arguments != config.data.template_args:
            yield (
                f"warning: {source.name} was written with the template arguments {json.dumps(arguments)}, and"
                f" data.template_args are {json.dumps(config.data.template_args)}: the draft learns from prompts other"
                " than those that the target answered"
            )
        if result.get("cut", 0) > MANY_CUT * result.get("rows", 0):
            yield (
                f"warning: {result['cut']:,} of the {result['rows']:,} rows of {source.name} end with an answer that"
                f" was cut at {written['max_new_tokens']:,} tokens, and a draft never learns how a cut answer ends:"
                " regenerate them with a larger --max-new-tokens"
            )


def _read(file: Path) -> dict[str, Any]:
    """Settings of answers; empty where there are none, or damaged ones, which only keep `regenerate` from going on."""
    kinds: dict[str, Any] = {"target": str, "template_args": dict[str, Any], "max_new_tokens": int}
    with contextlib.suppress(ValueError):
        written = read_object(file, "") if file.is_file() else {}
        check_fields(written, kinds | {RESULT: dict[str, int] | None}, "", "")
        return written
    return {}
