"""Triton kernels run in its interpreter where there is no GPU; triton reads the variable once, when first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
