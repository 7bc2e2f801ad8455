"""How the time of a training step grows with tokens, width, depth and batch, beside the arithmetic: assets/cost.png.

    python experiments/cost.py                                  # a few minutes; matplotlib is in requirements-dev.txt

The line is proportional to the flops, through the last point of each panel.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import product_rate, timed, train_step
from config import Config, fail, read_flags
from machine import pick_device, pick_dtype
from model import DiT
from report import flops_per_image

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BASE = dict(tokens=64, width=256, depth=6, batch=32)
SWEEPS = {"tokens": (16, 64, 256, 576, 1024), "width": (64, 128, 256, 512, 768), "depth": (1, 2, 4, 8, 16), "batch": (1, 4, 16, 64, 256)}


@dataclass
class Options:
    out: str = str(ASSETS / "cost.png")         # picture to write
    seconds: float = 2                          # of measuring, for each point
    compile: bool = False                       # torch.compile
    device: str = "auto"                        # cuda, mps or cpu
    dtype: str = "auto"                         # bfloat16 or float32


def measure(options, device, dtype, tokens, width, depth, batch):
    """Milliseconds and flops of one training step, lambda 0."""
    torch._dynamo.reset()
    net = DiT(round(tokens**0.5), 1, 4, width, depth, max(1, width // 64), num_classes=8).to(device)
    step, units = train_step(Config(), net, batch, device, dtype, options.compile)
    return timed(step, device, options.seconds)[0] * 1e3, units * batch * flops_per_image(net)


def main(options):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    rate = product_rate(device, dtype)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7))
    bar = tqdm(total=sum(map(len, SWEEPS.values())), unit="point")
    rows = [f"| varied | value | GFLOP a step | ms | of the product rate ({rate / 1e12:.3g} TFLOP/s) |", "|---|---|---|---|---|"]
    for panel, (name, values) in zip(axes, SWEEPS.items()):
        points = []
        for value in values:
            points.append(measure(options, device, dtype, **{**BASE, name: value}))
            ms, flops = points[-1]
            rows.append(f"| {name} | {value} | {flops / 1e9:.1f} | {ms:.1f} | {flops / ms / rate * 1e3:.0%} |")
            bar.update()
        factor = points[-1][0] / points[-1][1]
        panel.plot(values, [ms for ms, _ in points], marker="o", markersize=4, label="measured")
        panel.plot(values, [flops * factor for _, flops in points], color="grey", linestyle=":", label="flops")
        panel.set(xscale="log", yscale="log", xlabel=name)
        panel.set_xticks(values, map(str, values), fontsize=8)
        panel.minorticks_off()
    bar.close()
    axes[0].set_ylabel("ms a training step")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"SiT blocks, {', '.join(f'{value} {name}' for name, value in BASE.items())} but for what is varied; {str(dtype)[6:]}, {device}", fontsize=9)
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)
    print("\n".join(rows))
    print(f"look at {options.out}")


if __name__ == "__main__":
    try:
        main(Options(**read_flags(Options, sys.argv[1:], __doc__)))
    except ValueError as error:
        fail(error)
