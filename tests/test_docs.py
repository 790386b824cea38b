"""What the docs say about the code is true."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from lexigraft.recipe import EvalPart, GraftPart, LearnPart, Recipe, ReportPart, TrainStage

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


@pytest.mark.parametrize("part", [Recipe, LearnPart, GraftPart, TrainStage, EvalPart, ReportPart])
def test_every_key_of_a_recipe_is_explained(part):
    text = (ROOT / "docs" / "recipe.md").read_text()
    keys = {
        name for quoted in re.findall(r"`([^`]+)`", text) for name in re.findall(r"\w+", quoted)
    }
    assert part.model_fields.keys() - keys == set()


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"), key=lambda path: path.name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_recipes_with_and_without_what_they_leave_out(path):
    text = path.read_text()
    Recipe.parse(yaml.safe_load(text), where=path.name)
    whole = re.sub(r"^(  )# (\w+:)", r"\1\2", text, flags=re.MULTILINE)
    assert whole != text
    assert Recipe.parse(yaml.safe_load(whole), where=path.name).learn.special


def test_every_example_is_named_in_the_docs():
    text = (ROOT / "docs" / "recipe.md").read_text()
    assert [path.name for path in EXAMPLES if f"`examples/{path.name}`" not in text] == []


# How the heading of a part ends -> who takes part in it.
COMPARED = {
    "more tokens": "lexigraft bpe-continue tokenizer-extension Chinese-LLaMA-Alpaca MedicalGPT "
    "LLaMA-Factory Axolotl Unsloth",
    "new rows start": "lexigraft transformers MedicalGPT PEFT Axolotl LLaMA-Factory Unsloth",
    "merges": "lexigraft PEFT mergekit Axolotl LLaMA-Factory MedicalGPT Chinese-LLaMA-Alpaca",
}


def tables_of_parts(text):
    """Heading of each part -> the rows of its first table."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, rest = part.partition("\n")
        found[heading] = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)[0].splitlines()
    return found


def test_the_comparison_shows_what_its_command_printed():
    page = (ROOT / "docs" / "comparison.md").read_text("utf-8")
    printed = (ROOT / "bench" / "results" / "comparison.md").read_text("utf-8")
    shown = page.partition("<!-- printed by bench/comparison.py -->\n")[2].partition(
        "<!-- end -->"
    )[0]
    assert [line for line in shown.splitlines() if line not in printed.splitlines()] == []
    parts = tables_of_parts(printed)
    assert parts and tables_of_parts(shown) == parts
    for heading, table in parts.items():
        (tools,) = (names for end, names in COMPARED.items() if heading.endswith(end))
        assert [name for name in tools.split() if name not in "\n".join(table)] == [], heading


class Links(HTMLParser):
    """What a page names itself, what it leads to, and what a browser fetches for it."""

    def __init__(self, page):
        super().__init__()
        self.anchors, self.links, self.fetched = set(), set(), set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.add(found.get("id"))
        if tag == "a":
            self.links.add(found.get("href"))
        elif tag in ("img", "script", "link", "iframe", "source"):
            self.fetched.add(found.get("src") or found.get("href"))
        assert tag != "img" or found.get("alt"), found  # what those hear who do not see it


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", folder],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 35
    for page, found in pages.items():
        for name in (found.links | found.fetched) - {None, "", "."}:
            address = urlsplit(name)
            if address.scheme or address.netloc:
                assert name in found.links, f"{page.name} fetches {name}"
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            assert target.exists(), f"{page.name}: {name}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in pages[target].anchors, f"{page.name}: {name}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:", sheet.read_text("utf-8")), sheet


def test_the_reference_holds_every_verb_option_and_function(site):
    """The page is made from the declarations; here it is held against the parser itself."""
    import typer

    from lexigraft import __all__ as functions
    from lexigraft.cli import app

    page = (site / "reference" / "cli.html").read_text("utf-8")
    sections = dict(re.findall(r'<h2 id="([\w-]+)">(.*?)(?=<h2|</article>)', page, re.DOTALL))
    for verb, command in typer.main.get_command(app).commands.items():
        for name in {name for parameter in command.params for name in parameter.opts}:
            shown = name if name.startswith("-") else ""
            assert f"<code>{shown}" in sections[verb], f"{verb} {name}"
    anchors = Links(site / "reference" / "python.html").anchors
    assert {name.lower() for name in functions} - anchors == set()


def test_links_between_files_lead_somewhere_without_the_site_too():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
