"""Writes the training prompts of smollm2.md: `python docs/results/smollm2_prompts.py TARGET OUT.jsonl`.

Three domains, none of them from the suites: Python functions of the standard library, by signature and docstring; word
problems that the target itself makes up from their first words; and questions that it makes up from nothing, as it is
given the beginning of a user's turn (as in Magpie, arXiv 2406.08464).
"""

import ast
import json
import random
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_dist.evaluate.suites import SUITES

CODE, WORD_PROBLEMS, QUESTIONS = 1400, 1600, 1000
BATCH = 64
NAMES = [
    "Ali",
    "Anna",
    "Ben",
    "Carlos",
    "Chen",
    "Dana",
    "Elena",
    "Fatima",
    "George",
    "Hana",
    "Ivan",
    "Jack",
    "Kim",
    "Lena",
    "Marco",
    "Nina",
    "Omar",
    "Priya",
    "Rosa",
    "Tom",
]
OPENINGS = """
{name} has {n} {things}. | {name} buys {n} {things} for ${m} each. | A farmer sells {n} {things} every day.
A shop sells {things} for ${m} each. | {name} and a friend share {n} {things}. | {name} reads {n} pages a day.
A train travels {n} miles in {m} hours. | {name} earns ${n} an hour and works | There are {n} students in a class.
{name} bakes {n} {things} on Monday and | A box holds {n} {things}. | {name} saves ${m} every week.
The price of {n} {things} is ${m}. | {name} is {m} years older than | {name} runs {m} miles every morning.
A garden is {n} feet long and {m} feet wide. | {name} had ${n} and spent ${m} on | Half of the {n} {things}
A recipe needs {m} cups of flour for {n} {things}. | {name} drives {n} miles to work | In a school of {n} children,
{name} plants {n} rows of {things}. | A bus carries {n} passengers. | If {m} workers paint {n} houses
{name} collects {n} {things} and gives {m} of them | The sum of the ages of {name} and | It takes {name} {n} minutes to
A tank holds {n} gallons of water. | {name} scored {n} points in the first game, | Each of the {m} friends pays ${n} for
""".replace("\n", "|").split("|")
THINGS = [
    "apples",
    "books",
    "cookies",
    "eggs",
    "flowers",
    "marbles",
    "pencils",
    "pizzas",
    "shirts",
    "stickers",
    "tickets",
    "toys",
]


def functions() -> list[str]:
    """Signatures and docstrings of the standard library's public functions."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(file.parts):
            continue
        try:
            source = file.read_text()
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in nodes:
            text, arguments = ast.get_docstring(node) or "", ast.unparse(node.args)
            if 40 <= len(text) <= 500 and not node.name.startswith("_") and arguments.replace("self", ""):
                text = text.replace("\n", "\n    ")
                found.append(f'\ndef {node.name}({arguments}):\n    """{text}\n    """\n')
    return sorted(set(found))


@torch.no_grad()
def made_up(folder: str, openings: list[str], seed: int) -> list[str]:
    """User turns that the target goes on with from their first words, sampled at temperature 0.8."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    before = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False).split("\0")[0]
    torch.manual_seed(seed)
    texts = []
    for start in range(0, len(openings), BATCH):
        some = openings[start : start + BATCH]
        inputs = tokenizer(
            [before + text for text in some], return_tensors="pt", padding=True, add_special_tokens=False
        )
        output = target.generate(**inputs, do_sample=True, temperature=0.8, top_k=0, top_p=0.95, max_new_tokens=80)
        ends = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
        # A turn that did not end is no question.
        texts += [text + end.split("<|im_end|>")[0] for text, end in zip(some, ends) if "<|im_end|>" in end]
        print(f"{start + len(some)} of {len(openings)}", flush=True)
    return [text.strip() for text in dict.fromkeys(texts) if len(text.strip()) > 20]


def main(folder: str, out: str) -> None:
    pick = random.Random(0)
    code, math = (SUITES[name].questions for name in ("humaneval", "gsm8k"))
    openings = [
        pick.choice(OPENINGS)
        .strip()
        .format(name=pick.choice(NAMES), things=pick.choice(THINGS), n=pick.randint(5, 90), m=pick.randint(2, 9))
        for _ in range(WORD_PROBLEMS)
    ]
    library = functions()
    asked = [code({"prompt": text})[0] for text in pick.sample(library, min(CODE, len(library)))]
    asked += [math({"question": text})[0] for text in made_up(folder, openings, seed=0)]
    asked += made_up(folder, [""] * QUESTIONS, seed=1)
    asked.sort(key=len)  # `regenerate` answers them in batches, each as wide as its longest prompt
    with Path(out).open("w") as file:
        file.writelines(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in asked)
    print(f"{len(asked)} prompts")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
