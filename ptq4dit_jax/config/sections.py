"""Sections of the settings: weights, activations, balancing and calibration, each of which checks itself."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from ptq4dit_jax.config.checks import MAX_ROWS, check_choice, check_sections
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.edges import shown
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.registry import known_specs
from ptq4dit_jax.networks.spec import NetworkSpec
from ptq4dit_jax.quantizers import check_bits
from ptq4dit_jax.settings import flat, leaves, section, setting

BalancingMethod = Literal["none", "csb", "csb+ssc", "search"]
SscAxis = Literal["steps", "rows"]
Rounding = Literal["nearest", "gptq", "adaround"]

#: The ``act_bits`` of a model that quantizes weights only.
FLOAT_ACTS = 16
_CALIBRATION_STEPS = 25
#: The balancing methods to which a setting applies, by its flat name.
_SERVES = {"ssc": ("csb+ssc",), "temperature": ("csb+ssc", "search"), "exponent": ("csb", "csb+ssc")}
#: Limits for SSC's softmax; beyond them float32 sees only one step, or no difference between steps.
_TEMPERATURES = (1e-6, 1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """How weights are quantized.

    Attributes:
      bits: 2 to 8.
      weigh_inputs: whether ranges minimize the expected output error (each input channel weighted by its mean square) instead
        of the plain error of the weights.
      rounding: ``nearest``; ``gptq``, in closed form behind the quantized network (:mod:`ptq4dit_jax.gptq`); or ``adaround``,
        learned by block reconstruction. None means ``adaround`` if there is a reconstruction, else ``gptq``.
    """

    bits: int = setting(8, "Width of the weights, 2 to 8.", name="weight_bits")
    weigh_inputs: bool = setting(
        True, "Whether ranges of weights minimize the error of outputs, or that of the weights, as with --paper."
    )
    rounding: Rounding | None = setting(
        None,
        "Of the weights: nearest; gptq, in closed form from the inputs of each layer; or adaround, learned.",
        shown="gptq, or adaround with --reconstruct; nearest with --paper",
    )

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.bits)
        if self.rounding is not None:
            check_choice("rounding", self.rounding, get_args(Rounding))


def _read_sites(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """How activations are quantized.

    Attributes:
      bits: 2 to 8; or 16 for weights only: all activations stay float, in the type that the model computes in, and the policy
        decides only the widths of weights.
      step_groups: the number of groups of steps, each with its own ranges; at most the calibration steps; 1 in the paper.
      dynamic_sites: sites scaled per token at run time instead of by calibrated ranges; ``blocks.probs`` per query and head.
        None means the network's sites where a norm or the softmax reduces a row anyway. What each is worth:
        docs/journal/quantization.md.
    """

    bits: int = setting(8, "Width of the activations, 2 to 8; 16 leaves them float (weights only).", name="act_bits")
    step_groups: int = setting(5, "Groups of steps, each with activation ranges of its own; 1 with --paper.")
    dynamic_sites: tuple[str, ...] | None = setting(
        None,
        "Sites scaled per token at run time, comma-separated, or none, as with --paper.",
        flag="dynamic",
        shown=",".join(name for name, site in known_specs()[0].sites.items() if site.reduced),
        metavar="SITES",
        read=_read_sites,
    )

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits != FLOAT_ACTS:
            _check_act_bits(self.bits)
        if not 1 <= self.step_groups <= MAX_ROWS:
            raise Ptq4ditError(f"step_groups must be at least 1 and at most {MAX_ROWS}, not {shown(self.step_groups)}.")
        possible = {name for spec in known_specs() for name in possibly_dynamic(spec)}
        for name in self.dynamic_sites or ():
            check_choice("dynamic_sites", name, tuple(sorted(possible)))


def _check_act_bits(bits: int) -> None:
    try:
        check_bits("act_bits", bits)
    except Ptq4ditError as error:
        raise Ptq4ditError(
            f"{str(error).rstrip('.')}; or {FLOAT_ACTS}, which like policy weights-only leaves all activations float."
        ) from None


def possibly_dynamic(spec: NetworkSpec) -> set[str]:
    """Returns the sites that can be scaled per token: inputs of layers, and attention's probabilities."""
    return {name for name, site in spec.sites.items() if site.feeds is not None or site.nonnegative}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balancing:
    """How the channels of activations and weights are balanced.

    Attributes:
      method: ``none``, ``csb`` (salience of the middle calibration step), ``csb+ssc`` (salience weighted over all steps), or
        ``search``: per layer, the candidate with the smallest output error (:mod:`ptq4dit_jax.balance_search`).
      ssc: what SSC weighs: ``steps`` (the paper) or single ``rows`` (the official code).
      temperature: of SSC's softmax.
      exponent: of the balancing factors; 0.5 is CSB, 0 no balancing.
      fc2: whether to balance fc2 too; its factors are applied when the GELU output is quantized.
      equalize_v: whether to give v's channels equal ranges by folding factors into qkv and their inverse into proj_in, which
        costs nothing.
    """

    method: BalancingMethod = setting(
        "search",
        "Salience balancing: none, csb, csb+ssc, or search: for each layer what errs least.",
        name="balance",
        shown="search; csb+ssc with --paper",
    )
    ssc: SscAxis = setting("steps", "SSC (--balance csb+ssc) weighs steps (the paper) or rows (the official code).")
    temperature: float = setting(1.0, "Temperature of SSC's softmax.")
    exponent: float = setting(0.5, "Of the factors of csb and csb+ssc: 0.5 is the paper's, 0 no balancing.")
    fc2: bool = setting(True, "Whether the input of fc2 is balanced as well; not with --paper.", name="balance_fc2")
    equalize_v: bool = setting(True, "Whether attention's v gets equal ranges by factors folded away; not with --paper.")

    def __post_init__(self) -> None:
        check_choice("balance", self.method, get_args(BalancingMethod))
        check_choice("ssc", self.ssc, get_args(SscAxis))
        if not _TEMPERATURES[0] <= self.temperature <= _TEMPERATURES[1]:
            raise Ptq4ditError(
                f"temperature must be positive and finite, from {_TEMPERATURES[0]:g} to {_TEMPERATURES[1]:g}, "
                f"not {self.temperature}."
            )
        if not 0 <= self.exponent <= 1:
            raise Ptq4ditError(f"exponent must lie between 0 (no balancing) and 1, not {self.exponent}.")
        defaults, given = {leaf.name: leaf.field.default for leaf in leaves(Balancing)}, flat(self)
        for name, serves in _SERVES.items():
            if given[name] != defaults[name] and self.method not in serves:
                raise Ptq4ditError(
                    f"{name} {given[name]} says nothing about balance {self.method}, but about "
                    f"{' and '.join(serves)}: choose that, or leave it out."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The rows of the float model's own chain on which a run calibrates.

    Attributes:
      steps, rows: the number of evenly spaced steps of the sampling chain, and of rows per step. None steps means 25, or all of
        a shorter chain.
      sampling: how the rows are sampled; use the settings of later sampling. What is not given follows the model.
    """

    steps: int | None = setting(
        None, "Evenly spaced sampler steps to calibrate on.", name="calib_steps", shown="25, or all if fewer"
    )
    rows: int = setting(64, "Rows at each of them; half are null twins under guidance.", name="calib_rows")
    sampling: Sampling = section(Sampling())

    def __post_init__(self) -> None:
        check_sections(self)
        if self.rows > MAX_ROWS:
            raise Ptq4ditError(f"Calibration rows must be at most {MAX_ROWS} at each step, not {shown(self.rows)}.")


def calibration_steps(wanted: int | None, chain: int) -> int:
    """Returns at how many steps of a chain to calibrate; None means 25, or all of a shorter chain.

    Raises:
      Ptq4ditError: more steps than the chain has, or none.
    """
    if wanted is None:
        return min(_CALIBRATION_STEPS, chain)
    if not 1 <= wanted <= chain:
        raise Ptq4ditError(f"Calibration steps must be 1 to the sampler's {chain} steps, not {wanted}.")
    return wanted
