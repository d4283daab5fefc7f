"""Controls for Blockwise SFT: a trainer with one thing changed, to see what a gain is due to.

    deepspeed --num_gpus 8 experiments/train_control.py --CONTROL causal

    causal        the states of Blockwise SFT, but the loss on the whole rest: block and suffix
    span          a span of BLOCK_SIZE tokens anywhere in the answer instead of an aligned block
    lift-block    LIFT inside the active block: prefix clean, suffix hidden

The first two are train_blockwise.py, the third is train_lift.py, with their constants and outputs.
"""

import argparse
import importlib
import sys

CONTROLS = {"causal": "train_blockwise", "span": "train_blockwise", "lift-block": "train_lift"}


def parse_args(argv):
    """The flags: --CONTROL, and the constants of the trainer, which it reads itself."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--CONTROL", required=True, choices=CONTROLS)
    parser.add_argument("--NAME", metavar="VALUE", help="any constant of the trainer")
    return parser.parse_known_args(argv)


if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    ARGS, CONSTANTS = parse_args(sys.argv[1:])

import numpy as np
import suite  # noqa: F401, it makes the trainers importable
import torch


def causal(trainer):
    """Blockwise SFT's states, with the loss on the block and on the hidden suffix."""
    blockwise_corrupt = trainer.corrupt

    def corrupt(input_ids, prompt_len, length, block, noise):
        noisy_ids, _ = blockwise_corrupt(input_ids, prompt_len, length, block, noise)
        pos = torch.arange(input_ids.shape[1])  # (L,)
        first = prompt_len + block * trainer.BLOCK_SIZE  # (B, 1)
        rest = (first <= pos) & (pos < length)  # (B, L)
        return noisy_ids, rest & (noisy_ids == trainer.MASK_ID)

    trainer.corrupt = corrupt


def span(trainer):
    """Blockwise SFT with each block moved to a random place of its answer."""
    blockwise_schedule = trainer.schedule
    blockwise_corrupt = trainer.corrupt

    def schedule(examples, max_draws):
        draws = blockwise_schedule(examples, max_draws)
        lengths = np.array([len(ids) - prompt_len for prompt_len, ids in examples])
        last = np.maximum(lengths[draws[:, 0]] - trainer.BLOCK_SIZE, 0)
        places = np.random.default_rng((trainer.SEED, 0, 3)).integers(0, last + 1)
        return np.stack([draws[:, 0], places], axis=1)

    def corrupt(input_ids, prompt_len, length, place, noise):
        first = prompt_len + place  # (B, 1)
        return blockwise_corrupt(input_ids, first, length, torch.zeros_like(place), noise)

    trainer.schedule = schedule
    trainer.corrupt = corrupt


def lift_block(trainer):
    """LIFT with the active block as its answer; the rest as Blockwise SFT shows it."""
    blockwise = importlib.import_module("train_blockwise")
    lift_corrupt = trainer.corrupt

    def schedule(examples, max_draws):
        blockwise.SEED, blockwise.BLOCK_SIZE = trainer.SEED, trainer.BLOCK_SIZE
        return blockwise.schedule(examples, max_draws)

    def corrupt(input_ids, prompt_len, length, block, noise):
        pos = torch.arange(input_ids.shape[1])  # (L,)
        first = prompt_len + block * trainer.BLOCK_SIZE  # (B, 1)
        end = torch.minimum(first + trainer.BLOCK_SIZE, length)
        noisy_ids, *rest = lift_corrupt(input_ids, first, end, block, noise)
        suffix = (end <= pos) & (pos < length)  # (B, L)
        return noisy_ids.masked_fill(suffix, trainer.MASK_ID), *rest

    trainer.schedule = schedule
    trainer.corrupt = corrupt
    trainer.BLOCK_SIZE = blockwise.BLOCK_SIZE
    trainer.CONSTANTS.append("BLOCK_SIZE")
    trainer.LIMITS.append(("BLOCK_SIZE", [int], 1, 10**6))


def install(control):
    """The trainer of a control, its method changed; the name is a constant that runs record."""
    trainer = importlib.import_module(CONTROLS[control])
    change = {"causal": causal, "span": span, "lift-block": lift_block}[control]
    change(trainer)
    trainer.CONTROL = control
    trainer.CONSTANTS.append("CONTROL")
    trainer.LIMITS.append(("CONTROL", [str], None, None))
    return trainer


if __name__ == "__main__":
    TRAINER = install(ARGS.CONTROL)
    PROBLEMS = TRAINER.read_overrides(CONSTANTS) + TRAINER.check_constants()
    if PROBLEMS:
        sys.exit("\n".join(PROBLEMS))
    TRAINER.main()
