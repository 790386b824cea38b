"""What `learn` does with lists, a contrast text, an earlier result, and text not worth learning."""

import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parts
from lexigraft import families, learn
from lexigraft.corpus import held_out, read_documents
from lexigraft.counting import CHUNK
from lexigraft.errors import LexigraftError
from lexigraft.families import measure, proof
from lexigraft.families.choice import choose
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.llama_cpp import check_text
from lexigraft.families.proof import HARD_TEXTS, prove
from lexigraft.selection.gathering import gather
from lexigraft.selection.lists import Term
from lexigraft.selection.sizing import model_size
from lexigraft.selection.terms import variants
from lexigraft.selection.wanted import want


@pytest.fixture(scope="module", autouse=True)
def short_lines():
    """The line of a megabyte is proved in tests/test_learn.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "LONG_TEXT", 20_000)
        yield


def rows_of(vocab):
    return [json.loads(line) for line in (vocab / "new_tokens.jsonl").read_text().splitlines()]


def learning_documents(path):
    return [text for text in read_documents([path]) if not held_out(text)]


def emitted(family, documents):
    counts = Counter()
    for ids in family.encode_batch(documents):
        counts.update(ids)
    return counts


# --- terms --------------------------------------------------------------------------------------

# Words of two tokens of the tiny bases, and characters that share their first two bytes: longer
# words would need more parts than a small budget may hold.
LIST = """专业中东\t5
世上业主
业主
 riverhouse\x20

