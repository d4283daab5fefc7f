"""Controls for Blockwise SFT: a trainer with its method changed, to see what a gain is due to.

    deepspeed --num_gpus 8 experiments/train_control.py --CONTROL rest

    rest          the states of Blockwise SFT, but the loss on the whole rest: block and suffix
    span          a span of BLOCK_SIZE tokens anywhere in the answer instead of an aligned block
    lift-block    LIFT inside the active block: prefix clean, suffix hidden

The first two are train_blockwise.py with its constants. The third is train_lift.py with its
constants and BLOCK_SIZE; its LR, LORA_RANK and TARGET_MODS are not those of train_blockwise.py.
Any constant can be given as --NAME VALUE; CKPT_DIR is ckpts_ and the control's name.
"""

import argparse
import importlib
import os
import sys

CONTROLS = {"rest": "train_blockwise", "span": "train_blockwise", "lift-block": "train_lift"}
IS_FIRST = os.environ.get("LOCAL_RANK", "0") == "0"  # the launcher ends the other ranks


def parse_args(argv):
    """The control, and the other words, which the trainer reads itself."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--CONTROL", required=True, choices=CONTROLS)
    return parser.parse_known_args(argv)


if __name__ == "__main__":  # before the slow imports; the trainer checks the constants after them
    if not IS_FIRST:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (a usage error is printed once)
    ARGS, CONSTANTS = parse_args(sys.argv[1:])
    sys.stderr = sys.__stderr__

import numpy as np
import suite  # noqa: F401, it makes the trainers importable
import torch
from safetensors import SafetensorError


def rest(trainer):
    """Blockwise SFT's states, with the loss on the block and on the hidden suffix."""
    blockwise_corrupt = trainer.corrupt

    def corrupt(input_ids, prompt_len, length, block, noise):
        noisy_ids, _ = blockwise_corrupt(input_ids, prompt_len, length, block, noise)
        pos = torch.arange(input_ids.shape[1])  # (L,)
        first = prompt_len + block * trainer.BLOCK_SIZE  # (B, 1)
        after_prefix = (first <= pos) & (pos < length)  # (B, L)
        return noisy_ids, after_prefix & (noisy_ids == trainer.MASK_ID)

    trainer.corrupt = corrupt


def span(trainer):
    """Blockwise SFT with each block at a random place, where it may stick out of the answer.

    So every token of an answer is active equally often.
    """
    blockwise_schedule = trainer.schedule

    def schedule(examples, max_draws):
        draws = blockwise_schedule(examples, max_draws)
        lengths = np.array([len(ids) - prompt_len for prompt_len, ids in examples])
        rng = np.random.default_rng((trainer.SEED, 0, 3))  # not the stream of any draw
        places = rng.integers(1 - trainer.BLOCK_SIZE, lengths[draws[:, 0]])
        return np.stack([draws[:, 0], places], axis=1)

    def corrupt(input_ids, prompt_len, length, place, noise):
        pos = torch.arange(input_ids.shape[1])  # (L,)
        t = trainer.MASK_PROB_EPS + (1 - trainer.MASK_PROB_EPS) * noise[:, :1]  # (B, 1)
        first = prompt_len + place  # (B, 1)
        answer = (prompt_len <= pos) & (pos < length)  # (B, L)
        prefix = answer & (pos < first)
        suffix = answer & (first + trainer.BLOCK_SIZE <= pos)
        active = answer & ~prefix & ~suffix
        p_mask = trainer.PREFIX_MASK_RATE * prefix + t * active + trainer.SUFFIX_MASK_PROB * suffix
        p_mask = p_mask + trainer.MASK_PADDING * (length <= pos)
        masked = noise[:, 1:] < p_mask
        return input_ids.masked_fill(masked, trainer.MASK_ID), masked & active

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
        noisy_ids, *others = lift_corrupt(input_ids, first, end, block, noise)
        suffix = (end <= pos) & (pos < length)  # (B, L)
        return noisy_ids.masked_fill(suffix, trainer.MASK_ID), *others

    trainer.schedule = schedule
    trainer.corrupt = corrupt
    trainer.BLOCK_SIZE = blockwise.BLOCK_SIZE
    trainer.CONSTANTS.append("BLOCK_SIZE")
    trainer.LIMITS.append(("BLOCK_SIZE", [int], 1, 10**6))


def install(control):
    """The trainer of a control, its method changed; the name is a constant that runs record."""
    trainer = importlib.import_module(CONTROLS[control])
    change = {"rest": rest, "span": span, "lift-block": lift_block}[control]
    change(trainer)
    trainer.CKPT_DIR = f"ckpts_{control}"
    trainer.CONTROL = control
    trainer.CONSTANTS.append("CONTROL")
    trainer.LIMITS.append(("CONTROL", [str], None, None))
    return trainer


if __name__ == "__main__":
    TRAINER = install(ARGS.CONTROL)
    PROBLEMS = TRAINER.read_overrides(CONSTANTS) + TRAINER.check_constants()
    if PROBLEMS and IS_FIRST:
        sys.exit("\n".join([*PROBLEMS, f"{CONTROLS[ARGS.CONTROL]}.py --help lists the constants"]))
    try:
        TRAINER.main()
    except torch.OutOfMemoryError:
        sys.exit("out of memory; set ACTIVATION_CHECKPOINTING, or halve MICRO_BSIZE")
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"stopped: {type(error).__name__} {error}; repeat the command to resume")
