"""Measure a training step against its published form, and saving against a plain write.

    python experiments/bench.py                                 # toy shape, a minute on a laptop
    python experiments/bench.py --shape 8b --batch 32 --output bench.json             # on a GPU
    python experiments/bench.py --part save --shape 8b          # writes to the current folder

A step is the trainer's train_step, in three forms that take turns in one process:

    published   masks token by token in Python, logits of all positions, loss with ignore_index
    suite       make_batch and supervised_loss of the trainer
    compiled    the same with COMPILE

With --method fullseq also in two forms of train_lift.py, whose steps cost more:

    lift, approximate       a scoring forward pass, or one pass for both (--forms suite,lift)

Model, adapter, rows, masks, dropout, compute_dtype and the update by DeepSpeed are the same. The
model is this suite's LLaDA with LLaDA's vocabulary and random weights; nothing is downloaded.

Shapes: B rows, L tokens per row, V vocabulary.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from unittest.mock import Mock, patch

SHAPES = {  # arguments of LLaDAConfig, whose defaults are LLaDA-8B's
    "toy": {"d_model": 96, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 256},
    "1b": {"d_model": 2048, "n_layers": 12, "n_heads": 16, "mlp_hidden_size": 6144},
    "8b": {},
}
FORMS = ["published", "suite", "compiled"]
LIFT_FORMS = ["lift", "approximate"]
TIMED_STEPS = 2  # in each turn of a form, after one untimed step
PAD_ID = 126081  # LLaDA's <|endoftext|>
IGNORED = -100  # label of a position that is not in the loss


def parse_args(argv):
    """The flags; ends with one message and status 2 if one is wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--part", choices=["step", "save"], default="step", help="what to measure (%(default)s)")
    add("--method", choices=["blockwise", "fullseq"], default="blockwise", help="(%(default)s)")
    add("--shape", choices=SHAPES, default="toy", help="of the model (%(default)s)")
    add("--batch", type=int, default=8, help="rows per step (%(default)s)")
    add("--length", type=int, default=256, help="tokens per row (%(default)s)")
    add("--lora_rank", type=int, default=256, help="(%(default)s)")
    add("--repeats", type=int, default=5, help="turns (of 2 timed steps), or saves (%(default)s)")
    add("--forms", default=",".join(FORMS), help="some of %(default)s")
    add("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    add("--output", metavar="FILE", help="also write the figures to this new file, as JSON")
    args = parser.parse_args(argv)
    args.forms = args.forms.split(",")
    for name, lowest in {"batch": 1, "length": 2, "lora_rank": 1, "repeats": 1}.items():
        value = getattr(args, name)
        if value < lowest:
            parser.error(f"--{name} {value}: must be at least {lowest}")
    for form in args.forms:
        known = FORMS + LIFT_FORMS if args.method == "fullseq" else FORMS
        if form not in known:
            parser.error(f"--forms: {form!r} is none of {', '.join(known)} ({args.method})")
    folder = os.path.dirname(args.output or "") or "."
    if args.output and (os.path.exists(args.output) or not os.access(folder, os.W_OK)):
        parser.error(f"--output {args.output}: exists, or cannot be written; give another file")
    return args


if __name__ == "__main__":  # before the slow imports: --help and a wrong flag answer at once
    ARGS = parse_args(sys.argv[1:])
    if ARGS.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed prefers a GPU

import deepspeed
import numpy as np
import suite  # noqa: F401 (the trainers are one folder up)
import torch
import train_lift
from files import write_json
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM
from tqdm import tqdm

import train_blockwise
import train_fullseq

TRAINERS = {"blockwise": train_blockwise, "fullseq": train_fullseq}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


# ------- model and data; bench_decode.py takes these from here, and the report
def random_llada(shape, dtype):
    """A LLaDA on DEVICE with random weights; `shape` is a dict of LLaDAConfig's arguments."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LLaDAModelLM._from_config(LLaDAConfig(**shape), dtype=dtype)


def random_examples(rows, length):
    """Examples as load_examples gives them: length / 2 to length ids, two fifths are prompt."""
    rng = np.random.default_rng(0)
    examples = []
    for size in rng.integers(max(2, length // 2), length + 1, size=rows).tolist():
        examples.append((max(1, 2 * size // 5), torch.from_numpy(rng.integers(PAD_ID, size=size))))
    return examples


def set_constants(args, trainer):
    """Give the trainer this run's constants."""
    trainer.MAX_LEN = args.length
    trainer.MICRO_BSIZE = args.batch
    trainer.GRAD_ACC = 1
    trainer.LORA_RANK = args.lora_rank
    trainer.COMPILE = "compiled" in args.forms  # take_step runs the other forms without it
    trainer.TOTAL_TRAIN_STEPS = args.repeats * (1 + TIMED_STEPS)


def build_model(args, trainer):
    """The trainer's model with its adapter, on a random LLaDA in the place of MODEL_NAME."""
    base = random_llada(SHAPES[args.shape], trainer.compute_dtype())
    with patch.object(trainer, "load_pretrained", return_value=(base, {"missing_keys": []})):
        return trainer.build_model(DEVICE)


def build_engine(args, trainer):
    model = build_model(args, trainer)
    lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = trainer.ds_config(trainer.TOTAL_TRAIN_STEPS * len(args.forms))
    return deepspeed.initialize(model=model, model_parameters=lora, config=config)[0]


# ------- the published form
def published_batch(trainer, examples, draws, numbers, pad_id):
    """noisy_ids and labels, (B, L) each: the batch and the masks of make_batch, token by token."""
    inputs = []
    labels = []
    for number in numbers:
        sample, block = draws[number]
        prompt_len, ids = examples[sample]
        noise = np.random.default_rng((trainer.SEED, number)).random(1 + trainer.MAX_LEN, "f4")
        t = trainer.MASK_PROB_EPS + (1 - trainer.MASK_PROB_EPS) * noise[0]
        block_size = getattr(trainer, "BLOCK_SIZE", trainer.MAX_LEN)
        first = prompt_len + block * block_size
        noisy = ids.tolist() + [pad_id] * (trainer.MAX_LEN - len(ids))
        label = [IGNORED] * trainer.MAX_LEN
        for pos in range(prompt_len, len(ids)):
            active = first <= pos < first + block_size
            p_mask = t if active else trainer.SUFFIX_MASK_PROB
            if pos < first:
                p_mask = trainer.PREFIX_MASK_RATE
            if noise[1 + pos] < p_mask:
                label[pos] = noisy[pos] if active else IGNORED
                noisy[pos] = trainer.MASK_ID
        inputs.append(noisy)
        labels.append(label)
    return torch.tensor(inputs), torch.tensor(labels)


def published_loss(model, noisy_ids, labels):
    """The value of supervised_loss, from the logits of all positions in the model's dtype."""
    labels = labels.to(DEVICE)
    logits = model(input_ids=noisy_ids.to(DEVICE)).logits.flatten(0, 1)  # (B * L, V)
    nll = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    count = (labels != IGNORED).sum(1)  # (B,)
    return (nll.float().view_as(labels).sum(1) / count.clamp(min=1)).mean()


# ------- the step
def take_step(form, trainer, *arguments):
    """The trainer's train_step in this form; returns the loss."""
    make_batch = trainer.make_batch
    supervised_loss = trainer.supervised_loss
    if form == "published":
        make_batch = partial(published_batch, trainer)
        supervised_loss = published_loss
    if form in LIFT_FORMS:
        train_lift.MAX_LEN = trainer.MAX_LEN
        train_lift.APPROXIMATE = form == "approximate"
        make_batch = train_lift.make_batch
        supervised_loss = train_lift.supervised_loss
    functions = patch.multiple(trainer, make_batch=make_batch, supervised_loss=supervised_loss)
    stance = torch.compiler.set_stance("default" if form == "compiled" else "force_eager")
    with functions, stance:
        return trainer.train_step(*arguments, PAD_ID)


def count_flops(form, *arguments):
    """The loss of a step, and the FLOPs of its matrix products (on a GPU, of attention too)."""
    if form == "compiled":
        form = "suite"  # the same products, and they can be counted
    with FlopCounterMode(display=False) as counter:
        loss = take_step(form, *arguments)
    return {"loss": loss, "flops": counter.get_total_flops()}


def take_turn(row, form, trainer, engine, examples, draws, numbers):
    """Add a turn's seconds and peak memory to the form's row, or what ended the turn as "error"."""
    try:
        if not row["seconds"]:
            row |= count_flops(form, trainer, engine, examples, draws, numbers[0])
        take_step(form, trainer, engine, examples, draws, numbers[0])  # compiles, and warms up
        reset_peak()
        for micro_batches in numbers[1:]:
            start = time.perf_counter()
            take_step(form, trainer, engine, examples, draws, micro_batches)
            deepspeed.get_accelerator().synchronize()
            row["seconds"].append(time.perf_counter() - start)
    except RuntimeError as error:  # out of memory, or no compiler
        row["error"] = f"{type(error).__name__}: {error!s:.200}"
    peak = torch.cuda.max_memory_allocated() if GPU else peak_host_memory()
    row["peak_bytes"] = max(row["peak_bytes"], peak)


def reset_peak():
    """Begin a new peak. Without the kernel's clear_refs the host's is that of the whole process."""
    deepspeed.get_accelerator().reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_host_memory():
    """Bytes of memory that this process has held at most since reset_peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def matrix_rate(dtype):
    """FLOP/s of this machine in a large product of square matrices."""
    size = 8192 if GPU else 2048
    matrix = torch.randn(size, size, device=DEVICE, dtype=dtype)
    how = {"globals": {"matrix": matrix}, "num_threads": torch.get_num_threads()}
    return 2 * size**3 / Timer("matrix @ matrix", **how).blocked_autorange().median


def measure_steps(args, trainer):
    """The figures of every form, or its error."""
    trainer.init_distributed()
    set_constants(args, trainer)
    examples = random_examples(trainer.TOTAL_TRAIN_STEPS * args.batch, args.length)
    draws, numbers = trainer.plan(examples, world_size=1)
    turns = numbers.reshape(args.repeats, 1 + TIMED_STEPS, 1, args.batch)
    rows = {form: {"seconds": [], "peak_bytes": 0} for form in args.forms}
    engine = build_engine(args, trainer)
    for turn in tqdm(turns, unit=" turns"):
        for form, row in rows.items():
            if "error" in row:
                continue
            take_turn(row, form, trainer, engine, examples, draws, turn)
            if "error" in row:  # DeepSpeed cannot continue after half a step
                engine.destroy()
                del engine
                gc.collect()
                engine = build_engine(args, trainer)
    trainer.dist.destroy_process_group()
    result = {"matrix_rate": matrix_rate(trainer.compute_dtype()), "rows": rows}
    add_ratios(args, result)
    return result


def add_ratios(args, result):
    """Add medians, and ratios to the published form, to the forms that have no error."""
    rows = {form: row for form, row in result["rows"].items() if "error" not in row}
    for row in rows.values():
        row["step_seconds"] = median(row["seconds"])
        row["tokens_per_second"] = args.batch * args.length / row["step_seconds"]  # with padding
        row["matrix_share"] = row["flops"] / row["step_seconds"] / result["matrix_rate"]
        if "published" in rows:
            row["speedup"] = rows["published"]["step_seconds"] / row["step_seconds"]
            row["memory_ratio"] = row["peak_bytes"] / rows["published"]["peak_bytes"]


# ------- saving
def measure_save(args, trainer):
    """Medians of save_merged and of a plain write of as many bytes, in turn."""
    set_constants(args, trainer)
    model = build_model(args, trainer)
    size = 2 * model.get_base_model().num_parameters()
    if shutil.disk_usage(".").free < 2.1 * size:
        sys.exit(f"--part save needs {2.1 * size / 1e9:.1f} GB in the current folder; free some")
    tokenizer = Mock()  # its few MB are not written
    row = {"bytes": size, "seconds": [], "plain_seconds": [], "host_bytes": 0}
    for _ in tqdm(range(args.repeats), unit=" saves"):
        with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
            row["plain_seconds"].append(timed(write_plain, f"{folder}/plain", size))
            reset_peak()
            before = peak_host_memory()
            row["seconds"].append(timed(trainer.save_merged, model, tokenizer, f"{folder}/model"))
            row["host_bytes"] = max(row["host_bytes"], peak_host_memory() - before)
    row["save_seconds"] = median(row["seconds"])
    row["ratio"] = row["save_seconds"] / median(row["plain_seconds"])
    row["memory_ratio"] = row["host_bytes"] / size
    return {"rows": {"save": row}}


def timed(function, *arguments):
    """Seconds until the function has returned, and the disk has what it wrote."""
    os.sync()
    start = time.perf_counter()
    function(*arguments)
    os.sync()
    return time.perf_counter() - start


def write_plain(path, size):
    chunk = os.urandom(2**26)
    with open(path, "wb") as file:
        for start in range(0, size, len(chunk)):
            file.write(chunk[: size - start])


# ------- report
def describe_machine():
    """What the figures hold for."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    name = torch.cuda.get_device_name() if GPU else cpu
    machine = {"device": name, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    machine["dtype"] = str(train_blockwise.compute_dtype())
    for library in ("torch", "deepspeed", "transformers", "peft"):
        machine[library] = version(library)
    return machine


def report(args, result):
    """Print the numbers of each row; write everything to --output."""
    print(result["machine"])
    for name, row in result["rows"].items():
        numbers = [key for key, value in row.items() if isinstance(value, (int, float))]
        figures = ", ".join(f"{key} {row[key]:.4g}" for key in numbers)
        print(f"{name}: {row.get('error', figures)}")
    if args.output:
        write_json(args.output, result)
        print(f"wrote {args.output}")


def main():
    if ARGS.device == "cuda" and not GPU:
        sys.exit("--device cuda: torch sees no GPU; give --device cpu")
    measure = measure_steps if ARGS.part == "step" else measure_save
    machine = describe_machine()
    result = measure(ARGS, TRAINERS[ARGS.method])
    report(ARGS, {"machine": machine, "settings": vars(ARGS)} | result)
    if all("error" in row for row in result["rows"].values()):
        sys.exit(f"no form has figures; lower --batch {ARGS.batch}")


if __name__ == "__main__":
    main()
