"""A run on one page for a browser, complete in itself: `python -m dflash_dist report RUN`.

Curves, acceptance by slot and the config come from the run folder, also while it trains; the table and the examples of
accepted blocks from what `evaluate --json` wrote, and the card from the export.
"""

from __future__ import annotations

import contextlib
import html
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dflash_dist.config import Config, load_written, to_tree
from dflash_dist.contract.folder import CARD
from dflash_dist.evaluate.report import in_short, table
from dflash_dist.files import whole, writing
from dflash_dist.logs import or_dash
from dflash_dist.options import argument, option, parse
from dflash_dist.reading import check_fields, read_object, reading
from dflash_dist.training.curves import Curve, read_curves, thinned

EVALUATED = "give what `evaluate --json` wrote"
MOST_POINTS = 300  # of a curve that is drawn
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 200, 44, 8, 22  # of a chart


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    run: Path = argument("a run's output_dir")
    json: Path | None = option("what `evaluate --json` wrote; default: a file of that kind in the run folder", None)
    draft: Path | None = option("the export, for its card; default: the draft that was evaluated", None)
    out: Path | None = option("file to write; default: report.html in the run folder", None)


def main(argv: list[str]) -> None:
    options = parse(ReportOptions, "report", __doc__, argv)
    out = options.out or options.run / "report.html"
    report = read_evaluation(options.json) if options.json else find_evaluation(options.run)
    text = page(options.run, report, options.draft)
    with writing(out), whole(out) as file:
        file.write_text(text, encoding="utf-8")
    print(f"wrote {out}: {len(text) / 1024:,.0f} KiB that need nothing else")
    if not report:
        print("it has no evaluation, since there is none in the run's folder: --json names one")


def page(run: Path, report: dict[str, Any], draft: Path | None = None) -> str:
    """The page as HTML; `report` is an evaluation's, empty without one.

    Raises:
        ValueError: the folder is no run's, or the evaluation is none.
    """
    config, curves = load_written(run / "config.yaml"), read_curves(run)
    draft = draft or (Path(str(report["draft"])) if report.get("draft") else None)
    with reading("the evaluation", EVALUATED):  # its numbers, which only now are asked for
        parts = [
            f"<h1>{_escaped(run.resolve().name)}</h1><p>{_escaped(facts(config, curves, report))}</p>",
            f'<div class="charts">{"".join(charts(curves, report))}</div>',
            *(_decoding(report) if report else ()),
        ]
    folded = {"Config": yaml.safe_dump(to_tree(config), sort_keys=False)}
    if draft and (draft / CARD).is_file():
        folded["Card of the export"] = (draft / CARD).read_text(encoding="utf-8")
    parts += [
        f"<details><summary>{name}</summary><pre>{_escaped(text)}</pre></details>" for name, text in folded.items()
    ]
    return PAGE.format(title=_escaped(run.resolve().name), body="\n".join(parts))


def find_evaluation(run: Path) -> dict[str, Any]:
    """The newest evaluation in the run folder; empty without one."""
    for file in sorted(run.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError):
            return read_evaluation(file)
    return {}


def read_evaluation(file: Path) -> dict[str, Any]:
    report = read_object(file, EVALUATED)
    kinds: dict[str, Any] = {"suites": dict[str, dict[str, Any]], "acceptance_by_slot": list[float | None]}
    kinds |= {"tau": float | None, "speed_up": float, "examples": list[dict[str, Any]] | None}
    check_fields(report, kinds, str(file), EVALUATED)
    return report


def facts(config: Config, curves: dict[str, Curve], report: dict[str, Any]) -> str:
    """The run in a few words."""
    train, timed = config.train, [(0, 0.0), *curves.get("perf/step_s", [])]
    steps = timed[-1][0]
    seconds = sum((step - before) * each for (before, _), (step, each) in itertools.pairwise(timed))
    taus = [f"{name} τ {curves[tag][-1][1]:.2f}" for tag, name in TAUS.items() if curves.get(tag)]
    taus += [f"evaluated τ {or_dash(report['tau'])}"] if report else []
    return (
        f"A draft of {config.draft.num_layers} layers and blocks of {config.draft.block_size} for {config.target.path}:"
        f" {steps:,} steps, {steps * train.global_batch_size * config.data.seq_len / 1e6:,.1f} M tokens in rows,"
        f" {seconds / 3600:,.1f} h; {', '.join(taus) or 'nothing logged yet'}"
    )


TAUS = {"train/tau": "trained", "val/tau": "held-out", "eval/tau": "decoded"}  # tags of metrics


def charts(curves: dict[str, Curve], report: dict[str, Any]) -> Iterator[str]:
    def named(tags: dict[str, str]) -> dict[str, Curve]:
        return {name: thinned(curves[tag], MOST_POINTS) for tag, name in tags.items() if curves.get(tag)}

    slots = {"held-out, right": "val/accuracy_slot_", "decoded, accepted": "eval/acceptance_slot_"}
    shares: dict[str, Curve] = {
        name: [(int(tag[-2:]), curve[-1][1]) for tag, curve in sorted(curves.items()) if tag.startswith(begin)]
        for name, begin in slots.items()
    }
    for suite, numbers in report.get("suites", {}).items():
        accepted = enumerate(numbers.get("acceptance_by_slot") or [], 1)
        shares[f"{suite}, accepted"] = [(slot, share) for slot, share in accepted if share is not None]
    yield chart("loss", named({"train/loss": "trained", "val/loss": "held-out"}))
    yield chart("acceptance length τ", named(TAUS))
    yield chart("share by slot", {name: curve for name, curve in shares.items() if curve}, x="slot", floor=0.0)
    yield chart("learning rate", named({"optim/lr": "learning rate"}), floor=0.0)
    yield chart("tokens/s", named({"perf/tokens_per_s": "all ranks"}), floor=0.0)


