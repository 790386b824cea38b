"""What `train` tells of its new rows, for whoever trains with transformers' own Trainer.

Batches are looked at as they go into the model: so every target and every input is counted,
whatever made the batches. Measures, evidence and verdict are those of `train`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from lexigraft.console import note
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import write_whole
from lexigraft.hub import local_folder
from lexigraft.models.evidence import RowEvidence, TrainingLines, gather, places_of
from lexigraft.models.load import require_row
from lexigraft.models.packing import IGNORED
from lexigraft.models.preparation import base_measure, look, measured_subject
from lexigraft.models.verdict import adoption, judge, verdict_lines

REPORT = "training.json"


class EvidenceCallback(TrainerCallback):  # type: ignore[misc]
    """Measures held-out text on the way, and says at the end what each new row has learned.

    For a Trainer whose model was loaded from a folder that `graft` wrote; whatever trains, and
    however. When training ends, `result` holds what docs/files.md says of training.json, as far
    as it can be known here (`train_bpb` is null), and so does `training.json` in `output_dir`.

    Args:
        model: the folder that the Trainer's model was loaded from: its tokenizer, manifest and
            `new_tokens.jsonl` say which rows are new.
        corpus: text of the field that is not trained on; all of it may be measured.
        general: everyday text that is not trained on.
        base: the model before `graft`; without it the untrained model tells, by its old rows.
        measurements: how often is measured, the end included.
        measured_bytes: at most so much of each text per measurement.
        seed: which part of longer texts that is.
        trust_remote_code: run the Python files that `base` brings for its architecture.

    Attributes:
        result: empty until training has ended.

    Raises:
        LexigraftError: no text, or a damaged folder; from the Trainer, batches without labels.
        RefusalError: from the Trainer, several processes or devices.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        corpus: Sequence[str | Path],
        general: Sequence[str | Path] = (),
        base: str | Path | None = None,
        measurements: int = 4,
        measured_bytes: int = 16_384,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        self._subject = measured_subject(
            local_folder(model), corpus, general, seed=seed, measured_bytes=measured_bytes
        )
        self._origin = None if base is None else local_folder(base)
        self._measurements, self._trust = measurements, trust_remote_code
        family = self._subject.family
        self._lengths = np.zeros(family.map.tokens, np.int64)
        for token in family.map.texts.keys() - family.map.added:
            self._lengths[token] = len(family.token_bytes(token))
        self.result: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measure the untrained model, and look at every batch from here on."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise RefusalError(
                f"EvidenceCallback with {max(args.world_size, args.n_gpu)} processes or devices",
                needed="one of them, which sees all batches",
                fix="lexigraft train counts over all processes",
            )
        model, ids = more["model"], self._subject.ids
        held = self._subject.held_lines()
        require_row(
            self._subject.folder, model, self._subject.family, max(map(max, held), default=0)
        )
        if state.global_step:
            note(f"evidence begins at step {state.global_step:,}: what was before is not known")
        self._log: list[dict[str, float | None]] = []
        self._targets, self._inputs = (np.zeros(len(ids), np.int64) for _ in range(2))
        self._bytes = self._tokens = 0
        self._seconds, self._began = 0.0, time.monotonic()
        self._training = TrainingLines(ids, held)
        self._before = [_rows(table, list(ids)) for table in _tables(model)]
        self._points = {
            round(state.max_steps * (place + 1) / self._measurements)
            for place in range(self._measurements)
        }
        self._base = base_measure(self._subject, model, self._origin, trust_remote_code=self._trust)
        self._bits = self._record(model, state.global_step)
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of one step."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measure if it is time; the end is measured by `on_train_end`."""
        self._seconds += time.monotonic() - self._began
        if state.global_step in self._points and state.global_step < state.max_steps:
            self._record(more["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measure the model as it is left, gather the evidence, and write training.json."""
        self._hook.remove()
        model, ids = more["model"], list(self._subject.ids)
        if len(self._log) > 1 and self._log[-1]["step"] == state.global_step:
            self._log.pop()  # Trainer may have gone back to its best checkpoint since
        self._record(model, state.global_step)
        seen: list[RowEvidence] = []
        if ids:
            after = [_rows(table, ids) for table in _tables(model)]
            squares = [
                (new - old).square().sum(1) for new, old in zip(after, self._before, strict=True)
            ]
            moved = torch.stack(squares).sum(0).sqrt().tolist()
            counts = zip(self._targets.tolist(), self._inputs.tolist(), moved, strict=True)
            seen = gather(
                model,
                self._subject.new,
                self._subject.held_lines(),
                self._training.lines,
                list(counts),
                before=self._bits,
            )
        self.result = self._told(state.global_step, seen)
        write_whole(
            Path(args.output_dir) / REPORT,
            json.dumps(self.result, indent=2, ensure_ascii=False) + "\n",
        )
        note("\n".join(verdict_lines(self.result["verdict"])))

    def _told(self, step: int, seen: Sequence[RowEvidence]) -> dict[str, Any]:
        """The content of training.json."""
        end = self._log[-1]
        rows = [asdict(row) for row in seen]
        return {
            "steps": step,
            "text_bytes": self._bytes,
            "tokens": self._tokens,
            "seconds": round(self._seconds, 3),
            "domain_bpb": end["domain_bpb"],
            "general_bpb": end["general_bpb"],
            "base": self._base,
            "kept_step": step,
            "stopped": None,
            "rows_moved": sum(row.moved > 0 for row in seen),
            "new_rows": len(self._subject.ids),
            "adoption": adoption(seen)[0],
            "verdict": judge(self._log, self._base, seen).to_json(),
            "log": self._log,
            "new_target_share": int(self._targets.sum()) / max(1, self._tokens),
            "rows": rows,
        }

    def _record(self, model: Any, step: int) -> dict[int, float]:
        """Measure now and note it; returns the bits of each new token."""
        figures, bits = look(self._subject, model)
        self._log.append(
            {
                "step": step,
                "text_bytes": self._bytes,
                "tokens": self._tokens,
                "seconds": round(self._seconds, 3),
                "train_bpb": None,
                **figures,
            }
        )
        return bits

    def _see(self, model: Any, _: Any, batch: Mapping[str, Any]) -> None:
        """Count what a batch trains on; measurements and evaluations are no training."""
        if not model.training:
            return
        inputs, targets, positions, read = _aligned(batch)
        ids = self._subject.ids
        for counts, met in ((self._targets, targets), (self._inputs, inputs[read])):
            found = places_of(met, ids)
            np.add(counts, np.bincount(found[found >= 0], minlength=len(ids)), out=counts)
        scored = targets[targets != IGNORED]
        self._tokens += len(scored)
        self._bytes += int(self._lengths[scored[scored < len(self._lengths)]].sum())
        if not self._training.are_enough:
            self._training.look(inputs, targets, positions)


def _aligned(batch: Mapping[str, Any]) -> tuple[NDArray[Any], ...]:
    """Inputs, the target of each, its position, and whether it is read: each (B, T).

    Labels are shifted here as the models of transformers do it, unless the batch has them shifted.

    Raises:
        LexigraftError: the model is given no labels.
    """
    shifted, labels = batch.get("shift_labels"), batch.get("labels")
    if shifted is None and labels is None:
        raise LexigraftError(
            "EvidenceCallback: a batch without labels",
            needed="labels in what goes into the model, by which targets are counted",
            fix="leave out label_smoothing_factor and compute_loss_func",
        )
    inputs = _array(batch["input_ids"])
    shape = inputs.shape
    positions = _shaped(batch.get("position_ids"), shape)
    if positions is None:
        positions = np.broadcast_to(np.arange(shape[1]), shape)
    mask = _shaped(batch.get("attention_mask"), shape)
    read = np.ones(shape, bool) if mask is None else mask != 0
    if shifted is not None:
        return inputs, _array(shifted), positions, read
    return inputs[:, :-1], _array(labels)[:, 1:], positions[:, :-1], read[:, :-1]


def _shaped(value: Any, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """A tensor of a batch if it has a number for each input; else None."""
    return _array(value) if isinstance(value, Tensor) and value.shape == shape else None


def _array(tensor: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = tensor.detach().cpu().numpy()
    return found


def _tables(model: Any) -> list[Any]:
    """The modules with vocabulary rows; of a tied model the embedding stands for both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    configs = (model.config, model.config.get_text_config())
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    return [embedding] if tied else [embedding, head]


@torch.no_grad()  # type: ignore[untyped-decorator]
def _rows(table: Any, ids: list[int]) -> Tensor:
    """The rows (N, D) that a table computes with now, float32, with what PEFT adds to them."""
    weight: Tensor = table.weight  # of PEFT's wrappers: the trained copy
    rows = weight[ids].float()
    if hasattr(table, "get_delta_weight"):  # LoRA
        for name in table.active_adapters:
            rows = rows + table.get_delta_weight(name)[ids].float()
    return rows.cpu().clone()
