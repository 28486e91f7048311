"""The two towers that tiny/llava stands on, made the way LLaVA's were: a CLIP trained on pictures and captions, of which
the vision half is kept, and a language model trained on text alone.

    python -m tiny.towers                # writes tiny/build/base: a checkpoint whose projector is still random
    python -m tiny.towers --style vip    # writes tiny/build/vip-base; goes on from both towers of tiny/llava

For tiny/vip-llava the vision tower also learns what a mark looks like before it is frozen. The real one had seen arrows and
circles in the pictures of the web; here it is shown them, and openly so: a thing's own patches are compared with the words
for the thing and its mark (`train_regions`). CLIP's way, one vector for a whole picture against a whole caption, leaves
the marks out of the patches, and what is not in them the language model cannot learn to see.
"""

import argparse
import io
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn as nn
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

from clip import CLIPVision, CLIPVisionConfig
from images import ImageProcessor
from llama import Llama, LlamaConfig
from llava import Llava
from marks import COLOURS as MARK_COLOURS
from marks import KINDS as MARKS
from tiny.marked import conversation as marked_conversation
from tiny.marked import marked_scene, picture
from tiny.world import COLOURS, KINDS, SIDE, SIZES, conversation, describe, draw, is_held_out, llava_record, make_scene
from tokenizer import Tokenizer, chat_prompt
from train import learning_rate
from training.data import collate, encode_conversation
from weights.checkpoint import save_checkpoint
from weights.config import LlavaConfig
from weights.settings import settings, write_files

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


