"""Blockwise SFT of a masked diffusion language model, with LoRA and DeepSpeed ZeRO-2.

    deepspeed --num_gpus 8 train_blockwise.py     # or with --BLOCK_SIZE 64 --CKPT_DIR ckpts_64

Each training example is one block of one answer, in a state that block decoding meets:

    prompt | clean prefix | active block, masked at rate t ~ U(eps, 1) | [MASK] suffix | padding

The loss is the cross-entropy of the active block's masked tokens (Sun, Cai, Yang and Wang,
"Blockwise SFT for Diffusion Language Models: Reconciling Bidirectional Attention and
Autoregressive Decoding", arXiv 2508.19529). `diff` with train_fullseq.py shows the method;
experiments/docs/running.md tells how to run it.

Shapes: B rows, L = MAX_LEN tokens, V vocabulary, D width, M supervised tokens, N draws.
"""

import argparse
import ast
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from glob import glob
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TextIO

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, logging
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import cached_file

# ------- constants: edit them, or give any for one run as --NAME VALUE (a list as a,b)
# Functions read args.NAME: a flag changes args, not the constant.
# Model and data
MODEL_NAME = "GSAI-ML/LLaDA-8B-Instruct"  # hub id or folder; its own code is run
MODEL_REVISION = "main"  # branch, tag or commit
MASK_ID = 126336  # LLaDA's <|mdm_mask|>
LOGIT_SHIFT = False  # True: a position is predicted from the one before it (Dream, DiffuCoder)
DATA_PT = "MathQA_256.pt"  # written by pt.py
MAX_SAMPLES = 200 * 32  # rows of DATA_PT, from its beginning
MAX_LEN = 256  # tokens; shorter rows are padded, longer ones truncated
SEED = 42  # of the order, blocks, masks, adapter and dropout

# Method
BLOCK_SIZE = 32  # tokens
PREFIX_MASK_RATE = 0.0  # share of the prefix shown as [MASK]; never in the loss
SUFFIX_MASK_PROB = 1.0  # the same for the suffix; 0 shows the future
MASK_PROB_EPS = 1e-3  # smallest t
MASK_PADDING = False  # True shows [MASK] instead of padding, as decoding does

# Training
EPOCHS = 1  # multiplies the steps
MICRO_BSIZE = 32  # rows per GPU and forward pass
GRAD_ACC = 1  # forward passes per optimizer step
TOTAL_TRAIN_STEPS = None  # None: MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC)
LR = 1e-5  # peak; AdamW, then a cosine to 1 % of it
WARMUP_RATIO = 0.1  # share of the steps
GRAD_CLIP = 1.0  # gradient norm; 0: off
LORA_RANK = 256  # of the adapter
LORA_ALPHA = None  # None: 2 * LORA_RANK
LORA_DROPOUT = 0.05  # share of the adapter's inputs
TARGET_MODS = ["q_proj", "k_proj", "v_proj", "up_proj"]  # linear layers, by the ends of names
COMPILE = None  # torch.compile the layers: faster, less memory; None: on a GPU, if it works there
ACTIVATION_CHECKPOINTING = False  # less memory, about a third more time

# Output
CKPT_DIR = "ckpts_stagewise_sft_32"  # prefix of the folders that a run writes
SAVE_EVERY = None  # steps between checkpoints; None: only after the last step
SAVE_ADAPTER = False  # True: also write the adapter, for peft, into the checkpoint's `adapter`
STATE_EVERY = 50  # steps between states to resume from; None: no states

CONSTANTS = {name: value for name, value in globals().items() if name.isupper()}
# Also written to ablation_config.json
ABLATION = ["PREFIX_MASK_RATE", "SUFFIX_MASK_PROB", "BLOCK_SIZE"]


# ------- method
def schedule(args, examples, max_draws):
    """What each draw trains, in order: (sample, offset) of a block; (N, 2), N <= max_draws.

    Offsets count tokens from the answer's start. Each pass draws one unused block of every sample
    that has one, until all are used. A used-up sample is never drawn again; the published script
    returns it as a row without a mask.
    """
    rng = np.random.default_rng((args.SEED, 0, 1))  # not the stream of any draw
    draws = []
    for sample, (prompt_len, ids) in enumerate(examples):
        offsets = np.arange(0, len(ids) - prompt_len, args.BLOCK_SIZE)
        for visit, offset in enumerate(rng.permutation(offsets)):
            draws.append((visit, rng.random(), sample, offset))
    draws.sort()  # pass by pass, in random order within a pass
    return np.array([(sample, offset) for _, _, sample, offset in draws[:max_draws]])


def corrupt(args, input_ids, prompt_len, length, offset, noise):
    """Mask a batch as block decoding meets it: prefix clean, block at rate t, suffix hidden.

    input_ids (B, L); prompt_len, length and offset (B, 1), the block's offset counted from the
    answer's start; noise (B, 1 + L) ~ U(0, 1), its first column gives t. Returns noisy_ids (B, L),
    and loss_mask (B, L), True where a token is masked and in the loss.
    """
    pos = torch.arange(input_ids.shape[1])  # (L,)
    t = args.MASK_PROB_EPS + (1 - args.MASK_PROB_EPS) * noise[:, :1]  # (B, 1)
    first = prompt_len + offset  # (B, 1)
    answer = (prompt_len <= pos) & (pos < length)  # (B, L)
    prefix = answer & (pos < first)
    suffix = answer & (first + args.BLOCK_SIZE <= pos)
    active = answer & ~prefix & ~suffix
    p_mask = args.PREFIX_MASK_RATE * prefix + t * active + args.SUFFIX_MASK_PROB * suffix
    p_mask = p_mask + args.MASK_PADDING * (length <= pos)
    masked = noise[:, 1:] < p_mask  # True = shown as [MASK]
    return input_ids.masked_fill(masked, args.MASK_ID), masked & active


def supervised_loss(args, model, input_ids, noisy_ids, loss_mask):
    """Mean over rows of the mean cross-entropy of a row's masked tokens; 0 for a row without any.

    There is no weight 1/t: with t ~ U(0, 1) this mean over the masked ones of n tokens is the
    1/t-weighted bound divided by n + 1.
    """
    nll = masked_nll(args, model, input_ids, noisy_ids, loss_mask)  # (M,)
    return mean_over_rows(nll, loss_mask)


