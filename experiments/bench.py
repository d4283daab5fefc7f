"""What a training step costs in this suite's form and in the published one, and what saving and preprocessing cost.

    python experiments/bench.py --shape toy --device cpu                  # a minute or two on a laptop
    python experiments/bench.py --shape 8b --output bench.json            # one GPU, the published batch of 32 x 256
    deepspeed --num_gpus 2 experiments/bench.py --shape toy --no_save     # the same on two ranks
    python experiments/bench.py --part save --shape 8b                    # the merged checkpoint alone
    python experiments/bench.py --part fit --shape 8b                     # largest micro-batches, by memory
    python experiments/bench.py --part pt --rows 100000                   # pt.py, by number of processes
    python experiments/bench.py --part decode --batch 16                  # block decoding, one by one and as a batch

Part `step` builds a LLaDA of the given shape with random weights (no download) and the trainer's adapter, and takes the
same training steps in each form in turn, in one process: batch, forward, backward, update, and the loss on the host.

- published: masks token by token in Python; logits of all positions; cross_entropy with ignore_index.
- suite: the trainer's own make_batch and supervised_loss, as they are with COMPILE = False.
- compiled: the same with COMPILE = True.

It needs torch, transformers, peft, accelerate, numpy, safetensors and tqdm, for the parts pt and decode `datasets` too.
With DeepSpeed the trainer's engine makes the updates; without it a stand-in does the same to the same number of bytes:
AdamW on a float32 copy of the adapter.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from accelerate import init_empty_weights
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM
from tqdm import tqdm

EXPERIMENTS = os.path.dirname(os.path.abspath(__file__))
SUITE = os.path.dirname(EXPERIMENTS)
sys.path.insert(0, SUITE)

try:
    import deepspeed
except ImportError:  # the trainers import it; nothing that is measured here needs it
    deepspeed = None
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")


import train_blockwise
import train_fullseq

if deepspeed is None:
    del sys.modules["deepspeed"]  # accelerate and peft would take it for the real one

TRAINERS = {"blockwise": train_blockwise, "fullseq": train_fullseq}
SHAPES = {  # all with LLaDA's vocabulary of 126,464
    "toy": {"d_model": 96, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 256},
    "1b": {"d_model": 2048, "n_layers": 12, "n_heads": 16, "mlp_hidden_size": 6144},
    "8b": {},
}
FORMS = ("published", "suite", "compiled")
BATCH = {"toy": 8, "1b": 8, "8b": 32}
TURNS = 2  # in which each form takes its steps
WARMUP = 2  # untimed steps at the beginning of each
PAD_ID = 126081
FITTED = {  # COMPILE, ACTIVATION_CHECKPOINTING
    "published": (False, False),
    "suite": (False, False),
    "compiled": (True, False),
    "checkpointed": (False, True),
    "both": (True, True),
}
MEMORIES = (24, 48, 80, 141)  # GB, for --part fit
LINKS = {"NVLink, 450 GB/s": 450e9, "PCIe 5, 50 GB/s": 50e9}  # bytes/s each way, of the data sheets


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--part",
        choices=("step", "save", "fit", "pt", "decode"),
        default="step",
        help="what to measure (%(default)s)",
    )
    parser.add_argument("--shape", choices=SHAPES, default="toy", help="of the model (%(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=gpu, help="where (here %(default)s)"
    )
    parser.add_argument(
        "--method", choices=TRAINERS, default="blockwise", help="which trainer (%(default)s)"
    )
    parser.add_argument("--batch", type=int, help="rows per rank (toy and 1b: 8, 8b: 32)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (%(default)s)")
    parser.add_argument("--lora_rank", type=int, default=256, help="(%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=10, help="timed steps of each form (%(default)s)"
    )
    parser.add_argument("--forms", default=",".join(FORMS), help="some of %(default)s")
    parser.add_argument(
        "--activation_checkpointing", action="store_true", help="in this suite's forms"
    )
    parser.add_argument("--no_save", action="store_true", help="leave out the merged save")
    parser.add_argument("--rows", type=int, default=100000, help="of --part pt (%(default)s)")
    parser.add_argument(
        "--vocabulary", type=int, default=126464, help="of --part decode (%(default)s)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("--output", metavar="FILE", help="write all figures there, as JSON")
    return check_args(parser, parser.parse_args(argv))


def check_args(parser, args):
    """`args` with what follows from them; ends with a message if something cannot be."""
    args.batch = BATCH[args.shape] if args.batch is None else args.batch
    args.forms = args.forms.split(",")
    for name, least in {
        "batch": 1,
        "length": 2,
        "lora_rank": 1,
        "repeats": 1,
        "rows": 1,
        "vocabulary": 8,
    }.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.part == "decode" and args.length % 64:
        parser.error(
            f"--length {args.length}: half of it is decoded, in blocks of 32; give a multiple of 64"
        )
    if unknown := set(args.forms) - set(FORMS):
        parser.error(
            f"--forms {','.join(args.forms)}: {', '.join(unknown)} is none of {', '.join(FORMS)}"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; give --device cpu")
    if args.output and (
        os.path.exists(args.output) or not os.access(os.path.dirname(args.output) or ".", os.W_OK)
    ):
        parser.error(
            f"--output {args.output}: exists already, or its folder cannot be written; give another file"
        )
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and (args.part != "step" or not has_deepspeed(args.device)):
        parser.error(
            f"--part {args.part}: {ranks} ranks; a launcher is for --part step and needs DeepSpeed"
        )
    return args


# ---------------------------------------------------------------------------- model and data


def random_llada(device, shape):
    """A LLaDA of `shape` with random weights in bf16, made on `device`."""
    with init_empty_weights():
        model = LLaDAModelLM(LLaDAConfig(**shape)).to(torch.bfloat16)
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(
            parameter
        )
    return model


def adapted(trainer, device, shape):
    """The PeftModel that `trainer` makes of a random LLaDA, its B not zero, and the forward of each of its blocks."""
    model = random_llada(device, shape)
    trainer.fetch = lambda *_, **__: (model, {"missing_keys": []})
    trainer.COMPILE = trainer.ACTIVATION_CHECKPOINTING = False  # the forms set these
    peft_model = (
        trainer.build_model(device).to(torch.bfloat16).train()
    )  # as DeepSpeed's engine has it
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    blocks = model.model.transformer.blocks
    return peft_model, [(block, block.forward) for block in blocks]


def random_examples(rows, length):
    """`rows` rows as load_examples gives them: half to all of `length` ids, two fifths of these prompt."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(2, length // 2), length + 1, size=rows)
    return [
        (max(1, 2 * n // 5), torch.from_numpy(rng.integers(0, 126080, size=n))) for n in lengths
    ]


def published_batch(trainer, examples, draws, numbers, pad_id):
    """make_batch as the published scripts do it: token by token in Python, on floats; labels instead of a mask."""
    inputs, labels = [], []
    for number in numbers:
        sample, block = draws[number]
        prompt_len, ids = examples[sample][0], examples[sample][1].tolist()
        noise = (
            np.random.default_rng((trainer.SEED, number))
            .random(trainer.MAX_LEN + 1, dtype=np.float32)
            .tolist()
        )
        t = trainer.MASK_PROB_EPS + (1 - trainer.MASK_PROB_EPS) * noise[0]
        width = getattr(trainer, "BLOCK_SIZE", trainer.MAX_LEN)
        first = prompt_len + block * width
        noisy, label = ids + [pad_id] * (trainer.MAX_LEN - len(ids)), [-100] * trainer.MAX_LEN
        for pos in range(prompt_len, len(ids)):
            if pos < first:
                rate = getattr(trainer, "PREFIX_MASK_RATE", 0.0)
            else:
                rate = t if pos < first + width else getattr(trainer, "SUFFIX_MASK_PROB", 1.0)
            if noise[1 + pos] < rate:
                label[pos] = ids[pos] if first <= pos < first + width else -100
                noisy[pos] = trainer.MASK_ID
        inputs.append(noisy)
        labels.append(label)
    return torch.tensor(inputs), torch.tensor(labels)


def published_loss(model, noisy_ids, labels):
    """supervised_loss in the published form: (B, L, V) logits, in the model's bf16."""
    device = model.get_output_embeddings().weight.device
    noisy_ids, labels = noisy_ids.to(device), labels.to(device)
    logits = model(input_ids=noisy_ids).logits  # (B, L, V)
    nll = cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-100, reduction="none"
    )
    count = (labels != -100).sum(1)  # (B,)
    return (nll.float().view_as(labels).sum(1) / count.clamp(min=1)).mean()


# ---------------------------------------------------------------------------- a step


class Engine:
    """What DeepSpeed's engine does with one rank, for machines without DeepSpeed: bf16 adapter, AdamW in float32."""

    def __init__(self, model, clip):
        self.module, self.clip = model, clip
        self.adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.master = torch.cat(
            [parameter.detach().flatten().float() for parameter in self.adapter]
        )
        self.optimizer = torch.optim.AdamW(
            [self.master], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0
        )

    def __call__(self, **inputs):
        return self.module(**inputs)

    def get_output_embeddings(self):
        return self.module.get_output_embeddings()

    def backward(self, loss):
        loss.backward()

    @torch.no_grad()
    def step(self):
        self.master.grad = torch.cat(
            [parameter.grad.flatten() for parameter in self.adapter]
        ).float()
        torch.nn.utils.clip_grad_norm_([self.master], self.clip)
        self.optimizer.step()
        self.master.grad, offset = None, 0
        for parameter in self.adapter:
            parameter.copy_(self.master[offset : offset + parameter.numel()].view_as(parameter))
            parameter.grad, offset = None, offset + parameter.numel()


def has_deepspeed(device):
    """Whether it is there, and has chosen `device` when it was imported."""
    return deepspeed is not None and (device == "cuda") == torch.cuda.is_available()


def make_engine(args, trainer, model, steps):
    """DeepSpeed's engine as the trainer makes it, or the stand-in."""
    if not has_deepspeed(args.device):
        return Engine(model, trainer.GRAD_CLIP)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(
        model=model, model_parameters=adapter, config=trainer.ds_config(steps)
    )[0]


def join(device):
    """Rank and number of ranks, the process group made if DeepSpeed is there."""
    if not has_deepspeed(device):
        return 0, 1
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    rank, local_rank, world_size = map(
        int, [os.environ.setdefault(*pair) for pair in alone.items()][:3]
    )
    deepspeed.utils.logger.setLevel("ERROR")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: (
        None
    )  # as in the trainers: nothing is compiled
    deepspeed.init_distributed(verbose=False)
    deepspeed.get_accelerator().set_device(local_rank)
    return rank, world_size


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device):
    """Forget the highest memory use so far: of the GPU, or of this process, whose free memory goes back first."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak(device):
    """Bytes of memory in use at most since reset_peak: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def matrix_rate(device, repeats=10):
    """bf16 FLOP/s of this machine in a large matrix product of random numbers: 8192 cubed, 2048 on a CPU; median."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[3:])


def prepare(args, trainer, world_size):
    """The trainer's constants for this run, and its examples, draws and their numbers (step, 1, rank, row)."""
    steps = args.repeats + TURNS * WARMUP
    constants = {
        "MAX_LEN": args.length,
        "MICRO_BSIZE": args.batch,
        "LORA_RANK": args.lora_rank,
        "GRAD_ACC": 1,
    }
    vars(trainer).update(constants, TOTAL_TRAIN_STEPS=steps, PT_FILE="(generated)")
    examples = random_examples(steps * args.batch * world_size, args.length)
    return examples, *trainer.plan(examples, world_size)[:2]


