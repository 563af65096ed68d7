"""Smaller in the middle of a fit: what is left goes on exactly as if what is gone had only been zero."""

import copy
import importlib
import re
from dataclasses import replace

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise, NetworkPlan
from pyro_bmrs.networks.hooked_noise import hooked_noise, network_of
from pyro_bmrs.networks.noise import fixed_scales, noise_layers
from pyro_bmrs.networks.surgery import EqualityError
from pyro_bmrs.pruning import NonFiniteScoreError
from pyro_bmrs.pruning.shrink import original_network


class Residual(nn.Module):
    """A stream of four filters that a block of six reads and adds to."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.first, self.first_norm = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        h = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(x + self.second_norm(self.second(h)))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


class Transformer(nn.Module):
    """Four heads of two channels, and hidden units."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.hidden, self.out, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.out(nn.functional.gelu(self.hidden(self.norm(x))))).mean(1))


def by_hand():
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), MultiplicativeNoise(8), nn.Linear(8, 6), nn.PReLU(6),
        MultiplicativeNoise(6), nn.Linear(6, 3),
    )  # fmt: skip


# Written down by hand for each network: which dimensions of which tensors count the structures of which site,
# and how many entries each structure has there.
def _norm(name, site):
    return {f"{name}.{part}": [(0, site, 1)] for part in ("weight", "bias", "running_mean", "running_var")}


FAMILIES = {
    "residual": (
        lambda: bmrs.insert_noise(Residual(), torch.randn(2, 1, 6, 6)),
        (1, 6, 6),
        {
            "stem.weight": [(0, "stem", 1)], "stem.bias": [(0, "stem", 1)], **_norm("stem_norm", "stem"),
            "first.weight": [(0, "first", 1), (1, "stem", 1)], **_norm("first_norm", "first"),
            "second.weight": [(0, "stem", 1), (1, "first", 1)], "second.bias": [(0, "stem", 1)],
            **_norm("second_norm", "stem"), "head.weight": [(1, "stem", 4)],
        },
        {"stem": 4, "first": 6},
    ),
    "transformer": (
        lambda: bmrs.insert_noise(Transformer(), torch.randn(2, 5, 3)),
        (5, 3),
        {
            **{
                f"attention.{name}.{part}": [(0, "attention", 2)]
                for name in ("query", "key", "value") for part in ("weight", "bias")
            },
            "attention.out_proj.weight": [(1, "attention", 2)], "hidden.weight": [(0, "hidden", 1)],
            "hidden.bias": [(0, "hidden", 1)], "out.weight": [(1, "hidden", 1)],
        },
        {"attention": 4, "hidden": 6},
    ),
    "by_hand": (
        by_hand,
        (5,),
        {
            "0.weight": [(0, "3", 1)], "0.bias": [(0, "3", 1)], **_norm("1", "3"),
            "4.weight": [(0, "6", 1), (1, "3", 1)], "4.bias": [(0, "6", 1)], "5.weight": [(0, "6", 1)],
            "7.weight": [(1, "6", 1)],
        },
        {"3": 8, "6": 6},
    ),
}  # fmt: skip

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
}


