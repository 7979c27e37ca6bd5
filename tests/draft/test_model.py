from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from dflash_dist.batch import Batch
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.layers import ContextCache, DraftLayer, RMSNorm
from dflash_dist.kernels.attention import Attend, OneBlockAttention
from dflash_dist.kernels.attention_cpu import ChunkedAttention
from dflash_dist.kernels.attention_gpu import FlexAttention
from dflash_dist.kernels.elementwise import Rotate
from dflash_dist.kernels.mask import FULL
from dflash_dist.objective.objective import Objective
from tests.reference import DenseAttention, Rows, lively_draft, packed_row, reference_blocks, used_slots
from tests.test_batch import BLOCKS
from tests.tiny import tiny_shape

A, K = 10, 8
BACKENDS = {
    "dense": DenseAttention,
    "chunked": ChunkedAttention,
    "chunked by 2": lambda blocks: ChunkedAttention(blocks, anchors_at_once=2),
    "flex": lambda blocks: FlexAttention(blocks, compiled=False),
}
# torch warns that FlexAttention without a compiler is slow
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@dataclasses.dataclass
class Case:
    """A draft and packed rows to run it on, with random features and embeddings."""

    draft: DFlashDraftModel
    rows: Rows
    blocks: Batch
    features: torch.Tensor  # [B, S, L*H]
    embedding: torch.Tensor  # [V, H]

    def run(self, attend: Attend, blocks: Batch | None = None) -> torch.Tensor:
        """[B, A, K, H]"""
        blocks = blocks or self.blocks
        hidden = self.draft.through_layers(
            self.embedding[blocks.slot_ids.flatten(1)],
            blocks.slot_positions.flatten(1),
            self.features,
            self.rows.position_ids,
            lambda _: attend,
        )
        return hidden.unflatten(1, blocks.slot_ids.shape[1:])


def packed_case(**options: bool) -> Case:
    """Two rows of documents; anchors at first tokens, in the middle, at ends, and fewer than A in the second row."""
    first = packed_row([1] * 9, [0] * 3 + [1] * 17, [1] * 11, length=40)
    second = packed_row([0] * 5 + [1] * 15, [1] * 12, length=40)
    rows = Rows(*(torch.cat(pair) for pair in zip(first, second)))
    blocks = reference_blocks(rows, [[0, 1, 7, 9, 12, 20, 27, 29, 30, 38], [5, 18, 20, 30]], A, K, gamma=4.0)
    generator = torch.Generator().manual_seed(3)
    return Case(
        draft=lively_draft(tiny_shape(block_size=K), **options),
        rows=rows,
        blocks=blocks,
        features=torch.randn(2, 40, 3 * 64, generator=generator),
        embedding=torch.randn(260, 64, generator=generator),
    )


def used_blocks(blocks: Batch) -> list[tuple[int, int]]:
    return [(b, a) for b, a in (blocks.anchor_documents >= 0).nonzero().tolist()]


# ----------------------------------------------------------------------------------------------------------- tensors


def test_names_and_shapes_are_those_of_the_published_drafts():
    # the names that z-lab/dflash, vLLM and SGLang load, with tiny sizes; engines refuse any other
    expected = {
        "fc.weight": (64, 192),
        "hidden_norm.weight": (64,),
        "norm.weight": (64,),
        "layers.0.input_layernorm.weight": (64,),
        "layers.0.mlp.down_proj.weight": (64, 128),
        "layers.0.mlp.gate_proj.weight": (128, 64),
        "layers.0.mlp.up_proj.weight": (128, 64),
        "layers.0.post_attention_layernorm.weight": (64,),
        "layers.0.self_attn.k_norm.weight": (16,),
        "layers.0.self_attn.k_proj.weight": (32, 64),
        "layers.0.self_attn.o_proj.weight": (64, 80),
        "layers.0.self_attn.q_norm.weight": (16,),
        "layers.0.self_attn.q_proj.weight": (80, 64),
        "layers.0.self_attn.v_proj.weight": (32, 64),
    }
    draft = DFlashDraftModel(tiny_shape(num_layers=1, num_attention_heads=5, num_key_value_heads=2))
    assert {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()} == expected
    assert [name for name, _ in draft.named_parameters()] == list(draft.state_dict())
    assert not list(draft.named_buffers())


def test_weights_begin_as_qwen3s():
    torch.manual_seed(0)
    for name, weight in DFlashDraftModel(tiny_shape()).named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name


def test_layers_are_numbered_from_zero():
    names = DFlashDraftModel(tiny_shape(num_layers=3)).state_dict()
    assert len(names) == 3 + 3 * 11
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}


