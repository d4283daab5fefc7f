"""The toy's word problems are right, and `experiments/toy.py` does what it says."""

import json
import os
import random
import re

import pytest
import toy


def test_answers_are_right():
    """Every equation in every step holds, the last one gives the answer, and the numbers come from the question."""
    rows = toy.word_problems(random.Random(3), 600, set())
    for row in rows:
        text = row["response"].replace("$", "")
        equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text)
        assert len(equations) >= 3
        for a, operator, b, result in equations:
            a, b = int(a), int(b)
            assert {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result) >= 0
        results = {equation[3] for equation in equations} | set(re.findall(r"is (\d+)", text))
        answer = re.search(r"#### (\d+)\nThe answer is: (\d+)$", text)
        assert answer[1] == answer[2] and answer[1] in results
        given = set(re.findall(r"\d+", row["query"])) | results | {"2"}
        assert {number for equation in equations for number in (equation[0], equation[2])} <= given
        assert row["query"].endswith("?") and set(row) == {
            "type",
            "query",
            "original_question",
            "response",
        }
    assert len({row["query"] for row in rows}) == 600


def test_train_and_test_do_not_overlap(toy_folder):
    train, test = (
        {
            json.loads(line)["query"]
            for line in (toy_folder / "data" / f"{split}.jsonl").read_text().splitlines()
        }
        for split in ("train", "test")
    )
    assert len(train) == 60 and len(test) == 10 and not train & test


def test_build_overwrites_nothing(toy_folder):
    before = sorted(os.listdir(toy_folder))
    with pytest.raises(SystemExit, match="exists already"):
        toy.build(str(toy_folder))
    assert sorted(os.listdir(toy_folder)) == before


def test_the_whole_run(tmp_path, monkeypatch, capsys, toy_folder):
    """What `python experiments/toy.py` does, with less of everything: two launches on two ranks each."""
    monkeypatch.setattr(toy, "PRETRAIN_STEPS", 2)
    monkeypatch.setattr(toy, "RUN", {"MICRO_BSIZE": 2, "TOTAL_TRAIN_STEPS": 6, "LORA_RANK": 4})
    monkeypatch.setattr(
        toy, "DECODING", {"limit": 3, "gen_length": 8, "block_length": 4, "steps": 4}
    )
    toy.run(str(tmp_path), ranks=2)
    table = [
        [cell.strip() for cell in line.split("|")]
        for line in capsys.readouterr().out.splitlines()
        if " | " in line
    ]
    assert table[0][:2] == ["model", "steps"] and [row[0] for row in table[1:]] == [
        "base",
        "blockwise",
        "fullseq",
    ]
    for row in table[2:]:
        assert row[1] == "6" and all(row) and float(row[2]) > 0
    made = [
        f"{method}_{what}"
        for method in ("blockwise", "fullseq")
        for what in ("logs", "step0006", "step0006_answers")
    ]
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*made, "data", "model", "model_answers", "test.pt", "train.pt"]
    )
    column = table[0].index("accuracy")
    for row, folder in zip(
        table[1:], ("model", "blockwise_step0006", "fullseq_step0006"), strict=True
    ):
        summary = json.loads((tmp_path / f"{folder}_answers" / "summary.json").read_text())
        assert summary["count"] == 3 and row[column] == f"{summary['accuracy']:.1%}"
