"""What the tests share: a toy model and data, the launcher, and constants that are put back."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# before any library is imported: no network, no GPU, and no cache but the tests' own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"  # the launcher gives its processes all devices
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest

SUITE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(SUITE), str(SUITE / "experiments")]

import chains
import suite

import pt
import train_blockwise
import train_fullseq

TRAINERS = {"blockwise": train_blockwise, "fullseq": train_fullseq}


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


SHAPE = {
    "d_model": 96,
    "n_layers": 3,
    "n_heads": 4,
    "mlp_hidden_size": 256,
    "max_sequence_length": 1024,
}


def build_toy(folder):
    """`model` (random weights, LLaDA's vocabulary), `data` and `train.pt` in `folder`."""
    chains.build(folder, wide=True, base=None, train_rows=60, test_rows=10, shape=SHAPE)
    words = "--model model --dataset data/train.jsonl --output train.pt"
    run_pt(*words.split(), "--filter_type", "", cwd=folder)
    return folder


def run_pt(*arguments, cwd):
    """`python pt.py ARGUMENTS` in the folder `cwd`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        pt.main(pt.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(params=TRAINERS)
def trainer(request, monkeypatch, toy_folder):
    """Each trainer in turn, with constants that suit the toy; changes to them are undone."""
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

    The launcher's own lines, which repeat the command line, are left out.
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
