"""Reconstruction end to end: unit by unit, with the float and the quantized hidden state side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32

from ptq4dit_jax import sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.gptq import RoundedWeight
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import AnyKey, threefry
from ptq4dit_jax.progress import StageProgress, silent
from ptq4dit_jax.ranges import RangeSearch
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.closed_form import round_unit
from ptq4dit_jax.reconstruction.learning import LearningWalk
from ptq4dit_jax.reconstruction.optimize import Rows, Task, TrainState, Variables
from ptq4dit_jax.reconstruction.resume import Journal
from ptq4dit_jax.reconstruction.rounded_units import RoundedUnit, assemble
from ptq4dit_jax.reconstruction.rounding import RoundedKernel
from ptq4dit_jax.reconstruction.units import Unit, units
from ptq4dit_jax.reconstruction.walk import HeldRows

_REPORT_EVERY, _CURVE_POINTS = 100, 50


class UnitResult(struct.PyTreeNode):
    """What a unit was given, its mean squared errors with all weights rounded to the nearest and after learning, and the error
    of each iteration relative to the former."""

    part: RoundedUnit  # so named in journals
    before: Float32[Array, ""]
    after: Float32[Array, ""]
    errors: Float32[Array, " iterations"]


class _Work(struct.PyTreeNode):
    """What a run that died inside a unit needs to resume: the fixed ``kernels`` and ``biases``, the codes to keep if learning
    does no better (``upper`` where a code is the higher of its two), and the ``state``."""

    kernels: dict[str, RoundedKernel]
    biases: dict[str, Float[Array, " _N"]]
    upper: dict[str, Bool[Array, "_K _N"]]
    state: TrainState


def reconstruct(
    folded: FloatDiT,
    quantized: QuantizedDiT,
    calibration: CalibrationData,
    settings: Reconstruction,
    *,
    key: AnyKey,
    journal: Journal | None = None,
    save_every: int = 500,
    search: RangeSearch = "mse",
    mesh: Mesh | None = None,
    progress: StageProgress = silent,
) -> tuple[QuantizedDiT, list[dict[str, Any]]]:
    """Learns the rounding of the weights and the scales of the activations, unit by unit (PTQ4DiT, section 4.3; AdaRound).

    Each unit, fed by the quantized units before it, learns to reproduce the output of the float unit fed by the float units
    before it. A weight moves at most to a code next to that of the start. Weight scales and zero points stay as they were.

    Args:
      folded: the float model after balancing, with what folding left at its sites.
      quantized: the same model, quantized by range search.
      calibration: the rows to learn from.
      settings: how.
      key: determines, with the iteration's number, which rows it draws.
      journal: where the state is kept; with it, a run that died resumes from its last save.
      save_every: iterations between two saves inside a unit.
      search: how weight ranges are chosen in closed-form rounding.
      mesh: shards every batch over ``data``.
      progress: called with the planned memory before the first iteration, and every hundred iterations.

    Returns:
      The model with new weights and scales, and for each unit its name, its errors before and after, and the curve between.

    Raises:
      Ptq4ditError: the batch cannot be spread over the mesh, or a unit's error is NaN or infinite.
    """
    mesh = sharding.without_model(mesh)  # a unit fits into one device
    key, walk = threefry(key), LearningWalk(folded, quantized, calibration, settings, mesh)
    progress("plan reconstruction", 1, 1, str(walk.plan))
    done, facts = [], []
    for position, unit in enumerate(units(folded.config)):
        nearest, rows = walk.nearest(unit), walk.rows(unit)
        outputs, before = walk.outputs(unit, nearest, rows)
        _check_error(unit, before, walk.dtype)
        result = None if journal is None else journal.finished(position, _like(walk, unit))
        if result is None:
            result, outputs = _learned(unit, position, walk, rows, before, key, journal, save_every, search, progress)
            if not result.after <= before:
                result = dataclasses.replace(result, part=nearest, after=before)
                outputs, _ = walk.outputs(unit, nearest, rows)
            result = jax.device_get(result)
            if journal is not None:
                journal.finish(position, result)
        else:
            outputs, _ = walk.outputs(unit, sharding.replicate(mesh, result.part), rows)
        _check_error(unit, result.after, walk.dtype)
        _report(progress, unit, settings.iterations, settings.iterations, float(result.after / before))
        walk.advance(unit, outputs, rows.target)
        done.append((unit, result.part))
        facts.append(_facts(unit, result))
    return assemble(quantized, done), facts


def _report(progress: StageProgress, unit: Unit, done: int, iterations: int, error: float) -> None:
    """Reports a unit's progress, and its error relative to rounding to the nearest."""
    progress(f"reconstruct {unit.name}", done, iterations, f"error {error:.3f} x nearest")


def _check_error(unit: Unit, error: jax.Array, dtype: str) -> None:
    if not np.isfinite(error):
        raise Ptq4ditError(
            f"Reconstruction met NaN or infinity in the {unit.name}, computed in {dtype}; compute in float32 "
            "(Reconstruction.dtype), or quantize without reconstruction."
        )


