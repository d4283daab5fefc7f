"""Preprocess MetaMathQA into the `.pt` file that both trainers read.

    python pt.py                                                  # MetaMathQA -> MathQA_256.pt
    python pt.py --dataset rows.jsonl --filter_type "" --output rows.pt

Every row becomes one conversation, rendered with the model's chat template: the user asks `query`
in MetaMath's prompt, the assistant answers with `response`. The output is a list of
`{"prompt_len": int, "full_ids": LongTensor}`; ids before `prompt_len` are the prompt, up to and
including the assistant header, the others are the answer with its end-of-turn token.
"""

import argparse
import os
import re
import sys
from bisect import bisect_left
from collections import Counter
from functools import partial
from itertools import chain

import numpy as np
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm
from transformers import AutoTokenizer

PROMPT = (  # MetaMath's
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: Let's think step by step."
)
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
BATCH_ROWS = 1000  # rows rendered and encoded at once


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="MathQA_256.pt", help="file to write (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument(
        "--model", default="GSAI-ML/LLaDA-8B-Instruct", help="hub id or folder (%(default)s)"
    )
    parser.add_argument(
        "--model_revision",
        default="main",
        help="of a hub model: branch, tag or commit (%(default)s)",
    )
    parser.add_argument(
        "--dataset",
        default="meta-math/MetaMathQA",
        help="hub id, folder, or .json/.jsonl/.parquet/.csv (%(default)s)",
    )
    parser.add_argument("--split", default="train", help="split of the dataset (%(default)s)")
    parser.add_argument(
        "--max_len", type=int, default=256, help="skip longer rows, in tokens (%(default)s)"
    )
    parser.add_argument(
        "--max_samples",
        type=int,
        default=20000,
        help="stop after so many rows, 0 = all (%(default)s)",
    )
    parser.add_argument(
        "--filter_type", default="GSM", help='skip types that contain this, "" = none (%(default)s)'
    )
    cores = min(16, len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--num_workers", type=int, default=cores, help="processes, 0 = this one alone (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.num_workers < 0:
        parser.error(f"--num_workers {args.num_workers}: must be 0 (none but this process) or more")
    if args.max_len < 2:
        parser.error(
            f"--max_len {args.max_len}: needs at least 2 tokens, one of the prompt and one of the answer"
        )
    if args.max_samples < 0:
        parser.error(f"--max_samples {args.max_samples}: must be 0 (all rows) or more")
    return args


def first_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0]}"


def claim_output(output, overwrite):
    """Make `output`'s folder and open `output`.tmp-PID there, so that an unwritable place shows first.

    Raises:
        SystemExit: if `output` exists and may not be replaced, or cannot be written.
    """
    if not output or (os.path.exists(output) and not os.path.isfile(output)):
        sys.exit(f"--output {output!r} is not a file; give the name of one")
    if os.path.exists(output) and not overwrite:
        sys.exit(
            f"--output {output} exists already; give another name, or --overwrite to replace it"
        )
    try:
        os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
        return open(f"{output}.tmp-{os.getpid()}", "wb")
    except OSError as error:
        sys.exit(
            f"--output {output} cannot be written ({error.strerror}); give a path in a writable folder"
        )


def load_tokenizer(model, revision="main"):
    """The model's fast tokenizer with its chat template.

    Raises:
        SystemExit: if it cannot be loaded, gives no offsets or has no chat template.
    """
    try:
        # the flag only keeps transformers 4.57.6 from warning of a fault that Mistral's tokenizers have
        how = {"revision": revision, "trust_remote_code": True, "fix_mistral_regex": False}
        tokenizer = AutoTokenizer.from_pretrained(model, **how)
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        sys.exit(
            f"--model {model}: no tokenizer there ({first_line(error)}); give a hub id or a model folder"
        )
    if not tokenizer.is_fast:
        sys.exit(
            f"--model {model}: its tokenizer is not a fast one and gives no offsets; the folder needs tokenizer.json"
        )
    if not tokenizer.chat_template:
        sys.exit(
            f"--model {model}: its tokenizer has no chat template; use an Instruct model or add one to its folder"
        )
    return tokenizer


