"""The two figures of the idea. They need matplotlib.

    python experiments/plot.py              # assets/paths.png: one loss learns the direction of a path or its
                                            # end; a mixture in the plane, three minutes
    python experiments/plot.py straight     # assets/straight.png: every transport is the straight path, seen
                                            # at another scale and by another clock
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import read_flags, setting
from engine import run
from objective import TRANSPORTS, Objective
from sampler import sample, tau_at

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ASSETS = Path(__file__).resolve().parent.parent / "assets"
CENTRES = torch.tensor([[1.2, 0.9], [-1.3, 0.7], [-0.3, -1.2], [0.9, -0.5]])
ON_A_LINE = CENTRES[:3, :1]
WIDTH = 0.12


@dataclass
class Options:
    train_steps: int = setting(4000, "of training, for each of the two networks")
    out: str = setting("", "figure to write; empty: into assets/")


# ---- a mixture of Gaussians, where everything is known ------------------------------------------------

def mixture(count, generator):
    """Points (count, 2)."""
    kind = torch.randint(len(CENTRES), (count,), generator=generator)
    return CENTRES[kind] + WIDTH * torch.randn(count, 2, generator=generator)


def exact(x_t, t, y=None, centres=CENTRES):
    """The velocity E[z - x | x_t] of the linear path: each Gaussian's own, weighted by how likely it is."""
    t = t.view(-1, 1, 1).double()
    centres = centres.double()[None]                                                # (1, K, 2)
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


# ---- the figures --------------------------------------------------------------------------------------

def draw_paths(ways, off, out):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.25), sharex=True, sharey=True)
    nearest = (CENTRES[None] - ways["exact"][-1][:, None]).norm(dim=-1).argmin(1)
    for panel, (name, way) in zip(axes, ways.items()):
        for kind in range(len(CENTRES)):
            those, colour = (nearest == kind).nonzero()[:, 0], f"C{kind}"
            lines = way[:, those[:15]]
            panel.plot(*lines.permute(2, 0, 1).numpy(), color=colour, linewidth=0.7, alpha=0.7)
            panel.scatter(*lines[0].T.numpy(), s=8, facecolors="none", edgecolors=colour, linewidths=0.7)
            panel.scatter(*way[-1, those[:250]].T.numpy(), s=1.5, color=colour)
        below = f"median {off[name]:.2f} from the exact end" if name in off else "400 steps of the exact flow"
        panel.set_title(f"{name}\n{below}", fontsize=10)
        panel.set(xlim=(-2.7, 2.7), ylim=(-1.9, 2.7), xticks=[], yticks=[], aspect="equal")
    for size, face, label in ((8, "none", "noise"), (4, "black", "where it ends")):
        axes[0].scatter([], [], s=size, facecolors=face, edgecolors="black", linewidths=0.7, label=label)
    axes[0].legend(fontsize=8, loc="lower right", frameon=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.88, 0.03)
    figure.savefig(out, dpi=110)


def straight(transport, taus, z):
    """The sampler's points on a transport: t (N,), x (N, B). Data on a line, with their exact denoiser."""
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    times, points = np.interp(taus, tau_at(transport, t), t), []

    def exact_net(x, net_time, y):
        t = torch.full((len(x),), times[len(points)], dtype=x.dtype)
        points.append(x[:, 0])
        alpha, gamma, alpha_hat, gamma_hat = transport.at(t, x)                         # (B, 1)
        tau, u = alpha / (alpha + gamma), x / (alpha + gamma)
        v = exact(u, tau, centres=ON_A_LINE)
        x_hat = u - tau * v
        return transport.sign * (alpha_hat * (x_hat + v) + gamma_hat * x_hat)
    x = z[:, None] * (transport.alpha(torch.tensor(times[0])) + transport.gamma(torch.tensor(times[0])))
    sample(exact_net, x, torch.zeros(len(z)).long(), transport, times=times.tolist(), kappa="auto")
    return torch.from_numpy(times), torch.stack(points)


