"""The studies' synthetic reasoning task and its base model: chains of small sums, worked out step by step.

    python experiments/chains.py --output DIR     # DIR/model and DIR/data/{train,test}.jsonl, about 10 minutes

A problem is a digit and five to eight labelled instructions; sums stop at 9 and differences at 0:

    3 ; p max 5 ; q minus 4 ; r plus 7 ; s plus 6 ; t min 8

The answer looks each instruction up by its label and works it out, so that every step depends on the one before:

    p 3 max 5 = 5 ; q 5 minus 4 = 1 ; r 1 plus 7 = 8 ; s 8 plus 6 = 9 ; t 9 min 8 = 8 ; The answer is: 8

The base is a small LLaDA with a vocabulary of its own words, trained from scratch on such problems with LLaDA's
objective to where it hardly learns more from it, so that what SFT changes is not just more training.
"""

import argparse
import json
import math
import os
import random
import re
import sys

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [
    os.path.dirname(os.path.abspath(__file__)),
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
]

import toy
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM

import pt

OPERATIONS = {
    "max": max,
    "min": min,
    "plus": lambda value, operand: min(9, value + operand),
    "minus": lambda value, operand: max(0, value - operand),
}
LABELS, SHORTEST = "pqrstuvw", 5  # one label an instruction; the fewest instructions
TRAIN_ROWS, TEST_ROWS, PRETRAIN_ROWS = 8000, 1000, 40000
GEN_LENGTH = 64  # tokens that hold every answer with its end
SHAPE = {
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 4,
    "mlp_hidden_size": 128,
    "max_sequence_length": 256,
}
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 6000, 64, 3e-3

SPECIAL_TOKENS = "<|endoftext|> <|startoftext|> <|mdm_mask|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()


# ---------------------------------------------------------------------------- problems


def problem(rng):
    """One problem as (query, response)."""
    value = rng.randint(0, 9)
    query, steps = [str(value)], []
    for label in LABELS[: rng.randint(SHORTEST, len(LABELS))]:
        operation, operand = rng.choice(list(OPERATIONS)), rng.randint(0, 9)
        result = OPERATIONS[operation](value, operand)
        query.append(f"{label} {operation} {operand}")
        steps.append(f"{label} {value} {operation} {operand} = {result} ;")
        value = result
    return " ; ".join(query), " ".join([*steps, f"The answer is: {value}"])


def problems(rng, rows, seen):
    """`rows` problems in MetaMathQA's columns, none of whose queries is in the set `seen`, which grows."""
    made = []
    while len(made) < rows:
        query, response = problem(rng)
        if query not in seen:
            seen.add(query)
            made.append({"type": "chain", "query": query, "response": response})
    return made


def build_tokenizer(texts):
    """A word-level tokenizer of the words in `texts`, in which each half of MetaMath's prompt is a single token.

    A word keeps the space before it, so that decoding gives the text back.
    """
    pieces = r"\n+| ?\w+| ?[^\w\s]"
    halves = pt.PROMPT.split("{query}")
    words = sorted(
        {word for text in texts for word in re.findall(pieces, text)}
        | {"\n\n", "user", "assistant"}
    )
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *halves, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(half, special=False, normalized=False) for half in halves])
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=toy.CHAT_TEMPLATE, **names
    )


# ---------------------------------------------------------------------------- base


def encode(tokenizer, rows):
    """Whole conversations as pt.py makes them: ids (N, L), padded with end-of-text tokens, and prompt_len (N,).

    L is that of a canvas with GEN_LENGTH tokens behind the longest prompt.
    """
    header = pt.find_trailing_header(tokenizer)
    texts = pt.render(
        tokenizer, header, *([row[name] for row in rows] for name in ("query", "response"))
    )
    samples = pt.encode(tokenizer, *texts, max_len=sys.maxsize)
    prompt_len = torch.tensor([prompt_len for prompt_len, _ in samples])
    ids = torch.full((len(rows), int(prompt_len.max()) + GEN_LENGTH), tokenizer.pad_token_id)
    for row, (_, encoded) in zip(ids, samples, strict=True):
        row[: len(encoded)] = torch.tensor(encoded)
    return ids, prompt_len


def denoising_loss(model, ids, prompt_len, generator):
    """LLaDA's objective on prompts with answers: all behind the prompt masked with t ~ U(0, 1), padding too.

    Nie et al., arXiv 2502.09992, eq. 5, for ids (B, L) and prompt_len (B,). The weight 1/t becomes the mean over a
    row's masked positions, the same in expectation up to a factor, and the t of a batch are spread evenly over (0, 1):
    both lower the variance.
    """
    rows, length = ids.shape
    t = (torch.arange(rows) + torch.rand(rows, generator=generator))[:, None] / rows  # (B, 1)
    masked = (torch.rand(ids.shape, generator=generator) < t) & (
        torch.arange(length) >= prompt_len[:, None]
    )  # (B, L)
    logits = model(input_ids=ids.masked_fill(masked, model.config.mask_token_id)).logits[
        masked
    ]  # (M, V)
    nll = cross_entropy(logits, ids[masked], reduction="none")  # (M,)
    return (nll / masked.sum(1, keepdim=True).expand_as(masked)[masked]).sum() / rows


def pretrain(model, ids, prompt_len, generator):
    """Train `model` on ids (N, L) and prompt_len (N,) for PRETRAIN_STEPS, warm-up and cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PRETRAIN_LR, betas=(0.9, 0.95), weight_decay=0.01
    )
    for step in (bar := tqdm(range(1, PRETRAIN_STEPS + 1), desc="pretrain", unit=" steps")):
        warm, rest = min(1, step / 100), 0.5 + 0.5 * math.cos(math.pi * step / PRETRAIN_STEPS)
        optimizer.param_groups[0]["lr"] = PRETRAIN_LR * warm * rest
        chosen = torch.randint(len(ids), (PRETRAIN_BATCH,), generator=generator)
        loss = denoising_loss(model, ids[chosen], prompt_len[chosen], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def build(folder, seed=0):
    """Make `folder`/model and `folder`/data, which appear only when whole.

    Raises:
        SystemExit: if `folder` exists already, or cannot be written.
    """
    if os.path.exists(folder):
        sys.exit(f"{folder} exists already; give another folder")
    partial = f"{os.path.normpath(folder)}.partial-{os.getpid()}"
    try:
        os.makedirs(os.path.join(partial, "data"))
    except OSError as error:
        sys.exit(f"{folder} cannot be written ({error.strerror}); give another folder")
    rng, generator, seen = random.Random(seed), torch.Generator().manual_seed(seed), set()
    torch.manual_seed(seed)
    for name, rows in (("test", TEST_ROWS), ("train", TRAIN_ROWS)):
        with open(os.path.join(partial, "data", f"{name}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in problems(rng, rows, seen))
    rows = problems(rng, PRETRAIN_ROWS, seen)
    tokenizer = build_tokenizer([row[name] for row in rows for name in ("query", "response")])
    special = {
        "mask_token_id": SPECIAL_TOKENS.index("<|mdm_mask|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LLaDAModelLM(
        LLaDAConfig(
            **SHAPE, **special, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
        )
    )
    pretrain(model.train(), *encode(tokenizer, rows), generator)
    toy.write_model(model, tokenizer, os.path.join(partial, "model"))
    os.rename(partial, folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="new folder for model and data"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of problems, weights and noise (%(default)s)"
    )
    args = parser.parse_args()
    build(args.output, args.seed)
    print(f"built {args.output}/model and {args.output}/data")


if __name__ == "__main__":
    main()
