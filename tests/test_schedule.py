"""The run as a list of draws: what is drawn, how often, when it ends, and how ranks share it."""

from collections import Counter

import numpy as np
import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR
from helpers import constants, draws_of

import train_blockwise
import train_fullseq


def examples_with(*answer_lengths, prompt_len=5):
    return [(prompt_len, torch.arange(prompt_len + length)) for length in answer_lengths]


def offsets_of(examples, block_size):
    """The offsets of every sample's blocks."""
    return [range(0, len(ids) - prompt_len, block_size) for prompt_len, ids in examples]


def test_every_block_once_and_then_the_end():
    """The published script draws used-up samples again, as rows without a mask."""
    args = constants(train_blockwise, BLOCK_SIZE=8)
    examples = examples_with(1, 8, 9, 40, 17, 64)
    draws = train_blockwise.schedule(args, examples, max_draws=10_000)
    everything = set()
    for sample, offsets in enumerate(offsets_of(examples, 8)):
        everything |= {(sample, offset) for offset in offsets}
    assert len(draws) == len(everything) and set(map(tuple, draws)) == everything


def test_passes():
    args = constants(train_blockwise, BLOCK_SIZE=8)
    samples = train_blockwise.schedule(args, examples_with(8, 16, 24), 10_000)[:, 0].tolist()
    passes = [samples[:3], samples[3:5], samples[5:]]
    assert [sorted(samples) for samples in passes] == [[0, 1, 2], [1, 2], [2]]


def test_blocks_are_drawn_uniformly():
    """First blocks of 6,000 samples: 6 standard deviations, one false alarm in 1e8 runs."""
    args = constants(train_blockwise, BLOCK_SIZE=8)
    offsets = train_blockwise.schedule(args, examples_with(*[32] * 6000), 6000)[:, 1]
    counts = Counter(offsets.tolist())
    assert set(counts) == {0, 8, 16, 24}
    for count in counts.values():
        assert abs(count / 6000 - 0.25) < 6 * (0.25 * 0.75 / 6000) ** 0.5


def test_fullseq_goes_pass_after_pass():
    args = constants(train_fullseq)
    draws = train_fullseq.schedule(args, examples_with(*range(1, 8)), 7 * 3 + 4)
    assert len(draws) == 25 and not draws[:, 1].any()
    assert all(sorted(draws[start : start + 7, 0]) == list(range(7)) for start in (0, 7, 14))
    assert len(set(draws[21:, 0])) == 4
    assert draws[:7, 0].tolist() != draws[7:14, 0].tolist()


def test_schedule_is_a_function_of_seed_alone(trainer, args):
    examples = examples_with(*range(1, 100))
    first = trainer.schedule(args, examples, 90)
    np.random.default_rng().random(10)
    assert np.array_equal(first, trainer.schedule(args, examples, 90))
    shorter = trainer.schedule(args, examples, 40)  # is a prefix of the longer one
    assert np.array_equal(first[:40], shorter)
    args.SEED += 1
    assert not np.array_equal(first, trainer.schedule(args, examples, 90))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_steps_do_not_depend_on_the_ranks(trainer, args, world_size):
    """The published script takes an eighth of the steps on 8 ranks."""
    args.TOTAL_TRAIN_STEPS, args.MICRO_BSIZE, args.GRAD_ACC = None, 4, 2
    args.MAX_SAMPLES, args.EPOCHS = 100, 2
    examples = examples_with(*[2000] * 101)  # no multiple of anything
    draws, left_out = trainer.plan(args, trainer.METHOD, examples, world_size)
    assert len(draws) == 100 * 2 // (4 * 2)
    assert draws.size == 25 * 8 * world_size and left_out == 0
    config = trainer.ds_config(args, len(draws))
    assert config["scheduler"]["params"]["total_num_steps"] == 25


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_get_equal_slices_that_together_are_all_draws(trainer, args, world_size):
    """The published script gives ranks different numbers of batches if its shards are uneven."""
    args.MICRO_BSIZE, args.GRAD_ACC, args.TOTAL_TRAIN_STEPS = 3, 2, 5
    examples = examples_with(*[2000] * 13)
    draws, left_out = trainer.plan(args, trainer.METHOD, examples, world_size)
    assert draws.shape == (5, 2, world_size, 3) and left_out == 0
    assert draws["id"].flatten().tolist() == list(range(draws.size))
    scheduled = trainer.schedule(args, examples, draws.size)
    assert draws["sample"].flatten().tolist() == scheduled[:, 0].tolist()
    assert draws["offset"].flatten().tolist() == scheduled[:, 1].tolist()
    # a step is the same set of draws, however many ranks share it
    size = 6 * world_size
    for step, share in enumerate(draws["id"]):
        assert set(share.flatten()) == set(range(step * size, (step + 1) * size))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_early_end(world_size):
    args = constants(train_blockwise, BLOCK_SIZE=8, MICRO_BSIZE=2, TOTAL_TRAIN_STEPS=1000)
    examples = examples_with(8, 9, 40, 17, 64, 23, 30, 12)
    total = sum(map(len, offsets_of(examples, 8)))
    draws, left_out = train_blockwise.plan(args, train_blockwise.METHOD, examples, world_size)
    assert len(draws) == total // (2 * world_size) > 0
    assert left_out == total % (2 * world_size)
    drawn = Counter(map(tuple, draws[["sample", "offset"]].flatten().tolist()))
    assert max(drawn.values()) == 1


