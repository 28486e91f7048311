"""Questions outside a conversation, each on its own: many answered in batches, or given answers scored.

The functions are handed a `chat.Chat`, for its model, its tokenizer, its chat format and its settings. `batch.py` does the generating.

Shapes: B rows of a batch, T tokens of the longest.
"""

import torch

from batch import Prompt, generate_many
from inputs import check_pictures, check_room_for_answer, left_padded, prepare
from tokenizer import stop_at

PLACE = "\ue000"  # stands for a literal text while the prompt around it is written; a character that no text has


class Unanswered(str):
    """In the place of an answer to a question that could not be asked: an empty text, and in `error` the ValueError that says why."""

    def __new__(cls, error):
        self = super().__new__(cls)
        self.error = error
        return self


def user_message(question, images):
    return {"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]}


def prompt_of(chat, question, literal=False):
    """The Prompt of a question, a pair (text, [PIL pictures]). Raises ValueError if it cannot be asked."""
    if not isinstance(question, list | tuple) or len(question) != 2 or not isinstance(question[0], str):
        raise ValueError(f"a question is {question!r}; expected a pair (text, [pictures])")
    text, images = question
    check_pictures(images)
    if literal:
        written = chat.text([user_message(PLACE, images)]).replace(PLACE, text)
    else:
        written = chat.text([user_message(text, images)])
    ids, config = chat.encode(written), chat.model.config
    if ids.count(config.image_id) != len(images) * config.features_per_image:
        raise ValueError(f"the question {text!r} contains '<image>'; pictures are given beside the text, not in it")
    check_room_for_answer(ids, config)
    return Prompt(ids, chat.processor(images, pad=chat.pad) if images else None)


# Answers


def answers_in_batches(chat, questions, batch_size, literal, options):
    """The body of `Chat.answer`: yields (number, answer) of each question as its answer ends. options: those of `generate_many`."""
    prompts = prompts_or_errors(chat, questions, literal)
    for n, ids in generate_many(chat.model, prompts, batch_size, chat.has_ended, **options):
        if isinstance(ids, ValueError):
            yield n, Unanswered(ids)
        else:
            yield n, "".join(stop_at(chat.tokenizer.stream(ids), chat.end_mark))


def prompts_or_errors(chat, questions, literal):
    """The Prompt of each question; of one that cannot be asked, the ValueError that says why."""
    for question in questions:
        try:
            prompt = prompt_of(chat, question, literal)
        except ValueError as error:
            prompt = error
        yield prompt


def in_order(numbered):
    """From pairs (n, item), in which each n of 0, 1, 2 … comes once: the items by their numbers, each as soon as it can be given."""
    early, due = {}, 0
    for n, item in numbered:
        early[n] = item
        while due in early:
            yield early.pop(due)
            due += 1


# Scores


def token_scores(chat, asked, batch_size):
    """The body of `Chat.token_scores`."""
    scores = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        prompts = [prompt_of(chat, (question, images)) for question, _, images in batch]
        answers = [answer_ids(chat, question, answer, images) for question, answer, images in batch]
        pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
        scores += log_probabilities(chat.model, [prompt.ids for prompt in prompts], answers, torch.cat(pixels) if pixels else None)
    return scores


def answer_ids(chat, question, answer, images):
    """The ids that the model would write to give this answer, those of the end mark included."""
    asked = user_message(question, images)
    prompt, whole = chat.text([asked]), chat.text([asked, {"role": "assistant", "content": answer}])
    added = whole[len(prompt) + 1 :]  # without the space before the answer: SentencePiece puts one there itself
    return chat.tokenizer.encode(added)[1:]  # without BOS


@torch.no_grad()
def log_probabilities(model, prompts, answers, pixel_values=None):
    """The log-probability of each token of given answers, after the prompt, the pictures and the tokens before it.

    prompts, answers: lists of B rows of ids, the `<image>`s in them as in Llava.forward; pixel_values: (N, 3, side, side), or None.
    Returns a list of B float32 tensors (tokens of the answer,), on the CPU. One forward pass computes all of them: the logits at each
    position are a prediction of the next token, whether that token is known already or not.
    """
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = left_padded(rows, model.config.pad_id), left_padded([[1] * len(row) for row in rows], 0)
    inputs = prepare(model.config, model.device, model.dtype, ids, pixel_values, mask)
    x, _ = model.embed(inputs.ids, pixel_values)
    x = model.language_model(x, inputs.mask)  # (B, T, D)
    longest = max(map(len, answers))
    logits = model.language_model.lm_head(x[:, -longest - 1 : -1])  # (B, longest, vocabulary): from one position before each token
    chosen = logits.float().log_softmax(-1).gather(-1, inputs.ids[:, -longest:, None])  # (B, longest, 1)
    return [row[longest - len(answer) :, 0] for row, answer in zip(chosen.cpu(), answers)]
