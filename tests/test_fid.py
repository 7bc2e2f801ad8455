"""Scores: distances against closed forms and second ways to compute them; what is compared, and bad input.

A small stand-in takes Inception's place here. test_peers.py and slow/test_scores.py compare Inception itself
with other libraries.
"""
import hashlib
import json
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from scipy.linalg import sqrtm
from torch.testing import assert_close
from toys import ROOT, images_of, write_folder

import features
from extras.effnet import EffNet
import fid
from checkpoint import build, save_model
from config import Config
from data import to_uint8
from sample import generate, open_pipeline
from shapes import Shapes
from fid import Moments, Options, Statistics, evaluate, frechet, kernel_distance, precision_recall

SHIPPED = str(ROOT / "assets/shapes-few.safetensors")
DOUBLE = torch.float64


def statistics(rows, size=None, **more):
    """Statistics of feature rows (N, D), added in batches of `size`."""
    result, size = Statistics(**more), size or len(rows)
    for first in range(0, len(rows), size):
        part = rows[first:first + size]
        result.add(first, {"pool": part, "EffNet": part[:, 1:], "scores": part})
    return result


# ---- distances ----------------------------------------------------------------------------------------

def test_moments_of_parts_are_those_of_the_whole():
    rows = torch.randn(1000, 7, dtype=DOUBLE) @ torch.randn(7, 7, dtype=DOUBLE) + 100
    parts = statistics(rows, 130, keep=True)
    for name, expected in (("pool", rows), ("EffNet", rows[:, 1:])):
        mean, covariance = parts.moments(name)
        assert parts.n == 1000
        assert_close(mean, expected.mean(0), rtol=1e-12, atol=0)
        assert_close(covariance, expected.T.cov(), rtol=1e-9, atol=1e-9)
    assert_close(parts.rows, rows.float(), rtol=0, atol=0)


def test_frechet_of_known_gaussians():
    """Commuting covariances have the closed form |m1 - m2|^2 + |s1 - s2|^2; for others take scipy's sqrtm."""
    turn, shift = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE))[0], torch.randn(6, dtype=DOUBLE)
    s1, s2 = torch.rand(2, 6, dtype=DOUBLE) + 0.1
    a = Moments(torch.zeros(6, dtype=DOUBLE), turn * s1**2 @ turn.T)
    b = Moments(shift, turn * s2**2 @ turn.T)
    closed = (shift.square().sum() + (s1 - s2).square().sum()).item()
    assert_close(frechet(a, b), closed, rtol=1e-9, atol=1e-9)
    rows = torch.randn(50, 6, dtype=DOUBLE)
    one, two, few = (statistics(r).moments() for r in (rows, rows.flip(0) @ turn * s1 + shift, rows[:4]))
    product = one.covariance @ two.covariance
    expected = (one.mean - two.mean).square().sum() + (one.covariance + two.covariance).trace()
    expected -= 2 * sqrtm(product.numpy()).trace().real
    assert_close(frechet(one, two), expected.item(), rtol=1e-7, atol=1e-7)
    for same in (two, few):         # few: fewer rows than features, so the covariance is singular
        assert abs(frechet(same, same)) < 1e-6


def test_precision_and_recall_in_a_second_way():
    """Neighbours by a loop over every pair."""
    a, b = torch.randn(25, 5), 0.8 * torch.randn(30, 5) + 0.3

    def inside(points, centres):
        count = 0
        for x in points:
            count += any((x - c).norm() <= sorted((c - o).norm() for o in centres)[3] for c in centres)
        return count / len(points)
    found = precision_recall(a, b)
    assert found == pytest.approx((inside(a, b), inside(b, a))) and 0 < min(found) and max(found) < 1


