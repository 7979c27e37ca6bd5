"""Errors of libraries as sentences: which are turned into one, which are shown, and which are not hidden."""

from __future__ import annotations

import signal
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dflash_dist.__main__ as program
from dflash_dist.__main__ import COMMANDS, main
from dflash_dist.reading import check_fields, damage, is_kind, parse, reading


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """Runs the program with a command that does `action`; returns the last words."""

    def start(action: Callable[[], object]) -> str:
        module = types.ModuleType("command")
        module.main = lambda argv: action()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "command", module)
        monkeypatch.setitem(COMMANDS, "check", ("command", ""))
        monkeypatch.setattr(sys, "argv", ["dflash_dist", "check"])
        with pytest.raises(SystemExit) as end:
            main()
        return str(end.value)

    return start


def failing(error: Exception) -> Callable[[], None]:
    """What a library does in the middle of reading."""

    def action() -> None:
        with reading("the model of m", "download it again"):
            raise error

    return action


def test_a_librarys_error_is_one_sentence_with_its_cause(run) -> None:
    words = run(failing(KeyError("nosuch")))
    assert words == "error: the model of m cannot be read (KeyError: 'nosuch'): download it again"
    words = run(failing(ImportError("needs optimum\n  `pip install optimum`")))
    assert words == (
        "error: the model of m needs a package that is missing here (ImportError: needs optimum `pip install optimum`):"
        " install it"
    )


def test_a_damaged_file_is_named_instead_of_what_the_library_made_of_it(tmp_path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{")
    named = pytest.raises(ValueError, match=f"^{tmp_path}/b.json is not JSON .*: again$")
    with named, reading("m", "again", lambda: sorted(tmp_path.iterdir())):
        raise AttributeError("'NoneType' object has no attribute 'get'")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_does_not_suffice_is_not_blamed_on_a_file(error) -> None:
    with pytest.raises(type(error)) as caught:
        failing(error)()
    assert caught.value is error


def test_a_full_disk_is_a_sentence_wherever_it_is_met(run) -> None:
    def fill() -> None:
        with open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"x")

    assert run(fill) == "error: [Errno 28] No space left on device"


@pytest.mark.parametrize("library_swallows", [False, True])
def test_ctrl_c_ends_a_command_with_a_sentence_and_the_usual_status(run, monkeypatch, capsys, library_swallows) -> None:
    def action() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            if library_swallows:
                raise AttributeError("partially initialized module") from error
            raise

    monkeypatch.setitem(program.KEPT, "check", "all answers stay")
    assert run(action) == "130" and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err == "\ninterrupted: all answers stay, and the same command goes on\n"


def test_what_each_command_keeps_is_said_of_a_command() -> None:
    assert program.KEPT.keys() <= COMMANDS.keys()


def test_a_librarys_error_that_nobody_expected_is_shown_whole(run) -> None:
    with pytest.raises(FileNotFoundError):
        run(lambda: Path("/nowhere/file").read_text())
    with pytest.raises(ValueError, match="Expecting value"):
        run(lambda: __import__("json").loads("x"))


def test_another_ranks_end_in_the_middle_of_loading_is_not_blamed_on_a_file(run, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    words = run(failing(RuntimeError("Connection closed by peer [127.0.0.1]")))
    assert words.startswith("[rank 1] ended because another rank did")


DAMAGE = {
    "model.safetensors": [(b"x" * 100, "is cut or damaged"), (b"version https://git-lfs", "is a Git LFS pointer")],
    "config.json": [(b"\xff", "is not JSON"), (b"", "is empty"), (b"[" * 99_999, "is not JSON"), (b"[]", None)],
    "notes.txt": [(b"anything", None)],
}


@pytest.mark.parametrize(("name", "content", "told"), [(n, *case) for n, cases in DAMAGE.items() for case in cases])
def test_what_is_wrong_with_a_file(tmp_path, name, content, told) -> None:
    (tmp_path / name).write_bytes(content)
    found = damage(tmp_path / name)
    assert found == told or found.startswith(told)
    assert damage(tmp_path / "gone") == "is not there"


def test_weights_that_torch_wrote_are_cut_where_their_end_is_missing(tmp_path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(9)}, file)
    assert zipfile.is_zipfile(file) and damage(file) is None
    file.write_bytes(file.read_bytes()[:-30])
    assert damage(file) == "is cut: its end is missing"


KINDS: list[tuple[Any, Any, bool]] = [
    (1, int, True),
    (True, int, False),
    (1.0, int, False),
    (2**63 - 1, int, True),
    (2**63, int, False),
    (10**30, float, False),
    (1, float, True),
    (float("nan"), float, False),
    (float("inf"), float, False),
    ("1", float, False),
    (None, str | None, True),
    (5, str | None, False),
    ([1, 2], list[int], True),
    ([1, "2"], list[int], False),
    ({"a": [1.5]}, dict[str, list[float]], True),
    ({"a": 1.5}, dict[str, list[float]], False),
    ("anything", Any, True),
    (1, bool, False),
]


@pytest.mark.parametrize(("value", "kind", "holds"), KINDS)
def test_kinds_of_values_from_json(value, kind, holds) -> None:
    assert is_kind(value, kind) is holds


def test_a_field_is_refused_by_its_name_value_and_kind() -> None:
    with pytest.raises(ValueError, match=r"^tau in state.json is '2', which is no float \| None: delete it$"):
        check_fields({"tau": "2"}, {"tau": float | None}, "state.json", "delete it")
    with pytest.raises(ValueError, match=r"^state\.json has no key 'step': delete it$"):
        check_fields({}, {"tau": float | None, "step": int}, "state.json", "delete it")


def test_json_that_is_nested_too_deeply_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse("[" * 99_999)
