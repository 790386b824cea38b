"""WordPiece: read as transformers reads it, extended in every file, and cut only coarser."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import parts
from lexigraft import families
from lexigraft.counting import CHUNK
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.continued_bpe import Merge, continue_bpe
from lexigraft.families.proof import HARD_TEXTS
from lexigraft.families.units import Units
from lexigraft.families.wordpiece import WordPiece

KINDS = {
    "both": {},
    "lines": {"fast": False},
    "json": {"lines": False},
    "cased": {"lowercase": False},
}
REAL = parts.SHARED / "tokenizers" / "bert_base_chinese_wordpiece" / "vocab.txt"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wordpiece")
    return {name: parts.write_wordpiece(root / name, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return parts.corpus_text().split("\n\n")


def learned(family: WordPiece, texts: list[str], *, min_count: int = 20) -> list[Merge]:
    """Candidates of continued BPE, without those that break a word of `texts`."""
    counted = Counter(family.units(texts))
    units = Units.from_tuples(counted, family.map.ids, family.adoptable(counted))
    found = continue_bpe(units, join=family.join, implicit=False, min_count=min_count)
    merges = family.admits(list(islice(found, 300)))
    stretches = sorted({"".join(unit) for unit in counted})
    bad = family.breakers(merges, stretches)
    return [merge for merge in merges if merge.token not in bad]


@pytest.fixture(scope="module")
def extensions(bases, documents, tmp_path_factory) -> dict[str, tuple[WordPiece, WordPiece]]:
    """kind -> (base, extended), the latter read back from the folder that `extend` wrote."""
    root = tmp_path_factory.mktemp("extended")
    made = {}
    for name, folder in bases.items():
        base = families.load(folder)
        assert isinstance(base, WordPiece)
        (root / name).mkdir()
        base.extend(learned(base, documents), root / name)
        made[name] = (base, families.load(root / name))
    return made


def expanded(base: WordPiece, extended: WordPiece, ids: list[int]) -> list[int]:
    first = base.map.tokens
    return [p for i in ids for p in (base.pieces(extended.map.texts[i]) if i >= first else [i])]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_as_transformers_does(bases, documents, kind):
    from transformers import AutoTokenizer

    family = families.load(bases[kind])
    reference = AutoTokenizer.from_pretrained(bases[kind])
    for text in [*HARD_TEXTS, *documents[:20], "[MASK] a[UNK]b [SEP]"]:
        assert family.encode(text) == reference.encode(text, add_special_tokens=False), text
    assert family.start_ids() == [reference.cls_token_id]
    assert family.unknown_id == reference.unk_token_id
    assert not family.guaranteed


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_extended_and_read_alike(extensions, documents, kind):
    """Laws 1 and 5, and that transformers' own loader finds the same ids in the folder."""
    from transformers import AutoTokenizer

    base, extended = extensions[kind]
    new = extended.map.tokens - base.map.tokens
    assert new > 50
    assert {i: extended.map.texts[i] for i in base.map.texts} == dict(base.map.texts)
    assert sorted(extended.map.texts) == list(range(extended.map.tokens))
    assert sorted(p.name for p in extended.folder.iterdir()) == sorted(
        p.name for p in base.folder.iterdir()
    )
    readers = extended.engines()
    assert len(readers) == ("lines" not in kind and "json" not in kind) + 1
    readers["transformers"] = lambda texts: [
        AutoTokenizer.from_pretrained(extended.folder).encode(text, add_special_tokens=False)
        for text in texts
    ]
    texts = [*HARD_TEXTS[:20], *documents[:20]]
    first, *others = [read(texts) for read in readers.values()]
    assert all(other == first for other in others)
    assert any(i >= base.map.tokens for ids in first for i in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_only_coarsened_and_decodes_alike(extensions, documents, kind):
    """Laws 2 and 3 on the text of the learning words, where the base reads every word."""
    base, extended = extensions[kind]
    sentences = [
        part for text in documents for line in text.split("\n") for part in line.split(". ")
    ]
    read = shorter = 0
    for text in [*sentences, *HARD_TEXTS]:
        old, new = base.encode(text), extended.encode(text)
        if base.unknown_id in old:
            continue
        read += 1
        shorter += len(new) < len(old)
        assert expanded(base, extended, new) == old, text
        for skip in (False, True):
            assert extended.decode(new, skip_special=skip) == base.decode(old, skip_special=skip)
    assert read > 100 and shorter > 50


def test_words_with_unknown_characters_come_closer(extensions, documents):
    base, extended = extensions["both"]
    text = documents[0]
    old, new = base.encode(text), extended.encode(text)
    assert base.unknown_id in old and new.count(base.unknown_id) < old.count(base.unknown_id)
    adopted = [t for i, t in extended.map.texts.items() if i >= base.map.tokens and len(t) == 1]
    assert set(adopted) <= set(parts.HAN + "".join(parts.ORGANS + parts.STATES + parts.KINDS))
    assert adopted and all(base.pieces(t) == [base.unknown_id] for t in adopted)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_equals_the_engine_on_running_text(extensions, documents, kind):
    """Law 4: `emitted`, by which tokens are counted, says what comes out of the text itself."""
    base, extended = extensions[kind]
    first = base.map.tokens
    merges = [Merge(extended.map.texts[i], "", "", 0) for i in range(first, extended.map.tokens)]
    counted = Counter("".join(unit) for unit in base.units(documents))
    replayed: Counter[str] = Counter()
    for tokens, weight in zip(base.emitted(merges, list(counted)), counted.values(), strict=True):
        for token in tokens:
            replayed[token] += weight
    emitted = Counter(i for ids in extended.encode_batch(documents) for i in ids if i >= first)
    assert {m.token: replayed[m.token] for m in merges} == {
        extended.map.texts[i]: emitted[i] for i in range(first, extended.map.tokens)
    }


def test_chunks_hold_whole_words(bases):
    """Counting cuts a text first: never inside what BERT takes as one word (`CT＋MRI`, `10～20`)."""
    family = families.load(bases["both"])
    text = "CT＋MRI 10～20mg，aspirin－ibuprofen、a｜b（cardio—gram）“the＝one” ＄5。x　y"
    words = family._words_of(text)
    assert [word for chunk in CHUNK.findall(text) for word in family._words_of(chunk)] == words
    assert "ct＋mri" in words and "10～20mg" in words


def test_join_makes_words_of_one_script_only(bases):
    family = families.load(bases["both"])
    assert family.join("card", "##io") == "cardio"
    assert family.join("##io", "##gram") == "##iogram"
    assert family.join("card", "io") is None  # the second begins another word
    assert family.join("b", "##12") is None and family.join("b", "##б") is None
    assert family.join("##t", "##he") is None or "##the" not in family.map.ids
    known = next(t for t in family.map.ids if len(t) == 2 and t.isalpha())
    assert family.join(known[0], f"##{known[1]}") is None


def test_says_that_no_chinese_word_can_be_joined(bases, tmp_path):
    family = families.load(bases["both"])
    assert family.limits() == [
        "this pre-tokenizer splits every Han character: 0 new Chinese words are possible"
    ]
    assert not any(len(unit) > 1 for unit in family.units(["患者冠状动脉潜伏性感染"]))
    whole = parts.write_wordpiece(tmp_path / "whole", fast=False)
    settings = json.loads((whole / "tokenizer_config.json").read_text())
    settings["tokenize_chinese_chars"] = False
    (whole / "tokenizer_config.json").write_text(json.dumps(settings))
    assert families.load(whole).limits() == []


def test_a_missing_character_is_adopted_where_it_stands(tmp_path):
    """`é` begins words and stands inside them: two tokens, each with its own count."""
    folder = parts.write_wordpiece(tmp_path / "cased", fast=False, lowercase=False)
    family = families.load(folder)
    texts = ["école"] * 30 + ["café"] * 25 + ["naïve ☃é"] * 3
    assert family.unknown_id in family.encode("école") and family.unknown_id in family.encode(
        "café"
    )
    merges = learned(family, texts)
    assert {"é", "##é"} <= {merge.token for merge in merges}
    (tmp_path / "out").mkdir()
    family.extend(merges, tmp_path / "out")
    extended = families.load(tmp_path / "out")
    for text in ("école", "café"):
        ids = extended.encode(text)
        assert extended.unknown_id not in ids and extended.decode(ids) == text
    only = [Merge("é", "é", None, 1)]
    assert family.emitted(only, ["c##a##f##é"]) == [["[UNK]"]]  # `é` alone does not mend `café`


PIECES = st.lists(st.text("ab", min_size=1, max_size=4), max_size=6)


def tiny(folder: Path, starts: list[str], inner: list[str]) -> WordPiece:
    """A vocab.txt of given tokens over the letters a and b."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = dict.fromkeys([*special, "a", *starts, *(f"##{text}" for text in ["b", *inner])])
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    return WordPiece(folder, None)


def brute_force(tokens: set[str], word: str) -> list[str] | None:
    """The definition: the longest token that matches, again and again; None is unknown."""
    cut, rest = [], word
    while rest:
        mark = "##" if cut else ""
        fits = [t for t in tokens if t == mark + rest[: len(t) - len(mark)] and len(t) > len(mark)]
        if not fits:
            return None
        cut.append(max(fits, key=len))
        rest = rest[len(cut[-1]) - len(mark) :]
    return cut


def coarsens(base: set[str], merges: list[Merge], family: WordPiece, word: str) -> bool:
    old = brute_force(base, word)
    new = brute_force(base | {m.token for m in merges}, word)
    if old is None:
        return True
    if new is None:
        return False
    made = {m.token for m in merges}
    spelled = [[family.map.texts[i] for i in family.pieces(t)] if t in made else [t] for t in new]
    return [piece for part in spelled for piece in part] == old


WORDS = ["".join(letters) for size in range(1, 8) for letters in product("ab", repeat=size)]


def candidates(family: WordPiece) -> list[Merge]:
    """Every token of two or three base tokens that follow each other in some word."""
    cuts = [brute_force(set(family.map.ids), word) or [] for word in WORDS]
    joined = {
        part[0] + "".join(piece.removeprefix("##") for piece in part[1:])
        for cut in cuts
        for size in (2, 3)
        for part in (cut[at : at + size] for at in range(len(cut) - size + 1))
    }
    return [Merge(token, "", "", 1) for token in sorted(joined - family.map.ids.keys())]


@given(starts=PIECES, inner=PIECES, data=st.data())
def test_without_its_breakers_a_set_only_coarsens_the_given_words(
    tmp_path_factory, starts, inner, data
):
    """Against plain enumeration; and where none is named, nothing was wrong."""
    family = tiny(tmp_path_factory.getbasetemp() / "tiny", starts, inner)
    base = set(family.map.ids)
    offered = candidates(family)
    merges = data.draw(st.lists(st.sampled_from(offered), unique=True)) if offered else []
    words = data.draw(st.lists(st.sampled_from(WORDS), unique=True))
    bad = family.breakers(merges, words)
    kept = [merge for merge in merges if merge.token not in bad]
    assert bad <= {merge.token for merge in merges}
    assert all(coarsens(base, kept, family, word) for word in words)
    assert bool(bad) != all(coarsens(base, merges, family, word) for word in words)


@given(starts=PIECES, inner=PIECES, word=st.sampled_from(WORDS))
def test_the_engine_cuts_as_the_definition_says(tmp_path_factory, starts, inner, word):
    family = tiny(tmp_path_factory.getbasetemp() / "tiny", starts, inner)
    cut = brute_force(set(family.map.ids), word)
    assert family.emitted([], [word]) == [cut or ["[UNK]"]]


def test_the_example_of_the_module_text(tmp_path):
    """`cardio` breaks `cardion`, unless that is a token too: the longest match wins."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text(
        "".join(f"{t}\n" for t in [*special, "card", "##io", "##ion", "##n", "##gram"])
    )
    family = WordPiece(tmp_path, None)
    words = ["card##ion", "card##io##gram"]
    cardio, cardion = Merge("cardio", "", "", 1), Merge("cardion", "", "", 1)
    assert family.breakers([cardio], words) == {"cardio"}
    assert family.breakers([cardio], words[1:]) == set()
    assert family.breakers([cardio, cardion], words) == set()


