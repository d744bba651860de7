"""What a network in a foreign file predicts, noise or velocity, and what makes the networks of flow models a plain DiT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.checkpoints.foreign.layouts import Layout, View
from ptq4dit_jax.checkpoints.foreign.tensors import TensorFile
from ptq4dit_jax.dit import DiTConfig, timestep_frequencies
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule, Schedule


def find_schedule(
    file: TensorFile,
    view: View,
    layout: Layout,
    config: DiTConfig,
    schedule: Schedule,
    objective: str | None,
    flow_steps: int | None,
) -> Schedule:
    """The schedule that a file, its name and the user tell; ``schedule`` is what its layout tells.

    Raises:
      Ptq4ditError: an option that contradicts the layout, or an unknown objective.
    """
    if objective not in (None, "noise", "velocity"):
        raise Ptq4ditError(f"The objective must be noise or velocity, not {objective!r}.")
    if objective == "noise" and isinstance(schedule, FlowSchedule):
        raise Ptq4ditError(f"The checkpoint {file.path} is {layout.name}, which predicts velocity; leave the objective out.")
    if objective == "velocity" and isinstance(schedule, NoiseSchedule):
        schedule = FlowSchedule()
    if objective is None:
        named = FlowSchedule() if isinstance(schedule, NoiseSchedule) and file.path.name.startswith("SiT") else None
        schedule = layout.told(view, config) or named or schedule
    if layout.step_size is not None and isinstance(schedule, FlowSchedule):
        steps = layout.step_size.default if flow_steps is None else flow_steps
        return dataclasses.replace(schedule, steps=steps)
    if flow_steps is not None:
        raise Ptq4ditError(
            f"The checkpoint {file.path} is {layout.name}, whose network sees no step size and takes any number of steps; "
            "leave flow_steps (--flow-steps) out."
        )
    return schedule


def fold_step_size(
    params: dict[str, jax.Array], layout: Layout, config: DiTConfig, schedule: FlowSchedule
) -> dict[str, jax.Array]:
    """Flat parameters without the embedder of step sizes, whose output for ``schedule.steps`` becomes part of a bias."""
    if layout.step_size is None:
        return params
    k1, b1, k2, b2 = (
        np.asarray(params.pop(f"step_{layer}/{leaf}"), np.float64) for layer in ("fc1", "fc2") for leaf in ("kernel", "bias")
    )
    seen = layout.step_size.seen(schedule.steps) if schedule.steps else 0.0
    hidden = np.asarray(timestep_frequencies(config, jnp.full(1, seen, jnp.float32)), np.float64) @ k1 + b1
    constant = (hidden / (1 + np.exp(-hidden))) @ k2 + b2
    bias = params["time_fc2/bias"]
    return {**params, "time_fc2/bias": jnp.asarray(np.asarray(bias, np.float64) + constant[0], bias.dtype)}


def drop_variance(params: Mapping[str, Any], config: DiTConfig) -> tuple[dict[str, Any], DiTConfig]:
    """Flat parameters of a flow model without the variance channels, which such a model computes and throws away."""
    if not config.learn_sigma:
        return dict(params), config
    final = {name: _halves(params[name], config)[..., 0, :] for name in ("final/kernel", "final/bias")}
    final = {name: half.reshape(*half.shape[:-2], -1) for name, half in final.items()}
    return {**params, **final}, dataclasses.replace(config, learn_sigma=False)


def add_variance(params: Mapping[str, Any], config: DiTConfig) -> tuple[dict[str, Any], DiTConfig]:
    """The inverse of :func:`drop_variance`: channels of zeros, as training leaves them."""
    wide = dataclasses.replace(config, learn_sigma=True)
    final = {}
    for name in ("final/kernel", "final/bias"):
        kept = params[name].reshape(*params[name].shape[:-1], config.patch_size**2, 1, config.in_channels)
        final[name] = jnp.concatenate([kept, jnp.zeros_like(kept)], axis=-2).reshape(*params[name].shape[:-1], -1)
    return {**params, **final}, wide


def _halves(array: Any, config: DiTConfig) -> Any:
    """(..., P * P * 2C) to (..., P * P, 2, C): both halves are inside each position of a patch."""
    return array.reshape(*array.shape[:-1], config.patch_size**2, 2, config.in_channels)
