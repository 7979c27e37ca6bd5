"""One rank of many, whose training step runs for real but on tensors without numbers: what it costs, before any GPU is
there.

The process group is torch's fake one, where nobody else is; the target is made from its config and sharded by FSDP; the
draft, DDP, the optimiser and the step are those of training. The tensors are torch's fake ones: shapes, dtypes and
lifetimes. They lie on a CPU, since autograd refuses a GPU that is not there, but tell the step that they lie on a GPU,
so that it takes its way there: FlexAttention, which holds no scores, and the loss in a GPU's chunks. The target's
attention is torch's own, of which the kernels of CPU and GPU hold the same: no scores.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention as flex
import torch.nn.parallel.distributed as ddp
from torch._higher_order_ops import flex_attention, flex_attention_backward
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.integrations import moe

from dflash_dist.batch import Batch
from dflash_dist.config import Config
from dflash_dist.cost.counter import GATHERED, Collective, StepCounter, Work
from dflash_dist.data.chat import Document
from dflash_dist.data.documents import Documents
from dflash_dist.data.packing import PackedRows
from dflash_dist.draft.base import Draft
from dflash_dist.draft.kinds import kind_of
from dflash_dist.kernels import attention_gpu
from dflash_dist.kernels.mask import FULL
from dflash_dist.ranks import World
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.load import expects_packing, target_skeleton
from dflash_dist.target.run import LiveTarget, Output, Target
from dflash_dist.training.sampler import Sampler
from dflash_dist.training.setup import draft_shape
from dflash_dist.training.step import TrainingStep

STAGES = ("sample", "capture", "propose", "loss", "backward", "update")
PHASES = {"capture": ("capture",), "draft": ("propose", "loss", "backward"), "update": ("update",)}
# Whom memory belongs to, as it is listed; and whom, if it is allocated in a stage.
TARGET, ENDS, DRAFT, OPTIMISER, GRADIENTS = "target shard", "embedding and head", "draft", "optimiser", "gradients"
FEATURES, ACTIVATIONS, LATER = "features", "activations", "loss chunk or backward"
OF_TARGET = "target activations"
OWNERS = (TARGET, ENDS, DRAFT, OPTIMISER, GRADIENTS, GATHERED, OF_TARGET, FEATURES, ACTIVATIONS, LATER)
OWNER = {"capture": OF_TARGET, "propose": ACTIVATIONS, "loss": LATER, "backward": LATER, "update": GRADIENTS}


@dataclass(frozen=True)
class StepCost:
    """What a step asks of a rank."""

    ranks: int
    shards: int  # of the target, which as many ranks share
    at_rest: dict[str, int]  # bytes by owner, before the step
    held: dict[str, dict[str, int]]  # by phase and owner, at the moment when it is most
    capturing: dict[str, int]  # while the target runs, the most of each owner, which are not all there at one moment
    work: dict[str, Work]  # of one micro-batch, by stage

    @property
    def peak(self) -> int:
        """The most that a rank holds [bytes]."""
        return max(map(self.peak_of, self.held))

    def peak_of(self, phase: str) -> int:
        return sum(self.held[phase].values())

    def collectives(self, stage: str, micro_batches: int) -> list[Collective]:
        """Calls in a step of so many micro-batches: the target is gathered for each, gradients are summed once."""
        calls = self.work[stage].collectives if stage in self.work else []
        return calls * micro_batches if stage == "capture" else calls

    def among(self, ranks: int, shards: int, at_rest: dict[str, int]) -> StepCost:
        """The same step of a rank among others, of which only what it holds at rest was looked at: what a step does and
        holds besides is the same, but that parts of another size are gathered from as many."""
        part = at_rest[TARGET] / self.at_rest[TARGET] if TARGET in self.at_rest else 1.0
        more = {GATHERED: part * shards / self.shards}  # where a tensor does not divide evenly, parts are filled up
        held = {
            phase: {
                owner: int(size * more.get(owner, 1)) + at_rest.get(owner, 0) - self.at_rest.get(owner, 0)
                for owner, size in owners.items()
            }
            for phase, owners in self.held.items()
        }
        work = {
            stage: dataclasses.replace(
                of,
                collectives=[
                    Collective(call.operator, shards, call.handed * part)
                    if stage == "capture"
                    else dataclasses.replace(call, ranks=ranks)
                    for call in of.collectives
                ],
            )
            for stage, of in self.work.items()
        }
        return dataclasses.replace(self, ranks=ranks, shards=shards, at_rest=at_rest, held=held, work=work)


# What is changed of torch meanwhile, since it looks for numbers or for a GPU.
PATCHES: list[tuple[Any, str, Any]] = [
    # Accelerators of this machine are not used.
    (torch._C, "_get_accelerator", lambda *_: torch.device("cpu")),
    # Only to load the compiler takes a second.
    (torch, "compile", lambda function, **_: function),
    (attention_gpu, "_compile", lambda function: function),  # keeps what it made
    # FlexAttention has no backward on a CPU.
    (flex, "_validate_device", lambda *_: None),
    (flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
    # DDP compares the ranks' parameters, then brings those of rank 0 to all.
    (ddp, "_verify_param_shape_across_processes", lambda *_: None),
    (ddp, "_sync_module_states", lambda *_, **__: None),
    # The product of all experts is known of fake tensors in bfloat16 only; others take it one by one.
    (moe, "_can_use_grouped_mm", lambda _input, weight, *_: weight.dtype == torch.bfloat16),
]


def with_knobs(config: Config, section: str, **knobs: Any) -> Config:
    """The config with other knobs in a section."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **knobs)})


