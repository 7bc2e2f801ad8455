"""Latents: pretrained autoencoders, data sets encoded with them, and the files that published recipes need.

    torchrun --nproc_per_node=8 -m extras.latents encode --data folder:/imagenet/train --vae sd-ema
    python train.py --recipe in256-sd --data latents:latents
    python -m extras.latents fetch in256-sd        # the autoencoder, FID reference and published weights

An encoded folder contains shards latents_rank00_shardKKK.safetensors (latents, latents_flip: float32 N C h w;
labels: int64), latents_stats.pt (mean, std: 1 C 1 1) and manifest.json (which image is in which shard, and
which could not be read). Folders in the format of UCGM and LightningDiT can be read, too.
"""
from dataclasses import dataclass
from typing import NamedTuple

from config import UserError, command_line, read_flags, recipe_row, setting
from recipes import RECIPES


class Source(NamedTuple):
    loader: str             # a class of diffusers, or ldm: a .pt with latent diffusion's parameter names
    home: str               # repository on the hub
    multiplier: float       # the network sees latent * multiplier; 0: (latent - mean) / std


AUTOENCODERS = {
    "sd-ema":    Source("AutoencoderKL", "stabilityai/sd-vae-ft-ema", 0.18215),               # f8, C 4
    "sd-mse":    Source("AutoencoderKL", "stabilityai/sd-vae-ft-mse", 0.18215),               # f8, C 4
    "e2e-vavae": Source("AutoencoderKL", "REPA-E/e2e-vavae-hf", 0),                           # f16, C 32
    "vavae":     Source("ldm", "hustvl/vavae-imagenet256-f16d32-dinov2", 0),                  # f16, C 32
    "dc-ae":     Source("AutoencoderDC", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 0),     # f32, C 32
}


@dataclass
class Options:
    data: str = setting("", "folder:PATH with one sub-folder per class", "encode")
    vae: str = setting("sd-ema", f"{' '.join(AUTOENCODERS)}; or NAME=PATH, a local folder or file")
    size: int = setting(256, "side of the images, in pixels", least=1)
    out: str = setting("latents", "folder to write")
    shard: int = setting(10000, "images per shard", least=1)
    max_unreadable: int = setting(100, "stop after more unreadable images than this")
    batch_size: int = setting(32, "images per batch", least=1)
    workers: int = setting(4, "worker processes that read images", least=0)
    device: str = setting("auto", "cuda, mps or cpu")


def read_task(argv):
    """("encode", Options) or ("fetch", RECIPE)."""
    task, *rest = argv or ["-h"]
    if task == "fetch" and len(rest) == 1 and not rest[0].startswith("-"):
        return task, rest[0]
    if task in ("encode", "-h", "--help"):
        return "encode", Options(**read_flags(Options, rest if task == "encode" else ["-h"], __doc__))
    raise UserError(f"unknown task {task!r}: give encode --data folder:PATH, or fetch RECIPE")


if __name__ == "__main__":      # before torch is loaded, so that -h and typing errors answer at once
    TASK, GIVEN = command_line(read_task)

import hashlib
import json
import os
import re
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import FiniteDataset, noise_like_seed
from engine import (as_one_error, atomic_write, check_writable, init_distributed, leave_distributed,
                    pick_device, print0, rank_and_world, run)
from extras.published import HUB, UCGM_HOME
from images import find_classes, read_many, read_rgb

# ---- autoencoders -------------------------------------------------------------------------------------

def by_channel(values):
    """(1, C, 1, 1) float32 from C numbers."""
    return torch.as_tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


