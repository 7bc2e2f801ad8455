"""The folder of a run: what is ours in it, who may write there, and what a run says when it cannot."""
import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import FLAGS, assert_same, log_of, train
from toys import ROOT, run, states

import checkpoint
import engine
import features
from checkpoint import find_states
from engine import atomic_write, claim_folder, ignore_disk_errors
from data import open_dataset


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*flags, capsys):
    status, out, err = run("train.py", *FLAGS, *flags, capsys=capsys)
    assert status == 2 and len(err.strip().splitlines()[-1:]) == 1, out + err
    return err


# ---- what is ours -------------------------------------------------------------------------------------

def test_rotation_leaves_the_copies_of_a_user_alone(home, capsys):
    """Copies with names of their own sort last; they are neither deleted, nor renamed, nor resumed from."""
    train("--steps", 10, "--out", "straight", capsys=capsys)
    train("--steps", 5, "--out", "run", capsys=capsys)
    names = ("state_A.safetensors", "state_B.safetensors", "state_99.safetensors", "images_mine.npy",
             "state_best.0123456789abcdef.safetensors")
    copies = [Path("run") / name for name in names]
    for copy in copies:
        shutil.copy(states("run")[0], copy)
    before = [copy.read_bytes() for copy in copies]
    train("--steps", 10, "--out", "run", "--save_every", 1, capsys=capsys)
    assert [copy.read_bytes() for copy in copies] == before
    ours = find_states("run")
    assert [int(path.name[6:14]) for path in ours] == [10, 9]
    for copy in copies:
        copy.unlink()
    assert_same("straight", "run")


def test_the_state_just_written_is_never_deleted(home, capsys):
    """Even where states of later steps lie beside it."""
    train("--steps", 3, "--out", "run", capsys=capsys)
    for step in (50, 60, 70):
        shutil.copy(find_states("run")[0], f"run/state_{step:08d}.{'0' * 16}.safetensors")
    out = train("--steps", 4, "--out", "run", capsys=capsys)
    assert "damaged" in out                     # their checksums are wrong: they are put aside first
    assert [int(path.name[6:14]) for path in find_states("run")] == [4, 3]


@pytest.mark.parametrize("flags", ["--labels none --zeta 0 --style none", "--model TiT-XXS/2", "--ema 0.9",
                                   "--image_size 16", "--optimizer muon"])
def test_a_state_of_another_network_is_refused_before_anything_is_read(home, capsys, flags):
    """Names, shapes and dtypes are compared first; one line lists what differs."""
    train("--steps", 2, "--out", "run", capsys=capsys)
    err = refused("--steps", 4, "--out", "run", "--allow_change", *flags.split(), capsys=capsys)
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert "->" in err or "has the state of adamw" in err


# ---- which data ---------------------------------------------------------------------------------------

def save_images(*names):
    for k, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 5 * k % 250, np.uint8)).save(name)


def test_other_class_names_or_images_are_a_change(home, capsys):
    """A class folder renamed, an image added: said, and refused without --allow_change."""
    flags = ["--data", "folder:f", "--batch_size", 16, "--model", "TiT-XXS/8"]
    save_images(*[f"f/{name}/{k}.png" for name in ("bird", "cat") for k in range(10)])
    train("--steps", 2, "--out", "run", *flags, capsys=capsys)
    shutil.move("f/bird", "f/dog")
    err = refused("--steps", 4, "--out", "run", *flags, capsys=capsys)
    assert "['bird', 'cat'] -> ['cat', 'dog']" in err and "fingerprint" in err
    err = refused("--steps", 4, "--out", "next", "--init_from", "run", *flags, capsys=capsys)
    assert "['bird', 'cat']" in err and "--allow_change" in err
    shutil.move("f/dog", "f/bird")
    assert "resumed" in train("--steps", 4, "--out", "run", *flags, capsys=capsys)
    save_images("f/cat/11.png")
    assert "20 images" in refused("--steps", 6, "--out", "run", *flags, capsys=capsys)
    assert "resumed" in train("--steps", 6, "--out", "run", "--allow_change", *flags, capsys=capsys)


