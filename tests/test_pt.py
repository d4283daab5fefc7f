"""pt.py: where the prompt ends, what is kept, and what is said about the rest."""

import json
import logging
import os
import signal
import statistics
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from helpers import run_pt
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import pt

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"  # no headers
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
    """The prompt text and the answer text of one row, from what its template is known to do."""
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
    """The published script on transformers 4.57 renders, cuts 47 characters and encodes both."""
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    rows = [
        json.loads(line) for line in (toy_folder / "data" / "train.jsonl").read_text().splitlines()
    ]
    rows += [row for row in ROWS if "🙂" not in row["query"]]
    samples, _ = pt.preprocess(dataset(rows), tokenizer, 10_000, 0, "GSM")
    max_len = int(statistics.median(len(sample["full_ids"]) for sample in samples))
    samples, _ = pt.preprocess(dataset(rows), tokenizer, max_len, 0, "GSM")
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
        if len(full_ids) <= max_len:
            expected.append((prompt_len, full_ids))
    assert len(expected) > 20
    assert [(sample["prompt_len"], sample["full_ids"].tolist()) for sample in samples] == expected


def test_the_whole_is_encoded_once(toy_folder, monkeypatch):
    """The published script fails: transformers 5 returns a dict of 2 items for the tokens."""
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
    """Decoding would show other tokens before the answer than training: such rows are refused."""
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
    joins, fits = {"query": "q", "response": "Xyz"}, {"query": "q", "response": "xyz"}
    with pytest.raises(SystemExit, match="ends in other tokens than in decoding"):
        pt.preprocess(dataset([joins]), tokenizer, 10_000, 0, "")
    (sample,), counts = pt.preprocess(dataset([joins, fits]), tokenizer, 10_000, 0, "")
    tokens = tokenizer.convert_ids_to_tokens(sample["full_ids"].tolist())
    assert tokens[sample["prompt_len"] - 1 :] == ["\n\n", "x", "y", "z"]
    assert (counts["unfit"], counts["kept"]) == (1, 1)


