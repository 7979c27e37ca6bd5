"""Domino against its description: the tensors and keys that SGLang loads, torch's own recurrent unit and the loss
through full logits, and proposals that a walk by hand gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dflash_dist.config import load_config
from dflash_dist.contract.folder import read_draft, write_draft
from dflash_dist.decoding.sampling import Sampling
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.kinds.domino import DominoDraftModel, DominoShape
from dflash_dist.export.check import check
from dflash_dist.export.export import main as export
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
V, MEMORY, WIDTH = 260, 12, 8


def shape(**changes) -> DominoShape:
    return DominoShape(**vars(tiny_shape(block_size=K)) | {"gru_hidden_dim": MEMORY, "emb_dim": WIDTH} | changes)


def lively() -> DominoDraftModel:
    """With parameters that all matter."""
    torch.manual_seed(0)
    draft, generator = DominoDraftModel(shape()), torch.Generator().manual_seed(5)
    draft.load_state_dict(draft.state_dict() | lively_draft(tiny_shape(block_size=K)).state_dict())
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name.startswith(("prefix_gru", "embed_proj")):
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return draft


def slow_added(draft: DominoDraftModel, states: torch.Tensor, tokens: list[int], embedding: torch.Tensor):
    """What is added to the logits of the first slots of a block, from torch's own unit."""
    unit = nn.GRU(64, MEMORY, bias=False)
    # With the draft's own parameters, so that their gradients are asked for.
    memories, _ = torch.func.functional_call(unit, dict(draft.prefix_gru.items()), embedding[tokens])
    first, _, last = draft.embed_proj
    of_all = [last.weight @ F.silu(first.weight @ torch.cat(pair)) for pair in zip(states, memories)]
    return [torch.zeros(V), *of_all[1:]]


def test_tensors_have_the_names_and_shapes_that_the_engine_loads() -> None:
    plain = DFlashDraftModel.tensors(tiny_shape())
    assert {name: size for name, size in DominoDraftModel.tensors(shape()).items() if name not in plain} == {
        "prefix_gru.weight_ih_l0": [3 * MEMORY, 64],
        "prefix_gru.weight_hh_l0": [3 * MEMORY, MEMORY],
        "embed_proj.0.weight": [WIDTH, 64 + MEMORY],
        "embed_proj.2.weight": [V, WIDTH],
    }


def test_the_config_has_the_keys_that_the_engine_reads() -> None:
    config = DominoDraftModel.to_config(shape(), "bfloat16")
    sizes = {"gru_hidden_dim": MEMORY, "emb_dim": WIDTH}
    stated = {"projector_type": "domino", "shift_label": False, "pure_draft_prefix_len": 1, **sizes}
    assert config["architectures"] == ["DFlashDraftModel"]
    assert stated.items() <= config["dflash_config"].items() and sizes.items() <= config.items()
    published = DominoShape(**vars(tiny_shape()))
    assert (published.gru_hidden_dim, published.emb_dim) == (1024, 256)


def test_at_its_beginning_it_proposes_what_the_plain_draft_does() -> None:
    case, draft = packed_case(), DominoDraftModel(shape())
    draft.load_state_dict(draft.state_dict() | case.draft.state_dict())
    hidden = draft(case.blocks, case.features, case.embedding)
    assert torch.equal(hidden, case.draft(case.blocks, case.features, case.embedding))
    states, head = hidden[0, :9], torch.randn(V, 64)
    assert torch.equal(draft.scores(states, torch.arange(9), head, case.embedding), states @ head.T)


