"""nn.Linear, on a CPU with AVX-512 by way of oneDNN."""

import torch
import torch.nn as nn
import torch.nn.functional as F

CAPABILITY = torch.backends.cpu.get_cpu_capability()  # AVX512, AVX2, DEFAULT, ...
# Decided by capability and not by a timing: a run must compute the same every time. Measured on AMD processors only:
# with AVX-512 the detour is faster, with AVX2 alone slower. Everything else is left to PyTorch.
ONEDNN = CAPABILITY == "AVX512" and torch.backends.mkldnn.is_available()
FEW_ROWS, FEW_NUMBERS = 128, 2**15  # below these the detour costs more than it saves


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear: x (..., I), weight (O, I), bias (O,) -> (..., O). In fp32 with AVX-512, as a 1x1 convolution.

    It is the same sum, but PyTorch gives F.linear to MKL, which leaves AVX-512 unused on AMD processors, and a
    convolution to oneDNN, which uses it. dilation=2 is a no-op for a 1x1 kernel but keeps single-threaded PyTorch from
    choosing MKL here too.
    """
    if x.device.type != "cpu":  # first: a compiled graph shall not depend on what follows
        return F.linear(x, weight, bias)
    if not ONEDNN or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if x.shape[:-1].numel() < FEW_ROWS or x.numel() < FEW_NUMBERS:
        return F.linear(x, weight, bias)
    image = x.reshape(1, 1, -1, x.shape[-1])  # (1, 1, rows, I)
    image = image.permute(0, 3, 1, 2)  # (1, I, 1, rows): channels last, nothing is copied
    y = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)  # (1, O, 1, rows)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)
