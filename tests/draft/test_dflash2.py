"""DFlash 2 against its description: the tensors and keys that engines load, convolutions and candidates written out
slowly, and proposals that a walk by hand gives."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from dflash_dist.config import load_config
from dflash_dist.contract.folder import read_draft, write_draft
from dflash_dist.decoding.sampling import Sampling
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.kinds.dflash2 import CandidateSelector, DFlash2DraftModel, DFlash2Shape, GroupedConv
from dflash_dist.draft.layers import rope_of
from dflash_dist.export.check import check
from dflash_dist.export.export import main as export
from dflash_dist.kernels.attention import OneBlockAttention
from dflash_dist.kernels.cross_entropy import ChunkedCrossEntropy
from dflash_dist.kernels.mask import FULL
from dflash_dist.objective.objective import Objective
from dflash_dist.objective.statistics import Statistics
from dflash_dist.objective.weights import dpace_weights
from dflash_dist.ranks import World
from dflash_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.draft.test_model import A, K, packed_case
from tests.reference import lively_draft
from tests.tiny import lively_target, tiny_shape

CPU = torch.device("cpu")
V, TOP = 260, 4


def shape(**changes) -> DFlash2Shape:
    sizes = {"conv_kernel_size": 3, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": TOP}
    return DFlash2Shape(**vars(tiny_shape(block_size=K)) | sizes | changes)


def lively(**changes) -> DFlash2DraftModel:
    """With parameters that all matter."""
    draft, generator = DFlash2DraftModel(shape(**changes)), torch.Generator().manual_seed(5)
    draft.load_state_dict(draft.state_dict() | lively_draft(tiny_shape(block_size=K)).state_dict())
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "conv" in name or "selector" in name:
                scale = 0.8 if "selector" in name else 0.3
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return draft


def test_tensors_have_the_names_and_shapes_that_engines_load() -> None:
    tensors = DFlash2DraftModel.tensors(shape(num_layers=1))
    plain = DFlashDraftModel.tensors(tiny_shape(num_layers=1))
    assert {name: size for name, size in tensors.items() if name not in plain} == {
        "layers.0.attention_conv.base_kernel": [2, 3, 64],
        "layers.0.attention_conv.kernel_projection.weight": [2 * 3 * 4, 64],
        "layers.0.mlp_conv.base_kernel": [2, 3, 64],
        "layers.0.mlp_conv.kernel_projection.weight": [2 * 3 * 4, 64],
        "candidate_selector.predecessor_codebook": [V, 8],
        "candidate_selector.successor_codebook": [V, 8],
        "candidate_selector.hidden_projection.weight": [8, 64],
    }


def test_the_config_has_the_keys_that_engines_read() -> None:
    config = DFlash2DraftModel.to_config(shape(), "bfloat16")
    assert config["architectures"] == ["DFlash2DraftModel"]
    sizes = {"conv_kernel_size": 3, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": TOP}
    assert sizes.items() <= config["dflash_config"].items()
    published = DFlash2Shape(**vars(tiny_shape()))
    assert (published.conv_kernel_size, published.conv_group_size) == (2, 16)
    assert (published.selector_rank, published.selector_top_k) == (256, 16)


def test_a_convolution_is_what_its_formula_says_and_stays_inside_a_block() -> None:
    torch.manual_seed(0)
    conv = GroupedConv(shape(), 3, 16)
    conv.base_kernel.data.normal_()
    conv.kernel_projection.weight.data.normal_()
    slots = torch.randn(2, 2 * K, 64)
    kernels = conv.kernels(slots)
    for side in (0, 1):
        result = conv(slots, kernels[side])
        for row, place, channel in [(0, 0, 3), (0, 1, 17), (1, K - 1, 40), (1, K, 63), (1, K + 1, 0)]:
            added = (conv.kernel_projection.weight @ slots[row, place]).view(2, 3, 4)
            expected = sum(
                (conv.base_kernel[side, back, channel] + added[side, back, channel // 16])
                * slots[row, place - back, channel]
                for back in range(3)
                if place % K >= back
            )
            torch.testing.assert_close(result[row, place, channel], expected, rtol=1e-5, atol=1e-5)


def test_at_its_beginning_it_is_the_plain_draft() -> None:
    case = packed_case()
    draft = DFlash2DraftModel(shape())
    draft.load_state_dict(draft.state_dict() | case.draft.state_dict())
    plain = case.draft(case.blocks, case.features, case.embedding)
    torch.testing.assert_close(draft(case.blocks, case.features, case.embedding), plain, rtol=0, atol=0)
    states, head = plain[0, :9], torch.randn(V, 64)
    chosen = draft.scores(states, torch.arange(9), head).argmax(dim=-1)
    assert torch.equal(chosen, (states @ head.T).argmax(dim=-1))


def test_slots_see_no_later_slot_through_convolutions_and_no_other_block_at_all() -> None:
    conv = lively().layers[0].mlp_conv
    slots = torch.randn(1, 2 * K, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for slot, sees in ((K + 3, [K + 1, K + 2, K + 3]), (K + 1, [K, K + 1]), (K, [K])):
        (gradient,) = torch.autograd.grad(conv(slots, conv.kernels(slots)[0])[0, slot].sum(), slots)
        assert gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist() == sees


def test_a_layer_convolves_before_and_behind_attention_and_mlp_by_kernels_of_what_it_reads() -> None:
    layer, generator = lively().layers[0], torch.Generator().manual_seed(1)
    hidden, context = torch.randn(1, K, 64, generator=generator), torch.randn(1, 5, 64, generator=generator)
    rope = rope_of(torch.arange(5, 5 + K)[None], 16, 1e4)
    context = layer.self_attn.key_value(context, rope_of(torch.arange(5)[None], 16, 1e4))
    attend = OneBlockAttention(5, K, FULL, CPU)
    with torch.no_grad():
        x = layer.input_layernorm(hidden)
        kernels = layer.attention_conv.kernels(x)
        x = layer.self_attn(layer.attention_conv(x, kernels[0]), rope, context, attend)
        middle = hidden + layer.attention_conv(x, kernels[1])
        x = layer.post_attention_layernorm(middle)
        kernels = layer.mlp_conv.kernels(x)
        expected = middle + layer.mlp_conv(layer.mlp(layer.mlp_conv(x, kernels[0])), kernels[1])
        torch.testing.assert_close(layer(hidden, rope, context, attend), expected)


# -------------------------------------------------------------------------------------------------------- objective


def slow_loss(
    draft: DFlash2DraftModel, hidden, head, batch, weight, alpha=None
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss and what is shown, slot by slot through full logits."""
    selector = draft.candidate_selector
    logits = (hidden @ head.T).unflatten(1, (A, K))
    states = hidden.unflatten(1, (A, K))
    base = torch.zeros_like(batch.weights)
    own, right, plainly, recalled = (torch.zeros_like(base) for _ in range(4))
    for b, a, k in batch.weights.nonzero().tolist():
        gold, of = int(batch.labels[b, a, k]), logits[b, a, k + 1]
        previous = int(batch.slot_ids[b, a, 0]) if k == 0 else int(batch.labels[b, a, k - 1])
        projected = selector.hidden_projection.weight @ states[b, a, k + 1]
        asked = selector.predecessor_codebook[previous] * projected

        def score(token: int, of=of, asked=asked) -> torch.Tensor:
            return of[token] + asked @ selector.successor_codebook[token]

        likeliest = of.topk(TOP).indices.tolist()
        scores = torch.stack([score(token) for token in likeliest])
        right[b, a, k] = likeliest[int(scores.argmax())] == gold
        plainly[b, a, k] = likeliest[0] == gold
        recalled[b, a, k] = gold in likeliest
        among = likeliest if gold in likeliest else [*likeliest[:-1], gold]
        scores = torch.stack([score(token) for token in among])
        own[b, a, k] = F.cross_entropy(scores, torch.tensor(among.index(gold)))
        base[b, a, k] = F.cross_entropy(of, torch.tensor(gold))
    weights, counted = batch.weights, (batch.weights > 0).float()
    if alpha is not None:
        flat = dpace_weights((-base.detach()).exp().flatten(0, 1) * counted.flatten(0, 1), counted.flatten(0, 1), alpha)
        weights = flat.view_as(base) * counted
    full = counted[..., -1]

    def tau(of: torch.Tensor) -> float:
        return float(((1 + of.cumprod(-1).sum(-1)) * full).sum() / full.sum())

    shown = {"tau": tau(right), "base_tau": tau(plainly), "recall": float(recalled.sum() / counted.sum())}
    return (weights * (base + weight * own)).sum(), shown


