"""What several test files share: models, data, constants, and runs that are launched and killed."""

# ruff: noqa: E402 (the environment is set before the libraries are imported)

import argparse
import atexit
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# before any library is imported: no network, no GPU, and no cache but the tests' own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"  # the launcher gives its processes all devices
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import numpy as np
import pytest
import torch

SUITE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(SUITE), str(SUITE / "experiments")]

import decode
import suite
from opdlm import chains_ar
from toy_task import chains
from toy_task.llada.configuration_llada import LLaDAConfig
from toy_task.llada.modeling_llada import LLaDAModelLM
from transformers import AutoModelForCausalLM, Qwen3Config

import pt
import train_blockwise
import train_fullseq

TRAINERS = {"blockwise": train_blockwise, "fullseq": train_fullseq}


# ------- the toy: a model on disk, and data
SHAPE = {
    "d_model": 96,
    "n_layers": 3,
    "n_heads": 4,
    "mlp_hidden_size": 256,
    "max_sequence_length": 1024,
}


def build_toy(folder):
    """`model` (random weights, LLaDA's vocabulary), `data` and `train.pt` in `folder`."""
    chains.build(folder, wide=True, base=None, train_rows=60, test_rows=10, shape=SHAPE)
    preprocess_toy(folder)
    return folder


def build_ar_toy(folder):
    """The same with an autoregressive model (random weights), for train_opdlm.py."""
    chains_ar.build(folder, train_rows=60, test_rows=6, pretrained=False)
    preprocess_toy(folder)
    return folder


OF_AR_TOY = {  # constants of train_opdlm.py that suit it
    "MASK_ID": chains.build_tokenizer(wide=False).convert_tokens_to_ids("<|mdm_mask|>"),
    "GEN_LENGTH": 16,
    "FIRST_GEN_LENGTH": 8,
    "CURRICULUM": 2,
    "THRESHOLD": 0.5,
    "UPDATES_PER_ROLLOUT": 3,
}


def preprocess_toy(folder):
    """`train.pt` in `folder`, which has `model` and `data`."""
    words = "--model model --dataset data/train.jsonl --output train.pt"
    run_pt(*words.split(), "--filter_type", "", cwd=folder)


def run_pt(*arguments, cwd):
    """`python pt.py ARGUMENTS` in the folder `cwd`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        pt.main(pt.parse_args([str(argument) for argument in arguments]))


def constants(module, toy_folder=None, **changes):
    """The constants of a trainer as its functions take them, `args`, with values for the toy."""
    args = argparse.Namespace(**module.CONSTANTS)
    if toy_folder is not None:
        args.MODEL_NAME = str(toy_folder / "model")
        args.DATA_PT = str(toy_folder / "train.pt")
        args.MICRO_BSIZE, args.LORA_RANK, args.TOTAL_TRAIN_STEPS = 2, 4, 3
    vars(args).update(changes)
    return args


# ------- small models in memory
MASK = 7  # ids of small_llada
EOS = 3
EOT = 5
VOCABULARY = 24
IDS = {"mask_id": MASK, "eos_id": EOS, "eot_id": EOT}


def small_llada(seed=0, **changes):
    """A LLaDA with random weights, large enough that its predictions differ between positions."""
    torch.manual_seed(seed)
    shape = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "mlp_hidden_size": 32,
        "init_std": 0.4,
        "vocab_size": VOCABULARY,
        "mask_token_id": MASK,
    }
    return LLaDAModelLM(LLaDAConfig(**shape | changes)).eval()


def without_mask(model, mask_id=MASK):
    """The model, which now never predicts [MASK], as is true of trained ones."""

    def forbid(_, inputs, logits):
        return logits.index_fill(-1, torch.tensor([mask_id]), -1e4)

    model.get_output_embeddings().register_forward_hook(forbid)
    return model


def prompts_of(rng, *lengths):
    """Random prompts of these lengths, without MASK."""
    choices = torch.tensor([id_ for id_ in range(VOCABULARY) if id_ != MASK])
    prompts = []
    for length in lengths:
        picked = torch.randint(len(choices), (length,), generator=rng)
        prompts.append(choices[picked])
    return prompts


def decode_one(model, prompt, **options):
    """The answer to one prompt, and the canvases (L,) that the model was given."""
    canvases = []

    def keep(_, canvas):
        canvases.append(canvas[0].clone())

    answers = decode.decode(model, [prompt], **{**IDS, **options}, callback=keep)
    return answers[0], canvases


@torch.no_grad()
def reference(
    model,
    prompt,
    gen_length,
    block_length,
    steps,
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
    mask_id=MASK,
    threshold=None,
):
    """LLaDA's decoder as plain loops, for one prompt at temperature 0, in float64."""
    canvas = [*prompt.tolist(), *[mask_id] * gen_length]
    num_blocks = gen_length // block_length
    steps_per_block = steps // num_blocks if threshold is None else block_length
    for block in range(num_blocks):
        start = len(prompt) + block * block_length
        for step in range(steps_per_block):
            logits = model(input_ids=torch.tensor([canvas])).logits[0].double()  # (L, V)
            if logits_eos_inf:
                logits[:, EOS] = -torch.inf
            x0 = logits.argmax(-1).tolist()
            if confidence_eos_eot_inf:
                logits[:, [EOS, EOT]] = -torch.inf
            p = logits.softmax(-1)
            masked = [i for i in range(start, start + block_length) if canvas[i] == mask_id]
            by_confidence = sorted(masked, key=lambda i: -p[i, x0[i]])  # equals stay in order
            num = block_length // steps_per_block
            if step < block_length % steps_per_block:
                num += 1
            chosen = by_confidence[:num]
            if threshold is not None:
                chosen = [i for i in masked if p[i, x0[i]] > threshold] or by_confidence[:1]
            for i in chosen:
                canvas[i] = x0[i]
    return torch.tensor(canvas[len(prompt) :])


