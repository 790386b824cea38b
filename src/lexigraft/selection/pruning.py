"""Which tokens a model can do without: chosen leaf by leaf, and proved on texts.

Method: leaf-frequency pruning. Tokens that no other token needs are the leaves; the least useful
leaf goes, its occurrences fall to its parts, which may become leaves. So no part of a kept token
ever goes. What a token needs is what it is really joined of (`Family.needs`), so that other ways
to make it, which never come true, keep nothing.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lexigraft.console import working
from lexigraft.corpus import read_documents
from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.proof import HARD_TEXTS, proof_texts, unreachable
from lexigraft.families.tokenmap import readable
from lexigraft.files import read_settings

Counts = npt.NDArray[np.int64]
REASONS = ("unreachable", "untrained", "listed", "script", "rare")
_TURN = (0, 1, 2, 2, 3)  # of each reason: a list and a script are asked for alike
_BATCH = 256
_ROLES = ("system", "user", "assistant", "tool", "model", "developer", "ipython")
# First words of letters' Unicode names that are no script.
_NO_SCRIPT = frozenset(
    ("MODIFIER", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MICRO", "OHM",
     "KELVIN", "ANGSTROM", "FEMININE", "MASCULINE", "COMBINING", "VARIATION", "TURNED", "SQUARED",
     "CIRCLED", "PARENTHESIZED", "MUSICAL")
)  # fmt: skip
_NAMES = {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "KATAKANA-HIRAGANA": "KATAKANA"}


@dataclass(frozen=True)
class Pruning:
    """What goes.

    Attributes:
        dropped: id -> why, one of `REASONS`, in the order in which they went.
        kept_back: how many of the tokens that were asked for stay, because others need them, the
            corpus uses them, or a rule of the tokenizer does.
    """

    dropped: dict[int, str]
    kept_back: int


@working("choosing tokens to drop")
def choose(
    family: Family,
    *,
    protected: Collection[int] = (),
    counts: Counts | None = None,
    min_count: int = 1,
    untrained: Collection[int] = (),
    scripts: Sequence[str] = (),
    listed: Collection[int] = (),
    most: int | None = None,
) -> Pruning:
    """The tokens that go: unreachable and never-trained ones first, then those that are asked for.

    Args:
        family: the tokenizer.
        protected: ids that stay, beside those that `family.fixed` names.
        counts: id -> occurrences in the text to be kept, shape (tokens,); tokens with `min_count`
            of them stay. With None nothing is known of any text.
        min_count: see `counts`.
        untrained: ids whose rows training never moved.
        scripts: tokens with letters of others go; names as `script_of` gives them.
        listed: ids that are asked for.
        most: how many go at most. With `counts` and `most`, or with `counts` and neither `scripts`
            nor `listed`, every token may go, the rarest first.
    """
    needs = family.needs()
    stay = {*protected, *family.fixed}
    idle = set(unreachable(family, family.map.texts.keys() - stay))
    stay.update(i for i in _singles(family, frozenset(scripts)) if i not in idle)
    every = counts is not None and (most is not None or not (scripts or listed))
    wanted = frozenset(map(str.upper, scripts))
    asked: dict[int, int] = {}
    for token_id in family.map.texts:
        if token_id in stay:
            continue
        if token_id in listed:
            asked[token_id] = 2
        elif wanted and _is_foreign(family.token_bytes(token_id), wanted):
            asked[token_id] = 3
        elif every:
            asked[token_id] = 4
    asked |= dict.fromkeys(set(untrained) & family.map.texts.keys() - stay, 1)
    asked |= dict.fromkeys(idle, 0)
    frequency = Counter[int]()
    if counts is not None:
        frequency.update({int(i): int(counts[i]) for i in np.flatnonzero(counts)})
    users = Counter(part for parts in needs.values() for part in parts)
    heap: list[tuple[int, int, int]] = []

    def offer(token_id: int) -> None:
        free = token_id in asked and not users[token_id]
        if free and (counts is None or frequency[token_id] < min_count):
            heapq.heappush(heap, (_TURN[asked[token_id]], frequency[token_id], -token_id))

    for token_id in asked:
        offer(token_id)
    dropped: dict[int, str] = {}
    while heap and (most is None or len(dropped) < most):
        token_id = -heapq.heappop(heap)[2]
        dropped[token_id] = REASONS[asked[token_id]]
        for part in needs.get(token_id, ()):
            frequency[part] += frequency[token_id]
            users[part] -= 1
            offer(part)
    back = sum(kind in (2, 3) and i not in dropped for i, kind in asked.items())
    return Pruning(dropped, back)


@working("counting tokens")
def count_tokens(family: Family, documents: Iterable[str]) -> Counts:
    """How often each id comes out of some texts: shape (tokens,)."""
    counts = np.zeros(family.map.tokens, np.int64)
    for batch in _batches(family, documents):
        ids = [token_id for one in family.encode_batch(batch) for token_id in one]
        counts += np.bincount(np.array(ids, np.int64), minlength=len(counts))
    return counts


@dataclass(frozen=True)
class Reading:
    """Some texts before and after.

    Attributes:
        bytes: UTF-8 bytes.
        tokens_before: tokens that they had.
        tokens_after: tokens that they have now.
        changed: texts that hold a token that is gone; all others are read as before.
        texts: how many there are.
    """

    bytes: int
    tokens_before: int
    tokens_after: int
    changed: int
    texts: int

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        return dict(self.__dict__)

    def line(self, name: str) -> str:
        """What a person reads."""
        before, after = self.tokens_before / self.bytes, self.tokens_after / self.bytes
        same = "read as before" if not self.changed else f"{self.changed:,} read otherwise"
        return (
            f"{name}: {before:.4f} -> {after:.4f} tokens per byte "
            f"({100 * (after / before - 1):+.2f}%), {self.texts:,} texts, {same}"
        )


@working("proving that kept text is read as before")
def prove(
    base: Family, pruned: Family, places: Mapping[int, int], documents: Iterable[str]
) -> Reading:
    """Read texts with both tokenizers, by each engine that reads a file of the base.

    A text whose ids all stay has to be read as before under the new ids; one that can be spelled
    at all has to be decoded as before.

    Raises:
        LexigraftError: one is not.
    """
    size = before = after = changed = texts = 0
    readers = {
        name: (read, pruned.engines().get(name, pruned.encode_batch))
        for name, read in base.engines().items()
    }
    for batch in _batches(base, documents):
        first = True
        for read, read_pruned in readers.values():
            for text, old, new in zip(batch, read(batch), read_pruned(batch), strict=True):
                stays = all(token_id in places for token_id in old)
                if stays and [places[token_id] for token_id in old] != new:
                    raise _broken(text, "it is read otherwise, though all its tokens are kept")
                if first:
                    texts += 1
                    size += len(text.encode())
                    before, after = before + len(old), after + len(new)
                    changed += not stays
                if not stays and not _is_alike(base, pruned, old, new):
                    raise _broken(text, "it is decoded otherwise")
            first = False
    return Reading(size, before, after, changed, texts)


def proof_documents(family: Family) -> Iterator[str]:
    """Texts that every pruned tokenizer is proved on: hard ones, and its tokens in a row."""
    yield from HARD_TEXTS
    words = (readable(family.token_bytes(i)) for i in sorted(family.map.texts))
    while batch := list(islice(words, 2048)):
        yield " ".join(batch)


def _is_alike(base: Family, pruned: Family, old: Sequence[int], new: Sequence[int]) -> bool:
    if base.unknown_id in old or (
        pruned.unknown_id is not None and pruned.unknown_id in new
    ):  # characters of a script that is given up
        return True
    return base.decode(old) == pruned.decode(new)


def _batches(family: Family, documents: Iterable[str]) -> Iterator[list[str]]:
    stream = proof_texts(family, documents)
    while batch := list(islice(stream, _BATCH)):
        yield batch


def _broken(text: str, what: str) -> LexigraftError:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return LexigraftError(
        f"the pruned tokenizer and the base differ on {shown!r}: {what}",
        needed="a tokenizer that reads texts of kept tokens as before; nothing was written",
        fix="report this base tokenizer and text as a bug of lexigraft",
    )


def template_ids(family: Family) -> frozenset[int]:
    """Ids that the chat template's own text, or what it puts around a turn, is made of."""
    settings = read_settings(family.folder / "tokenizer_config.json")
    stored = settings.get("chat_template")
    sources = [stored] if isinstance(stored, str) else []
    if isinstance(stored, list):
        sources += [str(one.get("template")) for one in stored if isinstance(one, dict)]
    for path in sorted(family.folder.glob("chat_template.*")):
        sources.append(path.read_text("utf-8", "replace"))
    texts = [*sources]
    for source in sources:
        literals = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", source)
        plain = [(one or two).replace("\\n", "\n") for one, two in literals]
        between = re.split(r"{[{%#].*?[}%#]}", source, flags=re.DOTALL)
        texts += [*plain, *between]
    if sources:
        texts += [f"{role}{end}" for role in _ROLES for end in ("", "\n", "\n\n")]
    ids = family.encode_batch([text for text in texts if text])
    return frozenset(token_id for one in ids for token_id in one)


