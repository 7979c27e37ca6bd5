"""The model card of an export: a README.md for people and, in its front matter, for the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dflash_dist import __version__
from dflash_dist.config import Config
from dflash_dist.draft.base import Draft
from dflash_dist.draft.shape import DraftShape
from dflash_dist.reading import is_kind

UNKNOWN = "–"


@dataclass(frozen=True)
class Card:
    """What a card is written from."""

    name: str  # of the draft's folder
    target: str  # hub id, or the name of a folder
    on_hub: bool  # whether it is a hub id
    kind: type[Draft]
    shape: DraftShape
    parameters: int
    dtype: str
    layout: str  # dflash or speculators
    step: int
    run: Config
    license: str | None
    report: dict[str, Any] | None  # of `evaluate --json`

    def text(self) -> str:
        parts = [self._front_matter(), self._training(), self._acceptance(), self._serving()]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self) -> str:
        known = {
            "base_model": self.target if self.on_hub else None,
            "license": self.license,
            "library_name": "transformers" if self.layout == "dflash" else "speculators",
            "pipeline_tag": "text-generation",
            "tags": ["dflash", "speculative-decoding", *(["speculators"] if self.layout == "speculators" else [])],
        }
        stated = {key: value for key, value in known.items() if value}
        return f"---\n{yaml.safe_dump(stated, sort_keys=False)}---"

    def _training(self) -> str:
        shape, train, data = self.shape, self.run.train, self.run.data
        ids = ", ".join(map(str, shape.target_layer_ids))
        starts = {"random": "random weights", "target": "the target's own top layers"}
        rows = {
            "target": f"{self.target}, revision {self.run.target.revision}",
            "captured layers": f"outputs of decoder layers {ids} of {shape.num_target_layers}, counted from 0",
            "block": f"{shape.proposals + 1} tokens: the anchor and {shape.proposals} proposals",
            "mask token": shape.mask_token_id,
            "draft": f"{self.run.draft.kind}, {shape.num_layers} layers, {self.parameters:,} parameters, {self.dtype}",
            "layers see": seen_by(shape),
            "begun from": starts.get(self.run.draft.init) or shown(self.run.draft.init),
            "data": sources(data.path),
            "steps": f"{self.step:,} of {train.global_batch_size} rows of {data.seq_len} tokens",
            "peak learning rate": f"{self.run.lr:g}",
            "chat template": "one of its own, in training.json" if data.chat_template else "the target's own",
            "its arguments": f"`{json.dumps(data.template_args)}`" if data.template_args else "none",
        }
        if data.date:
            rows["day that it writes"] = data.date
        return f"""# DFlash draft for {self.target}

A block-diffusion draft for speculative decoding ([arXiv 2602.06036](https://arxiv.org/abs/2602.06036)): it proposes
blocks of tokens, which {self.target} verifies in one pass each, so that the output stays the target's own. Trained with
dflash_dist {__version__}.

{table(["", ""], [[key, str(value)] for key, value in rows.items()])}"""

    def _acceptance(self) -> str:
        if self.report is None:
            return f"""## Acceptance

Not measured yet:

```bash
python -m dflash_dist evaluate --target {self.target} --draft {self.name} --prompts prompts.jsonl --json report.json
```"""
        suites = {name: suite for name, suite in (self.report.get("suites") or {}).items() if isinstance(suite, dict)}
        rows = [measured(name, suite) for name, suite in suites.items()]
        if "tau" in self.report:
            rows.append(measured("all" if suites else "prompts", self.report))
        return f"""## Acceptance

τ is the mean number of tokens that a verification pass emits, measured by real decoding; the acceptance of slot k is
the share of passes that accepted the first k proposals.

{table(["suite", "prompts", "τ", "speed-up", "acceptance by slot"], rows)}"""

    def _serving(self) -> str:
        block, rendering = self.shape.proposals + 1, ""
        if arguments := self.run.data.template_args:
            rendering = f"""

Render chats as the training did, or acceptance suffers: with the template arguments `{json.dumps(arguments)}`, which
`--default-chat-template-kwargs` gives vLLM and `chat_template_kwargs` in a request gives either server."""
        engines = self.kind.engines
        served = [SPECULATORS] if self.layout == "speculators" else [PUBLISHED[name] for name in engines]
        others = [name for name in PUBLISHED if name not in engines]
        if others:
            served.append(f"This kind of draft is not served by {' or '.join(others)}.")
        told = {"method": self.kind.method, "algorithm": self.kind.method.upper(), "target": self.target}
        commands = "\n\n".join(served).format(**told, draft=self.name, proposals=block - 1, block=block)
        return f"""## Serve

Paths are seen from the folder that holds `{self.name}`. Serve blocks of {block} tokens, as trained: vLLM counts
the {block - 1} proposals of a block, SGLang all its {block} tokens.{rendering}

{commands}"""


BY_VLLM = """```bash
vllm serve {target} \\
    --speculative-config '{{"method": "{method}", "model": "{draft}", "num_speculative_tokens": {proposals}}}'
```"""
PUBLISHED = {
    "vLLM": f"""vLLM:

{BY_VLLM}""",
    "SGLang": """SGLang:

```bash
python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} \\
    --speculative-draft-model-path {draft} --speculative-num-draft-tokens {block}
```""",
    "transformers": """transformers, with the class of [z-lab/dflash](https://github.com/z-lab/dflash), which drafts
blocks of {block} tokens, as the config says:

```python
from dflash.model import DFlashDraftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

draft = DFlashDraftModel.from_pretrained("{draft}", dtype="auto", device_map="cuda:0").eval()
target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto", device_map="cuda:0").eval()
tokenizer = AutoTokenizer.from_pretrained("{target}")
# draft.spec_generate(target=target, input_ids=..., max_new_tokens=256, stop_token_ids=[tokenizer.eos_token_id])
```""",
}
SPECULATORS = f"""vLLM, which finds the target and the number of proposals in this folder's config:

```bash
vllm serve {{draft}}
```

or, with a target at another place:

{BY_VLLM}

This is the layout of the [speculators](https://github.com/vllm-project/speculators) library. For other
engines, export with `--format dflash`."""


def seen_by(shape: DraftShape) -> str:
    sliding = [str(number) for number, mask in enumerate(shape.masks) if mask.window]
    causal = {None: "only sliding layers", True: "all layers", False: "none"}[shape.is_causal]
    context = f"a window of {shape.sliding_window} tokens in layers {', '.join(sliding)}" if sliding else "all"
    return f"{context} of the context; causal inside the block: {causal}"


def measured(name: str, result: dict[str, Any]) -> list[str]:
    """A row of the table of acceptance; what the report does not say, or not in numbers, is left open."""
    shares: Any = result.get("acceptance_by_slot")

    def number(key: str, form: str) -> str:
        return form.format(result[key]) if is_kind(result.get(key), float) else UNKNOWN

    slots = (
        " ".join(f"{share:.2f}" for share in shares if share is not None) if is_kind(shares, list[float | None]) else ""
    )
    return [name, number("prompts", "{}"), number("tau", "{:.2f}"), number("speed_up", "{:.2f}x"), slots or UNKNOWN]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def sources(path: str | dict[str, float]) -> str:
    if isinstance(path, str):
        return shown(path)
    return ", ".join(f"{shown(source)} (weight {weight:g})" for source, weight in path.items())


def shown(path: str) -> str:
    """A name that says nothing of the machine: hub ids as they are, of files and folders the last part."""
    return Path(path).name if Path(path).exists() or path.startswith(("/", ".", "~")) else path
