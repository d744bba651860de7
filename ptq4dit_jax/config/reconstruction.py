"""Settings of block reconstruction."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, get_args

from ptq4dit_jax.config.checks import MAX_ROWS, check_choice
from ptq4dit_jax.edges import shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.settings import numbers, setting

#: Where the hidden states of calibration rows are kept.
RowsOn = Literal["auto", "device", "host"]
Start = Literal["nearest", "gptq"]

#: The most iterations per unit, far more than is useful.
MAX_ITERATIONS = 10**7
#: The most for a learning rate, a regularizer or its exponents.
_MAX_RATE = 1e6
#: Default chunks per batch on CPUs: as many as a host has devices.
_CHUNKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How block reconstruction learns roundings and activation scales (:mod:`ptq4dit_jax.reconstruction`).

    Attributes:
      iterations: per unit: the embedders, every block, the final layer.
      start: what learning starts from. ``nearest``: the ranges of rounding to the nearest, and the float weights within them.
        ``gptq``: closed-form rounding of the unit behind the learned units before it. None means ``gptq``.
      batch_size: rows per iteration, one from each of as many strata of the calibration rows; a multiple of the devices.
      rounding_rate, scale_rate: Adam's learning rates for the rounding variables and for the logarithms of activation scales;
        the latter decays to 0 by a cosine, the former if ``decay_rounding``.
      rounding_eps: Adam's epsilon for the rounding variables, whose gradients are of the order of 1. With an epsilon as large,
        a weight moves by how much it matters to the error; with a small one all move alike, most by the noise of batches.
      regularizer: weight of undecided roundings against the error, both per weight.
      exponents: of the regularizer, first and last.
      warmup: share of the iterations without the regularizer.
      row_weights: ``plain``, or ``steps``: rows count inversely to the float unit's mean square change at their step.
      dtype: compute type; ``auto`` is bfloat16 on GPU and TPU and float32 on CPU.
      accumulation_chunks: the number of chunks per batch, whose gradients are added up in order. Every number of devices that
        divides it gives the same integers. None means 1, or on CPUs the largest divisor of 8 that divides ``batch_size``:
        chunks of 4 rows are too little work for a GPU.
      rows_on: where hidden states are kept: ``device``, ``host`` (streamed batch by batch), or ``auto``, the device if they
        fit.
    """

    TITLE: ClassVar[str] = "Learning (--reconstruct)"

    iterations: int = setting(2000, "Iterations for each block, the embedders and the final layer.")
    start: Start | None = setting(
        None,
        "What learning starts from: nearest, or gptq, the closed form behind what was learned before.",
        flag="reconstruct-from",
        shown="gptq; nearest with --paper",
    )
    batch_size: int = setting(
        32, "Rows of an iteration, a multiple of the devices and of --accumulation-chunks.", flag="reconstruct-batch"
    )
    rounding_rate: float = setting(0.3, "Adam's learning rate of the roundings.")
    rounding_eps: float = setting(1.0, "Adam's epsilon of the roundings; a small one moves all weights alike.")
    decay_rounding: bool = setting(True, "Whether the learning rate of the roundings decays to 0 by a cosine.")
    scale_rate: float = setting(1e-3, "Adam's learning rate of the logarithms of activation scales.")
    regularizer: float = setting(0.1, "Weight of undecided roundings against the error.")
    exponents: tuple[float, float] = setting(
        (20.0, 2.0),
        "Exponents of the regularizer, first and last.",
        shown="20,2",
        metavar="FIRST,LAST",
        read=numbers("--exponents", "20,2"),
    )
    warmup: float = setting(0.2, "Part of the iterations without regularizer.")
    row_weights: Literal["plain", "steps"] = setting(
        "plain", "How rows count: plain, or steps, inversely to the mean square change at their step."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "Type to learn in: bfloat16, float32, or auto, float32 on a CPU only.", flag="reconstruct-dtype"
    )
    accumulation_chunks: int | None = setting(
        None,
        "Chunks of a batch; every number of devices that divides it learns the same integers.",
        shown="8 on CPUs, else 1",
        former="parts",
    )
    rows_on: RowsOn = setting(
        "auto", "Where hidden states are kept: device, host, or auto, the device if they fit.", flag="reconstruct-rows-on"
    )

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", *(() if self.accumulation_chunks is None else ("accumulation_chunks",))):
            value, most = getattr(self, name), MAX_ITERATIONS if name == "iterations" else MAX_ROWS
            if not isinstance(value, int) or value < 1:
                raise Ptq4ditError(f"Reconstruction {name} must be a positive integer, not {shown(value)}.")
            if value > most:
                raise Ptq4ditError(f"Reconstruction {name} must be at most {most}, not {shown(value)}.")
        chunks = self.accumulation_chunks
        if chunks is not None and self.batch_size % chunks:
            raise Ptq4ditError(f"A reconstruction batch of {self.batch_size} rows cannot be cut into {chunks} equal chunks.")
        for name in ("rounding_rate", "scale_rate", "regularizer"):
            if not 0 <= getattr(self, name) <= _MAX_RATE:
                raise Ptq4ditError(
                    f"Reconstruction {name} must be finite and not negative, at most {_MAX_RATE:g}, not {getattr(self, name)}."
                )
        if not 0 < self.rounding_eps <= _MAX_RATE:  # with 0, a weight without a gradient would give 0 / 0
            raise Ptq4ditError(
                f"Reconstruction rounding_eps must be finite and positive, at most {_MAX_RATE:g}, not {self.rounding_eps}."
            )
        if not 0 <= self.warmup < 1:
            raise Ptq4ditError(f"Reconstruction warmup must be at least 0 and below 1, not {self.warmup}.")
        if len(self.exponents) != 2 or not all(1 <= value <= _MAX_RATE for value in self.exponents):
            raise Ptq4ditError(f"Reconstruction exponents must be two numbers of at least 1, not {self.exponents}.")
        check_choice("Reconstruction start", self.start, (*get_args(Start), None))
        check_choice("Reconstruction row_weights", self.row_weights, ("plain", "steps"))
        check_choice("Reconstruction dtype", self.dtype, ("auto", "bfloat16", "float32"))
        check_choice("Reconstruction rows_on", self.rows_on, get_args(RowsOn))

    @property
    def resolved_start(self) -> Start:
        """``start``, or what None stands for."""
        return self.start or "gptq"

    def resolved_chunks(self, platform: str) -> int:
        """Returns ``accumulation_chunks``, or what None stands for on a platform of JAX."""
        if self.accumulation_chunks is not None:
            return self.accumulation_chunks
        return math.gcd(self.batch_size, _CHUNKS) if platform == "cpu" else 1
