"""The documents are true: their commands parse, their files exist, their listings compute what the code does.

The diffs in CONTRIBUTING.md are made from EDITS. When the lines around an edit have changed,
`PYTHONPATH=. python tests/test_documents.py` writes them anew.
"""
import ast
import difflib
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from toys import ROOT, SMALL, Net, batch, run

import fid
import extras.latents as latents
import log
import model
import sample
import sampler
from checkpoint import load_model, read_weights
from config import SamplerFlags, read_config, read_flags, recipe_row
from data import FiniteDataset
from recipes import RECIPES
from objective import TRANSPORTS, Objective, edm_s, expand, predict
from train import split_batch

NAMES = ["README.md", "CONTRIBUTING.md", "RESULTS.md", "assets/README.md", "experiments/LOG.md"]
DOCUMENTS = {path: path.read_text() for path in [*(ROOT / name for name in NAMES),
                                                 *sorted(ROOT.glob("docs/*.md"))]}
README, CONTRIBUTING = DOCUMENTS[ROOT / "README.md"], DOCUMENTS[ROOT / "CONTRIBUTING.md"]

# Flags of torchrun, SLURM, pip and pytest, and flags and scripts of the past that the log names.
OTHERS = set("""nproc_per_node nnodes rdzv_backend rdzv_endpoint rdzv_id max-restarts shutdown-timeout
                numa-binding standalone nodes ntasks-per-node gpus-per-node time requeue open-mode signal
                extra-index-url enhance_range betas""".split())
GONE = {("LOG.md", "cost.py"), ("LOG.md", "experiments/cost.py"), ("LOG.md", "fall.py")}

# A file, the line after which lines are added, and the lines.
EDITS = [
    ("objective.py", '    ("trigflow",', [
        '    ("cosine-v",           sin,        cos,        cos,           minus_sin,'
        '     one_minus, -1.0),']),
    ("data.py", "        data = open_npz(path, seed)", [
        '    elif kind == "greys":',
        "        grey = np.random.default_rng(0).integers(0, 256, 600).astype(np.uint8)",
        "        x = np.broadcast_to(grey[:, None, None, None], (600, 16, 16, 3))",
        '        data = from_arrays(x, grey // 86, ["dark", "middle", "light"], seed)']),
    ("model.py", '         "XS": ', [
        '         "M":   dict(depth=8, hidden_size=256, num_heads=8),'])]


def blocks(text, language, mark=""):
    """The fenced blocks of a language, below the line `mark` if one is given."""
    return re.findall(rf"{mark}\n```{language}\n(.*?)```", text, re.S)


# ---- commands -----------------------------------------------------------------------------------------

def flags_of(path):
    """The flags of a script, by the fields of its dataclasses that are made by config.setting."""
    def is_flag(node):
        made = node.value if isinstance(node, ast.AnnAssign) else None
        return isinstance(made, ast.Call) and getattr(made.func, "id", "") == "setting"
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if is_flag(node)]
    on_off = [node.target.id for node in nodes if "bool" in ast.unparse(node.annotation)]
    return {node.target.id for node in nodes} | {f"no-{name}" for name in on_off}


def named_flags(text):
    return re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)


def commands():
    """(document, words of the launcher, script, words of the script) of every command in the documents."""
    found = []
    for path, text in DOCUMENTS.items():
        text = text.replace("\\\n", " ")
        lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in lines:
            line = re.sub(r" -m extras\.(\w+)", r" extras/\1.py", line)
            match = re.search(r"\b(python|torchrun)\b([^#&]*?) ([\w/]+\.py)\b([^#&]*)", line)
            if match:
                words = [re.sub("^[A-Z]+$", "4", word) for word in shlex.split(match[4])]
                found.append((path.name, match[2], match[3], words))
    return found


def test_every_flag_exists():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("experiments/*.py")]
    known = OTHERS.union(SamplerFlags.__dataclass_fields__, *map(flags_of, scripts))
    named = {(path.name, flag) for path, text in DOCUMENTS.items() for flag in named_flags(text)}
    assert len(named) > 80
    assert [pair for pair in sorted(named) if pair[1] not in known] == []


def parse(script, words):
    """What a script makes of its words, or a ValueError."""
    words = [word for word in words if word != "-h"]
    if script == "train.py":
        return read_config(words, "")
    if script == "extras/latents.py" and words[0] == "fetch":
        return recipe_row(words[1])
    if script == "extras/latents.py":
        assert words.pop(0) == "encode"
    kinds = {"sample.py": sample.Options, "fid.py": fid.Options, "extras/latents.py": latents.Options}
    return kinds[script](**read_flags(kinds[script], words, "")) if script in kinds else words


