"""Which slots and which context each engine lets a layer of a draft see, from its `config.json`.

As read in vLLM 0.33 (`_dflash_layer_causal`), SGLang 0.5.23 (pull request 34524) and z-lab/dflash at 10129599; all of
them through transformers' `Qwen3Config`, which fills gaps. The keys say the same in several places, and each engine
looks at some of them: what one serves as trained, another may not.
"""

from __future__ import annotations

from typing import Any

from dflash_dist.draft.shape import FULL_ATTENTION, SLIDING_ATTENTION, DraftShape
from dflash_dist.kernels.mask import Mask

# Every key that says what layers see, with the type of its value.
VISIBILITY: dict[str, Any] = {
    "layer_types": list[str] | None,
    **dict.fromkeys(("sliding_window", "swa_window_size", "max_window_layers"), int | None),
    **dict.fromkeys(("is_causal", "causal", "use_sliding_window", "use_swa"), bool | None),
}
FILLED_IN = {"sliding_window": 4096, "max_window_layers": 28}  # where Qwen3's config has no such key


def to_keys(shape: DraftShape) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys from which every engine reads what the layers see, at the top level and in `dflash_config`."""
    top: dict[str, Any] = {"layer_types": shape.types}
    inner: dict[str, Any] = {}
    if shape.is_causal is not None:  # otherwise what engines take for granted
        top["is_causal"] = inner["causal"] = shape.is_causal  # SGLang and transformers know the first one only
    if shape.sliding_window is not None:
        top |= {
            "use_sliding_window": True,
            "sliding_window": shape.sliding_window,
            "max_window_layers": shape.num_layers,
        }
        inner["swa_window_size"] = shape.sliding_window
    return top, inner


def from_keys(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """What vLLM reads, which looks at all places, as the fields of a draft's shape."""
    masks = as_vllm(config, layers)
    sliding, causal = [mask.window is not None for mask in masks], {mask.causal for mask in masks}
    types = [SLIDING_ATTENTION if slides else FULL_ATTENTION for slides in sliding]
    return {
        "layer_types": types if any(sliding) else None,
        "sliding_window": next((mask.window for mask in masks if mask.window), None),
        "is_causal": causal.pop() if len(causal) == 1 else None,
    }


def as_vllm(config: dict[str, Any], layers: int) -> list[Mask]:
    inner = config.get("dflash_config") or {}
    sliding, causal = _sliding(config, layers), config.get("is_causal")
    by_type = sliding  # layers that `use_swa` alone lets slide stay as layers with full attention here
    if inner.get("use_swa") and not any(sliding):
        sliding = [True] * layers
    window = inner.get("swa_window_size") or _window(config)
    return _masks(sliding, window, inner.get("causal") if causal is None else causal, by_type)


def as_transformers(config: dict[str, Any], layers: int) -> list[Mask]:
    """Also as SGLang, which reads the same keys."""
    sliding = _sliding(config, layers)
    return _masks(sliding, _window(config), config.get("is_causal"), sliding)


def _window(config: dict[str, Any]) -> int | None:
    """Qwen3's config forgets it unless it is told to use it."""
    if not _is_qwen3(config):
        return config.get("sliding_window")
    return (FILLED_IN | config)["sliding_window"] if config.get("use_sliding_window") else None


def _sliding(config: dict[str, Any], layers: int) -> list[bool]:
    types = config.get("layer_types")
    if types is None and _is_qwen3(config):
        first = (FILLED_IN | config)["max_window_layers"]
        return [_window(config) is not None and first is not None and layer >= first for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        return [False] * layers
    return [kind == SLIDING_ATTENTION for kind in types]


def _is_qwen3(config: dict[str, Any]) -> bool:
    return config.get("model_type", "qwen3") == "qwen3"


def _masks(sliding: list[bool], window: int | None, causal: bool | None, by_type: list[bool]) -> list[Mask]:
    """By layer; where nothing says whether layers are causal, those are that `by_type` are."""
    inside = by_type if causal is None else [bool(causal)] * len(sliding)
    return [Mask(window if slides else None, hides) for slides, hides in zip(sliding, inside)]
