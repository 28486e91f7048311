"""Exercise 10: sampling. From scores to a word.

The logits are scores, softmax makes probabilities of them, and a token is drawn. Three settings change the odds, in this order:
- temperature divides the logits; 0 means: no draw, take the likeliest;
- top_k keeps the k likeliest tokens (all, if there are fewer);
- top_p keeps the fewest tokens, likeliest first, whose probabilities sum up to p at least (nucleus sampling,
  https://arxiv.org/abs/1904.09751, section 3.1); the likeliest always stays. The probabilities are those after the other two.
What is left is scaled to 1, which softmax does by itself where the others' logits are −∞.

A temperature may be as small as 5e-324: subtract the largest logit first, and let nothing be divided by 0.

`sample` becomes `generate.sample`.
"""


def sample(logits, temperature, top_k, top_p, random):
    """logits: (B, vocabulary); temperature: 0 or more; top_k, top_p: None for all; random: a torch.Generator, or None for the
    global one. Returns (B,), one id for each row, each row drawn for itself."""
    raise NotImplementedError("exercise 10: draw a token")
