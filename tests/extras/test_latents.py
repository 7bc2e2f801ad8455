"""Latents: encoded folders and their streams, the autoencoders of diffusers, and what fetch downloads."""
import argparse
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from standins import COMMIT, Hub, hub, make_images, small_dc, small_kl, to_ldm, write_shards
from torch.testing import assert_close
from toys import ROOT

import extras.latents as latents
from extras.latents import Autoencoder, centre_crop, from_ldm, normalisation, open_latents


# ---- folders ------------------------------------------------------------------------------------------

class Halves:
    """An autoencoder to check by hand: 8 times smaller, by means; its posterior has the deviation 2."""
    config = None

    def encode(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 8)
        posterior = argparse.Namespace(mean=mean, std=torch.full_like(mean, 2.0))
        return argparse.Namespace(latent_dist=posterior)

    def to(self, device):
        return self

    def state_dict(self):
        return {}


def test_an_encoded_folder_and_its_stream(tmp_path, monkeypatch):
    """Every readable image is there once, and once mirrored: the posterior's mean + deviation * noise, which
    is that of its number. The statistics are those of both. The stream gives each image once an epoch, about
    half of them mirrored."""
    monkeypatch.setattr(latents, "load_autoencoder", lambda name: (latents.AUTOENCODERS[name], Halves()))
    root, out = make_images(tmp_path / "images", 46), tmp_path / "out"
    latents.encode(latents.Options(data=f"folder:{root}", vae="e2e-vavae", size=32, out=str(out), shard=20,
                                   batch_size=5, workers=0, device="cpu"))
    shards = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    assert sum(len(shard["labels"]) for shard in shards) == 44
    paths = sorted(root.glob("*/*"))
    numbers = [k for k, path in enumerate(paths) if path.name not in ("0008.jpg", "0040.jpg")]
    assert len(numbers) == 44
    for side, name in enumerate(("latents", "latents_flip")):
        images = [np.asarray(centre_crop(latents.read_rgb(paths[k]), 32)) for k in numbers]
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        noise = latents.noise_like_seed(numbers, (3, 4, 4), side)
        expected = torch.nn.functional.avg_pool2d(x.flip(-1) if side else x, 8) + 2 * noise
        assert_close(torch.cat([shard[name] for shard in shards]), expected)
    labels = torch.cat([shard["labels"] for shard in shards])
    assert labels.tolist() == [int(paths[k].parent.name[-1]) for k in numbers]

    # a key of this form is in folders that were encoded long ago: with another, all would be encoded again
    files = [[f"{p.parent.name}/{p.name}", p.stat().st_size, p.stat().st_mtime_ns] for p in paths[:20]]
    key = hashlib.sha256(json.dumps([files, ["class0", "class1", "class2"], []]).encode()).hexdigest()[:16]
    assert latents.map_shard(sorted(out.glob("*.safetensors"))[0])[1]["files"] == key

    rows = torch.cat([shard[name] for shard in shards for name in ("latents", "latents_flip")]).double()
    stats = torch.load(out / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == (1, 3, 1, 1)
    assert_close(stats["mean"].flatten(), rows.mean((0, 2, 3)).float(), rtol=1e-5, atol=1e-6)
    assert_close(stats["std"].flatten(), rows.std((0, 2, 3), correction=0).float(), rtol=1e-5, atol=1e-6)

    data = open_latents(out, 3)
    assert len(data) == 44 and data.shape == (3, 4, 4) and data.names == ["class0", "class1", "class2"]
    assert data.latent[0] == "e2e-vavae"
    x, y = data[np.arange(44)]
    sides = [(torch.cat([shard[name] for shard in shards]) - stats["mean"]) / stats["std"]
             for name in ("latents", "latents_flip")]
    found = [(k, side) for row in x for side in (0, 1) for k in range(44) if torch.equal(sides[side][k], row)]
    assert sorted(k for k, _ in found) == list(range(44)) and 8 <= sum(side for _, side in found) <= 36
    assert [labels[k] for k, _ in found] == y.tolist()
    assert torch.equal(open_latents(out, 3)[np.arange(100, 120)][0], data[np.arange(100, 120)][0])

    # equal labels are not the same run: the first latent of a shard is part of its identity
    path = min(out.glob("*.safetensors"))
    shard, before = load_file(path), data.fingerprint
    assert open_latents(out, 3).fingerprint == before
    shard["latents"][0] += 1
    save_file(shard, path)
    assert open_latents(out, 3).fingerprint != before

    strict = latents.Options(data=f"folder:{root}", vae="e2e-vavae", size=32, out=str(tmp_path / "strict"),
                             max_unreadable=0, workers=0, device="cpu")
    with pytest.raises(ValueError, match="max_unreadable"):
        latents.encode(strict)
    with pytest.raises(ValueError, match="was encoded with"):
        latents.encode(latents.Options(**{**vars(strict), "out": str(out), "size": 64, "shard": 20}))


def test_a_folder_that_has_changed_is_encoded_again_where_it_has(tmp_path, monkeypatch):
    """A damaged image replaced: its shard alone is made anew. Images gone: their shards too. Other classes or
    another autoencoder: refused."""
    net = Halves()
    monkeypatch.setattr(latents, "load_autoencoder", lambda name: (latents.AUTOENCODERS[name], net))
    root, out = make_images(tmp_path / "images", 46), tmp_path / "out"
    options = latents.Options(data=f"folder:{root}", vae="e2e-vavae", size=32, out=str(out), shard=20,
                              workers=0, device="cpu")

    def encode():
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        latents.encode(options)
        return sorted(int(path.name[-15:-12]) for path in out.glob("*.safetensors")
                      if before.get(path.name) != path.stat().st_mtime_ns)
    assert encode() == [0, 1, 2]
    damaged = sorted(root.glob("*/0008.jpg")) + sorted(root.glob("*/0040.jpg"))
    with_bad = encode()                         # what could not be read is tried again
    for path in damaged:
        Image.new("RGB", (40, 40)).save(path)
    assert encode() == with_bad and len(open_latents(out, 0)) == 46 and encode() == []
    for path in sorted(root.glob("class2/*"))[5:]:
        path.unlink()
    stale = (out / "latents_rank00_shard002.safetensors").read_bytes()
    (out / "latents_rank00_shard007.safetensors").write_bytes(stale)
    encode()
    assert len(list(out.glob("*.safetensors"))) == 2 and len(open_latents(out, 0)) == 46 - 10
    monkeypatch.setattr(Halves, "state_dict", lambda self: {"w": torch.ones(3)})
    with pytest.raises(ValueError, match="encoded with weights"):
        encode()
    monkeypatch.undo()
    monkeypatch.setattr(latents, "load_autoencoder", lambda name: (latents.AUTOENCODERS[name], net))
    (root / "class0").rename(root / "other")
    with pytest.raises(ValueError, match="encoded with classes"):
        encode()


def test_published_shards_are_read(tmp_path):
    """sd-ema: times 0.18215, statistics or not; vavae: (latent - mean) / std."""
    values = write_shards(tmp_path / "l", 3, 10, (4, 8, 8))
    with pytest.raises(ValueError, match="give --vae"):
        open_latents(tmp_path / "l", 0)
    for vae, plain in (("sd-ema", values * 0.18215), ("vavae", (values - 1) / 2)):
        data = open_latents(tmp_path / "l", 0, vae)
        x, y = data[np.arange(30)]
        found = [k for row in x for k in range(30)
                 if torch.allclose(row, plain[k]) or torch.allclose(row, plain[k].flip(-1))]
        assert sorted(found) == list(range(30)) and [k % 10 for k in found] == y.tolist()
        assert len(data.names) == 1000 and data.latent[0] == vae
    assert data.latent == ("vavae", (1.0,) * 4, (2.0,) * 4)
    assert open_latents(tmp_path / "l", 0, "sd-ema").latent[2] == pytest.approx((1 / 0.18215,) * 4)


def test_what_is_wrong_with_a_folder_of_latents(tmp_path):
    """Another autoencoder, no statistics, other files, damaged ones, shapes that differ, nothing at all."""
    folder = tmp_path / "l"
    write_shards(folder, 2, 10, (4, 8, 8))
    manifest, stray = folder / "manifest.json", folder / "a.safetensors"

    def assert_refused(words):
        with pytest.raises(ValueError, match=words):
            open_latents(folder, 0, "vavae")
    manifest.write_text('{"vae": "sd-ema=somewhere"}')
    assert_refused("sd-ema")
    manifest.unlink()
    (folder / "latents_stats.pt").rename(tmp_path / "stats.pt")
    assert_refused("statistics")
    (tmp_path / "stats.pt").rename(folder / "latents_stats.pt")
    save_file({"x": torch.zeros(1)}, stray)
    assert_refused("no shards")
    stray.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    assert_refused("a.safetensors")
    other = torch.zeros(2, 3, 8, 8)
    save_file({"latents": other, "latents_flip": other.clone(), "labels": torch.zeros(2)}, stray)
    assert_refused("differ in shape")
    stray.unlink()
    cut = sorted(folder.glob("latents_*"))[0]
    os.truncate(cut, 3000)
    assert_refused(cut.name)
    with pytest.raises(ValueError, match="no shards"):
        open_latents(tmp_path, 0, "vavae")


def test_the_centre_crop():
    """As ADM has it: the mean of 2x2 boxes where sizes halve (Pillow rounds twice: within 1), the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    boxed = pixels.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(np.asarray(centre_crop(Image.fromarray(pixels), 32)) - boxed).max() <= 1
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert np.asarray(centre_crop(Image.fromarray(wide), 32)).min() == 255
    assert centre_crop(Image.new("RGB", (1, 5000)), 64).size == (64, 64)


@pytest.mark.parametrize("size, box", [((48, 32), (8, 0)), ((32, 50), (0, 9)), ((47, 32), (7, 0))])
def test_the_place_of_the_crop(size, box):
    """Pillow's own crop, pixel by pixel: the middle, and of an odd rest the smaller half."""
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    left, top = box
    expected = Image.fromarray(pixels).crop((left, top, left + 32, top + 32))
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 32)), np.asarray(expected))


