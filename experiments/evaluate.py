"""Accuracy of a checkpoint or base model: block decoding of whole test sets, answers compared with math-verify.

    python experiments/evaluate.py --model ckpts_stagewise_sft_32_step0200 --dataset gsm8k --output results/blockwise
    deepspeed --num_gpus 8 experiments/evaluate.py --model GSAI-ML/LLaDA-8B-Instruct --dataset math500 --output base
    python experiments/evaluate.py --model M --dataset rows.jsonl --output DIR --block_length 8 --steps 256

A local .jsonl has a `query` and an `answer` or `response` in each line. Prompts are those of pt.py. Each process takes
every n-th batch and appends what it has generated to DIR/generations.jsonl; the one that completes it grades all
answers and writes DIR/summary.json. The same command goes on with an evaluation that was stopped.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from glob import escape, glob
from importlib.metadata import version

import torch
from accelerate import init_empty_weights
from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, logging

sys.path[:0] = [
    os.path.dirname(os.path.abspath(__file__)),
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
]

import decode
import grade

import pt

BENCHMARKS = {  # hub id, configuration, split, columns of question and answer
    "gsm8k": ("openai/gsm8k", "main", "test", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", "default", "test", "problem", "answer"),
}
LIBRARIES = ("torch", "transformers", "math-verify", "sympy")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    decode.add_flags(parser)
    parser.add_argument(
        "--dataset", required=True, help=f"{', '.join(BENCHMARKS)}, or a .jsonl file"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="for generations.jsonl and summary.json"
    )
    parser.add_argument("--limit", type=int, help="the first problems only (all)")
    parser.add_argument(
        "--batch_size", type=int, default=16, help="answers at a time, per process (%(default)s)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    args = parser.parse_args(argv)
    if args.device == "cuda":  # of several, the launcher's
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    for name in ("limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    return args, decode.settings(parser, args)


# ---------------------------------------------------------------------------- problems


def read_problems(path):
    """[(query, gold)] of a .jsonl file; `answer` is taken before `response`."""
    wrong = lambda number, why: sys.exit(f"--dataset {path}: line {number} {why}")
    problems = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                wrong(number, f"is no JSON ({error}); give one object a line")
            query, gold = (
                (row.get("query"), row.get("answer", row.get("response")))
                if isinstance(row, dict)
                else (0, 0)
            )
            if not (
                isinstance(query, str) and query.strip() and isinstance(gold, str | int | float)
            ):
                wrong(
                    number,
                    f"has no text `query` with an `answer` or `response`: {line.strip()[:80]}",
                )
            problems.append((query, str(gold)))
    return problems


def load_problems(dataset, limit):
    """The problems as [(query, final answer)].

    Raises:
        SystemExit: if there are none, they cannot be read, or one has no final answer.
    """
    try:
        if dataset in BENCHMARKS:
            path, name, split, question, answer = BENCHMARKS[dataset]
            problems = [
                (row[question], row[answer]) for row in load_dataset(path, name, split=split)
            ]
        else:
            problems = read_problems(dataset)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(
            f"--dataset {dataset} cannot be read ({error}); give {', '.join(BENCHMARKS)}, or a .jsonl file"
        )
    except Exception as error:  # the hub fails in many ways
        sys.exit(
            f"--dataset {dataset} cannot be loaded ({pt.first_line(error)}); give a .jsonl file"
        )
    if not problems:
        sys.exit(f"--dataset {dataset} has no problems")
    # an `answer` is a final answer, unless it is worked out, as GSM8K's are
    golds = [grade.final_answer(gold) or gold.strip() for _, gold in problems]
    if long := [i for i, gold in enumerate(golds, start=1) if not gold or "\n" in gold]:
        sys.exit(
            f"--dataset {dataset}: problem {long[0]} has no final answer: {problems[long[0] - 1][1][-80:]!r}"
        )
    return [(query, gold) for (query, _), gold in zip(problems, golds, strict=True)][:limit]


# ---------------------------------------------------------------------------- what an evaluation is


def digest(*parts):
    """sha256 of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def file_digest(path):
    """sha256 of a file's contents, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            total.update(piece)
    return total.hexdigest()


def load_config(name, revision):
    """The configuration of a model and its number of ids, without its weights.

    Raises:
        SystemExit: if they cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
        with init_empty_weights():
            skeleton = AutoModelForCausalLM.from_config(
                config, trust_remote_code=True, code_revision=revision
            )
        return config, skeleton.get_input_embeddings().num_embeddings
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        sys.exit(
            f"--model {name} cannot be loaded ({pt.first_line(error)}); give a hub id or a model folder"
        )


def model_identity(name, config):
    """What tells a model from any other: the contents of its folder, or its commit on the hub."""
    if not os.path.isdir(name):
        return f"{name}@{config._commit_hash}"
    kinds = ("safetensors", "bin", "json", "jinja", "py", "model", "txt")
    files = sorted(path for kind in kinds for path in glob(os.path.join(escape(name), f"*.{kind}")))
    return digest(*(f"{os.path.basename(path)} {file_digest(path)}" for path in files))


