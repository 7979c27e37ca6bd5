"""Follows a run: turns step results into metrics, one step late, and stops a run whose gradients are not finite."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from dflash_dist.config import Config
from dflash_dist.logs import or_dash
from dflash_dist.machine import peak_flops_per_s
from dflash_dist.objective.statistics import Statistics
from dflash_dist.ranks import World
from dflash_dist.training.acceptance import Acceptance
from dflash_dist.training.curves import read_curves
from dflash_dist.training.metrics import MetricLog, peak_memory_mib
from dflash_dist.training.step import StepResult
from dflash_dist.training.workload import Workload


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens each `every` steps, and after the last one, happens after `step`."""
    return every > 0 and (step % every == 0 or step == last)


class Watch:
    """All ranks call it for every step; rank 0 writes."""

    def __init__(self, config: Config, world: World, begin: int, work: Workload, config_text: str):
        self.config, self.world, self.work, self.total_steps = config, world, work, work.steps
        self.folder = Path(config.output_dir)
        self.log = MetricLog(self.folder, begin, self.total_steps, config_text, config) if world.is_main else None
        self.clock, self.clock_step, self.waited = time.perf_counter(), begin, 0.0

    def read(self, result: StepResult) -> None:
        """Waits for the step to finish on the device, and logs it if it is one to log.

        Raises:
            FloatingPointError: on every rank, where the gradient norm was not finite.
        """
        norm = result.grad_norm.item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {result.step}: the gradient norm is {norm}. No update was applied and nothing was saved since."
                " Lower train.lr, or look at the rows of this step; the same command resumes from the last checkpoint"
            )
        self.waited += result.waited
        if self.log is not None:
            self.log.progress.at(result.step)
        if not due(result.step, self.config.log.every, self.total_steps):
            return
        shown = Statistics.read(result.sums.reduced(self.world.sum_tensor))
        if self.log is None:
            return
        steps = result.step - self.clock_step
        seconds, waited = (result.at - self.clock) / steps, self.waited / steps
        self.clock, self.clock_step, self.waited = result.at, result.step, 0.0
        tokens_per_s = self.config.train.global_batch_size * self.config.data.seq_len / seconds
        peak = self.world.size * peak_flops_per_s(getattr(torch, self.config.train.precision), self.world.device)
        values = {
            "train/loss": shown.loss,
            "train/tau": shown.tau,
            "train/accuracy": shown.accuracy,
            **{f"train/{name}": value for name, value in shown.of_kind.items()},
            "progress/epoch": self.work.epochs(result.step),
            "progress/tokens": self.work.tokens_seen(result.step),
            "perf/mfu": self.work.flops(sum(shown.slot_count)) / seconds / peak,
            "perf/tokens_per_s_per_gpu": tokens_per_s / self.world.size,
            "perf/tokens_per_s": tokens_per_s,
            "perf/step_s": seconds,
            "perf/data_wait": waited / seconds,
            "perf/peak_memory_mib": peak_memory_mib(self.world.device),
            "optim/lr": result.lr,
            "optim/grad_norm": norm,
        }
        self.log.write(result.step, values)
        self.log.progress.show(result.step, shown.loss, shown.tau, tokens_per_s)

    def validated(self, step: int, shown: Statistics, seconds: float) -> None:
        """Logs a validation that took `seconds`, which do not count as training. The step before it has been read."""
        self.clock += seconds
        if self.log is not None:
            slots = {f"val/accuracy_slot_{k:02d}": accuracy for k, accuracy in enumerate(shown.slot_accuracy, 1)}
            of_kind = {f"val/{name}": value for name, value in shown.of_kind.items()}
            self.log.write(step, {"val/loss": shown.loss, "val/tau": shown.tau, **of_kind, **slots})
            self.log.show_slots(step, "val/slots", "held-out accuracy", shown.slot_accuracy)
            [(_, began), *_] = read_curves(self.folder).get("val/loss") or [(step, shown.loss)]
            above = f"; above the {began:.3f} that it began with" if shown.loss > began else ""
            self.say(f"step {step}: held-out loss {shown.loss:.3f}, tau {or_dash(shown.tau)}{above}")

    def evaluated(self, step: int, shown: Acceptance, seconds: float) -> None:
        """Logs a real decoding, as `validated` does a validation."""
        self.clock += seconds
        if self.log is not None:
            slots = {f"eval/acceptance_slot_{k:02d}": share for k, share in enumerate(shown.by_slot, 1)}
            self.log.write(step, {"eval/tau": shown.tau, "eval/seconds": seconds, **slots})
            self.log.show_slots(step, "eval/slots", "acceptance in decoding", shown.by_slot)
            so_far = "" if shown.tau is None else self._best_so_far(step)
            self.say(f"step {step}: real tau {or_dash(shown.tau)}, decoded in {seconds:.0f} s{so_far}")

    def _best_so_far(self, step: int) -> str:
        taus = dict(read_curves(self.folder).get("eval/tau", []))
        best = max(taus, key=lambda at: (taus[at], at), default=step)  # the newest of equals, as checkpoints have it
        return "; the best so far" if best == step else f"; the best so far is {taus[best]:.2f}, of step {best}"

    def say(self, text: str) -> None:
        if self.log is not None:
            self.log.progress.say(text)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
