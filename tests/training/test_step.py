"""What a step asks of a GPU, shown on machines without one: nothing that waits, and few different shapes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.masking_utils as masking
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

from dflash_dist.batch import PADDING
from dflash_dist.cost.counter import StepCounter
from dflash_dist.cost.rank import FakeGpu, telling_world
from dflash_dist.draft.kinds import dflash
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.kernels import attention_gpu
from dflash_dist.kernels.attention_gpu import FlexAttention
from dflash_dist.training.step import TrainingStep
from tests.steps import ANCHORS, MICRO_BATCH, make_step, packed_rows, step_config
from tests.tiny import lively_target, tiny_shape

BLOCK = tiny_shape().block_size


# ------------------------------------------------------------------------------------ a GPU that computes nothing


class WaitsForCopy(Exception):
    pass


WAITS = (DataDependentOutputException, DynamicOutputShapeException, WaitsForCopy)


class WaitingGpu(FakeGpu):
    """A GPU without numbers: who asks it for one, or for a shape that depends on one, would wait for a real GPU, and
    gets an exception. What lies on the host gets to it by `.to(device, non_blocking=True)` only."""

    def __init__(self) -> None:
        super().__init__(FakeTensorMode(), StepCounter({}))

    def __enter__(self) -> WaitingGpu:
        self.memory.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.memory.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copies = func == torch.Tensor.to and not isinstance(args[0], FakeTensor)
        if copies and not kwargs.get("non_blocking"):
            raise WaitsForCopy
        if func in (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.numpy, torch.tensor, torch.as_tensor):
            raise WaitsForCopy
        return super().__torch_function__(func, types, args, kwargs)


class Trace(TorchDispatchMode):
    """Every operation that reaches the device, with the shapes of its tensors."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("prim", "profiler"):
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            self.operations.append((str(func), *(str(tuple(tensor.shape)) for tensor in tensors)))
        return func(*args, **kwargs)


@pytest.fixture
def fake_step(tiny_target, monkeypatch):
    """Makes a training step that lives on a `WaitingGpu` but for what it does on the host, and a function that runs one
    step of it and returns the operations that reached the GPU."""
    # FlexAttention as on a GPU, backward included, but not compiled: fake tensors are what a compiler would use.
    monkeypatch.setattr(dflash, "training_attention", lambda batch, *_: FlexAttention(batch, compiled=False))
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)  # has no backward on a CPU

    def make(**config: Any) -> tuple[TrainingStep, Callable[[int], list[tuple[str, ...]]]]:
        gpu, leave = WaitingGpu(), contextlib.ExitStack()
        trace = Trace()

        def enter() -> None:
            leave.enter_context(gpu)
            leave.enter_context(trace)

        settings = step_config(**config)
        shape = AutoConfig.from_pretrained(tiny_target)
        with gpu.memory:
            decoder = AutoModel.from_config(shape, dtype=getattr(torch, settings.target.dtype)).requires_grad_(False)
            embedding = decoder.get_input_embeddings().weight.detach()
            draft = DFlashDraftModel(tiny_shape(num_layers=1))
            world = telling_world(1, enter)
            training = make_step(settings, world, packed_rows(8), draft, decoder, embedding, embedding)

        def run(step: int) -> list[tuple[str, ...]]:
            trace.operations = []
            with leave:
                assert training.run(step) is not None
            return trace.operations

        return training, run

    return make


# transformers asks the GPU in every forward of the target whether the rows are packed (find_packed_sequence_indices).
# That is one wait a micro-batch, it does not do it with fake tensors, and it is left out on a real GPU below.


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_never_waits_for_the_gpu(fake_step, precision: str) -> None:
    _, run = fake_step(precision=precision)
    names = {name for step in range(2) for name, *_ in run(step)}  # the optimiser has no state in the first
    assert {"flex_attention", "flex_attention_backward", "aten._fused_adamw_.default"} <= names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_never_waits_for_a_real_gpu(tiny_target, monkeypatch, precision: str) -> None:
    monkeypatch.setattr(masking, "is_tracing", lambda *args: True)  # see above
    config = step_config(precision)
    target = lively_target(tiny_target).to("cuda", getattr(torch, precision))
    ends = target.model.embed_tokens.weight, target.lm_head.weight
    mode = "default"
    world = telling_world(1, lambda: torch.cuda.set_sync_debug_mode(mode), "cuda")
    draft = DFlashDraftModel(tiny_shape()).to("cuda")
    training = make_step(config, world, packed_rows(8), draft, target.model, *ends)
    try:
        for step in range(4):
            mode = "error" if step >= 2 else "default"  # compiled by then
            assert training.run(step) is not None
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.sum().item(),
        lambda values: values.tolist(),
        lambda values: values if values.sum() > 0 else None,
        lambda values: values.cpu(),
        lambda values: values.numpy(),
        lambda values: values.nonzero(),
        lambda values: values[values > 0],
        lambda values: values + torch.tensor([1.0], device=values.device),
    ],
    ids=["item", "tolist", "if", "cpu", "numpy", "nonzero", "mask", "new tensor"],
)
def test_a_fake_gpu_tells_who_waits(wait: Callable[[torch.Tensor], Any]) -> None:
    with WaitingGpu():
        values = torch.zeros(3).to("cpu", non_blocking=True)
        with pytest.raises(WAITS):
            wait(values)


