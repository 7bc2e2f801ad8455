"""What a run survives: kill -9, requests to stop, a lost process, a full disk."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import FLAGS, assert_same, reached, torchrun, train, train_on, workers_of
from toys import ROOT, run, states

pytestmark = pytest.mark.slow
FAULTY = str(Path(__file__).resolve().parent / "faulty.py")
SMALL = ("--batch_size", "16")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*words, before=(sys.executable,)):
    """A command in a process, and a group of processes, of its own; what it prints goes to out.txt."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*before, *map(str, words)], stdout=open("out.txt", "w"),
                            stderr=subprocess.STDOUT, start_new_session=True, env=environment)


def printed():
    return Path("out.txt").read_text()


def wait_until(condition, process, limit=100):
    """Whether the condition became true while the process was alive."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(printed()[-2000:])
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def test_kill_9_at_twenty_moments(capsys):
    """Every other kill lies inside a save, by its marker; the others at a random moment of the training after
    one, so that the run gets on. In the end all is as if nobody had killed it."""
    chance, inside, marker = random.Random(0), 0, Path("marker")
    for kill in range(20):
        marker.unlink(missing_ok=True)
        saved = states("killed")
        process = launch(FAULTY, 0.05, 0, *FLAGS, *SMALL, "--steps", 2000, "--out", "killed")
        assert wait_until(lambda: "batch 16 =" in printed(), process), printed()
        if kill % 2:
            assert wait_until(marker.exists, process), printed()
            time.sleep(chance.uniform(0, 0.04))
        else:
            assert wait_until(lambda before=saved: states("killed") != before, process), printed()
            time.sleep(chance.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        inside += marker.exists()
    assert inside >= 5
    steps = reached("killed") + 20
    for out in ("killed", "straight"):
        train(*SMALL, "--steps", steps, "--out", out, capsys=capsys)
    assert_same("straight", "killed")
    assert not list(Path("killed").glob("*.damaged")) and not list(Path("killed").glob("*.tmp"))
    print(f"kill -9: 20 kills, {inside} of them inside a save, {steps - 20} steps survived")


def test_stopped_by_signals_five_times(capsys):
    """SIGUSR1 saves and goes on; SIGTERM, SIGINT, SIGHUP save and stop. They go to the whole group, as from
    torchrun, SLURM and a terminal, and the processes that read data must not die of them."""
    rarely = ("--save_every", 10**6)
    for k in range(5):
        number, saved = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[k % 3], states("asked")
        process = launch(FAULTY, 0, 2, *FLAGS, *SMALL, *rarely, "--steps", 100000, "--out", "asked")
        assert wait_until(lambda: "batch 16 =" in printed(), process), printed()
        time.sleep(0.3 + 0.2 * k)
        assert states("asked") == saved         # every state is one that was asked for
        process.send_signal(signal.SIGUSR1)
        assert wait_until(lambda before=saved: states("asked") != before, process), "SIGUSR1 ended the run"
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == 0, printed()
        assert f"stopped by {number.name} at step {reached('asked')} of" in printed()
    steps = reached("asked") + 5
    for out in ("asked", "straight"):
        train(*SMALL, *rarely, "--steps", steps, "--out", out, capsys=capsys)
    assert_same("straight", "asked")


def test_a_lost_process_is_restarted_by_torchrun():
    """And the run goes on, though the command says --fresh: that was for the first start."""
    flags = ["--batch_size", "32", "--steps", "60", "--out"]
    restarting = torchrun(2, "--max-restarts=2")
    agent = launch(ROOT / "train.py", *FLAGS, *flags, "lost", "--fresh", before=restarting)
    assert wait_until(lambda: len(states("lost")) > 0, agent), printed()
    os.kill(workers_of(agent, "train.py")[-1], signal.SIGKILL)
    assert agent.wait(timeout=200) == 0, printed()[-3000:]
    assert "resumed from lost/state_" in printed()
    train_on(2, *flags, "straight")
    assert_same("straight", "lost")


def test_a_full_disk_is_survived(home, capsys):
    """The save that does not fit is said, the state before it kept, and the run goes on; if its end does not
    fit either, it says so with status 2, and the same command ends it where there is room."""
    disk = home / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        train("--steps", 10, "--out", disk / "run", capsys=capsys)
        with open(disk / "ballast", "wb") as file:
            try:
                while file.write(bytes(1 << 16)):
                    file.flush()
            except OSError:
                pass
        status, out, err = run("train.py", *FLAGS, "--steps", 25, "--out", disk / "run", capsys=capsys)
        assert status == 2 and "the checkpoint of step 20 could not be written" in out + err
        assert "step 25 is not in" in err
        assert [int(path.name[6:14]) for path in states(disk / "run")] == [10]
        assert not list((disk / "run").glob("*.tmp"))
        (disk / "ballast").unlink()
        assert "resumed from" in train("--steps", 40, "--out", disk / "run", capsys=capsys)
        train("--steps", 40, "--out", "straight", capsys=capsys)
        assert_same("straight", disk / "run")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)])