streetfriend
streetfriend
B12
上中 下东
book-table
CT中
the
bookhouse
Thebook
pneumonoultramicroscopicsilicovolcano
"""
REASONS = {
    "B12": "contains a digit",
    "上中 下东": "crosses a split of the pre-tokenizer: several words",
    "book-table": "contains what is no letter: -",
    "CT中": "mixed scripts",
    "bookhouse": "too rare: occurs 0 times, fewer than 20",
    "pneumonoultramicroscopicsilicovolcano": "is more than 32 characters: 37",
}
TERM_KINDS = ["byte", "ranks", "sp-both", "sp-model", "sp-json", "wordpiece", "unigram"]
BYTE_PAIRS = TERM_KINDS[:5]


def term_text():
    """Terms inside runs and in sentences; their characters stand in other words too."""
    rng = random.Random(5)
    out = parts.corpus_text(documents=60).strip().split("\n\n")
    for _ in range(300):
        run = "".join(rng.sample("一七三上下不与专世业东丝两严中丰临为主举", 8))
        terms = "".join(rng.choice(["专业中东", "世上业主", "业主", "丝两"]) for _ in range(3))
        word = rng.choice(["riverhouse", "streetfriend", "thebook", "Thebook", "the patient"])
        start = rng.choice(["Riverhouse", "The", "Thebook", "In"])
        out.append(
            f"{start} was {word} and streetfriends {word}, or riverhouses {rng.choice(parts.WORDS)}"
            f". {terms}，{run}。（{word}）\nB12 book-table CT中 {run[:2]} 上中 下东"
        )
    rng.shuffle(out)
    return "\n\n".join(out)


def make_base(kind, folder):
    return {
        "byte": lambda: parts.write_byte_level(folder),
        "ranks": lambda: parts.write_ranks(folder),
        "sp-both": lambda: parts.write_sentencepiece(folder),
        "sp-model": lambda: parts.write_sentencepiece(folder, fast=False),
        "sp-json": lambda: parts.write_sentencepiece(folder),
        "wordpiece": lambda: parts.write_wordpiece(folder),
        "unigram": lambda: parts.write_unigram(folder),
    }[kind]()


@pytest.fixture(scope="module")
def with_terms(tmp_path_factory):
    """kind -> (base, extended, rows, result, what was said), each learned once."""
    root = tmp_path_factory.mktemp("terms")
    (root / "c.txt").write_text(term_text())
    (root / "terms.txt").write_text(LIST)
    made = {}

    def get(kind):
        if kind not in made:
            base = make_base(kind, root / kind)
            if kind == "sp-json":
                (base / "tokenizer.model").unlink()
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                result = learn(base, corpus=[root / "c.txt"], terms=[root / "terms.txt"],
                               tokens=100, allow_more=True, min_count=20,
                               output=root / f"{kind}-v")  # fmt: skip
            made[kind] = (
                families.load(base), families.load(result.output), rows_of(result.output), result,
                said.getvalue(), learning_documents(root / "c.txt"),
            )  # fmt: skip
        return made[kind]

    return get


@pytest.mark.parametrize("kind", TERM_KINDS)
def test_terms_become_tokens_and_the_laws_hold(with_terms, kind):
    base, extended, rows, result, _, documents = with_terms(kind)
    made = [row for row in result.terms.rows if row.reason is None]
    texts = {row.variant.strip() for row in made}
    assert texts >= {"riverhouse", "streetfriend", "Thebook"}
    if kind != "wordpiece":  # it splits at each Chinese character
        assert texts >= {"专业中东", "世上业主", "业主"}
    by_id = {row["id"]: row for row in rows}
    for row in made:
        spelled = row.variant.strip().lower() if kind == "wordpiece" else row.variant
        assert by_id[row.token_id]["text"] == spelled
    assert all(by_id[row.token_id]["origin"] == "term" for row in made)
    assert {row["id"] for row in rows if row["origin"] == "term"} == {r.token_id for r in made}
    assert len(rows) == result.added <= 100
    assert prove(base, extended, [*HARD_TEXTS, *documents]).drift == 0
    counts = emitted(extended, documents)
    for row in rows:
        assert row["count"] == counts[row["id"]], row
    bridges = {row["token"] for row in rows if row["origin"] == "bridge"}
    assert len(bridges) == result.bridges
    of_terms = {row["token"] for row in rows if row["origin"] == "term"}
    for row in reversed(rows):  # a list is obeyed: what it needs is not in the 5%
        if row["token"] in of_terms:
            of_terms.update(row["parts"] or ())
    assert len(bridges - of_terms) <= 0.05 * 100


@pytest.mark.parametrize("kind", TERM_KINDS)
def test_terms_and_their_parts_rank_before_all_else(with_terms, kind):
    _, _, rows, result, *_ = with_terms(kind)
    terms = [row["text"] for row in rows if row["origin"] == "term"]
    last = max(place for place, row in enumerate(rows) if row["origin"] == "term")
    assert last < len(rows) - 1
    listed = [row.variant.encode() for row in result.terms.rows]
    if kind == "wordpiece":
        listed = [word.lower() for word in listed]
    assert {text.encode() for text in terms} <= set(listed)
    for row in rows[: last + 1]:
        assert any(bytes.fromhex(row["bytes"]) in term for term in listed), row


@pytest.mark.parametrize("kind", TERM_KINDS)
def test_each_term_that_is_no_token_has_its_reason(with_terms, kind):
    *_, result, said, _ = with_terms(kind)
    best = {row.term: row for row in result.terms.best()}
    for term, reason in REASONS.items():
        assert best[term].reason == reason
    rows = {(row.term, row.variant): row for row in result.terms.rows}
    the = rows["the", "the" if kind == "wordpiece" else " the"]
    assert the.reason == "is one token already" and the.token_id is None
    if kind == "wordpiece":
        assert best["业主"].reason == "crosses a split of the pre-tokenizer"
    assert "terms.txt: 15 lines: 13 terms; dropped 1 blank (first: line 5), 1 duplicate" in said
    assert "changed 1 spaces removed (first: line 4 riverhouse)" in said
    lines = "\n".join(result.lines())
    assert "terms: 13 listed;" in lines and "1: contains a digit" in lines
    assert result.to_json()["terms"]["listed"] == 13


@pytest.mark.parametrize("kind", TERM_KINDS)
def test_spellings_are_tokens_of_their_own(with_terms, kind):
    _, extended, _, result, *_ = with_terms(kind)
    made = {row.variant: row.token_id for row in result.terms.rows if row.reason is None}
    spellings = [variant for variant in variants("Thebook") if variant in made]
    if kind == "wordpiece":  # knows neither spaces nor capitals
        assert spellings == ["Thebook"] and extended.map.ids["thebook"] == made["Thebook"]
    else:
        assert {" Thebook", " thebook"} < set(spellings)
        assert len({made[s] for s in spellings}) == len(spellings)


def occurrences(text, spelling, spellings):
    """Where `spelling` stands as a word of its own: (start, end) in `text`."""
    han = unicodedata.name(spelling.strip()[0]).startswith("CJK")
    letter = r"[^\W\d_]"
    for found in re.finditer(f"(?={re.escape(spelling)})", text):
        start, end = found.start(), found.start() + len(spelling)
        before, after = text[start - 1 : start], text[end : end + 1]
        if before == " " and f" {spelling}" in spellings:
            continue
        if han or not (
            (spelling[0] != " " and re.fullmatch(r"[A-Za-z]", before))
            or (re.fullmatch(letter, after) and after.isascii())
        ):
            yield start, end


def spans(family, text):
    """{(start, end) in bytes of the text: id}."""
    ids = family.encode(text)
    at = -len(family.prefix)
    found = {}
    for token_id in ids:
        size = len(family.token_bytes(token_id))
        found[at, at + size] = token_id
        at += size
    assert at == len(text.encode())
    return found


@pytest.mark.parametrize("kind", BYTE_PAIRS)
def test_the_reached_share_is_that_of_the_text(with_terms, kind, tmp_path):
    """A term is reached where its letters are joined before anything that ranks behind it acts:
    so each is looked for in the tokenizer that ends with it."""
    base, _, rows, result, _, documents = with_terms(kind)
    spellings = {row.variant for row in result.terms.rows}
    merges = [Merge(r["token"], *(r["parts"] or [r["token"], None]), 0) for r in rows]
    for row in result.terms.rows:
        places = [list(occurrences(text, row.variant, spellings)) for text in documents]
        # at the beginning of a text SentencePiece sees a space that the text does not have
        if not base.prefix and " " not in row.variant.strip():
            assert row.occurrences == sum(map(len, places)), row
        if row.reason is not None:
            continue
        size = next(n for n, other in enumerate(rows) if other["id"] == row.token_id)
        folder = tmp_path / f"{row.token_id}"
        folder.mkdir()
        base.extend(merges[: size + 1], folder)
        read = families.load(folder, own=True)
        reached = 0
        for text, found in zip(documents, places, strict=True):
            by_place = spans(read, text) if found else {}
            for start, end in found:
                first = len(text[:start].encode())
                place = (first, first + len(text[start:end].encode()))
                reached += by_place.get(place) == row.token_id
        if row.variant.startswith(" ") or not base.prefix:
            slack = len(documents) if base.prefix else 0  # words at the beginning of a text
            assert reached <= row.reached <= reached + slack, row
        assert row.reached <= row.occurrences


# --- the plan of a list -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        kind: families.load(make_base(kind, root / kind))
        for kind in ("byte", "sp-model", "unigram", "wordpiece")
    }


def wanted(base, chunks, terms=(), pins=(), *, limit=100, min_count=1, banned=()):
    return want(
        base, chunks, terms=[Term(*t) if isinstance(t, tuple) else Term(t) for t in terms],
        pins=[Term(t) for t in pins], min_count=min_count, limit=limit,
        banned={spelled for word in banned for spelled in base.written(word)}.__contains__,
    )  # fmt: skip


def test_weights_and_occurrences_decide_the_order(bases):
    chunks = {" angina": 10, " myalgia": 12, " uremia": 9}
    base = bases["byte"]

    def order(**weights):
        terms = [(word, weights.get(word, 1.0)) for word in ("angina", "myalgia", "uremia")]
        made = wanted(base, chunks, terms)
        places = {m.token: place for place, m in enumerate(made.merges)}
        return sorted(made.tokens, key=lambda v: places[made.tokens[v]])

    saved = {v: (len(base.encode(v)) - 1) * n for v, n in chunks.items()}
    assert order() == sorted(saved, key=saved.__getitem__, reverse=True)
    assert order(uremia=50)[0] == " uremia"
    assert order(angina=50)[0] == " angina"
    assert order(myalgia=0.01)[-1] == " myalgia"


@pytest.mark.parametrize("kind", ["byte", "sp-model", "unigram"])
@pytest.mark.parametrize("limit", [0, 1, 6, 12, 30])
def test_of_a_list_that_is_too_long_the_strongest_are_made_whole(bases, kind, limit):
    words = ["肝炎", "胃癌", "肺结核", "脑出血", "骨折", "myalgia", "uremia"]
    chunks = {word: 50 - place for place, word in enumerate(words)}
    base = bases[kind]
    made = wanted(base, chunks, words, limit=limit)
    assert len(made.merges) <= limit
    known = set(base.map.ids)
    for merge in made.merges:
        if merge.right is not None:
            assert {merge.left, merge.right} <= known
        known.add(merge.token)
    assert set(made.tokens.values()) <= known
    assert bool(made.tokens) == (limit >= 6)
    short = [r.variant for r in made.reports if r.reason and r.reason.startswith("no room")]
    assert sorted([*made.tokens, *short]) == sorted(words)
    # every merge is there for a term that was made
    for merge in made.merges:
        assert any(merge.token in token for token in made.tokens.values())


def test_a_letter_that_the_base_has_no_piece_for_is_a_term_too(bases):
    made = wanted(bases["sp-model"], {"炎": 30, "肺炎": 9}, ["炎"])
    assert made.tokens == {"炎": "炎"} and made.merges == [Merge("炎", "炎", None, 0)]
    # of a Unigram base it is no token, though it is read as one unknown one
    assert bases["unigram"].pieces("炎") == [bases["unigram"].unknown_id]
    made = wanted(bases["unigram"], {"炎": 30, "肺炎": 9}, ["炎", "肺炎"])
    assert set(made.tokens) == {"炎", "肺炎"}


def test_a_spelling_belongs_to_the_word_that_is_listed_so(bases):
    chunks = {" Angina": 5, " angina": 7, "angina": 2}
    made = wanted(bases["byte"], chunks, terms=["angina"], pins=["Angina"], min_count=6)
    rows = {row.variant: row for row in made.reports}
    assert rows["Angina"].term == "Angina" and rows["angina"].term == "angina"
    assert rows["angina"].reason == "too rare: occurs 2 times, fewer than 6"
    assert {"Angina", " Angina", " angina"} == set(made.tokens)
    assert made.pinned == set(made.tokens.values())  # the pin came first: " angina" is its too
    alone = wanted(bases["byte"], chunks, pins=["Angina"])
    assert {row.term for row in alone.reports} == {"Angina"}


def test_spellings_that_a_family_writes_alike_are_one_token(bases):
    chunks = {" Nephritis": 5, " nephritis": 7, "nephritis": 2}
    made = wanted(bases["wordpiece"], chunks, ["Nephritis"])
    assert made.tokens == {"Nephritis": "nephritis"}
    assert [(row.variant, row.occurrences) for row in made.reports] == [("Nephritis", 14)]


def test_a_banned_term_says_so(bases):
    made = wanted(bases["byte"], {" angina": 9}, ["angina"], banned=[" angina", "angina"])
    assert not made.tokens
    assert {row.reason for row in made.reports if row.variant == " angina"} == {"is banned"}


@pytest.mark.parametrize("kind", ["byte", "sp-model", "wordpiece", "unigram"])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), limit=st.integers(1, 40))
def test_any_list_gives_merges_that_make_its_words(kind, bases, data, limit):
    syllables = st.sampled_from(["ri", "ver", "house", "the", "book", "专", "业", "中", "é"])
    words = st.lists(syllables, min_size=1, max_size=4).map("".join)
    terms = data.draw(st.lists(words, min_size=1, max_size=8, unique=True))
    pins = data.draw(st.lists(words, max_size=2, unique=True))
    spaced = st.tuples(st.sampled_from(["", " "]), st.sampled_from([*terms, "river"])).map("".join)
    chunks = data.draw(st.dictionaries(spaced, st.integers(1, 9), min_size=1))
    base = bases[kind]
    made = wanted(base, chunks, terms, pins, limit=limit, min_count=2)
    assert len(made.merges) <= limit
    assert len({merge.token for merge in made.merges}) == len(made.merges)
    assert made.pinned <= set(made.tokens.values())
    merges = base.admits(made.merges)
    known = {merge.token for merge in merges}
    for spelling, token in made.tokens.items():
        if token in known:
            alone = base.replay(base.count_units({spelling: 1}), merges).counts
            assert alone[token] == 1 and sum(alone.values()) == 1, spelling
    for row in made.reports:
        assert (row.reason is None) == (row.variant in made.tokens)
        if row.reason is None and row.term not in pins:
            assert row.occurrences >= 2


# --- every kind of file, without a list ----------------------------------------------------------

FILES = {
    "ranks": lambda folder: parts.write_ranks(folder, files=True),
    "gpt2": parts.write_byte_level_files,
    "wordpiece": parts.write_wordpiece,
    "wordpiece-lines": lambda folder: parts.write_wordpiece(folder, fast=False),
    "unigram-model": lambda folder: parts.write_unigram(folder, files="model"),
    "unigram-json": lambda folder: parts.write_unigram(folder, files="json"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_laws_hold_for_every_kind_of_file(kind, tmp_path):
    FILES[kind](tmp_path / "base")
    (tmp_path / "c.txt").write_text(parts.corpus_text(documents=60))
    result = learn(tmp_path / "base", corpus=[tmp_path / "c.txt"], general=[parts.ENGLISH],
                   tokens="10%", min_count=20, output=tmp_path / "v")  # fmt: skip
    base, extended = families.load(tmp_path / "base"), families.load(tmp_path / "v")
    assert 20 < result.added == extended.map.tokens - base.map.tokens
    documents = learning_documents(tmp_path / "c.txt")
    assert prove(base, extended, [*HARD_TEXTS, *documents]).drift == 0
    assert {p.name for p in (tmp_path / "v").iterdir()} == {
        *(p.name for p in (tmp_path / "base").iterdir()), "lexigraft.json", "new_tokens.jsonl",
    }  # fmt: skip
    counts = emitted(extended, documents)
    for row in rows_of(tmp_path / "v"):
        assert row["count"] == counts[row["id"]]
        assert (row["count"] == 0) == (row["origin"] == "bridge")
    assert result.bridges <= 0.05 * result.added


# --- contrast -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory):
    root = tmp_path_factory.mktemp("contrast")
    base = parts.write_byte_level(root / "base")
    rng = random.Random(3)

    def text(words, documents):
        return "\n\n".join(" ".join(rng.choice(words) for _ in range(60)) for _ in range(documents))

    nouns = ["river", "book", "window", "table", "house", "road", "child", "letter", "friend"]
    read = families.load(base).encode
    words = [a + b for a, b in itertools.permutations(nouns, 2) if len(read(f" {a}{b}")) == 2]
    rng.shuffle(words)
    everyday, clinic, elsewhere = words[:5], words[5:9], words[9:11]
    (root / "domain.txt").write_text(text(everyday * 2 + clinic, 80))
    (root / "other.txt").write_text(text(everyday * 2 + elsewhere, 80))
    (root / "terms.txt").write_text(f"{everyday[0]}\n")
    result = learn(base, corpus=[root / "domain.txt"], contrast=[root / "other.txt"],
                   terms=[root / "terms.txt"], tokens="10%", min_count=20,
                   output=root / "v")  # fmt: skip
    return root, families.load(base), families.load(root / "v"), result, everyday, clinic


def test_only_words_of_the_domain_are_learned(contrasted):
    root, base, _, result, everyday, clinic = contrasted
    rows = rows_of(root / "v")
    texts = {row["text"] for row in rows}
    assert {f" {word}" for word in clinic} <= texts
    assert texts & {f" {word}" for word in everyday} == {f" {everyday[0]}"}  # asked for by name
    assert result.added < int(0.10 * base.map.tokens)
    asked = {row["token"] for row in rows if row["origin"] == "term"}
    good = {row["token"] for row in rows if row["specificity"] >= 1.96} | asked
    for row in reversed(rows):  # what is not specific is a part of what is
        assert row["token"] in good
        good.update(row["parts"])


def test_specificity_is_the_z_score_of_the_counts(contrasted):
    root, base, extended, *_ = contrasted
    rows = rows_of(root / "v")
    here, there = (
        sum(emitted(base, learning_documents(root / name)).values())
        for name in ("domain.txt", "other.txt")
    )
    inside, outside = (
        emitted(extended, learning_documents(root / name)) for name in ("domain.txt", "other.txt")
    )
    # A token is joined where it comes out, and within all that is made of it.
    held = {}
    for row in rows:
        held[row["token"]] = Counter({row["token"]: 1})
        for part in row["parts"] or ():
            held[row["token"]] += held.get(part, Counter())
    joined = [Counter(), Counter()]
    for counts, came_out in zip(joined, (inside, outside), strict=True):
        for row in rows:
            for token, times in held[row["token"]].items():
                counts[token] += times * came_out[row["id"]]
    for row in rows:
        y1, y2 = (counts[row["token"]] for counts in joined)
        if not y1 + y2:
            assert row["specificity"] == 0
            continue
        a, a0 = 0.1 * (y1 + y2), 0.1 * (here + there)
        delta = math.log((y1 + a) / (here + a0 - y1 - a))
        delta -= math.log((y2 + a) / (there + a0 - y2 - a))
        z = delta / math.sqrt(1 / (y1 + a) + 1 / (y2 + a))
        assert row["specificity"] == pytest.approx(z, abs=1e-3)


# --- pins, bans, and text that is not worth learning ---------------------------------------------

ADDRESS = "see https://www.medlineplus.gov/ency/article or write to helpdesk@clinicmail.org now"
ODD = {
    "mojibake": "crÃ¨me brÃ»lÃ©e cafÃ©tÃ©ria â€œquotedâ€\x9d",
    "gbk": "锟斤拷锟斤拷",
    "control": "al\x07arm ne\x00phro",
    "long": "pneumonoultramicroscopicsilicovolcanoconiosisitis" * 2,
    "replaced": "hosp\ufffdital",
}


@pytest.fixture(scope="module")
def with_junk(tmp_path_factory):
    """A corpus with addresses, damaged text, and words of llama.cpp's check text."""
    root = tmp_path_factory.mktemp("junk")
    base = parts.write_byte_level(root / "base")
    junk = " ".join(text for name, text in ODD.items() if name != "control")
    junk = f"{junk} {ODD['control'].replace(chr(0), '')}"
    documents = [
        f"{text}\n{ADDRESS}\n{junk} multiple emojis concatenated normal"
        for text in parts.corpus_text(documents=120).strip().split("\n\n")
    ]
    documents[3] += " a zygote"
    (root / "c.txt").write_text("\n\n".join(documents))
    (root / "pin.txt").write_text("zygote\nxylophone\n肾\n")
    (root / "ban.txt").write_text("cardi\npatient\n性\nitis\n")

    def run(name, **options):
        return learn(base, corpus=[root / "c.txt"], tokens=120, allow_more=True, min_count=30,
                     output=root / name, **options)  # fmt: skip

    first = run("v", pin=[root / "pin.txt"], ban=[root / "ban.txt"])
    return root, first, run("w", change_check_text=True)


