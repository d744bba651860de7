"""What rounding and learning give a unit, and the model assembled from all units."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32

from ptq4dit_jax.engine import QLinear, QuantizedDiT
from ptq4dit_jax.quantizers import ActQuantizer, QTensor
from ptq4dit_jax.reconstruction.fake_quant import scaled
from ptq4dit_jax.reconstruction.units import Unit

#: A quantizer, or that of a layer, which may have none.
_Quantizer = TypeVar("_Quantizer", ActQuantizer, ActQuantizer | None)


class RoundedUnit(struct.PyTreeNode):
    """A unit's quantized ``weights`` (N, K) and ``biases`` (N,) float32 by layer, and by site the logarithm (G,) of the factor
    on the scales of its activations. Sites whose scales stay may be absent."""

    weights: dict[str, QTensor]
    biases: dict[str, Float[Array, " _N"]]
    log_scale: dict[str, Float32[Array, " _G"]]

    def params(self) -> dict[str, dict[str, jax.Array]]:
        """Returns the kernels (K, N) and biases (N,) of the layers."""
        return {
            layer: {"kernel": jnp.swapaxes(weight.dequantize(), -1, -2), "bias": self.biases[layer]}
            for layer, weight in self.weights.items()
        }

    def with_layer(self, layer: str, weight: QTensor, bias: jax.Array) -> RoundedUnit:
        weights, biases = self.weights | {layer: weight}, self.biases | {layer: bias}
        return self.replace(weights=weights, biases=biases)


def assemble(quantized: QuantizedDiT, units: Sequence[tuple[Unit, RoundedUnit]]) -> QuantizedDiT:
    """Returns the model with the weights, biases and scales of its units. Zero points are folded into the biases anew."""
    spec = quantized.config.spec
    weights: dict[str, list[QTensor]] = {}
    biases: dict[str, list[Any]] = {}
    scales: dict[str, list[Any]] = {}
    for unit, rounded in units:
        for layer, name in unit.layers.items():
            weights.setdefault(name, []).append(rounded.weights[layer])
            biases.setdefault(name, []).append(rounded.biases[layer])
        for site, name in unit.sites.items():
            if site in rounded.log_scale:
                scales.setdefault(name, []).append(rounded.log_scale[site])

    def learned(site: str, act: _Quantizer) -> _Quantizer | ActQuantizer:
        stacked = bool(spec.sites[site].place.lead)
        return act if site not in scales else _scaled(act, scales[site], stacked=stacked)

    linears = {}
    for name, linear in quantized.linears.items():
        act = learned(spec.site_of[name], linear.act)
        linears[name] = _pack(weights[name], biases[name], act, stacked=bool(spec.linears[name].place.lead))
    sites = {name: learned(name, act) for name, act in quantized.sites.items()}
    return quantized.replace(linears=linears, sites=sites)


def _joined(leaves: Sequence[Any], stacked: bool) -> Any:
    return jax.tree.map(lambda *each: jnp.stack(each), *leaves) if stacked else leaves[0]


@partial(jax.jit, static_argnames="stacked")
def _pack(weights: Sequence[QTensor], biases: Sequence[Any], act: ActQuantizer | None, *, stacked: bool) -> QLinear:
    return QLinear.pack(_joined(weights, stacked), _joined(biases, stacked), act)


@partial(jax.jit, static_argnames="stacked")
def _scaled(act: ActQuantizer, log_scale: Sequence[Any], *, stacked: bool) -> ActQuantizer:
    return scaled(act, _joined(log_scale, stacked))
