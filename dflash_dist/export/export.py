"""A run's newest checkpoint as a draft folder: `python -m dflash_dist export --run RUN --out DIR`.

The folder holds config.json, model.safetensors, training.json (how its chats were rendered) and a model card; tokenizer
and generation config are the target's and stay there.
"""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from dflash_dist.config import Config, Dtype, load_written
from dflash_dist.contract.folder import CARD, TRAINING, write_draft
from dflash_dist.draft.kinds import kind_of
from dflash_dist.export.card import Card, shown
from dflash_dist.files import whole, writing
from dflash_dist.options import option, parse
from dflash_dist.reading import check_fields, reading
from dflash_dist.reading import parse as parse_json
from dflash_dist.target.load import looks_like_hub_id, read_info
from dflash_dist.training.checkpoint import BEST, best_step, damage, read_state, step_folders
from dflash_dist.training.curves import tau_curve
from dflash_dist.training.setup import CHAT_TEMPLATE, CONFIG


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    run: Path = option("the run's output_dir")
    out: Path = option("folder to write")
    step: int | Literal["best"] | None = option("a kept checkpoint's step, or best; the newest by default", None)
    dtype: Dtype = option("", "bfloat16")
    format: Literal["dflash", "speculators"] = option(
        "dflash: as z-lab publishes drafts, for vLLM, SGLang and transformers; speculators: the layout of the library"
        " of that name, for vLLM, which then finds the target by itself",
        "dflash",
    )
    report: Path | None = option("what `evaluate --json` wrote, for the card's table", None)
    base_model: str | None = option("the target's hub id, where training read it from a folder", None)
    license: str | None = option("for the card, such as apache-2.0", None)


def main(argv: list[str]) -> None:
    export(parse(ExportOptions, "export", __doc__, argv))


def export(options: ExportOptions) -> None:
    """Writes the folder.

    Raises:
        ValueError: the run has no such checkpoint, its tensors are not exactly a draft's, or the report is none.
    """
    run, out = options.run, options.out
    step, folder, another = choose(run, options.step)
    with reading(str(folder), another):
        saved, tensors = read_state(folder).get("shape") or {}, load_file(folder / "draft.safetensors")
    unknown: list[str] = []
    config = load_written(run / CONFIG, unknown)
    if unknown:
        print(f"note: {run / CONFIG} states {', '.join(unknown)}, which this version does not know and leaves out")
    kind = kind_of(config.draft.kind)
    fields = typing.get_type_hints(kind.Shape)
    check_fields(saved, fields, f"shape in {folder / 'state.json'}", another)
    shape = kind.Shape(**{name: saved[name] for name in fields if name in saved})
    report = read_report(options.report) if options.report else None
    base_model = options.base_model or config.target.path
    speculators_of = (base_model, architectures(config)) if options.format == "speculators" else None

    record = how_trained(run, config) | {"step": step, "tau_curve": tau_curve(run, step)}
    card = Card(
        name=called(out, shown(base_model)),
        target=shown(base_model),
        on_hub=shown(base_model) == base_model and looks_like_hub_id(base_model),
        kind=kind,
        shape=shape,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtype=options.dtype,
        layout=options.format,
        step=step,
        run=config,
        license=options.license,
        report=report,
    )
    with writing(out):
        write_draft(out, kind, shape, tensors, options.dtype, speculators_of)
        for name, text in {TRAINING: json.dumps(record, indent=2) + "\n", CARD: card.text()}.items():
            with whole(out / name) as file:
                file.write_text(text)
    print(f"exported {folder} to {out} ({options.dtype}); serve it with blocks of {shape.proposals + 1} tokens:")
    if "vLLM" in kind.engines:
        print(f"  vLLM    method {kind.method}, num_speculative_tokens={shape.proposals}")
    if options.format == "dflash" and "SGLang" in kind.engines:
        tokens = f"--speculative-num-draft-tokens {shape.proposals + 1}"
        print(f"  SGLang  --speculative-algorithm {kind.method.upper()} {tokens}")
    if config.data.template_args:
        print(f"  with the chat template arguments of its training: {json.dumps(config.data.template_args)}")


def called(out: Path, target: str) -> str:
    """What the card's commands call the draft: its folder's name, with that of the folder around it if the target's is
    the same."""
    out = out.resolve()
    return f"{out.parent.name}/{out.name}" if out.name == target else out.name


def choose(run: Path, step: int | str | None) -> tuple[int, Path, str]:
    """The step of a run's checkpoint, its folder, and what to do if that is damaged.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    folders = step_folders(run / "checkpoints")
    if not folders:
        raise ValueError(f"{run} holds no checkpoint: is it the output_dir of a training run?")
    if step == BEST and (step := best_step(run / "checkpoints")) is None:
        raise ValueError(f"{run} has no best checkpoint: eval.every decodes while training, which chooses it")
    step = max(folders) if step is None else int(step)
    if step not in folders:
        raise ValueError(f"{run} keeps no checkpoint of step {step}, only of {', '.join(map(str, folders))}")
    another = f"choose another --step of {', '.join(map(str, folders))}"
    if problem := damage(folders[step]):
        raise ValueError(f"{folders[step]} cannot be exported: {problem}; {another}")
    return step, folders[step], another


def how_trained(run: Path, config: Config) -> dict[str, Any]:
    """The target of a run and how its chats were rendered: serving must do the same, or acceptance suffers."""
    target, data = config.target, config.data
    return {
        "target": target.path,
        "revision": target.revision,
        "chat_template": (run / CHAT_TEMPLATE).read_text() if data.chat_template else None,  # null: the target's own
        "template_args": data.template_args,
        "date": data.date,  # that the template wrote; null: it writes none
        "drop_reasoning": data.drop_reasoning,
        "seq_len": data.seq_len,
    }


def architectures(config: Config) -> list[str]:
    """The class names of the run's target, which the speculators library wants to know.

    Raises:
        ValueError: the target is not where the run read it.
    """
    target = config.target
    return read_info(target.path, target.revision, target.trust_remote_code).config.architectures or []


def read_report(file: Path) -> dict[str, Any]:
    """What `evaluate --json` wrote.

    Raises:
        ValueError: the file does not hold that.
    """
    if not file.is_file():
        raise ValueError(f"--report {file} does not exist")
    try:
        report = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"--report {file} is not JSON: {error}") from error
    if not isinstance(report, dict) or not {"tau", "suites"} & report.keys():
        raise ValueError(f"--report {file} holds neither tau nor suites: give what `evaluate --json` wrote")
    check_fields(report, {"suites": dict[str, Any] | None}, f"--report {file}", "give what `evaluate --json` wrote")
    return report
