"""The run: builds what it needs, resumes, steps, validates, saves, and stops when asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dflash_dist.config import Config
from dflash_dist.data.rows import Data
from dflash_dist.logs import LOGS, say_phase, show_status
from dflash_dist.machine import say_slow_bfloat16
from dflash_dist.ranks import World, join_world
from dflash_dist.stopping import asked_to_stop
from dflash_dist.target.load import TargetInfo, expects_packing
from dflash_dist.target.run import LiveTarget
from dflash_dist.training import setup
from dflash_dist.training.acceptance import Evaluation, SharedTarget, find_prompts
from dflash_dist.training.checkpoint import CHECKPOINTS, Checkpoints, newest_whole, read_state, step_folders
from dflash_dist.training.context import make_target, open_features
from dflash_dist.training.identity import identity_of, refuse_another, refuse_changed_knobs
from dflash_dist.training.metrics import check_wandb
from dflash_dist.training.optim import describe_jump, gather_state, restore_hyperparameters
from dflash_dist.training.sampler import Sampler
from dflash_dist.training.step import TrainingStep
from dflash_dist.training.summary import describe_begin, describe_end, describe_mask_token, describe_steps
from dflash_dist.training.watch import Watch, due
from dflash_dist.training.workload import Workload


def train(config: Config) -> None:
    """A whole run, as one of torchrun's ranks or alone."""
    folder = Path(config.output_dir)
    with (
        join_world(config.train.hang_timeout, folder / LOGS) as world,
        setup.claim_folder(folder, world),
        setup.stoppable(folder, world),
    ):
        Trainer(config, world).run()


class Prepared(NamedTuple):
    """What a run has before any weights are read."""

    config: Config  # with all that it left open
    info: TargetInfo
    data: Data  # one document a row
    prompts: list[list[int]]  # to decode


def prepare(config: Config, world: World) -> Prepared:
    """Looks at target, data and draft of a run, and tokenises the data.

    Raises:
        ValueError: something is missing, impossible, or of another run than the one in this folder.
    """
    check_wandb(config.log.wandb)
    config = setup.make_builtins(config, world)
    folder = Path(config.output_dir)
    if saved := step_folders(folder / CHECKPOINTS):
        refuse_changed_knobs(config, folder, saved[max(saved)])
    config, info = setup.check_target(config, world)
    setup.check_models(config, info)
    config = setup.fix_date(config, info, world)
    data = setup.read_data(config, info, world)
    data.refuse_unsupervised()
    return Prepared(config, info, data, find_prompts(config, info, data) if config.eval.every else [])


def check(config: Config) -> None:
    """Everything of a run that needs neither its ranks nor weights in memory; then says what the run would be.

    Raises:
        ValueError: as the run itself would before its first step.
    """
    with join_world(0) as world:
        if world.size > 1:
            setup.check_world(config, world)
        config, info, data, prompts = prepare(config, world)
        checkpoints = step_folders(Path(config.output_dir) / CHECKPOINTS)
        newest = max(checkpoints, default=0)
        saved = (read_state(checkpoints[newest]).get("identity") or {}) if checkpoints else {}
        if config.target.features:
            _, data = open_features(config, info, data, world)
        else:
            packs = saved["data fingerprint"] != data.train.fingerprint if saved else expects_packing(info.text)
            data = setup.lay_out(data, packs, "whether rows hold several documents, the run finds out", world)
        shape = setup.draft_shape(config, info.text, info.path)
        if saved:
            ours = identity_of(config, info, data, shape, prompts)
            refuse_another(saved, ours, config, Path(config.output_dir), checkpoints[newest])
        if world.is_main:
            ready = f"go on from step {newest} of" if newest else "begin"
            print(f"mask    {describe_mask_token(config.mask_token_id, info, data.train)}")
            print(f"checked: ready to {ready} {describe_steps(config, data.train)}; without --check it starts")


