"""Preprocess MetaMathQA into the `.pt` file that both trainers read.

    python pt.py                                                  # MetaMathQA -> MathQA_256.pt
    python pt.py --dataset rows.jsonl --filter_type "" --output rows.pt

Each row becomes one conversation, rendered with the model's chat template: the user asks `query`
in MetaMath's prompt, and the assistant answers with `response`. The output is a list of
`{"prompt_len": int, "full_ids": LongTensor}`. The first `prompt_len` ids are the prompt, up to and
including the assistant header; the others are the answer and its end-of-turn token.
The dataset is on the hub, a folder, or a file: .json, .jsonl, .parquet or .csv.
Guide: experiments/docs/running.md.
"""

import argparse
import csv
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager

import datasets
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

PROMPT = (  # MetaMath's
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: Let's think step by step."
)
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
BATCH_ROWS = 1000  # rows rendered and encoded together
OUTCOMES = ("read", "filtered by type", "malformed", "unfit", "too long", "kept")
NAMED_ROWS = 3  # of those that do not fit the chat template or the tokenizer


# ------- from rows to tokens
def preprocess(rows, tokenizer, max_len, max_samples, filter_type):
    """Render, encode and filter rows, in order, until `max_samples` are kept (0: all).

    Args:
        rows: `datasets.Dataset` with columns `query`, `response` and, optionally, `type`.

    Returns:
        samples: list of `{"prompt_len": int, "full_ids": LongTensor of at most max_len ids}`.
        counts: Counter of OUTCOMES.

    Raises:
        SystemExit: if the chat template or the tokenizer fits none of the first rows.
        UnicodeDecodeError: if a text is not UTF-8.
    """
    columns = [name for name in ("type", "query", "response") if name in rows.column_names]
    rows = rows.select_columns(columns)
    limit = max_samples or len(rows)
    samples = []
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    with tqdm(total=len(rows), unit=" rows", desc="preprocess") as bar:
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            outcomes, encoded, notes = process_batch(batch, tokenizer, max_len, filter_type)
            named = list(notes.items())[: max(0, NAMED_ROWS - counts["unfit"])]
            if notes and not samples and set(outcomes) == {"unfit"}:
                what = f"--model {tokenizer.name_or_path} fits none of the first {len(notes)} rows"
                sys.exit(f"{what}: {named[0][1]}; give another model or template")
            for i, note in named:
                bar.write(f"row {start + i + 1} is left out: {note}", file=sys.stderr)
            kept = [i for i, outcome in enumerate(outcomes) if outcome == "kept"]
            kept = kept[: limit - len(samples)]
            samples += to_tensors([encoded[i] for i in kept])
            done = len(samples) == limit
            if done:  # rows after the last sample count as not read
                outcomes = outcomes[: kept[-1] + 1]
            counts.update(outcomes, read=len(outcomes))
            bar.update(len(outcomes))
            if done:
                break
    return samples, counts


def process_batch(batch, tokenizer, max_len, filter_type):
    """Render, encode and judge a batch of rows, a dict of columns.

    Returns:
        outcomes: list of str, one per row.
        samples: list of `(prompt_len, list of ids)`, one per row; None for rows that are not kept.
        notes: {row: why the chat template or the tokenizer does not fit it}.
    """
    queries = batch["query"]
    responses = batch["response"]
    row_types = batch.get("type", [None] * len(queries))
    special = special_token_pattern(tokenizer)
    outcomes = []
    for row_type, query, response in zip(row_types, queries, responses, strict=True):
        outcomes.append(judge(row_type, query, response, filter_type, special))
    samples = [None] * len(outcomes)
    chosen = [i for i, outcome in enumerate(outcomes) if outcome == "kept"]
    rendered = render_rows(tokenizer, [(queries[i], responses[i]) for i in chosen])
    notes = {i: found for i, found in zip(chosen, rendered, strict=True) if isinstance(found, str)}
    fitting = {i: found for i, found in zip(chosen, rendered, strict=True) if i not in notes}
    if fitting:
        prompts, texts = zip(*fitting.values(), strict=True)
        options = {"add_special_tokens": False, "verbose": False}
        prompts_ids = tokenizer(list(prompts), **options)["input_ids"]  # as in decoding
        texts_ids = tokenizer(list(texts), **options)["input_ids"]
        for i, prompt_ids, ids in zip(fitting, prompts_ids, texts_ids, strict=True):
            prompt_len = len(prompt_ids)
            if len(ids) > max_len:
                outcomes[i] = "too long"
            elif ids[:prompt_len] != prompt_ids or prompt_len == len(ids):
                notes[i] = "before the answer, its prompt ends in other tokens than in decoding"
            else:
                samples[i] = prompt_len, ids
    for i in notes:
        outcomes[i] = "unfit"
    return outcomes, samples, notes


