"""Blockwise SFT of a masked diffusion LM: train the very state that block decoding meets.

    deepspeed --num_gpus 8 train_blockwise.py                      # eight GPUs; `python` instead: one process
    deepspeed --num_gpus 8 train_blockwise.py --BLOCK_SIZE 64      # any constant below, for one run

Each draw picks one block of one answer: clean text before it, [MASK] behind it, and in it every token masked with
probability t ~ U(MASK_PROB_EPS, 1). The loss is the cross-entropy of the block's masked tokens (Sun, Cai, Yang, Wang,
"Blockwise SFT for Diffusion Language Models", arXiv 2508.19529). `diff` with train_fullseq.py shows the method alone.
Shapes: B micro-batch, L MAX_LEN, V vocabulary, M supervised positions, N draws of the run.
"""

import ast
import hashlib
import json
import os
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path

import deepspeed
import numpy as np
import peft
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

# Model and data
MODEL_NAME = "GSAI-ML/LLaDA-8B-Instruct"  # hub id or local folder
MASK_ID = 126336  # LLaDA's <|mdm_mask|>
PT_FILE = "MathQA_256.pt"  # written by pt.py
MAX_SAMPLES = 200 * 32  # rows of PT_FILE, from its beginning
MAX_LEN = 256  # tokens; shorter rows are padded, longer ones cut
SEED = 42
# Method
BLOCK_SIZE = 32  # tokens
PREFIX_MASK_RATE = 0.0  # share of the answer before the block shown as [MASK], never in the loss
SUFFIX_MASK_PROB = 1.0  # the same for the answer behind the block
MASK_PROB_EPS = 1e-3  # lowest t
MASK_PADDING = False  # True shows [MASK] instead of padding, as decoding does
# Training
EPOCHS = 1
MICRO_BSIZE = 32  # rows per GPU and forward
GRAD_ACC = 1  # forwards per optimizer step
TOTAL_TRAIN_STEPS = None  # None = MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC), on any number of GPUs
LR = 1e-5  # highest, after WARMUP_RATIO of the steps
WARMUP_RATIO = 0.1
GRAD_CLIP = 1.0  # 0 = off
LORA_RANK = 256
LORA_ALPHA = None  # None = 2 * LORA_RANK
LORA_DROPOUT = 0.05
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj"]  # linear layers by the end of their names
CKPT_DIR = "ckpts_stagewise_sft_32"  # prefix of {CKPT_DIR}_stepXXXX/ and {CKPT_DIR}_logs/
SAVE_EVERY = None  # steps; None = at the end only; the last step is always saved

CONSTANTS = [name for name in globals() if name.isupper()]
ABLATION = ["PREFIX_MASK_RATE", "SUFFIX_MASK_PROB", "BLOCK_SIZE"]  # go into ablation_config.json
OPTIONAL = ["TOTAL_TRAIN_STEPS", "SAVE_EVERY", "LORA_ALPHA"]  # may be None
RANGES = [  # type, lowest, highest, constants
    (str, None, None, "MODEL_NAME PT_FILE CKPT_DIR"),
    (list, None, None, "LORA_TARGETS"),
    (bool, False, True, "MASK_PADDING"),
    (int, 0, 2**32 - 1, "SEED MASK_ID"),
    (int, 1, 1e6, "MAX_SAMPLES MAX_LEN EPOCHS MICRO_BSIZE GRAD_ACC TOTAL_TRAIN_STEPS SAVE_EVERY LORA_RANK BLOCK_SIZE"),
    (float, 0, 1, "LR WARMUP_RATIO LORA_DROPOUT MASK_PROB_EPS PREFIX_MASK_RATE SUFFIX_MASK_PROB"),
    (float, 0, 1e6, "GRAD_CLIP LORA_ALPHA"),
]


def load_examples():
    """The first MAX_SAMPLES rows of PT_FILE as [(prompt_len, ids)], ids cut to MAX_LEN; and how many had no answer."""
    wrong = lambda why: ValueError(f"{PT_FILE = }: {why}; make it with pt.py")
    try:
        rows = torch.load(PT_FILE, weights_only=True)  # a pickle with code is refused
    except Exception as error:
        raise wrong("damaged, or not written by pt.py" if os.path.isfile(PT_FILE) else "no such file") from error
    if not isinstance(rows, list) or not rows:
        raise wrong(f"must be a list of rows and is {rows!r:.40}")
    for number, row in enumerate(rows):
        prompt_len, ids = (row.get("prompt_len"), row.get("full_ids")) if isinstance(row, dict) else (None, None)
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.long or ids.dim() != 1 or (ids < 0).any():
            raise wrong(f"row {number} has full_ids {ids!r:.60}, which is no one-dimensional LongTensor of ids")
        if type(prompt_len) is not int or not 0 < prompt_len <= len(ids):
            raise wrong(f"row {number} has prompt_len {prompt_len!r} of {len(ids)} ids")
    cut = [(row["prompt_len"], row["full_ids"][:MAX_LEN]) for row in rows[:MAX_SAMPLES]]
    examples = [(prompt_len, ids) for prompt_len, ids in cut if prompt_len < len(ids)]  # (T11) by both methods
    return examples, len(cut) - len(examples)