def test_every_command_parses():
    """By the scripts' own readers, which refuse unknown flags, recipes, values. Batches can be dealt."""
    assert len(commands()) > 40
    for document, launcher, script, words in commands():
        assert (ROOT / script).is_file(), f"{document}: {script}"
        if script.startswith("experiments/"):
            unknown = set(named_flags(" ".join(words))) - flags_of(ROOT / script)
            assert not unknown, f"{document}: {script} {unknown}"
            continue
        try:
            options = parse(script, words)
            processes = [int(n) for n in re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", launcher)]
            if script == "train.py" and processes:
                split_batch(options, math.prod(processes))
        except ValueError as error:
            raise AssertionError(f"{document}: {script} {words}: {error}") from error


def test_every_recipe_exists():
    named = [name for text in DOCUMENTS.values() for name in re.findall(r"(?:--recipe|fetch) ([\w-]+)", text)]
    assert len(named) > 12
    assert [name for name in named if name not in RECIPES and not name.isupper()] == []


def test_every_setting_called_a_famous_method_trains_and_samples():
    """Each row of the table, and what it names after "with", applied to a small network: its loss and its
    images are finite numbers."""
    table = README.split("| train.py | sample.py | is |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) > 5
    x, z, t, y, drop = batch()
    for row in table:
        train_flags, sample_flags = (shlex.split(" ".join(re.findall(r"`([^`]*)`", cell)))
                                     for cell in row.split("|")[1:3])
        for more in ("", *re.findall(r"with `(--[^`]*)`", row.split("|")[3])):
            plain = [] if "--recipe" in train_flags else "--zeta 0 --style none --no-x_pred".split()
            config = read_config([*plain, *train_flags, *more.split()], "")
            teacher = Net(1) if config.zeta else None
            assert config.objective()(Net(), x, y, t, z, drop, teacher).isfinite().all(), row
            given = sample.Options(**read_flags(sample.Options, sample_flags, "")).given()
            assert sampler.sample(Net(), z, y, **config.sampler(**given)).isfinite().all(), row


# ---- files --------------------------------------------------------------------------------------------

def test_every_link_leads_somewhere():
    links = [(path, link) for path, text in DOCUMENTS.items()
             for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text)]
    assert len(links) > 20
    assert [f"{path.name}: {link}" for path, link in links if not (path.parent / link).exists()] == []


def test_every_script_that_is_named_exists():
    places = [ROOT / name for name in ("", "extras", "experiments", "tests", "tests/slow")]
    named = {(path.name, name) for path, text in DOCUMENTS.items()
             for name in re.findall(r"(?<![\w/])(?!a/|b/)[\w/.-]*\w\.(?:py|sh|ipynb)\b", text)} - GONE
    assert len(named) > 30
    assert [pair for pair in sorted(named) if not any((place / pair[1]).is_file() for place in places)] == []


def test_every_asset_that_is_described_exists():
    named = re.findall(r"^\| `([^`]+)` \|", DOCUMENTS[ROOT / "assets/README.md"], re.M)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / "assets" / name).is_file()] == []


# ---- the listings -------------------------------------------------------------------------------------

def words_of(transport):
    """What the listings take for granted. There t is (B, 1, 1, 1), or a number."""
    row = TRANSPORTS[transport]
    return {"alpha": row.alpha, "gamma": row.gamma, "alpha_hat": row.alpha_hat, "gamma_hat": row.gamma_hat,
            "d": row.determinant, "solve": row.solve, "stopgrad": torch.Tensor.detach, "pi": math.pi,
            "predict": lambda net, x, t, y: predict(net, row, x, t, y),
            "mean": lambda v: v.mean((1, 2, 3)), "sqrt": lambda v: v**0.5, "sin": torch.sin}