def test_a_fingerprint_is_of_order_and_content(home):
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    prints = set()
    for name, x_, y_ in (("a", x, y), ("b", x + 1, y), ("c", x, y[::-1]), ("d", x[:3], y[:3])):
        np.savez(f"{name}.npz", x=x_, y=y_)
        prints.add(open_dataset(f"npz:{name}.npz").fingerprint)
    assert len(prints) == 4 and open_dataset("npz:a.npz").fingerprint in prints


# ---- who may write ------------------------------------------------------------------------------------

def test_two_runs_in_one_folder(home, capsys):
    """The second is refused with the first one's process; a lock is gone with its process."""
    hold = ("import sys, time; sys.path.insert(0, sys.argv[1]); from engine import claim_folder; "
            "lock = claim_folder('run'); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", hold, str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    err = refused("--steps", 2, "--out", "run", capsys=capsys)
    assert f"in use by process {other.pid} on {socket.gethostname()}" in err and not states("run")
    assert "in use" in refused("--steps", 2, "--out", "run", "--fresh", capsys=capsys)
    other.kill()
    other.wait()
    train("--steps", 2, "--out", "run", capsys=capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(home, capsys):
    Path("run").mkdir(mode=0o555)
    assert "cannot write into run" in refused("--steps", 2, "--out", "run", capsys=capsys)


def test_out_below_a_file_is_refused_at_the_start(home, capsys):
    Path("file").write_text("")
    assert "cannot write into file/run" in refused("--steps", 2, "--out", "file/run", capsys=capsys)


def test_modes_and_folder_flushes_are_best_effort(home, monkeypatch):
    """File systems that refuse chmod or fsync of a folder; the umask is respected where modes exist."""
    monkeypatch.setattr(engine, "UMASK", 0o027)
    atomic_write("a", lambda path: path.write_text("x"))
    assert Path("a").stat().st_mode & 0o777 == 0o640

    def refuse(*arguments):
        raise PermissionError(1, "not permitted")
    monkeypatch.setattr(os, "chmod", refuse)
    flush = engine.flush
    monkeypatch.setattr(engine, "flush", lambda path: refuse() if Path(path).is_dir() else flush(path))
    atomic_write("a", lambda path: path.write_text("y"))
    assert Path("a").read_text() == "y" and not Path("a.tmp").exists()


def test_only_what_passes_is_survived():
    """A full disk, a quota, a failing disk; and a permission, which does not pass."""
    from safetensors import SafetensorError
    told = []
    for error in (OSError(28, "No space left"), OSError(122, "quota"), OSError(5, "I/O"),
                  SafetensorError("IoError (os error 28)")):
        with ignore_disk_errors("it", told.append):
            raise error
    assert len(told) == 4
    for error in (PermissionError(13, "denied"), OSError(30, "read-only"),
                  SafetensorError("denied (os error 13)")):
        with pytest.raises(ValueError, match="it cannot be written"), ignore_disk_errors("it", told.append):
            raise error


def test_a_run_whose_end_is_not_on_disk_says_so(home, capsys, monkeypatch):
    """Status 2 and the truth in the last line; the checkpoint before is kept; the same command ends it."""
    train("--steps", 4, "--out", "run", capsys=capsys)

    def full(*arguments):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.safetensors.torch, "save_file", full)
        err = refused("--steps", 8, "--out", "run", capsys=capsys)
    assert "step 8 is not in run" in err and "Next" not in err and len(states("run")) == 1
    train("--steps", 8, "--out", "run", capsys=capsys)
    train("--steps", 8, "--out", "straight", capsys=capsys)
    assert_same("straight", "run")


def test_claiming_makes_the_folder(home):
    lock = claim_folder("a/b")
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        claim_folder("a/b")
    lock.release()
    claim_folder("a/b").release()


# ---- what it says -------------------------------------------------------------------------------------

@pytest.mark.parametrize("lr", ["100", "1e15"])
def test_divergence_is_not_loss_0(home, capsys, lr):
    """NaN, and an infinite loss whose gradient is 0: skipped and counted; a mean over nothing is null."""
    train("--steps", 12, "--out", "run", "--lr", lr, "--log_every", 1, "--x_pred", capsys=capsys)
    text = Path("run/log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    lines = [line for line in log_of("run") if "loss" in line]
    skipped = [line for line in lines if line["skipped"]]
    assert skipped and all(line["loss"] is None or line["loss"] > 0 for line in lines)
    assert all(line["grad_norm"] is None for line in skipped)


def test_the_hints_work_when_pasted(home, capsys):
    """Away from the default run: another folder, data set, size."""
    np.savez("d.npz", x=np.zeros((80, 8, 8, 3), np.uint8), y=np.arange(80) % 4)
    for flags in (["--out", "some run"], ["--data", "npz:d.npz", "--out", "b", "--image_size", 0],
                  ["--labels", "star", "--zeta", 0, "--style", "none"]):
        line = train("--steps", 1, *flags, capsys=capsys).strip().splitlines()[-1]
        commands = line.split("Next: ")[1].split(", or fine-tune it to two steps: ")
        assert len(commands) == 2
        import shlex
        script, *words = shlex.split(commands[0])[1:]
        assert run(script, *words, "--num", 2, "--steps", 1, "--device", "cpu", capsys=capsys)[0] == 0
        script, *words = shlex.split(commands[1])[1:]
        cheap = ["--steps", 1, "--no-compile", "--device", "cpu", "--dtype", "float32"]
        status, out, err = run(script, *words, *cheap, capsys=capsys)
        assert status == 0, err


def test_commit_is_of_this_repository(monkeypatch, tmp_path):
    """No git, or a copy inside another repository: no commit rather than a wrong one."""
    import log
    known = log.commit()
    monkeypatch.setenv("PATH", "")
    assert log.commit() == ""
    monkeypatch.undo()
    inner = tmp_path / "copy"
    inner.mkdir()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(log, "__file__", str(inner / "log.py"))
    assert log.commit() == "" and (known == "" or len(known) >= 7)


def test_a_diverged_model_is_not_drawn(home, capsys):
    """NaN weights: one line in place of black images, for a page and for a score."""
    train("--steps", 1, "--out", "run", capsys=capsys)
    import safetensors.torch
    with safetensors.safe_open("run/model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file("run/model.safetensors")
    tensors = {name: value * torch.nan for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, "run/model.safetensors", metadata)
    status, _, err = run("sample.py", "--ckpt", "run", "--num", 4, "--steps", 2, capsys=capsys)
    assert status == 2 and "not finite" in err and not Path("samples.png").exists()
    assert json.loads(metadata["config"])["lam"] == 0


def test_scores_of_ones_own_images_need_no_download(home, capsys, monkeypatch):
    """One command: features of the data are learned once and kept in the run's folder; FD has its name."""
    monkeypatch.setattr(features, "train_features", partial(features.train_features, steps=20))
    flags = ["--data", "folder:pets", "--batch_size", 16, "--model", "TiT-XXS/8"]
    save_images(*[f"pets/{name}/{k}.png" for name in ("cat", "dog") for k in range(20)])
    train("--steps", 1, "--out", "run", *flags, capsys=capsys)
    kept = []
    for _ in range(2):
        words = ["--ckpt", "run", "--num", 12, "--steps", 1, "--device", "cpu"]
        status, out, err = run("fid.py", *words, capsys=capsys)
        assert status == 0, err
        line = json.loads(out.strip().splitlines()[-1])
        assert line["FD-pets"] > 0 and line["N"] == 12 and line["features"].startswith("pets ")
        kept.append([(path.name, path.stat().st_mtime_ns) for path in Path("run").glob("features-pets8-*")])
    assert kept[0] == kept[1] and len(kept[0]) == 1
    assert "of 2 held-out images" in out or "once" not in err


@pytest.mark.parametrize("later, saves", [(0.1, True), (6.0, False)])
def test_a_second_request_to_stop(later, saves):
    """Five seconds after the first one it leaves without saving. Sooner it is the same one, that SLURM and
    torchrun both send. The previous handlers are restored at the end."""
    code = f"""if True:
        import os, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import engine
        now = [100.0]
        time.monotonic = lambda: now[0]
        with engine.Signals(None) as signals:
            assert signals.agree() == [0, 0]
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.agree() == [0, signal.SIGUSR1] and signals.agree() == [0, 0]
            os.kill(os.getpid(), signal.SIGHUP)
            now[0] += {later}
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.agree()[0] == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (0 if saves else 1), done.stderr
    assert ("stopped without saving" in done.stderr) != saves