def train_tokenizer(style, seed):
    """A SentencePiece model of the world's own words, with Llama's settings, serialised."""
    texts = []
    for n in range(4000):
        texts += as_dialogue(style, Random(f"{seed} words {n}")).split("</s>")
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_text_files(folder, style, seed):
    """All of a checkpoint but its weights: the tokenizer and the JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    model = train_tokenizer(style, seed)
    (folder / "tokenizer.model").write_bytes(model)
    config = {
        **FAMILIES[style],
        "image_token_index": PIECES,
        "pad_token_id": PIECES + 1,
        "image_seq_length": (SIDE // 14) ** 2,
        "torch_dtype": "float16",
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": {"model_type": "llama", **TEXT},
    }
    write_files(folder, settings(config, SentencePieceProcessor(model_proto=model)))


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


def near_batch(random, size, most):
    """Pictures and captions, in groups of near scenes."""
    scenes = [scene for _ in range(size // VARIANTS) for scene in near_scenes(random, most)]
    return [draw(scene, random) for scene in scenes], [describe(scene) for scene in scenes]


def progress(steps, description):
    return tqdm(range(steps), desc=description, unit="step")


def optimise(loss, optimizer, parameters):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class Likeness(nn.Module):
    """How well each of some vectors of the vision tower fits each of some texts, which a small causal transformer reads."""

    def __init__(self):
        super().__init__()
        self.reader = initialise(Llama(LlamaConfig(**CAPTION_READER)))
        widths = (VISION["hidden_size"], CAPTION_READER["hidden_size"])
        self.heads = nn.ModuleList([nn.Linear(width, 128, bias=False) for width in widths])
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, seen, texts, tokenizer):
        """seen: (N, V); texts: M strings. Returns scaled cosines, (N, M)."""
        rows = [tokenizer.encode(text) for text in texts]
        ends = torch.tensor([len(row) - 1 for row in rows])
        ids = torch.tensor([row + [tokenizer.pad_id] * (int(ends.max()) + 1 - len(row)) for row in rows])
        read = self.reader(self.reader.embed(ids))[torch.arange(len(rows)), ends]  # each text's last word
        seen, read = (F.normalize(head(x), dim=-1) for head, x in zip(self.heads, (seen, read)))
        return seen @ read.T * self.scale.exp().clamp(max=100)


def train_clip(vision, tokenizer, processor, steps, size, seed):
    """CLIP (Radford et al. 2021, figure 3): a picture's vector and its caption's should be nearer than any other pair's
    in the batch. Both towers end in one vector: the class token's, and the last word's of a causal transformer."""
    likeness = Likeness()
    parameters = [*vision.parameters(), *likeness.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.02)
    bar = progress(steps, "CLIP")
    hits = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3, 0.05)
        random = Random(f"{seed} clip {step}")
        # One thing a picture at first: what tells shapes apart is learnt fastest there.
        pictures, captions = near_batch(random, size, most=1 + 5 * step // steps)
        (top,) = vision(processor(pictures), [-1])
        logits = likeness(vision.post_layernorm(top[:, 0]), captions, tokenizer)
        target = torch.arange(size)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimise(loss, optimizer, parameters)
        hits += 0.05 * ((logits.argmax(1) == target).float().mean().item() - hits)
        bar.set_postfix(loss=f"{loss.item():.3f}", matched=f"{hits:.1%}", refresh=False)
    return vision


# What can be said of a thing and its mark, word by word; a thing without a mark has "no" colour and kind of one.
CONCEPTS = ([*SIZES], [*COLOURS], [*KINDS], [*MARK_COLOURS, "no"], [*MARKS, "no"])


def marked_things(random, pictures, held_out=False):
    """Pictures with one to four marks each, and what there is to say of their things: the pictures, and for each thing
    (index of its picture, cell, its place in each group of CONCEPTS)."""
    images, things = [], []
    for n in range(pictures):
        scene, layout, marked = marked_scene(random, 1 + n % 4, held_out=held_out)
        marks = dict(marked)
        images.append(picture(layout, marked))
        for thing in scene:
            mark = marks.get(thing)
            words = (thing.size, thing.colour, thing.kind, *((mark.colour, mark.kind) if mark else ("no", "no")))
            things.append((n, thing.cell, [group.index(word) for group, word in zip(CONCEPTS, words)]))
    return images, things


def of_cell(cell):
    """The patches whose middle lies in a cell of the 3 × 3 grid, as indices into the tower's sequence, the class token first."""
    side = SIDE // VISION["patch_size"]
    row = [(2 * k + 1) * 3 // (2 * side) for k in range(side)]  # the third of the picture that patch k of a row or column is in
    return [1 + i * side + j for i in range(side) for j in range(side) if (row[i], row[j]) == divmod(cell, 3)]


def train_regions(vision, processor, steps, size, seed):
    """Contrast by region, after RegionCLIP (Zhong et al. 2022, https://arxiv.org/abs/2112.09106, section 3.2): the patches of a
    thing, in the state that LLaVA reads, should be nearer to each word for it and its mark than to the other words of that
    group. Word by word, each with a vector of its own: compared with whole descriptions only, the tower learns a vector for
    each combination, from which no linear map reads a mark's colour. In a third of the cases one patch alone stands for its
    cell: so each learns to say what it is part of, and by which mark, and the language model finds both in one place.

    Returns the vision tower. The bar shows the share of marked things in held-out scenes whose mark, and which in whole, are
    named right.
    """
    words = nn.Linear(VISION["hidden_size"], sum(map(len, CONCEPTS)))
    parameters = [*vision.requires_grad_(True).parameters(), *words.parameters()]
    groups = [dict(params=[*vision.parameters()], scale=1.0), dict(params=[*words.parameters()], scale=3.0)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.02)
    held_out = marked_things(Random(f"{seed} regions held out"), 150, held_out=True)

    def compare(images, things, pool):
        """For each group of CONCEPTS its logits, and which word is right."""
        (state,) = vision(processor(images), [-2])
        seen = torch.stack([state[n, pool(of_cell(cell))].mean(0) for n, cell, _ in things])
        logits = words(F.layer_norm(seen, seen.shape[1:])).float().split([*map(len, CONCEPTS)], dim=1)
        return logits, torch.tensor([of_thing for *_, of_thing in things]).T

    bar = progress(steps, "regions")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3, 0.05) * group["scale"]
        random = Random(f"{seed} regions {step}")
        one_patch = lambda patches, random=random: [random.choice(patches)] if random.random() < 0.3 else patches
        images, things = marked_things(random, size)
        with torch.autocast("cpu", torch.bfloat16):
            logits, right = compare(images, things, one_patch)
        loss = sum(F.cross_entropy(*pair) for pair in zip(logits, right))
        optimise(loss, optimizer, parameters)
        if step % 50 == 49 or step + 1 == steps:
            with torch.no_grad():
                logits, right = compare(*held_out, lambda patches: patches)
            hits = torch.stack([of_group.argmax(1) == index for of_group, index in zip(logits, right)])[:, right[-1] < len(MARKS)]
            shares = dict(mark=f"{hits[3:].all(0).float().mean():.1%}", whole=f"{hits.all(0).float().mean():.1%}")
        if step >= 49:
            bar.set_postfix(loss=f"{loss.item():.3f}", **shares, refresh=False)
    return vision


