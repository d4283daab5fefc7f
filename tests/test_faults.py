"""Whatever happens to a run, nothing is lost: it resumes, is refused, or ends, with one message."""

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from campaign import CONSTANTS, command, contents, start, survive
from helpers import launch, user_environment, wait_until
from safetensors.torch import load_file, save_file


@pytest.fixture
def claimed(trainer, args, tmp_path, monkeypatch):
    """claim_run in an empty folder; the locks are released when the test ends."""
    monkeypatch.chdir(tmp_path)
    args.CKPT_DIR = "run"
    opened = []
    flock = fcntl.flock

    def note(file, how):
        opened.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", note)

    def claim(world_size=1, release=True):
        examples = trainer.load_examples(args)
        planned = trainer.plan(args, trainer.METHOD, examples, world_size)
        try:
            record = trainer.describe_run(args, trainer.METHOD, examples, *planned)
            return trainer.claim_run(args, record)
        finally:
            while release and opened:
                os.close(opened.pop())

    yield claim
    for descriptor in opened:
        os.close(descriptor)


def test_a_run_begins_with_its_records(trainer, args, claimed):
    assert claimed() == ""
    run = json.loads(Path("run_logs/run_config.json").read_text())
    assert {name: run[name] for name in vars(args)} == vars(args)
    assert (run["world_size"], run["dtype"]) == (1, str(trainer.compute_dtype()))
    assert run["script"] == Path(sys.argv[0]).name
    names = {"run_config.json", "ds_zero2.json", "state"}
    if trainer.ABLATION:
        names.add("ablation_config.json")
    assert set(os.listdir("run_logs")) == names
    assert json.loads(Path("run_logs/ds_zero2.json").read_text()) == trainer.ds_config(args, 3)


def test_an_unfinished_run_keeps_its_name(claimed):
    """Its own log and checkpoints are no reason for -v2; those of a finished run are."""
    claimed()
    os.mkdir("run_step0001")
    assert claimed() == ""
    assert sorted(os.listdir()) == ["run_logs", "run_step0001"]
    shutil.rmtree("run_logs/state")
    assert claimed() == "-v2" and Path("run_logs-v2/state").is_dir()


