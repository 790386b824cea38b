"""`show`: both readings of a text, look-up, and the joins that make a token; without torch."""

import json
import re
import subprocess
import sys

import pytest

import parts
from launching import on_a_terminal
from lexigraft import LexigraftError, families, show
from lexigraft.families.segments import Extension, visible


def ids(pieces):
    return [piece.id for piece in pieces]


TEXTS = ["急性冠状动脉炎", "the patient", " mixed 冠心病 text\n", "", "🙂 <|endoftext|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_base_is_read_from_the_vocabulary_alone(grafted_models, text):
    base, vocab = grafted_models / "base_tied", grafted_models / "vocab"
    alone, named = show(vocab, text), show(vocab, text, base=base)
    assert ids(alone.before) == ids(named.before) == families.load(base).encode(text)
    assert ids(alone.after) == families.load(vocab).encode(text)
    assert [piece.new for piece in alone.after] == [piece.id >= 382 for piece in alone.after]
    assert alone.exact and named.exact


def test_where_nothing_tells_of_a_base_there_is_one_reading(grafted_models):
    alone = show(grafted_models / "base_tied", "the patient")
    assert alone.lines()[0].split()[0] == "tokens" and len(alone.lines()) == 2
    assert show(grafted_models / "base_tied").lines()[0].startswith("no new tokens")


def test_a_token_is_looked_up_by_text_and_by_id(grafted_models):
    rows = [json.loads(line) for line in (grafted_models / "vocab" / "new_tokens.jsonl").open()]
    row = next(row for row in rows if row["text"] and len(row["text"]) > 1)
    by_text = show(grafted_models / "tied", token=row["text"])
    entry = next(e for e in by_text.entries if e.piece.id == row["id"])
    found = show(grafted_models / "vocab", token_id=row["id"]).to_json()["tokens"][0]
    assert found["bytes"] == row["bytes"] and found["count"] == row["count"]
    assert [piece["id"] for piece in found["pieces"]] == row["pieces"]
    assert found["rank"] == rows.index(row) + 1 == entry.rank
    assert f"{row['count']:,} in the learning text" in "\n".join(by_text.lines())
    with pytest.raises(LexigraftError, match="no single token"):
        show(grafted_models / "vocab", token="no such token")
    with pytest.raises(LexigraftError, match="no token has id 999"):
        show(grafted_models / "vocab", token_id=999)


def test_the_joins_are_those_that_learning_made(grafted_models):
    extension = Extension.open(grafted_models / "vocab")
    for token, row in extension.rows.items():
        assert list(extension.joins(token)[-1]) == row["parts"]
    tree = show(grafted_models / "vocab", token_id=extension.ids[-1]).entries[0].tree
    assert tree.parts and len(list(tree.lines())) >= 3


@pytest.mark.parametrize("kind", ["byte-level", "files", "sentencepiece", "ranks", "unigram"])
def test_every_kind_of_bpe_tells_how_a_token_is_joined(tmp_path, kind):
    write = {
        "byte-level": parts.write_byte_level, "files": parts.write_byte_level_files,
        "sentencepiece": parts.write_sentencepiece, "ranks": parts.write_ranks,
        "unigram": parts.write_unigram,
    }  # fmt: skip
    extension = Extension.open(write[kind](tmp_path / kind))
    made = {token: extension.joins(token) for token in extension.family.map.texts}
    joined = {token: joins for token, joins in made.items() if joins}
    assert bool(joined) == (kind != "unigram")
    for token, joins in joined.items():
        assert "".join(joins[-1]) == extension.family.map.texts[token]
        known = extension.family.map.ids
        assert all("".join(pair) in known for pair in joins)


def test_nothing_in_a_token_reaches_the_terminal_as_it_is():
    assert visible(b"\x1b[31m") == "\\x1b[31m"
    assert visible("\u202eabc".encode()) == "\\u202eabc"
    assert visible("\u200b".encode()) == "\\u200b"
    assert visible("\u0e31".encode()) == "\u25cc\u0e31"
    assert visible(b"\xe5\xbf") == "<E5BF>"


def test_the_command_line_shows_brackets_where_there_are_no_colours(grafted_models):
    command = [sys.executable, "-m", "lexigraft", "show", str(grafted_models / "vocab")]
    code = "import sys; sys.modules['torch'] = None; from lexigraft.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "show", str(grafted_models / "vocab"), "冠状动脉"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "base " in done.stdout and "[" in done.stdout and "\x1b" not in done.stdout
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["tokens"]) == 20


def test_new_tokens_are_coloured_on_a_terminal_and_in_brackets_without_colours(grafted_models):
    text = "冠状动脉"
    command = [sys.executable, "-m", "lexigraft", "show", str(grafted_models / "vocab"), text]
    new = [piece for piece in show(grafted_models / "vocab", text).after if piece.new]
    assert new
    coloured, _ = on_a_terminal(command, "stdout")
    for piece in new:
        assert re.search(rf"\x1b\[30;42m *{re.escape(piece.text)}", coloured)
    assert "[" not in re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    plain, _ = on_a_terminal(command, "stdout", NO_COLOR="1")
    assert "\x1b" not in plain and all(f"[{piece.text}]" in plain for piece in new)
