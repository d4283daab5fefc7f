"""The studies' synthetic reasoning task and its base model: a register machine, worked through step by step.

    python experiments/registers.py --output DIR     # DIR/model and DIR/data/{train,test}.jsonl

A problem gives three registers a digit each, then a program of max, min, copy and swap, and asks for one register:

    a 3 b 7 c 1 ; max a b ; swap b c ; min c 5 ; c ?

The answer repeats each instruction with the registers after it, so that every step depends on the one before:

    max a b : 7 7 1 ; swap b c : 7 1 7 ; min c 5 : 7 1 5 ; The answer is: 5

The base is a small LLaDA with a vocabulary of its own words, pretrained from scratch on such problems with LLaDA's
objective until it learns no more from it, so that what SFT changes is not just more training.
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
from toy import CHAT_TEMPLATE, PROMPT, pretraining_loss, write_model
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

REGISTERS, OPERATIONS = "abc", ("max", "min", "copy", "swap")
SHORTEST, LONGEST = 4, 7  # instructions
TRAIN_ROWS, TEST_ROWS, PRETRAIN_ROWS = 8000, 1000, 40000
SHAPE = {"d_model": 48, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 128, "max_sequence_length": 256}
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 5000, 64, 3e-3

SPECIAL_TOKENS = "<|endoftext|> <|startoftext|> <|mdm_mask|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()


def execute(values, operation, target, operand):
    """`values` (dict of the registers) after one instruction; `operand` is a register or, but for swap, a digit."""
    after, value = dict(values), values.get(operand, operand)
    if operation == "swap":
        after[operand] = values[target]
    if operation in ("max", "min"):
        value = {"max": max, "min": min}[operation](values[target], value)
    after[target] = value
    return after


def problem(rng):
    """One problem as (query, response)."""
    values = {register: rng.randint(0, 9) for register in REGISTERS}
    query, steps = [" ".join(f"{register} {value}" for register, value in values.items())], []
    for _ in range(rng.randint(SHORTEST, LONGEST)):
        operation, target = rng.choice(OPERATIONS), rng.choice(REGISTERS)
        others = [register for register in REGISTERS if register != target]
        operand = rng.choice(others) if operation == "swap" or rng.random() < 0.7 else rng.randint(0, 9)
        values = execute(values, operation, target, operand)
        query.append(f"{operation} {target} {operand}")
        steps.append(f"{query[-1]} : {' '.join(map(str, values.values()))} ;")
    asked = rng.choice(REGISTERS)
    return " ; ".join([*query, f"{asked} ?"]), " ".join([*steps, f"The answer is: {values[asked]}"])


def problems(rng, rows, seen):
    """`rows` problems in MetaMathQA's columns, none of whose queries is in the set `seen`, which grows."""
    made = []
    while len(made) < rows:
        query, response = problem(rng)
        if query not in seen:
            seen.add(query)
            made.append({"type": "registers", "query": query, "response": response})
    return made


def build_tokenizer(texts):
    """A word-level tokenizer of the words in `texts`, in which each half of MetaMath's prompt is a single token.

    A word keeps the space before it, so that decoding gives the text back.
    """
    pieces = r"\n+| ?\w+| ?[^\w\s]"
    opening, closing = PROMPT.split("{query}")
    words = sorted({word for text in texts for word in re.findall(pieces, text)} | {"\n\n", "user", "assistant"})
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, opening, closing, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in (opening, closing)])
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)


def render(tokenizer, rows):
    """(len(rows), L) ids of whole conversations as pt.py makes them, padded with end-of-text tokens."""
    chats = [[{"role": "user", "content": PROMPT.format(query=row["query"])}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False)
    texts = [f"{prompt}{row['response']}<|eot_id|>" for prompt, row in zip(prompts, rows, strict=True)]
    return tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]


def pretrain(model, ids, generator):
    """Pretrain `model` on `ids` (rows, L) with LLaDA's objective; yields the number of steps done and the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, betas=(0.9, 0.95), weight_decay=0.01)
    for step in (bar := tqdm(range(1, PRETRAIN_STEPS + 1), desc="pretrain", unit=" steps")):
        warm, rest = min(1, step / 100), 0.5 + 0.5 * math.cos(math.pi * step / PRETRAIN_STEPS)
        optimizer.param_groups[0]["lr"] = PRETRAIN_LR * warm * rest
        batch = ids[torch.randint(len(ids), (PRETRAIN_BATCH,), generator=generator)]
        loss = pretraining_loss(model, batch, model.config.mask_token_id, 1, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        yield step, loss.item()