PARTS = (  # of a template for contents that are lists of parts
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_THINKING = (  # the generation prompt has an empty thought, the conversation if it has no other
    "{% for m in messages %}{{ m['role'] }}\n{% if m['role'] == 'assistant' and '</think>' not in "
    "m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n<think>\n\n</think>\n\n' }}"
    "{% endif %}"
)


def test_a_template_that_drops_texts(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    tokenizer.chat_template = PARTS
    with pytest.raises(SystemExit, match="drops the query"):
        pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")


def test_one_odd_row_is_named_and_left_out(toy_folder, capsys):
    """Whether its conversation does not begin with the prompt, or the template refuses it."""
    rows = [{"query": "What?", "response": "That."} for _ in range(5)]
    rows[3]["response"] = "<think>\nhm\n</think>\n\nThat."
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    refuses = "{% if '</think>' in messages[-1]['content'] %}{{ raise_exception('no') }}{% endif %}"
    for template in (NO_THINKING, refuses + NO_THINKING):
        tokenizer.chat_template = template
        samples, counts = pt.preprocess(dataset(rows), tokenizer, 1000, 0, "")
        assert (len(samples), counts["unfit"]) == (4, 1)
        assert "row 4 is left out: the chat template" in capsys.readouterr().err


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
    with pytest.raises(SystemExit, match="drops the response"):
        pt.preprocess(dataset(ROWS), tokenizer, 1000, 0, "")


def test_counts(toy_folder):
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    good = {"type": "MATH", "query": "What?", "response": "That."}
    changes = [
        {"type": "GSM_SV"},
        {"query": None},
        {"response": ""},
        {"response": " \n"},
        {"response": "long " * 3000},
        {"type": None},
        {"type": "x"},
        {"query": "What is <|mdm_mask|>?"},
        {"response": "This<|eot_id|> and that"},
    ]
    rows = [good, *({**good, **change} for change in changes)]
    samples, counts = pt.preprocess(dataset(rows), tokenizer, 1000, 0, "GSM")
    outcomes = {"filtered by type": 1, "malformed": 5, "unfit": 0, "too long": 1, "kept": 3}
    assert counts == {"read": 10, **outcomes}
    assert len(samples) == 3
    assert len(pt.preprocess(dataset(rows), tokenizer, 1000, 0, "")[0]) == 4  # "" filters nothing
    samples, counts = pt.preprocess(dataset([good] * 9), tokenizer, 1000, 5, "GSM")
    assert (len(samples), counts["read"]) == (5, 5)


def test_cells_of_a_csv_are_text(toy_folder, tmp_path):
    """NA, None, null and digits are what is written, not missing values and numbers."""
    cells = ["NA", "None", "null", "007", "5", "nan", "yes"]
    lines = [f"What is it?,{cell}" for cell in cells]
    (tmp_path / "rows.csv").write_text("\n".join(["query,response", *lines]) + "\n")
    rows = pt.load_rows(str(tmp_path / "rows.csv"), "train")
    assert rows["response"][:] == cells
    assert len(pt.load_rows(str(tmp_path / "rows.csv"), "train[:3]")) == 3


def test_nested_columns_are_named(tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match=r"flatten its columns \(messages\) into the texts query"):
        pt.load_rows(str(tmp_path / "rows.jsonl"), "train")


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
    assert "2 read, 1 filtered by type, 0 malformed, 0 unfit, 0 too long, 1 kept" in printed
    assert "The answer is: 5<|eot_id|>" in printed.split("its answer")[1]
    assert "What is 2 + 3?" in printed.split("its answer")[0]


@pytest.mark.parametrize(
    "source, split, count", [("rows", "test", 2), ("rows.jsonl", "train[:1]", 1)]
)
def test_folder_and_split(source, split, count, toy_folder, tmp_path):
    (tmp_path / "rows").mkdir()
    dataset(ROWS).to_json(tmp_path / "rows.jsonl")
    dataset(ROWS).to_json(tmp_path / "rows" / "train.jsonl")
    dataset(ROWS[:2]).to_json(tmp_path / "rows" / "test.jsonl")
    flags = ("--model", toy_folder / "model", "--dataset", source, "--split", split)
    run_pt(*flags, "--filter_type", "", "--output", "out.pt", cwd=tmp_path)
    assert len(torch.load(tmp_path / "out.pt", weights_only=True)) == count


def test_the_folder_one_is_in(toy_folder, tmp_path):
    """`load_dataset` itself refuses "."; and the folder of `--output` is made."""
    dataset(ROWS).to_json(tmp_path / "train.jsonl")
    flags = ("--model", toy_folder / "model", "--dataset", ".", "--output", "new/folder/out.pt")
    run_pt(*flags, cwd=tmp_path)
    assert os.listdir(tmp_path / "new" / "folder") == ["out.pt"]


BAD = {
    "no dataset": (["--dataset", "missing.jsonl"], "missing.jsonl"),
    "no hub dataset": (["--dataset", "no-such/dataset"], "no-such/dataset"),
    "no file type": (["--dataset", "notes.txt"], "notes.txt"),
    "no columns": (["--dataset", "columns.jsonl"], "query"),
    "broken json": (["--dataset", "broken.jsonl"], "broken.jsonl"),
    "half a character": (["--dataset", "surrogate.jsonl"], "surrogate.jsonl"),
    "null line": (["--dataset", "null.jsonl"], "line 1 is null"),
    "number line": (["--dataset", "number.jsonl"], "line 2 is 7"),
    "no text in any row": (["--dataset", "numbers.jsonl"], "1 malformed"),
    "no rows": (["--dataset", "header.csv"], "header.csv"),
    "folder without files": (["--dataset", "nothing"], "nothing"),
    "no name": (["--dataset", ""], "--dataset ''"),
    "empty file": (["--dataset", "empty.jsonl"], "empty.jsonl"),
    "no split": (["--dataset", "rows", "--split", "nowhere"], "nowhere"),
    "no model": (["--model", "missing/folder/model"], "missing/folder/model"),
    "max_len below every row": (["--max_len", "5"], "--max_len 5"),
    "max_len without an answer": (["--max_len", "1"], "--max_len 1"),
    "max_len is no number": (["--max_len", "long"], "long"),
    "negative max_samples": (["--max_samples", "-1"], "--max_samples -1"),
    "output below a file": (["--output", "rows/rows.jsonl/x.pt"], "rows/rows.jsonl/x.pt"),
    "output is a folder": (["--output", "rows"], "--output 'rows'"),
    "output cannot be written": (["--output", "/proc/new/x.pt"], "/proc/new/x.pt"),
    "output is too long": (["--output", 300 * "x"], "(File name too long)"),
    "output has no name": (["--output", ""], "--output ''"),
    "output is the dataset": (["--output", "rows/rows.jsonl", "--overwrite"], "--dataset itself"),
    "not UTF-8": (["--dataset", "latin.jsonl"], "latin.jsonl"),
    "output exists": (["--output", "old.pt"], "--overwrite"),
    "unknown flag": (["--max_length", "5"], "--max_length"),
}


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES = {
    "rows/rows.jsonl": LINES,
    "notes.txt": "x",
    "broken.jsonl": '{"query": ',
    "empty.jsonl": "",
    "surrogate.jsonl": '{"query": "\\ud83d", "response": "x"}\n',
    "null.jsonl": "null\n" + LINES,
    "number.jsonl": LINES.replace("\n", "\n7\n", 1),
    "numbers.jsonl": '{"query": 1, "response": 2}\n',
    "header.csv": "query,response\n",
    "columns.jsonl": '{"question": "x", "response": "y"}\n',
    "old.pt": "old",
}


def everything_in(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_no_output(
    case, toy_folder, tmp_path, capsys, caplog, monkeypatch
):
    (tmp_path / "rows").mkdir()
    (tmp_path / "nothing").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.jsonl").write_bytes(
        LINES.replace("Ada", "\xe9").encode("latin-1", "replace")
    )
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # to caplog
    before = everything_in(tmp_path)
    wrong, named = BAD[case]
    flags = ["--model", toy_folder / "model", "--dataset", "rows/rows.jsonl", "--output", "new.pt"]
    with pytest.raises(SystemExit) as stop:
        run_pt(*flags, *wrong, cwd=tmp_path)
    if stop.value.code == 2:  # argparse has printed it
        message = capsys.readouterr().err.splitlines()[-1]
    else:
        message = stop.value.code
    assert not caplog.records  # `datasets` does not report it as well
    assert named in message and "\n" not in message
    assert everything_in(tmp_path) == before


def test_overwrite_and_full_disk(toy_folder, tmp_path, monkeypatch):
    """A disk that fills up while writing leaves the old file as it was, and no half one."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "out.pt").write_bytes(b"old")
    flags = ("--model", toy_folder / "model", "--dataset", "rows.jsonl", "--output", "out.pt")
    before = everything_in(tmp_path)

    def fill_disk(samples, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left"):
        patch.setattr(torch, "save", fill_disk)
        run_pt(*flags, "--overwrite", cwd=tmp_path)
    assert everything_in(tmp_path) == before
    run_pt(*flags, "--overwrite", cwd=tmp_path)
    assert len(torch.load(tmp_path / "out.pt", weights_only=True)) == 1
    assert len(os.listdir(tmp_path)) == 2


def test_batches_change_nothing(toy_folder, monkeypatch):
    """The same samples for every batch size, and a row is read only while samples are missing."""
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    text = (toy_folder / "data" / "train.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for i in range(0, len(rows), 5):
        rows[i]["response"] = ""
    rows = dataset(rows)
    whole, _ = pt.preprocess(rows, tokenizer, 256, 20, "")
    monkeypatch.setattr(pt, "BATCH_ROWS", 7)
    samples, counts = pt.preprocess(rows, tokenizer, 256, 20, "")
    assert len(samples) == len(whole) == 20
    for ours, theirs in zip(samples, whole, strict=True):
        assert ours["prompt_len"] == theirs["prompt_len"]
        assert torch.equal(ours["full_ids"], theirs["full_ids"])
    assert counts["malformed"] == 5 and counts["read"] == 25  # rows 0, 5, 10, 15 and 20
    kept = [i for i in range(len(rows)) if i % 5]
    for wanted in range(1, 20):  # some end with a batch, some within one
        counts = pt.preprocess(rows, tokenizer, 256, wanted, "")[1]
        assert counts["kept"] == wanted and counts["read"] == kept[wanted - 1] + 1


def test_storage_is_shared_and_holds_nothing_else(toy_folder, monkeypatch):
    """One storage per batch, also where the last batch is cut: a row left out would be saved."""
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    monkeypatch.setattr(pt, "BATCH_ROWS", 7)
    samples, _ = pt.preprocess(dataset(ROWS * 8), tokenizer, 1000, 17, "")
    storages = {}
    for sample in samples:
        storage = sample["full_ids"].untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    assert len(storages) == 3
    assert sum(storages.values()) == 8 * sum(len(sample["full_ids"]) for sample in samples)


def test_text_that_is_not_utf8(toy_folder, tmp_path):
    """Parquet files are not checked when they are loaded; their texts are decoded in batches."""
    text = pa.array([b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"query": text, "response": text}), tmp_path / "rows.parquet")
    flags = ("--model", toy_folder / "model", "--dataset", "rows.parquet", "--output", "rows.pt")
    with pytest.raises(SystemExit, match="not UTF-8"):
        run_pt(*flags, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["rows.parquet"]


def start(folder, *command):
    """A Python process in `folder`, for what is seen from outside only."""
    return subprocess.Popen(
        [sys.executable, *[str(word) for word in command]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "flags, status, answer",
    [
        (["--help"], 0, "--max_samples"),
        (["--no_such_flag"], 2, "unrecognized arguments: --no_such_flag"),
        (["--max_len", "1"], 2, "--max_len 1"),
    ],
)
def test_flags(flags, status, answer, capsys):
    with pytest.raises(SystemExit) as ended:
        pt.parse_args(flags)
    printed = capsys.readouterr()
    assert ended.value.code == status and answer in printed.out + printed.err


@pytest.mark.slow
def test_ctrl_c_is_one_message(toy_folder, tmp_path):
    """Given when the progress bar appears, with seconds of work left."""
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS[0]) + "\n") * 20_000)
    flags = ("--model", toy_folder / "model", "--dataset", "rows.jsonl", "--max_samples", "0")
    with start(tmp_path, pt.__file__, *flags) as process:
        shown = ""
        while "/20000" not in shown and process.poll() is None:
            shown += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 128 + signal.SIGINT
    assert rest.splitlines()[-1] == "stopped by SIGINT; no incomplete file is left"
    assert "Traceback" not in shown + rest
    assert os.listdir(tmp_path) == ["rows.jsonl"]


KILLED_WHILE_SAVING = """
import os, runpy, signal, sys
import torch

def save(samples, file):
    file.write(b"half")
    file.flush()
    assert any(".tmp-" in name for name in os.listdir())
    os.kill(os.getpid(), signal.SIGTERM)

torch.save = save
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_kill_while_saving(toy_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "out.pt").write_bytes(b"old")
    before = everything_in(tmp_path)
    flags = ("--model", toy_folder / "model", "--dataset", "rows.jsonl", "--output", "out.pt")
    process = start(tmp_path, "-c", KILLED_WHILE_SAVING, pt.__file__, *flags, "--overwrite")
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "stopped by SIGTERM; no incomplete file is left"
    assert "Traceback" not in errors
    assert everything_in(tmp_path) == before


def test_published_flags_and_defaults():
    args = pt.parse_args([])
    assert (args.output, args.model) == ("MathQA_256.pt", "GSAI-ML/LLaDA-8B-Instruct")
    assert (args.dataset, args.split, args.filter_type) == ("meta-math/MetaMathQA", "train", "GSM")
    assert (args.max_len, args.max_samples) == (256, 20000)
