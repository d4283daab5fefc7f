"""OPDLM: attention, rollouts, states and loss against plain definitions; whole runs."""

import itertools
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import decode
import evaluate
import numpy as np
import pytest
import torch
import train_opdlm
from decoding import block_causal
from helpers import (
    AR_EOS,
    AR_MASK,
    AR_SHAPE,
    AR_VOCABULARY,
    OF_AR_TOY,
    SUITE,
    build_ar_toy,
    constants,
    draws_of,
    flags,
    kill_after_a_state,
    launch,
    launcher,
    losses,
    reference,
    small_qwen,
    timeless,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import Qwen3Config

import train_fullseq

LOSSES = ("kl", "cross-entropy")
PROMPTS = [torch.arange(1, 8), torch.arange(3, 6), torch.arange(9, 20), torch.arange(2, 4)]
EXAMPLES = [
    (3, torch.tensor([1, 2, 3, 11, 12, 13, 14, 15, AR_EOS])),
    (2, torch.tensor([4, 5, 21, 22, AR_EOS])),
    (4, torch.arange(6, 30)),
]
DRAWS = draws_of([0, 1, 2], samples=[2, 0, 1])


@pytest.fixture
def args():
    """Constants for `model`."""
    return constants(train_opdlm, MASK_ID=AR_MASK, BLOCK_SIZE=4, THRESHOLD=0.5)


@pytest.fixture
def model():
    return small_qwen()


def run_of(model):
    """A run as the rollouts and the loss use it."""
    tokenizer = SimpleNamespace(eos_token_id=AR_EOS, added_tokens_decoder={})
    return SimpleNamespace(model=model, engine=model, tokenizer=tokenizer, examples=EXAMPLES)


def adapted(model, **options):
    """The model with an adapter that changes it."""
    options = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(r=4, **options)).eval()


def answers_of(seed, rows, columns):
    torch.manual_seed(seed)
    return torch.randint(AR_MASK, (rows, columns))


def block_causal_logits(model, ids, prompt_len, size):
    """The logits (S, V) of one sequence, of which each block sees itself and those before."""
    block = [(i - prompt_len) // size for i in range(len(ids))]
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min)
    for i, j in itertools.product(range(len(ids)), repeat=2):
        if block[j] <= block[i]:
            mask[i, j] = 0
    return model(input_ids=ids[None], attention_mask=mask[None, None]).logits[0]


# ------- attention
@pytest.mark.parametrize(("prompt", "answer"), [(5, 8), (4, 12), (1, 4)])
def test_a_training_row_is_seen_as_defined(args, prompt, answer):
    sees = block_causal.training_sees(args, prompt, answer)
    positions = [("x0", i) for i in range(-prompt, answer)] + [("x_t", i) for i in range(answer)]
    for (row, one), (column, other) in itertools.product(enumerate(positions), repeat=2):
        (kind, i), (other_kind, j) = one, other
        if kind == "x0":
            expected = other_kind == "x0" and j // 4 <= i // 4
        elif other_kind == "x0":
            expected = j // 4 < i // 4
        else:
            expected = j // 4 == i // 4
        assert sees[row, column] == expected, (one, other)


# ------- the loss
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_one_pass_gives_the_logits_of_block_by_block_decoding(args, model, shift, full):
    """And the teacher those of the autoregressive model, rolled by one position.

    Each row alone, each block alone, without padding, cache or adapter for the teacher. With the
    loss, and that of cross-entropy.
    """
    args.LOGIT_SHIFT = shift
    student = model if full else adapted(model)
    teacher = small_qwen(1) if full else None
    answers = answers_of(2, 4, 12)
    loss_mask = torch.rand(answers.shape) < 0.6
    noisy_ids = answers.masked_fill(loss_mask, AR_MASK)
    batch = PROMPTS, answers, noisy_ids, loss_mask
    targets = train_opdlm.teacher_logits(student, teacher, PROMPTS, answers, loss_mask)
    logits = train_opdlm.student_logits(args, student, *batch)

    number, kl_total, nll_total = 0, 0, 0
    for prompt, answer, noisy, masked in zip(*batch, strict=True):
        row_kl, row_nll = [], []
        for pos in masked.nonzero().flatten().tolist():
            start = pos // 4 * 4
            so_far = torch.cat([prompt, answer[:start], noisy[start : start + 4]])
            seen = block_causal_logits(student, so_far, len(prompt), 4)
            expected = seen[len(prompt) + pos - shift]
            torch.testing.assert_close(logits[number], expected, rtol=1e-3, atol=1e-3)
            before = torch.cat([prompt, answer[:pos]])
            with train_opdlm.frozen(student, teacher) as autoregressive:
                target = autoregressive(input_ids=before[None]).logits[0, -1]
            torch.testing.assert_close(targets[number], target, rtol=1e-3, atol=1e-3)
            p, q = target.log_softmax(0), expected.log_softmax(0)
            row_kl.append(kl_div(q, p, reduction="sum", log_target=True))
            row_nll.append(cross_entropy(expected, answer[pos]))
            number += 1
        kl_total += sum(row_kl) / len(row_kl)
        nll_total += sum(row_nll) / len(row_nll)
    assert number == len(logits)
    loss = train_opdlm.distillation_loss(args, student, teacher, *batch)
    torch.testing.assert_close(loss, kl_total / 4, rtol=1e-3, atol=1e-4)
    loss = train_opdlm.cross_entropy_loss(args, student, teacher, *batch)
    torch.testing.assert_close(loss, nll_total / 4, rtol=1e-3, atol=1e-4)