class Fitted:
    """A model in the middle of a fit, the same at every call; in float64."""

    def __init__(self, family, optimizer="adam", seed=0, steps=3):
        make, shape, self.owners, self.sizes = FAMILIES[family]
        torch.manual_seed(seed)
        self.net = make().double()
        self.model = Classifier(self.net, dataset_size=100)
        self.guide = AutoTruncatedLogNormal(self.model)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, *shape, dtype=torch.float64, generator=generator)
        self.y = torch.randint(3, (16,), generator=generator)
        with pyro.get_param_store().scope():
            self.guide(self.x, self.y)
        assert {site: layer.features for site, layer in noise_layers(self.net).items()} == self.sizes
        self.optimizer = OPTIMIZERS[optimizer]([*self.model.parameters(), *self.guide.parameters()])
        for _ in range(steps):
            self.step()
        with torch.no_grad():  # posteriors that differ
            for posterior in self.guide.posteriors:
                posterior.loc.copy_(torch.linspace(-1, 0, posterior.loc.numel()).double())

    def step(self, scales=None):
        """One step of the optimizer on the ELBO; θ drawn, or fixed at `scales`."""
        self.model.train()
        with pyro.get_param_store().scope(), fixed_scales(self.model, scales or {}):
            loss = TraceMeanField_ELBO().differentiable_loss(self.model, self.guide, self.x, self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def reduce(self, criterion=None, **options):
        return bmrs.reduce(self.model, self.guide, criterion or bmrs.Random(0.5, seed=0), **options)

    def named(self):
        """All tensors of network and guide, by name; those of the guide under their site."""
        named = self.net.state_dict(keep_vars=True)
        for site in self.guide.sites:
            posterior = self.guide.site_posterior(site)
            for name, tensor in [*posterior.named_parameters(), *posterior.named_buffers()]:
                named[f"guide {site} {name}"] = tensor
        return named

    def snapshot(self):
        """Everything that shrinking changes, bit for bit."""
        return (
            {name: tensor.detach().clone() for name, tensor in self.named().items()},
            {
                index: {name: copy.deepcopy(value) for name, value in self.optimizer.state[parameter].items()}
                for index, parameter in enumerate(self.optimizer.param_groups[0]["params"])
            },
            [id(parameter) for parameter in self.optimizer.param_groups[0]["params"]],
            [None if p.grad is None else p.grad.clone() for p in self.model.parameters()],
            repr(self.net),
        )

    def selected(self, name, tensor, kept):
        """What is left of a tensor of that name: by the table above, not by the library."""
        if " removed_" in name:
            return None
        if name.startswith("guide "):
            return tensor[..., kept[name.split()[1]]]
        if name.endswith((".kept", ".units")):
            return None
        for dim, site, block in self.owners.get(name, ()):
            mask = kept[site].repeat_interleave(block)
            assert tensor.shape[dim] == len(mask), name
            tensor = tensor.index_select(dim, torch.nonzero(mask).flatten())
        return tensor


def masks(plan):
    return {layer: plan.kept_mask(layer) for layer in plan.layers}


def same(one, other):
    """Whether two nests of tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_exactly_the_entries_of_what_is_kept_are_left(family, optimizer):
    fit = Fitted(family, optimizer)
    plan = fit.reduce()
    kept = masks(plan)
    assert all(0 < mask.sum() < len(mask) for mask in kept.values())
    before, parameters = fit.named(), dict(fit.net.named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in before.items()}
    state = {
        name: copy.deepcopy(fit.optimizer.state[p]) for name, p in fit.named().items() if p.requires_grad
    }
    plan.shrink(fit.model, fit.guide, fit.optimizer)
    smaller = 0
    for name, tensor in fit.named().items():
        wanted = fit.selected(name, before[name], kept)
        if wanted is not None:
            assert torch.equal(tensor, wanted), name
        if not tensor.requires_grad:
            continue
        assert fit.optimizer.state[tensor].keys() == state[name].keys()
        for key, value in fit.optimizer.state[tensor].items():
            entry = state[name][key]
            wanted = fit.selected(name, entry, kept) if entry.dim() else entry
            assert torch.equal(value, wanted), (name, key)
        smaller += tensor.numel() < before[name].numel()
    expected = {*fit.owners} & {*parameters} | {f"guide {s} {p}" for s in kept for p in ("loc", "log_scale")}
    assert smaller == len(expected)
    # the same objects, in network and optimizer
    assert all(parameter is parameters[name] for name, parameter in fit.net.named_parameters())
    own = [*fit.model.parameters(), *fit.guide.parameters()]
    assert all(a is b for a, b in zip(fit.optimizer.param_groups[0]["params"], own, strict=True))
    for site, layer in noise_layers(fit.net).items():
        assert layer.features == int(kept[site].sum())
        assert layer.kept.all()
        assert layer.units.tolist() == plan.kept[site]


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_steps_are_those_of_the_reduced_model(family, optimizer):
    """With θ = 0 for what is removed, as a fit leaves it, the reduced model takes the same steps."""
    reduced, small = Fitted(family, optimizer), Fitted(family, optimizer)
    assert same(reduced.snapshot()[:2], small.snapshot()[:2])
    plan = small.reduce()
    kept = masks(plan)
    plan.shrink(small.model, small.guide, small.optimizer)
    for site, layer in noise_layers(reduced.net).items():
        layer.kept.copy_(kept[site])
        reduced.guide.site_posterior(site).kept.copy_(kept[site])
    before = {name: tensor.detach().clone() for name, tensor in small.named().items()}
    for step in range(3):
        scales = {
            site: torch.rand(len(mask), dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            for site, mask in kept.items()
        }
        wanted_loss = reduced.step(scales)
        loss = small.step({site: scales[site][kept[site]] for site in kept})
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=0)
        wanted = reduced.named()
        for name, tensor in small.named().items():
            expected = small.selected(name, wanted[name].detach(), kept)
            if expected is not None and tensor.is_floating_point():
                # a bias in front of BatchNorm has a gradient of pure rounding, which Adam makes larger
                torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=1e-6, msg=name)
    still = [
        name
        for name, tensor in small.named().items()
        if tensor.requires_grad and torch.equal(tensor, before[name])
    ]
    # a shift of all keys changes no softmax
    assert all("key.bias" in name for name in still)


def test_fitting_goes_on(family):
    fit = Fitted(family)
    plan = fit.reduce()
    plan.shrink(fit.model, fit.guide, fit.optimizer)
    losses = [float(fit.step()) for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    model = Classifier(fit.net)  # `fit` knows the number of examples itself
    guide = fit.guide
    before = {name: tensor.detach().clone() for name, tensor in fit.named().items()}
    result = bmrs.fit(
        model, guide, (fit.x, fit.y), (fit.x, fit.y), epochs=3, batch_size=8, learning_rate=0.01, progress=False,
        criterion=bmrs.BMRS_N(), keep_best=False, warm_up=0.0, kl_weight=1.0,
    )  # fmt: skip
    assert len(result.history) == 3
    assert result.history[["loss", "kl", "validation_loss"]].notna().all(axis=None)
    assert (result.history.kept <= sum(len(units) for units in plan.kept.values())).all()
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0]
    changed = [
        name for name, t in fit.named().items() if t.requires_grad and not torch.equal(t, before[name])
    ]
    assert changed == [name for name, tensor in fit.named().items() if tensor.requires_grad]
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in fit.named().items()
    }


def test_later_plans_number_structures_as_the_original_did(family):
    fit = Fitted(family)
    first = fit.reduce()
    first.shrink(fit.model, fit.guide, fit.optimizer)
    fit.step()
    second = fit.reduce(bmrs.Random(0.5, seed=3))
    for site in first.layers:
        rows = second.table[second.table.layer == site]
        assert rows.unit.tolist() == first.table.unit[first.table.layer == site].tolist()
        assert rows.unit[rows.present].tolist() == first.kept[site]
        assert (rows.removed & rows.removed_in_fit)[~rows.present].all()
        assert set(second.kept[site]) <= set(first.kept[site])
    assert sum(map(len, second.kept.values())) < sum(map(len, first.kept.values()))
    small = second.apply()
    fit.net.eval()
    with torch.no_grad(), fixed_scales(fit.net, second.theta_mean()):
        torch.testing.assert_close(small.eval()(fit.x), fit.net(fit.x), rtol=1e-9, atol=1e-9)
    left = second.parameters_left()
    assert left == sum(parameter.numel() for parameter in small.parameters())
    # and it can shrink in its turn
    second.shrink(fit.model, fit.guide, fit.optimizer)
    assert sum(parameter.numel() for parameter in fit.net.parameters()) == left
    third = fit.reduce(bmrs.Random(0.0))
    assert third.kept == second.kept
    assert all(layer.units.tolist() == second.kept[site] for site, layer in noise_layers(fit.net).items())
    fit.step()


def test_what_a_fit_removed_before_goes_too():
    fit = Fitted("residual")
    noise_layers(fit.net)["first"].kept[[0, 3]] = False
    fit.guide.site_posterior("first").kept[[0, 3]] = False
    plan = fit.reduce(bmrs.Random(0.2, seed=0))
    assert not {0, 3} & set(plan.kept["first"])
    plan.shrink(fit.model, fit.guide, fit.optimizer)
    assert noise_layers(fit.net)["first"].kept.all()
    assert fit.guide.site_posterior("first").kept.all()
    again = fit.reduce(bmrs.Random(0.0))
    assert not again.table.removed_in_fit[again.table.present].any()
    assert again.kept == plan.kept


def test_a_plan_that_removes_nothing_changes_nothing(family):
    fit = Fitted(family)
    before = fit.snapshot()
    fit.reduce(bmrs.Random(0.0)).shrink(fit.model, fit.guide, fit.optimizer)
    assert same(fit.snapshot(), before)


class Elsewhere(torch.Tensor):
    """A tensor of some other device, which may meet tensors of the CPU only after `cpu` or `to`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():  # asking for dim() would come back to here
            tensors = [value for value in args if isinstance(value, torch.Tensor) and value.dim()]
        if any(not isinstance(value, cls) for value in tensors):
            raise RuntimeError("Expected all tensors to be on the same device")
        result = super().__torch_function__(function, types, args, kwargs or {})
        leaves = function in (torch.Tensor.cpu, torch.Tensor.to)
        return result.as_subclass(torch.Tensor) if leaves else result


def test_masks_may_be_on_another_device_than_what_is_made_to_check_them(family):
    fit = Fitted(family)
    shrink = importlib.import_module("pyro_bmrs.pruning.shrink").shrink
    kept = {site: torch.arange(count) > 0 for site, count in fit.sizes.items()}
    there = {site: mask.as_subclass(Elsewhere) for site, mask in kept.items()}
    shrink(fit.model, fit.guide, there, fit.optimizer, fit.x)
    assert {site: layer.features for site, layer in noise_layers(fit.net).items()} == {
        site: count - 1 for site, count in fit.sizes.items()
    }


def test_one_layer_alone_and_no_optimizer(family):
    fit = Fitted(family)
    plan = fit.reduce()
    site = plan.layers[-1]
    plan.table.loc[plan.table.layer != site, "removed"] = False
    plan.shrink(fit.model, fit.guide)
    sizes = {s: layer.features for s, layer in noise_layers(fit.net).items()}
    assert sizes == {**fit.sizes, site: len(plan.kept[site])}
    optimizer = torch.optim.Adam([*fit.model.parameters(), *fit.guide.parameters()])
    fit.optimizer = optimizer
    fit.step()


def test_an_optimizer_of_some_parameters_that_has_not_stepped_yet():
    fit = Fitted("residual", steps=0)
    optimizer = torch.optim.Adam([fit.net.first.weight, fit.guide.site_posterior("stem").loc])
    plan = fit.reduce()
    plan.shrink(fit.model, fit.guide, optimizer)
    assert not optimizer.state
    fit.optimizer = optimizer
    fit.step()
    assert optimizer.state[fit.net.first.weight]["exp_avg"].shape == fit.net.first.weight.shape


def other_widths():
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), MultiplicativeNoise(7), nn.Linear(7, 6), nn.PReLU(6),
        MultiplicativeNoise(6), nn.Linear(6, 3),
    )  # fmt: skip


