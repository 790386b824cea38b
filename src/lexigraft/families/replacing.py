"""Old tokens out of a tokenizer, new ones in under their ids: no other id moves, nothing grows.

`vacate` takes tokens out and leaves their ids to nobody, so that new tokens are learned as if the
old ones had never been there. `fill` gives these ids to the first tokens of an extension, which
stood behind all others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lexigraft import families
from lexigraft.errors import RefusalError
from lexigraft.families import Family, copy_tokenizer
from lexigraft.families.rank_files import rank_file
from lexigraft.families.tokenmap import without


def vacate(family: Family, ids: Sequence[int], output: Path) -> Family:
    """`family` without the tokens `ids` (ascending), written to `output`; the others keep theirs.

    Raises:
        RefusalError: see `refuse_ranks`.
    """
    refuse_ranks(family)
    gone = frozenset(ids)
    family.renumber({i: i for i in family.map.texts if i not in gone}, output)
    if (family.folder / "config.json").is_file():  # by which loaders choose a class
        shutil.copyfile(family.folder / "config.json", output / "config.json")
    left = families.load(output, own=True)
    # Where the place in a list is the id, something stands there still.
    left.map = without(left.map, gone)
    left.vacant = tuple(ids)
    return left


@contextmanager
def without_tokens(family: Family, ids: Sequence[int]) -> Iterator[Family]:
    """`family` without the tokens `ids`, for as long as its folder is there; see `vacate`."""
    if not ids:
        yield family
        return
    with tempfile.TemporaryDirectory(prefix="lexigraft-") as folder:
        yield vacate(family, ids, Path(folder))


def fill(base: Family, folder: Path) -> None:
    """Give the ids that are vacant in `base` to the first new tokens of its extension in `folder`.

    Where there are fewer new tokens, the last of these ids stay vacant.
    """
    if not base.vacant:
        return
    extended = families.load(folder, own=True)
    first = base.map.tokens
    new = range(first, extended.map.tokens)
    ids = [*base.vacant, *range(first, first + len(new))]
    places = {i: i for i in base.map.texts} | dict(zip(new, ids, strict=False))
    with tempfile.TemporaryDirectory(prefix="lexigraft-") as scratch:
        extended.renumber(places, Path(scratch))
        copy_tokenizer(Path(scratch), folder)


def refuse_ranks(family: Family) -> None:
    """Stop where an id is a rank to some reader: new tokens must rank behind all old ones.

    Raises:
        RefusalError: a rank file; or a SentencePiece BPE `.model` alone, of which transformers
            orders the joins by the ids of what they make (`generate_merges`).
    """
    ranks = rank_file(family.folder)
    if ranks is not None:
        raise RefusalError(
            f"--replace: {ranks.name} is a file of ranks, in which a token's id is its rank",
            needed="a tokenizer whose ids and ranks are apart: a new token under an old id would "
            "be joined before old ones, and old text be cut differently",
            fix="leave --replace out (new tokens then come behind the others), or move the rank "
            "file out of the folder if it has a tokenizer.json",
        )
    if family.guaranteed and family.implicit and not (family.folder / "tokenizer.json").is_file():
        raise RefusalError(
            f"--replace: {family.folder} holds a SentencePiece BPE .model and no tokenizer.json",
            needed="a tokenizer.json: of the model alone transformers orders the joins by id, so "
            "that a new token under an old id would be joined before old ones",
            fix="load it with AutoTokenizer and save it with save_pretrained, which writes one",
        )
