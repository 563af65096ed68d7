"""The one pass over the data that makes a Laplace posterior: sums over examples, resumable, shared by processes."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions import Categorical
from torch import Tensor, nn

from pyro_bmrs.files import read_tensors, write_tensors
from pyro_bmrs.fitting.checkpoints import digest_of
from pyro_bmrs.fitting.generators import seed_of
from pyro_bmrs.fitting.signals import StopRequest, stop_requests
from pyro_bmrs.inference.batches import Batches
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.inference.likelihoods import Likelihood, Regressor
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.cost import examples_for
from pyro_bmrs.networks.curvature import Moments, moments, own_biases
from pyro_bmrs.networks.inputs import Inputs, check_finite, check_numbers, tensors_of
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.progress import Progress

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Examples on which the loss of smaller networks is measured: at most, at least, and by the work that they make.
_SHOWN, _FEW, _WORK = 2000, 50, 1e11
# A subclass may have another log p.
_OF_CLASSES = torch.distributions.Categorical, Categorical
# Of a file of sums.
_FORMAT = 3
# Tensors of `Moments`.
_SUMS = "inputs", "gradients", "positions", "mean"
# Seconds between two files of the sums so far.
_EVERY = 20.0
# Of a regression whose network fits its data exactly.
_LEAST_VARIANCE = 1e-12


@dataclass
class Sums:
    """What a pass has summed so far.

    Attributes:
        moments: of each layer, by path.
        batches, examples: how many it has seen.
        log_likelihood: Σ log p(y | x, ŵ) over these, with the labels of the data, in nats.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    batches: int = 0
    examples: int = 0
    log_likelihood: float = 0.0

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        tensors = {
            f"{name}.{layer}": getattr(some, name)
            for layer, some in self.moments.items()
            for name in _SUMS
            if getattr(some, name) is not None
        }
        numbers = {
            "batches": self.batches, "examples": self.examples, "log_likelihood": self.log_likelihood,
            "rows": {layer: some.rows for layer, some in self.moments.items()},
        }  # fmt: skip
        write_tensors(
            path, {name: tensor.cpu() for name, tensor in tensors.items()}, {**numbers, "of": dict(identity)}
        )

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any], device: torch.device) -> Sums:
        """What `save` wrote; nothing summed yet, if there is no file, or one of another pass."""
        try:
            header, tensors = read_tensors(path)
            if header["of"] != dict(identity):
                return cls()
            found = {
                layer: Moments(
                    rows=rows,
                    **{
                        name: tensors[f"{name}.{layer}"].to(device)
                        for name in _SUMS
                        if f"{name}.{layer}" in tensors
                    },
                )
                for layer, rows in header["rows"].items()
            }
            return cls(found, header["batches"], header["examples"], header["log_likelihood"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()


def curvature_pass(
    model: Likelihood,
    guide: AutoKroneckerLaplace,
    batches: Batches,
    held_out: Batches | None,
    fabric: Fabric,
    *,
    seed: int,
    checkpoint: Path | None,
    label: str,
    progress: bool,
) -> bool:
    """Sum over the data, and give the guide its posterior.

    Args:
        held_out: data for the scale of a regression; None: those that are summed over, which it may fit too well.

    Returns:
        Whether Ctrl-C or SIGTERM ended the pass early. The guide is then as it was.
    """
    batches = batches.shared(fabric.device, fabric.global_rank, fabric.world_size)
    few = batches.some(1, seed)
    check_numbers("train", few)
    check_finite("model", model.net)
    with untouched(model), _without_priors(model):
        model(*few)  # tells what is wrong with the data before anything changes
    _settle_scale(model, batches if held_out is None else held_out.shared(fabric.device, 0, 1), fabric)
    size = batches.size
    wanted = min(guide.examples, size)
    identity = {
        "format": _FORMAT, "seed": seed, "examples": wanted, "size": size, "batch_size": batches.batch_size,
        "world": fabric.world_size, "widest": guide.widest, "label": label,
        "weights": digest_of(model.state_dict().values()), "data": digest_of(tensors_of(few)),
    }  # fmt: skip
    own = -(-wanted // fabric.world_size)
    together: dict[str, Moments] = {}
    examples, log_likelihood = 0, math.nan
    with (
        stop_requests() as stop, untouched(model, seed=seed, gradients=True), _without_priors(model),
        Progress("curvature", own * len(guide.portions), shown=progress) as bar,
    ):  # fmt: skip
        for number, paths in enumerate(guide.portions):
            file = None
            if checkpoint is not None:
                name = f"{checkpoint.stem}-{fabric.global_rank}-{number}{checkpoint.suffix}"
                file = checkpoint.with_name(name)
            sums = _summed(
                model, {path: guide.layer(path) for path in paths}, batches, fabric, stop, bar,
                widest=guide.widest, own=own, seed=seed, file=file, identity={**identity, "layers": list(paths)},
                losses=not number,
            )  # fmt: skip
            if sums.examples < own and stop.asked:
                return True
            found, examples, likelihood = _all(fabric, sums)
            log_likelihood = log_likelihood if number else likelihood
            if not math.isfinite(log_likelihood):
                raise ValueError(
                    f"train must be finite: log p(y | x) of an example is {log_likelihood} on average"
                )
            together |= {path: some.kept(guide.keep) for path, some in found.items()}
            del sums, found  # the next layers need their room
    with untouched(model):
        guide.shown = batches.some(shown_examples(model.net, few[0]), seed)
    guide.set_moments(together, examples, size, size * log_likelihood)
    return False


def _settle_scale(model: Likelihood, batches: Batches, fabric: Fabric) -> None:
    """The scale of a regression that would learn it, where its likelihood of the data is largest: their root mean
    square error.
    """
    if not (isinstance(model, Regressor) and model.log_scale.requires_grad):
        return
    sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    with untouched(model):
        for x, y in batches:
            given, weights = model.observed(y)
            squares = (given - model.predict(x)).double().square()
            weights = torch.ones_like(squares) if weights is None else weights.double()
            sums += torch.stack([(weights * squares).sum(), weights.sum()])
    total = fabric.all_reduce(sums, reduce_op="sum")
    assert isinstance(total, Tensor)
    if not bool(total.isfinite().all()):
        raise ValueError(f"{batches.name} must be finite: the square error of the network is not")
    with torch.no_grad():
        model.log_scale.copy_((total[0] / total[1]).clamp(min=_LEAST_VARIANCE).log() / 2)


def _summed(
    model: Likelihood, layers: dict[str, nn.Module], batches: Batches, fabric: Fabric, stop: StopRequest, bar: Progress,
    *, widest: int, own: int, seed: int, file: Path | None, identity: Mapping[str, Any],
    losses: bool,
) -> Sums:  # fmt: skip
    """The sums of some layers over `own` examples, from where a file stands; over fewer if a stop is asked.

    Args:
        losses: whether to sum log p(y | x, ŵ), too, which is the same for all layers.
    """
    sums = Sums() if file is None else Sums.load(file, identity, fabric.device)
    generator = torch.Generator().manual_seed(seed)
    biased = own_biases(model.net)
    saved, start, done = time.monotonic(), sums.batches, min(sums.examples, own)
    bar.resume(done)
    for x, y, _, share in batches.epoch(generator, start=start):
        # a last batch that is too small to be shared would count for each process
        if sums.examples >= own or stop.asked or share < 1:
            break
        torch.manual_seed(seed_of(seed, fabric.global_rank, sums.batches))
        _add(sums, model, layers, widest, biased, batches, x, y, losses)
        bar.advance(min(sums.examples, own) - done)
        done = min(sums.examples, own)
        if file is not None and time.monotonic() - saved > _EVERY:
            sums.save(file, identity)
            saved = time.monotonic()
    if file is not None and sums.batches > start:
        sums.save(file, identity)
    return sums


def shown_examples(network: nn.Module, x: Inputs) -> int:
    """On how many examples the loss of smaller networks is measured: fewer of a network that takes long.

    Args:
        x: some examples.
    """
    with in_mode(network, training=False):
        return examples_for(network, x, _WORK, _FEW, _SHOWN)


@contextmanager
def _without_priors(model: Likelihood) -> Iterator[None]:
    """A context in which the weights of the model are those of its network."""
    priors, model.weight_priors = model.weight_priors, {}
    try:
        yield
    finally:
        model.weight_priors = priors


def _add(
    sums: Sums,
    model: Likelihood,
    layers: dict[str, Any],
    widest: int,
    biased: Collection[str],
    batches: Batches,
    x: Any,
    y: Any,
    losses: bool,
) -> None:
    """Add a batch, with gradients that are drawn from the model, not those of its labels."""
    check_numbers("train", (x, y))
    given, weights = model.observed(y)
    counted = torch.ones((), device=given.device) if weights is None else weights.sqrt()
    if not given.is_floating_point():
        counted = counted * (given != getattr(model, "ignore_index", -100))

    def drawn() -> Tensor:
        sites = poutine.trace(model).get_trace(x).nodes
        labels = sites["y"]
        law = labels["fn"]
        if type(law) in _OF_CLASSES:
            chances = law.probs.detach()
            each = (law.logits * _signed(chances, torch.randint_like(chances, 2) * 2 - 1)).sum(-1)
        else:
            # the labels are data: a draw of a normal would follow its mean
            each = law.log_prob(labels["value"].detach())
        # g gᵀ of √w log p is w times that of log p, as the curvature of w log p is
        found: Tensor = (each * counted.to(each.dtype)).sum()
        return found

    moments(layers, drawn, widest, sums.moments, biased)
    with torch.no_grad():
        if not sums.batches:
            batches.count.settle(x, y, poutine.trace(model).get_trace(x, y))
        if losses:
            sums.log_likelihood += float(model.log_likelihood(x, y))
    sums.examples += batches.count(x, y)
    sums.batches += 1


def _signed(probabilities: Tensor, signs: Tensor) -> Tensor:
    """Gradients g by logits, of shape (…, classes): over random signs, the mean of g gᵀ is the curvature H.

    H = diag p − p pᵀ = diag u (I − u uᵀ) diag u with u = √p. The reflection that takes class c, the likeliest, to −u
    takes the other classes to a basis of what is orthogonal to u. g = u ⊙ w: w sums that basis with random signs, as
    Martens, Sutskever and Swersky (2012) do with a root of H. Between two classes nothing is left to chance, where an
    example has one label.

    The gradient of a label that is drawn from p has the same mean of g gᵀ. But where the network is sure, the label
    that says something is drawn once in a thousand examples, while each of these gradients tells of it.
    """
    roots = probabilities.sqrt()
    likeliest, place = roots.max(-1, keepdim=True)
    signs = signs.scatter(-1, place, 0.0)
    along = (signs * roots).sum(-1, keepdim=True)
    orthogonal = signs - along / (1 + likeliest) * roots.scatter_add(-1, place, torch.ones_like(likeliest))
    return roots * orthogonal


def _all(fabric: Fabric, sums: Sums) -> tuple[dict[str, Moments], int, float]:
    """The sums of all processes: moments, examples, and log-likelihood of each example on average."""

    def total(value: Tensor) -> Tensor:
        found = fabric.all_reduce(value.to(fabric.device), reduce_op="sum")
        assert isinstance(found, Tensor)
        return found

    counts = total(torch.tensor([sums.examples, sums.log_likelihood], dtype=torch.float64))
    together = {}
    for path, some in sums.moments.items():
        rows = int(total(torch.tensor(some.rows, dtype=torch.float64)))
        mean = some.mean
        if mean is not None:
            own, some = mean, replace(some)
            mean = total(own * (some.rows / max(rows, 1)))
            some.move(mean - own, some.rows)
        together[path] = Moments(
            total(some.inputs), total(some.gradients), rows,
            None if some.positions is None else total(some.positions), mean,
        )  # fmt: skip
    return together, int(counts[0]), float(counts[1] / counts[0])
