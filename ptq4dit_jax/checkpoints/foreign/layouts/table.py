"""A layout: a table from the names in a foreign file to ours, and what else is known about files of its kind.

In names ``{i}`` stands for the index of a block. Our names are those of :func:`ptq4dit_jax.hashing.flatten`: blocks are stacked
on a leading depth axis, kernels are (K, N), and the rows of the patch embedding's kernel are (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Tensor
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.spec import Modulation
from ptq4dit_jax.schedules import NoiseSchedule, Schedule

View: TypeAlias = Mapping[str, Tensor]


class Transform(NamedTuple):
    """Converts a tensor from their form to ours and back; both functions also take the configuration."""

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
#: Flax's attention has an axis of heads: (D, A, d) and (A, d) for q, k and v, (A, d, D) for the output.
TO_HEADS = Transform(
    lambda a, c: a.reshape(-1, c.hidden_size), lambda a, c: a.reshape(c.hidden_size, c.num_heads, c.head_width)
)
HEADS_BIAS = Transform(lambda a, c: a.reshape(c.hidden_size), lambda a, c: a.reshape(c.num_heads, c.head_width))
FROM_HEADS = Transform(
    lambda a, c: a.reshape(c.hidden_size, -1), lambda a, c: a.reshape(c.num_heads, c.head_width, c.hidden_size)
)


#: Queries of an attention that divides by the head width instead of its square root, (D, D) and (D,).
QUERY = Transform(lambda a, c: a * c.head_width**-0.5, lambda a, c: a * c.head_width**0.5)


class Entry(NamedTuple):
    """Where one of our parameters comes from: their tensors, transformed, then joined on the last axis.

    ``transform`` is for all of their tensors, or a tuple with one for each. If their names have an ``{i}`` and our parameter is
    not a block's, each block holds a copy of the same tensor. Some networks lack an ``optional`` parameter.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform | tuple[Transform, ...] = KEEP
    optional: bool = False

    @property
    def parts(self) -> list[tuple[str, Transform]]:
        """Returns their names, each with its transform."""
        each = (self.transform,) * len(self.theirs) if isinstance(self.transform, Transform) else self.transform
        return list(zip(self.theirs, each, strict=True))

    @property
    def stacked(self) -> bool:
        return self.ours.startswith("blocks/")

    def names(self, depth: int) -> list[str]:
        """Returns their names in a network of that depth."""
        if "{i}" not in self.theirs[0]:
            return list(self.theirs)
        return [name.replace("{i}", str(i)) for i in range(depth) for name in self.theirs]


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """A second embedder of time, whose output for a step size is added to the condition.

    For a given number of equal steps this output is constant, and an import adds it to the bias of ``time_fc2``.

    Attributes:
      entries: a table in which our names are those of the time embedder with ``step_`` for ``time_``.
      seen: the embedder's input for a number of steps; for 0, any number, it is 0.
      default: the number of steps if none is given.
    """

    entries: tuple[Entry, ...]
    seen: Callable[[int], float]
    default: int


class FoldedGain(NamedTuple):
    """A learned gain (D,) of a norm, a factor on its channels that an import folds into the layer that modulates the norm.

    ``entry`` names it, under a name of ours that is no parameter. ``layer`` is the stem of the modulating layer's names, and
    ``home`` returns the chunks of its columns in a network.
    """

    entry: Entry
    layer: str
    home: Callable[[DiTConfig], Modulation]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a family of checkpoints looks like.

    Attributes:
      name: what users call it.
      markers: names that, all together, only this layout has.
      block: the start of the names in a block, with ``{i}``; the number of such blocks is the depth.
      entries: the table; empty if the network differs from ours.
      differs: how the network differs, if it does.
      sizes: where to read sizes off shapes, as (name, axis): ``hidden``, ``patch``, ``channels``, ``rows`` (of the label
        table), ``mlp``, ``frequencies``, ``outputs`` and, where known, ``tokens``, ``heads``, ``head_width``, ``modulated``
        (outputs of a block's adaLN) and ``head gain``.
      time_basis: the frequencies of time, in turns, if the network has its own and the layout stores them.
      pos_embed: the fixed table of positions, checked and then dropped, if the layout stores it.
      ignored: regular expressions of names that carry no parameter.
      is_shared: whether networks with other objectives and schedules are saved under the same names.
      renamed: takes all names; returns those that stand for others: (theirs in this file, theirs in the table).
      schedule: what the network was trained to predict, and over which time.
      told: returns an exception to ``schedule`` recognized by values; takes the tensors and the configuration.
      step_size: the embedder of step sizes, if the network has one.
      network: the class of the network's settings.
      gains: of its norms, if they are learned.
      is_on: keys of configurations that must be off in a plain DiT, and on in this network.
      family: the family in its published names, such as LightningDiT-XL/1, if it is not DiT.
      check: raises if buffers saved with the network do not fit its settings.
      constants: what else a file of this layout holds for a network without gains: ones in their place, and buffers.
    """

    name: str
    markers: tuple[str, ...]
    block: str = ""
    entries: tuple[Entry, ...] = ()
    differs: str = ""
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    pos_embed: str | None = None
    time_basis: str | None = None
    ignored: tuple[str, ...] = ()
    renamed: Callable[[Collection[str]], Mapping[str, str]] = lambda names: {}
    schedule: Schedule = field(default_factory=NoiseSchedule)
    told: Callable[[View, DiTConfig], Schedule | None] = lambda view, config: None
    step_size: StepSize | None = None
    is_shared: bool = False
    network: type[DiTConfig] = DiTConfig
    gains: tuple[FoldedGain, ...] = ()
    is_on: tuple[str, ...] = ()
    family: str = "dit"
    check: Callable[[View, DiTConfig], None] = lambda view, config: None
    constants: Callable[[DiTConfig], Mapping[str, np.ndarray]] = lambda config: {}

    @property
    def schedule_is_noise(self) -> bool:
        """Whether its networks predict noise unless something says otherwise."""
        return isinstance(self.schedule, NoiseSchedule)

    @property
    def all_entries(self) -> tuple[Entry, ...]:
        return self.entries + (self.step_size.entries if self.step_size else ()) + tuple(gain.entry for gain in self.gains)


def torch_linear(ours: str, *theirs: str) -> tuple[Entry, Entry]:
    """Returns entries for a linear layer of torch, (N, K), or for several that are joined on N."""
    kernel = Entry(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), TRANSPOSE)
    return kernel, Entry(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs))


def flax_linear(
    ours: str,
    *theirs: str,
    kernel: Transform | tuple[Transform, ...] = KEEP,
    bias: Transform | tuple[Transform, ...] = KEEP,
) -> tuple[Entry, Entry]:
    """Returns entries for a linear layer of Flax, (K, N), or for several that are joined on N."""
    return (
        Entry(f"{ours}/kernel", tuple(f"{name}.kernel" for name in theirs), kernel),
        Entry(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), bias),
    )


def flax_attention(prefix: str) -> tuple[Entry, ...]:
    """Returns entries for Flax's attention, with separate q, k and v and an axis of heads."""
    names = (f"{prefix}.query", f"{prefix}.key", f"{prefix}.value")
    return (
        *flax_linear("blocks/qkv", *names, kernel=TO_HEADS, bias=HEADS_BIAS),
        *flax_linear("blocks/proj", f"{prefix}.out", kernel=FROM_HEADS),
    )
