"""Quick start: the whole suite on a toy, on a laptop, without a GPU and without downloads.

    python experiments/toy.py                # three to seven minutes on two cores

Builds the toy task and its base (toy_task/chains.py), writes the .pt files (pt.py), trains with
both methods at equal compute, measures the held-out loss of the base and both checkpoints
(held_out.py), decodes test problems with them (evaluate.py), and prints a table. Everything goes to
experiments/runs/toy, or to toy-v2 and so on if that exists.
Guide: README.md, "Quick start"
"""

import csv
import json
import sys
import time
from pathlib import Path

import held_out
import plot
import suite
import torch
from toy_task import chains

EXPERIMENTS = Path(__file__).resolve().parent
TRAINERS = ("blockwise", "fullseq")

# Training: the trainers' constants but for these; both take the same steps and rows per step
TRAINING = {
    "MAX_SAMPLES": chains.TRAIN_ROWS,
    "MAX_LEN": 112,  # tokens: the longest problem with its answer
    "MICRO_BSIZE": 8,
    "TOTAL_TRAIN_STEPS": 200,
    "LR": 4e-3,
    "LORA_RANK": 32,
}
BLOCK_SIZE = 16  # tokens, in training and decoding

# Evaluation
HELD_OUT = {"limit": 30, "block_size": BLOCK_SIZE, "max_len": TRAINING["MAX_LEN"]}
DECODING = {
    "limit": 300,  # test problems
    "gen_length": chains.GEN_LENGTH,
    "block_length": BLOCK_SIZE,
    "steps": chains.GEN_LENGTH // 4,  # 4 tokens per step
    "batch_size": 50,
}


# ------- the run
def run(folder, ranks):
    """Build, preprocess, train with both methods, decode with base and checkpoints, compare."""
    start = time.time()
    chains.build(folder)
    print(f"built {folder}/model and {folder}/data in {time.time() - start:.0f} s")
    for split in ("train", "test"):
        preprocess(split, folder)
    seconds = {method: train(method, folder, ranks) for method in TRAINERS}
    models = {"base": "model"} | {name: checkpoint_name(name, folder) for name in TRAINERS}
    losses = held_out_losses(list(models.values()), folder)
    rows = []
    for name, model in models.items():
        row = {
            "model": name,
            "held-out block loss": f"{losses[model]:.2f}",
            "accuracy": f"{evaluate(model, folder):.0%}",
        }
        if name in TRAINERS:
            row |= summarize(name, seconds[name], folder)
        rows.append(row)
    print_table(rows)
    tokens_per_step = DECODING["gen_length"] / DECODING["steps"]
    print(
        f"\nOn {DECODING['limit']} new problems, decoded {tokens_per_step:g} tokens per step, "
        f"the base is right in {rows[0]['accuracy']}, after blockwise SFT in "
        f"{rows[1]['accuracy']}, after full-sequence SFT in {rows[2]['accuracy']}."
    )
    print(f"All of it took {time.time() - start:.0f} s; everything is in {folder}")


def main(args):
    folder = unused(EXPERIMENTS / "runs" / "toy")
    run(folder, args.ranks or torch.cuda.device_count() or 2)


# ------- its steps
def preprocess(split, folder):
    """Make {split}.pt from data/{split}.jsonl."""
    script = suite.ROOT / "pt.py"
    paths = {"model": "model", "dataset": f"data/{split}.jsonl", "output": f"{split}.pt"}
    execute([sys.executable, script, *suite.flags(paths)], folder)


def train(method, folder, ranks):
    """Train with train_{method}.py through the launcher; returns the seconds it took."""
    constants = {"MODEL_NAME": "model", "DATA_PT": "train.pt", "CKPT_DIR": method, **TRAINING}
    if method == "blockwise":
        constants["BLOCK_SIZE"] = BLOCK_SIZE
    script = suite.ROOT / f"train_{method}.py"
    return execute([*suite.launcher(ranks), script, *suite.flags(constants)], folder)


def held_out_losses(models, folder):
    """The losses of model folders on blocks of test problems (held_out.py)."""
    words = suite.flags(HELD_OUT | {"data": "test.pt"})
    execute([sys.executable, EXPERIMENTS / "held_out.py", *models, *words], folder)
    lines = plot.read_csv(folder / "held_out.csv", held_out.COLUMNS)
    return {
        model: held_out.mean_loss([line for line in lines if line["model"] == model])
        for model in models
    }


def evaluate(model, folder):
    """Decode test problems with the model folder `model`; returns the accuracy."""
    script = EXPERIMENTS / "evaluate.py"
    paths = {"model": model, "dataset": "data/test.jsonl", "output": f"{model}_answers"}
    execute([sys.executable, script, *suite.flags(paths | DECODING)], folder)
    summary = json.loads((folder / f"{model}_answers" / "summary.json").read_text())
    return summary["accuracy"]


def execute(command, folder):
    """Run a command line in `folder` as a user would; returns the seconds it took.

    Raises:
        SystemExit: if it fails.
    """
    command = [str(word) for word in command]
    print(f"\n$ {' '.join(command)}", flush=True)
    start = time.time()
    status = suite.run(command, folder, HF_HUB_OFFLINE="1")
    if status:
        script = next(word for word in command if word.endswith(".py"))
        sys.exit(f"{script} ended with status {status}, see above; what was made is in {folder}")
    return time.time() - start


def checkpoint_name(method, folder):
    """The checkpoint that the training run with this method has written."""
    budget = json.loads((folder / f"{method}_logs" / "run_config.json").read_text())["budget"]
    return f"{method}_step{budget['steps']:04d}"


def unused(path):
    """`path`, or the first of path-v2, path-v3, ... that does not exist."""
    free = path
    number = 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-v{number}")
    return free


# ------- the table
def summarize(method, seconds, folder):
    """What a training run did, from its logs."""
    logs = folder / f"{method}_logs"
    budget = json.loads((logs / "run_config.json").read_text())["budget"]
    with open(logs / "train_loss.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    checkpoint = folder / checkpoint_name(method, folder)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    return {
        "steps": budget["steps"],
        "loss, first 5 steps": f"{sum(losses[:5]) / 5:.2f}",
        "last 5 steps": f"{sum(losses[-5:]) / 5:.2f}",
        "supervised tokens": f"{budget['supervised_tokens']:,}",
        "checkpoint": f"{size / 1e6:.0f} MB",
        "time": f"{seconds:.0f} s",
    }


def print_table(rows):
    """The rows, dicts whose missing cells stay empty, in the order of the last one's columns."""
    columns = list(rows[-1])
    print("\n" + " | ".join(columns))
    for row in rows:
        print(" | ".join(str(row.get(name, "")).rjust(len(name)) for name in columns))


# ------- flags
def parse_args(argv=None):
    parser = suite.make_parser(__doc__)
    ranks = "training processes (one per GPU, two without a GPU)"
    parser.add_argument("--ranks", type=int, help=ranks)
    args = parser.parse_args(argv)
    suite.check_lowest(parser, args, ranks=1)
    return args


if __name__ == "__main__":
    main(parse_args())
