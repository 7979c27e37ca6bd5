from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import PackedRows
from dflash_dist.target.load import read_info
from dflash_dist.training.summary import describe_end, describe_mask_token
from dflash_dist.training.workload import Workload


def write_run(folder: Path, rows: list[dict], taus: dict[int, float | None]) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, tau in taus.items():
        (kept := folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        checksums = {"draft.safetensors": "", "optimizer.pt": ""}
        state = {"tau": tau, "checksums": checksums, "identity": {}, "shape": {}, "step": step}
        (kept / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("tau", "best", "option"),
    [(1.5, "; the best by real tau is {run}/checkpoints/best, of step 20", " --step best"), (2.5, "", "")],
)
def test_the_end_says_how_far_it_came_where_that_lies_and_what_is_next(
    debug_config, tmp_path: Path, tau: float, best: str, option: str
) -> None:
    run = tmp_path / "my run"
    rows = [
        {"step": 0, "val/loss": 5.0, "val/tau": 1.0, "eval/tau": 1.0},
        {"step": 10, "train/loss": 4.5, "perf/step_s": 2.0},
        {"step": 20, "train/loss": 4.25, "perf/step_s": 1.0, "eval/tau": 2.0},
        {"step": 40, "train/loss": 4.75, "perf/step_s": 3.0, "val/loss": 5.25, "val/tau": 1.25, "eval/tau": tau},
    ]
    write_run(run, rows, {20: 2.0, 40: tau})
    told = list(describe_end(debug_config(f"output_dir={run}"), Workload(40, 8, 1000, 4, 0.0, 0.0)))
    assert told == [
        "done        40 steps in 0:01:30, 20,000 tokens seen",
        "                    begin     best  at step      end",
        "training loss       4.500    4.250       20    4.750",
        "held-out loss       5.000    5.000        0    5.250",
        "held-out tau        1.000    1.250       40    1.250",
        f"real tau            1.000    {max(tau, 2.0):.3f}       {40 if tau > 2 else 20}    {tau:.3f}",
        "WARNING: the held-out loss ends above its start (5.000 -> 5.250), it unlearned: lower train.lr, or train on"
        " more data",
        f"checkpoint  {run}/checkpoints/step-00000040" + (best.format(run=run) or ", the best by real tau"),
        f"curves      {run}/metrics.jsonl; tensorboard --logdir {run}/tensorboard",
        f"next        python -m dflash_dist export --run '{run}' --out 'drafts/my run'{option}",
    ]


def test_a_mask_token_that_the_data_holds_is_said(tiny_target) -> None:
    info = read_info(str(tiny_target))
    rows = PackedRows(Documents.of([Document(np.array([3, 65, 3], np.int32), [])]), np.arange(1), 8, 0)
    found = "token 3, '<mask>', FOUND 2 times in 3 tokens of the data: choose one that no text contains"
    assert describe_mask_token(3, info, rows) == found
    behind = len(AutoTokenizer.from_pretrained(tiny_target))
    assert describe_mask_token(behind, info, rows).startswith(
        f"token {behind}, none of the tokenizer's own, in none of 3"
    )
