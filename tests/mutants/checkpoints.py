from __future__ import annotations

from tests.mutants import Mutant

CHECKPOINT, FILES = "dflash_dist/training/checkpoint.py", "dflash_dist/files.py"
TEST_FILES = "tests/test_files.py"
WATCH, METRICS = (f"dflash_dist/training/{name}.py" for name in ("watch", "metrics"))
LOGS, TEST_LOGS = "dflash_dist/logs.py", "tests/test_logs.py"
TESTS, TEST_TRAINER = "tests/training/test_checkpoint.py", "tests/training/test_trainer.py"
TEST_WATCH, TEST_METRICS = (f"tests/training/test_{name}.py" for name in ("watch", "metrics"))

MUTANTS = [
    Mutant(
        "a failed write is forgotten once a later one succeeds",
        CHECKPOINT,
        "        self._failure = None\n        tensors",
        "        tensors",
        TESTS,
    ),
    Mutant(
        "if the last write fails, the run ends with an error",
        CHECKPOINT,
        "if self._failure is not None:",
        "if False:",
        TESTS,
    ),
    Mutant("what a killed run left is no obstacle", CHECKPOINT, "remove_leftovers(self.folder)", "pass", TESTS),
    Mutant(
        "deleting renames first",
        CHECKPOINT,
        "remove_folder(folders[other])",
        '__import__("shutil").rmtree(folders[other])',
        TESTS,
    ),
    # ------------------------------------------------------------------------------------------- whole or absent
    Mutant("the umask says who may read", FILES, "if partial.is_dir():\n", "if False:\n", TEST_FILES),
    Mutant("written, synced, renamed", FILES, "os.fsync(descriptor)", "pass", f"{TEST_FILES} {TESTS}"),
    Mutant("every file is synced", FILES, '(*partial.rglob("*"), partial)', "[partial]", f"{TEST_FILES} {TESTS}"),
    Mutant(
        "the folder is synced, too",
        FILES,
        '(*partial.rglob("*"), partial)',
        'partial.rglob("*")',
        f"{TEST_FILES} {TESTS}",
    ),
    Mutant("the new name is on the disk before the old one goes", FILES, "    sync(path.parent)\n", "", TESTS),
    Mutant(
        "synced before it is renamed",
        FILES,
        "    try:\n        yield partial\n",
        "    try:\n        yield partial\n        partial.rename(path)\n        partial = path\n",
        f"{TEST_FILES} {TESTS}",
    ),
    Mutant(
        "a folder of the same step is replaced",
        FILES,
        "            remove_folder(path)\n",
        "            pass\n",
        f"{TEST_FILES} {TESTS}",
    ),
    Mutant(
        "a link is there at every moment",
        FILES,
        "path.is_dir() and not path.is_symlink():\n            remove",
        "path.is_dir():\n            path.unlink() if path.is_symlink() else remove",
        TEST_FILES,
    ),
    Mutant(
        "what is being removed has no name",
        FILES,
        "    path.rename(partial)\n    shutil.rmtree(partial)",
        "    shutil.rmtree(path)",
        f"{TEST_FILES} {TESTS}",
    ),
    Mutant(
        "a failed write leaves nothing",
        FILES,
        "        _discard(partial)  # a full",
        "        pass  # a full",
        f"{TEST_FILES} {TESTS}",
    ),
    Mutant("writers at once do not disturb each other", FILES, ".{uuid.uuid4().hex[:8]}", "", TEST_FILES),
    Mutant("only what has the name is taken away", FILES, "if name in leftover.name:", "if True:", TEST_FILES),
    # ------------------------------------------------------------------------------------------------ one process
    Mutant(
        "a lock is held by one", FILES, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", TEST_FILES
    ),
    Mutant("a lock names its holder now", FILES, "        lock.truncate(0)\n", "", TEST_FILES),
    # ---------------------------------------------------------------------------------------------------- one run
    Mutant(
        "what only one run has differs",
        FILES,
        "for key in before | now:",
        "for key in before.keys() & now.keys():",
        TEST_FILES,
    ),
    Mutant("another run is refused", FILES, 'if listed := "; ".join(changed):', "if False:", TEST_FILES),
    # ------------------------------------------------------------------------------------------------ checkpoints
    Mutant(
        "training goes on while it is written: weights",
        CHECKPOINT,
        '{name: tensor.detach().to("cpu", copy=True)',
        "{name: tensor.detach()",
        TESTS,
    ),
    Mutant(
        "training goes on while it is written: moments",
        CHECKPOINT,
        'return tree.detach().to("cpu", copy=True)',
        "return tree.detach()",
        TESTS,
    ),
    Mutant(
        "checksums tell what happened to a file",
        CHECKPOINT,
        "if _checksum(folder / name) != checksums[name]:",
        "if False:",
        TESTS,
    ),
    Mutant(
        "a checksum is of the whole file",
        CHECKPOINT,
        "while piece := file.read(1 << 24):",
        "if piece := file.read(1 << 10):",
        TESTS,
    ),
    Mutant("checkpoint.keep", CHECKPOINT, "[-self.keep :]", "[-1:]", TESTS),
    Mutant("newer ones that are damaged do not count as kept", CHECKPOINT, "if at <= step]", "]", TESTS),
    Mutant("the best is never pruned", CHECKPOINT, "kept.append(best)", "pass", TESTS),
    Mutant("best is a link that follows", CHECKPOINT, "link.symlink_to(folders[best].name)", "pass", TESTS),
    Mutant("the best so far, not of what was cut away", CHECKPOINT, "if step <= up_to and", "if", TESTS),
    Mutant("the newest of equals is the best", CHECKPOINT, "(measured[step], step)", "(measured[step], -step)", TESTS),
    Mutant("as good as the best is the best", CHECKPOINT, "tau >= read_state", "tau > read_state", TESTS),
    Mutant(
        "the optimiser's state is resumed",
        CHECKPOINT,
        "        optimizer.load_state_dict(",
        "        str(",
        TESTS,
    ),
    Mutant(
        "a changed run is refused by name",
        "dflash_dist/training/identity.py",
        "        refused,\n",
        "        [],\n",
        "tests/training/test_identity.py",
    ),
    # ------------------------------------------------------------------------------------------- what a run shows
    Mutant(
        "validation does not count as training",
        WATCH,
        '        self.clock += seconds\n        if self.log is not None:\n            slots = {f"val',
        '        if self.log is not None:\n            slots = {f"val',
        TEST_WATCH,
    ),
    Mutant(
        "nor does real decoding",
        WATCH,
        '        self.clock += seconds\n        if self.log is not None:\n            slots = {f"eval',
        '        if self.log is not None:\n            slots = {f"eval',
        TEST_WATCH,
    ),
    Mutant(
        "a gradient that is not finite stops the run", WATCH, "if not math.isfinite(norm):", "if False:", TEST_WATCH
    ),
    Mutant("also after the last step", WATCH, "step % every == 0 or step == last", "step % every == 0", TEST_WATCH),
    Mutant(
        "logged losses are over all ranks",
        WATCH,
        "Statistics.read(result.sums.reduced(self.world.sum_tensor))",
        "Statistics.read(result.sums)",
        f"{TEST_TRAINER}::test_a_run_of_two_ranks_resumes_on_one",
    ),
    Mutant("a step's time is its own", WATCH, "steps = result.step - self.clock_step", "steps = 1", TEST_WATCH),
    Mutant(
        "only the steps to log are logged",
        WATCH,
        "if not due(result.step, self.config.log.every, self.total_steps):",
        "if False:",
        TEST_WATCH,
    ),
    Mutant("each step is logged once", METRICS, '["step"] <= step', '["step"] <= step + 1', TEST_METRICS),
    Mutant("no step is lost", METRICS, '["step"] <= step', '["step"] < step', TEST_METRICS),
    Mutant("the curves are cut back, too", METRICS, "purge_step=step + 1", "purge_step=None", TEST_METRICS),
    Mutant("a run that starts over leaves nothing of the old one", METRICS, "if step == 0:", "if False:", TEST_METRICS),
    Mutant(
        "lines wait until there is room",
        METRICS,
        "self._waiting += json.dumps",
        "self._waiting = json.dumps",
        TEST_METRICS,
    ),
    Mutant(
        "a line that was cut short is dropped",
        METRICS,
        "except (ValueError, TypeError, LookupError):",
        "except (TypeError, LookupError):",
        TEST_METRICS,
    ),
    Mutant("the config is shown", METRICS, 'add_text("config"', 'add_text("c"', TEST_METRICS),
    Mutant("logs hold all starts of a run", LOGS, '.open("ab", buffering=0)', '.open("wb", buffering=0)', TEST_LOGS),
    Mutant("an exception is in the log", LOGS, "            _put(log, traceback.format_exc())\n", "", TEST_LOGS),
    Mutant(
        "a line that is drawn over is left out", LOGS, 'self.line[self.line.rfind("\\r") + 1 :]', "self.line", TEST_LOGS
    ),
    Mutant("other ranks are silent", LOGS, "echo=rank == 0,", "echo=True,", TEST_LOGS),
    Mutant(
        "what is printed stays above a terminal's last line",
        LOGS,
        "            self._erase()\n            yield\n",
        "            yield\n",
        TEST_LOGS,
    ),
    Mutant(
        "native output of other ranks is in their files",
        LOGS,
        "_descriptors_to(log) if rank else",
        "_descriptors_to(log) if rank > 9 else",
        TEST_LOGS,
    ),
    Mutant(
        "a full disk does not end what prints",
        LOGS,
        "    with contextlib.suppress(OSError):\n        yield\n\n\n@contextlib.contextmanager\ndef _descriptors_to",
        "    with contextlib.suppress(KeyError):\n        yield\n\n\n@contextlib.contextmanager\ndef _descriptors_to",
        TEST_LOGS,
    ),
]
