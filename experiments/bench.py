"""Measure a training step against its published form, and saving against a plain write.

    python experiments/bench.py                                 # toy shape, a minute on a laptop
    python experiments/bench.py --shape 8b --batch 32 --output bench.json             # on a GPU
    python experiments/bench.py --part save --shape 8b          # writes to the current folder
    python experiments/bench.py --fit --shape 0.6b              # which MICRO_BSIZE fits which GPU

A step is the trainer's train_step, in three forms that take turns in one process:

    published   masks token by token in Python, logits of all positions, loss with ignore_index
    suite       make_batch and supervised_loss of the trainer
    compiled    the same with COMPILE

With --method fullseq also in two forms of train_lift.py, whose steps cost more:

    lift, approximate       a scoring forward pass, or one pass for both (--forms suite,lift)

Model, adapter, rows, masks, dropout, compute_dtype and the update by DeepSpeed are the same. The
model has random weights: this suite's LLaDA, or the shape of another family. Nothing is downloaded.

--fit takes steps of --rows rows with every MICRO_BSIZE of 1, 2, 4, ... --batch, with and without
COMPILE and ACTIVATION_CHECKPOINTING, and prints the memory that each took beside the one that the
trainers compute before a run. With --computed it takes no steps.
Guide: experiments/docs/performance.md

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
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import deepspeed
import numpy as np
import suite
import torch
import torch.distributed as dist
import train_lift
from huggingface_hub import save_torch_state_dict
from suite import write_json
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from toy_task.llada.configuration_llada import LLaDAConfig
from toy_task.llada.modeling_llada import LLaDAModelLM
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, OlmoeConfig, Qwen2Config, Qwen3Config

import train_blockwise
import train_fullseq

TRAINERS = {"blockwise": train_blockwise, "fullseq": train_fullseq}
QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
DREAM = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
DREAM |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
SMALL = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8}
TINY_QWEN3 = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
TINY_QWEN3 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SHAPES = {  # a configuration's class, and what differs from its defaults
    "toy": (LLaDAConfig, {"d_model": 96, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 256}),
    "small": (LLaDAConfig, {"d_model": 512, "n_layers": 8, "n_heads": 8, "mlp_hidden_size": 1536}),
    "1b": (LLaDAConfig, {"d_model": 2048, "n_layers": 12, "n_heads": 16, "mlp_hidden_size": 6144}),
    "8b": (LLaDAConfig, {}),  # LLaDA's
    "toy-qwen3": (Qwen3Config, TINY_QWEN3),
    "0.6b": (Qwen3Config, QWEN3),  # A2D's, of Qwen3-0.6B
    "dream-7b": (Qwen2Config, DREAM),
    "moe-7b": (OlmoeConfig, {"vocab_size": 157184, "intermediate_size": 1024}),  # OLMoE's shape
    "toy-moe": (OlmoeConfig, {"vocab_size": 157184, "num_experts_per_tok": 2} | SMALL),
}
GPU_MEMORY = (12, 24, 40, 48, 80)  # GB
FORMS = ["published", "suite", "compiled"]
LIFT_FORMS = ["lift", "approximate"]
TIMED_STEPS = 2  # in each turn of a form, after one untimed step
PAD_ID = 126081  # LLaDA's <|endoftext|>
IGNORED = -100  # label of a position that is not in the loss


# ------- the published form
def published_batch(constants, examples, draws, pad_id):
    """noisy_ids and labels, (B, L) each: the batch and the masks of make_batch, token by token."""
    inputs = []
    labels = []
    for number, sample, offset in draws.tolist():
        prompt_len, ids = examples[sample]
        rng = np.random.default_rng((constants.SEED, number))
        noise = rng.random(1 + constants.MAX_LEN, np.float32)
        t = constants.MASK_PROB_EPS + (1 - constants.MASK_PROB_EPS) * noise[0]
        block_size = getattr(constants, "BLOCK_SIZE", constants.MAX_LEN)
        first = prompt_len + offset
        noisy = ids.tolist() + [pad_id] * (constants.MAX_LEN - len(ids))
        label = [IGNORED] * constants.MAX_LEN
        for pos in range(prompt_len, len(ids)):
            active = first <= pos < first + block_size
            p_mask = t if active else constants.SUFFIX_MASK_PROB
            if pos < first:
                p_mask = constants.PREFIX_MASK_RATE
            if noise[1 + pos] < p_mask:
                label[pos] = noisy[pos] if active else IGNORED
                noisy[pos] = constants.MASK_ID
        inputs.append(noisy)
        labels.append(label)
    return torch.tensor(inputs), torch.tensor(labels)


def published_loss(model, noisy_ids, labels):
    """The value of supervised_loss, from the logits of all positions in the model's dtype."""
    device = model.get_input_embeddings().weight.device
    labels = labels.to(device)
    logits = model(input_ids=noisy_ids.to(device)).logits.flatten(0, 1)  # (B * L, V)
    nll = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    count = (labels != IGNORED).sum(1)  # (B,)
    return (nll.float().view_as(labels).sum(1) / count.clamp(min=1)).mean()


