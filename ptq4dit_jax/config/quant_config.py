"""Everything that decides the result of a quantization run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from ptq4dit_jax.config.checks import check_choice, check_sections
from ptq4dit_jax.config.reconstruction import Reconstruction
from ptq4dit_jax.config.sections import (
    FLOAT_ACTS,
    Activations,
    Balancing,
    Calibration,
    Rounding,
    Weights,
    calibration_steps,
    possibly_dynamic,
)
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.edges import edge, quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.guidance import Guidance
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.ops import Network
from ptq4dit_jax.networks.registry import known_specs
from ptq4dit_jax.networks.spec import NetworkSpec
from ptq4dit_jax.policy import LayerRule, Policy, Rules
from ptq4dit_jax.ranges import RangeSearch
from ptq4dit_jax.schedules import Schedule
from ptq4dit_jax.settings import changed, flat, leaves, section, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Everything that decides the result of :func:`ptq4dit_jax.quantize`, besides the model and the key.

    Made from sections, ``QuantConfig(weights=Weights(bits=4), balancing=Balancing(method="csb"))``, or from single settings by
    their flat names, ``QuantConfig.of(weight_bits=4, balance="csb")``. Options and stored settings have the flat names.

    Attributes:
      weights: width, ranges and rounding of weights.
      activations: width and ranges of activations.
      balancing: of channels between the two.
      calibration: the rows to observe, and how they are sampled.
      policy: widths of single layers, and what stays float.
      range_search: how ranges are chosen, see :mod:`ptq4dit_jax.ranges`.
      reconstruction: how roundings and activation scales are learned after all ranges are chosen. None means
        :class:`Reconstruction`'s defaults if the rounding is ``adaround``, and no learning otherwise.
    """

    TITLE: ClassVar[str] = "Policy and ranges"

    weights: Weights = section(Weights())
    activations: Activations = section(Activations())
    balancing: Balancing = section(Balancing())
    calibration: Calibration = section(Calibration())
    policy: Policy = setting(
        Policy("edges8-float"), Policy.help(), shown="edges8-float; uniform with --paper", read=Policy.parse
    )
    range_search: RangeSearch = setting(
        "mse", "How ranges are chosen: minmax, mse or percentile.", shown="mse; percentile with --paper"
    )
    reconstruction: Reconstruction | None = setting(None, "How roundings are learned.", of=Reconstruction)

    def __post_init__(self) -> None:
        check_sections(self)
        check_choice("range_search", self.range_search, get_args(RangeSearch))
        if not isinstance(self.policy, Policy):
            raise Ptq4ditError(f"The policy must be a Policy, such as Policy.parse('uniform'), not {quoted(self.policy)}.")
        if not isinstance(self.reconstruction, (Reconstruction, type(None))):
            raise Ptq4ditError(f"The reconstruction must be a Reconstruction or None, not {quoted(self.reconstruction)}.")
        if self.reconstruction is not None and self.rounding != "adaround":
            raise Ptq4ditError(
                f"rounding {self.rounding} decides the weights without learning, and reconstruction learns them; leave out one."
            )

    @classmethod
    def of(cls, **settings: object) -> QuantConfig:
        """Returns the defaults with single settings changed, by their flat names. The policy may be text."""
        return cls().replace(**settings)

    def replace(self, **settings: object) -> QuantConfig:
        """Returns a copy with single settings changed, by their flat names. The policy may be text."""
        if isinstance(policy := settings.get("policy"), str):
            settings["policy"] = Policy.parse(policy)
        return changed(self, settings)

    @classmethod
    def paper(cls, weight_bits: int = 8, **overrides: object) -> QuantConfig:
        """Returns the paper's method to the letter: CSB and SSC on qkv, proj and fc1; one static range per tensor for
        activations; one width for all linear layers; ranges by the official code's three percentiles; 25 steps (all of a
        shorter chain) of 32 pairs of rows; weights rounded to the nearest, or by AdaRound from there with ``reconstruction``.
        ``overrides`` are settings by their flat names."""
        learned = overrides.get("reconstruction")
        rounding = overrides.get("rounding") or ("nearest" if learned is None else "adaround")
        if rounding == "adaround":
            learned = learned or Reconstruction()
            if isinstance(learned, Reconstruction):  # anything else is refused below
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
        return cls.of(weight_bits=weight_bits, **{**paper, **overrides, "rounding": rounding, "reconstruction": learned})

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded: ``weights.rounding``, or what None stands for."""
        return self.weights.rounding or ("gptq" if self.reconstruction is None else "adaround")

    @property
    def learning(self) -> Reconstruction | None:
        """How roundings are learned; None if they are not."""
        return (self.reconstruction or Reconstruction()) if self.rounding == "adaround" else None

    def for_network(self, network: Network) -> QuantConfig:
        """Returns the settings with everything filled in that depends on the network alone.

        Raises:
          Ptq4ditError: the network lacks a layer or a site that the settings name.
        """
        self.rules(network.spec)
        sites = self.activations.dynamic_sites
        if sites is None:
            return self.replace(dynamic_sites=tuple(name for name, site in network.spec.sites.items() if site.reduced))
        for name in sites:
            check_choice("dynamic_sites", name, tuple(sorted(possibly_dynamic(network.spec))))
        return self

    def resolve(self, schedule: Schedule, network: DiTConfig) -> QuantConfig:
        """Returns the settings with the sampler, its steps, guidance and calibration steps, which depend on the model, filled
        in."""
        found = self.calibration.sampling.resolve(schedule, network)
        guidance = Guidance(found.guidance.scale, found.guidance.channels, found.guidance.interval)
        calibration = dataclasses.replace(
            self.calibration,
            steps=calibration_steps(self.calibration.steps, found.tables().num_steps),
            sampling=Sampling(found.sampler.name, found.steps, found.eta, guidance),
        )
        return dataclasses.replace(self, calibration=calibration)

    def rules(self, spec: NetworkSpec) -> Rules:
        """Returns what the policy and the widths decide for each layer of a network."""
        rules = self.policy.rules(spec, self.weights.bits)
        if self.activations.bits != FLOAT_ACTS:
            return rules
        return Rules({name: LayerRule(rule.weight_bits, integer=False) for name, rule in rules.layers.items()}, False)

    @property
    def weights_only(self) -> bool:
        """Whether no activation is quantized."""
        specs = [spec for spec in known_specs() if all(layer in spec.linears for layer, _ in self.policy.layers)]
        return any(self.rules(spec).weights_only for spec in specs)

    @property
    def name(self) -> str:
        """A name such as W4A8; W4A16 if no activation is quantized."""
        return f"W{self.weights.bits}A{FLOAT_ACTS if self.weights_only else self.activations.bits}"

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings by their flat names, in JSON's types and tuples."""
        learned = self.reconstruction
        return flat(self) | {"policy": str(self.policy), "reconstruction": learned and flat(learned)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> QuantConfig:
        """Restores the settings that :meth:`to_dict` returned, as a model's folder stores them; JSON may have made its tuples
        lists. A setting that a model of an earlier version lacks has its default.

        Raises:
          Ptq4ditError: an unknown setting, or an invalid value.
        """
        with edge("the stored settings"):
            settings = _known(cls, stored)
            if isinstance(learned := settings.get("reconstruction"), Mapping):
                settings["reconstruction"] = changed(Reconstruction(), _known(Reconstruction, learned))
            return cls.of(**settings)


def _known(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    former = {leaf.said.former: leaf.name for leaf in leaves(kind) if leaf.said.former is not None}
    stored = {former.get(name, name): value for name, value in stored.items()}
    known = {leaf.name for leaf in leaves(kind)}
    if unknown := [name for name in stored if name not in known]:
        raise Ptq4ditError(f"There is no setting {quoted(unknown[0])}; a newer version of this program has stored it.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
