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

from ptq4dit_jax.calibration_rows import ImageLayout, flat_rows, order_by_steps, whole_numbers
from ptq4dit_jax.config import calibration_steps
from ptq4dit_jax.diffusion import Sampler, resolve_guidance
from ptq4dit_jax.dit import DiTConfig, GuidedChannels, flatten_sites, nest_sites
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import at_least_float32
from ptq4dit_jax.sampling import Progress, check_labels, run_chain
from ptq4dit_jax.schedules import NoiseSchedule, Schedule
from ptq4dit_jax.waiting import ready

HISTOGRAM_BINS = 2048
#: A mean square beyond which channels count alike, those of values beyond 1e16: sums over steps of it must not leave float32.
MOST_POWER = 2.0**107


@struct.dataclass
class CalibrationData:
    """Rows that the network is watched on, step by step, noisiest step first.

    ``x`` (S, R, H, W, C) float32 noised images, ``t`` (S,) what the network sees as time (int32 timesteps, or float32 times of
    a flow), or (S, R) where the rows of a step have times of their own, ``y`` (S, R) int32 labels.
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

    def batched(self, rows: int, parts: int = 1) -> CalibrationData:
        """The same rows cut into micro-batches of ``rows``: leading axis S * (R / rows).

        With rows that lie on several devices, ``parts`` blocks one after another, every micro-batch takes as many rows of each
        block, so that each device keeps its own and computes its share; :func:`in_row_order` undoes that order.

        Raises:
          Ptq4ditError: sizes that do not divide.
        """
        if rows < 1 or self.num_rows % rows or rows % parts:
            divisor = "a divisor" if parts == 1 else f"a divisor that is a multiple of the {parts} devices"
            raise Ptq4ditError(
                f"The {self.num_rows} calibration rows cannot be cut into micro-batches of {rows}; use {divisor}."
            )
        count = self.num_rows // rows

        def cut(a: Any) -> Any:
            blocks = a.reshape(self.num_steps, parts, count, rows // parts, *a.shape[2:])
            return jnp.swapaxes(blocks, 1, 2).reshape(self.num_steps * count, rows, *a.shape[2:])

        t = jnp.repeat(self.t, count) if self.t.ndim == 1 else cut(self.t)
        return CalibrationData(x=cut(self.x), t=t, y=cut(self.y))


def in_row_order(batched: jax.Array, axis: int, parts: int) -> jax.Array:
    """Joins the micro-batches of :meth:`CalibrationData.batched`: axes ``axis`` (C micro-batches) and ``axis + 1`` (their rows)
    become one of all R rows, in the order that they had."""
    count, rows = batched.shape[axis : axis + 2]
    blocks = batched.reshape(*batched.shape[:axis], count, parts, rows // parts, *batched.shape[axis + 2 :])
    return jnp.swapaxes(blocks, axis, axis + 1).reshape(*batched.shape[:axis], count * rows, *batched.shape[axis + 2 :])


def sample_trajectories(
    model: FloatDiT,
    key: jax.Array,
    walk: Sampler,
    *,
    steps: int | None = None,
    rows: int = 64,
    cfg_scale: float | None = None,
    cfg_channels: GuidedChannels = "first3",
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> CalibrationData:
    """Calibration rows from the float model's own sampling, with the sampler and guidance that will be used.

    Keeps the network's inputs at ``steps`` evenly spaced steps of the chain, by default 25 or all of a shorter chain. Labels
    spread evenly over all classes. With guidance half of the ``rows`` are conditional and the other half their twins with the
    null class; without it all are conditional. ``batch_size`` and the defaults of the sampler's steps and of ``cfg_scale`` are
    those of :func:`ptq4dit_jax.sampling.sample`.

    Raises:
      Ptq4ditError: numbers of steps or rows that cannot be, or rows that hold NaN or infinity.
    """
    chain = walk.tables(model.schedule).t
    steps = calibration_steps(steps, len(chain))
    cfg_scale = resolve_guidance(cfg_scale, model.config, model.schedule)
    guided = cfg_scale != 1.0
    if rows < 1 or (guided and rows % 2):
        raise Ptq4ditError(f"Calibration rows must be positive, and even under guidance (pairs of twins), not {rows}.")
    count = rows // 2 if guided else rows
    labels = spread_labels(count, model.config.num_classes)
    positions = np.round(np.linspace(0, len(chain) - 1, steps)).astype(int)
    _, x = run_chain(
        model, labels, key, walk, cfg_scale=cfg_scale, cfg_channels=cfg_channels, batch_size=batch_size,
        mesh=mesh, progress=progress, keep_steps=positions, what="Calibration row",
    )  # fmt: skip
    y = np.tile(labels, (steps, 1))
    if guided:
        x = np.concatenate([x, x], axis=1)
        y = np.concatenate([y, np.full_like(y, model.config.null_label)], axis=1)
    return CalibrationData(x=x, t=chain[positions], y=y)


def spread_labels(count: int, num_classes: int) -> np.ndarray:
    """``count`` labels spread evenly over all classes, (count,) int32; zeros where there are no classes."""
    if not num_classes:
        return np.zeros(count, np.int32)
    if count >= num_classes:
        return (np.arange(count) % num_classes).astype(np.int32)
    return (np.arange(count) * num_classes // count).astype(np.int32)


def stored_rows(
    x: ArrayLike,
    t: ArrayLike,
    y: ArrayLike | None,
    config: DiTConfig,
    schedule: Schedule | None = None,
    *,
    layout: ImageLayout = "auto",
) -> CalibrationData:
    """Calibration rows given by the user: ``x`` (M, H, W, C), ``t`` (M,), ``y`` (M,) labels, None where there are no classes.

    They may also lie step by step, ``x`` (S, N, H, W, C), ``t`` (S, N) or (S,), ``y`` (S, N) or (N,), and channels may come
    first, (C, H, W): PTQ4DiT's authors store (S, N, C, H, W). ``layout`` (``NHWC`` or ``NCHW``) says which it is where C is H.

    ``t`` is what the network sees: timesteps of the model's ``schedule`` (the published 1000 by default), whole numbers, or
    times of its flow, 0 to 1. Rows of one timestep make a step if all have equally many. Otherwise neighbours in time make up
    to 25 steps of equally many rows, in which each row keeps its own timestep (``t`` (S, R)); what does not divide, fewer than
    25 rows, is left out.

    Raises:
      Ptq4ditError: shapes that do not fit the model or each other, or fit in two ways; times, labels or values out of range.
    """
    schedule = schedule or NoiseSchedule()
    x_MHWC, t_M, y_M = flat_rows(x, t, y, config, layout)
    y_M, t_M = check_labels(whole_numbers(y_M), config), whole_numbers(t_M)
    schedule.check_times(t_M)
    t_M = t_M.astype(schedule.time_dtype)
    if not np.isfinite(x_MHWC).all():
        raise Ptq4ditError("Calibration rows x contain NaN or infinity; remove those rows.")
    order, shared = order_by_steps(t_M, schedule.noise_level(t_M))
    return CalibrationData(x=x_MHWC[order], t=t_M[order[:, 0] if shared else order], y=y_M[order])


@struct.dataclass
class ChannelExtremes:
    """Observer of the least and greatest value and the mean square per channel; each is (*features), or (R, *features).

    ``power`` is that of the last batch seen, at most :data:`MOST_POWER`; the extremes are those of all.
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
        return ChannelExtremes(
            low=low, high=high, power=jnp.minimum(jnp.square(x).mean(axes), MOST_POWER), per_row=self.per_row
        )

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


