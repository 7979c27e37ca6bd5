"""Training from stored features is the training that runs the target, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dflash_dist.config import Config, load_config
from dflash_dist.prepare import capture as module
from dflash_dist.prepare.capture import agree_on_lacking, capture, share
from dflash_dist.ranks import World
from dflash_dist.target.features import FeatureFolder
from dflash_dist.target.load import load_ends, load_target, name_weights, read_info
from dflash_dist.target.run import LiveTarget
from dflash_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.ranks import run_ranks
from tests.tiny import target_of

ALONE = World(0, 1, torch.device("cpu"))
SHARD_MIB = 1.0  # 5 rows a shard in float32
SHORT = ("train.max_steps=6", "log.every=1", "validate.every=3", "checkpoint.every=3")
BF16 = ("target.dtype=bfloat16", "train.precision=bfloat16")


@pytest.fixture(scope="module")
def debug(tiny_target: Path) -> Callable[..., Config]:
    def load(folder: Path, *overrides: str) -> Config:
        # A micro-batch of 3 rows leaves both parts and the shards with a rest that padding fills up.
        sizes = ("train.global_batch_size=6", "train.micro_batch_size=3", "loss.anchors=16")
        ours = (f"output_dir={folder}", f"target.path={tiny_target}", *sizes, *SHORT)
        return load_config(REPOSITORY / "configs/debug.yaml", [*ours, *overrides])

    return load


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    """Every loss and accuracy that the run logged, exactly."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [tuple((k, v) for k, v in row.items() if k.startswith(("step", "train", "val", "optim"))) for row in rows]


def train(world: World, config: Config) -> None:
    Trainer(config, world).run()


