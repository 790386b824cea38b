"""Imports only point up the list of layers, and the light verbs stay light."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "lexigraft"
LAYERS = [
    ["errors"], ["console"], ["files", "typed_json"], ["hub"], ["manifest"], ["text_formats"], ["corpus", "recipe"], ["counting", "importing", "runfile"], ["families"], ["selection"],
    ["checkpoints"], ["embeddings"], ["adapters"], ["blending"], ["checks", "models"], ["steps"], ["data"],
    ["stages", "reporting"], ["pipeline", "serving", "uploading"], ["cli"], ["__main__", "__init__"],
]  # fmt: skip
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def part_of(path: Path) -> str:
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Our own parts that a module imports, function-local imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lexigraft":
            names = (node.module or "").split(".")
            found |= {names[1]} if len(names) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lexigraft.")}
    return found & LEVEL.keys()


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in SRC.rglob("*.py")}
    assert parts == set(LEVEL)


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_only_point_up_the_list(path):
    own = part_of(path)
    for used in imported(path):
        assert used == own or LEVEL[used] < LEVEL[own], f"{own} must not import {used}"


def test_steps_never_import_each_other():
    for path in (SRC / "steps").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lexigraft.steps"), path.name


def test_only_models_import_transformers():
    for path in SRC.rglob("*.py"):
        if part_of(path) == "models":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("transformers", "peft"), path
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & {"transformers", "peft"}


HEAVY = "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"


@pytest.mark.parametrize(
    "statement",
    ["import lexigraft", "import lexigraft; lexigraft.learn; lexigraft.graft; lexigraft.check",
     "from lexigraft.cli import app"],
)  # fmt: skip
def test_light_imports_leave_torch_alone(statement):
    code = f"import sys; {statement}; {HEAVY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_graft_and_merge_leave_the_compiler_alone():
    """numba's import takes longer than the copy of half a gigabyte; only learning needs it."""
    statement = "import lexigraft.steps.graft, lexigraft.steps.merge"
    families = "byte_level, lexigraft.families.sentencepiece_bpe, lexigraft.families.unigram"
    code = f"import sys; {statement}, lexigraft.families.{families}; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_is_fast():
    """CPU time of the child, which other jobs on the machine do not lengthen."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lexigraft", "--help"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert "learn" in done.stdout and "merge" in done.stdout
    cut = [line for line in done.stdout.splitlines()[1:] if line.endswith("...")]
    assert not cut, "the first sentence of a verb must fit into its line"
    assert min(spent, time.monotonic() - began) < 0.5


def test_exported_members_exist():
    import lexigraft

    for name in lexigraft.__all__:
        assert getattr(lexigraft, name) is not None
    with pytest.raises(AttributeError):
        lexigraft.nothing  # noqa: B018
