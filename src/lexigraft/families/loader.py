"""transformers' own loader as one more engine to prove against, in a child process.

What users call is `AutoTokenizer.from_pretrained`, which chooses a class, may convert a
`tokenizer.model` and may replace normalizer and pre-tokenizer. It runs in a child so that neither
transformers nor a crash of native code comes into the process that learns. torch is hidden from
the child: tokenizers do not need it, and its import is most of the start (4 s with, 1.5 s without).
A child that has done its work waits some seconds for more, so that the next need not be started.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lexigraft.errors import LexigraftError
from lexigraft.families import Family, copy_tokenizer
from lexigraft.families.proof import proof_texts
from lexigraft.files import python_child

MOST_TEXTS = 1_000
MOST_CHARACTERS = 1_000_000
_SECONDS = 300.0  # for one answer; the first one includes transformers' imports
_IDLE_SECONDS = 10.0  # how long a child waits for its next use

# One JSON object a line on stdin and stdout. What libraries print goes to stderr instead.
_CHILD = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w", encoding="ascii")
os.dup2(2, 1)
sys.modules["torch"] = None
from transformers import AutoTokenizer

folder = tokenizer = None
for line in sys.stdin:
    request = json.loads(line)
    try:
        if request["anew"] or folder != request["folder"]:
            folder = None
            began = time.perf_counter()
            tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=False)
            seconds = time.perf_counter() - began
            folder = request["folder"]
        texts = request["texts"]
        ids = texts and tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        plain, without = (
            [tokenizer.decode(one, skip_special_tokens=skip) for one in ids]
            for skip in (False, True)
        )
        answer = {
            "ids": ids, "decoded": plain, "without_special": without,
            "tokens": max(tokenizer.get_vocab().values()) + 1, "seconds": seconds,
        }
    except BaseException as fault:  # a panic of the native code is no Exception
        words = " ".join(str(fault).split())[:300]
        answer = {"fault": type(fault).__name__ + (": " + words if words else "")}
    print(json.dumps(answer), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Reading:
    """What transformers makes of some texts.

    Attributes:
        ids: of each text, without the tokens that a template adds.
        decoded: the text of those ids.
        without_special: the same with `skip_special_tokens=True`.
        tokens: highest id + 1.
        seconds: how long the tokenizer took to load.
    """

    ids: list[list[int]]
    decoded: list[str]
    without_special: list[str]
    tokens: int
    seconds: float


class _Child:
    """The process, and what it writes to stderr."""

    def __init__(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        self.process = subprocess.Popen(
            python_child(_CHILD),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            env=environment,
        )

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class _Spare:
    """At most one child that waits for its next use, and ends if there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._end = threading.Timer(0, self.drop)

    def take(self) -> _Child | None:
        """The waiting child, if it lives."""
        with self._lock:
            self._end.cancel()
            child, self._child = self._child, None
        if child is not None and child.process.poll() is not None:
            child.end()
            return None
        return child

    def keep(self, child: _Child) -> None:
        self.drop()
        with self._lock:
            self._child = child
            self._end = threading.Timer(_IDLE_SECONDS, self.drop)
            self._end.daemon = True
            self._end.start()

    def drop(self) -> None:
        if (child := self.take()) is not None:
            child.end()


_spare = _Spare()
atexit.register(_spare.drop)


