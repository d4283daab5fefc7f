"""Semi-autoregressive block decoding of a masked diffusion LM: LLaDA's reference decoder, for batches.

    python experiments/decode.py --model ckpts_stagewise_sft_32_step0200 --prompt "What is 2 + 3?"
    python experiments/decode.py --model M --prompt "..." --show               # every canvas, as it fills
    python experiments/decode.py --model M --prompt "..." --threshold 0.9      # fewer forwards

The canvas is the prompt and `gen_length` times [MASK]. Its blocks are filled from left to right, each in `steps` /
blocks denoising steps: a step predicts the block's masked positions and commits the most confident ones (Nie et al.,
arXiv 2502.09992, section 2.4 and `generate.py` of their repository).
B prompts, R of them in a forward, L length of the canvas, K block length, V vocabulary, M masked positions.
"""

import argparse
import math
import os
import sys

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, logging

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pt

REMASKING = ("low_confidence", "random")
PIECE = 32  # rows of logits that are scored at once: they stay in a CPU's caches


@torch.no_grad()
def decode(
    model,
    prompts,
    *,
    gen_length=256,
    block_length=32,
    steps=128,
    temperature=0.0,
    remasking="low_confidence",
    threshold=None,
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
    mask_id=126336,
    eos_id=126081,
    eot_id=126348,
    seeds=None,
    watch=None,
):
    """Answer `prompts`. What a prompt gets does not depend on the others, up to the rounding of the model's dtype.

    At temperature 0 these are the tokens that LLaDA's reference decoder commits for each prompt alone. A prompt whose
    answer has ended in an earlier block is not decoded further: its blocks from there on stay `mask_id`.

    Args:
        model: gives `.logits` (R, L, V) for `input_ids` and `attention_mask` (R, L), and has `get_output_embeddings`.
        prompts: B sequences of ids, of any lengths.
        gen_length, block_length: tokens; `block_length` None is one block, which is decoding without blocks.
        steps: denoising steps for the whole answer, a forward each; not used with a threshold.
        temperature: of Gumbel noise on the logits, in float64; 0 takes the most probable token.
        remasking: "low_confidence" commits the most confident positions first, "random" any.
        threshold: commit all positions whose token has a higher probability than this, and at least one a forward.
        logits_eos_inf: never predict `eos_id`.
        confidence_eos_eot_inf: commit `eos_id` and `eot_id` only where nothing else is left in the block.
        seeds: B ints for noise and random remasking; None: 0, 1, 2, ...
        watch: called before each forward with the numbers of its prompts, a list of R, and their canvases, (R, L).

    Returns:
        (B, gen_length) ids on the host.

    Raises:
        ValueError: if the lengths and steps do not divide, a setting is out of range, or a prompt is empty or masked.
    """
    block_length = block_length or gen_length
    check_settings(gen_length, block_length, steps, temperature, remasking, threshold)
    prompts = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
    if wrong := [i for i, prompt in enumerate(prompts) if len(prompt) == 0 or mask_id in prompt]:
        raise ValueError(f"prompt {wrong[0]} is empty or contains mask_id {mask_id}")
    if not prompts:
        return torch.empty(0, gen_length, dtype=torch.long)
    device = model.get_input_embeddings().weight.device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    canvas = make_canvas(prompts, gen_length, mask_id, eos_id).to(device)  # (B, L)
    generators = [
        torch.Generator(device).manual_seed(seed) for seed in seeds or range(len(prompts))
    ]
    ends = torch.tensor([eos_id, eot_id], device=device)
    ended = torch.zeros(len(prompts), 1, dtype=torch.bool, device=device)
    blocks = gen_length // block_length
    schedule = spread(block_length, steps // blocks) if threshold is None else [None] * block_length
    for block in range(blocks):
        active = (
            starts[:, None] + torch.arange(block_length, device=device) + block * block_length
        )  # (B, K)
        for count in schedule:
            masked = (canvas.gather(1, active) == mask_id) & ~ended  # (B, K)
            if not masked.any():
                break
            rows = masked.any(1).nonzero()[:, 0]  # (R,)
            view = canvas[rows, : starts[rows].max() + gen_length]
            if watch:
                watch(rows.tolist(), view)
            logits = masked_logits(
                model, view, starts[rows] + gen_length, active[rows], masked[rows]
            )  # (M, V)
            if logits_eos_inf:
                logits[:, eos_id] = -math.inf
            counts = masked.sum(1).tolist()  # of B, sum M
            tokens, confidence = choose(
                logits, counts, generators, temperature, remasking
            )  # (M,) each
            del logits  # before the next forward needs the memory
            if confidence_eos_eot_inf:
                confidence -= 1e6 * torch.isin(
                    tokens, ends
                )  # behind all others, in their own order
            commit(
                canvas, active, masked, tokens, most_confident(masked, confidence, count, threshold)
            )
        ended |= torch.isin(canvas.gather(1, active), ends).any(1, keepdim=True)
    return canvas.gather(1, starts[:, None] + torch.arange(gen_length, device=device)).cpu()


def check_settings(gen_length, block_length, steps, temperature, remasking, threshold):
    """Raises ValueError with the first setting that cannot be."""
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length {gen_length} is not divisible by block_length {block_length}")
    if threshold is None and (steps < 1 or steps % (gen_length // block_length)):
        blocks = gen_length // block_length
        raise ValueError(
            f"steps {steps} is not divisible by the {blocks} blocks of {block_length} in {gen_length}"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0 or more")
    if remasking not in REMASKING:
        raise ValueError(f"remasking {remasking!r} must be one of {', '.join(REMASKING)}")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold} must be between 0 and 1")
    if threshold is not None and remasking != "low_confidence":
        raise ValueError(f"threshold {threshold} needs remasking low_confidence, not {remasking}")


def spread(tokens, steps):
    """How many of `tokens` each of `steps` commits, the remainder spread over the first; without those of none."""
    counts = [tokens // steps + (step < tokens % steps) for step in range(steps)]
    return [count for count in counts if count]


def make_canvas(prompts, gen_length, mask_id, pad_id):
    """(B, L) ids: each prompt, `gen_length` masks behind it, and `pad_id` behind these where others are longer."""
    canvas = torch.full((len(prompts), max(map(len, prompts)) + gen_length), pad_id)
    for row, prompt in zip(canvas, prompts, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + gen_length] = mask_id
    return canvas


def masked_logits(model, canvas, lengths, active, masked):
    """Logits (M, V) in float32 of the masked positions of the active block, the only ones that go through the head.

    `canvas` (R, L) has `lengths` (R,) tokens and padding behind them; `active` (R, K) are positions, `masked` (R, K).
    """
    row, pos = masked.nonzero()[:, 0], active[masked]  # (M,) each
    real = torch.arange(canvas.shape[1], device=canvas.device) < lengths[:, None]  # (R, L)
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(
        lambda _, x: (x[0][row, pos],) if x[0].is_floating_point() else None
    ):
        logits = model(input_ids=canvas, attention_mask=None if real.all() else real.long()).logits
    return (
        logits[row, pos] if logits.dim() == 3 else logits
    ).float()  # a head tied to the embedding bypasses the hook


def choose(logits, counts, generators, temperature, remasking):
    """The token of each position and the confidence in it, (M,) each, from logits (M, V), which are used up.

    The first counts[0] rows are of the first prompt, and so on; each has its own generator of random numbers.
    Confidence is the log odds log(p / (1 - p)) of the token's probability p, which orders as p does and does not
    round to the same number wherever the model is nearly sure. Random remasking gives random confidences.
    """
    own = list(zip(logits.split(counts), generators, strict=True))
    tokens = torch.cat([sample(part, temperature, generator) for part, generator in own])[:, None]
    if remasking == "random":
        return tokens[:, 0], torch.cat(
            [uniform((len(part),), generator) for part, generator in own]
        )
    chosen = logits.gather(1, tokens)
    others = torch.cat(
        [piece.logsumexp(1) for piece in logits.scatter_(1, tokens, -math.inf).split(PIECE)]
    )
    return tokens[:, 0], (chosen[:, 0] - others).double()


def sample(logits, temperature, generator):
    """Tokens (N,) from logits (N, V): with Gumbel noise, the argmax of exp(logits) / (-log u)^temperature."""
    if temperature > 0:
        logits = logits.double() - temperature * torch.log(
            -torch.log(uniform(logits.shape, generator))
        )
    return logits.argmax(-1)


def uniform(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)


def most_confident(masked, confidence, count, threshold):
    """Which of the `masked` (B, K) positions to commit, given the confidence (M,) of each: the `count` surest a row,
    or those surer than the probability `threshold`, at least one a row."""
    ranked = confidence.new_full(masked.shape, -math.inf).masked_scatter(masked, confidence)
    surest = torch.zeros_like(masked).scatter(1, ranked.topk(count or 1).indices, True)
    if threshold is not None:
        surest |= ranked > math.log(threshold / (1 - threshold))
    return surest & masked


def commit(canvas, active, masked, tokens, picked):
    """Write the `picked` (B, K) of the `tokens` (M,) for the `masked` (B, K) positions `active` to `canvas` (B, L)."""
    before = canvas.gather(1, active)
    canvas.scatter_(1, active, torch.where(picked, before.masked_scatter(masked, tokens), before))


# ---------------------------------------------------------------------------- models, prompts and flags


def load_model(name, revision="main", device="cpu", dtype=torch.float32):
    """A checkpoint or base model for decoding, on `device`.

    Raises:
        SystemExit: if it cannot be loaded, or lacks weights.
    """
    how = {
        "revision": revision,
        "trust_remote_code": True,
        "dtype": dtype,
        "device_map": {"": device},
    }
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **how)
    except torch.OutOfMemoryError:
        sys.exit(f"--model {name}: {device} has too little memory for it; give another --device")
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        sys.exit(
            f"--model {name} cannot be loaded ({pt.first_line(error)}); give a hub id or a model folder"
        )
    if missing := sorted(loaded["missing_keys"]):
        sys.exit(
            f"--model {name}: {len(missing)} weights are missing, such as {missing[0]}; complete it"
        )
    return model.eval()


def special_ids(name, config, tokenizer, vocabulary):
    """`mask_id`, `eos_id` and `eot_id` of a model: of its configuration, its tokenizer, and LLaDA's `<|eot_id|>`.

    Raises:
        SystemExit: if they are unknown or beyond the `vocabulary`.
    """
    eos_id, mask_id = tokenizer.eos_token_id, getattr(config, "mask_token_id", None)
    ids = {"mask_id": 126336 if mask_id is None else mask_id, "eos_id": eos_id}
    ids["eot_id"] = tokenizer.get_vocab().get("<|eot_id|>", eos_id)
    if eos_id is None or max(ids.values()) >= vocabulary:
        sys.exit(
            f"--model {name}: its {vocabulary} ids do not have {ids}; give a masked diffusion model"
        )
    return ids


def check_prompts(model, prompts, gen_length, mask_id, config):
    """Ends with a message if a prompt spells the mask token or leaves too little room for `gen_length` tokens."""
    if spelled := [number for number, prompt in enumerate(prompts, start=1) if mask_id in prompt]:
        sys.exit(f"prompt {spelled[0]} spells the mask token of --model {model}; leave it out")
    room = getattr(config, "max_sequence_length", None) or math.inf
    if (longest := max(map(len, prompts))) + gen_length > room:
        sys.exit(
            f"--gen_length {gen_length}: with a prompt of {longest} tokens it exceeds the {room} of --model {model}"
        )


def encode_prompts(tokenizer, queries):
    """The ids of `queries` in MetaMath's prompt and the chat template, as pt.py makes them for training."""
    prompts, _ = pt.render(
        tokenizer, pt.find_trailing_header(tokenizer), queries, ["answer"] * len(queries)
    )
    return tokenizer(prompts, add_special_tokens=False)["input_ids"]


def answer_length(ids, eos_id, eot_id):
    """Tokens of an answer up to and with the one that ends it; all of them if none does."""
    ends = torch.isin(ids, torch.tensor([eos_id, eot_id])).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(ids)


def add_flags(parser):
    """The flags that this command and evaluate.py share: the model and how it decodes."""
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--model", required=True, help="checkpoint folder, base model folder or hub id"
    )
    parser.add_argument(
        "--model_revision",
        default="main",
        help="of a hub model: branch, tag or commit (%(default)s)",
    )
    parser.add_argument(
        "--gen_length", type=int, default=256, help="tokens of an answer at most (%(default)s)"
    )
    parser.add_argument(
        "--block_length",
        type=int,
        default=32,
        help="tokens; 0: one block, the whole answer (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=128, help="denoising steps for the whole answer (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of Gumbel noise (%(default)s: none)"
    )
    parser.add_argument(
        "--remasking", choices=REMASKING, default=REMASKING[0], help="(%(default)s)"
    )
    parser.add_argument(
        "--threshold", type=float, help="commit all tokens above this probability; then no --steps"
    )
    parser.add_argument(
        "--logits_eos_inf", action="store_true", help="never predict the end-of-text token"
    )
    parser.add_argument(
        "--confidence_eos_eot_inf",
        action="store_true",
        help="commit end tokens last in their block",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of noise and random remasking (%(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(%(default)s)")


SETTINGS = "gen_length block_length steps temperature remasking threshold logits_eos_inf confidence_eos_eot_inf".split()


def settings(parser, args):
    """The keyword arguments of `decode` from the flags of `add_flags`; ends with a message if they do not fit."""
    how = {name: getattr(args, name) for name in SETTINGS}
    how["block_length"] = how["block_length"] or how["gen_length"]
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed {args.seed}: must be 0 to {2**31 - 1}")
    try:
        check_settings(**{name: how[name] for name in SETTINGS[:6]})
        torch.zeros(1, device=args.device)
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used ({pt.first_line(error)})")
    return how


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument(
        "--prompt", required=True, help="a question; pt.py's prompt is put around it"
    )
    parser.add_argument(
        "--show", action="store_true", help="print every canvas, [MASK] as a square"
    )
    args = parser.parse_args()
    how = settings(parser, args)
    if not args.prompt.strip():
        parser.error("--prompt is empty; give a question")
    logging.set_verbosity_error()
    tokenizer = pt.load_tokenizer(args.model, args.model_revision)
    prompts = encode_prompts(tokenizer, [args.prompt])
    model = load_model(args.model, args.model_revision, args.device, getattr(torch, args.dtype))
    ids = special_ids(
        args.model, model.config, tokenizer, model.get_input_embeddings().num_embeddings
    )
    check_prompts(args.model, prompts, how["gen_length"], ids["mask_id"], model.config)
    forwards = how["steps"] if args.threshold is None else how["gen_length"]
    bar = tqdm(total=forwards, unit=" forwards", desc="decode", disable=args.show)

    def watch(_, canvas):
        bar.update()
        if args.show:
            spelled = [
                "\u25a1" if i == ids["mask_id"] else tokenizer.decode([i])
                for i in canvas[0, len(prompts[0]) :]
            ]
            print(f"--- forward {bar.n}\n{''.join(spelled)}")

    try:
        answer = decode(model, prompts, **how, **ids, seeds=[args.seed], watch=watch)[0]
    except torch.OutOfMemoryError:
        sys.exit(f"--gen_length {how['gen_length']}: out of memory; give a lower one")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    bar.close()
    length = answer_length(answer, ids["eos_id"], ids["eot_id"])
    print(tokenizer.decode(answer[:length], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
