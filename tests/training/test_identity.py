"""What a run may change where it goes on from a checkpoint: every knob, one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dflash_dist.config import FREE, KNOBS, Config, values
from dflash_dist.draft.kinds import KINDS
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.shape import DraftShape
from dflash_dist.ranks import World
from dflash_dist.target.tiny import make_tiny_chats, make_tiny_target
from dflash_dist.training import setup
from dflash_dist.training.acceptance import find_prompts
from dflash_dist.training.checkpoint import FILES, read_state, step_folders
from dflash_dist.training.identity import identity_of, refuse_another, refuse_changed_knobs
from dflash_dist.training.trainer import Trainer

# Every knob with another value, and other knobs that this one needs.
CHANGES = {
    "output_dir": "{tmp}/elsewhere",
    "target.path": "{tmp}/other-target",
    "target.revision": "v2 target.path={tmp}/other-target",
    "target.trust_remote_code": "true",
    "target.layer_ids": "[1,2,3]",
    "target.dtype": "bfloat16",
    "target.replicas": "2",
    "target.full_depth": "false eval.every=0",
    "target.attention": "eager",
    "target.features": "stored eval.every=0",
    "data.path": "{tmp}/others.jsonl",
    "data.val_path": "{tmp}/others.jsonl",
    "data.val_conversations": "31",
    "data.seq_len": "128",
    "data.max_bad_rows": "3",
    "data.chat_template": "{tmp}/other.jinja",
    "data.template_args": '{{"enable_thinking":false}}',
    "data.date": "2001-01-01",
    "data.last_turn_only": "true",
    "data.drop_reasoning": "true",
    "data.cache_dir": "{tmp}/cache",
    "draft.mask_token_id": "10",
    "draft.kind": "another",
    "draft.block_size": "10",
    "draft.num_layers": "1",
    "draft.intermediate_size": "96",
    "draft.num_attention_heads": "2",
    "draft.num_key_value_heads": "1",
    "draft.head_dim": "8",
    "draft.options": '{{"spare":8}}',
    "draft.window": "32",
    "draft.full_layers": "[0]",
    "draft.causal": "true",
    "draft.init": "target",
    "loss.anchors": "32",
    "loss.objective": "decay",
    "loss.head_weight": "0.5",
    "loss.distance": "tv",
    "loss.temperature": "0.5",
    "loss.alpha": "0.25",
    "loss.gamma": "3",
    "loss.chunk": "64",
    "train.max_steps": "100",
    "train.epochs": "2",
    "train.seed": "1",
    "train.global_batch_size": "8",
    "train.micro_batch_size": "1",
    "train.lr": "1e-3",
    "train.warmup": "0.1",
    "train.final_lr": "0.2",
    "train.betas": "[0.8,0.9]",
    "train.weight_decay": "0.1",
    "train.clip_norm": "2",
    "train.precision": "bfloat16",
    "train.shard_optimizer": "true",
    "train.gradient_checkpointing": "true",
    "train.compile": "true",
    "train.hang_timeout": "0",
    "validate.every": "7",
    "eval.every": "9",
    "eval.prompts": "{tmp}/others.jsonl",
    "eval.count": "3",
    "eval.max_new_tokens": "17",
    "checkpoint.every": "7",
    "checkpoint.keep": "3",
    "log.every": "7",
    "log.wandb": "drafts",
}
MAY_CHANGE = set(
    """
    output_dir target.replicas target.full_depth target.attention target.features data.max_bad_rows data.cache_dir
    loss.chunk train.max_steps train.epochs train.micro_batch_size train.lr train.warmup train.final_lr train.betas
    train.weight_decay train.clip_norm train.shard_optimizer train.gradient_checkpointing train.compile
    train.hang_timeout validate.every eval.every checkpoint.every checkpoint.keep log.every
    log.wandb
