"""OPDLM: attention, rollouts, states and loss against plain definitions; whole runs."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import chains
import decode
import evaluate
import numpy as np
import pytest
import torch
import train_opdlm
from campaign import kill
from conftest import SUITE, flags, launch, launcher, prepare, run_pt, user_environment
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_launch import losses
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, Qwen3Config

V, MASK, EOS = 40, 38, 39
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def opdlm(monkeypatch, toy_folder):
    module = prepare(train_opdlm, monkeypatch, toy_folder)
    module.MASK_ID, module.BLOCK_SIZE, module.THRESHOLD = MASK, 4, 0.5
    return module


@pytest.fixture
def model():
    """A small Qwen3 in float32, whose distributions are far from uniform."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=V, **SHAPE)).eval()


PROMPTS = [torch.arange(1, 8), torch.arange(3, 6), torch.arange(9, 20), torch.arange(2, 4)]


def block_causal_logits(model, ids, prompt_len, size):
    """The logits (S, V) of one sequence, of which each block sees itself and those before."""
    block = [(i - prompt_len) // size for i in range(len(ids))]
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min)
    for i, j in itertools.product(range(len(ids)), repeat=2):
        if block[j] <= block[i]:
            mask[i, j] = 0
    return model(input_ids=ids[None], attention_mask=mask[None, None]).logits[0]


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("prompt", "answer"), [(5, 8), (4, 12), (1, 4)])
def test_a_training_row_is_seen_as_defined(opdlm, prompt, answer):
    sees = opdlm.training_sees(prompt, answer)
    positions = [("x0", i) for i in range(-prompt, answer)] + [("x_t", i) for i in range(answer)]
    for (row, one), (column, other) in itertools.product(enumerate(positions), repeat=2):
        (kind, i), (other_kind, j) = one, other
        if kind == "x0":
            expected = other_kind == "x0" and j // 4 <= i // 4
        elif other_kind == "x0":
            expected = j // 4 < i // 4
        else:
            expected = j // 4 == i // 4
        assert sees[row, column] == expected, (one, other)


def answers_of(seed, rows, columns):
    torch.manual_seed(seed)
    return torch.randint(MASK, (rows, columns))


def record_logits(opdlm, monkeypatch):
    """Let kl_divergence note what it is given; the list of (teacher, student) logits."""
    noted = []
    original = opdlm.kl_divergence

    def kl_divergence(teacher_logits, student_logits):
        noted.append((teacher_logits.detach(), student_logits.detach()))
        return original(teacher_logits, student_logits)

    monkeypatch.setattr(opdlm, "kl_divergence", kl_divergence)
    return noted


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_one_pass_gives_the_logits_of_block_by_block_decoding(
    opdlm, model, monkeypatch, shift, full
):
    """And the teacher those of the autoregressive model, rolled by one position.

    Each row alone, each block alone, without padding, cache or adapter for the teacher.
    """
    opdlm.LOGIT_SHIFT = shift
    student, teacher = model, None
    if full:
        torch.manual_seed(1)
        teacher = AutoModelForCausalLM.from_config(model.config).eval()
    else:
        lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        student = get_peft_model(model, lora).eval()
    answers = answers_of(2, 4, 12)
    loss_mask = torch.rand(answers.shape) < 0.6
    noisy_ids = answers.masked_fill(loss_mask, MASK)
    noted = record_logits(opdlm, monkeypatch)
    loss = opdlm.distillation_loss(student, teacher, PROMPTS, answers, noisy_ids, loss_mask)
    targets, logits = [torch.cat(part) for part in zip(*noted, strict=True)]

    number, total = 0, 0
    for prompt, answer, noisy, masked in zip(PROMPTS, answers, noisy_ids, loss_mask, strict=True):
        row_loss = []
        for pos in masked.nonzero().flatten().tolist():
            start = pos // 4 * 4
            so_far = torch.cat([prompt, answer[:start], noisy[start : start + 4]])
            expected = block_causal_logits(student, so_far, len(prompt), 4)
            place = len(prompt) + pos - shift
            torch.testing.assert_close(logits[number], expected[place], rtol=1e-3, atol=1e-3)
            before = torch.cat([prompt, answer[:pos]])
            if full:
                target = teacher(input_ids=before[None]).logits[0, -1]
            else:
                with student.disable_adapter():
                    target = student(input_ids=before[None]).logits[0, -1]
            torch.testing.assert_close(targets[number], target, rtol=1e-3, atol=1e-3)
            p, q = target.log_softmax(0), expected[place].log_softmax(0)
            row_loss.append(kl_div(q, p, reduction="sum", log_target=True))
            number += 1
        total += sum(row_loss) / len(row_loss)
    assert number == len(logits)
    torch.testing.assert_close(loss, total / 4, rtol=1e-3, atol=1e-4)


