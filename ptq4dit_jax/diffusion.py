"""Samplers of diffusion and flow models as tables, and the sampling chain as one ``lax.scan``.

Every sampler here is, per step, a linear map of the current image, the predicted clean image and the previous prediction,

    x0 = x0_from_x * x - x0_from_eps * eps
    x' = from_x * x + from_x0 * x0 + from_x0_prev * x0_prev + sigma * z

so a sampler is a table of coefficients (:class:`StepTables`), made in float64 by :meth:`Sampler.tables` and scanned
over. DDPM with a learned variance interpolates ``log sigma^2`` between two more table columns. Sources: Ho et al. 2020,
Nichol & Dhariwal 2021 (learned range), Song et al. 2021 (DDIM, eta), Lu et al. 2022 (DPM-Solver++ 2M, midpoint).

Of a flow model the network's output is the velocity ``v``. With ``x0_from_x = 0`` and ``x0_from_eps = -1`` the table's ``x0``
is ``v`` itself, Euler's step is ``x + dt v``, and Heun's is two rows: Euler's, then at its end ``x' + dt / 2 (v' - v)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ptq4dit_jax.dit import DiTConfig, GuidedChannels, combine_guidance
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.schedules import FlowSchedule, Schedule, respace
from ptq4dit_jax.schedules import NoiseSchedule as NoiseSchedule

SamplerName = Literal["auto", "ddpm", "ddim", "dpm++2m", "euler", "heun"]
#: By what a model predicts; ``auto`` is the first.
SAMPLERS: dict[str, tuple[SamplerName, ...]] = {"noise": ("ddpm", "ddim", "dpm++2m"), "velocity": ("euler", "heun")}
#: What is used where neither the user nor the model says otherwise.
DEFAULT_STEPS, DEFAULT_GUIDANCE = 50, 1.5
#: Guidance beyond this is a slip: images are overdriven from 10 or 20 on, and float32 ends at 1e38.
MAX_GUIDANCE = 1000


@struct.dataclass
class StepTables:
    """Coefficients of a sampler in the order they are used, noisiest step first; every array is (S,).

    ``t`` is what the network sees: int32 timesteps of a noise schedule, float32 times of a flow. S is the number of calls of
    the network, for Heun twice the steps. ``log_var_min`` and ``log_var_max`` matter only where the variance is learned,
    ``sigma`` only where it is not.
    """

    t: Any
    x0_from_x: Any
    x0_from_eps: Any
    from_x: Any
    from_x0: Any
    from_x0_prev: Any
    sigma: Any
    log_var_min: Any
    log_var_max: Any
    not_last: Any

    @property
    def num_steps(self) -> int:
        return len(self.t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to walk from noise to image.

    The name ``auto`` means ddpm for a model that predicts noise, euler for one that predicts velocity. ``steps`` is a count or
    a respacing string (:func:`~ptq4dit_jax.schedules.respace`). A plain count N means Meta's even spacing for ``ddpm``,
    linspace for ``dpm++2m``, and for ``ddim`` "ddimN" where N divides the number of timesteps, else even spacing; ``euler`` and
    ``heun`` take N equal steps. None means the number that the model was imported for, or :data:`DEFAULT_STEPS` where any will
    do. ``eta`` is DDIM's noise (0 is deterministic).
    """

    name: SamplerName = "auto"
    steps: int | str | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in get_args(SamplerName):
            raise Ptq4ditError(f"Unknown sampler {self.name!r}; the samplers are {', '.join(get_args(SamplerName))}.")
        if not 0.0 <= self.eta <= 1.0:
            raise Ptq4ditError(f"DDIM eta must lie between 0 and 1, not {self.eta}.")

    def resolve(self, schedule: Schedule) -> Sampler:
        """The sampler that a model of this schedule is sampled with: ``auto`` becomes a name, and steps that are None a number.

        Raises:
          Ptq4ditError: the sampler follows something else than what the model predicts.
        """
        names = SAMPLERS[schedule.objective]
        if self.steps is None:
            fixed = schedule.steps if isinstance(schedule, FlowSchedule) else 0
            return dataclasses.replace(self, steps=fixed or DEFAULT_STEPS).resolve(schedule)
        if self.name == "auto":
            return dataclasses.replace(self, name=names[0])
        if self.name not in names:
            raise Ptq4ditError(
                f"The sampler {self.name!r} does not fit this model, which predicts {schedule.objective}; "
                f"use one of {', '.join(names)}."
            )
        if self.name == "heun" and isinstance(schedule, FlowSchedule) and schedule.steps:
            raise Ptq4ditError(
                "The sampler 'heun' needs velocities at a time, and this model predicts them over whole steps of "
                f"1/{schedule.steps}; use euler."
            )
        return self

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise, so that the chain needs a key or explicit step noise; not known of ``auto``."""
        if self.name == "auto":
            raise Ptq4ditError(
                "Whether the sampler 'auto' adds noise depends on the model; resolve it with the model's schedule."
            )
        return self.name == "ddpm" or (self.name == "ddim" and self.eta > 0)

    def timesteps(self, num_timesteps: int) -> np.ndarray:
        """Timesteps of the training schedule that the network sees, descending."""
        steps = DEFAULT_STEPS if self.steps is None else self.steps
        kept = respace(num_timesteps, steps)[::-1]
        count, plain = len(kept), not str(steps).strip().startswith("ddim")
        if plain and self.name == "dpm++2m":
            if count >= num_timesteps:
                raise Ptq4ditError(
                    f"dpm++2m takes at most {num_timesteps - 1} steps over {num_timesteps} timesteps, not {count}."
                )
            return np.linspace(0, num_timesteps - 1, count + 1).round()[::-1][:-1].astype(int)
        if plain and self.name == "ddim" and count > 1 and num_timesteps % count == 0:
            return respace(num_timesteps, f"ddim{count}")[::-1]
        return kept

    def tables(self, schedule: Schedule, *, dtype: Any = np.float32) -> StepTables:
        """Coefficient tables, computed in float64 and cast to ``dtype`` at the end."""
        walk = self.resolve(schedule)
        if isinstance(schedule, FlowSchedule):
            t, rows = _flow_rows(schedule.times(cast(Any, walk.steps)), corrected=walk.name == "heun")
        else:
            t = walk.timesteps(schedule.num_timesteps)
            abar = schedule.alpha_bars[t]
            make = {"ddpm": _ddpm_rows, "ddim": _ddim_rows, "dpm++2m": _dpmpp_rows}[walk.name]
            rows = {"x0_from_x": np.sqrt(1 / abar), "x0_from_eps": np.sqrt(1 / abar - 1)}
            rows |= make(abar, np.append(abar[1:], 1.0), walk.eta)
        idle = dict.fromkeys(("from_x0_prev", "sigma", "log_var_min", "log_var_max"), np.zeros(len(t)))
        rows = {**idle, "not_last": np.append(np.ones(len(t) - 1), 0.0), **rows}
        return StepTables(t=t.astype(schedule.time_dtype), **{name: row.astype(dtype) for name, row in rows.items()})


def _ddpm_rows(abar: np.ndarray, abar_prev: np.ndarray, eta: float) -> dict[str, np.ndarray]:
    alpha = abar / abar_prev
    beta = 1 - alpha
    variance = beta * (1 - abar_prev) / (1 - abar)
    # The last step's posterior variance is 0; its logarithm is replaced by that of the step before (Meta's clipping).
    clipped = np.append(variance[:-1], variance[-2] if len(variance) > 1 else beta[-1])
    return {
        "from_x": (1 - abar_prev) * np.sqrt(alpha) / (1 - abar),
        "from_x0": beta * np.sqrt(abar_prev) / (1 - abar),
        "sigma": np.sqrt(clipped),
        "log_var_min": np.log(clipped),
        "log_var_max": np.log(beta),
    }


def _ddim_rows(abar: np.ndarray, abar_prev: np.ndarray, eta: float) -> dict[str, np.ndarray]:
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)
    direction = np.sqrt(1 - abar_prev - sigma**2)
    eps_from_x, eps_from_x0 = np.sqrt(1 / (1 - abar)), np.sqrt(abar / (1 - abar))
    return {
        "from_x": direction * eps_from_x,
        "from_x0": np.sqrt(abar_prev) - direction * eps_from_x0,
        "sigma": sigma,
    }


def _dpmpp_rows(abar: np.ndarray, abar_prev: np.ndarray, eta: float) -> dict[str, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = 0.5 * np.log(abar / (1 - abar))
        h = 0.5 * np.log(abar_prev / (1 - abar_prev)) - log_snr  # infinite at the last step, which returns x0
        gain = -np.sqrt(abar_prev) * np.expm1(-h)
        slope = h / (2 * np.append(np.nan, h[:-1]))  # 1 / (2 r) with r = h_prev / h
    slope[0] = slope[-1] = 0.0  # first order where there is no previous prediction, and at the end
    return {
        "from_x": np.sqrt((1 - abar_prev) / (1 - abar)),
        "from_x0": gain * (1 + slope),
        "from_x0_prev": -gain * slope,
    }


def _flow_rows(times: np.ndarray, *, corrected: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Euler's method along ``times`` (N + 1,): N rows, or 2 N with Heun's correction after each."""
    t, dt = times[:-1], np.diff(times)
    from_v, from_v_prev = dt, np.zeros_like(dt)
    if corrected:
        t = np.stack([times[:-1], times[1:]], axis=1).ravel()
        from_v = np.stack([dt, dt / 2], axis=1).ravel()
        from_v_prev = np.stack([np.zeros_like(dt), -dt / 2], axis=1).ravel()
    ones = np.ones_like(t)
    return t, {
        "x0_from_x": 0 * ones,
        "x0_from_eps": -ones,
        "from_x": ones,
        "from_x0": from_v,
        "from_x0_prev": from_v_prev,
    }


