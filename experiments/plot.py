"""Figures as PNG: loss curves of training runs, and the accuracies of studies.

    python experiments/plot.py losses ckpts_stagewise_sft_32_logs/train_loss.csv \\
        ckpts_fullseq_sft_logs/train_loss.csv
    python experiments/plot.py studies experiments/runs/study/results.csv --output figures

Losses are drawn raw and smoothed. A raw loss says little, as t is drawn anew for each row: the
smoothed one is the mean over --smooth steps. A study's figure has a panel for each way of decoding.
A panel has a line for each setting: the mean with its 95 % interval, and below it all seeds. The
studies narrow and answer-blocks have curves instead.
"""

import csv
import math
import os
import re
import sys
from collections import Counter
from statistics import fmean, stdev

import suite
from matplotlib.figure import Figure
from tqdm import tqdm

COLOURS = {  # of the methods, the same in all figures
    "blockwise": "tab:blue",
    "fullseq": "tab:orange",
    "rest": "tab:red",
    "span": "tab:purple",
    "lift": "tab:green",
    "lift-block": "tab:olive",
    "opdlm": "tab:pink",
    "own-random": "tab:cyan",
    "distill": "tab:brown",
    "sft-teacher": "navy",
    "sft-data": "goldenrod",
}
MARKERS = "osD^vP*X"  # of the settings of a method
DASHES = ("-", "--", ":", "-.")  # of their curves

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (tables in any statistics book)
T_975 = [
    *[12.706, 4.303, 3.182, 2.776, 2.571],
    *[2.447, 2.365, 2.306, 2.262, 2.228],
    *[2.201, 2.179, 2.160, 2.145, 2.131],
]
COLUMNS = (  # of a results.csv, in all its versions that can be drawn
    "study method setting seed test block_length tokens_per_step gen_length accuracy"
).split()
WHOLE = "block_length tokens_per_step gen_length end_tokens_last supervised_tokens".split()
SOURCES = "give a CSV that a training run or a study wrote"

# ------- studies


def draw_studies(rows, folder):
    """Write a PNG for each study in `rows`, those of read_results; returns their paths."""
    paths = []
    for study in dict.fromkeys(row["study"] for row in rows):
        draw = {"narrow": draw_tradeoff, "answer-blocks": draw_by_block}.get(study, draw_study)
        figure = draw(study, [row for row in rows if row["study"] == study])
        paths.append(save(figure, os.path.join(folder, f"{study}.png")))
    return paths


def draw_study(study, rows):
    """A figure of one study's `rows`: a panel for each way of decoding, a line for each setting."""
    several_tests = len({row["test"] for row in rows}) > 1
    decodings = {}
    for row in rows:
        decodings.setdefault(decoding_name(row, several_tests), []).append(row)
    labels = [list(dict.fromkeys(label(row) for row in alike)) for alike in decodings.values()]
    paces = sorted({row["tokens_per_step"] for row in rows})
    heights = [0.8 + 0.27 * len(names) for names in labels]
    figure = Figure(figsize=(2 + 3 * len(paces), sum(heights)), layout="constrained")
    shape = (len(decodings), len(paces))
    panels = figure.subplots(*shape, squeeze=False, sharex=True, height_ratios=heights)
    styles = make_styles(rows)
    for line, names, (decoding, alike) in zip(panels, labels, decodings.items(), strict=True):
        for axes, pace in zip(line, paces, strict=True):
            here = [row for row in alike if row["tokens_per_step"] == pace]
            draw_panel(axes, here, {name: styles[name] for name in names})
            axes.set_title(f"decoding {decoding}, {pace_name(pace)}", fontsize="small")
            axes.label_outer()
            axes.tick_params(labelbottom=True)
    figure.supxlabel("accuracy (%)", fontsize="small")
    figure.suptitle(study, fontsize="medium")
    return figure


def make_styles(rows):
    """{label: (colour, marker)}: a colour tells the method, a marker its setting."""
    styles = {}
    count = Counter()  # of each method's settings
    for row in rows:
        method = row["method"]
        if label(row) not in styles:
            marker = MARKERS[count[method] % len(MARKERS)]
            styles[label(row)] = COLOURS.get(method, "black"), marker
            count[method] += 1
    return styles


def draw_panel(axes, rows, styles):
    """One way of decoding: a line per label with mean, 95 % interval and seeds; the base dashed."""
    for place, (text, (color, marker)) in enumerate(styles.items()):
        values = [100 * row["accuracy"] for row in rows if label(row) == text]
        if text == "base" and values:
            axes.axvline(values[0], color="grey", linestyle="--", linewidth=0.9)
        if not values or text == "base":
            continue
        mean, half = mean_interval(values)
        axes.errorbar(
            mean, place, xerr=finite(half), fmt=marker, color=color, capsize=3, markersize=4
        )
        below = [place + 0.25] * len(values)
        axes.plot(values, below, ".", color=color, alpha=0.5, markersize=4)
    axes.set_yticks(range(len(styles)), styles)
    axes.set_ylim(len(styles) - 0.5, -0.5)
    axes.tick_params(labelsize="x-small")
    axes.grid(axis="x", alpha=0.3)


