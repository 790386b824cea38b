"""`check`: tokenizer files, config, weights, adapter and manifest in one table, with one verdict.

Headers and small files are read, weights only when asked for, and torch is not imported.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lexigraft.checkpoints.nested import put
from lexigraft.checks.adapters import adapter_findings, adapter_rows, stack_findings
from lexigraft.checks.added import added_findings, templates
from lexigraft.checks.facts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Facts, read_facts
from lexigraft.checks.findings import Edit, Finding
from lexigraft.checks.gguf_files import TOKENS, gguf_findings, gguf_rows
from lexigraft.checks.lineage import base_findings, manifest_findings
from lexigraft.checks.sarif import sarif
from lexigraft.checks.tokenizers import tokenizer_findings
from lexigraft.checks.weights import (
    SPECIAL,
    special_ids,
    stated_per_layer,
    stated_rows,
    weight_findings,
)
from lexigraft.console import plain_line
from lexigraft.errors import LexigraftError
from lexigraft.files import (
    MANIFEST,
    Inputs,
    is_there,
    publish,
    read_json,
    refuse_existing,
    refuse_overwriting,
    require_free_space,
    write_json,
)
from lexigraft.hub import is_hub_id, local_folder

if TYPE_CHECKING:
    from lexigraft.runfile import RunState

_ROUNDS = 8
_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        folder: where the file lies.
        part: the file or tensor.
        unit: what is counted: `tokens`, `rows` or `vocab_size`; empty if nothing is.
        count: how many; None if nothing is counted.
        detail: shape, type or state.
        verdict: `ok`, `padding`, or the severity and code of the gravest finding about it.
    """

    folder: str
    part: str
    unit: str
    count: int | None
    detail: str = ""
    verdict: str = "ok"

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "folder": self.folder,
            "part": self.part,
            "unit": self.unit,
            "count": self.count,
            "detail": self.detail,
            "verdict": self.verdict,
        }


_Told = TypeVar("_Told", Finding, Row)


@dataclass(frozen=True)
class CheckResult:
    """The table and what is wrong with it; `ok` when nothing is an error."""

    path: Path
    findings: list[Finding]
    table: list[Row]

    @property
    def ok(self) -> bool:
        """True when no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        return {
            "ok": self.ok,
            "findings": [finding.to_json() for finding in self.findings],
            "table": [row.to_json() for row in self.table],
        }

    def to_sarif(self) -> dict[str, Any]:
        """The findings as a SARIF 2.1.0 log."""
        from lexigraft import __version__

        folders = dict.fromkeys([self.path, *(Path(row.folder) for row in self.table)])
        return sarif(self.findings, folders, version=__version__)

    def lines(self) -> list[str]:
        """What a person reads: table, findings, verdict."""
        errors = sum(finding.severity == "error" for finding in self.findings)
        verdict = f"{errors} fault{'s' if errors != 1 else ''}" if errors else "ok"
        return [
            *_table_lines(self.table),
            *(finding.line() for finding in self.findings),
            f"{self.path}: {verdict}",
        ]


def check(
    path: str | Path,
    *,
    base: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    deep: bool = False,
    consumer: str | None = None,
) -> CheckResult:
    """Hold the parts of a model, vocabulary or adapter folder against each other, or all of a run.

    Of a hub id headers and small files are fetched; `deep` downloads the weights. In a run folder
    each part that is done is checked, against the recipe's base where that is a folder here, and
    each adapter against the model that it was trained on; findings name the part.

    Args:
        path: the folder, a hub id (`owner/model`, `owner/model@revision`), or a GGUF file.
        base: the model that `path` was made from; for an adapter, the model it is to be used on.
        adapter: an adapter that is to be used on `path`, or several, in the order in which they
            were trained; each is held against the model with those before it, or, where its
            tokens say that it was trained beside them, against the model alone.
        deep: read the weights too, in blocks: their numbers, untrained and equal rows; old rows
            and all other tensors against those of `base`.
        consumer: `gguf`, `vllm`, `transformers-4` or `tgi`: what that program refuses or garbles.

    Raises:
        LexigraftError: a folder does not exist, holds nothing that could be checked, a file
            became shorter while it was read, there is no such consumer, or `adapter` is given
            with a run.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter or ())
    names: dict[str, str] = {}
    with ExitStack() as stack:

        def opened(name: str | Path) -> Facts:
            place = stack.enter_context(_place(name, deep=deep))
            if is_hub_id(name):
                names[str(place)] = str(name)
            return read_facts(place)

        try:
            subject = opened(path)
            origin = opened(base) if base is not None else None
            run = _run_of(subject)
            if run is None:
                held = _folders(subject, origin, [*map(opened, adapters)])
            elif adapters:
                raise LexigraftError(
                    f"{path} is a run, and --adapter names {adapters[0]}",
                    needed="a run alone, or a model and an adapter",
                    fix=f"lexigraft check {subject.folder / 'model'} --adapter {adapters[0]}",
                )
            else:
                held = _run_folders(subject.folder, run, origin)
            found = _found(held, deep, consumer)
            rows = [row for facts in held.facts for row in _rows(facts)]
        except LexigraftError as fault:
            raise _renamed_fault(fault, names) from None
    found.sort(key=lambda one: _ORDER[one.about.severity])
    told = (one.about if run is None else _in_run(one, subject.folder) for one in found)
    return CheckResult(
        Path(path),
        [_renamed(one, names) for one in told],
        [_renamed(replace(row, verdict=_verdict(row, found)), names) for row in rows],
    )