class Autoencoder:
    """Images (B, 3, S, S) in [-1, 1] to latents (B, C, h, w) and back; a network sees (latent - mean) / std.

    name: one of AUTOENCODERS, or NAME=PATH. mean, std: per channel; empty: those of the autoencoder.
    """

    def __init__(self, name, mean=(), std=()):
        source, self.net = load_autoencoder(name)
        if mean:
            self.mean, self.std = by_channel(mean), by_channel(std)
        else:
            self.mean, self.std = normalisation(name, {} if source.multiplier else find_stats(name, self.net))

    def to(self, device):
        self.net, self.mean, self.std = self.net.to(device), self.mean.to(device), self.std.to(device)
        return self

    def hash(self):
        weights = hashlib.sha256()
        for value in self.net.state_dict().values():
            weights.update(value.cpu().numpy().tobytes())
        return weights.hexdigest()[:16]

    @torch.no_grad()
    def encode(self, x, noise):
        """Raw latents. If the encoder returns a distribution, draw from it with noise(shape of a latent)."""
        posterior = self.net.encode(x)
        if hasattr(posterior, "latent"):
            return posterior.latent
        mean, std = posterior.latent_dist.mean, posterior.latent_dist.std
        return mean + std * noise(mean.shape[1:]).to(mean)

    @torch.no_grad()
    def decode(self, x, at_once=8):
        """Images from what the network sees, few at once: activations are a thousand times larger."""
        with torch.autocast(x.device.type, enabled=False):
            parts = (x.float() * self.std + self.mean).split(at_once)
            return torch.cat([self.net.decode(part).sample.clamp(-1, 1) for part in parts])


def decoder(config, device):
    """The `decode` of a run's autoencoder on process 0, else None: pages then show three channels."""
    if not config.vae or rank_and_world()[0]:
        return None
    try:
        return Autoencoder(config.vae, config.latent_mean, config.latent_std).to(device).decode
    except UserError as error:
        print0(f"pages of this run show three channels of the latents: {error}")


def load_autoencoder(name):
    """(Source, frozen network in float32)."""
    short, _, path = name.partition("=")
    if short not in AUTOENCODERS:
        raise UserError(f"unknown autoencoder {short!r}: give {', '.join(AUTOENCODERS)}, or NAME=PATH")
    source = AUTOENCODERS[short]
    with as_one_error("autoencoders need diffusers", "pip install diffusers"):
        import diffusers
    hint = f"give --vae {short}=PATH, or fetch it where there is internet"
    with as_one_error(f"cannot load {name} from {path or source.home}", hint):
        if source.loader == "ldm":
            from huggingface_hub import hf_hub_download
            file = path or hf_hub_download(source.home, source.home.rpartition("/")[2] + ".pt")
            net = from_ldm(torch.load(file, map_location="cpu", weights_only=True))
        else:
            load = getattr(diffusers, source.loader).from_pretrained
            net = load(path or source.home, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    return source, net.eval().requires_grad_(False)


def from_ldm(tensors):
    """A diffusers AutoencoderKL from latent diffusion's tensors (VA-VAE has attention in its last level)."""
    from diffusers import AutoencoderKL
    tensors = tensors.get("state_dict", tensors)
    parts = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")
    tensors = {name: value for name, value in tensors.items() if parts.match(name)}

    def count(pattern):
        return 1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))
    levels, blocks = count(r"encoder\.down\.(\d+)"), count(r"encoder\.down\.0\.block\.(\d+)")
    widths = [len(tensors[f"encoder.down.{k}.block.0.conv1.weight"]) for k in range(levels)]
    attends = ["Attn" if f"encoder.down.{k}.attn.0.q.weight" in tensors else "" for k in range(levels)]
    rules = {r"\.down\.(\d+)\.": r".down_blocks.\1.", r"\.block\.": ".resnets.", r"\.attn\.": ".attentions.",
             r"\.up\.(\d+)\.": lambda m: f".up_blocks.{levels - 1 - int(m[1])}.",
             r"\.(down|up)sample\.": r".\1samplers.0.", r"nin_shortcut": "conv_shortcut",
             r"mid\.block_(\d)": lambda m: f"mid_block.resnets.{int(m[1]) - 1}",
             r"mid\.attn_1": "mid_block.attentions.0", r"norm_out": "conv_norm_out",
             r"(attentions\.\d)\.norm": r"\1.group_norm", r"(attentions\.\d)\.([qkv])\.": r"\1.to_\2.",
             r"(attentions\.\d)\.proj_out": r"\1.to_out.0"}
    renamed = {}
    for name, value in tensors.items():
        for old, new in rules.items():
            name = re.sub(old, new, name)
        renamed[name] = value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value
    net = AutoencoderKL(latent_channels=tensors["post_quant_conv.weight"].shape[1], layers_per_block=blocks,
                        block_out_channels=widths,
                        down_block_types=[f"{attn}DownEncoderBlock2D" for attn in attends],
                        up_block_types=[f"{attn}UpDecoderBlock2D" for attn in reversed(attends)])
    net.load_state_dict(renamed)
    return net


