"""fid.py against torch-fidelity and pytorch-fid with the same random Inception weights, against second ways to compute, and bad input."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import run
from torch.testing import assert_close

import fid
from data import Shapes, to_uint8
from fid import Inception, Options, Statistics, evaluate, frechet, kernel_distance, precision_recall, stored_pictures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Random Inception weights whose features vary, in a file: He scaling, and batch norms as they come."""
    import torchvision
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


def picture_set(size, seed, count=200):
    """Half shapes, half coloured noise smoothed: pictures (N, size, size, 3) uint8 with structure at all scales."""
    shapes = Shapes(size, seed)[np.arange(count // 2)][0]
    noise = torch.nn.functional.interpolate(torch.rand(count - count // 2, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1, size, mode="bicubic")
    return to_uint8(torch.cat([shapes, noise]))


def write_folder(path, pictures):
    path.mkdir()
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{k:04d}.png")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("size, count", [(32, 60), (64, 40), (256, 20), (299, 20), (300, 20)])
def test_the_same_numbers_as_torch_fidelity_and_pytorch_fid(tmp_path, weights, size, count, monkeypatch):
    """FID, IS and KID of torch-fidelity, FID of pytorch-fid: 1e-3 relative, resize included."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    inception = pytest.importorskip("pytorch_fid.inception")
    from pytorch_fid.fid_score import calculate_fid_given_paths
    fake, real = (write_folder(tmp_path / name, picture_set(size, seed, count)) for name, seed in (("fake", 1), ("real", 2)))
    with torch.no_grad():
        expected = torch_fidelity.calculate_metrics(
            input1=str(fake), input2=str(real), cuda=False, isc=True, fid=True, kid=True, isc_splits=1, kid_subsets=1, kid_subset_size=count,
            feature_extractor_weights_path=str(weights), batch_size=20, cache=False, verbose=False, samples_find_deep=False)
    ours = evaluate(Options(images=f"folder:{fake}", ref=f"folder:{real}", weights=str(weights), metrics="fid,is,kid", batch_size=20, device="cpu"))
    for name, theirs in (("FID", "frechet_inception_distance"), ("IS", "inception_score_mean")):
        assert_close(ours[name], expected[theirs], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert_close(ours["KID"], expected["kernel_inception_distance_mean"], rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: torch.load(weights, weights_only=True))
    expected = calculate_fid_given_paths([str(fake), str(real)], 20, "cpu", 2048, num_workers=0)
    ours = evaluate(Options(images=f"folder:{fake}", ref=f"folder:{real}", weights=str(weights), metrics="fid", resize="pytorch-fid", batch_size=20, device="cpu"))
    assert_close(ours["FID"], float(expected), rtol=1e-3, atol=1e-4)


def test_the_features_are_those_of_torch_fidelity(weights):
    """Feature by feature, for both resize rules' sizes, on a few pictures; the spatial ones by walking torchvision's modules."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    peer, ours = extractor("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)), Inception(str(weights))
    for size in (32, 300):
        x = torch.from_numpy(picture_set(size, 3, 4)).permute(0, 3, 1, 2)
        out, (pool, scores) = ours(x), peer(x)
        assert_close(out["pool"], pool, rtol=1e-4, atol=1e-5)
        assert_close(out["scores"], scores, rtol=1e-4, atol=1e-4)
        walk = (fid.resize_matrix(size, "torch-fidelity") @ x.float() @ fid.resize_matrix(size, "torch-fidelity").T - 128) / 128
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c",
                     "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
            walk = getattr(peer, name)(walk)
        spatial = peer.Mixed_6d.branch1x1(walk)[:, :7]                                               # (B, 7, 17, 17)
        assert_close(out["spatial"], spatial.permute(0, 2, 3, 1).reshape(len(x), -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 32, 298, 299, 300, 600])
def test_resizing_is_bilinear(size):
    """pytorch-fid's rule is torch's interpolate; the other at 299 changes nothing, and at 598 takes every second pixel."""
    x = torch.rand(2, 3, size, size)
    matrix = fid.resize_matrix(size, "pytorch-fid")
    assert_close(matrix @ x @ matrix.T, torch.nn.functional.interpolate(x.double(), (299, 299), mode="bilinear", align_corners=False).float(), rtol=1e-4, atol=1e-5)
    assert_close(fid.resize_matrix(299, "torch-fidelity"), torch.eye(299))
    assert_close(fid.resize_matrix(598, "torch-fidelity"), torch.eye(598)[::2])


def test_sfid_precision_and_recall_in_a_second_way(weights):
    """The distance of spatial moments by numpy and scipy; neighbours by a loop over every pair."""
    from scipy.linalg import sqrtm
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(60, 5, generator=g, dtype=torch.float64), 0.8 * torch.randn(70, 5, generator=g, dtype=torch.float64) + 0.3
    fake, real = Statistics(), Statistics()
    for first in range(0, 60, 7):
        fake.add(first, {"pool": a[first:first + 7], "spatial": a[first:first + 7], "scores": a[first:first + 7]})
    real.add(0, {"pool": b, "spatial": b, "scores": b})
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert_close(frechet(fake.moments["spatial"], real.moments["spatial"]), expected, rtol=1e-7, atol=1e-9)
    p = a.softmax(1)
    assert_close(fake.inception_score, (p * (p / p.mean(0)).log()).sum(1).mean().exp().item(), rtol=1e-9, atol=0)

    def inside(points, centres):
        count = 0
        for x in points:
            count += any((x - c).norm() <= sorted((c - o).norm() for o in centres)[3] for c in centres)
        return count / len(points)
    assert precision_recall(a[:25], b[:30]) == pytest.approx((inside(a[:25], b[:30]), inside(b[:30], a[:25])))


def test_precision_and_recall_are_torch_fidelity_s():
    metric = pytest.importorskip("torch_fidelity.metric_prc").prc_features_to_metric
    g = torch.Generator().manual_seed(4)
    for n, m, k in ((200, 200, 3), (150, 90, 5)):
        a, b = torch.randn(n, 12, generator=g), 1.2 * torch.randn(m, 12, generator=g)
        peer = metric(a, b, prc_neighborhood=k, prc_batch_size=64, save_cpu_ram=False, verbose=False)
        assert precision_recall(a, b, k) == pytest.approx((peer["precision"], peer["recall"]), rel=1e-5)


def test_kid_in_a_second_way():
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(12, 4, generator=g), torch.randn(12, 4, generator=g) + 0.5
    kernel = lambda x, y: (float(x.double() @ y.double()) / 4 + 1) ** 3
    same = lambda rows: sum(kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j) / (12 * 11)
    cross = sum(kernel(x, y) for x in a for y in b) / 144
    assert_close(kernel_distance(a, b), same(a) + same(b) - 2 * cross, rtol=1e-9, atol=0)
    subsets = kernel_distance(a, b, size=8, subsets=400)
    assert abs(subsets - kernel_distance(a, b)) < 0.2 * abs(kernel_distance(a, b))


def test_the_inception_score_goes_by_chunks_of_5000():
    scores = torch.randn(5003, 6, generator=torch.Generator().manual_seed(3))
    parts = Statistics()
    for first in range(0, 5003, 300):
        parts.add(first, {"pool": scores[first:first + 300, :2], "scores": scores[first:first + 300]})
    one = lambda p: (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    p = scores.double().softmax(1)
    assert_close(parts.inception_score, (one(p[:5000]) + one(p[5000:])) / 2, rtol=1e-9, atol=0)


def test_identical_sets_have_distance_zero(tmp_path, weights):
    folder = write_folder(tmp_path / "a", picture_set(32, 1, 20))
    result = evaluate(Options(images=f"folder:{folder}", ref=f"folder:{folder}", weights=str(weights), device="cpu"))
    assert abs(result["FID"]) < 1e-6 and abs(result["sFID"]) < 1e-6 and result["N"] == 20


@pytest.mark.slow
def test_statistics_are_a_reference(tmp_path, weights, capsys):
    """--stats and then --ref equals comparing the pictures; ADM's and pytorch-fid's files are recognised."""
    fake, real = (write_folder(tmp_path / name, picture_set(32, seed, 24)) for name, seed in (("fake", 1), ("real", 2)))
    common = dict(images=f"folder:{fake}", weights=str(weights), device="cpu")
    expected = evaluate(Options(ref=f"folder:{real}", **common))
    fid.main(Options(stats=f"folder:{real}", out=str(tmp_path / "ref.npz"), weights=str(weights), device="cpu"))
    ours = evaluate(Options(ref=str(tmp_path / "ref.npz"), **common))
    for name in ("FID", "sFID"):
        assert_close(ours[name], expected[name], rtol=1e-6, atol=1e-5)
    assert ours["ref_made"]["n"] == 24
    arrays = dict(np.load(tmp_path / "ref.npz"))
    arrays.pop("made")
    np.savez(tmp_path / "adm.npz", arr_0=picture_set(32, 2, 24), **arrays)
    adm = evaluate(Options(ref=str(tmp_path / "adm.npz"), metrics="fid,sfid,kid,pr", **common))
    assert adm["FID"] == ours["FID"] and "recall" in adm
    np.savez(tmp_path / "edm.npz", mu=arrays["mu"].astype(np.float32), sigma=arrays["sigma"].astype(np.float32))
    edm = evaluate(Options(ref=str(tmp_path / "edm.npz"), **common))
    assert_close(edm["FID"], ours["FID"], rtol=1e-4, atol=1e-4)
    assert "sFID" not in edm
    said = capsys.readouterr().out
    assert "the ADM kind" in said and "the pytorch-fid kind" in said and "this program" in said and "below the 2,048" in said


def test_bad_input_is_one_clear_error(tmp_path, weights):
    good = write_folder(tmp_path / "good", picture_set(32, 1, 6))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(7), sigma=np.eye(6))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    (tmp_path / "edm2.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    common = dict(weights=str(weights), device="cpu")
    for more, words in ((dict(images=f"folder:{tmp_path / 'empty'}", ref=f"folder:{good}"), "no pictures in"),
                        (dict(images=f"folder:{tmp_path / 'none'}", ref=f"folder:{good}"), "no pictures at"),
                        (dict(images=f"folder:{good}", ref=str(tmp_path / "broken.npz")), "damaged"),
                        (dict(images=f"folder:{good}", ref=str(tmp_path / "narrow.npz")), "width 2048 against a reference of width 7"),
                        (dict(images=f"folder:{good}", ref=str(tmp_path / "odd.npz")), "not a finite mean and covariance"),
                        (dict(images=f"folder:{good}", ref=str(tmp_path / "pickled.npz")), "damaged or holds more than plain arrays"),
                        (dict(images=f"folder:{good}", ref=str(tmp_path / "edm2.pkl")), "pickles can run any code"),
                        (dict(images=f"folder:{tmp_path / 'damaged'}", ref=f"folder:{good}"), "cannot read the picture"),
                        (dict(images=f"folder:{good}", ref=f"folder:{good}", features="shapes"), "are for what a model draws"),
                        (dict(images=f"folder:{good}"), "compare with what"), (dict(ref=f"folder:{good}"), "which pictures"),
                        (dict(images=f"folder:{good}", ref=f"folder:{good}", metrics="fid,lpips"), "unknown metrics lpips"),
                        (dict(images=f"folder:{good}", ref=f"folder:{good}", weights=str(tmp_path / "broken.npz")), "not a file of Inception weights")):
        with pytest.raises(ValueError, match=words):
            evaluate(Options(**{**common, **more}))


def test_grey_alpha_and_mixed_sizes_are_converted(tmp_path):
    """Grey becomes RGB, transparency white; pictures of several sizes come in batches of one size each, all of them once."""
    sizes = [(20, 20), (20, 20), (31, 17), (20, 20)]
    for k, size in enumerate(sizes):
        Image.new("L", size, 10 * k).save(tmp_path / f"{k}.png")
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "9.png")
    got = list(stored_pictures(f"folder:{tmp_path}", 8))
    assert [first for first, _ in got] == [0, 2, 3] and [tuple(x.shape) for _, x in got] == [(2, 3, 20, 20), (1, 3, 17, 31), (2, 3, 20, 20)]
    assert got[1][1].unique().tolist() == [20] and got[2][1][1].unique().tolist() == [255]


def test_a_picture_that_is_not_finite_is_named(monkeypatch):
    def broken(model, seeds, *rest, **more):
        x = torch.zeros(4, 3, 8, 8)
        x[2, 0, 0, 0] = float("nan")
        yield 0, x, torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(fid, "generate", broken)
    with pytest.raises(ValueError, match="seeds 100..103 is not finite"):
        list(fid.drawn_pictures(None, range(100, 104), Options()))


MERGE = """
import sys, torch, torch.distributed as dist
from fid import Statistics
from sample import deal, place
import os
if int(os.environ.get("WORLD_SIZE", 1)) > 1: dist.init_process_group("gloo")
rows = torch.randn(1000, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 50
s = Statistics(keep=True)
for first in deal(1000, 64, *place()):
    part = rows[first:first + 64]
    s.add(first, {"pool": part, "scores": part / 50}, torch.arange(first, first + len(part)) // 70 % 9)
s.merge()
if place()[0] == 0:
    torch.save([s.moments["pool"].n, s.moments["right"].mean, s.moments["pool"].mean, s.moments["pool"].covariance, torch.tensor(s.inception_score), s.rows,
                torch.tensor(s.spread, dtype=torch.float64)], sys.argv[1])
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_statistics(tmp_path):
    (tmp_path / "merge.py").write_text(MERGE)
    found = []
    for n in (1, 2, 4):
        out = tmp_path / f"{n}.pt"
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", str(tmp_path / "merge.py"), str(out)]
        done = subprocess.run(run, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out))
    for other in found[1:]:
        assert other[0] == found[0][0] == 1000
        assert other[1] == found[0][1] > 0, "pictures named right"
        for a, b in zip(other[2:], found[0][2:]):
            assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_model_without_classes_is_scored_without_them(tmp_path, monkeypatch, capsys, weights):
    monkeypatch.chdir(tmp_path)
    assert run("train.py", "--labels", "none", "--enhancement_ratio", 0, "--enhancement_style", "none", "--steps", 2, "--image_size", 32, "--compile", "no",
               "--out", "plain", capsys=capsys)[0] == 0
    line = fid.evaluate(Options(ckpt="plain", num=20, steps=1))
    assert line["FD-shapes"] > line["floor"] > 0 and "accuracy" not in line
    drawn, kept = fid.drawn_pictures, []
    monkeypatch.setattr(fid, "drawn_pictures", lambda *given: kept.append(given[3]) or drawn(*given))
    with pytest.raises(ValueError, match="raise --num"):
        fid.evaluate(Options(ckpt=str(ROOT / "assets/shapes-few.safetensors"), num=8, steps=1))
    folder = write_folder(tmp_path / "real", picture_set(32, 2, 10))
    fid.evaluate(Options(ckpt=str(ROOT / "assets/shapes-few.safetensors"), ref=f"folder:{folder}", weights=str(weights), num=4, steps=1, metrics="fid"))
    assert kept == [True, False]        # 2,048 features want 33 MB a class: moments by class are for the small features


def test_the_line_says_what_decides_the_number(tmp_path, weights, capsys):
    folder = write_folder(tmp_path / "real", picture_set(32, 2, 10))
    fid.main(Options(ckpt=str(ROOT / "assets/shapes-few.safetensors"), ref=f"folder:{folder}", weights=str(weights), num=6, blocks=2, steps=2, metrics="fid"))
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["NFE"] == 2 and line["seeds"] == [0, 11] and line["N"] == 6 and len(line["range"]["FID"]) == 2
    assert {"sampler", "ref", "features", "resize", "uint8", "versions", "ckpt", "dtype"} <= line.keys()


MEASURE = """
import resource, sys, time
import numpy as np, torch
pictures, ref, weights, which = sys.argv[1:]
start = time.perf_counter()
if which == "ours":
    from fid import Options, evaluate
    value = evaluate(Options(images=f"folder:{pictures}", ref=ref, weights=weights, metrics="fid", resize="pytorch-fid", batch_size=50, device="cpu"))["FID"]
else:
    import pytorch_fid.inception as inception
    from pytorch_fid.fid_score import calculate_fid_given_paths
    inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
    value = calculate_fid_given_paths([pictures, ref], 50, "cpu", 2048, num_workers=1)
print(float(value), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, time.perf_counter() - start)
"""


@pytest.mark.slow
def test_memory_does_not_grow_and_time_is_that_of_pytorch_fid(tmp_path, weights):
    """500 and 1,000 pictures in the same memory; 500 in about the time of pytorch-fid (half as much again allowed: noise), with the same FID.

    glibc is told to give large blocks back at once: left to itself its peak for the SAME pictures differs by 190 MiB from run to run.
    """
    pytest.importorskip("pytorch_fid")
    pictures = picture_set(64, 5, 1000)
    small, large = write_folder(tmp_path / "500", pictures[::2]), write_folder(tmp_path / "1000", pictures)
    rows = torch.randn(3000, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.savez(tmp_path / "ref.npz", mu=rows.mean(0).numpy(), sigma=rows.T.cov().numpy())
    (tmp_path / "measure.py").write_text(MEASURE)

    def measure(folder, which):
        run = subprocess.run([sys.executable, str(tmp_path / "measure.py"), str(folder), str(tmp_path / "ref.npz"), str(weights), which], cwd=ROOT, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}, capture_output=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return [float(v) for v in run.stdout.split()[-3:]]
    ours, twice, theirs = measure(small, "ours"), measure(large, "ours"), measure(small, "peer")
    print(f"\n500: {ours[1]:.0f} MiB, {ours[2]:.1f} s; 1,000: {twice[1]:.0f} MiB; pytorch-fid, 500: {theirs[1]:.0f} MiB, {theirs[2]:.1f} s")
    assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
    assert twice[1] < ours[1] + 20
    assert ours[2] < 1.5 * theirs[2]
