"""The fast learner of merges against a slow one that recounts everything after each merge."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lexigraft.families import native, pairs
from lexigraft.families.continued_bpe import Merge, continue_bpe
from lexigraft.families.units import Units

LETTERS = {text: place for place, text in enumerate("dcba")}  # the order of the ids decides ties


def join_pair(sequence, left, right, token):
    joined = []
    while sequence:
        if sequence[:2] == [left, right]:
            joined.append(token)
            sequence = sequence[2:]
        else:
            joined.append(sequence[0])
            sequence = sequence[1:]
    return joined


def plain_reference(units, *, join, pending, min_count, implicit=False, first=()):
    """Continued BPE as one would write it on paper."""
    sequences = {unit: list(unit) for unit in units}
    pending, learned = dict(pending), []
    order = [*LETTERS, *sorted(pending)]

    def count_pairs():
        counts = Counter()
        for unit, sequence in sequences.items():
            for pair in pairwise(sequence):
                counts[pair] += units[unit]
        return counts

    def replace(left, right, token):
        for unit in sequences:
            sequences[unit] = join_pair(sequences[unit], left, right, token)

    for merge in first:
        counts = count_pairs()
        if {merge.left, merge.right} & pending.keys() or merge.left not in order:
            continue
        if merge.right not in order:
            continue
        if merge.token not in order:
            order.append(merge.token)
            learned.append(merge._replace(occurrences=counts[merge.left, merge.right]))
        replace(merge.left, merge.right, merge.token)
    while True:
        options = []
        for character in pending:
            count = sum(units[u] * u.count(character) for u in units)
            if count >= min_count:
                options.append((-count * (pending[character] - 1), 0, character, "", count))
        for (left, right), count in count_pairs().items():
            if count < min_count or left in pending or right in pending:
                continue
            token = join(left, right)
            if token is not None and (implicit or token not in order):
                options.append((-count, 1, left, right, count))
        if not options:
            return learned

        def rank(option):
            gain, kind, left, right, _ = option
            return gain, kind, order.index(left), order.index(right) if right else 0

        _, _, left, right, count = min(options, key=rank)
        if not right:
            del pending[left]
            learned.append(Merge(left, left, None, count))
            continue
        token = join(left, right)
        if token not in order:
            order.append(token)
            learned.append(Merge(token, left, right, count))
        replace(left, right, token)


def join_short(left, right):
    return left + right if len(left + right) <= 5 and left + right != "ab" else None


UNITS = st.dictionaries(
    st.lists(st.sampled_from("abcd潜伏"), min_size=1, max_size=9).map(tuple),
    st.integers(1, 9),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(UNITS, st.integers(1, 4), st.booleans(), st.booleans())
def test_fast_learner_equals_plain_reference(counted, min_count, implicit, decided):
    pending = {c: n for c, n in {"潜": 3, "伏": 2}.items() if any(c in u for u in counted)}
    first = [Merge("bc", "b", "c", 0), Merge("bcd", "bc", "d", 0)] if decided else []
    fast = continue_bpe(
        Units.from_tuples(counted, LETTERS, pending),
        join=join_short, implicit=implicit, min_count=min_count, first=first,
    )  # fmt: skip
    slow = plain_reference(
        counted, join=join_short, pending=pending, min_count=min_count, implicit=implicit,
        first=first,
    )  # fmt: skip
    assert list(fast) == slow


@settings(max_examples=60, deadline=None)
@given(UNITS)
def test_without_a_compiler_the_result_is_the_same(counted):
    units = Units.from_tuples(counted, {**LETTERS, "潜": 4, "伏": 5}, {})
    options = {"join": join_short, "implicit": False, "min_count": 1}
    fast = list(continue_bpe(units, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "Pairs", interpreted().Pairs)
        assert list(continue_bpe(units, **options)) == fast


@cache
def interpreted():
    """The module of the inner loops loaded once more, with compilation switched off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "numba", None)
        spec = importlib.util.spec_from_file_location("plain_pairs", pairs.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert not hasattr(module._merge, "py_func")
    return module


@pytest.mark.skipif(not native.COMPILED, reason="numba is not installed: nothing is compiled")
def test_the_fast_learner_is_compiled():
    assert hasattr(pairs._merge, "py_func")


def test_order_of_the_input_decides_nothing():
    counted = {("a", "b", "c"): 5, ("c", "d"): 5, ("b", "c"): 2, ("d", "a"): 5}
    backwards = dict(reversed(counted.items()))
    options = {"join": lambda a, b: a + b, "implicit": False, "min_count": 1}
    first, second = (Units.from_tuples(c, LETTERS, {}) for c in (counted, backwards))
    assert list(continue_bpe(first, **options)) == list(continue_bpe(second, **options))


def test_implicit_engines_join_every_split_of_a_token():
    counted = {("a", "b", "c"): 9, ("b", "c", "x"): 8, ("z", "a", "bc"): 7}
    ids = {text: place for place, text in enumerate(["a", "b", "c", "x", "z", "bc"])}
    merges = list(
        continue_bpe(
            Units.from_tuples(counted, ids, {}), join=lambda a, b: a + b, implicit=True, min_count=1
        )
    )
    tokens = [merge.token for merge in merges]
    assert len(tokens) == len(set(tokens))


@pytest.mark.skipif(not native.COMPILED, reason="numba is not installed: nothing is compiled")
def test_where_no_machine_code_can_be_kept_it_is_compiled_each_time(monkeypatch):
    """A read-only installation without a home folder."""
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError):
        native.numba.njit(cache=True)(lambda a: a)
    doubled = native.compiled(lambda number: number + number)
    assert doubled(21) == 42 and hasattr(doubled, "py_func")


ON_A_FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
import numpy as np
from lexigraft.families.joining import slot_of
table = np.full(16, -1)
print(slot_of(table, 7) == slot_of.py_func(table, 7))
"""


@pytest.mark.skipif(not native.COMPILED, reason="numba is not installed: nothing is compiled")
def test_a_full_disk_under_the_machine_code_is_no_reason_to_fail(tmp_path):
    """The first `learn` of an installation on a full disk, whose output goes to another."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "True\n"
    assert not list(tmp_path.rglob("*.nbc"))