""".split()  # noqa: SIM905
)
# What the first version saved, and nothing else.
SAVED_AT_FIRST = ("train.seed", "train.global_batch_size", "data.seq_len", "data fingerprint")

DAY_AND_SWITCH = "{{ strftime_now('%Y') }}{% if enable_thinking %}{% endif %}"  # so that their knobs matter

Load = Callable[..., Config]


@dataclass(frozen=True, kw_only=True)
class ShapeWithOption(DraftShape):
    spare: int = 1


class WithOption(DFlashDraftModel):
    Shape = ShapeWithOption


def identify(config: Config) -> dict[str, Any]:
    """As a trainer would, without loading the target."""
    world = World(0, 1, setup.torch.device("cpu"))
    config, info = setup.check_target(config, world)
    data = setup.lay_out(setup.read_data(config, info, world), True, "", world)
    shape = setup.draft_shape(config, info.text, info.path)
    return identity_of(config, info, data, shape, find_prompts(config, info, data) if config.eval.every else [])


@pytest.fixture
def load(tmp_path: Path, tiny_target: Path, debug_config, monkeypatch) -> Load:
    """The debug preset with validation and real decoding, on files of this test's own."""
    monkeypatch.setitem(KINDS, "another", KINDS["dflash"])
    monkeypatch.setitem(KINDS, "dflash", WithOption)
    template = DAY_AND_SWITCH + (tiny_target / "chat_template.jinja").read_text()
    for name in ("target", "other-target"):
        shutil.copytree(tiny_target, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    scale_weights(tmp_path / "other-target")
    make_tiny_chats(tmp_path / "chat.jsonl")
    lines = (tmp_path / "chat.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "others.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "other.jinja").write_text(template + "{# another #}")
    files = [f"target.path={tmp_path / 'target'}", f"data.path={tmp_path / 'chat.jsonl'}"]
    on = ["eval.every=5", "target.full_depth=true", "validate.every=5"]
    return lambda *overrides: debug_config(*files, *on, *overrides)


def scale_weights(target: Path) -> None:
    path = target / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.fixture
def compare(load: Load, tmp_path: Path):
    """The changes that are accepted where a run began with one config and goes on with another."""
    run = tmp_path / "run"

    def compare(now: Config, saved: dict[str, Any]) -> list[str]:
        return refuse_another(saved, identify(now), now, run, run / "checkpoints/step-00000001")

    setup.describe_run(load())
    return compare


def test_the_walk_leaves_no_knob_out() -> None:
    assert CHANGES.keys() == KNOBS.keys()
    assert {name for name, knob in KNOBS.items() if knob.metadata["resume"] == FREE} == MAY_CHANGE


def test_what_stands_for_a_knob_is_in_the_identity(load: Load) -> None:
    identity = identify(load())
    assert identity == json.loads(json.dumps(identity))
    for name, knob in KNOBS.items():
        entry = {"fixed": name}.get(knob.metadata["resume"], knob.metadata["resume"])
        assert entry in identity or entry == FREE, f"{name}: the identity has no entry {entry!r}"


@pytest.mark.parametrize("recorded", ["in the checkpoint", "in the run's config"])
def test_every_knob_may_change_or_is_refused_by_name(load: Load, compare, tmp_path: Path, recorded: str) -> None:
    """Also after a checkpoint of the first version, which recorded a few knobs; its run folder says the others."""
    before = load()
    identity = saved = identify(before)
    if recorded == "in the run's config":
        saved = {
            k: v for k, v in identity.items() if k in SAVED_AT_FIRST or (k.startswith("draft.") and k != "draft.init")
        }
        assert len(saved) < len(identity)
    assert compare(before, saved) == []
    for name, change in CHANGES.items():
        now = load(*f"{name}={change.format(tmp=tmp_path)}".split())
        change_said = f"{name}: {values(before)[name]!r} -> {values(now)[name]!r}"
        if name in MAY_CHANGE:
            assert change_said in compare(now, saved)
            continue
        resume = KNOBS[name].metadata["resume"]
        if resume in ("chat template", "held-out fingerprint", "decoded prompts") and saved is not identity:
            continue  # nobody can know; what is learned is in the data's fingerprint
        with pytest.raises(ValueError, match=r"cannot be resumed\. Changed: ") as refusal:
            compare(now, saved)
        assert change_said in str(refusal.value), name


@pytest.mark.parametrize("name", [name for name, knob in KNOBS.items() if knob.metadata["resume"] == "fixed"])
def test_what_the_config_alone_says_is_refused_before_anything_is_read(load: Load, compare, tmp_path, name) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    state = {"step": 1, "identity": identify(load()), "checksums": dict.fromkeys(FILES, "0")}
    (checkpoint / "state.json").write_text(json.dumps(state))
    shutil.rmtree(tmp_path / "target")
    with pytest.raises(ValueError, match=f"cannot be resumed. Changed: .*{name}"):
        Trainer(load(f"{name}={CHANGES[name].format()}"), World(0, 1, setup.torch.device("cpu")))
    (checkpoint / "state.json").write_text("{")
    refuse_changed_knobs(load(f"{name}={CHANGES[name].format()}"), tmp_path / "run", checkpoint)  # not what is used


SAME = {
    "target.path": "moved-target",
    "data.path": "moved.jsonl",
    "data.chat_template": "same.jinja",
    "draft.intermediate_size": "128",
    "draft.num_attention_heads": "4",
    "draft.num_key_value_heads": "2",
    "draft.head_dim": "16",
    "loss.gamma": "4",
}


@pytest.mark.parametrize("name", SAME)
def test_what_a_knob_names_counts_and_not_how(load: Load, compare, tmp_path: Path, name: str) -> None:
    shutil.copytree(tmp_path / "target", tmp_path / "moved-target")
    shutil.copy(tmp_path / "chat.jsonl", tmp_path / "moved.jsonl")
    shutil.copy(tmp_path / "target/chat_template.jinja", tmp_path / "same.jinja")
    value = SAME[name] if SAME[name].isdigit() else str(tmp_path / SAME[name])
    now = load(f"{name}={value}")
    assert compare(now, identify(load())) == [f"{name}: {values(load())[name]!r} -> {values(now)[name]!r}"]


def rewrite_config(target: Path) -> None:
    path = target / "config.json"
    config = json.loads(path.read_text())
    config |= {"rms_norm_eps": 1e-2, "transformers_version": "0"}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tmp: scale_weights(tmp / "target"), "target weights: .*the model's files changed"),
        (lambda tmp: rewrite_config(tmp / "target"), r"Changed: .*target config.rms_norm_eps: 1e-06 -> 0.01"),
        (lambda tmp: shutil.copy(tmp / "others.jsonl", tmp / "chat.jsonl"), "data fingerprint: .*the files changed"),
        (lambda tmp: shutil.copy(tmp / "other.jinja", tmp / "target/chat_template.jinja"), "own template changed"),
    ],
    ids=["weights", "config", "data", "template"],
)
def test_files_that_changed_under_the_same_name_are_found(load: Load, compare, tmp_path, change, message) -> None:
    saved = identify(load())
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        compare(load(), saved)
    assert "transformers_version" not in str(refusal.value)


