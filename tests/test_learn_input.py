"""What `learn` is given: damaged files, odd options, folders of all sorts, two runs at once."""

import gzip
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

import parts
from lexigraft import learn
from lexigraft.cli import app
from lexigraft.corpus import OF_TOKENIZERS, SUFFIXES, inputs
from lexigraft.counting import count_chunks
from lexigraft.errors import LexigraftError
from lexigraft.families import measure, proof
from lexigraft.families.tokenmap import TOKENIZER_FILES
from lexigraft.files import publish, replace_folder
from lexigraft.manifest import NEW_TOKENS, Manifest

# --- options of a text --------------------------------------------------------------------------


def test_a_weight_that_leaves_nothing_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("angina " * 400)
    (tmp_path / "b.txt").write_text("angina " * 600)
    with pytest.raises(LexigraftError, match=r"nothing occurs once in .*a\.txt#weight"):
        count_chunks([f"{tmp_path}/a.txt#weight=0.001"])
    assert sum(count_chunks([f"{tmp_path}/b.txt#weight=0.001"]).chunks.values()) == 1


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--min-count", "--train-bytes"])
def test_numbers_below_1_are_refused(tmp_path, option):
    (tmp_path / "c.txt").write_text("x")
    arguments = ["learn", str(tmp_path), "--corpus", str(tmp_path / "c.txt"), "-o",
                 str(tmp_path / "v"), option]  # fmt: skip
    for number in ("0", "-5"):
        done = CliRunner().invoke(app, [*arguments, number])
        assert done.exit_code == 2 and "Error" in done.output and option in done.output
        assert not (tmp_path / "v").exists()


def test_help_tells_the_defaults_and_what_contrast_does():
    shown = CliRunner().invoke(app, ["learn", "--help"], env={"COLUMNS": "200"}).output
    text = " ".join(shown.replace("│", " ").split())
    assert "default: (the corpus once)" in text and "default: (by --train-bytes)" in text
    assert "tokens no more frequent in the corpus than there are not learned" in text


# --- folders ------------------------------------------------------------------------------------


def test_files_of_a_tokenizer_in_a_folder_are_no_text(tmp_path, capsys):
    parts.write_byte_level_files(tmp_path / "gp")
    parts.write_wordpiece(tmp_path / "gp" / "bert")
    (tmp_path / "gp" / "VOCAB.txt.gz").write_bytes(gzip.compress(b"angina\n"))
    (tmp_path / "gp" / "new_tokens.jsonl").write_text('{"text": "angina"}\n')
    (tmp_path / "gp" / "config.json").write_text("{}")
    (tmp_path / "gp" / "model.safetensors").write_bytes(b"")
    with pytest.raises(LexigraftError, match=r"no text file in .*gp"):
        inputs([tmp_path / "gp"])
    assert "4 of a tokenizer (VOCAB.txt.gz, vocab.txt, merges.txt, ...)" in capsys.readouterr().err
    (tmp_path / "gp" / "notes.txt").write_text("heart\n")
    assert [file.name for file in inputs([tmp_path / "gp"])] == ["notes.txt"]
    named = tmp_path / "gp" / "merges.txt"  # by itself
    assert [file.name for file in inputs([named])] == ["merges.txt"]
    ends_as_text = {name for name in (*TOKENIZER_FILES, NEW_TOKENS) if name.endswith(SUFFIXES)}
    assert ends_as_text == OF_TOKENIZERS


# --- two runs into one output -------------------------------------------------------------------


def test_the_second_of_two_runs_says_so_and_the_first_result_stays(tmp_path):
    out = tmp_path / "out"
    for first in ("folder", "file"):
        with (
            pytest.raises(LexigraftError, match=r"another run has written .*out") as caught,
            publish(out) as late,
        ):
            (late / "a.txt").write_text("late")
            if first == "file":
                out.write_text("first")
            else:
                with publish(out) as early:
                    (early / "a.txt").write_text("first")
        assert "choose another -o" in caught.value.fix
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (out if first == "file" else out / "a.txt").read_text() == "first"
        shutil.rmtree(out, ignore_errors=True)


