"""The paper's comparisons, over several seeds, through the trainers themselves.

    python experiments/study.py                          # all but opdlm on the toy: see README.md
    python experiments/study.py equal-compute equal-tokens --seeds 3
    python experiments/study.py prefix --num_gpus 8 --model GSAI-ML/LLaDA-8B-Instruct \\
        --data MATH.jsonl --test math500

A study compares settings of the trainers with each other and with the base model. Every setting is
trained once per seed (a run), and every run is evaluated in several ways of decoding. Without
--model the base and the task are those of chains.py. The study opdlm is about an autoregressive
base, that of chains_ar.py, and so it is given alone.

OUTPUT/results.csv has one line per study, setting, seed and way of decoding; figures are drawn next
to it. To resume a study that was stopped, give the same command again. Studies share runs: what is
there with the same constants, model and data is not trained again. Give another --output after
changing the code of a trainer.
"""

import argparse
import ast
import csv
import ctypes
import fcntl
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path

STUDIES = {  # what `compared` makes of them: below
    "equal-compute": "both methods, the same steps and rows per step",
    "equal-tokens": "both methods, the same number of supervised tokens",
    "block-size": "training blocks x decoding blocks",
    "prefix": "PREFIX_MASK_RATE 0, 0.1, 0.2, 0.5",
    "suffix": "SUFFIX_MASK_PROB 1, 0.5, 0",
    "padding": "MASK_PADDING False, True, both methods",
    "lift": "LIFT, its variants, and inside the active block: equal steps, equal compute",
    "controls": "Blockwise SFT with another loss, place or block size; also decoded without blocks",
    "opdlm": "from autoregressive to block diffusion: whose text, which states, which loss",
}

# What holds if no flag says otherwise: on the toy, and as in the paper if --model is given
TOY = {
    "steps": 200,
    "block_size": 16,
    "block_sizes": [8, 16, 32],
    "gen_length": 64,
    "tokens_per_step": [2, 4, 8],
}
TOY_CONSTANTS = {  # as in toy.py, whose two processes have 8 rows each
    "MICRO_BSIZE": 16,
    "LR": 4e-3,
    "LORA_RANK": 32,
    "MAX_LEN": 112,
    "MAX_SAMPLES": 8000,
}
OPDLM = {  # on an autoregressive base; a block is the same in training and decoding
    "steps": 160,
    "block_size": 4,
    "block_sizes": [4, 8],
    "gen_length": 64,
    "tokens_per_step": [1, 0],
}
OPDLM_CONSTANTS = {
    "MICRO_BSIZE": 16,
    "LR": 1e-3,
    "WARMUP_RATIO": 0.05,
    "MAX_LEN": 112,
    "MAX_SAMPLES": 8000,
    "GEN_LENGTH": 64,
    "FIRST_GEN_LENGTH": 64,
    "ROLLOUT_BSIZE": 256,
    "FULL_FT": True,
    "LOGIT_SHIFT": True,
    "TRAIN_END": True,
}
PAPER = {
    "steps": 200,
    "block_size": 32,
    "block_sizes": [8, 32, 128],
    "gen_length": 256,
    "tokens_per_step": [2],
}
PAPER_CONSTANTS = {"MAX_SAMPLES": 20000}  # as many rows as pt.py keeps
OPDLM_METHODS = ("opdlm", "own-random", "distill", "sft-teacher", "sft-data")
THRESHOLD = 0.9  # of decoding, where tokens_per_step is 0

PLACES = ("MODEL_NAME", "DATA_PT", "CKPT_DIR")  # constants that do not change a run's result
OWN = (*PLACES, "MODEL_REVISION", "SEED", "TOTAL_TRAIN_STEPS", "BLOCK_SIZE", "SAVE_EVERY")
SHARED = ("LR", "LORA_RANK", "TARGET_MODS")  # LIFT takes those of train_fullseq.py unless given
COLUMNS = (  # of results.csv
    "study method setting seed block_length end_tokens_last tokens_per_step tokens_per_forward "
    "gen_length accuracy exact_match count loss supervised_tokens train_steps seconds "
    "decoding_seconds model"
).split()

# ----------------------------------------------------------------------------------------- flags


