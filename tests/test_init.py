"""`init` writes a config that runs as it stands, and says of this target and this data what is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from dflash_dist import init
from dflash_dist.config import load_config
from dflash_dist.target.tiny import make_tiny_chats, tiny_config, tiny_tokenizer
from dflash_dist.training.trainer import train
from tests.data.files import chat, write_rows
from tests.data.test_templates import trl_template

ROOM = init.RESERVE / 2**30


def run(target: Path, out: Path, *arguments: str, gpus: int = 0) -> str:
    """The file that is written."""
    init.main([str(target), "--gpus", str(gpus), "--out", str(out), *arguments])
    return out.read_text()


def commented(text: str) -> dict[str, str]:
    """What the file says of each key that it explains."""
    parts = [line.strip().partition(" # ") for line in text.splitlines()]
    return {line.partition(":")[0]: why for line, _, why in parts if why}


def test_from_a_target_and_chats_to_a_run(tmp_path: Path, tiny_target: Path, capsys) -> None:
    chats, file = tmp_path / "chats.jsonl", tmp_path / "mine.yaml"
    make_tiny_chats(chats)
    text = run(tiny_target, file, "--data", str(chats), f"output_dir={tmp_path / 'run'}", "train.epochs=0.5")
    told = capsys.readouterr().out
    config, why = load_config(file), commented(text)
    assert (config.layer_ids, config.mask_token_id) == ([1, 2, 3], 3)
    assert why["layer_ids"] == "3 of 6, spread evenly from the 2nd to the 3rd-from-last"
    assert why["mask_token_id"] == "<mask>, reserved, in none of 256 rows of the data"
    assert config.data.seq_len == 256 and "99 % of the documents have at most" in why["seq_len"]
    assert config.draft.block_size == 8 and config.draft.init == "target"
    assert config.data.val_conversations == 12 and config.train.epochs == 0.5
    assert "as given" not in text and f"target.layer_ids = [1, 2, 3]: {why['layer_ids']}" in told
    assert f"python -m dflash_dist train --config {file}" in told
    train(load_config(file, ["train.max_steps=1"]))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match=r"mine\.yaml exists: delete it, or name another file with --out"):
        run(tiny_target, file)


def test_without_data_the_answers_come_first_and_the_micro_batch_fits(
    tmp_path: Path, tiny_target: Path, capsys
) -> None:
    text = run(tiny_target, tmp_path / "a.yaml", "data.seq_len=64", gpus=4)
    assert commented(text)["path"].startswith("yet to be written by the target itself")
    told = capsys.readouterr().out
    assert "torchrun --nproc_per_node 4 -m dflash_dist regenerate --target" in told
    config = load_config(tmp_path / "a.yaml")
    assert config.loss.anchors == 10, "a sixth of a row of 64"
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (64, 16)
    assert commented(text)["micro_batch_size"] == "0 GiB and 3 for CUDA, of 80 a GPU"
    assert not config.train.gradient_checkpointing and not config.train.shard_optimizer


def test_what_does_not_fit_is_said_after_all_that_saves_memory(tmp_path: Path, tiny_target: Path) -> None:
    knobs = ["data.seq_len=2048", "loss.anchors=8"]
    text = run(tiny_target, tmp_path / "a.yaml", "--memory", f"{ROOM + 1e-6:.6f}", *knobs, gpus=2)
    config = load_config(tmp_path / "a.yaml")
    assert "DOES NOT FIT" in commented(text)["micro_batch_size"]
    assert config.train.micro_batch_size == 1
    assert config.train.gradient_checkpointing and config.train.shard_optimizer


def test_a_target_with_experts_begins_at_random_with_a_dense_draft(tmp_path: Path) -> None:
    sizes = tiny_config(tiny_tokenizer()).to_dict()
    del sizes["model_type"], sizes["architectures"]
    Qwen3MoeConfig(**sizes | {"num_experts": 4, "moe_intermediate_size": 32}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    text = run(tmp_path, tmp_path / "a.yaml")
    config = load_config(tmp_path / "a.yaml")
    assert (config.draft.init, config.draft.intermediate_size) == ("random", 192)
    assert "the target's layers have no mlp.gate_proj.weight" in commented(text)["init"]


@pytest.mark.parametrize(("answer", "thinks"), [("<think>\n\n</think>\n\n4", False), ("<think>\n2+2</think>4", True)])
def test_the_template_decides_whether_the_target_thinks(
    tmp_path: Path, tiny_target: Path, answer: str, thinks: bool
) -> None:
    target, data = tmp_path / "target", tmp_path / "chats.jsonl"
    target.mkdir()
    for file in tiny_target.iterdir():
        (target / file.name).symlink_to(file)
    (target / "chat_template.jinja").unlink()
    (target / "chat_template.jinja").write_text(trl_template("qwen3"))
    write_rows(data, [chat("2+2?", answer)] * 40)
    text = run(target, tmp_path / "a.yaml", "--data", str(data))
    assert load_config(tmp_path / "a.yaml").data.template_args == {"enable_thinking": thinks}
    assert commented(text)["template_args"].endswith("the template takes enable_thinking (true or false)")
    if thinks:
        return
    # Answers that the target wrote here say themselves how.
    (tmp_path / "chats.jsonl.settings.json").write_text(json.dumps({"template_args": {"enable_thinking": True}}))
    text = run(target, tmp_path / "b.yaml", "--data", str(data))
    assert load_config(tmp_path / "b.yaml").data.template_args == {"enable_thinking": True}
    assert commented(text)["template_args"].startswith("as the answers were written")


def test_a_knob_that_is_none_is_refused_and_nothing_is_written(tmp_path: Path, tiny_target: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.batch"):
        run(tiny_target, tmp_path / "a.yaml", "train.batch=4")
    with pytest.raises(ValueError, match=r"nothing in .* can be learned from"):
        run(tiny_target, tmp_path / "a.yaml", "--data", str(write_rows(tmp_path / "bad.jsonl", [chat("alone")])))
    assert not (tmp_path / "a.yaml").exists()
