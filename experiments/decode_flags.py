"""The flags that decode.py and evaluate.py share: the model, and how it decodes.

Only the standard library is imported here: --help and a wrong flag are answered at once.
"""

import math

REMASKING = ("low_confidence", "random")
OPTIONS = (  # the flags that are keyword arguments of `decode.decode`
    "gen_length",
    "block_length",
    "steps",
    "temperature",
    "remasking",
    "threshold",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
)


def add_model_flags(parser):
    """Add the flags that say which model is loaded, and where, to an ArgumentParser."""
    parser.add_argument(
        "--model", required=True, help="folder of a checkpoint, adapter or base, or hub id"
    )
    parser.add_argument(
        "--model_revision",
        default="main",
        help="branch, tag or commit of a hub model (%(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the model (bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is a GPU)")


def add_decoding_flags(parser):
    """Add the flags that say how the model decodes, to an ArgumentParser."""
    add = parser.add_argument
    add("--gen_length", type=int, default=256, help="longest answer, in tokens (%(default)s)")
    block = "tokens per block, 0 = the whole answer is one block (%(default)s)"
    add("--block_length", type=int, default=32, help=block)
    add("--steps", type=int, default=128, help="denoising steps for the answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="of Gumbel noise, 0 = none (%(default)s)")
    remasking = "commit the most confident positions first, or random ones (%(default)s)"
    add("--remasking", choices=REMASKING, default=REMASKING[0], help=remasking)
    threshold = "commit every token with a higher probability, whatever --steps (off)"
    add("--threshold", type=float, help=threshold)
    add("--logits_eos_inf", action="store_true", help="never predict <|endoftext|>")
    last = "with low_confidence: commit end tokens last in their block"
    add("--confidence_eos_eot_inf", action="store_true", help=last)
    add("--seed", type=int, default=0, help="of noise and random remasking (%(default)s)")


def check_flags(parser, args):
    """End with the parser's message if the shared flags do not fit together."""
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed {args.seed}: must be 0 to {2**31 - 1}")
    block_length = args.block_length or args.gen_length
    try:
        check_options(
            args.gen_length,
            block_length,
            args.steps,
            args.temperature,
            args.remasking,
            args.threshold,
        )
    except ValueError as error:
        parser.error(str(error))


def decode_options(args):
    """The keyword arguments of `decode.decode` that the flags give."""
    options = {name: getattr(args, name) for name in OPTIONS}
    options["block_length"] = args.block_length or args.gen_length
    return options


def check_options(gen_length, block_length, steps, temperature, remasking, threshold):
    """Check the options of a decoding.

    Raises:
        ValueError: if the lengths and steps do not divide, or an option is out of range.
    """
    if gen_length < 1:
        raise ValueError(f"gen_length {gen_length} must be at least 1")
    if block_length < 1:
        raise ValueError(f"block_length {block_length} must be at least 1")
    if gen_length % block_length:
        raise ValueError(f"gen_length {gen_length} is not divisible by block_length {block_length}")
    blocks = gen_length // block_length
    if threshold is None and (steps < 1 or steps % blocks):
        raise ValueError(
            f"steps {steps} is not divisible by the {blocks} blocks of {block_length} tokens"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0 or more")
    if remasking not in REMASKING:
        raise ValueError(f"remasking {remasking!r} must be one of {', '.join(REMASKING)}")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold} must be between 0 and 1")
    if threshold is not None and remasking != "low_confidence":
        raise ValueError(f"threshold {threshold} needs remasking low_confidence, not {remasking}")
