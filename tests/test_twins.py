"""The trainers differ in the method alone: the two of the top level, and LIFT's."""

import ast
import difflib
from pathlib import Path

from conftest import SUITE

METHOD = {"schedule", "corrupt"}
SOURCES = [(SUITE / f"train_{name}.py").read_text() for name in ("blockwise", "fullseq")]
LIFT = (SUITE / "experiments" / "train_lift.py").read_text()
LIFT_METHOD = {"make_batch", "corrupt", "supervised_loss"}
LIFT_ADDED = ["lowest", "band", "token_nll", "score"]
OPDLM = (SUITE / "experiments" / "train_opdlm.py").read_text()
OPDLM_OWN = {"corrupt", "build_model", "save_merged", "save_checkpoint"}
OPDLM_OWN |= {"describe_run", "train_step", "main"}


def functions(source):
    return {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if hasattr(node, "args")
    }


def test_shared_functions_are_the_same_in_the_same_order():
    blockwise, fullseq = map(functions, SOURCES)
    assert list(blockwise) == list(fullseq)
    assert {name for name in blockwise if blockwise[name] != fullseq[name]} == METHOD


def test_lift_has_the_functions_of_full_sequence_sft():
    """In the same order, but for its method, whose further functions follow `corrupt`."""
    fullseq, lift = functions(SOURCES[1]), functions(LIFT)
    names = list(fullseq)
    place = names.index("corrupt") + 1
    assert list(lift) == names[:place] + LIFT_ADDED + names[place:]
    assert {name for name in fullseq if fullseq[name] != lift[name]} == LIFT_METHOD


def test_opdlm_shares_what_is_not_its_method():
    """Of the functions of train_fullseq.py it has these byte for byte, in the same order."""
    fullseq, opdlm = functions(SOURCES[1]), functions(OPDLM)
    both = [name for name in fullseq if name in opdlm]
    assert both == [name for name in opdlm if name in fullseq]
    assert {name for name in both if fullseq[name] != opdlm[name]} == OPDLM_OWN
    assert set(fullseq) - set(opdlm) == {"make_batch", "supervised_loss"}


def diff_length(one, other):
    return len(list(difflib.unified_diff(one.splitlines(), other.splitlines(), n=0)))


def test_diffs_are_short():
    assert diff_length(*SOURCES) <= 120
    assert diff_length(SOURCES[1], LIFT) <= 150


def test_trainers_are_plain_pages():
    """600 lines (LIFT's 650) of 55 characters on average; functions of 35 lines, `main` of 60."""
    for source in [*SOURCES, LIFT]:
        lines = source.splitlines()
        written = [line for line in lines if line.strip()]
        assert len(lines) <= (650 if source is LIFT else 600)
        assert sum(map(len, written)) / len(written) <= 55
    for source in [*SOURCES, LIFT, OPDLM]:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= (60 if node.name == "main" else 35), node.name


def test_imports_are_libraries_only():
    ours = {path.stem for path in [*SUITE.glob("*.py"), *Path(SUITE, "experiments").glob("*")]}
    for source in [*SOURCES, LIFT, OPDLM]:
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & ours


def test_constants_differ_in_the_method_alone():
    import train_blockwise
    import train_fullseq

    values = [
        {name: getattr(module, name) for name in module.CONSTANTS}
        for module in (train_blockwise, train_fullseq)
    ]
    assert set(values[0]) - set(values[1]) == {"BLOCK_SIZE", "PREFIX_MASK_RATE", "SUFFIX_MASK_PROB"}
    assert {n for n in values[1] if values[0][n] != values[1][n]} == {"MAX_SAMPLES", "CKPT_DIR"}
    assert all(module.MASK_ID == 126336 for module in (train_blockwise, train_fullseq))


def test_constants_of_lift():
    import train_lift

    import train_fullseq

    fullseq = {name: getattr(train_fullseq, name) for name in train_fullseq.CONSTANTS}
    lift = {name: getattr(train_lift, name) for name in train_lift.CONSTANTS}
    added = {"COMPONENTS": 3, "RHO_MIN": 0.1, "TIME_SCALING": False, "APPROXIMATE": False}
    assert {name: lift[name] for name in set(lift) - set(fullseq)} == added
    differ = {name: lift[name] for name in fullseq if lift[name] != fullseq[name]}
    assert differ == {
        "LR": 5e-6,
        "LORA_RANK": 128,
        "TARGET_MODS": ["q_proj", "k_proj", "v_proj"],
        "CKPT_DIR": "ckpts_lift",
    }
