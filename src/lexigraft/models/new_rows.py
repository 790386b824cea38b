"""New vocabulary rows as parameters of their own, so that nothing else can move.

PEFT's trainable tokens copy the whole matrix in every forward pass and so build a gradient of
its full size. Here the old rows are a frozen matrix and the new rows a small float32 parameter:
gradients and optimizer state exist for new rows alone, and the old ones stay as they are by
construction. On disk the result has PEFT's layout (`models/adapter_files.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexigraft.errors import RefusalError


class _Grown(nn.Module):  # type: ignore[misc]
    """A vocabulary matrix whose rows [first_id, first_id + N) are `rows`, the others frozen."""

    def __init__(self, inner: nn.Module, rows: nn.Parameter, first_id: int) -> None:
        super().__init__()
        self.inner = inner
        self.rows = rows
        self.first_id = first_id

    @property
    def weight(self) -> Tensor:
        """The stored matrix (rows, D), whose new rows are those from before training."""
        return self.inner.weight


class GrownEmbedding(_Grown):
    """An input embedding whose rows [first_id, first_id + N) are `rows`, the others frozen."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> vectors (B, T, D), in the dtype of the stored matrix."""
        place = ids - self.first_id
        is_new = (place >= 0) & (place < len(self.rows))
        old = self.inner(ids.masked_fill(is_new, 0))
        new = F.embedding(place.clamp(0, len(self.rows) - 1), self.rows)
        scale = getattr(self.inner, "embed_scale", None)  # Gemma: vectors times sqrt(D)
        if scale is not None:
            new = new * scale
        return torch.where(is_new[..., None], new.to(old.dtype), old)


class GrownHead(_Grown):
    """An output head whose rows [first_id, first_id + N) are `rows`, the others frozen."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) -> logits (B, T, rows)."""
        end = self.first_id + len(self.rows)
        bias = None if self.inner.bias is None else self.inner.bias[self.first_id : end]
        old = self.inner(hidden)
        new = F.linear(hidden, self.rows.to(hidden.dtype), bias)
        return torch.cat([old[..., : self.first_id], new, old[..., end:]], dim=-1)


@dataclass(frozen=True)
class NewRows:
    """What `grow` made of a model.

    Attributes:
        first_id: the lowest new id.
        parameters: module path of each vocabulary matrix -> its new rows (N, D), float32. Tied
            matrices have one entry, the embedding's.
        before: the same rows as they were.
        tied_head: module path of a head that shares the embedding's rows, else None.
    """

    first_id: int
    parameters: dict[str, nn.Parameter]
    before: dict[str, Tensor]
    tied_head: str | None = None

    @property
    def ids(self) -> list[int]:
        """The new ids, in the order of the rows."""
        count = len(next(iter(self.parameters.values())))
        return list(range(self.first_id, self.first_id + count))

    def moved(self) -> Tensor:
        """(N,) float32: how far each row is from where it was, over all matrices."""
        squares = [
            (row.detach() - self.before[path]).square().sum(1)
            for path, row in self.parameters.items()
        ]
        return torch.stack(squares).sum(0).sqrt()


def grow(model: Any, first_id: int, tokens: int) -> NewRows:
    """Make rows [first_id, tokens) of a frozen model trainable, in place.

    Tied embedding and head get one shared parameter; rows above `tokens` are padding and stay.

    Raises:
        RefusalError: the vocabulary matrices are not a plain embedding and linear layer.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise RefusalError(
            f"{type(model).__name__} has a {type(embedding).__name__} and a {type(head).__name__}",
            needed="an Embedding and a Linear head, whose rows can be trained one by one",
            fix="train a model of a common decoder architecture",
        )
    tied = head.weight is embedding.weight
    paths = {id(module): path for path, module in model.named_modules()}
    embedding_path, head_path = paths[id(embedding)], paths[id(head)]
    parameters = {embedding_path: _rows_of(embedding, first_id, tokens)}
    if not tied:
        parameters[head_path] = _rows_of(head, first_id, tokens)
    before = {path: rows.detach().clone() for path, rows in parameters.items()}
    grown = GrownEmbedding(embedding, parameters[embedding_path], first_id)
    _replace(model, embedding_path, grown)
    _replace(model, head_path, GrownHead(head, list(parameters.values())[-1], first_id))
    return NewRows(first_id, parameters, before, head_path if tied else None)


def _rows_of(module: nn.Module, first_id: int, tokens: int) -> nn.Parameter:
    weight: Tensor = module.weight
    return nn.Parameter(weight.detach()[first_id:tokens].to(torch.float32, copy=True))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
