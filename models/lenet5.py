"""LeNet5 with ReLU and max pooling, and one latent θ per filter and hidden unit (the paper's LeNet5)."""

from torch import nn

from pyro_bmrs import InputSelection, MultiplicativeNoise

# One entry per data set; "default" is for all others. Options of the command line override it.
# Widths, batch sizes and learning rates: Wright et al. (2024), section 4 and appendix.
SETTINGS = {
    "default": {
        "image_size": 32,
        "epochs": 40,
        "batch_size": 32,
        "learning_rate": 1.4e-3,
        "posterior_learning_rate": 1e-2,
        "fine_tune": 20,
    },
    "mnist": {
        "image_size": 32,
        "epochs": 24,
        "batch_size": 128,
        "learning_rate": 1.4e-3,
        "posterior_learning_rate": 5e-3,
        "fine_tune": 12,
    },
    "fashion-mnist": {
        "image_size": 32,
        "epochs": 24,
        "batch_size": 32,
        "learning_rate": 1.4e-3,
        "posterior_learning_rate": 5e-3,
        "fine_tune": 12,
    },
    "cifar10": {
        "image_size": 32,
        "network": {"widths": (18, 48, 360, 252)},
        "epochs": 20,
        "batch_size": 64,
        "learning_rate": 1.0e-3,
        "posterior_learning_rate": 5e-3,
        "fine_tune": 10,
    },
}


class LeNet5(nn.Module):
    """Two convolutions of 5×5, each max-pooled, and three linear layers.

    Noise stands where the next layer reads: after the pooling, which commutes with a positive θ. With
    `select_positions` every position of a flattened filter is a structure too.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        num_classes: int,
        widths: tuple[int, int, int, int],
        select_positions: bool,
    ) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.features = nn.Sequential()
        self.features.add_module("conv1", nn.Conv2d(channels, first, 5))
        self.features.add_module("relu1", nn.ReLU())
        self.features.add_module("pool1", nn.MaxPool2d(2))
        self.features.add_module("filters1", MultiplicativeNoise(first))
        self.features.add_module("conv2", nn.Conv2d(first, second, 5))
        self.features.add_module("relu2", nn.ReLU())
        self.features.add_module("pool2", nn.MaxPool2d(2))
        self.features.add_module("filters2", MultiplicativeNoise(second))
        side = ((side - 4) // 2 - 4) // 2
        self.classifier = nn.Sequential()
        self.classifier.add_module("flatten", nn.Flatten())
        flattened = second * side * side
        if select_positions:
            self.classifier.add_module("selection", InputSelection(flattened))
            self.classifier.add_module("positions", MultiplicativeNoise(flattened))
        self.classifier.add_module("linear1", nn.Linear(flattened, third))
        self.classifier.add_module("relu3", nn.ReLU())
        self.classifier.add_module("units1", MultiplicativeNoise(third))
        self.classifier.add_module("linear2", nn.Linear(third, fourth))
        self.classifier.add_module("relu4", nn.ReLU())
        self.classifier.add_module("units2", MultiplicativeNoise(fourth))
        self.classifier.add_module("output", nn.Linear(fourth, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x))


def network(
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: tuple[int, int, int, int] = (6, 16, 120, 84),
    select_positions: bool = False,
) -> LeNet5:
    """LeNet5 for square images (channels, side, side) with side ≥ 16."""
    if len(input_shape) != 3 or input_shape[1] != input_shape[2] or input_shape[1] < 16:
        raise ValueError(f"LeNet5 takes square images of at least 16 pixels: got input shape {input_shape}")
    channels, height, _ = input_shape
    return LeNet5(channels, height, num_classes, widths, select_positions)