def loss_of(form, trainer, model, examples, draws, part):
    if form == "published":
        return published_loss(model, *published_batch(trainer, examples, draws, part, PAD_ID))
    return trainer.supervised_loss(model, *trainer.make_batch(examples, draws, part, PAD_ID))


def use(trainer, blocks, device, compiled, checkpointed):
    """Have the trainer, and the blocks with their own forwards, run that way."""
    trainer.COMPILE, trainer.ACTIVATION_CHECKPOINTING = compiled, checkpointed
    for block, forward in blocks:
        block.forward = trainer.tuned(forward, device)


def count_flops(form, trainer, model, blocks, device, examples, draws, part):
    """FLOPs of a batch, forward and backward, and its loss. Row by row, which fits; of the products, and on a GPU of
    attention too; nothing compiled, nothing computed twice.
    """
    use(trainer, blocks, device, False, False)
    torch.manual_seed(0)
    losses = []
    with FlopCounterMode(display=False) as counter:
        for number in part:
            loss = loss_of(form, trainer, model, examples, draws, [number])
            loss.backward()
            losses.append(loss.item())
    model.zero_grad()
    return {"flops": counter.get_total_flops(), "loss": statistics.fmean(losses)}


def take_step(form, args, trainer, engine, examples, draws, part):
    """Seconds of a step and its highest memory use, in bytes."""
    reset_peak(args.device)
    start = time.perf_counter()
    torch.manual_seed(int(part[0]))
    loss = loss_of(form, trainer, engine, examples, draws, part)
    engine.backward(loss)
    engine.step()
    loss.item()
    synchronize(args.device)
    return time.perf_counter() - start, peak(args.device)


