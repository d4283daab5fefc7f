"""The twins differ in the method alone, and no constant or function is rebound from outside."""

import ast
import difflib

import pytest
import train_control
import train_lift
import train_opdlm
from decoding import block_causal
from helpers import SUITE, TRAINERS

import train_blockwise
import train_fullseq

METHOD = {"schedule", "corrupt"}
SOURCES = sorted([*SUITE.glob("*.py"), *(SUITE / "experiments").rglob("*.py")])
# every module whose functions take `args`, and the constants that they may read only through it
TAKE_ARGS = [
    (train_blockwise, train_blockwise.CONSTANTS),
    (train_fullseq, train_fullseq.CONSTANTS),
    (train_lift, train_lift.CONSTANTS),
    (train_opdlm, train_opdlm.CONSTANTS),
    (train_control, train_blockwise.CONSTANTS | train_lift.CONSTANTS | train_opdlm.CONSTANTS),
    (block_causal, train_opdlm.CONSTANTS),
]


def source_of(module):
    with open(module.__file__) as file:
        return file.read()


def definitions(module):
    """{name: source} of the functions and classes of a module, in their order."""
    source = source_of(module)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            found[node.name] = decorators, ast.get_source_segment(source, node)
    return found


# ------- the twins
def test_shared_functions_are_the_same_in_the_same_order():
    blockwise, fullseq = definitions(train_blockwise), definitions(train_fullseq)
    assert list(blockwise) == list(fullseq)
    assert {name for name in blockwise if blockwise[name] != fullseq[name]} == METHOD


def test_what_is_not_a_function_differs_in_docstring_and_constants_alone():
    """Imports, headings, and the lines at the bottom are the same."""

    def rest(module):
        lines = source_of(module).splitlines()
        for node in ast.parse(source_of(module)).body:
            is_constant = isinstance(node, ast.Assign) and node.targets[0].id.isupper()
            if is_constant or isinstance(node, (ast.Expr, ast.FunctionDef, ast.ClassDef)):
                lines[node.lineno - 1 : node.end_lineno] = [""] * (
                    node.end_lineno - node.lineno + 1
                )
        return [line for line in lines if line]

    blockwise, fullseq = rest(train_blockwise), rest(train_fullseq)
    assert list(difflib.unified_diff(blockwise, fullseq, n=0)) == []
    assert len(blockwise) > 40


def imported_by(source):
    """The names of the modules that a source imports, without those below them."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", TRAINERS)
def test_imports_are_libraries_only(name):
    ours = {path.stem for path in [*SUITE.glob("*"), *(SUITE / "experiments").glob("*")]}
    imported = imported_by(source_of(TRAINERS[name]))
    assert imported.isdisjoint(ours) and imported > {"torch", "deepspeed"}


def test_constants_differ_in_the_method_alone():
    blockwise, fullseq = train_blockwise.CONSTANTS, train_fullseq.CONSTANTS
    assert set(blockwise) - set(fullseq) == {"BLOCK_SIZE", "PREFIX_MASK_RATE", "SUFFIX_MASK_PROB"}
    assert {n for n in fullseq if blockwise[n] != fullseq[n]} == {"MAX_SAMPLES", "CKPT_DIR"}
    assert blockwise["MASK_ID"] == 126336


def test_constants_of_lift():
    fullseq, lift = train_fullseq.CONSTANTS, train_lift.CONSTANTS
    added = {"COMPONENTS": 3, "RHO_MIN": 0.1, "TIME_SCALING": False, "APPROXIMATE": False}
    assert {name: lift[name] for name in set(lift) - set(fullseq)} == added
    differ = {name: lift[name] for name in fullseq if lift[name] != fullseq[name]}
    assert differ == {
        "LR": 5e-6,
        "LORA_RANK": 128,
        "TARGET_MODS": ["q_proj", "k_proj", "v_proj"],
        "CKPT_DIR": "ckpts_lift",
    }


def test_constants_of_opdlm():
    fullseq, opdlm = train_fullseq.CONSTANTS, train_opdlm.CONSTANTS
    unused = {"MASK_PROB_EPS", "MASK_PADDING"}
    assert set(fullseq) - set(opdlm) == unused
    assert [opdlm[name] for name in ("ANSWERS", "STATES", "LOSS")] == ["student", "decoded", "kl"]


# ------- a flag reaches what it is for
def constants_read(source, constants):
    """The (function, constant) pairs of a source whose function reads the constant as a global.

    Decorators and default arguments are evaluated at module level, and may.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            body = node.body if isinstance(node, ast.FunctionDef) else [node.body]
            for statement in body:
                for name in ast.walk(statement):
                    if isinstance(name, ast.Name) and name.id in constants:
                        found.add((getattr(node, "name", "lambda"), name.id))
    return found


@pytest.mark.parametrize(
    ("module", "constants"), TAKE_ARGS, ids=[module.__name__ for module, _ in TAKE_ARGS]
)
def test_functions_read_constants_from_args_alone(module, constants):
    """One that reads the global does not see the flag."""
    assert constants_read(source_of(module), constants) == set()


def test_a_constant_that_is_read_as_a_global_would_be_found():
    source = "LR = 1\ndef f(x=LR):\n  return [args.LR for _ in x]\ng = lambda: LR\n"
    assert constants_read(source, {"LR"}) == {("lambda", "LR")}
    assert constants_read("def f():\n  def g(): return 1 + LR", {"LR"}) == {
        ("f", "LR"),
        ("g", "LR"),
    }


def attributes_read(source):
    """The constants that a source takes of a module, as in `train_blockwise.BLOCK_SIZE`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add((node.value.id, node.attr))
    return found


@pytest.mark.parametrize("module", [train_lift, train_opdlm, train_control, block_causal])
def test_functions_read_no_constant_of_another_trainer(module):
    """Nor the default of a constant, except at module level."""
    tree = ast.parse(source_of(module))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            for owner, name in attributes_read(ast.unparse(node)):
                assert not (owner.startswith("train_") and name in train_blockwise.CONSTANTS)


# ------- nothing is rebound from outside
def targets_of(node):
    """What a statement assigns to, or deletes."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        return node.targets
    if isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For)):
        return [node.target]
    return []


def imported_modules(tree):
    """The names by which a source knows modules, and what it imported from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def rebound(source):
    """The attributes of imported modules that a source assigns, as they are written there."""
    tree = ast.parse(source)
    modules = imported_modules(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr", "vars"):
            found += [ast.unparse(node) for first in node.args[:1] if ast.unparse(first) in modules]
        for target in targets_of(node):
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load):
                    root = part.value
                    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
                        root = root.func if isinstance(root, ast.Call) else root.value
                    if isinstance(root, ast.Name) and root.id in modules:
                        found.append(ast.unparse(part))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_assigns_to_another(path):
    allowed = {"sys.modules['deepspeed.comm.torch'].build_shm_op"}  # DeepSpeed would compile it
    assert set(rebound(path.read_text())) <= allowed


def test_an_assignment_to_a_module_would_be_found():
    assert rebound("import a.b as c\nc.d.NAME = 1") == ["c.d.NAME"]
    assert rebound("import a, b\nx, a.f = 1, b.g") == ["a.f"]
    assert rebound("import a\nsetattr(a, 'f', 1)") == ["setattr(a, 'f', 1)"]
    assert rebound("import a\nlora = a.Config()\nlora.alpha = a.f") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_mocks_are_in_tests_alone(path):
    assert "unittest" not in imported_by(path.read_text())
