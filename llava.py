"""LLaVA: a language model that sees (Liu et al. 2023, https://arxiv.org/abs/2304.08485 and https://arxiv.org/abs/2310.03744).

A CLIP vision transformer turns a picture into patch features; a small MLP, the projector, maps each into the space of
the language model's word embeddings; there they take the place of the `<image>` token. From then on a picture is 576
more words to the language model. ViP-LLaVA (Cai et al. 2024, https://arxiv.org/abs/2312.00784) reads five of CLIP's
layers instead of one, concatenated and normalised; BakLLaVA has a Mistral as its language model; and each has its own
chat format. That is all the difference.

Shapes: B batch, T tokens, N pictures, P features of a picture, D width of the language model, H its heads, S slots that
can be attended to, V width of the vision tower, L layers of it that are read.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from checkpoint import checkpoint_folder, fill, read_headers, read_json
from clip import CLIPVision, CLIPVisionConfig, ImageProcessor
from llama import KVCache, Llama, LlamaConfig
from step import run_step
from tokenizer import SPECIAL_LITERALS, STYLES, Tokenizer, chat_prompt, expand_images, stop_at

IGNORED = -100  # a label that the loss leaves out
ROOM = 256  # slots by which a chat's cache grows: a step attends to empty ones too, and a cache that moves is captured again


class Projector(nn.Module):
    """From the vision tower's space to the language model's: (N, P, L·V) -> (N, P, D). An MLP of two layers (LLaVA-1.5,
    section 3.3); ViP-LLaVA normalises its input, because the layers it concatenates differ in scale (section 3.1)."""

    def __init__(self, config):
        super().__init__()
        width, eps = config.vision.hidden_size * len(config.vision_layers), config.projector_layernorm_eps
        self.projector_layernorm = nn.Identity() if eps is None else nn.LayerNorm(width, eps=eps)
        self.linear_1 = nn.Linear(width, config.text.hidden_size, bias=config.projector_bias)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size, bias=config.projector_bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(self.projector_layernorm(x))))  # the exact GELU, by the error function


@dataclass
class LlavaOutput:
    """What a forward pass gives. T counts the tokens after `<image>` has been expanded."""

    logits: torch.Tensor  # (B, T, vocabulary)
    loss: torch.Tensor | None  # mean cross-entropy of the next token where labels are not −100; None without labels
    image_features: torch.Tensor | None  # (N, P, D), as spliced
    hidden_states: list[torch.Tensor] | None  # (B, T, D): the spliced embeddings, then after each block, the last normalised
    attentions: list[torch.Tensor] | None  # (B, H, T, S) for each block


def splice(embeds, is_image, features):
    """Put picture features in the place of the `<image>` tokens' embeddings, in order, row by row of the batch.

    embeds: (B, T, D); is_image: (B, T) bool; features: (N, P, D) with N · P True positions. Returns (B, T, D).
    """
    return embeds.masked_scatter(is_image[..., None], features.to(embeds))


class Llava(nn.Module):
    """The whole model. Make one with `Llava.from_pretrained`; its forward pass is `embed`, then the language model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVision(config.vision)
        self.projector = Projector(config)
        self.language_model = Llama(config.text)

    @classmethod
    def from_pretrained(cls, folder_or_hub_name, device="cpu", dtype=None):
        """Load a Hugging Face checkpoint: a folder, or a name on the hub (needs `huggingface_hub`).

        dtype None keeps the stored type. Raises FileNotFoundError or ValueError, before any weight is read, for whatever
        is missing, unexpected, of a wrong shape or damaged.
        """
        folder = checkpoint_folder(folder_or_hub_name)
        config, stored = LlavaConfig.from_pretrained(folder), read_headers(folder)
        head, embeddings = (stored.get(f"language_model.{name}.weight") for name in ("lm_head", "embed_tokens"))
        if config.text.tie_word_embeddings and head and embeddings:  # both stored: tied if they are equal, as in transformers
            alike = head.shape == embeddings.shape and head.kind == embeddings.kind
            config.text.tie_word_embeddings = alike and torch.equal(head.read(), embeddings.read())
            if config.text.tie_word_embeddings:
                stored.pop("language_model.lm_head.weight")
        # ViP-7B's published config has a stale `vision_feature_layer: -2`, but its projector has the width of five layers.
        width = stored["projector.linear_1.weight"].shape[-1] if "projector.linear_1.weight" in stored else 0
        if config.style == "vip" and len(config.vision_layers) == 1 and width == len(VIP_LAYERS) * config.vision.hidden_size:
            config = replace(config, vision_layers=list(VIP_LAYERS))
        if config.image_id >= config.text.vocab_size:
            raise ValueError(f"{folder}: image_token_index is {config.image_id}; the vocabulary has {config.text.vocab_size} rows")

        with torch.device("meta"):  # shapes without memory; each weight is then read straight to where it stays
            model = cls(config)
        fill(model, stored, device, dtype)
        if config.text.tie_word_embeddings:
            model.language_model.lm_head.weight = model.language_model.embed_tokens.weight
        return model.eval()

    @property
    def device(self):
        return self.language_model.norm.weight.device

    @property
    def dtype(self):
        return self.language_model.norm.weight.dtype

    def encode_images(self, pixel_values):
        """Pictures (N, 3, side, side) -> features (N, P, D) in the space of the word embeddings.

        Layer −2, not the last: the last serves CLIP's one vector for the whole picture, the one below it keeps more of
        each patch (LLaVA, section 4.1 and its ablation).
        """
        states = self.vision_tower(pixel_values, self.config.vision_layers)  # L × (N, 1 + patches, V)
        states = [state if self.config.keep_cls else state[:, 1:] for state in states]
        return self.projector(torch.cat(states, dim=-1))  # (N, P, D)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        positions=None,
        inputs_embeds=None,
        labels=None,
        cache=None,
        output_hidden_states=False,
        output_attentions=False,
    ):
        """Pixels and ids to logits.

        input_ids: (B, T), with one `<image>` id per picture (expanded here, mask and labels along with it) or with
            as many as there are features; or inputs_embeds: (B, T, D), spliced already.
        pixel_values: (N, 3, side, side), the pictures in the order of their `<image>` tokens, row by row.
        attention_mask: (B, T), 1 for the new tokens that are real, 0 for padding, which stands on the left where a row is
            to go on (in training none is, and either side will do).
        positions: (B, T); by default they count the real tokens, those in the cache included.
        labels: (B, T) ids, −100 where there is nothing to learn.
        cache: a KVCache with room for T more tokens; they are added to it and see what it holds.
        Raises ValueError where counts or shapes do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if labels is not None:
            _check_ids("labels", labels[labels != IGNORED], self.config.text.vocab_size)
        features = None
        if inputs_embeds is None:
            input_ids, attention_mask, labels = self._prepare(input_ids, pixel_values, attention_mask, labels)
            inputs_embeds, features = self.embed(input_ids, pixel_values)
        elif pixel_values is not None:
            raise ValueError("inputs_embeds hold their pictures already; give pixel_values with input_ids only")
        elif inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.text.hidden_size:
            raise ValueError(f"inputs_embeds are {tuple(inputs_embeds.shape)}; expected (B, T, {self.config.text.hidden_size})")
        B, T, _ = inputs_embeds.shape
        _check_shapes((B, T), attention_mask=attention_mask, labels=labels, positions=positions)
        self._check_room(B, T, cache)

        states, maps = [] if output_hidden_states else None, [] if output_attentions else None
        mask = None if attention_mask is None else attention_mask.to(self.device, torch.bool)
        positions = None if positions is None else positions.to(self.device)
        x = self.language_model(inputs_embeds.to(self.device, self.dtype), mask, positions, cache, states, maps)
        logits = self.language_model.lm_head(x)
        loss = None
        if labels is not None:  # position t predicts token t + 1
            targets = labels[:, 1:].flatten().to(logits.device, torch.long)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED)
        return LlavaOutput(logits, loss, features, states, maps)

    def embed(self, input_ids, pixel_values=None):
        """What the language model reads: word embeddings, with picture features where the `<image>` tokens stand.

        input_ids: (B, T), with as many `<image>` ids as there are features; pixel_values: (N, 3, side, side), or None.
        Returns (B, T, D) and the features (N, P, D), or None.
        """
        embeds = self.language_model.embed(input_ids)  # (B, T, D)
        if pixel_values is None:
            return embeds, None
        features = self.encode_images(pixel_values)  # (N, P, D)
        return splice(embeds, input_ids == self.config.image_id, features), features

    def _prepare(self, ids, pixel_values, mask, labels=None):
        """Check ids (B, T) and what goes with them; expand `<image>` ids that stand for a whole picture each."""
        vocabulary, P = self.config.text.vocab_size, self.config.features_per_image
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"input_ids are {tuple(ids.shape)}; expected (B, T), with at least one token")
        _check_shapes(ids.shape, attention_mask=mask, labels=labels)
        _check_ids("input_ids", ids, vocabulary)
        ids = ids.to(self.device)
        tokens, images = int((ids == self.config.image_id).sum()), 0 if pixel_values is None else len(pixel_values)
        if tokens == images * P:
            return ids, mask, labels
        if tokens == images:
            return self._expand(ids, mask, labels)
        raise ValueError(
            f"the prompt has {tokens} <image> tokens for {images} pictures; "
            f"expected one each ({images}), or one for each of their {images} × {P} = {images * P} features"
        )

    def _expand(self, ids, mask, labels):
        """Repeat each `<image>` id P times, mask and labels with it; rows that end up shorter are padded on the left."""
        repeats = torch.where(ids == self.config.image_id, self.config.features_per_image, 1)  # (B, T)
        T = int(repeats.sum(1).max())
        mask = torch.ones_like(ids) if mask is None else mask

        def stretch(rows, fill):
            rows = [row.repeat_interleave(count) for row, count in zip(rows.to(ids.device), repeats)]
            return torch.stack([F.pad(row, (T - len(row), 0), value=fill) for row in rows])

        mask = stretch(mask, 0)
        start = int(mask.any(0).int().argmax())  # columns before it are padding in every row: what was padded needs it no more
        ids, labels = stretch(ids, self.config.pad_id), None if labels is None else stretch(labels, IGNORED)
        return ids[:, start:], mask[:, start:], None if labels is None else labels[:, start:]

    def _check_room(self, B, T, cache):
        """How many tokens may follow T new ones in B rows. Raises ValueError if the T tokens themselves do not fit."""
        if cache is not None and (cache.batch_size, cache.dtype) != (B, self.dtype):
            raise ValueError(
                f"the cache is for {cache.batch_size} rows in {cache.dtype}; the batch has {B} rows and the model is in {self.dtype}"
            )
        taken = 0 if cache is None else int(cache.length)
        limit, what = self.config.text.max_position_embeddings, "the model's max_position_embeddings"
        if cache is not None and cache.max_length < limit:
            limit, what = cache.max_length, "the cache's max_length"
        if taken + T > limit:
            before = f" after {taken} in the cache" if taken else ""
            raise ValueError(f"{T} tokens{before} do not fit {what} of {limit}; shorten the prompt, use fewer pictures or start a new chat")
        return limit - taken - T

    def generate(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        max_new_tokens=512,
        temperature=0.0,
        top_k=None,
        top_p=None,
        seed=None,
        eos_ids=None,
        cache=None,
    ):
        """Continue each row of a batch: an iterator of (B,) ids, one for each step.

        input_ids, pixel_values, attention_mask: as in forward.
        temperature 0 takes the likeliest token; above 0 it divides the logits and a token is drawn, from the top_k
            likeliest and from the fewest whose probabilities reach top_p, if given. seed makes the draws repeatable.
        eos_ids: ids that end a row, the ended row then yields pad_id; None: the checkpoint's; (): none.
        cache: continue what it holds. By default one is made, of just the length needed.
        Ends after max_new_tokens, when every row has ended, or where the context or the cache is full.
        Raises ValueError at once, not at the first step.
        """
        _check_options(max_new_tokens, temperature, top_k, top_p, seed)
        eos = torch.tensor(self.config.eos_ids if eos_ids is None else list(eos_ids), dtype=torch.long, device=self.device)
        random = None if seed is None else torch.Generator(self.device).manual_seed(seed)

        ids, mask, _ = self._prepare(input_ids, pixel_values, attention_mask)
        B, T = ids.shape
        room = self._check_room(B, T, cache)
        if room < 1:
            raise ValueError(f"a prompt of {T} tokens leaves no room for an answer; shorten it or use a longer cache")
        if mask is not None and not mask[:, -1].all():
            raise ValueError("attention_mask ends in padding; a batch is padded on the left, so that every row ends in its last token")
        steps = min(max_new_tokens, room)
        if cache is None:
            cache = KVCache(self.config.text, B, T + steps, self.device, self.dtype)
        with torch.no_grad():
            x, _ = self.embed(ids, pixel_values)
        mask = None if mask is None else mask.to(self.device, torch.bool)
        launched = self._launch(x, mask, cache, steps, eos, lambda logits: sample(logits, temperature, top_k, top_p, random))
        return self._read(one_behind(launched) if self.device.type == "cuda" else launched)

    @torch.no_grad()
    def _launch(self, x, mask, cache, steps, eos, choose):
        """The loop of generation: one token from the last hidden state, its embedding back in, and again. After the prompt
        nothing waits for the device; each step gives a host tensor (2, B) of tokens and rows still alive, and the event (on
        CUDA) that says when it is filled."""
        alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
        x = self.language_model(x, mask, cache=cache, last=True)  # (B, 1, D): only the last position needs logits
        logits = self.language_model.lm_head(x[:, -1])  # (B, vocabulary)
        if not logits.isfinite().all():
            raise ValueError(f"the logits are not finite: weights are damaged, or too large for {self.dtype}; try another dtype")
        for step in range(steps):
            if step:
                logits = run_step(self.decode_step, token, alive, cache)
            token = torch.where(alive, choose(logits), self.config.pad_id)  # (B,)
            alive = alive & ~torch.isin(token, eos)
            host = torch.stack([token, alive.long()]).to("cpu", non_blocking=x.is_cuda)
            yield host, torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def _read(self, launched):
        """The tokens of each step, (B,) on the host, until no row is alive."""
        for host, filled in launched:
            if filled is not None:
                filled.synchronize()
            token, alive = host
            yield token
            if not alive.any():
                return

    def decode_step(self, token, alive, cache):
        """One more token of each row in, the logits of the next one out: (B,) -> (B, vocabulary).

        alive: (B,) bool; what a row holds after its end is padding. All shapes are fixed, the cache is written in place,
        and no value is read back from the device, so that the step can be captured or compiled as it stands.
        """
        x = self.language_model.embed(token[:, None])
        x = self.language_model(x, alive[:, None], cache=cache)
        return self.language_model.lm_head(x[:, -1])


def one_behind(items):
    """The same items, each given only when the next one has been asked for: the device is at work on the next token while
    the host looks at this one."""
    previous = next(items)
    for item in items:
        yield previous
        previous = item
    yield previous


def _check_shapes(shape, **values):
    for name, value in values.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected {tuple(shape)}, one for each new token")


def _check_options(max_new_tokens, temperature, top_k, top_p, seed):
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected more than 0 and at most 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; expected 0 to 2^63 - 1")


def _check_ids(name, ids, vocabulary):
    if ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"{name} run from {ids.min()} to {ids.max()}; the vocabulary has {vocabulary} rows")


def sample(logits, temperature, top_k, top_p, random):
    """One id for each row of logits (B, vocabulary): (B,). Temperature first, then top-k, then top-p, as everywhere."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # the likeliest at 0, the others far below
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities  # what all tokens before this one sum to
        likelier[:, 0] = -1  # the likeliest stays, however small top_p is
        logits = logits.scatter(-1, index, ordered.masked_fill(likelier >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]


class Chat:
    """A conversation about pictures: model, tokenizer and image processor together.

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
    def from_pretrained(cls, folder_or_hub_name, device="cpu", dtype=None):
        """See Llava.from_pretrained; the tokenizer and the image processor come from the same folder."""
        folder = checkpoint_folder(folder_or_hub_name)
        tokenizer, processor = Tokenizer.from_pretrained(folder), ImageProcessor.from_pretrained(folder)
        model = Llava.from_pretrained(folder, device, dtype)
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
            raise ValueError(f"images are {type(images).__name__}; expected a list of PIL pictures (clip.open_image opens a file)")
        _check_options(max_new_tokens, temperature, top_k, top_p, seed)
        self._end_turn()
        prompt = expand_images(self.tokenizer.encode(self.prompt(question, images)), config.image_id, P)

        # Keep the cache as far as it agrees with this prompt; the last token is always computed, for its logits.
        keep = 0
        while keep < min(len(self._cached), len(prompt) - 1) and self._cached[keep] == prompt[keep]:
            keep += 1
        new = prompt[keep:]
        pictures = [*self.images, *images]
        unseen = pictures[len(pictures) - new.count(config.image_id) // P :]
        pixels = self.processor(unseen, pad=self.pad) if unseen else None
        wanted = len(prompt) + max_new_tokens
        wanted = min(wanted + -wanted % ROOM, config.text.max_position_embeddings)
        if self._cache is None:
            self._cache = KVCache(config.text, 1, wanted, model.device, model.dtype)
        elif wanted > self._cache.max_length:
            self._cache.grow(wanted)
        self._cache.truncate(keep)
        self._cached = prompt[:keep]
        ids = model.generate(
            torch.tensor([new]), pixels, None, max_new_tokens, temperature, top_k, top_p, seed, cache=self._cache
        )
        self._turn = self._answer(question, images, prompt, ids)
        return self._turn

    def _answer(self, question, images, prompt, steps):
        """Stream one answer, and enter the turn into the conversation when it ends or its reader stops reading."""
        answer, ids = [], []
        end = STYLES[self.model.config.style]["end"]  # "</s>" never shows, it ends the steps; ViP's "###" is plain text

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


# What a published config.json leaves out: the vision tower, and which of its layers ViP-LLaVA reads, in this order.
VIT_L_14_336 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
VIP_LAYERS = [-2, -5, -8, -11, 6]  # states 23, 20, 17, 14 and 6 of the 25: fine lines are lost higher up


@dataclass
class LlavaConfig:
    """A checkpoint's config.json, its defaults filled in."""

    vision: CLIPVisionConfig
    text: LlamaConfig
    style: str  # the chat format: "llava", "bakllava" or "vip"
    vision_layers: list[int]  # which of the tower's hidden states the projector reads, concatenated in this order
    keep_cls: bool  # strategy "full": the class token is a feature too; "default": patches only
    projector_layernorm_eps: float | None  # None: no LayerNorm (LLaVA); ViP-LLaVA has one
    projector_bias: bool
    image_id: int
    pad_id: int
    eos_ids: tuple[int, ...]

    def __post_init__(self):
        depth = self.vision.num_hidden_layers
        if bad := [k for k in self.vision_layers if not -depth - 1 <= k <= depth]:
            raise ValueError(
                f"vision_feature_layer is {self.vision_layers}, but vision layer {bad[0]} does not exist: "
                f"the tower has hidden states 0 to {depth}, or -{depth + 1} to -1"
            )

    @classmethod
    def from_pretrained(cls, folder):
        """Read config.json. Raises FileNotFoundError or ValueError for what is missing, not a LLaVA or not supported."""
        folder = Path(folder)
        raw = read_json(folder / "config.json")

        def checked(name, value, fits, expected):
            if not fits:
                raise ValueError(f"{folder}: config.json has {name} {value!r}; expected {expected}")
            return value

        family = raw.get("model_type")
        if "mm_vision_tower" in raw:
            raise ValueError(f"{folder} is in the original authors' layout; take the conversion, like llava-hf/llava-1.5-7b-hf")
        checked("model_type", family, family in ("llava", "vipllava"), "'llava' or 'vipllava'")
        vip = family == "vipllava"
        parts = [checked(name, raw.get(name), isinstance(raw.get(name), dict | None), "an object") for name in ("vision_config", "text_config")]
        vision, text = parts[0], parts[1] or {}
        for name, only in (("projector_hidden_act", "gelu"), ("image_grid_pinpoints", None)):
            checked(name, raw.get(name, only), raw.get(name, only) == only, f"{only!r}, no other is supported")
        strategy = "default" if vip else raw.get("vision_feature_select_strategy", "default")
        checked("vision_feature_select_strategy", strategy, strategy in ("default", "full"), "'default' or 'full'")

        layers = raw.get("vision_feature_layer", VIP_LAYERS if vip else -2)
        layers = raw.get("vision_feature_layers", layers) if vip else layers  # published in both spellings
        layers = layers if isinstance(layers, list) else [layers]
        checked("vision_feature_layer", layers, layers and _whole(*layers), "a layer or a list of them")
        image_id = raw.get("image_token_index", raw.get("image_token_id", 32000))
        checked("image_token_index", image_id, _whole(image_id) and image_id >= 0, "a token id")
        bias = True if vip else raw.get("multimodal_projector_bias", True)
        checked("multimodal_projector_bias", bias, type(bias) is bool, "true or false")
        eps = raw.get("projector_layernorm_eps", 1e-5)
        checked("projector_layernorm_eps", eps, type(eps) in (int, float) and 0 < eps < 1, "a number between 0 and 1")
        tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        checked("tie_word_embeddings", tied, type(tied) is bool, "true or false")

        path = folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}

        def first(name, default):  # of what the files say; null if that is all they say
            said = [part[name] for part in (generation, raw, text) if name in part]
            return next((value for value in said if value is not None), None if said else default)

        eos, pad = first("eos_token_id", 2), first("pad_token_id", None)
        eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        checked("eos_token_id", eos, _whole(*eos_ids), "a token id, a list of them or null")
        checked("pad_token_id", pad, pad is None or _whole(pad), "a token id or null")
        text_config = LlamaConfig.from_dict({**text, "tie_word_embeddings": tied})
        if pad is None or not 0 <= pad < text_config.vocab_size or pad == image_id:  # any other does: nothing looks at padding
            pad = eos_ids[0] if eos_ids else 0
        return cls(
            vision=CLIPVisionConfig.from_dict(VIT_L_14_336 if vision is None else vision),
            text=text_config,
            style="vip" if vip else "bakllava" if text.get("model_type") == "mistral" else "llava",
            vision_layers=layers,
            keep_cls=strategy == "full",
            projector_layernorm_eps=eps if vip else None,
            projector_bias=bias,
            image_id=image_id,
            pad_id=pad,
            eos_ids=eos_ids,
        )

    @property
    def features_per_image(self):
        """How many tokens of the language model a picture takes: 24 × 24 = 576 for LLaVA-1.5."""
        return self.vision.num_patches + self.keep_cls


def _whole(*values):
    return all(type(value) is int for value in values)  # JSON's true is no number, though Python's is