def test_added_tokens_behind_vocab_txt_become_its_lines(tmp_path):
    """Readers number new lines from the end of the file: what is behind it must move in."""
    from transformers import AutoTokenizer

    folder = parts.write_wordpiece(tmp_path / "base", fast=False)
    lines = (folder / "vocab.txt").read_text().splitlines()
    first = len(lines)
    added = {"<drug>": first, "<dose>": first + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    base = families.load(folder)
    assert base.map.tokens == first + 2
    (tmp_path / "out").mkdir()
    base.extend([Merge("hepatitis", "", "", 1)], tmp_path / "out")
    written = (tmp_path / "out" / "vocab.txt").read_text().splitlines()
    assert written == [*lines, "<drug>", "<dose>", "hepatitis"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.encode("<drug> hepatitis", add_special_tokens=False) == [first, first + 2]


@pytest.mark.parametrize(
    ("added", "word"),
    [({"<far>": 3}, "library reads id"), ({"line\nbreak": 0}, "line break"), ({" x": 0}, "' x'")],
)
def test_what_vocab_txt_cannot_hold_is_refused_by_name(tmp_path, added, word):
    folder = parts.write_wordpiece(tmp_path / "base", fast=False)
    first = len((folder / "vocab.txt").read_text().splitlines())
    shifted = {text: first + place for text, place in added.items()}
    (folder / "added_tokens.json").write_text(json.dumps(shifted))
    (tmp_path / "out").mkdir()
    with pytest.raises(LexigraftError) as caught:
        families.load(folder).extend([Merge("hepatitis", "", "", 1)], tmp_path / "out")
    assert word in str(caught.value)


def test_a_special_token_without_a_line_is_refused(tmp_path):
    """transformers gives it the next free id, which the first new token would take."""
    folder = parts.write_wordpiece(tmp_path / "base", fast=False)
    text = (folder / "vocab.txt").read_text().replace("[MASK]\n", "")
    (folder / "vocab.txt").write_text(text)
    with pytest.raises(LexigraftError, match=r"\[MASK\]"):
        families.load(folder)


def test_vocab_txt_of_another_class_is_refused(tmp_path):
    folder = parts.write_wordpiece(tmp_path / "base", fast=False)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')
    with pytest.raises(RefusalError, match="EsmTokenizer"):
        families.load(folder)


def test_files_that_differ_are_refused(tmp_path):
    folder = parts.write_wordpiece(tmp_path / "base")
    lines = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n")
    with pytest.raises(LexigraftError, match="files of one tokenizer"):
        families.load(folder)


def test_a_pre_tokenizer_that_leaves_the_mark_in_words_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RefusalError, match="##"):
        families.load(tmp_path)


def test_windows_line_ends_are_kept(tmp_path):
    folder = parts.write_wordpiece(tmp_path / "base", fast=False)
    data = (folder / "vocab.txt").read_bytes().replace(b"\n", b"\r\n")
    (folder / "vocab.txt").write_bytes(data.removesuffix(b"\r\n"))
    (tmp_path / "out").mkdir()
    families.load(folder).extend([Merge("hepatitis", "", "", 1)], tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == data + b"hepatitis\r\n"
    assert len(families.load(tmp_path / "out").encode("hepatitis")) == 1


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data (BERT's Chinese vocabulary)")
def test_real_chinese_bert_learns_english_words_and_missing_characters(tmp_path):
    from transformers import AutoTokenizer

    base_folder = tmp_path / "base"
    base_folder.mkdir()
    shutil.copyfile(REAL, base_folder / "vocab.txt")
    (base_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    corpora = parts.SHARED / "corpora"
    english = (corpora / "en_med_covid_guideline.txt").read_text()
    chinese = (corpora / "zh_med_covid_guideline.txt").read_text()
    texts = [*english.split("\n"), *chinese.split("\n")]
    base = families.load(base_folder)
    assert isinstance(base, WordPiece)
    merges = learned(base, texts, min_count=5)
    assert len(merges) > 50
    (tmp_path / "out").mkdir()
    base.extend(merges, tmp_path / "out")
    extended = families.load(tmp_path / "out")
    reference = AutoTokenizer.from_pretrained(tmp_path / "out")
    before = after = 0
    for text in texts:
        old, new = base.encode(text), extended.encode(text)
        assert new == reference.encode(text, add_special_tokens=False)
        if base.unknown_id not in old:
            assert expanded(base, extended, new) == old
        if text.isascii():
            before, after = before + len(old), after + len(new)
    assert after < 0.85 * before
