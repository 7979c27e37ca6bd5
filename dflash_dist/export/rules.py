"""The rules of `check`: a line each of the serving contract, and what engines do with a draft that breaks it.

What engines do was read in z-lab/dflash (here "transformers"), vLLM 0.32 and SGLang 0.5.23; `make vllm-test` shows some
of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_dist.contract.folder import (
    INDEX,
    MASK_EMBEDDING,
    SHAPE,
    TAKEN_FOR_GRANTED,
    WEIGHTS,
    Sizes,
    expected_tensors,
    foreign,
    kind_of_config,
    layer_faults,
    mask_faults,
    misshapen,
    missing,
    target_faults,
    variants,
)
from dflash_dist.draft.base import Draft
from dflash_dist.draft.shape import DraftShape
from dflash_dist.draft.visibility import as_transformers, as_vllm
from dflash_dist.kernels.mask import Mask
from dflash_dist.target.choices import check_mask_token
from dflash_dist.target.load import TargetInfo

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names -> config.json's


@dataclass(frozen=True)
class Folder:
    """What a draft folder says of itself, its weights unread."""

    path: Path
    config: dict[str, Any]
    shape: DraftShape
    tensors: dict[str, tuple[list[int], str]]  # name -> shape, dtype in safetensors' name
    trained: dict[str, Any] | None  # the shape that the weights were written with, if they say so
    target: TargetInfo | None

    @property
    def sizes(self) -> Sizes:
        return {name: size for name, (size, _) in self.tensors.items()}

    @property
    def expected(self) -> Sizes:
        return expected_tensors(self.kind, self.shape, attention_bias=bool(self.config.get("attention_bias")))

    @property
    def kind(self) -> type[Draft]:
        return kind_of_config(self.config)

    @property
    def text(self) -> Any:
        """The target's text config; only for rules about the target."""
        assert self.target is not None
        return self.target.text


# ---- the rules: each returns what it finds wrong ----


def architecture(draft: Folder) -> list[str]:
    ours, config = draft.kind.to_config(draft.shape, dtype=""), draft.config
    found = [] if "model_type" in config else ["model_type is missing"]
    if config.get("architectures") != ours["architectures"]:
        found.append(f"architectures {config.get('architectures')} should be {ours['architectures']}")
    return found


def of_kind(draft: Folder) -> list[str]:
    ours, config = draft.kind.to_config(draft.shape, dtype=""), draft.config
    stated = (name for name in (*draft.shape.of_kind(), "mask_token_id", "target_layer_ids") if name in ours)
    return [
        f"{name} is {config[name]} at the top level, {ours[name]} below"
        if name in config
        else f"{name} is missing there"
        for name in stated
        if config.get(name) != ours[name]
    ]


def markov_head(draft: Folder) -> list[str]:
    kind, sees = (getattr(draft.shape, name, None) for name in ("markov_head_type", "confidence_head_with_markov"))
    found = [] if kind in (None, "vanilla") else [f"markov_head_type is {kind}"]
    return found if sees is not False else [*found, "confidence_head_with_markov is false"]


def model_type(draft: Folder) -> list[str]:
    return [f"it is {kind}"] if (kind := draft.config.get("model_type", "qwen3")) != "qwen3" else []


def block_size(draft: Folder) -> list[str]:
    places = {"the top level": draft.config, "dflash_config": draft.config.get("dflash_config") or {}}
    stated = {place: values["block_size"] for place, values in places.items() if "block_size" in values}
    if any(size != draft.shape.block_size for size in stated.values()):
        return [", ".join(f"{size} at {place}" for place, size in stated.items())]
    return [f"{draft.shape.block_size} leaves no slot to draft"] if draft.shape.block_size < 2 else []


def layer_types(draft: Folder) -> list[str]:
    types, config, found = draft.config.get("layer_types"), draft.config, []
    if isinstance(types, list):
        found = [] if len(types) == draft.shape.num_layers else [f"{len(types)} for {draft.shape.num_layers} layers"]
        kinds = dict.fromkeys(str(kind) for kind in types if kind not in ("full_attention", "sliding_attention"))
        found += [f"no such type: {kind}" for kind in kinds]
    elif types is not None:
        return [f"{types} is no list"]
    slides = "sliding_attention" in (types or ()) or (config.get("dflash_config") or {}).get("use_swa")
    window = any(mask.window for mask in as_vllm(config, draft.shape.num_layers))
    return [*found, "sliding_attention without a window"] if slides and not window else found


