from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dflash_dist.config import Config, DataConfig, TargetConfig
from dflash_dist.contract.folder import read_draft
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.export.export import main
from dflash_dist.training import setup
from dflash_dist.training.checkpoint import Checkpoints
from tests.tiny import tiny_shape

SHAPE = tiny_shape(hidden_size=16, num_layers=1, head_dim=4, intermediate_size=24, block_size=6)


def save_run(
    run, steps: list[int], state: dict | None = None, config: Config | None = None
) -> dict[int, dict[str, torch.Tensor]]:
    """A run folder with a checkpoint for each step, as the trainer writes them; returns the drafts by step."""
    setup.describe_run(config or Config(output_dir=str(run), data=DataConfig(template_args={"enable_thinking": False})))
    checkpoints, drafts = Checkpoints(run / "checkpoints", keep=10), {}
    for step in steps:
        torch.manual_seed(step)
        draft = DFlashDraftModel(SHAPE)
        optimizer = torch.optim.AdamW(draft.parameters(), fused=True)
        checkpoints.save(step, draft, optimizer, state or {"shape": asdict(SHAPE)})
        drafts[step] = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    checkpoints.wait()
    return drafts


def _assert_equal(folder, tensors: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


def test_the_newest_step_is_exported(tmp_path):
    drafts = save_run(tmp_path / "run", [9, 20, 100])  # by the alphabet of bare numbers, 9 would be the newest
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft"), "--dtype", "float32"])
    _assert_equal(tmp_path / "draft", drafts[100])


def test_a_knob_that_is_not_known_here_is_left_out_and_named(tmp_path, capsys):
    save_run(tmp_path / "run", [9])
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("template_args:", "template_arg:"))
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    assert f"note: {config} states data.template_arg, which this version does not know" in capsys.readouterr().out


def test_step_picks_a_kept_checkpoint(tmp_path):
    drafts = save_run(tmp_path / "run", [0, 20, 30])
    for step in (0, 20):
        out = tmp_path / f"draft-{step}"
        main(["--run", str(tmp_path / "run"), "--out", str(out), "--step", str(step), "--dtype", "float32"])
        _assert_equal(out, drafts[step])


def test_best_is_the_checkpoint_that_decoded_best(tmp_path):
    drafts = save_run(tmp_path / "run", [10, 20, 30])
    command = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft"), "--step", "best", "--dtype", "float32"]
    with pytest.raises(ValueError, match=r"has no best checkpoint: eval\.every decodes while training"):
        main(command)
    for step, tau in ((10, 2.0), (20, 3.0), (30, 2.5)):
        file = tmp_path / f"run/checkpoints/step-{step:08d}/state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tau": tau}))
    main(command)
    _assert_equal(tmp_path / "draft", drafts[20])
    assert json.loads((tmp_path / "draft/training.json").read_text())["step"] == 20


def test_a_damaged_checkpoint_is_refused_and_another_is_exported(tmp_path):
    drafts = save_run(tmp_path / "run", [20, 30])
    weights = tmp_path / "run/checkpoints/step-00000030/draft.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # as many bytes, and still a safetensors file
    weights.write_bytes(content)
    command = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft"), "--dtype", "float32"]
    told = r"step-00000030 cannot be exported: draft.safetensors is cut or damaged; choose another --step of 20, 30"
    with pytest.raises(ValueError, match=told):
        main(command)
    assert not (tmp_path / "draft").exists()
    main([*command, "--step", "20"])
    _assert_equal(tmp_path / "draft", drafts[20])


def test_the_export_is_bfloat16_unless_asked_otherwise(tmp_path):
    drafts = save_run(tmp_path / "run", [4])
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    assert {tensor.dtype for tensor in load_file(tmp_path / "draft/model.safetensors").values()} == {torch.bfloat16}
    _assert_equal(tmp_path / "draft", drafts[4])
    assert json.loads((tmp_path / "draft/config.json").read_text())["dtype"] == "bfloat16"


def test_the_exported_folder_is_a_draft_of_the_runs_shape(tmp_path):
    drafts = save_run(tmp_path / "run", [4])
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "deep/down/draft"), "--dtype", "float32"])
    draft = read_draft(tmp_path / "deep/down/draft", torch.float32, torch.device("cpu"))
    assert draft.shape == SHAPE
    assert all(torch.equal(tensor, drafts[4][name]) for name, tensor in draft.state_dict().items())


def test_a_second_export_replaces_the_first(tmp_path):
    drafts = save_run(tmp_path / "run", [20, 30])
    for step in (30, 20):
        main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft"), "--step", str(step)])
    _assert_equal(tmp_path / "draft", drafts[20])


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    save_run(tmp_path / "run", [4])
    exports = []
    for _ in range(6):  # metadata in random order would be the same once in 32 times
        main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
        exports.append({path.name: path.read_bytes() for path in (tmp_path / "draft").iterdir()})
    assert all(export == exports[0] for export in exports)


