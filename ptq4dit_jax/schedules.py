"""What a network was trained to predict, and over which time: noise along a Gaussian schedule, or the velocity of a flow.

A model holds one of the two as its ``schedule``; the samplers in :mod:`ptq4dit_jax.samplers` follow it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.edges import quoted, shown, whole_number
from ptq4dit_jax.errors import Ptq4ditError

_Time = TypeVar("_Time", jax.Array, np.ndarray)
#: A flow has no training timesteps to choose from. This bounds the tables that a mistyped count would allocate.
_MAX_FLOW_STEPS = 10_000
#: Noise schedules have a thousand timesteps, or sometimes four thousand.
MAX_TIMESTEPS = 100_000
#: The least squared signal at the end of a schedule. Below it, float32 cannot hold the coefficients of samplers.
_LEAST_SIGNAL = 1e-60


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The linear schedule that a model was trained with. Tables are float64 NumPy arrays of length ``num_timesteps``."""

    objective: ClassVar[str] = "noise"
    time_dtype: ClassVar[Any] = np.int32
    #: As in :class:`FlowSchedule`: any number of steps is possible, and training included no guidance.
    steps: ClassVar[int] = 0
    guided: ClassVar[bool] = False

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if type(self.num_timesteps) is not int or not 1 <= self.num_timesteps <= MAX_TIMESTEPS:
            raise Ptq4ditError(f"A noise schedule must have 1 to {MAX_TIMESTEPS} timesteps, not {shown(self.num_timesteps)}.")
        for name in ("beta_start", "beta_end"):
            if not isinstance(value := getattr(self, name), (int, float)) or not 0 < value < 1:
                raise Ptq4ditError(f"The {name} of a noise schedule must lie between 0 and 1, not {shown(value)}.")
        if (left := self.alpha_bars[-1]) < _LEAST_SIGNAL:
            raise Ptq4ditError(
                f"A noise schedule of {self.num_timesteps} timesteps and betas from {self.beta_start:g} to {self.beta_end:g} "
                f"leaves {left:.0e} of the squared signal, and at least {_LEAST_SIGNAL:.0e} must be left; take fewer timesteps "
                "or smaller betas."
            )

    @property
    def betas(self) -> np.ndarray:
        return np.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=np.float64)

    @property
    def alpha_bars(self) -> np.ndarray:
        """Cumulative products of ``1 - beta``: the squared signal level after each step."""
        return np.cumprod(1.0 - self.betas)

    def add_noise(self, x0: jax.Array, t_B: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns ``sqrt(abar_t) x0 + sqrt(1 - abar_t) noise``, a draw from q(x_t | x_0)."""
        abar = jnp.asarray(self.alpha_bars, jnp.float32)[t_B].reshape(-1, *[1] * (x0.ndim - 1))
        return jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * noise

    def noise_level(self, t: _Time) -> _Time:
        """Returns a level that falls along a chain: the timestep itself."""
        return t

    def relative_time(self, t: np.ndarray) -> np.ndarray:
        """Returns times from 0 (data) towards 1 (noise), float64: the timestep over the number of timesteps."""
        return np.asarray(t, np.float64) / self.num_timesteps

    def check_times(self, t: np.ndarray) -> None:
        """Raises unless ``t`` are timesteps of this schedule."""
        if not np.issubdtype(t.dtype, np.integer) or t.min() < 0 or t.max() >= self.num_timesteps:
            raise Ptq4ditError(
                f"Calibration timesteps t must be integers from 0 to {self.num_timesteps - 1}, not {t.ravel()[:3]}..."
            )

    def describe(self) -> str:
        return self.objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """A straight flow between noise and data over time 0 to 1. The model predicts its velocity ``dx / dt``.

    Attributes:
      data_time: the time at which x is data, 0 or 1; at the other, x is noise. The network sees t on this axis.
      steps: the number of equal steps for which a network with a fixed step size was imported; 0 if it takes any number.
      guided: whether the network was trained to predict the guided velocity, so that further guidance is off by default.
    """

    objective: ClassVar[str] = "velocity"
    time_dtype: ClassVar[Any] = np.float32

    data_time: int = 1
    steps: int = 0
    guided: bool = False

    def __post_init__(self) -> None:
        if self.data_time not in (0, 1):
            raise Ptq4ditError(f"The data_time of a flow must be 0 or 1, not {shown(self.data_time)}.")
        if type(self.steps) is not int or not 0 <= self.steps <= _MAX_FLOW_STEPS:
            raise Ptq4ditError(f"The steps of a flow must be 0 (any number) to {_MAX_FLOW_STEPS}, not {shown(self.steps)}.")

    def times(self, steps: int | str) -> np.ndarray:
        """Returns the ends of ``steps`` equal steps from noise to data, (steps + 1,) float64."""
        text = str(steps).strip()
        count = whole_number(text)
        if count is None or not 1 <= count <= _MAX_FLOW_STEPS:
            raise Ptq4ditError(f"Sampler steps of a flow must be 1 to {_MAX_FLOW_STEPS}, not {quoted(text, 40)}.")
        if self.steps not in (0, count):
            raise Ptq4ditError(
                f"This model was imported for {self.steps} steps and takes no other number; use {self.steps}, or import it "
                f"again with flow_steps (ptq4dit convert --flow-steps) {text}."
            )
        level = np.arange(count, -1, -1) / count
        return np.abs(self.data_time - level)

    def add_noise(self, x0: jax.Array, t_B: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns ``(1 - s) x0 + s noise`` with the noise level s at time t: the flow's straight line between the two."""
        level = self.noise_level(t_B).reshape(-1, *[1] * (x0.ndim - 1))
        return (1 - level) * x0 + level * noise

    def noise_level(self, t: _Time) -> _Time:
        """Returns a level that falls along a chain, from 1 to 0: the share of noise in x."""
        return 1 - t if self.data_time else t

    def relative_time(self, t: np.ndarray) -> np.ndarray:
        """Returns times from 0 (data) to 1 (noise), float64, whichever way the flow's own time runs: the share of noise in
        x."""
        return self.noise_level(np.asarray(t, np.float64))

    def check_times(self, t: np.ndarray) -> None:
        """Raises unless ``t`` are times of this flow."""
        if not np.issubdtype(t.dtype, np.number) or not ((t >= 0) & (t <= 1)).all():
            raise Ptq4ditError(f"Calibration times t of a flow model must lie between 0 and 1, not {t.ravel()[:3]}...")

    def describe(self) -> str:
        steps = "" if not self.steps else ", 1 step" if self.steps == 1 else f", {self.steps} steps"
        return f"{self.objective}, data at t = {self.data_time}{steps}" + (", guided by training" if self.guided else "")


Schedule: TypeAlias = NoiseSchedule | FlowSchedule


def respace(num_timesteps: int, steps: int | str) -> np.ndarray:
    """Returns the timesteps that are kept, ascending.

    ``N`` (or ``"N"``) spreads N steps evenly from 0 to the last timestep, rounding half to even. ``"ddimN"`` takes the first
    stride that gives exactly N steps from 0. Both are Meta's rules.
    """
    spec = str(steps).strip()
    count = whole_number(spec.removeprefix("ddim"))
    if count is None or not 1 <= count <= num_timesteps:
        raise Ptq4ditError(f"Sampler steps must be 1 to {num_timesteps}, or 'ddimN' with such an N, not {quoted(spec, 40)}.")
    if spec.startswith("ddim"):
        for hop in range(1, num_timesteps):
            kept = np.arange(0, num_timesteps, hop)
            if len(kept) == count:
                return kept
        raise Ptq4ditError(f"No stride over {num_timesteps} timesteps gives exactly {count} steps; use '{count}' instead.")
    stride = (num_timesteps - 1) / (count - 1) if count > 1 else 1.0
    # Meta sums up the stride instead of multiplying it. That rounds differently for some N, and it is what models saw.
    return np.cumsum([0.0] + [stride] * (count - 1)).round().astype(int)
