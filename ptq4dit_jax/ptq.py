"""The pipeline: calibrate, balance and fold, choose ranges on the folded model, pack. Each stage is a function of the ones
before."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.typing import ArrayLike

from ptq4dit_jax import balance_search, salience, sharding
from ptq4dit_jax.calibration import (
    CalibrationData,
    ChannelExtremes,
    channel_extremes,
    check_finite,
    histograms,
    sample_trajectories,
)
from ptq4dit_jax.checkpoints.float_dit import model_meta, source_hash
from ptq4dit_jax.checkpoints.store import content_hash
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.devices import default
from ptq4dit_jax.engine import Provenance, QLinear, QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.folding import fold
from ptq4dit_jax.model import FloatDiT, has_nonfinite
from ptq4dit_jax.networks.spec import Columns, NetworkSpec, nest_sites
from ptq4dit_jax.numerics import CALIBRATION, threefry
from ptq4dit_jax.quality import REFUSE_BELOW, PoorQuality, Quality, measure, some_rows
from ptq4dit_jax.quantizers import ActQuantizer, Balance, QTensor
from ptq4dit_jax.ranges import RangeSearch, activation_parameters, quantize_weight
from ptq4dit_jax.reconstruction import Journal, check_mesh, reconstruct, round_closed_form, units
from ptq4dit_jax.schedules import Schedule
from ptq4dit_jax.waiting import in_background


class StageProgress(Protocol):
    """Called with the stage, units done, units in all, and while reconstructing a note on how it goes."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


@struct.dataclass
class Balancing:
    """What balancing decided, for each balanced site by its full name: ``factors`` (L, K), and what the paper plots.

    ``activation_salience`` (S, L, K) and ``weight_salience`` (L, K) before balancing; SSC's ``eta`` and ``rho``, (S, L) or
    (S * R, L), empty without SSC; what was ``chosen`` by measurement, empty where nothing was.
    """

    factors: dict[str, Any]
    activation_salience: dict[str, Any]
    weight_salience: dict[str, Any]
    eta: dict[str, Any]
    rho: dict[str, Any]
    chosen: dict[str, balance_search.Chosen] = struct.field(pytree_node=False, default_factory=dict)


def quantize(
    model: FloatDiT,
    config: QuantConfig | None = None,
    *,
    key: jax.Array,
    calibration: CalibrationData | None = None,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
    state: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    keep_poor: bool = False,
    progress: StageProgress | None = None,
) -> QuantizedDiT:
    """Quantizes a float DiT after training with PTQ4DiT.

    Args:
      model: the float model.
      config: settings; ``QuantConfig()`` is W8A8 by our best measured settings, ``QuantConfig.paper()`` the paper's.
      key: seed of the calibration noise; not used where ``calibration`` is given.
      calibration: stored rows (:func:`ptq4dit_jax.calibration.stored_rows`) instead of sampling them.
      row_batch: calibration rows begun at once on each device, to bound memory, but at least
        :data:`~ptq4dit_jax.calibration.MICRO_BATCH`. It changes no number.
      mesh: whose devices share the calibration rows, and the rows of each batch of a reconstruction. How many there are changes
        no number, but for last bits of a reconstruction with ``parts=1``, GPUs' and TPUs' default.
      state: a folder for what a reconstruction has learned so far. Where it holds an interrupted run of the same model,
        settings, key and rows, that run goes on. It is left there; delete it when the result is safe.
      fresh: start over, whatever ``state`` holds.
      keep_poor: return a model that predicts worse than :data:`ptq4dit_jax.quality.REFUSE_BELOW`, too.
      progress: called as stages advance.

    Returns:
      The integer model, self-contained. Its provenance holds its quality, measured on a few of the calibration rows.

    Warns:
      PoorQuality: that quality is below :data:`ptq4dit_jax.quality.WARN_BELOW`.

    Raises:
      Ptq4ditError: an argument that makes no sense; NaN or infinity in the weights, the calibration rows, what is observed of
        them, or the result; a result of too poor quality, unless ``keep_poor``.
    """
    config, key = (config or QuantConfig()).for_network(model.config), threefry(key)
    if row_batch is not None and row_batch < 1:
        raise Ptq4ditError(f"row_batch must be positive, not {row_batch}.")
    if calibration is None:
        config = config.resolve(model.schedule, model.config)
    report = progress or (lambda stage, done, total, note="": None)
    if bad := has_nonfinite(model.params):
        raise Ptq4ditError(f"The weights hold NaN or infinity in {', '.join(bad[:3])}; a model must be finite to be quantized.")
    if config.learning is not None:
        check_mesh(config.learning, mesh)
    source_sha256 = in_background(lambda: source_hash(model.params))
    with _journal(config, model, source_sha256, key, calibration, state, fresh) as journal:
        if journal is not None:
            _report_resumed(journal, model, report)
        return _quantized(model, config, key, calibration, row_batch, mesh, journal, source_sha256, keep_poor, report)


