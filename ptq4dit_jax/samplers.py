"""Samplers as tables of coefficients, each an entry of one registry.

Every sampler here is, per step, a linear map of the current image, the predicted clean image and the previous prediction,

    x0 = x0_from_x * x - x0_from_eps * eps
    x' = from_x * x + from_x0 * x0 + from_x0_prev * x0_prev + sigma * z

so a sampler is a table of coefficients (:class:`StepTables`), computed in float64 by :meth:`Sampler.tables` and scanned
over. DDPM with a learned variance interpolates ``log sigma^2`` between two more table columns. Sources: Ho et al. 2020,
Nichol & Dhariwal 2021 (learned range), Song et al. 2021 (DDIM, eta), Lu et al. 2022 (DPM-Solver++ 2M, midpoint).

In a flow model, the network's output is the velocity ``v``. With ``x0_from_x = 0`` and ``x0_from_eps = -1``, the table's ``x0``
is ``v`` itself. Euler's step is ``x + dt v``, and Heun's is two rows: Euler's, then at its end ``x' + dt / 2 (v' - v)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import numpy as np
from flax import struct
from jaxtyping import Float, Num
from numpy.typing import DTypeLike

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule, Schedule, respace

#: The times of a chain (S,) and the columns (S,) of its :class:`StepTables` that differ from their default.
_Rows: TypeAlias = tuple[np.ndarray, dict[str, np.ndarray]]
#: The name that stands for the first sampler that fits what a model predicts.
AUTO = "auto"


#: An array of NumPy or JAX.
_Column = TypeVar("_Column", bound=np.ndarray | jax.Array)


class StepTables(struct.PyTreeNode, Generic[_Column]):
    """Coefficients of a sampler in the order in which they are used, noisiest step first; every array is (S,).

    ``t`` is what the network sees: int32 timesteps of a noise schedule, float32 times of a flow. S is the number of calls of
    the network, for Heun twice the number of steps. ``log_var_min`` and ``log_var_max`` matter only if the variance is learned,
    ``sigma`` only if it is not. ``guidance`` is the scale of guidance, 1 where there is none.
    """

    t: Num[_Column, "*S"]
    x0_from_x: Float[_Column, "*S"]
    x0_from_eps: Float[_Column, "*S"]
    from_x: Float[_Column, "*S"]
    from_x0: Float[_Column, "*S"]
    from_x0_prev: Float[_Column, "*S"]
    sigma: Float[_Column, "*S"]
    log_var_min: Float[_Column, "*S"]
    log_var_max: Float[_Column, "*S"]
    not_last: Float[_Column, "*S"]
    guidance: Float[_Column, "*S"]

    @property
    def num_steps(self) -> int:
        return len(self.t)


#: Tables on the host or on devices.
AnyTables: TypeAlias = StepTables[np.ndarray] | StepTables[jax.Array]


def _never(eta: float) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One way from noise to image; an entry of :data:`SAMPLERS`.

    Attributes:
      name: what users call it.
      objective: what the model must predict, as its schedule says.
      spacing: maps a schedule and steps (a count or a respacing string) to the points of the chain, noisiest first.
      rows: maps a schedule, those points and eta to the network's times (S,) and the table columns (S,), float64.
      stochastic: returns for an eta whether steps add noise, so that the chain needs a key or explicit step noise.
      learned_variance: whether it uses the variance that a model predicts.
      calls_per_step: calls of the network per step; each is a row of the tables.
    """

    name: str
    objective: str
    spacing: Callable[[Any, int | str], np.ndarray]
    rows: Callable[[Any, np.ndarray, float], _Rows]
    stochastic: Callable[[float], bool] = _never
    learned_variance: bool = False
    calls_per_step: int = 1

    def check_fits(self, schedule: Schedule) -> None:
        """Raises if the sampler does not fit what a model of this schedule predicts."""
        fitting = _names(schedule.objective)
        if self.objective != schedule.objective:
            raise Ptq4ditError(
                f"The sampler {self.name!r} does not fit this model, which predicts {schedule.objective}; "
                f"use one of {', '.join(fitting)}."
            )
        if self.calls_per_step > 1 and schedule.steps:
            raise Ptq4ditError(
                f"The sampler {self.name!r} needs velocities at a time, and this model predicts them over whole steps of "
                f"1/{schedule.steps}; use {fitting[0]}."
            )

    def tables(
        self, schedule: Schedule, steps: int | str, eta: float = 0.0, *, dtype: DTypeLike = np.float32
    ) -> StepTables[np.ndarray]:
        """Returns coefficient tables without guidance, computed in float64 and cast to ``dtype`` at the end.

        Raises:
          Ptq4ditError: the sampler does not fit the schedule, or the schedule does not have these steps.
        """
        self.check_fits(schedule)
        t, rows = self.rows(schedule, self.spacing(schedule, steps), eta)
        idle = dict.fromkeys(("from_x0_prev", "sigma", "log_var_min", "log_var_max"), np.zeros(len(t)))
        rows = {**idle, "not_last": np.append(np.ones(len(t) - 1), 0.0), "guidance": np.ones(len(t)), **rows}
        return StepTables(t=t.astype(schedule.time_dtype), **{name: row.astype(dtype) for name, row in rows.items()})


# Spacings --------------------------------------------------------------------------------------------


def _even(schedule: NoiseSchedule, steps: int | str) -> np.ndarray:
    """Returns Meta's even spacing, or the respacing that ``steps`` names."""
    return respace(schedule.num_timesteps, steps)[::-1]