def schedule(examples, max_draws):
    """Which sample and which of its blocks each draw of the run trains; (N, 2) with N <= max_draws.

    Pass after pass, every sample that has blocks left is visited once, in a new order, and one of these blocks is
    drawn uniformly. Each (sample, block) is drawn at most once (T9); when all are used, the list ends.
    """
    rng = np.random.default_rng((SEED, 0, 1))  # a stream that no draw's noise has
    blocks = [rng.permutation(-(-(len(ids) - prompt_len) // BLOCK_SIZE)) for prompt_len, ids in examples]
    draws = []
    for visit in range(max(map(len, blocks))):
        left = [sample for sample, order in enumerate(blocks) if visit < len(order)]
        draws += [(sample, blocks[sample][visit]) for sample in rng.permutation(left)]
    return np.array(draws[:max_draws])


def plan(examples, dropped, world_size):
    """The run: draws (N, 2), their numbers by (step, GRAD_ACC, rank, MICRO_BSIZE), and its budget."""
    # Differs from the published script (T1, T3): all steps are taken on any number of GPUs, by every rank alike
    global_batch = MICRO_BSIZE * GRAD_ACC * world_size
    max_steps = TOTAL_TRAIN_STEPS or MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC)
    draws = schedule(examples, max_steps * global_batch)
    steps, left_out = divmod(len(draws), global_batch)
    draws = draws[: steps * global_batch]
    budget = {"samples": len(examples), "samples without an answer": dropped, "passes": len(draws) / len(examples)}
    budget |= {"steps": steps, "global batch": global_batch, "draws": len(draws), "draws left out": left_out}
    budget["forward tokens"] = len(draws) * MAX_LEN
    return draws, np.arange(len(draws)).reshape(steps, GRAD_ACC, world_size, MICRO_BSIZE), budget


def make_batch(examples, draws, numbers, pad_id):
    """The draws `numbers` as input_ids, noisy_ids and loss_mask, each (B, L)."""
    picked = [(*examples[draws[number][0]], draws[number][1]) for number in numbers]
    input_ids = torch.stack([pad(ids, (0, MAX_LEN - len(ids)), value=pad_id) for _, ids, _ in picked])
    fields = torch.tensor([(prompt_len, len(ids), block) for prompt_len, ids, block in picked]).T[..., None]
    # Differs from the published script (T4): the noise of a draw is a function of SEED and its number alone
    noise = [np.random.default_rng((SEED, number)).random(MAX_LEN + 1, dtype=np.float32) for number in numbers]
    return input_ids, *corrupt(input_ids, *fields, torch.from_numpy(np.stack(noise)))


def corrupt(input_ids, prompt_len, length, block, noise):
    """Show the state that decoding meets in `block`: clean before it, masked at rate t inside, hidden behind.

    From input_ids (B, L), the (B, 1) prompt_len, length and block, and noise (B, 1 + L) uniform on [0, 1) to
    noisy_ids (B, L) and loss_mask (B, L), True = supervised: the masked tokens of the active block.
    """
    pos = torch.arange(input_ids.shape[1])  # (L,)
    t = MASK_PROB_EPS + (1 - MASK_PROB_EPS) * noise[:, :1]  # (B, 1)
    first = prompt_len + block * BLOCK_SIZE  # (B, 1)
    answer = (prompt_len <= pos) & (pos < length)  # (B, L)
    prefix = answer & (pos < first)
    suffix = answer & (first + BLOCK_SIZE <= pos)
    active = answer & ~prefix & ~suffix
    p_mask = PREFIX_MASK_RATE * prefix + t * active + SUFFIX_MASK_PROB * suffix + MASK_PADDING * (length <= pos)
    masked = noise[:, 1:] < p_mask  # True = shown as [MASK]
    return input_ids.masked_fill(masked, MASK_ID), masked & active


def supervised_loss(model, input_ids, noisy_ids, loss_mask):
    """Mean over rows of the mean cross-entropy over the row's masked positions; a row without any counts as 0.

    With t ~ U(0, 1) over n tokens this is the 1/t-weighted bound divided by n + 1, so there is no weight 1/t. A hook
    drops all other positions on their way into the head. input_ids, noisy_ids, loss_mask: (B, L).
    """
    select = lambda _, inputs: (inputs[0][loss_mask],) if inputs[0].is_floating_point() else None
    with model.get_output_embeddings().register_forward_pre_hook(select):
        logits = model(input_ids=noisy_ids).logits
    logits = logits[loss_mask] if logits.dim() == 3 else logits  # a head tied to the embedding bypasses the hook
    nll = cross_entropy(logits.float(), input_ids[loss_mask], reduction="none")  # (M,)
    row = loss_mask.nonzero()[:, 0]  # (M,)
    return (nll / loss_mask.sum(1)[row]).sum() / len(input_ids)


def match_targets(model):
    """The linear layers that each of LORA_TARGETS matches, {target: [names]}; never the LM head."""
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in LORA_TARGETS}


def build_model(device):
    """The base model in bf16, loaded straight to `device`, with the same new adapter on every rank."""
    load = {"trust_remote_code": True, "dtype": torch.bfloat16, "device_map": {"": device}, "output_loading_info": True}
    model, loaded = AutoModelForCausalLM.from_pretrained(MODEL_NAME, **load)
    if missing := sorted(loaded["missing_keys"]):
        sys.exit(f"{MODEL_NAME = }: {len(missing)} weights are missing, such as {missing[0]}; complete it")
    targets = [name for names in match_targets(model).values() for name in names]
    alpha = 2 * LORA_RANK if LORA_ALPHA is None else LORA_ALPHA
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(r=LORA_RANK, lora_alpha=alpha, lora_dropout=LORA_DROPOUT, target_modules=targets)
    return peft.get_peft_model(model, lora)


def ds_config(steps):
    """DeepSpeed's configuration: ZeRO-2, bf16, AdamW, logarithmic warm-up and cosine decay over `steps`."""
    warmup = max(1, int(WARMUP_RATIO * steps))  # Differs from the published script (T14): 0 is refused
    buckets = {"allgather_bucket_size": int(2e8), "reduce_bucket_size": int(2e8), "contiguous_gradients": True}
    adamw = {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}  # not compiled
    cosine = {"total_num_steps": steps, "warmup_num_steps": warmup, "cos_min_ratio": 0.01}
    return {
        "train_micro_batch_size_per_gpu": MICRO_BSIZE,
        "gradient_accumulation_steps": GRAD_ACC,
        "gradient_clipping": GRAD_CLIP,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_scatter": True, **buckets},
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {"type": "WarmupCosineLR", "params": cosine},
    }


@torch.no_grad()
def merge(model):
    """The PeftModel's base weights on the host, adapted ones as W + alpha / r * B A, summed in float32 per layer."""
    base = model.get_base_model()
    merged = {n.replace(".base_layer.", "."): w.cpu() for n, w in base.state_dict().items() if ".lora_" not in n}
    for name, layer in base.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
            weight = layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)
            merged[f"{name}.weight"] = weight.to(layer.base_layer.weight.dtype).cpu()
    return merged


