"""Runs as a user starts them, and what they leave behind."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import SUITE, flags, launch, user_environment
from safetensors.torch import load_file
from toy import launcher


def data(toy_folder, **constants):
    return flags(
        MODEL_NAME=toy_folder / "model", PT_FILE=toy_folder / "train.pt", LORA_RANK=4, **constants
    )


def losses(folder):
    with open(folder / "train_loss.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def run_on_two_nodes(script, constants, folder):
    """Two torchrun agents, here both on this machine; returns their exit statuses."""
    port = launcher(2)[-1]
    nodes = [
        "torchrun",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
    ]
    how = {
        "cwd": folder,
        "env": user_environment(),
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    agents = [
        subprocess.Popen([*nodes, "--node_rank", rank, script, *constants], **how)
        for rank in ("0", "1")
    ]
    try:
        return [agent.wait(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # if one hangs; torchrun ends its ranks


def readme_snippet(word):
    """The README's python block that contains `word`."""
    blocks = re.findall(r"```python\n(.*?)```", (SUITE / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if word in block]
    return block


def test_two_ranks_uneven_data_accumulation_and_an_early_end(toy_folder, tmp_path):
    """7 rows on 2 ranks, micro-batches of 2, accumulated twice: every block once, then the end, and the checkpoint.

    Fails on the published behaviour, which counts, logs and saves a micro-batch early (T2), hangs on uneven shards
    (T3), takes fewer than 10 steps not at all (T14) and, ended early, saves nothing (T1).
    """
    rows = torch.load(toy_folder / "train.pt", weights_only=True)[:7]
    torch.save(rows, tmp_path / "seven.pt")
    constants = data(
        toy_folder, MICRO_BSIZE=2, GRAD_ACC=2, LR=1e-2, TOTAL_TRAIN_STEPS=100, SAVE_EVERY=2
    )
    command = [*launcher(2), SUITE / "train_blockwise.py", *constants, "--PT_FILE", "seven.pt"]
    (tmp_path / "ckpts_stagewise_sft_32_logs").mkdir()
    (tmp_path / "ckpts_stagewise_sft_32_logs" / "mine.txt").write_text("")  # a taken name
    status, printed = launch(command, tmp_path)
    assert status == 0, printed

    blocks = sum(-(-(len(row["full_ids"]) - row["prompt_len"]) // 32) for row in rows)
    steps = blocks // 8
    assert (
        steps == 3
    )  # the first two have learning rate 0: a checkpoint without the last one has not changed
    logs = tmp_path / "ckpts_stagewise_sft_32_logs-v2"
    assert len(losses(logs)) == steps
    assert os.listdir(tmp_path / "ckpts_stagewise_sft_32_logs") == ["mine.txt"]
    saved = {path.name for path in tmp_path.iterdir() if "_step" in path.name}
    due = {step for step in range(1, steps + 1) if step % 2 == 0} | {steps}
    assert saved == {f"ckpts_stagewise_sft_32_step{step:04d}-v2" for step in due}

    run = json.loads((logs / "run_config.json").read_text())
    budget = run["budget"]
    assert (run["world_size"], budget["steps"], budget["global batch"]) == (2, steps, 8)
    assert (budget["draws"], budget["draws left out"]) == (8 * steps, blocks % 8)
    assert run["GRAD_ACC"] == 2 and run["versions"]["torch"] == version("torch")
    assert run["pt_sha256"] == hashlib.sha256((tmp_path / "seven.pt").read_bytes()).hexdigest()
    assert budget["forward tokens"] == 8 * steps * 256
    assert (
        budget["draws"] * 5 < budget["supervised tokens"] < budget["draws"] * 27
    )  # 15.5 expected, or less
    assert budget["trained parameters"] == 3 * (3 * (96 + 96) + 96 + 256) * 4
    assert all(
        f"{budget[name]:,} {name}" in printed
        for name in ("draws left out", "forward tokens", "supervised tokens")
    )
    ablation = json.loads((logs / "ablation_config.json").read_text())
    assert ablation == {"PREFIX_MASK_RATE": 0.0, "SUFFIX_MASK_PROB": 1.0, "BLOCK_SIZE": 32}
    scheduler = json.loads((logs / "ds_zero2.json").read_text())["scheduler"]["params"]
    assert scheduler["total_num_steps"] == steps

    last = f"ckpts_stagewise_sft_32_step{steps:04d}-v2"
    base, tuned = (
        load_file(folder / "model.safetensors")
        for folder in (toy_folder / "model", tmp_path / last)
    )
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    kinds = ("q_proj", "k_proj", "v_proj", "up_proj")
    assert changed == {
        f"model.transformer.blocks.{i}.{kind}.weight" for i in range(3) for kind in kinds
    }
    snippet = readme_snippet("from_pretrained")
    snippet = (
        re.sub(r'"ckpts_[^"]*"', repr(last), snippet).replace('"cuda"', '"cpu"')
        + "\nprint(logits.shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "126464" in done.stdout


def test_ranks_nodes_and_accumulation_share_a_global_batch_without_changing_it(
    toy_folder, tmp_path
):
    """Batch 4 as 4 rows, as two accumulated micro-batches, as two ranks of one node and of two: the same losses but
    for bf16's noise.

    Fails on the published behaviour (T1, T2, T4, T16, T25). The plain processes find no compiler: none is needed.
    """
    constants = data(toy_folder, TOTAL_TRAIN_STEPS=8, LR=5e-3, LORA_DROPOUT=0.0)
    script = SUITE / "train_fullseq.py"
    for name, micro_batch, accumulated in (("one", 4, 1), ("accumulated", 2, 2)):
        sizes = flags(MICRO_BSIZE=micro_batch, GRAD_ACC=accumulated, CKPT_DIR=name)
        nothing = dict.fromkeys(("CXX", "CC", "TORCH_EXTENSIONS_DIR"), "/no/such/place")
        status, printed = launch([sys.executable, script, *constants, *sizes], tmp_path, **nothing)
        assert status == 0, printed
    two = [*launcher(2), script, *constants, *flags(MICRO_BSIZE=2, CKPT_DIR="two")]
    status, printed = launch(two, tmp_path)
    assert status == 0, printed
    assert (
        printed.count("supervised tokens") == 2
    )  # rank 0 alone speaks, at the start and at the end

    nodes = [*constants, *flags(MICRO_BSIZE=2, CKPT_DIR="nodes")]
    assert run_on_two_nodes(script, nodes, tmp_path) == [0, 0]

    first, *others = [
        losses(tmp_path / f"{name}_logs") for name in ("one", "accumulated", "two", "nodes")
    ]
    assert len(first) == 8
    for other in others:
        assert max(abs(a - b) for a, b in zip(first, other, strict=True)) < 0.02
    assert abs(first[0] - first[-1]) > 0.1  # the weights have moved by far more than that
    names = ("one", "accumulated", "two", "nodes")
    runs = [
        json.loads((tmp_path / f"{name}_logs" / "run_config.json").read_text()) for name in names
    ]
    assert all(run["budget"] == runs[0]["budget"] for run in runs)
    assert sorted(os.listdir(tmp_path)) == sorted(
        f"{name}_{kind}" for name in names for kind in ("logs", "step0008")
    )
    assert not (tmp_path / "one_logs" / "ablation_config.json").exists()


def test_ctrl_c_is_one_line_and_the_run_can_go_on(toy_folder, tmp_path):
    command = [
        sys.executable,
        SUITE / "train_blockwise.py",
        *data(toy_folder, MICRO_BSIZE=2, TOTAL_TRAIN_STEPS=100),
    ]
    heed = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # which a shell's background jobs ignore
    how = {
        "cwd": tmp_path,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "preexec_fn": heed,
    }
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": ""}, **how)
    log = tmp_path / "ckpts_stagewise_sft_32_logs" / "train_loss.csv"
    deadline = time.time() + 200
    while not (log.exists() and len(log.read_text().splitlines()) > 2):
        assert time.time() < deadline and run.poll() is None, run.communicate()[0]
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    printed = run.communicate(timeout=60)[0]
    assert run.returncode == 1, printed  # sys.exit's; an interrupt that nobody catches is another
    assert printed.count("stopped: KeyboardInterrupt(); give the same command again") == 1, printed
    assert len(losses(log.parent)) >= 2
    assert sorted(os.listdir(tmp_path)) == [
        "ckpts_stagewise_sft_32_logs",
        "ckpts_stagewise_sft_32_state",
    ]


def test_seeds_and_the_time_to_wait(toy_folder, tmp_path, monkeypatch, blockwise):
    """The adapter's seed is SEED on all ranks, dropout's a function of SEED and the draw (T4); rank 0 may save long."""
    seeds, waits = [], []
    monkeypatch.chdir(tmp_path)
    arguments = data(toy_folder, MICRO_BSIZE=2, GRAD_ACC=2, SEED=7, TOTAL_TRAIN_STEPS=2)
    monkeypatch.setattr(sys, "argv", ["train_blockwise.py", *arguments])
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(
        blockwise.deepspeed, "init_distributed", lambda timeout: waits.append(timeout)
    )
    monkeypatch.setattr(
        blockwise.deepspeed,
        "initialize",
        lambda **_: (mock.MagicMock(get_lr=lambda: [1.0], device="cpu"),),
    )
    monkeypatch.setattr(blockwise.deepspeed, "comm", mock.MagicMock())
    monkeypatch.setattr(blockwise, "supervised_loss", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr(blockwise, "save", lambda *_: None)
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        blockwise.main()
        if rank == "0":
            shutil.copytree("ckpts_stagewise_sft_32_logs", "ckpts_stagewise_sft_32_state")
            record = json.loads(Path("ckpts_stagewise_sft_32_logs/run_config.json").read_text())
            Path("ckpts_stagewise_sft_32_state/run.json").write_text(json.dumps(record))
    first = 7 * 2**32
    assert seeds == [
        7,
        first,
        first + 4,
        first + 8,
        first + 12,
        7,
        first + 2,
        first + 6,
        first + 10,
        first + 14,
    ]
    assert waits == [timedelta(hours=2)] * 2


def test_an_infinite_loss_makes_the_gradient_bad_too(toy_folder, tmp_path, monkeypatch, blockwise):
    """DeepSpeed leaves out an update for its gradients alone; the state before it must still be there to be saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train_blockwise.py", *data(toy_folder, MICRO_BSIZE=2, TOTAL_TRAIN_STEPS=3)]
    )
    losses = iter((1.5, float("inf")))
    monkeypatch.setattr(blockwise, "supervised_loss", lambda *_: torch.tensor(next(losses)))
    monkeypatch.setattr(blockwise.deepspeed, "init_distributed", lambda timeout: None)
    engine = mock.MagicMock(get_lr=lambda: [1.0], device="cpu")
    monkeypatch.setattr(blockwise.deepspeed, "initialize", lambda **_: (engine,))
    monkeypatch.setattr(blockwise.deepspeed, "comm", mock.MagicMock())
    monkeypatch.setattr(blockwise, "save", lambda path, *_: saved.append(path))
    saved = []
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    with pytest.raises(SystemExit, match="step 2: loss inf"):
        blockwise.main()
    first, second = (call.args[0].item() for call in engine.backward.call_args_list)
    assert first == 1.5 and second != second
    assert saved[-1] == "ckpts_stagewise_sft_32_state/step0001"


@pytest.mark.parametrize("script", ["train_blockwise.py", "train_fullseq.py"])
def test_scripts_stand_alone(script, tmp_path):
    """Copied elsewhere, a trainer still runs: it needs nothing of this repository."""
    (tmp_path / script).write_text((SUITE / script).read_text())
    status, printed = launch(
        [sys.executable, script, "--PT_FILE", "none.pt", "--MODEL_NAME", "none"], tmp_path
    )
    assert status != 0 and "none.pt" in printed and "Traceback" not in printed
