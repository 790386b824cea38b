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
    """A vocabulary matrix whose rows [first_id, first_id + N) are `rows`.

    Of the stored matrix the rows before them get a gradient if its weight asks for one (old rows
    that train slowly); those behind them, which are padding, and those in their place never do.
    """

    def __init__(self, inner: nn.Module, rows: nn.Parameter, first_id: int) -> None:
        super().__init__()
        self.inner = inner
        self.rows = rows
        self.first_id = first_id

    @property
    def weight(self) -> Tensor:
        """The stored matrix (rows, D), whose new rows are those from before training."""
        return self.inner.weight

    @property
    def end(self) -> int:
        """One past the highest new id."""
        return self.first_id + len(self.rows)


class GrownEmbedding(_Grown):
    """An input embedding with new rows of its own."""

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
    """An output head with new rows of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) -> logits (B, T, rows)."""
        matrix = self.inner.weight
        parts = [matrix[: self.first_id], self.rows.to(hidden.dtype), matrix[self.end :].detach()]
        bounds = [0, self.first_id, self.end, len(matrix)]
        bias = self.inner.bias
        return torch.cat(
            [
                F.linear(hidden, part, None if bias is None else bias[begin:end])
                for part, begin, end in zip(parts, bounds, bounds[1:], strict=False)
            ],
            dim=-1,
        )


@dataclass(frozen=True)
class NewRows:
    """What `grow` made of a model.

    Attributes:
        first_id: the lowest new id.
        modules: module path of each vocabulary matrix -> the module that holds its new rows.
            Tied matrices have one entry, the embedding's.
        before: path -> its new rows (N, D) as they were, float32.
        tied_head: module path of a head that shares the embedding's rows, else None.
    """

    first_id: int
    modules: dict[str, _Grown]
    before: dict[str, Tensor]
    tied_head: str | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Path -> its new rows (N, D), float32; read anew, for sharding puts others in place."""
        return {path: module.rows for path, module in self.modules.items()}

    @property
    def ids(self) -> list[int]:
        """The new ids, in the order of the rows."""
        count = len(next(iter(self.before.values())))
        return list(range(self.first_id, self.first_id + count))

    def moved(self) -> Tensor:
        """(N,) float32: how far each row is from where it was, over all matrices.

        Every process of a sharded run must call it.
        """
        squares = [
            (whole(row) - self.before[path]).square().sum(1)
            for path, row in self.parameters.items()
        ]
        return torch.stack(squares).sum(0).sqrt()


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values; a sharded one is gathered, by all processes together."""
    values: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return values.detach()


def grow(model: Any, first_id: int, tokens: int, *, old_rows: bool = False) -> NewRows:
    """Make rows [first_id, tokens) of a frozen model trainable, in place.

    Tied embedding and head get one shared parameter; rows above `tokens` are padding and stay.

    Args:
        model: a causal language model without gradients.
        first_id: the lowest new id.
        tokens: one past the highest.
        old_rows: let rows [0, first_id) train too, as part of the stored matrices.

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
        embedding_path: GrownEmbedding(embedding, _rows_of(embedding, first_id, tokens), first_id)
    }
    rows = grown[embedding_path].rows if tied else _rows_of(head, first_id, tokens)
    grown[head_path] = GrownHead(head, rows, first_id)
    for path, module in grown.items():
        _replace(model, path, module)
    if tied:
        del grown[head_path]
    before = {path: module.rows.detach().clone() for path, module in grown.items()}
    return NewRows(first_id, grown, before, head_path if tied else None)


@torch.no_grad()  # type: ignore[untyped-decorator]
def fold(model: Any, rows: NewRows) -> None:
    """Put the new rows into the stored matrices, and the plain modules back in their places."""
    paths = [*rows.modules, *([rows.tied_head] if rows.tied_head else [])]
    for path in paths:
        module = model.get_submodule(path)
        module.weight[module.first_id : module.end].copy_(module.rows)
        _replace(model, path, module.inner)


def _rows_of(module: nn.Module, first_id: int, tokens: int) -> nn.Parameter:
    weight: Tensor = module.weight
    return nn.Parameter(weight.detach()[first_id:tokens].to(torch.float32, copy=True))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