def mean_over_rows(values, loss_mask):
    """Mean over rows of the mean of a row's values (M,), 0 for a row without any; ()."""
    count = loss_mask.sum(1)  # (B,)
    count = count.repeat_interleave(count).to(values.device)  # (M,) masked tokens in the same row
    return (values / count).sum() / len(loss_mask)


# ------- run: what is drawn when is a function of the constants alone
def plan(args, method, examples, world_size):
    """The draws of the run, (steps, GRAD_ACC, world_size, MICRO_BSIZE), and how many are left out.

    A draw is a record of id (0, 1, 2, ...), sample and offset. All ranks take all steps, on any
    number of GPUs. The published script takes an eighth of the steps on 8 GPUs, and hangs on uneven
    data.
    """
    shape = args.GRAD_ACC, world_size, args.MICRO_BSIZE
    global_batch = math.prod(shape)
    rows = args.MAX_SAMPLES * args.EPOCHS
    max_steps = args.TOTAL_TRAIN_STEPS or rows // (args.MICRO_BSIZE * args.GRAD_ACC)
    scheduled = method.schedule(args, examples, max_steps * global_batch).reshape(-1, 2)
    draws = np.zeros(len(scheduled), [("id", int), ("sample", int), ("offset", int)])
    draws["id"] = np.arange(len(draws))
    draws["sample"], draws["offset"] = scheduled.T
    steps = len(draws) // global_batch  # fewer than max_steps if the blocks run out
    kept = draws[: steps * global_batch]
    return kept.reshape(steps, *shape), len(draws) - len(kept)


def make_batch(args, examples, draws, pad_id):
    """input_ids, noisy_ids and loss_mask, (B, L) each, of B draws."""
    rows = pad_rows(args, examples, draws, pad_id)
    return rows[0], *corrupt(args, *rows, draw_noise(args, draws, 1 + args.MAX_LEN))


def pad_rows(args, examples, draws, pad_id):
    """input_ids (B, L) of B draws, and their prompt_len, length and offset, (B, 1) each."""
    rows = [examples[sample] for sample in draws["sample"]]
    padded = [pad(ids, (0, args.MAX_LEN - len(ids)), value=pad_id) for _, ids in rows]
    prompt_len = torch.tensor([[prompt_len] for prompt_len, _ in rows])
    length = torch.tensor([[len(ids)] for _, ids in rows])
    offset = torch.from_numpy(draws["offset"][:, None])
    return torch.stack(padded), prompt_len, length, offset


def draw_noise(args, draws, columns):
    """Numbers ~ U(0, 1) for B draws, (B, columns), functions of SEED and a draw's id alone."""
    noise = [np.random.default_rng((args.SEED, n)).random(columns, np.float32) for n in draws["id"]]
    return torch.from_numpy(np.stack(noise))


def train_step(args, run, step, micro_batch_loss):
    """One optimizer step; returns the loss, averaged over micro-batches and ranks.

    Ends the run if loss or gradient are not finite. Notes the learning rate in run.lr.
    """
    run.lr = run.engine.get_lr()[0]
    loss_sum = torch.zeros((), device=run.engine.device)
    own_draws = run.draws[step - 1, :, dist.get_rank()]  # (GRAD_ACC, MICRO_BSIZE)
    for draws in own_draws:
        stream = np.random.default_rng((args.SEED, draws["id"][0], 2))  # not that of a draw's noise
        torch.manual_seed(int(stream.integers(2**63)))  # dropout
        loss = micro_batch_loss(draws)
        run.engine.backward(loss)
        run.engine.step()  # updates the weights after the last micro-batch
        loss_sum += loss.detach()
    dist.all_reduce(loss_sum)
    loss = loss_sum.item() / (args.GRAD_ACC * dist.get_world_size())
    if not math.isfinite(loss) or not run.engine.was_step_applied():
        rows = own_draws["sample"].flatten().tolist()
        what = f"step {step}: loss {loss} or gradient not finite on rows {rows} of {args.DATA_PT}"
        sys.exit(f"{what}; leave them out or lower LR, in a new run")
    return loss


def main(args, method):
    """Train `method`: the functions at the end of this file, or those of another script."""
    run = start(args, method)  # or resume it

    def micro_batch_loss(draws):
        batch = method.make_batch(args, run.examples, draws, run.pad_id)
        return method.supervised_loss(args, run.engine, *batch)

    for step in progress(run, unit=" tokens", unit_scale=run.draws[0].size * args.MAX_LEN):
        loss = train_step(args, run, step, micro_batch_loss)
        end_step(args, run, step, loss, args.STATE_EVERY)
    finish(args, run)


# ------- the frame of a run, which is the same for every method
class Method(NamedTuple):
    """The functions in which methods differ. A script with another method gives its own."""

    schedule: Callable  # (args, examples, max_draws) -> (N, 2)
    make_batch: Callable  # (args, examples, draws, pad_id) -> tensors, the last one loss_mask
    supervised_loss: Callable  # (args, model, *tensors) -> ()
    build_model: Callable  # (args, device) -> model
    check_model: Callable  # (args, model without weights, tokenizer) -> messages
    count_trained: Callable  # (args, model without weights) -> number of trained weights
    budget: Callable  # (args, method, examples, draws, left_out) -> {name: number}


@dataclass
class Run:
    """A run, from `start` to `finish`."""

    examples: list  # of (prompt_len, ids)
    draws: np.ndarray  # (steps, GRAD_ACC, world_size, MICRO_BSIZE), see `plan`
    suffix: str  # of the run's folders: "", "-v2", ...
    logs: Path
    tokenizer: object
    pad_id: int
    model: torch.nn.Module
    engine: object  # DeepSpeed's, around the model
    done: int  # steps, restored from the saved state
    log: TextIO | None = None  # train_loss.csv, on rank 0
    bar: tqdm | None = None
    lr: float = 0.0  # of the step

    @property
    def state(self):
        """The folder that exists, locked, while the run is unfinished."""
        return self.logs / "state"


