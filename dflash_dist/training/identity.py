"""What makes a run the one that it is: what must be the same where it goes on from a checkpoint, and what may change.

Every knob says which (`resume` in config.py). A fixed one counts by its value; others name something that lies outside
of the config, such as the target's weights, and that counts, whatever the knob calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from dflash_dist.config import FIXED, KNOBS, Config, load_written, values
from dflash_dist.data.rows import Data, make_encoder
from dflash_dist.data.sources import digest
from dflash_dist.draft.shape import DraftShape
from dflash_dist.files import differences, refuse_changed
from dflash_dist.target.load import TargetInfo, digest_weights, name_weights
from dflash_dist.training.checkpoint import read_state
from dflash_dist.training.setup import CONFIG, draft_to_begin_from

# Entries that are no knob: what may have changed where no knob that names it did.
MEANINGS = {
    "target weights": "the model's files changed; a commit of the hub is pinned with target.revision",
    "target config": "the model's config.json changed",
    "chat template": "the tokenizer's own template changed",
    "data fingerprint": "the tokens of the training rows, or their packing: the files changed, or their rendering",
    "held-out fingerprint": "the tokens of the held-out rows: the files changed, or their rendering",
    "decoded prompts": "the prompts that eval decodes, or how long: the files changed, or their rendering",
}
# In a model's config.json, and nothing to what it computes.
INCIDENTAL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def identity_of(
    config: Config, info: TargetInfo, data: Data, shape: DraftShape, prompts: list[list[int]]
) -> dict[str, Any]:
    """All that must be the same where this run goes on, as plain values of JSON.

    Args:
        shape: of the draft.
        prompts: that eval decodes.
    """
    encoder = make_encoder(config.data, info.tokenizer, info.stop_ids)
    entries = {
        **{f"draft.{name}": value for name, value in dataclasses.asdict(shape).items()},
        "draft.init": _name_init(config),
        "target weights": name_weights(info),
        "chat template": digest(encoder.chat_template or info.tokenizer.chat_template),
        "data fingerprint": data.train.fingerprint,
    }
    if Path(info.path).is_dir():  # on the hub, the commit that names the weights names it too
        entries["target config"] = _essential(json.loads((Path(info.path) / "config.json").read_text()))
    # What is compared over the steps, where it is.
    if data.held_out and config.validate.every:
        entries["held-out fingerprint"] = data.held_out.fingerprint
    if config.eval.every:
        entries["decoded prompts"] = digest(prompts, config.eval.max_new_tokens)
    return stated(config) | json.loads(json.dumps(entries))


def stated(config: Config) -> dict[str, Any]:
    """The part of a run's identity that its config alone says."""
    fixed = {name: value for name, value in values(config).items() if KNOBS[name].metadata["resume"] == FIXED}
    return json.loads(json.dumps(fixed | {"loss.gamma": config.gamma}))


def refuse_another(
    saved: dict[str, Any], ours: dict[str, Any], config: Config, run: Path, checkpoint: Path
) -> list[str]:
    """Refuses to continue a run with what would make it another run.

    Args:
        saved: the identity in the checkpoint. What it lacks, an older version did not record, or the run did not use.
        ours: the identity now, or a part of it.
        run: the run's folder, which holds the config that it had before.

    Returns:
        The knobs that changed and may, as "name: before -> now".

    Raises:
        ValueError: naming what changed, from what to what, and what to do.
    """
    before = _config_before(run)
    changed_knobs = {}
    if before:
        saved = _recorded(before, config, saved)
        now = values(config)
        changed_knobs = {
            name: f"{name}: {value!r} -> {now[name]!r}" for name, value in values(before).items() if value != now[name]
        }
    refused = []
    for key in ours:
        if key in saved and (changed := list(differences(saved[key], ours[key], key, undivided=KNOBS))):
            named = [text for name, text in changed_knobs.items() if KNOBS[name].metadata["resume"] == key]
            why = "; ".join(text for text in named if text not in changed) if named else MEANINGS.get(key)
            refused.append("; ".join(changed) + (f" ({why})" if why else ""))
    refuse_changed(
        f"{checkpoint} is a checkpoint of a different run, so it cannot be resumed",
        refused,
        "choose another output_dir (draft.init can begin it from this run's export)",
    )
    return list(changed_knobs.values())


def refuse_changed_knobs(config: Config, run: Path, checkpoint: Path) -> None:
    """As `refuse_another`, for what the config alone says: before anything is read or loaded."""
    try:
        saved = read_state(checkpoint)["identity"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: an older one will be resumed from
        return
    refuse_another(saved, stated(config), config, run, checkpoint)


def _config_before(run: Path) -> Config | None:
    """The config that the run had when it was last started, if this version can read it."""
    with contextlib.suppress(OSError, ValueError):
        return load_written(run / CONFIG)
    return None


def _recorded(before: Config, now: Config, saved: dict[str, Any]) -> dict[str, Any]:
    """What was saved of a run's identity, with what its config says where an older version saved less."""
    saved = stated(before) | saved
    if "draft.init" not in saved:
        with contextlib.suppress(ValueError):  # the draft is not there any more
            saved["draft.init"] = _name_init(before)
    then, target = before.target, now.target
    if "target weights" not in saved and (then.path, then.revision) != (target.path, target.revision):
        folder = Path(then.path)
        saved["target weights"] = digest_weights(folder) if folder.is_dir() else f"{then.path}@{then.revision}"
    return saved


def _name_init(config: Config) -> str:
    folder = draft_to_begin_from(config)
    return digest_weights(folder) if folder else config.draft.init


def _essential(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _essential(value) for key, value in config.items() if key not in INCIDENTAL}
    return config
