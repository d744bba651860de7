"""Kernels for Hopper GPUs, in Pallas's Mosaic GPU. Only this folder touches that changing interface.

The modules with kernels are imported when an operation is first called: Pallas takes long to import, and most machines do not
need it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.typing import DTypeLike

from ptq4dit_jax.devices import DeviceKind, JaxVersions
from ptq4dit_jax.engine.backends import IntegerBackend
from ptq4dit_jax.engine.stacks import Leaf
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import PACKED_ROWS, ActQuantizer, Encoded, QTensor

_CAPABILITY = (9, 0)


class Hopper(IntegerBackend[Leaf]):
    """Products, norms and attention as kernels that read layers in their stacks. Attention, and everything between the
    products, is in bfloat16."""

    name = "hopper"
    platform = "gpu"
    needs = "a GPU of compute capability 9.0 (Hopper)"
    jax_versions = JaxVersions((0, 10, 2), (0, 11))  # the kernels were written for and tested with their Pallas
    dtypes = ("bfloat16",)
    reads_stacks = True
    packed_rows = PACKED_ROWS
    scans_blocks = False  # a loop's counter and the constants of a block would be separate launches
    attention_library = "cudnn"

    def unfit(self, device: DeviceKind) -> str:
        if device.capability == _CAPABILITY:
            return ""
        found = ".".join(map(str, device.capability))
        return f"the kernels are for GPUs of compute capability 9.0 (Hopper) and this one has {found}"

    def unpack_ahead(self, weights: Mapping[str, QTensor], after: jax.Array) -> dict[str, QTensor]:
        from ptq4dit_jax.engine.hopper import linear

        return linear.unpack_ahead(weights, after)

    def linear(self, x: Encoded, weight: QTensor, bias: Leaf, dtype: DTypeLike) -> jax.Array:
        from ptq4dit_jax.engine.hopper import linear

        return linear.linear(x, weight, bias, dtype)

    def linear_parts(self, x: Encoded, weight: QTensor, bias: Leaf, dtype: DTypeLike, parts: int) -> list[jax.Array]:
        from ptq4dit_jax.engine.hopper import linear

        return linear.linear_parts(x, weight, bias, dtype, parts)

    def linear_each(self, x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike, parts: int) -> list[jax.Array]:
        from ptq4dit_jax.engine.hopper import linear

        return linear.linear_each(x, weight, bias, dtype, parts)

    def linear_gelu(self, x: Encoded, weight: QTensor, bias: Leaf, act: ActQuantizer) -> Encoded:
        from ptq4dit_jax.engine.hopper import linear

        return linear.linear_gelu(x, weight, bias, act)

    def linear_residual(self, x: Encoded, weight: QTensor, bias: Leaf, gate_BD: Leaf, x_BTD: jax.Array) -> jax.Array:
        from ptq4dit_jax.engine.hopper import linear

        return linear.linear_residual(x, weight, bias, gate_BD, x_BTD)

    def encode(self, x: jax.Array, act: ActQuantizer) -> Encoded:
        from ptq4dit_jax.engine.hopper import encode

        return encode.encode(x, act)

    def modulate_encode(
        self, x_BTD: jax.Array, shift_BD: Leaf | None, scale_BD: Leaf, act: ActQuantizer, norm: Norm
    ) -> Encoded:
        from ptq4dit_jax.engine.hopper import encode

        return encode.modulate_encode(x_BTD, shift_BD, scale_BD, act, norm)

    def attention(
        self, q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
    ) -> jax.Array:
        from ptq4dit_jax.engine.hopper import attend

        return attend.attention(q_BTD, k_BTD, v_BTD, num_heads, sites)

    def attention_codes(
        self, q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer
    ) -> Encoded:
        from ptq4dit_jax.engine.hopper import attend

        return attend.attention_codes(q_BTD, k_BTD, v_BTD, num_heads, act)


BACKEND = Hopper()
