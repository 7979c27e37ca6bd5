from __future__ import annotations

import pytest
import torch

from dflash_dist.batch import Batch
from dflash_dist.draft.layers import ContextCache
from dflash_dist.kernels import attention_cpu
from dflash_dist.kernels.attention import training_attention
from dflash_dist.kernels.attention_cpu import ChunkedAttention
from dflash_dist.kernels.attention_gpu import FlexAttention
from dflash_dist.kernels.mask import FULL, Mask
from dflash_dist.objective.objective import Objective
from tests.reference import (
    DenseAttention,
    Rows,
    eligible_anchors,
    lively_draft,
    packed_row,
    random_rows,
    reference_blocks,
    used_slots,
)
from tests.tiny import tiny_shape

A, K = 10, 4
HEADS, KV_HEADS, D = 4, 2, 16
BACKENDS = {
    **{
        f"chunked by {n}": lambda blocks, mask=FULL, n=n: ChunkedAttention(blocks, mask, anchors_at_once=n)
        for n in (1, 3, 16)
    },
    "flex": lambda blocks, mask=FULL: FlexAttention(blocks, mask, compiled=False),
}
both_backends = pytest.mark.parametrize("backend", ["chunked by 1", "chunked by 3", "chunked by 16", "flex"])
# torch warns that FlexAttention without a compiler is slow
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def two_rows() -> tuple[Rows, Batch]:
    """Two rows [2, 30] of several documents, with anchors at first tokens (0, 6, 16) and at the row's end, and fewer
    anchors than A."""
    first = packed_row([1] * 6, [1] * 10, [0] + [1] * 13, length=30)
    second = packed_row([0, 0] + [1] * 8, [1] * 12, length=30)
    rows = Rows(*(torch.cat(pair) for pair in zip(first, second)))
    anchors = [[0, 1, 4, 6, 7, 15, 16, 20, 28, 29], [2, 8, 10, 11, 20]]
    return rows, reference_blocks(rows, anchors, A, K, gamma=4.0)


def random_inputs(rows: Rows, blocks: Batch, seed: int = 0) -> list[torch.Tensor]:
    """Query, context key and value, block key and value."""
    generator = torch.Generator().manual_seed(seed)
    b, length = rows.input_ids.shape
    slots = blocks.anchors.shape[1] * blocks.slots
    sizes = [(HEADS, slots), (KV_HEADS, length), (KV_HEADS, length), (KV_HEADS, slots), (KV_HEADS, slots)]
    return [torch.randn(b, heads, tokens, D, generator=generator) for heads, tokens in sizes]


