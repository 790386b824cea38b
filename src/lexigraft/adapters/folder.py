"""An adapter folder: its tensors grouped by what they do, duplicates settled, nothing left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lexigraft.adapters.config import AdapterConfig, refusal
from lexigraft.adapters.keys import Key, parse
from lexigraft.checkpoints.header import FLOATS, Tensor, read_header
from lexigraft.checkpoints.rows import same_values
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import require_folder
from lexigraft.manifest import Manifest

WEIGHTS = "adapter_model.safetensors"

_CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file({{k: v.contiguous() for k, v in torch.load(r'{0}/adapter_model.bin', "
    "weights_only=True).items()}}, r'{0}/adapter_model.safetensors', {{'format': 'pt'}})\""
)


@dataclass(frozen=True)
class Expert:
    """The part of the factors of a mixture that one matrix of one expert has.

    Attributes:
        index: which expert.
        count: how many there are.
        first: the row of B that is the matrix's first.
    """

    index: int
    count: int
    first: int


@dataclass(frozen=True)
class LowRank:
    """LoRA of one linear layer or embedding: the weight grows by scaling * B A.

    Attributes:
        module: the layer.
        a: A, shape (r, in); of an embedding (r, V).
        b: B, shape (out, r); of an embedding (D, r).
        of_embedding: the layer is an embedding, whose rows grow by the transposed product.
        magnitude: DoRA's m, shape (out,), of an embedding (D,); None for plain LoRA.
        bias: the layer's bias grows by scaling * this, shape (out,); None without `lora_bias`.
        expert: what of the factors counts, where they are those of a mixture.
    """

    module: str
    a: Tensor
    b: Tensor
    of_embedding: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    expert: Expert | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.rows

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that it was trained on: rows, width."""
        inner, outer = self.a.shape[1], self.b.shape[0]
        return (inner, outer) if self.of_embedding else (outer, inner)

    @property
    def is_scaled_by_column(self) -> bool:
        """True for DoRA of an embedding, whose norms run over all rows that it was trained on."""
        return self.magnitude is not None and self.of_embedding


@dataclass(frozen=True)
class Addition:
    """What a LoRA adds to one matrix of the base.

    Attributes:
        low_rank: its factors.
        scaling: what their product is multiplied with.
        transposed: the matrix is stored (in, out), as GPT-2's Conv1D does.
    """

    low_rank: LowRank
    scaling: float
    transposed: bool = False


@dataclass(frozen=True)
class Scale:
    """What (IA)3 multiplies one tensor of the base with.

    Attributes:
        vector: shape (out, 1) or (1, in).
        transposed: the matrix is stored (in, out), as GPT-2's Conv1D does.
    """

    vector: Tensor
    transposed: bool = False


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter on disk, read from headers.

    Attributes:
        folder: where it lies.
        config: its `adapter_config.json`.
        manifest: its `lexigraft.json`, None for an adapter that others saved.
        low_rank: module -> LoRA, of linear layers and of embeddings.
        scales: module -> (IA)3's vector: its outputs are multiplied with it, shape (out, 1), or its
            inputs, shape (1, in).
        full: name of a tensor of the model -> the values that replace it.
        rows: module of a vocabulary tensor -> values of the trained rows, shape (n, D).
        copies: name of a tensor of the model -> an untrained copy of it, which PEFT stores where
            the vocabulary was resized before rows were trained.
    """

    folder: Path
    config: AdapterConfig
    manifest: Manifest | None
    low_rank: Mapping[str, LowRank]
    scales: Mapping[str, Tensor]
    full: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    copies: Mapping[str, Tensor]

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read config, manifest and header of an adapter; duplicates are compared byte by byte.

        Raises:
            RefusalError: a kind of adapter, or a form in its file, that is not supported.
            LexigraftError: a file is missing or damaged, tensors are empty or contradict each
                other.
        """
        require_folder(folder, "adapter_config.json and adapter_model.safetensors")
        _require_adapter(folder)
        config = AdapterConfig.read(folder)
        tensors = {tensor.name: tensor for tensor in read_header(folder / WEIGHTS).tensors}
        keys = [parse(name) for name in tensors]
        _refuse_forms(folder, keys)
        for tensor in tensors.values():
            _require_values(tensor)
        return cls(
            folder,
            config,
            Manifest.read(folder),
            _all_low_rank(keys, tensors, config),
            _by_target(keys, tensors, "scale"),
            _replacements(keys, tensors),
            _by_target(keys, tensors, "rows"),
            _by_target(keys, tensors, "base"),
        )


