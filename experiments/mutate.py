"""Do the tests notice small changes of behaviour? Makes those of tests/mutations.py in a copy, one at a time.

    python experiments/mutate.py                        # all of them; about an hour on one core
    python experiments/mutate.py --only checkpoint.py   # those of one file

A change is caught if one of the fast tests fails. The files in TESTS are tried first; a change that they miss
meets all the fast tests. What survives is listed at the end, with what ran out of time, and the status is
then 1.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from config import read_flags, setting
from engine import run
from mutations import CHANGES, EQUIVALENT

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "train.py": "training resume run_folder faults cli log",
    "engine.py": "launches run_folder faults training log cli",
    "config.py": "recipes resume run_folder cli", "recipes.py": "recipes", "sample.py": "fid hub cli",
    "checkpoint.py": "training faults resume run_folder cli model extras/published",
    "data.py": "data training folders",
    "images.py": "folders data", "shapes.py": "data training fid", "fid.py": "fid", "features.py": "fid",
    "log.py": "log training run_folder cli", "optim.py": "training resume faults", "model.py": "model golden",
    "objective.py": "objective golden", "sampler.py": "sampler golden", "hubconf.py": "hub",
    "minimal.py": "minimal", "extras/latents.py": "extras/latents", "extras/scheduler.py": "extras/scheduler",
    "extras/published.py": "extras/published golden", "extras/hub.py": "hub_data",
    "extras/downloads.py": "data"}


@dataclass
class Options:
    only: str = setting("", "changes of this file; empty: all")
    first: int = setting(0, "the number of the first change to make")
    whole: bool = setting(True, "what the first files miss meets all the fast tests")
    limit: float = setting(600.0, "seconds that the tests of a change may take")


def passes(folder, files, limit):
    """Whether these test files pass in a folder, or all of the fast tests if there are none; None: they took
    too long. They run in a fork, which has torch already."""
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.path = [folder, f"{folder}/tests"] + [path for path in sys.path if not path.startswith(str(ROOT))]
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(str(ROOT) + "/"):
                del sys.modules[name]
        import pytest
        options = ["-x", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", "not slow and not cuda"]
        os._exit(int(pytest.main([*options, *files]) != 0))
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(process, 9)
    os.waitpid(process, 0)
    return None


def main(options):
    import scipy.stats                                              # noqa: F401    what every fork needs
    import torchvision                                              # noqa: F401
    survivors, changes = [], [c for c in CHANGES if options.only in ("", c[0])][options.first:]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
        for name in names.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for k, (name, old, new) in enumerate(changes, options.first):
            text, start = (ROOT / name).read_text(), time.monotonic()
            assert text.count(old) == 1, (name, old)
            (copy / name).write_text(text.replace(old, new))
            first = [f"tests/{'extras/' * ('/' in test)}test_{test.split('/')[-1]}.py"
                     for test in TESTS[name].split()]
            missed = passes(str(copy), first, options.limit)
            if missed and options.whole:
                missed = passes(str(copy), [], options.limit)
            (copy / name).write_text(text)
            word = {False: "caught", True: "SURVIVED", None: "TIMED OUT"}[missed]
            word = "equivalent" if missed and old in EQUIVALENT else word
            print(f"{k} {name} {word} in {time.monotonic() - start:.0f} s: {old!r} -> {new!r}", flush=True)
            if word in ("SURVIVED", "TIMED OUT"):
                survivors.append((name, old, new))
    print(f"\n{len(changes)} changes, {len(survivors)} survived")
    for name, old, new in survivors:
        print(f"{name}: {old!r} -> {new!r}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    run(lambda: main(Options(**read_flags(Options, sys.argv[1:], __doc__))))
