"""Closed-form rounding from end to end: layer after layer, each behind the quantized network as the layers before left it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from ptq4dit_jax import sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import RowsOn
from ptq4dit_jax.devices import default_device
from ptq4dit_jax.dit import SITE_OF_LAYER, DiTConfig
from ptq4dit_jax.engine import QLinear, QuantizedDiT
from ptq4dit_jax.gptq import InputMoments, RoundedWeight, round_weight
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import CALIBRATION
from ptq4dit_jax.quantizers import QTensor
from ptq4dit_jax.ranges import RangeSearch
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.units import Kind, Unit, site_input, units
from ptq4dit_jax.reconstruction.walk import MemoryPlan, Walk
from ptq4dit_jax.waiting import ready

#: Called with the part, layers done, layers in all, and the part's error relative to rounding to the nearest.
LayerProgress = Callable[[str, int, int, float], None]

#: Rows of a pass, and into how many parts a CPU cuts them; their sums are added up in order, whatever the devices.
_BATCH, _PARTS = 32, 8
_pack = jax.jit(QLinear.pack)


@struct.dataclass
class _Networks:
    """A part twice: ``params`` with the weights as far as they are rounded and ``acts`` (G,) by site, and the float part."""

    params: dict[str, Any]
    acts: dict[str, Any]
    float_params: dict[str, Any]
    balances: dict[str, Any]


@struct.dataclass
class _Seen:
    """Rows (M, B, ...): what both forms of a part are fed, the group of steps, and what each row counts."""

    inputs: tuple[Any, ...]
    float_inputs: tuple[Any, ...]
    group: Any
    share: Any


class ClosedFormWalk(Walk):
    """A walk that sums the moments of a layer's inputs. Everything is float32, products as in calibration."""

    def __init__(
        self,
        folded: FloatDiT,
        quantized: QuantizedDiT,
        calibration: CalibrationData,
        mesh: Mesh | None,
        rows_on: RowsOn = "auto",
    ) -> None:
        devices = sharding.data_size(mesh)
        parts = _PARTS if default_device().platform == "cpu" and _PARTS % devices == 0 else devices
        batch_size = -(-_BATCH // parts) * parts
        super().__init__(
            folded, quantized, calibration, mesh, batch_size=batch_size, parts=parts, dtype="float32", precision=CALIBRATION,
            rows_on=rows_on,
        )  # fmt: skip

    def _step_bytes(self, size: int, on_host: bool) -> int:
        """Sums and products of the widest layer's moments, the factor of their matrix, and a block's activations."""
        config = self.config
        K, D = config.mlp_size, config.hidden_size
        here = self.parts // sharding.data_size(self.mesh)
        sums, solved = (4 * here + 4) * 4 * K * K, 8 * (6 * K * K + 8 * K * D)
        rows = self.batch_size // self.parts
        activations = 4 * rows * (3 * config.num_tokens * (8 * D + 2 * K) + config.num_heads * config.num_tokens**2)
        return max(sums + activations, solved)

    def part(self, unit: Unit) -> _Networks:
        """A part with all its weights rounded to the nearest."""
        float_params, balances = self.float_part(unit)
        params = dict(float_params)
        for layer, name in unit.layers.items():
            weight = unit.of_depth(name, self.quantized.linears[name].weight)
            params[layer] = _float_layer(weight, float_params[layer]["bias"])
        return _Networks(params, self.act_quantizers(unit), float_params, balances)

    def moments(self, unit: Unit, layer: str, networks: _Networks) -> InputMoments:
        """Of the input of a layer over all rows, on the first device."""
        quant, exact = self.inputs(unit)
        rows = _Seen(inputs=quant, float_inputs=exact, group=self.group, share=self.share)
        site = SITE_OF_LAYER[unit.layers[layer]].removeprefix("blocks.")
        static = {"config": self.config, "kind": unit.kind, "site": site, "precision": self.precision}
        program = partial(_observe, **static)
        lanes = _lanes(rows, self.parts, self.mesh)
        devices = sharding.devices_of(self.mesh)
        each = self.parts // len(devices)
        placed = {device: jax.device_put(networks, device) for device in devices}
        batch = jax.device_put(jax.tree.map(lambda leaf: leaf[0], (quant, self.group)), devices[0])
        shift = _rough_mean(placed[devices[0]], *batch, **static)

        def run(item: int, device: Any) -> InputMoments:
            start = InputMoments.start(jax.device_put(shift, device))
            return self._through(partial(program, placed[device]), start, lanes[_lane(item, len(devices), each)], device)

        found = sharding.deal_out(run, self.parts, self.mesh)
        by_lane = {_lane(item, len(devices), each): jax.device_put(m, devices[0]) for item, m in enumerate(found)}
        return _total([by_lane[lane] for lane in range(self.parts)])

    def _through(self, program: Any, moments: InputMoments, rows: Any, device: Any) -> InputMoments:
        """Over a lane's rows: at once, or batch by batch where they are on the host."""
        if not self.plan.on_host:
            return program(moments, rows)
        for m in range(rows.group.shape[0]):
            batch = jax.tree.map(lambda leaf, m=m: leaf[m : m + 1], rows)
            moments = ready(program(moments, jax.device_put(batch, device)))
        return moments


def _lane(item: int, devices: int, each: int) -> int:
    """Which part of the rows an item is, so that :func:`ptq4dit_jax.sharding.deal_out` deals it to the device that holds it."""
    return item % devices * each + item // devices


def _lanes(rows: Any, parts: int, mesh: Mesh | None) -> list[Any]:
    """Rows (M, B, ...) in ``parts`` of their strata, each an array on the one device that holds it."""
    leaves, structure = jax.tree.flatten(rows)

    def cut(leaf: Any) -> list[Any]:
        if mesh is None or not isinstance(leaf, jax.Array):
            held = [leaf]
        else:
            shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[1].start or 0)
            held = [shard.data for shard in shards]
        return [lane for array in held for lane in _split(array, parts // len(held))]

    return [jax.tree.unflatten(structure, lane) for lane in zip(*map(cut, leaves), strict=True)]


def _split(array: Any, parts: int) -> list[Any]:
    size = array.shape[1] // parts
    return [array[:, start : start + size] for start in range(0, parts * size, size)]


@partial(jax.jit, static_argnames=("config", "kind", "site", "precision"))
def _observe(
    networks: _Networks, moments: InputMoments, rows: _Seen,
    *, config: DiTConfig, kind: Kind, site: str, precision: jax.lax.Precision,
) -> InputMoments:  # fmt: skip
    """``moments`` with rows (M, b, ...): a program of one device."""

    def one(moments: InputMoments, batch: _Seen) -> tuple[InputMoments, None]:
        acts = {name: act.at_group(batch.group) for name, act in networks.acts.items()}
        fed = partial(site_input, config, kind, site, dtype="float32", precision=precision)
        x = fed(networks.params, acts, batch.inputs)
        exact = fed(networks.float_params, networks.balances, batch.float_inputs)
        return moments.observe(x, exact, batch.share, precision), None

    return jax.lax.scan(one, moments, rows)[0]


@partial(jax.jit, static_argnames=("config", "kind", "site", "precision"))
def _rough_mean(
    networks: _Networks, inputs: tuple[Any, ...], group: jax.Array,
    *, config: DiTConfig, kind: Kind, site: str, precision: jax.lax.Precision,
) -> jax.Array:  # fmt: skip
    """Of what a layer is fed by the quantized network for one batch, (K,)."""
    acts = {name: act.at_group(group) for name, act in networks.acts.items()}
    x = site_input(config, kind, site, networks.params, acts, inputs, "float32", precision)
    return x.astype(jnp.float32).mean(tuple(range(x.ndim - 1)))


_total = jax.jit(InputMoments.total)


@jax.jit
def _float_layer(weight: QTensor, bias: jax.Array) -> dict[str, jax.Array]:
    return {"kernel": jnp.swapaxes(weight.dequantize(), -1, -2), "bias": bias}


def round_closed_form(
    folded: FloatDiT,
    quantized: QuantizedDiT,
    calibration: CalibrationData,
    *,
    search: RangeSearch = "mse",
    mesh: Mesh | None = None,
    rows_on: RowsOn = "auto",
    announce: Callable[[MemoryPlan], None] | None = None,
    progress: LayerProgress | None = None,
) -> tuple[QuantizedDiT, list[dict[str, Any]]]:
    """Rounds all weights in closed form (:mod:`ptq4dit_jax.gptq`), each layer for the inputs that the layers before it make.

    Every layer is one pass over the rows, which sums the moments of its input; a part then passes them on. A part that comes
    out worse than rounded to the nearest goes back to that. Activation quantizers stay as they are.

    Args:
      folded: the float model after balancing, with what folding left at its sites.
      quantized: the same, quantized by range search.
      calibration: the rows whose moments are taken.
      search: how the ranges of weights are chosen.
      mesh: whose devices share the rows. On CPUs 1, 2, 4 and 8 give the same numbers.
      rows_on: where hidden states are kept, as in :class:`ptq4dit_jax.config.Reconstruction`.
      announce: called once, before the first pass, with what memory it will take.
      progress: called after each layer.

    Returns:
      The model with new weights and biases; and for each part its name, its mean squared errors before and after, and the error
      of each of its layers relative to rounding to the nearest.
    """
    walk = ClosedFormWalk(folded, quantized, calibration, mesh, rows_on)
    if announce is not None:
        announce(walk.plan)
    home = sharding.devices_of(mesh)[0]
    rounded: dict[str, list[tuple[QTensor, jax.Array]]] = {}
    facts = []
    for unit in units(folded.config):
        nearest, rows = walk.part(unit), walk.rows(unit)
        forms = lambda networks: sharding.replicate(mesh, (networks.params, networks.acts))
        outputs, before = walk.run(optimize.rounded_outputs, forms(nearest), unit, rows)
        networks, layers = nearest, dict[str, RoundedWeight]()
        for done, (layer, name) in enumerate(unit.layers.items()):
            kernel, weight = nearest.float_params[layer]["kernel"], unit.of_depth(name, quantized.linears[name].weight)
            moments = walk.moments(unit, layer, networks)
            found = ready(round_weight(*jax.device_put((kernel, weight, moments), home), search=search))
            layers[layer] = found
            params = networks.params | {layer: _float_layer(found.weight, nearest.float_params[layer]["bias"] + found.bias)}
            networks = networks.replace(params=params)  # type: ignore[attr-defined]
            if progress is not None:
                progress(unit.name, done + 1, len(unit.layers), float(found.error))
        better, after = walk.run(optimize.rounded_outputs, forms(networks), unit, rows)
        if kept := bool(after <= before):
            outputs = better
        walk.advance(unit, outputs, rows.target)
        for layer, name in unit.layers.items():
            weight, bias = (layers[layer].weight, layers[layer].bias) if kept else _as_it_was(unit, name, quantized)
            rounded.setdefault(name, []).append((weight, bias))
        facts.append(_facts(unit, before, after, kept, layers))
    return _assemble(folded, quantized, rounded), facts


def _as_it_was(unit: Unit, name: str, quantized: QuantizedDiT) -> tuple[QTensor, jax.Array]:
    weight = unit.of_depth(name, quantized.linears[name].weight)
    return weight, jnp.zeros(weight.scale.shape, jnp.float32)


def _facts(unit: Unit, before: Any, after: Any, kept: bool, layers: Mapping[str, RoundedWeight]) -> dict[str, Any]:
    errors = {layer: float(found.error) if kept else 1.0 for layer, found in layers.items()}
    return {"part": unit.name, "before": float(before), "after": float(after if kept else before), "layers": errors}


def _assemble(
    folded: FloatDiT, quantized: QuantizedDiT, rounded: Mapping[str, list[tuple[QTensor, jax.Array]]]
) -> QuantizedDiT:
    linears = {}
    for name, linear in quantized.linears.items():
        stack = (lambda *leaves: jnp.stack(leaves)) if name.startswith("blocks.") else (lambda leaf: leaf)
        weight, gained = jax.tree.map(stack, *rounded[name])
        linears[name] = _pack(weight, folded.layer(name)["bias"] + gained, linear.act)
    return quantized.replace(linears=linears)  # type: ignore[attr-defined]
