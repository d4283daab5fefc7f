"""Block decoding of a masked diffusion LM: LLaDA's reference decoder, for batches.

    python experiments/decode.py --model ckpts_stagewise_sft_32_step0200 --prompt "What is 2 + 3?"
    python experiments/decode.py --model M --prompt "..." --show             # print every canvas
    python experiments/decode.py --model M --prompt "..." --threshold 0.9    # fewer forward passes

The canvas is the prompt and `gen_length` times [MASK]. Its blocks are filled from left to right,
each in steps / blocks denoising steps. A step predicts the block's masked positions and commits
the most confident ones (Nie et al., arXiv:2502.09992, section 2.4, and their `generate.py`).
A model of train_opdlm.py attends block by block: its `config.block_causal` says so.
This file is a command, and also the library that evaluate.py decodes with.
Guide: experiments/docs/decoding.md

At temperature 0 the tokens are those of LLaDA's `generate.py`, which differs in four ways:
    It also decodes the blocks after the one in which an answer has ended.
    Its confidences are probabilities, which round to 1 where the model is nearly sure. Here they
    are log odds, which keep the order.
    It leaves the order of equal confidences to `torch.topk`, which does not define it. Here they
    are committed from left to right.
    Where [MASK] itself was predicted and committed, it tries again during later blocks.

Shapes: B prompts, R of them in a forward pass, L length of the canvas, K block length,
V vocabulary, M masked positions in the active blocks.
"""

import math
import os
import sys

import suite
import torch
from decoding.block_causal import decode_blocks, of_unfinished
from decoding.key_values import KINDS, KeyValues, window
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from toy_task.llada.modeling_llada import LLaDAModelLM
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig, logging

import pt
from train_blockwise import cpu_has_bf16, load_whole, logit_shift, logits_at, mask_token_id

BLOCK_LENGTH = 32  # tokens, of a model that says nothing else
LOGSUMEXP_ROWS = 32  # rows of logits reduced at once: they fit in a CPU's caches
REMASKING = ("low_confidence", "random")
OPTIONS = (  # the flags that are keyword arguments of `decode`
    "gen_length",
    "block_length",
    "steps",
    "temperature",
    "remasking",
    "threshold",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
    "cache",
    "refresh",
)


