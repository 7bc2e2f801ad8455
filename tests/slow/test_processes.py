"""One result for any number of processes: the batch dealt out, resume, FSDP2, two agents, compiled."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (FLAGS, RUNS, TEACH, assert_same, distance, free_port, log_of, reached, train, train_on,
                  workers_of)
from toys import ROOT, states

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name, fsdp", [("many-step", False), ("many-step", True), ("muon", False)])
def test_any_deal_of_the_batch_trains_the_same_model(capsys, name, fsdp):
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 processes x accumulation steps: weights within 1e-6, or twice what one
    process makes of other accumulations on this machine."""
    flags = [*RUNS[name], "--steps", 10, "--batch_size", 128]
    for micro in (16, 32, 128):
        train(*flags, "--out", f"1x{128 // micro}", "--micro_batch", micro, capsys=capsys)
    rounding = max(distance("1x8", "1x4"), distance("1x8", "1x1"))
    assert rounding <= 2e-6
    for processes in (2, 4, 8):
        out = f"{processes} processes"
        train_on(processes, *flags, "--out", out, "--micro_batch", 16, *["--fsdp"] * fsdp)
        assert distance("1x8", out) <= max(1e-6, 2 * rounding)


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_exact_on_two_processes(capsys, name):
    if "start" in RUNS[name]:
        train("--steps", 3, "--out", "start", capsys=capsys)
    for steps, out in ((12, "straight"), (6, "halves"), (12, "halves")):
        train_on(2, "--steps", steps, "--out", out, *RUNS[name])
    assert_same("straight", "halves")


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_of_one_process_resumes_on_two_and_back(capsys, fsdp):
    train("--steps", 10, "--out", "straight", *TEACH, capsys=capsys)
    train("--steps", 4, "--out", "moved", *TEACH, capsys=capsys)
    train_on(2, "--steps", 7, "--out", "moved", *TEACH, *["--fsdp"] * fsdp)
    assert "resumed" in train("--steps", 10, "--out", "moved", *TEACH, capsys=capsys)
    assert distance("straight", "moved") <= 1e-6


@pytest.mark.parametrize("processes, fsdp", [(1, False), (4, True)])
def test_a_checkpoint_of_eight_fsdp_processes_resumes_on_fewer(capsys, processes, fsdp):
    """And eight FSDP2 processes resume that of fewer."""
    flags = [*TEACH, "--batch_size", 128, "--out"]
    train("--steps", 9, *flags, "straight", capsys=capsys)
    for count, sharded, steps in ((processes, fsdp, 3), (8, True, 6), (processes, fsdp, 9)):
        train_on(count, "--steps", steps, *flags, "moved", *["--fsdp"] * sharded)
    assert distance("straight", "moved") <= 1e-6


def in_use(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def start_agent(port, *flags):
    """One of two agents of torchrun, each with one process, as docs/cluster.md starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
               "--max-restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7",
               str(ROOT / "train.py"), *FLAGS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open("agents.txt", "a"),
                            env=environment)


def test_two_agents_by_rendezvous_train_as_one_process(capsys):
    train("--steps", 10, "--out", "one", capsys=capsys)
    port = free_port()
    agents = [start_agent(port, "--steps", "10", "--out", "two") for _ in range(2)]
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0]
    assert distance("one", "two") <= 1e-6


def test_a_lost_agent_is_started_again(capsys):
    """kill -9 of an agent and its process; the other waits for its successor, and both resume."""
    flags, port = ("--batch_size", "32", "--steps", "60", "--out"), free_port()
    agents = [start_agent(port, *flags, "lost")]
    while not in_use(port):         # the first agent holds the rendezvous, and must survive
        assert agents[0].poll() is None
        time.sleep(0.1)
    agents.append(start_agent(port, *flags, "lost"))
    while not states("lost"):
        assert [agent.poll() for agent in agents] == [None, None], Path("agents.txt").read_text()[-3000:]
        time.sleep(0.1)
    for number in (agents[1].pid, *workers_of(agents[1], "train.py")):
        os.kill(number, signal.SIGKILL)
    assert agents[1].wait() == -signal.SIGKILL and reached("lost") < 60
    agents[1] = start_agent(port, *flags, "lost")
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0], Path("agents.txt").read_text()[-3000:]
    train_on(2, *flags, "straight")
    assert_same("straight", "lost")
    assert [line["from_step"] for line in log_of("lost") if "config" in line][-1] > 0


def test_resume_is_exact_compiled_and_on_two_threads():
    """As a user has it: the default network, bfloat16 where it is faster, torch.compile, whose backward has
    threads that add into one sum."""
    flags = "--warmdown 0 --save_every 1000 --sample_steps 2 --compile".split()
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}    # passive: other programs run too
    for out, steps in (("whole", "20"), ("parts", "10"), ("parts", "20")):
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--steps", steps, "--out", out]
        done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "compiled in the first step: " in done.stdout
    assert_same("whole", "parts")
