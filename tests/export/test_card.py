from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dflash_dist.config import Config, DataConfig, DraftConfig, TargetConfig
from dflash_dist.export.check import check
from dflash_dist.export.export import main
from dflash_dist.target.load import read_info
from tests.export.test_export import save_run

REPORT = {"prompts": 15, "tau": 2.7041, "speed_up": 1.206, "acceptance_by_slot": [0.71, 0.5, 0.333, 0.1, 0.0]}


def make_card(tmp_path: Path, config: Config | None = None, *options: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card of an export."""
    config = config or Config(target=TargetConfig(path="org/Target-8B"), data=DataConfig(path="org/chats:train"))
    config.output_dir = str(tmp_path / "run")
    save_run(tmp_path / "run", [4], config=config)
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "my-draft"), *options])
    _, front, text = (tmp_path / "my-draft/README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the card's tables by their first one."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    front, _ = make_card(tmp_path, None, "--license", "apache-2.0")
    assert front == {
        "base_model": "org/Target-8B",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dflash", "speculative-decoding"],
    }


def test_what_is_not_known_is_left_out_of_it(tmp_path):
    folder = tmp_path / "models/Target-8B"
    folder.mkdir(parents=True)
    front, text = make_card(tmp_path, Config(target=TargetConfig(path=str(folder))))
    assert front.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "# DFlash draft for Target-8B\n" in text


def test_the_targets_hub_id_may_be_told(tmp_path):
    config = Config(target=TargetConfig(path=str(tmp_path)))
    front, text = make_card(tmp_path, config, "--base-model", "org/Target-8B")
    assert front["base_model"] == "org/Target-8B"
    assert "vllm serve org/Target-8B " in text


def test_the_table_says_how_it_was_trained(tmp_path):
    config = Config(
        target=TargetConfig(path="org/Target-8B", revision="abc"),
        data=DataConfig(path={"/home/me/a.jsonl": 2.0, "org/chats": 1.0}, template_args={"enable_thinking": False}),
        draft=DraftConfig(init="target"),
    )
    _, text = make_card(tmp_path, config)
    table = rows(text)
    assert table["target"] == ["org/Target-8B, revision abc"]
    assert table["captured layers"] == ["outputs of decoder layers 1, 2, 4 of 6, counted from 0"]
    assert table["block"] == ["6 tokens: the anchor and 5 proposals"]
    assert table["begun from"] == ["the target's own top layers"]
    assert table["data"] == ["a.jsonl (weight 2), org/chats (weight 1)"]
    assert table["steps"] == ["4 of 64 rows of 3072 tokens"]
    assert table["its arguments"] == ['`{"enable_thinking": false}`']
    # fc 3 * 16 * 16; q, k, v, o over 4, 2, 2, 4 heads of 4; three products of 16 and 24; norms
    assert table["draft"] == [
        f"dflash, 1 layers, {768 + 12 * 4 * 16 + 3 * 16 * 24 + 4 * 16 + 2 * 4:,} parameters, bfloat16"
    ]


def test_nothing_of_the_machine_is_in_the_card(tmp_path, monkeypatch):
    (tmp_path / "chats.jsonl").write_text("")
    here = str(tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path.parent)
    for source in (here, {f"{tmp_path.name}/chats.jsonl": 1.0, "/mnt/elsewhere/more.jsonl": 2.0}):
        config = Config(
            target=TargetConfig(path=str(tmp_path)),
            data=DataConfig(path=source),
            draft=DraftConfig(init=str(tmp_path / "first-draft")),
        )
        make_card(tmp_path, config)
        text = (tmp_path / "my-draft/README.md").read_text()
        assert f"{tmp_path.name}/" not in text and "/mnt" not in text
        assert "chats.jsonl" in rows(text)["data"][0] and rows(text)["begun from"] == ["first-draft"]


def test_the_commands_have_each_engines_count(tmp_path):
    _, text = make_card(tmp_path)
    command = re.search(r"--speculative-config '(.*)'", text)
    assert command and json.loads(command[1]) == {"method": "dflash", "model": "my-draft", "num_speculative_tokens": 5}
    assert "--speculative-draft-model-path my-draft --speculative-num-draft-tokens 6\n" in text
    assert 'DFlashDraftModel.from_pretrained("my-draft"' in text


def test_template_arguments_are_given_to_the_engine(tmp_path):
    _, text = make_card(tmp_path, Config(data=DataConfig(template_args={"enable_thinking": False})))
    assert '`{"enable_thinking": false}`, which\n`--default-chat-template-kwargs` gives vLLM' in text


def test_without_a_report_the_card_says_how_to_make_one(tmp_path):
    _, text = make_card(tmp_path)
    assert "evaluate --target org/Target-8B --draft my-draft --prompts prompts.jsonl --json report.json" in text


def with_report(tmp_path: Path, report: object) -> str:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    return make_card(tmp_path, None, "--report", str(file))[1]


def test_a_report_becomes_a_table(tmp_path):
    text = with_report(tmp_path, REPORT)
    assert rows(text)["prompts"] == ["15", "2.70", "1.21x", "0.71 0.50 0.33 0.10 0.00"]


def test_suites_become_rows(tmp_path):
    suites = {"gsm8k": REPORT | {"prompts": 100}, "humaneval": {"tau": 3}}
    table = rows(with_report(tmp_path, REPORT | {"suites": suites}))
    assert table["gsm8k"][:2] == ["100", "2.70"]
    assert table["humaneval"] == ["–", "3.00", "–", "–"]
    assert table["all"][:2] == ["15", "2.70"]
    assert "all" not in rows(with_report(tmp_path, {"suites": suites}))


@pytest.mark.parametrize("report", [{"loss": 1}, [1]])
def test_another_file_is_no_report(tmp_path, report):
    with pytest.raises(ValueError, match=r"report\.json holds neither tau nor suites"):
        with_report(tmp_path, report)
    assert not (tmp_path / "my-draft").exists()


def test_a_report_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json does not exist"):
        make_card(tmp_path, None, "--report", str(tmp_path / "gone.json"))
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match=r"text\.json is not JSON"):
        make_card(tmp_path, None, "--report", str(tmp_path / "text.json"))


# ---- the speculators library's layout ----


def test_the_speculators_layout_names_the_target_and_passes_the_check(tmp_path, tiny_target, capsys):
    config = Config(target=TargetConfig(path=str(tiny_target)))
    front, text = make_card(tmp_path, config, "--format", "speculators", "--base-model", "org/Target-8B")
    assert front["library_name"] == "speculators" and "speculators" in front["tags"]
    assert "vllm serve my-draft\n" in text and "sglang.launch_server" not in text
    assert "SGLang" not in capsys.readouterr().out
    written = json.loads((tmp_path / "my-draft/config.json").read_text())["speculators_config"]
    assert written["verifier"] == {"name_or_path": "org/Target-8B", "architectures": ["Qwen3ForCausalLM"]}
    assert written["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 5}]
    assert [line.kind for line in check(tmp_path / "my-draft")].count("ok") == len(check(tmp_path / "my-draft"))
    assert read_info(str(tiny_target)).config.architectures == ["Qwen3ForCausalLM"]


def test_the_speculators_layout_needs_the_target(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist or holds no config"):
        make_card(tmp_path, Config(target=TargetConfig(path="nowhere")), "--format", "speculators")
    assert not (tmp_path / "my-draft").exists()
