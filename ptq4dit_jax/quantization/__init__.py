"""Quantizing a float model: each stage is a function of what earlier stages returned; :func:`quantize` runs them all.

rows = ptq.sample_trajectories(dit, config.calibration, key=key)
observed = ptq.observe(dit, rows)
balanced = ptq.balance(dit, config, observed, rows)
ranged = ptq.choose_ranges(balanced, config, observed, rows)
quantized = ptq.pack(balanced, ranged, config, observed)
quantized, facts = ptq.reconstruct(balanced.folded, quantized, rows, ptq.Reconstruction(), key=key)
"""

from ptq4dit_jax.quantization.activations import Ranged, choose_ranges
from ptq4dit_jax.quantization.balancing import Balanced, balance
from ptq4dit_jax.quantization.observations import Observed, observe
from ptq4dit_jax.quantization.pipeline import quantize
from ptq4dit_jax.quantization.weights import pack

__all__ = ["Balanced", "Observed", "Ranged", "balance", "choose_ranges", "observe", "pack", "quantize"]