class TransformersLoader:
    """`AutoTokenizer` in a child process: no torch, no remote code, no network.

    Entering the context starts the child and does not wait for it, so its imports overlap with
    whatever the caller does next. `reason` says why the last `read` gave None.
    """

    def __init__(self, *, seconds: float = _SECONDS) -> None:
        self.reason: str | None = None
        self._seconds = seconds
        self._child: _Child | None = None
        self._anew = True  # a child may remember a folder as it was for somebody before
        self._sound = True  # it has answered whatever it was asked, always without a fault

    def __enter__(self) -> TransformersLoader:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the child, or take one that waits; returns at once."""
        if self._child is None:
            self._child = _spare.take() or _Child()
            self._anew = self._sound = True

    def close(self) -> None:
        """Leave the child to the next user; end it if it may not be sound."""
        child, self._child = self._child, None
        if child is not None:
            if self._sound and child.process.poll() is None:
                _spare.keep(child)
            else:
                child.end()

    def encode(self, folder: Path, texts: Sequence[str]) -> list[list[int]] | None:
        """Ids of each text without template tokens; None if transformers could not."""
        reading = self.read(folder, texts)
        return reading.ids if reading else None

    def read(self, folder: Path, texts: Sequence[str]) -> Reading | None:
        """What transformers makes of `texts`; None, with `reason`, if it fails, dies or hangs."""
        answer = self._ask({"folder": str(Path(folder).resolve()), "texts": list(texts)})
        fault = answer.pop("fault", None)
        self.reason = f"transformers could not load {folder} ({fault})" if fault else None
        return None if fault else Reading(**answer)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self.start()
        assert self._child is not None
        process = self._child.process
        assert process.stdin is not None and process.stdout is not None
        request = json.dumps({**question, "anew": self._anew})
        sound, self._sound = self._sound, False
        # Killing the child ends a blocked write as well as a blocked read.
        watch = threading.Timer(self._seconds, process.kill)
        watch.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            late = not watch.is_alive()
            watch.cancel()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            self._anew, self._sound = False, sound and "fault" not in answer
            return answer
        fault = f"no answer in {self._seconds:.0f} s" if late else self._last_words(self._child)
        self.close()  # the next question starts a new child
        return {"fault": fault}

    def _last_words(self, child: _Child) -> str:
        code = child.process.wait()
        child.errors.seek(0)
        lines = child.errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"it ended with status {code}" + (f": {lines[-1][:300]}" if lines else "")


@dataclass(frozen=True)
class LoaderProof:
    """Law 5 by transformers' loader.

    Attributes:
        compared: texts that it reads as the base's own engine does, proved equal in the extension.
        base_differences: texts that it reads otherwise in the base already.
        reason: why nothing could be compared, or None.
    """

    compared: int
    base_differences: int
    reason: str | None = None


def prove_loader(
    base: Family, extended: Family, texts: Iterable[str], loader: TransformersLoader
) -> LoaderProof:
    """Law 5, and law 3 with it, as transformers loads both folders.

    Where transformers reads a text as `base` does, it must read it as `extended` does in the
    extended folder, and decode it as before. At most `MOST_TEXTS` texts, of `MOST_CHARACTERS`
    together, are read.

    Raises:
        LexigraftError: it reads the extension otherwise, or cannot load it but can load the base.
    """
    sample = _bounded(proof_texts(base, texts))
    old = loader.read(base.folder, sample)
    if old is None:
        return LoaderProof(0, 0, loader.reason)
    new = _read_beside_config(loader, base.folder, extended.folder, sample)
    if new is None:
        raise _broken("", f"{loader.reason}; it loads the base")
    if old.tokens == base.map.tokens and new.tokens != extended.map.tokens:
        raise _broken("", f"it counts {new.tokens:,} tokens instead of {extended.map.tokens:,}")
    before, after = base.encode_batch(sample), extended.encode_batch(sample)
    compared = 0
    for place, text in enumerate(sample):
        if old.ids[place] != before[place]:
            continue
        compared += 1
        if new.ids[place] != after[place]:
            raise _broken(text, "it gives other ids than the extended files' own engine")
        if base.unknown_id in old.ids[place]:  # law 3 asks nothing of such a text
            continue
        for one, other in ((old.decoded, new.decoded), (old.without_special, new.without_special)):
            if one[place] != other[place]:
                raise _broken(text, f"it decodes {other[place][:200]!r}, before {one[place]!r}")
    return LoaderProof(compared, len(sample) - compared)


def _read_beside_config(
    loader: TransformersLoader, base: Path, extended: Path, texts: Sequence[str]
) -> Reading | None:
    """The extension, beside the base's config.json if there is one: it may decide the class."""
    if not (base / "config.json").is_file():
        return loader.read(extended, texts)
    with tempfile.TemporaryDirectory(prefix="lexigraft-") as scratch:
        copy_tokenizer(extended, Path(scratch))
        shutil.copyfile(base / "config.json", Path(scratch) / "config.json")
        return loader.read(Path(scratch), texts)


def _bounded(texts: Iterable[str]) -> list[str]:
    sample: list[str] = []
    characters = 0
    for text in texts:
        characters += len(text)
        if len(sample) == MOST_TEXTS or characters > MOST_CHARACTERS:
            break
        sample.append(text)
    return sample


def _broken(text: str, what: str) -> LexigraftError:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return LexigraftError(
        f"law 5 is broken on {shown!r} in transformers' loader: {what}",
        needed="files that every loader of the base reads alike; nothing was written",
        fix="report this base tokenizer and text as a bug of lexigraft",
    )
