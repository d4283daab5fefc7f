"""From a study to its runs: what is compared becomes arms, and an arm has a run per seed.

A setup holds studies that share a base, a task and defaults. A study has settings, each a method
and the constants that the study sets. An arm is a setting with its runs and ways of decoding.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import suite  # noqa: F401 (the trainers are one folder up)
import train_control
import train_lift
import train_opdlm
from suite import digest

import train_blockwise
import train_fullseq

TRAINERS = {  # methods that have a script of their own; the others are those of train_control.py
    "blockwise": train_blockwise,
    "fullseq": train_fullseq,
    "lift": train_lift,
    "opdlm": train_opdlm,
}
THRESHOLD = 0.9  # of decoding, where tokens_per_step is 0
PLACES = ("MODEL_NAME", "DATA_PT", "CKPT_DIR")  # constants that do not change a run's result


@dataclass(frozen=True, order=True)
class Way:
    """A way of decoding."""

    block_length: int  # tokens
    end_tokens_last: bool  # evaluate.py's --confidence_eos_eot_inf
    tokens_per_step: int  # 0: all tokens above THRESHOLD


@dataclass(frozen=True)
class Run:
    """A training run; or the base, which is only decoded."""

    seed: int | str
    method: str
    folder: Path
    constants: dict = field(compare=False)  # their digest is in the folder's name


@dataclass(frozen=True)
class Arm:
    """A setting in a study: one line per run and way in results.csv."""

    study: str
    method: str
    setting: str  # names the constants that the study sets
    ways: list[Way]
    runs: list[Run]


@dataclass(frozen=True)
class Benchmark:
    """A test set: one of the hub, or a file of problems."""

    name: str  # in results.csv
    dataset: str  # as evaluate.py's --dataset
    count: int  # problems
    decoding: str  # names what, beside the way of decoding, decides an evaluation


@dataclass(frozen=True)
class Task:
    """What all runs have in common."""

    model: str  # the base, as evaluate.py's --model
    weights: int  # of the base
    name: str  # of the base, in results.csv
    tests: list[Benchmark]
    constants: dict  # of all training runs
    lengths: list[int]  # tokens of each answer to train on
    identity: str  # a digest of what else decides a training


@dataclass(frozen=True)
class Study:
    settings: Callable  # (args, lengths of the answers) -> [(method, constants)], reference first
    ways: Callable  # (args, the constants of a setting) -> [Way]


@dataclass(frozen=True)
class Setup:
    """Studies that share a base and a task, and what holds for them unless flags say otherwise."""

    name: str
    studies: dict[str, Study]
    defaults: dict  # of flags
    constants: dict  # of all runs
    trainers: list[str]  # methods whose trainers take --constants
    build_base: Callable | None = None  # makes FOLDER/model and FOLDER/data; None: flags name them
    tests: tuple[str, ...] = ("test",)  # .jsonl files in FOLDER/data
    decodes_base: bool = True  # False: it is autoregressive, and decodes no blocks
    method_constants: dict = field(default_factory=dict)  # {method: constants}, unless given


# ------- what makes up studies


def vary(method, name, values):
    return [(method, {name: value}) for value in values]


def make_ways(args, block_lengths, end_tokens_last=False):
    """These blocks, each with all numbers of tokens per step."""
    pairs = product(block_lengths, args.tokens_per_step)
    return [Way(block_length, end_tokens_last, tokens) for block_length, tokens in pairs]


def default_block(args, changes):
    return make_ways(args, [args.block_size])


def own_block(args, changes):
    """The block of the setting's training; every block if it sets none."""
    return make_ways(args, [changes["BLOCK_SIZE"]] if "BLOCK_SIZE" in changes else args.block_sizes)


