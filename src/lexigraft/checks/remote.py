"""A model on the hub seen through its headers: nothing of its weights is downloaded.

Method: the small files of one commit come from the hub cache; of each file of weights the first
bytes are asked for, as far as its header goes (HTTP range requests, by huggingface_hub).
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from lexigraft.checkpoints.gguf_header import read_gguf_header
from lexigraft.checkpoints.header import HEADER_LIMIT_BYTES
from lexigraft.errors import LexigraftError
from lexigraft.hub import HUB, SMALL_FILES, snapshot, unreached

# Weights, and formats of which the name alone tells something.
_STAND_INS = (".safetensors", ".gguf", ".bin", ".pth")
# One request brings so much: more than most headers of safetensors have.
_BLOCK_BYTES = 2**17
# A GGUF header does not say how long it is. That of a vocabulary of 262,144 has 30 MB.
_GGUF_BYTES = (2**17, 2**20, 2**23, 2**26)
_AT_A_TIME = 8


@contextmanager
def headers_of(name: str) -> Iterator[Path]:
    """The model of a hub id as a folder for readers of headers, all of it of one commit.

    Where the cache lacks the weights, sparse files of their true size stand in for them, which
    hold the header and then nothing. They lie in a private folder, which is gone at the end.

    Raises:
        LexigraftError: the hub has no such model, or cannot be reached.
    """
    cached = snapshot(name, SMALL_FILES)
    repository = name.removeprefix(HUB).partition("@")[0]
    # A folder of which nothing is wanted is not made: globs of it find nothing.
    with TemporaryDirectory(prefix="lexigraft-") as scratch:
        folder = Path(scratch)
        # The clients of huggingface_hub's versions differ in what they raise.
        try:
            stood_in = _stand_ins(repository, cached, folder)
        except Exception as fault:
            if any(path.name.endswith(_STAND_INS) for path in cached.glob("*")):
                stood_in = False  # no network, but the weights are there from an earlier time
            else:
                raise unreached(name, fault) from None
        if stood_in:
            for file in (path for path in cached.glob("*") if path.is_file()):
                shutil.copyfile(file, folder / file.name)
        yield folder if stood_in else cached


def _stand_ins(repository: str, cached: Path, folder: Path) -> bool:
    """Write a stand-in for each file of weights that the cache lacks; False if it lacks none."""
    from huggingface_hub import HfFileSystem

    hub, commit = HfFileSystem(), cached.name
    listed: list[Any] = hub.ls(f"{repository}@{commit}", detail=True)
    sizes = {Path(entry["name"]).name: int(entry["size"] or 0) for entry in listed}
    missing = {
        file: size
        for file, size in sizes.items()
        if file.endswith(_STAND_INS) and not (cached / file).exists()
    }

    def stand_in(file: str) -> None:
        path = f"{repository}@{commit}/{file}"
        with hub.open(path, "rb", block_size=_BLOCK_BYTES) as stream:
            _write(folder / file, missing[file], stream)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(stand_in, missing))
    return bool(missing)


def _write(path: Path, size: int, source: BinaryIO) -> None:
    """A sparse file of `size` bytes that begins with the header of `source`."""
    with path.open("wb") as stream:
        stream.truncate(size)
        if path.suffix == ".safetensors" and size >= 8:
            stream.write(first := source.read(8))
            length = struct.unpack("<Q", first)[0]
            if length <= min(HEADER_LIMIT_BYTES, size - 8):
                stream.write(source.read(length))
        for end in _GGUF_BYTES if path.suffix == ".gguf" else ():
            stream.write(source.read(end - stream.tell()))
            stream.flush()
            if end >= size or _is_whole(path, end):
                break


def _is_whole(path: Path, end: int) -> bool:
    """Does the header of a GGUF file end within the `end` bytes that are there?"""
    try:
        return read_gguf_header(path).bytes <= end
    except LexigraftError:
        return False
