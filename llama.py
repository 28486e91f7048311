"""The language model: a Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) or a Mistral (Jiang et al. 2023,
https://arxiv.org/abs/2310.06825), which is a Llama with fewer key/value heads and an attention window; and its KV cache.

A decoder block computes x + attention(norm(x)), then x + mlp(norm(x)). In causal attention each token looks at itself and at the
tokens before it. Rotary positions (RoPE) tell it how far back they are.

Shapes: B batch, T new tokens, S slots that can be attended to, D width, H query heads, K key/value heads, E head width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class LlamaConfig:
    """The decoder's shape. Names and defaults are Hugging Face's Llama's: a published config leaves out what equals its default."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = None  # a token sees this many tokens, itself included; None: all before it
    tie_word_embeddings: bool = False  # the output head shares the embedding's matrix

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight; the mean is taken in float32. https://arxiv.org/abs/1910.07467, equation 4."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_table(positions, head_dim, theta):
    """The angles positions · theta^(−2i/E), i = 0 … E/2 − 1, as `rotate` wants them: (cos, cos) and (−sin, sin).

    positions: (B, T). Returns two tensors (B, 1, T, E), in float32 whatever the model's type.
    RoFormer, https://arxiv.org/abs/2104.09864, equation 15.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """RoPE in the half-split form: a head's first half a and its second half b become a cos − b sin and b cos + a sin.

    As a sum over whole heads: (a, b) · (cos, cos) + (b, a) · (−sin, sin). The last factors are the tables of `rope_table`, and
    (b, a) is x rolled by E/2.

    The paper rotates neighbouring dimensions as pairs, 2i and 2i + 1. Hugging Face's conversion permuted the rows of q_proj and
    k_proj so that the two of a pair are E/2 apart. Query and key are permuted alike, so their product is the same.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # (B, H, T, E)


class Places(NamedTuple):
    """Where the new tokens stand and what they may see. It is the same for all blocks, so it is made once (`Llama.places`)."""

    rope: tuple  # the tables of `rope_table` for the T tokens: (B, 1, T, E) each
    mask: torch.Tensor | None  # (B, 1, T, S), added to the scores: 0 or −∞; None: plain causal attention
    slots: torch.Tensor  # (T,), the tokens' places in the cache
    seen: int  # S: attention looks at the first S slots of the cache
    queries: slice  # the tokens whose output is computed: all, or in a prompt's last block only the last

    def last_query(self):
        """For the last block of a prompt: the first word needs the last token's output and none of the others'."""
        mask = None if self.mask is None else self.mask[:, :, -1:]
        return self._replace(mask=mask, queries=slice(-1, None))


