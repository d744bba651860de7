"""Settings of a quantization run, in sections that check themselves."""

from ptq4dit_jax.config.quant_config import QuantConfig
from ptq4dit_jax.config.reconstruction import MAX_ITERATIONS, Reconstruction, RowsOn, Start
from ptq4dit_jax.config.sections import (
    FLOAT_ACTS,
    MAX_ROWS,
    Activations,
    Balancing,
    BalancingMethod,
    Calibration,
    Rounding,
    Weights,
)

__all__ = [
    "FLOAT_ACTS",
    "MAX_ITERATIONS",
    "MAX_ROWS",
    "Activations",
    "Balancing",
    "BalancingMethod",
    "Calibration",
    "QuantConfig",
    "Reconstruction",
    "Rounding",
    "RowsOn",
    "Start",
    "Weights",
]
