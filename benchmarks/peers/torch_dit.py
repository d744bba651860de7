"""The peer in PyTorch: a DiT of the same shape in bfloat16 with scaled_dot_product_attention, compiled.

Run by benchmarks/sampling.py. Random weights; the same network, guidance and DDPM update. torch.compile
sees the whole step, guidance and update included.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ptq4dit_jax.networks.dit import DiTConfig, position_embedding
from ptq4dit_jax.samplers import SAMPLERS
from ptq4dit_jax.schedules import NoiseSchedule

#: The option behind torch.compile's mode "reduce-overhead".
GRAPHS = {"triton.cudagraphs": True}


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_heads
        self.adaLN, self.qkv, self.proj = nn.Linear(D, 6 * D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, config.mlp_size), nn.Linear(config.mlp_size, D)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        m = self.adaLN(c).chunk(6, dim=-1)
        q, k, v = self.qkv(_modulate(x, m[0], m[1])).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        x = x + m[2][:, None] * self.proj(out)
        return x + m[5][:, None] * self.fc2(F.gelu(self.fc1(_modulate(x, m[3], m[4])), approximate="tanh"))


class DiT(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, P, C = config.hidden_size, config.patch_size, config.in_channels
        self.config = config
        self.patch_embed = nn.Linear(P * P * C, D)
        self.time_fc1, self.time_fc2 = nn.Linear(config.frequency_size, D), nn.Linear(D, D)
        self.label_embed = nn.Embedding(config.num_classes + 1, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_adaLN, self.final = nn.Linear(D, 2 * D), nn.Linear(D, P * P * config.out_channels)
        self.register_buffer("positions", torch.from_numpy(position_embedding(config)))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x (B, H, W, C), t () and y (B,) to (B, H, W, out_channels)."""
        c, P = self.config, self.config.patch_size
        side = c.input_size // P
        tokens = x.view(-1, side, P, side, P, c.in_channels).permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], side * side, -1)
        h = self.patch_embed(tokens) + self.positions
        half = c.frequency_size // 2
        angles = t * torch.exp(-np.log(10000.0) * torch.arange(half, device=x.device) / half)
        frequencies = torch.cat([torch.cos(angles), torch.sin(angles)])[None].to(x.dtype)
        cond = F.silu(self.time_fc2(F.silu(self.time_fc1(frequencies))) + self.label_embed(y))
        for block in self.blocks:
            h = block(h, cond)
        shift, scale = self.final_adaLN(cond).chunk(2, dim=-1)
        out = self.final(_modulate(h, shift, scale)).view(-1, side, side, P, P, c.out_channels)
        return out.permute(0, 1, 3, 2, 4, 5).reshape(-1, c.input_size, c.input_size, c.out_channels)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, of a quantized one those of its parts."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def build(config: DiTConfig, device: str) -> DiT:
    """The model with random weights, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(config)
    return model.to(device, torch.bfloat16).eval()


def measure(
    config: DiTConfig,
    guided: list[int],
    steps: int,
    repeats: int,
    *,
    options: dict[str, Any] | None = None,
    convert: Callable[[DiT], dict[str, Any]] | None = None,
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """One entry for each number of guided images.

    ``options`` go to torch.compile; ``convert`` quantizes the model in place and returns what is worth knowing about that.
    ``sampling_bytes`` is the peak of what was allocated after the first step, which compiles and tunes: a later step allocates
    the same whether it runs kernel by kernel or is being recorded as a graph (the second step is).
    """
    cuda, graphs = device == "cuda", bool(options and options.get("triton.cudagraphs"))
    model = build(config, device)
    with torch.no_grad():
        facts: dict[str, Any] = {"software": {"PyTorch": torch.__version__.split("+")[0]}}
        for name, fact in (convert(model) if convert else {}).items():
            facts[name] = {**facts[name], **fact} if name in facts else fact
    facts["weights_bytes"] = sum(map(nbytes, itertools.chain(model.parameters(), model.buffers())))
    tables = SAMPLERS["ddpm"].tables(NoiseSchedule(), steps)
    rows = {name: torch.tensor(np.asarray(getattr(tables, name)), device=device) for name in tables.__dataclass_fields__}

    def step(x: torch.Tensor, y: torch.Tensor, row: dict[str, torch.Tensor]) -> torch.Tensor:
        C = config.in_channels
        out = model(
            torch.cat([x, x]).to(torch.bfloat16), row["t"], torch.cat([y, torch.full_like(y, config.num_classes)])
        ).float()
        cond, null = out.chunk(2)
        eps = torch.cat([null[..., :3] + 1.5 * (cond[..., :3] - null[..., :3]), cond[..., 3:C]], dim=-1)
        fraction = (cond[..., C:] + 1) / 2
        x0 = row["x0_from_x"] * x - row["x0_from_eps"] * eps
        sigma = torch.exp(0.5 * (fraction * row["log_var_max"] + (1 - fraction) * row["log_var_min"]))
        return row["from_x"] * x + row["from_x0"] * x0 + row["not_last"] * sigma * torch.randn_like(x)

    def chain(compiled: Any, y: torch.Tensor, *, fresh: bool = False) -> float:
        started = time.perf_counter()
        x = torch.randn(len(y), *config.image_shape, device=device)
        for i in range(steps):
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            x = compiled(x, y, {name: row[i] for name, row in rows.items()}).clone()
            if cuda and fresh and i == 0:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for count in guided:
        torch._dynamo.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        compiled = torch.compile(step, options=options)
        y = torch.arange(count, device=device) % config.num_classes
        with torch.no_grad():
            first = chain(compiled, y, fresh=True)
            seconds = [chain(compiled, y) for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated() if cuda else None
        del compiled  # its graphs' memory is not to count for the next
        yield {"guided": count, "first_s": first, "seconds": seconds, "sampling_bytes": peak, **facts}