#: Image, previous prediction of the clean image, kept inputs.
_Carry = tuple[jax.Array, jax.Array, jax.Array]


class Network(Protocol):
    """What a sampler needs of a model, float or quantized: a pytree with the raw network output as ``apply``."""

    config: DiTConfig
    schedule: Schedule

    def apply(self, x_BHWC: jax.Array, t_B: jax.Array, y_B: jax.Array) -> jax.Array: ...


def check_guidance(cfg_scale: float) -> None:
    """Raises where a scale of guidance is no number, or one that no sample survives."""
    if not -MAX_GUIDANCE <= cfg_scale <= MAX_GUIDANCE:
        raise Ptq4ditError(f"cfg_scale must be a finite number of at most {MAX_GUIDANCE} either way, not {cfg_scale}.")


def resolve_guidance(cfg_scale: float | None, config: DiTConfig, schedule: Schedule) -> float:
    """The scale of guidance that a model is sampled with; 1 is none.

    None becomes 1 for a model without a null class or one that was trained to be guided already, and otherwise
    :data:`DEFAULT_GUIDANCE`.

    Raises:
      Ptq4ditError: a scale that is no finite number, or guidance of a model without a null class.
    """
    if cfg_scale is None:
        trained = isinstance(schedule, FlowSchedule) and schedule.guided
        return DEFAULT_GUIDANCE if config.null_class and not trained else 1.0
    check_guidance(cfg_scale)
    if cfg_scale != 1.0:
        _ = config.null_label  # raises where guidance is impossible
    return float(cfg_scale)


