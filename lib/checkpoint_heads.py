"""Heads in the file of an encoder, rebuilt from their weights: projection head and classifier.

    head = checkpoint_heads.projector(net)               # of checkpoints.load_encoder; or None
    head = checkpoint_heads.classifier(net)              # or None
"""
import torch
import torch.nn.functional as F
from torch import nn


def projector(encoder, narrow=True):
    """The projection head of a loaded encoder as a frozen module, or None.

    It maps tokens (B, L, D) after the final norm to the output of the head for the class token,
    which represents the image in the loss. None: the file has no such head (MAE, BEiT, CAE, SimMIM,
    files with the backbone only).

    MoCo v3, MoBY,    class token -> projector; the predictor is left out. MoBY with a Swin: mean
    hybrid            patch token
    MMC               class token -> its head "cls"; "patch", the head for patches, is left out
    DINO, iBOT        class token -> MLP, L2-normalized -> prototypes: logits (B, K), before center
                      and softmax
    SelfPatch         patches -> class attention -> the same as DINO; on MoBY: -> projector

    narrow: logits in an orthonormal basis of their span, (B, 256) instead of (B, 65536). Lengths
    and angles of logits do not change, hence neither do linear classifiers of them.
    ValueError: the keys of the head do not have a known form.
    """
    heads = getattr(encoder, "source", None) and encoder.source.heads
    names = [name for name in ("projector", "cls", "head", "c_head") if heads and name in heads]
    if not names:
        return None
    try:
        num_heads = encoder.config["num_heads"]
        num_heads = num_heads if isinstance(num_heads, int) else num_heads[-1]     # Swin: by stage
        head = Projector(heads[names[0]], heads.get("ca_head"), num_heads, narrow,
                         encoder.num_prefix > 0)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{encoder.source.path}: cannot rebuild the head with the keys "
                         f"{', '.join(heads[names[0]])} ({error})") from None
    return head.to(encoder.drop_rates.device).eval().requires_grad_(False)


def classifier(encoder):
    """The classifier in the file of a fine-tuned or supervised encoder, frozen, or None.

    It maps tokens (B, L, D) of the encoder to scores (B, C).

    with fc_norm  mean patch token -> LayerNorm -> linear layer (fine-tuned MAE, BEiT, SimMIM, CAE,
                  and by evaluate.py --task finetune --save)
    without       class token (of a model without one: mean patch token) after the final norm ->
                  linear layer (DeiT, timm), or batch norm and linear layer (MAE's linear probe)

    ValueError: the keys or shapes of the classifier are others.
    """
    source = getattr(encoder, "source", None)
    if not source or "classifier" not in source.heads:
        return None
    state = source.heads["classifier"]
    try:
        eps = encoder.config.get("norm_eps", 1e-5)       # Swin: 1e-5
        head = Classifier(state, encoder.num_prefix, eps)
        head(torch.zeros(1, encoder.num_prefix + 1, encoder.embed_dim))
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source.path}: cannot rebuild the classifier with the keys "
                         f"{', '.join(state)} ({str(error).splitlines()[0]})") from None
    return head.to(encoder.drop_rates.device)


class Classifier(nn.Module):
    """A classifier built from a state dict, frozen, see `classifier`."""

    def __init__(self, state, num_prefix, eps):
        super().__init__()
        self.num_prefix, self.fc_norm, parts = num_prefix, None, {}
        for key, x in state.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = x
        head = parts.pop("head")
        if "weight" in head:                               # one layer, not a sequence of layers
            head = {f"0.{name}": x for name, x in head.items()}
        self.head = build_sequential(head, relu=False, eps=1e-6)
        if "fc_norm" in parts:
            norm = parts.pop("fc_norm")
            self.fc_norm = nn.LayerNorm(len(norm["weight"]), eps)
            self.fc_norm.load_state_dict(norm)
        if parts:
            raise ValueError(f"unknown: {', '.join(parts)}")
        self.num_classes = len(self.head[-1].weight)
        self.eval().requires_grad_(False)

    def forward(self, tokens):
        if self.fc_norm is None and self.num_prefix:
            return self.head(tokens[:, 0])
        if self.fc_norm is None:
            return self.head(tokens.mean(1))
        return self.head(self.fc_norm(tokens[:, self.num_prefix:].mean(1)))