def start(args, method):
    """Check everything, join the other ranks, plan the run, and build or restore its model."""
    check_launch()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the others wait in init_distributed
        problems = preflight(args, method, world_size)
        if problems:
            sys.exit("\n".join(problems))
    init_distributed()

    # Plan the run, and find its folders
    examples = load_examples(args)
    draws, left_out = plan(args, method, examples, world_size)
    suffix = [None]
    if dist.get_rank() == 0:
        record = describe_run(args, method, examples, draws, left_out)
        suffix = [claim_run(args, record)]
        for name, value in record["budget"].items():
            print(f"{name:22} {value:,}")
    dist.broadcast_object_list(suffix)
    logs = Path(f"{args.CKPT_DIR}_logs{suffix[0]}")

    # Build the model, and restore the saved state if there is one
    tokenizer = load_pretrained(args, AutoTokenizer, fix_mistral_regex=False)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = method.build_model(args, deepspeed.get_accelerator().current_device_name())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = ds_config(args, len(draws))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    if compiles(args):
        warm_up(args, model)
    done = load_state(engine, logs / "state")
    run = Run(examples, draws, suffix[0], logs, tokenizer, pad_id, model, engine, done)
    if dist.get_rank() == 0:
        total = sum(parameter.numel() for parameter in model.parameters())
        count = sum(parameter.numel() for parameter in trained)
        print(f"trained weights: {count:,} of {total:,} ({count / total:.1%})")
        print(f"{logs}: resumes after step {done}" if done else f"{logs}: new run")
        run.log = open_log(logs / "train_loss.csv", done)
    return run


def progress(run, **unit):
    """The steps that are left, with a bar on rank 0."""
    steps = len(run.draws)
    left = range(run.done + 1, steps + 1)
    run.bar = tqdm(left, initial=run.done, total=steps, disable=dist.get_rank() != 0, **unit)
    return run.bar


def end_step(args, run, step, loss, state_every):
    """Log a step, and save a checkpoint or a state where one is due; None: no states."""
    steps = len(run.draws)
    if dist.get_rank() == 0:
        run.log.write(f"{step},{loss:.6f}\n")
        run.bar.set_postfix(step=f"{step}/{steps}", loss=f"{loss:.3f}", lr=f"{run.lr:.1e}")
    if step == steps or (args.SAVE_EVERY and step % args.SAVE_EVERY == 0):
        save_checkpoint(args, run, checkpoint_path(args, run, step))
    if state_every and step % state_every == 0 and step < steps:
        save_state(run.engine, run.state, step)


def finish(args, run):
    """Remove the state: the run is done."""
    if dist.get_rank() == 0:
        os.rename(run.state, run.logs / "finished")  # in one go
        shutil.rmtree(run.logs / "finished")
        print(f"wrote {checkpoint_path(args, run, len(run.draws))} and {run.logs}")
    dist.destroy_process_group()


def load_examples(args):
    """The first MAX_SAMPLES rows of DATA_PT as [(prompt_len, ids)], ids cut to MAX_LEN."""
    examples = []
    rows = torch.load(args.DATA_PT, weights_only=True)[: args.MAX_SAMPLES]
    for number, row in enumerate(rows):
        prompt_len, ids = row["prompt_len"], row["full_ids"]
        if not torch.is_tensor(ids) or ids.dtype != torch.long or ids.dim() != 1 or ids.lt(0).any():
            raise ValueError(f"row {number} has full_ids {ids!r:.60}, not a LongTensor of ids")
        if type(prompt_len) is not int or not 0 < prompt_len <= len(ids):
            raise ValueError(f"row {number} has prompt_len {prompt_len!r} of {len(ids)} ids")
        examples.append((prompt_len, ids[: args.MAX_LEN]))
    return examples


def check_launch():
    """End with a message where the environment is not that of one launcher; see docs/cluster.md."""
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
        sys.exit("RANK is set, but not LOCAL_RANK; start with deepspeed or torchrun, or unset RANK")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # srun's; not those of an allocation
    if "RANK" not in os.environ and tasks > 1:
        sys.exit(f"each of srun's {tasks} tasks would be a run of its own; let srun start torchrun")


def end_with_launcher():
    """End this process when its launcher has ended, which may have left it running.

    DeepSpeed's launcher, which gives --local_rank, is two processes, a parent and its parent. No
    shell is watched: a run may outlive its terminal.
    """

    def command(process):
        return Path(f"/proc/{process}/cmdline").read_text()

    def parent_of(process):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]

    def watch():
        with suppress(FileNotFoundError, ProcessLookupError):
            parent, grandparent = os.getppid(), None
            if any(word.startswith("--local_rank") for word in sys.argv):
                grandparent = parent_of(parent)
                if "deepspeed" not in command(parent) or grandparent == "1":
                    parent = parent if "deepspeed" in command(1) else None  # it has ended already
            while os.getppid() == parent and grandparent in (None, parent_of(parent)):
                time.sleep(1)
        os.write(2, b"the launcher has ended, so this rank ends; repeat the command to resume\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def init_distributed():
    """Join the other ranks, or be the only one if no launcher has set the environment."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    else:
        end_with_launcher()
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about DeepSpeed's calls
    deepspeed.utils.logger.setLevel("ERROR")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # gloo will do
    deepspeed.init_distributed(timeout=12 * deepspeed.constants.default_pg_timeout)  # 2 hours
    deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if "OMP_NUM_THREADS" not in os.environ:  # the ranks of this machine share its cores
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local_ranks)))
    if dist.get_rank() > 0:
        logging.disable_progress_bar()


@contextmanager
def faults_in_one_line(remedy="or halve MICRO_BSIZE and double GRAD_ACC"):
    """End with one line where memory or the disk fails; `remedy` is for too little memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        new_run = "if a state was saved already, with another CKPT_DIR"
        sys.exit(f"out of memory; set ACTIVATION_CHECKPOINTING, {remedy}; {new_run}")
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"stopped: {type(error).__name__} {error}; repeat the command to resume")


# ------- model
def masked_nll(args, model, input_ids, noisy_ids, loss_mask):
    """Cross-entropy of the tokens at which loss_mask (B, L) is True, in their order; (M,)."""
    row, pos = loss_mask.nonzero(as_tuple=True)  # (M,) each, on the host
    device = model.get_output_embeddings().weight.device
    labels = input_ids[row, pos].to(device)  # (M,)
    pos = pos - int(args.LOGIT_SHIFT)
    logits = logits_at(model, row.to(device), pos.to(device), input_ids=noisy_ids.to(device))
    nll = []
    for piece, target in zip(logits.split(32), labels.split(32), strict=True):  # faster on a CPU
        nll.append(cross_entropy(piece.float(), target, reduction="none"))
    return torch.cat(nll)


def logits_at(model, row, pos, **inputs):
    """The logits at the positions (row, pos), (M,) each; (M, V). The head runs at these alone."""

    def select(_, head_inputs):
        hidden = head_inputs[0]  # (B, L, D), or ids if the head is the embedding itself
        return (hidden[row, pos],) if hidden.is_floating_point() else None  # (M, D)

    with model.get_output_embeddings().register_forward_pre_hook(select):
        logits = model(**inputs).logits  # (M, V), not (B, L, V)
    return logits if logits.dim() == 2 else logits[row, pos]  # a tied head may bypass the hook


