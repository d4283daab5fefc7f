"""Accuracy of a checkpoint or base model: block decoding as a model of lm-evaluation-harness.

    python experiments/evaluate.py --model CHECKPOINT --dataset gsm8k --output results/blockwise
    deepspeed --num_gpus 8 experiments/evaluate.py --model CHECKPOINT --dataset math500 --output DIR
    python experiments/evaluate.py --model M --dataset rows.jsonl --output DIR --block_length 8
    python experiments/evaluate.py --model M --task gsm8k_cot_zeroshot --output DIR

--dataset is a test set in the prompt of pt.py, graded by math-verify (the tasks in tasks/). --task
is any generative task of lm-evaluation-harness, with its own prompt and metrics.

Each process generates every n-th batch of answers and writes it to DIR/answers/; the one that comes
last grades them all, and writes DIR/samples.jsonl and DIR/summary.json. To resume an evaluation
that was stopped, give the same command again, on any number of processes.
Guide: experiments/docs/evaluation.md
"""

import argparse
import fcntl
import json
import logging
import math
import os
import sys
import time
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path

import decode
import suite
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager
from suite import digest, file_digest, write_json, write_text
from tasks import grade
from tqdm import tqdm
from transformers.utils.logging import set_verbosity_error

import pt
from train_blockwise import empty_model

TASKS = Path(__file__).with_name("tasks")
BENCHMARKS = {"gsm8k": "metamath_gsm8k", "math500": "metamath_math500"}  # tasks of --dataset
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".py", ".model", ".txt")
LIBRARIES = ("torch", "transformers", "lm_eval", "math-verify", "sympy")  # can change verdicts


# ------- block decoding as a model
class Ended(Exception):
    """This process has nothing left to do."""


class BlockDecoder(LM):
    """A model of lm-evaluation-harness that decodes block by block.

    It loads its weights when it gets the requests, after all checks. The harness sees one process:
    `generate_until` itself shares the requests out among the ranks, in batches that do not depend
    on the number of ranks, and only the process that comes last returns from it.
    """

    def __init__(self, args, task, in_use, grading):
        super().__init__()
        self.args = args
        self.task = task
        self.in_use = in_use  # a file that all processes of the evaluation lock, shared
        self.grading = grading  # a file that the one which grades locks
        self.tokenizer = pt.load_tokenizer(*decode.base_of(args.model, args.model_revision))
        self.description = None  # of the evaluation, see `describe`
        self.records = []  # of the answers, see `answer`

    @property
    def tokenizer_name(self):
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text of a conversation, at whose end the model continues."""
        options = {"continue_final_message": True}  # if the task has begun the answer
        if add_generation_prompt:
            options = {"add_generation_prompt": True}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        except Exception as error:  # a template is a program and can fail in any way
            why = pt.first_line(error)
            sys.exit(f"--model {self.args.model}: its chat template fails ({why}); give another")

    def generate_until(self, requests):
        """The texts of the answers to all requests, each up to its first stop sequence.

        Of the settings that a request brings only the stop sequences are used.

        Raises:
            Ended: if answers are missing that other processes generate, or all is done.
            SystemExit: if the model or the folder does not suit.
        """
        args = self.args
        contexts = [request.args[0] for request in requests]
        special_tokens = args.no_chat_template  # the template has its own
        prompts = self.tokenizer(contexts, add_special_tokens=special_tokens)["input_ids"]
        with open(args.output / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # transformers copies the model's code to a cache
            config, vocabulary = load_config(args.model, args.model_revision)
            special = decode.special_ids(args.model, config, self.tokenizer, vocabulary)
            decode.check_prompts(args.model, prompts, args.gen_length, special["mask_id"], config)
            options = decode.decode_options(args, config) | special
            self.description = describe(args, options, config, self.task, requests, prompts)
            claim(args.output, self.description, alone=lock_alone(self.in_use))
            fcntl.flock(self.in_use, fcntl.LOCK_SH)
        if (args.output / "summary.json").exists():
            raise Ended
        decode.check_block_length(args.model, config, options["block_length"])
        self.records = self.generate(options, prompts)
        if not lock_alone(self.grading):
            raise Ended
        texts = [record["text"] for record in self.records]
        return [cut(text, request.args[1]) for text, request in zip(texts, requests, strict=True)]

    def generate(self, options, prompts):
        """The records of the answers to all prompts; generates what is missing of its share."""
        args = self.args
        files = {}  # of each batch: it appears when its answers are complete
        for number, batch in enumerate(make_batches(prompts, args.batch_size)):
            files[args.output / "answers" / f"{number:05}.json"] = batch
        rank = int(os.environ.get("RANK", 0))
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        share = list(files)[rank::world_size]
        missing = [path for path in share if not path.exists()]
        if missing:
            dtype = getattr(torch, args.dtype)
            how = args.model_revision, args.device, dtype, args.cache
            model = decode.load_model(args.model, *how)
            check_padding(args, model, prompts)
        bar = tqdm(share, unit=" batches", desc="generate")
        for path in bar:
            if path in missing:
                write_json(path, answer(files[path], args, options, model, self.tokenizer, prompts))
        if not all(path.exists() for path in files):
            raise Ended
        records = []
        for path in files:
            try:
                records += json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                sys.exit(f"{path} is damaged; delete it, and give the same command again")
        return sorted(records, key=lambda record: record["index"])

    def loglikelihood(self, requests):
        raise NotImplementedError("block decoding gives no likelihoods")

    loglikelihood_rolling = loglikelihood


def make_batches(prompts, batch_size):
    """Lists of problem numbers, longest prompts first: a batch that does not fit fails at once."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def answer(batch, args, options, model, tokenizer, prompts):
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
        seeds=[args.seed << 32 | number for number in batch],
        callback=count_forwards,
    )
    seconds = (time.perf_counter() - start) / len(batch)

    records = []
    for row, number in enumerate(batch):
        ends = options["eos_id"], options["eot_id"]
        tokens = decode.answer_length(answers[row], *ends)
        text = decode.answer_text(tokenizer, answers[row], *ends)
        costs = {"tokens": tokens, "forwards": forwards[row], "seconds": seconds}
        records.append({"index": number, "text": text, **costs})
    return records


