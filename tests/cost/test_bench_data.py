from __future__ import annotations

import json

import pytest

from dflash_dist.cost.bench_data import main


def test_both_ways_read_the_same_and_the_report_has_every_figure(tiny_target, tmp_path, capsys):
    out = tmp_path / "report.json"
    small = ["--rows", "40", "--rounds", "1", "--open-rows", "1000", "--seq-len", "2048"]
    main(["--target", str(tiny_target), *small, "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["rows"] == 40 and report["opened_rows"] == 1000
    assert report["ratio"] == pytest.approx(report["rows_per_s"] / report["rows_per_s_obvious_loop"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(report)
