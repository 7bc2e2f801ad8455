"""Draw images from a trained model.

    python sample.py --steps 2                              # the newest run, or the model shipped in assets/
    python sample.py --ckpt runs/shapes --steps 20 --classes star,heart
    python sample.py --steps 4 --trajectory                 # what the model predicts at each step
    python sample.py --ckpt runs/shapes --out film.gif      # the same as an animation
    python sample.py --recipe repae --ckpt hf://USER/REPO/FILE.pt       # a published model
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --out samples.npz      # many, for fid.py

Settings not given are the model's own. Image k depends only on seed k. To resume, run the same
command again. The two dashes keep torchrun from mistaking --num for a flag of its own.
"""
from dataclasses import dataclass

from config import Config, SamplerFlags, UserError, command_line, read_flags, setting, user_errors


@dataclass
class Options(SamplerFlags):
    ckpt: str = setting("", "a run, a file or hf://USER/REPO[/FILE]; empty: the newest in runs/", "images")
    recipe: str = setting("", "take network, transport and sampler settings from this recipe")
    vae: str = setting("", "for latents: an autoencoder as in train.py; empty: the model's own")
    out: str = setting("samples.png", "a page (png jpg webp), an animation (gif), or uint8 arrays (npz)")
    classes: str = setting("", "names or numbers, separated by commas, used in turn; empty: all of them")
    seeds: str = setting("", "such as 0-63 or 3,5,8; empty: 0 to num - 1")
    num: int | None = setting(None, "number of images [8 rows; 12 in a trajectory, 20 in a gif]", least=1)
    beside: str = setting("", "another model, shown to the right in the animation")
    trajectory: bool = setting(False, "one row per image, one column per step: the predicted data")
    batch_size: int = setting(256, "images per batch", least=1)
    device: str = setting("auto", "cuda, mps or cpu")
    dtype: str = setting("auto", "bfloat16 or float32", choices=("auto", "bfloat16", "float32"))


if __name__ == "__main__":      # before torch is loaded, so that -h and typos are answered at once
    OPTIONS = command_line(lambda argv: Options(**read_flags(Options, argv, __doc__)))

import hashlib
import json
import shutil
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_model
from data import class_number, image_grid, noise_like_seed, to_uint8
from engine import (atomic_write, autocast, check_writable, from_rank0, init_distributed, leave_distributed,
                    pick_device, pick_dtype, print0, rank_and_world, rank_batches, run)
from objective import null_of, resolve
from sampler import check_sampler, is_guided, sample, time_grid

SHIPPED = Path(__file__).parent / "assets/avatars-few.safetensors"
PAGES = (".png", ".jpg", ".webp")
LARGEST = 16_000        # the largest side of a page in pixels; a webp cannot have more than 16,383


# ---- from a model to images ---------------------------------------------------------------------------

def count_nfe(times, transport="linear", order=1, cfg_scale=1.0, cfg_interval=(0.0, 1.0)):
    """Network evaluations per image. A guided call counts twice; order 2 makes two per step but the last."""
    transport = resolve(transport)
    cost = [1 + is_guided(transport, t, cfg_scale, cfg_interval) for t in times[:-1]]
    return sum(cost) + (sum(cost[1:]) if order == 2 else 0)


class Pipeline(NamedTuple):
    """A network and everything that it takes to draw images with it."""
    net: torch.nn.Module
    config: Config
    names: list                     # of the classes
    device: torch.device
    dtype: torch.dtype
    decode: object = None           # from latents to images: an Autoencoder's decode

    @property
    def shape(self):
        return self.net.in_channels, self.net.input_size, self.net.input_size

    def nfe(self, **given):
        """Network evaluations per image. UserError: settings of the sampler that exclude each other."""
        s = {"order": 1, **self.config.sampler(**given)}
        with user_errors():
            times = time_grid(s["steps"], s["schedule"], s["gap"], s["order"], s["kappa"], s["transport"])
            check_sampler(resolve(s["transport"]), times, s["kappa"], s["rho"], s["order"], s["cfg_scale"],
                          null_of(self.net))
        return count_nfe(times, s["transport"], s["order"], s["cfg_scale"], s["cfg_interval"])

    def to_images(self, x):
        """Images on the CPU, from what the sampler returns."""
        return (self.decode(x) if self.decode else x).cpu()


