"""Which tensor of the base each tensor of an adapter belongs to; each is used exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lexigraft.adapters.config import AdapterConfig, refusal
from lexigraft.adapters.experts import expert_additions, is_of_experts
from lexigraft.adapters.folder import Adapter, Addition, LowRank, Scale
from lexigraft.adapters.misfits import Misfits
from lexigraft.checkpoints.architectures import VocabularyTensors
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.header import FLOATS, Tensor
from lexigraft.checkpoints.rows import by_row, same_values
from lexigraft.errors import LexigraftError, RefusalError

# A checkpoint of the bare base model lacks the name that the full model gives it, and vice versa
# (gpt2 on the hub stores `h.0...`, transformers writes `transformer.h.0...`).
_BASE_MODEL_NAMES = ("model.", "transformer.")
# Image-text models: names in memory (transformers 5), and the older order that checkpoints keep.
_OLDER_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("lm_head.", "language_model.lm_head."),
)
# Experts and router, in memory and as Mixtral and its kin are stored.
_MIXTURE = (".mlp.", ".block_sparse_moe.")


@dataclass(frozen=True)
class Change:
    """What an adapter does to one vocabulary tensor; empty where it does nothing.

    Attributes:
        full: values of every row that the adapter knows, None where it holds none.
        ids: token ids whose rows were trained singly, in the order of `values`.
        values: those rows, shape (len(ids), D).
        added: LoRA that is added to the rows, those of `full` where there are some.
    """

    full: Tensor | None = None
    ids: tuple[int, ...] = ()
    values: Tensor | None = None
    added: Addition | None = None

    def __bool__(self) -> bool:
        return any(part is not None for part in (self.full, self.values, self.added))

    @property
    def rows(self) -> int:
        """Rows of the model that it was trained on; 0 where it does not tell."""
        if self.added is not None:
            return self.added.low_rank.shape[0]
        return 0 if self.full is None else by_row(self.full).rows


@dataclass(frozen=True)
class Matched:
    """An adapter sorted by the tensors of the base.

    Attributes:
        linear: name of a weight outside the vocabulary -> the LoRA that is added to it.
        biases: name of a bias -> the LoRA whose bias is added to it.
        scaled: name of a weight or bias outside the vocabulary -> what (IA)3 multiplies it with.
        replaced: name of a tensor outside the vocabulary -> its new values.
        vocabulary: name of a vocabulary tensor -> its change; only those that change.
        labels: name of a tensor of a classifier's head -> its values: the base has no such tensor.
    """

    linear: Mapping[str, Addition]
    biases: Mapping[str, Addition]
    scaled: Mapping[str, Scale]
    replaced: Mapping[str, Tensor]
    vocabulary: Mapping[str, Change]
    labels: Mapping[str, Tensor]

    @cached_property
    def changes(self) -> dict[str, Addition | Scale | Tensor]:
        """Every change of a tensor outside the vocabulary; each tensor has one."""
        return {**self.linear, **self.biases, **self.scaled, **self.replaced}


def match(
    adapter: Adapter,
    checkpoint: Checkpoint,
    vocabulary: VocabularyTensors,
    misfits: Misfits | None = None,
) -> Matched:
    """Find the tensor of the base for each tensor of the adapter.

    Args:
        adapter: the adapter.
        checkpoint: the base.
        vocabulary: the base's vocabulary tensors.
        misfits: is told of tensors that fit nothing in the base or have another shape; what is
            returned then lacks some of them. Without it they are raised.

    Raises:
        RefusalError: a weight that is quantised, or a combination of forms that has no one meaning.
        LexigraftError: a tensor is changed twice; without `misfits`, some do not fit, all in one.
    """
    found = Misfits() if misfits is None else misfits
    matched = _match(adapter, checkpoint, vocabulary, found)
    if misfits is None:
        found.require_none()
    return matched


def _match(
    adapter: Adapter, checkpoint: Checkpoint, vocabulary: VocabularyTensors, misfits: Misfits
) -> Matched:
    # A tied head is not stored, but an adapter may hold it.
    unstored = {vocabulary.head_name} if vocabulary.tied else set()
    vocabulary_names = {*vocabulary.names, *unstored}
    find = _Finder(checkpoint, unstored, misfits)
    added = _additions(adapter, checkpoint, find, vocabulary_names)
    labels = {t: tensor for t, tensor in adapter.full.items() if _is_of_labels(t, adapter, find)}
    full = find.all({t: tensor for t, tensor in adapter.full.items() if t not in labels})
    biases = _biases(added, checkpoint, find, vocabulary_names)
    _require_one_change({*added, *biases} & full.keys(), adapter, "replaces")
    scaled = _scales(adapter, checkpoint, find, vocabulary_names)
    _require_one_change({*added, *biases, *full} & scaled.keys(), adapter, "scales")
    changes = _vocabulary_changes(adapter, find, full, added, vocabulary_names)
    linear = {n: addition for n, addition in added.items() if n not in vocabulary_names}
    replaced = {n: tensor for n, tensor in full.items() if n not in vocabulary_names}
    for name, tensor in replaced.items():
        _compare_shape(tensor, checkpoint.tensors[name], misfits)
        _require_float(checkpoint.tensors[name])
    for name, change in changes.items():
        base = checkpoint.tensors.get(name, checkpoint.tensors[vocabulary.embeds[0]])
        _compare_width(change, base, misfits)
    return Matched(linear, biases, scaled, replaced, changes, labels)


def vocabulary_name(
    target: str, checkpoint: Checkpoint, vocabulary: VocabularyTensors
) -> str | None:
    """The vocabulary tensor that a tensor or a module of an adapter belongs to; None if to none."""
    names = {*vocabulary.names, vocabulary.head_name}
    for spelled in (*_spellings(target), *_spellings(f"{target}.weight")):
        if spelled in names:
            return spelled
    return None


def _is_of_labels(target: str, adapter: Adapter, find: _Finder) -> bool:
    """True for a tensor of the head over labels that a classifier was given for its training."""
    saved = any(target.startswith(f"{name}.") for name in adapter.config.modules_to_save)
    return adapter.config.classifies and saved and not find.has(target)


@dataclass(frozen=True)
class _Finder:
    checkpoint: Checkpoint
    unstored: set[str]
    misfits: Misfits

    def all(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`targets` under the names that they have in the base."""
        found: dict[str, Tensor] = {}
        for target, tensor in targets.items():
            name = self.name(target, tensor.name)
            if name is None:
                continue
            if name in found:
                raise _claimed_twice(name, tensor, found[name])
            found[name] = tensor
        return found

    def name(self, target: str, key: str) -> str | None:
        """The tensor of the base called `target`; `key` is what the adapter's file calls it.

        None, and a misfit, where there is none.
        """
        names = dict.fromkeys(name for name in _spellings(target) if self._has(name))
        if target in names or len(names) == 1:
            return next(iter(names))
        folder = self.checkpoint.folder
        self.misfits.add(key, f"fits no tensor of {folder} (looked for {target})")
        return None

    def has(self, target: str) -> bool:
        """True when the base has a tensor called `target`."""
        return any(self._has(name) for name in _spellings(target))

    def _has(self, name: str) -> bool:
        return name in self.checkpoint.tensors or name in self.unstored


