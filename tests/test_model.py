"""LoRA's targets, the merge and the checkpoint."""

import json
import os
import shutil

import decode
import evaluate
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from toy_llada.configuration_llada import LLaDAConfig
from toy_llada.modeling_llada import LLaDAModelLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def adapted(trainer, scale=0.3):
    """The toy with an adapter whose B is not zero, as after training."""
    model = trainer.build_model("cpu")
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model.to(torch.bfloat16)  # as DeepSpeed's engine does


def merged_weights(trainer, model, folder):
    """What save_merged writes, and the folder it wrote."""
    trainer.save_merged(
        model, AutoTokenizer.from_pretrained(trainer.MODEL_NAME, fix_mistral_regex=False), folder
    )
    return load_file(os.path.join(folder, "model.safetensors"))


def base_weights(trainer):
    return load_file(os.path.join(trainer.MODEL_NAME, "model.safetensors"))


def test_merge_is_the_definition_and_touches_nothing_else(trainer, tmp_path):
    trainer.LORA_RANK, trainer.LORA_ALPHA = 4, 6
    model = adapted(trainer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged, base = merged_weights(trainer, model, tmp_path), base_weights(trainer)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        if name.removesuffix(".weight").endswith(("q_proj", "k_proj", "v_proj", "up_proj")):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (before[f"{prefix}.lora_{x}.default.weight"].double() for x in "AB")
            exact = weight.double() + 6 / 4 * b @ a
            assert (
                merged[name].double() - exact
            ).abs().max() <= exact.abs().max() * 2**-8  # bf16's rounding
            assert not torch.equal(merged[name], weight)
        else:
            assert torch.equal(merged[name], weight)
        assert merged[name].dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merged_model_computes_what_the_adapted_one_does(trainer, tmp_path):
    model = adapted(trainer, scale=0.05).eval()
    plain = (
        AutoModelForCausalLM.from_pretrained(trainer.MODEL_NAME, trust_remote_code=True)
        .float()
        .eval()
    )
    ids = torch.randint(1500, (2, 20))
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        plain.load_state_dict(
            {
                name: weight.float()
                for name, weight in merged_weights(trainer, model, tmp_path).items()
            }
        )
        ours, theirs = plain(input_ids=ids).logits, model.float()(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 0.05 * (before - theirs).abs().max()


def test_checkpoint_loads_by_itself(trainer, tmp_path):
    model = adapted(trainer)
    weights = merged_weights(trainer, model, tmp_path / "a" / "checkpoint")
    whole = {
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        "modeling_llada.py",
        "configuration_llada.py",
    }
    assert whole <= set(os.listdir(tmp_path / "a" / "checkpoint"))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a" / "checkpoint", trust_remote_code=True, dtype="auto"
    )
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())
    tokenizers = [
        AutoTokenizer.from_pretrained(path, fix_mistral_regex=False)
        for path in (trainer.MODEL_NAME, tmp_path / "a" / "checkpoint")
    ]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0]("12 pens")["input_ids"] == tokenizers[1]("12 pens")["input_ids"]


def test_the_adapter_beside_a_checkpoint_gives_the_same_weights(trainer, tmp_path, monkeypatch):
    """Loaded by decode.py and evaluate.py with its base, and merged in float32."""
    monkeypatch.setattr(trainer.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(trainer.dist, "barrier", lambda: None)
    monkeypatch.setattr(trainer, "SAVE_ADAPTER", True)
    tokenizer = AutoTokenizer.from_pretrained(trainer.MODEL_NAME, fix_mistral_regex=False)
    trainer.save_checkpoint(adapted(trainer), tokenizer, tmp_path / "run", tmp_path / "unfinished")
    adapter = str(tmp_path / "run" / "adapter")
    assert set(os.listdir(adapter)) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert os.path.getsize(f"{adapter}/adapter_model.safetensors") < 2**20
    assert decode.base_of(adapter, "x") == (trainer.MODEL_NAME, trainer.MODEL_REVISION)

    merged = load_file(tmp_path / "run" / "model.safetensors")
    loaded = decode.load_model(adapter, dtype=torch.float32).state_dict()
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(loaded[name].bfloat16(), merged[name]) for name in merged)
    config, vocabulary = evaluate.load_config(adapter, "main")
    assert (config.model_type, vocabulary) == ("llada", len(merged["model.transformer.wte.weight"]))
    identities = {
        evaluate.model_identity(str(path), config) for path in (adapter, trainer.MODEL_NAME)
    }
    assert len(identities) == 2


def test_targets_never_reach_the_head(trainer):
    """`ff_out` names a layer of every block and the LM head (T12)."""
    trainer.TARGET_MODS = ["ff_out", "q_proj", "gate_proj"]
    model = AutoModelForCausalLM.from_pretrained(trainer.MODEL_NAME, trust_remote_code=True)
    expected = {
        f"model.transformer.blocks.{i}.{end}" for i in range(3) for end in ("ff_out", "q_proj")
    }
    assert set(trainer.lora_targets(model)) == expected
    trained = {n for n, p in trainer.build_model("cpu").named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 6 and all(
        ".blocks." in name and ".lora_" in name for name in trained
    )


def test_alpha_is_tied_to_the_rank(trainer):
    for rank, alpha, scale in ((4, None, 2.0), (8, None, 2.0), (8, 4, 0.5)):
        trainer.LORA_RANK, trainer.LORA_ALPHA = rank, alpha
        layer = trainer.build_model("cpu").get_base_model().model.transformer.blocks[0].q_proj
        assert layer.scaling["default"] == scale and layer.lora_A["default"].weight.shape[0] == rank


def test_loading(trainer, monkeypatch):
    """Straight to its device in bf16 (T24), with LoRA's dropout on."""
    given, load = {}, AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        trainer.AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **how: given.update(how) or load(name, **how),
    )
    trainer.LORA_DROPOUT = 0.3
    model = trainer.build_model("cpu").train()
    assert (given["dtype"], given["device_map"]) == (torch.bfloat16, {"": "cpu"})
    dropouts = {
        module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")
    }
    assert dropouts == {0.3}


