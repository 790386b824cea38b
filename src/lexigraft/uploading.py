"""`upload`: a folder that `check` finds sound, with its card, as a model of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft import __version__
from lexigraft.console import note
from lexigraft.errors import LexigraftError
from lexigraft.files import CARD, read_settings, require_folder
from lexigraft.hub import REPOSITORY, no_bars_unseen
from lexigraft.manifest import Manifest
from lexigraft.reporting.card import ADAPTER, CardResult, card, is_own
from lexigraft.runfile import RUN_FILE
from lexigraft.steps.check import check, first_error

_SHOWN = 40
_REFUSED = (401, 403)


@dataclass(frozen=True)
class UploadResult:
    """What was sent, or would be.

    Attributes:
        files: name and bytes of each file of the folder.
        card: whether README.md is the card that `card` writes.
        url, commit: of the model on the hub; None after a dry run.
    """

    repository: str
    revision: str
    files: dict[str, int]
    card: bool
    url: str | None
    commit: str | None

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return vars(self)

    def lines(self) -> list[str]:
        """What a person reads."""
        if self.url is not None:
            return [f"uploaded {len(self.files):,} files: {self.url} (commit {self.commit})"]
        total = sum(self.files.values())
        shown = list(self.files.items())[:_SHOWN]
        rest = len(self.files) - len(shown)
        return [
            f"{len(self.files):,} files, {total:,} bytes, to {self.repository} ({self.revision})",
            *(f"  {size:15,}  {name}" for name, size in shown),
            *([f"  and {rest:,} more"] if rest else []),
        ]


def upload(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str = "main",
    base_model: str | None = None,
    dry_run: bool = False,
) -> UploadResult:
    """Send a folder to the hub, once `check` finds no fault in it; hidden files stay here.

    A README.md is written into the folder where there is none; one that lexigraft wrote is written
    anew. A file that the hub has already is not sent again.

    Args:
        folder: a model, adapter or vocabulary.
        repository: `OWNER/NAME`, made if it is not there.
        private: make it private, or stop where it is there and public.
        revision: branch to write, made if it is not there.
        base_model: as for `card`.
        dry_run: check and list, and neither write nor send.

    Raises:
        LexigraftError: `check` finds a fault, the hub cannot be reached, or it does not let us
            write there.
    """
    place = require_folder(Path(folder), "a model")
    if not REPOSITORY.fullmatch(repository):
        raise LexigraftError(
            f"{repository} is no name of a model on the hub",
            needed="OWNER/NAME",
            fix=f"lexigraft upload {folder} OWNER/{place.resolve().name}",
        )
    if (place / RUN_FILE).is_file():
        raise LexigraftError(
            f"{place} is a run",
            needed="one of its models",
            fix=f"lexigraft upload {place / 'merged'} {repository}",
        )
    fault = first_error(check(place).to_json(), f"lexigraft check {place}")
    if fault is not None:
        raise fault
    told = _card(place, base_model, dry_run=dry_run)
    files = {
        path.relative_to(place).as_posix(): path.stat().st_size
        for path in sorted(place.rglob("*"))
        if path.is_file() and not _hidden(path.relative_to(place))
    }
    if told is not None:
        files[CARD] = len(told.text.encode("utf-8", "surrogatepass"))
    _tell_of_base(place)
    url = commit = None
    if not dry_run:
        with _hub_faults(repository):
            url, commit = _send(place, repository, private=private, revision=revision)
    return UploadResult(
        repository, revision, dict(sorted(files.items())), told is not None, url, commit
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _card(folder: Path, base_model: str | None, *, dry_run: bool) -> CardResult | None:
    """The card, written unless it is a dry run; None where the folder has one of its own."""
    if (folder / CARD).exists() and not is_own(folder / CARD):
        note(f"{CARD} is kept as it is; lexigraft card {folder} --dry-run prints another")
        return None
    if Manifest.read(folder) is None:
        note(f"no {CARD}: without a manifest there is nothing to make a card of")
        return None
    told = card(folder, base_model=base_model, dry_run=dry_run)
    for what in told.unknown:
        note(f"the card does not say {what}")
    return told


def _tell_of_base(folder: Path) -> None:
    """An adapter names the model it is for: on the hub, a folder of this machine is none."""
    name = read_settings(folder / ADAPTER).get("base_model_name_or_path")
    if name and not REPOSITORY.fullmatch(str(name)):
        note(
            f"{ADAPTER} names its base as {name}, which nobody else has: lexigraft merge needs no "
            "name, PEFT does (base_model_name_or_path)"
        )


def _send(folder: Path, repository: str, *, private: bool, revision: str) -> tuple[str, str]:
    """Make the repository and the branch, and send the folder; where it is, and its commit."""
    from huggingface_hub import HfApi

    no_bars_unseen()
    hub = HfApi(library_name="lexigraft", library_version=__version__)
    url = hub.create_repo(repository, private=private or None, exist_ok=True)
    if private and not hub.model_info(repository).private:
        raise LexigraftError(
            f"{repository} is there, and public",
            needed="a private repository, as --private asks",
            fix=f"make it private at {url}/settings, or choose another name",
        )
    if revision != "main":
        hub.create_branch(repository, branch=revision, exist_ok=True)
    sent = hub.upload_folder(
        repo_id=repository,
        folder_path=folder,
        revision=revision,
        commit_message=f"Upload by lexigraft {__version__}",
        ignore_patterns=[".*", "*/.*"],
    )
    return str(url), str(sent.oid)


@contextmanager
def _hub_faults(repository: str) -> Iterator[None]:
    """What goes wrong between us and the hub, in one message."""
    try:
        yield
    except LexigraftError:
        raise
    except Exception as fault:  # huggingface_hub passes on errors of its HTTP library
        status = getattr(getattr(fault, "response", None), "status_code", None)
        said = " ".join(str(getattr(fault, "server_message", None) or fault).split())[:300]
        if status in _REFUSED or type(fault).__name__ == "LocalTokenNotFoundError":
            raise LexigraftError(
                f"the hub does not let us write {repository} ({said})",
                needed="a login whose token may write there",
                fix="hf auth login (or HF_TOKEN), then the same command again",
            ) from None
        raise LexigraftError(
            f"{repository} could not be uploaded ({type(fault).__name__}: {said})",
            needed="the hub, reachable from here (HF_HUB_OFFLINE not set)",
            fix="try again: what was sent is not sent twice",
        ) from None
