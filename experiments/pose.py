"""Where a model of `shapes` loses variety: place, size, angle and colours are read back from its images.

    python experiments/pose.py --ckpt runs/shapes32     # spread of each number over that of real images
    python experiments/pose.py --price                  # FD-shapes of real images drawn too much alike

A line "from t" starts at real images with noise up to t and lets the sampler finish. A perfect model keeps
the spread at 1 from every t; the largest t that still does tells which noise the model cannot look through.
"remembered" is the slope of the angle read after against the angle before: 1 near t = 0, where the image
still decides it, and 0 at t = 1.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import shapes
from config import UserError, read_flags, setting
from data import to_uint8
from engine import pick_device, run
from features import SmallFeatures
from fid import collect, frechet
from sample import open_pipeline
from sampler import sample

# What is read, and the column of the uniforms of shapes.Shapes that decides it.
NUMBERS = {"x": 1, "y": 2, "size": 3, "angle": 4, "saturation": 6, "value": 7, "paper saturation": 9,
           "paper value": 10}
COLUMNS, ANGLE = list(NUMBERS.values()), list(NUMBERS).index("angle")
TURNED = range(2, 7)        # the classes with an angle: square, triangle, star, heart, cross


@dataclass
class Options:
    ckpt: str = setting("", "a many-step or few-step model of shapes at 32x32")
    price: bool = setting(False, "instead: what narrowing costs")
    num: int | None = setting(None, "images a line; not given: 1000, and 16000 with --price")
    starts: tuple = setting((0.5, 0.6, 0.7, 0.8, 0.9), "times at which noisy real images are handed over")
    steps: int = setting(20, "of the sampler, from t = 1; fewer from earlier times")
    kappa: float | str = setting("auto", "extrapolation: a number, or auto")
    train_steps: int = setting(2500, "of the network that reads the numbers")


def draws(seed, positions, change=()):
    """Images (B, 3, 32, 32), classes (B,) in turn, and the numbers (B, 8) in -1..1 that they are drawn from.

    change: pairs of a column and a function of its uniforms.
    """
    plain = shapes.uniforms

    def uniforms(*args):
        u = plain(*args)
        u[:, 0] = (positions % 8 + 0.5) / 8
        for column, function in change:
            u[:, column] = function(u[:, column])
        return u
    shapes.uniforms = uniforms
    try:
        x, y = shapes.Shapes(32, seed)[positions]
    finally:
        shapes.uniforms = plain
    return x, y, torch.from_numpy(2 * plain(seed, positions, 11)[:, COLUMNS] - 1).float()


def train_reader(steps):
    """A network from images (B, 3, 32, 32) to their numbers (B, 8)."""
    torch.manual_seed(0)
    widths = (3, 32, 64, 96)
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())]
    layers += [nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU(), nn.Linear(128, len(COLUMNS))]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), unit="step", desc="reader"):
        x, _, u = draws(7, 128 * step + np.arange(128))
        loss = F.mse_loss(net(x + 0.02 * torch.randn_like(x)), u)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda x: net(to_uint8(x).float() / 127.5 - 1).detach()


def spread(read, y):
    """Standard deviation of each number within a class (8,), mean over the classes with an angle."""
    return torch.stack([read[y == c].std(0) for c in TURNED]).mean(0)


def remembered(before, after, y):
    """Slope of the angle after against the angle before, mean over the classes with an angle."""
    slopes = [np.polyfit(before[y == c, ANGLE], after[y == c, ANGLE], 1)[0] for c in TURNED]
    return float(np.mean(slopes))


def price(num):
    """FD-shapes of `num` real images, angle or place from a part of its range, against 2 num real ones."""
    features = SmallFeatures("shapes", (3, 32, 32))

    def moments(seed, count, change=()):
        starts = range(0, count, 1000)
        places = ((first, first + np.arange(min(1000, count - first))) for first in starts)
        batches = ((first, to_uint8(draws(seed, place, change)[0])) for first, place in places)
        return collect(batches, count, features).moments()
    real = moments(1, 2 * num)
    for name, columns, shares in (("nothing", [4], [1]), ("angle", [4], [0.9, 0.8, 0.7]),
                                  ("place", [1, 2], [0.98, 0.96, 0.94])):
        for share in shares:
            narrow = lambda u, share=share: 0.5 + share * (u - 0.5)
            score = frechet(moments(2, num, [(column, narrow) for column in columns]), real)
            print(f"{name:8} {share:4}  {score:.2f}", flush=True)


def main(options):
    if options.price:
        price(options.num or 16000)
        return
    if not options.ckpt:
        raise UserError("which model? give --ckpt, such as --ckpt runs/shapes32")
    model, reader = open_pipeline(options.ckpt, pick_device("cpu")), train_reader(options.train_steps)
    x, y, _ = draws(5, np.arange(options.num or 1000))
    z, before = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), reader(x)
    print(f"{'':12} spread: {', '.join(NUMBERS)} | remembered: angle")
    for t in (*options.starts, 0.999):
        times = np.linspace(t, 0.05, max(3, round(options.steps * t))).tolist()
        batches = zip((t * z + (1 - t) * x).split(250), y.split(250))
        drawn = [sample(model.net, *batch, times=times, kappa=options.kappa) for batch in batches]
        after = reader(torch.cat(drawn).float())
        shares = " ".join(f"{share:.2f}" for share in (spread(after, y) / spread(before, y)).tolist())
        print(f"from t = {t:.3f} {shares} | {remembered(before, after, y):.2f}", flush=True)


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
