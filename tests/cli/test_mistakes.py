"""A user's mistakes: one sentence, nothing left behind."""

import shutil
from pathlib import Path

import pytest
from cli_helpers import DIGITS, VAE, run

from ptq4dit_jax import chain
from ptq4dit_jax.quantization import observations

MODELS = {
    "random:DiT-XXL/2": ("Unknown DiT preset 'DiT-XXL/2'", "DiT-XL/2"),
    "random:DiT-S/2@x": ("must be a number",),
    "random:DiT-S/2@²": ("must be a number",),
    "random:DiT-S/2@7": ("not a multiple of patch_size",),
    "random:DiT-S/2@0": ("input_size must be a positive integer, not 0",),
    "missing": ("missing", "does not exist"),
    "file": ("no checkpoint of a known kind", "torch.save"),
    "foreign": ("holds no model", "config.json"),
    "newer": ("newer ptq4dit_jax (format 3)", "upgrade"),
    "nan": ("nan", "NaN or infinity", "final/bias"),
}


@pytest.mark.parametrize("model", MODELS)
def test_unusable_models(model, refused):
    words = MODELS[model]
    refused(f"info {model}", *words)
    refused(f"quantize {model} --out q", *words)
    refused(f"sample {model} --out new/a.npz", *words)
    refused(f"compile {model} --batch-size 1 --out new/p", *words)
    refused(f"evaluate {model} --against D --out r", *words)
    refused(f"evaluate Q --against {model} --out r", *words)


def test_every_truncated_file_of_a_checkpoint(w4, refused, here):
    shutil.copytree(w4.folder, "cut")
    files = [file for file in Path("cut").rglob("*") if file.is_file()]
    assert len(files) > 4
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        refused("info cut", "copy, download or quantize")
        file.write_bytes(content)
    run("info", "cut")


QUANTIZE = {
    "--weight-bits 1": ("weight_bits", "2 to 8, not 1"),
    "--weight-bits 9": ("weight_bits", "2 to 8, not 9"),
    "--act-bits 1": ("act_bits", "2 to 8, not 1"),
    "--balance ssc": ("'ssc'", "none, csb, csb+ssc"),
    "--ssc tokens": ("'tokens'", "steps, rows"),
    "--temperature 0": ("temperature", "0.0"),
    "--temperature inf": ("temperature", "inf"),
    "--policy nope": ("'nope'", "edges8"),
    "--policy uniform,final=9": ("final", "2 to 8, not 9"),
    "--policy uniform,final=²": ("final=²",),
    "--policy uniform,last=8": ("'last'", "final"),
    "--dynamic blocks.nose": ("'blocks.nose'", "blocks.qkv_in"),
    "--step-groups 0": ("step_groups", "not 0"),
    "--sampler euler": ("'euler'", "ddpm, ddim, dpm++2m"),
    "--eta 2": ("eta", "2.0"),
    "--cfg-scale nan": ("cfg_scale", "nan"),
    "--cfg-channels none": ("cfg_channels", "'none'"),
    "--seed -1": ("--seed", "not -1"),
    "--calibration absent.npz": ("absent.npz", "No such file"),
    "--calibration file": ("file", "npz"),
    "--calibration plain.npy": ("plain.npy", "npz"),
    "--calibration rows_no_t.npz": ("rows_no_t.npz must hold the array t; it holds x, y",),
    "--calibration rows_pickled.npz": ("rows_pickled.npz", "allow_pickle=False"),
    "--calibration rows_words.npz": ("array x", "numbers"),
    "--calibration rows_small.npz": ("(4, 6, 6, 1)",),
    "--calibration rows_table.npz": ("t (M,)", "(4, 1)"),
    "--calibration rows_early.npz": ("timesteps", "-1"),
    "--calibration rows_halves.npz": ("timesteps", "5.5"),
    "--calibration absent.pt": ("absent.pt", "does not exist"),
    "--calibration rows_label.npz --calibration-layout CHWN": ("'CHWN'", "NHWC or NCHW"),
    "--calibration-layout NCHW": ("--calibration-layout", "--calibration"),
    "--calibration rows_label.npz --calib-rows 8 --steps 5": ("--calib-rows, --steps", "--calibration", "leave out"),
    "--calibration rows_label.npz --guidance-interval 0,0.5": ("--guidance-interval", "leave out"),
    "--fresh": ("--fresh", "nothing is learned"),
    "--act-bits 12": ("act_bits", "2 to 8, not 12", "weights-only"),
    "--policy edges8,blocks.attention=4": ("'blocks.attention=4'", "=float"),
    "--calibration rows_label.npz": ("Label 11 is out of range",),
    "--calibration rows_holes.npz": ("NaN or infinity",),
}