def _claimed_twice(name: str, second: Tensor, first: Tensor) -> LexigraftError:
    return LexigraftError(
        f"{second.name} and {first.name} both belong to {name}",
        needed="each tensor of the base once",
        fix="save the adapter again",
    )


def _spellings(target: str) -> Iterable[str]:
    yield target
    for prefix in _BASE_MODEL_NAMES:
        yield target.removeprefix(prefix) if target.startswith(prefix) else prefix + target
    for new, old in _OLDER_NAMES:
        if target.startswith(new):
            yield old + target.removeprefix(new)
    if _MIXTURE[0] in target:
        yield target.replace(*_MIXTURE, 1)


def _require_one_change(twice: Iterable[str], adapter: Adapter, what: str) -> None:
    for name in sorted(twice):
        raise LexigraftError(
            f"{adapter.weights} both {what} {name} and changes it otherwise",
            needed="one change per tensor",
            fix="save the adapter again",
        )


def _additions(
    adapter: Adapter, checkpoint: Checkpoint, find: _Finder, vocabulary: set[str]
) -> dict[str, Addition]:
    config = adapter.config
    experts = {m: low_rank for m, low_rank in adapter.low_rank.items() if is_of_experts(m, config)}
    found = dict(expert_additions(experts, checkpoint.tensors, config, find.misfits))
    for matrix in found:
        _require_float(checkpoint.tensors[matrix])
    for module, low_rank in adapter.low_rank.items():
        if module in experts:
            continue
        name = find.name(f"{module}.weight", low_rank.a.name)
        if name is None:
            continue
        transposed = False
        if name not in vocabulary:  # whose rows may be more or fewer
            weight = checkpoint.tensors[name]
            _require_float(weight)
            transposed = _is_transposed(low_rank, weight, config, find)
        if name in found:
            raise _claimed_twice(name, low_rank.a, found[name].low_rank.a)
        scaling = config.scaling(module, low_rank.rank)
        found[name] = Addition(low_rank, scaling, transposed)
    return found


