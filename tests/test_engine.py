"""What the training engine promises: exact resume, one result for any number of processes, and survival of faults."""
import copy
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_commands import ROOT, run
from torch.testing import assert_close

import data
from train import Muon, orthogonal

# four tokens: with one, the exact gradient of q and k is zero and Adam would magnify its rounding errors
TINY = ("--image_size 8 --model TiT-XXS/4 --batch_size 64 --compile no --dtype float32 --device cpu --held_out 16 --log_every 5 --warmup 5 --decay 0 "
        "--sample_every 1000 --held_out_every 1000 --save_every 10").split()
TEACH = "--enhancement_ratio 0.5 --enhancement_style ft-vs-fe".split()
RUNS = {"many-step": TEACH,
        "few-step": "--consistency_ratio 1 --enhancement_ratio 1 --enhancement_style fc-vs-xz --optimizer radam --init_from start".split(),
        "tuning": "--consistency_ratio 1 --derivative jvp --enhancement_ratio 1.5 --enhancement_style fc-vs-fe --huber 5 --ema 0.99,0.9 --init_from start".split(),
        "muon": ["--optimizer", "muon", *TEACH]}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def states(out):
    return sorted(Path(out).glob("state_*.safetensors"))


def same(one, other, exactly=True):
    """All tensors of the newest states of two runs: weights, averages, teacher, optimiser."""
    one, other = load_file(states(one)[-1]), load_file(states(other)[-1])
    assert one.keys() == other.keys() and any(k.startswith("optimizer.") for k in one)
    for name in one:
        if exactly:
            assert_close(one[name], other[name], rtol=0, atol=0, msg=name)
    weights = [torch.cat([v.flatten() for k, v in state.items() if k.startswith("net.")]) for state in (one, other)]
    return ((weights[0] - weights[1]).norm() / weights[0].norm()).item()


def train(*flags, capsys):
    status, out, err = run("train.py", *TINY, *flags, capsys=capsys)
    assert status == 0, err
    return out


def torchrun(processes, *flags, more=(), check=True):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *more]
    if not more:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            command += [f"--master_port={s.getsockname()[1]}"]
    done = subprocess.run([*command, str(ROOT / "train.py"), *TINY, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


# ---- resume -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact(home, capsys, name):
    if "start" in RUNS[name]:
        train("--steps", 3, "--out", "start", capsys=capsys)
    train("--steps", 20, "--out", "straight", *RUNS[name], capsys=capsys)
    train("--steps", 10, "--out", "halves", *RUNS[name], capsys=capsys)
    out = train("--steps", 20, "--out", "halves", *RUNS[name], capsys=capsys)
    assert "resumed from halves/state_00000010" in out
    same("straight", "halves")
    logs = [[{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "loss_by_t", "grad_norm", "lr")} for line in (Path(out) / "log.jsonl").read_text().splitlines()
             if '"loss"' in line] for out in ("straight", "halves")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [5, 10, 15, 20]


def test_a_complete_run_says_so_and_fresh_starts_over(home, capsys):
    train("--steps", 4, capsys=capsys)
    assert "this run is complete" in train("--steps", 4, capsys=capsys)
    assert "resumed" not in train("--steps", 4, "--fresh", "yes", capsys=capsys) and Path("runs/shapes.old1/model.safetensors").exists()


def test_other_settings_are_refused_by_name(home, capsys):
    train("--steps", 4, capsys=capsys)
    status, _, err = run("train.py", *TINY, "--steps", 8, "--seed", 3, "--lr", "0.1", capsys=capsys)
    assert status == 2 and "seed: 0 -> 3" in err and "lr: 0.008 -> 0.1" in err and "--allow_change" in err and len(err.strip().splitlines()) == 1
    assert "resumed" in train("--steps", 8, "--seed", 3, "--allow_change", "yes", "--log_every", 2, "--micro_batch", 16, capsys=capsys)


def test_what_a_state_cannot_give_is_said(home, capsys):
    train("--steps", 4, capsys=capsys)
    for flags, words in ((("--ema", 0.9), "has no ema0.9"), (("--optimizer", "muon"), "has the state of adamw, not of muon")):
        status, _, err = run("train.py", *TINY, "--steps", 8, "--allow_change", "yes", *flags, capsys=capsys)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1
    status, _, err = run("train.py", *TINY, "--steps", 2, capsys=capsys)
    assert status == 2 and "already at step 4" in err
    status, _, err = run("train.py", *TINY, "--steps", 8, "--init_from", "elsewhere", capsys=capsys)
    assert status == 2 and "init_from:  -> elsewhere" in err


def test_kept_checkpoints(home, capsys):
    train("--steps", 60, "--keep", 2, "--keep_every", 30, capsys=capsys)
    assert [int(p.name[6:14]) for p in states("runs/shapes")] == [30, 50, 60]
    assert not list(Path("runs/shapes").glob("*.tmp")) and Path("runs/shapes/best.safetensors").exists() and Path("runs/shapes/loss.png").exists()


# ---- damage -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_used(home, capsys, damage):
    train("--steps", 30, "--out", "straight", capsys=capsys)
    train("--steps", 20, "--out", "hurt", capsys=capsys)
    newest = states("hurt")[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"truncated": content[:-1000], "flipped": content, "emptied": b""}[damage])
    out = train("--steps", 30, "--out", "hurt", capsys=capsys)
    assert f"{newest} is damaged" in out and "resumed from hurt/state_00000010" in out
    same("straight", "hurt")


def test_a_malicious_pickle_is_never_executed(home, capsys):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(home / "executed"),))
    bomb = pickle.dumps(Bomb())
    train("--steps", 10, "--out", "run", capsys=capsys)
    import hashlib
    Path(f"run/state_00000099.{hashlib.sha256(bomb).hexdigest()[:16]}.safetensors").write_bytes(bomb)      # even with a right checksum
    status, _, err = run("train.py", *TINY, "--steps", 20, "--out", "run", capsys=capsys)
    assert status == 2 and "not a state" in err
    Path("bomb.safetensors").write_bytes(bomb)
    torch.save({"model": Bomb()}, "bomb.pt")
    for file in ("bomb.safetensors", "bomb.pt"):
        assert run("sample.py", "--ckpt", file, capsys=capsys)[0] == 2
        assert run("train.py", *TINY, "--out", "other", "--init_from", file, capsys=capsys)[0] == 2
    assert not Path("executed").exists()


