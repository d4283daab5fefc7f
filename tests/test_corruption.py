"""The corruptions against the plain loop of their definitions; invariants, rates, the bridge."""

import numpy as np
import pytest
import torch
from helpers import L, constants, draws_of, random_noise, random_rows

import train_blockwise
import train_fullseq


def region_of(pos, prompt_len, length, first, last):
    """The part of the row that a position lies in."""
    if pos < prompt_len:
        return "prompt"
    if pos >= length:
        return "padding"
    return "prefix" if pos < first else "active" if pos < last else "suffix"


def oracle(args, input_ids, prompt_len, length, offset, noise, block_size):
    """noisy_ids and loss_mask, by the probability of [MASK] in each part of a row."""
    rates = {"prompt": 0.0, "padding": float(args.MASK_PADDING)}
    if "PREFIX_MASK_RATE" in args:
        rates |= {"prefix": args.PREFIX_MASK_RATE, "suffix": args.SUFFIX_MASK_PROB}
    noisy_ids, loss_mask = input_ids.clone(), torch.zeros_like(input_ids, dtype=torch.bool)
    eps = args.MASK_PROB_EPS
    for row in range(len(input_ids)):
        rates["active"] = np.float32(eps) + np.float32(1 - eps) * noise[row, 0].numpy()
        first = prompt_len[row].item() + offset[row].item()
        ends = prompt_len[row].item(), length[row].item(), first, first + block_size
        for pos in range(L):
            region = region_of(pos, *ends)
            if noise[row, 1 + pos].item() < np.float32(rates[region]):
                noisy_ids[row, pos] = args.MASK_ID
                loss_mask[row, pos] = region == "active"
    return noisy_ids, loss_mask


def check_definition(module, args, rows, noise, block_size):
    ours = module.corrupt(args, *rows, noise)
    for one, other in zip(ours, oracle(args, *rows, noise, block_size), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "rates", [(0.0, 1.0, False), (0.2, 0.5, True), (0.5, 0.0, False), (1.0, 0.3, True)]
)
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_blockwise_is_the_loop_of_its_definition(rates, block_size):
    args = constants(train_blockwise, BLOCK_SIZE=block_size)
    args.PREFIX_MASK_RATE, args.SUFFIX_MASK_PROB, args.MASK_PADDING = rates
    rows = random_rows(block_size, block_size=block_size)
    check_definition(train_blockwise, args, rows, random_noise(0, 64, 1 + L), block_size)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_fullseq_is_the_loop_of_its_definition(mask_padding):
    args = constants(train_fullseq, MASK_PADDING=mask_padding)
    rows = random_rows(1, block_size=L)  # the answer is the only block
    check_definition(train_fullseq, args, rows, random_noise(1, 64, 1 + L), L)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_one_block_over_the_answer_bridges_the_methods(mask_padding):
    blockwise = constants(train_blockwise, BLOCK_SIZE=L, MASK_PADDING=mask_padding)
    fullseq = constants(train_fullseq, MASK_PADDING=mask_padding)
    rows = *random_rows(2, block_size=L), random_noise(2, 64, 1 + L)
    ours = train_blockwise.corrupt(blockwise, *rows)
    theirs = train_fullseq.corrupt(fullseq, *rows)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_blockwise_shows_the_state_of_decoding():
    args = constants(train_blockwise, BLOCK_SIZE=8, MASK_PADDING=True)
    rows = random_rows(3)
    input_ids, prompt_len, length, offset = rows
    noisy_ids, loss_mask = train_blockwise.corrupt(args, *rows, random_noise(3, 64, 1 + L))
    pos, first = torch.arange(L), prompt_len + offset
    before, behind = pos < first, pos >= torch.minimum(first + 8, length)
    assert torch.equal(noisy_ids[before], input_ids[before])
    assert (noisy_ids[behind] == args.MASK_ID).all()
    assert not loss_mask[before | behind].any()
    inside = ~before & ~behind
    assert torch.equal(loss_mask[inside], noisy_ids[inside] == args.MASK_ID)
    assert 0 < loss_mask.sum() < inside.sum()


