"""A small convolutional student: python train.py --student recipes/conv.py:student"""

import torch
import torch.nn.functional as F
from torch import nn

from amoe import normalise


class Conv(nn.Module):
    def __init__(self, dim=128, blocks=4):
        super().__init__()
        self.dim, self.stem = dim, nn.Conv2d(3, dim, 16, stride=16)
        self.blocks = nn.ModuleList(self.block(dim) for _ in range(blocks))
        self.special = nn.Linear(dim, 5 * dim)  # the summary and four registers, from the mean over patches

    def block(self, dim):
        spread = (nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.GroupNorm(1, dim))
        return nn.Sequential(*spread, nn.Conv2d(dim, 4 * dim, 1), nn.GELU(), nn.Conv2d(4 * dim, dim, 1))

    def forward(self, batch):
        images, shapes = batch.images(), [tuple(shape) for shape in batch.shapes.tolist()]
        tokens = [None] * len(images)
        for shape in dict.fromkeys(shapes):  # images of one shape run together
            group = [i for i, other in enumerate(shapes) if other == shape]
            x = self.stem(normalise(torch.stack([images[i] for i in group])).permute(0, 3, 1, 2))
            for block in self.blocks:
                x = x + block(x)
            x = x.flatten(2).transpose(1, 2)
            x = torch.cat([self.special(x.mean(1)).unflatten(1, (5, self.dim)), x], dim=1)
            for i, image_tokens in zip(group, x, strict=True):
                tokens[i] = image_tokens
        x = torch.cat(tokens)
        return F.pad(x, (0, 0, 0, batch.n_tokens - len(x)))  # the padding's rows, which nobody reads


def student(device):
    return Conv().to(device)
