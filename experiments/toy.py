"""The whole suite on a toy, end to end, on a laptop: no GPU, no download, a few minutes.

    python experiments/toy.py                # build, preprocess, train with both methods, decode, compare
    python experiments/toy.py --build DIR    # only DIR/model and DIR/data/{train,test}.jsonl

The toy is a small LLaDA (same module names, special tokens, chat template and remote-code loading) that was
briefly pretrained with LLaDA's own objective, and a few hundred word problems in MetaMathQA's columns.
"""

import argparse
import csv
import glob
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from unittest import mock

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

EXPERIMENTS = os.path.dirname(os.path.abspath(__file__))
SUITE = os.path.dirname(EXPERIMENTS)
sys.path.insert(0, SUITE)

import evaluate

import train_blockwise
from pt import PROMPT

# The toy's data
TRAIN_ROWS, TEST_ROWS, PRETRAIN_ROWS = 800, 100, 4000
BPE_TOKENS = 1500  # before the special tokens; the ids up to LLaDA's special tokens are fillers
# The toy's model
SHAPE = {
    "d_model": 96,
    "n_layers": 3,
    "n_heads": 4,
    "mlp_hidden_size": 256,
    "max_sequence_length": 1024,
}
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LEN, PRETRAIN_LR = 800, 8, 192, 2e-3
# The toy's training runs: the suite's constants but for these
RUN = {"MICRO_BSIZE": 4, "TOTAL_TRAIN_STEPS": 80, "LR": 2e-3, "LORA_RANK": 32}
# How the test problems are decoded: the longest answer has 128 tokens
DECODING = {"limit": 48, "gen_length": 128, "block_length": 32, "steps": 64}

# ---------------------------------------------------------------------------- word problems

NAMES = "Ada Ben Carla Diego Elif Femi Grace Hana Ivan Jia Karim Lena Mateo Nadia Omar Priya Quinn Rosa Sven Tara".split()
GOODS = "apples notebooks candles mugs postcards pencils roses lanterns scarves puzzles kites muffins".split()


def shop(rng):
    name, item = rng.choice(NAMES), rng.choice(GOODS)
    first, more, price, rent = (
        rng.randint(5, 40),
        rng.randint(2, 20),
        rng.randint(2, 9),
        rng.randint(3, 12),
    )
    second, sold = first + more, 2 * first + more
    return (
        f"{name} has a market stall and sells {item} for ${price} each. On Saturday {name} sells {first} {item}, "
        f"and on Sunday {more} more than on Saturday. The stall costs ${rent} for the weekend. How much money is left?",
        [
            f"On Saturday {name} sells {first} {item}.",
            f"On Sunday {name} sells {more} more than on Saturday, which is {first} + {more} = {second} {item}.",
            f"Together that is {first} + {second} = {sold} {item} over the whole weekend.",
            f"Each of the {item} brings ${price}, so {name} takes in {sold} * {price} = ${sold * price}.",
            f"After paying ${rent} for the stall, {name} has {sold * price} - {rent} = ${sold * price - rent} left.",
        ],
        sold * price - rent,
    )


def savings(rng):
    name, weeks, pocket, chores = (
        rng.choice(NAMES),
        rng.randint(3, 12),
        rng.randint(4, 15),
        rng.randint(2, 9),
    )
    spent, gift = rng.randint(3, 20), rng.randint(10, 50)
    weekly = pocket + chores
    saved = weekly * weeks
    return (
        f"Every week {name} gets ${pocket} of pocket money and earns ${chores} more with chores. {name} saves all "
        f"of it for {weeks} weeks, then gets ${gift} as a birthday gift and spends ${spent} on a book. What is saved?",
        [
            f"Every week {name} saves the pocket money and the money from chores, {pocket} + {chores} = ${weekly}.",
            f"In {weeks} weeks that makes {weekly} * {weeks} = ${saved} of savings.",
            f"With the birthday gift of ${gift} it grows to {saved} + {gift} = ${saved + gift}.",
            f"The book costs ${spent}, and it is paid from the savings.",
            f"So in the end {name} has saved {saved + gift} - {spent} = ${saved + gift - spent}.",
        ],
        saved + gift - spent,
    )


