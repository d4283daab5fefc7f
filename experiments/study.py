"""The paper's comparisons, over several seeds, through the trainers themselves.

    python experiments/study.py                                     # all of them on the toy: an hour on 2 cores
    python experiments/study.py equal-compute equal-tokens --seeds 3
    python experiments/study.py prefix --model GSAI-ML/LLaDA-8B-Instruct --data MATH.jsonl --test math500 --num_gpus 8

    equal-compute   the same steps and rows a step            equal-tokens   the same number of supervised tokens
    block-size      training block x decoding block           prefix         PREFIX_MASK_RATE 0, 0.1, 0.2, 0.5
    suffix          SUFFIX_MASK_PROB 1, 0.5, 0                padding        MASK_PADDING False, True

Without --model it makes a base of its own, see experiments/chains.py. OUTPUT/results.csv has one line for each
study, method, setting, seed and way of decoding; figures are drawn beside it. A study that was stopped goes on with
the same command; what several studies share is trained once.
"""

import argparse
import csv
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from glob import escape, glob
from itertools import product
from multiprocessing import get_context

import torch
from tqdm import tqdm
from transformers import logging

EXPERIMENTS = os.path.dirname(os.path.abspath(__file__))
SUITE = os.path.dirname(EXPERIMENTS)
sys.path[:0] = [EXPERIMENTS, SUITE]

import chains
import evaluate
import plot
import toy

import train_blockwise
import train_fullseq

STUDIES = ("equal-compute", "equal-tokens", "block-size", "prefix", "suffix", "padding")
TRAINERS = {"blockwise": train_blockwise, "fullseq": train_fullseq}
COLUMNS = (
    "study method setting seed block_length tokens_per_step gen_length accuracy exact_match count "
    "loss supervised_tokens train_steps seconds decoding_seconds model"
).split()
# What is not given: the paper's, or the toy's
PAPER = {
    "steps": 200,
    "block_size": 32,
    "block_sizes": [8, 32, 128],
    "gen_length": 256,
    "tokens_per_step": [2],
}
TOY = {
    "steps": 400,
    "block_size": 16,
    "block_sizes": [8, 16, 32],
    "gen_length": 64,
    "tokens_per_step": [2, 4, 8],
}
PAPER_CONSTANTS = {"MAX_SAMPLES": 20000}  # of both methods: as many rows as pt.py keeps
TOY_CONSTANTS = {
    "MICRO_BSIZE": 16,
    "LR": 1e-3,
    "LORA_RANK": 16,
    "MAX_LEN": 112,
    "MAX_SAMPLES": 8000,
}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)} (all)")
    parser.add_argument(
        "--output", default=os.path.join(EXPERIMENTS, "runs", "study"), help="(%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting (%(default)s)")
    parser.add_argument("--model", help="base model, hub id or folder (a toy)")
    parser.add_argument("--data", help="what to train on: pt.py's --dataset (the toy's)")
    parser.add_argument("--test", help="what to evaluate on: evaluate.py's --dataset (the toy's)")
    parser.add_argument("--steps", type=int, help="optimizer steps (toy 400, else 200)")
    parser.add_argument("--block_size", type=int, help="training block, tokens (toy 16, else 32)")
    parser.add_argument(
        "--block_sizes",
        type=int,
        nargs="+",
        help="those of block-size (toy 8 16 32, else 8 32 128)",
    )
    parser.add_argument("--gen_length", type=int, help="of an answer (toy 64, else 256)")
    parser.add_argument(
        "--tokens_per_step", type=int, nargs="+", help="committed per forward (toy 2 4 8, else 2)"
    )
    parser.add_argument("--limit", type=int, help="test problems (all)")
    parser.add_argument(
        "--batch_size", type=int, default=100, help="answers decoded at a time (%(default)s)"
    )
    parser.add_argument(
        "--constants", nargs="+", default=[], metavar="NAME=VALUE", help="of all training runs"
    )
    parser.add_argument(
        "--num_gpus", type=int, default=1, help="of each run, through the launcher (%(default)s)"
    )
    jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    parser.add_argument(
        "--jobs", type=int, default=jobs, help="runs at a time (one, or one a core: %(default)s)"
    )
    parser.add_argument(
        "--remove_checkpoints",
        action="store_true",
        help="of runs that are evaluated; 16 GB each at 8B",
    )
    return check_args(parser, parser.parse_args(argv))


