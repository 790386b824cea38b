"""Unique stretches of a corpus and how often each occurs: all that `learn` needs of its text.

A document is cut into *chunks*: some spaces, then some breakers (line ends, tabs, dashes, quotes
and East Asian punctuation), then anything else. The chunks of a document, one after the other,
are the document. A cut stands before a space or a breaker, where no pre-tokenizer in use joins
what is before to what is behind: so the words of a chunk are segmented as they are in the text,
unless more than 512 characters stand without such a place.
A chunk has at most 1,584 characters, so that text without spaces stays bounded too.

Memory does not grow with the corpus: of a corpus with more than `cap` bytes or `most` different
chunks, a sample is counted, chosen by content hash. Its share is the largest of 1, 1/2, 1/4 ... for
which the sample fits into both. Like the held-out documents, it depends on the documents alone: not
on the order of files, on processes, or on where a file was split.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from lexigraft.console import note, progress
from lexigraft.corpus import content_digest, inputs, is_held_out, nothing_to_read, say_remarks
from lexigraft.errors import LexigraftError
from lexigraft.files import python_child
from lexigraft.hub import HUB
from lexigraft.text_formats import Part, Remarks, TextFile, parts_of, read_part

# Letters and marks stay out, such as 々 (U+3005), 〇 (U+3007) and the tone marks U+302A-302F: they
# belong to the word before them. So may symbols such as ＋ and ～: BERT splits at punctuation only.
_MARKS = (
    "\u2014\u2018-\u201d\u2026\u3001-\u3003\u3008-\u3011\u3014-\u301f\u3030\u303d"
    "\uff01-\uff03\uff05-\uff0a\uff0c-\uff0f\uff1a\uff1b\uff1f\uff20\uff3b-\uff3d\uff3f"
    "\uff5b\uff5d\uff5f-\uff65"
)
BREAKERS = f"\n\t\u3000{_MARKS}"
# Empty at the end of a text only. The last line: a mark behind anything but a letter or a digit
# is no place to cut, because pre-tokenizers take a run of marks as one (`)，` in `)，词`), and the
# word behind it begins without the mark then.
CHUNK = re.compile(
    f" {{0,128}}[{BREAKERS}]{{0,128}}[^ {BREAKERS}]{{0,512}}"
    rf"(?:(?<=[\W_])[{_MARKS}]{{1,16}}[^ {BREAKERS}]{{0,256}}){{0,3}}"
)

ENGINES = ("local", "ray")
_BATCH_BYTES = 2**20
MOST_CHUNKS = 2_000_000  # each takes some 300 bytes of memory, with the unit that comes from it
_CHUNK_BYTES = 16  # fewer than this many bytes per different chunk are no text of any length
_GROUPS = 4  # Ray tasks per core: enough to even out, few enough that their answers are small
_PARALLEL_FROM = 8_000_000  # bytes: below, a second process takes longer to start than to work


@dataclass(frozen=True)
class Counted:
    """The chunks of a corpus.

    Attributes:
        chunks: chunk -> occurrences in the sample times the weight of their source, rounded.
        bytes: UTF-8 bytes of all documents to learn from, before sampling and weights.
        documents: how many these are.
        held_out: held-out documents, those of the smallest content hashes, in their order.
        share: the part of the documents to learn from that was counted.
    """

    chunks: dict[str, int]
    bytes: int
    documents: int
    held_out: list[str]
    share: float


def count_chunks(
    specs: Sequence[str | Path],
    *,
    prefix: str = "",
    measured: int = 4_000_000,
    cap: int = 2**28,
    most: int = MOST_CHUNKS,
    engine: str = "local",
    workers: int | None = None,
) -> Counted:
    """Count the chunks of a corpus; documents that are `held_out` are kept apart.

    A corpus of held-out documents alone is learned from whole: `held_out` is then empty.

    Args:
        specs: files, folders, globs, data sets; see `lexigraft.corpus`.
        prefix: put before each document, as a tokenizer with a dummy prefix does.
        measured: UTF-8 bytes of held-out documents to return at most (one at least).
        cap: UTF-8 bytes of documents to count at most.
        most: different chunks to count at most; chunks of documents of different sampling level or
            source weight count as different.
        engine: `local` processes or a `ray` cluster, which must see the same files.
        workers: processes, or tasks at a time; default: one per core.

    Raises:
        LexigraftError: unreadable input, nothing to read, or an engine that is not there.
    """
    if engine not in ENGINES:
        raise LexigraftError(
            f"--engine {engine}", needed=" or ".join(ENGINES), fix="--engine local"
        )
    files = inputs(specs)
    stored = sum(file.size for file in files)
    # Text never has more bytes than a plain file that holds it.
    sampled = stored > min(cap, _CHUNK_BYTES * most) or any(file.compressed for file in files)
    task = Task(prefix, measured, cap, most, sampled=sampled, split=True)
    count = _count_on_ray if engine == "ray" else _count_here
    tally = count(task, files, stored, workers)
    if not tally.documents:
        if not tally.held:
            raise nothing_to_read(files)
        tally = count(replace(task, measured=0, split=False), files, stored, workers)
    for number, file in enumerate(files):
        say_remarks(file.name, tally.remarks.get(number, Remarks()))
    if tally.level:
        note(
            f"the corpus has {sum(tally.sizes.values()):,} bytes: counted is a sample of "
            f"1/{2**tally.level} of its documents, chosen by content hash"
        )
    counted = tally.result()
    if not counted.chunks:
        raise LexigraftError(
            f"nothing occurs once in {', '.join(str(spec) for spec in specs[:3])}: occurrences "
            "times weight are below 1",
            needed="weights that keep at least the frequent words",
            fix="leave #weight= out; if another text is to count more, give that one a weight "
            "above 1",
        )
    return counted


@dataclass(frozen=True)
class Task:
    """What every process must know.

    Attributes:
        sampled: whether the text may be larger than `cap`.
        split: whether held-out documents are kept apart.
    """

    prefix: str
    measured: int
    cap: int
    most: int
    sampled: bool
    split: bool

    def level_for(self, sizes: Mapping[int, int]) -> int:
        """The lowest level from which on the documents, of these sizes by level, fit `cap`."""
        level = 0
        left = sum(sizes.values())
        while self.sampled and left > self.cap:
            left -= sizes.get(level, 0)
            level += 1
        return level


@dataclass
class Tally:
    """What has been counted so far; tallies of parts add up to the tally of the whole.

    A document has a level, drawn from its hash: level 0 is one half of all documents, level 1 a
    quarter, and so on. The counts of the lowest levels are dropped as soon as more than `cap`
    bytes or `most` chunks are counted. All parts together drop at least what any of them drops, so
    what is left in the end is the same however the parts were divided.

    Attributes:
        counts: (level, weight) -> counted chunks.
        sizes: level -> UTF-8 bytes of its documents to learn from.
        level: the lowest level that is still counted.
        held: content hash and text of held-out documents.
        remarks: what was cleaned, by the number of the file.
    """

    task: Task
    counts: dict[tuple[int, float], Counter[str]] = field(default_factory=dict)
    sizes: Counter[int] = field(default_factory=Counter)
    documents: int = 0
    level: int = 0
    held: list[tuple[bytes, str]] = field(default_factory=list)
    held_bytes: int = 0
    remarks: dict[int, Remarks] = field(default_factory=dict)

    def add_part(self, number: int, part: Part) -> None:
        """Count the documents of a part of file `number`."""
        remarks = self.remarks.setdefault(number, Remarks())
        batch: list[str] = []
        size = 0
        for document in read_part(part, remarks):
            batch.append(document)
            size += len(document)
            if size >= _BATCH_BYTES:
                self._add(batch, part.file.weight)
                batch, size = [], 0
        self._add(batch, part.file.weight)

    def absorb(self, other: Tally) -> None:
        """Add what another process has counted."""
        for key, counts in other.counts.items():
            if key in self.counts:
                self.counts[key].update(counts)
            else:
                self.counts[key] = counts
        self.sizes.update(other.sizes)
        self.documents += other.documents
        self.held.extend(other.held)
        self.held_bytes += other.held_bytes
        for number, remarks in other.remarks.items():
            self.remarks.setdefault(number, Remarks()).update(remarks)
        self.level = max(self.level, other.level)
        self._settle()

    def drop_below(self, level: int) -> None:
        """Stop counting documents of lower levels."""
        self.level = max(self.level, level)
        for key in [key for key in self.counts if key[0] < self.level]:
            del self.counts[key]

    def __getstate__(self) -> dict[str, Any]:
        """Chunks as one text: many times faster to pickle than each alone. None holds a NUL."""
        packed = {
            key: ("\0".join(counts), array("Q", counts.values()).tobytes())
            for key, counts in self.counts.items()
        }
        return {**self.__dict__, "counts": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.counts = {}
        for key, (chunks, data) in state["counts"].items():
            numbers = array("Q")
            numbers.frombytes(data)
            self.counts[key] = Counter(dict(zip(chunks.split("\0"), numbers, strict=True)))

    def result(self) -> Counted:
        """The sum over levels and weights."""
        by_weight: dict[float, Counter[str]] = {}
        for (_, weight), counts in sorted(self.counts.items(), key=lambda item: item[0]):
            if weight in by_weight:
                by_weight[weight].update(counts)
            else:
                by_weight[weight] = counts
        self.counts = {}
        self._shorten_held()
        return Counted(
            chunks=dict(_weighted(by_weight)),
            bytes=sum(self.sizes.values()),
            documents=self.documents,
            held_out=[document for _, document in self.held] if self.task.split else [],
            share=0.5**self.level,
        )

    def _add(self, documents: list[str], weight: float) -> None:
        levels: dict[int, list[str]] = {}
        for document in documents:
            digest = content_digest(document)
            size = len(document.encode())
            if self.task.split and is_held_out(digest):
                self.held.append((digest, document))
                self.held_bytes += size
                continue
            level = _level(digest) if self.task.sampled else 0
            self.sizes[level] += size
            self.documents += 1
            if level >= self.level:
                levels.setdefault(level, []).append(self.task.prefix + document)
        for level, texts in levels.items():
            counts = self.counts.setdefault((level, weight), Counter())
            counts.update(chain.from_iterable(map(CHUNK.findall, texts)))
        self._settle()

    def _settle(self) -> None:
        self.drop_below(self.task.level_for(self.sizes))
        while self.task.sampled and sum(map(len, self.counts.values())) > self.task.most:
            self.drop_below(self.level + 1)
        if self.held_bytes > 2 * self.task.measured:
            self._shorten_held()

    def _shorten_held(self) -> None:
        """Keep the smallest hashes; what all processes keep holds what the whole would keep."""
        self.held.sort()
        kept: list[tuple[bytes, str]] = []
        total = 0
        for digest, document in self.held:
            size = len(document.encode())
            if kept and total + size > self.task.measured:
                break
            kept.append((digest, document))
            total += size
        self.held, self.held_bytes = kept, total


def _level(digest: bytes) -> int:
    """Leading zero bits of the second quarter of a hash; the first decides what is held out."""
    return 64 - int.from_bytes(digest[8:16], "big").bit_length()


def _weighted(by_weight: dict[float, Counter[str]]) -> dict[str, int]:
    """The sum of counts times weights, rounded once; chunks that come to 0 are left out."""
    if by_weight.keys() <= {1.0}:
        total: dict[str, int] = by_weight.get(1.0, Counter())
    else:
        sums: dict[str, float] = {}
        for weight, counts in sorted(by_weight.items()):
            for chunk, count in counts.items():
                sums[chunk] = sums.get(chunk, 0.0) + weight * count
        total = {chunk: round(value) for chunk, value in sums.items() if round(value)}
    total.pop("", None)  # what the pattern finds at the end of each document
    return total


# --- on this machine -----------------------------------------------------------------------------


def _count_here(task: Task, files: Sequence[TextFile], stored: int, workers: int | None) -> Tally:
    parts = [(number, part) for number, file in enumerate(files) for part in parts_of(file)]
    processes = workers or (1 if stored < _PARALLEL_FROM else os.cpu_count() or 1)
    processes = min(processes, len(parts))
    tally = Tally(task)
    with progress("reading", stored) as advance:
        if processes > 1:
            _count_in_processes(tally, parts, processes, advance)
        else:
            for number, part in parts:
                tally.add_part(number, part)
                advance(part.size)
    return tally


def _count_in_processes(
    tally: Tally, parts: list[tuple[int, Part]], processes: int, advance: Callable[[int], None]
) -> None:
    """Let processes take part after part, then add up what they counted.

    Each is a fresh interpreter that imports this module alone: the main program, its threads and
    its heavy modules are neither copied nor run again, whatever it is.
    """
    waiting: SimpleQueue[tuple[int, Part]] = SimpleQueue()
    for part in parts:
        waiting.put(part)
    sizes: Counter[int] = Counter()
    lock = Lock()

    def level_after(new_sizes: Counter[int]) -> int:
        """The level to count from, by what all processes have read so far."""
        with lock:
            sizes.update(new_sizes)
            return tally.task.level_for(sizes)

    def work(process: _Process) -> Tally:
        level = 0
        while True:
            try:
                number, part = waiting.get_nowait()
            except Empty:
                break
            read = process.ask((number, part, level))
            level = level_after(read)
            advance(part.size)
        result: Tally = process.ask(None)
        return result

    with ExitStack() as stack:
        started = [stack.enter_context(_Process(tally.task)) for _ in range(processes)]
        threads = stack.enter_context(ThreadPoolExecutor(processes))
        try:
            for result in threads.map(work, started):
                tally.absorb(result)
        except BaseException:  # Ctrl-C too: the threads end when their processes do
            for process in started:
                process.kill()
            raise


_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); \
from lexigraft.counting import serve; serve()"


class _Process:
    """A child process that counts; questions and answers are pickled through its pipes."""

    def __init__(self, task: Task) -> None:
        # Ctrl-C is for the parent, which then kills its children: they inherit the blocked signal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._child = subprocess.Popen(
                python_child(_START, json.dumps(sys.path)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._send(task)

    def __enter__(self) -> _Process:
        return self

    def kill(self) -> None:
        """End it, whatever it does."""
        self._child.kill()

    def __exit__(self, *fault: object) -> None:
        self.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self, question: Any) -> Any:
        """The answer to a question; an error there is raised here."""
        assert self._child.stdout is not None
        try:
            self._send(question)
            fault, answer = pickle.load(self._child.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise LexigraftError(
                f"a counting process ended (exit status {self._child.wait()})",
                needed="processes that live until the corpus is read",
                fix="look for `Out of memory` in `dmesg`, or take fewer: --workers 1",
            ) from None
        if fault is not None:
            raise LexigraftError(**fault)
        return answer

    def _send(self, question: Any) -> None:
        assert self._child.stdin is not None
        pickle.dump(question, self._child.stdin)
        self._child.stdin.flush()


def serve() -> None:
    """The main program of a counting process."""
    import gc

    gc.disable()  # counts are no cycles: looking for some takes time
    answers = sys.stdout.buffer
    questions = sys.stdin.buffer
    tally = Tally(pickle.load(questions))
    while True:
        try:
            question = pickle.load(questions)
        except EOFError:
            return
        fault: dict[str, str] | None = None
        answer: Any = tally
        if question is not None:
            number, part, level = question
            tally.drop_below(level)
            before = Counter(tally.sizes)
            fault = _fault_of(tally, [(number, part)])
            answer = tally.sizes - before
        try:
            pickle.dump((fault, answer), answers)
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(1)


def _fault_of(tally: Tally, parts: Sequence[tuple[int, Part]]) -> dict[str, str] | None:
    """Count some parts; an error becomes plain data, which every pipe can carry."""
    try:
        for number, part in parts:
            tally.add_part(number, part)
    except LexigraftError as fault:
        return {"found": fault.found, "needed": fault.needed, "fix": fault.fix}
    return None


# --- on a cluster --------------------------------------------------------------------------------


def _count_on_ray(task: Task, files: Sequence[TextFile], stored: int, workers: int | None) -> Tally:
    """Count groups of parts as Ray tasks: on the cluster of RAY_ADDRESS, else on a local one."""
    try:
        import ray
    except ImportError:
        raise LexigraftError(
            "--engine ray, but ray is not installed here",
            needed="ray on this machine and on every node of the cluster",
            fix="pip install 'lexigraft[ray]', or --engine local",
        ) from None
    begun = not ray.is_initialized()
    if begun:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            address=address,
            num_cpus=None if address else workers,
            include_dashboard=None if address else False,
            log_to_driver=False,
        )
    try:
        places = [replace(file, path=_everywhere(file.path)) for file in files]
        parts = [(number, part) for number, file in enumerate(places) for part in parts_of(file)]
        running = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        groups = [parts[start :: _GROUPS * running] for start in range(_GROUPS * running)]
        count = ray.remote(num_cpus=1)(count_group)
        return _gathered_from_ray(ray, count, Tally(task), [g for g in groups if g], running)
    finally:
        if begun:
            ray.shutdown()


def count_group(
    task: Task, parts: Sequence[tuple[int, Part]], level: int
) -> tuple[dict[str, str] | None, Tally]:
    """What a Ray task does: count some parts of the corpus."""
    tally = Tally(task, level=level)
    return _fault_of(tally, parts), tally


def _gathered_from_ray(
    ray: Any, count: Any, tally: Tally, groups: list[list[tuple[int, Part]]], running: int
) -> Tally:
    stored = sum(part.size for group in groups for _, part in group)
    pending: dict[Any, int] = {}
    with progress("reading", stored) as advance:
        while groups or pending:
            while groups and len(pending) < running:
                group = groups.pop()
                task = count.remote(tally.task, group, tally.level)
                pending[task] = sum(part.size for _, part in group)
            (done,), _ = ray.wait(list(pending), num_returns=1)
            fault, counted = ray.get(done)
            advance(pending.pop(done))
            if fault is not None:
                raise LexigraftError(**fault)
            tally.absorb(counted)
    return tally


def _everywhere(path: str) -> str:
    """A path that means the same in whatever folder a process works."""
    if not path.startswith(HUB):
        return str(Path(path).absolute())
    name, colon, rest = path.removeprefix(HUB).partition(":")
    return HUB + (str(Path(name).absolute()) if Path(name).exists() else name) + colon + rest
