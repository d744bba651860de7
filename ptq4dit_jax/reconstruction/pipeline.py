"""Reconstruction from end to end: part after part, the float and the quantized hidden state side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from ptq4dit_jax import dit, sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.engine import QLinear, QuantizedDiT, reference
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.quantizers import QTensor
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.optimize import Rows, Task, TrainState, Variables
from ptq4dit_jax.reconstruction.resume import Journal
from ptq4dit_jax.reconstruction.rounding import RoundedKernel
from ptq4dit_jax.reconstruction.units import Unit, units

#: Called with (part, iterations done, iterations in all, error relative to rounding to the nearest).
UnitProgress = Callable[[str, int, int, float], None]

_REPORT_EVERY, _CURVE_POINTS = 100, 50


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
      progress: called every hundred iterations.

    Returns:
      The model with new weights and scales, and for each part its name, errors before and after, and the curve between.

    Raises:
      Ptq4ditError: the batch cannot be spread over the mesh.
    """
    if settings.batch_size % sharding.data_size(mesh):
        raise Ptq4ditError(
            f"A reconstruction batch of {settings.batch_size} rows cannot be spread over {sharding.data_size(mesh)} devices; "
            "use a multiple."
        )
    walk = Walk(folded, quantized, calibration, settings, mesh)
    results, facts = [], []
    for position, unit in enumerate(units(folded.config)):
        task, variables = sharding.replicate(mesh, walk.task(unit))
        rows = walk.rows(unit)
        before = walk.outputs(unit, variables, task, rows)[1]
        like = jax.eval_shape(_result, task, variables, before, before, jnp.zeros((settings.iterations,)))
        result = None if journal is None else journal.finished(position, like)
        if result is None:
            state = _optimize(unit, position, task, variables, rows, before, walk, key, journal, save_every, progress)
            variables, errors = state.variables, state.errors
        else:
            variables, errors = walk.restore(task, variables, result), result.errors
        outputs, after = walk.outputs(unit, variables, task, rows)
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