# ------- the step
def micro_batch_loss(form, trainer, constants, run, draws):
    """The loss of B draws in this form; ()."""
    if form == "published":
        noisy_ids, labels = published_batch(constants, run.examples, draws, PAD_ID)
        if constants.LOGIT_SHIFT:
            labels = labels.roll(-1, dims=1)  # the first is never one
        return published_loss(run.engine, noisy_ids, labels)
    if form in LIFT_FORMS:
        trainer = train_lift
        own = {"APPROXIMATE": form == "approximate"}
        constants = argparse.Namespace(**train_lift.CONSTANTS | vars(constants) | own)
    batch = trainer.make_batch(constants, run.examples, draws, PAD_ID)
    return trainer.supervised_loss(constants, run.engine, *batch)


def take_step(form, trainer, constants, run, step):
    """The trainer's train_step in this form; returns the loss."""
    loss = partial(micro_batch_loss, form, trainer, constants, run)
    with torch.compiler.set_stance("default" if form == "compiled" else "force_eager"):
        return trainer.train_step(constants, run, step, loss)


def count_flops(form, *arguments):
    """The loss of a step, and the FLOPs of its matrix products (on a GPU, of attention too)."""
    if form == "compiled":
        form = "suite"  # the same products, and they can be counted
    with FlopCounterMode(display=False) as counter:
        loss = take_step(form, *arguments)
    return {"loss": loss, "flops": counter.get_total_flops()}


def take_turn(row, form, trainer, constants, run, first):
    """Add a turn's seconds and peak memory to the form's row, or what ended the turn as "error".

    The turn has the step `first`, whose figures do not count, and TIMED_STEPS after it.
    """
    try:
        if not row["seconds"]:
            row |= count_flops(form, trainer, constants, run, first)
        take_step(form, trainer, constants, run, first)  # compiles, and warms up
        reset_peak()
        for step in range(first + 1, first + 1 + TIMED_STEPS):
            start = time.perf_counter()
            take_step(form, trainer, constants, run, step)
            deepspeed.get_accelerator().synchronize()
            row["seconds"].append(time.perf_counter() - start)
    except RuntimeError as error:  # out of memory, or no compiler
        row["error"] = f"{type(error).__name__}: {error!s:.200}"
    on_gpu = run.engine.device.type == "cuda"
    row["peak_bytes"] = max(row["peak_bytes"], peak_memory("cuda" if on_gpu else "cpu"))


