"""A stand-in for other devices, without a GPU: it marks CPU tensors as being on another device, and refuses every
operation that mixes tensors with different marks, as CUDA does."""

import copy
import itertools

import torch
from torch.overrides import TorchFunctionMode

ELSEWHERE, THIRD = torch.device("cuda", 0), torch.device("cuda", 1)
INDEXING = ("__getitem__", "__setitem__", "index_put", "index_put_")  # CUDA accepts index tensors on the CPU
LEAVES = ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "size", "dim", "__len__")


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


def place(x):
    """The device that a tensor is marked with, or None."""
    return getattr(x, "elsewhere", None)


class Elsewhere(TorchFunctionMode):
    """A mode that marks tensors moved to another device, created there or computed from marked tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        given = [x for x in tensors([args, kwargs]) if x.ndim]
        there = next(filter(None, map(place, tensors([args, kwargs]))), None)
        if name == "__get__" and getattr(function, "__self__", None) is torch.Tensor.device:
            return there or torch.device("cpu")
        if name == "grad":  # each gradient is where its input is, whatever the other inputs
            made = function(*args, **kwargs)
            for x, source in zip(made, args[1]):
                x.elsewhere = place(source)
            return made
        if name == "numpy" and there:
            raise TypeError("can't convert a tensor that is elsewhere to numpy")
        places = [x for x in itertools.chain(args, kwargs.values()) if isinstance(x, (str, torch.device))]
        to = next((torch.device(x) for x in places if str(x).split(":")[0] in ("cpu", "cuda")), None)
        if name in ("to", "type_as") or to is not None:
            args = tuple("cpu" if isinstance(x, torch.device) else x for x in args)
            kwargs = {k: "cpu" if isinstance(x, torch.device) else x for k, x in kwargs.items()}
        else:
            checked = given[:1] if name in INDEXING else given
            if name in ("__setitem__", "index_put", "index_put_") and len(given) > 1:
                checked = [given[0], given[-1]]
            indices = given[1:] if name in INDEXING else []
            mixed = {*map(place, checked)} - {there} or {*map(place, indices)} - {there, None}
            if mixed and name not in LEAVES:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if to is not None:
            there = to if to.type == "cuda" else None
        elif name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            there = place(args[1])
        made = function(*args, **kwargs)
        if name == "to" and made is args[0] and there != place(made):
            made = made.view_as(made)
        if name == "cpu" and there:
            return made.view_as(made) if made is args[0] else made
        for x in tensors([made]) if there and name not in LEAVES else ():
            x.elsewhere = there
        return made


def mark(module, device):
    for x in itertools.chain(module.parameters(), module.buffers()):
        x.elsewhere = device


def moved(host):
    """A copy of a host whose parameters and buffers are all marked."""
    model = copy.deepcopy(host.model)
    mark(model, ELSEWHERE)
    return type(host)(model, None, host.name)
