from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_dist import files
from dflash_dist.config import TrainConfig
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.training import checkpoint
from dflash_dist.training.checkpoint import (
    Checkpoints,
    best_step,
    damage,
    newest_whole,
    read_state,
    step_folders,
)
from dflash_dist.training.optim import apply_update, make_optimizer
from tests.disk import watch_disk
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


def test_what_is_loaded_is_what_was_saved_bitwise(tmp_path: Path, monkeypatch) -> None:
    changed = threading.Event()
    monkeypatch.setattr(checkpoint, "save_file", lambda *given: (changed.wait(), save_file(*given)))
    checkpoints = Checkpoints(tmp_path, keep=2)
    draft, optimizer = trained()
    saved = everything(draft, optimizer)
    checkpoints.save(7, draft, optimizer, {"identity": {"seed": 1}})
    with torch.no_grad():  # training goes on while the thread writes
        for tensor in (*draft.parameters(), *(value for of in optimizer.state.values() for value in of.values())):
            tensor.zero_()
    changed.set()
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


@pytest.mark.parametrize(("where", "breaks"), [(checkpoint, "save_file"), (files, "sync")])
def test_a_failed_write_leaves_the_previous_checkpoint_and_is_reported(
    tmp_path, monkeypatch, where, breaks, capsys
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, *trained(), {})
    checkpoints.wait()

    def fail(*args) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(where, breaks, fail)
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


def test_a_failure_is_forgotten_once_a_later_write_succeeds(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *_: os.stat("/no/space/left"))
        checkpoints.save(1, *trained(), {})
        checkpoints._join()
    checkpoints.save(2, *trained(), {})
    checkpoints.wait()
    assert newest_whole(tmp_path) == 2


def test_a_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    """Of a run that was cut back to before it, since it was damaged."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(4, *trained(), {})
    checkpoints.wait()
    cut(tmp_path / "step-00000004/draft.safetensors")
    draft, optimizer = trained(seed=1)
    checkpoints.save(4, draft, optimizer, {})
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"] and newest_whole(tmp_path) == 4
    assert torch.equal(load_file(tmp_path / "step-00000004/draft.safetensors")["fc.weight"], draft.fc.weight)


def test_all_is_on_the_disk_before_the_name_and_the_name_before_the_last_one_goes(tmp_path: Path, monkeypatch) -> None:
    disk = watch_disk(monkeypatch)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        disk.clear()
        checkpoints.save(step, *trained(), {})
        checkpoints.wait()
    new, old = "step-00000002", "step-00000001"
    files = sorted(path.name for path in (tmp_path / new).iterdir())
    assert files == ["draft.safetensors", "optimizer.pt", "state.json"]
    named = disk.index(("rename", f".{new}.partial", new))
    synced = {event[1:] for event in disk[:named] if event[0] == "sync"}
    assert synced == {
        *((name, str((tmp_path / new / name).stat().st_size)) for name in files),
        (f".{new}.partial", " ".join(files)),
    }
    assert disk[named + 1] == ("sync", tmp_path.name, f"{old} {new}"), "the folder of the names, with the new one"
    assert disk[named + 2] == ("rename", old, f".{old}.partial")
    assert sorted(disk[named + 3 :]) == [("remove", name) for name in files]


def test_a_checkpoint_that_is_cut_off_while_it_is_removed_has_no_name(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, *trained(), {})
    checkpoints.wait()
    unlink = os.unlink

    def dies(path: Any, **options: Any) -> None:
        unlink(path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", dies)
    checkpoints.save(2, *trained(), {})
    checkpoints._join()
    assert {step: damage(folder) for step, folder in step_folders(tmp_path).items()} == {2: None}


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