def test_a_fake_gpu_says_that_it_is_one() -> None:
    with WaitingGpu():
        assert torch.zeros(3).to("cpu", non_blocking=True).is_cuda


def test_a_wait_in_the_loss_is_found(fake_step, monkeypatch) -> None:
    training, run = fake_step()
    loss = training.loss

    def waiting(hidden, micro, output):
        total, shown = loss(hidden, micro, output)
        return total * (total.item() > 0), shown

    monkeypatch.setattr(training, "loss", waiting)
    with pytest.raises(WAITS):
        run(0)


def test_the_gpu_sees_as_many_different_steps_as_there_are_padded_numbers_of_labels(fake_step) -> None:
    """Rows, anchors and labels change from step to step, shapes do not. Labels enter the loss in multiples of PADDING,
    and only a fill of what was added for that has another size."""
    training, run = fake_step(micro_batches=1)
    run(0)  # the optimiser has no state yet
    labels, traces = [], []
    for step in range(1, 7):
        (micro,) = training.sample(step)
        labels.append(micro.count)
        traces.append(tuple(operation for operation in run(step) if operation[0] != "aten.fill_.Tensor"))
    padded = {-(-count // PADDING) for count in labels}
    assert len(set(labels)) > len(padded) > 1
    assert len(set(traces)) == len(padded)
    assert max(padded) * PADDING < MICRO_BATCH * ANCHORS * (BLOCK - 1) + PADDING
    beginnings = {trace[: names(trace).index("flex_attention")] for trace in traces}
    assert len(beginnings) == 1


def names(trace: tuple[tuple[str, ...], ...]) -> list[str]:
    return [name for name, *_ in trace]


def test_nothing_is_compiled_again_after_the_first_step(alone, tiny_target, monkeypatch) -> None:
    """Forward only: on a CPU, FlexAttention has no backward."""
    torch._dynamo.reset()
    masks, attends, layers = CompileCounter(), CompileCounter(), CompileCounter()

    counters = {flex.create_block_mask: masks, flex.flex_attention: attends}
    compiled = {f: torch.compile(f, dynamic=False, backend=counter) for f, counter in counters.items()}
    monkeypatch.setattr(attention_gpu, "_compile", compiled.get)
    monkeypatch.setattr(dflash, "training_attention", lambda batch, *_: FlexAttention(batch))
    target, draft = lively_target(tiny_target), DFlashDraftModel(tiny_shape())
    ends = target.model.embed_tokens.weight, target.lm_head.weight
    training = make_step(step_config(), alone, packed_rows(8), draft, target.model, *ends)

    @torch.no_grad()
    def forward(step: int) -> None:
        for micro in training.sample(step):
            training.propose(training.ddp, micro, training.capture(micro))

    for step in range(4):
        forward(step)
        assert (masks.frame_count, attends.frame_count) == (1, 1)
    for layer in draft.layers:
        layer.compile(backend=layers)
    for step in range(4):
        forward(step)
        assert (masks.frame_count, layers.frame_count) == (1, 1)  # one for all layers


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiled_layers_train_alike_and_share_their_graphs(alone, tiny_target, monkeypatch, checkpointing) -> None:
    compiler = CompileCounterWithBackend("aot_eager")  # inductor's code would take a compiler and half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    target = lively_target(tiny_target)
    ends = target.model.embed_tokens.weight, target.lm_head.weight

    def train(layers: int, **settings: Any) -> tuple[dict[str, torch.Tensor], int]:
        """The weights after 3 steps, and how many graphs were compiled."""
        torch._dynamo.reset()
        torch.manual_seed(0)
        draft = DFlashDraftModel(tiny_shape(num_layers=layers), gradient_checkpointing=checkpointing)
        training = make_step(step_config(**settings), alone, packed_rows(8), draft, target.model, *ends)
        before, counts = compiler.frame_count, set()
        for step in range(3):
            training.run(step)
            counts.add(compiler.frame_count - before)
        [graphs] = counts  # nothing is compiled again after the first step
        return draft.state_dict(), graphs

    plain, none = train(layers=3)
    compiled, graphs = train(layers=3, compile=True)
    assert none == 0 < graphs
    assert train(layers=2, compile=True)[1] == graphs  # the first layer, whose slots have no gradient, and the others
    assert plain.keys() == compiled.keys()
    for name, weight in compiled.items():
        torch.testing.assert_close(weight, plain[name], atol=1e-6, rtol=1e-5, msg=name)