def first_error(result: Mapping[str, Any], fix: str) -> LexigraftError | None:
    """The first error of what `CheckResult.to_json` says, for whoever needs a sound folder."""
    found = next((one for one in result["findings"] if one["severity"] == "error"), None)
    if found is None:
        return None
    return LexigraftError(
        f"{found['code']} {found['where']}: {found['found']}", needed=found["needed"], fix=fix
    )


@dataclass(frozen=True)
class _Placed:
    """A finding, and the folder in which it was found."""

    folder: str
    about: Finding


def _placed(folder: Path, findings: Iterable[Finding]) -> Iterator[_Placed]:
    return (_Placed(str(folder), one) for one in findings)


def _verdict(row: Row, found: Sequence[_Placed]) -> str:
    """What the gravest finding says of a row; the findings come in the order of their gravity."""
    for one in found:
        if one.folder == row.folder and _is_about(one.about.where, row):
            padding = one.about.code == "LG303"
            return "padding" if padding else f"{one.about.severity} {one.about.code}"
    return "ok"


def _is_about(where: str, row: Row) -> bool:
    """A finding is of a file or tensor, of all files of a kind, or of the folder."""
    kinds = {
        "tokenizer": row.unit == "tokens" and row.part != MANIFEST,
        "weights": row.unit == "rows",
    }
    named = where in (row.part, row.folder) or row.part.startswith(f"{where} ")
    return named or kinds.get(where, False)


@contextmanager
def _place(name: str | Path, *, deep: bool) -> Iterator[Path]:
    """The folder or GGUF file that `name` means; of a hub id what is needed of it."""
    if is_hub_id(name) and not deep:
        from lexigraft.checks.remote import headers_of  # a client of the network

        with headers_of(str(name)) as folder:
            yield folder
    else:
        yield _local(name)


def _local(name: str | Path) -> Path:
    """The folder or GGUF file that `name` means."""
    path = Path(name).expanduser()
    return path if is_there(path) and path.is_file() else local_folder(name)


def _renamed(told: _Told, names: Mapping[str, str]) -> _Told:
    """A finding or a row that calls a model of the hub by its name, not by where it lies here."""
    texts = {key: _by_name(text, names) for key, text in vars(told).items()}
    return replace(told, **texts)


def _renamed_fault(fault: LexigraftError, names: Mapping[str, str]) -> LexigraftError:
    found, needed, fix = (_by_name(t, names) for t in (fault.found, fault.needed, fault.fix))
    return type(fault)(found, needed=needed, fix=fix)


def _by_name(value: Any, names: Mapping[str, str]) -> Any:
    for place, name in names.items() if isinstance(value, str) else ():
        value = value.replace(place, name)
    return value


