"""`experiments/toy.py` does what it says."""

import json
import os

import pytest
import toy


@pytest.mark.slow
def test_the_whole_run(tmp_path, monkeypatch, capsys):
    """With less of everything: two launches on two ranks each."""
    monkeypatch.setitem(toy.TRAINING, "TOTAL_TRAIN_STEPS", 6)
    monkeypatch.setitem(toy.TRAINING, "MICRO_BSIZE", 2)
    monkeypatch.setitem(toy.HELD_OUT, "limit", 4)
    decoding = {"limit": 3, "gen_length": 16, "block_length": 8, "steps": 4}
    monkeypatch.setattr(toy, "DECODING", decoding)
    toy.run(tmp_path, ranks=2)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if " | " in line]
    table = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert table[0][:4] == ["model", "held-out block loss", "accuracy", "steps"]
    assert [row[0] for row in table[1:]] == ["base", "blockwise", "fullseq"]
    for row in table[2:]:
        assert row[3] == "6" and all(row) and float(row[1]) > 0
    made = ["data", "held_out.csv", "held_out.png"]
    made += ["model", "model_answers", "test.pt", "train.pt"]
    for method in toy.TRAINERS:
        made += [f"{method}_{what}" for what in ("logs", "step0006", "step0006_answers")]
    assert sorted(os.listdir(tmp_path)) == sorted(made)
    column = table[0].index("accuracy")
    for row, model in zip(
        table[1:], ("model", "blockwise_step0006", "fullseq_step0006"), strict=True
    ):
        summary = json.loads((tmp_path / f"{model}_answers" / "summary.json").read_text())
        assert summary["count"] == 3 and row[column] == f"{summary['accuracy']:.0%}"
    assert "4 tokens per step" in printed


def test_folders_that_exist_are_left_alone(tmp_path):
    assert toy.unused(tmp_path / "toy") == tmp_path / "toy"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy-v2").mkdir()
    assert toy.unused(tmp_path / "toy") == tmp_path / "toy-v3"


def test_bad_ranks(capsys):
    with pytest.raises(SystemExit):
        toy.parse_args(["--ranks", "0"])
    assert "--ranks 0: must be at least 1" in capsys.readouterr().err
