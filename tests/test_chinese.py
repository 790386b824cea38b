"""The Chinese pages say what the English ones say, and their commands are real."""

import ast
import re
from collections import Counter
from pathlib import Path

from lexigraft.reporting import chinese
from lexigraft.selection import sizing, terms

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "lexigraft"
BLOCK = "\f"  # stands where a fenced block was
HAN = re.compile(r"[\u4e00-\u9fff]")


# A Chinese page -> the English page of the same subject.
PAGES = {
    "README.zh-CN.md": "README.md",
    "docs/zh/quickstart.md": "docs/quickstart.md",
    "docs/zh/idea.md": "docs/idea.md",
    "docs/zh/faq.md": "docs/faq.md",
    "docs/zh/low-resource.md": "docs/howto/low-resource.md",
    "docs/zh/many-gpus.md": "docs/howto/many-gpus.md",
    "docs/zh/laptop.md": "docs/howto/laptop.md",
    "docs/zh/medicine.md": "docs/howto/medicine-zh.md",
    "docs/zh/terms.md": "docs/howto/terms.md",
    "docs/zh/others.md": "docs/howto/others.md",
    "docs/zh/mend.md": "docs/howto/mend.md",
}


def without_comments(block):
    """What a block does: comments are in the language of the page."""
    return [re.sub(r"(^|\s)#\s.*", "", line).split() for line in block.splitlines()]


def sections(text):
    """Per section: the level of its heading and all that both languages must have alike."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", BLOCK, text, flags=re.DOTALL)
    found = []
    for part in re.split(r"^(?=#+ )", prose, flags=re.MULTILINE)[1:]:
        count = part.count(BLOCK)
        links = [PAGES.get(link, link) for link in re.findall(r"\]\(([^)]+)\)", part)]
        words = re.sub(r"\]\([^)]+\)|<!--.*?-->", "", part)
        found.append(
            {
                "level": len(part) - len(part.lstrip("#")),
                "blocks": [(kind, without_comments(block)) for kind, block in blocks[:count]],
                "links": Counter(links),
                "code": {" ".join(code.split()) for code in re.findall(r"`([^`]+)`", words)},
                "figures": Counter(re.findall(r"\d(?:[\d,.]*\d)?", words)),
                "items": len(re.findall(r"^- ", part, re.MULTILINE)),
                "bold items": re.findall(r"^- \*\*`([^`]+)`", part, re.MULTILINE),
                "cells": [line.count("|") for line in part.splitlines() if line.startswith("|")],
            }
        )
        blocks = blocks[count:]
    return found


def test_both_readmes_say_the_same():
    """Change one and not the other, and this fails: headings, code, links, figures, tables."""
    english = (ROOT / "README.md").read_text()
    translated = (ROOT / "README.zh-CN.md").read_text()
    assert "(README.zh-CN.md)" in english[:200] and "(README.md)" in translated[:200]
    ours, theirs = sections(english), sections(translated)
    assert len(ours) == len(theirs) > 4
    for here, there in zip(ours, theirs, strict=True):
        for what, value in here.items():
            assert value == there[what], what
    assert len(HAN.findall(translated)) > 1000


def test_one_command_writes_the_table_of_the_demo_into_both(monkeypatch):
    """The rows that stand in README.md, put into both again, change neither."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from demo_table import READMES, with_table

    english = (ROOT / "README.md").read_text()
    table = re.search(
        r"<!-- demo table -->.*?^\|---.*?$\n(.*?)\n\n", english, re.DOTALL | re.MULTILINE
    )
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table[1].splitlines()]
    assert len(rows) == 5
    for name, words in READMES.items():
        text = (ROOT / name).read_text()
        assert with_table(text, rows, words) == text
        assert with_table(text, rows[:-1], words) != text


