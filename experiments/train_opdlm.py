"""OPDLM: an autoregressive LM becomes a block-diffusion LM by on-policy distillation, with ZeRO-2.

    deepspeed --num_gpus 8 experiments/train_opdlm.py     # or with --THRESHOLD 0.8 --CKPT_DIR t80

The student has the weights of the autoregressive model, but attends in both directions within a
block of BLOCK_SIZE tokens. It decodes answers to the prompts of DATA_PT by its own sampler: block
by block, every token with a probability above THRESHOLD is committed, at least one per step. Each
block is then shown to it again as it was at one of these steps:

    prompt | x0, the answer | x_t, the answer with each block as it was at one of its steps

and learns, at every masked position, the distribution of the teacher, the frozen autoregressive
model, given the prompt and x0 before it: forward KL (Su et al., arXiv 2606.06712, and its code).
ANSWERS, STATES and LOSS are the controls. What is not here is train_fullseq.py's;
experiments/docs/opdlm.md has what differs from the published code.

Shapes: B rows, P prompt tokens, N answer tokens, S = P + 2N, K = BLOCK_SIZE, V vocabulary,
M masked positions in the loss, R rows of a rollout.
"""

import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import decode
import numpy as np
import suite  # noqa: F401 (the trainers are one folder up)
import torch
import torch.distributed as dist
from decoding.block_causal import (
    additive_mask,
    left_pad,
    position_ids,
    roll_out,
    sample_causally,
    training_sees,
)
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import train_fullseq
from train_fullseq import (
    add_adapter,
    compute_dtype,
    end_step,
    faults_in_one_line,
    finish,
    load_model,
    load_whole,
    logits_at,
    mean_over_rows,
    parse_args,
    prepare_layers,
    progress,
    start,
    train_step,
)

# ------- constants: these, and those of train_fullseq.py that are not here
# Model and data
MODEL_NAME = "Qwen/Qwen3-0.6B"  # hub id or folder of an autoregressive model
MASK_ID = 151669  # an id that Qwen3 does not use
DATA_PT = "prompts.pt"  # written by pt.py; its answers are used with ANSWERS data alone
MAX_SAMPLES = 61816  # rows of DATA_PT, from its beginning
MAX_LEN = 256  # tokens; longer answers of the data are cut, longer prompts left out

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
ANSWERS = "student"  # whose: student, teacher or data, which are those of DATA_PT
STATES = "decoded"  # what x_t shows: decoded, as the student met it, or random
LOSS = "kl"  # kl, from the teacher, or cross-entropy of the answer's tokens
TOP_K = None  # KL from the teacher's TOP_K most probable tokens; None: from all
LOGIT_SHIFT = False  # True: a position is predicted from the one before it, as in the teacher
TRAIN_END = False  # True: the end-of-turn token is in the loss too
FULL_FT = False  # True: train all weights; the teacher is then loaded too

# Training
MICRO_BSIZE = 1  # rows per GPU and forward pass
TOTAL_TRAIN_STEPS = 7728  # 483 rollouts: with 8 rows per step one pass over the prompts
WARMUP_RATIO = 0.01  # share of the steps
LORA_RANK = 128  # of the adapter
LORA_DROPOUT = 0.0  # share of the adapter's inputs
TARGET_MODS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Output
CKPT_DIR = "ckpts_opdlm"  # prefix of the folders that a run writes
SAVE_ADAPTER = False  # not offered: an adapter alone would not tell how to decode with it
COMPILE = False  # True: torch.compile the layers for the updates; the rollouts run without
STATE_EVERY = 1  # rollouts between states to resume from; None: no states

OWN = {name: value for name, value in globals().items() if name.isupper()}
CONSTANTS = train_fullseq.CONSTANTS | OWN
for name in ("MASK_PROB_EPS", "MASK_PADDING"):
    del CONSTANTS[name]
