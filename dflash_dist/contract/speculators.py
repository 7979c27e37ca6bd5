"""The config.json of the `speculators` library, the other layout of a draft folder; the weights are the same.

As speculators 0.9.0 writes and reads it, and vLLM 0.32 with it. Two things are easily got wrong:

* Layers count from the embedding: id i is the input of decoder layer i, one more than anywhere else in this program.
  Ids that are copied as they are name the layers before, and every engine serves that.
* `sliding_window_non_causal` concerns sliding layers only, but where it is false, the library's default, vLLM lets no
  slot of any layer see the slots behind it (vLLM's pull request 56692). So it is false for drafts whose layers are all
  sliding and causal, and this layout has no word for others that are causal.

The library keeps no embedding and no LM head of drafts that have the target's whole vocabulary; neither do we.
"""

from __future__ import annotations

from typing import Any

from dflash_dist.draft.kinds import KINDS

VERSION = "0.9.0"
METHOD = "speculators_model_type"  # the key by which a config of this layout is known
# Its types of drafts, called as ours, with the class that engines know each by; and the keys that stand at the
# top level instead of in `dflash_config`.
TYPES = {name: KINDS[name].architecture for name in ("dflash", "dflash2", "dspark")}
OF_TYPE = [key for name in TYPES for key in KINDS[name].Shape.of_kind()]
OUTSIDE = ("architectures", "dtype", "block_size", "num_target_layers")  # of the decoder's config, at the top level


def to_speculators(config: dict[str, Any], target: str, architectures: list[str]) -> dict[str, Any]:
    """The `config.json` of another layout, from the published one.

    Args:
        target: folder or hub id of the target, which vLLM serves when it is given the draft alone.
        architectures: the target's, from its own config.

    Raises:
        ValueError: the library has no such draft; or some layers are causal and not all of them slide, which this
            layout cannot say.
    """
    types = [name for name, architecture in TYPES.items() if config["architectures"] == [architecture]]
    projector = config["dflash_config"].get("projector_type")
    if projector or not types:
        unknown = projector or config["architectures"][0]
        raise ValueError(f"the speculators library has no {unknown}: write --format dflash")
    causal = config.get("is_causal", True)  # without the key, sliding layers are
    if causal and ("is_causal" not in config or "full_attention" in config["layer_types"]):
        raise ValueError(
            "the speculators layout cannot say of layers with full attention whether they are causal: write --format"
            " dflash"
        )
    inner = config["dflash_config"]
    elsewhere = (*OUTSIDE, *inner, "dflash_config", "is_causal")
    decoder = {key: value for key, value in config.items() if key not in elsewhere}
    return {
        **{key: config[key] for key in OUTSIDE},  # vLLM knows the layout by the absence of model_type
        METHOD: types[0],
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": types[0],
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config["block_size"] - 1}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": architectures},
        },
        "transformer_layer_config": decoder,
        "draft_vocab_size": config["vocab_size"],
        "mask_token_id": inner["mask_token_id"],
        "aux_hidden_state_layer_ids": [i + 1 for i in inner["target_layer_ids"]],
        "sample_from_anchor": False,
        "sliding_window_non_causal": not causal,
        "tie_word_embeddings": False,
        **{key: inner[key] for key in OF_TYPE if key in inner},
    }


def from_speculators(config: dict[str, Any], where: str = "a draft's config.json") -> dict[str, Any]:
    """The published config that says the same; what only this layout can say goes into `dflash_config`.

    Drafts of the library do not say how many layers their target has: `num_target_layers` is missing then.

    Raises:
        ValueError: it describes no DFlash draft.
    """
    if config[METHOD] not in TYPES:
        raise ValueError(
            f"the draft of {where} is a speculator of type {config[METHOD]!r}, not {' or '.join(map(repr, TYPES))}"
        )
    decoder, ids = config.get("transformer_layer_config"), config.get("aux_hidden_state_layer_ids")
    if not isinstance(decoder, dict) or not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(
            f"{where} of a speculator needs transformer_layer_config, an object, and aux_hidden_state_layer_ids, a list"
            " of whole numbers"
        )
    inner: dict[str, Any] = {"target_layer_ids": [i - 1 for i in ids]}
    inner |= {key: config[key] for key in ("mask_token_id", "block_size", *OF_TYPE) if key in config}
    if config.get("sample_from_anchor"):
        inner["sample_from_anchor"] = True
    if config.get("draft_vocab_size", decoder.get("vocab_size")) != decoder.get("vocab_size"):
        inner["draft_vocab_size"] = config["draft_vocab_size"]
    stated = {key: config[key] for key in (*OUTSIDE, *OF_TYPE, "sliding_window_non_causal") if key in config}
    stated["sample_from_anchor"] = bool(config.get("sample_from_anchor"))
    if "sliding_attention" in (decoder.get("layer_types") or ()):
        stated["is_causal"] = not config.get("sliding_window_non_causal", True)
    return decoder | inner | stated | {"architectures": [TYPES[config[METHOD]]], "dflash_config": inner}
