"""Channel salience and its balancing: SSC and CSB of PTQ4DiT. Pure functions of arrays; everything runs under ``jit``.

Equation numbers are those of Wu et al., "PTQ4DiT" (NeurIPS 2024). The last axis is always the input channel j.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ptq4dit_jax.numerics import at_least_float32, unit_exponent

#: A channel whose salience is below this share of the layer's largest is dead: it is left alone (b = 1).
DEAD_CHANNEL = 1e-6


def weight_salience(kernel: jax.Array) -> jax.Array:
    """``s(W)_j = max_n |W_jn|`` (eq. 4): kernel (..., K, N) to (..., K)."""
    return jnp.abs(kernel).max(-1)


def average_ranks(x: jax.Array) -> jax.Array:
    """Ranks 1..K along the last axis, ties sharing their average, float32 at least."""

    def ranks(row: jax.Array) -> jax.Array:
        ordered = jnp.sort(row)
        below = jnp.searchsorted(ordered, row, side="left")
        up_to = jnp.searchsorted(ordered, row, side="right")
        return (below + up_to + 1).astype(at_least_float32(row.dtype)) / 2

    return jnp.vectorize(ranks, signature="(k)->(k)")(x)


def spearman(a: jax.Array, b: jax.Array) -> jax.Array:
    """Spearman's rank correlation along the last axis, (..., K) to (...); 0 where either side is constant."""

    def standardize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        ranks = average_ranks(x)
        centered = ranks - ranks.mean(-1, keepdims=True)
        return centered, jnp.square(centered).sum(-1)

    (a_ranks, a_power), (b_ranks, b_power) = standardize(a), standardize(b)
    power = jnp.sqrt(a_power) * jnp.sqrt(b_power)
    return jnp.where(power > 0, (a_ranks * b_ranks).sum(-1) / jnp.where(power > 0, power, 1.0), 0.0)


def ssc_weights(rho: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """``eta = softmax(-rho / temperature)`` over the first axis (eq. 11): steps whose salience agrees least with the
    weight's count most."""
    return jax.nn.softmax(-rho / temperature, axis=0)


def ssc_salience(
    activation_salience: jax.Array, weight_salience: jax.Array, temperature: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Spearman-weighted salience over steps (eq. 10), or over single rows if the first axis is rows.

    Args:
      activation_salience: (S, ..., K), ``max |x|`` per channel at each step.
      weight_salience: (..., K).
      temperature: of the softmax; 1 is the paper's.

    Returns:
      ``s_rho`` (..., K), the weights ``eta`` (S, ...) and ``rho`` (S, ...).
    """
    rho = spearman(activation_salience, jnp.broadcast_to(weight_salience, activation_salience.shape))
    eta = ssc_weights(rho, temperature)
    return (eta[..., None] * activation_salience).sum(0), eta, rho


def balancing_factors(
    activation_salience: jax.Array, weight_salience: jax.Array, exponent: float | jax.Array = 0.5
) -> jax.Array:
    """``b_j = (s(W)_j / s(X)_j)^exponent`` (eq. 6 at 0.5; 0 is no balancing): (..., K).

    ``X' = X b`` and ``W' = W / b``. A channel that is dead on either side gets 1, so b is always finite and positive.
    """
    alive = _alive(activation_salience, weight_salience)
    safe = lambda s: jnp.where(alive, s, 1.0)
    return safe(weight_salience) ** exponent / safe(activation_salience) ** exponent


def smoothing_factors(activation_salience: jax.Array, weight_salience: jax.Array, migration: float | jax.Array) -> jax.Array:
    """``b_j = s(W)_j^(1 - migration) / s(X)_j^migration`` up to one factor for all channels: (..., K).

    The inverse of SmoothQuant's factors (Xiao et al., ICML 2023, eq. 4), divided by their geometric mean. ``migration``
    ranges from 0, which makes the weights of all channels alike, to 1, which makes the activations alike. Multiplying a channel
    and dividing its weights by one factor leads to the same balanced layer, whatever ``migration`` is. Dead channels get 1.
    """
    alive = _alive(activation_salience, weight_salience)
    log = lambda s: jnp.log(jnp.where(alive, s, 1.0))
    powers = (1 - migration) * log(weight_salience) - migration * log(activation_salience)
    mean = powers.sum(-1, keepdims=True) / jnp.maximum(alive.sum(-1, keepdims=True, dtype=powers.dtype), 1)
    return jnp.where(alive, jnp.exp(powers - mean), 1.0)


def _alive(*saliences: jax.Array) -> jax.Array:
    """Returns which channels (..., K) are dead by none of the saliences."""
    alive = jnp.ones(saliences[0].shape, bool)
    for salience in saliences:
        alive &= salience > DEAD_CHANNEL * salience.max(-1, keepdims=True)
    return alive


def balanced_power(power: jax.Array, factor: jax.Array) -> jax.Array:
    """Mean squares (..., K) of channels that are multiplied by ``factor`` (..., K), up to one power of two for all channels,
    which keeps them within float32."""
    return power * jnp.square(jnp.ldexp(factor, -unit_exponent(factor)))


def equalizing_factors(salience: jax.Array) -> jax.Array:
    """``c_j = mean(s) / s_j``: gives every channel the same largest magnitude; dead channels get 1. (..., K) to (..., K)."""
    alive = _alive(salience)
    return jnp.where(alive, salience.mean(-1, keepdims=True) / jnp.where(alive, salience, 1.0), 1.0)
