"""A conversation about pictures: model, tokenizer and image processor together.

`Chat.ask` is the whole way from a question to an answer: the chat format, the tokenizer, the pictures' features in the place of
`<image>`, generation, and the text as it comes. `Chat.answer`, `Chat.score` and `Chat.choose` are for questions outside the
conversation, each on its own; `questions.py` has what they do.
"""

import torch

from batch import common_prefix
from generate import cache_length
from images import ImageProcessor
from inputs import check_options, check_pictures, check_room_for_answer
from llama import KVCache
from llava import Llava
from questions import answers_in_batches, in_order, token_scores, user_message
from tokenizer import STYLES, Tokenizer, chat_prompt, expand_images, stop_at, without_literals
from weights.checkpoint import checkpoint_folder


class Chat:
    """One conversation with a model.

    Each turn writes out the whole conversation and encodes it. The KV cache is kept between turns, so the model computes only
    what is new: the end of the last answer, and the question. A picture is encoded once.
    """

    def __init__(self, model, tokenizer, processor):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.style = model.config.style  # the chat format, a name in tokenizer.STYLES
        self.system = None  # a system sentence; None: the style's own
        self.pad = model.config.pads_pictures  # pad pictures to a square instead of cropping them
        self._cache = None  # the KV cache, kept from one conversation to the next: a captured decode step belongs to it
        self._turn = None  # the generator of the answer under way
        self.reset()

    @classmethod
    def from_pretrained(cls, folder_or_hub_name, device="cpu", dtype=None, quantize=None, mapped=True):
        """See Llava.from_pretrained; the tokenizer and the image processor come from the same folder.

        Raises ValueError if the three do not fit each other.
        """
        folder = checkpoint_folder(folder_or_hub_name)
        tokenizer, processor = Tokenizer.from_pretrained(folder), ImageProcessor.from_pretrained(folder)
        model = Llava.from_pretrained(folder, device, dtype, quantize, mapped)
        config = model.config
        if tokenizer.image_id != config.image_id:
            raise ValueError(f"{folder}: <image> is {tokenizer.image_id} in the tokenizer and {config.image_id} in config.json")
        if processor.crop_size != config.vision.image_size:
            raise ValueError(f"{folder}: pictures are cropped to {processor.crop_size}, the vision tower takes {config.vision.image_size}")
        return cls(model, tokenizer, processor)

    # The prompt

    def text(self, messages):
        """The text of a conversation, its system sentence included."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_prompt(system + messages, self.style)

    def prompt(self, question, images=()):
        """The exact text the model would read for the next question: the whole conversation up to the answer."""
        return self.text([*self.messages, user_message(question, images)])

    def encode(self, text):
        """The ids of a prompt, each `<image>` as many times as a picture has features."""
        return expand_images(self.tokenizer.encode(text), self.model.config.image_id, self.model.config.features_per_image)

    @property
    def end_mark(self):
        """What ends an answer. The tokenizer reads "</s>" as one id, which is no text; ViP's "###" is plain text."""
        return STYLES[self.style].end

    def has_ended(self, ids):
        """Whether an answer, given as its ids so far, ends with the last of them: an id that ends it, or the end mark as text."""
        if ids[-1] in self.model.config.eos_ids:
            return True
        tail = ids[-len(self.end_mark) :]  # enough, as each token of the mark has at least one of its characters
        return self.end_mark in self.tokenizer.decode(tail)

    # The conversation

    def reset(self):
        """Start a new conversation."""
        self._end_turn()
        self.messages, self.images = [], []  # every turn so far; the pictures of all turns, in order
        self.answer_ids = []  # of the last answer: its tokens, the ending one included
        self.cut_off = None  # the limit that cut it off, "max_new_tokens" or "context"
        self.kept = 0  # how many tokens of its prompt the cache held already
        self._cached_ids = []  # the ids whose keys and values are in the cache

    @property
    def tokens(self):
        """How many tokens the last answer has."""
        return len(self.answer_ids)

    def ask(
        self, question, images=(), max_new_tokens=512, temperature=0.0, top_k=None, top_p=None, seed=None, repetition_penalty=1.0
    ):  # fmt: skip
        """Ask the next question, about `images` (PIL) and all pictures before: an iterator of the answer's pieces.

        The pieces are whole characters and join to the answer. The question and the answer, as far as it was read, enter the
        conversation. When the answer has ended, `cut_off` says whether a limit ended it. Options as in `Llava.generate`.
        Raises ValueError at once for a question or a picture that cannot be asked; the conversation is then unchanged.
        """
        check_pictures(images)
        check_options(max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty)
        self._end_turn()
        prompt = self.encode(self.prompt(question, images))
        check_room_for_answer(prompt, self.model.config)
        kept = min(common_prefix(prompt, self._cached_ids), len(prompt) - 1)  # the last token is computed anew, for its logits
        old, new = prompt[:kept], prompt[kept:]
        pixels = self._pixels_of_last(new.count(self.model.config.image_id), images)

        self._make_room(len(prompt) + max_new_tokens)
        self._cache.truncate(kept)
        self._cached_ids = old
        steps = self.model.generate(
            torch.tensor([new]), pixels, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, cache=self._cache, repetition_penalty=repetition_penalty, cached_ids=torch.tensor([old], dtype=torch.long),
        )  # fmt: skip
        self.answer_ids, self.cut_off, self.kept = [], None, kept
        self._turn = self._stream(question, images, prompt, steps, max_new_tokens)
        return self._turn

    def _stream(self, question, images, prompt, steps, max_new_tokens):
        """The pieces of an answer. The turn enters the conversation when the answer ends, or when its reader stops reading."""
        said = []
        try:
            for piece in stop_at(self.tokenizer.stream(self._recorded(prompt, steps)), self.end_mark):
                said.append(piece)
                yield piece
            if not self.has_ended(self.answer_ids):
                self.cut_off = "max_new_tokens" if len(self.answer_ids) == max_new_tokens else "context"
        finally:
            if self.answer_ids:
                answer = {"role": "assistant", "content": without_literals("".join(said))}
                self.messages += [user_message(question, images), answer]
                self.images += images

    def _recorded(self, prompt, steps):
        """The ids of an answer as they come. Each is recorded, and so is what the cache holds by then: all ids before it."""
        for token in steps:
            self._cached_ids = prompt + self.answer_ids
            self.answer_ids.append(int(token))
            yield self.answer_ids[-1]

    def _end_turn(self):
        """End an answer that its reader left unfinished. It enters the conversation as far as it was read."""
        if self._turn is not None:
            self._turn.close()
        self._turn = None

    def _pixels_of_last(self, features, images):
        """The pixels of the last pictures, the next question's included, whose features are so many; None for no features.

        These are the pictures that are not in the cache. All `<image>` ids are alike, but a conversation only grows at its end:
        where its ids are those in the cache, its pictures are, too. (`undo` and `reset` see to that.)
        """
        if not features:
            return None
        count = features // self.model.config.features_per_image
        return self.processor([*self.images, *images][-count:], pad=self.pad)

    def _make_room(self, tokens):
        """Make the cache large enough for so many tokens, or for a whole context. What is in it stays."""
        config, wanted = self.model.config, cache_length(self.model.config, tokens)
        if self._cache is None:
            self._cache = KVCache(config.text, 1, wanted, self.model.device, self.model.dtype)
        elif wanted > self._cache.max_length:
            doubled = cache_length(config, 2 * self._cache.max_length)  # so that a long chat moves it only a few times
            try:
                self._cache.grow(max(wanted, doubled))
            except BaseException:  # out of memory, or Ctrl-C, half way
                self.forget_cache()
                raise

    def undo(self):
        """Take back the last question, its pictures and its answer. Raises ValueError if nothing has been asked."""
        self._end_turn()
        if not self.messages:
            raise ValueError("nothing has been asked yet, so there is nothing to take back")
        question, _ = self.messages[-2:]
        del self.messages[-2:]
        left = len(self.images) - sum(part["type"] == "image" for part in question["content"])
        self.images = self.images[:left]
        # The cache forgets the pictures that went and all after them. Otherwise the next picture would be taken for one of them.
        features = [slot for slot, token in enumerate(self._cached_ids) if token == self.model.config.image_id]
        gone = features[left * self.model.config.features_per_image :]
        if gone:
            self._cached_ids = self._cached_ids[: gone[0]]

    def forget_cache(self):
        """Free the KV cache's memory. The conversation stays, and is computed anew with the next question."""
        self._end_turn()
        self._cache, self._cached_ids = None, []

    # Questions outside the conversation, each on its own

    def answer(
        self, questions, batch_size=8, max_new_tokens=512, temperature=0.0, top_k=None, top_p=None, seed=None, repetition_penalty=1.0,
        literal=False, numbered=False,
    ):  # fmt: skip
        """Answer many questions in batches: an iterator of their answers, in the order asked.

        questions: pairs (text, [PIL pictures]), in a list or from an iterator; with no picture, one or several. The next is taken
            when a row of the batch is free.
        batch_size: how many are answered at once. What a batch needs in memory is mainly its KV cache.
        literal: take the texts as they are, also where they hold what is not allowed in a conversation ("###", "</s>").
        numbered: yield pairs instead, the number of a question (from 0) and its answer, each as soon as the answer has ended.

        In float32 each greedy answer is what `ask` gives in a new conversation. `system`, `style` and `pad` hold here too. The
        answer to a question that cannot be asked is an `Unanswered`, an empty str whose `error` says why; the others are answered.
        Raises ValueError at once for options that make no sense.
        """
        check_options(max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        options = dict(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        answers = answers_in_batches(self, questions, batch_size, literal, options)
        return answers if numbered else in_order(answers)

    def score(self, question, answer, images=()):
        """The log-probability of an answer to a question: the sum over the answer's tokens and its end mark."""
        return float(self.token_scores([(question, answer, images)])[0].sum())

    def choose(self, question, answers, images=()):
        """The likeliest of the given answers to a question: the one whose score is highest."""
        scores = [float(tokens.sum()) for tokens in self.token_scores([(question, answer, images) for answer in answers])]
        return answers[scores.index(max(scores))]

    def token_scores(self, asked, batch_size=8):
        """The log-probability of each token of each answer, its end mark included.

        asked: a list of (question, answer, [PIL pictures]). Returns a list of float32 tensors (tokens,), on the CPU.
        Raises ValueError for a question or an answer that cannot be in a conversation.
        """
        return token_scores(self, asked, batch_size)