def test_the_teacher_is_frozen_and_the_student_learns(opdlm, model):
    student = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    answers = answers_of(3, 4, 8)
    loss_mask = torch.ones_like(answers, dtype=torch.bool)
    noisy_ids = torch.full_like(answers, MASK)
    before = opdlm.teacher_logits(student, None, PROMPTS, answers, loss_mask)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    found = []
    for _ in range(30):
        loss = opdlm.distillation_loss(student, None, PROMPTS, answers, noisy_ids, loss_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    after = opdlm.teacher_logits(student, None, PROMPTS, answers, loss_mask)
    assert torch.equal(before, after)


def test_nothing_in_the_loss_at_all(opdlm, model):
    """Zero, and still part of the graph: a rank with such a micro-batch takes part in the step."""
    answers = answers_of(4, 4, 8)
    nothing = torch.zeros_like(answers, dtype=torch.bool)
    loss = opdlm.distillation_loss(model, model, PROMPTS, answers, answers, nothing)
    loss.backward()
    assert loss.item() == 0


# --------------------------------------------------------------------------------------- the KL


@pytest.mark.parametrize("top_k", [None, 1, 5, V])
def test_kl_is_that_of_its_definition(opdlm, top_k):
    opdlm.TOP_K = top_k
    torch.manual_seed(5)
    teacher, student = 3 * torch.randn(2, 6, V)
    for one, p_logits, q_logits in zip(
        opdlm.kl_divergence(teacher, student), teacher, student, strict=True
    ):
        p, q = p_logits.softmax(0).tolist(), q_logits.softmax(0).tolist()
        kept = sorted(range(V), key=lambda i: -p[i])[: top_k or V]
        mass = sum(p[i] for i in kept)
        expected = sum(p[i] / mass * np.log(p[i] / mass / q[i]) for i in kept)
        assert one.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    opdlm.TOP_K = None
    assert opdlm.kl_divergence(teacher, teacher).abs().max() < 1e-5


# --------------------------------------------------------------------------------------- rollouts


def plain_rollout(opdlm, model, prompt, noise):
    """One answer in plain loops, without a cache; (tokens, steps) of whole blocks."""
    size, length = noise.shape
    answer, steps = [], []
    for start in range(0, length, size):
        block, when = [MASK] * size, [0] * size
        for number in range(size):
            if MASK not in block:
                break
            ids = torch.cat([prompt, torch.tensor(answer + block)])
            logits = block_causal_logits(model, ids, len(prompt), size).double()
            found = {}
            for i in range(size):
                if block[i] == MASK:
                    row = logits[len(prompt) + start + i - opdlm.LOGIT_SHIFT]
                    row[MASK] = -torch.inf
                    if opdlm.TEMPERATURE == 0:
                        p = row.softmax(0)
                        token = int(p.argmax())
                    else:
                        p = (row / opdlm.TEMPERATURE).softmax(0)
                        u = noise[number, start + i].item() * p.sum().item()
                        token = next(v for v in range(V) if p[: v + 1].sum() > u)
                    found[i] = (p[token].item(), token)
            surest = max(found, key=lambda i: found[i][0])
            for i, (confidence, token) in found.items():
                if confidence > opdlm.THRESHOLD or i == surest:
                    block[i], when[i] = token, number
        answer += block
        steps += when
        if EOS in block:
            break
    return answer, steps


@pytest.mark.parametrize(
    ("temperature", "threshold", "shift"),
    [(0, 0.5, False), (1.0, 0.3, False), (0.7, 0.5, True), (1.0, 1.0, True), (0, 0.0, False)],
)
def test_rollouts_with_a_cache_are_those_without(opdlm, model, temperature, threshold, shift):
    opdlm.TEMPERATURE, opdlm.THRESHOLD, opdlm.LOGIT_SHIFT = temperature, threshold, shift
    noise, _ = opdlm.draw_noise(range(4), 16)
    answers, steps = opdlm.roll_out(model, PROMPTS, noise, EOS)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        tokens, when = plain_rollout(opdlm, model, prompt, noise[row])
        lengths.add(len(tokens))
        assert answers[row, : len(tokens)].tolist() == tokens
        assert steps[row, : len(when)].tolist() == when
    assert answers.shape[1] == max(lengths) and MASK not in answers
    if threshold == 1.0:
        assert all(sorted(block) == [0, 1, 2, 3] for block in steps.view(-1, 4).tolist())
    if threshold == 0.0:
        assert not steps.any()


def test_sampling_is_from_the_distribution(opdlm):
    """40,000 draws over a grid of noise: each share within 1e-3 of the probability."""
    torch.manual_seed(6)
    opdlm.TEMPERATURE = 0.7
    logits = torch.randn(1, 1, V)
    expected = logits[0, 0].clone()
    expected[MASK] = -torch.inf
    expected = (expected / 0.7).softmax(0)
    noise = (torch.arange(40_000) + 0.5)[None] / 40_000
    tokens, confidence = opdlm.sample(logits.expand(1, 40_000, V).clone(), noise)
    shares = torch.bincount(tokens[0], minlength=V) / 40_000
    assert (shares - expected).abs().max() < 1e-3 and shares[MASK] == 0
    torch.testing.assert_close(confidence[0], expected[tokens[0]])


def test_rollouts_grow_in_whole_blocks(opdlm):
    opdlm.FIRST_GEN_LENGTH, opdlm.GEN_LENGTH, opdlm.CURRICULUM = 10, 101, 10
    assert [opdlm.rollout_length(n) for n in (0, 5, 10, 99)] == [12, 56, 104, 104]
    opdlm.FIRST_GEN_LENGTH, opdlm.GEN_LENGTH = 100, 64
    assert [opdlm.rollout_length(n) for n in (0, 5, 10)] == [64, 64, 64]


def test_noise_is_a_function_of_seed_and_draw(opdlm):
    tokens, blocks = opdlm.draw_noise([7, 3], 8)
    others = opdlm.draw_noise([3], 8)
    assert tokens.shape == (2, 4, 8) and blocks.shape == (2, 2)
    assert torch.equal(tokens[1:], others[0]) and torch.equal(blocks[1:], others[1])
    opdlm.SEED += 1
    assert not torch.equal(opdlm.draw_noise([3], 8)[0], others[0])


@pytest.mark.parametrize("train_end", [False, True])
def test_answers_are_kept_up_to_their_end(opdlm, model, monkeypatch, tmp_path, train_end):
    """Whole blocks up to the end-of-turn token's; it is in the loss if TRAIN_END says so."""
    opdlm.TRAIN_END, opdlm.FIRST_GEN_LENGTH, opdlm.GEN_LENGTH = train_end, 12, 12
    ends = [*range(12), None]  # the place of the end-of-turn token

    def roll_out(model, prompts, noise, eos_id):
        answers = torch.ones(len(ends), 12, dtype=torch.long)
        for row, end in zip(answers, ends, strict=True):
            row[12 if end is None else end :] = eos_id
        return answers, torch.arange(4).repeat(len(ends), 3)

    monkeypatch.setattr(opdlm, "roll_out", roll_out)
    monkeypatch.setattr(opdlm.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(opdlm.dist, "all_reduce", lambda sums: None)
    examples = [(2, torch.arange(5))]
    numbers = np.arange(len(ends))
    draws = np.zeros((len(ends), 2), dtype=int)
    answers = opdlm.decode_answers(model, EOS, examples, draws, numbers, 0)
    for end, (answer, steps, answer_len, noise) in zip(ends, answers.values(), strict=True):
        assert answer_len == (12 if end is None else end + train_end)
        assert (
            len(answer)
            == len(steps)
            == 4 * len(noise)
            == (12 if end is None else 4 * (end // 4) + 4)
        )
    path = tmp_path / "rollouts.csv"
    for rollout in (0, 1, 1):  # the last one again, after a kill
        opdlm.log_rollout(path, rollout, answers, EOS, "cpu")
    lines = path.read_text().splitlines()
    tokens = sum(range(12)) + 12 + 12 * train_end
    assert lines[0] == "rollout,answers,tokens,tokens_per_step,ended"
    assert lines[1:] == [f"{number},13,{tokens},1.000,{12 / 13:.3f}" for number in (0, 1)]


# ----------------------------------------------------------------------------------------- states


def test_states_are_those_that_the_rollout_met(opdlm, model, monkeypatch):
    """Every block of x_t is a canvas of this block that the model was shown, and all are met."""
    shown = {}  # (row, block): canvases
    forward = opdlm.logits_at

    def note(model, row, column, **inputs):
        ids = inputs["input_ids"]
        if MASK in ids:
            past = inputs["past_key_values"].get_seq_length() - longest
            for number, canvas in enumerate(ids.tolist()):
                shown.setdefault((number, past // 4), set()).add(tuple(canvas))
        return forward(model, row, column, **inputs)

    longest = max(len(prompt) for prompt in PROMPTS)
    monkeypatch.setattr(opdlm, "logits_at", note)
    noise, _ = opdlm.draw_noise(range(4), 12)
    answers, steps = opdlm.roll_out(model, PROMPTS, noise, EOS)
    blocks = answers.shape[1] // 4
    met = set()
    for share in np.linspace(0, 0.999, 25):
        choice = torch.full((4, blocks), share)
        whole = torch.full((4, 1), answers.shape[1])
        noisy_ids, loss_mask = opdlm.corrupt(answers, steps, whole, choice)
        assert torch.equal(loss_mask, noisy_ids == MASK)
        assert torch.equal(noisy_ids[~loss_mask], answers[~loss_mask])
        for row, block in itertools.product(range(4), range(blocks)):
            canvas = tuple(noisy_ids[row, 4 * block : 4 * block + 4].tolist())
            assert MASK in canvas
            met.add((row, block, canvas))
    # a row whose block is full is shown on while others are decoded: those have no mask
    everything = {(*key, c) for key, canvases in shown.items() for c in canvases if MASK in c}
    assert met == everything and len(met) > 4 * blocks


def test_what_follows_the_end_is_not_in_the_loss(opdlm):
    answers = torch.arange(16).view(2, 8)
    steps = torch.zeros_like(answers)
    _, loss_mask = opdlm.corrupt(answers, steps, torch.tensor([[3], [0]]), torch.rand(2, 2))
    assert loss_mask.tolist() == [[True] * 3 + [False] * 5, [False] * 8]


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def ar_folder(tmp_path_factory):
    """A small autoregressive model with random weights, the toy's tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("ar")
    chains.build(folder, wide=False, base=None, train_rows=60, test_rows=6)
    tokenizer = chains.build_tokenizer(False)
    config = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SHAPE)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "ar")
    tokenizer.save_pretrained(folder / "ar")
    words = "--model ar --dataset data/train.jsonl --output train.pt --filter_type"
    run_pt(*words.split(), "", cwd=folder)
    return folder


SCRIPT = SUITE / "experiments" / "train_opdlm.py"
IN_FLOAT32 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # where rounding hardly ever changes a token


def constants_of(folder, **changes):
    tokenizer = chains.build_tokenizer(False)
    constants = {
        "MODEL_NAME": folder / "ar",
        "DATA_PT": folder / "train.pt",
        "MASK_ID": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        "GEN_LENGTH": 16,
        "FIRST_GEN_LENGTH": 8,
        "CURRICULUM": 2,
        "THRESHOLD": 0.5,
        "UPDATES_PER_ROLLOUT": 3,
        "TOTAL_TRAIN_STEPS": 12,
        "LORA_RANK": 4,
        "LR": 1e-2,
    }
    return flags(**(constants | changes))


def kill_after_a_state(command, folder, logs):
    """Start a run and kill all its processes when it has saved a state."""
    with open(folder / "printed", "w") as printed:
        run = subprocess.Popen(
            command,
            cwd=folder,
            env=user_environment(**IN_FLOAT32),
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )
    deadline = time.time() + 200
    while not (folder / logs / "state" / "latest.json").exists():
        assert time.time() < deadline and run.poll() is None, (folder / "printed").read_text()
        time.sleep(0.01)
    kill(run, "in a step", random.Random(0))


def test_two_ranks_killed_and_resumed_are_one_rank(ar_folder, tmp_path, monkeypatch):
    """The same answers and, but for rounding, the same losses; the checkpoint can be evaluated."""
    one = constants_of(ar_folder, MICRO_BSIZE=4, CKPT_DIR="one", SAVE_EVERY=6)
    status, printed = launch([sys.executable, SCRIPT, *one], tmp_path, **IN_FLOAT32)
    assert status == 0, printed
    two = [*launcher(2), SCRIPT, *constants_of(ar_folder, MICRO_BSIZE=2, CKPT_DIR="two")]
    kill_after_a_state(two, tmp_path, "two_logs")
    status, printed = launch(two, tmp_path, **IN_FLOAT32)
    assert status == 0 and "resumes after step" in printed, printed
    ours, theirs = losses(tmp_path / "one_logs"), losses(tmp_path / "two_logs")
    assert len(ours) == 12
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-2
    rollouts = [(tmp_path / f"{name}_logs" / "rollouts.csv").read_text() for name in ("one", "two")]
    assert rollouts[0] == rollouts[1] and rollouts[0].count("\n") == 1 + 4
    names = {name for name in os.listdir(tmp_path) if name.startswith("one_step")}
    assert names == {"one_step0006", "one_step0012"}
    config = json.loads((tmp_path / "one_step0012" / "config.json").read_text())
    assert (config["block_causal"], config["logit_shift"]) == (4, False)
    paths = {"model": "one_step0012", "dataset": ar_folder / "data" / "test.jsonl", "output": "ev"}
    decoding = {"gen_length": 16, "block_length": 4, "steps": 16, "limit": 3, "batch_size": 3}
    monkeypatch.chdir(tmp_path)
    evaluate.main(flags(**paths, **decoding))
    assert json.loads(Path("ev/summary.json").read_text())["count"] == 3


def test_all_weights_are_trained(ar_folder, tmp_path):
    """With the other switches too; every weight of the checkpoint has moved."""
    constants = constants_of(
        ar_folder,
        MICRO_BSIZE=2,
        GRAD_ACC=2,
        FULL_FT=True,
        LOGIT_SHIFT=True,
        TOP_K=8,
        ACTIVATION_CHECKPOINTING=True,
        TOTAL_TRAIN_STEPS=4,
        LR=0.1,
        CKPT_DIR="full",
    )
    status, printed = launch([sys.executable, SCRIPT, *constants], tmp_path)
    assert status == 0, printed
    base = load_file(ar_folder / "ar" / "model.safetensors")
    tuned = load_file(tmp_path / "full_step0004" / "model.safetensors")
    assert set(base) == set(tuned)
    assert all(not torch.equal(base[name].bfloat16(), tuned[name]) for name in base)


def test_decode_decodes_as_the_rollouts_do(opdlm, model):
    """At temperature 0, with the threshold, up to the end of the answer."""
    opdlm.TEMPERATURE, opdlm.THRESHOLD = 0, 0.3
    model.get_input_embeddings().weight.data[MASK] = 0  # so that decode.py never predicts [MASK]
    for shift in (False, True):
        opdlm.LOGIT_SHIFT = shift
        model.config.update({"block_causal": 4, "logit_shift": shift})
        noise, _ = opdlm.draw_noise(range(4), 16)
        ours, _ = opdlm.roll_out(model, PROMPTS, noise, EOS)
        answers = decode.decode(
            model,
            [prompt.tolist() for prompt in PROMPTS],
            gen_length=16,
            block_length=4,
            threshold=0.3,
            mask_id=MASK,
            eos_id=EOS,
            eot_id=EOS,
        )
        for one, other in zip(ours.tolist(), answers.tolist(), strict=True):
            end = 4 * (one.index(EOS) // 4 + 1) if EOS in one else len(one)
            assert one[:end] == other[:end]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASK_ID": 10**6}, "MASK_ID = 1000000"),
        ({"MICRO_BSIZE": 1000}, "too few for a step"),
        ({"TARGET_MODS": "c_attn"}, "no linear layer"),
        ({"MAX_LEN": 10}, "give 0 rows"),
        ({"BLOCK_SIZE": 0}, "BLOCK_SIZE = 0"),
        ({"THRESHOLD": 1.5}, "THRESHOLD = 1.5"),
        ({"MODEL_NAME": "/no/such/model"}, "cannot be loaded"),
    ],
)
def test_mistakes(opdlm, ar_folder, changes, message):
    words = constants_of(ar_folder, **({"MICRO_BSIZE": 2} | changes))
    problems = opdlm.read_overrides(words) + opdlm.check_constants()
    problems = problems or opdlm.preflight(1)
    assert len(problems) == 1 and message in problems[0], problems


def test_another_block_length_is_a_warning(capsys):
    config = Qwen3Config(**SHAPE)
    decode.check_block_length("m", config, 32)  # a model that attends to all
    config.block_causal = 4
    decode.check_block_length("m", config, 4)
    assert capsys.readouterr().err == ""
    decode.check_block_length("m", config, 32)
    assert "has learnt blocks of 4 tokens, not --block_length 32" in capsys.readouterr().err
