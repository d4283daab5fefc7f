"""Studies run the real trainers, can be stopped anywhere, and count what they say they count."""

import argparse
import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import helpers
import numpy as np
import plot
import pytest
import study
import suite
import torch
import train_control
import train_opdlm
from helpers import user_environment
from studies import arms as planning
from studies import cost, results, runs, tables
from studies.arms import Arm, Benchmark, Run, Task, Way
from toy_task import chains

import train_blockwise
import train_fullseq

SMALL = {
    "seeds": 1,
    "steps": 4,
    "gen_length": 16,
    "block_size": 8,
    "tokens_per_step": 4,
    "jobs": 2,
}
CONSTANTS = ["MICRO_BSIZE=2", "LORA_RANK=2", "MAX_LEN=112"]
WAY = Way(8, False, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base with random weights, and a task of a few problems."""
    folder = tmp_path_factory.mktemp("chains") / "base"
    chains.build(folder, wide=False, base=None, train_rows=40, test_rows=6)
    return folder


def words(base, output, *studies):
    """The command line of a small study with two test sets."""
    data = base / "data"
    places = {"model": base / "model", "data": data / "train.jsonl", "output": output}
    tests = ["--test", str(data / "test.jsonl"), str(data / "train.jsonl")]
    sizes = ["--block_sizes", "4", "8", "--constants", *CONSTANTS]
    return [*studies, *suite.flags(places | SMALL), *tests, *sizes]


# ------- whole studies


def start(base, output):
    command = [sys.executable, study.__file__, *words(base, output, "paper", "--limit", "6")]
    return subprocess.Popen(
        command,
        env=user_environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_results(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_study_that_is_killed_is_resumed(base, tmp_path):
    """Killed, but not its trainers, after one of them has begun, and started again."""
    output = tmp_path / "study"
    killed = start(base, output)
    helpers.wait_until(lambda: list(output.glob("*/ckpt_logs/train_loss.csv")), killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    resumed = start(base, output)
    printed, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0 and "Traceback" not in printed, printed
    assert "4 runs, 2 at a time" in printed
    assert "GPU-hours" in printed and "MATH 34.2" in printed
    assert re.search(r"test, 4 per step +\| train, 4 per step", printed), printed
    rows = read_results(output / "results.csv")
    steps = [(row["method"], row["train_steps"], row["test"]) for row in rows]
    runs_and_steps = [("base", ""), ("blockwise", "4"), ("fullseq", "4"), ("fullseq", "1")]
    assert steps == [(*run, test) for run in runs_and_steps for test in ("test", "train")]
    for row in rows:
        assert row["accuracy"] == "0.0" and row["count"] == "6"  # the weights are random
    for run in output.glob("*-seed1-*"):
        names = sorted(path.name for path in run.iterdir() if path.name.startswith("ckpt"))
        assert names[0] == "ckpt_logs" and len(names) == 2  # each was trained once
        assert helpers.losses(run / "ckpt_logs")  # of each step once
    assert (output / "paper.png").read_bytes()[1:4] == b"PNG"


# ------- planning

LENGTHS = [48] * 8000
TESTS = [Benchmark("t", "t.jsonl", 8, "gen16-0123")]


def arms_of(*argv, **changes):
    """The flags of a study, and its arms on a task with these changes."""
    args = study.parse_args([*argv])
    constants = {"MODEL_NAME": "m", "DATA_PT": "p"} | args.constants
    task = Task("model", 8 * 10**9, "m-0123", TESTS, constants, LENGTHS, "identity")
    return args, planning.make_arms(args, replace(task, **changes))


def constants_of(arms, study_name, method):
    """The constants of the runs with seed 1 in one study and method."""
    own = [arm for arm in arms if (arm.study, arm.method) == (study_name, method)]
    return [arm.runs[0].constants for arm in own]


def ways_of(block_lengths, tokens_per_step):
    """Ways of decoding without end tokens last."""
    return [Way(block, False, tokens) for block, tokens in product(block_lengths, tokens_per_step)]


def test_each_study_changes_what_it_says():
    _, arms = arms_of()
    names = [arm.study for arm in arms if arm.method == "base"]
    assert names == list(study.STUDIES) and "opdlm" not in names
    for study_name, constant, values in (
        ("block-size", "BLOCK_SIZE", [8, 16, 32]),
        ("prefix", "PREFIX_MASK_RATE", [0.0, 0.1, 0.2, 0.5]),
        ("suffix", "SUFFIX_MASK_PROB", [1.0, 0.5, 0.0]),
        ("padding", "MASK_PADDING", [False, True]),
    ):
        constants = constants_of(arms, study_name, "blockwise")
        assert [given[constant] for given in constants] == values
        names = [arm.setting for arm in arms if arm.study == study_name]
        assert all(f"{constant}={value}" in names for value in values)
        for given in constants:  # and nothing else
            others = {k: v for k, v in given.items() if k != constant}
            assert others == {k: v for k, v in constants[0].items() if k != constant}
    assert constants_of(arms, "rest", "rest") == constants_of(arms, "controls", "rest")
    assert [given["MASK_PADDING"] for given in constants_of(arms, "padding", "fullseq")] == [0, 1]


def test_every_training_block_is_decoded_with_every_block():
    args, arms = arms_of("block-size")
    assert len(arms) == 5
    every = ways_of(args.block_sizes, args.tokens_per_step)
    assert all(arm.ways == every for arm in arms)
    default = ways_of([args.block_size], args.tokens_per_step)
    assert all(arm.ways == default for arm in arms_of("prefix")[1])


def test_controls_are_also_decoded_without_blocks():
    """With one block of 64 tokens, and with the end tokens last in it."""
    _, arms = arms_of("controls", "--tokens_per_step", "4")
    ways = [Way(16, False, 4), Way(64, False, 4), Way(64, True, 4)]
    assert all(arm.ways == ways for arm in arms)
    assert [arm.method for arm in arms[1:5]] == ["blockwise", "fullseq", "rest", "span"]
    sizes = [given["BLOCK_SIZE"] for given in constants_of(arms, "controls", "blockwise")]
    assert sizes == [16, 1, 112]


def test_lift_takes_equal_steps_and_equal_compute():
    """200 steps of 2 passes are 150 of 2 2/3 passes, and 133 of 3; the other trainers' settings."""
    _, arms = arms_of("lift")
    steps = {}
    for arm in arms[1:]:
        given = arm.runs[0].constants
        steps[arm.method, arm.setting] = given["TOTAL_TRAIN_STEPS"]
        if arm.method.startswith("lift"):
            assert given["TARGET_MODS"] == train_fullseq.TARGET_MODS
            assert (given["LR"], given["LORA_RANK"]) == (4e-3, 32)
    assert steps == {
        ("fullseq", ""): 200,
        ("blockwise", ""): 200,
        ("lift", ""): 200,
        ("lift", "steps=150"): 150,
        ("lift", "COMPONENTS=2"): 200,
        ("lift", "COMPONENTS=2 steps=133"): 133,
        ("lift", "APPROXIMATE=True"): 200,
        ("lift-block", ""): 200,
        ("lift-block", "steps=150"): 150,
    }
    _, arms = arms_of(*"lift --model m --data d --test t".split())
    given = arms[3].runs[0].constants
    assert (given["LR"], given["LORA_RANK"]) == (1e-5, 256)  # those of train_fullseq.py
    words = runs.training_flags(arms[3].runs[0])
    assert words[words.index("--TARGET_MODS") + 1] == ",".join(train_fullseq.TARGET_MODS)


def test_the_study_of_opdlm():
    """Five arms, two block sizes, two lengths; each is decoded with its own block."""
    _, arms = arms_of("opdlm", "--steps", "80")
    assert len(arms) == 5 * 2 * 2
    for arm in arms:
        given = arm.runs[0].constants
        size = given["BLOCK_SIZE"]
        assert arm.ways == ways_of([size], [1, 0]) and size in (4, 8)
        assert given["TOTAL_TRAIN_STEPS"] in (20, 80) and given["FULL_FT"]
    of_opdlm = {
        name for name, control in train_control.CONTROLS.items() if control.trainer is train_opdlm
    }
    assert {arm.method for arm in arms} == {"opdlm"} | of_opdlm


def test_a_wrong_test_set(tmp_path):
    """The message has the flag that the user gave."""
    args, _ = arms_of("equal-compute")
    path = tmp_path / "absent.jsonl"
    with pytest.raises(SystemExit, match=rf"--test {path} cannot be loaded .*; give --test gsm8k"):
        runs.load_test(args, str(path))


def test_the_study_narrow():
    """Each method with four LR over a factor of 64; LIFT too has the LoRA of the others."""
    args, arms = arms_of("narrow", "--seeds", "2")
    assert args.setup.tests == ("narrow", "full")
    assert len(arms) == 1 + 6 * 4
    found = {}
    for arm in arms[1:]:
        given = arm.runs[0].constants
        key = arm.method, given["TOTAL_TRAIN_STEPS"], given["MICRO_BSIZE"]
        found.setdefault(key, []).append(given["LR"])
        assert given["LORA_RANK"] == 32 and len(arm.runs) == 2
        if arm.method == "lift":
            assert given["TARGET_MODS"] == train_fullseq.TARGET_MODS
    assert list(found) == [
        *[("blockwise", 200, 16), ("fullseq", 200, 16), ("fullseq", 67, 16), ("fullseq", 200, 5)],
        *[("rest", 200, 16), ("lift", 200, 16)],
    ]
    assert all(lrs == [2.5e-4, 1e-3, 4e-3, 16e-3] for lrs in found.values())


def test_blocks_per_answer():
    """Blockwise is decoded with its own block, full-sequence with each."""
    args, arms = arms_of("answer-blocks", "--block_sizes", "8", "32")
    base, fullseq, *blockwise = arms
    both = ways_of([8, 32], args.tokens_per_step)
    assert base.ways == fullseq.ways == both
    for arm, size in zip(blockwise, (8, 32), strict=True):
        assert arm.runs[0].constants["BLOCK_SIZE"] == size
        assert arm.ways == ways_of([size], args.tokens_per_step)


def test_the_paper_in_one_word():
    """Its base, data and test sets; the rows per step are the paper's on any number of GPUs."""
    args, arms = arms_of("paper", "--num_gpus", "8")
    assert (args.model, args.data) == ("GSAI-ML/LLaDA-8B-Instruct", "meta-math/MetaMathQA")
    assert args.test == ["gsm8k", "math500"] and args.seeds == 3
    assert [(arm.method, arm.setting) for arm in arms] == [
        *[("base", ""), ("blockwise", ""), ("fullseq", ""), ("fullseq", "steps=100")]
    ]
    for arm in arms[1:]:
        given = arm.runs[0].constants
        assert (given["MICRO_BSIZE"], given["MAX_SAMPLES"]) == (32 // 8, 6400)
    assert study.parse_args(["--model", "m"]).studies == list(study.STUDIES)


def test_the_cost_of_the_paper():
    """By hand: one run of 200 steps of 32 rows of 256 tokens, 8e9 weights, 8 answers decoded."""
    words = "suffix --model m --seeds 1 --jobs 1".split()
    args, arms = arms_of(*words)
    found = planning.ways_of_runs([arms[0], arms[1]])
    hours = (65 + 200 * 0.49 + 2 * 8 * 256 / 189) / 3600
    task = Task("m", 8 * 10**9, "m-0123", TESTS, {}, LENGTHS, "identity")
    text = cost.describe(args, task, found)
    assert text.startswith(f"about {hours:.1f} GPU-hours, {163 / 3600:.1f} of them training")
    assert "1 checkpoints of 16.0 GB" in text
    args, arms = arms_of(*words, "--num_gpus", "2")  # for half as long
    assert cost.describe(args, task, planning.ways_of_runs([arms[0], arms[1]])) == text

    # half the weights, half of the tokens in half of the forward passes, 3 runs; all are kept
    args, arms = arms_of(*"suffix --model m --gen_length 128 --seeds 3 --jobs 2".split())
    found = planning.ways_of_runs([arms[0], arms[1]])
    hours = (3 * (65 + 200 * 0.49) + 4 * 8 * 256 / 189 / 4) / 2 / 3600
    text = cost.describe(args, replace(task, weights=4 * 10**9), found)
    assert text.startswith(f"about {hours:.1f} GPU-hours")
    assert "3 checkpoints of 8.0 GB at a time; fewer with --remove_checkpoints" in text
    args.remove_checkpoints = True
    text = cost.describe(args, replace(task, weights=4 * 10**9), found)
    assert "2 checkpoints of 8.0 GB at a time\n" in text

    # LIFT scores two thirds of its rows in a pass of their own
    args, arms = arms_of(*"lift --model m --seeds 1".split())
    steps = [cost.step_effort(args, arm.runs[0]) for arm in arms[1:]]
    assert steps[:3] == [200, 200, pytest.approx(200 * 4 / 3)]
    assert steps[3] == pytest.approx(200)
    assert arms[7].setting == "APPROXIMATE=True" and steps[6] == 200


def test_jobs_share_out_the_gpus(args, monkeypatch):
    """Each process of a study has GPUs of its own, also of those that are visible alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(runs.os, "getppid", lambda: 0)
    given = []

    class Pool:
        def __init__(self, jobs, context, initializer, initargs):
            for _ in range(jobs):
                initializer(0, torch.get_num_threads(), initargs[2])
                given.append(suite.launcher(2, runs.visible_gpus())[:3])
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")

        def shutdown(self):
            pass

    for name in ("ProcessPoolExecutor", "signal", "ctypes"):
        monkeypatch.setattr(runs, name, Pool if name[0] == "P" else mock.MagicMock())
    args.num_gpus = 2
    runs.do_all(args, TASK, {})
    assert given == [["deepspeed", "--include", f"localhost:{two}"] for two in ("4,5", "6,7")]


def test_shared_runs_are_trained_once():
    _, arms = arms_of("--seeds", "3")
    found = planning.ways_of_runs(arms)
    methods = [run.method for run in found]
    # the default, 4 other block sizes, 3 prefixes, 2 suffixes, padding
    assert methods.count("blockwise") == 3 * 11
    # the default, equal tokens, padding
    assert methods.count("fullseq") == 3 * 3
    assert methods.count("base") == 1
    assert len({run.folder for run in found}) == len(found)
    (base,) = [run for run in found if run.method == "base"]
    blocks = [(8, False), (16, False), (32, False), (64, False), (64, True)]
    assert found[base] == {Way(*block, tokens) for block in blocks for tokens in (2, 4, 8)}


def test_a_folder_is_that_of_its_model_data_and_constants():
    def folders(*argv, **task):
        return {run.folder for run in planning.ways_of_runs(arms_of("prefix", *argv, **task)[1])}

    assert folders() == folders()
    assert not folders() & folders(identity="another base")
    bases = {folder for folder in folders() if folder.name.startswith("base")}
    assert folders() & folders("--num_gpus", "2") == bases
    assert folders() & folders("--constants", "LORA_DROPOUT=0.5") == bases
    assert folders() == folders("--constants", "LR=0.004")  # the same as 4e-3, the default
    moved = {"MODEL_NAME": "elsewhere/m", "DATA_PT": "elsewhere/p"}
    args, _ = arms_of("prefix")
    assert folders() == folders(constants=args.constants | moved)


def test_a_folder_is_that_of_its_defaults(monkeypatch):
    """A run with an edited constant of its trainer is another one, also that of a control."""

    def folders():
        return {arm.method: arm.runs[0].folder for arm in arms_of("controls", "lift")[1]}

    before = folders()
    monkeypatch.setitem(train_blockwise.CONSTANTS, "GRAD_CLIP", 0.5)
    after = folders()
    changed = {method for method in before if before[method] != after[method]}
    assert changed == {"blockwise", "rest", "span"}


def test_equal_tokens():
    """In the mean blockwise supervises half a block per draw, full-sequence half an answer."""
    assert planning.equal_token_steps(300, [64, 32], 32) == 300 * (32 + 32) // (64 + 32)
    assert planning.equal_token_steps(300, [20], 32) == 300
    _, arms = arms_of("equal-tokens", "--steps", "300")
    (blockwise,) = constants_of(arms, "equal-tokens", "blockwise")
    (fullseq,) = constants_of(arms, "equal-tokens", "fullseq")
    assert (blockwise["TOTAL_TRAIN_STEPS"], fullseq["TOTAL_TRAIN_STEPS"]) == (300, 100)


def test_equal_compute_ends_where_the_blocks_do():
    """8,000 answers of 48 tokens are 24,000 blocks of 16, and 16,000 of 32."""
    _, arms = arms_of("--steps", "50000", "--constants", "MICRO_BSIZE=16")
    for study_name, steps in (("equal-compute", 24000 // 16), ("block-size", 16000 // 16)):
        for method in ("blockwise", "fullseq"):
            given = constants_of(arms, study_name, method)
            assert given and all(one["TOTAL_TRAIN_STEPS"] == steps for one in given)
    (fullseq,) = constants_of(arms, "equal-tokens", "fullseq")
    assert fullseq["TOTAL_TRAIN_STEPS"] == 24000 // 16 // 3


def test_the_trainers_take_the_steps_that_are_planned():
    """The blocks last for exactly as many steps as `common_steps` says."""
    lengths = [20, 33, 48, 5] * 3
    args = study.parse_args(["--steps", "1000", "--constants", "MICRO_BSIZE=4"])
    examples = [(2, [7] * (2 + length)) for length in lengths]
    changes = {"MICRO_BSIZE": 4, "BLOCK_SIZE": 16, "TOTAL_TRAIN_STEPS": 1000}
    given = helpers.constants(train_blockwise, **changes)
    draws, _ = train_blockwise.plan(given, train_blockwise.METHOD, examples, world_size=1)
    assert planning.common_steps(args, lengths, [16]) == len(draws)


@pytest.mark.slow
def test_what_decides_an_evaluation_is_in_its_name(base, tmp_path):
    run = Run(1, "blockwise", Path("run"), {})

    def name(*more, way=WAY):
        args = study.parse_args([*words(base, tmp_path, "prefix"), *more])
        (test, _) = runs.prepare(args).tests
        return planning.evaluation_folder(run, test, way).name

    ways = [(), ("--limit", "3"), ("--batch_size", "7"), ("--gen_length", "32")]
    names = {name(*way) for way in ways}
    names |= {name(way=way) for way in (Way(4, False, 4), Way(8, True, 4), Way(8, False, 0))}
    assert len(names) == len(ways) + 3
    assert name() in names
    assert len(list(tmp_path.glob("*.pt"))) == 1  # made once


# ------- mistakes


@pytest.mark.parametrize(
    "given, message",
    [
        ("prefixes", "prefixes: no study"),
        ("--seeds 0", "--seeds 0"),
        ("--data d", "--data, --test: the toy has its own; give --model too"),
        ("narrow --data d", "--data, --test: the toy has its own; leave them out"),
        ("paper --test a/x.jsonl b/x.jsonl", "two have the same name"),
        ("--num_gpus 3", "16 rows per step cannot be shared out equally"),
        ("--gen_length 60 --block_size 16", "--gen_length 60 is not divisible by the block of"),
        ("--block_sizes 8 0", "--block_sizes 0"),
        ("--tokens_per_step -1", "--tokens_per_step -1"),
        ("--constants SEED=3", "the studies set SEED themselves"),
        ("opdlm prefix", "opdlm prefix: they have different bases"),
        ("opdlm --model m", "opdlm takes a base of the toy task"),
        ("--constants LR", "--constants LR: must be NAME=VALUE"),
        ("--constants BLOCKSIZE=3", "BLOCKSIZE: no constant of train_blockwise.py"),
        ("--constants PREFIX_MASK_RATE=0.5", "PREFIX_MASK_RATE: no constant of train_fullseq.py"),
        ("opdlm --constants MASK_PADDING=True", "MASK_PADDING: no constant of train_opdlm.py"),
        ("--constants LR=fast", "LR = 'fast': must be int or float"),
        ("--constants MICRO_BSIZE=0", "MICRO_BSIZE = 0: must be int, 1 to"),
    ],
)
def test_mistakes(given, message, capsys):
    """Each ends the study before it does anything."""
    with pytest.raises(SystemExit) as ended:
        study.parse_args(given.split())
    assert message in capsys.readouterr().err and ended.value.code == 2


def test_constants_without_an_effect():
    """Those that a study sets in all settings; not those that it sets in some."""
    for given in ("padding --constants MASK_PADDING=True", "narrow --constants LR=0.5"):
        name = given.split()[-1].partition("=")[0]
        with pytest.raises(SystemExit, match=f"--constants {name}: the study .* sets it itself"):
            arms_of(*given.split())
    given = argparse.Namespace(given=["LR"], constants={"LR": 0.5, "LORA_RANK": 8})
    planning.refuse_constants(given, "s", [("blockwise", {"LR": 0.1}), ("blockwise", {})])
    planning.refuse_constants(given, "s", [("blockwise", {"LORA_RANK": 4})])  # the setup's own


def test_constants_have_the_types_of_their_trainer():
    words = "LR=1e-3 TARGET_MODS=q_proj,v_proj MASK_PADDING=True LORA_ALPHA=None".split()
    before = dict(train_blockwise.CONSTANTS)
    given = study.parse_args(["prefix", "--constants", *words]).constants
    assert (given["LR"], given["TARGET_MODS"]) == (1e-3, ["q_proj", "v_proj"])
    assert given["MASK_PADDING"] is True and given["LORA_ALPHA"] is None
    assert given["LORA_RANK"] == study.TOY_CONSTANTS["LORA_RANK"]
    assert before == train_blockwise.CONSTANTS  # which a check does not change


# ------- runs, without trainers


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        num_gpus=1,
        jobs=2,
        tokens_per_step=[4],
        gen_length=16,
        batch_size=6,
        limit=None,
        remove_checkpoints=False,
        output=tmp_path,
    )


@pytest.fixture
def run(tmp_path):
    """A training run that has not begun, in an empty folder."""
    folder = tmp_path / "blockwise-seed1-0123"
    folder.mkdir()
    return Run(1, "blockwise", folder, {"LR": 1e-3, "SEED": 1})


def end_training(folder):
    """Leave what a trainer leaves at its end."""
    logs = folder / "ckpt_logs"
    logs.mkdir(exist_ok=True)
    shutil.rmtree(logs / "state", ignore_errors=True)
    (folder / "ckpt_step0004").mkdir()
    losses = "".join(f"{step},{step}\n" for step in range(1, 21))
    (logs / "train_loss.csv").write_text("step,loss\n" + losses)
    budget = {"supervised_tokens": 1234, "steps": 20}
    (logs / "run_config.json").write_text(json.dumps({"budget": budget}))


def fake_trainer(monkeypatch, status, end=None):
    """Let a function stand for all commands; returns the list of (command, folder) that it gets."""
    commands = []

    def run_command(command, folder=".", output=None, **environment):
        commands.append((command, folder))
        if end is not None:
            end(folder)
        return status

    monkeypatch.setattr(suite, "run", run_command)
    return commands


def test_a_run_is_trained_to_its_end_once(args, run, monkeypatch):
    commands = fake_trainer(monkeypatch, 0, end_training)
    checkpoint = runs.train(args, run)
    assert checkpoint == run.folder / "ckpt_step0004"
    assert runs.train(args, run) == checkpoint
    ((command, folder),) = commands
    assert folder == run.folder and command[1] == train_blockwise.__file__
    assert command[2:] == ["--LR", "0.001", "--SEED", "1", "--CKPT_DIR", "ckpt"]
    assert json.loads((folder / "seconds.json").read_text()) >= 0


def test_the_flags_of_a_way_of_decoding(args):
    """Steps for all of 16 tokens, whose blocks may have a last step with fewer tokens."""

    def flags(*way):
        words = runs.decoding_flags(args, Way(*way))
        return words[words.index("--steps") + 1], set(words) & {"--threshold", last}

    last = "--confidence_eos_eot_inf"
    assert flags(8, False, 4) == ("4", set())
    assert flags(16, True, 4) == ("4", {last})
    assert flags(16, False, 3) == ("6", set())
    assert flags(8, False, 0) == ("16", {"--threshold"})


def test_a_trainer_that_fails_is_no_checkpoint(args, run, monkeypatch):
    fake_trainer(monkeypatch, 1)
    with pytest.raises(SystemExit, match=r"train_blockwise\.py failed"):
        runs.train(args, run)
    # nor one that is killed between its checkpoint and its end
    (run.folder / "ckpt_step0004").mkdir()
    (run.folder / "ckpt_logs" / "state").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"train_blockwise\.py failed"):
        runs.train(args, run)
    assert not (run.folder / "seconds.json").exists()


def test_the_trainer_of_a_killed_study_is_waited_for(args, run, monkeypatch):
    """While another process holds the lock of the run, no second trainer is started."""
    commands = fake_trainer(monkeypatch, 1)
    state = run.folder / "ckpt_logs" / "state"
    state.mkdir(parents=True)
    lock = open(state / "lock", "w")  # noqa: SIM115 (closed by the other thread)
    fcntl.flock(lock, fcntl.LOCK_EX)

    def go_on():
        time.sleep(0.3)
        end_training(run.folder)
        lock.close()

    other = threading.Thread(target=go_on)
    other.start()
    assert runs.train(args, run) == run.folder / "ckpt_step0004"
    other.join()
    assert not commands


def measured(folder):
    """Stand for an evaluation: leave its summary."""

    def leave_summary(args, output, words):
        output.mkdir()
        summary = {"accuracy": 0.5, "exact_match": 0.25, "count": 8, "seconds": 1.23}
        summary |= {"tokens": 64, "forwards": 16}
        (output / "summary.json").write_text(json.dumps(summary))
        (folder / "measured").write_text(words[words.index("--model") + 1])

    return leave_summary


TASK = Task("base model", 10**6, "m-0123", TESTS, {}, LENGTHS, "identity")


def test_a_run_is_completed_once(args, run, monkeypatch, tmp_path):
    commands = fake_trainer(monkeypatch, 0, end_training)
    monkeypatch.setattr(runs, "measure", measured(tmp_path))
    args.remove_checkpoints = True
    for _ in range(2):
        runs.complete(args, TASK, run, {WAY})
    assert len(commands) == 1
    assert (tmp_path / "measured").read_text() == str(run.folder / "ckpt_step0004")
    assert not (run.folder / "ckpt_step0004").exists()


def test_checkpoints_are_also_removed_later(args, run, monkeypatch, tmp_path):
    """By a command that has nothing else to do; a removal that is stopped is no checkpoint."""
    fake_trainer(monkeypatch, 0, end_training)
    monkeypatch.setattr(runs, "measure", measured(tmp_path))
    runs.complete(args, TASK, run, {WAY})
    assert (run.folder / "ckpt_step0004").exists()
    args.remove_checkpoints = True

    def stop(path, **_):
        if Path(path).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(runs.shutil, "rmtree", stop)
        runs.complete(args, TASK, run, {WAY})
    assert runs.find_checkpoint(run.folder) is None
    runs.complete(args, TASK, run, {WAY})
    assert sorted(path.name for path in run.folder.iterdir() if path.is_dir()) == [
        "ckpt_logs",
        planning.evaluation_folder(run, TESTS[0], WAY).name,
    ]


def test_a_base_that_is_cut_off_is_made_again(tmp_path):
    """Nothing of it is taken for whole."""

    def build(folder, rows=8):
        (folder / "data").mkdir(parents=True)
        (folder / "model").mkdir()
        (folder / "data" / "train.jsonl").write_text("{}\n" * rows)

    def cut_off(folder):
        build(folder, 2)
        raise KeyboardInterrupt

    args = study.parse_args(["narrow", "--output", str(tmp_path)])
    args.setup = replace(args.setup, build_base=cut_off)
    with pytest.raises(KeyboardInterrupt):
        runs.prepare(args)
    assert not (tmp_path / "narrow-base").exists()
    args.setup = replace(args.setup, build_base=build)
    with pytest.raises(SystemExit, match=r"narrow\.jsonl cannot be loaded"):  # this one has none
        runs.prepare(args)
    assert (tmp_path / "narrow-base" / "data" / "train.jsonl").read_text() == "{}\n" * 8


def test_a_failure_names_the_log(args, run, monkeypatch):
    fake_trainer(monkeypatch, 1)
    log = run.folder / "log"
    message = re.escape(f"train_blockwise.py failed; see {log}")
    with pytest.raises(RuntimeError, match=message):
        runs.complete(args, TASK, run, {WAY})


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("base", RuntimeError("out of order")),
        ("blockwise", RuntimeError("out of order")),
        ("blockwise", BrokenProcessPool("out of memory")),
    ],
)
def test_failures_of_runs(args, failing, error, monkeypatch):
    """One that fails is reported, and ends the study if it is the base, or if it was killed.

    No more wait in the pool than can begin: a pool of processes does not give them back.
    """
    done = []
    submitted = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *given):
            submitted.append(super().submit(*given))
            assert sum(not future.done() for future in submitted) <= args.jobs
            return submitted[-1]

    def complete(args, task, run, ways):
        if run.method == failing and run.folder not in ("b2", "b3"):
            raise error
        time.sleep(0.3)
        done.append(run.folder)

    monkeypatch.setattr(runs, "complete", complete)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda jobs, *_, **__: Pool(jobs))
    four = [("b1", "blockwise"), ("b0", "base"), ("b2", "blockwise"), ("b3", "blockwise")]
    ways_of_runs = {Run(1, method, name, {}): {WAY} for name, method in four}
    failed = runs.do_all(args, TASK, ways_of_runs)
    if failing == "base":
        assert (failed, done) == (["b0: out of order"], ["b1"])
    elif isinstance(error, BrokenProcessPool):
        assert (failed, done) == (["b1: out of memory"], ["b0"])
    else:
        assert (failed, sorted(done)) == (["b1: out of order"], ["b0", "b2", "b3"])


# ------- what came out


def test_a_line_of_the_results(args, run, monkeypatch, tmp_path):
    fake_trainer(monkeypatch, 0, end_training)
    monkeypatch.setattr(runs, "measure", measured(tmp_path))
    runs.complete(args, TASK, run, {WAY})
    missing = Run(2, "blockwise", tmp_path / "blockwise-seed2-0123", {})
    arm = Arm("prefix", "blockwise", "PREFIX_MASK_RATE=0.1", [WAY], [run, missing])
    rows = results.collect(args, TASK, [arm])
    (row,) = rows
    assert row.pop("seconds") >= 0
    assert row == {
        "study": "prefix",
        "method": "blockwise",
        "setting": "PREFIX_MASK_RATE=0.1",
        "seed": 1,
        "test": "t",
        "block_length": 8,
        "end_tokens_last": 0,
        "tokens_per_step": 4,
        "tokens_per_forward": 4.0,
        "gen_length": 16,
        "accuracy": 0.5,
        "exact_match": 0.25,
        "count": 8,
        "loss": 19.5,
        "supervised_tokens": 1234,
        "train_steps": 20,
        "decoding_seconds": 1.2,
        "model": "m-0123",
        "run": "blockwise-seed1-0123",
    }


def test_results_keep_what_other_studies_have_found(tmp_path):
    """And what the same study has found on other tests, with the same base and the same runs."""
    kept = [
        {"study": "suffix", "test": "t", "model": "m-0123", "run": "r-1"},
        {"study": "suffix", "test": "t", "model": "another", "run": "r-2"},
        {"study": "prefix", "test": "u", "model": "m-0123", "run": "r-3"},
        {"study": "prefix", "test": "u", "model": "m-0123", "run": "r-4", "seed": "2"},
    ]
    replaced = [
        {"study": "prefix", "test": "t", "model": "m-0123", "run": "r-3"},
        {"study": "prefix", "test": "u", "model": "m-0123", "run": "r-5"},  # of other constants
        {"study": "prefix", "test": "u", "model": "another", "run": "r-6", "seed": "3"},
        {"study": "prefix", "test": "u", "model": "m-0123", "seed": "4"},  # of an older version
    ]
    blank = dict.fromkeys(results.COLUMNS, "")
    new = blank | {"study": "prefix", "test": "t", "model": "m-0123", "run": "r-3"}
    path = tmp_path / "results.csv"
    suite.write_csv(path, results.COLUMNS, [blank | row for row in replaced + kept])
    for _ in range(2):
        results.write_results(path, [new], ["prefix"], TASK)
        assert read_results(path) == [*(blank | row for row in kept), new]

    path.write_text("study,model,accuracy\nprefix,m-0123,0.1\n")  # without tests and runs
    results.write_results(path, [new], ["prefix"], TASK)
    assert read_results(path) == [new]


def test_what_is_in_the_file_is_reported(tmp_path, capsys):
    """Also of a test set that another command has evaluated; not of other studies."""
    path = tmp_path / "results.csv"
    lines = [line_of(test="t"), line_of(test="u"), line_of(study="another")]
    suite.write_csv(path, list(lines[0]), lines)
    study.report(path, argparse.Namespace(studies=["s"], output=tmp_path))
    printed = capsys.readouterr().out
    assert "t, 2 per step | u, 2 per step" in printed and "another" not in printed
    assert [found.name for found in tmp_path.glob("*.png")] == ["s.png"]


def test_differences_are_paired_by_seed(capsys):
    rows = []
    found = {"a": [0.50, 0.60, 0.70], "b": [0.51, 0.62, 0.70]}
    for setting, accuracies in found.items():
        for seed, accuracy in enumerate(accuracies):
            rows.append(line_of(setting=setting, seed=str(seed), accuracy=accuracy))
    base = line_of(method="base", seed="base", supervised_tokens=0)
    tables.print_table([base, *rows])
    tables.print_differences([base, *rows])
    printed = capsys.readouterr().out
    assert re.search(r"s +\| blockwise \| a +\| block 8 +\| 60\.0 \+- 24\.8 \| 1,234\n", printed)
    assert re.search(r"s +\| base +\| +\| block 8 +\| 50\.0 +\|\n", printed)
    # differences 1, 2 and 0 points: deviation 1, and Student's quantile for 2 degrees of freedom
    mean_and_half = f"+1.0 +- {4.303 / 3**0.5:.1f}"
    difference = "s: blockwise b minus blockwise a, decoding block 8, 2 per step"
    assert f"{difference}: {mean_and_half}\n" in printed


def test_settings_are_compared_with_what_is_most_alike(capsys):
    """In the first method, with the first; in another, with the first method's of the same LR."""
    named = {
        "blockwise LR=0.1": 0.5,
        "blockwise LR=0.2": 0.6,
        "fullseq LR=0.2 steps=5": 0.9,
        "fullseq LR=0.1": 0.8,
        "rest": 0.4,
    }
    rows = []
    for name, accuracy in named.items():
        method, _, setting = name.partition(" ")
        rows.append(line_of(method=method, setting=setting, accuracy=accuracy))
    tables.print_differences(rows)
    assert re.findall("s: (.*), decoding block 8, 2 per step: (.*)", capsys.readouterr().out) == [
        ("blockwise LR=0.2 minus blockwise LR=0.1", "+10.0"),
        ("fullseq LR=0.2 steps=5 minus blockwise LR=0.2", "+30.0"),
        ("fullseq LR=0.1 minus blockwise LR=0.1", "+30.0"),
        ("rest minus blockwise LR=0.1", "-10.0"),
    ]


def test_tables_tell_tests_and_ways_of_decoding_apart(capsys):
    rows = [
        line_of(accuracy=0.1),
        line_of(accuracy=0.2, test="another"),
        line_of(accuracy=0.4, end_tokens_last=1),
        line_of(accuracy=0.5, method="rest"),
        line_of(accuracy=0.8, method="rest", test="another"),
    ]
    tables.print_table(rows)
    tables.print_differences(rows)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines if " | " in line]
    assert [line[3:] for line in cells] == [
        ["decoding", "test, 2 per step", "another, 2 per step", "supervised tokens"],
        ["block 8", "10.0", "20.0", "1,234"],
        ["block 8, end tokens last", "40.0", "", "1,234"],
        ["block 8", "50.0", "80.0", "1,234"],
    ]
    assert lines[-2:] == [
        "s: rest minus blockwise, decoding test, block 8, 2 per step: +40.0",
        "s: rest minus blockwise, decoding another, block 8, 2 per step: +60.0",
    ]


def test_tables_of_a_file(tmp_path, capsys):
    """All lines of the studies that are named, against the reference that is named."""
    accuracies = {
        "s,blockwise": (0.5, 0.6),
        "s,lift": (0.7, 0.9),
        "s,rest": (0.8, 0.9),
        "u,span": (0.1, 0.1),
        "u,rest": (0.2, 0.3),
    }
    path = tmp_path / "results.csv"
    with open(path, "w") as file:
        file.write("study,method,setting,seed,test,block_length,tokens_per_step,gen_length,")
        file.write("accuracy,supervised_tokens\n")
        for name, seeds in accuracies.items():
            for seed, accuracy in enumerate(seeds):
                file.write(f"{name},,{seed},t,8,2.0,64,{accuracy},1234\n")
    words = [str(path), "s", "--reference", "lift"]
    tables.main(tables.parse_args(words))
    printed = capsys.readouterr().out
    assert "span" not in printed and "| 1,234" in printed
    assert "s: blockwise minus lift, decoding block 8, 2 per step: -25.0 +- 63.5\n" in printed
    assert "s: rest minus lift, decoding block 8, 2 per step: +5.0 +- 63.5\n" in printed
    assert "s: lift" not in printed
    tables.main(tables.parse_args([str(path), "--reference", "lift"]))
    assert "u: " not in capsys.readouterr().out  # it has no lift

    with pytest.raises(SystemExit, match=r"--reference span: give one of blockwise, lift, rest"):
        tables.main(tables.parse_args([str(path), "s", "--reference", "span"]))
    with pytest.raises(SystemExit, match=r"v: not a study of .*csv; give some of s, u"):
        tables.main(tables.parse_args([str(path), "v"]))
    whole = path.read_text()
    for bad in ("nan", "2.5", "inf", ""):
        path.write_text(whole.replace(",8,2.0,", f",8,{bad},", 1))
        with pytest.raises(SystemExit, match=f"line 2 has tokens_per_step '{bad}', not valid"):
            tables.main(tables.parse_args([str(path)]))
    path.write_text(whole.replace(",test,", ",other,", 1))
    with pytest.raises(SystemExit, match=r"results\.csv has no column test; give a CSV"):
        tables.main(tables.parse_args([str(path)]))


# ------- plot.py


def test_mean_and_interval():
    """Against the definition, with Student's quantile for four degrees of freedom."""
    mean, half = plot.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert plot.mean_interval([2.0, 2.0]) == (2, 0)
    # beyond the table: 2.093 for 19 degrees of freedom
    values = [0.0, 1.0] * 10
    _, half = plot.mean_interval(values)
    assert half == pytest.approx(2.093 * (5 / 19) ** 0.5 / 20**0.5, rel=1e-3)


def test_loss_curves(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}_logs" / "train_loss.csv" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        lines = "".join(f"{step},{3 / step}\n" for step in range(1, 30))
        path.write_text("step,loss\n" + lines)
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    plot.draw_losses([str(path) for path in paths], "out.png", 4)
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert "step" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    assert len(axes.lines) == 4
    raw, smooth = axes.lines[:2]
    assert smooth.get_ydata()[9] == pytest.approx(sum(raw.get_ydata()[6:10]) / 4)


def line_of(**values):
    """A line of a results.csv, as plot.read_results gives it."""
    line = {"study": "s", "method": "blockwise", "setting": "", "seed": "1", "test": "test"}
    line |= {"block_length": 8, "end_tokens_last": 0, "tokens_per_step": 2, "gen_length": 16}
    return line | {"accuracy": 0.5, "supervised_tokens": 1234} | values


def test_a_panel_for_each_way_of_decoding():
    """Four ways of decoding two settings and the base: the points stand in the right panels."""
    rows = []
    for place, method in enumerate(("base", "blockwise", "fullseq")):
        for block_length in (8, 16):
            for tokens in (2, 4):
                accuracy = (block_length + tokens + place) / 100
                rows.append(
                    line_of(method=method, accuracy=accuracy)
                    | {"block_length": block_length, "tokens_per_step": tokens}
                )
    figure = plot.draw_study("a study", rows)
    assert len(figure.axes) == 4
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1] == "decoding block 8, 4 per step"
    axes = figure.axes[1]
    assert [text.get_text() for text in axes.get_yticklabels()] == []  # the panels share them
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["base", "blockwise", "fullseq"]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "."]
    assert points == pytest.approx([13, 14])
    dashed = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([12])
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    others = [line_of(test="another"), line_of(end_tokens_last=1)]
    figure = plot.draw_study("a study", [*rows, *others])
    titles = [axes.get_title().partition(",")[0] for axes in figure.axes]
    assert sorted(set(titles)) == ["decoding another", "decoding test"]
    assert len(figure.axes) == 2 * 4  # two blocks, another test, the end tokens last


