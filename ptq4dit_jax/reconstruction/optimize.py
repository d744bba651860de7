"""Optimization of one unit: one compiled program, with the loop on the device, serves all units of a kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped

from ptq4dit_jax import sharding
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.spec import UnitKind
from ptq4dit_jax.numerics import EXACT, AnyKey
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.reconstruction.adam import Adam, AdamState
from ptq4dit_jax.reconstruction.fake_quant import for_rows
from ptq4dit_jax.reconstruction.rounding import RoundedKernel, indecision
from ptq4dit_jax.reconstruction.units import apply_unit

#: A JAX array, or a NumPy array where rows stay on the host.
_Leaf = TypeVar("_Leaf", bound=jax.Array | np.ndarray)
_Rows = TypeVar("_Rows")
_Result = TypeVar("_Result")
_Shared = TypeVar("_Shared")


class Task(struct.PyTreeNode):
    """What stays fixed while a unit is optimized: kernels except their rounding, biases (N,), ``acts`` except their
    scales, and other parameters. ``acts`` are (G,) tables by site; sites fed by floats are absent."""

    kernels: dict[str, RoundedKernel]
    biases: dict[str, Float[Array, "... _N"]]
    acts: dict[str, ActQuantizer]
    constants: dict[str, Any]


class Variables(struct.PyTreeNode):
    """What is learned: rounding variables (K, N) by layer, and by site the logarithm (G,) of the factor on its scales."""

    rounding: dict[str, Float32[Array, "... _K _N"]]
    log_scale: dict[str, Float32[Array, "... _G"]]


class Rows(struct.PyTreeNode, Generic[_Leaf]):
    """A unit's training data. Rows lie in B strata of M: leaves are (M, B, ...), and a batch draws one row of each stratum.

    ``inputs`` are what :func:`apply_unit` takes, from the quantized prefix; ``target`` is the float unit's output. ``group``
    int32 is the group of steps, and ``weight`` float32 a row's weight in the loss, of mean 1.
    """

    inputs: tuple[Shaped[_Leaf, "*_shape"], ...]
    target: Float[_Leaf, "*_shape"]
    group: Int32[_Leaf, "*rows"]
    weight: Float32[_Leaf, "*rows"]


class TrainState(struct.PyTreeNode):
    """Everything that a resumed run needs: the variables, the optimizers' states, the next iteration (), and the error of each
    iteration so far (iterations,), relative to that of the start."""

    variables: Variables
    optimizer: tuple[AdamState, AdamState]
    iteration: Int32[Array, ""]
    errors: Float32[Array, " iterations"]


def optimizers(settings: Reconstruction) -> tuple[Adam, Adam]:
    """Returns Adam for the rounding, and Adam with a cosine schedule for the scales."""
    return (
        Adam(settings.rounding_rate, settings.iterations if settings.decay_rounding else None, eps=settings.rounding_eps),
        Adam(settings.scale_rate, settings.iterations),
    )


@partial(jax.jit, static_argnames="settings")
def start(variables: Variables, settings: Reconstruction) -> TrainState:
    """Returns the state before the first iteration. It owns its arrays, so it may be donated."""
    for_rounding, for_scales = optimizers(settings)
    return TrainState(
        variables=jax.tree.map(jnp.copy, variables),
        optimizer=(for_rounding.init(variables.rounding), for_scales.init(variables.log_scale)),
        iteration=jnp.zeros((), jnp.int32),
        errors=jnp.zeros((settings.iterations,), jnp.float32),
    )


def predict(
    task: Task,
    kernels: Mapping[str, jax.Array],
    log_scale: Mapping[str, jax.Array],
    inputs: tuple[Any, ...],
    group_B: jax.Array,
    config: Network,
    kind: UnitKind,
    dtype: DTypeLike,
    precision: jax.lax.Precision = EXACT,
) -> jax.Array:
    """Returns the fake-quantized unit's output for one batch, with the given kernels."""
    params = task.constants | {name: {"kernel": kernel, "bias": task.biases[name]} for name, kernel in kernels.items()}
    return apply_unit(config, kind, params, for_rows(task.acts, log_scale, group_B), inputs, dtype, precision)


def chosen_rows(key: AnyKey, iteration: jax.Array, size: int, strata: int) -> jax.Array:
    """Returns the row of each stratum that an iteration draws, (B,): determined by the key and the iteration alone."""
    return jax.random.randint(jax.random.fold_in(key, iteration), (strata,), 0, size, jnp.int32)