def take_turn(form, figure, step, steps, args):
    """Let `step` take each of the numbers `steps`; all but the first few go into `figure`, or what went wrong does."""
    torch.cuda.empty_cache()  # what another form has left in pieces
    try:
        taken = [step(form, number) for number in steps]
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError)
        if full and has_deepspeed(
            args.device
        ):  # whose engine cannot go on after half a backward pass
            sys.exit(
                f"{form} is out of memory: lower --batch {args.batch}, or leave it out with --forms"
            )
        if not full and form != "compiled":
            raise
        figure["error"] = "out of memory" if full else f"not compiled: {type(error).__name__}"
        return
    figure.setdefault("first", taken[0][0])
    figure["seconds"] += [seconds for seconds, _ in taken[WARMUP:]]
    figure["peak"] = max([figure["peak"], *(memory for _, memory in taken[WARMUP:])])


def measure_steps(args, trainer, rank, world_size):
    """Figures of each form, and the engine. All forms take the same steps, in turns of half of them each."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else "cpu"
    examples, draws, numbers = prepare(args, trainer, world_size)
    start = time.perf_counter()
    model, blocks = adapted(trainer, device, SHAPES[args.shape])
    synchronize(args.device)
    build = time.perf_counter() - start
    count = lambda form: count_flops(
        form, trainer, model, blocks, device, examples, draws, numbers[-1, 0, rank]
    )
    figures = {form: {"seconds": [], "peak": 0} | count(form) for form in args.forms}
    start = time.perf_counter()
    engine = make_engine(args, trainer, model, len(numbers) * len(args.forms))
    build += time.perf_counter() - start
    step = lambda form, number: take_step(
        form, args, trainer, engine, examples, draws, numbers[number, 0, rank]
    )
    turns = [
        (steps, form)
        for steps in np.array_split(np.arange(len(numbers)), TURNS)
        for form in args.forms
    ]
    for steps, form in tqdm(turns, desc="turns", disable=rank != 0):
        if "error" not in figures[form]:
            use(
                trainer,
                blocks,
                device,
                form == "compiled",
                form != "published" and args.activation_checkpointing,
            )
            take_turn(form, figures[form], step, steps, args)
            model.zero_grad()  # of half a step
    if all("error" in figure for figure in figures.values()):
        sys.exit(
            f"no form has figures ({figures[form]['error']}): lower --batch {args.batch}, or give other --forms"
        )
    masks = (
        trainer.make_batch(examples, draws, part, 0)[2]
        for part in numbers[:, 0].reshape(-1, args.batch)
    )
    supervised = sum(int(mask.sum()) for mask in masks) / len(numbers)  # a step, of all ranks
    rows = {
        form: summary(args, figure, build, supervised, world_size)
        for form, figure in figures.items()
    }
    return {"supervised tokens a step": supervised, "forms": rows}, engine


def summary(args, figure, build, supervised, world_size):
    """The figures of a form: medians over its timed steps."""
    if "error" in figure:
        return {"error": figure["error"]}
    seconds = statistics.median(figure["seconds"])
    return {
        "step seconds": seconds,
        "fastest": min(figure["seconds"]),
        "slowest": max(figure["seconds"]),
        "tokens/s": args.batch * args.length * world_size / seconds,  # padding included
        "supervised tokens/s": supervised / seconds,
        "FLOP/s": figure["flops"] / seconds,  # of a rank
        "peak bytes": figure["peak"],
        "seconds to the first step's end": build + figure["first"],  # model, engine, compilation
        "of these, the step": figure["first"],
        "loss of a batch": figure["loss"],  # before the first step, with the same dropout
    }


# ---------------------------------------------------------------------------- saving


def measure_save(trainer, model):
    """Seconds and host memory of save_merged, and seconds of a plain write of as many bytes, before and after it."""
    size = 2 * model.get_base_model().num_parameters()
    runs = os.path.join(EXPERIMENTS, "runs")
    os.makedirs(runs, exist_ok=True)
    if (free := shutil.disk_usage(runs).free) < 2.1 * size:
        return {"error": f"{2.1 * size / 1e9:.1f} GB needed in {runs}, {free / 1e9:.1f} GB free"}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=runs) as folder:
        plain = [plain_write(f"{folder}/plain", size)]
        reset_peak("cpu")
        before, start = peak("cpu"), time.perf_counter()
        trainer.save_merged(
            model, types.SimpleNamespace(save_pretrained=lambda path: None), f"{folder}/model"
        )
        os.sync()
        seconds, above = time.perf_counter() - start, peak("cpu") - before
        written = sum(entry.stat().st_size for entry in os.scandir(f"{folder}/model"))
        plain.append(plain_write(f"{folder}/plain", size))
    figures = {"bytes": written, "seconds": seconds, "plain write seconds": statistics.fmean(plain)}
    return figures | {"host bytes above": above, "host memory ratio": above / written}


def plain_write(path, size):
    """Seconds that writing `size` random bytes takes, until they are on the disk; the file is removed."""
    os.sync()
    chunk, start = os.urandom(1 << 26), time.perf_counter()
    with open(path, "wb") as file:
        for left in range(size, 0, -len(chunk)):
            file.write(chunk[: min(left, len(chunk))])
    os.sync()
    seconds = time.perf_counter() - start
    os.remove(path)
    return seconds


# ---------------------------------------------------------------------------- what fits


def kept_bytes(trainer, args, layers, rows):
    """Bytes that a forward keeps for the backward pass, weights aside, {form: bytes}, and supervised tokens a row."""
    shape = SHAPES[args.shape] | {"n_layers": layers}
    model, blocks = adapted(trainer, args.device, shape)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    examples = random_examples(rows, args.length)
    vars(trainer).update(MAX_LEN=args.length, MICRO_BSIZE=rows, GRAD_ACC=1, TOTAL_TRAIN_STEPS=1)
    draws, numbers, _ = trainer.plan(examples, 1)
    result = {}
    for form, how in FITTED.items():
        use(trainer, blocks, args.device, *how)
        kept = {}

        def pack(tensor, kept=kept):
            if (storage := tensor.untyped_storage()).data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(form, trainer, model, examples, draws, numbers[0, 0, 0])
        loss.backward()
        model.zero_grad()
        result[form] = sum(kept.values())
    return result, int(trainer.make_batch(examples, draws, numbers[0, 0, 0], 0)[2].sum()) / rows


def measure_fit(args, trainer):
    """The largest micro-batch by GPU memory, from the bytes that one block of this shape keeps for a row (measured on
    a model of one and of two blocks), the bytes of weights, adapter and optimizer, and room for the work in progress.
    """
    trainer.LORA_RANK = args.lora_rank
    rows = 2
    with init_empty_weights():
        whole = LLaDAModelLM(LLaDAConfig(**SHAPES[args.shape]))
    targets = [whole.get_submodule(name).weight.shape for name in trainer.match_targets(whole)]
    weights = 2 * sum(parameter.numel() for parameter in whole.parameters())
    trained = args.lora_rank * sum(sum(shape) for shape in targets)
    # bf16 weights and gradients, float32 weights and two moments; two buckets of gradients on their way
    adapter = trained * (2 + 2 + 12) + 2 * 2 * min(int(2e8), trained)
    one, two = (kept_bytes(trainer, args, layers, rows) for layers in (1, 2))
    layers, supervised = whole.config.n_layers, one[1]
    vocabulary = whole.config.embedding_size
    logits = dict.fromkeys(
        FITTED, supervised * vocabulary * (2 + 4 + 4)
    )  # bf16, float32 and the gradient, in work
    logits["published"] = args.length * vocabulary * (2 + 2 + 2)
    work = (
        1.5 * (two[0]["suite"] - one[0]["suite"]) / rows
    )  # a block recomputed, and gradients: an estimate
    table = {}
    for form in FITTED:
        block = (two[0][form] - one[0][form]) / rows  # bytes a row
        per_row = layers * block + (one[0][form] / rows - block) + work + logits[form]
        room = {
            memory: int((0.95 * memory * 1e9 - weights - adapter) / per_row) for memory in MEMORIES
        }
        table[form] = {"block bytes a row": block, "bytes a row": per_row}
        table[form] |= {f"rows in {memory} GB": max(0, rows) for memory, rows in room.items()}
    return {
        "weights bytes": weights,
        "adapter and optimizer bytes": adapter,
        "trained": trained,
        "fit": table,
    }


# ---------------------------------------------------------------------------- pt.py


def write_rows(folder, rows):
    """`rows` generated word problems, and a tokenizer for them, for pt.py in `folder`."""
    try:
        import toy
    except ImportError as error:
        sys.exit(
            f"--part pt needs all of requirements.txt: {error}; pip install -r requirements.txt"
        )
    problems = toy.word_problems(random.Random(0), min(rows, 20000), set())
    with open(f"{folder}/rows.jsonl", "w") as file:
        file.writelines(
            json.dumps(problems[number % len(problems)]) + "\n" for number in range(rows)
        )
    texts = [f"{row['query']}\n\n{row['response']}" for row in problems[:4000]]
    toy.build_tokenizer([toy.PROMPT, *texts]).save_pretrained(f"{folder}/model")


def run_pt(folder, workers, samples):
    """Run pt.py there on `samples` rows (0 = all): seconds, highest memory use of its processes, size of its file."""
    command = [
        sys.executable,
        os.path.join(SUITE, "pt.py"),
        "--model",
        "model",
        "--dataset",
        "rows.jsonl",
    ]
    command += ["--filter_type", "", "--output", "rows.pt", "--overwrite"]
    command += ["--num_workers", str(workers), "--max_samples", str(samples)]
    environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}
    most, start = 0, time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            most = max(most, tree_bytes(process.pid))
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"pt.py ended with status {process.returncode}, see above")
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak bytes": most,
        "file bytes": os.path.getsize(f"{folder}/rows.pt"),
    }


def measure_pt(args):
    """Rows per second and peak memory of pt.py, its start included, on generated word problems, by --num_workers."""
    runs = os.path.join(EXPERIMENTS, "runs")
    os.makedirs(runs, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=runs) as folder:
        write_rows(folder, args.rows)
        table = {"one row": run_pt(folder, 0, 1)}  # which fills the caches too
        for workers in (0, *sorted({1, *(2**k for k in range(1, 10) if 2**k < cores), cores})):
            figures = run_pt(folder, workers, 0)
            table[f"{workers} workers"] = figures | {"rows/s": args.rows / figures["seconds"]}
    return {"rows": args.rows, "processes": table}


def tree_bytes(pid):
    """Bytes of memory of a process and its children, pages they share counted once a sharer's part (PSS)."""
    total = 0
    with suppress(OSError):
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total = next(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            total += sum(map(tree_bytes, file.read().split()))
    return total


def measure_decode(args):
    """Seconds an answer of decoding `args.batch` prompts one by one and as one batch, in turn; float32, on GPUs bf16.

    Half of `args.length` is prompt, half is decoded in blocks of 32, two tokens a step. End tokens are suppressed.
    """
    ids = {"mask_id": 2, "eos_id": 0, "eot_id": 0}
    shape = SHAPES[args.shape] | {"vocab_size": args.vocabulary, "mask_token_id": 2}
    model = (
        random_llada(args.device, shape)
        .to(torch.bfloat16 if args.device == "cuda" else torch.float32)
        .eval()
    )
    half = args.length // 2
    prompts = torch.randint(3, args.vocabulary, (args.batch, half))
    how = {
        "gen_length": half,
        "block_length": 32,
        "steps": half // 2,
        "logits_eos_inf": True,
        **ids,
    }
    forms = {"one by one": prompts[:, None], "one batch": [prompts]}
    seconds, head = {form: [] for form in forms}, {form: [] for form in forms}
    for turn in tqdm(range(TURNS + 1), desc="decode", unit=" turns"):
        for form, batches in forms.items():
            total, logits = time_decoding(model, batches, how, args.device)
            if turn:  # the first warms up
                seconds[form].append(total / args.batch)
                head[form].append(logits / total)
    rows = {
        form: {"seconds an answer": min(seconds[form]), "share of the head": min(head[form])}
        for form in forms
    }
    ratio = rows["one by one"]["seconds an answer"] / rows["one batch"]["seconds an answer"]
    return {"decode": rows, "batch_speedup": ratio}


def time_decoding(model, batches, how, device):
    """Decode `batches`; seconds of all of it, and of the head and what is done with its logits."""
    import decode  # which imports pt.py, and so `datasets`

    marks = []

    def mark(*_):
        synchronize(device)
        marks.append(time.perf_counter())

    handles = [model.model.transformer.ln_f.register_forward_hook(mark)]
    handles.append(model.model.transformer.wte.register_forward_pre_hook(mark))
    start = time.perf_counter()
    for batch in batches:
        decode.decode(model, batch, **how)
    mark()
    for handle in handles:
        handle.remove()
    # marks come as: begin of a forward, its head, begin of the next forward, its head, ..., end
    spent = sum(after - before for before, after in zip(marks[1::2], marks[2::2], strict=True))
    return marks[-1] - start, spent


# ---------------------------------------------------------------------------- the report


def machine(args):
    """What the figures hold for."""
    name = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    with suppress(OSError), open("/proc/cpuinfo") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), ""
        )
        name = name if args.device == "cuda" else model or name
    versions = {}
    for library in ("torch", "transformers", "peft", "deepspeed"):
        with suppress(PackageNotFoundError):
            versions[library] = version(library)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


