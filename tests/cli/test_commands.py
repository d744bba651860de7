"""The commands end to end on the shipped model with tiny settings."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
from cli_helpers import CALIBRATE, DIGITS, FAST, VAE, WALK, figures, patch, run
from PIL import Image

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints, cli, terminal
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.evaluation import image_grid


def test_info_of_a_float_model(here, capsys):
    run("info", DIGITS, "--json", "info.json")
    facts = figures("info.json")
    assert (facts["kind"], facts["classes"], facts["learned_sigma"], facts["layers"]) == ("float", 10, True, [])
    assert facts["config"]["hidden_size"] == 128
    assert facts["provenance"]["recipe"]["steps"] == 20000
    dit = helpers.load_float(DIGITS)
    assert facts["parameters"] == dit.num_params
    assert facts["bytes"] == 4 * dit.num_params
    out = capsys.readouterr().out
    assert "depth 6, width 128, 4 heads, patch 2" in out
    assert out.rstrip().endswith(str(here / "info.json"))


def test_info_of_a_quantized_model(w4, here, capsys):
    run("info", w4.folder, "--json", "info.json")
    facts = figures("info.json")
    assert facts["kind"] == "quantized"
    assert facts["bytes"] == helpers.load_quantized(w4.folder).nbytes
    assert facts["parameters"] == helpers.load_float(DIGITS).num_params
    assert {row["layer"]: row["weight_bits"] for row in facts["layers"]}["blocks.qkv"] == 4
    assert facts["provenance"]["settings"]["calib_steps"] == 2
    out = capsys.readouterr().out
    for row in facts["layers"]:
        assert row["layer"] in out


def test_info_of_a_random_preset(here, monkeypatch):
    """Drawing its parameters compiles for seconds, so it is another model's turn."""
    asked = []

    def drawn(config, key):
        asked.append(config)
        return helpers.tiny_model()

    monkeypatch.setattr(terminal.FloatDiT, "init", drawn)
    run("info", "random:DiT-S/8@16", "--json", "info.json")
    assert asked == [ptq.DiTConfig.preset("DiT-S/8", input_size=16)]
    assert figures("info.json")["provenance"] == {}
    run("info", "random:DiT-B/2")
    assert asked[1:] == [ptq.DiTConfig.preset("DiT-B/2", input_size=32)]


def test_quantize_says_what_it_did(w4):
    assert w4.figures["float_bytes"] == 4 * helpers.load_float(DIGITS).num_params
    assert w4.figures["bytes"] == helpers.load_quantized(w4.folder).nbytes < w4.figures["float_bytes"] / 5
    assert w4.figures["seconds"] > 0
    assert w4.figures["settings"]["weight_bits"] == 4
    assert w4.figures["out"] == str(w4.folder)
    facts = store.read_config(w4.folder)["provenance"]
    assert facts["source_sha256"] == store.read_config(DIGITS)["content_sha256"]
    assert facts["settings"] == w4.figures["settings"]
    assert (facts["source"], facts["seed"]) == (DIGITS, 0)
    assert set(facts["versions"]) == {"ptq4dit_jax", "jax", "flax", "orbax"}
    assert (facts["calibration"]["steps"], facts["calibration"]["rows_per_step"]) == (2, 4)


def test_the_seed_decides_the_quantized_model(w4, here):
    run("quantize", DIGITS, "--out", "same", *CALIBRATE, "--seed", "0")
    run("quantize", DIGITS, "--out", "other", *CALIBRATE, "--seed", "1")
    hashes = [store.read_config(folder)["content_sha256"] for folder in (w4.folder, "same", "other")]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.slow
def test_quantize_reconstructs_and_clears_up(inputs, here):
    calibrate = ["--weight-bits", "4", "--steps", "4", "--calib-steps", "2", "--calib-rows", "4"]
    run("quantize", inputs / "tiny", "--out", "learned", *calibrate, "--reconstruct", "--iterations", "2")
    facts = store.read_config("learned")["provenance"]
    assert facts["settings"]["reconstruction"]["iterations"] == 2
    assert list(facts["reconstruction"]) == ["embed image", "embed condition", "block 0", "block 1", "head"]
    assert [path.name for path in here.iterdir()] == ["learned"]
    assert isinstance(ptq.load("learned"), ptq.QuantizedDiT)


