"""The documents' promises: the diffs of CONTRIBUTING.md apply and run, the commands of README.md exist, its files are there."""
import doctest
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def diffs():
    return re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)


def apply_diff(diff, root):
    """The lines with + after the lines without: the context must be there exactly once."""
    name = re.search(r"\+\+\+ b/(\S+)", diff)[1]
    lines = diff.split("@@\n", 1)[1].splitlines()
    assert len(lines) <= 10
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines)
    text = (root / name).read_text()
    assert text.count(before) == 1, name
    (root / name).write_text(text.replace(before, after))


@pytest.mark.parametrize("number, flags", [(0, "--transport cosine-v --model TiT-XXS/4"), (1, "--data greys --model TiT-XXS/8"), (2, "--model TiT-M/8")])
def test_a_diff_of_ten_lines_is_enough(tmp_path, number, flags):
    """Each change touches one file, and train.py and sample.py run with it."""
    root = tmp_path / "fork"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "tests", "__pycache__", ".*_cache"))
    apply_diff(diffs()[number], root)
    data_output = ["--data_output", "no"] if number == 0 else []
    train = [sys.executable, "train.py", *flags.split(), *data_output, "--steps", "2", "--compile", "no", "--device", "cpu", "--batch_size", "16", "--sample_steps", "2",
             "--held_out", "8"]
    for command in (train, [sys.executable, "sample.py", "--steps", "2", "--num", "4", "--device", "cpu"]):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-1500:]


def commands():
    """Every line of the shell blocks of README.md that calls one of our scripts, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if re.search(r"\b(train|sample|fid|latents|bench|data)\.py", line) and "srun" not in line]


def test_every_flag_and_recipe_in_the_readme_exists():
    """Scripts exist, flags are flags of theirs, recipes are recipes."""
    import bench
    import fid
    import latents
    import sample
    from config import RECIPES, Config, read_config
    from train import split_batch
    fields = {"train": Config, "sample": sample.Options, "fid": fid.Options, "latents": latents.Options, "bench": bench.Options}
    assert len(commands()) > 15
    for line in commands():
        script, rest = re.search(r"(\w+)\.py(.*)", line).groups()
        known = set(fields[script].__dataclass_fields__) | {"h"}
        for flag in re.findall(r"(?<=\s)--?(\w+)", rest):
            assert flag in known, line
        if "torchrun" in line and script == "train":
            config, processes = read_config(rest.split(), ""), [int(n) for n in re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", line)]
            split_batch(config, math.prod(processes))
        for recipe in re.findall(r"--recipe (\S+)|fetch (\S+)", rest):
            assert (recipe[0] or recipe[1]) in RECIPES, line


SHORT = {"train.py": "--steps 2 --batch_size 32 --held_out 16 --sample_steps 2 --compile no --device cpu", "sample.py": "--num 4 --device cpu",
         "fid.py": "--num 40 --device cpu", "bench.py": "--seconds 0.01 --batches 16 --compiles no --modes sample"}


@pytest.mark.slow
def test_the_commands_marked_as_runnable_run(tmp_path):
    """The blocks below <!-- runs --> in the documents, line by line in one fresh copy, shortened by the flags of SHORT."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
    blocks = [block for name in ("README.md", "CONTRIBUTING.md", "WALKTHROUGH.md")
              for block in re.findall(r"<!-- runs -->\n```bash\n(.*?)```", (ROOT / name).read_text(), re.S)]
    lines = [line.split("#")[0].strip() for line in "".join(blocks).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("pip ", "python3 -m venv", "python -m pytest", "ruff"))]
    assert len(lines) >= 8
    for line in lines:
        script = re.search(r"(\w+\.py)", line)[1]
        assert script in SHORT or script in ("data.py", "plot.py")
        command = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone").replace("--nproc_per_node=8", "--nproc_per_node=2")
        command = re.sub(r"^python ", f"{sys.executable} ", command)
        done = subprocess.run(f"{command} {SHORT.get(script, '')}", shell=True, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr[-1500:]}"


def test_the_walkthrough_is_true(monkeypatch):
    """Every line of WALKTHROUGH.md that starts with >>> gives what stands below it."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "WALKTHROUGH.md").read_text(), re.S)
    examples = doctest.DocTestParser().get_doctest("".join(blocks), {}, "WALKTHROUGH.md", None, 0)
    assert len(examples.examples) > 25
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_the_files_that_documents_name_are_there():
    for document in ("README.md", "RESULTS.md", "CONTRIBUTING.md", "WALKTHROUGH.md", "assets/README.md", "experiments/LOG.md"):
        text = (ROOT / document).read_text()
        for name in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(name).exists(), f"{document}: {name}"
    for name in re.findall(r"^\| `(\w+\.py)`", (ROOT / "README.md").read_text(), re.M):
        assert (ROOT / name).is_file()
    counts = dict(re.findall(r"`(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text()))
    assert counts.keys() == {p.name for p in ROOT.glob("*.py")}
    assert all(abs(len((ROOT / name).read_text().splitlines()) - int(count)) <= 10 for name, count in counts.items())
