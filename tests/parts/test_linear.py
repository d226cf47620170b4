"""nn.Linear by way of oneDNN's convolution: the same product, and only where it may pay. On any processor."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nanopost import linear as linear_file
from nanopost.linear import linear
from nanopost.model import GPT, GPTConfig

UNIT = 2.0**-24  # the unit roundoff of fp32


@pytest.fixture
def convolutions(monkeypatch):
    """Turns the detour on, whatever the processor. A list of the shapes that go through a convolution."""
    shapes, conv2d = [], F.conv2d
    monkeypatch.setattr(linear_file, "ONEDNN", True)
    monkeypatch.setattr(F, "conv2d", lambda x, *rest, **options: shapes.append(x.shape) or conv2d(x, *rest, **options))
    return shapes


def product(function, dtype, x, weight, bias, upstream):
    """y, and the gradients of (y * upstream).sum()."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*inputs)
    return [y, *torch.autograd.grad((y * upstream.to(dtype)).sum(), inputs)]


@pytest.mark.parametrize("shape", [(300, 128), (7, 61, 128), (256, 1, 128), (2, 3, 50, 128)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_convolution_is_the_matrix_product_and_so_are_its_gradients(shape, biased, convolutions):
    """A sum of n products of fp32 is off by at most (n+2) u sum |x w|, in whatever order they are added."""
    tensors = [
        torch.randn(shape),
        torch.randn(96, 128),
        torch.randn(96) if biased else None,
        torch.randn(*shape[:-1], 96),
    ]
    ours = product(linear, torch.float32, *tensors)
    exact = product(F.linear, torch.float64, *tensors)
    of_sizes = product(F.linear, torch.float64, *[None if t is None else t.abs() for t in tensors])
    assert len(convolutions) == 1
    rows = exact[0].shape[:-1].numel()
    terms = [128 + 1, 96, rows, rows]  # added up in y, and in the gradients of x, weight and bias
    for n, a, b, size in zip(terms, ours, exact, of_sizes):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert ((a.double() - b).abs() <= (n + 2) * UNIT * size).all()


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(300, 128).double(),
        torch.ones(200, 128),
        torch.ones(127, 512),
        torch.ones(300, 128).bfloat16(),
        torch.ones(300, 128, device="meta"),
    ],
    ids=["double", "few numbers", "few rows", "bf16", "another device"],
)
def test_everything_else_goes_to_pytorch(x, convolutions):
    assert linear(x, x.new_ones(5, x.shape[-1])).shape == (*x.shape[:-1], 5) and not convolutions


def test_under_autocast_and_without_onednn_it_goes_to_pytorch(convolutions, monkeypatch):
    x, w = torch.randn(300, 128), torch.randn(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    monkeypatch.setattr(linear_file, "ONEDNN", False)
    assert torch.equal(linear(x, w), F.linear(x, w)) and not convolutions


def test_the_detour_needs_a_pytorch_with_onednn():
    assert torch.backends.mkldnn.is_available() or not linear_file.ONEDNN


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_only_avx512_takes_the_detour(capability):
    """Decided by what PyTorch says of the processor, in a process that plays a lesser one."""
    code = "from nanopost.linear import CAPABILITY, ONEDNN; print(CAPABILITY, ONEDNN)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name, detour = done.stdout.split()
    assert detour == "False" and name != "AVX512"


def test_all_matrices_of_a_model_are_multiplied_by_linear(convolutions):
    model = GPT(GPTConfig(200, 64, n_layer=2, n_head=2, n_embd=64))
    model.logits(model(torch.zeros(10, 64, dtype=torch.long)))
    assert len(convolutions) == 2 * 4 + 1  # four in each layer, and the output matrix
