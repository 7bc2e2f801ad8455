"""The published code's numbers: losses and gradients, sampler runs, network outputs."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import GOLDEN

import objective
from model import FAMILIES, DiT
from objective import Objective
from sampler import sample

stored = np.load(GOLDEN / "objective_sampler.npz")
cases = {name: json.loads(str(stored[f"{name}_cases"])) for name in ("objective", "sampler", "stochastic")}


def tensor(name):
    return torch.from_numpy(stored[name])


class ToyNet(torch.nn.Module):
    """The network of the published numbers."""
    num_classes = 10

    def __init__(self, p):
        super().__init__()
        self.p, self.calls = torch.nn.Parameter(p.clone()), 0

    def forward(self, x, t, y):
        self.calls += 1
        p, t, y = self.p, t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1).float()
        wave = torch.tanh(p[0] * x + p[1] * x.roll(1, dims=-1)) * (1 + p[2] * t)
        return wave + p[3] * torch.sin(3 * t) + p[4] * torch.cos(y) + p[5] * x


@pytest.fixture(autouse=True)
def published_half_pi(monkeypatch):
    monkeypatch.setattr(objective, "HALF_PI", 1.57)


def loss_and_gradient(case, device="cpu"):
    """Of the toy network, and that of the teacher."""
    net, teacher, drop = (value.to(device) for value in (ToyNet(tensor("theta")), ToyNet(tensor("phi")),
                                                         torch.arange(20) >= 18))
    loss = Objective(case["transport"].lower(), case["lam"], case["zeta"], case["style"], case["huber"],
                     case["cosine"], case["weight"].lower())
    loss = loss(net, *(tensor(name).to(device) for name in "xytz"), drop, teacher).mean()
    loss.backward()
    return loss.item(), net.p.grad.cpu(), teacher.p.grad


@pytest.mark.parametrize("i", range(99))
def test_loss_and_gradient(i):
    case = cases["objective"][i]
    (loss, grad, teacher_grad), expected = loss_and_gradient(case), torch.tensor(case["grad"])
    assert_close(loss, case["loss"], rtol=2e-5, atol=0)
    assert (grad - expected).norm() < 2e-5 * expected.norm()
    assert teacher_grad is None


def draw(case, device="cpu"):
    """Images of the toy network, and how often it was called."""
    net, names = ToyNet(tensor("theta")).to(device), ("steps", "kappa", "rho", "order", "schedule", "gap")
    settings = {name: case[name] for name in names}
    x = sample(net, *(tensor(name).to(device) for name in "zy"), case["transport"].lower(), **settings,
               noise=lambda i: tensor("noises")[i].to(device))
    return x.cpu(), net.calls


@pytest.mark.parametrize("i", range(27))
def test_deterministic_sampler(i):
    case, expected = cases["sampler"][i], tensor(f"sampler_{i}")
    x, calls = draw(case)
    # The published grid is rounded to float32, which the first step of Heun's method magnifies.
    tolerance = 5e-4 if case["order"] == 2 else 2e-6
    assert (x - expected).abs().max() < tolerance * expected.abs().max()
    assert calls == (case["nfe_calls"] if case["order"] == 1 else 2 * case["nfe_calls"] - 1)


@pytest.mark.parametrize("i", range(6))
def test_stochastic_sampler(i):
    expected = tensor(f"stochastic_{i}")
    assert_close(draw(cases["stochastic"][i])[0], expected, rtol=2e-6, atol=2e-6)


NETWORKS = [("tit", "TiT"), ("sit", "SiT"), ("sit_learn_sigma", "DiT"), ("lightningdit", "LightningDiT")]


@pytest.mark.parametrize("name, family", NETWORKS)
def test_network(name, family, device="cpu"):
    numbers, weights = np.load(GOLDEN / "models.npz"), load_file(GOLDEN / f"{name}.safetensors")
    net = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=4, num_classes=10,
              **FAMILIES[family])
    rotary = {key: weights.pop(key) for key in list(weights) if key.startswith("feat_rope")}
    if rotary:
        signs = torch.tensor([-1.0, 1.0]).repeat(net.rope_sin.shape[-1] // 2)
        assert_close(net.rope_cos[:, 0], rotary["feat_rope.freqs_cos"])
        assert_close(net.rope_sin[:, 0] * signs, rotary["feat_rope.freqs_sin"])
    assert_close(net.pos_embed.data, weights["pos_embed"], rtol=0, atol=0)
    net.load_state_dict(weights, strict=True)
    with torch.no_grad():
        out = net.to(device)(*(torch.from_numpy(numbers[key]).to(device) for key in ("x", "t", "y")))
    assert_close(out.cpu(), torch.from_numpy(numbers[f"{name}_out"]), rtol=0, atol=1e-6)
    norms = [m for m in net.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.RMSNorm))]
    assert len(norms) == 5 + 4 * ("qk_norm" in FAMILIES[family]) and {m.eps for m in norms} == {1e-6}
