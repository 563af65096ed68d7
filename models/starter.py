"""A recipe to start from: two convolutions and a hidden layer, for images of any size.

A recipe is a Python file that defines `network` and `SETTINGS`. `network` is a function that makes the network, with a
noise layer wherever structures may be removed. The file may also define `model(network)`, the Pyro model around it
(default: a classifier), and `guide(model)`.
"""

from torch import nn

from pyro_bmrs import MultiplicativeNoise

# By data set, as `--data` names it; "default" is for all others. Options of the command line override it.
SETTINGS = {
    "default": {
        # Images are scaled or padded to this number of pixels a side; None leaves them unchanged.
        "image_size": None,
        # Arguments of `network` below, by name.
        "network": {"widths": (16, 32, 64)},
        # Epochs of the fit, and of fine-tuning the small network.
        "epochs": 30,
        "fine_tune": 15,
        "batch_size": 32,
        # Adam's learning rates of the weights and of the posterior. If the second is too high, structures die at once.
        "learning_rate": 1e-3,
        "posterior_learning_rate": 1e-2,
    },
}


def network(
    input_shape: tuple[int, ...], num_classes: int, widths: tuple[int, int, int] = (16, 32, 64)
) -> nn.Sequential:
    """The network for images (channels, height, width) of at least 4 pixels a side.

    Args:
        input_shape: shape of one example of the data set.
        num_classes: number of logits to return.
        widths: filters of the two convolutions and hidden units, before anything is removed.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise ValueError(
            f"this network takes images of at least 4 pixels a side: got input shape {input_shape}"
        )
    channels, height, width = input_shape
    first, second, third = widths
    # A noise layer stands where the next layer reads its structures: after activation and pooling.
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        MultiplicativeNoise(first),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        MultiplicativeNoise(second),
        nn.Flatten(),
        nn.Linear(second * (height // 4) * (width // 4), third),
        nn.ReLU(),
        MultiplicativeNoise(third),
        nn.Linear(third, num_classes),
    )
