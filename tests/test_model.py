"""LoRA's targets, the merge and the checkpoint."""

import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import decode
import evaluate
import pytest
import torch
from accelerate import init_empty_weights
from helpers import constants, small_llada, small_qwen
from safetensors.torch import load_file
from toy_task.llada.configuration_llada import LLaDAConfig
from toy_task.llada.modeling_llada import LLaDAModelLM, rotary_angles, rotate
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_blockwise


def adapted(trainer, args, scale=0.3):
    """The toy with an adapter whose B is not zero, as after training."""
    model = trainer.build_model(args, "cpu")
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model.to(torch.bfloat16)  # as DeepSpeed's engine does


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder, fix_mistral_regex=False)


def merged_weights(trainer, args, model, folder):
    """What save_merged writes to `folder`."""
    trainer.save_merged(args, model, tokenizer_of(args.MODEL_NAME), folder)
    return load_file(os.path.join(folder, "model.safetensors"))


def base_weights(args):
    return load_file(os.path.join(args.MODEL_NAME, "model.safetensors"))


def test_merge_is_the_definition_and_touches_nothing_else(trainer, args, tmp_path):
    args.LORA_RANK, args.LORA_ALPHA = 4, 6
    model = adapted(trainer, args)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged, base = merged_weights(trainer, args, model, tmp_path), base_weights(args)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        if name.removesuffix(".weight").endswith(("q_proj", "k_proj", "v_proj", "up_proj")):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (before[f"{prefix}.lora_{x}.default.weight"].double() for x in "AB")
            exact = weight.double() + 6 / 4 * b @ a
            error = (merged[name].double() - exact).abs().max()
            assert error <= exact.abs().max() * 2**-8  # bf16's rounding
            assert not torch.equal(merged[name], weight)
        else:
            assert torch.equal(merged[name], weight)
        assert merged[name].dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merged_model_computes_what_the_adapted_one_does(trainer, args, tmp_path):
    model = adapted(trainer, args, scale=0.05).eval()
    plain = AutoModelForCausalLM.from_pretrained(args.MODEL_NAME, trust_remote_code=True)
    plain = plain.float().eval()
    merged = merged_weights(trainer, args, model, tmp_path)
    ids = torch.randint(1500, (2, 20))
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        plain.load_state_dict({name: weight.float() for name, weight in merged.items()})
        ours, theirs = plain(input_ids=ids).logits, model.float()(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 0.05 * (before - theirs).abs().max()


def test_checkpoint_loads_by_itself(trainer, args, tmp_path):
    folder = tmp_path / "a" / "checkpoint"
    weights = merged_weights(trainer, args, adapted(trainer, args), folder)
    names = {"model.safetensors", "tokenizer.json", "config.json"}
    code = {"modeling_llada.py", "configuration_llada.py"}
    assert names | code <= set(os.listdir(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())
    one, other = tokenizer_of(args.MODEL_NAME), tokenizer_of(folder)
    assert one.chat_template == other.chat_template
    assert one("12 pens")["input_ids"] == other("12 pens")["input_ids"]


def test_the_adapter_beside_a_checkpoint_gives_the_same_weights(trainer, args, tmp_path, one_rank):
    """Loaded by decode.py and evaluate.py with its base, and merged in float32."""
    args.SAVE_ADAPTER = True
    run = SimpleNamespace(state=tmp_path / "state", model=adapted(trainer, args))
    run.tokenizer = tokenizer_of(args.MODEL_NAME)
    trainer.save_checkpoint(args, run, tmp_path / "run")
    adapter = str(tmp_path / "run" / "adapter")
    assert set(os.listdir(adapter)) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert os.path.getsize(f"{adapter}/adapter_model.safetensors") < 2**20
    assert decode.base_of(adapter, "x") == (args.MODEL_NAME, args.MODEL_REVISION)

    merged = load_file(tmp_path / "run" / "model.safetensors")
    loaded = decode.load_model(adapter, dtype=torch.float32).state_dict()
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(loaded[name].bfloat16(), merged[name]) for name in merged)
    config, vocabulary = evaluate.load_config(adapter, "main")
    assert (config.model_type, vocabulary) == ("llada", len(merged["model.transformer.wte.weight"]))
    identities = {evaluate.model_identity(str(path), config) for path in (adapter, args.MODEL_NAME)}
    assert len(identities) == 2


def test_targets_never_reach_the_head(trainer, args):
    """`ff_out` names a layer of every block and the LM head."""
    args.TARGET_MODS = ["ff_out", "q_proj", "gate_proj"]
    model = AutoModelForCausalLM.from_pretrained(args.MODEL_NAME, trust_remote_code=True)
    expected = set()
    for layer in range(3):
        expected |= {f"model.transformer.blocks.{layer}.{end}" for end in ("ff_out", "q_proj")}
    assert set(trainer.lora_targets(args, model)) == expected
    trained = {n for n, p in trainer.build_model(args, "cpu").named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 6
    assert all(".blocks." in name and ".lora_" in name for name in trained)


def test_alpha_is_tied_to_the_rank(trainer, args):
    for rank, alpha, scale in ((4, None, 2.0), (8, None, 2.0), (8, 4, 0.5)):
        args.LORA_RANK, args.LORA_ALPHA = rank, alpha
        layer = trainer.build_model(args, "cpu").get_base_model().model.transformer.blocks[0].q_proj
        assert layer.scaling["default"] == scale and layer.lora_A["default"].weight.shape[0] == rank


def test_loading(trainer, args, monkeypatch):
    """Straight to its device in bf16, with LoRA's dropout on."""
    given = {}
    load_whole = trainer.load_whole

    def load(*name, **options):
        given.update(options)
        return load_whole(*name, **options)

    monkeypatch.setattr(trainer, "load_whole", load)
    args.LORA_DROPOUT = 0.3
    model = trainer.build_model(args, "cpu").train()
    assert (given["dtype"], given["device_map"]) == (trainer.compute_dtype(), {"": "cpu"})
    dropouts = set()
    for name, module in model.named_modules():
        if name.endswith("lora_dropout.default"):
            dropouts.add(module.p)
    assert dropouts == {0.3}


def test_the_adapter_is_the_same_on_every_rank(trainer, args):
    one = trainer.build_model(args, "cpu").state_dict()
    torch.rand(7)
    other = trainer.build_model(args, "cpu").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_toy_llada_scales_to_the_real_shape():
    with init_empty_weights():
        model = LLaDAModelLM(LLaDAConfig())
    names = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184
    assert names["model.transformer.blocks.31.ff_proj.weight"] == (12288, 4096)
    assert names["model.transformer.ff_out.weight"] == (126464, 4096)


def test_toy_llada_is_bidirectional_and_knows_positions():
    model = small_llada(init_std=0.3, vocab_size=40)
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 7] = 30
    logits = model(input_ids=ids).logits
    other = model(input_ids=changed).logits
    assert (logits[0, 0] - other[0, 0]).abs().max() > 1e-3  # the last token reaches the first
    reverse = model(input_ids=ids.flip(1)).logits
    assert (logits[0] - reverse[0].flip(0)).abs().max() > 1e-3
    hidden = torch.ones(1, 8)
    hidden[0, 7] = 0
    masked = [model(input_ids=x, attention_mask=hidden).logits[0, :7] for x in (ids, changed)]
    torch.testing.assert_close(*masked)


def test_toy_rotary_attention_depends_on_distance_alone():
    config = LLaDAConfig(d_model=16, n_heads=2)
    angles = rotary_angles(30, config, "cpu").double()
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)
    scores = [(rotate(q, angles[i]) * rotate(k, angles[i + 4])).sum() for i in (0, 5, 20)]
    torch.testing.assert_close(scores, [scores[0]] * 3)
    assert (scores[0] - (q * k).sum()).abs() > 1e-3


