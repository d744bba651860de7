"""Classifier-free guidance as a value: its strength, its channels, and the times of the chain at which it applies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer, Num

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.numerics import at_least_float32
from ptq4dit_jax.schedules import Schedule
from ptq4dit_jax.settings import numbers, setting

GuidedChannels = Literal["first3", "all"]
#: The scale for a model that can be guided and was not trained with guidance.
DEFAULT_SCALE = 1.5
#: Guidance beyond this is a typing error: images are overdriven from 10 or 20 on, and float32 ends at 1e38.
MAX_GUIDANCE = 1000
#: A time this close to an end of the interval counts as inside, because the network's times are float32.
_END = 1e-6


class Predictor(Protocol):
    """What a sampler needs from a model, float or quantized: a pytree whose ``apply`` returns the raw network output."""

    @property
    def config(self) -> DiTConfig: ...

    @property
    def schedule(self) -> Schedule: ...

    def apply(
        self, x_BHWC: Float[Array, "B H W C"], t_B: Num[Array, " #B"], y_B: Integer[Array, " #B"]
    ) -> Float[Array, "B H W outputs"]: ...


def as_number(value: Any) -> float:
    """Returns a setting as a float; NaN if it is not a number."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the prediction is ``u + scale (c - u)`` of the conditional ``c`` and the unconditional ``u``.

    Attributes:
      scale: 1 means no guidance and halves the work. None follows the model: :data:`DEFAULT_SCALE`, or 1 for a model without a
        null class or one that was trained with guidance.
      channels: ``first3`` guides channels 0 to 2 only, as Meta's code does; ``all`` guides every channel except the variance.
      interval: ``(low, high)``, both included. Only the steps that begin at a time inside it are guided; the others take the
        conditional prediction (Kynkaanniemi et al. 2024). Time runs from 1 (noise) to 0 (data)
        (:meth:`relative_time <ptq4dit_jax.schedules.NoiseSchedule.relative_time>`). In a flow it is the share of noise in x,
        which SiT and REPA call t; in a noise schedule, the timestep over the number of timesteps. None guides every step.

    Raises:
      Ptq4ditError: the scale is not a number of at most :data:`MAX_GUIDANCE` either way, the channels have another name, or the
        interval does not lie within 0 to 1.
    """

    scale: float | None = setting(
        None,
        "Classifier-free guidance; 1 turns it off.",
        name="cfg_scale",
        shown=f"{DEFAULT_SCALE}, or 1 without a null class or where training has guided the model",
    )
    channels: GuidedChannels = setting(
        "first3", "Guide the first3 channels, as Meta's code and SiT do, or all.", name="cfg_channels"
    )
    interval: tuple[float, float] | None = setting(
        None,
        "Guide only the steps that begin in this interval of time, which runs from 1 (noise) to 0 (data): in a flow the "
        "share of noise, else the timestep over their number.",
        name="guidance_interval",
        shown="all steps",
        metavar="LOW,HIGH",
        read=numbers("--guidance-interval", "0,0.7"),
    )

    def __post_init__(self) -> None:
        if self.scale is not None:
            scale = as_number(self.scale)
            if not -MAX_GUIDANCE <= scale <= MAX_GUIDANCE:
                raise Ptq4ditError(
                    f"The scale of guidance (cfg_scale) must be a finite number of at most {MAX_GUIDANCE} either way, "
                    f"not {quoted(self.scale)}."
                )
            object.__setattr__(self, "scale", scale)
        if self.channels not in get_args(GuidedChannels):
            raise Ptq4ditError(
                f"The guided channels (cfg_channels) must be one of {', '.join(get_args(GuidedChannels))}, "
                f"not {quoted(self.channels)}."
            )
        if self.interval is not None:
            object.__setattr__(self, "interval", _checked_interval(self.interval))

    def resolve(self, schedule: Schedule, network: DiTConfig) -> ResolvedGuidance:
        """Returns the guidance for sampling a model of this schedule and shape.

        Raises:
          Ptq4ditError: the model has no null class, so it cannot be guided.
        """
        scale = self.scale
        if scale is None:
            scale = DEFAULT_SCALE if network.null_class and not schedule.guided else 1.0
        if scale != 1.0:
            _ = network.null_label  # raises if guidance is impossible
        return ResolvedGuidance(scale, self.channels, self.interval)


def _checked_interval(interval: object) -> tuple[float, float]:
    ends = tuple(as_number(end) for end in interval) if isinstance(interval, (tuple, list)) else ()
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
        given = ", ".join(map(quoted, interval)) if isinstance(interval, (tuple, list)) else quoted(interval)
        raise Ptq4ditError(
            "The interval of guidance (guidance_interval) must be two numbers LOW,HIGH with 0 <= LOW <= HIGH <= 1, where 1 is "
            f"noise and 0 data, not {given}."
        )
    return ends[0], ends[1]


@dataclasses.dataclass(frozen=True)
class ResolvedGuidance:
    """The guidance of one model: a :class:`Guidance` whose scale is a number."""

    scale: float
    channels: GuidedChannels
    interval: tuple[float, float] | None = None

    @property
    def guided(self) -> GuidedChannels | None:
        """The guided channels; None if the network receives conditional rows only."""
        return None if self.scale == 1.0 else self.channels

    def scales(self, times: np.ndarray) -> np.ndarray:
        """Returns the scale at each of the relative ``times`` (S,), float64 (S,): 1 outside the interval."""
        inside = np.ones(np.shape(times), bool)
        if self.interval is not None:
            low, high = self.interval
            inside = (times >= low - _END) & (times <= high + _END)
        return np.where(inside, self.scale, 1.0)

    def __str__(self) -> str:
        """Returns a text such as "guidance 1.5 from time 0.7 to 0"."""
        if self.guided is None:
            return "no guidance"
        where = "" if self.interval is None else f" from time {self.interval[1]:g} to {self.interval[0]:g}"
        return f"guidance {self.scale:g}{where}"


def combine_guidance(
    conditional: jax.Array, unconditional: jax.Array, scale: ArrayLike, in_channels: int, channels: GuidedChannels
) -> jax.Array:
    """Applies classifier-free guidance ``u + scale (c - u)`` to the predicted channels of raw outputs (B, H, W, out_channels).

    ``first3`` guides channels 0..2 only, as Meta's code does; every other channel is the conditional row's. ``all`` guides all
    predicted channels, as most other code does. Variance channels are never guided. The result is in float32 at least.
    """
    guided = in_channels if channels == "all" else min(3, in_channels)
    dtype = at_least_float32(conditional.dtype)
    difference = (conditional[..., :guided] - unconditional[..., :guided]).astype(dtype)
    eps = unconditional[..., :guided].astype(dtype) + jnp.asarray(scale, dtype) * difference
    return jnp.concatenate([eps, conditional[..., guided:].astype(dtype)], axis=-1)


def predict(
    network: Predictor,
    x: Float[Array, "B H W C"],
    t: Num[Array, " #B"],
    y: Integer[Array, " B"],
    scale: Float[ArrayLike, ""] = 1.0,
    guided: GuidedChannels | None = None,
) -> Float[Array, "B H W outputs"]:
    """Returns the raw output of a network (B, H, W, out_channels), guided on the channels ``guided``; None means no guidance.

    Args:
      network: a float or quantized model.
      x: (B, H, W, C) inputs.
      t: times (B,), or (1,) if all rows share one.
      y: (B,) labels.
      scale: () scale of guidance; not used without guidance.
      guided: the channels to guide, by one call on the rows and their twins without labels.
    """
    if guided is None:
        return network.apply(x, t, y)
    labels = jnp.concatenate([y, jnp.full_like(y, network.config.null_label)])
    out = network.apply(jnp.concatenate([x, x]), t if t.shape[0] == 1 else jnp.concatenate([t, t]), labels)
    conditional, unconditional = jnp.split(out, 2)
    return combine_guidance(conditional, unconditional, scale, network.config.in_channels, guided)
