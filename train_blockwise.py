"""Blockwise SFT of a masked diffusion language model, with LoRA and DeepSpeed ZeRO-2.

    deepspeed --num_gpus 8 train_blockwise.py     # or with --BLOCK_SIZE 64 --CKPT_DIR ckpts_64

Each training example is one block of one answer, in a state that block decoding meets:

    prompt | clean prefix | active block, masked at rate t ~ U(eps, 1) | [MASK] suffix | padding

The loss is the cross-entropy of the active block's masked tokens (Sun, Cai, Yang and Wang,
"Blockwise SFT for Diffusion Language Models: Reconciling Bidirectional Attention and
Autoregressive Decoding", arXiv 2508.19529). `diff` with train_fullseq.py shows the method.

Shapes: B rows, L = MAX_LEN tokens, V vocabulary, D width, M supervised tokens, N draws.
"""

import argparse
import ast
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from contextlib import suppress
from functools import partial
from glob import glob
from importlib.metadata import version
from pathlib import Path

# ------- constants: edit them, or give any for one run as --NAME VALUE (a list as a,b)
# Model and data
MODEL_NAME = "GSAI-ML/LLaDA-8B-Instruct"  # hub id or folder; its own code is run
MODEL_REVISION = "main"  # branch, tag or commit
MASK_ID = 126336  # LLaDA's <|mdm_mask|>
DATA_PT = "MathQA_256.pt"  # written by pt.py
MAX_SAMPLES = 200 * 32  # rows of DATA_PT, from its beginning
MAX_LEN = 256  # tokens; shorter rows are padded, longer ones truncated
SEED = 42

# Method
BLOCK_SIZE = 32  # tokens
PREFIX_MASK_RATE = 0.0  # share of the prefix shown as [MASK]; never in the loss
SUFFIX_MASK_PROB = 1.0  # the same for the suffix; 0 shows the future
MASK_PROB_EPS = 1e-3  # smallest t
MASK_PADDING = False  # True shows [MASK] instead of padding, as decoding does

# Training
EPOCHS = 1
MICRO_BSIZE = 32  # rows per GPU and forward pass
GRAD_ACC = 1  # forward passes per optimizer step
TOTAL_TRAIN_STEPS = None  # None: MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC)
LR = 1e-5  # peak
WARMUP_RATIO = 0.1  # share of the steps
GRAD_CLIP = 1.0  # gradient norm; 0: off
LORA_RANK = 256
LORA_ALPHA = None  # None: 2 * LORA_RANK
LORA_DROPOUT = 0.05
TARGET_MODS = ["q_proj", "k_proj", "v_proj", "up_proj"]  # those that LLaDA has (T12)
COMPILE = False  # torch.compile the transformer layers
ACTIVATION_CHECKPOINTING = False  # less memory, about a third more time

# Output
CKPT_DIR = "ckpts_stagewise_sft_32"  # prefix of the folders that a run writes
SAVE_EVERY = None  # steps between checkpoints; the last step is always saved
SAVE_ADAPTER = False  # True: write the adapter too
STATE_EVERY = 50  # steps between states to resume from

CONSTANTS = [name for name in globals() if name.isupper()]
ABLATION = ["PREFIX_MASK_RATE", "SUFFIX_MASK_PROB", "BLOCK_SIZE"]  # recorded by themselves
LIMITS = [  # names, allowed types, lowest and highest value
    ("MODEL_NAME MODEL_REVISION DATA_PT CKPT_DIR", [str], None, None),
    ("TARGET_MODS", [list], None, None),
    ("SEED MASK_ID", [int], 0, 2**32 - 1),
    ("MAX_SAMPLES MAX_LEN EPOCHS MICRO_BSIZE GRAD_ACC LORA_RANK BLOCK_SIZE", [int], 1, 10**6),
    ("TOTAL_TRAIN_STEPS SAVE_EVERY STATE_EVERY", [int, type(None)], 1, 10**6),
    ("LR WARMUP_RATIO LORA_DROPOUT MASK_PROB_EPS", [int, float], 0, 1),
    ("PREFIX_MASK_RATE SUFFIX_MASK_PROB", [int, float], 0, 1),
    ("GRAD_CLIP", [int, float], 0, 10**6),
    ("LORA_ALPHA", [int, float, type(None)], 0, 10**6),
    ("MASK_PADDING COMPILE ACTIVATION_CHECKPOINTING SAVE_ADAPTER", [bool], False, True),
]