# ------- decoding
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
    cache=None,
    refresh=None,
    mask_id,
    eos_id,
    eot_id,
    seeds=None,
    callback=None,
):
    """Answer `prompts`. An answer does not depend on the other prompts, up to rounding.

    After the block in which an answer has ended, its blocks stay `mask_id`.

    Args:
        model: gives `.logits` (R, L, V) for `input_ids` and `attention_mask` (R, L), and has
            `get_input_embeddings` and `get_output_embeddings`.
        prompts: B sequences of ids, of any lengths.
        gen_length: tokens per answer.
        block_length: tokens per block; None: the whole answer is one block.
        steps: denoising steps for the whole answer, one forward pass each; unused with a threshold.
        temperature: of Gumbel noise on the logits; 0 takes the most probable token.
        remasking: "low_confidence" commits the most confident positions first, "random" any.
        threshold: each step commits every token with a higher probability, and at least one.
        logits_eos_inf: never predict `eos_id`.
        confidence_eos_eot_inf: with "low_confidence", the logits of `eos_id` and `eot_id` are -inf
            in the softmax of the confidences. End tokens then have probability 0 and are committed
            last in their block; other tokens have their probability among the other tokens.
        cache: "prefix" or "dual" keeps keys and values while a block is decoded, which is
            approximate, see decoding/key_values.py; for this suite's LLaDA. A model that attends
            block by block has its exact cache without.
        refresh: steps of a block between two passes over the whole canvas, with a cache; None: only
            at the first.
        mask_id, eos_id, eot_id: of [MASK] and of the tokens that end an answer, see `special_ids`.
        seeds: B ints, for the noise and random remasking; None: 0, 1, 2, ...
        callback: called before each forward pass with the numbers of its prompts, a list of R
            ints, and their canvases, (R, L) ids.

    Returns:
        (B, gen_length) ids on the CPU.

    Raises:
        ValueError: if the lengths and steps do not divide, an option is out of range, a prompt is
            empty or contains `mask_id`, or the model cannot be given prompts of several lengths.
    """
    if block_length is None:
        block_length = gen_length
    check_options(
        gen_length, block_length, steps, temperature, remasking, threshold, cache, refresh
    )
    device = model.get_input_embeddings().weight.device
    canvas, prompt_lens = make_canvas(prompts, gen_length, mask_id, eos_id, device)
    lengths = prompt_lens + gen_length  # (B, 1)
    generators = make_generators(range(len(prompts)) if seeds is None else seeds, device)
    ends = torch.tensor([eos_id, eot_id], device=device)
    block_steps = steps // (gen_length // block_length)
    num_transfer_tokens = get_num_transfer_tokens(block_length, block_steps, threshold)

    def choose(rows, masked, logits, number):
        """Tokens (M,) of the masked (R, K) positions, and which to commit, (R, K)."""
        counts = masked.sum(1).tolist()  # rows of logits per prompt
        own = [generators[row] for row in rows]
        if logits_eos_inf:
            logits[:, eos_id] = -math.inf
        x0 = sample_tokens(logits, counts, own, temperature)  # (M,)
        if confidence_eos_eot_inf:
            logits[:, ends] = -math.inf
        confidence = score(logits, x0, counts, own, remasking)  # (M,)
        return x0, most_confident(masked, confidence, num_transfer_tokens[number], threshold)

    if is_block_causal(model):
        answers, _ = decode_blocks(
            model,
            [torch.as_tensor(prompt) for prompt in prompts],
            gen_length,
            block_length,
            mask_id,
            [eos_id, eot_id],
            lambda step, logits: choose(step.rows.tolist(), step.masked, logits, step.number),
            steps=len(num_transfer_tokens),
            shift=bool(logit_shift(model.config)),
            callback=callback and of_unfinished(callback, mask_id),
        )
        return answers

    if len(prompt_lens.unique()) > 1 and not heeds_attention_mask(model, prompts[0]):
        raise ValueError("the model does not heed attention_mask; decode its prompts one by one")
    ended = torch.zeros_like(prompt_lens, dtype=torch.bool)  # (B, 1) True = in an earlier block
    for start in range(0, gen_length, block_length):
        block = torch.arange(start, start + block_length, device=device)  # (K,)
        active = prompt_lens + block  # (B, K) positions in the canvas
        for number in range(len(num_transfer_tokens)):
            masked = (canvas.gather(1, active) == mask_id) & ~ended  # (B, K)
            if not masked.any():
                break
            if cache is None or number % (refresh or block_length) == 0:
                inputs = forward_inputs(canvas, lengths, masked)
                first = 0  # column of the canvas that the model is given first
                if cache is not None:
                    store = KeyValues(masked.any(1).nonzero()[:, 0])
                    inputs["key_values"] = store
            else:
                inputs = window(store, cache, canvas, prompt_lens, lengths, masked, start)
                first = prompt_lens + start  # (B, 1)
            if callback is not None:
                rows = masked.any(1).nonzero()[:, 0]
                callback(rows.tolist(), canvas[rows, : lengths[rows].max()])
            logits = masked_logits(model, inputs, active - first, masked)  # (M, V)
            x0, transfer_index = choose(range(len(prompts)), masked, logits, number)
            del logits  # the next forward pass needs the memory
            commit(canvas, active, masked, x0, transfer_index)
        ended |= torch.isin(canvas.gather(1, active), ends).any(1, keepdim=True)
    return canvas.gather(1, prompt_lens + torch.arange(gen_length, device=device)).cpu()


