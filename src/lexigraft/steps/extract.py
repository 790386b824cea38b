"""`extract`: an adapter out of a fine-tuned model: low-rank changes, and rows of the vocabulary.

What a fine-tune changed of a matrix becomes LoRA, as near as its rank allows, and the error is
told. Rows of the vocabulary, new or changed, are stored as they are, and so is whatever is no
matrix of a linear layer. Matrices are read in blocks, two or three at a time.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lexigraft.adapters.experts import stacked, stacked_factors
from lexigraft.adapters.folder import Addition, LowRank
from lexigraft.adapters.keys import PREFIX
from lexigraft.adapters.match import has_conv1d
from lexigraft.adapters.pure import PureLora, targets
from lexigraft.adapters.writing import adapter_plan, write_adapter
from lexigraft.blending.inputs import Model, is_blendable, require_alike
from lexigraft.checkpoints.architectures import table
from lexigraft.checkpoints.header import Tensor, numpy_dtype, read_header
from lexigraft.checkpoints.plan import Compute, PlannedTensor
from lexigraft.checkpoints.rows import ids_in_blocks, in_blocks, read_rows, same_values
from lexigraft.console import note, progress, working
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import copy_tokenizer
from lexigraft.families.tokenmap import first_difference, without
from lexigraft.files import Inputs, publish, refuse_existing, refuse_overwriting, scratch
from lexigraft.hub import local_folder, recorded_name
from lexigraft.manifest import (
    MANIFEST,
    NEW_TOKENS,
    BaseTokenizer,
    ExtractRecord,
    Manifest,
    NewIds,
    versions,
)

Array = npt.NDArray[Any]
Kind = Literal["lora", "rows", "whole"]
# Matrices beside the linear layers, by name: positions and token types, and routers of experts.
_NO_LINEAR = re.compile(r"(emb\w*|wpe|position\w*|relative_attention_bias|gate|router)\.weight$")
_EXPERT = re.compile(r"\.experts?\.\d+\.")
# How Mixtral and its kin store what is called as in other mixtures in memory.
_MIXTURE = (".block_sparse_moe.", ".mlp.")
# With this PEFT takes an adapter without LoRA on any layer.
_NO_TARGETS = "dummy-target-modules"
MATRICES_AT_A_TIME = 3


@dataclass(frozen=True)
class Extracted:
    """What became of one tensor that differs.

    Attributes:
        name: in TUNED.
        kind: LoRA, single rows, or stored whole.
        shape: of the tensor; of experts that are stored one by one, which are one parameter in
            memory, (E, out, in).
        ids: of rows, which.
        rank: of LoRA; None where it is still to be found.
        error: Frobenius norm of what LoRA leaves of the difference, over that of the difference.
        stored: as how many tensors TUNED stores it.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    ids: tuple[int, ...] = ()
    rank: int | None = None
    error: float = 0.0
    stored: int = 1

    def to_json(self) -> dict[str, Any]:
        """The fields by name; of ids, how many."""
        return {
            "tensor": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "rows": len(self.ids),
            "rank": self.rank,
            "error": self.error,
        }


@dataclass(frozen=True)
class ExtractResult:
    """What `extract` wrote.

    Attributes:
        output: the adapter.
        tokens: max id + 1 of its tokenizer.
        added: how many tokens the base lacks, those under the ids of old ones included.
        rows: rows of TUNED.
        tensors: every tensor that differs.
        equal: how many do not.
        bytes: size of the adapter's weights; None for a dry run.
    """

    output: Path
    tokens: int
    added: int
    rows: int
    tensors: tuple[Extracted, ...]
    equal: int
    bytes: int | None

    def of(self, kind: Kind) -> list[Extracted]:
        """The tensors that became LoRA, rows, or were stored whole."""
        return [tensor for tensor in self.tensors if tensor.kind == kind]

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {
            "output": str(self.output),
            "tokens": self.tokens,
            "added": self.added,
            "rows": self.rows,
            "equal": self.equal,
            "bytes": self.bytes,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }

    def lines(self) -> list[str]:
        """What a person reads: errors of LoRA, largest first, then the rest."""
        lora = sorted(self.of("lora"), key=lambda tensor: -tensor.error)
        told = [
            *(
                f"{one.name}: rank {one.rank}, error {one.error:.2%}"
                for one in (lora if self.bytes is not None else ())
            ),
            *(f"{one.name}: {len(one.ids):,} rows" for one in self.of("rows")),
            *(f"{one.name}: whole, {list(one.shape)}" for one in self.of("whole")),
        ]
        done = "would write" if self.bytes is None else "wrote"
        size = "" if self.bytes is None else f", {self.bytes:,} bytes"
        return [
            *told,
            f"{done} {self.output}: LoRA on {len(lora)} layers, {self.added:,} new tokens"
            f"{size}; {self.equal} tensors are equal",
        ]


