"""Which layers make the outputs of a network, read from the graph of its gradients."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyro_bmrs.networks.inputs import tensors_of

CONTRACTIONS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Mv", "Addmv", "Linear")
NORMALISING = ("Norm", "Rsqrt", "Pow", "Var", "Std")


def output_layers(network: nn.Module, outputs: Any, *, through_sums: bool) -> set[str]:
    """Paths of the modules whose weights make the outputs, with no other weights behind.

    Args:
        outputs: of a call in which all parameters required gradients.
        through_sums: whether to look behind normalisations, and behind sums of which a part is made otherwise, as in
            residual streams. Then all layers that write to a stream make an output that is read from it.
    """
    paths = {
        id(parameter): path
        for path, module in network.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    known: dict[Any, set[str]] = {}

    def weights(function: Any, steps: int = 6) -> set[str]:
        """Of a contraction's operand: what it is a view of, or is computed from."""
        if function is None or steps == 0:
            return set()
        if hasattr(function, "variable"):
            parameter = function.variable
            return {paths[id(parameter)]} if id(parameter) in paths and parameter.dim() > 1 else set()
        if any(name in function.name() for name in (*CONTRACTIONS, "Add")):
            return set()
        return set().union(*(weights(above, steps - 1) for above, _ in function.next_functions))

    def made_by(function: Any) -> set[str]:
        name = function.name()
        above = [operand for operand, _ in function.next_functions if operand is not None]
        if name.startswith(CONTRACTIONS):
            found: set[str] = set().union(*(weights(operand) for operand in above))
            if found:
                return found
        above = [operand for operand in above if not hasattr(operand, "variable")]
        if not through_sums and any(word in name for word in NORMALISING):
            return set()
        parts = [known[operand] for operand in above]
        if not through_sums and name.startswith(("Add", "Sub")) and not all(parts):
            return set()
        return set().union(*parts)

    # in the order of the graph, without recursion: networks can be deep
    roots = [tensor.grad_fn for tensor in tensors_of(outputs) if tensor.grad_fn is not None]
    stack = [(root, False) for root in roots]
    while stack:
        function, ready = stack.pop()
        if function in known or hasattr(function, "variable"):
            continue
        if ready:
            known[function] = made_by(function)
        else:
            stack.append((function, True))
            stack += [(above, False) for above, _ in function.next_functions if above is not None]
    return set().union(*(known[root] for root in roots if root in known))
