"""The tensors of a VAE's decoder by the names of diffusers (torch's present and former ones, Flax's) and of latent-diffusion.

latent-diffusion counts the decoder's levels from the finest, which is last in diffusers, and its attention is made of 1x1
convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Tensor
from ptq4dit_jax.errors import Ptq4ditError

#: Names in the middle block that every decoder has, and which code base they belong to.
_MARKERS = {
    "decoder.mid_block.resnets.0.conv1.weight": "diffusers",
    "decoder.mid_block.resnets_0.conv1.kernel": "diffusers (Flax)",
    "decoder.mid.block_1.conv1.weight": "latent-diffusion",
}
#: From our names in attention, which are Flax's and torch's former ones, to torch's present and to latent-diffusion's.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
#: The parts of a file that are the decoder's, beside an encoder, losses and other networks.
DECODER = ("decoder.", "post_quant_conv.")


def find_decoder(names: Iterable[str]) -> dict[str, str]:
    """Returns the prefixes of decoders in a file, such as ``first_stage_model.``, and which code base's names each has."""
    found = {}
    for name in names:
        for marker, family in _MARKERS.items():
            root = name.removesuffix(marker)
            if name.endswith(marker) and (not root or root[-1] == "."):
                found[root] = family
    return found


def spellings(name: str, levels: int) -> tuple[str, str, str, str]:
    """Returns the names that a parameter of ours may have in a file: torch's present and former, Flax's, latent-diffusion's.

    Args:
      name: such as ``decoder/up_blocks_0/resnets_1/conv1/kernel``.
      levels: the number of the decoder's levels.
    """
    flax = name.replace("/", ".")
    former = re.sub(r"\.(kernel|scale)$", ".weight", re.sub(r"_(\d+)\.", r".\1.", flax))
    present = re.sub(rf"(attentions\.\d+)\.({'|'.join(_ATTENTION)})\.", lambda m: f"{m[1]}.{_ATTENTION[m[2]]}.", former)
    return present, former, flax, _ldm(former, levels)


def _ldm(former: str, levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", former)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    pattern = rf"mid_block\.attentions\.0\.({'|'.join(_LDM_ATTENTION)})\."
    name = re.sub(pattern, lambda m: f"mid.attn_1.{_LDM_ATTENTION[m[1]]}.", name)
    for theirs, ldm in (("resnets", "block"), ("conv_shortcut", "nin_shortcut"), ("upsamplers.0", "upsample")):
        name = name.replace(theirs, ldm)
    return name.replace("conv_norm_out", "norm_out")


def stored_shapes(source: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the shapes in which a file may hold a parameter of our ``shape``, the usual one first. torch has outputs in
    front, and a linear layer may be stored as the 1x1 convolution that it once was."""
    torch = source.endswith(".weight")
    if len(shape) == 4:
        return [(shape[3], shape[2], *shape[:2]) if torch else shape]
    if len(shape) == 2:
        linear, pixel = (shape[::-1], (*shape[::-1], 1, 1)) if torch else (shape, (1, 1, *shape))
        return [pixel, linear] if ".attn_1." in source else [linear, pixel]
    return [shape]


def arrange(tensor: Tensor, source: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the values of a parameter of our ``shape``, float32, from a tensor of one of the :func:`stored_shapes`."""
    array = tensor.read().astype(np.float32)
    torch = source.endswith(".weight")
    if len(shape) == 2:
        array = array.reshape(shape[::-1] if torch else shape)
    if torch:
        array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.T
    return array


def read_sizes(view: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """Reads settings of a :class:`~ptq4dit_jax.vae.VAEConfig` off shapes.

    Args:
      view: tensors by name, without the prefix before ``decoder.``.
      family: as :func:`find_decoder` returns it.

    Raises:
      Ptq4ditError: a convolution that determines a size is missing, or is none.
    """
    leaf, blocks, layers, middle = {
        "diffusers": ("weight", "up_blocks.{}", "resnets.{}", "mid_block.attentions.0.group_norm.weight"),
        "diffusers (Flax)": ("kernel", "up_blocks_{}", "resnets_{}", "mid_block.attentions_0.group_norm.scale"),
        "latent-diffusion": ("weight", "up.{}", "block.{}", "mid.attn_1.norm.weight"),
    }[family]

    def channels(name: str) -> tuple[int, int]:
        """Returns the numbers of outputs and inputs of a convolution."""
        if (tensor := view.get(f"decoder.{name}.{leaf}")) is None or len(tensor.shape) != 4:
            state = "is missing" if tensor is None else f"is of shape {tensor.shape}"
            raise Ptq4ditError(
                f"The convolution decoder.{name}.{leaf} of the VAE {state}, so that its sizes cannot be read off."
            )
        return tensor.shape[:2] if leaf == "weight" else tensor.shape[:1:-1]

    def count(pattern: str) -> int:
        return next(n for n in range(len(view) + 1) if f"decoder.{pattern.format(n)}.conv1.{leaf}" not in view)

    first = layers.format(0)
    levels = count(f"{blocks}.{first}")
    widths = [channels(f"{blocks.format(n)}.{first}.conv1")[0] for n in range(levels)]
    return {
        "block_out_channels": tuple(widths if family == "latent-diffusion" else widths[::-1]),
        "layers_per_block": count(f"{blocks.format(0)}.{layers}") - 1,
        "latent_channels": channels("conv_in")[1],
        "out_channels": channels("conv_out")[0],
        "use_post_quant_conv": f"post_quant_conv.{leaf}" in view,
        "mid_block_add_attention": f"decoder.{middle}" in view,
    }
