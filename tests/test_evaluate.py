"""An evaluation can be stopped anywhere, says what it measured, and grades as a person would."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import decode
import evaluate
import files
import grade
import pytest
import suite
import torch

import pt

COUNT = 14  # problems
BATCH_SIZE = 4
OPTIONS = {"gen_length": 12, "block_length": 4, "steps": 6, "batch_size": BATCH_SIZE}
OPTIONS |= {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def model(toy_folder):
    return toy_folder / "model"


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A .jsonl of sums, whose prompts have several lengths; the answers are 0 to 13."""
    path = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    with open(path, "w") as file:
        for number in range(COUNT):
            ones = " + ".join(["1"] * number)
            row = {"query": f"What is 0 + {ones}?", "response": f"The answer is: {number}"}
            file.write(json.dumps(row) + "\n")
    return path


def words(model, problems, output, **changes):
    """The command line of an evaluation."""
    flags = {"model": model, "dataset": problems, "output": output, **OPTIONS, **changes}
    return suite.flags(flags)


@pytest.fixture(scope="module")
def whole(model, problems, tmp_path_factory):
    """An evaluation that nobody stopped: its folder and summary."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    return folder, evaluate.main(words(model, problems, folder))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def generations(folder):
    """The records of generations.jsonl without times."""
    records = read_lines(folder / "generations.jsonl")
    for record in records:
        del record["seconds"]
    return records


def timeless(summary):
    return {k: v for k, v in summary.items() if k not in ("seconds", "tokens_per_second")}


def prompt_ids(model, problems):
    tokenizer = pt.load_tokenizer(str(model))
    queries = [row["query"] for row in read_lines(problems)]
    return decode.encode_prompts(tokenizer, queries)


# ---------------------------------------------------------------------- what an evaluation leaves


def test_what_is_written(problems, whole):
    folder, summary = whole
    assert json.loads((folder / "summary.json").read_text()) == summary
    records = generations(folder)
    assert summary["count"] == COUNT
    assert [record["index"] for record in records] == list(range(COUNT))
    assert [record["gold"] for record in records] == [str(number) for number in range(COUNT)]
    queries = [row["query"] for row in read_lines(problems)]
    assert [record["query"] for record in records] == queries
    assert summary["accuracy"] == sum(record["correct"] for record in records) / COUNT
    assert summary["exact_match"] == sum(record["exact_match"] for record in records) / COUNT
    assert summary["forwards"] == sum(record["forwards"] for record in records) <= 6 * COUNT
    assert summary["tokens"] == sum(record["tokens"] for record in records) <= 12 * COUNT


def test_settings_say_what_can_change_an_answer_without_paths_and_times(whole):
    summary = whole[1]
    assert {"torch", "transformers", "math-verify"} <= summary["versions"].keys()
    settings = summary["settings"]
    names = set(OPTIONS) | {"remasking", "temperature", "threshold", "seed", "mask_id", "eos_id"}
    assert names <= settings.keys()
    text = json.dumps(settings | {"prompt": ""})
    assert not re.search(r"/|\d\d:\d\d", text)


def test_accuracy_counts_correct_answers(model, problems, tmp_path, monkeypatch):
    """Of a decoder whose answers are correct, correct in another form, and wrong, in turn."""
    tokenizer = pt.load_tokenizer(str(model))
    end = tokenizer.get_vocab()["<|eot_id|>"]

    def decode_as_planned(model, prompts, *, seeds, **_):
        answers = torch.full((len(prompts), 12), end)
        for row, number in enumerate(seeds):  # with --seed 0
            forms = (f"The answer is: {number}", f"{number}.0", f"The answer is: {number + 1}")
            ids = tokenizer(forms[number % 3], add_special_tokens=False)["input_ids"]
            answers[row, : len(ids)] = torch.tensor(ids)
        return answers

    monkeypatch.setattr(decode, "decode", decode_as_planned)
    summary = evaluate.main(words(model, problems, tmp_path / "out"))
    records = generations(tmp_path / "out")
    assert [record["exact_match"] for record in records] == [i % 3 == 0 for i in range(COUNT)]
    assert [record["correct"] for record in records] == [i % 3 < 2 for i in range(COUNT)]
    assert (summary["exact_match"], summary["accuracy"]) == (5 / 14, 10 / 14)


def test_interval():
    """Wilson's, by its definition: proportions from which the observed one is 1.96 deviations."""
    for correct, count in ((0, 10), (3, 10), (700, 1000), (50, 50)):
        low, high = evaluate.interval_95(correct, count)
        assert 0 <= low < high <= 1
        for p in (low, high):
            deviation = math.sqrt(max(0, p * (1 - p)) / count)
            assert abs(correct / count - p) == pytest.approx(1.959964 * deviation, abs=1e-7)


