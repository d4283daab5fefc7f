"""An evaluation can be stopped anywhere, says what it measured, and grades as a person would."""

import fcntl
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
from types import SimpleNamespace

import datasets
import decode
import evaluate
import lm_eval
import pytest
import suite
import torch
from tasks import grade

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


def run(arguments):
    """The summary of an evaluation in this process, with these words as its command line."""
    return evaluate.main(evaluate.parse_args(arguments))


@pytest.fixture(scope="module")
def whole(model, problems, tmp_path_factory):
    """An evaluation that nobody stopped: its folder and summary."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    return folder, run(words(model, problems, folder))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder):
    """The records of all answers without times, in order."""
    records = []
    for path in (folder / "answers").glob("*.json"):
        records += json.loads(path.read_text())
    for record in records:
        del record["seconds"]
    return sorted(records, key=lambda record: record["index"])


def samples(folder):
    """What the harness found of each problem, in order."""
    return read_lines(folder / "samples.jsonl")


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
    records = answers(folder)
    graded = samples(folder)
    assert summary["count"] == COUNT
    assert [record["index"] for record in records] == list(range(COUNT))
    assert [sample["doc_id"] for sample in graded] == list(range(COUNT))
    assert [sample["target"] for sample in graded] == [str(number) for number in range(COUNT)]
    queries = [row["query"] for row in read_lines(problems)]
    assert [sample["doc"]["query"] for sample in graded] == queries
    assert [sample["resps"] for sample in graded] == [[[record["text"]]] for record in records]
    assert summary["accuracy"] == sum(sample["math_verify"] for sample in graded) / COUNT
    assert summary["exact_match"] == sum(sample["exact_match"] for sample in graded) / COUNT
    assert summary["forwards"] == sum(record["forwards"] for record in records) <= 6 * COUNT
    assert summary["tokens"] == sum(record["tokens"] for record in records) <= 12 * COUNT


def test_prompts_are_those_of_training(model, problems, whole):
    """Those that pt.py writes."""
    tokenizer = pt.load_tokenizer(str(model))
    contexts = [sample["arguments"][0][0] for sample in samples(whole[0])]
    ids = tokenizer(contexts, add_special_tokens=False)["input_ids"]
    assert ids == prompt_ids(model, problems)


def test_settings_say_what_can_change_an_answer_without_paths_and_times(whole):
    summary = whole[1]
    assert {"torch", "transformers", "lm_eval", "math-verify"} <= summary["versions"].keys()
    settings = summary["settings"]
    names = set(OPTIONS) | {"remasking", "temperature", "threshold", "seed", "mask_id", "eos_id"}
    assert names <= settings.keys()
    assert not re.search(r"/|\d\d:\d\d", json.dumps(settings))


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
    summary = run(words(model, problems, tmp_path / "out"))
    graded = samples(tmp_path / "out")
    assert [sample["exact_match"] for sample in graded] == [i % 3 == 0 for i in range(COUNT)]
    assert [sample["math_verify"] for sample in graded] == [i % 3 < 2 for i in range(COUNT)]
    assert (summary["exact_match"], summary["accuracy"]) == (5 / 14, 10 / 14)


def test_an_answer_ends_where_the_chat_template_ends_it(model, problems, tmp_path, monkeypatch):
    """Of a model whose turns end with another token than LLaDA's: what follows is not kept."""
    renamed = tmp_path / "model"
    renamed.mkdir()
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja"):
            text = path.read_text().replace("<|eot_id|>", "<|role_end|>")
            (renamed / path.name).write_text(text)
        else:
            (renamed / path.name).symlink_to(path)
    tokenizer = pt.load_tokenizer(str(renamed))
    text = "The answer is: 5<|role_end|> The answer is: 6<|endoftext|> The"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = ids.index(tokenizer.get_vocab()["<|role_end|>"])

    def decode_as_planned(model, prompts, *, gen_length, eos_id, eot_id, **_):
        assert (eos_id, eot_id) == (tokenizer.eos_token_id, ids[end])
        return torch.tensor([(ids * gen_length)[:gen_length]] * len(prompts))

    monkeypatch.setattr(decode, "decode", decode_as_planned)
    size = {"gen_length": 64, "block_length": 64, "limit": 2}
    run(words(renamed, problems, tmp_path / "out", **size))
    for record in answers(tmp_path / "out"):
        assert (record["text"], record["tokens"]) == ("The answer is: 5", end + 1)


