"""Every value as typed, or refused in one sentence: through the config, whose fields have all the types."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dflash_dist import __main__ as program
from dflash_dist.config import KNOBS, SYNONYMS, Config, load_config, to_tree, values
from tests.conftest import MINIMAL


@pytest.fixture
def refusal(load):
    """The one sentence with which a config is refused."""

    def refusal(*overrides: str, text: str = MINIMAL) -> str:
        with pytest.raises(ValueError) as refused:
            load(*overrides, text=text)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return refusal


# ------------------------------------------------------------------------------------------------ text

NAMES = ["0012345", "5349", "1e3", "2024-07-26", "1:30", "off", "yes", "true", "0x1F", "1_000", ".inf", "=", "<<"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_what_was_typed_also_where_yaml_sees_a_number_a_date_or_a_truth(load, name) -> None:
    assert load(f"target.revision={name}").target.revision == name
    in_file = MINIMAL.replace("path: some/model", f"path: some/model, revision: {name}")
    assert load(text=in_file).target.revision == name


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_writes_down_reads_back_the_same(load, name) -> None:
    config = load(f"target.revision={name}", f"data.template_args={{x: '{name}'}}")
    assert config.data.template_args == {"x": name}
    assert load(text=yaml.safe_dump(to_tree(config))) == config


@pytest.mark.parametrize(
    "path",
    [
        "a#b.jsonl",
        "a #b.jsonl",
        "#x",
        "a: b",
        "[x]",
        "*x",
        "&x",
        "@scope/x",
        "%x",
        "!x",
        "it's",
        "- x",
        "a=b",
        "`x`",
        " x",
    ],
)
def test_text_on_the_command_line_needs_no_quotes(load, path) -> None:
    assert load(f"data.path={path}").data.path == path
    assert load(f"output_dir={path}").output_dir == path


def test_quotes_on_the_command_line_are_quotes(load, refusal) -> None:
    assert load("data.path='a: b'").data.path == "a: b" and load('output_dir="null"').output_dir == "null"
    assert load("data.val_path=null").data.val_path is None
    assert load("data.path={a.jsonl: 2, 2024: 0.5}").data.path == {"a.jsonl": 2, "2024": 0.5}
    assert "is not valid YAML" in refusal("data.path='a' b'")


@pytest.mark.parametrize("knob", [name for name, field in KNOBS.items() if field.metadata["path"]])
def test_a_tilde_leads_home_in_every_path(load, refusal, monkeypatch, knob) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    section, _, name = knob.rpartition(".")
    tree = yaml.safe_load(MINIMAL)
    (tree.setdefault(section, {}) if section else tree)[name] = "~/x"
    assert values(load(text=yaml.safe_dump(tree)))[knob] == "/home/me/x"
    assert values(load(f"{knob}=~/a b"))[knob] == "/home/me/a b"
    assert "names no user's home" in refusal(f"{knob}=~nobody-of-this-name/x")


def test_a_tilde_leads_home_in_every_source_of_several(load, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load("data.path={~/a: 2, b: 1}").data.path == {"/home/me/a": 2, "b": 1}


def test_every_text_knob_that_names_a_file_or_folder_is_marked_as_a_path() -> None:
    text = {name for name, default in values(Config()).items() if isinstance(default, str) or "path" in name}
    others = {"target.revision", "target.dtype", "draft.kind", "loss.objective", "loss.distance", "train.precision"}
    assert text - others <= {name for name, field in KNOBS.items() if field.metadata["path"]}


def test_a_tilde_leads_home_in_the_options_of_every_command(monkeypatch) -> None:
    """A shell expands it at the beginning of a word only: not in --out=~/x, and never where there is no shell."""
    monkeypatch.setenv("HOME", "/home/me")
    seen: list[str] = []
    monkeypatch.setitem(program.COMMANDS, "check", ("tests.test_typed_yaml", ""))
    monkeypatch.setattr("tests.test_typed_yaml.main", seen.extend, raising=False)
    typed = [
        "~/a",
        "--out=~/b",
        "--suite",
        "mtbench=~/c",
        "data.path=~/d",
        "x~/e",
        "--seed=~1",
        "~",
        "train.max_steps=~",
    ]
    monkeypatch.setattr("sys.argv", ["dflash_dist", "check", *typed])
    program.main()
    home = "/home/me"
    assert seen[:5] == [f"{home}/a", f"--out={home}/b", "--suite", f"mtbench={home}/c", f"data.path={home}/d"]
    assert seen[5:] == typed[5:]


# ------------------------------------------------------------------------------------------------ numbers and truths


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed=0010", 10),  # octal 8 in YAML 1.1
        ("train.seed=9007199254740993", 2**53 + 1),  # a float rounds it
        ("train.seed=1_000", 1000),
        ("train.max_steps=1e3", 1000),
        ("train.max_steps=12.0", 12),
        ("train.lr=.5", 0.5),
        ("train.compile=on", True),
        ("train.compile=False", False),
    ],
)
def test_a_number_is_the_one_that_was_typed(load, override, expected) -> None:
    value = values(load(override))[override.partition("=")[0]]
    assert (type(value), value) == (type(expected), expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=1:30", "train.seed must be a valid integer, found '1:30'"),  # 90 in YAML 1.1
        ("train.seed=0x10", "train.seed must be a valid integer, found '0x10'"),
        ("train.seed=5 # five", "train.seed must be a valid integer, found '5 # five'"),
        ("train.seed=1e30", "train.seed must be at most 9223372036854775807, found '1e30'"),
        (f"train.seed={'9' * 5000}", "train.seed must be"),
        ("train.compile=1", "train.compile must be true or false, found '1'"),
        ("train.compile='true'", "train.compile must be true or false, found 'true'"),
    ],
)
def test_what_is_no_number_or_truth_is_refused_as_typed(refusal, override, message) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize("number", [".inf", "-.inf", "inf", "nan", ".NaN", "1e999"])
@pytest.mark.parametrize("knob", [n for n, default in values(Config()).items() if isinstance(default, (int, float))])
def test_no_number_is_infinite(refusal, knob, number) -> None:
    told = refusal(f"{knob}={number}").partition(f": {knob} must be ")[2]
    assert any(word in told for word in ("number", "integer", "true or false", "at most"))


def test_numbers_in_lists_and_mappings_are_finite_too(refusal) -> None:
    assert "train.betas must be a finite number" in refusal("train.betas=[0.9, nan]")
    assert "data.path.a must be a finite number" in refusal("data.path={a: inf}")
    assert "data.template_args.x must be a finite number" in refusal("data.template_args={x: -.inf}")
    assert "loss.gamma must be a finite number" in refusal("loss.gamma=nan")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("false", False),
        ("null", None),
        ("3", 3),
        ("-0.5", -0.5),
        ("2024-07-26", "2024-07-26"),
        ("0012", "0012"),
        ("1:30", "1:30"),
        ("a #b", "a #b"),
        ("'3'", "3"),
        ("[1, {y: 007}]", [1, {"y": "007"}]),
    ],
)
def test_a_template_argument_is_what_json_would_take_it_for_or_text(load, typed, expected) -> None:
    assert repr(load(f"data.template_args.x={typed}").data.template_args["x"]) == repr(expected)


@pytest.mark.parametrize("word", ["yes", "No", "on", "OFF"])
def test_a_template_argument_that_may_be_a_word_or_a_truth_is_refused(load, refusal, word) -> None:
    assert f"x: {word} may be a word or a truth: write true or false, or '{word}'" in refusal(
        f"data.template_args={{x: {word}}}"
    )
    assert load(f"data.template_args={{x: '{word}'}}").data.template_args == {"x": word}


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  lr: 1\n  seed: 2\n  lr: 3\n",
            "run.yaml is not valid YAML in line 8: the key 'lr' stands twice, first in line 6: leave one",
        ),
        ("data: {path: x}\n", "line 5: the key 'data' stands twice, first in line 3"),
        ("train: {lr: 1, lr: 1}\n", "line 5: the key 'lr' stands twice, first in line 5"),
        ("loss: {? [a] : 1}\n", "line 5: a key is a name, not a list or a mapping"),
        (
            "loss: !!python/name:os.system x\n",
            "line 5: tags such as tag:yaml.org,2002:python/name:os.system are not read",
        ),
        ("loss: !mine {}\n", "line 5: tags such as !mine are not read"),
        ("eval: &e {count: *e}\n", "line 5: found unconstructable recursive node"),
        ("eval: {<<: 3}\n", "line 5: expected a mapping or list of mappings for merging, but found scalar"),
        ("train: {lr: 1}\n---\ntrain: {lr: 2}\n", "is not valid YAML in line 6: but found another document"),
        ("train:\n\tlr: 1\n", "in line 6: found character '\\t' that cannot start any token"),
        ("train: {lr: 1\n", "is not valid YAML in line 6: expected ',' or '}'"),
        ("train: {1: 2}\n", "unknown key 'train.1'"),
        ("train: {true: 2}\n", "unknown key 'train.true'"),
        ("train.lr: 3e-4\n", "unknown key 'train.lr': in a file, 'lr' stands below 'train:'"),
        ("train.lrr: 3e-4\n", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("train: {lr: {peak: 1}}\n", "train.lr must be a valid number, found a mapping"),
        ("loss: 3\n", "loss is a section, found '3'"),
        ("loss: \0\n", "is not valid YAML: unacceptable character"),
        ("loss: " + "[" * 5000, "is not valid YAML"),
    ],
)
def test_a_file_that_says_less_than_it_seems_to_is_refused(refusal, text, message) -> None:
    assert message in refusal(text=MINIMAL + text)


def test_merge_keys_and_aliases_are_read_and_what_is_stated_wins(load) -> None:
    text = MINIMAL + "validate: &v {every: 5}\nlog: {<<: *v}\ncheckpoint: {every: 7, <<: [*v]}\n"
    config = load("data.val_conversations=1", text=text)
    assert (config.validate.every, config.log.every, config.checkpoint.every) == (5, 5, 7)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config(tmp_path / "run.yaml").output_dir == "runs/x"


@pytest.mark.parametrize("section", ["train:", "train: ~", "train: {}", "train: # nothing yet"])
def test_an_empty_section_takes_an_override(load, section) -> None:
    assert load("train.lr=0.5", text=f"{MINIMAL}{section}\n").train.lr == 0.5
    assert load(text=f"{MINIMAL}{section}\n") == load()
    assert load(
        "data.template_args.x=1", text=MINIMAL.replace("chats.jsonl", "chats.jsonl, template_args: ")
    ).data.template_args == {"x": 1}


@pytest.mark.parametrize("value", ["", "{lr: 1}", "null"])
def test_an_override_of_a_section_would_lose_what_the_file_says_in_it(refusal, value) -> None:
    told = refusal(f"train={value}", text=MINIMAL + "train: {seed: 5}\n")
    assert "train is a section: set its keys, such as train.max_steps=..." in told


# ------------------------------------------------------------------------------------------------ unknown keys


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("lr=1", "did you mean 'train.lr'?"),
        ("train.epoch=1", "did you mean 'train.epochs'?"),
        ("data.epochs=1", "did you mean 'train.epochs'?"),
        ("train.gama=1", "did you mean 'loss.gamma'?"),
        ("Train.lr=1", "did you mean 'train'?"),
        ("train.LR=1", "did you mean 'train.lr'?"),
        ("loss.path=1", "did you mean 'target.path' or 'data.path'?"),
        ("train.xyzzy=1", "; train has max_steps, epochs, seed, "),
        ("train.learning_rate=1", "unknown key 'train.learning_rate'; did you mean 'train.lr'?"),
        ("batch_size=1", "did you mean 'train.global_batch_size'?"),
        ("model=x", "did you mean 'target.path'?"),
        ("dataset.path=x", "did you mean 'data.path'?"),
        ("optimizer.lr=1", "unknown key 'optimizer.lr'; did you mean 'train.lr'?"),
        ("scheduler.args.Warmup_Ratio=1", "unknown key 'scheduler.args.Warmup_Ratio'; did you mean 'train.warmup'?"),
        ("data.tokenizer.max_length=1", "unknown key 'data.tokenizer.max_length'; did you mean 'data.seq_len'?"),
        (
            "train.gradient_accumulation_steps=4",
            ": it is train.global_batch_size / (ranks x train.micro_batch_size), so set these",
        ),
        ("xyzzy.plugh=1", "unknown key 'xyzzy.plugh'; sections are checkpoint, "),
    ],
)
def test_the_suggestion_is_what_is_meant(refusal, override, suggested) -> None:
    assert suggested in refusal(override)


def test_synonyms_are_of_knobs_and_are_none() -> None:
    assert {name for name in SYNONYMS.values() if " " not in name} <= KNOBS.keys()
    assert not SYNONYMS.keys() & {name.rpartition(".")[2] for name in KNOBS}


@pytest.mark.parametrize("override", ["train.lr=fast", "train.lrr=1", "trian.lr=1", "data.path={a: inf}", "model=x"])
def test_a_mistake_in_an_override_is_not_blamed_on_the_file(refusal, override) -> None:
    told = refusal("train.seed=1", override)
    assert told.startswith(f"override {override!r}: ") and "run.yaml" not in told


def test_a_mistake_in_the_file_is_not_blamed_on_an_override(refusal) -> None:
    assert "/run.yaml: loss.alpha must be " in refusal("loss.anchors=1", text=MINIMAL + "loss: {alpha: much}\n")


@given(st.from_regex(r"([a-z_]{1,12}\.)?[a-z_.]{1,16}", fullmatch=True))
@example("train.lr")
@example("validate.every.")
@example("output_dir")
def test_a_suggestion_exists_and_is_never_what_was_typed(tmp_path_factory, key) -> None:
    path = tmp_path_factory.getbasetemp() / "suggestions.yaml"
    path.write_text(f"{key}: 3\n")
    try:
        load_config(path, [])
    except ValueError as error:
        if "did you mean" in str(error):
            suggested = re.findall(r"'([^']*)'", str(error).partition("did you mean")[2])
            sections = {name.partition(".")[0] for name in KNOBS}
            assert suggested and key not in suggested and set(suggested) <= {*KNOBS, *sections}
