"""Attention in floats, by the kernel of the device if there is one."""

from __future__ import annotations

import contextlib

import jax

from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine import hopper, tpu
from ptq4dit_jax.engine.backends import NotCovered
from ptq4dit_jax.engine.dispatch import Dispatch
from ptq4dit_jax.networks.parts import float_attention, in_heads
from ptq4dit_jax.quantizers import ActQuantizer


def attention(
    q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
) -> jax.Array:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.attention`. Ignores ``sites``."""
    device, dtype = default_kind(), q_BTD.dtype.name
    kernels = Dispatch(tuple(each for each in (hopper.BACKEND, tpu.BACKEND) if not each.why_not(device, dtype)))
    with contextlib.suppress(NotCovered):
        return kernels.attention(q_BTD, k_BTD, v_BTD, num_heads, sites)
    return in_heads(float_attention, q_BTD, k_BTD, v_BTD, num_heads)