def make_canvas(prompts, gen_length, mask_id, pad_id, device):
    """Each prompt, `gen_length` masks after it, and padding where other prompts are longer.

    Returns:
        canvas: (B, L) ids on `device`.
        prompt_lens: (B, 1), on `device` as well.

    Raises:
        ValueError: if a prompt is empty or contains `mask_id`.
    """
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)[:, None]
    longest = max((len(prompt) for prompt in prompts), default=0)
    canvas = torch.full((len(prompts), longest + gen_length), pad_id)
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0 or mask_id in prompt:
            raise ValueError(f"prompts[{number}] is empty or contains mask_id {mask_id}")
        canvas[number, : len(prompt)] = torch.as_tensor(prompt)
        canvas[number, len(prompt) : len(prompt) + gen_length] = mask_id
    return canvas.to(device), prompt_lens.to(device)


@torch.no_grad()
def heeds_attention_mask(model, prompt):
    """Whether a prompt's last logits are the same whatever padding is hidden behind it."""
    device = model.get_input_embeddings().weight.device
    rows = [[*map(int, prompt), *[pad_id] * 8] for pad_id in (0, 1)]
    input_ids = torch.tensor(rows, device=device)  # (2, L)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, len(prompt) :] = 0
    row = torch.arange(2, device=device)
    pos = torch.full_like(row, len(prompt) - 1)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    try:
        one, other = logits_at(model, row, pos, **inputs).float()  # (V,) each
    except torch.OutOfMemoryError:
        raise
    except Exception:  # remote code fails in many ways; it may take no such mask
        return False
    return bool((one - other).abs().max() <= 0.01 * one.abs().median())  # not if there is NaN


def make_generators(seeds, device):
    """A generator of random numbers per prompt, so that its answer depends on its seed alone."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def get_num_transfer_tokens(block_length, steps, threshold):
    """How many tokens each step of a block commits; with a threshold, at least.

    The remainder goes to the first steps. Steps that would commit nothing are left out.
    """
    if threshold is not None:
        return [1] * block_length
    base, remainder = divmod(block_length, steps)
    if base == 0:
        return [1] * remainder
    return [base + 1] * remainder + [base] * (steps - remainder)


def forward_inputs(canvas, lengths, masked):
    """What the model takes for the R prompts that have a masked (B, K) position, as a dict.

    Each row of the canvas (B, L) has `lengths` (B, 1) tokens, then padding.
    """
    rows = masked.any(1).nonzero()[:, 0]  # (R,) prompts
    input_ids = canvas[rows, : lengths[rows].max()]  # (R, L)
    columns = torch.arange(input_ids.shape[1], device=canvas.device)  # (L,)
    attended = columns < lengths[rows]  # (R, L)
    return {"input_ids": input_ids, "attention_mask": None if attended.all() else attended.long()}


def is_block_causal(model):
    """Whether a model attends block by block, as train_opdlm.py writes into its configuration."""
    return getattr(getattr(model, "config", None), "block_causal", None) is not None


def masked_logits(model, inputs, active, masked):
    """The logits of the masked positions, (M, V) in float32, from one forward pass.

    Only these positions go through the LM head.

    Args:
        inputs: of the R prompts with a masked position, see `forward_inputs`.
        active: (B, K) columns of the active blocks in the inputs.
        masked: (B, K) True = masked.
    """
    row = masked[masked.any(1)].nonzero()[:, 0]  # (M,) of the inputs
    shift = logit_shift(getattr(model, "config", None))
    pos = active[masked] - int(bool(shift))  # (M,)
    return logits_at(model, row, pos, **inputs).float()


def sample_tokens(logits, counts, generators, temperature):
    """A token per row of `logits` (M, V): (M,) ids.

    The first counts[0] rows are the first prompt's, and so on.
    """
    if temperature == 0:
        return logits.argmax(-1)
    tokens = []
    for part, generator in zip(logits.split(counts), generators, strict=True):
        noisy = add_gumbel_noise(part, temperature, generator)
        tokens.append(noisy.argmax(-1))
    return torch.cat(tokens)


def add_gumbel_noise(logits, temperature, generator):
    """The logarithm of LLaDA's exp(logits) / (-log u) ** temperature, in float64."""
    gumbel = -torch.log(-torch.log(uniform(logits.shape, generator)))
    return logits.double() + temperature * gumbel


