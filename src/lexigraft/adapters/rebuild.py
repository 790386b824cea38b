"""Rows that no file holds, made again from the manifest's method and seed, and proved by its hash.

An adapter that trained no rows of its own was trained on rows that `graft` made. Where its folder
holds the manifest, they can be made again from the base; only rows whose hash is the recorded one
are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from lexigraft import families
from lexigraft.adapters.tokens import TokenizerChoice
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.growth import Array, NewRows, rows_hash, survey
from lexigraft.checkpoints.header import Tensor
from lexigraft.embeddings import METHODS, spell, starter
from lexigraft.manifest import GraftRecord, Manifest


def rebuilt_rows(
    names: Iterable[str], manifest: Manifest | None, checkpoint: Checkpoint, tokens: TokenizerChoice
) -> dict[str, NewRows]:
    """New rows of the vocabulary tensors `names`, for those that can be made again exactly.

    Args:
        names: vocabulary tensors of the base whose new rows are wanted.
        manifest: the adapter's.
        checkpoint: the base as it was before the graft.
        tokens: the tokenizer of the result.
    """
    record = manifest.records[-1] if manifest and manifest.records else None
    if not isinstance(record, GraftRecord) or not _describes(record, tokens):
        return {}
    rows = _Rows(record, checkpoint.folder, tokens)
    count = record.tokens - record.first_id
    found = {}
    for name in names:
        tensor = checkpoint.tensors[name]
        new_rows = rows.of(tensor)
        if rows_hash(tensor, count, new_rows) == record.new_rows.get(name):
            found[name] = new_rows
    return found


def _describes(record: GraftRecord, tokens: TokenizerChoice) -> bool:
    return (
        record.init in METHODS
        and record.token_map == tokens.map.hash
        and record.base.token_map == tokens.base.hash
        and record.first_id == tokens.base.tokens
    )


class _Rows:
    def __init__(self, record: GraftRecord, base: Path, tokens: TokenizerChoice) -> None:
        self._record = record
        self._base = base
        self._tokens = tokens

    @cached_property
    def _pieces(self) -> Any:
        return spell(families.load(self._base), self._tokens.map, self._record.first_id)

    def of(self, tensor: Tensor) -> NewRows:
        record = self._record
        known = survey(tensor, record.first_id)

        def center() -> Array:
            return known.mean

        return starter(
            tensor,
            self._pieces,
            record.first_id,
            init=record.init,
            seed=record.seed,
            center=center,
        )
