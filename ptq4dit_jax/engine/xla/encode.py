"""The reference implementation. Runs on CPU, GPU and TPU."""

from __future__ import annotations

import jax

from ptq4dit_jax import dit
from ptq4dit_jax.quantizers import ActQuantizer, Encoded


def encode(x: jax.Array, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.encode`."""
    return act.encode(x)


def modulate_encode(x_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, act: ActQuantizer, eps: float) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.modulate_encode`."""
    x_BTD, shift_BD, scale_BD = (a.astype(dit.at_least_float32(a.dtype)) for a in (x_BTD, shift_BD, scale_BD))
    return act.encode(dit.modulate(dit.layer_norm(x_BTD, eps), shift_BD, scale_BD))
