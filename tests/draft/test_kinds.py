"""A second kind of draft, which the package knows nothing of: it trains, is exported, checked, planned and decodes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dflash_dist.contract.folder import read_draft
from dflash_dist.cost.plan import main as plan
from dflash_dist.decoding.speculative import Decoder
from dflash_dist.draft.kinds import KINDS
from dflash_dist.draft.kinds.dflash import DFlashDraftModel
from dflash_dist.draft.shape import DraftShape
from dflash_dist.export.check import main as check
from dflash_dist.export.export import main as export
from dflash_dist.ranks import World
from dflash_dist.training.trainer import Trainer
from tests.tiny import lively_target


class TurnedDraftModel(DFlashDraftModel):
    """One more linear layer before the head."""

    architecture = "TurnedDraftModel"

    def __init__(self, shape: DraftShape, gradient_checkpointing: bool = False):
        super().__init__(shape, gradient_checkpointing)
        self.turn = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.turn(super().output(hidden))


def test_a_kind_of_ones_own_does_all_that_a_draft_does(
    debug_config, tiny_target, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(KINDS, "turned", TurnedDraftModel)
    config = debug_config("draft.kind=turned", "train.max_steps=4", f"target.path={tiny_target}")
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    before = trainer.training.draft.turn.weight.clone()
    trainer.run()
    assert (trainer.training.draft.turn.weight - before).abs().max() > 1e-4

    export(["--run", config.output_dir, "--out", str(tmp_path / "draft"), "--dtype", "float32"])
    capsys.readouterr()
    check([str(tmp_path / "draft"), "--target", str(tiny_target)])
    said = capsys.readouterr().out
    assert re.fullmatch(r"\d+ rules hold\n", said)
    draft = read_draft(tmp_path / "draft", torch.float32, torch.device("cpu"))
    assert torch.equal(draft.turn.weight, trainer.training.draft.turn.weight)

    decoder = Decoder(lively_target(tiny_target), draft, stop_ids=[2])
    plain, fast = decoder.plain(range(10, 20), 40), decoder.speculative(range(10, 20), 40)
    assert fast.tokens == plain.tokens and fast.passes > 0

    plan(["--config", f"{config.output_dir}/config.yaml", "--gpus", "1"])
    assert "fits" in capsys.readouterr().out


def test_there_is_no_other_kind(debug_config) -> None:
    with pytest.raises(ValueError, match=r"draft.kind: 'other' is no kind of draft: choose one of dflash"):
        Trainer(debug_config("draft.kind=other"), World(0, 1, torch.device("cpu")))
