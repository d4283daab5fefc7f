"""The tables of studies: accuracies, and differences that are paired by seed.

    python experiments/studies/tables.py experiments/results/results.csv rest suffix
    python experiments/studies/tables.py results.csv lift --reference "blockwise"

prints those of the studies that are named, or of all in the file.
Guide: experiments/docs/studies.md
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # experiments/

import plot
import suite


def print_table(rows):
    """Print a line per setting and decoding block, with a column per test and tokens per step."""
    columns = {}  # (test, tokens per step): a title
    several_tests = len({row["test"] for row in rows}) > 1
    for row in sorted(rows, key=lambda row: row["tokens_per_step"]):
        test, pace = row["test"], row["tokens_per_step"]
        columns[test, pace] = f"{test}, " * several_tests + plot.pace_name(pace)
    table = [["study", "method", "setting", "decoding", *columns.values(), "supervised tokens"]]
    groups = {}
    for row in rows:
        key = (row["study"], row["method"], row["setting"], plot.decoding_name(row))
        groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        line = list(key)
        for column in columns:
            own = [row for row in group if (row["test"], row["tokens_per_step"]) == column]
            line.append(show([100 * row["accuracy"] for row in own]))
        tokens = group[0]["supervised_tokens"]
        line.append(f"{tokens:,}" if tokens else "")
        table.append(line)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    print("accuracy in %, mean over the seeds with its 95 % interval")
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(" | ".join(cells).rstrip())


def print_differences(rows, name=None):
    """Print how far each setting's accuracy is from that of a reference, paired by seed.

    The reference is the setting `name`, as in the tables; otherwise see `reference_of`.
    """
    accuracy = {}  # of a study's settings, by way of decoding and seed
    several_tests = len({row["test"] for row in rows}) > 1
    for row in rows:
        if row["method"] != "base":
            settings = accuracy.setdefault(row["study"], {})
            decoding = plot.decoding_name(row, several_tests)
            way = f"{decoding}, {plot.pace_name(row['tokens_per_step'])}"
            seeds = settings.setdefault(plot.label(row), {}).setdefault(way, {})
            seeds[row["seed"]] = 100 * row["accuracy"]
    print("\ndifferences in points, paired by seed: mean with its 95 % interval")
    for study, settings in accuracy.items():
        for setting, ways in settings.items():
            reference = name or reference_of(setting, list(settings))
            if setting == reference:
                continue
            for way, seeds in ways.items():
                others = settings.get(reference, {}).get(way, {})
                pairs = [seeds[seed] - others[seed] for seed in seeds if seed in others]
                if pairs:
                    difference = f"{setting} minus {reference}, decoding {way}"
                    print(f"{study}: {difference}: {show(pairs, '+')}")


def reference_of(setting, settings):
    """The first of the study's settings; of another method, the first method's that is most alike.

    Those are alike that have constants in common: LR=0.1 is the reference of LR=0.1 steps=5.
    """
    method, *constants = setting.split()
    first, *_ = settings[0].split()
    if method == first:
        return settings[0]
    candidates = [other for other in settings if other.split()[0] == first]
    return max(candidates, key=lambda other: len(set(constants) & set(other.split())))


def show(values, sign=""):
    """The mean of the values with its 95 % interval, as text; nothing if there are none."""
    if not values:
        return ""
    mean, half = plot.mean_interval(values)
    interval = f" +- {half:.1f}" if len(values) > 1 else ""
    return f"{mean:{sign}.1f}{interval}"


# ------- main


def main(args):
    rows = plot.read_results(args.csv)
    known = list(dict.fromkeys(row["study"] for row in rows))
    for study in args.studies:
        if study not in known:
            sys.exit(f"{study}: not a study of {args.csv}; give some of {', '.join(known)}")
    rows = [row for row in rows if row["study"] in (args.studies or known)]
    settings = list(dict.fromkeys(plot.label(row) for row in rows if row["method"] != "base"))
    if args.reference not in (None, *settings):
        sys.exit(f"--reference {args.reference}: give one of {', '.join(settings)}")
    print_table(rows)
    print_differences(rows, args.reference)


def parse_args(argv=None):
    parser = suite.make_parser(__doc__)
    parser.add_argument("csv", help="results.csv of study.py")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="(all)")
    reference = "setting that others are compared with: method and setting (the study's first)"
    parser.add_argument("--reference", metavar="SETTING", help=reference)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
