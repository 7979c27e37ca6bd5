"""Which slots and which context each engine lets a layer of a draft see, from its `config.json`.

As read in vLLM 0.33 (`_dflash_layer_causal`), SGLang 0.5.23 (pull request 34524) and z-lab/dflash at 10129599. The keys
say the same in several places, and each engine looks at some of them: what one serves as trained, another may not.
"""

from __future__ import annotations

from typing import Any

from dflash_dist.draft.shape import FULL_ATTENTION, SLIDING_ATTENTION, DraftShape
from dflash_dist.kernels.mask import Mask

# Every key that says what layers see, with the type of its value.
VISIBILITY: dict[str, Any] = {
    **{"layer_types": list[str] | None, "sliding_window": int | None, "swa_window_size": int | None},
    **dict.fromkeys(("is_causal", "causal", "use_sliding_window", "use_swa"), bool | None),
}


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
    sliding = _sliding(config, layers)
    if inner.get("use_swa") and not any(sliding):
        sliding = [True] * layers
    window = inner.get("swa_window_size") or _window(config)
    causal = config.get("is_causal")
    return _masks(sliding, window, inner.get("causal") if causal is None else causal)


def as_transformers(config: dict[str, Any], layers: int) -> list[Mask]:
    """Also as SGLang, which reads the same keys."""
    return _masks(_sliding(config, layers), _window(config), config.get("is_causal"))


def _window(config: dict[str, Any]) -> int | None:
    """Qwen3's config forgets it unless it is told to use it."""
    used = config.get("use_sliding_window") or config.get("model_type", "qwen3") != "qwen3"
    return config.get("sliding_window") if used else None


def _sliding(config: dict[str, Any], layers: int) -> list[bool]:
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        return [False] * layers
    return [kind == SLIDING_ATTENTION for kind in types]


def _masks(sliding: list[bool], window: int | None, causal: bool | None) -> list[Mask]:
    return [Mask(window if slides else None, slides if causal is None else bool(causal)) for slides in sliding]