def test_a_layer_is_a_qwen3_layer():
    # transformers' own layer as the oracle for projections, norms, rotary convention and MLP. Without context, and with
    # every slot visible to every other, ours must compute the same, and load its weights by name.
    shape = tiny_shape()
    theirs_config = Qwen3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        attn_implementation="eager",
    )
    draft = lively_draft(shape)
    ours, theirs = draft.layers[0], Qwen3DecoderLayer(theirs_config, 0)
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(37, 45)[None]
    nothing = torch.zeros(1, 2, 0, 16)
    with torch.no_grad():
        output = ours(
            hidden, draft._rope(positions), (nothing, nothing), OneBlockAttention(0, 8, FULL, torch.device("cpu"))
        )
        rope = Qwen3RotaryEmbedding(theirs_config)(hidden, positions)
        expected = theirs(hidden, attention_mask=None, position_embeddings=rope)
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_follows_its_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(16, eps=0.1).to(dtype)  # an eps that shows
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator))
    hidden = torch.randn(5, 16, generator=generator).to(dtype)
    wide, weight = hidden.double(), norm.weight.detach().double()
    expected = weight * wide / (wide.square().sum(-1, keepdim=True) / 16 + 0.1).sqrt()
    output = norm(hidden)
    assert output.dtype == dtype
    # bfloat16 rounds once, at the end: half a unit in the last of 8 bits
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(output.detach().double(), expected, rtol=tolerance, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- RoPE


def test_rope_tables_stay_float32_and_exact_in_a_bfloat16_model():
    # rounding the frequencies to bfloat16 moves position 100000 by hundreds of radians
    positions = torch.tensor([[0, 1, 511, 4096, 100_000]])
    draft = DFlashDraftModel(tiny_shape(head_dim=16, rope_theta=1e6))
    tables = draft._rope(positions)
    rounded = draft.to(torch.bfloat16)._rope(positions)
    frequencies = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = positions[0, :, None].double() * frequencies
    cos, sin = angles.cos(), angles.sin()
    # half-split: both halves turn by the same angles, the first one against the second
    for table, after, exact in zip(tables, rounded, (torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))):
        assert table.dtype == after.dtype == torch.float32
        assert table.shape == (1, 1, 5, 16)
        assert torch.equal(table, after)
        torch.testing.assert_close(table[0, 0].double(), exact, rtol=0, atol=8e-3)  # a float32 angle of 1e5: 4e-3
        torch.testing.assert_close(table[0, 0, :3].double(), exact[:3], rtol=0, atol=5e-5)


