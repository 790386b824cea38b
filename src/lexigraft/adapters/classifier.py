"""Adapters that were trained to classify (task_type SEQ_CLS): a head over labels, no vocabulary's.

transformers' `...ForSequenceClassification` has the body of the language model and a `score` (or
`classifier`) in the place of its head. So the result is a model of that class: the head over the
vocabulary goes, the head over labels comes from the adapter's `modules_to_save`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.header import Tensor
from lexigraft.errors import RefusalError

_LABEL_WEIGHTS = ("score.weight", "classifier.weight", "out_proj.weight")


def without_head(vocabulary: VocabularyTensors) -> VocabularyTensors:
    """The vocabulary tensors that a classifier keeps: the input embedding, tied to nothing."""
    return dataclasses.replace(vocabulary, heads=(), biases=(), tied=False)


def count_of(labels: Mapping[str, Tensor]) -> int:
    """How many labels a head has.

    Args:
        labels: its tensors.

    Raises:
        RefusalError: none of them tells.
    """
    counts = [tensor.rows for name, tensor in labels.items() if name.endswith(_LABEL_WEIGHTS)]
    if len(counts) != 1:
        raise RefusalError(
            f"the head over labels consists of {', '.join(labels)}",
            needed=f"one weight whose rows are the labels: {', '.join(_LABEL_WEIGHTS)}",
            fix="merge it with PEFT on the model that was trained",
        )
    return counts[0]


def classifier_config(config: Mapping[str, Any], labels: int) -> dict[str, Any]:
    """A copy of config.json's content for the classifier of the same body.

    Labels that the config names are kept where their number is the head's; an adapter does not
    hold their names, so others are called LABEL_0 and so on, as transformers does.

    Args:
        config: the base's.
        labels: how many the head has.
    """
    names = [
        re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", str(name))
        for name in config.get("architectures") or ()
    ]
    changed = dict(config)
    changed["architectures"] = [f"{name}ForSequenceClassification" for name in names]
    if len(config.get("id2label") or ()) != labels:
        changed["id2label"] = {str(label): f"LABEL_{label}" for label in range(labels)}
        changed["label2id"] = {f"LABEL_{label}": label for label in range(labels)}
    return changed
