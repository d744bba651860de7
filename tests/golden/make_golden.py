"""Writes `dit.npz` and `diffusion.npz`, the expectations of the tests, from the NumPy references beside this file.

    python tests/golden/make_golden.py

Seeded and deterministic. Inputs and parameters are float32 so that a float32 program sees the same numbers; everything
computed is float64. "Largest relative difference" below is max |a - b| / max |b| over an array.

The references were compared once with facebookresearch/DiT (network and guidance, that on all channels being its
commented-out line; respacing, tables, steps, chains) and with diffusers 0.42.1 (`DPMSolverMultistepScheduler`,
`DiTTransformer2DModel`). Largest relative difference as published, in float32: 9e-6 for the networks, nearly all of it
from sin and cos of large t (5e-7 at t = 0), and 9e-7 for the samplers; with the public code made to compute in float64
(`DiTTransformer2DModel` was not): 3e-15; DDPM tables and all step lists are equal to the last bit.

dit.npz: a tiny DiT, H = 96 wide, 2 blocks, 4 heads, patch 2, 4 channels, 8x8 (T = 16 tokens), 10 classes, learned
sigma. Images are NCHW. B = 3 rows: (t, y) = (0, 3), (500, 0), (999, 9).

    params/<Meta's name>   float32, Meta's layouts (linear (out, in), patch convolution (H, C, P, P)); without pos_embed
    heads, cfg_scale       scalars: 4 and 4.0
    x (3,4,8,8), t (3,), y (3,)            inputs
    pos_embed (16,96)      the fixed table, row-major tokens
    time_features (3,256)  cosines then sines of t
    c (3,96)               conditioning: embedded step plus embedded label
    blocks (2,3,16,96)     the residual stream after each block: (block, B, T, H)
    out (3,8,8,8)          prediction: channels 0..3 noise, 4..7 sigma
    out_null               the same with the null label 10
    out_freq_shift_1       the same as `out` with time frequencies over 127 instead of 128
    out_mlp_norm_eps_0.1   the same as `out` with epsilon 0.1 (exaggerated, to be seen) in the norm before each MLP only
    out_diffusers          the same as `out` as diffusers has it: frequencies over 127, MLP norm epsilon 1e-5
    guided_3 (6,8,8,8)     guidance on channels 0..2 as in Meta's `forward_with_cfg`: 3 conditional rows, their 3 null
                           twins; channels 0..2 are the same in both halves, the others are each half's own
    guided_4 (6,8,8,8)     the same with guidance on all 4 noise channels

diffusion.npz: linear betas 1e-4 .. 0.02 over 1000 steps. States have shape (2,4,4,3) and every formula is elementwise.

    timesteps_<spacing>    int64, ascending: 1, 2, 10, 21, 50, 100, 250, 1000, ddim10, ddim50, ddim250. "21" has 499
                           where round(k * 999 / 20) has 500: positions are a running sum of the stride
    timesteps_dpmpp_<N>    int64, descending, as visited: N = 10, 20, 25
    {betas,abar,abar_prev,mean_x0,mean_xt,log_variance}_{1000,50}   (1000,) or (50,), ascending in time, of the full
                           and of the respaced "50" process: posterior mean = mean_x0 * x0 + mean_xt * x_t;
                           log_variance is the posterior's with entry 0 replaced by entry 1
    step_j (4,)            indices 49, 25, 1, 0 into the "50" process, one for each row of the arrays below, which are
                           (4,2,4,4,3)
    step_x, step_eps, step_v, step_z   state, predicted noise, raw learned-range output (leaves [-1, 1]), fresh noise
    step_x0                the unclipped x0
    step_ddpm              the learned-range DDPM step; at index 0 the noise must not be added
    step_ddpm_fixed        the DDPM step with the posterior's variance (a model without learned sigma)
    step_ddim_eta_0, step_ddim_eta_0.5   DDIM steps
    chain_x (2,4,4,3)      x_T; chain_z (10,2,4,4,3): noise of the i-th step taken
    chain_ddpm             (11,2,4,4,3) all states, x_T first, of spacing "10"
    chain_ddim_eta_0, chain_ddim_eta_0.5   the same for spacing "ddim10"
    chain_dpmpp_10 (11,2,4,4,3), chain_dpmpp_20 (21,2,4,4,3)   DPM-Solver++ 2M, 10 and 20 steps

The chains' model is `eps = 0.9 x sqrt(1 - abar_t) + 0.1 sin(x)`, `v = 0.3 cos(x)`, with t the step of the full process.
"""

from pathlib import Path

import numpy as np
import reference_diffusion as diffusion
import reference_dit as dit

Array = np.ndarray

HERE = Path(__file__).parent
WIDTH, DEPTH, HEADS, PATCH, CHANNELS, SIDE, CLASSES = 96, 2, 4, 2, 4, 8, 10
CFG_SCALE = 4.0
SPACINGS = ("1", "2", "10", "21", "50", "100", "250", "1000", "ddim10", "ddim50", "ddim250")
STEP_INDICES = (49, 25, 1, 0)
STATE = (2, 4, 4, 3)  # elementwise throughout: read it as any layout


