"""Every decoder family of the installed transformers, tiny and with random weights: what it is found to do as a target.

`python -m tests.families [--only NAME ...] [--write FILE]` prints the table of docs/families.md, and fails where a
probe says other than a slow look at the same model. A column is a function of a `Family`, below.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModel,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
)

from dflash_dist.ranks import World
from dflash_dist.target.capture import HFDFlashTargetModel, capture_layers, decoder_layers
from dflash_dist.target.head import HeadGap
from dflash_dist.target.load import whole_class
from dflash_dist.target.probe import Packing, probe_packing, refuse_lookahead
from dflash_dist.target.tiny import tiny_tokenizer
from tests.ends import begin_draft, compare_head, copies_follow, head_is_right

ALONE = World(0, 1, torch.device("cpu"))
VOCABULARY, LAYERS, SEQ_LEN = 160, 6, 96
TOKENS = range(40, 120)  # clear of what a config may take for an image
LEAK = 1e-3  # in float32 rounding stays below 2e-5, and documents that see each other differ by more than 0.2

# ------------------------------------------------------------------------------------------ configs, made small

Rule = tuple[re.Pattern[str], Callable[[int], int]]
WINDOWS = {"sliding_window", "attention_window", "sliding_window_size"}
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


def at_most(most: int) -> Callable[[int], int]:
    return lambda value: min(value, most)


# The first pattern that a key matches says how large its number may be.
RULES: list[Rule] = [
    (re.compile(pattern), small)
    for pattern, small in (
        (r"^vocab_size(_per_layer_input)?$", at_most(VOCABULARY)),
        (r"(hidden_size_per_layer_input|lora_rank)$", at_most(16)),
        (r"(head_dim|rotary_dim|d_kv|kv_channels|mamba_d_head|mamba_headdim)$", at_most(16)),
        (
            r"(^|_)(hidden_size|n_embd|d_model|embed_dim|word_embed_proj_dim|embedding_size|hidden_dim|projection_dim"
            r"|model_dim|out_hidden_size|lru_width|attention_hidden_size|dim|mamba_d_ssm|projector_hidden_size)$",
            at_most(64),
        ),
        (r"intermediate|ffn|_inner|d_ff|mlp_dim|mlp_hidden", at_most(96)),
        (r"(num_key_value_heads|num_kv_heads|multi_query_group_num|kv_n_heads)$", at_most(2)),
        (
            r"num_key_heads|linear_num_heads|num_value_heads|attention_heads|^n_heads?$|num_heads|query_heads",
            at_most(4),
        ),
        (r"(num_hidden_layers|^n_layers?$|num_layers|(de|en)coder_layers|^depth$|num_blocks)$", at_most(LAYERS)),
        (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$", at_most(4)),
        (r"(per_tok|top_k|topk|moe_k|expert_k)$", at_most(2)),
        (r"^(n_group|topk_group)$", at_most(1)),
        (r"(image_size|input_size)$", at_most(56)),
        (r"^(sliding_window|attention_window|sliding_window_size)$", at_most(6)),
        (r"^attention_chunk_size$", at_most(16)),
        (r"^(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx)$", at_most(1024)),
        (r"(mamba_d_state|state_size|d_state|mamba_n_heads|mamba_num_heads)$", at_most(8)),
    )
]
# What a default config leaves open, though its model needs it.
OPEN = {"num_experts_per_tok": 2, "n_routed_experts": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
# Sizes that depend on one another in a way of the family's own.
OWN: dict[str, dict[str, Any]] = {
    "Mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "Helium": {"head_dim": 16, "num_key_value_heads": 4},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"] * 3},
    "Mistral4": {"qk_head_dim": 32},
}
# Rotary frequencies that depend on the longest position begin at 64 of the 96 that a row holds.
SCALED: dict[str, Any] = {"max_position_embeddings": 64, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 2.0}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 2 for i in range(8)]}
VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "Llama, dynamic NTK": (
        LlamaConfig,
        {"max_position_embeddings": 64, "rope_parameters": {**ROTARY, "rope_type": "dynamic", "factor": 2.0}},
    ),
    "Llama, YaRN": (
        LlamaConfig,
        {"rope_parameters": {**ROTARY, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "Llama, longrope": (LlamaConfig, {"max_position_embeddings": 128, "rope_parameters": {**LONG, **FACTORS}}),
    "Phi3, longrope": (
        Phi3Config,
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 64,
            "rope_parameters": {**LONG, **FACTORS},
        },
    ),
    "Lfm2, convolutions": (Lfm2Config, {"layer_types": ["conv", "conv", "full_attention"] * 2}),
}


def shrink(config: dict[Any, Any]) -> dict[Any, Any]:
    """A config as a dictionary, and those within it, at sizes that run in milliseconds."""
    small: dict[Any, Any] = {}
    heads = next((config[name] for name in HEADS if isinstance(config.get(name), int)), None)
    for name, value in config.items():
        small[name] = _small(name, value, heads)
    _fit_rotary(small, config)
    return small


def _small(name: Any, value: Any, heads: int | None) -> Any:
    if isinstance(value, dict):
        return shrink({k: v for k, v in value.items() if not str(k).isdigit() or int(k) < LAYERS})
    if isinstance(value, (list, tuple)) and len(value) > LAYERS and name != "image_grid_pinpoints":
        return value[:LAYERS]
    if value is None:
        return ROTARY["rope_theta"] if name == "rope_theta" else OPEN.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if str(name).endswith(("token_id", "token_index")):
        return value % (TOKENS.start - 1)
    if "key_value_heads" in str(name) and value == heads:
        return min(value, 4)
    return next((small(value) for pattern, small in RULES if pattern.search(str(name))), value)


def _fit_rotary(small: dict[Any, Any], config: dict[Any, Any]) -> None:
    heads = next((small[name] for name in HEADS if isinstance(small.get(name), int)), 4)
    head = small.get("head_dim") if config.get("head_dim") else small.get("hidden_size", 64) // heads
    if isinstance(small.get("rotary_dim"), int) and "head_dim" not in small:
        small["rotary_dim"] = min(small["rotary_dim"], head)
    rope = small.get("rope_parameters")
    for kind in [rope, *rope.values()] if isinstance(rope, dict) else []:
        if isinstance(kind, dict) and "rope_theta" in kind:
            old = kind.get("mrope_section") or [1, 1, 1]
            half = int(head * kind.get("partial_rotary_factor", 1.0)) // 2
            sections = [max(1, half * part // sum(old)) for part in old]
            kind["mrope_section"] = [*sections[:-1], sections[-1] + half - sum(sections)]


def tiny_config(kind: Any, **changes: Any) -> Any:
    """A config of a class with everything that its default has, small."""
    known = {"transformers_version", "architectures", "dtype", "_name_or_path", "model_type"}
    small = {name: value for name, value in shrink(kind().to_dict()).items() if name not in known}
    return kind(**{**small, **OWN.get(kind.__name__.removesuffix("Config"), {}), **changes})


def lively(model: Any) -> Any:
    """Random weights that let every token move what follows it: matrices keep the size of what they multiply."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        kept = parameter.data * 0 if parameter.ndim > 1 else parameter.data
        parameter.data = kept + (noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1 * noise)
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------- families


