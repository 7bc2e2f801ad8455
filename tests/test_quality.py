"""The score of fid.py against closed forms, and what it says about the model that ships with the repository."""
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from data import eight_bit
from fid import Moments, Options, SmallFeatures, evaluate, frechet

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def moments(rows):
    result = Moments(rows.shape[1])
    result.add(rows)
    return result


def test_moments_of_parts_are_those_of_the_whole():
    rows = torch.randn(1000, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 100
    parts = Moments(7)
    for part in rows.split(130):
        parts.add(part)
    assert parts.n == 1000
    assert_close(parts.mean, rows.mean(0), rtol=1e-12, atol=0)
    assert_close(parts.covariance, rows.T.cov(), rtol=1e-9, atol=1e-9)


def test_frechet_of_known_gaussians():
    """Commuting covariances have the closed form |m1 - m2|^2 + |s1 - s2|^2; scipy's sqrtm is the second way for the others."""
    from scipy.linalg import sqrtm
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    s1, s2, shift = torch.rand(6, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1, torch.randn(6, dtype=torch.float64)
    a, b = Moments(6), Moments(6)
    a.n = b.n = 2
    a.scatter, b.scatter, b.mean = turn * s1**2 @ turn.T, turn * s2**2 @ turn.T, shift
    assert_close(frechet(a, b), (shift.square().sum() + (s1 - s2).square().sum()).item(), rtol=1e-9, atol=1e-9)
    one, two = moments(torch.randn(50, 6, dtype=torch.float64)), moments(torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64))
    c1, c2 = one.covariance, two.covariance
    expected = (one.mean - two.mean).square().sum() + (c1 + c2).trace() - 2 * sqrtm((c1 @ c2).numpy()).trace().real
    assert_close(frechet(one, two), expected.item(), rtol=1e-7, atol=1e-7)
    few = moments(torch.randn(4, 6, dtype=torch.float64))                      # fewer rows than features: singular covariance
    assert abs(frechet(few, few)) < 1e-6 and abs(frechet(two, two)) < 1e-6


def test_the_features_know_real_shapes():
    with safe_open(ASSETS / "features-shapes32.safetensors", "pt") as file:
        assert float(file.metadata()["accuracy"]) >= 0.99 and int(file.metadata()["held_out"]) >= 1000
    from data import Shapes
    x, y = Shapes(32, seed=77)[torch.arange(500).numpy()]
    assert (SmallFeatures("shapes", (3, 32, 32))(eight_bit(x))["scores"].argmax(1) == y).float().mean() >= 0.99
    with pytest.raises(ValueError, match="--train yes --data shapes --image_size 48"):
        SmallFeatures("shapes", (3, 48, 48))


def test_the_shipped_two_step_model():
    """2,000 two-step pictures: 97 % or more are named as the class that was asked for, and they vary within a class."""
    result = evaluate(Options(ckpt=str(ASSETS / "shapes-few.safetensors"), num=2000, steps=2))
    assert result["NFE"] == 2 and result["real_accuracy"] >= 0.99 and result["floor"] < result["FD-shapes"]
    assert result["accuracy"] >= 0.97 and result["variety"] >= 0.8, result
