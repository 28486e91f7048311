"""Exercise 6: attention, with grouped queries.

softmax(q kᵀ / √E + mask) v (https://arxiv.org/abs/1706.03762, equation 1), where a query may look at some keys only.
Mistral, and so BakLLaVA, has fewer key/value heads than query heads (https://arxiv.org/abs/2305.13245): with H query heads
and K key/value heads, query head h reads key/value head h // (H / K). First write it for H = K, then add the groups.

`attention` becomes `llama.attention`. Do not use scaled_dot_product_attention: it is what you are writing.
"""


def attention(q, k, v, mask):
    """q: (B, H, T, E); k, v: (B, K, S, E); mask: (B, 1, T, S), 0 where query t may look at slot s and −∞ where it may not.
    None: query t may look at keys 0 to t; a single query (T = 1) at all of them. Returns (B, H, T, E)."""
    raise NotImplementedError("exercise 6: write attention")