def stranger(net):
    model = Classifier(net.double())
    guide = AutoTruncatedLogNormal(model)
    with pyro.get_param_store().scope():
        guide(torch.randn(4, 5).double(), torch.zeros(4, dtype=torch.long))
    return model, guide


def test_what_does_not_belong_together_is_refused_and_unchanged():
    fit = Fitted("by_hand")
    plan = fit.reduce()
    before = fit.snapshot()
    model, guide = stranger(other_widths())
    state = copy.deepcopy(model.state_dict())
    for wrong_model, wrong_guide, message in (
        (model, fit.guide, "model must have the structures of the plan: it has {'3': 7, '6': 6}"),
        (model, guide, "model must have the structures of the plan: it has {'3': 7, '6': 6}"),
        (fit.model, guide, "guide must have a posterior for each structure of the model: {'3': 8, '6': 6}"),
        (Classifier(nn.Linear(5, 3)), fit.guide, "model must hold MultiplicativeNoise layers"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            plan.shrink(wrong_model, wrong_guide, fit.optimizer)
        assert same(fit.snapshot(), before)
        assert same(dict(model.state_dict()), dict(state))


def test_a_second_time_is_refused():
    fit = Fitted("residual")
    plan = fit.reduce()
    plan.shrink(fit.model, fit.guide, fit.optimizer)
    before = fit.snapshot()
    with pytest.raises(ValueError, match="model must have the structures of the plan"):
        plan.shrink(fit.model, fit.guide, fit.optimizer)
    with pytest.raises(ValueError, match="network must have the noise layers of the plan"):
        plan.apply(network_of(fit.model))
    assert same(fit.snapshot(), before)


@pytest.fixture
def misled(monkeypatch):
    """Makes the library believe that each layer reads the neighbours of the structures that it reads."""

    def shift(groups):
        site = next(iter(groups))
        group = groups[site]
        members = tuple(
            replace(member, units=(member.units + 1) % group.features)
            if member.role == "consumer"
            else member
            for member in group.members
        )
        return {**groups, site: replace(group, members=members)}

    def mislead(net):
        hooked = hooked_noise(net)
        for noise in hooked.values():  # what acts where is settled; only what is tied to what is false
            monkeypatch.setattr(noise, "groups", shift(noise.groups))
        if not hooked:
            module = importlib.import_module("pyro_bmrs.pruning.shrink")
            real = module.structure_groups
            monkeypatch.setattr(module, "structure_groups", lambda *arguments: shift(real(*arguments)))

    return mislead


def test_a_model_that_would_compute_something_else_is_left_bit_for_bit(family, misled, monkeypatch):
    fit = Fitted(family)
    plan = fit.reduce()
    before = fit.snapshot()
    misled(fit.net)
    with pytest.raises(EqualityError, match="differs from the reduced model"):
        plan.shrink(fit.model, fit.guide, fit.optimizer)
    assert same(fit.snapshot(), before)
    monkeypatch.undo()
    # nor is anything broken: all goes on
    fit.step()
    plan.shrink(fit.model, fit.guide, fit.optimizer)
    fit.step()


def test_shrunken_state_goes_into_an_equally_shrunken_copy(family, tmp_path):
    fit, other = Fitted(family), Fitted(family, seed=5, steps=1)
    for one in (fit, other):
        one.reduce().shrink(one.model, one.guide, one.optimizer)
    fit.step()
    torch.save(
        [fit.model.state_dict(), fit.guide.state_dict(), fit.optimizer.state_dict()], tmp_path / "state"
    )
    model, guide, optimizer = torch.load(tmp_path / "state", weights_only=True)
    assert not same(fit.snapshot()[:2], other.snapshot()[:2])
    assert other.model.load_state_dict(model)
    assert other.guide.load_state_dict(guide)
    other.optimizer.load_state_dict(optimizer)
    assert same(fit.snapshot()[:2], other.snapshot()[:2])
    scales = {site: q.mean for site, q in fit.guide.posterior().items()}
    assert torch.equal(fit.step(scales), other.step(scales))
    assert same(fit.snapshot()[:2], other.snapshot()[:2])
    assert fit.reduce().table.equals(other.reduce().table)
    # into one that is whole it does not go
    whole = Fitted(family, steps=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        whole.model.load_state_dict(model)


def test_a_plan_from_a_file_shrinks_what_it_is_bound_to(tmp_path):
    fit = Fitted("residual")
    plan = fit.reduce()
    loaded = NetworkPlan.load(plan.save(tmp_path / "plan.json"))
    before = fit.snapshot()
    with pytest.raises(ValueError, match="network must be given"):
        loaded.shrink(fit.model, fit.guide, fit.optimizer)
    assert same(fit.snapshot(), before)
    loaded.bound_to(fit.net, lambda: fit.x).shrink(fit.model, fit.guide, fit.optimizer)
    assert {site: layer.units.tolist() for site, layer in noise_layers(fit.net).items()} == plan.kept


def test_copies_and_criteria_of_the_shrunken_model_work(family):
    fit = Fitted(family)
    fit.reduce().shrink(fit.model, fit.guide, fit.optimizer)
    net = copy.deepcopy(fit.net).eval()
    scales = {site: torch.rand(layer.features).double() for site, layer in noise_layers(net).items()}
    fit.net.eval()
    with torch.no_grad(), fixed_scales(fit.net, scales):
        wanted = fit.net(fit.x)
    fit.step()  # changes the original alone
    with torch.no_grad(), fixed_scales(net, scales):
        assert torch.equal(net(fit.x), wanted)
    for criterion in (bmrs.BMRS_N(), bmrs.BMRS_U(), bmrs.SNR(), bmrs.WeightNorm(0.5)):
        plan = fit.reduce(criterion)
        assert {site: len(mask) for site, mask in masks(plan).items()} == {
            site: layer.features for site, layer in noise_layers(fit.net).items()
        }
    with torch.no_grad():
        fit.guide.posteriors[0].loc[0] = torch.nan
    with pytest.raises(NonFiniteScoreError, match=r"structures \[0\]"):
        fit.reduce(bmrs.BMRS_N())


def test_a_graph_of_an_earlier_step_may_still_be_alive():
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    guide(x, y)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()])

    def step():
        loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    held = [step()]
    bmrs.reduce(model, guide, bmrs.Random(0.5, seed=1)).shrink(model, guide, optimizer)
    held.append(step())
    assert all(loss.requires_grad for loss in held)
    assert model.net[0].weight.grad.shape == (4, 4)


def test_a_grouped_convolution_with_one_channel_a_group_left_is_still_read():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten(),
        nn.Linear(32, 2),
    )  # fmt: skip
    x, y = torch.randn(6, 3, 6, 6), torch.randint(2, (6,))
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(x, y)
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5, seed=2), min_kept=1)
    plan.table["removed"] = plan.table.groupby("layer").cumcount() > 0
    plan.shrink(model, guide)
    assert (model.net[2].in_channels, model.net[2].out_channels, model.net[2].groups) == (4, 4, 4)
    later = bmrs.reduce(model, guide, bmrs.Random(0.0))
    assert later.apply()(x).shape == (6, 2)