def draw(rows: Rows[jax.Array], key: AnyKey, iteration: jax.Array, devices: int = 1) -> Rows[jax.Array]:
    """Draws one row of each stratum, (B, ...). Each of several ``devices`` draws from the strata that it holds."""
    size, here = rows.group.shape
    chosen = chosen_rows(key, iteration, size, here * devices)
    if devices > 1:
        chosen = jax.lax.dynamic_slice_in_dim(chosen, here * jax.lax.axis_index("data"), here)
    pick = jax.vmap(lambda column, index: jax.lax.dynamic_index_in_dim(column, index, keepdims=False), in_axes=(1, 0))
    return jax.tree.map(lambda leaf: pick(leaf, chosen), rows)


def squared_error(output: jax.Array, batch: Rows[jax.Array]) -> jax.Array:
    """Weighted mean squared error of a batch, ()."""
    difference = (output - batch.target).astype(jnp.float32)
    weight = batch.weight.reshape((-1,) + (1,) * (difference.ndim - 1))
    return (jnp.square(difference) * weight).mean()


def _exponent(settings: Reconstruction, progress: jax.Array) -> jax.Array:
    """AdaRound's exponent, annealed after the warm-up; a high one leaves undecided roundings alone."""
    first, last = settings.exponents
    part = jnp.clip((progress - settings.warmup) / (1 - settings.warmup), 0.0, 1.0)
    return last + (first - last) * 0.5 * (1 + jnp.cos(jnp.pi * part))


def in_chunks(function: Callable[[_Rows], _Result], rows: _Rows, chunks: int) -> _Result:
    """Maps ``function`` over ``chunks`` equal chunks of the rows (B, ...), one after another: leaves (chunks, ...)."""
    # Barriers, because XLA unrolls a loop of one chunk and would fuse it with the code around it.
    alone = lambda chunk: jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(chunk)))
    return jax.lax.map(alone, jax.tree.map(lambda leaf: leaf.reshape(chunks, -1, *leaf.shape[1:]), rows))


def _mean_in_order(stacked: jax.Array) -> jax.Array:
    """Returns the mean over the first axis, added up from first to last."""
    total = jax.lax.fori_loop(1, stacked.shape[0], lambda i, total: total + stacked[i], stacked[0])
    return total / stacked.shape[0]


def _on_grid(step: jax.Array) -> jax.Array:
    """Rounds a step of a log scale to a multiple of 2^-14. Its last bits depend on the program, and through the codes so does
    everything later. A scale need not be known better."""
    return jnp.round(step * 2**14) * 2**-14


@dataclasses.dataclass(frozen=True)
class Learning:
    """How a unit is learned, apart from the data: its network and ``kind``, the settings, the compute dtype, and the number of
    ``chunks`` of a batch, whose gradients are added up in order."""

    config: Network
    kind: UnitKind
    settings: Reconstruction
    dtype: str
    chunks: int


