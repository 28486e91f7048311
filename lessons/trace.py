"""The way of one question through the model, from pixels to the first word: each stage with its shape, type and time.

    python -m lessons.trace                                          # the bundled picture, question and model
    python -m lessons.trace --image photo.jpg --model … "What is this?"

The arguments are sample.py's. Below the stages stands the splice map: what each position of the sequence holds.
"""

import time

import torch

import sample
from explanation import spelling


class Trace:
    """Notes each module's output and the time that it took, by hooks."""

    def __init__(self, device):
        self.device, self.rows, self._started, self._hooks = device, [], {}, []

    def watch(self, module, name, meaning):
        """Add a row when the module has run."""

        def before(*_):
            self._started[name] = self._now()

        def after(_, __, out):
            self.add(name, out, meaning, self._now() - self._started[name])

        self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def add(self, name, value, meaning, seconds=None):
        """A row of the table. value: a tensor, or text to stand for its shape."""
        shape, kind = (tuple(value.shape), str(value.dtype)[6:]) if isinstance(value, torch.Tensor) else (value, "")
        self.rows.append((name, str(shape), kind, "" if seconds is None else f"{1e3 * seconds:.1f}", meaning))

    def close(self):
        for hook in self._hooks:
            hook.remove()

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def trace(chat, question, images):
    """Ask the question and stop at the first word: the rows (stage, shape, type, milliseconds, meaning) of the way there."""
    model, config, tokenizer = chat.model, chat.model.config, chat.tokenizer
    vision, llama = model.vision_tower, model.language_model
    rows = Trace(model.device)
    side, P = config.vision.image_size, config.features_per_image
    grid = side // config.vision.patch_size

    prompt = chat.prompt(question, images)
    ids = tokenizer.encode(prompt)
    for image in images:
        rows.add("picture", f"{image.width}×{image.height}", f"as opened, {image.mode}")
    rows.add("prompt", f"{len(prompt)} characters", repr(prompt))
    rows.add("ids", str(len(ids)), " ".join(map(str, ids[:12])) + " …" * (len(ids) > 12))
    if images:
        start = time.perf_counter()
        pixels = chat.processor(images, pad=chat.pad)
        rows.add(
            "pixels",
            pixels,
            f"{'padded and resized' if chat.pad else 'resized and cropped'} to {side}×{side}, normalised",
            time.perf_counter() - start,
        )
        rows.watch(vision.patch_embedding, "patches", f"{grid} × {grid} patches of {config.vision.patch_size} pixels, each one vector")
        rows.watch(vision.pre_layrnorm, "CLIP states 0", "with the class token in front and positions added")
        read = {k % (config.vision.num_hidden_layers + 1) for k in config.vision_layers}
        for n, layer in enumerate(vision.layers, 1):
            rows.watch(layer, f"CLIP states {n}", "read by the projector" if n in read else "")
        rows.watch(
            model.projector.linear_1,
            "projector, layer 1",
            f"{len(read)} of CLIP's states, " + ("" if config.keep_cls else "without the class token"),
        )
        rows.watch(model.projector, "image features", "patches in the space of words")
    rows.watch(llama.embed_tokens, "word embeddings", f"of {len(ids) + len(images) * (P - 1)} ids: each <image> stands {P} times")
    rows.watch(
        llama.layers[0].input_layernorm, "spliced embeddings", "image features in the places of <image>; here normalised for block 1"
    )
    for n, layer in enumerate(llama.layers, 1):
        last = "the last token's alone: of the others the last block makes keys and values only"
        rows.watch(layer, f"Llama block {n}", last if layer is llama.layers[-1] else "")
    rows.watch(llama.norm, "last states", "normalised")
    rows.watch(llama.lm_head, "logits", "of the last position only: a score for each token of the vocabulary")
    try:
        first = next(model.generate(torch.tensor([ids]), pixels if images else None, max_new_tokens=1))
    finally:
        rows.close()
    rows.add("first token", str(int(first)), repr(tokenizer.decode([int(first)])))
    return rows.rows


def splice_map(chat, question, images):
    """What each position of the spliced sequence holds: [(first position, last position, text), …]."""
    config, tokenizer = chat.model.config, chat.tokenizer
    width = config.vision.image_size // config.vision.patch_size
    ids, where, rows, picture = tokenizer.encode(chat.prompt(question, images)), 0, [], 0
    for token in ids:
        if token != config.image_id:
            rows.append((where, where, f"{token} {spelling(tokenizer, token)!r}"))
            where += 1
            continue
        picture += 1
        if config.keep_cls:
            rows.append((where, where, f"picture {picture}, class token"))
            where += 1
        for row in range(1, width + 1):
            rows.append((where, where + width - 1, f"picture {picture}, patches of row {row}, columns 1 to {width}"))
            where += width
    return rows


def table(rows):
    """The rows in columns, the last one as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def show(chat, args, images, marks):
    if args.chat:
        raise ValueError("--chat: the trace is of one question")
    print(table([("stage", "shape", "type", "ms", "what it is"), *trace(chat, args.question, images)]))
    print("\nThe sequence that the language model reads, position by position:")
    for first, last, text in splice_map(chat, args.question, images):
        print(f"{first:>5}" + (f"–{last:<5}" if last > first else " " * 6) + f"  {text}")


if __name__ == "__main__":
    sample.run(sample.argument_parser("python -m lessons.trace", __doc__), show)
