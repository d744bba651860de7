"""Integer products, and the seam where accelerated backends plug in.

A backend is a module with two functions of the signatures in :mod:`~ptq4dit_jax.engine.matmul.xla`, the reference and
default. It may raise NotImplementedError for a case that it does not cover; the reference runs then. Accumulators are exact
int32 in every backend, so backends are compared bit by bit before the epilogue.
"""

from __future__ import annotations

from types import ModuleType

import jax

from ptq4dit_jax.engine.matmul import xla
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.quantizers import QTensor

_BACKENDS: dict[str, ModuleType] = {"xla": xla}
BACKENDS = tuple(_BACKENDS)


def _backend(name: str) -> ModuleType:
    if name not in _BACKENDS:
        raise Ptq4ditError(f"Unknown matmul backend {name!r}; the backends are {', '.join(BACKENDS)}.")
    return _BACKENDS[name]


def linear(x: jax.Array, weight: QTensor, scale: jax.Array, bias: jax.Array, *, backend: str = "xla") -> jax.Array:
    """``scale * (x @ codes.T) + bias``: int8 (..., K) activations times a weight (N, K), to (..., N) in the scale's type.

    ``scale`` and ``bias`` broadcast against the result; the zero point of ``x`` is already in ``bias``.
    """
    try:
        return _backend(backend).linear(x, weight, scale, bias)
    except NotImplementedError:
        return xla.linear(x, weight, scale, bias)


def batched(a: jax.Array, b: jax.Array, *, backend: str = "xla") -> jax.Array:
    """``a @ b^T`` over the last axes: int8 (B, A, M, K) and (B, A, N, K) to int32 (B, A, M, N)."""
    try:
        return _backend(backend).batched(a, b)
    except NotImplementedError:
        return xla.batched(a, b)
