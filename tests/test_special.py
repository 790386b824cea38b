"""New special tokens: ids behind everything, found literally, skipped, alike in every file."""

import json

import pytest

import parts
from lexigraft import families, learn
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import proof
from lexigraft.families.loader import TransformersLoader, prove_loader
from lexigraft.families.proof import prove
from lexigraft.families.special import add_special
from lexigraft.selection.gathering import between

# The last one is `ICU` in wide letters, which normalizers change in a text.
SPECIAL = ["<|diagnosis|>", "[检查]", "ＩＣＵ"]
TEXTS = ["patient with angina", " the heart", "a\nb  c", "house garden river", "", "患者"]


def make_base(kind, folder):
    kind, _, files = kind.partition("-")
    return {
        "byte": lambda: parts.write_byte_level(folder),
        "gpt2": lambda: parts.write_byte_level_files(folder),
        "sp": lambda: parts.write_sentencepiece(folder, fast=files != "model"),
        "ranks": lambda: parts.write_ranks(folder),
        "wordpiece": lambda: parts.write_wordpiece(
            folder, lines=files != "json", fast=files != "lines"
        ),
        "unigram": lambda: parts.write_unigram(folder, files=files),
    }[kind]()


KINDS = ["byte", "gpt2", "sp-both", "sp-model", "ranks", "wordpiece-both",
         "wordpiece-lines", "wordpiece-json", "unigram-both", "unigram-model", "unigram-json"]  # fmt: skip
