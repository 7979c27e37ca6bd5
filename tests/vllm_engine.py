"""A draft that was trained here, served by a real engine: vLLM accepts what our own speculative decoding accepts.

`make vllm-test`, not part of `make test`: it gives vLLM's build for CPUs (3.4 GB) an environment of its own. Judged by
the accepted proposals: greedy text is right with any draft.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from dflash_dist.contract.folder import CONFIG, WEIGHTS, read_draft
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import read_conversations
from dflash_dist.decoding.speculative import TIE, Decoder
from dflash_dist.export import export
from dflash_dist.export.check import check
from dflash_dist.target.load import load_whole, read_info
from dflash_dist.target.tiny import make_tiny_chats, tiny_tokenizer
from dflash_dist.training.train import main as train_main
from tests.conftest import REPOSITORY

VLLM = REPOSITORY / ".venv-vllm"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # [GiB]
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # leaves other work on this machine alone
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
EXPORTED, SPECULATORS = "as exported", "as exported, --format speculators"
UNREPAIRED = "as exported, vLLM's CPU kernel unrepaired"  # tests/vllm_serve.py says of what
LAYERS, LENGTH, NEW_TOKENS, PROMPTS = 6, 256, 40, 16


def write_target(folder: Path, chats: Path) -> None:
    """A small Qwen3 that has learnt its chats, so that what it writes can be predicted; heads as large as vLLM's
    attention on CPUs takes."""
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    rows = [
        tokenizer.apply_chat_template(conversation.messages, return_dict=False)
        for _, conversation in read_conversations(str(chats))
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def train(target: Path, chats: Path, run: Path) -> tuple[Path, Path]:
    """A draft for the target, through the same commands that a user gives; returns its folder in both layouts."""
    train_main(
        [
            *("--config", str(REPOSITORY / "configs/debug.yaml")),
            *(f"target.path={target}", f"data.path={chats}", "data.val_conversations=0", "validate.every=0"),
            *(f"output_dir={run}", "train.max_steps=100", "checkpoint.every=100", "log.every=50"),
        ]
    )
    layouts = run / "dflash", run / "speculators"
    for folder in layouts:
        export.main(["--run", str(run), "--out", str(folder), "--dtype", "float32", "--format", folder.name])
    return layouts


def change(draft: Path, name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy of the draft with another config, and with other tensors if given."""
    folder = draft.with_name(name)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    if tensors is None:
        (folder / WEIGHTS).write_bytes((draft / WEIGHTS).read_bytes())
    else:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def broken_exports(draft: Path, speculators: Path) -> dict[str, Path]:
    """The draft as exporters get it wrong, in either layout."""
    config, tensors = json.loads((draft / CONFIG).read_text()), load_file(draft / WEIGHTS)
    other = json.loads((speculators / CONFIG).read_text())
    ids = config["dflash_config"]["target_layer_ids"]

    def with_ids(other: list[int]) -> dict[str, Any]:
        return config | {"dflash_config": config["dflash_config"] | {"target_layer_ids": other}}

    # Trained with the layers in this order, which a loop that keeps it serves as well as the true draft.
    reversed_fc = torch.cat(tensors["fc.weight"].chunk(len(ids), dim=1)[::-1], dim=1).contiguous()
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e4}
    missing = "layers.1.self_attn.o_proj.weight"
    return {
        # First, while no memory holds the same tensor of another engine.
        "a tensor missing": change(draft, "missing", config, {k: v for k, v in tensors.items() if k != missing}),
        "layer ids reversed": change(draft, "reversed", with_ids(ids[::-1]), tensors | {"fc.weight": reversed_fc}),
        "layer ids off by one": change(draft, "shifted", with_ids([i - 1 for i in ids])),
        "another rope": change(draft, "rope", config | rope),
        "speculators, layer ids not moved": change(speculators, "unmoved", other | {"aux_hidden_state_layer_ids": ids}),
        "speculators, the library's default": change(
            speculators, "causal", other | {"sliding_window_non_causal": False}
        ),
    }


class CarefulDecoder(Decoder):
    """Also notes how close the nearest runner-up of any choice came, the target's and the draft's."""

    nearest = float("inf")

    def _choose(self, logits: torch.Tensor, position: int) -> list[int]:
        best, second = logits.float().topk(2).values.unbind(-1)
        self.nearest = min(self.nearest, (best - second).min().item())
        return super()._choose(logits, position)


