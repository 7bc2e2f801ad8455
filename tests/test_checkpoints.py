"""Published checkpoints in each publisher's dictionary, the hub through a local stand-in, UCGM-S on a diffusers model, drawing at scale."""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import model
from checkpoint import load_model
from config import RECIPES, Config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(autouse=True)
def golden_size(monkeypatch):
    """The golden networks' size, so that the number of heads is known: it cannot be told from weights."""
    monkeypatch.setitem(model.SIZES, "golden", dict(depth=2, hidden_size=48, num_heads=4))


def wrapped(kind, tensors):
    """A golden state dict in the dictionary of its publisher."""
    other = {name: torch.zeros_like(value) for name, value in tensors.items()}
    projector = {"projectors.0.0.weight": torch.zeros(3, 48), "projectors.0.0.bias": torch.zeros(3)}
    args = argparse.Namespace(model="SiT-XL/2", legacy=False, lr=1e-4, exp_name="x")
    add = lambda prefix, names: {prefix + name: value for name, value in names.items()}
    return {"ucgm": {"model": other, "ema": add("module._orig_mod.", tensors), "opt": {"state": {}}, "unigen": {"x": other}, "config": {"lr": 1e-4}},
            "repa": {"model": other, "ema": {**tensors, **projector}, "opt": {}, "args": args, "steps": 400000},
            "repa-e": {"model": add("module.", other), "ema": add("module.", {**tensors, **projector}), "opt": {}, "args": args, "steps": 1},
            "sit": {"model": other, "ema": tensors, "opt": {}, "args": args}, "lightningdit": {"model": other, "ema": add("module.", tensors), "opt": {}, "config": {}},
            "raw": tensors}[kind]


@pytest.mark.parametrize("golden, kind, transport", [
    ("tit", "ucgm", "linear"), ("tit", "raw", "linear"), ("sit", "repa", "linear"), ("sit", "repa-e", "linear"), ("sit", "raw", "linear"),
    ("sit_learn_sigma", "sit", "relinear"), ("lightningdit", "lightningdit", "relinear"), ("lightningdit", "raw", "relinear")])
@pytest.mark.parametrize("old_zip", [False, True])
def test_published_dictionaries_give_the_golden_outputs(tmp_path, golden, kind, transport, old_zip):
    tensors, numbers = load_file(GOLDEN / f"{golden}.safetensors"), np.load(GOLDEN / "models.npz")
    torch.save(wrapped(kind, tensors), tmp_path / "0400000.pt", _use_new_zipfile_serialization=not old_zip)
    net, config, names = load_model(tmp_path / "0400000.pt")
    assert config.transport == transport and len(names) == 10
    with torch.no_grad():
        assert_close(net(*(torch.from_numpy(numbers[name]) for name in ("x", "t", "y"))), torch.from_numpy(numbers[f"{golden}_out"]), rtol=0, atol=1e-6)


def test_ddt_gives_the_golden_output(tmp_path, monkeypatch):
    """2 of 3 blocks encode; its file holds neither positions nor size, so the recipe's size is taken."""
    numbers = np.load(GOLDEN / "models.npz")
    monkeypatch.setitem(model.SIZES, "golden3", dict(depth=3, hidden_size=48, num_heads=4))
    monkeypatch.setitem(model.ENCODER, "golden3", 2)
    monkeypatch.setitem(RECIPES, "ddt", {**RECIPES["ddt"], "model": "DDT-golden3/2", "image_size": 64})
    weights = load_file(GOLDEN / "ddt.safetensors")
    torch.save({"state_dict": {f"{part}{name}": value * (part == "ema_denoiser.") for part in ("denoiser.", "ema_denoiser.") for name, value in weights.items()}},
               tmp_path / "ddt.ckpt")      # Lightning's, as published
    net, config, _ = load_model(tmp_path / "ddt.ckpt", recipe="ddt")
    assert config.transport == "relinear"
    with torch.no_grad():
        assert_close(net(*(torch.from_numpy(numbers[name]) for name in ("x", "t", "y"))), torch.from_numpy(numbers["ddt_out"]), rtol=0, atol=1e-6)