@pytest.mark.parametrize("transport", ["linear", "trigflow", "edm"])
@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_the_loss_in_the_readme_is_the_loss(transport, lam):
    """And so is its gradient. The guided prediction is a teacher's, the reference the target itself."""
    net, teacher, (x, z, t, y, _) = Net(), Net(1), batch()
    alpha, gamma, alpha_hat, gamma_hat = TRANSPORTS[transport].at(t, x)
    guided, reference = teacher(alpha * z + gamma * x, t, y).detach(), alpha_hat * z + gamma_hat * x
    names = {**words_of(transport), "net": net, "x": x, "z": z, "t": t[:, None, None, None], "y": y,
             "lam": lam, "zeta": 0.7, "c": 0.1, "guided": guided, "reference": reference}
    exec(blocks(README, "python", "<!-- the loss -->")[0], names)
    objective = Objective(transport, lam=lam, zeta=0.7, style="fc-vs-xz", huber=0.1, time_weight="none",
                          enhance_range=(0.0, 1.0))
    loss = objective(net, x, y, t, z, torch.zeros(len(x), dtype=torch.bool), teacher)
    assert_close(names["loss"], loss, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(v.sum(), list(net.parameters())) for v in (names["loss"], loss)]
    assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kappa, rho", [(0.0, 0.0), (0.4, 0.0), (0.3, 0.2)])
def test_the_sampler_in_the_readme_is_the_sampler(kappa, rho):
    net, (_, z, _, y, _), noise, steps = Net(), batch(), batch(seed=2)[1], 6
    times = sampler.time_grid(steps)
    names = {**words_of("trigflow"), "net": net, "z": z, "y": y, "t": torch.tensor(times, dtype=z.dtype),
             "steps": steps, "rho": rho, "randn": lambda: noise,
             "kappa": lambda i: kappa if i >= 2 else 0}
    lines = blocks(README, "python", "<!-- the sampler -->")[0].splitlines()
    exec("def run(x_before=0, z_before=0):\n" + "".join(f"    {line}\n" for line in lines), names)
    expected = sampler.sample(net, z, y, "trigflow", steps, kappa, rho, noise=lambda i: noise)
    assert_close(names["run"](), expected, rtol=1e-9, atol=1e-9)


def test_the_network_in_contributing_trains_and_samples(tmp_path, monkeypatch, capsys):
    source = blocks(CONTRIBUTING, "python", "<!-- a network -->")[0]
    names = {**vars(model), "MODELS": {}}
    exec(source, names)
    monkeypatch.setitem(model.MODELS, "Tiny", names["MODELS"]["Tiny"])
    out, page = tmp_path / "tiny", tmp_path / "two.png"
    train = [*SMALL, "--model", "Tiny", "--no-x_pred", "--sample_steps", 2, "--out", out]
    draw = ["--ckpt", out, "--num", 2, "--out", page]
    for script, flags in (("train.py", train), ("sample.py", draw)):
        status, _, err = run(script, *flags, "--device", "cpu", capsys=capsys)
        assert status == 0, err
    net = load_model(out)[0]
    assert Image.open(page).size == (8 * 68 - 4, 18 + 68 - 4) and type(net) is names["Tiny"]
    sizes = {torch.nn.Conv2d: 8 * 8, torch.nn.Linear: 1}
    assert log.flops_per_image(net) == sum(2 * part.weight.numel() * sizes[type(part)]
                                           for part in net.modules() if type(part) in sizes)