# ---- numbers that are not finite ----------------------------------------------------------------------------------

def plant(monkeypatch, bad):
    """NaN in the first picture of every step for which bad(step)."""
    original = data.Shapes.__getitem__

    def getitem(self, positions):
        x, y = original(self, positions)
        x[[i for i, p in enumerate(np.asarray(positions).tolist()) if p % 64 == 0 and p < 2**60 and bad(p // 64)]] = float("nan")
        return x, y
    monkeypatch.setattr(data.Shapes, "__getitem__", getitem)


@pytest.mark.parametrize("optimizer", ["adamw", "radam", "muon"])
def test_one_nan_is_skipped_and_counted(home, capsys, monkeypatch, optimizer):
    train("--steps", 7, "--out", "before", "--optimizer", optimizer, capsys=capsys)
    plant(monkeypatch, lambda step: step == 7)
    train("--steps", 8, "--out", "skipped", "--optimizer", optimizer, capsys=capsys)
    a, b = (load_file(states(out)[-1]) for out in ("before", "skipped"))
    for name in a:      # the step left weights and optimiser alone
        if name.startswith(("net.", "optimizer.")):
            assert_close(a[name], b[name], rtol=0, atol=0, msg=name)
    train("--steps", 30, "--out", "skipped", "--optimizer", optimizer, capsys=capsys)
    lines = [json.loads(line) for line in Path("skipped/log.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped", 0) for line in lines) == 1 and all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_nan_from_then_on_stops_the_run_with_a_usable_checkpoint(home, capsys, monkeypatch):
    plant(monkeypatch, lambda step: step >= 17)
    status, out, err = run("train.py", *TINY, "--steps", 100, "--max_skipped", 10, capsys=capsys)
    assert status == 2 and "steps in a row were not finite" in err and "t = 0." in out + err
    assert all(v.isfinite().all() for v in load_file(states("runs/shapes")[-1]).values())
    monkeypatch.undo()
    monkeypatch.chdir(home)
    train("--steps", 60, capsys=capsys)


# ---- processes ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name, shard", [("many-step", "no"), ("many-step", "yes"), ("muon", "no")])
def test_any_deal_of_the_batch_trains_the_same_model(home, capsys, name, shard):
    flags = RUNS[name]
    for micro in (16, 32, 64):
        train("--steps", 10, "--out", f"1x{64 // micro}", "--micro_batch", micro, *flags, capsys=capsys)
    rounding = max(same("1x4", "1x2", exactly=False), same("1x4", "1x1", exactly=False))       # what one process does to itself, on this machine
    assert rounding <= 2e-6
    for processes, micro in ((2, 16), (4, 16)):
        torchrun(processes, "--steps", "10", "--out", f"{processes}", "--micro_batch", str(micro), "--shard", shard, *flags)
        assert same("1x4", f"{processes}", exactly=False) <= max(1e-6, 2 * rounding)


@pytest.mark.slow
def test_resume_is_exact_compiled_and_on_two_threads(tmp_path):
    """As a user has it: the default network, bfloat16 where it is faster, torch.compile, whose backward has threads that add into one sum."""
    common = "--decay 0 --save_every 30 --sample_every 1000 --held_out_every 1000".split()
    for out, steps in (("whole", "60"), ("parts", "30"), ("parts", "60")):
        subprocess.run([sys.executable, str(ROOT / "train.py"), *common, "--steps", steps, "--out", out], cwd=tmp_path, check=True, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=400)
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact_on_two_processes(home, capsys, name):
    train("--steps", 3, "--out", "start", capsys=capsys)
    torchrun(2, "--steps", "20", "--out", "straight", *RUNS[name])
    torchrun(2, "--steps", "10", "--out", "halves", *RUNS[name])
    torchrun(2, "--steps", "20", "--out", "halves", *RUNS[name])
    same("straight", "halves")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["no", "yes"])
def test_a_run_of_one_process_resumes_on_two_and_back(home, capsys, shard):
    train("--steps", 10, "--out", "straight", *TEACH, capsys=capsys)
    train("--steps", 4, "--out", "moved", *TEACH, capsys=capsys)
    torchrun(2, "--steps", "7", "--out", "moved", "--shard", shard, *TEACH)
    assert "resumed" in train("--steps", 10, "--out", "moved", *TEACH, capsys=capsys)
    assert same("straight", "moved", exactly=False) <= 1e-6


@pytest.mark.slow
def test_two_agents_by_rendezvous_train_as_one_process(home, capsys):
    train("--steps", 10, "--out", "one", capsys=capsys)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7",
               str(ROOT / "train.py"), *TINY, "--steps", "10", "--out", "two"]
    agents = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0]
    assert same("one", "two", exactly=False) <= 1e-6


