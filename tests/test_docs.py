"""What the docs say about the code is true."""

import re
from pathlib import Path

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