AR_VOCABULARY = 40  # ids of small_qwen
AR_MASK = 38
AR_EOS = 39
AR_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,  # its distributions are far from uniform
    "tie_word_embeddings": True,
}


def small_qwen(seed=0, **changes):
    """An autoregressive Qwen3 with random weights, in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(**{"vocab_size": AR_VOCABULARY} | AR_SHAPE | changes)
    return AutoModelForCausalLM.from_config(config).eval()


# ------- rows and draws
L = 48  # tokens of the random rows


def random_rows(seed, count=64, block_size=8):
    """input_ids (B, L), and prompt_len, length and the offset of any block, (B, 1) each."""
    rng = np.random.default_rng(seed)
    prompt_len = rng.integers(1, L - 1, (count, 1))
    length = rng.integers(prompt_len + 1, L + 1)
    block = rng.integers(0, -(-(length - prompt_len) // block_size))
    input_ids = rng.integers(0, 1000, (count, L))
    arrays = input_ids, prompt_len, length, block * block_size
    return tuple(torch.from_numpy(array) for array in arrays)


def random_noise(seed, *shape):
    """Numbers ~ U(0, 1), which are functions of `seed`."""
    return torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32))


def draws_of(ids, samples=0, offsets=0):
    """Draws as `plan` makes them, in one dimension."""
    draws = np.zeros(len(ids), [("id", int), ("sample", int), ("offset", int)])
    draws["id"], draws["sample"], draws["offset"] = ids, samples, offsets
    return draws


# ------- launched runs
def launch(command, folder, timeout=240, **environment):
    """Run a command line in `folder`; returns (exit status, what the script itself printed).

    The launcher's own lines, which repeat the command line, are left out.
    """
    env = user_environment(**environment)
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    skip = ("[runner.py:", "[launch.py:", "real_accelerator.py")
    return done.returncode, "\n".join(
        line for line in done.stdout.splitlines() if not any(s in line for s in skip)
    )


def user_environment(**changes):
    """The environment of a user of this interpreter's virtual environment, in another folder."""
    return suite.user_environment(**{"PYTHONPATH": ""} | changes)


def launcher(ranks):
    return suite.launcher(ranks)


def flags(**values):
    return suite.flags(values)


def losses(logs):
    """The losses of a run's train_loss.csv, in the folder `logs`."""
    with open(logs / "train_loss.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def timeless(rollouts):
    """The content of a rollouts.csv without its last column, the seconds."""
    return b"".join(line.rpartition(b",")[0] + b"\n" for line in rollouts.read_bytes().splitlines())


def wait_until(condition, run, seconds=200):
    """Wait for what a run, a Popen, is about to do."""
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.01)


# ------- killed runs
TIMEOUT = 60  # seconds in which a launch must end after one of its ranks has died


def alive(session):
    """The processes of a session that are not zombies, {pid: command line}."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(own_session) == session and state != "Z":
                words = (stat.parent / "cmdline").read_text().split("\0")
                found[int(stat.parent.name)] = words
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def ranks_of(run):
    """The process ids of the ranks that a launcher has started."""
    ranks = []
    for pid, words in alive(run.pid).items():
        if any(word.startswith("--local_rank=") for word in words):
            ranks.append(pid)
    return ranks


def kill(run, moment, rng):
    """SIGKILL to all processes of a run, or to one of them, after which the others end too."""
    ranks = ranks_of(run) if moment == "one rank" else []
    if moment == "the launcher":  # the first of its two processes
        os.kill(run.pid, rng.choice((signal.SIGKILL, signal.SIGTERM)))
        run.wait(timeout=TIMEOUT)
    elif ranks:
        os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
        assert run.wait(timeout=TIMEOUT) != 0
    else:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    deadline = time.time() + TIMEOUT
    while alive(run.pid):
        assert time.time() < deadline, f"still there: {alive(run.pid)}"
        time.sleep(0.01)


def kill_after_a_state(command, folder, logs, **environment):
    """Start a run in `folder`; kill all its processes when it has saved a state below `logs`."""
    with open(folder / "printed", "w") as printed:
        run = subprocess.Popen(
            command,
            cwd=folder,
            env=user_environment(**environment),
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )
    wait_until((folder / logs / "state" / "latest.json").exists, run)
    kill(run, "in a step", random.Random(0))
