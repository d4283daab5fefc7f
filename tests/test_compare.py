"""How near students are to their teacher: opdlm/compare.py."""

import csv
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import train_opdlm
from helpers import (
    AR_EOS,
    AR_MASK,
    OF_AR_TOY,
    SUITE,
    build_ar_toy,
    constants,
    launch,
    small_qwen,
)
from opdlm import compare

SCRIPT = SUITE / "experiments" / "opdlm" / "compare.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_ar_toy(tmp_path_factory.mktemp("ar"))


def leave_run(folder, place, **changes):
    """What a run leaves that has not moved the weights: its constants, and a checkpoint."""
    own = {"MODEL_NAME": str(folder / "model"), "MAX_LEN": 112} | OF_AR_TOY | changes
    own["LOSS"] = "cross-entropy"  # which the figures do not depend on
    logs = place / "run_logs"
    logs.mkdir()
    (logs / "run_config.json").write_text(json.dumps(train_opdlm.CONSTANTS | own))
    shutil.copytree(folder / "model", place / "run_step0004")


def compared(folder, place, **changes):
    """The lines of the CSV, and the answers side by side."""
    leave_run(folder, place, **changes)
    flags = f"{place}/run --data {folder}/train.pt --output {place}/c --limit 5 --batch_size 3"
    compare.main(compare.parse_args([*flags.split(), "--gen_length", "8"]))
    with open(place / "c.csv", newline="") as file:
        return list(csv.DictReader(file)), (place / "c.txt").read_text()


def test_the_teacher_as_a_student(folder, tmp_path):
    """With blocks of one token and the shift it decodes as itself."""
    lines, text = compared(folder, tmp_path, BLOCK_SIZE=1, LOGIT_SHIFT=True)
    assert [line["step"] for line in lines] == ["0", "4"]
    for line in lines:
        assert abs(float(line["kl"])) < 1e-4
        assert (line["agreement"], line["tokens_per_forward"]) == ("1.0", "1.0")
        assert line["prompts"] == "5"
    assert text.count("=== prompt") == 3
    for part in text.split("=== prompt")[1:]:
        _, *answers = [answer.partition("\n")[2].strip() for answer in part.split("--- ")]
        assert len(answers) == 3 and len(set(answers)) == 1 and answers[0]


def test_another_student_is_further_away(folder, tmp_path):
    """In blocks of four, without the shift, a model of random weights predicts another token."""
    lines, _ = compared(folder, tmp_path, BLOCK_SIZE=4)
    for line in lines:
        assert float(line["kl"]) > 0.01 and float(line["agreement"]) < 0.9
    same = [{key: line[key] for key in ("kl", "agreement", "ended")} for line in lines]
    assert same[0] == same[1]


def test_figures_do_not_depend_on_the_batch():
    """Also not the forward passes, although answers of a batch wait for each other."""
    model = small_qwen()
    args = constants(train_opdlm, MASK_ID=AR_MASK, BLOCK_SIZE=4, THRESHOLD=0.3)
    torch.manual_seed(4)
    examples = [(length, torch.randint(AR_MASK, (length,))) for length in (1, 9, 4, 4, 17, 2)]

    def measured(*batches):
        run = {"args": args, "examples": examples, "batches": batches, "length": 24}
        run["end_ids"] = [AR_EOS, AR_EOS]
        figures, _ = compare.measure(SimpleNamespace(**run), model, model)
        return figures

    together, alone = measured([0, 1, 2, 3, 4, 5]), measured([0], [1], [2], [3], [4], [5])
    assert together.pop("kl") == pytest.approx(alone.pop("kl"), abs=1e-3)
    assert together == alone and 1.1 < together["tokens_per_forward"] < 4


def test_an_answer_goes_up_to_its_first_end():
    ids = torch.tensor([[5, 9, 5, 9], [9, 9, 9, 9], [5, 5, 5, 5]])
    found = compare.with_end(ids, [9, 8])
    assert found.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run_config", "is not that of train_opdlm.py"),
        ("rows", "is not what pt.py writes"),
        ("output", "c.csv exists"),
        ("ids", "has id 9999"),
        ("checkpoint", "RUN run: it has no checkpoint run_step*"),
    ],
)
def test_mistakes(folder, tmp_path, change, message):
    leave_run(folder, tmp_path)
    data = folder / "train.pt"
    if change == "run_config":
        (tmp_path / "run_logs" / "run_config.json").write_text("[]")
    if change == "rows":
        data = tmp_path / "run_logs" / "run_config.json"
    if change == "ids":
        data = tmp_path / "data.pt"
        torch.save([{"prompt_len": 2, "full_ids": torch.tensor([5, 9999, 5])}], data)
    if change == "checkpoint":
        shutil.rmtree(tmp_path / "run_step0004")
    if change == "output":
        (tmp_path / "c.csv").touch()
    command = [sys.executable, SCRIPT, "run", "--data", data, "--output", "c"]
    status, printed = launch(command, tmp_path)
    assert status != 0 and message in printed and "Traceback" not in printed, printed