def _biases(
    added: Mapping[str, Addition], checkpoint: Checkpoint, find: _Finder, vocabulary: set[str]
) -> dict[str, Addition]:
    found = {}
    for weight, addition in added.items():
        bias, module = addition.low_rank.bias, addition.low_rank.module
        if bias is None:
            continue
        if weight in vocabulary:
            raise refusal(bias.path, f"LoRA with a bias on the head ({bias.name})")
        if not find.has(f"{module}.bias"):
            raise RefusalError(
                f"{bias.name} in {bias.path} is added to the bias of {module}, and it has none",
                needed="a base whose layer has a bias: PEFT does not merge this either",
                fix="train without lora_bias, or keep base and adapter apart",
            )
        for name, tensor in find.all({f"{module}.bias": bias}).items():
            _compare_shape(tensor, checkpoint.tensors[name], find.misfits)
            _require_float(checkpoint.tensors[name])
            found[name] = addition
    return found


def _scales(
    adapter: Adapter, checkpoint: Checkpoint, find: _Finder, vocabulary: set[str]
) -> dict[str, Scale]:
    found: dict[str, Scale] = {}
    for module, vector in adapter.scales.items():
        name = find.name(f"{module}.weight", vector.name)
        if name is None:
            continue
        if name in vocabulary:
            raise refusal(vector.path, f"(IA)3 on a vocabulary tensor ({module})")
        weight = checkpoint.tensors[name]
        scale = Scale(vector, adapter.config.transposed or has_conv1d(checkpoint))
        rows, width = weight.shape[::-1] if scale.transposed else weight.shape
        if vector.shape not in ((rows, 1), (1, width)):
            _note_other_shape(vector, weight, find.misfits)
        names = {name: vector}
        if vector.shape == (rows, 1) and find.has(f"{module}.bias"):
            names |= find.all({f"{module}.bias": vector})
        for scaled in names:
            _require_float(checkpoint.tensors[scaled])
            if scaled in found:
                raise _claimed_twice(scaled, vector, found[scaled].vector)
            found[scaled] = scale
    return found


def _is_transposed(low_rank: LowRank, weight: Tensor, config: AdapterConfig, find: _Finder) -> bool:
    """True when the base stores this weight (in, out).

    PEFT turns fan_in_fan_out on and off by the class of each layer and saves only the last state:
    the config's word counts where neither the shape nor the architecture tells.
    """
    shape, conv1d = low_rank.shape, has_conv1d(find.checkpoint)
    may_be = not low_rank.of_embedding and (config.transposed or conv1d)
    if weight.shape not in ({shape, shape[::-1]} if may_be else {shape}):
        find.misfits.add(
            f"LoRA of {low_rank.module}",
            f"changes a matrix of shape {list(shape)}, the base has {list(weight.shape)}",
        )
        return False
    if not may_be or shape[0] != shape[1]:
        return weight.shape != shape
    if not conv1d:
        raise refusal(config.path, f"fan_in_fan_out on the square matrix {low_rank.module}")
    return True


