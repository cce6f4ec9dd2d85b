"""The student of this folder in plain torch, one image at a time: what the packed model of the repository computes.

    from modeling_amoe import load, open_image

    model = load()  # config.json and model.safetensors beside this file; needs torch and safetensors alone
    features = model(open_image("photo.jpg"))  # {"patch": {name: [h * w, C]}, "summary": {name: [C]}}

`name` is a teacher, whose own space the features are in, or "amoe", the student's own. Where transformers is installed,
AutoModel.from_pretrained(folder, trust_remote_code=True) gives the same model.

Shape letters: L tokens of the image (CLS, registers, patches), D width, H heads, d head width, E experts, C channels of
a teacher, h x w patches of 16 x 16 pixels.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

try:
    from transformers import PretrainedConfig, PreTrainedModel, __version__

    BUFFERS_CAN_STAY = not __version__.startswith("4.")
except ImportError:  # nothing here depends on it
    BUFFERS_CAN_STAY = False

    class PretrainedConfig:
        def __init__(self, **values):
            self.__dict__.update(values)

    class PreTrainedModel(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def post_init(self):
            pass


PATCH = 16
QK_EPS = 1.1920928955078125e-07  # float32's machine epsilon, with which the released weights were trained


class AMoEConfig(PretrainedConfig):
    """trunk: sizes of the transformer. heads: {teacher: sizes of its head}. Both as in config.json."""

    model_type = "amoe"

    def __init__(self, trunk=None, heads=None, **others):
        self.trunk, self.heads = trunk or {}, heads or {}
        super().__init__(**others)


class Float32Buffers(nn.Module):
    """Keeps its buffers' dtype under `.to(bfloat16)`, which would round positions and routing biases."""

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, inner = c["head_dim"], c["heads"] * c["head_dim"]
        self.wq, self.wk, self.wv = (nn.Linear(c["dim"], inner, bias=False) for _ in range(3))
        self.wo = nn.Linear(inner, c["dim"], bias=False)
        self.sinks = nn.Parameter(torch.empty(c["heads"]))

    def forward(self, x_LD, cos, sin):
        q, k, v = (w(x_LD).unflatten(1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (rotate(F.rms_norm(t, (self.head_dim,), eps=QK_EPS), cos, sin) for t in (q, k))
        score_HLL = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim)
        # A sink takes a share of every query's attention and gives nothing for it.
        sink_HL1 = self.sinks[:, None, None].expand(-1, len(x_LD), 1).to(score_HLL.dtype)
        weight_HLL = torch.cat([score_HLL, sink_HL1], dim=2).softmax(dim=2)[:, :, :-1]
        return self.wo(torch.einsum("hqk,khd->qhd", weight_HLL, v).flatten(1))


def rotate(x_LHd, cos, sin):
    """Golden RoPE: the second half of a head turns in interleaved pairs, the first half carries no position."""
    still, turning = x_LHd.chunk(2, dim=2)
    a, b = turning.float().unflatten(2, (-1, 2)).unbind(3)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=3).flatten(2)
    return torch.cat([still, turned.to(x_LHd.dtype)], dim=2)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(c["dim"], c["dense_hidden"], bias=False) for _ in range(2))
        self.w2 = nn.Linear(c["dense_hidden"], c["dim"], bias=False)

    def forward(self, x_LD):
        return self.w2(F.silu(self.w1(x_LD)) * self.w3(x_LD))


class MoE(Float32Buffers):
    """Every token goes to the top_k experts of the highest biased score, weighted by their scores without the bias."""

    def __init__(self, c):
        super().__init__()
        E, D, hidden = c["experts"], c["dim"], c["expert_hidden"]
        self.top_k = c["top_k"]
        self.router = nn.ModuleDict({"gate": nn.Linear(D, E, bias=False)})
        shapes = {"w1": (E, hidden, D), "w2": (E, D, hidden), "w3": (E, hidden, D)}
        self.experts = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.register_buffer("expert_bias", torch.zeros(E))

    def forward(self, x_LD):
        with torch.autocast(x_LD.device.type, enabled=False):  # float32: rounding would change who is chosen
            score_LE = torch.sigmoid(F.linear(x_LD.float(), self.router["gate"].weight.float()))
        chosen_LK = (score_LE + self.expert_bias).topk(self.top_k, dim=1).indices
        weight_LE = torch.zeros_like(score_LE).scatter(1, chosen_LK, score_LE.gather(1, chosen_LK)).to(x_LD.dtype)
        out_LD = torch.zeros_like(x_LD)
        for weight_L, w1, w2, w3 in zip(weight_LE.T, *(self.experts[n] for n in ("w1", "w2", "w3")), strict=True):
            # Every expert sees every token and counts for those that chose it: plain, and slower than it need be.
            out_LD = out_LD + weight_L[:, None] * F.linear(F.silu(F.linear(x_LD, w1)) * F.linear(x_LD, w3), w2)
        return out_LD


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        eps = 1e-5 if c["norm_weight"] else QK_EPS
        norm = lambda: nn.RMSNorm(c["dim"], eps=eps, elementwise_affine=c["norm_weight"])  # noqa: E731
        self.attention_norm, self.attention, self.ffn_norm = norm(), Attention(c), norm()
        if layer < c["dense_layers"]:
            self.feed_forward = FeedForward(c)
        else:
            self.moe = MoE(c)

    def forward(self, x_LD, cos, sin):
        x_LD = x_LD + self.attention(self.attention_norm(x_LD), cos, sin)
        return x_LD + (self.moe if hasattr(self, "moe") else self.feed_forward)(self.ffn_norm(x_LD))