def test_each_autoencoder_by_name():
    """Where it lies, what reads it, and what its latents are multiplied by (0: mean and deviation)."""
    assert {name: tuple(source) for name, source in latents.AUTOENCODERS.items()} == {
        "sd-ema": ("AutoencoderKL", "stabilityai/sd-vae-ft-ema", 0.18215),
        "sd-mse": ("AutoencoderKL", "stabilityai/sd-vae-ft-mse", 0.18215),
        "e2e-vavae": ("AutoencoderKL", "REPA-E/e2e-vavae-hf", 0),
        "vavae": ("ldm", "hustvl/vavae-imagenet256-f16d32-dinov2", 0),
        "dc-ae": ("AutoencoderDC", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 0)}


# ---- autoencoders -------------------------------------------------------------------------------------

def test_autoencoders_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'sd'"):
        Autoencoder("sd")
    with pytest.raises(ValueError, match="statistics"):
        normalisation("vavae", {})
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install diffusers"):
        Autoencoder("sd-ema")
    monkeypatch.undo()
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="sd-ema=PATH"):
        Autoencoder(f"sd-ema={tmp_path}")


def test_encode_and_decode_are_diffusers(tmp_path):
    """A latent is a sample of diffusers' posterior, and decode undoes the normalisation."""
    pytest.importorskip("diffusers")
    kl, dc = small_kl(), small_dc()
    kl.save_pretrained(tmp_path / "kl")
    dc.save_pretrained(tmp_path / "dc")
    ours = Autoencoder(f"sd-ema={tmp_path / 'kl'}")
    x, z = torch.rand(5, 3, 16, 16) * 2 - 1, torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        posterior, decoded = kl.encode(x).latent_dist, kl.decode(z).sample.clamp(-1, 1)
    assert_close(ours.encode(x, lambda shape: z), posterior.mean + posterior.std * z)
    assert_close(ours.decode(z * 0.18215, at_once=2), decoded, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="latents_stats.pt"):
        Autoencoder(f"dc-ae={tmp_path / 'dc'}")
    stats = {"mean": torch.ones(1, 8, 1, 1), "std": torch.full((1, 8, 1, 1), 2.0)}
    torch.save(stats, tmp_path / "dc/latents_stats.pt")
    found = Autoencoder(f"dc-ae={tmp_path / 'dc'}")
    given = Autoencoder(f"dc-ae={tmp_path / 'dc'}", mean=(3.0,) * 8, std=(0.5,) * 8)
    z = torch.randn(5, 8, 4, 4)
    with torch.no_grad():
        encoded, decoded = dc.encode(x).latent, dc.decode(z).sample.clamp(-1, 1)
    assert_close(found.encode(x, None), encoded)
    assert_close(found.decode((z - 1) / 2), decoded)
    assert_close(given.decode((z - 3) / 0.5), decoded)


