from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dflash_dist.evaluate.diagnose import Verdict, conclude
from dflash_dist.training.curves import POINTS, gain_of_doubling, read_curves, tau_curve


def log(run: Path, *rows: dict, end: str = "") -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return run


def test_curves_are_read_up_to_a_line_that_was_cut(tmp_path: Path) -> None:
    run = log(tmp_path, {"step": 1, "a": 2}, {"step": 2, "a": 3.5, "b": 1}, end='{"step": 3, "a')
    assert read_curves(run) == {"a": [(1, 2), (2, 3.5)], "b": [(2, 1)]}
    assert read_curves(tmp_path / "nowhere") == {} == read_curves(log(tmp_path, end="[1]\n"))


def test_held_out_tau_is_what_counts_and_of_many_points_their_means(tmp_path: Path) -> None:
    rows = [{"step": step, "train/tau": float(step)} for step in range(4 * POINTS + 1)]
    assert tau_curve(log(tmp_path, *rows), 4 * POINTS)[:2] == [(4, 2.5), (8, 6.5)]
    assert len(tau_curve(tmp_path, 4 * POINTS)) == POINTS and tau_curve(tmp_path, 2) == [(1, 1.0), (2, 2.0)]
    assert tau_curve(log(tmp_path, *rows, {"step": 3, "val/tau": 7.0}), 9) == [(3, 7.0)]
    assert tau_curve(tmp_path / "nowhere", 9) == []


def test_a_doubling_gains_what_the_last_two_did() -> None:
    assert gain_of_doubling([(1, 9.0), (8, 0.0), (16, 2.5), (32, 3.0), (64, 3.5)]) == pytest.approx(0.5)
    assert gain_of_doubling([(32, 3.0), (64, 3.5)]) is None


@pytest.mark.parametrize(
    ("step", "curve", "told"),
    [
        (None, [], "What lifts tau is training longer; how much longer, the draft does not tell"),
        (64, [[64, 3.5]], "the draft does not tell"),
        (64, [[8, 3.0], [16, 3.01], [32, 3.0], [64, 3.01]], "but its curve is flat at step 64: rather train on more"),
        (
            64,
            [[8, 2.0], [16, 2.5], [32, 3.0], [64, 3.5]],
            "rose by 0.50 with each .* 128 steps may give about 4.0 after",
        ),
    ],
)
def test_what_to_do_with_a_sound_draft_is_told_from_its_curve(step, curve, told) -> None:
    sound = Verdict("decoding", False, "", {"tau": 3.4, "tau_teacher_forced": 3.5})
    assert re.search(told, conclude([sound], step, curve))
    assert conclude([sound, Verdict("template", True, "")], step, curve).startswith(
        "so: first see to template, as said"
    )
