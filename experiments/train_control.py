"""Controls: a trainer with its method changed, to see what a gain is due to.

    deepspeed --num_gpus 8 experiments/train_control.py --CONTROL rest

of Blockwise SFT (train_blockwise.py, its constants):
    rest          the states of Blockwise SFT, but the loss on the whole rest: block and suffix
    span          a span of BLOCK_SIZE tokens anywhere in the answer instead of an aligned block

of LIFT (train_lift.py, its constants and BLOCK_SIZE; LR, LORA_RANK, TARGET_MODS are LIFT's):
    lift-block    LIFT inside the active block: prefix clean, suffix hidden

of OPDLM (train_opdlm.py, its constants):
    own-random    the student's answers, but masked at random
    distill       the teacher's answers, masked at random
    sft-teacher   as distill, with cross-entropy on the tokens instead of KL
    sft-data      the answers of DATA_PT, masked at random, with cross-entropy

Any constant can be given as --NAME VALUE; CKPT_DIR is ckpts_ and the control's name.
"""

import argparse
import importlib
import os
import sys

CONTROLS = {
    "rest": "train_blockwise",
    "span": "train_blockwise",
    "lift-block": "train_lift",
    "own-random": "train_opdlm",
    "distill": "train_opdlm",
    "sft-teacher": "train_opdlm",
    "sft-data": "train_opdlm",
}
IS_FIRST = os.environ.get("LOCAL_RANK", "0") == "0"  # the launcher ends the other ranks


def parse_args(argv):
    """The control, and the other words, which the trainer reads itself."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--CONTROL", required=True, choices=CONTROLS)
    return parser.parse_known_args(argv)


if __name__ == "__main__":  # before the slow imports; the trainer checks the constants after them
    if not IS_FIRST:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (a usage error is printed once)
    ARGS, CONSTANTS = parse_args(sys.argv[1:])
    sys.stderr = sys.__stderr__

import numpy as np
import suite  # noqa: F401, it makes the trainers importable
import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import DynamicCache


def rest(trainer):
    """Blockwise SFT's states, with the loss on the block and on the hidden suffix."""
    blockwise_corrupt = trainer.corrupt

    def corrupt(input_ids, prompt_len, length, block, noise):
        noisy_ids, _ = blockwise_corrupt(input_ids, prompt_len, length, block, noise)
        pos = torch.arange(input_ids.shape[1])  # (L,)
        first = prompt_len + block * trainer.BLOCK_SIZE  # (B, 1)
        after_prefix = (first <= pos) & (pos < length)  # (B, L)
        return noisy_ids, after_prefix & (noisy_ids == trainer.MASK_ID)

    trainer.corrupt = corrupt


def span(trainer):
    """Blockwise SFT with each block at a random place, where it may stick out of the answer.

    So every token of an answer is active equally often.
    """
    blockwise_schedule = trainer.schedule

    def schedule(examples, max_draws):
        draws = blockwise_schedule(examples, max_draws)
        lengths = np.array([len(ids) - prompt_len for prompt_len, ids in examples])
        rng = np.random.default_rng((trainer.SEED, 0, 3))  # not the stream of any draw
        places = rng.integers(1 - trainer.BLOCK_SIZE, lengths[draws[:, 0]])
        return np.stack([draws[:, 0], places], axis=1)

    def corrupt(input_ids, prompt_len, length, place, noise):
        pos = torch.arange(input_ids.shape[1])  # (L,)
        t = trainer.MASK_PROB_EPS + (1 - trainer.MASK_PROB_EPS) * noise[:, :1]  # (B, 1)
        first = prompt_len + place  # (B, 1)
        answer = (prompt_len <= pos) & (pos < length)  # (B, L)
        prefix = answer & (pos < first)
        suffix = answer & (first + trainer.BLOCK_SIZE <= pos)
        active = answer & ~prefix & ~suffix
        p_mask = trainer.PREFIX_MASK_RATE * prefix + t * active + trainer.SUFFIX_MASK_PROB * suffix
        p_mask = p_mask + trainer.MASK_PADDING * (length <= pos)
        masked = noise[:, 1:] < p_mask
        return input_ids.masked_fill(masked, trainer.MASK_ID), masked & active

    trainer.schedule = schedule
    trainer.corrupt = corrupt


def lift_block(trainer):
    """LIFT with the active block as its answer; the rest as Blockwise SFT shows it."""
    blockwise = importlib.import_module("train_blockwise")
    lift_corrupt = trainer.corrupt

    def schedule(examples, max_draws):
        blockwise.SEED, blockwise.BLOCK_SIZE = trainer.SEED, trainer.BLOCK_SIZE
        return blockwise.schedule(examples, max_draws)

    def corrupt(input_ids, prompt_len, length, block, noise):
        pos = torch.arange(input_ids.shape[1])  # (L,)
        first = prompt_len + block * trainer.BLOCK_SIZE  # (B, 1)
        end = torch.minimum(first + trainer.BLOCK_SIZE, length)
        noisy_ids, *others = lift_corrupt(input_ids, first, end, block, noise)
        suffix = (end <= pos) & (pos < length)  # (B, L)
        return noisy_ids.masked_fill(suffix, trainer.MASK_ID), *others

    trainer.schedule = schedule
    trainer.corrupt = corrupt
    trainer.BLOCK_SIZE = blockwise.BLOCK_SIZE
    trainer.CONSTANTS.append("BLOCK_SIZE")
    trainer.LIMITS.append(("BLOCK_SIZE", [int], 1, 10**6))