def judge(row_type, query, response, filter_type, special):
    """The outcome of a row before it is encoded: "filtered by type", "malformed" or "kept".

    A row is malformed if its query or response is missing, or spells a special token, such as
    `<|mdm_mask|>`, which would be encoded as the token itself.
    """
    if filter_type and isinstance(row_type, str) and filter_type in row_type:
        return "filtered by type"
    for text in (query, response):
        if not isinstance(text, str) or not text.strip() or special.search(text):
            return "malformed"
    return "kept"


def special_token_pattern(tokenizer):
    """A regular expression that finds the tokenizer's special tokens in a text."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = "|".join(re.escape(content) for content in special)
    return re.compile(pattern or "(?!)")  # (?!) matches nothing


def render_rows(tokenizer, rows):
    """Render (query, response) rows: (prompt, text) of each, or a str, why it does not fit."""
    header = find_trailing_header(tokenizer)
    try:
        pairs = list(zip(*render_all(tokenizer, header, *zip(*rows, strict=True)), strict=True))
    except Exception:  # a template is a program and can fail in any way, on one row of many
        pairs = []
        for query, response in rows:
            try:
                ((prompt,), (text,)) = render_all(tokenizer, header, [query], [response])
                pairs.append((prompt, text))
            except Exception as error:
                pairs.append(f"the chat template fails ({first_line(error)})")
    found = []
    for pair, (query, response) in zip(pairs, rows, strict=True):
        found.append(pair if isinstance(pair, str) else misfit(*pair, query, response) or pair)
    return found


def misfit(prompt, text, query, response):
    """Why a conversation cannot be trained on, as a str; None if it can."""
    if not text.startswith(prompt):
        return f"the chat template does not continue the prompt {prompt[-60:]!r} with the answer"
    if PROMPT.format(query=query).strip() not in prompt:
        return "the chat template drops the query, or a part of it"
    if response.strip() not in text[len(prompt) :]:
        return "the chat template drops the response, or a part of it"
    return None


def render_all(tokenizer, header, queries, responses):
    """The prompts and texts of conversations as the template renders them; fails as it does."""
    questions = [[{"role": "user", "content": PROMPT.format(query=query)}] for query in queries]
    answers = [[{"role": "assistant", "content": response}] for response in responses]
    whole = [question + answer for question, answer in zip(questions, answers, strict=True)]
    prompts = tokenizer.apply_chat_template(questions, tokenize=False, add_generation_prompt=True)
    texts = tokenizer.apply_chat_template(whole, tokenize=False)
    return prompts, [text.removesuffix(header) for text in texts]


def render(tokenizer, header, queries, responses):
    """Render the queries and responses with the chat template.

    Returns:
        prompts: list of str, each up to and including the assistant header.
        texts: list of str, the whole conversations, without the trailing `header`.

    Raises:
        SystemExit: if the template fails, or a conversation does not begin with its prompt.
    """
    template = f"--model {tokenizer.name_or_path}: its chat template"
    try:
        prompts, texts = render_all(tokenizer, header, queries, responses)
    except Exception as error:  # a template is a program and can fail in any way
        sys.exit(f"{template} fails ({first_line(error)}); give another model or template")
    for prompt, text in zip(prompts, texts, strict=True):
        if not text.startswith(prompt):
            sys.exit(
                f"{template} does not continue the prompt {prompt[-60:]!r} with the answer "
                f"but renders {text[-200:]!r}; use one whose conversations begin with the prompt"
            )
    return prompts, texts


def find_trailing_header(tokenizer):
    """The assistant header that the template adds after *every* conversation; "" if it does not.

    LLaDA's template ignores `add_generation_prompt` and always ends with the header. An assistant
    turn rendered alone shows what the header is. A template that refuses such a turn adds none.
    """
    probe = "assistant-turn-probe"
    answer = [{"role": "assistant", "content": probe}]
    question = [{"role": "user", "content": probe}]
    try:
        answer_text = tokenizer.apply_chat_template(answer, tokenize=False)
        question_text = tokenizer.apply_chat_template(question, tokenize=False)
    except Exception:  # a template is a program and can fail in any way
        return ""
    header = answer_text.partition(probe)[0].removeprefix(tokenizer.bos_token or "")
    return header if question_text.endswith(header) else ""


def to_tensors(samples):
    """Turn the samples `(prompt_len, ids)` of a batch into the dicts that are saved.

    Their tensors share one storage, because saving and loading one storage per row is slow.
    """
    if not samples:
        return []
    arrays = [np.array(ids) for _, ids in samples]
    joined = torch.from_numpy(np.concatenate(arrays))
    pieces = joined.split([len(array) for array in arrays])
    return [
        {"prompt_len": prompt_len, "full_ids": full_ids}
        for (prompt_len, _), full_ids in zip(samples, pieces, strict=True)
    ]


# ------- the run
def main(args):
    """Run all checks, then preprocess, save and report."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is reported once, here
    check_output(args.output, args.dataset, args.overwrite)
    with no_incomplete_file(args.output):
        tokenizer = load_tokenizer(args.model, args.model_revision)
        rows = load_rows(args.dataset, args.split)
        try:
            samples, counts = preprocess(
                rows, tokenizer, args.max_len, args.max_samples, args.filter_type
            )
        except UnicodeDecodeError as error:
            sys.exit(
                f"--dataset {args.dataset} is not UTF-8 text ({first_line(error)}); convert it"
            )
        outcome = ", ".join(f"{count} {name}" for name, count in counts.items())
        if not samples:
            sys.exit(
                f"no row is kept ({outcome}); check --dataset {args.dataset}, "
                f"--max_len {args.max_len} and --filter_type {args.filter_type!r}"
            )
        save(samples, args.output)
    print(f"rows: {outcome}")
    report(samples, tokenizer)
    print(f"wrote {args.output}")


