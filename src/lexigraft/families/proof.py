"""The laws of an extended tokenizer, proved on texts before anything is published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

from lexigraft.console import progress
from lexigraft.errors import LexigraftError
from lexigraft.families import Family, first_difference, new_ids

Reader = Callable[[Sequence[str]], list[list[int]]]
_BATCH = 1024
LONG_TEXT = 1_000_000  # bytes

# Texts on which tokenizers are known to differ: spaces, line ends, scripts, marks, specials.
HARD_TEXTS = (
    "", " ", "  ", "   leading", "trailing   ", "double  spaces   inside", "\n", "\n\n a\n",
    "tab\tand\r\nreturn", "患者潜伏性感染", " 患者", "患者 潜伏性 感染", "𠮷野家 𡃁仔 㐂",
    "naïve café", "e\u0301 a\u0308 n\u0303", "שלום עולם", "مرحبا بالعالم", "Привет, мир",
    "नमस्ते दुनिया", "สวัสดี", "🙂🙂 👩\u200d⚕️ 🇨🇳", "B12 3.14 2026-01-02 1,000", "x=1;y=[2,3]",
    "https://example.org/a?b=c", "<s> </s> <unk> <|endoftext|> <|im_end|>", "\u2581\u2581 a\u2581b",
    "\u00a0non\u00a0breaking", "\u200b\u200dzero\ufeffwidth", "ＡＢＣ１２３", "a" * 200,
    "哈哈哈哈哈哈哈", "\ufffd\ufffd", "don't it's I'll",
)  # fmt: skip


@dataclass(frozen=True)
class Lengths:
    """Tokens of one text under both tokenizers, and its UTF-8 bytes."""

    tokens_before: int
    tokens_after: int
    bytes: int

    @property
    def ratio(self) -> float:
        """Tokens after per token before."""
        return self.tokens_after / max(1, self.tokens_before)

    def plus(self, other: Lengths) -> Lengths:
        """Both texts as one."""
        return Lengths(
            self.tokens_before + other.tokens_before,
            self.tokens_after + other.tokens_after,
            self.bytes + other.bytes,
        )

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return {
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Proof:
    """What was proved and counted.

    Attributes:
        texts: how many texts were compared.
        drift: texts whose ids differ although no new token is used in them (always 0 here).
        engines: names of the engines compared with each other.
        base_differences: texts on which the base's own engines differ.
        unknown: texts that the base cannot spell whole; laws 2 and 3 ask nothing of them.
        lengths: all texts together, by the first engine.
        emitted: new id -> how often it came out.
    """

    texts: int
    drift: int
    engines: tuple[str, ...]
    base_differences: int
    lengths: Lengths
    emitted: Counter[int]
    unknown: int = 0

    def plus(self, other: Proof) -> Proof:
        """Both proofs as one."""
        return Proof(
            self.texts + other.texts,
            self.drift + other.drift,
            self.engines,
            self.base_differences + other.base_differences,
            self.lengths.plus(other.lengths),
            self.emitted + other.emitted,
            self.unknown + other.unknown,
        )


def long_text(tokens: Sequence[str]) -> str:
    """A megabyte in one line: half of it words with spaces, half of it without any.

    Engines that sum scores along a line (SentencePiece's Unigram) or that cache words differ
    there if anywhere.
    """
    words = [token.strip() for token in tokens][:512] or ["word"]
    halves = (separator.join(words) + separator for separator in (" ", ""))
    return "".join(half * (LONG_TEXT // 2 // len(half.encode()) + 1) for half in halves)


def contexts(tokens: Iterable[str]) -> Iterator[str]:
    """Each new word alone, after a space, inside a run, doubled and after a digit, in one text."""
    for text in tokens:
        word = text.strip()
        yield f"{word}\n {word}\na {word} b\n在{word}后\n{word}{word}\n7{word}7\n{word}"


def unreachable(family: Family, ids: Iterable[int]) -> Iterator[int]:
    """Those of `ids` whose own text is not read as them, neither alone nor in common places."""
    texts = family.map.texts
    may_come_out: Callable[[int], bool] | None = getattr(family, "may_come_out", None)
    if may_come_out is not None:  # it is known without any text
        yield from (token_id for token_id in ids if not may_come_out(token_id))
        return
    for token_id in ids:
        if family.pieces(texts[token_id]) == [token_id]:
            continue
        text = family.token_bytes(token_id).decode("utf-8", "surrogateescape")
        if any("\udc80" <= character <= "\udcff" for character in text):
            yield token_id  # no text holds a part of a character
            continue
        read = family.encode_batch([text, f"x{text}", *contexts([text])])
        if not any(token_id in found for found in read):
            yield token_id


def expansion(base: Family, extended: Family) -> dict[int, list[int]]:
    """New id -> the base ids that spell it, as the base's own engine does."""
    return {
        token_id: base.pieces(text, added=token_id in extended.map.added)
        for token_id, text in extended.map.texts.items()
        if token_id not in base.map.texts
    }


def prove(
    base: Family,
    extended: Family,
    texts: Sequence[str],
    spelled: Mapping[int, Sequence[int]] | None = None,
) -> Proof:
    """Laws 1, 2, 3 and 5 on `texts`; `spelled` is their `expansion`, where it is known already.

    Every text must read as before when each new token is replaced by its base pieces (so it is
    coarsened, never longer, and free of drift), and decode as before; engines that agreed on the
    base must agree on the extension.

    Raises:
        LexigraftError: a law is broken; names the law and the text.
    """
    _prove_ids(base, extended)
    pieces = expansion(base, extended) if spelled is None else spelled
    count = drift = differences = unknown = size = length_before = length_after = 0
    emitted: Counter[int] = Counter()
    readers = list(base.engines().items())
    new_readers = extended.engines()
    stream = proof_texts(base, texts)
    with progress("proving the tokenizer on texts", sum(len(t.encode()) for t in texts)) as advance:
        while batch := list(islice(stream, _BATCH)):
            before, after = _read(readers, new_readers, batch)
            for place, text in enumerate(batch):
                count += 1
                advance(bytes_read := len(text.encode()))
                size += bytes_read
                length_before += len(before[0][place])
                length_after += len(after[0][place])
                emitted.update(token_id for token_id in after[0][place] if token_id in pieces)
                whole = base.unknown_id not in before[0][place]
                unknown += not whole
                if whole:
                    for old, new in zip(before, after, strict=True):
                        _prove_coarser(text, old[place], new[place], pieces)
                        drift += old[place] != new[place] and pieces.keys().isdisjoint(new[place])
                if all(old[place] == before[0][place] for old in before):
                    if any(new[place] != after[0][place] for new in after):
                        raise _broken(5, text, "the files of the extended tokenizer differ")
                else:
                    differences += 1
                if whole:
                    _prove_decoding(base, extended, text, before[0][place], after[0][place])
    lengths = Lengths(length_before, length_after, size)
    names = tuple(name for name, _ in readers)
    return Proof(count, drift, names, differences, lengths, emitted, unknown)


def _read(
    readers: Sequence[tuple[str, Reader]], new_readers: Mapping[str, Reader], batch: list[str]
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """A batch as every engine of the base and of the extension reads it, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        before = [pool.submit(read, batch) for _, read in readers]
        after = [pool.submit(new_readers[name], batch) for name, _ in readers]
        return [one.result() for one in before], [one.result() for one in after]


def offenders(base: Family, extended: Family, texts: Iterable[str]) -> set[str]:
    """New tokens that make one of `texts` read other than only coarser, or the engines differ.

    For families without a theorem (Unigram, WordPiece): what is to blame is dropped before the
    laws are proved. Of each text that breaks law 2, it is the new token at the first place where
    the base reads otherwise, or the one next to it; of law 5, the later of the two new tokens
    between which the engines choose differently.
    """
    pieces = expansion(base, extended)
    blamed: set[int] = set()
    stream = proof_texts(base, texts)
    while batch := list(islice(stream, _BATCH)):
        before = [read(batch) for read in base.engines().values()]
        after = [extended.engines()[name](batch) for name in base.engines()]
        for read_before, read_after in zip(before, after, strict=True):
            for old, new in zip(read_before, read_after, strict=True):
                if base.unknown_id not in old:
                    blamed |= _to_blame(old, new, pieces)
        for place in range(len(batch)):
            if all(ids[place] == before[0][place] for ids in before):
                for ids in after[1:]:
                    both = zip(after[0][place], ids[place], strict=False)
                    apart = next((pair for pair in both if pair[0] != pair[1]), ())
                    blamed |= set(sorted(pieces.keys() & apart)[-1:])
    return {extended.map.texts[token_id] for token_id in blamed}


def proof_texts(family: Family, texts: Iterable[str]) -> Iterator[str]:
    """`texts`, cut before spaces where the family's engines cannot be exact on longer ones."""
    most: int | None = getattr(family, "proof_characters", None)
    for text in texts:
        start = 0
        while most is not None and len(text) - start > most:
            cut = text.rfind(" ", start + 1, start + most)
            end = cut if cut > 0 else start + most
            yield text[start:end]
            start = end
        yield text[start:]


def _to_blame(
    old: Sequence[int], new: Sequence[int], pieces: Mapping[int, Sequence[int]]
) -> set[int]:
    place = 0
    last: int | None = None
    for at, token_id in enumerate(new):
        spelled = pieces.get(token_id, (token_id,))
        if list(old[place : place + len(spelled)]) != list(spelled):
            if token_id in pieces:
                return {token_id}
            later = next((other for other in new[at:] if other in pieces), None)
            found = later if last is None else last
            return set() if found is None else {found}
        if token_id in pieces:
            last = token_id
        place += len(spelled)
    return set()


def _prove_ids(base: Family, extended: Family) -> None:
    moved = first_difference(base.map, extended.map)
    if moved is not None:
        raise _broken(1, base.map.texts[moved], f"id {moved} has changed its meaning")
    new = sorted(extended.map.texts.keys() - base.map.texts.keys())
    if new != new_ids(base, extended.map):
        raise _broken(1, "", f"new ids do not follow id {base.map.tokens - 1} one by one")


def _prove_coarser(
    text: str, old: Sequence[int], new: Sequence[int], expansion: Mapping[int, Sequence[int]]
) -> None:
    spelled = list(new)
    if not expansion.keys().isdisjoint(spelled):
        known = expansion.get
        spelled = list(chain.from_iterable(known(i) or (i,) for i in spelled))
    if spelled != list(old):
        raise _broken(2, text, "it is cut differently, not only coarser")


def _prove_decoding(
    base: Family, extended: Family, text: str, old: Sequence[int], new: Sequence[int]
) -> None:
    nothing_to_skip = base.map.special.isdisjoint(old) and extended.map.special.isdisjoint(new)
    for skip in (False,) if nothing_to_skip else (False, True):
        if base.decode(old, skip_special=skip) != extended.decode(new, skip_special=skip):
            raise _broken(3, text, "it is decoded differently")


def _broken(law: int, text: str, what: str) -> LexigraftError:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return LexigraftError(
        f"law {law} is broken on {shown!r}: {what}",
        needed="a tokenizer that reads old text as before; nothing was written",
        fix="report this base tokenizer and text as a bug of lexigraft",
    )
