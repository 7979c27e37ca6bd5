"""The files of a target, in a folder or in the hub's cache, looked at before anything is loaded from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig

from dflash_dist.reading import check_fields, damage, is_kind, read_shards, reading, shown

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OLDER, OLDER_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
AGAIN = "download or copy the model again"
TRUST = (
    "brings Python code of its own, which runs only if you trust it: read it, then set target.trust_remote_code to true"
    " (--trust-remote-code where the target is named on the command line)"
)
DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers"}
MOST_LAYERS = 10_000  # libraries make lists of this length as they read a config
OTHER_SIZES = ("head_dim", "intermediate_size", "num_attention_heads", "num_key_value_heads")
LARGEST_SIZE = 1 << 24  # no model has one above, and tables of a size are made before any weight is read


def looks_like_hub_id(path: str) -> bool:
    return len(path.split("/")) == 2 and not path.startswith(("/", ".", "~"))


def find(path: str, revision: str, name: str) -> Path | None:
    """A file of the target, None where it is not. On the hub, what its cache does not hold is not there yet."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    cached = try_to_load_from_cache(path, name, revision=revision) if looks_like_hub_id(path) else None
    return Path(cached) if isinstance(cached, str) else None


@contextlib.contextmanager
def reading_target(what: str, path: str, revision: str, advice: str = AGAIN, weights: bool = False) -> Iterator[None]:
    """As `reading`, of something of the target: names what is damaged of the files that describe it, and of its weights
    if they are read too.

    Raises:
        ValueError: instead of any error of a library; or the target has code that is not trusted.
    """

    def files() -> list[Path]:
        config = find(path, revision, CONFIG)
        described = sorted(config.parent.glob("*.json")) if config else []
        return described + (weight_files(path, revision) if weights else [])

    try:
        with reading(f"{what} of {path}", advice, files):
            yield
    except ValueError as error:
        if "trust_remote_code" in str(error.__cause__):
            raise ValueError(f"{path} {TRUST}") from error
        raise


def read_config(path: str, revision: str, trust_remote_code: bool, local_files_only: bool = False) -> Any:
    """The target's config as transformers reads it.

    Raises:
        ValueError: there is none, it is damaged, or of a model that transformers does not know or whose code is not
            trusted.
    """
    options = {"revision": revision, "local_files_only": local_files_only}
    where = f"{CONFIG} of {path}"
    with reading_target(CONFIG, path, revision):
        written, _ = PreTrainedConfig.get_config_dict(path, **options)
    if not isinstance(written, dict):
        raise ValueError(f"{where} holds no JSON object: {AGAIN}")
    check_fields(written, {"model_type": str | None, "auto_map": dict[str, Any] | None}, where, AGAIN)
    for place in (written, *(value for value in written.values() if isinstance(value, dict))):
        for key in DEPTHS & place.keys():
            if not is_kind(place[key], int | None) or (place[key] or 0) > MOST_LAYERS:
                raise ValueError(f"{key} in {where} is {shown(place[key])}, which is no number of layers: {AGAIN}")
    try:
        with reading_target(CONFIG, path, revision):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
            text = config.get_text_config()
    except ValueError as error:
        if written.get("model_type") in CONFIG_MAPPING or "AutoConfig" in (written.get("auto_map") or {}):
            raise
        raise ValueError(
            f"{where} is of a model of type {written.get('model_type')!r}, which transformers"
            f" {transformers.__version__} does not know: update transformers, or choose another target"
        ) from error
    needed = ("num_hidden_layers", "hidden_size", "vocab_size")
    sizes: dict[str, Any] = {name: getattr(text, name, None) for name in needed}
    sizes |= {name: size for name in OTHER_SIZES if is_kind(size := getattr(text, name, None), int)}
    wrong = [f"{name} {shown(n)}" for name, n in sizes.items() if not is_kind(n, int) or not 1 <= n <= LARGEST_SIZE]
    if wrong:
        raise ValueError(f"{where} describes no decoder ({', '.join(wrong)}): choose another target")
    return config


def check_decoder(text: Any, path: str) -> None:
    """Refuses a target from whose config no draft can take its shape, with a ValueError that names what is missing."""
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    kinds = dict.fromkeys(sizes, int) | {"rms_norm_eps": float}
    if missing := [name for name, kind in kinds.items() if not is_kind(getattr(text, name, None), kind)]:
        raise ValueError(f"{path} is no Llama-like decoder: its config has no {', '.join(missing)}")


def read_tokenizer(path: str, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The tokenizer; a ValueError if it is damaged, or none that the tokenizers library runs."""
    advice = f"{AGAIN}, with its tokenizer.json"
    with reading_target("the tokenizer", path, revision, advice):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"the tokenizer of {path} is a {type(tokenizer).__name__}, written in Python, which does not tell where in"
            " a text its tokens begin: choose a target with a tokenizer.json"
        )
    return tokenizer


def weight_files(path: str, revision: str) -> list[Path]:
    """The files of the target's weights, as transformers chooses them: safetensors if there are any. Empty where
    the hub's cache does not hold all of them yet.

    Raises:
        ValueError: one is missing in the folder, cut or damaged.
    """
    on_hub = not Path(path).is_dir()
    described = next(
        (file for name in (WEIGHTS, INDEX, OLDER, OLDER_INDEX) if (file := find(path, revision, name))), None
    )
    if described is None:
        if on_hub:
            return []
        raise ValueError(f"{path} holds no weights, neither {WEIGHTS} nor shards with {INDEX}: {AGAIN}, with them")
    names = {described.name}
    if described.suffix == ".json":
        names = set(read_shards(described, AGAIN).values())
    files = {name: find(path, revision, name) for name in sorted(names)}
    if lacking := [name for name, file in files.items() if file is None]:
        if on_hub:
            return []
        raise ValueError(f"{path} lacks {', '.join(lacking)}, which {described.name} names: {AGAIN}, whole")
    found = [file for file in files.values() if file]
    for file in found:
        if fault := damage(file):
            raise ValueError(f"{file} {fault}: {AGAIN}")
    return found
