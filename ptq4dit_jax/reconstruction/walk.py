"""Hidden states of all rows for rounding and reconstruction: in floats, and behind the quantized prefix."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ptq4dit_jax import memory, sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import RowsOn
from ptq4dit_jax.engine import QuantizedDiT, site_quantizers
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.networks.spec import Role, flatten_sites
from ptq4dit_jax.numerics import EXACT
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.fake_quant import scaled
from ptq4dit_jax.reconstruction.optimize import Rows
from ptq4dit_jax.reconstruction.rounded_units import RoundedUnit
from ptq4dit_jax.reconstruction.units import Unit

#: On the device, or on the host with ``plan.on_host``.
HeldRows: TypeAlias = jax.Array | np.ndarray
_Tree = TypeVar("_Tree")
#: The least error of a unit: where rounding to the nearest reproduces it, nothing must be divided by 0.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device: ``models`` for float and quantized parameters, ``rows`` for hidden states, ``step`` for the work on
    a block besides. ``limit`` is None where it is not known."""

    models: int
    rows: int
    step: int
    limit: int | None
    on_host: bool

    @property
    def peak(self) -> int:
        return self.models + self.step + (0 if self.on_host else self.rows)

    def __str__(self) -> str:
        where = f"rows, {self.rows / 1e9:.1f} GB, " + ("stream from the host" if self.on_host else "stay on the device")
        limit = "" if self.limit is None else f" of {self.limit / 1e9:.0f}"
        return f"needs {self.peak / 1e9:.1f}{limit} GB per device; {where}"


