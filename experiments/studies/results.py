"""What came out of a study: the lines of results.csv, and the tables that are printed."""

import csv
import io
import json
from itertools import product

import plot
from studies.arms import evaluation_folder
from suite import write_text

COLUMNS = (
    "study method setting seed block_length end_tokens_last tokens_per_step tokens_per_forward "
    "gen_length accuracy exact_match count loss supervised_tokens train_steps seconds "
    "decoding_seconds model"
).split()

# ------- results.csv


def collect(args, task, arms):
    """The lines of results.csv, from what the runs have left; missing evaluations are left out."""
    rows = []
    for arm in arms:
        for run, way in product(arm.runs, arm.ways):
            path = evaluation_folder(task, run, way) / "summary.json"
            if not path.exists():
                continue
            summary = json.loads(path.read_text())
            row = {
                "study": arm.study,
                "method": arm.method,
                "setting": arm.setting,
                "seed": run.seed,
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


def write_results(path, rows, studies, model):
    """Write `rows`, those of `studies`; other studies of the same model keep their lines."""
    before = []
    if path.exists():
        with open(path, newline="") as file:
            before = list(csv.DictReader(file))
    own = [row for row in before if row.get("model") == model]
    kept = [row for row in own if row["study"] not in studies]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_text(path, text.getvalue())


# ------- tables


def print_table(rows):
    """Print a line per setting and decoding block, with a column per number of tokens per step."""
    paces = sorted({row["tokens_per_step"] for row in rows})
    columns = [plot.pace_name(pace) for pace in paces]
    table = [["study", "method", "setting", "decoding", *columns, "supervised tokens"]]
    groups = {}
    for row in rows:
        key = (row["study"], row["method"], row["setting"], plot.decoding_name(row))
        groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        line = list(key)
        for pace in paces:
            values = [100 * row["accuracy"] for row in group if row["tokens_per_step"] == pace]
            line.append(show(values))
        tokens = group[0]["supervised_tokens"]
        line.append(f"{tokens:,}" if tokens else "")
        table.append(line)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    print("accuracy in %, mean over the seeds with its 95 % interval")
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(" | ".join(cells).rstrip())


def print_differences(rows):
    """Print how far each setting's accuracy is from that of its study's first, paired by seed."""
    accuracy = {}  # of (study, setting), by way of decoding and seed
    for row in rows:
        if row["method"] != "base":
            arm = (row["study"], plot.label(row))
            way = f"{plot.decoding_name(row)}, {plot.pace_name(row['tokens_per_step'])}"
            seeds = accuracy.setdefault(arm, {}).setdefault(way, {})
            seeds[row["seed"]] = 100 * row["accuracy"]
    print("\ndifference to the first setting of the study in points, paired by seed: mean with its")
    print("95 % interval")
    first = {}
    for (study, setting), ways in accuracy.items():
        reference = first.setdefault(study, ways)
        if ways is reference:
            continue
        for way, seeds in ways.items():
            others = reference.get(way, {})
            pairs = [seeds[seed] - others[seed] for seed in seeds if seed in others]
            if pairs:
                print(f"{study}: {setting}, decoding {way}: {show(pairs, '+')}")


def show(values, sign=""):
    """The mean of the values with its 95 % interval, as text; nothing if there are none."""
    if not values:
        return ""
    mean, half = plot.mean_interval(values)
    interval = f" +- {half:.1f}" if len(values) > 1 else ""
    return f"{mean:{sign}.1f}{interval}"
