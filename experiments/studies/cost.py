"""What the runs of a study will cost on GPUs, from measured rates."""

from studies.arms import lift_effort
from studies.runs import decoding_steps

# At LLaDA-8B's shape with random weights, on one H200 (training) and one H100 (docs/performance.md)
WEIGHTS = 8.0e9
STEP_SECONDS = 0.49  # 32 rows of 256 tokens, compiled
START_SECONDS = 65  # of a training: to load, and to save
ANSWER_SECONDS = 256 / 189  # of 256 tokens, in 128 forward passes


def describe(args, task, ways_of_runs):
    """GPU-hours, disk and download of {run: its ways of decoding}, as text.

    The rates are taken to be in proportion to the weights, and to the tokens and forward passes.
    """
    training = decoding = checkpoints = 0
    scale = task.weights / WEIGHTS
    answers = sum(test.count for test in task.tests)
    for run, ways in ways_of_runs.items():
        for way in ways:
            effort = args.gen_length / 256 * decoding_steps(args, way) / 128
            decoding += answers * effort * ANSWER_SECONDS * scale
        if run.method != "base":
            checkpoints += 1
            training += (START_SECONDS + STEP_SECONDS * step_effort(args, run)) * scale
    size = 2 * task.weights / 1e9  # in bf16
    kept = min(checkpoints, args.jobs) if args.remove_checkpoints else checkpoints
    remedy = "" if args.remove_checkpoints else "; fewer with --remove_checkpoints"
    hours = (training + decoding) / 3600
    return (
        f"about {hours:.1f} GPU-hours, {training / 3600:.1f} of them training, at the rates of one "
        f"H200 and one H100\n"
        f"disk: {kept} checkpoints of {size:.1f} GB at a time{remedy}\n"
        f"download: {size:.1f} GB, unless {task.model} is a folder or cached"
    )


def step_effort(args, run):
    """The steps of a training run, in steps of 32 rows of 256 tokens."""
    constants = run.constants
    rows = constants["MICRO_BSIZE"] * constants.get("GRAD_ACC", 1) * args.num_gpus
    tokens = rows * constants.get("MAX_LEN", 256)
    scoring = lift_effort(constants) if run.method in ("lift", "lift-block") else 1
    return constants["TOTAL_TRAIN_STEPS"] * scoring * tokens / (32 * 256)
