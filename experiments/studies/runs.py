"""How a study's runs are done: what all need is made first, then each is trained and evaluated."""

import ctypes
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from multiprocessing import active_children, get_context

import evaluate
import suite
import torch
import train_control
from studies.arms import THRESHOLD, Task, constant, evaluation_folder, script_of
from suite import digest, file_digest, write_json
from tqdm import tqdm

# ------- what all runs have in common


def prepare(args):
    """Make the base, unless one is given, and the .pt file in `args.output`; returns the Task."""
    model, data, test = args.model, args.data, args.test
    if model is None:
        base = args.output / f"{args.setup.name}-base"
        if not (base / "model").exists():
            shutil.rmtree(base, ignore_errors=True)  # what a killed study left
            args.setup.build_base(base)
        model = str(base / "model")
        data = str(base / "data" / "train.jsonl")
        test = str(base / "data" / "test.jsonl")
    problems = list(evaluate.load_task(test).eval_docs)[: args.limit]
    config, _ = evaluate.load_config(model, "main")
    contents = evaluate.model_identity(model, config)
    pt_file = preprocess(args, model, data, contents)
    constants = {
        "MODEL_NAME": model,
        "DATA_PT": str(pt_file),
        "MASK_ID": getattr(config, "mask_token_id", constant(args, "MASK_ID")),
    }
    return Task(
        model=model,
        test=test,
        name=f"{os.path.basename(model)}-{digest(contents)[:8]}",
        constants=constants | args.constants,
        lengths=answer_lengths(args, pt_file),
        identity=digest(contents, file_digest(pt_file)),
        decoding=f"gen{args.gen_length}-{digest(json.dumps([problems, args.batch_size]))[:8]}",
    )


def preprocess(args, model, data, contents):
    """The .pt file of `data`; pt.py makes it unless it is there. Its name has what decides it."""
    words = ["--max_len", str(constant(args, "MAX_LEN"))]
    if args.model is None:
        words += ["--max_samples", "0", "--filter_type", ""]  # all of the toy's rows
    source = file_digest(data) if os.path.isfile(data) else data
    path = args.output / f"train-{digest(contents, source, *words)[:8]}.pt"
    if not path.exists():
        places = suite.flags({"model": model, "dataset": data, "output": path})
        if suite.run([sys.executable, suite.ROOT / "pt.py", *places, *words]):
            sys.exit("pt.py failed, see above")
    return path


def answer_lengths(args, pt_file):
    """The tokens of each answer that is trained on, without answers that are cut off whole."""
    max_len = constant(args, "MAX_LEN")
    lengths = []
    for row in torch.load(pt_file, weights_only=True)[: constant(args, "MAX_SAMPLES")]:
        length = min(len(row["full_ids"]), max_len) - row["prompt_len"]
        if length > 0:
            lengths.append(length)
    return lengths


# ------- all runs


def do_all(args, task, ways_of_runs):
    """Do the runs, `args.jobs` at a time, the base's first: if it fails, there are no others.

    Returns:
        a message for each that failed.
    """
    pool = ProcessPoolExecutor(
        args.jobs,
        get_context("spawn"),
        initializer=begin_worker,
        initargs=(os.getpid(), threads(args)),
    )
    do = partial(complete, args, task)
    base = {run: ways for run, ways in ways_of_runs.items() if run.method == "base"}
    others = {run: ways for run, ways in ways_of_runs.items() if run.method != "base"}
    try:
        failed = do_batch(pool, do, base) if base else []
        if not failed:
            failed = do_batch(pool, do, others)
    except KeyboardInterrupt:
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()
    return failed


def do_batch(pool, do, ways_of_runs):
    """Do these runs in the pool's processes; returns a message for each that failed."""
    waiting = {pool.submit(do, run, ways): run for run, ways in ways_of_runs.items()}
    failed = []
    for future in tqdm(as_completed(waiting), total=len(waiting), unit=" runs", desc="study"):
        if future.exception():
            failed.append(f"{waiting[future].folder}: {future.exception()}")
    return failed


