"""Processes and devices. torchrun starts the processes (CPU or GPU, one node or several). One
process without torchrun is the normal case, in which every function here also works.

    device = pick_device("auto")
    init_distributed(device)            # before any call of rank() and world_size()
    model = wrap_ddp(model, device)     # DDP if there are several processes
    keys = all_gather(keys)             # (B, ...) of each process -> (world*B, ...)
"""
import atexit
import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Devices

# Dense bf16 peak in TFLOP/s by GPU name (data sheets). On other devices, and for fp32 on any
# device, the peak is measured.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125,
         "L4": 121, "RTX 4090": 165, "RTX 3090": 71}


def pick_device(name="auto"):
    """auto: this process's GPU, else the CPU. Raises ValueError for a missing device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", name)
    if not found:
        raise ValueError(f"--device {name!r}: cuda, cuda:1, cpu or auto")
    if found[1] == "cpu":
        return torch.device("cpu")
    if found[2] and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {name} is one GPU for all processes of torchrun: leave it out, "
                         f"and choose GPUs with the environment variable CUDA_VISIBLE_DEVICES")
    index = int(found[2] or os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there is no GPU {index}, torch finds "
                         f"{torch.cuda.device_count()}; try --device cpu or fewer processes")
    return torch.device("cuda", index)


def pick_precision(name, device):
    """auto: bf16 on GPUs from Ampere on and on CPUs with bf16 instructions, else fp32."""
    if name not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision {name!r}: bf16, fp32 or auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads > 1)})"


def peak_flops(device, precision):
    """FLOP/s that MFU refers to: from the data sheet (PEAKS), else measured."""
    listed = PEAKS if precision == "bf16" else {}
    for gpu, peak in listed.items():
        if re.search(rf"\b{gpu}\b(?! (NVL|Ti|Laptop)|.*\bMIG\b)", device_name(device)):
            return 1e12 * peak
    return measure_peak(device, precision)


def measure_peak(device, precision):
    """FLOP/s of a square matrix product, best of five, or of as many as fit in a second."""
    size = 8192 if device.type == "cuda" else 2048       # a smaller one does not fill a GPU
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, times = torch.ones(size, size, device=device, dtype=dtype), []
    while len(times) < 5 and sum(times) < 1:
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def peak_memory(device):
    """Peak memory of this process in GiB; on a GPU, of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20                  # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def total_memory(device):
    """Memory of the GPU, or of the machine, in GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def choose_threads(device):
    """On a CPU, unless $OMP_NUM_THREADS is set: lets torch compute with no more threads than there
    are cores that other processes leave idle, at least with one. After every operation the threads
    wait for each other, so one that has no core delays all: two on two cores, one of which is in
    use, are slower than one. Returns a sentence for the log if there are fewer threads than usual,
    else "". Call it after init_distributed(), which divides the cores among several processes."""
    usual = torch.get_num_threads()
    if usual == 1 or device.type != "cpu" or world_size() > 1 or os.environ.get("OMP_NUM_THREADS"):
        return ""
    used, cores = used_cores(), len(allowed_cores())
    threads = max(1, math.floor(cores - used + 0.25))    # a quarter of a core in use: no matter
    if threads >= usual:
        return ""
    torch.set_num_threads(threads)
    return (f"other processes use {used:.1f} of {cores} CPU cores: {threads} instead of {usual} "
            f"threads; OMP_NUM_THREADS={usual} in front of the command prevents this")


def keep_threads(threads):
    """For a resumed run: lets torch compute with as many threads as before, because sums are
    rounded differently with another number. $OMP_NUM_THREADS has precedence, and there are no more
    threads than usual, as on a machine with fewer cores. Returns a sentence for the log if the
    number differs, else ""."""
    usual = torch.get_num_threads()
    if threads <= usual and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(threads)
    elif threads != usual:
        return (f"number of threads: {threads} before, {usual} now, so that sums are rounded "
                f"differently; OMP_NUM_THREADS={threads} in front of the command prevents this")
    return ""


def used_cores(seconds=0.3, stat=Path("/proc/stat")):
    """Number of cores in use, of those that this process may use, on average over the next
    `seconds`, in which it sleeps. 0.0 if the system does not count it (only Linux does)."""
    try:
        before = read_ticks(stat)
        time.sleep(seconds)
        after = read_ticks(stat)
        used = 0.0
        for core in allowed_cores() & before.keys() & after.keys():
            busy, total = (b - a for a, b in zip(before[core], after[core]))
            used += busy / max(1, total)
        return used
    except (OSError, ValueError):
        return 0.0


def read_ticks(stat):
    """{core: (ticks in use, all ticks)} since the system started."""
    found = {}
    for name, *ticks in map(str.split, stat.read_text().splitlines()):
        if core := re.fullmatch(r"cpu(\d+)", name):
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, ticks[:8])
            busy = user + nice + system + irq + softirq + steal
            found[int(core[1])] = busy, busy + idle + iowait
    return found


def allowed_cores():
    """The CPU cores that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))               # macOS


def keep_memory():
    """Makes glibc keep freed memory instead of returning large tensors to the kernel: the page
    faults cost a small ViT on a CPU a fifth of its speed. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)                                        # mmap threshold
        libc.mallopt(-1, 2**31 - 1)                                      # trim threshold


# --------------------------------------------------------------------------------------------------
# Processes


def init_distributed(device):
    """Joins the process group, if torchrun started several processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif world > 1:                                       # torchrun sets one thread per process
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(allowed_cores()) // processes))
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def worker_context(count):
    """How a DataLoader starts `count` workers: on Linux by fork. Python 3.14 has another default,
    with which every worker imports torch, for seconds."""
    return "fork" if count and sys.platform == "linux" else None


def start_worker(_):
    """Settings of a worker process. Only the main process reacts to signals."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())    # a thread of the main process may hold the inherited one
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kills the workers at exit. Python would send SIGTERM, which they ignore, and wait forever."""
    daemons = [child for child in multiprocessing.active_children() if child.daemon]
    if daemons:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # else the DataLoader reports their end
    for child in daemons:                                  # other processes belong to the caller
        child.kill()


def exit_together():
    """With several processes: waits for all of them, then ends this one with exit code 0, without
    the cleanup of torch.distributed, whose threads sometimes abort a finished process. With one
    process: returns."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap_ddp(module, device):
    """The module, in DDP if there are several processes and parameters to train."""
    if world_size() > 1 and any(p.requires_grad for p in module.parameters()):
        return DistributedDataParallel(
            module, device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
    return module


def unwrap(module):
    return module.module if isinstance(module, DistributedDataParallel) else module


def all_gather(x):
    """(B, ...) of each process -> (world*B, ...), in the order of the ranks. No gradient."""
    x = x.detach().contiguous()
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def all_mean(x):
    """Mean of a tensor over the processes. No gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


# --------------------------------------------------------------------------------------------------
# Batch norm


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes, with gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):                    # every process's loss depends on every input
        return SumOverProcesses.forward(None, grad)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows (..., D) of *all* processes, so that eight normalize as one would
    (torch's SyncBatchNorm has no CPU path). Each process must have the same number of rows."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        if world_size() == 1 or not self.training:
            return super().forward(rows).view(x.shape)
        n = rows.shape[0] * world_size()
        wide = rows.float()
        mean = SumOverProcesses.apply(wide.sum(0)) / n
        var = SumOverProcesses.apply((wide - mean).square().sum(0)) / n     # two passes: exact
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        y = (wide - mean) * (var + self.eps).rsqrt()
        return (y * self.weight + self.bias if self.affine else y).to(x.dtype).view(x.shape)
