"""θ on tensors that no layer's input meets: parameters of own modules, experts, weights that are handed over."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyro_bmrs as bmrs
from pyro_bmrs.networks.groups import Count, Member, StructureGroup
from pyro_bmrs.networks.hooked_noise import HookedNoise, without_hooked_noise
from pyro_bmrs.networks.noise import drawn_together, fixed_scales, noise_layers
from pyro_bmrs.networks.surgery import EqualityError, remove_structures

WIDTH = 5
EACH = torch.arange(WIDTH)


def normal(*shape):
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class Linear(nn.Module):
    """What nn.functional.linear reads."""

    def __init__(self):
        super().__init__()
        self.first, self.w, self.b = nn.Linear(4, WIDTH), normal(3, WIDTH), normal(3)

    def forward(self, x):
        return F.linear(self.first(x).tanh(), self.w, self.b)

    members = (
        Member("first", "weight", 0, "producer", EACH, EACH),
        Member("first", "bias", 0, "between", EACH, EACH),
        Member("", "w", 1, "consumer", EACH, EACH),
    )


class Matrix(nn.Module):
    """Rows of a matrix, in a module of its own, and a bias in front of them."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.shift = normal(WIDTH, 3), normal(WIDTH)

        def forward(self, x):
            return (x + self.shift).relu() @ self.matrix

    def __init__(self):
        super().__init__()
        self.first, self.mixing = nn.Linear(4, WIDTH), self.Mixing()

    def forward(self, x):
        return self.mixing(self.first(x))

    members = (
        Member("first", "weight", 0, "producer", EACH, EACH),
        Member("first", "bias", 0, "between", EACH, EACH),
        Member("mixing", "shift", 0, "between", EACH, EACH),
        Member("mixing", "matrix", 0, "consumer", EACH, EACH),
    )


class Experts(nn.Module):
    """Two experts in one parameter each, which is asked for once per expert."""

    def __init__(self):
        super().__init__()
        self.up, self.down = normal(2, 4, WIDTH), normal(2, WIDTH, 3)
        self.size = WIDTH

    def forward(self, x):
        outputs = [(x @ self.up[e]).view(-1, self.size).relu() @ self.down[e] for e in range(2)]
        return torch.stack(outputs).sum(0)

    members = (
        Member("", "up", 2, "producer", EACH, EACH),
        Member("", "down", 1, "consumer", EACH, EACH),
    )
    counts = (Count("", "size", WIDTH, EACH, EACH),)


class HandedOver(nn.Module):
    """A layer whose weight its parent hands to a function."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(WIDTH, 3)

        def forward(self, x):
            return F.linear(x, self.proj.weight, self.proj.bias)

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(4, WIDTH), self.Block()

    def forward(self, x):
        return self.block(self.first(x).sigmoid())

    members = (
        Member("first", "weight", 0, "producer", EACH, EACH),
        Member("first", "bias", 0, "between", EACH, EACH),
        Member("block.proj", "weight", 1, "consumer", EACH, EACH, reader="block"),
    )


class HandedOverByTheWhole(nn.Module):
    """The same, where the parent is the network itself."""

    def __init__(self):
        super().__init__()
        self.first, self.proj = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return F.linear(self.first(x).sigmoid(), self.proj.weight, self.proj.bias)

    members = (
        Member("first", "weight", 0, "producer", EACH, EACH),
        Member("first", "bias", 0, "between", EACH, EACH),
        Member("proj", "weight", 1, "consumer", EACH, EACH, reader=""),
    )


class Listed(nn.Module):
    """In a list of parameters, and read by three tensors at once: two of them meet the input of one module."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = normal(3, WIDTH), normal(3, WIDTH)

        def forward(self, x):
            return F.linear(x, self.left) * F.linear(x, self.right)

    def __init__(self):
        super().__init__()
        self.first, self.pair = nn.Linear(4, WIDTH), self.Pair()
        self.several = nn.ParameterList([normal(3, WIDTH), normal(WIDTH, 3)])

    def forward(self, x):
        h = self.first(x).tanh()
        return self.pair(h) + h @ self.several[1]

    members = (
        Member("first", "weight", 0, "producer", EACH, EACH),
        Member("first", "bias", 0, "between", EACH, EACH),
        Member("pair", "left", 1, "consumer", EACH, EACH, input_dim=-1),
        Member("pair", "right", 1, "consumer", EACH, EACH, input_dim=-1),
        Member("several", "1", 0, "consumer", EACH, EACH, reader=""),
    )


