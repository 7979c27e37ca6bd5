"""Real decoding during training: the same on any number of ranks, no trace in the training, the best is kept."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from dflash_dist.config import Config
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.export.export import main as export
from dflash_dist.ranks import World
from dflash_dist.target.capture import decoder_layers
from dflash_dist.target.load import load_whole, read_info
from dflash_dist.training.acceptance import Acceptance, Evaluation, in_dtype
from dflash_dist.training.checkpoint import read_state, step_folders
from dflash_dist.training.setup import PREEMPTED
from dflash_dist.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny import tiny_shape
from tests.training.test_trainer import ALONE, losses

STOP = 227  # a token that some of the tiny target's answers contain
SMALL = ("eval.every=2", "target.full_depth=true", "eval.count=5", "eval.max_new_tokens=12", "validate.every=0")


Following = dict[tuple[int, int], list[int]]  # a token of some answer, by place and id -> the tokens after it


def foretold(following: Following) -> Callable[[Decoder, int, Any], list[int]]:
    """Proposals that are right in up to 3 slots, by position."""

    def propose(decoder: Decoder, anchor: int, context: Any) -> list[int]:
        right, slots = context.length % 4, decoder.draft.shape.block_size - 1
        answer = following[context.length, anchor]
        wrong = [(token + 1) % 260 for token in [*answer[right:slots], *[anchor] * slots]]
        return [*answer[:right], *wrong][:slots]

    return propose


def decode(world: World, config: Config, following: Following) -> tuple[Acceptance, list[list[int]], int]:
    """What the training's evaluation gives with such proposals, its prompts, and the hooks that it leaves."""
    trainer = Trainer(config, world)
    hooks = count_hooks(trainer)
    original, Decoder._propose = Decoder._propose, foretold(following)  # type: ignore[method-assign]
    try:
        shown = trainer.evaluation.run(trainer.training.draft)
    finally:
        Decoder._propose = original  # type: ignore[method-assign]
    assert shown is not None
    return shown, trainer.evaluation.prompts, count_hooks(trainer) - hooks


def count_hooks(trainer: Trainer) -> int:
    """FSDP has hooks of its own on a sharded layer."""
    return sum(len(layer._forward_hooks) for layer in decoder_layers(trainer.evaluation.target))


@pytest.fixture
def restore_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ranks_that_share_a_sharded_target_decode_what_one_decodes_with_the_whole(
    debug_config, tiny_target, tmp_path, monkeypatch
):
    folder = shutil.copytree(tiny_target, tmp_path / "stopping")
    GenerationConfig(eos_token_id=[2, STOP]).save_pretrained(folder)
    config = debug_config(*SMALL, f"target.path={folder}")  # five prompts: one rank has more to decode than the other
    # The obvious way: the whole model with its own head, one prompt after the other.
    info = read_info(config.target.path)
    target, prompts = load_whole(info, torch.float32, torch.device("cpu")), prompts_of(config)
    decoder = Decoder(target, DFlashDraftModel(tiny_shape()), info.stop_ids)
    plain = [decoder.plain(prompt, 12).tokens for prompt in prompts]
    following = {
        (len(prompt) + k, token): answer[k + 1 :]
        for prompt, answer in zip(prompts, plain)
        for k, token in enumerate(answer)
    }
    assert min(lengths := [len(answer) for answer in plain]) < max(lengths) == 12, "some end with a stop token"

    shown, same_prompts, hooks = decode(ALONE, config, following)
    assert same_prompts == prompts and len(prompts) == 5 and hooks == 0
    assert run_ranks(decode, 2, config, following) == [(shown, prompts, 0)] * 2

    monkeypatch.setattr(Decoder, "_propose", foretold(following))
    answers = [decoder.speculative(prompt, 12) for prompt in prompts]
    assert shown.passes == sum(answer.passes for answer in answers)
    assert shown.emitted == sum(len(answer.tokens) - 1 for answer in answers)
    assert shown.reached[:4] == [sum(n >= k for answer in answers for n in answer.accepted) for k in (1, 2, 3, 4)]
    assert 1.5 < shown.tau == shown.emitted / shown.passes < 3 and shown.by_slot[3] == 0


def test_every_forward_tells_the_watchdog(debug_config):
    trainer = Trainer(debug_config(*SMALL, "eval.count=1"), world := World(0, 1, torch.device("cpu")))
    shown = trainer.evaluation.run(trainer.training.draft)
    assert shown is not None and world.activity.ticks == 1 + shown.passes + 1  # the prompt, and that it is done


def run(world: World, config: Config) -> None:
    Trainer(config, world).run()


@pytest.mark.parametrize("ranks", [1, 2])
def test_decoding_changes_nothing_in_training(debug_config, tmp_path, ranks):
    short = (*SMALL, "train.max_steps=5", "log.every=1")
    with_it = debug_config(*short, f"output_dir={tmp_path / 'with'}")
    without = debug_config(*short, "eval.every=0", f"output_dir={tmp_path / 'without'}")
    for config in (with_it, without):
        run(ALONE, config) if ranks == 1 else run_ranks(run, 2, config)
    assert losses(with_it) == losses(without) and len(losses(with_it)) == 5
    assert list(taus(with_it)) == [0, 2, 4, 5] and not taus(without)


