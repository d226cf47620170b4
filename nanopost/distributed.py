"""Several processes, one run: torchrun --nproc_per_node=8 train_sft.py ...

Every process has the model and all the data, draws the same random numbers and works on its share of each batch. What
it computes are sums over its rows, divided by the one denominator of the whole batch, so gradients and statistics have
only to be added up: without dropout, N processes make the steps of one, whatever N is. There is no wrapper around the
model, but one all-reduce of all gradients a step: for a model that fits on a GPU it costs little next to a large batch.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist

from nanopost.config import UserError


def start(device: str) -> tuple[str, int, int]:
    """(the name of this process's device, its rank, how many there are). Only the first one prints, but for errors.
    Without torchrun: 0 of 1. Raises UserError if all were to share one GPU."""
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


def many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def shard(rows):
    """This process's share of the rows of a batch, a list or a tensor: every N-th, so that sorted rows are dealt out
    evenly. It may be empty, but not for the first process."""
    return rows[dist.get_rank() :: dist.get_world_size()] if many() else rows


def add_gradients(parameters: list):
    """Makes every process's gradients the sum of all of theirs."""
    if many():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p)


def add_up(stats: dict, device) -> dict:
    """The statistics of the whole batch from those of the processes' shares, which are sums over one denominator. A
    process without rows has an empty dict, and keeps it."""
    if not many():
        return stats
    values = torch.zeros(64, dtype=torch.float64, device=device)
    for i, value in enumerate(stats.values()):
        values[i] = value
    dist.all_reduce(values)
    return dict(zip(stats, values.float()))


def gather(x, device):
    """The rows of all processes' shares, put back in their order: a tensor, or a dict of them, row by row (n, ...). The
    second dimension may differ from process to process, and is filled with zeros (False) on the right."""
    if not many():
        return x
    if isinstance(x, dict):
        return {name: gather(tensor, device) for name, tensor in x.items()}
    sizes = torch.tensor([len(x), x.shape[1] if x.dim() > 1 else 0], device=device)
    every = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
    dist.all_gather(every, sizes)
    rows, columns = torch.stack(every).amax(0).tolist()
    padded = torch.zeros(rows, *([columns, *x.shape[2:]] if x.dim() > 1 else []), dtype=x.dtype, device=device)
    padded[(slice(len(x)), *[slice(n) for n in x.shape[1:]])] = x.to(device)
    parts = [torch.empty_like(padded) for _ in every]
    dist.all_gather(parts, padded)
    counts = [int(size[0]) for size in every]
    order = torch.cat([torch.arange(sum(counts))[rank :: len(counts)] for rank in range(len(counts))])
    out = torch.cat([part[:count] for part, count in zip(parts, counts)])
    return out[order.argsort().to(device)].to(x.device)


def same_start(modules: dict):
    """All processes begin with the first one's weights."""
    if many():
        for module in modules.values():
            for p in module.parameters():
                dist.broadcast(p.data, 0)


def wait():
    """Until all processes are here, at the end of a run. One that failed does not come, and leaves without a word to
    the others: torchrun ends them."""
    if many():
        dist.barrier()
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)