def load_rows(dataset, split):
    """The rows of a hub dataset, a local folder or a local file.

    Raises:
        SystemExit: if the dataset or its split cannot be read, or lacks `query` or `response`.
    """
    suffix = os.path.splitext(dataset)[1].lower()
    if not dataset or (os.path.isfile(dataset) and os.path.getsize(dataset) == 0):
        sys.exit(f"--dataset {dataset!r} is empty; give a hub id, a folder or a file")
    try:
        if os.path.isfile(dataset):
            if suffix not in FILE_TYPES:
                sys.exit(f"--dataset {dataset}: a file must be one of {', '.join(FILE_TYPES)}")
            # a file has no splits of its own: it is the one asked for, of which `train[:100]` takes a slice
            files = {split.partition("[")[0]: dataset}
            rows = load_dataset(FILE_TYPES[suffix], data_files=files, split=split)
        elif suffix in FILE_TYPES:
            sys.exit(f"--dataset {dataset}: no such file")
        else:
            rows = load_dataset(dataset, split=split)
    except Exception as error:  # the hub, pyarrow and the parsers fail in many ways
        cause = first_line(error.__cause__ or error)
        sys.exit(
            f"--dataset {dataset} --split {split} cannot be read ({cause}); give a hub id, a folder or a file"
        )
    if missing := {"query", "response"} - set(rows.column_names):
        columns = ", ".join(rows.column_names)
        sys.exit(
            f"--dataset {dataset}: no column {' or '.join(sorted(missing))} among {columns}; rename its columns"
        )
    return rows


def find_trailing_header(tokenizer):
    """The assistant header that the template puts behind *every* conversation; "" if it does not.

    LLaDA's template ignores `add_generation_prompt` and always ends with the header. What the header is
    shows where an assistant turn stands alone; a template that refuses such a turn is an ordinary one.
    """
    probe = "assistant-turn-probe"
    try:
        alone = tokenizer.apply_chat_template(
            [{"role": "assistant", "content": probe}], tokenize=False
        )
        question = tokenizer.apply_chat_template(
            [{"role": "user", "content": probe}], tokenize=False
        )
    except Exception:  # a template is a program of its own
        return ""
    header = alone.partition(probe)[0].removeprefix(tokenizer.bos_token or "")
    return header if question.endswith(header) else ""


def render(tokenizer, header, queries, responses):
    """Prompts (with the assistant header) and whole conversations (without a trailing one), as text.

    Raises:
        SystemExit: if a conversation does not begin with its prompt, so that there is no boundary.
    """
    users = [[{"role": "user", "content": PROMPT.format(query=query)}] for query in queries]
    whole = [
        user + [{"role": "assistant", "content": response}]
        for user, response in zip(users, responses, strict=True)
    ]
    try:
        prompts = tokenizer.apply_chat_template(users, tokenize=False, add_generation_prompt=True)
        texts = [
            text.removesuffix(header)
            for text in tokenizer.apply_chat_template(whole, tokenize=False)
        ]
    except Exception as error:  # a template is a program of its own
        sys.exit(
            f"--model {tokenizer.name_or_path}: its chat template fails ({first_line(error)}); give another model"
        )
    for prompt, text in zip(prompts, texts, strict=True):
        if not text.startswith(prompt):
            sys.exit(
                f"--model {tokenizer.name_or_path}: its chat template does not continue the prompt {prompt[-60:]!r} "
                f"with the answer but renders {text[-200:]!r}; use a template whose conversations begin with the prompt"
            )
    return prompts, texts