def _quantized(
    model: FloatDiT,
    config: QuantConfig,
    key: jax.Array,
    calibration: CalibrationData | None,
    row_batch: int | None,
    mesh: Mesh | None,
    journal: Journal | None,
    source_sha256: Callable[[], str],
    keep_poor: bool,
    report: StageProgress,
) -> QuantizedDiT:
    """:func:`quantize` with arguments that were checked and the journal open."""
    # On one device, as is all that is made of it: what several run is a program of each (:func:`sharding.deal_out`), and the
    # rest is the program of one.
    model = jax.device_put(model.astype(jnp.float32), sharding.devices_of(mesh)[0])
    model = dataclasses.replace(model, precision=CALIBRATION)
    source = "given" if calibration is not None else f"sampled, key {jax.random.key_data(key).tolist()}"
    if calibration is None:
        report("sample calibration rows", 0, config.calib_rows)
        calibration = sample_trajectories(
            model,
            key,
            config.sampling,
            steps=config.calib_steps,
            rows=config.calib_rows,
            row_batch=row_batch,
            mesh=mesh,
            progress=lambda done, total: report("sample calibration rows", done, total),
        )
    calibration = CalibrationData(x=np.asarray(calibration.x), t=np.asarray(calibration.t), y=np.asarray(calibration.y))
    some = some_rows(calibration)

    report("gather channel statistics", 0, 1)
    extremes = channel_extremes(model, calibration, sites=tuple(model.config.site_features), row_batch=row_batch, mesh=mesh)
    check_finite(extremes, calibration.t)
    report("gather channel statistics", 1, 1)
    tried = lambda done, total: report("try ways of balancing", done, total)
    balancing = balance(model, config, extremes, calibration, row_batch, mesh, progress=tried)
    folded, residual = apply_balancing(model, balancing.factors)

    report("choose activation ranges", 0, 1)
    acts, edges = activation_quantizers(folded, config, calibration, extremes, balancing.factors, residual, row_batch, mesh)
    report("choose activation ranges", 1, 1)
    spec = model.config.spec
    linears = {}
    for done, (name, site) in enumerate(spec.site_of.items()):
        report("choose weight ranges", done, len(spec.linears))
        importance = _input_power(extremes[site], site, balancing.factors) if config.weigh_inputs else None
        linears[name] = quantize_linear(folded, config, name, acts.get(site), importance)
    report("choose weight ranges", len(spec.linears), len(spec.linears))
    quantized = QuantizedDiT(
        linears=linears,
        sites={name: acts[name] for name in spec.attention if name in acts},
        label_embed=folded.params["label_embed"]["embedding"] if model.config.num_labels else None,
        position_embed=folded.params["position_embed"]["embedding"] if model.config.position_table else None,
        group_edges=edges,
        config=model.config,
        schedule=model.schedule,
    )
    _check_result(quantized)
    facts = {
        "source_sha256": source_sha256(),
        "settings": config.to_dict(),
        "calibration": {"rows": source, "steps": calibration.num_steps, "rows_per_step": calibration.num_rows},
    }
    if balancing.chosen:
        facts["balancing"] = {site: chosen.to_dict() for site, chosen in balancing.chosen.items()}
    if config.resolved_rounding == "gptq":
        quantized, rounded = round_closed_form(
            folded,
            quantized,
            calibration,
            search=config.range_search,
            mesh=mesh,
            announce=lambda plan: report("plan rounding", 1, 1, f"{plan}"),
            progress=lambda part, done, total, error: report(f"round {part}", done, total, f"error {error:.3f} x nearest"),
        )
        facts["rounding"] = {row.pop("part"): row for row in rounded}
        _check_result(quantized)
    if config.learning is not None:
        quantized, learned = reconstruct(
            folded,
            quantized,
            calibration,
            config.learning,
            key=jax.random.fold_in(key, 1),
            journal=journal,
            search=config.range_search,
            mesh=mesh,
            announce=lambda plan: report("plan reconstruction", 1, 1, f"{plan}"),
            progress=lambda part, done, total, error: report(
                f"reconstruct {part}", done, total, f"error {error:.3f} x nearest"
            ),
        )
        facts["reconstruction"] = {row.pop("part"): row for row in learned}
        _check_result(quantized)
    report("measure the result", 0, 1)
    quality = measure(model, folded, quantized, some)
    report("measure the result", 1, 1, f"{quality}" if not quality.is_poor else f"SQNR {quality.sqnr_mean_db:.1f} dB")
    _check_quality(quality, model.schedule.objective, keep_poor, None if journal is None else journal.folder)
    facts["quality"] = quality.to_dict()
    quantized = sharding.replicate(mesh, quantized)
    return quantized.replace(provenance=Provenance(facts))


