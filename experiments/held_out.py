"""Held-out loss of models, by block and by t, on the same masks for all of them.

    python experiments/held_out.py GSAI-ML/LLaDA-8B-Instruct ckpts_stagewise_sft_32_step0200 \\
        --data test.pt --output held_out

Each block of each answer in --data, a file of pt.py, is masked at every t of T_GRID as decoding
meets it: prefix clean, block at rate t, everything later up to --max_len hidden, with MASK_PADDING.
The loss is that of train_blockwise.py, the mean over draws of the mean cross-entropy of a draw's
masked tokens, in nats; draws without a masked token are left out. The noise depends on row, block
and --seed alone.

Writes held_out.csv, with a line per model, block and t, and held_out.png.
Guide: experiments/docs/evaluation.md

Shapes: B draws, L = --max_len tokens.
"""

import argparse
import math
import os
import sys

import decode
import evaluate
import numpy as np
import plot
import suite
import torch
from matplotlib.figure import Figure
from torch.nn.functional import pad
from tqdm import tqdm
from transformers.utils.logging import set_verbosity_error

import pt
import train_blockwise

T_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)
COLUMNS = ("model", "block", "t", "draws", "tokens", "loss")


# ------- the loss
@torch.no_grad()
def held_out_loss(model, name, rows, mask_id, args):
    """The loss of a model by block and t: [a dict with COLUMNS].

    Args:
        name: of the model.
        rows: as `load_rows` gives them.
        args: block_size, max_len, batch_size and seed.
    """
    shift = train_blockwise.logit_shift(model.config)
    args = argparse.Namespace(**vars(args), LOGIT_SHIFT=bool(shift))
    totals = {}
    bar = tqdm(list_batches(rows, args), unit=" batches", desc=f"loss of {os.path.basename(name)}")
    for block, t, numbers in bar:
        input_ids, noisy_ids, loss_mask = make_draws(args, rows, numbers, block, t, mask_id)
        if not loss_mask.any():
            continue
        nll = train_blockwise.masked_nll(args, model, input_ids, noisy_ids, loss_mask)  # (M,)
        loss = train_blockwise.mean_over_rows(nll, loss_mask).item() * len(numbers)
        total = totals.setdefault((block, t), {"draws": 0, "tokens": 0, "loss": 0.0})
        total["draws"] += int(loss_mask.any(1).sum())
        total["tokens"] += int(loss_mask.sum())
        total["loss"] += loss
    lines = []
    for (block, t), total in totals.items():
        loss = total["loss"] / total["draws"]
        lines.append({"model": name, "block": block, "t": t, **total, "loss": loss})
    return lines


def list_batches(rows, args):
    """The draws of all rows in batches of the same block and t: [(block, t, numbers of rows)]."""
    members = {}  # of each block: the rows that have it
    for number, (prompt_len, ids) in enumerate(rows):
        for block in range(math.ceil((len(ids) - prompt_len) / args.block_size)):
            members.setdefault(block, []).append(number)
    batches = []
    for block, numbers in members.items():
        for t in T_GRID:
            for start in range(0, len(numbers), args.batch_size):
                batches.append((block, t, numbers[start : start + args.batch_size]))
    return batches


def make_draws(args, rows, numbers, block, t, mask_id):
    """input_ids, noisy_ids and loss_mask, (B, L) each, of one block of these rows at one t.

    The masks are made here, not by a trainer: a changed method is measured as the original is.
    """
    chosen = [rows[number] for number in numbers]
    padded = [pad(ids, (0, args.max_len - len(ids))) for _, ids in chosen]  # shown as [MASK]
    input_ids = torch.stack(padded)  # (B, L)
    prompt_len = torch.tensor([[prompt_len] for prompt_len, _ in chosen])  # (B, 1)
    length = torch.tensor([[len(ids)] for _, ids in chosen])  # (B, 1)
    noise = []
    for number in numbers:
        rng = np.random.default_rng((args.seed, number, block))
        noise.append(rng.random(1 + args.max_len, np.float32)[1:])
    noise = torch.from_numpy(np.stack(noise))  # (B, L)
    pos = torch.arange(args.max_len)  # (L,)
    first = prompt_len + block * args.block_size  # (B, 1)
    end = torch.minimum(first + args.block_size, length)
    loss_mask = (first <= pos) & (pos < end) & (noise < t)  # (B, L)
    return input_ids, input_ids.masked_fill(loss_mask | (end <= pos), mask_id), loss_mask


