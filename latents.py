"""Latents: pretrained autoencoders, a data set encoded by one of them, and what published recipes need from the hub.

    torchrun --nproc_per_node=8 latents.py encode --data folder:/imagenet/train --vae sd-ema --size 256 --out latents256
    python train.py --recipe in256-sd --data latents:latents256
    python latents.py fetch in256-sd            # autoencoder, FID reference and published weights, into the hub's cache

An encoded folder holds shards latents_rank00_shardKKK.safetensors (latents, latents_flip: float32 N C h w; labels: int64), the
statistics latents_stats.pt (mean, std: 1 C 1 1) and manifest.json (which picture is in which shard, which could not be read). These
are the files that UCGM and LightningDiT publish, and theirs are read as well. A network sees (latent - mean) / std: statistics
for the autoencoders that want them, mean 0 and std 1 / multiplier for the others.
"""
import datetime
import fnmatch
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from checkpoint import hub_errors, write_safely
from config import PUBLISHED, RECIPES, UCGM, fail, read_flags
from data import Stored, noise_like_seed, read_rgb
from machine import deal, pick_device, place


class Kind(NamedTuple):
    loader: str                 # class of diffusers, or ldm: a .pt with the names of latent diffusion
    home: str                   # repository on the hub
    multiplier: float           # the network sees (latent - mean) / std * multiplier
    normalised: bool            # mean and std: statistics of the latents; else 0 and 1


AUTOENCODERS = {
    "sd-ema":    Kind("AutoencoderKL", "stabilityai/sd-vae-ft-ema", 0.18215, False),                     # f8, 4 channels
    "sd-mse":    Kind("AutoencoderKL", "stabilityai/sd-vae-ft-mse", 0.18215, False),                     # f8, 4 channels
    "e2e-vavae": Kind("AutoencoderKL", "REPA-E/e2e-vavae-hf", 1.0, True),                                # f16, 32 channels
    "vavae":     Kind("ldm", "hustvl/vavae-imagenet256-f16d32-dinov2", 1.0, True),                       # f16, 32 channels
    "dc-ae":     Kind("AutoencoderDC", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 1.0, True),          # f32, 32 channels
}


@dataclass
class Options:
    data: str = ""                              # encode: folder:PATH with one sub-folder a class
    vae: str = "sd-ema"                         # sd-ema sd-mse e2e-vavae vavae dc-ae; NAME=PATH for a local folder or file
    size: int = 256                             # side of the pictures, in pixels
    out: str = "latents"                        # folder to write
    shard: int = 10000                          # pictures in a shard
    max_unreadable: int = 100                   # so many damaged pictures end the encoding
    batch_size: int = 32                        # pictures at a time
    workers: int = 4                            # processes that read pictures
    device: str = "auto"                        # cuda, mps or cpu


# ---- autoencoders -------------------------------------------------------------------------------------------------

class Autoencoder:
    """Pictures (B, 3, S, S) in [-1, 1] to latents (B, C, h, w) and back.

    name: of AUTOENCODERS, or NAME=PATH. mean, std: per channel; the network's data are (latent - mean) / std; empty: those that come
    with the autoencoder (in its config, or as latents_stats.pt beside it), or of its multiplier. ValueError: no diffusers, an unknown name, nothing at PATH, statistics missing.
    """

    def __init__(self, name, mean=(), std=()):
        self.kind, self.net = load_autoencoder(name)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std)) if mean else (None, None)
        if not mean:
            self.mean, self.std = normalisation(name, find_stats(name, self.net.config) if self.kind.normalised else {})

    def to(self, device):
        self.net, self.mean, self.std = self.net.to(device), self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def encode(self, x, noise):
        """Raw latents. noise(shape) -> standard normal like the latents: where the encoder gives a distribution, a sample of it is
        taken, as in the published trainings."""
        posterior = self.net.encode(x)
        if hasattr(posterior, "latent"):
            return posterior.latent
        mean, std = posterior.latent_dist.mean, posterior.latent_dist.std
        return mean + std * noise(mean.shape).to(mean)

    @torch.no_grad()
    def decode(self, x, at_once=8):
        """Pictures from the network's data; so many at a time, because activations are a thousand times larger than latents."""
        with torch.autocast(x.device.type, enabled=False):
            parts = (x.float() * self.std + self.mean).split(at_once)
            return torch.cat([self.net.decode(part).sample.clamp(-1, 1) for part in parts])


