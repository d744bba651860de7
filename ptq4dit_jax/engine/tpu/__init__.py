"""Kernels for TPUs, in Pallas's Mosaic TPU: attention (:mod:`ptq4dit_jax.tpu`), and norms that end in codes.

XLA's own products are as good there: it fuses what precedes and follows them. What it does not fuse is attention, whose logits
it would write to memory, and the passes of a norm with codes per token. The kernels were compiled for TPUs and run by Pallas's
interpreter, never on a TPU (docs/tpu.md). The modules with kernels are imported when an operation is first called.
"""

from __future__ import annotations

import jax

from ptq4dit_jax.devices import DeviceKind
from ptq4dit_jax.engine.backends import IntegerBackend
from ptq4dit_jax.engine.tpu import linear as products
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import ActQuantizer, Encoded
from ptq4dit_jax.tpu import generations
from ptq4dit_jax.tpu.generations import GENERATIONS, JAX_VERSIONS


class Tpu(IntegerBackend[jax.Array]):
    """Attention in floats, and norms with their codes, each in one kernel; products are XLA's."""

    name = "tpu"
    platform = "tpu"
    needs = f"a TPU ({', '.join(GENERATIONS)})"
    jax_versions = JAX_VERSIONS
    dtypes = ("bfloat16", "float32")

    prepare = staticmethod(products.prepare)
    prepare_for_floats = staticmethod(products.prepare)
    unpack_ahead = staticmethod(products.unpack_ahead)
    linear_parts = staticmethod(products.linear_parts)

    def unfit(self, device: DeviceKind) -> str:
        return generations.unfit(device)

    def note(self, device: DeviceKind) -> str:
        if GENERATIONS[device.model].integer_rate > 1:
            return ""
        return f"a {device.model} multiplies int8 no faster than bfloat16, so that integers save memory, not time"

    def modulate_encode(
        self, x_BTD: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array, act: ActQuantizer, norm: Norm
    ) -> Encoded:
        from ptq4dit_jax.engine.tpu import encode

        return encode.modulate_encode(x_BTD, shift_BD, scale_BD, act, norm)

    def attention(
        self, q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, sites: dict[str, ActQuantizer]
    ) -> jax.Array:
        from ptq4dit_jax.engine.tpu import attend

        return attend.attention(q_BTD, k_BTD, v_BTD, num_heads, sites)

    def attention_codes(
        self, q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, num_heads: int, act: ActQuantizer
    ) -> Encoded:
        from ptq4dit_jax.engine.tpu import attend

        return attend.attention_codes(q_BTD, k_BTD, v_BTD, num_heads, act)


BACKEND = Tpu()
