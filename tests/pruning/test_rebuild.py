"""From a plan and a file of weights back to the smaller network, and nothing else from any other file."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, NetworkPlan
from pyro_bmrs.networks.attention import SeparateAttention
from pyro_bmrs.networks.export import save_weights


class Block(nn.Module):
    """As ResNet's: two convolutions, and what came in added to what goes out."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        h = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(h)) + self.shortcut(x))


def residual():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Block(4, 4, 1), Block(4, 6, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def vision_transformer():
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    net = vit.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=12, num_classes=3
    )
    nn.init.normal_(net.heads.head.weight)
    return net


def by_hand():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), MultiplicativeNoise(8), nn.Flatten(), nn.Linear(8 * 16, 6),
        nn.Tanh(), MultiplicativeNoise(6), nn.Linear(6, 3),
    )  # fmt: skip


FAMILIES = {
    "residual": (residual, (1, 8, 8), True),
    "vision_transformer": (vision_transformer, (3, 8, 8), True),
    "by_hand": (by_hand, (1, 6, 6), False),
}


class Problem:
    """A fitted network, its plan, and the files of both."""

    def __init__(self, family, folder):
        self.make, shape, inserted = FAMILIES[family]
        torch.manual_seed(0)
        self.x = torch.randn(6, *shape)
        net = self.make().train()
        if inserted:
            net(self.x)  # statistics of its own
            net = bmrs.insert_noise(net, self.x)
        model = Classifier(net)
        guide = AutoTruncatedLogNormal(model)
        guide(self.x, torch.zeros(6, dtype=torch.long))
        with torch.no_grad():
            for posterior in guide.posteriors:
                posterior.loc.copy_(torch.linspace(-1, 0, posterior.loc.numel()))
        self.net, self.folder = net, folder
        self.plan = bmrs.reduce(model, guide, bmrs.Random(0.5, seed=0))
        widths = self.plan.widths()
        assert (widths.after < widths.before).all()

    def applied(self):
        """The smaller network, and the paths of plan and weights."""
        self.small = self.plan.apply()
        path = self.plan.save(self.folder / "plan.json")
        return self.small, path, save_weights(self.small, self.folder / "small.safetensors")

    def fresh(self):
        torch.manual_seed(99)
        return self.make()


@pytest.fixture(params=list(FAMILIES))
def problem(request, tmp_path):
    return Problem(request.param, tmp_path)


@torch.no_grad()
def outputs(net, x):
    return net.eval()(x)


def test_plan_and_weights_are_all_it_takes(problem):
    small, path, weights = problem.applied()
    fresh = problem.fresh()
    before = copy.deepcopy(fresh.state_dict())
    again = NetworkPlan.load(path).rebuild(fresh, weights)
    assert type(again) is type(fresh)
    assert not again.training
    assert torch.equal(outputs(again, problem.x), outputs(small, problem.x))
    other = torch.randn(3, *problem.x.shape[1:])
    assert torch.equal(outputs(again, other), outputs(small, other))
    # of the same shapes all over, without noise, trainable
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in small.state_dict().items()
    }
    assert repr(again) == repr(small)
    assert not any(isinstance(module, MultiplicativeNoise) for module in again.modules())
    assert all(parameter.requires_grad for parameter in again.parameters())
    # the fresh one is as it was
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_from_the_network_with_noise_too(problem):
    small, path, weights = problem.applied()
    before = copy.deepcopy(problem.net.state_dict())
    for network in (problem.net, copy.deepcopy(problem.net)):
        again = NetworkPlan.load(path).rebuild(network, weights)
        assert torch.equal(outputs(again, problem.x), outputs(small, problem.x))
    assert all(torch.equal(value, before[name]) for name, value in problem.net.state_dict().items())