def _check_quality(quality: Quality, objective: str, keep_poor: bool, learned: Path | None) -> None:
    """Refuses a model that is of no use, and warns of one that may be of little; ``learned`` is where the journal is."""
    if not quality.is_poor:
        return
    words = f"The quantized model's predicted {objective} has an SQNR of {quality.sqnr_mean_db:.1f} dB"
    words += f", worst in {', '.join(map(str, quality.worst))}"
    remedy = "use more bits, another policy or more calibration rows"
    if quality.sqnr_mean_db < REFUSE_BELOW and not keep_poor:
        again = "" if learned is None else f"; what was learned is in {learned}, so that takes no learning again"
        raise Ptq4ditError(
            f"{words}, and below {REFUSE_BELOW:g} dB a model is refused; {remedy}, or keep it with --keep-poor "
            f"(keep_poor=True){again}."
        )
    warnings.warn(f"{words}; {remedy}.", PoorQuality, stacklevel=4)


def _check_result(quantized: QuantizedDiT) -> None:
    if bad := has_nonfinite(quantized):
        raise Ptq4ditError(
            f"The quantized model would hold NaN or infinity in {', '.join(bad[:3])}; check that the float model makes good "
            "samples."
        )


def _journal(
    config: QuantConfig,
    model: FloatDiT,
    source_sha256: Callable[[], str],
    key: jax.Array,
    calibration: CalibrationData | None,
    state: str | os.PathLike[str] | None,
    fresh: bool,
) -> contextlib.AbstractContextManager[Journal | None]:
    """Opened before any long work, so that a run that does not match is refused at once.

    The number of devices is no part of the fingerprint: no integer depends on it, or with ``parts=1`` no more than last bits of
    gradients do, which two runs on one GPU may not share either.
    """
    if config.learning is None or state is None:
        return contextlib.nullcontext()
    given = None if calibration is None else content_hash({name: getattr(calibration, name) for name in ("x", "t", "y")})
    fingerprint = {
        "weights": source_sha256(),
        "network": model_meta(model.config, model.schedule),
        "settings": config.to_dict() | {"rounding": config.resolved_rounding},
        "key": jax.random.key_data(key).tolist(),
        "calibration rows": given or "sampled by these settings and key",
        "software": {name: _version(name) for name in ("ptq4dit-jax", "jax", "jaxlib")},
        "device": {"platform": default().platform, "kind": default().device_kind},
    }
    return Journal(Path(state), fingerprint, fresh=fresh)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _report_resumed(journal: Journal, model: FloatDiT, report: StageProgress) -> None:
    """Says what an interrupted run has left to go on from."""
    names, (finished, current) = [unit.name for unit in units(model.config)], journal.standing
    if not finished and current is None:
        return
    note = f"parts done: {len(finished)} of {len(names)}" + (f", up to {names[max(finished)]}" if finished else "")
    if current is not None:
        note += f"; {names[current[0]]} goes on from iteration {current[1]}"
    report("resume reconstruction", len(finished), len(names), note)


def _integer_sites(config: QuantConfig, spec: NetworkSpec) -> tuple[str, ...]:
    """Sites whose activations are quantized."""
    rules = config.rules(spec)
    return tuple(name for name in spec.sites if rules.is_integer(spec, name))


def _balanced(config: QuantConfig, spec: NetworkSpec) -> tuple[str, ...]:
    """Sites to balance; balancing serves a quantized input, so layers fed by floats are left alone."""
    if config.balance == "none":
        return ()
    sites = {name: spec.sites[name] for name in _integer_sites(config, spec)}
    homes = {name: site for name, site in sites.items() if site.home is not None and site.feeds is not None}
    return tuple(name for name, site in homes.items() if config.balance_fc2 or site.in_paper)


