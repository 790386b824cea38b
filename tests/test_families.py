"""Families: detection, refusals by name, reading against the reference engines."""

import json
import shutil
from itertools import pairwise

import pytest

import parts
from lexigraft import families
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.proof import HARD_TEXTS
from lexigraft.families.spelling import is_word, may_join
from lexigraft.families.tokenmap import (
    TokenMap,
    first_difference,
    prefix_hash,
    read_token_maps,
)
from lexigraft.files import sha256_json


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return parts.write_merge_kinds(tmp_path_factory.mktemp("tokenizers"))


ALL = ["byte", "byte-ignore", "sp-both", "sp-model", "sp-json"]


@pytest.mark.parametrize("name", ALL)
def test_reads_as_transformers_does(folders, name):
    from transformers import AutoTokenizer

    family = families.load(folders[name])
    reference = AutoTokenizer.from_pretrained(folders[name])
    texts = [text for text in HARD_TEXTS if text.strip() == text and "  " not in text]
    if name == "sp-model":  # SentencePiece reads "<s>" in a text as letters, and "▁" as a space
        texts = [text for text in texts if "<s>" not in text and "\u2581" not in text]
    for text in texts:
        assert family.encode(text) == reference.encode(text, add_special_tokens=False), text
    marked = reference.encode("hello")
    assert marked[: len(family.start_ids())] == family.start_ids()


@pytest.mark.parametrize("name", ALL)
def test_pieces_join_to_exactly_the_token(folders, name):
    family = families.load(folders[name])
    for token_id, text in list(family.map.texts.items())[::7]:
        if token_id in family.map.special or text.startswith("<0x"):
            continue
        pieces = family.pieces(text)
        joined = b"".join(map(family.token_bytes, pieces))
        assert joined == family.token_bytes(token_id), text


@pytest.mark.parametrize("name", ["byte", "byte-ignore"])
def test_a_child_process_spells_as_the_engine_does(folders, tmp_path, name):
    """What `graft` asks of the process that opens a stranger's file, so that it opens none."""
    here = families.load(folders[name], own=True)
    tokens = [text for i, text in here.map.texts.items() if i not in here.map.added]
    asked = [*tokens, *(f"{one}{other}" for one, other in pairwise(tokens))]
    folder = shutil.copytree(folders[name], tmp_path / "asked")  # which nobody asked before
    there = families.load(folder, spell=asked)
    assert [there.pieces(text) for text in asked] == [here.pieces(text) for text in asked]
    assert "_engine" not in vars(there)
    assert there.encode("wie im Himmel") == here.encode("wie im Himmel")


def test_token_map_counts_max_id_not_entries(tmp_path):
    folder = parts.write_byte_level(tmp_path / "t")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 500, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert TokenMap.read(folder).tokens == 501


def test_every_file_has_its_own_map(folders):
    maps = read_token_maps(folders["sp-both"])
    assert set(maps) >= {"tokenizer.json", "tokenizer.model"}
    assert maps["tokenizer.json"].texts == maps["tokenizer.model"].texts


def test_first_difference_names_the_lowest_moved_id():
    old = TokenMap({0: "a", 1: "b", 2: "c"})
    assert first_difference(old, TokenMap({0: "a", 1: "x", 2: "c", 3: "d"})) == 1
    assert first_difference(old, TokenMap({0: "a", 1: "b", 2: "c", 3: "d"})) is None


def refused(folder, *words):
    with pytest.raises(RefusalError) as caught:
        families.load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_part_of_a_tokenizer_is_refused_by_name(tmp_path):
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "vocab.json").write_text('{"a": 0}')
    refused(gpt2, "vocab.json")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"model": {}}', '{"model": {"type": "BPE", "vocab": 3, "merges": []}}'],
)
def test_damaged_tokenizer_json_is_one_clear_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LexigraftError):
        families.load(tmp_path)


def test_added_token_whose_engine_ignores_its_id_is_refused(tmp_path):
    folder = parts.write_byte_level(tmp_path / "t")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 500, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(LexigraftError, match=r"<\|far\|>.*500.*382"):
        families.load(folder)


def test_no_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(LexigraftError, match="no tokenizer"):
        families.load(tmp_path)


def test_byte_level_beside_foreign_sentencepiece_is_refused(folders, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folders["byte"], mixed)
    shutil.copy(folders["sp-both"] / "tokenizer.model", mixed)
    refused(mixed, "SentencePiece", "tokenizer.model")


def test_words_are_letters_of_one_script():
    good = ["angina", " angina", "冠状动脉", "naïve", "сердце", "القلب", "ひらがなと漢字"]
    bad = ["", " ", "a1", "１型", "CT检查", "а b", "e.g", "a\ufffd", "x" * 40, "  a", "°"]
    assert [w for w in good if not is_word(w)] == []
    assert [w for w in bad if is_word(w)] == []


def test_characters_are_completed_before_they_are_joined():
    whole, other = "痛".encode(), "症".encode()
    assert may_join(whole[:1], whole[1:2]) and may_join(whole[:2], whole[2:])
    assert may_join(whole, other)
    assert not may_join(whole, other[:1])
    assert not may_join(whole[1:], other)
    assert may_join(b" " + whole[:2], whole[2:])


def test_the_hash_of_a_token_map_is_that_of_its_canonical_json():
    odd = {7: 'a"b\\', 1: "\n\x01\x7f\u2028/", 3: "结😀", 9: "\ud800"}
    pairs = [[token_id, text] for token_id, text in sorted(odd.items())]
    assert TokenMap(odd).hash == sha256_json(pairs)
    assert prefix_hash(TokenMap(odd), 7) == sha256_json(pairs[:2])
    assert TokenMap({}).hash == sha256_json([])