def mean_loss(lines):
    """The mean loss of all draws of these lines, of the CSV or of `held_out_loss`."""
    draws = [float(line["draws"]) for line in lines]
    losses = [float(line["loss"]) for line in lines]
    return float(np.average(losses, weights=draws))


# ------- main
def main(args):
    decode.set_device(args)
    set_verbosity_error()
    rows = load_rows(args)
    mask_ids = [check_model(name, rows, args) for name in args.models]
    lines = []
    try:
        for name, mask_id in zip(args.models, mask_ids, strict=True):
            model = decode.load_model(name, "main", args.device, getattr(torch, args.dtype))
            own = held_out_loss(model, name, rows, mask_id, args)
            del model  # before the next one is loaded
            if not own:
                sys.exit(f"--data {args.data}: no token was masked; give more rows")
            print(f"{name}: {mean_loss(own):.4f}")
            lines += own
            suite.write_csv(f"{args.output}.csv", COLUMNS, lines)
    except torch.OutOfMemoryError:
        sys.exit(f"--batch_size {args.batch_size}: out of memory; give a lower one")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        sys.exit(f"--output {args.output} cannot be written ({error}); give another")
    plot.save(draw(lines), f"{args.output}.png")
    print(f"wrote {args.output}.csv and {args.output}.png")


def load_rows(args):
    """The rows of --data with an answer, as train_blockwise.py loads them: [(prompt_len, ids)].

    Raises:
        SystemExit: if it is not such a file, or has none.
    """
    constants = argparse.Namespace(DATA_PT=args.data, MAX_SAMPLES=args.limit, MAX_LEN=args.max_len)
    try:
        examples = train_blockwise.load_examples(constants)
    except Exception as error:  # missing, damaged, or not a list of such rows
        sys.exit(f"--data {args.data} is not what pt.py writes ({error!r:.200}); run pt.py")
    rows = [(prompt_len, ids) for prompt_len, ids in examples if prompt_len < len(ids)]
    if not rows:
        sys.exit(f"--data {args.data} has no rows with an answer in {args.max_len} tokens")
    return rows


def check_model(name, rows, args):
    """The mask token's id of a model, without loading its weights.

    Raises:
        SystemExit: if it is no masked diffusion model, or does not belong to the data.
    """
    tokenizer = pt.load_tokenizer(*decode.base_of(name, "main"))
    config, vocabulary = evaluate.load_config(name, "main")
    if getattr(config, "block_causal", None):
        sys.exit(f"MODEL {name} attends block by block; give another")
    check_ids(rows, args.data, name, vocabulary)
    return decode.special_ids(name, config, tokenizer, vocabulary)["mask_id"]


def check_ids(rows, data, name, vocabulary):
    """Check that a model has the ids of rows.

    Raises:
        SystemExit: if it has only `vocabulary` ids, which are too few.
    """
    largest = max(int(ids.max()) for _, ids in rows)
    if largest >= vocabulary:
        sys.exit(f"--data {data} has id {largest}, {name} only {vocabulary} ids; run pt.py")


# ------- the figure
def draw(lines):
    """A figure of the loss by block and by t, a curve per model."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("block", "t"), strict=True):
        for name in dict.fromkeys(line["model"] for line in lines):
            own = [line for line in lines if line["model"] == name]
            places = sorted({line[column] for line in own})
            means = [mean_loss([x for x in own if x[column] == place]) for place in places]
            axes.plot(places, means, marker="o", label=name)
        axes.set_xlabel(column)
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
    figure.axes[1].legend(fontsize="small")
    return figure


# ------- flags
def parse_args(argv=None):
    """The flags; ends with one message and status 2 if one is wrong."""
    parser = suite.make_parser(__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="checkpoint, base or adapter; folder or hub id")
    add("--data", required=True, metavar="FILE.pt", help="held-out rows, written by pt.py")
    add("--output", default="held_out", help="beginning of the two files' names (%(default)s)")
    add("--limit", type=int, default=10**6, help="use only the first rows (all)")
    add("--block_size", type=int, default=32, help="tokens per block (%(default)s)")
    add("--max_len", type=int, default=256, help="tokens; longer rows are cut (%(default)s)")
    add("--batch_size", type=int, default=16, help="draws per forward pass (%(default)s)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    decode.add_device_flags(parser)
    args = parser.parse_args(argv)
    suite.check_lowest(parser, args, limit=1, block_size=1, max_len=2, batch_size=1, seed=0)
    suite.check_new(parser, args.output, "csv", "png")
    return args


if __name__ == "__main__":
    main(parse_args())
