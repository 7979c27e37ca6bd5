from __future__ import annotations

import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dflash_dist.answers.parts import Parts
from dflash_dist.export.export import main as export
from dflash_dist.files import differences, locked, refuse_changed, remove_folder, remove_leftovers, whole, writing
from tests.disk import watch_disk
from tests.export.test_export import save_run
from tests.target.test_features import make as make_features


def write_folder(path: Path, text: str = "new") -> None:
    (path / "within").mkdir(parents=True)
    for name in ("a", "within/b"):
        (path / name).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ whole or absent


def test_a_file_gets_its_name_once_it_is_on_the_disk_and_replaces_the_old_one_at_once(tmp_path, monkeypatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    disk = watch_disk(monkeypatch)
    with whole(path) as partial:
        partial.write_text("longer")
        assert path.read_text() == "old"
    assert path.read_text() == "longer"
    assert disk == [
        ("sync", ".report.json.partial", "6"),
        ("rename", ".report.json.partial", "report.json"),
        ("sync", tmp_path.name, "report.json"),
    ]


def test_a_folder_gets_its_name_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch) -> None:
    disk = watch_disk(monkeypatch)
    with whole(tmp_path / "model") as partial:
        write_folder(partial)
    partial_name = ".model.partial"
    named = disk.index(("rename", partial_name, "model"))
    assert set(disk[:named]) == {
        ("sync", "a", "3"),
        ("sync", "b", "3"),
        ("sync", "within", "b"),
        ("sync", partial_name, "a within"),
    }
    assert disk[named + 1 :] == [("sync", tmp_path.name, "model")]


def test_an_older_folder_loses_its_name_whole(tmp_path, monkeypatch) -> None:
    write_folder(tmp_path / "model", "old")
    disk = watch_disk(monkeypatch)
    with whole(tmp_path / "model") as partial:
        write_folder(partial)
    assert (tmp_path / "model/a").read_text() == "new" and names(tmp_path) == ["model"]
    removed, named = (disk.index(("rename", *of)) for of in (("model", ".model.partial"), (".model.partial", "model")))
    assert removed < disk.index(("remove", "a")) < named


def test_a_link_is_changed_and_there_at_every_moment(tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / name, name)
    disk = watch_disk(monkeypatch)
    for name in ("one", "two"):
        with whole(tmp_path / "best") as partial:
            partial.symlink_to(name)
        assert (tmp_path / "best/a").read_text() == name
    assert {event[0] for event in disk} == {"rename", "sync"}, "nothing is removed"
    assert (tmp_path / "one/a").read_text() == "one"


@pytest.mark.parametrize("write", [Path.touch, write_folder])
def test_what_fails_leaves_nothing_and_the_old_one_stays(tmp_path, write) -> None:
    write(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "x") as partial:
        write(partial)
        raise KeyboardInterrupt
    assert names(tmp_path) == ["x"]


def test_who_writes_at_once_does_not_disturb_another(tmp_path) -> None:
    with whole(tmp_path / "x") as slow:
        slow.write_text("slow")
        with whole(tmp_path / "x") as fast:
            fast.write_text("fast")
        assert (tmp_path / "x").read_text() == "fast"
    assert (tmp_path / "x").read_text() == "slow" and names(tmp_path) == ["x"]


def test_what_a_killed_process_left_is_taken_away_by_name(tmp_path) -> None:
    for name in ("one", "two"):
        pid = os.fork()
        if pid == 0:
            with whole(tmp_path / name) as partial:
                write_folder(partial)
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
    (tmp_path / "one.0123abcd.partial").write_text("as older versions named it")
    (tmp_path / "three").mkdir()
    assert len(names(tmp_path)) == 4
    remove_leftovers(tmp_path, "one")
    assert [name[:5] for name in names(tmp_path)] == [".two.", "three"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["three"]


def test_a_folder_that_is_cut_off_while_it_is_removed_has_no_name(tmp_path, monkeypatch) -> None:
    write_folder(tmp_path / "step")
    unlink = os.unlink

    def dies(path, **options) -> None:
        unlink(path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", dies)
        remove_folder(tmp_path / "step")
    assert not (tmp_path / "step").exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_says_who_may_read_what_is_written(tmp_path, umask) -> None:
    before = os.umask(umask)
    try:
        save_run(tmp_path / "run", [4])
        export(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
        make_features(tmp_path / "features")
        parts = Parts(tmp_path / "answers/answers.jsonl", {"target": "t"})
        with parts.append(0) as append:
            append({"row": 1, "messages": []})
        parts.merge([1])
        with whole(tmp_path / "model") as folder:
            folder.mkdir()
            save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 3 + 2 + 4 + 5 + 2 + 1 and set(modes.values()) == {0o666 & ~umask}, modes


def test_a_full_disk_is_named_with_what_to_do() -> None:
    said = r"^the cache cannot be written \(.* on device\): set data\.cache_dir$"
    with pytest.raises(ValueError, match=said), writing("the cache", "set data.cache_dir"):
        Path("/dev/full").write_text("x")


# ------------------------------------------------------------------------------------------------ one process


def hold(path: Path, held, release) -> None:
    with locked(path):
        held.set()
        release.wait()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_names_its_holder_and_falls_with_it(tmp_path) -> None:
    forks = multiprocessing.get_context("fork")
    held, release, told = forks.Event(), forks.Event(), []
    holder = forks.Process(target=hold, args=(tmp_path / "new/.lock", held, release))
    holder.start()
    held.wait()

    def refuse(by: str) -> None:
        raise ValueError(by)

    with pytest.raises(ValueError, match=f"^process {holder.pid} on "), locked(tmp_path / "new/.lock", refuse):
        pass
    with locked(tmp_path / "new/.lock", lambda by: (told.append(by), release.set())):  # waits
        holder.join()
    assert [text.split()[1] for text in told] == [str(holder.pid)] and holder.exitcode == -signal.SIGKILL
    assert (tmp_path / "new/.lock").read_text().startswith(f"process {os.getpid()} on "), "and no longer the old one"
    with locked(tmp_path / "new/.lock", refuse):
        pass


# ------------------------------------------------------------------------------------------------ one run


def test_differences_are_named_down_to_the_value() -> None:
    before = {"target": "a", "shape": {"layers": 2, "ids": [1]}, "args": {"x": 1}, "gone": 0, "same": {"y": 1}}
    now = {"target": "a", "shape": {"layers": 3, "ids": [1, 2]}, "args": {"x": 2}, "same": {"y": 1}, "new": "n"}
    assert list(differences(before, now, undivided=["args"])) == [
        "shape.layers: 2 -> 3",
        "shape.ids: [1] -> [1, 2]",
        "args: {'x': 1} -> {'x': 2}",
        "gone: 0 -> None",
        "new: None -> 'n'",
    ]
    assert not list(differences(before, before))


def test_another_run_is_refused_with_all_that_differs() -> None:
    refuse_changed("out is of another run", [], "delete it")
    with pytest.raises(ValueError) as refusal:
        refuse_changed("out is of another run", differences({"a": 1, "b": 2}, {"a": 2, "b": 1}), "delete it")
    assert str(refusal.value) == "out is of another run. Changed: a: 1 -> 2; b: 2 -> 1. Restore these, or delete it"
