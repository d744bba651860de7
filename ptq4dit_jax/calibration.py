"""Calibration: the rows on which the float model is observed, and the statistics kept of them.

Statistics are gathered by one ``lax.scan`` over the steps per micro-batch of rows. Nothing of size (tokens, channels) leaves
the scan, only per-channel extremes and histograms. Each micro-batch is a program of one device, whichever that is, and results
are merged in order, so the devices do not affect them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int32, Integer, Num

from ptq4dit_jax import placement, sharding
from ptq4dit_jax.calibration_rows import ImageLayout, flat_rows, order_by_steps, whole_numbers
from ptq4dit_jax.config.sections import Calibration, calibration_steps
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites
from ptq4dit_jax.numerics import AnyKey, at_least_float32
from ptq4dit_jax.sampling import Progress, check_labels, kept_inputs
from ptq4dit_jax.schedules import NoiseSchedule, Schedule
from ptq4dit_jax.waiting import ready

_Shared = TypeVar("_Shared")
_Seen = TypeVar("_Seen")

HISTOGRAM_BINS = 2048
#: Rows that the network sees at once during calibration. Eight devices share the default of 64.
MICRO_BATCH = 8
#: Copies of a histogram that a GPU counts in. Few of its threads then wait for one another: an H200 is 7 to 16 times as fast.
_COPIES = 256
#: A mean square beyond which channels count alike (values beyond 1e16), so that sums over steps stay within float32.
MOST_POWER = 2.0**107


class CalibrationData(struct.PyTreeNode):
    """Rows on which the network is observed, step by step, noisiest step first.

    ``x`` (S, R, H, W, C) float32 are noised images. ``t`` (S,) is what the network sees as time (int32 timesteps, or float32
    times of a flow), or (S, R) where the rows of a step have times of their own. ``y`` (S, R) int32 are labels.
    """

    x: Float32[Array | np.ndarray, "*S R H W C"]
    t: Num[Array | np.ndarray, "*S"] | Num[Array | np.ndarray, "*S of_R"]
    y: Int32[Array | np.ndarray, "*S R"]

    @property
    def num_steps(self) -> int:
        return self.x.shape[0]

    @property
    def num_rows(self) -> int:
        return self.x.shape[1]

    def spread(self, steps: int, rows: int) -> CalibrationData:
        """Picks ``steps`` steps from all over the chain, or all if there are fewer, and ``rows`` rows from all over each. The
        result is on the host; each row has a time of its own, or each step has one (S, 1)."""
        places = lambda count, wanted: (np.arange(min(count, wanted)) * 2 + 1) * count // (2 * min(count, wanted))
        at, of = places(self.num_steps, steps), places(self.num_rows, rows)
        t = np.asarray(self.t)[at]
        return CalibrationData(
            x=np.asarray(self.x)[at][:, of], t=t[:, None] if t.ndim == 1 else t[:, of], y=np.asarray(self.y)[at][:, of]
        )

    def rows(self, chosen: slice) -> CalibrationData:
        """Returns the ``chosen`` rows of every step, on the host."""
        cut = lambda a: np.asarray(a)[:, chosen]
        return CalibrationData(x=cut(self.x), t=np.asarray(self.t) if np.ndim(self.t) == 1 else cut(self.t), y=cut(self.y))


def micro_batches(num_rows: int) -> list[slice]:
    """Returns the rows of each micro-batch: equally many, if a number from half of :data:`MICRO_BATCH` up to all of it divides
    ``num_rows``; otherwise :data:`MICRO_BATCH` each, with a rest in the last.

    Statistics are gathered per micro-batch. The number of rows alone determines the micro-batches, so no sum depends on the
    devices or on ``row_batch``.
    """
    rows = next((r for r in range(MICRO_BATCH, MICRO_BATCH // 2 - 1, -1) if num_rows % r == 0), MICRO_BATCH)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def sample_trajectories(
    model: FloatDiT,
    calibration: Calibration = Calibration(),
    *,
    key: AnyKey,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> CalibrationData:
    """Samples calibration rows from the float model, with the sampler and guidance that will be used.

    Keeps the network's inputs at evenly spaced steps of the chain. Labels spread evenly over all classes. With guidance, half
    of the rows are conditional and the other half are their twins with the null class, even at steps outside its interval.
    Without guidance, all are conditional. The network sees :data:`MICRO_BATCH` rows at once, and the devices of ``mesh`` share
    such batches, so the devices do not affect the rows.

    Args:
      model: the float model.
      calibration: how many rows at how many steps, and how they are sampled.
      key: key of the noise.
      row_batch: as in :func:`channel_extremes`.
      mesh: its devices share the work.
      progress: called with (rows done, rows in all).

    Raises:
      Ptq4ditError: impossible numbers of steps or rows, or rows that hold NaN or infinity.
    """
    resolved = calibration.sampling.resolve(model.schedule, model.config)
    chain = resolved.tables().t
    steps, rows = calibration_steps(calibration.steps, len(chain)), calibration.rows
    guided = resolved.guidance.guided is not None
    if rows < 1 or (guided and rows % 2):
        raise Ptq4ditError(f"Calibration rows must be positive, and even under guidance (pairs of twins), not {rows}.")
    count = rows // 2 if guided else rows
    labels = spread_labels(count, model.config.num_classes)
    positions = np.round(np.linspace(0, len(chain) - 1, steps)).astype(int)
    x = kept_inputs(
        model,
        labels,
        key,
        resolved,
        positions,
        batch_size=min(count, MICRO_BATCH // 2 if guided else MICRO_BATCH),
        mesh=mesh,
        ahead=_ahead(row_batch),
        progress=progress,
        what="Calibration row",
    )
    y = np.tile(labels, (steps, 1))
    if guided:
        x = np.concatenate([x, x], axis=1)
        y = np.concatenate([y, np.full_like(y, model.config.null_label)], axis=1)
    return CalibrationData(x=x, t=chain[positions], y=y)


def spread_labels(count: int, num_classes: int) -> np.ndarray:
    """Returns ``count`` labels spread evenly over all classes, (count,) int32; zeros where there are no classes."""
    if not num_classes:
        return np.zeros(count, np.int32)
    if count >= num_classes:
        return (np.arange(count) % num_classes).astype(np.int32)
    return (np.arange(count) * num_classes // count).astype(np.int32)


def stored_rows(
    x: Float[ArrayLike, "*shape"],
    t: Num[ArrayLike, "*steps"],
    y: Integer[ArrayLike, "*images"] | None,
    config: DiTConfig,
    schedule: Schedule | None = None,
    *,
    layout: ImageLayout = "auto",
) -> CalibrationData:
    """Takes calibration rows from the user: ``x`` (M, H, W, C), ``t`` (M,), ``y`` (M,) labels, None where there are no classes.

    They may also lie step by step, ``x`` (S, N, H, W, C), ``t`` (S, N) or (S,), ``y`` (S, N) or (N,). Channels may come first,
    (C, H, W): PTQ4DiT's authors store (S, N, C, H, W). ``layout`` (``NHWC`` or ``NCHW``) says which it is where C equals H.

    ``t`` is what the network sees: timesteps of the model's ``schedule`` (the published 1000 by default), whole numbers, or
    times of its flow, 0 to 1. Rows of one timestep make a step if all timesteps have equally many. Otherwise, neighbours in
    time make up to 25 steps of equally many rows, in which each row keeps its own timestep (``t`` (S, R)). The remainder, fewer
    than 25 rows, is left out.

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


