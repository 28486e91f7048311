"""Exercise 2: the projector. From what the vision tower sees to what the language model reads.

LLaVA-1.5's projector is a linear layer, an exact GELU (by the error function, not the tanh approximation, and not CLIP's
quick_gelu), and another linear layer (https://arxiv.org/abs/2310.03744, section 3.3). ViP-LLaVA normalises first. In the
model that is one module more, `self.projector_layernorm`, which for LLaVA does nothing.

The function below becomes the `forward` of `llava.Projector`: `self` has `projector_layernorm`, `linear_1` and `linear_2`.
"""


def forward(self, x):
    """x: (N, P, L·V), the selected layers of the vision tower, concatenated. Returns (N, P, D)."""
    raise NotImplementedError("exercise 2: write the projector")
