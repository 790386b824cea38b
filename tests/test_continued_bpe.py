"""The fast learner of merges against a slow one that recounts everything after each merge."""

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lexigraft.families.continued_bpe import Merge, continue_bpe


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


def plain_reference(units, *, join, adoptable, min_count):
    """Continued BPE as one would write it on paper."""
    sequences = {unit: list(unit) for unit in units}
    pending, taken, learned = dict(adoptable), set(), []
    while True:
        options = []
        for character in pending:
            count = sum(units[u] * u.count(character) for u in units)
            if count >= min_count:
                options.append((-count * (pending[character] - 1), character, "", count))
        counts = Counter()
        for unit, sequence in sequences.items():
            for pair in pairwise(sequence):
                counts[pair] += units[unit]
        for (left, right), count in counts.items():
            if count < min_count or left in pending or right in pending:
                continue
            token = join(left, right)
            if token is not None and token not in taken:
                options.append((-count, left, right, count))
        if not options:
            return learned
        _, left, right, count = min(options)
        if not right:
            del pending[left]
            learned.append(Merge(left, left, None, count))
            continue
        token = join(left, right)
        taken.add(token)
        learned.append(Merge(token, left, right, count))
        for unit in sequences:
            sequences[unit] = join_pair(sequences[unit], left, right, token)


def join_short(left, right):
    return left + right if len(left + right) <= 5 and left + right != "ab" else None


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.lists(st.sampled_from("abcd潜"), min_size=1, max_size=9).map(tuple),
        st.integers(1, 9),
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_fast_learner_equals_plain_reference(units, min_count):
    adoptable = {"潜": 3}
    fast = list(
        continue_bpe(
            units, join=join_short, adoptable=adoptable, implicit=False, min_count=min_count
        )
    )
    present = {c: n for c, n in adoptable.items() if any(c in u for u in units)}
    assert fast == plain_reference(units, join=join_short, adoptable=present, min_count=min_count)


def test_order_of_the_input_decides_nothing():
    units = {("a", "b", "c"): 5, ("c", "d"): 5, ("b", "c"): 2, ("d", "a"): 5}
    backwards = dict(reversed(units.items()))
    options = {"join": lambda a, b: a + b, "adoptable": {}, "implicit": False, "min_count": 1}
    assert list(continue_bpe(units, **options)) == list(continue_bpe(backwards, **options))


def test_implicit_engines_join_every_split_of_a_token():
    units = {("a", "b", "c"): 9, ("b", "c", "x"): 8, ("z", "a", "bc"): 7}
    merges = list(
        continue_bpe(units, join=lambda a, b: a + b, adoptable={}, implicit=True, min_count=1)
    )
    tokens = [merge.token for merge in merges]
    assert len(tokens) == len(set(tokens))