def common_steps(args, lengths, block_sizes):
    """`args.steps`, or fewer: as many as the blocks last for, of which none is drawn twice."""
    rows = constant(args, "MICRO_BSIZE") * constant(args, "GRAD_ACC") * args.num_gpus
    blocks = sum(math.ceil(length / max(block_sizes)) for length in lengths)
    return max(1, min(args.steps, blocks // rows))


def equal_token_steps(steps, lengths, block_size):
    """Full-sequence steps that supervise as many tokens as `steps` blockwise ones, in expectation.

    Both mask with t ~ U(0, 1): a blockwise draw half a block, a full-sequence draw half an answer.
    """
    # a draw's block is any of its answer's: their mean length is the answer's over their number
    block_tokens = sum(length / math.ceil(length / block_size) for length in lengths)
    return max(1, round(steps * block_tokens / sum(lengths)))


def lift_effort(constants):
    """What a step of LIFT costs, in steps without scoring.

    Those are a forward pass and a backward pass that costs as much, as nearly all weights are
    frozen. LIFT scores two thirds of its rows in a forward pass of their own, and all rows if it
    has two components. APPROXIMATE scores in the only forward pass.
    """
    if constants.get("APPROXIMATE"):
        return 1
    scored = 1 if constants.get("COMPONENTS") == 2 else 2 / 3
    return (2 + scored) / 2


def constant(args, name):
    """The value of a constant that all runs of the setup have."""
    if name in args.constants:
        return args.constants[name]
    return constants_of_method(args.setup.trainers[0])[name]


# ------- methods


def constants_of_method(method):
    """The constants of a method with their defaults, {name: value}."""
    if method in train_control.CONTROLS:
        constants, _ = train_control.constants_of(method)
        return constants
    return TRAINERS[method].CONSTANTS


def script_of(method):
    """The path of the script that trains with a method."""
    return (train_control if method in train_control.CONTROLS else TRAINERS[method]).__file__


# ------- arms


def make_arms(args, task):
    """The arms of all studies; the first of each is the base if it can be decoded."""
    arms = []
    for name in args.studies:
        study = args.setup.studies[name]
        settings = study.settings(args, task.lengths)
        refuse_constants(args, name, settings)
        sizes = [changes.get("BLOCK_SIZE", args.block_size) for _, changes in settings]
        steps = common_steps(args, task.lengths, sizes)
        base = [("base", {})] if args.setup.decodes_base else []
        for method, changes in [*base, *settings]:
            runs = make_runs(args, task, method, {"TOTAL_TRAIN_STEPS": steps} | changes)
            arm = Arm(name, method, setting_name(changes), study.ways(args, changes), runs)
            arms.append(arm)
    return arms


def refuse_constants(args, study, settings):
    """Refuse constants that were given and have no effect in a study.

    Raises:
        SystemExit: if one is set by all settings of the study.
    """
    for name in args.given:
        if all(name in changes for _, changes in settings):
            sys.exit(f"--constants {name}: the study {study} sets it itself; leave it out")


def setting_name(changes):
    """The name of a setting, from the constants that its study sets."""
    named = {key: value for key, value in changes.items() if key != "TOTAL_TRAIN_STEPS"}
    words = [f"{key}={value}" for key, value in named.items()]
    if "TOTAL_TRAIN_STEPS" in changes:
        words.append(f"steps={changes['TOTAL_TRAIN_STEPS']}")
    return " ".join(words)


def make_runs(args, task, method, changes):
    """The runs of a setting, one per seed.

    A folder's name has a digest of all that decides the run's result.
    """
    if method == "base":
        folder = args.output / f"base-{digest(task.identity)[:8]}"
        return [Run("base", method, folder, {})]
    defaults = constants_of_method(method)
    given = args.setup.method_constants.get(method, {}) | task.constants
    if "BLOCK_SIZE" in defaults:
        given["BLOCK_SIZE"] = args.block_size
    runs = []
    for seed in range(1, args.seeds + 1):
        constants = given | changes | {"SEED": seed}
        key = digest(task.identity, str(args.num_gpus), as_text(defaults | constants))
        folder = args.output / f"{method}-seed{seed}-{key[:8]}"
        runs.append(Run(seed, method, folder, constants))
    return runs


def as_text(constants):
    """Constants as one text, without those that do not change the result."""
    pairs = [(name, str(value)) for name, value in constants.items() if name not in PLACES]
    return json.dumps(sorted(pairs))


def ways_of_runs(arms):
    """{run: its ways of decoding}: each run of the arms once, with the ways of all that have it."""
    found = {}
    for arm in arms:
        for run in arm.runs:
            found.setdefault(run, set()).update(arm.ways)
    return found


def evaluation_folder(run, test, way):
    """Where an evaluation of the run is: its name has what decides it."""
    last = "-last" if way.end_tokens_last else ""
    name = f"block{way.block_length}-tokens{way.tokens_per_step}{last}-{test.decoding}"
    return run.folder / f"{test.name}-{name}"
