"""The benchmarks measure what they say: all forms do the same work, and every figure is there."""

import json
import subprocess
import sys

import bench
import bench_decode
import numpy as np
import pytest
import torch
from suite import ROOT, user_environment
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM

SCRIPT = ROOT / "experiments" / "bench.py"
VOCABULARY = 100  # ids; the last is [MASK]
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
bench.ARGS = bench.parse_args(sys.argv[1:])
bench.main()
"""


@pytest.fixture(params=bench.TRAINERS)
def trainer(request, monkeypatch):
    """Each trainer in turn, for tiny models; its constants go back after the test."""
    module = bench.TRAINERS[request.param]
    for name in module.CONSTANTS:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    module.MASK_ID = VOCABULARY - 1
    module.MAX_LEN = 48
    module.MICRO_BSIZE = 6
    module.TOTAL_TRAIN_STEPS = 5
    if hasattr(module, "BLOCK_SIZE"):
        module.BLOCK_SIZE = 8
        module.PREFIX_MASK_RATE = 0.3
        module.SUFFIX_MASK_PROB = 0.6
    return module


def tiny_examples(trainer):
    examples = bench.random_examples(40, trainer.MAX_LEN)
    return [(prompt_len, ids % trainer.MASK_ID) for prompt_len, ids in examples]


def tiny_model(**shape):
    torch.manual_seed(0)
    config = LLaDAConfig(d_model=16, n_heads=2, mlp_hidden_size=32, vocab_size=VOCABULARY, **shape)
    return LLaDAModelLM(config)


def run(*command, folder):
    """Exit status of a Python command, and what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=user_environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_both_forms_have_the_same_batches_and_losses(trainer):
    examples = tiny_examples(trainer)
    draws, numbers = trainer.plan(examples, 1)
    model = tiny_model(n_layers=1, init_std=0.3)
    for batch in numbers[:, 0, 0]:
        input_ids, noisy_ids, loss_mask = trainer.make_batch(examples, draws, batch, 98)
        theirs, labels = bench.published_batch(trainer, examples, draws, batch, 98)
        assert torch.equal(theirs, noisy_ids)
        assert torch.equal(labels, input_ids.masked_fill(~loss_mask, bench.IGNORED))
        loss = trainer.supervised_loss(model, input_ids, noisy_ids, loss_mask)
        torch.testing.assert_close(bench.published_loss(model, theirs, labels), loss)


def test_each_form_does_its_own_work(trainer, monkeypatch):
    """FLOPs of a step, against those of the layers at all and the head at supervised positions."""

    def train_step(model, examples, draws, micro_batches, pad_id):
        batch = trainer.make_batch(examples, draws, micro_batches[0], pad_id)
        loss = trainer.supervised_loss(model, *batch)
        loss.backward()
        return loss.item()

    monkeypatch.setattr(trainer, "train_step", train_step)
    monkeypatch.setattr(bench, "PAD_ID", 98)
    examples = tiny_examples(trainer)
    draws, numbers = trainer.plan(examples, 1)
    model = tiny_model(n_layers=2)
    step = (trainer, model, examples, draws, numbers[0, :, 0])
    counted = {form: bench.count_flops(form, *step) for form in bench.FORMS}
    positions = trainer.MICRO_BSIZE * trainer.MAX_LEN
    supervised = int(trainer.make_batch(examples, draws, numbers[0, 0, 0], 98)[2].sum())
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


def test_decoding_one_by_one_and_as_a_batch():
    words = "--batch 3 --length 64 --vocabulary 64 --repeats 1".split()
    one_by_one, batch = bench_decode.measure(bench_decode.parse_args(words))["rows"].values()
    assert batch["speedup"] == one_by_one["seconds_per_answer"] / batch["seconds_per_answer"]


BAD = ["--batch 0", "--shape 70b", "--output no/folder/b.json", "--repeats -1", "--local_rank 0"]


@pytest.mark.parametrize("words", [*BAD, "--length 1", "--forms suite,other", "--method other"])
def test_bad_arguments(words, capsys):
    check_refused(bench, words, capsys)


@pytest.mark.parametrize("words", [*BAD, "--length 100", "--vocabulary 1"])
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


@pytest.mark.parametrize("script", ["bench.py", "bench_decode.py"])
def test_a_wrong_flag_is_refused_before_the_slow_imports(script, tmp_path):
    command = ["-X", "importtime", SCRIPT.with_name(script), "--batch", 0]
    status, printed = run(*command, folder=tmp_path)
    assert status == 2 and "--batch 0" in printed
    assert "argparse" in printed and "torch" not in printed
