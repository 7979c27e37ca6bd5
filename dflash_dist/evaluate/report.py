"""What the answers of an evaluation show: numbers, as a table and in TensorBoard."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dflash_dist.decoding.speculative import Decoded
from dflash_dist.logs import or_dash
from dflash_dist.reading import check_fields

DECODED = ("plain", "fast")
EXAMPLES, EXAMPLE_TOKENS = 3, 160  # answers of a suite that a report shows, and their longest beginning
RESAMPLES = 2000  # of the prompts, for the confidence interval


@dataclass(frozen=True)
class Answer:
    """One answer, decoded plainly and speculatively."""

    suite: str
    prompt: int  # in the suite, from 0
    turn: int  # of the conversation, from 0
    plain: Decoded
    fast: Decoded
    difference: dict[str, Any] | None  # where the two outputs part: "token", "gap" and whether it is a "tie"

    @staticmethod
    def read(row: dict[str, Any], where: str, advice: str) -> Answer:
        """From its JSON, which stands in the file `where`.

        Raises:
            ValueError: it is damaged.
        """
        check_fields(row, typing.get_type_hints(Answer) | dict.fromkeys(DECODED, dict[str, Any]), where, advice)
        if row["difference"] is not None:
            check_fields(row["difference"], {"token": int, "gap": float, "tie": bool}, where, advice)
        for decoded in (row[name] for name in DECODED):
            check_fields(decoded, typing.get_type_hints(Decoded), where, advice)
            if not decoded["tokens"] or decoded["seconds"] <= 0 or min(decoded["accepted"], default=0) < 0:
                raise ValueError(f"{where} holds an answer without tokens, time or sensible counts: {advice}")
        return Answer(**row | {name: Decoded(**row[name]) for name in DECODED})


def summarise(answers: Sequence[Answer], proposals: int, equal: bool = True) -> dict[str, Any]:
    """The numbers of all answers together, and under `suites` those of each suite.

    `tau` is tokens emitted divided by verification passes, prefill excluded, cut at the stop token; its `tau_interval`
    says where it would lie for other prompts of the kind (95 %). The acceptance of slot k is the share of passes whose
    first k proposals were all accepted. These are None without a pass: an answer that ends with its first token has
    none. Rates are of one process.

    Args:
        equal: both outputs ought to be the same; else what would say so is None.
    """
    suites = dict.fromkeys(answer.suite for answer in answers)
    of_suites = {suite: _numbers([a for a in answers if a.suite == suite], proposals, equal) for suite in suites}
    return {**_numbers(answers, proposals, equal), "suites": of_suites}


def _numbers(answers: Sequence[Answer], proposals: int, equal: bool) -> dict[str, Any]:
    # The turns of a conversation belong together: they count as one prompt.
    prompts: dict[tuple[str, int], list[int]] = {}
    for answer in answers:
        emitted_in = prompts.setdefault((answer.suite, answer.prompt), [])
        emitted_in += answer.fast.emitted
    emitted = np.array([sum(counts) for counts in prompts.values()])
    passes = np.array([len(counts) for counts in prompts.values()])
    accepted = np.array([count for answer in answers for count in answer.fast.accepted], int)
    plain_rate = sum(len(a.plain.tokens) for a in answers) / sum(a.plain.seconds for a in answers)
    fast_rate = sum(len(a.fast.tokens) for a in answers) / sum(a.fast.seconds for a in answers)
    differences = [
        {"suite": a.suite, "prompt": a.prompt, "turn": a.turn, **a.difference} for a in answers if a.difference
    ]
    losses = sum(not difference["tie"] for difference in differences)
    return {
        "prompts": len(prompts),
        "answers": len(answers),
        "tokens": sum(len(a.plain.tokens) for a in answers),
        "passes": int(passes.sum()),
        "tau": float(emitted.sum() / passes.sum()) if passes.any() else None,
        "tau_interval": tau_interval(emitted, passes),
        "tau_mean_of_prompts": float((emitted / passes.clip(1))[passes > 0].mean()) if passes.any() else None,
        "acceptance_by_slot": [
            float((accepted >= k).mean()) if passes.any() else None for k in range(1, proposals + 1)
        ],
        "passes_by_accepted": np.bincount(accepted, minlength=proposals + 1).tolist(),
        "plain_tokens_per_s": plain_rate,
        "speculative_tokens_per_s": fast_rate,
        "speed_up": fast_rate / plain_rate,
        "lossless": losses == 0 if equal else None,
        "lossless_share": 1 - losses / len(answers) if equal else None,
        "equal_outputs": len(answers) - len(differences) if equal else None,
        "differences": differences,
    }


def tau_interval(emitted: np.ndarray, passes: np.ndarray) -> list[float] | None:
    """Where 95 % of the pooled tau lie when prompts are drawn anew, with replacement, from these; the same each time.

    Args:
        emitted, passes: [N], of each prompt. A single one says nothing about others, and none without a pass says
            anything: None.
    """
    if len(passes) < 2 or not passes.any():
        return None
    drawn = np.random.default_rng(0).multinomial(len(passes), np.full(len(passes), 1 / len(passes)), RESAMPLES)
    drawn = drawn[drawn @ passes > 0]
    return np.quantile((drawn @ emitted) / (drawn @ passes), [0.025, 0.975]).tolist()


def examples(answers: Sequence[Answer], asked: dict[tuple[str, int], str], tokenizer: Any) -> list[dict[str, Any]]:
    """The beginnings of a few answers of each suite, pass by pass: the text of the proposals that were accepted, and of
    the target's own token after them.

    Args:
        asked: the question by suite and prompt.
    """
    shown: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        of_suite = shown.setdefault(answer.suite, [])
        if answer.turn or not answer.fast.passes or len(of_suite) >= EXAMPLES:
            continue
        tokens, fast = answer.fast.tokens[:EXAMPLE_TOKENS], answer.fast
        texts = [
            tokenizer.decode(tokens[:end]) for end in range(len(tokens) + 1)
        ]  # a character may take several tokens
        begins = np.cumsum([1, *fast.emitted]).tolist()
        blocks = [{"accepted": 0, "text": "", "own": texts[min(1, len(tokens))]}]  # the first token is the prefill's
        for begin, accepted, end in zip(begins, fast.accepted, begins[1:]):
            if end <= len(tokens):
                before, between, after = (texts[at] for at in (begin, begin + accepted, end))
                text, own = between[len(before) :], after[len(between) :]
                blocks.append({"accepted": accepted, "text": text, "own": own})
        question = asked.get((answer.suite, answer.prompt), "")
        of_suite.append({"suite": answer.suite, "question": question, "blocks": blocks})
    return [example for of_suite in shown.values() for example in of_suite]


# ---------------------------------------------------------------------------------------------------- for people


def table(report: dict[str, Any]) -> list[str]:
    """The lines of a table: a column a suite, and one for all where there are several; below it what has a number for
    each slot, a row a suite."""
    columns = dict(report["suites"])
    if len(columns) > 1:
        columns["all"] = report
    proposals = len(report["acceptance_by_slot"])
    rows = {
        "": list(columns),
        "prompts": [f"{c['prompts']:,}" for c in columns.values()],
        "tokens": [f"{c['tokens']:,}" for c in columns.values()],
        "acceptance length": [or_dash(c["tau"]) for c in columns.values()],
        "  95 % interval": [_range(c["tau_interval"]) for c in columns.values()],
        "  mean of prompts": [or_dash(c["tau_mean_of_prompts"]) for c in columns.values()],
        "tokens/s plain": [f"{c['plain_tokens_per_s']:.1f}" for c in columns.values()],
        "tokens/s speculative": [f"{c['speculative_tokens_per_s']:.1f}" for c in columns.values()],
        "speed-up": [f"{c['speed_up']:.2f}x" for c in columns.values()],
        "equal outputs": [or_dash(c["equal_outputs"], f"{{}} of {c['answers']}") for c in columns.values()],
        "lossless": [or_dash(c["lossless_share"], "{:.1%}") for c in columns.values()],
    }
    width = max(11, *(len(cell) for cells in rows.values() for cell in cells))
    by_slot = {
        "accepted up to slot": map(str, range(1, proposals + 1)),
        **{f"  {name}": [or_dash(share, "{:.0%}") for share in c["acceptance_by_slot"]] for name, c in columns.items()},
    }
    by_pass = {
        "passes that accept": map(str, range(proposals + 1)),
        **{f"  {name}": _shares(c["passes_by_accepted"]) for name, c in columns.items()},
    }
    return [
        *(f"{name:<22}" + "".join(f"{cell:>{width + 2}}" for cell in cells) for name, cells in rows.items()),
        *(
            f"{name:<22}" + "".join(f"{cell:>5}" for cell in cells)
            for part in (by_slot, by_pass)
            for name, cells in part.items()
        ),
    ]


def _range(interval: list[float] | None) -> str:
    return f"{interval[0]:.2f}-{interval[1]:.2f}" if interval else "-"


def _shares(counts: list[int]) -> list[str]:
    return [or_dash(count / sum(counts) if any(counts) else None, "{:.0%}") for count in counts]


def in_short(report: dict[str, Any]) -> str:
    """What the numbers mean, in a sentence."""
    tau, proposals = report["tau"], len(report["acceptance_by_slot"])
    if tau is None:
        return "in short: every answer ended with its first token, so that nothing was proposed: ask for longer ones"
    return (
        f"in short: a pass of the target emits {tau:.2f} tokens, its own one and {tau - 1:.2f} of {proposals} proposed,"
        f" which is {report['speed_up']:.2f} times as fast as plain decoding here, and up to {tau:.2f} times where a"
        f" pass over {proposals + 1} tokens costs no more than one over 1"
    )


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['draft']} for {report['target']}, {report['dtype']} on {report['device']}")
    for line in table(report):
        print(line)
    for difference in report["differences"]:
        kind = "a tie" if difference["tie"] else "NOT a tie"
        place = "{suite}, prompt {prompt}, turn {turn}, token {token}".format(**difference)
        print(f"  {place}: top two logits {difference['gap']:.1e} apart, {kind}")


def to_tensorboard(report: dict[str, Any], folder: Path, step: int) -> None:
    """A picture of the acceptance by slot; by suite, the histogram of accepted lengths and tau, at the step that the
    draft was exported from, so that several drafts of a run make a curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from torch.utils.tensorboard import SummaryWriter

    figure, axes = plt.subplots(figsize=(6, 3.4))
    slots = np.arange(1, len(report["acceptance_by_slot"]) + 1)
    width = 0.8 / len(report["suites"])
    for place, (suite, numbers) in enumerate(report["suites"].items()):
        shares = np.array(numbers["acceptance_by_slot"], float)  # None becomes nan, which is not drawn
        axes.bar(slots - 0.4 + (place + 0.5) * width, shares, width, label=suite)
    axes.set(xlabel="slot", ylabel="share of passes", ylim=(0, 1), title="acceptance by slot")
    axes.legend()
    figure.tight_layout()
    with SummaryWriter(str(folder)) as board:
        board.add_figure("evaluate/slots", figure, step)
        for suite, numbers in report["suites"].items():
            counts = numbers["passes_by_accepted"]
            if sum(counts):
                board.add_scalar(f"evaluate/tau/{suite}", numbers["tau"], step)
                board.add_histogram(f"evaluate/accepted/{suite}", np.repeat(np.arange(len(counts)), counts), step)
