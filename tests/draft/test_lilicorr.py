"""LiLiCorr against its description: the tensors and keys that engines load, the lattice written out candidate by
candidate, its loss through full logits, and proposals that a walk by hand gives."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from dflash_dist.config import load_config
from dflash_dist.contract.folder import from_config, read_draft, write_draft
from dflash_dist.cost.rank import one_rank
from dflash_dist.decoding.sampling import Sampling
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.kinds.lilicorr import LiLiCorrDraftModel, LiLiCorrShape
from dflash_dist.draft.layers import RMSNorm
from dflash_dist.export.check import check
from dflash_dist.export.export import main as export
from dflash_dist.kernels.cross_entropy import ChunkedCrossEntropy, Distance
from dflash_dist.objective.objective import Objective
from dflash_dist.objective.statistics import Statistics
from dflash_dist.objective.weights import dpace_weights
from dflash_dist.ranks import World
from dflash_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.draft.test_dspark import broken
from tests.draft.test_model import A, K, packed_case, used_blocks
from tests.reference import lively_draft
from tests.tiny import lively_target, tiny_shape

CPU = torch.device("cpu")
V, TOP, WIDTH, HEADS, FACTOR = 260, 4, 24, 2, 12
SIZES = {
    "lilicorr_candidate_topk": TOP,
    "lilicorr_hidden_size": WIDTH,
    "lilicorr_num_layers": 2,
    "lilicorr_num_heads": HEADS,
    "lilicorr_mlp_ratio": 1.5,
    "lilicorr_factor_dim": FACTOR,
    "lilicorr_vector_eps": 1e-4,
    "lilicorr_logit_scale": 5.0,
}
CONVS = {"conv_kernel_size": 2, "conv_group_size": 16}


def shape(**changes) -> LiLiCorrShape:
    return LiLiCorrShape(**vars(tiny_shape(block_size=K)) | SIZES | changes)


def lively(**changes) -> LiLiCorrDraftModel:
    """With parameters that all matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = LiLiCorrDraftModel(shape(**changes))
    draft.load_state_dict(draft.state_dict() | lively_draft(tiny_shape(block_size=K)).state_dict())
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "conv" in name or "lilicorr" in name:
                scale = parameter.shape[-1] ** -0.5 if name.endswith("weight") and parameter.ndim == 2 else 0.3
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return draft


def test_tensors_have_the_names_and_shapes_that_engines_load() -> None:
    plain = DFlashDraftModel.tensors(tiny_shape(block_size=K))

    def added(**changes) -> dict[str, list[int]]:
        return {name: size for name, size in LiLiCorrDraftModel.tensors(shape(**changes)).items() if name not in plain}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}

    expected = {
        "slot_embedding": [1, 1, K - 1, 1, WIDTH],
        "rank_embedding": [1, 1, 1, TOP, WIDTH],
        "relative_slot_bias": [HEADS, 2 * K - 1],
        "same_slot_bias": [HEADS],
        "feature_norm.weight": [5],
        "feature_norm.bias": [5],
        "output_norm.weight": [WIDTH],
        "anchor_norm.weight": [WIDTH],
        **linear("token_proj", WIDTH, 64),
        **linear("pass_hidden_proj", WIDTH, 64),
        **linear("context_proj", WIDTH, 64),
        **linear("feature_mlp.up_proj", WIDTH, 5),
        **linear("feature_mlp.down_proj", WIDTH, WIDTH),
        **linear("factor_input_proj", WIDTH, 3 * WIDTH),
    }
    for head in ("out_head", "in_head", "anchor_out_head"):
        expected |= linear(head, FACTOR, WIDTH)
    for layer in ("layers.0", "layers.1"):
        expected |= {f"{layer}.attn_norm.weight": [WIDTH], f"{layer}.mlp_norm.weight": [WIDTH]}
        expected |= {f"{layer}.attn.in_proj_weight": [3 * WIDTH, WIDTH], f"{layer}.attn.in_proj_bias": [3 * WIDTH]}
        expected |= linear(f"{layer}.attn.out_proj", WIDTH, WIDTH)
        expected |= linear(f"{layer}.mlp.up_proj", 36, WIDTH) | linear(f"{layer}.mlp.down_proj", WIDTH, 36)
    assert added() == {f"lilicorr.{name}": size for name, size in expected.items()}
    narrow = added(lilicorr_hidden_size=64).keys()
    assert {name.replace("lilicorr.", "") for name in added().keys() - narrow} == linear("token_proj", 0, 0).keys()
    convs = {name: size for name, size in added(**CONVS).items() if "lilicorr" not in name}
    assert len(convs) == 8
    assert convs["layers.1.mlp_conv.base_kernel"] == [2, 2, 64]
    assert convs["layers.1.mlp_conv.kernel_projection.weight"] == [2 * 2 * 4, 64]