def loss_and_gradients(trainer, args):
    """Loss and gradients of two rows, and the bytes that the layers keep for the backward pass."""
    model, kept = adapted(trainer, args).train(), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    examples = trainer.load_examples(args)
    draws, _ = trainer.plan(args, trainer.METHOD, examples, 1)
    batch = trainer.make_batch(args, examples, draws[0, 0, 0], 0)

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_logits = tensor.shape[-1:] == (126464,)
        if not is_logits and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.supervised_loss(args, model, *batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) == 2 * 4 * 3 and all(gradient.any() for gradient in gradients)
    return loss.detach(), torch.cat([part.flatten() for part in gradients]), sum(kept.values())


def test_activation_checkpointing_changes_memory_alone(trainer, args):
    """Bit for bit, dropout included; the layers keep little but their inputs."""
    args.LORA_DROPOUT = 0.3
    loss, gradients, kept = loss_and_gradients(trainer, args)
    args.ACTIVATION_CHECKPOINTING = True
    lean_loss, lean_gradients, lean_kept = loss_and_gradients(trainer, args)
    assert torch.equal(loss, lean_loss) and torch.equal(gradients, lean_gradients)
    assert lean_kept < 0.5 * kept


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU, torch.compile needs g++")
def test_compiled_is_the_same_to_rounding(toy_folder, monkeypatch):
    compiled = []
    compile_function = torch.compile

    def note(function):
        compiled.append(function)
        return compile_function(function)

    monkeypatch.setattr(torch, "compile", note)
    args = constants(train_blockwise, toy_folder, LORA_DROPOUT=0.0)
    loss, gradients, kept = loss_and_gradients(train_blockwise, args)
    assert not compiled  # COMPILE is None, on a CPU
    args.COMPILE = True
    fast_loss, fast_gradients, fast_kept = loss_and_gradients(train_blockwise, args)
    assert len(compiled) == 3  # the layers
    torch.testing.assert_close(fast_loss, loss, rtol=2e-3, atol=0)
    assert (fast_gradients - gradients).float().norm() < 0.02 * gradients.float().norm()
    assert fast_kept < 0.8 * kept