class ChannelExtremes(struct.PyTreeNode):
    """Observer of the least and greatest values and the mean square per channel; each is (*features), or (R, *features).

    ``power`` is that of the last batch seen, at most :data:`MOST_POWER`; the extremes are those of all batches.
    """

    low: Float[Array, "*features"]
    high: Float[Array, "*features"]
    power: Float[Array, "*features"]
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


class Histogram(struct.PyTreeNode):
    """Observer that counts values in equal bins between ``low`` and ``high`` (): ``counts`` (bins,) float32. The end bins take
    what lies outside."""

    low: Float[Array, "*lead"]
    high: Float[Array, "*lead"]
    counts: Float32[Array, "*lead bins"]

    def observe(self, x: jax.Array) -> Histogram:
        bins = self.counts.shape[-1]
        span = self.high - self.low
        position = (x.astype(jnp.float32).ravel() - self.low) * jnp.where(span > 0, bins / span, 0.0)
        index = jnp.clip(position.astype(jnp.int32), 0, bins - 1)
        seen = jax.lax.platform_dependent(
            index, cuda=partial(_occurrences, bins, _COPIES), default=partial(_occurrences, bins, 1)
        )
        return Histogram(low=self.low, high=self.high, counts=self.counts + seen.astype(self.counts.dtype))


