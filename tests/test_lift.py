"""LIFT: the bands, the number of tokens, the choice, and the loss, against plain definitions."""

import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import train_lift
from campaign import kill
from conftest import SUITE, flags, launch, launcher, prepare, user_environment
from peft import LoraConfig, get_peft_model
from test_corruption import L, random_rows
from test_launch import losses
from test_loss import V, small_model
from torch.nn.functional import cross_entropy


@pytest.fixture
def lift(monkeypatch, toy_folder):
    return prepare(train_lift, monkeypatch, toy_folder)


def rows_of(seed, count=64):
    """Random rows as those of the other methods, with noise (B, 2 + 2L)."""
    input_ids, prompt_len, length, block, _ = random_rows(seed, rows=count, block_size=L)
    noise = np.random.default_rng(seed).random((count, 2 + 2 * L), dtype=np.float32)
    return input_ids, prompt_len, length, block, torch.from_numpy(noise)


@pytest.fixture
def model():
    return small_model()


# ------------------------------------------------------------------------------------- the bands


@pytest.mark.parametrize("components", [2, 3])
def test_bands_are_where_their_weights_are_largest(lift, components):
    lift.COMPONENTS = components
    t = torch.linspace(0.001, 0.999, 998)[:, None]  # none of them is a border
    weights = [t, 1 - t, 3 * t * (1 - t)][:components]
    largest = torch.cat(weights, dim=1).argmax(dim=1)
    assert lift.band(t).flatten().tolist() == [[1, -1, 0][n] for n in largest]
    assert len(set(largest.tolist())) == components


# ---------------------------------------------------------------------------------- the corruption


def definition(lift, input_ids, prompt_len, length, block, noise):
    """The corruption in plain loops: (noisy_ids, over_masked, t, k, loss_mask)."""
    f32 = np.float32
    noisy_ids = input_ids.clone()
    over_masked = torch.zeros_like(input_ids, dtype=torch.bool)
    loss_mask = torch.zeros_like(over_masked)
    ts, ks = [], []
    for row in range(len(input_ids)):
        numbers = noise[row].numpy()
        t = f32(lift.MASK_PROB_EPS) + f32(1 - lift.MASK_PROB_EPS) * numbers[0]
        lowest = f32(lift.RHO_MIN) if 1 - t > lift.RHO_MIN else f32(0)
        rho = lowest + (1 - t - lowest) * numbers[1 + L]
        masked = []
        for pos in range(prompt_len[row].item(), length[row].item()):
            if numbers[1 + pos] < t + rho:
                masked.append(pos)
        k = max(1, round(len(masked) * float(t) / float(t + rho)))
        over_masked[row, masked] = True
        noisy_ids[row, masked] = lift.MASK_ID
        if lift.MASK_PADDING:
            noisy_ids[row, length[row].item() :] = lift.MASK_ID
        loss_mask[row, sorted(masked, key=lambda pos: numbers[2 + L + pos])[:k]] = True
        ts.append(t)
        ks.append(k)
    return noisy_ids, over_masked, torch.tensor(ts)[:, None], torch.tensor(ks)[:, None], loss_mask


