"""Where two models of one shape part: in the noise they predict, step by step, and in what each layer of each block gives."""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ptq4dit_jax.engine import QuantizedDiT, reference
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.guidance import Guidance, GuidedChannels, Predictor, predict
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites
from ptq4dit_jax.sampling import check_labels
from ptq4dit_jax.waiting import ready


class _Capture(struct.PyTreeNode):
    """Observer that keeps what it sees."""

    value: Float[Array, "*shape"]

    def observe(self, x: jax.Array) -> _Capture:
        return _Capture(x)


class _Against(struct.PyTreeNode):
    """Observer that reduces the deviation from a captured reference, so that one model's activations are held, not both."""

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
    # Two programs, so that the reference's is compiled once whatever it is compared with.
    batch = jnp.asarray(x), jnp.asarray(t), None if y is None else jnp.asarray(y)
    return ready(_deviation(other, _captured(reference, *batch), *batch))


def _with_sites(model: Predictor) -> FloatDiT:
    """The model itself if it has sites, else the fake-quant twin of a quantized model."""
    if isinstance(model, FloatDiT):
        return model
    return reference(cast(QuantizedDiT, model))  # there is no other


def layer_sqnr(
    reference_model: FloatDiT, other: Predictor, x: ArrayLike, t: ArrayLike, y: ArrayLike | None
) -> dict[str, np.ndarray]:
    """SQNR in dB of the network's ``spec.outputs``, each model fed by its own earlier layers: full name of a site -> (L,).

    Args:
      reference_model: the float model.
      other: a float model or a quantized one, which is observed through its fake-quant twin.
      x: (B, H, W, C) network inputs.
      t: (B,) timesteps, or (1,) where all rows share it.
      y: (B,) labels; None for models without classes.
    """
    return _layer_decibels(reference_model, [_layer_powers(reference_model, _with_sites(other), x, t, y)])


def layer_sqnr_along(
    reference_model: FloatDiT, other: Predictor, inputs: np.ndarray, t: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """:func:`layer_sqnr` with powers summed over steps, one step a batch as a sampler runs it.

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
    """In the order of the network's tables; JAX sorts the names of a tree."""
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
    """Guided noise prediction at fixed inputs, without variance channels: (S, N, H, W, C) float32.

    Args:
      model: a float or quantized model.
      inputs: (S, N, H, W, C) inputs of S steps.
      t: (S,) timestep of each.
      labels: (N,) class labels.
      guidance: what it leaves open follows the model; its interval goes by each input's own time.
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
    """SQNR in dB of the guided noise prediction at each step, (S,); arguments as for :func:`predicted_noise`.

    :func:`ptq4dit_jax.evaluation.metrics.steps_sqnr` of two predictions also has the figures over all steps.
    """
    first, second = (predicted_noise(m, inputs, t, labels, guidance) for m in (reference_model, other))
    return np.asarray(metrics.steps_sqnr(first, second).step_db)
