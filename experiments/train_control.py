"""Controls: a trainer with its method changed, to see what a gain is due to.

    deepspeed --num_gpus 8 experiments/train_control.py --CONTROL rest

of Blockwise SFT (train_blockwise.py, its constants):
    rest          the states of Blockwise SFT, but the loss on the whole rest: block and suffix
    span          a span of BLOCK_SIZE tokens anywhere in the answer instead of an aligned block

of LIFT (train_lift.py, its constants and BLOCK_SIZE; LR, LORA_RANK, TARGET_MODS are LIFT's):
    lift-block    LIFT inside the active block: prefix clean, suffix hidden

of OPDLM (train_opdlm.py, whose ANSWERS, STATES and LOSS they set):
    own-random    the student's answers, but masked at random
    distill       the teacher's answers, masked at random
    sft-teacher   as distill, with cross-entropy on the tokens instead of KL
    sft-data      the answers of DATA_PT, masked at random, with cross-entropy

Any constant can be given as --NAME VALUE; CKPT_DIR is ckpts_ and the control's name.
Guide: experiments/docs/studies.md, experiments/docs/opdlm.md.
"""

import argparse
import os
import sys
from typing import NamedTuple

import numpy as np
import suite  # noqa: F401 (the trainers are one folder up)
import torch
import train_lift
import train_opdlm

import train_blockwise
import train_fullseq


# ------- of Blockwise SFT
def rest_batch(args, examples, draws, pad_id):
    """A batch of Blockwise SFT, with the loss on the block and on the hidden suffix."""
    rows = train_blockwise.pad_rows(args, examples, draws, pad_id)
    input_ids, prompt_len, length, offset = rows
    noise = train_blockwise.draw_noise(args, draws, 1 + args.MAX_LEN)
    noisy_ids, _ = train_blockwise.corrupt(args, *rows, noise)
    pos = torch.arange(input_ids.shape[1])  # (L,)
    after_prefix = (prompt_len + offset <= pos) & (pos < length)  # (B, L)
    return input_ids, noisy_ids, after_prefix & (noisy_ids == args.MASK_ID)


def span_schedule(args, examples, max_draws):
    """The draws of Blockwise SFT with each block at a random place of its answer.

    It may stick out of the answer, so that every token is active equally often.
    """
    draws = train_blockwise.schedule(args, examples, max_draws)
    lengths = np.array([len(ids) - prompt_len for prompt_len, ids in examples])
    rng = np.random.default_rng((args.SEED, 0, 3))  # not the stream of any draw
    offsets = rng.integers(1 - args.BLOCK_SIZE, lengths[draws[:, 0]])
    return np.stack([draws[:, 0], offsets], axis=1)


# ------- of LIFT
def lift_block_batch(args, examples, draws, pad_id):
    """A batch of LIFT with the active block as its answer; the rest as Blockwise SFT shows it."""
    input_ids, prompt_len, length, offset = train_fullseq.pad_rows(args, examples, draws, pad_id)
    noise = train_fullseq.draw_noise(args, draws, 2 + 2 * args.MAX_LEN)
    first = prompt_len + offset  # (B, 1)
    end = torch.minimum(first + args.BLOCK_SIZE, length)
    noisy_ids, *others = train_lift.corrupt(args, input_ids, first, end, offset, noise)
    pos = torch.arange(input_ids.shape[1])  # (L,)
    suffix = (end <= pos) & (pos < length)  # (B, L)
    return input_ids, noisy_ids.masked_fill(suffix, args.MASK_ID), *others


# ------- all of them
class Control(NamedTuple):
    """What a control changes."""

    trainer: object  # the module whose constants it has
    constants: dict  # and those that it sets
    method: tuple  # a trainer's Method


REST = train_blockwise.METHOD._replace(make_batch=rest_batch)
SPAN = train_blockwise.METHOD._replace(schedule=span_schedule)
LIFT_BLOCK = train_lift.METHOD._replace(
    schedule=train_blockwise.schedule, make_batch=lift_block_batch
)
OPDLM = train_opdlm.METHOD
OF_TEACHER = {"ANSWERS": "teacher", "STATES": "random"}
OF_DATA = {"ANSWERS": "data", "STATES": "random"}
SFT = {"LOSS": "cross-entropy"}
CONTROLS = {
    "rest": Control(train_blockwise, {}, REST),
    "span": Control(train_blockwise, {}, SPAN),
    "lift-block": Control(train_lift, {"BLOCK_SIZE": train_blockwise.BLOCK_SIZE}, LIFT_BLOCK),
    "own-random": Control(train_opdlm, {"STATES": "random"}, OPDLM),
    "distill": Control(train_opdlm, OF_TEACHER, OPDLM),
    "sft-teacher": Control(train_opdlm, OF_TEACHER | SFT, OPDLM),
    "sft-data": Control(train_opdlm, OF_DATA | SFT, OPDLM),
}


def constants_of(name):
    """The constants of a control, {name: value}, and their limits; runs record CONTROL too."""
    trainer, changes, _ = CONTROLS[name]
    own = {"CONTROL": name, "CKPT_DIR": f"ckpts_{name}"}
    limits = [*trainer.LIMITS, ("CONTROL", [str], None, None)]
    if "BLOCK_SIZE" not in trainer.CONSTANTS:
        limits.append(("BLOCK_SIZE", [int], 1, 10**6))
    return trainer.CONSTANTS | changes | own, limits


def parse_args(argv=None):
    """The constants of the control that is given, see `parse_args` of the trainers."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--CONTROL", nargs="?")
    given, words = parser.parse_known_args(argv)
    if given.CONTROL is None and {"-h", "--help"} & set(words):
        print(__doc__)
        sys.exit()
    if given.CONTROL not in CONTROLS:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.exit(f"--CONTROL {given.CONTROL or ''}: give one of {', '.join(CONTROLS)}")
        train_fullseq.init_distributed()  # the launcher ends the other ranks
    trainer = CONTROLS[given.CONTROL].trainer
    constants, limits = constants_of(given.CONTROL)
    scripts = [train_blockwise.__file__, trainer.__file__]
    args = trainer.parse_args(words, __doc__, constants, limits, scripts)
    for name in ("ANSWERS", "STATES", "LOSS"):
        if name in constants and getattr(args, name) != constants[name]:
            own = f"--CONTROL {given.CONTROL} sets it to {constants[name]}"
            sys.exit(f"--{name} {getattr(args, name)}: {own}")
    return args


def main(args):
    trainer, _, method = CONTROLS[args.CONTROL]
    trainer.main(args, method)


if __name__ == "__main__":
    with train_fullseq.faults_in_one_line():
        main(parse_args())
