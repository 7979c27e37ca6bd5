from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dflash_dist.config import TrainConfig
from dflash_dist.draft.model import DFlashDraftModel
from dflash_dist.training import checkpoint
from dflash_dist.training.checkpoint import (
    Checkpoints,
    best_step,
    newest_whole,
    read_state,
    step_folders,
)
from dflash_dist.training.optim import apply_update, make_optimizer
from tests.tiny import tiny_shape


def trained(seed: int = 0):
    torch.manual_seed(seed)
    draft = DFlashDraftModel(tiny_shape())
    optimizer = make_optimizer(draft, TrainConfig())
    for parameter in draft.parameters():
        parameter.grad = torch.randn_like(parameter)
    apply_update(optimizer, 1e-3, 1.0)
    return draft, optimizer


def everything(draft, optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*draft.state_dict().values(), *moments)]


def test_what_is_loaded_is_what_was_saved_bitwise(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    draft, optimizer = trained()
    saved = everything(draft, optimizer)
    checkpoints.save(7, draft, optimizer, {"identity": {"seed": 1}})
    with torch.no_grad():  # training goes on while the thread writes
        for parameter in draft.parameters():
            parameter.zero_()
    checkpoints.wait()
    other, other_optimizer = trained(seed=1)
    checkpoints.load(7, other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(saved, everything(other, other_optimizer), strict=True))
    assert read_state(step_folders(tmp_path)[7]).items() >= {"identity": {"seed": 1}, "step": 7}.items()
    assert all(parameter.dtype == torch.float32 for parameter in other.parameters())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(step, *trained(), {})
    checkpoints.wait()
    assert list(step_folders(tmp_path)) == [10, 15]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_that_is_used(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (2, 4):
        checkpoints.save(step, *trained(), {})
        checkpoints.wait()
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000008")
    cut(tmp_path / "step-00000008/draft.safetensors")
    (tmp_path / ".step-00000006.partial").mkdir()  # of a run that was killed
    checkpoints.save(6, *trained(), {})
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]
    assert newest_whole(tmp_path) == 6


def save(checkpoints: Checkpoints, *measured: tuple[int, float | None]) -> None:
    for step, tau in measured:
        checkpoints.save(step, *trained(), {"tau": tau})
        checkpoints.wait()


def test_the_best_is_kept_and_linked_however_old_it_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert best_step(tmp_path) is None and checkpoints.would_be_best(1.0)
    save(checkpoints, (5, None))
    assert not (tmp_path / "best").exists()
    save(checkpoints, (10, 2.5), (15, 2.0), (20, None))
    assert list(step_folders(tmp_path)) == [10, 20] and (tmp_path / "best").readlink() == Path("step-00000010")
    assert [checkpoints.would_be_best(tau) for tau in (2.4, 2.5, 2.6)] == [False, True, True]
    save(checkpoints, (25, 2.5))
    assert list(step_folders(tmp_path)) == [25] and read_state(tmp_path / "best")["step"] == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000025"]


def test_a_run_that_goes_on_from_before_its_best_finds_a_best_of_its_own(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, (5, 2.0), (10, 3.0))
    cut(tmp_path / "step-00000010/draft.safetensors")
    assert newest_whole(tmp_path) == 5
    save(checkpoints, (6, 1.5))
    assert list(step_folders(tmp_path)) == [5, 6] and read_state(tmp_path / "best")["step"] == 5


@pytest.mark.parametrize("breaks", ["save_file", "sync"])
def test_a_failed_write_leaves_the_previous_checkpoint_and_is_reported(tmp_path, monkeypatch, breaks, capsys) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, *trained(), {})
    checkpoints.wait()

    def fail(*args) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, breaks, fail)
    checkpoints.save(2, *trained(), {})
    checkpoints.save(2, *trained(), {})  # training goes on after a write that failed
    with pytest.raises(RuntimeError, match=r"could not be written to .* no space left on device"):
        checkpoints.wait()
    assert list(step_folders(tmp_path)) == [1] and len(list(tmp_path.iterdir())) == 1
    assert "CHECKPOINT OF STEP 2 NOT WRITTEN" in (told := capsys.readouterr().out)
    assert "no space left on device; the last one is of step 1" in told
    monkeypatch.undo()
    checkpoints.save(2, *trained(), {})  # what the failed write left behind is no obstacle
    checkpoints.wait()
    assert list(step_folders(tmp_path)) == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["draft.safetensors", "optimizer.pt", "state.json"])
def test_the_newest_whole_checkpoint_is_found_and_the_damaged_one_named(tmp_path, capsys, harm, name) -> None:
    if (harm, name) == (flip, "state.json"):
        pytest.skip("one bit of JSON may be harmless")
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (4, 8):
        checkpoints.save(step, *trained(), {})
    checkpoints.wait()
    assert newest_whole(tmp_path) == 8
    harm(tmp_path / "step-00000008" / name)
    assert newest_whole(tmp_path) == 4
    assert "step-00000008 is not used: " in capsys.readouterr().out
    harm(tmp_path / "step-00000004" / name)
    assert newest_whole(tmp_path) is None
