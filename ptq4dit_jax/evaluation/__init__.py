"""How good a quantized model is: paired metrics, comparisons of two models, plots and a report."""

from typing import TYPE_CHECKING, Any

from ptq4dit_jax.evaluation.compare import (
    NOISE_FLOOR,
    REFERENCE,
    Comparison,
    ModelFigures,
    compare,
    num_bytes,
    plain,
    same_noise_images,
)
from ptq4dit_jax.evaluation.grids import image_grid, sample_grid
from ptq4dit_jax.evaluation.metrics import (
    SQNR_MEAN,
    SQNR_POOLED,
    Interval,
    StepsSQNR,
    bootstrap_interval,
    psnr_db,
    sqnr_db,
    ssim,
    steps_sqnr,
)
from ptq4dit_jax.evaluation.probes import layer_sqnr, predicted_noise, step_sqnr
from ptq4dit_jax.evaluation.report import write_report

if TYPE_CHECKING:
    from ptq4dit_jax.evaluation.plots import reconstruction_figure, salience_figure, step_sqnr_figure

__all__ = [
    "NOISE_FLOOR",
    "REFERENCE",
    "SQNR_MEAN",
    "SQNR_POOLED",
    "Comparison",
    "Interval",
    "ModelFigures",
    "StepsSQNR",
    "bootstrap_interval",
    "compare",
    "image_grid",
    "layer_sqnr",
    "num_bytes",
    "plain",
    "predicted_noise",
    "psnr_db",
    "reconstruction_figure",
    "salience_figure",
    "same_noise_images",
    "sample_grid",
    "sqnr_db",
    "ssim",
    "step_sqnr",
    "step_sqnr_figure",
    "steps_sqnr",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Figures, whose module loads matplotlib."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ptq4dit_jax.evaluation import plots

    return getattr(plots, name)
