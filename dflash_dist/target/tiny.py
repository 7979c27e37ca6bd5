"""A tiny random target with a tokenizer and chats, made on the spot: for the debug preset and for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dflash_dist.files import whole
from dflash_dist.target.rehearsal import quiet

BUILTIN_TARGET, BUILTIN_CHAT = "builtin:tiny", "builtin:chat"

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<mask>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and four special ones: pad 0, turn start 1, turn end (eos) 2, mask 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Of a Qwen3 of 6 layers and 0.3 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def make_tiny_target(folder: Path) -> None:
    """Writes a random 6-layer Qwen3 of 0.3 M parameters and its tokenizer, unless they are there already."""
    if folder.is_dir():
        return
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(tiny_config(tokenizer))
    with whole(folder) as partial, quiet():
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)


def make_tiny_chats(path: Path, count: int = 256) -> None:
    """Writes `count` conversations of small sums, unless they are there already."""
    if path.is_file():
        return
    numbers = random.Random(0)
    lines = []
    for _ in range(count):
        a, b = numbers.randint(1, 99), numbers.randint(1, 99)
        question = {"role": "user", "content": f"What is {a} plus {b}?"}
        answer = {"role": "assistant", "content": f"We add {a} and {b}. The sum of {a} and {b} is {a + b}."}
        lines.append(json.dumps({"messages": [question, answer]}))
    with whole(path) as partial:
        partial.write_text("\n".join(lines) + "\n")
