"""Calibration against plain Python loops over full activations, and the promise that the scan lets nothing large out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from helpers import same_bytes, tiny_config, tiny_model

from ptq4dit_jax import sharding
from ptq4dit_jax.calibration import (
    HISTOGRAM_BINS,
    MICRO_BATCH,
    CalibrationData,
    ChannelExtremes,
    Histogram,
    _occurrences,
    channel_extremes,
    extremes_of_rows,
    histograms,
    histograms_of_rows,
    micro_batches,
)
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites

STEPS, ROWS = 3, 4
CONFIG = tiny_config()
SITES = tuple(CONFIG.site_features)


@struct.dataclass
class Capture:
    """Observer that keeps the whole activation."""

    value: Any

    def observe(self, x: jax.Array) -> Capture:
        return Capture(x)


@jax.jit
def capture(model: FloatDiT, x: jax.Array, t: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    empty = {name: Capture(jnp.zeros(CONFIG.depth if name.startswith("blocks.") else ())) for name in SITES}
    _, seen = model.observe(nest_sites(empty), x, t, y)
    return {name: captured.value for name, captured in flatten_sites(seen).items()}


@pytest.fixture(scope="module")
def model() -> FloatDiT:
    return tiny_model()


@pytest.fixture(scope="module")
def data() -> CalibrationData:
    """Rows that grow from step to step and labels that repeat nowhere, so that mixing up steps or rows shows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, ROWS, *CONFIG.image_shape)) * np.array([1, 2, 4]).reshape(STEPS, 1, 1, 1, 1)
    return CalibrationData(
        x=x.astype(np.float32),
        t=np.array([999, 500, 20], np.int32),
        y=np.array([[0, 1, 2, 3], [4, 5, 0, 1], [2, 2, 5, 4]], np.int32),
    )


@pytest.fixture(scope="module")
def activations(model: FloatDiT, data: CalibrationData) -> list[dict[str, np.ndarray]]:
    """Every activation of every step by a plain loop; (L, ...) at block sites."""
    t = np.repeat(data.t[:, None], ROWS, axis=1)
    return [jax.tree.map(np.asarray, capture(model, data.x[s], t[s], data.y[s])) for s in range(STEPS)]


def expected_extremes(activations: list[dict[str, np.ndarray]], name: str, per_row: bool) -> tuple[np.ndarray, ...]:
    """Least value, greatest value and mean square per feature: (S, [L,] [R,] *features)."""
    features = CONFIG.site_features[name]
    statistics: list[list[np.ndarray]] = [[], [], []]
    for step in activations:
        layers = step[name] if name.startswith("blocks.") else step[name][None]
        keep = (len(layers), ROWS) if per_row else (len(layers),)
        values = layers.reshape(*keep, -1, *features)
        shape = keep[0 if name.startswith("blocks.") else 1 :] + features
        for found, reduce in zip(statistics, (values.min, values.max, np.square(values).mean), strict=True):
            found.append(reduce(len(keep)).reshape(shape))
    return tuple(np.stack(found) for found in statistics)


# --- per-channel extremes


