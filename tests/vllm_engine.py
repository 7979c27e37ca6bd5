"""Drafts of every kind that were trained here, served by a real engine: vLLM accepts what our own speculative decoding
accepts, slot by slot.

`make vllm-test`, not part of `make test`: it gives vLLM's build for CPUs (3.1 GB) an environment of its own. Judged by
the accepted proposals: greedy text is right with any draft.

On a CPU vLLM takes its V1 runner, which refuses mixed layers and DFlash 2. Its V2 runner needs Triton, and Triton a
device; told that the CPU is one (tests/triton_on_cpu), Triton's interpreter runs it, slowly. What is not shown: CUDA
graphs, compiled layers, kernels for GPUs, bfloat16, which the interpreter multiplies wrongly, several requests at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from dflash_dist.contract.folder import CONFIG, WEIGHTS, read_draft
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import read_conversations
from dflash_dist.decoding.speculative import TIE, Decoder
from dflash_dist.draft.visibility import as_vllm
from dflash_dist.export import export
from dflash_dist.export.check import check
from dflash_dist.export.rules import layer_types
from dflash_dist.target.load import load_whole, read_info
from dflash_dist.target.tiny import make_tiny_chats, tiny_tokenizer
from dflash_dist.training.train import main as train_main
from tests.conftest import REPOSITORY
from tests.draft.test_windows import every_config

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
RUNNERS = {
    "V1": {},  # what builds for CPUs take by themselves
    "V2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(REPOSITORY / "tests/triton_on_cpu"),
    },
}
PLAIN, SPECULATORS = "plain", ", --format speculators"
UNREPAIRED = "plain, vLLM's CPU kernel unrepaired"  # tests/vllm_serve.py says of what
LAYERS, LENGTH, NEW_TOKENS, PROMPTS = 6, 256, 40, 16
FEW = 4  # prompts for the V2 runner, which is slow in the interpreter
WINDOW = 16  # below every prompt's length
DSPARK = ["draft.kind=dspark", "loss.objective=decay", "loss.distance={ce: 0.1, tv: 1.8}"]
MIXED = [f"draft.window={WINDOW}", "draft.full_layers=[1]"]
LATTICE = "draft.options={lilicorr_hidden_size: 32, lilicorr_factor_dim: 32}"
KINDS = {
    PLAIN: [],
    "causal": ["draft.causal=true"],
    "sliding": MIXED[:1],
    "sliding, causal": [*MIXED[:1], "draft.causal=true"],
    "mixed": MIXED,
    "mixed, causal": [*MIXED, "draft.causal=true"],
    "DFlash 2": ["draft.kind=dflash2"],
    "DFlash 2, sliding": ["draft.kind=dflash2", *MIXED[:1]],
    "DSpark": DSPARK,
    "DSpark, mixed": [*DSPARK, *MIXED],
    "LiLiCorr": ["draft.kind=lilicorr", LATTICE],
    "LiLiCorr, convolutions": ["draft.kind=lilicorr", LATTICE[:-1] + ", conv_kernel_size: 2, conv_group_size: 16}"],
}
Drafts = dict[str, tuple[str, Path]]  # by name: the kind of draft that it is meant to be, and its folder
REFUSED_BY_V1 = {
    "mixed": "mixed sliding/full dflash drafts",
    "DFlash 2": "DFlash candidate-head drafts",
    "DSpark": "dspark speculative decoding",
}


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


def train(target: Path, chats: Path, run: Path, knobs: list[str]) -> Path:
    """A draft for the target, through the same commands that a user gives; returns its folder."""
    train_main(
        [
            *("--config", str(REPOSITORY / "configs/debug.yaml")),
            *(f"target.path={target}", f"data.path={chats}", "data.val_conversations=0", "validate.every=0"),
            *(f"output_dir={run}", "train.max_steps=100", "checkpoint.every=100", "log.every=50", *knobs),
        ]
    )
    return write(run, "dflash")


def write(run: Path, layout: str) -> Path:
    export.main(["--run", str(run), "--out", str(run / layout), "--dtype", "float32", "--format", layout])
    return run / layout


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


def broken_exports(draft: Path, speculators: Path) -> Drafts:
    """The plain draft as exporters get it wrong, in either layout."""
    config, tensors = json.loads((draft / CONFIG).read_text()), load_file(draft / WEIGHTS)
    other = json.loads((speculators / CONFIG).read_text())
    ids = config["dflash_config"]["target_layer_ids"]

    # Trained with the layers in this order, which a loop that keeps it serves as well as the true draft.
    reversed_fc = torch.cat(tensors["fc.weight"].chunk(len(ids), dim=1)[::-1], dim=1).contiguous()
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e4}
    missing = "layers.1.self_attn.o_proj.weight"
    broken = {
        # First, while no memory holds the same tensor of another engine.
        "a tensor missing": change(draft, "missing", config, without(tensors, missing)),
        "layer ids reversed": change(
            draft, "reversed", inner(config, target_layer_ids=ids[::-1]), tensors | {"fc.weight": reversed_fc}
        ),
        "layer ids off by one": change(draft, "shifted", inner(config, target_layer_ids=[i - 1 for i in ids])),
        "another rope": change(draft, "rope", config | rope),
        "speculators, layer ids not moved": change(speculators, "unmoved", other | {"aux_hidden_state_layer_ids": ids}),
        "speculators, the library's default": change(
            speculators, "causal", other | {"sliding_window_non_causal": False}
        ),
    }
    return {name: (PLAIN, folder) for name, folder in broken.items()}


# Keys that say something else than the draft was trained with, or say it in one place only. All of these vLLM serves as
# `as_vllm` says. HEEDED are as trained in vLLM, though not in SGLang and transformers.
MISREAD = "sliding, is_causal nowhere", "sliding, its layers called full"
HEEDED = "mixed, window in dflash_config only", "mixed, is_causal in dflash_config only"


def broken_windows(draft: Path) -> Drafts:
    """The sliding draft as exporters get it wrong."""
    config = json.loads((draft / CONFIG).read_text())
    nowhere = without(inner(config, causal=None), "is_causal")
    full = config | {"layer_types": ["full_attention"] * config["num_hidden_layers"]}
    return {
        MISREAD[0]: ("sliding", change(draft, "nowhere", nowhere)),
        MISREAD[1]: ("sliding", change(draft, "full", full)),
    }


def broken_dspark(draft: Path) -> Drafts:
    """The DSpark draft as exporters get it wrong."""
    config, tensors = json.loads((draft / CONFIG).read_text()), load_file(draft / WEIGHTS)
    table = "markov_head.markov_w2.weight"
    assert tensors[table].any(), "the head learnt nothing"
    nested = without(config, "markov_rank", "enable_confidence_head", "confidence_head_with_markov")
    return {
        # First, while no memory holds the same tensor of another engine.
        "DSpark, a table missing": ("DSpark", change(draft, "table", config, without(tensors, table))),
        "DSpark called DFlashDraftModel": (
            "DSpark",
            change(draft, "renamed", config | {"architectures": ["DFlashDraftModel"]}),
        ),
        "DSpark, sample_from_anchor missing": (
            "DSpark",
            change(draft, "anchor", without(config, "sample_from_anchor")),
        ),
        "DSpark, its keys in dflash_config only": ("DSpark", change(draft, "nested", nested)),
    }


def broken_lilicorr(draft: Path) -> Drafts:
    """The LiLiCorr draft with convolutions as exporters get it wrong."""
    config, tensors = json.loads((draft / CONFIG).read_text()), load_file(draft / WEIGHTS)
    sizes = inner(config, conv_kernel_size=None, conv_group_size=None)
    broken = {
        "LiLiCorr, a bias missing": change(draft, "bias", config, without(tensors, "lilicorr.out_head.bias")),
        "LiLiCorr, its convolutions' sizes missing": change(draft, "sizes", sizes),
    }
    return {name: ("LiLiCorr, convolutions", folder) for name, folder in broken.items()}


def broken_kinds(head: Path, mixed: Path) -> Drafts:
    """DFlash 2 and the mixed draft as exporters get them wrong."""
    of_head, of_mixed = (json.loads((folder / CONFIG).read_text()) for folder in (head, mixed))
    tensors = load_file(head / WEIGHTS)
    codebook, conv = "candidate_selector.successor_codebook", "layers.0.mlp_conv.kernel_projection.weight"
    assert tensors[codebook].any(), "the head learnt nothing"
    broken = {
        # First, while no memory holds the same tensors of another engine.
        "DFlash 2, a codebook missing": change(head, "codebook", of_head, without(tensors, codebook)),
        "DFlash 2, a convolution missing": change(head, "conv", of_head, without(tensors, conv)),
        "DFlash 2 called DFlashDraftModel": change(head, "plain", of_head | {"architectures": ["DFlashDraftModel"]}),
        "DFlash 2, its convolutions' size missing": change(head, "size", inner(of_head, conv_kernel_size=None)),
    }
    window, causal = without(of_mixed, "sliding_window", "use_sliding_window"), without(of_mixed, "is_causal")
    return {name: ("DFlash 2", folder) for name, folder in broken.items()} | {
        HEEDED[0]: ("mixed", change(mixed, "window", window)),
        HEEDED[1]: ("mixed", change(mixed, "causal", causal)),
    }


def without(entries: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in keys}


def inner(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The config with other keys in `dflash_config`; None takes one away."""
    changed = config["dflash_config"] | changes
    return config | {"dflash_config": {key: value for key, value in changed.items() if value is not None}}


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


