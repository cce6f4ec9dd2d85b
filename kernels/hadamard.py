"""Hadamard matrices, which spread variance evenly over channels in PHI-S (E1).

Shape letters: n the order, q a prime.
"""

import math

import torch
from scipy.linalg import hadamard as sylvester


def hadamard(n):
    """A Hadamard matrix of order n (entries +-1, orthogonal rows), float64; None where no construction here reaches n.

    Sylvester doubling, Paley I (n - 1 prime, 3 mod 4) and Paley II (n / 2 - 1 prime, 1 mod 4), and their doublings.
    """
    if n & (n - 1) == 0:
        return torch.from_numpy(sylvester(n)).double()
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 2 == 0 and (half := hadamard(n // 2)) is not None:
        return torch.kron(two, half)
    if n % 4 == 0 and is_prime(n - 1):
        return paley_core(n - 1, -1) + torch.eye(n, dtype=torch.float64)
    if n % 8 == 4 and is_prime(n // 2 - 1):
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(paley_core(n // 2 - 1, 1), two) + torch.kron(torch.eye(n // 2), diagonal)
    return None


def is_prime(q):
    return q > 1 and all(q % f for f in range(2, math.isqrt(q) + 1))


def paley_core(q, sign):
    """[q + 1, q + 1], orthogonal rows: zero diagonal, +-1 elsewhere, the first column `sign` times the first row."""
    square = torch.full((q,), -1.0, dtype=torch.float64)
    square[[x * x % q for x in range(1, q)]] = 1
    square[0] = 0
    i = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = square[(i[:, None] - i) % q]
    core[0, 1:], core[1:, 0] = 1, sign
    return core
