"""A run that begins from a draft folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dflash_dist.contract.folder import write_draft
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.export import export
from dflash_dist.ranks import World
from dflash_dist.target.load import read_info
from dflash_dist.training.setup import draft_shape, make_draft
from dflash_dist.training.trainer import Trainer
from tests.tiny import tiny_shape

ALONE = World(0, 1, torch.device("cpu"))
STILL = ("train.lr=1e-30", "train.warmup=0")  # a step that changes no weight


def metrics(run: Path, name: str) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def begun_from(debug_config, draft: Path, tiny_target: Path, *overrides: str):
    """The draft that a run with this `draft.init` starts with."""
    config = debug_config(f"draft.init={draft}", f"target.path={tiny_target}", *overrides)
    return make_draft(config, read_info(str(tiny_target)))[0]


@pytest.fixture
def published(tmp_path) -> Path:
    """A draft of another hand: other norms, rotary base and sizes than the target's."""
    shape = tiny_shape(
        rms_norm_eps=1e-5, rope_theta=5e5, num_attention_heads=2, head_dim=8, max_position_embeddings=512
    )
    torch.manual_seed(3)
    write_draft(tmp_path / "published", DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "bfloat16")
    return tmp_path / "published"


@pytest.mark.parametrize("layout", ["dflash", "speculators"])
def test_training_goes_on_from_an_export_where_its_run_ended(debug_config, tmp_path, layout):
    first = debug_config("train.max_steps=3", "validate.every=3", "checkpoint.every=100")
    Trainer(first, ALONE).run()
    out = tmp_path / "export"
    export.main(["--run", first.output_dir, "--out", str(out), "--dtype", "float32", "--format", layout])

    second = debug_config("train.max_steps=1", "validate.every=1", "checkpoint.every=100", f"draft.init={out}")
    second.output_dir = str(tmp_path / "second")
    Trainer(second, ALONE).run()
    before, after = (metrics(Path(config.output_dir), "val/loss") for config in (first, second))
    assert before[3] == after[0] < before[0]


def test_the_first_steps_loss_is_that_of_the_run_it_came_from(debug_config, tmp_path):
    short = ["train.max_steps=1", "validate.every=0", "checkpoint.every=100", "log.every=1"]
    first = debug_config(*short, *STILL)
    Trainer(first, ALONE).run()
    export.main(["--run", first.output_dir, "--out", str(tmp_path / "export"), "--dtype", "float32"])

    second = debug_config(*short, f"draft.init={tmp_path / 'export'}")
    second.output_dir = str(tmp_path / "second")
    Trainer(second, ALONE).run()
    theirs, ours = (metrics(Path(config.output_dir), "train/loss") for config in (first, second))
    assert theirs == ours and theirs.keys() == {1}


def test_every_weight_is_the_folders(debug_config, tiny_target, published):
    stored = load_file(published / "model.safetensors")
    draft = begun_from(debug_config, published, tiny_target)
    for name, parameter in draft.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, stored[name].float()), name


def test_what_the_config_leaves_open_is_the_folders_not_the_targets(debug_config, tiny_target, published):
    shape = begun_from(debug_config, published, tiny_target).shape
    assert (shape.rms_norm_eps, shape.rope_theta, shape.head_dim, shape.max_position_embeddings) == (1e-5, 5e5, 8, 512)
    assert (shape.num_attention_heads, shape.num_key_value_heads) == (2, 2)
    assert begun_from(debug_config, published, tiny_target, "draft.num_attention_heads=2").shape == shape


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("draft.mask_token_id=4", "draft.mask_token_id is 4, its own 3"),
        ("draft.block_size=16", "draft.block_size is 16, its own 8"),
        ("draft.num_layers=1", "draft.num_layers is 1, its own 2"),
        ("draft.head_dim=16", "draft.head_dim is 16, its own 8"),
        ("target.layer_ids=[1,3,4]", r"target\.layer_ids is \[1, 3, 4\], its own \[1, 2, 4\]"),
        ("target.layer_ids=[1,2] draft.block_size=16", r"draft.block_size is 16, .*target\.layer_ids is \[1, 2\], its"),
        ("data.seq_len=1024", r"data\.seq_len 1024 is above the 512 positions of .*published"),
    ],
)
def test_another_draft_than_the_config_describes_is_refused_by_name(
    debug_config, tiny_target, published, overrides, named
):
    with pytest.raises(ValueError, match=named):
        begun_from(debug_config, published, tiny_target, *overrides.split())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}},
        {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 5e5}}},
        {"rope_parameters": None, "rope_theta": 5e5},
    ],
    ids=["scaled", "of two kinds of layers", "as it was written before transformers 5"],
)
def test_the_rotary_base_is_the_targets_wherever_its_config_has_it(debug_config, tiny_target, rope) -> None:
    text = SimpleNamespace(**json.loads((tiny_target / "config.json").read_text()) | rope)
    assert draft_shape(debug_config("draft.init=random"), text, "target").rope_theta == 5e5


def test_a_draft_of_another_target_is_refused(debug_config, tiny_target, tmp_path):
    shape = tiny_shape(hidden_size=32, num_target_layers=7)
    write_draft(tmp_path / "other", DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "float32")
    with pytest.raises(ValueError, match=r"the target's hidden_size is 64, its own 32; .*_layers is 6, its own 7"):
        begun_from(debug_config, tmp_path / "other", tiny_target)


def test_a_word_that_is_no_draft_is_refused(debug_config, tiny_target):
    with pytest.raises(ValueError, match="'targett' is neither random nor target, nor the folder or hub id of a draft"):
        begun_from(debug_config, Path("targett"), tiny_target)


def test_a_checkpoint_wins_over_the_draft_to_begin_from(debug_config, tmp_path, capsys):
    short = ["validate.every=0", "checkpoint.every=100", "log.every=1"]
    shape = tiny_shape()
    write_draft(tmp_path / "other", DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "float32")
    init = f"draft.init={tmp_path / 'other'}"
    Trainer(debug_config(init, "train.max_steps=2", *short), ALONE).run()

    trainer = Trainer(debug_config(init, "train.max_steps=2", *short), ALONE)
    began = trainer.training.draft.state_dict()["fc.weight"].clone()
    assert torch.equal(began, load_file(tmp_path / "other/model.safetensors")["fc.weight"])
    assert trainer.resume() == 2
    saved = load_file(tmp_path / "run/checkpoints/step-00000002/draft.safetensors")
    for name, tensor in trainer.training.draft.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert not torch.equal(saved["fc.weight"], began)
    assert "resuming from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, 5e5),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, 1e6),
        ({"full_attention": None, "sliding_attention": {"rope_theta": 3e4}}, 3e4),  # no positions in full layers
        (None, 1e4),
    ],
)
def test_the_drafts_rotary_base_is_the_targets(debug_config, tiny_target, rope, theta):
    config, info = debug_config(f"target.path={tiny_target}"), read_info(str(tiny_target))
    info.config.rope_parameters = rope
    assert draft_shape(config, info.text, "it").rope_theta == theta
