"""Drafts whose layers see a window, or whose slots see no later ones: each layer as its config says, in training, in
decoding and in every engine. What a mask means is held by tests/kernels/test_attention.py."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from transformers import Qwen3Config

from dflash_dist.contract.folder import read_draft, read_kind, write_draft
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.visibility import as_transformers, as_vllm, from_keys, to_keys
from dflash_dist.export.check import check
from dflash_dist.export.export import main as export
from dflash_dist.kernels.mask import FULL, Mask
from dflash_dist.ranks import World
from dflash_dist.training.trainer import Trainer
from tests.draft.test_model import K, packed_case
from tests.reference import DenseAttention, lively_draft
from tests.tiny import lively_target, tiny_shape

CPU = torch.device("cpu")
SLIDING, ALL = "sliding_attention", "full_attention"
MIXED = {"layer_types": [SLIDING, ALL], "sliding_window": 12, "is_causal": False}


@pytest.mark.parametrize(
    ("changes", "masks"),
    [
        ({}, [FULL, FULL]),
        ({"is_causal": True}, [Mask(causal=True)] * 2),
        (MIXED, [Mask(12), FULL]),
        (MIXED | {"is_causal": None}, [Mask(12, causal=True), FULL]),
        (MIXED | {"layer_types": [SLIDING] * 2, "is_causal": True}, [Mask(12, causal=True)] * 2),
    ],
)
def test_every_engine_reads_what_is_written(changes, masks) -> None:
    shape = tiny_shape(**changes)
    assert shape.masks == masks
    top, inner = to_keys(shape)
    config = top | {"dflash_config": inner}
    assert as_vllm(config, 2) == as_transformers(config, 2) == masks
    assert tiny_shape(**from_keys(config, 2)).masks == masks
    if changes:
        assert from_keys(config, 2) == {"layer_types": None, "sliding_window": None, "is_causal": False} | changes


@pytest.mark.parametrize(
    ("config", "vllm", "others"),
    [
        # z-lab's drafts of Qwen3.6, and its DFlash 2: the types alone make layers causal.
        ({"layer_types": [SLIDING, ALL], "sliding_window": 9, "use_sliding_window": True}, [Mask(9, True), FULL], None),
        (
            {"layer_types": [SLIDING] * 2, "sliding_window": 9, "use_sliding_window": True, "is_causal": False},
            [Mask(9)] * 2,
            None,
        ),
        # ModelOpt's export says it inside alone, which SGLang and transformers do not read.
        (
            {"layer_types": [ALL] * 2, "dflash_config": {"causal": True, "use_swa": True, "swa_window_size": 9}},
            [Mask(9, True)] * 2,
            [FULL] * 2,
        ),
        ({"is_causal": False, "dflash_config": {"causal": True}}, [FULL] * 2, None),
        # Qwen3's config forgets the window; other models' do not.
        ({"layer_types": [SLIDING] * 2, "sliding_window": 9}, [Mask(None, True)] * 2, None),
        ({"layer_types": [SLIDING] * 2, "sliding_window": 9, "model_type": "mistral"}, [Mask(9, True)] * 2, None),
        ({"layer_types": None}, [FULL] * 2, None),
        # Layers that vLLM is told to let slide, whatever their types, are not causal for that.
        ({"dflash_config": {"use_swa": True, "swa_window_size": 9}}, [Mask(9)] * 2, [FULL] * 2),
    ],
)
def test_what_engines_make_of_other_drafts(config, vllm, others) -> None:
    assert as_vllm(config, 2) == vllm
    assert as_transformers(config, 2) == (others or vllm)


def every_config() -> list[dict]:
    """Each combination of the keys that say what two layers see, values for them being there and not."""
    top = {
        "layer_types": (None, [ALL, ALL], [SLIDING, ALL], [SLIDING, SLIDING]),
        "sliding_window": (None, 24),
        "use_sliding_window": (None, True),
        "max_window_layers": (None, 1),
        "is_causal": (None, False, True),
    }
    inner = {"causal": (None, False, True), "swa_window_size": (None, 16), "use_swa": (None, True)}
    outside, inside = (
        [
            {key: value for key, value in zip(keys, values) if value is not None}
            for values in itertools.product(*keys.values())
        ]
        for keys in (top, inner)
    )
    start = {"model_type": "qwen3", "num_hidden_layers": 2}
    return [start | a | {"dflash_config": b} for a, b in itertools.product(outside, inside)]


def test_gaps_are_filled_as_qwen3s_config_fills_them() -> None:
    """What vLLM itself reads of the same configs: tests/vllm_engine.py."""
    for config in (config for config in every_config() if not config["dflash_config"]):
        read = Qwen3Config(**config)
        sliding = [kind == SLIDING for kind in read.layer_types]
        causal = sliding if "is_causal" not in config else [config["is_causal"]] * 2
        masks = [Mask(read.sliding_window if slides else None, hides) for slides, hides in zip(sliding, causal)]
        assert as_transformers(config, 2) == masks, config


def test_a_window_that_reaches_everything_is_none() -> None:
    case = packed_case()
    full = case.draft
    windowed = lively_draft(tiny_shape(**MIXED | {"sliding_window": 40 + K}))
    batch = case.blocks
    outputs = [draft(batch, case.features, case.embedding) for draft in (full, windowed)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("causal", [False, True, None])
def test_layers_that_differ_train_as_the_dense_reference(causal, monkeypatch) -> None:
    case = packed_case()
    draft = lively_draft(tiny_shape(**MIXED | {"is_causal": causal}))
    blocks, results = case.blocks, []
    for ours in (True, False):
        draft.zero_grad()
        features = case.features.clone().requires_grad_()
        if ours:
            hidden = draft(blocks, features, case.embedding)
        else:
            inside = [causal is not False, bool(causal)]  # written out by layer
            dense = [DenseAttention(blocks, window, inner) for window, inner in zip((12, None), inside)]
            monkeypatch.setattr(draft, "_attention", lambda _, dense=dense: dense)
            hidden = draft(blocks, features, case.embedding)
        used = (blocks.anchor_documents >= 0).repeat_interleave(K, dim=1)
        hidden[used].square().sum().backward()
        results.append([hidden[used], features.grad, *(parameter.grad for parameter in draft.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_the_last_slot_of_a_block_sees_so_many_tokens_fewer_than_its_anchor() -> None:
    case = packed_case()
    draft = lively_draft(tiny_shape(num_layers=1, layer_types=[SLIDING], sliding_window=10))
    features = case.features.clone().requires_grad_()
    hidden = draft(case.blocks, features, case.embedding).unflatten(1, (-1, K))
    anchor = 27  # in the first row, with its document from 12 on
    block = case.blocks.anchors[0].tolist().index(anchor)
    for slot in range(K):
        (gradient,) = torch.autograd.grad(hidden[0, block, slot].sum(), features, retain_graph=True)
        seen = gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist()
        # Keys of slots that share the block do not look at the context: what is left is the slot's own window.
        assert seen == list(range(anchor + slot - 9, anchor))


def test_a_draft_with_a_window_trains_is_exported_checked_decodes_and_begins_another(
    debug_config, tiny_target, tmp_path
) -> None:
    knobs = ["draft.window=12", "draft.full_layers=[1]", "draft.causal=true", "train.max_steps=2", "validate.every=0"]
    trainer = Trainer(debug_config(*knobs), World(0, 1, CPU))
    trainer.run()
    masks = [Mask(12, causal=True), Mask(causal=True)]
    assert trainer.training.draft.masks == masks
    out = tmp_path / "draft"
    export(["--run", str(tmp_path / "run"), "--out", str(out), "--dtype", "float32"])
    assert not [line for line in check(out, str(tiny_target)) if line.kind != "ok"]
    config = json.loads((out / "config.json").read_text())
    told = "layer_types", "sliding_window", "use_sliding_window", "is_causal"
    assert [config[key] for key in told] == [[SLIDING, ALL], 12, True, True]
    assert (config["dflash_config"]["causal"], config["dflash_config"]["swa_window_size"]) == (True, 12)
    assert "a window of 12 tokens in layers 0" in (out / "README.md").read_text()
    draft = read_draft(out, torch.float32, CPU)
    assert isinstance(draft, DFlashDraftModel) and draft.masks == masks
    decoder = Decoder(lively_target(tiny_target), draft, stop_ids=[2])
    assert decoder.speculative(range(10, 20), 40).tokens == decoder.plain(range(10, 20), 40).tokens

    another = ["train.max_steps=0", f"output_dir={tmp_path / 'another'}", f"draft.init={out}"]
    begun = Trainer(debug_config(*another), World(0, 1, CPU)).training.draft
    assert begun.masks == masks and torch.equal(begun.fc.weight, draft.fc.weight)
    wider = Trainer(debug_config(*another, "draft.window=20"), World(0, 1, CPU)).training.draft
    assert wider.masks == [Mask(20)] * 2, "a window that is asked for is another one than the draft was trained with"


def test_the_speculators_layout_says_it_where_it_can(tmp_path) -> None:
    for causal in (False, True):
        shape = tiny_shape(**MIXED | {"layer_types": [SLIDING] * 2, "is_causal": causal})
        folder = tmp_path / str(causal)
        write(folder, shape)
        assert json.loads((folder / "config.json").read_text())["sliding_window_non_causal"] is not causal
        assert read_kind(folder, 6)[1].masks == [Mask(12, causal)] * 2
        assert not [str(line) for line in check(folder) if line.kind == "FAULT"]
    for changes in ({"is_causal": True}, MIXED | {"is_causal": None}):
        with pytest.raises(ValueError, match="cannot say of layers with full attention whether they are causal"):
            write(tmp_path / "other", tiny_shape(**changes))


def write(folder, shape) -> None:
    tensors = DFlashDraftModel(shape).state_dict()
    write_draft(folder, DFlashDraftModel, shape, tensors, "float32", ("org/target", ["Qwen3ForCausalLM"]))


def test_a_window_below_the_block_is_refused(debug_config) -> None:
    with pytest.raises(ValueError, match=r"draft.window 7 is below draft.block_size 8: a slot must see its anchor"):
        debug_config("draft.window=7")
    with pytest.raises(ValueError, match=r"draft.full_layers \[2\]: the draft has layers 0 to 1"):
        debug_config("draft.window=8", "draft.full_layers=[2]")
    assert dataclasses.replace(tiny_shape(), sliding_window=None).masks == [FULL] * 2
