from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from dflash_dist.config import KNOBS, Config, TrainConfig, describe, json_schema, load_config, load_written, to_tree
from tests.conftest import MINIMAL


def test_what_is_not_stated_takes_its_default(load):
    config = load()
    assert (config.output_dir, config.target.layer_ids, config.draft.mask_token_id) == ("runs/x", [1, 9, 17], 7)
    assert (config.draft.block_size, config.draft.num_layers, config.loss.anchors) == (16, 5, 512)
    assert (config.train.lr, config.train.warmup, config.train.max_steps) == (6e-4, 0.04, None)


def test_two_configs_share_no_list(load):
    load().train.betas.append(0.5)
    assert load().train.betas == [0.9, 0.95]


def test_an_override_wins_over_the_file(load):
    text = MINIMAL + "train: {lr: 1.0e-2, seed: 5}\n"
    config = load("train.lr=0.5", text=text)
    assert (config.train.lr, config.train.seed) == (0.5, 5)


def test_the_last_override_wins(load):
    assert load("train.seed=1", "train.seed=2").train.seed == 2


def test_a_number_that_yaml_reads_as_text_becomes_a_float_in_the_file(load):
    """PyYAML takes 3e-4 for a string, for want of a dot."""
    lr = load(text=MINIMAL + "train: {lr: 3e-4}\n").train.lr
    assert (type(lr), lr) == (float, 0.0003)


