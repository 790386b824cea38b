"""What happened in a run, as Markdown and JSON; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.files import require_folder, write_json
from lexigraft.reporting.facts import run_facts
from lexigraft.reporting.markdown import markdown
from lexigraft.runfile import RUN_FILE, RunState

__all__ = ["ReportResult", "report"]


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


def report(run: str | Path, *, output: str | Path | None = None) -> ReportResult:
    """Write what happened in the run folder `run` as Markdown, and the same facts as JSON.

    Args:
        run: a folder that `run` or `demo` wrote, finished or not.
        output: the Markdown file; the JSON lies beside it. Default: RUN/report.md.

    Raises:
        LexigraftError: the folder is no run folder.
    """
    folder = require_folder(Path(run), "a run")
    state = RunState.read(folder)
    if state is None:
        raise LexigraftError(
            f"{folder} has no {RUN_FILE}",
            needed="a folder that `lexigraft run` or `lexigraft demo` wrote",
            fix=f"lexigraft run RECIPE.yaml -o {folder}",
        )
    page = Path(output) if output is not None else folder / "report.md"
    facts = run_facts(state, folder)
    text = markdown(facts)
    page.write_text(text + "\n", "utf-8")
    data = page.with_suffix(".json")
    write_json(data, facts)
    return ReportResult(facts, text, [page, data])