LIMITS = [
    *train_fullseq.LIMITS,
    ("BLOCK_SIZE GEN_LENGTH FIRST_GEN_LENGTH CURRICULUM", [int], 1, 10**6),
    ("UPDATES_PER_ROLLOUT ROLLOUT_BSIZE", [int], 1, 10**6),
    ("TOP_K", [int, type(None)], 1, 10**6),
    ("THRESHOLD", [int, float], 0, 1),
    ("TEMPERATURE", [int, float], 0, 10**6),
    ("TRAIN_END FULL_FT", [bool], False, True),
    ("COMPILE", [bool], False, True),
    ("SAVE_ADAPTER", [False], None, None),
    ("ANSWERS", ["student", "teacher", "data"], None, None),
    ("STATES", ["decoded", "random"], None, None),
    ("LOSS", ["kl", "cross-entropy"], None, None),
]


class Answer(NamedTuple):
    """An answer of a rollout, in whole blocks."""

    ids: torch.Tensor  # (N,)
    steps: torch.Tensor  # (N,) the step of its block at which each token was committed
    answer_len: int  # tokens in the loss
    noise: torch.Tensor  # (N / K,) ~ U(0, 1), chooses the step at which x_t shows each block


# ------- method: states and loss
def corrupt(args, answer_ids, steps, answer_len, noise):
    """Show each block of the answers as it was at one of the steps in which it was decoded.

    answer_ids and steps (B, N); answer_len (B, 1); noise (B, N / K) ~ U(0, 1) gives the step.
    Returns noisy_ids (B, N), and loss_mask (B, N), True where a token is masked and in the loss.
    """
    blocks = steps.unflatten(1, (-1, args.BLOCK_SIZE))  # (B, N / K, K)
    taken = blocks.amax(2) + 1  # (B, N / K) steps
    step = (noise * taken).long()
    masked = (blocks >= step[..., None]).flatten(1)  # (B, N) True = shown as [MASK]
    in_answer = torch.arange(answer_ids.shape[1]) < answer_len
    return answer_ids.masked_fill(masked, args.MASK_ID), masked & in_answer


def micro_batch_loss(args, run, teacher, answers, draws):
    """The loss of B draws, of which `answers` has the answers, {id: Answer}; ()."""
    chosen = [answers[draw] for draw in draws["id"]]
    ids = pad_sequence([answer.ids for answer in chosen], batch_first=True)  # (B, N)
    steps = pad_sequence([answer.steps for answer in chosen], batch_first=True)
    noise = pad_sequence([answer.noise for answer in chosen], batch_first=True)
    answer_len = torch.tensor([[answer.answer_len] for answer in chosen])  # (B, 1)
    noisy_ids, loss_mask = corrupt(args, ids, steps, answer_len, noise)
    prompts = prompts_of(run.examples, draws)
    loss = distillation_loss if args.LOSS == "kl" else cross_entropy_loss
    return loss(args, run.engine, teacher, prompts, ids, noisy_ids, loss_mask)


def distillation_loss(args, model, teacher, prompts, answer_ids, noisy_ids, loss_mask):
    """Mean over rows of the mean KL(teacher || student) at a row's positions in the loss; ()."""
    target = teacher_logits(model, teacher, prompts, answer_ids, loss_mask)  # (M, V)
    logits = student_logits(args, model, prompts, answer_ids, noisy_ids, loss_mask)  # (M, V)
    kl = []
    for pieces in zip(target.split(256), logits.split(256), strict=True):  # keeps no softmax
        kl.append(checkpoint(kl_divergence, args, *pieces, use_reentrant=False))
    return mean_over_rows(torch.cat(kl), loss_mask)


def cross_entropy_loss(args, model, teacher, prompts, answer_ids, noisy_ids, loss_mask):
    """The same of the cross-entropy of the answers' tokens; the teacher is not used."""
    logits = student_logits(args, model, prompts, answer_ids, noisy_ids, loss_mask)  # (M, V)
    labels = answer_ids[loss_mask].to(logits.device)  # (M,)
    return mean_over_rows(cross_entropy(logits.float(), labels, reduction="none"), loss_mask)


def kl_divergence(args, target, logits):
    """KL(teacher || student) of each row of their logits, (M, V) both, in float32; (M,).

    With TOP_K, the teacher's distribution is that of its TOP_K most probable tokens, renormalised;
    the student's is not.
    """
    target = target.float().log_softmax(-1)
    log_p = logits.float().log_softmax(-1)
    if args.TOP_K is not None:
        target, ids = target.topk(args.TOP_K)
        target = target.log_softmax(-1)
        log_p = log_p.gather(-1, ids)
    return (target.exp() * (target - log_p)).sum(-1)


