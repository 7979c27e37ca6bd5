"""Damaged and foreign files, as they come: every one ends in a sentence of ours that names it, or does no harm."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dflash_dist.answers.parts import Parts
from dflash_dist.contract.folder import check_draft, read_draft, read_record, write_draft
from dflash_dist.data.chat import ChatEncoder
from dflash_dist.data.documents import open_documents
from dflash_dist.data.sources import FileSource
from dflash_dist.decoding.speculative import Decoded
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.evaluate.evaluate import main as evaluate
from dflash_dist.evaluate.evaluate import read_answers
from dflash_dist.evaluate.report import Answer, summarise
from dflash_dist.export.check import check
from dflash_dist.export.export import main as export
from dflash_dist.target.features import FeatureFolder, read_index, refuse_other
from dflash_dist.target.load import check_loading, read_info
from dflash_dist.training.checkpoint import Checkpoints, best_step, newest_whole
from dflash_dist.training.metrics import _cut_back
from tests.export.test_export import SHAPE, save_run
from tests.hostile import as_json, changed, copied, damaged, refused, write
from tests.target.test_features import small_disk
from tests.tiny import target_of, tiny_shape

IDS = [1, 2, 4]


def a_file(folder: Path, *patterns: str) -> st.SearchStrategy[tuple[str, bytes | None]]:
    """One file of a folder and what is left of it: bytes damaged, or JSON with a value changed."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    of_each = []
    for file in files:
        contents = [damaged(file.read_bytes())]
        if file.suffix == ".json" and file.stat().st_size < 5000:
            contents.append(changed(json.loads(file.read_bytes())).map(as_json))
        of_each.append(st.tuples(st.just(str(file.relative_to(folder))), st.one_of(contents)))
    return st.one_of(of_each)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


# ------------------------------------------------------------------------------------------------------ targets


def look_at_target(folder: Path) -> None:
    info = read_info(str(folder))
    check_loading(info, target_of(IDS))


@given(data=st.data())
def test_a_damaged_target_is_refused_by_name_before_anything_is_loaded(tiny_target, room, data) -> None:
    name, content = data.draw(a_file(tiny_target, "*.json", "*.safetensors"))
    folder = copied(tiny_target, room / "target")
    write(folder / name, content)
    refused(lambda: look_at_target(folder), folder)


# ------------------------------------------------------------------------------------------------------ drafts


@pytest.fixture(scope="module")
def draft(room) -> Path:
    torch.manual_seed(0)
    write_draft(room / "whole-draft", DFlashDraftModel, SHAPE, DFlashDraftModel(SHAPE).state_dict(), "float32")
    record = {"template_args": {}, "chat_template": None, "drop_reasoning": False, "step": 3, "seq_len": 64}
    (room / "whole-draft/training.json").write_text(json.dumps(record))
    return room / "whole-draft"


def look_at_draft(folder: Path) -> None:
    check_draft(folder)
    read_record(folder)
    read_draft(folder, torch.float32, torch.device("cpu"))


@given(data=st.data())
def test_a_damaged_draft_is_refused_by_name(draft, room, data) -> None:
    name, content = data.draw(a_file(draft, "*.json", "*.safetensors"))
    folder = copied(draft, room / "draft")
    write(folder / name, content)
    refused(lambda: look_at_draft(folder), folder)
    refused(lambda: [str(line) for line in check(folder)], folder)


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def run(room) -> Path:
    state = {"identity": {"train.seed": 0}, "shape": asdict(SHAPE), "tau": 2.5}
    save_run(room / "whole-run", [4, 8], state)
    return room / "whole-run"


@given(data=st.data())
def test_a_damaged_checkpoint_is_left_out_and_not_exported(run, room, data) -> None:
    name, content = data.draw(a_file(run, "config.yaml", "checkpoints/step-00000008/*"))
    folder = copied(run, room / "run")
    write(folder / name, content)
    checkpoints = folder / "checkpoints"
    step = newest_whole(checkpoints)
    assert step in (4, 8) and best_step(checkpoints) in (4, 8)
    draft = DFlashDraftModel(SHAPE)
    Checkpoints(checkpoints, keep=2).load(step, draft, torch.optim.AdamW(draft.parameters(), fused=True))
    refused(lambda: export(["--run", str(folder), "--out", str(room / "exported")]), folder)


