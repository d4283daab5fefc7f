"""LIFT: the bands, the number of tokens, the choice, and the loss, against plain definitions."""

import json
import sys

import numpy as np
import pytest
import torch
import train_lift
from helpers import (
    SUITE,
    VOCABULARY,
    L,
    constants,
    draws_of,
    flags,
    kill_after_a_state,
    launch,
    launcher,
    losses,
    random_noise,
    random_rows,
    small_llada,
)
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import train_fullseq


@pytest.fixture
def args(toy_folder):
    """The constants of LIFT, with values for the toy."""
    return constants(train_lift, toy_folder)


def rows_of(seed, count=64):
    """Random rows of which the answer is the only block, with LIFT's noise (B, 2 + 2L)."""
    return *random_rows(seed, count, block_size=L), random_noise(seed, count, 2 + 2 * L)


@pytest.fixture
def model():
    return small_llada().train()


# ------- the bands


@pytest.mark.parametrize("components", [2, 3])
def test_bands_are_where_their_weights_are_largest(args, components):
    args.COMPONENTS = components
    t = torch.linspace(0.001, 0.999, 998)[:, None]  # none of them is a border
    weights = [t, 1 - t, 3 * t * (1 - t)][:components]
    largest = torch.cat(weights, dim=1).argmax(dim=1)
    assert train_lift.band(args, t).flatten().tolist() == [[1, -1, 0][n] for n in largest]
    assert len(set(largest.tolist())) == components


# ------- the corruption


def definition(args, input_ids, prompt_len, length, block, noise):
    """The corruption in plain loops: (noisy_ids, over_masked, t, k, loss_mask)."""
    f32 = np.float32
    noisy_ids = input_ids.clone()
    over_masked = torch.zeros_like(input_ids, dtype=torch.bool)
    loss_mask = torch.zeros_like(over_masked)
    ts, ks = [], []
    for row in range(len(input_ids)):
        numbers = noise[row].numpy()
        t = f32(args.MASK_PROB_EPS) + f32(1 - args.MASK_PROB_EPS) * numbers[0]
        lowest = f32(args.RHO_MIN) if 1 - t > args.RHO_MIN else f32(0)
        rho = lowest + (1 - t - lowest) * numbers[1 + L]
        masked = []
        for pos in range(prompt_len[row].item(), length[row].item()):
            if numbers[1 + pos] < t + rho:
                masked.append(pos)
        k = max(1, round(len(masked) * float(t) / float(t + rho)))
        over_masked[row, masked] = True
        noisy_ids[row, masked] = args.MASK_ID
        if args.MASK_PADDING:
            noisy_ids[row, length[row].item() :] = args.MASK_ID
        loss_mask[row, sorted(masked, key=lambda pos: numbers[2 + L + pos])[:k]] = True
        ts.append(t)
        ks.append(k)
    return noisy_ids, over_masked, torch.tensor(ts)[:, None], torch.tensor(ks)[:, None], loss_mask


