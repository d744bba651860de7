"""What a network in a foreign file predicts, noise or velocity, and how the networks of flow models become a plain DiT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.checkpoints.foreign.evidence import Evidence, Said
from ptq4dit_jax.checkpoints.foreign.layouts import Layout, View
from ptq4dit_jax.checkpoints.foreign.lazy import TensorFile
from ptq4dit_jax.checkpoints.foreign.options import GivenSchedule
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.folding import fold_modulation
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule, Schedule


def find_schedule(
    file: TensorFile,
    view: View,
    layout: Layout,
    config: DiTConfig,
    evidence: Evidence,
    given: GivenSchedule,
    told: NoiseSchedule | None,
) -> Schedule:
    """Determines the schedule from a file's tensors, its settings, its name and the user's options.

    Args:
      file: the opened checkpoint.
      view: its tensors by the layout's names.
      layout: the family of the checkpoint.
      config: the shape of the network.
      evidence: what the checkpoint says besides its tensors; guesses are noted there.
      given: the user's options.
      told: the schedule of a pipeline's scheduler.

    Raises:
      Ptq4ditError: an option or a piece of evidence that contradicts another, or cannot be followed.
    """
    if given.objective not in (None, "noise", "velocity"):
        raise Ptq4ditError(f"The objective must be noise or velocity, not {given.objective!r}.")
    if given.objective == "noise" and not layout.schedule_is_noise:
        raise Ptq4ditError(f"The checkpoint {file.path} is {layout.name}, which predicts velocity; leave the objective out.")
    said = said_objective(evidence, layout)
    if given.objective is not None and said is not None and said.value != given.objective:
        raise evidence.contradiction(said, f"you say that it predicts {given.objective}")
    if not layout.schedule_is_noise and said is not None and said.value == "noise":
        raise evidence.contradiction(said, f"{layout.name} predicts velocity")
    objective = given.objective or (said.value if said else None)
    content = None if objective == "noise" or told is not None else layout.told(view, config)
    if objective is None and layout.schedule_is_noise and content is None and told is None:
        if file.path.name.startswith("SiT"):
            objective = "velocity"
        elif layout.is_shared:
            evidence.guess(
                "it predicts noise, as DiT does and not SiT under the same names", "objective (--objective velocity)"
            )
    if objective == "velocity" or content is not None or not layout.schedule_is_noise:
        return _flow(file, layout, evidence, given, content)
    return _noise(file, layout, evidence, given, told)


def said_objective(evidence: Evidence, layout: Layout) -> Said | None:
    """Returns what the evidence says about the objective: a key for it, a flow's path, a training interface, or SiT's name."""
    prediction, path = evidence.said.get("objective"), evidence.said.get("path")
    flow = path or evidence.said.get("interface")
    name = evidence.said.get("published name")
    if flow is None and name is not None and name.value.family == "sit":
        flow = name
    if prediction is not None and prediction.value == "v":
        if flow is None and layout.schedule_is_noise and "data at time 0" not in evidence.said:
            raise Ptq4ditError(
                f"The checkpoint {evidence.path} says {prediction}, which may mean the velocity of a flow or the v of a noise "
                f"schedule, which cannot be sampled; if it is a flow, say so with objective (--objective velocity --ignore "
                f"{prediction.key})."
            )
        prediction = dataclasses.replace(prediction, value="velocity")
    if flow is not None:
        if prediction is not None and prediction.value != "velocity":
            raise Ptq4ditError(
                f"The checkpoint {evidence.path} says {prediction} and {flow}: noise along the path of a flow, where only "
                f"velocity can be sampled; leave one out with ignore (--ignore {prediction.key}) only if you know better."
            )
        return dataclasses.replace(flow, value="velocity")
    return prediction


def _flow(file: TensorFile, layout: Layout, evidence: Evidence, given: GivenSchedule, content: Schedule | None) -> FlowSchedule:
    if given.betas:
        raise Ptq4ditError(
            f"The checkpoint {file.path} predicts velocity, which has no betas or timesteps; leave timesteps, beta_start and "
            "beta_end out."
        )
    told = layout.schedule.data_time if isinstance(layout.schedule, FlowSchedule) else None
    if "data at time 0" in evidence.said or (isinstance(content, FlowSchedule) and content.data_time == 0):
        told = 0
    if told is not None and given.data_time not in (None, told):
        raise Ptq4ditError(f"The checkpoint {file.path} has its data at t = {told}; leave data_time (--data-time) out.")
    data_time = given.data_time if told is None else told
    if data_time is None:
        evidence.guess("time runs from noise at 0 to data at 1, as in SiT", "data_time (--data-time 0)")
        data_time = 1
    known = layout.schedule if isinstance(layout.schedule, FlowSchedule) else FlowSchedule()
    schedule = dataclasses.replace(known, data_time=data_time)
    for what in ("timesteps", "first beta", "last beta", "betas"):
        if what in evidence.said:
            evidence.notes.append(f"{evidence.said[what]} is not used: the time of this flow reaches the network as 0 to 1.")
    if layout.step_size is not None:
        return dataclasses.replace(schedule, steps=_flow_steps(layout, evidence, given))
    if given.flow_steps is not None:
        raise _no_step_size(file, layout)
    return schedule


def _flow_steps(layout: Layout, evidence: Evidence, given: GivenSchedule) -> int:
    """Returns the number of steps for which a network with step sizes is imported."""
    assert layout.step_size is not None
    if given.flow_steps is not None:
        return given.flow_steps
    if evidence.value("training") == "naive":
        evidence.notes.append(f"{evidence.said['training']}: trained without step sizes, so it takes any number of steps.")
        return 0
    if (steps := evidence.value("steps of a flow")) is not None:
        return int(steps)
    count = layout.step_size.default
    evidence.guess(f"it is sampled in {count} step{'s' * (count > 1)}", "flow_steps (--flow-steps N)")
    return count


def _no_step_size(file: TensorFile, layout: Layout) -> Ptq4ditError:
    return Ptq4ditError(
        f"The checkpoint {file.path} is {layout.name}, whose network sees no step size and takes any number of steps; "
        "leave flow_steps (--flow-steps) out."
    )


def _noise(
    file: TensorFile, layout: Layout, evidence: Evidence, given: GivenSchedule, told: NoiseSchedule | None
) -> NoiseSchedule:
    if given.flow_steps is not None:
        raise _no_step_size(file, layout)
    if given.data_time is not None:
        raise Ptq4ditError(f"The checkpoint {file.path} predicts noise, which has no data_time (--data-time); leave it out.")
    if "steps of a flow" in evidence.said:
        evidence.notes.append(f"{evidence.said['steps of a flow']} is not used: it is not a flow's network.")
    default = layout.schedule if isinstance(layout.schedule, NoiseSchedule) else NoiseSchedule()
    said = {
        field: evidence.said[what]
        for field, what in (("num_timesteps", "timesteps"), ("beta_start", "first beta"), ("beta_end", "last beta"))
        if what in evidence.said
    }
    fields = {name: item.value for name, item in said.items()}
    for name, item in said.items():
        if told is not None and getattr(told, name) != item.value:
            raise evidence.contradiction(item, f"its scheduler has {name} = {getattr(told, name)}")
        if name in given.betas and given.betas[name] != item.value:
            raise evidence.contradiction(item, f"you say {given.betas[name]}")
    if told is None and not fields and not given.betas and layout.is_shared:
        evidence.guess(
            f"its schedule is linear, {default.num_timesteps} steps from {default.beta_start:g} to {default.beta_end:g}",
            "timesteps, beta_start, beta_end (--timesteps, --beta-start, --beta-end)",
        )
    return dataclasses.replace(told or default, **{**fields, **given.betas})


def fold_gains(params: Mapping[str, Any], layout: Layout, config: DiTConfig) -> dict[str, Any]:
    """Folds the learned gains of norms into the linear layers that modulate the norms; takes and returns flat parameters."""
    params = dict(params)
    for gain in layout.gains:
        names = {leaf: f"{gain.layer}/{leaf}" for leaf in ("kernel", "bias")}
        factor, *layer = (jnp.asarray(params[name], jnp.float32) for name in (gain.entry.ours, *names.values()))
        scaled = dataclasses.replace(gain.home(config), shift=None)  # a shift comes after the norm
        folded = fold_modulation(dict(zip(names, layer, strict=True)), factor, scaled)
        params |= {name: folded[leaf].astype(params[name].dtype) for leaf, name in names.items()}
        del params[gain.entry.ours]
    return params


def fold_step_size(
    params: dict[str, jax.Array], layout: Layout, config: DiTConfig, schedule: FlowSchedule
) -> dict[str, jax.Array]:
    """Folds the output of the embedder of step sizes for ``schedule.steps`` into a bias; takes and returns flat parameters."""
    if layout.step_size is None:
        return params
    k1, b1, k2, b2 = (
        np.asarray(params.pop(f"step_{layer}/{leaf}"), np.float64) for layer in ("fc1", "fc2") for leaf in ("kernel", "bias")
    )
    seen = layout.step_size.seen(schedule.steps) if schedule.steps else 0.0
    features = config.time_features(jnp.full(1, seen, jnp.float32))
    hidden = np.asarray(features, np.float64) @ k1 + b1
    constant = (hidden / (1 + np.exp(-hidden))) @ k2 + b2
    bias = params["time_fc2/bias"]
    return {**params, "time_fc2/bias": jnp.asarray(np.asarray(bias, np.float64) + constant[0], bias.dtype)}


def drop_variance(params: Mapping[str, Any], config: DiTConfig) -> tuple[dict[str, Any], DiTConfig]:
    """Drops the variance channels of a flow model, which computes and discards them; takes and returns flat parameters."""
    if not config.learn_sigma:
        return dict(params), config
    final = {name: _halves(params[name], config)[..., 0, :] for name in ("final/kernel", "final/bias")}
    final = {name: half.reshape(*half.shape[:-2], -1) for name, half in final.items()}
    return {**params, **final}, dataclasses.replace(config, learn_sigma=False)


def add_variance(params: Mapping[str, Any], config: DiTConfig) -> tuple[dict[str, Any], DiTConfig]:
    """Inverts :func:`drop_variance`: adds channels of zeros, as training leaves them."""
    wide = dataclasses.replace(config, learn_sigma=True)
    final = {}
    for name in ("final/kernel", "final/bias"):
        kept = params[name].reshape(*params[name].shape[:-1], config.patch_size**2, 1, config.in_channels)
        final[name] = jnp.concatenate([kept, jnp.zeros_like(kept)], axis=-2).reshape(*params[name].shape[:-1], -1)
    return {**params, **final}, wide


def _halves(array: jax.Array, config: DiTConfig) -> jax.Array:
    """Reshapes (..., P * P * 2C) to (..., P * P, 2, C): each position of a patch has both halves."""
    return array.reshape(*array.shape[:-1], config.patch_size**2, 2, config.in_channels)