@pytest.mark.parametrize("ends", [("", ""), ("", "Attn")])
def test_the_names_of_latent_diffusion(ends):
    """By outputs, and name by name against diffusers' own conversion, which knows no attention in a level."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    net = small_kl(widths=(32, 64), ends=ends, groups=32, blocks=2)
    ldm = to_ldm(net.state_dict(), levels=2)
    assert ("encoder.down.1.attn.1.q.weight" in ldm) == ("Attn" in ends)
    assert "decoder.up.1.upsample.conv.weight" in ldm
    ours = from_ldm({"state_dict": {**ldm, "loss.logvar": torch.zeros(1)}}).eval()
    x, z = torch.rand(2, 3, 16, 16), torch.ones(2, 4, 8, 8)
    with torch.no_grad():
        assert_close(ours.encode(x).latent_dist.mean, net.encode(x).latent_dist.mean)
        assert_close(ours.decode(z).sample, net.decode(z).sample)
    if "Attn" not in ends:
        blocks = {"down_block_types": ["x"] * 2, "up_block_types": ["x"] * 2}
        peer = convert_ldm_vae_checkpoint(ldm, blocks)
        assert peer.keys() == ours.state_dict().keys()
        assert all(torch.equal(peer[name].squeeze(), v.squeeze()) for name, v in ours.state_dict().items())


# ---- the hub ------------------------------------------------------------------------------------------

FETCH = """
import extras.latents as latents
def fetch(recipe):
    try:
        latents.fetch(recipe)
    except ValueError as error:
        print("error:", error)
