"""Initial weights as in the official code of each method, from torch's global generator. Numbers
after "normal" are standard deviations; "PyTorch's" means the layer's default.

    trunc  normal 0.02 (the code truncates at 100 sigma); convolution PyTorch's (DINO, iBOT)
    beit   normal 0.02, truncated at one sigma; attn.proj and mlp.fc2 of block i (from 1) divided by
           sqrt(2i)
    mae    Xavier, q, k, v as one matrix; class token normal 0.02; convolution bias PyTorch's
    cae    Linear layers as mae, the rest as beit
    moco   Xavier, q, k, v as three matrices; class token normal 1e-6; convolution bias 0
"""
import math

import torch
from torch import nn

from lib import positions


@torch.no_grad()
def init_vit(net, init):
    """Sets all weights of a vit.ViT, and its table of fixed positions."""
    def init_normal(weight, std=0.02):
        if init in ("beit", "cae"):
            nn.init.trunc_normal_(weight, std=std, a=-std, b=std)
        else:
            nn.init.normal_(weight, std=std)

    init_linear(net.blocks, init)
    patch = net.patch_embed.proj
    if init in ("mae", "moco"):
        nn.init.xavier_uniform_(patch.weight.flatten(1))         # moco's sqrt(6/(3pp + D)) is this
    elif init in ("beit", "cae"):
        init_normal(patch.weight)
    if init in ("beit", "cae", "moco"):
        nn.init.zeros_(patch.bias)
    if net.cls_token is not None:
        init_normal(net.cls_token, std=1e-6 if init == "moco" else 0.02)
    if net.register_tokens is not None:
        init_normal(net.register_tokens, std=1e-6)
    if net.config["pos"] == "learned":
        init_normal(net.pos_embed)
    elif net.pos_embed is not None:                              # the class token's row stays 0
        table = positions.sincos(net.embed_dim, net.grid, net.config["pos"])
        net.pos_embed[0, -len(table):] = table
    if init == "beit":
        for i, block in enumerate(net.blocks, 1):
            block.attn.proj.weight.div_(math.sqrt(2 * i))
            block.mlp.fc2.weight.div_(math.sqrt(2 * i))


def init_linear(module, init):
    """Sets the weights of all nn.Linear in a module (also decoders and heads), and biases to 0."""
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if init == "moco" and name.endswith("qkv"):
            bound = math.sqrt(6 / (2 * layer.in_features))
            nn.init.uniform_(layer.weight, -bound, bound)
        elif init in ("mae", "cae", "moco"):
            nn.init.xavier_uniform_(layer.weight)
        elif init == "beit":
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)
        else:
            nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
