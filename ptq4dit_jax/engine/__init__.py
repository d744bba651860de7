"""The integer DiT."""

from ptq4dit_jax.engine.description import ActRanges, LayerReport, describe
from ptq4dit_jax.engine.layers import QLinear
from ptq4dit_jax.engine.quantized_dit import Provenance, QuantizedDiT, imitation, reference, site_quantizers

__all__ = [
    "ActRanges",
    "LayerReport",
    "Provenance",
    "QLinear",
    "QuantizedDiT",
    "describe",
    "imitation",
    "reference",
    "site_quantizers",
]