def open_pipeline(path, device, dtype="auto", recipe="", vae="", graph=False):
    """The Pipeline of a model, from anything --ckpt accepts. graph: on a GPU its network becomes one CUDA
    graph, for many calls without gradient, unless it was trained with --no-compile."""
    net, config, names = load_model(path, device, recipe)
    if graph and device.type == "cuda" and config.compile is not False and find_spec("extras"):
        from extras.cudagraph import Graphed
        net.forward = Graphed(net.forward)
    vae, decode = vae or config.vae, None
    if vae:
        from extras.latents import Autoencoder
        decode = Autoencoder(vae, config.latent_mean, config.latent_std).to(device).decode
    dtype = from_rank0(lambda: pick_dtype(dtype, device))               # measured, so processes might differ
    return Pipeline(net, config, names, device, dtype, decode)


def generate(pipeline, seeds, batch_size, firsts=None, classes=None, on_step=None, **given):
    """(first, x, y) of each batch: images x (B, C, S, S) in [-1, 1] on the CPU, classes y (B,).

    Image k has seeds[k] and classes[k % len(classes)]; by default its class is seeds[k] modulo their number.
    firsts: the batches to draw, by the index of their first image; None: all. given: settings of the sampler.
    """
    settings, count = pipeline.config.sampler(**given), max(1, pipeline.net.num_classes)
    for first in range(0, len(seeds), batch_size) if firsts is None else firsts:
        batch = list(seeds[first:first + batch_size])
        labels = [seed % count for seed in batch]
        if classes:
            labels = [classes[k % len(classes)] for k in range(first, first + len(batch))]
        y = torch.tensor(labels, device=pipeline.device)
        noise = partial(noise_like_seed, batch, pipeline.shape)
        with autocast(pipeline.device, pipeline.dtype):
            x = sample(pipeline.net, noise().to(pipeline.device), y, **settings, noise=noise, on_step=on_step)
        if not x.isfinite().all():
            raise UserError(f"an image among seeds {batch[0]}..{batch[-1]} is not finite: "
                            "the model has diverged, or needs --dtype float32")
        yield first, pipeline.to_images(x), y.cpu()


# ---- a page, or many ----------------------------------------------------------------------------------