def test_the_settings_of_the_engines_are_printed(tmp_path, capsys):
    save_run(tmp_path / "run", [4])
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    printed = capsys.readouterr().out
    assert "step-00000004" in printed
    assert "num_speculative_tokens=5\n" in printed  # vLLM counts proposals, SGLang the block
    assert "--speculative-num-draft-tokens 6\n" in printed


def test_a_checkpoint_that_is_still_being_written_is_not_exported(tmp_path):
    drafts = save_run(tmp_path / "run", [4, 8])
    folder = tmp_path / "run/checkpoints"
    (folder / "step-00000008").rename(folder / ".step-00000008.partial")
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft"), "--dtype", "float32"])
    _assert_equal(tmp_path / "draft", drafts[4])


def test_a_folder_without_a_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for run in (tmp_path / "run", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{run} holds no checkpoint"):
            main(["--run", str(run), "--out", str(tmp_path / "draft")])
    assert not (tmp_path / "draft").exists()


def test_an_unknown_step_is_refused_with_the_kept_ones(tmp_path):
    save_run(tmp_path / "run", [20, 30])
    with pytest.raises(ValueError, match="no checkpoint of step 25, only of 20, 30"):
        main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft"), "--step", "25"])
    assert not (tmp_path / "draft").exists()


def test_tensors_that_do_not_fit_the_runs_shape_are_refused(tmp_path):
    save_run(tmp_path / "run", [4], {"shape": {**asdict(SHAPE), "num_layers": 2}})
    with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight is missing"):
        main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    assert not (tmp_path / "draft").exists()


def test_tokenizer_and_generation_config_stay_with_the_target(tmp_path):
    save_run(tmp_path / "run", [4])
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    written = {path.name for path in (tmp_path / "draft").iterdir()}
    assert written == {"config.json", "model.safetensors", "training.json", "README.md"}


def test_the_export_says_how_the_chats_were_rendered(tmp_path):
    data = DataConfig(template_args={"enable_thinking": False}, drop_reasoning=True, seq_len=256)
    config = Config(
        output_dir=str(tmp_path / "run"), target=TargetConfig(path="org/Target-8B", revision="abc"), data=data
    )
    save_run(tmp_path / "run", [4, 8], config=config)
    rows = [{"step": step, "train/tau": 1 + step / 8, "train/loss": 9.0} for step in (2, 4, 6, 8)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft"), "--step", "4"])
    record = json.loads((tmp_path / "draft/training.json").read_text())
    assert record == {
        "target": "org/Target-8B",
        "revision": "abc",
        "chat_template": None,
        "template_args": {"enable_thinking": False},
        "date": None,
        "drop_reasoning": True,
        "seq_len": 256,
        "step": 4,
        "tau_curve": [[2, 1.25], [4, 1.5]],  # not beyond the step
    }


def test_the_export_says_the_day_that_its_template_wrote(tmp_path):
    save_run(tmp_path / "run", [4], config=Config(output_dir=str(tmp_path / "run"), data=DataConfig(date="2031-12-31")))
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    assert json.loads((tmp_path / "draft/training.json").read_text())["date"] == "2031-12-31"
    assert "| day that it writes | 2031-12-31 |" in (tmp_path / "draft/README.md").read_text()


def test_a_run_that_knows_no_date_is_exported(tmp_path):
    """As they were once written."""
    save_run(tmp_path / "run", [4])
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("  date: null\n", ""))
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    assert json.loads((tmp_path / "draft/training.json").read_text())["date"] is None
    assert "day that it writes" not in (tmp_path / "draft/README.md").read_text()


def test_the_export_holds_a_chat_template_of_the_runs_own(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    run = tmp_path / "run"
    save_run(run, [4])
    setup.describe_run(Config(output_dir=str(run), data=DataConfig(chat_template=str(template))))
    template.unlink()
    main(["--run", str(run), "--out", str(tmp_path / "draft")])
    assert json.loads((tmp_path / "draft/training.json").read_text())["chat_template"] == "{{ messages }}"


def test_a_run_of_another_version_is_exported(tmp_path):
    """Its config lacks knobs that came later, and has others that are gone."""
    save_run(tmp_path / "run", [4])
    file = tmp_path / "run/config.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["draft"]["init"], tree["eval"], tree["data"]["date"]
    tree["data"]["gone"] = tree["lost"] = {"x": 1}
    file.write_text(yaml.safe_dump(tree))
    main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "draft")])
    record = json.loads((tmp_path / "draft/training.json").read_text())
    assert record["template_args"] == {"enable_thinking": False} and record["date"] is None