@pytest.mark.parametrize(("per_row", "row_batch"), [(False, None), (False, 2), (True, 2)])
def test_extremes_equal_a_plain_loop(
    model: FloatDiT, data: CalibrationData, activations: list[dict[str, np.ndarray]], per_row: bool, row_batch: int | None
) -> None:
    seen = channel_extremes(model, data, sites=SITES, per_row=per_row, row_batch=row_batch)
    assert set(seen) == set(SITES)
    for name in SITES:
        low, high, power = expected_extremes(activations, name, per_row)
        depth = (CONFIG.depth,) if name.startswith("blocks.") else ()
        assert low.shape == (STEPS, *depth, *((ROWS,) if per_row else ()), *CONFIG.site_features[name])
        assert seen[name].low.shape == low.shape, name
        np.testing.assert_allclose(seen[name].low, low, rtol=1e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(seen[name].high, high, rtol=1e-5, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(seen[name].power, power, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(seen[name].salience, np.maximum(np.abs(low), np.abs(high)), rtol=1e-5, atol=2e-5)


def test_the_loop_tells_steps_and_rows_apart(activations: list[dict[str, np.ndarray]]) -> None:
    """Guards the comparison above: had all steps or rows the same extremes, it could not fail."""
    low, _, _ = expected_extremes(activations, "blocks.qkv_in", True)
    assert np.abs(low[0] - low[1]).max() > 0.1
    assert np.abs(low[:, :, 0] - low[:, :, 1]).max() > 0.1


def test_only_the_sites_asked_for_are_observed(model: FloatDiT, data: CalibrationData) -> None:
    shapes = jax.eval_shape(partial(extremes_of_rows, sites=("blocks.v", "final_in")), model, data)
    assert set(shapes) == {"blocks.v", "final_in"}


@pytest.mark.parametrize("per_row", [False, True])
def test_extremes_of_an_array_equal_numpy(per_row: bool) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 4, 6, 2, 5)).astype(np.float32)  # (batches, rows, tokens, heads, head width)
    shape = (4, 2, 5) if per_row else (2, 5)
    observer = ChannelExtremes(
        low=jnp.full(shape, jnp.inf), high=jnp.full(shape, -jnp.inf), power=jnp.zeros(shape), per_row=per_row
    )
    seen = observer.observe(jnp.asarray(first)).observe(jnp.asarray(second))
    both = np.concatenate([first, second], axis=1)  # more tokens
    axes = (1,) if per_row else (0, 1)
    np.testing.assert_array_equal(seen.low, both.min(axes))
    np.testing.assert_array_equal(seen.high, both.max(axes))
    np.testing.assert_array_equal(seen.salience, np.abs(both).max(axes))
    np.testing.assert_allclose(seen.power, np.square(second).mean(axes), rtol=1e-6)


# --- histograms


def test_a_histogram_equals_numpy() -> None:
    """Values stay clear of the edges of the bins, where one rounding more or less moves a count."""
    rng = np.random.default_rng(2)
    low, high, bins = np.float32(-3), np.float32(5), 64
    width = (high - low) / bins
    x = low + (rng.integers(0, bins, 5000) + rng.uniform(0.05, 0.95, 5000)) * width
    x[:20] += 100 * np.sign(x[:20])  # beyond the ends
    values = x.astype(np.float32).reshape(10, 500)
    start = Histogram(jnp.asarray(low), jnp.asarray(high), jnp.arange(bins, dtype=jnp.float32))
    expected = np.arange(bins) + np.histogram(np.clip(values, low, high), bins, (float(low), float(high)))[0]
    np.testing.assert_array_equal(start.observe(jnp.asarray(values)).counts, expected)
    np.testing.assert_array_equal(jax.jit(lambda h, x: h.observe(x))(start, values).counts, expected)


def test_a_histogram_without_width_counts_everything() -> None:
    seen = Histogram(jnp.float32(2), jnp.float32(2), jnp.zeros(8, jnp.float32)).observe(jnp.full((3, 5), 2.0))
    np.testing.assert_array_equal(seen.counts, [15] + [0] * 7)


def test_counts_go_on_beyond_what_float32_counts_in_ones() -> None:
    """2^24 + 1 is no float32. DiT-XL/2 at the default settings puts far more softmax outputs than that into the first bin."""
    full = Histogram(jnp.float32(0), jnp.float32(1), jnp.full(4, 2.0**24, jnp.float32))
    seen = full.observe(jnp.full(1000, 0.1))
    np.testing.assert_array_equal(seen.counts, [2**24 + 1000, 2**24, 2**24, 2**24])


@pytest.mark.parametrize("row_batch", [None, 2])
def test_histograms_equal_numpy_per_group(
    model: FloatDiT, data: CalibrationData, activations: list[dict[str, np.ndarray]], row_batch: int | None
) -> None:
    """Two groups with ranges of their own, one for each layer; the first range of group 0 is too narrow on purpose."""
    groups = np.array([0, 1, 0], np.int32)
    ranges: dict[str, Any] = {}
    for name in SITES:
        low, high, _ = expected_extremes(activations, name, False)
        all_but_depth = (0, *range(low.ndim - len(CONFIG.site_features[name]), low.ndim))
        ranges[name] = tuple(
            np.stack([pick(part[groups == g], all_but_depth) for g in range(2)]) * np.float32(1.01)
            for part, pick in ((low, np.min), (high, np.max))
        )
        ranges[name][0][0] *= 0.5
    seen = histograms(model, data, groups, ranges, num_groups=2, row_batch=row_batch)
    assert set(seen) == set(SITES)
    for name in SITES:
        low, high = ranges[name]
        counts = np.asarray(seen[name].counts)
        assert counts.shape == (*low.shape, HISTOGRAM_BINS)
        np.testing.assert_array_equal(seen[name].low, low)
        np.testing.assert_array_equal(seen[name].high, high)
        for group in range(2):
            steps = [activations[s][name] for s in range(STEPS) if groups[s] == group]
            layers = [np.stack(steps)[:, layer] for layer in range(CONFIG.depth)] if low.ndim == 2 else [np.stack(steps)]
            for layer, values in enumerate(layers):
                index = (group, layer) if low.ndim == 2 else (group,)
                clipped = np.clip(values, low[index], high[index])
                expected, _ = np.histogram(clipped, HISTOGRAM_BINS, (low[index], high[index]))
                # All rows share the timestep, so the sites that see nothing else run on one row of a micro-batch.
                share = 1 / ROWS if name in ("time_in", "time_hidden") else 1
                assert counts[index].sum() == share * values.size
                expected = expected * share
                difference = np.abs(np.cumsum(counts[index]) - np.cumsum(expected))
                assert difference.max() <= max(2, 2e-3 * values.size), (name, index)  # an ulp moves a value to the next bin


@pytest.mark.parametrize("copies", [1, 7, 256])
def test_counting_in_copies_changes_no_count(copies: int) -> None:
    index = np.random.default_rng(3).integers(0, 10, 1000).astype(np.int32) ** 2
    for count in (partial(_occurrences, 100, copies), jax.jit(partial(_occurrences, 100, copies))):
        assert (np.asarray(count(jnp.asarray(index))) == np.bincount(index, minlength=100)).all()
        assert count(jnp.asarray(index)).dtype == jnp.int32
        assert (np.asarray(count(jnp.asarray(index[:3]))) == np.bincount(index[:3], minlength=100)).all()


# --- nothing large leaves the scan


def scan_outputs(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of what the outermost scans of a program return."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from (variable.aval.shape for variable in equation.outvars)
            continue
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from scan_outputs(inner)


def group_ranges(groups: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    shape = {name: (groups, CONFIG.depth) if name.startswith("blocks.") else (groups,) for name in SITES}
    return {name: (np.full(shape[name], -1, np.float32), np.ones(shape[name], np.float32)) for name in SITES}


def rows_like(data: CalibrationData, rows: int) -> CalibrationData:
    cut = lambda a: np.resize(a, (STEPS, rows, *a.shape[2:]))
    return CalibrationData(x=cut(data.x), t=data.t, y=cut(data.y))


#: Softmax outputs have the key token as their last axis: their extremes are per key, a vector.
CHANNEL_SITES = tuple(name for name in SITES if name != "blocks.probs")


def test_the_check_for_a_token_axis_can_fail(model: FloatDiT, data: CalibrationData) -> None:
    def leaks(model: FloatDiT, data: CalibrationData) -> Any:
        step = lambda carry, batch: (carry, capture(model, batch.x, batch.t[None], batch.y)["blocks.qkv_in"])
        return jax.lax.scan(step, None, data)[1]

    shapes = list(scan_outputs(jax.make_jaxpr(jax.jit(leaks))(model, jax.tree.map(jnp.asarray, data)).jaxpr))
    assert any(CONFIG.num_tokens in shape for shape in shapes)


@pytest.mark.parametrize("per_row", [False, True])
def test_no_token_axis_leaves_the_scan_over_steps(model: FloatDiT, data: CalibrationData, per_row: bool) -> None:
    program = jax.make_jaxpr(partial(extremes_of_rows, sites=CHANNEL_SITES, per_row=per_row))(model, data)
    shapes = list(scan_outputs(program.jaxpr))
    assert len(shapes) == 3 * len(CHANNEL_SITES)
    assert all(CONFIG.num_tokens not in shape for shape in shapes)
    assert all(CONFIG.num_tokens not in variable.aval.shape for variable in program.jaxpr.outvars)


def test_no_token_axis_leaves_the_scan_of_histograms(model: FloatDiT, data: CalibrationData) -> None:
    program = jax.make_jaxpr(partial(histograms_of_rows, num_groups=2))(model, data, np.array([0, 0, 1]), group_ranges(2))
    shapes = list(scan_outputs(program.jaxpr))
    assert len(shapes) == 3 * len(SITES)
    assert all(CONFIG.num_tokens not in shape for shape in shapes)


def test_one_scan_walks_the_steps(model: FloatDiT, data: CalibrationData) -> None:
    """One compiled pass whatever the number of steps: the program for 3 steps is as long as the program for 2."""
    shorter = CalibrationData(x=data.x[:2], t=data.t[:2], y=data.y[:2])
    programs = [jax.make_jaxpr(partial(extremes_of_rows, sites=("blocks.v",)))(model, rows) for rows in (data, shorter)]
    lengths = [str(program).count("\n") for program in programs]
    assert lengths[0] == lengths[1]


def sizes(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_statistics_do_not_grow_with_the_rows(model: FloatDiT, data: CalibrationData) -> None:
    few, many = rows_like(data, 4), rows_like(data, 64)
    extremes = lambda rows, **how: sizes(jax.eval_shape(partial(extremes_of_rows, sites=SITES, **how), model, rows))
    assert extremes(few) == extremes(many)
    assert extremes(many, per_row=True) == 64 * extremes(many)

    ranges, groups = group_ranges(2), np.array([0, 0, 1])
    counted = [jax.eval_shape(partial(histograms_of_rows, num_groups=2), model, rows, groups, ranges) for rows in (few, many)]
    assert sizes(counted[0]) == sizes(counted[1])
    layers = sum(CONFIG.depth if name.startswith("blocks.") else 1 for name in SITES)
    assert sizes(counted[0]) == 2 * layers * (HISTOGRAM_BINS + 2)


# --- micro-batches, and devices that share them


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, [1]),
        (3, [3]),
        (8, [8]),
        (64, [8] * 8),
        (12, [6, 6]),
        (30, [6] * 5),
        (20, [5] * 4),
        (28, [7] * 4),
        (44, [4] * 11),
        (13, [8, 5]),
        (26, [8, 8, 8, 2]),
        (9, [8, 1]),
    ],
)
def test_micro_batches_are_decided_by_the_number_of_rows(rows: int, sizes: list[int]) -> None:
    cuts = micro_batches(rows)
    assert [cut.stop - cut.start for cut in cuts] == sizes
    assert max(sizes) <= MICRO_BATCH
    assert np.concatenate([np.arange(rows)[cut] for cut in cuts]).tolist() == list(range(rows))


def test_micro_batches_keep_rows_and_steps_together(data: CalibrationData) -> None:
    own_times = CalibrationData(x=data.x, t=np.arange(STEPS * ROWS).reshape(STEPS, ROWS), y=data.y)
    for given in (data, own_times):
        part = given.rows(slice(1, 3))
        np.testing.assert_array_equal(part.x, given.x[:, 1:3])
        np.testing.assert_array_equal(part.y, given.y[:, 1:3])
        np.testing.assert_array_equal(part.t, given.t if given is data else given.t[:, 1:3])


def many_rows(rows: int) -> CalibrationData:
    """Rows that all differ, more than any micro-batch holds."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(STEPS, rows, *CONFIG.image_shape)) * np.linspace(1, 4, rows).reshape(1, -1, 1, 1, 1)
    y = rng.integers(0, CONFIG.num_classes, (STEPS, rows)).astype(np.int32)
    return CalibrationData(x=x.astype(np.float32), t=np.array([999, 500, 20], np.int32), y=y)


@pytest.mark.parametrize(("rows", "per_row"), [(30, False), (13, False), (13, True)])
def test_extremes_of_several_micro_batches_equal_those_of_one(model: FloatDiT, rows: int, per_row: bool) -> None:
    """A rest counts by its rows, and rows that are kept apart keep their order."""
    data, sites = many_rows(rows), ("blocks.qkv_in", "blocks.v", "blocks.probs", "final_in")
    seen, whole = (watch(model, data, sites=sites, per_row=per_row) for watch in (channel_extremes, extremes_of_rows))
    for name in sites:
        for part in ("low", "high", "power"):
            ours, expected = (np.asarray(getattr(found[name], part)) for found in (seen, whole))
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5, err_msg=f"{name} {part}")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_devices_and_row_batches_change_no_statistic(model: FloatDiT, mesh8: Any, devices: int) -> None:
    """More micro-batches than devices, or fewer; one at a time, two or three."""
    data, mesh = many_rows(30), sharding.data_mesh(mesh8.devices.ravel()[:devices])
    groups, sites = np.array([0, 0, 1], np.int32), ("blocks.v", "blocks.qkv_in")
    ranges = {name: (jnp.full((2, CONFIG.depth), -3.0), jnp.full((2, CONFIG.depth), 3.0)) for name in sites}
    for watch in (
        partial(channel_extremes, model, data, sites=SITES),
        partial(channel_extremes, model, data, sites=("blocks.v", "final_in"), per_row=True),
        partial(histograms, model, data, groups, ranges, num_groups=2),
    ):
        alone = watch()
        assert same_bytes(watch(mesh=mesh), alone)
        assert same_bytes(watch(row_batch=3), alone)
        assert same_bytes(watch(row_batch=24, mesh=mesh), alone)


def test_the_devices_share_the_rows(mesh8: Any) -> None:
    """In turn, each in a program of one device, and no more begun than asked for."""
    begun: list[tuple[int, Any]] = []

    def run(item: int, device: Any) -> jax.Array:
        begun.append((item, device))
        return jax.device_put(np.float32(item), device)

    mesh = sharding.data_mesh(mesh8.devices.ravel()[:3])
    results = sharding.deal_out(run, 8, mesh, like=lambda item: jnp.zeros(()), ahead=2)
    assert float(next(results)) == 0
    assert len(begun) == 6
    assert [float(result) for result in results] == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(begun, key=lambda pair: pair[0]) == [(item, mesh.devices[item % 3]) for item in range(8)]
    alone = list(sharding.deal_out(lambda item, device: (item, device), 3, None, like=lambda item: (item, None)))
    assert alone == [(0, None), (1, None), (2, None)]
