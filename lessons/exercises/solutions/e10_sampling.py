"""Exercise 10, by ranks: sorted once, cut, drawn among the ranks, and back to ids."""

import torch


def sample(logits, temperature, top_k, top_p, random):
    if temperature == 0:
        return logits.argmax(dim=-1)
    ordered, ids = logits.float().sort(dim=-1, descending=True)
    ordered = (ordered - ordered[:, :1]) / max(temperature, 1e-30)  # in float32, 5e-324 would be 0
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    p = ordered.softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p
        p[:, 1:] = torch.where(before[:, 1:] < top_p, p[:, 1:], 0)
    rank = torch.multinomial(p, 1, generator=random)  # scales to 1 by itself
    return ids.gather(-1, rank)[:, 0]
