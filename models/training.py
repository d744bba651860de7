"""What the recipes of the shipped models share: Meta's losses for a DiT, and training as one scan over the steps.

A recipe brings its network's config, its settings (:class:`Recipe`, possibly with fields of its own) and its data
(:class:`Data`), which lies on the device and draws training examples there, so that no step waits for the host. The result is
the exponential moving average of the parameters.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig, init_params
from ptq4dit_jax.samplers import SAMPLERS, StepTables
from ptq4dit_jax.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule()
#: Optimizer steps in one compiled scan; progress is reported, and the clock read, once for each.
CHUNK = 100
#: Where time runs out, the last part of it (this fraction) goes to a linear decay of the learning rate.
COOLDOWN = 0.2
Progress = Callable[[int, dict[str, float]], None]


class Data(Protocol):
    """Training examples as a pytree of arrays on the device; its static fields are compared when a program is looked up."""

    @property
    def max_level(self) -> int:
        """Images are integers 0..max_level mapped to [-1, 1]; the likelihood of the last step is that of such a level."""
        ...

    def draw(self, keys_3: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """``count`` random examples under ``jit``: images (count, H, W, C) float32 in [-1, 1], labels (count,) int32."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run. ``compute_dtype`` is the network's; parameters, optimizer and average stay float32."""

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.03
    clip_norm: float = 1.0
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise Ptq4ditError(f"Training {name} must be at least 1, not {getattr(self, name)}.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise Ptq4ditError(f"Training computes in float32 or bfloat16, not in {self.compute_dtype!r}.")

    def optimizer(self) -> optax.GradientTransformation:
        warmup = min(self.warmup, self.steps // 2)
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, self.steps)
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm), optax.adamw(rate, b2=0.99, weight_decay=self.weight_decay)
        )


def variational_bound(
    x0: jax.Array,
    mean: jax.Array,
    log_var: jax.Array,
    true_mean: jax.Array,
    true_log_var: jax.Array,
    t_B: jax.Array,
    max_level: int,
) -> jax.Array:
    """L_vlb of Nichol & Dhariwal in bits per pixel, (B,).

    The divergence of q(x_{t-1} | x_t, x_0) from the model's Gaussian; at t = 0 the negative log likelihood of the grey level
    (0..max_level, mapped to [-1, 1]) under that Gaussian, integrated over the level's interval.
    """
    kl = 0.5 * (log_var - true_log_var - 1 + jnp.exp(true_log_var - log_var) + (true_mean - mean) ** 2 * jnp.exp(-log_var))

    half, inv_std = 1 / max_level, jnp.exp(-0.5 * log_var)
    below_top = jax.scipy.special.ndtr((x0 - mean + half) * inv_std)
    below_bottom = jax.scipy.special.ndtr((x0 - mean - half) * inv_std)
    mass = jnp.where(x0 > 1 - half, 1.0, below_top) - jnp.where(x0 < half - 1, 0.0, below_bottom)
    nll = -jnp.log(jnp.maximum(mass, 1e-12))

    pixels = tuple(range(1, x0.ndim))
    return jnp.where(t_B == 0, nll.mean(pixels), kl.mean(pixels)) / math.log(2)


def loss_tables() -> StepTables:
    """Ancestral sampling over all timesteps, ascending in t, so that a timestep is an index."""
    descending = SAMPLERS["ddpm"].tables(SCHEDULE, SCHEDULE.num_timesteps)
    return jax.tree.map(lambda a: jnp.asarray(a[::-1]), descending)


