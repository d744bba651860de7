"""Adam (Kingma & Ba, 2015) in the dtype of its variables, whatever JAX's promotion rules.

Optax raises its decay rates to the power of an integer array. That is an implicit promotion: to float64 under
``JAX_ENABLE_X64``, and an error where promotion is strict. The formulas are optax's, and so are the state and the names of its
leaves, which journals hold.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from ptq4dit_jax.quantizers import reciprocal

_Tree = TypeVar("_Tree")
_RateState: TypeAlias = optax.EmptyState | optax.ScaleByScheduleState
AdamState: TypeAlias = tuple[optax.ScaleByAdamState, _RateState]


@dataclasses.dataclass(frozen=True)
class Adam:
    """Optimizer of one tree of float32 variables: ``optax.adam(rate, eps=eps)``.

    With ``decayed_over``, the rate decays to 0 along half a cosine over that many updates.
    """

    rate: float
    decayed_over: int | None = None
    eps: float = 1e-8
    b1: float = 0.9
    b2: float = 0.999

    def init(self, variables: _Tree) -> AdamState:
        """Returns the state before the first update."""
        zeros = lambda: jax.tree.map(jnp.zeros_like, variables)
        moments = optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros(), nu=zeros())
        rate = optax.EmptyState() if self.decayed_over is None else optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
        return moments, rate

    def update(self, gradients: _Tree, state: AdamState) -> tuple[_Tree, AdamState]:
        """Returns what to add to the variables, and the next state."""
        moments, rate = state
        mu = jax.tree.map(lambda g, m: (1 - self.b1) * g + self.b1 * m, gradients, moments.mu)
        nu = jax.tree.map(lambda g, v: (1 - self.b2) * jnp.square(g) + self.b2 * v, gradients, moments.nu)
        count = moments.count + 1

        def unbiased(moment: jax.Array, decay: float) -> jax.Array:
            # Not a division by a scalar, which XLA compiles differently for several devices than for one.
            return moment * reciprocal(1 - jax.lax.pow(jnp.float32(decay), count)).astype(moment.dtype)

        step = self._rate(rate)
        updates = jax.tree.map(
            lambda m, v: step.astype(m.dtype) * (unbiased(m, self.b1) / (jnp.sqrt(unbiased(v, self.b2)) + self.eps)), mu, nu
        )
        next_rate = rate if self.decayed_over is None else optax.ScaleByScheduleState(rate.count + 1)
        return updates, (optax.ScaleByAdamState(count=count, mu=mu, nu=nu), next_rate)

    def _rate(self, state: _RateState) -> jax.Array:
        """Returns the factor on the updates, () float32."""
        if self.decayed_over is None:
            return jnp.float32(-self.rate)
        count = jnp.minimum(state.count.astype(jnp.float32), self.decayed_over)
        return -(self.rate * (0.5 * (1 + jnp.cos(math.pi * count / self.decayed_over))))
