"""The streaming rewrite: a plan becomes files, in constant memory, shards in parallel."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, BinaryIO

from lexigraft.checkpoints.checkpoint import INDEX
from lexigraft.checkpoints.header import raw
from lexigraft.checkpoints.plan import Compute, CopyRows, Plan, PlannedFile
from lexigraft.console import Advance
from lexigraft.errors import LexigraftError
from lexigraft.files import changed, fsync_path, require_free_space, write_json

# What a call copies stays in the processor's cache: 64 MB at a time cost twice the CPU seconds.
COPY_STEP_BYTES = 4 * 2**20
BUFFER_BYTES = 2**20
# How far copies run ahead of the disk before it is told to begin.
FLUSH_STEP_BYTES = 32 * 2**20
WRITERS = 4
# Room for tokenizer, config and the like beside the weights.
SIDE_FILES_BYTES = 64 * 2**20

# What kernels and file systems say when they cannot copy within themselves.
_NO_KERNEL_COPY = {
    *(errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY)
}
_FICLONE = 0x40049409  # linux/fs.h, _IOW(0x94, 9, int)


def write_plan(
    plan: Plan,
    out: Path,
    *,
    link: bool = False,
    threads: int | None = None,
    advance: Advance | None = None,
    meanwhile: Callable[[], None] | None = None,
    look: Callable[[Path], None] | None = None,
    beside: int = 0,
    replay: bool = False,
) -> tuple[int, int]:
    """Write the shards and the index of `plan` into the folder `out`.

    Returns the bytes of tensors copied from the input, and the bytes of weights put on the disk.

    Peak memory is one copy buffer and one computed block per thread, whatever the model's size.
    Each file is flushed to the disk. A shard that does not change is taken over without a byte
    written, and not counted, where the file system can: with `link` as a hard link of the input's
    (resolved) file, else by sharing its blocks. Room is asked for what is left, before its first
    byte.

    Args:
        plan: what to write.
        out: an existing, empty folder; usually the one that `files.publish` gives.
        link: hard-link unchanged shards.
        threads: how many shards at a time, 4 at most and by default: while one is flushed to
            the disk, others are copied.
        advance: called with every number of bytes written (or linked).
        meanwhile: called once, in the caller's thread, while the others write.
        look: called with each file that does not equal an input, when its bytes are written and
            before they are flushed, in the thread that wrote them; what it raises stops all.
        beside: bytes of what `meanwhile` writes, if that may be much: room is asked for them too.
        replay: read each file back and hold every tensor against what it was made of.

    Raises:
        LexigraftError: the disk lacks room, an input became shorter, or a file does not hold what
            was written to it.
    """
    taken = {file.name for file in plan.files if _taken_over(file, out, link)}
    left = sum(file.bytes for file in plan.files if file.name not in taken)
    require_free_space(out, left + max(beside, SIDE_FILES_BYTES))
    stopped = threading.Event()

    def step(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        if advance is not None:
            advance(count)

    workers = max(1, min(threads or WRITERS, WRITERS, len(plan.files)))
    with ThreadPoolExecutor(workers) as pool:
        # Computed values take longest: they come first, so that they are not what is waited for.
        files = sorted(plan.files, key=lambda file: file.verbatim is not None)
        jobs = [
            pool.submit(_flush, file, out, step, replay)
            if file.name in taken
            else pool.submit(_write_file, file, out, step, look, replay)
            for file in files
        ]
        try:
            if meanwhile is not None:
                meanwhile()
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            failed = [job for job in done if job.exception()]
            sizes = [job.result() for job in failed or jobs]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    index = plan.index_content()
    if index is not None:
        write_json(out / INDEX, index)
    return sum(copied for copied, _ in sizes), sum(written for _, written in sizes)


def _ignore(count: int) -> None:
    """`advance` where nobody is watching."""


def _taken_over(file: PlannedFile, out: Path, link: bool) -> bool:
    """Put an unchanged shard in its place without writing it; False where that cannot be done."""
    if file.verbatim is None:
        return False
    target = out / file.name
    if not (link and _linked(file.verbatim, target)) and not _cloned(file.verbatim, target):
        return False
    if target.stat().st_size != file.bytes:
        raise changed(file.verbatim, "changed its size")
    return True


def _flush(file: PlannedFile, out: Path, advance: Advance, replay: bool) -> tuple[int, int]:
    fsync_path(out / file.name)
    advance(file.bytes)
    if replay:
        _replay(file, out / file.name, ())
    return 0, 0


def _write_file(
    file: PlannedFile,
    out: Path,
    advance: Advance,
    look: Callable[[Path], None] | None,
    replay: bool,
) -> tuple[int, int]:
    target = out / file.name
    computed: list[bytes] | None = [] if replay else None
    with target.open("xb", buffering=0) as stream:  # mode 0666 & ~umask, as any other file
        if file.verbatim is not None:
            _copy(file.verbatim, 0, file.bytes, stream, advance)
        else:
            _write(stream, file.head, advance)
            for run in _runs(part for tensor in file.tensors for part in tensor.parts):
                _write_part(run, stream, advance, computed)
        size = stream.tell()
        if look is not None and file.verbatim is None:
            look(target)
        os.fsync(stream.fileno())
    if computed is not None:
        _replay(file, target, computed)
    return sum(tensor.bytes_copied for tensor in file.tensors), size


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without links: copied instead
        return False
    return True


def _cloned(source: Path, target: Path) -> bool:
    """Share the blocks of `source`, where the file system can (btrfs, XFS, bcachefs)."""
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    with source.open("rb") as stream, target.open("xb") as clone:
        try:
            fcntl.ioctl(clone.fileno(), _FICLONE, stream.fileno())
        except OSError as fault:
            if fault.errno not in _NO_KERNEL_COPY:
                raise
            target.unlink()
            return False
    return True


def _replay(file: PlannedFile, target: Path, computed: Iterable[bytes]) -> None:
    """Hold a file, read from the disk, against its sources and the digests of what was computed."""
    digests = iter(computed)
    with target.open("rb", buffering=0) as stream:
        if sys.platform.startswith("linux"):  # what is on the disk, not what memory has of it
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.verbatim is not None:
            if not _equal(stream, file.verbatim, 0, file.bytes):
                raise _damaged(target, "the file")
            return
        if stream.read(len(file.head)) != file.head:
            raise _damaged(target, "the header")
        for tensor in file.tensors:
            for part in tensor.parts:
                if isinstance(part, CopyRows):
                    same = _equal(stream, part.tensor.path, part.begin, part.bytes)
                else:
                    digest = hashlib.sha256()
                    for block in _blocks(stream, part.bytes):
                        digest.update(block)
                    same = digest.digest() == next(digests)
                if not same:
                    raise _damaged(target, tensor.name)


def _equal(stream: BinaryIO, path: Path, begin: int, count: int) -> bool:
    """Whether the next `count` bytes of `stream` are those of `path` from byte `begin` on."""
    with path.open("rb", buffering=0) as source:
        source.seek(begin)
        pairs = zip(_blocks(stream, count), _blocks(source, count), strict=True)
        return all(one == other for one, other in pairs)


def _blocks(stream: BinaryIO, count: int) -> Iterator[bytes]:
    """The next `count` bytes, or fewer at the end of the file, in blocks of one size."""
    while count > 0:
        block = stream.read(min(count, BUFFER_BYTES))
        count -= len(block) or count
        yield block


def _damaged(target: Path, what: str) -> LexigraftError:
    return LexigraftError(
        f"{what} of {target.name}, read back, is not what was written",
        needed="a disk that gives back what it was given, and inputs that stay as they are",
        fix="run the command again, and look at the disk if it says the same",
    )


def _write_part(
    part: tuple[Path, int, int] | Compute,
    stream: BinaryIO,
    advance: Advance,
    computed: list[bytes] | None,
) -> None:
    """Write a part; the digest of what was computed, as it was handed over, joins `computed`."""
    if not isinstance(part, Compute):
        _copy(*part, stream, advance)
        return
    left, digest = part.bytes, hashlib.sha256()
    for block in part.blocks():
        data = raw(block)
        left -= len(data)
        if left < 0:
            break
        if computed is not None:
            digest.update(data)
        _write(stream, data, advance)
    if computed is not None:
        computed.append(digest.digest())
    if left:
        raise ValueError(f"{abs(left)} bytes too {'few' if left > 0 else 'many'} computed")


def _runs(
    parts: Iterable[CopyRows | Compute],
) -> Iterator[tuple[Path, int, int] | Compute]:
    """Join copies of neighbouring bytes: an untouched stretch of a shard is one copy."""
    run: tuple[Path, int, int] | None = None
    for part in parts:
        if isinstance(part, CopyRows):
            path = part.tensor.path
            if run and run[0] == path and run[1] + run[2] == part.begin:
                run = (path, run[1], run[2] + part.bytes)
                continue
            if run:
                yield run
            run = (path, part.begin, part.bytes)
            continue
        if run:
            yield run
            run = None
        yield part
    if run:
        yield run


def _write(stream: IO[bytes], data: bytes | memoryview, advance: Advance) -> None:
    view = memoryview(data)
    while view:
        count = stream.write(view)
        advance(count)
        view = view[count:]


def _copy(path: Path, begin: int, count: int, stream: BinaryIO, advance: Advance) -> None:
    """Append `count` bytes of `path` from byte `begin` on to `stream`."""
    with path.open("rb", buffering=0) as source:
        source.seek(begin)
        ways, begun, place = _ways(), stream.tell(), stream.tell()
        while count:
            try:
                done = ways[0](source, stream, min(count, COPY_STEP_BYTES))
            except OSError as fault:
                if len(ways) == 1 or fault.errno not in _NO_KERNEL_COPY:
                    raise
                ways.pop(0)
                continue
            if not done:
                raise changed(path, "became shorter")
            count -= done
            place += done
            if place - begun >= FLUSH_STEP_BYTES or not count:
                _begin_flush(stream, begun, place)
                begun = place
            advance(done)


def _begin_flush(stream: BinaryIO, begin: int, end: int) -> None:
    """Let the disk write bytes [begin, end) while more is copied or computed.

    On Linux this advice starts the writing of what is not yet on the disk and drops what is; just
    written pages are of the first kind, so they stay at hand. The fsync at the end waits less.
    """
    if sys.platform.startswith("linux"):
        os.posix_fadvise(stream.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def _ways() -> list[Callable[[BinaryIO, BinaryIO, int], int]]:
    """What copies some bytes on this system, within the kernel first."""
    ways: list[Callable[[BinaryIO, BinaryIO, int], int]] = [_buffer_copy]
    if sys.platform.startswith("linux"):  # elsewhere its target must be a socket
        ways.insert(0, _sent)
    if hasattr(os, "copy_file_range"):
        ways.insert(0, _kernel_copy)
    return ways


def _kernel_copy(source: BinaryIO, target: BinaryIO, count: int) -> int:
    return os.copy_file_range(source.fileno(), target.fileno(), count)


def _sent(source: BinaryIO, target: BinaryIO, count: int) -> int:
    return os.sendfile(target.fileno(), source.fileno(), None, count)


def _buffer_copy(source: BinaryIO, target: BinaryIO, count: int) -> int:
    data = source.read(min(count, BUFFER_BYTES))
    _write(target, data, _ignore)
    return len(data)