def test_a_tau_that_is_text_is_a_damaged_checkpoint(run, room, capsys) -> None:
    folder = copied(run, room / "run") / "checkpoints"
    file = folder / "step-00000008/state.json"
    write(file, as_json(json.loads(file.read_bytes()) | {"tau": "2.5"}))
    assert newest_whole(folder) == 4 and best_step(folder) == 4
    assert f"is not used: tau in {file} is '2.5', which is no float | None" in capsys.readouterr().out


@given(data=st.data())
def test_damaged_metrics_are_cut_back_to_what_is_whole(room, data) -> None:
    lines = [{"step": step, "train/loss": 1.5} for step in (1, 2, 3)]
    file = room / "metrics.jsonl"
    whole = b"".join(as_json(line) + b"\n" for line in lines)
    odd = st.builds(
        lambda odd, at: b"\n".join([*whole.splitlines()[:at], as_json(odd), b""]), changed(lines[0]), st.integers(0, 3)
    )
    write(file, data.draw(st.one_of(damaged(whole), odd)) or b"")
    _cut_back(file, 2)
    assert all(json.loads(line)["step"] <= 2 for line in file.read_bytes().splitlines())


# ------------------------------------------------------------------------------------------------------ features


def open_features(folder: Path, index: dict) -> FeatureFolder:
    return FeatureFolder(folder, index, {"train": np.array([3, 2, 4])}, 8, torch.float32)


INDEX = {"target": "weights 0", "target.layer_ids": IDS, "rows per shard": 2, "bytes": 288}


@pytest.fixture(scope="module")
def features(room) -> Path:
    whole = open_features(room / "whole-features", INDEX)
    whole.begin()
    for shard in whole.shards:
        rows = {row: torch.full((int(whole.filled["train"][row]), 8), row + 1.0) for row in shard.rows}
        whole.write(shard, rows)
    return room / "whole-features"


def use_features(folder: Path) -> None:
    """As training does, and then the rows that were captured."""
    index = read_index(folder)
    refuse_other(index, {key: INDEX[key] for key in ("target", "target.layer_ids")}, folder)
    opened = open_features(folder, index)
    opened.lacking()
    for row in range(3):
        filled = int(opened.filled["train"][row])
        assert torch.equal(opened.read("train", [row], 4)[0, :filled], torch.full((filled, 8), row + 1.0))


@given(data=st.data())
def test_damaged_features_are_refused_or_read_right(features, room, data) -> None:
    name, content = data.draw(a_file(features, "*"))
    folder = copied(features, room / "features")
    write(folder / name, content)
    refused(lambda: use_features(folder), folder)


# ------------------------------------------------------------------------------------------------------ part files


SETTINGS = {"target": "t", "seed": 0}
PLAIN, FAST = Decoded([1, 2, 3], 0.5), Decoded([1, 2, 3], 0.25, [2, 1], [1, 0])
ANSWER = asdict(Answer("s", 0, 0, PLAIN, FAST, {"token": 1, "gap": 0.5, "tie": False}))
LINES = [
    {"row": 1, "turn": 0, "message": {"role": "assistant", "content": "Hi"}},
    {"answers": [ANSWER], "evidence": {"own": [1.0, 2.0]}, "row": 1},
    {"answers": [ANSWER], "evidence": {"own": [1.0, 2.0]}, "row": 2},
    {"error": "refused", "row": 3},
]


def a_line(position: int) -> st.SearchStrategy[bytes]:
    """All lines, one of them with a value changed."""
    return changed(LINES[position]).map(
        lambda line: b"".join(as_json(line if k == position else other) + b"\n" for k, other in enumerate(LINES))
    )


PART = b"".join(as_json(line) + b"\n" for line in LINES)


def go_on(out: Path) -> None:
    """As `regenerate` and `evaluate` do: what is finished, what is begun, and the merge."""
    parts = Parts(out, SETTINGS)
    places = parts.index()
    parts.turns([1, 2, 3])
    if {1, 2, 3} <= places.keys():
        assert parts.merge([1, 2, 3]) is not None
        rows = read_answers(parts)
        summarise([answer for answers, _ in rows for answer in answers], 8)


@given(part=st.one_of(damaged(PART), st.integers(0, 3).flatmap(a_line)))
def test_damaged_part_files_are_refused_by_name_or_count_as_unwritten(room, part) -> None:
    folder = room / "parts"
    (folder / "out.jsonl.parts").mkdir(parents=True, exist_ok=True)
    for left in folder.glob("out.jsonl*"):
        left.is_file() and left.unlink()
    write(folder / "out.jsonl.parts/rank-00000.jsonl", part or b"")
    write(folder / "out.jsonl.settings.json", as_json(SETTINGS))
    refused(lambda: go_on(folder / "out.jsonl"), folder)


