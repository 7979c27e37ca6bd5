"""Every rank has its log file; the terminal shows rank 0 and what ends any of them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_dist.logs import LOGS, QUIET, keep_logs, say_phase, show_status
from tests.conftest import REPOSITORY

PRINTS = """
import os, sys
from pathlib import Path
from dflash_dist.logs import keep_logs
with keep_logs(Path(sys.argv[1])):
    print("from Python")
    print("a warning", file=sys.stderr)
    os.system("echo from outside Python")
    print("for the user", file=sys.__stderr__)
    raise KeyError("unexpected")
"""


def rank(number: int, *command: str, **environment: str) -> tuple[str, str]:
    """What a rank that fails prints to stdout and to stderr."""
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"RANK": str(number), "WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)} | environment,
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    return done.stdout, done.stderr


def test_another_rank_is_silent_until_it_fails(tmp_path: Path) -> None:
    out, err = rank(1, "-c", PRINTS, str(tmp_path), TORCHELASTIC_RESTART_COUNT="2")
    assert out == ""
    assert err.startswith("for the user\nTraceback") and err.endswith("KeyError: 'unexpected'\n")
    header, *lines = (tmp_path / LOGS / "rank-1.log").read_text().splitlines()
    assert " rank 1 of 2, attempt 3, process " in header
    assert lines[:3] == ["from Python", "a warning", "from outside Python"]
    assert lines[3].startswith("Traceback") and lines[-1] == "KeyError: 'unexpected'"


def test_rank_0_prints_to_both(tmp_path: Path) -> None:
    out, err = rank(0, "-c", PRINTS, str(tmp_path))
    assert sorted(out.splitlines()) == ["from Python", "from outside Python"]
    assert err.startswith("a warning\nfor the user\nTraceback") and err.endswith("KeyError: 'unexpected'\n")
    lines = (tmp_path / LOGS / "rank-0.log").read_text().splitlines()
    assert lines[1:3] == ["from Python", "a warning"] and lines[-1] == "KeyError: 'unexpected'"


def test_an_error_of_any_rank_reaches_the_terminal_and_torchruns_report(tmp_path: Path) -> None:
    report = tmp_path / "error.json"
    run = ["-m", "dflash_dist", "train", "--config", str(tmp_path / "none.yaml")]
    _, err = rank(1, *run, TORCHELASTIC_ERROR_FILE=str(report))
    message = f"error: config file {tmp_path / 'none.yaml'} does not exist"
    assert err.startswith(f"[rank 1] {message}; shipped are ")
    assert err == f"[rank 1] {json.loads(report.read_text())['message']['message']}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_starts_follow_each_other_and_what_is_drawn_over_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    drawn = ["\r 1%", "\r 2%", "\r\033[Ksaid", "\n", "\r 3%\033[K", "\r", "\n", "the e", "nd\n", "cut"]
    for _ in range(2):
        with keep_logs(tmp_path):
            assert sys.stderr.isatty()
            for text in drawn:
                sys.stderr.write(text)
    assert sys.stderr is terminal and terminal.getvalue() == "".join(drawn) * 2
    lines = (tmp_path / LOGS / "rank-0.log").read_text().splitlines()
    assert [line for line in lines if "attempt" not in line] == ["said", "", "the end"] * 2


def on_screen(written: str) -> list[str]:
    """The lines of a terminal after what was written to it."""
    return [line.rpartition("\r")[2].replace("\033[K", "") for line in written.split("\n")]


def test_the_last_line_of_a_terminal_says_what_is_done_and_what_is_printed_stays_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("COLUMNS", "24")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with keep_logs(tmp_path):
        say_phase("loading")
        show_status("step 1 of very, very many steps")
        print("said")
        assert on_screen(terminal.getvalue()) == ["said", "step 1 of very, very ma"], "never two lines"
        print("warned", file=sys.stderr)
        sys.stderr.write("\r 10%")  # the bar of a library has the line, until it is done
        show_status("step 2")
        assert on_screen(terminal.getvalue()) == ["said", "warned", " 10%"]
        sys.stderr.write("\r")
        assert on_screen(terminal.getvalue())[-1] == "step 2"
        sys.stderr.status.since -= QUIET + 1
        sys.stderr.status._draw()
        assert on_screen(terminal.getvalue())[-1] == f"step 2  ({QUIET + 1:.0f} s)"
    assert on_screen(terminal.getvalue()) == ["said", "warned", ""]
    _, *lines = (tmp_path / LOGS / "rank-0.log").read_text().splitlines()
    assert lines == ["loading", "said", "warned"]


def test_without_a_terminal_a_phase_is_a_line_and_a_status_nothing(tmp_path: Path, capsys) -> None:
    with keep_logs(tmp_path):
        say_phase("loading")
        show_status("step 1")
    assert capsys.readouterr().err == "loading\n"
    assert (tmp_path / LOGS / "rank-0.log").read_text().splitlines()[1:] == ["loading"]


def test_a_full_disk_does_not_end_what_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / LOGS).mkdir()
    (tmp_path / LOGS / "rank-0.log").symlink_to("/dev/full")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with keep_logs(tmp_path):
        print("goes on")
    assert terminal.getvalue() == "goes on\n"
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        monkeypatch.setattr(sys, "stdout", full)
        with keep_logs(tmp_path):
            print("goes on here too")


def test_a_terminal_that_is_gone_does_not_end_what_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(open(writer, "wb", buffering=0), write_through=True) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with keep_logs(tmp_path):
            print("still here")
    assert "still here" in (tmp_path / LOGS / "rank-0.log").read_text()
