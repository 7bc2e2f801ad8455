"""How recognisable are the shapes that a model draws? A small classifier, trained on real shapes here and now, is the judge.

    python tests/recognise.py runs/shapes-few --steps 2 --num 2000

Prints the classifier's accuracy on held-out real shapes, its accuracy on drawn ones (the class that was asked for), and the
within-class variance of its features on drawn shapes as a share of that on real ones (1: as varied as the real ones).
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_model  # noqa: E402
from data import Shapes, noise_like_seed  # noqa: E402
from sampler import sample  # noqa: E402
from train import autocast, pick_device, pick_dtype  # noqa: E402


class Judge(nn.Module):
    """pictures (B, 3, S, S), S = 16, 32, 64, ... -> class scores (B, 8), features (B, 64)"""

    def __init__(self, size):
        super().__init__()
        layers, channels, width = [], 3, 32
        while size > 4:
            for inputs, stride in ((channels, 1), (width, 2)):
                layers += [nn.Conv2d(inputs, width, 3, stride, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            channels, width, size = width, min(64, 2 * width), size // 2
        self.features, self.head = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 64)), nn.Linear(64, 8)

    def forward(self, x):
        features = self.features(x)
        return self.head(F.silu(features)), features


def train_judge(size, steps=1000):
    """A Judge, and its accuracy on 4,000 shapes that it has not seen."""
    torch.manual_seed(0)
    judge, data = Judge(size), Shapes(size, seed=1)
    optimizer = torch.optim.AdamW(judge.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        x, y = data[step * 128 + np.arange(128)]
        x = x + 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)       # a little noise: the judge is not to look at single pixels
        loss = F.cross_entropy(judge(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    with torch.no_grad():
        x, y = Shapes(size, seed=2)[np.arange(4000)]
        return judge, (judge(x)[0].argmax(1) == y).float().mean().item()


@torch.no_grad()
def verdict(judge, x, y):
    """Accuracy on pictures x of the classes y, and their within-class variance of features as a share of real shapes'."""
    def spread(features, labels):
        return sum(features[labels == k].var(0).sum() for k in range(8)) / 8
    scores, features = judge(x)
    real_x, real_y = Shapes(x.shape[-1], seed=3)[np.arange(4000)]
    return (scores.argmax(1) == y).float().mean().item(), (spread(features, y) / spread(judge(real_x)[1], real_y)).item()


def pictures(ckpt, num, **given):
    """(x, y): num pictures by the model's recipe, classes in turn, seeds 0 .. num - 1."""
    device = pick_device("auto")
    net, config, _ = load_model(ckpt, device)
    shape, parts, y = (net.in_channels, net.input_size, net.input_size), [], torch.arange(num) % net.num_classes
    for first in range(0, num, 500):
        seeds = range(first, min(num, first + 500))
        with autocast(device, pick_dtype("auto", device)):
            parts.append(sample(net, noise_like_seed(seeds, shape).to(device), y[first:first + 500].to(device), **config.sampler(**given),
                                noise=lambda i: noise_like_seed(seeds, shape, i).to(device)).cpu())
    return torch.cat(parts), y


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--num", type=int, default=2000)
    options = parser.parse_args()
    judge, accuracy = None, None
    for ckpt in options.ckpt:
        x, y = pictures(ckpt, options.num, steps=options.steps)
        if judge is None:
            judge, accuracy = train_judge(x.shape[-1])
            print(f"the judge names {accuracy:.2%} of held-out real shapes")
        right, variety = verdict(judge, x, y)
        print(f"{ckpt}: {right:.1%} of {options.num} recognised, within-class variance {variety:.2f} of the real one")