@pytest.mark.parametrize("alpha", [None, 0.5], ids=["decay", "dpace"])
def test_loss_gradients_and_what_is_shown_are_those_of_full_logits(alpha) -> None:
    case, draft = packed_case(), lively()
    # Features of unit size leave labels among random candidates by chance alone: a head that knows them has both.
    head = 0.4 * torch.randn(V, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for slowly in (True, False):
        draft.zero_grad()
        hidden = draft(case.blocks, case.features, case.embedding)
        hidden = hidden + 1.5 * F.pad(head[case.blocks.labels], (0, 0, 1, 0)).flatten(1, 2)
        if slowly:
            loss, shown = slow_loss(draft, hidden, head, case.blocks, 0.7, alpha)
        else:
            objective = Objective(alpha, 16, kind=draft, kind_weight=0.7)
            loss, sums = objective(hidden, head, case.blocks)
            statistics = Statistics.read(sums)
            shown = {"tau": statistics.tau, **statistics.of_kind}
        loss.backward()
        results.append((loss.detach(), shown, {name: p.grad for name, p in draft.named_parameters()}))
    (slow, slow_shown, slow_gradients), (ours, ours_shown, gradients) = results
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)
    assert ours_shown == pytest.approx(slow_shown)
    assert 1 < slow_shown["tau"] < K and 0 < slow_shown["recall"] < 1 and slow_shown["tau"] != slow_shown["base_tau"]
    for name, gradient in slow_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("vocab", [260, 256 * 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_are_the_likeliest_tokens_with_their_logits(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 32, generator=generator).to(dtype) for n in (70, vocab))
    labels = torch.randint(vocab, (70,), generator=generator)
    *_, ids, logits = ChunkedCrossEntropy.apply(hidden, head, labels, 64, 6)
    exact = (hidden @ head.T).float()
    assert torch.equal(logits[:, :6], exact.topk(6).values)
    assert torch.equal(logits, exact.gather(1, ids)) and torch.equal(ids[:, 6], labels)


def test_a_micro_batch_without_an_anchor_gives_the_selector_a_gradient_of_zero() -> None:
    case, draft = packed_case(), lively()
    empty = case.blocks
    for name in ("weighted", "weights", "labels"):
        object.__setattr__(empty, name, getattr(empty, name) * 0 if name != "weighted" else empty.weighted[:0])
    object.__setattr__(empty, "count", 0)
    hidden = draft(empty, case.features, case.embedding)
    Objective(None, 16, kind=draft)(hidden, torch.randn(V, 64), empty).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in draft.parameters())


