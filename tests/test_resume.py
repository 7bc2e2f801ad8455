"""A run goes on as if nothing had happened: resume, any split of the batch, optimisers, learning rate."""
import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from runs import NANO, RUNS, assert_same, log_of, reached
from runs import train_nano as train
from torch.testing import assert_close
from toys import run, states

import checkpoint
import data
import optim
from checkpoint import config_from, load_model
from config import Config
from objective import Objective
from optim import Muon, RAdam, learning_rate, orthogonal
from train import CHUNK, chunks_of, draw, sample_indices, split_batch

OLD_RUN = Path(__file__).resolve().parent / "old_run"


pytestmark = pytest.mark.usefixtures("home")


def one_line(err, *words):
    return err.startswith("error: ") and err.strip().count("\n") == 0 and all(word in err for word in words)


# ---- resume -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(capsys, name):
    """Stopped half-way and resumed: the same weights, averages, teacher and optimiser, and the same log."""
    if "start" in RUNS[name]:
        train("--steps", 3, "--out", "start", capsys=capsys)
    train("--steps", 20, "--out", "straight", *RUNS[name], capsys=capsys)
    train("--steps", 10, "--out", "halves", *RUNS[name], capsys=capsys)
    out = train("--steps", 20, "--out", "halves", *RUNS[name], capsys=capsys)
    assert "resumed from halves/state_00000010" in out
    assert_same("straight", "halves")
    keys = ("step", "images", "loss", "loss_by_t", "grad_norm", "lr")
    logs = [[[line[key] for key in keys] for line in log_of(out) if "loss" in line]
            for out in ("straight", "halves")]
    assert logs[0] == logs[1] and [line[0] for line in logs[0]] == [5, 10, 15, 20]


def test_a_run_with_the_former_names_of_settings_goes_on(capsys):
    """tests/old_run was written under other names of the settings; its program logged the losses below."""
    shutil.copytree(OLD_RUN / "many", "many")
    shutil.copytree(OLD_RUN / "few", "few")
    flags = ("--image_size 8 --model TiT-nano/4 --batch_size 16 --no-compile --dtype float32 --device cpu "
             "--log_every 2 --warmup 5 --warmdown 0").split()
    recipe = "--optimizer adamw --lr 8e-3 --zeta 0.5 --kappa auto".split()      # as it was then
    status, out, err = run("train.py", *flags, *recipe, "--steps", 20, "--out", "many", capsys=capsys)
    assert status == 0 and "resumed from many/state_00000010" in out, err
    losses = {line["step"]: line["loss"] for line in log_of("many") if "loss" in line}
    expected = {12: 0.710922, 14: 0.610161, 16: 0.58915, 18: 0.714043, 20: 0.424769}
    assert {step: losses[step] for step in expected} == pytest.approx(expected, rel=1e-4)
    flags = flags[:-4]
    status, out, err = run("train.py", "--recipe", "shapes-few", *flags, "--steps", 6, "--init_from", "many",
                           "--out", "few", capsys=capsys)
    assert status == 0 and "resumed from few/state_00000004" in out and reached("few") == 6, err


def test_the_settings_of_a_former_run_have_their_new_names():
    _, few, names = load_model(OLD_RUN / "few")
    assert (few.lam, few.zeta, few.style, few.derivative, few.dt) == (1.0, 1.0, "fc-vs-xz", "backward", 0.05)
    assert (few.x_pred, few.kappa, few.rho, few.gap, few.sample_steps) == (True, 0.0, 1.0, (0.001, 0.5), 2)
    assert (few.time_weight, few.time_beta, few.cosine_loss) == ("none", (0.8, 1.0, 1.0), False)
    assert (few.warmdown, few.grad_clip, few.compile, len(names)) == (0.7, 1.0, None, 8)
    for settings, expected in ((dict(clip=2.0), (1.0, 2.0)), (dict(clip=0.0, grad_clip=2.0), (0.0, 2.0))):
        config = config_from({"config": json.dumps(settings)})      # clip has changed its meaning
        assert (config.clip, config.grad_clip) == expected
    net, many, _ = load_model(OLD_RUN / "many")
    assert (many.derivative, many.warmdown, many.kappa, many.rho) == ("central", 0.0, "auto", 0.0)
    assert net.x_pred and len(net.blocks) == 1


def test_the_state_that_was_resumed_from_is_let_go(capsys, monkeypatch):
    """At the next save the process maps no state file: once it is pruned, its disk is free."""
    maps, original = [], checkpoint.state_tensors

    def state_tensors(*arguments):
        maps.append(Path("/proc/self/maps").read_text())
        return original(*arguments)
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux lists what a process maps")
    train("--steps", 2, "--optimizer", "muon", capsys=capsys)
    with checkpoint.safetensors.safe_open(states("runs/shapes")[0], "pt") as file:
        held = file.get_tensor("net.pos_embed")
    assert "state_" in Path("/proc/self/maps").read_text()      # so it would be seen
    del file, held
    monkeypatch.setattr(checkpoint, "state_tensors", state_tensors)
    train("--steps", 4, "--optimizer", "muon", capsys=capsys)
    assert len(maps) == 1 and "state_" not in maps[0]


