"""Heads that are stored although the config ties them to the embedding.

transformers 5 ties such a head only if it equals the embedding and keeps both otherwise; version 4
and others drop one of them in either case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lexigraft.checkpoints.architectures import VocabularyTensors, is_tied_by_config, table
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.nested import paths_to
from lexigraft.checkpoints.rows import same_values
from lexigraft.console import note


def is_stored_twice(checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> bool:
    """True where the head is a stored copy of the embedding, tied by the config; reads both."""
    head, embedding = vocabulary.head_name, vocabulary.embeds[0]
    if head not in vocabulary.heads or not is_tied_by_config(checkpoint.config):
        return False
    return same_values(checkpoint.tensors[head], checkpoint.tensors[embedding])


def as_loaded(checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> VocabularyTensors:
    """`vocabulary` as loaders see it: a head that is stored beside an equal embedding is tied."""
    if not is_stored_twice(checkpoint, vocabulary):
        return vocabulary
    heads = tuple(name for name in vocabulary.heads if name != vocabulary.head_name)
    return dataclasses.replace(vocabulary, heads=heads, tied=True)


def with_copies(checkpoint: Checkpoint, vocabulary: VocabularyTensors) -> VocabularyTensors:
    """`vocabulary` with a stored copy of the embedding among the embeddings, so that both stay one.

    A head that differs although the config ties it is grown as a head, and said aloud.
    """
    loaded = as_loaded(checkpoint, vocabulary)
    if loaded is not vocabulary:
        return dataclasses.replace(loaded, embeds=(*loaded.embeds, vocabulary.head_name))
    if vocabulary.head_name in vocabulary.heads and _ties_for_certain(checkpoint.config):
        note(
            f"{vocabulary.head_name} differs from {vocabulary.embeds[0]} although the config ties "
            "them: transformers 5 loads both, other loaders only one; both are extended"
        )
    return vocabulary


def _ties_for_certain(config: Mapping[str, Any]) -> bool:
    """False too where the config is silent and the class, which may untie, is not known."""
    known = config.get("model_type") in table() or paths_to(config, ("tie_word_embeddings",))
    return bool(known) and is_tied_by_config(config)
