"""The float interpreter: a network as a Flax module.

**Sites.** Every activation that can be quantized or observed passes through :func:`site`, which looks for two variable
collections. ``quantizers`` holds callables ``x -> x`` (fake quantization, or a balancing factor); ``observers`` holds objects
with ``observe(x) -> observer``, run after the quantizer, so they see what the layer receives. Both are pytrees; with neither
present the site is the identity. The float model, calibration and fake quantization are therefore one code path, chosen by the
variables that are passed in. Blocks are scanned, so a block's variables carry a leading depth axis L.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from ptq4dit_jax.networks.ops import Activation, Network, Norm, Rotary
from ptq4dit_jax.networks.parts import float_attention, head_norm, modulate, normalize, rotate
from ptq4dit_jax.networks.spec import Stack
from ptq4dit_jax.numerics import EXACT, along_last, product_precision

#: Computes softmax attention of q, k and v (B, T, D) with so many heads, as one kernel; returns None for arrays that the kernel
#: does not take.
FusedAttention: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array | None]


def site(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Quantizes and observes ``x`` if the variables of ``module`` say so; see the module docstring."""
    if module.has_variable("quantizers", name):
        x = module.get_variable("quantizers", name)(x)
    if module.has_variable("observers", name):
        module.put_variable("observers", name, module.get_variable("observers", name).observe(x))
    return x


