"""The controls change one thing of Blockwise SFT, or bring LIFT into its active block."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import train_control
import train_lift
from conftest import prepare
from test_corruption import L, random_rows

import train_blockwise

BLOCK_SIZE = 8


@pytest.fixture
def install(monkeypatch, toy_folder):
    """train_control.install, undone after the test."""
    for module in (train_blockwise, train_lift):
        prepare(module, monkeypatch, toy_folder)
        for name in ("corrupt", "schedule"):
            monkeypatch.setattr(module, name, getattr(module, name))
        for name in ("CONSTANTS", "LIMITS"):
            monkeypatch.setattr(module, name, list(getattr(module, name)))
        monkeypatch.setattr(module, "CONTROL", "", raising=False)
        monkeypatch.setattr(module, "BLOCK_SIZE", BLOCK_SIZE, raising=False)

    def installed(control):
        trainer = train_control.install(control)
        trainer.BLOCK_SIZE = BLOCK_SIZE
        return trainer

    return installed


def test_causal_takes_the_loss_on_the_whole_rest(install):
    rows = random_rows(1, block_size=BLOCK_SIZE)
    _, prompt_len, length, block, _ = rows
    train_blockwise.BLOCK_SIZE = BLOCK_SIZE
    same_ids, block_mask = train_blockwise.corrupt(*rows)
    noisy_ids, loss_mask = install("causal").corrupt(*rows)
    assert torch.equal(noisy_ids, same_ids)
    pos = torch.arange(L)
    suffix = (prompt_len + (block + 1) * BLOCK_SIZE <= pos) & (pos < length)
    assert suffix.any() and torch.equal(loss_mask, block_mask | suffix)


def test_spans_lie_anywhere_in_the_answer(install):
    """1,200 draws of 17 places: all are drawn, but for a chance of 17 (16 / 17)^1200 < 1e-30."""
    trainer = install("span")
    answer = 24
    examples = [(3, torch.arange(3 + answer))] * 400 + [(3, torch.arange(5))] * 10
    draws = trainer.schedule(examples, 10_000)
    long = draws[:, 0] < 400
    assert set(draws[long, 1]) == set(range(answer - BLOCK_SIZE + 1))
    assert set(draws[~long, 1]) == {0}
    assert np.array_equal(draws, trainer.schedule(examples, 10_000))
    trainer.SEED += 1
    assert not np.array_equal(draws[:, 1], trainer.schedule(examples, 10_000)[:, 1])


def test_a_span_is_a_block_with_a_clean_prefix_and_a_hidden_suffix(install):
    input_ids, prompt_len, length, _, noise = random_rows(2, block_size=L)
    place = torch.minimum(torch.full_like(length, 5), length - prompt_len - 1)
    trainer = install("span")
    noisy_ids, loss_mask = trainer.corrupt(input_ids, prompt_len, length, place, noise)
    pos, first = torch.arange(L), prompt_len + place
    before, behind = pos < first, (first + BLOCK_SIZE <= pos) & (pos < length)
    assert torch.equal(noisy_ids[before], input_ids[before])
    assert (noisy_ids[behind] == trainer.MASK_ID).all() and behind.any()
    inside = (first <= pos) & (pos < first + BLOCK_SIZE) & (pos < length)
    assert torch.equal(loss_mask, inside & (noisy_ids == trainer.MASK_ID))


def test_lift_in_the_active_block(install):
    """Inside it LIFT's own corruption of a row whose answer is the block; around it blockwise."""
    input_ids, prompt_len, length, block, _ = random_rows(3, block_size=BLOCK_SIZE)
    noise = torch.rand(len(length), 2 + 2 * L)
    first = prompt_len + block * BLOCK_SIZE
    end = torch.minimum(first + BLOCK_SIZE, length)
    alone = train_lift.corrupt(input_ids, first, end, block, noise)
    trainer = install("lift-block")
    noisy_ids, *rest = trainer.corrupt(input_ids, prompt_len, length, block, noise)
    pos = torch.arange(L)
    suffix = (end <= pos) & (pos < length)
    assert (noisy_ids[suffix] == trainer.MASK_ID).all() and suffix.any()
    assert torch.equal(noisy_ids[~suffix], alone[0][~suffix])
    for ours, theirs in zip(rest, alone[1:], strict=True):
        assert torch.equal(ours, theirs)
    examples = [(3, torch.arange(3 + 20))] * 5
    train_blockwise.BLOCK_SIZE = 99  # that of the other module does not matter
    draws = trainer.schedule(examples, 100)
    assert sorted(map(tuple, draws)) == [(sample, b) for sample in range(5) for b in range(3)]


@pytest.mark.parametrize("control", train_control.CONTROLS)
def test_a_run_records_its_control(install, control):
    trainer = install(control)
    assert trainer.CONTROL == control and "CONTROL" in trainer.CONSTANTS
    assert trainer.read_overrides(["--BLOCK_SIZE", "4"]) == [] and trainer.BLOCK_SIZE == 4
    assert trainer.check_constants() == []
    trainer.read_overrides(["--BLOCK_SIZE", "0"])
    assert "BLOCK_SIZE = 0" in trainer.check_constants()[0]


def test_mistakes():
    """By a Python without any library (-S), except for a constant, which the trainer reads."""
    script = train_control.__file__
    for words, message in ((["--help"], "usage:"), ([], "--CONTROL"), (["--CONTROL", "x"], "span")):
        done = subprocess.run(
            [sys.executable, "-S", script, *words], capture_output=True, text=True
        )
        assert message in done.stdout + done.stderr and "Traceback" not in done.stderr
    wrong = [sys.executable, script, "--CONTROL", "span", "--BLOCKSIZE", "3"]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 1 and "--BLOCKSIZE: no constant of this script" in done.stderr
    assert importlib.import_module("train_blockwise").BLOCK_SIZE == 32
