"""Reading: what a spec names, every format alike, and whatever files people have."""

import csv
import gzip
import io
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lexigraft import text_formats
from lexigraft.corpus import beginning, inputs, read_documents, sources, text_files
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.manifest import BaseTokenizer, LearnRecord, Manifest, TextSource
from lexigraft.text_formats import Part, Remarks, TextFile, parts_of, read_part
from lexigraft.typed_json import parsed

DOCUMENTS = ['one\ntwo, "quoted"', "three\tfour", "患者，潜伏性感染。", "e\u0301 🙂 x"]


def table(delimiter, column="text"):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", column, "note"])
    writer.writerows([number, document, "n"] for number, document in enumerate(DOCUMENTS))
    return out.getvalue()


def json_lines(column="text"):
    return "".join(json.dumps({"id": 1, column: d}) + "\n" for d in DOCUMENTS)


CONTENTS = {
    "a.txt": "\n\n \n".join(DOCUMENTS) + "\n",
    "a.jsonl": json_lines(),
    "a.csv": table(","),
    "a.tsv": table("\t"),
}


def write_parquet(path, documents, column="text", group=2):
    rows = pyarrow.table({"id": range(len(documents)), column: documents})
    pyarrow.parquet.write_table(rows, path, row_group_size=group)
    return path


def write_all_formats(folder):
    written = [write_parquet(folder / "a.parquet", DOCUMENTS)]
    for name, content in CONTENTS.items():
        data = content.encode()
        half = len(data) // 2
        frames = [zstandard.compress(data[:half]), zstandard.compress(data[half:])]
        for suffix, stored in (
            ("", data), (".gz", gzip.compress(data)), (".zst", b"".join(frames)),
        ):  # fmt: skip
            written.append(folder / (name + suffix))
            written[-1].write_bytes(stored)
    return written


def test_all_formats_hold_equal_documents(tmp_path):
    files = write_all_formats(tmp_path)
    assert {
        name for file in files for name in text_formats.SUFFIXES if file.name == f"a{name}"
    } == {*text_formats.SUFFIXES}
    for file in files:
        assert list(read_documents([file])) == DOCUMENTS, file.name
    assert list(read_documents([tmp_path])) == DOCUMENTS * len(files)
    assert list(read_documents([str(tmp_path / "*.parquet")])) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_a_column_is_named_behind_the_file(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, DOCUMENTS, "findings")
    else:
        content = (
            json_lines("findings")
            if name == "a.jsonl"
            else table("\t" if name == "a.tsv" else ",", "findings")
        )
        path.write_text(content)
    assert list(read_documents([f"{path}#column=findings,weight=2"])) == DOCUMENTS
    with pytest.raises(LexigraftError, match="text") as caught:
        list(read_documents([path]))
    assert "#column=" in caught.value.fix


def test_a_hub_data_set_may_be_a_local_folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00001.parquet", DOCUMENTS)
    write_parquet(folder / "test-00000-of-00001.parquet", DOCUMENTS[:1], "text")
    assert list(read_documents([f"hf:{folder}"])) == DOCUMENTS
    assert list(read_documents([f"hf:{folder}::test"])) == DOCUMENTS[:1]
    assert text_files([f"hf:{folder}::test"]) == [folder]
    (source,) = sources([f"hf:{folder}::test#weight=3"])
    assert (source.name, source.weight) == ("hf:data::test", 3) and source.bytes > 0
    write_parquet(folder / "test-00000-of-00001.parquet", DOCUMENTS[:2], "text")
    assert sources([f"hf:{folder}::test"])[0].sha256 != source.sha256
    with pytest.raises(LexigraftError, match="no column findings, but id, text"):
        list(read_documents([f"hf:{folder}#column=findings"]))
    with pytest.raises(LexigraftError, match=r"validation.*"):
        list(read_documents([f"hf:{folder}::validation"]))


