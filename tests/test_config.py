"""Settings: what each policy gives each layer, the paper's values, and a sentence for every setting that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given as given_any
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ptq4dit_jax.config import Activations, Balancing, Calibration, QuantConfig, Reconstruction, Weights
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.guidance import Guidance
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.policy import POLICIES, LayerRule, Policy, Rules
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule
from ptq4dit_jax.settings import flat, leaves

BLOCK_LAYERS = {"blocks.adaLN", "blocks.qkv", "blocks.proj", "blocks.fc1", "blocks.fc2"}
SPEC = DiTConfig.example().spec
LAYERS = tuple(SPEC.linears)
EDGE_LAYERS = tuple(name for name, linear in SPEC.linears.items() if linear.edge)
Sentence = Callable[..., AbstractContextManager[None]]


def read_policy(policy: str, weight_bits: int) -> Rules:
    return Policy.parse(policy).rules(SPEC, weight_bits)


def layer_rules(policy: str, weight_bits: int) -> dict[str, LayerRule]:
    return read_policy(policy, weight_bits).layers


def test_layers_are_those_of_the_network() -> None:
    shapes = DiTConfig.preset("DiT-S/2").linear_shapes
    assert set(LAYERS) == set(shapes)
    assert set(EDGE_LAYERS) == set(shapes) - BLOCK_LAYERS == {"patch_embed", "time_fc1", "time_fc2", "final_adaLN", "final"}
    assert len(LAYERS) == len(set(LAYERS)) == 10


@pytest.mark.parametrize(
    ("policy", "edge", "adaln"),
    [
        ("uniform", LayerRule(4), LayerRule(4)),
        ("edges8", LayerRule(8), LayerRule(4)),
        ("edges8-float", LayerRule(8, integer=False), LayerRule(4)),
        ("small8", LayerRule(8), LayerRule(8)),
        ("weights-only", LayerRule(8, integer=False), LayerRule(4, integer=False)),
    ],
)
def test_named_policies(policy: str, edge: LayerRule, adaln: LayerRule) -> None:
    rules = layer_rules(policy, 4)
    assert set(rules) == set(LAYERS)
    assert {rules[name] for name in EDGE_LAYERS} == {edge}
    assert rules["blocks.adaLN"] == adaln
    floats = policy == "weights-only"
    assert {rules[name] for name in BLOCK_LAYERS - {"blocks.adaLN"}} == {LayerRule(4, integer=not floats)}
    assert read_policy(policy, 4).integer_attention is not floats


def test_every_named_policy_is_tested_above() -> None:
    assert set(POLICIES) == {"uniform", "edges8", "edges8-float", "small8", "weights-only"}


def test_attention_is_left_in_float_or_taken_back() -> None:
    assert not read_policy("edges8,blocks.attention=float", 8).integer_attention
    assert read_policy("weights-only,blocks.attention=integer", 8).integer_attention
    assert layer_rules("edges8, blocks.attention=float", 4) == layer_rules("edges8", 4)


@pytest.mark.parametrize("policy", ["uniform", "edges8", "small8,final=3", "weights-only"])
@pytest.mark.parametrize("weight_bits", [3, 8])
def test_activations_of_16_bits_leave_the_widths_of_the_policy(policy: str, weight_bits: int) -> None:
    config = QuantConfig.of(weight_bits=weight_bits, act_bits=16, policy=policy)
    assert {name: rule.weight_bits for name, rule in config.rules(SPEC).layers.items()} == {
        name: rule.weight_bits for name, rule in layer_rules(policy, weight_bits).items()
    }
    assert not any(rule.integer for rule in config.rules(SPEC).layers.values())
    assert not config.rules(SPEC).integer_attention
    assert (config.weights_only, config.name) == (True, f"W{weight_bits}A16")


def test_the_name_says_what_is_quantized() -> None:
    assert QuantConfig.of(weight_bits=4).name == "W4A8"
    assert QuantConfig.of(policy="weights-only").name == "W8A16"
    assert QuantConfig.of(act_bits=6, policy="weights-only,blocks.attention=integer").name == "W8A6"


def test_exceptions_follow_the_name_and_the_last_one_holds() -> None:
    rules = layer_rules(" edges8-float, blocks.adaLN=8 ,final=6,blocks.fc2=5:float,final=3", 4)
    assert rules["blocks.adaLN"] == LayerRule(8)
    assert rules["blocks.fc2"] == LayerRule(5, integer=False)
    assert rules["final"] == LayerRule(3)
    assert rules["patch_embed"] == LayerRule(8, integer=False)
    assert rules["blocks.qkv"] == LayerRule(4)


def test_a_policy_leaves_the_named_ones_as_they_were() -> None:
    layer_rules("edges8,final=2", 4)
    assert POLICIES["edges8"](SPEC, SPEC.linears["final"]) == LayerRule(8)


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("best", ("'best'", "uniform", "edges8-float")),
        ("", ("''", "uniform")),
        ("uniform,fc1=8", ("'fc1'", "blocks.fc1")),
        ("uniform,blocks.0.fc1=8", ("'blocks.0.fc1'",)),
        ("uniform,", ("Unknown layer ''",)),
        ("uniform,final", ("'final'", "layer=bits")),
        ("uniform,final=", ("'final='", "layer=bits")),
        ("uniform,final=eight", ("'final=eight'", "layer=bits")),
        ("uniform,final=-4", ("'final=-4'", "layer=bits")),
        ("uniform,final=8:int", ("'final=8:int'", "layer=bits:float")),
        ("uniform,final=1", ("The width of final", "2 to 8", "1")),
        ("uniform,final=16", ("The width of final", "2 to 8", "16")),
        ("uniform,blocks.attention=8", ("'blocks.attention=8'", "blocks.attention=float")),
        ("uniform,blocks.attention", ("'blocks.attention'", "=integer")),
    ],
)
def test_a_policy_that_cannot_be_read(policy: str, parts: tuple[str, ...], raises_sentence: Sentence) -> None:
    with raises_sentence(*parts):
        layer_rules(policy, 4)
    with raises_sentence(*parts):
        QuantConfig.of(policy=policy)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"weight_bits": 1}, ("weight_bits", "2 to 8", "1")),
        ({"weight_bits": 9}, ("weight_bits", "2 to 8", "9")),
        ({"weight_bits": 4.0}, ("weight_bits", "integer", "4.0")),
        ({"weight_bits": "4"}, ("weight_bits", "integer", "'4'")),
        ({"act_bits": 1}, ("act_bits", "2 to 8", "1")),
        ({"act_bits": 9}, ("act_bits", "2 to 8", "9")),
        ({"act_bits": 0}, ("act_bits", "2 to 8", "0")),
        ({"act_bits": 12}, ("act_bits", "2 to 8", "12", "16", "weights-only")),
        ({"act_bits": 32}, ("act_bits", "32", "weights-only")),
        ({"act_bits": 16.0}, ("act_bits", "16.0")),
        ({"weight_bits": 16}, ("weight_bits", "2 to 8", "16")),
        ({"balance": "csb+"}, ("balance", "csb+ssc", "'csb+'")),
        ({"balance": "CSB"}, ("balance", "csb", "'CSB'")),
        ({"ssc": "tokens"}, ("ssc", "steps", "rows", "'tokens'")),
        ({"range_search": "l1"}, ("range_search", "mse", "'l1'")),
        ({"temperature": 0.0}, ("temperature", "positive", "0.0")),
        ({"temperature": -1.0}, ("temperature", "positive", "-1.0")),
        ({"temperature": float("nan")}, ("temperature", "positive", "nan")),
        ({"exponent": -0.1}, ("exponent", "between 0", "-0.1")),
        ({"exponent": 1.5}, ("exponent", "and 1", "1.5")),
        ({"exponent": float("nan")}, ("exponent", "nan")),
        ({"step_groups": 0}, ("step_groups", "at least 1", "0")),
        ({"dynamic_sites": ("qkv_in",)}, ("dynamic_sites", "blocks.qkv_in", "'qkv_in'")),
        ({"dynamic_sites": ("blocks.k",)}, ("dynamic_sites", "'blocks.k'")),
        ({"sampler": "plms"}, ("sampler", "'plms'", "ddpm")),
        ({"eta": 2.0}, ("eta", "2.0")),
        ({"cfg_channels": "first4"}, ("cfg_channels", "first3", "'first4'")),
    ],
)
def test_a_setting_that_cannot_be(settings: dict[str, Any], parts: tuple[str, ...], raises_sentence: Sentence) -> None:
    with raises_sentence(*parts):
        QuantConfig.of(**settings)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_is_allowed(bits: int) -> None:
    config = QuantConfig.of(weight_bits=bits, act_bits=bits, policy="uniform")
    assert {rule.weight_bits for rule in config.rules(SPEC).layers.values()} == {bits}


def test_the_paper() -> None:
    """CSB with exponent 1/2 and SSC with temperature 1 on qkv, proj and fc1 alone; static ranges; all linears alike."""
    for bits in (8, 4):
        paper = QuantConfig.paper(weight_bits=bits)
        assert (paper.weights.bits, paper.activations.bits) == (bits, 8)
        assert paper.balancing == Balancing(method="csb+ssc", fc2=False, equalize_v=False)
        assert (paper.balancing.ssc, paper.balancing.temperature, paper.balancing.exponent) == ("steps", 1.0, 0.5)
        assert not paper.weights.weigh_inputs
        assert paper.range_search == "percentile"
        assert (paper.activations.step_groups, paper.activations.dynamic_sites) == (1, ())
        resolved = paper.resolve(NoiseSchedule(), DiTConfig.preset("DiT-S/2"))
        assert (resolved.calibration.steps, resolved.calibration.rows) == (25, 64)
        assert set(paper.rules(SPEC).layers.values()) == {LayerRule(bits)}


def test_the_paper_with_exceptions() -> None:
    paper = QuantConfig.paper(4, balance="csb", range_search="mse")
    assert (paper.balancing.method, paper.range_search, paper.balancing.fc2) == ("csb", "mse", False)


def test_the_paper_refuses_a_reconstruction_that_is_none(raises_sentence) -> None:
    with raises_sentence("The reconstruction must be a Reconstruction or None", "dict"):
        QuantConfig.paper(reconstruction={"iterations": 5})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ssc": "rows"}, ("ssc rows", "balance search", "csb+ssc")),
        ({"ssc": "rows", "balance": "csb"}, ("ssc rows", "balance csb,")),
        ({"exponent": 0.25}, ("exponent 0.25", "balance search", "csb and csb+ssc")),
        ({"temperature": 2.0, "balance": "none"}, ("temperature 2.0", "balance none", "search")),
    ],
)
def test_a_setting_that_the_balancing_does_not_use_is_refused(settings, words, raises_sentence) -> None:
    with raises_sentence(*words):
        QuantConfig.of(**settings)
    assert QuantConfig.of(balance="csb+ssc", ssc="rows", exponent=0.25, temperature=2.0).balancing.ssc == "rows"


def test_defaults_run_every_block_on_integers() -> None:
    config = QuantConfig()
    assert (config.weights.bits, config.activations.bits, config.balancing.method) == (8, 8, "search")
    assert {name for name, rule in config.rules(SPEC).layers.items() if rule.integer} == BLOCK_LAYERS


def test_how_rows_are_sampled_is_a_value() -> None:
    assert QuantConfig().calibration.sampling == Sampling()
    settings: dict[str, Any] = {"sampler": "ddim", "steps": "ddim25", "eta": 0.5, "cfg_scale": 2.0, "cfg_channels": "all"}
    assert QuantConfig.of(**settings).calibration.sampling == Sampling("ddim", "ddim25", 0.5, Guidance(2.0, "all"))
    interval = QuantConfig.of(guidance_interval=(0.1, 0.8)).resolve(NoiseSchedule(), NETWORK)
    assert interval.calibration.sampling.guidance.interval == (0.1, 0.8)


NETWORK = DiTConfig.preset("DiT-S/2")


@pytest.mark.parametrize(
    ("given", "schedule", "null_class", "expected"),
    [
        ({}, NoiseSchedule(), True, ("ddpm", 50, 1.5, 25)),
        ({}, NoiseSchedule(), False, ("ddpm", 50, 1.0, 25)),
        ({"steps": 10}, NoiseSchedule(), True, ("ddpm", 10, 1.5, 10)),
        ({"steps": "ddim20", "sampler": "ddim"}, NoiseSchedule(), True, ("ddim", "ddim20", 1.5, 20)),
        ({"steps": "25"}, NoiseSchedule(), True, ("ddpm", "25", 1.5, 25)),
        ({}, FlowSchedule(), True, ("euler", 50, 1.5, 25)),
        ({}, FlowSchedule(steps=1), True, ("euler", 1, 1.5, 1)),
        ({}, FlowSchedule(steps=128), True, ("euler", 128, 1.5, 25)),
        ({}, FlowSchedule(steps=2, guided=True), True, ("euler", 2, 1.0, 2)),
        ({"cfg_scale": 4.0}, FlowSchedule(guided=True), True, ("euler", 50, 4.0, 25)),
        ({"sampler": "heun", "steps": 4}, FlowSchedule(), True, ("heun", 4, 1.5, 8)),  # heun calls the network twice a step
        ({"calib_steps": 3}, NoiseSchedule(), True, ("ddpm", 50, 1.5, 3)),
    ],
)
def test_what_is_not_given_follows_the_model(given: Any, schedule: Any, null_class: bool, expected: Any) -> None:
    network = DiTConfig.preset("DiT-S/2", null_class=null_class)
    for make in (QuantConfig.of, QuantConfig.paper):
        resolved = make(**given).resolve(schedule, network)
        stored = resolved.to_dict()
        assert tuple(stored[name] for name in ("sampler", "steps", "cfg_scale", "calib_steps")) == expected
        assert resolved.resolve(schedule, network) == resolved


@pytest.mark.parametrize(
    ("given", "schedule", "parts"),
    [
        ({"calib_steps": 5, "steps": 4}, NoiseSchedule(), ("sampler's 4 steps", "not 5")),
        ({"calib_steps": 2}, FlowSchedule(steps=1), ("sampler's 1 steps", "not 2")),
        ({"steps": 2}, FlowSchedule(steps=1), ("imported for 1 steps", "flow-steps")),
    ],
)
def test_what_is_given_must_fit_the_model(given: Any, schedule: Any, parts: Any, raises_sentence: Sentence) -> None:
    with raises_sentence(*parts):
        QuantConfig.of(**given).resolve(schedule, NETWORK)


def test_a_network_without_null_class_cannot_be_guided_on_demand(raises_sentence: Sentence) -> None:
    with raises_sentence("null class", "cfg_scale 1"):
        QuantConfig.of(cfg_scale=2.0).resolve(NoiseSchedule(), DiTConfig.preset("DiT-S/2", null_class=False))


def test_settings_are_json_and_come_back() -> None:
    config = QuantConfig.paper(4, dynamic_sites=("blocks.qkv_in",), step_groups=5, steps="ddim25")
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def _some_settings() -> st.SearchStrategy[QuantConfig]:
    balancing = st.one_of(
        st.builds(Balancing, method=st.just("csb+ssc"), ssc=st.sampled_from(["steps", "rows"]), exponent=st.floats(0, 1)),
        st.builds(Balancing, method=st.just("search"), temperature=st.floats(0.1, 10), fc2=st.booleans()),
    )
    sites = st.none() | st.lists(st.sampled_from(["blocks.qkv_in", "blocks.probs", "blocks.fc2_in"]), unique=True).map(tuple)
    guidance = st.builds(Guidance, st.none() | st.floats(-9, 9), interval=st.none() | st.just((0.0, 0.75)))
    sampling = st.builds(Sampling, steps=st.none() | st.integers(1, 50) | st.just("ddim25"), guidance=guidance)
    return st.builds(
        QuantConfig,
        weights=st.builds(Weights, bits=st.integers(2, 8), weigh_inputs=st.booleans()),
        activations=st.builds(Activations, bits=st.sampled_from([4, 8, 16]), dynamic_sites=sites),
        balancing=balancing,
        calibration=st.builds(Calibration, steps=st.none() | st.integers(1, 9), sampling=sampling),
        policy=st.sampled_from(["uniform", "edges8,final=6:float", "small8,blocks.attention=float"]).map(Policy.parse),
        reconstruction=st.none() | st.builds(Reconstruction, iterations=st.integers(1, 99), warmup=st.floats(0, 0.9)),
    )


@hypothesis_settings(max_examples=50, deadline=None)
@given_any(_some_settings())
def test_any_settings_come_back(config: QuantConfig) -> None:
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert QuantConfig().replace(**flat(config)) == config


@pytest.mark.parametrize("folder", ["w8a8", "w4a8"])
def test_settings_that_an_earlier_version_stored(folder: str) -> None:
    """Of models kept from before settings had sections; what was not known then has its default."""
    path = Path(__file__).parent / "golden" / "quantized" / folder / "config.json"
    stored = json.loads(path.read_text())["provenance"]["settings"]
    config = QuantConfig.from_dict(stored)
    assert {name: value for name, value in json.loads(json.dumps(config.to_dict())).items() if name in stored} == stored
    assert config.calibration.sampling.guidance.interval is None


@pytest.mark.parametrize(
    ("stored", "parts"),
    [
        ({"weight_bits": 4, "weight_bit": 4}, ("'weight_bit'", "newer version")),
        ({"reconstruction": {"iterations": 5, "seed": 1}}, ("'seed'", "newer version")),
        ({"exponent": "much", "balance": "csb"}, ("stored settings",)),
        ({"reconstruction": 5}, ("reconstruction", "5")),
        ({"policy": "best"}, ("'best'",)),
        ({"policy": 7}, ("policy", "7")),
    ],
)
def test_stored_settings_that_cannot_be(stored: dict[str, Any], parts: tuple[str, ...], raises_sentence: Sentence) -> None:
    with raises_sentence(*parts):
        QuantConfig.from_dict(stored)


def test_a_setting_is_known_by_its_former_name() -> None:
    stored = QuantConfig.of(reconstruction=Reconstruction(accumulation_chunks=4)).to_dict()
    stored["reconstruction"]["parts"] = stored["reconstruction"].pop("accumulation_chunks")
    assert QuantConfig.from_dict(stored).learning == Reconstruction(accumulation_chunks=4)


def test_sections_and_flat_names_say_the_same() -> None:
    sections = QuantConfig(
        weights=Weights(bits=4),
        activations=Activations(step_groups=2),
        balancing=Balancing(method="csb", exponent=0.25),
        calibration=Calibration(rows=8, sampling=Sampling("ddim", 25, guidance=Guidance(2.0))),
        policy=Policy("uniform"),
    )
    named = {"weight_bits": 4, "step_groups": 2, "balance": "csb", "exponent": 0.25, "calib_rows": 8}
    sampled = {"sampler": "ddim", "steps": 25, "cfg_scale": 2.0, "policy": "uniform"}
    assert QuantConfig.of(**named, **sampled) == sections
    assert sections.replace(exponent=0.5).balancing == Balancing(method="csb")
    with pytest.raises(TypeError, match="no setting 'weight_bit'; did you mean weight_bits"):
        QuantConfig.of(weight_bit=4)


@pytest.mark.parametrize("section", ["weights", "activations", "balancing", "calibration"])
def test_a_section_must_be_one(section: str, raises_sentence: Sentence) -> None:
    with raises_sentence(f"QuantConfig {section} must be a {section.capitalize()}", "not 5"):
        QuantConfig(**cast(Any, {section: 5}))


def test_how_rows_are_sampled_must_be_a_sampling(raises_sentence: Sentence) -> None:
    with raises_sentence("Calibration sampling must be a Sampling", "'ddim'"):
        Calibration(sampling=cast(Any, "ddim"))


def test_no_two_settings_share_a_name() -> None:
    names = [leaf.name for leaf in leaves(QuantConfig)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("policy", ["uniform", "edges8,final=6:float,blocks.qkv=5", "weights-only,blocks.attention=integer"])
def test_a_policy_is_written_as_it_is_read(policy: str) -> None:
    assert str(Policy.parse(policy)) == policy
    assert Policy.parse(str(Policy.parse(f" {policy} "))) == Policy.parse(policy)


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        QuantConfig().weights.bits = 4  # type: ignore[misc]
