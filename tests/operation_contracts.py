"""What every backend's operations must give, computed by NumPy in float64, whatever the backend and wherever it runs.

A case is one call of an operation: its arguments, and a check of the outcome. ``tests/engine/test_operations.py`` makes it of
every backend, so a new backend is tested by being entered in ``choice.BACKENDS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ptq4dit_jax.engine.dispatch import AnyBackend
from ptq4dit_jax.networks.ops import Norm, NormKind
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor

STATIC = ActQuantizer(scale=jnp.float32(0.03), zero_point=jnp.int32(-20))
DYNAMIC = ActQuantizer(None, None, dynamic=True)
#: Half an ulp of each type that operations give, relative to the value, and what sums of float32 are off by near zero.
ROUNDING = {"bfloat16": (2**-8 * 1.01, 1e-5), "float32": (2e-6, 2e-6)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of ``operation``: arrays ``args``, what is ``static``, and a ``check`` of the outcome and the backend."""

    name: str
    operation: str
    args: tuple[Any, ...]
    static: dict[str, Any]
    check: Callable[[Any, AnyBackend], None]
    #: Whether it is made in bfloat16, the only type of some backends.
    narrow: bool = False

    def call(self, ops: Any) -> Callable[..., Any]:
        """The operation of a backend, or of a dispatch, as a function of the arrays."""
        return partial(getattr(ops, self.operation), **self.static)


def close(want: np.ndarray, dtype: DTypeLike, got: Any) -> None:
    """Equal to values in float64 but for one rounding to the type, at the end."""
    rtol, atol = ROUNDING[jnp.dtype(dtype).name]
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol)


def codes_of(value: np.ndarray, zero_point: int, got: Any, low: int = -128, high: int = 127) -> None:
    """The codes of values in float64, or their neighbours where a value lies next to a tie."""
    want = np.clip(np.round(value) + zero_point, low, high)
    assert got.dtype == jnp.int8
    differing = np.asarray(got, int) != want
    assert np.abs(np.asarray(got, int) - want).max(initial=0) <= 1
    assert np.all(np.abs(np.abs(value - np.floor(value)) - 0.5)[differing] < 1e-3)


def sums_are_of_the_codes(got: Encoded) -> None:
    """If a backend gives them."""
    if got.sums is not None:
        np.testing.assert_array_equal(got.sums, np.asarray(got.values, int).sum(-1, keepdims=True))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def attended(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, heads: int, through: Callable[[np.ndarray], np.ndarray] = lambda probs: probs
) -> np.ndarray:
    """Softmax attention (B, T, D) in float64, with its probabilities sent ``through`` a function."""
    B, T, D = np.shape(q)
    of_heads = lambda x: np.asarray(x, np.float64).reshape(B, T, heads, D // heads).transpose(0, 2, 1, 3)
    queries, keys, values = map(of_heads, (q, k, v))
    probs = softmax(queries @ keys.swapaxes(-1, -2) / queries.shape[-1] ** 0.5)
    return (through(probs) @ values).transpose(0, 2, 1, 3).reshape(B, T, D)


def modulated(x: np.ndarray, shift: np.ndarray | None, scale: np.ndarray, norm: Norm) -> np.ndarray:
    """``norm(x) * (1 + scale) + shift``, (B, T, D) float64."""
    centered = x - (x.mean(-1, keepdims=True) if norm.kind is NormKind.LAYER else 0)
    y = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + norm.eps) * (1 + scale[:, None])
    return y if shift is None else y + shift[:, None]


def drawn_weight(N: int, K: int, bits: int, rng: np.random.Generator, lead: tuple[int, ...] = ()) -> tuple[QTensor, np.ndarray]:
    """A weight over the whole range of its codes, and what it stands for."""
    scale = (rng.uniform(0.5, 1.5, (*lead, N)) / (5400 * K**0.5 / 2 ** (8 - bits))).astype(np.float32)
    if bits == 8:
        codes, zeros = rng.integers(-127, 128, (*lead, N, K)), np.zeros((*lead, N), int)
    else:
        codes, zeros = rng.integers(0, 2**bits, (*lead, N, K)), rng.integers(0, 2**bits, (*lead, N))
    centered = codes - zeros[..., None]
    made = QTensor.from_codes(jnp.asarray(codes, jnp.float32), jnp.asarray(scale), jnp.asarray(zeros, jnp.float32), bits)
    return made, centered * scale.astype(np.float64)[..., None]


def _fed(shape: tuple[int, ...], per_row: bool, rng: np.random.Generator) -> tuple[Encoded, np.ndarray]:
    """Codes (..., K) of the whole range with one scale, or one per row, and what they stand for."""
    values = rng.integers(-128, 128, shape).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, (*shape[:-1], 1) if per_row else ()).astype(np.float32)
    return Encoded(jnp.asarray(values), jnp.asarray(scale), None), values * scale.astype(np.float64)


