"""A conversation about pictures: words, pictures and model together.

`Chat.ask` is the whole way from a question to an answer: the chat format, the tokenizer, the pictures' features in the place
of `<image>`, generation, and the text as it comes.
"""

import torch
from PIL import Image

from generate import cache_length, check_options
from images import ImageProcessor
from llama import KVCache
from llava import Llava
from tokenizer import SPECIAL_LITERALS, STYLES, Tokenizer, chat_prompt, expand_images, stop_at
from weights.checkpoint import checkpoint_folder


class Chat:
    """Model, tokenizer and image processor, and one conversation with them.

    The KV cache is kept between turns. Each turn writes out the whole conversation and encodes it, and only what the
    cache does not hold yet is computed: the last answer's end and the new question. A picture is encoded once.
    """

    def __init__(self, model, tokenizer, processor):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.system = None  # a system sentence; None: the style's own
        self.pad = False  # pad pictures to a square instead of cropping them
        self._turn = None  # the answer that is being given
        self._cache = None  # the KV cache; it outlives a conversation, and with it what was captured for its size
        self.reset()

    @classmethod
    def from_pretrained(cls, folder_or_hub_name, device="cpu", dtype=None, quantize=None, mapped=True):
        """See Llava.from_pretrained; the tokenizer and the image processor come from the same folder."""
        folder = checkpoint_folder(folder_or_hub_name)
        tokenizer, processor = Tokenizer.from_pretrained(folder), ImageProcessor.from_pretrained(folder)
        model = Llava.from_pretrained(folder, device, dtype, quantize, mapped)
        config = model.config
        if tokenizer.image_id != config.image_id:
            raise ValueError(f"{folder}: <image> is {tokenizer.image_id} in the tokenizer and {config.image_id} in config.json")
        if processor.crop_size != config.vision.image_size:
            raise ValueError(f"{folder}: pictures are cropped to {processor.crop_size}, the vision tower takes {config.vision.image_size}")
        return cls(model, tokenizer, processor)

    def reset(self):
        """Start a new conversation."""
        self._end_turn()
        self.messages, self.images = [], []  # every turn so far; the pictures of all turns, in order
        self._cached = []  # the id in each slot of the KV cache that is taken

    def _end_turn(self):
        """An answer that its reader left unfinished ends here, and enters the conversation as far as it was read."""
        if self._turn is not None:
            self._turn.close()
        self._turn = None

    def prompt(self, question, images=()):
        """The exact text the model would read for the next question: the whole conversation up to the answer."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_prompt(system + self.messages + [{"role": "user", "content": content}], self.model.config.style)

    def ask(self, question, images=(), max_new_tokens=512, temperature=0.0, top_k=None, top_p=None, seed=None):
        """Ask the next question, about `images` (PIL) and all pictures before: an iterator of the answer's pieces.

        The pieces are whole characters and join to the answer, which enters the conversation as far as it was read.
        Raises ValueError at once for a question or a picture that cannot be asked; the conversation is then unchanged.
        """
        model, config, P = self.model, self.model.config, self.model.config.features_per_image
        if not isinstance(images, list | tuple) or not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"images are {type(images).__name__}; expected a list of PIL pictures (images.open_image opens a file)")
        check_options(max_new_tokens, temperature, top_k, top_p, seed)
        self._end_turn()
        prompt = expand_images(self.tokenizer.encode(self.prompt(question, images)), config.image_id, P)
        kept = self._cached_prefix(prompt)
        new = prompt[kept:]
        # Which pictures are new? All <image> ids are alike, but a conversation only grows at its end, and `reset` forgets the
        # cache's ids: where ids agree, so do the pictures, and those not yet cached are the last.
        pictures = [*self.images, *images]
        uncached = pictures[len(pictures) - new.count(config.image_id) // P :]
        pixels = self.processor(uncached, pad=self.pad) if uncached else None

        wanted = cache_length(config, len(prompt) + max_new_tokens)
        if self._cache is None:
            self._cache = KVCache(config.text, 1, wanted, model.device, model.dtype)
        elif wanted > self._cache.max_length:  # at least doubled, so that a long chat moves it only a few times
            try:
                self._cache.grow(max(wanted, cache_length(config, 2 * self._cache.max_length)))
            except RuntimeError:  # out of memory, half way: the conversation stays, and is read anew next time
                self._cache, self._cached = None, []
                raise
        self._cache.truncate(kept)
        self._cached = prompt[:kept]
        ids = model.generate(
            torch.tensor([new]), pixels, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            cache=self._cache,
        )  # fmt: skip
        self._turn = self._answer(question, images, prompt, ids)
        return self._turn

    def _cached_prefix(self, prompt):
        """How many ids the cache holds as this prompt begins; the last is left out, to be computed for its logits."""
        n = 0
        while n < min(len(self._cached), len(prompt) - 1) and self._cached[n] == prompt[n]:
            n += 1
        return n

    def _answer(self, question, images, prompt, steps):
        """Stream one answer, and enter the turn into the conversation when it ends or its reader stops reading."""
        answer, ids = [], []
        end = STYLES[self.model.config.style].end  # "</s>" never shows, it ends the steps; ViP's "###" is plain text

        def recorded():
            for token in steps:
                ids.append(int(token))
                self._cached = prompt + ids[:-1]  # a token enters the cache when the next one is computed
                yield ids[-1]

        try:
            for piece in stop_at(self.tokenizer.stream(recorded()), end):
                answer.append(piece)
                yield piece
        finally:
            if ids:
                content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
                said = "".join(answer)
                while found := [literal for literal in SPECIAL_LITERALS if literal in said]:
                    said = said.replace(found[0], "")  # spelt out by the model, it would be read as the token next time
                self.messages += [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
                self.images += images
