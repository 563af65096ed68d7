import numpy as np
import pytest
from data_files import no_statistics


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz and gives its path."""

    def write(contents):
        path = tmp_path / "some.npz"
        np.savez(path, **contents)
        return str(path)

    return write


@pytest.fixture
def unscaled(monkeypatch):
    """Inputs are not standardised."""
    monkeypatch.setattr("pyro_bmrs.data.dataset._channel_statistics", no_statistics)