@given(settings=st.one_of(damaged(as_json(SETTINGS)), changed(SETTINGS).map(as_json)))
def test_damaged_settings_are_refused_by_name(room, settings) -> None:
    out = room / "settings/out.jsonl"
    out.parent.mkdir(exist_ok=True)
    described = out.with_name("out.jsonl.settings.json")
    described.write_bytes(b"")
    write(described, settings)
    ended = refused(lambda: Parts(out, SETTINGS), described)
    assert ended or settings is None or json.loads(described.read_bytes()) == SETTINGS


# ------------------------------------------------------------------------------------------------------ single causes


WRONG_KINDS = {  # keys of a draft's config.json
    "architectures": (["a", ["b"]], 5, {}),
    "block_size": ([8], "8", 10**30, 0),
    "num_hidden_layers": ([2], 10**30, 10**9, 0),
    "hidden_size": (10**30, -4, True, 16.5),
    "layer_types": (1, "full_attention", [["a"]]),
    "rope_parameters": ({"rope_theta": [1]}, {"rope_theta": float("nan")}, {"rope_theta": float("inf")}, [1]),
    "dtype": ([1],),
    "dflash_config": ([1], {"block_size": [8], "mask_token_id": 3, "target_layer_ids": [1, 2]}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_KINDS.items() for value in values])
def test_a_drafts_config_of_wrong_kinds_is_a_line_of_check_or_a_sentence(draft, room, key, value) -> None:
    folder = copied(draft, room / "kinds")
    config = json.loads((folder / "config.json").read_bytes())
    for place in [config] + [config["dflash_config"]] * (key == "block_size"):
        place[key] = value
    write(folder / "config.json", as_json(config))
    lines = [line for line in check(folder) if line.kind != "ok"]
    assert any(key in str(line) or line.rule == "config" for line in lines), lines
    if key not in ("architectures", "dtype"):  # which only engines read
        assert refused(lambda: look_at_draft(folder), folder)


def test_a_damaged_draft_ends_an_evaluation_before_the_target_is_loaded(tiny_target, tmp_path, monkeypatch) -> None:
    shape = tiny_shape(block_size=4)
    write_draft(tmp_path / "draft", DFlashDraftModel, shape, DFlashDraftModel(shape).state_dict(), "float32")
    write(tmp_path / "draft/model.safetensors", (tmp_path / "draft/model.safetensors").read_bytes()[:-9])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    monkeypatch.setattr("dflash_dist.evaluate.evaluate.load_whole", lambda *_: pytest.fail("it was loaded"))
    argv = ["--target", str(tiny_target), "--draft", str(tmp_path / "draft"), "--prompts", str(prompts)]
    assert refused(lambda: evaluate(argv), f"{tmp_path}/draft/model.safetensors is cut or damaged")


def test_a_damaged_cache_of_tokens_says_to_delete_it(tiny_target, write_chats, tmp_path) -> None:
    info = read_info(str(tiny_target))
    encoder = ChatEncoder(info.tokenizer, info.stop_ids)
    source = FileSource(write_chats([("user", "Hi"), ("assistant", "yes")]))
    open_documents(source, encoder, tmp_path / "cache", 0, workers=1)
    [made] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    for name, content in (("documents.arrow", b"x"), ("account.json", b"[]"), ("documents.arrow", None)):
        folder = copied(made, tmp_path / "whole")
        write(made / name, content)
        assert refused(lambda: open_documents(source, encoder, tmp_path / "cache", 0, workers=1), f"{made} cannot be")
        copied(folder, made)


def test_a_full_disk_is_named_with_what_could_not_be_written(run, tmp_path) -> None:
    parts = Parts(tmp_path / "out.jsonl", SETTINGS)
    with small_disk(1000):
        assert refused(lambda: export(["--run", str(run), "--out", str(tmp_path / "out")]), f"{tmp_path}/out cannot be")

        def answer() -> None:
            with parts.append(0) as append:
                append({"row": 1, "content": "x" * 2000})

        assert refused(answer, f"{tmp_path}/out.jsonl.parts/rank-00000.jsonl cannot be written")
