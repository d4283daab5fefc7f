"""What came out of a study: the lines of results.csv."""

import csv
import json
from itertools import product

from studies.arms import evaluation_folder
from suite import write_csv

COLUMNS = (
    "study method setting seed test block_length end_tokens_last tokens_per_step "
    "tokens_per_forward gen_length accuracy exact_match count loss supervised_tokens train_steps "
    "seconds decoding_seconds model"
).split()

# ------- results.csv


def collect(args, task, arms):
    """The lines of results.csv, from what the runs have left; missing evaluations are left out."""
    rows = []
    for arm in arms:
        for run, test, way in product(arm.runs, task.tests, arm.ways):
            path = evaluation_folder(run, test, way) / "summary.json"
            if not path.exists():
                continue
            summary = json.loads(path.read_text())
            row = {
                "study": arm.study,
                "method": arm.method,
                "setting": arm.setting,
                "seed": run.seed,
                "test": test.name,
                "block_length": way.block_length,
                "end_tokens_last": int(way.end_tokens_last),
                "tokens_per_step": way.tokens_per_step,
                "tokens_per_forward": round(summary["tokens"] / max(1, summary["forwards"]), 3),
                "gen_length": args.gen_length,
                "accuracy": summary["accuracy"],
                "exact_match": summary["exact_match"],
                "count": summary["count"],
                **training_of(run),
                "decoding_seconds": round(summary["seconds"], 1),
                "model": task.name,
            }
            rows.append({name: row.get(name, "") for name in COLUMNS})
    return rows


def training_of(run):
    """Loss (mean of the last tenth of the steps), supervised tokens, steps and seconds of a run.

    The supervised tokens of OPDLM are those of the answers that it has learnt from.
    """
    logs = run.folder / "ckpt_logs"
    if not logs.exists():  # the base's
        return {}
    with open(logs / "train_loss.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    last = losses[-max(1, len(losses) // 10) :]
    budget = json.loads((logs / "run_config.json").read_text())["budget"]
    figures = {
        "loss": round(sum(last) / len(last), 4),
        "supervised_tokens": budget.get("supervised_tokens") or count_tokens(logs),
        "train_steps": budget["steps"],
    }
    seconds = run.folder / "seconds.json"
    if seconds.exists():  # not if the study was killed before the trainer ended
        figures["seconds"] = json.loads(seconds.read_text())
    return figures


def count_tokens(logs):
    """The tokens of all answers in a run's rollouts.csv."""
    with open(logs / "rollouts.csv") as file:
        return sum(int(row["tokens"]) for row in csv.DictReader(file))


def write_results(path, rows, studies, task):
    """Write `rows`, those of `studies` and the task's tests; what else is there of the same model
    is kept. Lines without a test are of an older version, and replaced.
    """
    tests = [None, *(test.name for test in task.tests)]
    before = []
    if path.exists():
        with open(path, newline="") as file:
            before = list(csv.DictReader(file))
    own = [row for row in before if row.get("model") == task.name]
    kept = [row for row in own if row["study"] not in studies or row.get("test") not in tests]
    write_csv(path, COLUMNS, [*kept, *rows])