def captured_by(world: World, config: Config, out: Path, shard_mib: float = SHARD_MIB) -> None:
    capture(config, out, world, shard_mib)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def features(debug, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Features of both dtypes, captured by one rank. Tests that change them copy the folder."""
    folder = tmp_path_factory.mktemp("features")
    captured_by(ALONE, debug(folder / "run"), folder / "float32")
    captured_by(ALONE, debug(folder / "run", *BF16), folder / "bfloat16")
    return {"float32": folder / "float32", "bfloat16": folder / "bfloat16"}


@pytest.fixture
def stored(features: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(features["float32"], tmp_path / "stored"))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_are_bitwise_those_of_online_training(debug, features, tmp_path: Path, ranks: int, dtype: str) -> None:
    overrides = BF16 if dtype == "bfloat16" else ()
    online = debug(tmp_path / "online", *overrides)
    offline = debug(tmp_path / "offline", *overrides, f"target.features={features[dtype]}")
    for config in (online, offline):
        run_ranks(train, 2, config) if ranks == 2 else train(ALONE, config)
    assert numbers(tmp_path / "offline") == numbers(tmp_path / "online")
    assert len(numbers(tmp_path / "online")) == 6 + 3, "6 steps and 3 validations"


def test_rows_run_alone_are_bitwise_the_same_at_any_length(debug, tmp_path: Path) -> None:
    """With one row a micro-batch the target gets the very same tensors, whatever its kernels do."""
    alone = ("train.micro_batch_size=1", "data.seq_len=211", "train.max_steps=2", "validate.every=2")
    captured_by(ALONE, debug(tmp_path / "run", *alone), tmp_path / "features")
    train(ALONE, debug(tmp_path / "online", *alone))
    train(ALONE, debug(tmp_path / "offline", *alone, f"target.features={tmp_path / 'features'}"))
    assert numbers(tmp_path / "offline") == numbers(tmp_path / "online")


def test_the_target_is_not_loaded_and_the_bytes_are_said(debug, features, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("dflash_dist.training.context.load_target", lambda *args: pytest.fail("the target was loaded"))
    # Knobs of the target's sharding and depth have nothing to act on, not even 2 replicas on 1 rank.
    ignored = ("target.full_depth=true", "target.replicas=2", f"target.features={features['float32']}")
    Trainer(debug(tmp_path / "run", *ignored), ALONE)
    assert f"features: 15.92 MiB in {features['float32']}; the target is not run" in capsys.readouterr().out


def test_a_run_resumes_from_online_to_stored_features_and_back(debug, features, tmp_path: Path, capsys) -> None:
    train(ALONE, debug(tmp_path / "whole", "train.max_steps=9", "train.final_lr=1", "train.warmup=0"))
    offline = f"target.features={features['float32']}"
    for steps, source in ((3, ()), (6, (offline,)), (9, ())):
        constant = ("train.final_lr=1", "train.warmup=0", f"train.max_steps={steps}")
        train(ALONE, debug(tmp_path / "parts", *constant, *source))
        assert f"resuming from {tmp_path / 'parts/checkpoints/step'}" in capsys.readouterr().out or steps == 3
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("target.layer_ids=[1,2,3]", r"target\.layer_ids: \[1, 2, 4\] -> \[1, 2, 3\]"),
        ("target.dtype=bfloat16", r"target\.dtype: 'float32' -> 'bfloat16'"),
        ("data.seq_len=128", r"data\.seq_len: 256 -> 128; .*train fingerprint: "),
        ("data.val_conversations=31", r"train fingerprint: '\w+' -> '\w+'; held-out fingerprint: '\w+' -> '\w+'"),
        ("target.path={other}", r"target: 'weights \w+' -> 'weights \w+'"),
    ],
)
def test_features_of_something_else_are_refused_by_training_and_by_capture(
    debug, features, tiny_target: Path, tmp_path: Path, change: str, message: str
) -> None:
    weights = (tiny_target / "model.safetensors").read_bytes()
    other = Path(shutil.copytree(tiny_target, tmp_path / "other"))
    (other / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    folder = features["float32"]
    config = debug(tmp_path / "run", f"target.features={folder}", change.format(other=other))
    with pytest.raises(ValueError, match=f"holds features of something else. Changed: .*{message}"):
        Trainer(config, ALONE)
    before = contents(folder)
    with pytest.raises(ValueError, match=f"holds features of something else. Changed: .*{message}"):
        captured_by(ALONE, config, folder)
    assert contents(folder) == before


def test_the_same_target_in_another_folder_is_the_same(debug, features, tiny_target: Path, tmp_path: Path) -> None:
    moved = ("target.path=" + str(shutil.copytree(tiny_target, tmp_path / "moved")),)
    Trainer(debug(tmp_path / "run", *moved, f"target.features={features['float32']}"), ALONE)


def test_a_hub_target_is_named_by_its_commit(tiny_target: Path) -> None:
    info = dataclasses.replace(read_info(str(tiny_target)), path="org/model", revision="main")
    assert name_weights(info) == "org/model@main"
    info.config._commit_hash = "abc123"
    assert name_weights(info) == "org/model@abc123"


def test_a_damaged_row_stops_training_and_is_mended_by_capture(debug, stored: Path, tmp_path: Path) -> None:
    config = debug(tmp_path / "run", f"target.features={stored}")
    before = contents(stored)
    for name in before:
        if name.startswith("train"):
            (stored / name).write_bytes(before[name][:-1] + bytes([before[name][-1] ^ 1]))
    with pytest.raises(ValueError, match=r"train-\d{5}\.safetensors, row \d+, is damaged.* Delete this file and run"):
        for step in range(20):
            Trainer(config, ALONE).training.run(step)
    for name in before:
        if name.startswith("train"):
            (stored / name).unlink()
    with pytest.raises(ValueError, match=r"16 of 19 shards are missing or cut, such as train-00000\.safetensors, "):
        Trainer(config, ALONE)
    captured_by(ALONE, config, stored)
    assert contents(stored) == before


def test_a_cut_shard_is_refused_before_training_and_mended_by_capture(debug, stored: Path, tmp_path: Path) -> None:
    config = debug(tmp_path / "run", f"target.features={stored}")
    before = contents(stored)
    (stored / "held-out-00002.safetensors").write_bytes(before["held-out-00002.safetensors"][:-1])
    with pytest.raises(ValueError, match=r"1 of 19 shards are missing or cut, such as held-out-00002\.safetensors"):
        Trainer(config, ALONE)
    captured_by(ALONE, config, stored)
    assert contents(stored) == before


def test_without_features_the_command_is_named(debug, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no features: make them with `python -m dflash_dist capture`"):
        Trainer(debug(tmp_path / "run", f"target.features={tmp_path}"), ALONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding_and_head_are_those_of_the_loaded_target(tiny_target: Path, dtype: torch.dtype) -> None:
    info = read_info(str(tiny_target))
    whole = load_target(info, target_of([1], dtype), ALONE)
    ends = load_ends(info, dtype, ALONE.device)
    assert torch.equal(ends.embedding, whole.embedding) and torch.equal(ends.head, whole.head)
    assert ends.embedding.dtype == ends.head.dtype == dtype
    assert (ends.head is ends.embedding) == (whole.head is whole.embedding)


# ------------------------------------------------------------------------------------------------ capture


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_write_the_bytes_that_one_writes(debug, features, tmp_path: Path, dtype: str) -> None:
    config = debug(tmp_path / "run", *(BF16 if dtype == "bfloat16" else ()))
    run_ranks(captured_by, 2, config, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(features[dtype])


def test_the_forecast_is_what_was_written(features) -> None:
    for folder in features.values():
        files = sorted(folder.glob("*.safetensors"))
        written = sum(t.nbytes for file in files for t in load_file(file).values())
        assert written == json.loads((folder / "index.json").read_text())["bytes"]
        headers = sum(file.stat().st_size for file in files) - written
        assert 0 < headers < 0.01 * written


def test_a_capture_killed_by_the_system_keeps_its_shards_and_goes_on_with_other_ranks(
    debug, tiny_target, features, tmp_path: Path
) -> None:
    config = debug(tmp_path / "run")
    out = tmp_path / "killed"
    # The first process is killed as its 4th shard is half written.
    code = (
        "import os, signal, sys\n"
        "from dflash_dist.target import features\n"
        "from dflash_dist.prepare.capture import main\n"
        "write = features.write_safetensors\n"
        "def dies(path, rows, metadata):\n"
        "    write(path, rows, metadata)\n"
        "    if 'train-00003' in path.name:\n"
        "        os.truncate(path, 1000)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "features.write_safetensors = dies\n"
        "main(sys.argv[1:])\n"
    )
    sizes = ["train.global_batch_size=6", "train.micro_batch_size=3"]
    arguments = ["--config", "configs/debug.yaml", "--out", str(out), "--shard-mib", str(SHARD_MIB)]
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            *arguments,
            f"output_dir={tmp_path / 'run'}",
            f"target.path={tiny_target}",
            *sizes,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = {path: path.stat() for path in out.glob("*.safetensors")}
    assert [path.name for path in sorted(finished)] == [f"train-0000{i}.safetensors" for i in range(3)]
    assert len(list(out.glob("*.partial"))) == 1
    with pytest.raises(ValueError, match="16 of 19 shards are missing or cut"):
        Trainer(debug(tmp_path / "run", f"target.features={out}"), ALONE)

    run_ranks(captured_by, 2, config, out)
    assert contents(out) == contents(features["float32"]), "nothing partial is left either"
    for path, before in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_watchdog_expects_the_forwards_of_a_capture(debug, tmp_path: Path, monkeypatch) -> None:
    world, expected, of = World(0, 1, torch.device("cpu")), [], LiveTarget.run
    noted = lambda *args: (expected.append(world.activity.expects_progress), of(*args))[1]  # noqa: E731
    monkeypatch.setattr(LiveTarget, "run", noted)
    captured_by(world, debug(tmp_path / "run", "data.seq_len=1024"), tmp_path / "out")
    assert expected and all(expected) and not world.activity.expects_progress


def test_data_that_teaches_almost_nothing_is_not_captured(debug, tmp_path: Path, write_chats) -> None:
    chats = write_chats([("user", "q" * 210), ("assistant", "x")])
    config = debug(tmp_path / "run", f"data.path={chats}", "data.val_conversations=0", "validate.every=0")
    with pytest.raises(ValueError, match="supervised, under 1%"):
        captured_by(ALONE, config, tmp_path / "out")


def test_a_finished_capture_loads_nothing(debug, features, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(module, "load_probed", lambda *args: pytest.fail("the target was loaded"))
    captured_by(ALONE, debug(tmp_path / "run"), features["float32"])
    assert "0.00 MiB in 0 still to capture" in capsys.readouterr().out


def test_another_shard_size_is_refused(debug, features, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows per shard: 5 -> 10"):
        captured_by(ALONE, debug(tmp_path / "run"), features["float32"], 2 * SHARD_MIB)


def fails_together(world: World, config: Config, out: Path, free: int) -> str:
    """A capture on a disk with `free` bytes, as rank 0 sees it; the others believe in more."""
    usage = namedtuple("usage", "total used free")(2**40, 0, free if world.is_main else 2**40)
    module.shutil.disk_usage, original = (lambda _: usage), module.shutil.disk_usage
    module.load_probed, load = (lambda *args: pytest.fail("the target was loaded")), module.load_probed
    try:
        with pytest.raises(ValueError) as refusal:
            capture(config, out, world, SHARD_MIB)
    finally:
        module.shutil.disk_usage, module.load_probed = original, load
    return str(refusal.value)


def test_too_little_disk_is_refused_before_the_target_loads_on_all_ranks(debug, features, tmp_path: Path) -> None:
    needed = json.loads((features["float32"] / "index.json").read_text())["bytes"]
    for message in run_ranks(fails_together, 2, debug(tmp_path / "run"), tmp_path / "out", needed - 1):
        assert "the features take 15.92 MiB, but" in message and "choose another --out" in message


def capture_to_own_disk(world: World, config: Config, folder: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        capture(config, folder / str(world.rank), world, SHARD_MIB)
    return str(refusal.value)


def test_ranks_without_a_shared_disk_are_refused_together(debug, tmp_path: Path) -> None:
    for message in run_ranks(capture_to_own_disk, 2, debug(tmp_path / "run"), tmp_path):
        assert "only 1 of 2 ranks see" in message and "put --out on a shared disk" in message


def agreed(world: World, folder: Path) -> list[int]:
    """Rank 0 still sees nothing of shard 1, rank 1 nothing of shard 2."""
    features = FeatureFolder(folder, {"rows per shard": 1}, {"train": np.ones(4, int)}, 1, torch.float32)
    features.lacking = lambda: [features.shards[1 + world.rank], features.shards[3]]  # type: ignore[method-assign]
    return [shard.number for shard in agree_on_lacking(features, world)]


def test_what_one_rank_does_not_see_is_lacking_for_all(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    assert run_ranks(agreed, 2, tmp_path) == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(("shards", "ranks"), [(1, 3), (5, 2), (7, 3)])
def test_every_row_is_captured_once_in_as_many_forwards_on_every_rank(shards: int, ranks: int) -> None:
    lacking = [module.Shard("train", n, range(5 * n, 5 * n + 5 - n % 2)) for n in range(shards)]
    plans = [share(lacking, 2, World(rank, ranks, ALONE.device)) for rank in range(ranks)]
    assert len({len(plan) for plan in plans}) == 1
    rows = sorted(row for plan in plans for _, some in plan for row in some)
    assert rows == [row for shard in lacking for row in shard.rows]
