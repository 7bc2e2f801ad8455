"""The whole method on one page: train a many-step model, fine-tune it to few steps, draw from both.

    python minimal.py           # three minutes on two cores of a laptop; writes minimal.png

Start here, then read objective.py, sampler.py and model.py. train.py is this loop plus what a long run needs:
recipes, checkpoints, several processes, compilation, scores.
"""
import copy

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from model import FAMILIES, DiT
from objective import Objective
from sampler import sample
from shapes import Shapes

BATCH = 64
data = Shapes(size=24, seed=0)          # circles, rings, squares, ...: x (B, 3, 24, 24) in [-1, 1], y in 0..7


def train(net, objective, steps, lr, decay, teacher=None):
    """Minimise the objective; returns the average of the weights, which is also the default teacher."""
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in tqdm(range(steps), unit="step"):
        x, y = data[step * BATCH + np.arange(BATCH)]                            # (B, 3, 24, 24), (B,)
        t, z, drop = objective.draw(x)                   # times, noise, which labels to drop
        loss = objective(net, x, y, t, z, drop, teacher or ema).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.lerp_(weight.detach(), 1 - min(decay, (step + 1) / (step + 10)))
    return ema


def main(steps=1400, tune_steps=200, out="minimal.png"):
    torch.manual_seed(0)
    net = DiT(input_size=24, patch_size=8, in_channels=3, hidden_size=128, depth=4, num_heads=4,
              num_classes=8, x_pred=True, **FAMILIES["TiT"])        # 9 tokens; the layers predict the data

    # lambda 0 is flow matching: F_t learns z - x, along the straight path x_t = t z + (1 - t) x. With zeta,
    # guidance is trained in: the target moves away from what the model says without a label.
    many = train(net, Objective(zeta=0.4, style="ft-vs-fe", time_beta=(2.0, 1.0, 1.0), time_weight="none"),
                 steps, lr=4e-3, decay=0.995)

    # lambda 1 is a consistency model: the predicted data must not change along the path, so that one call
    # jumps to its end. The many-step model is the teacher, whose output says where the path goes.
    few = train(copy.deepcopy(many).requires_grad_(),
                Objective(lam=1.0, zeta=1.0, style="fc-vs-xz", enhance_range=(0.0, 1.0), huber=1.0,
                          time_weight="none", time_beta=(0.8, 1.0, 1.0), derivative="backward", dt=0.05),
                tune_steps, lr=2e-3, decay=0.99, teacher=many)

    z, y = torch.randn(16, 3, 24, 24), torch.arange(16) % 8
    rows = [sample(few, z, y, steps=1, rho=1.0, gap=(0.001, 0.5)),              # three rows, one noise
            sample(few, z, y, steps=2, rho=1.0, gap=(0.001, 0.5)),
            sample(many, z, y, steps=40, kappa="auto", gap=(0.001, 0.05))]
    page = rearrange(torch.stack(rows), "row n c h w -> (row h) (n w) c")
    page = Image.fromarray((127.5 * page + 128).clamp(0, 255).byte().numpy())
    page.resize((3 * page.width, 3 * page.height), Image.Resampling.NEAREST).save(out)
    print(f"{out}: 16 images at 1, 2 and 40 network calls. Next: python train.py")


if __name__ == "__main__":
    main()