class Trainer:
    """One run: builds what it needs, then steps until it is done or asked to stop."""

    def __init__(self, config: Config, world: World):
        setup.check_world(config, world)
        if world.is_main and "bfloat16" in (config.target.dtype, config.train.precision):
            say_slow_bfloat16(world.device, "target.dtype=float32 train.precision=float32")
        config, info, data, prompts = prepare(config, world)
        self.config, self.world, self.folder = config, world, Path(config.output_dir)
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, config.checkpoint.keep)
        draft, begun = setup.make_draft(config, info)
        draft = draft.to(world.device)
        source = make_target(config, info, data, world)
        target, embedding, head, data = source
        decoder = target.model.model if isinstance(target, LiveTarget) else None
        self.work = Workload.of(config, data.train, draft, decoder)
        self.total_steps = self.work.steps
        self.about = partial(describe_begin, config, world, info, source, draft)
        self.begun = begun
        sampler = Sampler(config, world, data.train, data.held_out)
        self.training = TrainingStep(config, world, sampler, draft, target, embedding, head, self.total_steps)
        if config.eval.every:
            assert isinstance(target, LiveTarget), "load_config refuses real decoding without the target"
            shared = SharedTarget(world, target.model.model, embedding, head, lambda: self.stop_requested)
            self.evaluation = Evaluation(config.eval, world, shared, info.stop_ids, prompts)
        self.identity = identity_of(config, info, data, draft.shape, prompts)
        self.stop_requested = False

    def run(self) -> None:
        """Steps from the newest checkpoint to the last step.

        Raises:
            FloatingPointError: a gradient was not finite; no update was applied and nothing was saved since.
        """
        begin = self.resume()
        if begin < self.total_steps and self.world.is_main:
            for line in self.about(self.begun if begin == 0 else [f"goes on from step {begin}"]):
                print(line)
        config_text = setup.describe_run(self.config) if self.world.is_main else ""
        watch = Watch(self.config, self.world, begin, self.work, config_text)
        # However the run ends, a checkpoint that is being written gets finished, whatever signals come, or its
        # failure reported.
        with (
            self.signals(),
            contextlib.closing(watch),
            contextlib.closing(self.checkpoints),
            self.world.expects_progress(),
        ):
            finished = self.steps(begin, watch)
        self.world.barrier()
        if finished and self.world.is_main:
            print("\n".join(describe_end(self.config, self.work)))

    def steps(self, begin: int, watch: Watch) -> bool:
        """All steps from `begin` on; whether nobody asked to stop before the last one."""
        if begin == 0 and self.config.validate.every:
            self.validate_and_show(0, watch)
        if begin == 0 and self.config.eval.every:
            self.evaluate_and_show(0, watch)
        if self.total_steps == 0:
            self.save(0)
        unread, saved = None, begin
        if begin < self.total_steps:
            say_phase(f"step {begin + 1}" + ", which compiles the draft" * self.config.train.compile)
        for step in range(begin, self.total_steps):
            result = self.training.run(step, self.stop_requested)
            if unread is not None:
                watch.read(unread)
            unread = result
            if result is None:
                if step > saved:
                    self.save(step)
                self.mark_preempted()
                done = f"after step {step}, which is saved" if step else "before the first step"
                watch.say(f"stopped {done}; start the same command again to continue")
                return False
            to_validate = due(result.step, self.config.validate.every, self.total_steps)
            to_evaluate = due(result.step, self.config.eval.every, self.total_steps)
            to_save = due(result.step, self.config.checkpoint.every, self.total_steps)
            if to_validate or to_evaluate or to_save:
                watch.read(result)
                unread = None
            if to_validate:
                self.validate_and_show(result.step, watch)
            tau = self.evaluate_and_show(result.step, watch) if to_evaluate else None
            if to_save or (tau is not None and self.world.is_main and self.checkpoints.would_be_best(tau)):
                self.save(saved := result.step, tau)
        return True

    def validate_and_show(self, step: int, watch: Watch) -> None:
        show_status(f"step {step}: validating")
        begun = time.perf_counter()
        watch.validated(step, self.training.validate(), time.perf_counter() - begun)

    def evaluate_and_show(self, step: int, watch: Watch) -> float | None:
        """The acceptance length in real decoding; None where a rank was asked to stop meanwhile."""
        show_status(f"step {step}: decoding {len(self.evaluation.prompts)} prompts")
        begun = time.perf_counter()
        shown = self.evaluation.run(self.training.draft)
        if shown is None:
            return None
        watch.evaluated(step, shown, time.perf_counter() - begun)
        return shown.tau

    def save(self, step: int, tau: float | None = None) -> None:
        gather_state(self.training.optimizer)
        if self.world.is_main:
            state = {"identity": self.identity, "shape": dataclasses.asdict(self.training.draft.shape), "tau": tau}
            with self.world.expects_progress(False):  # it may wait for a slow disk to finish the one before
                self.checkpoints.save(step, self.training.draft, self.training.optimizer, state)

    def mark_preempted(self) -> None:
        """Tells a batch script, once the checkpoint is written, that this end was asked for and the run is to go on."""
        if self.world.is_main:
            self.checkpoints.wait()
            (self.folder / setup.PREEMPTED).touch()

    def resume(self) -> int:
        """Loads the newest checkpoint that is whole, if any; returns the steps it has done."""
        show_status("looking for a checkpoint")
        folders = step_folders(self.checkpoints.folder)
        if not self.world.agrees_on(max(folders, default=-1)):
            raise ValueError(f"the ranks see different checkpoints in {self.folder}: put output_dir on a shared disk")
        newest = newest_whole(self.checkpoints.folder) if self.world.is_main else 0  # reads all of it: once is enough
        step = int(self.world.sum_numbers(-1 if newest is None else newest)[0])
        if step < 0:
            return 0
        saved = read_state(folders[step]).get("identity") or {}
        changed = refuse_another(saved, self.identity, self.config, self.folder, folders[step])
        self.checkpoints.load(step, self.training.draft, self.training.optimizer)
        rate = self.training.optimizer.param_groups[0]["lr"]  # of the last step
        restore_hyperparameters(self.training.optimizer, self.config.train)
        if self.world.is_main:
            print(f"resuming from {folders[step]}" + (f", with {'; '.join(changed)}" if changed else ""))
            if step >= self.total_steps:
                knob = "train.epochs" if self.config.train.max_steps is None else "train.max_steps"
                print(f"this run is finished: {step} steps are done, of {self.total_steps}; raise {knob} to go on")
            elif step and (jump := describe_jump(rate, step, self.total_steps, self.config)):
                print(jump)
        self.world.barrier()  # all have read the config that rank 0 is about to write anew
        return step

    def signals(self) -> contextlib.AbstractContextManager[None]:
        """While running, SIGTERM, SIGINT and SIGUSR1 (what Slurm may send ahead of its time limit) ask for a checkpoint
        and a clean end after the current step."""
        return asked_to_stop((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), self.ask_to_stop)

    def ask_to_stop(self) -> None:
        self.stop_requested = True
        if self.world.is_main:
            os.write(2, b"\nasked to stop: the step is finished and saved first; a second signal ends it at once\n")
