"""Tokenizers, one module per family behind one small protocol: load, encode, extend, write.

`load` finds the family of a folder and refuses by name what no module supports.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lexigraft.families.tokenmap import TOKENIZER_FILES, TokenMap, first_difference

if TYPE_CHECKING:
    from lexigraft.families.continued_bpe import Merge
    from lexigraft.families.replay import Replayed
    from lexigraft.families.units import Units

__all__ = [
    "Family",
    "TokenMap",
    "copy_tokenizer",
    "first_difference",
    "load",
    "new_ids",
    "open_ahead",
]


class Family(Protocol):
    """A loaded tokenizer.

    Attributes:
        name: the family, for example `byte-level BPE`.
        folder: where it was loaded from.
        map: its token map.
        implicit: the engine joins any pair whose concatenation is a token (SentencePiece).
        vacant: ids whose tokens were taken out of it, which the first new tokens get
            (`families.replacing`), ascending; they are not in `map`.
    """

    name: str
    folder: Path
    map: TokenMap
    implicit: bool
    vacant: tuple[int, ...]

    @property
    def guaranteed(self) -> bool:
        """Law 2 holds for every text by construction (BPE kinds).

        Elsewhere tokens that break it on the proof texts are dropped, and it is claimed for these.
        """

    @property
    def unknown_id(self) -> int | None:
        """The id of what the tokenizer cannot spell; None where it spells all."""

    @property
    def prefix(self) -> str:
        """What the engine puts before a text: a space, or nothing."""

    @property
    def content_hash(self) -> str:
        """Hash of all that decides ids; unchanged by loading and saving."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without the tokens that a template adds (bos, eos)."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel where the engine can."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""

    def start_ids(self) -> list[int]:
        """What the tokenizer's own template puts before a text: usually [bos] or []."""

    def pieces(self, token: str, *, added: bool = False) -> list[int]:
        """Ids that spell `token` (as written in the files) in this tokenizer.

        No normalizer and no pre-tokenizer is applied, so that the pieces join to exactly the
        token. `added` marks an added token, whose text is plain instead of byte-mapped.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that an id stands for; `▁` counts as a space."""

    def count_units(self, chunks: Mapping[str, int]) -> Units:
        """The stretches of `chunks` (text -> occurrences) in which new tokens may arise."""

    def replay(self, units: Units, merges: Sequence[Merge]) -> Replayed:
        """What this tokenizer extended by `merges` makes of `units`."""

    def written(self, text: str) -> list[str]:
        """The spellings in the files of a token that stands for `text`, the usual one first."""

    def join(self, left: str, right: str) -> str | None:
        """The token of two parts, or None where they may not be joined."""

    def admits(self, merges: Sequence[Merge]) -> list[Merge]:
        """`merges` without those that this family cannot hold beside the others."""

    def extend(self, merges: Sequence[Merge], output: Path) -> None:
        """Write this tokenizer with `merges` appended, in each format that it has."""

    @property
    def fixed(self) -> frozenset[int]:
        """Ids that no removal may touch: the tokenizer's rules hang on them.

        Added, control and user-defined tokens, the unknown token, single bytes; in Unigram also
        the pieces of the lowest and the highest score, by which the engine scores what is unknown
        or user-defined.
        """

    def needs(self) -> Mapping[int, tuple[int, ...]]:
        """The tokens without which a token would be read otherwise, or for the first time.

        Of a token that merges form, the two parts that it is joined of last; of any other, the
        ids that its own text is read as. A set of tokens is closed if it holds with each token
        what that needs. If the tokens that stay are closed and hold `fixed`, then

        - every text whose ids all stay is read as before: inside a token the same is joined
          whatever stands around it (BPE), the best path loses none but its rivals (Unigram), the
          longest match is the same (WordPiece);
        - no token comes out that never came out: its own text is read as before.

        Ids that are missing here need nothing.
        """

    def renumber(self, places: Mapping[int, int], output: Path) -> None:
        """Write the tokens of `places` (old id -> new id), and no others, in each format.

        Merges stay whose parts and result all stay; ids in templates, added tokens and settings
        move along. Nothing is checked against `fixed` and `needs`: what to remove is the
        caller's choice. Two uses:

        - `prune`: `places` numbers the tokens that stay one by one, in the order of their ids.
        - `learn --replace`: the tokens that stay keep their ids, the tokenizer is extended as any
          other, and a second `renumber` gives new tokens the ids of removed ones
          (`families.replacing`). Ids that nothing has are holes (unused entries in lists).

        Raises:
            RefusalError: a rank file, whose ids are ranks, would be reordered.
            LexigraftError: a token that a template puts in does not stay, or ids that a class of
                tokenizers gives by itself would move.
        """

    def engines(self) -> dict[str, Callable[[Sequence[str]], list[list[int]]]]:
        """Every engine that reads one of the files: name -> encode of a list of texts."""

    def limits(self) -> list[str]:
        """What a user must know of this kind of tokenizer: sentences, mostly none."""


def load(folder: Path, *, own: bool = False, spell: Sequence[str] = ()) -> Family:
    """The tokenizer in `folder`.

    Args:
        folder: holds its files.
        own: lexigraft itself has just written it.
        spell: tokens whose `pieces` will be asked for; the child process that opens a file first
            may find them, which leaves an engine less to be opened here.

    Raises:
        RefusalError: a family or file that lexigraft does not support, with the reason.
        LexigraftError: no tokenizer there, or a damaged one.
    """
    from lexigraft.families.detect import load_family, own_files

    with own_files() if own else nullcontext():
        return load_family(folder, spell)


def new_ids(base: Family, extended: TokenMap) -> list[int]:
    """The ids of an extension of `base` that mean nothing there, ascending."""
    return [*base.vacant, *range(base.map.tokens, extended.tokens)]


def open_ahead(folders: Iterable[Path]) -> AbstractContextManager[None]:
    """Say which tokenizers will be loaded: what `load` would wait for starts now, all at once."""
    from lexigraft.families import detect

    return detect.open_ahead(folders)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy every tokenizer file of `source` into `target`; returns their names.

    Tokenizer files that `target` holds and `source` does not are deleted: a stale copy beside
    a new one is read first by some loaders.
    """
    copied = []
    ranks = {path.name for folder in (source, target) for path in folder.glob("*.tiktoken")}
    for name in (*TOKENIZER_FILES, *sorted(ranks)):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
        else:
            (target / name).unlink(missing_ok=True)
    return copied
