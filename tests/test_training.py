"""What a step of train.py does, watched from inside a run: rate, averages, clipping, seeds, signals."""
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import NANO, log_of, reached
from runs import train_nano as train
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import run, states

import checkpoint
import engine
import log
import objective
import optim
import shapes
from checkpoint import build, load_model
from config import Config
from data import open_dataset
from log import preview
from optim import learning_rate
from sample import open_pipeline

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("home")


def part(out, name):
    """One network of the newest state, as a vector."""
    tensors = load_file(states(out)[-1])
    return torch.cat([v.flatten() for key, v in sorted(tensors.items()) if key.startswith(f"{name}.")])


def first_weights(seed):
    torch.manual_seed(seed)
    net = build(Config(model="TiT-nano/4"), (3, 8, 8), 8)
    return torch.cat([v.flatten() for _, v in sorted(net.state_dict().items())])


def watched(monkeypatch, see):
    """Call see(optimizer) before every optimiser step of a run."""
    step = optim.optimizer_step
    monkeypatch.setattr(optim, "optimizer_step", lambda o, finite: see(o) or step(o, finite))


# ---- rate, averages, clipping -------------------------------------------------------------------------

def test_each_step_has_its_rate(monkeypatch, capsys):
    rates = []
    watched(monkeypatch, lambda optimizer: rates.append([group["lr"] for group in optimizer.param_groups]))
    train("--steps", 12, "--warmup", 4, "--warmdown", 0.5, "--lr", 0.01, capsys=capsys)
    config = Config(steps=12, warmup=4, warmdown=0.5, lr=0.01)
    assert rates == [[learning_rate(config, step)] for step in range(12)]
    assert len({rate for rate, in rates}) == 9          # rising to 3, level to 6, falling
    assert {line["step"]: line["lr"] for line in log_of("runs/shapes") if "lr" in line} == {
        5: rates[4][0], 10: rates[9][0], 12: rates[11][0]}


def test_the_averages_by_hand(capsys):
    """Two steps; the decay rate is (1 + step) / (10 + step) at first, then what was asked for."""
    train("--steps", 1, "--ema", "0.05,0.999", "--style", "ft-vs-fe", capsys=capsys)
    one = {name: part("runs/shapes", name) for name in ("net", "ema0.999", "ema0.05", "teacher")}
    train("--steps", 2, "--ema", "0.05,0.999", "--style", "ft-vs-fe", capsys=capsys)
    two = {name: part("runs/shapes", name) for name in one}
    for name, decays in {"ema0.999": (1 / 10, 2 / 11), "ema0.05": (0.05, 0.05),
                         "teacher": (1 / 10, 2 / 11)}.items():
        average = first_weights(0)
        for decay, after in zip(decays, (one, two)):
            average = decay * average + (1 - decay) * after["net"]
            assert_close(after[name], average, rtol=0, atol=1e-6)
            assert (after[name] - after["net"]).abs().max() > 1e-5


def test_a_few_step_teacher_stays(capsys):
    train("--steps", 1, "--out", "start", capsys=capsys)
    more = "--lam 1 --zeta 1 --style fc-vs-xz --init_from start".split()
    train("--steps", 3, "--out", "few", *more, capsys=capsys)
    assert torch.equal(part("few", "teacher"), part("start", "ema0.999"))


def test_the_model_is_the_average(capsys):
    """model.safetensors is the first average of the state, and not its raw weights; the second is beside."""
    train("--steps", 3, "--ema", "0.9,0.5", capsys=capsys)
    tensors = load_file(states("runs/shapes")[-1])
    for file, name in (("model", "ema0.9"), ("model_ema0.5", "ema0.5")):
        model = load_file(f"runs/shapes/{file}.safetensors")
        assert all(torch.equal(value, tensors[f"{name}.{key}"]) for key, value in model.items())
        assert any(not torch.equal(value, tensors[f"net.{key}"]) for key, value in model.items())


def test_page_and_held_out_loss_are_of_the_average(capsys):
    """By hand from model.safetensors: at 256 even times, with the noise of seed 0, and no label dropped."""
    train("--steps", 4, "--zeta", 0, "--ema", "0.9,0.1", capsys=capsys)
    pipeline = open_pipeline("runs/shapes", CPU, "float32")
    page = np.asarray(Image.open("runs/shapes/grid_0000004.png"))
    assert np.array_equal(page, np.asarray(preview(pipeline)))
    x, y = open_dataset("shapes", 8).hold_out(256)
    t, z = (torch.arange(256) + 0.5) / 256, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    loss = pipeline.config.objective()
    drop = torch.zeros(256, dtype=torch.bool)
    held_out = [line["held_out_loss"] for line in log_of("runs/shapes") if "held_out_loss" in line]
    expected = loss(pipeline.net, x, y, t, z, drop).mean().item()
    assert len(held_out) == 2 and held_out[-1] == pytest.approx(expected, rel=1e-5)
    raw = build(pipeline.config, (3, 8, 8), 8)
    tensors = load_file(states("runs/shapes")[-1]).items()
    raw.load_state_dict({name[4:]: value for name, value in tensors if name.startswith("net.")})
    assert loss(raw, x, y, t, z, drop).mean().item() != pytest.approx(held_out[-1], rel=1e-5)