def test_weights_of_the_network_itself_where_none_are_given(problem):
    _, path, _ = problem.applied()
    plan = NetworkPlan.load(path)
    fresh = problem.fresh()
    bare = plan.rebuild(fresh)
    assert repr(bare) == repr(problem.small.eval())
    # its own with θ = 1 for what is kept: as a plan of that network would have it
    plan.table["mean"] = 1.0
    noisy = fresh
    if problem.make is not by_hand:
        noisy = bmrs.insert_noise(fresh, problem.x)
    wanted = plan.apply(noisy, problem.x)
    torch.testing.assert_close(outputs(bare, problem.x), outputs(wanted, problem.x))


def test_heads_are_gone_in_the_rebuilt_network(tmp_path):
    problem = Problem("vision_transformer", tmp_path)
    _, path, weights = problem.applied()
    again = NetworkPlan.load(path).rebuild(problem.fresh(), weights)
    heads = [module.num_heads for module in again.modules() if isinstance(module, SeparateAttention)]
    assert heads == [len(rows) for site, rows in problem.plan.kept.items() if "attention" in site]


def test_attention_that_keeps_all_heads_is_torchs_own_again(tmp_path):
    problem = Problem("vision_transformer", tmp_path)
    sites = [site for site in problem.plan.layers if "attention" in site]
    problem.plan.table.loc[problem.plan.table.layer == sites[0], "removed"] = False
    small, path, weights = problem.applied()
    again = NetworkPlan.load(path).rebuild(problem.fresh(), weights)
    for net in (small, again):
        assert type(net.get_submodule(sites[0])) is nn.MultiheadAttention
        assert isinstance(net.get_submodule(sites[1]), SeparateAttention)
    assert torch.equal(outputs(again, problem.x), outputs(small, problem.x))


def test_a_plan_need_not_be_applied_to_say_what_it_cuts(problem):
    loaded = NetworkPlan.load(problem.plan.save(problem.folder / "plan.json"))
    assert loaded.cuts == problem.plan.cuts
    # a plan at another threshold is another plan, and one from disk has no network to say what it cuts
    assert problem.plan.at(-math.inf).cuts != problem.plan.cuts
    with pytest.raises(ValueError, match="plan must say what to cut"):
        loaded.at(0.1).rebuild(problem.fresh())
    assert problem.plan.rebuild(problem.fresh())


def test_foreign_and_damaged_weights_are_refused(problem):
    _, path, weights = problem.applied()
    plan = NetworkPlan.load(path)
    whole = weights.read_bytes()
    full = save_weights(problem.fresh(), problem.folder / "full.safetensors")
    other = save_weights(nn.Linear(2, 2), problem.folder / "other.safetensors")
    damaged = problem.folder / "damaged.safetensors"
    contents = [whole[:-20], whole[:100], whole[:7], b"", b"no safetensors at all", b"\x80\x04" + whole]
    for wrong in [full, other, problem.folder / "plan.numbers.safetensors"]:
        with pytest.raises(ValueError, match=rf"weights .*{wrong.name} are damaged, or not of this plan"):
            plan.rebuild(problem.fresh(), wrong)
    for content in contents:
        damaged.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"weights .*damaged\.safetensors are damaged, or not of this plan"
        ):
            plan.rebuild(problem.fresh(), damaged)
    assert plan.rebuild(problem.fresh(), weights)


def test_a_plan_of_another_network_names_the_module(problem):
    _, path, weights = problem.applied()
    plan = NetworkPlan.load(path)
    first = next(iter(plan.cuts.tensors))
    for stranger in (nn.Linear(4, 4), nn.Sequential(nn.Identity(), nn.Linear(3, 3)), nn.ReLU()):
        before = copy.deepcopy(stranger.state_dict())
        with pytest.raises(ValueError, match=f"cuts must fit the network: '{first}'"):
            plan.rebuild(stranger, weights)
        assert all(torch.equal(value, before[name]) for name, value in stranger.state_dict().items())


def test_a_narrower_network_of_the_same_class_is_refused(tmp_path):
    problem = Problem("by_hand", tmp_path)
    _, path, weights = problem.applied()
    narrow = problem.fresh()
    narrow[5], narrow[8] = nn.Linear(8 * 16, 2), nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"'5\.weight' has entries 0 to 1 in dimension 0, and increasing numbers"
    ):
        NetworkPlan.load(path).rebuild(narrow, weights)


