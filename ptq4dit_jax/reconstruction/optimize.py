"""The optimization of one part: one compiled program that serves all parts of a kind, with the loop on the device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.typing import DTypeLike

from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.reconstruction.fake_quant import for_rows
from ptq4dit_jax.reconstruction.rounding import RoundedKernel, indecision
from ptq4dit_jax.reconstruction.units import Kind, apply_unit


@struct.dataclass
class Task:
    """What stays fixed while a part is optimized: kernels but for their rounding, biases (N,), ``acts`` but for their scales,
    and other parameters. ``acts`` are (G,) tables, by site; sites fed by floats are absent."""

    kernels: dict[str, RoundedKernel]
    biases: dict[str, Any]
    acts: dict[str, ActQuantizer]
    constants: dict[str, Any]


@struct.dataclass
class Variables:
    """What is learned: rounding variables (K, N) by layer, and the logarithm (G,) of what each site's scales are multiplied
    by."""

    rounding: dict[str, Any]
    log_scale: dict[str, Any]


@struct.dataclass
class Rows:
    """A part's training data. Rows lie in B strata of M: leaves are (M, B, ...), and a batch draws one row of each stratum.

    ``inputs`` as :func:`apply_unit` takes them, from the quantized prefix; ``target`` is the float part's output; ``group``
    int32 is the group of steps and ``weight`` float32 the weight of a row in the loss, of mean 1.
    """

    inputs: tuple[Any, ...]
    target: Any
    group: Any
    weight: Any


@struct.dataclass
class TrainState:
    """Everything that a resumed run needs: the variables, the optimizers' states, the next iteration () and the
    error, relative to rounding to the nearest, seen at each iteration so far (iterations,)."""

    variables: Variables
    optimizer: Any
    iteration: Any
    errors: Any


def optimizers(settings: Reconstruction) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Adam for the rounding and Adam with a cosine schedule for the scales."""
    decayed = lambda rate: optax.cosine_decay_schedule(rate, settings.iterations)
    rounding_rate = decayed(settings.rounding_rate) if settings.decay_rounding else settings.rounding_rate
    return optax.adam(rounding_rate), optax.adam(decayed(settings.scale_rate))


def start(variables: Variables, settings: Reconstruction) -> TrainState:
    """The state before the first iteration."""
    for_rounding, for_scales = optimizers(settings)
    return TrainState(
        variables=variables,
        optimizer=(for_rounding.init(variables.rounding), for_scales.init(variables.log_scale)),
        iteration=jnp.zeros((), jnp.int32),
        errors=jnp.zeros((settings.iterations,), jnp.float32),
    )


def predict(
    task: Task, kernels: Mapping[str, jax.Array], log_scale: Mapping[str, jax.Array], inputs: tuple[Any, ...],
    group_B: jax.Array, config: DiTConfig, kind: Kind, dtype: DTypeLike,
) -> jax.Array:  # fmt: skip
    """The fake-quantized part's output for one batch, with the given kernels."""
    params = task.constants | {name: {"kernel": kernel, "bias": task.biases[name]} for name, kernel in kernels.items()}
    return apply_unit(config, kind, params, for_rows(task.acts, log_scale, group_B), inputs, dtype)


def draw(rows: Rows, key: jax.Array, iteration: jax.Array) -> Rows:
    """One row of each stratum, (B, ...): they depend on the key and the iteration only."""
    strata, size = rows.group.shape[1], rows.group.shape[0]
    chosen = jax.random.randint(jax.random.fold_in(key, iteration), (strata,), 0, size)
    # Stratum by stratum, so that a mesh that holds whole strata moves no row between devices.
    pick = jax.vmap(lambda column, index: jax.lax.dynamic_index_in_dim(column, index, keepdims=False), in_axes=(1, 0))
    return jax.tree.map(lambda leaf: pick(leaf, chosen), rows)


