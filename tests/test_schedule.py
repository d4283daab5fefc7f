"""The run as a list of draws: what is drawn, how often, when it ends, and how ranks share it."""

from collections import Counter

import numpy as np
import pytest
import torch


def examples_with(*answer_lengths, prompt_len=5):
    return [(prompt_len, torch.arange(prompt_len + length)) for length in answer_lengths]


def blocks_of(examples, block_size):
    return [-(-(len(ids) - prompt_len) // block_size) for prompt_len, ids in examples]


def test_every_block_once_and_then_the_end(blockwise):
    """Fails on the published behaviour (T9): there used-up samples came back."""
    blockwise.BLOCK_SIZE = 8
    examples = examples_with(1, 8, 9, 40, 17, 64)
    draws = blockwise.schedule(examples, max_draws=10_000)
    everything = {(sample, b) for sample, n in enumerate(blocks_of(examples, 8)) for b in range(n)}
    assert len(draws) == len(everything) and set(map(tuple, draws)) == everything


def test_passes(blockwise):
    blockwise.BLOCK_SIZE = 8
    examples = examples_with(8, 16, 24)
    samples = blockwise.schedule(examples, 10_000)[:, 0].tolist()
    passes = [samples[:3], samples[3:5], samples[5:]]
    assert [sorted(samples) for samples in passes] == [[0, 1, 2], [1, 2], [2]]


def test_blocks_are_drawn_uniformly(blockwise):
    """First blocks of 6,000 samples: 6 standard deviations, one false alarm in 1e8 runs."""
    blockwise.BLOCK_SIZE = 8
    first = blockwise.schedule(examples_with(*[32] * 6000), 6000)[:, 1]
    assert all(
        abs(count / 6000 - 0.25) < 6 * (0.25 * 0.75 / 6000) ** 0.5
        for count in np.bincount(first, minlength=4)
    )


def test_fullseq_goes_pass_after_pass(fullseq):
    draws = fullseq.schedule(examples_with(*range(1, 8)), 7 * 3 + 4)
    assert len(draws) == 25 and not draws[:, 1].any()
    assert all(sorted(draws[start : start + 7, 0]) == list(range(7)) for start in (0, 7, 14))
    assert len(set(draws[21:, 0])) == 4
    assert draws[:7, 0].tolist() != draws[7:14, 0].tolist()


def test_schedule_is_a_function_of_seed_alone(trainer):
    examples = examples_with(*range(1, 100))
    first = trainer.schedule(examples, 90)
    np.random.default_rng().random(10)
    assert np.array_equal(first, trainer.schedule(examples, 90))
    assert np.array_equal(
        first[:40], trainer.schedule(examples, 40)
    )  # a shorter run is a prefix of a longer one
    trainer.SEED += 1
    assert not np.array_equal(first, trainer.schedule(examples, 90))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_steps_do_not_depend_on_the_ranks(trainer, world_size):
    """Fails on the published behaviour (T1): 1/8 of the steps on 8 ranks."""
    trainer.TOTAL_TRAIN_STEPS, trainer.MICRO_BSIZE, trainer.GRAD_ACC = None, 4, 2
    trainer.MAX_SAMPLES, trainer.EPOCHS = 100, 2
    examples = examples_with(*[2000] * 101)  # no multiple of anything
    draws, shares = trainer.plan(examples, world_size)
    assert len(shares) == 100 * 2 // (4 * 2)
    assert len(draws) == shares.size == 25 * 8 * world_size
    config = trainer.ds_config(len(shares))
    assert config["scheduler"]["params"]["total_num_steps"] == 25


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_get_equal_slices_that_together_are_all_draws(trainer, world_size):
    """Fails on the published behaviour (T3): uneven shards gave ranks different batch counts."""
    trainer.MICRO_BSIZE, trainer.GRAD_ACC, trainer.TOTAL_TRAIN_STEPS = 3, 2, 5
    draws, shares = trainer.plan(examples_with(*[2000] * 13), world_size)
    assert shares.shape == (5, 2, world_size, 3)
    assert sorted(shares.flatten()) == list(range(len(draws)))
    for step, share in enumerate(
        shares
    ):  # a step is the same set of draws, however many ranks share it
        assert set(share.flatten()) == set(
            range(step * 6 * world_size, (step + 1) * 6 * world_size)
        )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_early_end(blockwise, world_size):
    blockwise.BLOCK_SIZE, blockwise.MICRO_BSIZE, blockwise.TOTAL_TRAIN_STEPS = 8, 2, 1000
    examples = examples_with(8, 9, 40, 17, 64, 23, 30, 12)
    total = sum(blocks_of(examples, 8))
    draws, shares = blockwise.plan(examples, world_size)
    assert len(shares) == total // (2 * world_size) > 0
    assert len(draws) - shares.size == total % (2 * world_size)
    assert max(Counter(map(tuple, draws)).values()) == 1


def test_the_published_defaults():
    """200 and 300 steps of batch 32; on eight GPUs, blockwise runs out of blocks before."""
    import train_blockwise
    import train_fullseq

    examples = examples_with(*[130] * 200)
    for module, steps in ((train_blockwise, 200), (train_fullseq, 300)):
        assert module.MAX_SAMPLES * module.EPOCHS // (module.MICRO_BSIZE * module.GRAD_ACC) == steps
    answers = examples_with(*[130] * 6400)
    assert len(train_fullseq.plan(examples, 8)[1]) == 300
    assert len(train_blockwise.plan(answers, 1)[1]) == 200
    assert len(train_blockwise.plan(answers, 8)[1]) == 6400 * 5 // 256


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 200])
def test_warm_up_is_never_zero(trainer, steps):
    """Fails on the published behaviour (T14): DeepSpeed refuses 0 warm-up steps."""
    from deepspeed.runtime.lr_schedules import WarmupCosineLR

    config = trainer.ds_config(steps)["scheduler"]["params"]
    WarmupCosineLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), **config)
    assert config["warmup_num_steps"] == max(1, steps // 10)


def test_the_published_optimizer_settings(trainer):
    trainer.LR, trainer.MICRO_BSIZE = 1e-5, 32
    config = trainer.ds_config(200)
    adamw = config["optimizer"]["params"]
    trainer.GRAD_CLIP, trainer.WARMUP_RATIO, trainer.LR = 0.5, 0.25, 1e-3
    other = trainer.ds_config(200)
    assert (other["gradient_clipping"], other["scheduler"]["params"]["warmup_num_steps"]) == (
        0.5,
        50,
    )
    assert other["optimizer"]["params"]["lr"] == 1e-3
    assert (adamw["lr"], adamw["betas"], adamw["eps"], adamw["weight_decay"]) == (
        1e-5,
        [0.9, 0.95],
        1e-8,
        0.0,
    )
    cosine = config["scheduler"]["params"]
    assert (cosine["warmup_num_steps"], cosine["cos_min_ratio"]) == (20, 0.01)
    assert (config["gradient_clipping"], config["bf16"]["enabled"]) == (1.0, True)
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["allgather_bucket_size"], zero["reduce_bucket_size"]) == (
        2,
        2e8,
        2e8,
    )
    assert zero["overlap_comm"] and zero["reduce_scatter"] and zero["contiguous_gradients"]