def draw_tradeoff(study, rows):
    """A figure of accuracy gained on the first test against that on the second; a panel per pace.

    A curve joins the settings of a method that differ in LR alone; the LR stands beside its point.
    """
    tests = list(dict.fromkeys(row["test"] for row in rows))
    if len(tests) != 2:  # evaluations have failed
        return draw_study(study, rows)
    paces = sorted({row["tokens_per_step"] for row in rows})
    figure = Figure(figsize=(1 + 5 * len(paces), 5), layout="constrained")
    panels = figure.subplots(1, len(paces), squeeze=False, sharex=True, sharey=True)[0]
    for axes, pace in zip(panels, paces, strict=True):
        curves = {}  # {a setting without its LR: {LR: {test: accuracies}}}
        base = {}  # {test: accuracy}
        for row in rows:
            if row["tokens_per_step"] != pace:
                continue
            accuracy = 100 * row["accuracy"]
            if row["method"] == "base":
                base[row["test"]] = accuracy
                continue
            found = re.search(r" LR=(\S+)", label(row))
            lr = found[1] if found else ""  # the method's own
            name = label(row).replace(f" LR={lr}", "")
            by_test = curves.setdefault(name, {}).setdefault(lr, {})
            by_test.setdefault(row["test"], []).append(accuracy)
        styles = make_styles([{"method": name.split()[0], "setting": name} for name in curves])
        for (name, by_lr), style in zip(curves.items(), styles.values(), strict=True):
            whole = {lr: found for lr, found in by_lr.items() if set(found) == set(tests)}
            if set(base) == set(tests):
                draw_curve(axes, whole, tests, base, name, *style)
        axes.axhline(0, color="grey", linewidth=0.7)
        axes.axvline(0, color="grey", linewidth=0.7)
        axes.set_title(pace_name(pace), fontsize="small")
        axes.set_xlabel(f"{tests[0]}: accuracy minus the base's (points)", fontsize="small")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{tests[1]}: accuracy minus the base's (points)", fontsize="small")
    panels[0].legend(fontsize="x-small")
    figure.suptitle(study, fontsize="medium")
    return figure


def draw_curve(axes, by_lr, tests, base, name, color, marker):
    """A curve through the settings, {LR: {test: accuracies}}, with 95 % intervals."""
    points = []
    for accuracies in by_lr.values():
        gains = [[value - base[test] for value in accuracies[test]] for test in tests]
        points.append([mean_interval(values) for values in gains])
    x, y = ([point[axis][0] for point in points] for axis in (0, 1))
    x_bar, y_bar = ([finite(point[axis][1]) for point in points] for axis in (0, 1))
    line = DASHES[MARKERS.index(marker) % len(DASHES)]
    style = {"color": color, "marker": marker, "linestyle": line, "capsize": 2}
    axes.errorbar(x, y, yerr=y_bar, xerr=x_bar, label=name, **style)
    near = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": "xx-small"}
    for lr, point in zip(by_lr, zip(x, y, strict=True), strict=True):
        axes.annotate(lr, point, color=color, **near)


def finite(half):
    """Half the width of an interval, to be drawn; 0 if there is none."""
    return 0 if math.isnan(half) else half


