"""Files and folders: content hashes, guarded JSON, and outputs that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft.errors import LexigraftError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK_NAME = ".lexigraft-lock"
MANIFEST = "lexigraft.json"
NEW_TOKENS = "new_tokens.jsonl"  # beside it, one line per new token
CARD, BASE_CARD = "README.md", "README.base.md"  # what a model says of itself, and its base did
CARD_MARK = "<!-- lexigraft card "  # at the end of a card that we wrote
# What a rename meets where another run came first: something is there, or no longer there.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
# The largest JSON file we know of is a 33 MB tokenizer.json (Gemma 3); indexes stay below 10 MB.
JSON_LIMIT_BYTES = 512 * 2**20
# Real configs nest less than ten deep; what walks through one must not run out of stack. Looked at
# in files up to a size: larger ones are vocabularies and indexes, which nothing walks through.
JSON_DEPTH = 100
_DEPTH_LIMIT_BYTES = 2**20
_FLUSHERS = 8
_HOLDERS = frozenset((dict, list))  # what JSON nests


def python_child(code: str, *arguments: str) -> list[str]:
    """The command of a child process that runs Python `code`.

    With `-c` Python looks for modules in the current folder first, which may be a stranger's.
    """
    safe = "import sys; sys.path[:] = [place for place in sys.path if place]\n"
    return [sys.executable, "-c", safe + code, *arguments]


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            state.update(block)
    return state.hexdigest()


def canonical_json(value: Any) -> bytes:
    """`value` as JSON bytes that depend on its content alone: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of `canonical_json(value)`."""
    return sha256_bytes(canonical_json(value))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        LexigraftError: the file is missing, too large, nested too deep, or no JSON.
    """
    if not path.is_file():
        raise LexigraftError(f"no file {path}", needed="a JSON file there", fix=f"ls {path.parent}")
    size = path.stat().st_size
    if size > JSON_LIMIT_BYTES:
        raise LexigraftError(
            f"{path} has {size:,} bytes",
            needed=f"at most {JSON_LIMIT_BYTES:,} bytes of JSON",
            fix="check where this file comes from",
        )
    try:
        with _without_collection():
            content = json.loads(path.read_bytes())
    except OSError as fault:
        raise LexigraftError(
            f"{path}: {fault.strerror}", needed="a file that can be read", fix=f"ls -lL {path}"
        ) from None
    except (ValueError, RecursionError) as fault:
        raise LexigraftError(
            f"{path} is not valid JSON ({type(fault).__name__}: {fault})",
            needed="valid JSON",
            fix="download or write that file again",
        ) from None
    if size <= _DEPTH_LIMIT_BYTES and _depth(content) > JSON_DEPTH:
        raise LexigraftError(
            f"{path} is nested more than {JSON_DEPTH} deep",
            needed="a file as its program writes it",
            fix="check where this file comes from",
        )
    return content


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No search for dead cycles: a parser makes none, and each search walks all that it has made.

    It takes as long again as the parsing of a vocabulary does.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that has to be an object.

    Raises:
        LexigraftError: the file cannot be read, or is a list, a number or a text.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise LexigraftError(
            f"{path} is not a JSON object",
            needed="an object, as its program writes it",
            fix=f"copy {path.name} again from the model it belongs to",
        )
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file that need not be there; {} where it is not, or holds no object.

    Raises:
        LexigraftError: the file cannot be read.
    """
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _depth(value: Any) -> int:
    """How deep a JSON value is nested, as far as one beyond the limit."""
    level, depth = [value] if type(value) in _HOLDERS else [], 0
    while level and depth <= JSON_DEPTH:
        parts = (holder.values() if type(holder) is dict else holder for holder in level)
        inner = list(chain.from_iterable(parts))
        # Most levels of a vocabulary hold plain values alone, which is told without a loop.
        nested = not _HOLDERS.isdisjoint(map(type, inner))
        level = [one for one in inner if type(one) in _HOLDERS] if nested else []
        depth += 1
    return depth


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in the order of its keys, ending in a line break."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def write_whole(path: Path, text: str) -> None:
    """Write one file whole or not at all, in place of what may be there."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(text.encode("utf-8", "surrogatepass"))
        fsync_path(partial)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)  # noqa: PTH105 - the call that is atomic on every system
    fsync_path(path.parent)


