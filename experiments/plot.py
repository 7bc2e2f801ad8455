"""The explanation's pictures: two curves that one loss draws, and what extrapolation does (pip install -r requirements-dev.txt).

    python experiments/plot.py paths                            # assets/paths.png: a 2-D mixture, exact and learnt, lambda 0 and 1; three minutes
    python experiments/plot.py kappa --ckpt runs/shapes32       # assets/kappa.png: x_hat after each step, plain and extrapolated
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import fail, read_flags
from data import contact_sheet
from machine import pick_device
from objective import Objective
from sample import generate, open_model
from sampler import sample

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass
class Options:
    ckpt: str = ""                              # kappa: a many-step model
    steps: int = 8                              # kappa: of sampling
    extrapolation: float = 0.5                  # kappa: of the second row; the first has 0, the last is the first at 80 steps
    train_steps: int = 4000                     # paths: of training, for each of the two networks
    out: str = ""                               # picture to write; empty: TASK.png in assets/


# ---- a mixture of Gaussians, where everything is known --------------------------------------------------------------

CENTRES = torch.tensor([[1.2, 0.9], [-1.3, 0.7], [-0.3, -1.2], [0.9, -0.5]])
WIDTH = 0.12


def mixture(count, generator):
    kind = torch.randint(len(CENTRES), (count,), generator=generator)
    return CENTRES[kind] + WIDTH * torch.randn(count, 2, generator=generator)


def exact(x_t, t, y=None):
    """The velocity E[z - x | x_t] of the linear path: each Gaussian's own regression, weighted by how likely it is."""
    t = t.view(-1, 1, 1).double()
    centres = CENTRES.double()[None]                                                                 # (1, K, 2)
    spread = t**2 + ((1 - t) * WIDTH) ** 2                                                           # (B, 1, 1)
    off = x_t.double()[:, None] - (1 - t) * centres                                                  # (B, K, 2)
    likely = (-off.square().sum(-1, keepdim=True) / spread / 2).softmax(1)                           # (B, K, 1)
    x_hat = centres + (1 - t) * WIDTH**2 / spread * off
    z_hat = t / spread * off
    return (likely * (z_hat - x_hat)).sum(1).to(x_t)


class Small(nn.Module):
    """Three layers on (x_t, t): enough for two dimensions."""
    num_classes = None

    def __init__(self, width=192):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

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
        objective(net, x, y, *objective.draw(x, y, generator), teacher).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net.requires_grad_(False)


def travel(net, z, **settings):
    """The points of the sampler's way: z, then x after each step."""
    points, y = [z], torch.zeros(len(z), dtype=torch.int64)
    def heard(x_t, t, y):
        points.append(x_t)
        return net(x_t, t, y)
    end = sample(heard, z, y, "linear", **settings)
    return torch.stack([z, *points[2:], end])                              # the first call hears z itself


def paths(options):
    """Two networks on one mixture: lambda 0 learns the direction at every point of the way, lambda 1 where the way ends."""
    torch.manual_seed(0)
    # In two dimensions the root of the square would find a median, not the mean that the flow is: a large c makes it the square.
    many = fit(Objective("linear", huber=5.0, weight="none", label_drop=0.0), Small(), options.train_steps)
    few = Small()
    few.load_state_dict(many.state_dict())
    recipe = dict(lam=1.0, zeta=1.0, style="fc-vs-xz", enhance_range=(0.0, 1.0), huber=5.0, weight="none", label_drop=0.0, derivative="jvp")
    few = fit(Objective("linear", **recipe), few, options.train_steps, many)

    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    ways = {"exact": travel(exact, z, steps=400, gap=(0.0, 0.001)), "lambda 0, 40 steps": travel(many, z, steps=40, gap=(0.0, 0.02)),
            "lambda 0, 1 step": travel(many, z, steps=1, gap=(0.0, 0.0)), "lambda 1, 1 step": travel(few, z, steps=1, gap=(0.0, 0.0))}
    off = {name: (way[-1] - ways["exact"][-1]).norm(dim=1).median().item() for name, way in ways.items()}
    print(", ".join(f"{name}: {value:.3f}" for name, value in off.items()), "(median distance from the exact end)")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), sharex=True, sharey=True)
    colour = ((CENTRES[None] - ways["exact"][-1][:, None]).norm(dim=-1).argmin(1))
    for panel, (name, way) in zip(axes, ways.items()):
        for kind in range(len(CENTRES)):
            those = (colour == kind).nonzero()[:15, 0]
            panel.plot(*way[:, those].permute(2, 0, 1).numpy(), color=f"C{kind}", linewidth=0.7, alpha=0.7)
            panel.scatter(*way[0, those].T.numpy(), s=8, facecolors="none", edgecolors=f"C{kind}", linewidths=0.7)
            panel.scatter(*way[-1, colour == kind][:250].T.numpy(), s=1.5, color=f"C{kind}")
        panel.set_title("exact\n(the flow's equation, 400 steps)" if name == "exact" else f"{name}\n{off[name]:.2f} from the exact end", fontsize=10)
        panel.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.86, 0.03)
    figure.savefig(options.out or ASSETS / "paths.png", dpi=110)


# ---- extrapolation --------------------------------------------------------------------------------------------------

def kappa(options):
    """Rows: what the model thinks the picture is after each step; the last row's last picture is the end that both aim at."""
    model = open_model(options.ckpt, pick_device("cpu"))
    strips, ends = [], []
    for title, steps, k in (("kappa 0", options.steps, 0.0), (f"kappa {options.extrapolation:g}", options.steps, options.extrapolation), ("kappa 0, 80 steps", 80, 0.0)):
        seen = []
        for _ in generate(model, [3, 12, 21], 64, steps=steps, extrapolation=k, on_step=lambda i, t, x: seen.append(x.cpu())):
            pass
        ends.append(seen[-1])
        strips.append((title, [contact_sheet(x, 1, side=64) for x in (seen if steps == options.steps else seen[9::10])]))
    (width, height), columns = strips[0][1][0].size, options.steps
    page = Image.new("RGB", (columns * (width + 4), len(strips) * (height + 22)), "white")
    for row, (title, sheets) in enumerate(strips):
        top = row * (height + 22)
        ImageDraw.Draw(page).text((4, top + 5), f"{title}: x_hat after {'steps 1 to ' + str(columns) if len(strips) - 1 > row else 'every tenth step'}", fill="black")
        for column, sheet in enumerate(sheets[:columns]):
            page.paste(sheet, (column * (width + 4), top + 22))
    off = [(end - ends[-1]).square().mean().sqrt().item() for end in ends[:2]]
    print(f"root mean square from the 80 steps' end: kappa 0 {off[0]:.3f}, kappa {options.extrapolation:g} {off[1]:.3f}")
    page.save(options.out or ASSETS / "kappa.png")


if __name__ == "__main__":
    task, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("-h", [])
    try:
        options = Options(**read_flags(Options, rest if task != "-h" else ["-h"], __doc__))
        tasks = {"paths": paths, "kappa": kappa}
        if task not in tasks or task == "kappa" and not options.ckpt:
            raise ValueError("expected paths, or kappa --ckpt RUN")
        tasks[task](options)
        print(f"look at {options.out or ASSETS / f'{task}.png'}")
    except ValueError as error:
        fail(error)