def outputs_and_gradients(attend, inputs: list[torch.Tensor], blocks: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The used slots' outputs, and the gradients of a random weighting of them, with respect to all five inputs."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = attend(*inputs).transpose(1, 2)[used_slots(blocks)]
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return output.detach(), list(torch.autograd.grad((output * cotangent).sum(), inputs))


def draft_inputs(draft, rows: Rows, blocks: Batch, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Slots, slot positions, features, context positions; random slots and features, with gradient."""
    shape, generator = draft.shape, torch.Generator().manual_seed(seed)
    b, length = rows.input_ids.shape
    width = len(shape.target_layer_ids) * shape.hidden_size
    slots = torch.randn(b, blocks.slot_ids[0].numel(), shape.hidden_size, generator=generator, requires_grad=True)
    features = torch.randn(b, length, width, generator=generator, requires_grad=True)
    return slots, blocks.slot_positions.flatten(1), features, rows.position_ids


def run_draft(draft, slots, slot_positions, features, positions, attend) -> torch.Tensor:
    """The draft's forward with this attention in every layer."""
    return draft.through_layers(slots, slot_positions, features, positions, lambda _: attend)


def run_chunked(rows: Rows, blocks: Batch, anchors_at_once: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots and features, both with gradient, and the hidden states [B, A, K, H] of a lively draft."""
    draft = lively_draft(tiny_shape(block_size=K))
    slots, slot_positions, features, positions = draft_inputs(draft, rows, blocks)
    attend = ChunkedAttention(blocks, anchors_at_once=anchors_at_once)
    hidden = run_draft(draft, slots, slot_positions, features, positions, attend)
    return slots, features, hidden.unflatten(1, (A, K))


# ------------------------------------------------------------------------------------------- equal to the reference


@pytest.fixture(params=[False, True], ids=["all heads at once", "heads in turns"])
def heads_in_turns(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(attention_cpu, "MAX_SCORES", 1)


@pytest.mark.parametrize("anchors_at_once", [1, 3, 16, 64])
def test_chunked_attention_equals_the_dense_reference(anchors_at_once, heads_in_turns):
    rows, blocks = two_rows()
    inputs = random_inputs(rows, blocks)
    attend = ChunkedAttention(blocks, anchors_at_once=anchors_at_once)
    output, gradients = outputs_and_gradients(attend, inputs, blocks)
    expected, expected_gradients = outputs_and_gradients(DenseAttention(blocks), inputs, blocks)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    for gradient, dense in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, dense, rtol=0, atol=3e-6)


def test_chunked_attention_in_bfloat16_is_off_by_its_rounding_alone(heads_in_turns):
    rows, blocks = two_rows()
    rounded = [each.bfloat16() for each in random_inputs(rows, blocks)]
    exact = [each.float() for each in rounded]
    expected, expected_gradients = outputs_and_gradients(DenseAttention(blocks), exact, blocks)
    attend = training_attention(blocks, torch.bfloat16, FULL)
    output, gradients = outputs_and_gradients(attend, rounded, blocks)
    for ours, dense in zip([output, *gradients], [expected, *expected_gradients], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - dense).norm() < 2**-7 * dense.norm()


def test_what_runs_share_is_summed_in_float32():
    # As many runs as anchors; every query looks at all it sees alike, and asks for the same: no two terms cancel.
    anchors = list(range(1, 200))
    rows = packed_row([1] * 201, length=201)
    blocks = reference_blocks(rows, [anchors], len(anchors), 2, gamma=4.0)
    inputs = [
        torch.ones(1, 1, tokens, D) for tokens in (2 * len(anchors), 201, 201, 2 * len(anchors), 2 * len(anchors))
    ]
    attend = ChunkedAttention(blocks, anchors_at_once=1, context_step=256)
    gradients = []
    for of, dtype in ((attend, torch.bfloat16), (DenseAttention(blocks), torch.float32)):
        value = inputs[2].to(dtype).requires_grad_()
        of(*(each.to(dtype) for each in inputs[:2]), value, *(each.to(dtype) for each in inputs[3:])).sum().backward()
        gradients.append(value.grad.float())
    torch.testing.assert_close(*gradients, rtol=2**-8, atol=0)


@pytest.mark.parametrize("seed", range(6))
@both_backends
def test_backends_equal_the_dense_reference_on_random_rows(backend, seed):
    rows = random_rows(seed, rows=3)
    allowed = [eligible_anchors(mask, ids) for mask, ids in zip(rows.loss_mask, rows.document_ids)]
    blocks = reference_blocks(rows, [each[seed % 2 :: 2][:A] for each in allowed], A, K, gamma=4.0)
    inputs = random_inputs(rows, blocks, seed)
    output = BACKENDS[backend](blocks)(*inputs)
    expected = DenseAttention(blocks)(*inputs)
    used = used_slots(blocks)
    torch.testing.assert_close(output.transpose(1, 2)[used], expected.transpose(1, 2)[used], rtol=0, atol=2e-6)


MASKS = {
    "a window": Mask(window=5),
    "a window shorter than a block": Mask(window=2),
    "causal": Mask(causal=True),
    "a causal window": Mask(window=7, causal=True),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@both_backends
def test_backends_see_what_the_mask_says(backend, mask, heads_in_turns):
    rows, blocks = two_rows()
    inputs = random_inputs(rows, blocks)
    attend = BACKENDS[backend](blocks, mask)
    dense = DenseAttention(blocks, mask.window, mask.causal)
    if backend == "flex":  # it has no backward on a CPU
        used = used_slots(blocks)
        ours, theirs = (of(*inputs).transpose(1, 2)[used] for of in (attend, dense))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        return
    output, gradients = outputs_and_gradients(attend, inputs, blocks)
    expected, expected_gradients = outputs_and_gradients(dense, inputs, blocks)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=3e-6)


def test_a_run_begins_where_its_window_does():
    rows = packed_row([1] * 200, length=200)
    blocks = reference_blocks(rows, [list(range(100, 108))], 8, K, gamma=4.0)
    [run] = ChunkedAttention(blocks, Mask(window=9), context_step=1).runs
    assert run.context == slice(92, 107)


class OddMask(Mask):
    """Another rule: of the context, odd places alone; of the block, no neighbour on the left."""

    def sees_context(self, anchor, slot, document, context, context_document):
        return super().sees_context(anchor, slot, document, context, context_document) & (context % 2 == 1)

    def sees_slot(self, block, slot, other_block, other_slot):
        return super().sees_slot(block, slot, other_block, other_slot) & (other_slot != slot - 1)


@pytest.mark.parametrize("mask", [FULL, *MASKS.values(), OddMask()], ids=["full", *MASKS, "another rule"])
def test_decoding_and_every_backend_follow_one_rule(mask):
    """A block behind its cached context, as in decoding, is that block of a training's forward, whatever the rule."""
    rows = packed_row([1] * 30, length=30)
    blocks = reference_blocks(rows, [[0, 1, 9, 22]], 4, K, gamma=4.0)
    draft = lively_draft(tiny_shape(block_size=K))
    draft.masks = [mask] * len(draft.layers)
    slots, slot_positions, features, positions = draft_inputs(draft, rows, blocks)
    forwards = []
    with torch.no_grad():
        for make in BACKENDS.values():
            attend = make(blocks, mask)
            forwards.append(
                run_draft(draft, slots, slot_positions, features, positions, attend).unflatten(1, (4, K))[0]
            )
        for a, anchor in enumerate(blocks.anchors[0].tolist()):
            cache = ContextCache()
            draft.extend(cache, features[:, :anchor])
            decoded = draft.foresee(cache, slots.unflatten(1, (4, K))[:, a])[0]
            for forward in forwards:
                torch.testing.assert_close(forward[a], decoded, rtol=0, atol=1e-5)


def test_flex_attention_equals_the_dense_reference():
    rows, blocks = two_rows()
    inputs = random_inputs(rows, blocks)
    output = FlexAttention(blocks, compiled=False)(*inputs)
    expected = DenseAttention(blocks)(*inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)  # of unused blocks too


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on GPUs only")
def test_the_attention_for_gpus_equals_the_dense_reference_in_outputs_and_gradients():
    rows, blocks = two_rows()
    device = torch.device("cuda")
    inputs = random_inputs(rows, blocks)
    on_device = [tensor.to(device).requires_grad_() for tensor in inputs]
    attend = training_attention(blocks.to(device), torch.float32, FULL)
    assert isinstance(attend, FlexAttention)
    output = attend(*on_device).transpose(1, 2)[used_slots(blocks).to(device)]
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(device)
    gradients = torch.autograd.grad((output * cotangent).sum(), on_device)
    expected, expected_gradients = outputs_and_gradients(DenseAttention(blocks), inputs, blocks)
    # float32 products may run as TF32 there
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=5e-3)
    for gradient, dense in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.cpu(), dense, rtol=0, atol=3e-2)


def test_the_cpu_trains_with_chunked_attention():
    _, blocks = two_rows()
    assert isinstance(training_attention(blocks, torch.float32, FULL), ChunkedAttention)


def test_chunked_attention_holds_no_dense_mask():
    rows = packed_row([1] * 200, length=200)
    blocks = reference_blocks(rows, [list(range(0, 128))], 128, K, gamma=4.0)
    runs = ChunkedAttention(blocks, anchors_at_once=8).runs
    assert len(runs) == 16
    assert max(run.bias.numel() for run in runs) <= 8 * 128  # dense: 512 x 712


# -------------------------------------------------------------------------------------------- who can influence whom


@pytest.mark.parametrize("anchors_at_once", [1, 3, 16])
def test_a_block_has_gradient_from_the_context_before_its_anchor_in_its_document_and_from_nothing_else(anchors_at_once):
    rows, blocks = two_rows()
    _, features, hidden = run_chunked(rows, blocks, anchors_at_once)
    for b, a in [(0, 0), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 8), (1, 1), (1, 2), (1, 4)]:
        anchor, document = int(blocks.anchors[b, a]), int(blocks.anchor_documents[b, a])
        total = hidden[b, a].square().sum() + hidden[b, a].sum()  # the norm alone makes the square nearly constant
        (gradient,) = torch.autograd.grad(total, features, retain_graph=True)
        index = torch.arange(rows.input_ids.shape[1])
        seen = torch.zeros_like(rows.loss_mask)
        seen[b] = (index < anchor) & (rows.document_ids[b] == document)
        assert torch.equal((gradient != 0).any(dim=-1), seen), (b, anchor)
        assert (gradient[seen].abs().amax(dim=-1) > 1e-7).all()