@pytest.mark.parametrize(("rho_min", "mask_padding"), [(0.1, False), (0.0, True), (0.5, False)])
def test_corruption_is_the_loop_of_its_definition(lift, rho_min, mask_padding):
    lift.RHO_MIN, lift.MASK_PADDING = rho_min, mask_padding
    rows = rows_of(1, 200)
    noisy_ids, over_masked, t, weight, loss_mask = lift.corrupt(*rows)
    expected = definition(lift, *rows)
    for ours, theirs in zip((noisy_ids, over_masked, t), expected[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loss_mask, expected[4])
    torch.testing.assert_close(weight, 1 / expected[3].float())
    lift.TIME_SCALING = True
    answer_tokens = rows[2] - rows[1]
    torch.testing.assert_close(lift.corrupt(*rows)[3], 1 / (t * answer_tokens))


def test_k_is_about_t_of_the_answer(lift):
    """E[k / (t N)] = 1: 4,000 rows of 1,000 tokens; the mean within 6 standard errors.

    A row's standard deviation is below 0.2 for t above 0.05: 6 * 0.2 / 4000 ** 0.5 = 0.019.
    """
    rows, tokens = 4000, 1000
    noise = torch.from_numpy(
        np.random.default_rng(0).random((rows, 4 + 2 * tokens), dtype=np.float32)
    )
    noise[:, 0] = 0.05 + 0.95 * noise[:, 0]
    column = torch.ones(rows, 1, dtype=torch.long)
    input_ids = torch.zeros(rows, 1 + tokens, dtype=torch.long)
    _, _, t, _, loss_mask = lift.corrupt(input_ids, column, (1 + tokens) * column, 0, noise)
    share = loss_mask.sum(1, keepdim=True) / (t * tokens)
    assert share.std() < 0.2
    assert abs(share.mean() - 1) < 0.019


def test_a_row_with_a_masked_token_has_at_least_one_to_learn(lift):
    _, over_masked, _, _, loss_mask = lift.corrupt(*rows_of(2, 500))
    assert torch.equal(over_masked.any(1), loss_mask.any(1))
    assert not (loss_mask & ~over_masked).any()
    assert (~over_masked.any(1)).any()  # and some rows have none


def test_the_random_choice_masks_as_full_sequence_sft_does(lift):
    """Each token of an answer with probability t, and pairs of tokens alike wherever they are.

    20,000 rows of 40 tokens, t = 1/2, 6 standard deviations. The number of tokens of a row varies
    less than with independent masks, since k is rounded from its expectation.
    """
    rows, tokens = 20_000, 40
    noise = torch.from_numpy(
        np.random.default_rng(3).random((rows, 4 + 2 * tokens), dtype=np.float32)
    )
    noise[:, 0] = 0.5
    column = torch.ones(rows, 1, dtype=torch.long)
    input_ids = torch.zeros(rows, 1 + tokens, dtype=torch.long)
    _, _, t, _, kept = lift.corrupt(input_ids, column, (1 + tokens) * column, 0, noise)
    assert not lift.band(t).any()
    rates = kept[:, 1:].float().mean(0)
    error = (0.25 / rows) ** 0.5
    assert (rates - rates.mean()).abs().max() < 6 * error
    assert abs(rates.mean() - t[0].item()) < 6 * error
    pairs = [(kept[:, a] & kept[:, b]).float().mean() for a, b in ((1, 2), (1, 40), (20, 21))]
    assert max(pairs) - min(pairs) < 6 * (2 * 0.25 / rows) ** 0.5


# ----------------------------------------------------------------------------------------- the loss


def test_lowest_takes_ties_in_their_order(lift):
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    candidates = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 0]]).bool()
    chosen = lift.lowest(scores, candidates, torch.tensor([[2], [3]]))
    assert chosen.tolist() == [[False, True, True, False, False], candidates[1].tolist()]


def loss_by_definition(lift, model, batch):
    """The loss in plain loops over rows, from the full logits."""
    input_ids, noisy_ids, over_masked, t, weight, loss_mask = batch
    total = 0
    for row in range(len(input_ids)):
        positions = over_masked[row].nonzero().flatten().tolist()
        k = int(loss_mask[row].sum())
        model.train(lift.APPROXIMATE)
        logits = model(input_ids=noisy_ids[row : row + 1]).logits[0]
        nll = {pos: cross_entropy(logits[pos], input_ids[row, pos]) for pos in positions}
        model.train()
        easiest = sorted(positions, key=lambda pos: nll[pos].item())
        kind = lift.band(t[row]).item()
        random_ones = loss_mask[row].nonzero().flatten().tolist()
        kept = {1: easiest[:k], -1: easiest[::-1][:k], 0: random_ones}[kind]
        if not lift.APPROXIMATE:
            revealed = noisy_ids[row].clone()
            for pos in set(positions) - set(kept):
                revealed[pos] = input_ids[row, pos]
            logits = model(input_ids=revealed[None]).logits[0]
        for pos in kept:
            total += weight[row, 0] * cross_entropy(logits[pos], input_ids[row, pos])
    return total / len(input_ids)


def batch_of(lift, seed, count=24):
    """A batch with vocabulary V and several rows of each band."""
    lift.MASK_ID = V - 1
    input_ids, *rest = rows_of(seed, count)
    input_ids = input_ids % (V - 1)
    batch = input_ids, *lift.corrupt(input_ids, *rest)
    kinds = set(lift.band(batch[3]).flatten().tolist())
    assert kinds == ({-1, 0, 1} if lift.COMPONENTS == 3 else {-1, 1})
    return batch


