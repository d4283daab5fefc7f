"""Whatever happens to a run, nothing of it is lost: it goes on, is refused, or stops, each with one message."""

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
import time
from pathlib import Path

import pytest
import torch
from campaign import CONSTANTS, command, contents, start, survive
from conftest import launch, user_environment
from safetensors.torch import load_file, save_file


class Code:
    def __reduce__(self):
        return (print, ("code has run",))


@pytest.fixture
def claimed(trainer, tmp_path, monkeypatch):
    """claim_run of a run that preflight has passed, in an empty folder; locks are let go when the test ends."""
    monkeypatch.chdir(tmp_path)
    trainer.CKPT_DIR, opened, flock = "run", [], fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: opened.append(file) or flock(file, how))

    def claim(world_size=1, release=True):
        run = {}
        assert trainer.preflight(run, world_size) == []
        try:
            return trainer.claim_run(run)
        finally:
            while release and opened:
                os.close(opened.pop())

    yield claim
    for descriptor in opened:
        os.close(descriptor)


def test_a_run_begins_with_its_state_and_records(trainer, claimed):
    assert claimed() == 0
    begun = json.loads(Path("run_state/run.json").read_text())
    assert begun["suffix"] == "" and begun["LORA_RANK"] == 4 and begun["MODEL_REVISION"] == "main"
    assert json.loads(Path("run_logs/run_config.json").read_text()) == begun
    names = {"run_config.json", "ds_zero2.json"} | (
        {"ablation_config.json"} if trainer.ABLATION else set()
    )
    assert set(os.listdir("run_logs")) == names
    assert json.loads(Path("run_logs/ds_zero2.json").read_text()) == trainer.ds_config(3)


def make_state(step):
    os.mkdir(folder := Path(f"run_state/step{step:04d}"))
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"a": torch.arange(1000)}, folder / name)
    return folder


def test_an_unfinished_run_keeps_its_name(claimed, capsys):
    """Its own log and checkpoints are no reason for -v2; those of a finished run are."""
    claimed()
    os.mkdir("run_step0001")
    os.makedirs("run_state/partial/rest")
    make_state(2)
    capsys.readouterr()
    assert claimed() == 2
    assert capsys.readouterr().out.count("goes on with the unfinished run after step 2") == 1
    assert sorted(os.listdir()) == ["run_logs", "run_state", "run_step0001"]
    assert sorted(os.listdir("run_state")) == ["lock", "run.json", "step0002"]
    shutil.rmtree("run_state")
    claimed()
    assert (
        json.loads(Path("run_state/run.json").read_text())["suffix"] == "-v2"
        and Path("run_logs-v2").is_dir()
    )


@pytest.mark.parametrize(
    "taken", [["run_logs"], ["run_step0300"], ["run_logs", "run_logs-v2", "run_step0300-v3"]]
)
def test_names_that_are_taken(claimed, taken):
    for name in taken:
        os.mkdir(name)
        Path(name, "file").write_text("mine")
    os.mkdir("run_other_logs-v9")
    claimed()
    expected = f"-v{len(taken) + 1}"
    assert json.loads(Path("run_state/run.json").read_text())["suffix"] == expected
    assert all(os.listdir(name) == ["file"] for name in taken)


def test_another_run_is_refused_and_named(trainer, claimed, tmp_path):
    claimed()
    before = contents(".")
    trainer.LORA_RANK, trainer.LR = 8, 2e-3
    with pytest.raises(
        SystemExit, match=r"with LR 1e-05, now 0.002; LORA_RANK 4, now 8\. .*CKPT_DIR"
    ) as refused:
        claimed()
    assert (
        "\n" not in str(refused.value)
        and "run_state" in str(refused.value)
        and "budget" not in str(refused.value)
    )
    trainer.LORA_RANK, trainer.LR = 4, 1e-5
    begun = json.loads(Path("run_state/run.json").read_text())
    Path("run_state/run.json").write_text(json.dumps(begun | {"ONLY_THE_TWINS": 3}))
    with pytest.raises(SystemExit, match="ONLY_THE_TWINS 3, now None"):
        claimed()
    Path("run_state/run.json").write_text(json.dumps(begun, indent=2) + "\n")
    with pytest.raises(SystemExit, match="world_size 1, now 2"):
        claimed(world_size=2)
    rows = torch.load(trainer.PT_FILE, weights_only=True)
    rows[0]["full_ids"][-3] += 1
    trainer.PT_FILE, original = str(tmp_path / "other.pt"), trainer.PT_FILE
    torch.save(rows, trainer.PT_FILE)
    with pytest.raises(SystemExit, match="pt_sha256"):
        claimed()
    trainer.PT_FILE = original
    os.remove("other.pt")
    assert contents(".") == before and claimed() == 0