def test_clipping(capsys):
    """A norm far below Adam's eps of 1e-8 holds the weights; 0 is no limit, and a usual one is felt."""
    weights = {}
    for largest in (1e-13, 0, 1e9, 0.02):
        train("--steps", 3, "--grad_clip", largest, "--out", f"clip{largest}", capsys=capsys)
        weights[largest] = part(f"clip{largest}", "net")
    start = first_weights(0)
    assert (weights[1e-13] - start).abs().max() < 1e-4 < (weights[0] - start).abs().max()
    assert torch.equal(weights[0], weights[1e9]) and not torch.equal(weights[0], weights[0.02])
    norms = [line["grad_norm"] for line in log_of("clip0.02") if "grad_norm" in line]
    assert all(norm > 0.05 for norm in norms)           # what is reported is the norm before clipping


# ---- what the seed decides ----------------------------------------------------------------------------

def test_the_seed_decides_weights_images_times_noise_and_drops(monkeypatch, capsys):
    seen, call = [], objective.Objective.__call__

    def watch(self, net, x, y, t, z, drop, *more):
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        seen.append([v.detach().clone() for v in (weights, x, t, z, drop)])
        return call(self, net, x, y, t, z, drop, *more)
    monkeypatch.setattr(objective.Objective, "__call__", watch)
    for seed, out in ((0, "a"), (1, "b"), (0, "c")):
        train("--steps", 2, "--seed", seed, "--out", out, "--label_drop", 0.5, capsys=capsys)
    batches = [rows for rows in seen if len(rows[1]) == 64 and rows[4].any()]       # not the held-out ones
    a0, a1, b0, b1, c0, c1 = batches
    assert all(torch.equal(v, w) for one, other in ((a0, c0), (a1, c1)) for v, w in zip(one, other))
    assert not any(torch.equal(v, w) for one, other in ((a0, b0), (a1, b1), (a0, a1))
                   for v, w in zip(one, other))


def test_no_held_out_image_is_trained_on(monkeypatch, capsys):
    """Of a finite set, over several epochs; and the whole rest is."""
    x = np.arange(400, dtype=np.int64)[:, None, None, None]
    x = np.concatenate([x // 256, x % 256, 0 * x], 3).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    np.savez("set.npz", x=x, y=np.arange(400) % 2)
    seen, draw = set(), objective.Objective.draw

    def number(x):                              # which image it is stands in its first two channels
        return ((x[:, :2, 0, 0] + 1) * 127.5).round().long() @ torch.tensor([256, 1])
    monkeypatch.setattr(objective.Objective, "draw",
                        lambda self, x, g: seen.update(number(x).tolist()) or draw(self, x, g))
    train("--steps", 20, "--data", "npz:set.npz", "--image_size", 0, capsys=capsys)
    data = open_dataset("npz:set.npz")
    held_out = set(number(data.hold_out(256)[0]).tolist())
    assert len(held_out) == 20 and seen == set(range(400)) - held_out


def test_held_out_shapes_are_not_in_the_stream():
    data = open_dataset("shapes", 8, seed=0)
    held_out, stream = data.hold_out(256)[0].flatten(1), data[np.arange(20_000)][0].flatten(1)
    assert torch.cdist(held_out, stream).min() > 1e-3


# ---- reports, precision, signals ----------------------------------------------------------------------

def test_the_speed_is_that_of_training_alone(monkeypatch, capsys):
    """On a clock that ticks half a second per step, 100 s per save and 7 s per page: 128 images/s."""
    now, save_state = [0.0], checkpoint.save_state

    def pass_by(seconds, call=lambda *a: None):
        return lambda *a: (now.__setitem__(0, now[0] + seconds), call(*a))[1]
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    watched(monkeypatch, pass_by(0.5))
    monkeypatch.setattr(checkpoint, "save_state", pass_by(100, save_state))
    monkeypatch.setattr(log, "draw_curves", pass_by(7))
    train("--steps", 20, "--log_every", 4, "--save_every", 5, capsys=capsys)
    speeds = {line["step"]: line["images_per_s"] for line in log_of("runs/shapes") if "images_per_s" in line}
    assert speeds == {4: 128, 8: 128, 12: 128, 16: 128, 20: 128}


@pytest.mark.parametrize("seconds, share", [(0.0, 0.0), (0.5, 0.5), (1.5, 0.75)])
def test_the_share_of_waiting_is_that_of_a_source_of_known_speed(monkeypatch, capsys, seconds, share):
    """On a clock that ticks half a second per step, and `seconds` while the source makes a batch."""
    now, read = [0.0], shapes.Shapes.__getitem__

    def slow(self, positions):
        now[0] += seconds
        return read(self, positions)
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    watched(monkeypatch, lambda optimizer: now.__setitem__(0, now[0] + 0.5))
    monkeypatch.setattr(shapes.Shapes, "__getitem__", slow)
    train("--steps", 20, "--log_every", 4, "--save_every", 5, capsys=capsys)
    assert [line["wait"] for line in log_of("runs/shapes") if "wait" in line] == [share] * 5


def test_the_precision_is_kept_on_resume(monkeypatch, capsys):
    """auto measures once, at the start; a resume on another machine keeps what was chosen."""
    flags = [flag for flag in NANO if flag not in ("--dtype", "float32")]
    for steps, measured in ((1, torch.bfloat16), (2, torch.float32)):
        monkeypatch.setattr(engine, "pick_dtype", lambda wanted, device, measured=measured:
                            measured if wanted == "auto" else getattr(torch, wanted))
        assert run("train.py", *flags, "--steps", steps, capsys=capsys)[0] == 0
    headers = [line["config"]["dtype"] for line in log_of("runs/shapes") if "config" in line]
    assert headers == ["bfloat16", "bfloat16"] and load_model("runs/shapes")[1].dtype == "bfloat16"


def test_ten_minutes_are_the_most_that_a_kill_can_cost(monkeypatch, capsys):
    """On a clock that ticks four minutes per step a save is due after every third step."""
    now, seen, save_state = [0.0], [], checkpoint.save_state
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    watched(monkeypatch, lambda optimizer: now.__setitem__(0, now[0] + 240))
    monkeypatch.setattr(checkpoint, "save_state", lambda *a: seen.append(a[-1]) or save_state(*a))
    train("--steps", 8, "--save_every", 100, capsys=capsys)
    assert seen == [3, 6, 8]


@pytest.mark.parametrize("number, saves, end", [
    ("SIGUSR1", [3, 6], 6), ("SIGTERM", [3], 3), ("SIGINT", [3], 3)])
def test_signals(monkeypatch, capsys, number, saves, end):
    """During the third step. SIGUSR1 saves once and goes on, SIGTERM saves once and stops."""
    steps, seen, save_state = [], [], checkpoint.save_state

    def step(optimizer):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), getattr(signal, number))
    watched(monkeypatch, step)
    monkeypatch.setattr(checkpoint, "save_state", lambda *a: seen.append(a[-1]) or save_state(*a))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    out = train("--steps", 6, "--save_every", 100, capsys=capsys)
    assert seen == saves and len(steps) == end == reached("runs/shapes")
    assert ("stopped by" in out) == (end == 3)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