def cut(text, settings):
    """`text` up to the first of the request's stop sequences."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.partition(stop)[0]
    return text


# ------- the evaluation
def main(args):
    """Evaluate as the flags say, and print the summary.

    Returns:
        the summary, a dict; None if other processes have not finished yet.
    """
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        sys.exit("RANK is set, but not WORLD_SIZE; start with deepspeed or torchrun, or unset RANK")
    decode.set_device(args)
    share_cores(args.device)
    set_verbosity_error()
    logging.getLogger("lm_eval").setLevel("ERROR")
    first = os.environ.get("RANK", "0") == "0"
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(sys.stderr if first else nowhere):
            evaluate(args)  # bars and warnings only on rank 0; a message of sys.exit on every rank
    except Ended:
        pass
    except torch.OutOfMemoryError:
        sys.exit(f"--batch_size {args.batch_size}: out of memory; give a lower one")
    except OSError as error:
        sys.exit(f"{pt.first_line(error)}; give the same command again when this is fixed")
    except KeyboardInterrupt:
        sys.exit("interrupted; give the same command again to resume")
    return report(args.output)


def evaluate(args):
    """Generate and grade the answers of the task; writes samples.jsonl and summary.json.

    Raises:
        Ended: if this process has nothing to grade.
        SystemExit: if something does not suit.
    """
    task = load_task(args.dataset, args.task, args.num_fewshot)
    if getattr(task, "UNSAFE_CODE", False) and not args.confirm_run_unsafe_code:
        remedy = "give --confirm_run_unsafe_code, in a sandbox"
        sys.exit(f"--task {args.task} runs the code that the model wrote; {remedy}")
    if (args.output / "config.json").exists():
        sys.exit(f"--output {args.output} is a model's folder; give another one")
    (args.output / "answers").mkdir(parents=True, exist_ok=True)
    if task.task_name.startswith("metamath"):
        grade.check()
    folder = args.output
    with open(folder / "in_use", "a+") as in_use, open(folder / "grading", "a+") as grading:
        model = BlockDecoder(args, task, in_use, grading)
        results = run_harness(
            model,
            {"tasks": {task.task_name: task}},
            limit=args.limit,
            bootstrap_iters=0,
            apply_chat_template=not args.no_chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
        samples = results["samples"][task.task_name]
        lines = [json.dumps(sample, default=str) + "\n" for sample in samples]
        write_text(folder / "samples.jsonl", "".join(lines))
        summary = summarize(task, results, model.records) | model.description
        write_json(folder / "summary.json", summary)


def load_task(dataset=None, task=None, num_fewshot=None, flag="--dataset"):
    """A task of lm-evaluation-harness with its problems: that of a `dataset`, or the one named.

    `flag` is what the messages call `dataset`.

    Raises:
        SystemExit: if it cannot be loaded, or has no problems, or is not generative.
    """
    given = f"{flag} {dataset}"
    remedy = f"give {flag} {', '.join(BENCHMARKS)} or a .jsonl file"
    if task:
        given = f"--task {task}"
        remedy = "give a --task of `lm_eval ls tasks`, or a --dataset"
    spec = task or BENCHMARKS.get(dataset)
    if spec is None:  # metamath of another file: the harness changes members of groups only
        member = {"task": "metamath", "dataset_kwargs": {"path": str(dataset)}}
        spec = {"group": "local", "task": [member]}
    try:
        # the harness's own index takes some seconds
        harness = task is not None and not task.endswith((".yaml", ".yml"))
        manager = TaskManager(include_path=str(TASKS), include_defaults=harness)
        loaded = manager.load(spec)["tasks"]
    except Exception as error:  # the hub, files and tasks fail in many ways
        sys.exit(f"{given} cannot be loaded ({pt.first_line(error)}); {remedy}")
    if len(loaded) > 1:
        sys.exit(f"{given} is a group; give one of its tasks: {', '.join(loaded)}")
    (loaded,) = loaded.values()
    if loaded.OUTPUT_TYPE != "generate_until" or getattr(loaded, "MULTIMODAL", False):
        sys.exit(f"{given} does not generate text from text; {remedy}")
    if num_fewshot is not None:
        if num_fewshot and num_fewshot >= len(loaded.fewshot_docs()):
            sys.exit(f"--num_fewshot {num_fewshot}: more than {given} has; give a lower one")
        loaded.set_config("num_fewshot", num_fewshot)
    loaded.set_fewshot_seed(0)
    return loaded


def share_cores(device):
    """Divide a machine's cores among its processes: by default, each would use all of them."""
    # DeepSpeed's launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if device == "cpu" and local_ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_ranks))