def check_args(parser, args):
    """`args` with what is not given; ends with a message if something cannot be."""
    if unknown := [study for study in args.studies if study not in STUDIES]:
        parser.error(f"{unknown[0]}: no study; give some of {', '.join(STUDIES)}")
    for name in (
        "seeds",
        "steps",
        "block_size",
        "gen_length",
        "limit",
        "batch_size",
        "num_gpus",
        "jobs",
    ):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if (
        given := [f"--{name}" for name in ("model", "data", "test") if getattr(args, name)]
    ) and len(given) < 3:
        parser.error(
            f"{', '.join(given)} alone: a base of your own needs --model, --data and --test"
        )
    for name, value in (PAPER if args.model else TOY).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if wrong := [
        length
        for length in {args.block_size, *args.block_sizes}
        if length < 1 or args.gen_length % length
    ]:
        parser.error(
            f"--gen_length {args.gen_length} is not divisible by the block of {wrong[0]} tokens"
        )
    if wrong := [number for number in args.tokens_per_step if number < 1]:
        parser.error(f"--tokens_per_step {wrong[0]}: must be at least 1")
    args.studies = args.studies or STUDIES
    for name in ("studies", "block_sizes", "tokens_per_step"):  # each once
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    constants = PAPER_CONSTANTS if args.model else TOY_CONSTANTS
    args.constants = constants | read_constants(parser, args.constants)
    return args


def read_constants(parser, words):
    """{NAME: text} of NAME=VALUE; what belongs to a study or to its bookkeeping is refused."""
    own = {
        "SEED",
        "CKPT_DIR",
        "PT_FILE",
        "MODEL_NAME",
        "TOTAL_TRAIN_STEPS",
        "BLOCK_SIZE",
        "SAVE_EVERY",
    }
    constants = {}
    for word in words:
        name, equals, value = word.partition("=")
        if (
            not equals
            or name in own
            or not all(name in trainer.CONSTANTS for trainer in TRAINERS.values())
        ):
            parser.error(
                f"--constants {word}: not NAME=VALUE of a constant of both trainers that no study sets"
            )
        constants[name] = value
    return constants


# ---------------------------------------------------------------------------- what there is to do


def make_cell(args, lengths, study, method, setting="", blocks=None, **changed):
    """One setting of a study: its constants, and the blocks to decode with (None: `args.block_size`)."""
    largest = max(args.block_sizes) if study == "block-size" else args.block_size
    constants = {"TOTAL_TRAIN_STEPS": min(args.steps, available_steps(args, lengths, largest))}
    if method == "blockwise":
        constants["BLOCK_SIZE"] = args.block_size
    named = {
        "study": study,
        "method": method,
        "setting": setting,
        "blocks": blocks or [args.block_size],
    }
    return named | {"constants": constants | changed}