def unused(path):  # or the first of path-v2, path-v3, ... that does not exist
    names = (path if number == 1 else f"{path}-v{number}" for number in range(1, 10**6))
    return next(name for name in names if not os.path.exists(name))


def save_checkpoint(model, tokenizer, path):
    """Write the merged model and its tokenizer to the folder `path`, which appears only when whole; "" or why not."""
    partial = unused(f"{path}.partial")
    try:
        model.get_base_model().save_pretrained(partial, state_dict=merge(model), max_shard_size="5GB")
        tokenizer.save_pretrained(partial)
        os.rename(partial, path)
        return ""
    except (OSError, SafetensorError) as error:
        return f"{path} cannot be written ({error!r:.300}); free some space or give another CKPT_DIR"
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_overrides(argv):
    """Set the constants given as `--NAME VALUE`, lists as a,b; returns messages about what is wrong with them."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--local_rank", help="given by the launcher")
    for name in CONSTANTS:
        parser.add_argument(f"--{name}", nargs="?", const="", help=f"now {globals()[name]}".replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    for name in CONSTANTS:
        if (text := getattr(given, name)) is not None:
            read = {str: str, list: lambda text: text.split(",")}.get(type(globals()[name]), ast.literal_eval)
            try:
                globals()[name] = read(text)
            except (ValueError, SyntaxError, TypeError):
                globals()[name] = text  # of the wrong type, as check_constants will say
    return [f"{word}: no constant of this script; --help lists them" for word in unknown] + list(check_constants())


def check_constants():
    """Yields a message for every constant of the wrong type or out of its range."""
    for kind, low, high, names in RANGES:
        for name in names.split():
            value, limits = globals()[name], "not empty" if low is None else f"{low} to {high}"
            fits_kind = type(value) is kind or (kind is float and type(value) is int)
            left_open = value is None and name in OPTIONAL
            if not left_open and not (fits_kind and (value if low is None else low <= value <= high)):
                yield f"{name} = {value!r}: must be {kind.__name__}, {limits}{' or None' if name in OPTIONAL else ''}"


def check_model(model, tokenizer, examples):
    """Yields where the model (without weights), its tokenizer, the constants and the examples do not fit together."""
    name, remake = f"{MODEL_NAME = }", f"make it with pt.py --model {MODEL_NAME}"
    if os.path.isdir(MODEL_NAME) and not any(f.endswith((".safetensors", ".bin")) for f in os.listdir(MODEL_NAME)):
        yield f"{name}: the folder has no weights (*.safetensors); complete it"
    mask_id, vocabulary = getattr(model.config, "mask_token_id", None), model.get_input_embeddings().num_embeddings
    if mask_id not in (None, MASK_ID) or vocabulary <= MASK_ID:
        yield f"{MASK_ID = }: {name} has {vocabulary} ids, its mask token is {mask_id or 'unknown'}"
    matched = match_targets(model)
    for target, layers in matched.items():
        print(f"LoRA: {len(layers)} layers {target}" if layers else f"warning: no layer of LORA_TARGETS is {target}")
    if not any(matched.values()):
        yield f"{LORA_TARGETS = }: none matches a linear layer of {name}; give other names"
    beyond = any(MASK_ID in ids or ids.max() >= vocabulary for _, ids in examples)
    if beyond:
        yield f"{PT_FILE = } has rows with {MASK_ID = }, or with ids beyond the {vocabulary} of {name}; {remake}"
    known = [ids.tolist() for _, ids in examples[: 0 if beyond else 32]]
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in known]
    again = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if known and all(before != after for before, after in zip(known, again, strict=True)):
        yield f"{PT_FILE = } was made with another tokenizer than that of {name}; {remake}"


def check_run(examples, world_size, checkpoint_bytes):
    """Yields why the run cannot be done, or not be saved."""
    steps = plan(examples, 0, world_size)[2]["steps"] if len(examples) >= MICRO_BSIZE else 0
    if steps == 0:
        sizes = f"{MICRO_BSIZE = }, {GRAD_ACC = }, {MAX_SAMPLES = }, {MAX_LEN = }, {world_size} ranks"
        yield f"{PT_FILE = } has {len(examples)} rows with an answer, too few for one step; lower some of {sizes}"
    needed = checkpoint_bytes * (1 if SAVE_EVERY is None else -(-steps // SAVE_EVERY))
    folder = next(folder for folder in Path(f"{CKPT_DIR}_logs").absolute().parents if os.path.lexists(folder))
    writable = folder.is_dir() and all(os.access(place, os.W_OK) for place in (folder, "."))
    if not writable or shutil.disk_usage(folder).free < needed:
        yield f"{CKPT_DIR = }: {folder} and . must be writable folders, with {needed / 1e9:.2f} GB free"


def preflight(world_size):
    """Yields what is wrong, one message each, all of it found before the weights are loaded."""
    try:
        examples, _ = load_examples()
    except ValueError as error:
        yield str(error)
        examples = None
    if not deepspeed.get_accelerator().is_bf16_supported():
        yield f"{deepspeed.get_accelerator().device_name()} has no bf16, which training needs; use another"
    try:
        config = AutoConfig.from_pretrained(MODEL_NAME, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(MODEL_NAME, trust_remote_code=True, fix_mistral_regex=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        yield f"{MODEL_NAME = } cannot be loaded ({error!r:.300}); give a hub id or a model folder"
        return
    yield from check_model(model, tokenizer, examples or [])
    if examples is not None:
        yield from check_run(examples, world_size, 2 * model.num_parameters())


def start_records(examples, draws, budget, pad_id, world_size):
    """Print the budget, write ds_zero2.json and the log folder's JSON files; returns the name of the new log folder."""
    parts = np.array_split(range(len(draws)), budget["steps"])
    budget["supervised tokens"] = sum(int(make_batch(examples, draws, part, pad_id)[2].sum()) for part in parts)
    print(", ".join(f"{round(number, 2):,} {name}" for name, number in budget.items()))
    if budget["steps"] < 3:  # (T14)
        print("warning: the first two steps have learning rate 0, so this run trains nothing")
    os.makedirs(logs := unused(f"{CKPT_DIR}_logs"))
    run = {"constants": {name: globals()[name] for name in CONSTANTS}, "budget": budget, "world_size": world_size}
    run["versions"] = {lib: version(lib) for lib in ("torch", "deepspeed", "transformers", "peft", "numpy")}
    run["pt_sha256"] = hashlib.sha256(Path(PT_FILE).read_bytes()).hexdigest()
    files = {"ds_zero2.json": ds_config(budget["steps"]), f"{logs}/run_config.json": run}
    if ABLATION:
        files[f"{logs}/ablation_config.json"] = {name: globals()[name] for name in ABLATION}
    for path, content in files.items():
        Path(f"{path}.partial").write_text(json.dumps(content, indent=2) + "\n")
        os.replace(f"{path}.partial", path)
    return logs


