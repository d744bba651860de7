"""Reconstruction from end to end: part after part, the float and the quantized hidden state side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from ptq4dit_jax import dit, sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.engine import QLinear, QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import threefry
from ptq4dit_jax.quantizers import QTensor
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.learning import LearningWalk
from ptq4dit_jax.reconstruction.optimize import Rows, Task, TrainState, Variables
from ptq4dit_jax.reconstruction.resume import Journal
from ptq4dit_jax.reconstruction.units import Unit, units
from ptq4dit_jax.reconstruction.walk import MemoryPlan

#: Called with (part, iterations done, iterations in all, error relative to rounding to the nearest).
UnitProgress = Callable[[str, int, int, float], None]

_REPORT_EVERY, _CURVE_POINTS = 100, 50
_pack = jax.jit(QLinear.pack)


@struct.dataclass
class PartResult:
    """What a part was given: packed weights by layer, and the logarithm (G,) of what each site's scales are multiplied by; its
    mean squared error with all weights rounded to the nearest and after learning, and the error of each iteration relative to
    the former."""

    values: dict[str, Any]
    log_scale: dict[str, Any]
    before: Any
    after: Any
    errors: Any


def reconstruct(
    folded: FloatDiT,
    quantized: QuantizedDiT,
    calibration: CalibrationData,
    settings: Reconstruction,
    *,
    key: jax.Array,
    journal: Journal | None = None,
    save_every: int = 500,
    mesh: Mesh | None = None,
    announce: Callable[[MemoryPlan], None] | None = None,
    progress: UnitProgress | None = None,
) -> tuple[QuantizedDiT, list[dict[str, Any]]]:
    """Learns the rounding of the weights and the scales of the activations, part after part (PTQ4DiT, section 4.3; AdaRound).

    Each part, fed by the quantized parts before it, is made to reproduce what the float part gives when fed by the float parts
    before it. Weights move to a neighbouring code at most; weight scales and zero points stay.

    Args:
      folded: the float model after balancing, with what folding left at its sites.
      quantized: the same, quantized by range search.
      calibration: the rows to learn from.
      settings: how.
      key: decides which rows an iteration draws, together with its number.
      journal: where the state is kept; with one, a run that died goes on where it was last saved.
      save_every: iterations between two such saves inside a part.
      mesh: shards every batch over ``data``.
      announce: called once, before the first iteration, with what memory it will take.
      progress: called every hundred iterations.

    Returns:
      The model with new weights and scales, and for each part its name, errors before and after, and the curve between.

    Raises:
      Ptq4ditError: the batch cannot be spread over the mesh, or a part's error is NaN or infinite.
    """
    key, walk = threefry(key), LearningWalk(folded, quantized, calibration, settings, mesh)
    if announce is not None:
        announce(walk.plan)
    results, facts = [], []
    for position, unit in enumerate(units(folded.config)):
        task, start = sharding.replicate(mesh, walk.task(unit))
        rows = walk.rows(unit)
        before = walk.outputs(unit, start, task, rows)[1]
        _check_error(unit, before, walk.dtype)
        like = jax.eval_shape(_result, task, start, before, before, jnp.zeros((settings.iterations,), jnp.float32))
        result = None if journal is None else journal.finished(position, like)
        if result is None:
            state = _optimize(unit, position, task, start, rows, before, walk, key, journal, save_every, progress)
            variables, errors = state.variables, state.errors
        else:
            variables, errors = sharding.replicate(mesh, _restored(task, start, result)), result.errors
        outputs, after = walk.outputs(unit, variables, task, rows)
        if result is None and not after <= before:  # NaN included
            variables = start
            outputs, after = walk.outputs(unit, variables, task, rows)
        _check_error(unit, after, walk.dtype)
        if result is None:
            result = jax.device_get(_result(task, variables, before, after, errors))
            if journal is not None:
                journal.finish(position, result)
        if progress is not None:
            progress(unit.name, settings.iterations, settings.iterations, float(after / before))
        walk.advance(unit, outputs, rows.target)
        results.append(result)
        facts.append(_facts(unit, result))
    return _assemble(folded, quantized, results), facts


def _check_error(unit: Unit, error: Any, dtype: str) -> None:
    if not np.isfinite(error):
        raise Ptq4ditError(
            f"Reconstruction met NaN or infinity in the {unit.name}, computed in {dtype}; compute in float32 "
            "(Reconstruction.dtype), or quantize without reconstruction."
        )


def _optimize(
    unit: Unit, position: int, task: Task, variables: Variables, rows: Rows, before: jax.Array, walk: LearningWalk,
    key: jax.Array, journal: Journal | None, save_every: int, progress: UnitProgress | None,
) -> TrainState:  # fmt: skip
    settings = walk.settings
    state = sharding.replicate(walk.mesh, optimize.start(variables, settings))
    if journal is not None and (saved := journal.current(position, jax.eval_shape(lambda: state))) is not None:
        state = sharding.replicate(walk.mesh, saved)
    done = int(state.iteration)
    while done < settings.iterations:
        marks = (_REPORT_EVERY,) if journal is None else (_REPORT_EVERY, save_every)
        stop = min(settings.iterations, *((done // mark + 1) * mark for mark in marks))
        state = walk.train(unit, state, task, rows, before, key, stop)
        done = stop
        if journal is not None and done < settings.iterations and done % save_every == 0:
            journal.save_current(position, state, done)
        if progress is not None and done < settings.iterations:
            progress(unit.name, done, settings.iterations, float(state.errors[max(0, done - _REPORT_EVERY) : done].mean()))
    return state


@jax.jit
def _restored(task: Task, variables: Variables, result: PartResult) -> Variables:
    """Variables that decide for the codes and scales of a stored result."""
    rounding = {}
    for layer, kernel in task.kernels.items():
        codes = _with_values(kernel.pack(variables.rounding[layer]), jnp.asarray(result.values[layer])).codes()
        up = jnp.swapaxes(codes, -1, -2).astype(jnp.int32) > kernel.base.astype(jnp.int32)
        rounding[layer] = jnp.where(up, jnp.float32(1), jnp.float32(-1))
    log_scale = {site: jnp.asarray(result.log_scale[site]) for site in variables.log_scale}
    return Variables(rounding, log_scale)


@jax.jit
def _result(task: Task, variables: Variables, before: jax.Array, after: jax.Array, errors: jax.Array) -> PartResult:
    values = {layer: kernel.pack(variables.rounding[layer]).values for layer, kernel in task.kernels.items()}
    return PartResult(values=values, log_scale=variables.log_scale, before=before, after=after, errors=errors)


def _facts(unit: Unit, result: PartResult) -> dict[str, Any]:
    errors = np.asarray(result.errors)
    curve = [float(part.mean()) for part in np.array_split(errors, min(_CURVE_POINTS, len(errors)))]
    return {"part": unit.name, "before": float(result.before), "after": float(result.after), "curve": curve}


def _assemble(folded: FloatDiT, quantized: QuantizedDiT, results: list[PartResult]) -> QuantizedDiT:
    """The model with the learned codes and scales; zero points are folded into the float biases anew."""
    values: dict[str, list[Any]] = {}
    scales: dict[str, list[Any]] = {}
    for unit, result in zip(units(folded.config), results, strict=True):
        for layer, name in unit.layers.items():
            values.setdefault(name, []).append(result.values[layer])
        for site, name in unit.sites.items():
            if site in result.log_scale:
                scales.setdefault(name, []).append(result.log_scale[site])

    def joined(name: str, parts: list[Any]) -> jax.Array:
        return jnp.stack(parts) if name.startswith("blocks.") else jnp.asarray(parts[0])

    def learned(site: str, act: Any) -> Any:
        return act if act is None or site not in scales else act.replace(scale=act.scale * jnp.exp(joined(site, scales[site])))

    linears = {}
    for name, linear in quantized.linears.items():
        weight = _with_values(linear.weight, joined(name, values[name]))
        linears[name] = _pack(weight, folded.layer(name)["bias"], learned(dit.SITE_OF_LAYER[name], linear.act))
    sites = {name: learned(name, act) for name, act in quantized.sites.items()}
    return quantized.replace(linears=linears, sites=sites)  # type: ignore[attr-defined]


def _with_values(weight: QTensor, values: jax.Array) -> QTensor:
    return weight.replace(values=values)  # type: ignore[attr-defined]
