"""Counting: chunks that are the text, and counts that depend on the documents alone."""

import gzip
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import parts
from lexigraft import counting
from lexigraft.corpus import content_digest, held_out, read_documents
from lexigraft.counting import BREAKERS, CHUNK, Counted, count_chunks
from lexigraft.errors import LexigraftError

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: lexigraft[ray]"
)


def plainly(specs, *, prefix="", weights=None, keep=lambda document: True):
    """What `count_chunks` must count, one document after the other."""
    counts = Counter()
    for spec, weight in zip(specs, weights or [1] * len(specs), strict=True):
        for document in read_documents([spec]):
            if not held_out(document) and keep(document):
                for chunk in CHUNK.findall(prefix + document):
                    counts[chunk] += Fraction(weight)
    del counts[""]
    return {chunk: round(count) for chunk, count in sorted(counts.items()) if round(count)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of several kinds, large enough for several parts, with held-out documents in each."""
    folder = tmp_path_factory.mktemp("counted")
    (folder / "a.txt").write_text(parts.corpus_text(1, documents=4000))
    (folder / "b.txt").write_text(parts.corpus_text(2, documents=300).replace("\n", "\r\n"))
    documents = parts.corpus_text(3, documents=600).split("\n\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    (folder / "d.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents[:100])
    )
    return sorted(folder.iterdir())


# --- chunks -------------------------------------------------------------------------------------

CHARACTERS = st.sampled_from("ab7.-_é患者々〇ー。，“”’…—　 \t\n\r\u00a0\u2028\u302a\u0301🙂\x01")


@settings(max_examples=300, deadline=None)
@given(st.lists(CHARACTERS | st.sampled_from([" " * 300, "\n" * 300, "x" * 1100]), max_size=60))
def test_the_chunks_of_a_text_are_the_text(pieces):
    text = "".join(pieces)
    chunks = CHUNK.findall(text)
    assert chunks.pop() == ""
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= 1584 for chunk in chunks)
    for chunk, following in pairwise(chunks):
        if following[0] not in " \n\t\u3000":
            on_a_mark = following[0] in "。，“”’…—" and chunk[-1].isalnum()
            assert on_a_mark or len(chunk) >= 128  # a bound: nothing else cuts within a word


def test_breakers_are_punctuation_and_white_space_alone():
    """Letters, digits, marks and, for BERT, symbols may belong to the word before them."""
    import re
    import unicodedata

    breaks = re.compile(f"[{BREAKERS}]")
    found = [chr(code) for code in range(0x110000) if breaks.match(chr(code))]
    assert {"，", "。", "、", "“", "—", "\n", "！"} <= set(found)
    for character in found:
        category = unicodedata.category(character)
        assert category[0] == "P" or character in "\n\t\u3000", (character, category)


DUMMY_PREFIX = ("llama2_hf", "mistral_v1_hf")


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["smollm2_hf", "qwen3_hf", "llama3_1_hf", "deepseek_v3_hf", "llama2_hf", "gemma3_hf",
             "gpt_neox_pythia_hf", "minimind_hf", "mistral_v1_hf"],
)  # fmt: skip
def test_words_of_chunks_are_words_of_the_text(name):
    """Every real tokenizer gives the letters of a text the same tokens when it is cut."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Replace

    path = parts.SHARED / "tokenizers" / name / "tokenizer.json"
    if not path.exists():
        pytest.skip("the real tokenizers of ../shared/data are not here")
    engine = Tokenizer.from_file(str(path))
    if name in DUMMY_PREFIX:  # which stands before a document, not before each chunk
        engine.normalizer, engine.pre_tokenizer = Replace(" ", "\u2581"), None
    different = total = 0
    for corpus_name in ("zh_med_medqa_exam", "en_med_pubmedqa", "zh_gen_d2l_textbook"):
        text = (parts.SHARED / "corpora" / f"{corpus_name}.txt").read_text()[:100_000]
        for document in text.split("\n\n"):
            whole = lettered(engine, [document])
            cut = lettered(engine, CHUNK.findall(document))
            total += whole.total()
            different += (whole - cut).total() + (cut - whole).total()
    assert total > 20_000 and different == 0


def lettered(engine, texts):
    """Tokens of two letters or more, without the spaces before them."""
    words = (
        text[begin:end].strip()
        for text, encoding in zip(
            texts, engine.encode_batch(texts, add_special_tokens=False), strict=True
        )
        for begin, end in encoding.offsets
    )
    return Counter(word for word in words if len(word) > 1 and word.isalpha())


# --- counts -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_documents(corpus):
    counted = count_chunks(corpus)
    assert counted.chunks == plainly(corpus)
    learned = [d for d in read_documents(corpus) if not held_out(d)]
    kept_out = [d for d in read_documents(corpus) if held_out(d)]
    assert counted.documents == len(learned) > 4000
    assert counted.bytes == sum(len(d.encode()) for d in learned)
    assert counted.held_out == sorted(kept_out, key=content_digest)
    assert counted.share == 1


def test_a_prefix_stands_before_each_document(corpus):
    assert count_chunks(corpus[1:2], prefix=" ").chunks == plainly(corpus[1:2], prefix=" ")


def test_weights_multiply_counts_and_are_rounded_once(corpus):
    specs = [f"{corpus[0]}#weight=0.3", f"{corpus[1]}#weight=2.5", corpus[3]]
    counted = count_chunks(specs)
    assert counted.chunks == plainly([corpus[0], corpus[1], corpus[3]], weights=["0.3", "2.5", "1"])
    plain = count_chunks([corpus[0], corpus[1], corpus[3]])
    assert counted.bytes == plain.bytes and counted.held_out == plain.held_out
    assert min(counted.chunks.values()) > 0 and len(counted.chunks) < len(plain.chunks)


@pytest.mark.parametrize("limits", [{}, {"cap": 700_000}, {"most": 2_000}], ids=str)
def test_equal_whatever_the_processes_the_order_and_the_parts(
    corpus, limits, monkeypatch, tmp_path
):
    one = count_chunks(corpus, workers=1, **limits, measured=50_000)
    assert (one.share < 1) == bool(limits)
    assert len(one.chunks) <= limits.get("most", 10**9)
    monkeypatch.setattr(counting, "_BATCH_BYTES", 10_000)
    assert count_chunks(corpus, workers=3, **limits, measured=50_000) == one
    assert count_chunks(corpus[::-1], workers=2, **limits, measured=50_000) == one
    text = (corpus[0]).read_text()
    half = text.index("\n\n", len(text) // 2) + 2
    (tmp_path / "z.txt").write_text(text[:half])
    (tmp_path / "y.txt").write_text(text[half:])
    divided = count_chunks([tmp_path, *corpus[1:]], workers=2, **limits, measured=50_000)
    assert divided == one


def test_equal_whatever_the_hash_seed_and_the_main_program(corpus, tmp_path):
    """The main program has no `if __name__ == "__main__"`: it must not run in every process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import hashlib, sys\n"
        "from lexigraft.counting import count_chunks\n"
        "print('main program')\n"
        "counted = count_chunks(sys.argv[2:], workers=int(sys.argv[1]), cap=1_500_000)\n"
        "rows = repr((sorted(counted.chunks.items()), counted.held_out, counted.share))\n"
        "print(hashlib.sha256(rows.encode()).hexdigest())\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, script, workers, *map(str, corpus)], capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed, workers in (("1", "1"), ("2", "2"), ("3", "3"))
    }  # fmt: skip
    assert len(printed) == 1 and printed.pop().count("main program") == 1


def test_a_corpus_above_the_cap_is_sampled_by_content(corpus, capsys):
    whole = count_chunks(corpus)
    cap = whole.bytes // 3
    sample = count_chunks(corpus, cap=cap)
    assert sample.share == 1 / 4
    assert "1/4 of its documents" in capsys.readouterr().err
    assert (sample.bytes, sample.documents) == (whole.bytes, whole.documents)
    assert sample.held_out == whole.held_out

    def taken(document):
        return content_digest(document)[8] < 64

    assert sample.chunks == plainly(corpus, keep=taken)
    taken_bytes = sum(
        len(d.encode()) for d in read_documents(corpus) if taken(d) and not held_out(d)
    )
    assert 0 < taken_bytes <= cap < 2 * taken_bytes * 1.2


def test_held_out_documents_are_those_of_the_smallest_hashes(corpus):
    whole = count_chunks(corpus).held_out
    some = count_chunks(corpus, measured=20_000, workers=2).held_out
    assert some == whole[: len(some)]
    size = sum(len(d.encode()) for d in some)
    assert size <= 20_000 < size + len(whole[len(some)].encode())
    assert count_chunks(corpus, measured=1).held_out == whole[:1]


def test_documents_that_are_all_held_out_are_learned_from(tmp_path):
    document = next(f"文 {n}" for n in range(1000) if held_out(f"文 {n}"))
    (tmp_path / "a.txt").write_text(f"{document}\n\n{document}\n")
    chunks = {chunk: 2 for chunk in CHUNK.findall(document) if chunk}
    expected = Counted(chunks, 2 * len(document.encode()), 2, [], 1.0)
    assert count_chunks([tmp_path / "a.txt"]) == expected


def test_nothing_to_read_and_unknown_engines_are_errors(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(LexigraftError, match="no text"):
        count_chunks([tmp_path / "a.txt"])
    with pytest.raises(LexigraftError, match="--engine spark"):
        count_chunks([tmp_path / "a.txt"], engine="spark")


def test_errors_and_notices_of_processes_arrive(corpus, tmp_path, capsys):
    count_chunks(corpus, workers=2)
    said = capsys.readouterr().err
    assert said.count("CR LF") == 1
    returns = corpus[1].read_bytes().count(b"\r\n")
    blank = corpus[1].read_bytes().count(b"\r\n\r\n")
    assert f"{returns:,} CR LF" in said and blank
    data = corpus[0].read_bytes()
    (tmp_path / "a.txt").write_bytes(data + b"\n\nbad \xff\n")
    with pytest.raises(LexigraftError, match="is not UTF-8") as caught:
        count_chunks([tmp_path / "a.txt"], workers=2)
    assert f"line {data.count(10) + 3} " in caught.value.found


def test_a_counting_process_that_dies_is_an_error(corpus, monkeypatch):
    monkeypatch.setattr(counting, "_START", "import sys; sys.exit(3)")
    with pytest.raises(LexigraftError, match="counting process ended") as caught:
        count_chunks(corpus, workers=2)
    assert "--workers 1" in caught.value.fix


def test_an_interrupt_ends_all_processes_at_once(corpus):
    """Also within a part that takes long: an archive is read by one process as a whole."""
    code = (
        "import signal, sys, threading, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a script's `&` ignores it
        "from lexigraft.counting import count_chunks\n"
        "threading.Timer(0.5, lambda: print('begun', flush=True)).start()\n"
        "try: count_chunks(sys.argv[1:], workers=2)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    large = corpus[0].with_name("large.zst.d")
    large.mkdir()
    text = parts.corpus_text(9, documents=2000).encode()
    for name in ("a.txt.zst", "b.txt.zst"):
        (large / name).write_bytes(zstandard.compress(text) * 200)
    child = subprocess.Popen(
        [sys.executable, "-c", code, large], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout.readline() == "begun\n"
    began = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)  # the pipe of errors closes with the last process
    assert (out, err) == ("interrupted\n", "") and time.monotonic() - began < 10


def test_counting_processes_import_nothing_heavy():
    code = (
        "import sys; from lexigraft.counting import serve; "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'tokenizers', 'pyarrow', 'datasets') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- clusters -----------------------------------------------------------------------------------


@pytest.mark.matrix
@needs_ray
def test_a_local_ray_cluster_counts_the_same(corpus, tmp_path, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for cap in (2**28, 700_000):
        local = count_chunks(corpus, cap=cap, measured=50_000)
        assert count_chunks(corpus, cap=cap, measured=50_000, engine="ray", workers=2) == local
    assert not ray.is_initialized()
    (tmp_path / "a.txt").write_bytes(b"good\n\nbad \xff\n")
    with pytest.raises(LexigraftError, match="line 3 is not UTF-8"):
        count_chunks([tmp_path / "a.txt"], engine="ray", workers=2)


def test_without_ray_the_engine_is_named(corpus):
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from lexigraft.counting import count_chunks\n"
        "from lexigraft.errors import LexigraftError\n"
        "try: count_chunks(sys.argv[1:], engine='ray')\n"
        "except LexigraftError as fault: print(fault)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus[1])], capture_output=True, text=True, check=True
    )
    assert "lexigraft[ray]" in done.stdout


# --- scale --------------------------------------------------------------------------------------

GIGABYTE = """
import resource, sys, time
import parts
from lexigraft.counting import count_chunks
began = time.monotonic()
counted = count_chunks(sys.argv[1:], workers=2)
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
print(counted.bytes, counted.share, len(counted.chunks), parts.peak_megabytes() + 2 * child,
      round(time.monotonic() - began, 1))
"""


@pytest.mark.matrix
def test_a_gigabyte_is_counted_in_bounded_memory(tmp_path):
    """Numbers and Chinese clauses make most chunks unique."""
    path = tmp_path / "large.txt"
    with path.open("w") as stream:
        for block in varied_text(random.Random(5)):
            stream.write(block)
            if stream.tell() > 10**9:
                break
    done = subprocess.run(
        [sys.executable, "-c", GIGABYTE, path], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    size, share, chunks, peak, seconds = map(float, done.stdout.split())
    print(
        f"{size:,.0f} bytes, share {share}, {chunks:,.0f} chunks, {peak:.0f} MB in all, {seconds} s"
    )
    assert size > 0.9e9 and 0 < share < 1 and chunks > 500_000
    assert peak < 2000


def varied_text(rng):
    """Endless paragraphs; a clause is three of 5,000 fragments, a tenth of the words has a number."""
    fragments = ["".join(rng.choices(parts.HAN, k=rng.randint(2, 5))) for _ in range(5000)]
    words = [rng.choice(parts.ROOTS) + rng.choice(parts.ENDINGS) for _ in range(500)] + parts.WORDS
    while True:
        han = iter(rng.choices(fragments, k=3000))
        clauses = map("".join, zip(han, han, han, strict=True))
        numbers = rng.choices(range(10**6), k=1000)
        latin = iter(rng.choices(words, k=9000))
        sentences = (" ".join([*islice(latin, 9), f"mg{number}"]) for number in numbers)
        yield "".join(
            f"{clause}，{sentence}。\n" + "\n" * (number % 9 == 0)
            for clause, sentence, number in zip(clauses, sentences, numbers, strict=True)
        )
