"""The walk of a reconstruction: what is learned in a unit, and the compiled program that learns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef

from ptq4dit_jax import memory, sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.gptq import RoundedWeight
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.spec import UnitKind
from ptq4dit_jax.numerics import EXACT, AnyKey, threefry
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.closed_form import rounding_bytes
from ptq4dit_jax.reconstruction.optimize import Rows, Task, TrainState, Variables
from ptq4dit_jax.reconstruction.rounding import RoundedKernel
from ptq4dit_jax.reconstruction.units import Unit
from ptq4dit_jax.reconstruction.walk import TINY, HeldRows, Walk
from ptq4dit_jax.waiting import ready

#: Iterations whose batches are sent to the device together where rows stay on the host.
_BATCHES_SENT = 20


def _around(rounded: RoundedWeight) -> tuple[RoundedKernel, jax.Array]:
    return RoundedKernel.around(rounded.target.T, rounded.weight)


#: One program per shape; without jit, each operation would be one.
_rounded_kernel, _rounded_around = jax.jit(RoundedKernel.of), jax.jit(_around)


@lru_cache(maxsize=32)
def _compiled(
    structure: PyTreeDef,
    shapes: tuple[Any, ...],
    mesh: Mesh | None,
    how: optimize.Learning,
    drawn: bool,
) -> jax.stages.Compiled:
    """Compiles :func:`optimize.train` for arguments of this structure: rows sharded over their strata, the rest replicated."""
    train: Callable[..., TrainState] = partial(optimize.train, how=how, drawn=drawn, devices=sharding.data_size(mesh))
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


def check_mesh(settings: Reconstruction, mesh: Mesh | None) -> None:
    """Refuses a batch that the mesh cannot share."""
    devices = sharding.data_size(mesh)
    if settings.batch_size % devices:
        raise Ptq4ditError(
            f"A reconstruction batch of {settings.batch_size} rows cannot be spread over {devices} devices; use a multiple."
        )
    chunks = settings.resolved_chunks(default_kind().platform)
    if chunks > 1 and chunks % devices:
        raise Ptq4ditError(f"The {chunks} chunks of a batch cannot be spread over {devices} devices; use a multiple.")


class LearningWalk(Walk):
    """A walk on which :mod:`optimize` learns each unit."""

    def __init__(
        self,
        folded: FloatDiT,
        quantized: QuantizedDiT,
        calibration: CalibrationData,
        settings: Reconstruction,
        mesh: Mesh | None,
    ) -> None:
        check_mesh(settings, mesh)
        self.settings = settings
        platform = default_kind().platform
        super().__init__(
            folded,
            quantized,
            calibration,
            mesh,
            batch_size=settings.batch_size,
            chunks=settings.resolved_chunks(platform),
            dtype=settings.dtype if settings.dtype != "auto" else ("float32" if platform == "cpu" else "bfloat16"),
            rows_on=settings.rows_on,
        )

    def _step_bytes(self, size: int, on_host: bool) -> int:
        lead = (_BATCHES_SENT if on_host else size, self.batch_size)
        T, D = self.config.num_tokens, self.config.hidden_size
        hidden = cast(jax.Array, jax.ShapeDtypeStruct((*lead, T, D), self.dtype))
        condition = cast(jax.Array, jax.ShapeDtypeStruct((*lead, D), self.dtype))
        group, weight = (cast(jax.Array, jax.ShapeDtypeStruct(lead, dtype)) for dtype in (jnp.int32, jnp.float32))
        rows = Rows(inputs=(hidden, condition), target=hidden, group=group, weight=weight)
        others = jax.eval_shape(lambda: (jnp.float32(0), threefry(jax.random.key(0)), jnp.int32(0)))

        def program(kind: UnitKind) -> jax.stages.Compiled:
            task, variables = jax.eval_shape(partial(self.task, Unit(kind)))
            state = jax.eval_shape(lambda variables: optimize.start(variables, self.settings), variables)
            return self._program(kind, on_host, state, task, rows, *others)

        needed = max(memory.program_bytes(program(kind)) for kind in self.config.spec.kinds if kind.stack is not None)
        of_rows = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows)) // sharding.data_size(self.mesh)
        learning = max(0, needed - (0 if on_host else of_rows))
        return max(learning, rounding_bytes(self)) if self.settings.resolved_start == "gptq" else learning

    def _program(self, kind: UnitKind, drawn: bool, *arguments: object) -> jax.stages.Compiled:
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        how = optimize.Learning(self.config, kind, self.settings, self.dtype, self.chunks)
        return _compiled(structure, shapes, self.mesh, how, drawn)

    def task(self, unit: Unit, start: Mapping[str, RoundedWeight] | None = None) -> tuple[Task, Variables]:
        """Returns what is fixed and what is learned in a unit, starting at the float weights or at the codes of ``start``.

        ``start`` holds its layers rounded in closed form. From their codes, the variables lean towards the targets.
        """
        kernels, biases, rounding = {}, {}, {}
        for layer, name in unit.layers.items():
            tree = self.params(unit, layer)
            if start is None:
                weight = self.part(unit, self.quantized.linears[name].stored)
                kernels[layer], rounding[layer] = _rounded_kernel(tree["kernel"], weight)
                biases[layer] = tree["bias"]
            else:
                kernels[layer], rounding[layer] = _rounded_around(start[layer])
                biases[layer] = tree["bias"] + start[layer].bias
        acts = self.act_quantizers(unit)
        log_scale = {site: jnp.zeros_like(act.scale) for site, act in acts.items() if not act.dynamic}
        return Task(kernels, biases, acts, self.tables(unit)), Variables(rounding, log_scale)

    def rows(self, unit: Unit) -> Rows[HeldRows]:
        rows = super().rows(unit)
        if self.settings.row_weights == "steps" and unit.kind.stack is not None:
            weight = self._place(
                np.asarray(sharding.to_host(_step_weights(self.float_x, rows.target, self.step, self.num_steps)))
            )
            rows = rows.replace(weight=weight)
        return rows

    def train(
        self, unit: Unit, state: TrainState, task: Task, rows: Rows[HeldRows], before: jax.Array, key: AnyKey, stop: int
    ) -> TrainState:
        """Runs the iterations up to ``stop``."""
        before, key = sharding.replicate(self.mesh, (jnp.float32(before), key))
        on_host = self.plan.on_host
        done = int(state.iteration)
        while done < stop:
            until = min(stop, done + _BATCHES_SENT) if on_host else stop
            given = self._drawn(rows, key, done) if on_host else rows
            arguments = (state, task, given, before, key, sharding.replicate(self.mesh, jnp.int32(until)))
            state, done = self._program(unit.kind, on_host, *arguments)(*arguments), until
        return ready(state)

    def _drawn(self, rows: Rows[HeldRows], key: AnyKey, first: int) -> Rows[HeldRows]:
        """Returns the batches (n, B, ...) of the next iterations, on the device."""
        size, strata = rows.group.shape
        iterations = first + jnp.arange(_BATCHES_SENT, dtype=jnp.int32)
        chosen = np.asarray(jax.vmap(lambda i: optimize.chosen_rows(key, i, size, strata))(iterations))
        return sharding.shard(self.mesh, jax.tree.map(lambda leaf: leaf[chosen, np.arange(strata)], rows), axis=1)


def _step_weights(before: HeldRows, after: HeldRows, step: HeldRows, num_steps: int) -> jax.Array:
    """Returns row weights (M, B), inversely proportional to the mean square change at each row's step, of mean 1."""
    change = jnp.square((after - before).astype(jnp.float32)).mean(tuple(range(2, after.ndim)))
    member = jax.nn.one_hot(step, num_steps, dtype=jnp.float32)
    mean = jnp.einsum("mb,mbs->s", change, member, precision=EXACT) / member.sum((0, 1))
    weight = 1 / jnp.maximum(jnp.einsum("s,mbs->mb", mean, member, precision=EXACT), TINY)
    return weight / weight.mean()
