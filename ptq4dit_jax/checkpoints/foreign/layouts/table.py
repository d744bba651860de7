"""A layout: a table from the names in a foreign file to ours, and what else a file of its kind tells.

Names are written with ``{i}`` for the index of a block. Our names are those of
:func:`ptq4dit_jax.checkpoints.float_dit.flatten`: blocks are stacked on a leading depth axis, kernels are (K, N), and the rows
of the patch embedding's kernel are (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Tensor
from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.schedules import NoiseSchedule

Objective = Literal["noise", "velocity"]
View: TypeAlias = Mapping[str, Tensor]


class Transform(NamedTuple):
    """One tensor from their form into ours and back; both take the configuration."""

    ours: Callable[[np.ndarray, DiTConfig], np.ndarray]
    theirs: Callable[[np.ndarray, DiTConfig], np.ndarray]


KEEP = Transform(lambda a, c: a, lambda a, c: a)
TRANSPOSE = Transform(lambda a, c: a.T, lambda a, c: a.T)
#: Patch convolutions: torch's (D, C, P, P) and Flax's (P, P, C, D).
PATCH_OIHW = Transform(
    lambda a, c: a.transpose(2, 3, 1, 0).reshape(-1, c.hidden_size),
    lambda a, c: a.reshape(c.patch_size, c.patch_size, c.in_channels, c.hidden_size).transpose(3, 2, 0, 1),
)
PATCH_HWIO = Transform(
    lambda a, c: a.reshape(-1, c.hidden_size),
    lambda a, c: a.reshape(c.patch_size, c.patch_size, c.in_channels, c.hidden_size),
)
#: Flax's attention keeps heads apart: (D, A, d) and (A, d) into q, k and v, (A, d, D) out of them.
TO_HEADS = Transform(
    lambda a, c: a.reshape(-1, c.hidden_size), lambda a, c: a.reshape(c.hidden_size, c.num_heads, c.head_width)
)
HEADS_BIAS = Transform(lambda a, c: a.reshape(c.hidden_size), lambda a, c: a.reshape(c.num_heads, c.head_width))
FROM_HEADS = Transform(
    lambda a, c: a.reshape(c.hidden_size, -1), lambda a, c: a.reshape(c.num_heads, c.head_width, c.hidden_size)
)


class Entry(NamedTuple):
    """Where one of our parameters comes from: their tensors, transformed, then joined on the last axis.

    Where their names have an ``{i}`` and ours is no block's, each block holds a copy of the same tensor.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = KEEP

    @property
    def stacked(self) -> bool:
        return self.ours.startswith("blocks/")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a family of checkpoints looks like.

    Attributes:
      name: what users call it.
      markers: names that, all together, only this layout has.
      block: the beginning of the names of a block, with ``{i}``; their number is the depth.
      entries: the table; empty where the network is another one than ours.
      sizes: where shapes tell sizes, as (name, axis): ``hidden``, ``patch``, ``channels``, ``rows`` (of the label table),
        ``mlp``, ``frequencies``, ``outputs`` and, where known, ``tokens`` and ``heads``.
      pos_embed: the fixed table of positions, checked and then dropped, if the layout stores it.
      ignored: regular expressions of names that carry no parameter.
      objective: what the network was trained to predict.
      told: an exception to that, told by the values themselves: takes the tensors and the configuration.
      schedule: of the noise it was trained with.
    """

    name: str
    markers: tuple[str, ...]
    block: str = ""
    entries: tuple[Entry, ...] = ()
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    pos_embed: str | None = None
    ignored: tuple[str, ...] = ()
    objective: Objective = "noise"
    told: Callable[[View, DiTConfig], Objective | None] = lambda view, config: None
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)


def torch_linear(ours: str, *theirs: str) -> tuple[Entry, Entry]:
    """A linear layer of torch, (N, K), or several that are joined on N."""
    kernel = Entry(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), TRANSPOSE)
    return kernel, Entry(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs))


def flax_linear(
    ours: str, *theirs: str, end: str = "", kernel: Transform = KEEP, bias: Transform = KEEP
) -> tuple[Entry, Entry]:
    """A linear layer of Flax, (K, N), or several that are joined on N; ``end`` follows every name."""
    return (
        Entry(f"{ours}/kernel", tuple(f"{name}.kernel{end}" for name in theirs), kernel),
        Entry(f"{ours}/bias", tuple(f"{name}.bias{end}" for name in theirs), bias),
    )