def student_logits(args, model, prompts, answer_ids, noisy_ids, loss_mask):
    """The student's logits (M, V) for the positions in the loss, all blocks in one pass."""
    embedding = model.get_input_embeddings().weight
    prompt_ids, valid = left_pad(prompts)
    columns = prompt_ids.shape[1]
    length = answer_ids.shape[1]
    sees = training_sees(args, columns, length, embedding.device)
    valid = pad(valid, (0, length), value=True).to(embedding.device)
    positions = position_ids(valid)  # (B, P + N)
    input_ids = torch.cat([prompt_ids, answer_ids, noisy_ids], dim=1)  # (B, S)
    twice = torch.cat([valid, valid[:, columns:]], dim=1)
    inputs = {
        "input_ids": input_ids.to(embedding.device),
        "attention_mask": additive_mask(sees, twice, embedding.dtype),
        "position_ids": torch.cat([positions, positions[:, columns:]], dim=1),
        "use_cache": False,
    }
    row, pos = [index.to(embedding.device) for index in loss_mask.nonzero(as_tuple=True)]
    column = columns + length + pos  # (M,)
    if args.LOGIT_SHIFT:  # before a block is the token before, of the prompt or of x0
        column = torch.where(pos % args.BLOCK_SIZE == 0, columns + pos - 1, column - 1)
    return logits_at(model, row, column, **inputs)


@torch.no_grad()
def teacher_logits(model, teacher, prompts, answer_ids, loss_mask):
    """The teacher's logits (M, V) for the positions in the loss, given the tokens before each."""
    embedding = model.get_input_embeddings().weight
    prompt_ids, valid = left_pad(prompts)
    input_ids = torch.cat([prompt_ids, answer_ids], dim=1).to(embedding.device)  # (B, P + N)
    valid = pad(valid, (0, answer_ids.shape[1]), value=True).to(embedding.device)
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
    with frozen(model, teacher) as autoregressive:
        return logits_at(autoregressive, row, before, **inputs)


@contextmanager
def frozen(model, teacher):
    """The autoregressive model: `teacher`, or if this is None, `model` without its adapter."""
    with nullcontext() if teacher else model.disable_adapter():
        yield teacher or model


# ------- rollouts
@torch.compiler.set_stance("force_eager")  # every forward pass has another shape
def decode_answers(args, run, teacher, draws, rollout):
    """{id: Answer} of a rollout's draws on this rank.

    Its answer_len is without what follows the end-of-turn token, and without this token unless
    TRAIN_END.
    """
    answers = {}
    run.model.eval()
    device = run.model.get_input_embeddings().weight.device
    end_ids = decode.end_ids(run.tokenizer)
    hidden = dist.get_rank() != 0
    bar = tqdm(total=len(draws), desc="rollout", unit=" answers", leave=False, disable=hidden)
    for first in range(0, len(draws), args.ROLLOUT_BSIZE):
        batch = draws[first : first + args.ROLLOUT_BSIZE]
        token_noise, block_noise = draw_noise(args, batch, rollout_length(args, rollout))
        prompts = prompts_of(run.examples, batch)
        if args.ANSWERS == "student":
            show = partial(show_progress, bar, first, prompts)
            ids, steps = roll_out(args, run.model, prompts, token_noise.to(device), end_ids, show)
        elif args.ANSWERS == "teacher":
            with frozen(run.model, teacher) as model:
                ids = sample_causally(args, model, prompts, token_noise.to(device), end_ids)
        else:
            ids = answers_of_data(args, run.examples, batch, token_noise.shape[2], end_ids)
        if args.STATES == "random":
            steps = random_steps(args, batch, ids.shape[1])
        for draw, *row in zip(batch["id"], ids, steps, block_noise, strict=True):
            answers[draw] = cut(args, *row, end_ids)
        bar.update(first + len(batch) - bar.n)
    bar.close()
    run.model.train()
    return answers