class NormalNoise(MultiplicativeNoise):
    """Noise whose prior is no log-uniform."""

    def prior(self):
        law = bmrs.TruncatedLogNormal(torch.full((self.features,), -8.0), 6.0, self.log_low, self.log_high)
        return law.mask(self.kept).to_event(1)


def test_what_left_keeps_the_prior_of_its_layer():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), NormalNoise(6), nn.Linear(6, 2))
    model = Classifier(net)
    guide = AutoTruncatedLogNormal(model, init_scale=3.0)
    guide(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    guide.site_posterior("2").loc.data.fill_(-15.0)
    before = bmrs.reduce(model, guide).table
    bmrs.reduce(model, guide, bmrs.Random(0.5)).shrink(model, guide)
    after = bmrs.reduce(model, guide).table
    assert after.log_evidence_change.tolist() == pytest.approx(before.log_evidence_change.tolist())


class Tied(nn.Module):
    """Behind a layer with noise two layers with one weight, and with one buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.noise, self.second = nn.Linear(6, 8), MultiplicativeNoise(8), nn.Linear(8, 5)
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight
        self.a.register_buffer("step", torch.zeros(3))
        self.b.register_buffer("step", self.a.step)

    def forward(self, x):
        return self.b(self.a(self.second(self.noise(self.first(x).relu()))).relu())


def test_weights_that_are_tied_count_once():
    network = Tied()
    original = original_network(network)
    assert original.b.weight is original.a.weight
    assert original.b.step is original.a.step
    assert all(tensor.is_meta for tensor in original.state_dict().values())
    model = Classifier(network)
    guide = AutoTruncatedLogNormal(model)
    guide(torch.randn(8, 6), torch.zeros(8, dtype=torch.long))
    plan = bmrs.reduce(model, guide, bmrs.Random(0.5))
    before = 6 * 8 + 8 + 8 * 5 + 5 + 5 * 5 + 2 * 5
    assert plan.parameters_before() == plan.costs(plan.apply(), seconds=0).before["parameters"] == before
    assert f"parameters: {before} →" in str(plan)
    plan.shrink(model, guide)
    assert bmrs.reduce(model, guide).parameters_before() == before