@dataclass(frozen=True)
class _Part:
    """A folder that is checked.

    Attributes:
        facts: what it says.
        origin: what it was made from; None if that is not told.
        model: for an adapter, what it is to be used on; None if that is not told.
        merged: the adapters that may be merged into it.
    """

    facts: Facts
    origin: Facts | None = None
    model: Facts | None = None
    merged: Sequence[Facts] = ()


@dataclass(frozen=True)
class _Held:
    """The folders that are held against each other.

    Attributes:
        parts: those that are checked.
        stacks: a model, and the adapters that are to be used on it, in order.
        origin: what the parts were made from.
    """

    parts: Sequence[_Part]
    stacks: Sequence[tuple[Facts, Sequence[Facts]]]
    origin: Facts | None

    @property
    def facts(self) -> list[Facts]:
        """All folders, in the order of the table."""
        own = [part.facts for part in self.parts]
        return own + [facts for facts in [self.origin] if facts is not None]


def _run_of(subject: Facts) -> RunState | None:
    """The state of a run, where the folder is one and nothing else."""
    if _something(subject):
        return None
    from lexigraft.runfile import RunState  # few folders are runs

    return RunState.read(subject.folder)


def _run_folders(run: Path, state: RunState, origin: Facts | None) -> _Held:
    """What a run folder holds; `origin` where the recipe's base is not meant."""
    from lexigraft.checks.runs import run_parts

    base, found = run_parts(run, state)
    if origin is None and base is not None:
        origin = read_facts(base)
    known = {part.folder: read_facts(part.folder) for part in found}
    for facts in known.values():
        _require_something(facts)
    if origin is not None and base is not None:
        known[base] = origin
    parts, stacks = [], []
    for part in found:
        facts = known[part.folder]
        if not facts.is_adapter:
            parts.append(_Part(facts, origin))
            continue
        model = known[part.trained_on] if part.trained_on is not None else None
        parts.append(_Part(facts, model=model))
        stacks += [(model, [facts])] if model is not None else []
    return _Held(parts, stacks, origin)


def _in_run(one: _Placed, run: Path) -> Finding:
    """A finding that names the part of the run in which it was found."""
    folder = Path(one.folder)
    name = folder.relative_to(run) if folder.is_relative_to(run) else folder
    where = "" if one.about.where == one.folder else one.about.where
    return replace(one.about, where=str(name / where))


def _folders(subject: Facts, origin: Facts | None, patches: list[Facts]) -> _Held:
    """A folder, what it was made from, and adapters that are to be used on it."""
    for patch in patches:
        if not patch.is_adapter:
            raise LexigraftError(
                f"{patch.folder} is no adapter: it has no {ADAPTER_CONFIG}",
                needed=f"a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}",
                fix=f"ls {patch.folder}",
            )
    if subject.is_adapter and origin is not None:
        subject, patches, origin = origin, [subject, *patches], None
    elif subject.is_adapter and patches:
        raise LexigraftError(
            f"{subject.folder} is an adapter, and --adapter names {patches[0].folder}",
            needed="the model that both are to be used on",
            fix=f"lexigraft check MODEL --adapter {subject.folder} --adapter {patches[0].folder}",
        )
    _require_something(subject)
    model = None if subject.is_adapter else subject
    first = _Part(subject, origin, merged=patches)
    return _Held(
        [first, *(_Part(patch, model=model) for patch in patches)], [(subject, patches)], origin
    )


def _require_something(facts: Facts) -> None:
    if not _something(facts):
        raise LexigraftError(
            f"{facts.folder} holds no tokenizer, config, weights or adapter",
            needed="a model, vocabulary or adapter folder, or a run",
            fix=f"ls {facts.folder}",
        )


def _found(held: _Held, deep: bool, consumer: str | None) -> list[_Placed]:
    """All findings."""
    found = list(_findings(held))
    for part in held.parts if deep else ():
        found += _placed(part.facts.folder, _deep(part))
    apart = {one.folder for one in found if one.about.code == "LG705"}  # which says more
    found = [one for one in found if one.folder not in apart or one.about.code != "LG306"]
    if consumer is not None:
        from lexigraft.checks.consumers import consumer_findings

        for part in held.parts:
            model = part.model if part.facts.is_adapter else part.facts
            told = consumer_findings(consumer, model, part.origin, part.facts)
            found += _placed(part.facts.folder, told)
    return found


