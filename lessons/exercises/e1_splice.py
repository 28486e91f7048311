"""Exercise 1: the splice. Where a picture enters the language model.

A prompt with a picture is a row of token ids in which the id of <image> stands once for each feature of the picture
(576 times in a row, for LLaVA-1.5). Every id has been looked up in the table of word embeddings, that of <image> too, but
what was found for it there means nothing. Put the picture's features in its place.

The features are those of all pictures of the batch, in the order in which the <image> ids come, row by row. Rows may have
none, one or several pictures. The features may be of another floating-point type than the embeddings; the result has theirs.

`masked_scatter` does it in one line; a loop over the pictures is just as right. The embeddings given must not change.
"""


def splice(embeds, is_image, features):
    """embeds: (B, T, D) word embeddings; is_image: (B, T) bool, where the ids are <image>; features: (N, P, D), with
    N · P True positions in is_image. Returns (B, T, D)."""
    raise NotImplementedError("exercise 1: write the splice")
