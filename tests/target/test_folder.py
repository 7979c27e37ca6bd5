"""What of a target's files is refused, in which words, and when."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_dist.answers.regenerate import main as regenerate
from dflash_dist.contract.folder import write_draft
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.evaluate.evaluate import main as evaluate
from dflash_dist.export.check import check
from dflash_dist.export.export import main as export
from dflash_dist.prepare import capture
from dflash_dist.ranks import World
from dflash_dist.reading import is_ours
from dflash_dist.target.folder import weight_files
from dflash_dist.target.load import check_loading, check_loading_whole, load_ends, load_target, load_whole, read_info
from dflash_dist.training.trainer import Trainer
from tests.hostile import POINTER, copied, write
from tests.tiny import target_of, tiny_shape

IDS = [1, 2, 4]
CPU = torch.device("cpu")


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", changes)


def edit(file: Path, changes: dict) -> None:
    write(file, json.dumps(json.loads(file.read_bytes()) | changes).encode())


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, (folder / name).read_bytes()[: (folder / name).stat().st_size // 2])


def put(name: str, content: bytes | None) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, content)


def in_shards(*then: Callable[[Path], None]) -> Callable[[Path], None]:
    """The weights in two files, a and b, with an index; then what else befalls them."""

    def split(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        files = {name: "ab"[names.index(name) % 2] + ".safetensors" for name in names}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
        write(folder / "model.safetensors", None)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        for harm in then:
            harm(folder)

    return split


def in_older(then: Callable[[Path], None]) -> Callable[[Path], None]:
    """The weights as torch saves them; then what else befalls them."""

    def convert(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        write(folder / "model.safetensors", None)
        then(folder)

    return convert


def slow_tokenizer(folder: Path) -> None:
    write(folder / "tokenizer.json", None)
    edit(folder / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})


# What `read_info` refuses; {} is the folder.
DESCRIPTIONS = {
    "unknown type": (
        config(model_type="nosuch"),
        "config.json of {} is of a model of type 'nosuch', which transformers ",
    ),
    "config is a pointer": (put("config.json", POINTER), "{}/config.json is a Git LFS pointer"),
    "config is a list": (put("config.json", b"[1]"), "config.json of {} holds no JSON object: download or copy"),
    "a size is text": (config(hidden_size="64"), "config.json of {} cannot be read .Strict.* expected int, got str"),
    "30 digits": (
        config(num_hidden_layers=10**30),
        "num_hidden_layers in config.json of {} is 10+, which is no number",
    ),
    "no decoder": (config(hidden_size=0), "config.json of {} describes no decoder .hidden_size 0"),
    "a head of gigabytes": (config(head_dim=2**31), "config.json of {} describes no decoder .head_dim 2147483648"),
    "cut tokenizer": (cut("tokenizer.json"), "{}/tokenizer.json is not JSON .*: download or copy the model again"),
    "empty tokenizer": (put("tokenizer.json", b""), "{}/tokenizer.json is empty"),
    "tokenizer in Python": (slow_tokenizer, "the tokenizer of {} is a ByT5Tokenizer, written in Python"),
    "no tokenizer": (put("tokenizer.json", None), "the tokenizer of {} cannot be read .*, with its tokenizer.json"),
    "cut generation config": (cut("generation_config.json"), "{}/generation_config.json is not JSON"),
    "stop token is text": (
        put("generation_config.json", b'{"eos_token_id": "a"}'),
        "eos_token_id in generation_config.json of {} is 'a', which is no token's id",
    ),
}
# What loading would stumble over.
WEIGHTS = {
    "half a file": (cut("model.safetensors"), "{}/model.safetensors is cut or damaged"),
    "a pointer": (put("model.safetensors", POINTER), "{}/model.safetensors is a Git LFS pointer .*`git lfs pull`"),
    "no weights": (put("model.safetensors", None), "{} holds no weights, neither model.safetensors nor shards"),
    "a missing shard": (in_shards(put("b.safetensors", None)), "{} lacks b.safetensors, which .*index.json names"),
    "half a shard": (in_shards(cut("b.safetensors")), "{}/b.safetensors is cut or damaged"),
    "half an older file": (in_older(cut("pytorch_model.bin")), "{}/pytorch_model.bin is cut: its end is missing"),
    "a cut index": (in_shards(cut("model.safetensors.index.json")), "{}/model.safetensors.index.json is not JSON"),
    "an index without a map": (
        in_shards(put("model.safetensors.index.json", b"{}")),
        "{}/model.safetensors.index.json has no key 'weight_map'",
    ),
    "an unknown activation": (config(hidden_act="nosuch"), "the model of {} cannot be read .KeyError: 'nosuch'"),
    "other sizes": (
        config(num_attention_heads=2),
        r"o_proj.weight is \[64, 64\] in the checkpoint of {} and \[64, 32\] by its config.json, the first of",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        r"the model of {} needs a package that is missing here .ImportError: .*optimum",
    ),
}


def refusal(action: Callable[[], object], folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words.format(folder)) as caught:
        action()
    assert is_ours(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_what_describes_a_target_is_refused_in_a_sentence(tiny_target: Path, tmp_path: Path, case: str) -> None:
    harm, words = DESCRIPTIONS[case]
    harm(folder := copied(tiny_target, tmp_path / "target"))
    refusal(lambda: read_info(str(folder)), folder, words)


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_refused_in_a_sentence_before_they_are_loaded(tiny_target, tmp_path, monkeypatch, case) -> None:
    harm, words = WEIGHTS[case]
    harm(folder := copied(tiny_target, tmp_path / "target"))
    info = read_info(str(folder))
    monkeypatch.setattr("dflash_dist.target.load._from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    refusal(lambda: check_loading(info, target_of(IDS)), folder, words)
    refusal(lambda: check_loading_whole(info), folder, words)


@pytest.mark.parametrize("harm", [lambda folder: None, in_shards()])
def test_a_whole_target_passes_and_holds_no_memory(tiny_target: Path, tmp_path: Path, harm) -> None:
    harm(folder := copied(tiny_target, tmp_path / "target"))
    info = read_info(str(folder))
    check_loading(info, target_of(IDS))
    check_loading(info, target_of(IDS, full_depth=True, attention="eager"))
    check_loading_whole(info)
    assert info.config.num_hidden_layers == 6, "what is tried out is a copy"


def test_layers_that_are_left_out_need_no_file(tiny_target: Path, tmp_path: Path) -> None:
    folder = copied(tiny_target, tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    write(folder / "model.safetensors", b"")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.5." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    check_loading(read_info(str(folder)), target_of(IDS))
    refusal(lambda: check_loading_whole(read_info(str(folder))), folder, r"the checkpoint of {} lacks model.layers.5")


def test_half_a_file_is_named_where_ends_are_read_alone(tiny_target: Path, tmp_path: Path) -> None:
    cut("model.safetensors")(folder := copied(tiny_target, tmp_path / "target"))
    info = read_info(str(folder))
    refusal(lambda: load_ends(info, torch.float32, CPU), folder, "{}/model.safetensors is cut or damaged")


def test_a_hub_id_that_is_not_downloaded_yet_is_no_error(tiny_target: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weight_files("org/model", "main") == []


def write_tiny_draft(folder: Path) -> None:
    shape = tiny_shape()
    write_draft(folder, DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "float32")


@pytest.mark.parametrize("start", [lambda config, world: Trainer(config, world), capture.capture])
def test_no_data_is_read_for_a_target_that_cannot_be_loaded(debug_config, tiny_target, tmp_path, alone, start) -> None:
    cut("model.safetensors")(folder := copied(tiny_target, tmp_path / "target"))
    config = debug_config(f"target.path={folder}", "data.path=nowhere.jsonl")
    arguments = (config, alone) if start is not capture.capture else (config, tmp_path / "features", alone)
    refusal(lambda: start(*arguments), folder, "{}/model.safetensors is cut or damaged")


def test_no_data_is_read_for_a_draft_to_begin_from_that_is_damaged(debug_config, tiny_target, tmp_path, alone) -> None:
    write_draft(
        tmp_path / "draft", DFlashDraftModel, tiny_shape(), DFlashDraftModel(tiny_shape()).state_dict(), "float32"
    )
    cut("model.safetensors")(tmp_path / "draft")
    config = debug_config(f"target.path={tiny_target}", "data.path=nowhere.jsonl", f"draft.init={tmp_path / 'draft'}")
    refusal(lambda: Trainer(config, alone), tmp_path / "draft", "{}/model.safetensors is cut or damaged")


# ------------------------------------------------------------------------------------------------ code of its own

CODE = {  # of a model that transformers does not know
    "configuration_quiet.py": """
