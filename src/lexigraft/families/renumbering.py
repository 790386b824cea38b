"""A tokenizer under other ids, without some of its tokens: what each kind of file becomes.

`places` maps the old id of each token that stays to its new id, here as in `Family.renumber`. Ids
that nothing has afterwards stay holes where a file names its ids, and become unused entries where
the place in a list is the id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.families.implicit import splits
from lexigraft.families.merges import Merges, Pair, joins, merge_pairs
from lexigraft.files import read_object, write_json

# sentencepiece_model.proto, ModelProto.SentencePiece.Type
_UNUSED = 5

Needs = dict[int, tuple[int, ...]]


def needs_by_list(ids: Mapping[str, int], read: Iterable[Sequence[int]], merges: Merges) -> Needs:
    """`Family.needs` of a model that joins listed pairs.

    Args:
        ids: token -> id, of every token of the model.
        read: for each of them the ids that the merges alone read it as.
        merges: pairs in the order of their ranks.
    """
    ranks: dict[Pair, int] = {}
    made: dict[str, list[Pair]] = {}
    for rank, pair in enumerate(merge_pairs(merges)):
        ranks[pair] = rank
        made.setdefault("".join(pair), []).append(pair)
    return _needs(ids, read, lambda token: made.get(token, []), ranks.get)


def needs_by_rank(
    ids: Mapping[str, int], read: Iterable[Sequence[int]], ranks: Mapping[str, float]
) -> Needs:
    """`Family.needs` of a model that joins any pair whose concatenation is a token.

    Args:
        ids: token -> id, of every token of the model.
        read: for each of them the ids that it is read as, spelled out.
        ranks: token -> rank, the lowest of which is joined first.
    """

    def rank_of(pair: Pair) -> float | None:
        return ranks.get("".join(pair))

    return _needs(ids, read, lambda token: splits(token, ids), rank_of)


def needs_of_paths(ids: Iterable[int], read: Iterable[Sequence[int]]) -> Needs:
    """`Family.needs` of a model without merges, from what each token is read as."""
    both = zip(ids, read, strict=True)
    return {i: tuple(dict.fromkeys(pieces)) for i, pieces in both if list(pieces) != [i]}


def _needs(
    ids: Mapping[str, int],
    read: Iterable[Sequence[int]],
    ways_to: Callable[[str], Sequence[Pair]],
    rank_of: Callable[[Pair], float | None],
) -> Needs:
    needs = {}
    for (token, token_id), pieces in zip(ids.items(), read, strict=True):
        parts: Iterable[int] = pieces
        if list(pieces) == [token_id]:
            ways = ways_to(token)
            last = joins(token, rank_of)[-1:] if len(ways) > 1 else []
            # One that a rule outside the merges makes keeps every way to it.
            parts = (ids[part] for way in (last or ways) for part in way)
        if kept := tuple(dict.fromkeys(parts)):
            needs[token_id] = kept
    return needs


def joined_needs(one: Needs, other: Needs) -> Needs:
    """What either of two engines of one tokenizer needs."""
    return {
        i: tuple(dict.fromkeys((*one.get(i, ()), *other.get(i, ()))))
        for i in one.keys() | other.keys()
    }


def renumbered_json(data: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    """`tokenizer.json` data under other ids: vocabulary, merges, added tokens, template.

    Raises:
        LexigraftError: a template puts in a token that does not stay.
    """
    added = sorted(
        (
            {**token, "id": places[token["id"]]}
            for token in data.get("added_tokens") or []
            if token["id"] in places
        ),
        key=lambda token: int(token["id"]),
    )
    model = data["model"]
    changed = dict(model)
    if isinstance(model["vocab"], dict):
        kept = renumbered_ids(model["vocab"], places)
        changed["vocab"] = _with_added(kept, added)
        if "merges" in model:
            changed["merges"] = kept_merges(model["merges"], kept)
    else:
        changed["vocab"] = _renumbered_scores(model["vocab"], places, added)
        if model.get("unk_id") is not None:
            changed["unk_id"] = _place_of(model["unk_id"], places, "unk_id")
    result = {**data, "added_tokens": added, "model": changed}
    if data.get("post_processor"):
        result["post_processor"] = _renumbered_template(data["post_processor"], places)
    if data.get("padding"):
        pad = _place_of(data["padding"]["pad_id"], places, "padding")
        result["padding"] = {**data["padding"], "pad_id": pad}
    return result


def renumbered_ids(ids: Mapping[str, int], places: Mapping[int, int]) -> dict[str, int]:
    """Token -> new id of those that stay, in the order of the new ids."""
    kept = ((token, places[token_id]) for token, token_id in ids.items() if token_id in places)
    return dict(sorted(kept, key=lambda item: item[1]))


def kept_merges(merges: Merges, kept: Collection[str]) -> list[Any]:
    """The merges whose parts and result all stay, in their order."""
    return [
        merge
        for merge, (left, right) in zip(merges, merge_pairs(merges), strict=True)
        if left in kept and right in kept and left + right in kept
    ]


def renumbered_pieces(
    proto: Any, ids: Sequence[int], places: Mapping[int, int], *, head: int = 0, skip: int = 0
) -> None:
    """Rewrite the pieces of a SentencePiece model.

    Args:
        proto: the model, which is changed.
        ids: place of each piece -> its old id.
        places: old id -> new id.
        head: ids that the tokenizer's class puts before the pieces.
        skip: pieces, the first ones, that the class leaves out.

    Raises:
        LexigraftError: a token of the class itself would move, or an added one into the pieces.
    """
    moved = next((i for i in range(head) if places.get(i) != i), None)
    if moved is not None:
        raise LexigraftError(
            f"id {moved} would become {places.get(moved)}, and the tokenizer's class keeps it",
            needed=f"ids 0 to {head - 1} as they are",
            fix="leave the tokenizer's own special tokens where they are",
        )
    shift = head - skip
    new_places: dict[int, int] = {}
    for place, token_id in enumerate(ids):
        if place < skip:
            new_places[place] = place
        elif token_id in places:
            new_places[place] = places[token_id] - shift
    behind = [new for old, new in places.items() if old > max(ids)]
    size = max(new_places.values()) + 1
    if behind and min(behind) - shift < size:
        raise LexigraftError(
            f"the added token with the new id {min(behind)} would lie among the {size:,} pieces",
            needed="added tokens behind the pieces, where they were",
            fix="give them ids behind those of all other tokens",
        )
    size = min(behind) - shift if behind else size
    old = list(proto.pieces)
    filled = {new: old[place] for place, new in new_places.items()}
    del proto.pieces[:]
    for place in range(size):
        piece = proto.pieces.add()
        if place in filled:
            piece.CopyFrom(filled[place])
        else:
            piece.piece, piece.score, piece.type = f"<unused_{place + shift}>", 0.0, _UNUSED
    spec = proto.trainer_spec
    spec.vocab_size = size
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        place = getattr(spec, name)
        if place in new_places:
            setattr(spec, name, new_places[place])


def renumber_settings(folder: Path, places: Mapping[int, int]) -> None:
    """The ids in added_tokens.json and tokenizer_config.json of `folder`."""
    listed = folder / "added_tokens.json"
    if listed.is_file():
        write_json(listed, renumbered_ids(read_object(listed), places))
    path = folder / "tokenizer_config.json"
    settings = read_object(path) if path.is_file() else {}
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        kept = sorted((places[int(i)], token) for i, token in decoder.items() if int(i) in places)
        settings["added_tokens_decoder"] = {str(i): token for i, token in kept}
        write_json(path, settings)


def write_vocabulary(path: Path, ids: Mapping[str, int]) -> None:
    """A vocab.json."""
    path.write_text(json.dumps(ids, ensure_ascii=False), "utf-8")


def _with_added(kept: dict[str, int], added: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The vocabulary; added tokens stand in it where a loader would give them other ids.

    An engine gives an added token that its model does not know the next id by number.
    """
    unknown = [(token["content"], token["id"]) for token in added if token["content"] not in kept]
    if [token_id for _, token_id in unknown] == list(range(len(kept), len(kept) + len(unknown))):
        return kept
    return dict(sorted({**kept, **dict(unknown)}.items(), key=lambda item: item[1]))