class Walk(abc.ABC):
    """Walks both hidden states through the network unit by unit.

    Rows lie as in :class:`Rows`: leaves (M, B, ...), sharded over the B strata. With ``plan.on_host`` they are NumPy arrays.
    """

    def __init__(
        self,
        folded: FloatDiT,
        quantized: QuantizedDiT,
        calibration: CalibrationData,
        mesh: Mesh | None,
        *,
        batch_size: int,
        chunks: int,
        dtype: str,
        precision: jax.lax.Precision = EXACT,
        rows_on: RowsOn = "auto",
    ) -> None:
        folded, quantized = sharding.own((folded, quantized))
        self.folded, self.quantized, self.mesh = folded, quantized, mesh
        self.config = folded.config
        self.batch_size, self.chunks, self.dtype, self.precision = batch_size, chunks, dtype, precision
        self.acts = site_quantizers(quantized)
        self.balances = flatten_sites(folded.quantizers)

        count = calibration.num_steps * calibration.num_rows
        size = -(-count // batch_size)
        # Rows are in the order of the steps, so strata follow the steps, and every batch sees the whole chain. Where rows do
        # not fill the strata, some are repeated.
        order = (np.arange(batch_size * size) * count // (batch_size * size)).reshape(batch_size, size).T
        flat = lambda rows: np.asarray(rows).reshape(count, *rows.shape[2:])[order]
        t = np.asarray(calibration.t)
        t = np.repeat(t, calibration.num_rows) if t.ndim == 1 else t.reshape(count)
        group = step_group(quantized.group_edges, quantized.schedule.noise_level(jnp.append(t, t[:1])))[:count]
        self.num_steps = calibration.num_steps
        self.plan = self._plan(size, rows_on)
        self.x, self.t, self.y = (self._place(rows) for rows in (flat(calibration.x), t[order], flat(calibration.y)))
        self.step = self._place(np.repeat(np.arange(calibration.num_steps), calibration.num_rows)[order])
        self.group = self._place(np.asarray(group)[order])
        self.weight = self._place(np.ones(order.shape, np.float32))
        #: How much each row counts, so that the copies of a row count once in all.
        self.share = self._place((1 / np.bincount(order.ravel()))[order].astype(np.float32))
        self.float_x = self.quant_x = self.float_c = self.quant_c = self.x

    def _place(self, rows: np.ndarray) -> HeldRows:
        return rows if self.plan.on_host else sharding.shard(self.mesh, rows, axis=1)

    def _plan(self, size: int, rows_on: RowsOn) -> MemoryPlan:
        config = self.config
        hidden = self.batch_size * config.num_tokens * config.hidden_size * jnp.dtype(self.dtype).itemsize
        models = sum(map(sharding.bytes_per_device, jax.tree.leaves((self.folded.params, self.quantized))))
        limit = sharding.least(self.mesh, memory.device_limit())
        rows = 4 * size * hidden // sharding.data_size(self.mesh)  # float and quantized state, and the next of each
        on_host = rows_on == "host"
        step = self._step_bytes(size, on_host)
        if rows_on == "auto" and limit is not None and models + rows + step > 0.9 * limit:
            on_host = True
            step = self._step_bytes(size, on_host)
        return MemoryPlan(models=models, rows=rows, step=step, limit=limit, on_host=on_host)

    @abc.abstractmethod
    def _step_bytes(self, size: int, on_host: bool) -> int:
        """Returns the bytes that work on a block needs on a device besides models and rows; a stratum holds ``size`` rows."""

    def part(self, unit: Unit, tree: _Tree) -> _Tree:
        """Returns what a tree of stacks holds for a unit, whole, even if devices share the model."""
        return sharding.put(unit.of_depth(tree), sharding.home(self.mesh))

    def tables(self, unit: Unit) -> dict[str, Any]:
        """Returns the parameters of a unit that are looked up or added, and the gains of its norms."""
        params = self.folded.params
        gains = {gain.place.name: self.part(unit, gain.place.of(params)) for gain in unit.kind.gains}
        return {name: self.part(unit, params[name]) for name in unit.tables if name in params} | gains

    def params(self, unit: Unit, layer: str) -> Any:
        """Returns the float kernel (K, N) and bias (N,) of a layer of a unit."""
        return self.part(unit, self.folded.layer(unit.layers[layer]))

    def float_unit(self, unit: Unit) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the float parameters of a unit, and what folding left at its sites."""
        params = {layer: self.params(unit, layer) for layer in unit.layers} | self.tables(unit)
        balanced = {site: name for site, name in unit.sites.items() if name in self.balances}
        return params, {site: self.part(unit, self.balances[name]) for site, name in balanced.items()}

    def act_quantizers(self, unit: Unit) -> dict[str, Any]:
        """Returns the activation quantizers of a unit, by site; leaves are tables over groups of steps (G,)."""
        return {site: self.part(unit, self.acts[name]) for site, name in unit.sites.items() if name in self.acts}

    def nearest(self, unit: Unit) -> RoundedUnit:
        """Returns a unit as range search rounded it."""
        weights = {layer: self.part(unit, self.quantized.linears[name].stored) for layer, name in unit.layers.items()}
        biases = {layer: self.params(unit, layer)["bias"] for layer in unit.layers}
        return RoundedUnit(weights, biases, {})

    def inputs(self, unit: Unit) -> tuple[tuple[HeldRows, ...], tuple[HeldRows, ...]]:
        """Returns a unit's inputs behind the quantized and behind the float prefix, as :func:`apply_unit` takes them."""
        if unit.kind.role is Role.IMAGE:
            return (self.x,), (self.x,)
        if unit.kind.role is Role.CONDITION:
            return (self.t, self.y), (self.t, self.y)
        return (self.quant_x, self.quant_c), (self.float_x, self.float_c)

    def rows(self, unit: Unit) -> Rows[HeldRows]:
        """Returns the unit's inputs from the quantized prefix, and the float unit's outputs."""
        quant, exact = self.inputs(unit)
        shared = sharding.replicate(self.mesh, self.float_unit(unit))
        target, _ = self._over_rows(optimize.float_outputs, shared, unit, exact)
        return Rows(inputs=quant, target=target, group=self.group, weight=self.weight)

    def outputs(self, unit: Unit, rounded: RoundedUnit, rows: Rows[HeldRows]) -> tuple[HeldRows, jax.Array]:
        """Returns the rounded unit's outputs for the rows, (M, B, ...), and its mean squared error () float32."""
        shared = _fake_quantized(*sharding.replicate(self.mesh, (rounded, self.act_quantizers(unit), self.tables(unit))))
        outputs, errors = self._over_rows(optimize.rounded_outputs, shared, unit, rows)
        return outputs, jnp.maximum(np.asarray(sharding.to_host(errors)).mean(dtype=np.float64).astype(np.float32), TINY)

    def _over_rows(
        self,
        function: Callable[..., tuple[jax.Array, jax.Array]],
        shared: tuple[dict[str, Any], dict[str, Any]],
        unit: Unit,
        rows: Rows[HeldRows] | tuple[HeldRows, ...],
    ) -> tuple[HeldRows, HeldRows]:
        """Maps a function of :mod:`optimize` over rows (M, B, ...), batch by batch where they are on the host."""
        run = partial(
            optimize.over_rows,
            function,
            shared,
            config=self.config,
            kind=unit.kind,
            dtype=self.dtype,
            precision=self.precision,
            chunks=self.chunks,
            mesh=self.mesh,
        )
        if not self.plan.on_host:
            return run(rows)

        def one(m: int) -> tuple[np.ndarray, np.ndarray]:
            batch = jax.tree.map(lambda leaf: leaf[m : m + 1], rows)
            return sharding.to_host(run(sharding.shard(self.mesh, batch, axis=1)))

        outputs, errors = zip(*(one(m) for m in range(self.group.shape[0])), strict=True)
        return np.concatenate(outputs), np.concatenate(errors)

    def advance(self, unit: Unit, quantized: HeldRows, exact: HeldRows) -> None:
        """Moves both hidden states past the unit."""
        if unit.kind.role is Role.CONDITION:
            self.quant_c, self.float_c = quantized, exact
        elif unit.kind.role is not Role.HEAD:
            self.quant_x, self.float_x = quantized, exact


@jax.jit
def _fake_quantized(
    rounded: RoundedUnit, acts: dict[str, Any], tables: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what :func:`optimize.rounded_outputs` takes as ``shared``."""
    acts = {site: scaled(act, rounded.log_scale[site]) if site in rounded.log_scale else act for site, act in acts.items()}
    return rounded.params() | tables, acts
