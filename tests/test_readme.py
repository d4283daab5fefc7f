"""What the README names exists, and the other way round."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import SUITE, TRAINERS

import pt

README = (SUITE / "README.md").read_text()
CODE = "\n".join(re.findall(r"```(?:bash|python|bibtex)?\n(.*?)```", README, re.S))


def test_files_and_commands_exist():
    named = set(re.findall(r"[\w/.-]+\.(?:py|txt)\b", CODE)) - {"my_train.py"}
    assert {
        "pt.py",
        "train_blockwise.py",
        "train_fullseq.py",
        "experiments/toy.py",
        "experiments/bench.py",
        "experiments/decode.py",
        "experiments/evaluate.py",
        "experiments/study.py",
        "experiments/plot.py",
        "requirements.txt",
    } <= named
    assert all((SUITE / name).exists() for name in named), [
        name for name in named if not (SUITE / name).exists()
    ]


def test_every_override_in_a_command_is_a_constant():
    for name, module in TRAINERS.items():
        for line in re.findall(rf"train_{name}\.py([^`\n]*)", README):  # in running text too
            given = re.findall(r"--([A-Z][A-Z0-9_]*)", line)
            assert set(given) <= set(module.CONSTANTS), line


def test_every_constant_and_flag_is_explained():
    for module in TRAINERS.values():
        assert all(f"`{name}`" in README for name in module.CONSTANTS)
    assert all(f"`--{flag}`" in README for flag in vars(pt.parse_args([])))


def test_pt_flags_in_commands_exist(capsys):
    with pytest.raises(SystemExit):
        pt.parse_args(["--help"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    for line in re.findall(r"pt\.py(.*)", CODE):
        assert set(re.findall(r"--[a-z_]+", line)) <= known, line


@pytest.mark.parametrize(
    "script, least", [("bench", 6), ("decode", 1), ("evaluate", 2), ("study", 2), ("chains", 0)]
)
def test_flags_of_the_experiments_exist(script, least, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    lines = re.findall(rf"{script}\.py([^`\n]*)", README)
    assert len(lines) >= least and all(
        set(re.findall(r"--[a-z_]+", line)) <= known for line in lines
    )


def test_the_slurm_script_starts_a_launcher_a_node_and_requeues(tmp_path):
    """Run as it stands, with stand-ins for Slurm's own commands, which note how they are called."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", README, re.S)
    for name, body in {"srun": "sleep 15", "scontrol": "echo node1; echo node2"}.items():
        (tmp_path / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/called\n{body}\n'
        )
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=env, start_new_session=True)
    try:
        called = lambda: (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
        while "srun" not in called():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=30)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    show, srun, requeue = called().splitlines()
    assert (show, requeue) == ("scontrol show hostnames node[1-2]", "scontrol requeue 7")
    assert (
        "torchrun --nnodes 2 " in srun and "--rdzv_endpoint node1:29500 train_blockwise.py" in srun
    )


def test_every_row_of_the_differences_is_there():
    rows = [*(f"P{i}" for i in (5, 6, 8)), *(f"T{i}" for i in range(1, 26))]
    assert [row for row in rows if not re.search(rf"\b{row}\b", README)] == []


def test_requirements_are_pinned():
    pins = (SUITE / "requirements.txt").read_text().split()
    names = ("torch", "deepspeed", "transformers", "peft", "datasets", "tqdm", "safetensors")
    assert all(any(pin.startswith(f"{name}==") for pin in pins) for name in names)
