"""Exercise 7: who may look at whom.

Three rules, for the query in slot q and the key in slot k of the KV cache:
- causality: k does not come after q;
- padding: k holds a real token (rows of a batch have different lengths, and the shorter ones are padded);
- Mistral's sliding window (https://arxiv.org/abs/2310.06825, section 2): a token sees `window` tokens, itself included.
And one exception: a query always sees itself, even where it is padding, because a softmax over nothing is not a number.

`visible` becomes `llama.visible`; what may not be seen then gets −∞ added to its score.
"""


def visible(real, slots, window):
    """real: (B, S) bool, True for slots that hold a token; slots: (T,), the slots of the queries; window: a length, or None
    for no window. Returns (B, 1, T, S) bool, True where the query may look."""
    raise NotImplementedError("exercise 7: write the mask")