def test_the_config_has_the_keys_that_engines_read() -> None:
    config = LiLiCorrDraftModel.to_config(shape(), "bfloat16")
    assert config["architectures"] == ["LiLiCorrDraftModel"]
    stated = SIZES | {"lilicorr_enabled": True, "block_size": K}
    assert stated.items() <= config["dflash_config"].items()
    assert not CONVS.keys() & config["dflash_config"].keys()
    assert from_config(config) == shape()
    with_convs = LiLiCorrDraftModel.to_config(shape(**CONVS), "bfloat16")
    assert CONVS.items() <= with_convs["dflash_config"].items() and from_config(with_convs) == shape(**CONVS)
    published = LiLiCorrShape(**vars(tiny_shape()))
    assert [getattr(published, name) for name in SIZES] == [8, 1024, 2, 8, 2.0, 1024, 1e-4, 8.0]


def test_its_head_begins_as_published_and_its_convolutions_as_if_they_were_not_there() -> None:
    case, draft = packed_case(), LiLiCorrDraftModel(shape(**CONVS))
    draft.load_state_dict(draft.state_dict() | case.draft.state_dict())
    hidden = draft(case.blocks, case.features, case.embedding)
    torch.testing.assert_close(hidden, case.draft(case.blocks, case.features, case.embedding), rtol=0, atol=0)
    for name, parameter in draft.lilicorr.named_parameters():
        if parameter.ndim == 2 and name.endswith("weight"):
            assert 0.01 < parameter.std().item() < 0.03, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name


# ---------------------------------------------------------------------------------------------------------- lattice


def rms(norm: RMSNorm, vector: torch.Tensor) -> torch.Tensor:
    return vector / (vector.square().mean() + norm.eps).sqrt() * norm.weight


def slow_vectors(draft: LiLiCorrDraftModel, states, ids, log_probabilities, before, embedding):
    """What follows the anchor, and by (slot, rank) what follows a candidate and what that follows: one block, candidate
    by candidate."""
    head, states = draft.lilicorr, list(states)
    places = [(slot, rank) for slot in range(len(states)) for rank in range(TOP)]
    hidden = {}
    for slot, rank in places:
        told = log_probabilities[slot][rank]
        first = 1.0 if rank == 0 else 0.0
        features = [told, told.exp(), told - log_probabilities[slot].max()]
        features = torch.stack([*features, torch.tensor(rank / (TOP - 1)), torch.tensor(first)])
        features = head.feature_mlp.up_proj(head.feature_norm(features))
        of_token = head.token_proj(embedding[ids[slot][rank]]) + head.feature_mlp.down_proj(F.silu(features))
        place = head.slot_embedding[0, 0, slot, 0] + head.rank_embedding[0, 0, 0, rank]
        hidden[slot, rank] = of_token + head.pass_hidden_proj(states[slot]) + place
    for layer in head.layers:
        attention, size = layer.attn, WIDTH // HEADS
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        q, k, v = (
            {at: F.linear(rms(layer.attn_norm, x), weight[part], bias[part]) for at, x in hidden.items()}
            for part in (slice(start * WIDTH, (start + 1) * WIDTH) for start in range(3))
        )
        attended = {}
        for at in places:
            of_heads = []
            for number in range(HEADS):
                part = slice(number * size, (number + 1) * size)
                logits = [
                    q[at][part] @ k[other][part] / size**0.5
                    + head.relative_slot_bias[number, at[0] - other[0] + K - 1]
                    + head.same_slot_bias[number] * (at[0] == other[0])
                    for other in places
                ]
                shares = torch.stack(logits).softmax(0)
                of_heads.append(sum(share * v[other][part] for share, other in zip(shares, places)))
            attended[at] = hidden[at] + attention.out_proj(torch.cat(of_heads))
        hidden = {
            at: x + layer.mlp.down_proj(F.silu(layer.mlp.up_proj(rms(layer.mlp_norm, x)))) for at, x in attended.items()
        }
    context = torch.zeros(WIDTH)
    if before is not None:
        context = head.context_proj(rms(draft.hidden_norm, draft.fc(before)))
    anchor = rms(head.anchor_norm, context)

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    mixed = {}
    for at, x in hidden.items():
        x = rms(head.output_norm, x)
        mixed[at] = F.silu(head.factor_input_proj(torch.cat([x, anchor, x * anchor])))
    after, follows = ({at: unit(of(x)) for at, x in mixed.items()} for of in (head.out_head, head.in_head))
    return unit(head.anchor_out_head(anchor)), after, follows


