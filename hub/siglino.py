"""The key layout of the released SigLino checkpoints, from and to that of amoe.py: of state dicts, without a model."""

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
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
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


def from_siglino(state, top_k, source):
    """(what amoe.describe says of such a student, its state under the keys of amoe.py).

    top_k: experts a token, which no shape tells. ValueError names a key that is missing; `source` is the file's name.
    """
    adapters = ("dinov3_adapter.fc1.weight", "siglip2_adapter.fc1.weight")
    for key in (*NEEDED, *adapters):
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


def to_siglino(about, state):
    """The state dict under a released checkpoint's keys, of a student whose PHI-S is folded in (amoe.describe, state).

    ValueError where the layout has no place for it: for heads but "dinov3" and "siglip2", and for the bias of a last
    layer, into which PHI-S is folded.
    """
    heads = about["heads"]
    if sorted(heads) != ["dinov3", "siglip2"] or not heads["siglip2"]["pool"] or "factory" in about["trunk"]:
        raise ValueError(f"SigLino's layout has the heads dinov3 and siglip2 (pooled), and not {', '.join(heads)}")
    if biased := [name for name, head in heads.items() if head["bias"]]:
        raise ValueError(f"SigLino's layout has no bias in a head's last layer, and '{biased[0]}' has one, from PHI-S")
    norm = state["heads.dinov3.norm.weight"]  # of the right width: layer_norm_dinov3 is in the layout, and unused
    unused = {
        "layer_norm_dinov3.weight": norm.new_ones(norm.shape),
        "layer_norm_dinov3.bias": norm.new_zeros(norm.shape),
    }
    return exchange(HEADS, state) | unused