def own_random(trainer):
    """OPDLM with random states: as if a block's tokens had been committed in a random order."""
    original = trainer.decode_answers

    def decode_answers(model, eos_id, examples, draws, numbers, rollout):
        answers = original(model, eos_id, examples, draws, numbers, rollout)
        for number, (answer, _, answer_len, noise) in answers.items():
            rng = np.random.default_rng((trainer.SEED, number, 3))  # not that of the draw's noise
            order = rng.random((len(noise), trainer.BLOCK_SIZE)).argsort(axis=1)
            answers[number] = answer, torch.from_numpy(order.flatten()), answer_len, noise
        return answers

    trainer.decode_answers = decode_answers


def distill(trainer):
    """The same on answers that the teacher samples, one token after the other."""
    own_random(trainer)
    teachers = []
    build_teacher = trainer.build_teacher

    def build_and_keep(device):
        teachers.append(build_teacher(device))
        return teachers[0]

    def roll_out(model, prompts, noise, eos_id):
        if teachers[0] is not None:
            answers = sample_causally(trainer, teachers[0], prompts, noise, eos_id)
        else:
            with model.disable_adapter():
                answers = sample_causally(trainer, model, prompts, noise, eos_id)
        return answers, torch.zeros_like(answers)

    trainer.build_teacher = build_and_keep
    trainer.roll_out = roll_out


@torch.no_grad()
def sample_causally(trainer, model, prompts, noise, eos_id):
    """Answers (R, N) of an autoregressive model; noise (R, K, N), of which K = 0 is used."""
    ids, valid = [tensor.to(noise.device) for tensor in trainer.left_pad(prompts)]
    cache = DynamicCache()
    row = torch.arange(len(ids), device=noise.device)
    ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=noise.device)
    answers = []
    for number in range(noise.shape[2]):
        inputs = {
            "input_ids": ids,
            "attention_mask": valid.long(),
            "position_ids": trainer.position_ids(valid)[:, -ids.shape[1] :],
            "past_key_values": cache,
            "use_cache": True,
        }
        last = torch.full_like(row, ids.shape[1] - 1)
        logits = trainer.logits_at(model, row, last, **inputs).float()  # (R, V)
        tokens, _ = trainer.sample(logits[:, None], noise[:, 0, number : number + 1])  # (R, 1)
        ids = tokens.masked_fill(ended, eos_id)
        answers.append(ids)
        ended |= ids == eos_id
        if ended.all() and (number + 1) % trainer.BLOCK_SIZE == 0:
            break
        valid = torch.cat([valid, torch.ones_like(ended)], dim=1)
    return torch.cat(answers, dim=1).cpu()


def sft_teacher(trainer):
    """The same with the cross-entropy of the answers' tokens."""
    distill(trainer)
    use_cross_entropy(trainer)


def use_cross_entropy(trainer):
    def loss(model, teacher, prompts, answers, noisy_ids, loss_mask):
        logits = trainer.student_logits(model, prompts, answers, noisy_ids, loss_mask)  # (M, V)
        labels = answers[loss_mask].to(logits.device)  # (M,)
        nll = cross_entropy(logits.float(), labels, reduction="none")
        return trainer.mean_over_rows(nll, loss_mask)

    trainer.distillation_loss = loss


def sft_data(trainer):
    """Random states of the answers of DATA_PT, with cross-entropy; nothing is decoded."""
    own_random(trainer)
    use_cross_entropy(trainer)
    with_random_states = trainer.decode_answers
    data = {}

    def decode_answers(model, eos_id, examples, draws, numbers, rollout):
        data["answers"] = []
        for sample in draws[numbers, 0]:
            prompt_len, ids = examples[sample]
            data["answers"].append(ids[prompt_len:])
        data["answers"].reverse()  # roll_out takes them from the end
        return with_random_states(model, eos_id, examples, draws, numbers, rollout)

    def roll_out(model, prompts, noise, eos_id):
        answers = torch.full((len(prompts), noise.shape[2]), eos_id)
        for row in answers:
            answer = data["answers"].pop()
            if len(answer) < len(row) and eos_id not in answer:
                sys.exit(f"{trainer.DATA_PT} has answers without an end; raise MAX_LEN")
            row[: len(answer)] = answer[: len(row)]
        return answers, torch.zeros_like(answers)

    trainer.decode_answers = decode_answers
    trainer.roll_out = roll_out


CHANGES = {
    "rest": rest,
    "span": span,
    "lift-block": lift_block,
    "own-random": own_random,
    "distill": distill,
    "sft-teacher": sft_teacher,
    "sft-data": sft_data,
}


def install(control):
    """The trainer of a control, its method changed; the name is a constant that runs record."""
    trainer = importlib.import_module(CONTROLS[control])
    CHANGES[control](trainer)
    trainer.CKPT_DIR = f"ckpts_{control}"
    trainer.CONTROL = control
    trainer.CONSTANTS.append("CONTROL")
    trainer.LIMITS.append(("CONTROL", [str], None, None))
    return trainer


if __name__ == "__main__":
    TRAINER = install(ARGS.CONTROL)
    PROBLEMS = TRAINER.read_overrides(CONSTANTS) + TRAINER.check_constants()
    if PROBLEMS and IS_FIRST:
        sys.exit("\n".join([*PROBLEMS, f"{CONTROLS[ARGS.CONTROL]}.py --help lists the constants"]))
    try:
        TRAINER.main()
    except torch.OutOfMemoryError:
        sys.exit("out of memory; set ACTIVATION_CHECKPOINTING, or halve MICRO_BSIZE")
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"stopped: {type(error).__name__} {error}; repeat the command to resume")