def test_learning_against_forgetting():
    """A curve per method through its LR, measured from the base; what is not whole is left out."""
    rows = []
    for method, setting, test, accuracies in (
        ("base", "", "narrow", [0.5]),
        ("base", "", "full", [0.8]),
        ("fullseq", "LR=0.1", "narrow", [0.6, 0.7]),
        ("fullseq", "LR=0.1", "full", [0.7, 0.7]),
        ("fullseq", "LR=0.2", "narrow", [0.9]),
        ("fullseq", "LR=0.2", "full", [0.4]),
        ("fullseq", "LR=0.1 steps=5", "narrow", [0.55]),
        ("fullseq", "LR=0.1 steps=5", "full", [0.75]),
        ("rest", "LR=0.1", "narrow", [0.5]),  # without the other test
        ("lift", "", "narrow", [0.45]),  # its own LR
        ("lift", "", "full", [0.8]),
    ):
        for accuracy in accuracies:
            rows.append(line_of(method=method, setting=setting, test=test, accuracy=accuracy))
    slower = [row | {"tokens_per_step": 1, "accuracy": 0.1} for row in rows]
    _, axes = plot.draw_tradeoff("narrow", [*rows, *slower]).axes
    curves = {text.get_label(): text.lines[0].get_xydata() for text in axes.containers}
    assert list(curves) == ["fullseq", "fullseq steps=5", "rest", "lift"]
    dashes = [text.lines[0].get_linestyle() for text in axes.containers]
    assert dashes == ["-", "--", "-", "-"]  # a setting has its own, beside its marker
    assert curves["fullseq"] == pytest.approx(np.array([[15, -10], [40, -40]]))
    assert curves["fullseq steps=5"] == pytest.approx(np.array([[5, -5]]))
    assert len(curves["rest"]) == 0
    assert curves["lift"] == pytest.approx(np.array([[-5, 0]]))
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        ("0.1", pytest.approx((15, -10))),
        ("0.2", pytest.approx((40, -40))),
        ("0.1", pytest.approx((5, -5))),
        ("", pytest.approx((-5, 0))),
    ]
    of_one_test = [row for row in rows if row["test"] == "full"]
    assert len(plot.draw_tradeoff("narrow", of_one_test).axes) == 1