def slow_scores(draft: LiLiCorrDraftModel, after: torch.Tensor, follows, slot: int) -> torch.Tensor:
    return draft.shape.lilicorr_logit_scale * torch.stack([after @ follows[slot, rank] for rank in range(TOP)])


def before_of(case, b: int, a: int) -> torch.Tensor | None:
    anchor = int(case.blocks.anchors[b, a])
    return case.features[b, anchor - 1] if case.blocks.slot_positions[b, a, 0] > 0 else None


# -------------------------------------------------------------------------------------------------------- objective


def slow_loss(draft: LiLiCorrDraftModel, hidden, head, case, final, distance: Distance, alpha: float | None):
    """The loss and what is shown, block by block through full logits."""
    batch, logits = case.blocks, (hidden @ head.T).unflatten(1, (A, K))
    states, counted = hidden.unflatten(1, (A, K)), (case.blocks.weights > 0).float()
    nll, base, own, right, plainly, recalled = (torch.zeros_like(batch.weights) for _ in range(6))
    for b, a in used_blocks(batch):
        golds, of_block = batch.labels[b, a].tolist(), logits[b, a, 1:]
        likeliest = of_block.log_softmax(-1).topk(TOP)
        ids, whole = likeliest.indices.tolist(), bool(counted[b, a].all())
        vectors = states[b, a, 1:], ids, likeliest.values, before_of(case, b, a), case.embedding
        after_anchor, after, follows = slow_vectors(draft, *vectors) if whole else (None, {}, {})
        reached = within = whole
        for k in range(int(counted[b, a].sum())):
            q, gold = of_block[k].softmax(-1), golds[k]
            nll[b, a, k] = F.cross_entropy(of_block[k], torch.tensor(gold))
            base[b, a, k] = distance.ce * nll[b, a, k]
            likes = head @ final[b, batch.anchors[b, a] + k]
            if distance.needs_target:
                base[b, a, k] = base[b, a, k] + distance.tv * (q - likes.softmax(-1)).abs().sum() / 2
            plainly[b, a, k] = ids[k][0] == gold
            recalled[b, a, k] = gold in ids[k]
            within = within and gold in ids[k]
            choice = ids[k][0]
            if reached:
                behind = after_anchor if k == 0 else after[k - 1, ids[k - 1].index(golds[k - 1])]
                scores = slow_scores(draft, behind, follows, k)
                choice = ids[k][int(scores.argmax())]
            right[b, a, k] = choice == gold
            reached = whole and gold in ids[k]
            if within:
                place = ids[k].index(gold)
                lead = scores[place] - max(score for rank, score in enumerate(scores) if rank != place)
                own[b, a, k] = 0.125 * F.cross_entropy(scores, torch.tensor(place)) + 0.125 * F.relu(2 - lead)
                if distance.needs_target:
                    worse = torch.stack([F.relu(likes[gold] - likes[token]) for token in ids[k]])
                    own[b, a, k] = own[b, a, k] + 0.25 * scores.softmax(-1) @ worse
    weights = batch.weights
    if alpha is not None:
        learnt = (-nll.detach()).exp() * counted
        weights = dpace_weights(learnt.flatten(0, 1), counted.flatten(0, 1), alpha).view_as(base) * counted
    full = counted[..., -1]

    def tau(of: torch.Tensor) -> float:
        return float(((1 + of.cumprod(-1).sum(-1)) * full).sum() / full.sum())

    shown = {"tau": tau(right), "accuracy": float((right * counted).sum() / counted.sum())}
    shown |= {"base_tau": tau(plainly), "recall": float(recalled.sum() / counted.sum())}
    return (weights * (base + 0.7 * own)).sum(), shown