def require_scripts(names: Sequence[str], family: Family) -> None:
    """Stop at the name of a script that no token has a letter of.

    Raises:
        LexigraftError: names those that there are.
    """
    found = Counter(
        script
        for i in family.map.texts
        for script in set(map(script_of, family.token_bytes(i).decode("utf-8", "ignore")))
        if script
    )
    unknown = [name for name in names if name.upper() not in found]
    if unknown:
        known = ", ".join(script.capitalize() for script, _ in found.most_common(20))
        raise LexigraftError(
            f"--scripts {unknown[0]}: no token has a letter of it",
            needed=f"scripts of this tokenizer, such as {known}",
            fix="--scripts Latin,Han",
        )


def read_list(path: Path, family: Family) -> tuple[frozenset[int], list[str]]:
    """Ids that the lines of a file name, and the lines that name none.

    A line is a token as the files spell it (`Ġthe`), its text (` the`) or, in the form `#123`, an
    id.

    Raises:
        LexigraftError: the file is missing or no UTF-8.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as fault:
        raise LexigraftError(
            f"--list {path}: {fault}", needed="a UTF-8 file, one token a line", fix=f"ls {path}"
        ) from None
    found: set[int] = set()
    lost = []
    for line in lines:
        ids = {family.map.ids[t] for t in (line, *family.written(line)) if t in family.map.ids}
        if re.fullmatch(r"#\d+", line) and int(line[1:]) in family.map.texts:
            ids = {int(line[1:])}
        found |= ids
        lost += [] if ids else [line]
    return frozenset(found), lost


def documents(specs: Sequence[str | Path]) -> Iterator[str]:
    """The documents of some texts; none for none."""
    return read_documents(specs) if specs else iter(())


@lru_cache(maxsize=65536)
def script_of(character: str) -> str:
    """The script of a letter or of a script's own mark; '' for what all scripts share.

    It goes by the Unicode name, as `families.spelling` does, but tells Han from kana.

    >>> script_of("a"), script_of("冠"), script_of("の"), script_of("1"), script_of("ा")
    ('LATIN', 'HAN', 'HIRAGANA', '', 'DEVANAGARI')
    """
    if unicodedata.category(character)[0] not in "LM":
        return ""
    words = unicodedata.name(character, "").split(" ")
    first = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") and len(words) > 1 else words[0]
    return "" if first in _NO_SCRIPT else _NAMES.get(first, first)


def _is_foreign(data: bytes, wanted: frozenset[str]) -> bool:
    """True for a token with a letter of another script, or with the beginning of such letters."""
    text = data.decode("utf-8", "ignore")
    if any(script and script not in wanted for script in map(script_of, text)):
        return True
    scripts = _scripts_of_beginnings().get(_unfinished(data), frozenset())
    return bool(scripts) and not scripts & (wanted | {""})


def _unfinished(data: bytes) -> bytes:
    """The beginning of a UTF-8 character at the end of some bytes; empty if there is none."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead >= 0xC0:
            width = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return data[-size:] if width > size else b""
        if lead < 0x80:
            break
    return b""


@cache
def _scripts_of_beginnings() -> Mapping[bytes, frozenset[str]]:
    """Beginning of a UTF-8 character -> the scripts of what it may become."""
    found: dict[bytes, set[str]] = {}
    for point in range(0x80, 0x30000):
        if unicodedata.category(character := chr(point)) in ("Cn", "Cs", "Co"):
            continue
        data = character.encode()
        for size in range(1, len(data)):
            found.setdefault(data[:size], set()).add(script_of(character))
    return {beginning: frozenset(scripts) for beginning, scripts in found.items()}


def _singles(family: Family, scripts: frozenset[str]) -> Iterator[int]:
    """Bytes, and single characters of the scripts that are kept: of all, unless some are named."""
    wanted = frozenset(map(str.upper, scripts))
    for token_id in family.map.texts:
        data = family.token_bytes(token_id)
        if len(data) < 2:
            yield token_id
        elif len(data) <= 4 and len(text := data.decode("utf-8", "ignore")) == 1:
            script = script_of(text)
            if len(text.encode()) == len(data) and (not wanted or not script or script in wanted):
                yield token_id
