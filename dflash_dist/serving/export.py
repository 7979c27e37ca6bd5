"""A run's newest checkpoint as a draft folder: `python -m dflash_dist export --run RUN --out DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from dflash_dist.draft.model import DraftShape
from dflash_dist.serving.contract import TRAINING, write_draft
from dflash_dist.training.checkpoint import BEST, best_step, damage, read_state, step_folders
from dflash_dist.training.setup import CHAT_TEMPLATE, CONFIG


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="dflash_dist export", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="the run's output_dir")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--step", type=_step, help="a kept checkpoint's step, or best; the newest by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    export(args.run, args.out, args.step, args.dtype)


def _step(text: str) -> int | str:
    return text if text == BEST else int(text)


def export(run: Path, out: Path, step: int | str | None = None, dtype: str = "bfloat16") -> None:
    """Writes `config.json` and `model.safetensors` to `out`, and `training.json`: what the draft expects of its target.

    Raises:
        ValueError: the run has no such checkpoint, or its tensors are not exactly a draft's.
    """
    folders = step_folders(run / "checkpoints")
    if not folders:
        raise ValueError(f"{run} holds no checkpoint: is it the output_dir of a training run?")
    if step == BEST and (step := best_step(run / "checkpoints")) is None:
        raise ValueError(f"{run} has no best checkpoint: eval.every decodes while training, which chooses it")
    step = max(folders) if step is None else int(step)
    if step not in folders:
        raise ValueError(f"{run} keeps no checkpoint of step {step}, only of {', '.join(map(str, folders))}")
    folder = folders[step]
    if problem := damage(folder):
        raise ValueError(
            f"{folder} cannot be exported: {problem}; choose another --step of {', '.join(map(str, folders))}"
        )
    shape = DraftShape(**read_state(folder)["shape"])
    write_draft(out, shape, load_file(folder / "draft.safetensors"), dtype)
    record = how_trained(run) | {"step": step}
    (out / TRAINING).write_text(json.dumps(record, indent=2) + "\n")
    print(f"exported {folder} to {out} ({dtype}); serve it with blocks of {shape.block_size} tokens:")
    print(f"  vLLM    num_speculative_tokens={shape.block_size - 1}")
    print(f"  SGLang  --speculative-num-draft-tokens {shape.block_size}")
    if record["template_args"]:
        print(f"  with the chat template arguments of its training: {json.dumps(record['template_args'])}")


def how_trained(run: Path) -> dict[str, Any]:
    """The target of a run and how its chats were rendered: serving must do the same, or acceptance suffers."""
    config = yaml.safe_load((run / CONFIG).read_text())
    target, data = config["target"], config["data"]
    template = run / CHAT_TEMPLATE
    return {
        "target": target["path"],
        "revision": target["revision"],
        "chat_template": template.read_text() if data["chat_template"] else None,  # null: the target's own
        "template_args": data["template_args"],
        "drop_reasoning": data["drop_reasoning"],
        "seq_len": data["seq_len"],
    }
