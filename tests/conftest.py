"""What the tests share: a toy model and data made on the spot, the launcher, and constants that go back."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# before any library is imported: no network, and no cache but the tests' own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest

SUITE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(SUITE), str(SUITE / "experiments")]

import suite
import toy

import pt
import train_blockwise
import train_fullseq

TRAINERS = {"blockwise": train_blockwise, "fullseq": train_fullseq}


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


def build_toy(folder):
    """`model`, `data` and `train.pt` in `folder`, as `experiments/toy.py` builds them, but with random weights."""
    toy.PRETRAIN_STEPS, toy.TRAIN_ROWS, toy.TEST_ROWS, toy.PRETRAIN_ROWS = 0, 60, 10, 300
    toy.build(str(folder))
    run_pt(
        "--model",
        "model",
        "--dataset",
        "data/train.jsonl",
        "--output",
        "train.pt",
        "--filter_type",
        "",
        cwd=folder,
    )
    return folder


def run_pt(*arguments, cwd):
    """`python pt.py ARGUMENTS` in the folder `cwd`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["pt.py", *map(str, arguments)])
        pt.main()


@pytest.fixture(params=TRAINERS)
def trainer(request, monkeypatch, toy_folder):
    """Each trainer in turn, with constants that suit the toy; whatever a test does to them is undone."""
    return prepare(TRAINERS[request.param], monkeypatch, toy_folder)


@pytest.fixture
def blockwise(monkeypatch, toy_folder):
    return prepare(train_blockwise, monkeypatch, toy_folder)


@pytest.fixture
def fullseq(monkeypatch, toy_folder):
    return prepare(train_fullseq, monkeypatch, toy_folder)


def prepare(module, monkeypatch, toy_folder):
    for name in module.CONSTANTS:  # so that monkeypatch puts every one of them back
        monkeypatch.setattr(module, name, getattr(module, name))
    module.MODEL_NAME, module.DATA_PT = str(toy_folder / "model"), str(toy_folder / "train.pt")
    module.MICRO_BSIZE, module.LORA_RANK, module.TOTAL_TRAIN_STEPS = 2, 4, 3
    return module


def launch(command, folder, timeout=240, **environment):
    """Run a command line in `folder`; returns (exit status, what the script itself printed).

    Without the launcher's own lines, which repeat the whole command line, so that a word can be looked for.
    """
    env = user_environment(**environment)
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    skip = ("[runner.py:", "[launch.py:", "real_accelerator.py")
    return done.returncode, "\n".join(
        line for line in done.stdout.splitlines() if not any(s in line for s in skip)
    )


def user_environment(**changes):
    """The environment of a user of this interpreter's virtual environment, in another folder."""
    return suite.user_environment(PYTHONPATH="", **changes)


def launcher(ranks):
    return suite.launcher(ranks)


def flags(**constants):
    return suite.flags(constants)
