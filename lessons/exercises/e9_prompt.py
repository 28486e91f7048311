"""Exercise 9: the prompt and its labels. What a model learns from a conversation.

In training the model reads whole conversations, but only what the assistant says is learnt, and the end mark after it, for the
model must learn to stop. The labels are the ids themselves where there is something to learn, and −100 everywhere else: the loss
leaves that out (LLaVA, https://arxiv.org/abs/2304.08485, section 4.2 and equation 3). They are not shifted here; the loss does that.

A record is {"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A ring."}, …]}.
`chat_prompt(messages, style)`, in tokenizer.py, writes the text of a conversation (what messages are is described there; a picture
is a part {"type": "image"} of the content, not text). `tokenizer.encode` makes ids of a text, BOS first, with one for `<image>`.

The ids have to be those of the whole conversation, as it will be read in chat: `tokenizer.encode(chat_prompt(messages, style))`.

`encode_conversation` becomes `training.data.encode_conversation`.
"""


def encode_conversation(record, tokenizer, style, system=None):
    """Two lists of one length, ids and labels. style: "llava", "bakllava" or "vip"; system: a system sentence, the first message,
    or None. A first turn of the assistant's is skipped. Raises ValueError for a record without
    turns, or whose speakers are not human and gpt in turn, beginning with human and ending with gpt."""
    raise NotImplementedError("exercise 9: encode the conversation and lay its labels beside it")
