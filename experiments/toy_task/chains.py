"""The toy task and its base model: chains of small sums, to be worked out step by step.

    python experiments/toy_task/chains.py --output DIR           # DIR/model and DIR/data
    python experiments/toy_task/chains.py --output DIR --narrow  # without LLaDA's unused ids
    python experiments/toy_task/chains.py --pretrain             # the base's weights again

A problem is a digit and five to eight labelled instructions; sums stop at 9, differences at 0:

    3 ; p max 5 ; q minus 4 ; r plus 7 ; s plus 6 ; t min 8

Its answer works out each instruction, so that every step depends on the one before:

    p 3 max 5 = 5 ; q 5 minus 4 = 1 ; r 1 plus 7 = 8 ; s 8 plus 6 = 9 ; t 9 min 8 = 8 ; ...

and ends with "The answer is: 8". The base is a small LLaDA, pretrained from scratch with LLaDA's
objective. It has learnt to work answers out. At the end of pretraining, however, most answers only
repeated the instructions before the result, so it prefers to guess. SFT changes that.
Guide: experiments/docs/studies.md
"""

import json
import math
import os
import random
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # experiments/

import suite
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from toy_task.llada.configuration_llada import LLaDAConfig
from toy_task.llada.modeling_llada import LLaDAModelLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import pt

SEED = 0  # of the problems, the weights and the noise
BASE = Path(__file__).with_name("chains_base.safetensors")

# Problems
OPERATIONS = ("max", "min", "plus", "minus")
LABELS = "pqrstuvw"  # one per instruction
SHORTEST = 5  # instructions
LONGEST = len(LABELS)
TRAIN_ROWS = 8000
TEST_ROWS = 1000
GEN_LENGTH = 64  # tokens that hold every answer with its end

