"""Which candidates become tokens: what comes out of the text is what counts.

The references here are slow and plain: merges are replayed with lists and loops, and whole
tokenizers are written and read by their engines.
"""

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parts
from lexigraft import families
from lexigraft.families.choice import BRIDGE_SHARE, children_of, choose, with_parts
from lexigraft.families.continued_bpe import Merge, continue_bpe


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A byte-level base that has no merges: each word is spelled in letters."""
    folder = parts.write_byte_level(tmp_path_factory.mktemp("letters") / "base")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    vocabulary = {t: i for t, i in data["model"]["vocab"].items() if len(t) == 1}
    data["model"] |= {"vocab": vocabulary, "merges": []}
    for place, token in enumerate(data["added_tokens"]):
        token["id"] = len(vocabulary) + place
    path.write_text(json.dumps(data), "utf-8")
    return families.load(folder)


def plain_replay(counted, merges):
    """(occurrences of each token, tokens of the whole text): one merge after the other."""
    ranks = {(m.left, m.right): rank for rank, m in enumerate(merges)}
    emitted, length = Counter(), 0
    for unit, weight in counted.items():
        tokens = list(unit)
        while pairs := [p for p in pairwise(tokens) if p in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            at = next(at for at, pair in enumerate(pairwise(tokens)) if pair == best)
            tokens[at : at + 2] = ["".join(best)]
        length += weight * len(tokens)
        for token in tokens:
            emitted[token] += weight
    return {m.token: emitted[m.token] for m in merges}, length


def own_letters_form(token, merges):
    """Whether the engine reads the letters of a token, by themselves, as this token."""
    return plain_replay({tuple(token): 1}, merges)[0].get(token) == 1


def require_sound(choice, counted, *, limit, min_count, asked=frozenset(), pinned=frozenset()):
    """What every choice promises, counted once more."""
    counts, length = plain_replay(counted, choice.merges)
    assert dict(choice.counts) == counts
    assert sum(choice.saved) == sum(len(u) * n for u, n in counted.items()) - length
    assert len(choice.merges) <= limit
    made = set()
    for merge in choice.merges:
        assert all(len(part) == 1 or part in made for part in (merge.left, merge.right))
        made.add(merge.token)
    assert len(made) == len(choice.merges)
    children = children_of(choice.merges)
    leaves = {t for t in made if not children.get(t)} - pinned
    assert all(counts[token] >= min_count for token in leaves)
    dead = {token for token in made if not counts[token]}
    assert choice.bridges == {token for token in dead if children.get(token)}
    for token in dead - choice.bridges:  # a pinned word that the text lacks, but that can be read
        assert token in pinned and own_letters_form(token, choice.merges)
    unasked = choice.bridges - with_parts(choice.merges, asked | pinned)
    assert len(unasked) <= BRIDGE_SHARE * limit


WORDS = st.dictionaries(
    st.text("abcde", min_size=2, max_size=10), st.integers(1, 30), min_size=1, max_size=14
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=WORDS, limit=st.integers(0, 40), min_count=st.integers(1, 12))
def test_every_choice_keeps_its_promises(letters, words, limit, min_count):
    units = letters.count_units(words)
    choice = choose(letters, units, limit=limit, min_count=min_count)
    require_sound(choice, units.to_tuples(), limit=limit, min_count=min_count)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=WORDS, limit=st.integers(4, 40), min_count=st.integers(2, 12), data=st.data())
def test_pinned_tokens_stay_and_banned_ones_are_never_made(letters, words, limit, min_count, data):
    units = letters.count_units(words)
    pin = data.draw(st.text("abcde", min_size=2, max_size=5))
    banned = data.draw(st.sets(st.text("abcde", min_size=2, max_size=3), max_size=3))
    first = [Merge(pin[: n + 1], pin[:n], pin[n], 0) for n in range(1, len(pin))]
    banned -= {merge.token for merge in first}
    choice = choose(
        letters, units, limit=limit, min_count=min_count, first=first, asked=frozenset({pin}),
        pinned=frozenset({pin}), banned=banned.__contains__,
    )  # fmt: skip
    made = {merge.token for merge in choice.merges}
    assert (pin in made) == own_letters_form(pin, first)  # `abab` is read `ab` `ab`
    assert not made & banned
    require_sound(
        choice, units.to_tuples(), limit=limit, min_count=min_count, pinned=frozenset({pin})
    )


def test_a_pinned_word_that_cannot_be_read_goes_with_all_that_was_made_for_it(letters):
    first = [Merge("ab", "a", "b", 0), Merge("aba", "ab", "a", 0), Merge("abab", "aba", "b", 0)]
    pinned = frozenset({"abab"})  # its letters are read `ab` `ab`
    for words in ({"abe": 3, "cd": 30}, {"abae": 3, "cd": 30}, {"abe": 20, "cd": 30}):
        units = letters.count_units(words)
        choice = choose(letters, units, limit=9, min_count=12, first=first, asked=pinned,
                        pinned=pinned)  # fmt: skip
        assert "cd" in choice.counts and not choice.counts.keys() & {"aba", "abab"}
        require_sound(choice, units.to_tuples(), limit=9, min_count=12, pinned=pinned)


def test_a_place_that_a_rare_leaf_leaves_is_filled(letters):
    # `ab` is in 30 words and `abc` in all of them but 5: learned, `ab` is left with 5.
    words = {"abc": 25, "abe": 5, "de": 9, "ce": 8}
    units = letters.count_units(words)
    learned = list(continue_bpe(units, join=letters.join, implicit=False, min_count=4))
    assert [m.token for m in learned[:2]] == ["ab", "abc"]
    choice = choose(letters, units, limit=4, min_count=6)
    assert [m.token for m in choice.merges] == ["ab", "abc", "de", "ce"]
    without = choose(letters, units, limit=4, min_count=6, judges=[lambda *_: {"abc"}])
    assert [m.token for m in without.merges] == ["ab", "de", "ce"]
    assert without.counts["ab"] == 30


def test_a_judge_sees_the_counts_and_what_it_drops_takes_what_is_made_of_it(letters):
    units = letters.count_units({"abcd": 20, "bcd": 11, "ea": 15})
    seen = []

    def judge(kept, counts):
        seen.append({m.token: counts[m.token] for m in kept})
        return {"bc"}

    choice = choose(letters, units, limit=9, min_count=5, judges=[judge])
    assert {"bc", "bcd"} & set(seen[0])
    assert all(part != "bc" for m in choice.merges for part in (m.token, m.left, m.right))
    assert {m.token for m in choice.merges} >= {"ea"}
    assert dict(choice.counts) == seen[-1]


def test_a_pinned_token_outlives_judges_with_its_parts(letters):
    units = letters.count_units({"abcd": 20, "eee": 30})
    first = [Merge("ab", "a", "b", 0), Merge("abc", "ab", "c", 0)]
    options = {"limit": 9, "min_count": 5, "first": first, "asked": frozenset({"abc"})}
    everything = lambda kept, _: {m.token for m in kept}  # noqa: E731
    kept = choose(letters, units, pinned=frozenset({"abc"}), judges=[everything], **options)
    assert [m.token for m in kept.merges] == ["ab", "abc"]
    assert choose(letters, units, judges=[everything], **options).merges == []


def test_with_parts_names_all_that_a_token_is_made_of():
    kept = [Merge("ab", "a", "b", 0), Merge("cd", "c", "d", 0), Merge("abcd", "ab", "cd", 0),
            Merge("x", "x", None, 0)]  # fmt: skip
    assert with_parts(kept, frozenset({"abcd"})) == {"abcd", "ab", "cd", "a", "b", "c", "d"}
    assert with_parts(kept, frozenset({"x"})) == {"x"}
    assert with_parts(kept, frozenset({"gone"})) == set()


def test_a_dead_token_is_avoided_where_others_make_the_same(letters):
    # `ab` and `abc` come first, and all of `ab` becomes `abc`; `bc` is alive in other words.
    others = {f"{one}{other}": 99 for one, other in pairwise("fghijklmnopqrstuvwxyz")}
    units = letters.count_units({"abc": 50, "bcd": 4, "bce": 3, "ebc": 2, **others})
    first = [Merge("ab", "a", "b", 0), Merge("bc", "b", "c", 0), Merge("abc", "ab", "c", 0)]
    asked = frozenset({"abc", "bc"})
    choice = choose(letters, units, limit=30, min_count=5, first=first, asked=asked)
    assert [(m.token, m.left, m.right) for m in choice.merges[:2]] == [
        ("bc", "b", "c"), ("abc", "a", "bc"),
    ]  # fmt: skip
    assert choice.detours == 1 and not choice.bridges
    assert (choice.counts["abc"], choice.counts["bc"]) == (50, 9)
    require_sound(choice, units.to_tuples(), limit=30, min_count=5)


def long_words():
    """Words that share few letters: each is one token only with much scaffolding."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {"".join(random.Random(seed).sample(letters, 9)): 10 + seed for seed in range(7)}


