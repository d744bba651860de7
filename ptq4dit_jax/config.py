"""Settings of a quantization run, and the policy that gives each layer its width."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.edges import shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.guidance import Guidance, GuidedChannels
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.registry import known_specs
from ptq4dit_jax.networks.spec import NetworkSpec
from ptq4dit_jax.policy import LayerRule, Policy, Rules
from ptq4dit_jax.quantizers import check_bits
from ptq4dit_jax.ranges import RangeSearch
from ptq4dit_jax.schedules import Schedule

Balance = Literal["none", "csb", "csb+ssc", "search"]
SscAxis = Literal["steps", "rows"]
Rounding = Literal["nearest", "gptq", "adaround"]
#: Where the hidden states of calibration rows are kept.
RowsOn = Literal["auto", "device", "host"]
Start = Literal["nearest", "gptq"]

_CALIBRATION_STEPS = 25
#: The balancings that a setting of balancing serves.
_SERVES = {"ssc": ("csb+ssc",), "temperature": ("csb+ssc", "search"), "exponent": ("csb", "csb+ssc")}
#: The ``act_bits`` of a model that quantizes weights only.
FLOAT_ACTS = 16
#: The largest numbers that a run may ask for, far above what is of use; memory may allow less.
MAX_ROWS, MAX_ITERATIONS = 2**20, 10**7
#: Of SSC's softmax; beyond either end float32 knows one step, or none from another.
_TEMPERATURES = (1e-6, 1e6)
#: Of a learning rate, a regularizer or its exponents.
_MAX_RATE = 1e6


def _check_act_bits(bits: int) -> None:
    try:
        check_bits("act_bits", bits)
    except Ptq4ditError as error:
        raise Ptq4ditError(
            f"{str(error).rstrip('.')}; or {FLOAT_ACTS}, which like policy weights-only leaves all activations float."
        ) from None


def calibration_steps(wanted: int | None, chain: int) -> int:
    """At how many steps of a chain to calibrate; None means 25, or all of a shorter chain.

    Raises:
      Ptq4ditError: more than the chain has, or none.
    """
    if wanted is None:
        return min(_CALIBRATION_STEPS, chain)
    if not 1 <= wanted <= chain:
        raise Ptq4ditError(f"Calibration steps must be 1 to the sampler's {chain} steps, not {wanted}.")
    return wanted


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise Ptq4ditError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}.")


#: Parts of a reconstruction's batch on CPUs where nothing is said: as many as a host has devices.
_PARTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How block reconstruction learns roundings and activation scales (:mod:`ptq4dit_jax.reconstruction`).

    Attributes:
      iterations: for each part: the embedders, every block, the final layer.
      start: what learning starts from. ``nearest``: the ranges of rounding to the nearest, and the float weights within them.
        ``gptq``: closed-form rounding of the part behind the learned parts before it. None is ``gptq``.
      batch_size: rows of an iteration, one from each of as many strata of the calibration rows; a multiple of the devices.
      rounding_rate, scale_rate: Adam's learning rates of the rounding variables and of the logarithms of activation scales;
        the latter decays to 0 by a cosine, the former if ``decay_rounding``.
      rounding_eps: Adam's epsilon for the rounding variables, whose gradients are of the order of 1. One as large lets a
        weight move by how much it matters to the error: with a small one all move alike, most of them by the noise of batches.
      regularizer: weight of undecided roundings against the error, both counted per weight.
      exponents: of the regularizer, first and last.
      warmup: part of the iterations without regularizer.
      row_weights: ``plain``, or ``steps``: rows count inversely to the float part's mean square change at their step.
      dtype: compute type; ``auto`` is bfloat16 on GPU and TPU and float32 on CPU.
      parts: into how many parts a batch is cut, whose gradients are added up in order. Every number of devices that divides it
        gives the same integers. None is 8 on CPUs, or the largest divisor of 8 that divides ``batch_size``, and 1 elsewhere:
        parts of 4 rows are too little work for a GPU.
      rows_on: where hidden states are kept: ``device``, ``host`` (streamed batch by batch), or ``auto``, the device if they
        fit.
    """

    iterations: int = 2000
    start: Start | None = None
    batch_size: int = 32
    rounding_rate: float = 0.3
    rounding_eps: float = 1.0
    decay_rounding: bool = True
    scale_rate: float = 1e-3
    regularizer: float = 0.1
    exponents: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    row_weights: Literal["plain", "steps"] = "plain"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    parts: int | None = None
    rows_on: RowsOn = "auto"

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", *(() if self.parts is None else ("parts",))):
            value, most = getattr(self, name), MAX_ITERATIONS if name == "iterations" else MAX_ROWS
            if not isinstance(value, int) or value < 1:
                raise Ptq4ditError(f"Reconstruction {name} must be a positive integer, not {shown(value)}.")
            if value > most:
                raise Ptq4ditError(f"Reconstruction {name} must be at most {most}, not {shown(value)}.")
        if self.parts is not None and self.batch_size % self.parts:
            raise Ptq4ditError(f"A reconstruction batch of {self.batch_size} rows cannot be cut into {self.parts} equal parts.")
        for name in ("rounding_rate", "scale_rate", "regularizer"):
            if not 0 <= getattr(self, name) <= _MAX_RATE:
                raise Ptq4ditError(
                    f"Reconstruction {name} must be finite and not negative, at most {_MAX_RATE:g}, not {getattr(self, name)}."
                )
        if not 0 < self.rounding_eps <= _MAX_RATE:  # 0 would divide 0 by 0 for a weight without a gradient
            raise Ptq4ditError(
                f"Reconstruction rounding_eps must be finite and positive, at most {_MAX_RATE:g}, not {self.rounding_eps}."
            )
        if not 0 <= self.warmup < 1:
            raise Ptq4ditError(f"Reconstruction warmup must be at least 0 and below 1, not {self.warmup}.")
        if len(self.exponents) != 2 or not all(1 <= value <= _MAX_RATE for value in self.exponents):
            raise Ptq4ditError(f"Reconstruction exponents must be two numbers of at least 1, not {self.exponents}.")
        _check_choice("Reconstruction start", self.start, (*get_args(Start), None))
        _check_choice("Reconstruction row_weights", self.row_weights, ("plain", "steps"))
        _check_choice("Reconstruction dtype", self.dtype, ("auto", "bfloat16", "float32"))
        _check_choice("Reconstruction rows_on", self.rows_on, get_args(RowsOn))

    @property
    def resolved_start(self) -> Start:
        """``start``, or what stands for None."""
        return self.start or "gptq"

    def gradient_parts(self, platform: str) -> int:
        """``parts``, or what stands for None on that platform of JAX."""
        if self.parts is not None:
            return self.parts
        return math.gcd(self.batch_size, _PARTS) if platform == "cpu" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Everything that decides the result of :func:`ptq4dit_jax.quantize`, besides the model and the key.

    Attributes:
      weight_bits: 2 to 8.
      act_bits: 2 to 8; or 16 for weights only: all activations stay float, in the type that the model computes in, and the
        ``policy`` decides the widths of the weights alone.
      balance: ``none``, ``csb`` (salience of the middle calibration step), ``csb+ssc`` (salience weighted over all steps), or
        ``search``: for each layer, whichever of several gives the smallest output error (:mod:`ptq4dit_jax.balance_search`).
      ssc: what SSC weighs: ``steps`` (the paper) or single ``rows`` (the official code).
      temperature: of SSC's softmax.
      exponent: of the balancing factors; 0.5 is CSB, 0 no balancing.
      balance_fc2: balances fc2 as well; the factors sit in the quantization of the GELU output.
      equalize_v: gives v's channels equal ranges by folding factors into qkv and their inverse into proj_in, which costs
        nothing.
      range_search: how ranges are chosen, see :mod:`ptq4dit_jax.ranges`.
      weigh_inputs: weight ranges minimize the expected output error (each input channel counts by its mean square) instead of
        the plain error of the weights.
      policy: widths of single layers, and what stays float; see :meth:`ptq4dit_jax.policy.Policy.parse`.
      step_groups: activation ranges per group of steps, at most one a calibration step; 1 is the paper's.
      dynamic_sites: sites scaled per token at run time instead of by calibrated ranges; ``blocks.probs`` per query and head.
        None is the network's where a row is reduced anyway, by a norm or the softmax. What each is worth:
        docs/journal/quantization.md.
      calib_steps, calib_rows: evenly spaced steps of the sampling chain, and rows at each. None steps are 25, or all of a
        shorter chain.
      sampler, steps, eta, cfg_scale, cfg_channels: how calibration rows are sampled; use what the model will be sampled with.
        The sampler ``auto`` is ddpm, or euler for a flow model; ``steps`` and ``cfg_scale`` that are None follow the model
        (:meth:`Sampling.resolve <ptq4dit_jax.diffusion.Sampling.resolve>`).
      rounding: of the weights. ``nearest``; ``gptq``, in closed form behind the quantized network
        (:mod:`ptq4dit_jax.gptq`); or ``adaround``, learned by ``reconstruction``. None is ``adaround`` where
        ``reconstruction`` is set, and else ``gptq``.
      reconstruction: how roundings and activation scales are learned after all ranges are chosen. None is
        :class:`Reconstruction`'s defaults under ``adaround``, and leaves it out otherwise.
    """

    weight_bits: int = 8
    act_bits: int = 8
    balance: Balance = "search"
    ssc: SscAxis = "steps"
    temperature: float = 1.0
    exponent: float = 0.5
    balance_fc2: bool = True
    equalize_v: bool = True
    range_search: RangeSearch = "mse"
    weigh_inputs: bool = True
    policy: str = "edges8-float"
    step_groups: int = 5
    dynamic_sites: tuple[str, ...] | None = None
    calib_steps: int | None = None
    calib_rows: int = 64
    sampler: str = Sampling.sampler
    steps: int | str | None = Sampling.steps
    eta: float = Sampling.eta
    cfg_scale: float | None = Guidance.scale
    cfg_channels: GuidedChannels = Guidance.channels
    rounding: Rounding | None = None
    reconstruction: Reconstruction | None = None

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits)
        if type(self.act_bits) is not int or self.act_bits != FLOAT_ACTS:
            _check_act_bits(self.act_bits)
        _check_choice("balance", self.balance, get_args(Balance))
        _check_choice("ssc", self.ssc, get_args(SscAxis))
        _check_choice("range_search", self.range_search, get_args(RangeSearch))
        if self.rounding is not None:
            _check_choice("rounding", self.rounding, get_args(Rounding))
        if self.reconstruction is not None and self.resolved_rounding != "adaround":
            raise Ptq4ditError(
                f"rounding {self.rounding} decides the weights without learning, and reconstruction learns them; leave out one."
            )
        if not _TEMPERATURES[0] <= self.temperature <= _TEMPERATURES[1]:
            raise Ptq4ditError(
                f"temperature must be positive and finite, from {_TEMPERATURES[0]:g} to {_TEMPERATURES[1]:g}, "
                f"not {self.temperature}."
            )
        if not 0 <= self.exponent <= 1:
            raise Ptq4ditError(f"exponent must lie between 0 (no balancing) and 1, not {self.exponent}.")
        for name, serves in _SERVES.items():
            if getattr(self, name) != getattr(QuantConfig, name) and self.balance not in serves:
                raise Ptq4ditError(
                    f"{name} {getattr(self, name)} says nothing about balance {self.balance}, but about "
                    f"{' and '.join(serves)}: choose that, or leave it out."
                )
        if not 1 <= self.step_groups <= MAX_ROWS:
            raise Ptq4ditError(f"step_groups must be at least 1 and at most {MAX_ROWS}, not {shown(self.step_groups)}.")
        if self.calib_rows > MAX_ROWS:
            raise Ptq4ditError(f"Calibration rows must be at most {MAX_ROWS} at each step, not {shown(self.calib_rows)}.")
        possible = {name for spec in known_specs() for name in _possibly_dynamic(spec)}
        for name in self.dynamic_sites or ():
            _check_choice("dynamic_sites", name, tuple(sorted(possible)))
        _ = self.sampling  # raises on settings that cannot be
        Policy.parse(self.policy)

    @classmethod
    def paper(cls, weight_bits: int = 8, **overrides: Any) -> QuantConfig:
        """The paper's method to the letter: CSB and SSC on qkv, proj and fc1, one static range per tensor for activations,
        every linear at the same width; ranges by the official code's three percentiles; 25 steps (all of a shorter chain) of 32
        pairs of rows; weights rounded to the nearest, or by AdaRound from there with ``reconstruction``."""
        learned = overrides.get("reconstruction")
        rounding = overrides.get("rounding") or ("nearest" if learned is None else "adaround")
        if rounding == "adaround":
            learned = learned or Reconstruction()
            learned = dataclasses.replace(learned, start=learned.start or "nearest")
        paper = {
            "balance": "csb+ssc",
            "balance_fc2": False,
            "equalize_v": False,
            "weigh_inputs": False,
            "policy": "uniform",
            "range_search": "percentile",
            "step_groups": 1,
            "dynamic_sites": (),
        }
        return cls(weight_bits=weight_bits, **{**paper, **overrides, "rounding": rounding, "reconstruction": learned})

    @property
    def resolved_rounding(self) -> Rounding:
        """``rounding``, or what stands for None."""
        return self.rounding or ("gptq" if self.reconstruction is None else "adaround")

    @property
    def learning(self) -> Reconstruction | None:
        """How roundings are learned; None where they are not."""
        return (self.reconstruction or Reconstruction()) if self.resolved_rounding == "adaround" else None

    @property
    def sampling(self) -> Sampling:
        """How calibration rows are sampled."""
        return Sampling(self.sampler, self.steps, self.eta, Guidance(self.cfg_scale, self.cfg_channels))

    def for_network(self, network: Network) -> QuantConfig:
        """The same settings with everything filled in that depends on the network alone.

        Raises:
          Ptq4ditError: the network lacks a layer or a site that they name.
        """
        self.rules(network.spec)
        if self.dynamic_sites is None:
            reduced = tuple(name for name, site in network.spec.sites.items() if site.reduced)
            return dataclasses.replace(self, dynamic_sites=reduced)
        for name in self.dynamic_sites:
            _check_choice("dynamic_sites", name, tuple(sorted(_possibly_dynamic(network.spec))))
        return self

    def resolve(self, schedule: Schedule, network: DiTConfig) -> QuantConfig:
        """The same settings with everything filled in that depends on the model: sampler, steps, guidance and calibration
        steps."""
        sampling = self.sampling.resolve(schedule, network)
        return dataclasses.replace(
            self,
            sampler=sampling.sampler.name,
            steps=sampling.steps,
            cfg_scale=sampling.guidance.scale,
            calib_steps=calibration_steps(self.calib_steps, sampling.tables().num_steps),
        )

    def rules(self, spec: NetworkSpec) -> Rules:
        """What the policy and the widths decide for each layer of a network."""
        rules = Policy.parse(self.policy).rules(spec, self.weight_bits)
        if self.act_bits != FLOAT_ACTS:
            return rules
        return Rules({name: LayerRule(rule.weight_bits, integer=False) for name, rule in rules.layers.items()}, False)

    @property
    def weights_only(self) -> bool:
        """Whether no activation is quantized."""
        policy, specs = Policy.parse(self.policy), known_specs()
        return any(self.rules(spec).weights_only for spec in specs if all(layer in spec.linears for layer, _ in policy.layers))

    @property
    def name(self) -> str:
        """Such as W4A8; W4A16 where no activation is quantized."""
        return f"W{self.weight_bits}A{FLOAT_ACTS if self.weights_only else self.act_bits}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _possibly_dynamic(spec: NetworkSpec) -> set[str]:
    """Sites that can be scaled per token: inputs of layers, and attention's probabilities."""
    return {name for name, site in spec.sites.items() if site.feeds is not None or site.nonnegative}
