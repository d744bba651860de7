"""The settings of sampling as a value, and the chain from noise to image as one ``lax.scan`` over a sampler's tables."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import DTypeLike

from ptq4dit_jax import samplers
from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.guidance import Guidance, ResolvedGuidance, as_number
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.numerics import AnyKey
from ptq4dit_jax.samplers import AUTO, AnyTables, Sampler, StepTables, check_name, sampler_for
from ptq4dit_jax.schedules import Schedule
from ptq4dit_jax.settings import changed, section, setting

#: The number of steps if neither the user nor the model sets one.
DEFAULT_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to get from noise to image: the sampler, its steps and its guidance.

    Attributes:
      sampler: a name in :data:`ptq4dit_jax.samplers.SAMPLERS`; ``auto`` is ddpm for a model that predicts noise, and euler for
        one that predicts velocity.
      steps: a count or a respacing string (:func:`~ptq4dit_jax.schedules.respace`). A plain count N means Meta's even spacing
        for ``ddpm`` and linspace for ``dpm++2m``. For ``ddim`` it means "ddimN" if N divides the number of timesteps, else even
        spacing. ``euler`` and ``heun`` take N equal steps. None means the number that the model was imported for, or
        :data:`DEFAULT_STEPS` if it takes any number.
      eta: noise of DDIM, 0 (deterministic) to 1.
      guidance: its scale, channels and interval.

    Raises:
      Ptq4ditError: the sampler is unknown, steps are neither a count nor a text, eta is out of range, or ``guidance`` is not a
        :class:`Guidance`.
    """

    sampler: str = setting(AUTO, samplers.help_on_names())
    steps: int | str | None = setting(
        None, samplers.help_on_steps(), shown=f"the model's own number if it has one, else {DEFAULT_STEPS}"
    )
    eta: float = setting(0.0, samplers.help_on_eta())
    guidance: Guidance = section(Guidance())

    def __post_init__(self) -> None:
        check_name(self.sampler)
        if self.steps is not None and (isinstance(self.steps, bool) or not isinstance(self.steps, (str, numbers.Integral))):
            raise Ptq4ditError(
                f"Sampler steps must be a whole number, or a text such as 'ddim50', not {quoted(self.steps)}; leave them out "
                "for the model's own."
            )
        if not 0.0 <= as_number(self.eta) <= 1.0:
            raise Ptq4ditError(f"DDIM eta must lie between 0 and 1, not {quoted(self.eta)}.")
        if not isinstance(self.guidance, Guidance):
            raise Ptq4ditError(
                f"The guidance of a Sampling must be a Guidance, such as Guidance(1.5), not {quoted(self.guidance)}."
            )

    @classmethod
    def of(cls, **settings: object) -> Sampling:
        """Builds a sampling from single settings by their flat names, as in :meth:`ResolvedSampling.to_dict` and in options."""
        return changed(cls(), settings)

    def resolve(self, schedule: Schedule, network: DiTConfig) -> ResolvedSampling:
        """Returns the sampling of a model of this schedule and shape, with everything that depends on the model filled in.

        Raises:
          Ptq4ditError: the sampler does not fit what the model predicts, or the model cannot be guided.
        """
        return ResolvedSampling(
            sampler=sampler_for(self.sampler, schedule),
            steps=(schedule.steps or DEFAULT_STEPS) if self.steps is None else self.steps,
            eta=self.eta,
            guidance=self.guidance.resolve(schedule, network),
            schedule=schedule,
        )


