"""Block decoding commits what LLaDA's reference decoder commits, whatever the batch."""

import itertools
import json
import re
import sys

import decode
import pytest
import torch
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM

import pt

MASK, EOS, EOT, VOCABULARY = 7, 3, 5, 24
IDS = {"mask_id": MASK, "eos_id": EOS, "eot_id": EOT}


def small_model(seed, vocabulary=VOCABULARY):
    """A LLaDA with random weights, large enough that its predictions differ from place to place."""
    torch.manual_seed(seed)
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 32, "init_std": 0.4}
    return LLaDAModelLM(LLaDAConfig(**shape, vocab_size=vocabulary, mask_token_id=MASK)).eval()


def prompts_of(rng, *lengths):
    choices = torch.tensor([i for i in range(VOCABULARY) if i != MASK])
    return [choices[torch.randint(len(choices), (length,), generator=rng)] for length in lengths]


@torch.no_grad()
def reference(model, prompt, gen_length, block_length, steps, logits_eos_inf=False, last=()):
    """The definition as plain loops, for one prompt at temperature 0, in float64."""
    canvas = [*prompt.tolist(), *[MASK] * gen_length]
    blocks = gen_length // block_length
    for block in range(blocks):
        start = len(prompt) + block * block_length
        room = range(start, start + block_length)
        for step in range(steps // blocks):
            logits = model(input_ids=torch.tensor([canvas])).logits[0].double()
            if logits_eos_inf:
                logits[:, EOS] = -torch.inf
            sure, tokens = logits.softmax(-1).max(-1)
            masked = [i for i in room if canvas[i] == MASK]
            rank = lambda i, sure=sure, tokens=tokens: (int(tokens[i]) in last, -sure[i])
            count = block_length // (steps // blocks) + (step < block_length % (steps // blocks))
            for i in sorted(masked, key=rank)[:count]:
                canvas[i] = int(tokens[i])
    return torch.tensor(canvas[len(prompt) :])


def until_end(answer, block_length):
    """How much of an answer decoding has to fill: up to the block in which it ends."""
    length = decode.answer_length(answer, EOS, EOT)
    return -(-length // block_length) * block_length


@pytest.mark.parametrize("seed", (0, 1, 3, 8))
def test_the_reference_decoder(seed):
    """Any block length and number of steps; blocks behind the answer's end stay masked."""
    model, rng = small_model(seed), torch.Generator().manual_seed(seed)
    for block_length, per_block in itertools.product((1, 4, 6, 12), (1, 2, 5, 14)):
        (prompt,) = prompts_of(rng, int(torch.randint(1, 9, (), generator=rng)))
        how = {
            "gen_length": 12,
            "block_length": block_length,
            "steps": per_block * 12 // block_length,
        }
        for ends in ({}, {"logits_eos_inf": True}, {"confidence_eos_eot_inf": True}):
            (answer,) = decode.decode(model, [prompt], **how, **IDS, **ends)
            last = (EOS, EOT) if "confidence_eos_eot_inf" in ends else ()
            expected = reference(
                model, prompt, **how, logits_eos_inf="logits_eos_inf" in ends, last=last
            )
            filled = until_end(expected, block_length)
            assert answer[:filled].equal(expected[:filled]) and (answer[filled:] == MASK).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"remasking": "random"},
        {"threshold": 0.6},
        {"temperature": 1.5, "threshold": 0.3, "confidence_eos_eot_inf": True},
    ],
)
def test_a_batch_gives_what_single_prompts_give(options):
    model, rng = small_model(8), torch.Generator().manual_seed(8)
    prompts = prompts_of(rng, *range(1, 14))
    how = {"gen_length": 18, "block_length": 6, "steps": 9, **options, **IDS}
    seen, whole = [0] * len(prompts), []

    def watch(rows, canvas):
        whole.append(len(rows))
        for row in rows:
            seen[row] += 1

    batch = decode.decode(model, prompts, **how, seeds=range(13), watch=watch)
    for row, prompt in enumerate(prompts):
        forwards = []
        one = decode.decode(
            model, [prompt], **how, seeds=[row], watch=lambda *met, f=forwards: f.append(met)
        )
        assert one[0].equal(batch[row]) and len(forwards) == seen[row]
    assert (
        max(whole) == 13 and len(set(seen)) > 1
    )  # some ended earlier, and were left out from there on
    assert options == {} or not decode.decode(
        model, prompts, **how | {"temperature": 0, "remasking": "low_confidence", "threshold": None}
    ).equal(batch)


