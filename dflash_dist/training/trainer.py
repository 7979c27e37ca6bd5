"""Trains a draft: `python -m dflash_dist train --config C.yaml [a.b=c ...]`, alone or under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from dflash_dist.config import Config, describe, load_config
from dflash_dist.data.packing import (
    TRAINING_ANCHORS,
    VALIDATION_ANCHORS,
    PackedBatch,
    PackedRows,
    global_rows,
    random_stream,
)
from dflash_dist.draft.attention import training_attention
from dflash_dist.draft.blocks import Blocks, build_blocks
from dflash_dist.draft.objective import Statistics, WeightedSlots, block_loss
from dflash_dist.ranks import World, join_world
from dflash_dist.training import setup
from dflash_dist.training.checkpoint import Checkpoints, newest_whole, read_state, refuse_changed, step_folders
from dflash_dist.training.context import HELD_OUT, TRAIN, Place, make_context
from dflash_dist.training.optim import apply_update, learning_rate, make_optimizer, restore_hyperparameters
from dflash_dist.training.watch import StepResult, Watch, due


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dflash_dist train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"knobs, as YAML sections or overrides:\n{describe()}",
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="knobs set on the command line")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    with join_world() as world, setup.claim_folder(Path(config.output_dir), world):
        Trainer(config, world).run()


ONE_REQUEST = 3.0  # [s] within which several signals are one request to stop


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank runs at once, with the blocks sampled from them; on the host until `to`."""

    place: Place  # where the rows come from
    batch: PackedBatch
    blocks: Blocks
    slots: WeightedSlots

    @property
    def weight(self) -> float:
        return self.blocks.weights.sum(dtype=torch.float64).item()

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(self.place, self.batch.to(device), self.blocks.to(device), self.slots.to(device))


