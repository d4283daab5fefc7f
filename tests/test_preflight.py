"""Wrong input ends in one message, which names it and the remedy, before weights are loaded."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import train_lift
import train_opdlm
from accelerate import init_empty_weights
from helpers import SUITE, TRAINERS, constants, flags, launch, launcher
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from toy_task.llada.configuration_llada import LLaDAConfig
from toy_task.llada.modeling_llada import LLaDAModelLM
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import train_blockwise
import train_fullseq

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


def problems_of(trainer, args, world_size=1):
    return trainer.preflight(args, trainer.METHOD, world_size)


# ------- data
@pytest.mark.parametrize("case", FILES)
def test_data_files(trainer, args, case, tmp_path):
    content, named = FILES[case]
    args.DATA_PT = str(tmp_path / "rows.pt")
    torch.save(content, args.DATA_PT)
    problems = problems_of(trainer, args)
    assert any(named in problem for problem in problems)
    for problem in problems:
        assert args.DATA_PT in problem and "\n" not in problem and len(problem) < 400


def test_damaged_missing_and_dangerous_files(trainer, args, tmp_path, capsys):
    whole = Path(args.DATA_PT).read_bytes()
    contents = {
        "truncated.pt": whole[: len(whole) // 2],
        "text.pt": b"rows",
        "empty.pt": b"",
        "missing.pt": None,
        "code.pt": pickle.dumps([Code()]),
    }
    for name, content in contents.items():
        args.DATA_PT = str(tmp_path / name)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        (problem,) = problems_of(trainer, args)
        assert name in problem and "pt.py" in problem and "\n" not in problem
    torch.save([Code()], tmp_path / "code.pt")
    assert len(problems_of(trainer, args)) == 1
    assert "code has run" not in capsys.readouterr().out


# ------- constants and flags
OUT_OF_RANGE = [
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


CASES = []
for module in TRAINERS.values():
    CASES += [(module, *case) for case in OUT_OF_RANGE if case[0] in module.CONSTANTS]


@pytest.mark.parametrize(("module", "name", "value"), CASES)
def test_constants_out_of_range(module, name, value):
    """Whoever edits a constant and whoever gives a flag see the same message."""
    args = constants(module, **{name: value})
    (problem,) = module.check_constants(args, module.LIMITS)
    assert name in problem and repr(value) in problem and "must be" in problem
    with pytest.raises(SystemExit) as ended:
        module.parse_args(constants=module.CONSTANTS | {name: value}, argv=[])
    assert ended.value.code == problem


def test_limits_are_spelled_out(trainer):
    with pytest.raises(SystemExit) as ended:
        trainer.parse_args(argv=flags(TOTAL_TRAIN_STEPS=0, MAX_LEN=0, DATA_PT=""))
    assert ended.value.code.splitlines() == [
        "DATA_PT = '': must be str, not empty",
        "MAX_LEN = 0: must be int, 1 to 1000000",
        "TOTAL_TRAIN_STEPS = 0: must be int or None, 1 to 1000000",
    ]


@pytest.mark.parametrize("name", ["runs/*", "what?", "[1]"])
def test_wildcards_in_ckpt_dir_are_refused(trainer, name):
    """DeepSpeed looks for a saved state with glob, which would not find a folder named [1]."""
    with pytest.raises(SystemExit) as ended:
        trainer.parse_args(argv=["--CKPT_DIR", name])
    assert repr(name) in ended.value.code and "must not contain" in ended.value.code


@pytest.mark.parametrize("module", [train_blockwise, train_fullseq, train_lift, train_opdlm])
def test_every_constant_is_checked_and_explained(module):
    checked = {name for names, *_ in module.LIMITS for name in names.split()}
    assert set(module.CONSTANTS) <= checked
    comments = train_fullseq.read_comments(train_fullseq.__file__)
    comments |= train_fullseq.read_comments(module.__file__)
    assert set(module.CONSTANTS) <= set(comments)


@pytest.mark.parametrize("module", [train_blockwise, train_fullseq, train_lift, train_opdlm])
def test_help_has_every_constant_with_its_comment_and_value(module, capsys):
    own = [module.__doc__, module.CONSTANTS, module.LIMITS, [module.__file__]]
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"], *own)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert module.__doc__.strip() in printed
    words = "".join(printed.split())
    comments = train_fullseq.read_comments(train_fullseq.__file__)
    comments |= train_fullseq.read_comments(module.__file__)
    for name, value in module.CONSTANTS.items():
        value = ",".join(value) if isinstance(value, list) else value
        explained = f"--{name}[VALUE]{comments[name]}(now{value})"
        assert "".join(explained.split()) in words


def test_help_survives_a_percent_sign(trainer, capsys):
    """argparse expands % in help texts."""
    with pytest.raises(SystemExit) as ended:
        trainer.parse_args(constants={"CKPT_DIR": "ckpts_50%_%(x)s"}, argv=["--help"])
    assert ended.value.code == 0 and "ckpts_50%_%(x)s" in capsys.readouterr().out


def test_flags(trainer):
    given = "--local_rank=0 --LR 2e-4 --SEED=7 --SEED=8 --TARGET_MODS q_proj,ff_out "
    given += "--MASK_PADDING True --TOTAL_TRAIN_STEPS None --LORA_ALPHA 3 --DATA_PT 1"
    before = dict(trainer.CONSTANTS)
    args = trainer.parse_args(argv=given.split())
    changed = {"LR": 2e-4, "SEED": 8, "TARGET_MODS": ["q_proj", "ff_out"], "MASK_PADDING": True}
    changed |= {"TOTAL_TRAIN_STEPS": None, "LORA_ALPHA": 3, "DATA_PT": "1"}
    assert vars(args) == {**before, **changed}
    assert trainer.CONSTANTS == before


def refusal(trainer, *argv):
    """The lines with which parse_args ends the process."""
    with pytest.raises(SystemExit) as ended:
        trainer.parse_args(argv=argv)
    return ended.value.code.splitlines()


@pytest.mark.parametrize(
    "words", ["--NO_SUCH", "--lr", "--MAX_SAMPLE", "stray", "--BLOCKSIZE 3", "--PT_FILE a.pt"]
)
def test_unknown_flags(trainer, words):
    """One message for each, and none for its value."""
    word = words.split()[0]
    assert refusal(trainer, *words.split()) == [f"{word}: no constant of this script; see --help"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("SEED", "x"), ("SEED", "1.5"), ("SEED", "True"), ("LR", "fast"), ("MASK_PADDING", "1")],
)
def test_flags_of_the_wrong_type(trainer, name, text):
    (problem,) = refusal(trainer, f"--{name}", text)
    assert name in problem and text in problem


@pytest.mark.parametrize("name", ["SEED", "LR", "DATA_PT", "SAVE_EVERY"])
def test_flags_without_a_value(trainer, name):
    (problem,) = refusal(trainer, "--EPOCHS", "1", f"--{name}")
    assert name in problem


def test_problems_are_reported_together_and_by_one_rank(trainer, args, tmp_path, monkeypatch):
    args.DATA_PT, args.MODEL_NAME = str(tmp_path / "no.pt"), str(tmp_path / "no")
    assert len(problems_of(trainer, args)) == 2
    wrong = ["--LR", "7", "--SEED", "-1", "--NO_SUCH", "1"]
    assert len(refusal(trainer, *wrong)) == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert trainer.parse_args(argv=wrong).LR == 7  # rank 0 ends, and the launcher this one


def test_good_constants_pass(trainer, args):
    assert problems_of(trainer, args) == []
    assert not trainer.check_constants(args, trainer.LIMITS)
    args.TOTAL_TRAIN_STEPS = args.SAVE_EVERY = args.LORA_ALPHA = None
    args.MAX_SAMPLES, args.LR, args.TARGET_MODS = 16, 1, ["q_proj", "missing"]
    assert not trainer.check_constants(args, trainer.LIMITS)
    assert problems_of(trainer, args, 2) == []


# ------- the model
def test_model_folder_missing(trainer, args, tmp_path):
    for name in (str(tmp_path / "no"), "a/b"):
        args.MODEL_NAME = name
        (problem,) = problems_of(trainer, args)
        assert "cannot be loaded" in problem and repr(name) in problem and "\n" not in problem


def test_no_bf16(trainer, args, monkeypatch):
    monkeypatch.setattr(trainer.deepspeed.get_accelerator(), "is_bf16_supported", lambda: False)
    (problem,) = problems_of(trainer, args)
    assert "bf16" in problem


def test_incomplete_weights(trainer, args, tmp_path):
    """Never a new random layer in the place of a missing one."""
    folder = tmp_path / "model"
    shutil.copytree(args.MODEL_NAME, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.transformer.blocks.1.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    args.MODEL_NAME = str(folder)
    missing = "1 weights are missing, such as model.transformer.blocks.1.up_proj"
    with pytest.raises(SystemExit, match=missing):
        trainer.build_model(args, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"weights cannot be loaded .*no file named .*model\.safe"):
        trainer.build_model(args, "cpu")


def test_the_weights_are_not_loaded(trainer, args, monkeypatch):
    def load(*_, **__):
        pytest.fail("loaded the weights")

    monkeypatch.setattr(trainer, "load_whole", load)
    monkeypatch.setattr(safetensors, "safe_open", load)
    assert problems_of(trainer, args) == []


@pytest.mark.parametrize("mask_id", [126335, 10**6])
def test_mask_id(trainer, args, mask_id):
    args.MASK_ID = mask_id
    problems = problems_of(trainer, args)
    assert any(f"MASK_ID = {mask_id}" in text and "126336" in text for text in problems)


def test_targets(trainer, args, capsys):
    """The published script ignores targets that do not exist, in silence."""
    args.TARGET_MODS = ["q_proj", "gate_proj"]
    assert problems_of(trainer, args) == []
    printed = capsys.readouterr().out
    assert "LoRA on 3 layers q_proj\nLoRA on 0 layers gate_proj\n" in printed
    args.TARGET_MODS = ["gate_proj", "proj"]
    (problem,) = problems_of(trainer, args)
    assert "TARGET_MODS" in problem and "gate_proj" in problem


def test_a_bug_in_a_check_is_not_blamed_on_the_model(trainer, args, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        trainer.preflight(args, trainer.METHOD._replace(check_model=broken), 1)
    monkeypatch.setattr(trainer, "check_examples", broken)
    with pytest.raises(ZeroDivisionError):
        trainer.preflight(args, trainer.METHOD, 1)


def test_less_than_a_global_batch(toy_folder):
    args = constants(train_blockwise, toy_folder, BLOCK_SIZE=256, MICRO_BSIZE=30, GRAD_ACC=2)
    assert problems_of(train_blockwise, args) == []
    (problem,) = problems_of(train_blockwise, args, 2)
    assert "GRAD_ACC = 2" in problem and "2 ranks" in problem


def test_less_than_a_step(trainer, args):
    args.MICRO_BSIZE, args.GRAD_ACC = 30, 2
    args.TOTAL_TRAIN_STEPS, args.MAX_SAMPLES = None, 59
    (problem,) = problems_of(trainer, args)
    assert "MAX_SAMPLES = 59" in problem and "use more rows, or lower these" in problem


def test_a_full_disk_is_seen_before_training(trainer, args, monkeypatch, tmp_path):
    args.CKPT_DIR = str(tmp_path / "new" / "run")
    free = shutil._ntuple_diskusage(10**9, 0, 10**6)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _: free)
    (problem,) = problems_of(trainer, args)
    assert "CKPT_DIR" in problem and "1 checkpoints and 2 states take" in problem
    assert not list(tmp_path.iterdir())  # a refused run leaves nothing


def test_a_pinned_revision(trainer, args, toy_folder):
    """MODEL_REVISION pins weights and code alike, and the commit that was used is recorded."""
    hub = Path(os.environ["HF_HOME"], "hub", "models--some--toy")
    for commit, code in (("1" * 40, ""), ("2" * 40, "raise RuntimeError('main has run')\n")):
        shutil.copytree(toy_folder / "model", hub / "snapshots" / commit, dirs_exist_ok=True)
        modeling = hub / "snapshots" / commit / "modeling_llada.py"
        modeling.write_text(code + (toy_folder / "model" / "modeling_llada.py").read_text())
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs" / "main").write_text("2" * 40)
    args.MODEL_NAME = "some/toy"
    (problem,) = problems_of(trainer, args)
    assert "main has run" in problem
    args.MODEL_REVISION = "1" * 40
    assert problems_of(trainer, args) == []
    examples = trainer.load_examples(args)
    planned = trainer.plan(args, trainer.METHOD, examples, 1)
    run = trainer.describe_run(args, trainer.METHOD, examples, *planned)
    assert (run["MODEL_REVISION"], run["model_commit"]) == ("1" * 40, "1" * 40)
    assert "some" in trainer.build_model(args, "cpu").get_base_model().config._name_or_path


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


# ------- as a command
@pytest.mark.slow
def test_importing_does_nothing(tmp_path):
    """Importing the published script writes ds_zero2.json, on every rank."""
    code = "import train_blockwise, train_fullseq, torch.distributed as dist; "
    code += "assert not dist.is_initialized()"
    subprocess.run(
        [sys.executable, "-c", code, "--nonsense"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(SUITE)},
        check=True,
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_wrong_run_of_one_process(tmp_path, toy_folder):
    wrong = flags(MODEL_NAME="no/model", DATA_PT=toy_folder / "train.pt")
    status, printed = launch([sys.executable, SUITE / "train_fullseq.py", *wrong], tmp_path)
    assert status != 0 and len(printed.splitlines()) == 1
    assert "MODEL_NAME = 'no/model'" in printed


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; .*halve MICRO_BSIZE"),
        (KeyboardInterrupt(), "stopped: KeyboardInterrupt ; repeat the command to resume"),
        (OSError(28, "No space left on device"), "stopped: OSError .*No space left on device"),
        (SafetensorError("I/O error"), "stopped: SafetensorError I/O error"),
    ],
)
def test_faults_while_running_are_one_line(trainer, error, line):
    with pytest.raises(SystemExit, match=line) as ended, trainer.faults_in_one_line():
        raise error
    assert "\n" not in ended.value.code


def test_bugs_are_not_made_one_line(trainer):
    with pytest.raises(ZeroDivisionError), trainer.faults_in_one_line():
        raise ZeroDivisionError


def test_a_constant_without_limits_has_the_type_of_its_default(trainer):
    """Such as one that a user has just added: a typo is no value."""
    own = trainer.CONSTANTS | {"EVERY_SECOND": False, "RATE": 0.5}
    args = trainer.parse_args(["--EVERY_SECOND", "True", "--RATE", "0.25"], constants=own)
    assert args.EVERY_SECOND is True and args.RATE == 0.25
    with pytest.raises(SystemExit, match="EVERY_SECOND = 'ture': must be bool, as False"):
        trainer.parse_args(["--EVERY_SECOND", "ture"], constants=own)


def test_lists_are_given_with_commas(trainer):
    args = trainer.parse_args(["--TARGET_MODS", "q_proj, v_proj"])
    assert args.TARGET_MODS == ["q_proj", "v_proj"]
    with pytest.raises(SystemExit, match=r"TARGET_MODS = \[\]: must be list, not empty"):
        trainer.parse_args(["--TARGET_MODS"])


def copy_of(args, tmp_path, **changes):
    """A copy of the model's folder with other values in its configuration."""
    folder = tmp_path / "copy"
    shutil.copytree(args.MODEL_NAME, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    args.MODEL_NAME = str(folder)
    return folder


def test_quantized_models_are_refused(trainer, args, tmp_path):
    copy_of(args, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    (problem,) = problems_of(trainer, args)
    assert "is quantized; give its bf16 form" in problem


def test_weights_that_are_not_there(trainer, args, tmp_path):
    folder = copy_of(args, tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    one, other = problems_of(trainer, args)
    assert "model-1.safetensors is a pointer of git-lfs" in one
    assert "model-2.safetensors is missing" in other


def test_a_checkpoint_that_cannot_be_written_is_seen_before_training(trainer, args, monkeypatch):
    def fail(*_, **__):
        raise ValueError("an invalid tokenizer")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    (problem,) = problems_of(trainer, args)
    assert "a checkpoint of it cannot be written (ValueError('an invalid tokenizer'))" in problem


def test_an_invalid_generation_config_is_kept_as_it_is(trainer, args, tmp_path):
    """transformers would refuse to save it, after the last step."""
    folder = copy_of(args, tmp_path)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    assert problems_of(trainer, args) == []


def test_the_disk_holds_all_that_is_saved(trainer, args, monkeypatch, tmp_path):
    """Three checkpoints and two states; one checkpoint would fit."""
    size = 2 * trainer.load_model(args, "cpu").num_parameters()
    args.CKPT_DIR = str(tmp_path / "run")
    free = shutil._ntuple_diskusage(10**9, 0, 2 * size)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _: free)
    assert problems_of(trainer, args) == []
    args.SAVE_EVERY = 1
    (problem,) = problems_of(trainer, args)
    assert "3 checkpoints and 2 states take 0.1 GB" in problem
    args.SAVE_EVERY, args.LORA_RANK = None, 10_000  # two states are larger than a checkpoint
    (problem,) = problems_of(trainer, args)
    assert "1 checkpoints and 2 states" in problem
    args.STATE_EVERY = None
    assert problems_of(trainer, args) == []


@pytest.mark.parametrize("named", [True, False])
def test_the_mask_token_of_the_tokenizer(trainer, args, tmp_path, named):
    """It counts where the configuration names none: as its mask token, or by its name alone."""
    folder = copy_of(args, tmp_path, mask_token_id=None)
    if named:
        content = json.loads((folder / "tokenizer_config.json").read_text())
        content["mask_token"] = "<|mdm_mask|>"
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    assert problems_of(trainer, args) == []
    args.MASK_ID = 100
    problems = [problem for problem in problems_of(trainer, args) if "MASK_ID = 100" in problem]
    assert any("its mask token is 126336" in problem for problem in problems)


def test_a_tokenizer_with_neither_end_nor_padding(trainer, args, tmp_path):
    folder = copy_of(args, tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text())
        for key in ("eos_token", "pad_token"):
            content.pop(key, None)
        (folder / name).write_text(json.dumps(content))
    (problem,) = problems_of(trainer, args)
    assert "has neither an end-of-text nor a padding token" in problem


def test_a_large_model_needs_a_gpu_or_a_word(trainer, args, monkeypatch):
    sizes = {"num_parameters": lambda _: 8 * 10**9}
    monkeypatch.setattr(PreTrainedModel, "num_parameters", sizes["num_parameters"])
    free = shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _: free)
    assert problems_of(trainer, args) == []  # the tests set DS_ACCELERATOR=cpu
    monkeypatch.delenv("DS_ACCELERATOR")
    (problem,) = problems_of(trainer, args)
    assert "no GPU for 8.0 billion weights" in problem and "DS_ACCELERATOR=cpu" in problem


def on_a_gpu(trainer, monkeypatch, memory):
    accelerator = trainer.deepspeed.get_accelerator()
    monkeypatch.setattr(accelerator, "device_name", lambda: "cuda")
    monkeypatch.setattr(accelerator, "total_memory", lambda: int(memory), raising=False)


@pytest.fixture(scope="module")
def llada_8b():
    with init_empty_weights():
        return LLaDAModelLM(LLaDAConfig())


def test_memory_at_llada_8b_is_what_was_measured(trainer, llada_8b, monkeypatch):
    """On one H200, 32 rows of 256: 79.9 and 80.9 GB, and 60.6 GB compiled (blockwise)."""
    args = constants(trainer)
    eager = {"train_blockwise": 79.9e9, "train_fullseq": 80.9e9}[trainer.__name__]
    assert trainer.count_trained(args, llada_8b) == 335_544_320
    on_a_gpu(trainer, monkeypatch, 80e9)

    def needed(world_size=1):
        return trainer.memory_needed(args, trainer.METHOD, llada_8b, world_size)

    args.COMPILE = False
    assert needed() == pytest.approx(eager, rel=0.03)
    args.COMPILE = None
    assert needed() == pytest.approx(eager - 79.9e9 + 60.6e9, rel=0.03)
    assert needed() - needed(8) == 14 * 335_544_320 * 7 / 8
    if "BLOCK_SIZE" in args:  # a block larger than the row supervises the answer
        args.BLOCK_SIZE = 10**6
        assert needed() < 63e9


@pytest.mark.parametrize(
    ("memory", "settings"),
    [
        (80e9, None),
        (40e9, "LORA_RANK 256, ACTIVATION_CHECKPOINTING False, MICRO_BSIZE 8, GRAD_ACC 4"),
        (24e9, "LORA_RANK 64, ACTIVATION_CHECKPOINTING False, MICRO_BSIZE 2, GRAD_ACC 16"),
        (12e9, "take a smaller model or a lower MAX_LEN"),
    ],
)
def test_too_little_memory_is_seen_at_once(trainer, llada_8b, monkeypatch, memory, settings):
    """Where it is certain, with settings that fit."""
    args = constants(trainer)
    assert trainer.check_memory(args, trainer.METHOD, llada_8b, 1) == []  # on a CPU
    on_a_gpu(trainer, monkeypatch, memory)
    problems = trainer.check_memory(args, trainer.METHOD, llada_8b, 1)
    if settings is None:
        assert problems == []
        return
    (problem,) = problems
    assert "MICRO_BSIZE = 32: a step needs about 6" in problem
    assert f"and the GPU has {memory / 1e9:.0f} GB; {settings}" in problem


def test_a_mask_id_that_texts_have(trainer, args, tmp_path):
    """Where neither configuration nor tokenizer names a mask token, such as an A2D base."""
    folder = copy_of(args, tmp_path, mask_token_id=None)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|mdm_mask|>", "<|not_named|>"))
    assert problems_of(trainer, args) == []  # an added token
    args.MASK_ID = 100
    problems = problems_of(trainer, args)
    assert any("and this one is in texts; the first id that is in none is" in x for x in problems)


def test_environments_of_no_launcher(trainer, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of an allocation, in which one process is started
    trainer.check_launch()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(SystemExit, match="let srun start torchrun"):
        trainer.check_launch()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="not LOCAL_RANK"):
        trainer.check_launch()
    monkeypatch.setenv("LOCAL_RANK", "0")
    trainer.check_launch()


def test_ids_of_another_tokenizer_are_refused_though_many_come_back(trainer, args, tmp_path):
    """Shifted by one, nine of ten tokens come back: both tokenizers have the same special ones."""
    rows = torch.load(args.DATA_PT, weights_only=True)
    for row in rows:
        ids = row["full_ids"]
        row["full_ids"] = torch.where(ids < 126000, ids + 1, ids)
    args.DATA_PT = str(tmp_path / "shifted.pt")
    torch.save(rows, args.DATA_PT)
    (problem,) = problems_of(trainer, args)
    assert "was made with another tokenizer" in problem


def test_a_tokenizer_that_nearly_brings_its_data_back(trainer, args, tmp_path):
    """As Llama 2's, which puts a space before each text: the data are its own all the same."""
    folder = copy_of(args, tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Prepend", "prepend": " "}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    rows = torch.load(args.DATA_PT, weights_only=True)
    for row in rows:  # as long as real ones
        answer = row["full_ids"][row["prompt_len"] : -1]
        row["full_ids"] = torch.cat([row["full_ids"][:-1], answer.repeat(4)])
    args.DATA_PT = str(tmp_path / "long.pt")
    torch.save(rows, args.DATA_PT)
    ids = trainer.load_examples(args)[0][1]
    tokenizer = AutoTokenizer.from_pretrained(folder, fix_mistral_regex=False)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert tokenizer.encode(text, add_special_tokens=False) != ids.tolist()
    assert problems_of(trainer, args) == []
