"""What happened in a run, as a page, as Markdown and as JSON; no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.console import working
from lexigraft.errors import LexigraftError
from lexigraft.files import require_folder, write_whole
from lexigraft.reporting.facts import run_facts
from lexigraft.reporting.markdown import markdown
from lexigraft.reporting.page import page
from lexigraft.reporting.words import Language
from lexigraft.runfile import RUN_FILE, RunState

__all__ = ["ReportResult", "report", "state_of"]


@dataclass(frozen=True)
class ReportResult:
    """A report: its facts, its text, and where both were written."""

    facts: dict[str, Any]
    text: str
    files: list[Path]

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result: the facts, and the files."""
        return {**self.facts, "files": [str(path) for path in self.files]}

    def lines(self) -> list[str]:
        """What a person reads."""
        return [self.text, *(f"wrote {path}" for path in self.files)]


@working("drawing the report")
def report(
    run: str | Path, *, output: str | Path | None = None, lang: Language | None = None
) -> ReportResult:
    """Write what happened in the run folder `run` as one HTML page, as Markdown and as JSON.

    Args:
        run: a folder that `run` or `demo` wrote, finished or not.
        output: the page, a name in .html; Markdown and JSON lie beside it. Default:
            RUN/report.html.
        lang: of the page: `en` or `zh`. Default: as the recipe of the run says. Markdown and JSON
            are in English.

    Raises:
        LexigraftError: the folder is no run folder, or `output` has another ending.
    """
    folder = require_folder(Path(run), "a run")
    page_file = Path(output) if output is not None else folder / "report.html"
    if page_file.suffix != ".html":
        raise LexigraftError(
            f"-o {page_file}",
            needed="a name that ends in .html; .md and .json are written beside it",
            fix=f"-o {page_file.with_suffix('.html')}",
        )
    state = state_of(folder)
    facts = run_facts(state, folder)
    text = markdown(facts)
    forms = {
        ".html": page(facts, lang or state.recipe.report.lang),
        ".md": f"{text}\n",
        ".json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
    }
    files = [page_file.with_suffix(ending) for ending in forms]
    for file, content in zip(files, forms.values(), strict=True):
        write_whole(file, content)
    return ReportResult(facts, text, files)


def state_of(folder: Path) -> RunState:
    """The state of a run folder.

    Raises:
        LexigraftError: it is none.
    """
    state = RunState.read(folder)
    if state is None:
        raise LexigraftError(
            f"{folder} has no {RUN_FILE}",
            needed="a folder that `lexigraft run` or `lexigraft demo` wrote",
            fix=f"lexigraft run RECIPE.yaml -o {folder}",
        )
    return state
