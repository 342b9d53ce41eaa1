"""Operations on weights that are other ones for each row of a batch: ``theta + epsilon z_b`` for row b.

With ``z_b = U * (r_b s_b^T)`` for a matrix and ``u * r_b`` for a vector (``flipout.py``)::

    linear       y_b = W x_b + bias + epsilon (r_b * (U (s_b * x_b)) + u * r'_b)        one more product for the batch
    embedding    y_b[t] = W[ids_b[t]] + epsilon r_b[ids_b[t]] (U[ids_b[t]] * s_b)
    layer_norm, rms_norm, products and sums with a vector                               element by element
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mezo_lightning.flipout import FlipoutDirections
from mezo_lightning.parameters import Slice
from mezo_lightning.samplers import chunk_numel


class RowDirections:
    """The directions of the rows that a model runs on, in one forward at one point.

    Args:
        directions: Of the run.
        number: How many steps the run has made.
        slices: The trainable parameters, by the id of each.
        signs: int8 [rows, signs], the signs of each row's direction.
        coefficient: How far the rows are along their directions.
        tokens: How many elements, or vectors, the model's input has in all: the first dimension of what a layer works
            on that makes one dimension of rows and tokens.
    """

    def __init__(
        self,
        directions: FlipoutDirections,
        number: int,
        slices: Mapping[int, Slice],
        signs: Tensor,
        coefficient: float,
        tokens: int,
    ):
        self._directions = directions
        self._number = number
        self._slices = slices
        self._table = signs
        self._coefficient = coefficient
        self._tokens = tokens

    def piece(self, value: Any) -> Slice | None:
        """The trainable parameter that a value is, if it is one."""
        return self._slices.get(id(value))

    def by_row(self, values: Tensor) -> Tensor:
        """Values [rows, n, width], from [rows, ..., width] or [rows * tokens, width].

        Raises:
            ValueError: If the first dimension is not that of the rows.
        """
        count, size = len(self._table), len(values) if values.dim() else 0
        if values.dim() >= 2 and (size == count or (values.dim() == 2 and size == self._tokens)):
            return values.reshape(count, -1, values.shape[-1])
        raise ValueError(
            f"meets values of shape {tuple(values.shape)}, which do not begin with the batch's {count} rows"
        )

    def moved(self, output: Tensor, *changes: Tensor) -> Tensor:
        """An operation's own, fresh output, moved along what each row's direction adds to it.

        Args:
            output: [rows, ..., width] or [rows * tokens, width]; written to.
            changes: [rows, n, width] or [rows, 1, width] each, at a coefficient of 1.
        """
        result = self.by_row(output)
        for change in changes:
            result.add_(change, alpha=self._coefficient)
        return result.view(output.shape)

    def vector(self, piece: Slice, like: Tensor) -> Tensor:
        """The directions of a vector, [rows, 1, width], in another tensor's dtype."""
        part, _ = self._directions.sides(piece.info)
        return (self._shared(piece, like).view(-1) * self._signs(part, like))[:, None]

    def product(self, piece: Slice, values: Tensor) -> Tensor:
        """The directions of a matrix [out, in], times values [rows, n, in]: [rows, n, out]."""
        left, right = (self._signs(part, values)[:, None] for part in self._directions.sides(piece.info))
        return F.linear(values * right, self._shared(piece, values)).mul_(left)

    def transposed_product(self, piece: Slice, values: Tensor) -> Tensor:
        """The same for a matrix that is stored as [in, out]."""
        left, right = (self._signs(part, values)[:, None] for part in self._directions.sides(piece.info))
        return torch.matmul(values * left, self._shared(piece, values)).mul_(right)

    def lookup(self, piece: Slice, ids: Tensor, like: Tensor) -> Tensor:
        """The directions of a table, at the ids [rows, n] that each row looks up: [rows, n, width]."""
        left, right = (self._signs(part, like) for part in self._directions.sides(piece.info))
        width = piece.info.shape[1]
        unique, inverse = ids.unique(return_inverse=True)
        starts = (unique * width + piece.start).split(max(1, chunk_numel(ids.device) // width))
        shared = torch.cat([self._directions.shared_rows(some, width, self._number).to(like.dtype) for some in starts])
        return shared[inverse].mul_(left.gather(1, ids)[..., None]).mul_(right[:, None])

    def expanded(self, ids: Tensor) -> Tensor:
        """Ids for each row, where [1, n] stands for all rows: [rows, ...].

        Raises:
            ValueError: If the first dimension is neither.
        """
        count = len(self._table)
        if ids.dim() >= 2 and len(ids) == 1:
            return ids.expand(count, *ids.shape[1:])
        if (ids.dim() >= 2 and len(ids) == count) or (ids.dim() == 1 and len(ids) == count == self._tokens):
            return ids
        raise ValueError(f"meets ids of shape {tuple(ids.shape)}, which do not begin with the batch's {count} rows")

    def _signs(self, part: slice, like: Tensor) -> Tensor:
        return self._table[:, part].to(like.dtype)

    def _shared(self, piece: Slice, like: Tensor) -> Tensor:
        return self._directions.shared(piece.info, self._number, like.device).to(like.dtype)


# Each of these takes what torch's own function takes, and returns None where it is not used as layers use it.


def _linear(rows: RowDirections, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if rows.piece(input):
        return None
    matrix, vector, output = rows.piece(weight), rows.piece(bias), F.linear(input, weight, bias)
    changes = [] if matrix is None else [rows.product(matrix, rows.by_row(input))]
    return rows.moved(output, *changes, *([] if vector is None else [rows.vector(vector, output)]))


def _addmm(
    rows: RowDirections, bias: Tensor, input: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    """Of the layer Conv1D in GPT-2."""
    if rows.piece(input) or (beta, alpha) != (1, 1):
        return None
    matrix, vector, output = rows.piece(weight), rows.piece(bias), torch.addmm(bias, input, weight)
    changes = [] if matrix is None else [rows.transposed_product(matrix, rows.by_row(input))]
    return rows.moved(output, *changes, *([] if vector is None else [rows.vector(vector, output)]))


def _embedding(
    rows: RowDirections,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    del padding_idx, norm_type, scale_grad_by_freq, sparse  # of gradients, or of max_norm
    piece = rows.piece(weight)
    if piece is None or max_norm is not None:
        return None
    ids = rows.expanded(input)
    output = F.embedding(ids, weight)
    return rows.moved(output, rows.lookup(piece, ids.reshape(len(ids), -1), output))


def _layer_norm(
    rows: RowDirections,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if len(normalized_shape) != 1:
        return None
    scale, shift = rows.piece(weight), rows.piece(bias)
    output, changes = F.layer_norm(input, normalized_shape, weight, bias, eps), []
    if scale is not None:
        normed = rows.by_row(F.layer_norm(input, normalized_shape, None, None, eps))
        changes.append(normed * rows.vector(scale, output))
    return rows.moved(output, *changes, *([] if shift is None else [rows.vector(shift, output)]))


def _rms_norm(
    rows: RowDirections,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    piece = rows.piece(weight)
    if piece is None or len(normalized_shape) != 1:
        return None
    output = F.rms_norm(input, normalized_shape, weight, eps)
    normed = rows.by_row(F.rms_norm(input, normalized_shape, None, eps))
    return rows.moved(output, normed * rows.vector(piece, output))


def _mul(rows: RowDirections, input: Tensor, other: Any) -> Tensor | None:
    found = _vector_and_values(rows, input, other)
    if found is None:
        return None
    piece, values = found
    output = torch.mul(input, other)
    return rows.moved(output, rows.by_row(values) * rows.vector(piece, output))


def _add(rows: RowDirections, input: Tensor, other: Any, *, alpha: float = 1) -> Tensor | None:
    found = _vector_and_values(rows, input, other)
    if found is None or alpha != 1:
        return None
    output = torch.add(input, other)
    return rows.moved(output, rows.vector(found[0], output))


def _vector_and_values(rows: RowDirections, one: Any, other: Any) -> tuple[Slice, Tensor] | None:
    """A vector among the trainable parameters, and values that it fits element by element."""
    for parameter, values in ((one, other), (other, one)):
        piece = rows.piece(parameter)
        if piece is None or not isinstance(values, Tensor) or rows.piece(values):
            continue
        if piece.info.shape in ((), (1,), tuple(values.shape[-1:])):
            return piece, values
    return None


OPERATIONS: Mapping[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.mul: _mul,
    Tensor.mul: _mul,
    torch.add: _add,
    Tensor.add: _add,
}
"""What can be computed with weights that are other ones for each row."""