def test_rates():
    """20,000 positions a region, 6 standard deviations: a false alarm in about 5e8 runs."""
    args = constants(train_blockwise, BLOCK_SIZE=4, PREFIX_MASK_RATE=0.2, SUFFIX_MASK_PROB=0.7)
    args.MASK_PROB_EPS = 0.1
    rows = 5000
    column = torch.ones(rows, 1, dtype=torch.long)
    input_ids = torch.zeros(rows, 13).long()
    noise = random_noise(0, rows, 14)
    # one token of the prompt, then blocks of four: the prefix, the active block, the suffix
    noisy_ids, loss_mask = train_blockwise.corrupt(
        args, input_ids, column, 13 * column, 4 * column, noise
    )
    masked = (noisy_ids == args.MASK_ID).float()
    for region, rate in ((masked[:, 1:5], 0.2), (masked[:, 9:], 0.7)):
        assert abs(region.mean() - rate) < 6 * (rate * (1 - rate) / region.numel()) ** 0.5
    # in the block: mean of t ~ U(0.1, 1) is 0.55, the positions of a row share their t
    share = loss_mask[:, 5:9].float().mean(1)
    assert abs(share.mean() - 0.55) < 6 * (0.9**2 / 12 + 0.55 * 0.45 / 4) ** 0.5 / rows**0.5
    # P(all four masked) = E[t^4] = (1 - 1e-5) / (5 * 0.9)
    p = (1 - 0.1**5) / (5 * 0.9)
    assert abs((share == 1).float().mean() - p) < 6 * (p * (1 - p) / rows) ** 0.5


def test_mean_over_masked_is_the_weighted_bound():
    """With every token's loss 1 and t ~ U(0, 1), the loss is P(some token masked) = b / (b + 1)."""
    args = constants(train_blockwise, BLOCK_SIZE=4, MASK_PROB_EPS=0.0)
    rows = 20000
    column = torch.ones(rows, 1, dtype=torch.long)
    input_ids = torch.zeros(rows, 5).long()
    noise = random_noise(1, rows, 6)
    _, loss_mask = train_blockwise.corrupt(args, input_ids, column, 5 * column, 0 * column, noise)
    p = 4 / 5
    assert abs(loss_mask.any(1).float().mean() - p) < 6 * (p * (1 - p) / rows) ** 0.5


def test_noise_is_a_function_of_seed_and_draw_alone(trainer, args):
    """Not of the rank, the rows or earlier draws, on which that of the published script depends."""
    together = trainer.draw_noise(args, draws_of(range(20)), 257)
    for n in range(20):
        alone = trainer.draw_noise(args, draws_of([n], samples=3, offsets=64), 257)
        assert torch.equal(alone[0], together[n])
    assert together.shape == (20, 257)
    torch.manual_seed(7)
    assert torch.equal(together, trainer.draw_noise(args, draws_of(range(20)), 257))


def test_neighbouring_seeds_share_no_draw(trainer):
    noise = []
    for seed in range(40, 45):
        noise.append(trainer.draw_noise(constants(trainer, SEED=seed), draws_of(range(30)), 257))
    rows = torch.cat(noise)
    assert len(torch.unique(rows, dim=0)) == 150
    assert 0 <= rows.min() and rows.max() < 1


def test_a_batch_is_corrupted_with_the_noise_of_its_draws(trainer, args):
    """make_batch is pad_rows, draw_noise and corrupt; a row does not depend on the others."""
    args.MASK_ID = 999
    rng = np.random.default_rng(0)
    examples = [(int(n), torch.arange(n + 9)) for n in rng.integers(1, 30, 10)]
    draws = draws_of(range(100, 110), samples=range(10))
    rows = trainer.pad_rows(args, examples, draws, 7)
    noise = trainer.draw_noise(args, draws, 1 + args.MAX_LEN)
    expected = rows[0], *trainer.corrupt(args, *rows, noise)
    batch = trainer.make_batch(args, examples, draws, 7)
    for ours, theirs in zip(batch, expected, strict=True):
        assert torch.equal(ours, theirs)
    for n in range(10):
        alone = trainer.make_batch(args, examples, draws[n : n + 1], 7)
        for ours, theirs in zip(alone, batch, strict=True):
            assert torch.equal(ours[0], theirs[n])
