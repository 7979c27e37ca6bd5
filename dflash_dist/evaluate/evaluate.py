"""A draft at work: decodes prompts plainly and speculatively and reports acceptance, speed and equality.

    python -m dflash_dist evaluate --target T --draft D --suite humaneval mtbench gsm8k --json report.json

Under torchrun every rank takes its share of the prompts, in one process each; the report is the same. An interrupted
evaluation continues with the same command: finished prompts lie beside the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from tqdm import tqdm

from dflash_dist.answers.parts import Parts, stored_settings
from dflash_dist.answers.turns import as_message
from dflash_dist.config import Dtype, TrainConfig
from dflash_dist.contract.folder import find_draft, read_draft, read_record, target_faults
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.conversations import Conversation, read_row
from dflash_dist.data.template import settle_day, today
from dflash_dist.decoding.sampling import Sampling
from dflash_dist.decoding.speculative import TIE, Decoded, Decoder, first_difference
from dflash_dist.evaluate.diagnose import Evidence, Examiner, add_up, conclude, judge
from dflash_dist.evaluate.report import Answer, examples, in_short, print_report, summarise, to_tensorboard
from dflash_dist.evaluate.suites import SUITES, Prompt, read_prompts
from dflash_dist.files import memory_of, whole, writing
from dflash_dist.options import AnswerOptions, JsonObject, option, parse
from dflash_dist.ranks import World, join_world
from dflash_dist.reading import check_fields, reading
from dflash_dist.target.head import check_head
from dflash_dist.target.load import (
    TargetInfo,
    check_loading_whole,
    check_room,
    digest_weights,
    load_ends,
    load_whole,
    name_weights,
    read_info,
)

ANSWERED_WITH = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "rejection")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(AnswerOptions):
    target: str = option("model folder or hub id")
    revision: str = option("of a hub id of the target", "main")
    trust_remote_code: bool = option("run Python code that the target brings", False)
    draft: str = option("draft folder, exported here or published, or hub id")
    suite: list[str] = option(
        f"built-in prompts: {', '.join(SUITES)}; from the hub, or from a file of their data set as NAME=FILE",
        [],
        also="--suites",
    )
    prompts: list[str] = option("conversations; each is cut before its last answer", [])
    limit: int | None = option("the first N prompts of each suite only; all by default", None)
    json: Path | None = option("file for the report; needed under torchrun, on a shared disk", None)
    tensorboard: Path | None = option("folder for a picture of the slots, histograms and tau", None)
    rejection: bool = option(
        "accept by rejection sampling: more tokens a pass, but answers like the target's in distribution only", False
    )
    dtype: Dtype = option("float32 shows equality", "float32")
    template_args: JsonObject | None = option("JSON object for the chat template; default: as trained", None)
    diagnose: bool = option("say which known causes hold the draft back", False)


def main(argv: list[str]) -> None:
    options = parse(EvaluateOptions, "evaluate", __doc__, argv)
    with join_world(TrainConfig.hang_timeout) as world:
        evaluate(options, world)


def evaluate(options: EvaluateOptions, world: World) -> None:
    """Decodes this rank's share of the prompts both ways; whichever rank finds all of them finished reports.

    Raises:
        ValueError: target, draft or prompts cannot be read, draft and target do not belong together, or an evaluation
            with other settings has this report.
    """
    if not options.suite and not options.prompts:
        raise ValueError("there is nothing to decode: name a --suite or --prompts")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, found {options.limit}")
    if options.rejection and options.temperature <= 0:
        raise ValueError("--rejection is a way to sample: give a --temperature above 0")
    if options.diagnose and options.temperature > 0:
        raise ValueError("--diagnose compares likeliest tokens: leave --temperature out")
    if world.size > 1 and not options.json:
        raise ValueError("--json is needed where several ranks evaluate: the answers meet beside it")
    evaluation = Evaluation(options, world)
    prompts = dict(enumerate(read_prompts(options.suite, options.prompts, options.limit, evaluation.check), 1))
    with contextlib.ExitStack() as stack:
        report = options.json or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "report.json"
        with writing(report.parent):
            report.parent.mkdir(parents=True, exist_ok=True)
        parts = Parts(answers_file(report), evaluation.settings(list(prompts.values())))
        places = parts.index()
        mine = [row for row in prompts if (row - 1) % world.size == world.rank]
        # Whether it is finished is asked after the parts were read: they go once it is there.
        todo = [] if parts.out.is_file() else [row for row in mine if row not in places]
        if todo:
            evaluation.load(prompts[todo[0]])
            bar = tqdm(total=len(mine), initial=len(mine) - len(todo), unit="prompt", disable=not world.is_main)
            with bar, parts.append(world.rank) as append:
                for row in todo:
                    append(evaluation.decode(row, prompts[row]) | {"row": row})
                    bar.update()
        if parts.merge(list(prompts)) is not None or (world.is_main and parts.out.is_file()):
            evaluation.report(read_answers(parts), list(prompts.values()))


def read_answers(parts: Parts) -> list[tuple[list[Answer], Evidence]]:
    """The rows of `Evaluation.decode`, from the file that they were written to.

    Raises:
        ValueError: it is damaged.
    """
    rows, where, advice = parts.read(), str(parts.out), parts.advice
    with reading(where, advice):
        for row in rows:
            check_fields(row, {"answers": list[dict[str, Any]], "evidence": Evidence}, where, advice)
        add_up([row["evidence"] for row in rows])  # needs them to be equally long
        return [([Answer.read(answer, where, advice) for answer in row["answers"]], row["evidence"]) for row in rows]


class Evaluation:
    """A target and a draft that decode prompts."""

    def __init__(self, options: EvaluateOptions, world: World):
        self.options, self.device, self.dtype = options, world.device, getattr(torch, options.dtype)
        self.info = read_info(options.target, options.revision, options.trust_remote_code)
        check_loading_whole(self.info)
        self.sampling = Sampling(options.temperature, options.top_p, options.top_k, rejection=options.rejection)
        self.folder = find_draft(options.draft)
        self.draft = read_draft(self.folder, self.dtype, self.device, self.info.text.num_hidden_layers)
        if faults := target_faults(self.draft.shape, self.info.text):
            raise ValueError(
                f"{options.draft} was trained for another target than {options.target}: {'; '.join(faults)}"
            )
        self.trained = read_record(self.folder)
        self.encoder = make_encoder(self.info, self.trained, options.template_args)
        if self.encoder.writes_date:
            stored = stored_settings(answers_file(options.json)) if options.json else {}
            date = settle_day(world.agree_on_day, self.trained.get("date"), stored.get("date"))
            self.encoder = dataclasses.replace(self.encoder, date=date)
        self.known = make_encoder(self.info, self.trained, None, self.encoder.date) if self.trained else None

    def check(self, prompt: Prompt) -> None:
        """Refuses a prompt that could not be decoded, before the first one is.

        Raises:
            ValueError: a chat template refuses it, or it leaves no room for an answer.
        """
        check_room(self.info, self.encoder.prompt_of(prompt.asked))
        if self.options.diagnose and self.known:
            self.known.prompt_of(prompt.asked)

    def settings(self, prompts: list[Prompt]) -> dict[str, Any]:
        """What the answers depend on; an evaluation continues only under the same."""
        names = (*ANSWERED_WITH, "dtype", "diagnose")
        asked = json.dumps([dataclasses.astuple(prompt) for prompt in prompts])
        known = stored_settings(answers_file(self.options.json)) if self.options.json else {}
        of_files = digest_weights(self.folder)  # as older versions named a draft, which a new export changed
        return {name: getattr(self.options, name) for name in names} | {
            "target": name_weights(self.info),
            "draft": of_files if known.get("draft") == of_files else digest_tensors(self.draft.state_dict()),
            "shape": dataclasses.asdict(self.draft.shape),
            "rendering": self.encoder.identity,
            **({"date": self.encoder.date} if self.encoder.writes_date else {}),
            "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
        }

    def load(self, prompt: Prompt) -> None:
        """Reads the target's weights, and warms both models up on a prompt.

        Raises:
            ValueError: the LM head that a training takes is not the one that the target answers with.
        """
        model = load_whole(self.info, self.dtype, self.device)
        check_head(self.info.path, model, load_ends(self.info, self.dtype, self.device).head)
        self.decoder = Decoder(model, self.draft, self.info.stop_ids)
        self.decoder.speculative(self.encoder.prompt_of(prompt.asked), 4)
        self.examiner = Examiner(self.decoder, self.encoder, self.known) if self.options.diagnose else None

    def decode(self, row: int, prompt: Prompt) -> dict[str, Any]:
        """The answers to a prompt and to its later questions, and what they are evidence of. `row` numbers the prompt
        among all: sampling depends on it and on the seed, not on who decodes what else."""
        self.decoder.sampling = dataclasses.replace(self.sampling, seed=self.options.seed * 1_000_003 + row)
        asked, answers, evidence = prompt.asked, [], []
        if self.examiner and prompt.answered:
            evidence.append(self.examiner.examine_data(prompt.answered))
        for turn, question in enumerate([None, *prompt.later]):
            if question is not None:
                try:
                    read = read_row({"messages": [*asked.messages, {"role": "user", "content": question}]})
                    assert isinstance(read, Conversation)
                    asked = dataclasses.replace(asked, messages=read.messages)
                    check_room(self.info, self.encoder.prompt_of(asked))
                except ValueError:  # nothing can follow an answer that says nothing, or one that took all the room
                    break
            ids = self.encoder.prompt_of(asked)
            plain = self.decoder.plain(ids, self.options.max_new_tokens)
            fast = self.decoder.speculative(ids, self.options.max_new_tokens)
            difference = None if self.options.rejection else _difference(self.decoder, ids, plain, fast)
            answers.append(Answer(prompt.suite, prompt.number, turn, plain, fast, difference))
            if self.examiner:
                evidence.append(self.examiner.examine(ids, asked, fast))
            finished = plain.tokens[-1] in self.decoder.stop_ids
            text = self.encoder.tokenizer.decode(plain.tokens[:-1] if finished else plain.tokens)
            answer = as_message(self.encoder, ids, text, finished)
            asked = dataclasses.replace(asked, messages=[*asked.messages, answer])
        return {"answers": [dataclasses.asdict(answer) for answer in answers], "evidence": add_up(evidence)}

    def report(self, rows: list[tuple[list[Answer], Evidence]], prompts: list[Prompt]) -> None:
        """Writes and prints what the answers and the evidence of all rows show."""
        options = self.options
        answers = [answer for of_row, _ in rows for answer in of_row]
        report = summarise(answers, self.draft.shape.proposals, equal=not options.rejection) | {
            **{name: getattr(options, name) for name in ("target", "revision", "draft")},
            "dtype": options.dtype,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            **{name: getattr(options, name) for name in ANSWERED_WITH},
            "template_args": self.encoder.template_args,
            "examples": examples(answers, {(p.suite, p.number): p.question for p in prompts}, self.encoder.tokenizer),
        }
        verdicts = []
        if options.diagnose:
            evidence = add_up([of_row for _, of_row in rows])
            verdicts = judge(evidence, self.folder, self.draft.shape, self.info, self.trained)
            report["diagnosis"] = [dataclasses.asdict(verdict) for verdict in verdicts]
        if options.json:
            with writing(options.json), whole(options.json) as file:
                file.write_text(json.dumps(report, indent=2) + "\n")
        if options.tensorboard:
            to_tensorboard(report, options.tensorboard, self.trained.get("step", 0))
        if self.trained and self.encoder.template_args != self.trained["template_args"]:
            print(
                f"note: the draft was trained with the template arguments {json.dumps(self.trained['template_args'])}"
            )
        print_report(report)
        print(in_short(report))
        for verdict in verdicts:
            print(verdict)
        if verdicts:
            print(conclude(verdicts, self.trained.get("step"), self.trained.get("tau_curve") or []))


def digest_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Names weights, whatever files they lie in and whatever else these say."""
    state = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {list(tensor.shape)}".encode())
        state.update(memory_of(tensor.contiguous().cpu()))
    return f"tensors {state.hexdigest()}"


def answers_file(report: Path) -> Path:
    return report.with_suffix(".answers.jsonl")


def make_encoder(
    info: TargetInfo, trained: dict[str, Any], template_args: dict[str, Any] | None, date: str | None = None
) -> ChatEncoder:
    """Renders prompts as the draft's training did, as far as its record says, unless asked otherwise."""
    return ChatEncoder(
        info.tokenizer,
        info.stop_ids,
        trained.get("template_args", {}) if template_args is None else template_args,
        trained.get("chat_template"),
        drop_reasoning=trained.get("drop_reasoning", False),
        vocab_size=info.text.vocab_size,
        date=date or today(),
    )


def _difference(decoder: Decoder, prompt: list[int], plain: Decoded, fast: Decoded) -> dict[str, Any] | None:
    """Where the two outputs part, and how close the target's top two logits are there."""
    index = first_difference(plain.tokens, fast.tokens)
    if index is None:
        return None
    gap = decoder.gap(prompt, plain.tokens[:index])
    return {"token": index, "gap": gap, "tie": gap <= TIE}
