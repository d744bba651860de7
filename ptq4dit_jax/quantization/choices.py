"""What settings and a network's tables say about its sites and steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.networks.spec import Columns, NetworkSpec
from ptq4dit_jax.schedules import Schedule


def integer_sites(config: QuantConfig, spec: NetworkSpec) -> tuple[str, ...]:
    """Sites whose activations are quantized."""
    rules = config.rules(spec)
    return tuple(name for name in spec.sites if rules.is_integer(spec, name))


def balanced_sites(config: QuantConfig, spec: NetworkSpec) -> tuple[str, ...]:
    """Sites to balance. Balancing serves quantized inputs, so layers fed by floats are left alone."""
    if config.balancing.method == "none":
        return ()
    sites = {name: spec.sites[name] for name in integer_sites(config, spec)}
    homes = {name: site for name, site in sites.items() if site.home is not None and site.feeds is not None}
    return tuple(name for name, site in homes.items() if config.balancing.fc2 or site.in_paper)


def equalized_sites(config: QuantConfig, spec: NetworkSpec) -> dict[str, str]:
    """Inputs of attention's products whose channels get equal ranges (v), and the sites that undo it."""
    integer, found = integer_sites(config, spec), {}
    for name, site in spec.sites.items():
        if site.feeds is None and isinstance(site.home, Columns) and site.home.undone is not None:
            found[name] = str(site.place.beside(site.home.undone))
    if not config.balancing.equalize_v:
        return {}
    return {name: other for name, other in found.items() if name in integer and other in integer}


def step_groups(schedule: Schedule, t: ArrayLike, wanted: int) -> tuple[int, np.ndarray, jax.Array]:
    """Returns the number of groups, the group of each calibration step (S,), and the noise levels between groups (G - 1,)."""
    # Steps of one noise level must share a group; Heun's method has pairs of them.
    noise_levels = schedule.noise_level(np.asarray(t))
    if noise_levels.ndim > 1:  # a step reaches down to its cleanest row
        noise_levels = noise_levels.min(axis=1)
    levels, step_levels = np.unique(-noise_levels, return_inverse=True)
    S = len(levels)
    G = min(wanted, S)
    level_groups = np.arange(S) * G // S
    last_of_group = np.searchsorted(level_groups, np.arange(1, G)) - 1
    return G, level_groups[step_levels], jnp.asarray(-levels[last_of_group], schedule.time_dtype)
