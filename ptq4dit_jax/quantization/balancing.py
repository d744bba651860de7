"""The second stage: factors on the channels of each site, and the model with them folded in (PTQ4DiT, section 4.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ptq4dit_jax import balance_search, salience
from ptq4dit_jax.calibration import CalibrationData, ChannelExtremes, channel_extremes
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.folding import fold
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.spec import nest_sites
from ptq4dit_jax.quantization.choices import balanced_sites, equalized_sites, step_groups
from ptq4dit_jax.quantization.observations import Observed
from ptq4dit_jax.quantizers import ChannelScale


class Balanced(struct.PyTreeNode):
    """The float model after balancing, which computes the same function as before, and what balancing decided.

    Attributes:
      folded: the model with the factors folded in, and quantizers that multiply by those that could not be.
      factors: (L, K) for each balanced site, by its full name.
      residual: those of them that stay at the site's quantizer.
      activation_salience: (S, L, K) by site, before balancing, as the paper plots it; weight_salience: (L, K).
      eta: of SSC, (S, L) or (S * R, L) by site; rho: the same. Empty without SSC.
      chosen: what measurement chose (``balance="search"``), by site; empty without it.
    """

    folded: FloatDiT
    factors: dict[str, Float[Array, "... _K"]]
    residual: dict[str, Float[Array, "... _K"]]
    activation_salience: dict[str, Float[Array, "... _K"]] = struct.field(default_factory=dict)
    weight_salience: dict[str, Float[Array, "... _K"]] = struct.field(default_factory=dict)
    eta: dict[str, Float[Array, "*_shape"]] = struct.field(default_factory=dict)
    rho: dict[str, Float[Array, "*_shape"]] = struct.field(default_factory=dict)
    chosen: dict[str, balance_search.Chosen] = struct.field(pytree_node=False, default_factory=dict)

    @classmethod
    def by(cls, model: FloatDiT, factors: Mapping[str, jax.Array]) -> Balanced:
        """Balances a model by these factors (L, K), by site."""
        params, residual = _fold(model.config, model.params, dict(factors))
        quantizers = nest_sites({name: ChannelScale(factor) for name, factor in residual.items()})
        folded = model.replace(params=params, quantizers=quantizers)
        return cls(folded=folded, factors=dict(factors), residual=residual)


def balance(
    model: FloatDiT,
    config: QuantConfig,
    observed: Observed,
    rows: CalibrationData,
    *,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Balanced:
    """Balances a model by what was observed of its channels at every calibration step (PTQ4DiT eqs. 4-11).

    Args:
      model: the float model.
      config: settings, of which ``balance``, ``ssc``, ``temperature``, ``exponent``, ``balance_fc2`` and ``equalize_v`` apply.
      observed: statistics of ``model`` on ``rows``.
      rows: used again by balancing by measurement and by SSC over rows.
      row_batch, mesh: as for :func:`ptq4dit_jax.calibration.channel_extremes`.
      progress: called with (sites done, sites in all) where balancing is chosen by measurement.
    """
    extremes = observed.extremes
    config, spec = config.for_network(model.config), model.config.spec
    rules = config.rules(spec)
    names = balanced_sites(config, spec)
    layers = {name: str(spec.sites[name].feeds.place) for name in names}  # type: ignore[union-attr]
    factors: dict[str, jax.Array] = {}
    activation_salience, weight_salience, eta, rho = ({} for _ in range(4))
    chosen: dict[str, balance_search.Chosen] = {}
    by_row: dict[str, ChannelExtremes] = {}
    for name in equalized_sites(config, spec):
        s_v = extremes[name].salience.max(0)
        factors[name] = salience.equalizing_factors(s_v.reshape(s_v.shape[0], -1))
    if config.balancing.method == "search":
        assert config.activations.dynamic_sites is not None
        _, groups, _ = step_groups(model.schedule, rows.t, config.activations.step_groups)
        equalized = Balanced.by(model, factors).folded
        chosen = balance_search.search(
            model,
            extremes,
            rows,
            groups,
            {site: equalized.layer(layer)["kernel"] for site, layer in layers.items()},
            {site: rules.layers[layer].weight_bits for site, layer in layers.items()},
            dynamic=config.activations.dynamic_sites,
            act_bits=config.activations.bits,
            temperature=config.balancing.temperature,
            range_search=config.range_search,
            progress=progress,
        )
    if names and config.balancing.method == "csb+ssc" and config.balancing.ssc == "rows":
        by_row = channel_extremes(model, rows, sites=names, per_row=True, row_batch=row_batch, mesh=mesh)
    for name in names:
        s_x = extremes[name].salience
        s_w = salience.weight_salience(model.layer(layers[name])["kernel"])
        activation_salience[name], weight_salience[name] = s_x, s_w
        if config.balancing.method == "search":
            factors[name] = chosen[name].factors
            continue
        if config.balancing.method == "csb":
            weighed = s_x[s_x.shape[0] // 2]
        else:
            if by_row:
                by_step = jnp.moveaxis(by_row[name].salience, 2, 1)  # (S, R, L, K)
                samples = by_step.reshape(-1, *by_step.shape[2:])
            else:
                samples = s_x
            weighed, eta[name], rho[name] = jax.jit(salience.ssc_salience)(samples, s_w, config.balancing.temperature)
        factors[name] = salience.balancing_factors(weighed, s_w, config.balancing.exponent)
    return dataclasses.replace(
        Balanced.by(model, factors),
        activation_salience=activation_salience,
        weight_salience=weight_salience,
        eta=eta,
        rho=rho,
        chosen=chosen,
    )


_fold = jax.jit(fold, static_argnums=0)