def test_the_floats_in_contributing_stream_unchanged(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (20, 2, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    names = {"np": np, "torch": torch, "hashlib": hashlib, "FiniteDataset": FiniteDataset,
             "path": tmp_path / "x.npy", "seed": 3}
    exec(blocks(CONTRIBUTING, "python", "<!-- floats -->")[0], names)
    shown, y = names["data"][np.arange(20)]
    order = np.argsort(shown[:, 0, 0, 0].numpy())
    assert np.array_equal(shown[order], x[np.argsort(x[:, 0, 0, 0])]) and not y.any()
    assert names["data"].shape == (2, 8, 8) and names["data"].names == []


def gaussian(x, t, y):
    """The exact velocity of Gaussian data of deviation .5."""
    t = expand(t, x)
    return (t - (1 - t) * 0.25) / (t**2 + (1 - t) ** 2 * 0.25) * x


def test_inpainting_in_contributing_keeps_what_is_known():
    x, z, _, y, _ = batch()
    names = dict(torch=torch, expand=expand, sample=sampler.sample, net=gaussian, known=x, z=z, y=y,
                 mask=torch.rand(x.shape) < 0.5)
    exec(blocks(CONTRIBUTING, "python", "<!-- inpainting -->")[0], names)
    free = sampler.sample(gaussian, z, y, steps=40)
    assert_close(names["images"], torch.where(names["mask"], x, free))       # each pixel is on its own here


def test_the_density_in_contributing_is_the_gaussians():
    x, _, _, y, _ = batch()
    names = dict(torch=torch, math=math)
    exec(blocks(CONTRIBUTING, "python", "<!-- likelihood -->")[0], names)
    exact = torch.distributions.Normal(0, 0.5).log_prob(x).flatten(1).sum(1)
    assert_close(names["log_density"](gaussian, x, y, 400), exact, rtol=2e-3, atol=0)


def test_reflow_in_contributing_trains_on_the_pairs_of_a_model():
    """A network that sends z straight to the model's image has no loss; the model itself has one."""
    _, z, _, y, _ = batch()
    objective = Objective(label_drop=0.0, time_weight="none")
    end = sampler.sample(gaussian, z, y, steps=40, kappa="auto")
    losses = {}
    for name, net in (("straight", lambda x_t, t, y: z - end), ("model", gaussian)):
        names = dict(sample=sampler.sample, trained=gaussian, objective=objective, net=net, z=z, y=y)
        exec(blocks(CONTRIBUTING, "python", "<!-- reflow -->")[0], names)
        losses[name] = names["loss"].item()
    assert losses["straight"] < 1e-9 < 1e-2 < losses["model"]


def test_the_condition_in_contributing_is_dropped_and_guided():
    """Rows of y that are dropped act as rows of zeros, and guidance leads away from zeros."""
    x, z, t, _, drop = batch(4, dtype=torch.float32)
    x, z, y = x.repeat(1, 1, 2, 2), z.repeat(1, 1, 2, 2), torch.randn(4, 5)
    names = {"torch": torch, "nn": torch.nn, "DiT": model.DiT, "Objective": Objective,
             "sample": sampler.sample, "x": x, "y": y, "z": z, "t": t, "drop": drop}
    exec(blocks(CONTRIBUTING, "python", "<!-- a condition -->")[0], names)
    names["loss"].backward()
    net = names["net"].requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    dropped = Objective()(net, x, y, t, z, drop)
    assert_close(dropped, Objective()(net, x, y * ~drop[:, None], t, z, drop & False))
    assert drop.any() and (dropped != Objective()(net, x, y, t, z, drop & False))[drop].all()
    guided = lambda x, t, y: net(x, t, 0 * y) + 2 * (net(x, t, y) - net(x, t, 0 * y))
    assert_close(sampler.sample(net, z, y, steps=3, cfg_scale=2.0), sampler.sample(guided, z, y, steps=3))


class Denoiser(torch.nn.Module):
    """D(x; sigma) as EDM defines it (arXiv 2206.00364, table 1), around a network with the clock c_noise."""

    def __init__(self):
        super().__init__()
        self.inner = Net()

    def forward(self, x, sigma, labels):
        y = torch.where(labels.any(1), labels.argmax(1), 3)
        s = sigma.reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25) ** 0.5, (s**2 + 0.25) ** -0.5
        return c_skip * x + c_out * self.inner(c_in * x, sigma.log() / 4, y)


def edm_of_contributing():
    names = {"nn": torch.nn, "F": torch.nn.functional, "expand": expand, "edm_s": edm_s}
    exec(blocks(CONTRIBUTING, "python", "<!-- another's network -->")[0], names)
    return names["EDM"](Denoiser(), 3)


def test_the_wrapper_in_contributing_is_the_heun_of_edm():
    """Algorithm 1 of EDM without churn, in its own coordinates: what D says at every step, and the end."""
    (_, z, _, _, _), net, seen = batch(4), edm_of_contributing().requires_grad_(False), []
    y, grid = torch.arange(4), torch.tensor(sampler.time_grid(11, gap=(0.01, 0.02), order=2)).double()
    labels, s, expected = torch.eye(4, dtype=torch.float64)[y, :3], edm_s(grid), []
    D = lambda x, i: net.denoiser(x, s[i].expand(4), labels)
    x = z / TRANSPORTS["edm"].gamma(grid[0])
    for i in range(len(grid) - 1):
        expected.append(D(x, i))
        if i < len(grid) - 2:
            d = (x - expected[i]) / s[i]
            after = x + (s[i + 1] - s[i]) * d
            x = x + (s[i + 1] - s[i]) * (d + (after - D(after, i + 1)) / s[i + 1]) / 2
    sampler.sample(net, z, y, "edm", times=grid, order=2, on_step=lambda i, t, x_hat: seen.append(x_hat))
    assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-7, atol=1e-7)