def parse_args(argv):
    listing = "\n".join(f"    {name:16}{content}" for name, content in STUDIES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nstudies:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)} (all)")
    parser.add_argument(
        "--output",
        default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "runs", "study"),
        help="folder (%(default)s)",
    )
    add_task_flags(parser)
    add_run_flags(parser)
    args = parser.parse_args(argv)
    is_opdlm = args.studies == ["opdlm"]
    defaults = OPDLM if is_opdlm else PAPER if args.model else TOY
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_args(parser, args)
    args.output = Path(args.output).absolute()
    if args.model and os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)  # each trainer runs in the folder of its run
    args.studies = args.studies or [name for name in STUDIES if name != "opdlm"]
    for name in ("studies", "block_sizes", "tokens_per_step"):
        each_once = list(dict.fromkeys(getattr(args, name)))
        setattr(args, name, each_once)
    constants = PAPER_CONSTANTS if args.model else OPDLM_CONSTANTS if is_opdlm else TOY_CONSTANTS
    args.constants = constants | read_constants(parser, args.constants)
    return args


def defaults_of(name):
    """The default values of a flag, for its help text."""
    toy, paper = (str(values[name]).strip("[]").replace(",", "") for values in (TOY, PAPER))
    return f"toy: {toy}, else: {paper}"


def add_task_flags(parser):
    """Add the flags on what is trained and evaluated."""
    parser.add_argument("--model", help="base model, hub id or folder (the toy's)")
    parser.add_argument("--data", help="training data, as pt.py's --dataset (the toy's)")
    parser.add_argument("--test", help="test problems, as evaluate.py's --dataset (the toy's)")
    parser.add_argument("--limit", type=int, help="use only the first test problems (all)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps ({defaults_of('steps')})")
    parser.add_argument(
        "--block_size", type=int, help=f"training block, tokens ({defaults_of('block_size')})"
    )
    parser.add_argument(
        "--block_sizes",
        type=int,
        nargs="+",
        help=f"those of block-size ({defaults_of('block_sizes')})",
    )
    parser.add_argument(
        "--gen_length", type=int, help=f"tokens per answer ({defaults_of('gen_length')})"
    )
    parser.add_argument(
        "--tokens_per_step",
        type=int,
        nargs="+",
        help=f"committed per forward pass; 0: those above {THRESHOLD} "
        f"({defaults_of('tokens_per_step')})",
    )
    parser.add_argument(
        "--constants",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="constants of the trainers, for all runs",
    )


def add_run_flags(parser):
    """Add the flags on how the runs are done."""
    parser.add_argument("--seeds", type=int, default=5, help="runs per setting (%(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=50, help="answers decoded at a time (%(default)s)"
    )
    parser.add_argument(
        "--num_gpus", type=int, default=1, help="per run, through the launcher (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time (1 on a GPU, otherwise one per core)"
    )
    parser.add_argument(
        "--remove_checkpoints",
        action="store_true",
        help="of runs that have been evaluated; 16 GB each at 8B",
    )


def check_args(parser, args):
    """End with the parser's message if a flag is out of range, or flags do not fit together."""
    for study in args.studies:
        if study not in STUDIES:
            parser.error(f"{study}: no study; give some of {', '.join(STUDIES)}")
    if "opdlm" in args.studies and set(args.studies) != {"opdlm"}:
        parser.error("opdlm has another base than the other studies; give it alone")
    names = "seeds steps block_size gen_length limit batch_size num_gpus jobs"
    for name in names.split():
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    for name, lowest in (("block_sizes", 1), ("tokens_per_step", 0)):
        for value in getattr(args, name):
            if value < lowest:
                parser.error(f"--{name} {value}: must be at least {lowest}")
    given = [f"--{name}" for name in ("model", "data", "test") if getattr(args, name)]
    if given and "opdlm" in args.studies:
        parser.error(f"opdlm takes the toy's base; for another use train_opdlm.py, not {given[0]}")
    if 0 < len(given) < 3:
        parser.error(f"{', '.join(given)} alone: another base needs --model, --data and --test")
    for block in [args.block_size, *args.block_sizes]:
        if args.gen_length % block:
            parser.error(
                f"--gen_length {args.gen_length} is not divisible by the block of {block} tokens"
            )


def read_constants(parser, words):
    """{NAME: text} of NAME=VALUE words; ends with the parser's message if one cannot be given."""
    constants = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            parser.error(f"--constants {word}: must be NAME=VALUE")
        if name in OWN:
            parser.error(f"--constants {word}: the studies set {name} themselves")
        constants[name] = text
    return constants


