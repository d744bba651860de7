"""Options made from settings: none is out of reach, each reaches its field, and what says nothing is refused by name."""

import dataclasses

import pytest
from cli_helpers import COMMANDS, DIGITS
from helpers import load_float

from ptq4dit_jax import cli
from ptq4dit_jax.checkpoints.foreign.options import ImportOptions
from ptq4dit_jax.config import Balancing, QuantConfig, Reconstruction, Weights
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.guidance import Guidance
from ptq4dit_jax.policy import Policy
from ptq4dit_jax.settings import leaves


class Stopped(Exception):
    """Raised where the long work would begin, with what it was asked for."""


@pytest.fixture
def asked(monkeypatch, here):
    """The settings that ``quantize`` makes of options."""

    def ask(*options):
        def stop(dit, config, **_):
            raise Stopped(config)

        monkeypatch.setattr(cli.quantize.quantization, "quantize", stop)
        with pytest.raises(Stopped) as stopped:
            cli.app(["quantize", DIGITS, "--out", "q", *options], standalone_mode=False)
        return stopped.value.args[0]

    return ask


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("quantize", QuantConfig),
        ("sample", Sampling),
        ("compile", Sampling),
        ("evaluate", Sampling),
        ("convert", ImportOptions),
    ],
)
def test_every_setting_is_an_option(command, kind):
    """By the fields alone, of every dataclass on the way: what has no metadata has no option, and is found here."""
    fields, pending = set(), [kind]
    while pending:
        owner = pending.pop()
        for field in dataclasses.fields(owner):
            if field.name == "reconstruction":
                pending.append(Reconstruction)
            elif dataclasses.is_dataclass(field.default) and not isinstance(field.default, Policy):
                pending.append(type(field.default))
            else:
                fields.add((owner, field.name))
    spelled = {(leaf.owner, leaf.field.name): leaf.said.flag or leaf.name for k in (kind, Reconstruction) for leaf in leaves(k)}
    flags = {flag for parameter in COMMANDS[command].params for flag in parameter.opts}
    assert not [field for field in fields if f"--{spelled[field].split('/')[0].replace('_', '-')}" not in flags]
    assert len(fields) == {"quantize": 36, "sample": 6, "compile": 6, "evaluate": 6, "convert": 14}[command]


def test_options_reach_their_sections(asked):
    config = asked(
        *("--weight-bits", "5", "--no-weigh-inputs", "--act-bits", "6", "--step-groups", "3", "--dynamic", "blocks.qkv_in"),
        *("--balance", "csb", "--exponent", "0.25", "--no-balance-fc2", "--no-equalize-v", "--range-search", "minmax"),
        *("--calib-steps", "2", "--calib-rows", "6", "--sampler", "ddim", "--steps", "10", "--eta", "0.5"),
        *("--cfg-scale", "2", "--cfg-channels", "all", "--guidance-interval", "0.1,0.8", "--policy", "edges8,final=6"),
        *("--rounding", "adaround", "--iterations", "7", "--reconstruct-from", "nearest", "--reconstruct-batch", "16"),
        *("--rounding-rate", "0.2", "--rounding-eps", "0.5", "--no-decay-rounding", "--scale-rate", "0.01"),
        *("--regularizer", "0.2", "--exponents", "10,3", "--warmup", "0.1", "--row-weights", "steps"),
        *("--reconstruct-dtype", "float32", "--accumulation-chunks", "4", "--reconstruct-rows-on", "host"),
    )
    assert config.weights == Weights(bits=5, weigh_inputs=False, rounding="adaround")
    assert (config.activations.bits, config.activations.step_groups) == (6, 3)
    assert config.activations.dynamic_sites == ("blocks.qkv_in",)
    assert config.balancing == Balancing(method="csb", exponent=0.25, fc2=False, equalize_v=False)
    assert (config.calibration.steps, config.calibration.rows, config.range_search) == (2, 6, "minmax")
    assert config.calibration.sampling == Sampling("ddim", "10", 0.5, Guidance(2.0, "all", (0.1, 0.8)))
    assert str(config.policy) == "edges8,final=6"
    assert config.reconstruction == Reconstruction(
        iterations=7,
        start="nearest",
        batch_size=16,
        rounding_rate=0.2,
        rounding_eps=0.5,
        decay_rounding=False,
        scale_rate=0.01,
        regularizer=0.2,
        exponents=(10.0, 3.0),
        warmup=0.1,
        row_weights="steps",
        dtype="float32",
        accumulation_chunks=4,
        rows_on="host",
    )


def test_without_options_the_defaults_of_the_library_hold(asked):
    dit = load_float(DIGITS)
    assert asked() == QuantConfig().resolve(dit.schedule, dit.config)
    assert asked("--paper") == QuantConfig.paper().resolve(dit.schedule, dit.config)
    assert asked("--paper", "--balance-fc2", "--reconstruct").reconstruction == Reconstruction(start="nearest")
    assert asked("--dynamic", "none").activations.dynamic_sites == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--iterations 5", ("--iterations", "--reconstruct")),
        ("--rounding gptq --warmup 0.5", ("--warmup", "--reconstruct")),
        ("--reconstruct-batch 8", ("--reconstruct-batch is for learning",)),
        ("--no-decay-rounding", ("--decay-rounding is for learning",)),
        ("--reconstruct --exponents 2", ("exponents", "2")),
        ("--reconstruct --exponents high,low", ("--exponents", "20,2", "high,low")),
        ("--guidance-interval x", ("--guidance-interval", "'x'")),
        ("--ssc rows", ("ssc rows", "balance search")),
        ("--reconstruct --warmup 2", ("warmup", "2")),
    ],
)
def test_options_that_decide_nothing_or_cannot_be(options, words, refused):
    refused(f"quantize D --out q {options}", *words)


def test_a_model_of_this_program_takes_no_options_of_an_import(refused):
    refused("convert D out.safetensors --to meta --num-heads 4", "--num-heads", "leave out")
    refused("convert D out.safetensors --to meta --model-weights", "--ema/--model-weights", "leave out")