def measure_steps(args, trainer):
    """The figures of every form, or its error."""
    trainer.init_distributed()
    constants = make_constants(args, trainer)
    examples = random_examples(constants.TOTAL_TRAIN_STEPS * args.batch, args.length)
    draws, _ = trainer.plan(constants, trainer.METHOD, examples, world_size=1)
    run = SimpleNamespace(examples=examples, draws=draws)
    run.engine = build_engine(args, trainer, constants)
    rows = {form: {"seconds": [], "peak_bytes": 0} for form in args.forms}
    for turn in tqdm(range(args.repeats), unit=" turns"):
        for form, row in rows.items():
            if "error" in row:
                continue
            take_turn(row, form, trainer, constants, run, 1 + turn * (1 + TIMED_STEPS))
            if "error" in row:  # DeepSpeed cannot continue after half a step
                run.engine.destroy()
                del run.engine
                gc.collect()
                run.engine = build_engine(args, trainer, constants)
    dist.destroy_process_group()
    result = {"matrix_rate": matrix_rate(args.device, trainer.compute_dtype()), "rows": rows}
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
    """Medians of saving the merged weights and of a plain write of as many bytes, in turn."""
    model = build_model(args, trainer, make_constants(args, trainer))
    size = 2 * model.get_base_model().num_parameters()
    if shutil.disk_usage(".").free < 2.1 * size:
        sys.exit(f"--part save needs {2.1 * size / 1e9:.1f} GB in the current folder; free some")
    row = {"bytes": size, "seconds": [], "plain_seconds": [], "host_bytes": 0}
    for _ in tqdm(range(args.repeats), unit=" saves"):
        with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
            row["plain_seconds"].append(timed(write_plain, f"{folder}/plain", size))
            reset_peak()
            before = peak_host_memory()
            row["seconds"].append(timed(save_weights, trainer, model, Path(folder)))
            row["host_bytes"] = max(row["host_bytes"], peak_host_memory() - before)
    row["save_seconds"] = median(row["seconds"])
    row["ratio"] = row["save_seconds"] / median(row["plain_seconds"])
    row["memory_ratio"] = row["host_bytes"] / size
    return {"rows": {"save": row}}


def save_weights(trainer, model, folder):
    """What save_merged writes, without the few MB of code and tokenizer."""
    save_torch_state_dict(trainer.merged_weights(model.get_base_model()), folder)


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


