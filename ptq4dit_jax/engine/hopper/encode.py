"""Quantization in one pass on Hopper, by :mod:`ptq4dit_jax.engine.hopper.row_wise`.

Covers bfloat16 with ranges per tensor or, after adaLN, per token.
"""

from __future__ import annotations

import jax

from ptq4dit_jax.engine.backends import NotCovered, require
from ptq4dit_jax.engine.hopper import row_wise
from ptq4dit_jax.engine.requirements import require_axes, require_bfloat16, require_one_group
from ptq4dit_jax.engine.stacks import Leaf, layer_of, stack_of
from ptq4dit_jax.networks.ops import Norm, NormKind
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, act_code_range


def _check(x_BTD: jax.Array, act: ActQuantizer) -> None:
    require_axes(x_BTD.shape)
    require_bfloat16(x_BTD.dtype)
    require_one_group(act)
    _, T, K = x_BTD.shape
    require(T % row_wise.ROWS == 0, f"{T} tokens are no multiple of {row_wise.ROWS}")
    require(K % row_wise.COLUMNS == 0, f"{K} channels are no multiple of {row_wise.COLUMNS}")


def encode(x: jax.Array, act: ActQuantizer) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.encode`."""
    _check(x, act)
    require(not act.dynamic, "codes per token are made behind a norm only")
    low, high = act_code_range(act.bits)
    K = x.shape[-1]
    scale, zero_point = map(stack_of, act.static_range)
    balance = None if act.balance is None else stack_of(act.balance)
    codes = row_wise.quantize(x.reshape(-1, K), scale, zero_point, balance, layer_of(act), low=low, high=high)
    return Encoded(codes.reshape(x.shape), *act.static_range)


def modulate_encode(x_BTD: jax.Array, shift_BD: Leaf | None, scale_BD: Leaf, act: ActQuantizer, norm: Norm) -> Encoded:
    """See :meth:`~ptq4dit_jax.engine.backends.Backend.modulate_encode`."""
    _check(x_BTD, act)
    B, T, D = x_BTD.shape
    require(act.balance is None, "a balancing factor is left at the input")
    require(not act.nonnegative, "the input has codes for values of one sign")
    if norm.kind is not NormKind.LAYER or shift_BD is None:
        raise NotCovered("the norm is no LayerNorm with a shift")
    require({shift_BD.shape, scale_BD.shape} == {(B, D)}, "shift and scale are not those of each image")
    low, high = act_code_range(act.bits)
    ranges = None if act.dynamic else (stack_of(act.static_range.scale), stack_of(act.static_range.zero_point))
    codes, *scale = row_wise.modulate_quantize(
        x_BTD.reshape(B * T, D),
        stack_of(shift_BD),
        stack_of(scale_BD),
        ranges,
        layer_of(shift_BD, scale_BD, act),
        tokens=T,
        eps=norm.eps,
        low=low,
        high=high,
    )
    values = codes.reshape(B, T, D)
    if act.dynamic:
        return Encoded(values, scale[0].reshape(B, T, 1), None)
    return Encoded(values, *act.static_range)