def test_pinned_words_become_tokens_however_rare(with_junk):
    root, result, _ = with_junk
    rows = {row["text"]: row for row in rows_of(root / "v")}
    assert (rows[" zygote"]["count"], rows["xylophone"]["count"]) == (1, 0)
    assert rows[" zygote"]["origin"] == rows["xylophone"]["origin"] == "term"
    assert rows["肾"]["count"] > 30
    extended = families.load(root / "v")
    for text in (" zygote", "xylophone", "肾"):
        assert extended.encode(text) == [rows[text]["id"]]
    assert result.dead > result.bridges  # a pinned word that no text holds is no bridge
    listed = {row.variant: row for row in result.terms.rows}
    assert listed[" zygote"].reached == 1 and listed["xylophone"].reason is None


def test_banned_words_are_no_tokens_in_any_spelling(with_junk):
    root, *_ = with_junk
    banned = {v for word in ("cardi", "patient", "性", "itis") for v in variants(word)}
    without = [row for row in rows_of(root / "v") if row["text"] in banned]
    free = {row["text"] for row in rows_of(root / "w")}
    assert not without and free & banned
    for row in rows_of(root / "v"):
        assert not set(row["parts"]) & {"cardi", "Ġcardi", "patient", "Ġpatient", "itis"}


def test_addresses_and_damaged_text_are_not_learned_from(with_junk, capsys):
    root, result, _ = with_junk
    documents = learning_documents(root / "c.txt")
    assert result.addresses == 2 * len(documents)
    assert f"not learned from: {result.addresses:,} URLs" in "\n".join(result.lines())
    texts = {row["text"] for row in rows_of(root / "v")} - {None}
    for damaged in ("Ã", "â€", "锟", "斤", "拷", "\ufffd", "\x07"):
        assert not any(damaged in text for text in texts), damaged
    for word in ("medline", "gov", "clinicmail", "helpdesk", "https", "ency"):
        assert not any(word in text for text in texts), word
    assert max(map(len, texts)) <= 33
    assert not any(unicodedata.category(c)[0] in "NC" for text in texts for c in text)
    gather(families.load(root / "base"), [root / "c.txt"], measured=0)
    assert "words are UTF-8 that was read in another encoding" in capsys.readouterr().err