class Trainer:
    """One run: builds what it needs, then steps until it is done or asked to stop."""

    def __init__(self, config: Config, world: World):
        setup.check_world(config, world)
        self.config = config = setup.make_builtins(config, world)
        self.world = world
        info = setup.check_target(config)
        data = setup.make_data(config, info, world)
        self.rows, self.held_out = data.train.rows, data.held_out.rows if data.held_out else None
        train = config.train
        self.total_steps = setup.planned_steps(config, len(self.rows))

        self.draft = setup.make_draft(config, info).to(world.device)
        self.compute_dtype = getattr(torch, train.precision)
        self.context, embedding, head = make_context(config, info, data, world)
        self.embedding = embedding.to(self.compute_dtype)
        self.head = self.embedding if head is embedding else head.to(self.compute_dtype)
        self.optimizer = make_optimizer(self.draft, train)
        # One rank has nobody to average with: nothing is wrapped.
        self.ddp = DistributedDataParallel(self.draft, gradient_as_bucket_view=True) if world.size > 1 else self.draft
        # What a resumed run must share with the one it continues.
        self.identity = {
            **{f"draft.{name}": value for name, value in dataclasses.asdict(self.draft.shape).items()},
            "train.seed": train.seed,
            "train.global_batch_size": train.global_batch_size,
            "data.seq_len": config.data.seq_len,
            "data fingerprint": data.train.fingerprint,
        }
        self.folder = Path(config.output_dir)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoint.keep)
        self.stop_requested = False

    # ------------------------------------------------------------------------------------------------ one step

    def train_step(self, step: int) -> StepResult | None:
        """Step `step` (from 0). Does nothing and returns None where any rank was asked to stop."""
        micro_batches = self.sample(step)
        weight = sum(micro.weight for micro in micro_batches)
        total_weight, stops = self.world.sum_numbers(weight, self.stop_requested)
        if stops:
            return None
        statistics = []
        for micro in micro_batches:
            with self.gradients_stay_local(unless=micro is micro_batches[-1]):
                loss, shown = self.forward(self.ddp, micro.to(self.world.device))
                # DDP averages over ranks; the loss is a mean over all ranks' weights, so undo the former.
                (loss * self.world.size / max(total_weight, 1e-30)).backward()
            statistics.append(shown)
        lr = learning_rate(step, self.total_steps, self.config.train)
        grad_norm = apply_update(self.optimizer, lr, self.config.train.clip_norm)
        return StepResult(step + 1, torch.stack(statistics).sum(0), grad_norm, lr, time.perf_counter())

    def sample(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        train = self.config.train
        rows = global_rows(step, len(self.rows), train.global_batch_size, train.seed)
        return self.micro_batches(self.rows, rows, TRAINING_ANCHORS, step)

    def micro_batches(self, source: PackedRows, rows: list[int], stream: int, step: int) -> list[MicroBatch]:
        """This rank's share of `rows`, in micro-batches. A row's anchors depend on its place among `rows`, not on the
        rank that gets it."""
        part = TRAIN if source is self.rows else HELD_OUT
        micro_batches = []
        numbered = self.world.share(list(enumerate(rows)))
        size = self.config.train.micro_batch_size
        for few in (numbered[i : i + size] for i in range(0, len(numbered), size)):
            place = part, [row for _, row in few]
            batch = source.batch(place[1])
            blocks = build_blocks(
                batch.input_ids,
                batch.loss_mask,
                batch.document_ids,
                batch.position_ids,
                anchors=self.config.loss.anchors,
                block_size=self.config.draft.block_size,
                mask_token_id=self.config.mask_token_id,
                gamma=self.config.gamma,
                generators=[random_stream(self.config.train.seed, stream, step, number) for number, _ in few],
            )
            micro_batches.append(MicroBatch(place, batch, blocks, WeightedSlots.of(blocks, self.config.loss.chunk)))
        self.context.expect(micro.place for micro in micro_batches)
        return micro_batches

    def forward(self, draft: torch.nn.Module, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Context, draft, loss sum and statistics of a micro-batch."""
        batch, blocks = micro.batch, micro.blocks
        context = self.context.of(micro.place, batch)
        attend = training_attention(blocks, batch.document_ids)
        slots = F.embedding(blocks.input_ids.flatten(1), self.embedding)
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16):
            hidden = draft(
                slots, blocks.position_ids.flatten(1), context.to(self.compute_dtype), batch.position_ids, attend
            )
        return block_loss(hidden, self.head, blocks, micro.slots)

    def gradients_stay_local(self, unless: bool) -> contextlib.AbstractContextManager:
        if unless or not isinstance(self.ddp, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    @torch.no_grad()
    def validate(self) -> Statistics:
        """Statistics on the held-out rows, with anchors of their own random stream: training is not touched."""
        assert self.held_out is not None
        self.draft.eval()
        each = self.world.size * self.config.train.micro_batch_size
        count = math.ceil(len(self.held_out) / each) * each  # rows past the end are padding: every rank runs as many
        micro_batches = self.micro_batches(self.held_out, list(range(count)), VALIDATION_ANCHORS, 0)
        shown = [self.forward(self.draft, micro.to(self.world.device))[1] for micro in micro_batches]
        self.draft.train()
        return Statistics.read(self.world.sum_tensor(torch.stack(shown).sum(0)))

    # ------------------------------------------------------------------------------------------------ the run

    def run(self) -> None:
        """Steps from the newest checkpoint to the last step.

        Raises:
            FloatingPointError: a gradient was not finite; no update was applied and nothing was saved since.
        """
        begin = self.resume()
        config_text = setup.describe_run(self.config) if self.world.is_main else ""
        watch = Watch(self.config, self.world, begin, self.total_steps, config_text)
        # However the run ends, a checkpoint that is being written gets finished, or its failure reported.
        with contextlib.closing(watch), contextlib.closing(self.checkpoints), self.signals():
            if begin == 0 and self.config.validate.every:
                self.validate_and_show(0, watch)
            if self.total_steps == 0:
                self.save(0)
            unread, saved = None, begin
            for step in range(begin, self.total_steps):
                result = self.train_step(step)
                if unread is not None:
                    watch.read(unread)
                unread = result
                if result is None:
                    if step > saved:
                        self.save(step)
                    self.mark_preempted()
                    watch.say(f"stopped after step {step}; start the same command again to continue")
                    break
                to_validate = due(result.step, self.config.validate.every, self.total_steps)
                to_save = due(result.step, self.config.checkpoint.every, self.total_steps)
                if to_validate or to_save:
                    watch.read(result)
                    unread = None
                if to_validate:
                    self.validate_and_show(result.step, watch)
                if to_save:
                    self.save(saved := result.step)
        self.world.barrier()

    def validate_and_show(self, step: int, watch: Watch) -> None:
        begun = time.perf_counter()
        watch.validated(step, self.validate(), time.perf_counter() - begun)

    def save(self, step: int) -> None:
        if self.world.is_main:
            state = {"identity": self.identity, "shape": dataclasses.asdict(self.draft.shape)}
            self.checkpoints.save(step, self.draft, self.optimizer, state)

    def mark_preempted(self) -> None:
        """Tells a batch script, once the checkpoint is written, that this end was asked for and the run is to go on."""
        if self.world.is_main:
            self.checkpoints.wait()
            (self.folder / setup.PREEMPTED).touch()

    def resume(self) -> int:
        """Loads the newest checkpoint that is whole, if any; returns the steps it has done."""
        folders = step_folders(self.checkpoints.folder)
        if not self.world.agrees_on(max(folders, default=-1)):
            raise ValueError(f"the ranks see different checkpoints in {self.folder}: put output_dir on a shared disk")
        newest = newest_whole(self.checkpoints.folder) if self.world.is_main else 0  # reads all of it: once is enough
        step = int(self.world.sum_numbers(-1 if newest is None else newest)[0])
        if step < 0:
            return 0
        refuse_changed(read_state(folders[step])["identity"], self.identity, folders[step])
        self.checkpoints.load(step, self.draft, self.optimizer)
        restore_hyperparameters(self.optimizer, self.config.train)
        if self.world.is_main:
            print(f"resuming from {folders[step]}")
        return step

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While running, SIGTERM, SIGINT and SIGUSR1 (what Slurm may send ahead of its time limit) ask for a checkpoint
        and a clean end after the current step; a second one acts as it would elsewhere. Slurm signals every process and
        torchrun passes the same signal on, so what comes at almost the same time is not a second one."""
        asked = math.inf

        def ask(number: int, _frame: object) -> None:
            nonlocal asked
            if self.stop_requested and time.monotonic() - asked > ONE_REQUEST:
                signal.signal(number, before[number])
                signal.raise_signal(number)
            self.stop_requested, asked = True, min(asked, time.monotonic())

        before: dict[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
