"""Data sets as tensors in memory: read, split, sized and standardised, ready for a model.

>>> from pyro_bmrs.data import load_data
>>> digits = load_data("digits")
>>> digits.input_shape, digits.num_outputs
((1, 8, 8), 10)
>>> images, labels = digits.train[:64]
>>> images.shape, labels.shape
(torch.Size([64, 1, 8, 8]), torch.Size([64]))
"""

from pyro_bmrs.data.arrays import DataError, read_inputs
from pyro_bmrs.data.dataset import Dataset, load_data
from pyro_bmrs.data.preparation import Preparation

__all__ = ["DataError", "Dataset", "Preparation", "load_data", "read_inputs"]
