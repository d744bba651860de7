"""A comparison with known figures, and models small enough to compile in a second."""

import jax
import numpy as np
import pytest

from ptq4dit_jax.evaluation import Comparison, Interval, ModelFigures
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig


@pytest.fixture(scope="session")
def config() -> DiTConfig:
    return DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(scope="session")
def model(config) -> FloatDiT:
    return jax.jit(lambda key: FloatDiT.init(config, key=key))(jax.random.key(0))


@pytest.fixture
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    reference = rng.uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    names = {"bfloat16": 40.0, "W8A8": 30.0, "W4A8": 20.0}

    def figures(level: float) -> ModelFigures:
        psnr = level + np.arange(4.0)
        return ModelFigures(
            num_bytes=int(level * 1000),
            sqnr_mean_db=level + 2,
            sqnr_pooled_db=level + 1.5,
            step_sqnr_db=level + np.arange(5.0),
            layer_sqnr_db={site: level + np.arange(3.0) for site in map(str, DiTConfig.example().spec.outputs)},
            psnr_db=psnr,
            psnr_interval=Interval(psnr.mean(), level, level + 3),
            ssim=np.full(4, 0.9),
            ssim_interval=Interval(0.9, 0.9, 0.9),
        )

    return Comparison(
        figures={name: figures(level) for name, level in names.items()},
        reference_bytes=120_000,
        timesteps=np.array([999, 749, 500, 250, 0]),
        labels=np.array([0, 1, 2, 3]),
        images={name: reference + 0.01 * i for i, name in enumerate(("float32", *names))},
        data_range=2.0,
        settings={
            "images": 4,
            "steps": 5,
            "sampler": "ddpm",
            "cfg_scale": 1.5,
            "cfg_channels": "first3",
            "guidance_interval": None,
            "sqnr_steps": 5,
            "sqnr_rows": 4,
        },
    )