@dataclass(frozen=True)
class _Job:
    """An extraction that has been thought through and not yet begun."""

    base: Model
    tuned: Model
    found: tuple[Extracted, ...]
    replaced: tuple[int, ...]
    rank: int | None
    max_error: float
    seed: int

    @cached_property
    def experts(self) -> dict[str, list[tuple[str, ...]]]:
        """Parameter -> per expert the names of the matrices that it is made of."""
        found = stacked(self.tuned.body)
        return {name: [tuple(m.name for m in one) for one in of] for name, of in found.items()}

    def of(self, kind: Kind) -> list[Extracted]:
        return [one for one in self.found if one.kind == kind]

    def module(self, name: str) -> str:
        """The module of a tensor as it is called in memory, where PEFT looks for it."""
        return _in_memory(name, self.tuned).rpartition(".")[0]


@working("extracting")
def extract(
    tuned: str | Path,
    *,
    base: str | Path,
    output: str | Path,
    rank: int | str = 16,
    max_error: float | None = None,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> ExtractResult:
    """Write what a fine-tuned model has beyond its base as a PEFT adapter.

    Args:
        tuned: the fine-tuned model; its tokenizer is that of `base` or extends it.
        base: the model that it was made from.
        output: the folder to write.
        rank: of LoRA on every linear layer; `auto` finds the least of each by `max_error`.
        max_error: with `auto`, the largest relative Frobenius error of a layer's change (0.1).
        seed: of the randomised SVD.
        force: replace `output` if it exists.
        dry_run: find what differs and write nothing.

    Raises:
        RefusalError: models of different architectures, a quantised one, or experts that differ
            and are stored in a way that is not known.
        LexigraftError: the tokenizers do not fit together, numbers are not finite, nothing
            differs, or a file is missing or damaged.
    """
    own_rank = _rank(rank, max_error)
    target = Path(output)
    folders = [local_folder(name) for name in (tuned, base)]
    if not dry_run:
        refuse_existing(target, force=force)
    refuse_overwriting(target, folders)
    inputs = Inputs(folders)
    most = 0.1 if max_error is None else max_error
    job = _prepare(*map(Model.open, folders), rank=own_rank, max_error=most, seed=seed)
    if dry_run:
        return _result(job, target, job.found, None)
    with publish(target, force=force, inputs=inputs) as partial_folder, scratch(target) as between:
        matrices, found = _factors(job, between)
        if not found:
            raise _nothing(job)
        lora, patterns = _lora(job, found, matrices)
        plan = adapter_plan([*lora, *_stored(job)])
        write_adapter(partial_folder, plan, {**_config(job, str(base)), **patterns})
        copy_tokenizer(job.tuned.folder, partial_folder)
        if (job.tuned.folder / NEW_TOKENS).is_file():
            shutil.copyfile(job.tuned.folder / NEW_TOKENS, partial_folder / NEW_TOKENS)
        before = Manifest.read(job.tuned.folder) or Manifest.read(job.base.folder) or Manifest()
        before.plus(_record(job)).write(partial_folder)
    return _result(job, target, found, sum(file.bytes for file in plan.files))


def _rank(rank: int | str, max_error: float | None) -> int | None:
    if rank == "auto" and (max_error is None or 0 < max_error < 1):
        return None
    if isinstance(rank, int) and rank > 0 and max_error is None:
        return rank
    raise LexigraftError(
        f"--rank {rank}" + ("" if max_error is None else f" with --max-error {max_error:g}"),
        needed="a whole number above 0; or auto, and with it an error above 0 and below 1",
        fix="--rank 16, or --rank auto --max-error 0.1",
    )


def _prepare(tuned: Model, base: Model, *, rank: int | None, max_error: float, seed: int) -> _Job:
    require_alike(base, [tuned])
    manifest = Manifest.read(tuned.folder) or Manifest()
    replaced = manifest.replaced(base.tokens.hash, tuned.tokens.hash)
    place = first_difference(without(base.tokens, replaced), tuned.tokens)
    if place is not None:
        other = repr(tuned.tokens.texts[place]) if place in tuned.tokens.texts else "no token"
        raise LexigraftError(
            f"id {place} is {base.tokens.texts[place]!r} in {base.folder} but {other} in "
            f"{tuned.folder}",
            needed="a fine-tune whose tokenizer is that of BASE or extends it: rows belong to ids",
            fix="name the model that TUNED was made from; if tokens were replaced on the way "
            f"(learn --replace), copy that model's {MANIFEST} into {tuned.folder}",
        )
    dtypes = [model.checkpoint.tensors[model.vocabulary.embeds[0]].dtype for model in (tuned, base)]
    if dtypes[0] != dtypes[1]:
        note(
            f"{tuned.folder} is stored as {dtypes[0]}, {base.folder} as {dtypes[1]}: a merge "
            "rounds to the latter"
        )
    found = [*_tables(tuned, base, replaced), *_body(tuned, base)]
    if rank is not None:
        found = [
            replace(one, rank=min(rank, *one.shape[-2:])) if one.kind == "lora" else one
            for one in found
        ]
    job = _Job(base, tuned, tuple(found), replaced, rank, max_error, seed)
    if not found:
        raise _nothing(job)
    return job


def _nothing(job: _Job) -> LexigraftError:
    return LexigraftError(
        f"no number of {job.tuned.folder} differs from {job.base.folder}",
        needed="a model that was trained further",
        fix="name the fine-tuned model first, and its base with --base",
    )


def _body(tuned: Model, base: Model) -> Iterator[Extracted]:
    """The tensors outside the vocabulary that differ.

    The experts of a layer are one module: where one of them differs, all of its parameters are
    stored. (Of a lone square one, merges could not tell which way it was trained.)
    """
    parameters = stacked(tuned.body)
    module_of = {
        matrix.name: name.rpartition(".")[0]
        for name, experts in parameters.items()
        for expert in experts
        for matrix in expert
    }
    modules: dict[str, None] = {}
    for name, tensor in tuned.body.items():
        if not is_blendable(name, (tuned, base)) or same_values(tensor, base.body[name]):
            continue
        if name in module_of:
            modules[module_of[name]] = None
            continue
        if _EXPERT.search(name):
            raise RefusalError(
                f"{name} differs: which parameter in memory this expert is a part of is not known",
                needed="experts of gate_proj, up_proj and down_proj, or of w1, w2 and w3",
                fix="use TUNED as it is, or lexigraft blend",
            )
        linear = len(tensor.shape) == 2 and name.endswith(".weight")
        is_lora = linear and not _NO_LINEAR.search(name)
        yield Extracted(name, "lora" if is_lora else "whole", tensor.shape)
    for name, experts in parameters.items():
        if name.rpartition(".")[0] in modules:
            shape = (len(experts), sum(m.rows for m in experts[0]), experts[0][0].shape[1])
            yield Extracted(name, "lora", shape, stored=len(experts) * len(experts[0]))


def _tables(tuned: Model, base: Model, replaced: Sequence[int]) -> Iterator[Extracted]:
    """The vocabulary tensors that differ: as rows, or whole where most of them do.

    PEFT ties rows that are trained in a tied model, and stores a whole tied table twice. So a head
    that came apart from its embedding is stored whole, and the embedding too; tied tables never.
    """
    apart = base.vocabulary.tied and not tuned.vocabulary.tied
    names = (*base.vocabulary.names, *((base.vocabulary.head_name,) if apart else ()))
    tokens = tuned.tokens.tokens
    for name in names:
        old, new = base.table(name), tuned.table(name)
        ids = _changed(old, new)
        new_ids = NewIds(replaced, base.tokens.tokens, tokens)
        used = sorted({*(i for i in ids if i < tokens), *new_ids})
        if not (used or apart):
            continue
        most = not tuned.vocabulary.tied and len(used) > tokens / 2
        if apart or most or len(new.shape) == 1:
            yield Extracted(name, "whole", new.shape)
            continue
        if ids and ids[-1] >= tokens:
            note(f"{name}: rows that no token has differ too; they are left out")
        yield Extracted(name, "rows", new.shape, tuple(used))


def _changed(old: Tensor, new: Tensor) -> list[int]:
    """Ids that both have and whose rows differ."""
    found: list[int] = []
    for start, rows in in_blocks(new, 0, min(old.rows, new.rows)):
        before = read_rows(old, start, start + len(rows))
        if rows.dtype != before.dtype:
            rows, before = rows.astype(np.float64), before.astype(np.float64)  # noqa: PLW2901
        differs = rows.view(np.uint8) != before.view(np.uint8)
        found += (start + np.flatnonzero(differs.reshape(len(rows), -1).any(axis=1))).tolist()
    return found


def _in_memory(name: str, model: Model) -> str:
    """The name of a tensor in memory, where the folder has the order of image-text models, names
    of Mixtral's, or lacks the name that the full model gives its body."""
    if _MIXTURE[0] in name and any(map(_EXPERT.search, model.body)):
        name = name.replace(*_MIXTURE, 1)
    known = table().get(str(model.checkpoint.config.get("model_type")), {}).get("embeds", ())
    embedding = model.vocabulary.embeds[0]
    if embedding.startswith("language_model.model.") and (
        embedding.replace("language_model.model.", "model.language_model.", 1) in known
    ):
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        inner = name.removeprefix("language_model.model.")
        return f"model.{name}" if inner == name else f"model.language_model.{inner}"
    first = next((one.partition(".")[0] for one in known if one.partition(".")[2] == embedding), "")
    head = name in (model.vocabulary.head_name, *model.vocabulary.biases)
    return name if head or not first else f"{first}.{name}"


@dataclass(frozen=True)
class _Matrix:
    """A matrix to be factored, and the factors that were found.

    Attributes:
        of: the tensor that it is, or whose expert.
        names: of the matrices that lie one below the other in it.
        low_rank: None where nothing differs, or before it was looked at.
        rest: Frobenius norm of what the factors leave.
        norm: that of the difference.
    """

    of: Extracted
    names: tuple[str, ...]
    low_rank: LowRank | None = None
    rest: float = 0.0
    norm: float = 0.0


def _factors(job: _Job, folder: Path) -> tuple[list[_Matrix], list[Extracted]]:
    """The factors of every matrix, each pair in a file; and what is known of each tensor."""
    import torch

    from lexigraft.adapters.low_rank import Difference, factors

    transposed = has_conv1d(job.tuned.checkpoint)

    def one(numbered: tuple[int, _Matrix]) -> _Matrix:
        place, matrix = numbered
        pair = Difference(
            tuple(job.base.body[name] for name in matrix.names),
            tuple(job.tuned.body[name] for name in matrix.names),
        )
        best = factors(pair, rank=job.rank, most=job.max_error, seed=job.seed)
        if best is None:
            return matrix
        b, a = (best.right.T, best.left.T) if transposed else (best.left, best.right)
        own, module = folder / str(place), job.module(matrix.of.name)
        own.mkdir()
        stored = {f"{module}.lora_A": a, f"{module}.lora_B": b}
        _spool(own, {name: value.contiguous().numpy() for name, value in stored.items()})
        (file,) = own.iterdir()
        read = {written.name: written for written in read_header(file).tensors}
        low_rank = LowRank(module, read[f"{module}.lora_A"], read[f"{module}.lora_B"])
        return replace(matrix, low_rank=low_rank, rest=best.rest, norm=best.norm)

    matrices = [
        _Matrix(tensor, names)
        for tensor in job.of("lora")
        for names in job.experts.get(tensor.name, [(tensor.name,)])
    ]
    workers = min(MATRICES_AT_A_TIME, os.cpu_count() or 1)
    done: list[_Matrix] = []
    before = torch.get_num_threads()
    with (
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        progress("extracting", total=len(matrices), unit="matrices") as advance,
    ):
        try:
            for result in pool.map(one, enumerate(matrices)):
                advance(1)
                done.append(result)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
    found = [tensor for tensor in job.found if tensor.kind != "lora"]
    for tensor, of_it in groupby(done, key=lambda matrix: matrix.of):
        known = list(of_it)
        ranks = [matrix.low_rank.rank for matrix in known if matrix.low_rank is not None]
        if ranks or tensor.name in job.experts:  # which are zero where others of the module differ
            rest, norm = (math.hypot(*(getattr(m, n) for m in known)) for n in ("rest", "norm"))
            error = rest / norm if norm else 0.0
            found.append(replace(tensor, rank=max(ranks, default=1), error=error))
    return done, found


def _spool(folder: Path, values: Mapping[str, Array]) -> None:
    """Write some arrays into one file of a folder."""
    from lexigraft.checkpoints.write import write_plan

    tensors = [
        PlannedTensor(name, "F32", value.shape, (Compute(value.nbytes, partial(iter, [value])),))
        for name, value in values.items()
    ]
    write_plan(adapter_plan(tensors), folder, threads=1)


def _lora(
    job: _Job, found: Sequence[Extracted], matrices: Sequence[_Matrix]
) -> tuple[list[PlannedTensor], dict[str, Any]]:
    """The tensors of LoRA, and what the config says of them."""
    ranks = {one.name: one.rank for one in found if one.rank is not None}
    if not ranks:
        return [], {"r": 1, "lora_alpha": 1, "target_modules": _NO_TARGETS}
    highest = max(ranks.values())
    pairs: dict[str, list[LowRank | None]] = {name: [] for name in ranks}
    for matrix in matrices:
        if matrix.of.name in pairs:
            pairs[matrix.of.name].append(matrix.low_rank)
    linear = [one for name in ranks if name not in job.experts for one in pairs[name] if one]
    names = [_in_memory(name, job.tuned) for name in job.tuned.checkpoint.tensors]
    modules = [pair.module for pair in linear]
    config: dict[str, Any] = {
        "r": highest,
        "lora_alpha": highest,
        "target_modules": targets(modules, names) if linear else _NO_TARGETS,
        "fan_in_fan_out": has_conv1d(job.tuned.checkpoint),
    }
    tensors: list[PlannedTensor] = []
    own: dict[str, int] = {}
    if job.rank is None:
        own = {pair.module: pair.rank for pair in linear if pair.rank != highest}
        for factor in (factor for pair in linear for factor in (pair.a, pair.b)):
            named = f"{PREFIX}{factor.name}.weight"
            tensors.append(replace(PlannedTensor.copy(factor), name=named))
    elif linear:
        tensors += PureLora.of([Addition(pair, 1.0) for pair in linear], highest).tensors
    parameters = {
        one.name: _in_memory(one.name, job.tuned) for one in found if one.name in job.experts
    }
    for one in (one for one in found if one.name in parameters):
        rank = highest if job.rank is not None else ranks[one.name]
        name, (outer, inner) = parameters[one.name], one.shape[1:]
        tensors += stacked_factors(name, pairs[one.name], (outer, inner), rank)
        own |= {name: rank} if rank != highest else {}
    if parameters:
        config["target_parameters"] = sorted(parameters.values())
    return tensors, {**config, **({"rank_pattern": own, "alpha_pattern": own} if own else {})}


def _stored(job: _Job) -> Iterator[PlannedTensor]:
    """The tensors that are stored as they are: rows, and whole ones."""
    lora = {job.module(one.name) for one in job.of("lora")}
    for one in job.of("rows"):
        source = job.tuned.table(one.name)
        count = len(one.ids) * source.row_bytes
        yield PlannedTensor(
            f"{PREFIX}{job.module(one.name)}.token_adapter.trainable_tokens_delta",
            source.dtype,
            (len(one.ids), *source.shape[1:]),
            (Compute(count, partial(_rows, source, one.ids)),),
        )
    for one in job.of("whole"):
        is_table = one.name not in job.tuned.body
        source = job.tuned.table(one.name) if is_table else job.tuned.body[one.name]
        name, module = _in_memory(one.name, job.tuned), job.module(one.name)
        if module in lora and name.endswith(".bias"):
            name = f"{module}.base_layer.bias"
        yield replace(PlannedTensor.copy(source), name=f"{PREFIX}{name}")


def _rows(source: Tensor, ids: Sequence[int]) -> Iterator[Array]:
    for _, rows in ids_in_blocks(source, np.asarray(ids, np.int64)):
        yield np.ascontiguousarray(rows.astype(numpy_dtype(source.dtype), copy=False))


def _config(job: _Job, base: str) -> dict[str, Any]:
    architecture = str(next(iter(job.tuned.checkpoint.config.get("architectures") or ()), ""))
    decoder = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    encoder_decoder = job.tuned.checkpoint.config.get("is_encoder_decoder")
    saved = [job.module(one.name) for one in job.of("whole") if one.name.endswith(".weight")]
    rows = {job.module(one.name): list(one.ids) for one in job.of("rows")}
    return {
        "task_type": "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM" if decoder else None,
        "base_model_name_or_path": base,
        "modules_to_save": saved or None,
        "trainable_token_indices": rows or None,
    }


def _record(job: _Job) -> ExtractRecord:
    base = job.base
    return ExtractRecord(
        base=BaseTokenizer(
            name=recorded_name(base.folder), token_map=base.tokens.hash, tokens=base.tokens.tokens
        ),
        token_map=job.tuned.tokens.hash,
        tokens=job.tuned.tokens.tokens,
        rows=job.tuned.vocabulary.rows,
        rank=job.rank,
        max_error=job.max_error if job.rank is None else None,
        seed=job.seed,
        versions=versions(["lexigraft", "numpy", "torch"]),
    )


def _result(job: _Job, target: Path, found: Sequence[Extracted], size: int | None) -> ExtractResult:
    return ExtractResult(
        target,
        job.tuned.tokens.tokens,
        job.tuned.tokens.tokens - job.base.tokens.tokens + len(job.replaced),
        job.tuned.vocabulary.rows,
        tuple(found),
        len(job.tuned.checkpoint.tensors) - sum(one.stored for one in found),
        size,
    )