def serve(folder: Path, runner: str, drafts: Drafts, job: dict[str, Any]) -> dict[str, Any]:
    """What vLLM accepts of each draft by name, or what it says where it refuses one."""
    folder = folder / runner
    folder.mkdir()
    names = {
        "drafts": {name: str(draft) for name, (_, draft) in drafts.items()},
        "by_themselves": [name for name in drafts if name.endswith(SPECULATORS)],
        "unrepaired": [UNREPAIRED],
    }
    (folder / "job.json").write_text(json.dumps(job | names))
    command = [str(VLLM / "bin/python"), str(REPOSITORY / "tests/vllm_serve.py"), "job.json", "result.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    environment |= RUNNERS[runner]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Drafts of every kind and broken copies of them, what our loop accepts of each kind, and what vLLM accepts of
    each draft."""
    if not (VLLM / "installed").is_file():
        pytest.skip("vLLM is not installed: `make .venv-vllm/installed` says why; it needs PyPI and 3.1 GB")
    folder = tmp_path_factory.mktemp("vllm")
    target, chats = folder / "target", folder / "chats.jsonl"
    make_tiny_chats(chats, 2 * PROMPTS)
    write_target(target, chats)
    kinds = {
        name: train(target, chats, folder / f"run-{number}", knobs)
        for number, (name, knobs) in enumerate(KINDS.items())
    }
    other = {name: write(kinds[name].parent, "speculators") for name in (PLAIN, "mixed", "DFlash 2", "DSpark")}
    by_v1 = broken_exports(kinds[PLAIN], other[PLAIN]) | broken_windows(kinds["sliding"])
    by_v2 = broken_dspark(kinds["DSpark"]) | broken_lilicorr(kinds["LiLiCorr, convolutions"])
    by_v2 |= broken_kinds(kinds["DFlash 2"], kinds["mixed"])
    broken = {"V1": dict(by_v1), "V2": dict(by_v2)}
    by_v1 |= {name: (name, kinds[name]) for name in (PLAIN, "sliding", *REFUSED_BY_V1)}
    by_v1 |= {UNREPAIRED: (PLAIN, kinds[PLAIN]), PLAIN + SPECULATORS: (PLAIN, other[PLAIN])}
    by_v2 |= {name: (name, draft) for name, draft in kinds.items()}
    by_v2 |= {name + SPECULATORS: (name, draft) for name, draft in other.items()}

    info = read_info(str(target))
    encoder = ChatEncoder(info.tokenizer, info.stop_ids)
    conversations = [conversation for _, conversation in read_conversations(str(chats))]
    prompts = [encoder.prompt_of(dataclasses.replace(c, messages=c.asked)) for c in conversations[:PROMPTS]]
    assert min(map(len, prompts)) > WINDOW
    job = {
        "target": str(target),
        "block_size": json.loads((kinds[PLAIN] / CONFIG).read_text())["block_size"],
        "new_tokens": NEW_TOKENS,
        "max_model_len": LENGTH,
    }
    with ThreadPoolExecutor() as pool:
        v1 = pool.submit(serve, folder, "V1", by_v1, job | {"prompts": prompts, "configs": []})
        few = {"prompts": prompts[:FEW], "configs": every_config()}
        v2 = pool.submit(serve, folder, "V2", by_v2, job | few)
    return {
        "target": target,
        "right": [*kinds.values(), *other.values()],
        "broken": broken,
        "ours": {
            name: decode(target, draft, prompts)
            for name, draft in [*kinds.items(), *((name, by_v1[name][1]) for name in MISREAD)]
        },
        "V1": v1.result(),
        "V2": v2.result(),
    }


@pytest.mark.parametrize(
    ("runner", "name"),
    [
        *(("V1", name) for name in (PLAIN, PLAIN + SPECULATORS, "sliding", *MISREAD)),
        *(("V2", name) for name in KINDS),
        *(("V2", name + SPECULATORS) for name in (PLAIN, "mixed", "DFlash 2", "DSpark")),
    ],
)
def test_vllm_accepts_what_our_decoding_accepts(served, runner, name):
    theirs = served[runner][name]
    assert isinstance(theirs, list), theirs
    ours = served["ours"][name.removesuffix(SPECULATORS)][: len(theirs)]
    if name not in MISREAD:
        assert total(ours)[0] * 2 <= len(ours) * NEW_TOKENS, "the draft learnt too little to compare anything"
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert same(our, their) or our["nearest"] <= TIE, (number, our, their)


def same(our: dict[str, Any], their: dict[str, Any]) -> bool:
    return all(our[key] == their[key] for key in ("tokens", "passes", "accepted"))


def test_vllms_v1_runner_refuses_what_only_its_v2_runner_knows(served):
    for kind, words in REFUSED_BY_V1.items():
        assert f"Model Runner V1 does not support: {words}" in served["V1"][kind]


def test_vllm_reads_of_the_keys_what_check_says_that_it_reads(served):
    for config, read in zip(every_config(), served["V2"]["read"], strict=True):
        draft = SimpleNamespace(config=config, shape=SimpleNamespace(num_layers=2))
        assert (read is None) == bool(layer_types(draft)), config
        assert read is None or [[mask.window, mask.causal] for mask in as_vllm(config, 2)] == read, config


def test_broken_exports_are_caught_here_while_vllm_serves_them(served):
    target, ours = served["target"], served["ours"]
    show("V1", {f"our decoding of {PLAIN}": ours[PLAIN]} | served["V1"])
    show("V2", {f"our decoding of {name}": results[:FEW] for name, results in ours.items()} | served["V2"])
    assert not [found for draft in served["right"] for found in faults(draft, target)]
    for runner, drafts in served["broken"].items():
        for name, (kind, draft) in drafts.items():
            found, theirs = faults(draft, target), served[runner][name]
            print(f"{name}: {'; '.join(found)}")
            assert found, name
            as_trained = isinstance(theirs, list) and all(map(same, ours[kind], theirs))
            assert as_trained == (name in HEEDED), name


def show(runner: str, rows: dict[str, Any]) -> None:
    print(f"\n{f'{runner} runner':<45}{'passes':>8}   accepted by slot")
    for name, results in rows.items():
        if name != "read":
            passes, accepted = total(results) if isinstance(results, list) else ("refused", results)
            print(f"{name:<45}{passes:>8}   {accepted}")


def faults(draft: Path, target: Path) -> list[str]:
    return [str(line) for line in check(draft, str(target)) if line.kind == "FAULT"]
