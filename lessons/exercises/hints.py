"""Hints to the exercises, the mildest first."""

HINTS = {
    1: (
        "The True positions of is_image, row by row, are as many as the features of all pictures: put one list into the other.",
        "features.flatten(0, 1) is (N · P, D). An assignment to embeds[is_image] fills in that order; but embeds must not change.",
        "embeds.masked_scatter takes a mask that broadcasts to its shape, and values of its own type.",
    ),
    2: (
        "Three calls of what self has, and one function between the second and the third.",
        "torch.nn.functional.gelu is the exact one, unless it is told otherwise.",
    ),
    3: (
        "Negative numbers first: there are len(self.layers) + 1 states, so −1 is the one with the number len(self.layers).",
        "The convolution gives (N, D, rows, columns); a sequence is (N, patches, D): flatten two dimensions, then exchange two.",
        "Run only the blocks below the highest state that is wanted: self.layers[: max(wanted)].",
    ),
    4: (
        "The mean of squares is over the last dimension, kept for broadcasting. eps belongs under the root.",
        "x.float() at the beginning, .to(x.dtype) before the weight: test_half_precision looks at just that.",
        "SwiGLU: down(silu(gate(x)) · up(x)).",
    ),
    5: (
        "The exponents −2i/E for i = 0 … E/2 − 1 are E/2 numbers; positions · frequencies is (B, T, E/2).",
        "x's first half is x[..., : E // 2], its second half the rest; concatenate the two results in that order.",
        "A dimension of 1 after B makes the tables broadcast over the heads.",
    ),
    6: (
        "scores = q @ kᵀ / √E: k.transpose(-1, -2) is (…, E, S).",
        "Query heads of one group are neighbours: repeat_interleave on dimension 1, not repeat.",
        "Without a mask, and T above 1: −∞ above the diagonal (torch.triu with diagonal 1) before the softmax.",
    ),
    7: (
        "A comparison of a column of query slots with a row of key slots gives (T, S).",
        "The window counts the token itself: the last key that is seen lies window − 1 slots back.",
        "real[:, None, None, :] & mask is (B, 1, T, S); the exception for key == query comes last, with |.",
    ),
    8: (
        "The new slots are length, length + 1 …; as a tensor: self.length + torch.arange(T).",
        "A position is the number of real tokens before: those in the cache, plus a cumulative sum over the new mask, minus 1.",
        "index_copy_(1, slots, attention_mask) for real, index_copy_(2, slots, k) for a layer's keys.",
    ),
    9: (
        "Build the messages turn by turn, and write the conversation out after each: what has been added is the turn.",
        "The text before an answer ends in “ASSISTANT:”; the ids that come on top of its own are the answer's and the end mark's.",
        "labels += [−100] · (how many ids the human's turn added), then labels += the ids that the answer added.",
    ),
    10: (
        "Set the logits of what is left out to −∞: softmax gives them 0 and scales the others to 1.",
        "For top_p sort descending, softmax, cumulative sum. A token stays if the sum of those *before* it is below p.",
        "torch.multinomial(probabilities, 1, generator=random) draws one for each row.",
    ),
    11: (
        "The short side becomes self.size exactly, the long one int(self.size · long / short).",
        "PIL's sizes are (width, height), numpy's arrays (height, width, colours), and the tower wants colours first.",
        "(values · 0.00392156862745098).astype(float32) first, the mean after that.",
    ),
    12: (
        "A step is (max − min) / 15 of each group, and q counts steps from min: round((w − min) / step), held to 0 … 15.",
        "Two numbers of four bits make a byte: low | high << 4; and back: byte & 15 and byte >> 4.",
        "Which rows share a byte the docstring says: of every R rows the first half is low, the second half high.",
    ),
    13: (
        "for r in prange(len(w)): the rows, shared by the cores. Inside: row = w[r], total = float32(0), then the loop over k.",
        "total += number(row[k]) * x[k], and after the inner loop y[r] = total.",
        "If it is slow, an integer has become 64 bits, or an index is checked for being negative: loop over range(len(x)) alone.",
    ),
}
