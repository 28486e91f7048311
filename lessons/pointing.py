"""A pointing game: do attention, occlusion and the logit lens point at the thing that a question is about?

    python -m lessons.pointing            # 200 held-out pictures of known layout; writes lessons/pointing.json

"What colour is the star?" is about one thing, and where it lies is known, for the picture was drawn from it. Each way of
looking inside names one patch, for the first word of the answer. It is a hit if the middle of the patch lies in the box around
the thing. Chance is of two kinds, a patch at random and one of the things at random: to tell things from the ground is easy.
The same is asked of a model whose weights have been shuffled: a way that still points then shows the picture, not the model
(Adebayo et al. 2018, https://arxiv.org/abs/1810.03292).
"""

import argparse
import json
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from chat import Chat
from tiny.world import make_scene, paint, pick, place

RECORD = Path(__file__).parent / "pointing.json"
WAYS = {
    "attention": "the patch that the last token of the prompt attends to most, mean over all blocks and heads",
    "best head": "the same for a single head, the one that hits most often in other pictures",
    "occlusion": "the patch which, greyed with its eight neighbours, makes the right answer least likely",
    "logit lens": "the patch whose state, read as the next word, is likeliest the colour; after the block that hits most often in others",
}


def games(count, seed, grid):
    """Questions about one thing each, in held-out pictures: (picture, question, colour, boxes), where boxes are (things, grid²)
    bool, the patches whose middle lies in the box around a thing; the first thing is the one that is asked about."""
    n = 0
    while count:
        random = Random(f"{seed} pointing {n}")
        n += 1
        scene = make_scene(random, held_out=True)
        asked = pick(scene, random, without=("colour",))
        if len(scene) == 1 or not asked:
            continue
        count -= 1
        (thing, name), (ground, placed) = asked[0], place(scene, random)
        picture = paint(ground, placed)
        middles = (torch.arange(grid) + 0.5) * picture.width / grid
        boxes = []
        for one in sorted(placed, key=lambda one: one.thing is not thing):
            xs, ys = map(torch.tensor, zip(*one.outline()))
            columns, rows = ((middles > along.min()) & (middles < along.max()) for along in (xs, ys))
            boxes.append((rows[:, None] & columns).flatten())
        yield picture, f"What colour is the {name}?", thing.colour, torch.stack(boxes)


def encoded(chat, question, picture):
    """A question that begins a conversation: its ids (1, T) with one <image>, and the picture's pixels."""
    chat.reset()
    return torch.tensor([chat.tokenizer.encode(chat.prompt(question, [picture]))]), chat.processor([picture])


@torch.no_grad()
def attention_and_lens(chat, ids, pixels, word):
    """Of each patch: the attention that the last token of the prompt pays to it, (layers, heads, P), and the logarithm of the
    probability that the logit lens gives a word there, after each block, (layers, P). word: a token id."""
    model, P = chat.model, chat.model.config.features_per_image
    first = ids[0].tolist().index(model.config.image_id)
    out = model(ids, pixels, output_hidden_states=True, output_attentions=True)
    maps = torch.stack([layer[0, :, -1, first : first + P] for layer in out.attentions])
    *between, last = (states[0, first : first + P] for states in out.hidden_states[1:])
    states = torch.stack([*map(model.language_model.norm, between), last])  # the last one is normalised already
    return maps, model.language_model.lm_head(states).log_softmax(-1)[..., word]


@torch.no_grad()
def occlusion(chat, ids, pixels, answer, batch=32):
    """By how much the log-probability of an answer falls when a patch and those around it are greyed: (P,).

    answer: its token ids, one or several.
    """
    size, side = chat.model.config.vision.patch_size, pixels.shape[-1]
    greyed = []
    for row in range(0, side, size):
        for column in range(0, side, size):
            one = pixels[0].clone()
            one[:, max(0, row - size) : row + 2 * size, max(0, column - size) : column + 2 * size] = 0  # the mean of CLIP's pictures
            greyed.append(one)
    ids = torch.cat([ids, torch.tensor([answer])], dim=1)
    sums = []
    for some in torch.stack([pixels[0], *greyed]).split(batch):
        logits = chat.model(ids.expand(len(some), -1), some).logits[:, -len(answer) - 1 : -1]
        sums.append(logits.log_softmax(-1)[:, range(len(answer)), answer].sum(-1))
    log_probability = torch.cat(sums)
    return log_probability[0] - log_probability[1:]


def best(scores, boxes):
    """Which candidate hits the asked thing most often. scores: of each picture (candidates, P). Returns its index."""
    hits = torch.stack([box[0, score.argmax(-1)] for score, box in zip(scores, boxes)])
    return int(hits.sum(0).argmax())


def pointed(chat, count, seed=0, tuning=50, occlude=True):
    """Play: {way: the patch it points at in each picture}, and the boxes of each picture (see `games`).

    tuning: on how many other pictures a head and a block are chosen. occlude: also play by occlusion, 65 passes a picture.
    """
    grid = chat.model.config.vision.image_size // chat.model.config.vision.patch_size
    maps, lenses, occluded, boxes = [], [], [], []
    played = [*games(tuning, f"{seed} tuning", grid), *games(count, seed, grid)]
    for n, (picture, question, colour, box) in enumerate(tqdm(played, desc="pointing", unit="picture", disable=None)):
        ids, pixels = encoded(chat, question, picture)
        attention, lens = attention_and_lens(chat, ids, pixels, chat.tokenizer.encode(colour)[1])
        maps.append(attention.flatten(0, 1))
        lenses.append(lens)
        boxes.append(box)
        if occlude and n >= tuning:
            occluded.append(int(occlusion(chat, ids, pixels, chat.tokenizer.encode(colour.capitalize())[1:]).argmax()))
    head, block = best(maps[:tuning], boxes[:tuning]), best(lenses[:tuning], boxes[:tuning])
    patches = {
        "attention": [int(scores.mean(0).argmax()) for scores in maps[tuning:]],
        "best head": [int(scores[head].argmax()) for scores in maps[tuning:]],
    }
    if occlude:
        patches["occlusion"] = occluded
    patches["logit lens"] = [int(scores[block].argmax()) for scores in lenses[tuning:]]
    return patches, boxes[tuning:]


def shares(patches, boxes):
    """{way: (share of its patches on the thing asked about, on another thing)}, also for a patch and for a thing at random."""
    rows = {way: [(box[0, n], box[1:, n].any()) for n, box in zip(chosen, boxes)] for way, chosen in patches.items()}
    rows["a patch at random"] = [(box[0].float().mean(), box[1:].any(0).float().mean()) for box in boxes]
    rows["a thing at random"] = [(1 / len(box), 1 - 1 / len(box)) for box in boxes]
    return {way: torch.tensor(row, dtype=torch.float).mean(0).tolist() for way, row in rows.items()}


def shuffle(model, seed=0):
    """Shuffle the numbers within each weight tensor, in place: nothing that was learnt is left but their sizes."""
    random = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data = weight.flatten()[torch.randperm(weight.numel(), generator=random)].view_as(weight)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="pictures")
    args = parser.parse_args()
    record = {"count": args.count}
    for name in ("trained", "shuffled"):
        chat = Chat.from_pretrained("tiny/llava", dtype=torch.float32)
        if name == "shuffled":
            shuffle(chat.model)
        patches, boxes = pointed(chat, args.count)
        record[name] = {"patches": patches, "shares": shares(patches, boxes)}
        print(name, {way: f"{asked:.1%} {other:.1%}" for way, (asked, other) in record[name]["shares"].items()})
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
