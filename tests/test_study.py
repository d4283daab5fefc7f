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
from itertools import product
from pathlib import Path

import chains
import plot
import pytest
import study
import suite
from conftest import user_environment

SMALL = {
    "seeds": 1,
    "steps": 4,
    "gen_length": 16,
    "block_size": 8,
    "tokens_per_step": 4,
    "jobs": 2,
}
CONSTANTS = ["MICRO_BSIZE=2", "LORA_RANK=2", "MAX_LEN=112"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base with random weights, and a task of a few problems."""
    folder = tmp_path_factory.mktemp("chains") / "base"
    chains.build(folder, wide=False, base=None, train_rows=40, test_rows=6)
    return folder


def words(base, output, *studies):
    """The command line of a small study."""
    places = {
        "model": base / "model",
        "data": base / "data" / "train.jsonl",
        "test": base / "data" / "test.jsonl",
        "output": output,
    }
    sizes = ["--block_sizes", "4", "8", "--constants", *CONSTANTS]
    return [*studies, *suite.flags(places | SMALL), *sizes]


# ------------------------------------------------------------------------------------ whole studies


def start(base, output):
    command = [sys.executable, study.__file__, *words(base, output, "equal-tokens")]
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


def test_a_study_that_is_killed_is_resumed(base, tmp_path):
    """Killed, but not its trainers, after one of them has begun, and started again."""
    output = tmp_path / "study"
    killed = start(base, output)
    deadline = time.time() + 200
    while not list(output.glob("*/ckpt_logs/train_loss.csv")):
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    resumed = start(base, output)
    printed, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0 and "Traceback" not in printed, printed
    assert "3 runs, 2 at a time" in printed
    assert re.search(r"equal-tokens +\| fullseq +\|", printed), printed
    rows = read_results(output / "results.csv")
    steps = [(row["method"], row["train_steps"]) for row in rows]
    assert steps == [("base", ""), ("blockwise", "4"), ("fullseq", "1")]
    for row in rows:
        assert row["accuracy"] == "0.0" and row["count"] == "6"  # the weights are random
    for run in output.glob("*-seed1-*"):
        names = sorted(path.name for path in run.iterdir() if path.name.startswith("ckpt"))
        assert names[0] == "ckpt_logs" and len(names) == 2  # each was trained once
        losses = read_results(run / "ckpt_logs" / "train_loss.csv")
        assert [int(row["step"]) for row in losses] == list(range(1, 1 + len(losses)))
    assert (output / "equal-tokens.png").read_bytes()[1:4] == b"PNG"


# ----------------------------------------------------------------------------------------- planning

LENGTHS = [48] * 8000
TASK = {
    "constants": {"MODEL_NAME": "m", "DATA_PT": "p", **study.TOY_CONSTANTS},
    "identity": "identity",
    "lengths": LENGTHS,
}


def arms_of(*argv, **task):
    args = study.parse_args([*argv])
    if args.studies == ["opdlm"]:
        task = {"constants": {"MODEL_NAME": "m", "DATA_PT": "p", **study.OPDLM_CONSTANTS}} | task
    return args, study.make_arms(args, TASK | task)


def constants_of(arms, study_name, method):
    """The constants of the runs with seed 1 in one study and method."""
    own = [arm for arm in arms if (arm["study"], arm["method"]) == (study_name, method)]
    return [arm["runs"][0]["constants"] for arm in own]


def test_each_study_changes_what_it_says():
    _, arms = arms_of()
    names = [arm["study"] for arm in arms if arm["method"] == "base"]
    assert [*names, "opdlm"] == list(study.STUDIES)
    for study_name, constant, values in (
        ("block-size", "BLOCK_SIZE", [8, 16, 32]),
        ("prefix", "PREFIX_MASK_RATE", [0.0, 0.1, 0.2, 0.5]),
        ("suffix", "SUFFIX_MASK_PROB", [1.0, 0.5, 0.0]),
        ("padding", "MASK_PADDING", [False, True]),
    ):
        constants = constants_of(arms, study_name, "blockwise")
        assert [given[constant] for given in constants] == values
        names = [arm["setting"] for arm in arms if arm["study"] == study_name]
        assert all(f"{constant}={value}" in names for value in values)
        for given in constants:  # and nothing else
            others = {k: v for k, v in given.items() if k != constant}
            assert others == {k: v for k, v in constants[0].items() if k != constant}
    assert [given["MASK_PADDING"] for given in constants_of(arms, "padding", "fullseq")] == [0, 1]


def test_every_training_block_is_decoded_with_every_block():
    args, arms = arms_of("block-size")
    assert len(arms) == 5
    every = list(product(args.block_sizes, [False], args.tokens_per_step))
    assert all(arm["ways"] == every for arm in arms)
    default = list(product([args.block_size], [False], args.tokens_per_step))
    assert all(arm["ways"] == default for arm in arms_of("prefix")[1])


def test_controls_are_also_decoded_without_blocks():
    """With one block of 64 tokens, and with the end tokens last in it."""
    _, arms = arms_of("controls", "--tokens_per_step", "4")
    assert all(arm["ways"] == [(16, False, 4), (64, False, 4), (64, True, 4)] for arm in arms)
    assert [arm["method"] for arm in arms[1:5]] == ["blockwise", "fullseq", "rest", "span"]
    sizes = [given["BLOCK_SIZE"] for given in constants_of(arms, "controls", "blockwise")]
    assert sizes == [16, 1, 112]


def test_lift_takes_equal_steps_and_equal_compute():
    """200 steps of 2 passes are 150 of 2 2/3 passes, and 133 of 3; the other trainers' settings."""
    _, arms = arms_of("lift")
    steps = {}
    for arm in arms[1:]:
        given = arm["runs"][0]["constants"]
        steps[arm["method"], arm["setting"]] = given["TOTAL_TRAIN_STEPS"]
        if arm["method"].startswith("lift"):
            assert given["TARGET_MODS"] == ",".join(study.train_fullseq.TARGET_MODS)
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
    args = study.parse_args("lift --model m --data d --test t".split())
    task = TASK | {"constants": {"MASK_ID": 1}}
    given = study.make_arms(args, task)[3]["runs"][0]["constants"]
    assert (given["LR"], given["LORA_RANK"]) == (1e-5, 256)  # those of train_fullseq.py


def test_the_study_of_opdlm():
    """Five arms, two block sizes, two lengths; each is decoded with its own block."""
    _, arms = arms_of("opdlm", "--steps", "80")
    assert len(arms) == 5 * 2 * 2
    for arm in arms:
        given = arm["runs"][0]["constants"]
        size = given["BLOCK_SIZE"]
        assert arm["ways"] == [(size, False, 1), (size, False, 0)] and size in (4, 8)
        assert given["TOTAL_TRAIN_STEPS"] in (20, 80) and given["FULL_FT"]
    assert {arm["method"] for arm in arms} == {
        name for name, trainer in study.TRAINERS.items() if trainer is study.train_opdlm
    }


def test_shared_runs_are_trained_once():
    _, arms = arms_of("--seeds", "3")
    runs = study.unique_runs(arms)
    methods = [run["method"] for run in runs]
    # the default, 4 other block sizes, 3 prefixes, 2 suffixes, padding
    assert methods.count("blockwise") == 3 * 11
    # the default, equal tokens, padding
    assert methods.count("fullseq") == 3 * 3
    assert methods.count("base") == 1
    assert len({run["folder"] for run in runs}) == len(runs)
    ways = {run["method"]: run["ways"] for run in runs[::-1]}
    blocks = [(8, False), (16, False), (32, False), (64, False), (64, True)]
    assert ways["base"] == {(*block, tokens) for block in blocks for tokens in (2, 4, 8)}


def test_a_folder_is_that_of_its_model_data_and_constants():
    def folders(*argv, **task):
        return {run["folder"] for run in study.unique_runs(arms_of("prefix", *argv, **task)[1])}

    assert folders() == folders()
    assert not folders() & folders(identity="another base")
    bases = {folder for folder in folders() if folder.name.startswith("base")}
    assert folders() & folders("--num_gpus", "2") == bases
    changed = TASK["constants"] | {"LORA_DROPOUT": "0.5"}
    assert folders() & folders(constants=changed) == bases
    moved = TASK["constants"] | {"MODEL_NAME": "elsewhere/m", "DATA_PT": "elsewhere/p"}
    assert folders() == folders(constants=moved)


def test_equal_tokens():
    """In the mean blockwise supervises half a block per draw, full-sequence half an answer."""
    assert study.equal_token_steps(300, [64, 32], 32) == 300 * (32 + 32) // (64 + 32)
    assert study.equal_token_steps(300, [20], 32) == 300
    _, arms = arms_of("equal-tokens", "--steps", "300")
    (blockwise,) = constants_of(arms, "equal-tokens", "blockwise")
    (fullseq,) = constants_of(arms, "equal-tokens", "fullseq")
    assert (blockwise["TOTAL_TRAIN_STEPS"], fullseq["TOTAL_TRAIN_STEPS"]) == (300, 100)


def test_equal_compute_ends_where_the_blocks_do():
    """8,000 answers of 48 tokens are 24,000 blocks of 16, and 16,000 of 32."""
    _, arms = arms_of("--steps", "50000", "--constants", "MICRO_BSIZE=16")
    for study_name, steps in (("equal-compute", 24000 // 16), ("block-size", 16000 // 16)):
        for method in study.TRAINERS:
            for given in constants_of(arms, study_name, method):
                assert given["TOTAL_TRAIN_STEPS"] == steps
    (fullseq,) = constants_of(arms, "equal-tokens", "fullseq")
    assert fullseq["TOTAL_TRAIN_STEPS"] == 24000 // 16 // 3


def test_the_trainers_take_the_steps_that_are_planned(monkeypatch):
    """The blocks last for exactly as many steps as `common_steps` says."""
    lengths = [20, 33, 48, 5] * 3
    args = study.parse_args(["--steps", "1000", "--constants", "MICRO_BSIZE=4"])
    examples = [(2, [7] * (2 + length)) for length in lengths]
    for name, value in {"MICRO_BSIZE": 4, "BLOCK_SIZE": 16, "TOTAL_TRAIN_STEPS": 1000}.items():
        monkeypatch.setattr(study.train_blockwise, name, value)
    _, numbers = study.train_blockwise.plan(examples, world_size=1)
    assert study.common_steps(args, lengths, [16]) == len(numbers)


def test_what_decides_an_evaluation_is_in_its_name(base, tmp_path):
    def name(*more):
        args = study.parse_args([*words(base, tmp_path, "prefix"), *more])
        return study.decoding_folder(args, study.prepare(args), Path("run"), (8, False, 4)).name

    ways = [(), ("--limit", "3"), ("--batch_size", "7"), ("--gen_length", "32")]
    assert len({name(*way) for way in ways}) == len(ways)
    assert name() == name()
    assert len(list(tmp_path.glob("*.pt"))) == 1  # made once


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "given, message",
    [
        ("prefixes", "prefixes: no study"),
        ("--seeds 0", "--seeds 0"),
        ("--model m", "--model alone"),
        ("--gen_length 60 --block_size 16", "--gen_length 60 is not divisible by the block of"),
        ("--block_sizes 8 0", "--block_sizes 0"),
        ("--tokens_per_step -1", "--tokens_per_step -1"),
        ("--constants SEED=3", "the studies set SEED themselves"),
        ("opdlm prefix", "give it alone"),
        ("--constants LR", "--constants LR: must be NAME=VALUE"),
    ],
)
def test_mistakes(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        study.parse_args(given.split())
    assert message in capsys.readouterr().err and ended.value.code == 2


@pytest.mark.parametrize(
    "given, message",
    [
        ("BLOCKSIZE=3", "BLOCKSIZE: no constant of train_blockwise.py"),
        ("PREFIX_MASK_RATE=0.5", "PREFIX_MASK_RATE: no constant of train_fullseq.py"),
        ("LR=fast", "LR = 'fast': must be int or float"),
        ("MICRO_BSIZE=0", "MICRO_BSIZE = 0: must be int, 1 to"),
    ],
)
def test_wrong_constants_end_a_study_before_it_does_anything(given, message, tmp_path):
    args = study.parse_args(["--output", str(tmp_path / "study"), "--constants", given])
    with pytest.raises(SystemExit, match=re.escape(message)):
        study.main(args)
    assert not list(tmp_path.iterdir())


def test_a_check_of_constants_changes_none():
    before = dict(vars(study.train_blockwise))
    study.check_constants({"LR": "0.5", "MICRO_BSIZE": "3"}, ["prefix"])
    assert dict(vars(study.train_blockwise)) == before


@pytest.mark.parametrize("script", ["study.py", "plot.py"])
def test_help_and_wrong_flags_are_answered_before_the_slow_imports(script):
    """By a Python without any library (-S)."""
    path = suite.ROOT / "experiments" / script
    for word, status, message in (("--help", 0, "usage:"), ("--stepz", 2, "error:")):
        command = [sys.executable, "-S", path, word]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status
        assert message in done.stdout + done.stderr


# --------------------------------------------------------------------------- runs, without trainers


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
        studies=["prefix"],
        output=tmp_path,
    )


@pytest.fixture
def run(tmp_path):
    """A training run that has not begun, in an empty folder."""
    folder = tmp_path / "blockwise-seed1-0123"
    folder.mkdir()
    constants = {"LR": 1e-3, "SEED": 1}
    return {
        "folder": folder,
        "method": "blockwise",
        "constants": constants,
        "ways": {(8, False, 4)},
    }


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
    checkpoint = study.train(run, args, log=None)
    assert checkpoint == run["folder"] / "ckpt_step0004"
    assert study.train(run, args, log=None) == checkpoint
    ((command, folder),) = commands
    assert folder == run["folder"] and command[1] == study.train_blockwise.__file__
    assert command[2:] == ["--LR", "0.001", "--SEED", "1", "--CKPT_DIR", "ckpt"]
    assert json.loads((folder / "seconds.json").read_text()) >= 0


def test_a_trainer_that_fails_is_no_checkpoint(args, run, monkeypatch):
    fake_trainer(monkeypatch, 1)
    with pytest.raises(SystemExit, match=r"train_blockwise\.py failed"):
        study.train(run, args, log=None)
    # nor one that is killed between its checkpoint and its end
    (run["folder"] / "ckpt_step0004").mkdir()
    (run["folder"] / "ckpt_logs" / "state").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"train_blockwise\.py failed"):
        study.train(run, args, log=None)
    assert not (run["folder"] / "seconds.json").exists()


def test_the_trainer_of_a_killed_study_is_waited_for(args, run, monkeypatch):
    """While another process holds the lock of the run, no second trainer is started."""
    commands = fake_trainer(monkeypatch, 1)
    state = run["folder"] / "ckpt_logs" / "state"
    state.mkdir(parents=True)
    lock = open(state / "lock", "w")  # noqa: SIM115 (closed by the other thread)
    fcntl.flock(lock, fcntl.LOCK_EX)

    def go_on():
        time.sleep(0.3)
        end_training(run["folder"])
        lock.close()

    other = threading.Thread(target=go_on)
    other.start()
    assert study.train(run, args, log=None) == run["folder"] / "ckpt_step0004"
    other.join()
    assert not commands


def measured(folder):
    """Stand for an evaluation: leave its summary."""

    def leave_summary(model, output, *_):
        output.mkdir()
        summary = {"accuracy": 0.5, "exact_match": 0.25, "count": 8, "seconds": 1.23}
        summary |= {"tokens": 64, "forwards": 16}
        (output / "summary.json").write_text(json.dumps(summary))
        (folder / "measured").write_text(str(model))

    return leave_summary


TASK_OF_A_RUN = {"model": "base model", "decoding": "0123", "test": "t", "name": "m-0123"}


def test_a_run_is_completed_once(args, run, monkeypatch, tmp_path):
    commands = fake_trainer(monkeypatch, 0, end_training)
    monkeypatch.setattr(study, "measure", measured(tmp_path))
    args.remove_checkpoints = True
    for _ in range(2):
        study.complete(run, args, TASK_OF_A_RUN)
    assert len(commands) == 1
    assert (tmp_path / "measured").read_text() == str(run["folder"] / "ckpt_step0004")
    assert not (run["folder"] / "ckpt_step0004").exists()


def test_a_failure_names_the_log(args, run, monkeypatch):
    fake_trainer(monkeypatch, 1)
    log = run["folder"] / "log"
    message = re.escape(f"train_blockwise.py failed; see {log}")
    with pytest.raises(RuntimeError, match=message):
        study.complete(run, args, TASK_OF_A_RUN)


@pytest.mark.parametrize("failing", ["base", "blockwise"])
def test_failures_of_runs(args, failing, monkeypatch):
    """One that fails is reported, and ends the study only if it is the base."""
    done = []

    def complete(run, *_):
        if run["method"] == failing and run["folder"] != "b2":
            raise RuntimeError("out of order")
        done.append(run["folder"])

    monkeypatch.setattr(study, "complete", complete)
    monkeypatch.setattr(
        study, "ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs)
    )
    runs = [{"folder": name, "method": "blockwise"} for name in ("b1", "b2")]
    runs.insert(1, {"folder": "b0", "method": "base"})
    failed = study.do_all(runs, args, TASK_OF_A_RUN)
    if failing == "base":
        assert (failed, done) == (["b0: out of order"], [])
    else:
        assert (failed, done) == (["b1: out of order"], ["b0", "b2"])


# ------------------------------------------------------------------------------------ what came out


def test_a_line_of_the_results(args, run, monkeypatch, tmp_path):
    fake_trainer(monkeypatch, 0, end_training)
    monkeypatch.setattr(study, "measure", measured(tmp_path))
    study.complete(run, args, TASK_OF_A_RUN)
    missing = {"folder": tmp_path / "blockwise-seed2-0123", "seed": 2}
    arm = {"study": "prefix", "method": "blockwise", "setting": "PREFIX_MASK_RATE=0.1"}
    arm |= {"ways": [(8, False, 4)], "runs": [run | {"seed": 1}, missing]}
    rows = study.collect(args, TASK_OF_A_RUN, [arm])
    (row,) = rows
    assert row.pop("seconds") >= 0
    assert row == {
        "study": "prefix",
        "method": "blockwise",
        "setting": "PREFIX_MASK_RATE=0.1",
        "seed": 1,
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
    }


def test_results_keep_what_other_studies_have_found(args, tmp_path):
    rows = [{"study": "prefix", "model": "m-0123", "accuracy": 0.5}]
    path = tmp_path / "results.csv"
    before = [("suffix", "m-0123"), ("prefix", "m-0123"), ("suffix", "another")]
    with open(path, "w") as file:
        writer = csv.DictWriter(file, study.COLUMNS)
        writer.writeheader()
        writer.writerows({"study": name, "model": model} for name, model in before)
    study.write_results(path, rows, args, TASK_OF_A_RUN)
    kept = [(row["study"], row["model"], row["accuracy"]) for row in read_results(path)]
    assert kept == [("suffix", "m-0123", ""), ("prefix", "m-0123", "0.5")]


def test_differences_are_paired_by_seed(capsys):
    rows = []
    found = {"a": [0.50, 0.60, 0.70], "b": [0.51, 0.62, 0.70]}
    for setting, accuracies in found.items():
        for seed, accuracy in enumerate(accuracies):
            rows.append(
                {"study": "s", "method": "blockwise", "setting": setting, "seed": seed}
                | {"block_length": 8, "tokens_per_step": 2, "accuracy": accuracy}
                | {"supervised_tokens": 1234}
            )
    base = rows[0] | {"method": "base", "setting": "", "seed": "base", "supervised_tokens": ""}
    study.print_table([base, *rows])
    study.print_differences([base, *rows])
    printed = capsys.readouterr().out
    assert re.search(r"s +\| blockwise \| a +\| block 8 +\| 60\.0 \+- 24\.8 \| 1,234\n", printed)
    assert re.search(r"s +\| base +\| +\| block 8 +\| 50\.0 +\|\n", printed)
    # differences 1, 2 and 0 points: deviation 1, and Student's quantile for 2 degrees of freedom
    mean_and_half = f"+1.0 +- {4.303 / 3**0.5:.1f}"
    assert f"s: blockwise b, decoding block 8, 2 per step: {mean_and_half}\n" in printed


# ------------------------------------------------------------------------------------------ plot.py


def test_mean_and_interval():
    """Against the definition, with Student's quantile for four degrees of freedom."""
    mean, half = plot.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert plot.mean_interval([2.0, 2.0]) == (2, 0)


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


def test_a_panel_for_each_way_of_decoding():
    """Four ways of decoding two settings and the base: the points stand in the right panels."""
    rows = []
    for place, method in enumerate(("base", "blockwise", "fullseq")):
        for block_length in (8, 16):
            for tokens in (2, 4):
                accuracy = (block_length + tokens + place) / 100
                rows.append(
                    {"method": method, "setting": "", "block_length": str(block_length)}
                    | {"tokens_per_step": str(tokens), "accuracy": str(accuracy)}
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
