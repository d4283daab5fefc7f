"""Small models that load, tokenize and predict as each family does, from pt.py to decoding."""

import importlib.util
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace
from typing import NamedTuple

import decode
import evaluate
import held_out
import pytest
import study
import torch
import train_lift
import transformers
from helpers import (
    AR_SHAPE,
    SUITE,
    constants,
    flags,
    launch,
    launcher,
    losses,
    preprocess_toy,
    reference,
    without_mask,
)
from safetensors.torch import load_file
from studies import runs
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from toy_task import chains
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import pt
import train_blockwise
import train_fullseq

CODE = SUITE / "tests" / "families"
CHATML = (  # Qwen3's: an empty think block before the last answer, and in the prompt if asked for
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}THINK{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = (  # LLaDA-MoE's
    "{% for message in messages %}"
    "{{ '<role>' + ('HUMAN' if message['role'] == 'user' else 'ASSISTANT') + '</role>' }}"
    "{{ message['content'] + '<|role_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


class Family(NamedTuple):
    module: str  # in its folder of CODE
    auto_map: dict
    shape: dict
    template: str
    end: str  # of a turn
    think: str  # what the template puts before an answer
    shift: bool
    targets: int  # layers that the default TARGET_MODS train


FAMILIES = {
    "a2d": Family(
        "modeling_a2d",
        {"AutoConfig": "A2DQwen3Config", "AutoModelForMaskedLM": "A2DQwen3LMHeadModel"},
        AR_SHAPE,
        CHATML.replace("THINK", "{{ '<think>\n\n</think>\n\n' }}"),
        "<|im_end|>",
        "<think>\n\n</think>\n\n",
        shift=False,
        targets=8,
    ),
    "dream": Family(
        "modeling_dream",
        {"AutoConfig": "DreamConfig", "AutoModel": "DreamModel"},
        SHAPE,
        CHATML.replace("THINK", ""),
        "<|im_end|>",
        "",
        shift=True,
        targets=8,
    ),
    "llada_moe": Family(
        "modeling_lladamoe",
        {"AutoConfig": "LLaDAMoEConfig", "AutoModelForCausalLM": "LLaDAMoEModelLM"},
        SHAPE | {"num_experts": 4, "num_experts_per_tok": 2},
        ROLES,
        "<|role_end|>",
        "",
        shift=False,
        targets=6,
    ),
}


# ------- the models
def load_code(path):
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def build_family(name, folder):
    """`model` of a family, with random weights, its code and its tokenizer, and `data`."""
    family = FAMILIES[name]
    chains.build(folder / "chains", wide=False, train_rows=40, test_rows=6)
    os.rename(folder / "chains" / "data", folder / "data")
    shutil.copytree(CODE / name, folder / "model", ignore=shutil.ignore_patterns("__pycache__"))
    build_tokenizer(name, folder)
    tokenizer = pt.load_tokenizer(str(folder / "model"))
    module = load_code(CODE / name / f"{family.module}.py")
    config_class = getattr(module, family.auto_map["AutoConfig"])
    (model_class,) = [x for key, x in family.auto_map.items() if key != "AutoConfig"]
    config = config_class(vocab_size=len(tokenizer), **family.shape)
    if name == "dream":
        config.mask_token_id = tokenizer.mask_token_id
    torch.manual_seed(0)
    model = getattr(module, model_class)(config)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    saved = json.loads((folder / "model" / "config.json").read_text())
    saved["auto_map"] = {key: f"{family.module}.{x}" for key, x in family.auto_map.items()}
    (folder / "model" / "config.json").write_text(json.dumps(saved))
    preprocess_toy(folder)


def build_tokenizer(name, folder):
    """Write the tokenizer of a family to `folder`/model."""
    family = FAMILIES[name]
    if name == "dream":
        build_slow_tokenizer(folder)
        return
    renamed = {"<|mdm_mask|>": "<|mask|>", "<|eot_id|>": family.end}
    if "im_start" in family.template:
        renamed["<|start_header_id|>"] = "<|im_start|>"
    text = chains.build_tokenizer(wide=False).backend_tokenizer.to_str()
    for before, after in renamed.items():
        text = text.replace(before, after)
    options = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    if name == "a2d":  # LLaDA-MoE's is only an added token, of this name
        options["mask_token"] = "<|mask|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **options)
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder / "model")


def build_slow_tokenizer(folder):
    """Dream's is its own Python code."""
    module = load_code(CODE / "dream" / "tokenization_dream.py")
    texts = (folder / "data" / "train.jsonl").read_text() + pt.PROMPT
    pieces = sorted({chr(i) for i in range(32, 127)} | {"\n"} | set(re.findall(r" ?\w+", texts)))
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    tokenizer = module.DreamTokenizer(
        vocabulary,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = FAMILIES["dream"].template
    tokenizer.save_pretrained(folder / "model")
    path = folder / "model" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    """Each family in turn: its name and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    build_family(request.param, folder)
    return SimpleNamespace(name=request.param, folder=folder, **FAMILIES[request.param]._asdict())


def mask_id_of(family):
    tokenizer = pt.load_tokenizer(str(family.folder / "model"))
    return tokenizer.convert_tokens_to_ids("<|mask|>")


def constants_of(trainer, family, **changes):
    own = {"MASK_ID": mask_id_of(family), "LOGIT_SHIFT": family.shift, "MAX_LEN": 400}
    return constants(trainer, family.folder, **own | changes)


def in_place(model, shift):
    """A function like the model, whose logits at a position predict this position."""
    if not shift:
        return model

    def forward(input_ids):
        logits = model(input_ids=input_ids).logits  # (B, L, V)
        return SimpleNamespace(logits=torch.cat([logits[:, :1], logits[:, :-1]], dim=1))

    return forward


# ------- data
def test_training_and_decoding_have_the_same_prompt(family):
    """And the answer, with its end, is what the template puts after it."""
    tokenizer = pt.load_tokenizer(str(family.folder / "model"))
    lines = (family.folder / "data" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    samples = torch.load(family.folder / "train.pt")
    prompts = decode.encode_prompts(tokenizer, [row["query"] for row in rows])
    assert len(samples) == len(rows) == 40
    for sample, prompt, row in zip(samples, prompts, rows, strict=True):
        ids = sample["full_ids"].tolist()
        assert ids[: sample["prompt_len"]] == prompt
        answer = tokenizer.decode(ids[sample["prompt_len"] :])
        assert answer.rstrip() == family.think + row["response"] + family.end
    turn = [{"role": "user", "content": pt.PROMPT.format(query=rows[0]["query"])}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert tokenizer(asked, add_special_tokens=False)["input_ids"] == prompts[0]
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert decode.end_ids(tokenizer) == [tokenizer.eos_token_id, end]


# ------- settings
def test_the_settings_of_a_family(trainer, family):
    args = constants_of(trainer, family)
    assert trainer.preflight(args, trainer.METHOD, 1) == []
    args.MASK_ID -= 1
    problems = trainer.preflight(args, trainer.METHOD, 1)
    assert any(f"its mask token is {args.MASK_ID + 1}" in problem for problem in problems)
    args.MASK_ID += 1
    args.LOGIT_SHIFT = not family.shift
    problems = trainer.preflight(args, trainer.METHOD, 1)
    own = f"LOGIT_SHIFT = {not family.shift}: {args.MODEL_NAME} needs {family.shift}"
    assert problems == ([own] if family.name != "llada_moe" else [])  # whose model_type is unknown


def test_studies_know_a_family(family, tmp_path):
    """A study sets the mask token, and the shift where the configuration tells it."""
    data = family.folder / "data"
    places = {"model": family.folder / "model", "data": data / "train.jsonl", "output": tmp_path}
    words = [*flags(**places), "--test", str(data / "test.jsonl"), "--constants", "MAX_LEN=400"]
    known = runs.prepare(study.parse_args(["prefix", *words])).constants
    assert known["MASK_ID"] == mask_id_of(family)
    assert known.get("LOGIT_SHIFT", False) == family.shift


def test_what_the_default_targets_train(trainer, family, capsys):
    """Of a mixture of experts the attention, unless its experts are named."""
    args = constants_of(trainer, family)
    model = trainer.build_model(args, "cpu").get_base_model()
    assert trainer.preflight(args, trainer.METHOD, 1) == []
    printed = capsys.readouterr().out
    assert "LoRA on 2 layers v_proj" in printed
    assert f"LoRA on {family.targets - 6} layers up_proj" in printed
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == family.targets and not any("experts" in name for name in adapted)
    if family.name == "llada_moe":
        args.TARGET_MODS = ["experts.up_proj"]
        names = trainer.lora_targets(args, trainer.load_model(args, "cpu"))
        assert len(names) == 2 * 4 and all(name.endswith("up_proj") for name in names)
        assert trainer.preflight(args, trainer.METHOD, 1) == []
        problems = trainer.preflight(args, trainer.METHOD, 2)
        assert any("train experts on one GPU" in problem for problem in problems)


def test_a_tied_head_is_counted_once(trainer, family):
    """In what is computed about memory and disk."""
    name = str(family.folder / "model")
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    empty = trainer.empty_model(name, "main", config)
    loaded = trainer.load_model(constants_of(trainer, family), "cpu")
    assert empty.num_parameters() == loaded.num_parameters()


def test_a_class_that_the_configuration_does_not_name(trainer):
    config = transformers.Qwen3Config()
    with pytest.raises(ValueError, match="names no class"):
        trainer.model_class("m", "main", config)
    config.architectures = ["Qwen3ForCausalLM"]
    assert trainer.model_class("m", "main", config) is transformers.Qwen3ForCausalLM


# ------- the loss
def test_the_loss_is_that_of_the_shifted_logits(trainer, family):
    """Position - 1 of the model's logits, the answer's first token from the prompt's last."""
    args = constants_of(trainer, family, LORA_DROPOUT=0.0)
    model = trainer.build_model(args, "cpu")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = model.float().eval()
    examples = trainer.load_examples(args)
    draws, _ = trainer.plan(args, trainer.METHOD, examples, 1)
    batch = trainer.make_batch(args, examples, draws[0, 0, 0], 0)
    input_ids, noisy_ids, loss_mask = batch
    predict = in_place(model, family.shift)
    expected = 0.0
    for ids, noisy, mask in zip(input_ids, noisy_ids, loss_mask, strict=True):
        if mask.any():
            logits = predict(input_ids=noisy[None]).logits[0]  # (L, V)
            expected += cross_entropy(logits[mask], ids[mask]).item() / len(input_ids)
    loss = trainer.supervised_loss(args, model, *batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_layers_that_are_computed_again(trainer, family):
    """The same loss and gradients: no cache is filled twice."""
    found = []
    for checkpointing in (False, True):
        args = constants_of(trainer, family, ACTIVATION_CHECKPOINTING=checkpointing)
        model = trainer.build_model(args, "cpu").train()
        examples = trainer.load_examples(args)
        draws, _ = trainer.plan(args, trainer.METHOD, examples, 1)
        torch.manual_seed(3)
        batch = trainer.make_batch(args, examples, draws[0, 0, 0], 0)
        loss = trainer.supervised_loss(args, model, *batch)
        loss.backward()
        gradients = [x.grad for x in model.parameters() if x.requires_grad]
        found.append([loss.detach(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def late(model):
    """The model, whose head now predicts at each position the one after it."""

    def one_before(_, inputs):
        return (inputs[0].roll(-1, dims=1),)

    model.get_output_embeddings().register_forward_pre_hook(one_before)
    return model


@pytest.mark.parametrize("module", [train_blockwise, train_fullseq, train_lift])
def test_a_model_that_predicts_one_position_late_has_the_same_loss(module, toy_folder):
    """And the same gradients, with LOGIT_SHIFT."""
    found = []
    for shift in (False, True):
        args = constants(module, toy_folder, LOGIT_SHIFT=shift, MICRO_BSIZE=4)
        base = train_blockwise.load_model(args, "cpu").float()
        model = train_blockwise.add_adapter(args, late(base) if shift else base)
        examples = train_blockwise.load_examples(args)
        draws, _ = train_blockwise.plan(args, module.METHOD, examples, 1)
        torch.manual_seed(2)
        batch = module.METHOD.make_batch(args, examples, draws[0, 0, 0], 0)
        loss = module.METHOD.supervised_loss(args, model, *batch)
        loss.backward()
        gradients = [x.grad for x in model.parameters() if x.requires_grad]
        found.append([loss.detach(), *gradients])
    assert found[0][0] > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# ------- decoding
def test_decoding_and_held_out_loss_of_the_base(family):
    """Its configuration does not say so, but the family is known."""
    name = str(family.folder / "model")
    tokenizer = pt.load_tokenizer(name)
    mask_id = mask_id_of(family)
    model = without_mask(decode.load_model(name), mask_id)
    check_decoding(family, model, tokenizer)

    rows = [(s["prompt_len"], s["full_ids"]) for s in torch.load(family.folder / "train.pt")[:3]]
    how = SimpleNamespace(block_size=8, max_len=400, batch_size=4, seed=0)
    lines = held_out.held_out_loss(model, name, rows, mask_id, how)
    total, draws = 0.0, 0
    predict = in_place(model, family.shift)
    for block, t, numbers in held_out.list_batches(rows, how):
        made = held_out.make_draws(how, rows, numbers, block, t, mask_id)
        for ids, noisy, mask in zip(*made, strict=True):
            if mask.any():
                with torch.no_grad():
                    logits = predict(input_ids=noisy[None]).logits[0]
                total += cross_entropy(logits[mask], ids[mask]).item()
                draws += 1
    assert held_out.mean_loss(lines) == pytest.approx(total / draws, rel=1e-4)


def check_decoding(family, model, tokenizer):
    """Prompts of several lengths in a batch get the answers of the plain definition."""
    config, vocabulary = model.config, model.get_input_embeddings().num_embeddings
    ids = decode.special_ids("m", config, tokenizer, vocabulary)
    prompts = decode.encode_prompts(tokenizer, ["1 ; p plus 2", "2 ; q max 3 ; r = q", "3"])
    how = {"gen_length": 12, "block_length": 4, "steps": 6}
    answers = decode.decode(model, prompts, **how, **ids)
    predict = in_place(model, family.shift)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference(predict, torch.tensor(prompt), **how, mask_id=ids["mask_id"])
        length = decode.answer_length(expected, ids["eos_id"], ids["eot_id"])
        filled = -(-length // 4) * 4
        assert answer[:filled].equal(expected[:filled])


# ------- whole runs
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_trained_checkpoints_load_and_decode_offline(family, tmp_path, ranks):
    """Each trainer once, one of them on two ranks, with the adapter."""
    script, command = "train_fullseq.py", [sys.executable]
    if ranks == 2:
        script, command = "train_blockwise.py", launcher(2)
    words = {"MODEL_NAME": family.folder / "model", "DATA_PT": family.folder / "train.pt"}
    words |= {"MASK_ID": mask_id_of(family), "LOGIT_SHIFT": family.shift, "MAX_LEN": 400}
    words |= {"MICRO_BSIZE": 2, "LORA_RANK": 4, "LR": 0.01, "TOTAL_TRAIN_STEPS": 4}
    words |= {"CKPT_DIR": "run", "SAVE_ADAPTER": True, "STATE_EVERY": 2}
    status, printed = launch([*command, SUITE / script, *flags(**words)], tmp_path)
    assert status == 0, printed
    assert len(losses(tmp_path / "run_logs")) == 4
    folder = tmp_path / "run_step0004"

    # as its base, and with the settings that decoding needs
    (kind,) = [key for key in family.auto_map if key != "AutoConfig"]
    auto = getattr(transformers, kind)
    loaded = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    saved = load_file(folder / "model.safetensors")
    base = load_file(family.folder / "model" / "model.safetensors")
    assert saved.keys() == base.keys()
    changed = {name for name in saved if not torch.equal(saved[name], base[name])}
    assert len(changed) == family.targets
    for name, weight in saved.items():
        assert torch.equal(loaded.state_dict()[name], weight.float())
    config = json.loads((folder / "config.json").read_text())
    assert config["mask_token_id"] == mask_id_of(family)
    assert config["logit_shift"] == family.shift
    assert config["use_cache"]  # as in the base
    assert config["auto_map"] == {key: f"{family.module}.{x}" for key, x in family.auto_map.items()}

    # decoding, of the checkpoint and of its adapter
    tokenizer = pt.load_tokenizer(str(folder))
    model = without_mask(decode.load_model(str(folder)), mask_id_of(family))
    check_decoding(family, model, tokenizer)
    merged = decode.load_model(str(folder / "adapter")).state_dict()
    for name, weight in saved.items():
        assert torch.equal(merged[name].bfloat16(), weight)
    shape, vocabulary = evaluate.load_config(str(folder / "adapter"), "main")
    assert (shape.model_type, vocabulary) == (loaded.config.model_type, len(tokenizer))


def test_the_code_of_a_hub_model_is_beside_the_checkpoint(trainer, family, tmp_path):
    """Its configuration, and that of a tokenizer in Python, name no repository."""
    commit = "0" * 40
    repository = os.path.join(os.environ["HF_HOME"], "hub", f"models--org--{family.name}")
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(family.folder / "model", os.path.join(repository, "snapshots", commit))
    for name in ("config.json", "tokenizer_config.json"):
        path = os.path.join(repository, "snapshots", commit, name)
        with open(path) as file:
            text = re.sub(
                r'"((modeling|tokenization)_\w+\.)', rf'"org/{family.name}--\1', file.read()
            )
        with open(path, "w") as file:
            file.write(text)
    os.mkdir(os.path.join(repository, "refs"))
    with open(os.path.join(repository, "refs", "main"), "w") as file:
        file.write(commit)
    args = constants_of(trainer, family, MODEL_NAME=f"org/{family.name}")
    model = trainer.build_model(args, "cpu")
    tokenizer = trainer.load_pretrained(args, AutoTokenizer, fix_mistral_regex=False)
    trainer.save_merged(args, model, tokenizer, tmp_path / "checkpoint")
    shutil.rmtree(repository)
    for path in (tmp_path / "checkpoint").glob("*config.json"):
        assert "org/" not in str(json.loads(path.read_text()).get("auto_map"))
    assert pt.load_tokenizer(str(tmp_path / "checkpoint")).chat_template
    loaded = decode.load_model(str(tmp_path / "checkpoint")).state_dict()
    for name, weight in load_file(family.folder / "model" / "model.safetensors").items():
        assert torch.equal(loaded[name], weight.float())  # the adapter is new