def train(
    state: TrainState,
    task: Task,
    rows: Rows[jax.Array],
    start_error: jax.Array,
    key: AnyKey,
    stop: jax.Array,
    *,
    how: Learning,
    drawn: bool = False,
    devices: int = 1,
) -> TrainState:
    """Iterates from the state's next iteration up to ``stop``. To be compiled with the state donated.

    ``rows`` are all rows, or with ``drawn`` the batches (n, B, ...) of the next n iterations. With several ``devices``, this
    is the program of each, inside a ``shard_map`` over ``data``: ``rows`` are its strata, and everything else is replicated.

    The loss is ``squared error / start_error + regularizer * indecision / weights``, times the number of weights. Both
    terms are then of the order of 1 per weight, so one setting fits all models.
    """
    settings, chunks = how.settings, how.chunks
    for_rounding, for_scales = optimizers(settings)
    first = state.iteration
    count = sum(kernel.base.size for kernel in task.kernels.values())

    def soft_kernels(rounding: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: kernel.soft(rounding[name]) for name, kernel in task.kernels.items()}

    def error(learned: tuple[dict[str, jax.Array], dict[str, jax.Array]], batch: Rows[jax.Array]) -> jax.Array:
        kernels, log_scale = learned
        output = predict(task, kernels, log_scale, batch.inputs, batch.group, how.config, how.kind, how.dtype)
        return squared_error(output, batch) / start_error

    def regularizer(rounding: dict[str, jax.Array], progress: jax.Array) -> jax.Array:
        strength = jnp.where(progress < settings.warmup, jnp.float32(0), jnp.float32(settings.regularizer)) / count
        exponent = _exponent(settings, progress)
        return strength * jnp.stack([indecision(v, exponent) for v in rounding.values()]).sum()

    def iterate(state: TrainState) -> TrainState:
        position = state.iteration - first
        batch = jax.tree.map(lambda leaf: leaf[position], rows) if drawn else draw(rows, key, state.iteration, devices)
        # A barrier, so that what follows is the same program wherever the rows come from.
        batch = jax.lax.optimization_barrier(batch)
        variables = jax.lax.optimization_barrier(state.variables)
        # What does not depend on the rows is done once, not per chunk.
        kernels, through_kernels = jax.vjp(soft_kernels, variables.rounding)
        gradient = partial(jax.value_and_grad(error), jax.lax.optimization_barrier((kernels, variables.log_scale)))
        if chunks == 1:
            loss, grads = gradient(batch)
            if devices > 1:
                loss, grads = jax.lax.pmean((loss, grads), "data")
        else:
            stacked = in_chunks(gradient, batch, chunks // devices)
            if devices > 1:
                stacked = jax.lax.all_gather(stacked, "data", tiled=True)
            loss, grads = jax.tree.map(_mean_in_order, stacked)
        progress = state.iteration.astype(jnp.float32) / settings.iterations
        [rounding_grads] = through_kernels(grads[0])
        undecided = jax.grad(regularizer)(state.variables.rounding, progress)
        total = jax.tree.map(lambda a, b: count * (a + b), rounding_grads, undecided)
        rounding, rounding_state = for_rounding.update(total, state.optimizer[0])
        log_scale, scale_state = for_scales.update(jax.tree.map(lambda a: count * a, grads[1]), state.optimizer[1])
        log_scale = jax.tree.map(_on_grid, log_scale)
        return TrainState(
            variables=Variables(
                jax.tree.map(jnp.add, state.variables.rounding, rounding),
                jax.tree.map(jnp.add, state.variables.log_scale, log_scale),
            ),
            optimizer=(rounding_state, scale_state),
            iteration=state.iteration + 1,
            errors=state.errors.at[state.iteration].set(loss),
        )

    return jax.lax.while_loop(lambda state: state.iteration < stop, iterate, state)


def rounded_outputs(
    shared: tuple[Mapping[str, Any], Mapping[str, ActQuantizer]],
    rows: Rows[jax.Array],
    *,
    config: Network,
    kind: UnitKind,
    dtype: str,
    precision: jax.lax.Precision = EXACT,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output (B, ...) that feeds the next unit, and the mean squared error (). ``shared`` holds the de-quantized
    parameters and the activation quantizers (G,) by site."""
    params, acts = shared
    quantizers = {name: act.at_group(rows.group) for name, act in acts.items()}
    output = apply_unit(config, kind, params, quantizers, rows.inputs, dtype, precision)
    return output, squared_error(output, rows)


def float_outputs(
    shared: tuple[Mapping[str, Any], Mapping[str, Any]],
    inputs: tuple[Any, ...],
    *,
    config: Network,
    kind: UnitKind,
    dtype: str,
    precision: jax.lax.Precision = EXACT,
) -> tuple[jax.Array, jax.Array]:
    """Returns the float unit's output (B, ...), and 0. ``shared`` holds its parameters and what folding left at its sites."""
    params, balances = shared
    return apply_unit(config, kind, params, balances, inputs, dtype, precision), jnp.zeros((), jnp.float32)


@partial(jax.jit, static_argnames=("function", "config", "kind", "dtype", "precision", "chunks", "mesh"))
def over_rows(
    function: Callable[..., tuple[jax.Array, jax.Array]],
    shared: _Shared,
    rows: _Rows,
    *,
    config: Network,
    kind: UnitKind,
    dtype: str,
    precision: jax.lax.Precision = EXACT,
    chunks: int = 1,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Maps one of the two functions above over rows (M, B, ...): outputs (M, B, ...) and errors (M, chunks)."""
    devices = sharding.data_size(mesh)

    def local(shared: _Shared, rows: _Rows) -> tuple[jax.Array, jax.Array]:
        one = partial(function, shared, config=config, kind=kind, dtype=dtype, precision=precision)
        outputs, errors = jax.lax.map(lambda batch: in_chunks(one, batch, max(1, chunks // devices)), rows)
        return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:]), errors

    if mesh is None:
        return local(shared, rows)
    strata = PartitionSpec(None, "data")
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), strata), out_specs=(strata, strata), check_vma=False)(
        shared, rows
    )
