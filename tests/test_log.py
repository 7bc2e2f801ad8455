"""What a run tells, and what it costs: the log, the curves, the count of operations, the speed table."""
import json
import math
import signal
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import Net, batch, calls_of

from config import Config, UserError
from experiments import bench, memory
from extras.reports import reporter
from log import Log, LossByTime, draw_curves, flops_per_image, forwards, last_words
from model import FAMILIES, MODELS, DiT
from objective import Objective

# ---- the log ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("time_weight", ["cosine", "none"])
def test_the_loss_by_time_is_the_mean_of_each_fifth(time_weight):
    """`loss` is the mean of what is minimised, `loss_by_t` without the weight of the times, by fifths of t.
    What is not finite counts nowhere, and a report begins anew."""
    rng, sums = np.random.default_rng(0), LossByTime(Objective(time_weight=time_weight), torch.device("cpu"))
    for _ in range(2):
        loss, t = rng.uniform(0, 1, (2, 2, 400)).astype(np.float32)
        t[0, :3] = 0.0, 0.2, 1.0
        loss[1, 7:9] = np.nan, np.inf
        for part in range(2):
            sums.add(torch.from_numpy(loss[part]), torch.from_numpy(t[part]))
        line, good = sums.take(), np.isfinite(loss)
        weight = np.cos(math.pi / 2 * np.minimum(t, 1 - 1e-4)) if time_weight == "cosine" else np.ones_like(t)
        fifth = np.minimum(5 * t, 4).astype(int)
        means = [(loss / weight)[good & (fifth == k)].mean() for k in range(5)]
        assert line["loss"] == pytest.approx(loss[good].mean(), rel=1e-5)
        assert line["loss_by_t"] == pytest.approx(means, rel=1e-3)


def test_a_resumed_log_has_every_step_once(tmp_path):
    """Later steps than the state's and a line that was cut off go; headers stay, one for every start."""
    log = Log(tmp_path, Config(), 0, print)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": step / 10})
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n{"step": 8, "lo')
    log.close()
    log = Log(tmp_path, Config(seed=1), 4, print)
    log.write({"step": 6, "loss": 0.9})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 2, 4, None, 6] and lines[-1]["loss"] == 0.9
    assert [line["from_step"] for line in lines if "config" in line] == [0, 4]
    assert lines[3]["config"]["seed"] == 1 and lines[3]["torch"] == torch.__version__


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path):
    told = []
    log = Log(tmp_path, Config(), 0, told.append)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    log.write({"step": 1, "loss": 1.0})
    assert len(told) == 1 and "log.jsonl" in told[0]


def test_what_is_not_finite_or_not_there_is_null(tmp_path):
    """JSON has no nan. A report without a single finite loss has no mean."""
    log = Log(tmp_path, Config(), 0, print)
    log.write({"step": 1, "loss": math.nan, "held_out_loss": math.inf, "lr": 0.5})
    log.close()
    last = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert last == '{"step": 1, "loss": null, "held_out_loss": null, "lr": 0.5}'
    empty = LossByTime(Objective(), torch.device("cpu")).take()
    assert empty == {"loss": None, "loss_by_t": [None] * 5}


def test_a_stopped_run_whose_last_state_is_not_on_disk_says_so():
    with pytest.raises(UserError, match="step 7 is not in runs/shapes: free some disk space"):
        last_words(Config(out="runs/shapes"), signal.SIGTERM, 7, 0, saved=False)