def make_cells(args, lengths):
    """The settings of all studies: dicts of study, method, setting, constants and the blocks to decode with.

    `lengths` are those of the answers to train on. Within a study all runs but equal-tokens' take the same steps.
    """

    cell = partial(make_cell, args, lengths)

    def vary(study, name, values, methods=("blockwise",), blocks=None):
        pairs = product(methods, values)
        return [
            cell(study, method, f"{name}={value}", blocks, **{name: value})
            for method, value in pairs
        ]

    blockwise = cell("equal-tokens", "blockwise")
    fewer = equal_token_steps(blockwise["constants"]["TOTAL_TRAIN_STEPS"], lengths, args.block_size)
    made = {
        "equal-compute": [cell("equal-compute", method) for method in TRAINERS],
        "equal-tokens": [blockwise, cell("equal-tokens", "fullseq", TOTAL_TRAIN_STEPS=fewer)],
        "block-size": vary("block-size", "BLOCK_SIZE", args.block_sizes, blocks=args.block_sizes)
        + [cell("block-size", "fullseq", blocks=args.block_sizes)],
        "prefix": vary("prefix", "PREFIX_MASK_RATE", (0.0, 0.1, 0.2, 0.5)),
        "suffix": vary("suffix", "SUFFIX_MASK_PROB", (1.0, 0.5, 0.0)),
        "padding": vary("padding", "MASK_PADDING", (False, True), methods=TRAINERS),
    }
    base = [cell(study, "base", blocks=made[study][-1]["blocks"]) for study in args.studies]
    return base + [cell for study in args.studies for cell in made[study]]


