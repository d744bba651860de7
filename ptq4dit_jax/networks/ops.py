"""Defines the verbs in which a network's forward is written, and the interface of a network.

A forward is one function of an interpreter (:class:`Ops`) and of the network's own settings. The float interpreter
(:mod:`ptq4dit_jax.networks.float_network`) reads Flax parameters and visits sites; the integer interpreter
(:mod:`ptq4dit_jax.engine`) holds packed layers and codes. So the network is written once, and interpreters are compared verb by
verb.

Layers have the names that they have inside a block, without the name of its stack.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer, Num, Shaped

from ptq4dit_jax.networks.spec import NetworkSpec, Stack


class NormKind(enum.Enum):
    """The divisor of a norm without affine parameters: the standard deviation about the mean, or the root mean square."""

    LAYER = "layer"
    RMS = "rms"


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm over channels; ``eps`` is added to the variance, or to the mean square."""

    eps: float = 1e-6
    kind: NormKind = NormKind.LAYER


class Activation(enum.Enum):
    """The function between two linear layers: GELU by tanh, or silu of the first half of the columns times the second
    (SwiGLU)."""

    GELU = "gelu"
    SWIGLU = "swiglu"


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., 2021) of a square of ``side`` x ``side`` tokens. Queries and keys are rotated in pairs of
    neighbouring channels: the first half of a head's channels by the token's row, the second half by its column."""

    side: int
    theta: float = 10000.0


class Ops(Protocol):
    """An interpreter of a network's forward.

    ``fed`` is the input of a layer as the interpreter makes it: floats, or integer codes with their scale. It is made for one
    layer, named by ``feeds``, and passed to that layer.
    """

    @property
    def dtype(self) -> DTypeLike:
        """The type of everything between the products."""

    def linear(self, name: str, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        """Applies a linear layer alone, (B, [T,] K) to (B, [T,] N)."""

    def table(self, name: str) -> Float[Array, "rows D"] | None:
        """Returns a parameter that is looked up or added, such as (T, D); None if the network lacks it."""

    def look_up(self, name: str, rows: Integer[Array, " B"]) -> Float[Array, "B D"]:
        """Returns rows of a table, by their numbers (B,) int32: (B, D)."""

    def modulation(self, name: str, c_BD: Float[Array, "#B D"], parts: int) -> Sequence[Any]:
        """Applies a linear layer to the condition, and splits the columns into ``parts``, each (B, N / parts)."""

    def normed(self, feeds: str, x_BTD: Float[Array, "B T D"], shift: Any, scale: Any, norm: Norm) -> Any:
        """Returns ``norm(x) (1 + scale) + shift`` as input of a layer; ``shift`` may be None."""

    def product(self, name: str, fed: Any) -> Float[Array, "B *T N"]:
        """Returns the output of a layer, (B, [T,] N)."""

    def split(self, name: str, fed: Any, parts: int) -> Sequence[Float[Array, "B *T of_N"]]:
        """Returns :meth:`product`, with the columns split into ``parts`` arrays of equal width."""

    def head_normed(self, gain: str, x_BTD: Float[Array, "B T D"], heads: int, norm: Norm) -> Float[Array, "B T D"]:
        """Returns the norm over the channels of each head, times the gain of that name, (B, T, D)."""

    def attend(
        self,
        q_BTD: Float[Array, "B T D"],
        k_BTD: Float[Array, "B T D"],
        v_BTD: Float[Array, "B T D"],
        heads: int,
        feeds: str,
        rotary: Rotary | None = None,
    ) -> Any:
        """Returns softmax attention as input of a layer."""

    def activated(self, name: str, fed: Any, activation: Activation, feeds: str) -> Any:
        """Applies the activation function to a layer's output, as input of another layer."""

    def gated(self, name: str, fed: Any, gate: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns ``x + gate * output`` of a layer, (B, T, D)."""

    def blocks(self, stack: Stack, x_BTD: Float[Array, "B T D"], c_BD: Float[Array, "#B D"]) -> Float[Array, "B T D"]:
        """Runs all blocks of a stack in turn."""


class Network(abc.ABC):
    """Base of a network's settings, a frozen dataclass: provides its tables and its forward.

    The units of the forward are separate methods, because they are rounded and reconstructed one by one.
    """

    @classmethod
    @abc.abstractmethod
    def example(cls) -> Network:
        """Returns a small network of this kind. Its layers and sites have the same names as in every other."""

    @functools.cached_property
    def spec(self) -> NetworkSpec:
        """The tables of the network."""
        return self._make_spec()

    @abc.abstractmethod
    def _make_spec(self) -> NetworkSpec: ...

    @abc.abstractmethod
    def embed_image(self, ops: Ops, x_BHWC: Shaped[ArrayLike, "B H W C"]) -> Float[Array, "B T D"]:
        """Returns the tokens (B, T, D) of images, with their positions."""

    @abc.abstractmethod
    def embed_condition(
        self, ops: Ops, t_B: Num[ArrayLike, " #B"], y_B: Integer[ArrayLike, " #B"] | None
    ) -> Float[Array, "#B D"]:
        """Returns the condition, all that modulation sees of time and labels: (B, D), or (1, D) if all rows share it."""

    @abc.abstractmethod
    def block(self, ops: Ops, stack: Stack, x_BTD: Float[Array, "B T D"], c_BD: Float[Array, "#B D"]) -> Float[Array, "B T D"]:
        """Runs one block of a stack, (B, T, D) to (B, T, D)."""

    @abc.abstractmethod
    def head(self, ops: Ops, x_BTD: Float[Array, "B T D"], c_BD: Float[Array, "#B D"]) -> Float[Array, "B H W outputs"]:
        """Maps the last hidden state to the network's output (B, H, W, out_channels)."""

    def forward(
        self, ops: Ops, x_BHWC: Shaped[ArrayLike, "B H W C"], t_B: Num[ArrayLike, " #B"], y_B: Integer[ArrayLike, " #B"] | None
    ) -> Float[Array, "B H W outputs"]:
        """Runs the whole network: raw output (B, H, W, out_channels)."""
        x_BTD = self.embed_image(ops, x_BHWC)
        c_BD = condition_of_rows(self.embed_condition(ops, t_B, y_B), x_BTD.shape[0])
        for stack in self.spec.stacks:
            x_BTD = ops.blocks(stack, x_BTD, c_BD)
        return self.head(ops, x_BTD, c_BD)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(K, N) of every linear layer, by its full name."""
        return {name: (linear.K, linear.N) for name, linear in self.spec.linears.items()}

    @property
    def site_features(self) -> dict[str, tuple[int, ...]]:
        """Trailing shape of the activation at every site that can be quantized, by its full name."""
        return {name: site.features for name, site in self.spec.sites.items()}

    @property
    def num_parameters(self) -> int:
        """The size of the float network: weights, biases, tables, and gains."""
        return self.spec.num_parameters


def condition_of_rows(c_BD: jax.Array, rows: int) -> jax.Array:
    """Broadcasts a condition that all rows share, (1, D), to every row, (B, D): without labels, it may be the time alone."""
    return jax.numpy.broadcast_to(c_BD, (rows, c_BD.shape[-1]))
