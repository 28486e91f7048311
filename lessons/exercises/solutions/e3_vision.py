"""Exercise 3, keeping every state up to the last one wanted."""

import torch


def forward(self, pixel_values, layers):
    wanted = [k if k >= 0 else len(self.layers) + 1 + k for k in layers]
    patches = self.patch_embedding(pixel_values)  # (N, P, D)
    N, _, D = patches.shape
    first = self.class_embedding.view(1, 1, D).repeat(N, 1, 1)
    states = [self.pre_layrnorm(torch.cat([first, patches], 1) + self.position_embedding.weight)]
    for k in range(max(wanted)):
        states.append(self.layers[k](states[-1]))
    return [states[k] for k in wanted]
