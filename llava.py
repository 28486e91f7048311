"""LLaVA: a language model that sees (Liu et al. 2023, https://arxiv.org/abs/2304.08485 and https://arxiv.org/abs/2310.03744).

A CLIP vision transformer turns a picture into one hidden state per patch; a small MLP, the projector, makes of each a feature
in the space of the language model's word embeddings; there they take the place of the `<image>` token. From then on a
picture is 576 more tokens to the language model. ViP-LLaVA (Cai et al. 2024, https://arxiv.org/abs/2312.00784) reads five of CLIP's
layers instead of one, concatenated and normalised; BakLLaVA has a Mistral as its language model; and each has its own
chat format. That is all the difference.

Shapes: B batch, T tokens, N pictures, P features of a picture, D width of the language model, H its heads, S slots that
can be attended to, V width of the vision tower, L layers of it that are read.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from clip import CLIPVision
from generate import generate
from inputs import IGNORED, prepare
from llama import Llama
from weights.load import load


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


def splice(embeds, is_image, features):
    """Put picture features in the place of the `<image>` tokens' embeddings, in order, row by row of the batch.

    embeds: (B, T, D); is_image: (B, T) bool; features: (N, P, D) with N · P True positions. Returns (B, T, D).
    """
    return embeds.masked_scatter(is_image[..., None], features.to(embeds))


@dataclass
class LlavaOutput:
    """What a forward pass gives. T counts the tokens after `<image>` has been expanded."""

    logits: torch.Tensor  # (B, T, vocabulary)
    loss: torch.Tensor | None  # mean cross-entropy of the next token where labels are not −100; None without labels
    image_features: torch.Tensor | None  # (N, P, D), as spliced
    hidden_states: list[torch.Tensor] | None  # (B, T, D): the spliced embeddings, then after each block, the last normalised
    attentions: list[torch.Tensor] | None  # (B, H, T, S) for each block


class Llava(nn.Module):
    """The whole model. Make one with `Llava.from_pretrained`; its forward pass is `embed`, then the language model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVision(config.vision)
        self.projector = Projector(config)
        self.language_model = Llama(config.text)

    def encode_images(self, pixel_values):
        """Pictures (N, 3, side, side) -> features (N, P, D) in the space of the word embeddings.

        Layer −2, not the last: CLIP's loss reads the class token alone, so what its last block makes of a patch was never
        trained, and one block lower the patches are what that token gathers from (LLaVA, section 4.1, and its ablations).
        """
        states = self.vision_tower(pixel_values, self.config.vision_layers)  # L × (N, 1 + patches, V)
        states = [state if self.config.keep_cls else state[:, 1:] for state in states]
        return self.projector(torch.cat(states, dim=-1))  # (N, P, D)

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

    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, positions=None, inputs_embeds=None, labels=None, cache=None,
        output_hidden_states=False, output_attentions=False,
    ):  # fmt: skip
        """Pixels and ids to logits.

        input_ids: (B, T), with one `<image>` id per picture (expanded here, mask and labels along with it) or with
            as many as there are features; or inputs_embeds: (B, T, D), spliced already.
        pixel_values: (N, 3, side, side), the pictures in the order of their `<image>` tokens, row by row.
        attention_mask: (B, T), 1 for the new tokens that are real, 0 for padding, which stands on the left where a row is
            to go on; in training either side will do.
        positions: (B, T), T counted after the expansion; by default they count the real tokens, those in the cache included.
        labels: (B, T) ids, −100 where there is nothing to learn.
        cache: a KVCache with room for T more tokens; they are added to it and see what it holds.
        Raises ValueError where counts or shapes do not fit.
        """
        inputs = prepare(
            self.config, self.device, self.dtype, input_ids, pixel_values, attention_mask, positions, inputs_embeds, labels, cache
        )
        states = [] if output_hidden_states else None
        maps = [] if output_attentions else None

        if inputs.embeds is None:
            embeds, features = self.embed(inputs.ids, pixel_values)  # (B, T, D): CLIP, projector, splice
        else:
            embeds, features = inputs.embeds, None
        x = self.language_model(embeds, inputs.mask, inputs.positions, cache, states, maps)  # (B, T, D)
        logits = self.language_model.lm_head(x)  # (B, T, vocabulary)
        loss = None if inputs.labels is None else next_token_loss(logits, inputs.labels)
        return LlavaOutput(logits, loss, features, states, maps)

    def decode_step(self, token, alive, cache):
        """One more token of each row in, the logits of the next one out: (B,) -> (B, vocabulary).

        alive: (B,) bool; what a row holds after its end is padding. On a GPU, and when compiled, all shapes are fixed, the
        cache is written in place and no value is read back, so that the step can be captured or compiled as it stands; on a
        CPU attention looks at the taken slots alone (`KVCache.extent`).
        """
        x = self.language_model.embed(token[:, None])  # (B, 1, D)
        x = self.language_model(x, alive[:, None], cache=cache)
        return self.language_model.lm_head(x[:, -1])

    def generate(
        self, input_ids, pixel_values=None, attention_mask=None, max_new_tokens=512, temperature=0.0, top_k=None, top_p=None,
        seed=None, eos_ids=None, cache=None, repetition_penalty=1.0, cached_ids=None,
    ):  # fmt: skip
        """Continue each row of a batch: an iterator of (B,) ids, one for each step.

        input_ids, pixel_values, attention_mask: as in forward. A mask that is not given is made where ids are pad_id.
        temperature 0 takes the likeliest token; above 0 it divides the logits and a token is drawn, from the top_k
            likeliest and from the fewest whose probabilities reach top_p, if given. seed makes the draws repeatable.
        eos_ids: ids that end a row, the ended row then yields pad_id; None: the checkpoint's; (): none.
        cache: continue what it holds. By default one is made, of the length needed.
        repetition_penalty: above 1 makes every id less likely that the row holds already, as in transformers (`generate.Repetition`).
            cached_ids: (B, n), for the penalty, the ids that the cache holds.
        Ends after max_new_tokens, when every row has ended, or where the context or the cache is full.
        Raises ValueError at once, not at the first step.
        """
        return generate(
            self, input_ids, pixel_values, attention_mask, max_new_tokens, temperature, top_k, top_p, seed, eos_ids, cache,
            repetition_penalty, cached_ids,
        )  # fmt: skip

    @property
    def device(self):
        return self.language_model.norm.weight.device

    @property
    def dtype(self):
        return self.language_model.norm.weight.dtype

    @classmethod
    def from_pretrained(cls, folder_or_hub_name, device="cpu", dtype=None, quantize=None, mapped=True):
        """Load a Hugging Face checkpoint: a folder, or a name on the hub (needs `huggingface_hub`).

        dtype None keeps the stored type. quantize: "int8" or "int4" (weights/quantize.py), for the linear layers of the language
        model; a checkpoint that is quantised already has its own. mapped: leave in its file what changes neither device nor type,
        to be read as it is used; a CPU computes faster with what has been copied into memory. Raises FileNotFoundError or ValueError,
        before any weight is read, for whatever is missing, unexpected, of a wrong shape or damaged.
        """
        return load(cls, folder_or_hub_name, device, dtype, quantize, mapped)


def next_token_loss(logits, labels):
    """The mean cross-entropy of each next token (LLaVA, equation 3): the logits at t (B, T, vocabulary) predict the label at
    t + 1 (B, T), where that is not −100."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
