"""The controls change one thing of Blockwise SFT, or bring LIFT into its active block."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import train_control
import train_lift
from conftest import flags, launch, prepare
from test_corruption import L, random_rows

import train_blockwise

BLOCK_SIZE = 8
ORIGINAL_CORRUPT = train_blockwise.corrupt


@pytest.fixture
def install(monkeypatch, toy_folder):
    """train_control.install, undone after the test."""
    for module in (train_blockwise, train_lift):
        prepare(module, monkeypatch, toy_folder)
        for name in ("corrupt", "schedule"):
            monkeypatch.setattr(module, name, getattr(module, name))
        monkeypatch.setattr(module, "CKPT_DIR", module.CKPT_DIR)
        for name in ("CONSTANTS", "LIMITS"):
            monkeypatch.setattr(module, name, list(getattr(module, name)))
        monkeypatch.setattr(module, "CONTROL", "", raising=False)
        monkeypatch.setattr(module, "BLOCK_SIZE", BLOCK_SIZE, raising=False)

    def installed(control):
        trainer = train_control.install(control)
        trainer.BLOCK_SIZE = BLOCK_SIZE
        return trainer

    return installed


@pytest.mark.parametrize("mask_padding", [False, True])
def test_rest_takes_the_loss_on_the_whole_rest(install, mask_padding):
    rows = random_rows(1, block_size=BLOCK_SIZE)
    _, prompt_len, length, block, _ = rows
    train_blockwise.BLOCK_SIZE, train_blockwise.MASK_PADDING = BLOCK_SIZE, mask_padding
    same_ids, block_mask = train_blockwise.corrupt(*rows)
    noisy_ids, loss_mask = install("rest").corrupt(*rows)
    assert torch.equal(noisy_ids, same_ids)
    pos = torch.arange(L)
    suffix = (prompt_len + (block + 1) * BLOCK_SIZE <= pos) & (pos < length)
    assert suffix.any() and torch.equal(loss_mask, block_mask | suffix)


def test_spans_cover_every_token_equally(install):
    """12,000 draws over an answer of 24: each of 31 places, and each token in 8 of 31 spans.

    6 standard deviations.
    """
    trainer = install("span")
    answer = 24
    examples = [(3, torch.arange(3 + answer))] * 4000 + [(3, torch.arange(5))] * 10
    draws = trainer.schedule(examples, 10**6)
    places = draws[draws[:, 0] < 4000, 1]
    assert len(places) == 12_000
    assert set(places) == set(range(1 - BLOCK_SIZE, answer))
    rate = BLOCK_SIZE / (answer + BLOCK_SIZE - 1)
    for token in range(answer):
        share = np.mean((places <= token) & (token < places + BLOCK_SIZE))
        assert abs(share - rate) < 6 * (rate * (1 - rate) / len(places)) ** 0.5
    assert np.array_equal(draws, trainer.schedule(examples, 10**6))
    trainer.SEED += 1
    assert not np.array_equal(draws[:, 1], trainer.schedule(examples, 10**6)[:, 1])


@pytest.mark.parametrize("rates", [(0.0, 1.0, False), (0.3, 0.6, True)])
def test_a_span_at_a_block_is_that_block(install, rates):
    rows = random_rows(2, block_size=BLOCK_SIZE)
    input_ids, prompt_len, length, block, noise = rows
    trainer = install("span")
    trainer.PREFIX_MASK_RATE, trainer.SUFFIX_MASK_PROB, trainer.MASK_PADDING = rates
    ours = trainer.corrupt(input_ids, prompt_len, length, block * BLOCK_SIZE, noise)
    for one, other in zip(ours, ORIGINAL_CORRUPT(*rows), strict=True):
        assert torch.equal(one, other)


def test_a_span_may_begin_before_the_answer(install):
    input_ids, prompt_len, length, _, noise = random_rows(3, block_size=L)
    trainer = install("span")
    place = torch.full_like(length, -5)
    noisy_ids, loss_mask = trainer.corrupt(input_ids, prompt_len, length, place, noise)
    pos = torch.arange(L)
    active = (prompt_len <= pos) & (pos < prompt_len + BLOCK_SIZE - 5) & (pos < length)
    assert torch.equal(loss_mask, active & (noisy_ids == trainer.MASK_ID)) and loss_mask.any()
    assert torch.equal(noisy_ids[pos < prompt_len], input_ids[pos < prompt_len])


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
    train_blockwise.BLOCK_SIZE = 99  # those of the other module do not matter
    draws = trainer.schedule(examples, 100)
    trainer.SEED += 1
    assert not np.array_equal(draws, trainer.schedule(examples, 100))
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
    for words, status, message in (
        (["--help"], 0, "usage:"),
        ([], 2, "required: --CONTROL"),
        (["--CONTROL", "x"], 2, "invalid choice: 'x'"),
    ):
        command = [sys.executable, "-S", script, *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status and message in done.stdout + done.stderr
    wrong = [sys.executable, script, "--CONTROL", "span", "--BLOCKSIZE", "3", "--LR", "-1"]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 1 and "--BLOCKSIZE: no constant of this script" in done.stderr
    assert "LR = -1" in done.stderr and "train_blockwise.py --help" in done.stderr


def test_a_control_is_trained(toy_folder, tmp_path):
    constants = {
        "MODEL_NAME": toy_folder / "model",
        "DATA_PT": toy_folder / "train.pt",
        "LORA_RANK": 4,
        "MICRO_BSIZE": 2,
        "BLOCK_SIZE": 8,
        "TOTAL_TRAIN_STEPS": 2,
    }
    command = [sys.executable, train_control.__file__, "--CONTROL", "rest", *flags(**constants)]
    status, printed = launch(command, tmp_path)
    assert status == 0, printed
    record = json.loads((tmp_path / "ckpts_rest_logs" / "run_config.json").read_text())
    assert (record["CONTROL"], record["budget"]["steps"]) == ("rest", 2)
    assert (tmp_path / "ckpts_rest_step0002" / "model.safetensors").exists()
    assert record["budget"]["supervised_tokens"] > 4 * 8  # more than four blocks have
