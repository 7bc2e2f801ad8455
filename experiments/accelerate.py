"""UCGM-S on somebody else's model, without training: a transport row and a wrapper of three lines.

    python experiments/accelerate.py                # DiT-XL/2 (facebook/DiT-XL-2-256, through diffusers): the same noise, 20 steps, three samplers

sampler.sample asks any callable net(x, t, y) -> like x for what its transport says:

| the model predicts | transport          | called with                                                      |
|--------------------|--------------------|------------------------------------------------------------------|
| epsilon (DDPM)     | ddpm               | t = 0..999, as DDPM counts                                       |
| velocity z - x     | linear             | t in [0, 1], noise at 1 (data at 1: relinear)                    |
| x0                 | x-prediction       | t in [0, 1]                                                      |
| anything else      | your Transport row | its own clock: Transport(alpha, gamma, alpha_hat, gamma_hat, clock, sign) |
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import contact_sheet, noise_like_seed
from sampler import sample


def dit(transformer):
    """A diffusers DiTTransformer2DModel as net(x, t, y) for transport ddpm: epsilon; the learnt variances are left out."""
    channels = transformer.config.in_channels
    return lambda x, t, y: transformer(x, timestep=t, class_labels=y).sample[:, :channels]


def predicts_x0(model):
    """A model(x_t, t) that predicts the data, on the path x_t = t z + (1 - t) x, for transport x-prediction."""
    return lambda x, t, y: model(x, t)


def predicts_velocity(model):
    """A model(x_t, t) that predicts dx_t/dt = z - x, as flow matching trains it, for transport linear."""
    return lambda x, t, y: model(x, t)


def main():
    from diffusers import AutoencoderKL, DiTTransformer2DModel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = dit(DiTTransformer2DModel.from_pretrained("facebook/DiT-XL-2-256", subfolder="transformer").to(device).eval())
    vae = AutoencoderKL.from_pretrained("facebook/DiT-XL-2-256", subfolder="vae").to(device).eval()
    y, z = torch.tensor([207, 360, 387, 974], device=device), noise_like_seed(range(4), (4, 32, 32)).to(device)
    rows = []
    for kappa in (0.0, 0.3, "auto"):
        x = sample(net, z, y, "ddpm", steps=20, kappa=kappa, cfg_scale=4.0, null=1000)
        with torch.no_grad():
            rows.append(vae.decode(x / 0.18215).sample.cpu())
    contact_sheet(torch.cat(rows), columns=4, side=256).save("accelerated.png")
    print("accelerated.png: kappa 0, 0.3 and auto from above")


if __name__ == "__main__":
    main()
