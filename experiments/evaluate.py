"""Accuracy of a checkpoint or base model: block decoding of a test set, graded with math-verify.

    python experiments/evaluate.py --model CHECKPOINT --dataset gsm8k --output results/blockwise
    deepspeed --num_gpus 8 experiments/evaluate.py --model CHECKPOINT --dataset math500 --output DIR
    python experiments/evaluate.py --model M --dataset rows.jsonl --output DIR --block_length 8

Each line of a local .jsonl has a `query`, and an `answer` or `response`. The prompts are those of
pt.py. Each process generates every n-th batch and appends the answers to DIR/generations.jsonl; the
process that completes this file grades all answers and writes DIR/summary.json. To resume an
evaluation that was stopped, give the same command again.
"""

import argparse
import fcntl
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from glob import escape, glob
from importlib.metadata import version

from decode_flags import add_decoding_flags, add_model_flags, check_flags, decode_options

BENCHMARKS = {  # hub id, configuration, split, columns of question and answer
    "gsm8k": ("openai/gsm8k", "main", "test", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", "default", "test", "problem", "answer"),
}
LIBRARIES = ("torch", "transformers", "math-verify", "sympy")  # their versions can change verdicts


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_decoding_flags(parser)
    parser.add_argument(
        "--dataset", required=True, help=f"{', '.join(BENCHMARKS)}, or a .jsonl file"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="for generations.jsonl and summary.json"
    )
    parser.add_argument("--limit", type=int, help="use only the first problems (all)")
    parser.add_argument(
        "--batch_size", type=int, default=16, help="answers at a time per process (%(default)s)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be at least 1")
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size}: must be at least 1")
    check_flags(parser, args)
    return args


if __name__ == "__main__":  # before the slow imports: --help and a wrong flag answer at once
    parse_args(sys.argv[1:])

import decode
import grade
import suite  # noqa: F401 (pt.py is one folder up)
import torch
from accelerate import init_empty_weights
from datasets import load_dataset
from files import digest, file_digest, write_json, write_text
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, logging

import pt

# -------------------------------------------------------------------------------------- problems


def load_problems(dataset, limit):
    """The first `limit` (None: all) problems of a dataset as [(query, final answer)].

    Raises:
        SystemExit: if they cannot be read, there are none, or one has no final answer.
    """
    try:
        if dataset in BENCHMARKS:
            pairs = load_benchmark(dataset)
        else:
            pairs = read_problems(dataset)
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(BENCHMARKS)
        sys.exit(f"--dataset {dataset} cannot be read ({error}); give {names}, or a .jsonl file")
    except Exception as error:  # the hub fails in many ways
        why = pt.first_line(error)
        sys.exit(f"--dataset {dataset} cannot be loaded ({why}); give a .jsonl file")
    if not pairs:
        sys.exit(f"--dataset {dataset} has no problems; give another one")

    problems = []
    for number, (query, solution) in enumerate(pairs, start=1):
        # a worked solution, as GSM8K's are, or the final answer itself
        gold = grade.final_answer(solution) or solution.strip()
        if not gold or "\n" in gold:
            sys.exit(
                f"--dataset {dataset}: problem {number} has no final answer: {solution[-80:]!r}; "
                'let it end in "The answer is: ..."'
            )
        problems.append((query, gold))
    return problems[:limit]


def load_benchmark(name):
    """[(query, solution)] of one of the BENCHMARKS."""
    path, configuration, split, query, solution = BENCHMARKS[name]
    rows = load_dataset(path, configuration, split=split)
    return [(row[query], row[solution]) for row in rows]


def read_problems(path):
    """[(query, solution)] of a .jsonl file.

    Raises:
        SystemExit: if a line has none.
    """
    pairs = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                sys.exit(
                    f"--dataset {path}: line {number} is not JSON ({error}); "
                    "give one object per line"
                )
            pair = query_and_solution(row)
            if pair is None:
                sys.exit(
                    f"--dataset {path}: line {number} needs a text `query`, and an `answer` or "
                    f"`response`: {line.strip()[:80]}"
                )
            pairs.append(pair)
    return pairs


