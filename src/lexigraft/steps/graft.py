"""`graft`: a checkpoint and an extended tokenizer become a checkpoint with rows for the new tokens.

No model is loaded and no torch imported: shards are streamed, old rows are copied as bytes, and
only the new rows are computed, from the rows of the pieces that spelled each token so far.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexigraft import families
from lexigraft.checkpoints.architectures import (
    Role,
    VocabularyTensors,
    recorded_roles,
    vocabulary_of,
)
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.config import edit_config, refuse_quantised, refuse_ungathered
from lexigraft.checkpoints.fit import (
    mention_normalised_head,
    require_extension,
    require_fitting_rows,
    require_floats,
    require_free_ids,
)
from lexigraft.checkpoints.growth import Growth, NewRows, grown
from lexigraft.checkpoints.header import Tensor, read_header
from lexigraft.checkpoints.plan import Plan, PlannedTensor
from lexigraft.checkpoints.side_files import bytes_beside, copy_side_files, place_tokenizer
from lexigraft.checkpoints.tying import with_copies
from lexigraft.checkpoints.write import write_plan
from lexigraft.console import note, progress, working
from lexigraft.errors import LexigraftError
from lexigraft.families import Family
from lexigraft.families.replacing import without_tokens
from lexigraft.families.tokenmap import TokenMap, byte_text, readable
from lexigraft.files import (
    Inputs,
    changed,
    existing_parent,
    publish,
    read_object,
    refuse_existing,
    refuse_overwriting,
    require_folder,
    scratch,
    write_json,
)
from lexigraft.hub import local_folder, recorded_name
from lexigraft.manifest import (
    BaseTokenizer,
    CopiedRow,
    DonorRecord,
    GraftRecord,
    Manifest,
    StartRecord,
    versions,
)
from lexigraft.models.gguf_base import gguf_file, write_folder

# What imports numpy is imported when copying has begun.
if TYPE_CHECKING:
    import numpy.typing as npt

    from lexigraft.checkpoints.survey import Survey
    from lexigraft.checks.rows import RowStatistics
    from lexigraft.embeddings import Start
    from lexigraft.embeddings.copying import Copied
    from lexigraft.models.probe import ProbeResult, ProbeText


@dataclass(frozen=True)
class GraftResult:
    """What `graft` did, or with a dry run would do.

    Attributes:
        output: the new model folder.
        rows_before: rows of the base's vocabulary tensors.
        rows_after: rows of the new ones.
        tokens: max id + 1 of the extended tokenizer.
        added: number of new tokens.
        replaced: how many of them have the id of an old one.
        init: the method that the new rows start with; `EMBEDDING,HEAD` where they are two.
        tied: the head is the input embedding.
        bytes_copied: bytes of tensors taken from the base as they are.
        bytes_written: bytes of weights put on the disk (hard links count nothing).
        seconds: wall time, without the probe.
        row_statistics: the new rows beside the old ones, per vocabulary tensor.
        probe: what the model says before and after, where a probe was asked for.
        plan: with a dry run, every tensor; else empty.
    """

    output: Path
    rows_before: int
    rows_after: int
    tokens: int
    added: int
    replaced: int
    init: str
    tied: bool
    bytes_copied: int
    bytes_written: int
    seconds: float
    row_statistics: tuple[RowStatistics, ...] = ()
    probe: ProbeResult | None = None
    plan: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        result: dict[str, Any] = {
            "output": str(self.output),
            "rows_before": self.rows_before,
            "rows_after": self.rows_after,
            "tokens": self.tokens,
            "added": self.added,
            **({"replaced": self.replaced} if self.replaced else {}),
            "init": self.init,
            "tied": self.tied,
            "bytes_copied": self.bytes_copied,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "row_statistics": [found.to_json() for found in self.row_statistics],
        }
        if self.probe is not None:
            result["probe"] = self.probe.to_json()
        return {**result, "plan": self.plan} if self.plan else result

    def lines(self) -> list[str]:
        """What a person reads."""
        padding = self.rows_after - self.tokens
        there = f", {self.replaced:,} under old ids" if self.replaced else ""
        rows = (
            f"{self.rows_before:,} -> {self.rows_after:,} rows for {self.tokens:,} tokens "
            f"({self.added:,} new{there}, init {self.init}; {padding:,} padding rows; "
            f"{'tied' if self.tied else 'untied'})"
        )
        sizes = (
            f"{self.bytes_copied / 1e6:,.1f} MB copied, {self.bytes_written / 1e6:,.1f} MB written"
        )
        if self.plan:
            # What changes comes last, where a reader's eye is after a long list.
            plan = sorted(self.plan, key=lambda entry: bool(entry["shape"] != entry["old_shape"]))
            return [*map(_plan_line, plan), rows, f"would be: {sizes} to {self.output}"]
        return [
            rows,
            *(found.line() for found in self.row_statistics),
            *(example.line() for found in self.row_statistics[:1] for example in found.examples),
            *(self.probe.lines() if self.probe else []),
            f"{sizes} in {self.seconds:.1f} s",
            f"model: {self.output}",
        ]


def _plan_line(entry: Mapping[str, Any]) -> str:
    old, new = entry["old_shape"], entry["shape"]
    shapes = f"{new}" if old == new else f"{old} -> {new}"
    moved = "" if entry["source"] == entry["file"] else f"  from {entry['source']}"
    parts = [
        f"{word} {entry[f'bytes_{word}']:,}"
        for word in ("copied", "computed")
        if entry[f"bytes_{word}"]
    ]
    rows = f" (new rows by {entry['init']})" if "init" in entry else ""
    done = ", ".join(parts) or entry["rule"]
    return f"{entry['file']}  {entry['tensor']}  {entry['dtype']} {shapes}{moved}  {done}{rows}"


@working("grafting")
def graft(
    base: str | Path,
    vocab: str | Path,
    *,
    output: str | Path,
    init: str = "auto",
    init_from: str | Path | None = None,
    donor: str | Path | None = None,
    pad_to: int = 64,
    link: bool = False,
    max_shard_size: str | int | None = None,
    tensor_roles: Mapping[str, str] | None = None,
    probe: str | Path | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
) -> GraftResult:
    """Write `base` with rows for the new tokens of `vocab` to the folder `output`.

    Rows of old ids are bit-identical in every vocabulary tensor, but for those whose token `learn
    --replace` gave away; every other tensor is byte-identical. There are max(rows before, tokens
    rounded up to `pad_to`) rows afterwards, and as many as before if no id is new.

    Args:
        base: a model folder with safetensors and its tokenizer, or a GGUF file (or a folder with
            one), which transformers de-quantises first.
        vocab: a folder with a tokenizer whose old ids equal the base's, whoever made it.
        output: the folder to write.
        init: how new rows start: `auto`, a name in `embeddings.METHODS`, `module:function`, or
            two of them, `EMBEDDING,HEAD`.
        init_from: a file that names for new tokens the base token or text that they start as
            (`embeddings.copying`); the others start as the mean of their pieces.
        donor: a model that has new tokens as one token; its rows are translated
            (`embeddings.donor`).
        pad_to: the number of rows is a multiple of this, unless the base has more already.
        link: hard-link shards that do not change; the output then shares them with the base.
        max_shard_size: cut the weights into files of at most so many bytes (`5GB`); by default
            files stay as they are.
        tensor_roles: tensor name -> `embed`, `head` or `bias`, where the layout is unknown.
        probe: text that the base and the result then read; a limit that is broken
            (`models.probe.refuse`) stops, and nothing is left. The models are loaded for it.
        trust_remote_code: for the probe, run Python files that the base brings.
        seed: of methods that draw.
        force: replace an existing output.
        dry_run: return the plan, write nothing.

    Raises:
        LexigraftError: a damaged or contradictory input, an existing output, a full disk; rows
            that hold NaN or infinity, or new rows that are all alike where they should differ.
        RefusalError: weights, tokenizer or model of a kind that is not supported.
    """
    start = time.perf_counter()
    vocab, output = local_folder(vocab), Path(output)
    base = gguf_file(Path(base).expanduser()) or local_folder(base)
    _refuse_swapped(base, vocab, output)
    donor = None if donor is None else local_folder(donor)
    read = [base, vocab, *([] if donor is None else [donor])]
    inputs = Inputs(read)
    if not dry_run:
        refuse_existing(output, force=force)
        refuse_overwriting(output, read)
    if pad_to < 1:
        raise LexigraftError(f"--pad-to {pad_to}", needed="1 or more", fix="--pad-to 64")
    if link and max_shard_size is not None:
        raise LexigraftError(
            "--link together with --max-shard-size",
            needed="one of them: a file that is cut anew cannot be a link to the old one",
            fix="leave one of them out",
        )
    asked = _Asked(
        init,
        None if init_from is None else Path(init_from),
        donor,
        seed,
    )
    models = 1 if dry_run else 2
    with (
        _as_folder(base, output, models=models) as folder,
        families.open_ahead((folder, vocab)),
    ):
        job = _prepare(folder, vocab, asked, pad_to=pad_to, tensor_roles=tensor_roles)
        if max_shard_size is not None:
            job = replace(job, plan=job.plan.recut(max_shard_size))
        text = None if probe is None else job.probe_text(probe)
        if dry_run:
            linked = link and job.may_link(output)
            sizes = job.plan.sizes(link=linked)
            return job.result(output, sizes, start=start, link=linked, dry_run=True)
        with publish(output, force=force, inputs=inputs) as partial:
            sizes = job.write(partial, link=link)
            found = None if text is None else job.probe(partial, text, trust=trust_remote_code)
    done = job.result(output, sizes, start=start, link=link, dry_run=False)
    probing = 0.0 if found is None else found.seconds
    return replace(
        done, seconds=done.seconds - probing, row_statistics=job.row_statistics, probe=found
    )


def _refuse_swapped(base: Path, vocab: Path, output: Path) -> None:
    if base.is_dir() and not (base / "config.json").exists() and (vocab / "config.json").exists():
        raise LexigraftError(
            f"{base} holds no model, {vocab} does",
            needed="first the model to grow, then the folder with the extended tokenizer",
            fix=f"lexigraft graft {vocab} {base} -o {output}",
        )


@contextmanager
def _as_folder(base: Path, output: Path, *, models: int) -> Iterator[Path]:
    """`base`, or where it is a GGUF file a folder made of it, which goes when the work is done.

    `models` of its size must fit on the disk.
    """
    if base.is_dir():
        yield base
        return
    with scratch(output) as place:
        folder = place / base.stem  # the manifest calls the base by this name
        folder.mkdir()
        note(f"{base.name} is {write_folder(base, folder, models=models).words}")
        yield folder


class _Table:
    """A vocabulary tensor on its way: read once, when it is written, by the thread that writes it.

    Attributes:
        new: SHA-256 of the new rows, complete once they are written.
        statistics: of the new rows, once they are written; None for a bias.
    """

    def __init__(self, tensor: Tensor, growth: Growth) -> None:
        self._tensor = tensor
        self._growth = growth
        self._survey: Survey | None = None
        self.new = hashlib.sha256()
        self.statistics: RowStatistics | None = None

    @property
    def survey(self) -> Survey:
        """Hash and mean of the old rows."""
        from lexigraft.checkpoints.survey import require_finite, survey

        # No cached_property: up to Python 3.11 its lock lets the threads of two tables take turns.
        if self._survey is None:
            found = survey(self._tensor, self._growth.first_id, self._growth.replaced)
            require_finite(self._tensor, found)
            self._survey = found
        return self._survey

    def planned(self, spelled: Future[_Spelled], role: Role) -> PlannedTensor:
        """The grown tensor; `spelled` is waited for where the new rows are made."""

        @cache
        def made() -> NewRows:
            _ = self.survey  # while the tokenizers are still being read
            return spelled.result().start.rows(self._tensor, role, lambda: self.survey)

        def rows(start: int, stop: int) -> npt.NDArray[Any]:
            return made()(start, stop)

        return grown(
            self._tensor,
            self._growth,
            rows,
            lambda: self.survey.mean,
            observe=self.new.update,
        )


@dataclass(frozen=True)
class _Asked:
    """What was asked for of the new rows."""

    init: str
    init_from: Path | None
    donor: Path | None
    seed: int


@dataclass(frozen=True)
class _Spelled:
    """Both tokenizers as their engines read them, and how the new rows start by that."""

    base: Family
    extended: Family
    start: Start
    copied: list[Copied]


@dataclass(frozen=True)
class _Job:
    """Everything that is decided before the first byte is written.

    Attributes:
        old: the base's token map, on which the plan rests with `new`.
        new: that of the extension.
        spelled: what takes the engines longer, while what needs none of it is copied.
    """

    checkpoint: Checkpoint
    vocabulary: VocabularyTensors
    vocab: Path
    old: TokenMap
    new: TokenMap
    growth: Growth
    spelled: Future[_Spelled]
    pad_to: int
    plan: Plan
    tables: Mapping[str, _Table]
    told: Mapping[str, str] | None

    def result(
        self, output: Path, sizes: tuple[int, int], *, start: float, link: bool, dry_run: bool
    ) -> GraftResult:
        """The numbers of this job."""
        return GraftResult(
            output,
            self.growth.rows_before,
            self.growth.rows,
            self.growth.tokens,
            sum(token_id in self.new.texts for token_id in self.growth.new_ids),
            len(self.growth.replaced),
            str(self.spelled.result().start.choice),
            self.vocabulary.tied,
            *sizes,
            time.perf_counter() - start,
            plan=self.entries(link=link) if dry_run else [],
        )

    def entries(self, *, link: bool) -> list[dict[str, Any]]:
        """Every tensor of the plan; of those that grow also the method of their new rows."""
        choice = self.spelled.result().start.choice
        roles = self.vocabulary.roles
        methods = {name: {"init": choice.of(role)} for name, role in roles.items()}
        return [
            {**entry, **methods.get(entry["tensor"], {})} for entry in self.plan.to_json(link=link)
        ]

    def write(self, partial: Path, *, link: bool) -> tuple[int, int]:
        """Write the whole folder; bytes copied, and bytes of weights written."""
        total = sum(file.bytes for file in self.plan.files)
        with progress("writing weights", total) as advance:
            sizes = write_plan(
                self.plan,
                partial,
                link=link,
                advance=advance,
                meanwhile=lambda: self.write_side_files(partial),
                look=self.look_at_rows,
                beside=bytes_beside(self.checkpoint),
            )
        self.write_manifest(partial)
        if link:
            self.tell_of_links(partial)
        return sizes

    def may_link(self, output: Path) -> bool:
        """True unless the output is on another disk than the base, which is said."""
        there = existing_parent(output).stat().st_dev
        if all((self.checkpoint.folder / n).stat().st_dev == there for n in self.checkpoint.shards):
            return True
        note(f"--link: {output} is on another disk than the base: files would be copied")
        return False

    def tell_of_links(self, partial: Path) -> None:
        """How many files `--link` shares with the base, and what that means."""
        linked = [
            file
            for file in self.plan.files
            if file.verbatim is not None and (partial / file.name).samefile(file.verbatim)
        ]
        if linked:
            size = sum(file.bytes for file in linked)
            note(
                f"--link: {len(linked)} of {len(self.plan.files)} files of weights "
                f"({size / 1e6:,.1f} MB) are those of {self.checkpoint.folder}: a program that "
                "writes into one in place changes both models; to replace, move or delete it is "
                "safe"
            )
        elif any(file.verbatim for file in self.plan.files):
            note(
                "--link: no file could be linked (another disk, files of somebody else, or a file "
                "system without hard links): none is shared"
            )
        else:
            note("--link: nothing to link, for every file of weights holds a vocabulary tensor")

    def look_at_rows(self, file: Path) -> None:
        """Hold the new rows in a written file of weights against its old ones."""
        import numpy as np

        from lexigraft.checks.rows import row_statistics

        start = self.spelled.result().start
        for tensor in read_header(file).tensors:
            table = self.tables.get(tensor.name)
            if table is not None:
                used = np.sort(np.fromiter(self.old.texts, np.int64))
                old = np.setdiff1d(used, table.survey.untrained, assume_unique=True)
                table.statistics = row_statistics(tensor, start.ids, start.pieces, old, self.text)

    @property
    def row_statistics(self) -> tuple[RowStatistics, ...]:
        """Of the new rows of each vocabulary tensor, when all are written."""
        found = (table.statistics for table in self.tables.values())
        return tuple(statistics for statistics in found if statistics is not None)

    def probe_text(self, spec: str | Path) -> ProbeText:
        """What base and result will read."""
        from lexigraft.models.probe import probe_text  # torch, for a probe alone

        spelled = self.spelled.result()
        return probe_text(spelled.base, spelled.extended, spec)

    def probe(self, model: Path, text: ProbeText, *, trust: bool) -> ProbeResult:
        """What base and written folder `model` say of `text`."""
        from lexigraft.models.probe import probe

        total = 2 * sum(len(window.encode()) for window in text.windows)
        with progress("probing base and result", total) as advance:
            return probe(
                text,
                self.checkpoint.folder,
                model,
                self.growth,
                trust_remote_code=trust,
                advance=advance,
            )

    def text(self, token_id: int) -> str:
        """What an id stands for; bytes that are no whole character in hexadecimal."""
        return readable(self.spelled.result().extended.token_bytes(token_id))

    def write_side_files(self, partial: Path) -> None:
        """Config, tokenizer, and what else the base holds beside its weights."""
        for name in copy_side_files(self.checkpoint, partial):
            note(f"left out: {name} (it holds weights, or a tokenizer, of the old vocabulary)")
        config = edit_config(
            self.checkpoint.config,
            self.vocabulary,
            rows=self.growth.rows,
            tokens=self.growth.tokens,
        )
        write_json(partial / "config.json", config)
        place_tokenizer(self.checkpoint.folder, self.vocab, partial)
        _ = self.old.hash, self.new.hash  # the manifest needs them, and they take a while
        self.spelled.result()  # its fault stops those who write

    def write_manifest(self, partial: Path) -> None:
        """What binds the new rows to the tokenizer; once they are written."""
        manifest = self._manifest()
        manifest.write(partial)
        path = partial / "tokenizer_config.json"
        settings = read_object(path) if path.exists() else {}
        settings["lexigraft"] = {"manifest": manifest.hash, **self._init()}
        write_json(path, settings)

    def _manifest(self) -> Manifest:
        before = Manifest.read(self.vocab) or Manifest.read(self.checkpoint.folder) or Manifest()
        growth = self.growth
        return before.plus(
            GraftRecord(
                base=BaseTokenizer(
                    name=recorded_name(self.checkpoint.folder),
                    token_map=self.old.hash,
                    tokens=growth.first_id,
                ),
                rows_before=growth.rows_before,
                tied=self.vocabulary.tied,
                base_rows={name: table.survey.sha256 for name, table in self.tables.items()},
                token_map=self.new.hash,
                tokens=growth.tokens,
                first_id=growth.first_id,
                rows=growth.rows,
                pad_to=self.pad_to,
                **self._init(),
                new_rows={name: table.new.hexdigest() for name, table in self.tables.items()},
                versions=versions(["lexigraft", "numpy"]),
                start=self._start(),
                roles=dict(self.told) if self.told else None,
                replaced=list(growth.replaced) or None,
            )
        )

    def _init(self) -> dict[str, Any]:
        start = self.spelled.result().start
        return {"init": str(start.choice), "seed": start.seed}

    def _start(self) -> StartRecord:
        spelled = self.spelled.result()
        choice = spelled.start.choice
        return StartRecord(
            methods={name: choice.of(role) for name, role in self.vocabulary.roles.items()},
            reason=choice.reason,
            copies=[
                CopiedRow(id=one.id, source=one.source, pieces=list(one.pieces))
                for one in spelled.copied
            ],
            donor=_donor_record(spelled.start),
        )


def _donor_record(start: Start) -> DonorRecord | None:
    donor = start.donor
    if donor is None:
        return None
    from lexigraft.embeddings.donor import ATOMS

    return DonorRecord(
        name=recorded_name(donor.folder),
        token_map=donor.token_map.hash,
        atoms=ATOMS,
        shared=len(donor.shared),
        known=donor.known,
    )


def _prepare(
    base: Path,
    vocab: Path,
    asked: _Asked,
    *,
    pad_to: int,
    tensor_roles: Mapping[str, str] | None,
) -> _Job:
    checkpoint = Checkpoint.open(base)
    refuse_quantised(checkpoint)
    refuse_ungathered(checkpoint)
    vocabulary = with_copies(checkpoint, vocabulary_of(checkpoint, tensor_roles))
    require_floats(checkpoint, vocabulary)
    require_folder(vocab, "the extended tokenizer")
    try:
        old, new = TokenMap.read(base), TokenMap.read(vocab)
        require_fitting_rows(checkpoint, vocabulary, old.tokens, new.tokens)
        replaced = _replaced(vocab, old, new)
        require_extension(base, old, vocab, new, replaced)
        require_free_ids(checkpoint, old, new, replaced)
    except LexigraftError:
        for folder in (base, vocab):  # what no engine can read is the graver fault
            families.load(folder)
        raise
    mention_normalised_head(checkpoint, vocabulary)
    step = pad_to if new.tokens > old.tokens else 1  # nothing grows: nothing to round
    growth = Growth.to(vocabulary.rows, old.tokens, new.tokens, step, replaced)
    tables = {name: _Table(checkpoint.tensors[name], growth) for name in vocabulary.names}

    def spell() -> _Spelled:
        texts = [_spelling(new, i) for i in growth.new_ids if i in new.texts]
        family, extended = _loaded(base, old, texts), _loaded(vocab, new)
        with without_tokens(family, replaced) as left:
            start, copied = _start_of(asked, left, extended, tied=vocabulary.tied)
        return _Spelled(family, extended, start, copied)

    thread = ThreadPoolExecutor(1)
    spelled = thread.submit(spell)
    thread.shutdown(wait=False)
    roles = vocabulary.roles
    planned = [table.planned(spelled, roles[name]) for name, table in tables.items()]
    return _Job(
        checkpoint=checkpoint,
        vocabulary=vocabulary,
        vocab=vocab,
        old=old,
        new=new,
        growth=growth,
        spelled=spelled,
        pad_to=pad_to,
        plan=Plan.of(checkpoint).replace(planned),
        tables=tables,
        told=tensor_roles or recorded_roles(checkpoint),
    )


def _spelling(tokens: TokenMap, token_id: int) -> str:
    """A token as the merges read it."""
    text = tokens.texts[token_id]
    return byte_text(text.encode()) if token_id in tokens.added else text


def _loaded(folder: Path, known: TokenMap, spell: Sequence[str] = ()) -> Family:
    """The tokenizer in `folder`, whose token map is `known` from its files."""
    family = families.load(folder, spell=spell)
    if family.map.texts != known.texts:
        raise changed(folder, "was changed")
    return family


def _replaced(vocab: Path, old: TokenMap, new: TokenMap) -> tuple[int, ...]:
    """Old ids to which `learn` gave other tokens, by the manifest of VOCAB."""
    return (Manifest.read(vocab) or Manifest()).replaced(old.hash, new.hash)


def _start_of(
    asked: _Asked, base: Family, extended: Family, *, tied: bool
) -> tuple[Start, list[Copied]]:
    from lexigraft.embeddings import Start, choose

    choice = choose(
        asked.init,
        tied=tied,
        init_from=asked.init_from is not None,
        donor=asked.donor is not None,
    )
    copied, donor = [], None
    if asked.init_from is not None:
        from lexigraft.embeddings.copying import read_copies

        copied = read_copies(asked.init_from, base, extended.map)
    if asked.donor is not None:
        from lexigraft.embeddings.donor import Donor

        donor = Donor.open(asked.donor, base, extended)
        new = len(donor.wanted)
        note(
            f"{asked.donor} has {donor.known:,} of the {new:,} new tokens as one token, and "
            f"{len(donor.shared):,} tokens in common with the base; the other "
            f"{new - donor.known:,} new tokens start as the mean of their pieces"
        )
    start = Start.of(
        choice,
        base,
        extended.map,
        tied=tied,
        seed=asked.seed,
        copies={one.id: one.pieces for one in copied},
        donor=donor,
    )
    return start, copied
