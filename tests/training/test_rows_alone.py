"""A target that mixes packed documents trains, captures and resumes on one document a row, each run by itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dflash_dist.config import Config
from dflash_dist.prepare.capture import capture
from dflash_dist.prepare.preview import main as preview
from dflash_dist.ranks import World
from dflash_dist.target.tiny import make_tiny_chats, tiny_tokenizer
from dflash_dist.training.context import PACKED
from dflash_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.families import ALONE, family, tiny_config
from tests.ranks import run_ranks

DOCUMENTS, HELD_OUT = 20, 3
SHORT = ("train.max_steps=2", "log.every=1", "validate.every=2", "train.micro_batch_size=2")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The knob for a tiny one, with weights that let every token move what follows it."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    config = tiny_config(family("GptOss").kind, vocab_size=260, initializer_range=0.3, eos_token_id=2, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return f"target.path={folder}"


@pytest.fixture
def few(debug_config, tmp_path):
    """The debug preset on a few conversations, with overrides."""
    make_tiny_chats(tmp_path / "few.jsonl", DOCUMENTS)
    data = (f"data.path={tmp_path / 'few.jsonl'}", f"data.val_conversations={HELD_OUT}")
    return lambda *overrides: debug_config(*SHORT, *data, *overrides)


def train(world: World, config: Config) -> None:
    Trainer(config, world).run()


def captured_by(world: World, config: Config, out: Path) -> None:
    capture(config, out, world, shard_mib=0.1)


def numbers(config: Config) -> list[dict[str, float]]:
    """Every loss that the run logged, exactly."""
    rows = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if "loss" in name} for row in rows]


def test_each_document_is_run_as_if_alone(few, gpt_oss, capsys) -> None:
    trainer = Trainer(few(gpt_oss), ALONE)
    said = capsys.readouterr().out
    assert "mixes packed documents (probed: off by" in said and "one document a row, the rest of it is padding" in said
    assert f"-> {DOCUMENTS - HELD_OUT} rows of 256" in said
    training = trainer.training
    [micro, *_] = training.sampler.held_out()
    features = training.capture(micro).features
    for number, ids, states in zip(micro.place.rows, micro.input_ids, features):
        [document] = training.sampler.held_out_rows.row(number)
        length = len(document.input_ids)
        alone = training.target.model.generate_batch(ids[None, :length], None, None).hidden_states
        assert torch.equal(states[:length], alone[0]) and not states[length:].any()
    assert training.run(0) is not None


def test_a_row_of_padding_runs_too(few, gpt_oss) -> None:
    """The forward of a sharded target is one of all ranks, whatever their rows hold."""
    training = Trainer(few(gpt_oss), ALONE).training
    rows, ran = training.sampler.held_out_rows, []
    target = training.target.model
    target.model.register_forward_hook(lambda _module, _inputs, _output: ran.append(1))
    features = training.target.run(rows.batch([0, len(rows)])).features
    assert len(ran) == 2 and features[0].any() and not features[1].any()


@pytest.mark.parametrize("ranks", [1, 2])
def test_stored_features_give_the_losses_of_online_training(few, gpt_oss, tmp_path, ranks, capsys) -> None:
    online = few(gpt_oss, f"output_dir={tmp_path / 'online'}")
    stored = tmp_path / "features"
    offline = few(gpt_oss, f"output_dir={tmp_path / 'offline'}", f"target.features={stored}")
    for run, *arguments in ((captured_by, online, stored), (train, online), (train, offline)):
        run_ranks(run, 2, *arguments) if ranks == 2 else run(ALONE, *arguments)
    assert json.loads((stored / "index.json").read_text())[PACKED] is False
    assert numbers(offline) == numbers(online) and len(numbers(online)) == 4
    capsys.readouterr()
    data = [f"data.path={online.data.path}", f"data.val_conversations={HELD_OUT}"]
    knobs = [gpt_oss, f"target.features={stored}", f"output_dir={tmp_path / 'preview'}"]
    preview(["--config", str(REPOSITORY / "configs/debug.yaml"), *knobs, *data])
    said = capsys.readouterr().out
    assert f"{stored} holds features of single documents" in said and f"-> {DOCUMENTS - HELD_OUT} rows of 256" in said


def as_before(config: Config, out: Path) -> None:
    """Features as a version wrote them that knew kinds of layers only: packed, and its index does not say so."""
    captured_by(ALONE, config, out)
    index = json.loads((out / "index.json").read_text())
    del index[PACKED]
    for shard in out.glob("*.safetensors"):
        shard.unlink()  # its digest is of the other index
    (out / "index.json").write_text(json.dumps(index, indent=2))
    captured_by(ALONE, config, out)
    assert PACKED not in json.loads((out / "index.json").read_text())


def test_features_of_earlier_versions_are_read_and_filled_up(few, tmp_path, capsys) -> None:
    online, out = few(f"output_dir={tmp_path / 'online'}"), tmp_path / "features"
    as_before(online, out)
    offline = few(f"output_dir={tmp_path / 'offline'}", f"target.features={out}")
    train(ALONE, online)
    capsys.readouterr()
    train(ALONE, offline)
    assert "packed, although nobody tried whether the target keeps them apart" in capsys.readouterr().out
    assert numbers(offline) == numbers(online)


def test_packed_features_of_a_target_that_mixes_documents_are_not_filled_up(few, gpt_oss, tmp_path) -> None:
    config, out = few(gpt_oss), tmp_path / "features"
    with pytest.MonkeyPatch.context() as patch:  # an interrupted capture of an earlier version
        patch.setattr(
            "dflash_dist.prepare.capture.load_probed", lambda *_: (SimpleNamespace(model=None), True, "not tried")
        )
        patch.setattr("dflash_dist.prepare.capture.run", lambda *_: None)
        with pytest.raises(ValueError, match="which was just written"):
            captured_by(ALONE, config, out)
    with pytest.raises(ValueError, match=r"packed rows, but .* mixes packed documents .*Capture into another folder"):
        captured_by(ALONE, config, out)


def test_preview_says_what_it_expects(tmp_path, capsys) -> None:
    preview(["--config", str(REPOSITORY / "configs/debug.yaml"), f"output_dir={tmp_path}"])
    assert "several documents a row, to go by the config: the run probes it" in capsys.readouterr().out