LEARNED = ["house garden", "patient treated", "患者肺炎", "river friend"] * 9


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (base family, extended family with special tokens), each made once."""
    root = tmp_path_factory.mktemp("special")
    found = {}

    def get(kind):
        if kind not in found:
            base = make_base(kind, root / kind)
            output = root / f"{kind}-vocab"
            merges = parts.lengthen(base, output, LEARNED, tokens=5)
            assert merges
            first = families.load(base).map.tokens + len(merges)
            add_special(output, SPECIAL, first)
            found[kind] = (families.load(base), families.load(output, own=True))
        return found[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_ids_stand_behind_all_others_and_nothing_else_moves(made, kind):
    base, extended = made(kind)
    last = extended.map.tokens
    assert [extended.map.ids[token] for token in SPECIAL] == [last - 3, last - 2, last - 1]
    assert {extended.map.ids[token] for token in SPECIAL} <= extended.map.special
    assert prove(base, extended, TEXTS).texts == len(TEXTS)
    for token_id in base.map.special | base.map.added:
        assert extended.map.texts[token_id] == base.map.texts[token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_found_literally_by_every_engine(made, kind):
    _, extended = made(kind)
    for token in SPECIAL:
        for text in (token, f"a{token}b", f"{token}{token}", f"heart {token}\nriver"):
            for name, read in extended.engines().items():
                ids = read([text])[0]
                assert ids.count(extended.map.ids[token]) == text.count(token), (name, text)
    for text in ("<|diagnosis|", "< |diagnosis|>", "[检 查]", "ICU"):
        assert not set(extended.encode(text)) & {extended.map.ids[token] for token in SPECIAL}


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_skips_them_only_when_asked_to(made, kind):
    _, extended = made(kind)
    for token in SPECIAL:
        ids = [*extended.encode("heart"), extended.map.ids[token], *extended.encode("river")]
        assert token in extended.decode(ids)
        without = extended.decode(ids, skip_special=True)
        assert token not in without and "heart" in without and "river" in without


@pytest.fixture(scope="module")
def loader():
    with TransformersLoader() as child:
        yield child


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_them_alike(made, kind, loader):
    base, extended = made(kind)
    texts = [f"heart {token} river" for token in SPECIAL]
    reading = loader.read(extended.folder, texts)
    if reading is None:
        pytest.skip(f"transformers does not load this kind: {loader.reason}")
    assert reading.tokens == extended.map.tokens
    for token, ids, plain, without in zip(
        SPECIAL, reading.ids, reading.decoded, reading.without_special, strict=True
    ):
        assert ids.count(extended.map.ids[token]) == 1
        assert token in plain and token not in without
    assert prove_loader(base, extended, TEXTS, loader).reason is None


def test_a_rank_file_alone_has_no_place_for_them(tmp_path):
    base = parts.write_ranks(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(RefusalError, match=r"tokenizer\.model has no place for special tokens"):
        add_special(base, SPECIAL, 400)
    before = (base / "tokenizer.model").read_bytes()
    add_special(base, [], 400)
    assert (base / "tokenizer.model").read_bytes() == before


def test_a_space_inside_one_is_refused_where_sentencepiece_reads_it(tmp_path):
    for write in (parts.write_sentencepiece, parts.write_unigram):
        base = write(tmp_path / write.__name__)
        before = {path.name: path.read_bytes() for path in base.iterdir()}
        with pytest.raises(RefusalError, match="holds a space"):
            add_special(base, ["<|end of note|>"], 400)
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    base = parts.write_byte_level(tmp_path / "byte")
    tokens = families.load(base).map.tokens
    add_special(base, ["<|end of note|>"], tokens)
    assert families.load(base).encode("a<|end of note|>")[-1] == tokens


@pytest.mark.parametrize("kind", ["byte", "gpt2", "sp-both", "wordpiece-both", "unigram-json"])
def test_they_may_come_without_any_learned_token(kind, tmp_path):
    base = families.load(make_base(kind, tmp_path / "base"))
    (tmp_path / "v").mkdir()
    base.extend([], tmp_path / "v")
    add_special(tmp_path / "v", SPECIAL, base.map.tokens)
    extended = families.load(tmp_path / "v", own=True)
    assert [extended.encode(token)[-1] for token in SPECIAL] == [
        base.map.tokens + place for place in range(len(SPECIAL))
    ]
    assert prove(base, extended, TEXTS).texts == len(TEXTS)
    for token_id in base.map.added:
        assert extended.encode(base.map.texts[token_id])[-1] == token_id


def test_texts_are_cut_at_special_tokens_the_longest_first():
    assert between(["a<x>b<x>>c", "<x>"], ["<x>", "<x>>"]) == ["a", "b", "c"]
    assert between(["a<x>", ""], []) == ["a<x>", ""]
    assert between(["a(.)b.c"], ["(.)"]) == ["a", "b.c"]


# --- with learn ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A corpus that is full of the new special tokens, and one of these that is a word."""
    root = tmp_path_factory.mktemp("learned")
    base = parts.write_byte_level(root / "base")
    documents = parts.corpus_text(documents=60).split("\n\n")
    marked = [f"<|diagnosis|>{text} <|diagnosis|>gastritis FINDINGS" for text in documents]
    (root / "c.txt").write_text("\n\n".join(marked))
    (root / "s.txt").write_text("<|diagnosis|>\n\n<|endoftext|>\nFINDINGS\n<|diagnosis|>\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "LONG_TEXT", 20_000)
        result = learn(base, corpus=[root / "c.txt"], general=[parts.ENGLISH], tokens=30,
                       min_count=20, special=[root / "s.txt"], output=root / "v")  # fmt: skip
    return root, base, result


def test_a_corpus_may_hold_the_new_special_tokens(learned):
    root, base, result = learned
    extended = families.load(root / "v")
    assert result.added == 30 and result.tokens_after == result.tokens_before + 32
    assert extended.map.texts[result.tokens_after - 2] == "<|diagnosis|>"
    assert extended.map.texts[result.tokens_after - 1] == "FINDINGS"
    rows = [json.loads(line) for line in (root / "v" / "new_tokens.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(result.first_id, result.first_id + 30))
    texts = [row["text"] or "" for row in rows]
    assert {text.strip() for text in texts} & {"patient", "history", "pat", "ph", "ast"}
    # what is inside a special token is not learned from, nor is a word that is one
    assert not any("diag" in text.lower() or "nosis" in text or "FIND" in text for text in texts)


def test_counts_are_those_of_the_text_with_its_special_tokens(learned):
    from lexigraft.corpus import held_out, read_documents

    root, _, result = learned
    extended = families.load(root / "v")
    counts = dict.fromkeys(range(result.first_id, result.first_id + result.added), 0)
    seen = 0
    for document in read_documents([root / "c.txt"]):
        if not held_out(document):
            ids = extended.encode(document)
            seen += ids.count(extended.map.ids["<|diagnosis|>"])
            for token_id in ids:
                if token_id in counts:
                    counts[token_id] += 1
    assert seen > 80
    for line in (root / "v" / "new_tokens.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["count"] == counts[row["id"]], row


def test_what_the_list_gets_wrong_is_said(learned, capsys, tmp_path):
    from lexigraft.selection.lists import read_special

    root, base, _ = learned
    listed = read_special(root / "s.txt", families.load(base).map.ids.keys())
    assert [word.text for word in listed.words] == ["<|diagnosis|>", "FINDINGS"]
    assert "1 clash (first: line 3 <|endoftext|>)" in listed.summary()
    assert "1 duplicate" in listed.summary() and "1 blank" in listed.summary()


def test_a_special_token_that_an_earlier_result_has_learned_is_refused(learned, tmp_path):
    root, base, _ = learned
    rows = [json.loads(line) for line in (root / "v" / "new_tokens.jsonl").read_text().splitlines()]
    token = next(row["token"] for row in rows if row["token"].isalpha() and row["token"].isascii())
    (tmp_path / "s.txt").write_text(f"{token}\n")
    with pytest.raises(LexigraftError, match=f"--special '{token}' is a token that was learned"):
        learn(base, from_vocab=root / "v", special=[tmp_path / "s.txt"], output=tmp_path / "w")
    assert not (tmp_path / "w").exists()
