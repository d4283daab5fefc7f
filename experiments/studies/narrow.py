"""The study narrow: what SFT on a narrow kind of problem adds, and what it makes a model forget.

    python experiments/study.py narrow

It is the paper's situation in small: pt.py leaves the GSM rows of MetaMathQA out, GSM8K is the
test, and the base is able to do it. The narrow problems stand for MATH, the full ones for GSM8K.
Base and problems are those of toy_task/narrow.py.
"""

from studies.arms import (
    Setup,
    Study,
    common_steps,
    constant,
    default_block,
    equal_token_steps,
)
from toy_task import narrow

import train_fullseq

LRS = [2.5e-4, 1e-3, 4e-3, 16e-3]  # from little learning and forgetting to much
DEFAULTS = {
    "steps": 200,
    "block_size": 16,
    "block_sizes": [16],
    "gen_length": 64,
    "tokens_per_step": [2],
    "seeds": 10,
}
CONSTANTS = {
    "MICRO_BSIZE": 16,
    "LORA_RANK": 32,
    "MAX_LEN": 112,
    "MAX_SAMPLES": 8000,
}


def methods_by_lr(args, lengths):
    """Learning and forgetting on a narrow kind of problem: the methods, each with four LR.

    Full-sequence SFT supervises as many tokens as blockwise also in fewer steps, or in fewer rows
    per step.
    """
    steps = common_steps(args, lengths, [args.block_size])
    fewer = equal_token_steps(steps, lengths, args.block_size)
    rows = max(1, round(constant(args, "MICRO_BSIZE") * fewer / steps))
    arms = [
        ("blockwise", {}),
        ("fullseq", {}),
        ("fullseq", {"TOTAL_TRAIN_STEPS": fewer}),
        ("fullseq", {"MICRO_BSIZE": rows}),
        ("rest", {}),
        ("lift", {}),
    ]
    return [(method, changes | {"LR": lr}) for method, changes in arms for lr in LRS]


NARROW = Setup(
    name="narrow",
    studies={"narrow": Study(methods_by_lr, default_block)},
    defaults=DEFAULTS,
    constants=CONSTANTS,
    trainers=["blockwise", "fullseq", "lift"],
    build_base=narrow.build,
    tests=("narrow", "full"),
    method_constants={"lift": {"TARGET_MODS": train_fullseq.TARGET_MODS}},
)
