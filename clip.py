"""CLIP's vision transformer (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.4). Imports nothing of ours.

A picture becomes a sequence: cut it into 14×14-pixel patches, map each patch linearly to a vector, put a learned
class vector in front, add a learned position to each, and run a transformer over them in which every patch attends to
every other. LLaVA reads the patches' hidden states one block below the top, ViP-LLaVA at five heights. Neither reads
the pooled output.

Shapes: N pictures, C colours, S side in pixels, P patches, D width, H heads, E = D / H width of a head, p side of a patch in pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class CLIPVisionConfig:
    """The tower's shape. Names and defaults are Hugging Face's: a published config leaves out what equals its default."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


def quick_gelu(x):
    """x · sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention, every position to every position. (N, P+1, D) -> (N, P+1, D)"""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(D, D), nn.Linear(D, D)
        self.v_proj, self.out_proj = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))  # (N, H, P+1, E)
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √E) v
        return self.out_proj(out.transpose(1, 2).flatten(-2))  # (N, P+1, D)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(quick_gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy and adds its result to the stream, which itself is never normalised."""

    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class PatchEmbedding(nn.Module):
    """One linear map for all patches, (N, C, S, S) -> (N, P, D), stored as the convolution that it also is."""

    def __init__(self, channels, width, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, size, size))

    def forward(self, pixel_values):
        # As a product: a convolution in float32 would be rounded to 10 bits (TF32) on recent GPUs.
        size = self.weight.shape[-1]
        patches = F.unfold(pixel_values.to(self.weight), size, stride=size).transpose(1, 2)  # (N, P, C · p · p)
        return patches @ self.weight.flatten(1).T


def state_number(layer, depth):
    """Which of a tower's depth + 1 hidden states a layer means: negative numbers count from the end. Raises ValueError for none."""
    if not -depth - 1 <= layer <= depth:
        raise ValueError(f"vision layer {layer} does not exist: the tower has hidden states 0 to {depth}, or -{depth + 1} to -1")
    return layer % (depth + 1)


class CLIPVision(nn.Module):
    """The vision transformer. Call it as `tower(pixel_values, layers)`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.patch_embedding = PatchEmbedding(config.num_channels, D, config.patch_size)
        # Empty, to be filled: nn.Embedding's own filling imports PyTorch's compiler first when it is on the meta device.
        self.position_embedding = nn.Embedding.from_pretrained(torch.empty(config.num_patches + 1, D), freeze=False)
        self.pre_layrnorm = nn.LayerNorm(D, eps=config.layer_norm_eps)  # the checkpoints' own spelling
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        # Normalises the class token for CLIP's contrastive loss. It is part of every checkpoint; LLaVA never applies it.
        self.post_layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, pixel_values, layers):
        """Hidden states of the layers asked for, in the order asked.

        pixel_values: (N, C, S, S), preprocessed.
        layers: indices into the tower's hidden states, of which there are num_hidden_layers + 1: 0 is the embedded
            patches, k the output of the k-th block, and negative numbers count from the end (−1 is the last block).
        Returns a list of (N, P+1, D); position 0 is the class token. No block above the highest one asked for is run.
        Raises ValueError for pictures of another shape and for a layer that does not exist.
        """
        config = self.config
        depth = len(self.layers)
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}; this tower takes (N, {', '.join(map(str, expected))})")
        wanted = [state_number(k, depth) for k in layers]

        x = self.patch_embedding(pixel_values)  # (N, P, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (N, P+1, D)
        x = self.pre_layrnorm(x + self.position_embedding.weight)
        states = {0: x}
        for k, block in enumerate(self.layers[: max(wanted)], start=1):
            x = block(x)
            if k in wanted:  # the others are freed as soon as they are used
                states[k] = x
        return [states[k] for k in wanted]
