"""OPDLM: an autoregressive LM becomes a block-diffusion LM by on-policy distillation, with ZeRO-2.

    deepspeed --num_gpus 8 experiments/train_opdlm.py     # or with --THRESHOLD 0.8 --CKPT_DIR t80

The student has the weights of the autoregressive model, but attends in both directions within a
block of BLOCK_SIZE tokens. It decodes answers to the prompts of DATA_PT by its own sampler: block
by block, every token with a probability above THRESHOLD is committed, at least one per step. Each
block is then shown to it again as it was at one of these steps:

    prompt | x0, the answer | x_t, the answer with each block as it was at one of its steps

and learns, at every masked position, the distribution of the teacher, the frozen autoregressive
model, given the prompt and x0 before it: forward KL (Su et al., arXiv 2606.06712, and its code).
The answers of DATA_PT are not used.

Shapes: B rows, P prompt tokens, N answer tokens, S = P + 2N, K = BLOCK_SIZE, V vocabulary,
M masked positions in the loss, R rows of a rollout.
"""

import argparse
import ast
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from contextlib import nullcontext, suppress
from functools import partial
from glob import glob
from importlib.metadata import version
from pathlib import Path

# ------- constants: edit them, or give any for one run as --NAME VALUE (a list as a,b)
# Model and data
MODEL_NAME = "Qwen/Qwen3-0.6B"  # hub id or folder of an autoregressive model
MODEL_REVISION = "main"  # branch, tag or commit
MASK_ID = 151669  # an id that Qwen3 does not use
DATA_PT = "prompts.pt"  # written by pt.py; its answers are not used
MAX_SAMPLES = 61816  # rows of DATA_PT, from its beginning
MAX_LEN = 256  # tokens; rows with longer prompts are left out
SEED = 42

# Rollouts
BLOCK_SIZE = 4  # tokens, counted from the answer's start
GEN_LENGTH = 4000  # tokens of an answer; rounded up to whole blocks
FIRST_GEN_LENGTH = 100  # the same in the first rollout
CURRICULUM = 100  # rollouts until GEN_LENGTH, linearly
THRESHOLD = 0.9  # commit every token with a higher probability, at least one per step
TEMPERATURE = 1.0  # of sampling; 0: the most probable token
UPDATES_PER_ROLLOUT = 16  # optimizer steps; each uses different answers
ROLLOUT_BSIZE = 32  # answers per GPU that are decoded together

# Method
TOP_K = None  # KL from the teacher's TOP_K most probable tokens; None: from all
LOGIT_SHIFT = False  # True: a position is predicted by the one before it, as in the teacher
TRAIN_END = False  # True: the end-of-turn token is in the loss too
FULL_FT = False  # True: train all weights; the teacher is then loaded too

# Training
EPOCHS = 1
MICRO_BSIZE = 1  # rows per GPU and forward pass
GRAD_ACC = 1  # forward passes per optimizer step
TOTAL_TRAIN_STEPS = 7728  # 483 rollouts: with 8 rows per step one pass over the prompts
LR = 1e-5  # peak
WARMUP_RATIO = 0.01  # share of the steps
GRAD_CLIP = 1.0  # gradient norm; 0: off
LORA_RANK = 128
LORA_ALPHA = None  # None: 2 * LORA_RANK
LORA_DROPOUT = 0.0
TARGET_MODS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ACTIVATION_CHECKPOINTING = False  # less memory, about a third more time

# Output
CKPT_DIR = "ckpts_opdlm"  # prefix of the folders that a run writes
SAVE_EVERY = None  # steps between checkpoints; the last step is always saved
STATE_EVERY = 1  # rollouts between states to resume from

CONSTANTS = [name for name in globals() if name.isupper()]
ABLATION = []  # recorded by themselves
LIMITS = [  # names, allowed types, lowest and highest value
    ("MODEL_NAME MODEL_REVISION DATA_PT CKPT_DIR", [str], None, None),
    ("TARGET_MODS", [list], None, None),
    ("SEED MASK_ID", [int], 0, 2**32 - 1),
    ("MAX_SAMPLES MAX_LEN EPOCHS MICRO_BSIZE GRAD_ACC LORA_RANK", [int], 1, 10**6),
    ("BLOCK_SIZE GEN_LENGTH FIRST_GEN_LENGTH CURRICULUM", [int], 1, 10**6),
    ("UPDATES_PER_ROLLOUT ROLLOUT_BSIZE", [int], 1, 10**6),
    ("TOTAL_TRAIN_STEPS SAVE_EVERY STATE_EVERY TOP_K", [int, type(None)], 1, 10**6),
    ("LR WARMUP_RATIO LORA_DROPOUT THRESHOLD", [int, float], 0, 1),
    ("GRAD_CLIP TEMPERATURE", [int, float], 0, 10**6),
    ("LORA_ALPHA", [int, float, type(None)], 0, 10**6),
    ("LOGIT_SHIFT TRAIN_END FULL_FT ACTIVATION_CHECKPOINTING", [bool], False, True),
]


