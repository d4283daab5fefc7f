"""The study opdlm: from autoregressive to block diffusion, on the base of opdlm/chains_ar.py.

    python experiments/study.py opdlm --seeds 3 --limit 300

Every arm has the block of its training in decoding too. Guide: experiments/docs/opdlm.md
"""

from itertools import product

from opdlm import chains_ar
from studies.arms import Setup, Study, common_steps, own_block

METHODS = ["opdlm", "own-random", "distill", "sft-teacher", "sft-data"]
DEFAULTS = {
    "steps": 160,
    "block_size": 4,
    "block_sizes": [4, 8],
    "gen_length": 64,
    "tokens_per_step": [1, 0],
    "seeds": 3,
}
CONSTANTS = {
    "MICRO_BSIZE": 16,
    "LR": 1e-3,
    "WARMUP_RATIO": 0.05,
    "MAX_LEN": 112,
    "MAX_SAMPLES": 8000,
    "GEN_LENGTH": 64,
    "FIRST_GEN_LENGTH": 64,
    "ROLLOUT_BSIZE": 256,
    "FULL_FT": True,
    "LOGIT_SHIFT": True,
    "TRAIN_END": True,
}


def opdlm(args, lengths):
    """OPDLM and its controls: whose answers, which states, which loss; short and long runs."""
    steps = common_steps(args, lengths, [args.block_size])
    settings = []
    for size, some in product(args.block_sizes, (max(1, steps // 4), steps)):
        for method in METHODS:
            settings.append((method, {"BLOCK_SIZE": size, "TOTAL_TRAIN_STEPS": some}))
    return settings


def build_base(folder):
    share = chains_ar.build(folder)
    print(f"{folder}: the autoregressive base answers {share:.0%} of 100 test problems as written")


OPDLM = Setup(
    name="opdlm",
    studies={"opdlm": Study(opdlm, own_block)},
    defaults=DEFAULTS,
    constants=CONSTANTS,
    trainers=["opdlm"],
    build_base=build_base,
    decodes_base=False,
)
