"""Terms and pinned words of the user's lists as merges of a tokenizer family, made first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

from lexigraft.families import Family
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.units import Unit
from lexigraft.selection.lists import Term
from lexigraft.selection.terms import (
    Symbols,
    TermReport,
    TermTable,
    count_occurrences,
    plan,
    reasons,
    variants,
)

_PIN_STRENGTH = 1e30  # before every term


@dataclass(frozen=True)
class Wanted:
    """What the lists ask for, as merges.

    Attributes:
        merges: in rank order, bridges included.
        tokens: spelling -> the token (as in the files) that it becomes.
        pinned: tokens that are kept however rare they are.
        reports: what is known of every spelling so far.
    """

    merges: list[Merge] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    reports: list[TermReport] = field(default_factory=list)

    def table(self, formed: Mapping[str, int], ids: Mapping[str, int]) -> TermTable:
        """What became of each spelling.

        Args:
            formed: new token -> how often its letters are joined to it, also where it is then
                a part of a longer new token.
            ids: new token -> id.
        """
        rows = []
        for row in self.reports:
            token = self.tokens.get(row.variant)
            if row.reason is not None or token is None:
                rows.append(row)
            elif token in ids:
                reached = min(formed[token], row.occurrences)
                rows.append(TermReport(row.term, row.variant, row.occurrences, reached, ids[token]))
            else:
                reason = (
                    "dropped: stronger terms or other words take its parts, or it would take too "
                    "many tokens that come out nowhere"
                )
                rows.append(TermReport(row.term, row.variant, row.occurrences, reason=reason))
        return TermTable(rows)


def want(
    family: Family,
    chunks: Mapping[str, int],
    *,
    terms: Sequence[Term],
    pins: Sequence[Term],
    min_count: int,
    limit: int,
    banned: Callable[[str], bool],
) -> Wanted:
    """Plan the merges that make listed words tokens.

    Args:
        family: the base.
        chunks: counted stretches of the learning text.
        terms: words that come first where they occur `min_count` times.
        pins: words that become tokens however rare they are.
        min_count: occurrences that a term needs.
        limit: the most new tokens.
        banned: token -> whether it may not be made.
    """
    if not terms and not pins:
        return Wanted()
    weights = {term.text: term.weight for term in terms}
    pinned = {term.text for term in pins}
    owner, occurrences = _counted(family, [term.text for term in (*pins, *terms)], chunks)
    tried = {v for v in occurrences if occurrences[v] or owner[v] in pinned}
    spelled = _units_of(family, tried)
    reports: list[TermReport] = []
    strengths: dict[str, float] = {}
    for variant, count in occurrences.items():
        word = owner[variant]
        must = word in pinned and (count > 0 or variant == word)
        if not count and variant != word and not must:
            continue  # a spelling that nobody used needs no line
        reason = reasons(
            variant,
            occurrences=count,
            least=0 if must else min_count,
            pieces=lambda text: _known_pieces(family, text),
            splits=lambda text: text in tried and text not in spelled and _is_spelled(family, text),
        )
        if reason is None and any(map(banned, family.written(variant))):
            reason = "is banned"
        if reason is None and variant not in spelled:
            reason = "the base reads it as one token in running text"
        if reason is None:
            saved = count * max(1, len(spelled[variant]) - 1)  # at least one, of a letter
            strengths[variant] = _PIN_STRENGTH if must else saved * weights[word]
        reports.append(TermReport(word, variant, count, reason=reason))
    merges, tokens = _merges(family, spelled, strengths, limit, banned)
    reports = [
        row
        if row.reason is not None or row.variant in tokens
        else TermReport(row.term, row.variant, row.occurrences, reason=_NO_ROOM)
        for row in reports
    ]
    kept = frozenset(tokens[v] for v in tokens if owner[v] in pinned)
    return Wanted(merges, tokens, kept, reports)


def _counted(
    family: Family, words: Sequence[str], chunks: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, int]]:
    """The listed word of each spelling, and the occurrences of each that is a token of its own.

    A spelling belongs to the word that is listed so, else to the first that has it. Those which the
    family writes alike (without spaces, without capitals) are counted as one, the first of them.
    """
    owner = {word: word for word in words}
    for word in words:
        for variant in variants(word):
            owner.setdefault(variant, word)
    alike: dict[str, list[str]] = {}
    for word in dict.fromkeys(words):
        for variant in variants(word):
            if owner[variant] == word:
                alike.setdefault(family.written(variant)[0], []).append(variant)
    counts = count_occurrences(owner, chunks)
    return owner, {same[0]: sum(counts[v] for v in same) for same in alike.values()}


_NO_ROOM = "no room: more tokens than asked for, or its parts may not be joined"


def _is_spelled(family: Family, text: str) -> bool:
    return len(_pieces(family, text)) > 1


def _pieces(family: Family, text: str) -> Sequence[int]:
    return family.pieces(family.written(text)[0])


def _known_pieces(family: Family, text: str) -> Sequence[int]:
    """The pieces of `text`; none where the base cannot spell it whole."""
    pieces = _pieces(family, text)
    return () if family.unknown_id in pieces else pieces


def _units_of(family: Family, spellings: Iterable[str]) -> dict[str, Unit]:
    """Each spelling as the base reads it, where it is one unit whole."""
    wanted = sorted(spellings)
    units = family.count_units(dict.fromkeys(wanted, 1)).to_tuples()
    by_text = {_text_of(family, unit): unit for unit in units}
    found = {}
    for spelling in wanted:
        written = family.written(spelling)[0]
        # A family that knows no spaces (WordPiece) may not know capitals either.
        spaceless = written == family.written(f" {spelling}")[0]
        unit = by_text.get(written if spaceless else spelling)
        if unit is not None:
            found[spelling] = unit
    return found


def _text_of(family: Family, unit: Unit) -> str:
    ids = family.map.ids
    data = b"".join(
        family.token_bytes(ids[token]) if token in ids else token.encode() for token in unit
    )
    return data.decode("utf-8", "replace")


def _merges(
    family: Family,
    spelled: Mapping[str, Unit],
    strengths: Mapping[str, float],
    limit: int,
    banned: Callable[[str], bool],
) -> tuple[list[Merge], dict[str, str]]:
    """The planned merges, and the token that each spelling becomes.

    Letters that must be adopted count too: of a list that is too long the strongest terms are made
    whole, each after its letters.
    """
    symbols = sorted({token for variant in strengths for token in spelled[variant]})
    numbers = {token: number for number, token in enumerate(symbols)}
    rows = {v: tuple(numbers[token] for token in spelled[v]) for v in strengths}

    def allowed(row: Symbols) -> bool:
        *parts, last = (symbols[number] for number in row)
        left = reduce(lambda one, other: family.join(one, other) or one + other, parts)
        token = family.join(left, last)
        return token is not None and not banned(token)

    planned = plan([(rows[v], strengths[v]) for v in sorted(strengths)], limit, allowed=allowed)
    made: dict[Symbols, str] = {(n,): t for t, n in numbers.items() if t in family.map.ids}
    merges: list[Merge] = []
    for steps, whole in _by_term(planned, {rows[v]: strengths[v] for v in strengths}):
        letters = [symbols[n] for n in dict.fromkeys(whole) if (n,) not in made]
        if len(merges) + len(letters) + len(steps) > limit:
            continue
        made.update({(numbers[letter],): letter for letter in letters})
        merges += [Merge(letter, letter, None, 0) for letter in letters]
        for joined, left, right in steps:
            token = family.join(made[left], made[right]) if {left, right} <= made.keys() else None
            if token is not None:
                made[joined] = token
                merges.append(Merge(token, made[left], made[right], 0))
    tokens = {v: made[row] for v, row in rows.items() if row in made}
    return merges, tokens


def _by_term(
    planned: Iterable[tuple[Symbols, Symbols, Symbols]], strengths: Mapping[Symbols, float]
) -> Iterator[tuple[list[tuple[Symbols, Symbols, Symbols]], Symbols]]:
    """The merges that finish each asked-for row, with it; rows of one letter need none."""
    letters = sorted((-strength, row) for row, strength in strengths.items() if len(row) == 1)
    steps: list[tuple[Symbols, Symbols, Symbols]] = []
    for step in planned:
        steps.append(step)
        whole = step[0]
        if whole in strengths:
            while letters and -letters[0][0] >= strengths[whole]:
                yield [], letters.pop(0)[1]
            yield steps, whole
            steps = []
    yield from (([], row) for _, row in letters)
