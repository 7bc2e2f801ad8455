"""How the weights move: AdamW, Muon and RAdam, the learning rate, steps that are not finite, averages (EMA).

AdamW's fused kernel passes over the weights once, and the others build on it. Except for RAdam's first steps
none makes the host wait for the device, where a step whose gradient is not finite is skipped, too.
"""
import math
from collections import defaultdict

import torch
import torch.nn as nn

from config import UserError
from engine import gather

MAX_SKIPPED = 100   # consecutive steps without a finite gradient; at the next report the run then ends


def make_optimizer(config, net, dtype):
    weights = [p for p in net.parameters() if p.requires_grad]
    settings = dict(lr=config.lr, betas=config.betas, weight_decay=0.0, fused=True)
    if weights[0].is_cuda:      # a CUDA graph reads the rate from this tensor
        settings |= dict(lr=torch.tensor(config.lr, device=weights[0].device), capturable=True)
    if config.optimizer == "muon":
        return Muon(net, dtype, **settings)
    return {"adamw": torch.optim.AdamW, "radam": RAdam}[config.optimizer](weights, **settings)


# a x + b x^3 + c x^5, in turn: each brings the singular values that the one before leaves as near to 1 as
# such a polynomial can, starting from 0.01 .. 1 (arXiv 2505.16932). Three do the work of Muon's usual five.
QUINTICS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonal(matrices, dtype):
    """U V^T of each matrix U S V^T (K, R, C), approximately: all singular values that are at least 1 % of the
    matrix's norm become 0.73 .. 1.27."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype).mT if tall else matrices.to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, except that the matrices of attention and MLP move along their momentum, made orthogonal and as
    large as an Adam step (arXiv 2502.16982). Matrices of one shape are stacked, for fewer, larger products.
    dtype: of these products. torch.optim.Muon always uses bfloat16, 30 times slower on a CPU without it."""

    def __init__(self, net, dtype, *settings, **more):
        super().__init__([p for p in net.parameters() if p.requires_grad], *settings, **more)
        self.dtype, self.found_inf = dtype, torch.zeros(())
        self.matrices = defaultdict(list)       # shape -> the matrices of that shape
        for name, p in net.named_parameters():
            if p.ndim == 2 and name.startswith("blocks.") and "adaLN" not in name:
                self.matrices[p.shape].append(p)
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        keep = 1 - self.found_inf               # 0: nothing changes, as in AdamW's kernel
        for shape, weights in self.matrices.items():
            weights = [weight for weight in weights if weight.grad is not None]
            if not weights:
                continue
            momenta = [self.state[weight]["momentum"] for weight in weights]
            gradients = torch.where(keep > 0, torch.stack([w.grad for w in weights]), torch.stack(momenta))
            torch._foreach_lerp_(momenta, gradients.unbind(), 0.05)
            nesterov = gradients.lerp(torch.stack(momenta), 0.95)                       # (K, R, C)
            changes = orthogonal(nesterov, self.dtype).to(nesterov) * (-0.2 * max(shape) ** 0.5 * lr * keep)
            torch._foreach_mul_(weights, 1 - lr * decay * keep)
            torch._foreach_add_(weights, changes.unbind())
            for weight in weights:
                weight.grad = None              # AdamW skips what has no gradient
        super().step()


class RAdam(torch.optim.AdamW):
    """RAdam (arXiv 1908.03265) by AdamW's kernel, which passes over the weights once; torch's RAdam passes
    nine times. The rectification scales the learning rate. The first steps, five at beta2 = .999,
    must not divide by the second moment: eps is made so large there that the divisor is constant."""
    LARGE = 2.0**20
    early = True

    def step(self):
        group = self.param_groups[0]
        lr, eps, beta = group["lr"], group["eps"], group["betas"][1]
        steps = next((state["step"] for state in self.state.values() if state), torch.zeros(()))
        t = 1 + steps.to(torch.float32 if steps.device.type == "mps" else torch.float64)
        longest = 2 / (1 - beta) - 1
        length = longest - 2 * t * beta**t / (1 - beta**t)
        self.early = self.early and length.item() <= 5      # the host reads a value in the early steps only
        if self.early:
            group.update(lr=lr * self.LARGE, eps=self.LARGE)
        else:
            rectified = (length - 4) * (length - 2) / length * longest / ((longest - 4) * (longest - 2))
            group["lr"] = (lr * rectified.sqrt()).float()
        super().step()
        group.update(lr=lr, eps=eps)


def learning_rate(config, step):
    """Linear warm-up, a plateau, then half a cosine down to 0 over the last fraction of the run."""
    up = min(1, (step + 1) / max(1, config.warmup))
    left = min(1, (config.steps - step) / max(1, config.warmdown * config.steps))
    return config.lr * up * (0.5 - 0.5 * math.cos(math.pi * left))


def can_capture(optimizer):
    """Whether a CUDA graph can hold its step. The rate must be in a tensor, or a replay would not see it
    change; and the host must not read a value, as RAdam does at first and non-fused optimisers always do."""
    tensors = all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    return tensors and is_fused(optimizer) and not getattr(optimizer, "early", False)


def is_fused(optimizer):
    """Whether it reads found_inf on the device."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def set_lr(optimizer, lr):
    """Set the learning rate, in place where it is a tensor: a CUDA graph reads it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@torch.no_grad()
def update_ema(ema, net, decay, step):
    """Exponential moving average of the weights. The decay rate grows at first, to forget early weights."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ---- steps that are not finite ------------------------------------------------------------------------

def finite_mean(loss):
    """The mean of a loss (B,), with gradient NaN if any of it is not finite. The gradient of an infinite loss
    would be 0 and go unnoticed."""
    return loss.mean() * torch.where(loss.detach().isfinite().all(), 1.0, torch.nan)


def clip_gradient(net, largest):
    """Clip to `largest` (0: do not clip); returns the norm over all processes, a scalar on the device."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), largest or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def optimizer_step(optimizer, finite):
    """One step, or none where the gradient is not finite. finite: a bool tensor on the device. Fused
    optimisers, as all of ours are, read found_inf themselves; for others the host waits for the value."""
    if is_fused(optimizer):
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Skipped:
    """Counts the steps that optimizer_step left out. It counts on the device, so the host does not wait."""

    def __init__(self, device):
        # skipped since the last report; skipped in a row; largest t of a loss that was not finite, or -1
        self.counts = torch.tensor([0.0, 0.0, -1.0], device=device)

    def note(self, loss, t):
        """Remember the times t (B,) at which the loss (B,) is not finite."""
        self.counts[2] = torch.where(loss.isfinite(), self.counts[2], t).max()

    def add(self, finite):
        self.counts[0] += ~finite
        self.counts[1] = (self.counts[1] + 1) * ~finite

    def report(self, step, group, tell):
        """The number since the last report; tell(line) about them. UserError: too many in a row."""
        lost, in_a_row, bad_t = self.counts.tolist()
        self.counts[0], self.counts[2] = 0, -1
        if lost:
            times = enumerate(gather(bad_t, group))
            seen = ", ".join(f"t = {t:.3f} on process {rank}" for rank, t in times if t >= 0)
            what = f"the loss, at times up to {seen}," if seen else "the gradient"
            tell(f"step {step}: {lost:.0f} steps skipped: {what} is not finite")
        if in_a_row >= MAX_SKIPPED:
            raise UserError(f"{in_a_row:.0f} steps up to step {step} were not finite: check the data "
                            "or lower --lr, and resume with --allow_change")
        return int(lost)
