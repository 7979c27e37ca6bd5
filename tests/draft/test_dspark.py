"""DSpark against its description: the tensors and keys that engines load, the head's formulas and the loss through full
logits, and proposals that a walk by hand gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dflash_dist.config import load_config
from dflash_dist.contract.folder import read_draft, write_draft
from dflash_dist.decoding.sampling import Sampling
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.kinds.dspark import DSparkDraftModel, DSparkShape
from dflash_dist.export.check import check
from dflash_dist.export.export import main as export
from dflash_dist.kernels.cross_entropy import CPU_WORDS, CROSS_ENTROPY, ChunkedCrossEntropy, Distance
from dflash_dist.objective.objective import Objective
from dflash_dist.objective.statistics import Statistics
from dflash_dist.objective.weights import dpace_weights
from dflash_dist.ranks import World
from dflash_dist.training.setup import unpublished
from dflash_dist.training.trainer import Trainer
from tests.conftest import REPOSITORY
from tests.draft.test_model import A, K, packed_case
from tests.reference import lively_draft
from tests.tiny import lively_target, tiny_shape

CPU = torch.device("cpu")
V, R = 260, 8
HEADS = ["vanilla", "gated", "rnn"]


def shape(**changes) -> DSparkShape:
    return DSparkShape(**vars(tiny_shape(block_size=K)) | {"markov_rank": R} | changes)


def lively(**changes) -> DSparkDraftModel:
    """With parameters that all matter."""
    torch.manual_seed(0)
    draft, generator = DSparkDraftModel(shape(**changes)), torch.Generator().manual_seed(5)
    draft.load_state_dict(draft.state_dict() | lively_draft(tiny_shape(block_size=K)).state_dict())
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "markov" in name or "confidence" in name:
                parameter += 0.8 * torch.randn(parameter.shape, generator=generator)
    return draft


def random_head() -> torch.Tensor:
    return torch.randn(V, 64, generator=torch.Generator().manual_seed(1))


def test_tensors_have_the_names_and_shapes_that_engines_load() -> None:
    plain = DFlashDraftModel.tensors(tiny_shape())

    def added(**changes) -> dict[str, list[int]]:
        return {name: size for name, size in DSparkDraftModel.tensors(shape(**changes)).items() if name not in plain}

    tables = {"markov_head.markov_w1.weight": [V, R], "markov_head.markov_w2.weight": [V, R]}
    confidence = {"confidence_head.proj.weight": [1, 64 + R], "confidence_head.proj.bias": [1]}
    assert added() == tables | confidence
    assert added(enable_confidence_head=False) == tables
    assert added(confidence_head_with_markov=False)["confidence_head.proj.weight"] == [1, 64]
    gate = {"markov_head.gate_proj.weight": [R, 64 + R], "markov_head.gate_proj.bias": [R]}
    assert added(markov_head_type="gated") == tables | gate | confidence
    joint = {"markov_head.joint_proj.weight": [3 * R, 2 * R + 64], "markov_head.joint_proj.bias": [3 * R]}
    assert added(markov_head_type="rnn") == tables | joint | confidence
    with pytest.raises(ValueError, match="markov_head_type simple is none of vanilla, gated and rnn"):
        DSparkDraftModel(shape(markov_head_type="simple"))


def test_the_config_has_the_keys_that_engines_read_where_they_read_them() -> None:
    config = DSparkDraftModel.to_config(shape(), "bfloat16")
    stated = {
        "markov_rank": R,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": False,
        "mask_token_id": 3,
        "target_layer_ids": [1, 2, 4],
        "block_size": K,
    }
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert stated.items() <= config.items() and stated.items() <= config["dflash_config"].items()
    assert DSparkShape(**vars(tiny_shape())).markov_rank == 256


def test_at_its_beginning_it_proposes_what_the_plain_draft_does() -> None:
    case = packed_case()
    for kind in HEADS:
        draft = DSparkDraftModel(shape(markov_head_type=kind))
        draft.load_state_dict(draft.state_dict() | case.draft.state_dict())
        hidden = draft(case.blocks, case.features, case.embedding)
        assert torch.equal(hidden, case.draft(case.blocks, case.features, case.embedding))
        states, head = hidden[0, :9], random_head()
        assert torch.equal(draft.scores(states, torch.arange(9), head), states @ head.T)


# -------------------------------------------------------------------------------------------------------- objective


def slow_rows(draft: DSparkDraftModel, states: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
    """What is multiplied with the second table, slot by slot, as the formulas have it."""
    head = draft.markov_head
    memory, rows = torch.zeros(R), []
    for state, token in zip(states, tokens):
        before = head.markov_w1.weight[token]
        if draft.shape.markov_head_type == "gated":
            before = torch.sigmoid(head.gate_proj(torch.cat([state, before]))) * before
        elif draft.shape.markov_head_type == "rnn":
            gate, new, out = head.joint_proj(torch.cat([memory, before, state])).split(R)
            memory = torch.sigmoid(gate) * memory + (1 - torch.sigmoid(gate)) * torch.tanh(new)
            before = torch.tanh(out)
        rows.append(before)
    return rows


def slow_loss(draft: DSparkDraftModel, hidden, head, batch, final, distance: Distance, alpha: float | None):
    """The loss and what is shown, slot by slot through full logits."""
    blocks, base = hidden.unflatten(1, (A, K)), torch.zeros_like(batch.weights)
    nll, own, right, overlap, off = (torch.zeros_like(base) for _ in range(5))
    for b, a, k in batch.weights.nonzero().tolist():
        gold = int(batch.labels[b, a, k])
        tokens = [int(batch.slot_ids[b, a, 0]), *batch.labels[b, a].tolist()][: k + 1]
        row = slow_rows(draft, blocks[b, a, 1 : k + 2], tokens)[-1]
        logits = head @ blocks[b, a, k + 1] + draft.markov_head.markov_w2.weight @ row
        nll[b, a, k] = F.cross_entropy(logits, torch.tensor(gold))
        right[b, a, k] = accepted = (logits.argmax() == gold).float()
        base[b, a, k] = distance.ce * nll[b, a, k]
        if distance.needs_target:
            p, q = (head @ final[b, batch.anchors[b, a] + k]).softmax(-1), logits.softmax(-1)
            base[b, a, k] = base[b, a, k] + distance.tv * (q - p).abs().sum() / 2
            accepted = torch.minimum(p, q).sum().detach()
        told = draft.confidence_head.proj(
            torch.cat([blocks[b, a, k + 1], draft.markov_head.markov_w1.weight[tokens[-1]]])
        )
        own[b, a, k] = F.binary_cross_entropy_with_logits(told[0], accepted)
        overlap[b, a, k], off[b, a, k] = accepted, (torch.sigmoid(told[0]) - accepted).abs()
    weights, counted = batch.weights, (batch.weights > 0).float()
    if alpha is not None:
        of_labels = (-nll.detach()).exp() * counted
        flat = dpace_weights(of_labels.flatten(0, 1), counted.flatten(0, 1), alpha)
        weights = flat.view_as(base) * counted
    full = counted[..., -1]
    tau = float(((1 + right.cumprod(-1).sum(-1)) * full).sum() / full.sum())
    shown = {"tau": tau, "overlap": float(overlap.sum() / counted.sum())}
    shown["confidence_error"] = float(off.detach().sum() / counted.sum())
    return (weights * (base + 0.7 * own)).sum(), shown


@pytest.mark.parametrize("alpha", [None, 0.5], ids=["decay", "dpace"])
@pytest.mark.parametrize("distance", [Distance(ce=1.0), Distance(ce=0.1, tv=1.8)], ids=["labels", "target"])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_gradients_and_what_is_shown_are_those_of_full_logits(kind: str, distance: Distance, alpha) -> None:
    case, draft = packed_case(), lively(markov_head_type=kind)
    generator = torch.Generator().manual_seed(2)
    head, noise = 0.4 * torch.randn(V, 64, generator=generator), torch.randn(2, 40, 64, generator=generator)
    final = noise + head[case.blocks.input_ids.roll(-1, 1)]  # the target is often right, too
    results = []
    for slowly in (True, False):
        draft.zero_grad()
        hidden = draft(case.blocks, case.features, case.embedding)
        hidden = hidden + 1.5 * F.pad(head[case.blocks.labels], (0, 0, 1, 0)).flatten(1, 2)  # right now and then
        if slowly:
            loss, shown = slow_loss(draft, hidden, head, case.blocks, final, distance, alpha)
        else:
            objective = Objective(alpha, 16, distance, kind=draft, kind_weight=0.7)
            loss, sums = objective(hidden, head, case.blocks, final)
            statistics = Statistics.read(sums)
            shown = {"tau": statistics.tau, **statistics.of_kind}
        (0.37 * loss).backward()  # the trainer divides by the step's total weight
        results.append((loss.detach(), shown, {name: p.grad for name, p in draft.named_parameters()}))
    (slow, slow_shown, slow_gradients), (ours, ours_shown, gradients) = results
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)
    assert ours_shown == pytest.approx(slow_shown, rel=1e-5)
    assert 1 < slow_shown["tau"] < K and 0.1 < slow_shown["overlap"] < 0.95
    for name, gradient in slow_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert gradient.abs().max() > 0, name


def test_a_table_of_more_words_than_are_multiplied_at_once() -> None:
    generator, count, vocab = torch.Generator().manual_seed(0), 70, 2 * CPU_WORDS + 90
    hidden, head, table = (torch.randn(n, 16, generator=generator) for n in (count, vocab, vocab))
    rows, weights = torch.randn(count, 16, generator=generator), torch.rand(count, generator=generator)
    labels = torch.randint(vocab, (count,), generator=generator)
    learned = [tensor.requires_grad_() for tensor in (hidden, rows, table)]
    expected = (weights * F.cross_entropy(hidden @ head.T + rows @ table.T, labels, reduction="none")).sum()
    slow = torch.autograd.grad(expected, learned)
    loss, *_ = ChunkedCrossEntropy.apply(hidden, head, labels, 32, 0, CROSS_ENTROPY, None, rows, table, weights)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, learned), slow):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_a_confidence_head_nothing_is_judged() -> None:
    case, draft, head = packed_case(), lively(enable_confidence_head=False), random_head()
    hidden = draft(case.blocks, case.features, case.embedding)
    loss, sums = Objective(None, 16, kind=draft, kind_weight=9.0)(hidden, head, case.blocks)
    assert Statistics.read(sums).of_kind == {}
    torch.testing.assert_close(loss.item(), Statistics.read(sums).loss_sum)


def test_full_logits_never_exist_and_a_bfloat16_head_stays_within_two_percent() -> None:
    case, draft, head = packed_case(), lively(), 0.4 * random_head()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        draft.zero_grad()
        hidden = draft(case.blocks, case.features, case.embedding)
        loss, _ = Objective(None, 16, kind=draft)(hidden, head.to(dtype), case.blocks)
        loss.backward()
        results.append((float(loss), draft.markov_head.markov_w2.weight.grad))
    (exact, gradient), (rough, rough_gradient) = results
    assert rough == pytest.approx(exact, rel=1e-2) and rough != exact
    assert rough_gradient.dtype == torch.float32
    assert (rough_gradient - gradient).norm() < 2e-2 * gradient.norm()


def test_a_micro_batch_without_an_anchor_gives_every_parameter_a_gradient_of_zero() -> None:
    for kind in HEADS:
        case, draft = packed_case(), lively(markov_head_type=kind)
        empty = case.blocks
        for name in ("weighted", "weights", "labels"):
            value = getattr(empty, name)
            object.__setattr__(empty, name, value[:0] if name == "weighted" else value * 0)
        object.__setattr__(empty, "count", 0)
        hidden = draft(empty, case.features, case.embedding)
        Objective(None, 16, kind=draft)(hidden, random_head(), empty).loss.backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in draft.parameters())


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", HEADS)
def test_a_block_is_chosen_from_left_to_right_by_the_scores_of_the_training(kind: str) -> None:
    draft = lively(markov_head_type=kind)
    head, embedding = torch.randn(2, V, 64, generator=torch.Generator().manual_seed(3))
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
        tokens = [42]
        for slot, state in enumerate(states):
            row = slow_rows(draft, states[: slot + 1], tokens)[-1]
            tokens.append(int((head @ state + draft.markov_head.markov_w2.weight @ row).argmax()))
        teacher_forced = draft.scores(states, torch.tensor(tokens[:-1]), head)
    assert proposals == tokens[1:] and len(proposals) == K - 1
    torch.testing.assert_close(torch.cat(offered), teacher_forced, rtol=1e-5, atol=1e-4)
    assert proposals != (states @ head.T).argmax(dim=-1).tolist(), "the head matters here"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_target):
    """Folders of runs and their exports, one from a plain draft's export."""
    folder = tmp_path_factory.mktemp("dspark")

    def run(name: str, *knobs: str) -> Trainer:
        ours = [f"output_dir={folder / name}", f"target.path={tiny_target}", "validate.every=0"]
        trainer = Trainer(load_config(REPOSITORY / "configs/debug.yaml", [*ours, *knobs]), World(0, 1, CPU))
        trainer.run()
        export(["--run", str(folder / name), "--out", str(folder / f"{name}-draft"), "--dtype", "float32"])
        return trainer

    run("plain", "train.max_steps=1")
    begun = run("begun", "train.max_steps=0", "draft.kind=dspark", f"draft.init={folder / 'plain-draft'}")
    of_kind = ["draft.kind=dspark", "loss.objective=decay", "loss.distance={ce: 0.1, tv: 1.8}"]
    run("trained", "train.max_steps=3", "log.every=1", "draft.options={markov_rank: 16}", *of_kind)
    return folder, begun


