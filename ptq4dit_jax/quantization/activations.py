"""The third stage: ranges of activations, chosen on the balanced model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Num

from ptq4dit_jax.calibration import CalibrationData, histograms
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.quantization.balancing import Balanced
from ptq4dit_jax.quantization.choices import equalized_sites, integer_sites, step_groups
from ptq4dit_jax.quantization.observations import Observed
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.ranges import activation_parameters


class Ranged(struct.PyTreeNode):
    """Quantizers ``acts`` by site, leaves ([L,] G), and the noise levels ``edges`` (G - 1,) between the groups of steps."""

    acts: dict[str, ActQuantizer]
    edges: Num[Array, " edges"]


def choose_ranges(
    balanced: Balanced,
    config: QuantConfig,
    observed: Observed,
    rows: CalibrationData,
    *,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
) -> Ranged:
    """Chooses quantizers for all sites whose activations are integers.

    Args:
      balanced: the float model after balancing.
      config: settings, of which ``act_bits``, ``range_search``, ``step_groups`` and ``dynamic_sites`` apply.
      observed: statistics of the model before balancing.
      rows: counted in histograms of the balanced model.
      row_batch, mesh: as for :func:`ptq4dit_jax.calibration.histograms`.
    """
    folded, factors, residual = balanced.folded, balanced.factors, balanced.residual
    G, groups, edges = step_groups(folded.schedule, rows.t, config.activations.step_groups)
    ranges = {}
    config, spec = config.for_network(folded.config), folded.config.spec
    dynamic = config.activations.dynamic_sites or ()
    undone = {other: factors[name] for name, other in equalized_sites(config, spec).items() if name in factors}
    integer = integer_sites(config, spec)
    for name in integer:
        if name in dynamic:
            continue
        low, high = observed.extremes[name].low, observed.extremes[name].high
        factor = residual.get(name, factors.get(name, jnp.ones((), jnp.float32)))
        if name in undone:
            factor = factor * undone[name]  # the extremes were seen before v was equalized
        factor = factor.reshape(1, factor.shape[0], *low.shape[2:]) if factor.ndim else factor
        feature_axes = tuple(range(1 + len(spec.sites[name].place.lead), low.ndim))
        low, high = (low * factor).min(feature_axes), (high * factor).max(feature_axes)
        ranges[name] = (
            jax.ops.segment_min(low, groups, num_segments=G),
            jax.ops.segment_max(high, groups, num_segments=G),
        )
    if ranges:
        counted = histograms(folded, rows, jnp.asarray(groups), ranges, num_groups=G, row_batch=row_batch, mesh=mesh)
    else:  # no range depends on the step
        counted, edges = {}, edges[:0]

    acts = {}
    for name, h in counted.items():
        scale, zero_point = activation_parameters(h.low, h.high, h.counts, config.activations.bits, config.range_search)
        acts[name] = ActQuantizer(
            scale=jnp.moveaxis(scale, 0, -1),
            zero_point=jnp.moveaxis(zero_point, 0, -1),
            balance=residual.get(name),
            bits=config.activations.bits,
        )
    for name in (name for name in dynamic if name in integer):
        acts[name] = ActQuantizer(
            scale=None,
            zero_point=None,
            balance=residual.get(name),
            bits=config.activations.bits,
            dynamic=True,
            nonnegative=spec.sites[name].nonnegative,
        )
    return Ranged(acts, edges)