@pytest.mark.parametrize("metrics", [["exact_match", "math_verify"], ["acc", "exact_match"]])
def test_accuracy_is_math_verify_or_the_first_metric(metrics):
    """Of the last filter, for every number of right answers."""
    name = "math_verify" if "math_verify" in metrics else "acc"
    task = SimpleNamespace(task_name="t", aggregation=lambda: dict.fromkeys(metrics))
    record = {"tokens": 3, "forwards": 2, "seconds": 1.0}
    for right in range(301):
        samples = [{"filter": f, name: int(i < right)} for f in "ab" for i in range(300)]
        found = {f"{name},a": 0.5, f"{name},b": right / 300, f"{name}_stderr,b": "N/A", "alias": ""}
        results = {"results": {"t": found}, "samples": {"t": samples}}
        summary = evaluate.summarize(task, results, [record] * 300)
        assert summary["accuracy"] == right / 300
        assert summary["interval_95"] == evaluate.interval_95(right, 300)
        assert (summary["count"], summary["tokens"]) == (300, 900)
        assert summary["metrics"] == {f"{name},a": 0.5, f"{name},b": right / 300}


def test_answers_that_cannot_be_graded_are_counted(model, problems, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    verdicts = iter([True, None] * COUNT)
    monkeypatch.setattr(grade, "check", lambda: None)
    monkeypatch.setattr(grade, "equal_in_time", lambda *_: next(verdicts))
    summary = run(words(model, problems, tmp_path / "out"))
    assert (summary["ungraded"], summary["accuracy"]) == (COUNT / 2, 0.5)


def test_interval():
    """Wilson's, by its definition: proportions from which the observed one is 1.96 deviations."""
    for correct, count in ((0, 10), (3, 10), (700, 1000), (50, 50)):
        low, high = evaluate.interval_95(correct, count)
        assert 0 <= low < high <= 1
        for p in (low, high):
            deviation = math.sqrt(max(0, p * (1 - p)) / count)
            assert abs(correct / count - p) == pytest.approx(1.959964 * deviation, abs=1e-7)


# ------------------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize("kept", [[], [0], [1, 3], [0, 1, 2, 3]])
def test_a_stopped_evaluation_resumes(model, problems, whole, tmp_path, kept):
    """Stopped while it wrote a batch, after the batches `kept`; at last, while it graded."""
    folder = tmp_path / "results"
    (folder / "answers").mkdir(parents=True)
    for number in kept:
        shutil.copy(whole[0] / "answers" / f"{number:05}.json", folder / "answers")
    (folder / "answers" / "00002.json.77.partial").write_text('[{"index": 3, "te')
    (folder / "samples.jsonl.77.partial").write_text('{"doc_id"')
    shutil.copy(whole[0] / "settings.json", folder)
    summary = run(words(model, problems, folder))
    assert answers(folder) == answers(whole[0])
    assert samples(folder) == samples(whole[0])
    assert timeless(summary) == timeless(whole[1])
    for number in kept:  # not generated again
        name = f"answers/{number:05}.json"
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_finished_evaluation_is_only_read(model, problems, whole, monkeypatch):
    monkeypatch.setattr(decode, "decode", None)
    monkeypatch.setattr(evaluate, "write_json", None)
    assert run(words(model, problems, whole[0])) == whole[1]


def test_an_evaluation_without_answers_is_begun_anew(model, problems, whole, tmp_path):
    """With other settings: so it may be after a batch that did not fit."""
    (tmp_path / "settings.json").write_bytes((whole[0] / "settings.json").read_bytes())
    summary = run(words(model, problems, tmp_path, batch_size=7))
    assert summary["settings"]["batch_size"] == 7


def test_processes_share_the_batches_and_the_last_one_grades(
    model, problems, whole, tmp_path, monkeypatch, capsys
):
    """As many as there are batches, one after another; only rank 0 shows its progress."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in (2, 0, 3, 1):
        monkeypatch.setenv("RANK", str(rank))
        summary = run(words(model, problems, tmp_path))
        assert (summary is None) == (rank != 1)
        assert ("%|" in capsys.readouterr().err) == (rank == 0)
        assert (tmp_path / "answers" / f"{rank:05}.json").exists()
        assert len(list((tmp_path / "answers").iterdir())) == {2: 1, 0: 2, 3: 3, 1: 4}[rank]
    assert answers(tmp_path) == answers(whole[0])
    assert timeless(summary) == timeless(whole[1])


def test_a_rank_that_does_not_know_how_many_there_are(model, problems, tmp_path, monkeypatch):
    """It would take the batches of all but the first."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="RANK is set, but not WORLD_SIZE"):
        run(words(model, problems, tmp_path))


def while_it_generates(action, monkeypatch):
    """Do `action` once, when an evaluation decodes its first batch."""
    decode_batch = decode.decode

    def act_and_decode(*prompts, **options):
        monkeypatch.setattr(decode, "decode", decode_batch)
        action()
        return decode_batch(*prompts, **options)

    monkeypatch.setattr(decode, "decode", act_and_decode)


def test_a_folder_in_use_is_not_begun_anew(model, problems, whole, tmp_path, monkeypatch):
    """By an evaluation with other settings, before the first answer is there; it is later."""
    refused = []

    def begin_another():
        with pytest.raises(SystemExit) as ended:
            run(words(model, problems, tmp_path, steps=12))
        refused.append(str(ended.value.code))

    while_it_generates(begin_another, monkeypatch)
    summary = run(words(model, problems, tmp_path))
    assert len(refused) == 1 and "steps was 6, now 12" in refused[0]
    assert f"--output {tmp_path} is in use by another evaluation with other settings" in refused[0]
    assert answers(tmp_path) == answers(whole[0])
    assert timeless(summary) == timeless(whole[1])
    for path in (tmp_path / "answers").iterdir():
        path.unlink()
    (tmp_path / "summary.json").unlink()
    assert run(words(model, problems, tmp_path, steps=12))["settings"]["steps"] == 12


def test_the_same_evaluation_is_joined(model, problems, whole, tmp_path, monkeypatch):
    """The second process, started while the first one generates, generates all that is missing."""
    joined = []
    arguments = words(model, problems, tmp_path)
    while_it_generates(lambda: joined.append(run(arguments)), monkeypatch)
    assert timeless(run(arguments)) == timeless(whole[1])
    assert timeless(joined[0]) == timeless(whole[1])
    assert answers(tmp_path) == answers(whole[0])


@pytest.mark.slow
def test_two_evaluations_started_together(model, problems, whole, tmp_path):
    """With other settings, one is refused and the other is whole."""
    runs = []
    for steps in (6, 12):
        command = [
            sys.executable,
            evaluate.__file__,
            *words(model, problems, tmp_path, steps=steps),
        ]
        env = suite.user_environment()
        runs.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    messages = {run.communicate()[1]: run.returncode for run in runs}
    assert sorted(messages.values()) == [0, 1]
    (refused,) = (message for message, status in messages.items() if status)
    assert f"--output {tmp_path} is in use by another" in refused or "has an evaluation" in refused
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["count"] == len(answers(tmp_path)) == COUNT
    if summary["settings"]["steps"] == 6:
        assert answers(tmp_path) == answers(whole[0])


@pytest.mark.slow
def test_two_ranks_killed_and_started_again_give_the_same(model, problems, whole, tmp_path):
    """Under the launcher; all processes are killed when the first answers are there."""
    results = tmp_path / "results"
    arguments = words(model, problems, results)
    command = [*suite.launcher(2), evaluate.__file__, *arguments]
    env = suite.user_environment()
    killed = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True)
    while not list(results.glob("answers/*.json")):
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
    assert answers(results) == answers(whole[0])
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
        run(words(model, problems, whole[0], **changed))
    assert message in str(ended.value.code)