def show_progress(bar, first, prompts, rows, ids):
    """Show the answers that have ended, and the tokens of the others, before a forward pass."""
    tokens = ids.shape[1] - max(len(prompt) for prompt in prompts)
    bar.set_postfix(tokens=tokens, decoding=len(rows), refresh=False)
    bar.update(first + len(prompts) - len(rows) - bar.n)


def cut(args, ids, steps, noise, end_ids):
    """The Answer in ids and steps (N,), up to the end of the block with the end-of-turn token."""
    ends = torch.isin(ids, torch.tensor(end_ids)).nonzero()
    last = int(ends[0]) if len(ends) else len(ids) - 1
    blocks = last // args.BLOCK_SIZE + 1
    size = blocks * args.BLOCK_SIZE
    answer_len = last + (args.TRAIN_END or not len(ends))
    return Answer(ids[:size], steps[:size], answer_len, noise[:blocks])


def rollout_length(args, rollout):
    """Tokens of an answer, whole blocks: from FIRST_GEN_LENGTH to GEN_LENGTH."""
    progress = min(1.0, rollout / args.CURRICULUM)
    length = args.FIRST_GEN_LENGTH + progress * (args.GEN_LENGTH - args.FIRST_GEN_LENGTH)
    return args.BLOCK_SIZE * math.ceil(min(length, args.GEN_LENGTH) / args.BLOCK_SIZE)


