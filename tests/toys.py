"""What the tests share: a small network, a batch, and the scripts run in this process."""
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import to_uint8
from shapes import Shapes

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

def script_command(script):
    """What starts a script in another process; one in extras/ is started as a module."""
    if "/" in script:
        return [sys.executable, "-m", script.removesuffix(".py").replace("/", ".")]
    return [sys.executable, str(ROOT / script)]


# The marks of a test on a GPU.
on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


# Flags of two fast runs. TINY has four tokens: with one token the exact gradient of q and k is zero, and Adam
# magnifies its rounding errors.
TINY = ("--image_size 8 --model TiT-XXS/4 --batch_size 64 --no-compile --dtype float32 --device cpu "
        "--optimizer adamw --lr 8e-3 --zeta 0.5 --kappa auto --log_every 5 --warmup 5 --warmdown 0 "
        "--save_every 10").split()
SMALL = ("--image_size 8 --model TiT-XXS/8 --batch_size 16 --steps 3 --save_every 2 --log_every 1 "
         "--sample_steps 2 --no-compile").split()


class Net(torch.nn.Module):
    """A smooth network with three classes and the null class; float64, so that equalities are sharp."""
    num_classes = 3

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a, self.b, self.c = (torch.nn.Parameter(torch.randn(n, generator=g, dtype=torch.float64) / 2)
                                  for n in (4, 2, 4))

    def forward(self, x, t, y):
        shape = (-1, *[1] * (x.ndim - 1))
        t, c = t.asinh().view(shape), self.c.to(x.dtype)[y].view(shape)     # asinh: DDPM's times reach 999
        (a0, a1, a2, a3), (b0, b1) = self.a.to(x.dtype), self.b.to(x.dtype)
        return a2 * torch.tanh(a0 * x + a1 * x.roll(1, -1) + b0 * t) + b1 * t * x + a3 * c


def batch(n=12, seed=1, dtype=torch.float64):
    """x, z (n, 3, 4, 4), t and y (n,), drop (n,): every fourth label is dropped."""
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(n, 3, 4, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (n,), generator=g)
    return x, z, t, y, torch.arange(n) % 4 == 3


def calls_of(net):
    """A list that receives the arguments (x, t, y) of every call of the network."""
    calls = []
    net.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    return calls


def run(script, *words, capsys):
    """Run a top-level script as __main__ in this process; returns its exit status, stdout and stderr."""
    argv, sys.argv = sys.argv, [script, *map(str, words)]
    capsys.readouterr()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
    return (status, *capsys.readouterr())


def states(out):
    """The state files of a run, the newest last."""
    return sorted(Path(out).glob("state_*.safetensors"))


def images_of(size, seed, count=200):
    """uint8 (N, S, S, 3), half of them shapes, half smoothed noise: structure at all scales."""
    shapes = Shapes(size, seed)[np.arange(count // 2)][0]
    noise = torch.rand(count - count // 2, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    noise = torch.nn.functional.interpolate(noise, size, mode="bicubic")
    return to_uint8(torch.cat([shapes, noise])).permute(0, 2, 3, 1).numpy()


def write_folder(path, images):
    """Images (N, S, S, 3) as files; returns what --images and --ref call them."""
    path.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(path / f"{k:04d}.png")
    return f"folder:{path}"
