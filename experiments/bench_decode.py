"""Measure block decoding: ways that take turns on the same prompts, in one process.

    python experiments/bench_decode.py --batch 16
    python experiments/bench_decode.py --batch 16 --vocabulary 64    # hardly any work in the head
    python experiments/bench_decode.py --shape toy-qwen3 --block_causal 4 --batch 4 --length 1024

    one by one, as a batch       two tokens per step
    prefix, dual                 a batch with these caches, which are approximate
    threshold                    a batch, with --threshold
    no cache, cache              with --block_causal: a batch, whole canvases or a block at a time

Half of the length is prompt; the other half is decoded, in blocks of 32 tokens, or of
--block_causal. The model has random weights, in float32, on a GPU in bfloat16; nothing is
downloaded. With random weights hardly any token exceeds a threshold: give a low one.
Guide: experiments/docs/performance.md

Shapes: B prompts, P tokens per prompt, L columns.
"""

import time
from statistics import median

import bench
import suite
import torch
from decode import decode
from decoding.block_causal import additive_mask
from decoding.key_values import KINDS
from toy_task.llada.configuration_llada import LLaDAConfig
from tqdm import tqdm

BLOCK_LENGTH = 32  # tokens
TOKENS_PER_STEP = 2
END_ID = 0  # suppressed, so that no answer ends early
MASK_ID = 1
FIRST_ID = 2  # of the prompts' tokens


def measure(args):
    """Median seconds per answer, forward passes and peak memory of all ways."""
    ids = {"vocab_size": args.vocabulary, "mask_token_id": MASK_ID}
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    causal = args.block_causal is not None
    model = bench.random_model(args.shape, args.device, dtype, causal=causal, **ids).eval()
    model.config.block_causal = args.block_causal
    prompts = torch.randint(FIRST_ID, args.vocabulary, (args.batch, args.length // 2))  # (B, P)
    ways = {"one by one": (model, prompts.split(1), {}), "as a batch": (model, [prompts], {})}
    is_llada = bench.SHAPES[args.shape][0] is LLaDAConfig
    for kind in KINDS if is_llada else ():
        ways[kind] = (model, [prompts], {"cache": kind})
    if args.threshold is not None:
        ways["threshold"] = (model, [prompts], {"threshold": args.threshold})
    if causal:
        plain = WithoutCache(model, prompts.shape[1], args.block_causal)
        ways = {"no cache": (plain, [prompts], {}), "cache": (model, [prompts], {})}
    rows = {way: {"seconds": [], "peak_bytes": 0} for way in ways}
    for _ in tqdm(range(args.repeats), unit=" turns"):
        for way, arguments in ways.items():
            take_turn(args, rows[way], *arguments)
    first = next(iter(rows.values()))
    for row in rows.values():
        row["seconds_per_answer"] = median(row["seconds"])
        row["tokens_per_second"] = args.length / 2 / row["seconds_per_answer"]
        row["speedup"] = median(first["seconds"]) / row["seconds_per_answer"]
    return {"rows": rows}


def take_turn(args, row, model, batches, options):
    """Add the figures of a turn to a way's row."""
    bench.reset_peak()
    passes = []
    start = time.perf_counter()
    for prompts in batches:
        decode_all(args, model, prompts, callback=lambda *_: passes.append(1), **options)
    row["seconds"].append((time.perf_counter() - start) / args.batch)
    row["forwards"] = len(passes)
    row["peak_bytes"] = max(row["peak_bytes"], bench.peak_memory(args.device))


class WithoutCache:
    """A block-causal model that computes the whole canvas of prompts of P tokens at every step."""

    def __init__(self, model, prompt_len, size):
        self.model = model
        self.prompt_len = prompt_len
        self.size = size
        self.get_input_embeddings = model.get_input_embeddings
        self.get_output_embeddings = model.get_output_embeddings

    def __call__(self, input_ids, attention_mask):
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)  # (L,)
        block = torch.div(columns - self.prompt_len, self.size, rounding_mode="floor")
        valid = torch.ones_like(input_ids, dtype=torch.bool)
        mask = additive_mask(block <= block[:, None], valid, self.model.dtype)
        return self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)


def decode_all(args, model, prompts, **options):
    """Decode a batch of prompts (B, P). Returns when the answers are on the host."""
    gen_length = prompts.shape[1]
    decode(
        model,
        prompts,
        gen_length=gen_length,
        block_length=args.block_causal or BLOCK_LENGTH,
        steps=gen_length // TOKENS_PER_STEP,
        logits_eos_inf=True,
        mask_id=MASK_ID,
        eos_id=END_ID,
        eot_id=END_ID,
        **options,
    )


def main(args):
    bench.hide_gpu(args)
    machine = bench.describe_machine(args)
    result = measure(args)
    bench.report(args, {"machine": machine, "settings": vars(args)} | result)


def parse_args(argv=None):
    """The flags; ends with one message and status 2 if one is wrong."""
    parser = suite.make_parser(__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=8, help="prompts (%(default)s)")
    add("--length", type=int, default=256, help="tokens of prompt and answer (%(default)s)")
    add("--vocabulary", type=int, default=126464, help="of the model (%(default)s)")
    add("--repeats", type=int, default=3, help="turns of each way (%(default)s)")
    add("--threshold", type=float, help="also decode with this threshold (off)")
    add(
        "--block_causal",
        type=int,
        metavar="K",
        help="of the model's attention, in tokens (off)",
    )
    bench.add_flags(parser)
    args = parser.parse_args(argv)
    suite.check_lowest(parser, args, batch=1, length=64, vocabulary=8, repeats=1)
    size = BLOCK_LENGTH if args.block_causal is None else args.block_causal
    if args.block_causal is not None and args.threshold is not None:
        parser.error(f"--threshold {args.threshold}: not with --block_causal")
    if size < 1:
        parser.error(f"--block_causal {size}: must be 1 or more")
    if args.length % (2 * size) or size % TOKENS_PER_STEP:
        parser.error(f"--length {args.length}: must be a multiple of {2 * size}, K be even")
    if args.threshold is not None and not 0 < args.threshold < 1:
        parser.error(f"--threshold {args.threshold}: must be between 0 and 1")
    if args.block_causal and bench.SHAPES[args.shape][0] is LLaDAConfig:
        parser.error(f"--shape {args.shape} takes no cache; give toy-qwen3 or 0.6b")
    bench.check_flags(parser, args)
    return args


if __name__ == "__main__":
    main(parse_args())