if __name__ == "__main__":  # before the slow imports: --help and a wrong flag answer at once
    ARGS = parse_args(sys.argv[1:])

import chains
import chains_ar
import evaluate
import plot
import suite
import torch
import train_control
import train_lift
import train_opdlm
from files import digest, file_digest, write_json, write_text
from tqdm import tqdm
from transformers import logging

import train_blockwise
import train_fullseq

TRAINERS = {  # whose constants a method has; that of a control is started by train_control.py
    "blockwise": train_blockwise,
    "fullseq": train_fullseq,
    "lift": train_lift,
    "rest": train_blockwise,
    "span": train_blockwise,
    "lift-block": train_lift,
    **dict.fromkeys(OPDLM_METHODS, train_opdlm),
}


def check_constants(constants, studies):
    """End with a message if a value is not one that all trainers of the studies take."""
    problems = []
    for trainer in dict.fromkeys(TRAINERS.values()):
        if (trainer is train_opdlm) != (studies == ["opdlm"]):
            continue
        before = {name: getattr(trainer, name) for name in trainer.CONSTANTS}
        for name, value in constants.items():
            if name in trainer.CONSTANTS:
                trainer.read_overrides([f"--{name}={value}"])
            else:
                problems.append(f"{name}: no constant of {os.path.basename(trainer.__file__)}")
        problems += trainer.check_constants()
        vars(trainer).update(before)
    if problems:
        sys.exit("\n".join(f"--constants {problem}" for problem in dict.fromkeys(problems)))


def number(args, name):
    """The value of one of the trainers' constants that is a number."""
    trainer = train_opdlm if args.studies == ["opdlm"] else train_blockwise
    given = args.constants.get(name, getattr(trainer, name))
    return ast.literal_eval(str(given))


# --------------------------------------------------------------------- what all runs have in common


def prepare(args):
    """Make what all runs need in `args.output`: the toy, unless a base is given, and the .pt file.

    Returns:
        a dict: `model` and `test` are what evaluate.py takes. `name` is the model's in results.csv.
        `constants` are those of all training runs. `identity` is a digest of what else decides a
        training, `decoding` one of what else decides an evaluation. `lengths` are the tokens of
        each answer to train on.
    """
    model, data, test = args.model, args.data, args.test
    if model is None:
        base = args.output / ("base-ar" if args.studies == ["opdlm"] else "base")
        if not (base / "model").exists():
            make_base(base, args)
        model = str(base / "model")
        data = str(base / "data" / "train.jsonl")
        test = str(base / "data" / "test.jsonl")
    problems = list(evaluate.load_task(test).eval_docs)[: args.limit]
    config, _ = evaluate.load_config(model, "main")
    contents = evaluate.model_identity(model, config)
    pt_file = preprocess(args, model, data, contents)
    constants = {
        "MODEL_NAME": model,
        "DATA_PT": str(pt_file),
        "MASK_ID": getattr(config, "mask_token_id", train_blockwise.MASK_ID),
    }
    return {
        "model": model,
        "test": test,
        "name": f"{os.path.basename(model)}-{digest(contents)[:8]}",
        "constants": constants | args.constants,
        "identity": digest(contents, file_digest(pt_file)),
        "decoding": digest(json.dumps([problems, args.batch_size]))[:8],
        "lengths": answer_lengths(args, pt_file),
    }


def make_base(folder, args):
    """Build the toy and its base in `folder`: chains.py's, or chains_ar.py's for opdlm."""
    if args.studies != ["opdlm"]:
        chains.build(folder, wide=False)
        return
    shutil.rmtree(folder, ignore_errors=True)  # what a killed study left
    share = chains_ar.build(folder)
    print(f"{folder}: the autoregressive base answers {share:.0%} of 100 test problems as written")


def preprocess(args, model, data, contents):
    """The .pt file of `data`; pt.py makes it unless it is there. Its name has what decides it."""
    words = ["--max_len", str(number(args, "MAX_LEN"))]
    if args.model is None:
        words += ["--max_samples", "0", "--filter_type", ""]  # all of the toy's rows
    source = file_digest(data) if os.path.isfile(data) else data
    path = args.output / f"train-{digest(contents, source, *words)[:8]}.pt"
    if not path.exists():
        places = suite.flags({"model": model, "dataset": data, "output": path})
        if suite.run([sys.executable, suite.ROOT / "pt.py", *places, *words]):
            sys.exit("pt.py failed, see above")
    return path


