"""Closed-form rounding end to end: layer by layer, each behind the quantized network as the earlier layers left it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ptq4dit_jax import sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import RowsOn
from ptq4dit_jax.devices import default_kind, host
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.gptq import InputMoments, RoundedWeight, round_weight
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import CALIBRATION
from ptq4dit_jax.progress import StageProgress, silent
from ptq4dit_jax.quantizers import QTensor
from ptq4dit_jax.ranges import RangeSearch
from ptq4dit_jax.reconstruction.moments import UnitInputs
from ptq4dit_jax.reconstruction.rounded_units import RoundedUnit, assemble
from ptq4dit_jax.reconstruction.units import Unit, units
from ptq4dit_jax.reconstruction.walk import Walk
from ptq4dit_jax.waiting import ready

#: Rows per batch of a pass, and the chunks that a CPU cuts them into.
_BATCH, _CHUNKS = 32, 8


class ClosedFormWalk(Walk):
    """A walk in float32, with products as in calibration."""

    def __init__(
        self,
        folded: FloatDiT,
        quantized: QuantizedDiT,
        calibration: CalibrationData,
        mesh: Mesh | None,
        rows_on: RowsOn = "auto",
    ) -> None:
        devices = sharding.data_size(mesh)
        chunks = _CHUNKS if default_kind().platform == "cpu" and _CHUNKS % devices == 0 else devices
        batch_size = -(-_BATCH // chunks) * chunks
        super().__init__(
            folded,
            quantized,
            calibration,
            mesh,
            batch_size=batch_size,
            chunks=chunks,
            dtype="float32",
            precision=CALIBRATION,
            rows_on=rows_on,
        )

    def _step_bytes(self, size: int, on_host: bool) -> int:
        return rounding_bytes(self)


def rounding_bytes(walk: Walk) -> int:
    """Returns the bytes that :func:`round_unit` needs on a device: for sums and products of the widest layer's moments, for the
    factor of their matrix, and for a block's activations."""
    config = walk.config
    K, D = max(linear.K for linear in config.spec.linears.values()), config.hidden_size
    here = walk.chunks // sharding.data_size(walk.mesh)
    sums, solved = (4 * here + 4) * 4 * K * K, 8 * (6 * K * K + 8 * K * D)
    rows = walk.batch_size // walk.chunks
    activations = 4 * rows * (3 * config.num_tokens * (8 * D + 2 * K) + config.num_heads * config.num_tokens**2)
    return max(sums + activations, solved)


def round_unit(
    walk: Walk, unit: Unit, *, search: RangeSearch, sequential: bool = True, progress: StageProgress = silent
) -> tuple[RoundedUnit, dict[str, RoundedWeight]]:
    """Rounds the layers of a unit in closed form, one after another, in one pass over the rows per layer.

    Returns the rounded unit, and each layer's result.
    """
    inputs, nearest = UnitInputs(walk, unit), walk.nearest(unit)
    rounded = nearest
    home = sharding.home(walk.mesh)
    layers = dict[str, RoundedWeight]()
    for done, layer in enumerate(unit.layers):
        params = walk.params(unit, layer)
        moments = inputs.moments(layer, rounded if sequential else nearest)
        arguments = jax.device_put((params["kernel"], nearest.weights[layer], moments), home)
        found = sharding.agreed(walk.mesh, ready(_rounded(*arguments, search=search, follow=sequential)))
        layers[layer] = found
        rounded = rounded.with_layer(layer, found.weight, params["bias"] + found.bias)
        progress(f"round {unit.name}", done + 1, len(unit.layers), f"error {float(found.error):.3f} x nearest")
    return rounded, layers


def _rounded(kernel: jax.Array, nearest: QTensor, moments: InputMoments, *, search: RangeSearch, follow: bool) -> RoundedWeight:
    """Runs :func:`round_weight` where its arguments are, or on the host for a TPU, which has no float64."""
    [home] = kernel.devices()
    place = host() if home.platform == "tpu" else home
    arguments = jax.device_put((kernel, nearest, moments), place)
    return jax.device_put(round_weight(*arguments, search=search, follow=follow), home)


def round_closed_form(
    folded: FloatDiT,
    quantized: QuantizedDiT,
    calibration: CalibrationData,
    *,
    search: RangeSearch = "mse",
    sequential: bool = True,
    mesh: Mesh | None = None,
    rows_on: RowsOn = "auto",
    progress: StageProgress = silent,
) -> tuple[QuantizedDiT, list[dict[str, Any]]]:
    """Rounds all weights in closed form (:mod:`ptq4dit_jax.gptq`), each layer for the inputs that the earlier layers give.

    Each layer takes one pass over the rows, which sums the moments of its input. The rows then move past the unit. A unit that
    comes out worse than rounded to the nearest returns to that. Activation quantizers stay as they are.

    Args:
      folded: the float model after balancing, with what folding left at its sites.
      quantized: the same model, quantized by range search.
      calibration: the rows whose moments are taken.
      search: how weight ranges are chosen.
      sequential: False, for comparison, is GPTQ as published with all moments from one pass. Every layer is then rounded behind
        the network rounded to the nearest, and aims at what its float weight gives there. Aiming at the float network's output
        would be worse than rounding to the nearest: it compensates for errors of layers that end up rounded differently.
      mesh: its devices share the rows. On CPUs, 1, 2, 4 and 8 devices give the same numbers.
      rows_on: where hidden states are kept, as in :class:`ptq4dit_jax.config.Reconstruction`.
      progress: called with the planned memory before the first pass, and after each layer.

    Returns:
      The model with new weights and biases; and for each unit its name, its mean squared errors before and after, and each
      layer's error relative to rounding to the nearest.
    """
    walk = ClosedFormWalk(folded, quantized, calibration, sharding.without_model(mesh), rows_on)
    progress("plan rounding", 1, 1, str(walk.plan))
    done, facts = [], []
    for unit in units(folded.config):
        nearest, rows = walk.nearest(unit), walk.rows(unit)
        outputs, before = walk.outputs(unit, nearest, rows)
        rounded, layers = round_unit(walk, unit, search=search, sequential=sequential, progress=progress)
        better, after = walk.outputs(unit, rounded, rows)
        if (kept := bool(np.less_equal(after, before))) and sequential:
            outputs = better
        walk.advance(unit, outputs, rows.target)
        done.append((unit, rounded if kept else nearest))
        facts.append(_facts(unit, before, after, kept, layers))
    return assemble(sharding.own(quantized), sharding.put(done, sharding.home(mesh))), facts


def _facts(unit: Unit, before: jax.Array, after: jax.Array, kept: bool, layers: Mapping[str, RoundedWeight]) -> dict[str, Any]:
    errors = {layer: float(found.error) if kept else 1.0 for layer, found in layers.items()}
    return {"part": unit.name, "before": float(before), "after": float(after if kept else before), "layers": errors}