def uniform(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)


def score(logits, x0, counts, generators, remasking):
    """The confidence in each token of `x0` (M,), or a random number per position: (M,)."""
    if remasking == "low_confidence":
        return log_odds(logits, x0)
    parts = []
    for count, generator in zip(counts, generators, strict=True):
        parts.append(uniform((count,), generator))
    return torch.cat(parts)


def log_odds(logits, tokens):
    """log(p / (1 - p)) for the softmax probability p of each token: (M,) in float64.

    It orders tokens as p does, and still tells those apart whose p rounds to 1 in float32. It is
    -inf where the token's logit is.

    Args:
        logits: (M, V), overwritten.
        tokens: (M,) ids.
    """
    tokens = tokens[:, None]  # (M, 1)
    chosen = logits.gather(1, tokens)[:, 0]  # (M,)
    logits.scatter_(1, tokens, -math.inf)
    others = [piece.logsumexp(1) for piece in logits.split(LOGSUMEXP_ROWS)]
    return (chosen - torch.cat(others)).double()


def most_confident(masked, confidence, num, threshold):
    """The positions to commit: transfer_index (B, K).

    Args:
        masked: (B, K) True = masked.
        confidence: (M,) of each masked position; with a threshold, log odds.
        num: commit the `num` most confident positions per row, the first ones of equals.
        threshold: commit also all positions with a higher probability; None: no others.
    """
    lowest = torch.finfo(confidence.dtype).min
    confidence = confidence.clamp(min=lowest)  # probability 0 still ranks before "not masked"
    ranked = torch.full_like(masked, -math.inf, dtype=confidence.dtype)
    ranked = ranked.masked_scatter(masked, confidence)  # (B, K)
    order = ranked.argsort(dim=1, descending=True, stable=True)  # (B, K)
    transfer_index = torch.zeros_like(masked).scatter(1, order[:, :num], True)
    if threshold is not None:
        transfer_index |= ranked > math.log(threshold / (1 - threshold))
    return transfer_index & masked


def commit(canvas, active, masked, x0, transfer_index):
    """Write the tokens that `transfer_index` (B, K) picks to `canvas` (B, L).

    `x0` (M,) are the tokens of the `masked` (B, K) ones among the positions `active` (B, K).
    """
    before = canvas.gather(1, active)  # (B, K)
    predicted = before.masked_scatter(masked, x0)  # (B, K)
    canvas.scatter_(1, active, torch.where(transfer_index, predicted, before))


# ------- the command
def main(args):
    set_device(args)
    logging.set_verbosity_error()
    tokenizer = pt.load_tokenizer(*base_of(args.model, args.model_revision))
    prompts = encode_prompts(tokenizer, [args.prompt])
    options = decode_options(args, read_config(*base_of(args.model, args.model_revision)))
    dtype = getattr(torch, args.dtype)
    model = load_model(args.model, args.model_revision, args.device, dtype, args.cache)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = special_ids(args.model, model.config, tokenizer, vocabulary)
    check_block_length(args.model, model.config, options["block_length"])
    check_prompts(args.model, prompts, args.gen_length, ids["mask_id"], model.config)

    forwards = args.steps if args.threshold is None else args.gen_length  # at most
    bar = tqdm(total=forwards, unit=" forwards", desc="decode", disable=args.show)
    shown = 0

    def callback(_, canvas):
        nonlocal shown
        bar.update()
        shown += 1
        if args.show:
            answer = canvas[0, len(prompts[0]) :].tolist()
            print(f"--- forward pass {shown}\n{spell(answer, tokenizer, ids['mask_id'])}")

    try:
        answers = decode(model, prompts, **options, **ids, seeds=[args.seed], callback=callback)
    except torch.OutOfMemoryError:
        sys.exit(f"--gen_length {args.gen_length}: out of memory; give a lower one")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    bar.close()
    print(answer_text(tokenizer, answers[0], ids["eos_id"], ids["eot_id"]).strip())