def query_and_solution(row):
    """(query, solution) of a line's content, `answer` before `response`; None if it has none."""
    if not isinstance(row, dict):
        return None
    query = row.get("query")
    solution = row.get("answer", row.get("response"))
    if not isinstance(query, str) or not query.strip():
        return None
    if not isinstance(solution, str | int | float):
        return None
    return query, str(solution)


# ------------------------------------------------------------------------------------- the model


def load_config(name, revision):
    """The configuration of a model, and the number of its ids, without loading its weights.

    Raises:
        SystemExit: if they cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
        code = {"code_revision": revision} if hasattr(config, "auto_map") else {}
        with init_empty_weights():
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=True, **code)
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        why = pt.first_line(error)
        sys.exit(f"--model {name} cannot be loaded ({why}); give a hub id or a model folder")
    return config, skeleton.get_input_embeddings().num_embeddings


def model_identity(name, config):
    """A text that differs between models: a hash of the folder's contents, or the hub's commit."""
    if not os.path.isdir(name):
        return f"{name}@{config._commit_hash}"
    paths = []
    for kind in ("safetensors", "bin", "json", "jinja", "py", "model", "txt"):
        paths += glob(os.path.join(escape(name), f"*.{kind}"))
    return digest(*(f"{os.path.basename(path)} {file_digest(path)}" for path in sorted(paths)))


@torch.no_grad()
def check_padding(args, model, prompts):
    """Check that the model heeds attention_mask, if there are prompts that will be padded.

    Raises:
        SystemExit: if it does not.
    """
    if args.batch_size == 1 or len({len(prompt) for prompt in prompts}) == 1:
        return
    prompt_len = len(prompts[0])
    rows = []
    for pad_id in (prompts[0][0], prompts[0][-1]):
        rows.append(prompts[0] + [pad_id] * 8)
    input_ids = torch.tensor(rows, device=args.device)  # (2, L) the same but for the padding
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, prompt_len:] = 0
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()  # (2, L, V)
    one, other = logits[:, :prompt_len]
    if (one - other).abs().max() > 1e-3 * one.abs().max():
        sys.exit(
            f"--model {args.model} ignores attention_mask, so padding would change answers; "
            "give --batch_size 1"
        )


# ------------------------------------------------------------------- the evaluation in its folder


def describe(args, options, config, prompts, golds):
    """All that can change an answer or its verdict, and the versions of libraries, for JSON.

    Paths and times are left out, so that a folder can be moved and its model copied.
    """
    problems = [f"{prompt} {gold}" for prompt, gold in zip(prompts, golds, strict=True)]
    settings = {
        **options,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device.partition(":")[0],
        "count": len(prompts),
        "prompt": pt.PROMPT,
        "problems_sha256": digest(*problems),
        "model": model_identity(args.model, config),
    }
    versions = {library: version(library) for library in LIBRARIES}
    return {"settings": settings, "versions": versions}


@contextmanager
def locked(folder, repair=True):
    """Wait until no other process is writing to `folder`; yields the path of generations.jsonl.

    If a kill has cut this file off in the middle of a line, the rest of the line is removed first,
    unless `repair` is False.
    """
    with open(os.path.join(folder, "lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = os.path.join(folder, "generations.jsonl")
        if repair and os.path.exists(path):
            with open(path, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        yield path


def claim(folder, description):
    """Begin the evaluation in `folder`, or resume it. One without any answer is begun anew.

    Raises:
        SystemExit: if the folder has another evaluation, or something else.
    """
    path = os.path.join(folder, "settings.json")
    summary = os.path.join(folder, "summary.json")
    with locked(folder, repair=False) as generations:
        for other in (generations, summary):
            if os.path.exists(other) and not os.path.exists(path):
                name = os.path.basename(other)
                sys.exit(f"--output {folder} has {name} but no settings.json; give another folder")
        if not os.path.exists(generations):
            write_json(path, description)
        try:
            with open(path, encoding="utf-8") as file:
                known = json.load(file)
            before = known["settings"] | known["versions"]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path} is damaged, or not of an evaluation; give another folder")
    check_unchanged(folder, before, description["settings"] | description["versions"])


def check_unchanged(folder, before, now):
    """End with a message if the settings of the evaluation in `folder` are not those of now."""
    changes = []
    for name in before | now:
        if before.get(name) != now.get(name):
            changes.append(f"{name} was {before.get(name)!r}, now {now.get(name)!r}")
    if changes:
        sys.exit(
            f"--output {folder} has an evaluation with other settings: {'; '.join(changes)}; "
            "give the same settings, or another folder"
        )


def read_generations(path):
    """The answers so far: {number of the problem: its record}.

    Raises:
        SystemExit: if the file is damaged.
    """
    if not os.path.exists(path):
        return {}
    records = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                records[record["index"]] = record
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is damaged; remove the line that is not JSON, or give another folder")
    return records


def append_records(folder, records):
    """Append to generations.jsonl, but for problems that another process has answered meanwhile."""
    with locked(folder) as path:
        done = read_generations(path)
        lines = [json.dumps(record) + "\n" for record in records if record["index"] not in done]
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())


# ------------------------------------------------------------------------------------ generation


def share_cores(device):
    """Divide a machine's cores among its processes: by default, each would use all of them."""
    # DeepSpeed's launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if device == "cpu" and local_ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_ranks))


