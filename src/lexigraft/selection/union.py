"""One tokenizer with the tokens of several: the base's ids stay, and every token really comes out.

Tokens of the other tokenizers that the base lacks get the ids behind the base's, in the order of
the others. Tokens of their models become tokens of the model, with merges that rank after all of
the base's; they are never appended as added tokens, which would cut words in two (a known fault of
mergekit's union). Their added tokens (`<|im_start|>`) stay what they are. A token that the base's
merges leave no way to is left out, and its name told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lexigraft import families
from lexigraft.console import working
from lexigraft.families import Family, TokenMap, copy_tokenizer, first_difference
from lexigraft.families.choice import Choice, with_parts
from lexigraft.families.continued_bpe import Merge
from lexigraft.families.merges import merge_pairs
from lexigraft.families.proof import contexts, offenders, prove
from lexigraft.families.special import add_special
from lexigraft.families.tokenmap import tokenizer_data
from lexigraft.selection.acceptance import hard_texts
from lexigraft.selection.gathering import between


@dataclass(frozen=True)
class Union:
    """A tokenizer that holds the tokens of several.

    Attributes:
        map: its token map.
        left_out: tokens of the others that the base's merges leave no way to.
        copied: the folder whose files are the union already; None where the base's were extended.
    """

    map: TokenMap
    left_out: tuple[str, ...] = ()
    copied: Path | None = None


def left_out_lines(tokens: Sequence[str], whose: str = "the base") -> list[str]:
    """What a person reads of the tokens that a union had to leave out; no line where none were."""
    if not tokens:
        return []
    return [
        f"{len(tokens):,} tokens are left out, for the merges of {whose} leave no way to them: "
        + ", ".join(map(repr, tokens[:5]))
    ]


@working("joining the vocabularies")
def write_union(base: Path, others: Sequence[Path], target: Path) -> Union:
    """Write into `target` the base's tokenizer with every token of `others` that can be reached.

    Where one of them already is the union, its files are copied byte for byte. Otherwise the
    result is proved as `learn` proves an extension: old ids kept, every text only coarsened,
    decoded as before, all engines alike (laws 1 to 3 and 5), and each new token comes out (law 4).

    Raises:
        RefusalError: a kind of tokenizer that cannot be extended.
        LexigraftError: a file is damaged, or a law is broken.
    """
    base_map, maps = TokenMap.read(base), [TokenMap.read(other) for other in others]
    wanted = {text for one in maps for text in one.ids.keys() - base_map.ids.keys()}
    for folder, whole in ((base, base_map), *zip(others, maps, strict=True)):
        if first_difference(base_map, whole) is None and whole.ids.keys() >= wanted:
            copy_tokenizer(folder, target)
            return Union(whole, copied=folder)
    return _write(families.load(base), others, maps, target)


def _write(base: Family, others: Sequence[Path], maps: Sequence[TokenMap], target: Path) -> Union:
    added = [
        (one.texts[token_id], token_id in one.special)
        for one in maps
        for token_id in sorted(one.added)
        if one.texts[token_id] not in base.map.ids
    ]
    special = list(dict.fromkeys(text for text, is_special in added if is_special))
    plain = [text for text in dict.fromkeys(text for text, _ in added) if text not in special]
    known = {*base.map.ids, *special, *plain}
    found: dict[str, None] = {}
    for folder, one in zip(others, maps, strict=True):
        found |= dict.fromkeys(text for text in _in_order(folder, one) if text not in known)
    merges = _merges(base, list(found))
    while True:
        base.extend(merges, target)
        first = base.map.tokens + len(merges)
        add_special(target, special, first)
        add_special(target, plain, first + len(special), special=False)
        extended = families.load(target, own=True)
        texts = between(hard_texts(extended, Choice(merges, {})), [*special, *plain])
        bad = _unreachable(extended, merges)
        if not base.guaranteed:
            bad |= offenders(base, extended, texts)
        kept = [merge.token for merge in merges if merge.token not in bad]
        if len(kept) == len(merges):
            break
        merges = _merges(base, kept)
    prove(base, extended, texts)
    made = {merge.token for merge in merges}
    return Union(extended.map, tuple(text for text in found if text not in made))


def _in_order(folder: Path, tokens: TokenMap) -> list[str]:
    """The tokens of a model in the order in which its merges make them; without a list, by id."""
    path = folder / "tokenizer.json"
    listed = (tokenizer_data(path)["model"].get("merges") or []) if path.is_file() else []
    made = map("".join, merge_pairs(listed))
    ranks: dict[str, int] = {}
    for rank, token in enumerate(made):
        ranks.setdefault(token, rank)
    own = [(i, text) for i, text in tokens.texts.items() if i not in tokens.added]
    return [text for _, _, text in sorted((ranks.get(text, -1), i, text) for i, text in own)]


def _merges(base: Family, tokens: Sequence[str]) -> list[Merge]:
    """Merges that make `tokens`, in their order as far as parts come before the whole."""
    if base.guaranteed and not base.implicit:
        return _listed(base, tokens)
    # Other kinds say themselves which parts a token has, or need none; a lone letter is adopted.
    return base.admits(
        [
            Merge(token, token[:1], None if len(token.removeprefix("##")) == 1 else token[1:], 0)
            for token in tokens
        ]
    )


def _listed(base: Family, tokens: Sequence[str]) -> list[Merge]:
    """Merges for an engine that joins listed pairs alone.

    A token is made once the merges before it leave two parts of it; no part is made that is not
    asked for, since it would be a token without a row.
    """
    merges: list[Merge] = []
    ranks: dict[tuple[str, str], int] = {}
    left = list(tokens)
    while left:
        waiting = []
        for token in left:
            parts = _parts([base.map.texts[i] for i in base.pieces(token)], ranks)
            if len(parts) == 2:
                ranks[parts[0], parts[1]] = len(merges)
                merges.append(Merge(token, parts[0], parts[1], 0))
            else:
                waiting.append(token)
        if len(waiting) == len(left):
            break
        left = waiting
    return merges


def _parts(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """`symbols` as merges leave them: the pair of the lowest rank first, from the left."""
    while len(symbols) > 1:
        pair = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if pair not in ranks:
            break
        joined: list[str] = []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == pair:
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined
    return symbols


def _unreachable(extended: Family, merges: Sequence[Merge]) -> set[str]:
    """New tokens that no text is read as, though they are spelled right (law 4).

    The first bytes of a character come out only where nothing completes them: they are held
    against the merges alone. What another token is made of needs no text of its own.
    """
    ids = extended.map.ids
    texts = {}
    for merge in merges:
        data = extended.token_bytes(ids[merge.token])
        try:
            texts[merge.token] = data.decode()
        except UnicodeDecodeError:
            continue
    words = list(texts.values())
    read = extended.encode_batch([*words, *(f"x{word}" for word in words), *contexts(words)])
    emitted = {token_id for ids_of_text in read for token_id in ids_of_text}
    alive = frozenset(merge.token for merge in merges if ids[merge.token] in emitted)
    alive |= with_parts(merges, alive)
    return {
        merge.token
        for merge in merges
        if extended.pieces(merge.token) != [ids[merge.token]]
        or (merge.token in texts and merge.token not in alive)
    }
