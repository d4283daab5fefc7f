"""The paper's comparisons, over several seeds, through the trainers themselves.

    python experiments/study.py                          # on the toy task: all but those below
    python experiments/study.py equal-compute equal-tokens --seeds 20
    python experiments/study.py paper                    # LLaDA-8B, GSM8K and MATH-500, on GPUs
    python experiments/study.py prefix --model M --data rows.jsonl --test gsm8k problems.jsonl
    python experiments/study.py narrow                   # or opdlm: toys with another base

A study compares settings of the trainers with each other and with the base model. Every setting is
trained once per seed (a run), and every run is evaluated on each test set in several ways of
decoding. Base and task are the toy's (toy_task/chains.py), or those of --model and of the study
paper, whose defaults are the paper's. The studies narrow and opdlm have bases of their own.

OUTPUT/results.csv has one line per study, setting, seed, test set and way of decoding; figures are
drawn next to it. To resume a study that was stopped, give the same command again. Studies share
runs: what is there with the same constants, model and data is not trained again. Give another
--output after changing the code of a trainer.

Guide: experiments/docs/studies.md
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import plot
import suite
from opdlm.study_opdlm import OPDLM
from studies import cost
from studies.arms import (
    THRESHOLD,
    TRAINERS,
    Setup,
    Study,
    common_steps,
    constant,
    default_block,
    equal_token_steps,
    lift_effort,
    make_arms,
    make_ways,
    own_block,
    vary,
    ways_of_runs,
)
from studies.narrow import NARROW
from studies.results import collect, write_results
from studies.runs import do_all, prepare, visible_gpus
from studies.tables import print_differences, print_table
from toy_task import chains
from transformers import logging

import train_fullseq
from train_blockwise import check_constants, from_text

TOY_DEFAULTS = {  # of the flags
    "steps": 200,
    "block_size": 16,
    "block_sizes": [8, 16, 32],
    "gen_length": 64,
    "tokens_per_step": [2, 4, 8],
    "seeds": 5,
}
TOY_CONSTANTS = {  # as in toy.py
    "MICRO_BSIZE": 16,  # on all GPUs of a run together
    "LR": 4e-3,
    "LORA_RANK": 32,
    "MAX_LEN": 112,
    "MAX_SAMPLES": 8000,
}
PAPER_DEFAULTS = {
    "model": "GSAI-ML/LLaDA-8B-Instruct",
    "data": "meta-math/MetaMathQA",
    "test": ["gsm8k", "math500"],
    "steps": 200,
    "block_size": 32,
    "block_sizes": [8, 32, 128],
    "gen_length": 256,
    "tokens_per_step": [2],
    "seeds": 3,
}
PAPER_CONSTANTS = {"MICRO_BSIZE": 32, "MAX_SAMPLES": 200 * 32}  # as in the README
PUBLISHED = """
the paper's figures, exact match in % (arXiv 2508.19529):
    Blockwise SFT                 GSM8K 76.0, MATH 34.2
    best other SFT                GSM8K 70.8, MATH 32.6
of the base, reported elsewhere with the same decoding (arXiv 2510.09541):
    LLaDA-8B-Instruct             GSM8K 77.2, MATH-500 32.4"""

# Constants that the studies set themselves
OWN = "MODEL_NAME MODEL_REVISION DATA_PT CKPT_DIR SEED TOTAL_TRAIN_STEPS BLOCK_SIZE SAVE_EVERY"
OWN += " ANSWERS STATES LOSS"


# ------- what is compared
# A study is a function of the flags and of the answers' lengths in tokens. It gives its settings,
# (method, constants that it sets); the others are compared with the first.


def equal_compute(args, lengths):
    """Both methods, the same steps and rows per step."""
    return [("blockwise", {}), ("fullseq", {})]


def equal_tokens(args, lengths):
    """Both methods, the same number of supervised tokens."""
    steps = common_steps(args, lengths, [args.block_size])
    fewer = equal_token_steps(steps, lengths, args.block_size)
    return [("blockwise", {}), ("fullseq", {"TOTAL_TRAIN_STEPS": fewer})]


def paper(args, lengths):
    """The paper's table: equal-compute and equal-tokens together."""
    return equal_compute(args, lengths) + equal_tokens(args, lengths)[1:]


def rest(args, lengths):
    """The loss on the active block, or on the hidden suffix too."""
    return [("blockwise", {}), ("rest", {})]


