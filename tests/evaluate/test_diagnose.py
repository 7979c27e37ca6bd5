"""A draft that has learnt its target's answers by heart, then spoiled in one way at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dflash_dist.batch import Batch, sample_blocks
from dflash_dist.contract.folder import write_draft
from dflash_dist.data.chat import Document
from dflash_dist.decoding.speculative import Decoded, Decoder
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.evaluate.diagnose import Examiner, Verdict, slots
from dflash_dist.evaluate.evaluate import main
from dflash_dist.objective.objective import Objective
from dflash_dist.objective.weights import decay_weights
from dflash_dist.target.capture import HFDFlashTargetModel
from dflash_dist.target.tiny import CHATML
from tests.tiny import lively_target, tiny_shape

QUESTIONS = ["What is 3 plus 4?", "Hi", "Tell me all about the sea."]
NEW_TOKENS = 40
TRAINED = {"template_args": {}, "chat_template": None, "drop_reasoning": False, "step": 5}


@pytest.fixture(scope="module")
def folder(tiny_target, tmp_path_factory) -> Path:
    """Of a target that writes ASCII, a draft that has learnt what it answers to `QUESTIONS`, and the answers."""
    folder = tmp_path_factory.mktemp("diagnose")
    model, tokenizer = lively_target(tiny_target), AutoTokenizer.from_pretrained(tiny_target)
    printable = [bool(text := tokenizer.decode([i])) and text.isascii() and text.isprintable() for i in range(260)]
    model.lm_head.weight[~torch.tensor(printable) | (torch.arange(260) < 4)] = 0
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")

    torch.manual_seed(1)
    shape = tiny_shape(block_size=4)
    draft, target = DFlashDraftModel(shape), HFDFlashTargetModel(model, shape.target_layer_ids)
    batches, rows = [], []
    for question in QUESTIONS:
        user = {"role": "user", "content": question}
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        tokens = Decoder(model, draft, [2]).plain(prompt, NEW_TOKENS).tokens
        rows.append({"messages": [user, {"role": "assistant", "content": tokenizer.decode(tokens)}]})
        ids = torch.tensor([prompt + tokens])
        mask, positions = torch.arange(ids.shape[1])[None] >= len(prompt), torch.arange(ids.shape[1])[None]
        batch = sample_blocks(
            Batch.of_rows(ids, mask, torch.zeros_like(ids), positions),
            **{"anchors": NEW_TOKENS, "slot_weights": decay_weights(3, 4.0), "mask_token_id": 3},
            generators=[np.random.default_rng(0)],
        )
        batches.append((batch, target.generate_batch(ids, None, mask).hidden_states))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for _ in range(60):
        for batch, features in batches:
            hidden = draft(batch, features, model.model.embed_tokens.weight)
            Objective()(hidden, model.lm_head.weight, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write_draft(folder / "draft", DFlashDraftModel, shape, draft.state_dict(), "float32")
    (folder / "draft/training.json").write_text(json.dumps(TRAINED))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row | {"finish_reason": "length"}) + "\n" for row in rows))
    return folder


@pytest.fixture
def diagnose(folder, tmp_path, capsys):
    """The verdicts on a draft by cause, and those causes that are found, as they are in JSON and printed."""

    def run(*options: str, draft: Path = folder / "draft", prompts: Path = folder / "chats.jsonl"):
        report = tmp_path / "report.json"
        files = ["--target", str(folder / "target"), "--draft", str(draft), "--prompts", str(prompts)]
        main([*files, "--json", str(report), "--diagnose", "--max-new-tokens", str(NEW_TOKENS), *options])
        verdicts = {verdict["cause"]: verdict for verdict in json.loads(report.read_text())["diagnosis"]}
        found = {cause for cause, verdict in verdicts.items() if verdict["found"]}
        printed = capsys.readouterr().out
        assert found == {cause for cause in verdicts if f"CAUSE  {cause}: " in printed}
        conclusion = printed.splitlines()[-1]
        assert conclusion.startswith("so: first see to " if found else "so: nothing is broken, since the training's ")
        assert all(cause in conclusion for cause in found)
        return verdicts, found

    return run


@pytest.fixture
def spoil(folder, tmp_path):
    """A copy of the draft with another config."""

    def copy(**changes) -> Path:
        shutil.copytree(folder / "draft", tmp_path / "draft")
        config = json.loads((tmp_path / "draft/config.json").read_text())
        config |= {key: value for key, value in changes.items() if key in config}
        config["dflash_config"] |= {key: value for key, value in changes.items() if key in config["dflash_config"]}
        (tmp_path / "draft/config.json").write_text(json.dumps(config))
        return tmp_path / "draft"

    return copy


def test_of_a_healthy_draft_no_cause_is_named(diagnose):
    verdicts, found = diagnose()
    assert not found
    assert [verdict["found"] for verdict in verdicts.values()] == [False] * 6
    decoding = verdicts["decoding"]["numbers"]
    assert decoding["tau"] == decoding["tau_teacher_forced"] > 3
    assert verdicts["off-policy data"]["numbers"]["argmax_share"] == 1


def test_decoding_that_is_not_the_trained_model_is_named(diagnose, monkeypatch):
    propose = Decoder._propose

    def from_an_empty_context(self, anchor, context):
        return propose(self, anchor, type(context)([(key[:, :, :1], value[:, :, :1]) for key, value in context.layers]))

    monkeypatch.setattr(Decoder, "_propose", from_an_empty_context)
    verdicts, found = diagnose()
    assert found == {"decoding"}
    numbers = verdicts["decoding"]["numbers"]
    assert numbers["tau"] < 1.5 < 3 < numbers["tau_teacher_forced"]


def test_prompts_that_are_rendered_otherwise_are_named(diagnose, spoil):
    draft = spoil()
    args = {"template_args": {"style": "!"}, "chat_template": "{{ style }}" + CHATML}
    (draft / "training.json").write_text(json.dumps(TRAINED | args))
    verdicts, found = diagnose("--template-args", '{"style": "?"}', draft=draft)
    assert "template" in found
    assert verdicts["template"]["numbers"] == {"prompts": 3, "rendered_otherwise": 3, "answered_with_thinking": 0}


def test_thinking_that_training_left_out_is_named(diagnose, spoil, folder, monkeypatch):
    draft = spoil()
    (draft / "training.json").write_text(json.dumps(TRAINED | {"drop_reasoning": True}))
    tokens = AutoTokenizer.from_pretrained(folder / "target")("Well.</think>\n7").input_ids
    thinking = Decoded(tokens, 1.0, [1] * (len(tokens) - 1), [0] * (len(tokens) - 1))
    monkeypatch.setattr(Decoder, "speculative", lambda self, prompt, limit: thinking)
    verdicts, found = diagnose(draft=draft)
    assert "template" in found
    assert verdicts["template"]["words"] == "the target thinks before 3 of 3 answers, training left the thinking out"


def test_another_block_size_than_that_of_training_is_named(diagnose, spoil):
    verdicts, found = diagnose(draft=spoil(block_size=7))
    assert "block size" in found
    assert verdicts["block size"]["numbers"] == {"served": 7, "trained": 4}
    assert verdicts["block size"]["words"] == "7, but trained with 4"


def test_data_that_the_target_did_not_write_is_named(diagnose, write_chats):
    texts = ["It is 7, of course.", "Hello, how are you?", "The sea is large and mostly water."]
    prompts = write_chats(*[[("user", q), ("assistant", text)] for q, text in zip(QUESTIONS, texts)])
    verdicts, found = diagnose(prompts=prompts)
    assert found == {"off-policy data"}
    numbers = verdicts["off-policy data"]["numbers"]
    assert numbers["argmax_share"] < 0.2
    assert numbers["tau_teacher_forced_on_data"] < 1.5 < 3 < numbers["tau_teacher_forced_on_own"]


def examiner(right: list[list[int]], counts: list[list[int]], choices: list[int]) -> Examiner:
    """Of blocks of 3 with the mask token 3, whose forward finds the given."""
    shape = SimpleNamespace(mask_token_id=3, block_size=3, proposals=2)
    decoder = SimpleNamespace(head=torch.zeros(1), draft=SimpleNamespace(shape=shape))
    tokenizer = SimpleNamespace(decode=lambda tokens: "an answer")
    made = Examiner(decoder, SimpleNamespace(tokenizer=tokenizer), None)
    made._foretell = lambda ids, answered: (np.array(right, bool), np.array(counts, bool), np.array(choices))
    return made


def test_what_one_answer_is_evidence_of_written_out_by_hand():
    # Six tokens: five anchors, of which the last has one label. Decoding began at tokens 0, 3 and 4.
    right, counts = [[1, 1], [0, 1], [1, 0], [1, 0], [1, 0]], [[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]]
    fast = Decoded([9] * 6, 1.0, emitted=[3, 1, 1], accepted=[2, 0, 0])
    assert examiner(right, counts, []).examine([7, 3], None, fast) == {
        "own": [3 + 1 + 2 + 2, 4],
        # Anchors 0 and 3 have all labels: decoding accepted 3 and 1 tokens there, the training's forward 3 and 2.
        "visited": [3 + 1, 3 + 2, 2],
        "reached": [5, 3],  # the second slot where the first was right and it has a label
        "held": [4, 1],
        "right": [4, 2],
        "labels": [5, 4],
        "masks": [1, 8],
        "prompts": [0, 0, 1],
    }


def test_of_the_data_only_answers_are_compared():
    made = examiner([[1, 1], [0, 0]], [[1, 1], [1, 0]], choices=[5, 5, 6, 8, 0])
    made.encoder.encode = lambda answered: [Document(np.array([4, 5, 3, 6, 7]), [(3, 5)])]
    # The target would write 5 after 4, but that is the user's; in the answer it would write 6, as there, and 8, not 7.
    assert made.examine_data(None) == {"data": [3, 1], "argmax": [1, 2], "masks": [1, 5]}


def test_a_slot_that_few_anchors_reached_is_judged_by_all():
    evidence = {"reached": [40, 19, 20], "held": [30, 0, 0], "right": [35, 10, 10], "labels": [50, 40, 40]}
    verdict = slots(evidence)
    assert verdict.numbers == {"right_if_reached": [0.75, 0.25, 0.0], "never_learned": [3]}
    assert str(verdict) == "CAUSE  slots: right where all before were: 0.75 0.25 0.00; slots 3 never learned"
    assert str(Verdict("template", None, "nobody knows")) == "-      template: nobody knows"


def test_a_mask_token_that_ends_answers_is_named(diagnose, spoil):
    verdicts, found = diagnose(draft=spoil(mask_token_id=2))
    assert "mask token" in found
    assert "is the eos token" in verdicts["mask token"]["words"]


def test_a_mask_token_that_texts_hold_is_named(diagnose, write_chats):
    verdicts, found = diagnose(prompts=write_chats([("user", "Fill in <mask> and <mask>!")]))
    assert "mask token" in found
    assert verdicts["mask token"]["numbers"]["in_texts"] == 2


def test_slots_that_never_learned_are_named(diagnose, folder, tmp_path):
    torch.manual_seed(2)
    shape = tiny_shape(block_size=4)
    write_draft(tmp_path / "draft", DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "float32")
    (tmp_path / "draft/training.json").write_text(json.dumps(TRAINED))
    verdicts, found = diagnose(draft=tmp_path / "draft")
    assert found == {"slots"}
    assert verdicts["slots"]["numbers"]["never_learned"] == [1, 2, 3]


def test_what_cannot_be_told_is_not_called_healthy(diagnose, spoil, write_chats):
    draft = spoil()
    (draft / "training.json").unlink()
    verdicts, found = diagnose(draft=draft, prompts=write_chats(*[[("user", question)] for question in QUESTIONS]))
    assert not found
    assert {cause for cause, verdict in verdicts.items() if verdict["found"] is None} == {"template", "off-policy data"}


def test_a_slot_that_no_answer_reaches_has_not_been_tried() -> None:
    labels = [30.0, 30.0, 0.0]
    verdict = slots({"reached": labels, "held": [21.0, 15.0, 0.0], "right": [21.0, 15.0, 0.0], "labels": labels})
    assert verdict.found is False and verdict.words == "right where all before were: 0.70 0.50 -"
    assert verdict.numbers == {"right_if_reached": [0.7, 0.5, None], "never_learned": []}
    assert slots(dict.fromkeys(("reached", "held", "right", "labels"), [0.0] * 3)).found is None
