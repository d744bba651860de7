"""The float and the quantized hidden state on their way through the network, in device memory or on the host."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ptq4dit_jax import dit, memory, sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.devices import default_device
from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.engine import QuantizedDiT, site_quantizers
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.numerics import EXACT, threefry
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.optimize import Rows, Task, TrainState, Variables
from ptq4dit_jax.reconstruction.rounding import RoundedKernel
from ptq4dit_jax.reconstruction.units import Kind, Unit
from ptq4dit_jax.waiting import ready

#: Iterations whose batches are sent to the device at once where rows stay on the host.
_BATCHES_SENT = 20
#: One program for each shape, where each operation would be one.
_rounded_kernel = jax.jit(RoundedKernel.of)
#: A part that rounding to the nearest already reproduces has nothing to learn, and its error must not be divided by 0.
_TINY = 1e-30


@lru_cache(maxsize=32)
def _compiled(
    structure: Any, shapes: tuple[Any, ...], mesh: Mesh | None, config: DiTConfig, kind: Kind, settings: Reconstruction,
    dtype: str, parts: int, drawn: bool,
) -> Any:  # fmt: skip
    """The program of :func:`optimize.train` for arguments of that structure: rows sharded over their strata, the rest whole."""
    static = {"config": config, "kind": kind, "settings": settings, "dtype": dtype, "parts": parts, "drawn": drawn}
    train: Any = partial(cast(Any, optimize.train), **static, devices=sharding.data_size(mesh))
    whole, strata = PartitionSpec(), PartitionSpec(None, "data")
    if mesh is not None:
        places = (whole, whole, strata, whole, whole, whole)
        train = jax.shard_map(train, mesh=mesh, in_specs=places, out_specs=whole, check_vma=False)
    at = lambda spec: None if mesh is None else NamedSharding(mesh, spec)
    state, task, rows, *others = jax.tree.unflatten(
        structure, [jax.ShapeDtypeStruct(*shape, sharding=at(whole)) for shape in shapes]
    )
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at(strata)), rows)
    return jax.jit(train, donate_argnums=0).lower(state, task, rows, *others).compile()


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device: ``models`` are the float and the quantized parameters, ``rows`` the hidden states, ``step`` what an
    iteration of a block needs besides. ``limit`` is None where it is not known."""

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
        return f"needs {self.peak / 1e9:.1f}{limit} GB a device; {where}"


def check_mesh(settings: Reconstruction, mesh: Mesh | None) -> None:
    """Refuses a batch that the mesh cannot share."""
    devices = sharding.data_size(mesh)
    if settings.batch_size % devices:
        raise Ptq4ditError(
            f"A reconstruction batch of {settings.batch_size} rows cannot be spread over {devices} devices; use a multiple."
        )
    parts = settings.gradient_parts(default_device().platform)
    if parts > 1 and parts % devices:
        raise Ptq4ditError(f"The {parts} parts of a batch cannot be spread over {devices} devices; use a multiple.")