def _require_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and (folder / WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise RefusalError(
            f"{folder} holds its weights only as adapter_model.bin, a pickle",
            needed=WEIGHTS,
            fix=_CONVERT.format(folder),
        )
    inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    missing = WEIGHTS if (folder / "adapter_config.json").is_file() else "adapter_config.json"
    raise LexigraftError(
        f"{folder} is no adapter: it has no {missing}",
        needed="a folder with adapter_config.json and adapter_model.safetensors",
        fix=f"name its checkpoint {folder / inside[-1]}" if inside else f"ls {folder}",
    )


def _refuse_forms(folder: Path, keys: Iterable[Key]) -> None:
    for key in keys:
        if key.part == "refused":
            raise refusal(folder / WEIGHTS, f"{key.form} ({key.name})")


def _require_values(tensor: Tensor) -> None:
    if 0 in tensor.shape:
        raise LexigraftError(
            f"{tensor.name} in {tensor.path} is empty (shape {list(tensor.shape)}): it was saved "
            "from one rank of DeepSpeed ZeRO-3 without gathering the others",
            needed="whole tensors",
            fix="run zero_to_fp32.py of that checkpoint, or save with "
            "stage3_gather_16bit_weights_on_model_save",
        )
    if tensor.dtype not in FLOATS:
        raise RefusalError(
            f"{tensor.name} in {tensor.path} is stored as {tensor.dtype}",
            needed=f"one of {', '.join(FLOATS)}",
            fix="save the adapter in float32",
        )


def _by_target(keys: Iterable[Key], tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key in keys:
        if key.part == part:
            tensor = tensors[key.name]
            _require_agreement(key.target, found.setdefault(key.target, tensor), tensor)
    return found


def _all_low_rank(
    keys: list[Key], tensors: Mapping[str, Tensor], config: AdapterConfig
) -> dict[str, LowRank]:
    linear, embedding = (
        _low_rank(_by_target(keys, tensors, f"{kind}_A"), _by_target(keys, tensors, f"{kind}_B"))
        for kind in ("lora", "embedding")
    )
    for module in sorted(linear.keys() & embedding.keys()):
        raise LexigraftError(
            f"{module} has LoRA of a linear layer and of an embedding",
            needed="one of the two",
            fix="save the adapter again",
        )
    found = linear | {n: dataclasses.replace(x, of_embedding=True) for n, x in embedding.items()}
    biases = _by_target(keys, tensors, "lora_bias")
    magnitudes = _by_target(keys, tensors, "magnitude")
    for module, vector in (*biases.items(), *magnitudes.items()):
        if module not in found or vector.shape != found[module].b.shape[:1]:
            raise LexigraftError(
                f"{vector.name} has shape {list(vector.shape)} and belongs to no LoRA of that size",
                needed="both halves of a LoRA, and its vector",
                fix="save the adapter again",
            )
    for module in sorted(found.keys() if config.dora else magnitudes.keys()):
        if config.dora != (module in magnitudes):
            raise LexigraftError(
                f"{config.path} says use_dora {str(config.dora).lower()}, LoRA of {module} has "
                f"{'a' if module in magnitudes else 'no'} magnitude",
                needed="a magnitude for every LoRA of DoRA, and only there",
                fix="copy adapter_config.json and adapter_model.safetensors from the same run",
            )
    return {
        module: dataclasses.replace(
            low_rank, magnitude=magnitudes.get(module), bias=biases.get(module)
        )
        for module, low_rank in found.items()
    }


def _low_rank(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, LowRank]:
    for module in sorted(a.keys() ^ b.keys()):
        there, lost = ("A", "B") if module in a else ("B", "A")
        raise LexigraftError(
            f"{module} has lora_{there} but no lora_{lost}",
            needed="both halves of a LoRA",
            fix="save the adapter again",
        )
    for module in a:
        if len(a[module].shape) != 2 or len(b[module].shape) != 2:
            raise RefusalError(
                f"LoRA of {module} has shapes {list(a[module].shape)}, {list(b[module].shape)}",
                needed="matrices: LoRA on linear layers and embeddings",
                fix="merge it with PEFT on the grafted model: PeftModel(...).merge_and_unload()",
            )
        if a[module].shape[0] != b[module].shape[1]:
            raise LexigraftError(
                f"LoRA of {module}: A is {list(a[module].shape)}, B is {list(b[module].shape)}",
                needed="the same rank in both",
                fix="save the adapter again",
            )
    return {module: LowRank(module, a[module], b[module]) for module in a}


def _replacements(keys: list[Key], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What replaces whole tensors: `modules_to_save` first; plain copies have to agree with it.

    `original_module` is the state before the training and is never used; it is accounted for
    only beside the trained copy.
    """
    saved, plain = _by_target(keys, tensors, "saved"), _by_target(keys, tensors, "full")
    for target in sorted(saved.keys() & plain.keys()):
        _require_agreement(target, saved[target], plain[target])
    found = plain | saved
    for target, tensor in _by_target(keys, tensors, "original").items():
        if target not in found:
            raise LexigraftError(
                f"{tensor.path} holds {tensor.name}, the state before the training, but not "
                "the trained copy",
                needed=f"modules_to_save weights of {target}",
                fix="save the adapter again with model.save_pretrained",
            )
    return found


def _require_agreement(target: str, one: Tensor, other: Tensor) -> None:
    if one is not other and not same_values(one, other):
        raise LexigraftError(
            f"{one.path} holds two different copies of {target}: {one.name} and {other.name}",
            needed="equal copies: which of them was trained cannot be known",
            fix="remove the stale copy, or save the adapter again with model.save_pretrained",
        )
