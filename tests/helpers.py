"""What several test modules share: a small model, a lowered sampler, and the distance of arrays."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ptq4dit_jax import checkpoints
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.chain import Batch, Program, Shared, sample_batch
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.engine import QLinear, QuantizedDiT, choice, hopper, xla
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig, init_params
from ptq4dit_jax.quantizers import ActQuantizer

#: The integer operations by the reference, and by the kernels for Hopper with the reference behind them.
XLA, HOPPER = choice.Choice(xla.BACKEND).dispatch, choice.Choice(hopper.BACKEND).dispatch
#: Settings that compile fastest, where a test is about other things.
PLAIN: dict[str, Any] = {"balance": "csb+ssc", "rounding": "nearest"}


def tiny_config(**overrides: Any) -> DiTConfig:
    """A DiT that compiles in a second. Its 9 tokens are a size that no other axis has, so a token axis can be recognized."""
    shape = {
        "input_size": 6,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 5,
        "frequency_size": 16,
    }
    return DiTConfig(**{**shape, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> FloatDiT:
    """A random model in which every path matters: modulation, gates and biases are not zero. Leaves are NumPy arrays, (K, N)
    kernels have standard deviation ``K**-0.5``, and nothing is compiled to make them."""
    config = tiny_config(**overrides)
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        deviation = {"kernel": leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1.0, "bias": 0.1, "embedding": 1.0}[path[-1].key]
        return (deviation * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return FloatDiT(params=jax.tree_util.tree_map_with_path(draw, shapes), config=config)


def random_inputs(config: DiTConfig, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noised images (rows, H, W, C) float32 and labels (rows,) int32, the null class among them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows, dtype=np.int32) % max(config.num_labels, 1)
    return rng.standard_normal((rows, *config.image_shape), np.float32), labels


def as_float64(model: QuantizedDiT) -> QuantizedDiT:
    """The same integers with scales and biases in float64; zero points are folded in anew, in float64."""
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype), model)
    linears = {name: QLinear.pack(layer.weight, layer.float_bias, layer.act) for name, layer in wide.linears.items()}
    return wide.replace(linears=linears, dtype="float64")


def load_float(path: str | os.PathLike[str]) -> FloatDiT:
    """The float model that a folder holds."""
    model = checkpoints.load(path)
    assert isinstance(model, FloatDiT)
    return model


def load_quantized(path: str | os.PathLike[str]) -> QuantizedDiT:
    """The quantized model that a folder holds."""
    model = checkpoints.load(path)
    assert isinstance(model, QuantizedDiT)
    return model


def act_of(model: QuantizedDiT, layer: str) -> ActQuantizer:
    """The quantizer of the input of a layer that has one."""
    act = model.linears[layer].act
    assert act is not None
    return act


def structure(tree: Any) -> Any:
    """Its structure, to compare: JAX does not say what type ``jax.tree.structure`` gives."""
    return jax.tree.structure(tree)


def num_programs(jitted: Any) -> int:
    """For how many kinds of arguments a jitted function is compiled."""
    return int(jitted._cache_size())


def lowered_sampler(model: Any, steps: int, rows: int = 3) -> Any:
    """The deterministic sampler with its noise given, so that the program holds no loops of the random number generator."""
    sampling = Sampling("ddim", steps).resolve(model.schedule, model.config)
    noise = jnp.zeros((rows, *model.config.image_shape), jnp.float32)
    shared = Shared(model, sampling.tables(), jax.random.key(0))
    batch = Batch(jnp.arange(rows), jnp.zeros(rows, jnp.int32), noise)
    return sample_batch.lower(shared, batch, program=Program.of(sampling, model.config))


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """Euclidean distance over the norm of what is expected."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def outputs_on(rows: CalibrationData, model: Any) -> np.ndarray:
    """What a model makes of calibration rows that share a time per step, (S * R, H, W, C)."""
    apply = jax.jit(lambda m, x, t, y: m.apply(x, t, y))
    return np.concatenate([apply(model, rows.x[s], rows.t[s : s + 1], rows.y[s]) for s in range(rows.num_steps)])


def same_but_for_ties(actual: ArrayLike, expected: ArrayLike) -> bool:
    """Whether rows (R, ...) of two programs of one function of integers agree to float32's last bits, but for a few in which a
    value lay so near to a tie that it became another code. Those err less than quantization does."""
    a, b = (np.asarray(rows, np.float64).reshape(len(np.asarray(rows)), -1) for rows in (actual, expected))
    errors = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
    return bool(np.mean(errors < 2e-6) >= 0.95 and errors.max() < 0.05)


def same_bytes(a: Any, b: Any) -> bool:
    """Whether two trees have as many leaves, of the same types and bytes."""
    leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (a, b)]
    assert len(leaves[0]) == len(leaves[1])
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(*leaves, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Seen:
    """What an observer has seen."""

    x: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Capture:
    """Observer that becomes what it has seen."""

    def observe(self, x: jax.Array) -> Seen:
        return Seen(x)
