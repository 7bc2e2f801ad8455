"""The promise: extras/ may be deleted. The core then trains, fine-tunes, samples and scores."""
import os
import shutil
import subprocess
import sys

import pytest
from toys import ROOT

CORE = sorted(path.stem for path in ROOT.glob("*.py"))
REFUSE = """if True:
    import importlib, sys
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "extras":
                raise AssertionError(f"{name} is imported")
    sys.meta_path.insert(0, Refuse())
"""


def python(*words, cwd=ROOT):
    """What a Python prints that works in this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd,
                          env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_module_of_the_core_imports_extras():
    """Nor torch.distributed.tensor, which takes a quarter of the start of a script."""
    code = f"""
    for name in {[name for name in ("train", "sample", "fid") if name in CORE]}:
        importlib.import_module(name)
    assert "torch.distributed.tensor" not in sys.modules
    for name in {CORE}:
        importlib.import_module(name)"""
    python("-c", REFUSE + code)


def test_the_core_does_the_whole_job_without_extras(tmp_path):
    """The commands of the README, shortened, in a copy of the repository that has no extras/."""
    repository = tmp_path / "repository"
    skip = shutil.ignore_patterns("extras", "tests", "experiments", "runs", ".*", "__pycache__")
    shutil.copytree(ROOT, repository, ignore=skip)
    assert not (repository / "extras").exists()
    common = ("--model TiT-XXS/8 --batch_size 16 --steps 2 --save_every 1000 --sample_steps 1 --no-compile "
              "--device cpu").split()
    size, few = ["--image_size", 32], ["--recipe", "shapes-few", "--init_from", "many", "--out", "few"]
    python("train.py", *common, *size, "--out", "many", cwd=repository)
    python("train.py", *few, *common, *size, cwd=repository)
    python("sample.py", "--ckpt", "few", "--steps", 2, "--device", "cpu", cwd=repository)
    assert (repository / "samples.png").stat().st_size > 1000
    scores = python("fid.py", "--ckpt", "few", "--num", 64, "--steps", 2, "--device", "cpu", cwd=repository)
    assert '"FD-shapes"' in scores.splitlines()[-1]


@pytest.mark.skipif("minimal" not in CORE, reason="there is no minimal.py")
def test_the_method_on_one_page_runs_without_extras(tmp_path):
    code = "\n    import minimal\n    minimal.main(3, 2, sys.argv[1])"
    python("-c", REFUSE + code, tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 1000
