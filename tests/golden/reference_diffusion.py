"""Diffusion sampling in plain NumPy float64, written for tests: short and independent of the package.

A model here is a function `(x, t) -> (eps, v)`: `t` is the step number of the original 1000-step process, `eps` the
predicted noise and `v` the raw learned-range output (-1: posterior variance, +1: beta). Every formula is elementwise
in `x`, so any layout will do. Nothing is clipped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Model = Callable[[Array, int], tuple[Array, Array]]


def linear_betas(steps: int = 1000) -> Array:
    return np.linspace(1e-4, 0.02, steps)


ABAR = np.cumprod(1.0 - linear_betas())


def space_timesteps(spacing: str, train_steps: int = 1000) -> Array:
    """Ascending step numbers of "N" (both ends included) or "ddimN" (the first whole stride that gives N steps)."""
    if spacing.startswith("ddim"):
        count = int(spacing.removeprefix("ddim"))
        strides = (s for s in range(1, train_steps) if len(range(0, train_steps, s)) == count)
        return np.arange(0, train_steps, next(strides))
    count = int(spacing)
    stride = (train_steps - 1) / (count - 1) if count > 1 else 1.0
    positions = np.cumsum([0.0] + [stride] * (count - 1))  # a running sum, as the public samplers have it
    return np.rint(positions).astype(np.int64)  # halves go to even


@dataclass(frozen=True)
class Process:
    """A (respaced) noising process of S steps; each array is (S,), ascending in time.

    `mean_x0` and `mean_xt` weigh x0 and x_t in the posterior's mean. `log_variance` is the posterior's, with entry 0
    (whose variance is 0) replaced by entry 1.
    """

    timesteps: Array
    betas: Array
    abar: Array
    abar_prev: Array
    mean_x0: Array
    mean_xt: Array
    log_variance: Array


def make_process(timesteps: Array) -> Process:
    """The process that visits only `timesteps`, its betas recomputed so that abar at each stays what it was."""
    kept = ABAR[timesteps]
    betas = 1.0 - kept / np.append(1.0, kept[:-1])
    abar = np.cumprod(1.0 - betas)
    abar_prev = np.append(1.0, abar[:-1])
    variance = betas * (1.0 - abar_prev) / (1.0 - abar)
    return Process(
        timesteps=timesteps,
        betas=betas,
        abar=abar,
        abar_prev=abar_prev,
        mean_x0=betas * np.sqrt(abar_prev) / (1.0 - abar),
        mean_xt=(1.0 - abar_prev) * np.sqrt(1.0 - betas) / (1.0 - abar),
        log_variance=np.log(np.append(variance[1], variance[1:])),
    )


def predict_x0(abar: float, x: Array, eps: Array) -> Array:
    return np.sqrt(1.0 / abar) * x - np.sqrt(1.0 / abar - 1.0) * eps


def ddpm_step(process: Process, j: int, x: Array, eps: Array, v: Array | None, z: Array) -> Array:
    """One ancestral step from index `j` of the process to `j - 1`; `v` None is the fixed small (posterior) variance."""
    mean = process.mean_x0[j] * predict_x0(process.abar[j], x, eps) + process.mean_xt[j] * x
    fraction = 0.0 if v is None else (v.astype(np.float64) + 1.0) / 2.0
    log_variance = fraction * np.log(process.betas[j]) + (1.0 - fraction) * process.log_variance[j]
    return mean + (j != 0) * np.exp(0.5 * log_variance) * z


def ddim_step(process: Process, j: int, x: Array, eps: Array, eta: float, z: Array) -> Array:
    abar, abar_prev = process.abar[j], process.abar_prev[j]
    sigma = eta * np.sqrt((1.0 - abar_prev) / (1.0 - abar)) * np.sqrt(1.0 - abar / abar_prev)
    mean = np.sqrt(abar_prev) * predict_x0(abar, x, eps) + np.sqrt(1.0 - abar_prev - sigma**2) * eps
    return mean + (j != 0) * sigma * z


def ddpm_chain(model: Model, spacing: str, x: Array, z: Array) -> Array:
    """All states (S + 1, ...), noisiest first; `z[i]` is the noise of the i-th step taken."""
    process, states = make_process(space_timesteps(spacing)), [x.astype(np.float64)]
    for i, j in enumerate(reversed(range(len(process.timesteps)))):
        eps, v = model(states[-1], process.timesteps[j])
        states.append(ddpm_step(process, j, states[-1], eps, v, z[i]))
    return np.stack(states)


def ddim_chain(model: Model, spacing: str, x: Array, z: Array, eta: float) -> Array:
    """All states (S + 1, ...), noisiest first; `z[i]` is the noise of the i-th step taken."""
    process, states = make_process(space_timesteps(spacing)), [x.astype(np.float64)]
    for i, j in enumerate(reversed(range(len(process.timesteps)))):
        eps, _ = model(states[-1], process.timesteps[j])
        states.append(ddim_step(process, j, states[-1], eps, eta, z[i]))
    return np.stack(states)


def dpmpp_timesteps(steps: int, train_steps: int = 1000) -> Array:
    """Step numbers in the order they are visited (descending): linspace spacing, 0 left out, halves to even."""
    return np.rint(np.linspace(0, train_steps - 1, steps + 1))[:0:-1].astype(np.int64)


def dpmpp_2m_chain(model: Model, steps: int, x: Array) -> Array:
    """All states (S + 1, ...) of DPM-Solver++ 2M (midpoint), noisiest first; the last step goes to noise 0.

    With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma) and a step h in lambda,
    `x <- (sigma_next / sigma) x - alpha_next (exp(-h) - 1) d`. The first and the last step take d = x0; the others
    extrapolate, `d = x0 + (x0 - x0_before) h / (2 h_before)`.
    """
    timesteps = dpmpp_timesteps(steps)
    alpha = np.append(np.sqrt(ABAR[timesteps]), 1.0)
    sigma = np.append(np.sqrt(1.0 - ABAR[timesteps]), 0.0)
    lam = np.log(alpha[:-1] / sigma[:-1])
    states, x0s = [x.astype(np.float64)], []
    for i, t in enumerate(timesteps):
        x0s.append((states[-1] - sigma[i] * model(states[-1], t)[0]) / alpha[i])
        last = i == steps - 1
        h = np.inf if last else lam[i + 1] - lam[i]
        d = x0s[-1] if i == 0 or last else x0s[-1] + (x0s[-1] - x0s[-2]) * h / (2.0 * (lam[i] - lam[i - 1]))
        states.append(sigma[i + 1] / sigma[i] * states[-1] - alpha[i + 1] * (np.exp(-h) - 1.0) * d)
    return np.stack(states)


def toy_model(x: Array, t: int) -> tuple[Array, Array]:
    """A smooth stand-in for a network: `(eps, v)`."""
    return 0.9 * x * np.sqrt(1.0 - ABAR[t]) + 0.1 * np.sin(x), 0.3 * np.cos(x)