class Projector(nn.Module):
    """A projection head built from state dicts, see `projector`."""

    def __init__(self, head, pooling=None, num_heads=1, narrow=True, class_token=True):
        super().__init__()
        prototypes = {key: x for key, x in head.items() if key.startswith("last_layer.")}
        mlp = {key.removeprefix("mlp."): x for key, x in head.items()
               if not key.startswith("last_layer")}
        self.mlp = build_sequential(mlp, relu=not prototypes)
        self.pooling = ClassAttention(pooling, num_heads) if pooling else None
        self.prototypes, self.class_token = None, class_token
        if prototypes:
            weight = prototype_matrix(prototypes)                              # (K, bottleneck)
            if narrow and len(weight) > weight.shape[1]:      # W = QR: |Wz| = |Rz|, equal angles
                weight = torch.linalg.qr(weight, mode="r").R          # (bottleneck, bottleneck)
            self.prototypes = nn.Parameter(weight)

    def forward(self, tokens):
        if self.pooling:
            tokens = self.pooling(tokens)
        else:
            tokens = tokens[:, 0] if self.class_token else tokens.mean(1)
        z = self.mlp(tokens)
        if self.prototypes is None:
            return z
        return F.linear(F.normalize(z, dim=-1), self.prototypes)


def build_sequential(state, relu, eps=1e-5):
    """nn.Sequential of Linear and BatchNorm1d layers from its state dict. An index without
    tensors is an activation: ReLU, or GELU if not `relu`. eps: of the batch norms."""
    layers = []
    for i in range(max(int(key.split(".")[0]) for key in state) + 1):
        layer_state = {key.split(".", 1)[1]: x for key, x in state.items()
                       if key.startswith(f"{i}.")}
        if not layer_state:
            layers.append(nn.ReLU() if relu else nn.GELU())
            continue
        if "running_mean" in layer_state:
            layer = nn.BatchNorm1d(len(layer_state["running_mean"]), eps,
                                   affine="weight" in layer_state)
        else:
            layer = nn.Linear(*layer_state["weight"].shape[::-1], bias="bias" in layer_state)
        layer.load_state_dict(layer_state)
        layers.append(layer)
    return nn.Sequential(*layers)


def prototype_matrix(state):
    """Prototypes (K, bottleneck) from the last layer of DINO's head, plain or with weight norm."""
    if "last_layer.weight" in state:
        return state["last_layer.weight"]
    for length, direction in (("weight_g", "weight_v"), ("parametrizations.weight.original0",
                                                         "parametrizations.weight.original1")):
        if f"last_layer.{direction}" in state:
            return state[f"last_layer.{length}"] * F.normalize(
                state[f"last_layer.{direction}"], dim=1)
    raise KeyError("no weights of the last layer")


class ClassAttention(nn.Module):
    """SelfPatch's aggregation: patches (B, N, D) -> image vector (B, D), by two class-attention
    blocks, in which one token attends to itself and to the patches (CaiT's, no layer scale)."""

    def __init__(self, state, num_heads):
        super().__init__()
        state = {key.replace("attn.", "").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2"): x
                 for key, x in state.items()}                      # the names of the official code
        dim, self.num_heads = state["cls_token"].shape[2], num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_blocks, self.norm = nn.ModuleList(), nn.LayerNorm(dim, 1e-6)
        for _ in {key.split(".")[1] for key in state if key.startswith("cls_blocks.")}:
            parts = {name: nn.Linear(dim, dim) for name in ("q", "k", "v", "proj")}
            mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            self.cls_blocks.append(nn.ModuleDict({
                **parts, "mlp": mlp, "norm1": nn.LayerNorm(dim, 1e-6),
                "norm2": nn.LayerNorm(dim, 1e-6)}))
        self.load_state_dict(state)

    def forward(self, y):
        z = self.cls_token.expand(len(y), -1, -1)                                    # (B, 1, D)
        for block in self.cls_blocks:
            x = block["norm1"](torch.cat([z, y], 1))                                 # (B, 1+N, D)
            q, k, v = (block[name](x[:, :1] if name == "q" else x)
                       .unflatten(2, (self.num_heads, -1)).transpose(1, 2) for name in "qkv")
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)   # (B, 1, D)
            z = z + block["proj"](x)
            z = z + block["mlp"](block["norm2"](z))
        return self.norm(z)[:, 0]
