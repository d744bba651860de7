"""Norm, modulation and codes on TPUs, by :mod:`ptq4dit_jax.engine.tpu.row_wise`."""

from __future__ import annotations

import jax

from ptq4dit_jax.engine.backends import require
from ptq4dit_jax.engine.requirements import require_axes, require_one_group
from ptq4dit_jax.engine.tpu import row_wise
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range, reciprocal
from ptq4dit_jax.tpu.generations import too_large


def modulate_encode(
    x_BTD: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array, act: ActQuantizer, norm: Norm
) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.modulate_encode`."""
    require_axes(x_BTD.shape, "(B, T, D)")
    require_one_group(act)
    B, T, D = x_BTD.shape
    require(T % 8 == 0 and row_wise.rows_per_step(T) is not None, f"{T} tokens are no whole number of tiles")
    require(D % 8 == 0, f"{D} channels are no multiple of 8")
    reason = too_large(row_wise.memory(T, D, x_BTD.dtype.itemsize), f"rows of {D} channels")
    require(not reason, reason)
    require(not act.nonnegative, "the input has codes for values of one sign")
    require(
        {vector.shape for vector in (scale_BD, shift_BD) if vector is not None} == {(B, D)}, "modulation is not each image's"
    )
    if act.dynamic:
        factor, zero_point = act.balance, None
    else:
        inverse = reciprocal(act.static_range.scale)
        factor = jax.numpy.broadcast_to(inverse if act.balance is None else act.balance * inverse, (D,))
        zero_point = act.static_range.zero_point
    codes, sums, scale = row_wise.modulate_quantize(
        x_BTD, shift_BD, scale_BD, row_wise.Codes(factor, zero_point, *act_code_range(act.bits)), norm
    )
    if scale is not None:
        return Encoded(codes, scale, None, sums)
    return Encoded(codes, *act.static_range, sums)