def visibility(draft: Folder) -> list[str]:
    layers = draft.shape.num_layers
    vllm, others = as_vllm(draft.config, layers), as_transformers(draft.config, layers)
    differing = [i for i in range(layers) if vllm[i] != others[i]]
    if not differing or layer_types(draft):
        return []
    first = differing[0]
    return [f"layers {differing}: {_in_words(vllm[first])} in vLLM, {_in_words(others[first])} in the others"]


def _in_words(mask: Mask) -> str:
    window = "full attention" if mask.window is None else f"a window of {mask.window}"
    return f"{window} {'causal' if mask.causal else 'in both directions'} inside the block"


def narrow_window(draft: Folder) -> list[str]:
    window = draft.shape.sliding_window
    return [f"{window} for blocks of {draft.shape.block_size}"] if window and window < draft.shape.block_size else []


def rope(draft: Folder) -> list[str]:
    found = []
    theta, older = draft.shape.rope_theta, draft.config.get("rope_theta")
    if older not in (None, theta):
        found.append(f"rope_parameters say rope_theta {theta}, the top level {older}")
    for place in (draft.config, draft.config.get("rope_parameters") or {}):
        found += [
            f"{key} {place[key]}"
            for key in ("partial_rotary_factor", "mrope_section")
            if place.get(key) not in (None, 1)
        ]
    if draft.config.get("is_neox_style") is False:
        found.append("is_neox_style is false")
    return found


def causality(draft: Folder) -> list[str]:
    types = draft.config.get("layer_types")
    full = "full_attention" in types if isinstance(types, list) and types else True
    if full and draft.config.get("sliding_window_non_causal") is False:
        return ["sliding_window_non_causal is false, though layers have full attention: set it to true"]
    return []


def sizes(draft: Folder) -> list[str]:
    shape = draft.shape
    found = [f"hidden_act {act}" for act in [draft.config.get("hidden_act", "silu")] if act != "silu"]
    if shape.num_attention_heads % shape.num_key_value_heads:
        found.append(f"{shape.num_attention_heads} heads do not share {shape.num_key_value_heads} key-value heads")
    return found


def number_format(draft: Folder) -> list[str]:
    return [f"{name} is {dtype}" for name, (_, dtype) in draft.tensors.items() if dtype not in DTYPES]


def stated_dtype(draft: Folder) -> list[str]:
    stated = draft.config.get("dtype", draft.config.get("torch_dtype"))
    stored = sorted({DTYPES.get(dtype, dtype) for _, dtype in draft.tensors.values()})
    return [f"the config says {stated}, the weights are {' and '.join(stored)}"] if stored != [stated] else []


def other_weights(draft: Folder) -> list[str]:
    if (draft.path / INDEX).is_file():
        return []  # engines then read what the index names
    return [file.name for file in sorted(draft.path.glob("*.safetensors")) if file.name != WEIGHTS]


def mask_embedding(draft: Folder) -> list[str]:
    return [file.name for file in draft.path.glob(MASK_EMBEDDING)]


def leftovers(draft: Folder) -> list[str]:
    return [key for key, value in draft.config.items() if key.startswith(LEFTOVERS) and value]


def as_trained(draft: Folder) -> list[str]:
    if not draft.trained:
        return []
    now = dataclasses.asdict(draft.shape)
    return [
        f"{name} is {now[name]}, trained with {then}"
        for name, then in draft.trained.items()
        if name in now and now[name] != then
    ] + [
        f"{variant}, trained without"
        for variant in variants(draft.config, draft.shape)
        if variant.startswith(tuple(TAKEN_FOR_GRANTED))
    ]


def recorded(draft: Folder) -> list[str]:
    return [] if draft.trained else [f"there is no {SHAPE} in the metadata of the weights"]


def target_rope(draft: Folder) -> list[str]:
    parameters = getattr(draft.text, "rope_parameters", None) or {}
    theirs = parameters.get("rope_theta", draft.shape.rope_theta)  # absent where layers have different ones
    return [f"{draft.shape.rope_theta:g}, the target's is {theirs:g}"] if theirs != draft.shape.rope_theta else []


def target_positions(draft: Folder) -> list[str]:
    ours = draft.shape.max_position_embeddings
    theirs = getattr(draft.text, "max_position_embeddings", ours)
    return [f"max_position_embeddings {ours}, the target's are {theirs}"] if ours < theirs else []


def reserved_mask(draft: Folder) -> list[str]:
    assert draft.target is not None
    try:
        check_mask_token(draft.target, draft.shape.mask_token_id)
    except ValueError as error:
        return [str(error)]
    return []


