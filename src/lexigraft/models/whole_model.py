"""Training of everything (`--mode full`), and the model folder that comes out of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import nn

from lexigraft import families
from lexigraft.checkpoints.architectures import VocabularyTensors, vocabulary_of
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import Tensor, numpy_dtype
from lexigraft.checkpoints.plan import Compute, Plan, PlannedTensor
from lexigraft.checkpoints.rows import by_row, in_blocks, read_rows, runs
from lexigraft.checkpoints.side_files import copy_side_files
from lexigraft.checkpoints.write import write_plan
from lexigraft.errors import LexigraftError
from lexigraft.manifest import NewIds
from lexigraft.models.load import quiet_transformers, text_part
from lexigraft.models.new_rows import NewRows, fold, grow


def make_all_trainable(model: Any, ids: NewIds, *, old_rows: bool) -> NewRows | None:
    """Let the body of a frozen model train, and its new rows; its old rows if they are asked for.

    Tables of tokens beside the embedding (per layer, as in Gemma 3n) stay as they are: their old
    rows could not be told from what is new. So does what sees images, which text does not reach.

    Args:
        model: a plain causal language model without gradients.
        ids: the new ids; none for a model that was not grown.
        old_rows: train the old rows of embedding and head too. The head's bias stays.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    least = ids.first or len(tables[0].weight)
    tables += [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= least
    ]
    held = {id(parameter) for table in tables for parameter in table.parameters()}
    for parameter in text_part(model).parameters():
        parameter.requires_grad_(id(parameter) not in held)
    if len(ids):
        return grow(model, ids, old_rows=old_rows)
    for table in tables[:2]:
        table.weight.requires_grad_(old_rows)
    return None


def write_model(folder: Path, source: Path, model: Any, rows: NewRows | None) -> None:
    """Write a trained model into an empty folder: weights, config, tokenizer and side files.

    Files, names and types of the weights are those of `source`; values are what transformers
    saves. What transformers does not load (prediction layers, buffers) is copied. The new rows go
    into the matrices of `model`, which can not be trained further.

    Raises:
        LexigraftError: transformers saves a tensor that the source has in no form, or an old row
            that was not trained is not the source's.
    """
    from transformers import GenerationConfig

    frozen = not model.get_input_embeddings().weight.requires_grad
    if rows is not None:
        fold(model, rows)
    scratch = folder / "transformers"
    model.generation_config = GenerationConfig()  # the source's own may be one it refuses to save
    with quiet_transformers():
        model.save_pretrained(scratch)
    base, saved = Checkpoint.open(source), Checkpoint.open(scratch)
    vocabulary = vocabulary_of(base)
    values = _values(base, saved, vocabulary)
    plan = Plan.of(base).replace(_planned(base.tensors[n], tensor) for n, tensor in values.items())
    write_plan(plan, folder)
    shutil.rmtree(scratch)
    copy_side_files(base, folder)
    shutil.copyfile(source / "config.json", folder / "config.json")
    families.copy_tokenizer(source, folder)
    if frozen:
        _require_old_rows(base, Checkpoint.open(folder), vocabulary, rows)


def _values(
    base: Checkpoint, saved: Checkpoint, vocabulary: VocabularyTensors
) -> dict[str, Tensor]:
    """Name in the base -> the saved tensor whose values it takes."""
    found = {name: saved.tensors[name] for name in base.tensors if name in saved.tensors}
    tied = (*vocabulary.embeds, vocabulary.head_name)
    main = next((saved.tensors[name] for name in tied if name in saved.tensors), None)
    for name in base.tensors.keys() & {*tied}:
        # transformers saves tied matrices once; a folder may hold both
        if name not in found and main is not None and main.shape == base.tensors[name].shape:
            found[name] = main
    odd = [
        name
        for name, tensor in {**saved.tensors, **found}.items()
        if (name not in base.tensors and name not in tied)
        or (name in base.tensors and tensor.shape != base.tensors[name].shape)
    ]
    if odd:
        raise LexigraftError(
            f"transformers saves {odd[0]} {list(saved.tensors[odd[0]].shape)}, which "
            f"{base.folder} does not hold",
            needed="weights that transformers saves as they are stored",
            fix="use --mode lora, whose result is merged without transformers",
        )
    return found


def _planned(base: Tensor, saved: Tensor) -> PlannedTensor:
    part = Compute(base.bytes, partial(_cast, saved, base.dtype))
    return PlannedTensor(base.name, base.dtype, base.shape, (part,))


def _cast(tensor: Tensor, dtype: str) -> Iterator[npt.NDArray[Any]]:
    for _, block in in_blocks(tensor):
        yield block.astype(numpy_dtype(dtype))


def _require_old_rows(
    base: Checkpoint, written: Checkpoint, vocabulary: VocabularyTensors, rows: NewRows | None
) -> None:
    """Law 12, on the files: every row that is not new has the source's bytes."""
    new = list(rows.ids) if rows is not None else []
    for name in vocabulary.names:
        one, other = by_row(base.tensors[name]), by_row(written.tensors[name])
        ends = [0, *(end for run in runs(new) for end in run), one.rows]
        for begin, end in zip(ends[::2], ends[1::2], strict=True):
            for start, block in in_blocks(one, begin, end):
                if block.tobytes() != read_rows(other, start, start + len(block)).tobytes():
                    raise LexigraftError(
                        f"an old row of {name}, from {start} on, is not that of {base.folder}",
                        needed="old rows as they were (--old-rows frozen)",
                        fix="report this with the model's config.json",
                    )