@dataclass(frozen=True)
class MendResult:
    """A mended copy: what was done, and what `check` says of it."""

    mended: list[Finding]
    after: CheckResult

    @property
    def ok(self) -> bool:
        """True when no finding of the copy is an error."""
        return self.after.ok

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        mended = [finding.to_json() for finding in self.mended]
        return {"mended": mended, **self.after.to_json()}

    def to_sarif(self) -> dict[str, Any]:
        """What `check` finds in the copy, as a SARIF 2.1.0 log."""
        return self.after.to_sarif()

    def lines(self) -> list[str]:
        """What a person reads: what was mended, then the check of the copy."""
        mended = [f"mended {one.code} {one.where}: {one.found}" for one in self.mended]
        return [*map(plain_line, mended), *self.after.lines()]


def mend(
    path: str | Path, output: str | Path, *, deep: bool = False, force: bool = False
) -> MendResult:
    """Write a copy of a folder in which what an edit mends beyond doubt is mended.

    Numbers of rows in the config, the index, stray shards, stale copies of the tokenizer, and with
    `deep` a tie flag that the weights contradict. Weights are copied as they are.

    Raises:
        LexigraftError: there is nothing of this kind to mend, the folder is a run, `output` exists
            or is the folder itself, or the disk is full.
    """
    from lexigraft.runfile import RUN_FILE  # few folders are runs

    folder, output = _local(path), Path(output)
    if (folder / RUN_FILE).is_file() and _run_of(read_facts(folder)) is not None:
        raise LexigraftError(
            f"{folder} is a run, of which --fix would copy no part",
            needed="one of its parts",
            fix=f"lexigraft check {folder / 'merged'} --fix {output}",
        )
    refuse_existing(output, force=force)
    refuse_overwriting(output, [folder])
    files = [file for file in sorted(folder.iterdir()) if file.is_file()] if folder.is_dir() else []
    inputs = Inputs(files)
    found = check(folder, deep=deep).findings
    if not any(one.edit for one in found):
        raise LexigraftError(
            f"no finding of {folder} is mended by an edit alone"
            + (f" ({', '.join(sorted({one.code for one in found}))})" if found else ""),
            needed="a wrong number in a config or an index, a stale copy, or a stray shard",
            fix=f"lexigraft check {folder}",
        )
    require_free_space(output, sum(file.stat().st_size for file in files))
    mended: list[Finding] = []
    with publish(output, force=force, inputs=inputs) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)
        inputs.require_unchanged()  # before what is half of it is looked at
        for _ in range(_ROUNDS):  # one mended number may uncover the next
            doing = [one for one in check(partial, deep=deep).findings if one.edit]
            for one in doing:
                _apply(partial, one.edit)
            mended += doing
            if not doing:
                break
    return MendResult(mended, check(output, deep=deep))


def _apply(folder: Path, edit: Edit | None) -> None:
    if edit is None:
        return
    if not edit.path:
        (folder / edit.file).unlink()
        return
    content = read_json(folder / edit.file)
    put(content, edit.path, edit.value)
    write_json(folder / edit.file, content)


def _something(facts: Facts) -> bool:
    return bool(facts.maps or facts.config or facts.unreadable or facts.manifest or facts.gguf)


def _findings(held: _Held) -> Iterator[_Placed]:
    for part in held.parts:
        facts = part.facts
        yield from _placed(facts.folder, _own_findings(facts))
        if part.origin is not None:
            yield from _placed(facts.folder, base_findings(facts, part.origin))
        if facts.is_adapter and part.model is None:
            yield from _placed(facts.folder, adapter_findings(facts))
    for model, adapters in held.stacks:
        for adapter, told in stack_findings(model, adapters):
            yield from _placed(adapter.folder, told)
    if held.origin is not None:
        yield from _placed(held.origin.folder, held.origin.unreadable)


