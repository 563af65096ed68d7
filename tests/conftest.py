"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run several processes side by side; more threads than cores slow sampling tenfold."""
    torch.set_num_threads(1)
