"""Writing an extension and holding it against the laws, before anything is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from lexigraft import families
from lexigraft.console import note
from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.choice import Choice, with_parts
from lexigraft.families.llama_cpp import simulate
from lexigraft.families.proof import HARD_TEXTS, contexts, long_text, offenders
from lexigraft.families.replacing import fill
from lexigraft.families.special import add_special
from lexigraft.selection.gathering import between
from lexigraft.selection.learning import Picked

# What slower engines read of the domain and of the general text.
_FEW_TEXTS, _FEW_CHARACTERS = 200, 1000
_MOST_TRIES = 2000  # chunks in which a token is looked for


def write_lawful(
    base: Family, picked: Picked, partial: Path, special: Sequence[str], texts: Sequence[str]
) -> tuple[Family, Choice]:
    """The extension in `partial`, without tokens that break law 2 where it is no theorem."""
    choice = picked.choice
    while True:
        base.extend(choice.merges, partial)
        fill(base, partial)
        behind = max(0, len(choice.merges) - len(base.vacant))
        add_special(partial, special, base.map.tokens + behind)
        extended = families.load(partial, own=True)
        if base.guaranteed:
            return extended, choice
        hard = between(hard_texts(extended, choice), special)
        bad = offenders(base, extended, chain(hard, texts))
        if not bad.intersection(merge.token for merge in choice.merges):
            return extended, choice
        note(f"{len(bad):,} tokens dropped: with them a text would be cut differently")
        kept = [merge for merge in choice.merges if merge.token not in bad]
        counts = choice.counts
        saved = choice.saved[[m.token not in bad for m in choice.merges]]
        if picked.stretches is not None:
            again = base.replay(picked.stretches, kept)
            counts, saved = again.counts, again.saved
        choice = Choice(kept, counts, saved, choice.detours)


def prove_llama_cpp(base: Family, extended: Family, choice: Choice, domain: Sequence[str]) -> None:
    """Law 5 for llama.cpp's SentencePiece tokenizer, simulated on some texts."""
    old, new = (getattr(family, "sentencepiece_proto", None) for family in (base, extended))
    if old is None or new is None:
        return
    words = [extended.token_bytes(extended.map.ids[m.token]) for m in choice.merges[:200]]
    texts = [
        *HARD_TEXTS,
        *(word.decode("utf-8", "replace") for word in words),
        *beginnings(domain),
    ]
    before, after = simulate(old)(texts), simulate(new)(texts)
    for text, was, now, base_ids, ids in zip(
        texts, before, after, base.encode_batch(texts), extended.encode_batch(texts), strict=True
    ):
        if was == base_ids and now != ids:
            raise LexigraftError(
                f"law 5 is broken on {text[:200]!r}: llama.cpp's tokenizer would read it otherwise",
                needed="files that every engine of the base reads alike; nothing was written",
                fix="report this base tokenizer and text as a bug of lexigraft",
            )


def beginnings(texts: Sequence[str]) -> list[str]:
    """What engines too slow for the whole text read of it."""
    return [text[:_FEW_CHARACTERS] for text in texts[:_FEW_TEXTS]]


def hard_texts(extended: Family, choice: Choice) -> Iterator[str]:
    """Texts on which tokenizers are known to differ, with the new words in them."""
    data = (extended.token_bytes(extended.map.ids[merge.token]) for merge in choice.merges)
    words = [word.decode("utf-8", "replace") for word in data]
    return chain(HARD_TEXTS, contexts(words), [long_text(words)])


def require_reachable(
    extended: Family, choice: Choice, emitted: Mapping[int, int], chunks: Mapping[str, int]
) -> None:
    """Law 4: each token that is no bridge comes out of running text, as the engine reads it.

    Nearly all do in the proof, or what is made of them does. The others (without a leading space,
    or the first bytes of a character) are looked for where the corpus holds their letters.
    """
    ids = extended.map.ids
    alive = {m.token for m in choice.merges if emitted.get(ids[m.token])}
    alive = with_parts(choice.merges, frozenset(alive))
    left = [m.token for m in choice.merges if choice.counts[m.token] and m.token not in alive]
    if not left:
        return
    text = "\0".join(chunks)
    data = text.encode()
    for token in left:
        token_id = ids[token]
        if extended.pieces(token) == [token_id] and (
            not chunks or _comes_out(extended, token_id, data)
        ):
            continue
        raise LexigraftError(
            f"law 4 is broken: {token!r} never comes out of the text that it was counted in",
            needed="tokens that the engine emits; nothing was written",
            fix=f"report this {extended.name} base and corpus as a bug of lexigraft",
        )


def _comes_out(extended: Family, token_id: int, data: bytes) -> bool:
    """Whether the engine emits a token in one of the chunks (joined by NUL) that hold its bytes."""
    wanted = extended.token_bytes(token_id)
    place = data.find(wanted)
    tries: list[str] = []
    while place >= 0 and len(tries) < _MOST_TRIES:
        start, end = data.rfind(b"\0", 0, place) + 1, data.find(b"\0", place)
        chunk = data[start : end if end >= 0 else len(data)].decode()
        tries.append(chunk.removeprefix(extended.prefix))
        place = data.find(wanted, end) if end >= 0 else -1
    return any(token_id in ids for ids in extended.encode_batch(tries))