def load_autoencoder(name):
    """(Kind, frozen network in float32)."""
    short, _, path = name.partition("=")
    if short not in AUTOENCODERS:
        raise ValueError(f"unknown autoencoder {short!r}; one of {', '.join(AUTOENCODERS)}, or NAME=PATH with one of these names and a local folder")
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("autoencoders come from diffusers, which is not installed: pip install diffusers") from error
    kind = AUTOENCODERS[short]
    try:
        if kind.loader == "ldm":
            from huggingface_hub import hf_hub_download
            file = path or hf_hub_download(kind.home, kind.home.rpartition("/")[2] + ".pt")
            return kind, from_ldm(torch.load(file, map_location="cpu", weights_only=True)).eval().requires_grad_(False)
        net = getattr(diffusers, kind.loader).from_pretrained(path or kind.home, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        return kind, net.eval().requires_grad_(False)
    except (OSError, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(f"cannot load {name} from {path or kind.home} ({str(error).splitlines()[0]}): give --vae {short}=PATH, a local copy, "
                         "or fetch it where there is a network") from error


def from_ldm(tensors):
    """A diffusers AutoencoderKL from the names of latent diffusion (VA-VAE: levels 1, 1, 2, 2, 4, attention within the last)."""
    from diffusers import AutoencoderKL
    tensors = tensors.get("state_dict", tensors)
    tensors = {name: value for name, value in tensors.items() if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", name)}
    levels = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"encoder\.down\.(\d+)", name)))
    widths = [tensors[f"encoder.down.{k}.block.0.conv1.weight"].shape[0] for k in range(levels)]
    attends = [f"encoder.down.{k}.attn.0.q.weight" in tensors for k in range(levels)]
    blocks = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"encoder\.down\.0\.block\.(\d+)", name)))
    rules = ((r"\.down\.(\d+)\.", r".down_blocks.\1."), (r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}."),
             (r"\.block\.", ".resnets."), (r"\.attn\.", ".attentions."), (r"\.(down|up)sample\.", r".\1samplers.0."), (r"nin_shortcut", "conv_shortcut"),
             (r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}"), (r"mid\.attn_1", "mid_block.attentions.0"), (r"norm_out", "conv_norm_out"),
             (r"(attentions\.\d)\.norm", r"\1.group_norm"), (r"(attentions\.\d)\.([qkv])\.", r"\1.to_\2."), (r"(attentions\.\d)\.proj_out", r"\1.to_out.0"))
    renamed = {}
    for name, value in tensors.items():
        for old, new in rules:
            name = re.sub(old, new, name)
        renamed[name] = value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value
    net = AutoencoderKL(latent_channels=tensors["post_quant_conv.weight"].shape[1], block_out_channels=widths, layers_per_block=blocks,
                        norm_num_groups=32 if widths[0] % 32 == 0 else widths[0],
                        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
                        up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)])
    net.load_state_dict(renamed)
    return net


def find_stats(name, config):
    """{"mean", "std"} of an autoencoder's latents, as it brings them: in its config, or latents_stats.pt in its folder or repository."""
    if getattr(config, "latents_mean", None) is not None:
        return {"mean": config.latents_mean, "std": config.latents_std}
    short, _, path = name.partition("=")
    place = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        from huggingface_hub import hf_hub_download
        file = place / "latents_stats.pt" if path else hf_hub_download(AUTOENCODERS[short].home, "latents_stats.pt")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:           # whatever the reason, normalisation says what to do about it
        return {}


def normalisation(name, stats):
    """mean and std, (1, C, 1, 1) each, of the network's data (latent - mean) / std, from statistics {"mean", "std"} where they are wanted."""
    kind = AUTOENCODERS[name.partition("=")[0]]
    if not kind.normalised:
        return torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1 / kind.multiplier)
    if stats.get("mean") is None or stats.get("std") is None:
        raise ValueError(f"{name} wants statistics of its latents, and none are here: a latents_stats.pt (mean, std: 1 C 1 1) belongs into "
                         "the folder of latents:DIR, or into that of --vae NAME=PATH")
    mean, std = (torch.as_tensor(stats[key], dtype=torch.float32).view(1, -1, 1, 1) for key in ("mean", "std"))
    return mean, std / kind.multiplier