def test_quantize_from_stored_rows(w4, here):
    """The rows that the program samples itself, handed to it in a file and in another order, give the same model."""
    dit, config = helpers.load_float(DIGITS), ptq.QuantConfig.of(steps=4)
    rows = ptq.sample_trajectories(dit, dataclasses.replace(config.calibration, steps=2, rows=4), key=jax.random.key(0))
    x, y, t = rows.x.reshape(8, 8, 8, 1), np.ravel(rows.y), np.repeat(rows.t, 4)
    order = [4, 0, 5, 1, 2, 6, 3, 7]
    np.savez("rows.npz", x=x[order], t=t[order], y=y[order])
    run("quantize", DIGITS, "--out", "stored", *FAST, "--calibration", "rows.npz", "--seed", "7")
    assert store.read_config("stored")["content_sha256"] == store.read_config(w4.folder)["content_sha256"]
    assert store.read_config("stored")["provenance"]["calibration"]["rows"] == "given"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--paper"], {"policy": "uniform", "step_groups": 1, "range_search": "percentile", "balance_fc2": False}),
        (["--paper", "--policy", "small8", "--step-groups", "2"], {"policy": "small8", "step_groups": 2, "equalize_v": False}),
        (["--dynamic", "blocks.qkv_in, blocks.fc1_in"], {"dynamic_sites": ("blocks.qkv_in", "blocks.fc1_in")}),
        (["--dynamic", "none"], {"dynamic_sites": ()}),
        (["--balance", "none", "--act-bits", "6"], {"balance": "none", "act_bits": 6}),
        ([], {}),
    ],
)
def test_options_of_quantize_reach_the_settings(options, expected, here, monkeypatch):
    seen = []

    def stop(dit, config, **_):
        seen.append(config)
        raise ptq.Ptq4ditError("Seen.")

    monkeypatch.setattr(cli.quantize.quantization, "quantize", stop)
    assert cli.main(["quantize", DIGITS, "--out", "q", *options]) == 1
    make = ptq.QuantConfig.paper if "--paper" in options else ptq.QuantConfig.of
    assert seen == [make(**expected, steps=50, sampler="ddpm", cfg_scale=1.5, calib_steps=25)]


