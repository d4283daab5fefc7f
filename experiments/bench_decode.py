"""Measure block decoding of prompts one by one against the same prompts as one batch.

    python experiments/bench_decode.py --batch 16
    python experiments/bench_decode.py --batch 16 --vocabulary 64    # hardly any work in the head

Both ways take turns in one process. Half of the length is prompt; the other half is decoded in
blocks of 32 tokens, two tokens per step. The model is this suite's LLaDA with random weights, in
float32, on a GPU in bfloat16; nothing is downloaded.
Guide: experiments/docs/performance.md

Shapes: B prompts, P tokens per prompt.
"""

import time
from statistics import median

import bench
import suite
import torch
from decode import decode
from tqdm import tqdm

BLOCK_LENGTH = 32  # tokens
TOKENS_PER_STEP = 2
END_ID = 0  # suppressed, so that no answer ends early
MASK_ID = 1
FIRST_ID = 2  # of the prompts' tokens


def measure(args):
    """Median seconds per answer of both ways, and their ratio."""
    ids = {"vocab_size": args.vocabulary, "mask_token_id": MASK_ID}
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = bench.random_model(args.shape, args.device, dtype, **ids).eval()
    prompts = torch.randint(FIRST_ID, args.vocabulary, (args.batch, args.length // 2))  # (B, P)
    ways = {"one by one": prompts.split(1), "as a batch": [prompts]}
    seconds = {way: [] for way in ways}
    decode_all(model, [prompts[:1], prompts])  # warms up
    for _ in tqdm(range(args.repeats), unit=" turns"):
        for way, batches in ways.items():
            start = time.perf_counter()
            decode_all(model, batches)
            seconds[way].append((time.perf_counter() - start) / args.batch)
    rows = {way: {"seconds_per_answer": median(values)} for way, values in seconds.items()}
    one_by_one = rows["one by one"]["seconds_per_answer"]
    rows["as a batch"]["speedup"] = one_by_one / rows["as a batch"]["seconds_per_answer"]
    return {"rows": rows}


def decode_all(model, batches):
    """Decode every batch of prompts, (B, P) each. Returns when the answers are on the host."""
    for prompts in batches:
        gen_length = prompts.shape[1]
        decode(
            model,
            prompts,
            gen_length=gen_length,
            block_length=BLOCK_LENGTH,
            steps=gen_length // TOKENS_PER_STEP,
            logits_eos_inf=True,
            mask_id=MASK_ID,
            eos_id=END_ID,
            eot_id=END_ID,
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
    bench.add_flags(parser)
    args = parser.parse_args(argv)
    suite.check_lowest(parser, args, batch=1, length=64, vocabulary=8, repeats=1)
    if args.length % (2 * BLOCK_LENGTH):
        parser.error(f"--length {args.length}: must be a multiple of {2 * BLOCK_LENGTH}")
    bench.check_flags(parser, args)
    return args


if __name__ == "__main__":
    main(parse_args())
