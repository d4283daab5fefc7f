"""What came out of a study: the lines of results.csv."""

import csv
import json
from itertools import product

from studies.arms import evaluation_folder
from suite import write_csv

COLUMNS = (
    "study method setting seed test block_length end_tokens_last tokens_per_step "
    "tokens_per_forward gen_length accuracy exact_match count loss supervised_tokens train_steps "
    "seconds decoding_seconds model run"
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
                "run": run.folder.name,
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
    """Write `rows`, those of `studies` and the task's tests, beside what else is in the file.

    Lines of the same studies on other tests stay if they have the same base and the same runs.
    """
    tests = [test.name for test in task.tests]
    runs = {identity(row): row["run"] for row in rows}

    def stays(row):
        if row["study"] not in studies:
            return True
        if not row.get("run") or row["model"] != task.name or row["test"] in tests:
            return False
        return runs.get(identity(row), row["run"]) == row["run"]

    kept = []
    if path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if stays(row)]
    write_csv(path, COLUMNS, [*kept, *rows])


def identity(row):
    """The words that name a line's run. With other constants the same words name another run."""
    return tuple(str(row[column]) for column in ("study", "method", "setting", "seed"))
