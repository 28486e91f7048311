"""Generation: which tokens come, when it stops, how much is computed; and the KV cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from generate import Repetition, greedy, greedy_cached, sample
from images import open_image
from inputs import mask_of_padding
from llama import KVCache
from tests.compare import FAMILIES, TOLERANCE, load, one_id_per_image, relative
from tokenizer import expand_images

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -8.0]])


def prompt(reference, rows=slice(None)):
    return {name: reference[name][rows] for name in ("input_ids", "pixel_values", "attention_mask")}


def generated(model, inputs, **options):
    """All steps at once: (B, steps)."""
    options = {"eos_ids": (), "max_new_tokens": 24} | options
    return torch.stack(list(model.generate(**inputs, **options)), 1)


def frequencies(temperature=1.0, top_k=None, top_p=None, draws=20000):
    random = torch.Generator().manual_seed(0)
    tokens = sample(LOGITS.expand(draws, -1), temperature, top_k, top_p, random)
    return tokens.bincount(minlength=LOGITS.shape[1]) / draws


# The loops on the board


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loop", [greedy, greedy_cached])
def test_the_plain_loops_give_the_tokens_of_generate(family, loop):
    model, reference = load(family)
    ids = one_id_per_image(model, reference)["input_ids"][1:2]
    ids = ids[:, (ids[0] != model.config.pad_id).nonzero()[0, 0] :]  # the second row, without its padding
    pixels = reference["pixel_values"][:1]
    expected = [int(token) for token in model.generate(ids, pixels, max_new_tokens=12, eos_ids=())]
    assert len({*expected}) > 2
    for end in (None, expected[6]):  # none of them, and one on the way
        model.config = replace(model.config, eos_ids=(end,))
        shown = expected if end is None else expected[: expected.index(end) + 1]
        assert [*loop(model, ids, pixels, max_new_tokens=12)] == shown


# Choosing a token


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    expected = (LOGITS[0] / temperature).softmax(-1)
    assert (frequencies(temperature) - expected).abs().max() < 0.015


# The probabilities sum up to 0.559, 0.765, 0.890, 0.966, 0.994 …; the token that reaches top_p is still in.
KEPT = [
    (dict(top_k=1), 1),
    (dict(top_k=2), 2),
    (dict(top_k=4), 4),
    (dict(top_k=100), 6),
    (dict(top_p=1e-6), 1),
    (dict(top_p=0.55), 1),
    (dict(top_p=0.57), 2),
    (dict(top_p=0.8), 3),
    (dict(top_p=0.95), 4),
    (dict(top_p=1.0), 6),
    (dict(top_p=1e-300), 1),
    (dict(temperature=1e-40), 1),
    (dict(temperature=5e-324, top_p=0.5), 1),
    (dict(top_p=0.6, temperature=0.5), 1),  # temperature first: the likeliest has 0.82 by then
    (dict(top_p=0.6, temperature=4.0), 3),  # and here 0.28, two have 0.49
    (dict(top_p=0.7, top_k=2), 1),  # then top-k: 0.731 of the two that are left
]


@pytest.mark.parametrize("options, kept", KEPT)
def test_top_k_and_top_p(options, kept):
    expected = ((LOGITS[0] - LOGITS.max()).double() / options.get("temperature", 1)).softmax(-1)
    expected[kept:] = 0
    found = frequencies(**options)
    assert (found - expected / expected.sum()).abs().max() < 0.015
    assert not found[kept:].any()


def test_each_row_draws_for_itself_whatever_the_order_of_its_logits():
    logits = torch.stack([LOGITS[0], LOGITS[0].flip(0)]).repeat(50, 1)
    for options in (dict(top_k=2, top_p=None), dict(top_k=None, top_p=0.6)):
        tokens = sample(logits, 1.0, random=torch.Generator().manual_seed(0), **options).view(-1, 2)
        assert set(tokens[:, 0].tolist()) == {0, 1} and set(tokens[:, 1].tolist()) == {4, 5}


@pytest.mark.parametrize("options", [dict(temperature=0.0, top_k=7), dict(top_k=1), dict(top_p=1e-6)])
def test_options_that_amount_to_greedy(options):
    model, reference = load("llava")
    tokens = generated(model, prompt(reference), **{"temperature": 1.0} | options)
    assert torch.equal(tokens, reference["tokens"][:, :24])


def test_seed():
    model, reference = load("llava")
    one, same, other = (generated(model, prompt(reference), temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generated(model, prompt(reference), temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # a seed of one's own leaves the global one alone


# Stopping


def stopped(tokens, eos_ids, pad_id):
    """What should come of greedy tokens when eos_ids end a row, written out row by row."""
    ends = [next((i for i, token in enumerate(row) if token in eos_ids), len(row) - 1) for row in tokens.tolist()]
    rows = [row[: end + 1].tolist() + [pad_id] * (max(ends) - end) for row, end in zip(tokens, ends)]
    return torch.tensor(rows)


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_ends_at_eos_and_the_others_go_on(family, row, step):
    model, reference = load(family)
    tokens, eos_ids = reference["tokens"], (int(reference["tokens"][row, step]),)
    expected = stopped(tokens, eos_ids, model.config.pad_id)
    assert (expected[row, step + 1 :] == model.config.pad_id).all()
    assert torch.equal(generated(model, prompt(reference), eos_ids=eos_ids, max_new_tokens=64), expected)


@pytest.mark.parametrize("step", [0, 3])
def test_batch_ends_when_every_row_has(step):
    model, reference = load("llava")
    eos_ids = tuple(reference["tokens"][:, step].tolist())
    tokens = generated(model, prompt(reference), eos_ids=eos_ids, max_new_tokens=64)
    assert tokens.shape[1] <= step + 1
    assert torch.equal(tokens, stopped(reference["tokens"], eos_ids, model.config.pad_id))


def test_eos_of_the_checkpoint_is_the_default():
    model, reference = load("llava")
    assert model.config.eos_ids == (2,)
    model.config.eos_ids = (int(reference["tokens"][0, 4]),)
    tokens = generated(model, prompt(reference), eos_ids=None, max_new_tokens=64)
    assert torch.equal(tokens, stopped(reference["tokens"], model.config.eos_ids, model.config.pad_id))


def test_max_new_tokens():
    model, reference = load("llava")
    assert torch.equal(generated(model, prompt(reference), max_new_tokens=3), reference["tokens"][:, :3])


def test_ends_where_the_context_or_the_cache_is_full():
    model, reference = load("llava")
    (B, T), tokens = reference["input_ids"].shape, reference["tokens"]
    cache = KVCache(model.config.text, B, T + 5)
    assert torch.equal(generated(model, prompt(reference), max_new_tokens=2, cache=cache), tokens[:, :2])
    assert torch.equal(generated(model, dict(input_ids=tokens[:, 1:2]), cache=cache), tokens[:, 2:5])
    model.config.text.max_position_embeddings = T + 5
    assert torch.equal(generated(model, prompt(reference)), tokens[:, :5])


# How much is computed


def count_calls(module, calls):
    module.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_encoded_once_and_no_deeper_than_read(family):
    model, reference = load(family)
    tower, blocks = [], []
    count_calls(model.vision_tower, tower)
    for block in model.vision_tower.layers:
        count_calls(block, blocks)
    generated(model, prompt(reference))
    assert len(tower) == 1
    assert len(blocks) == len(model.vision_tower.layers) - 1  # layer −2: all but the last
    model.vision_tower(reference["pixel_values"], [1, 0])
    assert len(blocks) == len(model.vision_tower.layers)  # one more


def test_logits_of_one_position_only():
    model, reference = load("llava")
    heads, blocks = [], []
    count_calls(model.language_model.lm_head, heads)
    count_calls(model.language_model.layers[0], blocks)
    generated(model, prompt(reference), max_new_tokens=4)
    (B, T), D = reference["input_ids"].shape, model.config.text.hidden_size
    assert [shape.numel() for shape in heads] == [B * D] * 4
    assert blocks == [(B, T, D)] + [(B, 1, D)] * 3


# Errors, at the call: nothing here is iterated


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=1.0, top_k=0), "top_k is 0"),
        (dict(temperature=1.0, top_p=0.0), "top_p is 0.0"),
        (dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        (dict(pixel_values=None), "12 <image> tokens for 0 pictures"),
        (dict(input_ids=torch.ones(2, 3).long(), pixel_values=None, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])), "padding"),
        (dict(attention_mask=torch.ones(3, 2)), r"attention_mask is \(3, 2\)"),
    ],
)
def test_bad_arguments(options, message):
    model, reference = load("llava")
    with pytest.raises(ValueError, match=message):
        model.generate(**prompt(reference) | options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(temperature):
    model, reference = load("llava")
    model.language_model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite.*torch.float32"):
        generated(model, prompt(reference), max_new_tokens=1, temperature=temperature)


def test_logits_that_become_not_finite_on_the_way():
    """In the third step, and of a row that has ended not at all."""
    model, reference = load("llava")
    decode_step, steps = model.decode_step, []

    def breaking(token, alive, cache):
        logits = decode_step(token, alive, cache)
        steps.append(None)
        logits[:, 5][~alive | torch.tensor(len(steps) == 3)] = torch.inf
        return logits

    model.decode_step = breaking
    first = int(next(model.generate(**prompt(reference), eos_ids=()))[0])
    tokens = model.generate(**prompt(reference), eos_ids=(first,), max_new_tokens=9)
    assert [next(tokens) for _ in range(3)]
    with pytest.raises(ValueError, match="not finite"):
        next(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_without_a_mask_is_padding_still(family):
    model, reference = load(family)
    inputs = prompt(reference)
    padding = inputs["attention_mask"] == 0
    assert padding.any() and model.config.pad_id not in model.config.eos_ids
    inputs["input_ids"] = inputs["input_ids"].masked_fill(padding, model.config.pad_id)
    expected = generated(model, inputs)
    assert torch.equal(generated(model, inputs | {"attention_mask": None}), expected)
    ends_answers = replace(model.config, eos_ids=(model.config.pad_id,))  # then the id may be a word
    assert mask_of_padding(inputs["input_ids"], ends_answers) is None


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([[96]]), "from 96 to 96; the vocabulary has 96"),
        (torch.tensor([[5, -1]]), "from -1 to 5; the vocabulary has 96"),
        (torch.ones(1, 0, dtype=torch.long), "at least one token"),
        (torch.tensor([5]), r"\(B, T\)"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        load("llava")[0].generate(ids)


@pytest.mark.parametrize("images, pictures", [(1, 2), (2, 1), (0, 1), (3, 1), (5, 1)])
def test_images_and_pictures_must_match(images, pictures):
    model, reference = load("llava")
    ids = torch.tensor([[1, 5] + [model.config.image_id] * images + [6]])
    with pytest.raises(ValueError, match=f"{images} <image> tokens for {pictures} picture"):
        model.generate(ids, reference["pixel_values"][:pictures])


def test_too_long_a_prompt():
    model, reference = load("llava")
    limit, P = model.config.text.max_position_embeddings, model.config.features_per_image
    ids = torch.ones(1, limit + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens do not fit .* {limit}"):
        model.generate(ids)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens do not fit .* {limit}"):
        model(ids)
    with pytest.raises(ValueError, match=f"{limit} tokens leaves no room"):
        model.generate(ids[:, 1:])
    ids[0, 3] = model.config.image_id  # counted after its expansion
    with pytest.raises(ValueError, match=f"{limit + P} tokens do not fit .* {limit}"):
        model.generate(ids, reference["pixel_values"][:1])
    cache = KVCache(model.config.text, 1, 20)
    model(ids[:, 4:16], cache=cache)
    with pytest.raises(ValueError, match="9 tokens after 12 in the cache do not fit .* 20"):
        model.generate(ids[:, 4:13], cache=cache)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (dict(input_ids=torch.ones(1, 3).long(), labels=torch.tensor([[1, -100, 96]])), "labels run from 1 to 96; the vocabulary has 96"),
        (dict(input_ids=torch.ones(1, 3).long(), labels=torch.tensor([[1, -1, 5]])), "labels run from -1 to 5"),
        (dict(inputs_embeds=torch.zeros(1, 3, 7)), r"inputs_embeds are \(1, 3, 7\); expected \(B, T, "),
        (dict(inputs_embeds=torch.zeros(3, 7)), r"inputs_embeds are \(3, 7\)"),
        (dict(input_ids=torch.ones(1, 3).long(), positions=torch.ones(1, 2).long()), r"positions is \(1, 2\); expected \(1, 3\)"),
        (dict(), "one of the two"),
    ],
)
def test_bad_inputs_of_a_forward_pass(inputs, message):
    with pytest.raises(ValueError, match=message):
        load("llava")[0](**inputs)


def test_labels_of_any_integer_type():
    model, reference = load("llava")
    ids = reference["text_ids"]
    assert torch.equal(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)


# The cache


@pytest.mark.parametrize("batch, dtype", [(3, torch.float32), (1, torch.bfloat16)])
def test_cache_of_another_batch_or_type(batch, dtype):
    model, reference = load("llava")
    cache = KVCache(model.config.text, batch, 20, dtype=dtype)
    for use in (model, model.generate):
        with pytest.raises(
            ValueError, match=f"cache is for {batch} rows in {dtype}; the batch has 1 rows and the model is in torch.float32"
        ):
            use(reference["text_ids"], cache=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_through_a_given_cache(family):
    model, reference = load(family)
    mask, tokens = reference["attention_mask"], reference["tokens"]
    (B, T), steps = mask.shape, 4
    cache = KVCache(model.config.text, B, T + 30)
    answer = generated(model, prompt(reference), max_new_tokens=steps, cache=cache)
    assert int(cache.length) == T + steps - 1  # the last token is not in the cache yet
    question = torch.tensor([[7, 8, 9], [20, 21, 22], [11, 3, 5]])
    # Row 1 asks less: the padding is in the middle of its slots, after its first answer.
    new, new_mask = torch.cat([answer[:, -1:], question], 1), torch.ones(B, 4, dtype=torch.long)
    new[1], new_mask[1] = torch.tensor([0, 0, *answer[1, -1:], 20]), torch.tensor([0, 0, 1, 1])
    second = generated(model, dict(input_ids=new, attention_mask=new_mask), max_new_tokens=8, cache=cache)

    whole = torch.cat([reference["input_ids"], tokens[:, : steps - 1], new], 1)
    whole_mask = torch.cat([mask, torch.ones(B, steps - 1, dtype=torch.long), new_mask], 1)
    inputs = dict(input_ids=whole, pixel_values=reference["pixel_values"], attention_mask=whole_mask)
    assert torch.equal(second, generated(model, inputs, max_new_tokens=8))
    real = whole_mask[1].bool()
    alone = dict(input_ids=whole[1:2, real], pixel_values=reference["pixel_values"][:1])
    if model.config.text.sliding_window is None:  # padding in the middle counts as distance for a window
        assert torch.equal(second[1:2], generated(model, alone, max_new_tokens=8))


def test_cache_neither_invents_nor_drops():
    model, reference = load("llava")
    cache = KVCache(model.config.text, 1, 20)
    model(reference["text_ids"], cache=cache)
    with pytest.raises(ValueError, match="cannot keep 4 slots of a cache that holds 3"):
        cache.truncate(4)
    with pytest.raises(ValueError, match="cannot grow a cache of 20 slots to 19"):
        cache.grow(19)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_alone_leaves_the_same_cache(family):
    model, reference = load(family)
    llama, mask = model.language_model, reference["attention_mask"].bool()
    x, T = llama.embed(reference["input_ids"]), mask.shape[1]
    for padding in (mask, None):
        caches = [KVCache(model.config.text, len(x), T) for _ in range(2)]
        whole, last = llama(x, padding, cache=caches[0]), llama(x, padding, cache=caches[1], last=True)
        assert last.shape[1] == 1 and relative(last, whole[:, -1:]) <= TOLERANCE
        for a, b in zip(*([t for layer in cache.layers for t in (layer.keys, layer.values)] for cache in caches)):
            assert torch.equal(a, b)


def test_truncate_then_go_on():
    model, reference = load("bakllava")
    ids, other = reference["text_ids"], torch.tensor([[7, 8, 9, 10]])
    cache = KVCache(model.config.text, 1, 20)
    expected = model(torch.cat([ids, other], 1)).logits[:, ids.shape[1] :]
    model(torch.cat([ids, other.flip(1)], 1), cache=cache)
    cache.truncate(ids.shape[1])
    assert int(cache.length) == ids.shape[1] and int(cache.real.sum()) == ids.shape[1]
    assert relative(model(other, cache=cache).logits, expected) <= TOLERANCE


def test_grow_then_go_on():
    model, reference = load("bakllava")
    ids = reference["text_ids"]
    cache = KVCache(model.config.text, 1, ids.shape[1])
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="1 tokens after 3 in the cache do not fit the cache's max_length of 3"):
        model(ids[:, :1], cache=cache)
    cache.grow(ids.shape[1] + 10)
    assert cache.max_length == ids.shape[1] + 10 and int(cache.length) == ids.shape[1]
    first = reference["text_tokens"][:, :1]
    tokens = generated(model, dict(input_ids=first), max_new_tokens=9, cache=cache)
    assert torch.equal(tokens, reference["text_tokens"][:, 1:10])


def test_cache_says_which_slots_and_positions():
    model, _ = load("llava")
    cache = KVCache(model.config.text, 2, 6)
    slots, positions = cache.take(torch.tensor([[False, True, True], [True, True, True]]))
    assert slots.tolist() == [0, 1, 2] and positions.tolist() == [[0, 0, 1], [0, 1, 2]]
    slots, positions = cache.take(torch.tensor([[True], [False]]))
    assert slots.tolist() == [3] and positions.tolist()[0] == [2]
    assert cache.real.int().tolist() == [[0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]


# The repetition penalty


def penalised(logits, ids, penalty):
    """What transformers' RepetitionPenaltyLogitsProcessor computes, a row and an id at a time. logits: (B, vocabulary)."""
    out = logits.float().numpy().copy()
    for row, said in zip(out, ids):
        for i in sorted({int(i) for i in said}):
            row[i] = row[i] * np.float32(penalty) if row[i] < 0 else row[i] / np.float32(penalty)
    return out


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_penalty_to_the_last_bit(penalty, dtype):
    random = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 50, generator=random) * 4).to(dtype)
    logits[0, 7], logits[1, 8] = 0.0, -torch.inf
    ids = torch.randint(0, 50, (3, 30), generator=random)  # with many repetitions
    repetition = Repetition(ids, 50, penalty)
    assert np.array_equal(repetition.penalise(logits).numpy(), penalised(logits, ids, penalty))
    token = torch.tensor([7, 8, 9])
    repetition.add(token)
    ids = torch.cat([ids, token[:, None]], dim=1)
    assert np.array_equal(repetition.penalise(logits).numpy(), penalised(logits, ids, penalty))