def test_sample_writes_a_grid_that_shows_the_images(w4, here, capsys):
    run("sample", w4.folder, "--out", "new/a.png", *WALK, "--json", "a.json")
    run("sample", w4.folder, "--out", "a.npz", *WALK)
    assert figures("a.json") | {"images": 4, "steps": "4", "sampler": "ddpm", "seed": 0, "out": "new/a.png"} == figures(
        "a.json"
    )
    assert str(here / "new/a.png") in capsys.readouterr().out
    images = np.load("a.npz")["arr_0"]
    with Image.open("new/a.png") as picture:
        width, height = picture.size
        shown = np.asarray(picture.convert("L"))
    assert 4 * 64 <= width * height < 10**6
    assert max(width, height) < 3 * min(width, height)
    zoom = (width - 2) // 16  # two by two
    tile = shown[: 8 * zoom, : 8 * zoom][zoom // 2 :: zoom, zoom // 2 :: zoom]
    np.testing.assert_array_equal(tile, images[0, :, :, 0])


def test_sample_writes_an_npz_in_the_form_of_adm(w4, here):
    run("sample", w4.folder, "--out", "a.npz", *WALK)
    with np.load("a.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["labels"]
    assert (images.dtype, images.shape) == (np.uint8, (4, 8, 8, 1))
    np.testing.assert_array_equal(labels, [0, 1, 2, 3])
    floats = ptq.sample(ptq.load(w4.folder), np.arange(4), key=jax.random.key(0), steps=4)
    np.testing.assert_array_equal(images, np.clip(127.5 * floats + 128, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_the_seed_decides_the_bytes(suffix, w4, here):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2**32 - 1)):
        run("sample", w4.folder, "--out", name + suffix, *WALK, "--seed", seed)
        files.append(Path(name + suffix).read_bytes())
    assert files[0] == files[1]
    assert len(set(files)) == 3


def test_repeats_and_batches(w4, here):
    run("sample", w4.folder, "--out", "whole.npz", *WALK)
    run("sample", w4.folder, "--out", "repeated.npz", "--labels", "0-1", "--repeat", "2", "--steps", "4")
    np.testing.assert_array_equal(np.load("repeated.npz")["labels"], [0, 1, 0, 1])
    first = [np.load(name)["arr_0"][:2] for name in ("whole.npz", "repeated.npz")]
    np.testing.assert_array_equal(*first)


def test_all_devices_take_part(w4, here, monkeypatch):
    """What they compute is the business of the tests of sampling."""
    meshes = []

    def no_sampling(model, labels, key, *, mesh, **_):
        meshes.append(mesh)
        return iter([(0, np.zeros((len(labels), 8, 8, 1), np.float32))])

    patch(monkeypatch, "all_devices_mesh", terminal.all_devices_mesh)
    monkeypatch.setattr(cli.sample.sampling, "sample_batches", no_sampling)
    run("sample", w4.folder, "--out", "a.png")
    expected = jax.devices() if jax.device_count() > 1 else None
    assert meshes[0] is expected or meshes[0].devices.tolist() == expected


def test_explicit_noise_is_that_of_the_key(w4, here):
    """Noise by JAX's own functions, as the documentation says that it comes from key, index and step."""
    keys = [jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), index) for index in range(4)]

    def draw(step):
        return np.stack([jax.random.normal(jax.random.fold_in(key, step), (8, 8, 1), np.float32) for key in keys])

    np.savez("noise.npz", noise=draw(0), step_noise=np.stack([draw(step + 1) for step in range(4)]))
    run("sample", w4.folder, "--out", "key.npz", *WALK, "--seed", "3")
    run("sample", w4.folder, "--out", "given.npz", *WALK, "--noise", "noise.npz")
    np.testing.assert_array_equal(np.load("given.npz")["arr_0"], np.load("key.npz")["arr_0"])


def test_latents_are_written_as_floats(here, monkeypatch):
    latents = np.random.default_rng(0).standard_normal((2, 6, 6, 4), np.float32)
    checkpoints.save(helpers.tiny_model(in_channels=4), "latent")
    monkeypatch.setattr(cli.sample.sampling, "sample_batches", lambda *_, **__: iter([(0, latents[:1]), (1, latents[1:])]))
    run("sample", "latent", "--out", "a.npz", "--labels", "1-2")
    with np.load("a.npz") as file:
        np.testing.assert_array_equal(file["latents"], latents)
        assert file["latents"].dtype == np.float32
        assert "arr_0" not in file


def test_a_vae_makes_pictures_of_latents(here, capsys):
    checkpoints.save(helpers.tiny_model(in_channels=4), "latent")
    walk = ["--labels", "1-3", "--steps", "2", "--vae", VAE]
    run("sample", "latent", "--out", "a.npz", *walk, "--batch-size", "2")
    run("sample", "latent", "--out", "a.png", *walk)
    assert str(here / "a.png") in capsys.readouterr().out
    with np.load("a.npz") as file:
        pictures, labels = file["arr_0"], file["labels"]
    assert (pictures.shape, pictures.dtype) == ((3, 48, 48, 3), np.uint8)
    assert labels.tolist() == [1, 2, 3]
    model = ptq.load("latent")
    made = ptq.sample(model, labels, key=jax.random.key(0), steps=2, decoder=ptq.load_vae(VAE))
    near = lambda a, b: np.abs(a.astype(int) - b).max() <= 1
    assert near(pictures, ptq.to_uint8(made))
    with Image.open("a.png") as grid:
        assert grid.mode == "RGB"
        assert near(np.asarray(grid), np.asarray(image_grid(made)))