def journey(rng):
    name, speed, hours = rng.choice(NAMES), rng.randint(10, 60), rng.randint(2, 6)
    slower, later = rng.randint(2, 8), rng.randint(2, 5)
    first, second = speed * hours, (speed - slower) * later
    return (
        f"{name} rides for {hours} hours at {speed} km per hour. After a break {name} gets tired and rides {slower} km "
        f"per hour slower for another {later} hours. How many km does {name} ride in total?",
        [
            f"Before the break {name} rides {speed} * {hours} = {first} km.",
            f"After the break {name} is slower and rides at {speed} - {slower} = {speed - slower} km per hour.",
            f"In the {later} hours after the break {name} rides {speed - slower} * {later} = {second} km.",
            "To find the total distance we add the two parts of the ride, before and after the break.",
            f"In total {name} rides {first} + {second} = {first + second} km.",
        ],
        first + second,
    )


def shelves(rng):
    name, rows, each = rng.choice(NAMES), rng.randint(3, 12), rng.randint(6, 25)
    lent, bought = rng.randint(2, 15), rng.randint(2, 30)
    books = rows * each
    return (
        f"A library room has {rows} shelves with {each} books on every shelf. {name} lends {lent} of the books to a "
        f"school and then buys {bought} new ones. Half of a shelf stays empty. How many books are in the room now?",
        [
            f"At first there are {rows} shelves with {each} books each, which is {rows} * {each} = {books} books.",
            f"{name} lends {lent} books to the school, so {books} - {lent} = {books - lent} books are left.",
            f"Then {name} buys {bought} new books and puts them on the shelves.",
            "That half of a shelf stays empty does not change the number of books.",
            f"Now there are {books - lent} + {bought} = {books - lent + bought} books in the room.",
        ],
        books - lent + bought,
    )


def bakery(rng):
    name, trays, each = rng.choice(NAMES), rng.randint(3, 9), rng.randint(6, 24)
    burnt, guests = rng.randint(1, 5), rng.randint(2, 6)
    baked = trays * each
    rest = (baked - burnt) % guests
    share = (baked - burnt) // guests
    return (
        f"{name} bakes {trays} trays of {each} cookies. Of all the cookies {burnt} are burnt and thrown out. The "
        f"others are shared equally by {guests} guests, and {name} eats what is left. How many does each guest get?",
        [
            f"{name} bakes {trays} trays of {each} cookies, which is {trays} * {each} = {baked} cookies.",
            f"Without the burnt ones {baked} - {burnt} = {baked - burnt} cookies are left.",
            f"Shared by {guests} guests that is {share} for each of them, since {share} * {guests} = {share * guests}.",
            f"What cannot be shared is {baked - burnt} - {share * guests} = {rest}, and {name} eats it.",
            f"So each of the {guests} guests gets {share} cookies.",
        ],
        share,
    )


def garden(rng):
    name, length, width, price = (
        rng.choice(NAMES),
        rng.randint(6, 30),
        rng.randint(3, 20),
        rng.randint(2, 9),
    )
    gate = rng.randint(1, 4)
    around = 2 * (length + width)
    return (
        f"{name} wants a fence around a garden that is {length} meters long and {width} meters wide, with an opening "
        f"of {gate} meters for the gate. A meter of fence costs ${price}. How much does the whole fence cost?",
        [
            f"One long side and one short side together are {length} + {width} = {length + width} meters.",
            f"The garden has two of each, so the way around it is 2 * {length + width} = {around} meters.",
            f"The gate needs no fence, so {name} has to buy {around} - {gate} = {around - gate} meters of fence.",
            f"Every meter of the fence costs ${price}.",
            f"The whole fence costs {around - gate} * {price} = ${(around - gate) * price}.",
        ],
        (around - gate) * price,
    )


TOPICS = (shop, savings, journey, shelves, bakery, garden)
KINDS = (
    "MATH_AnsAug",
    "MATH_Rephrased",
    "MATH_SV",
    "GSM_AnsAug",
)  # pt.py leaves out the GSM types by default


