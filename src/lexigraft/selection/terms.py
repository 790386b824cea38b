"""Listed terms: where they occur, why one cannot be a token, and the merges that make them tokens.

A term is looked for in each of its spellings (`variants`), since ` angina`, `angina` and `Angina`
are different tokens. `plan` turns the chosen spellings into ranked merges with few bridges, that
is tokens which no one asked for and which exist only as parts of others.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from lexigraft.families.spelling import MAX_CHARACTERS, script_of

Symbols = tuple[int, ...]

# Scripts whose words are written without spaces between them, by the first word of their letters'
# Unicode names (`script_of`). Hangul has spaces, but particles follow a noun without one.
_UNSPACED = frozenset({"CJK", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"})
_OPEN_AT_THE_END = _UNSPACED | {"HANGUL"}


def variants(term: str) -> list[str]:
    """The spellings of `term` that are tokens of their own, the listed one first.

    Each is taken with and without a leading space. A cased term also counts with its first letter
    capitalised and, if it was listed with capitals, in lower case. A term listed in capitals is
    taken as it is: in lower case `AIDS` and `ALL` are other words.

    >>> variants("angina"), variants("ICU")
    (['angina', ' angina', 'Angina', ' Angina'], ['ICU', ' ICU'])
    """
    forms = [term]
    capitals = len(term) > 1 and term.isupper()
    if not capitals:
        forms += [term[:1].upper() + term[1:], term.lower()]
    return [space + form for form in dict.fromkeys(forms) for space in ("", " ")]


def count_occurrences(spellings: Iterable[str], chunks: Mapping[str, int]) -> dict[str, int]:
    """How often each spelling stands in the text, nested and overlapping ones counted each.

    Scripts with spaces: the term must be a whole word, that is no mark and no letter of the same
    script may touch it (`angina` is not counted in `anginal`, but in `angina患者`). Scripts without
    spaces: it is counted wherever it stands, since nothing marks the ends of words; in Korean,
    wherever a word begins with it. The ends of a chunk are ends of words. After a space, the
    spelling with the leading space is counted instead of the one without, if both are asked for.
    A spelling of several words is never found: no token spans them.

    Args:
        spellings: what to look for.
        chunks: short stretch of text -> how often it occurs.

    >>> count_occurrences([" angina", "动脉"], {" angina": 3, " anginal": 9, "冠状动脉": 2})
    {' angina': 3, '动脉': 2}
    """
    counts = dict.fromkeys(spellings, 0)
    bounded = {
        spelling: (script_of(body[0]) not in _UNSPACED, script_of(body[-1]) not in _OPEN_AT_THE_END)
        for spelling in counts
        if (body := spelling.removeprefix(" ")) and not any(map(str.isspace, body))
    }
    lengths: dict[str, list[int]] = defaultdict(list)
    for prefix, length in sorted({(spelling[:2], len(spelling)) for spelling in bounded}):
        lengths[prefix].append(length)
    singles = frozenset(prefix for prefix in lengths if len(prefix) == 1)
    for chunk, weight in chunks.items():
        for start, end in _candidates(chunk, lengths, singles):
            if chunk[start:end] in bounded and _stands(chunk, start, end, bounded):
                counts[chunk[start:end]] += weight
    return counts


def _candidates(
    chunk: str, lengths: Mapping[str, Sequence[int]], singles: frozenset[str]
) -> Iterator[tuple[int, int]]:
    """Where a spelling may stand, by its first two characters; `singles` have but one."""
    # Nearly all places hold nothing: this line decides how fast the scan is.
    for start in [at for at in range(len(chunk) - 1) if chunk[at : at + 2] in lengths]:
        for length in lengths[chunk[start : start + 2]]:
            if start + length <= len(chunk):
                yield start, start + length
    if singles and not singles.isdisjoint(chunk):
        for start, character in enumerate(chunk):
            if character in singles:
                yield start, start + 1


def _stands(chunk: str, start: int, end: int, bounded: Mapping[str, tuple[bool, bool]]) -> bool:
    """True if the spelling at `start` to `end` is a whole word there, and its longest spelling."""
    found = chunk[start:end]
    at_start, at_end = bounded[found]
    if start and chunk[start - 1] == " " and " " + found in bounded:
        return False
    if at_start and start and found[0] != " " and _continues(found[0], chunk[start - 1]):
        return False
    return not (at_end and end < len(chunk) and _continues(found[-1], chunk[end]))


@lru_cache(maxsize=2**16)
def _continues(inside: str, outside: str) -> bool:
    """True if `outside` belongs to the word that `inside` begins or ends."""
    script = script_of(outside)
    return script == "" or (script is not None and script == script_of(inside))


def reasons(
    spelling: str,
    *,
    occurrences: int,
    least: int,
    pieces: Callable[[str], Sequence[int]],
    splits: Callable[[str], bool],
) -> str | None:
    """Why `spelling` cannot or need not become a token; None if nothing speaks against it.

    What stands before a colon is the kind of reason, the same for all spellings that share it.

    Args:
        spelling: one of `variants(term)`.
        occurrences: how often it occurs.
        least: how often a token must occur.
        pieces: text -> ids of the base tokens that spell it.
        splits: text -> whether the base's pre-tokenizer splits it.
    """
    body = spelling.removeprefix(" ")
    reason = _unfit(body)
    if reason is None and splits(spelling):
        reason = "crosses a split of the pre-tokenizer"
    if reason is None and len(pieces(spelling)) == 1:
        reason = "is one token already"
    if reason is None and occurrences < least:
        times = "time" if occurrences == 1 else "times"
        reason = f"too rare: occurs {occurrences:,} {times}, fewer than {least:,}"
    return reason


def _unfit(body: str) -> str | None:
    """What in the text itself forbids that it becomes a token."""
    if any(map(str.isspace, body)):
        return "crosses a split of the pre-tokenizer: several words"
    if any(unicodedata.category(character)[0] == "N" for character in body):
        return "contains a digit"
    other = next((character for character in body if script_of(character) is None), None)
    if other is not None:
        return f"contains what is no letter: {other}"
    if len(body) > MAX_CHARACTERS:
        return f"is more than {MAX_CHARACTERS} characters: {len(body)}"
    if len({script_of(character) for character in body} - {""}) > 1:
        return "mixed scripts"
    return None


@dataclass(frozen=True)
class TermReport:
    """What became of one spelling of one term.

    Attributes:
        term: as listed.
        variant: the spelling.
        occurrences: how often it stands in the text.
        reached: how many of these the new token covers.
        token_id: the new token's, or the base's where it was one token already.
        reason: why there is no new token; None where there is one.
    """

    term: str
    variant: str
    occurrences: int
    reached: int = 0
    token_id: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class TermTable:
    """What became of every listed term."""

    rows: Sequence[TermReport]

    def best(self) -> list[TermReport]:
        """One row per term: a new token if it has one, else its most frequent spelling."""
        chosen: dict[str, TermReport] = {}
        for row in self.rows:
            other = chosen.get(row.term)
            if other is None or _standing(row) > _standing(other):
                chosen[row.term] = row
        return list(chosen.values())

    def lines(self, top: int = 10) -> list[str]:
        """Totals, the terms that occur most, and how many fail for which reason."""
        best = self.best()
        made = [row for row in self.rows if row.reason is None]
        owners = sum(row.reason is None for row in best)
        total = sum(row.occurrences for row in made)
        reached = sum(row.reached for row in made)
        share = f", {reached / total:.1%} of their {total:,} occurrences reached" if total else ""
        lines = [
            f"terms: {len(best):,} listed; {owners:,} became tokens in {len(made):,} spellings"
            f"{share}"
        ]
        kinds = Counter(_kind(row.reason) for row in best if row.reason is not None)
        lines += [f"  {count:,}: {kind}" for kind, count in kinds.most_common()]
        strongest = sorted(best, key=lambda row: (-row.occurrences, row.term))[:top]
        lines += [f"  {row.variant!r}: {_fate(row)}" for row in strongest]
        if len(best) > top:
            lines.append(f"  ... and {len(best) - top:,} more terms")
        return lines

    def to_json(self) -> dict[str, Any]:
        """All rows, and the totals per kind of reason."""
        best = self.best()
        made = [row for row in self.rows if row.reason is None]
        return {
            "listed": len(best),
            "became_tokens": sum(row.reason is None for row in best),
            "spellings": len(made),
            "occurrences": sum(row.occurrences for row in made),
            "reached": sum(row.reached for row in made),
            "reasons": dict(Counter(_kind(row.reason) for row in best if row.reason is not None)),
            "rows": [vars(row) for row in self.rows],
        }


def _standing(row: TermReport) -> tuple[bool, int]:
    return row.reason is None, row.occurrences


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def _fate(row: TermReport) -> str:
    if row.reason is not None:
        return f"{row.occurrences:,} occurrences; {row.reason}"
    share = f" ({row.reached / row.occurrences:.1%})" if row.occurrences else ""
    return f"token {row.token_id}; {row.reached:,} of {row.occurrences:,} occurrences{share}"


def plan(
    spellings: Sequence[tuple[Symbols, float]],
    budget: int,
    known: Callable[[Symbols], bool] = lambda _: False,
    *,
    allowed: Callable[[Symbols], bool] = lambda _: True,
) -> list[tuple[Symbols, Symbols, Symbols]]:
    """Ranked merges that make each spelling one symbol, the strongest first, with few bridges.

    Spellings are taken by falling strength, so that where two overlap in running text the stronger
    one's merges rank first. Each is read as the merges so far would leave it, and what is left is
    joined along the binary tree that needs the fewest new bridges (dynamic programming over its
    spans). A part that is itself asked for is joined first and costs nothing; a
    bridge that n spellings could use costs 1/n; of equal trees the one whose left parts are longest
    is taken. A spelling that needs more tokens than are left is passed over.

    Each spelling whose merges were returned is one symbol when the merges run in rank order over it
    alone: what comes later never undoes what came before. Running text may still differ, where
    symbols around the spelling are joined into it.

    Args:
        spellings: symbols of the base -> strength, for instance the tokens that it saves.
        budget: the most new tokens.
        known: whether a sequence of symbols is made one by merges that rank earlier.
        allowed: whether a sequence of symbols may be one token.

    Returns:
        (whole, left, right) of each merge, in rank order, as sequences of base symbols.
    """
    return _Planner(spellings, known, allowed).run(budget)


class _Planner:
    """Parts are sequences of base symbols; a spelling's state is the list of parts it is now."""

    def __init__(
        self,
        spellings: Sequence[tuple[Symbols, float]],
        known: Callable[[Symbols], bool],
        allowed: Callable[[Symbols], bool],
    ) -> None:
        strengths: dict[Symbols, float] = defaultdict(float)
        for symbols, strength in spellings:
            strengths[symbols] += strength
        self.allowed = lru_cache(maxsize=None)(allowed)
        self.start = {symbols: _known_parts(symbols, known) for symbols in strengths if symbols}
        self.wanted = {symbols for symbols, parts in self.start.items() if len(parts) > 1}
        self.order = sorted(self.wanted, key=lambda s: (-strengths[s], len(s), s))
        self.uses = self._count_uses()
        self.ranks: dict[tuple[Symbols, Symbols], int] = {}
        self.made: set[Symbols] = set()

    def run(self, budget: int) -> list[tuple[Symbols, Symbols, Symbols]]:
        for symbols in self.order:
            self._make(symbols, budget)
        return [(left + right, left, right) for left, right in self.ranks]

    def _count_uses(self) -> Counter[Symbols]:
        """In how many spellings each span of two or more parts stands."""
        uses: Counter[Symbols] = Counter()
        for symbols in self.order:
            uses.update({span for span, _, _ in _spans(self.start[symbols])})
        return uses

    def _make(self, symbols: Symbols, budget: int) -> None:
        """Append the merges that make `symbols` one part, if the budget allows them."""
        if symbols in self.made:
            return
        for part in self._asked_parts(self._state(symbols)):
            self._make(part, budget)
        state = self._state(symbols)
        merges: list[tuple[Symbols, Symbols]] = []
        while len(state) > 1:
            pair = self._next_pair(state)
            if pair is None or len(self.ranks) + len(merges) >= budget:
                return
            merges.append(pair)
            state = _joined(state, pair)
        for left, right in merges:
            self.ranks[left, right] = len(self.ranks)
            self.made.add(left + right)

    def _state(self, symbols: Symbols) -> list[Symbols]:
        """`symbols` as the merges so far leave them: lowest rank first, as BPE engines do."""
        state = self.start[symbols]
        while len(state) > 1:
            pair = min(pairwise(state), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            state = _joined(state, pair)
        return state

    def _asked_parts(self, state: Sequence[Symbols]) -> list[Symbols]:
        """Proper parts of a spelling that are asked for and not made, longest first, disjoint."""
        spans = sorted(
            (
                (end - start, start, span)
                for span, start, end in _spans(state)
                if end - start < len(state) and span in self.wanted and span not in self.made
            ),
            key=lambda found: (-found[0], found[1]),
        )
        taken: set[int] = set()
        parts = []
        for length, start, span in spans:
            places = range(start, start + length)
            if taken.isdisjoint(places):
                taken.update(places)
                parts.append(span)
        return parts

    def _next_pair(self, state: Sequence[Symbols]) -> tuple[Symbols, Symbols] | None:
        """The first merge of the cheapest tree over `state`; None where no tree is allowed."""
        size = len(state)
        if size == 2:
            return (state[0], state[1]) if self._price(state[0] + state[1]) is not None else None
        cost: dict[tuple[int, int], float] = {(at, at + 1): 0.0 for at in range(size)}
        cut: dict[tuple[int, int], int] = {}
        for span, start, end in _spans(state):
            price = self._price(span)
            if price is None:
                continue
            best: tuple[float, int] | None = None
            for middle in range(start + 1, end):
                left, right = cost.get((start, middle)), cost.get((middle, end))
                if left is not None and right is not None:
                    candidate = (left + right + price, -middle)
                    best = candidate if best is None else min(best, candidate)
            if best is not None:
                cost[start, end], cut[start, end] = best[0], -best[1]
        if (0, size) not in cut:
            return None
        start, end = 0, size
        while end - start > 2:
            middle = cut[start, end]
            start, end = (start, middle) if middle - start > 1 else (middle, end)
        return state[start], state[start + 1]

    def _price(self, span: Symbols) -> float | None:
        """What one more token costs: near 1 for a bridge, less if others can use it."""
        if span in self.made or not self.allowed(span):
            return None  # a token has one pair of parts
        if span in self.wanted:
            return 0.0
        return 1.0 / self.uses[span]


def _spans(parts: Sequence[Symbols]) -> Iterator[tuple[Symbols, int, int]]:
    """Every run of two or more parts with its start and end, short ones first."""
    for length in range(2, len(parts) + 1):
        for start in range(len(parts) - length + 1):
            yield sum(parts[start : start + length], ()), start, start + length


def _joined(state: Sequence[Symbols], pair: tuple[Symbols, Symbols]) -> list[Symbols]:
    """`state` with each occurrence of `pair` joined, from the left."""
    left, right = pair
    joined: list[Symbols] = []
    at = 0
    while at < len(state):
        if at + 1 < len(state) and state[at] == left and state[at + 1] == right:
            joined.append(left + right)
            at += 2
        else:
            joined.append(state[at])
            at += 1
    return joined


def _known_parts(symbols: Symbols, known: Callable[[Symbols], bool]) -> list[Symbols]:
    """`symbols` as their longest known parts from the left, single symbols between them."""
    parts: list[Symbols] = []
    start = 0
    while start < len(symbols):
        end = len(symbols)
        while end > start + 1 and not known(symbols[start:end]):
            end -= 1
        parts.append(symbols[start:end])
        start = end
    return parts
