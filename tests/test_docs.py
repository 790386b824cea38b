"""What the docs say about the code is true."""

import re
from pathlib import Path

import pytest
import yaml

from lexigraft.recipe import EvalPart, GraftPart, LearnPart, Recipe, TrainStage

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_laws_name_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "laws.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    existing = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert len(named) > 25
    assert named - existing == set()


def test_every_law_has_a_test():
    text = (ROOT / "docs" / "laws.md").read_text()
    rows = re.findall(r"^\| (\d+)\*? \|.*\|(.*)\|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 19))
    assert all("`test_" in tests for _, tests in rows)


def test_every_dependency_is_explained():
    declared = re.search(r"dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    names = re.findall(r'"([A-Za-z_]+)', declared.group(1))
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    table = "\n".join(
        line.split("|")[1] for line in explained.splitlines() if line.startswith("| ")
    )
    assert [name for name in names if name not in table] == []


def test_every_file_that_the_laws_name_exists():
    named = re.findall(r"`(tests/\w+\.py)`", (ROOT / "docs" / "laws.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("part", [Recipe, LearnPart, GraftPart, TrainStage, EvalPart])
def test_every_key_of_a_recipe_is_explained(part):
    text = (ROOT / "docs" / "recipe.md").read_text()
    keys = {
        name for quoted in re.findall(r"`([^`]+)`", text) for name in re.findall(r"\w+", quoted)
    }
    assert part.model_fields.keys() - keys == set()


def test_examples_are_recipes_with_and_without_what_they_leave_out():
    for path in (ROOT / "examples").glob("*.yaml"):
        text = path.read_text()
        Recipe.parse(yaml.safe_load(text), where=path.name)
        whole = re.sub(r"^(  )# (\w+:)", r"\1\2", text, flags=re.MULTILINE)
        assert whole != text
        assert Recipe.parse(yaml.safe_load(whole), where=path.name).learn.special
