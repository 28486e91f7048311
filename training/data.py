"""Conversations in LLaVA's own format, encoded and put into batches."""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from images import open_image
from inputs import IGNORED
from tokenizer import STYLES, chat_prompt, expand_images


def encode_conversation(record, tokenizer, style):
    """Ids and labels of one record, `<image>` as one id. Each turn is encoded on its own and its labels laid beside it:
    −100 for what the human says, the ids themselves for the assistant's words and the end mark.

    Raises ValueError for a record that is no conversation, or whose text cannot be told from a turn mark.
    """
    said = record["conversations"]
    speakers = [turn["from"] for turn in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        raise ValueError(f"record {record.get('id')!r}: speakers are {speakers}; expected human and gpt in turn")
    ids, labels = [tokenizer.bos_id], [IGNORED]
    messages, done = [], ""  # the conversation so far, and its text
    for human, gpt in zip(said[::2], said[1::2]):
        content = [{"type": "image"}] * human["value"].count("<image>")
        content.append({"type": "text", "text": human["value"].replace("<image>", "").strip()})
        messages.append({"role": "user", "content": content})
        asked = chat_prompt(messages, style)
        messages.append({"role": "assistant", "content": gpt["value"]})
        answered = chat_prompt(messages, style)
        # At the beginning and after a token like "</s>" text begins anew. ViP-LLaVA's "###" is text, which the next question
        # continues: encoded on its own, it would get a space that it has not in the whole conversation.
        anew = not done or STYLES[style].end in tokenizer.specials
        prompt = tokenizer.encode(asked[len(done) :])[1:] if anew else tokenizer.encode_more(asked[len(done) :])
        answer = tokenizer.encode(answered[len(asked) + 1 :])[1:]  # its leading space is SentencePiece's own
        ids += prompt + answer
        labels += [IGNORED] * len(prompt) + answer
        done = answered
    return ids, labels


class Conversations(Dataset):
    """The records of a data file, encoded; a picture is opened when its record is asked for.

    `lengths` are in tokens, the features of a picture counted. with_picture: leave out records that have none.
    """

    def __init__(self, path, images, tokenizer, style, max_length, features_per_image, with_picture=False):
        try:
            records = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are kinds of ValueError
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{path} holds a {type(records).__name__}; expected a list of conversations")
        self.examples, self.lengths, left_out = [], [], []
        for n, record in enumerate(tqdm(records, desc="reading", unit="conversation", delay=1, disable=None)):
            try:
                ids, labels = encode_conversation(record, tokenizer, style)
                count = ids.count(tokenizer.image_id)
                if count != ("image" in record):
                    raise ValueError(f"record {record.get('id')!r} has {count} <image> for {int('image' in record)} pictures")
                if with_picture and not count:
                    raise ValueError(f"record {record.get('id')!r} has no picture for the projector to learn from")
                room = max(0, max_length - count * (features_per_image - 1))  # what is longer is cut at its end
                ids, labels = ids[:room], labels[:room]
                if set(labels) <= {IGNORED} or ids.count(tokenizer.image_id) < count:
                    raise ValueError(f"record {record.get('id')!r} has no answer to its picture within {max_length} tokens")
                self.examples.append((ids, labels, Path(images) / record["image"] if count else None))
                self.lengths.append(len(ids) + count * (features_per_image - 1))
            except ValueError as error:
                left_out.append(str(error))
            except (KeyError, TypeError, AttributeError) as error:
                left_out.append(f"record {n + 1} is no conversation ({error!r})")
        if left_out:
            print(f"{len(left_out)} records left out, the first because: {left_out[0]}", file=sys.stderr)
        if not self.examples:
            raise ValueError(f"{path} holds no conversation to train on")

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        """(ids, labels, picture or None). In place of a record whose picture is missing or broken, the next one."""
        for i in (*range(index, len(self)), *range(index)):
            ids, labels, path = self.examples[i]
            try:
                return ids, labels, None if path is None else open_image(path)
            except (ValueError, OSError) as error:
                print(f"\n{error}; another record takes its place", file=sys.stderr)
        raise ValueError("no picture of the data can be opened; see --images")


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
    after the padding, so causal attention needs no mask to leave it out."""
    stretch = lambda ids, values: expand_images(ids, image_id, features_per_image, values)
    examples = [(stretch(ids, ids), stretch(ids, labels), image) for ids, labels, image in examples]
    width = max(len(ids) for ids, _, _ in examples)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _, _ in examples])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels, _ in examples])
    images = [image for _, _, image in examples if image is not None]
    return ids, labels, processor(images, pad=pad) if images else None