@dataclass
class Family:
    """A kind of target."""

    name: str
    kind: Any  # class of its config
    changes: dict[str, Any]
    found: dict[torch.dtype, Packing] = field(default_factory=dict)

    @cached_property
    def config(self) -> Any:
        return tiny_config(self.kind, **self.changes)

    @cached_property
    def model(self) -> Any:
        """As a run loads it: without the LM head, in float32."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                return lively(AutoModel.from_config(self.config))
            except TypeError:  # its default has no rotary embedding at all
                config = tiny_config(self.kind, **{"rope_parameters": dict(ROTARY)} | self.changes)
                return lively(AutoModel.from_config(config))

    @property
    def layer_ids(self) -> list[int]:
        count = len(decoder_layers(self.model))
        return sorted({0, count // 2, count - 1})

    @cached_property
    def folder(self) -> Path:
        """The whole model with its LM head, saved; its sliding windows are longer than the texts that layers are
        compared on, as real ones are."""
        self._saved = tempfile.TemporaryDirectory()  # goes with the family
        config = tiny_config(self.kind, **self.changes)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            for name in WINDOWS & vars(part).keys():
                if isinstance(getattr(part, name), int):
                    setattr(part, name, 64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lively(whole_class(config).from_config(config, dtype=torch.float32)).save_pretrained(self._saved.name)
        tiny_tokenizer().save_pretrained(self._saved.name)
        return Path(self._saved.name)

    @cached_property
    def head(self) -> HeadGap:
        return compare_head(self.folder)

    @cached_property
    def start(self) -> tuple[Any, list[str]]:
        """A draft that begins from the target, and what is said of that."""
        return begin_draft(self.folder)

    @property
    def copied(self) -> list[int]:
        """The draft's layers that are the target's."""
        return [
            int(n)
            for n in re.findall(r"\d+", (re.findall(r"^draft layers (.*) begin as", self.start[1][0]) or [""])[0])
        ]

    def target(self, dtype: torch.dtype = torch.float32) -> HFDFlashTargetModel:
        return HFDFlashTargetModel(self.model.to(dtype), self.layer_ids)

    def packing(self, dtype: torch.dtype = torch.float32) -> Packing:
        if dtype not in self.found:
            self.found[dtype] = probe_packing(self.target(dtype), ALONE, TOKENS, SEQ_LEN)
            self.model.float()
        return self.found[dtype]

    @torch.no_grad()
    def mixes(self, seeds: int = 3) -> bool:
        """The slow truth: whether a document of a packed row differs from itself alone, called without our wrapper."""
        model = self.model.float()
        for seed in range(seeds):
            draw = torch.Generator().manual_seed(seed)
            first, second = (int(torch.randint(4, 15, (1,), generator=draw)) for _ in range(2))
            lengths = [[first, second, SEQ_LEN - first - second], [SEQ_LEN - first - second, first, second]][seed % 2]
            documents = [torch.randint(TOKENS[0], TOKENS[-1], (1, n), generator=draw) for n in lengths]
            alone = torch.cat([self._run(model, ids) for ids in documents], dim=2)
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            packed = self._run(model, torch.cat(documents, dim=1), position_ids=positions)
            if ((packed - alone).norm(dim=-1) > LEAK * alone.norm(dim=-1)).any():
                return True
        return False

    def _run(self, model: Any, ids: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
        """Outputs of all captured layers [L, 1, S, H]."""
        layers = decoder_layers(model)
        with capture_layers(layers, self.layer_ids) as captured:
            model(input_ids=ids, use_cache=False, **positions)
            return torch.stack(captured())


def families() -> Iterator[Family]:
    kinds = dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING])
    for kind in kinds:
        yield Family(kind.__name__.removesuffix("Config"), kind, {})
    for name, (kind, changes) in VARIANTS.items():
        yield Family(name, kind, changes)


def family(name: str) -> Family:
    return next(found for found in families() if found.name == name)


# ------------------------------------------------------------------------------------------------------ columns


def show_class(of: Family) -> str:
    return type(of.model).__name__


def show_packing(of: Family) -> str:
    return "yes" if of.packing().exact else "**no**"


def show_error(of: Family) -> str:
    return f"{of.packing().error:.1e}"


def show_error_bfloat16(of: Family) -> str:
    return f"{of.packing(torch.bfloat16).error:.1e}"


def show_causal(of: Family) -> str:
    try:
        refuse_lookahead(of.target(), ALONE, TOKENS)
    except ValueError:
        return "**no**"
    return "yes"


def show_head(of: Family) -> str:
    if of.head.none:
        return "yes"
    return "scaled or capped" if of.head.same_order else "**no**"


def show_start(of: Family) -> str:
    try:
        said = of.start[1]
    except ValueError as error:
        return "refused: " + re.sub(r"^.* is no Llama-like decoder", "no Llama-like decoder", str(error))
    if not of.copied:
        return re.sub(r"^.*random; (of the target's layer \d+, )?", "random: ", said[0])
    return "yes" if len(said) == 1 else f"layers {of.copied} of 2"


COLUMNS: dict[str, Callable[[Family], str]] = {
    "model": show_class,
    "packs exactly": show_packing,
    "error, float32": show_error,
    "error, bfloat16": show_error_bfloat16,
    "sees only what came before": show_causal,
    "head right": show_head,
    "warm start": show_start,
}


def check_ends(of: Family) -> Iterator[str]:
    """What is wrong with a verdict on the head or the start."""
    try:
        head, start = of.head, of.start
    except Exception:  # its cell says so
        return
    text = list(TOKENS[:20])
    if head.none != head_is_right(of.folder, text):
        yield f"{of.name}: the head is {'not right' if head.none else 'right'}, and the probe says otherwise"
    if not copies_follow(start[0], of.copied, of.folder, text):
        yield f"{of.name}: a copied layer does not follow the target's"


def check(of: Family) -> str | None:
    """What is wrong with a verdict on packing; None if it is the truth."""
    mixes = of.mixes()
    if of.packing().exact == mixes:
        return (
            f"{of.name}: the probe says that documents stay apart, and they do not"
            if mixes
            else (f"{of.name}: the probe says that documents mix, and they do not")
        )
    try:
        if mixes and of.packing(torch.bfloat16).exact:
            return f"{of.name}: in bfloat16 the probe does not see that documents mix"
    except RuntimeError:
        pass  # the family's own code does not run in bfloat16
    return None


def table(only: list[str]) -> tuple[list[str], list[str]]:
    """The lines of the table, and what is wrong in it."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    other, wrong = [], []
    for of in families():
        if only and of.name not in only:
            continue
        try:
            of.target().generate_batch(torch.tensor([[*TOKENS[:5]]]), None, None)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            other.append((of.name, "no decoder layers found" if "no decoder layers" in reason else reason[:120]))
            continue
        cells = []
        for show in COLUMNS.values():
            try:
                cells.append(show(of))
            except Exception as error:
                cells.append(type(error).__name__)
        lines.append(f"| {of.name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        wrong += [*filter(None, [check(of)]), *check_ends(of)]
    encoders = [name for name, reason in other if reason == "no decoder layers found"]
    lines += ["", f"Not targets, since no decoder layers are found where they are looked for: {', '.join(encoders)}."]
    lines += ["", "Not tried, since they did not build or run this small:", ""]
    lines += [f"* {name}: {reason}" for name, reason in other if name not in encoders]
    return lines, wrong


INTRODUCTION = """# Families of targets

Written by `make families`: every decoder family of transformers {version} that builds tiny with random weights, and
what the probes of `dflash_dist/target/` find. A run makes the same probes on its own target; nothing reads this table.
Where documents do not pack exactly, each runs alone, one a row. The head is right where states times the head that a
training takes are the whole model's logits. A warm start (`draft.init: target`) copies the layers that compute what a
draft's layers can; the reason names the first that does not.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="families; all by default")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write the table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines, wrong = table(args.only)
    if args.write:
        introduction = INTRODUCTION.format(version=transformers.__version__)
        args.write.write_text("\n".join([introduction, *lines]) + "\n")
    print("\n".join(["", *wrong, f"{len(wrong)} verdicts are wrong"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
