"""One library in a process of its own, so that neither warms or burdens the other. It answers commands, a JSON line each:

python -m bench.worker ours FOLDER cpu bfloat16
"""

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from weights.config import LlavaConfig
from weights.load import outline
from weights.memory import weight_bytes, worth_copying
from weights.quantize import GROUPS

PICTURE = Path(__file__).parent.parent / "tiny" / "example.png"
QUESTION, SECOND = "Describe the picture.", "Where is the square?"


def prompt():
    return f"USER: <image>\n{QUESTION} ASSISTANT:"


def text_alone(batch, length):
    """Ids of a prompt without a picture: (batch, length)."""
    return torch.arange(3, 3 + length).repeat(batch, 1) % 256


class Ours:
    def __init__(self, quantize=None):
        from chat import Chat
        from llava import Llava

        self.model_class, self.loader, self.quantize = Llava, Chat, quantize

    def load(self, folder, device, dtype):
        weights = weight_bytes(outline(self.model_class, LlavaConfig.from_pretrained(folder)), dtype)
        mapped = not worth_copying(weights)  # as sample.py does
        self.chat = self.loader.from_pretrained(folder, device, dtype, self.quantize, mapped)

    def generate(self, batch, length, tokens):
        """The time at which each step's tokens have reached the host. length: of a prompt of text alone; 0: the bundled
        picture and question. No token ends a row."""
        chat = self.chat
        if length:
            ids, pixels = text_alone(batch, length), None
        else:
            ids, pixels = torch.tensor([chat.tokenizer.encode(prompt())] * batch), chat.processor([picture()] * batch)
        return [time.perf_counter() for _ in chat.model.generate(ids, pixels, None, tokens, eos_ids=())]

    def turns(self):
        """Seconds until the first token of a chat's first and second answer; and the first answer, for others to repeat."""
        self.chat.reset()
        seconds, answers = [], []
        for question, images, tokens in ((QUESTION, [picture()], 16), (SECOND, [], 1)):
            start = time.perf_counter()
            steps = self.chat.ask(question, images, max_new_tokens=tokens)
            answers.append(next(steps, ""))
            seconds.append(time.perf_counter() - start)
            answers[-1] += "".join(steps)
        return *seconds, answers[0]


class Compiled(Ours):
    def load(self, folder, device, dtype):
        from hardware.step import compiled

        super().load(folder, device, dtype)
        self.chat.model.decode_step = compiled(self.chat.model.decode_step, self.chat.model.device)


class Transformers:
    cache = None  # generate's default

    def __init__(self):
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.loaders = AutoProcessor, LlavaForConditionalGeneration

    def load(self, folder, device, dtype):
        processor, model = self.loaders
        self.processor = processor.from_pretrained(folder)
        self.model = model.from_pretrained(folder, dtype=dtype).to(device)

    def generate(self, batch, length, tokens):
        if length:
            ids = text_alone(batch, length)
            return self._generate(dict(input_ids=ids, attention_mask=torch.ones_like(ids)), tokens)
        return self._generate(self.processor(images=[picture()] * batch, text=[prompt()] * batch, return_tensors="pt"), tokens)

    def turns(self, answer):
        """As a newcomer would: the second turn is the whole conversation once more."""
        seconds = []
        for text in (prompt(), f"{prompt()} {answer}</s>USER: {SECOND} ASSISTANT:"):
            start = time.perf_counter()
            self._generate(self.processor(images=picture(), text=text, return_tensors="pt"), 1)
            seconds.append(time.perf_counter() - start)
        return seconds

    def _generate(self, inputs, tokens):
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        times = []

        def note(ids, scores):  # called once a token
            if ids.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[note],
            cache_implementation=self.cache,
        )
        return times


class StaticTransformers(Transformers):
    cache = "static"  # generate then compiles its decode step on a GPU


class Peer(Transformers):
    """What transformers' users take for 8 and 4 bits (needs accelerate, and torchao or bitsandbytes), on the same layers."""

    def __init__(self, name):
        super().__init__()
        import transformers

        others = ["vision_tower", "multi_modal_projector"]
        if name == "torchao int8":
            from torchao.quantization import Int8WeightOnlyConfig

            self.config = transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[*others, "lm_head"])
        else:
            bits = {"bitsandbytes int8": dict(load_in_8bit=True), "bitsandbytes int4": dict(load_in_4bit=True)}[name]
            compute = dict(bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=[*others, "lm_head"])
            self.config = transformers.BitsAndBytesConfig(**bits, **compute)

    def load(self, folder, device, dtype):
        processor, model = self.loaders
        self.processor = processor.from_pretrained(folder)
        self.model = model.from_pretrained(folder, dtype=dtype, quantization_config=self.config, device_map=str(device))


LIBRARIES = {"ours": Ours, "ours, compiled": Compiled, "transformers": Transformers, "transformers, static cache": StaticTransformers}
LIBRARIES |= {f"ours, {scheme}": partial(Ours, scheme) for scheme in GROUPS}
LIBRARIES |= {f"ours, {scheme}, compiled": partial(Compiled, scheme) for scheme in GROUPS}
PEERS = ("torchao int8", "bitsandbytes int8", "bitsandbytes int4")
LIBRARIES |= {name: partial(Peer, name) for name in PEERS}


def picture():
    with Image.open(PICTURE) as image:
        return image.convert("RGB")


def peak_memory(device):
    """The most bytes held so far: of the GPU's memory, or of this process's (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    (peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak) * 1024


def generation(library, options):
    """Seconds to the first token, and of each after it."""
    start = time.perf_counter()
    times = library.generate(**options)
    return times[0] - start, (times[-1] - times[0]) / max(1, len(times) - 1)


def steady(run, seconds=1.0):
    """The medians of what `run` measures, called for so long, and at least once: what has waited for its turn begins slowly."""
    results, end = [], time.perf_counter() + seconds
    while not results or time.perf_counter() < end:
        results.append(run())
    return [statistics.median_low(values) for values in zip(*results)]


def main():
    name, folder, device, dtype = sys.argv[1:]
    library, device = LIBRARIES[name](), torch.device(device)  # what it imports is not part of its loading

    def reply(*values):
        print(json.dumps({"reply": values}), flush=True)

    start = time.perf_counter()
    library.load(folder, device, getattr(torch, dtype))
    reply(time.perf_counter() - start, peak_memory(device))
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "generate":
                reply(*steady(partial(generation, library, command)))
            case "turns":
                reply(*steady(partial(library.turns, **command)))
            case "memory":
                reply(peak_memory(device))


if __name__ == "__main__":
    main()