def translate(model, old, new):
    """Give a Llama another tokenizer: what both have keeps its row of the embeddings and of the head, another piece starts
    as the mean of the old pieces that spell it."""
    spelt = []
    for i in range(len(new.model)):
        piece = new.model.id_to_piece(i)
        known = old.model.piece_to_id(piece)
        word = piece.replace("▁", " ")
        if known == old.model.unk_id() and i != known:
            spelt.append(old.model.encode(word[1:]) if word[0] == " " else old.encode_more(word))
        else:
            spelt.append([known])
    spelt += [[old.specials[literal]] for literal in ("<image>", "<pad>")]
    for matrix in (model.embed_tokens, model.lm_head):
        matrix.weight = nn.Parameter(torch.stack([matrix.weight[ids].mean(0) for ids in spelt]))
    return model


def learn_format(model, tokenizer, processor, steps, batch, seed):
    """tiny/llava learns ViP-LLaVA's chat format and the new tokenizer, in its own world and with its own eyes: on text alone
    it would learn not to look. Only the language model is trained; returns it."""
    parameters = list(model.language_model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    bar = progress(steps, "format")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3, 0.05)
        random = Random(f"{seed} format {step}")
        examples = []
        for _ in range(batch):
            scene = make_scene(random)
            record = llava_record("", "", conversation(scene, random))
            examples.append((*encode_conversation(record, tokenizer, "vip"), draw(scene, random)))
        ids, labels, pixels = collate(examples, processor, tokenizer.image_id, tokenizer.pad_id, model.config.features_per_image, False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, pixels, labels=labels).loss
        optimise(loss, optimizer, parameters)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.language_model


def train_language_model(tokenizer, steps, batch, seed):
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
        rows = [tokenizer.encode(as_dialogue("llava", random)) for _ in range(batch)]
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
    parser.add_argument("--vision-steps", type=int, help="[3500; 7000 to learn marks]")
    parser.add_argument("--vision-batch", type=int, help="pictures in a step [128; 20 to learn marks]")
    parser.add_argument("--llama-steps", type=int, help="[300; 200 where tiny/llava is the start]")
    parser.add_argument("--llama-batch", type=int, help="[32; 16 where tiny/llava is the start]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vip = args.style == "vip"
    out = args.out or Path("tiny/build") / ("vip-base" if vip else "base")
    steps, batch = args.vision_steps or (7000 if vip else 3500), args.vision_batch or (20 if vip else 128)

    write_text_files(out, args.style, args.seed)
    tokenizer, processor = Tokenizer.from_pretrained(out), ImageProcessor.from_pretrained(out)
    torch.manual_seed(args.seed)
    model = Llava(LlavaConfig.from_pretrained(out))  # for its random projector
    torch.manual_seed(args.seed)
    if vip:
        grown = Llava.from_pretrained("tiny/llava", dtype=torch.float32)
        translate(grown.language_model, Tokenizer.from_pretrained("tiny/llava"), tokenizer)
        model.language_model = learn_format(grown, tokenizer, processor, args.llama_steps or 200, args.llama_batch or 16, args.seed)
        torch.manual_seed(args.seed)
        model.vision_tower = train_regions(grown.vision_tower, processor, steps, batch, args.seed)
    else:
        model.language_model = train_language_model(tokenizer, args.llama_steps or 300, args.llama_batch or 32, args.seed)
        torch.manual_seed(args.seed)
        vision = initialise(CLIPVision(CLIPVisionConfig(**VISION)))
        model.vision_tower = train_clip(vision, tokenizer, processor, steps, batch, args.seed)
    save_checkpoint(model, out, out, torch.float16)


if __name__ == "__main__":
    main()