def test_what_cannot_be_told_is_asked(tmp_path, monkeypatch):
    """DiT's raw files and SiT's are alike: a recipe says which. Wrong recipes, unknown names, missing names, pickles: one clear error."""
    tensors = load_file(GOLDEN / "sit_learn_sigma.safetensors")
    path = tmp_path / "x.pt"
    torch.save(tensors, path)
    with pytest.raises(ValueError, match="--recipe dit or --recipe sit"):
        load_model(path)
    for recipe, transport in (("dit", "ddpm"), ("sit", "relinear")):
        monkeypatch.setitem(RECIPES[recipe], "model", RECIPES[recipe]["model"].split("-")[0] + "-golden/2")
        assert load_model(path, recipe=recipe)[1].transport == transport
    with pytest.raises(ValueError, match="recipe in256-sd is for TiT-XL/2"):
        load_model(GOLDEN / "sit.safetensors", recipe="in256-sd")
    torch.save({**tensors, "extra.weight": torch.zeros(1)} | {"blocks.1.mlp.fc1.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="extra.weight.*size mismatch.*fc1.bias"):
        load_model(path, recipe="sit")
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="it lacks x_embedder.proj.weight"):
        load_model(path)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)
    torch.save({"ema": tensors, "args": Evil()}, path)
    with pytest.raises(ValueError, match="read safely"):
        load_model(path)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(b"PK\x03\x04" + b"\0" * 50)
    with pytest.raises(ValueError, match="read safely"):
        load_model(path)


def test_published_rows_are_the_published_settings():
    """Every recipe is a valid Config with an objective and a sampler; a few numbers of the paper, by hand."""
    for name, row in RECIPES.items():
        config = Config(**row)
        config.objective()
        config.sampler()
        assert config.model in model.MODELS, name
    row = Config(**RECIPES["in512-dcae"])
    assert (row.enhancement_ratio, row.steps, row.sample_steps, row.extrapolation, row.betas, row.lr) == (0.57, 1_000_000, 40, 0.46, (0.9, 0.95), 2e-4)
    row = Config(**RECIPES["tune-repae"])
    assert (row.enhancement_style, row.enhancement_ratio, row.steps, row.huber, row.clip, row.ema, row.gap) == ("fc-vs-fe", 2.5, 500, 5.0, 0.1, (0.99,), (0.001, 0.75))


# ---- the hub ------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """The endpoints of the hub that huggingface_hub uses: create a repository, commit files, read them back."""
    files, broken = {}, set()

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid user token."}, 401)
        if self.path.endswith("/repos/create"):
            return self.answer({"url": f"http://{self.headers['Host']}/user/repo", "id": "user/repo", "name": "user/repo"})
        if self.path.endswith("/preupload/main"):
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if self.path.endswith("/commit/main"):
            import base64
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"http://{self.headers['Host']}/user/repo/commit/{'a' * 40}", "commitOid": "a" * 40, "pullRequestUrl": None})
        if "validate-yaml" in self.path:
            return self.answer({"errors": [], "warnings": []})
        self.answer({"error": "no"}, 404)

    def do_GET(self):
        if "/resolve/" in self.path:
            name = self.path.split("/resolve/")[1].partition("/")[2]
            if name not in self.files:
                return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit="a" * 40)
            body = self.files[name]
            tags = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": "a" * 40, "Accept_Ranges": "bytes"}
            if self.command == "GET" and name in self.broken:        # promise all, send half, hang up
                self.send_response(200)
                for key, value in {**tags, "Content_Length": len(body)}.items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2])
                self.close_connection = True
                return None
            start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
            if start:
                return self.answer(body[start:], 206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}", **tags)
            return self.answer(body, **tags)
        if self.path.startswith("/api/models/user/repo"):
            return self.answer({"id": "user/repo", "sha": "a" * 40, "siblings": [{"rfilename": n, "size": len(b)} for n, b in self.files.items()]})
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(tmp_path):
    Hub.files, Hub.broken = {}, set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"),
           "HF_TOKEN": "hf_test", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()


