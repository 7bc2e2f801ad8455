"""The peers under experiments/ are what they are called, and their commands run."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data import Shapes
from experiments.peers import MeanFlow, dpm_solver_2m, heun, meanflow_loss, sample_meanflow
from experiments.pose import draws
from model import DiT
from sampler import sample, time_grid

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "assets/shapes-few.safetensors"


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_is_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    net = lambda x, t, y: torch.tanh(0.7 * x) + t.view(-1, 1, 1, 1)
    z, y, times = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.zeros(2).long(), time_grid(steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="dpmsolver++", solver_order=2,
                                                      lower_order_final=False, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    scheduler.sigmas, scheduler.timesteps, x = torch.tensor(times, dtype=torch.float64), torch.tensor(times[:-1]) * 1000, z.clone()
    for t in times[:-1]:
        x = scheduler.step(net(x, torch.full((2,), t, dtype=torch.float64), y), torch.tensor(t) * 1000, x).prev_sample
    assert_close(dpm_solver_2m(net, z, y, "linear", times), x, rtol=1e-5, atol=1e-5)


def test_heun_is_of_second_order():
    """dx/dt = x - 2 t from 1 to 0 has the solution 2 t + 2 + c e^t; half the step is a quarter of the error."""
    z, y = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1).long()
    end, errors = 2 + (1 - 4) / torch.e, []
    for steps in (20, 40):
        x = heun(lambda x, t, y: x - 2 * t.view(-1, 1, 1, 1), z, y, torch.linspace(1, 0, steps + 1).double().tolist()[:-1] + [1e-9, 0.0])
        errors.append(abs(x.item() - end))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("data_output", [False, True])
def test_meanflow_starts_as_the_velocity_and_knows_straight_paths(data_output):
    """Untrained it is the network whatever r is, and sampling is Euler's method. Where the velocity is constant along the path,
    the mean velocity is the velocity: the target is v."""
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3, norm="rms", rope=True, data_output=data_output)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.requires_grad else None
    flow = MeanFlow(net)
    x, y, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), torch.rand(4)
    with torch.no_grad():
        assert_close(flow(x, t / 2, t, y), net(x, t, y))
        assert_close(sample_meanflow(flow, x, y, torch.linspace(1, 0, 5)), sample(net, x, y, times=[1.0, 0.75, 0.5, 0.25], gap=(0, 0)), rtol=1e-4, atol=1e-4)
    constant = lambda x_t, *rest: torch.full_like(x_t, 2.0)
    loss = meanflow_loss(lambda x_t, r, t, y: torch.full_like(x_t, 5.0), constant, x, y, t, t / 2, torch.randn_like(x))
    assert_close(loss, torch.full((4,), 9 / 9.001))


def test_the_numbers_of_a_drawing_are_those_it_was_drawn_from():
    """pose.draws hands out the pictures of data.Shapes with classes in turn; narrowing a number narrows that one alone, and afterwards all is as before."""
    positions = np.arange(64)
    x, y, u = draws(3, positions)
    assert y.tolist() == [k % 8 for k in range(64)]
    stream = Shapes(32, 3)
    same_class = (stream[positions][1] == y).nonzero()[:, 0]
    assert len(same_class) > 0 and torch.equal(stream[positions][0][same_class], x[same_class])
    still, _, _ = draws(3, positions, [(column, lambda u: 0 * u + 0.5) for column in (1, 2)])
    column = torch.arange(32) + 0.5
    ink = lambda x: (x - x[..., :1, :1]).abs().sum(1)                                               # what is not paper, (B, S, S)
    centre = lambda x: (ink(x).sum(1) @ column) / ink(x).sum((1, 2)) - 16
    circles = y == 0
    assert centre(still)[circles].abs().max() < 0.05
    assert torch.allclose(centre(x)[circles], 0.12 * 32 * u[circles, 0], atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("command, lines", [
    (f"peers.py curves --ckpt {SHIPPED} --num 64 --nfe 4 --kappas 0,auto --out OUT", ["Euler", "UCGM-S kappa auto", "Heun", "DPM-Solver++(2M)"]),
    (f"peers.py meanflow --ckpt {SHIPPED} --num 64 --seconds 0.1 --out OUT", ["MeanFlow"] * 3 + [f"MeanFlow, second call at {t}" for t in (0.3, 0.4, 0.7)]),
    ("pose.py --price yes --num 64", []),
    (f"pose.py --ckpt {SHIPPED} --num 64 --train_steps 2 --steps 4", []),
    (f"fall.py --recipe shapes-few --init_from {SHIPPED} --look 2", []),
    (f"grids.py --few {SHIPPED} --many {SHIPPED} --columns 2 --rows 1 --out OUT.png", []),
    ("overlap.py", []),
    ("report.py experiments/results/few.jsonl", []),
])
def test_the_experiments_run(command, lines, tmp_path):
    """Each at a size that shows only that it still fits the code; a score that is written down has the method's name and is finite."""
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, *f"experiments/{command}".replace("OUT", str(out)).split()], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})                            # compiling would take most of the time
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()
    written = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    assert [line["method"] for line in written] == lines and all(np.isfinite(line["FD-shapes"]) for line in written)