def describe(args, how, config, special, prompts, golds):
    """All that can change an answer or its verdict, as JSON has it, without paths and times; and versions beside it."""
    settings = (
        dict(how)
        | special
        | {name: getattr(args, name) for name in ("seed", "batch_size", "dtype")}
    )
    settings |= {
        "device": args.device.partition(":")[0],
        "count": len(prompts),
        "prompt": pt.PROMPT,
    }
    problems = (f"{ids} {gold}" for ids, gold in zip(prompts, golds, strict=True))
    settings |= {"problems_sha256": digest(*problems), "model": model_identity(args.model, config)}
    begun = {"settings": settings, "versions": {library: version(library) for library in LIBRARIES}}
    return json.loads(json.dumps(begun))


@contextmanager
def locked(folder, mend=True):
    """Alone among all processes that write to `folder`; yields the path of generations.jsonl.

    If a kill has cut that off in the middle of a line, the line is removed first.
    """
    with open(os.path.join(folder, "lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = os.path.join(folder, "generations.jsonl")
        if mend and os.path.exists(path):
            with open(path, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        yield path


def write_json(path, content):
    """Write `content` to `path`, which appears only when whole."""
    with open(f"{path}.partial", "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    os.replace(f"{path}.partial", path)


def claim(folder, begun):
    """Begin the evaluation `begun` in `folder`, or go on with it; one that has no answer yet is begun anew.

    Raises:
        SystemExit: if there is another one, or something else.
    """
    path = os.path.join(folder, "settings.json")
    with locked(folder, mend=False) as generations:
        for other in (generations, os.path.join(folder, "summary.json")):
            if os.path.exists(other) and not os.path.exists(path):
                sys.exit(
                    f"--output {folder} has a {os.path.basename(other)} but no settings.json; give another folder"
                )
        if not os.path.exists(generations):
            write_json(path, begun)
        try:
            with open(path) as file:
                known = json.load(file)
            flat = [content["settings"] | content["versions"] for content in (known, begun)]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path} is damaged, or not of an evaluation; give another folder")
    differ = [name for name in flat[0] | flat[1] if flat[0].get(name) != flat[1].get(name)]
    if differ:
        changes = ", ".join(
            f"{name} {flat[0].get(name)!r}, now {flat[1].get(name)!r}" for name in differ
        )
        sys.exit(
            f"--output {folder} is an evaluation with other settings: {changes}; give the same, or another folder"
        )


def read_generations(path):
    """{number of the problem: what was generated for it} so far."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return {record["index"]: record for record in map(json.loads, file)}
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is damaged; remove the line that is no JSON, or give another folder")


# ---------------------------------------------------------------------------- generation


def make_batches(prompts, batch_size):
    """Lists of problem numbers, longest prompts first, so that a batch that does not fit shows at once."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


@torch.no_grad()
def check_padding(args, model, prompts):
    """Ends with a message if the model ignores attention_mask, which a batch of prompts of other lengths needs."""
    if args.batch_size == 1 or len(set(map(len, prompts))) == 1:
        return
    ids = torch.tensor([prompts[0]] * 2, device=args.device)
    padded = torch.nn.functional.pad(ids, (0, 8))
    padded[:, -8:] = ids[:, :1]
    padded[1, -8:] = ids[1, -1]
    mask = torch.ones_like(padded)
    mask[:, -8:] = 0
    one, other = model(input_ids=padded, attention_mask=mask).logits[:, : ids.shape[1]].float()
    if (one - other).abs().max() > 1e-3 * one.abs().max():
        sys.exit(
            f"--model {args.model} ignores attention_mask, so that padding would change answers; --batch_size 1"
        )


def generate(args, how, model, tokenizer, special, prompts, queries):
    """Append to generations.jsonl what this process has to generate, batch by batch."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    batches = make_batches(prompts, args.batch_size)[rank::world_size]
    with locked(args.output) as path:
        done = read_generations(path).keys()
    bar = tqdm(total=sum(map(len, batches)), unit=" answers", desc="generate", disable=rank != 0)
    for batch in batches:
        bar.update(len(done & set(batch)))
        if done >= set(batch):
            continue
        records = answer(batch, how, model, tokenizer, special, prompts, args.seed)
        with locked(args.output) as path, open(path, "a", encoding="utf-8") as file:
            new = [record for record in records if record["index"] not in read_generations(path)]
            file.write(
                "".join(
                    json.dumps(record | {"query": queries[record["index"]]}) + "\n"
                    for record in new
                )
            )
            file.flush()
            os.fsync(file.fileno())
        bar.update(len(set(batch) - done))
    bar.close()


def answer(batch, how, model, tokenizer, special, prompts, seed):
    """Decode one batch of problem numbers; a record a problem."""
    forwards, start = dict.fromkeys(range(len(batch)), 0), time.perf_counter()

    def watch(rows, _):
        for row in rows:
            forwards[row] += 1

    seeds = [seed << 32 | number for number in batch]
    answers = decode.decode(
        model, [prompts[i] for i in batch], **how, **special, seeds=seeds, watch=watch
    )
    seconds = (time.perf_counter() - start) / len(batch)
    records = []
    for row, (number, ids) in enumerate(zip(batch, answers, strict=True)):
        tokens = decode.answer_length(ids, special["eos_id"], special["eot_id"])
        text = tokenizer.decode(ids[:tokens], skip_special_tokens=True).strip()
        record = {
            "index": number,
            "text": text,
            "tokens": tokens,
            "forwards": forwards[row],
            "seconds": seconds,
        }
        records.append(record)
    return records


# ---------------------------------------------------------------------------- the verdict


def interval_95(right, count):
    """Wilson's 95 % interval of a share, `right` of `count`."""
    z, share = 1.959964, right / count
    middle, half = (
        share + z * z / (2 * count),
        z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2),
    )
    return [min(1.0, max(0.0, (middle + sign * half) / (1 + z * z / count))) for sign in (-1, 1)]


def finish(folder, golds, begun):
    """Grade and summarize, if all is generated and nobody has done so; the summary, or None."""
    summary = os.path.join(folder, "summary.json")
    with locked(folder) as path:
        records = read_generations(path)
        if len(records) < len(golds):
            return None
        if not os.path.exists(summary) or any(
            "correct" not in record for record in records.values()
        ):
            graded = grade_all([records[number] for number in range(len(golds))], golds)
            with open(f"{path}.partial", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in graded)
            os.replace(f"{path}.partial", path)
            write_json(summary, summarize(graded, begun))
    with open(summary) as file:
        return json.load(file)


def grade_all(records, golds):
    """The records, in order, with their verdicts."""
    pairs = [(record["text"], gold) for record, gold in zip(records, golds, strict=True)]
    verdicts = tqdm(grade.grade(pairs), total=len(pairs), unit=" answers", desc="grade")
    graded = []
    for record, (text, gold), verdict in zip(records, pairs, verdicts, strict=True):
        found = {"gold": gold, "prediction": grade.final_answer(text), "correct": bool(verdict)}
        graded.append(
            record
            | found
            | {"ungraded": verdict is None, "exact_match": grade.exact_match(text, gold)}
        )
    return graded


def summarize(records, begun):
    """summary.json: what the answers are worth and what they cost."""
    total = lambda name: sum(record[name] for record in records)
    count, tokens = len(records), total("tokens")
    figures = {"accuracy": total("correct") / count, "exact_match": total("exact_match") / count}
    figures |= {
        "interval_95": interval_95(total("correct"), count),
        "count": count,
        "ungraded": total("ungraded"),
    }
    figures |= {"tokens": tokens, "forwards": total("forwards"), "seconds": total("seconds")}
    return figures | {"tokens_per_second": tokens / total("seconds")} | begun


def main(argv=None):
    """Returns the summary, or None where other processes are still generating."""
    args, how = parse_args(argv)
    logging.set_verbosity_error()
    problems = load_problems(args.dataset, args.limit)
    queries, golds = [query for query, _ in problems], [gold for _, gold in problems]
    try:
        os.makedirs(args.output, exist_ok=True)
        grade.check()
        tokenizer = pt.load_tokenizer(args.model, args.model_revision)
        prompts = decode.encode_prompts(tokenizer, queries)
        with locked(
            args.output, mend=False
        ):  # the model's code is copied to a cache, by one process at a time
            config, vocabulary = load_config(args.model, args.model_revision)
        special = decode.special_ids(args.model, config, tokenizer, vocabulary)
        decode.check_prompts(args.model, prompts, how["gen_length"], special["mask_id"], config)
        begun = describe(args, how, config, special, prompts, golds)
        claim(args.output, begun)
        model = decode.load_model(
            args.model, args.model_revision, args.device, getattr(torch, args.dtype)
        )
        check_padding(args, model, prompts)
        generate(args, how, model, tokenizer, special, prompts, queries)
        summary = finish(args.output, golds, begun)
    except torch.OutOfMemoryError:
        sys.exit(f"out of memory at --batch_size {args.batch_size}; give a lower one")
    except OSError as error:
        sys.exit(
            f"--output {args.output} cannot be written ({error}); the same command goes on when it can"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    if summary is None:
        print(
            f"{args.output}: this process has done its part; others have not, or are still to be started"
        )
    else:
        low, high = summary["interval_95"]
        print(
            f"{args.output}: accuracy {summary['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}"
        )
        print(
            "exact match {exact_match:.1%}, {count} answers, {ungraded} ungraded".format(**summary)
        )
        print(
            "{tokens:,} tokens, {forwards:,} forwards, {tokens_per_second:.0f} tokens/s each".format(
                **summary
            )
        )
    return summary


if __name__ == "__main__":
    main()
