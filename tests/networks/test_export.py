"""Files for other programs: the same outputs at every batch size, or no file at all."""

import json
import sys

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks.attention import SeparateAttention
from pyro_bmrs.networks.export import export_onnx, export_program
from pyro_bmrs.networks.inputs import call, map_tensors, tensors_of
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.surgery import remove_structures

BATCHES = (1, 2, 7, 100)


def moved(network, seed=0):
    """Weights and statistics that are not those a network begins with; in training mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
            assert name
    return network.train()


def convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(36, 3)
    )  # fmt: skip
    return net, torch.randn(5, 1, 8, 8)


def vision_transformer():
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    net = vit.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=12, num_classes=3
    )
    nn.init.normal_(net.heads.head.weight)
    x = torch.randn(4, 3, 8, 8)
    noisy = bmrs.insert_noise(moved(net), x)
    kept = {site: torch.arange(layer.features) % 2 == 0 for site, layer in noise_layers(noisy).items()}
    scales = {site: torch.full(mask.shape, 0.7, dtype=torch.float64) for site, mask in kept.items()}
    small = remove_structures(noisy, kept, scales, x).network
    attention = [module for module in small.modules() if isinstance(module, SeparateAttention)]
    assert [module.num_heads for module in attention] == [2]
    return small, x


class Keywords(nn.Module):
    """Tokens and numbers in, under names; a dictionary out."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(11, 6), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, tokens, *, numbers):
        h = torch.cat([self.embed(tokens).mean(1), numbers], dim=1)
        h = torch.tanh(self.hidden(h))
        return {"logits": self.out(h), "hidden": h}


def keywords():
    torch.manual_seed(0)
    return Keywords(), {"tokens": torch.randint(11, (4, 6)), "numbers": torch.randn(4, 2)}


FAMILIES = [convolutions, vision_transformer, keywords]


def examples(like, count):
    """As many other examples."""
    generator = torch.Generator().manual_seed(count)

    def draw(tensor):
        shape = (count, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator)
        return torch.randint(11, shape, generator=generator)

    return map_tensors(draw, like)


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def network(request):
    net, x = request.param()
    return moved(net), x


@torch.no_grad()
def outputs(net, x):
    net.eval()
    found = tensors_of(call(net, x))
    assert all(len(tensor) < 2 or (tensor - tensor[0]).abs().max() > 1e-2 for tensor in found)
    return found