def draw_page(pipeline, seeds, options, classes, columns, titles):
    """Write options.out, a page of images. UserError, before the first is drawn, if it would be too large."""
    steps = pipeline.config.sampler(**options.given())["steps"]
    columns, rows = (steps, len(seeds)) if options.trajectory else (columns, -(-len(seeds) // columns))
    if max(columns, rows) * (max(64, pipeline.net.input_size) + 4) > LARGEST:
        raise UserError(f"{options.out}: {rows} rows of {columns} images are too many: use --out samples.npz")
    images, seen = [], {}               # seen: the title of a step -> what the model predicts there
    see = lambda i, t, x_hat: seen.update({f"{i + 1}: t {t:.2f}": x_hat})
    more = dict(classes=classes, on_step=see if options.trajectory else None, **options.given())
    batches = generate(pipeline, seeds, options.batch_size, **more)
    total = -(-len(seeds) // options.batch_size)
    for _, x, _ in tqdm(batches, total=total, unit="batch", disable=total == 1):
        if options.trajectory:
            columns, titles = len(seen), list(seen)
            seen_x = torch.stack(list(seen.values()), 1)                            # (B, columns, C, S, S)
            x = pipeline.to_images(seen_x.flatten(0, 1))
        images.append(x)
    image_grid(torch.cat(images), columns, titles=titles).save(options.out)


def save_arrays(path, **arrays):
    """An npz file, written whole or not at all."""
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
    atomic_write(path, write)


def draw_npz(pipeline, seeds, options, classes):
    """All images (arr_0: uint8, N H W C) and labels in one npz, as ADM and fid.py read them. Until it is
    complete, each batch is kept beside it, so that an interrupted run does not draw it again."""
    (rank, world), size = rank_and_world(), options.batch_size
    settings = pipeline.config.sampler(**options.given())
    inputs = [settings, seeds, classes, size, str(pipeline.dtype), options.vae]
    fingerprint = hashlib.sha256(json.dumps(inputs).encode())
    for value in pipeline.net.state_dict().values():
        fingerprint.update(value.cpu().float().numpy().tobytes())
    parts = Path(f"{options.out}.parts-{fingerprint.hexdigest()[:8]}")
    parts.mkdir(exist_ok=True)
    files = {first: parts / f"{first:09d}.npz" for first in range(0, len(seeds), size)}
    todo = [first for first in rank_batches(len(seeds), size) if not files[first].is_file()]
    batches = generate(pipeline, seeds, size, todo, classes, **options.given())
    for first, x, y in tqdm(batches, total=len(todo), unit="batch", disable=rank > 0):
        save_arrays(files[first], x=to_uint8(x).permute(0, 2, 3, 1).numpy(), y=y.numpy())
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        read = [dict(np.load(file)) for file in files.values()]
        x, y = (np.concatenate([part[name] for part in read]) for name in "xy")
        save_arrays(options.out, arr_0=x, labels=y, seeds=np.array(seeds))
        shutil.rmtree(parts)


# ---- the command line ---------------------------------------------------------------------------------

def newest_model(recipe):
    """The model of the recipe's run. Without a recipe: the latest model under runs/, or the shipped one."""
    if recipe:
        return f"runs/{recipe}"
    runs = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs else SHIPPED


def read_seeds(text):
    """Seeds from "0-63" or "3,5,8"."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        seeds = [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]
    except ValueError:
        seeds = []
    if not seeds or max(seeds) >= 2**63:
        raise UserError(f"no seeds in {text!r}; expected something like 0-63 or 3,5,8")
    return seeds


def main(options):
    world, suffix = rank_and_world()[1], Path(options.out).suffix.lower()
    rules = [(True, "images", (*PAGES, ".gif", ".npz")), (options.trajectory, "--trajectory", PAGES),
             (options.beside, "--beside", (".gif",)), (world > 1, "more than one process", (".npz",))]
    for applies, what, endings in rules:
        if applies and suffix not in endings:
            raise UserError(f"--out is {options.out}; for {what} it must end in {' or '.join(endings)}")
    check_writable(Path(options.out).parent)
    init_distributed()
    path = options.ckpt or newest_model(options.recipe)
    open_path = lambda path: open_pipeline(path, pick_device(options.device), options.dtype, options.recipe,
                                           options.vae, graph=True)
    pipeline = open_path(path)
    classes = [class_number(word, pipeline.names) for word in options.classes.split(",") if word]
    nfe, steps = pipeline.nfe(**options.given()), pipeline.config.sampler(**options.given())["steps"]
    titles = [pipeline.names[k] for k in classes] or pipeline.names         # one column per class
    columns, titles = (len(titles), titles) if 4 <= len(titles) <= 12 else (8, [])
    usual = 12 if options.trajectory else 20 if suffix == ".gif" else 8 * columns
    seeds = read_seeds(options.seeds or f"0-{(options.num or usual) - 1}")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if suffix == ".npz":
        draw_npz(pipeline, seeds, options, classes)
    elif suffix == ".gif":
        from extras.film import draw_film
        pipelines = [pipeline] + ([open_path(options.beside)] if options.beside else [])
        draw_film(pipelines, seeds, options, classes)
    else:
        draw_page(pipeline, seeds, options, classes, columns, titles)
    seconds = time.perf_counter() - start
    print0(f"{options.out}: {len(seeds)} images from {path}, {steps} steps, NFE {nfe} each, "
           f"{len(seeds) / seconds:.1f} images/s")
    leave_distributed()


if __name__ == "__main__":
    run(lambda: main(OPTIONS))