@contextmanager
def one_rank(config: Config, target: Any, ranks: int) -> Iterator[Rank]:
    """Rank 0 of `ranks`, while the context lasts; afterwards the process is as before.

    Args:
        target: the Hugging Face config of the whole target.
    """
    with ExitStack() as stack:
        for place, name, value in PATCHES:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            stack.callback(dist.destroy_process_group)
        yield Rank(config, target, ranks)


class Rank:
    """See `one_rank`."""

    def __init__(self, config: Config, target: Any, ranks: int):
        self.config, self.text, self.ranks = config, target.get_text_config(), ranks
        self.shape = draft_shape(config, self.text, config.target.path)
        self.memory = FakeTensorMode(allow_non_fake_inputs=True)
        self.dtype = getattr(torch, config.target.dtype)
        self.target: Any = None
        if not config.target.features:
            # Kernels of other packages need not be installed here, and hold no scores either.
            if config.target.attention not in (None, "eager"):
                config = with_knobs(config, "target", attention="sdpa")
            self.target = target_skeleton(target, config.target, World(0, ranks, torch.device("cpu")))

    def at_rest(self) -> dict[str, int]:
        """Bytes by owner that the rank holds before its first step."""
        counter, world = StepCounter({}), World(0, self.ranks, torch.device("cpu"))
        training = self._training(self.config, counter, world, run_target=False)
        held = dict(counter.held)
        del training
        return held

    def step(self, config: Config | None = None, run_target: bool = True, counts_work: bool = True) -> StepCost:
        """Runs a step with one micro-batch; where gradients of one wait for the next and are no buckets of DDP, two.

        Args:
            config: another one for the same target and ranks.
            run_target: otherwise features are given; the target is there all the same.
            counts_work: otherwise memory alone, which is sooner.
        """
        config = config or self.config
        train = config.train
        passes = 2 if self.ranks == 1 and train.global_batch_size > train.micro_batch_size else 1
        config = with_knobs(config, "train", global_batch_size=passes * train.micro_batch_size * self.ranks)
        if run_target and self.target and self.target.device.type == "meta":
            with self.memory:
                self.target.to_empty(device="cpu")

        visible = 0.0
        counter = StepCounter(attention_formulas(lambda: visible), counts_work)
        with ExitStack() as modes:
            world = telling_world(self.ranks, lambda: [modes.enter_context(mode) for mode in self.modes(counter)])
            training = self._training(config, counter, world, run_target)
            at_rest = dict(counter.held)
            held, capturing = _watch(training, counter)
            sample = training.sample

            def sampled(step: int) -> list[Batch]:
                nonlocal visible
                batches = sample(step)
                visible = visible_pairs(training.draft, batches[-1]) if counts_work else 0
                return batches

            setattr(training, "sample", sampled)  # noqa: B010, as the other stages
            training.run(0)
        for stage in counter.work.keys() - {"update"}:
            counter.work[stage].flops /= passes
            counter.work[stage].moved //= passes
        shards = self.ranks // self.config.target.replicas
        return StepCost(self.ranks, shards, at_rest, held, capturing, dict(counter.work))

    def modes(self, counter: StepCounter) -> list[AbstractContextManager]:
        """What a step runs in, from where its weight is known on."""
        return [self.memory, FakeGpu(self.memory, counter), counter]

    def rows(self, config: Config) -> PackedRows:
        """Full rows of one document, all of it supervised, which asks the most of attention and of the head."""
        length = config.data.seq_len
        document = Document(np.zeros(length, np.int32), [(0, length)])
        return PackedRows(Documents.of([document]), np.zeros(config.train.global_batch_size, int), length, 0)

    def _training(self, config: Config, counter: StepCounter, world: World, run_target: bool) -> TrainingStep:
        """The step before it has run, with its memory counted."""
        target: Target = _GivenFeatures(len(config.layer_ids), self.text.hidden_size, self.dtype)
        if self.target and run_target:
            target = LiveTarget(HFDFlashTargetModel(self.target, config.layer_ids), expects_packing(self.text))
        sampler = Sampler(config, world, self.rows(config), None)
        with self.memory, counter, torch.random.fork_rng(devices=[]):
            if self.target:
                whole = (*self.target.parameters(), *self.target.buffers())
                counter.belongs([getattr(tensor, "_local_tensor", tensor) for tensor in whole], TARGET)
            counter.owner = ENDS
            embedding, head = self._ends()
            counter.belongs(embedding, counter.owner)
            counter.owner = DRAFT
            draft = kind_of(config.draft.kind)(self.shape, config.train.gradient_checkpointing)
            counter.owner = GRADIENTS  # DDP's buckets
            training = TrainingStep(config, world, sampler, draft, target, embedding, head, total_steps=1)
            counter.belongs([training.embedding, training.head], ENDS)
            optimizer = getattr(training.optimizer, "optim", training.optimizer)
            counter.belongs(list(optimizer.state.values()), OPTIMISER)
            if isinstance(training.ddp, ddp.DistributedDataParallel):
                training.ddp.register_comm_hook(None, _sum_bucket)
        return training

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `load_target` gives them."""
        if self.target and self.ranks == 1:
            embedding = self.target.get_input_embeddings().weight.detach()
        else:
            embedding = torch.empty(self.text.vocab_size, self.text.hidden_size, dtype=self.dtype)
        return embedding, embedding if self.text.tie_word_embeddings else torch.empty_like(embedding)


class FakeGpu(TorchFunctionMode):
    """A GPU of fake tensors: `is_cuda` is answered as on one, and what lies on the host gets there by `.to`."""

    def __init__(self, memory: FakeTensorMode, counter: StepCounter):
        super().__init__()
        self.memory, self.counter = memory, counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]  # a new object each time
            return True
        if func == torch.Tensor.to and not isinstance(args[0], FakeTensor):
            copied = self.memory.from_tensor(args[0])
            self.counter.belongs(copied, FEATURES)
            return copied
        return func(*args, **kwargs or {})


class _GivenFeatures:
    """Features that are there, as stored ones are once they are read."""

    waited = 0.0

    def __init__(self, layers: int, hidden_size: int, dtype: torch.dtype):
        self.layers, self.hidden_size, self.dtype = layers, hidden_size, dtype

    def expect(self, batches: Iterable[Batch]) -> None:
        pass

    def run(self, batch: Batch, final: bool = False) -> Output:
        rows = batch.input_ids.shape
        states = torch.empty(*rows, self.hidden_size, dtype=self.dtype) if final else None
        return Output(torch.empty(*rows, self.layers * self.hidden_size, dtype=self.dtype), states)


def telling_world(ranks: int, agreed: Callable[[], Any], device: str = "cpu") -> World:
    """A world where nobody else answers, and which calls `agreed` once a step's weight is known: from there on, all of
    a step is for the device."""

    class Telling(World):
        def sum_numbers(self, *numbers: float) -> list[float]:
            agreed()
            return list(numbers)

    return Telling(0, ranks, torch.device(device))


def _sum_bucket(_state, bucket):  # without types, which DDP wants to compare
    """What DDP does with a bucket itself, where the fake group's answer holds nothing."""
    dist.all_reduce(bucket.buffer())
    summed: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    summed.set_result(bucket.buffer())
    return summed


