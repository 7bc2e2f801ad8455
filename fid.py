"""Scores of generated pictures that need no download: FD-shapes and FD-mnist.

    python fid.py --ckpt runs/shapes-few --steps 2              # Frechet distance, accuracy and variety of 10,000 pictures
    python fid.py --train yes --data shapes --image_size 32     # how the feature network in assets/ was made

FD-NAME is the Frechet distance between the features of generated and of real pictures, as FID is, but the features are those of a
small classifier trained here on the data set itself: it compares models of this repository, and it is NOT FID. Beside it stand the
floor (as many other real pictures instead of generated ones), the share of pictures that the classifier names as the class that was
asked for, and the variety: the within-class variance of the features as a share of that of real pictures (1: as varied).
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import load_model, write_safely
from config import SamplerFlags, fail, read_flags
from data import noise_like_seed, open_dataset
from sampler import count_nfe, sample, time_grid
from train import autocast, pick_device, pick_dtype

ASSETS = Path(__file__).parent / "assets"


@dataclass
class Options(SamplerFlags):
    ckpt: str = ""                              # a model.safetensors or the folder of a run
    num: int = 10000                            # pictures, generated and real
    seed: int = 0                               # the generated pictures are those of seeds seed * num ... (seed + 1) * num - 1
    data: str = ""                              # the real pictures; empty: what the model was trained on
    data_dir: str = "data"                      # where mnist is kept
    image_size: int = 0                         # with --train: side of the pictures
    train: bool = False                         # yes: train the feature network instead
    batch_size: int = 500                       # pictures at a time


# ---- the distance -------------------------------------------------------------------------------------------------

class Moments:
    """Mean and covariance of rows that arrive in batches, in float64 (Chan, Golub, LeVeque 1983)."""

    def __init__(self, width):
        self.n, self.mean, self.scatter = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows):
        rows = rows.double().cpu()                                                                   # (B, width)
        n, mean = len(rows), rows.mean(0)
        off, gap = rows - mean, mean - self.mean
        self.scatter += off.T @ off + torch.outer(gap, gap) * (self.n * n / (self.n + n))
        self.mean += gap * (n / (self.n + n))
        self.n += n

    @property
    def covariance(self):
        return self.scatter / (self.n - 1)


def frechet(a, b):
    """The squared Frechet distance of two Gaussians with these Moments: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), symmetric and so exact without sqrtm.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


# ---- the feature network ------------------------------------------------------------------------------------------

class SmallNet(nn.Module):
    """Pictures (B, C, S, S) in [-1, 1] to class scores (B, classes) and features (B, 64)."""

    def __init__(self, shape, classes):
        super().__init__()
        channels, size, _ = shape
        layers, width = [], 32
        while size > 4:
            for inputs, stride in ((channels, 1), (width, 2)):
                layers += [nn.Conv2d(inputs, width, 3, stride, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            channels, width, size = width, min(64, 2 * width), (size + 1) // 2
        self.features, self.head = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 64)), nn.Linear(64, classes)

    def forward(self, x):
        features = self.features(x)                                                                  # (B, 64)
        return self.head(F.silu(features)), features


def asset(kind, shape):
    return ASSETS / f"features-{kind}{shape[-1]}.safetensors"