# ---- encoding -----------------------------------------------------------------------------------------------------

def centre_crop(image, size):
    """An RGB picture to size x size as ADM and its successors do: halve by boxes while twice too large, bicubic, crop the middle."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 4 * short:          # a strip: cut the ends first, they would be cut anyway
        left, top = max(0, (width - 4 * short) // 2), max(0, (height - 4 * short) // 2)
        image = image.crop((left, top, min(width, left + 4 * short), min(height, top + 4 * short)))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_cropped(path, size):
    """uint8 (3, size, size), or the reason (text) why the file could not be read."""
    try:
        return np.asarray(centre_crop(read_rgb(path), size)).transpose(2, 0, 1)
    except ValueError as error:
        return str(error)


def encode(options):
    """Encode a folder; what is there already is kept, so that the same command goes on after an interruption."""
    from torchvision.datasets import ImageFolder
    rank, world = place()
    kind, _, root = options.data.partition(":")
    if kind != "folder" or not Path(root).is_dir():
        raise ValueError(f"data {options.data!r} is not a folder of pictures; expected folder:PATH with PATH/cats/1.jpg, PATH/dogs/2.jpg, ...")
    try:
        folder = ImageFolder(root)
    except OSError as error:
        raise ValueError(f"no pictures in {root}: {str(error).splitlines()[0]}") from error
    paths, labels = zip(*folder.samples)
    device, out = pick_device(options.device), Path(options.out)
    autoencoder = Autoencoder(options.vae, (0.0,), (1.0,)).to(device)
    settings = {"vae": options.vae.partition("=")[0], "size": options.size, "shard": options.shard, "pictures": len(paths)}
    out.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    mine = [(out / f"latents_rank00_shard{first // options.shard:03d}.safetensors", range(first, min(first + options.shard, len(paths))))
            for first in deal(len(paths), options.shard, rank, world)]
    bar = tqdm(total=sum(len(rows) for _, rows in mine), unit="image", disable=rank > 0)
    unreadable = 0
    for path, rows in mine:
        if path.is_file():
            if (before := map_shard(path)[1]["settings"]) != settings:
                raise ValueError(f"{path} was encoded with {before}, not {settings}: take another --out, or remove it")
            bar.update(len(rows))
            continue
        tensors, bad = encode_shard(autoencoder, paths, rows, options, device, bar)
        unreadable += len(bad)
        if unreadable > options.max_unreadable:
            raise ValueError(f"{unreadable} pictures could not be read, the last: {bad[-1][1]}; remove them, or raise --max_unreadable")
        kept = [k for k in rows if k not in {b for b, _ in bad}]
        tensors["labels"] = torch.tensor([labels[k] for k in kept], dtype=torch.int64)
        names = [os.path.relpath(paths[k], root) for k in kept]
        notes = {"settings": settings, "pictures": names, "unreadable": [[os.path.relpath(paths[k], root), why] for k, why in bad]}
        write_safely(path, lambda file: safetensors.torch.save_file(tensors, file, {"notes": json.dumps(notes)}))    # one entry: their order is random
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        finish(out, settings, folder.classes)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def encode_shard(autoencoder, paths, rows, options, device, bar):
    """({"latents", "latents_flip"}, [(number, why it could not be read)]) of pictures `rows` (a range)."""
    loader = torch.utils.data.DataLoader(rows, batch_size=options.batch_size, num_workers=options.workers,
                                         collate_fn=lambda numbers: [(k, read_cropped(paths[k], options.size)) for k in numbers],
                                         multiprocessing_context="fork" if options.workers else None)
    parts, bad = {"latents": [], "latents_flip": []}, []
    for batch in loader:
        bad += [(k, x) for k, x in batch if isinstance(x, str)]
        good = [(k, x) for k, x in batch if not isinstance(x, str)]
        bar.update(len(batch))
        if not good:
            continue
        numbers, x = [k for k, _ in good], torch.from_numpy(np.stack([x for _, x in good])).to(device).float() / 127.5 - 1
        for side, (name, view) in enumerate((("latents", x), ("latents_flip", x.flip(-1)))):
            latents = autoencoder.encode(view, lambda shape: noise_like_seed(numbers, shape[1:], side))
            parts[name].append(latents.float().cpu().contiguous())
    return {name: torch.cat(rows).contiguous() if rows else torch.zeros(0, 1, 1, 1) for name, rows in parts.items()}, bad


def finish(out, settings, classes):
    """Statistics over all shards, and the manifest."""
    shards, n, total, square = {}, 0, 0.0, 0.0
    for path in sorted(out.glob("latents_rank*_shard*.safetensors")):
        arrays, notes = map_shard(path)
        shards[path.name] = {"pictures": notes["pictures"], "unreadable": notes["unreadable"]}
        for name in ("latents", "latents_flip") if len(arrays["labels"]) else ():
            rows = torch.from_numpy(arrays[name]).double().transpose(0, 1).flatten(1)                # (C, N h w)
            n, total, square = n + rows.shape[1], total + rows.sum(1), square + rows.square().sum(1)
    bad = [why for shard in shards.values() for _, why in shard["unreadable"]]
    if not n:
        raise ValueError(f"not one picture could be read, the first: {bad[0]}")
    mean, std = total / n, (square / n - (total / n) ** 2).clamp_min(0).sqrt()
    stats = {"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}
    write_safely(out / "latents_stats.pt", lambda file: torch.save(stats, file))
    write_safely(out / "manifest.json", lambda file: file.write_text(json.dumps({**settings, "classes": classes, "shards": shards}, indent=1)))
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    for why in bad:
        print(why)
    count = sum(len(shard["pictures"]) for shard in shards.values())
    print(f"{out}: {count} pictures encoded, {len(bad)} could not be read. Next: python train.py --recipe in{settings['size']}-sd --data latents:{out}, "
          "or the recipe of this autoencoder")


# ---- reading ------------------------------------------------------------------------------------------------------

def map_shard(path):
    """(name -> numpy array, mapped into memory and not read; what encode wrote beside them: settings, pictures, those that could not be
    read) of a shard. ValueError if it is not one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).numpy() for name in file.keys()}, json.loads((file.metadata() or {}).get("notes", "{}"))
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file of latents, or it is cut off ({error})") from error


