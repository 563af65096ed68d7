"""LeNet-5-Caffe, 20-50-500 with 431,080 parameters: the network of published studies of Bayesian compression."""

from torch import nn

from pyro_bmrs import InputSelection, MultiplicativeNoise

# One entry per data set; "default" is for all others. Options of the command line override it.
SETTINGS = {
    "default": {
        "image_size": 28,
        "epochs": 40,
        "batch_size": 32,
        "learning_rate": 1.4e-3,
        "posterior_learning_rate": 1e-2,
        "fine_tune": 20,
    },
    "mnist": {
        "image_size": 28,
        "epochs": 24,
        "batch_size": 128,
        "learning_rate": 1.4e-3,
        "posterior_learning_rate": 5e-3,
        "fine_tune": 12,
    },
}


def network(
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: tuple[int, int, int] = (20, 50, 500),
    select_positions: bool = False,
) -> nn.Sequential:
    """Two max-pooled 5×5 convolutions without activation, as in Caffe's file, and a hidden layer with ReLU.

    With `select_positions` every position of a flattened filter is a structure too.
    """
    if len(input_shape) != 3 or input_shape[1] != input_shape[2] or input_shape[1] < 16:
        raise ValueError(f"LeNet-5-Caffe takes square images of at least 16 pixels: got {input_shape}")
    channels, height, _ = input_shape
    first, second, third = widths
    side = ((height - 4) // 2 - 4) // 2
    layers = nn.Sequential()
    layers.add_module("conv1", nn.Conv2d(channels, first, 5))
    layers.add_module("pool1", nn.MaxPool2d(2))
    layers.add_module("filters1", MultiplicativeNoise(first))
    layers.add_module("conv2", nn.Conv2d(first, second, 5))
    layers.add_module("pool2", nn.MaxPool2d(2))
    layers.add_module("filters2", MultiplicativeNoise(second))
    layers.add_module("flatten", nn.Flatten())
    flattened = second * side * side
    if select_positions:
        layers.add_module("selection", InputSelection(flattened))
        layers.add_module("positions", MultiplicativeNoise(flattened))
    layers.add_module("linear1", nn.Linear(flattened, third))
    layers.add_module("relu1", nn.ReLU())
    layers.add_module("units1", MultiplicativeNoise(third))
    layers.add_module("output", nn.Linear(third, num_classes))
    return layers