def cases() -> Iterator[Case]:
    """All cases: sizes that kernels are made for, odd ones, and sums over a number of channels that is no multiple of 4."""
    sizes = {"whole": (2, 64, 256, 384), "odd": (2, 3, 20, 9)}
    for (size, (B, T, K, N)), bits in ((item, bits) for item in sizes.items() for bits in (8, 4, 3)):
        yield from _products(f"{size}-w{bits}", B, T, K, N, bits)
    yield from _products("ragged-w8", 2, 5, 25, 24, 8)
    for size, (B, T, D) in {"whole": (2, 16, 192), "odd": (3, 5, 20)}.items():
        yield from _codes(size, B, T, D)
    for size, (B, T, A, d) in {"whole": (2, 256, 2, 64), "odd": (2, 5, 3, 8)}.items():
        yield from _attention(size, B, T, A, d)


def _products(name: str, B: int, T: int, K: int, N: int, bits: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    weight, stands_for = drawn_weight(N, K, bits, rng)
    bias = rng.standard_normal(N).astype(np.float32)
    for per_row in (False, True):
        x, floats = _fed((B, T, K), per_row, rng)
        want = floats @ stands_for.T + bias
        label = f"{name}-{'rows' if per_row else 'tensor'}"
        args = x, weight, jnp.asarray(bias)
        for dtype in (jnp.float32, jnp.bfloat16):
            narrow = dtype is jnp.bfloat16
            as_one = lambda got, _, want=want, dtype=dtype: close(want, dtype, got)
            in_parts = lambda got, _, want=want, dtype=dtype: close(want, dtype, jnp.concatenate(got, -1))
            typed = f"{label}-{jnp.dtype(dtype).name}"
            yield Case(f"linear-{typed}", "linear", args, {"dtype": dtype}, as_one, narrow)
            yield Case(f"linear_parts-{typed}", "linear_parts", args, {"dtype": dtype, "parts": 3}, in_parts, narrow)
        residual, gate = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((B, T, N), (B, N)))
        sum_ = np.asarray(residual, np.float64) + np.asarray(gate, np.float64)[:, None] * want
        gated = lambda got, _, want=sum_: close(want, jnp.bfloat16, got)
        yield Case(f"linear_residual-{label}", "linear_residual", (*args, gate, residual), {}, gated, True)
        balance = rng.uniform(0.5, 2, N).astype(np.float32)
        value = gelu(want) * balance / np.float64(np.float32(0.03))
        requantized = lambda got, _, value=value: codes_of(value, -20, got.values)
        act = dataclasses.replace(STATIC, balance=jnp.asarray(balance))
        yield Case(f"linear_gelu-{label}", "linear_gelu", (*args, act), {}, requantized, True)

    L = 3
    stack, stands_for = drawn_weight(N - N % 2, K, bits, rng, (L,))
    values = rng.integers(-128, 128, (L, B, K)).astype(np.int8)
    scale, biases = rng.uniform(0.5, 1.5, L).astype(np.float32), rng.standard_normal((L, N - N % 2)).astype(np.float32)
    want = np.einsum("lbk,lnk->lbn", values.astype(np.float64), stands_for) * scale.astype(np.float64)[:, None, None]
    want = want + biases[:, None]
    each = lambda got, _: close(want, jnp.bfloat16, jnp.concatenate(got, -1))
    args = Encoded(jnp.asarray(values), jnp.asarray(scale), None), stack, jnp.asarray(biases)
    yield Case(f"linear_each-{name}", "linear_each", args, {"dtype": jnp.bfloat16, "parts": 2}, each, True)

    def same_values(got: Any, _: AnyBackend) -> None:
        np.testing.assert_array_equal(got["fc1"].codes(), weight.codes())
        np.testing.assert_array_equal(got["fc1"].scale, weight.scale)

    for operation in ("prepare", "prepare_for_floats"):
        yield Case(f"{operation}-{name}", operation, ({"fc1": weight},), {}, same_values, True)
    yield Case(f"unpack_ahead-{name}", "unpack_ahead", ({"fc1": weight}, jnp.ones(3, jnp.bfloat16)), {}, same_values, True)

    a, b = rng.integers(-128, 128, (B, 2, T, K)).astype(np.int8), rng.integers(-128, 128, (B, 2, 7, K)).astype(np.int8)
    a[0, 0], b[0, 0] = -128, 127  # as large as sums get

    def exact(got: Any, _: AnyBackend) -> None:
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, np.einsum("bamk,bank->bamn", a.astype(np.int64), b.astype(np.int64)))

    if bits == 8:
        yield Case(f"batched-{name}", "batched", (jnp.asarray(a), jnp.asarray(b)), {}, exact, True)