# --------------------------------------------------------------------------------------------------------- decoding


def test_a_block_is_chosen_from_left_to_right() -> None:
    draft, head, embedding = lively(), *(torch.randn(2, V, 64, generator=torch.Generator().manual_seed(3)))
    cache = draft.new_cache()
    draft.extend(cache, torch.randn(1, 11, 3 * 64, generator=torch.Generator().manual_seed(4)))
    offered: list[torch.Tensor] = []

    def choose(logits: torch.Tensor, before: int) -> list[int]:
        assert before == len(offered)
        offered.append(logits)
        return logits.argmax(dim=-1).tolist()

    with torch.no_grad():
        proposals = draft.propose(cache, 42, embedding, head, choose)
        states = draft.block_behind(cache, 42, embedding)
    selector, previous, expected = draft.candidate_selector, 42, []
    for state in states:
        logits = head @ state
        likeliest = logits.topk(TOP).indices.tolist()
        asked = selector.predecessor_codebook[previous] * (selector.hidden_projection.weight @ state)
        scores = [float(logits[token] + asked @ selector.successor_codebook[token]) for token in likeliest]
        previous = likeliest[scores.index(max(scores))]
        expected.append(previous)
    assert proposals == expected and len(proposals) == K - 1
    assert all(int(row.isfinite().sum()) == TOP for row in offered), "nothing but candidates may be drawn"
    assert proposals != [int((head @ state).argmax()) for state in states], "the selector matters here"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_target):
    """A run's folder and its export, from a plain draft's export."""
    folder = tmp_path_factory.mktemp("dflash2")

    def run(name: str, *knobs: str) -> Trainer:
        ours = [f"output_dir={folder / name}", f"target.path={tiny_target}", "validate.every=0"]
        trainer = Trainer(load_config(REPOSITORY / "configs/debug.yaml", [*ours, *knobs]), World(0, 1, CPU))
        trainer.run()
        export(["--run", str(folder / name), "--out", str(folder / f"{name}-draft"), "--dtype", "float32"])
        return trainer

    run("plain", "train.max_steps=1")
    begun = run("begun", "train.max_steps=0", "draft.kind=dflash2", f"draft.init={folder / 'plain-draft'}")
    run("trained", "train.max_steps=3", "draft.kind=dflash2", "log.every=1")
    return folder, begun


