"""The recipes of models/: their sizes and settings, and that each can be made smaller."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyro_bmrs.inference.evaluate import evaluate
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.networks.surgery import remove_structures
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings

FOLDER = Path(__file__).parents[2] / "models"
# the others are Pyro programs without a network: test_programs.py
PROGRAMS = {"known_evidence", "linear_regression", "mixture", "sparse_regression"}
RECIPES = {path.stem: Recipe.read(path) for path in sorted(FOLDER.glob("*.py")) if path.stem not in PROGRAMS}
RAW_SHAPES = {
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "default": (1, 8, 8),
    "diabetes": (10,),
}
CASES = [(name, data) for name, recipe in RECIPES.items() for data in recipe.module.SETTINGS]

# Widths, batch sizes and learning rates of the paper, as ../shared/paper.md, section 3, has them.
PAPER = {
    ("mlp", "mnist"): ((100,) * 7, 128, 8.5e-4),
    ("mlp", "fashion-mnist"): ((150,), 128, 1.5e-3),
    ("mlp", "cifar10"): ((150,) * 5, 32, 6.8e-4),
    ("lenet5", "mnist"): ((6, 16, 120, 84), 128, 1.4e-3),
    ("lenet5", "fashion-mnist"): ((6, 16, 120, 84), 32, 1.4e-3),
    ("lenet5", "cifar10"): ((18, 48, 360, 252), 64, 1.0e-3),
}


def built(name, data):
    """(settings, network, model, guide, batch) for random examples of the shape a data set has."""
    recipe = RECIPES[name]
    settings = RunSettings.of(recipe, data, {})
    shape = RAW_SHAPES[data]
    if settings.image_size:
        shape = shape[0], settings.image_size, settings.image_size
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    sized = SimpleNamespace(input_shape=shape, num_outputs=10)
    network = recipe.network(sized, settings.network or {}, seed=1)
    model = recipe.model(network)
    return settings, network, model, recipe.guide(model), (x, torch.arange(8))


def test_the_three_recipes_are_there():
    assert set(RECIPES) >= {"mlp", "lenet5", "lenet5_caffe"}


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_settings_for_any_data_set(name):
    assert "default" in RECIPES[name].module.SETTINGS
    assert RunSettings.of(RECIPES[name], "my.npz", {}).epochs > 0


@pytest.mark.parametrize(("name", "data"), CASES)
def test_a_network_predicts_and_its_sites_are_named_after_its_modules(name, data):
    _, network, model, guide, (x, y) = built(name, data)
    with torch.no_grad():
        values = guide(x, y)
    layers = noise_layers(network)
    assert list(values) == list(layers)
    assert set(layers) <= {path for path, _ in network.named_modules()}
    for site, theta in values.items():
        assert layers[site].features == len(theta)
    assert evaluate(model, (x, y), guide.mean()).loss > 0


@pytest.mark.parametrize(("name", "data"), CASES)
def test_every_layer_of_structures_can_be_removed_from(name, data):
    """A random plan: surgery itself checks that the small network computes what the reduced one does."""
    _, network, _, _, (x, _) = built(name, data)
    groups = structure_groups(network, x)
    assert list(groups) == list(noise_layers(network))
    generator = torch.Generator().manual_seed(2)
    kept, scales = {}, {}
    for site, group in groups.items():
        assert group.producers
        assert group.consumers
        kept[site] = torch.rand(group.features, generator=generator) < 0.4
        kept[site][0] = True
        scales[site] = torch.rand(group.features, generator=generator).double()
    small = remove_structures(network, kept, scales, x).network
    assert not noise_layers(small)
    for site, group in groups.items():
        producer = small.get_submodule(group.producers[0].path)
        rows = producer.features if group.kind == "inputs" else producer.weight.shape[0]
        assert rows == int(kept[site].sum()) * group.channels < group.features * group.channels
    assert parameters(small) < 0.8 * parameters(network)
    assert small(x).shape == (8, 10)


@pytest.mark.parametrize(("name", "data"), PAPER)
def test_settings_are_the_papers(name, data):
    widths, batch_size, learning_rate = PAPER[name, data]
    settings, network, *_ = built(name, data)
    structures = {site: layer.features for site, layer in noise_layers(network).items()}
    structures.pop("inputs", None)  # the MLP's, which the paper's has not
    assert tuple(structures.values()) == widths
    assert (settings.batch_size, settings.learning_rate, settings.image_size) == (
        batch_size,
        learning_rate,
        32,
    )


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("lenet5_caffe", (1, 28, 28), 431_080),
        ("lenet5", (1, 32, 32), 61_706),
        ("mlp", (1, 8, 8), 27_710),
        ("resnet", (3, 32, 32), 272_474),
        ("vit", (3, 32, 32), 311_338),
    ],
)
def test_numbers_of_parameters(name, shape, count):
    assert parameters(RECIPES[name].module.network(shape, 10)) == count


@pytest.mark.parametrize("name", ["lenet5", "lenet5_caffe"])
@pytest.mark.parametrize("shape", [(1, 28, 32), (1, 12, 12), (64,)])
def test_inputs_that_do_not_fit_are_told(name, shape):
    with pytest.raises(ValueError, match="square images of at least 16 pixels"):
        RECIPES[name].module.network(shape, 10)


def test_the_seed_alone_decides_the_initial_weights():
    state = torch.get_rng_state()
    first, second = (built("mlp", "default")[1].state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
