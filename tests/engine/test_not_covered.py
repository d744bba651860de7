"""What the kernels for Hopper do not cover is the reference's: any rank, size and type gives its shapes, and never an error.

By tracing, which needs no GPU; every call that the reference takes must come out alike.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from annotation_checks import unheld
from einops import EinopsError
from helpers import HOPPER, XLA

from ptq4dit_jax.engine.dispatch import Dispatch
from ptq4dit_jax.engine.layers import attention
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor

S: Any = jax.ShapeDtypeStruct  # in the place of arrays
SHAPES = ((128,), (2, 128), (2, 64, 128), (2, 3, 64, 128), (0, 64, 128), (2, 0, 128), (2, 64, 72), (3, 8, 256))
TYPES = ("bfloat16", "float32", "float16")
STATIC = ActQuantizer(S((), "float32"), S((), "int32"))
DYNAMIC = ActQuantizer(None, None, dynamic=True)


@pytest.fixture(autouse=True)
def any_rank() -> Iterator[None]:
    """Calls of ranks that operations are not declared for."""
    with unheld():
        yield


def weight(N: int, K: int, bits: int, dtype: str = "float32", lead: tuple[int, ...] = ()) -> QTensor:
    if bits > 4:
        return QTensor(S((*lead, N, K), "int8"), S((*lead, N), dtype), None, bits)
    return QTensor(S((*lead, -(-N // 2), K), "uint8"), S((*lead, N), dtype), S((*lead, N), "int8"), bits)


def codes(shape: tuple[int, ...], scale: tuple[int, ...], dtype: str = "float32") -> Encoded:
    return Encoded(S(shape, "int8"), S(scale, dtype), S((), "int32"))


def alike(operation: Callable[[Dispatch], Callable[..., Any]], *args: Any, **static: Any) -> bool:
    """Whether the reference takes the call; then the kernels' backend must give what it gives."""
    shapes = lambda dispatch: jax.eval_shape(lambda *args: operation(dispatch)(*args, **static), *args)
    try:
        expected = shapes(XLA)
    except (TypeError, ValueError, ZeroDivisionError, EinopsError):  # what the reference does not take either
        return False
    assert shapes(HOPPER) == expected
    return True


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_products(shape: tuple[int, ...], bits: int) -> None:
    K, taken = shape[-1], 0
    scales = {(), (*shape[:-1], 1)}
    for N, scale, dtype in itertools.product((384, 72, 7), scales, TYPES):
        x, w, bias = codes(shape, scale), weight(N, K, bits), S((N,), "float32")
        taken += alike(lambda d: d.linear, x, w, bias, dtype=jnp.dtype(dtype))
        if N % 3 == 0:
            taken += alike(lambda d: d.linear_parts, x, w, bias, dtype=jnp.dtype(dtype), parts=3)
        gates = [(shape[0], N), (1, N), (N,)]
        for gate in gates:
            taken += alike(lambda d: d.linear_residual, x, w, bias, S(gate, dtype), S((*shape[:-1], N), dtype))
    x, w = codes(shape, ()), weight(128, K, bits)
    rows = S((shape[0], *[1] * (len(shape) - 2), 128), "float32") if len(shape) > 1 else S((128,), "float32")
    for act in (STATIC, DYNAMIC, ActQuantizer(S(shape[:1], "float32"), S(shape[:1], "int32"))):
        taken += alike(lambda d: d.linear_gelu, x, w, S((128,), "float32"), act)
    for x_type, w_type in itertools.product(("float32", "float16"), repeat=2):
        x, w = codes(shape, (), x_type), weight(128, K, bits, w_type)
        taken += alike(lambda d: d.linear_parts, x, w, rows, dtype=jnp.dtype("bfloat16"), parts=1)
    assert taken > 20


@pytest.mark.parametrize("shape", [(3, 2, 128), (3, 128), (3, 0, 128), (3, 2, 4, 128), (3, 1, 72)])
def test_products_of_all_layers(shape: tuple[int, ...]) -> None:
    taken = 0
    for N, bits, dtype, scale in itertools.product((256, 72), (8, 4), TYPES, ((3,), (*shape[:-1], 1))):
        fed = codes(shape, scale)._replace(zero_point=S((3,), "int32"))
        args = fed, weight(N, shape[-1], bits, lead=(3,)), S((3, N), "float32")
        taken += alike(lambda d: d.linear_each, *args, dtype=jnp.dtype(dtype), parts=2)
    assert taken


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_codes(shape: tuple[int, ...], dtype: str) -> None:
    vector = S(shape[-1:], "float32")
    acts = [
        STATIC,
        DYNAMIC,
        dataclasses.replace(DYNAMIC, nonnegative=True),
        dataclasses.replace(STATIC, balance=vector),
        dataclasses.replace(DYNAMIC, balance=vector),
    ]
    taken = 0
    for act in acts:
        taken += alike(lambda d: d.encode, S(shape, dtype), act)
        for of_image, other in itertools.product(((shape[0], shape[-1]), (1, shape[-1])), (dtype, "float32")):
            row = S(of_image, other)
            taken += alike(lambda d: d.modulate_encode, S(shape, dtype), row, row, act, norm=Norm())
    assert taken >= len(acts)


@pytest.mark.parametrize(
    "q", [(2, 256, 128), (2, 64, 128), (256, 128), (2, 2, 256, 128), (0, 256, 128), (2, 0, 128), (2, 256, 144)]
)
def test_attention(q: tuple[int, ...]) -> None:
    sites = dict.fromkeys(("q", "k", "v", "probs"), STATIC)
    for T, of_q, of_k, heads in itertools.product((q[-2], 128), TYPES, TYPES, (1, 2)):
        k = S((*q[:-2], T, q[-1]), of_k)
        alike(lambda d: d.attention_codes, S(q, of_q), k, k, act=ActQuantizer(jnp.float32(1), jnp.int32(0)), num_heads=heads)
        for quantized in (sites, {}):
            of_heads = lambda d: lambda q, k, v, sites: attention(q, k, v, heads, sites, d)  # noqa: B023
            alike(of_heads, S(q, of_q), k, k, quantized)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("size", [(128, 128), (64, 128), (7, 5), (0, 128)])
def test_weights_that_are_unpacked_beforehand_stand_for_the_same(lead: tuple[int, ...], size: tuple[int, int]) -> None:
    for bits in (8, 4):
        given = {"fc1": weight(*size, bits, lead=lead)}
        made = jax.eval_shape(lambda given, x: HOPPER.unpack_ahead(given, x), given, S((2, 3), "bfloat16"))
        assert made["fc1"].shape == given["fc1"].shape