FAMILIES = [Linear, Matrix, Experts, HandedOver, HandedOverByTheWhole, Listed]
SCALE = torch.linspace(0.3, 0.9, WIDTH)


def noisy(kind, *groups):
    """(network, the same with noise)."""
    torch.manual_seed(0)
    network = kind()
    groups = groups or (StructureGroup("s", WIDTH, kind.members, counts=getattr(kind, "counts", ())),)
    return network, with_noise(network, *groups)


def with_noise(network, *groups):
    made = copy.deepcopy(network)
    HookedNoise(made, groups).attach(made)
    return made


def folded(network, scale=SCALE, members=None):
    """The network with θ in its weights, written down anew."""
    made = copy.deepcopy(network)
    with torch.no_grad():
        for member in made.members if members is None else members:
            if member.role == "consumer":
                tensor = made.get_parameter(f"{member.path}.{member.name}".lstrip("."))
                tensor.copy_((tensor.movedim(member.dim, -1) * scale).movedim(-1, member.dim))
    return made


@pytest.mark.parametrize("kind", FAMILIES)
def test_noise_is_what_weights_times_theta_compute(kind):
    network, made = noisy(kind)
    x = torch.randn(6, 4)
    for scale in (SCALE, torch.ones(WIDTH), torch.zeros(WIDTH)):
        with fixed_scales(made, {"s": scale}):
            torch.testing.assert_close(made(x), folded(network, scale)(x))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_stored_stays_as_it_is(kind):
    network, made = noisy(kind)
    looked_at = []

    def look(module, arguments, output):
        looked_at.append(({name: id(p) for name, p in module.named_parameters()}, module.state_dict()))

    made.register_forward_hook(look)
    before = {name: id(p) for name, p in made.named_parameters()}
    with fixed_scales(made, {"s": SCALE}):
        made(torch.randn(6, 4))
    ((during, state),) = looked_at
    assert during == before
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(made.get_parameter(name), tensor)
    assert not made.structure_noise.seen.under_way


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_are_those_of_the_product(kind):
    network, made = noisy(kind)
    x, theta = torch.randn(6, 4), SCALE.clone().requires_grad_()
    with fixed_scales(made, {"s": theta}):
        made(x).square().sum().backward()
    small = folded(network)
    small(x).square().sum().backward()
    wanted, total = {}, torch.zeros(WIDTH)
    for name, parameter in small.named_parameters():
        wanted[name] = parameter.grad
    for member in kind.members:
        if member.role == "consumer":
            name = f"{member.path}.{member.name}".lstrip(".")
            moved = wanted[name].movedim(member.dim, -1)
            own = network.get_parameter(name).detach().movedim(member.dim, -1)
            total += (moved * own).flatten(0, -2).sum(0)
            wanted[name] = (moved * SCALE).movedim(-1, member.dim)
    for name, parameter in made.named_parameters():
        if name in wanted and wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name])
    torch.testing.assert_close(theta.grad, total)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structures_are_removed(kind, dtype):
    network, made = noisy(kind)
    made, x = made.to(dtype), torch.randn(6, 4, dtype=dtype)
    kept = torch.tensor([True, False, True, True, False])
    groups = {group.site: group for group in made.structure_noise.groups.values()}
    small, cuts, _ = remove_structures(made, {"s": kept}, {"s": SCALE.double()}, x, groups=groups)
    torch.testing.assert_close(small(x), folded(network, SCALE * kept).to(dtype)(x))
    assert sum(p.numel() for p in small.parameters()) == cuts.parameters_left(network)
    assert all(type(module._parameters) is dict for module in small.modules())