def test_tokens_of_the_check_text_are_dropped_unless_asked_for(with_junk):
    root, *_ = with_junk
    base = families.load(root / "base")
    ids = base.encode(check_text())
    assert families.load(root / "v").encode(check_text()) == ids
    changed = families.load(root / "w").encode(check_text())
    assert len(changed) < len(ids)


@pytest.mark.parametrize("other", ["ban", "special"])
def test_a_word_cannot_be_pinned_and_banned_or_special(tmp_path, other):
    base = parts.write_byte_level(tmp_path / "base")
    (tmp_path / "c.txt").write_text(parts.corpus_text(documents=5))
    (tmp_path / "pin.txt").write_text("heart\nAngina\n")
    (tmp_path / "other.txt").write_text({"ban": "angina\n", "special": "Angina\n"}[other])
    with pytest.raises(LexigraftError, match=f"'Angina' is pinned, and --{other} has it") as caught:
        learn(base, corpus=[tmp_path / "c.txt"], pin=[tmp_path / "pin.txt"],
              output=tmp_path / "v", **{other: [tmp_path / "other.txt"]})  # fmt: skip
    assert "--pin or" in caught.value.fix
    assert not (tmp_path / "v").exists()


# --- a part of an earlier result ----------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(with_junk):
    root, *_ = with_junk
    base = root / "base"
    some = learn(base, from_vocab=root / "w", tokens=30, output=root / "w30")
    fewer = learn(base, from_vocab=root / "w30", tokens=9, output=root / "w9",
                  corpus=[root / "c.txt"], general=[parts.ENGLISH])  # fmt: skip
    return root, some, fewer