def guided_apply(
    model: Network, x: jax.Array, t: jax.Array, y: jax.Array, cfg_scale: jax.Array | float, channels: GuidedChannels = "first3"
) -> jax.Array:
    """Raw output under classifier-free guidance: one call on the rows and their null twins, (B, H, W, out_channels).

    ``t`` is (B,), or (1,) where all rows share it.
    """
    labels = jnp.concatenate([y, jnp.full_like(y, model.config.null_label)])
    out = model.apply(jnp.concatenate([x, x]), t if t.shape[0] == 1 else jnp.concatenate([t, t]), labels)
    conditional, unconditional = jnp.split(out, 2)
    return combine_guidance(conditional, unconditional, cfg_scale, model.config.in_channels, channels)


def sample_keys(key: jax.Array, indices_B: jax.Array) -> jax.Array:
    """One key per sample, (B,), from the seed and the sample's global index."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices_B)


def sample_noise(keys_B: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (B, *shape), float32, that depends on each sample's key and the step only.

    Step 0 is the initial noise; step ``i + 1`` is what step ``i`` of the chain adds.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys_B)


def denoise(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    tables: StepTables,
    x_T: jax.Array,
    step_noise: Callable[[jax.Array], jax.Array] | None,
    *,
    learned_variance: bool,
    keep_slots: jax.Array | None = None,
    num_kept: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Runs the chain: one scan over the steps.

    Args:
      predict: ``(x (B, H, W, C), t ()) -> raw output (B, H, W, C or 2C)``.
      tables: the sampler's coefficients, S steps.
      x_T: initial noise (B, H, W, C).
      step_noise: ``step () -> (B, H, W, C)``, or None for a deterministic sampler.
      learned_variance: whether the second half of the channels interpolates the log variance (DDPM only).
      keep_slots: (S,) int32; where it is below ``num_kept``, the *input* of that step is stored in that slot.

    Returns:
      The sample (B, H, W, C) and the kept inputs (num_kept, B, H, W, C).
    """
    channels = x_T.shape[-1]

    def step(carry: _Carry, row: tuple[StepTables, jax.Array, jax.Array]) -> tuple[_Carry, None]:
        x, x0_prev, kept = carry
        table, index, slot = row
        if num_kept:
            kept = kept.at[slot].set(x, mode="drop")
        out = predict(x, table.t).astype(x.dtype)
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
