"""Runs as a user starts them, and what they leave behind."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    SUITE,
    constants,
    draws_of,
    flags,
    launch,
    launcher,
    losses,
    user_environment,
    wait_until,
)
from safetensors.torch import load_file


def data(toy_folder, **constants):
    model = {"MODEL_NAME": toy_folder / "model", "DATA_PT": toy_folder / "train.pt"}
    return flags(**model, LORA_RANK=4, **constants)


def run_on_two_nodes(script, constants, folder):
    """A torchrun on each of two nodes, here both on this machine; returns their exit statuses."""
    torchrun = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1"]
    torchrun += ["--master_addr", "127.0.0.1", "--master_port", launcher(2)[-1]]
    nodes = []
    for rank in ("0", "1"):
        node = subprocess.Popen(
            [*torchrun, "--node_rank", rank, script, *constants],
            cwd=folder,
            env=user_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        nodes.append(node)
    try:
        return [node.wait(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # if one hangs; torchrun ends its ranks


def snippet_of_the_pages(word):
    """The python block of the pages that contains `word`."""
    blocks = []
    for page in [SUITE / "README.md", *(SUITE / "experiments" / "docs").glob("*.md")]:
        blocks += re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    (block,) = [block for block in blocks if word in block]
    return block


@pytest.mark.slow
def test_two_ranks_uneven_data_accumulation_and_an_early_end(toy_folder, tmp_path):
    """7 rows on 2 ranks, micro-batches of 2, accumulated twice: every block once, then the end.

    The published script counts, logs and saves a micro-batch early, hangs on uneven shards, refuses
    fewer than 10 steps, and saves nothing if it ends early.
    """
    rows = torch.load(toy_folder / "train.pt", weights_only=True)[:7]
    torch.save(rows, tmp_path / "seven.pt")
    block_size = 16
    blocks = sum(math.ceil((len(row["full_ids"]) - row["prompt_len"]) / block_size) for row in rows)
    steps = blocks // 8
    assert steps >= 3  # the first two have learning rate 0
    sizes = {"BLOCK_SIZE": block_size, "MICRO_BSIZE": 2, "GRAD_ACC": 2}
    constants = data(toy_folder, **sizes, LR=1e-2, TOTAL_TRAIN_STEPS=100, SAVE_EVERY=2)
    (tmp_path / "ckpts_stagewise_sft_32_logs").mkdir()
    (tmp_path / "ckpts_stagewise_sft_32_logs" / "mine.txt").write_text("")  # a taken name
    command = [*launcher(2), SUITE / "train_blockwise.py", *constants, "--DATA_PT", "seven.pt"]
    status, printed = launch(command, tmp_path)
    assert status == 0, printed

    logs = tmp_path / "ckpts_stagewise_sft_32_logs-v2"
    assert len(losses(logs)) == steps
    assert os.listdir(tmp_path / "ckpts_stagewise_sft_32_logs") == ["mine.txt"]
    saved = {path.name for path in tmp_path.iterdir() if "_step" in path.name}
    due = {step for step in range(1, steps + 1) if step % 2 == 0} | {steps}
    assert saved == {f"ckpts_stagewise_sft_32_step{step:04d}-v2" for step in due}
    check_records(logs, tmp_path / "seven.pt", steps, blocks, printed)
    last = f"ckpts_stagewise_sft_32_step{steps:04d}-v2"
    check_adapted_weights(toy_folder / "model", tmp_path / last)
    check_loading(last, tmp_path)


def check_records(logs, data_pt, steps, blocks, printed):
    """What the run above has recorded and said of itself."""
    run = json.loads((logs / "run_config.json").read_text())
    budget = run["budget"]
    assert (run["world_size"], budget["steps"], budget["global_batch"]) == (2, steps, 8)
    assert (budget["draws"], budget["draws_left_out"]) == (8 * steps, blocks % 8)
    assert run["GRAD_ACC"] == 2 and run["versions"]["torch"] == version("torch")
    assert run["data_sha256"] == hashlib.sha256(data_pt.read_bytes()).hexdigest()
    assert budget["forward_tokens"] == 8 * steps * 256
    assert 2 < budget["supervised_tokens"] / budget["draws"] < 13  # about half a block
    for name in ("draws_left_out", "forward_tokens", "supervised_tokens"):
        assert re.search(rf"^{name} +{budget[name]:,}$", printed, re.M)
    assert printed.count("supervised_tokens") == 1  # rank 0 alone speaks
    trained = 3 * (3 * (96 + 96) + 96 + 256) * 4
    assert f"trained weights: {trained:,} of " in printed
    ablation = json.loads((logs / "ablation_config.json").read_text())
    assert ablation == {"PREFIX_MASK_RATE": 0.0, "SUFFIX_MASK_PROB": 1.0, "BLOCK_SIZE": 16}
    scheduler = json.loads((logs / "ds_zero2.json").read_text())["scheduler"]["params"]
    assert scheduler["total_num_steps"] == steps


def check_adapted_weights(base_folder, tuned_folder):
    """The checkpoint differs from the base in the adapted layers, and nowhere else."""
    base = load_file(base_folder / "model.safetensors")
    tuned = load_file(tuned_folder / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    expected = set()
    for layer in range(3):
        for kind in ("q_proj", "k_proj", "v_proj", "up_proj"):
            expected.add(f"model.transformer.blocks.{layer}.{kind}.weight")
    assert changed == expected


def check_loading(checkpoint, folder):
    """The way of loading a checkpoint that the pages give works."""
    snippet = re.sub(r'"ckpts_[^"]*"', repr(checkpoint), snippet_of_the_pages("from_pretrained"))
    snippet = snippet.replace('"cuda"', '"cpu"') + "\nprint(logits.shape)"
    command = [sys.executable, "-c", snippet]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "126464" in done.stdout


@pytest.mark.slow
def test_ranks_nodes_and_accumulation_share_a_batch_without_changing_it(toy_folder, tmp_path):
    """The same losses, but for rounding, from batches of 4 rows made up in four ways.

    As 4 rows, two accumulated micro-batches, two ranks of one node, and two of two nodes. In the
    published script, steps, logged losses and noise depend on how a batch is made up. The plain
    processes find no compiler.
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
    nodes = [*constants, *flags(MICRO_BSIZE=2, CKPT_DIR="nodes")]
    assert run_on_two_nodes(script, nodes, tmp_path) == [0, 0]

    names = ("one", "accumulated", "two", "nodes")
    first, *others = [losses(tmp_path / f"{name}_logs") for name in names]
    assert len(first) == 8
    for other in others:
        assert max(abs(a - b) for a, b in zip(first, other, strict=True)) < 0.02
    assert abs(first[0] - first[-1]) > 0.1  # the weights have moved by far more than that
    records = [tmp_path / f"{name}_logs" / "run_config.json" for name in names]
    budgets = [json.loads(record.read_text())["budget"] for record in records]
    assert all(budget == budgets[0] for budget in budgets)
    folders = [f"{name}_{kind}" for name in names for kind in ("logs", "step0008")]
    assert sorted(os.listdir(tmp_path)) == sorted(folders)
    assert not (tmp_path / "one_logs" / "ablation_config.json").exists()