@pytest.mark.parametrize(
    ("distance", "alpha", "convs"),
    [(Distance(ce=1.0), None, {}), (Distance(ce=1.0), 0.5, CONVS), (Distance(ce=0.3, tv=0.7), None, {})],
    ids=["labels", "convolutions and dpace", "target"],
)
def test_loss_gradients_and_what_is_shown_are_those_of_full_logits(distance: Distance, alpha, convs) -> None:
    case, draft, generator = packed_case(), lively(**convs), torch.Generator().manual_seed(2)
    head, noise = 0.4 * torch.randn(V, 64, generator=generator), torch.randn(2, 40, 64, generator=generator)
    final = noise + 0.3 * head[case.blocks.input_ids.roll(-1, 1)]
    results = []
    for slowly in (True, False):
        draft.zero_grad()
        hidden = draft(case.blocks, case.features, case.embedding)
        # Labels are among the candidates by chance alone otherwise: now often enough, and not always.
        hidden = hidden + 1.2 * F.pad(head[case.blocks.labels], (0, 0, 1, 0)).flatten(1, 2)
        if slowly:
            loss, shown = slow_loss(draft, hidden, head, case, final, distance, alpha)
        else:
            objective = Objective(alpha, 16, distance, kind=draft, kind_weight=0.7)
            loss, sums = objective(hidden, head, case.blocks, final, case.features, case.embedding)
            statistics = Statistics.read(sums)
            shown = {"tau": statistics.tau, "accuracy": statistics.accuracy, **statistics.of_kind}
        (0.37 * loss).backward()  # the trainer divides by the step's total weight
        results.append((loss.detach(), shown, {name: p.grad for name, p in draft.named_parameters()}))
    (slow, slow_shown, slow_gradients), (ours, ours_shown, gradients) = results
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)
    assert ours_shown == pytest.approx(slow_shown)
    assert 1 < slow_shown["tau"] < K and 0.3 < slow_shown["recall"] < 1 and slow_shown["tau"] != slow_shown["base_tau"]
    for name, gradient in slow_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("distance", [Distance(ce=1.0), Distance(0.3, 0.5, 0.7, 0.0, 1.7)], ids=["labels", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probability_of_a_candidate_has_the_gradient_of_a_log_softmax(distance: Distance, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, 70, 32, generator=generator)
    head = 0.5 * torch.randn(2560, 32, generator=generator).to(dtype)
    labels, given = torch.randint(2560, (70,), generator=generator), torch.randn(70, 5, generator=generator)
    ours, slowly = (hidden.clone().requires_grad_() for _ in range(2))
    loss, nll, *_, of_target, ids, logits = ChunkedCrossEntropy.apply(
        *(ours, head, labels, 64, 5, distance, theirs if distance.needs_target else None)
    )
    log_probabilities = logits[:, :-1] - (nll + logits[:, -1])[:, None]
    ((given * log_probabilities).sum() + 0 * loss.sum()).backward()
    exact = (slowly @ head.float().T).log_softmax(-1).gather(1, ids[:, :-1])
    (given * exact).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(log_probabilities, exact, rtol=tolerance, atol=tolerance)
    assert (ours.grad - slowly.grad).norm() <= tolerance * slowly.grad.norm()
    if distance.needs_target:
        torch.testing.assert_close(of_target, (theirs @ head.float().T).gather(1, ids), rtol=tolerance, atol=0.1)
    else:
        assert not of_target.any()


def test_a_blocks_own_loss_has_no_gradient_from_other_blocks() -> None:
    case, draft, generator = packed_case(), lively(), torch.Generator().manual_seed(2)
    head = 0.4 * torch.randn(V, 64, generator=generator)
    first, batch = packed_case().blocks, case.blocks
    whole = (batch.weights[..., -1] > 0).nonzero().tolist()
    b, a = whole[1]
    only = torch.zeros_like(batch.weights)
    only[b, a] = first.weights[b, a]
    batch = dataclasses.replace(batch, weights=only, weighted=only.flatten().nonzero().flatten(), count=K - 1)
    hidden = draft(batch, case.features, case.embedding).detach()
    hidden = (hidden + 1.2 * F.pad(head[batch.labels], (0, 0, 1, 0)).flatten(1, 2)).requires_grad_()
    features = case.features.clone().requires_grad_()
    Objective(None, 16, kind=draft)(hidden, head, batch, None, features, case.embedding).loss.backward()
    of_blocks = hidden.grad.unflatten(1, (A, K)).abs()
    assert (of_blocks[b, a, 1:].amax(-1) > 0).all() and not of_blocks[b, a, 0].any()
    of_blocks[b, a] = 0
    assert not of_blocks.any()
    of_rows = features.grad.abs().amax(-1)
    assert of_rows.nonzero().tolist() == [[b, int(batch.anchors[b, a]) - 1]], "the token before the anchor, no other"


def test_a_micro_batch_without_an_anchor_gives_every_parameter_a_gradient_of_zero() -> None:
    for changes in ({}, CONVS):
        case, draft = packed_case(), lively(**changes)
        empty, none = case.blocks, torch.zeros_like(case.blocks.weights)
        empty = dataclasses.replace(empty, weights=none, labels=none.long(), weighted=empty.weighted[:0], count=0)
        hidden = draft(empty, case.features, case.embedding)
        objective = Objective(None, 16, kind=draft)
        objective(hidden, torch.randn(V, 64), empty, None, case.features, case.embedding).loss.backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in draft.parameters())


# --------------------------------------------------------------------------------------------------------- decoding


def test_a_block_is_chosen_from_left_to_right_by_the_scores_of_the_training() -> None:
    draft, generator = lively(), torch.Generator().manual_seed(3)
    head, embedding = torch.randn(2, V, 64, generator=generator)
    features = torch.randn(1, 11, 3 * 64, generator=generator)
    cache = draft.new_cache()
    for part in (features[:, :0], features[:, :7], features[:, 7:]):
        draft.extend(cache, part)
    offered: list[torch.Tensor] = []

    def choose(logits: torch.Tensor, before: int) -> list[int]:
        assert before == len(offered)
        offered.append(logits)
        return logits.argmax(dim=-1).tolist()

    with torch.no_grad():
        proposals = draft.propose(cache, 42, embedding, head, choose)
        states = draft.block_behind(cache, 42, embedding)
        logits = states @ head.T
        likeliest = logits.log_softmax(-1).topk(TOP)
        ids = likeliest.indices.tolist()
        behind, after, follows = slow_vectors(draft, states, ids, likeliest.values, features[0, -1], embedding)
        expected = []
        for slot in range(K - 1):
            rank = int(slow_scores(draft, behind, follows, slot).argmax())
            behind = after[slot, rank]
            expected.append(ids[slot][rank])
        teacher_forced = draft.scores(states, torch.tensor([42, *expected[:-1]]), head, embedding, features[0, -1])
        stray = draft.scores(states, torch.tensor([42, *[V - 1] * (K - 2)]), head, embedding, features[0, -1])
        first = draft.scores(states, torch.tensor([42, *expected[:-1]]), head, embedding, None)
    assert proposals == expected and len(proposals) == K - 1
    assert all(int(row.isfinite().sum()) == TOP for row in offered), "nothing but candidates may be drawn"
    torch.testing.assert_close(torch.cat(offered), teacher_forced, rtol=1e-5, atol=1e-4)
    assert proposals != logits.argmax(dim=-1).tolist(), "the lattice matters here"
    assert not any(V - 1 in of for of in ids)
    assert torch.equal(stray[1:].argmax(-1), logits[1:].argmax(-1)), "behind no candidate the logits choose"
    assert (first - teacher_forced).nan_to_num().abs().amax() > 1e-2, "the token before the anchor matters"


def test_training_and_diagnosis_call_the_same_slots_right() -> None:
    case, draft, generator = packed_case(), lively(), torch.Generator().manual_seed(2)
    head, batch = 0.4 * torch.randn(V, 64, generator=generator), case.blocks
    with torch.no_grad():
        hidden = draft(batch, case.features, case.embedding)
        hidden = hidden + 1.2 * F.pad(head[batch.labels], (0, 0, 1, 0)).flatten(1, 2)
        _, sums = Objective(None, 16, kind=draft)(hidden, head, batch, None, case.features, case.embedding)
        right = torch.zeros(K - 1)
        whole = (batch.weights[..., -1] > 0).nonzero().tolist()
        for b, a in whole:
            of_block = hidden.unflatten(1, (A, K))[b, a, 1:], batch.previous[b, a], head, case.embedding
            right += draft.scores(*of_block, before_of(case, b, a)).argmax(-1) == batch.labels[b, a]
        for b, a in used_blocks(batch):
            if [b, a] not in whole:
                plainly = (hidden.unflatten(1, (A, K))[b, a, 1:] @ head.T).argmax(-1) == batch.labels[b, a]
                right += plainly * (batch.weights[b, a] > 0)
    assert Statistics.read(sums).slot_correct == right.tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_target):
    """Folders of runs and their exports, one from a plain draft's export, one from that of its own kind."""
    folder = tmp_path_factory.mktemp("lilicorr")
    options = f"draft.options={json.dumps(SIZES | CONVS)}"

    def run(name: str, *knobs: str) -> Trainer:
        ours = [f"output_dir={folder / name}", f"target.path={tiny_target}", "validate.every=0"]
        trainer = Trainer(load_config(REPOSITORY / "configs/debug.yaml", [*ours, *knobs]), World(0, 1, CPU))
        trainer.run()
        export(["--run", str(folder / name), "--out", str(folder / f"{name}-draft"), "--dtype", "float32"])
        return trainer

    kind = ["draft.kind=lilicorr", "loss.objective=decay"]
    run("plain", "train.max_steps=1")
    begun = run("begun", "train.max_steps=0", *kind, options, f"draft.init={folder / 'plain-draft'}")
    run("trained", "train.max_steps=3", *kind, "log.every=1", options)
    again = run("again", "train.max_steps=0", *kind, f"draft.init={folder / 'trained-draft'}")
    return folder, begun, again