@pytest.mark.parametrize("kind", FAMILIES)
def test_columns_shifted_by_one_are_caught(kind):
    _, made = noisy(kind)
    (group,) = made.structure_noise.groups.values()
    wrong = tuple(
        Member(**{**vars(m), "units": (m.units + 1) % WIDTH}) if m.role == "consumer" else m
        for m in group.members
    )
    shifted = StructureGroup("s", WIDTH, wrong, counts=group.counts)
    kept = torch.tensor([True, False, True, True, False])
    with pytest.raises(EqualityError, match="differs from the reduced model"):
        remove_structures(made, {"s": kept}, {"s": SCALE.double()}, torch.randn(6, 4), groups={"s": shifted})


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_copy_has_noise_of_its_own(kind):
    network, made = noisy(kind)
    x = torch.randn(6, 4)
    other, doubled = copy.deepcopy(made), copy.deepcopy(network)
    assert other.structure_noise.seen is not made.structure_noise.seen
    with torch.no_grad():
        for parameter in (*other.parameters(), *doubled.parameters()):
            parameter.mul_(2.0)
    with fixed_scales(other, {"s": SCALE}):
        torch.testing.assert_close(other(x), folded(doubled)(x))
    with fixed_scales(made, {"s": SCALE}):
        torch.testing.assert_close(made(x), folded(network)(x))


@pytest.mark.parametrize("kind", FAMILIES)
def test_noise_is_taken_out_without_a_trace(kind):
    network, made = noisy(kind)
    x = torch.randn(6, 4)
    without_hooked_noise(made)
    assert torch.equal(made(x), network(x))
    for module in made.modules():
        assert type(module._parameters) is type(module._buffers) is dict
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert list(made.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_load_and_move(kind):
    _, made = noisy(kind)
    x = torch.randn(6, 4)
    torch.manual_seed(1)
    other = kind()
    made.load_state_dict(other.state_dict(), strict=False)
    made, other = made.double(), other.double()
    with fixed_scales(made, {"s": SCALE}):
        torch.testing.assert_close(made(x.double()), folded(other, SCALE.double())(x.double()))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind is not Listed])
def test_several_draws_per_batch_are_refused(kind):
    _, made = noisy(kind)
    values = {"s": torch.rand(3, WIDTH)}
    with (
        pytest.raises(ValueError, match=r"is multiplied by one θ for the whole batch.*draws_per_batch=1"),
        drawn_together(values, 6),
    ):
        made(torch.randn(6, 4))
    assert not made.structure_noise.seen.under_way
    with drawn_together({"s": SCALE}, 6):
        made(torch.randn(6, 4))


@pytest.mark.parametrize("kind", [Linear, Experts, HandedOver])
def test_from_fit_to_a_smaller_network(kind):
    _, made = noisy(kind)
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    model = bmrs.Classifier(made)
    guide = bmrs.AutoTruncatedLogNormal(model)
    # one draw a batch, whatever is asked for
    bmrs.fit(model, guide, (x, y), epochs=1, batch_size=8, progress=False)
    plan = bmrs.reduce(model, guide, bmrs.WeightNorm(fraction=0.4))
    small = plan.apply()
    rebuilt = plan.rebuild(kind())
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(rebuilt(x), small(x))
    plan.shrink(model, guide)
    assert noise_layers(made)["s"].features == 3
    with torch.no_grad(), fixed_scales(made, {"s": plan.theta_mean()["s"][plan.kept["s"]].float()}):
        torch.testing.assert_close(made.eval()(x), small(x))
    bmrs.fit(model, guide, (x, y), epochs=1, batch_size=8, progress=False)


# who sees what ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """The embedding's weight is read again, by the network, at the end; the embedding looks up what is stored."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(7, 4), nn.Linear(4, WIDTH)
        self.w = nn.Embedding(3, WIDTH)

    def forward(self, x):
        h = self.middle(self.embedding(x)).tanh()
        return h @ self.w.weight.T + self.w(torch.zeros(len(x), dtype=torch.long)).sum(-1, keepdim=True)


