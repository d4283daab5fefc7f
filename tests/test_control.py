"""The controls change one thing of Blockwise SFT, or bring LIFT into its active block."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import train_control
import train_lift
import train_opdlm
from helpers import L, draws_of, flags, launch, random_noise, random_rows

import train_blockwise
import train_fullseq

BLOCK_SIZE = 8
# answers of every length from 1 to 40, after prompts of several lengths
EXAMPLES = [(1 + n % 5, torch.arange(100, 100 + 1 + n % 5 + n)) for n in range(1, 41)]


def control(name, **changes):
    """The constants of a control, as its functions take them, and the functions."""
    constants, _ = train_control.constants_of(name)
    args = Namespace(**constants | {"BLOCK_SIZE": BLOCK_SIZE, "MAX_LEN": L} | changes)
    return args, train_control.CONTROLS[name].method


def blocks_of(args):
    """A draw of every block of EXAMPLES."""
    scheduled = train_blockwise.schedule(args, EXAMPLES, 10**6)
    return draws_of(range(len(scheduled)), *scheduled.T)


def parts_of(args, draws):
    """Where the active blocks of draws are, and the tokens of the answers behind them; (B, L)."""
    _, prompt_len, length, offset = train_blockwise.pad_rows(args, EXAMPLES, draws, 0)
    pos = torch.arange(L)
    first = prompt_len + offset
    active = (first <= pos) & (pos < first + args.BLOCK_SIZE) & (pos < length)
    return active, (first + args.BLOCK_SIZE <= pos) & (pos < length)


# ------- of Blockwise SFT
@pytest.mark.parametrize("mask_padding", [False, True])
def test_rest_takes_the_loss_on_the_whole_rest(mask_padding):
    args, method = control("rest", MASK_PADDING=mask_padding)
    draws = blocks_of(args)
    input_ids, noisy_ids, loss_mask = method.make_batch(args, EXAMPLES, draws, 7)
    same = train_blockwise.make_batch(args, EXAMPLES, draws, 7)
    assert torch.equal(input_ids, same[0]) and torch.equal(noisy_ids, same[1])
    _, suffix = parts_of(args, draws)
    assert suffix.any() and torch.equal(loss_mask, same[2] | suffix)
    assert method._replace(make_batch=None) == train_blockwise.METHOD._replace(make_batch=None)


def test_rest_takes_no_loss_on_a_suffix_that_is_shown():
    args, method = control("rest", SUFFIX_MASK_PROB=0.5, PREFIX_MASK_RATE=0.5)
    draws = blocks_of(args)
    _, noisy_ids, loss_mask = method.make_batch(args, EXAMPLES, draws, 7)
    active, suffix = parts_of(args, draws)
    assert torch.equal(loss_mask, (active | suffix) & (noisy_ids == args.MASK_ID))
    assert 0.4 < loss_mask[suffix].float().mean() < 0.6


def test_spans_cover_every_token_equally():
    """12,000 draws over an answer of 24: each of 31 places, and each token in 8 of 31 spans.

    6 standard deviations.
    """
    args, method = control("span")
    answer = 24
    examples = [(3, torch.arange(3 + answer))] * 4000 + [(3, torch.arange(5))] * 10
    draws = method.schedule(args, examples, 10**6)
    offsets = draws[draws[:, 0] < 4000, 1]
    assert len(offsets) == 12_000
    assert set(offsets) == set(range(1 - BLOCK_SIZE, answer))
    rate = BLOCK_SIZE / (answer + BLOCK_SIZE - 1)
    for token in range(answer):
        share = np.mean((offsets <= token) & (token < offsets + BLOCK_SIZE))
        assert abs(share - rate) < 6 * (rate * (1 - rate) / len(offsets)) ** 0.5
    assert np.array_equal(draws, method.schedule(args, examples, 10**6))
    args.SEED += 1
    assert not np.array_equal(draws[:, 1], method.schedule(args, examples, 10**6)[:, 1])


def test_span_differs_in_the_places_alone():
    """The samples come in the order of Blockwise SFT, and are corrupted as it does."""
    args, method = control("span")
    samples = train_blockwise.schedule(args, EXAMPLES, 100)[:, 0]
    assert np.array_equal(method.schedule(args, EXAMPLES, 100)[:, 0], samples)
    assert method._replace(schedule=None) == train_blockwise.METHOD._replace(schedule=None)


def test_a_span_may_begin_before_the_answer():
    args, _ = control("span")
    input_ids, prompt_len, length, _ = random_rows(3)
    offset = torch.full_like(length, -5)
    noisy_ids, loss_mask = train_blockwise.corrupt(
        args, input_ids, prompt_len, length, offset, random_noise(3, 64, 1 + L)
    )
    pos = torch.arange(L)
    active = (prompt_len <= pos) & (pos < prompt_len + BLOCK_SIZE - 5) & (pos < length)
    assert torch.equal(loss_mask, active & (noisy_ids == args.MASK_ID)) and loss_mask.any()
    assert torch.equal(noisy_ids[pos < prompt_len], input_ids[pos < prompt_len])


# ------- of LIFT
@pytest.mark.parametrize("mask_padding", [False, True])
def test_lift_in_the_active_block(mask_padding):
    """Inside it LIFT's own corruption of a row whose answer is the block; around it blockwise."""
    args, method = control("lift-block", MASK_PADDING=mask_padding)
    draws = blocks_of(args)
    input_ids, noisy_ids, *others = method.make_batch(args, EXAMPLES, draws, 7)
    _, prompt_len, length, offset = train_fullseq.pad_rows(args, EXAMPLES, draws, 7)
    noise = train_fullseq.draw_noise(args, draws, 2 + 2 * L)
    first = prompt_len + offset
    end = torch.minimum(first + BLOCK_SIZE, length)
    alone = train_lift.corrupt(args, input_ids, first, end, 0, noise)
    for ours, theirs in zip(others, alone[1:], strict=True):
        assert torch.equal(ours, theirs)
    active, suffix = parts_of(args, draws)
    assert (noisy_ids[suffix] == args.MASK_ID).all() and suffix.any()
    assert torch.equal(noisy_ids[~suffix], alone[0][~suffix])
    assert torch.equal(noisy_ids[:, :1], input_ids[:, :1])
    over_masked = others[0]
    assert not over_masked[~active].any() and over_masked.any()


