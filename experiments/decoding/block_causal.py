"""Block-causal attention, and how such a model, OPDLM's student, and its teacher answer prompts.

A position sees its block and those before. Blocks of K tokens are counted from the answer's start;
the prompt's are counted back from its end.

Shapes: B prompts, R of them still decoded, P prompt tokens, N answer tokens, S columns, Q of them
queried, K tokens of a block, M masked positions, V vocabulary.
"""

import math
from typing import NamedTuple

import suite  # noqa: F401 (the trainers are two folders up)
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

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


# ------- decoding, with a cache, which is exact as no block sees a later one
class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in buffers that are doubled when they are full.

    transformers' own layers copy all columns whenever some are added.
    """

    buffers = ()  # keys and values, (R, heads, at least `length` columns, width) each
    length = 0

    def update(self, key_states, value_states, cache_kwargs=None):
        end = self.length + key_states.shape[2]
        if not self.buffers:
            self.lazy_initialization(key_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        if end > self.buffers[0].shape[2]:
            added = (0, 0, 0, 2 * end - self.length)
            self.buffers = [pad(buffer[:, :, : self.length], added) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = states
        self.length = end
        return [buffer[:, :, :end] for buffer in self.buffers]

    def get_seq_length(self):
        return self.length

    def crop(self, max_length):
        self.length = min(self.length, max_length)

    def batch_select_indices(self, indices):
        self.buffers = [buffer[indices, :, : self.length] for buffer in self.buffers]


class Step(NamedTuple):
    """A denoising step of a block, of the R prompts that are still decoded."""

    rows: torch.Tensor  # (R,) numbers of the prompts
    masked: torch.Tensor  # (R, K) True = masked
    row: torch.Tensor  # (M,) in masked, of each masked position
    column: torch.Tensor  # (M,)
    start: int  # tokens of the answer before the block
    number: int  # of the step in its block: 0, 1, ...


@torch.no_grad()
def decode_blocks(
    model, prompts, length, size, mask_id, end_ids, choose, *, steps, shift=False, callback=None
):
    """Answer prompts of any lengths. An answer that has ended leaves the batch after its block.

    A step computes its block alone; the others are in the cache. The forward pass that would put a
    finished block there is that of the next block's first step.

    Args:
        model: attends as its mask says, and takes a cache.
        prompts: B LongTensors of ids, (P,) each.
        length: tokens per answer, N, in whole blocks.
        size: tokens per block, K.
        choose: takes a Step and the logits (M, V) of its masked positions, in float32; returns
            tokens (M,) and the positions to commit, (R, K) True.
        steps: at most, per block.
        shift: a position is predicted from the one before it.
        callback: called before each forward pass with the numbers of its prompts, a list of R
            ints, and their columns, (R, S) ids, with padding in front.

    Returns:
        answers and the steps at which their tokens were committed, (B, N) each, on the host;
        `mask_id` and 0 after the block in which an answer has ended.
    """
    device = model.get_input_embeddings().weight.device
    ids, valid = [tensor.to(device) for tensor in left_pad(prompts)]
    ends = torch.tensor(end_ids, device=device)
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    rows = torch.arange(len(prompts), device=device)
    answers = torch.full((len(prompts), length), mask_id, device=device)
    step_of = torch.zeros_like(answers)
    for start in range(0, length, size):
        ids = pad(ids, (0, size), value=mask_id)
        valid = pad(valid, (0, size), value=True)
        clean = ids.shape[1] - size  # columns before the block
        for number in range(steps):
            masked = ids[:, clean:] == mask_id  # (R, K)
            row, column = masked.nonzero(as_tuple=True)  # (M,) each; waits for the device
            if len(row) == 0:
                break
            if callback is not None:
                callback(rows.tolist(), ids)
            past = cache.get_seq_length()
            inputs = cached_inputs(model, cache, ids, valid, size)
            pos = clean + column - int(shift) - past
            step = Step(rows, masked, row, column, start, number)
            tokens, commit = choose(step, logits_at(model, row, pos, **inputs).float())
            cache.crop(clean - int(shift))  # the token before the block is needed again
            predicted = ids[:, clean:].masked_scatter(masked, tokens)
            ids[:, clean:] = torch.where(commit, predicted, ids[:, clean:])
            step_of[rows, start : start + size] += number * commit
        answers[rows, start : start + size] = ids[:, clean:]
        going_on = (~torch.isin(ids[:, clean:], ends).any(1)).nonzero()[:, 0]
        if len(going_on) == 0:
            break
        if len(going_on) < len(rows):
            rows, ids, valid = rows[going_on], ids[going_on], valid[going_on]
            cache.batch_select_indices(going_on)
    return answers.cpu(), step_of.cpu()


def of_unfinished(callback, mask_id):
    """A callback for `decode_blocks` that leaves out prompts which wait for the others' block."""

    def call(rows, ids):
        unfinished = (ids == mask_id).any(1)  # (R,)
        own = [row for row, goes_on in zip(rows, unfinished.tolist(), strict=True) if goes_on]
        callback(own, ids[unfinished])

    return call


def cached_inputs(model, cache, ids, valid, size):
    """Inputs for the columns of ids (R, S) that the cache has not; S ends as a block does."""
    past = cache.get_seq_length()
    columns = torch.arange(-ids.shape[1], 0, device=ids.device)
    block = torch.div(columns, size, rounding_mode="floor")  # (S,)
    sees = block <= block[past:, None]  # (Q, S)
    return {
        "input_ids": ids[:, past:],
        "attention_mask": additive_mask(sees, valid, model.get_input_embeddings().weight.dtype),
        "position_ids": position_ids(valid)[:, past:],
        "past_key_values": cache,
        "use_cache": True,
    }


# ------- the student
def roll_out(args, model, prompts, noise, end_ids, callback=None):
    """Answers of the student to R prompts, and the steps at which their tokens were committed.

    noise (R, K, N), on the model's device. See `decode_blocks` for the rest.
    """

    def choose(step, logits):
        places = step.rows[step.row], step.number, step.start + step.column
        tokens, confidence = sample(args, logits, noise[places])
        ranked = torch.full_like(step.masked, -1, dtype=confidence.dtype)
        ranked = ranked.masked_scatter(step.masked, confidence)  # (R, K)
        surest = ranked.argmax(1, keepdim=True)
        return tokens, (ranked > args.THRESHOLD).scatter(1, surest, True) & step.masked

    size = args.BLOCK_SIZE
    how = {"steps": size, "shift": args.LOGIT_SHIFT, "callback": callback}
    return decode_blocks(model, prompts, noise.shape[2], size, args.MASK_ID, end_ids, choose, **how)


def sample(args, logits, noise):
    """Tokens, and their probabilities at temperature 1, (M,) each.

    logits (M, V), noise (M,).
    """
    logits[..., args.MASK_ID] = -math.inf
    if args.TEMPERATURE == 0:
        confidence, tokens = logits.softmax(-1).max(-1)
        return tokens, confidence
    probability = (logits / args.TEMPERATURE).softmax(-1)
    cumulative = probability.cumsum(-1)
    threshold = noise[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)  # (M, 1)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], logits.softmax(-1).gather(-1, tokens)[:, 0]


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
        tokens, _ = sample(args, logits, noise[:, 0, place])  # (R,)
        ids = tokens[:, None].masked_fill(ended, end_ids[0])
        answers.append(ids)
        ended |= torch.isin(ids, ends)
        if ended.all() and (place + 1) % args.BLOCK_SIZE == 0:
            break
        valid = torch.cat([valid, torch.ones_like(ended)], dim=1)
    return torch.cat(answers, dim=1).cpu()
