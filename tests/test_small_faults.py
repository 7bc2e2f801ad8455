"""Small values, foreign files, other people's references: the right answer, or one line to act on."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fid import Statistics, statistics
from toys import GOLDEN, ROOT, images_of, run, write_folder

import fid
import model
import sample
from checkpoint import build, load_model
from config import Config, read_config
from objective import Objective
from extras.published import clean
from sample import open_pipeline
from sampler import time_grid


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- values -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    "--seed 18446744073709551616", "--seed -1", "--image_size -32", "--grad_clip -1", "--ema .9,.9",
    "--ema 1.5",
    "--cfg_interval .8,.1", "--lr nan", "--gap nan,.1", "--warmdown -1", "--micro_batch -4", "--steps 0",
    "--time_beta 1,1", "--huber inf", "--time_beta nan,1,1"])
def test_values_that_mean_nothing_are_refused(flags):
    with pytest.raises(ValueError) as error:
        read_config(flags.split(), "")
    assert flags.split()[0][2:] in str(error.value) and "\n" not in str(error.value)


def test_nan_is_no_setting_of_an_objective():
    for name in ("zeta", "huber", "dt", "lam"):
        with pytest.raises(ValueError, match=name):
            Objective(**{name: math.nan})


@pytest.mark.parametrize("script, words", [
    ("sample.py", "--seeds 18446744073709551616"), ("sample.py", "--batch_size 0"), ("sample.py", "--num 0"),
    ("sample.py", "--out missing.jpg --num 300000"), ("sample.py", "--recipe mnist"),
    ("fid.py", "--batch_size 0"),
    ("fid.py", "--num 1 --ckpt x"), ("extras/latents.py", "encode --shard 0"),
    ("extras/latents.py", "encode --size 0"),
    ("sample.py", "--cfg_interval 1"), ("fid.py", "--image_size -1 --train")])
def test_small_mistakes_leave_nothing_behind(home, capsys, script, words):
    status, _, err = run(script, *words.split(), capsys=capsys)
    assert status == 2 and len(err.strip().splitlines()) == 1 and not list(home.iterdir())


def test_precision_needs_more_images_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 images"):
        fid.precision_recall(torch.rand(3, 2), torch.rand(30, 2))


def test_home_is_expanded_wherever_a_path_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    config = read_config("--out=~/r --data folder:~/p --vae sd-ema=~/v".split(), "")
    assert (config.out, config.data, config.vae) == ("/home/u/r", "folder:/home/u/p", "sd-ema=/home/u/v")
    assert read_config(["--labels", "a~b"], "").labels == "a~b"


def test_a_recipe_draws_its_own_run(home, capsys):
    """Never the newest run of another recipe."""
    _, _, err = run("sample.py", "--recipe", "shapes-few", capsys=capsys)
    assert "no model at runs/shapes-few" in err


def test_a_network_must_return_what_it_gets_and_have_what_is_asked(monkeypatch):
    """Else a shape would broadcast in silence, and attributes surface one by one."""
    x, z = torch.zeros(2, 2, 3, 4, 4)
    t, y, drop = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"returns \(2, 1, 4, 4\) for x \(2, 3, 4, 4\)"):
        Objective()(lambda x, t, y: x[:, :1], x, y, t, z, drop)
    monkeypatch.setitem(model.MODELS, "bare", lambda **shape: torch.nn.Identity())
    with pytest.raises(ValueError, match="num_classes, in_channels, input_size, patch_size, blocks"):
        build(Config(model="bare"), (3, 8, 8), 4)
    net = torch.nn.Identity()
    net.num_classes, net.in_channels, net.input_size, net.patch_size, net.blocks = 4, 3, 8, 1, []
    monkeypatch.setitem(model.MODELS, "bare", lambda **shape: net)
    assert build(Config(model="bare"), (3, 8, 8), 4) is net
    del net.grad_checkpoint
    with pytest.raises(ValueError, match="has no grad_checkpoint"):
        build(Config(model="bare", grad_checkpoint=True), (3, 8, 8), 4)


def test_a_gap_is_two_numbers():
    for wrong in (dict(gap=0.5), dict(schedule=1.0)):
        with pytest.raises(ValueError, match="must be two numbers"):
            time_grid(4, **wrong)


# ---- foreign files ------------------------------------------------------------------------------------

def test_prefixes_and_strange_keys_of_published_weights(tmp_path):
    """Wrapped in safetensors as in torch.save; a float under "ema", integer keys, {"model": weights}."""
    weights = load_file(GOLDEN / "tit.safetensors")
    wrapped = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    wrapped["projectors.0"] = torch.zeros(1)
    tensors, extras = clean(wrapped, {})
    assert extras["projectors"] and tensors.keys() == {k for k in weights if not k.startswith("feat_rope.")}
    files = ({"model": weights}, {"ema": 0.999, "model": weights}, {**weights, 3: torch.zeros(2)})
    for k, stored in enumerate(files):
        torch.save(stored, tmp_path / f"{k}.pt")
        with pytest.raises(ValueError, match="2 blocks of width 48"):       # read, but of no published size
            load_model(tmp_path / f"{k}.pt")
    torch.save({"ema": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no tensors by name"):
        load_model(tmp_path / "x.pt")


def test_a_table_without_a_null_row_is_said(tmp_path):
    weights = load_file(GOLDEN / "tit.safetensors")
    weights["y_embedder.embedding_table.weight"] = torch.zeros(1000, 48)
    save_file(weights, tmp_path / "x.safetensors")
    import extras.published as published
    sizes = {**published.SIZES, "golden": dict(depth=2, hidden_size=48, num_heads=4)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="none for the null class"):
        patch.setattr(published, "SIZES", sizes)
        load_model(tmp_path / "x.safetensors")


def test_damaged_metadata_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"format": "nanoUCGM 1", "config": "{"})
    with pytest.raises(ValueError, match="x.safetensors has damaged metadata"):
        load_model(tmp_path / "x.safetensors")


# ---- scores -------------------------------------------------------------------------------------------

class Features:
    hash = "mine"


@pytest.mark.parametrize("provenance, named", [
    ({"weights": "other", "resize": "torch-fidelity"}, "weights other, not mine"),
    ({"weights": "mine", "resize": "pytorch-fid"}, "resize pytorch-fid, not torch-fidelity")])
def test_a_reference_of_other_features_is_refused(tmp_path, provenance, named, capsys):
    file = str(tmp_path / "ref.npz")
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3), made=json.dumps(provenance))
    options, features = fid.Options(ref=file), Features()
    with pytest.raises(ValueError, match=named):
        fid.inception_reference(options, features, False)
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3))
    fid.inception_reference(options, features, False)
    assert "does not say" in capsys.readouterr().out


def test_the_inception_score_of_sorted_folders_is_that_of_a_shuffled_set(tmp_path, monkeypatch):
    """12,000 images sorted by class: in the order of the names a chunk of 5,000 knows few of ten classes."""
    names = [f"{k // 1200}/{k:05d}.png" for k in range(12_000)]
    monkeypatch.setattr(fid, "find_images", lambda path: (names, {}))
    monkeypatch.setattr(fid, "read_rgb", lambda name, on_white: np.full((2, 2, 3), int(name[0]), np.uint8))
    result = Statistics()
    for first, x in fid.stored_images(f"folder:{tmp_path}", 500):
        scores = torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 10) * 1000.0
        result.add(first, {"pool": scores[:, :2], "scores": scores})
    assert result.inception_score == pytest.approx(10, rel=0.01)
    in_order = statistics(torch.eye(10).repeat_interleave(1200, 0) * 1000.0, 500)
    assert in_order.inception_score < 6


def test_a_colon_in_a_path_is_kept(tmp_path):
    folder = tmp_path / "run_12:30"
    folder.mkdir()
    np.savez(folder / "s.npz", arr_0=images_of(8, 0, 4))
    assert next(fid.stored_images(str(folder / "s.npz"), 9))[1].shape == (4, 3, 8, 8)
    write_folder(folder / "a:b", images_of(8, 0, 4))
    assert next(fid.stored_images(f"folder:{folder / 'a:b'}", 9))[1].shape == (4, 3, 8, 8)




# ---- before anything is drawn, and on other systems ---------------------------------------------------

@pytest.mark.parametrize("flags, named", [
    ("--out file/x.png", "file"), ("--out x.webp --num 2400", "samples.npz"), ("--out x.txt", "must end")])
def test_what_cannot_be_written_is_said_before_drawing(home, capsys, monkeypatch, flags, named):
    """Root may write anywhere, so the folder in the way is a file."""
    (home / "file").touch()
    monkeypatch.setattr("sampler.sample", None)
    status, _, err = run("sample.py", *flags.split(), capsys=capsys)
    assert status == 2 and named in err and err.count("\n") == 1


def test_a_system_without_unix_signals_and_resource(home):
    """Windows has neither: everything is imported, and the memory is not known. macOS counts bytes."""
    code = """if True:
        import signal, sys, types
        sys.modules["resource"] = None
        del signal.SIGUSR1
        import torch, train, sample, fid, log, extras.latents
        assert log.peak_memory(torch.device("cpu")) == 0 and train.Signals(None)
        usage = types.SimpleNamespace(ru_maxrss=3 * 2**30)
        sys.modules["resource"] = types.SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0)
        sys.platform = "darwin"
        assert log.peak_memory(torch.device("cpu")) == 3"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_processes_agree_on_the_precision(monkeypatch):
    """The try of process 0 decides; another process does not even make one."""
    asked = []
    monkeypatch.setattr(sample, "pick_dtype", lambda *given: asked.append(given) or torch.bfloat16)
    monkeypatch.setattr(sample, "from_rank0", lambda make, group: torch.float32)
    model = open_pipeline(ROOT / "assets/shapes-few.safetensors", torch.device("cpu"))
    assert model.dtype == torch.float32 and not asked