def has_conv1d(checkpoint: Checkpoint) -> bool:
    """True when linear layers are GPT-2's Conv1D, whose weights are stored (in, out)."""
    return checkpoint.config.get("model_type") in ("gpt2", "openai-gpt")


def _vocabulary_changes(
    adapter: Adapter,
    find: _Finder,
    full: Mapping[str, Tensor],
    added: Mapping[str, Addition],
    vocabulary: set[str],
) -> dict[str, Change]:
    copies = find.all(adapter.copies)
    rows = find.all({f"{module}.weight": tensor for module, tensor in adapter.rows.items()})
    modules = {tensor.name: module for module, tensor in adapter.rows.items()}
    for name, tensor in copies.items():
        if name not in vocabulary or name not in {*rows, *added}:
            raise refusal(adapter.weights, f"a copy of a weight that it does not change ({name})")
        if name in full and not same_values(full[name], tensor):
            raise LexigraftError(
                f"{tensor.name} and {full[name].name} are two different copies of {name}",
                needed="equal copies: which of them was trained cannot be known",
                fix="save the adapter again with model.save_pretrained",
            )
    for name in sorted(rows.keys() - vocabulary):
        raise refusal(adapter.weights, f"trained rows of {name}, which is no vocabulary tensor")
    _require_one_change(added.keys() & rows.keys(), adapter, "trains rows of")
    changes = {}
    for name in sorted(vocabulary & {*full, *rows, *added}):
        change = Change(full.get(name, copies.get(name)), added=added.get(name))
        if name in rows:
            module = modules[rows[name].name]
            ids = adapter.config.ids_of(module) or _shared_ids(adapter)
            single = _single_rows(module, rows[name], ids, adapter.config.path)
            change = Change(change.full, single.ids, single.values)
        changes[name] = change
    return changes


def _single_rows(module: str, values: Tensor, ids: tuple[int, ...] | None, config: Path) -> Change:
    """The change of an adapter that trained single rows of `module`.

    Raises:
        LexigraftError: the config does not say which rows, or not as many as there are.
    """
    if ids is None or len(ids) != values.rows:
        said = "no ids" if ids is None else f"{len(ids)} ids"
        raise LexigraftError(
            f"{values.name} holds {values.rows} rows, {config} names {said} for {module}",
            needed="the token id of every row, in trainable_token_indices or token_indices",
            fix="copy adapter_config.json and adapter_model.safetensors from the same run",
        )
    return Change(None, ids, values)


def _shared_ids(adapter: Adapter) -> tuple[int, ...] | None:
    """The ids of the one trained list: a tied head is trained with the embedding's."""
    lists = set(adapter.config.token_ids.values())
    return lists.pop() if len(lists) == 1 else None


def _compare_shape(tensor: Tensor, base: Tensor, misfits: Misfits) -> None:
    if tensor.shape != base.shape:
        _note_other_shape(tensor, base, misfits)


def _note_other_shape(tensor: Tensor, base: Tensor, misfits: Misfits) -> None:
    misfits.add(
        tensor.name,
        f"has shape {list(tensor.shape)}, {base.name} of the base {list(base.shape)}",
    )


def _compare_width(change: Change, base: Tensor, misfits: Misfits) -> None:
    _require_float(base)
    width = by_row(base).shape[1:]
    whole = None if change.full is None else by_row(change.full)
    for tensor in (whole, change.values):  # a single row is no bias
        if tensor is not None and tensor.shape[1:] != width:
            _note_other_shape(tensor, base, misfits)
    if change.added is not None and change.added.low_rank.shape[1:] != width:
        _note_other_shape(change.added.low_rank.b, base, misfits)


def _require_float(tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise RefusalError(
            f"{tensor.name} of the base is stored as {tensor.dtype}: it is quantised",
            needed="the full-precision base that it was made from",
            fix="name that base instead",
        )
