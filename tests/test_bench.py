"""The benchmarks measure what they say: all forms do the same work, and every figure is there."""

import json
import os
import sys
from types import SimpleNamespace

import bench
import bench_decode
import numpy as np
import pytest
import torch
from helpers import constants, launch, small_llada
from suite import ROOT

import train_blockwise

SCRIPT = ROOT / "experiments" / "bench.py"
VOCABULARY = 100  # ids; the last is [MASK]
PAD_ID = 98
TINY = "--device cpu --batch 2 --length 64 --lora_rank 4".split()
NUMBERS = "loss flops step_seconds tokens_per_second matrix_share peak_bytes speedup memory_ratio"

# bench.py on a published form that runs out of memory in the middle of its third backward pass
OUT_OF_MEMORY = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import bench, torch
published_loss = bench.published_loss
calls = []
def full(gradient):
    raise torch.OutOfMemoryError("no room")
def watch(module, inputs, output):
    output.register_hook(full)
def loss(model, noisy_ids, labels):
    calls.append(model)
    if len(calls) == 3:
        model.get_base_model().model.transformer.blocks[1].register_forward_hook(watch)
    return published_loss(model, noisy_ids, labels)
bench.published_loss = loss
bench.main(bench.parse_args())
"""


@pytest.fixture
def args(trainer):
    """The constants of `trainer` for a tiny model."""
    tiny = {"MASK_ID": VOCABULARY - 1, "MAX_LEN": 48, "MICRO_BSIZE": 6, "TOTAL_TRAIN_STEPS": 5}
    if hasattr(trainer, "BLOCK_SIZE"):
        tiny |= {"BLOCK_SIZE": 8, "PREFIX_MASK_RATE": 0.3, "SUFFIX_MASK_PROB": 0.6}
    return constants(trainer, **tiny)


def tiny_model(**shape):
    return small_llada(vocab_size=VOCABULARY, mask_token_id=VOCABULARY - 1, **shape).train()


def tiny_run(trainer, args, **shape):
    """A run as bench.py's forms take it, on a tiny model without an engine."""
    examples = bench.random_examples(40, args.MAX_LEN)
    examples = [(prompt_len, ids % args.MASK_ID) for prompt_len, ids in examples]
    draws, _ = trainer.plan(args, trainer.METHOD, examples, 1)
    return SimpleNamespace(examples=examples, draws=draws, engine=tiny_model(**shape))


def run(*command, folder):
    """Exit status of a Python command, and what it printed."""
    return launch([sys.executable, *map(str, command)], folder, OMP_NUM_THREADS="1")


# ------- shapes, and what fits
def test_the_shapes_are_those_of_their_models():
    """Weights in billions, and bidirectional attention in those that are causal elsewhere."""
    known = {"8b": 8.02, "0.6b": 0.596, "dream-7b": 7.62, "moe-7b": 7.36}
    for shape, weights in known.items():
        model = bench.random_model(shape, "meta", torch.bfloat16)
        assert model.num_parameters() / 1e9 == pytest.approx(weights, rel=0.005)
    for shape in ("toy", "toy-moe", "0.6b", "dream-7b"):
        small = {}
        if shape in ("0.6b", "dream-7b"):
            small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 8}
        model = bench.random_model(shape, "cpu", torch.bfloat16, **small, vocab_size=64)
        train_blockwise.check_sees_later(SimpleNamespace(MODEL_NAME=shape), model)
        assert model(input_ids=torch.zeros(1, 3).long(), attention_mask=None).logits.dim() == 3


