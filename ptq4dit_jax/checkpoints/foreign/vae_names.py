"""The tensors of a VAE's decoder by the names of diffusers (torch's present and former ones, Flax's) and of latent-diffusion.

latent-diffusion counts the levels of the decoder from the finest, which diffusers puts last, and its attention consists of
convolutions of one pixel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.foreign.lazy import Tensor
from ptq4dit_jax.errors import Ptq4ditError

#: Names that every decoder has, of its middle block, and what they are called.
_MARKERS = {
    "decoder.mid_block.resnets.0.conv1.weight": "diffusers",
    "decoder.mid_block.resnets_0.conv1.kernel": "diffusers (Flax)",
    "decoder.mid.block_1.conv1.weight": "latent-diffusion",
}
#: Our name of a layer in attention, which is Flax's and torch's former one, torch's present one, and latent-diffusion's.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
#: What there is of a decoder, beside an encoder, losses and other networks.
DECODER = ("decoder.", "post_quant_conv.")


def find_decoder(names: Iterable[str]) -> dict[str, str]:
    """Prefixes of the names of decoders in a file, such as ``first_stage_model.``, and whose names they have."""
    found = {}
    for name in names:
        for marker, family in _MARKERS.items():
            root = name.removesuffix(marker)
            if name.endswith(marker) and (not root or root[-1] == "."):
                found[root] = family
    return found


def spellings(name: str, levels: int) -> tuple[str, str, str, str]:
    """Names in a file of a parameter of ours: torch's present and former one, Flax's, latent-diffusion's.

    Args:
      name: such as ``decoder/up_blocks_0/resnets_1/conv1/kernel``.
      levels: of the decoder.
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
    """Shapes in which a file may hold a parameter of our ``shape``, the usual one first: torch has outputs in front, and a
    linear layer may be stored as the convolution of one pixel that it once was."""
    torch = source.endswith(".weight")
    if len(shape) == 4:
        return [(shape[3], shape[2], *shape[:2]) if torch else shape]
    if len(shape) == 2:
        linear, pixel = (shape[::-1], (*shape[::-1], 1, 1)) if torch else (shape, (1, 1, *shape))
        return [pixel, linear] if ".attn_1." in source else [linear, pixel]
    return [shape]


def arrange(tensor: Tensor, source: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a parameter of our ``shape``, float32, from a tensor of one of the :func:`stored_shapes`."""
    array = tensor.read().astype(np.float32)
    torch = source.endswith(".weight")
    if len(shape) == 2:
        array = array.reshape(shape[::-1] if torch else shape)
    if torch:
        array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.T
    return array


def read_sizes(view: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """Settings of a :class:`~ptq4dit_jax.vae.VAEConfig` that shapes tell.

    Args:
      view: tensors by name without what comes before ``decoder.``.
      family: of :func:`find_decoder`.

    Raises:
      Ptq4ditError: a convolution that tells a size is missing or none.
    """
    leaf, blocks, layers, middle = {
        "diffusers": ("weight", "up_blocks.{}", "resnets.{}", "mid_block.attentions.0.group_norm.weight"),
        "diffusers (Flax)": ("kernel", "up_blocks_{}", "resnets_{}", "mid_block.attentions_0.group_norm.scale"),
        "latent-diffusion": ("weight", "up.{}", "block.{}", "mid.attn_1.norm.weight"),
    }[family]

    def channels(name: str) -> tuple[int, int]:
        """Outputs and inputs of a convolution."""
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