class MapPool(nn.Module):
    """SigLIP's attention pooling head, the teacher's own: a learned probe looks at all tokens of the image."""

    def __init__(self, dim, hidden, heads, eps):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x_LC):
        x_C = self.attention(self.probe, x_LC[None], x_LC[None], need_weights=False)[0][0, 0]
        return x_C + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layernorm(x_C)), approximate="tanh"))


class Head(nn.Module):
    """A teacher's features from the trunk's tokens, in the teacher's own space. The means are those of its features."""

    def __init__(self, trunk_dim, dim, bias, means, pool, **_):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(trunk_dim, dim), nn.LayerNorm(dim), nn.Linear(dim, dim, bias=bias)
        self.pool = MapPool(dim, **pool) if pool else None
        for name in ("patch_mean", "summary_mean"):
            self.register_buffer(name, torch.zeros(dim) if means else None)

    def forward(self, x_LD):
        z_LC = self.fc2(F.gelu(self.norm(self.fc1(x_LD))))
        return z_LC, z_LC[0] if self.pool is None else self.pool(z_LC)


class AMoE(PreTrainedModel, Float32Buffers):
    config_class = AMoEConfig
    # For from_pretrained(dtype=bfloat16); the 4th series takes no buffers here, and would round these
    _keep_in_fp32_modules_strict = ("freqs_cis_golden", "expert_bias") if BUFFERS_CAN_STAY else None

    def __init__(self, config):
        super().__init__(config)
        c = config.trunk
        self.img_projector = nn.Linear(PATCH * PATCH * 3, c["dim"], bias=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c["dim"]))
        self.storage_tokens = nn.Parameter(torch.empty(1, c["registers"], c["dim"]))
        self.register_buffer("freqs_cis_golden", torch.zeros(c["heads"], c["head_dim"] // 4, 2))
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c["layers"]))
        self.norm = nn.RMSNorm(c["dim"], eps=1e-5)
        self.heads = nn.ModuleDict({name: Head(c["dim"], **sizes) for name, sizes in config.heads.items()})
        self.post_init()

    def _init_weights(self, module):
        """Nothing: every weight comes from the file."""

    def forward(self, image):
        """image: [16 h, 16 w, 3], uint8 or floats in [-1, 1]. {"patch": {name: [h * w, C]}, "summary": {name: [C]}}."""
        h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
        rows = image.reshape(h, PATCH, w, PATCH, 3).transpose(1, 2).reshape(h * w, -1)
        rows = rows.float() / 127.5 - 1 if image.dtype == torch.uint8 else rows
        patches_LD = self.img_projector(rows.to(self.img_projector.weight.dtype))
        x_LD = torch.cat([self.cls_token[0], self.storage_tokens[0], patches_LD])
        special = len(x_LD) - h * w
        # Positions span an area of the same size for every shape; CLS and registers stand at 0, which does not rotate.
        axes = [
            -limit + 2 * limit * torch.arange(n, device=image.device) / max(n - 1, 1)
            for n, limit in ((h, math.sqrt(h / w)), (w, math.sqrt(w / h)))
        ]
        yx_L2 = F.pad(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=2).view(-1, 2), (0, 0, special, 0))
        theta_LHf = (yx_L2[:, None, None] * self.freqs_cis_golden).sum(3)
        for block in self.layers:
            x_LD = block(x_LD, theta_LHf.cos(), theta_LHf.sin())
        x_LD = self.norm(x_LD)
        patch, summary = {"amoe": x_LD[special:]}, {"amoe": x_LD[0]}
        for name, head in self.heads.items():
            tokens_LC, summary[name] = head(x_LD)
            patch[name] = tokens_LC[special:]
        return {"patch": patch, "summary": summary}


def load(folder=Path(__file__).parent):
    """The student of a folder with config.json and model.safetensors, in eval mode."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())
    model = AMoE(AMoEConfig(trunk=config["trunk"], heads=config["heads"]))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()


def open_image(path, max_patches=256):
    """An image file as uint8 [16 h, 16 w, 3], its size in whole patches, shrunk to max_patches; needs Pillow."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = min(1.0, PATCH * math.sqrt(max_patches / (image.width * image.height)))
    w, h = (max(1, int(n * scale / PATCH)) * PATCH for n in image.size)
    return torch.frombuffer(bytearray(image.resize((w, h), 3).tobytes()), dtype=torch.uint8).view(h, w, 3)
