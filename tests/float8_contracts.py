"""What the operations of a backend must give whose products are of e4m3: NumPy in float64, and ml_dtypes' rounding.

Cases are those of :mod:`operation_contracts`. Only their operands differ: they are derived here from codes and scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from operation_contracts import DYNAMIC, ROUNDING, STATIC, Case, attended, drawn_weight, gelu, modulated

from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine.dispatch import AnyBackend
from ptq4dit_jax.float8 import Float8Weight, ScaledFloat8
from ptq4dit_jax.networks.ops import Norm, NormKind
from ptq4dit_jax.quantizers import ActQuantizer

LARGEST = 448.0


def rounded(x: np.ndarray) -> np.ndarray:
    """Values within +-448, to the nearest of e4m3, in float64."""
    return np.clip(x, -LARGEST, LARGEST).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of products in float64, with the sums of their magnitudes."""

    of: np.ndarray
    magnitude: np.ndarray

    @property
    def off(self) -> np.ndarray:
        """What they may be off by before they are rounded: tensor cores of GPUs add within a tile with some 13 bits."""
        return self.magnitude * (2.0**-9 if default_kind().platform == "gpu" else 0)

    def check(self, want: np.ndarray, dtype: jax.typing.DTypeLike, got: Any, factor: np.ndarray | float = 1.0) -> None:
        """``got`` is ``want`` but for one rounding to the type at the end, and what the sums times ``factor`` are off by."""
        relative, absolute = ROUNDING[jnp.dtype(dtype).name]
        assert got.dtype == dtype
        assert np.all(
            np.abs(np.asarray(got, np.float64) - want) <= relative * np.abs(want) + absolute + self.off * np.abs(factor)
        )


def products(floats: np.ndarray, weight: np.ndarray) -> Sums:
    """Of inputs (..., K) and a weight (..., N, K)."""
    multiply = lambda a, b: np.einsum("...k,nk->...n" if b.ndim == 2 else "lbk,lnk->lbn", a, b)
    return Sums(multiply(floats, weight), multiply(np.abs(floats), np.abs(weight)))


def scale_of(act: ActQuantizer, y: np.ndarray) -> np.ndarray:
    """The scale that brings a range's farther end, or a row's largest magnitude, to 448."""
    if act.dynamic:
        return np.abs(y).max(-1, keepdims=True) / LARGEST
    step, zero_point = np.float64(act.static_range.scale), int(act.static_range.zero_point)
    ends = -(2 ** (act.bits - 1)) - zero_point, 2 ** (act.bits - 1) - 1 - zero_point
    return step * max(map(abs, ends)) / LARGEST


def values_of(y: np.ndarray, act: ActQuantizer, got: ScaledFloat8, off: np.ndarray | float = 0.0) -> None:
    """``got`` holds values ``y`` in float64, times the balancing factor, in the range of ``act``: rounded to the nearest, or to
    a neighbour next to a tie. ``off``: what ``y`` may be off by."""
    assert isinstance(got, ScaledFloat8)
    balance = 1 if act.balance is None else np.asarray(act.balance, np.float64)
    y = y * balance
    scale = scale_of(act, y)
    np.testing.assert_allclose(np.asarray(got.scale, np.float64), scale, rtol=1e-5)
    if act.dynamic:
        assert got.shift is None
    else:
        step, zero_point = act.static_range
        np.testing.assert_allclose(np.asarray(got.shift, np.float64), np.float64(step) * int(zero_point), rtol=1e-6)
    scaled = y / scale
    near = 2e-5 * np.abs(scaled) + 1e-4 + off * balance / scale  # the first two: sums of float32, as in a norm
    values = np.asarray(got.values).astype(np.float64)
    assert got.values.dtype == ml_dtypes.float8_e4m3fn
    assert np.all(rounded(scaled - near) <= values)
    assert np.all(values <= rounded(scaled + near))
    if y.ndim != 2:
        assert got.rest is None
        return
    rest = np.asarray(got.rest).astype(np.float64)  # the condition's second term
    inside = np.clip(scaled, -LARGEST, LARGEST)
    assert np.all(np.abs(values + rest - inside) <= 2.0**-8 * np.abs(inside) + 2.0**-10 + near)


def _weights(name: str, N: int, K: int, bits: int, rng: np.random.Generator, lead: tuple[int, ...] = ()) -> Iterator[Any]:
    """A weight as it is stored, and derived from that; what e4m3 makes of it; and the sums over what its codes stand for."""
    weight, stands_for = drawn_weight(N, K, bits, rng, lead)
    scale = np.asarray(weight.scale, np.float64)
    codes = np.round(stands_for / scale[..., None])
    sums = stands_for.sum(-1)
    values = rounded(codes)
    derived = Float8Weight(
        jnp.asarray(values.astype(ml_dtypes.float8_e4m3fn)), weight.scale, jnp.asarray(sums, jnp.float32), bits
    )
    for kind, given in (("stored", weight), ("derived", derived)):
        yield f"{name}-{kind}", given, values * scale[..., None], sums


