"""One learning run: lists and texts in, the tokens to add out; nothing is written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lexigraft.console import note, working
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, measure
from lexigraft.families.choice import Choice, Judge, choose
from lexigraft.families.units import Units
from lexigraft.manifest import NEW_TOKENS, LearnRecord, Manifest
from lexigraft.selection.gathering import gather, units_of_texts
from lexigraft.selection.judges import Contrast, check_text_judge
from lexigraft.selection.lists import Term, read_special, read_words
from lexigraft.selection.sizing import ModelSize, Size, choose_size
from lexigraft.selection.terms import variants
from lexigraft.selection.wanted import Wanted, want

# "Drop a new token with fewer than 100 emissions in the training stream, hard floor 20": the rows
# of rarer tokens did not catch up in any experiment we know of (docs/methods.md).
SUPPORT = 100
FLOOR = 20
MEASURED_BYTES = 4_000_000  # of held-out and of general text


@dataclass(frozen=True)
class Lists:
    """The user's lists: terms, pinned and banned words, new special tokens."""

    terms: list[Term]
    pins: list[Term]
    bans: list[Term]
    special: list[str]

    def banned(self, family: Family) -> Callable[[str], bool]:
        """Whether a token (as in the files) is a banned word in any spelling, or special."""
        tokens = {
            token for term in self.bans for v in variants(term.text) for token in family.written(v)
        }
        return (tokens | set(self.special)).__contains__

    def refuse_contradictions(self) -> None:
        """A word cannot be pinned and banned, nor be pinned and special."""
        banned = {variant: term.text for term in self.bans for variant in variants(term.text)}
        for term in self.pins:
            where = "--ban" if term.text in banned else "--special"
            if term.text in banned or term.text in self.special:
                raise LexigraftError(
                    f"{term.text!r} is pinned, and {where} has it too",
                    needed="each word in one of these lists",
                    fix=f"take {banned.get(term.text, term.text)!r} out of --pin or {where}",
                )

    def refuse_clashes(self, choice: Choice) -> None:
        """A special token cannot be a learned token of an earlier result."""
        for token in sorted({merge.token for merge in choice.merges}.intersection(self.special)):
            raise LexigraftError(
                f"--special {token!r} is a token that was learned",
                needed="another text for it: one text has one id",
                fix=f"leave {token!r} out of --special, or learn again with it",
            )


def read_lists(specs: Sequence[str | Path]) -> list[Term]:
    """The words of some lists, each once; what was dropped or changed is said."""
    words: dict[str, Term] = {}
    for spec in specs:
        found = read_words(spec)
        note(found.summary())
        for word in found.words:
            words.setdefault(word.text, word)
    return list(words.values())


def read_special_tokens(family: Family, specs: Sequence[str | Path]) -> list[str]:
    """The new special tokens of some lists, those that the base has left out."""
    found: dict[str, None] = {}
    for spec in specs:
        listed = read_special(spec, family.map.ids.keys())
        note(listed.summary())
        found.update(dict.fromkeys(word.text for word in listed.words))
    return list(found)


@dataclass(frozen=True)
class Picked:
    """The tokens to add, and what is known of them before anything is written."""

    choice: Choice
    least: int
    wanted: Wanted
    held_out: list[str]
    size: Size | None = None
    contrast: Contrast | None = None
    stretches: Units | None = None
    addresses: int = 0
    chunks: Mapping[str, int] = field(default_factory=dict)


