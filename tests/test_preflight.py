"""Wrong input ends in one message, which names it and the remedy, before weights are loaded."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SUITE, TRAINERS, flags, launch, launcher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GOOD = {"prompt_len": 3, "full_ids": torch.arange(10, 30)}


class Code:
    def __reduce__(self):
        return (print, ("code has run",))


def rows(**changes):
    return [GOOD, {**GOOD, **changes}]


FILES = {
    "not a list": ({"prompt_len": 3}, "is not what pt.py writes"),
    "empty list": ([], "0 rows with an answer"),
    "not dicts": ([1, 2], "is not what pt.py writes"),
    "wrong keys": ([GOOD, {"prompt_len": 3, "ids": GOOD["full_ids"]}], "KeyError('full_ids')"),
    "prompt_len 0": (rows(prompt_len=0), "row 1 has prompt_len 0 of 20"),
    "prompt_len negative": (rows(prompt_len=-3), "prompt_len -3"),
    "prompt_len beyond the row": (rows(prompt_len=300), "prompt_len 300 of 20"),
    "prompt_len a float": (rows(prompt_len=3.0), "prompt_len 3.0"),
    "prompt_len a bool": (rows(prompt_len=True), "prompt_len True"),
    "prompt_len a tensor": (rows(prompt_len=torch.tensor(3)), "prompt_len tensor(3)"),
    "float ids": (rows(full_ids=torch.rand(20)), "row 1 has full_ids"),
    "ids a list": (rows(full_ids=[1] * 20), "row 1 has full_ids"),
    "two-dimensional ids": (rows(full_ids=torch.ones(2, 20).long()), "row 1 has full_ids"),
    "ids beyond the vocabulary": (
        rows(full_ids=torch.arange(126460, 126480)),
        "ids beyond the model's 126464",
    ),
    "ids beyond any integer type": (rows(full_ids=torch.arange(20) + 2**40), "ids beyond"),
    "negative ids": (rows(full_ids=torch.arange(-5, 15)), "row 1 has full_ids"),
    "MASK_ID in it": (rows(full_ids=torch.tensor([5, 6, 7, 126336, 8])), "MASK_ID"),
    "no answer in any row": (
        [{"prompt_len": 20, "full_ids": GOOD["full_ids"]}] * 4,
        "0 rows with an answer",
    ),
    "fewer rows than MICRO_BSIZE": ([GOOD], "MICRO_BSIZE = 2"),
    "another tokenizer": (
        [{"prompt_len": 3, "full_ids": torch.arange(60000, 60020)}] * 40,
        "another tokenizer",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_data_files(trainer, case, tmp_path):
    content, named = FILES[case]
    trainer.DATA_PT = str(tmp_path / "rows.pt")
    torch.save(content, trainer.DATA_PT)
    problems = trainer.preflight(1)
    assert any(named in problem for problem in problems)
    assert all(
        trainer.DATA_PT in problem and "\n" not in problem and len(problem) < 400
        for problem in problems
    )


def test_damaged_missing_and_dangerous_files(trainer, tmp_path, capsys):
    whole = Path(trainer.DATA_PT).read_bytes()
    contents = {
        "truncated.pt": whole[: len(whole) // 2],
        "text.pt": b"rows",
        "empty.pt": b"",
        "missing.pt": None,
    }
    contents["code.pt"] = pickle.dumps([Code()])
    for name, content in contents.items():
        trainer.DATA_PT = str(tmp_path / name)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        (problem,) = trainer.preflight(1)
        assert name in problem and "pt.py" in problem and "\n" not in problem
    torch.save([Code()], tmp_path / "code.pt")
    assert len(trainer.preflight(1)) == 1
    assert "code has run" not in capsys.readouterr().out


CONSTANTS = [
    ("MASK_PROB_EPS", 1.5),
    ("MASK_PROB_EPS", -0.1),
    ("LR", float("nan")),
    ("LORA_DROPOUT", 2),
    ("MICRO_BSIZE", 0),
    ("GRAD_ACC", 1.5),
    ("TOTAL_TRAIN_STEPS", 0),
    ("TOTAL_TRAIN_STEPS", "ten"),
    ("EPOCHS", True),
    ("SEED", -1),
    ("MAX_LEN", None),
    ("MASK_PADDING", 1),
    ("DATA_PT", None),
    ("CKPT_DIR", ""),
    ("TARGET_MODS", "q_proj"),
    ("TARGET_MODS", []),
    ("SAVE_EVERY", 0),
    ("BLOCK_SIZE", 0),
    ("PREFIX_MASK_RATE", 1.1),
    ("SUFFIX_MASK_PROB", -0.5),
    ("SUFFIX_MASK_PROB", "half"),
]


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (method, name, value)
        for method in TRAINERS
        for name, value in CONSTANTS
        if name in TRAINERS[method].CONSTANTS
    ],
)
def test_constants_out_of_range(request, method, name, value):
    trainer = request.getfixturevalue(method)
    setattr(trainer, name, value)
    (problem,) = trainer.check_constants()
    assert name in problem and repr(value) in problem and "must be" in problem


def test_limits_are_spelled_out(trainer):
    trainer.TOTAL_TRAIN_STEPS, trainer.MAX_LEN, trainer.DATA_PT = 0, 0, ""
    assert trainer.check_constants() == [
        "DATA_PT = '': must be str, not empty",
        "MAX_LEN = 0: must be int, 1 to 1000000",
        "TOTAL_TRAIN_STEPS = 0: must be int or None, 1 to 1000000",
    ]


def test_wildcards_in_ckpt_dir_are_refused(trainer):
    """DeepSpeed looks for a saved state with glob, which would not find a folder named [1]."""
    for name in ("runs/*", "what?", "[1]"):
        trainer.CKPT_DIR = name
        (problem,) = trainer.check_constants()
        assert repr(name) in problem and "must not contain" in problem


def test_every_constant_is_checked(trainer):
    checked = [name for names, *_ in trainer.LIMITS for name in names.split()]
    assert sorted(checked) == sorted(trainer.CONSTANTS)


def test_good_constants_pass(trainer):
    assert not trainer.check_constants() and trainer.preflight(1) == []
    trainer.TOTAL_TRAIN_STEPS = trainer.SAVE_EVERY = trainer.LORA_ALPHA = None
    trainer.MAX_SAMPLES, trainer.LR, trainer.TARGET_MODS = 16, 1, ["q_proj", "missing"]
    assert not trainer.check_constants() and trainer.preflight(2) == []


def test_model_folder_missing(trainer, tmp_path):
    for name in (str(tmp_path / "no"), "a/b"):
        trainer.MODEL_NAME = name
        (problem,) = trainer.preflight(1)
        assert "cannot be loaded" in problem and repr(name) in problem and "\n" not in problem


def test_no_bf16(trainer, monkeypatch):
    monkeypatch.setattr(trainer.deepspeed.get_accelerator(), "is_bf16_supported", lambda: False)
    (problem,) = trainer.preflight(1)
    assert "bf16" in problem


def test_incomplete_weights(trainer, tmp_path):
    """Never a new random layer in the place of a missing one."""
    folder = tmp_path / "model"
    shutil.copytree(trainer.MODEL_NAME, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.transformer.blocks.1.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    trainer.MODEL_NAME = str(folder)
    with pytest.raises(
        SystemExit, match=r"1 weights are missing, such as model.transformer.blocks.1.up_proj"
    ):
        trainer.build_model("cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        trainer.build_model("cpu")


def test_the_weights_are_not_loaded(trainer, monkeypatch):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded the weights")
    )
    assert trainer.preflight(1) == []


def test_mask_id(trainer):
    for value in (126335, 10**6):
        trainer.MASK_ID = value
        assert any(
            f"MASK_ID = {value}" in problem and "126336" in problem
            for problem in trainer.preflight(1)
        )


def test_targets(trainer, capsys):
    """Fails on the published behaviour (T12): targets that do not exist were ignored in silence."""
    trainer.TARGET_MODS = ["q_proj", "gate_proj"]
    assert trainer.preflight(1) == []
    printed = capsys.readouterr().out
    assert "LoRA on 3 layers q_proj\nLoRA on 0 layers gate_proj\n" in printed
    trainer.TARGET_MODS = ["gate_proj", "proj"]
    (problem,) = trainer.preflight(1)
    assert "TARGET_MODS" in problem and "gate_proj" in problem


def test_a_bug_in_a_check_is_not_blamed_on_the_model(trainer, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    for check in ("check_model", "check_examples"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, check, broken)
            with pytest.raises(ZeroDivisionError):
                trainer.preflight(1)


def test_less_than_a_global_batch(blockwise):
    blockwise.BLOCK_SIZE, blockwise.MICRO_BSIZE, blockwise.GRAD_ACC = 256, 30, 2
    assert blockwise.preflight(1) == []
    (problem,) = blockwise.preflight(2)
    assert "GRAD_ACC = 2" in problem and "2 ranks" in problem


def test_less_than_a_step(trainer):
    trainer.MICRO_BSIZE, trainer.GRAD_ACC = 30, 2
    trainer.TOTAL_TRAIN_STEPS, trainer.MAX_SAMPLES = None, 59
    (problem,) = trainer.preflight(1)
    assert "MAX_SAMPLES = 59" in problem and "use more rows, or lower these" in problem


def test_problems_are_reported_together(trainer, tmp_path):
    trainer.DATA_PT, trainer.MODEL_NAME = str(tmp_path / "no.pt"), str(tmp_path / "no")
    assert len(trainer.preflight(1)) == 2
    assert len(overridden(trainer, "--LR", "7", "--SEED", "-1", "--NO_SUCH", "1")[0]) == 3


def overridden(trainer, *argv):
    problems = trainer.read_overrides(argv) + trainer.check_constants()
    return problems, {name: getattr(trainer, name) for name in trainer.CONSTANTS}


def test_overrides(trainer):
    before = {name: getattr(trainer, name) for name in trainer.CONSTANTS}
    given = "--local_rank=0 --LR 2e-4 --SEED=7 --SEED=8 --TARGET_MODS q_proj,ff_out "
    given += "--MASK_PADDING True --TOTAL_TRAIN_STEPS None --LORA_ALPHA 3 --DATA_PT 1"
    problems, after = overridden(trainer, *given.split())
    assert problems == []
    changed = {"LR": 2e-4, "SEED": 8, "TARGET_MODS": ["q_proj", "ff_out"], "MASK_PADDING": True}
    changed |= {"TOTAL_TRAIN_STEPS": None, "LORA_ALPHA": 3, "DATA_PT": "1"}
    assert after == {**before, **changed}


@pytest.mark.parametrize(
    "words", ["--NO_SUCH", "--lr", "--MAX_SAMPLE", "stray", "--BLOCKSIZE 3", "--PT_FILE a.pt"]
)
def test_unknown_overrides(trainer, words):
    """One message for each, and none for its value."""
    problems, _ = overridden(trainer, *words.split())
    assert problems == [f"{words.split()[0]}: no constant of this script; see --help"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("SEED", "x"), ("SEED", "1.5"), ("SEED", "True"), ("LR", "fast"), ("MASK_PADDING", "1")],
)
def test_overrides_of_the_wrong_type(trainer, name, text):
    (problem,), _ = overridden(trainer, f"--{name}", text)
    assert name in problem and text in problem


@pytest.mark.parametrize("name", ["SEED", "LR", "DATA_PT", "SAVE_EVERY"])
def test_overrides_without_a_value(trainer, name):
    (problem,), _ = overridden(trainer, "--EPOCHS", "1", f"--{name}")
    assert name in problem


HEAVY = """import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "deepspeed", "transformers", "numpy")))
sys.argv = {argv!r}
runpy.run_path({script!r}, run_name="__main__")"""


def without_libraries(name, *argv):
    """Run a trainer where its slow imports fail, so that what works was done before them."""
    script = str(SUITE / f"train_{name}.py")
    code = HEAVY.format(argv=[script, *argv], script=script)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("name", TRAINERS)
def test_help_and_wrong_flags_come_before_the_slow_imports(name):
    done = without_libraries(name, "--help")
    assert done.returncode == 0
    assert all(f"--{constant} " in done.stdout for constant in TRAINERS[name].CONSTANTS)
    done = without_libraries(name, "--BLOCKSIZE", "3", "--LR", "7")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2
    assert "--BLOCKSIZE: no constant" in done.stderr and "LR = 7: must be" in done.stderr
    assert "ModuleNotFoundError" in without_libraries(name, "--LR", "1e-4").stderr


def test_help_survives_a_percent_sign(trainer, capsys):
    """argparse expands % in help texts."""
    trainer.CKPT_DIR = "ckpts_50%_%(x)s"
    with pytest.raises(SystemExit) as ended:
        trainer.read_overrides(["--help"])
    assert ended.value.code == 0 and "ckpts_50%_%(x)s" in capsys.readouterr().out


def test_importing_does_nothing(tmp_path):
    """Fails on the published behaviour (T15): importing wrote ds_zero2.json, on every rank."""
    code = "import train_blockwise, train_fullseq, torch.distributed as dist; "
    code += "assert not dist.is_initialized()"
    subprocess.run(
        [sys.executable, "-c", code, "--nonsense"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(SUITE)},
        check=True,
    )
    assert not list(tmp_path.iterdir())


def test_a_wrong_run_on_two_ranks(tmp_path, toy_folder):
    """Ends by itself, non-zero, with one message and no traceback, and leaves nothing."""
    command = [*launcher(2), SUITE / "train_blockwise.py"]
    wrong = flags(
        BLOCK_SIZE=0,
        MASK_PROB_EPS=1.5,
        MODEL_NAME=toy_folder / "model",
        DATA_PT=toy_folder / "train.pt",
    )
    status, printed = launch([*command, *wrong, "--NO_SUCH", "1"], tmp_path)
    assert status != 0
    for named in ("BLOCK_SIZE = 0", "MASK_PROB_EPS = 1.5", "--NO_SUCH"):
        assert printed.count(named) == 1
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_wrong_run_of_one_process(tmp_path, toy_folder):
    command = [sys.executable, SUITE / "train_fullseq.py"]
    status, printed = launch(
        [*command, *flags(MODEL_NAME="no/model", DATA_PT=toy_folder / "train.pt")], tmp_path
    )
    assert status != 0 and len(printed.splitlines()) == 1
    assert "MODEL_NAME = 'no/model'" in printed


def test_a_full_disk_is_seen_before_training(trainer, monkeypatch, tmp_path):
    trainer.CKPT_DIR = str(tmp_path / "new" / "run")
    free = shutil._ntuple_diskusage(10**9, 0, 10**6)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _: free)
    (problem,) = trainer.preflight(1)
    assert "CKPT_DIR" in problem and "a checkpoint takes 0.0 GB" in problem
    assert not list(tmp_path.iterdir())  # a refused run leaves nothing


@pytest.mark.parametrize(
    ("error", "named"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory')", "MICRO_BSIZE = 2"),
        ("KeyboardInterrupt()", "KeyboardInterrupt"),
        ("OSError(28, 'No space left on device')", "No space left"),
    ],
)
def test_faults_while_running_are_one_line(tmp_path, toy_folder, error, named):
    code = f"""import runpy, sys, torch, transformers