# -------------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize("alpha", [None, 0.5], ids=["decay", "dpace"])
@pytest.mark.parametrize("progress", [0.0, 0.3])
def test_loss_gradients_and_what_is_shown_are_those_of_full_logits(progress: float, alpha: float | None) -> None:
    case, draft = packed_case(), lively()
    batch, head = case.blocks, 0.4 * torch.randn(V, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for slowly in (True, False):
        draft.zero_grad()
        hidden = draft(batch, case.features, case.embedding)
        hidden = hidden + 1.5 * F.pad(head[batch.labels], (0, 0, 1, 0)).flatten(1, 2)  # right now and then
        if slowly:
            blocks, counted = hidden.unflatten(1, (A, K)), (batch.weights > 0).float()
            with_head, plain, right, plainly = (torch.zeros_like(counted) for _ in range(4))
            for b, a in (batch.weights[..., 0] > 0).nonzero().tolist():
                tokens = [int(batch.slot_ids[b, a, 0]), *batch.labels[b, a].tolist()][:-1]
                added = slow_added(draft, blocks[b, a, 1:], tokens, case.embedding)
                for k in batch.weights[b, a].nonzero().flatten().tolist():
                    base, gold = head @ blocks[b, a, k + 1], batch.labels[b, a, k]
                    with_head[b, a, k] = F.cross_entropy(base + added[k], gold)
                    plain[b, a, k] = F.cross_entropy(base, gold)
                    right[b, a, k] = ((base + added[k]).argmax() == gold).float()
                    plainly[b, a, k] = (base.argmax() == gold).float()
            weights = batch.weights
            if alpha is not None:
                of_labels = ((-with_head.detach()).exp() * counted).flatten(0, 1)
                weights = dpace_weights(of_labels, counted.flatten(0, 1), alpha).view_as(counted) * counted
            loss = (weights * (progress * with_head + (1 - progress) * plain)).sum()
            full = counted[..., -1]
            shown = [float(((1 + of.cumprod(-1).sum(-1)) * full).sum() / full.sum()) for of in (right, plainly)]
        else:
            objective = Objective(alpha, 16, kind=draft)
            loss, sums = objective(hidden, head, batch, embedding=case.embedding, progress=progress)
            statistics = Statistics.read(sums)
            shown = [statistics.tau, statistics.of_kind["base_tau"]]
        loss.backward()
        results.append((loss.detach(), shown, {name: p.grad for name, p in draft.named_parameters()}))
    (slow, slow_shown, slow_gradients), (ours, ours_shown, gradients) = results
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)
    assert ours_shown == pytest.approx(slow_shown) and 1 < slow_shown[0] < K and slow_shown[0] != slow_shown[1]
    for name, gradient in slow_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert bool(gradient.any()) == (progress > 0 or not name.startswith(("prefix_gru", "embed_proj"))), name


def test_a_micro_batch_without_an_anchor_gives_every_parameter_a_gradient_of_zero() -> None:
    case, draft = packed_case(), lively()
    empty = case.blocks
    for name in ("weighted", "weights", "labels"):
        value = getattr(empty, name)
        object.__setattr__(empty, name, value[:0] if name == "weighted" else value * 0)
    object.__setattr__(empty, "count", 0)
    hidden = draft(empty, case.features, case.embedding)
    terms = Objective(None, 16, kind=draft)(hidden, torch.zeros(V, 64), empty, embedding=case.embedding, progress=0.5)
    terms.loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in draft.parameters())


# --------------------------------------------------------------------------------------------------------- decoding


