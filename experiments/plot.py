"""The figure of the idea: one loss learns the direction of a path, or its end. It wants matplotlib.

    python experiments/plot.py              # assets/paths.png: a 2-D mixture, exact and learnt; three minutes
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import read_flags, setting
from engine import run
from objective import Objective
from sampler import sample

ASSETS = Path(__file__).resolve().parent.parent / "assets"
CENTRES = torch.tensor([[1.2, 0.9], [-1.3, 0.7], [-0.3, -1.2], [0.9, -0.5]])
WIDTH = 0.12


@dataclass
class Options:
    train_steps: int = setting(4000, "of training, for each of the two networks")
    out: str = setting(str(ASSETS / "paths.png"), "figure to write")


# ---- a mixture of Gaussians, where everything is known ------------------------------------------------

def mixture(count, generator):
    """Points (count, 2)."""
    kind = torch.randint(len(CENTRES), (count,), generator=generator)
    return CENTRES[kind] + WIDTH * torch.randn(count, 2, generator=generator)


def exact(x_t, t, y=None):
    """The velocity E[z - x | x_t] of the linear path: each Gaussian's own, weighted by how likely it is."""
    t = t.view(-1, 1, 1).double()
    centres = CENTRES.double()[None]                                                # (1, K, 2)
    spread = t**2 + ((1 - t) * WIDTH) ** 2                                          # (B, 1, 1)
    off = x_t.double()[:, None] - (1 - t) * centres                                 # (B, K, 2)
    likely = (-off.square().sum(-1, keepdim=True) / spread / 2).softmax(1)          # (B, K, 1)
    x_hat = centres + (1 - t) * WIDTH**2 / spread * off
    z_hat = t / spread * off
    return (likely * (z_hat - x_hat)).sum(1).to(x_t)


class Small(nn.Module):
    """Four layers on (x_t, t): enough for two dimensions."""
    num_classes = None

    def __init__(self, width=192):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t, t, y):
        angle = t[:, None] * torch.arange(1, 9) * torch.pi / 4
        return self.layers(torch.cat([x_t, angle.sin(), angle.cos()], -1))


def fit(objective, net, steps, teacher=None):
    """The network after so many steps of 512 points."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), unit="step"):
        x = mixture(512, generator)
        y = torch.zeros(len(x), dtype=torch.int64)
        objective(net, x, y, *objective.draw(x, generator), teacher).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net.requires_grad_(False)


def travel(net, z, **settings):
    """The points of the sampler's way: z, then x after each step."""
    points, y = [], torch.zeros(len(z), dtype=torch.int64)

    def noted(x_t, t, y):
        points.append(x_t)
        return net(x_t, t, y)
    end = sample(noted, z, y, "linear", **settings)
    return torch.stack([*points, end])                                              # (steps + 1, B, 2)


# ---- the figure ---------------------------------------------------------------------------------------

def draw(ways, off, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), sharex=True, sharey=True)
    nearest = (CENTRES[None] - ways["exact"][-1][:, None]).norm(dim=-1).argmin(1)
    for panel, (name, way) in zip(axes, ways.items()):
        for kind in range(len(CENTRES)):
            those, colour = (nearest == kind).nonzero()[:, 0], f"C{kind}"
            lines = way[:, those[:15]]
            panel.plot(*lines.permute(2, 0, 1).numpy(), color=colour, linewidth=0.7, alpha=0.7)
            panel.scatter(*lines[0].T.numpy(), s=8, facecolors="none", edgecolors=colour, linewidths=0.7)
            panel.scatter(*way[-1, those[:250]].T.numpy(), s=1.5, color=colour)
        below = f"{off[name]:.2f} from the exact end" if name in off else "(the flow's equation, 400 steps)"
        panel.set_title(f"{name}\n{below}", fontsize=10)
        panel.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.86, 0.03)
    figure.savefig(out, dpi=110)


def main(options):
    """Two networks on one mixture: lam 0 learns the direction at every point, lam 1 where the path ends."""
    torch.manual_seed(0)
    # In two dimensions the root of the square finds a median, and the flow is a mean. A large c makes it the
    # square.
    common = dict(huber=5.0, time_weight="none", label_drop=0.0)
    many = fit(Objective("linear", **common), Small(), options.train_steps)
    few = Small()
    few.load_state_dict(many.state_dict())
    tuning = Objective("linear", lam=1.0, zeta=1.0, style="fc-vs-xz", enhance_range=(0.0, 1.0),
                       derivative="jvp", **common)
    few = fit(tuning, few, options.train_steps, many)

    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    ways = {"exact": travel(exact, z, steps=400, gap=(0.0, 0.001)),
            "lambda 0, 40 steps": travel(many, z, steps=40, gap=(0.0, 0.02)),
            "lambda 0, 1 step": travel(many, z, steps=1, gap=(0.0, 0.0)),
            "lambda 1, 1 step": travel(few, z, steps=1, gap=(0.0, 0.0))}
    off = {name: (way[-1] - ways["exact"][-1]).norm(dim=1).median().item()
           for name, way in ways.items() if name != "exact"}
    distances = ", ".join(f"{name}: {value:.3f}" for name, value in off.items())
    print(f"{distances} (median distance from the exact end)")
    draw(ways, off, options.out)
    print(f"look at {options.out}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "paths"]      # the figure's name may be given, too
    run(lambda: main(Options(**read_flags(Options, words, __doc__))))
