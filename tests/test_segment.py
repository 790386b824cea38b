"""Units and segmentation of counted chunks against the engines' own reading of whole texts."""

import json
import random
import shutil
import time
from collections import Counter

import pytest

import parts
from lexigraft import families
from lexigraft.corpus import read_documents
from lexigraft.families.continued_bpe import Merge, continue_bpe
from lexigraft.families.proof import HARD_TEXTS
from lexigraft.families.replay import replay
from lexigraft.families.sentencepiece_model import SPACE
from lexigraft.families.spelling import is_symbol, script_of
from lexigraft.selection.gathering import units_of_texts

KINDS = ["byte", "byte-ignore", "sp-both", "sp-model", "sp-json"]
REAL = ["smollm2_hf", "qwen3_hf", "llama3_1_hf", "gpt_neox_pythia_hf", "deepseek_v3_hf",
        "minimind_hf", "llama2_hf", "llama2_sp_bpe", "mistral_v1_hf", "gemma3_hf",
        "internlm_sp"]  # fmt: skip
SLOW = {"gemma3_hf"}  # 262,144 tokens; llama2_hf is of the same kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return parts.write_merge_kinds(tmp_path_factory.mktemp("segment"))


def plain_units(family, text, *, split=False):
    """The letter stretches of one text, from the engine's ids of the whole text, one by one."""
    ids, words = family.encode(text), None
    if split or family.name == "byte-level BPE":  # its engine tells where the pre-tokenizer splits
        words = family._engine.encode(text, add_special_tokens=False).word_ids
    units, unit, before = [], [], None
    data = b"".join(map(family.token_bytes, ids))
    letters = {}
    place = 0
    for at, character in enumerate(data.decode("utf-8", "surrogateescape")):
        for _ in character.encode("utf-8", "surrogateescape"):
            letters[place] = f"mark {at}" if is_symbol(character) else script_of(character)
            place += 1
    place = 0
    for at_token, token_id in enumerate(ids):
        cut = words is not None and at_token and words[at_token] != words[at_token - 1]
        size = len(family.token_bytes(token_id))
        kinds = [letters[at] for at in range(place, place + size)]
        mark = str(kinds[0]).startswith("mark") and letters.get(place - 1) != kinds[0]
        spaced = family.token_bytes(token_id).startswith(b" ")
        body = kinds[1:] if spaced else kinds
        scripts = set(body) - {""}
        good = token_id not in family.map.added | family.map.special
        good = good and None not in body and len(scripts) <= 1
        script = next(iter(scripts), None)
        if not good or spaced or cut or mark or (before and script and script != before):
            units.append(unit)
            unit = []
        if good:
            unit.append(data[place : place + size])
        before = script if good else None
        place += size
    return Counter(tuple(unit) for unit in [*units, unit] if len(unit) > 1)


def fast_units(family, text):
    units = units_of_texts(family, [text])
    ids = family.map.ids
    counted = Counter()
    for unit, weight in units.to_tuples().items():
        parts_of = []
        for token in unit:
            parts_of += [family.token_bytes(ids[token])] if token in ids else [
                bytes([byte]) for byte in token.encode()
            ]  # fmt: skip
        if len(parts_of) > 1:
            counted[tuple(parts_of)] += weight
    return counted


def compare(family, texts):
    for text in texts:
        assert fast_units(family, text) == plain_units(family, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_chunks_are_those_of_whole_texts(folders, kind):
    family = families.load(folders[kind])
    texts = parts.corpus_text(3, documents=8).split("\n\n")
    hard = [t for t in HARD_TEXTS if "<" not in t and not t.startswith(" ") and "▁" not in t]
    compare(family, [*texts, *hard])


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.matrix) if n in SLOW else n for n in REAL]
)
def test_real_units_of_chunks_are_those_of_whole_texts(name):
    folder = parts.SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("the real tokenizers of ../shared/data are not here")
    family = families.load(folder)
    texts = []
    for corpus in ("zh_med_medqa_exam", "en_med_pubmedqa", "zh_gen_rust_book"):
        stream = read_documents([parts.SHARED / "corpora" / f"{corpus}.txt"])
        texts += [text for text, _ in zip(stream, range(6), strict=False)]
    compare(family, texts)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_of_nothing_is_the_text_itself(folders, kind):
    family = families.load(folders[kind])
    units = units_of_texts(family, [parts.corpus_text(1, documents=4)])
    assert replay(units, [], implicit=family.implicit).counts == {}
    assert units.tokens == sum(n * w for n, w in _sizes(units))


def _sizes(units):
    for unit, weight in units.to_tuples().items():
        numbers = {text: symbol for symbol, text in units.texts.items()}
        yield sum(units.pending.get(numbers[token], 1) for token in unit), weight


NORMALIZERS = {
    "nfc": [{"type": "NFC"}],
    "no accents": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}],
    "spaces": [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
}
SPLITS = {
    "two Han": {
        "type": "Split", "pattern": {"Regex": r"\p{Han}{1,2}"}, "behavior": "Isolated",
        "invert": False,
    },
    "pairs": {
        "type": "Split", "pattern": {"Regex": "[a-z]{1,2}"}, "behavior": "Isolated", "invert": False,
    },
}  # fmt: skip