def test_the_owner_of_a_tensor_that_other_code_reads_sees_what_is_stored():
    torch.manual_seed(0)
    network, x = Tied(), torch.tensor([1, 5, 2])
    member = Member("w", "weight", 1, "consumer", EACH, EACH, reader="")
    made = with_noise(network, StructureGroup("s", WIDTH, (member,)))
    h = network.middle(network.embedding(x)).tanh()
    wanted = h @ (network.w.weight * SCALE).T + network.w.weight[0].sum()
    with fixed_scales(made, {"s": SCALE}):
        torch.testing.assert_close(made(x), wanted)


class Readers(nn.Module):
    """Three modules that use one tensor: the outer one around the inner one, and one that is no reader."""

    class Reads(nn.Module):
        def __init__(self, owner, inside=None):
            super().__init__()
            self.owner, self.inside = [owner], inside

        def forward(self, x):
            before = x @ self.owner[0].w
            inside = None if self.inside is None else self.inside(x)
            return before, inside, x @ self.owner[0].w

    def __init__(self):
        super().__init__()
        self.own = nn.Module()
        self.own.w = normal(WIDTH, WIDTH)
        self.inner = self.Reads(self.own)
        self.outer, self.other = self.Reads(self.own, self.inner), self.Reads(self.own)

    def forward(self, x):
        return self.outer(x), self.other(x)


def test_readers_inside_readers_have_their_own_theta():
    torch.manual_seed(0)
    network, x = Readers(), torch.randn(3, WIDTH)
    groups = [
        StructureGroup(site, WIDTH, (Member("own", "w", 0, "consumer", EACH, EACH, reader=site),))
        for site in ("outer", "inner")
    ]
    made = with_noise(network, *groups)
    thetas = {"outer": SCALE, "inner": SCALE.flip(0)}
    with fixed_scales(made, thetas):
        (before, (first, _, second), after), (plain, _, again) = made(x)
    by_site = {site: x @ (theta[:, None] * network.own.w) for site, theta in thetas.items()}
    for have, site in ((before, "outer"), (first, "inner"), (second, "inner"), (after, "outer")):
        torch.testing.assert_close(have, by_site[site])
    assert torch.equal(plain, x @ network.own.w)
    assert torch.equal(again, plain)


class Recursive(nn.Module):
    """Calls itself, and may fail half-way down."""

    def __init__(self):
        super().__init__()
        self.w, self.fails = normal(WIDTH, WIDTH), False

    def forward(self, x, depth=2):
        if depth == 0:
            if self.fails:
                raise ArithmeticError
            return x
        below = self(x @ self.w, depth - 1)
        return below + x @ self.w