def chosen_sampling(sampling: Sampling | None, settings: Mapping[str, object], default: Sampling = Sampling()) -> Sampling:
    """Returns how a caller asks to sample: ``sampling``, or ``default`` with those ``settings`` changed that are not None.

    Raises:
      Ptq4ditError: both are given.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if sampling is not None and settings:
        raise Ptq4ditError(f"The argument sampling says how to sample already; leave out {', '.join(settings)}, or sampling.")
    return changed(default, settings) if sampling is None else sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedSampling:
    """A :class:`Sampling` of one model, with the sampler itself, its steps and the scale of guidance filled in."""

    sampler: Sampler
    steps: int | str
    eta: float
    guidance: ResolvedGuidance
    schedule: Schedule

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise, so that the chain needs a key or explicit step noise."""
        return self.sampler.stochastic(self.eta)

    def tables(self, *, dtype: DTypeLike = np.float32) -> StepTables[np.ndarray]:
        """Returns coefficient tables with the scale of guidance at every call of the network.

        Raises:
          Ptq4ditError: the schedule does not have these steps.
        """
        tables = self.sampler.tables(self.schedule, self.steps, self.eta, dtype=dtype)
        # All calls of a step are guided alike, depending on the time at which the step begins, as in REPA's code.
        calls = self.sampler.calls_per_step
        begins = self.schedule.relative_time(np.repeat(tables.t[::calls], calls))
        return dataclasses.replace(tables, guidance=self.guidance.scales(begins).astype(dtype))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings by the names of their options; the interval is None if every step is guided."""
        return {
            "sampler": self.sampler.name,
            "steps": self.steps,
            "eta": self.eta,
            "cfg_scale": self.guidance.scale,
            "cfg_channels": self.guidance.channels,
            "guidance_interval": self.guidance.interval,
        }

    def __str__(self) -> str:
        """Returns a text such as "ddpm, 50 steps, guidance 1.5"."""
        return f"{self.sampler.name}, {'1 step' if str(self.steps) == '1' else f'{self.steps} steps'}, {self.guidance}"


#: Image, previous prediction of the clean image, kept inputs.
_Carry = tuple[jax.Array, jax.Array, jax.Array]


def sample_keys(key: AnyKey, indices_B: jax.Array) -> jax.Array:
    """Returns one key per sample, (B,), from the seed and the sample's global index."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices_B)


def sample_noise(keys_B: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Draws standard normal noise (B, *shape), float32, that depends only on each sample's key and the step.

    Step 0 is the initial noise; step ``i + 1`` is what step ``i`` of the chain adds.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys_B)


def denoise(
    predict: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    tables: AnyTables,
    x_T: jax.Array,
    step_noise: Callable[[jax.Array], jax.Array] | None,
    *,
    learned_variance: bool,
    keep_slots: ArrayLike | None = None,
    num_kept: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Runs the chain: one scan over the steps.

    Args:
      predict: ``(x (B, H, W, C), t (), scale of guidance ()) -> raw output (B, H, W, C or 2C)``.
      tables: the sampler's coefficients, S steps.
      x_T: initial noise (B, H, W, C).
      step_noise: ``step () -> (B, H, W, C)``, or None for a deterministic sampler.
      learned_variance: whether the second half of the channels interpolates the log variance (DDPM only).
      keep_slots: (S,) int32, the slot in which the *input* of each step is stored; from ``num_kept`` on, it is not stored.

    Returns:
      The sample (B, H, W, C) and the kept inputs (num_kept, B, H, W, C).
    """
    channels = x_T.shape[-1]

    def step(carry: _Carry, row: tuple[StepTables[jax.Array], jax.Array, ArrayLike]) -> tuple[_Carry, None]:
        x, x0_prev, kept = carry
        table, index, slot = row
        if num_kept:
            kept = kept.at[slot].set(x, mode="drop")
        out = predict(x, table.t, table.guidance).astype(x.dtype)
        x0 = table.x0_from_x * x - table.x0_from_eps * out[..., :channels]
        new = table.from_x * x + table.from_x0 * x0 + table.from_x0_prev * x0_prev
        if step_noise is not None:
            sigma = table.sigma
            if learned_variance:
                fraction = (out[..., channels:] + 1) / 2
                sigma = jnp.exp(0.5 * (fraction * table.log_var_max + (1 - fraction) * table.log_var_min))
            new = new + table.not_last * sigma * step_noise(index).astype(x.dtype)
        return (new, x0, kept), None

    num_steps = tables.num_steps
    slots = jnp.full((num_steps,), num_kept, jnp.int32) if keep_slots is None else keep_slots
    kept = jnp.zeros((num_kept, *x_T.shape), x_T.dtype)
    carry = (x_T, jnp.zeros_like(x_T), kept)
    rows = (jax.tree.map(jnp.asarray, tables), jnp.arange(num_steps, dtype=jnp.int32), slots)
    (x, _, kept), _ = jax.lax.scan(step, carry, rows)
    return x, kept
