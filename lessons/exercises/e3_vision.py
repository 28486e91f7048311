"""Exercise 3: the vision tower. From pixels to hidden states, and no deeper than needed.

A vision transformer (https://arxiv.org/abs/2010.11929, section 3.1) cuts the picture into patches, maps each to a vector,
puts a class token in front, adds a learnt embedding for each position, and runs the blocks. CLIP normalises once more
before the first block.

The function below becomes the `forward` of `clip.CLIPVision`. `self` has
    patch_embedding    a linear map of each patch, row by row: (N, C, S, S) -> (N, P, D)
    class_embedding    (D,)
    position_embedding.weight    (1 + patches, D); the class token's comes first, then the patches' row by row
    pre_layrnorm       (that is how the checkpoints spell it)
    layers             the blocks, (N, 1 + patches, D) to the same shape
LLaVA reads layer -2: the last block is never needed, so do not run it.
"""


def forward(self, pixel_values, layers):
    """pixel_values: (N, C, S, S). layers: which hidden states to return, in this order; 0 is what enters the first block,
    k what leaves the k-th; negative numbers count from the end. Returns a list of (N, 1 + patches, D)."""
    raise NotImplementedError("exercise 3: write the vision tower")
