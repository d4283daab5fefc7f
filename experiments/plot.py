"""Figures as PNG: loss curves of training runs, and the accuracies of studies.

    python experiments/plot.py losses ckpts_stagewise_sft_32_logs/train_loss.csv ckpts_fullseq_sft_logs/train_loss.csv
    python experiments/plot.py studies experiments/runs/study/results.csv --output figures

Losses are drawn raw and smoothed: the mean over --smooth steps, which t, drawn anew for each row, makes necessary.
"""

import argparse
import csv
import math
import os
import sys
from itertools import product

import matplotlib
from tqdm import tqdm

matplotlib.use("Agg")  # files, no window

from matplotlib import pyplot

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (tables in any statistics book)
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


def mean_interval(values):
    """The mean and half its 95 % interval, Student's; nan for a single value."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = T_975[count - 2] if count - 2 < len(T_975) else 1.96 + 2.4 / (count - 1)
    return mean, quantile * deviation / math.sqrt(count)


def read_csv(path, columns):
    """The lines of a CSV as dicts.

    Raises:
        SystemExit: if it cannot be read, has none, or lacks one of `columns`.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(
            f"{path} cannot be read ({error}); give a CSV that a training run or a study wrote"
        )
    if missing := [column for column in columns if not rows or rows[0].get(column) is None]:
        sys.exit(
            f"{path} has no lines, or no column {missing[0]}; give a CSV that a training run or a study wrote"
        )
    return rows


def numbers(path, rows, column):
    """A column as floats. Raises SystemExit for what is no number."""
    for line, row in enumerate(rows, start=2):
        try:
            float(row[column])
        except (TypeError, ValueError):
            sys.exit(f"{path}: line {line} has {column} {row[column]!r}, which is no number")
    return [float(row[column]) for row in rows]


def smoothed(values, width):
    """The mean of each value and those before it, `width` in all, fewer at the beginning."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def save(figure, path):
    """Write a figure, which appears only when whole; returns its path. Raises SystemExit if that fails."""
    try:
        figure.savefig(f"{path}.partial", dpi=150, bbox_inches="tight", format="png")
        os.replace(f"{path}.partial", path)
    except OSError as error:
        sys.exit(f"{path} cannot be written ({error.strerror}); give another --output")
    pyplot.close(figure)
    return path


def draw_losses(paths, output, smooth):
    """One PNG with the loss curves of `paths`, each named by its folder."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, path in enumerate(tqdm(paths, unit=" curves", desc="plot")):
        rows = read_csv(path, ("step", "loss"))
        steps, losses = numbers(path, rows, "step"), numbers(path, rows, "loss")
        name = os.path.basename(os.path.dirname(os.path.abspath(path))).removesuffix("_logs")
        axes.plot(steps, losses, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses, smooth), color=f"C{number}", label=name)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy of masked tokens (nats per token)")
    axes.set_title(f"raw and mean of {smooth} steps", fontsize="medium")
    axes.legend()
    return save(figure, output)


def draw_studies(rows, folder):
    """A PNG for each study in `rows` (of results.csv), a panel for each way of decoding: accuracy by setting.

    Points are means with 95 % intervals over the seeds, with every seed beside them; a dashed line is the base.
    """
    paths = []
    for study in dict.fromkeys(row["study"] for row in rows):
        own = [row for row in rows if row["study"] == study]
        labels = list(dict.fromkeys(label(row) for row in own if row["method"] != "base"))
        blocks, tokens = (
            sorted({int(row[name]) for row in own}) for name in ("block_length", "tokens_per_step")
        )
        size = (len(tokens) * (1.1 + 0.75 * len(labels)), 2.8 * len(blocks))
        figure, panels = pyplot.subplots(
            len(blocks), len(tokens), figsize=size, squeeze=False, layout="constrained"
        )
        for axes, way in zip(panels.flat, product(blocks, tokens), strict=True):
            draw_panel(
                axes,
                [
                    row
                    for row in own
                    if (int(row["block_length"]), int(row["tokens_per_step"])) == way
                ],
                labels,
            )
            axes.set_title("decoding block {}, {} tokens a step".format(*way), fontsize="small")
        figure.supylabel("accuracy (%)", fontsize="medium")
        figure.suptitle(study, fontsize="medium")
        paths.append(save(figure, os.path.join(folder, f"{study}.png")))
    return paths


def label(row):
    return f"{row['method']}\n{row['setting'].replace('=', chr(10))}".strip()


def draw_panel(axes, rows, labels):
    """One way of decoding: for each of `labels` the mean, its interval and every seed; the base as a dashed line."""
    for row in rows:
        if row["method"] == "base":
            axes.axhline(100 * float(row["accuracy"]), color="grey", linestyle="--", linewidth=0.9)
    for place, text in enumerate(labels):
        values = [100 * float(row["accuracy"]) for row in rows if label(row) == text]
        if values:
            mean, half = mean_interval(values)
            axes.errorbar(
                place, mean, 0 if math.isnan(half) else half, fmt="o", color=f"C{place}", capsize=4
            )
            axes.plot(
                [place + 0.15] * len(values),
                values,
                ".",
                color=f"C{place}",
                alpha=0.5,
                markersize=4,
            )
    axes.set_xticks(range(len(labels)), labels, fontsize="xx-small")
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.tick_params(axis="y", labelsize="x-small")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    losses = kinds.add_parser("losses", help="of train_loss.csv files")
    losses.add_argument("csv", nargs="+", help="train_loss.csv of a run")
    losses.add_argument("--output", default="losses.png", help="file (%(default)s)")
    losses.add_argument("--smooth", type=int, default=10, help="steps (%(default)s)")
    studies = kinds.add_parser("studies", help="of a results.csv")
    studies.add_argument("csv", help="results.csv of study.py")
    studies.add_argument("--output", default=".", help="folder for a PNG a study (%(default)s)")
    args = parser.parse_args()
    if args.kind == "losses":
        if args.smooth < 1:
            parser.error(f"--smooth {args.smooth}: must be at least 1")
        print(f"wrote {draw_losses(args.csv, args.output, args.smooth)}")
        return
    rows = read_csv(
        args.csv, ("study", "method", "setting", "block_length", "tokens_per_step", "accuracy")
    )
    for column in ("block_length", "tokens_per_step", "accuracy"):
        numbers(args.csv, rows, column)
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as error:
        sys.exit(f"--output {args.output} cannot be made ({error.strerror}); give another")
    print(f"wrote {', '.join(draw_studies(rows, args.output))}")


if __name__ == "__main__":
    main()
