"""XLA's products on TPUs, called so that nothing between them is copied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
from jax.typing import DTypeLike

from ptq4dit_jax.engine.backends import require
from ptq4dit_jax.engine.xla import linear as products
from ptq4dit_jax.quantizers import Encoded, QTensor


def unpack_ahead(weights: Mapping[str, QTensor], after: jax.Array) -> dict[str, QTensor]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.unpack_ahead`.

    Codes are made once per block. Fused with a product, they would be made again for each of its windows of rows.
    """
    packed = {name: weight for name, weight in weights.items() if weight.packed}
    codes, _ = jax.lax.optimization_barrier(({name: weight.codes(fusible=False) for name, weight in packed.items()}, after))
    return {**weights, **{name: QTensor(codes[name], weight.scale, None, bits=8) for name, weight in packed.items()}}


def prepare(weights: Mapping[str, QTensor]) -> dict[str, QTensor]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.prepare`."""
    return {name: weight.as_int4() for name, weight in weights.items()}


def linear_parts(x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.linear_parts`. One product per part: a kernel takes no part of an array,
    so parts of one product would be copied."""
    require(not weight.packed, "the weight is packed")
    return products.by_parts(partial(products.linear, dtype=dtype), x, weight, bias, parts)