def _occurrences(bins: int, copies: int, index: jax.Array) -> jax.Array:
    """Counts how often each number below ``bins`` is in ``index`` (n,): (bins,) int32, via several copies of the result."""
    copy = jnp.arange(index.size, dtype=jnp.int32) % copies
    # Counted in integers: float32 stops counting in ones at 2^24.
    return jnp.zeros(copies * bins, jnp.int32).at[copy * bins + index].add(1).reshape(copies, bins).sum(0, dtype=jnp.int32)


@jax.jit
def _finite_steps(statistics: dict[str, ChannelExtremes]) -> dict[str, jax.Array]:
    """Returns whether all of a site's statistics are finite, at each step (S,)."""
    finite = lambda a: jnp.isfinite(a).all(tuple(range(1, a.ndim)))
    return {name: finite(s.low) & finite(s.high) & finite(s.power) for name, s in statistics.items()}


def check_finite(statistics: Mapping[str, ChannelExtremes], t: ArrayLike) -> None:
    """Raises if channel statistics hold NaN or infinity, naming the site and the step. ``t`` (S,) are the steps' times."""
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


def channel_extremes(
    model: FloatDiT,
    data: CalibrationData,
    *,
    sites: tuple[str, ...],
    per_row: bool = False,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, ChannelExtremes]:
    """Gathers per-channel extremes at every step, with one scan per micro-batch of rows.

    Args:
      model: the float model, (partly) folded or not, on one device.
      data: S steps of R rows.
      sites: names as in ``config.site_features``.
      per_row: keep the rows apart (the official code's SSC weights rows).
      row_batch: rows in flight on each device, to bound memory: at least a micro-batch, by default two. It does not affect the
        result.
      mesh: its devices share the micro-batches. They do not affect the result either.

    Returns:
      For each site, leaves (S, [L,] *features), or (S, [L,] R, *features) with ``per_row``; on the model's device.
    """
    cuts, found = micro_batches(data.num_rows), list[dict[str, ChannelExtremes]]()
    program = partial(extremes_of_rows, sites=sites, per_row=per_row)
    for cut, seen in zip(cuts, _of_micro_batches(program, model, data, row_batch, mesh), strict=True):
        if per_row:
            found.append(seen)
        else:
            seen = _weighted(seen, np.float32((cut.stop - cut.start) / data.num_rows))
            found = [_merged_extremes(found[0], seen) if found else seen]
    if not per_row:
        return found[0]
    row_axis = lambda name: 1 + len(model.config.spec.sites[name].place.lead)
    join = lambda name: jax.tree.map(lambda *parts: jnp.concatenate(parts, row_axis(name)), *[part[name] for part in found])
    return {name: join(name) for name in sites}


def histograms(
    model: FloatDiT,
    data: CalibrationData,
    groups: ArrayLike,
    ranges: Mapping[str, tuple[jax.Array, jax.Array]],
    *,
    num_groups: int,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Histogram]:
    """Counts histograms of the values at each site, per group of steps, with one scan per micro-batch of rows.

    Args:
      model: the folded float model, on one device.
      data: S steps of R rows.
      groups: (S,) int32, the group of each step.
      ranges: by site, outer edges (low, high), each (G, [L]).
      num_groups: G.
      row_batch, mesh: as for :func:`channel_extremes`.

    Returns:
      For each site a :class:`Histogram` with leaves (G, [L]) and counts (G, [L,] bins).
    """
    shared = (model, np.asarray(groups, np.int32), dict(ranges))
    program = lambda shared, rows: histograms_of_rows(shared[0], rows, *shared[1:], num_groups=num_groups)
    total: dict[str, Histogram] = {}
    for seen in _of_micro_batches(program, shared, data, row_batch, mesh):
        total = _merged_histograms(total, seen) if total else seen
    return total