def test_a_program_gives_the_same_at_every_batch(network, tmp_path):
    net, x = network
    path = export_program(net, x, tmp_path / "net.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    assert all(module.training for module in net.modules())
    program = torch.export.load(path).module()
    for count in BATCHES:
        given = examples(x, count)
        have = tensors_of(program(**given) if isinstance(given, dict) else program(given))
        for want, found in zip(outputs(net, given), have, strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_onnx_gives_the_same_at_every_batch(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, x = network
    path = export_onnx(net, x, tmp_path / "net.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert all(module.training for module in net.modules())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    if isinstance(x, dict):
        assert names == list(x)
    for count in BATCHES:
        given = examples(x, count)
        feed = {name: t.numpy() for name, t in zip(names, tensors_of(given), strict=True)}
        have = session.run(None, feed)
        for want, found in zip(outputs(net, given), have, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), want, rtol=0, atol=1e-5)


@pytest.fixture
def exporting(monkeypatch):
    """torch's slow exporter replaced by one that writes a few bytes, and onnxruntime by the network itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    written = []

    def export(network, arguments, path, **options):
        written.append(network)
        with open(path, "wb") as file:
            file.write(b"half of a file")

    class Session:
        """Gives what the network gives, with an error where its test says."""

        wrong_at = ()
        error = 1e-3

        def __init__(self, path, **options):
            self.network = written[-1]

        def get_inputs(self):
            return [type("Entry", (), {"name": "input"})]

        def run(self, names, feed):
            x = torch.from_numpy(feed["input"])
            result = self.network(x).detach().numpy().copy()
            if len(x) in self.wrong_at:
                result[-1, 0] += self.error
            return [result]

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return Session


@pytest.mark.parametrize("wrong_at", [(5,), (1,)], ids=["all-examples", "one-example"])
@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_file_that_computes_something_else_is_not_left(exporting, tmp_path, wrong_at, error):
    net, x = convolutions()
    exporting.wrong_at, exporting.error = wrong_at, error
    with pytest.raises(ValueError, match=r"ONNX unchanged: output 0 differs by (1\.0\d*e-03|nan) \(allowed"):
        export_onnx(net, x, tmp_path / "new" / "net.onnx")
    assert list((tmp_path / "new").iterdir()) == []
    assert net.training
    # what was there before stays
    old = tmp_path / "net.onnx"
    old.write_bytes(b"before")
    with pytest.raises(ValueError, match="ONNX unchanged"):
        export_onnx(net, x, old)
    assert old.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "new"]
    # and an error that is allowed replaces it
    if error == 1e-3:
        export_onnx(net, x, old, tolerance=2e-3)
        assert old.read_bytes() == b"half of a file"


def test_the_tolerance_is_relative_to_large_outputs_only(exporting, tmp_path):
    net, x = convolutions()
    exporting.wrong_at, exporting.error = (5,), 0.05
    with torch.no_grad():
        net[-1].weight.zero_()
        net[-1].bias.fill_(1000.0)
    export_onnx(net, x, tmp_path / "net.onnx", tolerance=1e-4)
    with torch.no_grad():
        net[-1].bias.fill_(0.001)
    with pytest.raises(ValueError, match=r"allowed: 1\.000e-04"):
        export_onnx(net, x, tmp_path / "net.onnx", tolerance=1e-4)


@pytest.mark.parametrize("what", ["export", "save"])
def test_a_program_that_fails_leaves_nothing(monkeypatch, tmp_path, what):
    net, x = convolutions()

    def fail(*arguments, **options):
        if what == "save":
            with open(arguments[1], "wb") as file:
                file.write(b"half of a file")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch.export, what, fail)
    if what == "save":
        monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    path = tmp_path / "net.pt2"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="no space left"):
        export_program(net, x, path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    assert path.read_bytes() == b"before"
    assert net.training


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, missing):
    for name in ("onnxruntime", "onnxscript"):
        if name != missing:
            pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, missing, None)
    net, x = convolutions()
    with pytest.raises(ImportError, match=r"pyro-bmrs\[onnx\].*" + missing):
        export_onnx(net, x, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


# precision


def halves(net, x, dtype):
    return net.to(dtype), x.to(dtype)


def attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 3)), torch.randn(4, 5, 16)


def hidden():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 8)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        (convolutions, torch.float16),
        pytest.param(attention, torch.float16, marks=pytest.mark.slow),
        pytest.param(attention, torch.float64, marks=pytest.mark.slow),
        (hidden, torch.float64),
    ],
)
def test_other_precisions_have_their_own_tolerance(family, dtype, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = halves(*family(), dtype)
    path = export_onnx(net, x, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    (want,) = outputs(net, x)
    assert torch.from_numpy(found).dtype == want.dtype == dtype
    allowed = {torch.float16: 1e-2, torch.float64: 1e-10}[dtype]
    assert (torch.from_numpy(found) - want).abs().max() <= allowed * max(1, want.abs().max())


@pytest.mark.parametrize(
    ("family", "dtype", "says"),
    [
        (
            convolutions,
            torch.float64,
            "network must be of float32 or float16 where it has convolutions.*float64 with 0'",
        ),
        (
            convolutions,
            torch.bfloat16,
            "network must be of float64, float32, float16 for onnxruntime.*bfloat16'",
        ),
        (hidden, torch.bfloat16, r"as network.float\(\) is: got 'bfloat16'"),
        (hidden, torch.float8_e4m3fn, "got 'float8_e4m3fn'"),
    ],
)
def test_a_precision_that_onnxruntime_has_not_is_refused_before_any_work(
    exporting, tmp_path, family, dtype, says
):
    net, x = halves(*family(), dtype)
    with pytest.raises(ValueError, match=says):
        export_onnx(net, x, tmp_path / "new" / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_operation_that_onnxruntime_has_not_is_one_line(tmp_path):
    """A convolution that is no module is only found by running the file."""
    pytest.importorskip("onnxruntime")

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 1, 3, 3, dtype=torch.float64))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight)

    with pytest.raises(
        ValueError, match=r"onnxruntime has in its precision, here float64: got NotImplemented: .*Conv"
    ):
        export_onnx(Function(), torch.ones(2, 1, 4, 4, dtype=torch.float64), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tolerance", [0, -1e-3, float("nan"), "small"])
def test_a_bad_tolerance(exporting, tmp_path, tolerance):
    net, x = convolutions()
    with pytest.raises(ValueError, match="tolerance must be a positive number or None: got"):
        export_onnx(net, x, tmp_path / "net.onnx", tolerance=tolerance)


def test_the_difference_and_the_tolerance_are_told(exporting, tmp_path):
    net, x = convolutions()
    exporting.wrong_at, exporting.error = (5,), 0.5
    with pytest.raises(
        ValueError, match=r"differs by 5\.00\de-01 \(allowed: \d\.\d+e-02, from tolerance 0\.01\)"
    ):
        export_onnx(net.half(), x.half(), tmp_path / "net.onnx")


def test_files_hold_what_inputs_must_look_like(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = hidden()
    told = {"mean": [0.5], "class_names": ["Katze", "Hündin"]}
    export_program(net, x, tmp_path / "net.pt2", inputs=told)
    extra = {"inputs.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["inputs.json"]) == told
    export_onnx(net, x, tmp_path / "net.onnx", inputs=told)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["inputs"]) == told


def test_a_compiled_network_is_exported_as_the_plain_one(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    path = export_program(torch.compile(net, backend="eager"), torch.zeros(2, 3), tmp_path / "small.pt2")
    x = torch.randn(5, 3)
    torch.testing.assert_close(torch.export.load(path).module()(x), net(x))
