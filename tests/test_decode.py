"""Block decoding commits what LLaDA's reference decoder commits, whatever the batch."""

import itertools
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import decode
import pytest
import torch
from decoding.key_values import KeyValues, window
from helpers import (
    EOS,
    EOT,
    IDS,
    MASK,
    VOCABULARY,
    decode_one,
    prompts_of,
    reference,
    small_llada,
    small_qwen,
    without_mask,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.nn.functional import silu
from toy_task import chains
from toy_task.llada.modeling_llada import rotary_angles, rotate
from transformers import AddedToken, PreTrainedTokenizerFast

import pt

# --------------------------------------------------------------------------- the plain definition


def until_end(answer, block_length):
    """How much of an answer decoding has to fill: up to the end of the block in which it ends."""
    length = decode.answer_length(answer, EOS, EOT)
    return math.ceil(length / block_length) * block_length


@pytest.mark.parametrize("logits_eos_inf", [False, True])
@pytest.mark.parametrize("confidence_eos_eot_inf", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_decoder(seed, logits_eos_inf, confidence_eos_eot_inf):
    """For any block length and number of steps; blocks after the answer's end stay masked."""
    model = without_mask(small_llada(seed))
    rng = torch.Generator().manual_seed(seed)
    for block_length, steps_per_block in itertools.product((1, 4, 6, 12), (1, 2, 5, 14)):
        prompt_len = int(torch.randint(1, 9, (), generator=rng))
        (prompt,) = prompts_of(rng, prompt_len)
        options = {
            "gen_length": 12,
            "block_length": block_length,
            "steps": steps_per_block * 12 // block_length,
            "logits_eos_inf": logits_eos_inf,
            "confidence_eos_eot_inf": confidence_eos_eot_inf,
        }
        expected = reference(model, prompt, **options)
        answer, _ = decode_one(model, prompt, **options)
        filled = until_end(expected, block_length)
        assert answer[:filled].equal(expected[:filled])
        assert (answer[filled:] == MASK).all()


# -------------------------------------------------------------------------------- the end tokens


class FixedModel:
    """Gives fixed probabilities for each position of an answer after a prompt of one token."""

    def __init__(self, rows):
        """`rows`: a dict per position, {id: probability}."""
        p = torch.zeros(1 + len(rows), VOCABULARY)
        for position, row in enumerate(rows, start=1):
            for id_, probability in row.items():
                p[position, id_] = probability
        self.logits = p.log()[None]  # (1, L, V)
        self.embedding = torch.nn.Embedding(1, 1)

    def get_input_embeddings(self):
        return self.embedding

    get_output_embeddings = get_input_embeddings

    def __call__(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits.clone())


def commit_order(rows, **options):
    """The positions of an answer in the order in which they are committed, one per step."""
    size = {"gen_length": len(rows), "block_length": len(rows), "steps": len(rows)}
    answer, canvases = decode_one(FixedModel(rows), torch.tensor([1]), **size, **options)
    states = [*(canvas[1:] for canvas in canvases), answer]
    order = []
    for before, after in itertools.pairwise(states):
        order.append(torch.nonzero(before != after)[:, 0].tolist())
    return order


@pytest.mark.parametrize("end", [EOS, EOT])
def test_other_confidences_are_normalized_without_end_tokens(end):
    """0.5 of the 0.55 that is not for an end token is more than 0.6 of 1."""
    rows = [{10: 0.6, 11: 0.4}, {10: 0.5, end: 0.45, 11: 0.05}]
    assert commit_order(rows) == [[0], [1]]
    assert commit_order(rows, confidence_eos_eot_inf=True) == [[1], [0]]
    assert commit_order(rows, confidence_eos_eot_inf=True, threshold=0.8) == [[1], [0]]


def test_end_tokens_come_last_from_left_to_right():
    """Whatever their probabilities, and also with a threshold that these exceed."""
    rows = [
        {EOT: 0.9, 10: 0.1},
        {EOS: 0.99, 10: 0.01},
        {10: 0.4, 11: 0.3, 12: 0.3},
        {EOS: 0.95, 10: 0.05},
    ]
    assert commit_order(rows) == [[1], [3], [0], [2]]
    assert commit_order(rows, confidence_eos_eot_inf=True) == [[2], [0], [1], [3]]
    late = commit_order(rows, confidence_eos_eot_inf=True, threshold=0.5)
    assert late == [[2], [0], [1], [3]]


def test_random_remasking_has_no_confidences_to_change():
    rows = [{EOS: 0.9, 10: 0.1}, {10: 0.9, EOT: 0.1}, {10: 1.0}, {EOT: 1.0}, {11: 1.0}]
    plain = commit_order(rows, remasking="random")
    assert commit_order(rows, remasking="random", confidence_eos_eot_inf=True) == plain


def test_logits_eos_inf():
    model = small_llada(8)
    prompts = prompts_of(torch.Generator().manual_seed(8), *[5] * 30)
    options = {"gen_length": 6, "block_length": 6, "steps": 6, **IDS}
    assert (decode.decode(model, prompts, **options) == EOS).any()
    assert not (decode.decode(model, prompts, **options, logits_eos_inf=True) == EOS).any()


def test_nearly_sure_positions_are_told_apart():
    """Probabilities that all round to 1 in float32 still have an order."""
    logits = torch.tensor([[0.0, 40.0, 1.0], [0.0, 60.0, 1.0], [50.0, 0.0, 1.0]])
    assert logits.softmax(-1).max(-1).values.tolist() == [1, 1, 1]
    confidence = decode.log_odds(logits, logits.argmax(-1))
    assert confidence.argsort().tolist() == [0, 2, 1]


def test_log_odds_are_those_of_the_softmax():
    logits = torch.randn(70, VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(70) % VOCABULARY
    p = logits.double().softmax(-1)[torch.arange(70), tokens]
    confidence = decode.log_odds(logits, tokens)
    torch.testing.assert_close(confidence, torch.log(p / (1 - p)), rtol=1e-5, atol=1e-5)


def test_equal_confidences_are_committed_from_left_to_right():
    """In long blocks too, for which torch.topk takes others."""
    for num in range(1, 40):
        confidence = torch.zeros(40, dtype=torch.float64)
        masked = torch.ones(1, 40, dtype=torch.bool)
        picked = decode.most_confident(masked, confidence, num, None)
        assert picked[0].nonzero()[:, 0].tolist() == list(range(num))


TURNS = "{% for m in messages %}" + "{{ m['role'] }}: {{ m['content'] }}"
ASKS = "{% if add_generation_prompt %}assistant: {% endif %}"
BOTH = "<|endoftext|>", "<|endoftext|>"


@pytest.mark.parametrize(
    "template, names",
    [
        (chains.CHAT_TEMPLATE, ("<|endoftext|>", "<|eot_id|>")),
        (chains.CHAT_TEMPLATE.replace("eot_id", "role_end"), ("<|endoftext|>", "<|role_end|>")),
        (TURNS + "<end>\n{% endfor %}" + ASKS, ("<|endoftext|>", "<end>")),
        (TURNS + " \n\n<|role_end|><end>{% endfor %}" + ASKS, ("<|endoftext|>", "<|role_end|>")),
        (TURNS + "{{ eos_token }}{% endfor %}" + ASKS, BOTH),
        (TURNS + "\n\n{% endfor %}" + ASKS, BOTH),  # no end token
        (chains.CHAT_TEMPLATE.replace("<|eot_id|>", ""), BOTH),  # a header is no end
        ("<end>{% for m in messages %}{{ m['content'][0]['text'] }}<end>{% endfor %}", BOTH),
        ("{{ raise_exception('no') }}", BOTH),
    ],
)
def test_the_end_of_a_turn_is_the_templates(template, names):
    """What follows the answer in a conversation, whatever its name."""
    tokenizer = chains.build_tokenizer(wide=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|role_end|>"]})
    tokenizer.add_tokens([AddedToken("<end>", special=False), AddedToken("\n\n", special=False)])
    tokenizer.chat_template = template
    assert tuple(tokenizer.convert_ids_to_tokens(decode.end_ids(tokenizer))) == names


@pytest.mark.parametrize("special", [True, False])
def test_the_text_of_an_answer_has_no_end_token(special):
    tokenizer = chains.build_tokenizer(wide=False)
    tokenizer.add_tokens([AddedToken("<end>", special=special)])
    ids = tokenizer(" The answer is 5<end> The<end>", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<end>")
    text = decode.answer_text(tokenizer, torch.tensor(ids), tokenizer.eos_token_id, end)
    assert text == " The answer is 5"


# -------------------------------------------------------------------------------- the mask token


def test_the_mask_token_is_named_by_the_configuration_or_the_tokenizer():
    tokenizer = chains.build_tokenizer(wide=False)
    config = small_llada(mask_token_id=11).config
    assert decode.special_ids("m", config, tokenizer, 400)["mask_id"] == 11
    config.mask_token_id = None
    called_so = tokenizer.convert_tokens_to_ids("<|mdm_mask|>")
    assert decode.special_ids("m", config, tokenizer, 400)["mask_id"] == called_so
    tokenizer.mask_token = "<|eot_id|>"  # what is declared comes first
    expected = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert decode.special_ids("m", config, tokenizer, 400)["mask_id"] == expected
    config.mask_token_id = 11
    assert decode.special_ids("m", config, tokenizer, 400)["mask_id"] == 11


@pytest.mark.parametrize(
    "build, changes", [(small_llada, {"mask_token_id": None}), (small_qwen, {})]
)
def test_without_a_mask_token_nothing_is_decoded(build, changes):
    """Neither with LLaDA's, even in a vocabulary of its size, nor an autoregressive model."""
    config = build(**changes).config
    words = Tokenizer(models.WordLevel({"word": 0, "<end>": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    with pytest.raises(SystemExit, match=r"--model m: neither its config\.json nor its tokenizer"):
        decode.special_ids("m", config, tokenizer, 126464)


# ------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter(toy_folder, tmp_path_factory):
    """The folder of an adapter of the toy, with random weights."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = decode.load_model(str(toy_folder / "model"))
    lora = LoraConfig(r=2, target_modules=["q_proj", "ff_out"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder, save_embedding_layers=False)
    return folder


def rename_weights(adapter, copy, rename):
    """A copy of an adapter with other names of its weights; None leaves one out."""
    shutil.copytree(adapter, copy)
    path = copy / "adapter_model.safetensors"
    weights = {rename(name): tensor for name, tensor in load_file(path).items()}
    weights.pop(None, None)
    save_file(weights, path)
    return str(copy)


def test_an_adapter_is_merged(toy_folder, adapter):
    """W + B A / r * alpha, to every layer that it names and to no other."""
    base = decode.load_model(str(toy_folder / "model")).state_dict()
    merged = decode.load_model(str(adapter)).state_dict()
    lora = load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    changed = set()
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in lora:
            a, b = (lora[f"{prefix}.lora_{x}.weight"] for x in "AB")
            weight = weight + 8 / 2 * b @ a
            changed.add(name)
        torch.testing.assert_close(merged[name], weight)
    assert 2 * len(changed) == len(lora) > 4


def first_layer(name):
    return ".blocks.0.q_proj." in name


@pytest.mark.parametrize(
    "rename, count",
    [
        (lambda name: name.replace("base_model.model.", "base_model.model.model."), None),
        (lambda name: name.replace("q_proj", "query") if first_layer(name) else name, 4),
        (lambda name: None if first_layer(name) else name, 2),  # weights are missing
        (lambda name: None, None),
    ],
)
def test_an_adapter_that_does_not_match_its_base_is_refused(
    toy_folder, adapter, tmp_path, rename, count
):
    """In all of its weights, or in some."""
    copy = rename_weights(adapter, tmp_path / "copy", rename)
    with pytest.raises(SystemExit) as ended:
        decode.load_model(copy)
    message = str(ended.value.code)
    assert f"--model {copy}: {count or ''}" in message
    assert f"of its base {toy_folder / 'model'} do not match, such as base_model." in message


@pytest.mark.parametrize("base", ["{folder}/gone", "runs/toy/model", "toy/model", "", None])
def test_an_adapter_without_its_base_is_refused(adapter, tmp_path, base):
    """Both are named: the base is gone, or relative to another folder, or not named."""
    copy = shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base and base.format(folder=tmp_path)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    for load in (
        lambda: run_command("--model", copy, "--prompt", "x"),
        lambda: decode.load_model(str(copy)),
    ):
        with pytest.raises(SystemExit) as ended:
            load()
        message = str(ended.value.code)
        assert f"--model {copy} is an adapter of {config['base_model_name_or_path']}, " in message
        assert os.getcwd() in message and "adapter_config.json" in message


def test_a_relative_base_is_found_from_its_folder(toy_folder, adapter, tmp_path, monkeypatch):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "model"
    (copy / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(toy_folder)
    assert decode.base_of(str(copy), "x")[0] == "model"


# ------------------------------------------------------------------------------ batches, sampling


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"remasking": "random"},
        {"threshold": 0.6},
        {"confidence_eos_eot_inf": True},
        {"temperature": 1.5, "threshold": 0.3, "confidence_eos_eot_inf": True},
    ],
)
def test_a_batch_gives_what_single_prompts_give(options):
    model = small_llada(8)
    prompts = prompts_of(torch.Generator().manual_seed(8), *range(1, 14))
    options = {"gen_length": 18, "block_length": 6, "steps": 9, **IDS, **options}
    forwards = [0] * len(prompts)
    sizes = []

    def count(rows, _):
        sizes.append(len(rows))
        for row in rows:
            forwards[row] += 1

    batch = decode.decode(model, prompts, **options, seeds=range(13), callback=count)
    for row, prompt in enumerate(prompts):
        answer, canvases = decode_one(model, prompt, **options, seeds=[row])
        assert answer.equal(batch[row])
        assert len(canvases) == forwards[row]
    assert max(sizes) == 13
    assert len(set(forwards)) > 1  # some answers ended earlier, and were then left out


@pytest.mark.parametrize(
    "options", [{"temperature": 0.8}, {"remasking": "random"}, {"threshold": 0.6}]
)
def test_options_change_answers(options):
    model = small_llada(8)
    prompts = prompts_of(torch.Generator().manual_seed(8), *range(1, 14))
    plain = {"gen_length": 18, "block_length": 6, "steps": 9, **IDS}
    assert not decode.decode(model, prompts, **plain, **options).equal(
        decode.decode(model, prompts, **plain)
    )


def test_threshold():
    """Each step commits every token above the threshold, or else the surest one."""
    model = without_mask(small_llada(27))
    (prompt,) = prompts_of(torch.Generator().manual_seed(27), 6)
    options = {"gen_length": 8, "block_length": None, "steps": 8, "logits_eos_inf": True}
    forwards = {}
    for threshold in (1e-9, 0.3, 1 - 1e-12):
        answer, canvases = decode_one(model, prompt, **options, threshold=threshold)
        forwards[threshold] = len(canvases)
        states = [*(canvas[6:] for canvas in canvases), answer]
        for before, after in itertools.pairwise(states):
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, before])[None]).logits[0, 6:]
            logits[:, EOS] = -torch.inf
            p, x0 = logits.softmax(-1).max(-1)
            masked = before == MASK
            commits = masked & ((p > threshold) | (p == p[masked].max()))
            assert after.equal(torch.where(commits, x0, before))
    assert forwards[1e-9] == 1 < forwards[0.3] < forwards[1 - 1e-12] == 8
    one_by_one, _ = decode_one(model, prompt, **options)
    assert answer.equal(one_by_one)


def test_temperature_samples_the_softmax():
    """At temperature 1 a token is drawn with its softmax probability.

    4,000 draws and 24 shares, each within 5 standard deviations and 0.001: a false alarm about
    once in 70,000 runs, if the seeds were not fixed.
    """
    model = small_llada(3)
    (prompt,) = prompts_of(torch.Generator().manual_seed(3), 4)
    options = {"gen_length": 1, "block_length": 1, "steps": 1, "temperature": 1.0, **IDS}
    drawn = decode.decode(model, [prompt] * 4000, **options, seeds=range(4000))[:, 0]
    canvas = torch.cat([prompt, torch.tensor([MASK])])
    with torch.no_grad():
        p = model(input_ids=canvas[None]).logits[0, -1].softmax(-1)
    share = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()
    assert p.max() < 0.95  # so that there is something to draw


@torch.no_grad()
def test_a_head_tied_to_the_embedding():
    """The model itself then applies the head, to all positions; the tokens are the same."""
    model = small_llada(9)
    prompts = prompts_of(torch.Generator().manual_seed(9), 3, 7)
    options = {"gen_length": 8, "block_length": 4, "steps": 4, **IDS}
    embedding = model.get_input_embeddings()
    model.get_output_embeddings().weight.data = embedding.weight.data
    expected = decode.decode(model, prompts, **options)

    model.model.transformer["ff_out"] = torch.nn.Identity()
    forward = model.forward

    def with_tied_head(**inputs):
        output = forward(**inputs)
        output.logits = torch.nn.functional.linear(output.logits, embedding.weight)
        return output

    model.forward = with_tied_head
    model.get_output_embeddings = model.get_input_embeddings
    assert decode.decode(model, prompts, **options).equal(expected)


def test_only_masked_positions_go_through_the_head():
    model = without_mask(small_llada(4))
    prompts = prompts_of(torch.Generator().manual_seed(4), 3, 9)
    shapes = []

    def note(_, inputs, logits):
        shapes.append((tuple(logits.shape), logits.requires_grad))

    model.get_output_embeddings().register_forward_hook(note)
    options = {"gen_length": 4, "block_length": 4, "steps": 4, "logits_eos_inf": True, **IDS}
    decode.decode(model, prompts, **options)
    rows = [2, *(2 * left for left in (4, 3, 2, 1))]  # the first asks whether padding is hidden
    assert shapes == [((count, VOCABULARY), False) for count in rows]


def test_a_model_that_does_not_heed_the_mask_of_padding():
    """Its answers to prompts of several lengths would depend on each other."""
    model = without_mask(small_llada(4))
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None: forward(input_ids=input_ids)
    prompts = prompts_of(torch.Generator().manual_seed(4), 3, 9, 9)
    options = {"gen_length": 4, "block_length": 4, "steps": 4, **IDS}
    with pytest.raises(ValueError, match="does not heed attention_mask; decode its prompts one by"):
        decode.decode(model, prompts, **options)
    assert len(decode.decode(model, prompts[1:], **options)) == 2
    model.forward = lambda input_ids: forward(input_ids=input_ids)  # takes none at all
    with pytest.raises(ValueError, match="does not heed attention_mask"):
        decode.decode(model, prompts, **options)


# -------------------------------------------------------------------- mistakes, and the command


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"gen_length": 30, "block_length": 8}, "gen_length 30 is not divisible by block_length 8"),
        ({"gen_length": 0}, "gen_length 0 must be at least 1"),
        ({"block_length": -4}, "block_length -4 must be at least 1"),
        ({"steps": 3}, "steps 3 is not divisible by the 2 blocks"),
        ({"steps": 0}, "steps 0 is not divisible by the 2 blocks"),
        ({"temperature": -1}, "temperature -1"),
        ({"remasking": "none"}, "remasking 'none'"),
        ({"threshold": 1.0}, "threshold 1.0"),
        ({"threshold": 0.0}, "threshold 0.0"),
        ({"threshold": 0.5, "remasking": "random"}, "needs remasking low_confidence"),
    ],
)
def test_bad_options(wrong, message):
    options = {"gen_length": 16, "block_length": 8, "steps": 8, **IDS, **wrong}
    with pytest.raises(ValueError, match=re.escape(message)):
        decode.decode(None, [torch.tensor([1])], **options)


@pytest.mark.parametrize("prompt", [[], [1, MASK]])
def test_bad_prompts(prompt):
    options = {"gen_length": 8, "block_length": 8, "steps": 8, **IDS}
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty or contains mask_id 7"):
        decode.decode(small_llada(0), [[1], prompt], **options)


def test_no_prompts():
    answers = decode.decode(small_llada(0), [], gen_length=8, block_length=8, steps=8, **IDS)
    assert answers.shape == (0, 8)


def test_prompts_are_those_of_training(toy_folder):
    tokenizer = pt.load_tokenizer(str(toy_folder / "model"))
    lines = (toy_folder / "data" / "train.jsonl").read_text().splitlines()
    queries = [json.loads(line)["query"] for line in lines]
    expected = []
    for row in torch.load(toy_folder / "train.pt"):
        expected.append(row["full_ids"][: row["prompt_len"]].tolist())
    assert decode.encode_prompts(tokenizer, queries) == expected


def run_command(*words):
    decode.main(decode.parse_args([str(word) for word in words]))


def test_the_command(toy_folder, capsys):
    size = ["--gen_length", 8, "--block_length", 4, "--steps", 4, "--logits_eos_inf"]
    model = toy_folder / "model"
    run_command("--model", model, "--prompt", "What is 2 + 3?", *size, "--show")
    parts = re.split(r"--- forward pass (\d)\n", capsys.readouterr().out)
    assert parts[1::2] == ["1", "2", "3", "4"]
    canvases = parts[2::2]
    assert [canvas.count("\u25a1") for canvas in canvases] == [8, 6, 4, 2]
    assert canvases[1].endswith("\u25a1" * 4 + "\n")  # the second block waits for the first


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--prompt", "x", "--block_length", "32", "--steps", "100"],
            "steps 100 is not divisible by the 8 blocks",
        ),
        (["--prompt", "x", "--seed", "-1"], "--seed -1: must be 0 to 2147483647"),
        (["--prompt", "x", "--threshold", "2"], "threshold 2.0 must be between 0 and 1"),
        (["--prompt", "x", "--device", "moon"], "--device moon cannot be used"),
        (["--prompt="], "--prompt is empty"),
        (["--prompt", "x"], "--model none: no tokenizer there"),
    ],
)
def test_mistakes_end_in_one_message(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("--model", "none", *words)
    assert message in f"{ended.value.code} {capsys.readouterr().err}"
    assert ended.value.code


@pytest.mark.parametrize(
    "given, learnt, expected",
    [
        ([], None, 32),
        ([], 4, 4),
        ([], 16, 16),
        (["--block_length", "8"], 4, 8),
        (["--block_length", "0"], 4, 256),
        (["--gen_length", "20", "--steps", "10"], 4, 4),
    ],
)
def test_the_block_length_is_the_models_unless_given(given, learnt, expected):
    """Of a model that attends block by block; otherwise it is 32."""
    args = decode.parse_args(["--model", "m", "--prompt", "x", *given])
    config = SimpleNamespace(block_causal=learnt) if learnt else SimpleNamespace()
    assert decode.decode_options(args, config)["block_length"] == expected


def test_flags_that_do_not_fit_the_models_blocks_are_refused():
    args = decode.parse_args(["--model", "m", "--prompt", "x", "--steps", "96"])
    message = "steps 96 is not divisible by the 64 blocks of 4 tokens; give --block_length"
    with pytest.raises(SystemExit, match=message):
        decode.decode_options(args, SimpleNamespace(block_causal=4))


@pytest.mark.parametrize(
    "environment, number",
    [
        ({}, 0),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 1),
        ({"RANK": "5"}, 1),  # of 4 GPUs
        ({"RANK": "2"}, 2),
    ],
)
def test_each_rank_has_its_gpu(environment, number, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert decode.local_rank() == number
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    args = SimpleNamespace(device="cuda", dtype=None)
    decode.set_device(args)
    assert (args.device, args.dtype) == (f"cuda:{number}", "bfloat16")


def test_a_prompt_that_spells_the_mask_is_refused(toy_folder):
    with pytest.raises(SystemExit, match="prompt 1 contains the mask token"):
        run_command("--model", toy_folder / "model", "--prompt", "a <|mdm_mask|>")


@pytest.mark.parametrize(
    "device, dtype, expected", [(None, None, "float32"), ("cpu", "bfloat16", "bfloat16")]
)
def test_the_dtype_on_a_cpu(device, dtype, expected, capsys, monkeypatch):
    """float32 by default; bfloat16 where it is slow is warned of, in one line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decode, "cpu_has_bf16", lambda: False)
    args = SimpleNamespace(device=device, dtype=dtype)
    decode.set_device(args)
    assert (args.device, args.dtype) == ("cpu", expected)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (1 if expected == "bfloat16" else 0)


# ------------------------------------------------------------------------------------- the caches


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_cache_that_is_refreshed_at_every_step_is_exact(kind, seed):
    model = without_mask(small_llada(seed))
    prompts = prompts_of(torch.Generator().manual_seed(seed), 3, 9, 1, 9)
    for size, steps in ((4, 12), (6, 4), (12, 5)):
        how = {"gen_length": 12, "block_length": size, "steps": steps, **IDS}
        expected = decode.decode(model, prompts, **how)
        assert decode.decode(model, prompts, **how, cache=kind, refresh=1).equal(expected)


def heads_of(projected, heads):
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


@torch.no_grad()
def kept_block(model, prompt, canvas, columns):
    """The logits (W, V) of the last pass in plain loops over layers, for one prompt.

    All keys and values are those of `canvas` (L,), but those of `columns` (W,), whose ids are the
    ones of `prompt` (L,).
    """
    inner = model.model
    angles = rotary_angles(len(canvas), model.config, "cpu")
    x = inner.transformer.wte(canvas)[None]  # (1, L, D)
    own = inner.transformer.wte(prompt[columns])[None]  # (1, W, D)
    for block in inner.transformer.blocks:
        old, new = block.attn_norm(x), block.attn_norm(own)
        keys = rotate(heads_of(block.k_proj(old), block.n_kv_heads), angles)
        values = heads_of(block.v_proj(old), block.n_kv_heads)
        new_keys = heads_of(block.k_proj(new), block.n_kv_heads)
        keys[:, :, columns] = rotate(new_keys, angles[columns])
        values[:, :, columns] = heads_of(block.v_proj(new), block.n_kv_heads)
        queries = rotate(heads_of(block.q_proj(new), block.n_heads), angles[columns])
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
        x = block(x, angles)  # as it was when it was kept
        own = own + block.attn_out((weights @ values).transpose(1, 2).flatten(2))
        hidden = block.ff_norm(own)
        own = own + block.ff_out(silu(block.ff_proj(hidden)) * block.up_proj(hidden))
    return inner.transformer.ff_out(inner.transformer.ln_f(own))[0]


@pytest.mark.parametrize(("kind", "width"), [("prefix", 8), ("dual", 4)])
def test_a_step_with_a_cache_is_that_of_its_definition(kind, width):
    """Two rows of other lengths: a block of 4 at token 4 of an answer of 12, after some commits."""
    model = small_llada(2)
    rng = torch.Generator().manual_seed(2)
    prompts = prompts_of(rng, 5, 9)
    before, prompt_lens = decode.make_canvas(prompts, 12, MASK, EOS, "cpu")
    for row, prompt in enumerate(prompts):
        before[row, len(prompt) : len(prompt) + 4] = prompts_of(rng, 4)[0]
    lengths = prompt_lens + 12
    masked = torch.ones(2, 4, dtype=torch.bool)
    store = KeyValues(torch.arange(2))
    model(**decode.forward_inputs(before, lengths, masked), key_values=store)
    after = before.clone()
    for row, prompt in enumerate(prompts):
        after[row, len(prompt) + 4 : len(prompt) + 6] = prompts_of(rng, 2)[0]
    for rows in ([0, 1], [1]):  # all of it, and what is left of the batch
        left = masked & torch.isin(torch.arange(2), torch.tensor(rows))[:, None]
        inputs = window(store, kind, after, prompt_lens, lengths, left, 4)
        assert inputs["input_ids"].shape == (len(rows), width)
        logits = model(**inputs).logits
        for row, own in zip(rows, logits, strict=True):
            first, end = int(prompt_lens[row]) + 4, int(lengths[row])
            columns = torch.arange(first, first + width)
            expected = kept_block(model, after[row, :end], before[row, :end], columns)
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "widths"), [("prefix", [12, 8, 4]), ("dual", [4, 4, 4])])
def test_what_a_cache_computes(kind, widths):
    """Whole canvases at the first step of each block, and after every `refresh` steps."""
    model = without_mask(small_llada(3))
    (prompt,) = prompts_of(torch.Generator().manual_seed(3), 6)
    seen, canvases = [], []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, ids, __: seen.append(ids[0].shape[1]))
    for refresh in (None, 2):
        seen.clear()
        canvases.clear()
        how = {"gen_length": 12, "block_length": 4, "steps": 12, "logits_eos_inf": True}
        decode.decode(
            model,
            [prompt],
            **how,
            **IDS,
            cache=kind,
            refresh=refresh,
            callback=lambda _, canvas: canvases.append(canvas.shape[1]),
        )
        assert canvases == [18] * 12
        expected = []
        for width in widths:
            expected += [18, width, width, width] if refresh is None else [18, width, 18, width]
        assert seen == expected


def test_a_cache_is_for_llada(tmp_path, toy_folder):
    config = SimpleNamespace(model_type="Dream")
    args = decode.parse_args(["--model", "m", "--prompt", "p", "--cache", "dual"])
    with pytest.raises(SystemExit, match="--cache dual: only for LLaDA, not a Dream"):
        decode.decode_options(args, config)
    with pytest.raises(ValueError, match="refresh 3 must be 1 or more, and needs a cache"):
        decode.decode(None, [[1]], gen_length=4, block_length=4, steps=4, refresh=3, **IDS)
    with pytest.raises(ValueError, match="cache 'all' must be one of prefix, dual"):
        decode.decode(None, [[1]], gen_length=4, block_length=4, steps=4, cache="all", **IDS)


def test_llada_loads_without_its_code(toy_folder, tmp_path):
    """With a cache, in this suite's LLaDA: the same weights and logits, no remote code."""
    folder = tmp_path / "model"
    shutil.copytree(toy_folder / "model", folder)
    for code in folder.glob("*.py"):
        code.write_text("raise RuntimeError('remote code has run')")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]  # LLaDA's own says weight_tying instead
    (folder / "config.json").write_text(json.dumps(config))
    own = decode.load_model(str(folder), cache="dual")
    theirs = decode.load_model(str(toy_folder / "model"))
    ids = torch.arange(20)[None]
    assert torch.equal(own(input_ids=ids).logits, theirs(input_ids=ids).logits)
