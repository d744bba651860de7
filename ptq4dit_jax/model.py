"""A float DiT with everything needed to sample from it: parameters, shape, and the schedule of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int32, Integer, Num

from ptq4dit_jax.networks.dit import DiTConfig, init_params
from ptq4dit_jax.networks.float_network import FloatNetwork, FusedAttention
from ptq4dit_jax.networks.spec import flatten_sites, nest_sites
from ptq4dit_jax.numerics import EXACT, AnyKey, asked_dtype, compute_dtype
from ptq4dit_jax.schedules import NoiseSchedule, Schedule
from ptq4dit_jax.tpu import generations
from ptq4dit_jax.waiting import ready


class ModelFace:
    """What float and quantized models share besides :meth:`apply`: the size of the pytree, the groups of steps, and ``apply``
    compiled."""

    group_edges: Num[Array, " edges"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def num_groups(self) -> int:
        """The number of groups of steps that the model's quantizers distinguish; 1 for a plain float model."""
        return self.group_edges.shape[0] + 1

    def prepared(self) -> Self:
        """Returns the same model in the form that this device reads fastest, for a program that applies it many times."""
        return self

    def partitionable(self) -> Self:
        """Returns the same model in a form whose program XLA can partition; it is not :meth:`prepared`.

        Raises:
          Ptq4ditError: the model names a backend of kernels, which XLA cannot partition.
        """
        return self

    def resolved(self) -> Self:
        """Returns the same model with the choices made that it leaves to the device."""
        return self

    def jitted(self) -> Callable[..., jax.Array]:
        """Returns ``apply`` compiled, with the model as an argument, so that models of one shape share the program."""
        return jax.tree_util.Partial(_jitted_apply, self)