def test_the_adapter_is_the_same_on_every_rank(trainer):
    one, _, other = (
        trainer.build_model("cpu").state_dict(),
        torch.rand(7),
        trainer.build_model("cpu").state_dict(),
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_toy_llada_scales_to_the_real_shape():
    with init_empty_weights():
        model = LLaDAModelLM(LLaDAConfig())
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184
    assert names["model.transformer.blocks.31.ff_proj.weight"] == (12288, 4096)
    assert names["model.transformer.ff_out.weight"] == (126464, 4096)


def test_toy_llada_is_bidirectional_and_knows_positions():
    torch.manual_seed(0)
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=32, vocab_size=40, init_std=0.3
        )
    )
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 7] = 30
    logits = model.eval()(input_ids=ids).logits
    assert (
        logits[0, 0] - model(input_ids=changed).logits[0, 0]
    ).abs().max() > 1e-3  # the last token reaches the first
    assert (logits[0] - model(input_ids=ids.flip(1)).logits[0].flip(0)).abs().max() > 1e-3
    hidden = torch.ones(1, 8)
    hidden[0, 7] = 0
    masked = [model(input_ids=x, attention_mask=hidden).logits[0, :7] for x in (ids, changed)]
    torch.testing.assert_close(*masked)


def test_toy_rotary_attention_depends_on_distance_alone():
    from toy_llada.modeling_llada import rotary_angles, rotate

    config = LLaDAConfig(d_model=16, n_heads=2)
    angles = rotary_angles(30, config, "cpu").double()
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)
    scores = [(rotate(q, angles[i]) * rotate(k, angles[i + 4])).sum() for i in (0, 5, 20)]
    torch.testing.assert_close(scores, [scores[0]] * 3)
    assert (scores[0] - (q * k).sum()).abs() > 1e-3


def loss_and_gradients(trainer, **constants):
    """Loss and gradients of two rows, and the bytes that the layers keep for the backward pass."""
    for name, value in constants.items():
        setattr(trainer, name, value)
    model, kept = adapted(trainer).train(), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    examples = trainer.load_examples()
    draws, numbers = trainer.plan(examples, 1)

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_logits = tensor.shape[-1:] == (126464,)
        if not is_logits and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.supervised_loss(
            model, *trainer.make_batch(examples, draws, numbers[0, 0, 0], 0)
        )
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) == 2 * 4 * 3 and all(gradient.any() for gradient in gradients)
    return (
        loss.detach(),
        torch.cat([gradient.flatten() for gradient in gradients]),
        sum(kept.values()),
    )


def test_activation_checkpointing_changes_memory_alone(trainer):
    """Bit for bit, dropout included; the layers keep little but their inputs."""
    trainer.LORA_DROPOUT = 0.3
    loss, gradients, kept = loss_and_gradients(trainer)
    lean_loss, lean_gradients, lean_kept = loss_and_gradients(
        trainer, ACTIVATION_CHECKPOINTING=True
    )
    assert torch.equal(loss, lean_loss) and torch.equal(gradients, lean_gradients)
    assert lean_kept < 0.5 * kept


@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU, torch.compile needs g++")
def test_compiled_is_the_same_to_rounding(blockwise, monkeypatch):
    compiled = []
    compile_module = torch.nn.Module.compile

    def note(module, *args, **kwargs):
        compiled.append(module)
        compile_module(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    blockwise.LORA_DROPOUT = 0.0
    loss, gradients, kept = loss_and_gradients(blockwise)
    assert not compiled  # COMPILE is False
    fast_loss, fast_gradients, fast_kept = loss_and_gradients(blockwise, COMPILE=True)
    assert len(compiled) == 3  # the layers
    torch.testing.assert_close(fast_loss, loss, rtol=2e-3, atol=0)
    assert (fast_gradients - gradients).float().norm() < 0.02 * gradients.float().norm()
    assert fast_kept < 0.8 * kept


@pytest.mark.parametrize(
    ("device", "has_bf16", "dtype"),
    [
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("cuda", False, torch.bfloat16),
    ],
)
def test_dtype(trainer, monkeypatch, device, has_bf16, dtype):
    """A CPU without bf16 arithmetic computes in float32; a GPU never does."""
    monkeypatch.setattr(trainer.deepspeed.get_accelerator(), "device_name", lambda: device)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    assert trainer.compute_dtype() == dtype
    assert trainer.ds_config(3)["bf16"]["enabled"] == (dtype == torch.bfloat16)
    if device == "cpu":
        weights = trainer.build_model("cpu").get_base_model().get_input_embeddings().weight
        assert weights.dtype == dtype


def test_a_checkpoint_of_a_float32_run_is_bf16(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = trainer.build_model("cpu")
    merged = merged_weights(trainer, model, tmp_path)
    assert all(torch.equal(merged[name], weight) for name, weight in base_weights(trainer).items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "auto_map" in config
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.float32