# ---- Muon ---------------------------------------------------------------------------------------------------------

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
    for values in (torch.ones(6), torch.linspace(0.05, 3, 6), torch.tensor([1e3, 900, 800, 700, 600, 500])):
        for matrix in (u @ values.diag() @ v.T, v @ values.diag() @ u.T):
            for dtype, off in ((torch.bfloat16, 0.02), (torch.float32, 1e-4)):
                x = orthogonal(matrix, dtype)
                middle = (u.T @ x.float() @ v) if len(matrix) == 9 else (v.T @ x.float() @ u)
                assert x.dtype == dtype and (middle - middle.diag().diag()).abs().max() < off and 0.65 < middle.diag().min() and middle.diag().max() < 1.25


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon to compare with")
    torch.manual_seed(0)
    net = small_net()
    twin = copy.deepcopy(net)
    ours = Muon(net, torch.bfloat16, 0.02, (0.9, 0.99), weight_decay=0.1, fused=True)
    matrices = [twin.blocks[0].mlp.w.weight, twin.blocks[0].attn[0].weight]
    assert [tuple(p.shape) for p in ours.matrices] == [tuple(p.shape) for p in matrices]
    rest = [p for p in twin.parameters() if all(p is not m for m in matrices)]
    theirs = (torch.optim.Muon(matrices, 0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
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


# ---- the fault harness --------------------------------------------------------------------------------------------

def launch(out, steps, seconds, *more):
    """train.py in a process, and a group of processes, of its own, on a disk that takes `seconds` to flush."""
    command = [sys.executable, str(ROOT / "tests/faulty.py"), "marker", str(seconds), *TINY, "--steps", str(steps), "--out", out, *more]
    return subprocess.Popen(command, stdout=open("out.txt", "a"), stderr=subprocess.STDOUT, start_new_session=True)


def wait_until(condition, process=None, limit=100):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(Path("out.txt").read_text()[-2000:])
        if process is not None and process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


@pytest.mark.slow
def test_kill_9_at_twenty_moments(home, capsys):
    """Every other kill lies inside a save, by its marker; the others at a random moment of the training after one, so that the run gets on."""
    chance, inside, kills = random.Random(0), 0, 0
    marker = Path("marker")
    while kills < 20:
        before = len(Path("out.txt").read_text()) if Path("out.txt").exists() else 0
        marker.unlink(missing_ok=True)
        saved = states("killed")
        process = launch("killed", 2000, 0.05)
        wait_until(lambda: "batch 64 =" in Path("out.txt").read_text()[before:], process)
        if kills % 2:
            wait_until(marker.exists, process)
            time.sleep(chance.uniform(0, 0.04))
        else:
            wait_until(lambda: states("killed") != saved, process)
            time.sleep(chance.uniform(0, 1.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        inside += marker.exists()
        kills += 1
    assert inside >= 5
    reached = int(states("killed")[-1].name[6:14])
    steps = str(reached + 20)
    train("--steps", steps, "--out", "killed", capsys=capsys)
    train("--steps", steps, "--out", "straight", capsys=capsys)
    same("straight", "killed")
    assert not [p for p in Path("killed").iterdir() if p.suffix == ".damaged"]
    print(f"kill -9: {kills} kills, {inside} of them inside a save, {reached} steps survived")


@pytest.mark.slow
def test_sigterm_five_times(home, capsys):
    """To the whole group, as torchrun, SLURM and a terminal send it: the processes that read data must not die of it. Every state is one that was asked for."""
    for k, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)):
        before, saved = len(Path("out.txt").read_text()) if Path("out.txt").exists() else 0, states("asked")
        process = launch("asked", 100000, 0, "--workers", "2", "--save_every", "1000000")
        said = lambda: Path("out.txt").read_text()[before:]
        assert wait_until(lambda: "batch 64 =" in said(), process)
        time.sleep(0.3 + 0.2 * k)
        assert states("asked") == saved
        process.send_signal(signal.SIGUSR1)
        assert wait_until(lambda: states("asked") != saved, process), "SIGUSR1 ended the run"
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == 0
        reached = int(states("asked")[-1].name[6:14])
        assert f"stopped by {number.name} at step {reached} of" in said()
    for out in ("asked", "straight"):
        train("--steps", reached + 5, "--out", out, capsys=capsys)
    same("straight", "asked")


STUCK = """
import ctypes, os, signal, threading
from train import Requests
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with Requests(None, 1):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)      # waits for ever and runs no handler, as does a collective whose peer is gone
"""


def test_a_stuck_process_leaves_when_its_grace_is_over(home):
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUCK], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "stopped without saving" in done.stderr and time.monotonic() - start < 50


@pytest.mark.slow
def test_a_lost_process_is_restarted_by_torchrun(home, capsys):
    """And goes on, though the command says --fresh: that was for the first start."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2", f"--master_port={port}",
               str(ROOT / "train.py"), *TINY, "--steps", "400", "--out", "lost", "--fresh", "yes"]
    agent = subprocess.Popen(command, stdout=open("out.txt", "w"), stderr=subprocess.STDOUT)
    wait_until(lambda: len(states("lost")) > 0, agent)
    children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    workers = [int(c) for c in children if "train.py" in Path(f"/proc/{c}/cmdline").read_text() and "torch.distributed.run" not in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    assert agent.wait(timeout=200) == 0, Path("out.txt").read_text()[-3000:]
    assert "resumed from lost/state_" in Path("out.txt").read_text()
    torchrun(2, "--steps", "400", "--out", "straight")
    same("straight", "lost")


@pytest.mark.slow
def test_a_full_disk_is_survived(home, capsys):
    disk = home / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        train("--steps", 10, "--out", disk / "run", capsys=capsys)
        with open(disk / "ballast", "wb") as file:
            try:
                while file.write(bytes(1 << 16)):
                    file.flush()
            except OSError:
                pass
        status, out, err = run("train.py", *TINY, "--steps", 25, "--out", disk / "run", capsys=capsys)
        assert status == 0 and "the checkpoint of step 20 could not be written" in out + err
        assert [int(p.name[6:14]) for p in states(disk / "run")] == [10] and not list((disk / "run").glob("*.tmp"))
        (disk / "ballast").unlink()
        assert "resumed from" in train("--steps", 40, "--out", disk / "run", capsys=capsys)
        train("--steps", 40, "--out", "straight", capsys=capsys)
        same("straight", disk / "run")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)])
