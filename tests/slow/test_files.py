"""Files written by many processes, despite kills, or read from the hub: latents, arrays of images, models."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from standins import Hub, hub, make_images, small_dc, small_kl
from toys import ROOT, script_command

from checkpoint import load_model
from config import Config
from extras.latents import open_latents

pytestmark = pytest.mark.slow
TORCHRUN_2 = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(script, *words, processes=1):
    """A script in a process, and a group of processes, of its own."""
    python, *module, script = script_command(script)
    launch = [python, *([*TORCHRUN_2, *module, "--"] if processes == 2 else module), script]
    return subprocess.Popen([*launch, *map(str, words)], cwd=ROOT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process):
    """Its output, when it has ended well."""
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out[-2000:]
    return out


def kill_when(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it was killed"
    os.killpg(process.pid, 9)
    process.communicate()


# ---- latents ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("vaes")
    small_kl().save_pretrained(root / "kl")
    small_dc().save_pretrained(root / "dc")
    return {"sd-ema": f"sd-ema={root / 'kl'}", "dc-ae": f"dc-ae={root / 'dc'}"}


def encode(root, vae, out, processes=1):
    return start("extras/latents.py", "encode", "--data", f"folder:{root}", "--vae", vae, "--size", 32,
                 "--out", out, "--shard", 20, "--batch_size", 5, "--workers", 0, "--device", "cpu",
                 processes=processes)


def files_of(out):
    return {path.name: path.read_bytes() for path in sorted(Path(out).iterdir())}


@pytest.mark.parametrize("name, kills", [("sd-ema", 5), ("dc-ae", 2)])
def test_encoding_survives_being_killed(tmp_path, vaes, name, kills):
    """300 images, killed with -9 on the way: every good one once, bytes as in an undisturbed run, on one
    process and on two."""
    root = make_images(tmp_path / "images", 300)
    text = finish(encode(root, vaes[name], tmp_path / "calm"))
    assert "298 images encoded, 2 unreadable" in text and "0008.jpg" in text and "0040.jpg" in text
    expected = files_of(tmp_path / "calm")
    shards = json.loads(expected["manifest.json"])["shards"].values()
    names = [name for shard in shards for name in shard["pictures"]]
    assert len(names) == len(set(names)) == 298
    assert {"class1/0007.png", "class2/0005.jpg", "class0/0006.jpg"} <= set(names)
    finish(encode(root, vaes[name], tmp_path / "two", processes=2))
    assert files_of(tmp_path / "two") == expected
    out = tmp_path / "killed"
    for kill in range(kills):
        kill_when(lambda least=2 * kill + 2: len(list(out.glob("*.safetensors"))) >= least,
                  encode(root, vaes[name], out))
    finish(encode(root, vaes[name], out))
    assert files_of(out) == expected


def test_train_tune_and_draw_on_latents(tmp_path, vaes):
    """20 steps many-step, 20 steps few-step, decoded images, all by the commands of the README."""
    root, vae = make_images(tmp_path / "images", 120), vaes["dc-ae"]
    finish(encode(root, vae, tmp_path / "latents"))
    common = ["--model", "TiT-XXS/1", "--data", f"latents:{tmp_path / 'latents'}", "--vae", vae,
              "--steps", 20, "--batch_size", 16, "--no-compile", "--device", "cpu", "--sample_steps", 2]
    finish(start("train.py", "--recipe", "in256-vavae", *common, "--out", tmp_path / "many"))
    finish(start("train.py", "--recipe", "in256-vavae-few", *common, "--init_from", tmp_path / "many",
                 "--out", tmp_path / "few"))
    finish(start("sample.py", "--ckpt", tmp_path / "few", "--num", 9, "--out", tmp_path / "nine.png"))
    assert Image.open(tmp_path / "nine.png").size == (8 * 68 - 4, 2 * 68 - 4)
    assert Image.open(tmp_path / "many/grid_0000020.png").size == (3 * 68 - 4, 18 + 8 * 68 - 4)
    config = load_model(tmp_path / "few")[1]
    assert isinstance(config, Config) and len(config.latent_mean) == 8 and config.vae == vae


def test_reading_is_fast(tmp_path):
    """20,000 latents of 32x16x16 a second from the page cache, in one of three tries."""
    for k in range(8):
        rows = torch.randn(500, 32, 16, 16)
        flipped, labels = rows.flip(-1).contiguous(), torch.arange(500)
        save_file({"latents": rows, "latents_flip": flipped, "labels": labels},
                  tmp_path / f"latents_rank{k:02d}_shard000.safetensors")
    stats = {"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}
    torch.save(stats, tmp_path / "latents_stats.pt")
    data, best = open_latents(tmp_path, 0, "vavae"), 0
    data[np.arange(4000)]
    for _ in range(3):
        begin = time.perf_counter()
        for first in range(0, 8192, 1024):
            data[first + np.arange(1024)]
        best = max(best, 8192 / (time.perf_counter() - begin))
    assert best > 20_000, f"{best:.0f} latents/s"


# ---- images -------------------------------------------------------------------------------------------

def test_two_processes_draw_the_same_file_and_a_killed_run_goes_on(tmp_path):
    def draw(name, processes):
        return start("sample.py", "--ckpt", "assets/shapes-few.safetensors", "--steps", 2, "--num", 1000,
                     "--batch_size", 64, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / name,
                     processes=processes)

    def parts():
        return [path for folder in tmp_path.glob("three.npz.parts-*") for path in folder.glob("*.npz")]
    finish(draw("one.npz", 1))
    finish(draw("two.npz", 2))
    expected = (tmp_path / "one.npz").read_bytes()
    assert np.load(tmp_path / "one.npz")["arr_0"].shape == (1000, 32, 32, 3)
    assert (tmp_path / "two.npz").read_bytes() == expected
    kill_when(lambda: len(parts()) >= 5, draw("three.npz", 1))
    assert len(parts()) >= 5 and not (tmp_path / "three.npz").exists()
    finish(draw("three.npz", 2))
    assert (tmp_path / "three.npz").read_bytes() == expected and not parts()


# ---- the hub ------------------------------------------------------------------------------------------

def test_a_model_is_read_from_the_hub(tmp_path):
    """--ckpt hf:// draws the page of the same file. A missing file or a broken download is one line each, and
    a broken download is resumed."""
    with hub(tmp_path / "hf") as environment:
        def draw(name, ckpt):
            flags = ["--num", "4", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / name)]
            return subprocess.run([sys.executable, "sample.py", *flags, "--ckpt", ckpt], cwd=ROOT, text=True,
                                  env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True)

        def assert_refused(done, named):
            *progress, last = done.stderr.strip().splitlines()
            assert done.returncode == 2 and last.startswith("error: ") and named in last, done.stderr
            assert "Traceback" not in done.stderr
        Hub.files = {"model.safetensors": (ROOT / "assets/shapes-few.safetensors").read_bytes()}
        first = draw("a.png", "assets/shapes-few.safetensors")
        assert first.returncode == 0, first.stderr
        assert_refused(draw("b.png", "hf://user/repo/other.safetensors"), "hf://user/repo/other")
        Hub.broken.add("model.safetensors")
        assert_refused(draw("b.png", "hf://user/repo"), "hf://user/repo")
        assert not (tmp_path / "b.png").exists()
        Hub.broken.clear()
        again = draw("b.png", "hf://user/repo")
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