@pytest.mark.parametrize("components", [2, 3])
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("time_scaling", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(
    lift,
    model,
    components,
    approximate,
    time_scaling,
):
    lift.COMPONENTS, lift.APPROXIMATE, lift.TIME_SCALING = components, approximate, time_scaling
    batch = batch_of(lift, seed=4)
    gradients = []
    for loss in (lift.supervised_loss(model, *batch), loss_by_definition(lift, model, batch)):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_dropout_or_on_the_batch(lift, model):
    batch = batch_of(lift, seed=5)
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.train()
    input_ids, noisy_ids, over_masked, *_ = batch
    t = batch[3]
    rows = lift.band(t).flatten() != 0
    scores = lift.score(adapted, input_ids, noisy_ids, over_masked, t)
    assert adapted.training and not scores.requires_grad
    assert not scores[~rows].any() and not scores[~over_masked].any()
    for row in rows.nonzero().flatten().tolist():
        one = slice(row, row + 1)
        alone = lift.score(adapted, input_ids[one], noisy_ids[one], over_masked[one], t[one])
        torch.testing.assert_close(alone[0], scores[row])


def test_rows_with_a_random_choice_are_not_scored(lift, model):
    input_ids, noisy_ids, over_masked, t, weight, loss_mask = batch_of(lift, seed=6)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(kwargs["input_ids"]), module.training)),
        with_kwargs=True,
    )
    lift.supervised_loss(model, input_ids, noisy_ids, over_masked, t, weight, loss_mask)
    informed = int((lift.band(t) != 0).sum())
    assert seen == [(informed, False), (len(t), True)] and 0 < informed < len(t)
    seen.clear()
    half = torch.full_like(t, 0.5)
    lift.supervised_loss(model, input_ids, noisy_ids, over_masked, half, weight, loss_mask)
    assert seen == [(len(t), True)]


@pytest.mark.parametrize("approximate", [False, True])
def test_nothing_masked_at_all(lift, model, approximate):
    """Zero, and still part of the graph: a rank with such a micro-batch takes part in the step."""
    lift.APPROXIMATE = approximate
    input_ids, _, over_masked, t, weight, _ = batch_of(lift, seed=7)
    nothing = torch.zeros_like(over_masked)
    loss = lift.supervised_loss(model, input_ids, input_ids, nothing, t, weight, nothing)
    loss.backward()
    assert loss.item() == 0


# --------------------------------------------------------------------------------------- whole runs


def test_the_supervised_tokens_are_planned(lift, toy_folder):
    """What describe_run counts before training is what the loss is taken of."""
    lift.MICRO_BSIZE, lift.TOTAL_TRAIN_STEPS = 4, 5
    examples = lift.load_examples()
    draws, numbers = lift.plan(examples, 1)
    planned = lift.describe_run(examples, draws, numbers)["budget"]["supervised_tokens"]
    counted = 0
    for batch in numbers.reshape(-1, 4):
        _, _, over_masked, t, _, loss_mask = lift.make_batch(examples, draws, batch, 0)
        scores = torch.rand(loss_mask.shape)
        chosen = lift.lowest(lift.band(t) * scores, over_masked, loss_mask.sum(1, keepdim=True))
        counted += int(chosen.sum())
    assert planned == counted > 0


def kill_after_a_state(command, folder):
    """Start a run of two ranks and kill all its processes when it has saved a state."""
    with open(folder / "printed", "w") as printed:
        run = subprocess.Popen(
            command,
            cwd=folder,
            env=user_environment(),
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )
    deadline = time.time() + 200
    while not (folder / "two_logs" / "state" / "latest.json").exists():
        assert time.time() < deadline and run.poll() is None, (folder / "printed").read_text()
        time.sleep(0.01)
    kill(run, "in a step", random.Random(0))


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
    kill_after_a_state(two, tmp_path)
    status, printed = launch(two, tmp_path)
    assert status == 0 and "resumes after step" in printed, printed
    ours, theirs = losses(tmp_path / "one_logs"), losses(tmp_path / "two_logs")
    assert len(ours) == 20 and abs(ours[0] - ours[-1]) > 0.1
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02
    record = json.loads((tmp_path / "two_logs" / "run_config.json").read_text())
    assert (record["script"], record["COMPONENTS"]) == ("train_lift.py", 3)