def read_overrides(argv):
    """Set the constants given as --NAME VALUE; returns a message for every unknown flag."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the launcher
    for name in CONSTANTS:
        default = str(globals()[name]).replace("%", "%%")
        parser.add_argument(f"--{name}", nargs="?", const="", help=f"now {default}")
    given, unknown = parser.parse_known_args(argv)
    for name in [name for name in CONSTANTS if getattr(given, name) is not None]:
        value = getattr(given, name)
        kind = type(globals()[name])
        if kind is list:
            value = value.split(",")
        if kind not in (list, str):
            with suppress(ValueError, SyntaxError):  # check_constants refuses what stays text
                value = ast.literal_eval(value)
        globals()[name] = value
    flags = [word for word in unknown if word.startswith("--")]  # without their values
    return [f"{flag}: no constant of this script; see --help" for flag in flags or unknown]


def check_constants():
    """A message for every constant that is out of range, whether edited or given as a flag."""
    problems = []
    for names, types, lowest, highest in LIMITS:
        allowed = " or ".join(kind.__name__ for kind in types).replace("NoneType", "None")
        limits = "not empty" if lowest is None else f"{lowest} to {highest}"
        for name in names.split():
            value = globals()[name]
            fits = type(value) in types and value not in ("", [])
            if fits and lowest is not None and value is not None:
                fits = lowest <= value <= highest
            if not fits:
                problems.append(f"{name} = {value!r}: must be {allowed}, {limits}")
    if set(str(CKPT_DIR)) & set("*?["):
        problems.append(f"{CKPT_DIR = }: must not contain * ? or [")
    return problems


if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    PROBLEMS = read_overrides(sys.argv[1:]) + check_constants()
    if PROBLEMS and os.environ.get("LOCAL_RANK", "0") == "0":  # the launcher ends the other ranks
        sys.exit("\n".join(PROBLEMS))

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    logging,
)


# ------- data: what is drawn when is a function of the constants alone
def load_examples():
    """The first MAX_SAMPLES rows of DATA_PT as [(prompt_len, ids)], ids cut to MAX_LEN."""
    examples = []
    for number, row in enumerate(torch.load(DATA_PT, weights_only=True)[:MAX_SAMPLES]):
        prompt_len, ids = row["prompt_len"], row["full_ids"]
        if not torch.is_tensor(ids) or ids.dtype != torch.long or ids.dim() != 1 or ids.lt(0).any():
            raise ValueError(f"row {number} has full_ids {ids!r:.60}, not a LongTensor of ids")
        if type(prompt_len) is not int or not 0 < prompt_len <= len(ids):
            raise ValueError(f"row {number} has prompt_len {prompt_len!r} of {len(ids)} ids")
        examples.append((prompt_len, ids[:MAX_LEN]))
    return examples


def schedule(examples, max_draws):
    """The draws of the whole run in order, (sample, 0) each; (max_draws, 2).

    Each pass draws every sample that has an answer once. Its only block, 0, is the whole answer.
    """
    rng = np.random.default_rng((SEED, 0, 1))  # not the stream of any draw
    answered = [n for n, (prompt_len, ids) in enumerate(examples) if prompt_len < len(ids)]
    samples = rng.permutation(answered)
    while 0 < len(samples) < max_draws:
        samples = np.concatenate([samples, rng.permutation(answered)])
    samples = samples[:max_draws]
    return np.stack([samples, np.zeros_like(samples)], axis=1)


def plan(examples, world_size):
    """The draws of the run (N, 2), and their numbers (steps, GRAD_ACC, world_size, MICRO_BSIZE).

    Differs from the published script (T1, T3): every rank takes every step, on any number of GPUs.
    """
    global_batch = MICRO_BSIZE * GRAD_ACC * world_size
    max_steps = TOTAL_TRAIN_STEPS or MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC)
    draws = schedule(examples, max_steps * global_batch)
    steps = len(draws) // global_batch  # fewer than max_steps if the blocks run out
    shape = (steps, GRAD_ACC, world_size, MICRO_BSIZE)
    return draws, np.arange(math.prod(shape)).reshape(shape)


def rollout_length(rollout):
    """Tokens of an answer, whole blocks: from FIRST_GEN_LENGTH to GEN_LENGTH."""
    progress = min(1.0, rollout / CURRICULUM)
    length = FIRST_GEN_LENGTH + progress * (GEN_LENGTH - FIRST_GEN_LENGTH)
    return BLOCK_SIZE * math.ceil(min(length, GEN_LENGTH) / BLOCK_SIZE)


def draw_noise(numbers, length):
    """U(0, 1) of the draws with these numbers: for tokens (B, K, N), and for blocks (B, N / K).

    The noise of a draw depends on SEED, its number and `length`, whatever rank it falls to.
    """
    token_noise = []
    block_noise = []
    for number in numbers:
        rng = np.random.default_rng((SEED, number))
        token_noise.append(rng.random((BLOCK_SIZE, length), np.float32))
        block_noise.append(rng.random(length // BLOCK_SIZE, np.float32))
    return torch.from_numpy(np.stack(token_noise)), torch.from_numpy(np.stack(block_noise))


def left_pad(prompts):
    """prompt_ids (B, P), which end in the last column, and valid (B, P), False at padding."""
    prompt_ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])  # (B, 1)
    columns = prompt_ids.shape[1]
    return prompt_ids, torch.arange(columns) >= columns - lengths


# ------- attention: a position sees its block and those before, counted from the answer's start
def block_of(pos):
    """The block of positions counted from the answer's start; the prompt's are negative."""
    return torch.div(pos, BLOCK_SIZE, rounding_mode="floor")


def training_sees(prompt_columns, answer_columns, device="cpu"):
    """Where positions of [prompt | x0 | x_t] attend to each other; (S, S), True = row sees column.

    A block of x_t sees the prompt, the blocks of x0 before it, and itself.
    """
    clean = block_of(torch.arange(-prompt_columns, answer_columns, device=device))  # (P + N,)
    block = torch.cat([clean, clean[prompt_columns:]])  # (S,)
    noisy = torch.arange(len(block), device=device) >= len(clean)  # (S,) True in x_t
    earlier = block < block[:, None]  # (S, S)
    same = block == block[:, None]
    of_clean = ~noisy & (earlier | (same & ~noisy[:, None]))
    of_noisy = noisy & noisy[:, None] & same
    return of_clean | of_noisy


def position_ids(valid):
    """Positions (B, S) without the padding in front, where `valid` (B, S) is False."""
    return (valid.cumsum(1) - 1).clamp(min=0)


def additive_mask(sees, valid, dtype):
    """0 where a position sees a valid column or its own, else the lowest number; (B, 1, Q, S).

    sees (Q, S) is about the last Q of S positions; valid (B, S) is False at padding.
    """
    queries, columns = sees.shape
    own = torch.eye(columns, dtype=torch.bool, device=sees.device)[-queries:]
    seen = (sees & valid[:, None]) | own  # (B, Q, S)
    mask = torch.zeros(seen.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def logits_at(model, row, column, **inputs):
    """Logits (M, V) of the positions (row, column), (M,) each; the head runs at these alone."""

    def select(_, hidden):
        return (hidden[0][row, column],)  # (B, Q, D) -> (M, D)

    with model.get_output_embeddings().register_forward_pre_hook(select):
        return model(**inputs).logits


# ------- rollouts: the student decodes with a cache, which is exact as no block sees a later one
def cached_inputs(model, cache, ids, valid):
    """Inputs for `ids` (R, Q), the last of the S positions of which the cache has the others."""
    columns = valid.shape[1]
    block = block_of(torch.arange(-columns, 0, device=ids.device))  # the end is a block's end
    sees = block <= block[-ids.shape[1] :, None]  # (Q, S)
    return {
        "input_ids": ids,
        "attention_mask": additive_mask(sees, valid, model.get_input_embeddings().weight.dtype),
        "position_ids": position_ids(valid)[:, -ids.shape[1] :],
        "past_key_values": cache,
        "use_cache": True,
    }


def sample(logits, noise):
    """Tokens and their probabilities, (R, K) each, from logits (R, K, V) and noise (R, K)."""
    logits[..., MASK_ID] = -math.inf
    if TEMPERATURE == 0:
        confidence, tokens = logits.softmax(-1).max(-1)
        return tokens, confidence
    probability = (logits / TEMPERATURE).softmax(-1)
    cumulative = probability.cumsum(-1)
    threshold = noise[..., None] * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)  # (R, K, 1)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[..., 0], probability.gather(-1, tokens)[..., 0]


def decode_block(model, cache, valid, last_logits, noise):
    """A block (R, K), and the steps (R, K) at which its tokens were committed.

    valid (R, S) includes the block; last_logits (R, V) are those of the position before it.
    """
    rows, _, size = noise.shape
    block = torch.full((rows, size), MASK_ID, device=noise.device)
    steps = torch.zeros_like(block)
    row, column = torch.ones_like(block).nonzero(as_tuple=True)
    past = cache.get_seq_length()
    for number in range(size):
        masked = block == MASK_ID  # (R, K)
        if not masked.any():
            break
        logits = logits_at(model, row, column, **cached_inputs(model, cache, block, valid))
        cache.crop(past)
        logits = logits.float().view(rows, size, -1)
        if LOGIT_SHIFT:
            logits = torch.cat([last_logits[:, None], logits[:, :-1]], dim=1)
        tokens, confidence = sample(logits, noise[:, number])
        confidence = confidence.masked_fill(~masked, -1)
        surest = confidence.argmax(1, keepdim=True)
        commit = (confidence > THRESHOLD).scatter(1, surest, True) & masked
        block = torch.where(commit, tokens, block)
        steps = steps.masked_fill(commit, number)
    return block, steps


@torch.no_grad()
def roll_out(model, prompts, noise, eos_id):
    """Answers of the student to R prompts, and the steps at which their tokens were committed.

    noise (R, K, N), on the model's device. Returns answers and steps, (R, N) each, on the host;
    fewer columns if all answers have ended.
    """
    prompt_ids, valid = [tensor.to(noise.device) for tensor in left_pad(prompts)]
    cache = DynamicCache()
    row = torch.arange(len(prompts), device=noise.device)
    ids = prompt_ids
    ended = torch.zeros_like(row, dtype=torch.bool)
    answers = []
    steps = []
    for block_noise in noise.split(BLOCK_SIZE, dim=2):
        inputs = cached_inputs(model, cache, ids, valid)
        last = torch.full_like(row, ids.shape[1] - 1)
        last_logits = logits_at(model, row, last, **inputs).float()  # and the cache has the ids
        valid = pad(valid, (0, BLOCK_SIZE), value=True)
        ids, block_steps = decode_block(model, cache, valid, last_logits, block_noise)
        answers.append(ids)
        steps.append(block_steps)
        ended |= (ids == eos_id).any(1)
        if ended.all():
            break
    return torch.cat(answers, dim=1).cpu(), torch.cat(steps, dim=1).cpu()


def decode_answers(model, eos_id, examples, draws, numbers, rollout):
    """{number: (answer, steps, answer_len, block_noise)} of the draws with these numbers.

    answer and steps (N,) in whole blocks; answer_len, the tokens in the loss, is without what
    follows the end-of-turn token, and without this token unless TRAIN_END.
    """
    answers = {}
    model.eval()
    device = model.get_input_embeddings().weight.device
    batches = range(0, len(numbers), ROLLOUT_BSIZE)
    for start in tqdm(batches, desc="rollout", leave=False, disable=dist.get_rank() != 0):
        batch = numbers[start : start + ROLLOUT_BSIZE]
        prompts = prompts_of(examples, draws, batch)
        token_noise, block_noise = draw_noise(batch, rollout_length(rollout))
        tokens, steps = roll_out(model, prompts, token_noise.to(device), eos_id)
        for number, *row, noise in zip(batch, tokens, steps, block_noise, strict=True):
            ends = (row[0] == eos_id).nonzero()
            last = int(ends[0]) if len(ends) else len(row[0]) - 1
            answer_len = last + (TRAIN_END or not len(ends))
            blocks = last // BLOCK_SIZE + 1
            answer, answer_steps = [tensor[: blocks * BLOCK_SIZE] for tensor in row]
            answers[number] = answer, answer_steps, answer_len, noise[:blocks]
    model.train()
    return answers


def prompts_of(examples, draws, numbers):
    prompts = []
    for sample_number in draws[numbers, 0]:
        prompt_len, ids = examples[sample_number]
        prompts.append(ids[:prompt_len])
    return prompts


# ------- corruption and loss
def corrupt(answers, steps, answer_len, noise):
    """Show each block of the answers as it was at one of the steps in which it was decoded.

    answers and steps (B, N); answer_len (B, 1); noise (B, N / K) ~ U(0, 1) gives the step. Returns
    noisy_ids (B, N), and loss_mask (B, N), True where a token is masked and in the loss.
    """
    blocks = steps.unflatten(1, (-1, BLOCK_SIZE))  # (B, N / K, K)
    taken = blocks.amax(2) + 1  # (B, N / K) steps
    step = (noise * taken).long()
    masked = (blocks >= step[..., None]).flatten(1)  # (B, N) True = shown as [MASK]
    in_answer = torch.arange(answers.shape[1]) < answer_len
    return answers.masked_fill(masked, MASK_ID), masked & in_answer


def kl_divergence(teacher_logits, student_logits):
    """KL(teacher || student) of each row of logits (M, V), in float32; (M,).

    With TOP_K, the teacher's distribution is that of its TOP_K most probable tokens, renormalised;
    the student's is not.
    """
    target = teacher_logits.float().log_softmax(-1)
    log_p = student_logits.float().log_softmax(-1)
    if TOP_K is not None:
        target, ids = target.topk(TOP_K)
        target = target.log_softmax(-1)
        log_p = log_p.gather(-1, ids)
    return (target.exp() * (target - log_p)).sum(-1)


def teacher_logits(model, teacher, prompts, answers, loss_mask):
    """The teacher's logits (M, V) for the positions in the loss, given the tokens before each.

    teacher: the frozen model; None: `model` without its adapter.
    """
    embedding = model.get_input_embeddings().weight
    prompt_ids, valid = left_pad(prompts)
    input_ids = torch.cat([prompt_ids, answers], dim=1).to(embedding.device)  # (B, P + N)
    valid = pad(valid, (0, answers.shape[1]), value=True).to(embedding.device)
    length = input_ids.shape[1]
    causal = torch.ones(length, length, device=embedding.device).tril().bool()  # (P + N, P + N)
    row, pos = [index.to(embedding.device) for index in loss_mask.nonzero(as_tuple=True)]
    inputs = {
        "input_ids": input_ids,
        "attention_mask": additive_mask(causal, valid, embedding.dtype),
        "position_ids": position_ids(valid),
        "use_cache": False,
    }
    before = prompt_ids.shape[1] + pos - 1  # the column of the token before
    with torch.no_grad(), nullcontext() if teacher else model.disable_adapter():
        return logits_at(teacher or model, row, before, **inputs)


def student_logits(model, prompts, answers, noisy_ids, loss_mask):
    """The student's logits (M, V) for the positions in the loss, all blocks in one pass."""
    embedding = model.get_input_embeddings().weight
    prompt_ids, valid = left_pad(prompts)
    columns = prompt_ids.shape[1]
    length = answers.shape[1]
    sees = training_sees(columns, length, embedding.device)
    valid = pad(valid, (0, length), value=True).to(embedding.device)
    positions = position_ids(valid)  # (B, P + N)
    input_ids = torch.cat([prompt_ids, answers, noisy_ids], dim=1)  # (B, S)
    twice = torch.cat([valid, valid[:, columns:]], dim=1)
    inputs = {
        "input_ids": input_ids.to(embedding.device),
        "attention_mask": additive_mask(sees, twice, embedding.dtype),
        "position_ids": torch.cat([positions, positions[:, columns:]], dim=1),
        "use_cache": False,
    }
    row, pos = [index.to(embedding.device) for index in loss_mask.nonzero(as_tuple=True)]
    column = columns + length + pos  # (M,)
    if LOGIT_SHIFT:  # before a block is the token before, of the prompt or of x0
        column = torch.where(pos % BLOCK_SIZE == 0, columns + pos - 1, column - 1)
    return logits_at(model, row, column, **inputs)


