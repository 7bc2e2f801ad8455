"""Scores with Inception itself: the numbers of other libraries, memory and time, any number of processes."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from toys import ROOT, images_of, write_folder

from fid import Options, evaluate

pytestmark = pytest.mark.slow


def test_the_same_numbers_as_torch_fidelity(tmp_path, weights):
    """FID, IS and KID: 1e-3 relative, resizing included. (Features are compared in test_peers.py.)"""
    size, count = 32, 24
    torch_fidelity = pytest.importorskip("torch_fidelity")
    paths = str(tmp_path / "fake"), str(tmp_path / "real")
    fake = write_folder(tmp_path / "fake", images_of(size, 1, count))
    real = write_folder(tmp_path / "real", images_of(size, 2, count))
    common = dict(images=fake, ref=real, weights=str(weights), batch_size=20, device="cpu")
    with torch.no_grad():
        peer = torch_fidelity.calculate_metrics(
            input1=paths[0], input2=paths[1], cuda=False, isc=True, fid=True, kid=True, isc_splits=1,
            kid_subsets=1, kid_subset_size=count, feature_extractor_weights_path=str(weights), batch_size=20,
            cache=False, verbose=False, samples_find_deep=False)
    ours = evaluate(Options(metrics="fid,is,kid", **common))
    assert_close(ours["FID"], peer["frechet_inception_distance"], rtol=1e-3, atol=1e-5)
    assert_close(ours["IS"], peer["inception_score_mean"], rtol=1e-3, atol=1e-5)
    assert_close(ours["KID"], peer["kernel_inception_distance_mean"], rtol=1e-3, atol=1e-5)


MERGE = """
import os, sys
import torch, torch.distributed as dist
from engine import init_distributed, leave_distributed, rank_and_world, rank_batches
from fid import Statistics

init_distributed()
rows = torch.randn(1000, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 50
s = Statistics(keep=True)
for first in rank_batches(1000, 64):
    part = rows[first:first + 64]
    s.add(first, {"pool": part, "scores": part / 50}, torch.arange(first, first + len(part)) // 70 % 9)
s.merge()
if rank_and_world()[0] == 0:
    mean, covariance = s.moments()
    scores = [torch.tensor(v) for v in (s.n, s.right, s.inception_score)]
    torch.save([*scores, mean, covariance, s.rows], sys.argv[1])
leave_distributed()
"""


def test_any_number_of_processes_gives_the_same_statistics(tmp_path):
    (tmp_path / "merge.py").write_text(MERGE)
    found, environment = [], {**os.environ, "PYTHONPATH": str(ROOT)}
    for n in (1, 2, 4):
        out = str(tmp_path / f"{n}.pt")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        words = [sys.executable, *torchrun, str(tmp_path / "merge.py"), out]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out))
    n, right, *_ = found[0]
    assert n == 1000 and right > 0
    for other in found[1:]:
        for a, b in zip(other, found[0]):
            assert_close(a, b, rtol=1e-10, atol=1e-10)


MEASURE = r"""
import re, sys, time
import torch
images, ref, weights, which = sys.argv[1:]
start = time.perf_counter()
if which == "ours":
    from fid import Options, evaluate
    value = evaluate(Options(images=images, ref=ref, weights=weights, metrics="fid",
                             batch_size=50, device="cpu"))["FID"]
else:
    import pytorch_fid.inception as inception
    from pytorch_fid.fid_score import calculate_fid_given_paths
    inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
    value = calculate_fid_given_paths([images, ref], 50, "cpu", 2048, num_workers=1)
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]
print(float(value), int(peak) / 2**10, time.perf_counter() - start)
"""


def test_memory_does_not_grow_and_time_is_that_of_pytorch_fid(tmp_path, weights):
    """100 and 300 images in the same memory, so none is kept: 200 hold 37 MiB. 100 in about the time of
    pytorch-fid (half as much again allowed: noise).

    VmHWM is the peak of this program alone; ru_maxrss begins with that of the one that started it.
    glibc is told to give large blocks back at once: by itself its peak for the SAME images differs by 190 MiB
    from run to run.
    """
    pytest.importorskip("pytorch_fid")
    images = images_of(256, 5, 300)
    for name, part in (("100", images[100:200]), ("300", images)):
        write_folder(tmp_path / name, part)
    rows = torch.randn(3000, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.savez(tmp_path / "ref.npz", mu=rows.mean(0).numpy(), sigma=rows.T.cov().numpy())
    (tmp_path / "measure.py").write_text(MEASURE)
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **limits}

    def measure(folder, which):
        words = [sys.executable, "measure.py", folder, "ref.npz", str(weights), which]
        run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return [float(value) for value in run.stdout.split()[-3:]]
    ours, more, peer = measure("100", "ours"), measure("300", "ours"), measure("100", "peer")
    print(f"\n100: {ours[1]:.0f} MiB, {ours[2]:.1f} s; 300: {more[1]:.0f} MiB; "
          f"pytorch-fid, 100: {peer[1]:.0f} MiB, {peer[2]:.1f} s")
    assert more[1] < ours[1] + 20
    assert ours[2] < 1.5 * peer[2]
