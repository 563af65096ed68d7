"""A multilayer perceptron with tanh and one latent θ per hidden unit (the paper's MLP)."""

import math

from torch import nn

from pyro_bmrs import InputSelection, MultiplicativeNoise

# One entry per data set; "default" is for all others. Options of the command line override it.
# Widths, batch sizes and learning rates: Wright et al. (2024), section 4 and appendix.
SETTINGS = {
    "default": {
        "image_size": None,
        "network": {"widths": (100,) * 3},
        "epochs": 40,
        "batch_size": 32,
        "learning_rate": 8.5e-4,
        "posterior_learning_rate": 1e-2,
        "fine_tune": 20,
    },
    "mnist": {
        "image_size": 32,
        "network": {"widths": (100,) * 7},
        "epochs": 24,
        "batch_size": 128,
        "learning_rate": 8.5e-4,
        "posterior_learning_rate": 5e-3,
        "fine_tune": 12,
    },
    "fashion-mnist": {
        "image_size": 32,
        "network": {"widths": (150,)},
        "epochs": 24,
        "batch_size": 128,
        "learning_rate": 1.5e-3,
        "posterior_learning_rate": 5e-3,
        "fine_tune": 12,
    },
    "diabetes": {
        "network": {"widths": (50, 50)},
        "epochs": 200,
        "batch_size": 32,
    },
    "cifar10": {
        "image_size": 32,
        "network": {"widths": (150,) * 5},
        "epochs": 20,
        "batch_size": 32,
        "learning_rate": 6.8e-4,
        "posterior_learning_rate": 5e-3,
        "fine_tune": 10,
    },
}


def network(
    input_shape: tuple[int, ...],
    num_outputs: int,
    widths: tuple[int, ...] = (100,) * 3,
    select_inputs: bool = True,
) -> nn.Sequential:
    """Hidden layers of the given widths. Noise stands after each tanh, where the next layer reads.

    With `select_inputs` every pixel or feature is a structure too: the first layer has most of the parameters.
    """
    layers = nn.Sequential()
    layers.add_module("flatten", nn.Flatten())
    inputs = math.prod(input_shape)
    if select_inputs:
        layers.add_module("selection", InputSelection(inputs))
        layers.add_module("inputs", MultiplicativeNoise(inputs))
    for number, width in enumerate(widths, start=1):
        layers.add_module(f"linear{number}", nn.Linear(inputs, width))
        layers.add_module(f"tanh{number}", nn.Tanh())
        layers.add_module(f"units{number}", MultiplicativeNoise(width))
        inputs = width
    layers.add_module("output", nn.Linear(inputs, num_outputs))
    return layers