@pytest.mark.parametrize(
    ("override", "section", "name", "expected"),
    [
        ("train.lr=3e-4", "train", "lr", 0.0003),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.betas=[9e-1, 0]", "train", "betas", [0.9, 0.0]),
        ("train.max_steps=1e3", "train", "max_steps", 1000),
        ("train.max_steps=null", "train", "max_steps", None),
        ("train.max_steps=", "train", "max_steps", None),
        ("train.gradient_checkpointing=true", "train", "gradient_checkpointing", True),
        ("target.layer_ids=[0,2,5]", "target", "layer_ids", [0, 2, 5]),
        ("target.revision=refs/pr/4", "target", "revision", "refs/pr/4"),
        ("target.dtype=float32", "target", "dtype", "float32"),
        ("data.path=a=b.jsonl", "data", "path", "a=b.jsonl"),
        ("data.template_args.enable_thinking=false", "data", "template_args", {"enable_thinking": False}),
        ("data.date=2031-12-31", "data", "date", "2031-12-31"),
        ("data.date='2031-12-31'", "data", "date", "2031-12-31"),
        ("data.template_args={date: null, n: 1}", "data", "template_args", {"date": None, "n": 1}),
    ],
)
def test_an_override_gets_the_knobs_type(load, override, section, name, expected):
    value = getattr(getattr(load(override), section), name)
    assert repr(value) == repr(expected)  # repr, since 1 == 1.0 == True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=fast", "train.lr must be a valid number, found 'fast'"),
        ("train.lr=true", "train.lr must be a valid number, found 'true'"),
        ("train.warmup=", "train.warmup must be a valid number, found nothing"),
        ("train.seed=1.5", "train.seed must be a valid integer, found '1.5'"),
        ("train.seed=true", "train.seed must be a valid integer, found 'true'"),
        ("train.max_steps=.inf", "train.max_steps must be a valid integer, found '.inf'"),
        ("train.gradient_checkpointing=1", "train.gradient_checkpointing must be true or false, found '1'"),
        ("target.path=", "target.path must be a valid string, found nothing"),
        ("target.dtype=float16", "target.dtype must be 'float32' or 'bfloat16', found 'float16'"),
        ("target.layer_ids=3", "target.layer_ids must be a valid list, found '3'"),
        ("target.layer_ids=[1, two]", "target.layer_ids must be a valid integer, found 'two'"),
        ("data.template_args=3", "data.template_args must be a valid mapping, found '3'"),
        ("train=3", "override 'train=3': train is a section: set its keys, such as train.max_steps=..."),
        ("train.lr.peak=3", "override 'train.lr.peak': 'lr' is a value, not a section"),
        ("train.lr", "override 'train.lr' is not of the form section.name=value"),
        ("target.layer_ids=[1, 2", "override 'target.layer_ids=[1, 2'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(load, override, message):
    text = MINIMAL + "train: {lr: 0.1}\n"
    with pytest.raises(ValueError) as refusal:
        load(override, text=text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("draft.blocksize=8", "unknown key 'draft.blocksize'; did you mean 'draft.block_size'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("ouput_dir=x", "unknown key 'ouput_dir'; did you mean 'output_dir'?"),
        (
            "xyzzy=1",
            "unknown key 'xyzzy'; sections are checkpoint, data, draft, eval, log, loss, output_dir, target, train",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_name(load, override, message):
    with pytest.raises(ValueError) as refusal:
        load(override)
    assert message in str(refusal.value)


def test_all_that_is_wrong_is_told_at_once(load, tmp_path):
    text = "target: {dtype: float16}\ntrain: {learning_rate: 3, seed: abc}\ndata: {path: {a: 2, b: x}}\n"
    with pytest.raises(ValueError) as error:
        load("train.epochs=-1", text=text)
    path = tmp_path / "run.yaml"
    assert sorted(str(error.value).splitlines()) == [
        f"{path}: data.path.b must be a valid number, found 'x'",
        f"{path}: target.dtype must be 'float32' or 'bfloat16', found 'float16'",
        f"{path}: train.seed must be a valid integer, found 'abc'",
        f"{path}: unknown key 'train.learning_rate'; did you mean 'train.lr'?",
        "override 'train.epochs=-1': train.epochs must be greater than 0, found '-1'",
    ]
    with pytest.raises(ValueError) as error:
        load("draft.window=4", "draft.block_size=12", "validate.every=5")
    names = [line.split()[0] for line in str(error.value).splitlines()]
    assert names == ["draft.window", "loss.gamma", "validate.every"]


def test_an_unknown_key_in_the_file_names_the_file(load, tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'loss\.anchor'; did you mean 'loss\.anchors'\?") as refusal:
        load(text=MINIMAL + "loss: {anchor: 3}\n")
    assert str(tmp_path / "run.yaml") in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=''", "output_dir is not set"),
        ("target.path=''", "target.path is not set"),
        ("target.layer_ids=[]", "target.layer_ids is empty"),
        ("target.layer_ids=[-1, 2]", "target.layer_ids must be at least 0, found '-1'"),
        ("target.layer_ids=[2, 1]", "must be strictly increasing"),
        ("target.layer_ids=[1, 4, 2]", "must be strictly increasing"),
        ("target.layer_ids=[1, 1]", "must be strictly increasing"),
        ("target.replicas=0", "target.replicas must be at least 1, found '0'"),
        ("data.path=''", "data.path is not set"),
        ("data.seq_len=2", "data.seq_len must be greater than 2, found '2'"),
        ("data.val_conversations=-1", "data.val_conversations must be at least 0, found '-1'"),
        ("data.max_bad_rows=-1", "data.max_bad_rows must be at least 0, found '-1'"),
        ("data.date=31.12.2031", "data.date must be a day as YYYY-MM-DD, found '31.12.2031'"),
        ("data.date=20311231", "data.date must be a day as YYYY-MM-DD, found '20311231'"),
        ("data.date=2031-12-31T10:00:00", "data.date must be a day as YYYY-MM-DD"),
        ("data.date=2031-02-30", "data.date must be a day as YYYY-MM-DD, found '2031-02-30'"),
        ("draft.block_size=12", "loss.gamma has no published value for draft.block_size 12"),
        ("draft.block_size=1", "draft.block_size must be at least 2"),
        ("draft.num_layers=0", "draft.num_layers must be at least 1, found '0'"),
        ("draft.intermediate_size=0", "draft.intermediate_size must be at least 1"),
        ("draft.num_attention_heads=-1", "draft.num_attention_heads must be at least 1"),
        ("draft.num_key_value_heads=-1", "draft.num_key_value_heads must be at least 1"),
        ("draft.head_dim=-2", "draft.head_dim must be at least 2"),
        ("draft.head_dim=5", "draft.head_dim must be a multiple of 2"),
        ("loss.anchors=0", "loss.anchors must be at least 1, found '0'"),
        ("loss.chunk=0", "loss.chunk must be at least 1, found '0'"),
        ("loss.gamma=0", "loss.gamma must be greater than 0, found '0'"),
        ("loss.gamma=.nan", "loss.gamma must be a valid number, found '.nan'"),
        ("train.max_steps=-1", "train.max_steps must be at least 0, found '-1'"),
        ("train.epochs=0", "train.epochs must be greater than 0, found '0'"),
        ("train.epochs=.inf", "train.epochs must be a valid number"),
        ("train.seed=-1", "train.seed must be at least 0"),
        ("train.global_batch_size=0", "train.global_batch_size must be at least 1"),
        ("train.global_batch_size=63", "63 must be a multiple of train.micro_batch_size 2"),
        ("train.micro_batch_size=0", "train.micro_batch_size must be at least 1, found '0'"),
        ("train.lr=0", "train.lr must be greater than 0, found '0'"),
        ("train.lr=.nan", "train.lr must be a valid number, found '.nan'"),
        ("train.lr=inf", "train.lr must be a finite number"),
        ("train.warmup=1", "train.warmup must be less than 1, found '1'"),
        ("train.warmup=-0.1", "train.warmup must be at least 0, found '-0.1'"),
        ("train.final_lr=1.1", "train.final_lr must be at most 1, found '1.1'"),
        ("train.betas=[0.9]", "train.betas must have at least 2 items, not 1"),
        ("train.betas=[0.9, 1.0]", "train.betas must be less than 1, found '1.0'"),
        ("train.weight_decay=-0.1", "train.weight_decay must be at least 0, found '-0.1'"),
        ("train.clip_norm=0", "train.clip_norm must be greater than 0, found '0'"),
        ("train.hang_timeout=-1", "train.hang_timeout must be at least 0, found '-1'"),
        ("validate.every=-1", "validate.every must be at least 0, found '-1'"),
        ("validate.every=5", "nothing is held out: set data.val_path or data.val_conversations"),
        ("eval.every=-1", "eval.every must be at least 0, found '-1'"),
        ("eval.count=0", "eval.count must be at least 1, found '0'"),
        ("eval.max_new_tokens=0", "eval.max_new_tokens must be at least 2"),
        ("eval.every=5", "nothing to decode: set eval.prompts, data.val_path or data.val_conversations"),
        ("checkpoint.every=0", "checkpoint.every must be at least 1, found '0'"),
        ("checkpoint.keep=0", "checkpoint.keep must be at least 1, found '0'"),
        ("log.every=0", "log.every must be at least 1, found '0'"),
    ],
)
def test_an_impossible_value_is_refused_with_the_reason(load, override, message):
    possible = MINIMAL + "train: {micro_batch_size: 2, global_batch_size: 64}\n"
    load(text=possible)
    with pytest.raises(ValueError) as refusal:
        load(override, text=possible)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["draft.block_size=12", "loss.gamma=6"],
        ["validate.every=5", "data.val_conversations=1"],
        ["validate.every=5", "data.val_path=held_out.jsonl"],
        ["eval.every=5", "eval.prompts=asked.jsonl", "target.full_depth=true"],
        ["eval.every=5", "data.val_conversations=1", "target.full_depth=true"],
        ["train.max_steps=0"],
        ["train.warmup=0", "train.final_lr=0"],
        ["train.micro_batch_size=3", "train.global_batch_size=9"],
        ["target.layer_ids=[0]"],
        ["draft.mask_token_id=0"],
    ],
)
def test_a_possible_combination_is_accepted(load, overrides):
    tree = to_tree(load(*overrides))
    for override in overrides:
        key, _, text = override.partition("=")
        section, name = key.split(".")
        assert tree[section][name] == yaml.safe_load(text)


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7.0), (10, 5.0), (8, 4.0)])
def test_gamma_is_the_published_one_of_the_block_size(load, block_size, gamma):
    assert load(f"draft.block_size={block_size}").gamma == gamma