def vary_block_size(args, lengths):
    """Training blocks x decoding blocks."""
    return [*vary("blockwise", "BLOCK_SIZE", args.block_sizes), ("fullseq", {})]


def vary_answer_blocks(args, lengths):
    """Both methods by blocks per answer: trained and decoded with each block size."""
    return [("fullseq", {}), *vary("blockwise", "BLOCK_SIZE", args.block_sizes)]


def vary_prefix(args, lengths):
    """PREFIX_MASK_RATE 0, 0.1, 0.2, 0.5."""
    return vary("blockwise", "PREFIX_MASK_RATE", [0.0, 0.1, 0.2, 0.5])


def vary_suffix(args, lengths):
    """SUFFIX_MASK_PROB 1, 0.5, 0."""
    return vary("blockwise", "SUFFIX_MASK_PROB", [1.0, 0.5, 0.0])


def vary_padding(args, lengths):
    """MASK_PADDING False, True, both methods."""
    blockwise = vary("blockwise", "MASK_PADDING", [False, True])
    return blockwise + vary("fullseq", "MASK_PADDING", [False, True])


def lift_variants(args, lengths):
    """LIFT, its variants, and inside the active block: equal steps, equal compute."""
    steps = common_steps(args, lengths, [args.block_size])
    return [
        ("fullseq", {}),
        ("blockwise", {}),
        *equal_steps_and_compute("lift", steps, {}),
        *equal_steps_and_compute("lift", steps, {"COMPONENTS": 2}),
        ("lift", {"APPROXIMATE": True}),  # its only forward pass also scores
        *equal_steps_and_compute("lift-block", steps, {}),
    ]


def equal_steps_and_compute(method, steps, changes):
    """LIFT for `steps`, and for the fewer that cost about as much as `steps` without scoring."""
    fewer = max(1, round(steps / lift_effort(changes)))
    return [(method, changes), (method, {**changes, "TOTAL_TRAIN_STEPS": fewer})]


def controls(args, lengths):
    """Blockwise SFT with another loss, place or block size; also decoded without blocks."""
    return [
        ("blockwise", {}),
        ("fullseq", {}),
        ("rest", {}),
        ("span", {}),
        *vary("blockwise", "BLOCK_SIZE", [1, constant(args, "MAX_LEN")]),
    ]


# A setting's ways of decoding are a function of the flags and of the setting's constants.


def every_block(args, changes):
    return make_ways(args, args.block_sizes)


def also_without_blocks(args, changes):
    """The default block, and the whole answer as one block, also with the end tokens last."""
    whole = make_ways(args, [args.gen_length])
    ends_last = make_ways(args, [args.gen_length], end_tokens_last=True)
    return default_block(args, changes) + whole + ends_last


STUDIES = {
    "equal-compute": Study(equal_compute, default_block),
    "equal-tokens": Study(equal_tokens, default_block),
    "rest": Study(rest, default_block),
    "block-size": Study(vary_block_size, every_block),
    "answer-blocks": Study(vary_answer_blocks, own_block),
    "prefix": Study(vary_prefix, default_block),
    "suffix": Study(vary_suffix, default_block),
    "padding": Study(vary_padding, default_block),
    "lift": Study(lift_variants, default_block),
    "controls": Study(controls, also_without_blocks),
}
METHODS = ["blockwise", "fullseq", "lift"]  # whose trainers take --constants
# LIFT differs from train_fullseq.py in its method alone
LIKE_FULLSEQ = {name: train_fullseq.CONSTANTS[name] for name in ("LR", "LORA_RANK", "TARGET_MODS")}
LIFT_CONSTANTS = {"lift": LIKE_FULLSEQ, "lift-block": LIKE_FULLSEQ}

TOY = Setup(
    name="toy",
    studies=STUDIES,
    defaults=TOY_DEFAULTS,
    constants=TOY_CONSTANTS,
    trainers=METHODS,
    build_base=partial(chains.build, wide=False),
    method_constants=LIFT_CONSTANTS,
)
PAPER = replace(
    TOY,
    name="paper",
    studies=STUDIES | {"paper": Study(paper, default_block)},
    defaults=PAPER_DEFAULTS,
    constants=PAPER_CONSTANTS,
    build_base=None,
)
SETUPS = [TOY, PAPER, NARROW, OPDLM]

# ------- main