def test_it_begins_from_a_plain_draft_and_from_one_of_its_kind(trained) -> None:
    folder, begun, again = trained
    plain = read_draft(folder / "plain-draft", torch.float32, CPU)
    ours = begun.training.draft.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.state_dict().items())
    assert again.training.draft.shape == begun.training.draft.shape and again.training.draft.shape.conv_kernel_size == 2
    of_kind = read_draft(folder / "trained-draft", torch.float32, CPU).state_dict()
    ours = again.training.draft.state_dict()
    assert of_kind.keys() == ours.keys() and all(torch.equal(ours[name], of_kind[name]) for name in ours)


def test_it_trains_is_exported_checked_planned_and_decodes_without_loss(trained, tiny_target) -> None:
    folder, *_ = trained
    lines = [json.loads(line) for line in (folder / "trained/metrics.jsonl").read_text().splitlines()]
    assert all({"train/tau", "train/base_tau", "train/recall"} <= line.keys() for line in lines)
    out = folder / "trained-draft"
    assert not [str(line) for line in check(out, str(tiny_target)) if line.kind != "ok"]
    draft = read_draft(out, torch.float32, CPU)
    assert isinstance(draft, LiLiCorrDraftModel) and draft.lilicorr.slot_embedding.any()
    assert draft.layers[0].mlp_conv.kernel_projection.weight.any()
    with one_rank(load_config(folder / "trained/config.yaml"), AutoConfig.from_pretrained(tiny_target), 1) as rank:
        assert rank.step().work["loss"].flops > 0
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        decoder = Decoder(lively_target(tiny_target), draft, stop_ids=[2], sampling=sampling)
        assert decoder.speculative(range(10, 20), 40).tokens == decoder.plain(range(10, 20), 40).tokens
    decoder = Decoder(lively_target(tiny_target), draft, stop_ids=[], sampling=Sampling(1.0, rejection=True))
    assert len(decoder.speculative(range(10, 20), 40).tokens) == 40


