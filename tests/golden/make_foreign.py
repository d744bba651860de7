"""Writes `foreign/`: tiny checkpoints as other code bases write them, and what their own code computes with them.

    python tests/golden/make_foreign.py        (with torch 2.13 and diffusers 0.42; the tests need neither)

meta_train.pt      a file as Meta's train.py saves: {model, ema, opt, args}. The network below has the structure and names of
                   facebookresearch/DiT and was written for this file; that repository's own models.py (ed81ce2, timm 1.0.31)
                   was run on it once and gives the outputs below bit for bit. 24 wide, 2 blocks, 3 heads, patch 2, 4
                   channels, 8x8, 10 classes and a null class, learned sigma; no gate is zero.
diffusers/         a pipeline folder without VAE: DiTTransformer2DModel of 2 heads of 12, 2 blocks, patch 2, 4 channels, 8x8, 10
                   classes, with its scheduler.
outputs.npz        x (3,4,8,8) NCHW float32, t (3,), y (3,); and the outputs (3,8,8,8) in float32 of
                   `meta_ema`, `meta_model`, `diffusers`, and `diffusers_as_meta`: diffusers with its time frequencies and its
                   MLP norm's epsilon set to Meta's.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent / "foreign"
WIDTH, DEPTH, HEADS, PATCH, CHANNELS, SIDE, CLASSES = 24, 2, 3, 2, 4, 8, 10


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def frequencies(t: torch.Tensor, shift: int = 0) -> torch.Tensor:
    f = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / (128 - shift))
    return torch.cat([torch.cos(t[:, None].float() * f), torch.sin(t[:, None].float() * f)], -1)


def positions() -> torch.Tensor:
    omega = 1.0 / 10000 ** (np.arange(WIDTH // 4, dtype=np.float64) / (WIDTH / 4.0))
    row, column = np.divmod(np.arange((SIDE // PATCH) ** 2), SIDE // PATCH)
    table = [f(np.outer(p, omega)) for p in (column, row) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(table, 1)).float()[None]


class Part(nn.Module):
    """A module that only holds others by name."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        h = WIDTH
        self.pos_embed = nn.Parameter(positions(), requires_grad=False)
        self.x_embedder = Part(proj=nn.Conv2d(CHANNELS, h, PATCH, PATCH))
        self.t_embedder = Part(mlp=mlp(nn.Linear(256, h), nn.SiLU(), nn.Linear(h, h)))
        self.y_embedder = Part(embedding_table=nn.Embedding(CLASSES + 1, h))
        self.blocks = nn.ModuleList(
            Part(
                attn=Part(qkv=nn.Linear(h, 3 * h), proj=nn.Linear(h, h)),
                mlp=Part(fc1=nn.Linear(h, 4 * h), fc2=nn.Linear(4 * h, h)),
                adaLN_modulation=mlp(nn.SiLU(), nn.Linear(h, 6 * h)),
            )
            for _ in range(DEPTH)
        )
        self.final_layer = Part(
            linear=nn.Linear(h, PATCH * PATCH * 2 * CHANNELS), adaLN_modulation=mlp(nn.SiLU(), nn.Linear(h, 2 * h))
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder.mlp(frequencies(t)) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            s1, g1, a1, s2, g2, a2 = block.adaLN_modulation(c).chunk(6, 1)
            qkv = block.attn.qkv(norm(x, s1, g1)).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
            x = x + a1[:, None] * block.attn.proj(attended)
            x = x + a2[:, None] * block.mlp.fc2(F.gelu(block.mlp.fc1(norm(x, s2, g2)), approximate="tanh"))
        x = self.final_layer.linear(norm(x, *self.final_layer.adaLN_modulation(c).chunk(2, 1)))
        side = SIDE // PATCH
        x = x.unflatten(1, (side, side)).unflatten(3, (PATCH, PATCH, 2 * CHANNELS))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * CHANNELS, SIDE, SIDE)


def randomize(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.requires_grad:
            table = "embedding_table" in name
            p.data = torch.randn(p.shape) * (0.5 if table else 0.1 if p.ndim == 1 else p[0].numel() ** -0.5)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    HERE.mkdir(exist_ok=True)
    x, t, y = torch.randn(3, CHANNELS, SIDE, SIDE), torch.tensor([0, 500, 999]), torch.tensor([3, 0, CLASSES])
    out = {"x": x, "t": t, "y": y}

    model = DiT().eval()
    randomize(model)
    ema = copy.deepcopy(model)
    for p in ema.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape)
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.final_layer.parameters(), lr=1e-4, weight_decay=0)
        model(x, t, y).square().mean().backward()
        optimizer.step()
    args = argparse.Namespace(model="DiT-XS/2", image_size=64, num_classes=CLASSES, global_seed=0)
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(), "args": args}
    torch.save(state, HERE / "meta_train.pt")
    out |= {"meta_model": model(x, t, y), "meta_ema": ema(x, t, y)}

    torch.manual_seed(1)
    folder = HERE / "diffusers"
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=DEPTH,
        sample_size=SIDE,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-3,
    ).eval()
    randomize(model)
    embedders = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(embedders)
    model.save_pretrained(folder / "transformer")
    scheduler = DDIMScheduler(
        beta_schedule="linear", num_train_timesteps=500, beta_start=2e-4, beta_end=0.03, clip_sample=False
    )
    scheduler.save_pretrained(folder / "scheduler")
    names = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **names}, indent=2) + "\n")
    out["diffusers"] = model(x, t, class_labels=y).sample
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    out["diffusers_as_meta"] = model(x, t, class_labels=y).sample
    np.savez_compressed(HERE / "outputs.npz", **{name: value.numpy() for name, value in out.items()})


if __name__ == "__main__":
    main()
