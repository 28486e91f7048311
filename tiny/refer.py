"""The last stage of tiny/vip-llava: it learns which mark is meant.

    python -m tiny.refer --model tiny/build/vip-seen --out tiny/build/vip-refers

After LLaVA's two stages the model sees what is marked. But the words for the mark in a question change nothing: of two marks
it takes either. To refer, attention must match the name of a mark with the patches that show the mark. As long as it does
not, the name does not help an answer, and the loss of the answers says little about how to match. So attention is guided
here (Chen et al. 2016, https://arxiv.org/abs/1607.01628): the model learns the answers and where to look.

- In the first block the colour in a mark's name looks at the patches of the thing that has the mark. Marks in one picture
  have different colours.
- In the third block an answer looks at that colour.

Half of a block's heads are guided, and only in training. The model itself stays as it is.
"""

import argparse
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from checkpoint import save_checkpoint
from images import ImageProcessor
from inputs import IGNORED
from llava import Llava
from tiny.marked import MOST_MARKS, conversation, marked_scene, picture
from tiny.towers import of_cell, optimise, progress
from tiny.world import llava_record
from tokenizer import Tokenizer
from train import collate, encode_conversation, learning_rate

COLOUR_BLOCK, ANSWER_BLOCK = 0, 2  # the blocks in which colours and answers are guided, counted from 0
HEADS = 3  # of the six in a block: the first ones


def find_last(ids, piece, begin, end):
    """The last index of the last time that the ids of `piece` stand in ids[begin:end]."""
    for last in range(end - 1, begin + len(piece) - 2, -1):
        if ids[last - len(piece) + 1 : last + 1] == piece:
            return last


def where_to_look(ids, labels, turns, marked, tokenizer, features):
    """For the colour of each mark in a question, and for each word of its answer, where it should look: [(block, place of the
    word, places to look at), …]. Places are counted after `<image>` has become as many tokens as a picture has features."""
    image = ids.index(tokenizer.image_id)
    answers = [i for i, label in enumerate(labels) if label != IGNORED]
    begins = [i for i in answers if labels[i - 1] == IGNORED]
    ends = [i + 1 for i in answers if i + 1 == len(labels) or labels[i + 1] == IGNORED]
    looks = []
    for (question, _), before, begin, end in zip(turns, [image, *ends], begins, ends):
        if question.startswith("Which mark"):  # it names a thing, which may be called like a mark: "the red triangle"
            continue
        colours = []
        for thing, mark in marked:
            if mark.name in question:
                colours.append(find_last(ids, tokenizer.encode(mark.colour)[1:], before, begin) + features - 1)
                looks.append((COLOUR_BLOCK, colours[-1], [image + patch - 1 for patch in of_cell(thing.cell)]))
        if colours:  # what predicts a word stands before it
            looks += [(ANSWER_BLOCK, i - 1 + features - 1, colours) for i in range(begin, end)]
    return looks


def make_batch(random, size, tokenizer, features):
    """Conversations about pictures with one to four marks: [(ids, labels, picture), …], and for each where its words look."""
    examples, looks = [], []
    for _ in range(size):
        scene, layout, marked = marked_scene(random, random.randint(1, MOST_MARKS))
        turns = conversation(scene, marked, random)
        ids, labels = encode_conversation(llava_record("", "", turns), tokenizer, "vip")
        examples.append((ids, labels, picture(layout, marked)))
        looks.append(where_to_look(ids, labels, turns, marked, tokenizer, features))
    return examples, looks


def attention_loss(maps, looks, block):
    """−log of the share of attention that is where it should be, the mean over the guided words and heads of a block."""
    guided = [(row, word, places) for row, of_row in enumerate(looks) for at, word, places in of_row if at == block]
    attention = maps[block][[row for row, *_ in guided], :HEADS, [word for _, word, _ in guided]].float()  # (guided words, heads, S)
    right = torch.zeros(len(guided), 1, attention.shape[-1])
    for n, (*_, places) in enumerate(guided):
        right[n, 0, places] = 1
    return -((attention * right).sum(-1) + 1e-6).log().mean()


def train(model, tokenizer, processor, steps, size, peak, seed):
    """The projector and the language model learn at the full rate, the vision tower at a tenth of it."""
    learners = [model.projector, model.language_model, model.vision_tower]
    groups = [dict(params=[*module.requires_grad_(True).parameters()], scale=scale) for module, scale in zip(learners, (1.0, 1.0, 0.1))]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    bar = progress(steps, "refer")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 0.05) * group["scale"]
        examples, looks = make_batch(Random(f"{seed} refer {step}"), size, tokenizer, model.config.features_per_image)
        ids, labels, pixels = collate(examples, processor, tokenizer.image_id, tokenizer.pad_id, model.config.features_per_image, False)
        maps = []
        with torch.autocast("cpu", torch.bfloat16):
            embeds, _ = model.embed(ids, pixels)
            x = model.language_model(embeds, maps=maps)[:, :-1]
            learnt = labels[:, 1:] != IGNORED
            words = F.cross_entropy(model.language_model.lm_head(x[learnt]).float(), labels[:, 1:][learnt])
        colours, answers = (attention_loss(maps, looks, block) for block in (COLOUR_BLOCK, ANSWER_BLOCK))
        optimise(words + colours + answers, optimizer, [*model.parameters()])
        bar.set_postfix(words=f"{words.item():.3f}", colours=f"{colours.item():.3f}", answers=f"{answers.item():.3f}", refresh=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = Llava.from_pretrained(args.model, dtype=torch.float32)
    tokenizer, processor = Tokenizer.from_pretrained(args.model), ImageProcessor.from_pretrained(args.model)
    train(model, tokenizer, processor, args.steps, args.batch_size, args.lr, args.seed)
    save_checkpoint(model, args.model, args.out, torch.float16)


if __name__ == "__main__":
    main()