def test_the_learning_rate_suits_what_the_draft_begins_as_unless_it_is_stated(load):
    rates = [load(*of).train.lr for of in ([], ["draft.init=some/draft"], ["draft.init=some/draft", "train.lr=0.5"])]
    assert rates == [6e-4, 6e-5, 0.5]


def test_a_stated_gamma_wins_over_the_published_one(load):
    assert load("draft.block_size=16", "loss.gamma=2.5").gamma == 2.5


@pytest.mark.parametrize("width", [60, 100])
def test_describe_gives_every_knob_with_default_and_meaning_by_section_as_wide_as_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    told = describe()
    assert max(map(len, told.splitlines())) < width
    sections = [" ".join(section.split()) for section in told.split("\n\n")]
    names = iter(KNOBS)
    for section, knobs in zip(sections, to_tree(Config()).values(), strict=True):
        for knob in knobs if isinstance(knobs, dict) else ["output_dir"]:
            name = next(names)
            assert name.endswith(knob) and f"{name} = " in section
            assert KNOBS[name].metadata["description"] in section
    assert "train.lr = null: peak learning rate; null: 0.0006, or 6e-05 where draft.init names a draft" in sections[5]
    assert "train.betas = [0.9, 0.95]: AdamW's two decay rates" in sections[5]
    assert "draft.head_dim = null: " in sections[3]


