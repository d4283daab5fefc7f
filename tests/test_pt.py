"""pt.py: where the prompt ends, what is kept, and what is said about the rest."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import run_pt
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import pt

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"  # no header of any kind
TEMPLATES = {"llada": None, "chatml": CHATML, "bare": BARE}
ROWS = [
    {
        "type": "MATH_AnsAug",
        "query": "What is 2 + 3?",
        "response": "2 + 3 = 5\n#### 5\nThe answer is: 5",
    },
    {"type": "GSM_AnsAug", "query": "Ada has {7} pens.", "response": "She said: step by step."},
    {"type": None, "query": "Ünïcode 🙂 — and\n\n\nnewlines", "response": "  é🙂\n\nassistant\n\n"},
]


@pytest.fixture(params=TEMPLATES)
def tokenizer(request, toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    tokenizer.chat_template = TEMPLATES[request.param] or tokenizer.chat_template
    return tokenizer


def dataset(rows):
    return Dataset.from_list(rows)


def oracle(tokenizer, row):
    """The prompt text and the answer text of one row, from the template's meaning, without looking for headers."""
    user = [{"role": "user", "content": pt.PROMPT.format(query=row["query"])}]
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    ends = {CHATML: row["response"] + "<|im_end|>\n", BARE: row["response"] + "\n"}
    return prompt, ends.get(tokenizer.chat_template, row["response"].strip() + "<|eot_id|>")


def test_boundaries_and_no_lost_text(tokenizer):
    samples, _ = pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")
    assert len(samples) == len(ROWS)
    for sample, row in zip(samples, ROWS, strict=True):
        prompt, answer = oracle(tokenizer, row)
        assert tokenizer.decode(sample["full_ids"]) == prompt + answer
        assert tokenizer.decode(sample["full_ids"][: sample["prompt_len"]]) == prompt
        assert type(sample["prompt_len"]) is int and sample["full_ids"].dtype == torch.long


def test_parity_with_the_published_script_row_by_row(toy_folder):
    """What the published script computes on transformers 4.57: render, cut 47 characters, encode both."""
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    rows = [
        json.loads(line) for line in (toy_folder / "data" / "train.jsonl").read_text().splitlines()
    ]
    rows += [row for row in ROWS if "🙂" not in row["query"]]
    samples, _ = pt.preprocess(dataset(rows), tokenizer, 226, 0, "GSM")
    expected = []
    for row in rows:
        if isinstance(row["type"], str) and "GSM" in row["type"]:
            continue
        user = [{"role": "user", "content": pt.PROMPT.format(query=row["query"])}]
        text = tokenizer.apply_chat_template(
            [*user, {"role": "assistant", "content": row["response"]}], tokenize=False
        )
        full_ids = tokenizer(text[:-47], add_special_tokens=False)["input_ids"]
        prompt_len = len(
            tokenizer.encode(
                tokenizer.apply_chat_template(user, tokenize=False), add_special_tokens=False
            )
        )
        if len(full_ids) <= 226:
            expected.append((prompt_len, full_ids))
    assert len(expected) > 20
    assert [(sample["prompt_len"], sample["full_ids"].tolist()) for sample in samples] == expected


def test_the_whole_is_encoded_once(toy_folder, monkeypatch):
    """Fails on the published behaviour (P6): on transformers 5, `tokenize=True` returns a dict of length 2."""
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    render = tokenizer.apply_chat_template

    def like_transformers_5(conversation, tokenize=True, **others):
        text = render(conversation, tokenize=False, **others)
        return {"input_ids": [], "attention_mask": []} if tokenize else text

    expected, _ = pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")
    monkeypatch.setattr(tokenizer, "apply_chat_template", like_transformers_5)
    samples, _ = pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")
    assert [s["prompt_len"] for s in samples] == [s["prompt_len"] for s in expected]
    assert min(s["prompt_len"] for s in samples) > 20