def test_differences_by_block():
    """Paired by seed; a seed that one method lacks is left out."""
    rows = []
    for method, block, accuracies in (
        ("base", 8, {"base": 0.1}),
        ("blockwise", 8, {"1": 0.5, "2": 0.7, "3": 0.9}),
        ("fullseq", 8, {"1": 0.4, "2": 0.4}),
        ("blockwise", 32, {"1": 0.5}),
        ("fullseq", 32, {"1": 0.6}),
    ):
        for seed, accuracy in accuracies.items():
            rows.append(
                line_of(method=method, seed=seed, block_length=block, accuracy=accuracy)
                | {"gen_length": 64}
            )
    (axes,) = plot.draw_by_block("answer-blocks", rows).axes
    (curve,) = axes.containers
    assert curve.lines[0].get_xydata() == pytest.approx(np.array([[0, -10], [1, 20]]))
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["2\n(32 tokens)", "8\n(8 tokens)"]

    worse = [row | {"test": "zebra", "accuracy": 0.5 * row["accuracy"]} for row in rows]
    (axes,) = plot.draw_by_block("answer-blocks", [*rows, *worse]).axes
    heights = [curve.lines[0].get_ydata() for curve in axes.containers]
    assert heights == [pytest.approx([-10, 20]), pytest.approx([-5, 10])]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["test, 2 per step", "zebra, 2 per step"]


def test_a_colour_tells_the_method_and_a_marker_the_setting():
    named = [("base", ""), ("blockwise", "a"), ("blockwise", "b"), ("fullseq", "")]
    styles = plot.make_styles([{"method": method, "setting": name} for method, name in named])
    (colour_a, marker_a), (colour_b, marker_b) = styles["blockwise a"], styles["blockwise b"]
    assert colour_a == colour_b and marker_a != marker_b
    assert styles["fullseq"][0] != colour_a
    methods = [*planning.TRAINERS, *train_control.CONTROLS]
    assert len({plot.COLOURS[method] for method in methods}) == len(methods)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("step,loss\n", "has no lines"),
        ("a,b\n1,2\n", "no column step"),
        ("step,loss\n1,x\n", "line 2"),
    ],
)
def test_bad_curves(tmp_path, content, message):
    path = tmp_path / "train_loss.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        plot.draw_losses([str(path)], str(tmp_path / "out.png"), 4)
    assert not os.path.exists(tmp_path / "out.png")
