"""A base that works out all problems of the toy task, and a narrow kind of problem to train it on.

    python experiments/toy_task/narrow.py --overwrite     # pretrain the base again

Unlike the base of chains.py it has no habit of guessing. A narrow problem has five instructions,
all plus or minus, in any order: the labels say which is next. The base has seen them in order only.
So SFT teaches it to follow labels, and can make it forget max, min and longer problems.
Guide: experiments/docs/studies.md
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # experiments/

import suite
from toy_task import chains

NARROW = {"operations": ("plus", "minus"), "longest": chains.SHORTEST}
BASE = Path(__file__).with_name("narrow_base.safetensors")
SHAPE = chains.SHAPE | {"n_layers": 3, "mlp_hidden_size": 96}
BATCH = 64
STEPS = 10_000
LR = 4e-3


def splits(train_rows, test_rows, pretrain_rows=0):
    """Problems: full test, narrow test, narrow training, pretraining; none is shared."""
    rng = random.Random(chains.SEED)
    seen = set()
    full = chains.problems(rng, test_rows, seen)
    narrow = chains.problems(rng, test_rows, seen, **NARROW)
    train = chains.problems(rng, train_rows, seen, **NARROW)
    pretrain = chains.problems(rng, pretrain_rows, seen)
    for row in narrow + train:
        shuffle(row, rng)
    return full, narrow, train, pretrain


def shuffle(row, rng):
    """Put the instructions of a problem in any order; its answer stays."""
    first, *instructions = row["query"].split(" ; ")
    rng.shuffle(instructions)
    row["query"] = row["original_question"] = " ; ".join([first, *instructions])


def build(folder, train_rows=chains.TRAIN_ROWS, test_rows=chains.TEST_ROWS, base=BASE):
    """Make `folder`/model and `folder`/data, as chains.build does.

    The data are train.jsonl and narrow.jsonl, narrow problems, and full.jsonl, the test of
    chains.py.
    """
    folder = Path(folder)
    chains.build(folder, wide=False, base=base, train_rows=0, test_rows=0, shape=SHAPE)
    full, narrow, train, _ = splits(train_rows, test_rows)
    for name, rows in (("full", full), ("narrow", narrow), ("train", train)):
        chains.write_rows(folder / "data" / f"{name}.jsonl", rows)
    (folder / "data" / "test.jsonl").unlink()


def main(args):
    if BASE.exists() and not args.overwrite:
        sys.exit(f"{BASE} exists already; give --overwrite to replace it")
    *_, rows = splits(chains.TRAIN_ROWS, chains.TEST_ROWS, chains.PRETRAIN_ROWS)
    chains.write_base(BASE, SHAPE, [(rows, STEPS, LR)], BATCH)
    print(f"wrote {BASE}, {BASE.stat().st_size:,} bytes")


def parse_args(argv=None):
    parser = suite.make_parser(__doc__)
    parser.add_argument("--overwrite", action="store_true", help=f"replace {BASE.name}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