def spell(ids, tokenizer, mask_id):
    """The text of ids, with a square for each [MASK]."""
    return "".join("\u25a1" if id_ == mask_id else tokenizer.decode([id_]) for id_ in ids)


def encode_prompts(tokenizer, queries):
    """The ids of `queries` in MetaMath's prompt and the chat template, as pt.py renders them."""
    header = pt.find_trailing_header(tokenizer)
    prompts, _ = pt.render(tokenizer, header, queries, ["answer"] * len(queries))
    return tokenizer(prompts, add_special_tokens=False)["input_ids"]


def check_prompts(name, prompts, gen_length, mask_id, config):
    """Check the ids of `prompts` against the model `name` and its configuration.

    Raises:
        SystemExit: if one contains the mask token, or leaves too little room for `gen_length`.
    """
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            sys.exit(f"prompt {number} is empty; give another")
        if mask_id in prompt:
            sys.exit(f"prompt {number} contains the mask token of --model {name}; remove it")
    room = getattr(config, "max_sequence_length", None)
    longest = max(len(prompt) for prompt in prompts)
    if room is not None and longest + gen_length > room:
        sys.exit(
            f"--gen_length {gen_length}: with a prompt of {longest} tokens it exceeds "
            f"the {room} tokens of --model {name}; give a lower one"
        )


def answer_length(ids, eos_id, eot_id):
    """The tokens of an answer up to and including the first end token; all if there is none."""
    ends = torch.isin(ids, torch.tensor([eos_id, eot_id])).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(ids)


def answer_text(tokenizer, ids, eos_id, eot_id):
    """The text of an answer up to its first end token, without this and other special tokens."""
    ids = ids[: answer_length(ids, eos_id, eot_id)]
    ids = ids[~torch.isin(ids, torch.tensor([eos_id, eot_id]))]
    return tokenizer.decode(ids, skip_special_tokens=True)


# ------- the model
def set_device(args):
    """Fill in `args.device` and `args.dtype` where they were not given.

    Raises:
        SystemExit: if the device cannot be used.
    """
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        args.device = f"cuda:{local_rank()}"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {args.device} cannot be used ({pt.first_line(error)})")
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    slow = args.dtype == "bfloat16" and args.device.startswith("cpu") and not cpu_has_bf16()
    if slow and os.environ.get("RANK", "0") == "0":
        message = "warning: this CPU computes bfloat16 slowly; --dtype float32 is faster"
        print(message, file=sys.stderr)


def local_rank():
    """The number of this process's GPU: LOCAL_RANK, which a launcher sets.

    Where RANK alone is set, the ranks take the machine's GPUs in turn.
    """
    if os.environ.get("LOCAL_RANK"):
        return int(os.environ["LOCAL_RANK"])
    return int(os.environ.get("RANK") or 0) % max(1, torch.cuda.device_count())


def base_of(name, revision):
    """The model and revision that an adapter's folder belongs to; of another model, the same.

    Raises:
        SystemExit: if the folder's adapter_config.json is damaged, or its base is not there.
    """
    if not os.path.exists(os.path.join(name, "adapter_config.json")):
        return name, revision
    try:
        adapter = PeftConfig.from_pretrained(name)
    except Exception as error:  # it may be damaged in many ways
        sys.exit(f"--model {name} has a damaged adapter_config.json ({pt.first_line(error)})")
    base = adapter.base_model_name_or_path
    if not os.path.isdir(base or ""):
        try:
            PretrainedConfig.get_config_dict(base, revision=adapter.revision)
        except Exception as error:  # no such folder, a bad name, the hub
            sys.exit(
                f"--model {name} is an adapter of {base}, which is neither a folder, as seen from "
                f"{os.getcwd()}, nor a model of the hub ({pt.first_line(error)}); correct "
                f"base_model_name_or_path in {os.path.join(name, 'adapter_config.json')}"
            )
    return base, adapter.revision


