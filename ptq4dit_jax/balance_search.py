"""Balancing by measurement: picks the candidate with which a layer's quantized output has the smallest error on some rows.

A candidate is ``b_j = s(W)_j^(1 - migration) / s(X)_j^migration`` of one kind of salience (SmoothQuant's); ``none`` and the
paper's two are among them. So on the rows measured, no layer has a larger error than with these. All but ``none`` undo what
makes a channel larger and its weights smaller, so a model with such channels loses nothing against the same one without. Errors
are relative to the output's power at the same step, so the cleanest steps, where they are largest, count most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from ptq4dit_jax import salience
from ptq4dit_jax.calibration import MICRO_BATCH, CalibrationData, ChannelExtremes
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites
from ptq4dit_jax.numerics import CALIBRATION, along_last
from ptq4dit_jax.quantizers import ActQuantizer, QTensor, affine_parameters
from ptq4dit_jax.ranges import RangeSearch, quantize_weight
from ptq4dit_jax.waiting import ready

#: The share of the difference between activations that a candidate moves into the weights, by its kind of salience over all
#: steps: largest values (CSB is 0.5 of those) or root mean squares.
MIGRATIONS = {"largest": (0.25,), "rms": (0.0, 0.25, 0.5, 0.75)}
#: The fewest tokens per step that candidates are measured on: those of two rows or more, but at most a micro-batch.
_TOKENS = 512
#: Shares of the extremes that are tried as static ranges.
_SHARES = (1.0, 0.8, 0.6, 0.4)


class Chosen(NamedTuple):
    """For a site: ``factors`` (L, K), the candidate that each block took, and its error (L,) relative to no balancing and to
    the paper's."""

    factors: jax.Array
    names: tuple[str, ...]
    to_none: np.ndarray
    to_paper: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Returns what a report needs."""
        return {"chosen": list(self.names), "to_none": self.to_none.tolist(), "to_paper": self.to_paper.tolist()}


def candidates(extremes: ChannelExtremes, kernel: jax.Array, temperature: float) -> dict[str, jax.Array]:
    """Returns factors (L, K) by name, for extremes (S, L, K) at every step and a kernel (L, K, N)."""
    s_w, s_x = salience.weight_salience(kernel), extremes.salience
    rms = jnp.sqrt(extremes.power.mean(0)), jnp.sqrt(jnp.square(kernel).mean(-1))
    kinds = {"largest": (s_x.max(0), s_w), "rms": rms}
    found = {"none": jnp.ones_like(s_w), "csb": salience.balancing_factors(s_x[s_x.shape[0] // 2], s_w)}
    found["csb+ssc"] = salience.balancing_factors(salience.ssc_salience(s_x, s_w, temperature)[0], s_w)
    for kind, migrations in MIGRATIONS.items():
        for migration in migrations:
            found[f"{kind} {migration:g}"] = salience.smoothing_factors(*kinds[kind], migration)
    return found


class _Trials(struct.PyTreeNode):
    """Observer of a float layer's input that measures the error of its output with each of C candidates.

    ``kernel`` (K, N) is the float one, ``factors`` are (C, K), ``weights`` (C, N, K), and ``acts`` (C, P) static quantizers, of
    which the best counts; None scales each token by itself.
    """

    kernel: Float[Array, "*lead K N"]
    factors: Float[Array, "*lead C K"]
    weights: QTensor
    acts: ActQuantizer | None
    bits: int = struct.field(pytree_node=False)

    def observe(self, x: jax.Array) -> metrics.Powers:
        product = partial(jnp.einsum, "...k,kn->...n", precision=CALIBRATION)
        exact = product(x, self.kernel)

        def errors(candidate: tuple[jax.Array, QTensor, ActQuantizer | None]) -> metrics.Powers:
            factor, weight, acts = candidate
            balanced, kernel = x * along_last(factor, x.ndim), weight.dequantize().T
            of = lambda act: metrics.powers(exact, product(act(balanced), kernel))
            if acts is None:
                return of(ActQuantizer(None, None, balance=None, bits=self.bits, dynamic=True))
            tried = jax.lax.map(of, acts)
            best = jnp.argmin(jnp.ldexp(tried.error, 2 * (tried.exponent - tried.exponent.max())))
            return jax.tree.map(lambda leaf: leaf[best], tried)

        return jax.lax.map(errors, (self.factors, self.weights, self.acts))


def search(
    model: FloatDiT,
    extremes: Mapping[str, ChannelExtremes],
    calibration: CalibrationData,
    groups: np.ndarray,
    kernels: Mapping[str, jax.Array],
    weight_bits: Mapping[str, int],
    *,
    dynamic: Sequence[str],
    act_bits: int,
    temperature: float,
    range_search: RangeSearch,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Chosen]:
    """Finds the best candidate for each block site and each block, measured on some rows of every step.

    Args:
      model: the float model before balancing, on one device.
      extremes: of the sites, leaves (S, L, K).
      calibration: S steps of R rows.
      groups: (S,) the group of each step, by which static ranges are chosen.
      kernels: for each site to balance, such as ``blocks.fc1_in``, the kernels (L, K, N) of its layer as they will be quantized
        apart from balancing. Those of ``blocks.qkv_in`` have v equalized, so that its largest channels do not decide for all.
      weight_bits: the width of each of these sites' layers.
      dynamic: sites that are scaled per token.
      act_bits: width of the activations.
      temperature: of SSC's softmax.
      range_search: how weight ranges are chosen.
      progress: called with (sites done, sites in all).
    """
    found, report = {}, progress or (lambda done, total: None)
    wanted = max(2, min(MICRO_BATCH, -(-_TOKENS // model.config.num_tokens)))
    rows = calibration.spread(calibration.num_steps, wanted)
    for done, (site, kernel) in enumerate(kernels.items()):
        report(done, len(kernels))
        tried = candidates(extremes[site], kernel, temperature)
        factors = jnp.stack(list(tried.values()))
        trials = _trials(
            kernel,
            factors,
            extremes[site],
            jnp.asarray(groups, jnp.int32),
            bits=weight_bits[site],
            act_bits=act_bits,
            dynamic=site in dynamic,
            search=range_search,
        )
        ratio = np.asarray(ready(_errors(model, rows, trials, site=site)), np.float64)
        best = ratio.argmin(0)
        names, blocks = list(tried), np.arange(len(best))
        chosen = jnp.take_along_axis(factors, jnp.asarray(best, jnp.int32)[None, :, None], 0)[0]
        relative = lambda name, ratio=ratio, best=best, blocks=blocks, names=names: (
            ratio[best, blocks] / np.maximum(ratio[names.index(name)], np.finfo(np.float32).tiny)
        )
        found[site] = Chosen(chosen, tuple(names[i] for i in best), relative("none"), relative("csb+ssc"))
    report(len(kernels), len(kernels))
    return found


@partial(jax.jit, static_argnames=("bits", "act_bits", "dynamic", "search"))
def _trials(
    kernel: jax.Array,
    factors: jax.Array,
    extremes: ChannelExtremes,
    groups: jax.Array,
    *,
    bits: int,
    act_bits: int,
    dynamic: bool,
    search: RangeSearch,
) -> _Trials:
    """Returns trials with leaves (L, C, ...); those of static quantizers are (S, L, C, P)."""
    factors = jnp.moveaxis(factors, 1, 0)
    power = extremes.power.mean(0)

    def rounded(block: tuple[jax.Array, jax.Array, jax.Array]) -> QTensor:
        kernel, factors, power = block

        def one(factor: jax.Array) -> QTensor:
            return quantize_weight((kernel / factor[:, None]).T, bits, search, salience.balanced_power(power, factor))

        return jax.lax.map(one, factors)

    weights = jax.lax.map(rounded, (kernel, factors, power))
    acts = None
    if not dynamic:
        low, high = (jnp.expand_dims(end, 2) * factors[None] for end in (extremes.low, extremes.high))  # (S, L, C, K)
        low, high = low.min(-1), high.max(-1)
        low = jax.ops.segment_min(low, groups, num_segments=low.shape[0])[groups]
        high = jax.ops.segment_max(high, groups, num_segments=high.shape[0])[groups]
        shares = along_last(jnp.asarray(_SHARES, low.dtype), low.ndim + 1)
        scale, zero_point = affine_parameters(low[..., None] * shares, high[..., None] * shares, act_bits)
        acts = ActQuantizer(scale=scale, zero_point=zero_point, balance=None, bits=act_bits)
    return _Trials(kernel=kernel, factors=factors, weights=weights, acts=acts, bits=act_bits)


@partial(jax.jit, static_argnames="site")
def _errors(model: FloatDiT, rows: CalibrationData, trials: _Trials, *, site: str) -> jax.Array:
    """Returns the mean over steps of each candidate's error relative to the output's power, (C, L)."""

    def step(batch: tuple[CalibrationData, Any]) -> jax.Array:
        rows, acts = batch
        observers = nest_sites({site: trials.replace(acts=acts)})
        powers = flatten_sites(model.observe(observers, rows.x, rows.t, rows.y)[1])[site]
        return powers.error / jnp.where(powers.signal > 0, powers.signal, 1.0)

    return jax.lax.map(step, (rows, trials.acts)).mean(0).T