def find_stats(name, net):
    """{"mean", "std"} of an autoencoder's latents, from its config or from latents_stats.pt beside it."""
    if getattr(net.config, "latents_mean", None) is not None:
        return {"mean": net.config.latents_mean, "std": net.config.latents_std}
    short, _, path = name.partition("=")
    folder, file = Path(path) if Path(path).is_dir() else Path(path).parent, "latents_stats.pt"
    try:
        from huggingface_hub import hf_hub_download
        file = folder / file if path else hf_hub_download(AUTOENCODERS[short].home, file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:           # whatever the reason, normalisation says what to do
        return {}


def normalisation(name, stats):
    """mean and std, (1, C or 1, 1, 1) each, so that the network sees (latent - mean) / std."""
    if multiplier := AUTOENCODERS[name.partition("=")[0]].multiplier:
        return by_channel([0]), by_channel([1 / multiplier])
    if stats.get("mean") is None or stats.get("std") is None:
        raise UserError(f"{name} has no statistics of its latents: put latents_stats.pt into the folder of "
                        "latents:DIR or of --vae NAME=PATH")
    return by_channel(stats["mean"]), by_channel(stats["std"])


# ---- encoding -----------------------------------------------------------------------------------------

def crop_middle(image, width, height):
    """The middle of an image, at most width x height."""
    width, height = min(width, image.width), min(height, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def centre_crop(image, size):
    """An RGB image to size x size as in ADM: box-halve while at least twice too large, bicubic, crop."""
    image = crop_middle(image, 4 * min(image.size), 4 * min(image.size))    # or a strip would vanish
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return crop_middle(image, size, size)


def encode(options):
    """Encode a folder. The same command resumes after an interruption: it keeps finished shards, except those
    whose files have changed or could not be read."""
    rank, world = rank_and_world()
    if not options.data.startswith("folder:"):
        raise UserError(f"data is {options.data!r}; expected folder:PATH with images such as PATH/cats/1.jpg")
    check_writable(options.out)
    folder = find_classes(os.path.expanduser(options.data.removeprefix("folder:")))
    print0(folder)
    device, out, count = pick_device(options.device), Path(options.out), len(folder.files)
    autoencoder = Autoencoder(options.vae, (0.0,), (1.0,)).to(device)
    settings = {"vae": options.vae.partition("=")[0], "weights": autoencoder.hash(), "size": options.size,
                "shard": options.shard, "classes": folder.classes}
    out.mkdir(parents=True, exist_ok=True)
    init_distributed(timeout=timedelta(days=7))
    shards = {out / f"latents_rank00_shard{first // options.shard:03d}.safetensors": first
              for first in range(0, count, options.shard)}
    share = min(count, -(-len(shards) // world) * options.shard)
    unreadable, bar = 0, tqdm(total=share, unit="image", disable=rank > 0)
    for path, first in list(shards.items())[rank::world]:
        last = first + options.shard
        files, labels = folder.files[first:last], folder.labels[first:last]
        key = hashlib.sha256(json.dumps([files, folder.classes, []]).encode()).hexdigest()[:16]
        part = folder._replace(files=files, key=key, labels=labels)
        if path.is_file() and is_current(path, settings, part):
            bar.update(len(part.files))
            continue
        tensors, kept, bad = encode_shard(autoencoder, part, first, options, device, bar)
        unreadable += len(bad)
        if unreadable > options.max_unreadable:
            raise UserError(f"{unreadable} images cannot be read; the last: {bad[-1][1]}, or raise "
                            "--max_unreadable")
        notes = {"settings": settings, "files": part.key, "pictures": kept, "unreadable": bad}
        metadata = {"notes": json.dumps(notes)}         # one entry: safetensors keeps no order
        atomic_write(path, partial(safetensors.torch.save_file, tensors, metadata=metadata))
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        for path in out.glob("latents_rank00_shard*.safetensors"):
            if path not in shards and "settings" in map_shard(path)[1]:
                path.unlink()                           # its images no longer exist
        finish(out, settings)
    leave_distributed()


def is_current(path, settings, part):
    """Whether a shard is up to date with these images. UserError if it was encoded with other settings."""
    notes = map_shard(path)[1]
    before = notes.get("settings", {})
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        was = ", ".join(f"{name} {before.get(name)}" for name in changed)
        raise UserError(f"{path} was encoded with {was}: remove it, or give another --out")
    return notes["files"] == part.key and not notes["unreadable"]


def encode_shard(autoencoder, part, first, options, device, bar):
    """(tensors, names of the encoded images, [name, reason] of the others) of a part of a Folder. Its image k
    is encoded with noise number first + k."""
    batches, kept, bad = {"latents": [], "latents_flip": []}, [], []

    def read(file):
        image = read_rgb(os.path.join(part.root, file[0]))
        return np.asarray(centre_crop(image, options.size)).transpose(2, 0, 1)
    for images, reasons in read_many(part.files, read, options.batch_size, options.workers):
        bar.update(len(images) + len(reasons))
        bad += reasons.items()
        kept += images
        if not images:
            continue
        x = torch.from_numpy(np.stack(list(images.values()))).to(device).float() / 127.5 - 1
        for side, (name, view) in enumerate((("latents", x), ("latents_flip", x.flip(-1)))):
            noise = partial(noise_like_seed, [first + k for k in images], step=side)
            batches[name].append(autoencoder.encode(view, noise).float().cpu().contiguous())
    tensors = {name: torch.cat(rows) if rows else torch.zeros(0, 1, 1, 1) for name, rows in batches.items()}
    tensors["labels"] = torch.tensor([part.labels[k] for k in kept], dtype=torch.int64)
    names = [name for name, *_ in part.files]
    return tensors, [names[k] for k in kept], [[names[k], why] for k, why in bad]


def finish(out, settings):
    """Write the statistics over all shards and the manifest."""
    shards, n, total, square = {}, 0, 0.0, 0.0
    for path in sorted(out.glob("latents_rank*_shard*.safetensors")):
        arrays, notes = map_shard(path)
        shards[path.name] = {name: notes[name] for name in ("pictures", "unreadable")}
        for name in ("latents", "latents_flip") if len(arrays["labels"]) else ():
            rows = torch.from_numpy(arrays[name]).double().transpose(0, 1).flatten(1)           # (C, N h w)
            n, total, square = n + rows.shape[1], total + rows.sum(1), square + rows.square().sum(1)
    bad = [why for shard in shards.values() for _, why in shard["unreadable"]]
    if not n:
        raise UserError(f"no image can be read; the first: {bad[0]}")
    mean, variance = total / n, square / n - (total / n).square()
    stats = {"mean": by_channel(mean), "std": by_channel(variance.clamp_min(0).sqrt())}
    manifest = json.dumps({**settings, "shards": shards}, indent=1)
    atomic_write(out / "latents_stats.pt", partial(torch.save, stats))
    atomic_write(out / "manifest.json", lambda file: file.write_text(manifest))
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    count = sum(len(shard["pictures"]) for shard in shards.values())
    vae, size = settings["vae"], settings["size"]
    fitting = (name for name, row in RECIPES.items()
               if (row.get("vae"), row.get("image_size")) == (vae, size))
    recipe = next(fitting, f"in256-sd --vae {vae}")
    print(*bad, f"{out}: {count} images encoded, {len(bad)} unreadable. Next: python train.py "
          f"--recipe {recipe} --data latents:{out}", sep="\n")


# ---- reading ------------------------------------------------------------------------------------------

def map_shard(path):
    """(name -> memory-mapped array, the notes that encode wrote with them) of a shard."""
    with (as_one_error(f"{path} is not a file of latents, or it is damaged", "replace or remove it"),
          safetensors.safe_open(path, "pt") as file):
        notes = json.loads((file.metadata() or {}).get("notes", "{}"))
        return {name: file.get_tensor(name).numpy() for name in file.keys()}, notes


def read_manifest(root, vae):
    """(autoencoder, class names or None) of a folder of latents. Published folders need `vae`."""
    file = Path(root) / "manifest.json"
    manifest = json.loads(file.read_text()) if file.is_file() else {}
    used = manifest.get("vae", "")
    if not (vae or used):
        raise UserError(f"{root} does not name its autoencoder: give --vae, one of {', '.join(AUTOENCODERS)}")
    if vae and used and vae.partition("=")[0] != used.partition("=")[0]:
        raise UserError(f"{root} was encoded with {used}, not {vae}: give --vae {used}, or encode it again")
    return vae or used, manifest.get("classes")


def open_latents(path, seed, vae=""):
    """The stream of an encoded folder, as a FiniteDataset with .latent = (autoencoder, mean, std)."""
    root, sides = Path(path), ("latents", "latents_flip")
    shards = [map_shard(file)[0] for file in sorted(root.glob("*.safetensors"))]
    if not shards or any({*sides, "labels"} - shard.keys() for shard in shards):
        raise UserError(f"no shards with latents, latents_flip and labels in {path}: make them with "
                        "python -m extras.latents encode")
    shards = [shard for shard in shards if len(shard["labels"])]
    shape = shards[0]["latents"].shape[1:]
    if any(shard[name].shape != (len(shard["labels"]), *shape) for shard in shards for name in sides):
        raise UserError(f"the shards in {path} differ in shape: they come from several encodings")
    vae, names = read_manifest(root, vae)
    stats = next(root.glob("*stats*.pt"), None)
    mean, std = (value.expand(1, shape[0], 1, 1) for value in
                 normalisation(vae, torch.load(stats, weights_only=True) if stats else {}))
    labels = np.concatenate([shard["labels"] for shard in shards])
    starts = np.cumsum([0, *(len(shard["labels"]) for shard in shards)])

    def read(indices, flip):
        x = np.empty((len(indices), *shape), np.float32)
        owners = np.searchsorted(starts, indices, "right") - 1
        for row, (k, index, mirrored) in enumerate(zip(owners, indices, flip)):
            x[row] = shards[k][sides[int(mirrored)]][index - starts[k]]
        return torch.from_numpy(x).sub_(mean).div_(std)
    names = names or [str(k) for k in range(max(1000, int(labels.max()) + 1))]
    identity = b"".join(shard["labels"].tobytes() + shard["latents"][0].tobytes() for shard in shards)
    data = FiniteDataset(read, labels, shape, names, seed, True, hashlib.sha256(identity).hexdigest())
    data.latent = vae, tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
    return data


# ---- from the hub -------------------------------------------------------------------------------------

def fetch(recipe):
    """Download what a recipe needs into the hub's cache, and print where it is and what is missing."""
    from huggingface_hub import snapshot_download
    row = recipe_row(recipe)
    if not row.get("vae"):
        raise UserError(f"recipe {recipe} needs nothing from the hub; these do: {', '.join(HUB)}")
    source, size = AUTOENCODERS[row["vae"]], row["image_size"]
    wanted = [("autoencoder", source.home, "*.json", "*.safetensors", "*.pt"),
              ("FID reference", UCGM_HOME, f"buffers/refs/in1k{size}_fid_ref.npz")]
    if not source.multiplier:
        wanted.append(("statistics of latents", UCGM_HOME, f"buffers/vaes/stat/*_{size}.pt"))
    if recipe in HUB:
        wanted.append(("published weights", *HUB[recipe]))
    for what, home, *patterns in wanted:
        with as_one_error(f"cannot download the {what} from {home}", "run the same command again to resume"):
            folder = Path(snapshot_download(home, allow_patterns=patterns))
        files = [file for pattern in patterns for file in sorted(folder.rglob(pattern))]
        print(f"{what}:", *files, sep="\n  ")
        if not files:
            print(f"  no file matches {' '.join(patterns)}; see https://huggingface.co/{home}/tree/main")
    print("ImageNet is not on the hub: get it from https://image-net.org/download-images.php and encode it.")
    print(f"Next: python sample.py --recipe {recipe} --ckpt FILE" if recipe in HUB else
          f"Next: torchrun train.py --recipe {recipe} --data latents:DIR")


if __name__ == "__main__":
    run(lambda: {"encode": encode, "fetch": fetch}[TASK](GIVEN))