def _optimize(
    unit: Unit, position: int, task: Task, variables: Variables, rows: Rows, before: jax.Array, walk: Walk, key: jax.Array,
    journal: Journal | None, save_every: int, progress: UnitProgress | None,
) -> TrainState:  # fmt: skip
    settings = walk.settings
    state = sharding.replicate(walk.mesh, optimize.start(variables, settings))
    if journal is not None and (saved := journal.current(position, jax.eval_shape(lambda: state))) is not None:
        state = sharding.replicate(walk.mesh, saved)
    done = int(state.iteration)
    while done < settings.iterations:
        marks = (_REPORT_EVERY,) if journal is None else (_REPORT_EVERY, save_every)
        stop = min(settings.iterations, *((done // mark + 1) * mark for mark in marks))
        state = optimize.train(
            state, task, rows, jnp.maximum(before, _TINY), key, jnp.int32(stop),
            config=walk.config, kind=unit.kind, settings=settings, dtype=walk.dtype,
        )  # fmt: skip
        done = int(state.iteration)
        if journal is not None and done < settings.iterations and done % save_every == 0:
            journal.save_current(position, state)
        if progress is not None and done < settings.iterations:
            progress(unit.name, done, settings.iterations, float(state.errors[max(0, done - _REPORT_EVERY) : done].mean()))
    return state


#: A part that rounding to the nearest already reproduces has nothing to learn, and its error must not be divided by 0.
_TINY = 1e-30


class Walk:
    """The two hidden states on their way through the network, float and quantized; rows laid out as in :class:`Rows`."""

    def __init__(
        self,
        folded: FloatDiT,
        quantized: QuantizedDiT,
        calibration: CalibrationData,
        settings: Reconstruction,
        mesh: Mesh | None,
    ) -> None:
        self.folded, self.quantized, self.settings, self.mesh = folded, quantized, settings, mesh
        self.config = folded.config
        on_cpu = jax.default_backend() == "cpu"
        self.dtype = settings.dtype if settings.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
        self.acts = dit.flatten_sites(reference(quantized).quantizers)
        self.balances = dit.flatten_sites(folded.quantizers)

        count = calibration.num_steps * calibration.num_rows
        strata = settings.batch_size
        size = -(-count // strata)
        # Rows are in the order of the steps, so strata follow the steps, and every batch sees all of the chain. Where rows do
        # not fill the strata, some are there twice.
        order = (np.arange(strata * size) * count // (strata * size)).reshape(strata, size).T
        place = lambda rows: sharding.shard(mesh, np.asarray(rows)[order], axis=1)
        flat = lambda rows: np.asarray(rows).reshape(count, *rows.shape[2:])
        t = np.repeat(np.asarray(calibration.t), calibration.num_rows)
        self.x, self.t, self.y = place(flat(calibration.x)), place(t), place(flat(calibration.y))
        self.step = place(np.repeat(np.arange(calibration.num_steps), calibration.num_rows))
        self.group = place(np.asarray(step_group(quantized.group_edges, jnp.append(t, t[:1]))[:count]))
        self.num_steps = calibration.num_steps
        self.float_x = self.quant_x = self.float_c = self.quant_c = self.x

    def task(self, unit: Unit) -> tuple[Task, Variables]:
        """What is fixed and what is learned for a part, at the float weights."""
        kernels, biases, rounding = {}, {}, {}
        for layer, name in unit.layers.items():
            tree = self._params(unit, layer)
            kernels[layer], rounding[layer] = RoundedKernel.of(
                tree["kernel"], unit.of_depth(name, self.quantized.linears[name].weight)
            )
            biases[layer] = tree["bias"]
        acts = {site: unit.of_depth(name, self.acts[name]) for site, name in unit.sites.items() if name in self.acts}
        log_scale = {site: jnp.zeros_like(act.scale) for site, act in acts.items() if not act.dynamic}
        constants = {"label_embed": self.folded.params["label_embed"]} if unit.kind == "embed_condition" else {}
        return Task(kernels, biases, acts, constants), Variables(rounding, log_scale)

    def _params(self, unit: Unit, layer: str) -> Any:
        if unit.kind != "block":
            return self.folded.params[layer]
        return jax.tree.map(lambda leaf: leaf[unit.index], self.folded.params["blocks"][layer])

    def rows(self, unit: Unit) -> Rows:
        """The part's inputs from the quantized prefix, and the float part's outputs."""
        quant: tuple[Any, ...] = (self.quant_x, self.quant_c)
        exact: tuple[Any, ...] = (self.float_x, self.float_c)
        if unit.kind == "embed_image":
            quant = exact = (self.x,)
        elif unit.kind == "embed_condition":
            quant = exact = (self.t, self.y)
        params = {layer: self._params(unit, layer) for layer in unit.layers}
        if unit.kind == "embed_condition":
            params["label_embed"] = self.folded.params["label_embed"]
        balances = {
            site: unit.of_depth(name, self.balances[name]) for site, name in unit.sites.items() if name in self.balances
        }
        target = optimize.float_outputs(params, balances, exact, config=self.config, kind=unit.kind, dtype=self.dtype)
        weight = jnp.ones(self.group.shape, jnp.float32)
        if self.settings.row_weights == "steps" and unit.kind == "block":
            weight = _step_weights(self.float_x, target, self.step, self.num_steps)
        return Rows(inputs=quant, target=target, group=self.group, weight=weight)

    def outputs(self, unit: Unit, variables: Variables, task: Task, rows: Rows) -> tuple[jax.Array, jax.Array]:
        return optimize.quantized_outputs(variables, task, rows, config=self.config, kind=unit.kind, dtype=self.dtype)

    def advance(self, unit: Unit, quantized: jax.Array, exact: jax.Array) -> None:
        if unit.kind == "embed_condition":
            self.quant_c, self.float_c = quantized, exact
        elif unit.kind != "head":
            self.quant_x, self.float_x = quantized, exact

    def restore(self, task: Task, variables: Variables, result: PartResult) -> Variables:
        """Variables that decide for the codes and scales of a stored result."""
        rounding = {}
        for layer, kernel in task.kernels.items():
            codes = _with_values(kernel.pack(variables.rounding[layer]), jnp.asarray(result.values[layer])).codes()
            up = jnp.swapaxes(codes, -1, -2).astype(jnp.int32) > kernel.base.astype(jnp.int32)
            rounding[layer] = jnp.where(up, 1.0, -1.0)
        log_scale = {site: jnp.asarray(result.log_scale[site]) for site in variables.log_scale}
        return sharding.replicate(self.mesh, Variables(rounding, log_scale))


def _step_weights(before: jax.Array, after: jax.Array, step: jax.Array, num_steps: int) -> jax.Array:
    """Row weights (M, B) inverse to the mean square change at each row's step, of mean 1."""
    change = jnp.square((after - before).astype(jnp.float32)).mean(tuple(range(2, after.ndim)))
    member = jax.nn.one_hot(step, num_steps)
    mean = jnp.einsum("mb,mbs->s", change, member) / member.sum((0, 1))
    weight = 1 / jnp.maximum(jnp.einsum("s,mbs->mb", mean, member), _TINY)
    return weight / weight.mean()


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
        bias = _bias(folded.params, name)
        linears[name] = jax.jit(QLinear.pack)(weight, bias, learned(dit.SITE_OF_LAYER[name], linear.act))
    sites = {name: learned(name, act) for name, act in quantized.sites.items()}
    return quantized.replace(linears=linears, sites=sites)  # type: ignore[attr-defined]


def _with_values(weight: QTensor, values: jax.Array) -> QTensor:
    return weight.replace(values=values)  # type: ignore[attr-defined]


def _bias(params: Mapping[str, Any], name: str) -> Any:
    tree: Any = params
    for part in name.split("."):
        tree = tree[part]
    return tree["bias"]
