"""The commands end to end on the shipped model with tiny settings; and a user's mistakes: one sentence, nothing left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
import typer
from PIL import Image

import ptq4dit_jax as ptq
from ptq4dit_jax import checkpoints, cli, sampling, terminal
from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.evaluation import image_grid

ROOT = Path(__file__).resolve().parents[1]
DIGITS = str(ROOT / "models/digits")
VAE = str(ROOT / "tests/golden/vae")
CALIBRATE = ["--weight-bits", "4", "--calib-steps", "2", "--calib-rows", "4", "--steps", "4"]
WALK = ["--labels", "0-3", "--steps", "4"]
COMMANDS = typer.main.get_command(cli.app).commands


def run(*arguments):
    """The program in this process; a command must succeed. Arguments may be paths."""
    assert cli.main([str(a) for a in arguments]) == 0


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def figures(path):
    """JSON as its standard has it: NaN is none of it."""
    return json.loads(Path(path).read_text(), parse_constant=lambda text: pytest.fail(f"{text} in {path}"))


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """All commands on one device, as compiling for the suite's eight virtual ones takes long; one test undoes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "all_devices_mesh", lambda: None)
        yield patch


@pytest.fixture(scope="session")
def w4(tmp_path_factory):
    """The digits model quantized by the program: its folder and the figures."""
    folder = tmp_path_factory.mktemp("w4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "all_devices_mesh", lambda: None)
        run("quantize", DIGITS, "--out", folder / "model", *CALIBRATE, "--json", folder / "figures.json")
    return SimpleNamespace(folder=folder / "model", figures=figures(folder / "figures.json"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The commands


def test_info_of_a_float_model(here, capsys):
    run("info", DIGITS, "--json", "info.json")
    facts = figures("info.json")
    assert (facts["kind"], facts["classes"], facts["learned_sigma"], facts["layers"]) == ("float", 10, True, [])
    assert facts["config"]["hidden_size"] == 128
    assert facts["provenance"]["recipe"]["steps"] == 20000
    dit = ptq.load(DIGITS)
    assert facts["parameters"] == dit.num_params
    assert facts["bytes"] == 4 * dit.num_params
    out = capsys.readouterr().out
    assert "depth 6, width 128, 4 heads, patch 2" in out
    assert out.rstrip().endswith(str(here / "info.json"))


def test_info_of_a_quantized_model(w4, here, capsys):
    run("info", w4.folder, "--json", "info.json")
    facts = figures("info.json")
    assert facts["kind"] == "quantized"
    assert facts["bytes"] == ptq.load(w4.folder).nbytes
    assert facts["parameters"] == ptq.load(DIGITS).num_params
    assert {row["layer"]: row["weight_bits"] for row in facts["layers"]}["blocks.qkv"] == 4
    assert facts["provenance"]["settings"]["calib_steps"] == 2
    out = capsys.readouterr().out
    for row in facts["layers"]:
        assert row["layer"] in out


def test_info_of_a_random_preset(here, monkeypatch):
    """Drawing its parameters compiles for seconds, so it is another model's turn."""
    asked = []
    monkeypatch.setattr(terminal.FloatDiT, "init", lambda config, key: asked.append(config) or helpers.tiny_model())
    run("info", "random:DiT-S/8@16", "--json", "info.json")
    assert asked == [ptq.DiTConfig.preset("DiT-S/8", input_size=16)]
    assert figures("info.json")["provenance"] == {}
    run("info", "random:DiT-B/2")
    assert asked[1:] == [ptq.DiTConfig.preset("DiT-B/2", input_size=32)]


def test_quantize_says_what_it_did(w4):
    assert w4.figures["float_bytes"] == 4 * ptq.load(DIGITS).num_params
    assert w4.figures["bytes"] == ptq.load(w4.folder).nbytes < w4.figures["float_bytes"] / 5
    assert w4.figures["seconds"] > 0
    assert w4.figures["settings"]["weight_bits"] == 4
    assert w4.figures["out"] == str(w4.folder)
    facts = store.read_config(w4.folder)["provenance"]
    assert facts["source_sha256"] == store.read_config(DIGITS)["content_sha256"]
    assert facts["settings"] == w4.figures["settings"]
    assert (facts["source"], facts["seed"]) == (DIGITS, 0)
    assert set(facts["versions"]) == {"ptq4dit_jax", "jax", "flax", "orbax"}
    assert facts["calibration"]["steps"], facts["calibration"]["rows_per_step"] == (2, 4)


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
    dit, config = ptq.load(DIGITS), ptq.QuantConfig(steps=4)
    rows = ptq.sample_trajectories(dit, jax.random.key(0), config.walk, steps=2, rows=4, cfg_scale=config.cfg_scale)
    x, y, t = rows.x.reshape(8, 8, 8, 1), np.ravel(rows.y), np.repeat(rows.t, 4)
    order = [4, 0, 5, 1, 2, 6, 3, 7]
    np.savez("rows.npz", x=x[order], t=t[order], y=y[order])
    run("quantize", DIGITS, "--out", "stored", *CALIBRATE, "--calibration", "rows.npz", "--seed", "7")
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

    monkeypatch.setattr(cli.ptq, "quantize", stop)
    assert cli.main(["quantize", DIGITS, "--out", "q", *options]) == 1
    make = ptq.QuantConfig.paper if "--paper" in options else ptq.QuantConfig
    assert seen == [make(**expected, steps="50", sampler="ddpm")]


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
    floats = ptq.sample(ptq.load(w4.folder), np.arange(4), jax.random.key(0), steps=4)
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
        return np.zeros((len(labels), 8, 8, 1), np.float32)

    monkeypatch.setattr(cli, "all_devices_mesh", terminal.all_devices_mesh)
    monkeypatch.setattr(cli.sampling, "sample", no_sampling)
    run("sample", w4.folder, "--out", "a.png")
    expected = jax.devices() if jax.device_count() > 1 else None
    assert meshes[0] is expected or meshes[0].devices.tolist() == expected


def test_explicit_noise_is_that_of_the_key(w4, here):
    """Noise by JAX's own functions, as the documentation says that it comes from key, index and step."""
    keys = [jax.random.fold_in(jax.random.key(3), index) for index in range(4)]

    def draw(step):
        return np.stack([jax.random.normal(jax.random.fold_in(key, step), (8, 8, 1)) for key in keys])

    np.savez("noise.npz", noise=draw(0), step_noise=np.stack([draw(step + 1) for step in range(4)]))
    run("sample", w4.folder, "--out", "key.npz", *WALK, "--seed", "3")
    run("sample", w4.folder, "--out", "given.npz", *WALK, "--noise", "noise.npz")
    np.testing.assert_array_equal(np.load("given.npz")["arr_0"], np.load("key.npz")["arr_0"])


def test_latents_are_written_as_floats(here, monkeypatch):
    latents = np.random.default_rng(0).standard_normal((2, 6, 6, 4), np.float32)
    checkpoints.save(helpers.tiny_model(in_channels=4), "latent")
    monkeypatch.setattr(cli.sampling, "sample", lambda *_, **__: latents)
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
    made = ptq.sample(model, labels, jax.random.key(0), steps=2, decoder=ptq.load_vae(VAE))
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
    monkeypatch.setattr(cli.ptq, "quantize", lambda *_, **__: ptq.load(w4.folder))
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
        assert 0 < measured["sqnr_db"] < document["models"]["bfloat16"]["sqnr_db"]
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


# Help and exit status


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    run(command, "--help")
    shown = " ".join(re.sub(r"[│╭╮╰╯─|]", " ", capsys.readouterr().out).split())
    parameters = COMMANDS[command].params
    assert len(parameters) > 1
    for parameter in parameters:
        assert parameter.help, f"{parameter.name} has no help"
        assert " ".join(parameter.help.split()) in shown
        assert all(option in shown for option in parameter.opts if option.startswith("-"))
    assert COMMANDS[command].help in shown


def test_help_of_the_program_names_the_commands(capsys):
    run("--help")
    shown = capsys.readouterr().out
    assert set(COMMANDS) == {"info", "convert", "quantize", "sample", "evaluate"}
    assert all(command in shown for command in COMMANDS)


def test_exit_status_of_the_program(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "ptq4dit_jax.cli", "info", "random:DiT-XXL/2"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"Error: Unknown DiT preset 'DiT-XXL/2'; .*\.\n", done.stderr)


def test_usage_errors_exit_with_2(here, capsys):
    for arguments in (["sample"], ["sample", DIGITS], ["quantize", DIGITS, "--out", "q", "--weight-bits", "x"], ["paint"]):
        assert cli.main(arguments) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert listing(here) == {}


# Mistakes


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Files and folders that commands must refuse, and some that they need; linked into each test's folder."""
    folder = tmp_path_factory.mktemp("inputs")
    model = helpers.tiny_model(in_channels=1)
    bias = np.array(model.params["final"]["bias"])
    bias[1] = np.nan
    checkpoints.save(model, folder / "tiny")
    checkpoints.save(model.replace(params={**model.params, "final": {**model.params["final"], "bias": bias}}), folder / "nan")
    checkpoints.save(helpers.tiny_model(in_channels=4), folder / "latent")
    newer = json.loads((folder / "tiny/config.json").read_text()) | {"version": 2}
    (folder / "newer").mkdir()
    (folder / "newer/config.json").write_text(json.dumps(newer))
    (folder / "empty.npz").touch()
    (folder / "text.npz").write_text("text")
    np.save(folder / "plain.npy", np.zeros(3))
    rows = {"x": np.zeros((4, 8, 8, 1)), "t": np.array([5, 5, 900, 900]), "y": np.array([0, 1, 2, 3])}
    changes = {
        "no_t": {"t": None},
        "pickled": {"x": np.array([Unpickled()], object)},
        "words": {"x": np.array(["a"] * 4)},
        "small": {"x": np.zeros((4, 6, 6, 1))},
        "table": {"t": np.array([[5], [5], [900], [900]])},
        "late": {"t": np.array([5, 5, 1000, 1000])},
        "early": {"t": np.array([-1, -1, 900, 900])},
        "halves": {"t": np.array([5.5, 5.5, 900, 900])},
        "uneven": {"t": np.array([5, 5, 5, 900])},
        "label": {"y": np.array([0, 1, 2, 11])},
        "holes": {"x": np.full((4, 8, 8, 1), np.nan)},
    }
    for name, change in changes.items():
        np.savez(folder / f"rows_{name}.npz", **{k: v for k, v in (rows | change).items() if v is not None})
    np.savez(folder / "noise_shape.npz", noise=np.zeros((2, 8, 8, 1)))
    np.savez(folder / "noise_steps.npz", noise=np.zeros((1, 8, 8, 1)), step_noise=np.zeros((3, 1, 8, 8, 1)))
    np.savez(folder / "noise_words.npz", noise=np.array(["a"]))
    np.savez(folder / "noise_nan.npz", noise=np.full((1, 8, 8, 1), np.nan))
    np.savez(folder / "noise_name.npz", latents=np.zeros((1, 8, 8, 1)))
    np.savez_compressed(folder / "noise_damaged.npz", noise=np.random.default_rng(0).normal(size=(1, 8, 8, 1)))
    damaged = bytearray((folder / "noise_damaged.npz").read_bytes())
    damaged[100:160] = b"\xff" * 60
    (folder / "noise_damaged.npz").write_bytes(damaged)
    return folder


class Unpickled:
    """Tells on whoever unpickles it."""

    def __reduce__(self):
        return warnings.warn, ("unpickled",)


@pytest.fixture
def refused(here, inputs, w4, capsys, monkeypatch):
    """``refused(arguments, *words)``: exit status 1, one sentence with these words on stderr, and the folder as it was.

    ``D`` stands for the digits model, ``Q`` for the quantized one; ``file`` is a file, ``foreign`` somebody's folder. Without
    ``started`` the mistake must be noticed before anything is computed.
    """
    for path in inputs.iterdir():
        Path(path.name).symlink_to(path)
    Path("file").write_text("precious")
    Path("foreign").mkdir()
    Path("foreign/thesis.txt").write_text("precious")
    stands_for = {"D": DIGITS, "Q": str(w4.folder)}

    def check(arguments, *words, started=False):
        before = listing(here)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            if not started:
                for owner, work in ((cli.ptq, "quantize"), (cli.sampling, "sample"), (cli, "compare")):
                    patch.setattr(owner, work, lambda *_, **__: pytest.fail("long work began"))
            status = cli.main(
                [stands_for.get(a, a) for a in (arguments.split(" ") if isinstance(arguments, str) else arguments)]
            )
        error = capsys.readouterr().err
        assert status == 1
        assert re.fullmatch(r"Error: [^\n]+\.\n", error), error
        assert not re.search(r"\.\s+[A-Z]", error), error
        for word in words:
            assert word in error
        assert listing(here) == before

    return check


MODELS = {
    "random:DiT-XXL/2": ("Unknown DiT preset 'DiT-XXL/2'", "DiT-XL/2"),
    "random:DiT-S/2@x": ("must be a number",),
    "random:DiT-S/2@²": ("must be a number",),
    "random:DiT-S/2@7": ("not a multiple of patch_size",),
    "random:DiT-S/2@0": ("input_size must be a positive integer, not 0",),
    "missing": ("missing", "does not exist"),
    "file": ("no checkpoint of a known kind", "torch.save"),
    "foreign": ("holds no model", "config.json"),
    "newer": ("newer ptq4dit_jax (format 2)", "upgrade"),
    "nan": ("nan", "NaN or infinity", "final/bias"),
}


@pytest.mark.parametrize("model", MODELS)
def test_unusable_models(model, refused):
    words = MODELS[model]
    refused(f"info {model}", *words)
    refused(f"quantize {model} --out q", *words)
    refused(f"sample {model} --out new/a.npz", *words)
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
    "--calibration rows_uneven.npz": ("equally many",),
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
    monkeypatch.setattr(sampling, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    monkeypatch.setattr(cli.ptq, "channel_extremes", lambda *_, **__: pytest.fail("long work began"))
    refused(f"quantize D --out new/q {options}", *words, started=True)


def test_quantizing_twice(refused):
    refused("quantize Q --out new/q", "quantized already")


SAMPLE = {
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
    "--batch-size 0": ("batch_size", "not 0"),
    "--seed -1": ("--seed", "not -1"),
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
}


@pytest.mark.parametrize("options", SAMPLE)
def test_mistakes_in_sample(options, refused, monkeypatch):
    monkeypatch.setattr(sampling, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    refused(f"sample D --out new/a.png {options}", *SAMPLE[options], started=True)


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
        ("Q --against D --seed -1", ("--seed",)),
    ],
)
def test_mistakes_in_evaluate(arguments, words, refused, monkeypatch):
    monkeypatch.setattr(sampling, "sample_batch", lambda *_, **__: pytest.fail("long work began"))
    refused(f"evaluate {arguments} --labels 0 --out new/r" if "--labels" not in arguments else f"evaluate {arguments} --out r",
            *words, started=True)  # fmt: skip


# Outputs

OUTPUTS = {"quantize D": "q", "sample D": "a.npz", "evaluate Q --against D": "r"}


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_that_cannot_be_made(command, refused, here):
    name = OUTPUTS[command]
    refused(f"{command} --out file/below/{name}", "file", "not a folder")
    refused(f"{command} --out {'x' * 300 + name}", "name too long")
    Path(name).mkdir()
    Path(name, "thesis.txt").write_text("precious")
    refused(f"{command} --out {name}", f"{name} exists", "--overwrite")
    refused(f"{command} --out {name} --overwrite", name, "another path")


@pytest.mark.parametrize("command", ["quantize D", "evaluate Q --against D"])
def test_files_are_not_replaced_by_folders(command, refused):
    refused(f"{command} --out file", "file exists", "--overwrite")
    refused(f"{command} --out file --overwrite", "file", "another path")


def test_a_report_does_not_replace_a_model_nor_a_model_a_report(refused):
    shutil.copytree(DIGITS, "model")
    Path("report").mkdir()
    Path("report/report.json").write_text("{}")
    refused("evaluate Q --against D --out model --overwrite", "model", "another path")
    refused("quantize D --out report --overwrite", "report", "another path")


@pytest.mark.parametrize("command", [*OUTPUTS, "info D"])
def test_figures_that_cannot_be_written_stop_a_command_before_it_works(command, refused):
    out = f" --out new/{OUTPUTS[command]}" if command in OUTPUTS else ""
    refused(f"{command}{out} --json file/below/x.json", "file", "not a folder")
    refused(f"{command}{out} --json foreign", "foreign", "folder")


@pytest.mark.parametrize("command", OUTPUTS)
def test_folders_without_permission(command, refused):
    Path("locked").mkdir(mode=0o555)
    if os.access("locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    refused(f"{command} --out locked/new/{OUTPUTS[command]}", "locked", "may write")


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_forms_that_samples_are_not_written_in(name, refused):
    refused(f"sample D --out {name}", repr(name), ".png or .npz")


# Interruptions


@pytest.mark.parametrize(
    ("command", "owner", "work"),
    [
        ("quantize D --out new/q", cli.ptq, "sample_trajectories"),
        ("quantize D --out new/q", cli.ptq, "quantize_linear"),
        ("sample D --out new/a.png", sampling, "sample_batch"),
        ("evaluate Q --against D --out new/r", cli, "compare"),
        ("info D --json new/x.json", cli, "_summary"),
    ],
)
def test_control_c_while_working(command, owner, work, here, w4, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if work == "quantize_linear":  # the stages before it are not what is tested
        monkeypatch.setattr(cli.ptq, "quantize", interrupted)
    monkeypatch.setattr(owner, work, interrupted)
    arguments = [{"D": DIGITS, "Q": str(w4.folder)}.get(a, a) for a in command.split()]
    assert cli.main(arguments) not in (0, 1)
    assert "Traceback" not in capsys.readouterr().err
    assert listing(here) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_half_written_stays(error, here, w4, capsys, monkeypatch):
    def begun(file, **_):
        file.write(b"PK half")
        raise error

    monkeypatch.setattr(cli.np, "savez", begun)
    status = cli.main(["sample", str(w4.folder), "--out", "new/a.npz", *WALK])
    message = capsys.readouterr().err
    assert status != 0
    assert "Traceback" not in message
    assert ("No space left" in message) == isinstance(error, OSError)
    assert listing(here) == {}


def test_an_interrupted_save_leaves_the_old_model(here, w4, monkeypatch):
    shutil.copytree(DIGITS, "model", ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.md"))
    before = listing(here)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.ptq, "quantize", lambda *_, **__: ptq.load(w4.folder))
    monkeypatch.setattr(store, "_publish", interrupted)
    assert cli.main(["quantize", DIGITS, "--out", "model", "--overwrite"]) != 0
    assert listing(here) == before


# Inputs from strings


@pytest.mark.parametrize(
    ("text", "repeat", "expected"),
    [("3", 1, [3]), ("0-3", 1, [0, 1, 2, 3]), (" 1, 5-6,1", 1, [1, 5, 6, 1]), ("2,4", 3, [2, 4, 2, 4, 2, 4]), ("7-7", 1, [7])],
)
def test_labels(text, repeat, expected):
    labels = terminal.parse_labels(text, repeat)
    assert labels.dtype == np.int32
    assert labels.tolist() == expected
