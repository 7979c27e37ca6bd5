"""The program from outside: real processes, signals, torchrun, and what a user reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_dist.files import whole
from dflash_dist.training.step import TrainingStep
from dflash_dist.training.trainer import prepare
from tests.conftest import REPOSITORY
from tests.faulty import Fault, choose, line_of, struck

PROGRAM = [sys.executable, "-m", "dflash_dist"]
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TORCHRUN = [*RANKS, "-m", "dflash_dist"]
# Otherwise ranks that torchrun starts again may find the addresses of the dead ones, and fail to connect.
AFRESH = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


def start(command: list[str], *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *arguments],
        env=ENVIRONMENT,
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(command: list[str], *arguments: str, status: int = 0) -> str:
    process = start(command, *arguments)
    output, _ = process.communicate()
    assert process.returncode == status, output
    return output


def read_until(process: subprocess.Popen, text: str) -> None:
    """Blocks until the process prints a line with `text`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed:\n{''.join(seen)}")


def debug(folder: Path, *overrides: str) -> list[str]:
    short = ["train.max_steps=24", "log.every=1", "checkpoint.every=6", "validate.every=12"]
    return ["train", "--config", "configs/debug.yaml", f"output_dir={folder}", *short, *overrides]


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(PROGRAM, *debug(folder))
    return folder


def test_the_debug_preset_trains_exports_and_evaluates(undisturbed: Path, tmp_path: Path) -> None:
    assert [step for step, _ in losses(undisturbed)] == list(range(1, 25))
    assert (undisturbed / "config.yaml").is_file()
    assert json.loads((undisturbed / "versions.json").read_text()).keys() >= {"torch", "transformers", "dflash_dist"}
    said = (undisturbed / "logs/rank-0.log").read_text().splitlines()
    begin = said.index("loading the target") < said.index("ranks   1 x CPU, the draft computes in float32")
    assert begin and {
        "draft   dflash of 2 layers, 86,464 parameters, blocks of 8",
        "        the draft begins with random weights",
        "work    24 steps of 4 rows of 256 tokens: 23,104 tokens, 1.22 epochs of 79 rows",
        "mask    token 3, '<mask>', in none of 19,013 tokens of the data",
    } <= set(said)
    assert said[-1].startswith(f"next        python -m dflash_dist export --run {undisturbed} --out ")
    [target] = [line for line in said if line.startswith("target  ")]
    assert target.endswith(": 5 of 6 layers in float32; 0.77 MiB a rank, embedding and LM head included")
    finish(PROGRAM, "export", "--run", str(undisturbed), "--out", str(tmp_path / "draft"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "What is 1 plus 2?"}]}) + "\n")
    inputs = ["--target", str(undisturbed / "builtin/target"), "--draft", str(tmp_path / "draft")]
    options = ["--prompts", str(prompts), "--max-new-tokens", "24", "--json", str(tmp_path / "report.json")]
    output = finish(PROGRAM, "evaluate", *inputs, *options)
    assert ["equal", "outputs", "1", "of", "1"] in [line.split() for line in output.splitlines()]
    assert json.loads((tmp_path / "report.json").read_text())["lossless"] is True


