"""Model cards: the metadata that the hub reads, and text of strangers that means nothing."""

import json
import shutil
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from lexigraft import LexigraftError, blend, card, graft
from lexigraft.console import plain_line
from lexigraft.manifest import BaseTokenizer, BlendRecord, Manifest
from lexigraft.reporting.card import inert

BASE_CARD = """---
license: other
license_name: tiny-license
license_link: LICENSE
language: [en, 'no']
tags: [conversational, 7]
pipeline_tag: text-generation
model-index: [{name: "<b>"}]
---
# The base
"""
HOSTILE = [
    "<script>alert(1)</script>", "![x](https://evil.example/x.png)", "[a](javascript:alert(1))",
    "|a|b|", "`code`", "# head", "---", "www.evil.example", "https://evil.example", "a@b.example",
    "*bold* _it_ ~~no~~", "&lt;b&gt;", "$$x^2$$ \\(y\\)", "<!-- lexigraft card x -->", "\u202eabc",
    "line\nbreak", "1. one", "\\", "a\\", "[^1]", "<https://evil.example>", ":smile: @user #1",
]  # fmt: skip


@pytest.fixture
def model(grafted_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(grafted_models / "tied", folder)
    (folder / "README.base.md").write_text(BASE_CARD)
    return folder


class _Shown(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def shown(markdown):
    return _Shown(MarkdownIt("commonmark").enable("table").render(markdown))


def test_the_metadata_is_what_the_hub_reads(model):
    told = card(model, base_model="owner/tiny")
    data = metadata_load(model / "README.md")
    assert data == told.metadata == {
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/tiny",
        "base_model_relation": "finetune",
        "tags": ["lexigraft"],  # those of the base are not all texts
    }  # fmt: skip
    parsed = ModelCard.load(model / "README.md")
    assert parsed.data.base_model == "owner/tiny" and parsed.data.license_name == "tiny-license"
    assert "40 new tokens" in parsed.text and Manifest.read(model).hash in parsed.text
    assert told.unknown == []


def test_what_nothing_tells_is_left_out_and_said(model):
    card_of_base = model / "README.base.md"
    card_of_base.write_text("---\nlicense: [mit]\nlanguage: {a: b}\n---\n")  # not as the hub has it
    assert card(model, dry_run=True).metadata.keys().isdisjoint({"license", "language"})
    card_of_base.write_text("---\nlicense: [\n---\n")  # no YAML
    told = card(model, dry_run=True)
    assert not (model / "README.md").exists() and told.lines()[0] == told.text
    assert not {"license", "language", "base_model", "base_model_relation"} & told.metadata.keys()
    assert [line.partition(":")[0] for line in told.unknown] == ["base_model", "license"]
    assert told.metadata["pipeline_tag"] == "text-generation"  # by the architecture


def test_adapters_and_blends_are_called_so(model):
    (model / "adapter_config.json").write_text("{}")
    found = card(model, base_model="owner/tiny", dry_run=True).metadata
    assert (found["library_name"], found["base_model_relation"]) == ("peft", "adapter")
    (model / "adapter_config.json").unlink()
    one, two, base = (
        BaseTokenizer(name=f"owner/{name}@{'0' * 40}", token_map="x", tokens=1) for name in "abc"
    )
    record = BlendRecord(
        base=base, models=[one, two], method="ties", settings={}, token_map="x", rows=1, tied=True,
        versions={},
    )  # fmt: skip
    Manifest(records=[record]).write(model)
    found = card(model, dry_run=True).metadata
    assert found["base_model"] == ["owner/a", "owner/b", "owner/c"]
    assert found["base_model_relation"] == "merge"


def test_a_readme_of_yours_is_not_replaced_and_a_card_of_ours_is(model):
    path = model / "README.md"
    card(model)
    first = path.read_text()
    card(model, base_model="owner/tiny")
    assert path.read_text() != first
    path.write_text(first + "My words.\n")
    with pytest.raises(LexigraftError, match="edited since"):
        card(model)
    assert path.read_text().endswith("My words.\n")
    card(model, force=True)
    assert path.read_text() == first
    with pytest.raises(LexigraftError, match="--base-model tiny"):
        card(model, base_model="tiny")


def test_a_folder_of_others_has_no_card(grafted_models):
    with pytest.raises(LexigraftError, match=r"has no lexigraft\.json"):
        card(grafted_models / "base_tied")


@pytest.mark.parametrize("text", HOSTILE)
def test_strangers_text_is_inert(text):
    """In a table, a list and a heading it reads as it is, and makes no tag."""
    for before, tags in (("| a |\n|---|\n| ", "table thead tr th tbody tr td"), ("- ", "ul li")):
        page = shown(before + inert(text) + (" |\n" if "|" in before else "\n"))
        assert page.tags == tags.split()
        assert plain_line(text) in [part.strip() for part in page.texts] or (
            plain_line(text) == "".join(page.texts).split("\n")[-2 if "- " in before else -3]
        )
    assert not set(inert(text)) & set("<>*_`[]()|\\$@~:!./")


def test_hostile_tokens_and_names_make_no_tag(model, tmp_path):
    """A learned token and a base's name of marks alone, in a whole card."""
    path = model / "new_tokens.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows[0]["bytes"] = b"<img src=x onerror=alert(1)>|`".hex()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = json.loads((model / "lexigraft.json").read_text())
    for record in data["records"]:
        record["base"]["name"] = "<b>](x) `|"
        record["versions"]["<i>"] = "*1*"
    (model / "lexigraft.json").write_text(json.dumps(data))
    text = card(model, dry_run=True).text.partition("\n---\n")[2]
    page = shown(text)
    assert set(page.tags) <= {
        *("h1", "h2", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"),
    }
    assert "<img src=x onerror=alert(1)>|`" in "".join(page.texts)


def test_the_base_s_card_goes_along_under_another_name(grafted_models, tmp_path):
    """Through two steps; a card of ours is of the model between, and does not."""
    base = tmp_path / "base"
    shutil.copytree(grafted_models / "base_tied", base)
    (base / "README.md").write_text(BASE_CARD)
    graft(base, grafted_models / "vocab", output=tmp_path / "model")
    assert not (tmp_path / "model" / "README.md").exists()
    card(tmp_path / "model")
    model = tmp_path / "model"
    blend([model, model], base=model, method="linear", output=tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()
    assert (tmp_path / "again" / "README.base.md").read_text() == BASE_CARD