fetch("shapes")
fetch("in256-sd")
latents.AUTOENCODERS["sd-ema"] = latents.AUTOENCODERS["sd-ema"]._replace(home="user/repo")
latents.UCGM_HOME = "user/repo"
del latents.HUB["in256-sd"]
fetch("in256-sd")
fetch("in256-sd")
"""


def test_fetch_brings_files_into_the_cache(tmp_path):
    """From the stand-in, whose repository takes the place of the published ones: what matches is sent, once.
    What is not there is named in one line."""
    with hub(tmp_path / "hf") as environment:
        reference = "buffers/refs/in1k256_fid_ref.npz"
        Hub.files = {"a.pt": b"x" * 3000, "config.json": b"{}", reference: b"y" * 2000, "other.txt": b"no"}
        done = subprocess.run([sys.executable, "-c", FETCH], cwd=ROOT, env=environment, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
        assert len(errors) == 2 and "shapes" in errors[0] and "stabilityai/sd-vae-ft-ema" in errors[1]
        names = ["a.pt", reference, "config.json"]
        assert sorted(Hub.sent) == names
    cached = [path for path in (tmp_path / "hf").rglob("*") if path.is_file() and "snapshots" in path.parts]
    assert {str(path).rpartition(COMMIT + "/")[2]: path.read_bytes() for path in cached} == {
        name: Hub.files[name] for name in names}
    assert all(done.stdout.count(str(path)) == 2 for path in cached) and "other.txt" not in done.stdout