@pytest.mark.parametrize(("rho_min", "mask_padding"), [(0.1, False), (0.0, True), (0.5, False)])
def test_corruption_is_the_loop_of_its_definition(args, rho_min, mask_padding):
    args.RHO_MIN, args.MASK_PADDING = rho_min, mask_padding
    rows = rows_of(1, 200)
    noisy_ids, over_masked, t, weight, loss_mask = train_lift.corrupt(args, *rows)
    expected = definition(args, *rows)
    for ours, theirs in zip((noisy_ids, over_masked, t), expected[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loss_mask, expected[4])
    torch.testing.assert_close(weight, 1 / expected[3].float())
    args.TIME_SCALING = True
    answer_tokens = rows[2] - rows[1]
    torch.testing.assert_close(train_lift.corrupt(args, *rows)[3], 1 / (t * answer_tokens))


def test_k_is_about_t_of_the_answer(args):
    """E[k / (t N)] = 1: 4,000 rows of 1,000 tokens; the mean within 6 standard errors.

    A row's standard deviation is below 0.2 for t above 0.05: 6 * 0.2 / 4000 ** 0.5 = 0.019.
    """
    rows, tokens = 4000, 1000
    noise = random_noise(0, rows, 4 + 2 * tokens)
    noise[:, 0] = 0.05 + 0.95 * noise[:, 0]
    column = torch.ones(rows, 1, dtype=torch.long)
    input_ids = torch.zeros(rows, 1 + tokens, dtype=torch.long)
    _, _, t, _, loss_mask = train_lift.corrupt(
        args, input_ids, column, (1 + tokens) * column, 0, noise
    )
    share = loss_mask.sum(1, keepdim=True) / (t * tokens)
    assert share.std() < 0.2
    assert abs(share.mean() - 1) < 0.019


def test_a_row_with_a_masked_token_has_at_least_one_to_learn(args):
    _, over_masked, _, _, loss_mask = train_lift.corrupt(args, *rows_of(2, 500))
    assert torch.equal(over_masked.any(1), loss_mask.any(1))
    assert not (loss_mask & ~over_masked).any()
    assert (~over_masked.any(1)).any()  # and some rows have none


def test_the_random_choice_masks_as_full_sequence_sft_does(args):
    """Each token of an answer with probability t, and pairs of tokens alike wherever they are.

    20,000 rows of 40 tokens, t = 1/2, 6 standard deviations. The number of tokens of a row varies
    less than with independent masks, since k is rounded from its expectation.
    """
    rows, tokens = 20_000, 40
    noise = random_noise(3, rows, 4 + 2 * tokens)
    noise[:, 0] = 0.5
    column = torch.ones(rows, 1, dtype=torch.long)
    input_ids = torch.zeros(rows, 1 + tokens, dtype=torch.long)
    _, _, t, _, kept = train_lift.corrupt(args, input_ids, column, (1 + tokens) * column, 0, noise)
    assert not train_lift.band(args, t).any()
    rates = kept[:, 1:].float().mean(0)
    error = (0.25 / rows) ** 0.5
    assert (rates - rates.mean()).abs().max() < 6 * error
    assert abs(rates.mean() - t[0].item()) < 6 * error
    pairs = [(kept[:, a] & kept[:, b]).float().mean() for a, b in ((1, 2), (1, 40), (20, 21))]
    assert max(pairs) - min(pairs) < 6 * (2 * 0.25 / rows) ** 0.5


# ------- the loss


def test_lowest_takes_ties_in_their_order(args):
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    candidates = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 0]]).bool()
    chosen = train_lift.lowest(scores, candidates, torch.tensor([[2], [3]]))
    assert chosen.tolist() == [[False, True, True, False, False], candidates[1].tolist()]


def loss_by_definition(args, model, batch):
    """The loss in plain loops over rows, from the full logits."""
    input_ids, noisy_ids, over_masked, t, weight, loss_mask = batch
    total = 0
    for row in range(len(input_ids)):
        positions = over_masked[row].nonzero().flatten().tolist()
        k = int(loss_mask[row].sum())
        model.train(args.APPROXIMATE)
        logits = model(input_ids=noisy_ids[row : row + 1]).logits[0]
        nll = {pos: cross_entropy(logits[pos], input_ids[row, pos]) for pos in positions}
        model.train()
        easiest = sorted(positions, key=lambda pos: nll[pos].item())
        kind = train_lift.band(args, t[row]).item()
        random_ones = loss_mask[row].nonzero().flatten().tolist()
        kept = {1: easiest[:k], -1: easiest[::-1][:k], 0: random_ones}[kind]
        if kind == 0 or not args.APPROXIMATE:  # a random choice needs no scores
            revealed = noisy_ids[row].clone()
            for pos in set(positions) - set(kept):
                revealed[pos] = input_ids[row, pos]
            logits = model(input_ids=revealed[None]).logits[0]
        for pos in kept:
            total += weight[row, 0] * cross_entropy(logits[pos], input_ids[row, pos])
    return total / len(input_ids)


def batch_of(args, seed, count=24):
    """A batch with small_llada's vocabulary and several rows of each band."""
    args.MASK_ID = VOCABULARY - 1
    input_ids, *rest = rows_of(seed, count)
    input_ids = input_ids % (VOCABULARY - 1)
    batch = input_ids, *train_lift.corrupt(args, input_ids, *rest)
    kinds = set(train_lift.band(args, batch[3]).flatten().tolist())
    assert kinds == ({-1, 0, 1} if args.COMPONENTS == 3 else {-1, 1})
    return batch