def _equalized(config: QuantConfig, spec: NetworkSpec) -> dict[str, str]:
    """Inputs of attention's products that are given equal ranges (v), and the sites that undo it."""
    integer, found = _integer_sites(config, spec), {}
    for name, site in spec.sites.items():
        if site.feeds is None and isinstance(site.home, Columns) and site.home.undone is not None:
            found[name] = str(site.place.beside(site.home.undone))
    return {name: other for name, other in found.items() if config.equalize_v and name in integer and other in integer}


def balance(
    model: FloatDiT,
    config: QuantConfig,
    extremes: Mapping[str, ChannelExtremes],
    calibration: CalibrationData,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Balancing:
    """Balancing factors from channel extremes (S, L, K) at every calibration step (PTQ4DiT eqs. 4-11).

    ``row_batch`` and ``mesh`` are those of :func:`ptq4dit_jax.calibration.channel_extremes`. ``progress`` is called with the
    sites done and all sites where balancing is chosen by measurement.
    """
    config, spec = config.for_network(model.config), model.config.spec
    rules = config.rules(spec)
    names = _balanced(config, spec)
    layers = {name: str(spec.sites[name].feeds.place) for name in names}  # type: ignore[union-attr]
    out = Balancing(factors={}, activation_salience={}, weight_salience={}, eta={}, rho={})
    by_row: dict[str, ChannelExtremes] = {}
    for name in _equalized(config, spec):
        s_v = extremes[name].salience.max(0)
        out.factors[name] = salience.equalizing_factors(s_v.reshape(s_v.shape[0], -1))
    if config.balance == "search":
        assert config.dynamic_sites is not None
        _, groups, _ = step_groups(model.schedule, calibration.t, config.step_groups)
        equalized = apply_balancing(model, out.factors)[0]
        out.chosen.update(
            balance_search.search(
                model,
                extremes,
                calibration,
                groups,
                {site: equalized.layer(layer)["kernel"] for site, layer in layers.items()},
                {site: rules.layers[layer].weight_bits for site, layer in layers.items()},
                dynamic=config.dynamic_sites,
                act_bits=config.act_bits,
                temperature=config.temperature,
                range_search=config.range_search,
                progress=progress,
            )
        )
    if names and config.balance == "csb+ssc" and config.ssc == "rows":
        by_row = channel_extremes(model, calibration, sites=names, per_row=True, row_batch=row_batch, mesh=mesh)
    for name in names:
        s_x = extremes[name].salience
        s_w = salience.weight_salience(model.layer(layers[name])["kernel"])
        if config.balance == "search":
            out.factors[name] = out.chosen[name].factors
            out.activation_salience[name], out.weight_salience[name] = s_x, s_w
            continue
        if config.balance == "csb":
            chosen = s_x[s_x.shape[0] // 2]
        else:
            if by_row:
                rows = jnp.moveaxis(by_row[name].salience, 2, 1)  # (S, R, L, K)
                samples = rows.reshape(-1, *rows.shape[2:])
            else:
                samples = s_x
            chosen, out.eta[name], out.rho[name] = jax.jit(salience.ssc_salience)(samples, s_w, config.temperature)
        out.factors[name] = salience.balancing_factors(chosen, s_w, config.exponent)
        out.activation_salience[name], out.weight_salience[name] = s_x, s_w
    return out


_fold = jax.jit(fold, static_argnums=0)


def apply_balancing(model: FloatDiT, factors: Mapping[str, jax.Array]) -> tuple[FloatDiT, dict[str, jax.Array]]:
    """The folded float model, the same function as before, and the factors (L, K) that remain, by site."""
    params, residual = _fold(model.config, model.params, dict(factors))
    quantizers = nest_sites({name: Balance(factor) for name, factor in residual.items()})
    return model.replace(params=params, quantizers=quantizers), residual  # type: ignore[attr-defined]


def activation_quantizers(
    folded: FloatDiT,
    config: QuantConfig,
    calibration: CalibrationData,
    extremes: Mapping[str, ChannelExtremes],
    factors: Mapping[str, jax.Array],
    residual: Mapping[str, jax.Array],
    row_batch: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, ActQuantizer], jax.Array]:
    """Quantizers of all sites, ranges chosen on the folded model; and the noise levels that part the groups of steps (G - 1,).

    Leaves are ([L,] G) for scale and zero point. ``row_batch`` and ``mesh`` are those of
    :func:`ptq4dit_jax.calibration.histograms`.
    """
    G, groups, edges = step_groups(folded.schedule, calibration.t, config.step_groups)

    ranges = {}
    config, spec = config.for_network(folded.config), folded.config.spec
    dynamic = config.dynamic_sites or ()
    undone = {other: factors[name] for name, other in _equalized(config, spec).items() if name in factors}
    integer = _integer_sites(config, spec)
    for name in integer:
        if name in dynamic:
            continue
        low, high = extremes[name].low, extremes[name].high
        factor = residual.get(name, factors.get(name, jnp.ones((), jnp.float32)))
        if name in undone:
            factor = factor * undone[name]  # the extremes were seen before v was equalized
        factor = factor.reshape(1, factor.shape[0], *low.shape[2:]) if factor.ndim else factor
        feature_axes = tuple(range(1 + len(spec.sites[name].place.lead), low.ndim))
        low, high = (low * factor).min(feature_axes), (high * factor).max(feature_axes)
        ranges[name] = (
            jax.ops.segment_min(low, groups, num_segments=G),
            jax.ops.segment_max(high, groups, num_segments=G),
        )
    if ranges:
        counted = histograms(folded, calibration, jnp.asarray(groups), ranges, num_groups=G, row_batch=row_batch, mesh=mesh)
    else:  # nothing is parted by steps
        counted, edges = {}, edges[:0]

    acts = {}
    for name, h in counted.items():
        scale, zero_point = activation_parameters(h.low, h.high, h.counts, config.act_bits, config.range_search)
        acts[name] = ActQuantizer(
            scale=jnp.moveaxis(scale, 0, -1),
            zero_point=jnp.moveaxis(zero_point, 0, -1),
            balance=residual.get(name),
            bits=config.act_bits,
        )
    for name in (name for name in dynamic if name in integer):
        acts[name] = ActQuantizer(
            scale=None,
            zero_point=None,
            balance=residual.get(name),
            bits=config.act_bits,
            dynamic=True,
            nonnegative=spec.sites[name].nonnegative,
        )
    return acts, edges


def step_groups(schedule: Schedule, t: ArrayLike, wanted: int) -> tuple[int, np.ndarray, jax.Array]:
    """How many groups the calibration steps fall in, the group of each (S,), and the noise levels that part them (G - 1,)."""
    # Steps of one noise level, of which Heun's method has pairs, must share a group.
    noise_levels = schedule.noise_level(np.asarray(t))
    if noise_levels.ndim > 1:  # a step reaches down to its cleanest row
        noise_levels = noise_levels.min(axis=1)
    levels, step_levels = np.unique(-noise_levels, return_inverse=True)
    S = len(levels)
    G = min(wanted, S)
    level_groups = np.arange(S) * G // S
    last_of_group = np.searchsorted(level_groups, np.arange(1, G)) - 1
    return G, level_groups[step_levels], jnp.asarray(-levels[last_of_group], schedule.time_dtype)


def quantize_linear(
    folded: FloatDiT, config: QuantConfig, name: str, act: ActQuantizer | None, importance: jax.Array | None = None
) -> QLinear:
    """Quantizes and packs one layer (for a block layer: all blocks at once); ``importance`` ([L,] K) weighs its inputs."""
    layer, bits = folded.layer(name), config.rules(folded.config.spec).layers[name].weight_bits
    weight = _quantize_kernels(layer["kernel"], importance, bits=bits, search=config.range_search)
    return _pack(weight, layer["bias"], act)


@partial(jax.jit, static_argnames=("bits", "search"))
def _quantize_kernels(kernel: jax.Array, importance: jax.Array | None, *, bits: int, search: RangeSearch) -> QTensor:
    """([L,] K, N) to ([L,] N, K)."""

    def one(layer: tuple[jax.Array, jax.Array | None]) -> QTensor:
        return quantize_weight(layer[0].T, bits, search, layer[1])

    # Block after block, so that the search needs the memory of one block.
    return jax.lax.map(one, (kernel, importance)) if kernel.ndim == 3 else one((kernel, importance))


_pack = jax.jit(QLinear.pack)


def _input_power(statistics: ChannelExtremes, site: str, factors: Mapping[str, jax.Array]) -> jax.Array:
    """Mean square of each balanced input channel over all steps, ([L,] K), as :func:`salience.balanced_power` counts it."""
    power, factor = statistics.power.mean(0), factors.get(site)
    return power if factor is None else salience.balanced_power(power, factor)