def encode(tokenizer, prompts, texts, max_len):
    """One sample `(prompt_len, list of ids)` per text, None for texts of more than `max_len` tokens.

    Each conversation is encoded once, as a whole; its prompt is the tokens that start before the prompt text ends.
    Differs from the published script (P6): there the prompt was encoded alone, which is off by one where a
    tokenizer joins characters across the boundary, and 2 for every row on transformers 5.
    """
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    samples = []
    for prompt, ids, encoding in zip(prompts, encoded["input_ids"], encoded.encodings, strict=True):
        sample = None
        if len(ids) <= max_len:
            start = lambda token, encoding=encoding: encoding.token_to_chars(token)[
                0
            ]  # its first character
            prompt_len = bisect_left(range(len(ids)), len(prompt), key=start)
            sample = (prompt_len, ids)
        samples.append(sample)
    return samples


def judge(kind, query, response, filter_type, spells_special):
    """What becomes of a row by its text alone: "filtered by type", "malformed" or "kept"."""
    if filter_type and isinstance(kind, str) and filter_type in kind:
        return "filtered by type"
    texts = [
        text
        for text in (query, response)
        if isinstance(text, str) and text.strip() and not spells_special(text)
    ]
    return "kept" if len(texts) == 2 else "malformed"


def process(batch, tokenizer, header, max_len, filter_type):
    """What becomes of each row of a batch (dict of columns): [("kept", (prompt_len, ids)) or (why not, None)].

    Malformed are rows without text, without an answer in the template's rendering, and rows whose text spells a
    special token, such as `<|mdm_mask|>`, which would be encoded as the token itself.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spells_special = re.compile("|".join(map(re.escape, special)) or "(?!)").search
    queries, responses = batch["query"], batch["response"]
    rows = zip(batch.get("type") or [None] * len(queries), queries, responses, strict=True)
    outcomes = [(judge(*row, filter_type, spells_special), None) for row in rows]
    chosen = [i for i, (outcome, _) in enumerate(outcomes) if outcome == "kept"]
    if not chosen:
        return outcomes
    texts = render(tokenizer, header, [queries[i] for i in chosen], [responses[i] for i in chosen])
    for i, sample in zip(chosen, encode(tokenizer, *texts, max_len), strict=True):
        if sample is None:
            outcomes[i] = ("too long", None)
        else:
            prompt_len, ids = sample
            outcomes[i] = ("kept", sample) if prompt_len < len(ids) else ("malformed", None)
    return outcomes


def work(start, rows, **how):
    """`process` on the rows from `start`, in a form that costs little to send from one process to another.

    Returns:
        outcomes: list of str, one a row.
        prompt_lens, lengths: lists of int, one a kept row.
        ids: (sum of lengths,) int64, those of the kept rows, one after the other.
    or, instead, the SystemExit or UnicodeDecodeError with which to end: a worker's own would not reach the user.
    """
    if get_worker_info() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes use all cores already
    try:
        outcomes = process(rows[start : start + BATCH_ROWS], **how)
    except (SystemExit, UnicodeDecodeError) as error:
        return error
    kept = [sample for _, sample in outcomes if sample]
    ids = np.fromiter(chain.from_iterable(ids for _, ids in kept), np.int64)
    return (
        [outcome for outcome, _ in outcomes],
        [prompt_len for prompt_len, _ in kept],
        [len(i) for _, i in kept],
        ids,
    )


def read_batches(rows, num_workers, how):
    """Yields what `work` makes of each batch of rows, in order, and raises what it returns instead."""
    starts = range(0, len(rows), BATCH_ROWS)
    workers = min(num_workers, len(starts)) if len(starts) > 1 else 0
    how = {
        "collate_fn": partial(work, rows=rows, **how),
        "multiprocessing_context": "fork" if workers else None,
    }
    for batch in DataLoader(starts, batch_size=None, num_workers=workers, **how):
        if isinstance(batch, BaseException):
            raise batch
        yield batch


def cut(outcomes, prompt_lens, lengths, ids, room):
    """What `work` has made of a batch, up to and with the `room`-th kept row."""
    if room > len(lengths):
        return outcomes, prompt_lens, lengths, ids
    kept = [i for i, outcome in enumerate(outcomes) if outcome == "kept"]
    return (
        outcomes[: kept[room - 1] + 1],
        prompt_lens[:room],
        lengths[:room],
        ids[: sum(lengths[:room])],
    )


def preprocess(rows, tokenizer, max_len, max_samples, filter_type, num_workers=0):
    """Render, encode and filter `rows` (a `datasets.Dataset`) in order, until `max_samples` (0 = all) are kept.

    The rows are shared out to `num_workers` processes in batches; the result does not depend on their number.

    Returns:
        samples: list of `{"prompt_len": int, "full_ids": LongTensor of at most max_len ids}`. The tensors of a batch
            share their storage, which takes less time and memory to save and to load.
        counts: Counter of rows read, filtered by type, malformed, too long, kept.

    Raises:
        SystemExit: if the chat template fails.
        RuntimeError: if a process is killed.
    """
    how = {"tokenizer": tokenizer, "header": find_trailing_header(tokenizer)}
    how |= {"max_len": max_len, "filter_type": filter_type}
    rows = rows.select_columns(
        [name for name in ("type", "query", "response") if name in rows.column_names]
    )
    counts = Counter(
        dict.fromkeys(("read", "filtered by type", "malformed", "too long", "kept"), 0)
    )
    samples = []
    with tqdm(total=len(rows), unit=" rows", desc="preprocess") as bar:
        for batch in read_batches(rows, num_workers, how):
            outcomes, prompt_lens, lengths, ids = (
                cut(*batch, max_samples - len(samples)) if max_samples else batch
            )
            pieces = zip(
                prompt_lens, torch.from_numpy(ids).split(lengths) if lengths else (), strict=True
            )
            samples += [
                {"prompt_len": prompt_len, "full_ids": full_ids} for prompt_len, full_ids in pieces
            ]
            counts.update(outcomes, read=len(outcomes))
            bar.update(len(outcomes))
            if max_samples and len(samples) == max_samples:
                break
    return samples, counts


def save(samples, file, output):
    """Write `samples` to the open temporary `file` and rename it to `output`, which so appears only when whole."""
    try:
        with file:
            torch.save(samples, file)
            os.fsync(file.fileno())
        os.replace(file.name, output)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        sys.exit(
            f"--output {output} cannot be written ({first_line(error)}); free some space, or give another path"
        )


def report(samples, counts, tokenizer):
    """Print the counts, the lengths and one sample, prompt and answer apart."""
    lengths = [len(sample["full_ids"]) for sample in samples]
    print("rows: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    print(f"tokens: longest {max(lengths)}, mean {sum(lengths) / len(lengths):.1f}")
    prompt_len, full_ids = samples[0]["prompt_len"], samples[0]["full_ids"]
    print(
        f"--- the first sample's prompt, {prompt_len} tokens:\n{tokenizer.decode(full_ids[:prompt_len])}"
    )
    print(
        f"--- its answer, {len(full_ids) - prompt_len} tokens:\n{tokenizer.decode(full_ids[prompt_len:])}\n---"
    )


def main():
    args = parse_args(sys.argv[1:])
    if (
        os.path.exists(args.output)
        and os.path.exists(args.dataset)
        and os.path.samefile(args.output, args.dataset)
    ):
        sys.exit(f"--output {args.output} is the --dataset itself; give another name")
    file = claim_output(args.output, args.overwrite)
    try:
        tokenizer = load_tokenizer(args.model, args.model_revision)
        rows = load_rows(args.dataset, args.split)
        how = (args.max_len, args.max_samples, args.filter_type, args.num_workers)
        samples, counts = preprocess(rows, tokenizer, *how)
        if not samples:
            outcome = ", ".join(f"{count} {name}" for name, count in counts.items())
            sys.exit(
                f"no row is left ({outcome}); look at --max_len {args.max_len}, --filter_type and --dataset"
            )
        save(samples, file, args.output)
    except UnicodeDecodeError as error:
        sys.exit(f"--dataset {args.dataset} is not UTF-8 text ({first_line(error)}); convert it")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(
            f"a process was killed, of {args.num_workers}; nothing was written: give a lower --num_workers"
        )
    finally:
        if os.path.exists(file.name):
            os.remove(file.name)
    report(samples, counts, tokenizer)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