# ------- the summary
def summarize(task, results, records):
    """What the answers are worth, and what they cost.

    `accuracy` is `math_verify`, or else the task's first metric, with its last filter, if it is the
    mean of zeros and ones.

    Args:
        results: of the harness.
        records: of the answers.
    """
    metrics = results["results"][task.task_name]
    metrics = {name: x for name, x in metrics.items() if "," in name and "_stderr" not in name}
    samples = results["samples"][task.task_name]
    filter_name = samples[-1]["filter"]
    names = list(task.aggregation())
    name = "math_verify" if "math_verify" in names else names[0]
    values = [sample[name] for sample in samples if sample["filter"] == filter_name]
    accuracy = metrics[f"{name},{filter_name}"]
    interval = None
    shares = all(value in (0, 1) for value in values)
    if shares and math.isclose(sum(values) / len(values), accuracy):
        interval = interval_95(sum(values), len(values))
    totals = {}
    for cost in ("tokens", "forwards", "seconds"):
        totals[cost] = sum(record[cost] for record in records)
    return {
        "accuracy": accuracy if interval else None,
        "exact_match": metrics.get(f"exact_match,{filter_name}"),
        "interval_95": interval,
        "count": len(values),
        "ungraded": sum(sample.get("ungraded", 0) for sample in samples),
        **totals,
        "tokens_per_second": totals["tokens"] / totals["seconds"],
        "metrics": metrics,
    }


def interval_95(correct, count):
    """Wilson's 95 % interval of the proportion correct / count: [low, high]."""
    z = 1.959964
    share = correct / count
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / scale
    return [max(0.0, middle - half), min(1.0, middle + half)]


def report(folder):
    """Print the summary, or that there is none yet; returns it, or None."""
    path = folder / "summary.json"
    if not path.exists():
        print(f"{folder}: this process has finished; others are still running, or not yet started")
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    print(f"{folder}: {summary['count']} answers")
    if summary["interval_95"]:
        low, high = summary["interval_95"]
        print(f"accuracy {summary['accuracy']:.1%}, 95 % interval {low:.1%} to {high:.1%}")
    for name, value in summary["metrics"].items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(
        f"{summary['tokens']:,} tokens, {summary['forwards']:,} forward passes, "
        f"{summary['tokens_per_second']:.0f} tokens/s per process"
    )
    return summary


# ------- the model
def load_config(name, revision):
    """The configuration of a model, and the number of its ids, without loading its weights.

    Raises:
        SystemExit: if they cannot be loaded.
    """
    name, revision = decode.base_of(name, revision)
    config = decode.read_config(name, revision)
    try:
        skeleton = empty_model(name, revision, config)
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        why = pt.first_line(error)
        sys.exit(f"--model {name} cannot be loaded ({why}); give a hub id or a model folder")
    return config, skeleton.get_input_embeddings().num_embeddings


def check_padding(args, model, prompts):
    """Check that the model heeds attention_mask, if there are prompts that will be padded.

    Raises:
        SystemExit: if it does not.
    """
    if args.batch_size == 1 or len({len(prompt) for prompt in prompts}) == 1:
        return
    if not decode.is_block_causal(model) and not decode.heeds_attention_mask(model, prompts[0]):
        sys.exit(
            f"--model {args.model} does not heed attention_mask, so padding would change answers; "
            "give --batch_size 1"
        )


