"""What all tests share."""

import pyro
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run several processes side by side; more threads than cores slow sampling tenfold."""
    torch.set_num_threads(1)


@pytest.fixture
def own_parameters():
    """Guides share no parameters, whatever their classes; the same random numbers for each test."""
    with pyro.settings.context(module_local_params=True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        yield


@pytest.fixture
def empty_store():
    """No parameters of other tests in Pyro's store; the same random numbers for each test."""
    pyro.clear_param_store()
    torch.manual_seed(0)
