"""How many examples a batch has, and some of them. Where examples need each other the whole batch is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import multiply_accumulates
from pyro_bmrs.networks.examples import at_most, exactly
from pyro_bmrs.networks.inputs import batch_size, first_examples, repeated, tensors_of

NODES = 40  # more than a check takes


class Network(nn.Module):
    """Two layers, with noise by hand or without."""

    def __init__(self, noise):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)
        self.noise = bmrs.MultiplicativeNoise(8) if noise else nn.Identity()

    def hidden(self, x):
        return self.noise(torch.relu(self.first(x)))


class Adjacency(Network):
    def forward(self, x, adjacency):
        return adjacency @ self.second(adjacency @ self.hidden(x))


class Edges(Network):
    def forward(self, x, edge_index):
        hidden = self.hidden(x)
        return self.second(hidden.index_add(0, edge_index[1], hidden[edge_index[0]]))


class Buffer(Network):
    def __init__(self, noise):
        super().__init__(noise)
        self.register_buffer("adjacency", torch.rand(NODES, NODES))

    def forward(self, x):
        return self.second(self.adjacency @ self.hidden(x))


class Dictionary(Network):
    def forward(self, graph):
        return self.second(graph["adjacency"] @ self.hidden(graph["x"]))


class Siamese(Network):
    """Its examples do not need each other: both inputs are cut."""

    def forward(self, left, right):
        pairs = self.first(torch.cat([left, right])).relu()
        return self.second(self.noise(pairs.unflatten(0, (2, len(left))).prod(0)))


def x():
    return torch.randn(NODES, 5)


def adjacency():
    return torch.rand(NODES, NODES)


def one_graph(inputs, y):
    return torch.utils.data.DataLoader([(inputs, y)], batch_size=None, collate_fn=lambda batch: batch)


FAMILIES = {
    "adjacency": (Adjacency, lambda: (x(), adjacency())),
    "sparse adjacency": (Adjacency, lambda: (x(), adjacency().relu().to_sparse())),
    "edges": (Edges, lambda: (x(), torch.randint(NODES, (2, 90)))),
    "as many edges as nodes": (Edges, lambda: (x(), torch.randint(NODES, (2, NODES)))),
    "buffer of the batch": (Buffer, x),
    "dictionary": (Dictionary, lambda: {"x": x(), "adjacency": adjacency()}),
    "siamese": (Siamese, lambda: (x(), x())),
}


@pytest.mark.parametrize("noise", ["by hand", "inserted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_goes_from_fit_to_the_small_network(family, noise):
    torch.manual_seed(0)
    kind, make = FAMILIES[family]
    inputs, y = make(), torch.randint(2, (NODES,))
    net = kind(noise == "by hand")
    model = bmrs.Classifier(net if noise == "by hand" else bmrs.insert_noise(net, inputs))
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, one_graph(inputs, y), epochs=1, draws_per_batch=1)
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5))
    small = plan.apply()
    assert small.first.out_features == 4
    costs = plan.costs(small, seconds=0.1)
    assert costs.after["multiply_accumulates"] < costs.before["multiply_accumulates"]
    plan.shrink(model, guide)
    assert model.net.first.out_features == 4


def test_a_batch_is_cut_and_repeated_where_the_network_allows_it():
    both = (x(), x())
    assert batch_size(at_most(Siamese(False), both, 3)) == 3
    assert batch_size(exactly(Siamese(False), both, NODES + 1)) == NODES + 1
    graph = (x(), adjacency())
    assert at_most(Adjacency(False), graph, 3) is graph
    assert exactly(Adjacency(False), graph, NODES + 1) is graph


def test_several_draws_are_refused_where_examples_need_each_other():
    inputs = (x(), adjacency())
    model = bmrs.Classifier(bmrs.insert_noise(Adjacency(False), inputs))
    guide = bmrs.AutoTruncatedLogNormal(model)
    with pytest.raises(ValueError, match="draws_per_batch must be 1"):
        bmrs.fit(model, guide, one_graph(inputs, torch.randint(2, (NODES,))), epochs=1, draws_per_batch=4)


def test_a_graph_costs_the_share_of_a_node():
    graph = (x(), adjacency())
    # both products with the adjacency, and both layers
    assert multiply_accumulates(Adjacency(False), graph) == NODES * 8 + NODES * 2 + 5 * 8 + 8 * 2


class Detection(nn.Module):
    """Takes a list of images of several sizes, as torchvision's detection networks do, and gives a dictionary."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.boxes = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, images, targets=None):
        assert isinstance(images, list)
        assert all(image.dim() == 3 and len(image) == 3 for image in images), [
            image.shape for image in images
        ]
        filled = [F.pad(image, (0, 9 - image.shape[2], 0, 10 - image.shape[1])) for image in images]
        features = self.second(self.first(torch.stack(filled)).relu()).relu()
        return {"boxes": self.boxes(features.amax((2, 3)))}


