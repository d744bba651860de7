"""Measures, in seconds, how good a quantized model is on some of its calibration rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from ptq4dit_jax.calibration import MICRO_BATCH, CalibrationData
from ptq4dit_jax.engine import QLinear, QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.model import FloatDiT, step_group
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites
from ptq4dit_jax.numerics import EXACT
from ptq4dit_jax.quantizers import ActQuantizer
from ptq4dit_jax.waiting import ready

#: SQNR of the prediction in dB, mean over steps, below which a user is warned, and below which a model is refused.
WARN_BELOW, REFUSE_BELOW = 15.0, 5.0
_STEPS, _NAMED = 10, 3
#: Stands for an error of any size if the float model's output is all zeros.
_FLOOR_DB = -999.0


class PoorQuality(UserWarning):
    """A quantized model is much worse than its float model."""


@dataclasses.dataclass(frozen=True)
class LayerQuality:
    """SQNR in dB of a layer's output, or of an input of attention's products, with inputs from the float model: the cost of
    quantizing this layer alone. ``block`` is None outside the blocks."""

    layer: str
    block: int | None
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.layer}{'' if self.block is None else f' of block {self.block}'} ({self.sqnr_db:.1f} dB)"


@dataclasses.dataclass(frozen=True)
class Quality:
    """SQNR in dB of the raw prediction, mean over steps (:class:`ptq4dit_jax.evaluation.metrics.StepsSQNR`), infinite if
    predictions of a step are identical; the numbers of steps and rows; and, if the SQNR is poor, the worst layers."""

    sqnr_mean_db: float
    steps: int
    rows: int
    worst: tuple[LayerQuality, ...] = ()

    @property
    def is_poor(self) -> bool:
        return self.sqnr_mean_db < WARN_BELOW

    def __str__(self) -> str:
        """Returns a text such as "SQNR 31.4 dB"."""
        if self.sqnr_mean_db == np.inf:
            return "identical to the float model"
        return f"SQNR {self.sqnr_mean_db:.1f} dB" + (f", worst in {', '.join(map(str, self.worst))}" if self.worst else "")

    def to_dict(self) -> dict[str, Any]:
        """Returns the quality for JSON, which has no infinity."""
        finite = lambda value: None if value == np.inf else value
        worst = [dataclasses.asdict(layer) | {"sqnr_db": finite(layer.sqnr_db)} for layer in self.worst]
        return {"sqnr_mean_db": finite(self.sqnr_mean_db), "steps": self.steps, "rows": self.rows} | (
            {"worst_layers": worst} if worst else {}
        )

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Quality:
        """Inverts :meth:`to_dict`."""
        number = lambda value: float("inf") if value is None else value
        worst = tuple(LayerQuality(**layer | {"sqnr_db": number(layer["sqnr_db"])}) for layer in stored.get("worst_layers", ()))
        return cls(number(stored["sqnr_mean_db"]), stored["steps"], stored["rows"], worst)

    @classmethod
    def of(cls, model: QuantizedDiT) -> Quality | None:
        """Returns what was measured when the model was quantized; None if it has no such record."""
        stored = model.provenance.facts.get("quality")
        return None if stored is None else cls.from_dict(stored)


def some_rows(calibration: CalibrationData) -> CalibrationData:
    """Returns a few steps spread over the chain and a few of their rows, on the host.

    There are no more rows than in calibration's micro-batches, because a GPU has already tuned the float model's products for
    that size. Tuning them for 16 rows takes DiT-XL/2 17 seconds on an H200.
    """
    return calibration.spread(_STEPS, MICRO_BATCH)


def measure(reference: FloatDiT, folded: FloatDiT, quantized: QuantizedDiT, some: CalibrationData) -> Quality:
    """Compares a quantized model with the float model.

    Args:
      reference: the float model, in the precision of calibration. That loses nothing here (TF32 has 68 dB against float32,
        W8A8 has 44 dB), and its products are already tuned.
      folded: the float model after balancing; the layers of ``quantized`` stand for its layers.
      quantized: the quantized model; it runs on the backend that every device has.
      some: rows from :func:`some_rows`; they are moved to where the models are.

    Raises:
      Ptq4ditError: a prediction holds NaN or infinity.
    """
    runs = dataclasses.replace(quantized, backend="xla")
    predictions = []
    for what, model in (("float", reference), ("quantized", runs)):
        with jax.transfer_guard_host_to_device("allow"):  # a few rows, and intended
            prediction = np.asarray(ready(_predictions(model, some)))
        if not (finite := np.isfinite(prediction).all((1, 2, 3, 4))).all():
            raise Ptq4ditError(
                f"The prediction of the {what} model holds NaN or infinity on calibration rows at t = "
                f"{some.t[np.argmin(finite)].ravel()[0]:g}; check that the float model makes good samples."
            )
        predictions.append(prediction)
    mean_db = max(_FLOOR_DB, float(_steps_sqnr(*predictions).mean_db))
    worst = _worst_layers(folded, quantized, some) if mean_db < WARN_BELOW else ()
    return Quality(mean_db, some.num_steps, some.num_rows, worst)


@jax.jit
def _predictions(model: FloatDiT | QuantizedDiT, rows: CalibrationData) -> jax.Array:
    """Returns predictions (S, R, H, W, C) float32, without variance channels."""
    channels = model.config.in_channels
    return jax.lax.map(lambda step: model.apply(step.x, step.t, step.y)[..., :channels].astype(jnp.float32), rows)


_steps_sqnr = jax.jit(metrics.steps_sqnr)


class _Costs(struct.PyTreeNode):
    """An observer of the float input of a layer, or of one of attention's products: measures the cost of quantizing it alone.

    ``kernel`` ([L,] K, N) is the float kernel and ``layer`` its quantized layer; ``act`` is the quantizer of an input of
    attention's products.
    """

    kernel: Float[Array, "*lead K N"] | None = None
    layer: QLinear | None = None
    act: ActQuantizer | None = None

    def observe(self, x: jax.Array) -> metrics.Powers:
        if self.layer is None:
            assert self.act is not None
            return metrics.powers(x, self.act(x))
        act = self.layer.act
        # The folded model has already balanced its inputs.
        fed = x if act is None else act.replace(balance=None)(x)
        product = lambda x, kernel: jnp.einsum("...k,kn->...n", x, kernel, precision=EXACT)
        return metrics.powers(product(x, self.kernel), product(fed, jnp.swapaxes(self.layer.weight.dequantize(), -1, -2)))


@jax.jit
def _costs(folded: FloatDiT, quantized: QuantizedDiT, step: CalibrationData) -> dict[str, metrics.Powers]:
    """Returns powers by site, with leaves ([L])."""
    group = step_group(quantized.group_edges, quantized.schedule.noise_level(jnp.asarray(step.t)))
    observers = {name: _Costs(act=act.at_group(group)) for name, act in quantized.sites.items()}
    site_of = folded.config.spec.site_of
    for name, layer in quantized.linears.items():
        observers[site_of[name]] = _Costs(kernel=folded.layer(name)["kernel"], layer=layer.at_group(group))
    return flatten_sites(folded.observe(nest_sites(observers), step.x, step.t, step.y)[1])


def _worst_layers(folded: FloatDiT, quantized: QuantizedDiT, rows: CalibrationData) -> tuple[LayerQuality, ...]:
    """Returns the layers whose quantization alone costs most, worst first."""
    at = lambda step: jax.tree.map(lambda leaf: leaf[step], rows)
    with jax.transfer_guard_host_to_device("allow"):
        batches = [jax.device_get(ready(_costs(folded, quantized, at(step)))) for step in range(rows.num_steps)]
    layer_of = {site: layer for layer, site in folded.config.spec.site_of.items()}
    found = []
    for site in batches[0]:
        decibels = metrics.pooled_db([batch[site] for batch in batches])
        blocks: list[int | None] = list(range(decibels.size)) if decibels.ndim else [None]
        found += [
            LayerQuality(layer_of.get(site, site), block, max(_FLOOR_DB, float(value)))
            for block, value in zip(blocks, decibels.ravel(), strict=True)
        ]
    return tuple(sorted(found, key=lambda layer: layer.sqnr_db)[:_NAMED])