def read_overrides(argv):
    """Set the constants given as --NAME VALUE; returns a message for every unknown flag."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from the launcher
    for name in CONSTANTS:
        default = str(globals()[name]).replace("%", "%%")
        parser.add_argument(f"--{name}", nargs="?", const="", help=f"now {default}")
    given, unknown = parser.parse_known_args(argv)
    for name in [name for name in CONSTANTS if getattr(given, name) is not None]:
        value = getattr(given, name)
        kind = type(globals()[name])
        if kind is list:
            value = value.split(",")
        if kind not in (list, str):
            with suppress(ValueError, SyntaxError):  # check_constants refuses what stays text
                value = ast.literal_eval(value)
        globals()[name] = value
    flags = [word for word in unknown if word.startswith("--")]  # without their values
    return [f"{flag}: no constant of this script; see --help" for flag in flags or unknown]


def check_constants():
    """A message for every constant that is out of range, whether edited or given as a flag."""
    problems = []
    for names, types, lowest, highest in LIMITS:
        allowed = " or ".join(kind.__name__ for kind in types).replace("NoneType", "None")
        limits = "not empty" if lowest is None else f"{lowest} to {highest}"
        for name in names.split():
            value = globals()[name]
            fits = type(value) in types and value not in ("", [])
            if fits and lowest is not None and value is not None:
                fits = lowest <= value <= highest
            if not fits:
                problems.append(f"{name} = {value!r}: must be {allowed}, {limits}")
    if set(str(CKPT_DIR)) & set("*?["):
        problems.append(f"{CKPT_DIR = }: must not contain * ? or [")
    return problems


if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    PROBLEMS = read_overrides(sys.argv[1:]) + check_constants()
    if PROBLEMS and os.environ.get("LOCAL_RANK", "0") == "0":  # the launcher ends the other ranks
        sys.exit("\n".join(PROBLEMS))

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging


# ------- data: what is drawn when is a function of the constants alone
def load_examples():
    """The first MAX_SAMPLES rows of DATA_PT as [(prompt_len, ids)], ids cut to MAX_LEN."""
    examples = []
    for number, row in enumerate(torch.load(DATA_PT, weights_only=True)[:MAX_SAMPLES]):
        prompt_len, ids = row["prompt_len"], row["full_ids"]
        if not torch.is_tensor(ids) or ids.dtype != torch.long or ids.dim() != 1 or ids.lt(0).any():
            raise ValueError(f"row {number} has full_ids {ids!r:.60}, not a LongTensor of ids")
        if type(prompt_len) is not int or not 0 < prompt_len <= len(ids):
            raise ValueError(f"row {number} has prompt_len {prompt_len!r} of {len(ids)} ids")
        examples.append((prompt_len, ids[:MAX_LEN]))
    return examples


def schedule(examples, max_draws):
    """The draws of the whole run in order, (sample, block) each; (N, 2), N <= max_draws.

    Each pass draws one unused block of every sample that has one, until all are used (T5, T9).
    """
    rng = np.random.default_rng((SEED, 0, 1))  # not the stream of any draw
    draws = []
    for sample, (prompt_len, ids) in enumerate(examples):
        n_blocks = max(0, math.ceil((len(ids) - prompt_len) / BLOCK_SIZE))
        for visit, block in enumerate(rng.permutation(n_blocks)):
            draws.append((visit, rng.random(), sample, block))
    draws.sort()  # pass by pass, in random order within a pass
    return np.array([(sample, block) for _, _, sample, block in draws[:max_draws]])


def plan(examples, world_size):
    """The draws of the run (N, 2), and their numbers (steps, GRAD_ACC, world_size, MICRO_BSIZE).

    Differs from the published script (T1, T3): every rank takes every step, on any number of GPUs.
    """
    global_batch = MICRO_BSIZE * GRAD_ACC * world_size
    max_steps = TOTAL_TRAIN_STEPS or MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC)
    draws = schedule(examples, max_steps * global_batch)
    steps = len(draws) // global_batch  # fewer than max_steps if the blocks run out
    shape = (steps, GRAD_ACC, world_size, MICRO_BSIZE)
    return draws, np.arange(math.prod(shape)).reshape(shape)


def make_batch(examples, draws, numbers, pad_id):
    """input_ids, noisy_ids and loss_mask, (B, L) each, of the draws with these numbers.

    The noise of a draw depends on SEED and its number alone, whatever rank it falls to (T4).
    """
    rows = [examples[sample] for sample in draws[numbers, 0]]
    padded = [pad(ids, (0, MAX_LEN - len(ids)), value=pad_id) for _, ids in rows]
    input_ids = torch.stack(padded)  # (B, L)
    prompt_len = torch.tensor([[prompt_len] for prompt_len, _ in rows])  # (B, 1)
    length = torch.tensor([[len(ids)] for _, ids in rows])  # (B, 1)
    block = torch.from_numpy(draws[numbers, 1:])  # (B, 1)
    noise = [np.random.default_rng((SEED, n)).random(1 + MAX_LEN, np.float32) for n in numbers]
    noise = torch.from_numpy(np.stack(noise))  # (B, 1 + L)
    return input_ids, *corrupt(input_ids, prompt_len, length, block, noise)


# ------- corruption and loss
def corrupt(input_ids, prompt_len, length, block, noise):
    """Mask a batch as block decoding meets it: prefix clean, block at rate t, suffix hidden.

    input_ids (B, L); prompt_len, length and block (B, 1), blocks counted from the answer's start
    (T6); noise (B, 1 + L) ~ U(0, 1), its first column gives t. Returns noisy_ids (B, L), and
    loss_mask (B, L), True where a token is masked and in the loss.
    """
    pos = torch.arange(input_ids.shape[1])  # (L,)
    t = MASK_PROB_EPS + (1 - MASK_PROB_EPS) * noise[:, :1]  # (B, 1)
    first = prompt_len + block * BLOCK_SIZE  # (B, 1)
    answer = (prompt_len <= pos) & (pos < length)  # (B, L)
    prefix = answer & (pos < first)
    suffix = answer & (first + BLOCK_SIZE <= pos)
    active = answer & ~prefix & ~suffix
    p_mask = PREFIX_MASK_RATE * prefix + t * active + SUFFIX_MASK_PROB * suffix
    p_mask = p_mask + MASK_PADDING * (length <= pos)
    masked = noise[:, 1:] < p_mask  # True = shown as [MASK]
    return input_ids.masked_fill(masked, MASK_ID), masked & active


def supervised_loss(model, input_ids, noisy_ids, loss_mask):
    """Mean over rows of the mean cross-entropy of a row's masked tokens; 0 without any (T8)."""
    row, pos = loss_mask.nonzero(as_tuple=True)  # (M,) each, on the host
    labels = input_ids[row, pos]  # (M,)
    count = loss_mask.sum(1)[row]  # (M,) masked tokens in the same row
    head = model.get_output_embeddings()
    tensors = [tensor.to(head.weight.device) for tensor in (row, pos, labels, count, noisy_ids)]
    row, pos, labels, count, noisy_ids = tensors

    def select(_, inputs):
        hidden = inputs[0]  # (B, L, D), or ids if the head is the embedding itself
        return (hidden[row, pos],) if hidden.is_floating_point() else None  # (M, D)

    with head.register_forward_pre_hook(select):
        logits = model(input_ids=noisy_ids).logits  # (M, V), not (B, L, V)
    if logits.dim() == 3:  # a head tied to the embedding bypasses the hook
        logits = logits[row, pos]
    nll = []
    for piece, target in zip(logits.split(32), labels.split(32), strict=True):  # faster on a CPU
        nll.append(cross_entropy(piece.float(), target, reduction="none"))
    return (torch.cat(nll) / count).sum() / len(input_ids)  # (M,) -> ()


