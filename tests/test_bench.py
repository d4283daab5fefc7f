"""The benchmark measures what it says: both forms compute the same, and every figure is there."""

import itertools
import json
import sys

import bench
import numpy as np
import pytest
import torch
from conftest import SUITE, launch
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM


@pytest.fixture
def small(trainer, monkeypatch):
    """A trainer that bench.py may change, for a vocabulary of 100 ids of which 99 is [MASK]."""
    monkeypatch.setattr(trainer, "fetch", trainer.fetch)
    trainer.MASK_ID, trainer.MAX_LEN, trainer.MICRO_BSIZE, trainer.MASK_PADDING = 99, 48, 6, False
    if hasattr(trainer, "BLOCK_SIZE"):
        trainer.BLOCK_SIZE, trainer.PREFIX_MASK_RATE, trainer.SUFFIX_MASK_PROB = 8, 0.3, 0.6
    return trainer


def test_both_forms_have_the_same_batches_and_losses(small):
    examples = [
        (prompt_len, ids % 99) for prompt_len, ids in bench.random_examples(40, small.MAX_LEN)
    ]
    draws, numbers, _ = small.plan(examples, 1)
    torch.manual_seed(0)
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16, vocab_size=100, init_std=0.3
        )
    )
    for part in numbers[:, 0, 0]:
        input_ids, noisy_ids, loss_mask = small.make_batch(examples, draws, part, 98)
        noisy, labels = bench.published_batch(small, examples, draws, part, 98)
        assert torch.equal(noisy, noisy_ids) and torch.equal(
            labels, input_ids.masked_fill(~loss_mask, -100)
        )
        ours, theirs = (
            small.supervised_loss(model, input_ids, noisy_ids, loss_mask),
            bench.published_loss,
        )
        torch.testing.assert_close(ours, theirs(model, noisy, labels))


def test_flops_are_counted_without_a_trace(small, monkeypatch):
    monkeypatch.setattr(bench, "PAD_ID", 98)
    examples = [
        (prompt_len, ids % 99) for prompt_len, ids in bench.random_examples(40, small.MAX_LEN)
    ]
    draws, numbers, _ = small.plan(examples, 1)
    model = LLaDAModelLM(
        LLaDAConfig(d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32, vocab_size=100)
    )
    part = numbers[0, 0, 0]
    counted = {
        form: bench.count_flops(form, small, model, [], "cpu", examples, draws, part)
        for form in ("published", "suite")
    }
    assert all(parameter.grad is None for parameter in model.parameters())
    layers = 2 * (
        4 * 16 * 16 + 3 * 16 * 32
    )  # weights; 2 FLOPs each a position, forward and twice more backward
    supervised = int(small.make_batch(examples, draws, part, 0)[2].sum())
    positions = len(part) * small.MAX_LEN
    assert counted["published"]["flops"] == 6 * positions * (layers + 16 * 100)
    assert counted["suite"]["flops"] == 6 * (positions * layers + supervised * 16 * 100)
    assert counted["published"]["loss"] == pytest.approx(counted["suite"]["loss"], rel=1e-4)


def test_random_examples_are_rows_of_every_length():
    examples = bench.random_examples(500, 100)
    lengths = np.array([len(ids) for _, ids in examples])
    assert lengths.min() == 50 and lengths.max() == 100
    assert all(0 < prompt_len < len(ids) and ids.max() < 126080 for prompt_len, ids in examples)