def answer_lengths(args, pt_file):
    """The tokens of each answer that is trained on, without answers that are cut off whole."""
    max_len = number(args, "MAX_LEN")
    lengths = []
    for row in torch.load(pt_file)[: number(args, "MAX_SAMPLES")]:
        length = min(len(row["full_ids"]), max_len) - row["prompt_len"]
        if length > 0:
            lengths.append(length)
    return lengths


# --------------------------------------------------------------------------- what there is to do


def compared(args, lengths):
    """What each study compares: {study: [(method, the constants that the study sets)]}.

    The first of each list is the one that the others are compared with. `lengths` are the answers'.
    """
    steps = common_steps(args, lengths, [args.block_size])
    fewer = equal_token_steps(steps, lengths, args.block_size)
    return {
        "equal-compute": [("blockwise", {}), ("fullseq", {})],
        "equal-tokens": [("blockwise", {}), ("fullseq", {"TOTAL_TRAIN_STEPS": fewer})],
        "block-size": [*vary("blockwise", "BLOCK_SIZE", args.block_sizes), ("fullseq", {})],
        "prefix": vary("blockwise", "PREFIX_MASK_RATE", [0.0, 0.1, 0.2, 0.5]),
        "suffix": vary("blockwise", "SUFFIX_MASK_PROB", [1.0, 0.5, 0.0]),
        "padding": [
            *vary("blockwise", "MASK_PADDING", [False, True]),
            *vary("fullseq", "MASK_PADDING", [False, True]),
        ],
        "lift": [
            ("fullseq", {}),
            ("blockwise", {}),
            *equal_steps_and_compute("lift", steps, {}),
            *equal_steps_and_compute("lift", steps, {"COMPONENTS": 2}),
            ("lift", {"APPROXIMATE": True}),  # its only forward pass also scores
            *equal_steps_and_compute("lift-block", steps, {}),
        ],
        "controls": [
            ("blockwise", {}),
            ("fullseq", {}),
            ("rest", {}),
            ("span", {}),
            *vary("blockwise", "BLOCK_SIZE", [1, number(args, "MAX_LEN")]),
        ],
        "opdlm": opdlm_arms(args.block_sizes, steps),
    }


