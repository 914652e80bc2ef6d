"""A simulated GPU for tests: its tensors have a shape, a type and a device, but no values.

    with gpu.stand_in() as waits:
        (torch.ones(3, device="cuda") @ torch.ones(3)).item()          # fails, as on a GPU

Operations that mix devices fail as on a GPU, and each wait of the host for the GPU is counted.
item() returns 1, a tensor copied to the CPU is all 0, a mask selects everything. Backward passes
work within `backward_passes`. It does not simulate speed, memory and precision.
"""
import collections
import contextlib
import linecache
import sys
from itertools import zip_longest
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
INDEXING = aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default


class GPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = collections.Counter()                  # {line of the repository: how often}

    def wait(self):
        frame = sys._getframe()
        while frame.f_back and Path(frame.f_code.co_filename).parent != ROOT:
            frame = frame.f_back
        file = frame.f_code.co_filename
        self.waits[f"{Path(file).name}: {linecache.getline(file, frame.f_lineno).strip()}"] += 1

    def new(self, *shape, like, dtype=torch.long):
        with self.fake:
            return torch.zeros(shape, dtype=dtype, device=like.device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            if target != "cuda":
                return func(*args, **kwargs)                # all on the CPU: as usual
            if func is aten._to_copy.default and not kwargs.get("non_blocking"):
                self.wait()
            args = tree_map_only(torch.Tensor, self.fake.from_tensor, args)
            with self.fake:
                return func(*args, **kwargs)
        x, *more = args if isinstance(args[0], torch.Tensor) else (args[0][0], None)
        if func is aten._local_scalar_dense.default:        # item(), tolist(), if x:
            self.wait()
            return {torch.bool: True, torch.long: 1}.get(x.dtype, 1.0)
        if func is aten._to_copy.default and target == "cpu":
            self.wait()
            return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if func is aten.copy_.default and x.device != more[0].device:
            if more[1:] != [True]:
                self.wait()
            return x
        if func is aten.equal.default:
            self.wait()
            return True
        if func is aten.nonzero.default:
            self.wait()
            return self.new(x.numel(), x.ndim, like=x)
        if func is aten.bincount.default:
            self.wait()
            return self.new(kwargs.get("minlength") or more[-1], like=x)
        if func is aten._unique2.default:
            self.wait()
            n = x.numel()                                   # values, inverse, counts
            return (self.new(n, like=x, dtype=x.dtype), self.new(*x.shape, like=x),
                    self.new(n, like=x))
        if func in INDEXING:
            indices = [i for i in more[0] if i is not None]
            assert all(i.device.type == "cpu" or i.device == x.device for i in indices), (
                f"indices should be on the CPU or on {x.device}")
            if any(i.dtype == torch.bool for i in indices):
                if func is not aten.index.Tensor:
                    if more[1].numel() > 1:                 # one value for all: no wait
                        self.wait()
                    return x
                self.wait()
                more[0] = [j for i in more[0] for j in (
                    [self.new(i.numel(), like=x)] * i.ndim
                    if i is not None and i.dtype == torch.bool else [i])]
                args = x, *more
        return func(*args, **kwargs)


def made_on_the_cpu(make):
    """torch.tensor or as_tensor, which would write to the device, made to copy from the CPU."""
    def made(data, *, dtype=None, device=None):
        x = data if isinstance(data, torch.Tensor) else make(data, dtype=dtype)
        return x.to(device=device or x.device, dtype=dtype or x.dtype)

    return made


@contextlib.contextmanager
def stand_in():
    """Within this context the device "cuda" can be used. Yields the counter of waits."""
    answers = dict(_lazy_init=None, is_bf16_supported=True, synchronize=None, device_count=1,
                 get_device_name="NVIDIA H100", get_device_capability=(9, 0), set_device=None,
                 max_memory_allocated=0, mem_get_info=(0, 80 * 2**30))
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=answer))
        for name in ("tensor", "as_tensor"):
            made = made_on_the_cpu(getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, made))
        for owner, name, answer in (
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (torch.Tensor, "pin_memory", lambda x, *_: x),
                (FakeTensor, "__format__", lambda *_: "0")):
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield stack.enter_context(GPU()).waits


# ---- gradients -----------------------------------------------------------------------------------


def gradients(loss):
    """{id of a parameter: (parameter, gradient of the loss)}. torch's engine, which starts a thread
    for a GPU, is replaced by a loop over the same formulas."""
    assert loss.dtype == torch.float32 and loss.ndim == 0
    nodes, edges, stack = {id(loss.grad_fn): loss.grad_fn}, collections.Counter(), [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                edges[id(node)] += 1
                if id(node) not in nodes:
                    nodes[id(node)] = node
                    stack.append(node)
    arrived, ready, found = {id(loss.grad_fn): {0: torch.ones_like(loss)}}, [loss.grad_fn], {}
    while ready:
        node = ready.pop()                                  # all of its gradients have arrived
        inputs, outputs = arrived.get(id(node), {}), ()
        if hasattr(node, "variable"):
            found |= {id(node.variable): (node.variable, x) for x in inputs.values()}
        elif inputs:
            call = node.apply if isinstance(node, BackwardCFunction) else node
            outputs = call(*(inputs.get(i) for i in range(len(node._input_metadata))))
            outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        for (after, i), x in zip_longest(node.next_functions, outputs[:len(node.next_functions)]):
            if after is not None:
                if x is not None:
                    x = fit(x, after._input_metadata[i])
                    sums = arrived.setdefault(id(after), {})
                    sums[i] = sums[i] + x if i in sums else x
                edges[id(after)] -= 1
                if not edges[id(after)]:
                    ready.append(after)
    return found


def fit(x, expected):
    """A gradient in the shape and type that the next formula expects. RuntimeError: it is on
    another device; of scalars torch allows that."""
    if x.device != expected.device and x.ndim:
        raise RuntimeError(f"a gradient on device {x.device}, expected on {expected.device}")
    return x.sum_to_size(tuple(expected.shape)).to(expected.device, expected.dtype)


@contextlib.contextmanager
def backward_passes():
    """Within this context loss.backward() and torch.autograd.grad() work on the stand-in."""
    backward, grad = torch.Tensor.backward, torch.autograd.grad

    @torch.no_grad()
    def new_grad(loss, parameters, **options):
        if loss.device.type == "cpu":
            return grad(loss, parameters, **options)
        found = gradients(loss)
        return [found[id(p)][1] for p in parameters]

    @torch.no_grad()
    def new_backward(loss):
        if loss.device.type == "cpu":
            backward(loss)
            return
        for p, x in gradients(loss).values():
            assert (x.shape, x.dtype, x.device) == (p.shape, p.dtype, p.device)
            p.grad = x.clone() if p.grad is None else p.grad + x

    with mock.patch.object(torch.Tensor, "backward", new_backward), \
            mock.patch.object(torch.autograd, "grad", new_grad):
        yield