def compute_dtype():
    """bfloat16, or float32 on a CPU without bf16 arithmetic."""
    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    return torch.float32 if on_cpu and not cpu_has_bf16() else torch.bfloat16


def cpu_has_bf16():
    """Whether this CPU has bf16 arithmetic; without, torch imitates it, several times slower."""
    cpu = torch.cpu.get_capabilities()
    return any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: of ARM


def load_pretrained(args, auto_class, **options):
    options |= {"revision": args.MODEL_REVISION, "trust_remote_code": True}
    return auto_class.from_pretrained(args.MODEL_NAME, **options)


def build_model(args, device):
    """The base model with the same new adapter on every rank."""
    model = load_model(args, device)
    check_sees_later(args, model)
    return add_adapter(args, prepare_layers(args, model))


def load_model(args, device):
    """The base model, loaded straight to `device`."""
    options = {"dtype": compute_dtype(), "device_map": {"": device}}
    try:
        return load_whole(args.MODEL_NAME, args.MODEL_REVISION, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        sys.exit(f"MODEL_NAME = {args.MODEL_NAME!r}: its weights cannot be loaded ({error!s:.300})")


def load_whole(name, revision, kind=None, **options):
    """A model with the options of `from_pretrained`; ValueError if some of its weights are missing.

    `kind` is its class, if not its own. Dream's own `from_pretrained` adds what generation needs,
    and does not say what is missing.
    """
    if kind is None:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
        kind = model_class(name, revision, config)
    else:
        config = kind.config_class.from_pretrained(name, revision=revision)
    from_pretrained = PreTrainedModel.from_pretrained.__func__
    options |= {"config": config, "revision": revision, "output_loading_info": True}
    model, info = from_pretrained(kind, name, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would only warn
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    model.config.use_cache = False  # which a layer that is computed again would fill twice
    return model


def model_class(name, revision, config):
    """The class of a masked LM: that of its own code, for causal LMs, masked LMs or any, or of
    transformers. Raises ValueError if its configuration names none."""
    own = getattr(config, "auto_map", None) or {}
    for kind in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        if kind in own:
            return get_class_from_dynamic_module(own[kind], name, revision=revision)
    if not config.architectures:
        raise ValueError("its config.json names no class, neither in auto_map nor in architectures")
    return getattr(transformers, config.architectures[0])


def empty_model(name, revision, config):
    """The model without its weights, on the meta device."""
    with init_empty_weights():
        model = model_class(name, revision, config)(config)
    model.tie_weights()  # which it undoes
    return model


def mask_token_id(config, tokenizer):
    """The id of [MASK]: the configuration's, the tokenizer's, or that of its only added token with
    such a name; None: unknown."""
    for own in (getattr(config, "mask_token_id", None), tokenizer.mask_token_id):
        if own is not None:
            return own
    added = tokenizer.added_tokens_decoder.items()
    named = [number for number, token in added if "mask" in token.content.lower()]
    return named[0] if len(named) == 1 else None


def logit_shift(config):
    """Whether a model predicts a position from the one before it; None: unknown."""
    shifted = {"Dream": True, "llada": False, "a2d-qwen3": False, "a2d-qwen2": False}
    return getattr(config, "logit_shift", shifted.get(getattr(config, "model_type", None)))


@torch.no_grad()
def check_sees_later(args, model):
    """End if no later token changes an earlier logit: a causal model cannot learn to fill masks."""
    ids = torch.zeros(2, 16, dtype=torch.long, device=model.device)
    ids[1, 1:] = 1
    one, other = model(input_ids=ids).logits[:, 0]  # (V,) each
    if torch.equal(one, other):
        what = "is a causal language model, which sees no later token"
        sys.exit(f"MODEL_NAME = {args.MODEL_NAME!r} {what}; give a masked diffusion model")


def layers_in(model):
    """The transformer layers of a model, from the first to the last."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return lists[0] if lists else []


def compiles(args):
    """Whether the layers are compiled."""
    on_gpu = deepspeed.get_accelerator().device_name() != "cpu"
    return on_gpu if args.COMPILE is None else args.COMPILE


def warm_up(args, model):
    """Compile the layers by one pass in a step's shape, which leaves no gradient.

    Where they cannot be compiled, the run goes on without, or ends if COMPILE is True.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.full((args.MICRO_BSIZE, args.MAX_LEN), args.MASK_ID, device=device)
    first = torch.zeros(1, dtype=torch.long, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        loss = logits_at(model, first, first, input_ids=ids).float().sum()
        torch.autograd.grad(loss, trained, allow_unused=True)  # of experts without a token
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        what = f"COMPILE = {args.COMPILE}: the layers cannot be compiled ({error!s:.200})"
        if args.COMPILE:
            sys.exit(f"{what}; set it to False")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{what}; the run goes on without")
        torch.compiler.set_stance("force_eager")


def prepare_layers(args, model):
    """`model`, its transformer layers compiled or checkpointed as the constants say."""
    for layer in layers_in(model):
        if compiles(args):  # first: what calls `checkpoint` would not be compiled
            layer.forward = torch.compile(layer.forward)
        if args.ACTIVATION_CHECKPOINTING:  # LLaDA's code has no gradient_checkpointing_enable
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def add_adapter(args, model):
    """`model` with a new LoRA adapter, which is the same on every rank."""
    torch.manual_seed(args.SEED)
    lora = LoraConfig(r=args.LORA_RANK, lora_dropout=args.LORA_DROPOUT)
    lora.lora_alpha = 2 * args.LORA_RANK if args.LORA_ALPHA is None else args.LORA_ALPHA
    lora.target_modules = lora_targets(args, model)
    adapted = get_peft_model(model, lora).train()
    if os.path.isdir(args.MODEL_NAME):  # what finds the base from any folder
        lora.base_model_name_or_path = os.path.abspath(args.MODEL_NAME)
    lora.revision = getattr(model.config, "_commit_hash", None) or args.MODEL_REVISION
    return adapted


def lora_targets(args, model):
    """The linear layers whose names end in one of TARGET_MODS, never the LM head."""
    names = [name for target in args.TARGET_MODS for name in layers_of(model, target)]
    return list(dict.fromkeys(names))  # two targets may name one layer


def layers_of(model, target):
    """The names of the linear layers of a target. Those of all experts are `experts.up_proj`."""
    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        short = re.sub(r"\.experts\.\d+\.", ".experts.", f".{name}")
        fits = short.endswith(f".{target}") and type(module) is torch.nn.Linear
        if fits and module is not head and (".experts." in short) == (".experts." in f".{target}"):
            names.append(name)
    return names


def ds_config(args, steps):
    """DeepSpeed's configuration: ZeRO-2, AdamW, logarithmic warm-up, then a cosine."""
    adamw = {"lr": args.LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
    adamw["torch_adam"] = True  # DeepSpeed's own would be compiled first
    warmup_steps = max(1, int(args.WARMUP_RATIO * steps))  # DeepSpeed refuses 0
    cosine = {"total_num_steps": steps, "warmup_num_steps": warmup_steps, "cos_min_ratio": 0.01}
    zero = {"stage": 2, "overlap_comm": True, "reduce_scatter": True, "contiguous_gradients": True}
    buckets = {"allgather_bucket_size": int(2e8), "reduce_bucket_size": int(2e8)}
    # gradients are summed in float32: 2 bytes per trained weight, for an error of 0.2 not 0.7 %
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if args.GRAD_ACC > 1 else {}
    return {
        "train_micro_batch_size_per_gpu": args.MICRO_BSIZE,
        "gradient_accumulation_steps": args.GRAD_ACC,
        "gradient_clipping": args.GRAD_CLIP,
        "bf16": {"enabled": compute_dtype() == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {"type": "WarmupCosineLR", "params": cosine},
        "zero_optimization": zero | buckets,
        **sums,
    }


# ------- saving and resuming
def save_merged(args, model, tokenizer, folder):
    """Write a checkpoint to the new `folder`: the base model with the adapter merged."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    save_frame(args, base.config, tokenizer, folder)
    save_torch_state_dict(merged_weights(base), folder)


def save_frame(args, config, tokenizer, folder):
    """Write all of a checkpoint but its weights: configuration, code, tokenizer.

    The code is the model's own. transformers would copy it from a cache, which is keyed by the name
    of the model's folder, and would fail where it is read-only.
    """
    tokenizer.save_pretrained(folder)
    source = Path(cached_file(args.MODEL_NAME, "config.json", revision=args.MODEL_REVISION)).parent
    config = deepcopy(config)
    config.use_cache = json.loads((source / "config.json").read_text()).get("use_cache", True)
    config.dtype = torch.bfloat16  # not that of the computation
    config.update({"mask_token_id": args.MASK_ID, "logit_shift": args.LOGIT_SHIFT})
    config.to_json_file(folder / "config.json")
    for path in [*source.glob("*.py"), *source.glob("generation_config.json")]:
        (folder / path.name).unlink(missing_ok=True)  # what the tokenizer copied may be read-only
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        if "auto_map" in content:
            auto_map = json.dumps(content["auto_map"])
            for code in folder.glob("*.py"):  # is beside it; of other code the repository is kept
                auto_map = re.sub(rf'"[^"]*--({code.stem}\.)', r'"\1', auto_map)
            content["auto_map"] = json.loads(auto_map)
            write_json(path, content)


@torch.no_grad()
def merged_weights(base):
    """{name: W + alpha / r * B @ A in bf16} of the base model; the sum is taken in float32."""
    head = base.get_output_embeddings()
    embedding = base.get_input_embeddings()
    weights = {}
    for name, weight in base.state_dict().items():
        if ".lora_" not in name:
            weight = weight.bfloat16()
            if weight.untyped_storage().nbytes() > weight.nbytes:  # DeepSpeed's, of all trained
                weight = weight.clone()
            weights[name.replace(".base_layer.", ".")] = weight
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_A"):
            w = layer.base_layer.weight.float()
            a = layer.lora_A["default"].weight.float()
            b = layer.lora_B["default"].weight.float()
            weights[f"{name}.weight"] = (w + layer.scaling["default"] * b @ a).bfloat16().cpu()
        elif layer is head and layer is not embedding and layer.weight is embedding.weight:
            del weights[f"{name}.weight"]  # tied: loading restores it
    return weights


def flush(folder):
    """Return when the disk has all files of a folder."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def checkpoint_path(args, run, step):
    return f"{args.CKPT_DIR}_step{step:04d}{run.suffix}"


def save_checkpoint(args, run, path):
    """Rank 0 saves the merged model beside the state, then renames it to `path`; others wait."""
    folder = run.state / "checkpoint"
    if dist.get_rank() == 0 and not os.path.exists(path):  # or a killed run saved it
        shutil.rmtree(folder, ignore_errors=True)  # what a kill left
        try:
            save_merged(args, run.model, run.tokenizer, folder)
            if args.SAVE_ADAPTER:
                run.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
            umask = os.umask(0)
            os.umask(umask)
            for weights in folder.rglob("*.safetensors"):  # safetensors lets nobody else read them
                weights.chmod(0o666 & ~umask)
            flush(folder)
            os.rename(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


def save_state(engine, state, step):
    """Save adapter, optimizer and schedule after `step`; then remove the state before it."""
    tag = f"step{step:04d}"
    try:
        engine.save_checkpoint(state, tag, save_latest=False, exclude_frozen_parameters=True)
    except RuntimeError as error:  # torch's, if the disk is full
        shutil.rmtree(state / tag, ignore_errors=True)
        raise OSError(f"{state / tag} cannot be saved: {error!s:.200}") from error
    dist.barrier()  # DeepSpeed would write `latest` before this
    if dist.get_rank() == 0:
        flush(state / tag)
        write_json(state / "latest.json", tag)
        for other in state.glob("step*"):
            if other.name != tag:
                shutil.rmtree(other)


def load_state(engine, state):
    """Restore the last saved state; returns the step it was saved after, or 0 if there is none."""
    if not (state / "latest.json").exists():
        return 0
    tag = json.loads((state / "latest.json").read_text())
    try:
        if len(list((state / tag).glob("*_states.pt"))) != 1 + dist.get_world_size():
            raise FileNotFoundError("a file is missing")  # DeepSpeed would not notice
        engine.load_checkpoint(state, tag, load_module_strict=False)  # has no frozen weights
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files fail in many ways
        remedy = f"delete {state.parent} to start again"
        sys.exit(f"{state / tag} is damaged ({error!r:.200}); {remedy}")
    return int(tag.removeprefix("step"))


def write_json(path, content):
    """Write a file that has its old content or the new one, whenever the process is killed."""
    path.with_suffix(".partial").write_text(json.dumps(content, indent=2) + "\n")
    os.replace(path.with_suffix(".partial"), path)


def open_log(path, step):
    """train_loss.csv, cut back to the first `step` steps."""
    if step == 0:
        path.write_text("step,loss\n")
    lines = path.read_text().splitlines(keepends=True)
    os.truncate(path, len("".join(lines[: 1 + step])))
    return open(path, "a", buffering=1)  # written line by line


def describe_run(args, method, examples, draws, left_out):
    """Everything that decides the result, and what the run amounts to, for run_config.json."""
    return {
        "script": os.path.basename(sys.argv[0]),
        **vars(args),
        "dtype": str(compute_dtype()),
        "world_size": draws.shape[2],
        "data_sha256": hashlib.sha256(Path(args.DATA_PT).read_bytes()).hexdigest(),
        "model_commit": getattr(load_pretrained(args, AutoConfig), "_commit_hash", None),
        "model_files": model_files(args),
        "versions": {x: version(x) for x in "torch deepspeed transformers peft numpy".split()},
        "budget": method.budget(args, method, examples, draws, left_out),
    }


def model_files(args):
    """{name: [bytes, time of change]} of the weights in a local model's folder."""
    paths = sorted(Path(args.MODEL_NAME).glob("*.safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def budget(args, method, examples, draws, left_out):
    """What the run amounts to, a dict of numbers."""
    samples = sum(prompt_len < len(ids) for prompt_len, ids in examples)
    micro_batches = draws.reshape(-1, args.MICRO_BSIZE)
    batches = (method.make_batch(args, examples, batch, 0) for batch in micro_batches)
    return {
        "samples": samples,
        "samples_without_answer": len(examples) - samples,  # never drawn
        "steps": len(draws),
        "global_batch": draws[0].size,
        "draws": draws.size,
        "draws_left_out": left_out,
        "passes": round(draws.size / samples, 2),
        "forward_tokens": draws.size * args.MAX_LEN,
        "supervised_tokens": sum(int(loss_mask.sum()) for *_, loss_mask in batches),
    }


def is_unfinished(logs):
    """Whether a run has not logged its last step; its state may have been deleted."""
    if not (logs / "run_config.json").exists():
        return False
    steps = json.loads((logs / "run_config.json").read_text())["budget"]["steps"]
    log = logs / "train_loss.csv"
    return not log.exists() or len(log.read_text().splitlines()) <= steps


def claim_run(args, record):
    """Lock the unfinished run, which must have the same `record`, or a new one.

    Returns the suffix of its folders. A run that has saved nothing yet may have another record.
    """
    for suffix in ["", *(f"-v{number}" for number in range(2, 10**4))]:
        logs = Path(f"{args.CKPT_DIR}_logs{suffix}")
        taken = logs.exists() and not is_unfinished(logs)
        taken = taken or glob(f"{args.CKPT_DIR}_step*[0-9]{suffix}")
        if (logs / "state").exists() or not taken:
            break
    (logs / "state").mkdir(parents=True, exist_ok=True)
    lock = os.open(logs / "state" / "lock", os.O_RDWR | os.O_CREAT)  # open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{logs} is in use by another process; wait, or set another CKPT_DIR")
    path = logs / "run_config.json"
    latest = logs / "state" / "latest.json"
    saved = latest.exists() or glob(f"{args.CKPT_DIR}_step*[0-9]{suffix}")
    if not path.exists() or not saved:  # nothing to lose
        if ABLATION:
            write_json(logs / "ablation_config.json", {name: record[name] for name in ABLATION})
        write_json(logs / "ds_zero2.json", ds_config(args, record["budget"]["steps"]))
        write_json(path, record)
    old = json.loads(path.read_text())
    free = {"budget", "STATE_EVERY", "SAVE_EVERY", "SAVE_ADAPTER"}  # change no weight
    differ = [x for x in old | record if x not in free and old.get(x) != record.get(x)]
    tokens = "supervised_tokens"
    if not differ and old["budget"].get(tokens) != record["budget"].get(tokens):
        sys.exit(f"{logs} is an unfinished run whose {tokens} were others: the code has changed")
    if differ:
        changes = [f"{name} was {old.get(name)!r}, now {record.get(name)!r}" for name in differ]
        remedy = f"change this back, set another CKPT_DIR, or delete {logs} and its checkpoints"
        step = json.loads(latest.read_text()) if latest.exists() else "no step"
        what = f"{logs} is an unfinished run with other settings (saved: {step})"
        sys.exit(f"{what}: {', '.join(changes)}; {remedy}")
    return suffix


# ------- checks before training: all problems are reported together
def preflight(args, method, world_size):
    """Messages on everything that is wrong with data, model and disk; loads no weights."""
    problems = []
    try:
        examples = load_examples(args)
    except Exception as error:  # missing, damaged, or not a list of such rows
        what = f"DATA_PT = {args.DATA_PT!r} is not what pt.py writes"
        problems.append(f"{what} ({error!r:.200}); run pt.py")
    try:
        config = load_pretrained(args, AutoConfig)
        if getattr(config, "quantization_config", None):
            return [*problems, f"MODEL_NAME = {args.MODEL_NAME!r} is quantized; give its bf16 form"]
        tokenizer = load_pretrained(args, AutoTokenizer, fix_mistral_regex=False)
        model = empty_model(args.MODEL_NAME, args.MODEL_REVISION, config)
    except Exception as error:  # the hub, a folder and remote code fail in many ways
        what = f"MODEL_NAME = {args.MODEL_NAME!r} cannot be loaded"
        problems.append(f"{what} ({error!r:.300}); give another")
    if not problems:
        problems += check_examples(args, method, examples, world_size, model, tokenizer)
        problems += method.check_model(args, model, tokenizer)
        problems += check_memory(args, method, model, world_size)
        if world_size > 1 and any(".experts." in f".{target}" for target in args.TARGET_MODS):
            why = "ranks whose tokens meet other experts would mix up their gradients"
            problems.append(f"TARGET_MODS = {args.TARGET_MODS}: {why}; train experts on one GPU")
        problems += check_saving(args, method, examples, world_size, model, tokenizer)
    return problems


def check_model(args, model, tokenizer):
    """Messages on mask token, LoRA targets, device and disk; prints the layers per target."""
    problems = check_mask_id(args, model, tokenizer)
    if logit_shift(model.config) not in (None, args.LOGIT_SHIFT):
        own = f"{args.MODEL_NAME} needs {logit_shift(model.config)}"
        problems.append(f"LOGIT_SHIFT = {args.LOGIT_SHIFT}: {own}")
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        none = "its tokenizer has neither an end-of-text nor a padding token"
        problems.append(f"MODEL_NAME = {args.MODEL_NAME!r}: {none}; add one")
    if not lora_targets(args, model):
        none = f"no linear layer of {args.MODEL_NAME} has such a name"
        problems.append(f"TARGET_MODS = {args.TARGET_MODS}: {none}")
    for target in args.TARGET_MODS:
        print(f"LoRA on {len(layers_of(model, target))} layers {target}")
    if not deepspeed.get_accelerator().is_bf16_supported():
        problems.append("this GPU has no bf16; Ampere and later ones have it")
    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    if on_cpu and model.num_parameters() > 1e9 and os.environ.get("DS_ACCELERATOR") != "cpu":
        size = f"{model.num_parameters() / 1e9:.1f} billion weights"
        remedy = "mend the GPU's driver, or set DS_ACCELERATOR=cpu in the environment"
        problems.append(f"torch finds no GPU for {size}; {remedy}")
    return problems + check_weights(args)


def check_mask_id(args, model, tokenizer):
    """A message if MASK_ID is not the model's, or, where this is unknown, is a token of texts."""
    vocabulary = model.get_input_embeddings().num_embeddings
    own = mask_token_id(model.config, tokenizer)
    if own not in (None, args.MASK_ID) or vocabulary <= args.MASK_ID:
        named = "unknown" if own is None else own
        what = f"{args.MODEL_NAME} has {vocabulary} ids, its mask token is {named}"
        return [f"MASK_ID = {args.MASK_ID}: {what}"]
    texts_have_it = args.MASK_ID < len(tokenizer)
    if own is None and texts_have_it and args.MASK_ID not in tokenizer.added_tokens_decoder:
        what = f"{args.MODEL_NAME} names no mask token, and this one is in texts"
        free = f"; the first id that is in none is {len(tokenizer)}"
        return [f"MASK_ID = {args.MASK_ID}: {what}{free if len(tokenizer) < vocabulary else ''}"]
    return []


def count_trained(args, model):
    """The number of the adapter's weights."""
    layers = [model.get_submodule(name) for name in lora_targets(args, model)]
    return args.LORA_RANK * sum(x.in_features + x.out_features for x in layers)


def memory_needed(args, method, model, world_size):
    """About the bytes that a step takes on a GPU; docs/performance.md has the formula's origin."""
    trained = method.count_trained(args, model)
    experts = getattr(model.config, "num_experts", 1)
    active = getattr(model.config, "num_experts_per_tok", 1) / experts
    kept = []  # bytes per token and layer
    for layer in layers_in(model):
        features = 0
        for name, x in layer.named_modules():
            if type(x) is torch.nn.Linear:
                features += (x.in_features + x.out_features) * (active if "experts" in name else 1)
        kept.append((1.8 if compiles(args) else 2.7) * features)
    vocabulary, width = model.get_input_embeddings().weight.shape
    per_token = sum(kept)
    if args.ACTIVATION_CHECKPOINTING:
        per_token = max(kept, default=0) + 2 * width * len(kept)
    supervised = min(getattr(args, "BLOCK_SIZE", args.MAX_LEN), args.MAX_LEN // 2) / 2  # of a row
    rows = args.MICRO_BSIZE * (args.MAX_LEN * per_token + 4 * supervised * vocabulary)
    sharded = (14 + 4 * (args.GRAD_ACC > 1)) * trained / world_size
    return 2 * model.num_parameters() + 2 * trained + sharded + rows + 0.8e9


def check_memory(args, method, model, world_size):
    """A message, with settings that fit, if the GPU's memory is certainly too little."""
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        return []
    has = accelerator.total_memory()
    needed = memory_needed(args, method, model, world_size)
    if 0.85 * needed < has:  # the formula was within 3 % of what was measured
        return []
    rows = args.MICRO_BSIZE * args.GRAD_ACC
    ranks = [args.LORA_RANK, *(rank for rank in (64, 16) if rank < args.LORA_RANK)]
    sizes = [size for size in range(args.MICRO_BSIZE, 0, -1) if rows % size == 0]
    remedy = "take a smaller model or a lower MAX_LEN"
    for choice in product(ranks, sorted({args.ACTIVATION_CHECKPOINTING, True}), sizes):
        names = ("LORA_RANK", "ACTIVATION_CHECKPOINTING", "MICRO_BSIZE", "GRAD_ACC")
        changes = dict(zip(names, [*choice, rows // choice[-1]], strict=True))
        changed = argparse.Namespace(**vars(args) | changes)
        if memory_needed(changed, method, model, world_size) < 0.9 * has:
            settings = ", ".join(f"{name} {value}" for name, value in changes.items())
            remedy = f"{settings} would fit"
            break
    what = f"a step needs about {needed / 1e9:.0f} GB, and the GPU has {has / 1e9:.0f} GB"
    return [f"MICRO_BSIZE = {args.MICRO_BSIZE}: {what}; {remedy}"]


def check_weights(args):
    """Messages on files of a local model's weights that are missing, or are not downloaded."""
    folder = Path(args.MODEL_NAME)
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        names |= set(json.loads(index.read_text())["weight_map"].values())
    problems = []
    for path in [folder / name for name in sorted(names)]:
        if not path.exists():
            problems.append(f"{path} is missing; complete the model's folder")
        elif starts_with(path, b"version https://git-lfs"):
            problems.append(f"{path} is a pointer of git-lfs; get the file with git lfs pull")
    return problems


def starts_with(path, content):
    with open(path, "rb") as file:
        return file.read(len(content)) == content


def check_saving(args, method, examples, world_size, model, tokenizer):
    """Messages if what the run saves does not fit the disk, or a checkpoint cannot be written.

    Writes all of a checkpoint but its weights to a scratch folder.
    """
    problems = []
    folder = Path(args.CKPT_DIR).absolute().parent
    while not folder.exists():
        folder = folder.parent
    steps = len(plan(args, method, examples, world_size)[0])
    checkpoints = math.ceil(steps / (args.SAVE_EVERY or steps)) if steps else 1
    trained = method.count_trained(args, model)
    states = 2 if args.STATE_EVERY else 0
    needed = checkpoints * (2 * model.num_parameters() + 4 * trained * args.SAVE_ADAPTER)
    needed += states * 14 * trained  # bytes
    if shutil.disk_usage(folder).free < needed:
        what = f"{checkpoints} checkpoints and {states} states take {needed / 1e9:.1f} GB"
        problems.append(f"CKPT_DIR = {args.CKPT_DIR!r}: {what}; free some space")
    try:
        with TemporaryDirectory() as scratch:
            save_frame(args, model.config, tokenizer, Path(scratch) / "checkpoint")
    except Exception as error:  # configurations and tokenizers are programs
        what = f"a checkpoint of it cannot be written ({error!r:.200})"
        problems.append(f"MODEL_NAME = {args.MODEL_NAME!r}: {what}; repair the model's folder")
    return problems


def check_examples(args, method, examples, world_size, model, tokenizer):
    """Messages on too few rows, and on ids or a tokenizer that are not the model's."""
    data = f"DATA_PT = {args.DATA_PT!r}"
    samples = sum(prompt_len < len(ids) for prompt_len, ids in examples)
    if samples < args.MICRO_BSIZE or len(plan(args, method, examples, world_size)[0]) == 0:
        step = f"MICRO_BSIZE = {args.MICRO_BSIZE} x GRAD_ACC = {args.GRAD_ACC} x {world_size} ranks"
        rows = f"MAX_SAMPLES = {args.MAX_SAMPLES} of {data} give {samples} rows with an answer"
        return [f"{rows}, too few for a step of {step}; use more rows, or lower these"]
    remedy = f"write it with pt.py --model {args.MODEL_NAME}"
    vocabulary = model.get_input_embeddings().num_embeddings
    if any(ids.max() >= vocabulary or args.MASK_ID in ids for _, ids in examples):
        what = f"has MASK_ID = {args.MASK_ID} or ids beyond the model's {vocabulary}"
        return [f"{data} {what}; {remedy}"]
    for _, ids in examples[:32]:  # another tokenizer brings back none of them, even nearly
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = tokenizer.encode(text, add_special_tokens=False)
        if SequenceMatcher(None, again, ids.tolist(), autojunk=False).ratio() > 0.95:
            return []
    return [f"{data} was made with another tokenizer; {remedy}"]


# ------- flags
LIMITS = [  # names, allowed types or texts, lowest and highest value
    ("MODEL_NAME MODEL_REVISION DATA_PT CKPT_DIR", [str], None, None),
    ("TARGET_MODS", [list], None, None),
    ("SEED MASK_ID", [int], 0, 2**32 - 1),
    ("MAX_SAMPLES MAX_LEN EPOCHS MICRO_BSIZE GRAD_ACC LORA_RANK BLOCK_SIZE", [int], 1, 10**6),
    ("TOTAL_TRAIN_STEPS SAVE_EVERY STATE_EVERY", [int, type(None)], 1, 10**6),
    ("LR WARMUP_RATIO LORA_DROPOUT MASK_PROB_EPS", [int, float], 0, 1),
    ("PREFIX_MASK_RATE SUFFIX_MASK_PROB", [int, float], 0, 1),
    ("GRAD_CLIP", [int, float], 0, 10**6),
    ("LORA_ALPHA", [int, float, type(None)], 0, 10**6),
    ("COMPILE", [bool, type(None)], False, True),
    ("LOGIT_SHIFT MASK_PADDING ACTIVATION_CHECKPOINTING SAVE_ADAPTER", [bool], False, True),
]


def parse_args(argv=None, doc=__doc__, constants=CONSTANTS, limits=LIMITS, scripts=()):
    """The constants as attributes, with the values of the flags --NAME VALUE.

    A wrong flag or value ends the process, with a line for each. Scripts with another method give
    their own docstring, constants ({name: value}), limits, and paths, where the comments are.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the launcher
    comments = {}
    for script in (__file__, *scripts):
        comments |= read_comments(script)
    for name, value in constants.items():
        shown = ",".join(value) if isinstance(value, list) else value
        text = f"{comments.get(name, '')} (now {shown})".replace("%", "%%")
        parser.add_argument(f"--{name}", nargs="?", const="", metavar="VALUE", help=text)
    flags, unknown = parser.parse_known_args(argv)
    words = [word for word in unknown if word.startswith("--")]  # without their values
    problems = [f"{word}: no constant of this script; see --help" for word in words or unknown]
    args = argparse.Namespace(**constants)
    limited = " ".join(names for names, *_ in limits).split()
    for name, default in constants.items():
        text = getattr(flags, name)
        if text is None:
            continue
        value = from_text(text, type(default))
        setattr(args, name, value)
        if name not in limited and type(value) is not type(default):
            problems.append(f"{name} = {value!r}: must be {type(default).__name__}, as {default!r}")
    problems += check_constants(args, limits)
    if problems and os.environ.get("LOCAL_RANK", "0") == "0":  # the launcher ends the other ranks
        sys.exit("\n".join(problems))
    return args


def read_comments(script):
    """{NAME: comment} of the lines `NAME = value  # comment` of a script."""
    return dict(re.findall(r"^([A-Z][A-Z0-9_]*) = .*?  # (.*)$", Path(script).read_text(), re.M))


def from_text(text, kind):
    """The value of a flag whose constant is of this kind; check_constants refuses what is not."""
    if kind is list:
        return [word.strip() for word in text.split(",") if word.strip()]
    if kind is not str:
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
    return text


def check_constants(args, limits):
    """A message for every constant that is out of its limits, whether edited or given as a flag."""
    problems = []
    for names, types, lowest, highest in limits:
        kinds = [str(getattr(kind, "__name__", kind)) for kind in types]
        allowed = " or ".join(kinds).replace("NoneType", "None")
        if str in types or list in types:
            allowed += ", not empty"
        if lowest is not None:
            allowed += f", {lowest} to {highest}"
        for name in [name for name in names.split() if name in args]:  # some methods have fewer
            value = getattr(args, name)
            fits = (type(value) in types or value in types) and value not in ("", [])
            if fits and lowest is not None and value is not None:
                fits = lowest <= value <= highest
            if not fits:
                problems.append(f"{name} = {value!r}: must be {allowed}")
    if set(str(args.CKPT_DIR)) & set("*?["):
        problems.append(f"CKPT_DIR = {args.CKPT_DIR!r}: must not contain * ? or [")
    return problems


METHOD = Method(
    schedule, make_batch, supervised_loss, build_model, check_model, count_trained, budget
)

if __name__ == "__main__":
    with faults_in_one_line():
        main(parse_args(), METHOD)