def test_lift_block_draws_the_blocks_of_blockwise_sft():
    args, method = control("lift-block", CKPT_DIR="x")
    draws = method.schedule(args, EXAMPLES, 100)
    assert np.array_equal(draws, train_blockwise.schedule(args, EXAMPLES, 100))
    unchanged = {"schedule": None, "make_batch": None}
    assert method._replace(**unchanged) == train_lift.METHOD._replace(**unchanged)
    args.BLOCK_SIZE = 16
    assert set(method.schedule(args, EXAMPLES, 1000)[:, 1]) == {0, 16, 32}


# ------- of OPDLM
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("own-random", ("student", "random", "kl")),
        ("distill", ("teacher", "random", "kl")),
        ("sft-teacher", ("teacher", "random", "cross-entropy")),
        ("sft-data", ("data", "random", "cross-entropy")),
    ],
)
def test_controls_of_opdlm_are_its_constants(name, values):
    args, method = control(name)
    assert (args.ANSWERS, args.STATES, args.LOSS) == values
    assert method == train_opdlm.METHOD
    choices = {(name, text) for name, texts, *_ in train_opdlm.LIMITS for text in texts}
    for constant, value in zip(("ANSWERS", "STATES", "LOSS"), values, strict=True):
        assert (constant, value) in choices


# ------- as a command
def parse(name, *words):
    return train_control.parse_args(["--CONTROL", name, *words])


@pytest.mark.parametrize("name", train_control.CONTROLS)
def test_a_run_records_its_control(name):
    trainer, changes, _ = train_control.CONTROLS[name]
    args = parse(name, "--BLOCK_SIZE", "4", "--LR", "3e-5")
    own = {"CONTROL": name, "CKPT_DIR": f"ckpts_{name}", "BLOCK_SIZE": 4, "LR": 3e-5}
    assert vars(args) == trainer.CONSTANTS | changes | own
    for wrong in ("--BLOCK_SIZE", "0"), ("--BLOCK_SIZE", "x"):
        with pytest.raises(SystemExit, match=f"BLOCK_SIZE = .*{wrong[1]}"):
            parse(name, *wrong)
    with pytest.raises(SystemExit, match="--BLOCKSIZE: no constant of this script"):
        parse(name, "--BLOCKSIZE", "3")


def test_trainers_are_as_they_were():
    """A control's constants are its own."""
    for name in train_control.CONTROLS:
        train_control.constants_of(name)
    for trainer in (train_lift, train_opdlm, train_blockwise, train_fullseq):
        assert "CONTROL" not in trainer.CONSTANTS
    assert "BLOCK_SIZE" not in train_lift.CONSTANTS
    assert train_opdlm.CONSTANTS["ANSWERS"] == "student"


@pytest.mark.parametrize("words", [[], ["--CONTROL", "x"], ["--LR", "1"]])
def test_a_control_is_needed(words, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        train_control.parse_args(words)
    for name in train_control.CONTROLS:
        assert name in ended.value.code
    assert "\n" not in ended.value.code


def test_help_explains_the_controls(capsys):
    with pytest.raises(SystemExit) as ended:
        train_control.parse_args(["--help"])
    assert not ended.value.code and train_control.__doc__.strip() in capsys.readouterr().out
    assert all(f"    {name} " in train_control.__doc__ for name in train_control.CONTROLS)


@pytest.mark.slow
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


@pytest.mark.parametrize("name", train_control.CONTROLS)
def test_help_explains_the_constants_of_a_control(name, capsys):
    with pytest.raises(SystemExit):
        parse(name, "--help")
    words = "".join(capsys.readouterr().out.split())
    trainer = train_control.CONTROLS[name].trainer
    comments = train_fullseq.read_comments(trainer.__file__)
    for constant in set(trainer.CONSTANTS) & set(comments) - {"CKPT_DIR"}:
        assert f"--{constant}[VALUE]{''.join(comments[constant].split())}" in words


def test_what_a_control_sets_cannot_be_given():
    for words in (["--ANSWERS", "student"], ["--LOSS", "cross-entropy"]):
        with pytest.raises(SystemExit, match=f"{' '.join(words)}: --CONTROL distill sets it to"):
            parse("distill", *words)