def is_there(path: Path) -> bool:
    """True if `path` exists; False also for what no file can be called (too long, a NUL)."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists() raises for such names


def require_folder(path: Path, what: str) -> Path:
    """`path` itself, if it is a folder.

    Raises:
        LexigraftError: it is missing or a file; `what` says what was looked for.
    """
    if is_there(path) and path.is_dir():
        return path
    found = f"{path} is a file" if is_there(path) else f"no folder {path}"
    raise LexigraftError(found, needed=f"a folder with {what}", fix=f"ls {path.parent}")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        LexigraftError: one cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise _cannot_create(folder, fault) from None


def _cannot_create(folder: Path, fault: OSError) -> LexigraftError:
    return LexigraftError(
        f"cannot create {folder} ({fault.strerror})",
        needed="a folder that can be written",
        fix="choose another -o",
    )


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Stop before the first byte when the disk that holds `folder` lacks `needed_bytes`.

    Raises:
        LexigraftError: less is free.
    """
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed_bytes:
        raise LexigraftError(
            f"{free / 1e9:,.2f} GB free on the disk of {existing_parent(folder.parent)}",
            needed=f"{needed_bytes / 1e9:,.2f} GB",
            fix="free some space or choose another -o",
        )


def existing_parent(path: Path) -> Path:
    """`path` itself or the nearest folder above it that is there."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def fsync_path(path: Path) -> None:
    """Flush one file, or a folder's list of names, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder cannot be opened on Windows; renames are durable there
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, then `folder` itself."""
    from concurrent.futures import ThreadPoolExecutor  # whoever only reads needs none

    with ThreadPoolExecutor(_FLUSHERS) as pool:  # file systems flush together what waits together
        for parent, _, names in os.walk(folder, topdown=False):
            paths = (Path(parent, name) for name in names)
            for _ in pool.map(fsync_path, [path for path in paths if not path.is_symlink()]):
                pass  # a fault of one is raised here
            fsync_path(Path(parent))


class Inputs:
    """The files of a step as they were before any was read; a change since then is told.

    A file is the same while its size, its time of change and its inode are: a hard link to it
    changes none of them.
    """

    def __init__(self, places: Iterable[Path]) -> None:
        """Look at `places`: files, and folders, of which every file right in them counts."""
        self._states = {file: _state(file) for place in places for file in _files_at(place)}

    def require_unchanged(self) -> None:
        """Stop where a file is no longer what it was.

        Raises:
            LexigraftError: it was rewritten, replaced or removed.
        """
        for file, before in self._states.items():
            if _state(file) != before:
                raise changed(file, "was changed")


def changed(path: Path | None, how: str) -> LexigraftError:
    """What to say of an input that did not stay as it was; `how` says what became of it."""
    return LexigraftError(
        f"{path} {how} while it was read",
        needed="inputs that stay as they are",
        fix="run the command again when nothing else writes there",
    )


def _files_at(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    return [path for path in place.iterdir() if path.is_file() and not path.name.startswith(".")]


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        state = file.stat()
    except OSError:  # it is gone
        return None
    return state.st_size, state.st_mtime_ns, state.st_ino


@contextlib.contextmanager
def publish(output: Path, *, force: bool = False, inputs: Inputs | None = None) -> Iterator[Path]:
    """A new folder to work in; it becomes `output` when the block ends, and only then.

    The folder is `OUT.partial-<random>` beside `output`, locked while we live. At the end it is
    flushed to the disk and renamed. When the block raises, it is removed and `output` is as it
    was. With `force` an existing `output` is moved aside, replaced, then deleted.

    Raises:
        LexigraftError: `output` exists and `force` is off, its parent cannot be written,
            another run has written `output` since, or one of `inputs` has changed.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a symlink
    refuse_existing(output, force=force)
    with scratch(output) as partial:
        yield partial
        if inputs is not None:
            inputs.require_unchanged()
        fsync_tree(partial)
        replace_folder(partial, output, force=force)