def test_kid_in_a_second_way():
    a, b = torch.randn(12, 4), torch.randn(12, 4) + 0.5
    kernel = lambda x, y: (float(x.double() @ y.double()) / 4 + 1) ** 3
    within = lambda rows: sum(kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j)
    cross = sum(kernel(x, y) for x in a for y in b) / 144
    exact = kernel_distance(a, b)
    assert_close(exact, (within(a) + within(b)) / (12 * 11) - 2 * cross, rtol=1e-9, atol=0)
    assert abs(kernel_distance(a, b, size=8, subsets=400) - exact) < 0.2 * abs(exact)


def test_the_inception_score_goes_by_chunks_of_5000():
    scores = torch.randn(5003, 6)
    one = lambda p: (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    p = scores.double().softmax(1)
    expected = (one(p[:5000]) + one(p[5000:])) / 2
    assert_close(statistics(scores, 300).inception_score, expected, rtol=1e-9, atol=0)


# ---- features -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 32, 298, 299, 300, 600])
def test_resizing_is_bilinear(size):
    """Pixel i of 299 is read at i size / 299 between its neighbours."""
    place = np.minimum(np.arange(299) * size / 299, size - 1)
    x = np.random.default_rng(0).random(size)
    expected = np.interp(place, np.arange(size), x)
    assert_close(features.resize_matrix(size).double().numpy() @ x, expected, rtol=1e-5, atol=1e-5)


def test_the_small_features_know_real_shapes():
    with safe_open(ROOT / "assets/features-shapes32.safetensors", "pt") as file:
        assert float(file.metadata()["accuracy"]) >= 0.99 and int(file.metadata()["held_out"]) >= 1000
    x, y = Shapes(32, seed=77)[np.arange(500)]
    named = features.SmallFeatures("shapes", (3, 32, 32))(to_uint8(x))["scores"].argmax(1)
    assert (named == y).float().mean() >= 0.99
    with pytest.raises(ValueError, match="--train --data shapes --image_size 48"):
        features.SmallFeatures("shapes", (3, 48, 48))


def test_inception_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    """Into an empty cache, by the hash in the name; a file that is none is named, with where to get it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pth")
    blob = (tmp_path / "weights.pth").read_bytes()
    source = tmp_path / f"pt_inception-{hashlib.sha256(blob).hexdigest()[:8]}.pth"
    monkeypatch.setattr(features, "INCEPTION", source.as_uri())
    source.write_bytes(blob + b"more")
    with pytest.raises(ValueError, match="hash"):
        features.inception_weights("")
    source.write_bytes(blob)
    for _ in range(2):
        tensors, _ = features.inception_weights("")
        assert_close(tensors, {"w": torch.ones(3)})
        source.unlink(missing_ok=True)
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="broken.pth.*pt_inception"):
        features.inception_weights(str(tmp_path / "broken.pth"))


# ---- what is compared ---------------------------------------------------------------------------------

class StandIn(torch.nn.Module):
    """In Inception's place: the means of sixteenths of the image."""
    hash, width = "0123456789abcdef", 48

    def __init__(self, weights=""):
        super().__init__()

    def forward(self, images):
        x = images.float().expand(-1, 3, -1, -1) / 50
        pool = F.adaptive_avg_pool2d(x, 4).flatten(1)                                   # (B, 48)
        return {"pool": pool, "scores": pool[:, :5]}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(fid, "Inception", StandIn)


def test_statistics_are_a_reference(tmp_path, stand_in, capsys):
    """The distance of a set from itself is 0. Files of --stats, of ADM (which have images and statistics of a
    second kind) and of pytorch-fid give what the images themselves give."""
    fake = write_folder(tmp_path / "fake", images_of(32, 1, 60))
    real = write_folder(tmp_path / "real", images_of(32, 2, 60))
    common = dict(images=fake, device="cpu", batch_size=25)

    def scores(ref, *names, **more):
        result = evaluate(Options(ref=str(ref), **common, **more))
        return torch.tensor([result[name] for name in names]), result
    every = dict(metrics="fid,kid,pr")
    itself, result = scores(fake, "FID", "precision", "recall", **every)
    assert_close(itself, torch.tensor([0.0, 1.0, 1.0]), rtol=0, atol=1e-6)
    assert result["N"] == 60
    expected, _ = scores(real, "FID", "KID", "recall", **every)
    assert expected[0] > 0.1
    fid.main(Options(stats=real, out=str(tmp_path / "ref.npz"), device="cpu"))
    ours, result = scores(tmp_path / "ref.npz", "FID")
    assert_close(ours, expected[:1], rtol=1e-6, atol=1e-5)
    assert result["ref_made"]["n"] == 60
    arrays = dict(np.load(tmp_path / "ref.npz"))
    arrays.pop("made")
    spatial = dict(mu_s=np.zeros(7), sigma_s=np.eye(7))
    np.savez(tmp_path / "adm.npz", arr_0=images_of(32, 2, 60), **arrays, **spatial)
    adm, _ = scores(tmp_path / "adm.npz", "FID", "KID", "recall", **every)
    assert_close(adm, expected, rtol=1e-6, atol=1e-5)
    np.savez(tmp_path / "edm.npz", **{name: arrays[name].astype(np.float32) for name in ("mu", "sigma")})
    edm, result = scores(tmp_path / "edm.npz", "FID")
    assert_close(edm, ours, rtol=1e-4, atol=1e-4)
    assert result["ref_made"] == {} and "does not say" in capsys.readouterr().out


def test_grey_and_mixed_sizes_are_converted(tmp_path):
    """Grey becomes RGB; a batch holds images of one size, and each image comes once."""
    for k, size in enumerate([(20, 20), (20, 20), (31, 17), (20, 20), (31, 17)]):
        Image.new("L", size, 10 * k).save(tmp_path / f"{k}.png")
    first, batches = zip(*fid.stored_images(f"folder:{tmp_path}", 8))
    counts = [len(x) for x in batches]
    assert list(first) == [sum(counts[:k]) for k in range(len(counts))] and sum(counts) == 5
    assert all(x.shape[1:] in ((3, 20, 20), (3, 17, 31)) for x in batches)
    values = {size: sorted(v for x in batches for v in x[:, 1, 0, 0].tolist() if x.shape[2:] == size)
              for size in ((20, 20), (17, 31))}
    assert values == {(20, 20): [0, 10, 30], (17, 31): [20, 40]}


def test_a_model_without_classes_is_scored_without_them(tmp_path):
    config = Config(model="TiT-XXS/8", labels="none")
    net = build(config, (3, 32, 32), 0)
    save_model(tmp_path / "plain.safetensors", net.state_dict(), net, config, [])
    line = evaluate(Options(ckpt=str(tmp_path / "plain.safetensors"), num=20, steps=1))
    assert line["FD-shapes"] > line["floor"] > 0 and "accuracy" not in line


def test_the_line_says_what_decides_the_number(tmp_path, stand_in, capsys):
    folder = write_folder(tmp_path / "real", images_of(32, 2, 10))
    fid.main(Options(ckpt=SHIPPED, ref=folder, num=6, seed=2, steps=3, metrics="fid"))
    *_, people, line = capsys.readouterr().out.strip().splitlines()
    line = json.loads(line)
    assert people == f"FID {line['FID']:.4g} of 6 images at 3 network calls"
    assert line["NFE"] == line["sampler"]["steps"] == 3 and line["seeds"] == [12, 17] and line["N"] == 6
    assert StandIn.hash in line["features"] and line["ref"] == folder and line["ckpt"] == SHIPPED
    assert {"FID", "ref_hash", "resize", "uint8", "versions", "dtype", "device"} <= line.keys()
    other = evaluate(Options(ckpt=SHIPPED, ref=folder, num=6, seed=2, steps=1, metrics="fid"))
    assert other["FID"] != line["FID"]          # the images were drawn as the flags say


def test_the_classifier_sees_no_stream_that_scores_use(monkeypatch):
    """Scores take their real images from seed 1000, data of a run from its seed, 0 by default."""
    seen = []
    open_it = lambda source, size, seed: seen.append(seed) or Shapes(size, seed)
    monkeypatch.setattr(fid, "open_dataset", open_it)
    monkeypatch.setattr(fid, "train_features", lambda data, path: seen.append(data.seed))
    fid.main(Options(train=True, image_size=32))
    assert seen == [1, 1]
    features.small_features("shapes", lambda seed: seen.append(seed) or Shapes(32, seed), None)
    assert seen[2:] == [1]


def test_the_shipped_two_step_model():
    """Its score and the floor to less than .5 %: features, images, grid and sampler are what they were."""
    result = evaluate(Options(ckpt=SHIPPED, num=1000, steps=2, dtype="float32"))
    assert result["NFE"] == 2 and result["real_accuracy"] == 1.0
    assert result["accuracy"] == pytest.approx(0.963, abs=2e-3)
    assert result["floor"] == pytest.approx(2.80224, rel=2.5e-3)
    assert result["FD-shapes"] == pytest.approx(6.57783, rel=4.5e-3)


def test_the_distance_of_shifted_shapes():
    """By the shipped features, to .5 %: 1,000 images, moved by four pixels, against 1,000 others."""
    small, found = features.SmallFeatures("shapes", (3, 32, 32)), []
    for seed, shift in ((5, 0), (6, 0), (6, 4)):
        x, y = Shapes(32, seed)[np.arange(1000)]
        found.append(Statistics())
        found[-1].add(0, small(to_uint8(x.roll(shift, -1))), y)
    real, other, shifted = (part.moments() for part in found)
    assert frechet(other, real) == pytest.approx(3.7937, rel=4.5e-3)
    assert frechet(shifted, real) == pytest.approx(83.885, rel=5e-3)
    assert found[2].right / 1000 == pytest.approx(0.825, abs=2e-3)


def test_the_shipped_avatars_are_recognised():
    pipeline = open_pipeline(SHIPPED.replace("shapes-few", "avatars-few"), torch.device("cpu"), "float32")
    small = features.SmallFeatures("avatars", (3, 64, 64))
    _, x, y = next(generate(pipeline, range(60), 60, steps=2))
    assert (small(to_uint8(x))["scores"].argmax(1) == y).float().mean() >= 0.95


def test_real_floor_and_training_images_are_different_ones(monkeypatch, tmp_path):
    """Real images and the floor are two parts of one stream, which has a seed of its own; in a finite set no
    image is in both. Sets with test images give only those."""
    images, seen, opened, collect = np.arange(60, dtype=np.uint8), [], [], fid.collect
    x = images[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=images % 3)

    def watch(batches, *more, **how):
        batches = list(batches)
        seen.append([value for batch in batches for value in batch[1][:, 0, 0, 0].tolist()])
        return collect(batches, *more, **how)
    open_it = fid.open_dataset
    monkeypatch.setattr(fid, "collect", watch)
    monkeypatch.setattr(fid, "open_dataset", lambda *a, **how: opened.append((a, how)) or open_it(*a, **how))
    evaluate(Options(ckpt=SHIPPED, data=f"npz:{tmp_path / 'd.npz'}", features="shapes", num=50, steps=1,
                     batch_size=7))
    real, floor, drawn = seen
    assert len(real) == len(floor) == len(drawn) == 30 and sorted(real + floor) == images.tolist()
    (_, _, seed, labels), how = opened[-1]
    assert seed == 1000 and labels == "all" and how["test"]


def test_the_independent_metric(capsys):
    """Its scores are the package's own; torn shapes are further from real ones than other real ones are; and
    the line has both metrics with their floors, of the same images."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    effnet, x = EffNet(), to_uint8(Shapes(32, seed=5)[np.arange(300)][0])
    seen = F.interpolate(x[:4].float(), (96, 96), mode="bilinear", antialias=True)
    net = package.EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(effnet.net.state_dict())
    expected = net.eval()((seen - 127) / 128)
    assert_close(effnet(x[:4])["scores"], expected, rtol=1e-4, atol=1e-4)
    assert_close(effnet(x[:4, :1])["pool"], effnet(x[:4, :1].expand(-1, 3, -1, -1))["pool"])
    torn = torch.where(torch.rand(100, 1, 32, 32) < 0.02, 255, x[200:])
    real, other, torn = (statistics(effnet(part)["pool"]).moments() for part in (x[:100], x[100:200], torn))
    assert frechet(torn, real) > 1.5 * frechet(other, real)
    alone, result = (evaluate(Options(ckpt=SHIPPED, num=20, steps=1, effnet=more)) for more in (False, True))
    assert result["floor-EffNet"] < result["FD-EffNet"] and effnet.hash in result["features"]
    assert all(result[name] == alone[name] for name in ("FD-shapes", "floor", "accuracy"))
    assert "FD-EffNet" not in alone and "below the 1,280 features" in capsys.readouterr().out


@pytest.mark.parametrize("data, name", [
    ("shapes", "shapes"), ("mnist", "mnist"), ("mnist:some/where", "mnist"), ("fashion:DIR", "fashion"),
    ("folder:pets/", "pets"), ("folder:a/shapes", "folder-shapes"), ("npz:mnist.npz", "npz-mnist"),
    ("npz:x/avatars64.npz", "avatars64")])
def test_the_shipped_features_belong_to_their_own_data(data, name):
    """Wherever these lie; a folder or a file that has the same name is another set."""
    assert fid.pick_features(Options(ckpt="x"), data) == name


def test_few_images_are_said(capsys):
    evaluate(Options(ckpt=SHIPPED, num=10, steps=1))
    assert "N = 10 is below the 64 features" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_an_npz_is_read_as_it_goes(tmp_path, monkeypatch, rank):
    """Each process yields its own batches of the first array of images, and nobody loads an array whole."""
    x = np.random.default_rng(0).integers(0, 256, (23, 8, 6, 3), np.uint8)
    np.savez(tmp_path / "x.npz", labels=np.arange(23), arr_0=x)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=x)
    monkeypatch.setattr(np, "load", None)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("x.npz", "packed.npz"):
        read = list(fid.stored_images(str(tmp_path / name), 5))
        assert [first for first, _ in read] == [[0, 10, 20], [5, 15]][rank]
        for first, batch in read:
            assert_close(batch, torch.from_numpy(x[first:first + 5]).permute(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("more, words", [
    (dict(images="folder:empty"), "no images in"), (dict(images="folder:none"), "no images at"),
    (dict(images="folder:damaged"), "cannot read"), (dict(ref="broken.npz"), "damaged"),
    (dict(ref="narrow.npz"), "covariance of 48 features"), (dict(ref="odd.npz"), "not a finite mean"),
    (dict(ref="pickled.npz"), "plain arrays"), (dict(ref="edm2.pkl"), "pickles"), (dict(ref=""), "--ref"),
    (dict(images=""), "which images"), (dict(ckpt=SHIPPED), "which images"),
    (dict(features="shapes"), "leave --ref out"), (dict(effnet=True), "leave --ref out"),
    (dict(metrics="fid,lpips"), "lpips"), (dict(metrics="sfid"), "sfid")])
def test_bad_input_is_one_clear_error(tmp_path, stand_in, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "good", images_of(32, 1, 6))
    for name, content in (("broken.npz", b"PK\x03\x04 nothing"), ("edm2.pkl", b"\x80\x04.")):
        (tmp_path / name).write_bytes(content)
    np.savez("narrow.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez("odd.npz", mu=np.zeros(7), sigma=np.eye(6))
    np.savez("pickled.npz", x=np.array([{}], dtype=object))
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged/a.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    with pytest.raises(ValueError, match=words) as error:
        evaluate(Options(**{**dict(images="folder:good", ref="folder:good", device="cpu"), **more}))
    assert "\n" not in str(error.value)


def test_weights_that_are_none_are_named(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="broken.pth.*pt_inception"):
        features.inception_weights(str(tmp_path / "broken.pth"))


def test_every_set_has_more_images_than_neighbours():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="real images: 3 are too few, give at least 4"):
        fid.collect([(k, image) for k in range(3)], 3, StandIn(), what="real images")
    assert fid.collect([(k, image) for k in range(4)], 4, StandIn()).n == 4


class Features:
    hash, width = "mine", 3


def test_a_reference_of_other_features_is_refused(tmp_path, capsys):
    file = str(tmp_path / "ref.npz")
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3), made=json.dumps({"weights": "other"}))
    options, features = fid.Options(ref=file), Features()
    with pytest.raises(ValueError, match="weights other, not mine"):
        fid.inception_reference(options, features, False)
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3))
    fid.inception_reference(options, features, False)
    assert "does not say" in capsys.readouterr().out


def test_the_inception_score_of_sorted_folders_is_that_of_a_shuffled_set(tmp_path, monkeypatch):
    """12,000 images sorted by class: in the order of the names a chunk of 5,000 knows few of ten classes."""
    names = [f"{k // 1200}/{k:05d}.png" for k in range(12_000)]
    monkeypatch.setattr(fid, "find_images", lambda path, skipped: names)
    monkeypatch.setattr(fid, "read_rgb", lambda name, on_white: np.full((2, 2, 3), int(name[0]), np.uint8))
    result = Statistics()
    for first, x in fid.stored_images(f"folder:{tmp_path}", 500):
        scores = torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 10) * 1000.0
        result.add(first, {"pool": scores[:, :2], "scores": scores})
    assert result.inception_score == pytest.approx(10, rel=0.01)
    in_order = statistics(torch.eye(10).repeat_interleave(1200, 0) * 1000.0, 500)
    assert in_order.inception_score < 6


def test_a_colon_in_a_path_is_kept(tmp_path):
    folder = tmp_path / "run_12:30"
    folder.mkdir()
    np.savez(folder / "s.npz", arr_0=images_of(8, 0, 4))
    assert next(fid.stored_images(str(folder / "s.npz"), 9))[1].shape == (4, 3, 8, 8)
    write_folder(folder / "a:b", images_of(8, 0, 4))
    assert next(fid.stored_images(f"folder:{folder / 'a:b'}", 9))[1].shape == (4, 3, 8, 8)


def test_learned_features_belong_to_their_images_and_classes(tmp_path, monkeypatch):
    """Other images, or other classes, have a file of their own; the same find theirs."""
    paths = []
    monkeypatch.setattr(features, "train_features", lambda data, path: paths.append(path))
    monkeypatch.setattr(features, "SmallFeatures", lambda *which: None)
    for fingerprint, names in (("a", ["cat", "dog"]), ("b", ["cat", "dog"]), ("a", ["cat", "cow"]),
                               ("a", ["cat", "dog"])):
        data = types.SimpleNamespace(shape=(3, 8, 8), names=names, fingerprint=fingerprint)
        features.small_features("pets", lambda seed, data=data: data, tmp_path)
    assert len(set(paths)) == 3 and paths[3] == paths[0]


def test_the_accuracy_of_features_is_that_on_held_out_images(tmp_path):
    """Seven images, all of the class that the stream never shows."""
    class Stream:
        shape, names = (3, 8, 8), ["dark", "bright"]
        __getitem__ = lambda self, k: (torch.ones(len(k), 3, 8, 8), torch.ones(len(k), dtype=torch.int64))
        hold_out = lambda self, count: (torch.ones(7, 3, 8, 8), torch.zeros(7, dtype=torch.int64))
    features.train_features(Stream(), tmp_path / "features.safetensors", steps=6)
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        assert file.metadata() == {"accuracy": "0.0000", "held_out": "7"}
