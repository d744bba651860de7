"""Calibration: which rows the float model is watched on, and what is remembered of them.

Statistics are gathered by one ``lax.scan`` over the steps (and over micro-batches of rows inside a step). Nothing of size
(tokens, channels) leaves the scan: only per-channel extremes and histograms.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.typing import ArrayLike

from ptq4dit_jax.diffusion import Sampler
from ptq4dit_jax.dit import DiTConfig, GuidedChannels, flatten_sites, nest_sites
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import at_least_float32
from ptq4dit_jax.sampling import Progress, check_labels, run_chain
from ptq4dit_jax.schedules import NoiseSchedule, Schedule

HISTOGRAM_BINS = 2048


@struct.dataclass
class CalibrationData:
    """Rows that the network is watched on, step by step, noisiest step first.

    ``x`` (S, R, H, W, C) float32 noised images, ``t`` (S,) what the network sees as time (int32 timesteps, or float32 times of
    a flow), ``y`` (S, R) int32 labels.
    """

    x: Any
    t: Any
    y: Any

    @property
    def num_steps(self) -> int:
        return self.x.shape[0]

    @property
    def num_rows(self) -> int:
        return self.x.shape[1]

    def batched(self, rows: int) -> CalibrationData:
        """The same rows cut into micro-batches of at most ``rows``: leading axis S * (R / rows). Sizes must divide."""
        if rows < 1 or self.num_rows % rows:
            raise Ptq4ditError(f"{self.num_rows} calibration rows cannot be cut into micro-batches of {rows}; use a divisor.")
        count = self.num_rows // rows
        cut = lambda a: a.reshape(self.num_steps * count, rows, *a.shape[2:])
        return CalibrationData(x=cut(self.x), t=jnp.repeat(self.t, count), y=cut(self.y))


def sample_trajectories(
    model: FloatDiT,
    key: jax.Array,
    walk: Sampler,
    *,
    steps: int = 25,
    rows: int = 64,
    cfg_scale: float = 1.5,
    cfg_channels: GuidedChannels = "first3",
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> CalibrationData:
    """Calibration rows from the float model's own sampling, with the sampler and guidance that will be used.

    Keeps the network's inputs at ``steps`` evenly spaced steps of the chain. Labels spread evenly over all classes. With
    guidance half of the ``rows`` are conditional and the other half their twins with the null class; without it all are
    conditional.
    """
    chain = walk.tables(model.schedule).t
    if not 1 <= steps <= len(chain):
        raise Ptq4ditError(f"Calibration steps must be 1 to the sampler's {len(chain)} steps, not {steps}.")
    guided = cfg_scale != 1.0
    if rows < 1 or (guided and rows % 2):
        raise Ptq4ditError(f"Calibration rows must be positive, and even under guidance (pairs of twins), not {rows}.")
    count = rows // 2 if guided else rows
    labels = spread_labels(count, model.config.num_classes)
    positions = np.round(np.linspace(0, len(chain) - 1, steps)).astype(int)
    _, x = run_chain(
        model, labels, key, walk, cfg_scale=cfg_scale, cfg_channels=cfg_channels, batch_size=batch_size,
        mesh=mesh, progress=progress, keep_steps=positions,
    )  # fmt: skip
    y = np.tile(labels, (steps, 1))
    if guided:
        x = np.concatenate([x, x], axis=1)
        y = np.concatenate([y, np.full_like(y, model.config.null_label)], axis=1)
    return CalibrationData(x=x, t=chain[positions], y=y)


def spread_labels(count: int, num_classes: int) -> np.ndarray:
    """``count`` labels spread evenly over all classes, (count,) int32."""
    if count >= num_classes:
        return (np.arange(count) % num_classes).astype(np.int32)
    return (np.arange(count) * num_classes // count).astype(np.int32)


def stored_rows(
    x: ArrayLike, t: ArrayLike, y: ArrayLike, config: DiTConfig, schedule: Schedule | None = None
) -> CalibrationData:
    """Calibration rows given by the user: ``x`` (M, H, W, C), ``t`` (M,), ``y`` (M,) labels.

    ``t`` are timesteps of the model's ``schedule`` (the published 1000 by default), integers, or times of its flow, 0 to 1.
    Rows are grouped by them; each must have the same number of rows.
    """
    schedule = schedule or NoiseSchedule()
    x_MHWC, t_M, y_M = np.asarray(x, np.float32), np.atleast_1d(t), check_labels(y, config)
    if x_MHWC.ndim != 4 or x_MHWC.shape[1:] != config.image_shape or not t_M.shape == y_M.shape == x_MHWC.shape[:1]:
        raise Ptq4ditError(
            f"Calibration rows must be x (M, {', '.join(map(str, config.image_shape))}), t (M,) and y (M,), "
            f"not {x_MHWC.shape}, {t_M.shape} and {y_M.shape}."
        )
    schedule.check_times(t_M)
    t_M = t_M.astype(schedule.time_dtype)
    if not np.isfinite(x_MHWC).all():
        raise Ptq4ditError("Calibration rows x contain NaN or infinity; remove those rows.")
    steps, counts = np.unique(t_M, return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise Ptq4ditError(
            f"Calibration rows must be equally many at every timestep; t={steps[counts.argmin()]} has {counts.min()} "
            f"and t={steps[counts.argmax()]} has {counts.max()}."
        )
    order = np.argsort(-schedule.noise_level(t_M), kind="stable").reshape(len(steps), -1)
    return CalibrationData(x=x_MHWC[order], t=t_M[order[:, 0]], y=y_M[order])


@struct.dataclass
class ChannelExtremes:
    """Observer of the least and greatest value and the mean square per channel; each is (*features), or (R, *features).

    ``power`` is that of the last batch seen; the extremes are those of all.
    """

    low: Any
    high: Any
    power: Any
    per_row: bool = struct.field(pytree_node=False, default=False)

    def observe(self, x: jax.Array) -> ChannelExtremes:
        first = 1 if self.per_row else 0
        axes = tuple(range(first, x.ndim - (self.low.ndim - first)))
        x = x.astype(self.low.dtype)
        low, high = jnp.minimum(self.low, x.min(axes)), jnp.maximum(self.high, x.max(axes))
        return ChannelExtremes(low=low, high=high, power=jnp.square(x).mean(axes), per_row=self.per_row)

    @property
    def salience(self) -> jax.Array:
        """``max |x|`` per channel (PTQ4DiT eq. 4)."""
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


@struct.dataclass
class Histogram:
    """Observer that counts values in equal bins between ``low`` and ``high`` (); counts (bins,) float32; the ends take the
    rest."""

    low: Any
    high: Any
    counts: Any

    def observe(self, x: jax.Array) -> Histogram:
        bins = self.counts.shape[-1]
        span = self.high - self.low
        position = (x.astype(jnp.float32).ravel() - self.low) * jnp.where(span > 0, bins / span, 0.0)
        index = jnp.clip(position.astype(jnp.int32), 0, bins - 1)
        # Counted in integers: float32 stops counting in ones at 2^24.
        seen = jnp.zeros(bins, jnp.int32).at[index].add(1)
        return Histogram(low=self.low, high=self.high, counts=self.counts + seen.astype(self.counts.dtype))


def _leading(config: DiTConfig, name: str) -> tuple[int, ...]:
    return (config.depth,) if name.startswith("blocks.") else ()


@partial(jax.jit, static_argnames=("sites", "per_row", "row_batch"))
def channel_extremes(
    model: FloatDiT, data: CalibrationData, *, sites: tuple[str, ...], per_row: bool = False, row_batch: int | None = None
) -> dict[str, ChannelExtremes]:
    """Per-channel extremes at every step, by one scan.

    Args:
      model: the float model, (partly) folded or not.
      data: S steps of R rows.
      sites: names as in ``config.site_features``.
      per_row: keep the rows apart (the official code's SSC weighs rows).
      row_batch: rows per pass, a divisor of R, to bound memory.

    Returns:
      For each site, leaves (S, [L,] *features), or (S, [L,] R, *features) with ``per_row``.
    """
    config = model.config
    rows = row_batch or data.num_rows

    def start(name: str) -> ChannelExtremes:
        shape = _leading(config, name) + ((rows,) if per_row else ()) + config.site_features[name]
        dtype = at_least_float32(model.dtype)
        low, high = jnp.full(shape, jnp.inf, dtype), jnp.full(shape, -jnp.inf, dtype)
        return ChannelExtremes(low=low, high=high, power=jnp.zeros(shape, dtype), per_row=per_row)

    observers = nest_sites({name: start(name) for name in sites})

    def step(carry: None, batch: CalibrationData) -> tuple[None, Any]:
        _, seen = model.observe(observers, batch.x, _timestep(batch, rows if per_row else 1), batch.y)
        return carry, seen

    _, gathered = jax.lax.scan(step, None, jax.tree.map(jnp.asarray, data.batched(rows)))

    def merge(name: str, stat: ChannelExtremes) -> ChannelExtremes:
        """Joins the micro-batches of a step: (S * C, ...) to (S, ...)."""
        split = jax.tree.map(lambda a: a.reshape(data.num_steps, -1, *a.shape[1:]), stat)
        if not per_row:
            return split.replace(low=split.low.min(1), high=split.high.max(1), power=split.power.mean(1))
        row_axis = 1 + len(_leading(config, name))

        def join(a: jax.Array) -> jax.Array:
            beside_rows = jnp.moveaxis(a, 1, row_axis)
            return beside_rows.reshape(*a.shape[:1], *beside_rows.shape[1:row_axis], -1, *beside_rows.shape[row_axis + 2 :])

        return jax.tree.map(join, split)

    return {name: merge(name, stat) for name, stat in flatten_sites(gathered).items()}


@partial(jax.jit, static_argnames=("num_groups", "row_batch"))
def histograms(
    model: FloatDiT,
    data: CalibrationData,
    groups: jax.Array,
    ranges: Mapping[str, tuple[jax.Array, jax.Array]],
    *,
    num_groups: int,
    row_batch: int | None = None,
) -> dict[str, Histogram]:
    """Histograms of the values at each site, per group of steps, by one scan that carries the counts.

    Args:
      model: the folded float model.
      data: S steps of R rows.
      groups: (S,) int32, the group of each step.
      ranges: by site, outer edges (low, high), each (G, [L]).
      num_groups: G.
      row_batch: rows per pass, a divisor of R.

    Returns:
      For each site a :class:`Histogram` with leaves (G, [L]) and counts (G, [L,] bins).
    """
    rows = row_batch or data.num_rows
    start = {
        name: Histogram(low, high, jnp.zeros((*low.shape, HISTOGRAM_BINS), jnp.float32)) for name, (low, high) in ranges.items()
    }

    def step(carry: Any, batch: tuple[CalibrationData, jax.Array]) -> tuple[Any, None]:
        part, group = batch
        current = jax.tree.map(lambda a: a[group], carry)
        _, seen = model.observe(current, part.x, _timestep(part, 1), part.y)
        return jax.tree.map(lambda a, new: a.at[group].set(new), carry, seen), None

    batches = (jax.tree.map(jnp.asarray, data.batched(rows)), jnp.repeat(groups, data.num_rows // rows))
    carry, _ = jax.lax.scan(step, nest_sites(start), batches)
    return flatten_sites(carry)


def _timestep(batch: CalibrationData, rows: int) -> jax.Array:
    """The step's timestep as (rows,); one row is enough where all share it."""
    return jnp.broadcast_to(batch.t, (rows,))