class Holds(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        try:
            return self.part(x)
        except ArithmeticError:
            return x @ self.part.w


def test_a_reader_that_calls_itself_or_fails():
    torch.manual_seed(0)
    network, x = Holds(Recursive()), torch.randn(3, WIDTH)
    member = Member("part", "w", 1, "consumer", EACH, EACH)
    made = with_noise(network, StructureGroup("s", WIDTH, (member,)))
    w = network.part.w * SCALE
    with fixed_scales(made, {"s": SCALE}):
        torch.testing.assert_close(made(x), x @ w @ w + x @ w + x @ w @ w)
        made.part.fails = True
        assert torch.equal(made(x), x @ network.part.w)  # after the error, outside of the reader
        with pytest.raises(RuntimeError, match=r"layer 'part' has noise .* call the network itself"):
            made.part(x)
        made.part.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(x)
        made.part._forward_pre_hooks.popitem()
        made.part.fails = False
        torch.testing.assert_close(made(x), x @ w @ w + x @ w + x @ w @ w)
    assert not made.structure_noise.seen.under_way


class Again(nn.Module):
    """Reads of which the forward, or a part of it, runs again in the backward pass."""

    def __init__(self, whole, part, reentrant=False):
        super().__init__()
        self.first, self.block, self.last = (
            nn.Linear(4, WIDTH),
            self.Block(part, reentrant),
            nn.Linear(WIDTH, 2),
        )
        self.whole = whole

    class Block(nn.Module):
        def __init__(self, part, reentrant):
            super().__init__()
            self.w, self.part, self.reentrant = normal(WIDTH, WIDTH), part, reentrant

        def inside(self, x):
            return (x @ self.w).tanh() @ self.w.mul(2.0)

        def forward(self, x):
            if self.part:
                return checkpoint(self.inside, x, use_reentrant=self.reentrant)
            return self.inside(x)

    def forward(self, x):
        x = self.first(x).tanh()
        return self.last(checkpoint(self.block, x, use_reentrant=False) if self.whole else self.block(x))


def gradients_of(whole, part, reentrant=False):
    torch.manual_seed(0)
    made = with_noise(
        Again(whole, part, reentrant),
        StructureGroup("s", WIDTH, (Member("block", "w", 0, "consumer", EACH, EACH),)),
    )
    theta = SCALE.clone().requires_grad_()
    with fixed_scales(made, {"s": theta}):
        loss = made(torch.randn(6, 4, generator=torch.Generator().manual_seed(1))).square().sum()
    return torch.autograd.grad(loss, [theta, *made.parameters()])


@pytest.mark.parametrize(("whole", "part"), [(True, False), (False, True), (True, True)])
def test_activation_checkpoints_change_no_gradient(whole, part):
    for have, wanted in zip(gradients_of(whole, part), gradients_of(False, False), strict=True):
        torch.testing.assert_close(have, wanted)


def test_what_can_not_be_run_again_is_an_error_and_no_wrong_gradient():
    made = with_noise(
        Again(False, True, True),
        StructureGroup("s", WIDTH, (Member("block", "w", 0, "consumer", EACH, EACH),)),
    )
    with fixed_scales(made, {"s": SCALE.clone()}):
        loss = made(torch.randn(6, 4)).square().sum()
    with pytest.raises(
        RuntimeError, match=r"'block\.w', which is multiplied by θ while 'block' runs.*use_re"
    ):
        loss.backward()


def test_torchs_own_attention_and_encoder_read_weights_of_theirs():
    """The encoder has a path that reads the weights of its parts directly: not where these have noise."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).eval()
    columns = torch.arange(8)
    # whole heads: two structures of four columns
    member = Member("self_attn.out_proj", "weight", 1, "consumer", columns, columns // 4, reader="self_attn")
    made = with_noise(layer, StructureGroup("s", 2, (member,)))
    theta, x = torch.tensor([0.2, 0.7]), torch.randn(3, 5, 8)
    wanted = copy.deepcopy(layer)
    with torch.no_grad():
        wanted.self_attn.out_proj.weight.mul_(theta.repeat_interleave(4))
        with fixed_scales(made, {"s": theta}):
            torch.testing.assert_close(made(x), wanted(x))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.back = nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)

    def forward(self, x):
        return self.back(self.conv(x))


@pytest.mark.parametrize("draws", [None, 2, 3])
def test_groups_of_a_convolution_read_one_after_the_other(draws):
    torch.manual_seed(0)
    network = Grouped()
    groups = [
        StructureGroup(
            "a", 3, (Member("conv", "weight", 1, "consumer", *[torch.arange(3)] * 2, input_dim=-3),)
        ),
        StructureGroup(
            "b", 4, (Member("back", "weight", 0, "consumer", *[torch.arange(4)] * 2, input_dim=-3),)
        ),
    ]
    made, x = with_noise(network, *groups), torch.randn(6, 6, 5, 5)
    shape = () if draws is None else (draws,)
    values = {"a": torch.rand(*shape, 3), "b": torch.rand(*shape, 4)}
    a, b = (value.view(-1, value.shape[-1])[torch.arange(6) % (draws or 1)] for value in values.values())
    wanted = network.back(network.conv(x * a.repeat(1, 2)[..., None, None]) * b[..., None, None])
    with drawn_together(values, 6):
        torch.testing.assert_close(made(x), wanted)
