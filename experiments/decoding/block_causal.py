"""Block-causal attention, and how OPDLM's student and its teacher answer prompts.

A position sees its block and those before. Blocks of BLOCK_SIZE tokens are counted from the
answer's start; the prompt's are counted back from its end.

Shapes: R rows, P prompt tokens, N answer tokens, S columns, Q of them queried, K = BLOCK_SIZE,
V vocabulary.
"""

import math

import suite  # noqa: F401 (the trainers are two folders up)
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from train_fullseq import logits_at


# ------- attention
def block_of(args, pos):
    """The block of positions counted from the answer's start; the prompt's are negative."""
    return torch.div(pos, args.BLOCK_SIZE, rounding_mode="floor")


def training_sees(args, prompt_columns, answer_columns, device="cpu"):
    """Where positions of [prompt | x0 | x_t] attend to each other; (S, S), True = row sees column.

    A block of x_t sees the prompt, the blocks of x0 before it, and itself.
    """
    clean = block_of(args, torch.arange(-prompt_columns, answer_columns, device=device))  # (P + N,)
    block = torch.cat([clean, clean[prompt_columns:]])  # (S,)
    noisy = torch.arange(len(block), device=device) >= len(clean)  # (S,) True in x_t
    earlier = block < block[:, None]  # (S, S)
    same = block == block[:, None]
    of_clean = ~noisy & (earlier | (same & ~noisy[:, None]))
    of_noisy = noisy & noisy[:, None] & same
    return of_clean | of_noisy


def position_ids(valid):
    """Positions (R, S) without the padding in front, where `valid` (R, S) is False."""
    return (valid.cumsum(1) - 1).clamp(min=0)


def additive_mask(sees, valid, dtype):
    """0 where a position sees a valid column or its own, else the lowest number; (R, 1, Q, S).

    sees (Q, S) is about the last Q of S positions; valid (R, S) is False at padding.
    """
    queries, columns = sees.shape
    own = torch.eye(columns, dtype=torch.bool, device=sees.device)[-queries:]
    seen = (sees & valid[:, None]) | own  # (R, Q, S)
    mask = torch.zeros(seen.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def left_pad(prompts):
    """prompt_ids (R, P), which end in the last column, and valid (R, P), False at padding."""
    prompt_ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])  # (R, 1)
    columns = prompt_ids.shape[1]
    return prompt_ids, torch.arange(columns) >= columns - lengths


# ------- the student, with a cache, which is exact as no block sees a later one
@torch.no_grad()
def roll_out(args, model, prompts, noise, end_ids):
    """Answers of the student to R prompts, and the steps at which their tokens were committed.

    noise (R, K, N), on the model's device. Returns answers and steps, (R, N) each, on the host;
    fewer columns if all answers have ended.
    """
    ids, valid = [tensor.to(noise.device) for tensor in left_pad(prompts)]
    ends = torch.tensor(end_ids, device=noise.device)
    cache = DynamicCache()
    row = torch.arange(len(prompts), device=noise.device)
    ended = torch.zeros_like(row, dtype=torch.bool)
    answers = []
    steps = []
    for block_noise in noise.split(args.BLOCK_SIZE, dim=2):
        inputs = cached_inputs(args, model, cache, ids, valid)
        last = torch.full_like(row, ids.shape[1] - 1)
        last_logits = logits_at(model, row, last, **inputs).float()  # and the cache has the ids
        valid = pad(valid, (0, args.BLOCK_SIZE), value=True)
        ids, block_steps = decode_block(args, model, cache, valid, last_logits, block_noise)
        answers.append(ids)
        steps.append(block_steps)
        ended |= torch.isin(ids, ends).any(1)
        if ended.all():
            break
    return torch.cat(answers, dim=1).cpu(), torch.cat(steps, dim=1).cpu()


def decode_block(args, model, cache, valid, last_logits, noise):
    """A block (R, K), and the steps (R, K) at which its tokens were committed.

    valid (R, S) includes the block; last_logits (R, V) are those of the position before it.
    """
    rows, _, size = noise.shape
    block = torch.full((rows, size), args.MASK_ID, device=noise.device)
    steps = torch.zeros_like(block)
    row, column = torch.ones_like(block).nonzero(as_tuple=True)
    past = cache.get_seq_length()
    for step in range(size):
        masked = block == args.MASK_ID  # (R, K)
        if not masked.any():
            break
        logits = logits_at(model, row, column, **cached_inputs(args, model, cache, block, valid))
        cache.crop(past)
        logits = logits.float().view(rows, size, -1)
        if args.LOGIT_SHIFT:
            logits = torch.cat([last_logits[:, None], logits[:, :-1]], dim=1)
        tokens, confidence = sample(args, logits, noise[:, step])
        confidence = confidence.masked_fill(~masked, -1)
        surest = confidence.argmax(1, keepdim=True)
        commit = (confidence > args.THRESHOLD).scatter(1, surest, True) & masked
        block = torch.where(commit, tokens, block)
        steps = steps.masked_fill(commit, step)
    return block, steps


def cached_inputs(args, model, cache, ids, valid):
    """Inputs for `ids` (R, Q), the last of the S positions of which the cache has the others."""
    columns = valid.shape[1]
    block = block_of(args, torch.arange(-columns, 0, device=ids.device))  # ends as a block does
    sees = block <= block[-ids.shape[1] :, None]  # (Q, S)
    return {
        "input_ids": ids,
        "attention_mask": additive_mask(sees, valid, model.get_input_embeddings().weight.dtype),
        "position_ids": position_ids(valid)[:, -ids.shape[1] :],
        "past_key_values": cache,
        "use_cache": True,
    }


def sample(args, logits, noise):
    """Tokens, and their probabilities at temperature 1, (R, K) each.

    logits (R, K, V); noise (R, K).
    """
    logits[..., args.MASK_ID] = -math.inf
    if args.TEMPERATURE == 0:
        confidence, tokens = logits.softmax(-1).max(-1)
        return tokens, confidence
    probability = (logits / args.TEMPERATURE).softmax(-1)
    cumulative = probability.cumsum(-1)
    threshold = noise[..., None] * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)  # (R, K, 1)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[..., 0], logits.softmax(-1).gather(-1, tokens)[..., 0]


# ------- the teacher
@torch.no_grad()
def sample_causally(args, model, prompts, noise, end_ids):
    """Answers (R, N) of an autoregressive model; noise (R, K, N), of which K = 0 is used."""
    ids, valid = [tensor.to(noise.device) for tensor in left_pad(prompts)]
    ends = torch.tensor(end_ids, device=noise.device)
    cache = DynamicCache()
    row = torch.arange(len(ids), device=noise.device)
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=noise.device)
    answers = []
    for place in range(noise.shape[2]):
        inputs = {
            "input_ids": ids,
            "attention_mask": valid.long(),
            "position_ids": position_ids(valid)[:, -ids.shape[1] :],
            "past_key_values": cache,
            "use_cache": True,
        }
        last = torch.full_like(row, ids.shape[1] - 1)
        logits = logits_at(model, row, last, **inputs).float()  # (R, V)
        tokens, _ = sample(args, logits[:, None], noise[:, 0, place : place + 1])  # (R, 1)
        ids = tokens.masked_fill(ended, end_ids[0])
        answers.append(ids)
        ended |= torch.isin(ids, ends)
        if ended.all() and (place + 1) % args.BLOCK_SIZE == 0:
            break
        valid = torch.cat([valid, torch.ones_like(ended)], dim=1)
    return torch.cat(answers, dim=1).cpu()