class Attention(nn.Module):
    """Causal self-attention; H / K query heads share one key/value head (grouped-query attention)."""

    def __init__(self, config):
        super().__init__()
        D, H, K, E = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = E
        self.q_proj = nn.Linear(D, H * E, bias=False)
        self.k_proj = nn.Linear(D, K * E, bias=False)
        self.v_proj = nn.Linear(D, K * E, bias=False)
        self.o_proj = nn.Linear(H * E, D, bias=False)
        self.attend = attention  # loading may put a form of it here that is faster on the device

    def forward(self, x, at, cache=None, maps=None):
        """x (B, T, D) to the same shape, or to (B, 1, D) where only the last token's output is wanted (`Places.queries`).

        at: a Places; cache: this layer's LayerCache, or None; maps: a list to add the attention map to, or None.
        """
        q = self.heads(self.q_proj(x))  # (B, H, T, E)
        k, v = self.heads(self.k_proj(x)), self.heads(self.v_proj(x))  # (B, K, T, E)
        rotated = rotate(torch.cat([q, k], dim=1), *at.rope)  # both at once: half as many kernels
        q, k = rotated.split([q.shape[1], k.shape[1]], dim=1)
        if cache is not None:
            k, v = cache.update(k, v, at.slots, at.seen)  # (B, K, S, E): with those of the earlier tokens
        if maps is None:
            out = self.attend(q[:, :, at.queries], k, v, at.mask)
        else:
            out, weights = naive_attention(q[:, :, at.queries], k, v, at.mask)
            maps.append(weights)
        return self.o_proj(out.transpose(1, 2).flatten(-2))  # (B, T, D)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def attention(q, k, v, mask):
    """softmax(q kᵀ / √E + mask) v, fused: (B, H, T, E). mask: (B, 1, T, S); None: query t sees keys 0 to t, a single query all.

    PyTorch's kernels that take a mask cannot share a key/value head between query heads, and copying it for each of them would cost
    more than the attention itself. So the H / K query heads of a group become one head with H / K times as many queries.
    """
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=groups > 1)
    if groups == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    q = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, K, H / K · T, E)
    if T > 1:
        mask = mask.repeat(1, 1, groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(2, (groups, T)).flatten(1, 2)


def naive_attention(q, k, v, mask):
    """The same attention written out, where its weights are wanted, too: (B, H, T, E) and (B, H, T, S). mask: never None."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, E)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask  # (B, H, T, S)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). https://arxiv.org/abs/2002.05202, equation 6."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, at, cache=None, maps=None):
        x = x[:, at.queries] + self.self_attn(self.input_layernorm(x), at, cache, maps)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Llama(nn.Module):
    """embed(ids) gives (B, T, D), calling the model gives hidden states (B, T, D), and lm_head of those the logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Empty, to be filled by the checkpoint: nn.Embedding's own random numbers would import PyTorch's compiler on the meta device.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, ids):
        return self.embed_tokens(ids)

    def forward(self, x, attention_mask=None, positions=None, cache=None, states=None, maps=None, last=False):
        """Run the blocks over embeddings x (B, T, D); returns the normalised last hidden state (B, T, D).

        attention_mask: (B, T) bool, False for padding; None: no padding.
        positions: (B, T) for RoPE; None: counted over the real tokens, those in the cache included.
        cache: a KVCache. The T tokens are added to it, and they see the tokens that it holds.
        states: a list to add the hidden states to: before the first block, then after each block, the last one normalised.
        maps: a list to add the attention maps (B, H, T, S) of the blocks to.
        last: return the last token's state alone, (B, 1, D); of the others the last block computes only keys and values.
        """
        plain = maps is None and is_plain(x.shape[1], attention_mask, cache, self.config.sliding_window)
        at = self.places(x, attention_mask, positions, cache, plain)
        for i, block in enumerate(self.layers):
            if states is not None:
                states.append(x)
            if last and i + 1 == len(self.layers):
                at = at.last_query()
            x = block(x, at, None if cache is None else cache.layers[i], maps)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        return x

    def places(self, x, attention_mask, positions, cache, plain):
        """The Places of the T tokens of x (B, T, D). A cache gives them slots. Arguments as in `forward`; plain: see `is_plain`."""
        B, T, _ = x.shape
        real = x.new_ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask
        if cache is None:
            slots, seen = torch.arange(T, device=x.device), T
            counted = (real.cumsum(1) - 1).clamp(min=0)  # how many real tokens stand before this one
        else:
            slots, counted = cache.take(real)
            real = cache.real
            seen = T if plain else cache.extent()
        mask = None
        if not plain:
            mask = torch.where(visible(real[:, :seen], slots, self.config.sliding_window), 0.0, -torch.inf).to(x.dtype)  # (B, 1, T, S)
        if cache is not None and positions is None:
            rope = tuple(table[0, 0, counted].unsqueeze(1) for table in cache.rope)  # (B, 1, T, E), looked up
        else:
            tables = rope_table(counted if positions is None else positions, self.config.head_dim, self.config.rope_theta)
            rope = tuple(table.to(x.dtype) for table in tables)
        return Places(rope, mask, slots, seen, slice(None))


def is_plain(T, attention_mask, cache, window):
    """Whether T new tokens see only each other, causally. Then attention needs no mask, and PyTorch's kernels are at their fastest.

    | the new tokens               | plain?                                                          |
    |------------------------------|-----------------------------------------------------------------|
    | are more than the window     | no: the first must be hidden from the last                      |
    | have padding among them      | no: it must be hidden                                           |
    | come after others in a cache | no: they see those too                                          |
    | are one, with a cache        | no: to ask whether others came before would make the host wait  |
    | otherwise                    | yes                                                             |

    With T queries and more than T keys `is_causal` would be wrong: PyTorch aligns its triangle at the top left, so query 0 would see
    key 0 alone.
    """
    if window is not None and T > window:
        return False
    if cache is not None and (T == 1 or cache.length):
        return False
    return attention_mask is None or T > 1 and bool(attention_mask.all())


