"""What `lexigraft demo` runs: its texts and its recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lexigraft.data.icd10 import documents

_HERE = Path(__file__).parent
# Every so many documents one is kept apart for measuring.
HELD_OUT_EVERY = 16


def demo_recipe(language: str, *, fast: bool) -> str:
    """The recipe for a language, as YAML; paths in it are relative to the run folder."""
    name = f"demo-{language}-fast.yaml" if fast else f"demo-{language}.yaml"
    return (_HERE / name).read_text("utf-8")


def write_demo_texts(folder: Path, language: str) -> None:
    """Write domain.txt and general.txt, and beside each its held-out documents.

    Raises:
        LexigraftError: the package with the names of this language is not installed.
    """
    general = (_HERE / "general.txt").read_text("utf-8").strip().split("\n\n")
    for name, texts in (("domain", documents(language)), ("general", general)):
        apart = texts[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
        _write(folder / f"{name}_held_out.txt", apart)
        kept = [text for place, text in enumerate(texts) if not _is_apart(place)]
        _write(folder / f"{name}.txt", kept)


def _is_apart(place: int) -> bool:
    return place % HELD_OUT_EVERY == HELD_OUT_EVERY // 2


def _write(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts) + "\n", "utf-8")