def test_the_card_names_the_engines_that_serve_it_and_the_one_that_does_not(trained) -> None:
    card = (trained[0] / "trained-draft/README.md").read_text()
    assert '"method": "dflash", "model": "trained-draft", "num_speculative_tokens": 7' in card
    assert "--speculative-algorithm DFLASH" in card and "--speculative-num-draft-tokens 8" in card
    assert "This kind of draft is not served by transformers." in card


@pytest.mark.parametrize(
    ("top", "inner", "rule", "words"),
    [
        ({"architectures": ["DFlashDraftModel"]}, {}, "other tensors", "does not belong into a draft"),
        ({"architectures": ["DFlash2DraftModel"]}, {}, "config", "no key 'selector_rank'"),
        ({}, {"lilicorr_logit_scale": None}, "config", "no key 'lilicorr_logit_scale'"),
        ({}, {"lilicorr_logit_scale": 4.0}, "as trained", "lilicorr_logit_scale is 4.0, trained with 5.0"),
        ({}, {"lilicorr_enabled": False}, "config", "lilicorr_enabled is false"),
        ({}, {"lilicorr_candidate_topk": 6}, "config", "lilicorr_candidate_topk 6 is none of 2, 4, 8 and 16"),
        ({}, {"lilicorr_hidden_size": 64}, "other tensors", "lilicorr.token_proj"),
        ({}, {"conv_kernel_size": None}, "config", "conv_kernel_size and conv_group_size go together"),
        ({}, {"conv_kernel_size": None, "conv_group_size": None}, "other tensors", "attention_conv.base_kernel"),
    ],
)
def test_check_says_where_a_head_is_missing_or_would_be_dropped(trained, tmp_path, top, inner, rule, words) -> None:
    folder = broken(trained[0] / "trained-draft", tmp_path / "broken", top, inner)
    found = {line.rule: str(line) for line in check(folder) if line.kind != "ok"}
    assert words in found[rule], found


