"""Data sets made by hand, and how loading one is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_bmrs.data import DataError, load_data


def parts(dataset):
    return (dataset.train, dataset.validation, dataset.test)


def no_statistics(_):
    """In the place of `_channel_statistics`: nothing is standardised."""
    return torch.tensor(0.0), torch.tensor(1.0)


def arrays(inputs=None, labels=None, *, test_inputs=None, test_labels=None):
    """The four arrays of a valid .npz, 20 and 6 vectors of 5 features, with replacements."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(20, 5)) if inputs is None else inputs
    labels = np.arange(len(inputs)) % 2 if labels is None else labels
    test_inputs = inputs[:6] if test_inputs is None else test_inputs
    test_labels = np.arange(len(test_inputs)) % 2 if test_labels is None else test_labels
    return {"x_train": inputs, "y_train": labels, "x_test": test_inputs, "y_test": test_labels}


def bytes_of(*shape):
    return np.random.default_rng(1).integers(0, 256, size=shape, dtype=np.uint8)


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def refused(call, *fragments):
    """The call raises a DataError on one line that holds every fragment."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def not_loaded(*fragments, **call):
    return refused(lambda: load_data(**call), *fragments)


def prepared_equals_loaded(dataset, raw_train, raw_test):
    """prepare() of the raw arrays is bit for bit what load_data made of them."""
    before = raw_train.copy()
    prepared = dataset.prepare(raw_train)
    assert np.array_equal(raw_train, before)
    assert prepared.dtype == torch.float32
    assert prepared.is_contiguous()
    loaded = torch.cat([dataset.train.tensors[0], dataset.validation.tensors[0]])
    one, other = (sorted(row.numpy().tobytes() for row in rows) for rows in (prepared, loaded))
    assert one == other
    assert torch.equal(dataset.prepare(raw_test), dataset.test.tensors[0])
