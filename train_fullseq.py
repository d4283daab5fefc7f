"""Classical, full-sequence SFT of a masked diffusion LM: the twin of train_blockwise.py.

    deepspeed --num_gpus 8 train_fullseq.py --SEED 43      # any constant below, for one run; or `python`

Each draw masks every token of one answer with rate t ~ U(MASK_PROB_EPS, 1). The loss is the cross-entropy of the masked
tokens (Nie et al., "Large Language Diffusion Models", arXiv 2502.09992), averaged as in Blockwise SFT, whose baseline
it is (Sun, Cai, Yang, Wang, arXiv 2508.19529). `diff` with train_blockwise.py shows the method alone.
B rows, L MAX_LEN, V vocabulary, M supervised positions, N draws.
"""

import ast
import fcntl
import hashlib
import json
import os
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from glob import escape, glob
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

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
MODEL_REVISION = (
    "main"  # of a hub model and its code, which is run: branch, tag or, to pin both, commit
)
MASK_ID = 126336  # LLaDA's <|mdm_mask|>
PT_FILE = "MathQA_256.pt"  # written by pt.py
MAX_SAMPLES = 300 * 32  # rows of PT_FILE, from its beginning
MAX_LEN = 256  # tokens; shorter rows are padded, longer ones cut
SEED = 42
# Method
MASK_PROB_EPS = 1e-3  # lowest t
MASK_PADDING = False  # True shows [MASK] instead of padding, as decoding does
# Training
EPOCHS = 1
MICRO_BSIZE = 32  # rows per GPU and forward
GRAD_ACC = 1  # forwards per optimizer step
TOTAL_TRAIN_STEPS = (
    None  # None = MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC), on any number of GPUs
)
LR = 1e-5  # highest, after WARMUP_RATIO of the steps
WARMUP_RATIO = 0.1
GRAD_CLIP = 1.0  # 0 = off
LORA_RANK = 256
LORA_ALPHA = None  # None = 2 * LORA_RANK
LORA_DROPOUT = 0.05
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj"]  # linear layers by the end of their names
COMPILE = None  # blocks and loss: fewer seconds and bytes a step, a minute at the start; None = on a GPU with gcc
ACTIVATION_CHECKPOINTING = False  # True takes a fraction of the memory, and a third more time
CKPT_DIR = (
    "ckpts_fullseq_sft"  # prefix of {CKPT_DIR}_stepXXXX/, {CKPT_DIR}_logs/ and {CKPT_DIR}_state/
)
SAVE_EVERY = None  # steps; None = at the end only; the last step is always saved
STATE_EVERY = 50  # steps between saved states, the most that a killed run loses; None = saves none

CONSTANTS = [name for name in globals() if name.isupper()]
ABLATION = []  # go into ablation_config.json
RANGES = [  # type, lowest, highest, constants
    (str, None, None, "MODEL_NAME MODEL_REVISION PT_FILE CKPT_DIR"),
    (list, None, None, "LORA_TARGETS"),
    (bool, False, True, "MASK_PADDING ACTIVATION_CHECKPOINTING"),
    (bool | None, False, True, "COMPILE"),
    (int, 0, 2**32 - 1, "SEED MASK_ID"),
    (int, 1, 1e6, "MAX_SAMPLES MAX_LEN EPOCHS MICRO_BSIZE GRAD_ACC LORA_RANK"),
    (int | None, 1, 1e6, "TOTAL_TRAIN_STEPS SAVE_EVERY STATE_EVERY"),
    (int | float, 0, 1, "LR WARMUP_RATIO LORA_DROPOUT MASK_PROB_EPS"),
    (int | float, 0, 1e6, "GRAD_CLIP"),
    (int | float | None, 0, 1e6, "LORA_ALPHA"),
]