def heed_interrupts():
    """Undo what a shell does to its background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_run_can_be_resumed(toy_folder, tmp_path):
    constants = data(toy_folder, MICRO_BSIZE=2, TOTAL_TRAIN_STEPS=100)
    run = subprocess.Popen(
        [sys.executable, SUITE / "train_blockwise.py", *constants],
        env={**os.environ, "PYTHONPATH": ""},
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=heed_interrupts,
    )
    log = tmp_path / "ckpts_stagewise_sft_32_logs" / "train_loss.csv"
    wait_until(lambda: log.exists() and log.read_text().count("\n") > 2, run)
    run.send_signal(signal.SIGINT)
    printed = run.communicate(timeout=60)[0]
    assert run.returncode == 1, printed  # sys.exit's; an interrupt that nobody catches is another
    assert printed.count("stopped: KeyboardInterrupt ; repeat the command to resume") == 1, printed
    assert len(losses(log.parent)) >= 2
    assert os.listdir(tmp_path) == ["ckpts_stagewise_sft_32_logs"]
    assert (log.parent / "state").is_dir()


class Engine:
    """DeepSpeed's engine as train_step uses it; notes what dropout would draw."""

    device = "cpu"

    def __init__(self):
        self.drawn = []
        self.losses = []

    def get_lr(self):
        return [3e-4]

    def backward(self, loss):
        self.losses.append(loss.item())

    def step(self):
        self.drawn.append(torch.rand(4).tolist())

    def was_step_applied(self):
        return True


