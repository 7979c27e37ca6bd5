"""Every rule has a draft that breaks it, and every legal choice of published drafts one that must pass."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_dist.__main__ import main as program
from dflash_dist.contract.folder import write_draft
from dflash_dist.contract.speculators import to_speculators
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.export.check import check
from dflash_dist.export.rules import RULES, TARGET_RULES
from tests.tiny import tiny_shape

WINDOW = {"sliding_window": 64, "use_sliding_window": True}


class Folder:
    """A draft folder to break."""

    def __init__(self, path):
        self.path = path

    def config(self, **changes):
        """Sets keys of config.json; None removes one."""
        file = self.path / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def published(self, **changes):
        """As `config`, of a draft trained elsewhere: without a record, and with keys at the top level alone."""
        self.tensors()
        inner = json.loads((self.path / "config.json").read_text())["dflash_config"]
        self.config(**changes, dflash_config={key: value for key, value in inner.items() if key != "causal"})

    def inner(self, **changes):
        """Sets keys of dflash_config."""
        config = json.loads((self.path / "config.json").read_text())
        self.config(dflash_config=config["dflash_config"] | changes)

    def speculators(self, **changes):
        """Rewrites config.json in the layout of the speculators library, with these keys."""
        config = json.loads((self.path / "config.json").read_text())
        config = to_speculators(config, "org/target", ["Qwen3ForCausalLM"]) | changes
        (self.path / "config.json").write_text(json.dumps(config))

    def tensors(self, **changes):
        """Replaces tensors, underscores for dots; None removes one. The record of the training goes."""
        tensors = load_file(self.path / "model.safetensors")
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})

    def shards(self):
        """Two files and their index instead of one file."""
        tensors = load_file(self.path / "model.safetensors")
        names = sorted(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, self.path / file)
        (self.path / "model.safetensors").unlink()
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))


def write(path, dtype="bfloat16", **changes):
    torch.manual_seed(0)
    shape = tiny_shape(**changes)
    write_draft(path, DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), dtype)
    return Folder(path)


@pytest.fixture
def draft(tmp_path):
    return write(tmp_path / "draft")


def flagged(draft, target=None) -> dict[str, tuple[str, str]]:
    """Rule -> (kind, text) of all lines but `ok`."""
    lines = check(draft.path, target and str(target))
    return {line.rule: (line.kind, str(line)) for line in lines if line.kind != "ok"}


def test_an_export_passes_every_rule(draft, tiny_target):
    lines = check(draft.path, str(tiny_target))
    assert [line.kind for line in lines] == ["ok"] * (1 + len(RULES) + len(TARGET_RULES))


def test_without_a_target_its_rules_are_left_out(draft):
    assert [line.kind for line in check(draft.path)] == ["ok"] * (1 + len(RULES))


ONES = torch.ones(64, dtype=torch.bfloat16)
BREAKS = {
    # rule -> pairs of what breaks it and what the line must say
    "config": [
        (lambda d: d.config(head_dim=None), "no key 'head_dim'"),
        (lambda d: d.config(num_target_layers=None), "no key 'num_target_layers'"),
        (lambda d: d.config(rope_theta=None, rope_parameters=None), "no key 'rope_theta'"),
        (lambda d: d.inner(target_layer_ids=None), "target_layer_ids in .*config.json is None"),
        (lambda d: d.config(hidden_size="64"), "hidden_size in .*config.json is '64'"),
    ],
    "class": [
        (lambda d: d.config(architectures=["Qwen3ForCausalLM"]), r"\['Qwen3ForCausalLM'\] should be"),
        (lambda d: d.config(architectures=None), "architectures None"),
        (lambda d: d.config(model_type=None), "model_type is missing"),
    ],
    "tensors": [
        (lambda d: d.tensors(**{"norm.weight": None}), "norm.weight is missing .vLLM and SGLang serve"),
        (
            lambda d: d.config(num_hidden_layers=3, layer_types=None),
            "layers.2.input_layernorm.weight is missing; .* and 7 more ",
        ),
        (lambda d: d.config(attention_bias=True), "layers.0.self_attn.q_proj.bias is missing"),
    ],
    "other tensors": [
        (
            lambda d: d.tensors(**{f"x{i}": ONES.clone() for i in range(9)}),
            "x0 does not belong into a draft; .*; and 5 more ",
        ),
        (lambda d: d.tensors(**{"embed_tokens.weight": ONES}), "embed_tokens.weight does not belong"),
        (lambda d: d.tensors(**{"model.norm.weight": ONES}), "model.norm.weight does not belong"),
        (lambda d: d.tensors(**{"rotary_emb.inv_freq": ONES}), "rotary_emb.inv_freq does not belong"),
        (lambda d: d.config(num_hidden_layers=1, layer_types=None), "layers.1.mlp.up_proj.weight does not belong"),
    ],
    "what layers see": [
        (
            lambda d: (d.config(is_causal=None), d.inner(causal=True)),
            r"layers \[0, 1\]: full attention causal inside the block in vLLM, full attention in both directions",
        ),
        (
            lambda d: d.inner(use_swa=True, swa_window_size=64),
            r"a window of 64 in both directions inside the block in vLLM, full attention in both",
        ),
        (
            lambda d: (
                d.config(layer_types=["full_attention", "sliding_attention"], **WINDOW),
                d.inner(swa_window_size=32),
            ),
            r"layers \[1\]: a window of 32 .* in vLLM, a window of 64",
        ),
    ],
    "window": [
        (
            lambda d: d.config(layer_types=["sliding_attention"] * 2, **WINDOW | {"sliding_window": 7}),
            "7 for blocks of 8",
        ),
    ],
    "tensor shapes": [
        (lambda d: d.tensors(**{"norm.weight": ONES[:63].clone()}), r"norm.weight is \[63\], not \[64\]"),
        (lambda d: d.inner(target_layer_ids=[1, 2]), r"fc.weight is \[64, 192\], not \[64, 128\]"),
        (lambda d: d.config(head_dim=32), r"q_proj.weight is \[64, 64\], not \[128, 64\]"),
    ],
    "number format": [(lambda d: d.tensors(**{"norm.weight": ONES.to(torch.int8)}), "norm.weight is I8")],
    "other weights": [(lambda d: save_file({"x": ONES}, d.path / "older.safetensors"), "older.safetensors")],
    "target layers": [
        (lambda d: d.inner(target_layer_ids=[4, 2, 1]), "not strictly increasing.*vLLM sorts them"),
        (lambda d: d.inner(target_layer_ids=[1, 2, 2]), "not strictly increasing"),
        (lambda d: d.inner(target_layer_ids=[1, 2, 5]), "below the target's last layer"),
        (lambda d: d.inner(target_layer_ids=[-1, 2, 4]), "not strictly increasing"),
    ],
    "mask token": [
        (lambda d: d.inner(mask_token_id=260), "260 is outside the vocabulary of 260"),
        (lambda d: d.inner(mask_token_id=-1), "-1 is outside the vocabulary of 260"),
    ],
    "block size": [
        (lambda d: d.config(block_size=16), "16 at the top level, 8 at dflash_config"),
        (lambda d: (d.config(block_size=1), d.inner(block_size=1)), "1 leaves no slot"),
    ],
    "layer types": [
        (lambda d: d.config(layer_types=["full_attention"]), "1 for 2 layers"),
        (lambda d: d.config(layer_types=["full_attention", "linear_attention"]), "no such type: linear_attention"),
        (lambda d: d.config(layer_types=["sliding_attention"] * 2), "sliding_attention without a window"),
        (lambda d: d.config(layer_types=["sliding_attention"] * 2, sliding_window=64), "without a window"),
        (lambda d: d.inner(use_swa=True), "sliding_attention without a window"),
    ],
    "rotary positions": [
        (lambda d: d.config(rope_theta=1e6), "rope_parameters say rope_theta 10000.0, the top level 1000000.0"),
        (lambda d: d.config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (
            lambda d: d.config(rope_parameters={"rope_theta": 1e4, "mrope_section": [4, 2, 2]}),
            r"mrope_section \[4, 2, 2\]",
        ),
        (lambda d: d.config(is_neox_style=False), "is_neox_style is false"),
    ],
    "attention in both directions": [
        (lambda d: d.speculators(sliding_window_non_causal=False), "non_causal is false.* vLLM hides the slots behind"),
    ],
    "heads and activation": [
        (lambda d: d.config(hidden_act="gelu"), "hidden_act gelu"),
        (lambda d: d.config(num_key_value_heads=3), "4 heads do not share 3"),
    ],
    "as trained": [
        (lambda d: d.inner(target_layer_ids=[0, 1, 3]), r"target_layer_ids is \[0, 1, 3\], trained with \[1, 2, 4\]"),
        (
            lambda d: d.config(rope_theta=1e6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
            "rope_theta is 1000000.0, trained with 10000.0",
        ),
        (lambda d: (d.config(block_size=16), d.inner(block_size=16)), "block_size is 16, trained with 8"),
        (lambda d: d.inner(mask_token_id=4), "mask_token_id is 4, trained with 3"),
        (
            lambda d: d.speculators(aux_hidden_state_layer_ids=[1, 2, 4]),  # as they are in the other layout
            r"target_layer_ids is \[0, 1, 3\], trained with \[1, 2, 4\]",
        ),
    ],
}
NOTES = {
    "training record": [(lambda d: d.tensors(), "no dflash_shape in the metadata")],
    "model type": [(lambda d: d.config(model_type="llama"), "it is llama")],
    "dtype": [
        (lambda d: d.config(dtype="float32"), "the config says float32, the weights are bfloat16"),
        (lambda d: d.tensors(**{"norm.weight": ONES.float()}), "the weights are bfloat16 and float32"),
    ],
    "mask embedding": [(lambda d: torch.save(ONES, d.path / "mask_embedding.pt"), "mask_embedding.pt")],
    "leftovers": [
        (lambda d: d.config(linear_num_key_heads=16, final_logit_softcapping=30.0), "linear_num_key_heads; final_"),
        (lambda d: d.config(tie_word_embeddings=True), "tie_word_embeddings"),
        (lambda d: d.config(output_multiplier=2.0, logit_scale=0.5), "output_multiplier; logit_scale"),
        (lambda d: d.config(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    ],
    "variant": [
        (lambda d: d.speculators(sample_from_anchor=True), "sample_from_anchor True"),
        (lambda d: d.config(attention_bias=True), "attention_bias True"),
        (lambda d: d.config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling .*yarn"),
        (lambda d: d.config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type yarn"),
        (lambda d: d.inner(attention_value_scale=0.7), "attention_value_scale 0.7"),
    ],
}
CASES = [
    pytest.param(rule, kind, break_it, text, id=f"{rule}-{number}")
    for kind, table in (("FAULT", BREAKS), ("note", NOTES))
    for rule, cases in table.items()
    for number, (break_it, text) in enumerate(cases)
]


@pytest.mark.parametrize(("rule", "kind", "break_it", "text"), CASES)
def test_a_broken_draft_is_caught_by_its_rule(draft, rule, kind, break_it, text):
    break_it(draft)
    found = flagged(draft)
    assert rule in found, found
    assert found[rule][0] == kind
    assert re.search(text, found[rule][1]), found[rule][1]


def test_every_rule_is_broken_by_a_test():
    of_kinds = {"keys at the top level", "Markov head"}  # tests/draft/test_dspark.py breaks them
    assert BREAKS.keys() | NOTES.keys() | of_kinds == {"config", *(rule.name for rule in RULES)}
    assert {name for name, *_ in TARGET_CASES} == {rule.name for rule in TARGET_RULES}
    assert all(rule.engines for rule in RULES + TARGET_RULES)


TARGET_CASES = [
    ("target's sizes", "FAULT", {"hidden_size": 32}, "hidden size 32, not 64"),
    ("target's sizes", "FAULT", {"vocab_size": 300}, "vocabulary 300, not 260"),
    ("target's sizes", "FAULT", {"num_target_layers": 8}, "number of target layers 8, not 6"),
    ("target's mask token", "note", {"mask_token_id": 2}, "is the eos token of"),
    ("target's rotary base", "note", {"rope_theta": 5e5}, "500000, the target's is 10000"),
    ("target's positions", "note", {"max_position_embeddings": 512}, "512, the target's are 2048"),
]


@pytest.mark.parametrize(("rule", "kind", "change", "text"), TARGET_CASES)
def test_a_draft_of_another_target_is_caught(tmp_path, tiny_target, rule, kind, change, text):
    found = flagged(write(tmp_path / "draft", **change), tiny_target)
    assert found.keys() == {rule}
    assert found[rule][0] == kind
    assert re.search(text, found[rule][1]), found[rule][1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_float_format_passes(tmp_path, dtype):
    assert not flagged(write(tmp_path / "draft", dtype=dtype))


PUBLISHED = {
    "the speculators library's layout": lambda d: d.speculators(),
    "older keys": lambda d: d.config(rope_parameters=None, rope_scaling=None, layer_types=None),
    "block size at the top only": lambda d: d.config(
        dflash_config={"mask_token_id": 3, "target_layer_ids": [1, 2, 4]}, torch_dtype="bfloat16", dtype=None
    ),
    "block size inside only": lambda d: d.config(block_size=None),
    "all rotary dimensions": lambda d: d.config(partial_rotary_factor=1.0),
    "sliding layers that are causal": lambda d: d.published(
        layer_types=["sliding_attention", "full_attention"], is_causal=None, **WINDOW
    ),
    "sliding layers that are not": lambda d: d.published(layer_types=["sliding_attention"] * 2, **WINDOW),
    "shards": lambda d: d.shards(),
    "code and tokenizer beside": lambda d: [(d.path / name).write_text("") for name in ("dflash.py", "vocab.json")],
    "yarn": lambda d: d.config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "biases": lambda d: (
        d.config(attention_bias=True),
        d.tensors(
            **{
                f"layers.{i}.self_attn.{x}_proj.bias": ONES[:n].clone()
                for i in (0, 1)
                for x, n in zip("qkvo", (64, 32, 32, 64))
            }
        ),
    ),
}


@pytest.mark.parametrize("publish", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_the_legal_choices_of_published_drafts_are_no_faults(draft, tiny_target, publish):
    publish(draft)
    assert "FAULT" not in {kind for kind, _ in flagged(draft, tiny_target).values()}


# ---- the command ----


def run(monkeypatch, *arguments) -> str | int | None:
    """Runs the program; returns its exit status or last words, None where it ended well."""
    monkeypatch.setattr(sys, "argv", ["dflash_dist", "check", *map(str, arguments)])
    try:
        program()
    except SystemExit as end:
        return end.code
    return None


def test_the_command_says_how_many_rules_hold_and_which_on_request(monkeypatch, draft, tiny_target, capsys):
    assert run(monkeypatch, draft.path, "--target", tiny_target) is None
    count = 1 + len(RULES) + len(TARGET_RULES)
    assert capsys.readouterr().out == f"{count} rules hold\n"
    assert run(monkeypatch, draft.path) is None
    assert capsys.readouterr().out == f"{1 + len(RULES)} rules hold; --target asks for those about it\n"
    assert run(monkeypatch, draft.path, "--target", tiny_target, "--verbose") is None
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == count and all(line.startswith("ok     ") for line in lines) and last == f"{count} rules hold"


def test_the_command_fails_on_a_fault(monkeypatch, draft, capsys):
    draft.inner(target_layer_ids=[4, 2, 1])
    assert run(monkeypatch, draft.path) == f"{draft.path} has 2 faults"
    *faults, last = capsys.readouterr().out.splitlines()
    assert len(faults) == 2 and all(line.startswith("FAULT") for line in faults) and "vLLM sorts them" in faults[0]
    assert last.startswith(f"{len(RULES) - 1} of {1 + len(RULES)} rules hold; ")


def test_notes_are_no_failure(monkeypatch, draft, capsys):
    draft.tensors()
    assert run(monkeypatch, draft.path) is None
    assert "note   training record: " in capsys.readouterr().out


def test_a_folder_that_is_no_draft_is_said_in_one_line(monkeypatch, draft, tmp_path):
    assert run(monkeypatch, tmp_path / "nowhere").startswith(f"error: draft folder {tmp_path / 'nowhere'} holds no")
    (draft.path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "is cut or damaged" in run(monkeypatch, draft.path)
    (draft.path / "model.safetensors").unlink()
    assert "holds no model.safetensors" in run(monkeypatch, draft.path)


def test_a_target_that_is_not_there_is_said(monkeypatch, draft, tmp_path):
    assert "does not exist" in run(monkeypatch, draft.path, "--target", tmp_path / "nowhere")
