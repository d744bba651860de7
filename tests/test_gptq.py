"""GPTQ against an implementation in NumPy that follows the paper (inverse Hessian, its Cholesky factor), and its guarantees."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ptq4dit_jax import gptq
from ptq4dit_jax.gptq import InputMoments, round_weight
from ptq4dit_jax.quantizers import QTensor
from ptq4dit_jax.ranges import quantize_weight

BITS = range(2, 9)


#: Rows that decide, and others.
CUTS = (slice(0, 1), slice(1, None))


class Layer(NamedTuple):
    """A float kernel (K, N), inputs (B, T, K) by the quantized network and what the float network's differ by, row weights."""

    kernel: np.ndarray
    x: np.ndarray
    d: np.ndarray
    weight: np.ndarray

    @property
    def moments(self) -> InputMoments:
        start = InputMoments.start(jnp.asarray(self.x[0].mean(0)))
        return InputMoments.total([start.observe(jnp.asarray(self.x), self.x + self.d, jnp.asarray(self.weight))])

    def nearest(self, bits: int) -> QTensor:
        return quantize_weight(self.kernel.T, bits)

    def error(self, weight: QTensor, bias: Any = 0.0, follow: bool = True) -> np.ndarray:
        """Weighted mean squared error of each output channel, (N,), in float64."""
        x, exact = self.x.astype(np.float64), (self.x + self.d * follow).astype(np.float64)
        values = np.asarray(weight.codes(), np.float64) * np.asarray(weight.scale, np.float64)[:, None]
        difference = x @ values.T + np.asarray(bias, np.float64) - exact @ self.kernel.astype(np.float64)
        return np.average(np.square(difference).mean(1), axis=0, weights=self.weight)


def layer(K: int, N: int, seed: int = 0, rows: int = 6, tokens: int = 80) -> Layer:
    """Correlated inputs with means, and a quarter of them of other sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.where(np.arange(K) % 4 == 0, 10.0 ** rng.uniform(-0.5, 0.5, K), 1.0)
    mixing = rng.standard_normal((K, K)) / np.sqrt(K) + 0.5 * np.eye(K)
    x = (rng.standard_normal((rows, tokens, K)) @ mixing + rng.standard_normal(K)) * sizes
    d = (0.05 * rng.standard_normal(x.shape) + 0.02) * sizes
    kernel = rng.standard_normal((K, N)) / sizes[:, None]
    arrays = (kernel, x, d, rng.uniform(0.5, 2, rows))
    return Layer(*(a.astype(np.float32) for a in arrays))


def as_published(case: Layer, weight: QTensor, follow: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centered codes (N, K), the gain of the bias (N,), and the target's nearest codes (N, K), for the ranges of ``weight``."""
    x = case.x.astype(np.float64).reshape(-1, case.x.shape[-1])
    d = case.d.astype(np.float64).reshape(x.shape)
    w = case.kernel.astype(np.float64).T
    share = np.repeat(case.weight.astype(np.float64), case.x.shape[1])
    damping = 0.01 + (x.shape[1] / share.sum()) ** 2
    share /= share.sum()
    target = w
    if follow:
        mean, drift = share @ x, share @ d
        H = (x - mean).T @ ((x - mean) * share[:, None])
        damped = H + damping * np.diag(np.diag(H))
        target = w + np.linalg.solve(damped, (w @ ((d - drift).T @ ((x - mean) * share[:, None]))).T).T
    else:
        H = x.T @ (x * share[:, None])
        damped = H + damping * np.diag(np.diag(H))
    order = np.argsort(-np.diag(H), kind="stable")
    U = scipy.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)]), lower=False)
    rest, codes = target[:, order].copy(), np.zeros_like(w)
    scale = np.asarray(weight.scale, np.float64)
    low, high = (np.asarray(end, np.float64) for end in weight.code_range)
    for k in range(len(order)):
        codes[:, k] = np.clip(np.round(rest[:, k] / scale), low, high)
        error = (rest[:, k] - codes[:, k] * scale) / U[k, k]
        rest[:, k:] -= error[:, None] * U[k, k:]
    codes = codes[:, np.argsort(order)]
    bias = w @ (mean + drift) - (codes * scale[:, None]) @ mean if follow else np.zeros(len(w))
    return codes, bias, np.clip(np.round(target / scale[:, None]), low[:, None], high[:, None])


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K", [24, 128, 200])
def test_codes_and_bias_are_those_of_the_paper(K: int, bits: int, follow: bool) -> None:
    case = layer(K, 40, seed=bits)
    found = round_weight(jnp.asarray(case.kernel), case.nearest(bits), case.moments, follow=follow)
    codes, bias, target_codes = as_published(case, found.weight, follow)
    ours = np.asarray(found.weight.codes())
    took = ~((ours == target_codes).all(1) | (ours == np.asarray(case.nearest(bits).codes())).all(1))
    assert took.mean() > 0.6  # some of the channels with few inputs are better rounded to the nearest
    assert (codes != ours)[took].mean() <= 1e-3
    np.testing.assert_allclose(np.asarray(found.bias)[took], bias[took], rtol=2e-3, atol=2e-3 * np.abs(bias).max() + 1e-6)
    error = case.error(found.weight, found.bias, follow)[took]
    values = codes * np.asarray(found.weight.scale, np.float64)[:, None]
    x, exact = case.x.astype(np.float64), (case.x + case.d * follow).astype(np.float64)
    difference = x @ values.T + bias - exact @ case.kernel.astype(np.float64)
    published = np.average(np.square(difference).mean(1), axis=0, weights=case.weight)[took]
    np.testing.assert_allclose(error.sum(), published.sum(), rtol=1e-3)