def main(args):
    logging.set_verbosity_error()
    path = args.output / "results.csv"
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        task = prepare(args)
        arms = make_arms(args, task)
        runs = ways_of_runs(arms)
        print(f"{len(runs)} runs, {args.jobs} at a time, in {args.output}", flush=True)
        if args.setup is PAPER:
            print(cost.describe(args, task, runs), flush=True)
        failed = do_all(args, task, runs)
        rows = collect(args, task, arms)
        write_results(path, rows, args.studies, task)
        if rows:
            report(path, args)
    except OSError as error:
        sys.exit(f"stopped: {error}; give the same command again when this is fixed")
    except KeyboardInterrupt:
        sys.exit("interrupted; give the same command again to resume")
    if failed:
        remedy = "give the same command again to try them again"
        sys.exit("\n".join([f"{len(failed)} runs failed; {remedy}", *failed]))


def report(path, args):
    """Print and draw all that results.csv has of the studies."""
    rows = [row for row in plot.read_results(path) if row["study"] in args.studies]
    print_table(rows)
    print_differences(rows)
    if "paper" in args.studies:
        print(PUBLISHED)
    print("see", ", ".join([str(path), *plot.draw_studies(rows, args.output)]))


# ------- flags


def parse_args(argv=None):
    parser = suite.make_parser(f"{__doc__}\nstudies:\n{list_studies()}")
    add_task_flags(parser)
    add_run_flags(parser)
    args = parser.parse_args(argv)
    args.setup = choose_setup(parser, args)
    args.studies = args.studies or list(STUDIES)
    for name, value in args.setup.defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_args(parser, args)
    args.given = [word.partition("=")[0] for word in args.constants]
    args.constants = read_constants(parser, args)
    args.output = args.output.absolute()
    if args.model and os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)  # each trainer runs in the folder of its run
    gpus = len(visible_gpus())
    if args.jobs is None:
        args.jobs = max(1, gpus // args.num_gpus) if gpus else len(os.sched_getaffinity(0))
    if gpus and args.jobs * args.num_gpus > gpus:
        parser.error(f"--jobs {args.jobs} x --num_gpus {args.num_gpus}: there are {gpus} GPUs")
    for name in ("studies", "block_sizes", "tokens_per_step"):
        each_once = list(dict.fromkeys(getattr(args, name)))
        setattr(args, name, each_once)
    return args


def list_studies():
    """A line on each study, for the help text."""
    lines = []
    for name, study in all_studies().items():
        about = study.settings.__doc__.splitlines()[0]
        lines.append(f"    {name:16}{about}")
    return "\n".join(lines)


def all_studies():
    """{name: Study} of all setups."""
    return {name: study for setup in SETUPS for name, study in setup.studies.items()}


def defaults_of(name):
    """The default values of a flag, for its help text."""
    values = {setup.name: str(setup.defaults[name]) for setup in SETUPS}
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def add_task_flags(parser):
    """Add the flags on what is compared, trained and evaluated."""
    add = parser.add_argument
    others = ", ".join(name for name in all_studies() if name not in STUDIES)
    add("studies", nargs="*", metavar="STUDY", help=f"see above (all but {others})")
    place = "(the toy's; paper: {})"
    model = "base model, hub id or folder " + place.format(PAPER_DEFAULTS["model"])
    add("--model", help=model)
    data = "training data, as pt.py's --dataset " + place.format(PAPER_DEFAULTS["data"])
    add("--data", help=data)
    tests = "test sets, as evaluate.py's --dataset " + place.format("gsm8k math500")
    add("--test", nargs="+", help=tests)
    add("--limit", type=int, help="use only the first problems of each test set (all)")
    add("--steps", type=int, help=f"optimizer steps ({defaults_of('steps')})")
    blocks = f"training block, tokens ({defaults_of('block_size')})"
    add("--block_size", type=int, help=blocks)
    blocks = f"of block-size, answer-blocks and opdlm ({defaults_of('block_sizes')})"
    add("--block_sizes", type=int, nargs="+", metavar="BLOCK_SIZE", help=blocks)
    add("--gen_length", type=int, help=f"tokens per answer ({defaults_of('gen_length')})")
    tokens = f"committed per forward pass; 0: those above {THRESHOLD}"
    tokens += f" ({defaults_of('tokens_per_step')})"
    add("--tokens_per_step", type=int, nargs="+", metavar="TOKENS", help=tokens)
    constants = "constants of the trainers, for all runs"
    add("--constants", nargs="+", default=[], metavar="NAME=VALUE", help=constants)


def add_run_flags(parser):
    """Add the flags on how the runs are done."""
    add = parser.add_argument
    output = Path(__file__).resolve().parent / "runs" / "study"
    add("--output", type=Path, default=output, help="folder (%(default)s)")
    add("--seeds", type=int, help=f"runs per setting ({defaults_of('seeds')})")
    add("--batch_size", type=int, default=50, help="answers decoded at a time (%(default)s)")
    gpus = "per run, through the launcher; the rows per step stay the same (%(default)s)"
    add("--num_gpus", type=int, default=1, help=gpus)
    jobs = "runs at a time, each on its own GPUs (as many as fit, or one per core)"
    add("--jobs", type=int, help=jobs)
    remove = "remove those of runs that have been evaluated, 16 GB each at 8B; to evaluate such a "
    remove += "run in another way, it is trained again"
    add("--remove_checkpoints", action="store_true", help=remove)


def choose_setup(parser, args):
    """The setup that has the studies; ends with the parser's message if there is none."""
    known = all_studies()
    for study in args.studies:
        if study not in known:
            parser.error(f"{study}: no study; give some of {', '.join(known)}")
    fitting = [setup for setup in SETUPS if set(args.studies) <= set(setup.studies)]
    if not fitting:
        parser.error(f"{' '.join(args.studies)}: they have different bases; give one at a time")
    setup = PAPER if args.model else fitting[0]
    if setup not in fitting:
        parser.error(f"--model {args.model}: {' '.join(args.studies)} takes a base of the toy task")
    if setup.build_base and (args.data or args.test):
        remedy = "give --model too" if setup is TOY else "leave them out"
        parser.error(f"--data, --test: the toy has its own; {remedy}")
    return setup


def check_args(parser, args):
    """End with the parser's message if a flag is out of range, or flags do not fit together."""
    positive = "seeds steps block_size gen_length limit batch_size num_gpus jobs".split()
    suite.check_lowest(parser, args, **dict.fromkeys(positive, 1))
    for name, lowest in (("block_sizes", 1), ("tokens_per_step", 0)):
        for value in getattr(args, name):
            if value < lowest:
                parser.error(f"--{name} {value}: must be at least {lowest}")
    names = [Path(dataset).stem for dataset in args.test or []]
    if len(names) > len(set(names)):
        parser.error(f"--test {' '.join(args.test)}: two have the same name; rename one")
    for block in [args.block_size, *args.block_sizes]:
        if args.gen_length % block:
            parser.error(
                f"--gen_length {args.gen_length} is not divisible by the block of {block} tokens"
            )


def read_constants(parser, args):
    """The constants of all runs, {name: value}: the setup's, and those of NAME=VALUE words.

    The setup's rows per step are shared out among the GPUs of a run. Ends with the parser's message
    if a constant is not what all trainers of the setup take.
    """
    setup = args.setup
    texts = {}
    for word in args.constants:
        name, equals, text = word.partition("=")
        if not equals:
            parser.error(f"--constants {word}: must be NAME=VALUE")
        if name in OWN.split():
            parser.error(f"--constants {word}: the studies set {name} themselves")
        texts[name] = text
    constants = setup.constants
    if "MICRO_BSIZE" not in texts:
        rows, left = divmod(constants["MICRO_BSIZE"], args.num_gpus)
        if left:
            rows_per_step = f"{constants['MICRO_BSIZE']} rows per step cannot be shared out equally"
            parser.error(f"--num_gpus {args.num_gpus}: {rows_per_step}; give another number")
        constants = constants | {"MICRO_BSIZE": rows}
    problems = []
    for trainer in (TRAINERS[method] for method in setup.trainers):
        for name, text in texts.items():
            if name in trainer.CONSTANTS:
                value = from_text(text, type(trainer.CONSTANTS[name]))
                constants = constants | {name: value}
            else:
                problems.append(f"{name}: no constant of {os.path.basename(trainer.__file__)}")
        values = argparse.Namespace(**trainer.CONSTANTS | constants)
        problems += check_constants(values, trainer.LIMITS)
    if problems:
        parser.error("\n".join(f"--constants {problem}" for problem in dict.fromkeys(problems)))
    return constants


if __name__ == "__main__":
    main(parse_args())
