"""The student of this folder in plain torch, one image at a time: what the packed model of the repository computes.

    from modeling_amoe import load, open_image

    model = load()  # config.json and model.safetensors beside this file; needs torch and safetensors alone
    features = model(open_image("photo.jpg"))  # {"patch": {name: [h * w, C]}, "summary": {name: [C]}}

`name` is a teacher, whose own space the features are in, or "amoe", the student's own. `c` is "trunk" of config.json.
Shape letters: L tokens of the image (CLS, registers, patches), D width, H heads, d head width, E experts, F their
hidden width, C channels of a teacher, h x w patches of 16 x 16 pixels.
"""

import functools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

QK_EPS = 1.1920928955078125e-07  # float32's machine epsilon, with which the released weights were trained
linear = functools.partial(nn.Linear, bias=False)


def rotate(x_LHd, theta_LHf):
    """Golden RoPE: the second half of a head turns in interleaved pairs, the first half carries no position."""
    still, turning = x_LHd.chunk(2, dim=2)
    a, b = turning.float().unflatten(2, (-1, 2)).unbind(3)
    cos, sin = theta_LHf.cos(), theta_LHf.sin()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=3).flatten(2)
    return torch.cat([still, turned.to(x_LHd.dtype)], dim=2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, inner = c["head_dim"], c["heads"] * c["head_dim"]
        self.wq, self.wk, self.wv = (linear(c["dim"], inner) for _ in range(3))
        self.wo = linear(inner, c["dim"])
        self.sinks = nn.Parameter(torch.empty(c["heads"]))

    def forward(self, x_LD, theta_LHf):
        q, k, v = (w(x_LD).unflatten(1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (rotate(F.rms_norm(t, (self.head_dim,), eps=QK_EPS), theta_LHf) for t in (q, k))
        score_HLL = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim)
        # A sink takes a share of every query's attention and gives nothing for it.
        sink_HL1 = self.sinks[:, None, None].expand(-1, len(x_LD), 1).to(score_HLL.dtype)
        weight_HLL = torch.cat([score_HLL, sink_HL1], dim=2).softmax(dim=2)[:, :, :-1]
        return self.wo(torch.einsum("hqk,khd->qhd", weight_HLL, v).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1, self.w3 = (linear(c["dim"], c["dense_hidden"]) for _ in range(2))
        self.w2 = linear(c["dense_hidden"], c["dim"])

    def forward(self, x_LD):
        return self.w2(F.silu(self.w1(x_LD)) * self.w3(x_LD))


class MoE(nn.Module):
    """Every token goes to the top_k experts of the highest biased score, weighted by their scores without the bias."""

    def __init__(self, c):
        super().__init__()
        E, D, hidden, self.top_k = c["experts"], c["dim"], c["expert_hidden"], c["top_k"]
        self.router = nn.ModuleDict({"gate": linear(D, E)})
        shapes = {"w1": (E, hidden, D), "w2": (E, D, hidden), "w3": (E, hidden, D)}
        self.experts = nn.ParameterDict({name: torch.empty(shape) for name, shape in shapes.items()})
        self.register_buffer("expert_bias", torch.zeros(E))

    def forward(self, x_LD):
        with torch.autocast(x_LD.device.type, enabled=False):  # float32: rounding would change who is chosen
            score_LE = torch.sigmoid(F.linear(x_LD.float(), self.router.gate.weight.float()))
        chosen_LK = (score_LE + self.expert_bias).topk(self.top_k, dim=1).indices
        weight_LE = torch.zeros_like(score_LE).scatter(1, chosen_LK, score_LE.gather(1, chosen_LK)).to(x_LD.dtype)
        # Every expert sees every token and counts for those that chose it: plain, and slower than it need be.
        gate_LEF, value_LEF = (torch.einsum("ld,efd->lef", x_LD, w) for w in (self.experts.w1, self.experts.w3))
        return torch.einsum("lef,edf->ld", weight_LE[:, :, None] * F.silu(gate_LEF) * value_LEF, self.experts.w2)


class Block(nn.Module):
    def __init__(self, c, dense):
        super().__init__()
        how = {"eps": 1e-5 if c["norm_weight"] else QK_EPS, "elementwise_affine": c["norm_weight"]}
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(c["dim"], **how) for _ in range(2))
        self.attention = Attention(c)
        self.feed_forward, self.moe = (FeedForward(c), None) if dense else (None, MoE(c))

    def forward(self, x_LD, theta_LHf):
        x_LD = x_LD + self.attention(self.attention_norm(x_LD), theta_LHf)
        return x_LD + (self.feed_forward or self.moe)(self.ffn_norm(x_LD))


class MapPool(nn.Module):
    """SigLIP's attention pooling head, the teacher's own: a learned probe looks at all tokens of the image."""

    def __init__(self, dim, hidden, heads, eps):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x_LC):
        x_C = self.attention(self.probe, x_LC[None], x_LC[None], need_weights=False)[0][0, 0]
        return x_C + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layernorm(x_C)), approximate="tanh"))