def test_the_glossary_has_every_term_once_in_both_languages():
    text = (ROOT / "docs" / "glossary.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    listed = [row for row in rows if row[0] != "term"]
    assert len(listed) > 50 and len({row[0] for row in listed}) == len(listed)
    for name, translated, meaning, in_chinese in listed:
        assert meaning.endswith(".") and in_chinese.endswith("。") and HAN.search(in_chinese), name
        assert HAN.search(translated) or translated == name, name
    for word in ("base", "row", "piece", "padding row", "tied", "drift", "reachable", "bridge",
                 "bits per byte (bpb)", "manifest", "adoption", "graft"):  # fmt: skip
        assert word in {row[0] for row in listed}


def test_chinese_pages_are_chinese_and_stand_beside_english_ones():
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs" / "zh").glob("*.md")}
    assert pages == PAGES.keys() - {"README.zh-CN.md"}
    for page, english in PAGES.items():
        assert len(HAN.findall((ROOT / page).read_text())) > 500 and (ROOT / english).is_file()


def console(page):
    """What stands in a page's console blocks, line by line; sentences are in its language."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.sub(r'"[^"]+"$', '"..."', line) for line in lines]


def test_commands_of_chinese_pages_stand_on_the_english_ones():
    """The how-tos of medicine, terms, others and mend take a way of their own."""
    for name in ("quickstart", "low-resource", "many-gpus", "laptop"):
        page = f"docs/zh/{name}.md"
        assert console(page) == console(PAGES[page]) != [], name
    asked = console("docs/zh/faq.md")
    assert len(asked) > 20 and set(asked) <= set(console("docs/faq.md"))


def calls_of(module, name):
    """Per call of `name` in a module of ours: the constants among its arguments, its keywords."""
    for node in ast.walk(ast.parse((SRC / module).read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
            constants = {n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)}
            yield constants, {keyword.arg for keyword in node.keywords}


def test_every_finding_of_a_folder_by_itself_has_chinese_sentences():
    """Those that the report of a run can show: what `check MERGED` finds in readable files."""
    seen = set()
    for module in ("weights", "tokenizers", "added", "lineage"):
        for codes, values in calls_of(f"checks/{module}.py", "finding"):
            for code in codes:
                if code.startswith("LG6"):  # needs --base
                    continue
                seen.add(code)
                ways = [
                    chinese.fields(found) | chinese.fields(fix)
                    for found, fix in chinese.FINDINGS[code]
                ]
                assert any(names <= values for names in ways), (code, values)
    assert seen == chinese.FINDINGS.keys()


def test_reasons_of_terms_have_chinese_words():
    least, split = 5, {"冠 状"}
    asked = {"B12": 9, "心x": 9, "a-b": 9, "冠 状": 9, "心" * 40: 9, "心": 9, "冠状": 1, "切开": 9}
    kinds = set()
    for spelling, occurrences in asked.items():
        reason = terms.reasons(
            spelling, occurrences=occurrences, least=least,
            pieces=lambda text: [1] if text == "心" else [1, 2],
            splits=lambda text: text in split or text == "切开",
        )  # fmt: skip
        told = chinese.term_reason({"reason": reason, "occurrences": occurrences}, least)
        assert HAN.search(told) and "{" not in told
        kinds.add(reason.partition(":")[0])
    others = {"is banned", "the base reads it as one token in running text", "dropped", "no room"}
    assert kinds | others == chinese.TERMS.keys()
    source = (SRC / "selection" / "wanted.py").read_text()
    assert [kind for kind in others if f'"{kind}' not in source] == []
    assert "1 次" in chinese.term_reason({"reason": "too rare: x", "occurrences": 1}, least)
    assert chinese.term_reason({"reason": "something of another version"}, 5).startswith("some")


def test_the_chosen_size_is_told_in_chinese():
    saved = [40] * 10 + [1] * 90
    told = set()
    for asked, share, model in (
        (5, 0.5, None), (500, 0.5, None), (None, 0.5, None), (None, 0.1, None),
        (None, 0.5, sizing.ModelSize(hidden=1000, parameters=100_000, matrices=2)),
    ):  # fmt: skip
        because = sizing.choose_size(
            saved, base_tokens=2_000, text_bytes=5_000, vocabulary=300, requested=asked,
            max_share=share, model=model,
        ).to_json()["because"]  # fmt: skip
        sentence = chinese.size_sentence(because)
        assert f"{because['k']:,} " in sentence and f"{because['ratio']:.3f}" in sentence
        assert ("再加" in sentence) == (because["more"] > 0)
        told.add(because["rule"])
    assert told == chinese.SIZES.keys()


def test_limits_are_told_of_families_that_exist():
    named = {
        name
        for path in (SRC / "families").glob("*.py")
        for name in re.findall(r'^    name = "(.+)"$', path.read_text(), re.MULTILINE)
    }
    assert chinese.LIMITS.keys() < named
    assert all(HAN.search(text) and text.endswith("。") for text in chinese.LIMITS.values())