def test_what_was_not_in_use_may_come_and_go(load: Load, compare, tmp_path: Path) -> None:
    """Validation and decoding may begin in the middle of a run; no step before was measured otherwise."""
    off = ("eval.every=0", "validate.every=0")
    other = ("eval.max_new_tokens=9", f"eval.prompts={tmp_path / 'others.jsonl'}")
    compare(load(*other), identify(load(*off)))
    compare(load(*off, *other), identify(load()))
    with pytest.raises(ValueError, match=r"decoded prompts: .*eval\.max_new_tokens: 256 -> 9"):
        compare(load(*other), identify(load()))


def test_a_run_whose_target_was_replaced_does_not_go_on(debug_config, alone: World, tmp_path, capsys) -> None:
    """A checkpoint of the first version too."""
    for name in ("a", "b"):
        make_tiny_target(tmp_path / name)
    scale_weights(tmp_path / "b")
    run = ("train.max_steps=1", "validate.every=0")
    Trainer(debug_config(*run, f"target.path={tmp_path / 'a'}"), alone).run()
    longer = ("train.max_steps=2", "validate.every=0")
    with pytest.raises(ValueError, match=r"target weights: .*target\.path: .*/a' -> .*/b'"):
        Trainer(debug_config(*longer, f"target.path={tmp_path / 'b'}"), alone).run()

    [checkpoint] = step_folders(tmp_path / "run/checkpoints").values()
    state = read_state(checkpoint)
    state["identity"] = {k: v for k, v in state["identity"].items() if k != "target weights"}
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"target weights: .*target\.path: .*/a' -> .*/b'"):
        Trainer(debug_config(*longer, f"target.path={tmp_path / 'b'}"), alone).run()
    (tmp_path / "a").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "a")
    Trainer(debug_config(*longer, f"target.path={tmp_path / 'moved'}", "train.lr=1e-3"), alone).run()
    assert "train.lr: 0.003 -> 0.001" in (told := capsys.readouterr().out) and "train.max_steps: 1 -> 2" in told