@pytest.mark.slow
def test_push_and_read_back(tmp_path, hub):
    """sample.py --push, then --ckpt hf://: the same weights, the same picture. A missing file, a broken download, no token: one line each."""
    draw = lambda *words, env=hub: subprocess.run([sys.executable, "sample.py", "--num", "4", "--steps", "2", "--device", "cpu", *words], cwd=ROOT,
                                                  env=env, capture_output=True, text=True)
    first = draw("--ckpt", "assets/shapes-few.safetensors", "--push", "user/repo", "--out", str(tmp_path / "a.png"))
    assert first.returncode == 0 and "pushed to user/repo" in first.stdout, first.stdout + first.stderr
    assert {"model.safetensors", "config.json", "README.md", "samples.png"} <= Hub.files.keys()
    card = Hub.files["README.md"].decode()
    assert "python sample.py --ckpt hf://user/repo --steps 2" in card and "samples.png" in card and json.loads(Hub.files["config.json"])["model"] == "TiT-XXS/8"
    missing = draw("--ckpt", "hf://user/repo/other.safetensors")
    assert missing.returncode == 2 and missing.stderr.strip().count("\n") == 0 and "the hub does not give hf://user/repo/other" in missing.stderr, missing.stderr
    Hub.broken.add("model.safetensors")
    half = draw("--ckpt", "hf://user/repo", "--out", str(tmp_path / "b.png"))
    assert half.returncode == 2 and "the hub does not give" in half.stderr.splitlines()[-1] and not (tmp_path / "b.png").exists(), half.stderr
    Hub.broken.clear()
    again = draw("--ckpt", "hf://user/repo", "--out", str(tmp_path / "b.png"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    refused = draw("--ckpt", "assets/shapes-few.safetensors", "--push", "user/repo", "--out", str(tmp_path / "c.png"), env={**hub, "HF_TOKEN": "hf_wrong"})
    assert refused.returncode == 2 and "the hub did not take user/repo" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr


def test_fetch_names_what_is_missing(tmp_path, hub):
    run = subprocess.run([sys.executable, "latents.py", "fetch", "in256-sd"], cwd=ROOT, env=hub, capture_output=True, text=True)
    assert run.returncode == 2 and "the hub does not give stabilityai/sd-vae-ft-ema" in run.stderr, run.stdout + run.stderr
    run = subprocess.run([sys.executable, "latents.py", "fetch", "shapes"], cwd=ROOT, env=hub, capture_output=True, text=True)
    assert run.returncode == 2 and "needs nothing from the hub" in run.stderr


def test_fetch_brings_files_into_the_cache(tmp_path, hub):
    """The whole of fetch against the stand-in, with its one repository in place of the published ones; a second call downloads nothing."""
    Hub.files = {"a.pt": b"x" * 3000, "config.json": b"{}", "buffers/refs/in1k256_fid_ref.npz": b"y" * 2000, "other.txt": b"no"}
    code = ("import latents, config; k = latents.AUTOENCODERS['sd-ema']; latents.AUTOENCODERS['sd-ema'] = k._replace(home='user/repo');"
            "latents.UCGM = 'user/repo'; config.PUBLISHED['in256-sd'] = None; latents.fetch('in256-sd')")
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=hub, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "in1k256_fid_ref.npz" in run.stdout and "other.txt" not in run.stdout and "image-net.org" in run.stdout
        assert len([p for p in (tmp_path / "hf").rglob("*") if p.name in ("a.pt", "config.json", "in1k256_fid_ref.npz")]) == 3
        Hub.broken |= set(Hub.files)


# ---- UCGM-S on anything -------------------------------------------------------------------------------------------

def test_a_diffusers_dit_with_kappa_0_is_ddim():
    """The wrapper of experiments/accelerate.py, random weights, against diffusers' own DDIM loop."""
    diffusers = pytest.importorskip("diffusers")
    from experiments.accelerate import dit
    from sampler import sample
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
                                                  num_embeds_ada_norm=10).eval()
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", beta_schedule="linear")
    scheduler.set_timesteps(20)
    z, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 5, 9])
    x = z.clone()
    with torch.no_grad():
        for k in scheduler.timesteps:
            epsilon = transformer(x, timestep=k.expand(3), class_labels=y).sample[:, :4]
            x = scheduler.step(epsilon, k, x).prev_sample
    ours = sample(dit(transformer), z, y, "ddpm", steps=20, gap=(1 / 20 - 0.001, 0.001))
    assert (ours - x).abs().max() <= 1e-4 * x.abs().max()


# ---- many pictures ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_processes_draw_the_same_file_and_a_killed_run_goes_on(tmp_path):
    one = [sys.executable, "sample.py"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "sample.py"]
    flags = ["--ckpt", "assets/shapes-few.safetensors", "--steps", "2", "--num", "1000", "--batch_size", "64", "--device", "cpu", "--dtype", "float32", "--out"]
    start = lambda launch, out: subprocess.Popen([*launch, *flags, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    for launch, name in ((one, "one.npz"), (two, "two.npz")):
        run = start(launch, tmp_path / name)
        assert run.wait(timeout=300) == 0, run.stderr.read()[-1500:]
    assert np.load(tmp_path / "one.npz")["arr_0"].shape == (1000, 32, 32, 3)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    run = start(one, tmp_path / "three.npz")
    parts = lambda: [p for d in tmp_path.glob("three.npz.parts-*") for p in d.glob("*.npz")]
    while run.poll() is None and len(parts()) < 5:
        time.sleep(0.01)
    assert run.poll() is None
    run.kill()
    run.wait()
    assert len(parts()) >= 5 and not (tmp_path / "three.npz").exists()
    assert start(two, tmp_path / "three.npz").wait(timeout=300) == 0
    assert (tmp_path / "three.npz").read_bytes() == (tmp_path / "one.npz").read_bytes() and not parts()