def make_batches(prompts, batch_size):
    """Lists of problem numbers, longest prompts first: a batch that does not fit fails at once."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def generate(args, options, model, tokenizer, prompts, queries):
    """Generate this process's share of the missing answers, batch by batch.

    A batch of which an answer is missing is generated as a whole: padding can change rounding.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    batches = make_batches(prompts, args.batch_size)[rank::world_size]
    with locked(args.output) as path:
        done = set(read_generations(path))
    total = sum(len(batch) for batch in batches)
    bar = tqdm(total=total, unit=" answers", desc="generate", disable=rank != 0)
    for batch in batches:
        missing = set(batch) - done
        bar.update(len(batch) - len(missing))
        if missing:
            records = answer(batch, args.seed, options, model, tokenizer, prompts, queries)
            append_records(args.output, records)
            bar.update(len(missing))
    bar.close()


def answer(batch, seed, options, model, tokenizer, prompts, queries):
    """Decode a batch of problem numbers: a record per problem."""
    forwards = [0] * len(batch)

    def count_forwards(rows, _):
        for row in rows:
            forwards[row] += 1

    start = time.perf_counter()
    answers = decode.decode(
        model,
        [prompts[number] for number in batch],
        **options,
        seeds=[seed << 32 | number for number in batch],
        callback=count_forwards,
    )
    seconds = (time.perf_counter() - start) / len(batch)

    records = []
    for row, number in enumerate(batch):
        tokens = decode.answer_length(answers[row], options["eos_id"], options["eot_id"])
        text = tokenizer.decode(answers[row, :tokens], skip_special_tokens=True)
        record = {
            "index": number,
            "text": text.strip(),
            "tokens": tokens,
            "forwards": forwards[row],
            "seconds": seconds,
            "query": queries[number],
        }
        records.append(record)
    return records


# ----------------------------------------------------------------------------------- the summary


def finish(folder, golds, description):
    """Grade and summarize, if all answers are there and nobody has done so yet.

    Returns:
        the summary, a dict; None if answers are missing.
    """
    summary = os.path.join(folder, "summary.json")
    with locked(folder) as path:
        by_number = read_generations(path)
        if len(by_number) < len(golds):
            return None
        records = [by_number[number] for number in range(len(golds))]
        graded = all("correct" in record for record in records)
        if not graded or not os.path.exists(summary):
            records = grade_all(records, golds)
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))
            write_json(summary, summarize(records) | description)
    with open(summary, encoding="utf-8") as file:
        return json.load(file)


