"""The curves of a run, read back from its metrics, and what they promise of a longer one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dflash_dist.reading import is_kind, parse

METRICS = "metrics.jsonl"  # in the run folder
POINTS = 24  # of a curve that an export keeps
Curve = list[tuple[int, float]]  # (step, value), in order of the steps


def read_curves(run: Path) -> dict[str, Curve]:
    """Every metric by its tag; empty without any. A line that an interruption cut short ends them."""
    curves: dict[str, Curve] = {}
    lines = (run / METRICS).read_bytes().splitlines() if (run / METRICS).is_file() else []
    for line in lines:
        try:
            row: Any = parse(line)
        except ValueError:
            break
        if not is_kind(row, dict[str, float]) or "step" not in row:
            break
        for tag, value in row.items():
            if tag != "step":
                curves.setdefault(tag, []).append((int(row["step"]), value))
    return curves


def seconds_in_steps(curves: dict[str, Curve]) -> float:
    """Time spent in training steps, also those before an interruption."""
    logged = curves.get("perf/step_s", [])
    return sum(seconds * (step - before) for (step, seconds), before in zip(logged, [0, *(step for step, _ in logged)]))


def tau_curve(run: Path, last: int) -> Curve:
    """The teacher-forced tau up to a step, in at most `POINTS` means: on held-out rows, or else on those trained on."""
    curves = read_curves(run)
    points = [(step, tau) for step, tau in curves.get("val/tau") or curves.get("train/tau", []) if 0 < step <= last]
    return thinned(points, POINTS)


def thinned(curve: Curve, count: int) -> Curve:
    """The means of at most `count` parts, each at its last step."""
    parts = np.array_split(np.array(curve).reshape(-1, 2), min(count, max(len(curve), 1)))
    return [(int(part[:, 0].max()), float(part[:, 1].mean())) for part in parts if len(part)]


def gain_of_doubling(curve: Curve) -> float | None:
    """By how much tau rose with each doubling of the steps, over the last two of them; None of too few points."""
    late = [(np.log2(step), tau) for step, tau in curve if step * 4 >= curve[-1][0]]
    if len(late) < 3:
        return None
    doublings, taus = np.array(late).T
    return float(np.polyfit(doublings, taus, 1)[0])