def test_another_model_is_refused(model, problems, whole, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    arguments = words(copy, problems, whole[0])
    assert run(arguments) == whole[1]  # a copy is the same model
    other = decode.load_model(str(copy))
    other.get_output_embeddings().weight.data[3] += 0.5
    other.save_pretrained(copy)
    with pytest.raises(SystemExit, match="model was '"):
        run(arguments)


def test_a_model_is_read_once(model, problems, whole, tmp_path, monkeypatch):
    """By all processes of an evaluation, and again if a file has another size or time."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    config = SimpleNamespace()
    read = []

    def count(path):
        read.append(path.name)
        return suite.file_digest(path)

    monkeypatch.setattr(evaluate, "file_digest", count)
    identity = evaluate.model_identity(str(copy), config)
    files = sorted(read)
    assert "model.safetensors" in files and "config.json" in files
    assert identity == whole[1]["settings"]["model"]

    hashes = tmp_path / "hashes.json"
    for _ in range(3):
        assert evaluate.model_identity(str(copy), config, hashes) == identity
    assert sorted(read) == sorted(files * 2)
    os.utime(copy / "config.json", (1, 1))
    assert evaluate.model_identity(str(copy), config, hashes) == identity
    assert len(read) == 3 * len(files)
    (copy / "config.json").write_text("{}")
    os.utime(copy / "config.json", (1, 1))
    assert evaluate.model_identity(str(copy), config, hashes) != identity
    hashes.write_text("[1")
    assert evaluate.model_identity(str(copy), config, hashes) != identity

    read.clear()
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(words(model, problems, tmp_path / "out"))
    assert sorted(read) == files


def test_an_adapter_is_another_model_than_its_base(model, tmp_path):
    """And other weights are another adapter."""
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    identities = set()
    hashes = tmp_path / "hashes"
    for size in (1, 2):
        (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * size)
        identities.add(evaluate.model_identity(str(tmp_path), None, hashes))
        identities.add(evaluate.model_identity(str(model), None, hashes))
    assert len(identities) == 3


def test_a_model_without_a_mask_token_is_refused(model, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "mask_token_id", lambda *_: None)
    with pytest.raises(SystemExit, match=r"names a mask token; .* add mask_token_id to the config"):
        run(words(model, problems, tmp_path / "out"))
    assert not list((tmp_path / "out" / "answers").iterdir())


def test_other_problems_are_refused(model, problems, whole, tmp_path):
    lines = problems.read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(SystemExit, match="problems_sha256"):
        run(words(model, tmp_path / "rows.jsonl", whole[0]))


GOOD = '{"query": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be loaded (FileNotFoundError: "),
        (b"", "it has no problems"),
        (b"\n\n", "it has no problems"),
        (f"{GOOD}x\n".encode(), "line 2 is not JSON"),
        (f"{GOOD}null\n".encode(), "line 2 needs a text in query or question or problem, and"),
        (b"[1]\n", "line 1 needs a text in"),
        (b'{"query": "", "answer": "1"}\n', "line 1 needs a text in"),
        (b'{"text": "a", "answer": "1"}\n', "line 1 needs a text in"),
        (b'{"query": "a"}\n', "line 1 needs a text in"),
        (b'{"query": "a", "answer": true}\n', "line 1 needs a text in"),
        (b'{"query": "a", "answer": {"v": 1}}\n', "line 1 needs a text in"),
        (b'{"query": "a", "answer": " "}\n', "line 1 has no final answer"),
        (b'{"query": "a", "response": "so it\\nis so"}\n', "line 1 has no final answer"),
        (b"\xff\n", "cannot be loaded (UnicodeDecodeError"),
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
        run(words(model, path, tmp_path / "out"))
    assert message in str(ended.value.code)


TASK = """
include: {harness}/tasks/gsm8k/gsm8k.yaml
task: local_gsm8k
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
"""


@pytest.fixture
def gsm8k(model, tmp_path, monkeypatch):
    """The flags of an evaluation of GSM8K on four problems made here, whose answers are planned.

    They are right in GSM8K's form, in another form, followed by a new question, and wrong.
    """
    for split, numbers in (("train", range(8)), ("test", range(20, 24))):
        lines = []
        for number in numbers:
            row = {"question": f"What is {number} + 1?", "answer": f"So.\n#### {number + 1}"}
            lines.append(json.dumps(row) + "\n")
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    harness = Path(lm_eval.__file__).parent
    task = tmp_path / "task.yaml"
    task.write_text(TASK.format(harness=harness, folder=tmp_path))
    tokenizer = pt.load_tokenizer(str(model))

    def decode_as_planned(model, prompts, *, seeds, gen_length, **_):
        forms = ("#### 21", "It is 22 of them", "#### 23\nQuestion: 24 7", "#### 25")
        planned = torch.full((len(prompts), gen_length), tokenizer.get_vocab()["<|eot_id|>"])
        for row, number in enumerate(seeds):  # with --seed 0
            ids = tokenizer(forms[number], add_special_tokens=False)["input_ids"]
            planned[row, : len(ids)] = torch.tensor(ids)
        return planned

    monkeypatch.setattr(decode, "decode", decode_as_planned)
    paths = {"model": model, "task": task, "output": tmp_path / "out"}
    return OPTIONS | paths | {"gen_length": 64, "num_fewshot": 2, "block_length": 0}


def test_a_task_of_the_harness(gsm8k):
    """GSM8K's prompt, examples, stop sequences and metrics."""
    summary = run(suite.flags(gsm8k))
    strict, flexible = "exact_match,strict-match", "exact_match,flexible-extract"
    assert summary["metrics"] == {strict: 0.5, flexible: 0.75}
    assert summary["accuracy"] == summary["exact_match"] == 0.75
    assert (summary["count"], summary["settings"]["task"]) == (4, "local_gsm8k")
    assert len(samples(gsm8k["output"])) == 2 * 4
    prompt = samples(gsm8k["output"])[0]["arguments"][0][0]
    turns = re.findall(r"<\|start_header_id\|>(\w+)<", prompt)
    assert turns == ["user", "assistant"] * 3
    assert prompt.count("#### ") == 2 and "What is 20 + 1?" in prompt


def test_a_prompt_without_the_chat_template(gsm8k):
    run([*suite.flags(gsm8k), "--no_chat_template"])
    prompt = samples(gsm8k["output"])[0]["arguments"][0][0]
    assert "<|" not in prompt and prompt.endswith("Question: What is 20 + 1?\nAnswer:")


@pytest.mark.slow
def test_another_prompt_or_grading_is_refused(gsm8k):
    def refused(message, *more, **changes):
        with pytest.raises(SystemExit, match=message):
            run([*suite.flags(gsm8k | changes), *more])

    run(suite.flags(gsm8k))
    refused("problems_sha256", num_fewshot=1)
    refused("problems_sha256", num_fewshot=0)
    refused("problems_sha256", "--no_chat_template")
    with open(gsm8k["task"], "a") as file:
        file.write("filter_list: [{name: n, filter: [{function: take_first}]}]")
    refused("grading_sha256")


def test_answers_of_a_file_are_taken_as_they_are(tmp_path):
    """No type is guessed, and a file that has changed is read again, even at the same time."""
    path = tmp_path / "rows[1].jsonl"
    written = ["2024-01-01", "18", 18, 1.5, 10**30, "#### 7", "\\boxed{x}"]
    for answers in (written, written[::-1]):
        rows = [{"query": "a", "answer": answer, "other": [answer]} for answer in answers]
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
        os.utime(path, (0, 0))
        expected = [{"#### 7": "7", "\\boxed{x}": "x"}.get(a, str(a)) for a in answers]
        assert list(evaluate.load_task(str(path)).eval_docs["answer"]) == expected


def test_benchmarks_of_the_hub(monkeypatch):
    """Their columns are those of the published data sets."""
    rows = {
        "openai/gsm8k": {"question": "a?", "answer": "So.\n#### 1,000"},
        "HuggingFaceH4/MATH-500": {"problem": "a?", "solution": "It is $x$.", "answer": "x"},
    }

    def load_dataset(path, name, **_):
        assert name == ("main" if path == "openai/gsm8k" else None)
        return {"test": datasets.Dataset.from_list([rows[path]])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, answer in (("gsm8k", "1,000"), ("math500", "x")):
        task = evaluate.load_task(name)
        assert task.eval_docs[0] == {"query": "a?", "answer": answer}
        assert task.doc_to_text(task.eval_docs[0]) == pt.PROMPT.format(query="a?")


def test_a_metric_that_is_no_proportion_is_no_accuracy(model, problems, tmp_path):
    """Here BLEU; empty stop sequences and several answers to a problem do no harm."""
    config = {
        "task": "bleu",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "query",
        "doc_to_target": "response",
        "metric_list": [{"metric": "bleu"}],
        "generation_kwargs": {"until": ["", "never"]},
        "repeats": 2,
    }
    (tmp_path / "bleu.yaml").write_text(json.dumps(config))
    paths = {"model": model, "task": tmp_path / "bleu.yaml", "output": tmp_path / "out"}
    summary = run(suite.flags(paths | OPTIONS | {"limit": 3}))
    assert summary["accuracy"] is None and summary["interval_95"] is None
    assert summary["metrics"].keys() == {"bleu,none"} and summary["count"] == 3
    assert len(answers(tmp_path / "out")) == 6
    with pytest.raises(SystemExit, match=r"--num_fewshot 14: more than --task .* has"):
        run(suite.flags(paths | OPTIONS | {"num_fewshot": 14}))


def test_only_one_process_grades(model, problems, whole, tmp_path, monkeypatch):
    """The others end, although all answers are there."""
    shutil.copytree(whole[0], tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    arguments = words(model, problems, tmp_path / "out")
    with open(tmp_path / "out" / "grading", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(arguments) is None
    assert timeless(run(arguments)) == timeless(whole[1])


def test_a_damaged_batch_is_named(model, problems, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    (tmp_path / "out" / "answers" / "00001.json").write_text("")
    with pytest.raises(SystemExit, match=r"00001\.json is damaged; delete it"):
        run(words(model, problems, tmp_path / "out"))


def test_a_model_folder_is_no_output(model, problems):
    with pytest.raises(SystemExit, match="is a model's folder; give another one"):
        run(words(model, problems, model))
    assert not (model / "answers").exists()


def test_a_group_of_tasks_is_refused(monkeypatch):
    monkeypatch.setattr(evaluate.TaskManager, "load", lambda *_: {"tasks": {"one": 1, "two": 2}})
    with pytest.raises(SystemExit, match=r"--task x\.yaml is a group; give one of .*: one, two"):
        evaluate.load_task(task="x.yaml")


@pytest.mark.parametrize(
    "task, message",
    [
        pytest.param(
            "no_such_task", "'no_such_task' is not a registered task", marks=pytest.mark.slow
        ),
        ("loglikelihood.yaml", "does not generate text from text"),
        ("unsafe.yaml", "runs the code that the model wrote; give --confirm_run_unsafe_code"),
    ],
)
def test_tasks_that_are_refused(model, problems, tmp_path, monkeypatch, task, message):
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(problems)}}}
    config |= {"test_split": "test", "doc_to_text": "query", "doc_to_target": "response"}
    likely = config | {"task": "likely", "output_type": "loglikelihood"}
    unsafe = config | {"task": "unsafe", "output_type": "generate_until", "unsafe_code": True}
    for name, content in (("loglikelihood", likely), ("unsafe", unsafe)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(suite.flags({"model": model, "task": task, "output": "out", **OPTIONS}))
    assert message in str(ended.value.code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"limit": -1}, "--limit -1: must be at least 1"),
        ({"num_fewshot": 3}, "--num_fewshot 3: only with --task"),
        ({"steps": 7}, "steps 7 is not divisible by the 3 blocks"),
    ],
)
def test_bad_flags(model, problems, tmp_path, changed, message, capsys):
    with pytest.raises(SystemExit):
        run(words(model, problems, tmp_path / "out", **changed))
    assert message in capsys.readouterr().err


