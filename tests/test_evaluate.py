"""An evaluation can be stopped anywhere, says what it measured, and compares answers as a person would."""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import chains
import evaluate
import grade
import pytest
import torch
from conftest import launch, user_environment


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of chains with random weights, and its problems."""
    folder = tmp_path_factory.mktemp("chains") / "base"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PRETRAIN_STEPS": 0,
            "PRETRAIN_ROWS": 200,
            "TRAIN_ROWS": 50,
            "TEST_ROWS": 14,
        }.items():
            patch.setattr(chains, name, value)
        chains.build(str(folder), seed=1)
    return folder


WORDS = (
    "--gen_length 12 --block_length 4 --steps 6 --batch_size 4 --device cpu --dtype float32".split()
)


def words(base, output, *more):
    data = [
        "--model",
        str(base / "model"),
        "--dataset",
        str(base / "data" / "test.jsonl"),
        "--output",
        str(output),
    ]
    return [*data, *WORDS, *more]


def generations(folder):
    """generations.jsonl without times."""
    records = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in records
    ]


def timeless(summary):
    return {
        name: value
        for name, value in summary.items()
        if name not in ("seconds", "tokens_per_second")
    }


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An evaluation that nobody stopped: its folder and summary."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    return folder, evaluate.main(words(base, folder))


def test_what_is_written(base, whole):
    folder, summary = whole
    assert json.loads((folder / "summary.json").read_text()) == summary
    records = generations(folder)
    rows = [json.loads(line) for line in (base / "data" / "test.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(14)) and summary["count"] == 14
    assert [record["query"] for record in records] == [row["query"] for row in rows]
    assert [record["gold"] for record in records] == [
        row["response"].split(": ")[-1] for row in rows
    ]
    assert summary["accuracy"] == sum(record["correct"] for record in records) / 14
    assert summary["exact_match"] == sum(record["exact_match"] for record in records) / 14
    assert summary["forwards"] == sum(record["forwards"] for record in records) <= 6 * 14
    assert summary["tokens"] == sum(record["tokens"] for record in records) <= 12 * 14
    assert {"torch", "transformers", "math-verify"} <= summary["versions"].keys()
    settings = summary["settings"]
    assert {
        "gen_length",
        "block_length",
        "steps",
        "temperature",
        "threshold",
        "seed",
        "dtype",
    } <= settings.keys()
    assert not re.search(
        r"/|\d\d:\d\d", json.dumps({**settings, "prompt": "", "model": settings["model"]})
    )


@pytest.mark.parametrize("cut", [0, 3, 5, 9, 13])
def test_a_stopped_evaluation_goes_on(base, whole, tmp_path, cut):
    """Cut off after any answer, in the middle of a batch or of a line."""
    folder = tmp_path / "results"
    folder.mkdir()
    lines = (whole[0] / "generations.jsonl").read_text().splitlines(keepends=True)
    order = [i for batch in evaluate.make_batches(prompts_of(base), 4) for i in batch]
    kept = [lines[i] for i in order][: cut + 1]
    (folder / "generations.jsonl").write_text("".join(kept)[: -len(kept[-1]) // 2])
    (folder / "settings.json").write_text((whole[0] / "settings.json").read_text())
    summary = evaluate.main(words(base, folder))
    assert generations(folder) == generations(whole[0]) and timeless(summary) == timeless(whole[1])


def prompts_of(base):
    tokenizer = evaluate.pt.load_tokenizer(str(base / "model"))
    queries = [
        json.loads(line)["query"]
        for line in (base / "data" / "test.jsonl").read_text().splitlines()
    ]
    return evaluate.decode.encode_prompts(tokenizer, queries)


def test_a_finished_one_is_only_read(base, whole, monkeypatch):
    monkeypatch.setattr(evaluate.decode, "decode", None)
    before = (whole[0] / "generations.jsonl").read_bytes()
    assert evaluate.main(words(base, whole[0])) == whole[1]
    assert (whole[0] / "generations.jsonl").read_bytes() == before


def test_two_processes_killed_and_started_again_give_the_same(base, whole, tmp_path):
    """Under the launcher, on two ranks that share out the batches; all killed as the first answers are there."""
    results = tmp_path / "results"
    command = [
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        "29617",
        evaluate.__file__,
        *words(base, results),
    ]
    killed = subprocess.Popen(command, cwd=tmp_path, env=user_environment(), start_new_session=True)
    while not (results / "generations.jsonl").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (results / "summary.json").exists()
    status, printed = launch(command, tmp_path)
    assert status == 0 and "accuracy" in printed, printed
    assert generations(results) == generations(whole[0])
    assert timeless(json.loads((results / "summary.json").read_text())) == timeless(whole[1])


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--steps", "12"], "steps 6, now 12"),
        (["--limit", "5"], "count 14, now 5"),
        (["--batch_size", "2"], "batch_size 4, now 2"),
        (["--dtype", "bfloat16"], "dtype 'float32', now 'bfloat16'"),
        (["--threshold", "0.9"], "threshold None, now 0.9"),
    ],
)
def test_other_settings_are_refused(base, whole, changed, message):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(words(base, whole[0], *changed))
    assert message in str(ended.value.code)


def test_another_model_or_other_problems_are_refused(base, whole, tmp_path):
    (tmp_path / "model").mkdir()
    for path in (base / "model").iterdir():
        if path.is_file():
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    other = words(base, whole[0], "--model", str(tmp_path / "model"))
    assert evaluate.main(other) == whole[1]  # a copy is the same model
    state = evaluate.decode.load_model(str(tmp_path / "model"))
    state.model.transformer.ff_out.weight.data[3] += 0.5
    state.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"model '"):
        evaluate.main(other)
    rows = (base / "data" / "test.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[::-1]))
    with pytest.raises(SystemExit, match="problems_sha256"):
        evaluate.main(words(base, whole[0], "--dataset", str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("", "has no problems"),
        ('{"query": "a", "answer": "1"}\nx\n', "line 2 is no JSON"),
        ('{"query": "", "answer": "1"}\n', "line 1 has no text `query`"),
        ('{"question": "a", "answer": "1"}\n', "line 1 has no text `query`"),
        ('{"query": "a"}\n', "line 1 has no text `query`"),
        ("[1]\n", "line 1 has no text `query`"),
        ('{"query": "a", "response": "so it\\nis so"}\n', "problem 1 has no final answer"),
        (b"\xff\n", "cannot be read"),
        (
            '{"query": "a"  , "answer": "1"}\n{"query": "<|mdm_mask|>", "answer": "1"}\n',
            "prompt 2 spells the mask token",
        ),
    ],
)
def test_bad_problems(base, tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        evaluate.main(words(base, tmp_path / "out", "--dataset", str(path)))
    assert message in str(ended.value.code)


def test_bad_flags(base, tmp_path, capsys):
    for more, message in (
        (["--batch_size", "0"], "--batch_size 0"),
        (["--limit", "-1"], "--limit -1"),
        (["--steps", "7"], "steps 7 is not divisible by the 3 blocks"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(words(base, tmp_path / "out", *more))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--gen_length 400: .* exceeds the 256 of"):
        evaluate.main(words(base, tmp_path / "out", "--gen_length", "400", "--steps", "100"))


def test_folders_of_something_else_are_left_alone(base, tmp_path):
    for name, text, message in (
        ("generations.jsonl", "{}", r"has a generations\.jsonl but no settings\.json"),
        ("summary.json", "{}", r"has a summary\.json but no settings\.json"),
        ("settings.json", "[1]", r"settings\.json is damaged, or not of an evaluation"),
        ("settings.json", "{", r"settings\.json is damaged, or not of an evaluation"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_text(text)
        if name == "settings.json":
            (folder / "generations.jsonl").write_text("")
        with pytest.raises(SystemExit, match=message):
            evaluate.main(words(base, folder))
        assert (folder / name).read_text() == text


def test_an_evaluation_whose_generations_are_removed_is_done_again(base, whole, tmp_path):
    for name in ("settings.json", "summary.json"):
        (tmp_path / name).write_text(
            (whole[0] / name).read_text().replace('"accuracy": 0', '"accuracy": 9')
        )
    assert timeless(evaluate.main(words(base, tmp_path))) == timeless(whole[1])


def test_without_math_verify_nothing_is_generated(base, tmp_path, monkeypatch):
    script = tmp_path / "grade.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setattr(grade, "__file__", str(script))
    grade.check.cache_clear()
    with pytest.raises(SystemExit, match="math-verify does not work"):
        evaluate.main(words(base, tmp_path / "out"))
    grade.check.cache_clear()


def test_a_model_that_ignores_the_mask_is_refused(base, tmp_path, monkeypatch):
    load = evaluate.decode.load_model

    def deaf(*how):
        model = load(*how)
        forward = model.forward
        model.forward = lambda input_ids, attention_mask=None: forward(input_ids=input_ids)
        return model

    monkeypatch.setattr(evaluate.decode, "load_model", deaf)
    with pytest.raises(SystemExit, match=r"ignores attention_mask.*--batch_size 1"):
        evaluate.main(words(base, tmp_path / "out"))
    assert (
        evaluate.main(words(base, tmp_path / "out", "--batch_size", "1", "--limit", "2"))["count"]
        == 2
    )


def test_final_answers():
    for text, answer in {
        "2 + 3 = 5\n#### 5\nThe answer is: 5": "5",
        "The answer is 1. No: the answer is: \\frac{1}{2}.": "\\frac{1}{2}",
        "so\n#### 1,234": "1,234",
        "thus \\boxed{x^{2}+\\frac{1}{2}} and done": "x^{2}+\\frac{1}{2}",
        "The answer is:\n7": None,
        "\\boxed{1": None,
        "it is 5": None,
        "The answer is: $\\boxed{5}$.": "5",
        "We look for what the answer is in units of x.\n\\boxed{3}": "3",
        "The answer is: 5. So 7 are left": "5",
        "The answer is: 2.50": "2.50",
        "": None,
    }.items():
        assert grade.final_answer(text) == answer, text


VERDICTS = [  # text, gold, equal, exact
    ("The answer is: 18.", "18", True, True),
    ("The answer is: $18", "18", True, True),
    ("The answer is: 1,800", "1800", True, True),
    ("The answer is: 0.5", "\\frac{1}{2}", True, False),
    ("The answer is: x + 1", "1+x", True, False),
    ("so \\boxed{\\frac{4}{8}}", "1/2", True, False),
    ("It is 7", "7", True, False),
    ("The answer is: 17", "18", False, False),
    ("The answer is: -18", "18", False, False),
    ("", "18", False, False),
    ("The answer is: }{", "18", False, False),
]


def test_verdicts():
    pairs = [(text, gold) for text, gold, *_ in VERDICTS]
    assert list(grade.grade(pairs)) == [equal for *_, equal, _ in VERDICTS]
    assert [grade.exact_match(*pair) for pair in pairs] == [exact for *_, exact in VERDICTS]


HANG = """
    if text == "hang":
        return bool(10**10**10)
    if text == "memory":
        return bool(bytearray(1 << 36))
    answer = final_answer(text)
    found"""


def test_a_comparison_that_hangs_or_eats_memory_is_ended(monkeypatch, tmp_path):
    """The others are graded; the process is ended from outside, in the middle of a computation in C."""
    source = Path(grade.__file__).read_text()
    changed = source.replace("SECONDS, GIGABYTES = 30, 4", "SECONDS, GIGABYTES = 2, 4")
    changed = changed.replace("\n    answer = final_answer(text)\n    found", HANG)
    assert "hang" in changed and "= 2, 4" in changed
    (tmp_path / "grade.py").write_text(changed)
    monkeypatch.setattr(grade, "__file__", str(tmp_path / "grade.py"))
    pairs = [("7", "7"), ("hang", "7"), ("7", "7"), ("memory", "7"), ("8", "7")]
    assert list(grade.grade(pairs)) == [True, None, True, False, False]


def test_accuracy_counts_right_answers(base, tmp_path, monkeypatch):
    """A decoder that answers two of three problems right, one of them in another form."""
    tokenizer = evaluate.pt.load_tokenizer(str(base / "model"))
    rows = [json.loads(line) for line in (base / "data" / "test.jsonl").read_text().splitlines()]
    right = {
        tuple(ids): row["response"][-1] for ids, row in zip(prompts_of(base), rows, strict=True)
    }
    order = list(right)

    def fixed(model, prompts, *, seeds, **_):
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            assert order[seed] == tuple(prompt)
            digit = int(right[tuple(prompt)])
            text = (" The answer is: %d", " 3 plus %d", " The answer is: %d")[seed % 3] % (
                digit + (seed % 3 == 2)
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            answers.append(
                torch.tensor([*ids, tokenizer.get_vocab()["<|eot_id|>"], *[0] * 12])[:12]
            )
        return torch.stack(answers)

    monkeypatch.setattr(evaluate.decode, "decode", fixed)
    summary = evaluate.main(words(base, tmp_path / "out"))
    wrong = [i for i in range(14) if i % 3 == 2]
    assert [
        record["index"] for record in generations(tmp_path / "out") if not record["exact_match"]
    ] == sorted(wrong + [i for i in range(14) if i % 3 == 1])
    assert summary["exact_match"] == 5 / 14
    assert not any(
        record["correct"] for record in generations(tmp_path / "out") if record["index"] in wrong
    )
    assert all(
        record["correct"] for record in generations(tmp_path / "out") if record["index"] % 3 == 0
    )


def test_interval():
    """Wilson's, against its own definition: the shares at which the observed one is 1.96 deviations away."""
    for right, count in ((0, 10), (3, 10), (700, 1000), (50, 50)):
        low, high = evaluate.interval_95(right, count)
        for p in (low, high):
            assert abs(right / count - p) == pytest.approx(
                1.959964 * math.sqrt(max(0, p * (1 - p)) / count), abs=1e-7
            )
        assert 0 <= low < high <= 1
