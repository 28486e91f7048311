"""Conversations in LLaVA's own format: encoded once, into arrays on disk, and put into batches.

A data set like LLaVA's instruction mix has 665,298 conversations. As Python lists their tokens take some 50 bytes each, in every
process; in a file that all processes map into memory they take 8, and the system keeps only what is in use.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections import deque
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hardware.processes import ignore_interrupts
from images import ImageProcessor, open_image
from inputs import IGNORED
from marks import draw_marks
from tokenizer import Tokenizer, chat_prompt, expand_images
from training.records import (
    MISSING,
    NO_BOX,
    NO_CONVERSATION,
    NO_TURNS,
    REFUSED,
    LeftOut,
    Unusable,
    has_pictures,
    name_of,
    pictures_of,
    read_records,
)
from training.regions import has_regions, mark_from, mark_regions

REGION = re.compile(r"<(bbox\d*|(mask|segmentation|region|obj)\d+)>")
BLOCK = 500  # records that a process encodes at a time
MOST_PROCESSES = 8
LOOKED_AT = 20  # pictures that are opened before a run begins, to see whether they can be


def encode_conversation(record, tokenizer, style, system=None):
    """Ids and labels of one record, `<image>` as one id. Each turn is encoded on its own and its labels laid beside it:
    −100 for what the human says, the ids themselves for the assistant's words and the end mark.

    system: a system sentence in place of the style's own. A first turn of the assistant's is skipped, as in LLaVA.
    Raises ValueError for a record that is no conversation, or whose text cannot be told from a turn mark.
    """
    said = record["conversations"]
    if said and said[0]["from"] == "gpt":
        said = said[1:]
    speakers = [turn["from"] for turn in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        raise Unusable(NO_TURNS, f"speakers are {speakers}")
    ids, labels = [tokenizer.bos_id], [IGNORED]
    messages = [] if system is None else [{"role": "system", "content": system}]
    done = ""  # the text of the conversation so far
    for human, gpt in zip(said[::2], said[1::2]):
        content = [{"type": "image"}] * human["value"].count("<image>")
        content.append({"type": "text", "text": human["value"].replace("<image>", "").strip()})
        messages.append({"role": "user", "content": content})
        asked = chat_prompt(messages, style)
        messages.append({"role": "assistant", "content": gpt["value"]})
        answered = chat_prompt(messages, style)
        # At the beginning and after a token like "</s>" text begins anew. ViP-LLaVA's "###" is text, which the next question
        # continues: encoded on its own, it would get a space that it has not in the whole conversation.
        anew = not done or done.endswith(tuple(tokenizer.specials))
        prompt = tokenizer.encode(asked[len(done) :])[1:] if anew else tokenizer.encode_more(asked[len(done) :])
        answer = tokenizer.encode(answered[len(asked) + 1 :])[1:]  # its leading space is SentencePiece's own
        ids += prompt + answer
        labels += [IGNORED] * len(prompt) + answer
        done = answered
    return ids, labels


def encode_caption(record, tokenizer):
    """Ids and labels of one record in the `plain` format, in which LLaVA's first stage was trained: `<image>`, the caption and a
    newline. Caption and newline are learnt; the question and the end mark are left away.

    Raises ValueError for a record that is no question about one picture and its answer.
    """
    said = record["conversations"]
    if [turn["from"] for turn in said] != ["human", "gpt"]:
        raise Unusable("it is no single question and answer, as --format plain wants", f"it has {len(said)} turns")
    caption = said[1]["value"]
    for literal in tokenizer.specials:
        if literal in caption:
            raise ValueError(f"the caption contains {literal!r}, which the model would not read as text")
    answer = tokenizer.encode(caption + "\n")[1:]
    pictures = said[0]["value"].count("<image>")
    return [tokenizer.bos_id] + [tokenizer.image_id] * pictures + answer, [IGNORED] * (1 + pictures) + answer


def refuse_regions(record):
    """What stands for a region and has not become words means nothing, and would be learnt as it stands."""
    for turn in record["conversations"]:
        if found := REGION.search(turn["value"]):
            raise Unusable(NO_BOX, f'it has {found[0]}; only <bbox0>, <bbox1> … with boxes in "bboxes" are read')


class Encoder:
    """From a record to (ids, labels, names of its pictures, marks, length with the pictures' features), or Unusable.

    encode: a function of a record that gives its ids and labels. max_length: in tokens, the features of a picture counted; what is
    longer is cut at its end. with_picture: leave out records that have none. seed: of the marks on regions, with the record's number.
    """

    def __init__(self, encode, image_id, max_length, features_per_image, with_picture=False, seed=0):
        self.encode, self.image_id, self.max_length, self.with_picture = encode, image_id, max_length, with_picture
        self.seed = seed
        self.more = features_per_image - 1  # the tokens that an `<image>` becomes, beyond itself

    def __call__(self, number, record, images):
        """(ids, labels, names of its pictures, marks, length) of the record with a number. Raises Unusable, also for pictures that are
        not in the folder `images`."""
        if not isinstance(record, dict):
            raise Unusable(NO_CONVERSATION, f"it is a {type(record).__name__}")
        names = pictures_of(record)
        for name in names:
            if not (images / name).is_file():
                raise Unusable(MISSING, f"{images / name}")
        marks = []
        try:
            if has_regions(record):
                record, marks = mark_regions(record, images, Random(f"{self.seed} {number}"))
            ids, labels = self.encode(record)
            refuse_regions(record)
        except Unusable:
            raise
        except ValueError as error:
            raise Unusable(REFUSED, str(error)) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise Unusable(NO_CONVERSATION, repr(error)) from None
        count = ids.count(self.image_id)
        if count != len(names):
            raise Unusable("the number of <image> in its text is not that of its pictures", f"{count} <image> for {len(names)} pictures")
        if self.with_picture and not count:
            raise Unusable("it has no picture for the projector to learn from", "stage 1 is for pictures")
        room = max(0, self.max_length - count * self.more)
        ids, labels = ids[:room], labels[:room]
        if set(labels) <= {IGNORED} or ids.count(self.image_id) < count:
            pictures = count * (self.more + 1)
            raise Unusable(f"it has no answer within {self.max_length} tokens (--max-length)", f"its pictures take {pictures} of them")
        return ids, labels, names, marks, len(ids) + count * self.more


def encode_all(encoder, images, records):
    """Of each (number, record): (id, whether it names pictures, what the encoder gives or the Unusable that it raises)."""
    results = []
    for number, record in records:
        try:
            result = encoder(number, record, images)
        except Unusable as reason:
            result = reason
        results.append((name_of(record), has_pictures(record), result))
    return results


def in_order(function, blocks):
    """map(function, blocks), in several processes if there are several blocks; at most a few blocks are in memory at once."""
    first = list(islice(blocks, 2))
    yield from map(function, first[:1])
    if len(first) < 2:
        return
    count, waiting = min(os.cpu_count(), MOST_PROCESSES), deque()
    with multiprocessing.Pool(count, ignore_interrupts) as pool:
        for block in chain(first[1:], blocks):
            waiting.append(pool.apply_async(function, (block,)))
            if len(waiting) > 2 * count:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def blocks_of(records, size):
    """Lists of so many records, the last one shorter."""
    records = iter(records)
    while block := list(islice(records, size)):
        yield block


def encode_file(path, images, encoder, folder):
    """Encode the records of a data file into arrays in a folder, which is put in place when it is whole, and say what is left out.

    tokens.bin    (tokens, 2) int32: id and label
    sources.bin   of each record a JSON list: the names of its pictures, and the marks to be drawn on the first
    records.npy   (records, 4) int64: where the record ends in tokens.bin and in sources.bin, its length, the number of its pictures
    """
    left_out, rows, tokens_end, sources_end = LeftOut(path, images), [], 0, 0
    partial_folder = folder.with_name(f"{folder.name}.partial")
    partial_folder.mkdir(parents=True, exist_ok=True)
    blocks = in_order(partial(encode_all, encoder, images), blocks_of(enumerate(read_records(path), 1), BLOCK))
    results = tqdm(chain.from_iterable(blocks), desc=f"reading {path.name}", unit=" conversations", delay=1, disable=None)
    with open(partial_folder / "tokens.bin", "wb") as tokens, open(partial_folder / "sources.bin", "wb") as sources:
        for name, with_pictures, result in results:
            left_out.count(with_pictures)
            if isinstance(result, Unusable):
                left_out.add(name, result)
                continue
            ids, labels, names, marks, length = result
            tokens.write(np.array([ids, labels], np.int32).T.tobytes())
            source = json.dumps(names + [vars(mark) for mark in marks]).encode()
            sources.write(source)
            tokens_end, sources_end = tokens_end + len(ids), sources_end + len(source)
            rows.append(np.array([tokens_end, sources_end, length, len(names)]))
    left_out.report()
    np.save(partial_folder / "records.npy", np.stack(rows))
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)


class Conversations(Dataset):
    """The records that `encode_file` has put into a folder; a picture is opened when its record is asked for.

    `lengths` are in tokens, the features of a picture counted; `pictures` are how many each record has; `replaced` says of each
    whether another has had to take its place, in whatever process that was.
    """

    def __init__(self, folder, images):
        self.folder, self.images = Path(folder), Path(images)
        self.replaced = torch.zeros(len(np.load(self.folder / "records.npy", mmap_mode="r")), dtype=torch.bool).share_memory_()
        self.map()

    def map(self):
        self.tokens = np.memmap(self.folder / "tokens.bin", np.int32, "r").reshape(-1, 2)
        self.sources = np.memmap(self.folder / "sources.bin", np.uint8, "r")
        records = np.load(self.folder / "records.npy")
        self.starts = np.concatenate([np.zeros((1, 2), np.int64), records[:, :2]])
        self.lengths, self.pictures = records[:, 2], records[:, 3]

    def __getstate__(self):
        """For a process that reads pictures: it maps the files itself, in place of a copy of them."""
        return self.folder, self.images, self.replaced

    def __setstate__(self, state):
        self.folder, self.images, self.replaced = state
        self.map()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """(ids, labels, pictures). In place of a record whose picture is broken, the next one."""
        for i in (*range(index, len(self)), *range(index)):
            try:
                return self.example(i)
            except (ValueError, OSError) as error:
                self.replaced[i] = True
                print(f"\n{error}; another record takes its place", file=sys.stderr)
        raise ValueError("no picture of the data can be opened; see --images")

    def example(self, i):
        (start, source_start), (end, source_end) = self.starts[i : i + 2].tolist()
        ids, labels = self.tokens[start:end].T.tolist()
        source, count = json.loads(self.sources[source_start:source_end].tobytes()), self.pictures[i]
        pictures = [open_image(self.images / name) for name in source[:count]]
        if marks := source[count:]:
            pictures[0] = draw_marks(pictures[0], [mark_from(values) for values in marks])
        return ids, labels, pictures

    def look_at_some(self):
        """Open some pictures before anything is learnt. Raises ValueError if most of them cannot be: that is no accident."""
        with_pictures = np.flatnonzero(self.pictures)
        some = with_pictures[:: max(1, len(with_pictures) // LOOKED_AT)]
        errors = []
        for i in some.tolist():
            try:
                self.example(i)
            except (ValueError, OSError) as error:
                errors.append(str(error))
        if len(errors) > len(some) / 2:
            raise ValueError(f"{len(errors)} of {len(some)} pictures that were tried cannot be opened: {errors[0]}; see --images")

    def say_what_was_replaced(self, group):
        """At the end: how many records another has taken the place of, in any process."""
        count = sum(group.anyone(self.replaced.tolist()))
        if count:
            print(f"{count} of {len(self)} records had pictures that could not be opened; others took their places", file=sys.stderr)


def conversations(path, images, encoder, made_from, folder, group):
    """The Conversations of a data file, encoded by the first process unless that is done already.

    made_from: all that the encoding depends on beside the file; folder: where the arrays are kept, in a folder of their own.
    Raises ValueError where too many records cannot be used.
    """
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    key = hashlib.sha256(json.dumps([content, str(path), made_from]).encode()).hexdigest()[:16]
    encoded = folder / f"encoded-{key}"
    group.first_makes(lambda: encoded.is_dir() or encode_file(path, images, encoder, encoded))
    data = Conversations(encoded, images)
    data.look_at_some()
    return data


def read_data(args, source, config, run, folder, group):
    """The Conversations to train on, {file: loader of held-out ones}, and the function that makes a batch of examples."""
    tokenizer, processor, P = Tokenizer.from_pretrained(source), ImageProcessor.from_pretrained(source), config.features_per_image
    if args.format == "plain":
        encode = partial(encode_caption, tokenizer=tokenizer)
    else:
        encode = partial(encode_conversation, tokenizer=tokenizer, style=args.style or config.style, system=args.system)
    length = min(args.max_length, config.text.max_position_embeddings)
    encoder = Encoder(encode, tokenizer.image_id, length, P, with_picture=args.stage == 1, seed=args.seed)
    data, *held_out = (conversations(path, args.images, encoder, run, folder, group) for path in (args.data, *args.held_out))
    together = partial(
        collate, processor=processor, image_id=tokenizer.image_id, pad_id=tokenizer.pad_id, features_per_image=P, pad=args.pad
    )
    return data, {path: DataLoader(rows, args.batch_size, collate_fn=together) for path, rows in zip(args.held_out, held_out)}, together


def make_batches(lengths, size, epochs, seed):
    """Indices of each batch, for all epochs: records of like length together, so that little is padding."""
    batches = []
    for epoch in range(epochs):
        random = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(lengths), generator=random).tolist()
        groups = [sorted(order[i : i + 16 * size], key=lengths.__getitem__) for i in range(0, len(order), 16 * size)]
        epoch_batches = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        batches += [epoch_batches[i] for i in torch.randperm(len(epoch_batches), generator=random).tolist()]
    return batches


def collate(examples, processor, image_id, pad_id, features_per_image, pad):
    """A batch: ids and labels, each `<image>` as many times as it has features, padded on the right. Nothing real comes
    after the padding, so causal attention needs no mask to leave it out.

    examples: (ids, labels, picture, list of pictures or None).
    """
    stretch = lambda ids, values: expand_images(ids, image_id, features_per_image, values)
    examples = [(stretch(ids, ids), stretch(ids, labels), images) for ids, labels, images in examples]
    width = max(len(ids) for ids, _, _ in examples)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _, _ in examples])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels, _ in examples])
    pictures = [picture for _, _, images in examples for picture in as_list(images)]
    return ids, labels, processor(pictures, pad=pad) if pictures else None


class Pass(NamedTuple):
    """What a process computes at once: its share of a batch."""

    ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T)
    pixels: torch.Tensor | None  # (N, 3, side, side)
    words: int  # to be learnt; 0 where the batch has no record for this process
    with_pictures: bool  # whether any process has a picture in this pass


def own_passes(data, batches, together, workers, group):
    """This process's share of each batch, a Pass. One that has no share goes through the first record of the batch, for nothing:
    all must meet in each pass."""
    shares = [batch[group.rank :: group.size] or batch[:1] for batch in batches]
    loader = DataLoader(data, batch_sampler=shares, collate_fn=together, num_workers=workers, worker_init_fn=ignore_interrupts)
    for batch, (ids, labels, pixels) in zip(batches, loader):
        words = (labels[:, 1:] != IGNORED).sum().item() if group.rank < len(batch) else 0
        yield Pass(ids, labels, pixels, words, bool(data.pictures[batch].any()))


def as_list(images):
    if images is None:
        return []
    return images if isinstance(images, list) else [images]