def test_examples_are_cut_dropped_and_counted(trainer, tmp_path):
    trainer.DATA_PT, trainer.MAX_LEN, trainer.MAX_SAMPLES = str(tmp_path / "rows.pt"), 10, 4
    # The third has no answer within 10 tokens, the fourth none, the fifth is beyond MAX_SAMPLES
    lengths = [(3, 8), (3, 12), (10, 12), (5, 5), (2, 9)]
    rows = [{"prompt_len": p, "full_ids": torch.arange(n)} for p, n in lengths]
    torch.save(rows, trainer.DATA_PT)
    trainer.TOTAL_TRAIN_STEPS, trainer.MICRO_BSIZE = 1, 2
    examples = trainer.load_examples()
    draws, numbers = trainer.plan(examples, 1)
    assert sorted(draws[:, 0].tolist()) == [0, 1]  # numbers of rows
    assert [len(ids) for _, ids in examples] == [8, 10, 10, 5]
    budget = trainer.describe_run(examples, draws, numbers)["budget"]
    assert (budget["samples"], budget["samples_without_answer"]) == (2, 2)


def test_batches_hold_what_was_drawn(trainer):
    trainer.MAX_LEN, trainer.MASK_ID = 20, 999
    examples = [(2, torch.arange(100, 107)), (3, torch.arange(200, 220))]
    input_ids, noisy_ids, loss_mask = trainer.make_batch(
        examples, np.array([[1, 0], [0, 0]]), [1, 0], pad_id=7
    )
    assert input_ids.tolist() == [[*range(100, 107), *[7] * 13], [*range(200, 220)]]
    assert torch.equal(noisy_ids[loss_mask], torch.full((int(loss_mask.sum()),), 999))
    assert not loss_mask[0, :2].any() and not loss_mask[0, 7:].any() and not loss_mask[1, :3].any()
