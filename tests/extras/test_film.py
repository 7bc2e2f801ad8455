"""The film of sample.py: the noise, then what the models see after each call."""
import numpy as np
from PIL import Image
from toys import ROOT, run


def test_a_film_has_the_noise_and_every_call(tmp_path, monkeypatch, capsys):
    """Two models side by side: the shorter film waits at its end."""
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "assets/shapes-few.safetensors"
    status, _, err = run("sample.py", "--ckpt", shipped, "--steps", 3, "--num", 10, "--out", "film.gif",
                         "--beside", shipped, capsys=capsys)
    assert status == 0, err
    film = Image.open("film.gif")
    assert film.n_frames == 4 and film.size == (2 * (5 * 68 - 4) + 24, 20 + 2 * 68 - 4)
    frames = []
    for k in range(4):
        film.seek(k)
        frames.append(np.asarray(film.convert("RGB")))
        assert np.array_equal(frames[k][:, :336], frames[k][:, 360:])
    status, _, _ = run("sample.py", "--ckpt", shipped, "--steps", 3, "--num", 10, capsys=capsys)
    page = np.asarray(Image.open("samples.png").convert("RGB"))[18:82, :64]     # the first image
    distance = [np.abs(frame[20:84, :64].astype(int) - page).mean() for frame in frames]
    assert distance[3] < 2 < 8 < distance[0], distance      # a GIF has 256 colours
    assert all((frame[:, 336:360] == 255).all() for frame in frames)            # between the models: white
