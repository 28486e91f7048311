"""A conversation: the cache kept between turns changes what is computed, never what is said."""

import pytest
from PIL import Image

from chat import Chat
from images import open_image
from tokenizer import expand_images

PICTURE = "tiny/example.png"


@pytest.fixture
def seen(chat):
    """What passes through the model: pictures encoded, tokens computed in each pass, logits of each step."""
    log = {"pictures": [], "tokens": [], "logits": []}
    model = chat.model
    hooks = [
        model.vision_tower.register_forward_hook(lambda _, args, __: log["pictures"].append(len(args[0]))),
        model.language_model.register_forward_hook(lambda _, args, __: log["tokens"].append(args[0].shape[1])),
        model.language_model.lm_head.register_forward_hook(lambda _, __, out: log["logits"].append(out)),
    ]
    yield log
    for hook in hooks:
        hook.remove()


def clear(log):
    for entries in log.values():
        entries.clear()


def cold_start(chat, question, images=()):
    """The first logits of the next answer when nothing is cached, and how many tokens that took."""
    log = []
    hook = chat.model.language_model.lm_head.register_forward_hook(lambda _, __, out: log.append(out))
    fresh = Chat(chat.model, chat.tokenizer, chat.processor)
    fresh.messages, fresh.images = list(chat.messages), list(chat.images)
    next(fresh.ask(question, images), None)
    hook.remove()
    return log[0]


def assert_close(a, b):
    assert (a - b).abs().max() / b.abs().max() < 1e-5


def test_the_second_turn_computes_only_what_is_new_and_equals_a_cold_start(chat, seen):
    first = "".join(chat.ask("Describe the picture.", [open_image(PICTURE)]))
    assert first.endswith(".") and seen["pictures"] == [1]
    config = chat.model.config
    prompt = expand_images(chat.tokenizer.encode(chat.prompt("How many things are there?")), config.image_id, config.features_per_image)
    held = int(chat._cache.length)
    expected = cold_start(chat, "How many things are there?")
    clear(seen)
    "".join(chat.ask("How many things are there?"))
    assert seen["pictures"] == []
    assert seen["tokens"][0] == len(prompt) - held < 20  # the end mark and the question
    assert_close(seen["logits"][0], expected)


def test_a_picture_in_a_later_turn_is_the_only_one_encoded(chat, seen):
    "".join(chat.ask("Describe the picture.", [open_image(PICTURE)]))
    other = Image.new("RGB", (112, 112), "white")
    expected = cold_start(chat, "Describe the picture.", [other])
    clear(seen)
    "".join(chat.ask("Describe the picture.", [other]))
    assert seen["pictures"] == [1]
    assert_close(seen["logits"][0], expected)


def test_an_answer_cut_short_stays_in_the_conversation_as_far_as_it_was_read(chat, seen):
    answer = chat.ask("Describe the picture.", [open_image(PICTURE)])
    read = next(answer) + next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": read}
    expected = cold_start(chat, "How many things are there?")
    clear(seen)
    "".join(chat.ask("How many things are there?"))
    assert_close(seen["logits"][0], expected)


def test_an_answer_left_hanging_ends_when_the_next_question_comes(chat):
    hanging = chat.ask("Describe the picture.", [open_image(PICTURE)])
    read = next(hanging)
    "".join(chat.ask("How many things are there?"))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == read and next(hanging, None) is None


def test_reset_in_the_middle_of_an_answer_leaves_nothing_of_it(chat):
    hanging = chat.ask("Describe the picture.", [open_image(PICTURE)])
    next(hanging)
    chat.reset()
    assert (chat.messages, chat.images) == ([], []) and next(hanging, None) is None
    assert chat.prompt("Hi.") == "USER: Hi. ASSISTANT:"


def test_no_special_token_can_be_put_together_from_an_answer(chat, monkeypatch):
    monkeypatch.setattr(chat.tokenizer, "stream", lambda ids: (text for _ in ids for text in ["<im<pa", "d>age> and <un", "k>."]))
    "".join(chat.ask("Describe the picture.", [open_image(PICTURE)], max_new_tokens=1))
    assert chat.messages[-1]["content"] == " and ."
    "".join(chat.ask("How many things are there?", max_new_tokens=1))


@pytest.mark.parametrize("options", [dict(max_new_tokens=-100), dict(temperature=-1.0), dict(seed=-1)])
def test_bad_options_change_nothing(chat, options):
    with pytest.raises(ValueError, match="expected"):
        chat.ask("Describe the picture.", [open_image(PICTURE)], **options)
    assert chat.messages == []


def test_the_cache_grows_with_the_conversation(chat, seen):
    "".join(chat.ask("Describe the picture.", [open_image(PICTURE)], max_new_tokens=2))
    before = chat._cache.max_length
    expected = cold_start(chat, "Describe the picture.")
    clear(seen)
    "".join(chat.ask("Describe the picture.", max_new_tokens=200))
    assert chat._cache.max_length > before
    assert_close(seen["logits"][0], expected)


def test_the_cache_outlives_a_conversation_but_what_was_said_does_not(chat, seen):
    "".join(chat.ask("How many things are there?", [open_image(PICTURE)]))
    cache = chat._cache
    chat.reset()
    expected = cold_start(chat, "Describe the picture.", [open_image(PICTURE)])
    clear(seen)
    "".join(chat.ask("Describe the picture.", [open_image(PICTURE)]))
    assert chat._cache is cache and seen["pictures"] == [1]
    assert_close(seen["logits"][0], expected)


@pytest.mark.parametrize(
    "question, words", [("What is </s>?", "'</s>'"), ("why " * 600, "max_position_embeddings of 512"), ("USER: me", "'USER:'")]
)
def test_a_question_that_cannot_be_asked_changes_nothing(chat, question, words):
    "".join(chat.ask("Describe the picture.", [open_image(PICTURE)]))
    before = list(chat.messages)
    with pytest.raises(ValueError, match=words):
        chat.ask(question)
    assert chat.messages == before
    answer = "".join(chat.ask("How many things are there?"))
    chat.reset()
    "".join(chat.ask("Describe the picture.", [open_image(PICTURE)]))
    assert "".join(chat.ask("How many things are there?")) == answer


def test_pieces_join_to_the_answer(chat):
    pieces = list(chat.ask("Describe the picture.", [open_image(PICTURE)]))
    assert len(pieces) > 5 and "".join(pieces) == chat.messages[-1]["content"]


def test_a_system_sentence_is_read(chat):
    chat.system = "Be brief."
    assert chat.prompt("Hi").startswith("Be brief. USER: Hi")
    chat.system = None


@pytest.mark.parametrize("images", [Image.new("RGB", (9, 9)), "photo.jpg", ["photo.jpg"], [None]])
def test_what_is_not_a_list_of_pictures(chat, images):
    with pytest.raises(ValueError, match="expected a list of PIL pictures"):
        chat.ask("Describe the picture.", images)
    assert chat.messages == []
