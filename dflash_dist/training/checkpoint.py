"""Checkpoints that are whole or absent, written in the background.

Draft and optimiser are replicated, so rank 0 copies them to the host and a thread writes them: into a folder with
another name, synced to disk, then renamed. A folder with a step's name is therefore complete. It holds
    draft.safetensors   parameters, float32, with the published names
    optimizer.pt        AdamW's moments and step counts
    state.json          step, draft shape, what a resumed run must share, the checksums of the other files, and the
                        acceptance length that real decoding gave at this step, where it was measured
The one with the largest acceptance length stays, whatever its age, and the link `best` leads to it. A disk that fills
up, or a file that is damaged later, costs the checkpoint concerned and not the run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

from dflash_dist.files import remove_folder, remove_leftovers, whole
from dflash_dist.reading import check_fields, read_object, reading

STEP_FOLDER = re.compile(r"step-(\d{8})")
FILES = ("draft.safetensors", "optimizer.pt")
CHECKPOINTS, BEST = "checkpoints", "best"  # in the run folder, and in that
STATE = {
    "checksums": dict[str, str],
    "identity": dict[str, Any] | None,
    "shape": dict[str, Any] | None,
    "tau": float | None,
}


def step_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints that were written whole to a run's checkpoint folder, by step, oldest first."""
    found = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if match := STEP_FOLDER.fullmatch(path.name):
                found[int(match.group(1))] = path
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint since it was written; None where it is whole."""
    try:
        checksums = read_state(folder)["checksums"]
        for name in FILES:
            if _checksum(folder / name) != checksums[name]:
                return f"{name} is cut or damaged"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def newest_whole(folder: Path) -> int | None:
    """The newest step whose checkpoint is whole; says which newer ones are not."""
    for step, path in reversed(step_folders(folder).items()):
        problem = damage(path)
        if problem is None:
            return step
        print(f"{path} is not used: {problem}", flush=True)
    return None


def best_step(folder: Path, up_to: float = math.inf) -> int | None:
    """The step with the largest acceptance length in real decoding, of the checkpoints where that was measured; the
    newest of equals."""
    measured = {}
    for step, path in step_folders(folder).items():
        with contextlib.suppress(ValueError):  # damaged
            if step <= up_to and (tau := read_state(path).get("tau")) is not None:
                measured[step] = tau
    return max(measured, key=lambda step: (measured[step], step), default=None)


class Checkpoints:
    """Saves to and loads from one run's checkpoint folder, keeping the newest `keep` and the best."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, draft: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Copies everything to the host now and writes it in the background; waits for an earlier write first.

        A write that fails says so at once, and training goes on: the next one may succeed.
        """
        self._join()
        self._failure = None
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in draft.state_dict().items()}
        moments = _host_copy(optimizer.state_dict())
        self._writer = threading.Thread(target=self._write, args=(step, tensors, moments, {**state, "step": step}))
        self._writer.start()

    def would_be_best(self, tau: float) -> bool:
        """Whether no checkpoint has a larger acceptance length; waits for one that is being written."""
        self._join()
        best = best_step(self.folder)
        return best is None or tau >= read_state(step_folders(self.folder)[best])["tau"]

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
            RuntimeError: the last write failed.
        """
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise RuntimeError(f"the last checkpoint could not be written to {self.folder}: {failure}") from failure

    close = wait

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def load(self, step: int, draft: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restores draft and optimiser in place, on any number of ranks."""
        folder = step_folders(self.folder)[step]
        with reading(f"the checkpoint {folder}", "go on with the versions of torch and of this program that wrote it"):
            draft.load_state_dict(load_file(folder / "draft.safetensors"))
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))

    def _write(self, step: int, tensors: dict[str, torch.Tensor], moments: Any, state: dict[str, Any]) -> None:
        try:
            remove_leftovers(self.folder)  # of a run that was killed as it wrote or removed
            with whole(self.folder / f"step-{step:08d}") as folder:  # it is there if a run was cut back to before it
                folder.mkdir()
                save_file(tensors, folder / "draft.safetensors")
                with (folder / "optimizer.pt").open("wb") as file:
                    torch.save(moments, file)
                state = state | {"checksums": {name: _checksum(folder / name) for name in FILES}}
                (folder / "state.json").write_text(json.dumps(state, indent=2))
            folders = step_folders(self.folder)
            # Newer ones are damaged, or the run would have gone on from them: they must not count as kept.
            kept = [at for at in folders if at <= step][-self.keep :]
            if (best := best_step(self.folder, up_to=step)) is not None:
                with whole(self.folder / BEST) as link:
                    link.symlink_to(folders[best].name)
                kept.append(best)
            for other in folders.keys() - kept:
                remove_folder(folders[other])
        except BaseException as error:  # a thread's exception would vanish: wait() raises it
            self._failure = error.__context__ or error  # a full disk; torch.save hides it behind a position in a file
            newest = max(step_folders(self.folder), default=None)
            last = "there is none yet" if newest is None else f"the last one is of step {newest}"
            print(f"CHECKPOINT OF STEP {step} NOT WRITTEN to {self.folder}: {self._failure}; {last}", flush=True)


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: its state.json is missing or damaged.
    """
    file, advice = folder / "state.json", "delete this checkpoint, and take another"
    state = read_object(file, advice)
    check_fields(state, STATE, str(file), advice)
    check_fields(state["checksums"], dict.fromkeys(FILES, str), f"checksums of {file}", advice)
    return state


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            state.update(piece)
    return state.hexdigest()


def _host_copy(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _host_copy(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_host_copy(value) for value in tree]
    return copy.copy(tree)