def open_latents(path, seed, vae="", mean=(), std=()):
    """The stream of an encoded folder, ours or a published one, as a data.Stored with .latent = (autoencoder, mean, std).

    vae: which autoencoder, where the folder does not say; mean, std: by channel, in place of the folder's statistics. ValueError: no
    shards, shapes that differ, no statistics, no autoencoder, or not the one that made them.
    """
    root = Path(path)
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no latents in {path}: expected latents_rank00_shard000.safetensors, ... (python latents.py encode makes them)")
    shards = [map_shard(file)[0] for file in files]
    if not all({"latents", "latents_flip", "labels"} <= shard.keys() for shard in shards):
        raise ValueError(f"the files in {path} are not shards of latents, latents_flip and labels")
    shards = [shard for shard in shards if len(shard["labels"])]
    shape = shards[0]["latents"].shape[1:]
    if any(shard[name].shape != (len(shard["labels"]), *shape) for shard in shards for name in ("latents", "latents_flip")):
        raise ValueError(f"the shards in {path} differ in shape: they are of several encodings")
    manifest = json.loads((root / "manifest.json").read_text()) if (root / "manifest.json").is_file() else {}
    made = manifest.get("vae", "")
    if vae and made and vae.partition("=")[0] != made.partition("=")[0]:
        raise ValueError(f"{path} was encoded by {made}, and the recipe or --vae says {vae}: take a recipe of that autoencoder, or encode anew")
    vae = vae or made
    if not vae:
        raise ValueError(f"{path} does not say which autoencoder made it: give --vae, one of {', '.join(AUTOENCODERS)}")
    if mean or std:
        if {len(mean), len(std)} != {shape[0]}:
            raise ValueError(f"latent_mean has {len(mean)} numbers and latent_std {len(std)}: give one for each of the {shape[0]} channels to both, or leave both out")
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    else:
        stats = next(iter(root.glob("*stats*.pt")), None)
        mean, std = (v.expand(1, shape[0], 1, 1) for v in normalisation(vae, torch.load(stats, weights_only=True) if stats else {}))
    starts, labels = np.cumsum([0] + [len(shard["labels"]) for shard in shards]), np.concatenate([shard["labels"] for shard in shards])

    def read(indices, flip):
        out = np.empty((len(indices), *shape), np.float32)
        owner = np.searchsorted(starts, indices, "right") - 1
        for k in np.unique(owner):
            for mirrored, name in ((False, "latents"), (True, "latents_flip")):
                rows = np.flatnonzero((owner == k) & (flip == mirrored))
                out[rows] = shards[k][name][indices[rows] - starts[k]]
        return torch.from_numpy(out).sub_(mean).div_(std)
    names = manifest.get("classes") or [str(k) for k in range(max(1000, int(labels.max()) + 1))]
    data = Stored(read, labels, shape, names, seed, mirror=True)
    data.latent = vae, tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
    return data


