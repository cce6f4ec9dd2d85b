"""A ViT of timm as the student: python train.py --student recipes/timm_vit.py:student (pip install timm torchvision)

Any model of timm with patches of 16 pixels that takes images of any size. Its prefix tokens stand for the summary and
registers; where it has fewer than five, the mean over its patches takes the place of the others.
"""

import timm
import torch
import torch.nn.functional as F
from torch import nn

from amoe import normalise


class ViT(nn.Module):
    def __init__(self, name, **options):
        super().__init__()
        self.vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        self.dim, self.prefix = self.vit.embed_dim, self.vit.num_prefix_tokens

    def forward(self, batch):
        images, shapes = batch.images(), [tuple(shape) for shape in batch.shapes.tolist()]
        tokens = [None] * len(images)
        for shape in dict.fromkeys(shapes):  # images of one shape run together
            group = [i for i, other in enumerate(shapes) if other == shape]
            x = normalise(torch.stack([images[i] for i in group])).permute(0, 3, 1, 2)  # [-1, 1], as most of timm's
            x = self.vit.forward_features(x)
            patches = x[:, self.prefix :]
            special = torch.cat([x[:, : self.prefix], patches.mean(1, keepdim=True).expand(-1, 5, -1)], dim=1)[:, :5]
            for i, image_tokens in zip(group, torch.cat([special, patches], dim=1), strict=True):
                tokens[i] = image_tokens
        x = torch.cat(tokens)
        return F.pad(x, (0, 0, 0, batch.n_tokens - len(x)))  # the padding's rows, which nobody reads


def student(device, name="vit_tiny_patch16_224"):
    return ViT(name, pretrained=False, img_size=128).to(device)