def available_steps(args, lengths, block_size):
    """Steps until a blockwise run has drawn every block once: then it ends, and an equal one must too."""
    rows = int(args.constants.get("MICRO_BSIZE", train_blockwise.MICRO_BSIZE)) * args.num_gpus
    rows *= int(args.constants.get("GRAD_ACC", train_blockwise.GRAD_ACC))
    return max(1, sum(-(-length // block_size) for length in lengths) // rows)


def equal_token_steps(steps, lengths, block_size):
    """Full-sequence steps that supervise as many tokens as `steps` blockwise ones, in expectation.

    Both mask with t ~ U(0, 1): a blockwise draw half a block, a full-sequence draw half an answer.
    """
    block = sum(
        length / -(-length // block_size) for length in lengths
    )  # the mean over an answer's blocks
    return max(1, round(steps * block / sum(lengths)))


def prepare(args):
    """Make what all runs need in `args.output`: the base, unless one is given, and the .pt file.

    Returns:
        constants of all runs, a digest of what else decides their training, and the lengths of the answers.
    """
    select = []  # pt.py's own choice of rows
    if not args.model:
        base, select = (
            os.path.join(args.output, "base"),
            ["--max_samples", "0", "--filter_type", ""],
        )
        if not os.path.exists(os.path.join(base, "model")):
            chains.build(base)
        args.model, args.data, args.test = (
            os.path.join(base, name) for name in ("model", "data/train.jsonl", "data/test.jsonl")
        )
    problems = json.dumps([evaluate.load_problems(args.test, args.limit), args.batch_size])
    config, _ = evaluate.load_config(args.model, "main")
    model = evaluate.model_identity(args.model, config)
    max_len = args.constants.get("MAX_LEN", train_blockwise.MAX_LEN)
    words = ["--model", args.model, "--dataset", args.data, "--max_len", str(max_len), *select]
    content = evaluate.file_digest(args.data) if os.path.isfile(args.data) else ""
    pt_file = os.path.join(args.output, f"train-{evaluate.digest(model, content, *words)[:8]}.pt")
    if not os.path.exists(pt_file):
        toy.launch(
            [sys.executable, os.path.join(SUITE, "pt.py"), *words, "--output", pt_file], os.getcwd()
        )
    constants = {
        "MODEL_NAME": args.model,
        "PT_FILE": pt_file,
        "MASK_ID": getattr(config, "mask_token_id", 126336),
    }
    args.decoding = evaluate.digest(problems)[:8]
    args.identity = f"{os.path.basename(args.model)}-{evaluate.digest(model)[:8]}"
    rows = torch.load(pt_file)[: int(args.constants["MAX_SAMPLES"])]
    lengths = [min(len(row["full_ids"]), int(max_len)) - row["prompt_len"] for row in rows]
    identity = evaluate.digest(model, evaluate.file_digest(pt_file))
    return constants | args.constants, identity, [length for length in lengths if length > 0]


def make_runs(args, cells, common, identity):
    """The training runs of the `cells`, each once: {folder: run}; a cell gets its seeds and folders as `runs`."""
    runs = {}
    for cell in cells:
        cell["runs"] = []
        for seed in range(1, args.seeds + 1) if cell["method"] != "base" else ["base"]:
            own = cell["constants"] | {"SEED": seed} if seed != "base" else {}
            key = evaluate.digest(
                identity, str(args.num_gpus), all_constants(cell["method"], common | own)
            )[:8]
            folder = os.path.join(args.output, f"{cell['method']}-seed{seed}-{key}")
            run = runs.setdefault(
                folder, {"folder": folder, "method": cell["method"], "blocks": set()}
            )
            run["constants"] = common | own
            run["blocks"] |= set(cell["blocks"])
            cell["runs"].append((seed, folder))
    return runs


def all_constants(method, given):
    """All constants that decide a run's result, as text; those that are not `given` have the script's values."""
    if method == "base":
        return ""
    constants = {
        name: getattr(TRAINERS[method], name) for name in TRAINERS[method].CONSTANTS
    } | given
    places = ("MODEL_NAME", "PT_FILE", "CKPT_DIR")
    return json.dumps(
        sorted((name, str(value)) for name, value in constants.items() if name not in places)
    )


def decoding_folder(folder, args, block_length, tokens_per_step):
    """Where the evaluation of a run is: its name has what decides it."""
    return (
        f"{folder}/gen{args.gen_length}-block{block_length}-tokens{tokens_per_step}-{args.decoding}"
    )


# ---------------------------------------------------------------------------- doing it


def do_all(runs, args):
    """Do the runs, `args.jobs` at a time, the base's first, without which there are no others.

    Returns a message for each that failed.
    """
    context, failed = get_context("spawn"), []
    batches = [[run for run in runs if (run["method"] == "base") == base] for base in (True, False)]
    with ProcessPoolExecutor(
        args.jobs, context, initializer=begin_worker, initargs=(os.getpid(),)
    ) as pool:
        try:
            for batch in batches:
                waiting = {pool.submit(do, run, args): run for run in batch} if not failed else {}
                done = tqdm(as_completed(waiting), total=len(waiting), unit=" runs", desc="study")
                failed += [
                    f"{waiting[run]['folder']}: {run.exception()}"
                    for run in done
                    if run.exception()
                ]
        except KeyboardInterrupt:
            for process in pool._processes.values():
                process.terminate()
            raise
    return failed


def begin_worker(parent):
    """Have Linux end this process when the study is killed, which could not tell it; leave Ctrl-C to the study."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def do(run, args):
    """Train and evaluate one run, or what is left of it; its output goes to its log."""
    os.makedirs(run["folder"], exist_ok=True)
    torch.set_num_threads(max(1, os.cpu_count() // args.jobs))
    ways = product(sorted(run["blocks"]), args.tokens_per_step)
    summary = lambda way: f"{decoding_folder(run['folder'], args, *way)}/summary.json"
    missing = [way for way in ways if not os.path.exists(summary(way))]
    if not missing:
        return
    with open(f"{run['folder']}/log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            model = args.model if run["method"] == "base" else train(run, args, log)
            for way in missing:
                measure(model, decoding_folder(run["folder"], args, *way), *way, args, log)
        except SystemExit as error:  # this process does other runs too
            raise RuntimeError(f"{error.code}; see {log.name}") from error
    if args.remove_checkpoints and run["method"] != "base":
        shutil.rmtree(model)


def execute(command, args, log):
    """Run a script of the suite, its output in `log`; returns its exit status."""
    threads = str(max(1, os.cpu_count() // args.jobs))
    scripts = os.path.dirname(sys.executable)
    environment = {
        **os.environ,
        "PATH": scripts + os.pathsep + os.environ["PATH"],
        "OMP_NUM_THREADS": threads,
    }
    return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode


def train(run, args, log):
    """Train `run` to its end, whether it was begun before or not; returns its checkpoint. Raises SystemExit."""
    prefix = f"{run['folder']}/ckpt"
    words = [word for name, value in run["constants"].items() for word in (f"--{name}", str(value))]
    for _ in range(
        2
    ):  # a second time, if the trainer of a study that was killed is in the way of the first
        with suppress(FileNotFoundError), open(f"{prefix}_state/lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{prefix}_state") and glob(f"{escape(prefix)}_step*"):
            return max(glob(f"{escape(prefix)}_step*"))
        start = toy.launcher(args.num_gpus) if args.num_gpus > 1 else [sys.executable]
        execute(
            [*start, f"{SUITE}/train_{run['method']}.py", *words, "--CKPT_DIR", prefix], args, log
        )
        note_seconds(run["folder"])
    if os.path.exists(f"{prefix}_state") or not glob(f"{escape(prefix)}_step*"):
        sys.exit(f"train_{run['method']}.py failed")
    return max(glob(f"{escape(prefix)}_step*"))


def note_seconds(folder):
    """Keep the seconds of a training from its last start to its last step, as the times of files change in copies."""
    start, end = (f"{folder}/ckpt_logs/{name}" for name in ("run_config.json", "train_loss.csv"))
    if os.path.exists(start) and os.path.exists(end):
        evaluate.write_json(
            f"{folder}/seconds.json", round(os.path.getmtime(end) - os.path.getmtime(start), 1)
        )


def measure(model, output, block_length, tokens_per_step, args, log):
    """Evaluate `model`: in this process, or, so that it leaves no memory of a GPU taken, in others."""
    steps = args.gen_length // block_length * -(-block_length // tokens_per_step)
    flags = {"model": model, "output": output, "dataset": args.test, "gen_length": args.gen_length}
    flags |= {"block_length": block_length, "steps": steps, "batch_size": args.batch_size}
    flags |= {"limit": args.limit} if args.limit else {}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if args.num_gpus > 1 or torch.cuda.is_available():
        start = toy.launcher(args.num_gpus) if args.num_gpus > 1 else [sys.executable]
        execute([*start, evaluate.__file__, *words], args, log)
    else:
        evaluate.main(words)
    if not os.path.exists(f"{output}/summary.json"):
        sys.exit(f"{output}: the evaluation failed")


# ---------------------------------------------------------------------------- what came out


def collect(args, cells):
    """The lines of results.csv, from what the runs have left; those of decodings that are missing are left out."""
    rows = []
    for cell in cells:
        for (seed, folder), block_length, way in product(
            cell["runs"], cell["blocks"], args.tokens_per_step
        ):
            how = {
                "seed": seed,
                "block_length": block_length,
                "tokens_per_step": way,
                "gen_length": args.gen_length,
            }
            how["model"] = args.identity
            path = f"{decoding_folder(folder, args, block_length, way)}/summary.json"
            with suppress(FileNotFoundError), open(path) as file:
                summary = json.load(file)
                summary["decoding_seconds"] = round(summary.pop("seconds"), 1)
                known = cell | how | summary | training_of(folder)
                rows.append({name: known.get(name, "") for name in COLUMNS})
    return rows


def training_of(folder):
    """Loss (mean of the last tenth of the steps), supervised tokens, steps and seconds of a run."""
    logs = f"{folder}/ckpt_logs"
    if not os.path.exists(f"{logs}/train_loss.csv"):
        return {}
    with open(f"{logs}/run_config.json") as file:
        budget = json.load(file)["budget"]
    with open(f"{logs}/train_loss.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    last = losses[-max(1, len(losses) // 10) :]
    seconds = ""
    with suppress(FileNotFoundError), open(f"{folder}/seconds.json") as file:
        seconds = json.load(file)
    figures = {
        "loss": round(sum(last) / len(last), 4),
        "supervised_tokens": budget["supervised tokens"],
    }
    return figures | {"train_steps": budget["steps"], "seconds": seconds}


def write_results(path, rows, args):
    """Write results.csv, keeping the lines that other studies of the same model have there."""
    kept = []
    if os.path.exists(path):
        with open(path, newline="") as file:
            others = [row for row in csv.DictReader(file) if row.get("model") == args.identity]
        kept = [row for row in others if row["study"] not in args.studies]
    with open(f"{path}.partial", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    os.replace(f"{path}.partial", path)


def print_table(rows):
    """Mean accuracy over the seeds with its 95 % interval, a line a setting, a column a number of tokens per step."""
    ways = sorted({row["tokens_per_step"] for row in rows})
    names = [
        "study",
        "method",
        "setting",
        "decoding block",
        *(f"{way} a step" for way in ways),
        "supervised tokens",
    ]
    lines = {}
    for row in rows:
        key = (row["study"], row["method"], row["setting"], row["block_length"])
        lines.setdefault(key, []).append(row)
    table = [names]
    for key, group in lines.items():
        by_way = [
            [100 * row["accuracy"] for row in group if row["tokens_per_step"] == way]
            for way in ways
        ]
        tokens = f"{group[0]['supervised_tokens']:,}" if group[0]["supervised_tokens"] else ""
        table.append([*map(str, key), *map(show, by_way), tokens])
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    print("accuracy in %, mean over the seeds with its 95 % interval")
    for line in table:
        print(
            " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def print_differences(rows):
    """How much each setting's accuracy differs from its study's first, paired by seed, with the 95 % interval."""
    accuracy = {}  # of (study, method, setting), by (block_length, tokens_per_step, seed)
    for row in rows:
        if row["method"] != "base":
            group = accuracy.setdefault((row["study"], row["method"], row["setting"]), {})
            group[row["block_length"], row["tokens_per_step"], row["seed"]] = 100 * row["accuracy"]
    first = {}
    print(
        "\ndifference to the first setting of the study in points, seed by seed: mean with its 95 % interval"
    )
    for (study, *rest), group in accuracy.items():
        reference = first.setdefault(study, group)
        ways = (
            list(dict.fromkeys(way[:2] for way in group if way in reference))
            if group is not reference
            else ()
        )
        for way in ways:
            pairs = [
                group[key] - reference[key] for key in group if key[:2] == way and key in reference
            ]
            print(
                f"{study}: {' '.join(filter(None, rest))}, decoding block {way[0]}, {way[1]} a step: {show(pairs, '+')}"
            )


def show(values, sign=""):
    if not values:
        return ""
    mean, half = plot.mean_interval(values)
    return f"{mean:{sign}.1f}" + (f" +- {half:.1f}" if len(values) > 1 else "")


def main():
    args = parse_args(sys.argv[1:])
    args.output = os.path.abspath(args.output)
    if args.model and os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)
    logging.set_verbosity_error()
    try:
        os.makedirs(args.output, exist_ok=True)
        common, identity, lengths = prepare(args)
        cells = make_cells(args, lengths)
        runs = make_runs(args, cells, common, identity).values()
        print(f"{len(runs)} runs, {args.jobs} at a time, in {args.output}")
        failed = do_all(runs, args)
        rows = collect(args, cells)
        path = os.path.join(args.output, "results.csv")
        write_results(path, rows, args)
        print_table(rows)
        print_differences(rows)
        print(f"see {', '.join([path, *plot.draw_studies(rows, args.output)])}")
    except OSError as error:
        sys.exit(
            f"--output {args.output} cannot be written ({error}); the same command goes on when it can"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    if failed:
        sys.exit(
            "\n".join([f"{len(failed)} runs failed; the same command tries them again", *failed])
        )


if __name__ == "__main__":
    main()