def test_answers_longer_than_the_model_are_refused(model, problems, tmp_path):
    too_long = {"gen_length": 10**6, "block_length": 0, "steps": 1}
    with pytest.raises(SystemExit, match=r"--gen_length 1000000: .* exceeds the \d+ tokens of"):
        run(words(model, problems, tmp_path / "out", **too_long))


@pytest.mark.parametrize(
    "contents, message",
    [
        ({"summary.json": "{}"}, r"has answers but no settings\.json"),
        (
            {"settings.json": "[1]"},
            r"settings\.json is damaged, or not of an evaluation",
        ),
        (
            {"settings.json": "{"},
            r"settings\.json is damaged, or not of an evaluation",
        ),
    ],
)
def test_a_folder_of_something_else_is_left_alone(model, problems, tmp_path, contents, message):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        run(words(model, problems, tmp_path))
    for name, text in contents.items():
        assert (tmp_path / name).read_text() == text


def test_without_math_verify_nothing_is_generated(model, problems, tmp_path, monkeypatch):
    script = tmp_path / "grade.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setattr(grade, "__file__", str(script))
    grade.start_process.cache_clear()
    with pytest.raises(SystemExit, match="math-verify does not work"):
        run(words(model, problems, tmp_path / "out"))
    assert not list((tmp_path / "out" / "answers").iterdir())
    grade.start_process.cache_clear()


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
    with pytest.raises(SystemExit, match=r"does not heed attention_mask.*--batch_size 1"):
        run(words(model, problems, tmp_path / "out"))
    one_by_one = words(model, problems, tmp_path / "out", batch_size=1, limit=2)
    assert run(one_by_one)["count"] == 2


# ------------------------------------------------------------------------------------------ files


def test_a_file_appears_only_when_whole(tmp_path):
    """While another process writes it again and again, and after that process is killed."""
    path = tmp_path / "content.json"
    content = ["a"] * 200_000
    script = f"import suite\nwhile True: suite.write_json({str(path)!r}, ['a'] * 200_000)"
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
    assert suite.digest("ab", "c") != suite.digest("a", "bc")
    path = tmp_path / "file"
    path.write_bytes(b"ab\0c")
    assert suite.file_digest(path) == suite.digest("ab", "c")