@pytest.mark.parametrize(("bits", "most"), [(8, 1.15), (4, 0.6)])
def test_few_tokens_do_not_make_it_worse_on_others(bits: int, most: float) -> None:
    """As many tokens as channels, on which a target can be fitted to any noise."""
    ratios = []
    for seed in range(4):
        whole = layer(48, 40, seed=seed, rows=40, tokens=48)
        few, others = (whole._replace(x=whole.x[cut], d=whole.d[cut], weight=np.ones_like(whole.weight[cut])) for cut in CUTS)
        found = round_weight(jnp.asarray(few.kernel), few.nearest(bits), few.moments)
        ratios.append(others.error(found.weight, found.bias).sum() / others.error(few.nearest(bits)).sum())
    assert np.mean(ratios) < most


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_no_output_channel_errs_more_than_rounded_to_the_nearest(bits: int, follow: bool) -> None:
    case = layer(60, 30, seed=bits + 10)
    nearest = case.nearest(bits)
    found = round_weight(jnp.asarray(case.kernel), nearest, case.moments, follow=follow)
    before, after = case.error(nearest, 0.0, follow), case.error(found.weight, found.bias, follow)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.9 * before.sum()
    assert 0 < float(found.error) < 1
    low, high = (np.asarray(end) for end in found.weight.code_range)
    codes = np.asarray(found.weight.codes()).astype(int)
    assert ((codes >= low[:, None]) & (codes <= high[:, None])).all()
    assert found.weight.bits == bits


def test_sums_lose_nothing_to_rounding_and_do_not_depend_on_batches() -> None:
    case = layer(12, 4, rows=64, tokens=40)
    shift = jnp.asarray(case.x[0].mean(0))
    start, run = InputMoments.start(shift), jax.jit(InputMoments.observe)
    exact_x, d, weight = case.x.astype(np.float64) - np.asarray(shift), case.d.astype(np.float64), case.weight[:, None, None]
    expected = {
        "second": np.einsum("btk,btj->kj", exact_x, exact_x * weight),
        "cross": np.einsum("btk,btj->kj", d, exact_x * weight),
        "first": (exact_x * weight).sum((0, 1)),
        "drift": (d * weight).sum((0, 1)),
        "count": case.weight.sum(dtype=float) * 40,
    }
    parts = []
    for half in (slice(0, 32), slice(32, 64)):
        seen = start
        for i in range(half.start, half.stop, 4):
            seen = run(seen, case.x[i : i + 4], case.x[i : i + 4] + case.d[i : i + 4], case.weight[i : i + 4])
        parts.append(seen)
    total = jax.jit(InputMoments.total)(parts)
    sizes = np.sqrt(np.diag(expected["second"]))
    scale = {
        "second": np.outer(sizes, sizes),
        "cross": np.outer(sizes, sizes),
        "first": sizes * 50,
        "drift": sizes * 50,
        "count": expected["count"],
    }
    for name, value in expected.items():
        assert (np.abs(np.asarray(getattr(total, name), np.float64) - value) / scale[name]).max() < 1e-6, name


@pytest.mark.parametrize("share", [0.25, 1.0, 3.0])
def test_the_mean_of_rows_that_count_less_than_one_is_their_mean(share: float) -> None:
    x = np.full((1, 2, 5), 7.0, np.float32)
    seen = InputMoments.start(jnp.zeros(5)).observe(jnp.asarray(x), jnp.asarray(x), jnp.array([share / 2], jnp.float32))
    for about in (seen.about_mean(), jax.jit(InputMoments.about_mean)(seen)):
        np.testing.assert_allclose(about.shift, 7.0, rtol=1e-6)
    assert InputMoments.start(jnp.ones(5)).about_mean().shift.tolist() == [1.0] * 5


