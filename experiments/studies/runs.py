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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import islice, product
from multiprocessing import active_children, get_context
from pathlib import Path

import evaluate
import suite
import torch
import train_control
from studies.arms import THRESHOLD, Benchmark, Task, constant, evaluation_folder, script_of
from suite import digest, file_digest, write_json
from tqdm import tqdm

import pt
from train_blockwise import empty_model, logit_shift, mask_token_id

# ------- what all runs have in common


def prepare(args):
    """Make the base, unless one is given, and the .pt file in `args.output`; returns the Task."""
    model, data, datasets = args.model, args.data, args.test
    if args.setup.build_base:
        base = args.output / f"{args.setup.name}-base"
        if not base.exists():
            partial = base.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed study left
            args.setup.build_base(partial)
            os.rename(partial, base)
        model = str(base / "model")
        data = str(base / "data" / "train.jsonl")
        datasets = [str(base / "data" / f"{name}.jsonl") for name in args.setup.tests]
    tests = [load_test(args, dataset) for dataset in datasets]
    config, _ = evaluate.load_config(model, "main")
    contents = evaluate.model_identity(model, config)
    pt_file = preprocess(args, model, data, contents)
    constants = {"MODEL_NAME": model, "DATA_PT": str(pt_file)}
    tokenizer = pt.load_tokenizer(model, "main")
    known = {"MASK_ID": mask_token_id(config, tokenizer), "LOGIT_SHIFT": logit_shift(config)}
    constants |= {name: value for name, value in known.items() if value is not None}
    return Task(
        model=model,
        weights=empty_model(model, "main", config).num_parameters(),
        name=f"{os.path.basename(model)}-{digest(contents)[:8]}",
        tests=tests,
        constants=constants | args.constants,
        lengths=answer_lengths(args, pt_file),
        identity=digest(contents, file_digest(pt_file)),
    )


def load_test(args, dataset):
    """The test set of `dataset`; a file is named by its name."""
    problems = list(evaluate.load_task(dataset, flag="--test").eval_docs)[: args.limit]
    return Benchmark(
        name=Path(dataset).stem,
        dataset=dataset,
        count=len(problems),
        decoding=f"gen{args.gen_length}-{digest(json.dumps([problems, args.batch_size]))[:8]}",
    )


def preprocess(args, model, data, contents):
    """The .pt file of `data`; pt.py makes it unless it is there. Its name has what decides it."""
    words = ["--max_len", str(constant(args, "MAX_LEN"))]
    if args.setup.build_base:
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
    """Do the runs, `args.jobs` at a time, the base first; when it fails, no others are begun.

    Returns:
        a message for each that failed.
    """
    context = get_context("spawn")
    gpus = context.SimpleQueue()  # of each process of the pool
    for number in range(args.jobs):
        gpus.put(visible_gpus()[number * args.num_gpus : (number + 1) * args.num_gpus])
    pool = ProcessPoolExecutor(
        args.jobs,
        context,
        initializer=begin_worker,
        initargs=(os.getpid(), threads(args), gpus),
    )
    waiting = iter(sorted(ways_of_runs, key=lambda run: run.method != "base"))
    running = {}
    failed = []
    progress = tqdm(total=len(ways_of_runs), unit=" runs", desc="study")
    try:
        while True:
            # no more than can begin, for the pool does not give back what waits in its queue
            for run in islice(waiting, args.jobs - len(running)):
                running[pool.submit(complete, args, task, run, ways_of_runs[run])] = run
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                progress.update()
                error = future.exception()
                if error:
                    failed.append(f"{run.folder}: {error}")
                if error and (run.method == "base" or isinstance(error, BrokenProcessPool)):
                    waiting = iter(())
    except KeyboardInterrupt:
        for process in active_children():
            process.terminate()
        raise
    finally:
        progress.close()
        pool.shutdown()


def visible_gpus():
    """The numbers of the GPUs that this process may use, as text."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def threads(args):
    """Threads for each of the processes that share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // (args.jobs * args.num_gpus))


def begin_worker(parent, count, gpus):
    """Prepare a process of the pool: it ends when the study does, and uses `count` threads and the
    next of `gpus`.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and its trainer too
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # the study was killed before this call
        os._exit(1)
    torch.set_num_threads(count)
    own = gpus.get()
    if own:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)  # before CUDA starts here


# ------- one run


def complete(args, task, run, ways):
    """Train and evaluate one run, or do what is left of it; its output is appended to its log.

    Raises:
        RuntimeError: if that fails.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    missing = {}
    for way, test in product(sorted(ways), task.tests):
        output = evaluation_folder(run, test, way)
        if not (output / "summary.json").exists():
            missing[output] = way, test
    with open(run.folder / "log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if missing:
                model = task.model if run.method == "base" else train(args, run)
            for output, (way, test) in missing.items():
                places = suite.flags({"model": model, "dataset": test.dataset, "output": output})
                measure(args, output, [*places, *decoding_flags(args, way)])
        except SystemExit as error:  # it would end this process, which has other runs to do
            raise RuntimeError(f"{error.code}; see {log.name}") from error
    if args.remove_checkpoints and run.method != "base":
        remove_checkpoint(run.folder)


def remove_checkpoint(folder):
    """Remove the checkpoint of a run; one that is removed in part is not taken for a checkpoint."""
    removed = folder / "removed"
    shutil.rmtree(removed, ignore_errors=True)  # what a killed study left
    checkpoint = find_checkpoint(folder)
    if checkpoint:
        os.rename(checkpoint, removed)
        shutil.rmtree(removed)


def execute(args, script, words, folder="."):
    """Run a script on `args.num_gpus` GPUs; its output goes to the run's log, which is stdout here.

    Returns:
        its exit status.
    """
    start = [sys.executable]
    if args.num_gpus > 1:
        start = suite.launcher(args.num_gpus, visible_gpus())
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
    settings = {
        "gen_length": args.gen_length,
        "block_length": way.block_length,
        "steps": decoding_steps(args, way),
        "batch_size": args.batch_size,
    }
    if args.limit:
        settings["limit"] = args.limit
    if way.tokens_per_step == 0:
        settings["threshold"] = THRESHOLD
    switches = ["--confidence_eos_eot_inf"] if way.end_tokens_last else []
    return [*suite.flags(settings), *switches]


def decoding_steps(args, way):
    """The forward passes that an answer takes, at most."""
    steps_per_block = math.ceil(way.block_length / (way.tokens_per_step or 1))
    return args.gen_length // way.block_length * steps_per_block


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
