"""Where a model of `shapes` loses variety: read the drawing's own numbers (place, size, angle, colours) back from the pictures.

    python experiments/pose.py --ckpt runs/shapes32              # spread of each number, as a share of that of real pictures
    python experiments/pose.py --price yes                       # what narrowing costs: FD-shapes of real pictures drawn too much alike

A line "from t" starts at real pictures with noise up to t and lets the sampler finish: a perfect model keeps the spread at 1 from every t,
and the largest t that still does tells which noise the model can not look through. "remembered" is the slope of the number read
after against that before: 1 near t = 0, where the picture still decides it, and 0 at t = 1.
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
import data
from config import fail, number_or_word, numbers, read_flags
from fid import Moments, SmallFeatures, frechet
from machine import pick_device
from sample import open_model
from sampler import sample

NAMES = ["x", "y", "size", "angle", "saturation", "value", "paper saturation", "paper value"]     # uniforms 1..4, 6, 7, 9, 10 of data.Shapes
COLUMNS = [1, 2, 3, 4, 6, 7, 9, 10]
TURNED = range(2, 7)                        # square, triangle, star, heart, cross: circles and rings have no angle, the moon hides its


@dataclass
class Options:
    ckpt: str = ""                          # a many-step or few-step model of shapes at 32x32
    price: bool = False                     # instead: what narrowing costs
    num: int = 1000                         # pictures for each line
    starts: str = "0.5,0.6,0.7,0.8,0.9"     # times at which real pictures with noise are handed over; then one line from pure noise
    steps: int = 20                         # of the sampler, from t = 1; fewer from earlier times
    extrapolation: str = "auto"             # kappa of the sampler
    train_steps: int = 2500                 # of the network that reads the numbers


def draws(seed, positions, change=()):
    """Pictures (B, 3, 32, 32), classes (B,) in turn, and the numbers (B, 8) in -1..1; change: pairs of a column and a function of its uniforms."""
    plain = data.uniforms

    def uniforms(*args):
        u = plain(*args)
        u[:, 0] = (positions % 8 + 0.5) / 8
        for column, function in change:
            u[:, column] = function(u[:, column])
        return u
    data.uniforms = uniforms
    try:
        x, y = data.Shapes(32, seed)[positions]
    finally:
        data.uniforms = plain
    return x, y, torch.from_numpy(2 * plain(seed, positions, 11)[:, COLUMNS] - 1).float()


def train_reader(steps):
    """A network from pictures (B, 3, 32, 32) to their numbers (B, 8)."""
    torch.manual_seed(0)
    widths = (3, 32, 64, 96)
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU(), nn.Linear(128, len(NAMES)))
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), unit="step", desc="reader"):
        x, _, u = draws(7, 128 * step + np.arange(128))
        loss = F.mse_loss(net(x + 0.02 * torch.randn_like(x)), u)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda x: net(data.eight_bit(x).float() / 127.5 - 1).detach()


def spread(read, y):
    """Standard deviation of each number within a class (8,), mean over the classes with an angle."""
    return torch.stack([read[y == c].std(0) for c in TURNED]).mean(0)


def price(num):
    """FD-shapes of `num` real pictures whose angle or place is drawn from a part of its range, against 2 num real ones."""
    features = SmallFeatures("shapes", (3, 32, 32))

    def moments(seed, count, change=()):
        all_rows = Moments(len(features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))["pool"][0]))
        for first in range(0, count, 1000):
            all_rows.add(features(data.eight_bit(draws(seed, first + np.arange(min(1000, count - first)), change)[0]))["pool"])
        return all_rows
    part = lambda share: lambda u: 0.5 + share * (u - 0.5)
    real = moments(1, 2 * num)
    for name, columns, shares in (("nothing", [4], [1]), ("angle", [4], [0.9, 0.8, 0.7]), ("place", [1, 2], [0.98, 0.96, 0.94])):
        for share in shares:
            print(f"{name:8} {share:4}  {frechet(moments(2, num, [(c, part(share)) for c in columns]), real).__round__(2)}", flush=True)


def main(argv=None):
    given = read_flags(Options, argv, __doc__)
    o = Options(**given)
    if o.price:
        return price(given.get("num", 16000))
    if not o.ckpt:
        fail("which model? --ckpt runs/shapes32")
    model, reader = open_model(o.ckpt, pick_device("cpu")), train_reader(o.train_steps)
    x, y, _ = draws(5, np.arange(o.num))
    z, before = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), reader(x)
    print(f"{'':12} spread: " + ", ".join(NAMES) + " | remembered: angle")
    for t in (*numbers(o.starts), 0.999):
        times = np.linspace(t, 0.05, max(3, round(o.steps * t))).tolist()
        kappa = number_or_word(o.extrapolation)
        after = torch.cat([sample(model.net, (t * z + (1 - t) * x)[i:i + 250], y[i:i + 250], times=times, kappa=kappa) for i in range(0, o.num, 250)])
        after = reader(after.float())
        kept = np.mean([np.polyfit(before[y == c, 3], after[y == c, 3], 1)[0] for c in TURNED])
        print(f"from t = {t:.3f} " + " ".join(f"{v:.2f}" for v in (spread(after, y) / spread(before, y)).tolist()) + f" | {kept:.2f}", flush=True)


if __name__ == "__main__":
    main()
