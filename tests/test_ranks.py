from __future__ import annotations

import pytest

from dflash_dist.ranks import World, join_world


def test_progress_is_expected_where_it_is_said(alone: World) -> None:
    assert not alone.activity.expects_progress
    with pytest.raises(KeyError), alone.expects_progress():
        with alone.expects_progress(False):
            assert not alone.activity.expects_progress
        assert alone.activity.expects_progress
        raise KeyError
    assert not alone.activity.expects_progress


def test_ticks_are_counted(alone: World) -> None:
    before = alone.activity.ticks
    alone.tick()
    assert alone.activity.ticks == before + 1


def test_without_torchrun_the_world_has_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with join_world(1.0) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