def headline(result):
    """`result` with speedup, memory_ratio and share_of_matrix_rate of the faster of this suite's forms."""
    forms = {form: row for form, row in result["forms"].items() if "error" not in row}
    for row in forms.values():
        row["share of the matrix rate"] = row["FLOP/s"] / result["matrix FLOP/s"]
    ours = [form for form in forms if form != "published"]
    if ours:
        best = min(ours, key=lambda form: forms[form]["step seconds"])
        result["form"] = best
        result["share_of_matrix_rate"] = forms[best]["share of the matrix rate"]
        if base := forms.get("published"):
            result["speedup"] = base["step seconds"] / forms[best]["step seconds"]
            result["memory_ratio"] = forms[best]["peak bytes"] / base["peak bytes"]
            for form in ours:
                forms[form]["speedup"] = base["step seconds"] / forms[form]["step seconds"]
                forms[form]["memory_ratio"] = forms[form]["peak bytes"] / base["peak bytes"]
    return result


def show(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def print_table(rows):
    """`rows`, {name: {column: value}}, as a table with the names on top; bytes and rates of FLOP in G."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *rows]]
    for column in columns:
        scale = 1e9 if "bytes" in column or "FLOP" in column else 1
        values = [row.get(column) for row in rows.values()]
        label = column.replace("bytes", "GB").replace("FLOP/s", "GFLOP/s") if scale > 1 else column
        lines.append(
            [
                label,
                *(
                    show(v / scale if isinstance(v, (int, float)) and scale > 1 else v)
                    for v in values
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        print(
            first.ljust(widths[0]),
            *(cell.rjust(width + 1) for cell, width in zip(others, widths[1:], strict=True)),
        )


def report(args, result):
    """Print `result`; write it to --output."""
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    if "save" in result:
        print_table({"merged save": result["save"]})
    if args.part == "step":
        print_table(result["forms"])
        for link, share in result["communication share, 8 ranks"].items():
            print(
                f"share of ZeRO-2's communication in a step of 8 ranks, not overlapped: {share:.2%} on {link}"
            )
        keys = ("form", "speedup", "memory_ratio", "share_of_matrix_rate")
        print(
            ", ".join(f"{key} {show(result[key])}" for key in keys if result.get(key) is not None),
            end=" ",
        )
        print(f"of {result['matrix FLOP/s'] / 1e12:,.3g} TFLOP/s")
    elif args.part == "fit":
        print_table(
            {
                "besides": {
                    name: result[name] for name in ("weights bytes", "adapter and optimizer bytes")
                }
            }
        )
    elif args.part == "decode":
        print_table(result["decode"])
        print(f"batch_speedup {show(result['batch_speedup'])}")
    if args.part in ("fit", "pt"):
        print_table(result["fit"] if args.part == "fit" else result["processes"])
    if args.output:
        with open(args.output, "x") as file:
            json.dump(result, file, indent=2)
        print(f"wrote {args.output}")


def measure_all(args, trainer):
    """The figures of part `step`; None on other ranks than the first."""
    rank, world_size = join(args.device)
    result, engine = measure_steps(args, trainer, rank, world_size)
    result |= {
        "ranks": world_size,
        "engine": "DeepSpeed ZeRO-2" if has_deepspeed(args.device) else "stand-in",
    }
    adapter = sum(
        parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad
    )
    if rank == 0:
        result["matrix FLOP/s"] = matrix_rate(args.device)
        result = headline(result)
        seconds = result["forms"].get(result.get("form"), {}).get("step seconds")
        # DeepSpeed 0.19 all-reduces the gradients (2 x 7/8 of their bf16 bytes) and gathers the new weights (7/8)
        traffic = 3 * 7 / 8 * 2 * adapter
        shares = (
            {link: traffic / rate / (traffic / rate + seconds) for link, rate in LINKS.items()}
            if seconds
            else {}
        )
        result |= {"communication bytes, 8 ranks": traffic, "communication share, 8 ranks": shares}
        if not args.no_save:
            result["save"] = measure_save(trainer, engine.module)
    if has_deepspeed(args.device):
        deepspeed.comm.destroy_process_group()
    return result if rank == 0 else None


def main():
    args = parse_args(sys.argv[1:])
    trainer = TRAINERS[args.method]
    if args.part == "step":
        result = measure_all(args, trainer)
    elif args.part == "save":
        trainer.LORA_RANK = args.lora_rank
        result = {
            "save": measure_save(trainer, adapted(trainer, args.device, SHAPES[args.shape])[0])
        }
    elif args.part == "decode":
        result = measure_decode(args)
    else:
        result = measure_fit(args, trainer) if args.part == "fit" else measure_pt(args)
    if result is not None:
        settings = {
            name: value
            for name, value in vars(args).items()
            if name not in ("output", "local_rank")
        }
        report(args, {"machine": machine(args), "settings": settings} | result)


if __name__ == "__main__":
    main()