def squared_error(output: jax.Array, batch: Rows) -> jax.Array:
    """Weighted mean squared error of a batch, ()."""
    difference = (output - batch.target).astype(jnp.float32)
    weight = batch.weight.reshape((-1,) + (1,) * (difference.ndim - 1))
    return (jnp.square(difference) * weight).mean()


def _exponent(settings: Reconstruction, progress: jax.Array) -> jax.Array:
    """AdaRound's exponent, annealed after the warm-up; a high one leaves undecided roundings alone."""
    first, last = settings.exponents
    part = jnp.clip((progress - settings.warmup) / (1 - settings.warmup), 0.0, 1.0)
    return last + (first - last) * 0.5 * (1 + jnp.cos(jnp.pi * part))


@partial(jax.jit, static_argnames=("config", "kind", "settings", "dtype"), donate_argnames="state")
def train(
    state: TrainState, task: Task, rows: Rows, nearest_error: jax.Array, key: jax.Array, stop: jax.Array,
    *, config: DiTConfig, kind: Kind, settings: Reconstruction, dtype: str,
) -> TrainState:  # fmt: skip
    """Iterations from the state's next one up to ``stop``.

    The loss is ``squared error / nearest_error + regularizer * indecision / weights``, times the number of weights: both terms
    are then of the order of one per weight whatever the model, and one setting fits all.
    """
    for_rounding, for_scales = optimizers(settings)
    count = sum(kernel.base.size for kernel in task.kernels.values())

    def loss(variables: Variables, batch: Rows, progress: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernels = {name: kernel.soft(variables.rounding[name]) for name, kernel in task.kernels.items()}
        output = predict(task, kernels, variables.log_scale, batch.inputs, batch.group, config, kind, dtype)
        error = squared_error(output, batch) / nearest_error
        exponent = _exponent(settings, progress)
        undecided = sum(indecision(v, exponent) for v in variables.rounding.values())
        strength = jnp.where(progress < settings.warmup, 0.0, settings.regularizer)
        return count * error + strength * undecided, error

    def iterate(state: TrainState) -> TrainState:
        batch = draw(rows, key, state.iteration)
        grads, error = jax.grad(loss, has_aux=True)(state.variables, batch, state.iteration / settings.iterations)
        rounding, rounding_state = for_rounding.update(grads.rounding, state.optimizer[0])
        log_scale, scale_state = for_scales.update(grads.log_scale, state.optimizer[1])
        return TrainState(
            variables=Variables(
                optax.apply_updates(state.variables.rounding, rounding),
                optax.apply_updates(state.variables.log_scale, log_scale),
            ),
            optimizer=(rounding_state, scale_state),
            iteration=state.iteration + 1,
            errors=state.errors.at[state.iteration].set(error),
        )

    return jax.lax.while_loop(lambda state: state.iteration < stop, iterate, state)


@partial(jax.jit, static_argnames=("config", "kind", "dtype"))
def quantized_outputs(
    variables: Variables, task: Task, rows: Rows, *, config: DiTConfig, kind: Kind, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """With decided roundings: the outputs (M, B, ...) that the next part is fed, and the mean squared error ()."""
    kernels = {name: kernel.hard(variables.rounding[name]) for name, kernel in task.kernels.items()}

    def one(batch: Rows) -> tuple[jax.Array, jax.Array]:
        output = predict(task, kernels, variables.log_scale, batch.inputs, batch.group, config, kind, dtype)
        return output, squared_error(output, batch)

    outputs, errors = jax.lax.map(one, rows)
    return outputs, errors.mean()


@partial(jax.jit, static_argnames=("config", "kind", "dtype"))
def float_outputs(
    params: Mapping[str, Any],
    balances: Mapping[str, Any],
    inputs: tuple[Any, ...],
    *,
    config: DiTConfig,
    kind: Kind,
    dtype: str,
) -> jax.Array:
    """The float part's outputs (M, B, ...); ``balances`` are what folding left at its sites."""
    return jax.lax.map(lambda batch: apply_unit(config, kind, params, balances, batch, dtype), inputs)