# ------------------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize("cut", [0, 3, 5, 9, 13])
def test_a_stopped_evaluation_resumes(model, problems, whole, tmp_path, cut):
    """Stopped in the middle of the line of answer `cut`, in the middle of a batch or not."""
    folder = tmp_path / "results"
    folder.mkdir()
    lines = (whole[0] / "generations.jsonl").read_text().splitlines(keepends=True)
    order = []
    for batch in evaluate.make_batches(prompt_ids(model, problems), BATCH_SIZE):
        order += batch
    kept = [lines[number] for number in order[: cut + 1]]
    kept[-1] = kept[-1][: len(kept[-1]) // 2]
    (folder / "generations.jsonl").write_text("".join(kept))
    shutil.copy(whole[0] / "settings.json", folder)
    summary = evaluate.main(words(model, problems, folder))
    assert generations(folder) == generations(whole[0])
    assert timeless(summary) == timeless(whole[1])


def test_a_finished_evaluation_is_only_read(model, problems, whole, monkeypatch):
    monkeypatch.setattr(decode, "decode", None)
    before = (whole[0] / "generations.jsonl").read_bytes()
    assert evaluate.main(words(model, problems, whole[0])) == whole[1]
    assert (whole[0] / "generations.jsonl").read_bytes() == before


def test_without_generations_it_is_done_again(model, problems, whole, tmp_path):
    """settings.json and summary.json alone are not an evaluation."""
    shutil.copy(whole[0] / "settings.json", tmp_path)
    files.write_json(tmp_path / "summary.json", whole[1] | {"accuracy": 9})
    assert timeless(evaluate.main(words(model, problems, tmp_path))) == timeless(whole[1])


def test_two_ranks_killed_and_started_again_give_the_same(model, problems, whole, tmp_path):
    """Under the launcher; all processes are killed when the first answers are there."""
    results = tmp_path / "results"
    arguments = words(model, problems, results)
    command = [*suite.launcher(2), evaluate.__file__, *arguments]
    env = suite.user_environment()
    killed = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True)
    while not (results / "generations.jsonl").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (results / "summary.json").exists()

    log = tmp_path / "log"
    with open(log, "w") as file:
        command = [*suite.launcher(2), evaluate.__file__, *arguments]
        status = suite.run(command, tmp_path, file)
    assert status == 0, log.read_text()
    assert "95 % interval" in log.read_text()
    assert generations(results) == generations(whole[0])
    summary = json.loads((results / "summary.json").read_text())
    assert timeless(summary) == timeless(whole[1])


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({}, None),
        ({"LOCAL_SIZE": "1"}, None),
        ({"LOCAL_SIZE": "3"}, 2),
        ({"LOCAL_WORLD_SIZE": "2"}, 4),
        ({"LOCAL_SIZE": "16"}, 1),
        ({"LOCAL_SIZE": "3", "OMP_NUM_THREADS": "5"}, None),
    ],
)
def test_ranks_share_the_cores(environment, threads, monkeypatch):
    """Of 8 cores."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    evaluate.share_cores("cuda:0")
    assert given == []
    evaluate.share_cores("cpu")
    assert given == ([] if threads is None else [threads])


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"steps": 12}, "steps was 6, now 12"),
        ({"limit": 5}, "count was 14, now 5"),
        ({"batch_size": 2}, "batch_size was 4, now 2"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
        ({"threshold": 0.9}, "threshold was None, now 0.9"),
    ],
)
def test_other_settings_are_refused(model, problems, whole, changed, message):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(words(model, problems, whole[0], **changed))
    assert message in str(ended.value.code)


def test_another_model_is_refused(model, problems, whole, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    arguments = words(copy, problems, whole[0])
    assert evaluate.main(arguments) == whole[1]  # a copy is the same model
    other = decode.load_model(str(copy))
    other.get_output_embeddings().weight.data[3] += 0.5
    other.save_pretrained(copy)
    with pytest.raises(SystemExit, match="model was '"):
        evaluate.main(arguments)


def test_other_problems_are_refused(model, problems, whole, tmp_path):
    lines = problems.read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(SystemExit, match="problems_sha256"):
        evaluate.main(words(model, tmp_path / "rows.jsonl", whole[0]))


GOOD = '{"query": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        (b"", "has no problems"),
        (f"{GOOD}x\n".encode(), "line 2 is not JSON"),
        (b'{"query": "", "answer": "1"}\n', "line 1 needs a text `query`"),
        (b'{"question": "a", "answer": "1"}\n', "line 1 needs a text `query`"),
        (b'{"query": "a"}\n', "line 1 needs a text `query`"),
        (b"[1]\n", "line 1 needs a text `query`"),
        (b'{"query": "a", "response": "so it\\nis so"}\n', "problem 1 has no final answer"),
        (b"\xff\n", "cannot be read"),
        (
            f'{GOOD}{{"query": "<|mdm_mask|>", "answer": "1"}}\n'.encode(),
            "prompt 2 contains the mask token",
        ),
    ],
)
def test_bad_problems(model, tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        evaluate.main(words(model, path, tmp_path / "out"))
    assert message in str(ended.value.code)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"limit": -1}, "--limit -1: must be at least 1"),
        ({"steps": 7}, "steps 7 is not divisible by the 3 blocks"),
    ],
)
def test_bad_flags(model, problems, tmp_path, changed, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(words(model, problems, tmp_path / "out", **changed))
    assert message in capsys.readouterr().err


def test_answers_longer_than_the_model_are_refused(model, problems, tmp_path):
    too_long = {"gen_length": 10**6, "block_length": 0, "steps": 1}
    with pytest.raises(SystemExit, match=r"--gen_length 1000000: .* exceeds the \d+ tokens of"):
        evaluate.main(words(model, problems, tmp_path / "out", **too_long))


@pytest.mark.parametrize(
    "contents, message",
    [
        ({"generations.jsonl": "{}"}, r"has generations\.jsonl but no settings\.json"),
        ({"summary.json": "{}"}, r"has summary\.json but no settings\.json"),
        (
            {"settings.json": "[1]", "generations.jsonl": ""},
            r"settings\.json is damaged, or not of an evaluation",
        ),
        (
            {"settings.json": "{", "generations.jsonl": ""},
            r"settings\.json is damaged, or not of an evaluation",
        ),
    ],
)
def test_a_folder_of_something_else_is_left_alone(model, problems, tmp_path, contents, message):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        evaluate.main(words(model, problems, tmp_path))
    for name, text in contents.items():
        assert (tmp_path / name).read_text() == text


def test_without_math_verify_nothing_is_generated(model, problems, tmp_path, monkeypatch):
    script = tmp_path / "grade.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setattr(grade, "__file__", str(script))
    grade.check.cache_clear()
    with pytest.raises(SystemExit, match="math-verify does not work"):
        evaluate.main(words(model, problems, tmp_path / "out"))
    assert not (tmp_path / "out" / "generations.jsonl").exists()
    grade.check.cache_clear()


def test_a_model_that_ignores_the_mask_is_refused(model, problems, tmp_path, monkeypatch):
    load_model = decode.load_model

    def load_ignorant_model(*how):
        loaded = load_model(*how)
        forward = loaded.forward

        def ignorant(input_ids, attention_mask=None):
            return forward(input_ids=input_ids)

        loaded.forward = ignorant
        return loaded

    monkeypatch.setattr(decode, "load_model", load_ignorant_model)
    with pytest.raises(SystemExit, match=r"ignores attention_mask.*--batch_size 1"):
        evaluate.main(words(model, problems, tmp_path / "out"))
    one_by_one = words(model, problems, tmp_path / "out", batch_size=1, limit=2)
    assert evaluate.main(one_by_one)["count"] == 2


# ---------------------------------------------------------------------------------------- grading


@pytest.mark.parametrize(
    "text, answer",
    [
        ("2 + 3 = 5\n#### 5\nThe answer is: 5", "5"),
        ("The answer is 1. No: the answer is: \\frac{1}{2}.", "\\frac{1}{2}"),
        ("so\n#### 1,234", "1,234"),
        ("thus \\boxed{x^{2}+\\frac{1}{2}} and done", "x^{2}+\\frac{1}{2}"),
        ("The answer is:\n7", None),
        ("\\boxed{1", None),
        ("it is 5", None),
        ("The answer is: $\\boxed{5}$.", "5"),
        ("We look for what the answer is in units of x.\n\\boxed{3}", "3"),
        ("The answer is: 5. So 7 are left", "5"),
        ("The answer is: 2.50", "2.50"),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert grade.final_answer(text) == answer


VERDICTS = [  # text, gold, equal, exact match
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
    pairs = [(text, gold) for text, gold, _, _ in VERDICTS]
    assert list(grade.grade(pairs)) == [equal for _, _, equal, _ in VERDICTS]
    assert [grade.exact_match(*pair) for pair in pairs] == [exact for *_, exact in VERDICTS]


STUBBORN = """
import grade