def test_it_begins_from_a_plain_draft_as_that_draft(trained) -> None:
    folder, begun = trained
    plain = read_draft(folder / "plain-draft", torch.float32, CPU)
    ours = begun.training.draft.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.state_dict().items())
    assert not ours["candidate_selector.successor_codebook"].any()


def test_it_trains_is_exported_checked_and_decodes_without_loss(trained, tiny_target) -> None:
    folder, _ = trained
    lines = [json.loads(line) for line in (folder / "trained/metrics.jsonl").read_text().splitlines()]
    assert all({"train/tau", "train/base_tau", "train/recall"} <= line.keys() for line in lines)
    out = folder / "trained-draft"
    assert not [str(line) for line in check(out, str(tiny_target)) if line.kind != "ok"]
    draft = read_draft(out, torch.float32, CPU)
    assert isinstance(draft, DFlash2DraftModel) and draft.candidate_selector.successor_codebook.any()
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        decoder = Decoder(lively_target(tiny_target), draft, stop_ids=[2], sampling=sampling)
        assert decoder.speculative(range(10, 20), 40).tokens == decoder.plain(range(10, 20), 40).tokens


def test_check_says_where_a_head_is_missing_or_would_be_dropped(trained, tmp_path) -> None:
    folder, _ = trained
    for name, change, rule in (
        ("plain", {"architectures": ["DFlashDraftModel"]}, "other tensors"),
        ("without", {"selector_rank": None}, "config"),
    ):
        broken = tmp_path / name
        broken.mkdir()
        for file in (folder / "trained-draft").iterdir():
            (broken / file.name).symlink_to(file)
        config = json.loads((broken / "config.json").read_text())
        inner = config["dflash_config"] | change
        config |= {key: value for key, value in change.items() if key in config}
        config["dflash_config"] = {key: value for key, value in inner.items() if value is not None}
        (broken / "config.json").unlink()
        (broken / "config.json").write_text(json.dumps(config))
        assert rule in {line.rule for line in check(broken) if line.kind == "FAULT"}


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="conv_group_size 24 does not divide 64 channels"):
        DFlash2DraftModel(shape(conv_group_size=24))
    assert isinstance(lively().candidate_selector, CandidateSelector)


def test_the_speculators_layout_has_it(tmp_path) -> None:
    draft = lively()
    write_draft(tmp_path, type(draft), draft.shape, draft.state_dict(), "float32", ("org/target", ["Qwen3ForCausalLM"]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dflash2"
    assert (config["conv_kernel_size"], config["selector_top_k"]) == (3, TOP)
    read = read_draft(tmp_path, torch.float32, CPU, target_layers=6)
    assert isinstance(read, DFlash2DraftModel) and read.shape == draft.shape
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in draft.state_dict().items())
