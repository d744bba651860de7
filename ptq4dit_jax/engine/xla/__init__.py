"""The reference: XLA's own integer products. Runs on CPU, GPU and TPU, and covers everything."""

from __future__ import annotations

import jax

from ptq4dit_jax.engine.backends import IntegerBackend
from ptq4dit_jax.engine.xla import attend
from ptq4dit_jax.engine.xla import encode as codes
from ptq4dit_jax.engine.xla import linear as products


class Xla(IntegerBackend[jax.Array]):
    """The reference. Its operations are defined in the modules beside this one."""

    name = "xla"
    takes_float_models = True
    differentiable = True  # where it rounds, it refuses derivatives itself
    attends_on_codes = True

    unpack_ahead = staticmethod(products.unpack_ahead)
    linear = staticmethod(products.linear)
    linear_parts = staticmethod(products.linear_parts)
    linear_each = staticmethod(products.linear_each)
    linear_gelu = staticmethod(products.linear_gelu)
    linear_residual = staticmethod(products.linear_residual)
    batched = staticmethod(products.batched)
    encode = staticmethod(codes.encode)
    modulate_encode = staticmethod(codes.modulate_encode)
    attention = staticmethod(attend.attention)
    attention_codes = staticmethod(attend.attention_codes)


BACKEND = Xla()