def opdlm_arms(block_sizes, steps):
    """OPDLM and its controls with each block size, for a quarter of the steps and for all."""
    arms = []
    for size, some in product(block_sizes, (max(1, steps // 4), steps)):
        for method in OPDLM_METHODS:
            arms.append((method, {"BLOCK_SIZE": size, "TOTAL_TRAIN_STEPS": some}))
    return arms


def equal_steps_and_compute(method, steps, changes):
    """LIFT for `steps`, and for the fewer steps that cost about as much as `steps` without scoring.

    A step without scoring is a forward pass and a backward pass that costs as much, as nearly all
    weights are frozen. LIFT scores two thirds of its rows in a forward pass of their own, and all
    rows if it has two components.
    """
    scored = 1 if changes.get("COMPONENTS") == 2 else 2 / 3
    fewer = max(1, round(steps * 2 / (2 + scored)))
    return [(method, changes), (method, {**changes, "TOTAL_TRAIN_STEPS": fewer})]


def vary(method, name, values):
    return [(method, {name: value}) for value in values]


def common_steps(args, lengths, block_sizes):
    """`args.steps`, or fewer: as many as the blocks last for, of which none is drawn twice."""
    rows = number(args, "MICRO_BSIZE") * number(args, "GRAD_ACC") * args.num_gpus
    blocks = sum(math.ceil(length / max(block_sizes)) for length in lengths)
    return max(1, min(args.steps, blocks // rows))


def equal_token_steps(steps, lengths, block_size):
    """Full-sequence steps that supervise as many tokens as `steps` blockwise ones, in expectation.

    Both mask with t ~ U(0, 1): a blockwise draw half a block, a full-sequence draw half an answer.
    """
    # a draw's block is any of its answer's: their mean length is the answer's over their number
    block_tokens = sum(length / math.ceil(length / block_size) for length in lengths)
    return max(1, round(steps * block_tokens / sum(lengths)))


def make_arms(args, task):
    """The settings of all studies, the base first in each.

    Returns:
        a list of dicts: study, method, setting (its name), ways of decoding, each (block_length,
        end_tokens_last, tokens_per_step), and its runs, see `make_runs`.
    """
    table = compared(args, task["lengths"])
    arms = []
    for study in args.studies:
        sizes = [changes.get("BLOCK_SIZE", args.block_size) for _, changes in table[study]]
        steps = common_steps(args, task["lengths"], sizes)
        base = [] if study == "opdlm" else [("base", {})]  # an autoregressive one decodes no blocks
        for method, changes in [*base, *table[study]]:
            constants = {"TOTAL_TRAIN_STEPS": steps}
            if method not in ("base", "fullseq", "lift"):
                constants["BLOCK_SIZE"] = args.block_size
            if method in ("lift", "lift-block"):
                constants |= {name: getattr(train_fullseq, name) for name in SHARED}
                constants["TARGET_MODS"] = ",".join(train_fullseq.TARGET_MODS)
                constants |= args.constants
            arm = {
                "study": study,
                "method": method,
                "setting": setting_name(changes),
                "ways": ways_of(args, study, changes),
                "runs": make_runs(args, task, method, constants | changes),
            }
            arms.append(arm)
    return arms


def ways_of(args, study, changes):
    """The ways of decoding a setting of a study, which changes these constants."""
    blocks = [(args.block_size, False)]
    if study == "block-size":
        blocks = [(block_length, False) for block_length in args.block_sizes]
    if study == "controls":  # also as one block, which is decoding without blocks
        blocks += [(args.gen_length, False), (args.gen_length, True)]
    if study == "opdlm":  # the block of training
        blocks = [(changes["BLOCK_SIZE"], False)]
    return [(*block, tokens) for block, tokens in product(blocks, args.tokens_per_step)]


def setting_name(changes):
    """The name of a setting, from the constants that its study sets."""
    named = {key: value for key, value in changes.items() if key != "TOTAL_TRAIN_STEPS"}
    words = [f"{key}={value}" for key, value in named.items()]
    if "TOTAL_TRAIN_STEPS" in changes:
        words.append(f"steps={changes['TOTAL_TRAIN_STEPS']}")
    return " ".join(words)


def make_runs(args, task, method, constants):
    """The runs of one setting, a dict per seed: seed, method, folder, constants.

    A folder's name has a digest of what decides the run's result.
    """
    if method == "base":
        folder = args.output / f"base-{digest(task['identity'])[:8]}"
        return [{"seed": "base", "method": method, "folder": folder, "constants": {}}]
    runs = []
    for seed in range(1, args.seeds + 1):
        given = task["constants"] | constants | {"SEED": seed}
        key = digest(task["identity"], str(args.num_gpus), all_constants(method, given))
        folder = args.output / f"{method}-seed{seed}-{key[:8]}"
        runs.append({"seed": seed, "method": method, "folder": folder, "constants": given})
    return runs


def all_constants(method, given):
    """All constants that decide a run's result, as text: those `given`, or the script's values."""
    trainer = TRAINERS[method]
    constants = {name: getattr(trainer, name) for name in trainer.CONSTANTS} | given
    pairs = [(name, str(value)) for name, value in constants.items() if name not in PLACES]
    return json.dumps(sorted(pairs))


def unique_runs(arms):
    """Each run of the arms once, with the ways of decoding of all arms that have it."""
    runs = {}
    for arm in arms:
        for run in arm["runs"]:
            unique = runs.setdefault(run["folder"], {**run, "ways": set()})
            unique["ways"].update(arm["ways"])
    return list(runs.values())


def decoding_folder(args, task, folder, way):
    """Where an evaluation of the run in `folder` is: its name has what decides it."""
    block_length, end_tokens_last, tokens_per_step = way
    name = f"gen{args.gen_length}-block{block_length}-tokens{tokens_per_step}"
    if end_tokens_last:
        name += "-last"
    return folder / f"{name}-{task['decoding']}"


# -------------------------------------------------------------------------------------- doing it


def do_all(runs, args, task):
    """Do the runs, `args.jobs` at a time, the base's first: if it fails, there are no others.

    Returns:
        a message for each that failed.
    """
    pool = ProcessPoolExecutor(
        args.jobs,
        get_context("spawn"),
        initializer=begin_worker,
        initargs=(os.getpid(), threads(args)),
    )
    base = [run for run in runs if run["method"] == "base"]
    others = [run for run in runs if run["method"] != "base"]
    try:
        failed = do_batch(base, pool, args, task) if base else []
        if not failed:
            failed = do_batch(others, pool, args, task)
    except KeyboardInterrupt:
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()
    return failed


def do_batch(runs, pool, args, task):
    """Do these runs in the pool's processes; returns a message for each that failed."""
    waiting = {pool.submit(complete, run, args, task): run["folder"] for run in runs}
    failed = []
    for future in tqdm(as_completed(waiting), total=len(waiting), unit=" runs", desc="study"):
        if future.exception():
            failed.append(f"{waiting[future]}: {future.exception()}")
    return failed


def threads(args):
    """Threads for each of the processes that share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // (args.jobs * args.num_gpus))


def begin_worker(parent, count):
    """Prepare a process of the pool: it ends when the study does, and uses `count` threads."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and its trainer too
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # the study was killed before this call
        os._exit(1)
    torch.set_num_threads(count)


def complete(run, args, task):
    """Train and evaluate one run, or do what is left of it; its output is appended to its log.

    Raises:
        RuntimeError: if that fails.
    """
    run["folder"].mkdir(parents=True, exist_ok=True)
    missing = []
    for way in sorted(run["ways"]):
        output = decoding_folder(args, task, run["folder"], way)
        if not (output / "summary.json").exists():
            missing.append((output, way))
    if not missing:
        return
    with open(run["folder"] / "log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            model = task["model"] if run["method"] == "base" else train(run, args, log)
            for output, way in missing:
                measure(model, output, way, args, task, log)
        except SystemExit as error:  # it would end this process, which has other runs to do
            raise RuntimeError(f"{error.code}; see {log.name}") from error
    if args.remove_checkpoints and run["method"] != "base":
        shutil.rmtree(model)


def interpreter(args):
    """The beginning of a command line that starts a script on `args.num_gpus` GPUs."""
    return suite.launcher(args.num_gpus) if args.num_gpus > 1 else [sys.executable]


def train(run, args, log):
    """Train `run` to its end, from where it was stopped if it was begun; returns its checkpoint.

    Raises:
        SystemExit: if the trainer fails.
    """
    folder = run["folder"]
    script = TRAINERS[run["method"]].__file__
    constants = run["constants"] | {"CKPT_DIR": "ckpt"}
    if run["method"] in train_control.CONTROLS:
        script = train_control.__file__
        constants["CONTROL"] = run["method"]
    for _ in range(2):  # a second time, if a killed study's trainer came first and now has ended
        wait_for_trainer(folder)
        if find_checkpoint(folder) is None:
            command = [*interpreter(args), script, *suite.flags(constants)]
            start = time.monotonic()
            status = suite.run(command, folder, log, OMP_NUM_THREADS=str(threads(args)))
            if status == 0:  # with its start and its saving; without what it did before a stop
                write_json(folder / "seconds.json", round(time.monotonic() - start, 1))
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        sys.exit(f"{os.path.basename(script)} failed")
    return checkpoint


def wait_for_trainer(folder):
    """Wait until no trainer works in the run's folder: one that a killed study left may do so."""
    for path in folder.glob("ckpt_logs*/state/lock"):
        with suppress(FileNotFoundError), open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def find_checkpoint(folder):
    """The checkpoint of a run that is trained to its end, otherwise None."""
    if list(folder.glob("ckpt_logs*/state")):
        return None
    return max(folder.glob("ckpt_step*"), default=None)


def measure(model, output, way, args, task, log):
    """Evaluate `model`: on a CPU in this process, which has loaded the libraries.

    Raises:
        SystemExit: if the evaluation fails.
    """
    block_length, end_tokens_last, tokens_per_step = way
    steps_per_block = math.ceil(block_length / (tokens_per_step or 1))
    settings = {
        "model": model,
        "output": output,
        "dataset": task["test"],
        "gen_length": args.gen_length,
        "block_length": block_length,
        "steps": args.gen_length // block_length * steps_per_block,
        "batch_size": args.batch_size,
    }
    if args.limit:
        settings["limit"] = args.limit
    words = suite.flags(settings)
    if end_tokens_last:
        words.append("--confidence_eos_eot_inf")
    if tokens_per_step == 0:
        words += suite.flags({"threshold": THRESHOLD})
    if args.num_gpus > 1 or torch.cuda.is_available():  # this process must not keep GPU memory
        command = [*interpreter(args), evaluate.__file__, *words]
        suite.run(command, output=log, OMP_NUM_THREADS=str(threads(args)))
    else:
        evaluate.main(words)
    if not (output / "summary.json").exists():
        sys.exit(f"{output}: the evaluation failed")


# --------------------------------------------------------------------------------- what came out


def collect(args, task, arms):
    """The lines of results.csv, from what the runs have left; missing evaluations are left out."""
    rows = []
    for arm in arms:
        for run, way in product(arm["runs"], arm["ways"]):
            output = decoding_folder(args, task, run["folder"], way)
            if not (output / "summary.json").exists():
                continue
            summary = json.loads((output / "summary.json").read_text())
            block_length, end_tokens_last, tokens = way
            row = {
                **arm,
                **training_of(run["folder"]),
                "seed": run["seed"],
                "block_length": block_length,
                "end_tokens_last": int(end_tokens_last),
                "tokens_per_step": tokens,
                "tokens_per_forward": round(summary["tokens"] / max(1, summary["forwards"]), 3),
                "gen_length": args.gen_length,
                "accuracy": summary["accuracy"],
                "exact_match": summary["exact_match"],
                "count": summary["count"],
                "decoding_seconds": round(summary["seconds"], 1),
                "model": task["name"],
            }
            rows.append({name: row.get(name, "") for name in COLUMNS})
    return rows


def training_of(folder):
    """Loss (mean of the last tenth of the steps), supervised tokens, steps and seconds of a run.

    The supervised tokens of OPDLM are those of the answers that it has learnt from.
    """
    logs = folder / "ckpt_logs"
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
    if (folder / "seconds.json").exists():  # not if the study was killed before the trainer ended
        figures["seconds"] = json.loads((folder / "seconds.json").read_text())
    return figures


def count_tokens(logs):
    """The tokens of all answers in a run's rollouts.csv."""
    with open(logs / "rollouts.csv") as file:
        return sum(int(row["tokens"]) for row in csv.DictReader(file))


def write_results(path, rows, args, task):
    """Write results.csv, keeping the lines that other studies of the same model have there."""
    before = []
    if path.exists():
        with open(path, newline="") as file:
            before = list(csv.DictReader(file))
    own = [row for row in before if row.get("model") == task["name"]]
    kept = [row for row in own if row["study"] not in args.studies]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_text(path, text.getvalue())


def print_table(rows):
    """Print a line per setting and decoding block, with a column per number of tokens per step."""
    ways = sorted({row["tokens_per_step"] for row in rows})
    columns = [plot.pace_name(way) for way in ways]
    table = [["study", "method", "setting", "decoding", *columns, "supervised tokens"]]
    groups = {}
    for row in rows:
        key = (row["study"], row["method"], row["setting"], plot.decoding_name(row))
        groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        line = [str(word) for word in key]
        for way in ways:
            values = [100 * row["accuracy"] for row in group if row["tokens_per_step"] == way]
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
            arm = (row["study"], f"{row['method']} {row['setting']}".strip())
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


# ------------------------------------------------------------------------------------------ main


def main(args):
    check_constants(args.constants, args.studies)
    if args.jobs is None:
        args.jobs = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    logging.set_verbosity_error()
    path = args.output / "results.csv"
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        task = prepare(args)
        arms = make_arms(args, task)
        runs = unique_runs(arms)
        print(f"{len(runs)} runs, {args.jobs} at a time, in {args.output}", flush=True)
        failed = do_all(runs, args, task)
        rows = collect(args, task, arms)
        write_results(path, rows, args, task)
        print_table(rows)
        print_differences(rows)
        print("see", ", ".join([str(path), *plot.draw_studies(rows, args.output)]))
    except OSError as error:
        sys.exit(
            f"--output {args.output} cannot be written ({error}); give the same command again when "
            "it can"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; give the same command again to resume")
    if failed:
        remedy = "give the same command again to try them again"
        sys.exit("\n".join([f"{len(failed)} runs failed; {remedy}", *failed]))


if __name__ == "__main__":
    main(ARGS)