def _strided(schedule: NoiseSchedule, steps: int | str) -> np.ndarray:
    """Treats a plain count N as "ddimN" if N divides the number of timesteps, else as even spacing."""
    kept = _even(schedule, steps)
    if not _names_spacing(steps) and len(kept) > 1 and schedule.num_timesteps % len(kept) == 0:
        return _even(schedule, f"ddim{len(kept)}")
    return kept


def _linspace(schedule: NoiseSchedule, steps: int | str) -> np.ndarray:
    """Maps a plain count N to the first N of N + 1 points from the last timestep to 0, as dpm++2m takes them."""
    kept, last = _even(schedule, steps), schedule.num_timesteps - 1
    if _names_spacing(steps):
        return kept
    if len(kept) > last:
        raise Ptq4ditError(f"dpm++2m takes at most {last} steps over {last + 1} timesteps, not {len(kept)}.")
    return np.linspace(0, last, len(kept) + 1).round()[::-1][:-1].astype(int)


def _names_spacing(steps: int | str) -> bool:
    return str(steps).strip().startswith("ddim")


def _equal_steps(schedule: FlowSchedule, steps: int | str) -> np.ndarray:
    return schedule.times(steps)


# Rows ------------------------------------------------------------------------------------------------


def _following_noise(columns: Callable[[np.ndarray, np.ndarray, float], dict[str, np.ndarray]]) -> Callable[..., _Rows]:
    """Returns the ``rows`` of a sampler whose ``columns`` depend on the signal level ``abar`` at a step and the next, and on
    eta."""

    def rows(schedule: NoiseSchedule, t: np.ndarray, eta: float) -> _Rows:
        abar = schedule.alpha_bars[t]
        clean = {"x0_from_x": np.sqrt(1 / abar), "x0_from_eps": np.sqrt(1 / abar - 1)}
        return t, clean | columns(abar, np.append(abar[1:], 1.0), eta)

    return rows


def _ddpm_rows(abar: np.ndarray, abar_prev: np.ndarray, eta: float) -> dict[str, np.ndarray]:
    alpha = abar / abar_prev
    beta = 1 - alpha
    variance = beta * (1 - abar_prev) / (1 - abar)
    # The last step's posterior variance is 0, so the variance of the step before replaces it (Meta's clipping).
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


def _euler_rows(schedule: FlowSchedule, times: np.ndarray, eta: float) -> _Rows:
    """Returns a row for each of the N steps between ``times`` (N + 1,)."""
    dt = np.diff(times)
    return times[:-1], _following_velocity(dt, np.zeros_like(dt))


def _heun_rows(schedule: FlowSchedule, times: np.ndarray, eta: float) -> _Rows:
    """Returns two rows for each step: Euler's, and its correction at the step's end."""
    dt = np.diff(times)
    by_turns = lambda first, second: np.stack([first, second], axis=1).ravel()
    return by_turns(times[:-1], times[1:]), _following_velocity(by_turns(dt, dt / 2), by_turns(np.zeros_like(dt), -dt / 2))


def _following_velocity(from_v: np.ndarray, from_v_prev: np.ndarray) -> dict[str, np.ndarray]:
    ones = np.ones_like(from_v)
    return {
        "x0_from_x": 0 * ones,
        "x0_from_eps": -ones,
        "from_x": ones,
        "from_x0": from_v,
        "from_x0_prev": from_v_prev,
    }


# The registry ----------------------------------------------------------------------------------------


_NOISE, _VELOCITY = NoiseSchedule.objective, FlowSchedule.objective
#: All samplers by name. ``auto`` is the first that fits what a model predicts.
SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddpm", _NOISE, _even, _following_noise(_ddpm_rows), stochastic=lambda eta: True, learned_variance=True),
        Sampler("ddim", _NOISE, _strided, _following_noise(_ddim_rows), stochastic=lambda eta: eta > 0),
        Sampler("dpm++2m", _NOISE, _linspace, _following_noise(_dpmpp_rows)),
        Sampler("euler", _VELOCITY, _equal_steps, _euler_rows),
        Sampler("heun", _VELOCITY, _equal_steps, _heun_rows, calls_per_step=2),
    )
}


def _names(objective: str) -> list[str]:
    return [sampler.name for sampler in SAMPLERS.values() if sampler.objective == objective]


def check_name(name: str) -> None:
    """Raises if ``name`` is neither ``auto`` nor in the registry."""
    known = (AUTO, *SAMPLERS)
    if name not in known:
        raise Ptq4ditError(f"Unknown sampler {quoted(name)}; the samplers are {', '.join(known)}.")


def sampler_for(name: str, schedule: Schedule) -> Sampler:
    """Returns the sampler of that name for a model of this schedule; ``auto`` is the first that fits.

    Raises:
      Ptq4ditError: the sampler does not fit what the model predicts.
    """
    sampler = SAMPLERS[_names(schedule.objective)[0] if name == AUTO else name]
    sampler.check_fits(schedule)
    return sampler


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def help_on_names() -> str:
    """Returns help on the names of samplers."""
    objectives = dict.fromkeys(sampler.objective for sampler in SAMPLERS.values())
    kinds = [f"{_either(_names(objective))} for a model that predicts {objective}" for objective in objectives]
    return f"{', '.join(kinds)}; {AUTO} is the first of those."


def help_on_steps() -> str:
    """Returns help on the values of steps."""
    calls = [f"{s.name} calls the network {s.calls_per_step} times per step" for s in SAMPLERS.values() if s.calls_per_step > 1]
    return "; ".join(["Sampler steps: a count, or a respacing such as ddim50", *calls]) + "."


def help_on_eta() -> str:
    """Returns help on eta and the samplers that use it."""
    names = [sampler.name for sampler in SAMPLERS.values() if sampler.stochastic(0.0) != sampler.stochastic(1.0)]
    return f"Noise of the {_either(names)} sampler, 0 to 1."
