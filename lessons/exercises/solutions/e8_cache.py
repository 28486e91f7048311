"""Exercise 8, by assignment to indices."""

import torch


def take(self, attention_mask):
    T = attention_mask.shape[1]
    before = self.real.sum(1, keepdim=True)  # real tokens so far
    slots = torch.arange(T, device=self.length.device) + self.length
    self.real[:, slots] = attention_mask
    self.length.add_(T)
    return slots, (before + attention_mask.cumsum(1) - 1).clamp(min=0)


def update(self, k, v, slots, seen):
    self.keys[:, :, slots] = k
    self.values[:, :, slots] = v
    return self.keys[:, :, :seen], self.values[:, :, :seen]
