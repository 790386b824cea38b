"""The README's commands parse, its code runs, and its tree is true."""

import re
import shlex
from pathlib import Path

import typer

import parts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def command_lines():
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_first_screen():
    console, python = blocks("console"), blocks("python")
    assert [line.split()[:2] for line in console[0].splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    assert len(console[1].splitlines()) == 6
    assert len([line for line in python[0].splitlines() if line.strip()]) == 4


def test_every_command_parses():
    from lexigraft.cli import app

    group = typer.main.get_command(app)
    seen = 0
    for words in command_lines():
        if words[0] != "lexigraft":
            continue
        command = group.get_command(None, words[1])
        assert command is not None, words
        command.make_context(words[1], words[2:], resilient_parsing=False)
        seen += 1
    assert seen >= 6


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in command_lines():
        if words[0] == "make":
            assert words[1] in targets


def test_the_tree_is_true():
    tree = re.search(r"```text\nsrc/lexigraft/\n(.*?)```", README, re.DOTALL).group(1)
    named = {name for line in tree.splitlines() for name in line.split("#")[0].split()}
    folder = ROOT / "src" / "lexigraft"
    real = {path.name + "/" * path.is_dir() for path in folder.iterdir()}
    assert named == {n for n in real if not n.startswith("_")} - {"py.typed"}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_lines_run(tmp_path, monkeypatch):
    """The four lines, on a tiny model under the README's own names."""
    base = parts.write_byte_level(tmp_path / "BASE")
    parts.write_model(base, tokens=382, tied=True)
    (tmp_path / "field.txt").write_text(parts.corpus_text(documents=60))
    monkeypatch.chdir(tmp_path)
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    exec("\n".join(lines[:3]), {})
    from lexigraft import check, train

    train("MODEL", corpus=["field.txt"], output="ADAPTER", max_steps=2, block_size=64)
    exec("\n".join([lines[0], lines[3]]), {})
    assert check("MERGED").ok


def test_the_measured_table_names_its_command():
    table = re.search(r"<!-- demo table -->\n(.*?)<!-- end -->", README, re.DOTALL).group(1)
    assert "`make demo`" in table
    for row in ("base", "grafted", "merged", "control, equal text", "control, equal compute"):
        assert f"| {row} |" in table