def test_runs_that_replace_one_output_at_once_leave_a_whole_one(tmp_path):
    out = tmp_path / "out"

    def run(name):
        errors = []
        for number in range(150):
            partial = tmp_path / f"{name}{number}"
            partial.mkdir()
            (partial / "a.txt").write_text(f"{name} {number}")
            try:
                replace_folder(partial, out, force=True)
            except LexigraftError as fault:
                errors.append(fault.found)
                shutil.rmtree(partial)
        return errors

    with ThreadPoolExecutor(3) as pool:
        errors = [text for found in pool.map(run, "abc") for text in found]
    assert (out / "a.txt").read_text()[0] in "abc"
    kept = {path.name for path in tmp_path.iterdir()} - {"out"}
    assert {path.split(".")[1][:4] for path in kept} <= {"old-"}
    assert kept == {text.rpartition(" ")[2] for text in errors if "before is in" in text}


# --- the lines of an earlier result -------------------------------------------------------------

BASES = {
    "byte": parts.write_byte_level,
    "sp-model": lambda folder: parts.write_sentencepiece(folder, fast=False),
    "wordpiece": parts.write_wordpiece,
    "unigram": parts.write_unigram,
}


@pytest.fixture(scope="module", params=BASES)
def earlier(request, tmp_path_factory):
    """A base and what `learn` made of it, 12 tokens and 2 special ones."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "c.txt").write_text(parts.corpus_text(documents=60))
    (root / "s.txt").write_text("<|diagnosis|>\n<|plan|>\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "LONG_TEXT", 20_000)
        learn(BASES[request.param](root / "base"), corpus=[root / "c.txt"], tokens=12,
              min_count=10, special=[root / "s.txt"], output=root / "v")  # fmt: skip
    return root


def read(root):
    record = Manifest.read(root / "v").last("learn")
    return measure.read_rows(root / "v" / "new_tokens.jsonl", record.new_ids)


def test_lines_are_read_as_they_were_written(earlier):
    text = (earlier / "v" / "new_tokens.jsonl").read_text("utf-8")
    assert read(earlier) == [json.loads(line) for line in text.split("\n")[:-1]]
    assert len(read(earlier)) == 12


def changed(line, **values):
    row = {key: value for key, value in {**json.loads(line), **values}.items() if value != "gone"}
    return json.dumps(row).encode()


DAMAGE = {
    "line 2: Invalid JSON": lambda lines: [lines[0], b"{", *lines[2:]],
    "line 3: Invalid JSON": lambda lines: [*lines[:2], b"\xff", *lines[3:]],
    "line 1: Input should be an object": lambda lines: [b"[1]", *lines[1:]],
    "line 4: Invalid JSON": lambda lines: [*lines[:3], b"", *lines[3:]],
    "line 12: parts: Field required": lambda lines: [*lines[:-1], changed(lines[-1], parts="gone")],
    "line 12: parts: List should have at least 2": (
        lambda lines: [*lines[:-1], changed(lines[-1], parts=["a"])]
    ),
    "line 5: 'x' and ''": lambda lines: [
        *lines[:4], changed(lines[4], parts=["x", ""]), *lines[5:],
    ],
    "line 1: '.*' and '' do not make": (  # itself
        lambda lines: [changed(lines[0], parts=[json.loads(lines[0])["token"], ""]), *lines[1:]]
    ),
    "line 1: joined: ": lambda lines: [changed(lines[0], joined="7"), *lines[1:]],
    "line 1: count: ": lambda lines: [changed(lines[0], count=-1), *lines[1:]],
    "5 lines for 12 learned tokens": lambda lines: lines[:5],
    "0 lines for 12 learned tokens": lambda lines: [],
    "13 lines for 12 learned tokens": lambda lines: [*lines, lines[-1]],
    "line 1 is of id": lambda lines: lines[::-1],
    "line 2 is of id .*'other'": lambda lines: [
        lines[0], changed(lines[1], token="other"), *lines[2:],
    ],
}  # fmt: skip


@pytest.mark.parametrize("found", DAMAGE)
def test_damaged_lines_are_told_with_their_place(earlier, found):
    path = earlier / "v" / "new_tokens.jsonl"
    whole = path.read_bytes()
    lines = DAMAGE[found](whole.removesuffix(b"\n").split(b"\n"))
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    try:
        with pytest.raises(LexigraftError, match=rf"new_tokens\.jsonl: {found}") as caught:
            read(earlier)
        with pytest.raises(LexigraftError, match=rf"new_tokens\.jsonl: {found}"):
            learn(earlier / "base", from_vocab=earlier / "v", tokens=3, output=earlier / "w")
    finally:
        path.write_bytes(whole)
    assert not (earlier / "w").exists()
    assert "copy new_tokens.jsonl again" in caught.value.fix