def test_one_run_at_a_time(claimed):
    claimed(release=False)
    with pytest.raises(BlockingIOError):
        claimed(release=False)
    other = [
        sys.executable,
        "-c",
        "import fcntl; fcntl.flock(open('run_state/lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)",
    ]
    assert b"BlockingIOError" in subprocess.run(other, capture_output=True).stderr  # it is flock's


def test_a_damaged_state_is_refused(claimed):
    claimed()
    folder = make_state(2)
    assert claimed() == 2
    for shard in folder.iterdir():
        whole = shard.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1  # torch loads that without a word
        for remains in (whole[: len(whole) // 2], flipped, None):
            shard.write_bytes(remains) if remains else shard.unlink()
            with pytest.raises(SystemExit, match=r"run_state is damaged.*remove it"):
                claimed()
        shard.write_bytes(whole)
    assert claimed() == 2
    Path("run_state/run.json").write_text('{"MODEL_NAME"')
    with pytest.raises(json.JSONDecodeError):  # which the script ends with in one line
        claimed()


def test_a_folder_that_is_somebody_elses_is_left_alone(claimed):
    os.mkdir("run_state")
    Path("run_state/thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match=r"run_state is .*not of a run.*another CKPT_DIR"):
        claimed()
    assert Path("run_state/thesis.tex").read_text() == "mine" and not os.path.exists("run_logs")
    os.remove("run_state/thesis.tex")
    Path("run_state/run.json.partial").write_text("{")  # of a run that was killed when it began
    assert claimed() == 0


@pytest.fixture
def saving(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer.deepspeed.comm, "barrier", lambda: None)
    monkeypatch.setattr(trainer.deepspeed.comm, "get_rank", lambda: 0)
    trainer.CKPT_DIR = "run"
    os.makedirs("run_state/step0002")
    return trainer


def test_a_folder_appears_when_it_is_whole(saving, monkeypatch):
    renamed, rename = [], os.rename
    monkeypatch.setattr(
        os,
        "rename",
        lambda *paths: renamed.append((os.listdir(paths[0]), *paths)) or rename(*paths),
    )
    write = lambda partial: os.mkdir(partial) or Path(partial, "file").write_text("whole")
    saving.save("run_step0003", 10, write)
    assert renamed == [(["file"], "run_state/partial", "run_step0003")]
    assert sorted(os.listdir()) == ["run_state", "run_step0003"] and os.listdir("run_state") == [
        "step0002"
    ]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed"),
        ValueError("odd"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(saving, error):
    def write(partial):
        os.mkdir(partial)
        Path(partial, "file").write_text("half")
        raise error

    with pytest.raises(OSError, match="run_step0003 cannot be saved") as raised:
        saving.save("run_step0003", 10, write)
    assert str(error.args[-1]) in str(raised.value)
    assert os.listdir() == ["run_state"] and os.listdir("run_state") == ["step0002"]


def test_space_is_checked_before_writing(saving, monkeypatch):
    monkeypatch.setattr(
        saving.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**6)
    )
    with pytest.raises(OSError, match=r"run_step0003 cannot be saved.*0\.01 GB are not free"):
        saving.save("run_step0003", 10**7, lambda _: pytest.fail("wrote"))
    saving.save("run_state", 10**7, lambda _: None)  # that is there already
    saving.save("run_step0003", 10**6, os.mkdir)
    assert os.path.isdir("run_step0003")


def run_of(script, ranks, toy_folder, folder, **constants):
    """Run to the end in `folder` with the campaign's constants, but for `constants`; (exit status, what it printed)."""
    return launch(command(script, ranks, toy_folder, **constants), folder)


@pytest.fixture(scope="module")
def whole(toy_folder, tmp_path_factory):
    """What one-rank runs of train_fullseq.py leave that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    status, printed = run_of("fullseq", 1, toy_folder, folder)
    assert status == 0, printed
    assert sorted(os.listdir(folder)) == [
        "run_logs",
        *(f"run_step{step:04d}" for step in (12, 24, 30)),
    ]
    return contents(folder)


def test_kills_on_one_rank(toy_folder, tmp_path, whole):
    """At seeded moments; the long campaign is campaign.py. A fast run may be at its end before a moment is met."""
    moments = ["before the first step", "saving a state", "in a step", "saving a checkpoint"]
    begin = lambda folder: start("fullseq", 1, toy_folder, folder)
    met = survive(begin, tmp_path / "run", moments, random.Random(1), whole)
    assert met["before the first step"] == 1 and len(met) > 1
    assert contents(tmp_path / "run") == whole


def test_kills_on_two_ranks(toy_folder, tmp_path):
    """Of one rank, behind which the launch ends by itself and says what happened, and of all processes."""
    (reference := tmp_path / "reference").mkdir()
    status, printed = run_of("blockwise", 2, toy_folder, reference)
    assert status == 0, printed
    begin = lambda folder: start("blockwise", 2, toy_folder, folder)
    met = survive(
        begin,
        tmp_path / "run",
        ["one rank", "saving a state"],
        random.Random(3),
        contents(reference),
    )
    assert met["one rank"] == 1
    assert contents(tmp_path / "run") == contents(reference)
    assert "exits with return code = -9" in Path(f"{tmp_path / 'run'}.printed").read_text()


def test_a_full_disk_and_two_starts(toy_folder, tmp_path, whole):
    """A file that grows too large ends the run with one message; then it goes on, and no second one beside it."""
    limit = lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000_000, 20_000_000)
    )  # fits a state alone
    line = command("fullseq", 1, toy_folder)
    how = {
        "cwd": tmp_path,
        "env": user_environment(),
        "capture_output": True,
        "text": True,
        "timeout": 240,
    }
    run = subprocess.run(line, preexec_fn=limit, **how)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    (message,) = [line for line in run.stderr.splitlines() if "cannot be saved" in line]
    assert "run_step0012" in message and "give the same command again" in message
    assert sorted(os.listdir(tmp_path)) == ["run_logs", "run_state"]
    assert "partial" not in os.listdir(tmp_path / "run_state") and "step0008" in os.listdir(
        tmp_path / "run_state"
    )

    first = start("fullseq", 1, toy_folder, tmp_path)
    deadline = time.time() + 200
    while not (tmp_path / "run_step0012").exists():
        assert time.time() < deadline and first.poll() is None, Path(
            f"{tmp_path}.printed"
        ).read_text()
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    status, printed = run_of("fullseq", 1, toy_folder, tmp_path)
    assert (
        status == 1
        and "run_state is in use by another run" in printed
        and "Traceback" not in printed
    )
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0
    assert contents(tmp_path) == whole


def test_a_path_that_cannot_be_written(toy_folder, tmp_path):
    (tmp_path / "file").write_text("")
    status, printed = run_of("fullseq", 1, toy_folder, tmp_path, CKPT_DIR=tmp_path / "file" / "run")
    assert status == 1 and "Traceback" not in printed
    assert str(tmp_path / "file" / "run_state") in printed.splitlines()[-1]
    assert os.listdir(tmp_path) == ["file"]


def test_bad_numbers_and_a_state_with_code(toy_folder, tmp_path):
    """A weight that is no number stops the run, the state before it saved; a state with code in it is refused."""
    rows = torch.load(toy_folder / "train.pt", weights_only=True)
    counts = torch.stack([row["full_ids"].bincount(minlength=126464) > 0 for row in rows]).sum(0)
    number = next(
        n for n, row in reversed(list(enumerate(rows))) if (counts[row["full_ids"]] == 1).any()
    )
    (token, *_) = [
        i for i in rows[number]["full_ids"][: rows[number]["prompt_len"]].tolist() if counts[i] == 1
    ]
    shutil.copytree(toy_folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.transformer.wte.weight"][token] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    status, printed = run_of(
        "blockwise", 1, toy_folder, tmp_path, MODEL_NAME="model", CKPT_DIR="[1]"
    )
    said = r"^step (\d+): loss nan or gradient not finite on rows (\[.*?\]) of .*train.pt; state is saved"
    message = re.search(said, printed, re.M)
    assert status == 1 and message and "Traceback" not in printed, printed
    step = int(message[1])
    assert (
        number in json.loads(message[2]) and len(json.loads(message[2])) == CONSTANTS["MICRO_BSIZE"]
    )
    assert f"step{step - 1:04d}" in os.listdir(tmp_path / "[1]_state")
    assert len((tmp_path / "[1]_logs" / "train_loss.csv").read_text().splitlines()) == step

    saved = tmp_path / "[1]_state" / f"step{step - 1:04d}"
    weights = torch.load(saved / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert len(weights) == 24 and all(weight.isfinite().all() for weight in weights.values())

    (state,) = saved.glob("*optim_states.pt")
    torch.save({"optimizer_state_dict": Code()}, state)
    status, printed = run_of(
        "blockwise", 1, toy_folder, tmp_path, MODEL_NAME="model", CKPT_DIR="[1]"
    )
    assert (
        status == 1
        and "code has run" not in printed
        and "[1]_state is damaged; remove it" in printed
    )
    assert "Traceback" not in printed
