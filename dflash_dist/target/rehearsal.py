"""The loading of a target tried out on the headers of its weights, before hours of tokenising; and what loading itself
shares with that."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.initialization import meta_device_safe_creation_ops
from transformers.quantizers import AutoHfQuantizer

from dflash_dist.target.folder import AGAIN, CONFIG, reading_target, weight_files

SHOWN = 4  # missing tensors that are named
# A tensor of another shape is in the report instead of in a log that nobody sees.
REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def rehearse(
    auto_class: Any,
    config: Any,
    path: str,
    revision: str,
    trust_remote_code: bool,
    attention: str | None = None,
    ends_only: bool = False,
    advice: str = AGAIN,
) -> None:
    """Lets transformers load the target from the headers of its weights alone, onto torch's "meta" device, which holds
    shapes and no numbers: a second at the most. Weights that the hub's cache does not hold yet, and such as are no
    safetensors or quantised, are only looked at as files. `ends_only` and `advice` as `refuse_gaps`.

    Raises:
        ValueError: a file is missing, cut or damaged; the config describes a model that cannot be built, or another one
            than the weights; or a package is missing.
    """
    files = weight_files(path, revision)
    text = config.get_text_config()
    quantised = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    options: dict[str, Any] = {"dtype": torch.float32} | ({"attn_implementation": attention} if attention else {})
    with quiet(), reading_model(path, revision):
        if quantised and AutoHfQuantizer.supports_quant_method(quantised):
            AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment(device_map=None)
        model = skeleton(auto_class, config, trust_remote_code, **options)
        if quantised or not files or any(file.suffix != ".safetensors" for file in files):
            return
        headers = {}
        for file in files:
            with safe_open(file, "pt") as header:
                for name in header.keys():  # noqa: SIM118, it is no dict
                    headers[name] = torch.empty(header.get_slice(name).get_shape(), device="meta")
        _, report = type(model).from_pretrained(
            None, config=config, state_dict=headers, device_map={"": "meta"}, **options, **REPORTING
        )
    refuse_gaps(report, path, end_names(model) if ends_only else None, advice)


def end_names(model: Any) -> set[str]:
    """The parameters of a whole model's embedding and LM head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [parameter for end in ends if end is not None for parameter in end.parameters()]
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if any(parameter is weight for weight in weights)}


def skeleton(auto_class: Any, config: Any, trust_remote_code: bool, **options: Any) -> Any:
    """The model on the "meta" device: all its modules, and no numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), meta_device_safe_creation_ops():
        return auto_class.from_config(config, trust_remote_code=trust_remote_code, **options)


def refuse_gaps(report: dict[str, Any], path: str, wanted: Collection[str] | None = None, advice: str = AGAIN) -> None:
    """Refuses a model whose tensors did not all come from its checkpoint.

    Args:
        report: that of `from_pretrained`.
        wanted: names of the tensors that count; all by default. A model of fewer layers may have others of other
            shapes, where one tensor is of all layers (Gemma 4's embeddings for each of them).
        advice: what to do about another shape.

    Raises:
        ValueError: naming tensors that are missing, or have another shape than the config asks for.
    """
    if missing := sorted(name for name in report["missing_keys"] if wanted is None or name in wanted):
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ValueError(f"the checkpoint of {path} lacks {', '.join(missing[:SHOWN])}{more}: {AGAIN}, whole")
    if others := [shapes for shapes in report["mismatched_keys"] if wanted is None or shapes[0] in wanted]:
        name, found, expected = min(others)
        raise ValueError(
            f"{name} is {list(found)} in the checkpoint of {path} and {list(expected)} by its {CONFIG}, the first"
            f" of {len(others)} such tensors: they do not belong together; {advice}"
        )


def reading_model(path: str, revision: str) -> contextlib.AbstractContextManager[None]:
    """As `reading_target`, of the model itself."""
    advice = f"update transformers if the model is newer than it, or {AGAIN}"
    return reading_target("the model", path, revision, advice, weights=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says while it loads."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