def test_what_fits_is_the_fastest_setting_that_does():
    rows = []
    for checkpointing, size, needed in ((0, 1, 9), (0, 2, 17), (0, 4, 33), (1, 4, 10), (1, 8, 20)):
        row = {"COMPILE": True, "ACTIVATION_CHECKPOINTING": bool(checkpointing)}
        rows.append(row | {"MICRO_BSIZE": size, "GRAD_ACC": 32 // size, "computed_bytes": needed})
    assert bench.describe_fit(rows, 8) == "nothing fits"
    assert bench.describe_fit(rows, 20).startswith("MICRO_BSIZE 2, GRAD_ACC 16, ACTIVATION_CH")
    rows[1]["peak_bytes"] = 100  # what was measured counts
    assert "MICRO_BSIZE 1, " in bench.describe_fit(rows, 20)
    rows[0]["error"] = "OutOfMemoryError"
    assert bench.describe_fit(rows, 20).startswith("MICRO_BSIZE 4, GRAD_ACC 8, ACTIVATION_CH")
    assert bench.describe_fit(rows, 20).endswith("computed")
    rows[2] |= {"peak_bytes": 11e9, "step_seconds": 0.5}
    assert bench.describe_fit(rows, 24e9).endswith("False: 11.0 GB, 0.5 s")


@pytest.mark.slow
def test_fit_measures_every_setting(tmp_path):
    command = [SCRIPT, "--fit", *TINY, "--rows", 4, "--repeats", 1, "--output", "fit.json"]
    command += ["--shape", "toy-moe"]
    status, printed = run(*command, folder=tmp_path)
    assert status == 0, printed
    rows = list(json.loads((tmp_path / "fit.json").read_text())["rows"].values())
    assert [row["MICRO_BSIZE"] for row in rows] == [1, 2] * 4
    for row in rows:
        assert "error" in row or row["peak_bytes"] > 0 < row["step_seconds"]
        assert row["computed_bytes"] > 0 and row["MICRO_BSIZE"] * row["GRAD_ACC"] == 4
    assert not any("error" in row for row in rows if not row["COMPILE"])
    assert "12 GB: MICRO_BSIZE" in printed and "nothing fits" not in printed


# ------- the forms
def test_both_forms_have_the_same_batches_and_losses(trainer, args):
    run = tiny_run(trainer, args, n_layers=1)
    for draws in run.draws[:, 0, 0]:
        input_ids, noisy_ids, loss_mask = trainer.make_batch(args, run.examples, draws, PAD_ID)
        theirs, labels = bench.published_batch(args, run.examples, draws, PAD_ID)
        assert torch.equal(theirs, noisy_ids)
        assert torch.equal(labels, input_ids.masked_fill(~loss_mask, bench.IGNORED))
        loss = trainer.supervised_loss(args, run.engine, input_ids, noisy_ids, loss_mask)
        torch.testing.assert_close(bench.published_loss(run.engine, theirs, labels), loss)


@pytest.mark.parametrize("shift", [False, True])
def test_both_forms_shift_the_logits_alike(trainer, args, shift, monkeypatch):
    monkeypatch.setattr(bench, "PAD_ID", PAD_ID)
    args.LOGIT_SHIFT = shift
    run = tiny_run(trainer, args, n_layers=1)
    run.examples = [(length, ids % PAD_ID) for length, ids in run.examples]
    losses = []
    for form in ("published", "suite"):
        losses.append(bench.micro_batch_loss(form, trainer, args, run, run.draws[0, 0, 0]))
    torch.testing.assert_close(*losses)


def test_each_form_does_its_own_work(trainer, args, monkeypatch):
    """FLOPs of a step, against those of the layers at all and the head at supervised positions."""

    def train_step(args, run, step, micro_batch_loss):
        loss = micro_batch_loss(run.draws[step - 1, 0, 0])
        loss.backward()
        return loss.item()

    monkeypatch.setattr(trainer, "train_step", train_step)
    monkeypatch.setattr(bench, "PAD_ID", PAD_ID)
    run = tiny_run(trainer, args, n_layers=2)
    counted = {form: bench.count_flops(form, trainer, args, run, 1) for form in bench.FORMS}
    positions = args.MICRO_BSIZE * args.MAX_LEN
    supervised = int(trainer.make_batch(args, run.examples, run.draws[0, 0, 0], PAD_ID)[2].sum())
    # 2 FLOPs per weight and position, three times: forward, gradient of inputs and of weights
    layers = 6 * positions * 2 * (4 * 16 * 16 + 3 * 16 * 32)
    assert counted["published"]["flops"] == layers + 6 * positions * 16 * VOCABULARY
    assert counted["suite"]["flops"] == layers + 6 * supervised * 16 * VOCABULARY
    assert counted["compiled"]["flops"] == counted["suite"]["flops"]
    assert counted["published"]["loss"] == pytest.approx(counted["suite"]["loss"], rel=1e-4)


def test_random_examples_are_rows_of_every_length():
    examples = bench.random_examples(500, 100)
    lengths = np.array([len(ids) for _, ids in examples])
    assert lengths.min() == 50 and lengths.max() == 100
    assert all(0 < prompt_len < len(ids) for prompt_len, ids in examples)
    assert all(ids.max() < bench.PAD_ID for _, ids in examples)


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [SCRIPT, *TINY, "--forms", "published,suite", "--repeats", 2, "--output", "b.json"]
    status, printed = run(*command, folder=tmp_path)
    assert status == 0, printed
    result = json.loads((tmp_path / "b.json").read_text())
    published, suite = result["rows"]["published"], result["rows"]["suite"]
    for row in (published, suite):
        assert set(NUMBERS.split()) <= set(row) and len(row["seconds"]) == 2 * bench.TIMED_STEPS
        assert min(row["seconds"]) <= row["step_seconds"] <= max(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["step_seconds"])
    assert suite["speedup"] == published["step_seconds"] / suite["step_seconds"]
    assert suite["memory_ratio"] == suite["peak_bytes"] / published["peak_bytes"]
    rate = result["matrix_rate"] * suite["matrix_share"]
    assert rate == pytest.approx(suite["flops"] / suite["step_seconds"])
    # the published loss is rounded to bfloat16
    assert published["loss"] == pytest.approx(suite["loss"], rel=2**-7)
    # the frozen head's products, forward and of its inputs' gradient, at unsupervised positions
    unsupervised, rest = divmod(published["flops"] - suite["flops"], 2 * 2 * 96 * 126464)
    assert rest == 0 and 0 < unsupervised < 2 * 64
    assert "speedup" in printed and result["settings"]["batch"] == 2
    status, printed = run(*command, folder=tmp_path)
    assert status == 2 and "exists" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_out_of_memory_leaves_the_other_forms(tmp_path):
    command = ["-c", OUT_OF_MEMORY, *TINY, "--repeats", 2, "--forms", "published,suite"]
    status, printed = run(*command, "--output", "b.json", folder=tmp_path)
    assert status == 0, printed
    assert "published: OutOfMemoryError: no room" in printed
    published, suite = json.loads((tmp_path / "b.json").read_text())["rows"].values()
    assert "speedup" not in suite and "step_seconds" not in published
    assert len(suite["seconds"]) == 2 * bench.TIMED_STEPS and 11 < suite["loss"] < 13


def test_saving(trainer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    row = bench.measure_save(bench.parse_args([*TINY, "--repeats", "1"]), trainer)["rows"]["save"]
    assert row["bytes"] > 2 * 2 * 96 * 126464
    assert row["ratio"] == row["seconds"][0] / row["plain_seconds"][0]
    assert list(tmp_path.iterdir()) == []


def measure_decoding(words):
    small = "--batch 3 --length 64 --vocabulary 64 --repeats 1".split()
    return bench_decode.measure(bench_decode.parse_args(small + words.split()))["rows"]


def test_decoding_one_by_one_and_as_a_batch():
    rows = measure_decoding("--threshold 0.001")
    assert list(rows) == ["one by one", "as a batch", "prefix", "dual", "threshold"]
    one_by_one, batch, threshold = rows["one by one"], rows["as a batch"], rows["threshold"]
    assert batch["speedup"] == one_by_one["seconds_per_answer"] / batch["seconds_per_answer"]
    assert (one_by_one["forwards"], batch["forwards"]) == (3 * 16, 16)
    assert threshold["forwards"] < 16  # all tokens are above it
    assert all(row["tokens_per_second"] > 0 < row["peak_bytes"] for row in rows.values())


def test_decoding_without_a_cache_and_with_it(monkeypatch):
    """The same answers, of as many forward passes."""
    answers = []
    decode = bench_decode.decode

    def keep(*prompts, **options):
        answers.append(decode(*prompts, **options))

    monkeypatch.setattr(bench_decode, "decode", keep)
    rows = measure_decoding("--shape toy-qwen3 --block_causal 4")
    assert list(rows) == ["no cache", "cache"]
    assert [row["forwards"] for row in rows.values()] == [16, 16]
    assert torch.equal(*answers)


BAD = ["--batch 0", "--shape 70b", "--output no/folder/b.json", "--repeats -1", "--local_rank 0"]


@pytest.mark.parametrize("words", [*BAD, "--length 1", "--forms suite,other", "--method other"])
def test_bad_arguments(words, capsys):
    check_refused(bench, words, capsys)


@pytest.mark.parametrize(
    "words", [*BAD, "--length 100", "--vocabulary 1", "--threshold 2", "--block_causal 0"]
)
def test_bad_arguments_of_decoding(words, capsys):
    check_refused(bench_decode, words, capsys)


def check_refused(script, words, capsys):
    """The last line names the flag and its value."""
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(words.split())
    flag, value = words.split()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert flag in message and value.split(",")[-1] in message


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device", "cuda"], []])
def test_the_cpu_is_measured_without_a_gpu(words, monkeypatch):
    """As DeepSpeed prefers a GPU, the program starts again without one, and only then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    started = []
    monkeypatch.setattr(os, "execve", lambda *how: started.append(how))
    bench.hide_gpu(bench.parse_args(words))
    if "cpu" not in words:
        assert started == []
        return
    [(path, command, environment)] = started
    assert path == command[0] == sys.executable and command[1:] == sys.orig_argv[1:]
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_gpu_that_is_not_there(capsys):
    for script in (bench, bench_decode):
        check_refused(script, "--device cuda", capsys)
