"""Why a draft disappoints: the causes told apart, each by a number of its own.

While an evaluation runs, every answer gives its `Evidence`: sums, so that those of all prompts and ranks add up. The
verdicts read the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dflash_dist.batch import Batch, may_be_anchor, sample_blocks
from dflash_dist.contract.folder import read_headers
from dflash_dist.data.account import BadRow
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import Conversation
from dflash_dist.decoding.speculative import Decoded, Decoder
from dflash_dist.draft.shape import DraftShape
from dflash_dist.logs import or_dash
from dflash_dist.target.capture import capture_layers
from dflash_dist.target.choices import check_mask_token
from dflash_dist.target.load import TargetInfo
from dflash_dist.training.curves import Curve, gain_of_doubling

# Verdicts. The two forwards round ties differently, in bfloat16 in a few passes of a hundred. What a target writes is
# its likeliest token but for ties, or three times in four where it was sampled; in other people's text, about every
# second one is. A guess at the commonest token is right in about one slot of twenty.
DECODING_DIFFERS, OFF_POLICY, UNLEARNED = 0.05, 0.75, 0.05
FLAT = 0.05  # tau that doubling the steps brought, below which it is not worth them
SEEN_ENOUGH = 20  # anchors that reached a slot, below which the slot is judged by all anchors

Evidence = dict[str, list[float]]  # sums by name; see `Examiner`


class Examiner:
    """Gathers the evidence.

    own, data        tokens emitted and blocks: teacher-forced, on the target's own outputs and on the data's answers
    visited          tokens of decoding's passes, of the training's forward at the same anchors, and the passes
    reached, held    by slot: anchors whose slots before were all right, and where this one was too
    right, labels    by slot: anchors where it was right, and all
    argmax           tokens of the data's answers that are the target's likeliest, and all
    masks            mask tokens in all texts, and their tokens
    prompts          those rendered otherwise than in training, those answered with thinking, and all
    """

    def __init__(self, decoder: Decoder, encoder: ChatEncoder, trained: ChatEncoder | None):
        """`encoder` rendered the prompts, `trained` renders as the draft's training did, if that is known."""
        self.decoder, self.encoder, self.trained = decoder, encoder, trained
        self.device = decoder.head.device

    def examine(self, prompt: list[int], asked: Conversation, fast: Decoded) -> Evidence:
        """Of one answer: the prompt as it was rendered and as it was asked, and the speculative output."""
        otherwise = self.trained is not None and self.trained.prompt_of(asked) != prompt
        text = prompt + fast.tokens
        answered = np.array([False] * len(prompt) + [True] * len(fast.tokens))
        right, counts, _ = self._foretell(text, answered)
        held = np.cumprod(right, axis=1)
        full = np.asarray(counts.all(axis=1))
        emitted = 1 + held.sum(axis=1)
        visited = np.cumsum([0, *fast.emitted])[:-1].astype(int)
        whole = [(anchor, 1 + n) for anchor, n in zip(visited, fast.accepted) if anchor < len(full) and full[anchor]]
        reached = np.concatenate([np.ones_like(held[:, :1]), held[:, :-1]], axis=1) * counts
        answer = self.encoder.tokenizer.decode(fast.tokens)
        return {
            "own": [float(emitted[full].sum()), float(full.sum())],
            "visited": [float(sum(n for _, n in whole)), float(sum(emitted[a] for a, _ in whole)), len(whole)],
            "reached": reached.sum(axis=0).tolist(),
            "held": (held * counts).sum(axis=0).tolist(),
            "right": right.sum(axis=0).tolist(),
            "labels": counts.sum(axis=0).tolist(),
            "masks": self._masks(text),
            "prompts": [float(otherwise), float("</think>" in answer), 1.0],
        }

    def examine_data(self, answered: Conversation) -> Evidence:
        """Of the answer that the data has, as far as training could use it."""
        try:
            documents = self.encoder.encode(answered)
        except BadRow:
            return {}
        evidence = []
        for document in documents:
            right, counts, choices = self._foretell(document.input_ids.tolist(), document.loss_mask)
            full = np.asarray(counts.all(axis=1))
            supervised = document.loss_mask[1:]
            agree = (choices[:-1] == document.input_ids[1:]) & supervised
            evidence.append(
                {
                    "data": [float((1 + np.cumprod(right, axis=1).sum(axis=1))[full].sum()), float(full.sum())],
                    "argmax": [float(agree.sum()), float(supervised.sum())],
                    "masks": self._masks(document.input_ids.tolist()),
                }
            )
        return add_up(evidence)

    def _masks(self, ids: Sequence[int]) -> list[float]:
        return [float(list(ids).count(self.decoder.draft.shape.mask_token_id)), float(len(ids))]

    @torch.no_grad()
    def _foretell(self, ids: list[int], answered: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The training's forward at every anchor of the answered tokens.

        Returns:
            Of each anchor and slot whether the draft is right and whether it has a label [A, K-1], both bool; and the
            target's likeliest token after each token [N].
        """
        decoder, draft = self.decoder, self.decoder.draft
        tokens, mask = torch.tensor([ids]), torch.from_numpy(answered)[None]
        positions, documents = torch.arange(len(ids))[None], torch.zeros_like(tokens)
        with capture_layers(decoder.layers, draft.shape.target_layer_ids) as captured:
            logits = decoder.target(input_ids=tokens.to(self.device), use_cache=False).logits[0]
        choices = logits.argmax(dim=-1).cpu().numpy()
        labels = draft.shape.proposals
        anchors = int(may_be_anchor(mask, documents).sum())
        if anchors == 0:
            nothing = np.zeros((0, labels), bool)
            return nothing, nothing, choices
        batch = sample_blocks(
            Batch.of_rows(tokens, mask, documents, positions),
            anchors=anchors,
            slot_weights=torch.ones(labels),  # no loss is computed: weights only tell which labels count
            mask_token_id=draft.shape.mask_token_id,
            generators=[np.random.default_rng(0)],  # all of the anchors are drawn
        ).to(self.device)
        features = torch.cat(captured(), dim=-1)
        hidden = draft(batch, features, decoder.embedding)
        blocks = hidden.unflatten(1, (anchors, labels + 1))[0, :, 1:]
        befores = [features[0, anchor - 1] if anchor else None for anchor in batch.anchors[0].tolist()]
        proposals = torch.stack(  # block by block: no large logits
            [
                draft.scores(block, previous, decoder.head, decoder.embedding, before).argmax(dim=-1)
                for block, previous, before in zip(blocks, batch.previous[0], befores)
            ]
        )
        counts = batch.weights[0] > 0
        return ((proposals == batch.labels[0]) & counts).cpu().numpy(), counts.cpu().numpy(), choices


def add_up(evidence: Sequence[Evidence]) -> Evidence:
    """The sums of all that is there."""
    names = dict.fromkeys(name for one in evidence for name in one)
    return {name: np.sum([one[name] for one in evidence if name in one], axis=0).tolist() for name in names}


# ---------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """On one possible cause."""

    cause: str
    found: bool | None  # None: what is there cannot tell
    words: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = {True: "CAUSE", False: "ok", None: "-"}[self.found]
        return f"{kind:<6} {self.cause}: {self.words}"


def judge(
    evidence: Evidence, folder: Path, shape: DraftShape, info: TargetInfo, trained: dict[str, Any]
) -> list[Verdict]:
    """One verdict for every cause, on the draft in `folder`, which is served as `shape` says; `trained` is its training
    record, empty where it came without."""
    return [
        decoding(evidence),
        template(evidence, trained),
        block_size(folder, shape),
        off_policy(evidence),
        mask_token(evidence, info, shape),
        slots(evidence),
    ]


def conclude(verdicts: Sequence[Verdict], step: int | None, curve: Curve) -> str:
    """What to do, in a sentence.

    Args:
        step: that the draft was exported from, if it says so.
        curve: the teacher-forced tau of its training up to there; empty where the draft does not tell.
    """
    if causes := [verdict.cause for verdict in verdicts if verdict.found]:
        return f"so: first see to {', '.join(causes)}, as said above; longer training would not repair that"
    numbers = next(verdict.numbers for verdict in verdicts if verdict.cause == "decoding")
    if numbers["tau"] is None:
        return "so: nothing broken was found, but no answer is longer than a block: ask for longer ones"
    told = (
        f"so: nothing is broken, since the training's forward accepts as much ({numbers['tau_teacher_forced']:.2f}) as"
        f" decoding ({numbers['tau']:.2f}). What lifts tau is training longer"
    )
    gain = gain_of_doubling(curve) if curve else None
    if gain is None or not step:
        return f"{told}; how much longer, the draft does not tell: its run logged too few steps, or it came without one"
    if gain < FLAT:
        return f"{told}, but its curve is flat at step {step:,}: rather train on more data, or a draft of more layers"
    return (
        f"{told}: teacher-forced tau rose by {gain:.2f} with each doubling of its steps, so {2 * step:,} steps may give"
        f" about {curve[-1][1] + gain:.1f} after {curve[-1][1]:.1f} (train.max_steps or train.epochs)"
    )


def decoding(evidence: Evidence) -> Verdict:
    real, forced, passes = evidence["visited"]
    numbers = {
        "tau": _ratio(real, passes),
        "tau_teacher_forced": _ratio(forced, passes),
        "tau_teacher_forced_all_anchors": _ratio(*evidence["own"]),
    }
    if not passes:
        return Verdict("decoding", None, "no answer is longer than a block", numbers)
    found = abs(real - forced) > DECODING_DIFFERS * forced
    words = (
        f"accepts {real / passes:.2f} tokens a pass, the training's forward {forced / passes:.2f} at the same anchors"
        f" ({or_dash(numbers['tau_teacher_forced_all_anchors'])} at all, as training counts)"
    )
    told = ": decoding is not the model that was trained (caches, positions, features)"
    return Verdict("decoding", found, words + told * found, numbers)


def template(evidence: Evidence, trained: dict[str, Any]) -> Verdict:
    otherwise, thinking, prompts = (int(count) for count in evidence["prompts"])
    numbers = {"prompts": prompts, "rendered_otherwise": otherwise, "answered_with_thinking": thinking}
    if not trained:
        return Verdict("template", None, "the draft has no record of how its training rendered chats", numbers)
    if otherwise:
        args = trained["template_args"]
        words = (
            f"{otherwise} of {prompts} prompts are rendered otherwise than in training, which had template_args {args}"
        )
        return Verdict("template", True, words, numbers)
    if thinking and trained["drop_reasoning"]:
        words = f"the target thinks before {thinking} of {prompts} answers, training left the thinking out"
        return Verdict("template", True, words, numbers)
    return Verdict("template", False, f"all {prompts} prompts are rendered as in training", numbers)


def block_size(folder: Path, shape: DraftShape) -> Verdict:
    served, trained = shape.block_size, (read_headers(folder)[1] or {}).get("block_size")
    numbers = {"served": served, "trained": trained}
    if trained is None:
        return Verdict("block size", None, f"{served}; the draft does not say which it was trained with", numbers)
    words = f"{served}, as trained" if served == trained else f"{served}, but trained with {trained}"
    return Verdict("block size", served != trained, words, numbers)


def off_policy(evidence: Evidence) -> Verdict:
    if "argmax" not in evidence or not evidence["argmax"][1]:
        words = "the prompts have no answers to compare with: give the training data as --prompts"
        return Verdict("off-policy data", None, words)
    agree, supervised = evidence["argmax"]
    numbers = {
        "argmax_share": agree / supervised,
        "tau_teacher_forced_on_data": _ratio(*evidence["data"]),
        "tau_teacher_forced_on_own": _ratio(*evidence["own"]),
    }
    found = agree / supervised < OFF_POLICY
    words = (
        f"{agree / supervised:.1%} of the data's tokens are the target's likeliest; teacher-forced tau"
        f" {or_dash(numbers['tau_teacher_forced_on_data'])} on them,"
        f" {or_dash(numbers['tau_teacher_forced_on_own'])} on what the target writes"
    )
    told = ": the target did not write this data, let it do so (`regenerate`)"
    return Verdict("off-policy data", found, words + told * found, numbers)


def mask_token(evidence: Evidence, info: TargetInfo, shape: DraftShape) -> Verdict:
    masks, tokens = (int(count) for count in evidence["masks"])
    numbers = {"mask_token_id": shape.mask_token_id, "in_texts": masks, "tokens": tokens}
    words = f"{shape.mask_token_id} is {masks} of {tokens:,} tokens of the texts"
    try:
        check_mask_token(info, shape.mask_token_id)
    except ValueError as error:
        return Verdict("mask token", True, f"{words}: {error}", numbers)
    return Verdict("mask token", masks > 0, words + ", which should have none" * (masks > 0), numbers)


def slots(evidence: Evidence) -> Verdict:
    """By the anchors whose slots before were all right; by all anchors where these are too few. A slot that no answer
    reaches has not been tried."""
    shares = [
        _ratio(held, reached) if reached >= SEEN_ENOUGH else _ratio(right, labels)
        for reached, held, right, labels in zip(*(evidence[n] for n in ("reached", "held", "right", "labels")))
    ]
    dead = [k for k, share in enumerate(shares, 1) if share is not None and share < UNLEARNED]
    shown = " ".join(map(or_dash, shares))
    words = f"right where all before were: {shown}"
    if dead:
        words += f"; slots {', '.join(map(str, dead))} never learned"
    found = bool(dead) if any(evidence["labels"]) else None
    return Verdict("slots", found, words, {"right_if_reached": shares, "never_learned": dead})


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