def test_tokens_that_join_across_the_boundary():
    """Where the prompt alone is one token longer than within the whole, only the whole is right."""
    vocab = {
        character: i
        for i, character in enumerate(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.#:'? ,-\n"
        )
    }
    vocab |= {"\n\n": len(vocab), "\nX": len(vocab) + 1}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "X"), ("\n", "\n")]))
    model.pre_tokenizer = pre_tokenizers.Sequence([])
    template = (
        "{% for m in messages %}{{ m['content'] }}{{ '\n\n' if m['role'] == 'user' }}{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template)
    (sample,), _ = pt.preprocess(
        dataset([{"query": "q", "response": "Xyz"}]), tokenizer, 10_000, 0, ""
    )
    tokens = tokenizer.convert_ids_to_tokens(sample["full_ids"].tolist())
    assert tokens[sample["prompt_len"] - 2 :] == [
        "\n",
        "\nX",
        "y",
        "z",
    ]  # the token that straddles is the prompt's


def test_template_that_does_not_continue_the_prompt(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(SystemExit, match="does not continue the prompt"):
        pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "{{ 1 / 0 }}", "{{ messages[9].x.y }}"]
)
def test_template_that_fails(template, toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    tokenizer.chat_template = template
    with pytest.raises(SystemExit, match="chat template fails"):
        pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")


def test_template_that_drops_the_answer(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    samples, counts = pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")
    assert not samples and counts["malformed"] == len(ROWS)


def test_counts(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    good = {"type": "MATH", "query": "What?", "response": "That."}
    changes = [
        {"type": "GSM_SV"},
        {"query": None},
        {"response": ""},
        {"response": " \n"},
        {"response": "long " * 300},
        {"type": None},
        {"type": "x"},
        {"query": "What is <|mdm_mask|>?"},
        {"response": "This<|eot_id|> and that"},
    ]
    rows = [good, *({**good, **change} for change in changes)]
    samples, counts = pt.preprocess(dataset(rows), tokenizer, 200, 0, "GSM")
    assert counts == {"read": 10, "filtered by type": 1, "malformed": 5, "too long": 1, "kept": 3}
    assert len(samples) == 3
    assert len(pt.preprocess(dataset(rows), tokenizer, 200, 0, "")[0]) == 4  # "" filters nothing
    samples, counts = pt.preprocess(dataset([good] * 9), tokenizer, 200, 5, "GSM")
    assert (len(samples), counts["read"]) == (5, 5)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(suffix, toy_folder, tmp_path, capsys):
    rows = dataset(ROWS[:2])
    write = {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(suffix, rows.to_json)
    write(tmp_path / f"rows{suffix}", **({"lines": False} if suffix == ".json" else {}))
    run_pt(
        "--model",
        toy_folder / "model",
        "--dataset",
        f"rows{suffix}",
        "--output",
        "rows.pt",
        cwd=tmp_path,
    )
    (sample,) = torch.load(tmp_path / "rows.pt", weights_only=True)
    assert set(sample) == {"prompt_len", "full_ids"}
    printed = capsys.readouterr().out
    assert "2 read, 1 filtered by type, 0 malformed, 0 too long, 1 kept" in printed
    assert "The answer is: 5<|eot_id|>" in printed.split("its answer")[1]
    assert "What is 2 + 3?" in printed.split("its answer")[0]


def test_folder_and_split(toy_folder, tmp_path):
    arguments = ("--model", toy_folder / "model", "--filter_type", "", "--max_samples", "0")
    for source, split, rows in (
        (toy_folder / "data", "test", 10),
        (toy_folder / "data/test.jsonl", "train[:4]", 4),
    ):
        run_pt(
            *arguments,
            "--dataset",
            source,
            "--split",
            split,
            "--output",
            f"{rows}.pt",
            cwd=tmp_path,
        )
        assert len(torch.load(tmp_path / f"{rows}.pt", weights_only=True)) == rows


BAD = {
    "no dataset": (["--dataset", "missing.jsonl"], "missing.jsonl"),
    "no hub dataset": (["--dataset", "no-such/dataset"], "no-such/dataset"),
    "no file type": (["--dataset", "notes.txt"], "notes.txt"),
    "no columns": (["--dataset", "columns.jsonl"], "query"),
    "broken json": (["--dataset", "broken.jsonl"], "broken.jsonl"),
    "empty file": (["--dataset", "empty.jsonl"], "empty.jsonl"),
    "no split": (["--dataset", "rows", "--split", "nowhere"], "nowhere"),
    "no model": (["--model", "missing/folder/model"], "missing/folder/model"),
    "max_len below every row": (["--max_len", "5"], "--max_len 5"),
    "negative max_len": (["--max_len", "-1"], "--max_len -1"),
    "negative max_samples": (["--max_samples", "-1"], "--max_samples -1"),
    "output below a file": (["--output", "rows/rows.jsonl/x.pt"], "rows/rows.jsonl/x.pt"),
    "output is a folder": (["--output", "rows"], "--output 'rows'"),
    "output is the dataset": (["--output", "rows/rows.jsonl", "--overwrite"], "--dataset itself"),
    "not UTF-8": (["--dataset", "latin.jsonl"], "latin.jsonl"),
    "output exists": (["--output", "old.pt"], "--overwrite"),
    "unknown flag": (["--max_length", "5"], "--max_length"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_no_output(case, toy_folder, tmp_path, capsys):
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    files = {
        "rows/rows.jsonl": rows,
        "notes.txt": "x",
        "broken.jsonl": '{"query": ',
        "empty.jsonl": "",
        "old.pt": "old",
    }
    for name, text in {**files, "columns.jsonl": '{"question": "x", "response": "y"}\n'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.jsonl").write_bytes(rows.replace("Ada", "\xe9").encode("latin-1", "replace"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments, named = BAD[case]
    default = [
        "--model",
        toy_folder / "model",
        "--dataset",
        "rows/rows.jsonl",
        "--output",
        "new.pt",
    ]
    with pytest.raises(SystemExit) as stop:
        run_pt(*default, *arguments, cwd=tmp_path)
    message = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code
    assert stop.value.code not in (0, None)
    assert named in message and "\n" not in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_and_full_disk(toy_folder, tmp_path, monkeypatch):
    """A disk that fills up while writing leaves the old file as it was, and no half one."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    arguments = (
        "--model",
        toy_folder / "model",
        "--dataset",
        "rows.jsonl",
        "--output",
        "out.pt",
        "--overwrite",
    )
    run_pt(*arguments, cwd=tmp_path)
    old = (tmp_path / "out.pt").read_bytes()

    def full(samples, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SystemExit, match="No space left"):
            run_pt(*arguments, cwd=tmp_path)
    assert (tmp_path / "out.pt").read_bytes() == old and len(os.listdir(tmp_path)) == 2
    run_pt(*arguments, cwd=tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_processes_change_nothing(toy_folder, monkeypatch):
    """Not even where the last row wanted lies within a batch; and a batch's storage holds its kept ids alone."""
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    monkeypatch.setattr(pt, "BATCH_ROWS", 7)
    rows = [
        json.loads(line) for line in (toy_folder / "data" / "train.jsonl").read_text().splitlines()
    ]
    rows = dataset(
        [row | {"response": row["response"] if i % 5 else ""} for i, row in enumerate(rows)]
    )
    alone, *others = [pt.preprocess(rows, tokenizer, 256, 20, "", workers) for workers in (0, 1, 2)]
    assert (
        len(alone[0]) == 20 and alone[1]["malformed"] == 5 and alone[1]["read"] == 25
    )  # rows 0, 5, 10, 15, 20
    kept = [i for i in range(len(rows)) if i % 5]
    for wanted in range(1, 20):  # a batch's last kept row among them
        assert pt.preprocess(rows, tokenizer, 256, wanted, "")[1]["read"] == kept[wanted - 1] + 1
    for samples, counts in others:
        assert counts == alone[1]
        for ours, theirs in zip(samples, alone[0], strict=True):
            assert ours["prompt_len"] == theirs["prompt_len"] and torch.equal(
                ours["full_ids"], theirs["full_ids"]
            )
        storages = {
            s["full_ids"].untyped_storage().data_ptr(): s["full_ids"].untyped_storage()
            for s in samples
        }
        assert len(storages) == 4
        assert sum(storage.nbytes() for storage in storages.values()) == 8 * sum(
            len(s["full_ids"]) for s in samples
        )


def undecodable(*_):
    return b"\xff".decode()


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


ENDS = {
    "message": (None, "no such turn"),
    "text": (undecodable, "not UTF-8"),
    "kill": (killed, "lower --num_workers"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_a_process_is_one_message(end, toy_folder, tmp_path, monkeypatch):
    judge, message = ENDS[end]
    shutil.copytree(toy_folder / "model", tmp_path / "model")
    if judge:
        monkeypatch.setattr(pt, "judge", judge)  # in the processes, which are forked
    else:
        (tmp_path / "model" / "chat_template.jinja").write_text(
            "{{ raise_exception('no such turn') }}"
        )
    monkeypatch.setattr(pt, "BATCH_ROWS", 7)
    arguments = (
        "--model",
        "model",
        "--dataset",
        toy_folder / "data" / "train.jsonl",
        "--output",
        "out.pt",
    )
    with pytest.raises(SystemExit, match=message) as stopped:
        run_pt(*arguments, "--num_workers", 2, cwd=tmp_path)
    assert "\n" not in str(stopped.value) and os.listdir(tmp_path) == ["model"]


def test_published_flags_and_defaults():
    args = pt.parse_args([])
    assert (args.output, args.model) == ("MathQA_256.pt", "GSAI-ML/LLaDA-8B-Instruct")
    assert (args.dataset, args.split, args.filter_type) == ("meta-math/MetaMathQA", "train", "GSM")
    assert (args.max_len, args.max_samples) == (256, 20000)
