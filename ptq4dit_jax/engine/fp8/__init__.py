"""Products of e4m3 instead of the stored integers: for devices that multiply it faster, and only where a user asks for it.

The operands are derived once per program from the stored codes and scales (:mod:`ptq4dit_jax.float8`). XLA multiplies them, and
fuses what precedes and follows. This runs on any device; one without units for e4m3 computes the same in a wider type.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from ptq4dit_jax.devices import DeviceKind
from ptq4dit_jax.engine.backends import Arithmetic, Backend
from ptq4dit_jax.engine.fp8 import attend
from ptq4dit_jax.engine.fp8 import encode as operands
from ptq4dit_jax.engine.fp8 import linear as products
from ptq4dit_jax.float8 import Float8Quantizer, ScaledFloat8, Weight
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.tpu.generations import GENERATIONS

#: Ada and later have units for e4m3.
_CAPABILITY = (8, 9)


class Fp8(Backend[jax.Array, ScaledFloat8, Weight]):
    """Layers multiply e4m3; attention is in floats. There is no other backend behind it, since none takes its operands."""

    name = "fp8"
    arithmetic = Arithmetic.E4M3
    differentiable = True  # where it rounds, it refuses derivatives itself

    def note(self, device: DeviceKind) -> str:
        faster = GENERATIONS[device.model].float8_rate > 1 if device.model in GENERATIONS else device.capability >= _CAPABILITY
        return "" if faster else "this device has no units for e4m3, so that it shows the quality, not the speed"

    def advice(self, device: DeviceKind) -> str:
        generation = GENERATIONS.get(device.model)
        if generation is None or generation.float8_rate <= generation.integer_rate:
            return ""
        faster = f"it multiplies e4m3 {generation.float8_rate} times as fast as bfloat16"
        return f"{faster}; the backend {self.name} does so in place of the integers, for another result"

    def prepare(self, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
        return products.prepare(weights)

    def imitate(self, act: ActQuantizer) -> Float8Quantizer:
        return Float8Quantizer(act)

    unpack_ahead = staticmethod(products.unpack_ahead)
    linear = staticmethod(products.linear)
    linear_parts = staticmethod(products.linear_parts)
    linear_each = staticmethod(products.linear_each)
    linear_gelu = staticmethod(products.linear_gelu)
    linear_residual = staticmethod(products.linear_residual)
    encode = staticmethod(operands.encode)
    modulate_encode = staticmethod(operands.modulate_encode)
    attention = staticmethod(attend.attention)


BACKEND = Fp8()