def _ahead(row_batch: int | None) -> int:
    """Returns how many micro-batches a device has in flight: two, so that none waits for the host, or by ``row_batch``."""
    return 2 if row_batch is None else max(1, row_batch // MICRO_BATCH)


def _of_micro_batches(
    program: Callable[[_Shared, CalibrationData], _Seen],
    shared: _Shared,
    data: CalibrationData,
    row_batch: int | None,
    mesh: Mesh | None,
) -> Iterator[_Seen]:
    """Yields ``program(shared, rows)`` of each micro-batch, in order, at the first place."""
    cuts = micro_batches(data.num_rows)
    shared, home = sharding.own(shared), sharding.home(mesh)
    at = {place: placement.put(shared, place) for place in sharding.own_places_of(mesh, len(cuts))}
    run = lambda item, place: program(at[place], sharding.put(data.rows(cuts[item]), place))
    like = lambda item: jax.eval_shape(program, shared, data.rows(cuts[item]))
    for seen in sharding.deal_out(run, len(cuts), mesh, like=like, ahead=_ahead(row_batch)):
        yield sharding.put(seen, home)


# Each is one program on one device, on whole arrays: the same bits whatever made them.
@partial(jax.jit, donate_argnums=0)
def _weighted(seen: dict[str, ChannelExtremes], share: jax.Array) -> dict[str, ChannelExtremes]:
    share = share.astype(jax.tree.leaves(seen)[0].dtype)
    return {name: dataclasses.replace(part, power=part.power * share) for name, part in seen.items()}


@partial(jax.jit, donate_argnums=0)
def _merged_extremes(total: dict[str, ChannelExtremes], seen: dict[str, ChannelExtremes]) -> dict[str, ChannelExtremes]:
    def merge(a: ChannelExtremes, b: ChannelExtremes) -> ChannelExtremes:
        low, high = jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
        return ChannelExtremes(low=low, high=high, power=a.power + b.power, per_row=a.per_row)

    return {name: merge(total[name], seen[name]) for name in total}


@partial(jax.jit, donate_argnums=0)
def _merged_histograms(total: dict[str, Histogram], seen: dict[str, Histogram]) -> dict[str, Histogram]:
    return {name: dataclasses.replace(part, counts=part.counts + seen[name].counts) for name, part in total.items()}


@partial(jax.jit, static_argnames=("sites", "per_row"))
def extremes_of_rows(
    model: FloatDiT, data: CalibrationData, *, sites: tuple[str, ...], per_row: bool = False
) -> dict[str, ChannelExtremes]:
    """:func:`channel_extremes` of one micro-batch: one program, with one scan over the steps."""
    config = model.config
    rows = data.num_rows

    def start(name: str) -> ChannelExtremes:
        site = config.spec.sites[name]
        shape = site.place.lead + ((rows,) if per_row else ()) + site.features
        dtype = at_least_float32(model.dtype)
        low, high = jnp.full(shape, jnp.inf, dtype), jnp.full(shape, -jnp.inf, dtype)
        return ChannelExtremes(low=low, high=high, power=jnp.zeros(shape, dtype), per_row=per_row)

    observers = nest_sites({name: start(name) for name in sites})

    def step(carry: None, batch: CalibrationData) -> tuple[None, Any]:
        _, seen = model.observe(observers, batch.x, _timestep(batch, rows if per_row else 1), batch.y)
        return carry, seen

    return flatten_sites(jax.lax.scan(step, None, data)[1])


@partial(jax.jit, static_argnames=("num_groups",))
def histograms_of_rows(
    model: FloatDiT,
    data: CalibrationData,
    groups: jax.Array,
    ranges: Mapping[str, tuple[jax.Array, jax.Array]],
    *,
    num_groups: int,
) -> dict[str, Histogram]:
    """:func:`histograms` of one micro-batch: one program, with one scan over the steps that carries the counts."""
    start = {
        name: Histogram(low, high, jnp.zeros((*low.shape, HISTOGRAM_BINS), jnp.float32)) for name, (low, high) in ranges.items()
    }

    def step(carry: dict[str, Any], batch: tuple[CalibrationData, jax.Array]) -> tuple[dict[str, Any], None]:
        part, group = batch
        current = jax.tree.map(lambda a: a[group], carry)
        _, seen = model.observe(current, part.x, _timestep(part, 1), part.y)
        return jax.tree.map(lambda a, new: a.at[group].set(new), carry, seen), None

    carry, _ = jax.lax.scan(step, nest_sites(start), (data, groups))
    return flatten_sites(carry)


def _timestep(batch: CalibrationData, rows: int) -> jax.Array | np.ndarray:
    """Returns the timestep of each row, or a shared one as (rows,); one row is enough where all share it."""
    return batch.t if batch.t.ndim else jnp.broadcast_to(batch.t, (rows,))