def word_problems(rng, rows, seen):
    """`rows` problems in MetaMathQA's columns, none of whose queries is in the set `seen`, which grows."""
    problems = []
    while len(problems) < rows:
        query, steps, answer = rng.choice(TOPICS)(rng)
        if query not in seen:
            seen.add(query)
            response = "\n".join(steps) + f"\n#### {answer}\nThe answer is: {answer}"
            row = {
                "type": rng.choice(KINDS),
                "query": query,
                "original_question": query,
                "response": response,
            }
            problems.append(row)
    return problems


# ---------------------------------------------------------------------------- tokenizer

SPECIAL_TOKENS = {
    126080: "<|startoftext|>",
    126081: "<|endoftext|>",
    126336: "<|mdm_mask|>",
    126346: "<|start_header_id|>",
    126347: "<|end_header_id|>",
    126348: "<|eot_id|>",
}
CHAT_TEMPLATE = (  # LLaDA's behaviour: the assistant header ends every conversation, asked for or not
    "{% for message in messages %}{{ bos_token if loop.first else '' }}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def build_tokenizer(texts):
    """A byte-level BPE learnt from `texts`, with LLaDA's special tokens at LLaDA's ids and its chat template.

    Runs of newlines stay whole, digits stay single. The ids between the learnt tokens and the special ones are
    fillers that no text gives, so that the ids have no holes.
    """
    pieces = Regex(r"[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\r\n]+")
    splits = [
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    first, last = min(SPECIAL_TOKENS), max(SPECIAL_TOKENS)
    vocab = learnt["vocab"] | {f"<|filler_{i}|>": i for i in range(len(learnt["vocab"]), first)}
    tokenizer.model = models.BPE(vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]])
    tokenizer.decoder = decoders.ByteLevel()
    specials = [SPECIAL_TOKENS.get(i, f"<|reserved_{i}|>") for i in range(first, last + 1)]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)


# ---------------------------------------------------------------------------- model