def test_a_cut_is_the_first_tokens_with_their_own_counts(cut):
    root, some, fewer = cut
    base = families.load(root / "base")
    whole = rows_of(root / "w")
    documents = learning_documents(root / "c.txt")
    documents = [re.sub(r"\S+(://|@)\S+", "", text) for text in documents]  # not learned from
    for result, size in ((some, 30), (fewer, 9)):
        rows = rows_of(result.output)
        assert (result.added, len(rows)) == (size, size)
        keys = ("id", "token", "pieces", "parts", "text")
        assert [[r[k] for k in keys] for r in rows] == [[r[k] for k in keys] for r in whole[:size]]
        counts = emitted(families.load(result.output), documents)
        assert [r["count"] for r in rows] == [counts[r["id"]] for r in rows]
        merges = [Merge(r["token"], *r["parts"], 0) for r in rows]
        replayed = base.replay(gather(base, [root / "c.txt"], measured=0).units, merges)
        assert {r["token"]: r["count"] for r in rows} == replayed.counts
    assert rows_of(fewer.output) == rows_of(root / "w9")
    assert fewer.general is not None and fewer.domain is not None and not fewer.domain_is_held_out
    assert some.domain is None
    assert "domain" not in "\n".join(some.lines()[:3])


def test_a_cut_of_a_cut_is_the_cut(cut, tmp_path):
    root, *_ = cut
    learn(root / "base", from_vocab=root / "w", tokens=9, output=tmp_path / "direct")
    for name in ("tokenizer.json", "new_tokens.jsonl"):
        assert (tmp_path / "direct" / name).read_bytes() == (root / "w9" / name).read_bytes()


