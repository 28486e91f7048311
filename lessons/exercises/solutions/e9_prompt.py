"""Exercise 9, turn by turn in the ids of the whole: where the text up to a question ends, the answer's ids begin."""

from tokenizer import chat_prompt


def encode_conversation(record, tokenizer, style, system=None):
    turns = record["conversations"]
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if not turns or len(turns) % 2 or any(turn["from"] != ("human", "gpt")[n % 2] for n, turn in enumerate(turns)):
        raise ValueError(f"speakers are {[turn['from'] for turn in turns]}; expected human and gpt in turn")
    messages = [] if system is None else [{"role": "system", "content": system}]
    ids, labels = [], []
    for turn in turns:
        if turn["from"] == "human":
            pictures = [{"type": "image"}] * turn["value"].count("<image>")
            text = {"type": "text", "text": turn["value"].replace("<image>", "").strip()}
            messages.append({"role": "user", "content": [*pictures, text]})
        else:
            messages.append({"role": "assistant", "content": turn["value"]})
        start, ids = len(labels), tokenizer.encode(chat_prompt(messages, style))
        labels += [-100] * (len(ids) - start) if turn["from"] == "human" else ids[start:]
    return ids, labels