def _learned(
    unit: Unit,
    position: int,
    walk: LearningWalk,
    rows: Rows[HeldRows],
    before: jax.Array,
    key: AnyKey,
    journal: Journal | None,
    save_every: int,
    search: RangeSearch,
    progress: StageProgress,
) -> tuple[UnitResult, Any]:
    """Learns a unit. Returns the result, or the start if that is better, and its outputs."""
    work = None if journal is None else journal.current(position, _like_work(walk, unit))
    start = None
    if work is None and walk.settings.resolved_start == "gptq":
        start = round_unit(walk, unit, search=search)[1]
    task, variables = walk.task(unit, start)
    if work is None:
        upper = _upper(task, start) if start is not None else jax.tree.map(lambda v: v >= 0, variables.rounding)
        work = _Work(task.kernels, task.biases, upper, optimize.start(variables, walk.settings))
    work, task, variables = sharding.replicate(walk.mesh, (work, task, variables))
    task = dataclasses.replace(task, kernels=work.kernels, biases=work.biases)
    decided = Variables(jax.tree.map(_decided, work.upper), variables.log_scale)
    first = _rounded(task, decided)
    outputs, error = walk.outputs(unit, first, rows)
    state = _optimize(unit, position, task, work, rows, before, error, walk, key, journal, save_every, progress)
    learned = _rounded(task, state.variables)
    better, after = walk.outputs(unit, learned, rows)
    if not after <= error:  # NaN included
        learned, better, after = first, outputs, error
    return UnitResult(learned, before, after, state.errors * (error / before)), better


def _optimize(
    unit: Unit,
    position: int,
    task: Task,
    work: _Work,
    rows: Rows[HeldRows],
    before: jax.Array,
    error: jax.Array,
    walk: LearningWalk,
    key: AnyKey,
    journal: Journal | None,
    save_every: int,
    progress: StageProgress,
) -> TrainState:
    """Iterates to the end from the state of ``work``. ``before`` is the error of rounding to the nearest, and ``error`` that of
    the start, which the loss is relative to."""
    settings, state = walk.settings, work.state
    done = int(state.iteration)
    while done < settings.iterations:
        marks = (_REPORT_EVERY,) if journal is None else (_REPORT_EVERY, save_every)
        stop = min(settings.iterations, *((done // mark + 1) * mark for mark in marks))
        state = walk.train(unit, state, task, rows, error, key, stop)
        done = stop
        if journal is not None and done < settings.iterations and done % save_every == 0:
            journal.save_current(position, dataclasses.replace(work, state=state), done)
        if done < settings.iterations:
            recent = float(state.errors[max(0, done - _REPORT_EVERY) : done].mean())
            _report(progress, unit, done, settings.iterations, recent * float(error / before))
    return state


def _like(walk: LearningWalk, unit: Unit) -> UnitResult:
    """Returns the shapes of a unit's result."""

    def result() -> UnitResult:
        task, variables = walk.task(unit)
        error = jnp.zeros((), jnp.float32)
        return UnitResult(_rounded(task, variables), error, error, jnp.zeros((walk.settings.iterations,), jnp.float32))

    return cast(UnitResult, jax.eval_shape(result))


def _like_work(walk: LearningWalk, unit: Unit) -> _Work:
    """Returns the shapes of the stored state of a unit in progress."""

    def work() -> _Work:
        task, variables = walk.task(unit)
        upper = jax.tree.map(lambda v: v >= 0, variables.rounding)
        return _Work(task.kernels, task.biases, upper, optimize.start(variables, walk.settings))

    return cast(_Work, jax.eval_shape(work))


@jax.jit
def _upper(task: Task, start: Mapping[str, RoundedWeight]) -> dict[str, jax.Array]:
    """Returns whether each code of the start is the upper of its two."""
    codes = {layer: jnp.swapaxes(rounded.weight.codes(), -1, -2) for layer, rounded in start.items()}
    return {layer: codes[layer] > kernel.base for layer, kernel in task.kernels.items()}


@jax.jit
def _decided(upper: jax.Array) -> jax.Array:
    return jnp.where(upper, jnp.float32(1), jnp.float32(-1))


@jax.jit
def _rounded(task: Task, variables: Variables) -> RoundedUnit:
    """Returns the unit with the codes that the variables decide on."""
    weights = {layer: kernel.pack(variables.rounding[layer]) for layer, kernel in task.kernels.items()}
    return RoundedUnit(weights, task.biases, variables.log_scale)


def _facts(unit: Unit, result: UnitResult) -> dict[str, Any]:
    errors = np.asarray(result.errors)
    curve = [float(piece.mean()) for piece in np.array_split(errors, min(_CURVE_POINTS, len(errors)))]
    return {"part": unit.name, "before": float(result.before), "after": float(result.after), "curve": curve}
