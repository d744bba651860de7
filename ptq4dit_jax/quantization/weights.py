"""The fourth stage: weights rounded to the nearest code, and everything packed into an integer model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax

from ptq4dit_jax import salience
from ptq4dit_jax.calibration import ChannelExtremes
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.engine import QLinear, QuantizedDiT
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.quantization.activations import Ranged
from ptq4dit_jax.quantization.balancing import Balanced
from ptq4dit_jax.quantization.observations import Observed
from ptq4dit_jax.quantizers import ActQuantizer, QTensor
from ptq4dit_jax.ranges import RangeSearch, quantize_weight


def pack(
    balanced: Balanced,
    ranged: Ranged,
    config: QuantConfig,
    observed: Observed,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedDiT:
    """Packs the integer model, its weights rounded to the nearest.

    Args:
      balanced: the float model after balancing.
      ranged: the quantizers of its activations.
      config: settings, of which ``policy``, ``weight_bits``, ``range_search`` and ``weigh_inputs`` apply.
      observed: statistics of the model before balancing; errors of weights are weighted by the power of the layer's inputs.
      progress: called with (layers done, layers in all).
    """
    folded, spec, linears = balanced.folded, balanced.folded.config.spec, {}
    config = config.for_network(folded.config)
    tell = progress or (lambda done, total: None)
    for done, (name, site) in enumerate(spec.site_of.items()):
        tell(done, len(spec.linears))
        importance = _input_power(observed.extremes[site], site, balanced.factors) if config.weights.weigh_inputs else None
        linears[name] = quantize_linear(folded, config, name, ranged.acts.get(site), importance)
    tell(len(spec.linears), len(spec.linears))
    return QuantizedDiT(
        linears=linears,
        sites={name: ranged.acts[name] for name in spec.attention if name in ranged.acts},
        label_embed=folded.params["label_embed"]["embedding"] if folded.config.num_labels else None,
        position_embed=folded.params["position_embed"]["embedding"] if folded.config.position_table else None,
        gains={name: gain.place.of(folded.params) for name, gain in spec.gains.items()},
        group_edges=ranged.edges,
        config=folded.config,
        schedule=folded.schedule,
    )


def quantize_linear(
    folded: FloatDiT, config: QuantConfig, name: str, act: ActQuantizer | None, importance: jax.Array | None = None
) -> QLinear:
    """Quantizes and packs one layer (a block layer in all blocks at once). ``importance`` ([L,] K) weights its inputs."""
    layer, bits = folded.layer(name), config.rules(folded.config.spec).layers[name].weight_bits
    weight = _quantize_kernels(layer["kernel"], importance, bits=bits, search=config.range_search)
    return _pack(weight, layer["bias"], act)


@partial(jax.jit, static_argnames=("bits", "search"))
def _quantize_kernels(kernel: jax.Array, importance: jax.Array | None, *, bits: int, search: RangeSearch) -> QTensor:
    """Quantizes kernels ([L,] K, N) to weights ([L,] N, K)."""

    def one(layer: tuple[jax.Array, jax.Array | None]) -> QTensor:
        return quantize_weight(layer[0].T, bits, search, layer[1])

    # Block by block, so that the search needs the memory of one block.
    return jax.lax.map(one, (kernel, importance)) if kernel.ndim == 3 else one((kernel, importance))


_pack = jax.jit(QLinear.pack)


def _input_power(statistics: ChannelExtremes, site: str, factors: Mapping[str, jax.Array]) -> jax.Array:
    """Mean square of each balanced input channel over all steps, ([L,] K), as :func:`salience.balanced_power` counts it."""
    power, factor = statistics.power.mean(0), factors.get(site)
    return power if factor is None else salience.balanced_power(power, factor)
