"""The toy task and its base model."""

import json
import os
import random
import re
from functools import partial

import pytest
import torch
from toy_task import chains, narrow
from transformers import AutoModelForCausalLM, AutoTokenizer

import pt


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, fix_mistral_regex=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The committed base in its two forms."""
    made = tmp_path_factory.mktemp("chains")
    for name in ("wide", "narrow"):
        chains.build(made / name, wide=name == "wide", train_rows=30, test_rows=8)
    return made


def test_answers_are_right():
    """Against a second interpreter; each step begins with the value before it, by label."""
    rules = {
        "max": lambda a, b: a if a > b else b,
        "min": lambda a, b: a if a < b else b,
        "plus": lambda a, b: a + b if a + b < 10 else 9,
        "minus": lambda a, b: a - b if a > b else 0,
    }
    rows = chains.problems(random.Random(4), 400, set())
    _, small, train, _ = narrow.splits(50, 50)
    for row in rows + small + train:
        first, *instructions = row["query"].split(" ; ")
        *steps, last = row["response"].split(" ; ")
        value = int(first)
        for instruction, step in zip(sorted(instructions), steps, strict=True):
            label, operation, operand = instruction.split()
            result = rules[operation](value, int(operand))
            assert step == f"{label} {value} {operation} {operand} = {result}"
            value = result
        assert last == f"The answer is: {value}" and 5 <= len(steps) <= 8
    assert len({row["query"] for row in rows}) == 400


def test_answers_that_only_repeat_the_instructions():
    """Of 1,000 answers 700 +- 14.5 in expectation; 6 standard deviations."""
    rows = chains.problems(random.Random(5), 1000, set(), habit=0.7)
    short = [row for row in rows if "=" not in row["response"]]
    assert abs(len(short) - 700) < 6 * 14.5
    for row in short:
        *repeated, last = row["response"].split(" ; ")
        assert repeated == row["query"].split(" ; ")[1:] and last.startswith("The answer is: ")


def test_no_problem_is_in_two_splits():
    queries = [{row["query"] for row in rows} for rows in chains.splits(50, 20, 60, 30)]
    assert [len(split) for split in queries] == [20, 50, 60, 30]
    assert len(set.union(*queries)) == 160


def test_narrow_problems():
    """Five instructions in any order, plus and minus; the full test is that of chains.py; none is
    shared, in order or not.
    """
    full, small, train, pretraining = narrow.splits(50, 20, 60)
    assert full == chains.splits(50, 20)[0]
    orders = set()
    for row in small + train:
        assert re.fullmatch(r"\d( ; [p-t] (plus|minus) \d){5}", row["query"])
        orders.add("".join(re.findall("[p-t] ", row["query"])))
    assert len(orders) > 30  # 70 of 120, with 54 expected
    queries = [
        {" ; ".join(sorted(row["query"].split(" ; "))) for row in rows}
        for rows in (full, small, train, pretraining)
    ]
    assert len(set.union(*queries)) == 20 + 20 + 50 + 60


def test_the_base_of_narrow_knows_the_full_problems_better(tmp_path):
    """Its folder has the problems of both kinds, and its committed weights."""
    narrow.build(tmp_path, train_rows=30, test_rows=40)
    kinds = dict(zip(("full", "narrow", "train"), narrow.splits(30, 40), strict=False))
    data = tmp_path / "data"
    assert sorted(path.stem for path in data.iterdir()) == sorted(kinds)
    assert all(read(data / f"{kind}.jsonl") == rows for kind, rows in kinds.items())

    model, tokenizer = load(tmp_path / "model")
    loss = {}
    for kind, rows in kinds.items():
        ids, prompt_len = chains.encode(tokenizer, rows)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            loss[kind] = chains.denoising_loss(model, ids, prompt_len, generator).item()
    assert loss["full"] < 0.1 < min(loss["narrow"], loss["train"])


def test_the_base_is_small_and_both_forms_are_one_model(folders):
    """The same logits for the same text, and no id beyond the toy's own is likelier than these."""
    assert chains.BASE.stat().st_size <= 300_000 >= narrow.BASE.stat().st_size
    row = read(folders / "wide" / "data" / "test.jsonl")[0]
    text = f"{row['query']}\n\n{row['response']}"
    logits = {}
    for name in ("wide", "narrow"):
        model, tokenizer = load(folders / name / "model")
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        own = chains.list_ids(wide=name == "wide")
        with torch.no_grad():
            logits[name] = model(input_ids=ids).logits[0][:, own]
    torch.testing.assert_close(logits["wide"], logits["narrow"], rtol=1e-4, atol=1e-4)
    assert logits["wide"].std() > 0.1


def test_any_text_comes_back(folders):
    for name in ("wide", "narrow"):
        tokenizer = AutoTokenizer.from_pretrained(folders / name / "model", fix_mistral_regex=False)
        for text in (
            "p 3 max 5 = 5 ; The answer is: 5",
            "\u00dcn\u00ef \U0001f642\n\n\n  x",
            pt.PROMPT,
        ):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_base_reads_what_pt_writes(folders):
    tokenizer = pt.load_tokenizer(str(folders / "narrow" / "model"))
    rows = read(folders / "narrow" / "data" / "train.jsonl")
    ids, prompt_len = chains.encode(tokenizer, rows)
    assert ids.shape[0] == 30 and (ids.shape[1] - prompt_len >= chains.GEN_LENGTH).all()
    for row, full, start in zip(rows, ids, prompt_len, strict=True):
        answer = tokenizer.decode(full[start:], skip_special_tokens=True)
        assert answer.strip() == row["response"]


def test_pretraining_lowers_the_loss(folders):
    """Forty steps on a few rows; before, the model knows nothing of LLaDA's whole vocabulary."""
    tokenizer = pt.load_tokenizer(str(folders / "narrow" / "model"))
    ids, prompt_len = chains.encode(tokenizer, read(folders / "narrow" / "data" / "train.jsonl"))
    config = chains.make_config(tokenizer, chains.SHAPE)
    config.embedding_size = config.vocab_size + 1
    torch.manual_seed(0)
    model = chains.LLaDAModelLM(config)

    def loss():
        generator = torch.Generator().manual_seed(9)
        return chains.denoising_loss(model, ids, prompt_len, generator).item()

    before = loss()
    generator = torch.Generator().manual_seed(0)
    loss_of = partial(chains.denoising_loss, generator=generator)
    chains.pretrain(model, loss_of, ids, prompt_len, 40, 16, 4e-3, generator)
    whole = torch.tensor(float(chains.LLaDAConfig().embedding_size)).log().item()
    assert before == pytest.approx(whole, rel=0.05) and loss() < 0.85 * before


def test_nothing_is_overwritten(folders, capsys, monkeypatch):
    before = sorted(os.listdir(folders / "narrow"))
    with pytest.raises(SystemExit, match="exists already"):
        chains.build(folders / "narrow", wide=False)
    assert sorted(os.listdir(folders / "narrow")) == before == ["data", "model"]
    with pytest.raises(SystemExit, match="give --overwrite"):
        chains.main(chains.parse_args(["--pretrain"]))
