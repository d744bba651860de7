"""Measures where two models of one shape differ: in their predictions, step by step, and in the output of each layer."""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ptq4dit_jax.engine import QuantizedDiT, imitation
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.guidance import Guidance, GuidedChannels, Predictor, predict
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites
from ptq4dit_jax.sampling import check_labels
from ptq4dit_jax.waiting import ready


class _Capture(struct.PyTreeNode):
    """An observer that keeps what it sees."""

    value: Float[Array, "*shape"]

    def observe(self, x: jax.Array) -> _Capture:
        return _Capture(x)


class _Against(struct.PyTreeNode):
    """An observer that reduces the deviation from a captured reference, so that only one model's activations are held."""

    reference: Float[Array, "*shape"]

    def observe(self, x: jax.Array) -> metrics.Powers:
        return metrics.powers(self.reference, x)


@jax.jit
def _captured(reference: FloatDiT, x: jax.Array, t: jax.Array, y: jax.Array | None) -> dict[str, _Against]:
    nothing = {str(place): _Capture(jnp.zeros(place.lead)) for place in reference.config.spec.outputs}
    _, seen = reference.observe(nest_sites(nothing), x, t, y)
    return {name: _Against(capture.value) for name, capture in flatten_sites(seen).items()}


@jax.jit
def _deviation(
    other: FloatDiT, against: dict[str, _Against], x: jax.Array, t: jax.Array, y: jax.Array | None
) -> dict[str, metrics.Powers]:
    _, powers = other.observe(nest_sites(against), x, t, y)
    return flatten_sites(powers)


def _layer_powers(
    reference: FloatDiT, other: FloatDiT, x: ArrayLike, t: ArrayLike, y: ArrayLike | None
) -> dict[str, metrics.Powers]:
    # Two programs, so that the reference's is compiled once, whatever it is compared with.
    batch = jnp.asarray(x), jnp.asarray(t), None if y is None else jnp.asarray(y)
    return ready(_deviation(other, _captured(reference, *batch), *batch))


def _with_sites(model: Predictor) -> FloatDiT:
    """Returns the model itself if it is a float model, otherwise the fake-quant twin of what the quantized model multiplies."""
    if isinstance(model, FloatDiT):
        return model
    return imitation(cast(QuantizedDiT, model))  # there is no other kind


def layer_sqnr(
    reference_model: FloatDiT, other: Predictor, x: ArrayLike, t: ArrayLike, y: ArrayLike | None
) -> dict[str, np.ndarray]:
    """Returns the SQNR in dB of the network's ``spec.outputs``, (L,) by full name of the site. Errors of earlier layers count.

    Args:
      reference_model: the float model.
      other: a float model or a quantized one, which is observed through its fake-quant twin.
      x: (B, H, W, C) network inputs.
      t: (B,) timesteps, or (1,) if all rows share it.
      y: (B,) labels; None for models without classes.
    """
    return _layer_decibels(reference_model, [_layer_powers(reference_model, _with_sites(other), x, t, y)])


def layer_sqnr_along(
    reference_model: FloatDiT, other: Predictor, inputs: np.ndarray, t: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns :func:`layer_sqnr` with powers summed over steps. Each batch is one step, as in a sampler.

    Args:
      inputs: (S, N, H, W, C) network inputs.
      t: (S,) timesteps.
      labels: (N,) labels.
    """
    twin = _with_sites(other)
    return _layer_decibels(
        reference_model,
        [_layer_powers(reference_model, twin, x, t_1, labels) for x, t_1 in zip(inputs, t[:, None], strict=True)],
    )


def _layer_decibels(model: FloatDiT, batches: list[dict[str, metrics.Powers]]) -> dict[str, np.ndarray]:
    """Returns the SQNR in the order of the network's tables, because JAX sorts the names of a tree."""
    names = map(str, model.config.spec.outputs)
    return {name: metrics.pooled_db([batch[name] for batch in batches]) for name in names}


@partial(jax.jit, static_argnames="guided")
def _predict_steps(
    model: Predictor, inputs: jax.Array, t_S: jax.Array, y_B: jax.Array, scale_S: jax.Array, *, guided: GuidedChannels | None
) -> jax.Array:
    def step(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, t, scale = row
        return predict(model, x, t[None], y_B, scale, guided)[..., : model.config.in_channels].astype(jnp.float32)

    return jax.lax.map(step, (inputs, t_S, scale_S))


def predicted_noise(
    model: Predictor,
    inputs: ArrayLike,
    t: ArrayLike,
    labels: ArrayLike,
    guidance: Guidance = Guidance(),
) -> np.ndarray:
    """Returns the guided prediction at fixed inputs, without variance channels: (S, N, H, W, C) float32.

    Args:
      model: a float or quantized model.
      inputs: (S, N, H, W, C) inputs of S steps.
      t: (S,) timesteps of the steps.
      labels: (N,) class labels.
      guidance: settings left open follow the model. Whether a step is in the interval depends on its own time ``t``.
    """
    resolved = guidance.resolve(model.schedule, model.config)
    scale_S = jnp.asarray(resolved.scales(model.schedule.relative_time(np.asarray(t))), jnp.float32)
    y_B = jnp.asarray(check_labels(labels, model.config))
    out = _predict_steps(model, jnp.asarray(inputs), jnp.asarray(t), y_B, scale_S, guided=resolved.guided)
    return np.asarray(ready(out))


def step_sqnr(
    reference_model: Predictor,
    other: Predictor,
    inputs: ArrayLike,
    t: ArrayLike,
    labels: ArrayLike,
    guidance: Guidance = Guidance(),
) -> np.ndarray:
    """Returns the SQNR in dB of the guided prediction at each step, (S,). Arguments are as for :func:`predicted_noise`.

    :func:`ptq4dit_jax.evaluation.metrics.steps_sqnr` of two predictions also returns the figures over all steps.
    """
    first, second = (predicted_noise(m, inputs, t, labels, guidance) for m in (reference_model, other))
    return np.asarray(metrics.steps_sqnr(first, second).step_db)