def test_threshold():
    """A threshold near 1 commits one token a forward, near 0 all; in between every token above it, or the surest."""
    model, (prompt,) = small_model(27), prompts_of(torch.Generator().manual_seed(27), 6)
    how = {"gen_length": 8, "block_length": None, "steps": 8, "logits_eos_inf": True, **IDS}
    forwards = {}
    for threshold in (1e-9, 0.3, 1 - 1e-12):
        canvases = []
        answer = decode.decode(
            model,
            [prompt],
            **how,
            threshold=threshold,
            watch=lambda _, c, to=canvases: to.append(c[0, 6:].clone()),
        )[0]
        forwards[threshold] = len(canvases)
        for before, after in itertools.pairwise([*canvases, answer]):
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, before])[None]).logits[0, 6:]
            logits[:, EOS] = -torch.inf
            sure, tokens = logits.softmax(-1).max(-1)
            masked = before == MASK
            commits = masked & ((sure > threshold) | (sure == sure[masked].max()))
            assert after.equal(torch.where(commits, tokens, before))
    assert forwards[1e-9] == 1 < forwards[0.3] < forwards[1 - 1e-12] == 8
    assert decode.decode(model, [prompt], **how, threshold=1 - 1e-12).equal(
        decode.decode(model, [prompt], **how)
    )


@torch.no_grad()
def test_end_tokens_come_last_in_their_block():
    """Where one is committed, nothing but end tokens is predicted for what is left of the block."""
    model, rng = small_model(8), torch.Generator().manual_seed(8)
    prompts, how = (
        prompts_of(rng, *[5] * 30),
        {"gen_length": 6, "block_length": 6, "steps": 6, **IDS},
    )
    is_end = lambda ids: (ids == EOS) | (ids == EOT)
    for late in (True, False):
        canvases = []
        watch = lambda _, canvas, to=canvases: to.append(canvas[:, 5:].clone())
        answers = decode.decode(model, prompts, **how, confidence_eos_eot_inf=late, watch=watch)
        assert is_end(answers).any()
        ok = True
        for before, after in itertools.pairwise([*canvases, answers]):
            predicted = (
                model(input_ids=torch.cat([torch.stack(prompts), before], 1))
                .logits[:, 5:]
                .argmax(-1)
            )
            only_ends = (is_end(predicted) | (before != MASK)).all(1)
            ok &= bool(only_ends[(is_end(after) & (before == MASK)).any(1)].all())
        assert ok == late
    assert not (decode.decode(model, prompts, **how, logits_eos_inf=True) == EOS).any()


@torch.no_grad()
def test_a_head_tied_to_the_embedding():
    """The head is then applied by the model itself, to all positions; the tokens are the same."""
    tied, prompts = small_model(9), prompts_of(torch.Generator().manual_seed(9), 3, 7)
    how = {"gen_length": 8, "block_length": 4, "steps": 4, **IDS}
    embedding = tied.get_input_embeddings()
    tied.get_output_embeddings().weight.data = embedding.weight.data
    expected = decode.decode(tied, prompts, **how)
    inner = tied.model.transformer.pop("ff_out")
    tied.model.transformer["ff_out"] = torch.nn.Identity()
    forward = tied.forward

    def with_tied_head(**inputs):
        output = forward(**inputs)
        output.logits = torch.nn.functional.linear(output.logits, inner.weight)
        return output

    tied.forward, tied.get_output_embeddings = with_tied_head, lambda: embedding
    assert decode.decode(tied, prompts, **how).equal(expected)


def test_temperature_samples_the_softmax():
    """At temperature 1 a token is drawn with its softmax probability: 4,000 draws, 5 standard deviations."""
    model, (prompt,) = small_model(3), prompts_of(torch.Generator().manual_seed(3), 4)
    how = {"gen_length": 1, "block_length": 1, "steps": 1, "temperature": 1.0, **IDS}
    drawn = decode.decode(model, [prompt] * 4000, **how, seeds=range(4000))[:, 0]
    with torch.no_grad():
        p = (
            model(input_ids=torch.cat([prompt, torch.tensor([MASK])])[None])
            .logits[0, -1]
            .softmax(-1)
        )
    share = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()
    assert p.max() < 0.95  # so that there is something to draw