def test_a_run_that_has_saved_nothing_may_be_changed(args, claimed):
    """As after running out of memory: MICRO_BSIZE is lowered, and the name stays."""
    claimed()
    args.MICRO_BSIZE, args.GRAD_ACC = 1, 2
    assert claimed() == ""
    assert json.loads(Path("run_logs/run_config.json").read_text())["MICRO_BSIZE"] == 1
    Path("run_logs/train_loss.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    shutil.rmtree("run_logs/state")  # of a run of three steps
    args.MICRO_BSIZE = 2
    assert claimed() == ""
    Path("run_logs/train_loss.csv").write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n")
    shutil.rmtree("run_logs/state")
    assert claimed() == "-v2"  # it was finished


def test_what_is_saved_when_may_change(args, claimed):
    claimed()
    Path("run_logs/state/latest.json").write_text('"step0001"')
    args.STATE_EVERY, args.SAVE_EVERY, args.SAVE_ADAPTER = 1, 2, True
    assert claimed() == ""


def test_a_changed_method_does_not_resume(claimed):
    """A new `corrupt` under the same constants supervises other tokens."""
    claimed()
    Path("run_logs/state/latest.json").write_text('"step0001"')
    record = json.loads(Path("run_logs/run_config.json").read_text())
    record["budget"]["supervised_tokens"] += 1
    Path("run_logs/run_config.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="supervised_tokens were others"):
        claimed()


def test_a_base_that_has_changed_is_noticed(args, claimed, tmp_path):
    shutil.copytree(args.MODEL_NAME, tmp_path / "base")
    args.MODEL_NAME = str(tmp_path / "base")
    claimed()
    Path("run_logs/state/latest.json").write_text('"step0001"')
    os.utime(tmp_path / "base" / "model.safetensors", (1, 1))
    with pytest.raises(SystemExit, match="model_files was"):
        claimed()


def test_too_little_memory_is_no_damage(trainer, one_rank, tmp_path):
    class Engine:
        def load_checkpoint(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

    (tmp_path / "step0002").mkdir()
    for name in ("a_states.pt", "b_states.pt"):
        (tmp_path / "step0002" / name).write_text("")
    (tmp_path / "latest.json").write_text('"step0002"')
    with pytest.raises(torch.OutOfMemoryError):
        trainer.load_state(Engine(), tmp_path)


def test_a_run_killed_while_it_began_begins_again(claimed):
    os.makedirs("run_logs/state")
    Path("run_logs/run_config.partial").write_text("{")
    assert claimed() == ""
    assert json.loads(Path("run_logs/run_config.json").read_text())["LORA_RANK"] == 4


def test_a_run_killed_while_it_began_beside_checkpoints(claimed):
    """Of another run with this prefix: its record is written all the same."""
    os.makedirs("run_logs/state")
    os.mkdir("run_step0300-v2")
    assert claimed() == "" and Path("run_logs/run_config.json").exists()


@pytest.mark.parametrize(
    "taken", [["run_logs"], ["run_step0300"], ["run_logs", "run_logs-v2", "run_step0300-v3"]]
)
def test_names_that_are_taken(claimed, taken):
    for name in taken:
        os.mkdir(name)
        Path(name, "file").write_text("mine")
    os.mkdir("run_other_logs-v9")
    assert claimed() == f"-v{len(taken) + 1}"
    assert all(os.listdir(name) == ["file"] for name in taken)


def test_another_run_is_refused_and_named(trainer, args, claimed, tmp_path):
    claimed()
    Path("run_logs/state/latest.json").write_text('"step0002"')
    before = contents(".")
    args.LORA_RANK, args.LR, args.TOTAL_TRAIN_STEPS = 8, 2e-3, 2
    with pytest.raises(SystemExit, match=r"LORA_RANK was 4, now 8") as refused:
        claimed()
    message = str(refused.value)
    assert "LR was 1e-05, now 0.002" in message and "another CKPT_DIR" in message
    assert "saved: step0002" in message
    assert "\n" not in message and "run_logs" in message and "budget" not in message
    args.LORA_RANK, args.LR, args.TOTAL_TRAIN_STEPS = 4, 1e-5, 3
    record = Path("run_logs/run_config.json")
    begun = record.read_text()
    record.write_text(json.dumps(json.loads(begun) | {"ONLY_THE_TWINS": 3}))
    with pytest.raises(SystemExit, match="ONLY_THE_TWINS was 3, now None"):
        claimed()
    record.write_text(begun)
    with pytest.raises(SystemExit, match="world_size was 1, now 2"):
        claimed(world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "compute_dtype", lambda: torch.float16)
        with pytest.raises(SystemExit, match=r"dtype was .*, now 'torch.float16'"):
            claimed()
    rows = torch.load(args.DATA_PT, weights_only=True)
    rows[0]["full_ids"][-3] += 1
    original = args.DATA_PT
    args.DATA_PT = str(tmp_path / "other.pt")
    torch.save(rows, args.DATA_PT)
    with pytest.raises(SystemExit, match="data_sha256"):
        claimed()
    args.DATA_PT = original
    os.remove("other.pt")
    assert contents(".") == before and claimed() == ""


def test_one_run_at_a_time(claimed):
    claimed(release=False)
    with pytest.raises(SystemExit, match="run_logs is in use by another process"):
        claimed(release=False)
    code = "import fcntl; fcntl.flock(open('run_logs/state/lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert b"BlockingIOError" in other.stderr  # the lock is flock's


class Engine:
    """DeepSpeed's engine as save_state and load_state use it."""

    def __init__(self, error=None):
        self.error = error
        self.loaded = None

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        assert not save_latest and exclude_frozen_parameters
        os.makedirs(folder / tag)
        for name in (
            "mp_rank_00_model_states.pt",
            "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ):
            (folder / tag / name).write_text("half")
            if self.error:
                raise self.error

    def load_checkpoint(self, folder, tag, load_module_strict):
        if self.error:
            raise self.error
        self.loaded = tag


def test_the_state_before_is_kept_until_the_next_is_whole(trainer, one_rank, tmp_path):
    trainer.save_state(Engine(), tmp_path, 2)
    assert trainer.load_state(Engine(), tmp_path) == 2
    full = RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed")
    with pytest.raises(OSError, match=r"step0004 cannot be saved: .*PytorchStreamWriter"):
        trainer.save_state(Engine(full), tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step0002"]
    (tmp_path / "step0004").mkdir()  # as a kill leaves it
    assert trainer.load_state(Engine(), tmp_path) == 2
    (tmp_path / "step0004").rmdir()
    trainer.save_state(Engine(), tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step0004"]
    assert trainer.load_state(Engine(), tmp_path) == 4


def test_a_damaged_state_is_refused(trainer, one_rank, tmp_path):
    """DeepSpeed loads the weights without the optimizer, and says nothing, if a file is missing."""
    assert trainer.load_state(Engine(), tmp_path) == 0
    trainer.save_state(Engine(), tmp_path, 2)
    with pytest.raises(SystemExit, match=r"step0002 is damaged .*delete"):
        trainer.load_state(Engine(EOFError("Ran out of input")), tmp_path)
    for file in (tmp_path / "step0002").iterdir():
        whole = file.read_text()
        file.unlink()
        engine = Engine()
        with pytest.raises(SystemExit, match=r"step0002 is damaged .*missing.*delete"):
            trainer.load_state(engine, tmp_path)
        assert engine.loaded is None
        file.write_text(whole)
    assert trainer.load_state(Engine(), tmp_path) == 2


@pytest.fixture
def run(tmp_path):
    """A run as save_checkpoint uses it."""
    state = tmp_path / "state"
    state.mkdir()
    return SimpleNamespace(state=state, model=None, tokenizer=None)


def test_a_checkpoint_appears_when_it_is_whole(trainer, args, one_rank, run, tmp_path, monkeypatch):
    path = tmp_path / "run_step0003"
    (run.state / "checkpoint").mkdir()
    (run.state / "checkpoint" / ".tmpX").write_text("what a kill has left")
    seen = []

    def save_merged(args, model, tokenizer, folder):
        folder.mkdir()
        (folder / "file").write_text("whole")
        seen.append(path.exists())

    monkeypatch.setattr(trainer, "save_merged", save_merged)
    trainer.save_checkpoint(args, run, path)
    assert seen == [False] and os.listdir(path) == ["file"] and os.listdir(run.state) == []
    trainer.save_checkpoint(args, run, path)  # it is there already
    assert seen == [False]


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    trainer, args, one_rank, run, tmp_path, monkeypatch
):
    def save_merged(args, model, tokenizer, folder):
        folder.mkdir()
        (folder / "file").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "save_merged", save_merged)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(args, run, tmp_path / "run_step0003")
    assert os.listdir(tmp_path) == ["state"] and os.listdir(run.state) == []


class Bar:
    def set_postfix(self, **shown):
        self.shown = shown


@pytest.mark.parametrize(
    ("save_every", "state_every", "checkpoints", "states"),
    [(None, None, [7], []), (3, 2, [3, 6, 7], [2, 4, 6]), (7, 7, [7], [])],
)
def test_what_is_saved_when(
    trainer, args, one_rank, tmp_path, monkeypatch, save_every, state_every, checkpoints, states
):
    """The last step saves a checkpoint, and no state; the checkpoint is saved before the state."""
    args.CKPT_DIR, args.SAVE_EVERY, args.STATE_EVERY = "run", save_every, state_every
    run = SimpleNamespace(draws=[None] * 7, suffix="-v2", engine=None, state=None, bar=Bar(), lr=0)
    saved = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda args, run, path: saved.append(path))
    monkeypatch.setattr(trainer, "save_state", lambda engine, state, step: saved.append(step))
    with open(tmp_path / "log", "w") as run.log:
        for step in range(1, 8):
            trainer.end_step(args, run, step, step / 4, args.STATE_EVERY)
    paths = [f"run_step{step:04d}-v2" for step in checkpoints]
    assert [item for item in saved if isinstance(item, str)] == paths
    assert [item for item in saved if isinstance(item, int)] == states
    if 6 in states:
        assert saved.index("run_step0006-v2") < saved.index(6)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == [f"{step},{step / 4:.6f}" for step in range(1, 8)]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_the_log_is_cut_back_to_the_saved_step(trainer, tmp_path, step):
    path = tmp_path / "train_loss.csv"
    path.write_text("step,loss\n1,3.5\n2,3.25\n3,3.0\n4,2.")
    with trainer.open_log(path, step) as log:
        log.write(f"{step + 1},9\n")
        assert path.read_text().endswith(f"{step + 1},9\n")  # written at once
    kept = "step,loss\n1,3.5\n2,3.25\n3,3.0\n".splitlines(keepends=True)[: 1 + step]
    assert path.read_text() == "".join(kept) + f"{step + 1},9\n"


# ------- launched


def run_of(script, ranks, toy_folder, folder, **changes):
    """Run to the end with the campaign's constants; (exit status, what it printed)."""
    return launch(command(script, ranks, toy_folder, **changes), folder)


@pytest.fixture(scope="module")
def whole(toy_folder, tmp_path_factory):
    """What a run of train_fullseq.py on one rank leaves that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    status, printed = run_of("fullseq", 1, toy_folder, folder)
    assert status == 0, printed
    assert "FutureWarning" not in printed
    steps = [f"run_step{step:04d}" for step in (12, 24, 30)]
    assert sorted(os.listdir(folder)) == ["run_logs", *steps]
    assert sorted(os.listdir(folder / "run_logs")) == [
        "ds_zero2.json",
        "run_config.json",
        "train_loss.csv",
    ]
    return contents(folder)


@pytest.mark.slow
def test_kills_on_one_rank(toy_folder, tmp_path, whole):
    """At seeded moments; the long campaign is campaign.py. A run may end before a moment is met."""
    moments = ["before the first step", "saving a state", "in a step", "saving a checkpoint"]

    def begin(folder):
        return start("fullseq", 1, toy_folder, folder)

    met = survive(begin, tmp_path / "run", moments, random.Random(1), whole)
    assert met["before the first step"] == 1 and len(met) > 1
    assert contents(tmp_path / "run") == whole


@pytest.mark.slow
def test_kills_on_two_ranks(toy_folder, tmp_path):
    """Of one rank, after which the launch ends and says what happened, and of all processes."""
    reference = tmp_path / "reference"
    reference.mkdir()
    status, printed = run_of("blockwise", 2, toy_folder, reference)
    assert status == 0, printed
    assert "FutureWarning" not in printed
    expected = contents(reference)

    def begin(folder):
        return start("blockwise", 2, toy_folder, folder)

    moments = ["one rank", "the launcher", "saving a state"]
    met = survive(begin, tmp_path / "run", moments, random.Random(3), expected)
    assert met["one rank"] == met["the launcher"] == 1
    assert contents(tmp_path / "run") == expected
    assert "exits with return code = -9" in Path(f"{tmp_path / 'run'}.printed").read_text()


def limit_files():
    """Let no file grow beyond 20 MB, which fits a state but not a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))


@pytest.mark.slow
def test_a_full_disk_and_two_starts(toy_folder, tmp_path, whole):
    """A full disk ends the run with one message; it resumes, and no second one beside it."""
    run = subprocess.run(
        command("fullseq", 1, toy_folder),
        preexec_fn=limit_files,
        cwd=tmp_path,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "stopped: " in run.stderr and "repeat the command to resume" in run.stderr
    assert sorted(os.listdir(tmp_path)) == ["run_logs"]
    state = tmp_path / "run_logs" / "state"
    assert "step0008" in os.listdir(state) and "checkpoint" not in os.listdir(state)

    first = start("fullseq", 1, toy_folder, tmp_path)
    wait_until((tmp_path / "run_step0012").exists, first)
    first.send_signal(signal.SIGSTOP)
    status, printed = run_of("fullseq", 1, toy_folder, tmp_path)
    assert status == 1 and "run_logs is in use by another process" in printed
    assert "Traceback" not in printed
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_a_path_that_cannot_be_written(toy_folder, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    status, printed = run_of("fullseq", 1, toy_folder, tmp_path, CKPT_DIR=place)
    assert status == 1 and "Traceback" not in printed
    assert str(tmp_path / "file") in printed.splitlines()[-1]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(toy_folder, tmp_path):
    """The message names the step and the rows; the state before is as it was."""
    rows = torch.load(toy_folder / "train.pt", weights_only=True)
    number, token = 57, 0  # drawn late; no other row has this token
    assert not any((row["full_ids"] == token).any() for row in rows)
    rows[number]["full_ids"][3] = token
    torch.save(rows, tmp_path / "train.pt")
    shutil.copytree(toy_folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.transformer.wte.weight"][token] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    data = {"MODEL_NAME": "model", "DATA_PT": "train.pt"}
    status, printed = run_of("blockwise", 1, toy_folder, tmp_path, **data)
    message = re.search(
        r"^step (\d+): loss nan or gradient not finite on rows (\[.*?\]) of .*train.pt",
        printed,
        re.M,
    )
    assert status == 1 and message and "Traceback" not in printed, printed
    step = int(message[1])
    named = json.loads(message[2])
    assert number in named and len(named) == CONSTANTS["MICRO_BSIZE"]
    assert len((tmp_path / "run_logs" / "train_loss.csv").read_text().splitlines()) == step
    saved = (step - 1) // CONSTANTS["STATE_EVERY"] * CONSTANTS["STATE_EVERY"]
    assert saved > 0  # choose another SEED if not
    folder = tmp_path / "run_logs" / "state" / f"step{saved:04d}"
    adapter = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert len(adapter) == 24 and all(weight.isfinite().all() for weight in adapter.values())
