"""What the pages name exists, and the other way round."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_lift
import train_opdlm
from helpers import SUITE, TRAINERS

import pt
import train_blockwise

README = (SUITE / "README.md").read_text()
DOCS = SUITE / "experiments" / "docs"
PAGES = [SUITE / "README.md", SUITE / ".github" / "CONTRIBUTING.md"]
PAGES += [SUITE / "experiments" / "README.md", SUITE / "experiments" / "results" / "README.md"]
PAGES += sorted(DOCS.glob("*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)
CODE = "\n".join(re.findall(r"```(?:bash|python|bibtex)?\n(.*?)```", TEXT, re.S))


def scripts():
    return [*SUITE.glob("*.py"), *(SUITE / "experiments").rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_files_and_commands_exist():
    named = set(re.findall(r"(?<![\w/])(?:experiments/|tests/)?[\w/]+\.(?:py|txt)\b", CODE))
    folders = [SUITE, SUITE / "experiments"]
    assert {"pt.py", "train_blockwise.py", "train_fullseq.py", "requirements.txt"} <= named
    assert all(any((folder / name).exists() for folder in folders) for name in named), named


def test_every_script_and_room_of_the_experiments_is_in_the_index():
    index = (SUITE / "experiments" / "README.md").read_text()
    for path in (SUITE / "experiments").iterdir():
        if path.suffix == ".py" or (path.is_dir() and path.name not in ("__pycache__", "runs")):
            assert path.name in index, path.name


def test_docstrings_name_pages_that_exist():
    named = set()
    for script in scripts():
        doc = ast.get_docstring(ast.parse(script.read_text())) or ""
        pages = re.findall(r"experiments/(docs/\w+\.md)", doc)
        assert all((SUITE / "experiments" / page).exists() for page in pages), script
        if pages:
            named.add(script.name)
    commands = "pt train_blockwise train_fullseq train_lift train_opdlm train_control decode"
    commands += " evaluate held_out study bench bench_decode"
    assert {f"{command}.py" for command in commands.split()} <= named


def test_the_lines_of_corrupt_are_those_of_the_trainer():
    (lines,) = re.findall(r"```python\n(    pos = .*?)```", README, re.S)
    assert lines in Path(train_blockwise.__file__).read_text()


def test_the_first_page_makes_the_checkpoints_that_it_names():
    """Its commands, one after another, with rows of the usual length."""
    (command,) = re.findall(r"^deepspeed (.*train_blockwise\.py --MICRO.*?) +#", README, re.M)
    flags = re.findall(r"--[A-Z_]+ \S+", command)
    args = train_blockwise.parse_args(argv=" ".join(flags).split())
    ranks = int(re.search(r"--num_gpus (\d+)", command)[1])
    examples = [(100, torch.arange(230))] * args.MAX_SAMPLES
    for world_size, settings in ((ranks, args), (1, train_blockwise.parse_args(argv=[]))):
        draws, _ = train_blockwise.plan(settings, train_blockwise.METHOD, examples, world_size)
        assert draws[0].size == 32
        name = f"{settings.CKPT_DIR}_step{len(draws):04d}"
        assert set(re.findall(rf"{args.CKPT_DIR}_step\w+", README)) == {name}


def test_every_override_in_a_command_is_a_constant():
    for name, module in {**TRAINERS, "lift": train_lift, "opdlm": train_opdlm}.items():
        for line in re.findall(rf"train_{name}\.py([^`\n]*)", TEXT):  # in running text too
            given = re.findall(r"--([A-Z][A-Z0-9_]*)", line)
            assert set(given) <= set(module.CONSTANTS), line


def test_defaults_in_the_table_are_those_of_the_trainer():
    table = dict(re.findall(r"^\| (`[A-Z_`, ]+`) \| (.*?) \|", README, re.M))
    for cell, defaults in table.items():
        names = re.findall(r"\w+", cell)
        for name, default in zip(names, defaults.replace("`", "").split(", "), strict=True):
            value = train_blockwise.CONSTANTS[name]
            assert default == str(value) or float(default) == value, name
    assert len(table) == 10


def test_the_title_of_the_paper():
    title = "Blockwise SFT for Diffusion Language Models: Reconciling Bidirectional Attention and"
    texts = [README, *(module.__doc__ for module in TRAINERS.values())]
    flat = [" ".join(text.split()) for text in texts]
    assert flat[0].count(title) == 2  # in the text and in the citation
    assert title in flat[1]


@pytest.mark.parametrize(
    ("script", "least"),
    [
        ("pt", 4),
        ("bench", 1),
        ("bench_decode", 1),
        ("decode", 2),
        ("evaluate", 3),
        ("held_out", 1),
        ("study", 3),
        ("plot", 1),
        ("toy_task.chains", 0),
        ("opdlm.compare", 1),
    ],
)
def test_flags_in_commands_exist(script, least, capsys):
    parse_args = importlib.import_module(script).parse_args
    known = set()
    for argv in (["--help"], ["losses", "--help"], ["studies", "--help"]):  # the last are plot's
        with pytest.raises(SystemExit):
            parse_args(argv)
        known |= set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    joined = TEXT.replace("\\\n", " ")
    name = script.rpartition(".")[2]
    lines = re.findall(rf"(?<!\w){name}\.py([^`\n]*)", joined)
    assert len(lines) >= least
    for line in lines:
        assert set(re.findall(r"--[a-z0-9_]+", line)) <= known, line


def test_every_flag_of_pt_is_explained():
    running = (DOCS / "running.md").read_text()
    assert all(f"--{flag}" in running for flag in vars(pt.parse_args([])))


@pytest.mark.slow
def test_the_slurm_script_starts_a_launcher_a_node_and_requeues(tmp_path):
    """Run as it stands, with stand-ins for Slurm's commands, which note how they are called."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", TEXT, re.S)
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


@pytest.mark.slow
def test_the_commands_of_the_toy_task_run(tmp_path):
    """Scripts in rooms find the suite from any folder."""
    command = [sys.executable, SUITE / "experiments" / "toy_task" / "chains.py", "--narrow"]
    subprocess.run([*command, "--output", "toy"], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(os.listdir(tmp_path / "toy")) == ["data", "model"]


def test_requirements_are_pinned():
    pins = (SUITE / "requirements.txt").read_text().split()
    names = ("torch", "deepspeed", "transformers", "peft", "datasets", "tqdm", "safetensors")
    assert all(any(pin.startswith(f"{name}==") for pin in pins) for name in names)
