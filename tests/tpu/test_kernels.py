"""The kernels as Mosaic takes them, for every chip that they are chosen on: shapes of published models and ragged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu_helpers
from jax.sharding import SingleDeviceSharding
from tpu_helpers import compiled

from benchmarks import aot
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine import tpu
from ptq4dit_jax.networks.ops import Norm, NormKind
from ptq4dit_jax.quantizers import ActQuantizer

pytestmark = tpu_helpers.MARKS

STATIC = ActQuantizer(jnp.float32(1), jnp.int32(-9))
PER_ROW = ActQuantizer(None, None, dynamic=True)
#: Images, tokens, heads and their width.
ATTENTION = [(2, 64, 6, 64), (2, 72, 4, 40), (2, 256, 16, 72), (2, 256, 12, 32), (2, 256, 8, 128), (1, 1024, 16, 72)]
#: Images, tokens and channels, and their type.
NORMS = [
    ((2, 256, 1152), jnp.bfloat16),
    ((2, 1024, 1152), jnp.bfloat16),
    ((2, 72, 200), jnp.float32),
    ((1, 256, 4096), jnp.bfloat16),
]


def cases() -> Iterator[Any]:
    """A kernel with the shapes that it is called for."""
    for B, T, heads, d in ATTENTION:
        x = jax.ShapeDtypeStruct((B, T, heads * d), jnp.bfloat16)
        codes = partial(tpu.BACKEND.attention_codes, num_heads=heads, act=STATIC)
        yield pytest.param(codes, (x, x, x), id=f"codes-{B}x{T}x{heads}x{d}")
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.ShapeDtypeStruct((2, 256, 4 * 72), dtype)
        floats = partial(tpu.BACKEND.attention, num_heads=4, sites={})
        yield pytest.param(floats, (x, x, x), id=f"floats-{jnp.dtype(dtype).name}")
    for (B, T, D), dtype in NORMS:
        x, row = jax.ShapeDtypeStruct((B, T, D), dtype), jax.ShapeDtypeStruct((B, D), dtype)
        for name, act in (("rows", PER_ROW), ("tensor", STATIC)):
            norm = partial(tpu.BACKEND.modulate_encode, act=act, norm=Norm())
            yield pytest.param(norm, (x, row, row), id=f"norm-{B}x{T}x{D}-{name}")
        rms = partial(tpu.BACKEND.modulate_encode, act=PER_ROW, norm=Norm(kind=NormKind.RMS), shift_BD=None)
        yield pytest.param(lambda x, scale, rms=rms: rms(x, scale_BD=scale), (x, row), id=f"rms-{B}x{T}x{D}")


@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
@pytest.mark.parametrize(("kernel", "shapes"), list(cases()))
def test_mosaic_takes_a_kernel(generation: str, kernel: Callable[..., Any], shapes: tuple[jax.ShapeDtypeStruct, ...]) -> None:
    [device, *_] = aot.devices(generation, 1)
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=SingleDeviceSharding(device)) for s in shapes]
    with described(DeviceKind.of(device)):
        program = compiled(jax.jit(lambda *arrays: kernel(*arrays)).lower(*placed))
    assert "custom-call" in {instruction.opcode for instruction in program.module.instructions}
    assert not program.module.products  # which are inside
