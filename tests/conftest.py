"""What all tests share."""

import signal

import pyro
import pytest
import torch

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and stops.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run several processes side by side; more threads than cores slow sampling tenfold."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def validation():
    """Whoever calls torch.compile turns off the validation of distributions in the whole process."""
    yield
    pyro.enable_validation(True)


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
