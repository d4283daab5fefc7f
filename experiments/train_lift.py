"""LIFT, learnability-informed SFT of a masked diffusion language model, with LoRA and ZeRO-2.

    deepspeed --num_gpus 8 experiments/train_lift.py     # or with --COMPONENTS 2 --CKPT_DIR lift_2

Each training example is one whole answer. The tokens to learn are chosen by their own loss:

    prompt | answer, masked at rate t + rho | padding                 scored, without gradient
    prompt | answer, the chosen tokens masked, about t | padding      trained

At high t the easiest tokens are chosen, at low t the hardest, in between random ones (Parashar et
al., "Learnability-Informed Fine-Tuning", arXiv 2605.22939, and its published code). What is not
here is train_fullseq.py's; experiments/docs/lift.md has what differs from the published code.

Shapes: B rows, L = MAX_LEN tokens, V vocabulary, M tokens.
"""

import math

import suite  # noqa: F401 (the trainers are one folder up)
import torch

import train_fullseq
from train_fullseq import draw_noise, faults_in_one_line, main, masked_nll, pad_rows, parse_args

# ------- constants: these, and those of train_fullseq.py that are not here
COMPONENTS = 3  # 2: no band of random choice
RHO_MIN = 0.1  # smallest surplus rho, where 1 - t leaves room for it
TIME_SCALING = False  # True: a token's loss over t and the answer's length, nearly as published
APPROXIMATE = False  # True: one forward pass at rate t + rho both scores and trains
LR = 5e-6  # peak
LORA_RANK = 128  # of the adapter
TARGET_MODS = ["q_proj", "k_proj", "v_proj"]  # linear layers, by the ends of names
CKPT_DIR = "ckpts_lift"  # prefix of the folders that a run writes

OWN = {name: value for name, value in globals().items() if name.isupper()}
CONSTANTS = train_fullseq.CONSTANTS | OWN
LIMITS = [
    *train_fullseq.LIMITS,
    ("COMPONENTS", [int], 2, 3),
    ("RHO_MIN", [int, float], 0, 1),
    ("TIME_SCALING APPROXIMATE", [bool], False, True),
]


# ------- method
def corrupt(args, input_ids, prompt_len, length, offset, noise):
    """Mask every token of the answer at rate t + rho, and choose k of those masked at random.

    input_ids (B, L); prompt_len, length and offset (B, 1), whose offset is always 0; noise
    (B, 2 + 2L) ~ U(0, 1) gives t, the masks, rho and the choice. Returns noisy_ids (B, L),
    over_masked (B, L), True where the answer is masked, t (B, 1), the weight (B, 1) of a chosen
    token in the loss, and loss_mask (B, L), the choice, which supervised_loss may replace.
    """
    pos = torch.arange(input_ids.shape[1])  # (L,)
    t_noise, mask_noise, rho_noise, choice_noise = noise.split([1, len(pos), 1, len(pos)], dim=1)
    t = args.MASK_PROB_EPS + (1 - args.MASK_PROB_EPS) * t_noise  # (B, 1)
    lowest_rho = args.RHO_MIN * (1 - t > args.RHO_MIN)
    rho = lowest_rho + (1 - t - lowest_rho) * rho_noise  # (B, 1)
    answer = (prompt_len <= pos) & (pos < length)  # (B, L)
    p_mask = (t + rho) * answer + args.MASK_PADDING * (length <= pos)
    masked = mask_noise < p_mask  # True = shown as [MASK]
    over_masked = masked & answer
    n = over_masked.sum(1, keepdim=True)
    k = (n * t / (t + rho)).round().clamp(min=1)  # (B, 1)
    weight = 1 / (t * answer.sum(1, keepdim=True)) if args.TIME_SCALING else 1 / k
    loss_mask = lowest(choice_noise, over_masked, k)
    return input_ids.masked_fill(masked, args.MASK_ID), over_masked, t, weight, loss_mask


def lowest(scores, candidates, k):
    """The k (B, 1) candidates (B, L) with a row's lowest scores, of equal ones the first."""
    rank = scores.masked_fill(~candidates, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return candidates & (rank < k)


def band(args, t):
    """Which tokens a row learns, (B, 1): 1 the easiest, -1 the hardest, 0 random ones. This is
    the largest of t, 1 - t and, with three components, 3 t (1 - t)."""
    return (t > 1 - 1 / args.COMPONENTS).long() - (t <= 1 / args.COMPONENTS).long()


@torch.no_grad()
def score(args, model, input_ids, noisy_ids, over_masked, t):
    """Cross-entropy of the over-masked tokens, without dropout; 0 where none is needed; (B, L)."""
    rows = band(args, t).flatten() != 0  # (B,) those whose choice is not random
    scores = torch.zeros(over_masked.shape)
    if rows.any():
        model.eval()
        nll = masked_nll(args, model, input_ids[rows], noisy_ids[rows], over_masked[rows])
        model.train()
        scores[over_masked & rows[:, None]] = nll.cpu()
    return scores


def supervised_loss(args, model, input_ids, noisy_ids, over_masked, t, weight, loss_mask):
    """Mean over rows of the weighted cross-entropy of the tokens that a row learns; ()."""
    if args.APPROXIMATE:
        reveal = (band(args, t) == 0) & over_masked & ~loss_mask  # a random choice needs no scores
        noisy_ids = torch.where(reveal, input_ids, noisy_ids)
        over_nll = masked_nll(args, model, input_ids, noisy_ids, over_masked)
        scores = torch.zeros(over_masked.shape)
        scores[over_masked] = over_nll.detach().cpu()
    else:
        scores = score(args, model, input_ids, noisy_ids, over_masked, t)
    chosen = lowest(band(args, t) * scores, over_masked, loss_mask.sum(1, keepdim=True))  # (B, L)
    chosen = torch.where(band(args, t) == 0, loss_mask, chosen)
    if args.APPROXIMATE:
        nll = over_nll[chosen[over_masked].to(over_nll.device)]
    else:
        revealed = torch.where(over_masked & ~chosen, input_ids, noisy_ids)
        nll = masked_nll(args, model, input_ids, revealed, chosen)
    weight = weight.expand(chosen.shape)[chosen]  # (M,)
    return (nll * weight.to(nll.device)).sum() / len(input_ids)


def make_batch(args, examples, draws, pad_id):
    """input_ids (B, L) of B draws, and what `corrupt` returns."""
    rows = pad_rows(args, examples, draws, pad_id)
    return rows[0], *corrupt(args, *rows, draw_noise(args, draws, 2 + 2 * args.MAX_LEN))


METHOD = train_fullseq.METHOD._replace(make_batch=make_batch, supervised_loss=supervised_loss)

if __name__ == "__main__":
    with faults_in_one_line():
        main(parse_args(None, __doc__, CONSTANTS, LIMITS, [__file__]), METHOD)