def grade_all(records, golds):
    """The records with their verdicts, in the same order."""
    texts = [record["text"] for record in records]
    verdicts = grade.grade(zip(texts, golds, strict=True))
    bar = tqdm(verdicts, total=len(records), unit=" answers", desc="grade")
    graded = []
    for record, gold, verdict in zip(records, golds, bar, strict=True):
        found = {
            "gold": gold,
            "prediction": grade.final_answer(record["text"]),
            "correct": bool(verdict),
            "ungraded": verdict is None,
            "exact_match": grade.exact_match(record["text"], gold),
        }
        graded.append(record | found)
    return graded


def summarize(records):
    """What the answers are worth, and what they cost."""
    totals = {}
    for name in ("correct", "exact_match", "ungraded", "tokens", "forwards", "seconds"):
        totals[name] = sum(record[name] for record in records)
    count = len(records)
    return {
        "accuracy": totals["correct"] / count,
        "exact_match": totals["exact_match"] / count,
        "interval_95": interval_95(totals["correct"], count),
        "count": count,
        "ungraded": totals["ungraded"],
        "tokens": totals["tokens"],
        "forwards": totals["forwards"],
        "seconds": totals["seconds"],
        "tokens_per_second": totals["tokens"] / totals["seconds"],
    }


def interval_95(correct, count):
    """Wilson's 95 % interval of the proportion correct / count: [low, high]."""
    z = 1.959964
    share = correct / count
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / scale
    return [max(0.0, middle - half), min(1.0, middle + half)]


def report(folder, summary):
    """Print the summary, or that there is none yet."""
    if summary is None:
        print(f"{folder}: this process has finished; others are still running, or not yet started")
        return
    low, high = summary["interval_95"]
    print(
        f"{folder}: accuracy {summary['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}\n"
        f"exact match {summary['exact_match']:.1%}, "
        f"{summary['count']} answers, {summary['ungraded']} ungraded\n"
        f"{summary['tokens']:,} tokens, {summary['forwards']:,} forward passes, "
        f"{summary['tokens_per_second']:.0f} tokens/s per process"
    )


# ------------------------------------------------------------------------------------------ main


def evaluate(args, problems):
    """Generate and grade the answers of `problems`; the summary, or None if answers are missing."""
    queries = [query for query, _ in problems]
    golds = [gold for _, gold in problems]
    os.makedirs(args.output, exist_ok=True)
    grade.check()

    tokenizer = pt.load_tokenizer(args.model, args.model_revision)
    prompts = decode.encode_prompts(tokenizer, queries)
    with locked(args.output, repair=False):  # transformers copies the model's code to a cache
        config, vocabulary = load_config(args.model, args.model_revision)
    special = decode.special_ids(args.model, config, tokenizer, vocabulary)
    decode.check_prompts(args.model, prompts, args.gen_length, special["mask_id"], config)
    options = decode_options(args) | special
    decode.check_block_length(args.model, config, options["block_length"])
    description = describe(args, options, config, prompts, golds)
    claim(args.output, description)

    dtype = getattr(torch, args.dtype)
    model = decode.load_model(args.model, args.model_revision, args.device, dtype)
    check_padding(args, model, prompts)
    generate(args, options, model, tokenizer, prompts, queries)
    return finish(args.output, golds, description)


def main(argv):
    """Evaluate as the command line `argv`, a list of words, says.

    Returns:
        the summary, a dict; None if other processes have not finished yet.
    """
    args = parse_args(argv)
    decode.set_device(args)
    share_cores(args.device)
    logging.set_verbosity_error()
    problems = load_problems(args.dataset, args.limit)
    try:
        summary = evaluate(args, problems)
    except torch.OutOfMemoryError:
        sys.exit(f"--batch_size {args.batch_size}: out of memory; give a lower one")
    except OSError as error:
        sys.exit(
            f"--output {args.output} cannot be written ({error}); give the same command again "
            "when it can"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; give the same command again to resume")
    report(args.output, summary)
    return summary


if __name__ == "__main__":
    main(sys.argv[1:])