def test_bridges_of_long_words_stay_within_their_share(letters):
    units = letters.count_units(long_words())
    choice = choose(letters, units, limit=60, min_count=8)
    require_sound(choice, units.to_tuples(), limit=60, min_count=8)
    # the limit is what holds them back: without it there would be more
    learned = list(continue_bpe(units, join=letters.join, implicit=False, min_count=8))[:60]
    counts, _ = plain_replay(units.to_tuples(), learned)
    assert sum(not n for n in counts.values()) > BRIDGE_SHARE * 60


def test_what_asked_words_need_is_kept(letters):
    spelled = "cafe"
    pairs = {f"{one}{other}": 8 for one in "uvwxyz" for other in "klmnop"}
    units = letters.count_units({**long_words(), **pairs, spelled: 9})
    first = [Merge(spelled[: n + 1], spelled[:n], spelled[n], 0) for n in range(1, 4)]
    asked = frozenset({spelled})
    choice = choose(letters, units, limit=60, min_count=8, first=first, asked=asked)
    assert spelled in choice.counts and choice.bridges >= {"ca", "caf"}
    require_sound(choice, units.to_tuples(), limit=60, min_count=8, asked=asked)
    # what was made for a word that nobody asks for is not kept
    assert spelled not in choose(letters, units, limit=60, min_count=8, first=first).counts