def test_the_curves_are_where_they_belong(tmp_path):
    """On a log scale losses that stay at 1, 10, ... 10^4 are five level lines, equally far apart, of which
    the middle one is grey; the held-out loss is black."""
    with open(tmp_path / "log.jsonl", "w") as file:
        for step in (10, 20, 30):
            print(json.dumps({"step": step, "loss_by_t": [10.0**k for k in range(5)]}), file=file)
            print(json.dumps({"step": step, "held_out_loss": 10**1.5}), file=file)
    draw_curves(tmp_path)
    page = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    column = page[:, 600].astype(int)                       # right of the middle, inside the frame
    coloured = [row for row in range(len(column)) if np.ptp(column[row]) > 60]
    rows = np.array([np.mean(coloured[2 * k:2 * k + 2]) for k in range(len(coloured) // 2)])
    grey = [row for row in range(len(column)) if (column[row] == 0x9A).all()]
    black = [row for row in range(len(column)) if (column[row] == 0).all()]
    assert len(rows) == 4
    spacing = (rows[-1] - rows[0]) / 4
    expected = rows[0] + spacing * np.array([0, 1, 3, 4])
    assert abs(rows - expected).max() <= 1.5 and abs(np.mean(grey) - rows[0] - 2 * spacing) <= 1.5
    assert abs(np.mean(black) - rows[0] - 2.5 * spacing) <= 1.5


# ---- the cost -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    dict(), dict(zeta=0.5, style="ft-vs-fe"), dict(zeta=0.0, style="ft-vs-fe"), dict(lam=0.5), dict(lam=1.0),
    dict(lam=1.0, derivative="backward"), dict(lam=1.0, zeta=1.0, style="fc-vs-fe"),
    dict(lam=1.0, zeta=1.0, style="fc-vs-xz", derivative="backward")])
def test_forwards_counts_the_calls(settings):
    """Every call of network and teacher, and twice as much again for the backward pass."""
    x, z, t, y, drop = batch()
    net, teacher = Net(), Net(7)
    calls = [calls_of(net), calls_of(teacher)]
    objective = Objective("linear", **settings)
    objective(net, x, y, t, z, drop, teacher)
    assert forwards(objective) == len(calls[0]) + len(calls[1]) + 2


@pytest.mark.parametrize("name", ["TiT-XXS/4", "SiT-XXS/4", "LightningDiT-XXS/2", "DiT-XXS/4"])
def test_flops_are_two_per_weight_and_token_and_the_attention_products(name):
    net = MODELS[name](input_size=16, in_channels=4, num_classes=7)
    tokens, flops = (16 // net.patch_size) ** 2, 0
    for part, module in net.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            flops += 2 * module.weight.numel() * (1 if "adaLN" in part or "t_embedder" in part else tokens)
        if part.endswith("attn.proj"):
            flops += 4 * tokens**2 * module.in_features
    assert flops_per_image(net) == flops


def test_xl_costs_237_gflop_an_image():
    """TiT-XL/1 on 16x16x32, forward."""
    with FakeTensorMode():
        net = MODELS["TiT-XL/1"](input_size=16, in_channels=32, num_classes=1000)
        assert flops_per_image(net) == pytest.approx(237e9, rel=0.03)


def test_the_speed_table(monkeypatch, capsys):
    """A row for each way to train, tune and sample, here in 4 steps where it has 40; none is faster than the
    matrix products are (by a third: other programs run too)."""
    for what, call in bench.SAMPLE.items():
        if "40" in what:
            monkeypatch.setitem(bench.SAMPLE, what, partial(call.func, 4, *call.args[1:]))
    monkeypatch.setitem(MODELS, "one/8", partial(DiT, patch_size=8, depth=1, hidden_size=128, num_heads=2,
                                                 **FAMILIES["TiT"]))
    bench.main(bench.Options(model="one/8", size=8, compiles="no", dtypes="float32", batches="16",
                             seconds=0.01, device="cpu"))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| float32 |" in line]
    assert len(rows) == len(bench.TRAIN) + len(bench.TUNE) + len(bench.SAMPLE)
    assert all(0 < float(row[8].strip().rstrip("%")) < 130 for row in rows)
    with pytest.raises(ValueError, match="nothing"):
        bench.main(bench.Options(model="nothing", device="cpu"))


def test_reports_go_on_after_a_kill(tmp_path, monkeypatch):
    """tensorboard forgets the steps that are repeated; wandb keeps one id per run; no login is one line."""
    boards, runs = [], []
    board = types.SimpleNamespace(SummaryWriter=lambda out, purge_step: boards.append(purge_step))
    started = types.SimpleNamespace(log=print)
    wandb = types.SimpleNamespace(util=types.SimpleNamespace(generate_id=lambda: f"id{len(runs)}"),
                                  init=lambda **how: runs.append(how["id"]) or started)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (0, 40):
        for name in ("tensorboard", "wandb"):
            reporter(Config(report_to=name), tmp_path, step)
    assert boards == [1, 41] and runs == ["id0", "id0"]

    def init(**how):
        raise RuntimeError("api_key not configured\nmore")
    wandb.init = init
    with pytest.raises(ValueError, match=r"wandb does not start \(api_key not configured\): omit"):
        reporter(Config(report_to="wandb"), tmp_path, 0)


def test_a_state_that_appears_before_the_lock_is_not_lost(tmp_path):
    """A run is started while its predecessor is still saving: it must not start over and cut the log."""
    log = Log(tmp_path, Config(), 0, print)
    log.write({"step": 7, "loss": 0.5})
    (tmp_path / f"state_00000007.{'0' * 16}.safetensors").write_bytes(b"")
    log.close()
    with pytest.raises(ValueError, match="run the command again"):
        Log(tmp_path, Config(), 0, print)
    assert '"step": 7' in (tmp_path / "log.jsonl").read_text()
    Log(tmp_path, Config(), 7, print).close()


def test_the_count_of_memory_is_the_sum_of_what_each_layer_needs():
    """A linear layer keeps its input and a square its argument; the weights are there anyway."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 32))
    loss = lambda n: memory.kept(net, lambda: net(torch.zeros(n, 8)).square().sum())
    assert loss(1) == 4 * (8 + 16 + 32) and loss(5) == 5 * loss(1)