def model_identity(name, config, hashes=None):
    """A text that differs between models: a hash of the folder's contents, or the hub's commit.

    `hashes` is a file that keeps the hash, see `folder_digest`.
    """
    if not os.path.isdir(name):
        return f"{name}@{config._commit_hash}"
    identity = folder_digest(name, hashes)
    base, _ = decode.base_of(name, None)
    return identity if base == name else digest(identity, model_identity(base, config, hashes))


def folder_digest(folder, hashes=None):
    """A hash of the contents of a model's folder.

    The file `hashes` keeps it, with a hash of the files' paths, sizes and times. Where these are
    the same, a later process does not read the contents again.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix in MODEL_FILES)
    stats = [(path, path.stat()) for path in paths]
    files = [f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    known = {} if hashes is None else read_hashes(hashes)
    key = digest(*files)
    if key not in known:
        known[key] = digest(*(f"{path.name} {file_digest(path)}" for path in paths))
        if hashes is not None:
            write_json(hashes, known)
    return known[key]


def read_hashes(path):
    """The hashes that `folder_digest` keeps in a file; none if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):
        return {}


# ------- the evaluation in its folder
def describe(args, options, config, task, requests, prompts):
    """All that can change an answer or its verdict, and the versions of libraries, for JSON.

    Paths and times are left out, so that a folder can be moved and its model copied.
    """
    problems = []
    for request, prompt in zip(requests, prompts, strict=True):
        problem = [request.doc, task.doc_to_target(request.doc), prompt, request.args[1]]
        problems.append(json.dumps(problem, sort_keys=True, default=str))
    grading = {}
    for name in ("metric_list", "filter_list", "process_results"):
        grading[name] = task.dump_config().get(name)  # its function as source
    settings = {
        **options,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device.partition(":")[0],
        "task": task.task_name,
        "grading_sha256": digest(json.dumps(grading, default=lambda x: getattr(x, "__name__", ""))),
        "count": len(requests),
        "problems_sha256": digest(*problems),
        "model": model_identity(args.model, config, args.output / "hashes.json"),
    }
    versions = {library: version(library) for library in LIBRARIES}
    return {"settings": settings, "versions": versions}


def lock_alone(file):
    """Whether this process alone has a lock on `file`, which it then holds."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def claim(folder, description, alone):
    """Begin the evaluation in `folder`, resume it, or join the processes that run it.

    One without any answer is begun anew, if `alone`: no other process runs it.

    Raises:
        SystemExit: if the folder has another evaluation, or something else.
    """
    path = folder / "settings.json"
    begun = (folder / "summary.json").exists() or list((folder / "answers").iterdir())
    if begun and not path.exists():
        sys.exit(f"--output {folder} has answers but no settings.json; give another folder")
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else description
        before = before["settings"] | before["versions"]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is damaged, or not of an evaluation; give another folder")
    if alone and not begun:
        write_json(path, description)
        return
    now = description["settings"] | description["versions"]
    changes = []
    for name in before | now:
        if before.get(name) != now.get(name):
            changes.append(f"{name} was {before.get(name)!r}, now {now.get(name)!r}")
    if changes:
        state = "has an" if alone else "is in use by another"
        sys.exit(
            f"--output {folder} {state} evaluation with other settings: {'; '.join(changes)}; "
            "give the same settings, or another folder"
        )


# ------- flags
def parse_args(argv=None):
    """The flags; ends with one message and status 2 if one is wrong."""
    parser = suite.make_parser(__doc__)
    decode.add_model_flags(parser)
    decode.add_decoding_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help=f"{', '.join(BENCHMARKS)}, or a .jsonl file")
    what.add_argument("--task", help="of lm-evaluation-harness; `lm_eval ls tasks` lists them")
    add = parser.add_argument
    files = "for answers, samples and summary"
    add("--output", required=True, type=Path, metavar="DIR", help=files)
    add("--limit", type=int, help="use only the first problems (all)")
    add("--batch_size", type=int, default=16, help="answers at a time per process (%(default)s)")
    add("--num_fewshot", type=int, help="worked examples in the prompt (the task's own number)")
    add("--no_chat_template", action="store_true", help="plain prompts, for base models")
    unsafe = "let a task run the code that the model wrote"
    add("--confirm_run_unsafe_code", action="store_true", help=unsafe)
    add("--local_rank", help=argparse.SUPPRESS)  # the launcher's
    args = parser.parse_args(argv)
    suite.check_lowest(parser, args, limit=1, batch_size=1, num_fewshot=0)
    if args.dataset and args.num_fewshot:
        parser.error(f"--num_fewshot {args.num_fewshot}: only with --task")
    decode.check_flags(parser, args)
    return args


if __name__ == "__main__":
    main(parse_args())