def _operand(shape: tuple[int, ...], per_row: bool, shifted: bool, rng: np.random.Generator) -> tuple[ScaledFloat8, Any, Any]:
    """An operand with one scale, or one per row, and perhaps what a bias must allow for; what it stands for, and its shift."""
    values = rounded(rng.standard_normal(shape) * 100)
    where = (*shape[:-1], 1) if per_row else ()
    scale = rng.uniform(0.5, 1.5, where).astype(np.float32)
    shift = rng.uniform(-90, 90, where).astype(np.float32)
    narrow = lambda x: jnp.asarray(x.astype(ml_dtypes.float8_e4m3fn))
    rest = rounded(values / 100) if len(shape) == 2 else np.zeros(())
    operand = ScaledFloat8(
        narrow(values),
        jnp.asarray(scale),
        jnp.asarray(shift) if shifted else None,
        narrow(rest) if len(shape) == 2 else None,
    )
    return operand, (values + rest) * scale.astype(np.float64), shift.astype(np.float64) if shifted else np.zeros(())


def cases() -> Iterator[Case]:
    """All cases: sizes that units are made for and odd ones, an image's tokens and the condition, weights of several widths."""
    yield from _products("whole-w8", (2, 32, 256), 384, 8)
    for bits in (8, 6, 4, 3):
        yield from _products(f"odd-w{bits}", (2, 3, 25), 9, bits)
    yield from _products("condition-w8", (5, 20), 9, 8)
    yield from _stacks(3, 2, 20, 10)
    for name, shape in {"tokens": (3, 5, 20), "condition": (5, 20)}.items():
        yield from _encoded(name, shape)
    yield from _modulated(3, 5, 20)
    yield from _attention(2, 5, 3, 8)


def _products(name: str, shape: tuple[int, ...], N: int, bits: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(N).astype(np.float32)
    for label, weight, stands_for, sums in _weights(name, N, shape[-1], bits, rng):
        for per_row, shifted in ((False, True), (True, False)):
            x, floats, shift = _operand(shape, per_row, shifted, rng)
            sums_of = products(floats, stands_for)
            want = sums_of.of + (bias + shift * sums)
            args = x, weight, jnp.asarray(bias)
            kind = f"{label}-{'rows' if per_row else 'tensor'}{'-shifted' if shifted else ''}"
            dtype = jnp.bfloat16 if per_row else jnp.float32
            check = lambda got, _, want=want, dtype=dtype, of=sums_of: of.check(want, dtype, got)
            yield Case(f"linear-{kind}", "linear", args, {"dtype": dtype}, check)
            if len(shape) == 2 or label.endswith("derived") or bits != 8:
                continue
            in_parts = lambda got, _, want=want, of=sums_of: of.check(want, jnp.float32, jnp.concatenate(got, -1))
            yield Case(f"linear_parts-{kind}", "linear_parts", args, {"dtype": jnp.float32, "parts": 3}, in_parts)
            sizes: tuple[tuple[int, ...], ...] = (*shape[:2], N), (shape[0], N)
            residual, gate = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes)
            sum_ = np.asarray(residual, np.float64) + np.asarray(gate, np.float64)[:, None] * want
            by_gate = partial(sums_of.check, sum_, jnp.float32, factor=np.asarray(gate, np.float64)[:, None])
            gated = lambda got, _, check=by_gate: check(got)
            yield Case(f"linear_residual-{kind}", "linear_residual", (*args, gate, residual), {}, gated)
            act = dataclasses.replace(STATIC, balance=jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32))
            activated = lambda got, _, want=want, act=act, of=sums_of: values_of(gelu(want), act, got, 1.2 * of.off)
            yield Case(f"linear_gelu-{kind}", "linear_gelu", (*args, act), {}, activated)

        def the_same(got: Any, _: AnyBackend, stands_for: np.ndarray = stands_for, sums: np.ndarray = sums) -> None:
            scale = np.asarray(got["fc1"].scale, np.float64)[:, None]
            np.testing.assert_array_equal(np.asarray(got["fc1"].values).astype(np.float64) * scale, stands_for)
            np.testing.assert_allclose(got["fc1"].sums, sums, rtol=1e-6, atol=1e-6)

        if label == "odd-w8-stored":
            same = lambda got, _, weight=weight: np.testing.assert_array_equal(got["fc1"].codes(), weight.codes())
            yield Case("prepare_for_floats", "prepare_for_floats", ({"fc1": weight},), {}, same)
        yield Case(f"prepare-{label}", "prepare", ({"fc1": weight},), {}, the_same)
        yield Case(f"unpack_ahead-{label}", "unpack_ahead", ({"fc1": weight}, jnp.ones(3)), {}, the_same)