def test_the_stand_in_updates_as_adamw_does():
    torch.manual_seed(0)
    ours, theirs = (
        torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model[1].bias.requires_grad_(False)
    engine = bench.Engine(ours, 0.5)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    before = ours[0].weight.clone()
    for _ in range(4):
        x = torch.randn(6, 5)
        engine.backward(ours(x).pow(2).sum())
        engine.step()
        optimizer.zero_grad()
        theirs(x).pow(2).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    assert (ours[0].weight - before).abs().mean() > 1e-5


def test_bytes_kept_grow_with_blocks_and_rows(small, monkeypatch):
    forms = {"published": (False, False), "suite": (False, False), "checkpointed": (False, True)}
    monkeypatch.setattr(bench, "FITTED", forms)
    monkeypatch.setitem(
        bench.SHAPES, "tiny", {"d_model": 32, "n_layers": 9, "n_heads": 2, "mlp_hidden_size": 64}
    )
    small.MASK_ID, small.LORA_RANK = 126336, 4
    args = bench.parse_args(
        ["--shape", "tiny", "--device", "cpu", "--batch", "2", "--length", "48", "--lora_rank", "4"]
    )
    one, two, three = (bench.kept_bytes(small, args, layers, 2)[0] for layers in (1, 2, 3))
    for form in bench.FITTED:
        assert two[form] - one[form] == three[form] - two[form] > 0
    assert three["checkpointed"] - two["checkpointed"] < 0.2 * (three["suite"] - two["suite"])
    result = bench.measure_fit(args, small)
    assert result["trained"] == 9 * 4 * (3 * (32 + 32) + 32 + 64)
    assert result["weights bytes"] == 2 * (
        2 * 126464 * 32 + 9 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    )
    fits = result["fit"]
    assert 0 < fits["published"]["rows in 24 GB"] < fits["suite"]["rows in 24 GB"]
    assert fits["suite"]["rows in 24 GB"] < fits["checkpointed"]["rows in 24 GB"]
    assert fits["suite"]["rows in 24 GB"] < fits["suite"]["rows in 141 GB"]


WITHOUT = "import sys; sys.modules['deepspeed'] = None; import bench; bench.main()"
COMMANDS = {"deepspeed": [str(SUITE / "experiments" / "bench.py")], "stand-in": ["-c", WITHOUT]}


@pytest.mark.parametrize("engine", COMMANDS)
def test_the_command(engine, tmp_path):
    words = "--shape toy --device cpu --batch 2 --length 64 --lora_rank 8 --repeats 1 --forms published,suite".split()
    environment = {"PYTHONPATH": str(SUITE / "experiments")}
    status, printed = launch(
        [sys.executable, *COMMANDS[engine], *words, "--output", "b.json"], tmp_path, **environment
    )
    assert status == 0, printed
    result = json.loads((tmp_path / "b.json").read_text())
    published, ours = result["forms"]["published"], result["forms"]["suite"]
    # the published form's loss is bfloat16, whose eight digits round otherwise on another processor
    assert published["loss of a batch"] == pytest.approx(ours["loss of a batch"], rel=2**-7)
    assert result["speedup"] == published["step seconds"] / ours["step seconds"]
    assert result["memory_ratio"] == ours["peak bytes"] / published["peak bytes"]
    assert result["share_of_matrix_rate"] == ours["FLOP/s"] / result["matrix FLOP/s"]
    assert result["ranks"] == 1 and ("DeepSpeed" in result["engine"]) == (engine == "deepspeed")
    # the head's products, forward and backward, at 128 positions instead of the supervised ones
    flops = [form["FLOP/s"] * form["step seconds"] for form in (published, ours)]
    assert 0 < flops[0] - flops[1] <= 2 * 2 * 128 * 96 * 126464
    assert result["save"]["bytes"] > 2 * 2 * 96 * 126464 and result["save"]["seconds"] > 0
    assert "speedup" in printed and result["settings"]["batch"] == 2
    status, printed = launch(
        [sys.executable, *COMMANDS[engine], *words, "--output", "b.json"], tmp_path, **environment
    )
    assert status == 2 and "exists already" in printed and "Traceback" not in printed


def test_out_of_memory_leaves_the_other_forms(monkeypatch, trainer):
    monkeypatch.setattr(bench, "deepspeed", None)
    monkeypatch.setattr(trainer, "fetch", trainer.fetch)
    monkeypatch.setitem(bench.TRAINERS, "blockwise", trainer)

    def full(loss, calls):
        """`loss`, out of memory from the second step on: the FLOPs of two rows are counted before the first."""
        return lambda *batch: next(calls)(loss, *batch)

    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    times = lambda: itertools.chain(
        [lambda loss, *batch: loss(*batch)] * 3, itertools.repeat(no_room)
    )
    monkeypatch.setattr(bench, "published_loss", full(bench.published_loss, times()))
    words = "--device cpu --batch 2 --length 32 --lora_rank 4 --repeats 2 --no_save --forms published,suite"
    result = bench.measure_all(bench.parse_args(words.split()), trainer)
    assert result["forms"]["published"] == {"error": "out of memory"} and "speedup" not in result
    assert result["form"] == "suite" and result["forms"]["suite"]["step seconds"] > 0
    monkeypatch.setattr(trainer, "supervised_loss", full(trainer.supervised_loss, times()))
    with pytest.raises(SystemExit, match="lower --batch 2"):
        bench.measure_all(bench.parse_args([*words.split()[:-1], "suite"]), trainer)


def test_what_cannot_be_compiled_leaves_the_other_forms(monkeypatch, blockwise):
    monkeypatch.setattr(bench, "deepspeed", None)
    monkeypatch.setattr(blockwise, "fetch", blockwise.fetch)

    def fails(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda part: fails)
    words = "--device cpu --batch 2 --length 32 --lora_rank 4 --repeats 2 --no_save --forms compiled,suite"
    result = bench.measure_all(bench.parse_args(words.split()), blockwise)
    assert result["form"] == "suite" and result["forms"]["compiled"] == {
        "error": "not compiled: RuntimeError"
    }


def test_pt_is_measured(monkeypatch):
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {0, 1})
    result = bench.measure_pt(bench.parse_args(["--part", "pt", "--rows", "1200"]))
    one, *others = result["processes"].values()
    assert list(result["processes"]) == ["one row", "0 workers", "1 workers", "2 workers"]
    for figures in others:
        assert figures["rows/s"] == 1200 / figures["seconds"] and figures["peak bytes"] > 1e8
        assert figures["file bytes"] == others[0]["file bytes"] > 100 * one["file bytes"]


@pytest.mark.parametrize(
    "words",
    [
        "--batch 0",
        "--length 1",
        "--forms suite,other",
        "--shape 70b",
        "--output no/folder/b.json",
        "--rows -1",
    ],
)
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse_args(words.split())
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        stopped.value.code == 2
        and words.split()[0] in message
        and words.split()[1].split(",")[-1] in message
    )


def test_decoding_one_by_one_and_as_a_batch():
    words = "--part decode --device cpu --batch 3 --length 64 --vocabulary 64".split()
    result = bench.measure_decode(bench.parse_args(words))
    assert all(0 < row["share of the head"] < 1 for row in result["decode"].values())
    one, batch = (
        result["decode"][form]["seconds an answer"] for form in ("one by one", "one batch")
    )
    assert result["batch_speedup"] == one / batch
    with pytest.raises(SystemExit):
        bench.parse_args([*words, "--length", "100"])