def test_pinned_words_of_an_earlier_result_stay_what_they_are(cut, tmp_path):
    root, *_ = cut
    whole = rows_of(root / "v")
    size = max(place for place, row in enumerate(whole) if row["origin"] == "term") + 1
    learn(root / "base", from_vocab=root / "v", tokens=size, output=tmp_path / "v")
    rows = rows_of(tmp_path / "v")
    pinned = {"zygote", " zygote", "xylophone", "肾", " 肾"}
    assert {row["text"] for row in rows if row["origin"] == "term"} == pinned
    assert {row["text"]: row["count"] for row in rows}["xylophone"] == 0
    for row, old in zip(rows, whole, strict=False):
        assert row["origin"] == old["origin"] or row["count"] > old["count"]
    # in the middle of what a pinned word is made of
    learn(root / "base", from_vocab=root / "v", tokens=3, output=tmp_path / "w")
    for row in rows_of(tmp_path / "w"):
        assert (row["origin"] == "bridge") == (row["count"] == 0 and row["text"] not in pinned)


def test_what_cannot_be_cut_is_refused(cut, tmp_path):
    root, *_ = cut
    base = root / "base"

    def fails(match, **options):
        with pytest.raises(LexigraftError, match=match):
            learn(options.pop("base", base), output=tmp_path / "v", **options)
        assert not (tmp_path / "v").exists()

    fails("has 9 new tokens, --tokens asks for 10", from_vocab=root / "w9", tokens=10)
    fails("is no result of learn", from_vocab=base, tokens=5)
    (tmp_path / "empty").mkdir()
    fails("is no result of learn", from_vocab=tmp_path / "empty", tokens=5)
    fails("no corpus", tokens=5)
    for name in ("terms", "contrast", "pin", "ban"):
        fails("--from with", from_vocab=root / "w9", **{name: [root / "pin.txt"]})
    another = parts.write_byte_level(tmp_path / "another", vocab_size=380)
    fails("extends another base", base=another, from_vocab=root / "w9", tokens=5)