def _stacks(L: int, B: int, K: int, N: int) -> Iterator[Case]:
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((L, N)).astype(np.float32)
    x, _, _ = _operand((L, B, K), False, False, rng)
    rest = rounded(rng.standard_normal((L, B, K)))
    scale, shift = (rng.uniform(0.5, 1.5, L).astype(np.float32) for _ in range(2))
    fed = x._replace(scale=jnp.asarray(scale), shift=jnp.asarray(shift), rest=jnp.asarray(rest.astype(ml_dtypes.float8_e4m3fn)))
    floats = (np.asarray(x.values).astype(np.float64) + rest) * scale.astype(np.float64)[:, None, None]
    for bits in (8, 4):
        for label, weight, stands_for, sums in _weights(f"w{bits}", N, K, bits, rng, (L,)):
            sums_of = products(floats, stands_for)
            want = sums_of.of + (bias + shift[:, None] * sums)[:, None]
            each = lambda got, _, want=want, of=sums_of: of.check(want, jnp.float32, jnp.concatenate(got, -1))
            args = fed, weight, jnp.asarray(bias)
            yield Case(f"linear_each-{label}", "linear_each", args, {"dtype": jnp.float32, "parts": 2}, each)


def _quantizers(K: int, rng: np.random.Generator) -> dict[str, ActQuantizer]:
    balance = jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32)
    return {
        "static": STATIC,  # some values lie beyond its ends
        "lowest": dataclasses.replace(STATIC, zero_point=jnp.int32(-128)),
        "static4": dataclasses.replace(STATIC, bits=4, zero_point=jnp.int32(0), scale=jnp.float32(0.5)),
        "balanced": dataclasses.replace(STATIC, balance=balance),
        "rows": DYNAMIC,
        "rows-nonnegative": dataclasses.replace(DYNAMIC, nonnegative=True),
        "rows-balanced": dataclasses.replace(DYNAMIC, balance=balance),
    }


def _encoded(name: str, shape: tuple[int, ...]) -> Iterator[Case]:
    rng = np.random.default_rng(2)
    acts = _quantizers(shape[-1], rng)
    for kind, act in acts.items():
        x = jnp.asarray(rng.standard_normal(shape) * 3 + 1, jnp.bfloat16 if act.dynamic else jnp.float32)
        check = lambda got, _, act=act, x=x: values_of(np.asarray(x, np.float64), act, got)
        yield Case(f"encode-{name}-{kind}", "encode", (x, act), {}, check)


def _modulated(B: int, T: int, D: int) -> Iterator[Case]:
    rng = np.random.default_rng(3)
    acts = _quantizers(D, rng)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(rng.standard_normal((B, T, D)) * 3 + 1, dtype)
        shift, scale = (jnp.asarray(rng.standard_normal((B, D)), dtype) for _ in range(2))
        wide, *modulation = (np.asarray(a, np.float64) for a in (x, shift, scale))
        for kind, norm, given in (
            ("static", Norm(), shift),
            ("rows-balanced", Norm(1e-3, NormKind.RMS), None),
        ):
            y = modulated(wide, None if given is None else modulation[0], modulation[1], norm)
            check = partial(lambda got, _, y, act: values_of(y, act, got), y=y, act=acts[kind])
            label = f"modulate_encode-{jnp.dtype(dtype).name}-{kind}"
            yield Case(label, "modulate_encode", (x, given, scale, acts[kind]), {"norm": norm}, check)


def _attention(B: int, T: int, A: int, d: int) -> Iterator[Case]:
    rng = np.random.default_rng(4)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.02)):
        q, k, v = (jnp.asarray(rng.standard_normal((B, T, A * d)), dtype) for _ in range(3))
        want = attended(q, k, v, A)

        def in_floats(got: Any, _: AnyBackend, want: np.ndarray = want, dtype: Any = dtype, off: float = tolerance) -> None:
            assert got.dtype == dtype
            assert np.linalg.norm(np.asarray(got, np.float64) - want) < off * np.linalg.norm(want)

        sites = dict.fromkeys(("q", "k", "v", "probs"), STATIC)
        yield Case(f"attention-{jnp.dtype(dtype).name}", "attention", (q, k, v), {"num_heads": A, "sites": sites}, in_floats)