def mean_over_rows(values, loss_mask):
    """Mean over rows of the mean of a row's values (M,), 0 for a row without any; ()."""
    count = loss_mask.sum(1)  # (B,)
    count = count.repeat_interleave(count).to(values.device)  # (M,) positions in the same row
    return (values / count).sum() / len(loss_mask)


def distillation_loss(model, teacher, prompts, answers, noisy_ids, loss_mask):
    """Mean over rows of the mean KL(teacher || student) at a row's positions in the loss; ()."""
    target = teacher_logits(model, teacher, prompts, answers, loss_mask)  # (M, V)
    logits = student_logits(model, prompts, answers, noisy_ids, loss_mask)  # (M, V)
    kl = []
    for pieces in zip(target.split(256), logits.split(256), strict=True):
        kl.append(checkpoint(kl_divergence, *pieces, use_reentrant=False))  # keeps no softmax
    return mean_over_rows(torch.cat(kl), loss_mask)


# ------- model
def compute_dtype():
    """bfloat16, or float32 on a CPU without bf16 arithmetic."""
    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if on_cpu and not has_bf16 else torch.bfloat16


def load_pretrained(auto_class, **options):
    options |= {"revision": MODEL_REVISION, "trust_remote_code": True}
    return auto_class.from_pretrained(MODEL_NAME, **options)