def test_a_killed_run_continues_with_the_exact_losses_and_no_second_one_beside_it(
    undisturbed: Path, tmp_path: Path
) -> None:
    process = start(PROGRAM, *debug(tmp_path / "run"))
    read_until(process, "step 16/24")
    process.send_signal(signal.SIGSTOP)
    output = finish(PROGRAM, *debug(tmp_path / "run"), status=1)
    assert f"run is in use by process {process.pid} on " in output
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(losses(tmp_path / "run")) < 24
    assert "resuming from" in finish(PROGRAM, *debug(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_signal_saves_and_a_full_disk_or_a_damaged_file_costs_a_checkpoint_and_not_the_run(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(PROGRAM, *debug(folder, "checkpoint.every=1000"))
    read_until(process, "step 4/24")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.returncode == 0 and "start the same command again to continue" in output
    assert (folder / "PREEMPTED").exists()
    [saved] = (folder / "checkpoints").iterdir()

    no_file_above_4_kib = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash"]  # neither checkpoints, nor metrics, nor logs
    output = finish([*no_file_above_4_kib, *PROGRAM], *debug(folder), status=1)
    assert f"resuming from {saved}" in output
    assert "STEP 12 NOT YET LOGGED" in output
    assert "CHECKPOINT OF STEP 12 NOT WRITTEN" in output
    assert f"the last one is of step {int(saved.name.removeprefix('step-'))}" in output
    assert "step 24/24" in output, "training went on"
    assert output.splitlines()[-1].startswith("error: the last checkpoint could not be written")

    damaged = saved.with_name("step-00000020")
    shutil.copytree(saved, damaged)
    (damaged / "draft.safetensors").write_bytes((saved / "draft.safetensors").read_bytes()[:1000])
    output = finish(PROGRAM, *debug(folder))
    assert f"{damaged} is not used: draft.safetensors is cut or damaged" in output
    assert f"resuming from {saved}" in output
    assert not (folder / "PREEMPTED").exists()
    assert losses(folder) == losses(undisturbed)


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = finish(PROGRAM, *debug(tmp_path / "file/run"), status=1)
    assert output.startswith(f"error: output_dir {tmp_path / 'file/run'} cannot be written (")


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(TORCHRUN, *debug(folder))
    return folder


def test_torchrun_with_two_ranks_gives_the_same_run(undisturbed: Path, undisturbed_pair: Path) -> None:
    for (step, ours), (same, theirs) in zip(losses(undisturbed_pair), losses(undisturbed), strict=True):
        assert step == same and ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.long
def test_ranks_that_are_struck_come_back_with_the_exact_losses(undisturbed_pair: Path, tmp_path: Path) -> None:
    """As in tests/faults.py: a rank is killed as a checkpoint is about to get its name, and torchrun
    starts the ranks again; then both are stopped in the middle of a step, and the same command goes on."""
    kill = Fault("SIGKILL", "rank 0", "save", line_of(whole, "partial.rename(path)"), 2)
    stop = Fault("SIGTERM", "all ranks", "step", line_of(TrainingStep.run, "self.backward("), 3)
    choose(tmp_path, [kill, stop])
    command = [*AFRESH, *RANKS, "--max_restarts", "1", "-m", "tests.faulty", str(tmp_path)]
    folder = tmp_path / "run"
    output = finish(command, *debug(folder))
    assert "resuming from" in output and struck(tmp_path) == 2
    assert (folder / "PREEMPTED").exists() and len(losses(folder)) < 24
    assert "resuming from" in finish(command, *debug(folder))
    assert losses(folder) == losses(undisturbed_pair)
    last = "checkpoints/step-00000024"
    for file in (undisturbed_pair / last).iterdir():
        assert (folder / last / file.name).read_bytes() == file.read_bytes()


@pytest.mark.long
def test_slurms_signal_in_set_up_ends_all_ranks_as_a_run_that_is_to_go_on(tmp_path: Path) -> None:
    choose(tmp_path, [Fault("SIGUSR1", "all ranks", "start", line_of(prepare, "setup.check_target("), 1)])
    output = finish([*RANKS, "-m", "tests.faulty", str(tmp_path)], *debug(tmp_path / "run"))
    assert "stopped before the first step; start the same command again to continue" in output
    assert (tmp_path / "run/PREEMPTED").exists() and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_users_mistake_is_one_clear_line_before_anything_slow_is_imported(tmp_path: Path) -> None:
    without_torch = "import sys; sys.modules['torch'] = None; from dflash_dist.__main__ import main; main()"
    output = finish([sys.executable, "-c", without_torch], *debug(tmp_path), "train.max_step=3", status=1)
    assert (
        output == "error: override 'train.max_step=3': unknown key 'train.max_step'; did you mean 'train.max_steps'?\n"
    )


def test_help_names_every_command_and_every_knob() -> None:
    assert all(name in finish(PROGRAM) for name in ("train", "regenerate", "export", "evaluate", "demo"))
    assert "checkpoint.every = 500: steps between checkpoints" in finish(PROGRAM, "train", "--help")
    assert "unknown command 'trian'" in finish(PROGRAM, "trian", status=1)
