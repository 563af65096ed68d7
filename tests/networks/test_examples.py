"""Networks whose examples need each other: a batch can't be cut, so the whole one is taken."""

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import multiply_accumulates
from pyro_bmrs.networks.examples import at_most, exactly
from pyro_bmrs.networks.inputs import batch_size

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