def test_prompt_padding_pictures_and_answer_count(bundled):
    """A padded batch with a picture, step by step: each token is the likeliest after the penalty over all ids of its row."""
    chat, model, penalty = bundled, bundled.model, 2.5
    prompts = [chat.tokenizer.encode(f"USER: <image>\n{question} ASSISTANT:") for question in ("Describe the picture.", "Hi.")]
    rows = [expand_images(prompt, model.config.image_id, model.config.features_per_image) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[model.config.pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    pixels = chat.processor([open_image("tiny/example.png")] * 2)
    steps = list(model.generate(ids, pixels, mask, max_new_tokens=8, eos_ids=(), repetition_penalty=penalty))
    assert not torch.equal(torch.stack(steps), torch.stack(list(model.generate(ids, pixels, mask, max_new_tokens=8, eos_ids=()))))
    for token in steps:
        with torch.no_grad():
            logits = model(ids, pixels, mask).logits[:, -1]
        assert token.tolist() == penalised(logits, ids, penalty).argmax(-1).tolist()
        ids, mask = torch.cat([ids, token[:, None]], dim=1), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)


@pytest.mark.parametrize("penalty", [0, -1.0, float("nan"), float("inf")])
def test_penalties_that_make_no_sense(bundled, penalty):
    with pytest.raises(ValueError, match="repetition_penalty is .*; expected more than 0"):
        bundled.model.generate(torch.tensor([[1, 5]]), repetition_penalty=penalty)