def test_check_misses_a_tensor_of_the_head(trained, tmp_path) -> None:
    draft = read_draft(trained[0] / "trained-draft", torch.float32, CPU)
    tensors = dict(draft.state_dict())
    tensors.pop("lilicorr.out_head.bias")
    with pytest.raises(ValueError, match=r"lilicorr\.out_head\.bias is missing"):
        write_draft(tmp_path, type(draft), draft.shape, tensors, "float32")


def test_the_speculators_layout_has_no_such_draft(tmp_path) -> None:
    draft = lively()
    of_target = "org/target", ["Qwen3ForCausalLM"]
    with pytest.raises(ValueError, match="the speculators library has no LiLiCorrDraftModel: write --format dflash"):
        write_draft(tmp_path, type(draft), draft.shape, draft.state_dict(), "float32", of_target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{lilicorr_candidate_topk: 3}", "lilicorr_candidate_topk 3 is none of 2, 4, 8 and 16"),
        ("{lilicorr_num_heads: 3}", "lilicorr_num_heads 3 does not divide lilicorr_hidden_size 1024"),
        ("{lilicorr_logit_scale: 0.0}", "lilicorr_logit_scale must be above 0, found 0.0"),
        ("{conv_kernel_size: 2}", "conv_kernel_size and conv_group_size go together: state both or none"),
        ("{conv_kernel_size: 0, conv_group_size: 16}", "conv_kernel_size must be a int . None, found 0"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(debug_config, options: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Trainer(debug_config("draft.kind=lilicorr", f"draft.options={options}"), World(0, 1, CPU))