@pytest.mark.parametrize("anchors_at_once", [1, 3, 16])
def test_a_block_has_gradient_from_all_of_its_own_slots_and_from_no_other_block(anchors_at_once):
    rows, blocks = two_rows()
    slots, _, hidden = run_chunked(rows, blocks, anchors_at_once)
    for b, a, slot in [(0, 0, 0), (0, 1, 3), (0, 5, 1), (0, 9, 0), (1, 0, 2), (1, 4, 0)]:
        (gradient,) = torch.autograd.grad(hidden[b, a, slot].sum(), slots, retain_graph=True)
        own = torch.zeros(2, A, dtype=torch.bool)
        own[b, a] = True
        # earlier slots have gradient from later ones: the block is bidirectional
        assert torch.equal((gradient != 0).any(dim=-1), own.repeat_interleave(K, dim=1)), (b, a, slot)


@both_backends
def test_only_a_visible_context_token_changes_a_block(backend):
    rows, blocks = two_rows()
    draft = lively_draft(tiny_shape(block_size=K))
    slots, slot_positions, features, positions = draft_inputs(draft, rows, blocks)
    attend = BACKENDS[backend](blocks)

    def run(token: int | None) -> torch.Tensor:
        changed = features.detach().clone()
        if token is not None:
            changed[0, token] += 3
        with torch.no_grad():
            return run_draft(draft, slots, slot_positions, changed, positions, attend).unflatten(1, (A, K))

    plain = run(None)
    for token in (0, 5, 6, 14, 15, 16, 27, 28, 29):
        changed = (run(token) != plain).flatten(2).any(dim=-1)
        document = rows.document_ids[0, token]
        seen = (token < blocks.anchors[0]) & (blocks.anchor_documents[0] == document)
        assert torch.equal(changed[0], seen), token
        assert not changed[1].any()  # the other row


