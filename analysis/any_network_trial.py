"""One public network, in this process: structures, noise, removal, and a comparison. Used by any_network.py."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from output_layers import output_layers
from public_networks import PublicNetwork
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import pyro_bmrs as bmrs
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.groups import StructureGroup, cuts_of
from pyro_bmrs.networks.hooked_noise import hooked_noise
from pyro_bmrs.networks.inputs import Inputs, as_double, call, tensors_of
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import at_one, fixed_scales
from pyro_bmrs.networks.precision import InDouble
from pyro_bmrs.networks.surgery import EqualityError, remove_structures

Report = Callable[..., None]
TOLERANCE, TOLERANCE_OF_ROUNDING, TOLERANCE_IN_SINGLE = 1e-10, 1e-6, 1e-5
# Smaller networks are in float64 before anything is removed, so that folding θ into weights does not round.
LARGE = 200_000_000
LEAST_SPREAD = 1e-3
# Parts of the names of parameters that are embeddings, where they are not those of an nn.Embedding.
TABLES = (
    "pos_embed", "position_embed", "positional_embed", "relative_position", "rel_pos", "position_bias",
    "attention_bias", "cls_token", "class_token", "class_embedding", "dist_token", "mask_token", "distillation_token",
)  # fmt: skip


def tried(network: PublicNetwork, mode: str, timeout: float) -> None:
    """Print what is found about the network, as JSON, a line for each step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    out = sys.stdout

    def report(**values: Any) -> None:
        print(json.dumps(values), file=out, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        _of(mode)(network, report, Budget(timeout))


def _of(mode: str) -> Callable[[PublicNetwork, Report, Budget], None]:
    if mode == "peer":
        from any_network_peer import pruned

        return pruned
    return {"check": checked, "ours": reduced}[mode]


class Budget:
    """Seconds of the processor for the steps that count. Where they run out, the process ends by SIGXCPU."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.used = seconds, 0.0

    @contextlib.contextmanager
    def spent(self) -> Iterator[None]:
        """A context whose time counts."""
        begin = time.process_time()
        until = int(begin + self.seconds - self.used) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            self.used += time.process_time() - begin


def checked(network: PublicNetwork, report: Report, budget: Budget) -> None:
    """Build the network and call it: does it run, and do its outputs depend on its inputs?"""
    with budget.spent():
        net = network.build()
        report(parameters=parameters(net))
        with torch.no_grad():
            call(net, network.inputs())
    report(seconds=round(budget.used, 2), peak_mb=peak())
    net, precision = in_double(net, network.inputs())
    randomise(net, network.inputs(), precision)
    with torch.no_grad():
        outputs = call(net, cast(network.inputs(), precision))
    report(precision=precision, spread=spread_of(outputs), status="handled")


def reduced(network: PublicNetwork, report: Report, budget: Budget) -> None:
    """Structures, noise, removal of a half, comparison; and the share that can go."""
    net, example = network.build(), network.inputs()
    report(parameters=parameters(net))
    try:
        with budget.spent():
            noisy = bmrs.insert_noise(net, example)
    except ValueError as error:  # StructureError too
        report(status="refused", error=_line(error), seconds_insertion=round(budget.used, 2), peak_mb=peak())
        return
    except Exception as error:
        report(status="error", error=_line(error), peak_mb=peak())
        return
    insertion = budget.used
    groups = [group for noise in hooked_noise(noisy).values() for group in noise.groups.values()]
    report(
        seconds_insertion=round(insertion, 2), groups=len(groups), structures=sum(g.features for g in groups)
    )
    del net  # a user may have kept it; the noisy network is what is reduced
    precision = "float32"
    if parameters(noisy) <= LARGE:
        noisy, precision = in_double(noisy, example)
    torch.manual_seed(1)
    randomise(noisy, example, precision)
    kept = halves(groups)
    folded = {site: 0.5 + torch.rand(len(keep), dtype=torch.float64) for site, keep in kept.items()}
    if precision == "float32":
        folded = {site: torch.ones_like(theta) for site, theta in folded.items()}
    try:
        with budget.spent():
            surgery = remove_structures(noisy, kept, folded, cast(example, precision))
    except (EqualityError, ValueError) as error:
        report(status="wrong", error=_line(error), seconds=round(budget.used, 2), peak_mb=peak())
        return
    report(seconds=round(budget.used, 2), peak_mb=peak(), checked=surgery.difference)
    small = surgery.network
    if parameters(noisy) > LARGE:
        noisy, precision = in_double(noisy, example)
        small = small.double() if precision == "float64" else small
    thetas = {site: torch.where(kept[site], folded[site], 0.0) for site in kept}
    report(precision=precision, **compared(noisy, small, thetas, network.inputs, precision))
    report(share_removable=share_removable(noisy, groups, cast(example, precision)))
    del noisy, small, surgery
    found = bmrs.structures(network.build(), example)
    report(refused=sum(r.channels for r in found.refused if getattr(r, "unsupported", False)))


def compared(
    noisy: nn.Module,
    small: nn.Module,
    thetas: Mapping[str, Tensor],
    inputs: Callable[[], Inputs],
    precision: str,
) -> dict[str, Any]:
    """Status, difference and spread of the two networks on new inputs."""
    torch.manual_seed(2)
    x = cast(inputs(), precision)

    def exactly() -> contextlib.AbstractContextManager[Any]:
        return InDouble() if precision == "float64" else contextlib.nullcontext()

    with torch.no_grad(), fixed_scales(noisy, thetas), exactly():
        wanted = call(noisy, x)
    spread = spread_of(wanted)
    try:
        with torch.no_grad(), exactly():
            found = call(small, x)
    except Exception as error:
        return {"status": "wrong", "spread": spread, "error": _line(error)}
    apart = differ(wanted, found)
    others = {site: theta.clone() for site, theta in thetas.items()}
    for theta in others.values():
        theta[torch.nonzero(theta == 0.0)[0]] = 1.0
    with torch.no_grad(), fixed_scales(noisy, others):
        control = differ(wanted, call(noisy, x))
    allowed = TOLERANCE if precision == "float64" else TOLERANCE_IN_SINGLE
    if allowed < apart <= TOLERANCE_OF_ROUNDING and 10 * _rounding(noisy, thetas, x, wanted) >= apart:
        allowed = TOLERANCE_OF_ROUNDING
    status = "wrong" if not apart <= allowed else "error" if spread < LEAST_SPREAD else "handled"
    words = {"error": "outputs hardly depend on inputs"} if status == "error" else {}
    return {"status": status, "difference": apart, "control": control, "spread": spread} | words


@torch.no_grad()
def _rounding(noisy: nn.Module, thetas: Mapping[str, Tensor], x: Inputs, wanted: Any) -> float:
    """How much the outputs change with the last bits of the weights. The weights stay changed."""
    for parameter in noisy.parameters():
        parameter.mul_(1 + 2.0**-52 * torch.randn_like(parameter))
    with fixed_scales(noisy, thetas):
        return differ(wanted, call(noisy, x))


def differ(wanted: Any, found: Any) -> float:
    """Largest difference of two outputs, relative to the spread of `wanted`; infinite where they can't be compared."""
    worst = 0.0
    pairs = tensors_of(wanted), tensors_of(found)
    if len(pairs[0]) != len(pairs[1]):
        return float("inf")
    for one, other in zip(*pairs, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if not one.is_floating_point():
            worst = worst if torch.equal(one, other) else float("inf")
        elif one.numel():
            distance = (one - other).masked_fill(one == other, 0.0).abs().max()  # equal infinities
            worst = max(worst, float(distance) / max(*_spread_and_hundredth(one), 1e-300))
            worst = worst if worst == worst else float("inf")
    return worst


def _spread_and_hundredth(output: Tensor) -> tuple[float, float]:
    values = torch.where(output.isfinite(), output, 0.0)
    return float((values - values.mean(0, keepdim=True)).abs().max()), 0.01 * float(values.abs().max())


def spread_of(outputs: Any) -> float:
    """The largest spread over examples, relative to the size of its output."""
    spreads = [
        spread / (100 * hundredth)
        for spread, hundredth in (
            _spread_and_hundredth(t) for t in tensors_of(outputs) if t.is_floating_point() and t.numel()
        )
        if hundredth
    ]
    return max(spreads, default=0.0)


def in_double(net: nn.Module, example: Inputs) -> tuple[nn.Module, str]:
    """The network in float64, in place, if it runs so; and the precision."""
    net.double()
    try:
        with torch.no_grad(), at_one(net):
            call(net, as_double(example))
    except (RuntimeError, ValueError):
        return net.float(), "float32"
    return net, "float64"


def cast(example: Inputs, precision: str) -> Inputs:
    return as_double(example) if precision == "float64" else example


@torch.no_grad()
def randomise(net: nn.Module, example: Inputs, precision: str) -> None:
    """Random weights of every parameter, so that outputs depend on all of them, and matching BatchNorm statistics."""
    convolved = {id(m.weight) for m in net.modules() if hasattr(m, "kernel_size") and hasattr(m, "weight")}
    for name, parameter in net.named_parameters():
        if parameter.dim() < 2:
            # in large biases what varies with the input would drown, layer by layer
            mean, std = (0.0, 0.1) if name.endswith("bias") else (1.0, 0.3)
            parameter.normal_(mean, std)
        elif parameter.dim() == 3 and id(parameter) not in convolved:
            # weights of several experts, in either layout
            parameter.normal_(std=2**0.5 * (parameter.shape[1] * parameter.shape[2]) ** -0.25)
        else:
            parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
    net.eval()
    normalisations = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in normalisations:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    if normalisations:
        with at_one(net):
            call(net, cast(example, precision))
    net.eval()


def halves(groups: Iterable[StructureGroup]) -> dict[str, Tensor]:
    """What stays: each structure with probability one half, and at least one of each group goes and one stays."""
    groups = list(groups)
    kept = {}
    for group in groups:
        order = torch.randperm(group.features)
        kept[group.site] = torch.rand(group.features) < 0.5
        kept[group.site][order[0]], kept[group.site][order[-1]] = False, True
    return _with_parts(groups, kept)


def _with_parts(groups: list[StructureGroup], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some part of a structure that stays must stay too."""
    for inner, outers in Nesting.of(groups).owners.items():
        for outer, owner in outers.items():
            kept[inner] |= owner == int(torch.nonzero(kept[outer])[0])
    return kept


def share_removable(noisy: nn.Module, groups: list[StructureGroup], example: Inputs) -> float | None:
    """The share of the parameters, without embeddings and output layers, that can go. The network is cut."""
    with torch.enable_grad(), at_one(noisy):
        for parameter in noisy.parameters():
            parameter.requires_grad_(True)
        last = output_layers(noisy, call(noisy, example), through_sums=False)
    aside = {id(p) for path in last for p in noisy.get_submodule(path).parameters(recurse=False)}
    aside |= {id(m.weight) for m in noisy.modules() if isinstance(m, nn.Embedding)}
    counted = [
        name
        for name, parameter in noisy.named_parameters()
        if id(parameter) not in aside and not any(part in name for part in TABLES)
    ]

    def size() -> int:
        return sum(noisy.get_parameter(name).numel() for name in counted)

    before = size()
    kept = {group.site: torch.arange(group.features) == 0 for group in groups}
    cuts_of(noisy, groups, _with_parts(groups, kept)).cut(noisy)
    return round(1 - size() / before, 5) if before else None


def peak() -> float:
    """The largest resident memory of this process in MiB.

    `getrusage` would begin with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