def test_it_begins_from_a_plain_draft_as_that_draft(trained) -> None:
    folder, begun = trained
    plain = read_draft(folder / "plain-draft", torch.float32, CPU)
    ours = begun.training.draft.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.state_dict().items())
    assert not ours["markov_head.markov_w2.weight"].any()


def test_it_trains_is_exported_checked_and_decodes_without_loss(trained, tiny_target) -> None:
    folder, _ = trained
    lines = [json.loads(line) for line in (folder / "trained/metrics.jsonl").read_text().splitlines()]
    assert all({"train/tau", "train/overlap", "train/confidence_error"} <= line.keys() for line in lines)
    out = folder / "trained-draft"
    assert not [str(line) for line in check(out, str(tiny_target)) if line.kind != "ok"]
    draft = read_draft(out, torch.float32, CPU)
    assert isinstance(draft, DSparkDraftModel) and draft.shape.markov_rank == 16
    assert draft.markov_head.markov_w2.weight.any() and draft.confidence_head.proj.bias.any()
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        decoder = Decoder(lively_target(tiny_target), draft, stop_ids=[2], sampling=sampling)
        assert decoder.speculative(range(10, 20), 40).tokens == decoder.plain(range(10, 20), 40).tokens


def test_the_card_names_the_engines_that_serve_it_and_those_that_do_not(trained) -> None:
    card = (trained[0] / "trained-draft/README.md").read_text()
    assert '"method": "dspark", "model": "trained-draft", "num_speculative_tokens": 7' in card
    assert "--speculative-algorithm DSPARK" in card and "--speculative-num-draft-tokens 8" in card
    assert "This kind of draft is not served by transformers." in card
    assert "from dflash.model" not in card


