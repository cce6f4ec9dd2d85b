"""The key layout of the released SigLino checkpoints, from and to that of amoe.py: of state dicts, without a model."""

import torch.nn.functional as F

HEADS = {  # how the keys of a head begin in amoe.py, and in a released checkpoint
    "heads.siglip2.pool.": "siglip2_multihead_attention_pooling_head.",
    "heads.siglip2.": "siglip2_adapter.",
    "heads.dinov3.": "dinov3_adapter.",
}
NEEDED = ("img_projector.weight", "freqs_cis_golden", "layers.0.attention.sinks", "storage_tokens")


def exchange(prefixes, state):
    """The state dict with the beginnings of its keys exchanged, {old: new}."""
    begin = lambda key: next((old for old in prefixes if key.startswith(old)), "")  # noqa: E731
    return {prefixes.get(begin(key), "") + key.removeprefix(begin(key)): value for key, value in state.items()}


def trunk_of(state, top_k, source):
    """The sizes, as amoe.Config names them, that a SigLino state dict has the shapes of."""
    for key in NEEDED:
        if key not in state:
            raise ValueError(f"{source} is no student, of train.py or SigLino: it has no '{key}'")
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    dense = next((l for l in range(layers) if f"layers.{l}.feed_forward.w1.weight" not in state), layers)
    experts = (0, 0, 0)
    if dense < layers:
        if f"layers.{dense}.moe.experts.w1" not in state:
            raise ValueError(
                f"{source} is no SigLino checkpoint: layer {dense} has neither 'moe.experts.w1' nor "
                "'feed_forward.w1.weight'"
            )
        experts = state[f"layers.{dense}.moe.experts.w1"].shape
    heads, quarter, _ = state["freqs_cis_golden"].shape
    return {
        "layers": layers,
        "dim": state["img_projector.weight"].shape[0],
        "heads": heads,
        "head_dim": 4 * quarter,
        "experts": experts[0],
        "top_k": top_k if experts[0] else 0,
        "expert_hidden": experts[1],
        "dense_layers": dense,
        "dense_hidden": len(state["layers.0.feed_forward.w1.weight"]) if dense else 0,
        "norm_weight": "layers.0.attention_norm.weight" in state,
        "registers": state["storage_tokens"].shape[1],
    }


def check_sizes(about, state, source):
    """ValueError where what amoe.describe said of a student is not so said, or not borne out by its weights."""
    parts = [about.get(key) if isinstance(about, dict) else None for key in ("trunk", "heads")]
    if not all(isinstance(part, dict) for part in parts) or not parts[0]:  # a trunk alone is a student
        raise ValueError(f"{source}: its config has no sizes of a trunk and of heads")
    trunk, heads = parts
    if "factory" not in trunk:
        found, top_k = trunk_of(state, trunk.get("top_k"), source), trunk.get("top_k")
        if trunk != found or top_k not in range(min(1, found["experts"]), 1 + found["experts"]):
            wrong = [key for key in found if trunk.get(key) != found[key]] or ["top_k"]
            raise ValueError(f"{source}: its config and its weights differ in the trunk's '{wrong[0]}'")
    for name, sizes in heads.items():
        dim = len(state.get(f"heads.{name}.fc1.weight", ()))
        right = {
            "dim": [dim],
            "registers": range(1 + trunk.get("registers", 1 << 10)),
            "bias": [False, True],
            "means": [False, True],
        }
        if not isinstance(sizes, dict) or "pool" not in sizes or any(sizes.get(key) not in right[key] for key in right):
            raise ValueError(f"{source}: its config and its weights differ in head '{name}'")
        pool = sizes.get("pool") or {"heads": dim, "eps": 0.5}
        heads_fit = isinstance(pool, dict) and pool.get("heads") in range(1, 1 + dim) and dim % pool["heads"] == 0
        if not heads_fit or not isinstance(pool.get("eps"), float) or not 0 < pool["eps"] < 1:
            raise ValueError(f"{source}: its config has no sizes of a pool that fit head '{name}'")


def from_siglino(state, top_k, source):
    """(what amoe.describe says of such a student, its state under the keys of amoe.py).

    top_k: experts a token, which no shape tells. ValueError names a key that is missing; `source` is the file's name.
    """
    for key in ("dinov3_adapter.fc1.weight", "siglip2_adapter.fc1.weight"):
        if key not in state:
            raise ValueError(f"{source} is no student, of train.py or SigLino: it has no '{key}'")
    # layer_norm_dinov3 is in the checkpoints and unused in their forward pass
    state = {key: v for key, v in exchange({v: k for k, v in HEADS.items()}, state).items() if "layer_norm_" not in key}
    trunk = trunk_of(state, top_k, source)
    pool = {"hidden": 0, "heads": 16, "eps": 1e-5}
    sizes = {"bias": False, "means": False}
    dinov3, siglip2 = (len(state[f"heads.{name}.fc1.weight"]) for name in ("dinov3", "siglip2"))
    heads = {
        "dinov3": {"dim": dinov3, "registers": trunk["registers"], "pool": None, **sizes},
        "siglip2": {"dim": siglip2, "registers": 0, "pool": pool, **sizes},
    }
    return {"trunk": trunk, "heads": heads}, state


def to_siglino(about, state, centred):
    """The state dict under a released checkpoint's keys, of a student whose PHI-S is folded in (amoe.describe, state).

    PHI-S folds into a weight and a bias, the teacher's mean. The layout has no such bias, and no weights of its width
    give a constant: centred leaves it out of the features. The pooling of siglip2's summary takes it in, exactly.
    ValueError where the layout has no place: for heads but "dinov3" and "siglip2", and for that bias unless centred.
    """
    heads = about["heads"]
    if sorted(heads) != ["dinov3", "siglip2"] or not heads["siglip2"]["pool"] or "factory" in about["trunk"]:
        raise ValueError(f"SigLino's layout has the heads dinov3 and siglip2 (pooled), and not {', '.join(heads)}")
    if heads["siglip2"]["pool"]["heads"] != 16:
        raise ValueError(f"SigLino pools siglip2 with 16 heads, and not with {heads['siglip2']['pool']['heads']}")
    biased = [name for name, head in heads.items() if head["bias"]]
    if biased and not centred:
        raise ValueError(
            f"SigLino's layout has no bias in a head's last layer, and '{biased[0]}' has one, the teacher's mean: "
            "centred=True writes features less that mean"
        )
    state = {key: value for key, value in state.items() if not key.endswith("_mean")}
    biases = {name: state.pop(f"heads.{name}.fc2.bias") for name in biased}
    if "siglip2" in biases:  # of what the keys and values are made of; the query is not made of the image's tokens
        C, pool = len(biases["siglip2"]), "heads.siglip2.pool.attention.in_proj_"
        shift = state[pool + "weight"][C:] @ biases["siglip2"]
        state[pool + "bias"] = state[pool + "bias"] + F.pad(shift, (C, 0))
    norm = state["heads.dinov3.norm.weight"]  # of the right width: layer_norm_dinov3 is in the layout, and unused
    unused = {
        "layer_norm_dinov3.weight": norm.new_ones(norm.shape),
        "layer_norm_dinov3.bias": norm.new_zeros(norm.shape),
    }
    return exchange(HEADS, state) | unused
