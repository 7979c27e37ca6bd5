"""A run's newest checkpoint as a draft folder: `python -m dflash_dist export --run RUN --out DIR`.

The folder holds config.json, model.safetensors, training.json (how its chats were rendered) and a model card; tokenizer
and generation config are the target's and stay there.
"""

from __future__ import annotations

import argparse
import json
import typing
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dflash_dist.config import load_written, to_tree
from dflash_dist.contract.folder import TRAINING, write_draft
from dflash_dist.draft.kinds import kind_of
from dflash_dist.export.card import Card, shown
from dflash_dist.files import writing
from dflash_dist.reading import check_fields, parse, reading
from dflash_dist.target.load import looks_like_hub_id, read_info
from dflash_dist.training.checkpoint import BEST, best_step, damage, read_state, step_folders
from dflash_dist.training.setup import CHAT_TEMPLATE, CONFIG

CARD = "README.md"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dflash_dist export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="the run's output_dir")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--step", type=_step, help="a kept checkpoint's step, or best; the newest by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--format",
        choices=("dflash", "speculators"),
        default="dflash",
        help="dflash: as z-lab publishes drafts, for vLLM, SGLang and transformers; speculators: the layout of the"
        " library of that name, for vLLM, which then finds the target by itself",
    )
    parser.add_argument("--report", type=Path, help="what `evaluate --json` wrote, for the card's table")
    parser.add_argument("--base-model", help="the target's hub id, where training read it from a folder")
    parser.add_argument("--license", help="for the card, such as apache-2.0")
    export(parser.parse_args(argv))


def _step(text: str) -> int | str:
    return text if text == BEST else int(text)


def export(args: argparse.Namespace) -> None:
    """Writes the folder.

    Raises:
        ValueError: the run has no such checkpoint, its tensors are not exactly a draft's, or the report is none.
    """
    run, out, step = args.run, args.out, args.step
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
    another = f"choose another --step of {', '.join(map(str, folders))}"
    with reading(str(folder), another):
        saved, tensors = read_state(folder).get("shape") or {}, load_file(folder / "draft.safetensors")
    config = to_tree(load_written(run / CONFIG))
    kind = kind_of(config["draft"]["kind"])
    fields = typing.get_type_hints(kind.Shape)
    check_fields(saved, fields, f"shape in {folder / 'state.json'}", another)
    shape = kind.Shape(**{name: saved[name] for name in fields})
    report = read_report(args.report) if args.report else None
    base_model = args.base_model or config["target"]["path"]
    speculators_of = (base_model, architectures(config)) if args.format == "speculators" else None

    record = how_trained(run, config) | {"step": step}
    card = Card(
        name=out.resolve().name,
        target=shown(base_model),
        on_hub=shown(base_model) == base_model and looks_like_hub_id(base_model),
        shape=shape,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtype=args.dtype,
        layout=args.format,
        step=step,
        run=config,
        license=args.license,
        report=report,
    )
    with writing(out):
        write_draft(out, kind, shape, tensors, args.dtype, speculators_of)
        (out / TRAINING).write_text(json.dumps(record, indent=2) + "\n")
        (out / CARD).write_text(card.text())
    print(f"exported {folder} to {out} ({args.dtype}); serve it with blocks of {shape.proposals + 1} tokens:")
    print(f"  vLLM    num_speculative_tokens={shape.proposals}")
    if args.format == "dflash":
        print(f"  SGLang  --speculative-num-draft-tokens {shape.proposals + 1}")
    if record["template_args"]:
        print(f"  with the chat template arguments of its training: {json.dumps(record['template_args'])}")


def how_trained(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The target of a run and how its chats were rendered: serving must do the same, or acceptance suffers."""
    target, data = config["target"], config["data"]
    template = run / CHAT_TEMPLATE
    return {
        "target": target["path"],
        "revision": target["revision"],
        "chat_template": template.read_text() if data["chat_template"] else None,  # null: the target's own
        "template_args": data["template_args"],
        "date": data.get("date"),  # that the template wrote; null: it writes none
        "drop_reasoning": data["drop_reasoning"],
        "seq_len": data["seq_len"],
    }


def architectures(config: dict[str, Any]) -> list[str]:
    """The class names of the run's target, which the speculators library wants to know.

    Raises:
        ValueError: the target is not where the run read it.
    """
    target = config["target"]
    return read_info(target["path"], target["revision"], target["trust_remote_code"]).config.architectures or []


def read_report(file: Path) -> dict[str, Any]:
    """What `evaluate --json` wrote.

    Raises:
        ValueError: the file does not hold that.
    """
    if not file.is_file():
        raise ValueError(f"--report {file} does not exist")
    try:
        report = parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"--report {file} is not JSON: {error}") from error
    if not isinstance(report, dict) or not {"tau", "suites"} & report.keys():
        raise ValueError(f"--report {file} holds neither tau nor suites: give what `evaluate --json` wrote")
    check_fields(report, {"suites": dict[str, Any] | None}, f"--report {file}", "give what `evaluate --json` wrote")
    return report
