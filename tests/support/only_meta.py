"""How device neutrality is tested without a device: everything on `meta`, and no CPU tensor let through."""

import torch
from torch.overrides import TorchFunctionMode


class OnlyMeta(TorchFunctionMode):
    """Fails on any tensor that is not on the meta device (0-dim CPU tensors mix with it silently)."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in (*arguments, *(options or {}).values(), result):
            for member in value if isinstance(value, (list, tuple)) else (value,):
                assert not isinstance(member, torch.Tensor) or member.is_meta, f"{function}: {member}"
        return result