def read_config(name, revision):
    """The configuration of a model that is no adapter.

    Raises:
        SystemExit: if it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        why = pt.first_line(error)
        sys.exit(f"--model {name} cannot be loaded ({why}); give a hub id or a model folder")


def load_model(name, revision="main", device="cpu", dtype=torch.float32, cache=None):
    """A checkpoint, a base model, or a base with an adapter merged, for decoding, on `device`.

    With a `cache`, LLaDA's weights in this suite's LLaDA, whose code takes one.

    Raises:
        SystemExit: if it cannot be loaded, lacks weights, or the adapter is not the base's.
    """
    base, revision = base_of(name, revision)
    try:
        kind = None if cache is None else LLaDAModelLM
        model = load_whole(base, revision, kind, dtype=dtype, device_map={"": device})
        if base != name:
            model = merge_adapter(model, name, base, device)
    except torch.OutOfMemoryError:
        sys.exit(f"--model {name}: not enough memory on {device}; give another --device")
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        why = pt.first_line(error)
        sys.exit(f"--model {name} cannot be loaded ({why}); give a hub id or a model folder")
    return model.eval()


def merge_adapter(model, name, base, device):
    """The model `base` with the weights of the adapter in the folder `name` merged.

    Raises:
        SystemExit: if a weight of the adapter has no place in the model, or one is missing.
    """
    model = get_peft_model(model, PeftConfig.from_pretrained(name))
    loaded = set_peft_model_state_dict(model, load_peft_weights(name, device=str(device)))
    missing = [key for key in loaded.missing_keys if "default" in key.split(".")]  # adapter's name
    wrong = sorted(loaded.unexpected_keys) + sorted(missing)
    if wrong:  # peft would leave them out
        sys.exit(
            f"--model {name}: {len(wrong)} weights of this adapter and of its base {base} do not "
            f"match, such as {wrong[0]}; give an adapter of this base"
        )
    return model.merge_and_unload()


def special_ids(name, config, tokenizer, vocabulary):
    """The `mask_id`, `eos_id` and `eot_id` of a model with `vocabulary` ids, as a dict.

    Raises:
        SystemExit: if they are unknown, or beyond the vocabulary.
    """
    mask_id = mask_token_id(config, tokenizer)
    if mask_id is None:
        base, _ = base_of(name, None)
        sys.exit(
            f"--model {name}: neither its config.json nor its tokenizer names a mask token; train "
            f"with this suite, which writes it, or add mask_token_id to the config.json of {base}"
        )
    eos_id, eot_id = end_ids(tokenizer)
    ids = {"mask_id": mask_id, "eos_id": eos_id, "eot_id": eot_id}
    if eos_id is None or max(ids.values()) >= vocabulary:
        sys.exit(
            f"--model {name}: {ids} are not among its {vocabulary} ids; "
            "give a masked diffusion model"
        )
    return ids


def end_ids(tokenizer):
    """The tokens that end an answer: [eos_id, eot_id], the tokenizer's and the chat template's.

    The template's is the first added token that follows the answer in a conversation and is not
    white space; it is eos where there is none.
    """
    probe = "answer-probe"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program and can fail in any way
        text = ""
    _, found, rest = text.rpartition(probe)
    rest = rest.removesuffix(pt.find_trailing_header(tokenizer))
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    added = tokenizer.added_tokens_decoder
    ends = [id_ for id_ in ids if id_ in added and added[id_].content.strip()]
    return [tokenizer.eos_token_id, ends[0] if ends else tokenizer.eos_token_id]


def check_block_length(name, config, block_length):
    """Warn if a model that attends block by block has learnt another block length."""
    learnt = getattr(config, "block_causal", None)
    if learnt not in (None, block_length) and os.environ.get("RANK", "0") == "0":
        message = f"warning: --model {name} has learnt blocks of {learnt} tokens"
        print(f"{message}, not --block_length {block_length}", file=sys.stderr)


# ------- flags and their checks
def parse_args(argv=None):
    """The flags; ends with one message and status 2 if one is wrong."""
    parser = suite.make_parser(__doc__)
    add_model_flags(parser)
    add_decoding_flags(parser)
    add = parser.add_argument
    add("--prompt", required=True, help="a question; pt.py's prompt is added")
    add("--show", action="store_true", help="print every canvas, [MASK] as a square")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if not args.prompt.strip():
        parser.error("--prompt is empty; give a question")
    return args


def add_model_flags(parser):
    """Add the flags that say which model is loaded, to an ArgumentParser."""
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint, adapter or base, or hub id")
    add("--model_revision", default="main", help="branch, tag or commit of a hub model (main)")
    add_device_flags(parser)


def add_device_flags(parser):
    """Add the flags that say where the model is, and in which dtype; see `set_device`."""
    add = parser.add_argument
    add("--dtype", choices=("bfloat16", "float32"), help="(bfloat16 on a GPU, else float32)")
    add("--device", help="cpu, cuda, cuda:1, ... (cuda if there is a GPU)")


def add_decoding_flags(parser):
    """Add the flags that say how the model decodes, to an ArgumentParser."""
    add = parser.add_argument
    add("--gen_length", type=int, default=256, help="longest answer, in tokens (%(default)s)")
    block = f"tokens per block, 0 = the whole answer is one block (the model's, or {BLOCK_LENGTH})"
    add("--block_length", type=int, help=block)
    add("--steps", type=int, default=128, help="denoising steps for the answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="of Gumbel noise, 0 = none (%(default)s)")
    remasking = "commit the most confident positions first, or random ones (%(default)s)"
    add("--remasking", choices=REMASKING, default=REMASKING[0], help=remasking)
    threshold = "commit every token with a higher probability, whatever --steps (off)"
    add("--threshold", type=float, help=threshold)
    add("--logits_eos_inf", action="store_true", help="never predict <|endoftext|>")
    last = "with low_confidence: commit end tokens last in their block"
    add("--confidence_eos_eot_inf", action="store_true", help=last)
    cache = "keep keys and values in a block, for LLaDA; approximate (off)"
    add("--cache", choices=KINDS, help=cache)
    refresh = "with --cache: steps between passes over the whole canvas (once per block)"
    add("--refresh", type=int, metavar="STEPS", help=refresh)
    add("--seed", type=int, default=0, help="of noise and random remasking (%(default)s)")


def check_flags(parser, args):
    """End with the parser's message if the shared flags do not fit together.

    A block length that is not given is not known yet: `decode_options` checks it.
    """
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed {args.seed}: must be 0 to {2**31 - 1}")
    options = {name: getattr(args, name) for name in OPTIONS}
    options["block_length"] = args.block_length or args.gen_length
    try:
        check_options(**options)
    except ValueError as error:
        parser.error(str(error))


def decode_options(args, config):
    """The keyword arguments of `decode` that the flags and a model's configuration give.

    Raises:
        SystemExit: if they do not fit together.
    """
    options = {name: getattr(args, name) for name in OPTIONS}
    is_llada = getattr(config, "model_type", None) == "llada"
    if args.cache is not None and not is_llada:
        sys.exit(f"--cache {args.cache}: only for LLaDA, not a {config.model_type}; leave it out")
    if args.block_length is None:
        options["block_length"] = getattr(config, "block_causal", None) or BLOCK_LENGTH
    elif args.block_length == 0:
        options["block_length"] = args.gen_length
    try:
        check_options(**options)
    except ValueError as error:
        sys.exit(f"{error}; give --block_length, or other --gen_length and --steps")
    return options


def check_options(
    gen_length, block_length, steps, temperature, remasking, threshold, cache, refresh, **_
):
    """Check the options of a decoding; the others have no limits.

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
    if cache is not None and cache not in KINDS:
        raise ValueError(f"cache {cache!r} must be one of {', '.join(KINDS)}")
    if refresh is not None and (cache is None or refresh < 1):
        raise ValueError(f"refresh {refresh} must be 1 or more, and needs a cache")
    if threshold is not None and remasking != "low_confidence":
        raise ValueError(f"threshold {threshold} needs remasking low_confidence, not {remasking}")


if __name__ == "__main__":
    main(parse_args())