def test_the_head_sees_the_masked_positions_alone():
    model, rows = small_model(4), []
    prompts = prompts_of(torch.Generator().manual_seed(4), 3, 9)
    head = model.get_output_embeddings()
    with head.register_forward_hook(
        lambda _, inputs, out: rows.append((*out.shape, out.requires_grad))
    ):
        decode.decode(
            model, prompts, gen_length=4, block_length=4, steps=4, logits_eos_inf=True, **IDS
        )
    assert rows == [(2 * left, VOCABULARY, False) for left in (4, 3, 2, 1)]


def test_nearly_sure_positions_are_told_apart():
    """Probabilities that all round to 1 in float32 still have an order."""
    logits = torch.tensor([[0.0, 40.0, 1.0], [0.0, 60.0, 1.0], [50.0, 0.0, 1.0]])
    assert logits.softmax(-1).max(-1).values.tolist() == [1, 1, 1]
    tokens, confidence = decode.choose(logits, [3], [None], 0, "low_confidence")
    assert tokens.tolist() == [1, 1, 0] and confidence.argsort().tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"gen_length": 30, "block_length": 8}, "gen_length 30 is not divisible by block_length 8"),
        ({"steps": 3}, "steps 3 is not divisible by the 2 blocks"),
        ({"steps": 0}, "steps 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"remasking": "none"}, "remasking 'none'"),
        ({"threshold": 1.0}, "threshold 1.0"),
        ({"threshold": 0.0}, "threshold 0.0"),
        ({"threshold": 0.5, "remasking": "random"}, "needs remasking low_confidence"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decode.decode(
            None, [torch.tensor([1])], **{"gen_length": 16, "block_length": 8, "steps": 8} | wrong
        )


@pytest.mark.parametrize("prompt", [[], [1, MASK]])
def test_bad_prompts(prompt):
    with pytest.raises(ValueError, match="prompt 1 is empty or contains mask_id 7"):
        decode.decode(small_model(0), [[1], prompt], gen_length=8, block_length=8, steps=8, **IDS)


def test_no_prompts():
    assert decode.decode(
        small_model(0), [], gen_length=8, block_length=8, steps=8, **IDS
    ).shape == (0, 8)


def test_prompts_are_those_of_training(toy_folder):
    tokenizer = pt.load_tokenizer(str(toy_folder / "model"))
    rows = [
        json.loads(line) for line in (toy_folder / "data" / "train.jsonl").read_text().splitlines()
    ]
    trained = torch.load(toy_folder / "train.pt")
    encoded = decode.encode_prompts(tokenizer, [row["query"] for row in rows])
    assert encoded == [row["full_ids"][: row["prompt_len"]].tolist() for row in trained]


def test_the_command(toy_folder, capsys, monkeypatch):
    words = ["decode.py", "--model", str(toy_folder / "model"), "--prompt", "What is 2 + 3?"]
    words += "--gen_length 8 --block_length 4 --steps 4 --logits_eos_inf".split()
    monkeypatch.setattr(sys, "argv", [*words, "--show"])
    decode.main()
    shown = capsys.readouterr().out
    canvases = re.split(r"--- forward \d\n", shown)[1:]
    assert [canvas.count("\u25a1") for canvas in canvases] == [8, 6, 4, 2]
    assert set(canvases[1][-4:].strip()) <= {"\u25a1"}  # the second block waits for the first


@pytest.mark.parametrize(
    "words, message",
    [
        ("--prompt x --steps 100", "steps 100 is not divisible by the 8 blocks"),
        ("--prompt x --device moon", "--device moon cannot be used"),
        ("--prompt=", "--prompt is empty"),
        ("--prompt x", "--model none: no tokenizer there"),
    ],
)
def test_mistakes_end_in_one_message(words, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decode.py", "--model", "none", *words.split()])
    with pytest.raises(SystemExit) as ended:
        decode.main()
    assert message in f"{ended.value.code} {capsys.readouterr().err}" and ended.value.code


def test_a_prompt_that_spells_the_mask_is_refused(toy_folder, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["decode.py", "--model", str(toy_folder / "model"), "--prompt", "a <|mdm_mask|>"],
    )
    with pytest.raises(SystemExit, match="prompt 1 spells the mask token"):
        decode.main()