def step_of(trainer, micro_batches, loss=1.5, **changes):
    """The engine and run of a step of these ids, (GRAD_ACC, MICRO_BSIZE), and its loss."""
    args = constants(trainer, GRAD_ACC=len(micro_batches), **changes)
    draws = np.stack([draws_of(ids) for ids in micro_batches])[None, :, None]
    run = SimpleNamespace(engine=Engine(), draws=draws)
    seen = []

    def micro_batch_loss(draws):
        seen.append(draws["id"].tolist())
        return torch.tensor(loss)

    mean = trainer.train_step(args, run, 1, micro_batch_loss)
    assert seen == micro_batches
    return run, mean


def test_a_step_is_the_mean_over_its_micro_batches(trainer, one_rank):
    run, mean = step_of(trainer, [[0, 1], [4, 5]])
    assert mean == 1.5 and run.engine.losses == [1.5, 1.5] and run.lr == 3e-4


@pytest.mark.parametrize(("loss", "applied"), [(math.nan, True), (math.inf, True), (1.5, False)])
def test_a_step_that_is_not_finite_ends_the_run(trainer, one_rank, monkeypatch, loss, applied):
    monkeypatch.setattr(Engine, "was_step_applied", lambda engine: applied)
    with pytest.raises(SystemExit, match=rf"step 1: loss {loss} or gradient not finite on rows"):
        step_of(trainer, [[0, 1]], loss)


def test_dropout_is_a_function_of_seed_and_draws(trainer, one_rank):
    """torch.manual_seed keeps 32 bits on a CPU, with which `SEED << 32 | draw` ignores SEED."""

    def drawn(seed, micro_batches):
        return step_of(trainer, micro_batches, SEED=seed)[0].engine.drawn

    first = drawn(7, [[0, 1], [4, 5]])
    assert first == drawn(7, [[0, 1], [4, 5]])
    assert first[1:] == drawn(7, [[4, 5]])
    assert first[0] != first[1]
    other = drawn(8, [[0, 1], [4, 5]])
    assert other[0] != first[0] and other[1] != first[1]


def test_dropout_and_noise_draw_from_other_streams():
    """(SEED, n) for noise, (SEED, 0, 1) for the schedule, (SEED, n, 2) for dropout."""
    keys = [(42,), (42, 1), (42, 0, 1), (42, 0, 2), (42, 1, 2)]
    drawn = [np.random.default_rng(key).integers(2**63) for key in keys]
    assert len(set(drawn)) == len(keys)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"LOCAL_SIZE": "2"}, 4),  # set by deepspeed
        ({"LOCAL_WORLD_SIZE": "3"}, 2),  # set by torchrun
        ({"LOCAL_SIZE": "16"}, 1),
        ({}, 8),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "3"}, None),
    ],
)
def test_ranks_share_the_cores(trainer, one_rank, monkeypatch, environment, threads):
    """And rank 0 may take two hours to save, while the others wait."""
    waits, given = [], []
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        trainer.deepspeed, "init_distributed", lambda timeout: waits.append(timeout)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    trainer.init_distributed()
    assert given == ([] if threads is None else [threads])
    assert waits == [timedelta(hours=2)]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_blockwise.py", "train_fullseq.py"])
def test_scripts_stand_alone(script, tmp_path):
    """Copied elsewhere, a trainer still runs: it needs nothing of this repository."""
    (tmp_path / script).write_text((SUITE / script).read_text())
    command = [sys.executable, script, "--DATA_PT", "none.pt", "--MODEL_NAME", "none"]
    status, printed = launch(command, tmp_path)
    assert status != 0 and "none.pt" in printed and "Traceback" not in printed
