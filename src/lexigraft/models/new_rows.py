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
from lexigraft.manifest import NewIds
from lexigraft.models.shards import whole


class _Grown(nn.Module):  # type: ignore[misc]
    """A vocabulary matrix in which the rows of the new ids are `rows`.

    Of the stored matrix the rows of old ids get a gradient if its weight asks for one (old rows
    that train slowly); those behind all ids, which are padding, and those of new ids never do.
    """

    ids: Tensor
    places: Tensor

    def __init__(self, inner: nn.Module, rows: nn.Parameter, ids: NewIds) -> None:
        super().__init__()
        self.inner = inner
        self.rows = rows
        self.replaced = len(ids.replaced)
        self.first_id = ids.first
        place = inner.weight.device
        numbers = torch.tensor(list(ids), device=place)
        # (rows,): the place of an id among the new ones; -1 of any other.
        places = torch.full((len(inner.weight),), -1, device=place)
        places[numbers] = torch.arange(len(ids), device=place)
        self.register_buffer("ids", numbers, persistent=False)
        self.register_buffer("places", places, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The stored matrix (rows, D), whose new rows are those from before training."""
        return self.inner.weight

    @property
    def end(self) -> int:
        """One past the highest id."""
        return self.first_id + len(self.rows) - self.replaced


class GrownEmbedding(_Grown):
    """An input embedding with new rows of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> vectors (B, T, D), in the dtype of the stored matrix."""
        place = self.places[ids]
        is_new = place >= 0
        old = self.inner(ids.masked_fill(is_new, 0))
        new = F.embedding(place.clamp(min=0), self.rows)
        scale = getattr(self.inner, "embed_scale", None)  # Gemma: vectors times sqrt(D)
        if scale is not None:
            new = new * scale
        return torch.where(is_new[..., None], new.to(old.dtype), old)


class GrownHead(_Grown):
    """An output head with new rows of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) -> logits (B, T, rows)."""
        return torch.cat(self.parts(hidden), dim=-1)

    def parts(self, hidden: Tensor) -> list[Tensor]:
        """The logits in pieces (B, T, n), one behind the other, which need no copy of them all."""
        matrix, bias = self.inner.weight, self.inner.bias
        parts = (
            (matrix[: self.first_id], slice(0, self.first_id)),
            (self.rows.to(hidden.dtype), self.ids),
            (matrix[self.end :].detach(), slice(self.end, None)),
        )
        old, new, padding = (
            F.linear(hidden, rows, None if bias is None else bias[where]) for rows, where in parts
        )
        if self.replaced:
            # In place, for `old` is the largest tensor of a step; its old values have no gradient.
            old.index_copy_(-1, self.ids[: self.replaced], new[..., : self.replaced].to(old.dtype))
        return [old, new[..., self.replaced :], padding]


@dataclass(frozen=True)
class NewRows:
    """What `grow` made of a model.

    Attributes:
        ids: the new ids, in the order of the rows.
        modules: module path of each vocabulary matrix -> the module that holds its new rows.
            Tied matrices have one entry, the embedding's.
        before: path -> its new rows (N, D) as they were, float32.
        tied_head: module path of a head that shares the embedding's rows, else None.
    """

    ids: NewIds
    modules: dict[str, _Grown]
    before: dict[str, Tensor]
    tied_head: str | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Path -> its new rows (N, D), float32; read anew, for sharding puts others in place."""
        return {path: module.rows for path, module in self.modules.items()}

    def moved(self) -> Tensor:
        """(N,) float32: how far each row is from where it was, over all matrices.

        Every process of a sharded run must call it.
        """
        squares = [
            (whole(row) - self.before[path]).square().sum(1)
            for path, row in self.parameters.items()
        ]
        return torch.stack(squares).sum(0).sqrt()


def grow(model: Any, ids: NewIds, *, old_rows: bool = False) -> NewRows:
    """Make the rows of new ids of a frozen model trainable, in place.

    Tied embedding and head get one shared parameter; rows behind all ids are padding and stay.

    Args:
        model: a causal language model without gradients.
        ids: the new ids.
        old_rows: let the rows of old ids train too, as part of the stored matrices.

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
    for module in (embedding, head):
        module.weight.requires_grad_(old_rows)
    grown: dict[str, _Grown] = {
        embedding_path: GrownEmbedding(embedding, _rows_of(embedding, ids), ids)
    }
    rows = grown[embedding_path].rows if tied else _rows_of(head, ids)
    grown[head_path] = GrownHead(head, rows, ids)
    for path, module in grown.items():
        _replace(model, path, module)
    if tied:
        del grown[head_path]
    before = {path: module.rows.detach().clone() for path, module in grown.items()}
    return NewRows(ids, grown, before, head_path if tied else None)


@torch.no_grad()  # type: ignore[untyped-decorator]
def fold(model: Any, rows: NewRows) -> None:
    """Put the new rows into the stored matrices, and the plain modules back in their places."""
    paths = [*rows.modules, *([rows.tied_head] if rows.tied_head else [])]
    for path in paths:
        module = model.get_submodule(path)
        module.weight[module.ids] = module.rows.to(module.weight.dtype)
        _replace(model, path, module.inner)


def _rows_of(module: nn.Module, ids: NewIds) -> nn.Parameter:
    weight: Tensor = module.weight
    return nn.Parameter(weight.detach()[list(ids)].to(torch.float32))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
