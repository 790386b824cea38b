"""How the files of an extended tokenizer read its new words (`--deep`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from lexigraft import families
from lexigraft.checks.facts import Facts
from lexigraft.checks.findings import Finding, finding
from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.proof import HARD_TEXTS, contexts, proof_texts, unreachable

# So many new words are read in their contexts, and each beside so many of the base's tokens.
_WORDS = 300
_NEIGHBOURS = 40


def reading_findings(facts: Facts, base: Facts | None) -> Iterator[Finding]:
    """New tokens that no text becomes, and files that read one text in two ways.

    What is new is known from `base` or the manifest, and whether the files agreed before from
    `base` alone: many published tokenizers have files that differ on some texts.
    """
    tokens = facts.tokens
    if tokens is None or facts.gguf is not None:
        return
    known = facts.new_ids(base, "learn")
    if known is None:
        return
    new = [i for i in sorted(tokens.texts.keys() - tokens.added) if i in known]
    family = _loaded(facts) if new else None
    if family is None:
        return
    dead = sorted(unreachable(family, new))
    if dead:
        yield finding(
            "LG115",
            "tokenizer",
            f"{len(dead):,} of {len(new):,} new tokens come out of no text, the first is "
            f"{tokens.texts[dead[0]]!r} (id {dead[0]}): their rows are never used",
            needed="a way to each token: its parts and a merge of them, or a score that wins",
            fix="lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
        )
    before = _loaded(base) if base is not None else None
    if before is not None:
        yield from _apart(family, before, new)


def _loaded(facts: Facts) -> Family | None:
    """The tokenizer; None where it is of no known family, or damaged, which is told elsewhere."""
    try:
        return families.load(facts.folder)
    except LexigraftError:
        return None


def _word(family: Family, token_id: int) -> str:
    return family.token_bytes(token_id).decode("utf-8", "ignore").strip()


def _apart(family: Family, base: Family, new: Sequence[int]) -> Iterator[Finding]:
    """Texts that the base's files read alike and these do not."""
    engines = family.engines()
    if len(engines) < 2:
        return
    words = [_word(family, i) for i in islice(new, _WORDS)]
    known = filter(
        str.isalpha, (_word(base, i) for i in sorted(base.map.texts.keys() - base.fixed))
    )
    others = list(islice(known, _NEIGHBOURS))
    beside = (" ".join(f"{a}{w} {w}{a}" for a in others) for w in words)
    texts = list(proof_texts(family, [*HARD_TEXTS, *contexts(words), *beside]))
    old = [read(texts) for read in base.engines().values()]
    read = {name: engine(texts) for name, engine in engines.items()}
    alike = [i for i in range(len(texts)) if all(ids[i] == old[0][i] for ids in old)]
    (first, one), *further = read.items()
    for name, other in further:
        apart = [i for i in alike if one[i] != other[i]]
        if apart:
            text = min((texts[i] for i in apart), key=len)
            yield finding(
                "LG116",
                "tokenizer",
                f"{first} and {name} read {len(apart):,} of {len(alike):,} texts differently, "
                f"which the files of {base.folder} read alike; the shortest is {text!r}",
                needed="files of which each reads a text as the others do",
                fix="lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
            )
            return
