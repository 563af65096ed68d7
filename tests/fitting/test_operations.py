"""How many operations of torch a step of a fit takes, noise and all: on an accelerator each is at least one kernel."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_bmrs as bmrs
from pyro_bmrs.fitting.objective import Objective
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.shipped import find_recipe

# name, arguments of its network, and what a step took without noise and may take more with it
NETWORKS = {"lenet5": ({}, 44, 30), "mlp": ({"widths": (100,) * 7, "select_inputs": False}, 61, 40)}


class Operations(TorchDispatchMode):
    """Counts operations that compute something. A custom operator counts as one: what it calls is not seen."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        views = any(result.alias_info is not None for result in function._schema.returns) and not any(
            given.alias_info is not None and given.alias_info.is_write for given in function._schema.arguments
        )
        self.count += not views
        return found


def operations(loss, modules):
    """Of a step: loss, gradient, optimiser, and looking at the loss."""
    optimizer = torch.optim.Adam([p for module in modules for p in module.parameters()], fused=True)
    for _ in range(2):
        with Operations() as seen:
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert value.isfinite()
    return seen.count


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_with_noise_takes_few_operations_more(name):
    options, without, more = NETWORKS[name]
    x, y = torch.randn(128, 1, 32, 32), torch.randint(10, (128,))
    noisy = Recipe.read(find_recipe(name)).network(
        SimpleNamespace(input_shape=x.shape[1:], num_outputs=10), options, 0
    )
    plain = bmrs.without_noise(copy.deepcopy(noisy))
    assert operations(lambda: cross_entropy(plain(x), y), [plain]) == pytest.approx(without, abs=4)
    model = bmrs.Classifier(noisy)
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, y)
    objective = Objective(model, guide, (x, y), dataset_size=1000, draws=16)
    assert operations(lambda: objective(x, y, 1.0)[0], [model, guide]) <= without + more
