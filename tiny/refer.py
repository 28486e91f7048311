"""The second stage of tiny/vip-llava, in which it learns which mark is meant.

    python -m tiny.refer --model tiny/build/vip-aligned --out tiny/build/vip-refers

LLaVA's second stage (`train.py --stage 2`) is not enough for this. After it a small model sees what is marked, but the words for
the mark in a question change nothing: of two marks it takes either. To refer, attention must match the name of a mark with
the patches that show the mark. As long as it does not, the name does not help an answer, and the loss of the answers says
little about how to match. So attention is guided here (Chen et al. 2016, https://arxiv.org/abs/1607.01628): the model learns
the answers and where to look.

- In the first block the colour in a mark's name looks at the patches of the thing that has the mark. Marks in one picture
  have different colours. Where a question names a thing by its kind ("Which mark does the ring have?"), the kind looks at the
  thing's patches.
- In the third block an answer looks at that word.

Half of a block's heads are guided, and only in training. The model itself stays as it is.
"""

import argparse
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from images import ImageProcessor
from inputs import IGNORED
from llama import attention
from llava import Llava
from tiny.marked import MOST_MARKS, ask_like, conversation, marked_scene, picture
from tiny.towers import of_cell, optimise, progress
from tiny.world import llava_record
from tokenizer import Tokenizer
from train import learning_rate
from training.data import collate, encode_conversation
from weights.checkpoint import save_checkpoint

NAME_BLOCK, ANSWER_BLOCK = 0, 2  # the blocks in which names and answers are guided, counted from 0
HEADS = 3  # of the six in a block: the first ones


def find_last(ids, piece, begin, end):
    """The last index of the last time that the ids of `piece` stand in ids[begin:end]."""
    for last in range(end - 1, begin + len(piece) - 2, -1):
        if ids[last - len(piece) + 1 : last + 1] == piece:
            return last


def referred(question, scene, marked):
    """The words by which a question refers to things, and the things: [(word, thing), …]."""
    if question.startswith("Which mark"):  # it names a thing, which may be called like a mark: "the red triangle"
        return [(thing.kind, thing) for thing in scene if question == f"Which mark does the {thing.kind} have?"]
    return [(mark.colour, thing) for thing, mark in marked if mark.name in question]


def where_to_look(ids, labels, turns, scene, marked, tokenizer, features):
    """For each word that refers to a thing, and for each word of the answer, where it should look: [(block, place of the word,
    places to look at), …]. Places are counted after `<image>` has become as many tokens as a picture has features."""
    image = ids.index(tokenizer.image_id)
    answers = [i for i, label in enumerate(labels) if label != IGNORED]
    begins = [i for i in answers if labels[i - 1] == IGNORED]
    ends = [i + 1 for i in answers if i + 1 == len(labels) or labels[i + 1] == IGNORED]
    looks = []
    for (question, _), before, begin, end in zip(turns, [image, *ends], begins, ends):
        words = []
        for word, thing in referred(question, scene, marked):
            words.append(find_last(ids, tokenizer.encode(word)[1:], before, begin) + features - 1)
            looks.append((NAME_BLOCK, words[-1], [image + patch - 1 for patch in of_cell(thing.cell)]))
        if words:  # what predicts a word stands before it
            looks += [(ANSWER_BLOCK, i - 1 + features - 1, words) for i in range(begin, end)]
    return looks


def questions(scene, marked, random):
    """A conversation of the marked world, and what it finds hardest once more: how many things are like a marked one."""
    turns = conversation(scene, marked, random)
    if len(turns) > 1:
        turns.append(ask_like(scene, [random.choice(marked)], random))
    return [*dict.fromkeys(turns)]


def make_batch(random, size, tokenizer, features):
    """Conversations about pictures with one to four marks: [(ids, labels, picture), …], and for each where its words look."""
    examples, looks = [], []
    for _ in range(size):
        scene, layout, marked = marked_scene(random, random.randint(1, MOST_MARKS))
        turns = questions(scene, marked, random)
        ids, labels = encode_conversation(llava_record("", "", turns), tokenizer, "vip")
        examples.append((ids, labels, picture(layout, marked)))
        looks.append(where_to_look(ids, labels, turns, scene, marked, tokenizer, features))
    return examples, looks


class Watch:
    """Attention as ever, which also keeps the queries and keys of the guided heads: (B, HEADS, T, E) each."""

    def __call__(self, q, k, v, mask):
        self.queries, self.keys = q[:, :HEADS], k[:, :HEADS]
        return attention(q, k, v, mask)

    def loss(self, guided):
        """−log of the share of attention that is where it should be, the mean over the guided words and heads.

        guided: for each row of the batch [(word, places to look at), …].
        """
        losses = []
        for queries, keys, of_row in zip(self.queries, self.keys, guided):
            if not of_row:
                continue
            words = torch.tensor([word for word, _ in of_row])
            scores = queries[:, words] @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5  # (HEADS, guided words, S)
            later = torch.arange(keys.shape[1]) > words[:, None]
            shares = scores.float().masked_fill(later, -torch.inf).softmax(-1)
            right = torch.zeros(later.shape)
            for n, (_, places) in enumerate(of_row):
                right[n, places] = 1
            losses.append(-((shares * right).sum(-1) + 1e-6).log().flatten())
        return torch.cat(losses).mean()


def train(model, tokenizer, processor, steps, size, peak, seed):
    """The projector and the language model learn at the full rate, the vision tower at a tenth of it."""
    learners = [model.projector, model.language_model, model.vision_tower]
    groups = [dict(params=[*module.requires_grad_(True).parameters()], scale=scale) for module, scale in zip(learners, (1.0, 1.0, 0.1))]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    watches = {block: Watch() for block in (NAME_BLOCK, ANSWER_BLOCK)}
    for block, watch in watches.items():
        model.language_model.layers[block].self_attn.attend = watch
    bar = progress(steps, "refer")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 0.05) * group["scale"]
        examples, looks = make_batch(Random(f"{seed} refer {step}"), size, tokenizer, model.config.features_per_image)
        ids, labels, pixels = collate(examples, processor, tokenizer.image_id, tokenizer.pad_id, model.config.features_per_image, False)
        with torch.autocast("cpu", torch.bfloat16):
            embeds, _ = model.embed(ids, pixels)
            x = model.language_model(embeds)[:, :-1]
            learnt = labels[:, 1:] != IGNORED
            words = F.cross_entropy(model.language_model.lm_head(x[learnt]).float(), labels[:, 1:][learnt])
            names, answers = (
                watch.loss([[look for at, *look in of_row if at == block] for of_row in looks]) for block, watch in watches.items()
            )
        optimise(words + names + answers, optimizer, [*model.parameters()])
        bar.set_postfix(words=f"{words.item():.3f}", names=f"{names.item():.3f}", answers=f"{answers.item():.3f}", refresh=False)


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