def make_params(rng: np.random.Generator) -> dict[str, Array]:
    """Random weights of a trained model's scale: no gate, modulation or output is zero, softmax is far from uniform."""
    h = WIDTH
    shapes = {  # name: (weight shape, weight deviation, bias deviation or None)
        "x_embedder.proj": ((h, CHANNELS, PATCH, PATCH), 0.25, 0.1),
        "t_embedder.mlp.0": ((h, 256), 0.06, 0.1),
        "t_embedder.mlp.2": ((h, h), h**-0.5, 0.1),
        "y_embedder.embedding_table": ((CLASSES + 1, h), 0.5, None),
        "final_layer.adaLN_modulation.1": ((2 * h, h), h**-0.5, 0.2),
        "final_layer.linear": ((PATCH * PATCH * 2 * CHANNELS, h), h**-0.5, 0.1),
    }
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.adaLN_modulation.1": ((6 * h, h), h**-0.5, 0.2),
            f"blocks.{i}.attn.qkv": ((3 * h, h), 1.5 * h**-0.5, 0.1),
            f"blocks.{i}.attn.proj": ((h, h), h**-0.5, 0.1),
            f"blocks.{i}.mlp.fc1": ((4 * h, h), h**-0.5, 0.1),
            f"blocks.{i}.mlp.fc2": ((h, 4 * h), (4 * h) ** -0.5, 0.1),
        }
    params = {}
    for name, (shape, weight, bias) in shapes.items():
        params[f"{name}.weight"] = (weight * rng.standard_normal(shape)).astype(np.float32)
        if bias is not None:
            params[f"{name}.bias"] = (bias * rng.standard_normal(shape[0])).astype(np.float32)
    return params


def make_dit() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    params = make_params(rng)
    x = rng.standard_normal((3, CHANNELS, SIDE, SIDE)).astype(np.float32)
    t, y = np.array([0, 500, 999]), np.array([3, 0, 9])
    config = dit.Config(heads=HEADS)
    out, blocks = dit.forward_with_blocks(params, config, x, t, y)
    return {
        **{f"params/{name}": value for name, value in params.items()},
        "heads": np.array(HEADS),
        "x": x,
        "t": t,
        "y": y,
        "cfg_scale": np.array(CFG_SCALE),
        "pos_embed": dit.pos_embed(WIDTH, SIDE // PATCH),
        "time_features": dit.time_features(t),
        "c": dit.conditioning(params, config, t, y),
        "blocks": blocks,
        "out": out,
        "out_null": dit.forward(params, config, x, t, np.full(3, CLASSES)),
        "out_freq_shift_1": dit.forward(params, dit.Config(HEADS, freq_shift=1.0), x, t, y),
        "out_mlp_norm_eps_0.1": dit.forward(params, dit.Config(HEADS, mlp_norm_eps=0.1), x, t, y),
        "out_diffusers": dit.forward(params, dit.Config(HEADS, freq_shift=1.0, mlp_norm_eps=1e-5), x, t, y),
        "guided_3": dit.forward_with_cfg(params, config, x, t, y, CFG_SCALE, 3),
        "guided_4": dit.forward_with_cfg(params, config, x, t, y, CFG_SCALE, 4),
    }


def make_diffusion() -> dict[str, Array]:
    rng = np.random.default_rng(1)

    def normal(*lead: int) -> Array:
        return rng.standard_normal((*lead, *STATE)).astype(np.float32)

    arrays = {f"timesteps_{s}": diffusion.space_timesteps(s) for s in SPACINGS}
    arrays |= {f"timesteps_dpmpp_{n}": diffusion.dpmpp_timesteps(n) for n in (10, 20, 25)}
    for spacing in ("1000", "50"):
        process = diffusion.make_process(arrays[f"timesteps_{spacing}"])
        for field in ("betas", "abar", "abar_prev", "mean_x0", "mean_xt", "log_variance"):
            arrays[f"{field}_{spacing}"] = getattr(process, field)

    n, process = len(STEP_INDICES), diffusion.make_process(arrays["timesteps_50"])
    x, eps, v, z = normal(n), normal(n), normal(n), normal(n)
    arrays |= {"step_j": np.array(STEP_INDICES), "step_x": x, "step_eps": eps, "step_v": v, "step_z": z}
    steps = list(zip(STEP_INDICES, x, eps, v, z, strict=True))
    arrays["step_x0"] = np.stack([diffusion.predict_x0(process.abar[j], a, e) for j, a, e, _, _ in steps])
    arrays["step_ddpm"] = np.stack([diffusion.ddpm_step(process, *step) for step in steps])
    arrays["step_ddpm_fixed"] = np.stack([diffusion.ddpm_step(process, j, a, e, None, b) for j, a, e, _, b in steps])
    for name, eta in (("ddim_eta_0", 0.0), ("ddim_eta_0.5", 0.5)):
        arrays[f"step_{name}"] = np.stack([diffusion.ddim_step(process, j, a, e, eta, b) for j, a, e, _, b in steps])

    x, z = normal(), normal(10)
    model = diffusion.toy_model
    arrays |= {
        "chain_x": x,
        "chain_z": z,
        "chain_ddpm": diffusion.ddpm_chain(model, "10", x, z),
        "chain_ddim_eta_0": diffusion.ddim_chain(model, "ddim10", x, z, 0.0),
        "chain_ddim_eta_0.5": diffusion.ddim_chain(model, "ddim10", x, z, 0.5),
        "chain_dpmpp_10": diffusion.dpmpp_2m_chain(model, 10, x),
        "chain_dpmpp_20": diffusion.dpmpp_2m_chain(model, 20, x),
    }
    return arrays


def main() -> None:
    for name, arrays in (("dit", make_dit()), ("diffusion", make_diffusion())):
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
