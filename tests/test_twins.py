"""The two trainers differ in the method alone."""

import ast
import difflib
from pathlib import Path

from conftest import SUITE

METHOD = {"schedule", "corrupt"}
SOURCES = [(SUITE / f"train_{name}.py").read_text() for name in ("blockwise", "fullseq")]


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


def test_diff_is_short():
    assert len(list(difflib.unified_diff(*[source.splitlines() for source in SOURCES], n=0))) <= 120


def test_trainers_are_plain_pages():
    """600 lines of at most 55 characters on average; functions of 35 lines, `main` of 60."""
    for source in SOURCES:
        lines = source.splitlines()
        written = [line for line in lines if line.strip()]
        assert len(lines) <= 600 and sum(map(len, written)) / len(written) <= 55
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= (60 if node.name == "main" else 35), node.name


def test_imports_are_libraries_only():
    ours = {path.stem for path in [*SUITE.glob("*.py"), *Path(SUITE, "experiments").glob("*")]}
    for source in SOURCES:
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