@both_backends
def test_a_later_slot_changes_the_earlier_slots_of_its_block_and_no_other_block(backend):
    rows, blocks = two_rows()
    draft = lively_draft(tiny_shape(block_size=K))
    slots, slot_positions, features, positions = draft_inputs(draft, rows, blocks)
    attend = BACKENDS[backend](blocks)
    changed_slots = slots.detach().clone().unflatten(1, (A, K))
    changed_slots[0, 4, K - 1] += 3
    with torch.no_grad():
        plain = run_draft(draft, slots, slot_positions, features, positions, attend).unflatten(1, (A, K))
        changed = draft.through_layers(
            changed_slots.flatten(1, 2), slot_positions, features, positions, lambda _: attend
        ).unflatten(1, (A, K))
    difference = (changed - plain).abs().amax(dim=-1)  # [B, A, K]
    assert (difference[0, 4] > 1e-3).all()
    difference[0, 4] = 0
    assert (difference == 0).all()


def test_masking_does_not_depend_on_how_large_a_hidden_score_would_be():
    # an invisible token whose score would swamp every other must still get probability zero
    rows, blocks = two_rows()
    inputs = random_inputs(rows, blocks)
    loud = [tensor.clone() for tensor in inputs]
    # the last token of its document: before the anchors of the next document, visible to none
    loud[1][0, :, 15] = 1e6
    loud[2][0, :, 15] = 1e6
    for make in BACKENDS.values():
        attend = make(blocks)
        assert torch.equal(attend(*loud), attend(*inputs))


# -------------------------------------------------------------------------------------------------- nothing to train


@both_backends
def test_rows_and_blocks_without_an_anchor_give_finite_outputs(backend):
    rows, blocks = two_rows()
    empty = reference_blocks(rows, [[], []], A, K, gamma=4.0)
    partly = reference_blocks(rows, [[], [3]], A, K, gamma=4.0)
    for each in (empty, partly, blocks):
        output = BACKENDS[backend](each)(*random_inputs(rows, each))
        assert output.shape == (2, HEADS, A * K, D)
        assert output.isfinite().all()


def test_a_micro_batch_without_an_anchor_gives_every_parameter_a_gradient_of_zero():
    # DDP waits for a gradient of every parameter; a missing one is a hang, a NaN spoils the step of all ranks
    rows, _ = two_rows()
    blocks = reference_blocks(rows, [[], []], A, K, gamma=4.0)
    draft = lively_draft(tiny_shape(block_size=K))
    hidden = run_draft(draft, *draft_inputs(draft, rows, blocks), ChunkedAttention(blocks))
    head = torch.randn(260, 64, generator=torch.Generator().manual_seed(1))
    loss, _ = Objective()(hidden, head, blocks)
    loss.backward()
    assert hidden.isfinite().all()
    assert loss == 0
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name


def test_a_row_without_an_anchor_adds_nothing_to_the_gradient_of_the_row_beside_it():
    rows, _ = two_rows()
    anchors = [[], [3, 12]]
    head = torch.randn(260, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for start in (0, 1):  # both rows; the second row alone
        part = Rows(*(field[start:] for field in rows))
        blocks = reference_blocks(part, anchors[start:], A, K, gamma=4.0)
        draft = lively_draft(tiny_shape(block_size=K))
        slots, _, features, _ = draft_inputs(draft, rows, reference_blocks(rows, anchors, A, K, gamma=4.0))
        inputs = slots[start:], blocks.slot_positions.flatten(1), features[start:], part.position_ids
        hidden = run_draft(draft, *inputs, ChunkedAttention(blocks))
        loss, _ = Objective()(hidden, head, blocks)
        loss.backward()
        gradients.append([parameter.grad for parameter in draft.parameters()])
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