def threads(args):
    """Threads for each of the processes that share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // (args.jobs * args.num_gpus))


def begin_worker(parent, count):
    """Prepare a process of the pool: it ends when the study does, and uses `count` threads."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and its trainer too
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # the study was killed before this call
        os._exit(1)
    torch.set_num_threads(count)


# ------- one run


def complete(args, task, run, ways):
    """Train and evaluate one run, or do what is left of it; its output is appended to its log.

    Raises:
        RuntimeError: if that fails.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    missing = {}
    for way in sorted(ways):
        output = evaluation_folder(task, run, way)
        if not (output / "summary.json").exists():
            missing[output] = way
    if not missing:
        return
    with open(run.folder / "log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            model = task.model if run.method == "base" else train(args, run)
            for output, way in missing.items():
                places = suite.flags({"model": model, "dataset": task.test, "output": output})
                measure(args, output, [*places, *decoding_flags(args, way)])
        except SystemExit as error:  # it would end this process, which has other runs to do
            raise RuntimeError(f"{error.code}; see {log.name}") from error
    if args.remove_checkpoints and run.method != "base":
        shutil.rmtree(model)


def execute(args, script, words, folder="."):
    """Run a script on `args.num_gpus` GPUs; its output goes to the run's log, which is stdout here.

    Returns:
        its exit status.
    """
    start = suite.launcher(args.num_gpus) if args.num_gpus > 1 else [sys.executable]
    command = [*start, script, *words]
    return suite.run(command, folder, sys.stdout, OMP_NUM_THREADS=str(threads(args)))


def train(args, run):
    """Train `run` to its end, from where it was stopped if it was begun; returns its checkpoint.

    Raises:
        SystemExit: if the trainer fails.
    """
    script = script_of(run.method)
    for _ in range(2):  # a second time, if a killed study's trainer came first and now has ended
        wait_for_trainer(run.folder)
        if find_checkpoint(run.folder) is None:
            start = time.monotonic()
            status = execute(args, script, training_flags(run), run.folder)
            if status == 0:  # with its start and its saving; without what it did before a stop
                write_json(run.folder / "seconds.json", round(time.monotonic() - start, 1))
    checkpoint = find_checkpoint(run.folder)
    if checkpoint is None:
        sys.exit(f"{os.path.basename(script)} failed")
    return checkpoint


def training_flags(run):
    """The flags of the run's trainer."""
    constants = run.constants | {"CKPT_DIR": "ckpt"}
    if run.method in train_control.CONTROLS:
        constants["CONTROL"] = run.method
    for name, value in constants.items():
        if isinstance(value, list):
            constants[name] = ",".join(value)
    return suite.flags(constants)


def wait_for_trainer(folder):
    """Wait until no trainer works in the run's folder: one that a killed study left may do so."""
    for path in folder.glob("ckpt_logs*/state/lock"):
        with suppress(FileNotFoundError), open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def find_checkpoint(folder):
    """The checkpoint of a run that is trained to its end, otherwise None."""
    if list(folder.glob("ckpt_logs*/state")):
        return None
    return max(folder.glob("ckpt_step*"), default=None)


def decoding_flags(args, way):
    """The flags of evaluate.py for a way of decoding."""
    steps_per_block = math.ceil(way.block_length / (way.tokens_per_step or 1))
    settings = {
        "gen_length": args.gen_length,
        "block_length": way.block_length,
        "steps": args.gen_length // way.block_length * steps_per_block,
        "batch_size": args.batch_size,
    }
    if args.limit:
        settings["limit"] = args.limit
    if way.tokens_per_step == 0:
        settings["threshold"] = THRESHOLD
    switches = ["--confidence_eos_eot_inf"] if way.end_tokens_last else []
    return [*suite.flags(settings), *switches]


def measure(args, output, words):
    """Evaluate as `words` say: on a CPU in this process, which has loaded the libraries.

    Raises:
        SystemExit: if the evaluation fails.
    """
    if args.num_gpus > 1 or torch.cuda.is_available():  # this process must not keep GPU memory
        execute(args, evaluate.__file__, words)
    else:
        evaluate.main(evaluate.parse_args(words))
    if not (output / "summary.json").exists():
        sys.exit(f"{output}: the evaluation failed")
