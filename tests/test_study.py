"""The studies run the real trainers, can be killed anywhere, and count what they say they count."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import chains
import plot
import pytest
import study
import torch
from conftest import user_environment

import pt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains") / "base"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PRETRAIN_STEPS": 0,
            "PRETRAIN_ROWS": 200,
            "TRAIN_ROWS": 40,
            "TEST_ROWS": 6,
        }.items():
            patch.setattr(chains, name, value)
        chains.build(str(folder), seed=2)
    return folder


def words(base, output, *studies):
    given = f"--model {base}/model --data {base}/data/train.jsonl --test {base}/data/test.jsonl --output {output}"
    sizes = "--seeds 1 --steps 4 --gen_length 16 --block_size 8 --block_sizes 4 8 --tokens_per_step 4 --jobs 2"
    return [*studies, *f"{given} {sizes} --constants MICRO_BSIZE=2 LORA_RANK=2 MAX_LEN=112".split()]


def timeless(path):
    with open(path, newline="") as file:
        return [
            {name: value for name, value in row.items() if "seconds" not in name}
            for row in csv.DictReader(file)
        ]


def start(base, output):
    command = [sys.executable, study.__file__, *words(base, output, "equal-tokens")]
    how = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    return subprocess.Popen(command, env=user_environment(OMP_NUM_THREADS="1"), **how)


def test_a_study_that_is_killed_goes_on(base, tmp_path):
    """Killed without its trainers, as one of them has begun, and started again: as one that nobody killed."""
    killed = start(base, tmp_path / "one")
    deadline = time.time() + 120
    while not list((tmp_path / "one").glob("*/ckpt_logs/train_loss.csv")):
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    two = start(base, tmp_path / "one")
    printed, _ = two.communicate(timeout=200)
    assert two.returncode == 0 and "3 runs" in printed and "Traceback" not in printed, printed
    whole = start(base, tmp_path / "two")
    printed, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0 and re.search(r"equal-tokens +\| fullseq +\|", printed), printed
    rows = timeless(tmp_path / "two" / "results.csv")
    assert timeless(tmp_path / "one" / "results.csv") == rows
    assert [(row["method"], row["train_steps"]) for row in rows] == [
        ("base", ""),
        ("blockwise", "4"),
        ("fullseq", "1"),
    ]
    for path in (tmp_path / "two").glob("*/block*/summary.json"):
        other = tmp_path / "one" / path.relative_to(tmp_path / "two")
        one, two = (json.loads(p.read_text()) for p in (path, other))
        assert one["settings"] == two["settings"] and one["accuracy"] == two["accuracy"]
    assert (tmp_path / "two" / "equal-tokens.png").read_bytes()[1:4] == b"PNG"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


LENGTHS = [48] * 8000


def cells_of(*argv):
    args = study.parse_args([*argv])
    return args, study.make_cells(args, LENGTHS)


def test_each_study_changes_what_it_says():
    args, cells = cells_of()
    by_study = {name: [cell for cell in cells if cell["study"] == name] for name in study.STUDIES}
    assert all(own[0]["method"] == "base" for own in by_study.values())
    changed = lambda name: [
        cell["constants"].get(name) for cell in by_study[study_of[name]] if cell["method"] != "base"
    ]
    study_of = {
        "PREFIX_MASK_RATE": "prefix",
        "SUFFIX_MASK_PROB": "suffix",
        "MASK_PADDING": "padding",
    }
    assert changed("PREFIX_MASK_RATE") == [0.0, 0.1, 0.2, 0.5] and changed("SUFFIX_MASK_PROB") == [
        1.0,
        0.5,
        0.0,
    ]
    assert changed("MASK_PADDING") == [False, True] * 2
    assert {cell["constants"]["TOTAL_TRAIN_STEPS"] for cell in by_study["equal-compute"]} == {
        args.steps
    }
    assert [cell["constants"]["TOTAL_TRAIN_STEPS"] for cell in by_study["equal-tokens"][1:]] == [
        args.steps,
        133,
    ]
    grid = {
        (cell["constants"].get("BLOCK_SIZE"), size)
        for cell in by_study["block-size"]
        for size in cell["blocks"]
    }
    assert grid == {
        (train, size)
        for train in [*args.block_sizes, None, args.block_size]
        for size in args.block_sizes
    }


def test_shared_runs_are_trained_once():
    args, cells = cells_of("--seeds", "3")
    runs = study.make_runs(
        args, cells, {"MODEL_NAME": "m", "PT_FILE": "p", **args.constants}, "identity"
    )
    methods = [run["method"] for run in runs.values()]
    # blockwise: default, 2 block sizes, 3 prefixes, 2 suffixes, padding; fullseq: default, equal tokens, padding
    assert (
        methods.count("base") == 1
        and methods.count("blockwise") == 3 * 9
        and methods.count("fullseq") == 3 * 3
    )
    again = study.make_runs(
        args, cells, {"MODEL_NAME": "m", "PT_FILE": "p", **args.constants}, "another base"
    )
    assert not again.keys() & runs.keys()


def test_equal_tokens():
    """Blockwise supervises half a block a draw in the mean, full-sequence half an answer."""
    assert study.equal_token_steps(300, [64, 32], 32) == 300 * (32 + 32) // (64 + 32)
    assert study.equal_token_steps(300, [20], 32) == 300


def test_equal_compute_ends_where_the_blocks_do():
    """8,000 answers of 48 tokens have 24,000 blocks of 16, 16,000 of 32: 1,500 and 1,000 steps of 16 rows."""
    _, cells = cells_of("--steps", "5000")
    steps = {
        (cell["study"], cell["method"]): cell["constants"]["TOTAL_TRAIN_STEPS"] for cell in cells
    }
    assert steps["equal-compute", "fullseq"] == steps["equal-compute", "blockwise"] == 1500
    assert steps["block-size", "fullseq"] == steps["block-size", "blockwise"] == 1000
    assert steps["equal-tokens", "fullseq"] == 500


def test_what_decides_an_evaluation_is_in_its_name(base, tmp_path):
    def name(*more):
        args = study.parse_args([*words(base, tmp_path, "prefix"), *more])
        study.prepare(args)
        return study.decoding_folder("run", args, 8, 4)

    assert (
        len({name(), name("--limit", "3"), name("--batch_size", "7"), name("--gen_length", "32")})
        == 4
    )
    assert name() == name()


@pytest.mark.parametrize(
    "given, message",
    [
        ("prefixes", "prefixes: no study"),
        ("--seeds 0", "--seeds 0"),
        ("--model m", "--model alone"),
        ("--gen_length 60 --block_size 16", "--gen_length 60 is not divisible by the block of"),
        ("--constants SEED=3", "--constants SEED=3"),
        ("--constants BLOCKSIZE=3", "--constants BLOCKSIZE=3"),
        ("--constants LR", "--constants LR"),
        ("--tokens_per_step 0", "--tokens_per_step 0"),
    ],
)
def test_mistakes(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        study.parse_args(given.split())
    assert message in capsys.readouterr().err and ended.value.code == 2


def test_chains_are_worked_out_right():
    """Against a second interpreter; each step begins with the value before it."""
    rows = chains.problems(random.Random(4), 400, set())
    rules = {"max": lambda a, b: a if a > b else b, "min": lambda a, b: a if a < b else b}
    rules |= {
        "plus": lambda a, b: (a + b) if a + b < 10 else 9,
        "minus": lambda a, b: (a - b) if a > b else 0,
    }
    for row in rows:
        first, *instructions = row["query"].split(" ; ")
        *steps, last = row["response"].split(" ; ")
        value = int(first)
        for instruction, step in zip(instructions, steps, strict=True):
            label, operation, operand = instruction.split()
            result = rules[operation](value, int(operand))
            assert step == f"{label} {value} {operation} {operand} = {result}"
            value = result
        assert last == f"The answer is: {value}" and 5 <= len(steps) <= 8
    assert len({row["query"] for row in rows}) == 400


def test_the_base_reads_what_pt_writes(base):
    tokenizer = pt.load_tokenizer(str(base / "model"))
    train, test = (read(base / "data" / f"{name}.jsonl") for name in ("train", "test"))
    assert not {row["query"] for row in train} & {row["query"] for row in test}
    ids, prompt_len = chains.encode(tokenizer, train)
    assert (ids.shape[1] - prompt_len >= chains.GEN_LENGTH).all()
    for row, full, start in zip(train, ids, prompt_len, strict=True):
        text = tokenizer.decode(full[start:], skip_special_tokens=True)
        assert text == " " + row["response"] or text == row["response"]
        assert not (full == tokenizer.unk_token_id).any() if tokenizer.unk_token_id else True


def test_the_base_learns(base):
    """Forty steps on one batch of chains lower the loss of that batch."""
    tokenizer = pt.load_tokenizer(str(base / "model"))
    ids, prompt_len = chains.encode(tokenizer, read(base / "data" / "train.jsonl"))
    model = chains.LLaDAModelLM.from_pretrained(base / "model", dtype=torch.float32)
    loss = lambda: chains.denoising_loss(
        model, ids, prompt_len, torch.Generator().manual_seed(9)
    ).item()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "PRETRAIN_STEPS", 40)
        before = loss()
        chains.pretrain(model, ids, prompt_len, torch.Generator().manual_seed(0))
    assert (
        before == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), rel=0.05)
        and loss() < 0.9 * before
    )


def test_mean_and_interval():
    """Against the definition, with Student's quantile for four degrees of freedom."""
    mean, half = plot.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert plot.mean_interval([2.0, 2.0]) == (2, 0)


def test_loss_curves(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}_logs").mkdir()
        lines = "".join(f"{step},{3 / step}\n" for step in range(1, 30))
        (tmp_path / f"{name}_logs" / "train_loss.csv").write_text("step,loss\n" + lines)
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure) or path)
    plot.draw_losses(
        [str(tmp_path / f"{name}_logs" / "train_loss.csv") for name in "ab"], "out.png", 4
    )
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert "step" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    raw, smooth = axes.lines[:2]
    assert (
        smooth.get_ydata()[9] == pytest.approx(sum(raw.get_ydata()[6:10]) / 4)
        and len(axes.lines) == 4
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("step,loss\n", "has no lines"),
        ("a,b\n1,2\n", "no column step"),
        ("step,loss\n1,x\n", "line 2"),
    ],
)
def test_bad_curves(tmp_path, content, message):
    path = tmp_path / "train_loss.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        plot.draw_losses([str(path)], str(tmp_path / "out.png"), 4)
    assert not os.path.exists(tmp_path / "out.png")
