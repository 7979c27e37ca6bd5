"""A command line becomes a typed object, or ends the program with what is wrong in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dflash_dist.config import Day
from dflash_dist.options import ConfigOptions, JsonObject, argument, option, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    draft: str = argument("a place")
    out: Path = option("100 % of it")
    seed: int = option("seed", 3)
    step: int | Literal["best"] | None = option("a step", None)
    dtype: Literal["float32", "bfloat16"] = option("", "bfloat16")
    also: Literal["a", "b"] | None = option("a letter", None)
    day: Day | None = option("a day", None)
    names: list[str] = option("names", [], also="--name")
    fields: JsonObject = option("an object", {}, group="to a server")
    give_up: bool = option("a switch", False, group="to a server")

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError("--seed must not be negative")


def read(*argv: str) -> Options:
    return parse(Options, "try", "About it.", ["somewhere", *argv])


def test_every_option_has_the_type_of_its_field() -> None:
    assert read("--out", "x") == Options(draft="somewhere", out=Path("x"))
    argv = [
        "--out",
        "y",
        "--seed",
        "5",
        "--step",
        "7",
        "--dtype",
        "float32",
        "--name",
        "a",
        "b",
        "--give-up",
        "--fields",
    ]
    assert read(*argv, '{"a": 1}') == Options(
        draft="somewhere",
        out=Path("y"),
        seed=5,
        step=7,
        dtype="float32",
        names=["a", "b"],
        fields={"a": 1},
        give_up=True,
    )
    assert read("--out", "x", "--step", "best").step == "best"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --out"),
        (["--out", "x", "--seed", "1.5"], "argument --seed: Input should be a valid integer"),
        (["--out", "x", "--step", "worst"], "found 'worst'"),
        (["--out", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", "x", "--also", "c"], "invalid choice: 'c'"),
        (["--out", "x", "--day", "today"], "argument --day: must be a day as YYYY-MM-DD, found 'today' ("),
        (["--out", "x", "--fields", "[1]"], "argument --fields: Input should be a valid dictionary, found '[1]'"),
        (["--out", "x", "--fields", "{"], "argument --fields: Invalid JSON"),
        (["--out", "x", "--seed", "-1"], "--seed must not be negative"),
        (["--out", "x", "--unknown"], "error: there is no option --unknown (dflash_dist try --help lists all)"),
        (["--out", "x", "--sed", "3"], "there is no option --sed; did you mean --seed? ("),
        (["--oot=x"], "there is no option --oot; did you mean --out? ("),
    ],
)
def test_what_is_no_option_ends_the_program_as_a_mistake_of_use(capsys, argv, message) -> None:
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_help_says_every_option_with_its_default_and_group(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("usage: dflash_dist try [-h]") and "About it." in told
    for part in (
        "--seed SEED seed (default: 3)",
        "--dtype {float32,bfloat16} (default: bfloat16)",
        "100 % of it",
        "--also {a,b} a letter",
    ):
        assert part in told
    assert "to a server: --fields FIELDS an object --give-up a switch" in told


def test_overrides_may_stand_anywhere() -> None:
    options = parse(ConfigOptions, "try", None, ["a.b=1", "--config", "run.yaml", "c=2"])
    assert options == ConfigOptions(config="run.yaml", overrides=["a.b=1", "c=2"])


def test_a_knob_that_is_given_as_an_option_is_told_how_it_is_written(capsys) -> None:
    with pytest.raises(SystemExit):
        parse(ConfigOptions, "try", None, ["--config", "debug", "--lr", "1e-3"])
    assert "there is no option --lr; knobs are written train.lr=VALUE" in capsys.readouterr().err