def main():
    problems = read_overrides(sys.argv[1:])
    if "RANK" not in os.environ:  # no launcher, one process
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if local_rank == 0 and (problems := problems or list(preflight(world_size))):
        sys.exit("\n".join(problems))
    deepspeed.utils.logger.setLevel("ERROR")
    if rank != 0:
        logging.disable_progress_bar()
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # CPU ranks talk through gloo, nothing is compiled
    deepspeed.init_distributed()  # the other ranks wait here
    deepspeed.get_accelerator().set_device(local_rank)
    device = torch.device(deepspeed.get_accelerator().device_name(local_rank))
    examples, dropped = load_examples()
    draws, numbers, budget = plan(examples, dropped, world_size)
    steps = budget["steps"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_NAME, trust_remote_code=True, fix_mistral_regex=False)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = build_model(device)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    budget["trained parameters"] = sum(parameter.numel() for parameter in adapter)
    engine, *_ = deepspeed.initialize(model=model.train(), model_parameters=adapter, config=ds_config(steps))
    torch.manual_seed(SEED + rank)  # of dropout, the one thing that depends on the number of ranks
    logs = start_records(examples, draws, budget, pad_id, world_size) if rank == 0 else ""
    log = open(f"{logs}/train_loss.csv" if rank == 0 else os.devnull, "w", buffering=1)  # noqa: SIM115 (until the end)
    log.write("step,loss\n")
    tokens = numbers[0].size * MAX_LEN  # of a step
    for step in (bar := tqdm(range(1, steps + 1), unit=" tokens", unit_scale=tokens, disable=rank != 0)):
        loss_sum = torch.zeros((), device=device)
        for micro_batch in numbers[step - 1, :, rank]:
            batch = [tensor.to(device) for tensor in make_batch(examples, draws, micro_batch, pad_id)]
            loss = supervised_loss(engine, *batch)
            engine.backward(loss)
            lr = engine.get_lr()[0]
            engine.step()
            loss_sum += loss.detach() / (GRAD_ACC * world_size)
        deepspeed.comm.all_reduce(loss_sum)  # (T16) the mean over micro-batches and ranks
        log.write(f"{step},{loss_sum.item():.6f}\n")
        bar.set_postfix(step=f"{step}/{steps}", loss=f"{loss_sum.item():.3f}", lr=f"{lr:.1e}")
        if step == steps or (SAVE_EVERY and step % SAVE_EVERY == 0):
            path = unused(f"{CKPT_DIR}_step{step:04d}" + logs.removeprefix(f"{CKPT_DIR}_logs"))
            problem = save_checkpoint(model, tokenizer, path) if rank == 0 else ""
            deepspeed.comm.all_reduce(failed := torch.tensor(len(problem), device=device))  # the others wait here
            if failed:
                sys.exit(problem or 1)
    if rank == 0:
        print(f"{steps} steps, {budget['supervised tokens']:,} supervised tokens; saved {path}, logged to {logs}")
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit(f"out of GPU memory with {MICRO_BSIZE = }; halve it and double GRAD_ACC")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C" if os.environ.get("RANK", "0") == "0" else 1)
    except (OSError, SafetensorError, torch.distributed.DistError) as error:
        sys.exit(f"stopped: {error!r:.300}")
