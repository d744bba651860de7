"""The peer in JAX: the same Flax DiT with its blocks' linear layers in W8A8 by Qwix, scales of activations taken at run time.

Run by benchmarks/sampling.py; sampled by the same chain as our own models. Qwix quantizes what its rules name: the five linears
of a block, so attention stays cuDNN's in bfloat16, as ours, and so do the layers outside the blocks, 1 % of the weights.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import struct
from jax.typing import ArrayLike

from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiT, DiTConfig
from ptq4dit_jax.networks.float_network import Block
from ptq4dit_jax.schedules import NoiseSchedule, Schedule

LAYERS = ("adaLN", "qkv", "proj", "fc1", "fc2")


def _provider(prefix: str = "") -> qwix.PtqProvider:
    path = rf"{prefix}({'|'.join(LAYERS)})"
    return qwix.PtqProvider([qwix.QuantizationRule(module_path=path, weight_qtype="int8", act_qtype="int8")])


@struct.dataclass
class QwixDiT:
    """A DiT quantized by Qwix, with the face of our models; a pytree. Kernels of the blocks are Qwix's own arrays."""

    params: Any
    config: DiTConfig = struct.field(pytree_node=False)
    schedule: Schedule = struct.field(pytree_node=False, default=NoiseSchedule())

    def apply(self, x_BHWC: ArrayLike, t_B: ArrayLike, y_B: ArrayLike) -> jax.Array:
        """Raw network output (B, H, W, out_channels)."""
        network = qwix.quantize_model(DiT(self.config, jnp.bfloat16), _provider("blocks/"))
        return network.apply({"params": self.params}, x_BHWC, t_B, y_B)


def quantize(dit: FloatDiT) -> QwixDiT:
    """The model in bfloat16 with W8A8 linears. ``qwix.quantize_params`` shares one scale between the blocks of a scanned stack,
    so it is mapped over single blocks."""
    config, params = dit.config, dit.astype(jnp.bfloat16).params
    block = qwix.quantize_model(Block(config, config.spec.stacks[0], jnp.bfloat16), _provider())
    tokens = jax.ShapeDtypeStruct((1, config.num_tokens, config.hidden_size), jnp.bfloat16)
    condition = jax.ShapeDtypeStruct((1, config.hidden_size), jnp.bfloat16)
    shapes = jax.eval_shape(block.init, jax.random.key(0), tokens, condition)["params"]
    blocks = jax.jit(jax.vmap(lambda params: qwix.quantize_params(params, shapes)))(params["blocks"])
    return QwixDiT(params={**params, "blocks": blocks}, config=config, schedule=dit.schedule)


def integer_products(model: QwixDiT) -> int:
    """How many products of int8 with int8 to int32 the lowered network holds; a block is scanned, so its layers count once."""
    image, t = jnp.zeros((2, *model.config.image_shape)), jnp.zeros((1,), jnp.int32)
    text = jax.jit(lambda m, x, t, y: m.apply(x, t, y)).lower(model, image, t, jnp.zeros((2,), jnp.int32)).as_text()
    return len(re.findall(r"dot_general.*xi8>, tensor<\S*xi8>\) -> tensor<\S*xi32>", text))
