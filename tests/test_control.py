"""The controls change one thing of Blockwise SFT, or bring LIFT into its active block."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import train_control
import train_lift
import train_opdlm
from conftest import flags, launch
from peft import LoraConfig, get_peft_model
from test_corruption import L, random_rows
from test_opdlm import EOS, MASK, SHAPE, V
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen3Config

import train_blockwise

BLOCK_SIZE = 8
ORIGINAL_CORRUPT = train_blockwise.corrupt


@pytest.fixture
def install():
    """train_control.install; all that it changes in the trainers is put back after the test."""
    modules = (train_blockwise, train_lift, train_opdlm)
    before = [(module, dict(vars(module))) for module in modules]
    for module in modules:
        module.CONSTANTS = list(module.CONSTANTS)
        module.LIMITS = list(module.LIMITS)
        module.BLOCK_SIZE = BLOCK_SIZE

    def installed(control):
        trainer = train_control.install(control)
        trainer.BLOCK_SIZE = BLOCK_SIZE
        return trainer

    yield installed
    for module, names in before:
        vars(module).clear()
        vars(module).update(names)


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


# ------------------------------------------------------------------------------- those of OPDLM

EXAMPLES = [
    (3, torch.tensor([1, 2, 3, 11, 12, 13, 14, 15, EOS])),
    (2, torch.tensor([4, 5, 21, 22, EOS])),
    (4, torch.arange(6, 30)),
]
DRAWS = np.array([[2, 0], [0, 0], [1, 0]])


@pytest.fixture
def ar_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=V, **SHAPE)).eval()


def opdlm_of(install, control, monkeypatch):
    trainer = install(control)
    trainer.MASK_ID, trainer.FIRST_GEN_LENGTH, trainer.GEN_LENGTH = MASK, 16, 16
    trainer.ROLLOUT_BSIZE, trainer.TRAIN_END = 2, True
    monkeypatch.setattr(trainer.dist, "get_rank", lambda: 0)
    return trainer


def test_sft_data_learns_the_answers_of_the_data(install, ar_model, monkeypatch):
    trainer = opdlm_of(install, "sft-data", monkeypatch)
    answers = trainer.decode_answers(ar_model, EOS, EXAMPLES, DRAWS, np.arange(3), 0)
    lengths = {0: 16, 1: 6, 2: 3}  # cut at 16, up to and with the end
    for number, (answer, steps, answer_len, noise) in answers.items():
        prompt_len, ids = EXAMPLES[DRAWS[number, 0]]
        assert answer_len == lengths[number]
        assert torch.equal(answer[:answer_len], ids[prompt_len : prompt_len + answer_len])
        assert len(answer) == len(steps) == BLOCK_SIZE * len(noise)


def test_random_states_are_random_masks(install, ar_model, monkeypatch):
    """Of 600 blocks of 8: 1 to 8 masks equally often, and each position in 4.5 of 8 blocks.

    6 standard deviations.
    """
    trainer = opdlm_of(install, "own-random", monkeypatch)
    rows = 300
    monkeypatch.setattr(
        trainer,
        "roll_out",
        lambda _, prompts, noise, eos_id: (
            torch.ones(len(prompts), 16, dtype=torch.long),
            torch.zeros(len(prompts), 16, dtype=torch.long),
        ),
    )
    draws = np.zeros((rows, 2), dtype=int)
    answers = trainer.decode_answers(ar_model, EOS, EXAMPLES, draws, np.arange(rows), 0)
    parts = [torch.stack(part) for part in list(zip(*answers.values(), strict=True))[:2]]
    noise = torch.stack([answer[3] for answer in answers.values()])
    _, masked = trainer.corrupt(*parts, torch.full((rows, 1), 16), noise)
    blocks = masked.view(-1, BLOCK_SIZE)
    counts = torch.bincount(blocks.sum(1), minlength=9)[1:] / len(blocks)
    assert (counts - 1 / 8).abs().max() < 6 * (1 / 8 * 7 / 8 / len(blocks)) ** 0.5
    rates = blocks.float().mean(0)
    assert (rates - 4.5 / 8).abs().max() < 6 * (0.25 / len(blocks)) ** 0.5


@pytest.mark.parametrize("full", [False, True])
def test_distill_takes_answers_that_the_teacher_samples(install, ar_model, monkeypatch, full):
    """Token by token, each row alone, without a cache."""
    trainer = opdlm_of(install, "distill", monkeypatch)
    trainer.FULL_FT = full
    student = ar_model
    teacher = copy.deepcopy(ar_model)
    if full:
        student.get_input_embeddings().weight.data *= -1  # another model
        monkeypatch.setattr(trainer, "load_pretrained", lambda *_, **__: teacher)
    else:
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        student = get_peft_model(ar_model, lora)
    trainer.build_teacher("cpu")
    answers = trainer.decode_answers(student, EOS, EXAMPLES, DRAWS, np.arange(3), 0)
    for number, (answer, _, answer_len, _) in answers.items():
        prompt_len, ids = EXAMPLES[DRAWS[number, 0]]
        so_far = ids[:prompt_len]
        noise = trainer.draw_noise([number], 16)[0][0, 0]
        for place in range(answer_len):
            logits = teacher(input_ids=so_far[None]).logits[:, -1:]
            token, _ = trainer.sample(logits.float(), noise[None, place : place + 1])
            assert answer[place] == token
            so_far = torch.cat([so_far, token[0]])
        assert answer_len == 16 or answer[answer_len - 1] == EOS


def test_sft_is_the_cross_entropy_of_the_tokens(install, ar_model, monkeypatch):
    trainer = opdlm_of(install, "sft-teacher", monkeypatch)
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    answers = torch.randint(MASK, (2, 16))
    loss_mask = torch.rand(2, 16) < 0.5
    noisy_ids = answers.masked_fill(loss_mask, MASK)
    loss = trainer.distillation_loss(ar_model, None, prompts, answers, noisy_ids, loss_mask)
    logits = trainer.student_logits(ar_model, prompts, answers, noisy_ids, loss_mask)
    nll = cross_entropy(logits, answers[loss_mask], reduction="none")
    rows = nll.split(loss_mask.sum(1).tolist())
    torch.testing.assert_close(loss, sum(row.mean() for row in rows) / 2)


# ------------------------------------------------------------------------------------ as a command


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
