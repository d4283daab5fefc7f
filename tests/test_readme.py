"""What the README names exists, and the other way round."""

import re

import pytest
from conftest import SUITE, TRAINERS

import pt

README = (SUITE / "README.md").read_text()
CODE = "\n".join(re.findall(r"```(?:bash)?\n(.*?)```", README, re.S))


def test_files_and_commands_exist():
    named = set(re.findall(r"[\w/.-]+\.(?:py|txt)\b", CODE)) - {"my_train.py"}
    assert {"pt.py", "train_blockwise.py", "train_fullseq.py", "experiments/toy.py", "requirements.txt"} <= named
    assert all((SUITE / name).exists() for name in named), [name for name in named if not (SUITE / name).exists()]


def test_every_override_in_a_command_is_a_constant():
    for name, module in TRAINERS.items():
        for line in re.findall(rf"train_{name}\.py([^`\n]*)", README):  # in running text too
            given = re.findall(r"--([A-Z][A-Z0-9_]*)", line)
            assert set(given) <= set(module.CONSTANTS), line


def test_every_constant_and_flag_is_explained():
    for module in TRAINERS.values():
        assert all(f"`{name}`" in README for name in module.CONSTANTS)
    assert all(f"`--{flag}`" in README for flag in vars(pt.parse_args([])))


def test_pt_flags_in_commands_exist(capsys):
    with pytest.raises(SystemExit):
        pt.parse_args(["--help"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    for line in re.findall(r"pt\.py(.*)", CODE):
        assert set(re.findall(r"--[a-z_]+", line)) <= known, line


def test_every_row_of_the_differences_is_there():
    rows = [*(f"P{i}" for i in (5, 6, 8)), *(f"T{i}" for i in range(1, 26))]
    assert [row for row in rows if not re.search(rf"\b{row}\b", README)] == []


def test_requirements_are_pinned():
    pins = (SUITE / "requirements.txt").read_text().split()
    names = ("torch", "deepspeed", "transformers", "peft", "datasets", "tqdm", "safetensors")
    assert all(any(pin.startswith(f"{name}==") for pin in pins) for name in names)
