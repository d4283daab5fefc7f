"""Wrong input ends in one message that names the thing, its value and the remedy, before the weights are loaded."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SUITE, TRAINERS, flags, launch
from safetensors.torch import load_file, save_file
from toy import launcher
from transformers import AutoModelForCausalLM, AutoTokenizer

GOOD = {"prompt_len": 3, "full_ids": torch.arange(10, 30)}


class Code:
    def __reduce__(self):
        return (print, ("code has run",))


def rows(**changes):
    return [GOOD, {**GOOD, **changes}]


FILES = {
    "not a list": ({"prompt_len": 3}, "row 0"),
    "empty list": ([], "0 rows with an answer"),
    "not dicts": ([1, 2], "row 0"),
    "wrong keys": ([GOOD, {"prompt_len": 3, "ids": GOOD["full_ids"]}], "row 1"),
    "prompt_len 0": (rows(prompt_len=0), "row 1 has prompt_len 0 of 20"),
    "prompt_len negative": (rows(prompt_len=-3), "prompt_len -3"),
    "prompt_len beyond the row": (rows(prompt_len=300), "prompt_len 300 of 20"),
    "prompt_len a float": (rows(prompt_len=3.0), "prompt_len 3.0"),
    "prompt_len a bool": (rows(prompt_len=True), "prompt_len True"),
    "prompt_len a tensor": (rows(prompt_len=torch.tensor(3)), "prompt_len tensor(3)"),
    "float ids": (rows(full_ids=torch.rand(20)), "row 1 has full_ids"),
    "ids a list": (rows(full_ids=[1] * 20), "row 1 has full_ids"),
    "two-dimensional ids": (rows(full_ids=torch.ones(2, 20).long()), "row 1 has full_ids"),
    "ids beyond the vocabulary": (rows(full_ids=torch.arange(126460, 126480)), "beyond the 126464"),
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
    trainer.PT_FILE = str(tmp_path / "rows.pt")
    torch.save(content, trainer.PT_FILE)
    problems = trainer.preflight({}, 1)
    assert any(named in problem for problem in problems)
    assert all(
        trainer.PT_FILE in problem and "\n" not in problem and len(problem) < 400
        for problem in problems
    )


def test_damaged_missing_and_dangerous_files(trainer, tmp_path, capsys):
    whole = Path(trainer.PT_FILE).read_bytes()
    contents = {
        "truncated.pt": whole[: len(whole) // 2],
        "text.pt": b"rows",
        "empty.pt": b"",
        "missing.pt": None,
    }
    contents["code.pt"] = pickle.dumps([Code()])
    for name, content in contents.items():
        trainer.PT_FILE = str(tmp_path / name)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        (problem,) = trainer.preflight({}, 1)
        assert name in problem and "pt.py" in problem and "\n" not in problem
    torch.save([Code()], tmp_path / "code.pt")
    assert len(trainer.preflight({}, 1)) == 1
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
    ("PT_FILE", None),
    ("CKPT_DIR", ""),
    ("LORA_TARGETS", "q_proj"),
    ("LORA_TARGETS", []),
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
    (problem,) = trainer.read_overrides([])
    assert name in problem and repr(value) in problem and "must be" in problem


def test_every_constant_is_checked(trainer):
    assert sorted(name for *_, names in trainer.RANGES for name in names.split()) == sorted(
        trainer.CONSTANTS
    )


def test_good_constants_pass(trainer):
    assert not trainer.read_overrides([]) and trainer.preflight({}, 1) == []
    trainer.TOTAL_TRAIN_STEPS = trainer.SAVE_EVERY = trainer.LORA_ALPHA = None
    trainer.MAX_SAMPLES, trainer.LR, trainer.LORA_TARGETS = 16, 1, ["q_proj", "missing"]
    assert not trainer.read_overrides([]) and trainer.preflight({}, 2) == []


def test_model_folder_missing(trainer, tmp_path):
    for name in (str(tmp_path / "no"), "a/b"):
        trainer.MODEL_NAME = name
        (problem,) = trainer.preflight({}, 1)
        assert "cannot be loaded" in problem and repr(name) in problem and "\n" not in problem


def test_no_bf16(trainer, monkeypatch):
    monkeypatch.setattr(trainer.deepspeed.get_accelerator(), "is_bf16_supported", lambda: False)
    (problem,) = trainer.preflight({}, 1)
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
    assert trainer.preflight({}, 1) == []


def test_mask_id(trainer):
    for value in (126335, 10**6):
        trainer.MASK_ID = value
        assert any(
            f"MASK_ID = {value}" in problem and "126336" in problem
            for problem in trainer.preflight({}, 1)
        )


def test_targets(trainer):
    """Fails on the published behaviour (T12): targets that do not exist were ignored in silence."""
    trainer.LORA_TARGETS = ["q_proj", "gate_proj"]
    run = {}
    assert trainer.preflight(run, 1) == []
    assert (run["budget"]["layers q_proj"], run["budget"]["layers gate_proj"]) == (
        3,
        0,
    )  # which is printed
    trainer.LORA_TARGETS = ["gate_proj", "proj"]
    (problem,) = trainer.preflight({}, 1)
    assert "LORA_TARGETS" in problem and "gate_proj" in problem


def test_less_than_a_global_batch(blockwise):
    blockwise.BLOCK_SIZE, blockwise.MICRO_BSIZE, blockwise.GRAD_ACC = 256, 30, 2
    assert blockwise.preflight({}, 1) == []
    (problem,) = blockwise.preflight({}, 2)
    assert "GRAD_ACC = 2" in problem and "2 ranks" in problem


def test_less_than_a_step(trainer):
    trainer.MICRO_BSIZE, trainer.GRAD_ACC, trainer.TOTAL_TRAIN_STEPS, trainer.MAX_SAMPLES = (
        30,
        2,
        None,
        59,
    )
    (problem,) = trainer.preflight({}, 1)
    assert "MAX_SAMPLES = 59" in problem


def test_problems_are_reported_together(trainer, tmp_path):
    trainer.PT_FILE, trainer.MODEL_NAME = str(tmp_path / "no.pt"), str(tmp_path / "no")
    assert len(trainer.preflight({}, 1)) == 2
    assert len(trainer.read_overrides(["--LR", "7", "--SEED", "-1", "--NO_SUCH", "1"])) == 4


def overridden(trainer, *argv):
    return trainer.read_overrides(argv), {
        name: getattr(trainer, name) for name in trainer.CONSTANTS
    }


def test_overrides(trainer):
    before = {name: getattr(trainer, name) for name in trainer.CONSTANTS}
    given = [
        "--local_rank=0",
        "--LR",
        "2e-4",
        "--SEED=7",
        "--SEED=8",
        "--LORA_TARGETS",
        "q_proj,ff_out",
    ]
    given += [
        "--MASK_PADDING",
        "True",
        "--TOTAL_TRAIN_STEPS",
        "None",
        "--LORA_ALPHA",
        "3",
        "--PT_FILE",
        "1",
    ]
    problems, after = overridden(trainer, *given)
    assert problems == []
    changed = {"LR": 2e-4, "SEED": 8, "LORA_TARGETS": ["q_proj", "ff_out"], "MASK_PADDING": True}
    changed |= {"TOTAL_TRAIN_STEPS": None, "LORA_ALPHA": 3, "PT_FILE": "1"}
    assert after == {**before, **changed}


@pytest.mark.parametrize("word", ["--NO_SUCH", "--lr", "--MAX_SAMPLE", "stray"])
def test_unknown_overrides(trainer, word):
    problems, _ = overridden(trainer, word)
    assert len(problems) == 1 and word in problems[0] and "--help" in problems[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [("SEED", "x"), ("SEED", "1.5"), ("SEED", "True"), ("LR", "fast"), ("MASK_PADDING", "1")],
)
def test_overrides_of_the_wrong_type(trainer, name, text):
    (problem,), _ = overridden(trainer, f"--{name}", text)
    assert name in problem and text in problem


@pytest.mark.parametrize("name", ["SEED", "LR", "PT_FILE", "SAVE_EVERY"])
def test_overrides_without_a_value(trainer, name):
    (problem,), _ = overridden(trainer, "--EPOCHS", "1", f"--{name}")
    assert name in problem


@pytest.mark.parametrize("name", TRAINERS)
def test_help_names_every_constant(name):
    command = [sys.executable, SUITE / f"train_{name}.py", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(f"--{constant} " in printed for constant in TRAINERS[name].CONSTANTS)


def test_importing_does_nothing(tmp_path):
    """Fails on the published behaviour (T15): importing wrote ds_zero2.json, on every rank."""
    code = "import train_blockwise, train_fullseq, torch; assert not torch.distributed.is_initialized()"
    subprocess.run(
        [sys.executable, "-c", code, "--nonsense"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(SUITE)},
        check=True,
    )
    assert not list(tmp_path.iterdir())


def test_a_wrong_run_on_two_ranks(tmp_path, toy_folder):
    """Ends by itself, non-zero, all problems in one message, without a traceback, with nothing left behind."""
    command = [*launcher(2), SUITE / "train_blockwise.py"]
    wrong = flags(
        BLOCK_SIZE=0,
        MASK_PROB_EPS=1.5,
        MODEL_NAME=toy_folder / "model",
        PT_FILE=toy_folder / "train.pt",
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
        [*command, *flags(MODEL_NAME="no/model", PT_FILE=toy_folder / "train.pt")], tmp_path
    )
    assert status != 0 and len(printed.splitlines()) == 1
    assert "MODEL_NAME = 'no/model'" in printed


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
    data = flags(MODEL_NAME=toy_folder / "model", PT_FILE=toy_folder / "train.pt", MICRO_BSIZE=2)
    status, printed = launch([sys.executable, "-c", code, *data], tmp_path)
    lines = [
        line
        for line in printed.splitlines()
        if "new run" not in line and "forward tokens" not in line
    ]
    assert status == 1 and len(lines) == 1 and named in lines[0]


def test_the_toys_own_checks(toy_folder):
    """The model that the others are tested with has LLaDA's ids and template, and its data fit MAX_LEN 256."""
    config = json.loads((toy_folder / "model" / "config.json").read_text())
    assert (config["mask_token_id"], config["embedding_size"], config["model_type"]) == (
        126336,
        126464,
        "llada",
    )
    tokenizer = AutoTokenizer.from_pretrained(toy_folder / "model", fix_mistral_regex=False)
    names = [
        "<|startoftext|>",
        "<|endoftext|>",
        "<|mdm_mask|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    assert tokenizer.convert_tokens_to_ids(names) == [
        126080,
        126081,
        126336,
        126346,
        126347,
        126348,
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        names[0],
        names[1],
        names[1],
    )
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n\nb")
    assert (
        len(pieces) == 3 and len(tokenizer.tokenize("a\n\nb")) == 3
    )  # runs of newlines stay whole
    chat = tokenizer.apply_chat_template([{"role": "user", "content": " x "}], tokenize=False)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert chat == f"<|startoftext|>{header.format('user')}x<|eot_id|>{header.format('assistant')}"
    assert len(header.format("assistant")) == 47
    for row in torch.load(toy_folder / "train.pt", weights_only=True):
        assert len(row["full_ids"]) <= 256 and len(row["full_ids"]) - row["prompt_len"] >= 96


def test_a_pinned_revision(trainer, toy_folder):
    """MODEL_REVISION pins weights and code alike: that of another revision is never run; the pin is recorded."""
    hub = Path(os.environ["HF_HOME"], "hub", "models--some--toy")
    for commit, code in (
        ("1" * 40, ""),
        ("2" * 40, "raise RuntimeError('code of main has run')\n"),
    ):
        shutil.copytree(toy_folder / "model", hub / "snapshots" / commit, dirs_exist_ok=True)
        modeling = hub / "snapshots" / commit / "modeling_llada.py"
        modeling.write_text(code + (toy_folder / "model" / "modeling_llada.py").read_text())
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs" / "main").write_text("2" * 40)
    trainer.MODEL_NAME, run = "some/toy", {}
    (problem,) = trainer.preflight(run, 1)
    assert "code of main has run" in problem
    trainer.MODEL_REVISION = "1" * 40
    assert trainer.preflight(run, 1) == []
    assert (run["MODEL_REVISION"], run["model_commit"]) == ("1" * 40, "1" * 40)
    assert "some" in trainer.build_model("cpu").get_base_model().config._name_or_path