def main_straight(out):
    """The paths that differ, and the one that they all are. Prints by how much any transport is off it."""
    taus, z = np.linspace(0.985, 0.015, 40), torch.linspace(-2.2, 2.2, 14, dtype=torch.float64)
    found = {name: straight(row, taus, z) for name, row in TRANSPORTS.items()}
    of_u = {name: x / (row.alpha(t) + row.gamma(t))[:, None]
            for (name, row), (t, x) in zip(TRANSPORTS.items(), found.values())}
    off = max((u - of_u["linear"]).abs().max().item() for u in of_u.values())
    print(f"{len(found)} transports, one path: at equal tau their u differ by at most {off:.0e}")
    figure, panels = plt.subplots(1, 6, figsize=(14, 3.4), width_ratios=[1] * 5 + [1.9])
    kind = (of_u["linear"][-1][:, None] - ON_A_LINE[:, 0]).abs().argmin(1)
    lines = {f"{name}: x": found[name] for name in ("linear", "trigflow", "edm", "random", "ddpm")}
    lines[f"all nine: u = x / (alpha + gamma), equal to {off:.0e}"] = torch.from_numpy(taus), of_u["linear"]
    for panel, (title, (t, x)) in zip(panels, lines.items()):
        for k in range(len(z)):
            panel.plot(t, x[:, k], color=f"C{kind[k]}", linewidth=1)
        panel.set_title(title, fontsize=10)
        panel.set(xticks=[0, 1], yticks=[], xlim=(1.02, -0.02))
        panel.set_xlabel("tau = alpha / (alpha + gamma)" if panel is panels[-1] else "t", labelpad=-10)
    for k, (name, u) in enumerate(of_u.items()):        # every ninth call of each of the nine
        those = slice(k, None, len(of_u))
        points = taus[those].repeat(len(z)), u[those].flatten()
        panels[-1].scatter(*points, s=9, marker="os^vD*Pp<"[k], color="black", linewidths=0, label=name)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handletextpad=0)
    figure.subplots_adjust(0.01, 0.1, 0.91, 0.9, 0.08)
    figure.savefig(out, dpi=110)


def main_paths(out, train_steps):
    """Two networks on one mixture: lam 0 learns the direction at every point, lam 1 where the path ends."""
    torch.manual_seed(0)
    # In two dimensions the root of the square finds a median, and the flow is a mean. A large c makes it the
    # square.
    common = dict(huber=5.0, time_weight="none", label_drop=0.0)
    many = fit(Objective("linear", **common), Small(), train_steps)
    few = Small()
    few.load_state_dict(many.state_dict())
    tuning = Objective("linear", lam=1.0, zeta=1.0, style="fc-vs-xz", enhance_range=(0.0, 1.0),
                       derivative="jvp", **common)
    few = fit(tuning, few, train_steps, many)

    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    ways = {"exact": travel(exact, z, steps=400, gap=(0.0, 0.001)),
            "lambda 0, 40 steps": travel(many, z, steps=40, gap=(0.0, 0.02)),
            "lambda 0, 1 step": travel(many, z, steps=1, gap=(0.0, 0.0)),
            "lambda 1, 1 step": travel(few, z, steps=1, gap=(0.0, 0.0))}
    off = {name: (way[-1] - ways["exact"][-1]).norm(dim=1).median().item()
           for name, way in ways.items() if name != "exact"}
    distances = ", ".join(f"{name}: {value:.3f}" for name, value in off.items())
    print(f"{distances} (median distance from the exact end)")
    draw_paths(ways, off, out)


def main(name, options):
    out = options.out or str(ASSETS / f"{name}.png")
    if name == "straight":
        main_straight(out)
    else:
        main_paths(out, options.train_steps)
    print(f"look at {out}")


if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if word in ("paths", "straight")]
    words = [word for word in sys.argv[1:] if word not in names]
    run(lambda: main(*names or ["paths"], Options(**read_flags(Options, words, __doc__))))