def losses(
    model: FloatDiT, tables: StepTables, x0: jax.Array, t_B: jax.Array, y_B: jax.Array, noise: jax.Array, max_level: int
) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of the noise (B,) and the variational bound (B,), float32; the latter teaches the variance only.

    The network computes in the model's type. ``tables`` is :func:`loss_tables`.
    """
    row = jax.tree.map(lambda a: jnp.asarray(a)[t_B].reshape(-1, 1, 1, 1), tables)
    x_t = model.schedule.add_noise(x0, t_B, noise)
    eps, fraction = jnp.split(model.apply(x_t, t_B, y_B).astype(jnp.float32), 2, axis=-1)
    mse = jnp.square(eps - noise).mean((1, 2, 3))

    def posterior_mean(clean: jax.Array) -> jax.Array:
        return row.from_x * x_t + row.from_x0 * clean

    predicted = jax.lax.stop_gradient(row.x0_from_x * x_t - row.x0_from_eps * eps)
    log_var = row.log_var_min + (fraction + 1) / 2 * (row.log_var_max - row.log_var_min)
    bound = variational_bound(x0, posterior_mean(predicted), log_var, posterior_mean(x0), row.log_var_min, t_B, max_level)
    return mse, bound


@partial(jax.jit, static_argnames=("config", "recipe", "count"), donate_argnames="state")
def train_steps(
    state: dict[str, Any],
    key: jax.Array,
    tables: StepTables,
    data: Any,
    first: jax.Array,
    cooldown: tuple[jax.Array, jax.Array] | None = None,
    *,
    config: DiTConfig,
    recipe: Recipe,
    count: int,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """``count`` optimizer steps from step ``first`` on, one scan; ``data`` is a :class:`Data`.

    With ``cooldown`` (first, end) the updates shrink linearly from step ``first`` to nothing at step ``end``. Returns the new
    state and the mean losses.
    """
    batch = recipe.batch_size

    def objective(params: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = jax.random.split(key, 6)
        x0, labels = data.draw(keys[:3], batch)
        dropped = jax.random.uniform(keys[3], (batch,), jnp.float32) < recipe.label_dropout
        y = jnp.where(dropped, config.null_label, labels)
        t = jax.random.randint(keys[4], (batch,), 0, SCHEDULE.num_timesteps, jnp.int32)
        model = FloatDiT(params, config, SCHEDULE).astype(recipe.compute_dtype)
        mse, bound = losses(model, tables, x0, t, y, jax.random.normal(keys[5], x0.shape, jnp.float32), data.max_level)
        means = {"mse": mse.mean(), "vlb": bound.mean()}
        return means["mse"] + means["vlb"], means

    def step(state: dict[str, Any], index: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        grads, means = jax.grad(objective, has_aux=True)(state["params"], jax.random.fold_in(key, index))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax promotes
            updates, optimizer = recipe.optimizer().update(grads, state["optimizer"], state["params"])
        if cooldown is not None:
            first, end = (step.astype(jnp.float32) for step in cooldown)
            share = jnp.clip((end - index.astype(jnp.float32)) / (end - first), 0, 1)
            updates = jax.tree.map(lambda update: share * update, updates)
        params = optax.apply_updates(state["params"], updates)
        # A short memory at first, so that the average does not drag the initial parameters along.
        seen = index.astype(jnp.float32)
        decay = jnp.minimum(recipe.ema_decay, (1 + seen) / (10 + seen))
        ema = jax.tree.map(lambda old, new: new + decay * (old - new), state["ema"], params)
        return {"params": params, "optimizer": optimizer, "ema": ema}, means

    state, means = jax.lax.scan(step, state, first + jnp.arange(count, dtype=jnp.int32))
    return state, jax.tree.map(jnp.mean, means)


def cooldown_window(done: int, steps: int, elapsed: float, step_seconds: float, max_seconds: float) -> tuple[int, int] | None:
    """The steps (first, end) over which to cool down from now on, or None where training may go on as planned.

    It starts once the last :data:`COOLDOWN` of ``max_seconds`` has begun and the remaining steps would not fit in it; it is as
    long as fits, in whole chunks, and at least one, so that no other program has to be compiled for it.
    """
    left = max_seconds - elapsed
    if left > COOLDOWN * max_seconds or (steps - done) * step_seconds <= left:
        return None
    chunks = max(1, math.floor(left / (step_seconds * CHUNK)))
    return done, min(steps, done + chunks * CHUNK)


def train(
    recipe: Recipe,
    seed: int,
    data: Any,
    config: DiTConfig,
    *,
    progress: Progress | None = None,
    max_seconds: float | None = None,
) -> tuple[FloatDiT, int]:
    """The moving average of the parameters of a model trained on ``data``, a :class:`Data`, in float32; and the steps taken.

    Args:
      progress: called with (steps done, mean losses since the last call).
      max_seconds: where the recipe's steps do not fit in this time (compilation included), training ends early, with a
        learning rate that has come down to zero all the same.

    Raises:
      Ptq4ditError: the loss is not finite any more, or a setting is out of range.
    """
    if max_seconds is not None and not max_seconds > 0:
        raise Ptq4ditError(f"max_seconds must be positive, not {max_seconds}.")
    start = time.perf_counter()
    init_key, key = jax.random.split(jax.random.key(seed))
    params = init_params(config, init_key)
    state = {"params": params, "optimizer": recipe.optimizer().init(params), "ema": jax.tree.map(jnp.copy, params)}
    tables, data = loss_tables(), jax.tree.map(jnp.asarray, data)
    done, end, first_end = 0, recipe.steps, 0.0
    # Where a cooldown may come, one that begins after the last step stands in for it: the program stays the same.
    window = None if max_seconds is None else (end, end + 1)
    while done < end:
        count = min(CHUNK, end - done)
        cooldown = None if window is None else (jnp.int32(window[0]), jnp.int32(window[1]))
        state, means = train_steps(
            state, key, tables, data, jnp.int32(done), cooldown, config=config, recipe=recipe, count=count
        )
        done += count
        figures = {name: float(value) for name, value in means.items()}
        if not all(math.isfinite(value) for value in figures.values()):
            raise Ptq4ditError(f"Training diverged before step {done}, with losses {figures}; lower the learning rate.")
        if progress is not None:
            progress(done, figures)
        now = time.perf_counter()
        if done == count:
            first_end = now  # the first chunk compiles, so that its time says nothing about the others
        elif max_seconds is not None and window == (recipe.steps, recipe.steps + 1):
            window = cooldown_window(done, end, now - start, (now - first_end) / (done - CHUNK), max_seconds) or window
            end = min(end, window[1])
    return FloatDiT(params=state["ema"], config=config, schedule=SCHEDULE), done


def check_target(folder: Path) -> None:
    """Raises before anything is trained where the result could not be saved to ``folder``: it holds files, but no model."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        try:
            store.read_config(folder)
        except Ptq4ditError as error:
            raise Ptq4ditError(
                f"The folder {folder} holds something else than a model, so nothing is trained into it; "
                "choose another folder for --out."
            ) from error


def progress_printer(recipe: Recipe, every: int = CHUNK) -> Progress:
    """A ``progress`` that prints losses, seconds and images per second, each ``every`` steps and at the last one."""
    start = time.perf_counter()
    last_done, last_time = 0, start

    def show(done: int, means: dict[str, float]) -> None:
        nonlocal last_done, last_time
        if done % every and done != recipe.steps:
            return
        now = time.perf_counter()
        rate = (done - last_done) * recipe.batch_size / (now - last_time)
        figures = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"step {done:6d}/{recipe.steps}  {figures}  {now - start:7.1f} s  {rate:8.0f} img/s", flush=True)
        last_done, last_time = done, now

    return show
