"""The two towers that tiny/llava stands on, made the way LLaVA's were: a CLIP trained on pictures and captions, of which
the vision half is kept, and a language model trained on text alone.

    python -m tiny.towers                # writes tiny/build/base: a checkpoint whose projector is still random
    python -m tiny.towers --style vip    # writes tiny/build/vip-base; goes on from the vision tower of tiny/llava

For tiny/vip-llava the vision tower also learns what a mark looks like, as the real one did from the pictures of the web,
before it is frozen.
"""

import argparse
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn as nn
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

from checkpoint import save_checkpoint
from clip import CLIPVision, CLIPVisionConfig
from config import LlavaConfig
from images import ImageProcessor
from llama import Llama, LlamaConfig
from llava import Llava
from tiny.marked import conversation as marked_conversation
from tiny.marked import marked_scene, picture, put_marks
from tiny.world import COLOURS, KINDS, SIDE, SIZES, conversation, describe, draw, is_held_out, make_scene
from tokenizer import Tokenizer, chat_prompt
from train import learning_rate

PIECES = 510  # of the SentencePiece model; <image> and <pad> make it 512
VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE, patch_size=14)
TEXT = dict(
    vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
    max_position_embeddings=512, rms_norm_eps=1e-5,
)  # fmt: skip
CAPTION_READER = dict(vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "llava": dict(architectures=["LlavaForConditionalGeneration"], model_type="llava", vision_feature_layer=-2),
    "vip": dict(architectures=["VipLlavaForConditionalGeneration"], model_type="vipllava", vision_feature_layers=[-2, -3, -4, -5]),
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's own
VARIANTS = 8  # scenes in a CLIP batch that differ from one another in a single thing


def as_dialogue(style, random):
    """The text of a random conversation, without its picture."""
    if style == "vip":
        scene, _, marked = marked_scene(random, random.randint(1, 2))
        turns = marked_conversation(scene, marked, random)
    else:
        turns = conversation(make_scene(random), random)
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chat_prompt(messages, style)


def write_text_files(folder, style, seed):
    """The tokenizer, trained on the world's own words with Llama's settings, and the JSON files of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for n in range(4000):
        texts += as_dialogue(style, Random(f"{seed} words {n}")).split("</s>")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())

    special = {0: "<unk>", 1: "<s>", 2: "</s>", PIECES: "<image>", PIECES + 1: "<pad>"}
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    special = {i: {"content": content, **plain, "special": True} for i, content in special.items()}
    files = {
        "tokenizer.json": as_tokenizer_json(SentencePieceProcessor(model_proto=model.getvalue()), special),
        "config.json": {
            **FAMILIES[style],
            "image_token_index": PIECES,
            "pad_token_id": PIECES + 1,
            "image_seq_length": (SIDE // 14) ** 2,
            "torch_dtype": "float16",
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "text_config": {"model_type": "llama", **TEXT},
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PIECES + 1},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": SIDE},
            "crop_size": {"height": SIDE, "width": SIDE},
            "image_mean": MEAN,
            "image_std": STD,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "added_tokens_decoder": special,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_tokenizer_json(model, special_tokens):
    """The same tokenizer in the form that transformers runs (this project does not read it): each piece becomes the
    merges that can make it, in the order of the pieces' scores; the rest is Llama's fixed recipe."""
    pieces = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for piece in sorted(pieces, key=lambda piece: -model.get_score(pieces[piece])):
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in pieces and right in pieces]
        merges += sorted(splits, key=lambda split: (pieces[split[0]], pieces[split[1]]))
    swap = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, **token} for i, token in special_tokens.items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, swap(" ", "▁")]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            + [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [swap("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
            + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": pieces, "merges": merges},
    }


def initialise(module):
    """Weights of standard deviation 1/√fan-in, so that a layer keeps a vector's length; for those that end a residual
    branch 1/√(fan-in · branches), so that the sum does too. The position of a patch starts about as long as the embedding
    of its colours: a pale ground would drown it otherwise."""
    branches = 2 * len(module.layers)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("_embedding") or "position_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "embed_tokens" in name or "lm_head" in name:
            nn.init.normal_(parameter, std=0.05)
        elif "norm" not in name and "layrnorm" not in name:
            ends = name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=(parameter[0].numel() * (branches if ends else 1)) ** -0.5)
    return module


def near_scenes(random, most):
    """A scene and others in which one thing is different or in another place: only a reader of details tells them apart.
    Shape is the hardest to see, so half of the differences are of kind."""
    scenes = [make_scene(random, most=most)]
    while len(scenes) < VARIANTS:
        scene = list(scenes[0])
        k, field = random.randrange(len(scene)), random.choice(("kind", "kind", "kind", "colour", "size", "cell"))
        free = set(range(9)) - {thing.cell for thing in scene}
        others = {"kind": KINDS, "colour": COLOURS, "size": SIZES, "cell": free}[field]
        value = random.choice([value for value in others if value != getattr(scene[k], field)])
        scene[k] = replace(scene[k], **{field: value})
        scene.sort(key=lambda thing: thing.cell)
        if not is_held_out(scene) and scene not in scenes:
            scenes.append(scene)
    return scenes


def plain_batch(random, size, step, steps):
    """Pictures and captions, in groups of near scenes; of one thing at first: what tells shapes apart is learnt fastest there."""
    scenes = [scene for _ in range(size // VARIANTS) for scene in near_scenes(random, most=1 + 5 * step // steps)]
    return [draw(scene, random) for scene in scenes], [describe(scene) for scene in scenes]


def marked_batch(random, size, step, steps):
    """Pictures and captions, in groups that show the same with other marks."""
    pictures, captions = [], []
    for _ in range(size // VARIANTS):
        scene, layout, _ = marked_scene(random, 1)
        for _ in range(VARIANTS):
            marked = put_marks(random.sample(scene, random.randint(1, 2)), layout, random)
            pictures.append(picture(layout, marked))
            captions.append(describe(scene, {thing: mark.words for thing, mark in marked}))
    return pictures, captions


def progress(steps, description):
    return tqdm(range(steps), desc=description, unit="step")


def optimise(loss, optimizer, parameters):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def train_clip(vision, tokenizer, processor, examples, steps, size, seed):
    """CLIP (Radford et al. 2021, figure 3): a picture's vector and its caption's should be nearer than any other pair's
    in the batch. Both towers end in one vector: the class token's, and the last word's of a causal transformer.

    examples: a function that draws `size` pictures and captions. Returns the vision tower."""
    reader = initialise(Llama(LlamaConfig(**CAPTION_READER)))
    heads = nn.ModuleList([nn.Linear(VISION["hidden_size"], 128, bias=False), nn.Linear(CAPTION_READER["hidden_size"], 128, bias=False)])
    scale = nn.Parameter(torch.tensor(math.log(20.0)))
    parameters = [*vision.parameters(), *reader.parameters(), *heads.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.02)
    bar = progress(steps, "CLIP")
    hits = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3, 0.05)
        random = Random(f"{seed} clip {step}")
        pictures, captions = examples(random, size, step, steps)
        pixels, captions = processor(pictures), [tokenizer.encode(caption) for caption in captions]
        ends = torch.tensor([len(ids) - 1 for ids in captions])
        ids = torch.tensor([ids + [tokenizer.pad_id] * (int(ends.max()) + 1 - len(ids)) for ids in captions])

        (top,) = vision(pixels, [-1])
        seen = heads[0](vision.post_layernorm(top[:, 0]))
        read = heads[1](reader(reader.embed(ids))[torch.arange(len(ids)), ends])
        logits = F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T * scale.exp().clamp(max=100)
        target = torch.arange(len(ids))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimise(loss, optimizer, parameters)
        hits += 0.05 * ((logits.argmax(1) == target).float().mean().item() - hits)
        bar.set_postfix(loss=f"{loss.item():.3f}", matched=f"{hits:.1%}", refresh=False)
    return vision


def train_language_model(tokenizer, style, steps, batch, seed):
    """Next-word prediction on the world's conversations, of which it never sees a picture."""
    torch.manual_seed(seed)
    model = initialise(Llama(LlamaConfig(**TEXT)))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.02)
    bar = progress(steps, "Llama")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3, 0.05)
        random = Random(f"{seed} llama {step}")
        rows = [tokenizer.encode(as_dialogue(style, random)) for _ in range(batch)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
        logits = model.lm_head(model(model.embed(ids[:, :-1])))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_id)
        optimise(loss, optimizer, parameters)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--style", choices=[*FAMILIES], default="llava")
    parser.add_argument("--out", type=Path, help="[tiny/build/base or tiny/build/vip-base]")
    parser.add_argument("--clip-steps", type=int, help="[3500; 1200 to learn marks]")
    parser.add_argument("--clip-batch", type=int, default=128)
    parser.add_argument("--llama-steps", type=int, default=300)
    parser.add_argument("--llama-batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vip = args.style == "vip"
    out, steps = args.out or Path("tiny/build") / ("vip-base" if vip else "base"), args.clip_steps or (1200 if vip else 3500)

    write_text_files(out, args.style, args.seed)
    tokenizer, processor = Tokenizer.from_pretrained(out), ImageProcessor.from_pretrained(out)
    torch.manual_seed(args.seed)
    model = Llava(LlavaConfig.from_pretrained(out))  # for its random projector
    model.language_model = train_language_model(tokenizer, args.style, args.llama_steps, args.llama_batch, args.seed)
    torch.manual_seed(args.seed)
    if vip:
        vision, examples = Llava.from_pretrained("tiny/llava", dtype=torch.float32).vision_tower.requires_grad_(True), marked_batch
    else:
        vision, examples = initialise(CLIPVision(CLIPVisionConfig(**VISION))), plain_batch
    model.vision_tower = train_clip(vision, tokenizer, processor, examples, steps, args.clip_batch, args.seed)
    save_checkpoint(model, out, out, torch.float16)


if __name__ == "__main__":
    main()
