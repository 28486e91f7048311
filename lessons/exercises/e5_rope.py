"""Exercise 5: rotary positions (RoPE, https://arxiv.org/abs/2104.09864, section 3.2.2).

Queries and keys are turned by angles that grow with their positions, so that their product depends on the distance alone.
Dimension i, of the first half, is paired with dimension i + E/2. The pair (a, b) at position p is turned by the angle
p · theta^(-2i/E) to (a cos - b sin, b cos + a sin).

`rope_table` computes what `rotate` needs, once for all layers, in float32. What the two tensors hold is yours to choose,
as long as your `rotate` fits: only their third dimension is looked at by others, and it is that of the tokens.
"""


def rope_table(positions, head_dim, theta):
    """positions: (B, T) whole numbers; head_dim: E. Returns two tensors (B, 1, T, any), float32."""
    raise NotImplementedError("exercise 5: write the table of angles")


def rotate(x, cos, sin):
    """x: (B, heads, T, E), queries or keys; cos and sin: the two tensors of rope_table, in x's type. Returns x's shape."""
    raise NotImplementedError("exercise 5: rotate the pairs")
