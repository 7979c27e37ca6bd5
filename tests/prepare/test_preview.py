from __future__ import annotations

import json
from pathlib import Path

import pytest

from dflash_dist.prepare.preview import main

CONFIG = str(Path(__file__).parents[2] / "configs/debug.yaml")


@pytest.fixture
def preview(tmp_path, capsys):
    """The lines that the command prints for rows of (question, answer)."""

    def run(rows: list[tuple[str, str]], *options: str) -> list[str]:
        path = tmp_path / "chats.jsonl"
        made = [{"prompt": question, "response": answer} for question, answer in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        knobs = [f"output_dir={tmp_path / 'run'}", f"data.path={path}", "data.val_conversations=0", "validate.every=0"]
        main([knobs[0], "--config", CONFIG, *options, *knobs[1:]])  # before and behind options, as people type
        return capsys.readouterr().out.splitlines()

    return run


# With one token a byte, a document is 8 + question + 1 + 1 + 13 + answer + 1 + 1 tokens:
# <|im_start|>user\n ... <|im_end|>\n <|im_start|>assistant\n ... <|im_end|>\n
def length(question: str, answer: str) -> int:
    return 1 + len("user\n") + len(question) + 2 + 1 + len("assistant\n") + len(answer) + 2


def test_counts_lengths_anchors_and_steps(preview):
    rows = [("abc", "xy")] * 9 + [("abc", "x" * 20)]
    lines = "\n".join(preview(rows))
    short, long = length("abc", "xy"), length("abc", "x" * 20)
    tokens = 9 * short + long
    supervised = 9 * 3 + 21
    assert f"train: 10 conversations -> 10 documents, {tokens} tokens ({supervised / tokens:.0%} supervised)" in lines
    assert f"{short} (10 %)  {short} (50 %)" in lines and f"{long} (longest) tokens" in lines
    assert f"train: {9 * 2 + 20} tokens can be an anchor; {(9 * 2 + 20) / 2:.0f} of loss.anchors 64" in lines
    assert "steps: 60 of 4 rows, 120.0 passes over the data" in lines


def test_a_row_uses_no_more_blocks_than_loss_anchors(preview):
    lines = "\n".join(preview([("abc", "x" * 20)], "loss.anchors=5"))
    assert "train: 20 tokens can be an anchor; 5 of loss.anchors 5 are used in a row" in lines


def test_a_row_is_printed_token_by_token_with_its_mask(preview):
    lines = preview([("abc", "xy"), ("def", "z!")], "--row", "2")
    start = next(i for i, line in enumerate(lines) if line.startswith("row 2, document 1 of 1"))
    tokens = lines[start + 1 :]
    assert len(tokens) == length("def", "z!")
    shown = [line.split(maxsplit=3) for line in tokens if " + " in line]
    assert [entry[-1] for entry in shown] == ["'z'", "'!'", "'<|im_end|>'"]
    assert not any("\033" in line for line in lines), "no colour where nobody sees it"


def test_supervised_tokens_are_green_on_a_terminal(preview, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    green = [line for line in preview([("abc", "xy")]) if line.startswith("\033[32m")]
    assert len(green) == 3 and all(line.endswith("\033[0m") for line in green)


def test_the_first_row_that_gave_a_document_is_shown_by_default(preview):
    assert any(line.startswith("row 1, ") for line in preview([("abc", "xy"), ("def", "z!")]))


def test_a_row_that_does_not_exist_is_refused_with_the_range(preview):
    with pytest.raises(ValueError, match=r"row 3 gives no document: rows count from 1 to 2"):
        preview([("abc", "xy")] * 2, "--row", "3")


def test_almost_nothing_supervised_is_refused_after_the_look_that_tells_why(preview, capsys):
    with pytest.raises(
        ValueError, match=r"only 6 of the \d+ tokens of .* supervised, under 1%: look at a conversation"
    ):
        preview([("q" * 250, "x")] * 3, "data.seq_len=1024")
    shown = capsys.readouterr().out.splitlines()
    assert len([line for line in shown if " + " in line]) == 2