def fail(*_, **__): raise {error}
transformers.AutoModelForCausalLM.from_pretrained = fail
runpy.run_path({str(SUITE / "train_blockwise.py")!r}, run_name="__main__")"""
    data = flags(MODEL_NAME=toy_folder / "model", DATA_PT=toy_folder / "train.pt", MICRO_BSIZE=2)
    status, printed = launch([sys.executable, "-c", code, *data], tmp_path)
    assert status == 1 and "Traceback" not in printed
    assert named in printed.splitlines()[-1]


def test_the_toys_own_checks(toy_folder):
    """The tests' model has LLaDA's ids and template, and its data fit MAX_LEN 256."""
    config = json.loads((toy_folder / "model" / "config.json").read_text())
    assert (config["mask_token_id"], config["embedding_size"]) == (126336, 126464)
    assert config["model_type"] == "llada"
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    names = "startoftext endoftext mdm_mask start_header_id end_header_id eot_id".split()
    ids = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    assert ids == [126080, 126081, 126336, 126346, 126347, 126348]
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ends == (126080, 126081, 126081)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n\nb")
    assert len(pieces) == 3 and len(tokenizer.tokenize("a\n\nb")) == 3  # newlines stay together
    chat = tokenizer.apply_chat_template([{"role": "user", "content": " x "}], tokenize=False)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert chat == f"<|startoftext|>{header.format('user')}x<|eot_id|>{header.format('assistant')}"
    assert len(header.format("assistant")) == 47
    for row in torch.load(toy_folder / "train.pt", weights_only=True):
        assert len(row["full_ids"]) <= 112 and len(row["full_ids"]) - row["prompt_len"] >= 40


def test_a_pinned_revision(trainer, toy_folder):
    """MODEL_REVISION pins weights and code alike, and the commit that was used is recorded."""
    hub = Path(os.environ["HF_HOME"], "hub", "models--some--toy")
    for commit, code in (("1" * 40, ""), ("2" * 40, "raise RuntimeError('main has run')\n")):
        shutil.copytree(toy_folder / "model", hub / "snapshots" / commit, dirs_exist_ok=True)
        modeling = hub / "snapshots" / commit / "modeling_llada.py"
        modeling.write_text(code + (toy_folder / "model" / "modeling_llada.py").read_text())
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs" / "main").write_text("2" * 40)
    trainer.MODEL_NAME = "some/toy"
    (problem,) = trainer.preflight(1)
    assert "main has run" in problem
    trainer.MODEL_REVISION = "1" * 40
    assert trainer.preflight(1) == []
    examples = trainer.load_examples()
    run = trainer.describe_run(examples, *trainer.plan(examples, 1))
    assert (run["MODEL_REVISION"], run["model_commit"]) == ("1" * 40, "1" * 40)
    assert "some" in trainer.build_model("cpu").get_base_model().config._name_or_path