def pretrain(tokenizer, texts, generator):
    """A small LLaDA pretrained on `texts`, its embedding and head over the full vocabulary, in bf16.

    It runs on the ids in use plus one that stands for all others, which share one embedding and one head row.
    """
    config = LLaDAConfig(**SHAPE)
    used = sorted(set(range(BPE_TOKENS)) | set(SPECIAL_TOKENS))
    row_of = torch.full((config.embedding_size,), len(used))  # id -> row of the small embedding
    row_of[used] = torch.arange(len(used))
    rows = row_of[encode_padded(tokenizer, texts)]  # (documents, PRETRAIN_LEN)
    model = LLaDAModelLM(LLaDAConfig(**SHAPE, vocab_size=len(used) + 1)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PRETRAIN_LR, betas=(0.9, 0.95), weight_decay=0.01
    )
    for step in (bar := tqdm(range(1, PRETRAIN_STEPS + 1), desc="pretrain", unit=" steps")):
        warm, rest = min(1, step / 20), 0.5 + 0.5 * math.cos(math.pi * step / PRETRAIN_STEPS)
        optimizer.param_groups[0]["lr"] = PRETRAIN_LR * warm * rest
        batch = rows[torch.randint(len(rows), (PRETRAIN_BATCH,), generator=generator)]
        loss = pretraining_loss(
            model, batch, row_of[config.mask_token_id], config.embedding_size - len(used), generator
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return widen(model, config, row_of)


def pretraining_loss(model, batch, mask_id, others, generator):
    """LLaDA's objective on `batch` (B, L): every token masked with t ~ U(0, 1), cross-entropy weighted by 1/t.

    Nie et al., arXiv 2502.09992, eq. 3. The last id stands for `others` ids: adding log(others) to its logit makes
    the softmax that of the full vocabulary.
    """
    t = torch.rand(len(batch), 1, generator=generator).clamp(min=0.02)  # (B, 1)
    masked = torch.rand(batch.shape, generator=generator) < t  # (B, L)
    logits = model(batch.masked_fill(masked, mask_id)).logits[masked]  # (M, V)
    logits[:, -1] += math.log(others)
    nll = cross_entropy(logits, batch[masked], reduction="none")  # (M,)
    return (nll / t.expand_as(masked)[masked]).sum() / masked.numel()


def encode_padded(tokenizer, texts):
    """(len(texts), PRETRAIN_LEN) ids, each text closed and padded with end-of-text tokens."""
    ids = torch.full((len(texts), PRETRAIN_LEN), tokenizer.eos_token_id)
    for row, encoded in zip(ids, tokenizer(texts)["input_ids"], strict=True):
        row[: len(encoded)] = torch.tensor(encoded[:PRETRAIN_LEN])
    return ids


def widen(model, config, row_of):
    """`model` with its embedding and head spread over all ids of `config`, in bf16."""
    wide = LLaDAModelLM(config)
    state = model.state_dict()
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        state[name] = state[name][row_of]
    wide.load_state_dict(state)
    return wide.to(torch.bfloat16)


def write_model(model, tokenizer, folder):
    """Write a model folder that brings its code along, as LLaDA's does."""
    model.config.architectures = ["LLaDAModelLM"]
    code = {
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    }
    model.config.auto_map = {"AutoConfig": "configuration_llada.LLaDAConfig", **code}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in glob.glob(os.path.join(EXPERIMENTS, "toy_llada", "*.py")):
        shutil.copy(path, folder)


def build(folder, seed=0):
    """Make `folder`/model and `folder`/data; both appear only when whole.

    Raises:
        SystemExit: if one of them exists already, or `folder` cannot be written.
    """
    for name in ("model", "data"):
        if os.path.exists(os.path.join(folder, name)):
            sys.exit(f"{os.path.join(folder, name)} exists already; give --build another folder")
    partial = os.path.join(folder, f"partial-{os.getpid()}")
    data, target = os.path.join(partial, "data"), os.path.join(partial, "model")
    try:
        os.makedirs(data)
    except OSError as error:
        sys.exit(f"--build {folder} cannot be written ({error.strerror}); give another folder")
    rng, generator, seen = random.Random(seed), torch.Generator().manual_seed(seed), set()
    torch.manual_seed(seed)
    for name, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        with open(os.path.join(data, f"{name}.jsonl"), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in word_problems(rng, rows, seen))
    texts = [
        f"{row['query']}\n\n{row['response']}" for row in word_problems(rng, PRETRAIN_ROWS, seen)
    ]
    tokenizer = build_tokenizer([PROMPT, *texts])
    model = pretrain(tokenizer, texts, generator)
    write_model(model, tokenizer, target)
    for name in ("data", "model"):
        os.rename(os.path.join(partial, name), os.path.join(folder, name))
    os.rmdir(partial)


# ---------------------------------------------------------------------------- the run


def launch(arguments, folder):
    """Run a script of the suite in `folder` as a user would; returns the seconds it took.

    Raises:
        SystemExit: if it fails.
    """
    scripts = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"]}
    print(f"\n$ {' '.join(arguments)}", flush=True)
    start = time.time()
    status = subprocess.run(arguments, cwd=folder, env=environment).returncode
    if status:
        sys.exit(
            f"{arguments[0]} ended with status {status}, see above; what was made so far is in {folder}"
        )
    return time.time() - start


def launcher(ranks):
    """The launcher's part of a command line, on a port that no other run on this machine has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free.getsockname()[1])]


def train(script, folder, ranks):
    """Train with `script` through the launcher; a row of the closing table."""
    flags = [word for name, value in RUN.items() for word in (f"--{name}", str(value))]
    flags += ["--MODEL_NAME", "model", "--DATA_PT", "train.pt", "--CKPT_DIR", script]
    command = [*launcher(ranks), os.path.join(SUITE, f"train_{script}.py"), *flags]
    seconds = launch(command, folder)
    with open(os.path.join(folder, f"{script}_logs", "run_config.json")) as file:
        budget = json.load(file)["budget"]
    with open(os.path.join(folder, f"{script}_logs", "train_loss.csv")) as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    checkpoint = os.path.join(folder, f"{script}_step{budget['steps']:04d}")
    size = sum(os.path.getsize(path) for path in glob.glob(os.path.join(checkpoint, "*")))
    return {
        "model": script,
        "steps": budget["steps"],
        "loss, first 5 steps": f"{sum(losses[:5]) / 5:.2f}",
        "last 5 steps": f"{sum(losses[-5:]) / 5:.2f}",
        "held-out block loss": f"{held_out_loss(checkpoint, folder):.2f}",
        "accuracy": accuracy(os.path.basename(checkpoint), folder),
        "supervised tokens": f"{budget['supervised tokens']:,}",
        "checkpoint": f"{size / 1e6:.0f} MB",
        "time": f"{seconds:.0f} s",
    }


@torch.no_grad()
def held_out_loss(checkpoint, folder, batch_rows=8):
    """Load `checkpoint` back and take the blockwise loss of every block of the test problems, noise fixed."""
    with mock.patch.object(train_blockwise, "DATA_PT", os.path.join(folder, "test.pt")):
        examples = train_blockwise.load_examples()
    draws = train_blockwise.schedule(examples, max_draws=sys.maxsize)
    pad_id = AutoTokenizer.from_pretrained(checkpoint, fix_mistral_regex=False).pad_token_id
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype=torch.float32
    ).eval()
    total = 0
    for first in tqdm(
        range(0, len(draws), batch_rows), desc=f"held-out loss of {os.path.basename(checkpoint)}"
    ):
        numbers = range(first, min(first + batch_rows, len(draws)))
        batch = train_blockwise.make_batch(examples, draws, numbers, pad_id)
        total += train_blockwise.supervised_loss(model, *batch).item() * len(numbers)
    return total / len(draws)


def accuracy(model, folder):
    """Decode test problems with `model`, a checkpoint in `folder`, as DECODING says; the share of right answers."""
    words = [word for name, value in DECODING.items() for word in (f"--{name}", str(value))]
    words += [
        "--model",
        os.path.join(folder, model),
        "--dataset",
        os.path.join(folder, "data", "test.jsonl"),
    ]
    summary = evaluate.main([*words, "--output", os.path.join(folder, f"{model}_answers")])
    return f"{summary['accuracy']:.1%}"


def unused(path):
    """`path`, or the first of path-v2, path-v3, ... that does not exist."""
    names = (path if number == 1 else f"{path}-v{number}" for number in range(1, 10**6))
    return next(name for name in names if not os.path.exists(name))


def run(folder, ranks):
    """Build, preprocess, train with both methods, decode with base and checkpoints; print the closing table."""
    start = time.time()
    build(folder)
    print(f"built {folder}/model and {folder}/data in {time.time() - start:.0f} s")
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is on the hub
    pt = [sys.executable, os.path.join(SUITE, "pt.py"), "--model", "model"]
    for split in ("train", "test"):
        launch([*pt, "--dataset", f"data/{split}.jsonl", "--output", f"{split}.pt"], folder)
    rows = [train(script, folder, ranks) for script in ("blockwise", "fullseq")]
    base = {
        "model": "base",
        "held-out block loss": f"{held_out_loss(os.path.join(folder, 'model'), folder):.2f}",
    }
    base["accuracy"] = accuracy("model", folder)
    print("\n" + " | ".join(rows[0]))
    for row in (base, *rows):
        print(" | ".join(str(row.get(name, "")).rjust(len(name)) for name in rows[0]))
    print(f"\nall of it in {time.time() - start:.0f} s; everything is in {folder}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", metavar="DIR", help="only build DIR/model and DIR/data")
    parser.add_argument(
        "--ranks", type=int, help="processes to train with (one a GPU, two without a GPU)"
    )
    args = parser.parse_args()
    if args.ranks is not None and args.ranks < 1:
        parser.error(f"--ranks {args.ranks}: must be at least 1")
    if args.build:
        build(args.build)
        print(f"built {args.build}/model and {args.build}/data")
        return
    folder = unused(os.path.join(EXPERIMENTS, "runs", "toy"))
    os.makedirs(folder)
    run(folder, args.ranks or torch.cuda.device_count() or 2)


if __name__ == "__main__":
    main()