def test_the_json_schema_has_every_knob_with_meaning_type_and_bounds():
    schema = json.loads(json_schema())
    for name, knob in KNOBS.items():
        place = schema
        for part in name.split("."):
            place = place["properties"][part]
            place = schema["$defs"][place["$ref"].split("/")[-1]] if "$ref" in place else place
        assert place["description"] == knob.metadata["description"]
        assert {"type", "anyOf"} & place.keys()
    [train, data] = (schema["$defs"][name] for name in ("TrainConfig", "DataConfig"))
    assert train["additionalProperties"] is False
    assert (train["properties"]["warmup"]["minimum"], train["properties"]["warmup"]["exclusiveMaximum"]) == (0, 1)
    assert train["properties"]["max_steps"]["anyOf"] == [{"minimum": 0, "type": "integer"}, {"type": "null"}]
    assert train["properties"]["precision"]["enum"] == ["float32", "bfloat16"]
    assert data["properties"]["path"]["anyOf"][1]["additionalProperties"] == {"exclusiveMinimum": 0, "type": "number"}


def test_a_config_survives_the_way_through_yaml(load):
    config = load(
        "train.lr=1e-5",
        "train.betas=[0.8, 0.99]",
        "train.max_steps=7",
        "target.layer_ids=[0, 3]",
        "target.revision=main",
        "data.template_args={enable_thinking: false}",
        "draft.init=target",
        "loss.gamma=3",
    )
    text = yaml.safe_dump(to_tree(config), sort_keys=False)
    assert load(text=text) == config
    assert config != load()


@pytest.mark.parametrize("text", ["train: {lr: 1", "\ttrain: 1", "a: b: c", "target: [1, 2"])
def test_malformed_yaml_names_the_file(load, tmp_path, text):
    with pytest.raises(ValueError, match="is not valid YAML") as refusal:
        load(text=text)
    assert str(tmp_path / "run.yaml") in str(refusal.value)


@pytest.mark.parametrize(("text", "found"), [("- 1\n- 2\n", "a list"), ("just words", "'just words'")])
def test_yaml_without_sections_names_the_file(load, tmp_path, text, found):
    with pytest.raises(ValueError, match=f"expected sections such as 'target:', found {found}") as refusal:
        load(text=text)
    assert str(tmp_path / "run.yaml") in str(refusal.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"output_dir: \xff\n")
    with pytest.raises(ValueError) as refusal:
        load_config(path)
    assert str(path) in str(refusal.value)


def test_an_empty_file_is_told_what_to_set(load):
    with pytest.raises(ValueError, match="output_dir is not set"):
        load(text="")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.features=stored", "target.features takes the target's place"),
        ("target.full_depth=false", "set target.full_depth to true"),
    ],
)
def test_real_decoding_without_a_whole_target_is_refused(load, override, message):
    with pytest.raises(ValueError, match=message):
        load("eval.every=5", "eval.prompts=asked.jsonl", "target.full_depth=true", override)


@pytest.mark.parametrize("block_size", [16, 100])
def test_the_decay_that_a_refusal_advises_is_accepted(load, block_size) -> None:
    with pytest.raises(ValueError, match=r"without weight: set it to at least \d+$") as refusal:
        load(f"draft.block_size={block_size}", "loss.gamma=0.1")
    least = str(refusal.value).split()[-1]
    assert load(f"draft.block_size={block_size}", f"loss.gamma={least}").gamma == float(least)


def test_what_a_run_of_another_version_wrote_is_read_as_far_as_it_is_known(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + "train: {lr: 0.5, gone: [1]}\nlost: {x: 1}\n")
    config = load_written(path, unknown := [])
    assert unknown == ["train.gone", "lost"]
    assert (config.train.lr, config.train.epochs, config.target.layer_ids) == (0.5, 6.0, [1, 9, 17])
    path.write_text("train: {lr: fast}\n")
    with pytest.raises(ValueError, match=r"config\.yaml: train\.lr must be a valid number, found 'fast'"):
        load_written(path)


def test_a_value_that_no_file_stated_has_the_type_and_bounds_of_its_knob_too():
    with pytest.raises(ValueError, match="micro_batch_size"):
        replace(Config().train, micro_batch_size=0)
    with pytest.raises(ValueError, match="sed"):
        TrainConfig(sed=3)  # type: ignore[call-arg]