def train_features(data, kind, steps=1500):
    """Train a SmallNet on the stream `data`, save it in half precision, and print its accuracy on pictures it has not seen."""
    torch.manual_seed(0)
    x_test, y_test = data.hold_out(4000)
    net = SmallNet(data.shape, len(data.names))
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), unit="step"):
        x, y = data[step * 128 + np.arange(128)]
        x = x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)       # a little noise: it is not to look at single pixels
        loss = F.cross_entropy(net(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path = asset(kind, data.shape)
    path.parent.mkdir(exist_ok=True)
    tensors = {name: value.half() for name, value in net.state_dict().items()}
    accuracy = f"{(load_features_from(tensors, data.shape, len(data.names))(x_test)[0].argmax(1) == y_test).float().mean().item():.4f}"
    write_safely(path, lambda file: safetensors.torch.save_file(tensors, file, {"accuracy": accuracy, "held_out": str(len(y_test))}))
    print(f"{path}: names {accuracy} of {len(y_test)} held-out real pictures. Next: python fid.py --ckpt runs/{kind} --steps 20")


def load_features_from(tensors, shape, classes):
    net = SmallNet(shape, classes)
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    return net.eval().requires_grad_(False)


def load_features(kind, shape, classes):
    """The feature network in assets/ for pictures of this shape. ValueError says how to make it."""
    path = asset(kind, shape)
    if not path.is_file():
        raise ValueError(f"no {path.name} in assets/: python fid.py --train yes --data {kind} --image_size {shape[-1]} makes it")
    return load_features_from(safetensors.torch.load_file(path), shape, classes)


# ---- the score ----------------------------------------------------------------------------------------------------

class Score:
    """Collects pictures: moments of their features, and the moments of each class."""

    def __init__(self, features, classes):
        self.features, self.all, self.by_class, self.right = features, Moments(64), [Moments(64) for _ in range(classes)], 0

    def add(self, x, y):
        scores, features = self.features(x.float().cpu())
        self.all.add(features)
        for k in y.unique().tolist():
            self.by_class[k].add(features[y == k])
        self.right += (scores.argmax(1) == y).sum().item()

    @property
    def accuracy(self):
        return self.right / self.all.n

    @property
    def spread(self):
        return sum(m.covariance.trace().item() for m in self.by_class) / len(self.by_class)


def draw_pictures(net, config, seeds, device, dtype, batch_size, **given):
    """x, y in batches: picture k from seeds[k], classes in turn."""
    shape, settings = (net.in_channels, net.input_size, net.input_size), config.sampler(**given)
    for first in tqdm(range(0, len(seeds), batch_size), unit_scale=batch_size, unit="image"):
        part = seeds[first:first + batch_size]
        y = torch.tensor(part) % max(1, net.num_classes)
        with autocast(device, dtype):
            yield sample(net, noise_like_seed(part, shape).to(device), y.to(device), **settings,
                         noise=lambda i, part=part: noise_like_seed(part, shape, i).to(device)).cpu(), y


def evaluate(options):
    """The results as a dict: FD and its floor, accuracy, variety, and all that decides them."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    net, config, names = load_model(options.ckpt, device)
    source = options.data or config.data
    kind = "shapes" if source == "shapes" else "mnist"
    data = open_dataset(source, net.input_size if kind == "shapes" else None, 1000, config.labels, options.data_dir)
    features = load_features(kind, data.shape, len(names))
    num = min(options.num, len(data) // 2) if hasattr(data, "__len__") else options.num
    real, other, drawn = (Score(features, len(names)) for _ in range(3))
    for start, score in ((0, real), (num, other)):
        for first in range(start, start + num, options.batch_size):
            score.add(*data[np.arange(first, min(first + options.batch_size, start + num))])
    for x, y in draw_pictures(net, config, range(options.seed * num, (options.seed + 1) * num), device, dtype, options.batch_size, **options.given()):
        drawn.add(x, y)
    settings = config.sampler(**options.given())
    times = time_grid(settings["steps"], settings["schedule"], settings["gap"], settings["order"])
    return {f"FD-{kind}": round(frechet(drawn.all, real.all), 4), "floor": round(frechet(other.all, real.all), 4), "accuracy": round(drawn.accuracy, 4),
            "variety": round(drawn.spread / real.spread, 3), "real_accuracy": round(real.accuracy, 4), "N": num, "seed": options.seed,
            "NFE": count_nfe(times, settings["transport"], settings["order"], settings["cfg_scale"], settings["cfg_interval"]),
            "sampler": settings, "ckpt": str(options.ckpt), "dtype": str(dtype)[6:], "device": str(device)}


def main(options):
    if options.train:
        kind = options.data.partition(":")[0] or "shapes"
        train_features(open_dataset(options.data or "shapes", options.image_size or None, 1, root=options.data_dir), "mnist" if kind == "npz" else kind)
        return
    if not options.ckpt:
        raise ValueError("which model? give --ckpt, such as --ckpt runs/shapes-few")
    print(json.dumps(evaluate(options)))


if __name__ == "__main__":
    try:
        main(Options(**read_flags(Options, sys.argv[1:], __doc__)))
    except ValueError as error:
        fail(error)