def chart(title: str, series: dict[str, Curve], x: str = "step", floor: float | None = None) -> str:
    """A drawing of curves over `x`; empty without any."""
    if not series:
        return ""
    steps, heights = ([point[axis] for curve in series.values() for point in curve] for axis in (0, 1))
    low, high = min(heights) if floor is None else floor, max(heights)
    first, span = min(steps), max(max(steps) - min(steps), 1)
    high += (high == low) * (abs(high) or 1.0)

    def place(step: float, height: float) -> str:
        across = LEFT + (step - first) / span * (WIDTH - LEFT - 8)
        return f"{across:.1f},{TOP + (high - height) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    drawn = []
    for tick in ticks(low, high):
        y = place(first, tick).split(",")[1]
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{LEFT - 5}" y="{y}" dy="4" text-anchor="end">{tick:.4g}</text>')
    for step, anchor in ((first, "start"), (first + span, "end")):
        at = place(step, low).split(",")[0]
        drawn.append(f'<text x="{at}" y="{HEIGHT - 6}" text-anchor="{anchor}">{x} {step:,}</text>')
    legend = []
    for number, (name, curve) in enumerate(series.items()):
        colour = f"var(--c{number % 5})"
        drawn.append(f'<polyline points="{" ".join(place(*point) for point in curve)}" stroke="{colour}"/>')
        if len(curve) < 40:
            for step, height in curve:
                cx, cy = place(step, height).split(",")
                told = f"<title>{x} {step:,}: {height:.4g}</title>"
                drawn.append(f'<circle cx="{cx}" cy="{cy}" r="2.5" fill="{colour}">{told}</circle>')
        legend.append(f'<span><i style="background:{colour}"></i>{_escaped(name)} {curve[-1][1]:.3g}</span>')
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escaped(title)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption><b>{_escaped(title)}</b> {' '.join(legend)}</figcaption>{picture}</figure>"


def ticks(low: float, high: float) -> list[float]:
    """About four round numbers between the two."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decoding(report: dict[str, Any]) -> Iterator[str]:
    lines, proposals = "\n".join(table(report)), len(report["acceptance_by_slot"])
    yield f"<h2>Decoding</h2><pre>{_escaped(lines)}</pre><p>{_escaped(in_short(report))}</p>"
    if report.get("examples"):
        yield (
            "<h2>Examples</h2><p>A patch is what one pass of the target emitted: the deeper its colour, the more of"
            f" {proposals} proposals were accepted. The underlined token after them is the target's own.</p>"
        )
    for example in report.get("examples") or []:
        blocks = []
        for block in example["blocks"]:
            depth = 8 + 92 * block["accepted"] / proposals
            blocks.append(
                f'<span style="--d:{depth:.0f}%" title="{block["accepted"]} of {proposals} accepted">'
                f"{_escaped(block['text'])}<u>{_escaped(block['own'])}</u></span>"
            )
        emitted = [block["accepted"] + bool(block["own"]) for block in example["blocks"][1:]]
        tau = or_dash(sum(emitted) / len(emitted) if emitted else None)
        yield (
            f"<article><p><b>{_escaped(example['suite'])}</b>, about {tau} tokens a pass:"
            f' {_escaped(example["question"])}</p><div class="answer">{"".join(blocks)}</div></article>'
        )


def _escaped(text: str) -> str:
    return html.escape(str(text))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --patch: #ffb35c }}
:root {{ --c0: #1f6feb; --c1: #d9730d; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --c0: #6cb0ff; --c1: #f0a04b; --c2: #5fd07a; --c3: #b795ff; --c4: #f07ab8; --patch: #9c5300 }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem }}
figure {{ margin: 0 }} figcaption {{ font-size: .85rem }} figcaption b {{ margin-right: .5rem }}
figcaption span {{ white-space: nowrap }}
figcaption i {{ display: inline-block; width: .7rem; height: .7rem; margin: 0 .3rem 0 .6rem; border-radius: 2px }}
svg {{ width: 100%; font-size: 11px }} svg text {{ fill: currentColor; opacity: .75 }}
svg line {{ stroke: currentColor; opacity: .15 }} polyline {{ fill: none; stroke-width: 1.6; stroke-linejoin: round }}
pre, .answer {{ overflow-x: auto; padding: .7rem; border-radius: 6px }}
pre, .answer {{ background: color-mix(in srgb, currentColor 6%, transparent) }}
pre {{ font-size: .8rem; line-height: 1.35 }} .answer {{ white-space: pre-wrap; overflow-wrap: anywhere }}
.answer span {{ border-radius: 3px; box-shadow: 0 0 0 1px Canvas }}
.answer span {{ background: color-mix(in srgb, var(--patch) var(--d), transparent) }}
details {{ margin: .7rem 0 }} summary {{ cursor: pointer; font-weight: 600 }}
</style></head><body>
{body}
</body></html>
"""
