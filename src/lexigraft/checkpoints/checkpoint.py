"""A checkpoint folder seen through its headers alone, and rows read from it on demand."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft.checkpoints.header import Header, Tensor, read_header
from lexigraft.checkpoints.rows import read_rows
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import read_json, read_object, require_folder, sha256_json

if TYPE_CHECKING:
    import numpy.typing as npt

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_READ = 2**22  # bytes at a time

# transformers loads a .bin with `weights_only=True`, so this command runs no pickled code.
CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained(r'{0}', dtype='auto').save_pretrained(r'{0}')\""
)


@dataclass(frozen=True)
class Checkpoint:
    """Config and tensors of a model folder.

    Attributes:
        folder: where it lies; names of shards are relative to it, symlinks are followed.
        config: config.json as it is on disk.
        tensors: every tensor by name, in the order of the shards and of their data.
        headers: shard name -> its header, in order.
        index: the content of model.safetensors.index.json; None for a single file.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    headers: Mapping[str, Header]
    index: dict[str, Any] | None

    @property
    def shards(self) -> list[str]:
        """File names of the weights."""
        return list(self.headers)

    @property
    def bytes(self) -> int:
        """Total size of the tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json, the index, and every header; no weights.

        Raises:
            RefusalError: the weights are in another format.
            LexigraftError: a file is missing or damaged, or the shards contradict each other.
        """
        folder = require_folder(Path(folder), "config.json and model.safetensors")
        config = read_object(folder / "config.json")
        shards, index = _find_shards(folder)
        headers = {name: read_header(folder / name) for name in shards}
        tensors = _joined(folder, headers)
        if index is not None:
            _compare_with_index(folder, index, tensors)
        return cls(folder, config, tensors, headers, index)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            LexigraftError: there is none.
        """
        if name not in self.tensors:
            raise LexigraftError(
                f"no tensor {name} in {self.folder}",
                needed="one of its " + f"{len(self.tensors)} tensors",
                fix=f"lexigraft check {self.folder}",
            )
        return self.tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows [start, stop) of axis 0 in the storage dtype; a scalar is returned whole.

        Raises:
            LexigraftError: no such tensor or rows, or the file became shorter.
        """
        return read_rows(self.tensor(name), start, stop)

    def checksum(self) -> str:
        """Of every tensor's name, type, shape and bytes, in whatever files they lie.

        It tells one model from another by accident, not by intent: CRC-32, which takes less time
        than the disk.
        """
        found = {}
        for tensor in self.tensors.values():
            state, left = 0, tensor.bytes
            with tensor.path.open("rb") as stream:
                stream.seek(tensor.begin)
                while left and (block := stream.read(min(left, _READ))):
                    state, left = zlib.crc32(block, state), left - len(block)
            found[tensor.name] = [tensor.dtype, tensor.shape, state]
        return sha256_json(found)[:16]


def _find_shards(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if single and index:
        raise LexigraftError(
            f"{folder} holds both {SINGLE} and {INDEX}",
            needed="one of them: loaders do not agree on which to read",
            fix="move the stale one out of the folder",
        )
    if single:
        return [SINGLE], None
    if index:
        content = read_json(folder / INDEX)
        return _shards_of_index(folder, content), content
    raise _no_weights(folder)


def _no_weights(folder: Path) -> LexigraftError:
    names = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("pytorch_model") and name.endswith((".bin", ".json")) for name in names):
        return RefusalError(
            f"{folder} holds its weights only as pytorch_model.bin, a pickle",
            needed="model.safetensors",
            fix=CONVERT.format(folder),
        )
    if "adapter_model.safetensors" in names:
        return LexigraftError(
            f"{folder} is an adapter, not a model",
            needed="a folder with model.safetensors",
            fix=f"lexigraft merge BASE {folder} -o MERGED",
        )
    for ending, kind in ((".gguf", "GGUF"), ("consolidated.safetensors", "Mistral's own format")):
        if any(name.endswith(ending) for name in names):
            return RefusalError(
                f"{folder} holds its weights only in {kind}",
                needed="the Hugging Face form of this model, with model.safetensors",
                fix="download the Hugging Face form of this model",
            )
    parts = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    if parts:
        return LexigraftError(
            f"{folder} holds {parts[0]} and {len(parts) - 1} further shards, but no {INDEX}",
            needed=f"the {INDEX} that belongs to them",
            fix=f"download {INDEX} of this model",
        )
    return LexigraftError(
        f"no weights in {folder}",
        needed=f"{SINGLE}, or {INDEX} with its shards",
        fix=f"hf download NAME --local-dir {folder}",
    )


def _shards_of_index(folder: Path, index: Any) -> list[str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise LexigraftError(
            f"{folder / INDEX} has no weight_map",
            needed="a map from each tensor to its shard",
            fix=f"download {INDEX} again",
        )
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if not is_bare_name(name):
            raise LexigraftError(
                f"{folder / INDEX} names the shard {name!r}",
                needed="the bare name of a .safetensors file in the same folder",
                fix=f"download {INDEX} again; do not trust where this one came from",
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise LexigraftError(
            f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(names)} shards)",
            needed=f"every shard that {INDEX} names",
            fix="download the missing files",
        )
    return names


def is_bare_name(name: str) -> bool:
    r"""True for the name of a safetensors file that cannot leave its folder.

    >>> is_bare_name("model-00001-of-00002.safetensors"), is_bare_name("../x.safetensors")
    (True, False)
    """
    return (
        name.endswith(".safetensors")
        and not any(character in name for character in "/\\\0:")
        and not name.startswith(".")
    )


def _joined(folder: Path, headers: Mapping[str, Header]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for header in headers.values():
        for tensor in header.tensors:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                # Loaders take the last file, whatever the index says: a stale copy would win.
                raise LexigraftError(
                    f"{tensor.name} is both in {other.path.name} and in {tensor.path.name}",
                    needed="each tensor once",
                    fix=f"remove the stale shard from {folder}, or download the model again",
                )
    return tensors


def _compare_with_index(folder: Path, index: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, shard in index["weight_map"].items():
        if name not in tensors:
            raise LexigraftError(
                f"{folder / INDEX} names {name}, which no shard holds",
                needed=f"{name} in {shard}",
                fix=f"download {shard} and {INDEX} again",
            )
        if tensors[name].path.name != shard:
            raise LexigraftError(
                f"{INDEX} says that {name} is in {shard}, but {tensors[name].path.name} holds it",
                needed="an index that fits its shards",
                fix=f"download {shard} and {INDEX} again",
            )