def draw_noise(args, draws, length):
    """U(0, 1) of these draws: for tokens (R, K, N), and for blocks (R, N / K).

    The noise of a draw depends on SEED, its id and `length`, whatever rank it falls to.
    """
    token_noise = []
    block_noise = []
    for draw in draws["id"]:
        rng = np.random.default_rng((args.SEED, draw))
        token_noise.append(rng.random((args.BLOCK_SIZE, length), np.float32))
        block_noise.append(rng.random(length // args.BLOCK_SIZE, np.float32))
    return torch.from_numpy(np.stack(token_noise)), torch.from_numpy(np.stack(block_noise))


def prompts_of(examples, draws):
    prompts = []
    for sample_number in draws["sample"]:
        prompt_len, ids = examples[sample_number]
        prompts.append(ids[:prompt_len])
    return prompts


# ------- controls: other answers, other states
def answers_of_data(args, examples, draws, length, end_ids):
    """The answers (R, N) of the data, N = `length`, cut or filled with the first of `end_ids`."""
    answers = torch.full((len(draws), length), end_ids[0])
    for row, sample_number in zip(answers, draws["sample"], strict=True):
        prompt_len, ids = examples[sample_number]
        answer = ids[prompt_len:]
        row[: len(answer)] = answer[: len(row)]
    return answers


def check_answers(args, run):
    """End if an answer of the data has no end, so that it would be filled with a wrong one."""
    end_ids = torch.tensor(decode.end_ids(run.tokenizer))
    for sample_number in np.unique(run.draws["sample"]):
        prompt_len, ids = run.examples[sample_number]
        answer = ids[prompt_len:]
        if len(answer) < args.GEN_LENGTH and not torch.isin(answer, end_ids).any():
            where = f"row {sample_number} of {args.DATA_PT}, cut to MAX_LEN = {args.MAX_LEN}"
            sys.exit(f"the answer of {where} tokens, has no end of turn; raise MAX_LEN")


def random_steps(args, draws, length):
    """Steps (R, N) as if the tokens of each block had been committed in a random order."""
    steps = []
    for draw in draws["id"]:
        rng = np.random.default_rng((args.SEED, draw, 3))  # not that of the draw's noise
        order = rng.random((length // args.BLOCK_SIZE, args.BLOCK_SIZE)).argsort(axis=1)
        steps.append(torch.from_numpy(order.flatten()))
    return torch.stack(steps)


# ------- run
@faults_in_one_line("or lower MICRO_BSIZE, ROLLOUT_BSIZE or GEN_LENGTH")
def main(args, method):
    run = start(args, method)  # or resume, with the next rollout
    if args.ANSWERS == "data":
        check_answers(args, run)
    teacher = build_teacher(args, run.model.device)
    updates = args.UPDATES_PER_ROLLOUT
    for step in progress(run, unit=" steps"):
        rollout, update = divmod(step - 1, updates)
        if update == 0:
            draws = run.draws[step - 1 : step - 1 + updates, :, dist.get_rank()].flatten()
            began = time.monotonic()
            answers = decode_answers(args, run, teacher, draws, rollout)
            log_rollout(args, run, rollout, answers, time.monotonic() - began)
        loss = train_step(args, run, step, partial(micro_batch_loss, args, run, teacher, answers))
        state_every = args.STATE_EVERY and args.STATE_EVERY * updates
        end_step(args, run, step, loss, state_every)
    finish(args, run)


def log_rollout(args, run, rollout, answers, seconds):
    """Add a line on this rollout's answers, those of all ranks, to rollouts.csv.

    `seconds` are those of this rank; the line has the mean of all.
    """
    end_ids = decode.end_ids(run.tokenizer)
    sums = torch.zeros(5, device=run.engine.device, dtype=torch.float64)
    sums[4] = seconds / dist.get_world_size()
    for answer in answers.values():
        taken = answer.steps.unflatten(0, (-1, args.BLOCK_SIZE)).amax(1) + 1  # per block
        ended = bool(torch.isin(answer.ids, torch.tensor(end_ids)).any())
        sums[:3] += sums.new_tensor([1, answer.answer_len, len(answer.ids) / int(taken.sum())])
        sums[3] += ended
    dist.all_reduce(sums)
    if dist.get_rank() > 0:
        return
    path = run.logs / "rollouts.csv"
    count, tokens, rates, ended, seconds = sums.tolist()
    header = "rollout,answers,tokens,tokens_per_step,ended,seconds\n"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else [header]
    shares = f"{rates / count:.3f},{ended / count:.3f},{seconds:.1f}"
    line = f"{rollout},{count:.0f},{tokens:.0f},{shares}\n"
    partial_path = path.with_suffix(".partial")
    partial_path.write_text("".join([*lines[: 1 + rollout], line]))
    os.replace(partial_path, path)


def build_model(args, device):
    """The student, with an adapter unless all weights are trained."""
    model = load_model(args, device)
    model.config.block_causal = args.BLOCK_SIZE  # for decoding
    model = prepare_layers(args, model)
    return model.train() if args.FULL_FT else add_adapter(args, model)


def build_teacher(args, device):
    """The frozen model if all weights are trained; None: the student without its adapter."""
    if not args.FULL_FT:
        return None
    options = {"dtype": compute_dtype(), "device_map": {"": device}}
    teacher = load_whole(args.MODEL_NAME, args.MODEL_REVISION, **options)
    return teacher.eval().requires_grad_(False)


def check_model(args, model, tokenizer):
    problems = train_fullseq.check_model(args, model, tokenizer)
    if args.ANSWERS != "student" and args.STATES == "decoded":
        problems.append(f"ANSWERS = {args.ANSWERS!r}: the student did not decode them; set STATES")
    if tokenizer.eos_token_id is None:
        none = "its tokenizer has no end-of-turn token"
        problems.append(f"MODEL_NAME = {args.MODEL_NAME!r}: {none}; add one")
    return problems


def count_trained(args, model):
    return model.num_parameters() if args.FULL_FT else train_fullseq.count_trained(args, model)


def budget(args, method, examples, draws, left_out):
    prompts = sum(prompt_len < len(ids) for prompt_len, ids in examples)
    return {
        "prompts": prompts,
        "prompts_left_out": len(examples) - prompts,  # too long, or without an answer
        "steps": len(draws),
        "rollouts": math.ceil(len(draws) / args.UPDATES_PER_ROLLOUT),
        "global_batch": draws[0].size,
        "answers": draws.size,
        "passes": round(draws.size / prompts, 2),
    }


METHOD = train_fullseq.METHOD._replace(
    build_model=build_model, check_model=check_model, count_trained=count_trained, budget=budget
)

if __name__ == "__main__":
    main(parse_args(None, __doc__, CONSTANTS, LIMITS, [__file__]), METHOD)