# ------- what fits
def measure_fit(args, trainer):
    """Computed and, without --computed, measured memory and seconds of a step, per setting."""
    skeleton = random_model(args.shape, "meta", torch.bfloat16)
    sizes = [size for size in range(1, args.batch + 1) if args.rows % size == 0]
    sizes = [size for size in sizes if size & (size - 1) == 0]  # powers of 2
    rows = []
    trainer.init_distributed()
    settings = list(product((False, True), (False, True), sizes))
    for compiled, checkpointing, size in tqdm(settings, unit=" settings"):
        setting = {"COMPILE": compiled, "ACTIVATION_CHECKPOINTING": checkpointing}
        setting |= {"MICRO_BSIZE": size, "GRAD_ACC": args.rows // size}
        constants = make_constants(args, trainer, **setting, TOTAL_TRAIN_STEPS=1 + args.repeats)
        computed = trainer.memory_needed(constants, trainer.METHOD, skeleton, 1)
        row = setting | {"computed_bytes": int(computed)}
        if not args.computed:
            row |= measure_setting(args, trainer, constants)
        rows.append(row)
    dist.destroy_process_group()
    for memory in GPU_MEMORY:
        print(f"{memory} GB: {describe_fit(rows, memory * 1e9)}")
    return {"rows": {str(number): row for number, row in enumerate(rows)}}


def measure_setting(args, trainer, constants):
    """Peak memory and seconds of the steps after the first; or what ended them, as "error"."""
    examples = random_examples(constants.TOTAL_TRAIN_STEPS * args.rows, args.length)
    draws, _ = trainer.plan(constants, trainer.METHOD, examples, world_size=1)
    run = SimpleNamespace(examples=examples, draws=draws, engine=None)
    loss_of = partial(micro_batch_loss, "suite", trainer, constants, run)
    seconds = []
    torch.compiler.reset()
    reset_peak()
    try:
        run.engine = build_engine(args, trainer, constants)
        for step in range(1, len(draws) + 1):
            start = time.perf_counter()
            trainer.train_step(constants, run, step, loss_of)
            deepspeed.get_accelerator().synchronize()
            seconds.append(time.perf_counter() - start)
    except RuntimeError as error:  # out of memory, or no compiler
        return {"error": f"{type(error).__name__}: {error!s:.200}"}
    finally:
        if run.engine is not None:
            run.engine.destroy()
        run.engine = None
        gc.collect()
        deepspeed.get_accelerator().empty_cache()
    return {"peak_bytes": peak_memory(args.device), "step_seconds": median(seconds[1:])}


def describe_fit(rows, memory):
    """The setting with which a step is fastest of those that fit, by measured memory if there is.

    Compiled, as is the default on a GPU; checkpointing costs time, small batches hardly any.
    """
    fitting = []
    for row in rows:
        needed = row.get("peak_bytes", row["computed_bytes"])
        if row["COMPILE"] and "error" not in row and needed < 0.93 * memory:  # 7 %: the GPU's own
            fitting.append((not row["ACTIVATION_CHECKPOINTING"], row["MICRO_BSIZE"], needed, row))
    if not fitting:
        return "nothing fits"
    *_, needed, row = max(fitting, key=lambda item: item[:2])
    names = ("MICRO_BSIZE", "GRAD_ACC", "ACTIVATION_CHECKPOINTING")
    settings = ", ".join(f"{name} {row[name]}" for name in names)
    how = f"{row['step_seconds']:.3g} s" if "step_seconds" in row else "computed"
    return f"{settings}: {needed / 1e9:.1f} GB, {how}"


# ------- main
def main(args):
    hide_gpu(args)
    measure = {"step": measure_steps, "save": measure_save, "fit": measure_fit}[args.part]
    machine = describe_machine(args)
    result = measure(args, TRAINERS[args.method])
    report(args, {"machine": machine, "settings": vars(args)} | result)
    if all("error" in row for row in result["rows"].values()):
        sys.exit(f"no form has figures; lower --batch {args.batch}")


# ------- model and data; bench_decode.py also uses what follows
def random_model(shape, device, dtype, causal=False, **changes):
    """A model of one of SHAPES, with changes, and random weights, that attends to all positions,
    or as its code and its caller say."""
    kind, arguments = SHAPES[shape]
    is_llada = kind is LLaDAConfig
    model_class = LLaDAModelLM if is_llada else MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(kind(**arguments | changes, use_cache=False), dtype=dtype)
    if not (is_llada or causal):
        model.forward = partial(attend_to_all, model.forward)
    return model


def attend_to_all(forward, input_ids, attention_mask=None, **options):
    """The `forward` of a causal model, without its causal mask or any other."""
    rows, length = input_ids.shape
    dtype = forward.__self__.dtype
    mask = torch.zeros(rows, 1, length, length, dtype=dtype, device=input_ids.device)
    return forward(input_ids=input_ids, attention_mask=mask, **options)


def random_examples(rows, length):
    """Examples as load_examples gives them: length / 2 to length ids, two fifths are prompt."""
    rng = np.random.default_rng(0)
    examples = []
    for size in rng.integers(max(2, length // 2), length + 1, size=rows).tolist():
        examples.append((max(1, 2 * size // 5), torch.from_numpy(rng.integers(PAD_ID, size=size))))
    return examples


def make_constants(args, trainer, **changes):
    """The trainer's constants for this run, with changes."""
    constants = argparse.Namespace(**trainer.CONSTANTS)
    constants.MAX_LEN = args.length
    constants.MICRO_BSIZE = args.batch
    constants.GRAD_ACC = 1
    constants.LOGIT_SHIFT = args.shape == "dream-7b"
    constants.LORA_RANK = args.lora_rank
    constants.COMPILE = "compiled" in args.forms  # take_step runs the other forms without it
    constants.TOTAL_TRAIN_STEPS = args.repeats * (1 + TIMED_STEPS)
    vars(constants).update(changes)
    return constants


def build_model(args, trainer, constants):
    """The trainer's model with its adapter, on a random one in the place of MODEL_NAME."""
    base = random_model(args.shape, args.device, trainer.compute_dtype())
    return trainer.add_adapter(constants, trainer.prepare_layers(constants, base))


def build_engine(args, trainer, constants):
    model = build_model(args, trainer, constants)
    lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = trainer.ds_config(constants, constants.TOTAL_TRAIN_STEPS * len(args.forms))
    return deepspeed.initialize(model=model, model_parameters=lora, config=config)[0]


# ------- the machine
def reset_peak():
    """Begin a new peak. Without the kernel's clear_refs the host's is that of the whole process."""
    deepspeed.get_accelerator().reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes of the GPU's memory, or the host's, that were allocated at most since reset_peak."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_host_memory()


def peak_host_memory():
    """Bytes of memory that this process has held at most since reset_peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def matrix_rate(device, dtype):
    """FLOP/s of this machine in a large product of square matrices."""
    size = 8192 if device == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    how = {"globals": {"matrix": matrix}, "num_threads": torch.get_num_threads()}
    return 2 * size**3 / Timer("matrix @ matrix", **how).blocked_autorange().median


def describe_machine(args):
    """What the figures hold for."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    machine = {"device": name, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    machine["dtype"] = str(train_blockwise.compute_dtype())
    for library in ("torch", "deepspeed", "transformers", "peft"):
        machine[library] = version(library)
    return machine


def hide_gpu(args):
    """With --device cpu on a machine with a GPU, start again without: DeepSpeed has chosen it."""
    if args.device == "cpu" and torch.cuda.is_available():
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | {"CUDA_VISIBLE_DEVICES": ""})


# ------- report
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


# ------- flags
def parse_args(argv=None):
    """The flags; ends with one message and status 2 if one is wrong."""
    parser = suite.make_parser(__doc__)
    add = parser.add_argument
    add("--part", choices=["step", "save", "fit"], default="step", help="(%(default)s)")
    add("--fit", dest="part", action="store_const", const="fit", help="the same as --part fit")
    add("--computed", action="store_true", help="with --fit: take no steps, only compute")
    add("--rows", type=int, default=32, help="with --fit: rows of an optimizer step (%(default)s)")
    add("--method", choices=["blockwise", "fullseq"], default="blockwise", help="(%(default)s)")
    add("--batch", type=int, default=8, help="rows per step (%(default)s)")
    add("--length", type=int, default=256, help="tokens per row (%(default)s)")
    add("--lora_rank", type=int, default=256, help="(%(default)s)")
    add("--repeats", type=int, default=5, help="turns (of 2 timed steps), or saves (%(default)s)")
    add(
        "--forms",
        default=",".join(FORMS),
        help="some of %(default)s; with --method fullseq also lift, approximate",
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    args.forms = args.forms.split(",")
    suite.check_lowest(parser, args, batch=1, length=2, lora_rank=1, repeats=1, rows=1)
    known = FORMS + LIFT_FORMS if args.method == "fullseq" else FORMS
    for form in args.forms:
        if form not in known:
            parser.error(f"--forms: {form!r} is none of {', '.join(known)} ({args.method})")
    check_flags(parser, args)
    return args


def add_flags(parser):
    """Add the flags that both benchmarks have."""
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="toy", help="of the model (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device, help="the GPU if there is one")
    add("--output", metavar="FILE", help="also write the figures to this new file, as JSON")


def check_flags(parser, args):
    """End with the parser's message if such a flag cannot be used."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; give --device cpu")
    folder = os.path.dirname(args.output or "") or "."
    if args.output and (os.path.exists(args.output) or not os.access(folder, os.W_OK)):
        parser.error(f"--output {args.output}: exists, or cannot be written; give another file")


if __name__ == "__main__":
    main(parse_args())