# ------- model
def compute_dtype():
    """bfloat16, or float32 on a CPU without bf16 arithmetic."""
    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if on_cpu and not has_bf16 else torch.bfloat16


def load_pretrained(auto_class, **options):
    options |= {"revision": MODEL_REVISION, "trust_remote_code": True}
    return auto_class.from_pretrained(MODEL_NAME, **options)


def lora_targets(model):
    """The linear layers whose names end in one of TARGET_MODS, never the LM head (T12)."""
    head = model.get_output_embeddings()
    endings = tuple(f".{target}" for target in TARGET_MODS)
    linear = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]
    return [name for name in linear if f".{name}".endswith(endings)]


def build_model(device):
    """The base model, loaded straight to `device`, with the same new adapter on every rank."""
    options = {"dtype": compute_dtype(), "device_map": {"": device}, "output_loading_info": True}
    model, info = load_pretrained(AutoModelForCausalLM, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would only warn
        sys.exit(f"{MODEL_NAME = }: {len(missing)} weights are missing, such as {missing[0]}")
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in lists[0] if lists else []:
        if ACTIVATION_CHECKPOINTING:  # LLaDA's code has no gradient_checkpointing_enable
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if COMPILE:
            layer.compile()
    torch.manual_seed(SEED)
    lora = LoraConfig(r=LORA_RANK, lora_dropout=LORA_DROPOUT, revision=MODEL_REVISION)
    lora.lora_alpha = 2 * LORA_RANK if LORA_ALPHA is None else LORA_ALPHA
    lora.target_modules = lora_targets(model)
    return get_peft_model(model, lora).train()


def ds_config(steps):
    """DeepSpeed's configuration: ZeRO-2, AdamW, logarithmic warm-up, then a cosine (T13)."""
    adamw = {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
    adamw["torch_adam"] = True  # DeepSpeed's own would be compiled first
    warmup_steps = max(1, int(WARMUP_RATIO * steps))  # DeepSpeed refuses 0 (T14)
    cosine = {"total_num_steps": steps, "warmup_num_steps": warmup_steps, "cos_min_ratio": 0.01}
    zero = {"stage": 2, "overlap_comm": True, "reduce_scatter": True, "contiguous_gradients": True}
    buckets = {"allgather_bucket_size": int(2e8), "reduce_bucket_size": int(2e8)}
    return {
        "train_micro_batch_size_per_gpu": MICRO_BSIZE,
        "gradient_accumulation_steps": GRAD_ACC,
        "gradient_clipping": GRAD_CLIP,
        "bf16": {"enabled": compute_dtype() == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {"type": "WarmupCosineLR", "params": cosine},
        "zero_optimization": zero | buckets,
    }


# ------- saving: {CKPT_DIR}_logs/state/ exists, locked, while a run is unfinished
@torch.no_grad()
def save_merged(model, tokenizer, folder):
    """Write the base model with W + alpha / r * B @ A, added in float32, for every adapted W."""
    base = model.get_base_model()
    weights = {}
    for name, weight in base.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = weight.bfloat16()
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_A"):
            w = layer.base_layer.weight.float()
            a = layer.lora_A["default"].weight.float()
            b = layer.lora_B["default"].weight.float()
            weights[f"{name}.weight"] = (w + layer.scaling["default"] * b @ a).bfloat16().cpu()
    base.save_pretrained(folder, state_dict=weights)
    base.config.dtype = torch.bfloat16  # not that of the computation
    base.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(model, tokenizer, path, folder):
    """Rank 0 saves the merged model to `folder`, then renames it to `path`; others wait."""
    if dist.get_rank() == 0 and not os.path.exists(path):  # or a killed run saved it
        shutil.rmtree(folder, ignore_errors=True)  # what a kill left
        try:
            save_merged(model, tokenizer, folder)
            if SAVE_ADAPTER:
                model.save_pretrained(folder / "adapter", save_embedding_layers=False)
            os.sync()
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
        os.sync()
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
    except Exception as error:  # damaged files fail in many ways
        sys.exit(f"{state / tag} is damaged ({error!r:.200}); delete {state} to begin a new run")
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


def claim_run(run):
    """Lock the unfinished run, which must be the same `run`, or a new one; returns its suffix."""
    for suffix in ["", *(f"-v{number}" for number in range(2, 10**4))]:
        logs = Path(f"{CKPT_DIR}_logs{suffix}")
        taken = logs.exists() or glob(f"{CKPT_DIR}_step*[0-9]{suffix}")
        if (logs / "state").exists() or not taken:
            break
    (logs / "state").mkdir(parents=True, exist_ok=True)
    lock = os.open(logs / "state" / "lock", os.O_RDWR | os.O_CREAT)  # open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{logs} is in use by another process; wait, or set another CKPT_DIR")
    record = logs / "run_config.json"
    if not record.exists():
        if ABLATION:
            write_json(logs / "ablation_config.json", {name: run[name] for name in ABLATION})
        write_json(logs / "ds_zero2.json", ds_config(run["budget"]["steps"]))
        write_json(record, run)
    old = json.loads(record.read_text())
    differ = [key for key in old | run if old.get(key) != run.get(key) and key != "budget"]
    if differ:
        changes = ", ".join(f"{key} was {old.get(key)!r}, now {run.get(key)!r}" for key in differ)
        remedy = f"change this back, set another CKPT_DIR, or delete {logs}/state to start again"
        sys.exit(f"{logs} is an unfinished run with other settings: {changes}; {remedy}")
    return suffix


# ------- checks before training: all problems are reported together
def preflight(world_size):
    """Messages on everything that is wrong with data, model and disk; loads no weights."""
    problems = []
    try:
        examples = load_examples()
    except Exception as error:  # missing, damaged, or not a list of such rows
        problems.append(f"{DATA_PT = } is not what pt.py writes ({error!r:.200}); run pt.py")
    try:
        config = load_pretrained(AutoConfig)
        tokenizer = load_pretrained(AutoTokenizer, fix_mistral_regex=False)
        code = {"code_revision": MODEL_REVISION} if hasattr(config, "auto_map") else {}
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, **code)
    except Exception as error:  # the hub, a folder and remote code fail in many ways
        problems.append(f"{MODEL_NAME = } cannot be loaded ({error!r:.300}); give another")
    if not problems:
        problems = check_examples(examples, world_size, model, tokenizer) + check_model(model)
    return problems


def check_model(model):
    problems = []
    vocabulary = model.get_input_embeddings().num_embeddings
    mask_id = getattr(model.config, "mask_token_id", None)
    if mask_id not in (None, MASK_ID) or vocabulary <= MASK_ID:
        own = f"{MODEL_NAME} has {vocabulary} ids, its mask token is {mask_id or 'unknown'}"
        problems.append(f"{MASK_ID = }: {own}")
    if not (targets := lora_targets(model)):
        problems.append(f"{TARGET_MODS = }: no linear layer of {MODEL_NAME} has such a name")
    for target in TARGET_MODS:
        count = sum(f".{name}".endswith(f".{target}") for name in targets)
        print(f"LoRA on {count} layers {target}")
    if not deepspeed.get_accelerator().is_bf16_supported():
        problems.append("this GPU has no bf16; Ampere and later ones have it")
    folder = Path(CKPT_DIR).absolute()
    while not folder.exists():
        folder = folder.parent
    needed = 2 * model.num_parameters()  # bytes of a checkpoint
    if shutil.disk_usage(folder).free < needed:
        problems.append(f"{CKPT_DIR = }: a checkpoint takes {needed / 1e9:.1f} GB; free some space")
    return problems


def check_examples(examples, world_size, model, tokenizer):
    samples = sum(prompt_len < len(ids) for prompt_len, ids in examples)
    if samples < MICRO_BSIZE or len(plan(examples, world_size)[1]) == 0:
        step = f"{MICRO_BSIZE = } x {GRAD_ACC = } x {world_size} ranks"
        rows = f"{MAX_SAMPLES = } of {DATA_PT = } give {samples} rows with an answer"
        return [f"{rows}, too few for a step of {step}; use more rows, or lower these"]
    remedy = f"write it with pt.py --model {MODEL_NAME}"
    vocabulary = model.get_input_embeddings().num_embeddings
    if any(ids.max() >= vocabulary or MASK_ID in ids for _, ids in examples):
        return [f"{DATA_PT = } has {MASK_ID = } or ids beyond the model's {vocabulary}; {remedy}"]
    for _, ids in examples[:32]:  # another tokenizer brings back none of them
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tokenizer.encode(text, add_special_tokens=False) == ids.tolist():
            return []
    return [f"{DATA_PT = } was made with another tokenizer; {remedy}"]


# ------- main
def init_distributed():
    """Join the other ranks, or be the only one if no launcher has set the environment (T25)."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
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


def describe_run(examples, draws, numbers):
    """Everything that decides the result, and what the run amounts to, for run_config.json."""
    samples = sum(prompt_len < len(ids) for prompt_len, ids in examples)
    batches = (make_batch(examples, draws, n, 0) for n in numbers.reshape(-1, MICRO_BSIZE))
    return {
        "script": os.path.basename(__file__),
        **{name: globals()[name] for name in CONSTANTS},
        "dtype": str(compute_dtype()),
        "world_size": numbers.shape[2],
        "data_sha256": hashlib.sha256(Path(DATA_PT).read_bytes()).hexdigest(),
        "model_commit": getattr(load_pretrained(AutoConfig), "_commit_hash", None),
        "versions": {x: version(x) for x in "torch deepspeed transformers peft numpy".split()},
        "budget": {
            "samples": samples,
            "samples_without_answer": len(examples) - samples,  # never drawn (T11)
            "steps": len(numbers),
            "global_batch": numbers[0].size,
            "draws": numbers.size,
            "draws_left_out": len(draws) - numbers.size,
            "passes": round(numbers.size / samples, 2),
            "forward_tokens": numbers.size * MAX_LEN,
            "supervised_tokens": sum(int(loss_mask.sum()) for *_, loss_mask in batches),
        },
    }


def train_step(engine, examples, draws, micro_batches, pad_id):
    """One optimizer step; returns the loss, averaged over micro-batches and ranks (T2, T16)."""
    loss_sum = torch.zeros((), device=engine.device)
    for numbers in micro_batches:
        stream = np.random.default_rng((SEED, numbers[0], 2))  # not that of a draw's noise
        torch.manual_seed(int(stream.integers(2**63)))  # dropout
        loss = supervised_loss(engine, *make_batch(examples, draws, numbers, pad_id))
        engine.backward(loss)
        engine.step()  # updates the weights after the last micro-batch
        loss_sum += loss.detach()
    dist.all_reduce(loss_sum)
    return loss_sum.item() / (len(micro_batches) * dist.get_world_size())


def main():
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the others wait in init_distributed
        problems = preflight(world_size)
        if problems:
            sys.exit("\n".join(problems))
    init_distributed()
    rank = dist.get_rank()

    # Plan the run, and find its folders
    examples = load_examples()
    draws, numbers = plan(examples, world_size)
    steps = len(numbers)
    suffix = [None]
    if rank == 0:
        run = describe_run(examples, draws, numbers)
        suffix = [claim_run(run)]
        for name, number in run["budget"].items():
            print(f"{name:22} {number:,}")
    dist.broadcast_object_list(suffix)
    logs = Path(f"{CKPT_DIR}_logs{suffix[0]}")
    state = logs / "state"

    # Build the model, and restore the saved state if there is one
    tokenizer = load_pretrained(AutoTokenizer, fix_mistral_regex=False)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = build_model(deepspeed.get_accelerator().current_device_name())
    lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=lora, config=ds_config(steps))
    done = load_state(engine, state)
    if rank == 0:
        model.print_trainable_parameters()
        print(f"{logs}: resumes after step {done}" if done else f"{logs}: new run")
        log = open_log(logs / "train_loss.csv", done)

    # Train
    tokens = {"unit": " tokens", "unit_scale": numbers[0].size * MAX_LEN}
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=rank != 0, **tokens)
    for step in bar:
        lr = engine.get_lr()[0]
        loss = train_step(engine, examples, draws, numbers[step - 1, :, rank], pad_id)
        if not math.isfinite(loss) or not engine.was_step_applied():
            rows = draws[numbers[step - 1, :, rank].flatten(), 0].tolist()
            sys.exit(f"step {step}: loss {loss} or gradient not finite on rows {rows} of {DATA_PT}")
        if rank == 0:
            log.write(f"{step},{loss:.6f}\n")
            bar.set_postfix(step=f"{step}/{steps}", loss=f"{loss:.3f}", lr=f"{lr:.1e}")
        if step == steps or (SAVE_EVERY and step % SAVE_EVERY == 0):
            path = f"{CKPT_DIR}_step{step:04d}{suffix[0]}"
            save_checkpoint(model, tokenizer, path, state / "checkpoint")
        if STATE_EVERY and step % STATE_EVERY == 0 and step < steps:
            save_state(engine, state, step)

    if rank == 0:
        os.rename(state, logs / "finished")  # in one go
        shutil.rmtree(logs / "finished")
        print(f"wrote {path} and {logs}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit(f"out of memory; set ACTIVATION_CHECKPOINTING, or halve {MICRO_BSIZE = }")
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"stopped: {type(error).__name__} {error}; repeat the command to resume")