# ---- the folder ---------------------------------------------------------------------------------------

def test_the_state_just_written_survives_rotation(tmp_path):
    """Even where states of later steps lie beside it; of those the newest are kept."""
    net = build(Config(model="TiT-nano/4"), (3, 8, 8), 8)
    for step in (50, 60, 70):
        (tmp_path / f"state_{step:08d}.{'0' * 16}.safetensors").write_bytes(b"")
    tensors = {f"{name}.{key}": value.clone() for name in ("net", "ema0.999")
               for key, value in net.state_dict().items()}
    checkpoint.save_state(tmp_path, tensors, net, Config(model="TiT-nano/4"), list("abcdefgh"), 4)
    assert [int(path.name[6:14]) for path in checkpoint.find_states(tmp_path)] == [70, 60, 4]
    assert checkpoint.read_state(checkpoint.find_states(tmp_path)[-1])[1] == 4


def test_bytes_are_on_the_disk_before_the_name_and_then_the_name(monkeypatch, tmp_path):
    """The order of calls: write, flush the file, rename, flush the folder."""
    calls, fsync, replace = [], os.fsync, os.replace
    of = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name
    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux lists what a handle is")
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(("flush", of(handle))) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("rename", Path(b).name)) or replace(a, b))
    engine.atomic_write(tmp_path / "file", lambda path: calls.append(("write", path.name)) or
                        path.write_text("x"))
    assert calls == [("write", "file.tmp"), ("flush", "file.tmp"), ("rename", "file"),
                     ("flush", tmp_path.name)]


def test_the_peak_of_memory_is_in_gib(monkeypatch):
    """Linux counts kilobytes, macOS bytes."""
    import resource
    used = types.SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    monkeypatch.setattr(log.sys, "platform", "linux")
    assert log.peak_memory(CPU) == 3.0
    monkeypatch.setattr(log.sys, "platform", "darwin")
    assert log.peak_memory(CPU) == pytest.approx(3 / 2**10)


def test_the_share_of_the_limit_counts_every_forward_pass(monkeypatch):
    """On a card of a known rate: forward passes per image, times their cost, times images/s."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30)
    row = objective.Objective(lam=1.0, zeta=1.0, style="fc-vs-fe", derivative="central")       # 3 + 2 + 2
    found = log.utilisation(989e9, row, torch.device("cuda"), 50.0)
    assert found == {"memory_gib": 5.0, "mfu": pytest.approx(7 * 989e9 * 50 / 989e12)}
