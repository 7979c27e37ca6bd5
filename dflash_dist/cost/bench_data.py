"""Tokenising and packing against the obvious loop, and the memory of a large cache: `python -m dflash_dist bench-data`.

Both ways read the same chats and are timed in turns (A B A B), in one process. The memory is that of a process of its
own which opens a cache and packs it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dflash_dist.config import DataConfig
from dflash_dist.data.account import Account
from dflash_dist.data.chat import ChatEncoder, Document
from dflash_dist.data.documents import as_batch, entry_folder, write_documents
from dflash_dist.data.rows import cache_folder, load_data, make_encoder
from dflash_dist.data.sources import CHUNK_ROWS, FileSource
from dflash_dist.options import option, parse
from dflash_dist.target.folder import read_tokenizer

WORDS = ["the", "model", "writes", "an", "answer", "about", "rivers,", "prices", "and", "weather.", "It", "stops"]
SHORT_ROW = 24  # tokens of a document in the cache that is opened


@dataclass(frozen=True, kw_only=True)
class BenchDataOptions:
    target: str = option("model folder or hub id; only its tokenizer is read")
    trust_remote_code: bool = option("run Python code that the target brings", False)
    rows: int = option("conversations to tokenise", 20_000)
    rounds: int = option("times that each way is measured", 2)
    open_rows: int = option("short rows in the cache that is opened", 1_000_000)
    seq_len: int = option("length of a packed row [tokens]", 3072)
    json: Path | None = option("file for the report", None)


def main(argv: list[str]) -> None:
    options = parse(BenchDataOptions, "bench-data", __doc__, argv)
    with tempfile.TemporaryDirectory() as folder:
        report = time_tokenising(options, Path(folder)) | measure_opening(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(f"{name:<28} {value:,.4g}" for name, value in report.items()))


def time_tokenising(options: BenchDataOptions, folder: Path) -> dict[str, float]:
    """Rows per second of both ways, the best of all rounds."""
    path = folder / "chats.jsonl"
    write_chats(path, options.rows)
    tokenizer = read_tokenizer(options.target, trust_remote_code=options.trust_remote_code)
    loop: list[float] = []
    ours: list[float] = []
    for number in range(options.rounds):
        config = DataConfig(path=str(path), seq_len=options.seq_len, cache_dir=str(folder / f"cache-{number}"))
        encoder = make_encoder(config, tokenizer, [tokenizer.eos_token_id])
        begun = time.perf_counter()
        documents = obvious_loop(path, tokenizer, options.seq_len)
        between = time.perf_counter()
        data = load_data(config, encoder, seed=0, pack=True)
        loop.append(between - begun)
        ours.append(time.perf_counter() - between)
        assert documents == len(data.train.documents), "both ways read the same chats"
    return {
        "cores": len(os.sched_getaffinity(0)),
        "rows": options.rows,
        "tokens": data.train.tokens,
        "filled": data.train.filled,
        "rows_per_s_obvious_loop": options.rows / min(loop),
        "rows_per_s": options.rows / min(ours),
        "ratio": min(loop) / min(ours),
    }


def write_chats(path: Path, rows: int) -> None:
    """Conversations of one to three turns, with lengths that vary as those of chats do."""
    pick = random.Random(0)

    def says(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(pick.choices(WORDS, k=int(pick.lognormvariate(4, 0.8)) + 1))}

    with path.open("w") as file:
        for _ in range(rows):
            messages = [says(role) for _ in range(pick.randint(1, 3)) for role in ("user", "assistant")]
            file.write(json.dumps({"messages": messages}) + "\n")


def obvious_loop(path: Path, tokenizer: Any, seq_len: int) -> int:
    """One conversation after the other, with Python lists: what a trainer's first version does."""
    documents = []
    for line in path.open():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [False] * len(encoded.input_ids)
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(tokenizer.apply_chat_template(messages[:k], tokenize=False, add_generation_prompt=True))
                end = len(tokenizer.apply_chat_template(messages[: k + 1], tokenize=False))
                for i, (left, right) in enumerate(encoded.offset_mapping):
                    mask[i] |= start <= left and right <= end
        documents.append((encoded.input_ids[:seq_len], mask[:seq_len]))
    room: list[list[int]] = []  # (free tokens, document ...) of every open row, first fit
    for number, (ids, _) in enumerate(sorted(documents, key=lambda document: -len(document[0]))):
        row = next((row for row in room[-64:] if row[0] >= len(ids)), None)
        if row is None:
            room.append(row := [seq_len])
        row[0] -= len(ids)
        row.append(number)
    return len(documents)


def measure_opening(options: BenchDataOptions, folder: Path) -> dict[str, float]:
    """Opens and packs a cache of short rows, as a rank does at its start, in a process of its own."""
    path = folder / "short.jsonl"
    path.write_bytes(b"{}\n" * options.open_rows)  # never read: its entry of the cache is there already
    tokenizer = read_tokenizer(options.target, trust_remote_code=options.trust_remote_code)
    config = DataConfig(path=str(path), seq_len=options.seq_len, cache_dir=str(folder / "short"))
    encoder = make_encoder(config, tokenizer, [tokenizer.eos_token_id])
    document = Document(np.arange(SHORT_ROW, dtype=np.int32), [(SHORT_ROW // 2, SHORT_ROW)])
    made = entry_folder(cache_folder(config), FileSource(path), encoder)
    made.mkdir(parents=True)
    rows = range(1, options.open_rows + 1)
    chunks = (rows[start : start + CHUNK_ROWS] for start in range(0, options.open_rows, CHUNK_ROWS))
    digest = write_documents(made / "documents.arrow", (as_batch(chunk, [document] * len(chunk)) for chunk in chunks))
    account = Account(str(path), options.open_rows, {"messages": 1}, digest=digest)
    (made / "account.json").write_text(json.dumps(vars(account)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, mib = pool.apply(open_cache, (config, encoder))
    return {"opened_rows": options.open_rows, "opening_s": seconds, "opening_peak_mib_above_rest": mib}


def open_cache(config: DataConfig, encoder: ChatEncoder) -> tuple[float, float]:
    """Seconds to open and pack the cache and to make a batch, and the peak of memory above the resting size [MiB]."""
    begun, rest = time.perf_counter(), _status_mib("VmRSS")
    data = load_data(config, encoder, seed=0, pack=True)
    data.train.batch([0, len(data.train) - 1])
    return time.perf_counter() - begun, _status_mib("VmHWM") - rest


def _status_mib(field: str) -> float:
    """A size of this process. Not `getrusage`, whose peak a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024