@pytest.mark.parametrize("components", [2, 3])
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("time_scaling", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(
    args,
    model,
    components,
    approximate,
    time_scaling,
):
    args.COMPONENTS, args.APPROXIMATE, args.TIME_SCALING = components, approximate, time_scaling
    batch = batch_of(args, seed=4)
    gradients = []
    for loss in (
        train_lift.supervised_loss(args, model, *batch),
        loss_by_definition(args, model, batch),
    ):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_dropout_or_on_the_batch(args, model):
    batch = batch_of(args, seed=5)
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.train()
    input_ids, noisy_ids, over_masked, *_ = batch
    t = batch[3]
    rows = train_lift.band(args, t).flatten() != 0
    scores = train_lift.score(args, adapted, input_ids, noisy_ids, over_masked, t)
    assert adapted.training and not scores.requires_grad
    assert not scores[~rows].any() and not scores[~over_masked].any()
    for row in rows.nonzero().flatten().tolist():
        one = slice(row, row + 1)
        alone = train_lift.score(
            args, adapted, input_ids[one], noisy_ids[one], over_masked[one], t[one]
        )
        torch.testing.assert_close(alone[0], scores[row])


def test_rows_with_a_random_choice_are_not_scored(args, model):
    input_ids, noisy_ids, over_masked, t, weight, loss_mask = batch_of(args, seed=6)
    seen = []
    model.register_forward_pre_hook(
        lambda module, _, kwargs: seen.append((len(kwargs["input_ids"]), module.training)),
        with_kwargs=True,
    )
    train_lift.supervised_loss(args, model, input_ids, noisy_ids, over_masked, t, weight, loss_mask)
    informed = int((train_lift.band(args, t) != 0).sum())
    assert seen == [(informed, False), (len(t), True)] and 0 < informed < len(t)
    seen.clear()
    half = torch.full_like(t, 0.5)
    train_lift.supervised_loss(
        args, model, input_ids, noisy_ids, over_masked, half, weight, loss_mask
    )
    assert seen == [(len(t), True)]


@pytest.mark.parametrize("approximate", [False, True])
def test_nothing_masked_at_all(args, model, approximate):
    """Zero, and still part of the graph: a rank with such a micro-batch takes part in the step."""
    args.APPROXIMATE = approximate
    input_ids, _, over_masked, t, weight, _ = batch_of(args, seed=7)
    nothing = torch.zeros_like(over_masked)
    loss = train_lift.supervised_loss(
        args, model, input_ids, input_ids, nothing, t, weight, nothing
    )
    loss.backward()
    assert loss.item() == 0


# ------- whole runs


def test_the_supervised_tokens_are_planned(args):
    """What the budget counts before training is what the loss is taken of."""
    args.MICRO_BSIZE, args.TOTAL_TRAIN_STEPS = 4, 5
    method = train_lift.METHOD
    examples = train_fullseq.load_examples(args)
    draws, left_out = train_fullseq.plan(args, method, examples, 1)
    planned = method.budget(args, method, examples, draws, left_out)["supervised_tokens"]
    counted = 0
    for batch in draws.reshape(-1, 4):
        _, _, over_masked, t, _, loss_mask = train_lift.make_batch(args, examples, batch, 0)
        scores = train_lift.band(args, t) * torch.rand(loss_mask.shape)
        chosen = train_lift.lowest(scores, over_masked, loss_mask.sum(1, keepdim=True))
        counted += int(chosen.sum())
    assert planned == counted > 0


def test_a_batch_is_corrupted_with_the_noise_of_its_draws(args):
    """2 + 2L numbers of SEED and a draw's id; a row does not depend on the others."""
    examples = train_fullseq.load_examples(args)
    draws = draws_of(range(100, 106), samples=range(6))
    rows = train_fullseq.pad_rows(args, examples, draws, 7)
    noise = train_fullseq.draw_noise(args, draws, 2 + 2 * args.MAX_LEN)
    batch = train_lift.make_batch(args, examples, draws, 7)
    for ours, theirs in zip(batch, (rows[0], *train_lift.corrupt(args, *rows, noise)), strict=True):
        assert torch.equal(ours, theirs)
    for n in range(6):
        alone = train_lift.make_batch(args, examples, draws[n : n + 1], 7)
        for ours, theirs in zip(alone, batch, strict=True):
            assert torch.equal(ours[0], theirs[n])


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_are_one_rank(toy_folder, tmp_path):
    """The same losses, but for rounding; a killed run ends with the log of one that was not."""
    script = SUITE / "experiments" / "train_lift.py"
    constants = {
        "MODEL_NAME": toy_folder / "model",
        "DATA_PT": toy_folder / "train.pt",
        "LORA_RANK": 16,
        "LORA_DROPOUT": 0.0,
        "LR": 1e-3,
        "TOTAL_TRAIN_STEPS": 20,
        "STATE_EVERY": 4,
    }
    one = [sys.executable, script, *flags(**constants, MICRO_BSIZE=4, CKPT_DIR="one")]
    status, printed = launch(one, tmp_path)
    assert status == 0, printed
    two = [*launcher(2), script, *flags(**constants, MICRO_BSIZE=2, CKPT_DIR="two")]
    kill_after_a_state(two, tmp_path, "two_logs")
    status, printed = launch(two, tmp_path)
    assert status == 0 and "resumes after step" in printed, printed
    ours, theirs = losses(tmp_path / "one_logs"), losses(tmp_path / "two_logs")
    assert len(ours) == 20 and abs(ours[0] - ours[-1]) > 0.1
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02
    record = json.loads((tmp_path / "two_logs" / "run_config.json").read_text())
    assert (record["script"], record["COMPONENTS"]) == ("train_lift.py", 3)