@jax.jit
def _finite_steps(statistics: dict[str, ChannelExtremes]) -> dict[str, jax.Array]:
    """Whether all of a site's statistics are finite, at each step (S,)."""
    finite = lambda a: jnp.isfinite(a).all(tuple(range(1, a.ndim)))
    return {name: finite(s.low) & finite(s.high) & finite(s.power) for name, s in statistics.items()}


def check_finite(statistics: Mapping[str, ChannelExtremes], t: ArrayLike) -> None:
    """Raises where channel statistics hold NaN or infinity, with the site and the step; ``t`` (S,) are the steps' times."""
    times = np.asarray(t)
    found = jax.device_get(ready(_finite_steps(dict(statistics))))
    bad = {name: int(np.argmin(finite)) for name, finite in found.items() if not finite.all()}
    if bad:
        name = min(bad, key=lambda site: bad[site])
        when = np.ravel(times[bad[name]])[0]
        raise Ptq4ditError(
            f"The channel statistics of {name} hold NaN or infinity at calibration step {bad[name] + 1} of {len(times)} "
            f"(t = {when:g}), so no range can be chosen; check that the float model makes good samples with these "
            "steps, this sampler and this guidance, and that given calibration rows are scaled as the sampler scales them."
        )


def _leading(config: DiTConfig, name: str) -> tuple[int, ...]:
    return (config.depth,) if name.startswith("blocks.") else ()