class Walk:
    """Walks both hidden states through the network part by part; see :func:`ptq4dit_jax.reconstruction.reconstruct`.

    Rows lie as in :class:`Rows`: leaves (M, B, ...), sharded over the B strata. With ``plan.on_host`` they are NumPy arrays.
    """

    def __init__(
        self,
        folded: FloatDiT,
        quantized: QuantizedDiT,
        calibration: CalibrationData,
        settings: Reconstruction,
        mesh: Mesh | None,
    ) -> None:
        check_mesh(settings, mesh)
        self.folded, self.quantized, self.settings, self.mesh = folded, quantized, settings, mesh
        self.config = folded.config
        platform = default_device().platform
        self.dtype = settings.dtype if settings.dtype != "auto" else ("float32" if platform == "cpu" else "bfloat16")
        self.parts = settings.gradient_parts(platform)
        self.acts = site_quantizers(quantized)
        self.balances = dit.flatten_sites(folded.quantizers)

        count, strata = calibration.num_steps * calibration.num_rows, settings.batch_size
        size = -(-count // strata)
        # Rows are in the order of the steps, so strata follow the steps, and every batch sees all of the chain. Where rows do
        # not fill the strata, some are there twice.
        order = (np.arange(strata * size) * count // (strata * size)).reshape(strata, size).T
        flat = lambda rows: np.asarray(rows).reshape(count, *rows.shape[2:])[order]
        t = np.asarray(calibration.t)
        t = np.repeat(t, calibration.num_rows) if t.ndim == 1 else t.reshape(count)
        group = step_group(quantized.group_edges, quantized.schedule.noise_level(jnp.append(t, t[:1])))[:count]
        self.num_steps = calibration.num_steps
        self.plan = self._plan(size)
        self.x, self.t, self.y = (self._place(rows) for rows in (flat(calibration.x), t[order], flat(calibration.y)))
        self.step = self._place(np.repeat(np.arange(calibration.num_steps), calibration.num_rows)[order])
        self.group = self._place(np.asarray(group)[order])
        self.float_x = self.quant_x = self.float_c = self.quant_c = self.x

    def _place(self, rows: Any) -> Any:
        return rows if self.plan.on_host else sharding.shard(self.mesh, rows, axis=1)

    def _plan(self, size: int) -> MemoryPlan:
        """What an iteration of a block takes is read off its compiled program, which the run then uses."""
        config, parts = self.config, sharding.data_size(self.mesh)
        hidden = self.settings.batch_size * config.num_tokens * config.hidden_size * jnp.dtype(self.dtype).itemsize
        models = sum(leaf.nbytes for leaf in jax.tree.leaves((self.folded.params, self.quantized)))
        limit = memory.device_limit()
        rows = 4 * size * hidden // parts  # float and quantized state, and the next of either
        on_host = self.settings.rows_on == "host"
        step = self._step_bytes(size, on_host)
        if self.settings.rows_on == "auto" and limit is not None and models + rows + step > 0.9 * limit:
            on_host = True
            step = self._step_bytes(size, on_host)
        return MemoryPlan(models=models, rows=rows, step=step, limit=limit, on_host=on_host)

    def _step_bytes(self, size: int, on_host: bool) -> int:
        lead = (_BATCHES_SENT if on_host else size, self.settings.batch_size)
        T, D = self.config.num_tokens, self.config.hidden_size
        hidden = jax.ShapeDtypeStruct((*lead, T, D), self.dtype)
        condition = jax.ShapeDtypeStruct((*lead, D), self.dtype)
        group, weight = (jax.ShapeDtypeStruct(lead, dtype) for dtype in (jnp.int32, jnp.float32))
        rows = Rows(inputs=(hidden, condition), target=hidden, group=group, weight=weight)
        task, variables = jax.eval_shape(partial(self.task, Unit("block")))
        state = jax.eval_shape(lambda variables: optimize.start(variables, self.settings), variables)
        others = jax.eval_shape(lambda: (jnp.float32(0), threefry(jax.random.key(0)), jnp.int32(0)))
        needed = memory.program_bytes(self._program("block", on_host, state, task, rows, *others))
        of_rows = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows)) // sharding.data_size(self.mesh)
        return max(0, needed - (0 if on_host else of_rows))

    def _program(self, kind: Kind, drawn: bool, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return _compiled(structure, shapes, self.mesh, self.config, kind, self.settings, self.dtype, self.parts, drawn)

    def task(self, unit: Unit) -> tuple[Task, Variables]:
        """What is fixed and what is learned for a part, at the float weights."""
        kernels, biases, rounding = {}, {}, {}
        for layer, name in unit.layers.items():
            tree = self._params(unit, layer)
            kernels[layer], rounding[layer] = _rounded_kernel(
                tree["kernel"], unit.of_depth(name, self.quantized.linears[name].weight)
            )
            biases[layer] = tree["bias"]
        acts = {site: unit.of_depth(name, self.acts[name]) for site, name in unit.sites.items() if name in self.acts}
        log_scale = {site: jnp.zeros_like(act.scale) for site, act in acts.items() if not act.dynamic}
        return Task(kernels, biases, acts, self._tables(unit)), Variables(rounding, log_scale)

    def _tables(self, unit: Unit) -> dict[str, Any]:
        return {name: self.folded.params[name] for name in unit.tables if name in self.folded.params}

    def _params(self, unit: Unit, layer: str) -> Any:
        if unit.kind != "block":
            return self.folded.params[layer]
        return jax.tree.map(lambda leaf: leaf[unit.index], self.folded.params["blocks"][layer])

    def _over_rows(self, function: Any, shared: Any, unit: Unit, rows: Any) -> tuple[Any, Any]:
        """A function of :mod:`optimize` over rows (M, B, ...), batch by batch where they are on the host."""
        run = partial(
            optimize.over_rows, function, shared, config=self.config, kind=unit.kind, dtype=self.dtype,
            parts=self.parts, mesh=self.mesh,
        )  # fmt: skip
        if not self.plan.on_host:
            return run(rows)

        def one(m: int) -> Any:
            batch = jax.tree.map(lambda leaf: leaf[m : m + 1], rows)
            return jax.device_get(ready(run(sharding.shard(self.mesh, batch, axis=1))))

        outputs, errors = zip(*(one(m) for m in range(self.group.shape[0])), strict=True)
        return np.concatenate(outputs), np.concatenate(errors)

    def rows(self, unit: Unit) -> Rows:
        """The part's inputs from the quantized prefix, and the float part's outputs."""
        quant: tuple[Any, ...] = (self.quant_x, self.quant_c)
        exact: tuple[Any, ...] = (self.float_x, self.float_c)
        if unit.kind == "embed_image":
            quant = exact = (self.x,)
        elif unit.kind == "embed_condition":
            quant = exact = (self.t, self.y)
        params = {layer: self._params(unit, layer) for layer in unit.layers} | self._tables(unit)
        balanced = {site: name for site, name in unit.sites.items() if name in self.balances}
        balances = {site: unit.of_depth(name, self.balances[name]) for site, name in balanced.items()}
        target, _ = self._over_rows(optimize.float_outputs, sharding.replicate(self.mesh, (params, balances)), unit, exact)
        weight = self._place(np.ones(self.group.shape, np.float32))
        if self.settings.row_weights == "steps" and unit.kind == "block":
            weight = self._place(np.asarray(_step_weights(self.float_x, target, self.step, self.num_steps)))
        return Rows(inputs=quant, target=target, group=self.group, weight=weight)

    def outputs(self, unit: Unit, variables: Variables, task: Task, rows: Rows) -> tuple[Any, jax.Array]:
        """With decided roundings: the part's outputs (M, B, ...), and the mean squared error ()."""
        outputs, errors = self._over_rows(optimize.quantized_outputs, (variables, task), unit, rows)
        return outputs, jnp.maximum(np.asarray(ready(errors)).mean(dtype=np.float64).astype(np.float32), _TINY)

    def train(
        self, unit: Unit, state: TrainState, task: Task, rows: Rows, before: jax.Array, key: jax.Array, stop: int
    ) -> TrainState:
        """Iterations up to ``stop``."""
        before, key = sharding.replicate(self.mesh, (jnp.float32(before), key))
        on_host = self.plan.on_host
        done = int(state.iteration)
        while done < stop:
            until = min(stop, done + _BATCHES_SENT) if on_host else stop
            given = self._drawn(rows, key, done) if on_host else rows
            arguments = (state, task, given, before, key, sharding.replicate(self.mesh, jnp.int32(until)))
            state, done = self._program(unit.kind, on_host, *arguments)(*arguments), until
        return ready(state)

    def _drawn(self, rows: Rows, key: jax.Array, first: int) -> Rows:
        """The batches (n, B, ...) of the next iterations, on the device."""
        size, strata = rows.group.shape
        iterations = first + jnp.arange(_BATCHES_SENT, dtype=jnp.int32)
        chosen = np.asarray(jax.vmap(lambda i: optimize.chosen_rows(key, i, size, strata))(iterations))
        return sharding.shard(self.mesh, jax.tree.map(lambda leaf: leaf[chosen, np.arange(strata)], rows), axis=1)

    def advance(self, unit: Unit, quantized: Any, exact: Any) -> None:
        """Both hidden states move past the part."""
        if unit.kind == "embed_condition":
            self.quant_c, self.float_c = quantized, exact
        elif unit.kind != "head":
            self.quant_x, self.float_x = quantized, exact


def _step_weights(before: Any, after: Any, step: Any, num_steps: int) -> jax.Array:
    """Row weights (M, B) inverse to the mean square change at each row's step, of mean 1."""
    change = jnp.square((after - before).astype(jnp.float32)).mean(tuple(range(2, after.ndim)))
    member = jax.nn.one_hot(step, num_steps, dtype=jnp.float32)
    mean = jnp.einsum("mb,mbs->s", change, member, precision=EXACT) / member.sum((0, 1))
    weight = 1 / jnp.maximum(jnp.einsum("s,mbs->mb", mean, member, precision=EXACT), _TINY)
    return weight / weight.mean()