class Learning:
    """One learning run: from a corpus to the chosen tokens."""

    def __init__(
        self,
        family: Family,
        corpus: Sequence[str | Path],
        contrast: Sequence[str | Path],
        lists: Lists,
        *,
        tokens: int | str,
        limit: int,
        min_count: int | None,
        train_bytes: int | None,
        model: ModelSize | None,
        check_text: bool,
        engine: str,
        workers: int | None,
    ) -> None:
        self.family = family
        self.lists = lists
        self.tokens = tokens
        self.limit = limit
        self.train_bytes = train_bytes
        self.model = model
        self.text = gather(
            family, corpus, measured=MEASURED_BYTES, special=lists.special, engine=engine,
            workers=workers,
        )  # fmt: skip
        self.contrast = self._contrast(contrast, engine, workers)
        self.least = min_count or _default_min_count(tokens, self.text.bytes, train_bytes)
        self.check_text = check_text

    def _contrast(
        self, specs: Sequence[str | Path], engine: str, workers: int | None
    ) -> Contrast | None:
        if not specs:
            return None
        other = gather(
            self.family, specs, measured=0, special=self.lists.special, engine=engine,
            workers=workers,
        )  # fmt: skip
        return Contrast(self.family, self.text.units, other.units)

    @working("choosing words")
    def choose(self) -> Picked:
        """The tokens to add, and how many of them are worth it."""
        family, text = self.family, self.text
        banned = self.lists.banned(family)
        # Counts are of a sample where the corpus is large: so is what is asked of them.
        least = max(1, math.ceil(self.least * text.counted.share))
        wanted = want(
            family, text.chunks, terms=self.lists.terms, pins=self.lists.pins, min_count=least,
            limit=self.limit, banned=banned,
        )  # fmt: skip
        asked = frozenset(wanted.tokens.values())
        judges = self._judges()
        if self.contrast is not None:
            self.contrast.asked = asked

        def chosen(limit: int) -> Choice:
            return choose(
                family, text.units, limit=limit, min_count=least, first=wanted.merges,
                asked=asked, pinned=wanted.pinned, banned=banned, judges=judges,
                refuse=self.contrast.refuse if self.contrast else None,
                budget=limit if self.contrast and self.tokens != "auto" else None,
            )  # fmt: skip

        choice = chosen(self.limit)
        _say_if_short(
            self.tokens, self.limit, self.least, choice, contrast=self.contrast is not None
        )
        size = self._size(choice)
        if size is not None and size.k < len(choice.merges):
            choice = chosen(size.k)
            size = replace(self._size(choice) or size, because=size.because)
        times = round(1 / text.counted.share)  # a share is 1, 1/2, 1/4 ...
        if times > 1:
            counts = {token: count * times for token, count in choice.counts.items()}
            choice = replace(choice, counts=counts, saved=choice.saved * times)
        return Picked(
            choice, self.least, wanted, text.counted.held_out, size, self.contrast, text.units,
            text.addresses, text.chunks,
        )  # fmt: skip

    def _judges(self) -> list[Judge]:
        judges: list[Judge] = []
        if self.check_text and self.family.guaranteed:
            judges.append(check_text_judge(self.family))
        breakers = getattr(self.family, "breakers", None)
        if breakers is not None:
            stretches = ["".join(unit) for unit in self.text.units.to_tuples()]
            judges.append(lambda kept, _: set(breakers(kept, stretches)))
        return judges

    @cached_property
    def _measured(self) -> tuple[Units, int, int]:
        """Units, base tokens and bytes of the text to measure on: held out, if there is any."""
        text, held = self.text, self.text.counted.held_out
        if not held:
            return text.units, text.units.total, max(1, round(text.bytes * text.counted.share))
        tokens = sum(map(len, self.family.encode_batch(held)))
        size = sum(len(document.encode()) for document in held)
        return units_of_texts(self.family, held), tokens, size

    def _size(self, choice: Choice) -> Size | None:
        """How many of the chosen tokens are worth it."""
        text = self.text
        if not choice.merges:
            return None
        measured, tokens, size = self._measured
        saved = self.family.replay(measured, choice.merges).saved
        return choose_size(
            saved, base_tokens=max(tokens, int(saved.sum()) + 1), text_bytes=size,
            vocabulary=self.family.map.tokens,
            requested=None if self.tokens == "auto" else self.limit,
            model=self.model,
            counts=[choice.counts[merge.token] for merge in choice.merges],
            counted_bytes=max(1, round(text.bytes * text.counted.share)),
            train_bytes=self.train_bytes or text.bytes,
        )  # fmt: skip


def cut_earlier(family: Family, vocab: Path, size: int | None) -> Picked:
    """The first tokens of an earlier result."""
    record = _earlier_record(family, vocab)
    rows = measure.read_rows(vocab / NEW_TOKENS, record.new_ids)
    if size is not None and size > len(rows):
        raise LexigraftError(
            f"{vocab} has {len(rows):,} new tokens, --tokens asks for {size:,}",
            needed=f"at most {len(rows):,}",
            fix="learn from the corpus again for more",
        )
    if record.added > len(rows):
        note(
            f"{vocab} has {record.added - len(rows):,} special tokens behind its words: name them "
            "with --special to have them again"
        )
    merges, counts = measure.cut(rows, len(rows) if size is None else size)
    saved = np.array([merge.occurrences for merge in merges], dtype=np.int64)
    asked = {row["token"]: row["token"] for row in rows[: len(merges)] if row["origin"] == "term"}
    least = record.settings.get("least") or FLOOR
    wanted = Wanted(tokens=asked)
    return Picked(Choice(merges, counts, saved), least, wanted, [])


def _earlier_record(family: Family, vocab: Path) -> LearnRecord:
    manifest = Manifest.read(vocab)
    record: LearnRecord | None = manifest.last("learn") if manifest else None
    if record is None or not (vocab / NEW_TOKENS).is_file():
        raise LexigraftError(
            f"{vocab} is no result of learn",
            needed=f"a folder with lexigraft.json and {NEW_TOKENS}",
            fix="--from VOCAB, the folder that learn wrote",
        )
    if record.replaced:
        raise LexigraftError(
            f"{vocab} has the ids of old tokens (--replace)",
            needed="a result in which all new tokens come behind the old ones",
            fix="learn again, with a smaller --replace",
        )
    if record.base.token_map != family.map.hash:
        raise LexigraftError(
            f"{vocab} extends another base ({record.base.name}, {record.base.tokens:,} tokens)",
            needed=f"an extension of {family.folder} ({family.map.tokens:,} tokens)",
            fix=f"name the base that {vocab} was learned for",
        )
    return record


def _default_min_count(tokens: int | str, corpus_bytes: int, train_bytes: int | None) -> int:
    """Occurrences in the corpus that give `SUPPORT` (or `FLOOR`) in the training text."""
    target = SUPPORT if tokens == "auto" else FLOOR
    return max(1, math.ceil(target * corpus_bytes / (train_bytes or corpus_bytes or 1)))


def _say_if_short(
    tokens: int | str, limit: int, least: int, choice: Choice, *, contrast: bool
) -> None:
    added = len(choice.merges)
    if not limit:
        return
    how = "that occur" if not contrast else "of the field (beside --contrast) that occur"
    if tokens != "auto" and added < limit:
        note(
            f"asked for {limit:,} tokens, the corpus supports {added:,} {how} at least "
            f"{least:,} times; taking those (lower --min-count or add text for more)"
        )
    elif not added:
        note(
            f"no sequence {'of the field ' if contrast else ''}occurs {least:,} times in the "
            "corpus: 0 new tokens (lower --min-count or add text)"
        )