@pytest.mark.parametrize("options", QUANTIZE)
def test_mistakes_in_quantize(options, refused):
    refused(f"quantize D --out new/q {options}", *QUANTIZE[options])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--calib-steps 5 --steps 4", ("Calibration steps", "sampler's 4 steps, not 5")),
        ("--calib-steps 0", ("Calibration steps", "not 0")),
        ("--calib-rows 3", ("Calibration rows", "even", "not 3")),
        ("--calib-rows 0", ("Calibration rows", "not 0")),
        ("--steps 0", ("1 to 1000", "'0'")),
        ("--row-batch -1", ("-1",)),
        ("--calibration rows_late.npz", ("timesteps", "0 to 999", "1000")),
    ],
)
def test_mistakes_that_quantization_finds(options, words, refused, monkeypatch):
    monkeypatch.setattr(chain, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    monkeypatch.setattr(observations, "channel_extremes", lambda *_, **__: pytest.fail("long work began"))
    refused(f"quantize D --out new/q {options}", *words, started=True)


def test_quantizing_twice(refused):
    refused("quantize Q --out new/q", "quantized already")


SAMPLE = {
    "--vae-scale 0.2": ("--vae-scale", "--vae"),
    "--labels 11": ("Label 11 is out of range", "0 to 9"),
    "--labels 3000000000": ("Label 3000000000 is out of range",),
    "--labels 0-30000000": ("Label 30000000 is out of range",),
    "--labels one": ("'one'", "0-9"),
    "--labels 5-2": ("'5-2'",),
    "--labels -1": ("'-1'",),
    "--labels 1,": ("'1,'",),
    "--repeat 0": ("--repeat", "not 0"),
    "--steps 0": ("1 to 1000", "'0'"),
    "--steps 0 --sampler ddim": ("1 to 1000", "'0'"),
    "--steps ²": ("'²'",),
    "--steps 1001": ("'1001'",),
    "--steps ddim0": ("'ddim0'",),
    "--steps ddim600": ("exactly 600 steps", "'600'"),
    "--sampler euler": ("'euler'", "ddpm, ddim, dpm++2m"),
    "--sampler ddim --eta 2": ("eta", "2.0"),
    "--cfg-scale nan": ("cfg_scale", "nan"),
    "--cfg-channels none": ("cfg_channels", "'none'", "first3, all"),
    "--guidance-interval 0.7,0.2": ("guidance_interval", "LOW,HIGH", "not 0.7, 0.2"),
    "--guidance-interval 0.7": ("guidance_interval", "LOW,HIGH", "not 0.7"),
    "--guidance-interval 0,x": ("--guidance-interval", "'0,x'", "0,0.7"),
    "--batch-size 0": ("batch_size", "not 0"),
    "--seed -1": ("--seed", "not -1"),
    "--backend cutlass": ("'cutlass'", "auto, xla, tpu, hopper"),
    "--backend hopper": ("hopper runs quantized models", "auto or xla"),
    "--backend fp8": ("fp8 runs quantized models", "auto or xla"),
    "--backend tpu": ("tpu runs quantized models", "auto or xla"),
    "--backend mosaic_gpu": ("hopper runs quantized models", "auto or xla"),
    "--seed 4294967296": ("--seed", "4294967295"),
    "--seed 99999999999999999999999": ("--seed",),
    "--noise noise_shape.npz": ("(1, 8, 8, 1)", "(2, 8, 8, 1)"),
    "--noise noise_steps.npz --steps 4": ("step_noise", "(4, 1, 8, 8, 1)"),
    "--noise noise_words.npz": ("noise", "numbers"),
    "--noise noise_nan.npz": ("noise", "NaN or infinity"),
    "--noise noise_name.npz": ("array noise", "latents"),
    "--noise noise_damaged.npz": ("noise_damaged.npz", "npz"),
    "--noise empty.npz": ("empty.npz", "npz"),
    "--noise text.npz": ("text.npz", "npz"),
    "--noise foreign": ("foreign", "npz"),
    "--program absent": ("absent", "No such file"),
    "--program foreign": ("foreign", "directory"),
    "--program file": ("file is no exported sampler", "ptq4dit compile"),
    "--program program": ("its model/config/input_size is 6, and 8 is needed", "ptq4dit compile"),
    "--program program --steps 5": ("its number of calls of the network is 3, and 5 is needed",),
    "--program program --batch-size 3": ("2 images per call, not 3", "--batch-size"),
    "--program damaged": ("damaged or was cut short",),
}


@pytest.mark.parametrize("options", SAMPLE)
def test_mistakes_in_sample(options, refused, monkeypatch):
    monkeypatch.setattr(chain, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    refused(f"sample D --out new/a.png {options}", *SAMPLE[options], started=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--platform abacus", ("one of cpu, cuda", "'abacus'")),
        ("--devices 0", ("number of devices", "not 0")),
        ("--devices 2", ("multiple of its number of devices, 2", "not 1")),
        ("--batch-size 0", ("not 0",)),
        ("--sampler euler", ("'euler'",)),
        ("--backend hopper", ("hopper runs quantized models", "auto or xla")),
        ("--dtype int8", ("int8",)),
        (f"--vae {VAE}", ("latents of 4 channels, not of 1",)),
    ],
)
def test_mistakes_in_compile(options, words, refused):
    refused(f"compile D --out new/p --batch-size 1 {options}", *words)


def test_pictures_of_latents(refused):
    refused("sample latent --out a.png", "4 channels", "--vae", ".npz")


def test_unusable_vaes(refused):
    for command in ("sample latent --out a.png", "evaluate latent --against latent --out r"):
        refused(f"{command} --vae missing", "no VAE at missing", "does not exist")
        refused(f"{command} --vae file", "file is a file", "give the folder")
        refused(f"{command} --vae foreign", "foreign holds no VAE")
        refused(f"{command} --vae {DIGITS}", "holds no VAE", "AutoencoderKL")
    refused(f"evaluate D --against D --out r --vae {VAE}", "latents of 4 channels, not of 1")
    refused(f"sample D --out a.png --vae {VAE}", "latents of 4 channels, not of 1", started=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("Q --against Q", ("must be a float model",)),
        ("Q --against tiny", ("hidden_size (32 against 128)", "made from")),
        ("Q --against D --labels 12", ("Label 12 is out of range",)),
        ("Q --against D --labels 0 --repeat 1 --batch-size -3", ("batch_size", "-3")),
        ("Q --against D --sampler euler", ("'euler'",)),
        ("Q --against D --cfg-channels none", ("'none'",)),
        ("Q --against D --steps 0", ("'0'",)),
        ("Q --against D --backend cutlass", ("'cutlass'", "fp8")),
        ("Q --against D --backend tpu", ("tpu needs a TPU", "auto or xla")),
        ("Q --against D --backend fp8 --dtype float8", ("'float8'", "bfloat16")),
        ("D --against D --backend fp8", ("fp8 runs quantized models", "auto or xla")),
        ("Q --against D --seed -1", ("--seed",)),
    ],
)
def test_mistakes_in_evaluate(arguments, words, refused, monkeypatch):
    monkeypatch.setattr(chain, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    refused(
        f"evaluate {arguments} --labels 0 --out new/r" if "--labels" not in arguments else f"evaluate {arguments} --out r",
        *words,
        started=True,
    )
