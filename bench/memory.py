"""The memory that a step of training takes, at full size and without a GPU: the whole step is run on tensors that have
shapes and types but no memory, and what they would take is added up as they come and go.

    python -m bench.memory                               # the tables in docs/finetune.md, a few minutes
    python -m bench.memory --shapes 7b --batches 2 4     # other sizes

Counted are tensors alone: weights, gradients, AdamW's moments, activations. What the allocator rounds up and leaves unused
and what the CUDA libraries take comes on top.
"""

import argparse
import tempfile
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.shapes import SHAPES, write_configs
from llava import Llava
from train import make_trainable
from training.lora import add_adapter
from weights.config import LlavaConfig
from weights.load import outline


class Count(TorchDispatchMode):
    """The bytes of all storages that were made under it: those there are `now`, and the `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, address, size):
        self.known.remove(address)
        self.now -= size


def training_memory(config, stage, checkpointed, rows, tokens, dtype=torch.bfloat16, lora=None, scheme=None):
    """Bytes of one step: held throughout, saved by a forward pass for its backward pass, and at the peak.

    `rows` conversations of `tokens` tokens, each with one picture. Gradients count as held: with --accumulate they are.
    lora: the rank of the adapter that is trained in place of the language model. scheme: of the language model's weights.
    """
    model = outline(Llava, config, scheme)
    with FakeTensorMode(), Count() as count:
        for name, parameter in list(model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            empty = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            setattr(model.get_submodule(module), leaf, empty)
        for name, buffer in list(model.named_buffers()):
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, torch.empty(buffer.shape, dtype=buffer.dtype))
        if lora:
            add_adapter(model, lora, 2 * lora)
        parameters, optimizer, autocast = make_trainable(model, stage, dtype, checkpointed)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        ids = torch.full((rows, tokens), config.image_id)
        ids[:, config.features_per_image :] = 5
        pixels = torch.empty(rows, 3, config.vision.image_size, config.vision.image_size)
        held = count.peak = count.now
        with autocast:
            # Llava.forward, but for the checks that read values, which there are none of.
            logits = model(inputs_embeds=model.embed(ids, pixels)[0]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        del logits
        saved = count.now - held
        loss.backward()
        optimizer.step()
        return held, saved, count.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b", "13b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8], help="conversations in one forward pass")
    parser.add_argument("--tokens", nargs="+", type=int, default=[640, 2048], help="of a conversation, the 576 of its picture included")
    args = parser.parse_args()
    sizes = [(rows, tokens) for tokens in args.tokens for rows in args.batches]
    print("| peak in GB | held | " + " | ".join(f"{rows} × {tokens}" for rows, tokens in sizes) + " |")
    print("|---" * (2 + len(sizes)) + "|")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_configs(shape, Path(folder))
            config = LlavaConfig.from_pretrained(folder)
        for trained, stage, lora, scheme in (
            ("stage 1", 1, None, None), ("stage 2", 2, None, None), ("LoRA 16", 2, 16, None), ("LoRA 16 on int4", 2, 16, "int4"),
        ):  # fmt: skip
            for checkpointed in (False, True):
                name = f"{shape.upper()}, {trained}" + ", checkpointed" * checkpointed
                runs = [training_memory(config, stage, checkpointed, *size, lora=lora, scheme=scheme) for size in sizes]
                print(f"| {name} | {runs[0][0] / 1e9:.0f} | " + " | ".join(f"{peak / 1e9:.0f}" for _, _, peak in runs) + " |", flush=True)


if __name__ == "__main__":
    main()
