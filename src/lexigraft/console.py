"""What a person sees while a verb works: notices and progress, always on standard error.

Results belong to standard output and are printed by the command line alone. Text that comes out
of a file passes through `plain`, so that no file can move the cursor or retitle the terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, Task

Advance = Callable[[int], None]
# Embeddings, overrides and isolates of Unicode's bidirectional algorithm (UAX #9).
_TURNING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))

_quiet = False
_shown: list[Progress] = []  # what is drawn, outermost first


def set_quiet(quiet: bool) -> None:
    """Silence `note` and `progress` (the command line's `-q`); errors are still shown."""
    global _quiet  # noqa: PLW0603 - one process has one terminal
    _quiet = quiet


def is_first_process() -> bool:
    """False in the further processes of a distributed launch, which print and write nothing."""
    return os.environ.get("RANK", "0") == "0"


def plain(text: str) -> str:
    r"""`text` with every control character but tab and line break made visible.

    Marks that turn the direction of writing count as such: they make text read as what it is not.

    >>> plain("a\x1b[31mred")
    'a\\x1b[31mred'
    """
    return "".join(
        character
        if character in "\t\n"
        or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _TURNING)
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def plain_line(text: str) -> str:
    r"""`plain`, on one line.

    >>> plain_line("two\nlines")
    'two\\nlines'
    """
    return plain(text.replace("\n", "\\n"))


def note(text: str) -> None:
    """Print one warning or notice on standard error, unless quiet."""
    if not _quiet and is_first_process():
        print(plain(text), file=sys.stderr, flush=True)  # noqa: T201 - this is the one place


def is_watched() -> bool:
    """Whether somebody looks at progress: neither quiet nor a log file."""
    return not _quiet and sys.stderr.isatty() and is_first_process()


@contextlib.contextmanager
def progress(label: str, total: int, unit: str = "B") -> Iterator[Advance]:
    """A progress bar on standard error; yields `advance(n)`, which counts `n` units more.

    Bytes (`unit="B"`) are shown as such, anything else as a count; both with rate and time left.
    Nothing is drawn when quiet or when standard error is no terminal.
    """
    if not is_watched():
        yield _count_silently
        return
    with _drawn(_columns(unit)) as bars:
        task = bars.add_task(plain(label), total=total)
        yield lambda n: bars.update(task, advance=n)


@contextlib.contextmanager
def working(label: str) -> Iterator[None]:
    """A line on standard error with the time that has passed, while nothing else is drawn.

    For work whose end is not known beforehand; also a decorator of functions. Bars and lines of
    what is called inside take its place while they last. Nothing is drawn where `progress` would
    draw nothing.
    """
    if not is_watched():
        yield
        return
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    with _drawn([SpinnerColumn(), text, TimeElapsedColumn()]) as bars:
        bars.add_task(plain(label), total=None)
        yield


@contextlib.contextmanager
def _drawn(columns: list[ProgressColumn]) -> Iterator[Progress]:
    """Draw one thing at the foot of the terminal; what was drawn there comes back afterwards."""
    from rich.console import Console
    from rich.progress import Progress

    if _shown:
        _shown[-1].stop()
    # Results that are printed meanwhile belong to standard output, also where both are a terminal.
    bars = Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
    )  # fmt: skip
    _shown.append(bars)
    try:
        with bars:
            yield bars
    finally:
        _shown.pop()
        if _shown:
            _shown[-1].start()


def _count_silently(n: int) -> None:
    """`advance` where nobody is watching."""


def _columns(unit: str) -> list[ProgressColumn]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    label = TextColumn("{task.description}", markup=False)
    if unit == "B":
        return [
            label,
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        ]

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(unit if speed is None else f"{speed:,.1f} {unit}/s")

    return [label, BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()]