def test_a_hub_data_set_out_of_reach_is_an_error_with_a_way_out(tmp_path):
    """In a fresh process, whose libraries see HF_HUB_OFFLINE from the start."""
    code = textwrap.dedent("""
        from lexigraft.corpus import read_documents
        from lexigraft.errors import LexigraftError
        try:
            list(read_documents(["hf:someone/some-data:plain"]))
        except LexigraftError as fault:
            print(fault)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert "hf:someone/some-data:plain" in done.stdout and ".parquet" in done.stdout


# --- specs --------------------------------------------------------------------------------------


def test_options_of_a_spec(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b#weight=2.txt").write_text("x")
    assert inputs([f"{tmp_path}/a.txt#weight=0.5"])[0].weight == 0.5
    (file,) = inputs([f"{tmp_path}/*.txt#weight=3"][:1])[:1]
    assert file.weight == 3
    assert inputs([tmp_path / "b#weight=2.txt"])[0].weight == 1
    assert [f.weight for f in inputs([f"{tmp_path}#weight=4"])] == [4, 4]
    for weight in (0.001, 1000):
        assert inputs([f"{tmp_path}/a.txt#weight={weight}"])[0].weight == weight
    for wrong in ("weight=0", "weight=-1", "weight=x", "weight=nan", "weight=inf", "wight=2",
                  "weight=1e300", "weight=1000.1", "weight=1e-9", "weight=0.0009"):  # fmt: skip
        with pytest.raises(LexigraftError, match="#w") as caught:
            inputs([f"{tmp_path}/a.txt#{wrong}"])
        assert "#weight=" in caught.value.needed
    with pytest.raises(LexigraftError, match="weight 1 and 2"):
        inputs([tmp_path / "a.txt", f"{tmp_path}/a.txt#weight=2"])
    assert len(inputs([tmp_path / "a.txt", tmp_path, tmp_path / "a.txt"])) == 2


def test_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(RefusalError, match=r"a\.docx"):
        inputs([tmp_path / "a.docx"])
    with pytest.raises(LexigraftError, match="no text file"):
        inputs([tmp_path])
    with pytest.raises(LexigraftError, match=r"no file .*b\.txt"):
        inputs([tmp_path / "b.txt"])


def test_sources_keep_the_hash_of_manifests_from_before_weights(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (plain,) = sources([tmp_path / "a.txt"])
    assert plain.to_json() == {"name": "a.txt", "sha256": plain.sha256, "bytes": 1}
    (weighted,) = sources([f"{tmp_path}/a.txt#weight=2,column=t"])
    assert weighted.to_json() == {**plain.to_json(), "weight": 2.0, "column": "t"}
    assert parsed(TextSource, weighted.to_json()) == weighted
    base = BaseTokenizer(name="b", token_map="m", tokens=1)
    record = LearnRecord(base=base, family="f", token_map="m", content="c", tokens=2, first_id=1,
                         added=1, settings={}, sources={"corpus": [plain, weighted]}, versions={},
                         probe=[])  # fmt: skip
    manifest = Manifest().plus(record)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert Manifest.read(tmp_path).hash == manifest.hash


def test_the_beginning_ends_with_the_document_that_reaches_the_limit(tmp_path):
    (tmp_path / "a.txt").write_text("12345\n\n患者\n\nlast\n")
    assert beginning([tmp_path], 5) == ["12345"]
    assert beginning([tmp_path], 6) == ["12345", "患者"]
    assert beginning([tmp_path], 100) == ["12345", "患者", "last"]


# --- files as people have them ------------------------------------------------------------------


def test_a_folder_of_all_sorts_of_files(tmp_path, capsys):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "good.txt").write_text("good\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "picture.txt").write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + random.Random(1).randbytes(5000)
    )
    for number in range(5):
        (tmp_path / f"scan{number}.pdf").write_bytes(b"%PDF")
    assert list(read_documents([tmp_path])) == ["good"]
    assert list(read_documents([tmp_path])) == ["good"]
    said = capsys.readouterr().err
    assert said.count("not read") == 1
    assert "5 of other kinds (scan0.pdf, scan1.pdf, scan2.pdf, ...)" in said
    assert "2 empty (empty.jsonl, empty.txt)" in said and "1 binary (picture.txt)" in said


def test_a_binary_file_named_directly_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(random.Random(1).randbytes(5000))
    with pytest.raises(LexigraftError, match=r"not UTF-8|NUL"):
        list(read_documents([tmp_path / "a.txt"]))


def test_legacy_encodings_are_errors_also_in_a_folder(tmp_path):
    """Text that a person wants read is never passed over in silence."""
    (tmp_path / "a.txt").write_text("fine\n")
    for encoding in ("gb18030", "utf-16", "latin-1", "big5"):
        (tmp_path / "b.txt").write_bytes(
            "naïve café, mühsam\n".encode(encoding, "ignore")
            if encoding == "latin-1"
            else "患者潜伏性感染\n".encode(encoding, "ignore")
        )
        with pytest.raises(LexigraftError, match=r"line 1 is not UTF-8|NUL") as caught:
            list(read_documents([tmp_path]))
        assert "iconv" in caught.value.fix


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_stray_nul_bytes_are_dropped_and_counted(tmp_path, name, capsys):
    content = {
        "a.txt": b"pati\0ent and so on\n\n\0more text\n",
        "a.jsonl": b'{"text": "pati\\u0000ent and so on"}\n{"text": "\\u0000more text"}\n',
        "a.csv": b"text\npati\0ent and so on\n\0more text\n",
    }[name]
    (tmp_path / name).write_bytes(content)
    assert list(read_documents([tmp_path])) == ["patient and so on", "more text"]
    assert f"{name}: 2 NUL bytes dropped" in capsys.readouterr().err


def test_the_place_of_a_bad_byte_is_told_wherever_it_is(tmp_path):
    lines = [f"line {number} 患者\n" + "\n" * (number % 7 == 0) for number in range(300_000)]
    data = "".join(lines).encode()
    place = data.index(b"line 250000 ")
    broken = data[:place] + b"bad \xff byte" + data[place:]
    (tmp_path / "a.txt").write_bytes(broken)
    with gzip.open(tmp_path / "b.txt.gz", "wb", compresslevel=1) as stream:
        stream.write(broken)
    for name in ("a.txt", "b.txt.gz"):
        with pytest.raises(LexigraftError) as caught:
            list(read_documents([tmp_path / name]))
        line = broken[: place + 4].count(b"\n") + 1
        assert f"line {line} is not UTF-8 (byte 0xFF at column 5)" in caught.value.found


DAMAGED = {
    "a.txt.gz": gzip.compress(b"text " * 9999)[:-20],
    "a.txt.zst": zstandard.compress(random.Random(1).randbytes(9999).hex().encode())[:-20],
    "b.txt.gz": b"no archive",
    "b.txt.zst": b"no archive",
    "a.parquet": b"PAR1" + b"x" * 99,
    "a.jsonl": b'{"text": "a"}\n{"text": 3}\n',
    "b.jsonl": b'{"text": "a"}\n[[[[',
    "c.jsonl": b'{"text": "a"}\n' + b"[" * 100_000,
    "d.jsonl": b'{"text": "a"}\nnull\n',
    "a.csv": b"title,body\n1,2\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_errors_with_their_name(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(LexigraftError, match=name.replace(".", r"\.")) as caught:
        list(read_documents([tmp_path / name]))
    assert ("line 2" in caught.value.found) == name.endswith(".jsonl")


def test_a_parquet_column_that_holds_no_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1, 2, 3])
    with pytest.raises(LexigraftError, match="column text holds a int"):
        list(read_documents([tmp_path]))
    write_parquet(tmp_path / "a.parquet", ["a", None, " ", "b"])
    assert list(read_documents([tmp_path])) == ["a", "b"]


# --- long lines and parts -----------------------------------------------------------------------

ALPHABET = ["ab", "c", "患", "者", "。", "，", "🙂", " ", "  ", "\n", "\n\n", "\n \n", "\r\n", "\r\n\r\n", "\u3000",
            "\n\u3000\n", "\0", "\t", "\u2028", "\x85", "\ufeff"]  # fmt: skip


def parts_read(file):
    return [document for part in parts_of(file) for document in read_part(part, Remarks())]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.lists(st.sampled_from(ALPHABET), max_size=200).map("".join),
    part_bytes=st.integers(1, 90),
    limit=st.integers(8, 60),
)
@example(text="\n  ab患患", part_bytes=2, limit=8)  # a window that a part ends in
def test_parts_of_a_file_hold_the_documents_of_the_whole(tmp_path_factory, text, part_bytes, limit):
    """Whatever the size of parts and whatever the longest document, for .txt and .jsonl."""
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    data = ("xxxxxxxxxx" + text).encode()  # enough not to be taken for UTF-16
    data = data.replace(b"\0" * 2, b"\0")[:1000]
    lines = "".join(json.dumps({"text": block}) + "\n" for block in text.split("。"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_formats, "PART_BYTES", part_bytes)
        patch.setattr(text_formats, "DOCUMENT_LIMIT", limit)
        patch.setattr(text_formats, "_SAMPLE_BYTES", 5)
        for name, content in (("a.txt", data), ("a.jsonl", lines.encode())):
            path = path.with_name(name)
            path.write_bytes(content)
            file = TextFile(str(path))
            try:
                whole = list(read_part(Part(file), Remarks()))
            except LexigraftError as fault:
                assert "not UTF-8" in fault.found  # cut within a character, above
                continue
            assert parts_read(file) == whole
            assert all(len(document.encode()) <= limit for document in whole)
            if name == "a.txt":
                kept = "".join("".join(whole).split())
                assert kept == "".join(data.decode().replace("\0", "").split())


def test_long_documents_are_cut_where_nothing_is_torn(tmp_path, monkeypatch):
    monkeypatch.setattr(text_formats, "DOCUMENT_LIMIT", 20)
    cases = {
        "first line\nsecond line\nthird": ["first line", "second line\nthird"],
        "some words without an end": ["some words without", " an end"],
        "患者潜伏。感染肺炎": ["患者潜伏", "。感染肺炎"],
        "患者潜伏性感染肺炎": ["患者潜伏性感", "染肺炎"],
        "x" * 45: ["x" * 20, "x" * 20, "x" * 5],
    }
    for text, documents in cases.items():
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
        write_parquet(tmp_path / "a.parquet", [text])
        for name in ("a.txt", "a.jsonl", "a.parquet"):
            assert list(read_documents([tmp_path / name])) == documents, name


CHILD = """
import sys
from lexigraft.counting import count_chunks
import parts
counted = count_chunks(sys.argv[1:], workers=1)
size = counted.bytes + sum(len(document.encode()) for document in counted.held_out)
print(size, parts.peak_megabytes(), len(counted.chunks))
"""


@pytest.mark.parametrize(
    "kind", ["no spaces", pytest.param("spaces", marks=pytest.mark.matrix), "json"]
)
def test_a_line_of_100_megabytes_is_read_in_bounded_memory(tmp_path, kind):
    unit = {"no spaces": "潜伏性感染，" * 4, "spaces": "latent infections ", "json": "latent 感染"}[
        kind
    ]
    text = unit * (100_000_000 // len(unit.encode()))
    path = tmp_path / ("a.jsonl" if kind == "json" else "a.txt")
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) if kind == "json" else text)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    size, peak, chunks = map(float, done.stdout.split())
    assert size <= len(text.encode()) and chunks < 2000
    assert peak < 600