def test_the_teacher_is_the_model_without_its_adapter(model):
    ids = torch.arange(1, 9)[None]
    expected = model(input_ids=ids).logits
    student = adapted(model)
    with train_opdlm.frozen(student, None) as teacher:
        assert torch.equal(teacher(input_ids=ids).logits, expected)
    assert not torch.equal(student(input_ids=ids).logits, expected)
    other = small_qwen(1)
    with train_opdlm.frozen(student, other) as teacher:
        assert teacher is other


def test_the_teacher_is_frozen_and_the_student_learns(args, model):
    student = adapted(model, init_lora_weights=True)
    answers = answers_of(3, 4, 8)
    loss_mask = torch.ones_like(answers, dtype=torch.bool)
    noisy_ids = torch.full_like(answers, AR_MASK)
    batch = PROMPTS, answers, noisy_ids, loss_mask
    before = train_opdlm.teacher_logits(student, None, PROMPTS, answers, loss_mask)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    found = []
    for _ in range(30):
        loss = train_opdlm.distillation_loss(args, student, None, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    after = train_opdlm.teacher_logits(student, None, PROMPTS, answers, loss_mask)
    assert torch.equal(before, after)


@pytest.mark.parametrize("loss_of", [train_opdlm.distillation_loss, train_opdlm.cross_entropy_loss])
def test_nothing_in_the_loss_at_all(args, model, loss_of):
    """Zero, and still part of the graph: a rank with such a micro-batch takes part in the step."""
    answers = answers_of(4, 4, 8)
    nothing = torch.zeros_like(answers, dtype=torch.bool)
    loss = loss_of(args, model, model, PROMPTS, answers, answers, nothing)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("top_k", [None, 1, 5, AR_VOCABULARY])
def test_kl_is_that_of_its_definition(args, top_k):
    args.TOP_K = top_k
    torch.manual_seed(5)
    teacher, student = 3 * torch.randn(2, 6, AR_VOCABULARY)
    kl = train_opdlm.kl_divergence(args, teacher, student)
    for one, p_logits, q_logits in zip(kl, teacher, student, strict=True):
        p, q = p_logits.softmax(0).tolist(), q_logits.softmax(0).tolist()
        kept = sorted(range(AR_VOCABULARY), key=lambda i: -p[i])[: top_k or AR_VOCABULARY]
        mass = sum(p[i] for i in kept)
        expected = sum(p[i] / mass * np.log(p[i] / mass / q[i]) for i in kept)
        assert one.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    args.TOP_K = None
    assert train_opdlm.kl_divergence(args, teacher, teacher).abs().max() < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_batch_is_the_mean_of_its_rows(args, model, loss):
    """Whatever the lengths of prompts and answers; LOSS says which loss it is."""
    args.LOSS = loss
    run = run_of(adapted(model))
    answers = {}
    for draw, length in zip(DRAWS["id"], (8, 3, 12), strict=True):
        columns = 4 * -(-length // 4)
        ids = answers_of(int(draw), 1, columns)[0]
        steps = torch.randint(4, (columns,))
        answers[draw] = train_opdlm.Answer(ids, steps, length, torch.rand(columns // 4))

    def loss_of(draws):
        return train_opdlm.micro_batch_loss(args, run, None, answers, draws)

    alone = torch.stack([loss_of(DRAWS[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(loss_of(DRAWS), alone.mean())
    assert (alone > 0).all()
    args.LOSS = next(other for other in LOSSES if other != loss)
    assert (loss_of(DRAWS) - alone.mean()).abs() > 1e-3


# ------- rollouts
def plain_rollout(args, model, prompt, noise):
    """One answer in plain loops, without a cache; (tokens, steps) of whole blocks."""
    size, length = noise.shape
    answer, steps = [], []
    for start in range(0, length, size):
        block, when = [AR_MASK] * size, [0] * size
        for number in range(size):
            if AR_MASK not in block:
                break
            ids = torch.cat([prompt, torch.tensor(answer + block)])
            logits = block_causal_logits(model, ids, len(prompt), size).double()
            found = {}
            for i in range(size):
                if block[i] == AR_MASK:
                    row = logits[len(prompt) + start + i - args.LOGIT_SHIFT]
                    row[AR_MASK] = -torch.inf
                    if args.TEMPERATURE == 0:
                        p = row.softmax(0)
                        token = int(p.argmax())
                    else:
                        p = (row / args.TEMPERATURE).softmax(0)
                        u = noise[number, start + i].item() * p.sum().item()
                        token = next(v for v in range(AR_VOCABULARY) if p[: v + 1].sum() > u)
                    found[i] = (row.softmax(0)[token].item(), token)  # not tempered
            surest = max(found, key=lambda i: found[i][0])
            for i, (confidence, token) in found.items():
                if confidence > args.THRESHOLD or i == surest:
                    block[i], when[i] = token, number
        answer += block
        steps += when
        if AR_EOS in block:
            break
    return answer, steps


@pytest.mark.parametrize(
    ("temperature", "threshold", "shift"),
    [(0, 0.5, False), (1.0, 0.3, False), (0.7, 0.5, True), (1.0, 1.0, True), (0, 0.0, False)],
)
def test_rollouts_with_a_cache_are_those_without(args, model, temperature, threshold, shift):
    args.TEMPERATURE, args.THRESHOLD, args.LOGIT_SHIFT = temperature, threshold, shift
    noise, _ = train_opdlm.draw_noise(args, draws_of(range(4)), 16)
    answers, steps = block_causal.roll_out(args, model, PROMPTS, noise, [AR_EOS])
    for row, prompt in enumerate(PROMPTS):
        tokens, when = plain_rollout(args, model, prompt, noise[row])
        assert answers[row, : len(tokens)].tolist() == tokens
        assert steps[row, : len(when)].tolist() == when
        assert (answers[row, len(tokens) :] == AR_MASK).all()  # it has left the batch
        assert AR_MASK not in tokens
        if threshold == 1.0:
            assert sorted(when) == sorted([0, 1, 2, 3] * (len(when) // 4))
    if threshold == 0.0:
        assert not steps.any()


def test_sampling_is_from_the_distribution(args):
    """40,000 draws over a grid of noise: each share within 1e-3 of the probability."""
    torch.manual_seed(6)
    args.TEMPERATURE = 0.7
    logits = torch.randn(1, AR_VOCABULARY)
    expected = logits[0].clone()
    expected[AR_MASK] = -torch.inf
    untempered = expected.softmax(0)
    expected = (expected / 0.7).softmax(0)
    noise = (torch.arange(40_000) + 0.5) / 40_000
    repeated = logits.expand(40_000, AR_VOCABULARY).clone()
    tokens, confidence = block_causal.sample(args, repeated, noise)
    shares = torch.bincount(tokens, minlength=AR_VOCABULARY) / 40_000
    assert (shares - expected).abs().max() < 1e-3 and shares[AR_MASK] == 0
    torch.testing.assert_close(confidence, untempered[tokens])


def test_rollouts_grow_in_whole_blocks(args):
    args.FIRST_GEN_LENGTH, args.GEN_LENGTH, args.CURRICULUM = 10, 101, 10
    assert [train_opdlm.rollout_length(args, n) for n in (0, 5, 10, 99)] == [12, 56, 104, 104]
    args.FIRST_GEN_LENGTH, args.GEN_LENGTH = 100, 64
    assert [train_opdlm.rollout_length(args, n) for n in (0, 5, 10)] == [64, 64, 64]


def test_noise_is_a_function_of_seed_and_draw(args):
    tokens, blocks = train_opdlm.draw_noise(args, draws_of([7, 3]), 8)
    others = train_opdlm.draw_noise(args, draws_of([3], samples=9), 8)
    assert tokens.shape == (2, 4, 8) and blocks.shape == (2, 2)
    assert torch.equal(tokens[1:], others[0]) and torch.equal(blocks[1:], others[1])
    args.SEED += 1
    assert not torch.equal(train_opdlm.draw_noise(args, draws_of([3]), 8)[0], others[0])


# the place of the end-of-turn token in an answer of 12; None: it has none
ENDS = [*range(12), None]


def cut_answers(args):
    """Answers with an end at each of ENDS, {id: Answer}."""
    answers = {}
    steps = torch.arange(4).repeat(3)
    noise = torch.tensor([0.25, 0.5, 0.75])
    for n, end in enumerate(ENDS):
        ids = torch.ones(12, dtype=torch.long)
        if end is not None:
            ids[end:] = AR_EOS
        answers[n] = train_opdlm.cut(args, ids, steps, noise, [AR_EOS])
    return answers


@pytest.mark.parametrize("train_end", [False, True])
def test_answers_are_kept_up_to_their_end(args, train_end):
    """Whole blocks up to the end-of-turn token's; it is in the loss if TRAIN_END says so."""
    args.TRAIN_END = train_end
    for end, answer in zip(ENDS, cut_answers(args).values(), strict=True):
        assert answer.answer_len == (12 if end is None else end + train_end)
        blocks = 3 if end is None else end // 4 + 1
        assert answer.ids.tolist().count(AR_EOS) == (0 if end is None else 4 * blocks - end)
        assert answer.steps.tolist() == [0, 1, 2, 3] * blocks
        assert answer.noise.tolist() == [0.25, 0.5, 0.75][:blocks]


@pytest.mark.parametrize("train_end", [False, True])
def test_rollouts_are_logged_once_each(args, one_rank, tmp_path, train_end):
    args.TRAIN_END = train_end
    run = run_of(None)
    run.engine, run.logs = SimpleNamespace(device="cpu"), tmp_path
    for rollout in (0, 1, 1):  # the last one again, after a kill
        train_opdlm.log_rollout(args, run, rollout, cut_answers(args), 2.56)
    lines = (tmp_path / "rollouts.csv").read_text().splitlines()
    tokens = sum(range(12)) + 12 + 12 * train_end
    assert lines[0] == "rollout,answers,tokens,tokens_per_step,ended,seconds"
    assert lines[1:] == [f"{number},13,{tokens},1.000,{12 / 13:.3f},2.6" for number in (0, 1)]


def test_answers_do_not_depend_on_what_is_decoded_with_them(args, model, one_rank):
    args.FIRST_GEN_LENGTH = args.GEN_LENGTH = 16
    run = run_of(model.train())
    together = train_opdlm.decode_answers(args, run, None, DRAWS, 0)
    assert model.training and list(together) == [0, 1, 2]
    args.ROLLOUT_BSIZE = 1
    alone = train_opdlm.decode_answers(args, run, None, DRAWS[::-1], 0)
    for draw in DRAWS["id"]:
        for ours, theirs in zip(together[draw], alone[draw], strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    noise, block_noise = train_opdlm.draw_noise(args, DRAWS, 16)
    prompts = train_opdlm.prompts_of(EXAMPLES, DRAWS)
    assert [len(prompt) for prompt in prompts] == [4, 3, 2]
    ids, steps = block_causal.roll_out(args, model.eval(), prompts, noise, [AR_EOS])
    expected = train_opdlm.cut(args, ids[0], steps[0], block_noise[0], [AR_EOS])
    assert torch.equal(expected.ids, together[0].ids)
    assert torch.equal(expected.steps, together[0].steps)


# ------- states
def test_states_are_those_that_the_rollout_met(args, model):
    """Every block of x_t is a canvas of this block that the model was shown, and all are met."""
    longest = max(len(prompt) for prompt in PROMPTS)
    shown = {}  # (row, block): canvases

    def note(rows, ids):
        block = (ids.shape[1] - longest) // 4 - 1
        for row, canvas in zip(rows, ids[:, -4:].tolist(), strict=True):
            shown.setdefault((row, block), set()).add(tuple(canvas))

    noise, _ = train_opdlm.draw_noise(args, draws_of(range(4)), 12)
    answers, steps = block_causal.roll_out(args, model, PROMPTS, noise, [AR_EOS], note)
    decoded = {(row, place // 4) for row, place in (answers != AR_MASK).nonzero().tolist()}
    assert decoded == set(shown)
    blocks = answers.shape[1] // 4
    met = set()
    for share in np.linspace(0, 0.999, 25):
        choice = torch.full((4, blocks), share)
        whole = torch.full((4, 1), answers.shape[1])
        noisy_ids, loss_mask = train_opdlm.corrupt(args, answers, steps, whole, choice)
        assert torch.equal(loss_mask, noisy_ids == AR_MASK)
        assert torch.equal(noisy_ids[~loss_mask], answers[~loss_mask])
        for row, block in itertools.product(range(4), range(blocks)):
            canvas = tuple(noisy_ids[row, 4 * block : 4 * block + 4].tolist())
            assert AR_MASK in canvas
            if (row, block) in decoded:
                met.add((row, block, canvas))
    # a row whose block is full is shown on while others are decoded: those have no mask
    everything = set()
    for key, canvases in shown.items():
        everything |= {(*key, canvas) for canvas in canvases if AR_MASK in canvas}
    assert met == everything and len(met) > len(decoded)


def test_what_follows_the_end_is_not_in_the_loss(args):
    answers = torch.arange(16).view(2, 8)
    steps = torch.zeros_like(answers)
    length = torch.tensor([[3], [0]])
    _, loss_mask = train_opdlm.corrupt(args, answers, steps, length, torch.rand(2, 2))
    assert loss_mask.tolist() == [[True] * 3 + [False] * 5, [False] * 8]


# ------- the controls: ANSWERS, STATES
@pytest.fixture
def control(one_rank):
    """Constants with random states, for `model`."""
    sizes = {"BLOCK_SIZE": 8, "FIRST_GEN_LENGTH": 16, "GEN_LENGTH": 16, "ROLLOUT_BSIZE": 2}
    return constants(train_opdlm, MASK_ID=AR_MASK, STATES="random", TRAIN_END=True, **sizes)


def test_the_answers_of_the_data(control, model):
    control.ANSWERS = "data"
    answers = train_opdlm.decode_answers(control, run_of(model), None, DRAWS, 0)
    lengths = {0: 16, 1: 6, 2: 3}  # cut at 16, up to and with the end
    for draw, answer in zip(DRAWS, answers.values(), strict=True):
        prompt_len, ids = EXAMPLES[draw["sample"]]
        assert answer.answer_len == lengths[draw["id"]]
        expected = ids[prompt_len : prompt_len + answer.answer_len]
        assert torch.equal(answer.ids[: answer.answer_len], expected)
        assert len(answer.ids) == len(answer.steps) == control.BLOCK_SIZE * len(answer.noise)


def test_answers_of_the_data_that_are_cut_by_max_len_are_refused(control, model):
    """Before the first step, as some rollout would meet them; none would where it is shorter."""
    run = run_of(model)
    run.draws = DRAWS
    control.GEN_LENGTH = 16
    train_opdlm.check_answers(control, run)
    control.GEN_LENGTH = 24
    with pytest.raises(SystemExit, match="has no end of turn; raise MAX_LEN"):
        train_opdlm.check_answers(control, run)


@pytest.mark.parametrize("full", [False, True])
def test_answers_that_the_teacher_samples(control, model, full):
    """Token by token, each row alone, without a cache."""
    control.ANSWERS = "teacher"
    student = small_qwen(1) if full else adapted(small_qwen())
    run, teacher = run_of(student), model if full else None
    answers = train_opdlm.decode_answers(control, run, teacher, DRAWS, 0)
    noise, _ = train_opdlm.draw_noise(control, DRAWS, 16)
    for n, answer in enumerate(answers.values()):
        prompt_len, ids = EXAMPLES[DRAWS["sample"][n]]
        so_far = ids[:prompt_len]
        for place in range(answer.answer_len):
            logits = model(input_ids=so_far[None]).logits[:, -1]  # (1, V)
            token_noise = noise[n, 0, place : place + 1]
            token, _ = block_causal.sample(control, logits.float(), token_noise)  # (1,)
            assert answer.ids[place] == token
            so_far = torch.cat([so_far, token])
        assert answer.answer_len == 16 or answer.ids[answer.answer_len - 1] == AR_EOS


def test_random_states_are_random_masks(control):
    """Of 600 blocks of 8: 1 to 8 masks equally often, and each position in 4.5 of 8 blocks.

    6 standard deviations.
    """
    rows = 300
    draws = draws_of(range(rows))
    steps = train_opdlm.random_steps(control, draws, 16)
    _, noise = train_opdlm.draw_noise(control, draws, 16)
    ids = torch.ones(rows, 16, dtype=torch.long)
    _, masked = train_opdlm.corrupt(control, ids, steps, torch.full((rows, 1), 16), noise)
    blocks = masked.view(-1, 8)
    counts = torch.bincount(blocks.sum(1), minlength=9)[1:] / len(blocks)
    assert (counts - 1 / 8).abs().max() < 6 * (1 / 8 * 7 / 8 / len(blocks)) ** 0.5
    rates = blocks.float().mean(0)
    assert (rates - 4.5 / 8).abs().max() < 6 * (0.25 / len(blocks)) ** 0.5
    one = train_opdlm.random_steps(control, draws[7:8], 8)  # a shorter answer is a part of it
    assert torch.equal(one[0], steps[7, :8])


def test_random_states_are_those_of_the_same_answers(control, model):
    """STATES changes the steps alone."""
    run = run_of(model)
    random = train_opdlm.decode_answers(control, run, None, DRAWS, 0)
    control.STATES = "decoded"
    decoded = train_opdlm.decode_answers(control, run, None, DRAWS, 0)
    steps = train_opdlm.random_steps(control, DRAWS, 16)
    for draw in DRAWS["id"]:
        assert torch.equal(random[draw].ids, decoded[draw].ids)
        assert random[draw].answer_len == decoded[draw].answer_len
        assert torch.equal(random[draw].steps, steps[draw, : len(random[draw].steps)])


def test_compiled_layers_learn_the_same(args, one_rank, monkeypatch):
    """Rollouts of any shapes run without; the updates' losses and gradients are those without."""
    compiler = partial(torch.compile, backend="eager")  # the graphs, without a compiler
    monkeypatch.setattr(torch, "compile", compiler)
    args.GEN_LENGTH = args.FIRST_GEN_LENGTH = 12
    found = []
    for args.COMPILE in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = run_of(adapted(train_fullseq.prepare_layers(args, small_qwen())))
        graphs = []
        for rollout in range(2):
            answers = train_opdlm.decode_answers(args, run, None, DRAWS, rollout)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            run.model.zero_grad()
            for draws in (DRAWS, DRAWS[:2]):
                train_opdlm.micro_batch_loss(args, run, None, answers, draws).backward()
        assert (graphs[0] == 0) and (graphs[1] > 0) == args.COMPILE
        gradients = [p.grad for p in run.model.parameters() if p.requires_grad]
        found.append([*(answer.ids for answer in answers.values()), *gradients])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-5)


# ------- whole runs
@pytest.fixture(scope="module")
def ar_folder(tmp_path_factory):
    return build_ar_toy(tmp_path_factory.mktemp("ar"))


SCRIPT = SUITE / "experiments" / "train_opdlm.py"


def in_float32(folder):
    """An environment whose CPU has no bf16 arithmetic: rounding hardly ever changes a token."""
    (folder / "sitecustomize.py").write_text("import torch\ntorch.cpu.get_capabilities = dict\n")
    return {"PYTHONPATH": str(folder)}


def flags_of(folder, **changes):
    """The flags of a short run."""
    model = {"MODEL_NAME": folder / "model", "DATA_PT": folder / "train.pt", "LORA_RANK": 4}
    return flags(**model | OF_AR_TOY | {"TOTAL_TRAIN_STEPS": 12, "LR": 1e-2} | changes)


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_are_one_rank(ar_folder, tmp_path, monkeypatch):
    """The same answers and, but for rounding, the same losses; the checkpoint can be evaluated."""
    environment = in_float32(tmp_path)
    one = flags_of(ar_folder, MICRO_BSIZE=4, CKPT_DIR="one", SAVE_EVERY=6)
    status, printed = launch([sys.executable, SCRIPT, *one], tmp_path, **environment)
    assert status == 0, printed
    two = [*launcher(2), SCRIPT, *flags_of(ar_folder, MICRO_BSIZE=2, CKPT_DIR="two")]
    kill_after_a_state(two, tmp_path, "two_logs", **environment)
    status, printed = launch(two, tmp_path, **environment)
    assert status == 0 and "resumes after step" in printed, printed
    ours, theirs = losses(tmp_path / "one_logs"), losses(tmp_path / "two_logs")
    assert len(ours) == 12
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-2
    rollouts = [timeless(tmp_path / f"{name}_logs" / "rollouts.csv") for name in ("one", "two")]
    assert rollouts[0] == rollouts[1] and rollouts[0].count(b"\n") == 1 + 4
    names = {name for name in os.listdir(tmp_path) if name.startswith("one_step")}
    assert names == {"one_step0006", "one_step0012"}
    config = json.loads((tmp_path / "one_step0012" / "config.json").read_text())
    assert (config["block_causal"], config["logit_shift"]) == (4, False)
    paths = {"model": "one_step0012", "dataset": ar_folder / "data" / "test.jsonl", "output": "ev"}
    decoding = {"gen_length": 16, "block_length": 4, "steps": 16, "limit": 3, "batch_size": 3}
    monkeypatch.chdir(tmp_path)
    evaluate.main(evaluate.parse_args(flags(**paths, **decoding)))
    assert json.loads(Path("ev/summary.json").read_text())["count"] == 3


@pytest.mark.slow
def test_all_weights_are_trained(ar_folder, tmp_path):
    """With the other switches too; every weight of the checkpoint has moved."""
    switches = {"FULL_FT": True, "LOGIT_SHIFT": True, "ACTIVATION_CHECKPOINTING": True, "TOP_K": 8}
    sizes = {"MICRO_BSIZE": 2, "GRAD_ACC": 2, "TOTAL_TRAIN_STEPS": 4, "LR": 0.1}
    command = [sys.executable, SCRIPT, *flags_of(ar_folder, **switches, **sizes, CKPT_DIR="full")]
    status, printed = launch(command, tmp_path)
    assert status == 0, printed
    base = load_file(ar_folder / "model" / "model.safetensors")
    tuned = load_file(tmp_path / "full_step0004" / "model.safetensors")
    assert set(base) == set(tuned)
    assert all(not torch.equal(base[name], tuned[name]) for name in base)


def ending_often(model):
    """The model, which now predicts an end about every tenth token, and never [MASK]."""

    def favour(_, inputs, logits):
        logits = logits.index_fill(-1, torch.tensor([AR_MASK]), -1e4)
        return logits + 2.5 * (torch.arange(AR_VOCABULARY) == AR_EOS)

    model.get_output_embeddings().register_forward_hook(favour)
    return model


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("size", "steps"), [(1, 1), (4, 4), (4, 2), (8, 3), (24, 24)])
@pytest.mark.parametrize("threshold", [None, 0.3, 0.9])
def test_decoding_with_the_cache_is_decoding_without(size, steps, threshold, shift):
    """For prompts of all lengths; answers leave the batch when they have ended."""
    model = ending_often(small_qwen())
    model.config.update({"block_causal": size, "logit_shift": shift})
    torch.manual_seed(4)
    prompts = [torch.randint(AR_MASK, (length,)) for length in (1, 9, 4, 4, 17, 2)]
    how = {"gen_length": 24, "block_length": size, "steps": steps * 24 // size}
    how["threshold"] = threshold
    sizes = []
    answers = decode.decode(
        model,
        prompts,
        **how,
        mask_id=AR_MASK,
        eos_id=AR_EOS,
        eot_id=AR_EOS,
        callback=lambda rows, ids: sizes.append(len(rows)),
    )
    if size <= 4:
        assert sizes[0] == 6 > sizes[-1]

    def predict(prompt_len, input_ids):
        logits = block_causal_logits(model, input_ids[0], prompt_len, size)[None]
        return SimpleNamespace(logits=logits.roll(1, dims=1) if shift else logits)

    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference(partial(predict, len(prompt)), prompt, **how, mask_id=AR_MASK)
        length = decode.answer_length(expected, AR_EOS, AR_EOS)
        filled = -(-length // size) * size
        assert answer[:filled].equal(expected[:filled])
        assert (answer[filled:] == AR_MASK).all()


def test_forward_passes_of_an_answer():
    """As many in a batch as alone: what waits for the others' block is not counted."""
    model = ending_often(small_qwen())
    model.config.update({"block_causal": 4})
    ids = {"mask_id": AR_MASK, "eos_id": AR_EOS, "eot_id": AR_EOS}

    def count(prompts):
        passes = Counter()
        options = {"gen_length": 24, "block_length": 4, "steps": 24, "threshold": 0.3}
        decode.decode(
            model, prompts, **options, **ids, callback=lambda rows, _: passes.update(rows)
        )
        return passes

    torch.manual_seed(4)
    prompts = [torch.randint(AR_MASK, (length,)) for length in (1, 9, 4, 4, 17, 2)]
    together = count(prompts)
    alone = [count([prompt])[0] for prompt in prompts]
    assert [together[row] for row in range(6)] == alone and len(set(alone)) > 2


def test_forward_passes_of_a_block(model):
    """A step of a block computes the block; its first step also what the last one decoded."""
    model.config.update({"block_causal": 4})
    model.get_input_embeddings().weight.data[AR_MASK] = 0
    queries = []

    def note(_, positional, inputs):
        queries.append(inputs["input_ids"].shape[1])

    with model.register_forward_pre_hook(note, with_kwargs=True):
        ids = {"mask_id": AR_MASK, "eos_id": AR_EOS, "eot_id": AR_EOS}
        how = {"gen_length": 12, "block_length": 4, "steps": 6, "logits_eos_inf": True}
        decode.decode(model, [torch.arange(1, 6)], **how, **ids)
    assert queries == [5 + 4, 4, 4 + 4, 4, 4 + 4, 4]


def test_a_growing_layer_has_what_was_put_there():
    layer = block_causal.GrowingLayer()
    torch.manual_seed(0)
    columns = torch.randn(2, 3, 2, 40, 5)  # keys and values
    kept = torch.arange(3)
    length = 0
    for added, cropped in ((7, 5), (2, 7), (20, 21), (1, 22), (10, 30)):
        keys, values = columns[:, kept, :, length : length + added]
        found = layer.update(keys, values)
        length += added
        for one, other in zip(found, columns[:, kept, :, :length], strict=True):
            assert torch.equal(one, other)
        assert layer.get_seq_length() == length
        layer.crop(cropped)
        length = min(length, cropped)
        if len(kept) == 3:
            kept = torch.tensor([2, 0])
            layer.batch_select_indices(torch.tensor([2, 0]))


@pytest.mark.parametrize("shift", [False, True])
def test_decode_decodes_as_the_rollouts_do(args, model, shift):
    """At temperature 0, with the threshold, up to the end of the answer."""
    args.TEMPERATURE, args.THRESHOLD, args.LOGIT_SHIFT = 0, 0.3, shift
    model.get_input_embeddings().weight.data[AR_MASK] = 0  # so that [MASK] is never predicted
    model.config.update({"block_causal": 4, "logit_shift": shift})
    noise, _ = train_opdlm.draw_noise(args, draws_of(range(4)), 16)
    ours, _ = block_causal.roll_out(args, model, PROMPTS, noise, [AR_EOS])
    prompts = [prompt.tolist() for prompt in PROMPTS]
    options = {"gen_length": 16, "block_length": 4, "threshold": 0.3}
    ids = {"mask_id": AR_MASK, "eos_id": AR_EOS, "eot_id": AR_EOS}
    answers = decode.decode(model, prompts, **options, **ids)
    for one, other in zip(ours.tolist(), answers.tolist(), strict=True):
        end = 4 * (one.index(AR_EOS) // 4 + 1) if AR_EOS in one else len(one)
        assert one[:end] == other[:end]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASK_ID": 10**6}, "MASK_ID = 1000000"),
        ({"MICRO_BSIZE": 1000}, "too few for a step"),
        ({"TARGET_MODS": "c_attn"}, "no linear layer"),
        ({"MAX_LEN": 10}, "give 0 rows"),
        ({"BLOCK_SIZE": 0}, "BLOCK_SIZE = 0"),
        ({"THRESHOLD": 1.5}, "THRESHOLD = 1.5"),
        ({"MODEL_NAME": "/no/such/model"}, "cannot be loaded"),
        ({"MASK_PADDING": True}, "--MASK_PADDING: no constant"),
        ({"LOSS": "mse"}, "LOSS = 'mse': must be kl or cross-entropy"),
        ({"STATES": "all"}, "STATES = 'all': must be decoded or random"),
        ({"ANSWERS": "mine", "STATES": "random"}, "'mine': must be student or teacher or data"),
        ({"ANSWERS": "data"}, "ANSWERS = 'data': the student did not decode them; set STATES"),
    ],
)
def test_mistakes(ar_folder, changes, message):
    words = flags_of(ar_folder, **{"MICRO_BSIZE": 2} | changes)
    try:
        module = train_opdlm
        args = module.parse_args(words, module.__doc__, module.CONSTANTS, module.LIMITS)
        problems = train_fullseq.preflight(args, module.METHOD, 1)
    except SystemExit as refused:
        problems = refused.code.splitlines()
    assert len(problems) == 1 and message in problems[0], problems


def test_a_tokenizer_without_an_end(args, model):
    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0, mask_token_id=3)
    problems = train_opdlm.check_model(args, model, tokenizer)
    assert any("its tokenizer has no end-of-turn token" in problem for problem in problems)


@pytest.mark.parametrize("full", [False, True])
def test_states_of_all_weights_need_more_room(args, model, full):
    """The disk check counts what is trained."""
    args.FULL_FT, args.LORA_RANK = full, 2
    expected = model if full else train_fullseq.add_adapter(args, small_qwen())
    trained = sum(p.numel() for p in expected.parameters() if p.requires_grad)
    assert train_opdlm.METHOD.count_trained(args, model) == trained


def test_another_block_length_is_a_warning(capsys):
    config = Qwen3Config(**AR_SHAPE)
    decode.check_block_length("m", config, 32)  # a model that attends to all
    config.block_causal = 4
    decode.check_block_length("m", config, 4)
    assert capsys.readouterr().err == ""
    decode.check_block_length("m", config, 32)
    assert "has learnt blocks of 4 tokens, not --block_length 32" in capsys.readouterr().err


def test_an_answer_ends_with_the_turn_or_with_the_text(args):
    """The template's end of turn may be another token than the tokenizer's end of text."""
    args.BLOCK_SIZE = 4
    turn, text = AR_EOS - 3, AR_EOS
    for end in (turn, text):
        ids = torch.tensor([1, 2, 3, 4, 5, end, 6, 7, 8, 9, 10, 11])
        answer = train_opdlm.cut(args, ids, torch.zeros_like(ids), torch.zeros(3), [text, turn])
        assert (answer.answer_len, len(answer.ids)) == (5, 8)
    row = (2, torch.tensor([1, 2, 3, 4, turn]))
    draws = draws_of([0])
    filled = train_opdlm.answers_of_data(args, [row], draws, 8, [text, turn])
    assert filled.tolist() == [[3, 4, turn, *[text] * 5]]