def draw_by_block(study, rows):
    """A figure of blockwise minus full-sequence, paired by seed, by block.

    A curve per test and pace.
    """
    accuracy = {}  # of (method, test, pace, block), by seed
    for row in rows:
        key = row["method"], row["test"], row["tokens_per_step"], row["block_length"]
        accuracy.setdefault(key, {})[row["seed"]] = 100 * row["accuracy"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    blocks = sorted({block for *_, block in accuracy}, reverse=True)
    several_tests = len({row["test"] for row in rows}) > 1
    for number, (test, pace) in enumerate(sorted({(test, pace) for _, test, pace, _ in accuracy})):
        points = []
        for place, block in enumerate(blocks):
            ours = accuracy.get(("blockwise", test, pace, block), {})
            others = accuracy.get(("fullseq", test, pace, block), {})
            pairs = [ours[seed] - others[seed] for seed in ours if seed in others]
            if pairs:
                mean, half = mean_interval(pairs)
                points.append((place + 0.06 * number, mean, finite(half)))
        if points:
            x, y, bar = zip(*points, strict=True)
            name = f"{test}, " * several_tests + pace_name(pace)
            axes.errorbar(x, y, yerr=bar, marker="o", capsize=3, label=name)
    length = rows[0]["gen_length"]
    names = [f"{length // block}\n({block} tokens)" for block in blocks]
    axes.set_xticks(range(len(blocks)), names, fontsize="small")
    axes.set_xlabel(f"blocks in {length} tokens")
    axes.set_ylabel("blockwise minus full-sequence (points)")
    axes.axhline(0, color="grey", linewidth=0.7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.suptitle(study, fontsize="medium")
    return figure


def label(row):
    """A setting's name beside its points."""
    return f"{row['method']} {row['setting']}".strip()


def decoding_name(row, with_test=False):
    """How the answers of a line were decoded, without the tokens per step."""
    test = f"{row['test']}, " if with_test else ""
    last = ", end tokens last" if row["end_tokens_last"] else ""
    return f"{test}block {row['block_length']}{last}"


def pace_name(tokens_per_step):
    """How many tokens a step commits, as text; 0 stands for a threshold."""
    return f"{tokens_per_step} per step" if tokens_per_step else "by threshold"


def mean_interval(values):
    """The mean, and half the width of its 95 % interval (Student's); nan for a single value."""
    count = len(values)
    if count < 2:
        return fmean(values), math.nan
    freedom = count - 1
    quantile = T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.56 / freedom
    return fmean(values), quantile * stdev(values) / math.sqrt(count)


# ------- losses


def draw_losses(paths, output, smooth):
    """Write one PNG with the loss curves of `paths`, each named after its folder; returns it."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for number, path in enumerate(tqdm(paths, unit=" curves", desc="plot")):
        rows = read_csv(path, ("step", "loss"))
        steps = numbers(path, rows, "step")
        losses = numbers(path, rows, "loss")
        name = os.path.basename(os.path.dirname(os.path.abspath(path))).removesuffix("_logs")
        axes.plot(steps, losses, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses, smooth), color=f"C{number}", label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy of masked tokens (nats per token)")
    axes.set_title(f"raw, and mean of {smooth} steps", fontsize="medium")
    axes.legend()
    return save(figure, output)


def smoothed(values, width):
    """The mean of each value and the width - 1 before it; of fewer at the beginning."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means


# ------- files


def read_csv(path, columns):
    """The lines of a CSV as dicts.

    Raises:
        SystemExit: if it cannot be read, has none, or lacks one of `columns`.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path} cannot be read ({error}); {SOURCES}")
    if not rows:
        sys.exit(f"{path} has no lines; {SOURCES}")
    for column in columns:
        if rows[0].get(column) is None:
            sys.exit(f"{path} has no column {column}; {SOURCES}")
    return rows


def read_results(path):
    """The lines of a results.csv as dicts, with numbers for what the tables and figures need.

    Raises:
        SystemExit: if it cannot be read, or lacks a column or a number.
    """
    rows = read_csv(path, COLUMNS)
    for row in rows:
        for column in ("end_tokens_last", "supervised_tokens"):
            row[column] = row.get(column) or 0  # of the base, and in lines of older versions
    for column in ("accuracy", *WHOLE):
        kind = whole if column in WHOLE else float
        for row, value in zip(rows, numbers(path, rows, column, kind), strict=True):
            row[column] = value
    return rows


def numbers(path, rows, column, kind=float):
    """A column as numbers of a kind, a function of their text.

    Raises:
        SystemExit: if one of them is no such number.
    """
    values = []
    for line, row in enumerate(rows, start=2):
        try:
            values.append(kind(row[column]))
        except (TypeError, ValueError, OverflowError):
            sys.exit(f"{path}: line {line} has {column} {row[column]!r}, not valid; {SOURCES}")
    return values


def whole(text):
    """A whole number, which other programs may have written as 2.0."""
    value = int(float(text))
    if value != float(text):
        raise ValueError
    return value


def save(figure, path):
    """Write a figure, which appears only when it is whole; returns its path.

    Raises:
        SystemExit: if it cannot be written.
    """
    try:
        figure.savefig(f"{path}.partial", dpi=150, bbox_inches="tight", format="png")
        os.replace(f"{path}.partial", path)
    except OSError as error:
        sys.exit(f"{path} cannot be written ({error.strerror}); give another --output")
    return path


# ------- main


def main(args):
    if args.kind == "losses":
        print(f"wrote {draw_losses(args.csv, args.output, args.smooth)}")
        return
    rows = read_results(args.csv)
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as error:
        sys.exit(f"--output {args.output} cannot be made ({error.strerror}); give another")
    print(f"wrote {', '.join(draw_studies(rows, args.output))}")


def parse_args(argv=None):
    parser = suite.make_parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    losses = kinds.add_parser("losses", help="of train_loss.csv files")
    losses.add_argument("csv", nargs="+", help="train_loss.csv of a run")
    losses.add_argument("--output", default="losses.png", help="file (%(default)s)")
    losses.add_argument("--smooth", type=int, default=10, help="steps (%(default)s)")
    studies = kinds.add_parser("studies", help="of a results.csv")
    studies.add_argument("csv", help="results.csv of study.py")
    studies.add_argument("--output", default=".", help="folder, one PNG per study (%(default)s)")
    args = parser.parse_args(argv)
    if args.kind == "losses":
        suite.check_lowest(parser, args, smooth=1)
    return args


if __name__ == "__main__":
    main(parse_args())