def decode(target: Path, draft: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What our own loop accepts, counted as vLLM does: whole rounds up to `NEW_TOKENS`, stop token or not."""
    device = torch.device("cpu")
    model, drafter = load_whole(read_info(str(target)), torch.float32, device), read_draft(draft, torch.float32, device)
    slots = drafter.shape.block_size - 1
    results = []
    for prompt in prompts:
        decoder = CarefulDecoder(model, drafter, stop_ids=[])
        decoded = decoder.speculative(prompt, NEW_TOKENS + slots)  # the round that passes NEW_TOKENS stays whole
        rounds, length = [], 1
        while length < NEW_TOKENS:
            rounds.append(decoded.accepted[len(rounds)])
            length += rounds[-1] + 1
        results.append(
            {
                "tokens": decoded.tokens[:NEW_TOKENS],
                "passes": len(rounds),
                "accepted": [sum(count >= slot for count in rounds) for slot in range(1, slots + 1)],
                "nearest": decoder.nearest,
            }
        )
    return results


def total(results: list[dict[str, Any]]) -> tuple[int, list[int]]:
    """Passes and accepted counts by slot over all prompts."""
    return sum(r["passes"] for r in results), [sum(slot) for slot in zip(*(r["accepted"] for r in results))]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A draft and broken copies of it, what our loop accepts of it, and what vLLM accepts of each."""
    if not (VLLM / "installed").is_file():
        pytest.skip("vLLM is not installed: `make .venv-vllm/installed` says why; it needs PyPI and 3.4 GB")
    folder = tmp_path_factory.mktemp("vllm")
    target, chats = folder / "target", folder / "chats.jsonl"
    make_tiny_chats(chats, 2 * PROMPTS)
    write_target(target, chats)
    draft, speculators = train(target, chats, folder / "run")

    info = read_info(str(target))
    encoder = ChatEncoder(info.tokenizer, info.stop_ids)
    conversations = [conversation for _, conversation in read_conversations(str(chats))]
    prompts = [encoder.prompt_of(dataclasses.replace(c, messages=c.asked)) for c in conversations[:PROMPTS]]
    broken = broken_exports(draft, speculators)
    drafts = broken | {EXPORTED: draft, UNREPAIRED: draft, SPECULATORS: speculators}
    job = {
        "target": str(target),
        "drafts": {name: str(path) for name, path in drafts.items()},
        "unrepaired": [UNREPAIRED],
        "by_themselves": [SPECULATORS],
        "prompts": prompts,
        "block_size": json.loads((draft / CONFIG).read_text())["block_size"],
        "new_tokens": NEW_TOKENS,
        "max_model_len": LENGTH,
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(VLLM / "bin/python"), str(REPOSITORY / "tests/vllm_serve.py"), "job.json", "result.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads((folder / "result.json").read_text())
    return {
        "target": target,
        "exported": [draft, speculators],
        "broken": broken,
        "ours": decode(target, draft, prompts),
        "vllm": result,
    }


@pytest.mark.parametrize("layout", [EXPORTED, SPECULATORS])
def test_vllm_accepts_what_our_decoding_accepts(served, layout):
    ours, theirs = served["ours"], served["vllm"][layout]
    assert isinstance(theirs, list), theirs
    assert total(ours)[0] * 2 <= PROMPTS * NEW_TOKENS, "the draft learnt too little to compare anything"
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        same = all(our[key] == their[key] for key in ("tokens", "passes", "accepted"))
        assert same or our["nearest"] <= TIE, (number, our, their)


def test_broken_exports_are_caught_here_while_vllm_serves_them(served):
    rows = {"our decoding": served["ours"]} | served["vllm"]
    print(f"\n{'':<45}{'passes':>8}   accepted by slot")
    for name, results in rows.items():
        passes, accepted = total(results) if isinstance(results, list) else ("refused", results)
        print(f"{name:<45}{passes:>8}   {accepted}")
    assert not any(faults(draft, served["target"]) for draft in served["exported"])
    for name, draft in served["broken"].items():
        found = faults(draft, served["target"])
        print(f"{name}: {'; '.join(found)}")
        assert found, name
        assert isinstance(rows[name], str) or total(rows[name]) != total(rows[EXPORTED]), name


def faults(draft: Path, target: Path) -> list[str]:
    return [str(line) for line in check(draft, str(target)) if line.kind == "FAULT"]