# Tokenizer
SPECIAL_TOKENS = {
    126080: "<|startoftext|>",
    126081: "<|endoftext|>",
    126336: "<|mdm_mask|>",
    126346: "<|start_header_id|>",
    126347: "<|end_header_id|>",
    126348: "<|eot_id|>",
}
WORDS = [
    *["user", "assistant", "\n\n", " The", " answer", " is", " ;", " ="],
    *[f" {word}" for word in OPERATIONS],
    *[f" {label}" for label in LABELS],
    *[f" {digit}" for digit in range(10)],
]
PIECES = r"[\r\n]+| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\r\n]+"
CHAT_TEMPLATE = (  # LLaDA's: the assistant header ends every conversation, asked for or not
    "{% for message in messages %}{{ bos_token if loop.first else '' }}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

# Model
SHAPE = {
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": 160,
    "max_sequence_length": 1024,
}
EMBEDDINGS = ("model.transformer.wte.weight", "model.transformer.ff_out.weight")  # (V, d_model)

# Pretraining
PRETRAIN_ROWS = 100_000
PRETRAIN_BATCH = 32
PRETRAIN_STEPS = 4000  # on answers that are worked out
PRETRAIN_LR = 4e-3
HABIT_ROWS = 20_000
HABIT_SHARE = 0.7  # of the answers that only repeat the instructions
HABIT_STEPS = 200  # on these rows, after the others
HABIT_LR = 1e-3
INIT_STD = 0.125  # 1 / sqrt(d_model); LLaDA's 0.02 would learn this little model far more slowly


# ------- problems
def apply(operation, value, operand):
    """The digit that an instruction makes of the digit `value`."""
    if operation == "max":
        return max(value, operand)
    if operation == "min":
        return min(value, operand)
    if operation == "plus":
        return min(9, value + operand)
    return max(0, value - operand)


def problem(rng, works_out=True, operations=OPERATIONS, longest=LONGEST):
    """One problem as (query, response); the response works it out, or repeats it and states it.

    It has at most `longest` instructions, with these operations.
    """
    value = rng.randint(0, 9)
    first = value
    instructions, steps = [], []
    for label in LABELS[: rng.randint(SHORTEST, longest)]:
        operation = rng.choice(operations)
        operand = rng.randint(0, 9)
        result = apply(operation, value, operand)
        instructions.append(f"{label} {operation} {operand}")
        steps.append(f"{label} {value} {operation} {operand} = {result}")
        value = result
    query = " ; ".join([str(first), *instructions])
    if not works_out:
        steps = instructions
    return query, " ; ".join([*steps, f"The answer is: {value}"])


def problems(rng, rows, seen, habit=0.0, **kind):
    """`rows` problems in MetaMathQA's columns, whose queries are not in `seen`, which grows.

    `habit` is the share of the answers that only repeat the instructions; `kind` goes to `problem`.
    """
    made = []
    while len(made) < rows:
        query, response = problem(rng, works_out=rng.random() >= habit, **kind)
        if query in seen:
            continue
        seen.add(query)
        row = {"type": "chain", "query": query, "original_question": query, "response": response}
        made.append(row)
    return made


def splits(train_rows, test_rows, pretrain_rows=0, habit_rows=0):
    """Problems for test, training and the two stages of pretraining, four lists; none is shared."""
    rng = random.Random(SEED)
    seen = set()
    test = problems(rng, test_rows, seen)
    train = problems(rng, train_rows, seen)
    pretraining = problems(rng, pretrain_rows, seen)
    habit = problems(rng, habit_rows, seen, HABIT_SHARE)
    return test, train, pretraining, habit


# ------- tokenizer
def list_tokens():
    """The toy's own tokens but for the special ones: all bytes, the task's words, pt.py's prompt.

    Each half of the prompt is one token, which keeps sequences short.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [byte_level.pre_tokenize_str(word)[0][0] for word in WORDS]
    return [*alphabet, *words, *pt.PROMPT.split("{query}")]


def list_ids(wide):
    """The ids of the toy's own tokens, special ones last, in the wide or the narrow vocabulary."""
    count = len(list_tokens())
    special = list(SPECIAL_TOKENS) if wide else range(count, count + len(SPECIAL_TOKENS))
    return [*range(count), *special]


def build_tokenizer(wide):
    """A tokenizer of bytes and WORDS that reads any text, with LLaDA's special tokens and template.

    A word keeps the space before it, runs of newlines stay whole. The wide one has LLaDA's ids: no
    text gives the fillers between the toy's own tokens and the special ones.
    """
    tokens = list_tokens()
    special = list(SPECIAL_TOKENS.values())
    if wide:
        first, last = min(SPECIAL_TOKENS), max(SPECIAL_TOKENS)
        tokens += [f"<|filler_{i}|>" for i in range(len(tokens), first)]
        special = [SPECIAL_TOKENS.get(i, f"<|reserved_{i}|>") for i in range(first, last + 1)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for half in pt.PROMPT.split("{query}"):
        tokenizer.add_tokens([AddedToken(half, special=False, normalized=False)])
    for token in special:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


# ------- pretraining
def encode(tokenizer, rows):
    """Whole conversations as pt.py makes them, padded with end-of-text tokens.

    Returns:
        ids (N, L): L is the longest prompt and GEN_LENGTH tokens after it.
        prompt_len (N,)
    """
    header = pt.find_trailing_header(tokenizer)
    queries = [row["query"] for row in rows]
    responses = [row["response"] for row in rows]
    prompts, texts = pt.render(tokenizer, header, queries, responses)
    prompts_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    texts_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompt_len = torch.tensor([len(prompt_ids) for prompt_ids in prompts_ids])
    length = int(prompt_len.max()) + GEN_LENGTH
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    for row, text_ids in zip(ids, texts_ids, strict=True):
        row[: len(text_ids)] = torch.tensor(text_ids)
    return ids, prompt_len


def denoising_loss(model, ids, prompt_len, generator):
    """LLaDA's objective on ids (B, L): all after prompt_len (B,) masked with t ~ U(0, 1).

    Nie et al., arXiv 2502.09992, eq. 5. The weight 1/t becomes the mean over a row's masked
    positions, the same in expectation up to a factor, and the t of a batch are spread evenly over
    (0, 1): both lower the variance. The model's last id stands for all ids of LLaDA's vocabulary
    that the toy does not use: it counts as often in the softmax.
    """
    rows, length = ids.shape
    pos = torch.arange(length)  # (L,)
    t = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows  # (B,)
    noise = torch.rand(ids.shape, generator=generator)  # (B, L)
    masked = (noise < t[:, None]) & (prompt_len[:, None] <= pos)  # (B, L)
    noisy_ids = ids.masked_fill(masked, model.config.mask_token_id)
    logits = model(input_ids=noisy_ids).logits[masked]  # (M, V)
    fillers = LLaDAConfig().embedding_size - (model.config.embedding_size - 1)
    weight = torch.zeros(logits.shape[1])  # (V,)
    weight[-1] = math.log(fillers)
    nll = cross_entropy(logits + weight, ids[masked], reduction="none")  # (M,)
    count = masked.sum(1, keepdim=True).expand_as(masked)[masked]  # (M,)
    return (nll / count).sum() / rows


def pretrain(model, loss_of, ids, prompt_len, steps, batch_size, peak_lr, generator):
    """Train `model` on ids (N, L) and prompt_len (N,), with warm-up and cosine.

    loss_of(model, ids, prompt_len) gives the loss of `batch_size` of these rows.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    bar = tqdm(range(1, steps + 1), desc="pretrain", unit=" steps")
    for step in bar:
        warm = min(1, step / 100)
        rest = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak_lr * warm * rest
        chosen = torch.randint(len(ids), (batch_size,), generator=generator)
        loss = loss_of(model, ids[chosen], prompt_len[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def make_base(path):
    """Pretrain the base on worked-out answers, then on the habit; see `write_base`."""
    _, _, rows, habit = splits(TRAIN_ROWS, TEST_ROWS, PRETRAIN_ROWS, HABIT_ROWS)
    stages = [(rows, PRETRAIN_STEPS, PRETRAIN_LR), (habit, HABIT_STEPS, HABIT_LR)]
    write_base(path, SHAPE, stages, PRETRAIN_BATCH)


def write_base(path, shape, stages, batch_size):
    """Pretrain a base in stages (problems, steps, peak LR); writes its weights in bf16 to `path`.

    The rows of its embedding and head are those of `list_ids`; the last one is every other id's.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    tokenizer = build_tokenizer(wide=False)
    config = make_config(tokenizer, shape)
    config.embedding_size = config.vocab_size + 1
    config.init_std = INIT_STD
    model = LLaDAModelLM(config).train()
    loss_of = partial(denoising_loss, generator=generator)
    for rows, steps, peak_lr in stages:
        ids, prompt_len = encode(tokenizer, rows)
        pretrain(model, loss_of, ids, prompt_len, steps, batch_size, peak_lr, generator)
    state = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(state, path)


# ------- folders
def make_config(tokenizer, shape):
    """The configuration of a model with this tokenizer."""
    vocabulary = LLaDAConfig().vocab_size
    if len(tokenizer) < min(SPECIAL_TOKENS):
        vocabulary = len(tokenizer)
    return LLaDAConfig(
        **shape,
        vocab_size=vocabulary,
        mask_token_id=tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def load_base(path, ids, vocabulary):
    """The weights in `path`, their embedding and head spread over `vocabulary` ids."""
    state = load_file(path)
    for name in EMBEDDINGS:
        own, filler = state[name][:-1], state[name][-1]
        state[name] = filler.repeat(vocabulary, 1)  # (V, d_model)
        state[name][ids] = own
    return state


def write_model(folder, wide, base, shape):
    """Write a model folder that brings its code along, as LLaDA's does."""
    tokenizer = build_tokenizer(wide)
    config = make_config(tokenizer, shape)
    torch.manual_seed(SEED)
    model = LLaDAModelLM(config)
    if base is not None:
        model.load_state_dict(load_base(base, list_ids(wide), config.embedding_size))
    config.architectures = ["LLaDAModelLM"]
    config.auto_map = {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    }
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in Path(__file__).with_name("llada").glob("*.py"):
        shutil.copy(path, folder)


def build(folder, wide=True, base=BASE, train_rows=TRAIN_ROWS, test_rows=TEST_ROWS, shape=SHAPE):
    """Make `folder`/model and `folder`/data/{train,test}.jsonl; both appear only when whole.

    Args:
        wide: LLaDA's vocabulary and ids; otherwise only the toy's own, special ones last.
        base: the file of the weights, which must fit `shape`; None: random weights.

    Raises:
        SystemExit: if `folder` has one of them already, or cannot be written.
    """
    folder = Path(folder)
    for name in ("model", "data"):
        if (folder / name).exists():
            sys.exit(f"{folder / name} exists already; give another folder")
    unfinished = folder / f"partial-{os.getpid()}"
    try:
        (unfinished / "data").mkdir(parents=True)
    except OSError as error:
        sys.exit(f"{folder} cannot be written ({error.strerror}); give another folder")
    test, train, _, _ = splits(train_rows, test_rows)
    write_rows(unfinished / "data" / "test.jsonl", test)
    write_rows(unfinished / "data" / "train.jsonl", train)
    write_model(unfinished / "model", wide, base, shape)
    for name in ("data", "model"):
        os.rename(unfinished / name, folder / name)
    unfinished.rmdir()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(args):
    if args.output:
        build(args.output, wide=not args.narrow)
        print(f"built {args.output}/model and {args.output}/data")
        return
    if BASE.exists() and not args.overwrite:
        sys.exit(f"{BASE} exists already; give --overwrite to replace it")
    make_base(BASE)
    print(f"wrote {BASE}, {BASE.stat().st_size:,} bytes")


def parse_args(argv=None):
    parser = suite.make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", metavar="DIR", help="folder to make model and data in")
    again = f"make {BASE.name} again; about 5 minutes on one core"
    what.add_argument("--pretrain", action="store_true", help=again)
    parser.add_argument("--narrow", action="store_true", help="only the toy's own ids")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {BASE.name}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