def taus(config: Config) -> dict[int, float]:
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval/tau"] for row in rows if "eval/tau" in row}


def test_the_best_by_real_decoding_is_kept_through_pruning_and_resuming_and_exported(
    debug_config, tmp_path, monkeypatch
):
    measured = iter([1.0, 1.5, 2.5, 2.0, 2.25, 2.5, 1.0])
    monkeypatch.setattr(Evaluation, "run", lambda self, draft: Acceptance(4.0, 4 * next(measured), [0.0] * 7))
    short = (*SMALL, "log.every=1", "checkpoint.keep=1", "checkpoint.every=3")
    config = debug_config(*short, "train.max_steps=6")
    folder = Path(config.output_dir) / "checkpoints"
    run(ALONE, config)
    assert list(step_folders(folder)) == [4, 6] and best(folder) == (4, 2.5)

    run(ALONE, debug_config(*short, "train.max_steps=9"))
    assert list(taus(config).values()) == [1.0, 1.5, 2.5, 2.0, 2.25, 2.5]
    assert list(step_folders(folder)) == [9] and best(folder) == (9, 2.5)  # the newest of equals

    run(ALONE, debug_config(*short, "train.max_steps=10"))
    assert list(step_folders(folder)) == [9, 10] and best(folder) == (9, 2.5)
    export(["--run", config.output_dir, "--out", str(tmp_path / "draft"), "--step", "best"])
    assert json.loads((tmp_path / "draft/training.json").read_text())["step"] == 9


def best(folder: Path) -> tuple[int, float]:
    state = read_state(folder / "best")
    return state["step"], state["tau"]


def test_without_real_decoding_there_is_no_best_to_export(debug_config, tmp_path):
    config = debug_config("train.max_steps=1", "validate.every=0")
    run(ALONE, config)
    with pytest.raises(ValueError, match="has no best checkpoint"):
        export(["--run", config.output_dir, "--out", str(tmp_path / "draft"), "--step", "best"])


def stop_while_decoding(world: World, config: Config) -> bool:
    """A run whose last rank is asked to stop at its third forward of the first evaluation after a step."""
    trainer = Trainer(config, world)
    agree, sample, forwards = trainer.evaluation.target._agree, trainer.training.sample, iter(range(1000))

    def ask(decoding: bool) -> bool:
        if next(forwards) == 3 and world.rank == world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return agree(decoding)

    def sample_and_watch(step: int):
        trainer.evaluation.target._agree = ask  # type: ignore[method-assign]
        return sample(step)

    trainer.training.sample = sample_and_watch  # type: ignore[method-assign]
    trainer.run()
    return next(forwards) == 4


def test_a_request_to_stop_ends_the_decoding_of_all_ranks_at_once(debug_config):
    config = debug_config(*SMALL, "train.max_steps=5")
    assert run_ranks(stop_while_decoding, 2, config) == [True, True]
    assert list(step_folders(Path(config.output_dir) / "checkpoints")) == [2]
    assert (Path(config.output_dir) / PREEMPTED).is_file() and list(taus(config)) == [0]


# ---- prompts ----


def test_held_out_prompts_end_where_the_last_answer_begins(debug_config, write_chats):
    held_out = write_chats(
        [("user", "one?"), ("assistant", "ONE")],
        [("user", "two?"), ("assistant", "TWO"), ("user", "three?"), ("assistant", "THREE")],
        [("user", "four?"), ("assistant", "FOUR")],
        [("user", "five?"), ("assistant", "FIVE")],
    )
    expected = [
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\nTWO<|im_end|>\n"
        "<|im_start|>user\nthree?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nfour?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nfive?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert prompts(debug_config(*SMALL, f"data.val_path={held_out}")) == expected
    assert prompts(debug_config(*SMALL, f"data.val_path={held_out}", "eval.count=2")) == expected[::2]
    # From a file they are the same, and the first ones.
    assert prompts(debug_config(*SMALL, f"eval.prompts={held_out}", "eval.count=3")) == expected[:3]


def test_a_conversation_that_ends_with_a_question_is_a_prompt(debug_config, write_chats):
    asked = write_chats([("user", "one?")])
    config = debug_config(*SMALL, f"eval.prompts={asked}", "data.val_conversations=0")
    assert prompts(config) == ["<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"]


def prompts_of(config: Config) -> list[list[int]]:
    return Trainer(config, ALONE).evaluation.prompts


def prompts(config: Config) -> list[str]:
    tokenizer = read_info(config.target.path).tokenizer
    return [tokenizer.decode(prompt) for prompt in prompts_of(config)]


def test_a_prompt_that_leaves_no_room_is_refused_by_row(debug_config, write_chats):
    asked = write_chats([("user", "one?")], [("user", "x" * 2048)])
    with pytest.raises(ValueError, match=r"row 2: its 2\d+ tokens leave no room for an answer in the 2048 positions"):
        Trainer(debug_config(*SMALL, f"eval.prompts={asked}"), ALONE)


# ---- the draft ----


def test_the_draft_decodes_as_it_would_be_exported_and_stays_as_it_is():
    draft = DFlashDraftModel(tiny_shape())
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    copy = in_dtype(draft, torch.bfloat16)
    assert not copy.training and draft.training
    for name, tensor in copy.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name].to(torch.bfloat16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())