@pytest.mark.parametrize("error", [0.05, 0.5, 5.0])
def test_moments_that_rounding_made_indefinite_are_damped_until_there_is_a_factor(error: float) -> None:
    """The target then tends to the float weight, and stays finite."""
    case = layer(30, 8, seed=3)
    x = case.x.copy()
    x[..., 1::2] = x[..., ::2]
    moments = case._replace(x=x).moments
    size = np.sqrt(np.diagonal(moments.second))
    noise = (error * np.random.default_rng(0).standard_normal((30, 30)) * np.outer(size, size)).astype(np.float32)
    noisy = dataclasses.replace(moments, second=moments.second + noise * (1 - np.eye(30, dtype=np.float32)))
    covariance = np.asarray(noisy.second, np.float64) / float(noisy.count)
    scaled = (covariance + covariance.T) / 2 / np.outer(size, size) * float(noisy.count)
    assert np.linalg.eigvalsh(scaled)[0] < -0.05, "positive definite where it is damped as usual"
    found = round_weight(jnp.asarray(case.kernel), case.nearest(4), noisy)
    for leaf in (found.target, found.weight.scale, found.bias, found.error):
        assert np.isfinite(leaf).all()


def test_thousands_of_small_terms_beside_a_large_one_are_all_counted() -> None:
    add = jax.jit(lambda total: jax.lax.fori_loop(0, 5000, lambda _, t: t.add(jnp.float32(0.1)), total))
    total = add(gptq.Compensated.zeros().add(jnp.float32(1e7)))
    assert float(total.total) - 1e7 == 0
    assert float(total.total) - 1e7 + float(total.lost) == pytest.approx(500, rel=1e-4)


def test_sizes_of_channels_do_not_matter() -> None:
    """Where a few channels are a thousand times larger than the others, GPTQ still halves the error."""
    case = layer(40, 20)
    factors = np.where(np.arange(40) % 7 == 0, 2.0**10, 1.0).astype(np.float32)
    larger = Layer(case.kernel, case.x * factors, case.d * factors, case.weight)
    kept = InputMoments.total(
        [InputMoments.start(jnp.zeros(40)).observe(jnp.asarray(larger.x), larger.x + larger.d, jnp.asarray(larger.weight))]
    )
    found = round_weight(jnp.asarray(case.kernel), case.nearest(4), kept)
    assert larger.error(found.weight, found.bias).sum() < 0.5 * larger.error(case.nearest(4)).sum()


@pytest.mark.parametrize(
    "kind", ["dead channels", "constant channels", "twins", "few rows", "all constant", "zero kernel", "ties"]
)
@pytest.mark.parametrize("follow", [True, False])
def test_inputs_without_a_factor(kind: str, follow: bool) -> None:
    case = layer(30, 8, seed=3)
    x, d, kernel = case.x.copy(), case.d.copy(), case.kernel.copy()
    if kind == "dead channels":
        x[..., ::3], d[..., ::3] = 0, 0
    elif kind == "constant channels":
        x[..., ::3], d[..., ::3] = 7.0, 0.1
    elif kind == "twins":
        x[..., 1::2], d[..., 1::2] = x[..., ::2], d[..., ::2]
    elif kind == "few rows":
        x, d = x[:1, :3], d[:1, :3]
    elif kind == "all constant":
        x[:], d[:] = 3.0, 0.5
    elif kind == "zero kernel":
        kernel[:, :4] = 0
    else:
        kernel[:] = np.round(kernel)
    changed = Layer(kernel, x, d, case.weight[: len(x)])
    nearest = changed.nearest(4)
    found = round_weight(jnp.asarray(kernel), nearest, changed.moments, follow=follow)
    assert np.isfinite(np.asarray(found.weight.scale)).all()
    for leaf in (found.target, found.bias, found.error):
        assert np.isfinite(leaf).all()
    before, after = changed.error(nearest, 0.0, follow), changed.error(found.weight, found.bias, follow)
    assert (after <= before * (1 + 1e-3) + 1e-5 * np.square(case.kernel).sum()).all()


def test_a_part_of_the_input_that_the_network_before_lost_is_made_up_for() -> None:
    """Inputs that are all too small by a tenth: the target is larger by as much."""
    case = layer(30, 8, seed=4, tokens=4000)
    shrunk = Layer(case.kernel, 0.9 * case.x, 0.1 * case.x, case.weight)
    found = round_weight(jnp.asarray(case.kernel), shrunk.nearest(8), shrunk.moments)
    ratio = (np.asarray(found.weight.dequantize()) * case.kernel.T).sum(1) / np.square(case.kernel).sum(0)
    np.testing.assert_allclose(ratio, 1 / 0.9, rtol=0.02)
    plain = round_weight(jnp.asarray(case.kernel), shrunk.nearest(8), shrunk.moments, follow=False)
    ratio = (np.asarray(plain.weight.dequantize()) * case.kernel.T).sum(1) / np.square(case.kernel).sum(0)
    np.testing.assert_allclose(ratio, 1, rtol=0.01)
    assert not np.asarray(plain.bias).any()
