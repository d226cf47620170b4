"""Several processes, one run: torchrun --nproc_per_node=8 train_sft.py ...

Every process has the model and all the data, draws the same random numbers and works on its share of each batch. What
it computes are sums over its rows, divided by the one denominator of the whole batch, so gradients and statistics only
have to be added up: without dropout, N processes make the same steps as one. There is no wrapper around the model, but
one all-reduce of all gradients per step: for a model that fits on a GPU it costs little next to a large batch.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist

from nanopost.config import UserError
from nanopost.data import Batch

MOST_STATISTICS = 64  # per step; a process without rows does not know how many the others have


def start(device: str) -> tuple[str, int, int]:
    """(this process's device, its rank, the number of processes; without torchrun: 0 of 1). Only the first process
    prints, except errors. Raises UserError if all would share one GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device, 0, 1
    if device.startswith("cuda:"):
        raise UserError(f"--device {device}: with several processes each has a GPU of its own; give cuda, or nothing")
    if device == "cuda" or device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)  # before anything else touches the first GPU
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return device, dist.get_rank(), dist.get_world_size()


def is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def shard(rows):
    """This process's share of the rows of a batch, a list or a tensor: every N-th, so that sorted rows are dealt out
    evenly. It may be empty, but not for the first process."""
    return rows[dist.get_rank() :: dist.get_world_size()] if is_distributed() else rows


def all_reduce_gradients(parameters: list):
    """Makes every process's gradients the sum of all of theirs."""
    if not is_distributed():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


def all_reduce(stats: dict, device) -> dict:
    """The statistics of the whole batch from those of the processes' shares, which are sums over one denominator. A
    process without rows passes an empty dict, and gets one."""
    if not is_distributed():
        return stats
    values = torch.zeros(MOST_STATISTICS, dtype=torch.float64, device=device)
    for i, value in enumerate(stats.values()):
        values[i] = value
    dist.all_reduce(values)
    return dict(zip(stats, values.float()))


def all_gather(x: torch.Tensor | Batch):
    """The rows of all processes' shares, put back in their order: a Batch or a tensor (n,) or (n, m), on the CPU. Where
    m differs between processes, rows are filled with zeros (False) on the right."""
    if not is_distributed():
        return x
    if isinstance(x, Batch):
        return Batch(**{name: all_gather(tensor) for name, tensor in x.tensors().items()})
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    flat = parts[0].dim() == 1  # the first process always has rows
    shape = [max(part.shape[1] for part in parts if len(part))] if not flat else []
    rows = parts[0].new_zeros(sum(map(len, parts)), *shape)
    for rank, part in enumerate(parts):
        mine = rows[rank :: len(parts)]  # what shard() gave it
        if len(part):
            (mine if flat else mine[:, : part.shape[1]]).copy_(part)
    return rows


def broadcast(modules: dict):
    """All processes begin with the first one's weights."""
    if is_distributed():
        for module in modules.values():
            for p in module.parameters():
                dist.broadcast(p.data, 0)


def barrier():
    """Waits until all processes are here, at the end of a run. A failed process never gets here and skips the teardown;
    torchrun stops the rest."""
    if is_distributed():
        dist.barrier()
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)
