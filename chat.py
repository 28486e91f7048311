"""A conversation about pictures, and many questions at once: words, pictures and model together.

`Chat.ask` is the whole way from a question to an answer: the chat format, the tokenizer, the pictures' features in the place of
`<image>`, generation, and the text as it comes. `Chat.answer` does the same for many questions in batches, and `Chat.score` says
how likely a given answer is.

Shapes: B rows of a batch, T tokens of the longest.
"""

import torch
from PIL import Image

from batch import Prompt, common_prefix, generate_many
from generate import cache_length, check_options
from images import ImageProcessor
from inputs import prepare
from llama import KVCache
from llava import Llava
from tokenizer import SPECIAL_LITERALS, STYLES, Tokenizer, chat_prompt, expand_images, stop_at
from weights.checkpoint import checkpoint_folder


class Chat:
    """Model, tokenizer and image processor, and one conversation with them.

    The KV cache is kept between turns. Each turn writes out the whole conversation and encodes it, and only what the cache does not
    hold yet is computed: the last answer's end and the new question. A picture is encoded once.
    """

    def __init__(self, model, tokenizer, processor):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.style = model.config.style  # the chat format, a name in tokenizer.STYLES
        self.system = None  # a system sentence; None: the style's own
        self.pad = model.config.pads_pictures  # pad pictures to a square instead of cropping them
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

    # A conversation

    def reset(self):
        """Start a new conversation."""
        self._end_turn()
        self.messages, self.images = [], []  # every turn so far; the pictures of all turns, in order
        self.answer_ids = []  # of the last answer: its tokens, the ending one included
        self.cut_off = None  # the limit that cut it off, "max_new_tokens" or "context"
        self.kept = 0  # how many tokens of its prompt the cache held already
        self._cached = []  # the id in each slot of the KV cache that is taken

    @property
    def tokens(self):
        """How many tokens the last answer has."""
        return len(self.answer_ids)

    def undo(self):
        """Take back the last question, its pictures and its answer. Raises ValueError if nothing has been asked."""
        self._end_turn()
        if not self.messages:
            raise ValueError("nothing has been asked yet, so there is nothing to take back")
        asked = self.messages[-2]["content"]
        del self.messages[-2:]
        left = len(self.images) - sum(part["type"] == "image" for part in asked)
        self.images = self.images[:left]
        # All <image> ids are alike: those of a picture that went would be taken for another's. The cache forgets them and what follows.
        places = [slot for slot, token in enumerate(self._cached) if token == self.model.config.image_id]
        gone = places[left * self.model.config.features_per_image :]
        if gone:
            del self._cached[gone[0] :]

    def forget_cache(self):
        """Give the KV cache's memory back. The conversation stays, and is read anew with the next question."""
        self._end_turn()
        self._cache, self._cached = None, []

    def prompt(self, question, images=()):
        """The exact text the model would read for the next question: the whole conversation up to the answer."""
        return self._text([*self.messages, user_message(question, images)])

    def ask(
        self, question, images=(), max_new_tokens=512, temperature=0.0, top_k=None, top_p=None, seed=None, repetition_penalty=1.0
    ):  # fmt: skip
        """Ask the next question, about `images` (PIL) and all pictures before: an iterator of the answer's pieces.

        The pieces are whole characters and join to the answer, which enters the conversation as far as it was read. When the
        answer has ended, `cut_off` says whether a limit ended it. Options as in `Llava.generate`.
        Raises ValueError at once for a question or a picture that cannot be asked; the conversation is then unchanged.
        """
        check_pictures(images)
        check_options(max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty)
        self._end_turn()
        prompt = self._expanded(self.tokenizer.encode(self.prompt(question, images)))
        self._check_room(prompt)
        kept = min(common_prefix(prompt, self._cached), len(prompt) - 1)  # the last is computed anew, for its logits
        pixels = self._uncached_pictures(prompt[kept:], images)

        self._make_room(len(prompt) + max_new_tokens)
        self._cache.truncate(kept)
        self._cached = prompt[:kept]
        steps = self.model.generate(
            torch.tensor([prompt[kept:]]), pixels, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, cache=self._cache, repetition_penalty=repetition_penalty, cached_ids=torch.tensor([prompt[:kept]], dtype=torch.long),
        )  # fmt: skip
        self.answer_ids, self.cut_off, self.kept = [], None, kept
        self._turn = self._stream(question, images, prompt, steps, max_new_tokens)
        return self._turn

    def _stream(self, question, images, prompt, steps, max_new_tokens):
        """Stream one answer, and enter the turn into the conversation when it ends or its reader stops reading."""
        said, ids = [], self.answer_ids
        try:
            for piece in stop_at(self.tokenizer.stream(self._recorded(prompt, steps, ids, max_new_tokens)), self._end):
                said.append(piece)
                yield piece
        finally:
            if ids:
                answer = {"role": "assistant", "content": without_literals("".join(said))}
                self.messages += [user_message(question, images), answer]
                self.images += images

    def _recorded(self, prompt, steps, ids, max_new_tokens):
        """The tokens of an answer, noted in `ids`, and in `_cached` one step later: a token enters the cache when the next is computed."""
        for token in steps:
            if ids:
                self._cached.append(ids[-1])
            else:
                self._cached = list(prompt)
            ids.append(int(token))
            yield ids[-1]
        if ids[-1] not in self.model.config.eos_ids:  # with an end mark in its text an answer never gets here: stop_at stops asking
            self.cut_off = "max_new_tokens" if len(ids) == max_new_tokens else "context"

    def _end_turn(self):
        """An answer that its reader left unfinished ends here, and enters the conversation as far as it was read."""
        if self._turn is not None:
            self._turn.close()
        self._turn = None

    def _uncached_pictures(self, new, images):
        """The pixels of the pictures that the new ids of a prompt hold, or None.

        Which pictures are they? All <image> ids are alike, but a conversation only grows at its end, and `reset` forgets the cache's
        ids: where ids agree, so do the pictures, and those not yet cached are the last.
        """
        pictures = [*self.images, *images]
        count = new.count(self.model.config.image_id) // self.model.config.features_per_image
        return self.processor(pictures[len(pictures) - count :], pad=self.pad) if count else None

    def _make_room(self, tokens):
        """A cache with room for so many tokens, or for a whole context. What is in it stays."""
        model, wanted = self.model, cache_length(self.model.config, tokens)
        if self._cache is None:
            self._cache = KVCache(model.config.text, 1, wanted, model.device, model.dtype)
        elif wanted > self._cache.max_length:  # at least doubled, so that a long chat moves it only a few times
            try:
                self._cache.grow(max(wanted, cache_length(model.config, 2 * self._cache.max_length)))
            except BaseException:  # out of memory, or Ctrl-C, half way: the conversation stays, and is read anew next time
                self._cache, self._cached = None, []
                raise

    # Many questions, each alone

    def answer(
        self, questions, batch_size=8, max_new_tokens=512, temperature=0.0, top_k=None, top_p=None, seed=None, repetition_penalty=1.0,
        literal=False, numbered=False,
    ):  # fmt: skip
        """Answer many questions, each on its own, in batches: an iterator of their answers, in the order asked.

        questions: pairs (text, [PIL pictures]), in a list or from an iterator; with no picture, one or several. One is taken up
            when another's answer has ended.
        batch_size: how many are answered at once. What a batch needs in memory is mainly its KV cache.
        literal: take the texts as they are, also where they hold what is not allowed in a conversation ("###", "</s>").
        numbered: yield pairs instead, the number of a question (from 0) and its answer, each as soon as the answer has ended.

        In float32 each greedy answer is what `ask` gives in a new conversation. The conversation of this Chat is left alone; `system`,
        `style` and `pad` hold here too. A question that cannot be asked stops no other: its answer is an `Unanswered`, an empty str
        whose `error` says why. Raises ValueError at once for options that make no sense.
        """
        check_options(max_new_tokens, temperature, top_k, top_p, seed, repetition_penalty)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        options = dict(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        answers = self._answers(iter(questions), batch_size, literal, options)
        return answers if numbered else in_order(answers)

    def _answers(self, questions, batch_size, literal, options):
        """(number, answer) of each question, as the answers end."""
        unanswered = []
        prompts = self._fit_to_ask(questions, literal, unanswered)
        for n, ids in generate_many(self.model, prompts, batch_size, self._has_ended, **options):
            yield n, "".join(stop_at(self.tokenizer.stream(ids), self._end))
            while unanswered:
                yield unanswered.pop()
        yield from unanswered

    def _fit_to_ask(self, questions, literal, unanswered):
        """(number, Prompt) of each question that can be asked. The others are put into `unanswered`: (number, Unanswered)."""
        for n, question in enumerate(questions):
            try:
                yield n, self._prepared(question, literal)
            except ValueError as error:
                unanswered.append((n, Unanswered(error)))

    def _prepared(self, question, literal=False):
        """A question (text, pictures), alone in a conversation, as a Prompt. Raises ValueError if it cannot be asked."""
        text, images = check_question(question)
        if literal:
            written = self._text([user_message(PLACE, images)]).replace(PLACE, text)
        else:
            written = self._text([user_message(text, images)])
        ids = self.tokenizer.encode(written)
        if ids.count(self.model.config.image_id) != len(images):
            raise ValueError(f"the question {text!r} contains '<image>'; pictures are given beside the text, not in it")
        ids = self._expanded(ids)
        self._check_room(ids)
        return Prompt(ids, self.processor(images, pad=self.pad) if images else None)

    def _has_ended(self, ids):
        """Whether an answer ends here: with an id that ends it, or with an end mark in its text, as ViP's "###" is."""
        if ids[-1] in self.model.config.eos_ids:
            return True
        return self._end in self.tokenizer.decode(ids[-len(self._end) :])  # each of its tokens has one of its characters at least

    # What a given answer is worth

    def score(self, question, answer, images=()):
        """The log-probability of an answer to a question that is alone: the sum over the answer's tokens and its end mark."""
        return float(self.token_scores([(question, answer, images)])[0].sum())

    def choose(self, question, answers, images=()):
        """The likeliest of the given answers to a question: the one whose score is highest."""
        scores = [float(tokens.sum()) for tokens in self.token_scores([(question, answer, images) for answer in answers])]
        return answers[scores.index(max(scores))]

    def token_scores(self, asked, batch_size=8):
        """The log-probability of each token of each answer, its end mark included.

        asked: a list of (question, answer, [PIL pictures]), each on its own. Returns a list of float32 tensors (tokens,), on the CPU.
        Raises ValueError for a question or an answer that cannot be in a conversation.
        """
        scores = []
        for start in range(0, len(asked), batch_size):
            batch, answers = [], []
            for question, answer, images in asked[start : start + batch_size]:
                batch.append(self._prepared((question, images)))
                answers.append(self._answer_ids(question, answer, images))
            scores += log_probabilities(self.model, [one.ids for one in batch], answers, all_pixels(batch))
        return scores

    def _answer_ids(self, question, answer, images):
        """The ids that the model would write to give this answer, the end mark included."""
        asked = user_message(question, images)
        prompt, whole = self._text([asked]), self._text([asked, {"role": "assistant", "content": answer}])
        return self.tokenizer.encode(whole[len(prompt) + 1 :])[1:]  # without the space before it, which is SentencePiece's own, and BOS

    # What all of them need

    @property
    def _end(self):
        """What ends an answer. "</s>" never shows, its id ends the steps; ViP's "###" is plain text."""
        return STYLES[self.style].end

    def _text(self, messages):
        """The text of a conversation, after the system sentence."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return chat_prompt(system + messages, self.style)

    def _expanded(self, ids):
        return expand_images(ids, self.model.config.image_id, self.model.config.features_per_image)

    def _check_room(self, prompt):
        """Raises ValueError where no token of an answer fits after a prompt."""
        limit = self.model.config.text.max_position_embeddings
        if len(prompt) >= limit:
            raise ValueError(
                f"the context is full: with this question it has {len(prompt)} tokens, and with max_position_embeddings of {limit} "
                'no answer fits; ask something shorter, show fewer pictures, or begin a new conversation ("/reset" in a chat)'
            )


class Unanswered(str):
    """In the place of an answer to a question that could not be asked: an empty text, and in `error` the ValueError that says why."""

    def __new__(cls, error):
        self = super().__new__(cls)
        self.error = error
        return self


def in_order(numbered):
    """From pairs (n, item), in which each n of 0, 1, 2 … comes once: the items by their numbers, each as soon as it can be given."""
    early, due = {}, 0
    for n, item in numbered:
        early[n] = item
        while due in early:
            yield early.pop(due)
            due += 1


PLACE = "\ue000"  # stands for a literal text while the prompt around it is written; a character that no text has


def user_message(question, images):
    return {"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]}


def check_pictures(images):
    if not isinstance(images, list | tuple) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"images are {type(images).__name__}; expected a list of PIL pictures (images.open_image opens a file)")


def check_question(question):
    """The text and the pictures of a question for `Chat.answer`. Raises ValueError for what is none."""
    if not isinstance(question, list | tuple) or len(question) != 2 or not isinstance(question[0], str):
        raise ValueError(f"a question is {question!r}; expected a pair (text, [pictures])")
    check_pictures(question[1])
    return question


def without_literals(text):
    """A text without the literals of special tokens. Spelt out by the model, they would be read as the tokens next time."""
    before = None
    while text != before:  # again, as what is left may make up another: "<im<pad>age>"
        before = text
        for literal in SPECIAL_LITERALS:
            text = text.replace(literal, "")
    return text


def all_pixels(prompts):
    """The pictures of a batch of Prompts, in order: (N, 3, side, side), or None if there are none."""
    pixels = [one.pixels for one in prompts if one.pixels is not None]
    return torch.cat(pixels) if pixels else None


def left_padded(rows, pad_id):
    """Rows of ids as one tensor (B, T), padded on the left, and its mask (B, T); None for the mask if nothing is padded."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    if min(map(len, rows)) == width:
        return ids, None
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def log_probabilities(model, prompts, answers, pixel_values=None):
    """Of each token of each answer, given its prompt, the pictures and the tokens before it: a list of float32 (tokens,), on the CPU.

    prompts, answers: lists of B rows of ids, the `<image>`s in them as in Llava.forward; pixel_values: (N, 3, side, side), or None.
    """
    ids, mask = left_padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], model.config.pad_id)
    inputs = prepare(model.config, model.device, model.dtype, ids, pixel_values, mask)
    x, _ = model.embed(inputs.ids, pixel_values)
    x = model.language_model(x, inputs.mask)  # (B, T, D)
    longest = max(map(len, answers))
    logits = model.language_model.lm_head(x[:, -longest - 1 : -1])  # (B, longest, vocabulary): a token is foretold one position before
    chosen = logits.float().log_softmax(-1).gather(-1, inputs.ids[:, -longest:, None])  # (B, longest, 1)
    return [row[longest - len(answer) :, 0] for row, answer in zip(chosen.cpu(), answers)]
