"""The peers in PyTorch that quantize: torchao's int8 and fp8, weights stored, activations scaled at run time.

Run by benchmarks/sampling.py on the DiT of torch_dit.py. What is quantized are the linears of the blocks, 99 % of the weights.
The int8 peer leaves adaLN in bfloat16: it multiplies one row an image, and PyTorch's int8 product (``torch._int_mm``) refuses
fewer than 17, for which reason users leave it out, too.
"""

from __future__ import annotations

import copy
import os
from typing import Any

# The wheel's own extensions serve neither recipe, and one built for another CUDA need not even load.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import torch
import torchao
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    PerRow,
    PerTensor,
    quantize_,
)

from benchmarks.peers.torch_dit import GRAPHS, DiT

#: What torch.compile is told to choose the kernels of products by trying, minutes for each size. Only a product of its own
#: takes the scales of int8 along; the library's leaves int32 sums in memory. Of mode "max-autotune" that leaves out the search
#: over the other kernels' launch settings by coordinate descent, which compiles many variants of every kernel one after
#: another. torchao's own advice turns that search on, therefore ``set_inductor_config=False`` below and its one option that
#: concerns products here.
TUNED = {**GRAPHS, "max_autotune_gemm": True, "force_fuse_int_mm_with_mul": True}
#: The largest error of the network's output against bfloat16's that is still quantization.
TOLERANCE = 0.15
#: Layers that see every token.
_LARGE = ("qkv", "proj", "fc1", "fc2")


def int8(model: DiT) -> dict[str, Any]:
    """W8A8, scales for each output channel and each token."""
    return _convert(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), Int8Tensor, _LARGE)


def fp8(model: DiT) -> dict[str, Any]:
    """fp8 (e4m3), scales for each output channel and each token; for whole tensors where such products do not run."""
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    facts = {"granularity": "row"}
    try:
        block = copy.deepcopy(model.blocks[0])
        quantize_(block, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
        weight, hidden = model.patch_embed.weight, model.config.hidden_size
        block(weight.new_ones(2, model.config.num_tokens, hidden), weight.new_ones(2, hidden))
    except RuntimeError as error:
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor(), set_inductor_config=False)
        facts = {"granularity": "tensor", "row_failed": str(error).splitlines()[0]}
    return {**facts, **_convert(model, config, Float8Tensor, (*_LARGE, "adaLN"))}


def _convert(model: DiT, config: Any, kind: type, layers: tuple[str, ...]) -> dict[str, Any]:
    """Quantizes these layers of every block and makes sure of it: by their type, and by what the network then computes."""
    wanted = {f"blocks.{i}.{layer}" for i in range(model.config.depth) for layer in layers}
    before = _output(model)
    quantize_(model, config, filter_fn=lambda module, name: name in wanted)
    found = {name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), kind)}
    if found != wanted:
        raise RuntimeError(f"torchao quantized {len(found)} linear layers where {len(wanted)} were asked for.")
    error = float((_output(model) - before).norm() / before.norm())
    if not 0 < error < TOLERANCE:
        raise RuntimeError(f"torchao's output differs from bfloat16's by {error:.3g}; quantization alone does not do that.")
    return {"software": {"torchao": torchao.__version__}, "quantized_layers": len(found), "relative_error": error}


def _output(model: DiT) -> torch.Tensor:
    """What the network makes, uncompiled, of the same noise each time, float32."""
    device = model.positions.device
    noise = torch.randn(2, *model.config.image_shape, generator=torch.Generator().manual_seed(1))
    image = noise.to(device, torch.bfloat16)
    return model(image, torch.tensor(500, device=device), torch.arange(2, device=device)).float()


#: By engine, what torch_dit.measure is given. fp8 is not tuned: the library's product takes its scales along, and none of 105
#: kernels that were tried in its place for qkv of DiT-XL/2 and 64 images, in 99 s, came within twice its time.
RECIPES: dict[str, dict[str, Any]] = {
    "torchao-int8": {"options": GRAPHS, "convert": int8},
    "torchao-int8-tuned": {"options": TUNED, "convert": int8},
    "torchao-fp8": {"options": GRAPHS, "convert": fp8},
}