@partial(jax.jit, static_argnames=("sites", "per_row", "row_batch", "parts"))
def channel_extremes(
    model: FloatDiT, data: CalibrationData, *, sites: tuple[str, ...], per_row: bool = False, row_batch: int | None = None,
    parts: int = 1,
) -> dict[str, ChannelExtremes]:  # fmt: skip
    """Per-channel extremes at every step, by one scan.

    Args:
      model: the float model, (partly) folded or not.
      data: S steps of R rows.
      sites: names as in ``config.site_features``.
      per_row: keep the rows apart (the official code's SSC weighs rows).
      row_batch: rows per pass, a divisor of R and a multiple of ``parts``, to bound memory.
      parts: devices that the rows are sharded over.

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

    _, gathered = jax.lax.scan(step, None, data.batched(rows, parts))

    def merge(name: str, stat: ChannelExtremes) -> ChannelExtremes:
        """Joins the micro-batches of a step: (S * C, ...) to (S, ...)."""
        split = jax.tree.map(lambda a: a.reshape(data.num_steps, -1, *a.shape[1:]), stat)
        if not per_row:
            return split.replace(low=split.low.min(1), high=split.high.max(1), power=split.power.mean(1))
        row_axis = 1 + len(_leading(config, name))
        return jax.tree.map(lambda a: in_row_order(jnp.moveaxis(a, 1, row_axis), row_axis, parts), split)

    return {name: merge(name, stat) for name, stat in flatten_sites(gathered).items()}


@partial(jax.jit, static_argnames=("num_groups", "row_batch", "parts"))
def histograms(
    model: FloatDiT,
    data: CalibrationData,
    groups: jax.Array,
    ranges: Mapping[str, tuple[jax.Array, jax.Array]],
    *,
    num_groups: int,
    row_batch: int | None = None,
    parts: int = 1,
) -> dict[str, Histogram]:
    """Histograms of the values at each site, per group of steps, by one scan that carries the counts.

    Args:
      model: the folded float model.
      data: S steps of R rows.
      groups: (S,) int32, the group of each step.
      ranges: by site, outer edges (low, high), each (G, [L]).
      num_groups: G.
      row_batch, parts: as for :func:`channel_extremes`.

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

    batches = (data.batched(rows, parts), jnp.repeat(groups, data.num_rows // rows))
    carry, _ = jax.lax.scan(step, nest_sites(start), batches)
    return flatten_sites(carry)


def _timestep(batch: CalibrationData, rows: int) -> jax.Array:
    """The timestep of each row, or of a step that shares one as (rows,); one row is enough where all share it."""
    return batch.t if batch.t.ndim else jnp.broadcast_to(batch.t, (rows,))
