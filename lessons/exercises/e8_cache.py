"""Exercise 8: the KV cache. Why the hundredth word costs no more than the first.

Keys and values of tokens that have been read do not change, so they are kept, and each new token computes only its own.
The memory is allocated once; the tokens of one forward pass take the next slots, the same in all rows. A row may have
padding among them, and the cache remembers which slots hold real tokens. Positions count real tokens only: a row that was
padded by three starts at position 0 all the same. (What padding gets as a position does not matter, but 0 is the least.)

`take` becomes `llama.KVCache.take`, called once in a forward pass. There `self` has
    real            (B, S) bool, False for padding and for slots not yet taken
    length          a tensor without dimensions: how many slots are taken
`update` becomes `llama.LayerCache.update`, called by each layer. There `self` has
    keys, values    (B, K, S, E) each
All of them are changed in place (`index_copy_`, `+=` …): a decode step that was captured reads these very tensors. For the
same reason no number may be read from them on the way (no int(self.length)).
"""


def take(self, attention_mask):
    """attention_mask: (B, T) bool, True for the new tokens that are real. Returns the slots (T,) that they take and their
    positions (B, T)."""
    raise NotImplementedError("exercise 8: take the next slots")


def update(self, k, v, slots, seen):
    """k, v: (B, K, T, E), the new tokens' keys and values; slots: (T,), where they belong. Returns the keys and the values of the
    layer's first `seen` slots, (B, K, seen, E) each."""
    raise NotImplementedError("exercise 8: write keys and values to their slots")
