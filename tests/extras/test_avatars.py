"""The avatars: same bytes twice and after an interruption; test pictures have seeds of their own."""
import numpy as np
import pytest

pytest.importorskip("dicebear")
pytest.importorskip("dicebear_styles")
pytest.importorskip("resvg_py")

from data import open_dataset
from engine import run
from extras import avatars


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """The styles, read once, since the processes that render are forks of this one; without the ten seconds
    in which the package checks its own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dicebear.validator.StyleValidator.validate", lambda data: None)
        for style in avatars.STYLES:
            avatars.load_style(style)


def make(path, *flags):
    run(lambda: avatars.main([str(path), "--count", "3", "--size", "16", "--workers", "1", *flags]))
    return path.read_bytes()


def test_file_has_the_promised_arrays_and_opens_as_data(tmp_path):
    make(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        x, y, names = (file[name] for name in ("x", "y", "names"))
    assert x.shape == (30, 16, 16, 3) and x.dtype == np.uint8
    assert y.tolist() == [k for k in range(10) for _ in range(3)] and tuple(names) == avatars.STYLES
    assert open_dataset(f"npz:{tmp_path}/a.npz").names == list(avatars.STYLES)
    for style, rows in zip(avatars.STYLES, x.reshape(10, 3, 16, 16, 3)):
        assert len(np.unique(rows, axis=0)) == 3, f"{style}: two seeds give one picture"
    np.testing.assert_array_equal(x[4], avatars.render("voxel-art", "1", 16))


def test_same_bytes_twice_and_after_an_interruption(tmp_path, monkeypatch):
    whole, rendered, original = make(tmp_path / "a.npz"), [], avatars.render

    def fail_at_fifth(style, seed, size):
        rendered.append(style)
        if len(rendered) == 5:
            raise KeyboardInterrupt
        return original(style, seed, size)
    monkeypatch.setattr(avatars, "BLOCK", 1)
    monkeypatch.setattr(avatars.multiprocessing, "Pool", InThisProcess)
    monkeypatch.setattr(avatars, "render", fail_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()
    assert make(tmp_path / "b.npz") == whole
    assert len(rendered) == 31                      # four before the interruption, and its own a second time
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]


class InThisProcess:
    """A Pool without processes, so that a test can count and interrupt."""
    def __init__(self, *_):
        self.imap_unordered = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_test_pictures_are_of_other_seeds(tmp_path):
    make(tmp_path / "a.npz")
    make(tmp_path / "test.npz", "--test")
    train, test = (np.load(tmp_path / f"{name}.npz")["x"] for name in ("a", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        make(tmp_path / "a.zip")
    assert "OUT must end in .npz" in capsys.readouterr().err
    monkeypatch.setattr(avatars, "PACKAGES", ("dicebear-of-nobody",))
    with pytest.raises(SystemExit):
        make(tmp_path / "a.npz")
    assert "dicebear-of-nobody is missing: pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
