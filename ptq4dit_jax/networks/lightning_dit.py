"""LightningDiT (Yao et al., CVPR 2025): a DiT with RMSNorm, rotary positions and SwiGLU, on latents of many channels.

A learned gain g of an RMSNorm is not a separate parameter here: it is folded into the linear layer that modulates the norm, so
that ``g (1 + scale)`` replaces ``1 + scale``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.ops import Activation, NormKind, Rotary
from ptq4dit_jax.networks.spec import Columns, Home, Modulation


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningDiTConfig(DiTConfig):
    """Shape of a LightningDiT. The defaults are those of the published LightningDiT-XL/1, on 16 x 16 latents of 32 channels.

    A DiT's fixed table of positions is added, besides the rotation. SwiGLU is two thirds as wide as a DiT's MLP, so that it has
    the same number of parameters. Without ``shifts``, the norms of blocks are only scaled, and adaLN has four chunks. With
    ``qk_norm``, queries and keys are normalized head by head, with learned gains.
    """

    _NORM: ClassVar[NormKind] = NormKind.RMS
    _ACTIVATION: ClassVar[Activation] = Activation.SWIGLU

    input_size: int = 16
    patch_size: int = 1
    in_channels: int = 32
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    learn_sigma: bool = False
    shifts: bool = True
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shifts", "qk_norm"):
            if not isinstance(value := getattr(self, name), bool):
                raise Ptq4ditError(f"LightningDiT {name} must be true or false, not {quoted(value)}.")
        if self.head_width % 4:
            raise Ptq4ditError(
                f"A LightningDiT of width {self.hidden_size} with {self.num_heads} heads has heads of width {self.head_width}; "
                "rotary positions need a multiple of 4."
            )

    @classmethod
    def traits(cls, sizes: Mapping[str, int]) -> dict[str, Any]:
        return {"shifts": sizes.get("modulated") != 4 * sizes["hidden"], "qk_norm": "head gain" in sizes}

    @property
    def _norms_heads(self) -> bool:
        return self.qk_norm

    @property
    def modulations(self) -> tuple[Modulation, Modulation]:
        if self.shifts:
            return super().modulations
        return Modulation("adaLN", shift=None, scale=0, of=4), Modulation("adaLN", shift=None, scale=2, of=4)

    @property
    def _rotary(self) -> Rotary:
        return Rotary(self.tokens_per_side)

    @classmethod
    def mlp_ratio_of(cls, hidden_size: int, fc1_features: int) -> float:
        size, published = fc1_features // 2, cls.mlp_ratio
        exact = lambda ratio: int(2 / 3 * int(hidden_size * ratio)) == size
        return published if exact(published) else (math.ceil(1.5 * size) + 0.5) / hidden_size

    @property
    def mlp_size(self) -> int:
        return int(2 / 3 * int(self.hidden_size * self.mlp_ratio))

    @property
    def _mlp(self) -> tuple[int, Home]:
        # SwiGLU is linear in the second half of fc1's columns.
        return 2 * self.mlp_size, Columns("fc1", part=1, of=2)
