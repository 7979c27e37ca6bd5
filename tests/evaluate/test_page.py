"""The page of a run. That it looks well, only a look at it tells."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dflash_dist.config import Config
from dflash_dist.decoding.speculative import Decoded
from dflash_dist.evaluate.page import chart, main, ticks
from dflash_dist.evaluate.report import Answer, examples, summarise
from dflash_dist.training import setup


class Letters:
    """A tokenizer; 9 is the first half of a character."""

    def decode(self, tokens: list[int]) -> str:
        return "".join("&<bcdefgh"[t] if t < 9 else "" for t in tokens)


ANSWER = Answer("s", 0, 0, Decoded([0] * 7, 2.0), Decoded([0, 1, 2, 3, 4, 9, 5], 1.0, [4, 1, 1], [3, 1, 0]), None)
BLOCKS = [
    {"accepted": 0, "text": "", "own": "&"},
    {"accepted": 3, "text": "<bc", "own": "d"},
    {"accepted": 1, "text": "", "own": ""},
    {"accepted": 0, "text": "", "own": "e"},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """That was evaluated and exported."""
    folder = tmp_path / "a<run>"
    setup.describe_run(Config(output_dir=str(folder)))
    rows = [{"step": step, "train/loss": 9.0 / step, "train/tau": 1.0 + step, "perf/step_s": 36.0} for step in (2, 4)]
    rows += [{"step": 4, "val/loss": 3.5, "val/accuracy_slot_01": 0.5, "val/accuracy_slot_02": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "README.md").write_text("# A card")
    report = summarise([ANSWER], proposals=3) | {"draft": str(draft)}
    report["examples"] = examples([ANSWER], {("s", 0): "Why <b>?"}, Letters())
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


def written(run: Path, *options: str) -> str:
    main([str(run), *options])
    return (run / "report.html").read_text()


def test_an_example_tells_accepted_proposals_from_the_targets_own_tokens() -> None:
    assert examples([ANSWER] * 9, {("s", 0): "Q"}, Letters()) == [{"suite": "s", "question": "Q", "blocks": BLOCKS}] * 3


def test_the_page_has_all_of_a_run_and_needs_nothing_else(run: Path) -> None:
    text = written(run)
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|https?://(?!www\.w3\.org)", text)
    assert "a&lt;run&gt;" in text and "<run>" not in text and "Why &lt;b&gt;?" in text
    assert "4 steps, 0.8 M tokens in rows, 0.0 h; trained τ 5.00, evaluated τ 2.00" in text
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    lines = {svg.get("aria-label"): len(svg.findall("polyline")) for svg in pictures}
    assert lines == {"loss": 2, "acceptance length τ": 1, "share by slot": 2}
    assert 'title="3 of 3 accepted">&lt;bc<u>d</u></span>' in text
    assert "about 2.00 tokens a pass" in text and "output_dir: " in text and "# A card" in text


def test_a_run_that_was_not_evaluated_or_has_just_begun_has_a_page_too(run: Path) -> None:
    (run / "evaluation.json").write_text('{"tau": 3}')
    assert "Decoding" not in written(run)
    (run / "metrics.jsonl").unlink()
    assert "0 steps" in (text := written(run)) and "nothing logged yet" in text and "<svg" not in text


def test_a_readme_that_happens_to_lie_here_is_no_card(run: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "README.md").write_text("something else")
    monkeypatch.chdir(tmp_path)
    for file in run.glob("*.json"):
        file.unlink()
    assert "something else" not in written(run)


def test_what_is_no_run_or_no_evaluation_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config file .*draft/config\.yaml does not exist"):
        main([str(tmp_path / "draft")])
    file = run / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"suites": {"s": {}}}))
    with pytest.raises(
        ValueError, match=r"the evaluation cannot be read \(KeyError: .*\): give what `evaluate --json`"
    ):
        main([str(run), "--json", str(file)])


def test_points_lie_where_the_axes_say() -> None:
    (line,) = ElementTree.fromstring(re.findall("<svg.*</svg>", chart("x", {"a": [(0, 0.0), (10, 1.0)]}))[0]).findall(
        "polyline"
    )
    assert line.get("points") == "44.0,178.0 352.0,8.0"
    assert chart("x", {}) == "" and "nan" not in chart("x", {"a": [(1, 0.0)]})


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0, 0.5, 1]), (1.2, 12.7, [5, 10]), (0.0, 2e-3, [0, 5e-4, 1e-3, 1.5e-3, 2e-3]), (90.0, 99.0, [90, 95])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