def _quantized(y: np.ndarray, act: ActQuantizer, got: Encoded) -> None:
    """``got`` encodes the values ``y`` in float64 by ``act``."""
    sums_are_of_the_codes(got)
    y = y * (1 if act.balance is None else np.asarray(act.balance, np.float64))
    if act.dynamic:
        scale = np.abs(y).max(-1, keepdims=True) / (2 ** (act.bits - 1) - 1)
        np.testing.assert_allclose(np.asarray(got.scale, np.float64), scale, rtol=1e-5)
        codes_of(y / np.asarray(got.scale, np.float64), 0, got.values)
    else:
        bound, (step, zero_point) = 2 ** (act.bits - 1), act.static_range
        codes_of(y / np.float64(step), int(zero_point), got.values, -bound, bound - 1)


def _codes(name: str, B: int, T: int, D: int) -> Iterator[Case]:
    rng = np.random.default_rng(1)
    balance = jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32)
    acts = {
        "static": STATIC,
        "static6": dataclasses.replace(STATIC, bits=6, zero_point=jnp.int32(3)),
        "balanced": dataclasses.replace(STATIC, balance=balance),
        "rows": DYNAMIC,
        "rows-balanced": dataclasses.replace(DYNAMIC, balance=balance),
    }
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rng.standard_normal((B, T, D)) * 3 + 1, dtype)
        shift, scale = (jnp.asarray(rng.standard_normal((B, D)), dtype) for _ in range(2))
        wide, *modulation = (np.asarray(a, np.float64) for a in (x, shift, scale))
        narrow, typed = dtype is jnp.bfloat16, f"{name}-{jnp.dtype(dtype).name}"
        for kind, act in acts.items():
            encoded = lambda got, _, act=act, wide=wide: _quantized(wide, act, got)
            yield Case(f"encode-{typed}-{kind}", "encode", (x, act), {}, encoded, narrow)
            for norm, with_shift in ((Norm(), True), (Norm(1e-3, NormKind.RMS), False)):
                y = modulated(wide, modulation[0] if with_shift else None, modulation[1], norm)
                check = lambda got, _, act=act, y=y: _quantized(y, act, got)
                args = x, shift if with_shift else None, scale, act
                label = f"modulate_encode-{typed}-{kind}-{norm.kind.value}"
                yield Case(label, "modulate_encode", args, {"norm": norm}, check, narrow)


def _attention(name: str, B: int, T: int, A: int, d: int) -> Iterator[Case]:
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, A * d)), jnp.bfloat16) for _ in range(3))
    plain = attended(q, k, v, A)
    sites = {side: ActQuantizer(jnp.float32(8 / 255), jnp.int32(0)) for side in ("q", "k", "v")}
    sites["probs"] = ActQuantizer(jnp.float32(1 / 255), jnp.int32(-128))

    def fake(x: np.ndarray, act: ActQuantizer) -> np.ndarray:
        scale, zero_point = np.float64(act.static_range.scale), int(act.static_range.zero_point)
        return (np.clip(np.round(x / scale) + zero_point, -128, 127) - zero_point) * scale

    side = lambda name, x: fake(np.asarray(x, np.float64), sites[name])
    twin = attended(side("q", q), side("k", k), side("v", v), A, lambda probs: fake(probs, sites["probs"]))

    def in_floats_or_codes(got: Any, backend: AnyBackend) -> None:
        want = twin if backend.attends_on_codes else plain
        assert got.dtype == jnp.bfloat16
        # Logits of codes are computed in the type of q.
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 0.02 * np.linalg.norm(want)

    yield Case(f"attention-{name}", "attention", (q, k, v), {"num_heads": A, "sites": sites}, in_floats_or_codes, True)

    act, larger = ActQuantizer(jnp.float32(1), jnp.int32(-9)), jnp.asarray(np.asarray(v, np.float32) * 40, jnp.bfloat16)
    value = attended(q, k, larger, A)

    def in_unit_steps(got: Encoded, _: AnyBackend) -> None:
        want = np.clip(np.round(value) - 9, -128, 127)
        off = np.abs(np.asarray(got.values, int) - want)
        sums_are_of_the_codes(got)
        assert got.values.dtype == jnp.int8
        assert off.max() <= 1
        assert off.mean() < 0.1  # probabilities of bfloat16 move values of 40 by 0.1

    yield Case(f"attention_codes-{name}", "attention_codes", (q, k, larger), {"num_heads": A, "act": act}, in_unit_steps, True)
