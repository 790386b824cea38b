"""Terms and pinned words of the user's lists as merges of a tokenizer family, made first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
                reason = "not reached: stronger terms or other words take its parts"
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
    owner = {v: word for word in [*pinned, *weights] for v in variants(word)}
    occurrences = count_occurrences(owner, chunks)
    tried = {v for v in owner if occurrences[v] or owner[v] in pinned}
    spelled = _units_of(family, tried)
    reports: list[TermReport] = []
    strengths: dict[str, float] = {}
    for variant, word in owner.items():
        count = occurrences[variant]
        must = word in pinned and (count > 0 or variant == word)
        if not count and variant != word and not must:
            continue  # a spelling that nobody used needs no line
        reason = reasons(
            variant,
            occurrences=count,
            least=0 if must else min_count,
            pieces=lambda text: _pieces(family, text),
            splits=lambda text: text in tried and text not in spelled and _is_spelled(family, text),
        )
        if reason is None and variant not in spelled:
            reason = "the base reads it as one token in running text"
        if reason is None:
            saved = count * (len(spelled[variant]) - 1)
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


_NO_ROOM = "no room: more tokens than asked for, or its parts may not be joined"


def _is_spelled(family: Family, text: str) -> bool:
    return len(_pieces(family, text)) > 1


def _pieces(family: Family, text: str) -> Sequence[int]:
    return family.pieces(family.written(text)[0])


def _units_of(family: Family, spellings: Iterable[str]) -> dict[str, Unit]:
    """Each spelling as the base reads it, where it is one unit whole."""
    wanted = sorted(spellings)
    units = family.count_units(dict.fromkeys(wanted, 1)).to_tuples()
    by_text = {_text_of(family, unit): unit for unit in units}
    found = {}
    for spelling in wanted:
        # A family that knows no spaces (WordPiece) reads both spellings alike.
        unit = by_text.get(spelling) or by_text.get(spelling.lstrip(" "))
        same = family.written(spelling) == family.written(spelling.lstrip(" "))
        if unit is not None and (spelling in by_text or same):
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
    """The planned merges, and the token that each spelling becomes."""
    symbols = sorted({token for variant in strengths for token in spelled[variant]})
    numbers = {token: number for number, token in enumerate(symbols)}
    letters = [token for token in symbols if token not in family.map.ids]
    rows = {v: tuple(numbers[token] for token in spelled[v]) for v in strengths}

    def allowed(row: Symbols) -> bool:
        *parts, last = (symbols[number] for number in row)
        left = reduce(lambda one, other: family.join(one, other) or one + other, parts)
        token = family.join(left, last)
        return token is not None and not banned(token)

    planned = plan(
        [(rows[v], strengths[v]) for v in sorted(strengths)],
        max(0, limit - len(letters)),
        allowed=allowed,
    )
    made: dict[Symbols, str] = {(number,): token for number, token in enumerate(symbols)}
    merges = [Merge(letter, letter, None, 0) for letter in letters]
    for whole, left, right in planned:
        if left not in made or right not in made:
            continue
        token = family.join(made[left], made[right])
        if token is not None:
            made[whole] = token
            merges.append(Merge(token, made[left], made[right], 0))
    joined = "".join(merge.token for merge in merges if merge.right is not None)
    merges = [m for m in merges if m.right is not None or m.token in joined]
    tokens = {v: made[row] for v, row in rows.items() if len(row) > 1 and row in made}
    return merges, tokens