class Head(nn.Module):
    """A teacher's features from the trunk's tokens, in the teacher's own space. The means are those of its features."""

    def __init__(self, trunk_dim, dim, bias, means, pool, **_):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(trunk_dim, dim), nn.LayerNorm(dim), nn.Linear(dim, dim, bias=bias)
        self.pool = MapPool(dim, **pool) if pool else None
        for name in ("patch_mean", "summary_mean") if means else ():
            self.register_buffer(name, torch.zeros(dim))

    def forward(self, x_LD):
        z_LC = self.fc2(F.gelu(self.norm(self.fc1(x_LD))))
        return z_LC, self.pool(z_LC) if self.pool else z_LC[0]


class AMoE(nn.Module):
    def __init__(self, c, heads, *more):
        super().__init__(*more)
        self.img_projector = linear(16 * 16 * 3, c["dim"])
        self.cls_token = nn.Parameter(torch.empty(1, 1, c["dim"]))
        self.storage_tokens = nn.Parameter(torch.empty(1, c["registers"], c["dim"]))
        self.register_buffer("freqs_cis_golden", torch.zeros(c["heads"], c["head_dim"] // 4, 2))
        self.layers = nn.ModuleList(Block(c, n < c["dense_layers"]) for n in range(c["layers"]))
        self.norm = nn.RMSNorm(c["dim"], eps=1e-5)
        self.heads = nn.ModuleDict({name: Head(c["dim"], **sizes) for name, sizes in heads.items()})

    def _apply(self, fn, recurse=True):  # .to(bfloat16) leaves buffers as they are: positions and routing biases
        return super()._apply(lambda t: fn(t) if isinstance(t, nn.Parameter) else t.to(fn(t).device), recurse)

    def forward(self, image):
        """image: [16 h, 16 w, 3], uint8 or floats in [-1, 1]. {"patch": {name: [h * w, C]}, "summary": {name: [C]}}."""
        h, w = image.shape[0] // 16, image.shape[1] // 16
        rows = image.reshape(h, 16, w, 16, 3).transpose(1, 2).reshape(h * w, -1)
        rows = rows.float() / 127.5 - 1 if image.dtype == torch.uint8 else rows
        patches_LD = self.img_projector(rows.to(self.img_projector.weight.dtype))
        x_LD = torch.cat([self.cls_token[0], self.storage_tokens[0], patches_LD])
        special = len(x_LD) - h * w
        # Positions span an area of the same size for every shape; CLS and registers stand at 0, which does not rotate.
        ends = (math.sqrt(h / w), h), (math.sqrt(w / h), w)
        axes = (torch.linspace(-end, end, n, device=image.device) for end, n in ends)
        yx_L2 = F.pad(torch.cartesian_prod(*axes), (0, 0, special, 0))
        theta_LHf = (yx_L2[:, None, None] * self.freqs_cis_golden).sum(3)
        for block in self.layers:
            x_LD = block(x_LD, theta_LHf)
        x_LD = self.norm(x_LD)
        answers = {name: head(x_LD) for name, head in self.heads.items()} | {"amoe": (x_LD, x_LD[0])}
        patch = {name: tokens_LC[special:] for name, (tokens_LC, _) in answers.items()}
        return {"patch": patch, "summary": {name: summary for name, (_, summary) in answers.items()}}


def load(folder=Path(__file__).parent):
    """The student of a folder with config.json and model.safetensors, in eval mode."""
    config = json.loads((Path(folder) / "config.json").read_text())
    model = AMoE(config["trunk"], config["heads"])
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()


def grid(height, width, max_patches):
    """Patches (h, w) of an image, as in training: rounded, or the largest grid of the same aspect that fits."""
    a, b = height / 16, width / 16
    h, w = max(1, round(a)), max(1, round(b))
    if h * w <= max_patches:
        return h, w
    larger = 1, 1
    while larger[0] * larger[1] <= max_patches:
        h, w = larger
        tall, wide = (h + 0.5) * b, (w + 0.5) * a  # as the scale grows, the lesser rounds up first
        larger = h + (tall <= wide), w + (wide <= tall)
    return h, w


def open_image(path, max_patches=256):
    """An image file as uint8 [16 h, 16 w, 3], its size in whole patches, shrunk to max_patches; needs Pillow."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = image.convert("I").point(lambda v: v / 257 + 0.5).convert("L")
    if image.has_transparency_data:  # over white, as in training
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    h, w = (16 * n for n in grid(image.height, image.width, max_patches))
    return torch.frombuffer(bytearray(image.resize((w, h), 3).tobytes()), dtype=torch.uint8).view(h, w, 3)


try:  # where it is installed, AutoModel.from_pretrained(folder, trust_remote_code=True) gives the same model
    from transformers import PretrainedConfig, PreTrainedModel

    class AMoEConfig(PretrainedConfig):
        model_type = "amoe"  # its `trunk` and `heads` are those of config.json

    class AMoEModel(AMoE, PreTrainedModel):
        config_class = AMoEConfig

        def __init__(self, config):
            super().__init__(config.trunk, config.heads, config)
            self.post_init()
            # Under dtype=bfloat16. Set last: series 4 of transformers rounds buffers, and refuses their names before
            self._keep_in_fp32_modules_strict = {"freqs_cis_golden", "expert_bias"}
except ImportError:
    pass