def test_no_draws_at_all(trainer, args):
    for examples in ([], examples_with(0, 0)):
        draws, left_out = trainer.plan(args, trainer.METHOD, examples, 2)
        assert draws.shape == (0, 1, 2, 2) and left_out == 0


def test_the_published_defaults():
    """200 and 300 steps of batch 32; on eight GPUs, blockwise runs out of blocks before."""
    for module, steps in ((train_blockwise, 200), (train_fullseq, 300)):
        args = constants(module)
        assert args.MAX_SAMPLES * args.EPOCHS // (args.MICRO_BSIZE * args.GRAD_ACC) == steps
        assert args.TOTAL_TRAIN_STEPS is None

    def steps_of(module, samples, world_size):
        examples = examples_with(*[130] * samples)
        return len(module.plan(constants(module), module.METHOD, examples, world_size)[0])

    assert steps_of(train_fullseq, 200, 8) == 300
    assert steps_of(train_blockwise, 6400, 1) == 200
    assert steps_of(train_blockwise, 6400, 8) == 6400 * 5 // 256


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 200])
def test_warm_up_is_never_zero(trainer, args, steps):
    """DeepSpeed refuses 0 warm-up steps, with which the published script fails in short runs."""
    config = trainer.ds_config(args, steps)["scheduler"]["params"]
    WarmupCosineLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), **config)
    assert config["warmup_num_steps"] == max(1, steps // 10)


def test_the_published_optimizer_settings(trainer):
    config = trainer.ds_config(constants(trainer), 200)
    adamw = config["optimizer"]["params"]
    expected = {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
    assert {name: adamw[name] for name in expected} == expected
    cosine = config["scheduler"]["params"]
    assert (cosine["warmup_num_steps"], cosine["cos_min_ratio"]) == (20, 0.01)
    assert config["train_micro_batch_size_per_gpu"] == 32
    assert config["gradient_clipping"] == 1.0
    zero = config["zero_optimization"]
    assert zero["stage"] == 2
    assert zero["allgather_bucket_size"] == zero["reduce_bucket_size"] == 2e8
    assert zero["overlap_comm"] and zero["reduce_scatter"] and zero["contiguous_gradients"]


def test_the_constants_reach_the_optimizer(trainer):
    args = constants(trainer, GRAD_CLIP=0.5, WARMUP_RATIO=0.25, LR=1e-3, GRAD_ACC=3, MICRO_BSIZE=4)
    config = trainer.ds_config(args, 200)
    assert config["gradient_clipping"] == 0.5
    assert config["scheduler"]["params"]["warmup_num_steps"] == 50
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_micro_batch_size_per_gpu"] == 4


def test_examples_are_cut_dropped_and_counted(trainer, args, tmp_path):
    args.DATA_PT, args.MAX_LEN, args.MAX_SAMPLES = str(tmp_path / "rows.pt"), 10, 4
    args.TOTAL_TRAIN_STEPS, args.MICRO_BSIZE = 1, 2
    # The third has no answer within 10 tokens, the fourth none, the fifth is beyond MAX_SAMPLES
    lengths = [(3, 8), (3, 12), (10, 12), (5, 5), (2, 9)]
    rows = [{"prompt_len": p, "full_ids": torch.arange(n)} for p, n in lengths]
    torch.save(rows, args.DATA_PT)
    examples = trainer.load_examples(args)
    assert [len(ids) for _, ids in examples] == [8, 10, 10, 5]
    draws, left_out = trainer.plan(args, trainer.METHOD, examples, 1)
    assert sorted(draws["sample"].flatten().tolist()) == [0, 1]  # numbers of rows
    budget = trainer.budget(args, trainer.METHOD, examples, draws, left_out)
    assert (budget["samples"], budget["samples_without_answer"]) == (2, 2)


def test_the_budget_counts_what_is_trained(trainer, args):
    args.MICRO_BSIZE, args.GRAD_ACC, args.TOTAL_TRAIN_STEPS = 3, 2, 4
    examples = examples_with(*range(20, 60))
    draws, left_out = trainer.plan(args, trainer.METHOD, examples, 2)
    budget = trainer.budget(args, trainer.METHOD, examples, draws, left_out)
    supervised = 0
    for draw in draws.flatten():
        supervised += int(trainer.make_batch(args, examples, np.array([draw]), 0)[2].sum())
    assert budget["supervised_tokens"] == supervised > 0
    assert (budget["steps"], budget["global_batch"], budget["draws"]) == (4, 12, 48)
    assert budget["forward_tokens"] == 48 * 256 and budget["passes"] == 48 / 40


def test_batches_hold_what_was_drawn(trainer, args):
    args.MAX_LEN, args.MASK_ID = 20, 999
    examples = [(2, torch.arange(100, 107)), (3, torch.arange(200, 220))]
    draws = draws_of([1, 0], samples=[0, 1])
    input_ids, noisy_ids, loss_mask = trainer.make_batch(args, examples, draws, pad_id=7)
    assert input_ids.tolist() == [[*range(100, 107), *[7] * 13], [*range(200, 220)]]
    assert torch.equal(noisy_ids[loss_mask], torch.full((int(loss_mask.sum()),), 999))
    assert not loss_mask[0, :2].any() and not loss_mask[0, 7:].any() and not loss_mask[1, :3].any()
