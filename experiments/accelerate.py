"""UCGM-S on somebody else's model, without training: a transport and a wrapper of three lines.

    python experiments/accelerate.py        # DiT-XL/2, through diffusers: one noise, 20 steps, three samplers

sampler.sample asks any callable net(x, t, y) -> like x for what its transport says:

| the model predicts | transport          | called with                                                 |
|--------------------|--------------------|-------------------------------------------------------------|
| epsilon (DDPM)     | ddpm               | t = 0..999, as DDPM counts                                  |
| velocity z - x     | linear             | t in [0, 1], noise at 1 (data at 1: relinear)               |
| x0                 | x-prediction       | t in [0, 1]                                                 |
| anything else      | your own Transport | its net_time: see the table of transports in objective.py   |
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import read_flags, setting
from data import image_grid, noise_like_seed
from engine import pick_device, run
from sampler import sample


@dataclass
class Options:
    model: str = setting("facebook/DiT-XL-2-256", "a DiT pipeline of diffusers: on the hub or a folder")
    steps: int = setting(20, "steps of the sampler")
    cfg_scale: float = setting(4.0, "classifier-free guidance")
    out: str = setting("accelerated.png", "page to write")
    device: str = setting("auto", "cuda, mps or cpu")


def dit(transformer):
    """diffusers' DiTTransformer2DModel as net(x, t, y) for transport ddpm: epsilon, without the variances."""
    channels = transformer.config.in_channels
    return lambda x, t, y: transformer(x, timestep=t, class_labels=y).sample[:, :channels]


def predicts_x0(model):
    """A model(x_t, t) of the data, on the path x_t = t z + (1 - t) x, for transport x-prediction."""
    return lambda x, t, y: model(x, t)


def predicts_velocity(model):
    """A model(x_t, t) of dx_t/dt = z - x, as flow matching trains it, for transport linear."""
    return lambda x, t, y: model(x, t)


def main(options):
    from diffusers import AutoencoderKL, DiTTransformer2DModel
    device = pick_device(options.device)
    transformer = DiTTransformer2DModel.from_pretrained(options.model, subfolder="transformer")
    vae = AutoencoderKL.from_pretrained(options.model, subfolder="vae").to(device).eval()
    net, y = dit(transformer.to(device).eval()), torch.tensor([207, 360, 387, 974], device=device)
    z = noise_like_seed(range(4), (4, 32, 32)).to(device)
    rows = []
    for kappa in (0.0, 0.3, "auto"):
        x = sample(net, z, y, "ddpm", options.steps, kappa, cfg_scale=options.cfg_scale, null=1000)
        with torch.no_grad():
            rows.append(vae.decode(x / 0.18215).sample.cpu())
    image_grid(torch.cat(rows), columns=4, side=256).save(options.out)
    print(f"{options.out}: kappa 0, 0.3 and auto from above")


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
