"""Latents: encoding that survives being killed, reading at speed, autoencoders as diffusers has them, training and drawing end to end."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

import latents
from config import Config
from data import open_dataset
from latents import Autoencoder, centre_crop, from_ldm, normalisation

ROOT = Path(__file__).resolve().parent.parent


def small_kl(channels=4, levels=2):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=channels, block_out_channels=[16] * levels, layers_per_block=1, norm_num_groups=8,
                         down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)


def small_dc():
    from diffusers import AutoencoderDC
    torch.manual_seed(0)
    return AutoencoderDC(latent_channels=8, encoder_block_out_channels=(16, 32, 32), decoder_block_out_channels=(16, 32, 32),
                         encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_block_types="ResBlock",
                         decoder_block_types="ResBlock", encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
                         decoder_norm_types="rms_norm", decoder_act_fns="silu")


def make_pictures(root, count, seed=0):
    """JPEGs of odd sizes in three classes; among them two damaged, one a pixel wide, one CMYK, one PNG with alpha."""
    g = np.random.default_rng(seed)
    for k in range(count):
        path = root / f"class{k % 3}" / f"{k:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = (1, 60) if k == 5 else g.integers(20, 90, 2).tolist()
        pixels = g.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        if k == 6:
            image.convert("CMYK").save(path)
        elif k == 7:
            image.putalpha(90)
            image.save(path.with_suffix(".png"))
        else:
            image.save(path)
        if k in (8, 40):
            path.write_bytes(path.read_bytes()[:150] if k == 8 else b"not a picture")
    return root


def encode(root, vae, out, *more, processes=1, wait=True):
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.Popen([*launch, "latents.py", "encode", "--data", f"folder:{root}", "--vae", vae, "--size", "32", "--out", str(out), "--shard", "20",
                            "--batch_size", "5", "--workers", "0", "--device", "cpu", *more], cwd=ROOT, text=True, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if wait:
        text = run.communicate(timeout=300)[0]
        assert run.returncode == 0, text[-2000:]
        return text
    return run


def files_of(out):
    return {path.name: path.read_bytes() for path in sorted(Path(out).iterdir())}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("vaes")
    small_kl().save_pretrained(root / "kl")
    small_dc().save_pretrained(root / "dc")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("vae, home", [("sd-ema", "kl"), ("dc-ae", "dc")])
def test_encoding_survives_being_killed(tmp_path, homes, vae, home):
    """300 pictures, killed with -9 five times on the way: every good one once, bytes as in an undisturbed run, on one process and on two."""
    root = make_pictures(tmp_path / "pictures", 300)
    text = encode(root, f"{vae}={homes / home}", tmp_path / "calm")
    assert "298 pictures encoded, 2 could not be read" in text and "0008.jpg" in text and "0040.jpg" in text
    expected = files_of(tmp_path / "calm")
    manifest = json.loads(expected["manifest.json"])
    names = [name for shard in manifest["shards"].values() for name in shard["pictures"]]
    assert len(names) == len(set(names)) == 298 and {"class1/0007.png", "class2/0005.jpg", "class0/0006.jpg"} <= set(names)
    encode(root, f"{vae}={homes / home}", tmp_path / "two", processes=2)
    assert files_of(tmp_path / "two") == expected
    kills, out = 0, tmp_path / "killed"
    while kills < 5:
        before, run = len(list(out.glob("*.safetensors"))), encode(root, f"{vae}={homes / home}", out, wait=False)
        while run.poll() is None and len(list(out.glob("*.safetensors"))) < before + 2:
            time.sleep(0.02)
        assert run.poll() is None, "the run ended before it was killed"
        os.killpg(run.pid, 9)
        run.wait()
        kills += 1
    encode(root, f"{vae}={homes / home}", out)
    assert files_of(out) == expected
    with pytest.raises(ValueError, match="could not be read"):
        latents.encode(latents.Options(data=f"folder:{root}", vae=f"{vae}={homes / home}", size=32, out=str(tmp_path / "strict"), max_unreadable=0,
                                       workers=0, device="cpu"))
    with pytest.raises(ValueError, match="was encoded with"):
        latents.encode(latents.Options(data=f"folder:{root}", vae=f"{vae}={homes / home}", size=64, out=str(out), shard=20, workers=0, device="cpu"))


def test_statistics_and_stream(tmp_path, homes):
    """Mean and standard deviation are numpy's over both copies; the stream gives each picture once an epoch, flipped half the time."""
    root = make_pictures(tmp_path / "pictures", 46)
    encode(root, f"dc-ae={homes / 'dc'}", tmp_path / "out")
    shards = [safetensors.torch.load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert [len(s["labels"]) for s in shards] == [18, 20, 6] or sum(len(s["labels"]) for s in shards) == 44
    rows = torch.cat([s[name] for s in shards for name in ("latents", "latents_flip")]).double()
    stats = torch.load(tmp_path / "out/latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == (1, 8, 1, 1)
    assert_close(stats["mean"].flatten(), rows.mean((0, 2, 3)).float(), rtol=1e-5, atol=1e-6)
    assert_close(stats["std"].flatten(), rows.std((0, 2, 3), correction=0).float(), rtol=1e-5, atol=1e-6)
    data = open_dataset(f"latents:{tmp_path / 'out'}", seed=3)
    assert len(data) == 44 and data.shape == (8, 8, 8) and data.names == ["class0", "class1", "class2"]
    x, y = data[np.arange(44)]
    plain = (torch.cat([s["latents"] for s in shards]) - stats["mean"]) / stats["std"]
    flipped = (torch.cat([s["latents_flip"] for s in shards]) - stats["mean"]) / stats["std"]
    found = [next((k, side) for side, rows in enumerate((plain, flipped)) for k in range(44) if torch.equal(rows[k], row)) for row in x]
    assert sorted(k for k, _ in found) == list(range(44)) and 8 <= sum(side for _, side in found) <= 36
    labels = torch.cat([s["labels"] for s in shards])
    assert all(labels[k] == label for (k, _), label in zip(found, y))
    assert torch.equal(open_dataset(f"latents:{tmp_path / 'out'}", seed=3)[np.arange(100, 120)][0], data[np.arange(100, 120)][0])


def write_shards(folder, shards, each, shape, stats=True, seed=0):
    """A folder as UCGM and LightningDiT publish it: no manifest."""
    folder.mkdir()
    for k in range(shards):
        values = torch.randn(each, *shape, generator=torch.Generator().manual_seed(seed + k))
        safetensors.torch.save_file({"latents": values, "latents_flip": values.flip(-1).contiguous(), "labels": torch.arange(each) % 1000},
                                    folder / f"latents_rank{k % 8:02d}_shard{k // 8:03d}.safetensors")
    if stats:
        torch.save({"mean": torch.zeros(1, shape[0], 1, 1), "std": torch.ones(1, shape[0], 1, 1)}, folder / "latents_stats.pt")
    return folder


def test_published_shards_are_read(tmp_path):
    folder = write_shards(tmp_path / "l", 3, 10, (4, 8, 8))
    with pytest.raises(ValueError, match="give --vae"):
        open_dataset(f"latents:{folder}")
    data = open_dataset(f"latents:{folder}", vae="sd-ema")
    assert len(data.names) == 1000 and data.latent[0] == "sd-ema"
    assert_close(torch.tensor(data.latent[2]), torch.full((4,), 1 / 0.18215))
    values = torch.cat([torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]) * 0.18215
    assert all(any(torch.allclose(row, v) or torch.allclose(row, v.flip(-1)) for v in values) for row in data[np.arange(30)][0])
    assert open_dataset(f"latents:{folder}", vae="vavae").latent[2] == (1.0,) * 4
    data = open_dataset(f"latents:{folder}", vae="vavae", mean=(1.0,) * 4, std=(2.0,) * 4)       # one's own statistics reach the data
    assert data.latent == ("vavae", (1.0,) * 4, (2.0,) * 4)
    assert_close(data[np.arange(30)][0], (open_dataset(f"latents:{folder}", vae="vavae")[np.arange(30)][0] - 1) / 2)
    for wrong in (dict(mean=(1.0,) * 4), dict(mean=(1.0,) * 3, std=(1.0,) * 3)):
        with pytest.raises(ValueError, match="for each of the 4 channels"):
            open_dataset(f"latents:{folder}", vae="vavae", **wrong)
    (folder / "manifest.json").write_text('{"vae": "sd-ema=somewhere"}')
    with pytest.raises(ValueError, match="was encoded by sd-ema"):
        open_dataset(f"latents:{folder}", vae="vavae")
    (folder / "manifest.json").unlink()
    (folder / "latents_stats.pt").unlink()
    for make, words in ((lambda: None, "statistics"), (lambda: safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "a.safetensors"), "not shards of"),
                        (lambda: (folder / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!"), "not a readable"),
                        (lambda: os.truncate(sorted(folder.glob("latents_*"))[0], 3000) or (folder / "a.safetensors").unlink(), "cut off")):
        make()
        with pytest.raises(ValueError, match=words):
            open_dataset(f"latents:{folder}", vae="vavae")
    with pytest.raises(ValueError, match="no latents in"):
        open_dataset(f"latents:{tmp_path}")


def test_reading_is_fast(tmp_path):
    """20,000 latents of 32x16x16 a second from the page cache; three tries, because other things run too."""
    data = open_dataset(f"latents:{write_shards(tmp_path / 'l', 8, 500, (32, 16, 16))}", vae="vavae")
    data[np.arange(4000)]
    best = 0
    for _ in range(3):
        start = time.perf_counter()
        for first in range(0, 8192, 1024):
            data[first + np.arange(1024)]
        best = max(best, 8192 / (time.perf_counter() - start))
    assert best > 20_000, f"{best:.0f} latents/s"


def test_encode_and_decode_are_diffusers(homes):
    """The latent is a sample of diffusers' posterior, decode undoes the normalisation, slices change nothing."""
    net, ours = small_kl().eval(), Autoencoder(f"sd-ema={homes / 'kl'}")
    x, z = torch.rand(5, 3, 16, 16) * 2 - 1, torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        posterior = net.encode(x).latent_dist
        assert_close(ours.encode(x, lambda shape: z), posterior.mean + posterior.std * z)
        assert_close(ours.decode(z * 0.18215, at_once=2), net.decode(z).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a latents_stats.pt"):
        Autoencoder(f"dc-ae={homes / 'dc'}")
    torch.save({"mean": torch.ones(1, 8, 1, 1), "std": torch.full((1, 8, 1, 1), 2.0)}, homes / "dc/latents_stats.pt")
    assert Autoencoder(f"dc-ae={homes / 'dc'}").std.flatten().tolist() == [2.0] * 8
    (homes / "dc/latents_stats.pt").unlink()
    dc = Autoencoder(f"dc-ae={homes / 'dc'}", mean=(1.0,) * 8, std=(2.0,) * 8)
    with torch.no_grad():
        assert_close(dc.encode(x, None), small_dc().eval().encode(x).latent)
        assert_close(dc.decode((z.repeat(1, 2, 1, 1)[..., :4, :4] - 1) / 2), small_dc().eval().decode(z.repeat(1, 2, 1, 1)[..., :4, :4]).sample.clamp(-1, 1))


def test_the_names_of_latent_diffusion():
    """from_ldm against diffusers' own conversion, and, with attention within the last level (which that one leaves out), name by name."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    for attention in (False, True):
        torch.manual_seed(1)
        ends = [("Attn" if attention and k else "") for k in (0, 1)]
        net = AutoencoderKL(latent_channels=4, block_out_channels=[32, 64], layers_per_block=2, norm_num_groups=32,
                            down_block_types=[f"{end}DownEncoderBlock2D" for end in ends], up_block_types=[f"{end}UpDecoderBlock2D" for end in ends[::-1]]).eval()
        ldm = to_ldm(net.state_dict(), levels=2)
        assert ("encoder.down.1.attn.1.q.weight" in ldm) == attention and "decoder.up.1.upsample.conv.weight" in ldm
        ours = from_ldm({"state_dict": {**ldm, "loss.logvar": torch.zeros(1)}}).eval()
        x = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            assert_close(ours.encode(x).latent_dist.mean, net.encode(x).latent_dist.mean)
            assert_close(ours.decode(torch.ones(2, 4, 8, 8)).sample, net.decode(torch.ones(2, 4, 8, 8)).sample)
        if not attention:
            peer = convert_ldm_vae_checkpoint(ldm, {"down_block_types": ["x"] * 2, "up_block_types": ["x"] * 2})
            assert peer.keys() == ours.state_dict().keys() and all(torch.equal(peer[k].squeeze(), v.squeeze()) for k, v in ours.state_dict().items())


def to_ldm(tensors, levels):
    """diffusers' names to those of latent diffusion's Encoder and Decoder."""
    out = {}
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            level = int(parts[2]) if parts[1] == "down_blocks" else levels - 1 - int(parts[2])
            side = parts[1].removesuffix("_blocks")
            if parts[3] in ("resnets", "attentions"):
                parts[1:5] = [side, str(level), {"resnets": "block", "attentions": "attn"}[parts[3]], parts[4]]
            else:
                parts[1:5] = [side, str(level), f"{side}sample"]
        elif parts[1] == "mid_block":
            parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"]
        name = ".".join(parts).replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if ".attn" in name:
            name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out").replace("to_q", "q").replace("to_k", "k").replace("to_v", "v")
            value = value[:, :, None, None] if value.ndim == 2 else value
        out[name] = value
    return out


def test_messages_of_autoencoders(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown autoencoder 'sd'"):
        Autoencoder("sd")
    with pytest.raises(ValueError, match="statistics"):
        normalisation("vavae", {})
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="give --vae sd-ema=PATH"):
        Autoencoder(f"sd-ema={tmp_path}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install diffusers"):
        Autoencoder("sd-ema")


def test_the_centre_crop():
    """What ADM's preprocessing gives: the mean of 2x2 boxes on sizes that halve (Pillow rounds twice: within 1), the middle of what is not square."""
    g = np.random.default_rng(0)
    pixels = g.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    boxed = pixels.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(np.asarray(centre_crop(Image.fromarray(pixels), 32)) - boxed).max() <= 1
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert np.asarray(centre_crop(Image.fromarray(wide), 32)).min() == 255
    assert centre_crop(Image.new("RGB", (1, 5000)), 64).size == (64, 64)


@pytest.mark.slow
def test_train_tune_and_draw_on_latents(tmp_path, homes):
    """TiT-S/1, 20 steps many-step, 20 steps few-step, decoded pictures, all by the commands of the README."""
    root = make_pictures(tmp_path / "pictures", 120)
    vae = f"dc-ae={homes / 'dc'}"
    encode(root, vae, tmp_path / "latents")
    common = ["--model", "TiT-S/1", "--data", f"latents:{tmp_path / 'latents'}", "--vae", vae, "--batch_size", "16", "--steps", "20", "--compile", "no", "--device", "cpu",
              "--held_out", "4", "--sample_steps", "2"]
    run = lambda *words: subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    many = run("train.py", "--recipe", "in256-vavae", *common, "--out", tmp_path / "many")
    assert many.returncode == 0, many.stderr[-2000:]
    few = run("train.py", "--recipe", "in256-vavae-few", *common, "--init_from", tmp_path / "many", "--out", tmp_path / "few")
    assert few.returncode == 0, few.stderr[-2000:]
    drawn = run("sample.py", "--ckpt", tmp_path / "few", "--num", 9, "--out", tmp_path / "nine.png")
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert Image.open(tmp_path / "nine.png").size[0] > 100 and (tmp_path / "many/grid_0000020.png").stat().st_size > 1000
    from checkpoint import load_model
    config = load_model(tmp_path / "few")[1]
    assert isinstance(config, Config) and len(config.latent_mean) == 8 and config.vae == vae