class FloatDiT(ModelFace, struct.PyTreeNode):
    """A float model; a pytree whose leaves are the parameters.

    ``params`` is the tree of :func:`ptq4dit_jax.networks.dit.init_params`; block parameters carry a leading depth axis.
    ``quantizers`` (see :mod:`ptq4dit_jax.networks.float_network`) is empty for a plain model. If they hold tables over groups
    of steps, ``group_edges`` (G - 1,) are the noise levels that separate the groups (int32 timesteps of a noise schedule, or
    float32 for a flow). The model computes in the type of its kernels, or in float32 if that is float16, unless ``compute``
    names another type (:meth:`astype` sets it). ``precision`` applies to float32 products. :meth:`prepared` sets
    ``fused``.
    """

    params: Any
    config: DiTConfig = struct.field(pytree_node=False)
    schedule: Schedule = struct.field(pytree_node=False, default=NoiseSchedule())
    quantizers: Any = struct.field(default_factory=dict)
    group_edges: Num[Array, " edges"] = struct.field(default_factory=lambda: jnp.zeros((0,), jnp.int32))
    compute: str | None = struct.field(pytree_node=False, default=None)
    precision: jax.lax.Precision = struct.field(pytree_node=False, default=EXACT)
    fused: FusedAttention | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def init(
        cls, config: DiTConfig, *, key: AnyKey, schedule: Schedule = NoiseSchedule(), adaln_zero: bool = False
    ) -> FloatDiT:
        """Returns a model with random parameters. ``adaln_zero`` initializes it as for training; without it every path is
        active."""
        return cls(params=init_params(config, key, adaln_zero=adaln_zero), config=config, schedule=schedule)

    @property
    def param_dtype(self) -> np.dtype[Any]:
        """The type that the parameters are stored in."""
        return jnp.dtype(self.params["final"]["kernel"].dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type to compute in; see :func:`ptq4dit_jax.numerics.compute_dtype`."""
        return jnp.dtype(compute_dtype(self.param_dtype, self.compute))

    @property
    def _network(self) -> FloatNetwork:
        return FloatNetwork(self.config, self.dtype, self.precision, self.fused)

    def prepared(self) -> FloatDiT:
        """Returns the same model, with attention as one kernel on TPUs. XLA cannot partition a program with such kernels, so
        the program must be one of a single device, or of each device of a ``shard_map``."""
        if not generations.available():
            return self
        from ptq4dit_jax.tpu.attention import fused_attention

        return self.replace(fused=fused_attention)

    def _variables(self, t_B: ArrayLike) -> dict[str, Any]:
        if not self.quantizers:
            return {"params": self.params}
        group = step_group(self.group_edges, self.schedule.noise_level(jnp.asarray(t_B)))
        select = lambda q: q.at_group(group) if hasattr(q, "at_group") else q
        selected = {name: select(quantizer) for name, quantizer in flatten_sites(self.quantizers).items()}
        return {"params": self.params, "quantizers": nest_sites(selected)}

    def apply(
        self, x_BHWC: Num[ArrayLike, "B H W C"], t_B: Num[ArrayLike, " #B"], y_B: Integer[ArrayLike, " #B"] | None = None
    ) -> Float[Array, "B H W outputs"]:
        """Returns the raw network output (B, H, W, out_channels). ``t_B`` may be (1,) if all rows share the timestep. The
        labels ``y_B`` are left out if the model has no classes."""
        out = self._network.apply(self._variables(t_B), x_BHWC, t_B, y_B)
        return cast(jax.Array, out)

    def observe(
        self,
        observers: Any,
        x_BHWC: Num[ArrayLike, "B H W C"],
        t_B: Num[ArrayLike, " #B"],
        y_B: Integer[ArrayLike, " #B"] | None = None,
    ) -> tuple[Float[Array, "B H W outputs"], Any]:
        """Returns the output, and ``observers`` (a tree of objects by site) after they have seen this batch."""
        variables = self._variables(t_B) | {"observers": observers}
        out, new = self._network.apply(variables, x_BHWC, t_B, y_B, mutable=["observers"])
        return out, new["observers"]

    def layer(self, name: str) -> Any:
        """Returns the kernel ([L,] K, N) and bias ([L,] N) of a linear layer, by its name in ``config.linear_shapes``."""
        return self.config.spec.linears[name].place.of(self.params)

    def astype(self, dtype: DTypeLike) -> FloatDiT:
        """Returns the same model, stored and computing in ``dtype``, including float16."""
        params = jax.tree.map(lambda a: a.astype(dtype), self.params)
        return self.replace(params=params, compute=asked_dtype(dtype))

    @property
    def num_params(self) -> int:
        """The number of weights, biases, table values and gains."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def step_group(edges: Num[Array, " edges"], level_B: Num[Array, " B"]) -> Int32[Array, " B"] | Int32[Array, ""]:
    """Returns the groups of steps that noise levels belong to: the number of ``edges`` (G - 1,) above them, 0 for the noisiest.

    The result is (B,) int32, or () for a shared level of shape (1,).
    """
    group = jnp.zeros(level_B.shape, jnp.int32)
    if edges.shape[0]:  # XLA of JAX 0.11.2 crashes if a shard_map reads an empty array
        # The types differ if, for example, a user passes timesteps as floats.
        same = level_B.dtype == edges.dtype
        levels, edges = (level_B, edges) if same else (level_B.astype(jnp.float32), edges.astype(jnp.float32))
        group = (levels[:, None] < edges[None]).sum(-1, dtype=jnp.int32)
    return group[0] if level_B.shape[0] == 1 else group


_jitted_apply = jax.jit(lambda model, x, t, y=None: model.apply(x, t, y))


_nonfinite = jax.jit(lambda tree: jax.tree.map(lambda a: ~jnp.isfinite(a).all(), tree))


def has_nonfinite(tree: Any) -> list[str]:
    """Returns the paths of leaves that hold NaN or infinity."""
    flags = jax.tree_util.tree_leaves_with_path(jax.device_get(ready(_nonfinite(tree))))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in flags if bool(flag)]