def visible(real, slots, window):
    """Which slots each query may attend to: (B, 1, T, S), True where it may.

    real: (B, S), True for slots that hold a token; slots: (T,), those of the queries; window: a length, or None.
    A slot is visible if it holds a real token, does not come after the query, and is fewer than `window` slots back.
    A query always sees itself, so that the softmax over a row of padding has something to sum.
    """
    key, query = torch.arange(real.shape[1], device=real.device), slots[:, None]
    mask = key <= query  # (T, S)
    if window is not None:
        mask &= key > query - window
    mask = mask & real[:, None, :] | (key == query)  # (B, T, S)
    return mask[:, None]


class LayerCache:
    """One layer's keys, after RoPE, and values: (B, K, slots, E) each."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def update(self, k, v, slots, seen):
        """Write the new tokens' k and v (B, K, T, E) into their slots; returns the first `seen` slots of both."""
        self.keys.index_copy_(2, slots, k)
        self.values.index_copy_(2, slots, v)
        return self.keys[:, :, :seen], self.values[:, :, :seen]


class KVCache:
    """The keys and values of the tokens so far, so that each new token computes only its own.

    Memory for `max_length` slots is allocated once and written in place; only `grow` moves it. All rows of the batch take the same
    slots. A row with fewer tokens has padding in some of them, and the cache knows which. Its length is a tensor on the device, where
    a decode step adds to it without making the host wait.
    """

    def __init__(self, config, batch_size, max_length, device="cpu", dtype=torch.float32):
        """Memory: 2 · layers · batch_size · K · max_length · E elements of dtype."""
        # Zeros, not empty memory: a masked slot has weight 0, but 0 × NaN would still be NaN.
        zeros = lambda: torch.zeros(batch_size, config.num_key_value_heads, max_length, config.head_dim, device=device, dtype=dtype)
        self.layers = [LayerCache(zeros(), zeros()) for _ in range(config.num_hidden_layers)]
        self.real = torch.zeros(batch_size, max_length, device=device, dtype=torch.bool)  # False: padding, or not yet taken
        self.length = torch.zeros((), device=device, dtype=torch.long)  # slots taken
        self.config = config
        self.rope = self._rope_table()  # of all positions; a step looks up its own

    @property
    def batch_size(self):
        return self.real.shape[0]

    @property
    def max_length(self):
        return self.real.shape[1]

    @property
    def dtype(self):
        return self.layers[0].keys.dtype

    def _rope_table(self):
        positions = torch.arange(self.max_length, device=self.real.device)[None]
        return [table.to(self.dtype) for table in rope_table(positions, self.config.head_dim, self.config.rope_theta)]  # (1, 1, S, E)

    def take(self, attention_mask):
        """Give the next T slots to new tokens, real where attention_mask (B, T) is True and padding elsewhere.

        Returns the slots (T,) and the positions (B, T). A real token's position is the number of real tokens before it.
        """
        slots = self.length + torch.arange(attention_mask.shape[1], device=self.length.device)
        positions = self.real.sum(1, keepdim=True) + attention_mask.cumsum(1) - 1
        self.real.index_copy_(1, slots, attention_mask)
        self.length += attention_mask.shape[1]
        return slots, positions.clamp(min=0)

    def extent(self):
        """How many slots attention looks at. On a CPU those that are taken. Elsewhere all: reading the length would make the host
        wait, and a step that is captured or compiled has fixed shapes."""
        fixed = self.real.device.type != "cpu" or torch.compiler.is_compiling()
        return self.max_length if fixed else int(self.length)

    def truncate(self, length):
        """Forget all but the first `length` slots."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} slots of a cache that holds {int(self.length)}")
        self.length.fill_(length)
        self.real[:, length:] = False

    def grow(self, max_length):
        """Make room for max_length slots in all; what is stored stays."""
        extra = max_length - self.max_length
        if extra < 0:
            raise ValueError(f"cannot grow a cache of {self.max_length} slots to {max_length}")
        for layer in self.layers:  # one by one: never two whole caches at once
            layer.keys = F.pad(layer.keys, (0, 0, 0, extra))
            layer.values = F.pad(layer.values, (0, 0, 0, extra))
        self.real = F.pad(self.real, (0, extra))
        self.rope = self._rope_table()