def _watch(training: TrainingStep, counter: StepCounter) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Has the counter follow the stages of a step; returns what will be `held` and `capturing` of its cost."""
    held: dict[str, dict[str, int]] = {phase: {} for phase in PHASES}
    capturing: dict[str, int] = {}

    def watched(phase: str, stage: str) -> Callable[..., Any]:
        method = getattr(training, stage)

        def call(*args: Any) -> Any:
            counter.stage, counter.owner = stage, OWNER[stage]
            counter.watch()
            result = method(*args)
            if counter.most.total() > sum(held[phase].values()):
                held[phase] = {owner: size for owner, size in counter.most.items() if size}
            if stage == "capture":
                capturing.update(counter.apart)
                counter.belongs(tuple(result), FEATURES)
            if stage == "backward":
                counter.belongs([parameter.grad for parameter in training.draft.parameters()], GRADIENTS)
            return result

        return call

    for phase, stages in PHASES.items():
        for stage in stages:
            setattr(training, stage, watched(phase, stage))
    return held, capturing


# ---------------------------------------------------------------------------------------------------- operations


def attention_formulas(visible: Callable[[], float]) -> dict[Any, Callable[..., float]]:
    """Operations that torch's counter does not know, or counts where nothing is visible.

    Args:
        visible: pairs of a slot and what it sees of context and block, of all rows and for one head.
    """

    def of_slots(query: torch.Tensor, *_: Any, **__: Any) -> float:
        return 4 * query.shape[1] * query.shape[3] * visible()

    def causal(query: torch.Tensor, *_: Any, **__: Any) -> float:
        return 4 * query.numel() * (query.shape[2] + 1) / 2  # a token sees itself and all before it

    def of_experts(tokens: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any) -> float:
        return 2 * tokens.numel() * weights.shape[-1]

    return {
        flex_attention: of_slots,
        flex_attention_backward: lambda *args, **_: 2 * of_slots(*args),  # to compute the scores again is a choice
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal,
        torch.ops.aten._grouped_mm: of_experts,
        torch.ops.transformers.grouped_mm_fallback: of_experts,
    }


def visible_pairs(draft: Draft, batch: Batch) -> float:
    """Pairs of a slot and what it sees of context and block, over all rows of a micro-batch; the mean of the layers."""
    masks = Counter(getattr(draft, "masks", [FULL]))
    contexts = batch.slot_positions[..., 0][batch.anchor_documents >= 0]  # as many tokens as the anchor's position
    pairs = {mask: sum(int(mask.after_context(n, batch.slots).sum()) for n in contexts.tolist()) for mask in masks}
    return sum(pairs[mask] * layers for mask, layers in masks.items()) / masks.total()