def broken(folder: Path, to: Path, top: dict | None = None, inner: dict | None = None) -> Path:
    """A copy of a draft with other keys at the top level and in `dflash_config`; None takes one away."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    config["dflash_config"] |= inner or {}
    config |= top or {}
    config["dflash_config"] = {key: value for key, value in config["dflash_config"].items() if value is not None}
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


@pytest.mark.parametrize(
    ("top", "inner", "rule", "words"),
    [
        ({"architectures": ["DFlashDraftModel"]}, {}, "other tensors", "markov_head"),
        ({"markov_rank": None}, {}, "keys at the top level", "markov_rank is missing there"),
        ({"mask_token_id": 5}, {}, "keys at the top level", "mask_token_id is 5 at the top level, 3 below"),
        ({"markov_rank": None}, {"markov_rank": None}, "config", "no key 'markov_rank'"),
        ({"enable_confidence_head": False}, {"enable_confidence_head": False}, "other tensors", "confidence_head"),
        ({"sample_from_anchor": None}, {}, "variant", "sample_from_anchor True"),
        ({"sample_from_anchor": True}, {}, "as trained", "sample_from_anchor True, trained without"),
        ({"markov_head_type": "gated"}, {"markov_head_type": "gated"}, "Markov head", "markov_head_type is gated"),
        ({"confidence_head_with_markov": False}, {"confidence_head_with_markov": False}, "Markov head", "with_markov"),
    ],
)
def test_check_says_where_a_head_is_missing_or_would_be_served_otherwise(
    trained, tmp_path, top: dict, inner: dict, rule: str, words: str
) -> None:
    folder = broken(trained[0] / "trained-draft", tmp_path / "broken", top, inner)
    found = {line.rule: str(line) for line in check(folder) if line.kind != "ok"}
    assert words in found[rule], found


def test_the_speculators_layout_has_it(tmp_path) -> None:
    draft = lively()
    write_draft(tmp_path, type(draft), draft.shape, draft.state_dict(), "float32", ("org/target", ["Qwen3ForCausalLM"]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dspark"
    assert (config["markov_rank"], config["sample_from_anchor"]) == (R, False)
    assert not {"markov_rank", "target_layer_ids", "sample_from_anchor"} & config["transformer_layer_config"].keys()
    read = read_draft(tmp_path, torch.float32, CPU, target_layers=6)
    assert isinstance(read, DSparkDraftModel) and read.shape == draft.shape
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in draft.state_dict().items())
    assert not [str(line) for line in check(tmp_path) if line.kind == "FAULT"]


# --------------------------------------------------------------------------------------------------------- its knobs


def test_options_are_those_of_the_kind(debug_config) -> None:
    def refused(*knobs: str) -> str:
        with pytest.raises(ValueError, match=r"draft\.options") as error:
            Trainer(debug_config(*knobs), World(0, 1, CPU))
        return str(error.value)

    assert "'markov_rank' is none of what draft.kind dflash has: none" in refused("draft.options={markov_rank: 4}")
    kind = "draft.kind=dspark"
    assert "'selector_rank' is none of what draft.kind dspark has: markov_rank, " in refused(
        kind, "draft.options={selector_rank: 4}"
    )
    assert "markov_rank must be a int, found 'many'" in refused(kind, "draft.options={markov_rank: many}")
    assert "markov_rank must be a int, found 0" in refused(kind, "draft.options={markov_rank: 0}")


def test_a_run_says_what_it_learns_otherwise_than_was_published(load) -> None:
    assert unpublished(load()) == []
    told = unpublished(load("draft.kind=dspark", "loss.objective=dpace"))
    assert told == [
        "loss.objective: dpace; draft.kind dspark was published with decay",
        "loss.distance: ce; draft.kind dspark was published with {'ce': 0.1, 'tv': 1.8}",
    ]
    published = ["loss.objective=decay", "loss.distance={tv: 1.8, ce: 0.1}"]
    assert unpublished(load("draft.kind=dspark", *published)) == []