@pytest.mark.parametrize("kind", ["byte", "sp-model", "wordpiece", "unigram"])
def test_counts_of_a_cut_are_those_of_its_own_tokens(bases, kind):
    """Exactly for byte-pair kinds; elsewhere it is not known what comes out in another's place."""
    base = bases[kind]
    chunks = Counter(CHUNK.findall(parts.corpus_text(documents=60)))
    units = base.count_units(chunks)
    choice = choose(base, units, limit=100, min_count=10)
    rows = [
        {"token": m.token, "parts": m.right and [m.left, m.right], "joined": int(saved),
         "count": choice.counts[m.token]}
        for m, saved in zip(choice.merges, choice.saved, strict=True)
    ]  # fmt: skip
    for size in (0, 1, 20, 60, 100):
        merges, counts = measure.cut(rows, size)
        replayed = base.replay(units, merges).counts
        assert [m.token for m in merges] == [m.token for m in choice.merges[:size]]
        if base.guaranteed:
            assert counts == replayed
        else:
            assert counts == {m.token: choice.counts[m.token] for m in merges}


# --- how many -----------------------------------------------------------------------------------


def test_auto_knows_the_model(tmp_path):
    base = parts.write_byte_level(tmp_path / "base")
    (tmp_path / "c.txt").write_text(parts.corpus_text(documents=120))
    config = {"hidden_size": 576, "num_hidden_layers": 1, "num_attention_heads": 9,
              "num_key_value_heads": 3, "intermediate_size": 64, "vocab_size": 400,
              "tie_word_embeddings": True}  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    result = learn(base, corpus=[tmp_path / "c.txt"], min_count=10, output=tmp_path / "v")
    size = result.size
    row = model_size(config, tied=True)
    assert row.matrices == 1
    speed = (result.domain.tokens_before / result.domain.tokens_after) / (
        1 + result.added * row.hidden / row.parameters
    )
    assert size.speed == pytest.approx(speed, rel=1e-6)
    assert size.k == result.added == len(rows_of(tmp_path / "v")) <= int(0.1 * result.tokens_before)
    lines = result.lines()
    assert lines[1] == size.why and size.why.startswith(f"{result.added} tokens: ")
    assert any(f"{size.speed:.2f} times the base's" in line for line in lines)
    counts = sorted(row["count"] for row in rows_of(tmp_path / "v"))
    assert size.median == pytest.approx(
        (counts[(len(counts) - 1) // 2] + counts[len(counts) // 2]) / 2
    )
    assert result.to_json()["size"]["speed"] == size.speed


# --- the same bytes -----------------------------------------------------------------------------


def test_lists_and_compilers_and_orders_give_the_same_bytes(tmp_path):
    base = parts.write_byte_level(tmp_path / "base")
    halves = term_text().split("\n\n")[:160]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("\n\n".join(halves[:70]))
    files[1].write_text("\n\n".join(halves[70:]))
    (tmp_path / "t.txt").write_text(LIST)
    (tmp_path / "p.txt").write_text("zygote\n")
    (tmp_path / "b.lst").write_text("patient\n")
    code = (
        "import sys; from pathlib import Path; root = Path(sys.argv[1]); compiled = sys.argv[4]\n"
        "if compiled == 'no': sys.modules['numba'] = None\n"
        "from lexigraft import learn; from lexigraft.families import native, proof\n"
        "assert native.COMPILED == (compiled == 'yes'); proof.LONG_TEXT = 20_000\n"
        "result = learn(root / 'base', corpus=sys.argv[5:], output=sys.argv[2], tokens=30,\n"
        "    min_count=9, workers=int(sys.argv[3]), terms=[root / 't.txt'],\n"
        "    pin=[root / 'p.txt'], ban=[root / 'b.lst'], contrast=[root / 'base/none.txt'])\n"
        "print([vars(row) for row in result.terms.rows])"
    )
    (base / "none.txt").write_text("the umbrella of a patient\n\nanother one\n")
    outputs, tables = [], []
    runs = [("1", files, "1", "yes"), ("2", files[::-1], "2", "yes"), ("3", files, "1", "no")]
    for seed, order, workers, compiled in runs:
        output = tmp_path / f"vocab{seed}"
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path, output, workers, compiled, *order], check=True,
            env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        outputs.append({p.name: p.read_bytes() for p in output.iterdir()})
        tables.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert tables[0] == tables[1] == tables[2] and "业主" in tables[0]
