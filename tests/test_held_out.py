"""The held-out loss is one functional, on the same noise for every model."""

import csv
from types import SimpleNamespace

import decode
import evaluate
import held_out
import numpy as np
import pytest
import torch
from helpers import flags, preprocess_toy
from torch.nn.functional import cross_entropy
from toy_task import chains
from transformers import AutoModelForCausalLM

LENGTH = 100  # tokens: some rows are longer, some shorter
ROWS = 6  # of the .pt file
SETTINGS = {"block_size": 8, "max_len": LENGTH, "limit": ROWS}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """The toy in its own vocabulary: the loop of the definition runs the head at all positions."""
    folder = tmp_path_factory.mktemp("narrow")
    chains.build(folder, wide=False, base=None, train_rows=20, test_rows=1)
    preprocess_toy(folder)
    return folder


@pytest.fixture(scope="module")
def measured(toy_folder, tmp_path_factory):
    """The lines of the CSV of the toy and of a second model, and the folder of the files."""
    folder = tmp_path_factory.mktemp("held_out")
    model = AutoModelForCausalLM.from_pretrained(toy_folder / "model", trust_remote_code=True)
    other = folder / "other"
    model.get_output_embeddings().weight.data.mul_(2)
    model.save_pretrained(other)
    for path in (toy_folder / "model").glob("token*"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "chat_template.jinja").write_bytes(
        (toy_folder / "model" / "chat_template.jinja").read_bytes()
    )
    run(folder / "both", toy_folder, toy_folder / "model", other)
    with open(folder / "both.csv") as file:
        return list(csv.DictReader(file)), folder


def run(output, toy_folder, *models, **changes):
    words = flags(data=toy_folder / "train.pt", output=output, **{**SETTINGS, **changes})
    held_out.main(held_out.parse_args([*map(str, models), *words]))


def draw_loss(model, ids, start, noise, t):
    """The loss of one draw, in plain loops and one forward pass, and the number of its tokens."""
    masked, noisy = [], []
    for pos in range(LENGTH):
        later = pos >= min(start + 8, len(ids))
        if start <= pos and not later and noise[1 + pos] < np.float32(t):
            masked.append(pos)
        hidden = later or pos in masked
        noisy.append(model.config.mask_token_id if hidden else ids[pos])
    if not masked:
        return None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([noisy])).logits[0, masked]
    labels = torch.tensor([ids[pos] for pos in masked])
    return cross_entropy(logits, labels).item(), len(masked)


def test_the_loss_is_that_of_the_definition(toy_folder, measured):
    lines = [line for line in measured[0] if line["model"].endswith("model")]
    model = AutoModelForCausalLM.from_pretrained(
        toy_folder / "model", trust_remote_code=True, dtype=torch.float32
    )
    rows = torch.load(toy_folder / "train.pt")[:ROWS]
    lengths = [len(row["full_ids"]) for row in rows]
    assert min(lengths) < LENGTH < max(lengths)
    expected = {}
    for number, row in enumerate(rows):
        ids = row["full_ids"][:LENGTH].tolist()
        for block, start in enumerate(range(row["prompt_len"], len(ids), 8)):
            noise = np.random.default_rng((0, number, block)).random(1 + LENGTH, np.float32)
            for t in (0.1, 0.3, 0.5, 0.7, 0.9):
                expected.setdefault((block, t), []).append(draw_loss(model, ids, start, noise, t))
    assert {(int(x["block"]), float(x["t"])) for x in lines} == expected.keys()
    for line in lines:
        draws = [draw for draw in expected[int(line["block"]), float(line["t"])] if draw]
        losses, tokens = zip(*draws, strict=True)
        assert (int(line["draws"]), int(line["tokens"])) == (len(draws), sum(tokens))
        assert float(line["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)


def test_every_model_meets_the_same_masks(measured):
    lines, folder = measured
    half = len(lines) // 2
    assert len({line["model"] for line in lines}) == 2
    for one, other in zip(lines[:half], lines[half:], strict=True):
        assert [one[x] for x in ("block", "t", "draws", "tokens")] == [
            other[x] for x in ("block", "t", "draws", "tokens")
        ]
        assert one["loss"] != other["loss"]
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")


def test_batches_do_not_change_it(toy_folder, measured, tmp_path):
    """But for rounding."""
    run(tmp_path / "one", toy_folder, toy_folder / "model", batch_size=1)
    with open(tmp_path / "one.csv") as file:
        lines = list(csv.DictReader(file))
    for line, other in zip(lines, measured[0][: len(lines)], strict=True):
        assert line["draws"] == other["draws"]
        assert float(line["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)


def test_a_changed_method_is_measured_as_the_original_is(
    toy_folder, measured, tmp_path, monkeypatch
):
    """Whoever edits a trainer's method compares with what was measured before."""
    for name in ("corrupt", "supervised_loss"):
        monkeypatch.delattr(held_out.train_blockwise, name)
    run(tmp_path / "changed", toy_folder, toy_folder / "model")
    with open(tmp_path / "changed.csv") as file:
        lines = list(csv.DictReader(file))
    assert lines == measured[0][: len(lines)]


def test_mean_loss():
    lines = [{"draws": "3", "loss": "1.0"}, {"draws": 1, "loss": 3.0}]
    assert held_out.mean_loss(lines) == 1.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "missing.pt"}, "--data missing.pt is not what pt.py writes"),
        ({"max_len": 2}, "has no rows with an answer in 2 tokens"),
        ({"models": "missing"}, "--model missing: no tokenizer there"),
    ],
)
def test_bad_input(toy_folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    given = {"data": toy_folder / "train.pt", **SETTINGS, **changes}
    model = given.pop("models", str(toy_folder / "model"))
    with pytest.raises(SystemExit) as ended:
        held_out.main(held_out.parse_args([model, *flags(**given)]))
    assert message in str(ended.value.code)
    assert not list(tmp_path.iterdir())


def test_models_that_attend_otherwise_are_refused(toy_folder, tmp_path, monkeypatch):
    config = SimpleNamespace(block_causal=4)
    monkeypatch.setattr(evaluate, "load_config", lambda *_: (config, 126464))
    with pytest.raises(SystemExit, match="attends block by block"):
        run(tmp_path / "x", toy_folder, toy_folder / "model")


def test_models_without_a_mask_token_are_refused(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "mask_token_id", lambda *_: None)
    with pytest.raises(SystemExit, match="names a mask token; train with this suite"):
        run(tmp_path / "x", toy_folder, toy_folder / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_that_fails_leaves_the_figures_of_those_before(toy_folder, tmp_path, monkeypatch):
    load_model = decode.load_model
    loaded = []

    def load_once(*how):
        loaded.append(how)
        if len(loaded) > 1:
            raise KeyboardInterrupt
        return load_model(*how)

    monkeypatch.setattr(decode, "load_model", load_once)
    with pytest.raises(SystemExit, match="interrupted"):
        run(tmp_path / "x", toy_folder, *[toy_folder / "model"] * 2)
    assert len((tmp_path / "x.csv").read_text().splitlines()) > 5


def test_a_missing_folder_is_noticed_first(tmp_path, capsys):
    with pytest.raises(SystemExit):
        held_out.parse_args(["model", *flags(data="x.pt", output=tmp_path / "no" / "both")])
    assert "its folder does not exist" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "both.png").write_text("mine")
    with pytest.raises(SystemExit):
        held_out.parse_args(["model", *flags(data="x.pt", output=tmp_path / "both")])
    assert "both.png exists; give another" in capsys.readouterr().err
