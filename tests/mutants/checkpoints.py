from __future__ import annotations

from tests.mutants import Mutant

CHECKPOINT, FILES = "dflash_dist/training/checkpoint.py", "dflash_dist/files.py"
WATCH, METRICS, LOGS = (f"dflash_dist/training/{name}.py" for name in ("watch", "metrics", "logs"))
TESTS, TEST_TRAINER = "tests/training/test_checkpoint.py", "tests/training/test_trainer.py"
TEST_WATCH, TEST_METRICS, TEST_LOGS = (f"tests/training/test_{name}.py" for name in ("watch", "metrics", "logs"))

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
    Mutant("a folder of the same step is replaced", CHECKPOINT, "_remove(final)", "pass", TESTS),
    Mutant("what a killed run left is no obstacle", CHECKPOINT, 'self.folder.glob(".step-*")', "()", TESTS),
    Mutant("written, synced, renamed", FILES, "os.fsync(descriptor)", "pass", TESTS),
    Mutant(
        "every file is synced",
        CHECKPOINT,
        "for path in (*partial.iterdir(), partial):",
        "for path in (partial,):",
        TESTS,
    ),
    Mutant(
        "the folder is synced, too",
        CHECKPOINT,
        "for path in (*partial.iterdir(), partial):",
        "for path in partial.iterdir():",
        TESTS,
    ),
    Mutant(
        "the new name is on the disk before the old one goes", CHECKPOINT, "            sync(self.folder)\n", "", TESTS
    ),
    Mutant(
        "synced before it is renamed",
        CHECKPOINT,
        "            _remove(final)",
        "            os.fsync = lambda _: None\n            _remove(final)",
        TESTS,
    ),
    Mutant(
        "deleting renames first",
        CHECKPOINT,
        "        folder.rename(gone)\n        shutil.rmtree(gone)",
        "        shutil.rmtree(folder)",
        TESTS,
    ),
    Mutant(
        "a failed write leaves no half of a checkpoint",
        CHECKPOINT,
        "shutil.rmtree(partial, ignore_errors=True)  # a",
        "pass  # a",
        TESTS,
    ),
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
    Mutant("best is a link that follows", CHECKPOINT, "_link(self.folder / BEST, folders[best].name)", "pass", TESTS),
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
        "    if refused:\n",
        "    if False:\n",
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
    Mutant("a step's time is its own", WATCH, "/ (result.step - self.clock_step)", "/ 1", TEST_WATCH),
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
    Mutant("other ranks are silent", LOGS, "echo=rank == 0)", "echo=True)", TEST_LOGS),
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
        "    except OSError:\n        pass\n",
        "    except KeyError:\n        pass\n",
        TEST_LOGS,
    ),
]
