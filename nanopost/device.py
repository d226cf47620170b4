"""Where the computation runs: the device by its name, its precision, copies to it."""

import re

import torch

from nanopost.config import UserError


def find_device(name: str) -> torch.device:
    """The device of this name, made current; auto is the first GPU if there is one. Raises UserError if it is
    unavailable."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?|mps", name):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:1 (the second GPU) or mps, not {name}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for every shape, and ours vary
    return device


def best_dtype(device: torch.device) -> str:
    """bf16 where the GPU computes in it, else fp16; fp32 on everything else."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def to_device(x: torch.Tensor, device) -> torch.Tensor:
    """Copies a host tensor to the device, asynchronously from pinned memory on CUDA."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