def test_a_complete_run_says_so_and_fresh_starts_over(capsys):
    train("--steps", 2, capsys=capsys)
    assert "this run is complete" in train("--steps", 2, capsys=capsys)
    assert "resumed" not in train("--steps", 2, "--fresh", capsys=capsys)
    assert Path("runs/shapes.old1/model.safetensors").exists()


def test_a_restart_by_torchrun_does_not_start_over(capsys, monkeypatch):
    """Its agent repeats the command, --fresh and all, after a process is lost."""
    train("--steps", 2, "--fresh", capsys=capsys)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "resumed from runs/shapes/state_00000002" in train("--steps", 4, "--fresh", capsys=capsys)
    assert not Path("runs/shapes.old1").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "resumed" not in train("--steps", 4, "--fresh", capsys=capsys)


def test_other_settings_are_refused_by_name(capsys):
    """What decides the result must stay, or be allowed to change; where and how fast it runs is free."""
    train("--steps", 2, capsys=capsys)
    for more, words in ((("--seed", 3, "--lr", 0.1), ("seed: 0 -> 3", "lr: 0.008 -> 0.1", "--allow_change")),
                        (("--init_from", "elsewhere"), ("init_from:  -> elsewhere",)),
                        (("--ema", 0.9, "--allow_change"), ("ema0.9",)),
                        (("--optimizer", "muon", "--allow_change"), ("adamw", "muon")),
                        (("--steps", 1), ("already at step 2",))):
        status, _, err = run("train.py", *NANO, "--steps", 4, *more, capsys=capsys)
        assert status == 2 and one_line(err, *words)
    free = ("--log_every", 2, "--micro_batch", 16, "--grad_checkpoint", "--save_every", 3)
    assert "resumed" in train("--steps", 4, "--seed", 3, "--allow_change", *free, capsys=capsys)


def test_kept_checkpoints(capsys):
    train("--steps", 7, "--save_every", 2, capsys=capsys)
    assert [int(path.name[6:14]) for path in states("runs/shapes")] == [6, 7]
    assert not list(Path("runs/shapes").glob("*.tmp"))


# ---- the split of the batch ---------------------------------------------------------------------------

@pytest.mark.parametrize("micro", [0, 16, 32])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_batch_does_not_depend_on_how_it_is_dealt_out(monkeypatch, world, micro):
    """All processes and accumulation steps together work on the same images, times, noise and drops."""
    config = Config(batch_size=128, steps=3, micro_batch=micro)
    objective, generator = Objective(), torch.Generator()
    accumulate = split_batch(config, world)
    assert config.batch_size // world // accumulate <= (micro or 128)
    parts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        batches = sample_indices(config, accumulate, 1)
        for step in (1, 2):
            for turn in range(accumulate):
                positions = next(batches)
                x = torch.zeros(len(positions), 1, 2, 2)
                chunks = chunks_of(config, accumulate, turn)
                drawn = draw(objective, x, 5, step, chunks, generator)
                parts.append((torch.from_numpy(positions), *drawn))
        assert next(batches, None) is None
    positions, t, z, drop = (torch.cat(rows) for rows in zip(*parts))
    order = positions.argsort()
    assert positions[order].tolist() == list(range(128, 384))
    for block in range(16):
        step, number, rows = 1 + block // 8, block % 8, order[block * CHUNK:(block + 1) * CHUNK]
        generator.manual_seed(data.derive_seed(5, step, number))
        x = torch.zeros(CHUNK, 1, 2, 2)
        expected = objective.draw(x, generator)
        for ours, theirs in zip((t, z, drop), expected):
            assert torch.equal(ours[rows], theirs)


def test_same_seed_same_weights_and_micro_batches_do_not_matter(capsys):
    weights = {}
    for out, extra in (("a", ""), ("b", ""), ("c", "--micro_batch 16"), ("d", "--seed 1")):
        train("--steps", 3, "--batch_size", 48, "--out", out, *extra.split(), capsys=capsys)
        weights[out] = torch.cat([p.flatten() for p in load_model(out)[0].parameters()])
    assert torch.equal(weights["a"], weights["b"])
    norm = weights["a"].norm()
    assert (weights["a"] - weights["c"]).norm() < 1e-6 * norm < (weights["a"] - weights["d"]).norm()


# ---- Muon and the learning rate -----------------------------------------------------------------------

