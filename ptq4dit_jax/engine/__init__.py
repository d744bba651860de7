"""The integer DiT."""

from ptq4dit_jax.engine.description import describe
from ptq4dit_jax.engine.layers import QLinear
from ptq4dit_jax.engine.quantized_dit import Provenance, QuantizedDiT, reference, site_quantizers

__all__ = ["Provenance", "QLinear", "QuantizedDiT", "describe", "reference", "site_quantizers"]
