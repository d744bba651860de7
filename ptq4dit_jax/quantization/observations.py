"""The first stage: the values that each channel of each site takes at each calibration step."""

from __future__ import annotations

from collections.abc import Mapping

from flax import struct
from jax.sharding import Mesh

from ptq4dit_jax.calibration import CalibrationData, ChannelExtremes, channel_extremes, check_finite
from ptq4dit_jax.model import FloatDiT


class Observed(struct.PyTreeNode):
    """Statistics of the float network, by site: leaves (S, [L,] K)."""

    extremes: Mapping[str, ChannelExtremes]


def observe(model: FloatDiT, rows: CalibrationData, *, row_batch: int | None = None, mesh: Mesh | None = None) -> Observed:
    """Gathers statistics of every site of a float model on calibration rows, at every step.

    Args:
      model: the model to quantize.
      rows: as sampled (:func:`ptq4dit_jax.calibration.sample_trajectories`) or stored.
      row_batch, mesh: as for :func:`ptq4dit_jax.calibration.channel_extremes`.

    Raises:
      Ptq4ditError: the statistics hold NaN or infinity.
    """
    sites = tuple(model.config.site_features)
    extremes = channel_extremes(model, rows, sites=sites, row_batch=row_batch, mesh=mesh)
    check_finite(extremes, rows.t)
    return Observed(extremes)
