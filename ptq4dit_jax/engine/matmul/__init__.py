"""Integer products with what follows them.

Accumulators are exact int32 in every backend (:mod:`ptq4dit_jax.engine.backends`), so backends are compared bit by bit before
the epilogue.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.typing import DTypeLike

from ptq4dit_jax.engine import backends
from ptq4dit_jax.engine.stacks import Leaf
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor


def prepared(weights: Mapping[str, QTensor], after: jax.Array, *, backend: str = "xla") -> dict[str, QTensor]:
    """The weights (N, K) of a block as its products want them, of the same values: where the backend would rather unpack all
    at once, packed ones become int8, and not before ``after`` (any array) has been computed."""
    return backends.run(__name__, "prepared", backend, weights, after)


def linear(x: Encoded, weight: QTensor, bias: Leaf, dtype: DTypeLike, *, backend: str = "xla") -> jax.Array:
    """``scale * (values @ codes.T) + bias``: int8 (..., K) times a weight (N, K), to (..., N) in ``dtype``.

    ``bias`` broadcasts against the result; the zero point of ``x`` is already in it. The epilogue is in float32 at least.
    """
    return backends.run(__name__, "linear", backend, x, weight, bias, dtype)


def linear_parts(
    x: Encoded, weight: QTensor, bias: Leaf, dtype: DTypeLike, parts: int, *, backend: str = "xla"
) -> list[jax.Array]:
    """:func:`linear`, its columns in ``parts`` arrays of equal width."""
    return backends.run(__name__, "linear_parts", backend, x, weight, bias, dtype, parts)


def linear_each(
    x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike, parts: int, *, backend: str = "xla"
) -> list[jax.Array]:
    """:func:`linear_parts` for stacks of layers that do not follow one another: values (L, B, K) and weights (L, N, K) to
    ``parts`` arrays (L, B, N / parts)."""
    return backends.run(__name__, "linear_each", backend, x, weight, bias, dtype, parts)


def linear_gelu(x: Encoded, weight: QTensor, bias: Leaf, act: ActQuantizer, *, backend: str = "xla") -> Encoded:
    """:func:`linear`, then GELU (by tanh), quantized by ``act`` for the next layer."""
    return backends.run(__name__, "linear_gelu", backend, x, weight, bias, act)


def linear_residual(
    x: Encoded, weight: QTensor, bias: Leaf, gate_BD: Leaf, x_BTD: jax.Array, *, backend: str = "xla"
) -> jax.Array:
    """``x + gate * linear``, (B, T, D) in the type of ``x_BTD``."""
    return backends.run(__name__, "linear_residual", backend, x, weight, bias, gate_BD, x_BTD)


def batched(a: jax.Array, b: jax.Array, *, backend: str = "xla") -> jax.Array:
    """``a @ b^T`` over the last axes: int8 (B, A, M, K) and (B, A, N, K) to int32 (B, A, M, N)."""
    return backends.run(__name__, "batched", backend, a, b)