def test_rope_is_not_rounded_under_autocast():
    draft = DFlashDraftModel(tiny_shape())
    positions = torch.tensor([[3, 1000, 100_000]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = draft._rope(positions)
    for table, outside in zip(inside, draft._rope(positions)):
        assert table.dtype == torch.float32
        assert torch.equal(table, outside)


def test_products_of_rotated_heads_depend_on_the_distance_only():
    draft = DFlashDraftModel(tiny_shape())
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def product(query_at: int, key_at: int) -> float:
        ropes = [draft._rope(torch.tensor([[at]])) for at in (query_at, key_at)]
        return float((Rotate.apply(query, *ropes[0]) * Rotate.apply(key, *ropes[1])).sum())

    for distance in (0, 1, 7, 300):
        assert product(distance, 0) == pytest.approx(product(1000 + distance, 1000), abs=1e-3)
    assert abs(product(7, 0) - product(0, 0)) > 0.1
    assert abs(product(7, 0) - product(0, 7)) > 0.1  # the sign of the distance counts


def test_outputs_depend_on_relative_positions_only():
    case = packed_case()
    attend = DenseAttention(case.blocks)
    with torch.no_grad():
        plain = case.run(attend)
        case.rows = case.rows._replace(position_ids=case.rows.position_ids + 64)
        only_context_moved = case.run(attend)
        case.blocks = dataclasses.replace(case.blocks, slot_positions=case.blocks.slot_positions + 64)
        all_moved = case.run(attend)
    torch.testing.assert_close(all_moved, plain, rtol=0, atol=1e-4)  # angles of 64 are rounded to 4e-6
    seen = (case.blocks.slot_positions[..., 0] > 64) & (
        case.blocks.anchor_documents >= 0
    )  # sees at least one context token
    assert ((only_context_moved - plain).abs().amax(dim=(2, 3))[seen] > 1e-2).all()


# -------------------------------------------------------------------------------------------- training and inference


@pytest.mark.parametrize("backend", ["dense", "chunked", "flex"])
def test_the_cached_forward_equals_the_training_forward(backend):
    case = packed_case()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        trained = case.run(BACKENDS[backend](case.blocks))
        for b, a in used_blocks(case.blocks):
            anchor, position = int(case.blocks.anchors[b, a]), int(case.blocks.slot_positions[b, a, 0])
            # in pieces of random length, some of them empty, as decoding appends what was accepted
            cuts = torch.randint(0, position + 1, (3,), generator=generator).sort().values.tolist()
            cache = ContextCache()
            for start, end in itertools.pairwise([0, *cuts, position]):
                offset = anchor - position
                case.draft.extend(cache, case.features[b : b + 1, offset + start : offset + end])
            assert cache.length == position
            proposed = case.draft.foresee(cache, case.embedding[case.blocks.slot_ids[b, a]][None])
            torch.testing.assert_close(proposed[0], trained[b, a], rtol=0, atol=5e-6)


def test_a_block_on_a_cache_never_extended_is_refused_or_right_but_does_not_skip_the_layers():
    case = packed_case()
    with torch.no_grad():
        trained = case.run(DenseAttention(case.blocks))[0, 0]  # at a first token
        try:
            proposed = case.draft.foresee(ContextCache(), case.embedding[case.blocks.slot_ids[0, 0]][None])
        except (ValueError, AssertionError):
            return
    torch.testing.assert_close(proposed[0], trained, rtol=0, atol=5e-6)


def test_proposing_leaves_the_cache_as_it_was():
    case = packed_case()
    cache = ContextCache()
    slots = case.embedding[case.blocks.slot_ids[0, 4]][None]
    with torch.no_grad():
        case.draft.extend(cache, case.features[:1, :7])
        kept = [[tensor.clone() for tensor in layer] for layer in cache.layers]
        first = case.draft.foresee(cache, slots)
        second = case.draft.foresee(cache, slots)
    assert cache.length == 7
    assert torch.equal(first, second)
    assert all(torch.equal(x, y) for layer, old in zip(cache.layers, kept, strict=True) for x, y in zip(layer, old))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_packed_document_gives_the_same_blocks_as_alone_in_its_row(backend):
    case = packed_case()
    with torch.no_grad():
        packed = case.run(BACKENDS[backend](case.blocks))
        for b, document in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
            inside = case.rows.document_ids[b] == document
            start = int(inside.int().argmax())
            rows = Rows(*(field[b : b + 1, inside] for field in case.rows))
            rows = rows._replace(document_ids=torch.zeros_like(rows.document_ids))
            mine = (case.blocks.anchor_documents[b] == document).nonzero().flatten()
            anchors = (case.blocks.anchors[b, mine] - start).tolist()
            assert anchors
            blocks = reference_blocks(rows, [anchors], len(anchors), K, gamma=4.0)
            lone = Case(case.draft, rows, blocks, case.features[b : b + 1, inside], case.embedding)
            output = lone.run(BACKENDS[backend](blocks))
            torch.testing.assert_close(output[0], packed[b, mine], rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_block_does_not_depend_on_how_many_others_there_are(backend):
    case = packed_case()
    with torch.no_grad():
        together = case.run(BACKENDS[backend](case.blocks))
        for b, a in used_blocks(case.blocks)[::3]:
            anchors: list[list[int]] = [[], []]
            anchors[b] = [int(case.blocks.anchors[b, a])]
            alone = reference_blocks(case.rows, anchors, 1 + a % 2, K, gamma=4.0)
            output = case.run(BACKENDS[backend](alone), alone)
            torch.testing.assert_close(output[b, 0], together[b, a], rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "backend", ["dense", "flex"]
)  # ChunkedAttention relies on ascending anchors, as `Blocks` promises
def test_a_block_does_not_depend_on_the_order_of_the_others(backend):
    case = packed_case()
    order = torch.randperm(A, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(case.blocks, **{name: getattr(case.blocks, name)[:, order] for name in BLOCKS})
    with torch.no_grad():
        plain = case.run(BACKENDS[backend](case.blocks))
        output = case.run(BACKENDS[backend](shuffled), shuffled)
    torch.testing.assert_close(output, plain[:, order], rtol=0, atol=5e-6)


# ----------------------------------------------------------------------------------------------------------- training


def test_chunked_attention_gives_the_draft_the_gradients_of_the_dense_reference():
    head = torch.randn(260, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for backend in ("dense", "chunked", "chunked by 2"):
        case = packed_case()
        hidden = case.run(BACKENDS[backend](case.blocks)).flatten(1, 2)
        loss, _ = Objective()(hidden, head, case.blocks)
        (loss / case.blocks.weights.sum()).backward()
        gradients.append(dict(case.draft.named_parameters()))
    for name, dense in gradients[0].items():
        assert dense.grad.abs().max() > 1e-3, name
        for other in gradients[1:]:
            torch.testing.assert_close(other[name].grad, dense.grad, rtol=1e-4, atol=2e-6)


def test_gradient_checkpointing_recomputes_each_layer_and_changes_no_gradient():
    head = torch.randn(260, 64, generator=torch.Generator().manual_seed(1))
    gradients, runs = [], []
    for checkpointing in (False, True):
        case = packed_case(gradient_checkpointing=checkpointing)
        calls: list[DraftLayer] = []
        for layer in case.draft.layers:
            layer.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module))
        case.features.requires_grad_()
        hidden = case.run(ChunkedAttention(case.blocks)).flatten(1, 2)
        loss, _ = Objective()(hidden, head, case.blocks)
        loss.backward()
        gradients.append([case.features.grad, *(parameter.grad for parameter in case.draft.parameters())])
        runs.append(len(calls))
    assert runs == [2, 4]
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_under_autocast_the_bfloat16_draft_stays_close_to_the_float32_draft():
    case = packed_case()
    attend = ChunkedAttention(case.blocks)
    with torch.no_grad():
        exact = case.run(attend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = case.run(attend)
    used = used_slots(case.blocks)
    cosine = torch.cosine_similarity(rough.flatten(1, 2)[used].float(), exact.flatten(1, 2)[used], dim=-1)
    assert cosine.min() > 0.999