# ---- from the hub -------------------------------------------------------------------------------------------------

def fetch(recipe):
    """Bring what a recipe needs from the hub into its cache, and say what is not there."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    row = RECIPES.get(recipe) or fail(f"unknown recipe {recipe!r}; those that need the hub: {', '.join(name for name in RECIPES if name in PUBLISHED)}")
    if not row.get("vae"):
        raise ValueError(f"recipe {recipe} needs nothing from the hub; those that do: {', '.join(name for name in RECIPES if name in PUBLISHED)}")
    size = row["image_size"]
    wanted = [(AUTOENCODERS[row["vae"]].home, ("*.json", "*.safetensors", "*.pt"), "autoencoder"),
              (UCGM, (f"buffers/refs/in1k{size}_fid_ref.npz",), "FID reference")]
    if AUTOENCODERS[row["vae"]].normalised:
        wanted.append((UCGM, (f"buffers/vaes/stat/*_{size}.pt",), "statistics of latents"))
    if PUBLISHED[recipe]:
        wanted.append((*PUBLISHED[recipe], "published weights"))
    files = []
    for home, patterns, what in wanted:
        with hub_errors(f"the hub does not give {home}", f"the recipe wants its {what}"):
            found = [(home, file.rfilename, file.size or 0, what) for file in HfApi().repo_info(home, files_metadata=True).siblings
                     if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in patterns)]
        files += found
        if not found:
            print(f"{what}: nothing like {' '.join(patterns)} in {home}; look at https://huggingface.co/{home}/tree/main")
    total, place = sum(file[2] for file in files), Path(HF_HUB_CACHE)
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    for home, name, size, what in files:
        print(f"{size / 2**20:10.1f} MiB  {what}: {home}/{name}")
    if total > free:
        raise ValueError(f"{total / 2**30:.1f} GiB are needed and {place} has {free / 2**30:.1f} GiB: free some, or set HF_HOME to a larger disk")
    for home, name, *_ in files:
        with hub_errors(f"{home}/{name} did not arrive", "the same command goes on from there"):
            print(hf_hub_download(home, name))              # shows its progress
    print("ImageNet itself is not on the hub: https://image-net.org/download-images.php (ILSVRC 2012, train), then latents.py encode.")
    print(f"Next: python sample.py --recipe {recipe} --ckpt FILE" if PUBLISHED[recipe] else f"Next: torchrun train.py --recipe {recipe} --data latents:DIR")


if __name__ == "__main__":
    try:
        task, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("-h", [])
        if task == "fetch" and len(rest) == 1 and not rest[0].startswith("-"):
            fetch(rest[0])
        elif task == "encode":
            encode(Options(**read_flags(Options, rest, __doc__)))
        elif task in ("-h", "--help"):
            read_flags(Options, ["-h"], __doc__)
        else:
            raise ValueError(f"{' '.join(sys.argv[1:])!r} is not a task; expected encode --data folder:PATH ..., or fetch RECIPE")
    except ValueError as error:
        fail(error)