def with_steps(folder, target, *, before=(), split=None):
    """A copy of a SentencePiece tokenizer.json with more steps before its own."""
    shutil.copytree(folder, target)
    path = target / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    own = [data["normalizer"]] if data["normalizer"] else []
    data["normalizer"] = {"type": "Sequence", "normalizers": [*before, *own]}
    steps = [split] if split else []
    own = [data["pre_tokenizer"]] if data["pre_tokenizer"] else []
    if steps or own:
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*own, *steps]}
    path.write_text(json.dumps(data), "utf-8")
    return target


NORMAL_TEXTS = [
    "Re\u0301sume\u0301 of THE patients",
    "a  house   near the   Garden",
    "患者患者患者 house",
]


@pytest.mark.parametrize("steps", NORMALIZERS)
def test_units_are_normalised_as_the_engine_does(folders, tmp_path, steps):
    """Chunks are read as whole texts are: else tokens are counted that never come out."""
    folder = with_steps(folders["sp-json"], tmp_path / "base", before=NORMALIZERS[steps])
    family = families.load(folder)
    compare(family, [*NORMAL_TEXTS, *(family.decode(family.encode(t)) for t in NORMAL_TEXTS)])


@pytest.mark.parametrize("split", SPLITS)
def test_units_end_where_the_pre_tokenizer_splits(folders, tmp_path, split):
    family = families.load(with_steps(folders["sp-json"], tmp_path / "base", split=SPLITS[split]))
    texts = [*NORMAL_TEXTS, "the garden's letter"]
    expected = [plain_units(family, text, split=True) for text in texts]
    assert [fast_units(family, text) for text in texts] == expected
    assert expected != [plain_units(family, text) for text in texts]


def joined(*pairs):
    return [Merge(left + right, left, right, 9) for left, right in pairs]


def test_admitted_merges_name_the_parts_that_the_scores_join(folders):
    """A list may plan other parts; SentencePiece joins whatever pair is a piece, the best first."""
    base = families.load(folders["sp-both"])
    assert [base.map.texts[i] for i in base.pieces("kbvm")] == list("kbvm")
    first = joined(("b", "v"), ("k", "b"), ("v", "m"))
    assert base.admits([*first, *joined(("kb", "v"))]) == [*first, *joined(("k", "bv"))]
    # `b v` takes the `b` of `kb` and the `v` of `vm`: the token of these two is never made.
    assert base.admits([*first, *joined(("kb", "vm"))]) == first
    assert base.admits(first[1:] + joined(("kb", "vm"))) == first[1:] + joined(("kb", "vm"))


def test_a_letter_without_a_piece_is_joined_once_it_is_adopted(folders):
    base = families.load(folders["sp-both"])
    adopted = [Merge(letter, letter, None, 9) for letter in "患者"]
    word = joined(("患", "者"))
    assert base.admits([*adopted, *word]) == [*adopted, *word]
    assert base.admits([adopted[0], *word]) == adopted[:1]


@pytest.mark.parametrize("kind", ["sp-both", "sp-json"])
@pytest.mark.parametrize("seed", range(6))
def test_every_admitted_token_comes_out_of_its_own_letters(folders, tmp_path, kind, seed):
    base = families.load(folders[kind])
    rng = random.Random(seed)
    tokens = [*"abekmv", SPACE]
    planned = {}
    while len(planned) < 40:
        left, right = rng.choice(tokens), rng.choice(tokens)
        token = base.join(left, right)
        if token is not None and token not in planned:
            planned[token] = Merge(token, left, right, 9)
            tokens.append(token)
    admitted = base.admits(list(planned.values()))
    assert 0 < len(admitted) < 40
    (tmp_path / "all").mkdir()
    base.extend(admitted, tmp_path / "all")
    extension = families.load(tmp_path / "all")
    for place, merge in enumerate(admitted):
        text = f"1{merge.token.replace(SPACE, ' ')}1"
        read = [tuple(read([text])[0]) for read in extension.engines().values()]
        assert len(set(read)) == 1 and base.map.tokens + place in read[0]
        assert extension.pieces(merge.token) == [base.map.tokens + place]
    for place in range(0, len(admitted), 4):  # the parts are what stands there before
        (tmp_path / str(place)).mkdir()
        base.extend(admitted[:place], tmp_path / str(place))
        before = families.load(tmp_path / str(place))
        read = [before.map.texts[i] for i in before.pieces(admitted[place].token)]
        assert read == [admitted[place].left, admitted[place].right]
    # What was left out is read otherwise, or two engines could read it in two ways.
    assert base.admits(admitted) == admitted


def test_thousands_of_merges_are_admitted_at_once(tmp_path):
    base = families.load(parts.mistral_folder(tmp_path / "base", fast=False))
    units = units_of_texts(base, [parts.ENGLISH.read_text("utf-8")])
    learned = list(continue_bpe(units, join=base.join, implicit=True, min_count=1))
    seconds = []
    for _ in range(3):  # the first one opens the engine
        start = time.perf_counter()
        admitted = base.admits(learned)
        seconds.append(time.perf_counter() - start)
    assert len(admitted) > 0.9 * len(learned) > 100
    assert min(seconds) < 0.5 * len(learned) / 5000
