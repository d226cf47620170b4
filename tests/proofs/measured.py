"""`python -m pytest tests/proofs --measured` prints the error that every test measured, and its bound."""

import os

import torch

MEASURED = {}  # test -> (largest error over its parameters, the bound)


def at_most(error, bound, words=""):
    """Asserts error <= bound, and keeps both for the table. words: what to say if it is not."""
    error = float(error.detach() if isinstance(error, torch.Tensor) else error)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split("[")[0].split(" ")[0]
    MEASURED[test] = max(MEASURED.get(test, (-1.0, bound)), (error, bound))
    assert error <= bound, words or f"{error:.3g} is more than {bound:.3g}"


def distance(a, b):
    """The largest difference between two tensors, or between two lists of tensors."""
    pairs = zip(a, b, strict=True) if isinstance(a, (list, tuple)) else [(a, b)]
    return max((x - y).abs().max().item() for x, y in pairs)


def relative(a, b):
    """The norm of the difference between two gradients (lists of tensors), as a share of the second one's norm."""
    difference = sum(((x - y) ** 2).sum() for x, y in zip(a, b, strict=True))
    return (difference / sum((y**2).sum() for y in b)).sqrt().item()


def cosine(a, b):
    """Of the angle between two gradients (lists of tensors): 1 if they point the same way."""
    a, b = (torch.cat([x.flatten() for x in gradient]) for gradient in (a, b))
    return (a @ b / (a.norm() * b.norm())).item()


def same_gradient(found, right, bound):
    """at_most(relative(found, right), bound), told in words: by how much it is turned, or how long it is."""
    angle = cosine(found, right)
    length = (sum((x**2).sum() for x in found) / sum((x**2).sum() for x in right)).sqrt().item()
    turned = f"cosine {angle:.2f}: is the end token left out, or a mean taken for every answer?"
    at_most(
        relative(found, right), bound, turned if angle < 0.999 else f"right, but for its length: times {length:.3g}"
    )
