"""`split`: an adapter as a server takes it: a base that holds its rows, and LoRA beside it.

Servers share one base among many adapters and refuse what lies in it: rows of the vocabulary,
modules saved in full, biases. All of that goes into the base, as `merge` would put it there; LoRA
on linear layers stays outside. What both together compute is the merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.adapters.folder import Adapter
from lexigraft.adapters.merging import Job, prepare, write
from lexigraft.adapters.pure import PureLora, targets
from lexigraft.adapters.writing import adapter_plan, write_adapter
from lexigraft.console import working
from lexigraft.errors import RefusalError
from lexigraft.files import (
    Inputs,
    publish,
    read_object,
    refuse_existing,
    refuse_overwriting,
    sha256_file,
)
from lexigraft.hub import local_folder
from lexigraft.manifest import Manifest, SplitRecord, versions


@dataclass(frozen=True)
class SplitResult:
    """What `split` wrote.

    Attributes:
        output: the folder of both.
        base: the model with the adapter's rows.
        adapter: LoRA alone.
        rows: rows of the base's vocabulary tensors.
        tokens: max id + 1 of its tokenizer.
        tied: its head is its input embedding.
        tensors: how many tensors of the base changed.
        layers: how many layers have LoRA.
        rank: of all of them.
        alpha: of all of them.
        folded: scalings went into B.
        sources: a line per changed vocabulary tensor: where each of its rows comes from.
        plan: with `dry_run`, every tensor with its old and new shape and bytes.
    """

    output: Path
    base: Path
    adapter: Path
    rows: int
    tokens: int
    tied: bool
    tensors: int
    layers: int
    rank: int
    alpha: int
    folded: bool
    sources: tuple[str, ...]
    plan: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The machine-readable result."""
        found = {
            "output": str(self.output),
            "base": str(self.base),
            "adapter": str(self.adapter),
            "rows": self.rows,
            "tokens": self.tokens,
            "tied": self.tied,
            "tensors": self.tensors,
            "layers": self.layers,
            "rank": self.rank,
            "alpha": self.alpha,
            "folded": self.folded,
            "sources": list(self.sources),
        }
        return found if self.plan is None else {**found, "plan": self.plan}

    def lines(self) -> list[str]:
        """What a person reads."""
        plan = [
            f"{entry['tensor']}: {entry['old_shape']} -> {entry['shape']}, "
            f"{entry['bytes_copied']:,} of {entry['bytes_written']:,} bytes copied"
            for entry in self.plan or ()
        ]
        tie = "tied" if self.tied else "with a head of its own"
        done = "would write" if self.plan is not None else "wrote"
        folded = ", each layer's scaling multiplied into B" if self.folded else ""
        return [
            *plan,
            *self.sources,
            f"{done} {self.base}: {self.rows:,} rows for {self.tokens:,} tokens, {tie}; "
            f"tensors that change: {self.tensors}",
            f"{done} {self.adapter}: LoRA on {self.layers} linear layers, rank {self.rank}, alpha "
            f"{self.alpha}{folded}",
        ]


@working("splitting")
def split(
    model: str | Path,
    adapter: str | Path,
    *,
    output: str | Path,
    tokenizer: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> SplitResult:
    """Part an adapter into what belongs into the base and LoRA that every server takes.

    Args:
        model: the model that was trained, or the model as it was before it was grafted.
        adapter: the adapter folder.
        output: the folder to write `base` and `adapter` into.
        tokenizer: the tokenizer that the adapter was trained with, where its folder has none.
        force: replace `output` if it exists.
        dry_run: decide everything and write nothing.

    Raises:
        RefusalError: an adapter that LoRA on linear layers cannot carry, or a kind of adapter or
            base that is not supported.
        LexigraftError: model, adapter and tokenizer do not fit together, a row has no source, or
            a file is missing or damaged.
    """
    source, folder, target = local_folder(model), local_folder(adapter), Path(output)
    given = None if tokenizer is None else local_folder(tokenizer)
    if not dry_run:
        refuse_existing(target, force=force)
    refuse_overwriting(target, (source, folder))
    inputs = Inputs((source, folder, *([] if given is None else [given])))
    _refuse_beyond_lora(source, Adapter.open(folder))
    job = prepare(source, folder, given, linear_apart=True)
    refuse_overwriting(target, (job.tokenizer.folder,))
    if not job.apart:
        raise RefusalError(
            f"{folder} has no LoRA on linear layers: nothing would be left for a server to load",
            needed="an adapter with LoRA on linear layers of the body",
            fix=f"lexigraft merge {model} {adapter} -o MERGED",
        )
    lora = PureLora.of(job.apart.values())
    if not dry_run:
        with publish(target, force=force, inputs=inputs) as partial:
            _write(job, lora, partial, target)
    return _result(job, lora, target, dry_run=dry_run)


def _refuse_beyond_lora(model: Path, adapter: Adapter) -> None:
    """Stop at forms that multiply, or that servers have no name for."""
    experts = adapter.config.parameters
    kinds = {
        "DoRA": adapter.config.dora,
        "(IA)3": bool(adapter.scales),
        f"LoRA on the bare parameters {', '.join(experts)}": bool(experts),
        "a classifier": adapter.config.classifies,
    }
    for kind, found in kinds.items():
        if found:
            raise RefusalError(
                f"{adapter.folder} is {kind}, which plain LoRA on linear layers cannot carry",
                needed="plain LoRA on linear layers, beside whatever goes into the base",
                fix=f"lexigraft merge {model} {adapter.folder} -o MERGED, and serve MERGED",
            )


def _write(job: Job, lora: PureLora, folder: Path, target: Path) -> None:
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (trained,) = job.adapters
    record = SplitRecord(
        adapter=sha256_file(trained.weights),
        token_map=job.tokenizer.map.hash,
        rows=job.growth.rows,
        tied=job.tied,
        versions=versions(["lexigraft", "torch"]),
        changed=sorted(job.changed),
    )
    write(job, base, record)
    config = {
        "task_type": read_object(trained.config.path).get("task_type"),
        "base_model_name_or_path": str(target / "base"),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "fan_in_fan_out": lora.transposed,
        "target_modules": targets(lora.modules, job.plan.tensors),
    }
    write_adapter(adapter, adapter_plan(lora.tensors), config)
    # With its tokenizer it cannot be merged into a base that lacks the rows without a fault.
    job.tokenizer.copy(job.checkpoint.folder, adapter)
    Manifest(records=job.records()).plus(record).write(adapter)


def _result(job: Job, lora: PureLora, target: Path, *, dry_run: bool) -> SplitResult:
    plans = (job.plan, adapter_plan(lora.tensors))
    written = {rows.name for rows in job.written}
    return SplitResult(
        output=target,
        base=target / "base",
        adapter=target / "adapter",
        rows=job.growth.rows,
        tokens=job.tokenizer.map.tokens,
        tied=job.tied,
        tensors=len(job.changed | written),
        layers=len(lora.modules),
        rank=lora.rank,
        alpha=lora.alpha,
        folded=lora.folded,
        sources=tuple(rows.line() for rows in job.written),
        plan=[entry for plan in plans for entry in plan.to_json()] if dry_run else None,
    )