# ------- reading
def load_tokenizer(model, revision="main"):
    """The model's tokenizer with its chat template; raises SystemExit if there is none."""
    try:
        # the last argument keeps transformers 4.57.6 from a warning about Mistral's tokenizers
        tokenizer = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=True, fix_mistral_regex=False
        )
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        why = first_line(error)
        sys.exit(f"--model {model}: no tokenizer there ({why}); give a hub id or a model folder")
    if not tokenizer.chat_template:
        sys.exit(f"--model {model} has no chat template; give an Instruct model, or add a template")
    return tokenizer


def load_rows(dataset, split):
    """A split of a hub dataset, a folder or a file, as a `datasets.Dataset`.

    Raises SystemExit if it cannot be read, or has no `query` or no `response`.
    """
    suffix = os.path.splitext(dataset)[1].lower()
    is_file = os.path.isfile(dataset)
    if not dataset or (is_file and os.path.getsize(dataset) == 0):
        sys.exit(f"--dataset {dataset!r} is empty; give a hub id, a folder or a file with rows")
    if is_file and suffix not in FILE_TYPES:
        sys.exit(f"--dataset {dataset}: a file must be one of {', '.join(FILE_TYPES)}; convert it")
    if suffix in FILE_TYPES and not os.path.exists(dataset):
        sys.exit(f"--dataset {dataset}: no such file; check the path")
    try:
        if is_file:
            if FILE_TYPES[suffix] == "json":
                check_lines(dataset)
            # A file has no splits. It becomes the one asked for, so that `train[:100]` is a slice.
            files = {split.partition("[")[0]: dataset}
            options = text_columns(dataset) if suffix == ".csv" else {}
            rows = datasets.load_dataset(
                FILE_TYPES[suffix], data_files=files, split=split, **options
            )
        elif os.path.isdir(dataset):
            rows = datasets.load_dataset(os.path.abspath(dataset), split=split)  # "." has no name
        else:
            rows = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # the hub, pyarrow and the parsers fail in many ways
        cause = first_line(error.__cause__ or error)
        sys.exit(
            f"--dataset {dataset} --split {split!r} cannot be read ({cause}); "
            "give a hub id, a folder or a file, and one of its splits"
        )
    if not {"query", "response"} <= set(rows.column_names):
        columns = ", ".join(rows.column_names)
        remedy = f"rename its columns ({columns}) to query and response"
        if any(not isinstance(feature, datasets.Value) for feature in rows.features.values()):
            remedy = f"flatten its columns ({columns}) into the texts query and response, such as"
            remedy += ' query = messages[0]["content"], response = messages[1]["content"]'
        sys.exit(f"--dataset {dataset}: {remedy}")
    return rows