@contextlib.contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A new folder beside `output` for what is needed on the way; removed at the end.

    It is `OUT.partial-<random>`, locked while we live; those of runs that were killed are removed.
    The lock lies beside the folder and is there before and after it, so that a folder without one
    belongs to nobody, whenever its run was killed.

    Raises:
        LexigraftError: the parent of `output` cannot be written, or the disk is full.
    """
    from filelock import FileLock  # whoever only reads needs none

    place = Path(os.path.abspath(output))  # noqa: PTH100 - as in `publish`
    _remove_dead_partials(place)
    partial = place.with_name(f"{place.name}.partial-{os.urandom(4).hex()}")
    lock = FileLock(_lock_of(partial))
    make_folder(place.parent)
    try:
        with disk_faults(output):
            try:
                lock.acquire()
            except OSError as fault:
                if fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise _cannot_create(place, fault) from None
                raise
            make_folder(partial)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there once it is published
        _let_go(lock)


def _lock_of(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _let_go(lock: FileLock) -> None:
    lock.release(force=True)
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)


def refuse_existing(output: Path, *, force: bool) -> None:
    """Raise when `output` exists and may not be replaced."""
    if (output.exists() or output.is_symlink()) and not force:
        raise LexigraftError(
            f"{output} exists",
            needed="a new folder, so that nothing is lost",
            fix="choose another -o, or add --force to replace it",
        )


def refuse_overwriting(output: Path, inputs: Iterable[Path]) -> None:
    """Raise when writing `output` would change one of `inputs`, files or folders.

    Replacing an existing output deletes what it holds; an output inside an input adds to it.
    """
    target = output.resolve()
    for path in inputs:
        place = path.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise LexigraftError(
                f"-o {output} is the input {path} itself, holds it or lies in it",
                needed="another folder: inputs are never modified",
                fix="choose another -o",
            )


def replace_folder(partial: Path, output: Path, *, force: bool = False) -> None:
    """Rename `partial` to `output`; with `force` an old `output` is moved aside first.

    Raises:
        LexigraftError: another run has written `output` since; both its result and what was there
            before are kept.
    """
    aside: Path | None = None
    try:
        if force and (output.exists() or output.is_symlink()):
            aside = output.with_name(f"{output.name}.old-{os.urandom(4).hex()}")
            output.rename(aside)
        partial.rename(output)
    except OSError as fault:
        before = ""
        if aside is not None and (aside.exists() or aside.is_symlink()):
            try:
                aside.rename(output)
            except OSError:
                before = f"; what was there before is in {aside.name}"
        if fault.errno not in _TAKEN or not partial.exists():
            raise
        raise LexigraftError(
            f"another run has written {output} meanwhile{before}",
            needed="one run at a time for an output; its result is kept, this one is not",
            fix="choose another -o and run again",
        ) from None
    fsync_path(output.parent)
    if aside is not None:
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink()


def _remove_dead_partials(output: Path) -> None:
    """Remove partial folders of `output` whose lock nobody holds: their run was killed."""
    import glob

    from filelock import FileLock, Timeout

    found = {
        path.with_name(path.name.removesuffix(".lock"))
        for path in output.parent.glob(f"{glob.escape(output.name)}.partial-*")
    }
    for partial in found:
        lock = FileLock(_lock_of(partial))
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        shutil.rmtree(partial, ignore_errors=True)
        _let_go(lock)


@contextlib.contextmanager
def full_disk(output: Path) -> Iterator[None]:
    """A disk that fills up while `output` is made, in the user's terms; other faults as they are.

    Raises:
        LexigraftError: a full disk.
    """
    try:
        yield
    except Exception as fault:
        number = _system_error(fault)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        limit = " (a limit on the size of files)" if number == errno.EFBIG else ""
        raise LexigraftError(
            f"the disk of {output} is full{limit}",
            needed="room for the whole output",
            fix="free some space or choose another -o",
        ) from fault


def _system_error(fault: Exception) -> int | None:
    """The system's number of a fault, also of one that native code tells in words alone."""
    if isinstance(fault, OSError):
        return fault.errno
    if told := re.search(r"\(os error (\d+)\)", str(fault)):  # Rust: safetensors, tokenizers
        return int(told[1])
    # torch.save, whose writer never says why; what it wrote is shorter than what it was given.
    if "inline_container" in str(fault) and "unexpected pos" in str(fault):
        return errno.ENOSPC
    return None


@contextlib.contextmanager
def disk_faults(output: Path) -> Iterator[None]:
    """What the system says of a disk while `output` is made, in the user's terms.

    Raises:
        LexigraftError: a full disk, or a file that cannot be written or read.
    """
    try:
        with full_disk(output):
            yield
    except OSError as fault:
        raise LexigraftError(
            f"{fault.filename or output}: {fault.strerror or fault}",
            needed="a folder that can be written, and inputs that can be read and stay as they are",
            fix="mend the permissions, or run the command again when nothing else writes there",
        ) from fault
