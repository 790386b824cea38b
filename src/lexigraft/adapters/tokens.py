"""Which tokenizer a merged model gets, and whether its ids are the ones the base was trained on.

Equal sizes prove nothing: the proof is the token map, id by id.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lexigraft.checkpoints.side_files import place_tokenizer
from lexigraft.errors import LexigraftError
from lexigraft.families import copy_tokenizer
from lexigraft.families.tokenmap import (
    SENTENCEPIECE_FILES,
    TokenMap,
    first_difference,
    joined,
    prefix_hash,
    read_token_maps,
    without,
)
from lexigraft.files import require_folder
from lexigraft.manifest import Manifest

# Files that hold a vocabulary; missing ones are taken from a folder with the same token map.
_VOCABULARY_FILES = (
    "tokenizer.json",
    *SENTENCEPIECE_FILES,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of the result.

    Attributes:
        folder: whose files are copied.
        map: its token map.
        base: the base's token map.
        trained: tokens (max id + 1) of the tokenizer that the adapter was trained with; None
            where nobody says.
        spare: further folders whose token map is the same, for files that `folder` lacks.
        replaced: ids of the base that have a new token in `map` (`learn --replace`).
        foreign: ids that had another token when the adapter was trained: the base replaced it.
    """

    folder: Path
    map: TokenMap
    base: TokenMap
    trained: int | None
    spare: tuple[Path, ...]
    replaced: tuple[int, ...] = ()
    foreign: tuple[int, ...] = ()

    @classmethod
    def among(cls, base: Path, adapter: Path, given: Path | None) -> TokenizerChoice:
        """Choose between the base's tokenizer, the adapter's, and one that is `given`.

        Raises:
            LexigraftError: their ids disagree, or a file is missing or damaged.
        """
        base_map = TokenMap.read(base)
        trained_in = given if given is not None else adapter
        own = _map_of(trained_in)
        if given is not None:
            require_folder(given, "a tokenizer")
            own = TokenMap.read(given)
            _require_equal(own, given, adapter)
        if own is None:
            return cls(base, base_map, base_map, None, ())
        foreign = _replaced(own, base_map, base)
        if own.tokens < base_map.tokens or foreign:  # an older adapter: the model has changed since
            _require_prefix(without(own, foreign), trained_in, base_map, base)
            return cls(base, base_map, base_map, own.tokens, (), foreign=foreign)
        replaced = _replaced(base_map, own, adapter, trained_in)
        _require_prefix(without(base_map, replaced), base, own, trained_in)
        spare = [] if given is None else [adapter]
        if own.hash == base_map.hash:
            spare.append(base)
        return cls(trained_in, own, base_map, own.tokens, tuple(spare), replaced)

    @property
    def grows(self) -> bool:
        """True when it has tokens that the base's lacks."""
        return self.map.tokens > self.base.tokens

    @property
    def file(self) -> Path:
        """The file that a message can name: the first of its vocabulary."""
        files = (self.folder / name for name in _VOCABULARY_FILES)
        return next((path for path in files if path.is_file()), self.folder)

    def copy(self, base: Path, target: Path) -> None:
        """Write its full set of files into `target`, byte for byte.

        A vocabulary file that `folder` lacks (PEFT's trainers save no tokenizer.model) comes
        from another folder with the same token map; the base's stale copy is never left. A
        folder with a bare vocabulary gets the settings and chat template of the base.
        """
        if (self.folder / "tokenizer_config.json").is_file():
            copy_tokenizer(self.folder, target)
        else:
            place_tokenizer(base, self.folder, target)
        for spare in self.spare:
            for name in _VOCABULARY_FILES:
                if (spare / name).is_file() and not (target / name).exists():
                    shutil.copyfile(spare / name, target / name)

    def missing(self, base: Path) -> list[str]:
        """Vocabulary files of `base` for which no grown copy is at hand."""
        folders = {self.folder, *self.spare}
        return [
            name
            for name in _VOCABULARY_FILES
            if (base / name).is_file() and not any((folder / name).is_file() for folder in folders)
        ]


def require_recorded(manifest: Manifest | None, choice: TokenizerChoice, adapter: Path) -> None:
    """The tokenizer that an adapter was trained with is the one that its manifest names.

    New ids have no counterpart in the base, so that nothing else can tell swapped ones.

    Raises:
        LexigraftError: it is another one.
    """
    record = manifest.last("graft") or manifest.last("learn") if manifest else None
    if record is None or choice.trained is None or choice.trained < record.tokens:
        return
    if choice.foreign:  # the base's manifest has named this tokenizer by its hash
        return
    if prefix_hash(choice.map, record.tokens) != record.token_map:
        raise LexigraftError(
            f"the tokenizer of {adapter} is not the one that its manifest names: some of its "
            f"{record.tokens:,} ids mean other tokens",
            needed="the tokenizer that the adapter was trained with",
            fix=f"copy the tokenizer files of the trained model into {adapter}",
        )


def _map_of(folder: Path) -> TokenMap | None:
    return joined(read_token_maps(folder))


def _replaced(old: TokenMap, new: TokenMap, *folders: Path) -> tuple[int, ...]:
    """Ids of `old` that have another token in `new`, where a manifest tells of it."""
    if old.hash == new.hash:
        return ()
    manifests = (Manifest.read(folder) or Manifest() for folder in folders)
    return next(filter(None, (m.replaced(old.hash, new.hash) for m in manifests)), ())


def _require_equal(own: TokenMap, given: Path, adapter: Path) -> None:
    other = _map_of(adapter)
    if other is None or other.hash == own.hash:
        return
    longer, shorter = (own, other) if own.tokens >= other.tokens else (other, own)
    place = first_difference(shorter, longer)
    place = shorter.tokens if place is None else place
    raise LexigraftError(
        f"{given} and the tokenizer in {adapter} differ: id {place} is "
        f"{own.texts.get(place)!r} there and {other.texts.get(place)!r} here",
        needed="the tokenizer that the adapter was trained with",
        fix="leave --tokenizer out, or replace the tokenizer files in the adapter folder",
    )


def _require_prefix(old: TokenMap, old_folder: Path, new: TokenMap, new_folder: Path) -> None:
    place = first_difference(old, new)
    if place is not None:
        raise LexigraftError(
            f"id {place} is {old.texts[place]!r} in {old_folder} but {new.texts.get(place)!r} in "
            f"{new_folder}",
            needed="the same token under every id that both have: rows belong to ids",
            fix="merge onto the base that this adapter was trained on, name the right tokenizer "
            "with --tokenizer, or move rows by token text with --remap",
        )