@pytest.mark.slow
def test_a_report_on_pictures_of_latents(here):
    checkpoints.save(helpers.tiny_model(in_channels=4), "latent")
    run(
        "evaluate",
        "latent",
        "--against",
        "latent",
        "--out",
        "r",
        "--labels",
        "0-1",
        "--repeat",
        "1",
        "--steps",
        "2",
        "--vae",
        VAE,
    )
    facts = figures("r/report.json")
    assert facts["data_range"] == 2
    assert facts["settings"]["vae"] == VAE
    assert facts["models"]["latent"]["psnr_db"] == [None, None], "identical pictures, infinitely many decibels"
    assert None not in facts["models"]["bfloat16"]["psnr_db"]
    assert "2 images" in Path("r/report.md").read_text()
    with Image.open("r/samples.png") as picture:
        assert picture.width > 2 * 48


def test_overwrite_replaces_files_and_models(w4, here, monkeypatch):
    Path("a.npz").write_text("old")
    run("sample", w4.folder, "--out", "a.npz", *WALK, "--overwrite")
    assert np.load("a.npz")["arr_0"].shape == (4, 8, 8, 1)
    shutil.copytree(DIGITS, "model")
    monkeypatch.setattr(cli.quantize.quantization, "quantize", lambda *_, **__: ptq.load(w4.folder))
    run("quantize", DIGITS, "--out", "model", *CALIBRATE, "--overwrite")
    assert store.read_config("model")["kind"] == "quantized_dit"
    assert Path("model/train.py").is_file()  # what is no part of the model stays


def test_paths_are_printed_as_they_are(w4, here, capsys):
    run("sample", w4.folder, "--out", "[red]a [/b]:smile:.npz", *WALK)
    assert str(here / "[red]a [/b]:smile:.npz") in capsys.readouterr().out


@pytest.fixture(scope="module")
def report(w4, one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    arguments = [w4.folder, "--against", DIGITS, *WALK, "--repeat", "1"]
    run("evaluate", *arguments, "--out", folder / "report", "--json", folder / "figures.json")
    return SimpleNamespace(folder=folder / "report", json=figures(folder / "figures.json"), arguments=arguments)


@pytest.mark.slow
def test_evaluate_writes_a_report(report):
    files = {file.name for file in report.folder.iterdir()}
    assert files == {"report.md", "report.json", "samples.png", "psnr.png", "sqnr_steps.png", "sqnr_layers.png"}
    page = (report.folder / "report.md").read_text()
    for name in files - {"report.md", "report.json"}:
        assert f"]({name})" in page
        with Image.open(report.folder / name) as picture:
            picture.verify()
    inside = figures(report.folder / "report.json")
    for document in (report.json, inside):
        assert list(document["models"]) == ["bfloat16", "model"]
        measured = document["models"]["model"]
        for figure in ("sqnr_mean_db", "sqnr_pooled_db"):
            assert 0 < measured[figure] < document["models"]["bfloat16"][figure]
        assert len(measured["step_sqnr_db"]) == 4
        assert len(measured["psnr_db"]) == len(document["labels"]) == 4
        assert measured["psnr_interval"]["low"] <= measured["psnr_interval"]["mean"] <= measured["psnr_interval"]["high"]
    assert {row["layer"] for row in inside["layers"]} >= {"blocks.qkv", "final"}
    assert inside["settings"]["seed"] == 0


@pytest.mark.slow
def test_the_seed_decides_the_report(report, here):
    for name, seed in (("same", 0), ("other", 1)):
        run("evaluate", *report.arguments, "--out", name, "--seed", seed, "--json", f"{name}.json")
    assert figures("same.json") == report.json
    assert figures("other.json")["models"] != report.json["models"]
    for name in ("samples.png", "psnr.png"):
        assert Path("same", name).read_bytes() == (report.folder / name).read_bytes()
        assert Path("other", name).read_bytes() != (report.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "repeat", "expected"),
    [("3", 1, [3]), ("0-3", 1, [0, 1, 2, 3]), (" 1, 5-6,1", 1, [1, 5, 6, 1]), ("2,4", 3, [2, 4, 2, 4, 2, 4]), ("7-7", 1, [7])],
)
def test_labels(text, repeat, expected):
    labels = terminal.parse_labels(text, repeat)
    assert labels.dtype == np.int32
    assert labels.tolist() == expected
