"""What the READMEs name exists, and the other way round."""

import importlib
import os
import re
import signal
import subprocess
import time

import pytest
import train_lift
import train_opdlm
from conftest import SUITE, TRAINERS

import pt

README = (SUITE / "README.md").read_text()
EXPERIMENTS = (SUITE / "experiments" / "README.md").read_text()
BOTH = README + EXPERIMENTS
CODE = "\n".join(re.findall(r"```(?:bash|python|bibtex)?\n(.*?)```", BOTH, re.S))


def test_files_and_commands_exist():
    """In code blocks, relative to the top level; the listing of experiments/ has names alone."""
    named = set(re.findall(r"[\w/.-]+\.(?:py|txt)\b", CODE))
    missing = {name for name in named if not (SUITE / name).exists()} - {"generate.py"}  # LLaDA's
    assert {"pt.py", "train_blockwise.py", "train_fullseq.py", "requirements.txt"} <= named
    assert all((SUITE / "experiments" / name).exists() for name in missing), missing


def test_every_script_of_the_experiments_is_listed():
    listing = re.search(r"```\n(toy\.py .*?)```", EXPERIMENTS, re.S)[1]
    listed = {line.split()[0].rstrip("/") for line in listing.splitlines()}
    here = {path.name for path in (SUITE / "experiments").iterdir()}
    data = {name for name in here if name.endswith((".safetensors", ".md"))}
    assert listed == here - data - {"__pycache__", "runs"}


def test_every_override_in_a_command_is_a_constant():
    for name, module in {**TRAINERS, "lift": train_lift, "opdlm": train_opdlm}.items():
        for line in re.findall(rf"train_{name}\.py([^`\n]*)", BOTH):  # in running text too
            given = re.findall(r"--([A-Z][A-Z0-9_]*)", line)
            assert set(given) <= set(module.CONSTANTS), line


def test_every_constant_and_flag_is_explained():
    for module in TRAINERS.values():
        assert all(f"`{name}`" in README for name in module.CONSTANTS)
    for module in (train_lift, train_opdlm):
        assert all(f"`{name}`" in BOTH for name in module.CONSTANTS)
    assert all(f"`--{flag}`" in README for flag in vars(pt.parse_args([])))


def test_defaults_in_the_table_are_those_of_the_trainers():
    table = dict(re.findall(r"^\| (`[A-Z_`, ]+`) \| (.*?) \|", README, re.M))
    for cell, defaults in table.items():
        names = re.findall(r"\w+", cell)
        for name, default in zip(names, split_defaults(defaults, len(names)), strict=True):
            value = getattr(TRAINERS["blockwise"], name)
            value = ",".join(value) if isinstance(value, list) else value
            assert default == str(value) or float(default) == value, name
    assert set(TRAINERS["blockwise"].CONSTANTS) == set(re.findall(r"\w+", " ".join(table)))


def split_defaults(cell, count):
    """The defaults in a row of the table that is about `count` constants."""
    cell = cell.replace("`", "").split("; ")[0]
    if count > 1 or cell.startswith("ckpts"):
        return cell.split(", ")[:count]
    return [cell]


def test_the_title_of_the_paper():
    title = "Blockwise SFT for Diffusion Language Models: Reconciling Bidirectional Attention and"
    texts = [README, *(module.__doc__ for module in TRAINERS.values())]
    flat = [" ".join(text.split()) for text in texts]
    assert flat[0].count(title) == 2  # in the text and in the citation
    assert title in flat[1]


def test_pt_flags_in_commands_exist(capsys):
    with pytest.raises(SystemExit):
        pt.parse_args(["--help"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    for line in re.findall(r"pt\.py([^`\n]*)", BOTH):
        assert set(re.findall(r"--[a-z_]+", line)) <= known, line


@pytest.mark.parametrize(
    ("script", "least"),
    [
        ("bench", 1),
        ("bench_decode", 0),
        ("decode", 2),
        ("evaluate", 2),
        ("study", 2),
        ("chains", 0),
    ],
)
def test_flags_of_the_experiments_exist(script, least, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    joined = BOTH.replace("\\\n", " ")
    lines = re.findall(rf"(?<![\w]){script}\.py([^`\n]*)", joined)
    assert len(lines) >= least
    for line in lines:
        assert set(re.findall(r"--[a-z0-9_]+", line)) <= known, line


def test_the_slurm_script_starts_a_launcher_a_node_and_requeues(tmp_path):
    """Run as it stands, with stand-ins for Slurm's commands, which note how they are called."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", EXPERIMENTS, re.S)
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
        called = tmp_path / "called"
        while not (called.exists() and "srun" in called.read_text()):
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=30)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    show, srun, requeue = called.read_text().splitlines()
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