def small_net():
    block = torch.nn.Sequential()
    block.mlp = torch.nn.Sequential()
    block.mlp.w, block.attn = torch.nn.Linear(6, 10), torch.nn.Sequential(torch.nn.Linear(10, 4))
    block.adaLN_modulation, head = torch.nn.Linear(4, 8), torch.nn.Sequential()
    head.mlp = torch.nn.Linear(4, 3)
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block]), "head": head})


def test_orthogonal_keeps_the_singular_vectors_and_evens_the_values():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (9, 30))
    for values in (torch.ones(6), torch.linspace(0.05, 3, 6), torch.tensor([1e3, 900, 800, 700, 600, 500]),
                   torch.tensor([1, 0.3, 0.1, 0.03, 0.011, 0.011])):
        for left, right in ((u, v), (v, u)):
            for dtype, off, least in ((torch.bfloat16, 0.03, 0.65), (torch.float32, 1e-4, 0.729)):
                x, = orthogonal((left @ values.diag() @ right.T)[None], dtype)
                middle = left.T @ x.float() @ right
                assert x.dtype == dtype and (middle - middle.diag().diag()).abs().max() < off
                assert least < middle.diag().min() and middle.diag().max() < 2 - least


def test_the_quintics_are_the_best_of_their_kind():
    """By equal ripples: each touches 1 + e and 1 - e in turn, four times, where the last left the values."""
    low, high = 0.01, 1.0
    for a, b, c in optim.QUINTICS:
        x = torch.logspace(math.log10(low), math.log10(high), 100_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        largest = error.abs().max()
        turns = error[(error.abs() > 0.99 * largest)].sign()
        assert 1 + (turns[1:] != turns[:-1]).sum() == 4
        low, high = (1 - largest).item(), (1 + largest).item()
    assert 0.729 < low and high < 1.271


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest(monkeypatch):
    monkeypatch.setattr(optim, "QUINTICS", 5 * [(3.4445, -4.7750, 2.0315)])     # torch's polynomial
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon to compare with")
    net = small_net()
    twin = copy.deepcopy(net)
    ours = Muon(net, torch.bfloat16, 0.02, (0.9, 0.99), weight_decay=0.1, fused=True)
    matrices = [twin.blocks[0].mlp.w.weight, twin.blocks[0].attn[0].weight]
    assert list(ours.matrices) == [p.shape for p in matrices]
    rest = [p for p in twin.parameters() if all(p is not m for m in matrices)]
    theirs = (torch.optim.Muon(matrices, 0.02, weight_decay=0.1, momentum=0.95,
                               adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW(rest, 0.02, (0.9, 0.99), weight_decay=0.1, fused=True))
    for _ in range(5):
        for p, q in zip(net.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters()):
        assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_muon_leaves_what_has_no_gradient():
    """A matrix that a loss does not reach, as another may after it."""
    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))
    optimizer, x = Muon(net, torch.float32, lr=0.1), torch.randn(3, 4)
    for used in (0, 1):
        before = [block.weight.detach().clone() for block in net.blocks]
        optimizer.zero_grad()
        net.blocks[used](x).square().sum().backward()
        optimizer.step()
        moved = [not torch.equal(block.weight, old) for block, old in zip(net.blocks, before)]
        assert moved == [used == 0, used == 1]


def test_radam_is_torchs():
    """In the early steps, which have no second moment, at their end, and after it; also from a state on."""
    net = small_net()
    twin = copy.deepcopy(net)
    start = [p.detach().clone() for p in net.parameters()]
    settings = dict(lr=0.01, betas=(0.9, 0.999))
    ours, theirs = RAdam(net.parameters(), **settings, weight_decay=0.0, fused=True), torch.optim.RAdam(
        twin.parameters(), **settings)
    for step in range(20):
        for p, q in zip(net.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (ours, theirs):
            optimizer.step()
        for p, q, first in zip(net.parameters(), twin.parameters(), start):
            assert_close(p - first, q - first, rtol=1e-4, atol=1e-7)
        if step in (2, 10):
            state = ours.state_dict()
            ours = RAdam(net.parameters(), **settings, weight_decay=0.0, fused=True)
            ours.load_state_dict(state)
    assert ours.param_groups[0]["lr"] == 0.01 and not ours.early


def test_the_learning_rate_rises_stays_and_falls():
    """lr (step + 1) / warmup, then lr, then lr (1 - cos(pi left)) / 2; without warm-down it stays."""
    config = Config(lr=0.4, warmup=10, warmdown=0.5, steps=100)
    found = [learning_rate(config, step) for step in range(101)]
    expected = [0.4 * (step + 1) / 10 for step in range(10)] + [0.4] * 40
    expected += [0.2 * (1 - math.cos(math.pi * (100 - step) / 50)) for step in range(50, 101)]
    assert found == pytest.approx(expected) and found[100] == 0
    constant = Config(lr=0.4, warmup=0, warmdown=0, steps=100)
    assert {learning_rate(constant, step) for step in range(100)} == {0.4}