def test_the_wrapper_in_contributing_trains():
    """At lambda 0 the loss is the root of EDM's, |D - x|^2 / c_out^2; at lambda 1 all parameters learn."""
    (x, z, t, y, drop), net = batch(), edm_of_contributing()
    plain = Objective("edm", time_weight="none")
    sigma = edm_s(t)
    labels = torch.eye(4, dtype=x.dtype)[torch.where(drop, 3, y), :3]
    c_out = 0.5 * sigma / (sigma**2 + 0.25) ** 0.5
    off = net.denoiser(x + expand(sigma, x) * z, sigma, labels) - x
    loss = plain(net, x, y, t, z, drop)
    assert_close(loss, off.square().mean((1, 2, 3)).sqrt() / c_out, rtol=1e-7, atol=0)
    optimizer, losses = torch.optim.Adam(net.parameters(), 0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(plain(net, x, y, t, z, drop).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    optimizer.zero_grad()
    Objective("edm", lam=1.0)(net, x, y, t, z, drop).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


# ---- the diffs ----------------------------------------------------------------------------------------

def edited(text, anchor, lines):
    """The text with lines added after the one line that starts with `anchor`."""
    old = text.splitlines(keepends=True)
    places = [k for k, line in enumerate(old) if line.startswith(anchor)]
    assert len(places) == 1, f"{len(places)} lines start with {anchor!r}"
    return "".join([*old[:places[0] + 1], *(f"{line}\n" for line in lines), *old[places[0] + 1:]])


def diff_of(name, anchor, lines):
    before = (ROOT / name).read_text()
    pair = (v.splitlines(keepends=True) for v in (before, edited(before, anchor, lines)))
    return "".join(difflib.unified_diff(*pair, f"a/{name}", f"b/{name}", n=2))


def without_places(diff):
    """A diff moves with the lines above it: git and patch look for its context near its place."""
    return re.sub(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", r"@@ \1 \2 @@", diff)


@pytest.mark.parametrize("k", range(len(EDITS)), ids=[name for name, *_ in EDITS])
@pytest.mark.parametrize("command", ["git apply", "patch -p1 -s"])
def test_a_diff_applies(tmp_path, k, command):
    edit, diff = EDITS[k], blocks(CONTRIBUTING, "diff")[k]
    name = edit[0]
    assert without_places(diff) == without_places(diff_of(*edit)), "see the first lines of this file"
    if not shutil.which(command.split()[0]):
        pytest.skip(f"no {command.split()[0]}")
    shutil.copy(ROOT / name, tmp_path)
    subprocess.run(command.split(), input=diff, text=True, cwd=tmp_path, check=True)
    assert (tmp_path / name).read_text() == edited((ROOT / name).read_text(), *edit[1:])


def clone(root):
    """A copy of the repository, and how to run a command in it."""
    leave_out = (".git", ".venv", "runs", "tests", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*leave_out))

    def call(command):
        done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr[-1500:]}"
    return call


SHORT = {"train.py": "--steps 2 --batch_size 32 --sample_steps 2 --no-compile --device cpu",
         "sample.py": "--num 4 --device cpu", "fid.py": "--num 40 --device cpu"}


@pytest.mark.slow
def test_the_diffs_train_and_sample(tmp_path):
    """All three in one copy, by git apply. The model says what it was made with."""
    call = clone(tmp_path / "fork")
    for k, diff in enumerate(blocks(CONTRIBUTING, "diff")):
        (tmp_path / f"{k}.diff").write_text(diff)
        call(f"git apply {tmp_path}/{k}.diff")
    for flags in ("--transport cosine-v --no-x_pred", "--data greys --model TiT-XXS/8", "--model TiT-M/8"):
        call(f"{sys.executable} train.py {SHORT['train.py']} {flags} --fresh")
        call(f"{sys.executable} sample.py {SHORT['sample.py']} --steps 2")
        metadata, _ = read_weights(tmp_path / "fork/runs/shapes/model.safetensors")
        assert json.loads(metadata["config"])[flags[2:].split()[0]] == flags.split()[1]


@pytest.mark.slow
def test_the_commands_marked_as_runnable_run(tmp_path):
    """The blocks of README.md below <!-- runs -->, in one copy, shortened."""
    call = clone(tmp_path / "clone")
    marked = blocks(README, "bash", "<!-- runs -->")
    lines = [line.split("#")[0].strip() for block in marked for line in block.splitlines()]
    assert len(lines) > 3
    for line in lines:
        script = re.search(r"\w+\.py", line)[0]
        call(f"{sys.executable} {line.removeprefix('python ')} {SHORT[script]}")


if __name__ == "__main__":
    new = iter(f"```diff\n{diff_of(*edit)}```" for edit in EDITS)
    text = re.sub("```diff\n.*?```", lambda old: next(new), CONTRIBUTING, flags=re.S)
    (ROOT / "CONTRIBUTING.md").write_text(text)
