"""The reference implementation. Runs on CPU, GPU and TPU."""

from __future__ import annotations

import jax

from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.networks.parts import modulate, normalize
from ptq4dit_jax.numerics import at_least_float32
from ptq4dit_jax.quantizers import ActQuantizer, Encoded


def encode(x: jax.Array, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.encode`."""
    return act.encode(x)


def modulate_encode(
    x_BTD: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array, act: ActQuantizer, norm: Norm
) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.modulate_encode`."""
    return act.encode(normed(x_BTD, shift_BD, scale_BD, norm))


def normed(x_BTD: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array, norm: Norm) -> jax.Array:
    """Returns ``norm(x) * (1 + scale) + shift``, (B, T, D) in float32 at least. None means no shift."""
    wide = lambda a: a.astype(at_least_float32(a.dtype))
    shift_BD = None if shift_BD is None else wide(shift_BD)
    return modulate(normalize(wide(x_BTD), norm), shift_BD, wide(scale_BD))