# Of targets with other attention, rotary positions, softcaps, scales, experts, towers or number formats.
LEFTOVERS = (
    *("linear_", "mamba_", "ssm_", "attention_chunk_size", "rope_local_base_freq"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "quantization_config"),
    *("input_embedding_scale", "output_multiplier", "logit_scale", "add_swa_attention_sink_bias"),
    *("num_experts", "num_local_experts", "moe_", "text_config", "vision_config", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class Rule:
    """A line of the contract, and what engines do with a draft that breaks it."""

    name: str
    problems: Callable[[Folder], list[str]]
    engines: str
    kind: str = "FAULT"


# Applied by reading the config at all.
COMPLETE = Rule("config", lambda draft: [], "vLLM and transformers fill gaps with defaults of Qwen3: another draft")
RULES = [
    Rule("class", architecture, "vLLM and SGLang find no model by this name, or another one"),
    Rule(
        "tensors",
        lambda draft: missing(draft.sizes, draft.expected),
        "vLLM and SGLang serve what the memory held in its place, transformers random numbers, and none says so; of"
        " LiLiCorr's own vLLM does",
    ),
    Rule(
        "other tensors",
        lambda draft: foreign(draft.sizes, draft.expected),
        "vLLM uses embed_tokens and lm_head instead of the target's and refuses the rest; SGLang ignores them all",
    ),
    Rule("tensor shapes", lambda draft: misshapen(draft.sizes, draft.expected), "no engine loads them"),
    Rule("number format", number_format, "engines read them as numbers that they are not"),
    Rule(
        "other weights",
        other_weights,
        "without an index, vLLM and SGLang load every safetensors file of the folder, one over the other",
    ),
    Rule(
        "target layers",
        lambda draft: layer_faults(draft.shape),
        "vLLM sorts them, so that fc reads layers from each other's columns; engines disagree on whether the last one's"
        " output is normalised",
    ),
    Rule("mask token", lambda draft: mask_faults(draft.shape), "its embedding is read from outside the table"),
    Rule(
        "block size",
        block_size,
        "SGLang and transformers draft dflash_config's, older releases the other; vLLM what it is told",
    ),
    Rule(
        "layer types",
        layer_types,
        "SGLang and transformers refuse it; vLLM stops, or takes what it does not know for full attention",
    ),
    Rule(
        "what layers see",
        visibility,
        "vLLM reads dflash_config's causal, swa_window_size and use_swa, SGLang and transformers the top level alone:"
        " they serve different drafts",
    ),
    Rule("window", narrow_window, "the last slots of a block would not see its anchor, and engines differ on that"),
    Rule(
        "rotary positions",
        rope,
        "engines read rope_parameters, older ones the top level; vLLM obeys partial, multimodal and interleaved"
        " rotation, SGLang and transformers do not",
    ),
    Rule(
        "attention in both directions",
        causality,
        "in the speculators library the key is about sliding layers; vLLM hides the slots behind from every slot of"
        " every layer",
    ),
    Rule("heads and activation", sizes, "vLLM and SGLang refuse them"),
    Rule("as trained", as_trained, "no engine can tell: it drafts worse, or nothing right"),
    Rule("training record", recorded, "only drafts written here have it, so that edits of the config show", "note"),
    Rule("keys at the top level", of_kind, "vLLM and SGLang read them there, or take their own defaults"),
    Rule("Markov head", markov_head, "vLLM computes a vanilla one whatever the type; SGLang refuses such confidence"),
    Rule("model type", model_type, "transformers and vLLM fill the config's gaps with that model's defaults", "note"),
    Rule("dtype", stated_dtype, "transformers casts to the config's, vLLM to the target's", "note"),
    Rule("mask embedding", mask_embedding, "vLLM uses it instead of the target's, other engines do not", "note"),
    Rule(
        "leftovers", leftovers, "keys of a target's config: no draft computes them, but an engine may heed them", "note"
    ),
    Rule(
        "variant",
        lambda draft: variants(draft.config, draft.shape),
        "right only if it was trained so, and not every engine heeds it (`evaluate` refuses)",
        "note",
    ),
]
TARGET_RULES = [
    Rule(
        "target's sizes",
        lambda draft: target_faults(draft.shape, draft.text),
        "engines stop at the first draft, or feed it features of other layers",
    ),
    Rule("target's mask token", reserved_mask, "a token that texts hold means two things to the draft", "note"),
    Rule("target's rotary base", target_rope, "drafts trained here share it: right only if it was trained so", "note"),
    Rule("target's positions", target_positions, "vLLM reads past the end of its table: serve no longer texts", "note"),
]