from transformers import Qwen3Config


class QuietConfig(Qwen3Config):
    model_type = "quiet"
""",
    "modeling_quiet.py": """
from transformers import Qwen3ForCausalLM, Qwen3Model

from .configuration_quiet import QuietConfig


class QuietModel(Qwen3Model):
    config_class = QuietConfig


class QuietForCausalLM(Qwen3ForCausalLM):
    config_class = QuietConfig
""",
    "tokenization_quiet.py": """
from transformers import PreTrainedTokenizerFast


class QuietTokenizer(PreTrainedTokenizerFast):
    pass
""",
}


@pytest.fixture
def with_code(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder = copied(tiny_target, tmp_path / "quiet")
    for name, text in CODE.items():
        (folder / name).write_text(text)
    classes = {"AutoModel": "QuietModel", "AutoModelForCausalLM": "QuietForCausalLM"}
    places = {auto: f"modeling_quiet.{name}" for auto, name in classes.items()}
    config(model_type="quiet", auto_map=places | {"AutoConfig": "configuration_quiet.QuietConfig"})(folder)
    auto_map = {"AutoTokenizer": [None, "tokenization_quiet.QuietTokenizer"]}
    edit(folder / "tokenizer_config.json", {"tokenizer_class": "QuietTokenizer", "auto_map": auto_map})
    return folder


def test_code_of_a_models_own_runs_only_where_it_is_trusted(with_code: Path, tmp_path: Path, alone: World) -> None:
    refusal(
        lambda: read_info(str(with_code)), with_code, "{} brings Python code .* target.trust_remote_code .*--trust-rem"
    )
    assert not list((tmp_path / "modules").rglob("*_quiet.py")), "none of it was even fetched"
    info = read_info(str(with_code), trust_remote_code=True)
    assert type(info.config).__name__ == "QuietConfig" and type(info.tokenizer).__name__ == "QuietTokenizer"
    check_loading(info, target_of(IDS))
    check_loading_whole(info)
    assert type(load_target(info, target_of(IDS), alone).model.model).__name__ == "QuietModel"
    assert type(load_whole(info, torch.float32, CPU)).__name__ == "QuietForCausalLM"
    assert list((tmp_path / "modules").rglob("*_quiet.py"))


def test_a_run_trains_on_a_trusted_target_and_its_draft_is_exported(
    with_code, debug_config, write_chats, tmp_path, alone
) -> None:
    chats = write_chats(*[[("user", "Hi"), ("assistant", "a few words in answer")]] * 4)
    small = [f"data.path={chats}", "data.val_conversations=0", "validate.every=0", "data.seq_len=64"]
    small += ["train.max_steps=1", "train.global_batch_size=1", "train.micro_batch_size=1"]
    config = debug_config(f"target.path={with_code}", "target.trust_remote_code=true", *small)
    Trainer(config, alone).run()
    export(["--run", config.output_dir, "--out", str(tmp_path / "draft"), "--format", "speculators"])
    written = json.loads((tmp_path / "draft/config.json").read_text())["speculators_config"]["verifier"]
    assert written["name_or_path"] == str(with_code)
    with pytest.raises(ValueError, match="brings Python code"):
        check(tmp_path / "draft", str(with_code))
    assert all(line.kind != "FAULT" for line in check(tmp_path / "draft", str(with_code), trust_remote_code=True))


@pytest.mark.parametrize("command", ["regenerate", "evaluate"])
def test_commands_that_name_a_target_take_the_trust_as_a_flag(with_code, tmp_path, write_chats, command) -> None:
    prompts = write_chats([("user", "Hi"), ("assistant", "yes")])
    argv = ["--target", str(with_code), "--prompts", str(prompts), "--max-new-tokens", "2", "--dtype", "float32"]
    if command == "evaluate":
        write_draft(
            tmp_path / "draft", DFlashDraftModel, tiny_shape(), DFlashDraftModel(tiny_shape()).state_dict(), "float32"
        )
        argv += ["--draft", str(tmp_path / "draft")]
    else:
        argv += ["--out", str(tmp_path / "answers.jsonl")]
    main = {"evaluate": evaluate, "regenerate": regenerate}[command]
    with pytest.raises(ValueError, match="brings Python code"):
        main(argv)
    main([*argv, "--trust-remote-code"])