@dataclasses.dataclass(frozen=True)
class FloatOps:
    """The verbs (:class:`ptq4dit_jax.networks.ops.Ops`) in floats, inside a Flax module whose variables hold the layers.

    ``dense`` returns a layer's module by its name; ``sites`` holds the site that feeds each layer. Outputs of layers are sites,
    too, named by the layer's name plus ``_out``. ``fused`` computes attention where nothing watches its parts.
    """

    module: nn.Module
    dense: Callable[[str], nn.Dense]
    sites: dict[str, str]
    dtype: DTypeLike
    precision: jax.lax.Precision
    fused: FusedAttention | None = None

    def _site(self, name: str, x: jax.Array) -> jax.Array:
        return site(self.module, name, x)

    def _watched(self, name: str) -> bool:
        return any(self.module.has_variable(kind, name) for kind in ("quantizers", "observers"))

    def _fed(self, layer: str, x: jax.Array) -> jax.Array:
        return self._site(self.sites[layer], x)

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        return self.product(name, self._fed(name, x))

    def table(self, name: str) -> jax.Array | None:
        found = getattr(self.module, name, None)
        return None if found is None else found.embedding

    def look_up(self, name: str, rows: jax.Array) -> jax.Array:
        return getattr(self.module, name)(rows)

    def modulation(self, name: str, c_BD: jax.Array, parts: int) -> list[jax.Array]:
        return jnp.split(self.linear(name, c_BD), parts, axis=-1)

    def normed(self, feeds: str, x_BTD: jax.Array, shift: jax.Array | None, scale: jax.Array, norm: Norm) -> jax.Array:
        return self._fed(feeds, modulate(normalize(x_BTD, norm), shift, scale))

    def product(self, name: str, fed: jax.Array) -> jax.Array:
        return self.dense(name)(fed)

    def split(self, name: str, fed: jax.Array, parts: int) -> list[jax.Array]:
        if self.fused is None:
            return jnp.split(self.product(name, fed), parts, axis=-1)
        # A kernel takes no part of an array, so XLA would copy the parts of one product.
        layer: dict[str, jax.Array] = self.module.get_variable("params", name)
        kernels, biases = (jnp.split(layer[leaf].astype(self.dtype), parts, axis=-1) for leaf in ("kernel", "bias"))
        product = partial(jnp.matmul, fed, precision=product_precision(self.dtype, self.precision))
        return [product(kernel) + along_last(bias, fed.ndim) for kernel, bias in zip(kernels, biases, strict=True)]

    def head_normed(self, gain: str, x_BTD: jax.Array, heads: int, norm: Norm) -> jax.Array:
        gain_d = self.module.param(gain, nn.initializers.ones, (x_BTD.shape[-1] // heads,))
        return head_norm(x_BTD, heads, norm, gain_d)

    def attend(
        self, q_BTD: jax.Array, k_BTD: jax.Array, v_BTD: jax.Array, heads: int, feeds: str, rotary: Rotary | None = None
    ) -> jax.Array:
        if rotary is not None:
            q_BTD, k_BTD = (rotate(x, heads, rotary) for x in (q_BTD, k_BTD))
        parts = {"q": q_BTD, "k": k_BTD, "v": v_BTD}
        if self.fused is not None and not any(map(self._watched, (*parts, "probs"))):
            out_BTD = self.fused(q_BTD, k_BTD, v_BTD, heads)
            if out_BTD is not None:
                return self._fed(feeds, out_BTD)
        q, k, v = (self._site(name, einops.rearrange(x, "b t (a d) -> b t a d", a=heads)) for name, x in parts.items())
        watch = (lambda probs_BATT: self._site("probs", probs_BATT)) if self._watched("probs") else None
        out = float_attention(q, k, v, watch, product_precision(self.dtype, self.precision))
        return self._fed(feeds, einops.rearrange(out, "b t a d -> b t (a d)"))

    def activated(self, name: str, fed: jax.Array, activation: Activation, feeds: str) -> jax.Array:
        h = self._site(f"{name}_out", self.product(name, fed))
        if activation is Activation.GELU:
            return self._fed(feeds, nn.gelu(h, approximate=True))
        gate, linear = jnp.split(h, 2, axis=-1)
        return self._fed(feeds, nn.silu(gate) * linear)

    def gated(self, name: str, fed: jax.Array, gate: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return x_BTD + gate[:, None] * self._site(f"{name}_out", self.product(name, fed))

    def blocks(self, stack: Stack, x_BTD: jax.Array, c_BD: jax.Array) -> jax.Array:
        return getattr(self.module, stack.name)(x_BTD, c_BD)[0]


def _dense(features: int, dtype: DTypeLike, precision: jax.lax.Precision, name: str | None = None) -> nn.Dense:
    init = nn.initializers.xavier_uniform()
    return nn.Dense(features, dtype=dtype, precision=product_precision(dtype, precision), kernel_init=init, name=name)


class Block(nn.Module):
    """One block of a stack: maps (B, T, D) and the embedded condition (B, D) to (B, T, D)."""

    config: Network
    stack: Stack
    dtype: DTypeLike
    precision: jax.lax.Precision = EXACT
    fused: FusedAttention | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, c_BD: jax.Array) -> tuple[jax.Array, None]:
        [kind] = [kind for kind in self.config.spec.kinds if kind.stack == self.stack]
        features = {linear.place.name: linear.N for linear in kind.linears}
        dense = lambda name: _dense(features[name], self.dtype, self.precision, name)
        ops = FloatOps(self, dense, kind.site_of, self.dtype, self.precision, self.fused)
        return site(self, "block_out", self.config.block(ops, self.stack, x_BTD, c_BD)), None


class FloatNetwork(nn.Module):
    """A network. ``dtype`` is the compute type; norms and softmax always reduce in float32 at least. ``precision`` applies to
    float32 products. ``fused`` computes attention where it can, as one kernel.

    Variables: ``params``, with the parameters of a stack's blocks on a leading depth axis, and optionally ``quantizers`` and
    ``observers`` (module docstring). Kernels are (K, N), Flax's order.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    precision: jax.lax.Precision = EXACT
    fused: FusedAttention | None = None

    def setup(self) -> None:
        spec = self.config.spec
        for linear in spec.linears.values():
            if linear.place.stack is None:
                setattr(self, linear.place.name, _dense(linear.N, self.dtype, self.precision))
        for name, table in spec.tables.items():
            init = nn.linear.default_embed_init if table.deviation is None else nn.initializers.normal(table.deviation)
            setattr(self, name, nn.Embed(table.rows, table.features, dtype=self.dtype, embedding_init=init))
        for stack in spec.stacks:
            scanned = nn.scan(
                Block,
                variable_axes={"params": 0, "quantizers": 0, "observers": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=stack.depth,
            )
            setattr(self, stack.name, scanned(self.config, stack, self.dtype, self.precision, self.fused))

    @property
    def _ops(self) -> FloatOps:
        sites = {layer: name for kind in self.config.spec.kinds if kind.stack is None for layer, name in kind.site_of.items()}
        return FloatOps(self, lambda name: getattr(self, name), sites, self.dtype, self.precision)

    def __call__(self, x_BHWC: ArrayLike, t_B: ArrayLike, y_B: ArrayLike | None) -> jax.Array:
        """Returns the raw network output (B, H, W, out_channels): the prediction, then variance channels if sigma is learned.

        Args:
          x_BHWC: noised images or latents, (B, input_size, input_size, in_channels).
          t_B: timesteps of a noise schedule (0 is the cleanest) or times of a flow, (B,), or (1,) if all rows share it.
          y_B: class labels, (B,) int32; ``config.null_label`` for "no class". Ignored, and may be None, without classes.
        """
        return self.config.forward(self._ops, x_BHWC, t_B, y_B)

    def embed_image(self, x_BHWC: ArrayLike) -> jax.Array:
        """See :meth:`ptq4dit_jax.networks.ops.Network.embed_image`."""
        return self.config.embed_image(self._ops, x_BHWC)

    def embed_condition(self, t_B: ArrayLike, y_B: ArrayLike | None) -> jax.Array:
        """See :meth:`ptq4dit_jax.networks.ops.Network.embed_condition`."""
        return self.config.embed_condition(self._ops, t_B, y_B)

    def head(self, x_BTD: jax.Array, c_BD: jax.Array) -> jax.Array:
        """See :meth:`ptq4dit_jax.networks.ops.Network.head`."""
        return self.config.head(self._ops, x_BTD, c_BD)