def _renumbered_scores(
    pieces: Sequence[Sequence[Any]], places: Mapping[int, int], added: Sequence[Mapping[str, Any]]
) -> list[list[Any]]:
    """A Unigram vocabulary, whose places are ids."""
    entries = {places[i]: list(piece) for i, piece in enumerate(pieces) if i in places}
    texts = {int(token["id"]): str(token["content"]) for token in added}
    size = max(entries) + 1
    behind = sorted(i for i in texts if i >= size)
    if behind != list(range(size, size + len(behind))):
        size = max(behind) + 1
    # Below any other spelling: an added token is found in the text, never by the model.
    lowest = min(float(score) for _, score in entries.values())
    for place in set(range(size)) - entries.keys():
        text = texts.get(place, f"<unused_{place}>")
        entries[place] = [text, 2 * len(text) * (lowest - 10.0)]
    return [entries[place] for place in range(size)]


def _renumbered_template(part: Any, places: Mapping[int, int]) -> Any:
    if not isinstance(part, dict):
        return part
    changed = dict(part)
    if part.get("type") == "Sequence":
        changed["processors"] = [_renumbered_template(p, places) for p in part["processors"]]
    for key in ("sep", "cls"):
        if isinstance(part.get(key), list):
            text, token_id = part[key]
            changed[key] = [text, _place_of(token_id, places, f"the template's {text!r}")]
    if isinstance(part.get("special_tokens"), dict):
        changed["special_tokens"] = {
            name: {**token, "ids": [_place_of(i, places, f"the template's {name!r}")
                                    for i in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }  # fmt: skip
    return changed


def _place_of(token_id: int, places: Mapping[int, int], what: str) -> int:
    if token_id not in places:
        raise LexigraftError(
            f"{what} is id {token_id}, which would be removed",
            needed="the tokens that the tokenizer itself puts in",
            fix="leave this token out of what is removed",
        )
    return places[token_id]