def text_columns(path):
    """Options with which datasets reads all cells of a CSV file as they are written."""
    with open(path, newline="", encoding="utf-8") as file:
        names = next(csv.reader(file))
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "na_filter": False}


def check_lines(path):
    """Raise SystemExit if a line of a JSON file is a bare value: pyarrow can crash on `null`."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if re.match(rb"null|true|false|-?\d", line):
                value = line[:60].strip().decode(errors="replace")
                sys.exit(f"--dataset {path}: line {number} is {value}, not a row; remove it")


def first_line(error):
    """The type of an exception and the first line of its message, at most 300 characters."""
    lines = str(error).strip().splitlines() or ["no details"]
    return f"{type(error).__name__}: {lines[0]:.300}"


# ------- writing
def check_output(output, dataset, overwrite):
    """Raise SystemExit if `output` is the dataset, may not be replaced, or cannot be written."""
    exists = os.path.exists(output)
    if not output or (exists and not os.path.isfile(output)):
        sys.exit(f"--output {output!r} is not a file; give the name of one")
    if exists and os.path.exists(dataset) and os.path.samefile(output, dataset):
        sys.exit(f"--output {output} is the --dataset itself; give another name")
    if exists and not overwrite:
        sys.exit(f"--output {output} exists; give another name, or --overwrite to replace it")
    folder = os.path.dirname(os.path.abspath(output))
    while not os.path.exists(folder):  # `save` creates what is missing
        folder = os.path.dirname(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=os.path.basename(output)):
            pass
    except OSError as error:
        why = error.strerror
        sys.exit(f"--output {output} cannot be written ({why}); give a path in a writable folder")


def save(samples, output):
    """Write `samples` to a temporary file and rename it, so that `output` appears only when whole.

    Raises SystemExit if it cannot be written.
    """
    temporary = temporary_name(output)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(samples, file)
            os.fsync(file.fileno())
        os.replace(temporary, output)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        why = first_line(error)
        sys.exit(f"--output {output} cannot be written ({why}); free space, or give another path")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def temporary_name(output):
    return f"{output}.tmp-{os.getpid()}"


@contextmanager
def no_incomplete_file(output):
    """Ctrl-C and `kill` print one message and leave no temporary file.

    The process ends in the handler, because libraries catch some of the exceptions raised in them.
    """

    def stop(signal_number, frame):
        if os.path.exists(temporary_name(output)):
            os.remove(temporary_name(output))
        name = signal.Signals(signal_number).name
        os.write(2, f"\nstopped by {name}; no incomplete file is left\n".encode())
        os._exit(128 + signal_number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(samples, tokenizer):
    """Print the lengths, and the first sample's prompt and answer."""
    lengths = [len(sample["full_ids"]) for sample in samples]
    prompt_len = samples[0]["prompt_len"]
    full_ids = samples[0]["full_ids"]
    print(f"tokens: longest {max(lengths)}, mean {sum(lengths) / len(lengths):.1f}")
    print(f"--- the first sample's prompt, {prompt_len} tokens:")
    print(tokenizer.decode(full_ids[:prompt_len]))
    print(f"--- its answer, {len(full_ids) - prompt_len} tokens:")
    print(tokenizer.decode(full_ids[prompt_len:]))
    print("---")


# ------- flags
def parse_args(argv=None):
    """The flags. A wrong one ends the process with status 2 and a message."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", default="MathQA_256.pt", help="file to write (%(default)s)")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--model", default="GSAI-ML/LLaDA-8B-Instruct", help="hub id or folder (%(default)s)")
    add("--model_revision", default="main", help="branch, tag or commit on the hub (%(default)s)")
    add("--dataset", default="meta-math/MetaMathQA", help="hub id, folder or file (%(default)s)")
    add("--split", default="train", help="split of the dataset (%(default)s)")
    add("--max_len", type=int, default=256, help="skip rows with more tokens (%(default)s)")
    add("--max_samples", type=int, default=20000, help="rows to keep, 0 = all (%(default)s)")
    add("--filter_type", default="GSM", help='skip types with this in it, "" = none (%(default)s)')
    args = parser.parse_args(argv)
    if args.max_len < 2:
        parser.error(f"--max_len {args.max_len}: give 2 or more, for a prompt and an answer")
    if args.max_samples < 0:
        parser.error(f"--max_samples {args.max_samples}: give a number of rows, or 0 for all")
    return args


if __name__ == "__main__":
    main(parse_args())