def pictures(count, channels=3):
    return [torch.randn(channels, 8 + number % 3, 9) for number in range(count)]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_list_of_images_has_an_example_an_image(count, channels):
    images = pictures(count, channels)
    targets = [{"boxes": torch.rand(count, 4), "labels": torch.ones(3)} for _ in images]
    for batch in (images, (images, targets), {"images": images, "sizes": torch.rand(count, 2)}):
        assert batch_size(batch) == count
        for found, numbers in (
            (first_examples(batch, 2), [*range(min(count, 2))]),
            (repeated(batch, 7), [number % count for number in range(7)]),
        ):
            assert batch_size(found) == len(numbers)
            chosen = (
                found["images"] if isinstance(found, dict) else found[0] if batch is not images else found
            )
            assert all(image is images[number] for image, number in zip(chosen, numbers, strict=True))
            if isinstance(found, dict):
                assert torch.equal(found["sizes"], batch["sizes"][numbers])
            elif batch is not images:
                assert [len(target["boxes"]) for target in found[1]] == [count] * len(numbers)


def test_a_list_of_other_tensors_holds_several_inputs():
    both = [torch.randn(6, 5), torch.randn(6, 7, 2)]
    assert batch_size(both) == 6
    assert [len(tensor) for tensor in first_examples(both, 2)] == [2, 2]
    sequences = [torch.randn(6, 5, 2), torch.randn(6, 7, 2)]
    assert batch_size(sequences) == 6
    assert [len(tensor) for tensor in repeated((sequences, torch.ones(6)), 8)[0]] == [8, 8]


@pytest.mark.parametrize("form", ["list", "with targets", "keywords"])
def test_a_network_of_lists_of_images_loses_filters(form):
    torch.manual_seed(0)
    network, images = Detection(), pictures(5)
    example = {
        "list": images,
        "with targets": (images, [{"label": torch.ones(3)}] * 5),
        "keywords": {"images": images},
    }
    assert batch_size(at_most(network, example[form], 2)) == 2
    assert batch_size(exactly(network, example[form], 8)) == 8
    noisy = bmrs.insert_noise(network, example[form])
    model = bmrs.Classifier(noisy, lambda output: output["boxes"])
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(example[form], torch.zeros(5, dtype=torch.long))
    small = bmrs.reduce(model, guide, bmrs.Random(0.5)).apply()
    assert small.first.out_channels + small.second.out_channels == 7
    assert [tensor.shape for tensor in tensors_of(small(images))] == [(5, 4)]


def test_images_of_a_list_are_counted_one_by_one():
    macs = 8 * 7 * 8 * 3 * 9 + 6 * 5 * 6 * 8 * 9 + 4 * 6
    assert multiply_accumulates(Detection(), pictures(5)) == macs
    assert multiply_accumulates(Detection(), {"images": pictures(2)}) == macs


class Experts(nn.Module):
    """Each example goes to the expert that its first input names."""

    def __init__(self, pass_over):
        super().__init__()
        self.pass_over, self.first, self.last = pass_over, nn.Linear(6, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8)) for _ in range(3)
        )

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        total = hidden
        for number, expert in enumerate(self.experts):
            mine = (x[:, 0] == number).nonzero().flatten()
            if len(mine) or not self.pass_over:
                total = total.index_add(0, mine, expert(hidden[mine]))
        return self.last(total)


def of_experts(numbers):
    x = torch.randn(len(numbers), 6)
    x[:, 0] = torch.tensor(numbers, dtype=torch.float32)
    return x


@pytest.mark.parametrize("pass_over", [False, True])
def test_as_many_examples_are_looked_at_as_reach_every_expert(pass_over):
    torch.manual_seed(0)
    net, x = Experts(pass_over), of_experts([0, 0, 0, 1, 1, 2])
    found = bmrs.structures(net, x)
    assert [group.site for group in found] == ["first", *(f"experts.{number}.0" for number in range(3))]
    assert all(reason.path == "last" for reason in found.refused)
    # and as few: 4 of them reach what all reach
    sizes = []
    watched = Experts(pass_over)
    watched.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert len(bmrs.structures(watched, of_experts([0, 1, 0, 2] * 50))) == 4
    assert sizes.count(200) <= 2
    assert 4 in sizes
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    bmrs.fit(model, guide, (x, torch.randint(2, (6,))), epochs=1, draws_per_batch=1)
    small = bmrs.reduce(model, guide, bmrs.Random(0.5)).apply()
    assert small.experts[2][0].in_features == small.first.out_features < 8
    for number in range(3):
        assert small(of_experts([number])).isfinite().all()


@pytest.mark.parametrize("pass_over", [False, True])
def test_an_expert_that_no_example_reaches_stays(pass_over):
    torch.manual_seed(0)
    found = bmrs.structures(Experts(pass_over), of_experts([0, 0, 1, 1]))
    assert {group.site for group in found} >= {"experts.0.0", "experts.1.0"}
    assert "experts.2.0" in {reason.path for reason in found.refused}