def test_nothing_wanted_or_nothing_there_is_an_empty_choice(letters):
    none = choose(letters, letters.count_units({"abc": 9}), limit=0, min_count=1)
    assert none.merges == [] and not none.counts and not none.bridges
    empty = choose(letters, letters.count_units({"7": 9}), limit=9, min_count=1)
    assert empty.merges == [] and len(empty.saved) == 0


def test_a_banned_letter_is_not_adopted(tmp_path):
    base = families.load(parts.write_sentencepiece(tmp_path / "base", fast=False))
    units = base.count_units({"患者": 50, "患": 20, "者": 9, "肺": 30})
    free = choose(base, units, limit=9, min_count=5)
    assert {"患", "者", "患者", "肺"} == {m.token for m in free.merges}
    choice = choose(base, units, limit=9, min_count=5, banned={"患"}.__contains__)
    assert {m.token for m in choice.merges} == {"者", "肺"}


def test_a_pinned_word_may_have_letters_that_the_text_has_not(tmp_path):
    base = families.load(parts.write_sentencepiece(tmp_path / "base", fast=False))
    units = base.count_units({" table": 50, "患者": 9})
    first = [Merge("肝", "肝", None, 0), Merge("癌", "癌", None, 0), Merge("肝癌", "肝", "癌", 0)]
    pinned = frozenset({"肝癌"})
    choice = choose(base, units, limit=9, min_count=5, first=first, asked=pinned, pinned=pinned)
    assert [m.token for m in choice.merges[:3]] == ["肝", "癌", "肝癌"]
    assert choice.counts["肝癌"] == 0 and choice.bridges == {"肝", "癌"}
    (tmp_path / "v").mkdir()
    base.extend(choice.merges, tmp_path / "v")
    extended = families.load(tmp_path / "v", own=True)
    assert extended.pieces("肝癌") == [extended.map.ids["肝癌"]]


# --- the engine decides -------------------------------------------------------------------------

SYLLABLES = [" ", "ca", "r", "di", "o", "it", "is", "he", "the", " th", "冠", "状", "动脉", "é", "𠮷",
             "b", "aa", "."]  # fmt: skip
CHUNKS = st.dictionaries(
    st.lists(st.sampled_from(SYLLABLES), min_size=1, max_size=8).map("".join),
    st.integers(1, 9),
    min_size=1,
    max_size=25,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        "byte": families.load(parts.write_byte_level(root / "byte")),
        "ranks": families.load(parts.write_ranks(root / "ranks")),
        "sp": families.load(parts.write_sentencepiece(root / "sp")),
    }


def some_of(merges, seed):
    """A random part of `merges` in a random order in which parts stand before their wholes."""
    rng = random.Random(seed)
    ready = [m for m in merges if rng.random() < 0.8]
    made, out = {m.token for m in merges}, []
    known = set()
    while ready:
        fit = [m for m in ready if all(p in known or p not in made for p in (m.left, m.right))]
        fit = [m for m in fit if m.right is None or m.token != m.left]
        if not fit:
            break
        merge = rng.choice(fit)
        ready.remove(merge)
        known.add(merge.token)
        out.append(merge)
    return out


@pytest.mark.parametrize("kind", ["byte", "ranks", "sp"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(chunks=CHUNKS, seed=st.integers(0, 2**20))
def test_replay_counts_what_the_engine_emits(kind, bases, tmp_path_factory, chunks, seed):
    base = bases[kind]
    units = base.count_units(chunks)
    learned = list(
        continue_bpe(units, join=base.join, implicit=base.implicit, min_count=1)
    )[:60]  # fmt: skip
    merges = base.admits(some_of(learned, seed) if kind != "ranks" else learned)
    replayed = base.replay(units, merges)
    folder = tmp_path_factory.mktemp("extended")
    base.extend(merges, folder)
    extended = families.load(folder, own=True)
    for name, read in extended.engines().items():
        emitted = Counter()
        texts = list(chunks)
        if base.prefix:  # a chunk is a piece of a text: `.` keeps the prefix away from it
            texts = [f".{text}" for text in texts]
        for ids, weight in zip(read(texts), chunks.values(), strict=True):
            for token_id in ids:
                emitted[token_id] += weight
        counts = {m.token: emitted[extended.map.ids[m.token]] for m in merges}
        assert counts == replayed.counts, name
    if not base.prefix:
        before, after = (
            sum(
                len(i) * n
                for i, n in zip(f.encode_batch(list(chunks)), chunks.values(), strict=True)
            )
            for f in (base, extended)
        )
        assert replayed.saved.sum() == before - after