def test_a_block_is_chosen_from_left_to_right_by_the_scores_of_the_training() -> None:
    draft = lively()
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
            added = slow_added(draft, states[: slot + 1], tokens, embedding)[-1]
            tokens.append(int((head @ state + added).argmax()))
        teacher_forced = draft.scores(states, torch.tensor(tokens[:-1]), head, embedding)
    assert proposals == tokens[1:] and len(proposals) == K - 1
    torch.testing.assert_close(torch.cat(offered), teacher_forced, rtol=1e-5, atol=1e-4)
    assert proposals != (states @ head.T).argmax(dim=-1).tolist(), "the head matters here"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_target):
    """Folders of runs and their exports, one from a plain draft's export."""
    folder = tmp_path_factory.mktemp("domino")

    def run(name: str, *knobs: str) -> Trainer:
        ours = [f"output_dir={folder / name}", f"target.path={tiny_target}", "validate.every=0"]
        trainer = Trainer(load_config(REPOSITORY / "configs/debug.yaml", [*ours, *knobs]), World(0, 1, CPU))
        trainer.run()
        export(["--run", str(folder / name), "--out", str(folder / f"{name}-draft"), "--dtype", "float32"])
        return trainer

    run("plain", "train.max_steps=1")
    begun = run("begun", "train.max_steps=0", "draft.kind=domino", f"draft.init={folder / 'plain-draft'}")
    of_kind = ["draft.kind=domino", "loss.objective=decay", "draft.options={gru_hidden_dim: 24, emb_dim: 16}"]
    run("trained", "train.max_steps=3", "log.every=1", *of_kind)
    return folder, begun


def test_it_begins_from_a_plain_draft_as_that_draft(trained) -> None:
    folder, begun = trained
    plain = read_draft(folder / "plain-draft", torch.float32, CPU)
    ours = begun.training.draft.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.state_dict().items())
    assert not ours["embed_proj.2.weight"].any() and ours["prefix_gru.weight_hh_l0"].any()


def test_it_trains_is_exported_checked_and_decodes_without_loss(trained, tiny_target) -> None:
    folder, _ = trained
    lines = [json.loads(line) for line in (folder / "trained/metrics.jsonl").read_text().splitlines()]
    assert all({"train/tau", "train/base_tau"} <= line.keys() for line in lines)
    out = folder / "trained-draft"
    assert not [str(line) for line in check(out, str(tiny_target)) if line.kind != "ok"]
    draft = read_draft(out, torch.float32, CPU)
    assert isinstance(draft, DominoDraftModel) and (draft.shape.gru_hidden_dim, draft.shape.emb_dim) == (24, 16)
    assert draft.table.any(), "from the second step on it learns"
    for sampling in (Sampling(), Sampling(1.0, seed=3)):
        decoder = Decoder(lively_target(tiny_target), draft, stop_ids=[2], sampling=sampling)
        assert decoder.speculative(range(10, 20), 40).tokens == decoder.plain(range(10, 20), 40).tokens


def test_the_card_names_the_engine_that_serves_it_and_those_that_do_not(trained) -> None:
    card = (trained[0] / "trained-draft/README.md").read_text()
    assert "--speculative-algorithm DFLASH" in card and "--speculative-num-draft-tokens 8" in card
    assert "This kind of draft is not served by vLLM or transformers." in card and "vllm serve" not in card


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"projector_type": None}, "other tensors", "prefix_gru"),
        ({"shift_label": None}, "as trained", "shift_label None, trained without"),
        ({"shift_label": True}, "as trained", "shift_label True, trained without"),
        ({"emb_dim": 8}, "tensor shapes", r"embed_proj.0.weight is [16, 88], not [8, 88]"),
        ({"gru_hidden_dim": 12}, "keys at the top level", "gru_hidden_dim is 24 at the top level, 12 below"),
    ],
)
def test_check_says_what_is_wrong_with_its_config(
    trained, tmp_path: Path, changes: dict, rule: str, words: str
) -> None:
    for file in (trained[0] / "trained-draft").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    inner = config["dflash_config"] | changes
    config["dflash_config"] = {key: value for key, value in inner.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = {line.rule: str(line) for line in check(tmp_path) if line.kind != "ok"}
    assert words in found[rule], found


def test_the_speculators_layout_has_no_word_for_it(tmp_path) -> None:
    draft = lively()
    with pytest.raises(ValueError, match="the speculators library has no domino: write --format dflash"):
        write_draft(tmp_path, type(draft), draft.shape, draft.state_dict(), "float32", ("org/target", ["Qwen3"]))
