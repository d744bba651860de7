"""Post-training quantization of Diffusion Transformers in JAX: W8A8 and W4A8 with real integers.

import jax, jax.numpy as jnp, ptq4dit_jax as ptq

dit = ptq.load("models/digits")
q = ptq.quantize(dit, ptq.QuantConfig.of(weight_bits=4), key=jax.random.key(0))
ptq.save(q, "out/digits-w4a8")
images = ptq.sample(q, labels=jnp.arange(10), key=jax.random.key(1), steps=50, cfg_scale=1.5)
"""

from ptq4dit_jax.calibration import CalibrationData, sample_trajectories, stored_rows
from ptq4dit_jax.checkpoints import load, save
from ptq4dit_jax.checkpoints.foreign import export_meta, import_checkpoint, load_vae
from ptq4dit_jax.config import Activations, Balancing, Calibration, QuantConfig, Reconstruction, Weights
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.engine import LayerReport, QuantizedDiT, describe, reference
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import compare, write_report
from ptq4dit_jax.exported import ExportedSampler, export_sampler
from ptq4dit_jax.exported_file import load_sampler, save_sampler
from ptq4dit_jax.guidance import Guidance, predict
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import PRESETS, DiTConfig
from ptq4dit_jax.outputs import save_samples
from ptq4dit_jax.policy import Policy
from ptq4dit_jax.program_cache import cache_programs
from ptq4dit_jax.quantization import Balanced, Observed, Ranged, balance, choose_ranges, observe, pack, quantize
from ptq4dit_jax.reconstruction import reconstruct, round_closed_form
from ptq4dit_jax.sampling import sample, sample_batches, to_uint8
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule
from ptq4dit_jax.sharding import data_mesh
from ptq4dit_jax.vae import VAEConfig, VAEDecoder

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Activations",
    "Balanced",
    "Balancing",
    "Calibration",
    "CalibrationData",
    "DiTConfig",
    "ExportedSampler",
    "FloatDiT",
    "FlowSchedule",
    "Guidance",
    "LayerReport",
    "NoiseSchedule",
    "Observed",
    "Policy",
    "Ptq4ditError",
    "QuantConfig",
    "QuantizedDiT",
    "Ranged",
    "Reconstruction",
    "Sampling",
    "VAEConfig",
    "VAEDecoder",
    "Weights",
    "balance",
    "cache_programs",
    "choose_ranges",
    "compare",
    "data_mesh",
    "describe",
    "export_meta",
    "export_sampler",
    "import_checkpoint",
    "load",
    "load_sampler",
    "load_vae",
    "observe",
    "pack",
    "predict",
    "quantize",
    "reconstruct",
    "reference",
    "round_closed_form",
    "sample",
    "sample_batches",
    "sample_trajectories",
    "save",
    "save_sampler",
    "save_samples",
    "stored_rows",
    "to_uint8",
    "write_report",
]