def lora_targets(model):
    """The linear layers whose names end in one of TARGET_MODS, never the LM head (T12)."""
    head = model.get_output_embeddings()
    endings = tuple(f".{target}" for target in TARGET_MODS)
    linear = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]
    return [name for name in linear if f".{name}".endswith(endings)]


def build_model(device):
    """The student, loaded straight to `device`, with the same new adapter on every rank."""
    options = {"dtype": compute_dtype(), "device_map": {"": device}, "output_loading_info": True}
    model, info = load_pretrained(AutoModelForCausalLM, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would only warn
        sys.exit(f"{MODEL_NAME = }: {len(missing)} weights are missing, such as {missing[0]}")
    model.config.update({"mask_token_id": MASK_ID, "block_causal": BLOCK_SIZE})  # for decode.py
    model.config.update({"logit_shift": LOGIT_SHIFT})
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in lists[0] if lists and ACTIVATION_CHECKPOINTING else []:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if FULL_FT:
        return model.train()
    torch.manual_seed(SEED)
    lora = LoraConfig(r=LORA_RANK, lora_dropout=LORA_DROPOUT, revision=MODEL_REVISION)
    lora.lora_alpha = 2 * LORA_RANK if LORA_ALPHA is None else LORA_ALPHA
    lora.target_modules = lora_targets(model)
    return get_peft_model(model, lora).train()


def build_teacher(device):
    """The frozen model if all weights are trained; None: the student without its adapter."""
    if not FULL_FT:
        return None
    options = {"dtype": compute_dtype(), "device_map": {"": device}}
    return load_pretrained(AutoModelForCausalLM, **options).eval().requires_grad_(False)


def ds_config(steps):
    """DeepSpeed's configuration: ZeRO-2, AdamW, logarithmic warm-up, then a cosine (T13)."""
    adamw = {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
    adamw["torch_adam"] = True  # DeepSpeed's own would be compiled first
    warmup_steps = max(1, int(WARMUP_RATIO * steps))  # DeepSpeed refuses 0 (T14)
    cosine = {"total_num_steps": steps, "warmup_num_steps": warmup_steps, "cos_min_ratio": 0.01}
    zero = {"stage": 2, "overlap_comm": True, "reduce_scatter": True, "contiguous_gradients": True}
    buckets = {"allgather_bucket_size": int(2e8), "reduce_bucket_size": int(2e8)}
    return {
        "train_micro_batch_size_per_gpu": MICRO_BSIZE,
        "gradient_accumulation_steps": GRAD_ACC,
        "gradient_clipping": GRAD_CLIP,
        "bf16": {"enabled": compute_dtype() == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {"type": "WarmupCosineLR", "params": cosine},
        "zero_optimization": zero | buckets,
    }


# ------- saving: {CKPT_DIR}_logs/state/ exists, locked, while a run is unfinished
@torch.no_grad()
def save_merged(model, tokenizer, folder):
    """Write the base model with W + alpha / r * B @ A, added in float32, for every adapted W."""
    base = model if FULL_FT else model.get_base_model()
    weights = {}
    for name, weight in base.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = weight.bfloat16()
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_A"):
            w = layer.base_layer.weight.float()
            a = layer.lora_A["default"].weight.float()
            b = layer.lora_B["default"].weight.float()
            weights[f"{name}.weight"] = (w + layer.scaling["default"] * b @ a).bfloat16().cpu()
    base.save_pretrained(folder, state_dict=weights)
    base.config.dtype = torch.bfloat16  # not that of the computation
    base.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(model, tokenizer, path, state):
    """Rank 0 writes the merged model to `path`, which appears when it is complete; others wait."""
    if dist.get_rank() == 0 and not os.path.exists(path):  # or a killed run saved it
        shutil.rmtree(state / "checkpoint", ignore_errors=True)  # what a kill left
        try:
            save_merged(model, tokenizer, state / "checkpoint")
            os.sync()
            os.rename(state / "checkpoint", path)
        finally:
            shutil.rmtree(state / "checkpoint", ignore_errors=True)
    dist.barrier()


def save_state(engine, state, step):
    """Save adapter, optimizer and schedule after `step`; then remove the state before it."""
    tag = f"step{step:04d}"
    try:
        engine.save_checkpoint(state, tag, save_latest=False, exclude_frozen_parameters=True)
    except RuntimeError as error:  # torch's, if the disk is full
        shutil.rmtree(state / tag, ignore_errors=True)
        raise OSError(f"{state / tag} cannot be saved: {error!s:.200}") from error
    dist.barrier()  # DeepSpeed would write `latest` before this
    if dist.get_rank() == 0:
        os.sync()
        write_json(state / "latest.json", tag)
        for other in state.glob("step*"):
            if other.name != tag:
                shutil.rmtree(other)


def load_state(engine, state):
    """Restore the last saved state; returns the step it was saved after, or 0 if there is none."""
    if not (state / "latest.json").exists():
        return 0
    tag = json.loads((state / "latest.json").read_text())
    try:
        if len(list((state / tag).glob("*_states.pt"))) != 1 + dist.get_world_size():
            raise FileNotFoundError("a file is missing")  # DeepSpeed would not notice
        engine.load_checkpoint(state, tag, load_module_strict=False)  # has no frozen weights
    except Exception as error:  # damaged files fail in many ways
        sys.exit(f"{state / tag} is damaged ({error!r:.200}); delete {state} to begin a new run")
    return int(tag.removeprefix("step"))


def write_json(path, content):
    """Write a file that has its old content or the new one, whenever the process is killed."""
    path.with_suffix(".partial").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(path.with_suffix(".partial"), path)


def open_log(path, step):
    """train_loss.csv, cut back to the first `step` steps."""
    if step == 0:
        path.write_text("step,loss\n")
    lines = path.read_text().splitlines(keepends=True)
    os.truncate(path, len("".join(lines[: 1 + step])))
    return open(path, "a", buffering=1)  # written line by line


def claim_run(run):
    """Lock the unfinished run, which must be the same `run`, or a new one; returns its suffix."""
    for suffix in ["", *(f"-v{number}" for number in range(2, 10**4))]:
        logs = Path(f"{CKPT_DIR}_logs{suffix}")
        taken = logs.exists() or glob(f"{CKPT_DIR}_step*[0-9]{suffix}")
        if (logs / "state").exists() or not taken:
            break
    (logs / "state").mkdir(parents=True, exist_ok=True)
    lock = os.open(logs / "state" / "lock", os.O_RDWR | os.O_CREAT)  # open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{logs} is in use by another process; wait, or set another CKPT_DIR")
    record = logs / "run_config.json"
    if not record.exists():
        if ABLATION:
            write_json(logs / "ablation_config.json", {name: run[name] for name in ABLATION})
        write_json(logs / "ds_zero2.json", ds_config(run["budget"]["steps"]))
        write_json(record, run)
    old = json.loads(record.read_text())
    differ = [key for key in old | run if old.get(key) != run.get(key) and key != "budget"]
    if differ:
        changes = ", ".join(f"{key} was {old.get(key)!r}, now {run.get(key)!r}" for key in differ)
        remedy = f"change this back, set another CKPT_DIR, or delete {logs}/state to start again"
        sys.exit(f"{logs} is an unfinished run with other settings: {changes}; {remedy}")
    return suffix


# ------- checks before training: all problems are reported together
def preflight(world_size):
    """Messages on everything that is wrong with data, model and disk; loads no weights."""
    problems = []
    try:
        examples = load_examples()
    except Exception as error:  # missing, damaged, or not a list of such rows
        problems.append(f"{DATA_PT = } is not what pt.py writes ({error!r:.200}); run pt.py")
    try:
        config = load_pretrained(AutoConfig)
        tokenizer = load_pretrained(AutoTokenizer, fix_mistral_regex=False)
        code = {"code_revision": MODEL_REVISION} if hasattr(config, "auto_map") else {}
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, **code)
    except Exception as error:  # the hub, a folder and remote code fail in many ways
        problems.append(f"{MODEL_NAME = } cannot be loaded ({error!r:.300}); give another")
    if not problems:
        problems = check_examples(examples, world_size, model, tokenizer) + check_model(model)
    return problems


def check_model(model):
    problems = []
    vocabulary = model.get_input_embeddings().num_embeddings
    mask_id = getattr(model.config, "mask_token_id", None)
    if mask_id not in (None, MASK_ID) or vocabulary <= MASK_ID:
        own = f"{MODEL_NAME} has {vocabulary} ids, its mask token is {mask_id or 'unknown'}"
        problems.append(f"{MASK_ID = }: {own}")
    if not (targets := lora_targets(model)):
        problems.append(f"{TARGET_MODS = }: no linear layer of {MODEL_NAME} has such a name")
    for target in TARGET_MODS:
        count = sum(f".{name}".endswith(f".{target}") for name in targets)
        print(f"LoRA on {count} layers {target}")
    if not deepspeed.get_accelerator().is_bf16_supported():
        problems.append("this GPU has no bf16; Ampere and later ones have it")
    folder = Path(CKPT_DIR).absolute()
    while not folder.exists():
        folder = folder.parent
    needed = 2 * model.num_parameters()  # bytes of a checkpoint
    if shutil.disk_usage(folder).free < needed:
        problems.append(f"{CKPT_DIR = }: a checkpoint takes {needed / 1e9:.1f} GB; free some space")
    return problems


def check_examples(examples, world_size, model, tokenizer):
    samples = sum(prompt_len < len(ids) for prompt_len, ids in examples)
    if samples < MICRO_BSIZE or len(plan(examples, world_size)[1]) == 0:
        step = f"{MICRO_BSIZE = } x {GRAD_ACC = } x {world_size} ranks"
        rows = f"{MAX_SAMPLES = } of {DATA_PT = } give {samples} rows with an answer"
        return [f"{rows}, too few for a step of {step}; use more rows, or lower these"]
    remedy = f"write it with pt.py --model {MODEL_NAME}"
    vocabulary = model.get_input_embeddings().num_embeddings
    if any(ids.max() >= vocabulary or MASK_ID in ids for _, ids in examples):
        return [f"{DATA_PT = } has {MASK_ID = } or ids beyond the model's {vocabulary}; {remedy}"]
    for _, ids in examples[:32]:  # another tokenizer brings back none of them
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tokenizer.encode(text, add_special_tokens=False) == ids.tolist():
            return []
    return [f"{DATA_PT = } was made with another tokenizer; {remedy}"]


# ------- main
def init_distributed():
    """Join the other ranks, or be the only one if no launcher has set the environment (T25)."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about DeepSpeed's calls
    deepspeed.utils.logger.setLevel("ERROR")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # gloo will do
    deepspeed.init_distributed(timeout=12 * deepspeed.constants.default_pg_timeout)  # 2 hours
    deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if "OMP_NUM_THREADS" not in os.environ:  # the ranks of this machine share its cores
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local_ranks)))
    if dist.get_rank() > 0:
        logging.disable_progress_bar()


def end_of_turn(tokenizer):
    if tokenizer.eos_token_id is None:
        sys.exit(f"{MODEL_NAME = }: its tokenizer has no end-of-turn token; add one")
    return tokenizer.eos_token_id


def describe_run(examples, draws, numbers):
    """Everything that decides the result, and what the run amounts to, for run_config.json."""
    samples = sum(prompt_len < len(ids) for prompt_len, ids in examples)
    return {
        "script": os.path.basename(__file__),
        **{name: globals()[name] for name in CONSTANTS},
        "dtype": str(compute_dtype()),
        "world_size": numbers.shape[2],
        "data_sha256": hashlib.sha256(Path(DATA_PT).read_bytes()).hexdigest(),
        "model_commit": getattr(load_pretrained(AutoConfig), "_commit_hash", None),
        "versions": {x: version(x) for x in "torch deepspeed transformers peft numpy".split()},
        "budget": {
            "prompts": samples,
            "prompts_left_out": len(examples) - samples,  # too long, or without an answer
            "steps": len(numbers),
            "rollouts": math.ceil(len(numbers) / UPDATES_PER_ROLLOUT),
            "global_batch": numbers[0].size,
            "answers": numbers.size,
            "passes": round(numbers.size / samples, 2),
        },
    }


def log_rollout(path, rollout, answers, eos_id, device):
    """Add a line on this rollout's answers, those of all ranks, to rollouts.csv."""
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    for answer, steps, answer_len, _ in answers.values():
        taken = steps.unflatten(0, (-1, BLOCK_SIZE)).amax(1) + 1  # per block
        ended = eos_id in answer
        sums += sums.new_tensor([1, answer_len, len(answer) / int(taken.sum()), ended])
    dist.all_reduce(sums)
    if dist.get_rank() > 0:
        return
    count, tokens, rates, ended = sums.tolist()
    header = "rollout,answers,tokens,tokens_per_step,ended\n"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else [header]
    line = f"{rollout},{count:.0f},{tokens:.0f},{rates / count:.3f},{ended / count:.3f}\n"
    partial = path.with_suffix(".partial")
    partial.write_text("".join([*lines[: 1 + rollout], line]))
    os.replace(partial, path)


def train_step(engine, teacher, examples, draws, micro_batches, answers):
    """One optimizer step; returns the loss, averaged over micro-batches and ranks."""
    loss_sum = torch.zeros((), device=engine.device)
    for numbers in micro_batches:
        stream = np.random.default_rng((SEED, numbers[0], 2))  # not that of a draw's noise
        torch.manual_seed(int(stream.integers(2**63)))  # dropout
        rows, steps, answer_len, noise = zip(*[answers[number] for number in numbers], strict=True)
        rows, steps, noise = [pad_sequence(part, batch_first=True) for part in (rows, steps, noise)]
        noisy_ids, loss_mask = corrupt(rows, steps, torch.tensor(answer_len)[:, None], noise)
        prompts = prompts_of(examples, draws, numbers)
        loss = distillation_loss(engine, teacher, prompts, rows, noisy_ids, loss_mask)
        engine.backward(loss)
        engine.step()  # updates the weights after the last micro-batch
        loss_sum += loss.detach()
    dist.all_reduce(loss_sum)
    loss = loss_sum.item() / (len(micro_batches) * dist.get_world_size())
    if not math.isfinite(loss) or not engine.was_step_applied():
        rows = draws[micro_batches.flatten(), 0].tolist()
        sys.exit(f"loss {loss} or gradient not finite on rows {rows} of {DATA_PT}; lower LR")
    return loss


def main():
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the others wait in init_distributed
        problems = preflight(world_size)
        if problems:
            sys.exit("\n".join(problems))
    init_distributed()
    rank = dist.get_rank()

    # Plan the run, and find its folders
    examples = load_examples()
    draws, numbers = plan(examples, world_size)
    steps = len(numbers)
    suffix = [None]
    if rank == 0:
        run = describe_run(examples, draws, numbers)
        suffix = [claim_run(run)]
        for name, number in run["budget"].items():
            print(f"{name:22} {number:,}")
    dist.broadcast_object_list(suffix)
    logs = Path(f"{CKPT_DIR}_logs{suffix[0]}")
    state = logs / "state"

    # Build the models, and restore the saved state if there is one
    tokenizer = load_pretrained(AutoTokenizer, fix_mistral_regex=False)
    eos_id = end_of_turn(tokenizer)
    model = build_model(deepspeed.get_accelerator().current_device_name())
    teacher = build_teacher(model.device)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=params, config=ds_config(steps))
    done = load_state(engine, state)  # whole rollouts
    if rank == 0:
        print(f"trained weights: {sum(parameter.numel() for parameter in params):,}")
        print(f"{logs}: resumes after step {done}" if done else f"{logs}: new run")
        log = open_log(logs / "train_loss.csv", done)

    # Decode and train in turn
    bar = tqdm(initial=done, total=steps, unit=" steps", disable=rank != 0)
    for first in range(done, steps, UPDATES_PER_ROLLOUT):
        rollout = first // UPDATES_PER_ROLLOUT
        updates = numbers[first : first + UPDATES_PER_ROLLOUT, :, rank]  # (U, GRAD_ACC, MICRO)
        answers = decode_answers(model, eos_id, examples, draws, updates.flatten(), rollout)
        log_rollout(logs / "rollouts.csv", rollout, answers, eos_id, engine.device)
        for step, micro_batches in enumerate(updates, start=first + 1):
            loss = train_step(engine, teacher, examples, draws, micro_batches, answers)
            if rank == 0:
                log.write(f"{step},{loss:.6f}\n")
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", rollout=rollout)
            if step == steps or (SAVE_EVERY and step % SAVE_EVERY == 0):
                path = f"{CKPT_DIR}_step{step:04d}{suffix[0]}"
                save_checkpoint(model, tokenizer, path, state)
        if STATE_EVERY and (rollout + 1) % STATE_EVERY == 0 and step < steps:
            save_state(engine, state, step)

    if rank == 0:
        os.rename(state, logs / "finished")  # in one go
        shutil.rmtree(logs / "finished")
        print(f"wrote {path} and {logs}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        lower = "lower MICRO_BSIZE, ROLLOUT_BSIZE or GEN_LENGTH"
        sys.exit(f"out of memory; set ACTIVATION_CHECKPOINTING, or {lower}")
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"stopped: {type(error).__name__} {error}; repeat the command to resume")