def equal(text, gold):
    if text == "hang":
        return bool(10**10**10)
    if text == "memory":
        return bool(bytearray(1 << 36))
    return text == gold

grade.SECONDS = 2
grade.equal = equal
grade.main()
"""


def test_a_comparison_that_hangs_or_fills_the_memory_is_ended(monkeypatch, tmp_path):
    """From outside, in the middle of a computation in C; the other comparisons are made."""
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    monkeypatch.setattr(grade, "__file__", str(script))
    monkeypatch.setenv("PYTHONPATH", str(Path(suite.__file__).parent))
    pairs = [("7", "7"), ("hang", "7"), ("7", "7"), ("memory", "7"), ("8", "7")]
    assert list(grade.grade(pairs)) == [True, None, True, False, False]


# ------------------------------------------------------------------------------------------ files


def test_a_file_appears_only_when_whole(tmp_path):
    """While another process writes it again and again, and after that process is killed."""
    path = tmp_path / "content.json"
    content = ["a"] * 200_000
    script = f"import files\nwhile True: files.write_json({str(path)!r}, ['a'] * 200_000)"
    environment = os.environ | {"PYTHONPATH": str(Path(suite.__file__).parent)}
    writer = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        while not path.exists():
            assert writer.poll() is None
        for _ in range(30):
            assert json.loads(path.read_text()) == content
    finally:
        writer.kill()
        writer.wait()
    assert json.loads(path.read_text()) == content


def test_digests(tmp_path):
    """Texts do not run into each other, and a file's digest is that of its contents."""
    assert files.digest("ab", "c") != files.digest("a", "bc")
    path = tmp_path / "file"
    path.write_bytes(b"ab\0c")
    assert files.file_digest(path) == files.digest("ab", "c")