def hostile(cuts):
    """Documents of cuts that no plan of ours has, from one that is right."""
    name, dims = next(iter(cuts["tensors"].items()))
    path, (dim, rows) = name.rpartition(".")[0], next(iter(dims.items()))

    def with_dims(value):
        return {**cuts, "tensors": {**cuts["tensors"], name: value}}

    def with_rows(value):
        return with_dims({**dims, dim: value})

    def with_tensor(name):
        return {**cuts, "tensors": {**cuts["tensors"], name: {"0": [0]}}}

    yield "far", with_rows([*rows[:-1], 10**6])
    yield "huge", with_rows([*rows[:-1], 10**30])
    yield "negative", with_rows([-1, *rows])
    yield "repeated", with_rows([rows[0], *rows])
    yield "backwards", with_rows([1, 0])
    yield "none left", with_rows([])
    yield "strings", with_rows([str(row) for row in rows])
    yield "numbers with a point", with_rows([float(row) for row in rows])
    yield "truths", with_rows([True])
    yield "nothing", with_rows([None])
    yield "nested", with_rows([rows])
    yield "deeper", with_rows([[[[rows]]]])
    yield "a string", with_rows("01")
    yield "a number", with_rows(3)
    yield "a dictionary", with_rows({"0": 1})
    yield "no dimensions", with_dims(rows)
    yield "another dimension", with_dims({"7": rows})
    yield "a word for a dimension", with_dims({"rows": rows})
    yield "a negative dimension", with_dims({"-1": rows})
    yield "no module", with_tensor("nowhere.at.all")
    yield "dunder", with_tensor("__init__")
    yield "the whole", with_tensor("")
    yield "no tensor", with_tensor(f"{path}.in_channels")
    yield "no selection", {**cuts, "widths": {path: [0]}}
    yield "method", {**cuts, "numbers": {path: {"forward": 0}}}
    yield "class", {**cuts, "numbers": {path: {"__class__": 0}}}
    yield "table of tensors", {**cuts, "numbers": {path: {"_parameters": 1}}}
    yield "string for a number", {**cuts, "numbers": {path: {"groups": "1"}}}
    yield "truth for a number", {**cuts, "numbers": {path: {"groups": True}}}
    yield "none of a number", {**cuts, "numbers": {path: {"groups": 0}}}
    yield "a larger number", {**cuts, "numbers": {path: {"groups": 2}}}
    yield "a truth as a number", {**cuts, "numbers": {path: {"training": 1}}}
    yield "list of numbers", {**cuts, "numbers": {path: [1]}}
    yield "numbers of nowhere", {**cuts, "numbers": {"nowhere": {"in_channels": 1}}}
    yield "more", {**cuts, "code": "import os"}
    yield "less", {"tensors": cuts["tensors"]}
    yield "as it once was", {"rows": {path: rows}, "columns": {}, "attributes": {}}
    yield "list", [cuts]
    yield "text", "tensors"
    yield "one", 1


@pytest.mark.parametrize("family", ["residual", "by_hand"])
def test_hostile_plans_are_refused(family, tmp_path):
    problem = Problem(family, tmp_path)
    _, path, weights = problem.applied()
    document = json.loads(path.read_text())
    for name, cuts in hostile(document["cuts"]):
        path.write_text(json.dumps({**document, "cuts": cuts}))
        fresh = problem.fresh()
        before, printed = copy.deepcopy(fresh.state_dict()), repr(fresh)
        with pytest.raises(ValueError, match="cuts"):
            NetworkPlan.load(path).rebuild(fresh, weights)
        assert repr(fresh) == printed, name
        assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items()), name
    path.write_text(json.dumps(document))
    assert torch.equal(
        outputs(NetworkPlan.load(path).rebuild(problem.fresh(), weights), problem.x),
        outputs(problem.small, problem.x),
    )