def load_examples():
    """The first MAX_SAMPLES rows of PT_FILE as [(prompt_len, ids)], ids cut to MAX_LEN."""
    wrong = lambda why: ValueError(f"{PT_FILE = }: {why}; make it with pt.py")
    try:
        rows = torch.load(PT_FILE, weights_only=True)  # a pickle with code is refused
    except Exception as error:
        raise wrong(
            "damaged, or not written by pt.py" if os.path.isfile(PT_FILE) else "no such file"
        ) from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        prompt_len, ids = (
            (row.get("prompt_len"), row.get("full_ids")) if isinstance(row, dict) else (None, None)
        )
        if (
            not isinstance(ids, torch.Tensor)
            or ids.dtype != torch.long
            or ids.dim() != 1
            or (ids < 0).any()
        ):
            raise wrong(
                f"row {number} has full_ids {ids!r:.60}, which is no one-dimensional LongTensor of ids"
            )
        if type(prompt_len) is not int or not 0 < prompt_len <= len(ids):
            raise wrong(f"row {number} has prompt_len {prompt_len!r} of {len(ids)} ids")
    return [(row["prompt_len"], row["full_ids"][:MAX_LEN]) for row in rows[:MAX_SAMPLES]]


def schedule(examples, max_draws):
    """Which sample each draw of the run trains, and 0, its only block: (max_draws, 2). Pass after pass, every sample
    with an answer comes once, in a new order."""
    rng = np.random.default_rng((SEED, 0, 1))  # a stream that no draw's noise has
    answered = [
        sample for sample, (prompt_len, ids) in enumerate(examples) if prompt_len < len(ids)
    ]
    passes = max(1, -(-max_draws // len(answered)))
    samples = np.concatenate([rng.permutation(answered) for _ in range(passes)])[:max_draws]
    return np.stack([samples, np.zeros_like(samples)], axis=1)


def plan(examples, world_size):
    """The run: draws (N, 2), their numbers by (step, GRAD_ACC, rank, MICRO_BSIZE), and its budget."""
    global_batch = (
        MICRO_BSIZE * GRAD_ACC * world_size
    )  # Differs from the published script (T1, T3): of all ranks
    max_steps = TOTAL_TRAIN_STEPS or MAX_SAMPLES * EPOCHS // (MICRO_BSIZE * GRAD_ACC)
    samples = sum(
        prompt_len < len(ids) for prompt_len, ids in examples
    )  # (T11) the others are never drawn
    draws = schedule(examples, max_steps * global_batch) if samples >= MICRO_BSIZE else []
    steps, left_out = divmod(len(draws), global_batch)
    if steps == 0:
        sizes = (
            f"{MICRO_BSIZE = }, {GRAD_ACC = }, {MAX_SAMPLES = }, {MAX_LEN = }, {world_size} ranks"
        )
        raise ValueError(
            f"{PT_FILE = } has {samples} rows with an answer, too few for one step; lower some of {sizes}"
        )
    draws = draws[: steps * global_batch]
    budget = {
        "samples": samples,
        "samples without an answer": len(examples) - samples,
        "passes": len(draws) / samples,
    }
    budget |= {
        "steps": steps,
        "global batch": global_batch,
        "draws": len(draws),
        "draws left out": left_out,
    }
    return draws, np.arange(len(draws)).reshape(steps, GRAD_ACC, world_size, MICRO_BSIZE), budget


def make_batch(examples, draws, numbers, pad_id):
    """The draws `numbers` as input_ids, noisy_ids and loss_mask, each (B, L)."""
    picked = [(*examples[draws[number][0]], draws[number][1]) for number in numbers]
    input_ids = torch.stack(
        [pad(ids, (0, MAX_LEN - len(ids)), value=pad_id) for _, ids, _ in picked]
    )
    fields = torch.tensor([(prompt_len, len(ids), block) for prompt_len, ids, block in picked]).T[
        ..., None
    ]
    noise = np.stack(
        [np.random.default_rng((SEED, n)).random(MAX_LEN + 1, dtype=np.float32) for n in numbers]
    )
    return input_ids, *corrupt(
        input_ids, *fields, torch.from_numpy(noise)
    )  # (T4) f(SEED, number), whatever the ranks


def corrupt(input_ids, prompt_len, length, block, noise):
    """Show the answer masked at rate t, every token alike. (B, L) input_ids, (B, 1) prompt_len, length, block (0),
    (B, 1 + L) noise ~ U(0, 1) -> (B, L) noisy_ids, loss_mask (True = supervised)."""
    pos = torch.arange(input_ids.shape[1])  # (L,)
    t = MASK_PROB_EPS + (1 - MASK_PROB_EPS) * noise[:, :1]  # (B, 1)
    answer = (prompt_len <= pos) & (pos < length)  # (B, L)
    p_mask = t * answer + MASK_PADDING * (length <= pos)
    masked = noise[:, 1:] < p_mask  # True = shown as [MASK]
    return input_ids.masked_fill(masked, MASK_ID), masked & answer


def tuned(
    part, device
):  # as COMPILE and ACTIVATION_CHECKPOINTING have it run there; it computes the same
    fast = (
        torch.compile(part)
        if COMPILE or (COMPILE is None and device != "cpu" and shutil.which("gcc"))
        else part
    )
    lean = lambda *inputs, **options: torch.utils.checkpoint.checkpoint(
        fast, *inputs, use_reentrant=False, **options
    )
    return lean if ACTIVATION_CHECKPOINTING else fast


def supervised_loss(model, input_ids, noisy_ids, loss_mask):
    """Mean over rows of the mean cross-entropy of the row's masked positions, 0 for a row without any: for n tokens and
    t ~ U(0, 1) the 1/t-weighted bound over n + 1. All (B, L), on the host; a hook drops the others at the head."""
    head, (row, pos) = model.get_output_embeddings(), loss_mask.nonzero(as_tuple=True)  # (M,) each
    row, pos, labels, count = (
        x.to(head.weight.device) for x in (row, pos, input_ids[row, pos], loss_mask.sum(1)[row])
    )
    with head.register_forward_pre_hook(
        lambda _, x: (x[0][row, pos],) if x[0].is_floating_point() else None
    ):
        logits = model(input_ids=noisy_ids.to(row.device)).logits
    logits = (
        logits[row, pos] if logits.dim() == 3 else logits
    )  # a head tied to the embedding bypasses the hook
    token_nll = tuned(
        lambda logits, labels: cross_entropy(logits.float(), labels, reduction="none"),
        str(row.device),
    )
    nll = torch.cat(
        [*map(token_nll, logits.split(32), labels.split(32))]
    )  # (M,), in pieces: faster on a CPU
    return (nll / count).sum() / len(input_ids)


def fetch(auto_class, **options):  # of the model; its code comes from the same revision
    return auto_class.from_pretrained(
        MODEL_NAME, revision=MODEL_REVISION, trust_remote_code=True, **options
    )


def match_targets(model):
    """The names of the linear layers that LORA_TARGETS match, never of the LM head."""
    head, ends = model.get_output_embeddings(), tuple(f".{target}" for target in LORA_TARGETS)
    return [
        n
        for n, m in model.named_modules()
        if type(m) is torch.nn.Linear and m != head and f".{n}".endswith(ends)
    ]


def build_model(device):
    """The base model in bf16, loaded straight to `device`, with the same new adapter on every rank."""
    model, loaded = fetch(
        AutoModelForCausalLM,
        dtype=torch.bfloat16,
        device_map={"": device},
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):
        sys.exit(
            f"{MODEL_NAME = }: {len(missing)} weights are missing, such as {missing[0]}; complete it"
        )
    alpha, targets = 2 * LORA_RANK if LORA_ALPHA is None else LORA_ALPHA, match_targets(model)
    torch.manual_seed(SEED)
    lora = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=alpha, lora_dropout=LORA_DROPOUT, target_modules=targets
    )
    for block in next(
        (part for part in model.modules() if isinstance(part, torch.nn.ModuleList)), []
    ):
        block.forward = tuned(block.forward, device)
    return peft.get_peft_model(model, lora)


def ds_config(steps):
    """DeepSpeed's configuration: ZeRO-2, bf16, AdamW, logarithmic warm-up (of 0 steps it is refused, T14), cosine."""
    rows = {"train_micro_batch_size_per_gpu": MICRO_BSIZE, "gradient_accumulation_steps": GRAD_ACC}
    zero = {
        "stage": 2,
        "overlap_comm": True,
        "allgather_bucket_size": int(2e8),
        "reduce_bucket_size": int(2e8),
    }
    zero |= {"reduce_scatter": True, "contiguous_gradients": True}
    adamw = {
        "lr": LR,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "torch_adam": True,
    }  # not compiled
    cosine = {
        "total_num_steps": steps,
        "warmup_num_steps": max(1, int(WARMUP_RATIO * steps)),
        "cos_min_ratio": 0.01,
    }
    parts = {
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {"type": "WarmupCosineLR", "params": cosine},
    }
    return (
        rows
        | parts
        | {"gradient_clipping": GRAD_CLIP, "bf16": {"enabled": True}, "zero_optimization": zero}
    )


@torch.no_grad()
def save_merged(model, tokenizer, path):
    """Write the PeftModel's base, adapted weights as W + alpha / r * B A summed in float32, to the folder `path`."""
    base = model.get_base_model()
    merged = {
        n.replace(".base_layer.", "."): w for n, w in base.state_dict().items() if ".lora_" not in n
    }
    for name, layer in base.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            w, a, b = (
                x.weight.float()
                for x in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
            )
            merged[f"{name}.weight"] = (
                torch.addmm(w, b, a, alpha=layer.scaling["default"]).bfloat16().cpu()
            )
    base.save_pretrained(path, state_dict=merged, max_shard_size="5GB")
    tokenizer.save_pretrained(path)


def save(path, needed, write):
    """Let every rank `write` to {CKPT_DIR}_state/partial, which becomes `path` when whole. OSError if that fails."""
    partial, rank = f"{CKPT_DIR}_state/partial", deepspeed.comm.get_rank()
    try:
        if (
            rank == 0
            and not os.path.exists(path)
            and shutil.disk_usage(f"{CKPT_DIR}_state").free < needed
        ):
            raise OSError(f"{needed / 1e9:.2f} GB are not free")
        write(partial)
        os.sync()
    except Exception as error:  # the disk, torch and safetensors fail in many ways
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{path} cannot be saved: {error!r:.300}") from error
    deepspeed.comm.barrier()
    if rank == 0 and os.path.exists(partial):
        os.rename(partial, path)


def save_state(engine, step, csv):
    """Save all that going on after `step` takes, but for the frozen weights, and remove the state before it."""
    needed = 14 * engine.module.num_parameters(
        only_trainable=True
    )  # bf16; float32, twice more for its moments
    if not os.path.exists(path := f"{CKPT_DIR}_state/step{step:04d}"):
        save(
            path,
            needed,
            lambda partial: engine.save_checkpoint(
                *os.path.split(partial), {"csv": csv}, False, True
            ),
        )
    for other in (
        set(glob(f"{escape(CKPT_DIR)}_state/step*")) - {path}
        if deepspeed.comm.get_rank() == 0
        else ()
    ):
        shutil.rmtree(other, ignore_errors=True)


def claim_run(run):
    """Lock {CKPT_DIR}_state, which exists while a run is unfinished; write `run` there and to the log folder, or exit
    if it is of another run, or damaged. Returns the last step saved. Raises BlockingIOError if a run is using it."""
    os.makedirs(state := f"{CKPT_DIR}_state", exist_ok=True)
    fcntl.flock(
        os.open(f"{state}/lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB
    )  # until the end
    taken = lambda suffix: (
        glob(f"{escape(CKPT_DIR)}_logs{suffix}/*") + glob(f"{escape(CKPT_DIR)}_step*[0-9]{suffix}")
    )
    suffix = next(
        suffix
        for suffix in ["", *(f"-v{number}" for number in range(2, 10**4))]
        if not taken(suffix)
    )
    known = Path(state, "run.json")
    begun = json.loads(known.read_text()) if known.exists() else run | {"suffix": suffix}
    same = {"budget", "suffix"} | {
        key for key in begun.keys() | run.keys() if begun.get(key) == run.get(key)
    }
    if differ := [
        f"{key} {begun.get(key)!r}, now {run.get(key)!r}" for key in begun | run if key not in same
    ]:
        sys.exit(
            f"{state}: unfinished run with {'; '.join(differ)}. Give the same, or another CKPT_DIR, or remove it"
        )
    step = max((int(name[4:]) for name in os.listdir(state) if name[4:].isdigit()), default=0)
    whole = [
        is_zipfile(file) and not ZipFile(file).testzip()
        for file in glob(f"{escape(state)}/step{step:04d}/*.pt")
    ]
    strange = not known.exists() and set(os.listdir(state)) - {"lock", "run.json.partial"}
    if strange or len(whole) < (run["world_size"] + 1) * (step > 0) or not all(whole):
        sys.exit(
            f"{state} is damaged, or not of a run; give another CKPT_DIR or, if it is of a run, remove it"
        )
    shutil.rmtree(f"{state}/partial", ignore_errors=True)
    print(
        f"{state}: goes on with the unfinished run after step {step}"
        if known.exists()
        else f"{state}: new run"
    )
    os.makedirs(logs := f"{CKPT_DIR}_logs{begun['suffix']}", exist_ok=True)
    files = {
        known: begun,
        f"{logs}/run_config.json": begun,
        f"{logs}/ds_zero2.json": ds_config(run["budget"]["steps"]),
    }
    files[f"{logs}/ablation_config.json"] = {name: globals()[name] for name in ABLATION}
    for path in filter(files.get, files):  # not the ablation's if there is none
        Path(f"{path}.partial").write_text(json.dumps(files[path], indent=2) + "\n")
        os.replace(f"{path}.partial", path)
    print(", ".join(f"{round(number, 2):,} {name}" for name, number in run["budget"].items()))
    return step


def read_overrides(argv):
    """Set the constants given as `--NAME VALUE`, lists as a,b; messages about these, and any constant that is wrong."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in ["local_rank", *CONSTANTS]:  # the first is given by the launcher
        parser.add_argument(
            f"--{name}", nargs="?", const="", help=f"now {globals().get(name)}".replace("%", "%%")
        )
    given, unknown = parser.parse_known_args(argv)
    problems = [f"{word}: no constant of this script; --help lists them" for word in unknown]
    for kind, low, high, name in (
        (*limits, name) for *limits, names in RANGES for name in names.split()
    ):
        if (value := getattr(given, name)) is not None:
            with suppress(
                ValueError, SyntaxError, TypeError
            ):  # then it stays a text, which is of the wrong type
                value = {str: str, list: lambda text: text.split(",")}.get(kind, ast.literal_eval)(
                    value
                )
            globals()[name] = value
        value, limits = globals()[name], "not empty" if low is None else f"{low} to {high}"
        fits = isinstance(value, kind) and (high is True or type(value) is not bool)
        if not fits or (value is not None and not (value if low is None else low <= value <= high)):
            problems.append(
                f"{name} = {value!r}: must be {getattr(kind, '__name__', kind)}, {limits}"
            )
    return problems


def preflight(run, world_size):
    """Messages on all that is wrong, found before the weights are loaded; `run` gets all that decides the result."""
    run |= {name: globals()[name] for name in CONSTANTS} | {"world_size": world_size, "budget": {}}
    run["versions"] = {
        lib: version(lib) for lib in ("torch", "deepspeed", "transformers", "peft", "numpy")
    }
    problems, examples = [], []
    try:
        draws, numbers, run["budget"] = plan(examples := load_examples(), world_size)
        supervised = (
            int(make_batch(examples, draws, part, 0)[2].sum())
            for part in numbers.reshape(-1, MICRO_BSIZE)
        )
        run["budget"] |= {
            "forward tokens": numbers.size * MAX_LEN,
            "supervised tokens": sum(supervised),
        }
        run["pt_sha256"] = hashlib.sha256(Path(PT_FILE).read_bytes()).hexdigest()
    except ValueError as error:
        problems.append(str(error))
    try:
        config, tokenizer = fetch(AutoConfig), fetch(AutoTokenizer, fix_mistral_regex=False)
        run["model_commit"] = getattr(config, "_commit_hash", None)  # of a hub model
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=True, code_revision=MODEL_REVISION
            )
        return problems + list(check_model(model, tokenizer, examples, run["budget"]))
    except Exception as error:  # the hub, the folder and remote code fail in many ways
        return [
            *problems,
            f"{MODEL_NAME = } cannot be loaded ({error!r:.300}); give a hub id or a model folder",
        ]


def check_model(model, tokenizer, examples, budget):
    """Yields where the model (without weights), its tokenizer, constants and examples do not fit; adds to `budget`."""
    targets, name, remake = (
        match_targets(model),
        f"{MODEL_NAME = }",
        f"make it with pt.py --model {MODEL_NAME}",
    )
    budget |= {
        f"layers {end}": sum(f".{target}".endswith(f".{end}") for target in targets)
        for end in LORA_TARGETS
    }
    budget["trained parameters"] = LORA_RANK * sum(
        sum(model.get_submodule(layer).weight.shape) for layer in targets
    )
    mask_id, vocabulary = (
        getattr(model.config, "mask_token_id", None),
        model.get_input_embeddings().num_embeddings,
    )
    if mask_id not in (None, MASK_ID) or vocabulary <= MASK_ID:
        yield f"{MASK_ID = }: {name} has {vocabulary} ids, its mask token is {mask_id or 'unknown'}"
    if not targets:
        yield f"{LORA_TARGETS = }: none matches a linear layer of {name}; give other names"
    if not deepspeed.get_accelerator().is_bf16_supported():
        yield f"{deepspeed.get_accelerator().device_name()} has no bf16, which training needs; use another"
    if any(MASK_ID in ids or ids.max() >= vocabulary for _, ids in examples):
        yield f"{PT_FILE = } has rows with {MASK_ID = }, or with ids beyond the {vocabulary} of {name}; {remake}"
        return
    known = [
        (ids.tolist(), tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for _, ids in examples[:32]
    ]
    if known and all(
        tokenizer.encode(text, add_special_tokens=False) != ids for ids, text in known
    ):
        yield f"{PT_FILE = } was made with another tokenizer than that of {name}; {remake}"


def main():
    problems, run = read_overrides(sys.argv[1:]), {}
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
    if local_rank == 0 and (problems := problems or preflight(run, world_size)):
        sys.exit("\n".join(problems))
    saved = claim_run(run) if rank == 0 else 0
    torch._dynamo.config.suppress_errors = (
        True  # what cannot be compiled runs as it is, with a warning
    )
    deepspeed.utils.logger.setLevel("ERROR")
    (logging.enable_progress_bar if rank == 0 else logging.disable_progress_bar)()
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: (
        None
    )  # CPU ranks talk through gloo, nothing is compiled
    deepspeed.init_distributed(
        timeout=12 * deepspeed.constants.default_pg_timeout
    )  # 2 hours: rank 0 may save long
    deepspeed.get_accelerator().set_device(local_rank)
    run = json.loads(
        Path(state := f"{CKPT_DIR}_state", "run.json").read_text()
    )  # on a disk that all nodes share
    logs, steps = f"{CKPT_DIR}_logs{run['suffix']}", run["budget"]["steps"]
    draws, numbers, _ = plan(examples := load_examples(), world_size)
    tokenizer = fetch(AutoTokenizer, fix_mistral_regex=False)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = build_model(deepspeed.get_accelerator().device_name(local_rank))
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    deepspeed.comm.all_reduce(
        saved := torch.tensor(saved, device=deepspeed.get_accelerator().current_device_name())
    )
    engine, *_ = deepspeed.initialize(
        model=model.train(), model_parameters=adapter, config=ds_config(steps)
    )
    engine._get_all_ckpt_names = lambda *where: [
        engine._get_ckpt_name(*where)
    ]  # its own fails on a [ in the name
    fragment, zero = (
        sys.modules["deepspeed.utils.tensor_fragment"].fragment_address,
        deepspeed.runtime.zero.config,
    )
    torch.serialization.add_safe_globals(
        [fragment, zero.ZeroStageEnum, deepspeed.runtime.fp16.loss_scaler.LossScaler]
    )
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # a state with code in it is refused
    csv = (
        engine.load_checkpoint(state, f"step{saved:04d}", False)[1]["csv"]
        if saved
        else "step,loss\n"
    )
    save(
        f"{CKPT_DIR}_stepXXXX", needed := 2 * model.num_parameters(), lambda partial: None
    )  # is there space?
    log = open(f"{logs}/train_loss.csv" if rank == 0 else os.devnull, "w", buffering=1)  # noqa: SIM115 (until the end)
    log.write(csv)
    bar = {"unit": " tokens", "unit_scale": numbers[0].size * MAX_LEN, "disable": rank != 0}
    for step in (bar := tqdm(range(saved + 1, steps + 1), initial=int(saved), total=steps, **bar)):
        loss_sum = torch.zeros((), device=engine.device)
        for micro_batch in numbers[step - 1, :, rank]:
            torch.manual_seed(
                SEED << 32 | int(micro_batch[0])
            )  # dropout too is a function of the draws
            loss = supervised_loss(engine, *make_batch(examples, draws, micro_batch, pad_id))
            engine.backward(
                loss * (loss - loss + 1).detach()
            )  # times 1, or nan: then DeepSpeed does not update
            lr = engine.get_lr()[0]
            engine.step()
            loss_sum += loss.detach() / GRAD_ACC
        deepspeed.comm.all_reduce(
            mean := loss_sum / world_size
        )  # (T16) over micro-batches and ranks
        if (
            not np.isfinite(mean := mean.item()) or not engine.was_step_applied()
        ):  # the weights are as they were
            save_state(engine, step - 1, Path(log.name).read_text())
            rows = draws[numbers[step - 1, :, rank], 0].ravel().tolist()
            sys.exit(
                f"step {step}: loss {loss_sum} or gradient not finite on rows {rows} of {PT_FILE}; state is saved"
            )
        log.write(f"{step},{mean:.6f}\n")
        bar.set_postfix(step=f"{step}/{steps}", loss=f"{mean:.3f}", lr=f"{lr:.1e}")
        if step == steps or (SAVE_EVERY and step % SAVE_EVERY == 0):
            path = f"{CKPT_DIR}_step{step:04d}{run['suffix']}"
            save(
                path,
                needed,
                lambda partial: (
                    rank or os.path.exists(path) or save_merged(model, tokenizer, partial)
                ),
            )  # noqa: B023
        if STATE_EVERY and step % STATE_EVERY == 0 and step < steps:
            save_state(engine, step, Path(log.name).read_text())
    if rank == 0:
        os.rename(state, f"{logs}/state")
        shutil.rmtree(f"{logs}/state", ignore_errors=True)
        print(
            f"{steps} steps, {run['budget']['supervised tokens']:,} supervised tokens; see {path} and {logs}"
        )
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (
        BlockingIOError,
        json.JSONDecodeError,
        BadZipFile,
        torch.serialization.pickle.UnpicklingError,
    ) as error:
        why = (
            "in use by another run; wait for its end"
            if isinstance(error, OSError)
            else "damaged; remove it"
        )
        sys.exit(f"{CKPT_DIR}_state is {why}, or give another CKPT_DIR")
    except (KeyboardInterrupt, OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "gloo" not in str(
            error
        ):  # with which other ranks learn of the end of one
            raise
        memory = f"remove {CKPT_DIR}_state, set ACTIVATION_CHECKPOINTING or halve {MICRO_BSIZE = } and double GRAD_ACC"
        remedy = (
            memory
            if isinstance(error, torch.OutOfMemoryError)
            else "give the same command again to go on"
        )
        sys.exit(f"stopped: {type(error).__name__}({error!s:.300}); {remedy}")