def _own_findings(part: Facts) -> Iterator[Finding]:
    yield from part.unreadable
    if part.gguf is not None:
        yield from gguf_findings(part.gguf)
    else:
        yield from tokenizer_findings(part)
        yield from added_findings(part)
        yield from weight_findings(part)
        yield from manifest_findings(part)


def _deep(part: _Part) -> Iterator[Finding]:
    from lexigraft.checks.body import body_findings  # headers alone need no numpy
    from lexigraft.checks.deep import deep_findings
    from lexigraft.checks.probe import probe_findings  # nor a child process
    from lexigraft.checks.reading import reading_findings

    yield from deep_findings(part.facts, part.origin)
    if part.origin is not None:
        yield from body_findings(part.facts, part.origin, part.merged)
    yield from reading_findings(part.facts, part.origin)
    yield from probe_findings(part.facts)


def _rows(facts: Facts) -> Iterator[Row]:
    folder = str(facts.folder)
    for name, token_map in facts.maps.items():
        yield Row(folder, name, "tokens", token_map.tokens, f"{len(token_map.texts):,} entries")
    for path, size in stated_rows(facts.config.get("config.json", {})).items():
        yield Row(folder, f"config.json {path}", "vocab_size", size)
    for path, size, _ in stated_per_layer(facts):
        yield Row(folder, f"config.json {path}", "vocab_size", size)
    if facts.checkpoint is not None and facts.vocabulary is not None:
        for name in facts.vocabulary.names:
            tensor = facts.checkpoint.tensors[name]
            detail = f"{tensor.dtype} {list(tensor.shape)}"
            yield Row(folder, name, "rows", facts.vocabulary.rows, detail)
        if facts.vocabulary.tied:
            yield Row(folder, "output head", "rows", facts.vocabulary.rows, "tied")
    if facts.adapter and ADAPTER_CONFIG in facts.config:
        yield from _adapter_table(facts)
    if facts.gguf is not None:
        yield Row(folder, TOKENS, "tokens", len(facts.gguf.texts(TOKENS)))
        for name, rows in gguf_rows(facts.gguf).items():
            yield Row(folder, name, "rows", rows, str(list(facts.gguf.tensors[name].shape)))
    if "generation_config.json" in facts.config:
        ids = {key: special_ids(facts, key)["generation_config.json"] for key in SPECIAL}
        told = ", ".join(f"{key} {', '.join(map(str, own))}" for key, own in ids.items() if own)
        yield Row(folder, "generation_config.json", "", None, told)
    for where in dict.fromkeys(where for where, _ in templates(facts)):
        yield Row(folder, f"{where} template", "", None, "chat template")
    if facts.manifest is not None:
        records = facts.manifest.records
        base = next((record.base for record in records if hasattr(record, "base")), None)
        stages = ", ".join(record.stage for record in records)
        count, unit = (base.tokens, "tokens") if base else (None, "")
        yield Row(folder, MANIFEST, unit, count, f"of the base; {stages}" if base else stages)


def _adapter_table(facts: Facts) -> Iterator[Row]:
    folder, needed = str(facts.folder), adapter_rows(facts)
    for name, rows in needed.by_tensor.items():
        tensor = facts.adapter[name]
        yield Row(folder, name, "rows", rows, f"{tensor.dtype} {list(tensor.shape)}")
    if needed.last_id >= 0:
        yield Row(folder, "trained rows", "rows", needed.last_id + 1, "stored row by row")
    yield Row(folder, ADAPTER_WEIGHTS, "", None, f"{len(facts.adapter)} tensors")


def _table_lines(table: list[Row]) -> list[str]:
    """The rows in columns, one block per folder."""
    width = max((len(row.part) for row in table), default=0)
    judged = max((len(row.verdict) for row in table), default=0)
    lines: list[str] = []
    folder = None
    for row in table:
        if row.folder != folder:
            folder = row.folder
            lines.append(plain_line(folder))
        count = "" if row.count is None else f"{row.count:,}"
        told = f"  {row.part:<{width}}  {count:>9} {row.unit:<10}  {row.verdict:<{judged}}"
        line = f"{told}  {row.detail}".rstrip()
        lines.append(plain_line(line))
    return lines