@pytest.mark.parametrize(
    ("device", "capabilities", "dtype"),
    [
        ("cpu", {"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_f": True, "amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ("cpu", {"neon": True, "bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ("cpu", {"avx2": True}, torch.float32),
        ("cuda", {"avx2": True}, torch.bfloat16),
    ],
)
def test_dtype(trainer, args, monkeypatch, device, capabilities, dtype):
    """A CPU without bf16 arithmetic computes in float32; a GPU never does."""
    monkeypatch.setattr(trainer.deepspeed.get_accelerator(), "device_name", lambda: device)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert trainer.compute_dtype() == dtype
    assert trainer.ds_config(args, 3)["bf16"]["enabled"] == (dtype == torch.bfloat16)
    if device == "cpu":
        weights = trainer.build_model(args, "cpu").get_base_model().get_input_embeddings().weight
        assert weights.dtype == dtype


def test_a_checkpoint_of_a_float32_run_is_bf16(trainer, args, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "cpu_has_bf16", lambda: False)
    model = trainer.build_model(args, "cpu")
    merged = merged_weights(trainer, args, model, tmp_path)
    assert all(torch.equal(merged[name], weight) for name, weight in base_weights(args).items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "auto_map" in config
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.float32


def test_files_of_a_checkpoint_have_the_umask(trainer, args, tmp_path, one_rank):
    """Those of the adapter too."""
    args.SAVE_ADAPTER = True
    run = SimpleNamespace(state=tmp_path / "state", model=adapted(trainer, args))
    run.tokenizer = tokenizer_of(args.MODEL_NAME)
    before = os.umask(0o027)
    try:
        trainer.save_checkpoint(args, run, tmp_path / "run")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"model.safetensors", "adapter_model.safetensors"} <= {path.name for path in files}
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o640, path


def test_a_tied_head_is_saved_once(trainer, args, tmp_path):
    """In float32, where a cast to bf16 makes two tensors of one."""
    model = small_qwen()
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "base")
    args.MODEL_NAME = str(tmp_path / "base")
    tokenizer = SimpleNamespace(save_pretrained=os.mkdir)
    trainer.save_merged(args, model, tokenizer, tmp_path / "checkpoint")
    names = load_file(tmp_path / "checkpoint" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float()), name


def test_a_checkpoint_has_its_own_models_code_and_mask_token(trainer, args, tmp_path):
    """Read-only code, and another model of the same name that was loaded in between."""
    for place in ("a", "b"):
        shutil.copytree(args.MODEL_NAME, tmp_path / place / "model")
        code = tmp_path / place / "model" / "modeling_llada.py"
        code.write_text(code.read_text() + f"\n# {place}\n")
        code.chmod(0o444)
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    config["auto_map"] = {key: f"hub/name--{code}" for key, code in config["auto_map"].items()}
    config["auto_map"]["AutoModelForMaskedLM"] = "hub/other--modeling_other.Other"
    args.MODEL_NAME = str(tmp_path / "a" / "model")
    model = trainer.load_model(args, "cpu")
    model.config.auto_map = config["auto_map"]
    model.config.mask_token_id = None
    other = args.__class__(**vars(args) | {"MODEL_NAME": str(tmp_path / "b" / "model")})
    trainer.load_model(other, "cpu")
    trainer.save_merged(args, model, tokenizer_of(args.MODEL_NAME), tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "modeling_llada.py").read_text().endswith("# a\n")
    saved = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert saved["mask_token_id"] == args.MASK_ID
    assert saved["auto_map"]["AutoConfig"] == "configuration_llada.LLaDAConfig"
    assert saved["auto_map"]["AutoModelForMaskedLM"] == "hub/other--modeling_other.Other"


def test_an_adapter_finds_its_base_from_any_folder(trainer, args, monkeypatch):
    monkeypatch.chdir(os.path.dirname(args.MODEL_NAME))
    base = args.MODEL_NAME
    args.MODEL_NAME = os.path.basename(base)
    model = trainer.build_model(args, "cpu")
    assert model.peft_config["default"].base_model_name_or_path == base


def test_a_causal_model_is_refused(trainer, args, tmp_path):
    trainer.check_sees_later(args, small_llada().bfloat16())
    small_qwen().save_pretrained(tmp_path)
    args.MODEL_NAME = str(tmp_path)
    with pytest.raises(SystemExit, match="is a causal language model"):
        trainer.build_model(args, "cpu")


def test_sums_of_gradients_are_float32(trainer, args):
    assert "data_types" not in trainer.ds_config(args, 3)
    args.GRAD_ACC = 2
    assert trainer.ds_config(args, 3)["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(("device", "default"), [("cpu", False), ("cuda", True)])
def test_layers_are_compiled_on_a_gpu_unless_told_otherwise(
    trainer, args, monkeypatch, device, default
):
    assert args.COMPILE is None
    monkeypatch.setattr(trainer.deepspeed.get_accelerator(), "device_name", lambda: device)
    assert trainer.compiles(args) == default
    for args.COMPILE in (False, True):
        assert trainer.compiles(args) == args.COMPILE


@pytest.mark.parametrize("demanded", [None, True])
def test_layers_that_cannot_be_compiled(trainer, args, monkeypatch, capsys, demanded):
    """The run goes on without, unless COMPILE is True; with the eager losses and gradients."""

    def fail(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    monkeypatch.setattr(trainer, "compiles", lambda _: True)
    args.COMPILE, args.MASK_ID, args.MAX_LEN = demanded, 7, 12
    model = trainer.prepare_layers(args, small_llada().train())
    ids = torch.arange(12)[None]
    try:
        if demanded:
            with pytest.raises(SystemExit, match="COMPILE = True: the layers cannot be compiled"):
                trainer.warm_up(args, model)
            return
        trainer.warm_up(args, model)
        assert "COMPILE = None: the layers cannot be compiled" in capsys.readouterr().out
        torch.testing.assert_close(model(input_ids=ids).logits, small_llada()(input_ids=ids).logits)
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU, torch.compile needs g++")
def test_warming_up_compiles_and_leaves_no_gradient(trainer, args):
    """Later steps of the same shape, forwards and backwards, compile nothing."""
    args.COMPILE, args.MASK_ID, args.MAX_LEN = True, 7, 12
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = trainer.prepare_layers(args, small_llada().train())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.warm_up(args, model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])
    model(input_ids=torch.arange(24).view(2, 12)).logits.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU, torch.compile needs g++")
def test_checkpointed_layers_are_compiled_too(args):
    """In the other order nothing was compiled: what calls `checkpoint` breaks the graph."""
    ids = torch.arange(20)[None]
    found = []
    for args.COMPILE in (False, True):
        args.ACTIVATION_CHECKPOINTING = args.COMPILE
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = train_blockwise.prepare_layers(args, small_llada().train())
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == args.COMPILE
        found.append([logits.detach(), *gradients])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-5)
