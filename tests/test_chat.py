"""A conversation: the cache kept between turns changes what is computed, never what is said."""

from random import Random

import pytest
import torch
from PIL import Image

import batch
from chat import Chat
from images import open_image
from questions import Unanswered, answer_ids, prompt_of
from tiny.world import held_out_questions
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


# Limits


def test_an_answer_that_a_limit_cuts_off_says_which(chat, monkeypatch):
    picture = [open_image(PICTURE)]
    "".join(chat.ask("Describe the picture.", picture, max_new_tokens=3))
    assert chat.cut_off == "max_new_tokens"
    "".join(chat.ask("How many things are there?"))
    assert chat.cut_off is None
    monkeypatch.setattr(chat.model.config, "eos_ids", ())
    "".join(chat.ask("Describe the picture."))
    assert chat.cut_off == "context"
    with pytest.raises(ValueError, match="the context is full.*/reset"):
        for _ in range(50):  # the answers are gibberish, which may take fewer tokens when it is read again
            before = list(chat.messages)
            "".join(chat.ask("Describe the picture."))
    assert chat.messages == before
    chat.reset()
    assert chat.cut_off is None


def test_vips_answer_that_ends_at_its_mark_is_not_cut_off(vip):
    "".join(vip.ask("What is in the picture?", [open_image(PICTURE)]))
    assert vip.cut_off is None and "#" not in vip.messages[-1]["content"]


# Many questions at once


@pytest.fixture(scope="module")
def vip():
    return Chat.from_pretrained("tiny/vip-llava", dtype=torch.float32)


def mixed(count=12):
    """Questions of several lengths about none, one or two pictures, with answers from one word to a description."""
    _, images, questions, _ = zip(*held_out_questions(count, 3))
    asked = [(question, [image]) for question, image in zip(questions, images)]
    asked += [("Describe the picture.", [images[0]]), ("How many things are there?", []), ("Is there a star?", list(images[1:3]))]
    asked += [("Where is the ring?", (images[0],)), ("Describe the picture.", list(images[3:5])), ("Hi.", [])]
    Random(0).shuffle(asked)
    return asked


def one_by_one(chat, asked, **options):
    answers = []
    for question, images in asked:
        alone = Chat(chat.model, chat.tokenizer, chat.processor)
        alone.system, alone.pad, alone.style = chat.system, chat.pad, chat.style
        answers.append("".join(alone.ask(question, images, **options)))
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
def test_many_questions_are_answered_as_one_by_one(chat, batch_size):
    asked = mixed()
    assert list(chat.answer(asked, batch_size=batch_size, max_new_tokens=60)) == one_by_one(chat, asked, max_new_tokens=60)
    assert chat.messages == [] and chat._cache is None


def test_many_questions_to_vip_end_at_its_mark(vip):
    asked = mixed(6)
    answers = list(vip.answer(asked, batch_size=4, max_new_tokens=60))
    assert answers == one_by_one(vip, asked, max_new_tokens=60) and not any("#" in answer for answer in answers)


@pytest.mark.parametrize("change", [dict(system="Be brief."), dict(pad=True), dict(style="bakllava")])
def test_many_questions_respect_the_settings(chat, change):
    for name, value in change.items():
        setattr(chat, name, value)
    asked = [("Describe the picture.", [Image.new("RGB", (60, 200), colour)]) for colour in ("red", "lime", "blue")]
    assert list(chat.answer(asked, batch_size=2, max_new_tokens=20)) == one_by_one(chat, asked, max_new_tokens=20)


def test_rows_are_moved_and_the_cache_grows(chat, monkeypatch):
    """Short answers leave while a long one goes on, and a later prompt is longer than all slots taken by then."""
    monkeypatch.setattr(batch, "SLACK", 2)
    pictures = [open_image(PICTURE)]
    asked = [("Hi.", []), *[("Describe the picture.", pictures), ("Is there a star?", pictures)] * 4, ("Why?", pictures * 5), *mixed(3)]
    assert list(chat.answer(asked, batch_size=3, max_new_tokens=60)) == one_by_one(chat, asked, max_new_tokens=60)


def test_an_answer_ends_with_the_context_as_it_would_alone(chat, monkeypatch):
    """The room of a row is its own: a longer prompt beside it takes nothing of it."""
    monkeypatch.setattr(chat.model.config, "eos_ids", ())
    most = chat.model.config.text.max_position_embeddings
    pictures = [open_image(PICTURE)]
    asked = [("Describe the picture.", pictures), ("why " * 95, pictures), ("Describe the picture.", pictures * 6)]
    expected = one_by_one(chat, asked, max_new_tokens=most)
    assert list(chat.answer(asked, batch_size=3, max_new_tokens=most)) == expected


def test_the_second_question_about_a_picture_computes_only_the_question(chat, seen):
    picture = open_image(PICTURE)
    asked = [
        ("Where is the star?", [picture]),
        ("Where is the ring?", [picture.copy()]),
        ("Where is the ring?", [Image.new("RGB", (9, 9))]),
    ]
    answers = list(chat.answer(asked, batch_size=1))
    prompts = [count for count in seen["tokens"] if count > 1]
    assert seen["pictures"] == [1, 1] and prompts[0] == prompts[2] > 64 > 20 > prompts[1]
    assert answers == one_by_one(chat, asked)


def test_a_question_that_cannot_be_asked_stops_no_other(chat):
    picture = open_image(PICTURE)
    wrong = {
        "'<image>'": ("What is <image>?", []), "max_position_embeddings of 512": ("why " * 600, []), "PIL pictures": ("Hi.", "photo.jpg"),
        "expected a pair": "Hi.", "empty": ("Hi.", [Image.new("RGB", (0, 5))]), "half a surrogate": ("\udcff?", []), "pair": ("Hi.", [], 1),
        "pair (text": (3, []),
    }  # fmt: skip
    good = ("Describe the picture.", [picture])
    asked = [entry for one in wrong.values() for entry in (one, good)] + [("</s>", [])]
    answers = list(chat.answer(asked, batch_size=3))
    expected = one_by_one(chat, [good])[0]
    assert answers[1::2] == [expected] * len(wrong)
    for words, answer in zip(wrong, answers[::2]):
        assert isinstance(answer, Unanswered) and answer == "" and words in str(answer.error)
    assert isinstance(answers[-1], Unanswered) and not isinstance(answers[1], Unanswered)


def test_answers_come_as_soon_as_they_are_due(chat):
    taken = []

    def questions():
        for n in range(100):
            taken.append(n)
            yield "Is there a star?", []

    answers = chat.answer(questions(), batch_size=2)
    next(answers), next(answers)
    assert len(taken) < 8


def test_no_questions(chat):
    assert list(chat.answer([])) == []


@pytest.mark.parametrize("options", [dict(batch_size=0), dict(max_new_tokens=0), dict(temperature=-1.0), dict(repetition_penalty=0)])
def test_bad_options_are_refused_before_the_first_answer(chat, options):
    with pytest.raises(ValueError, match="expected"):
        chat.answer([("Hi.", [])], **options)


def test_drawn_answers_repeat_with_a_seed(chat):
    options = dict(batch_size=4, max_new_tokens=20, temperature=3.0, top_k=20)
    asked = mixed(4)
    first, again, other = (list(chat.answer(asked, seed=seed, **options)) for seed in (1, 1, 2))
    assert first == again != other


def test_literal_text_goes_to_the_model_as_it_is(chat, vip):
    words = "What does ###Human: USER: mean?"
    assert isinstance(*vip.answer([(words, [])]), Unanswered)
    (answer,) = vip.answer([(words, [])], literal=True, max_new_tokens=5)
    assert not isinstance(answer, Unanswered)
    ids = prompt_of(vip, (words, []), literal=True).ids
    assert vip.tokenizer.decode(ids).endswith(f"###Human: {words}###Assistant:")
    assert prompt_of(chat, ("Hi.", []), literal=True) == prompt_of(chat, ("Hi.", []))
    (answer,) = chat.answer([("<image>", [])], literal=True)
    assert isinstance(answer, Unanswered) and "'<image>'" in str(answer.error)


def test_logits_that_are_not_finite_are_an_error(chat, monkeypatch):
    step, count = chat.model.decode_step, []

    def broken(*args, **options):
        count.append(1)
        return step(*args, **options) * (float("nan") if len(count) > 3 else 1)

    monkeypatch.setattr(chat.model, "decode_step", broken)
    with pytest.raises(ValueError, match="not finite"):
        list(chat.answer([("Describe the picture.", [open_image(PICTURE)])]))


# Scores


def by_hand(chat, question, answer, images):
    """The sum of log-probabilities of an answer's tokens, one forward pass for each of them."""
    prompt = chat.tokenizer.encode(Chat(chat.model, chat.tokenizer, chat.processor).prompt(question, images))
    ids = chat.tokenizer.encode(chat.prompt(question, images) + " " + answer + ("###" if chat.style == "vip" else "</s>"))
    assert ids[: len(prompt)] == prompt
    pixels, total = chat.processor(images) if images else None, 0.0
    for n in range(len(prompt), len(ids)):
        with torch.no_grad():
            logits = chat.model(torch.tensor([ids[:n]]), pixels).logits[0, -1]
        total += float(logits.log_softmax(-1)[ids[n]])
    return total


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_score_is_the_sum_over_the_answer_and_its_end(chat, images):
    pictures = [open_image(PICTURE)] * images
    for answer in ("Four.", "In the middle, I think.", "No."):
        assert chat.score("How many things are there?", answer, pictures) == pytest.approx(
            by_hand(chat, "How many things are there?", answer, pictures), rel=1e-4
        )


def test_vips_score_counts_its_end_mark(vip):
    picture = [open_image(PICTURE)]
    vip.reset()
    assert vip.score("How many things are there?", "Four.", picture) == pytest.approx(
        by_hand(vip, "How many things are there?", "Four.", picture), rel=1e-4
    )


def test_a_batch_of_scores_is_each_of_them(chat):
    asked = [(question, answer, images) for (question, images), answer in zip(mixed(), ["No.", "A large red circle.", "Four."] * 4)]
    scores = chat.token_scores(asked, batch_size=5)
    for one, tokens in zip(asked, scores):
        assert float(tokens.sum()) == pytest.approx(chat.score(*one), rel=1e-4)
        assert len(tokens) == len(answer_ids(chat, *one)) and bool((tokens <= 0).all())


def test_the_greedy_answer_is_the_likeliest_of_several(chat):
    picture = [open_image(PICTURE)]
    answer = "".join(chat.ask("How many things are there?", picture))
    assert chat.choose("How many things are there?", ["One.", "No.", answer, "Ten."], picture) == answer


def test_what_cannot_be_scored(chat):
    with pytest.raises(ValueError, match="'</s>'"):
        chat.score("How many?", "Four.</s>")
    with pytest.raises(ValueError, match="'<image>'"):
        chat.score("How <image>?", "Four.")


# Taking back


def test_the_last_turn_is_taken_back_and_its_picture_with_it(chat, seen):
    """Asked again with another picture, the cache must not take the old one's features for the new one's: all <image> ids are alike."""
    first, second, third = (image for image, *_ in [asked[1:] for asked in held_out_questions(3, "taken back")])
    expected = Chat(chat.model, chat.tokenizer, chat.processor)
    for one in (chat, expected):
        list(one.ask("How many things are there?", [first]))
    list(chat.ask("Describe the picture.", [second]))
    chat.undo()
    assert chat.images == [first] and chat.messages == expected.messages
    clear(seen)
    again = "".join(chat.ask("Describe the picture.", [third]))
    assert seen["pictures"] == [1] and chat.kept > chat.model.config.features_per_image  # the first is still in the cache
    logits = seen["logits"][0]
    clear(seen)
    assert again == "".join(expected.ask("Describe the picture.", [third]))
    assert_close(logits, seen["logits"][0])


def test_a_half_read_answer_is_taken_back(chat):
    answer = chat.ask("Describe the picture.", [open_image(PICTURE)])
    next(answer)
    chat.undo()
    assert (chat.messages, chat.images) == ([], [])
    with pytest.raises(ValueError, match="nothing to take back"):
        chat.undo()


def test_a_conversation_survives_the_loss_of_its_cache(chat, seen):
    list(chat.ask("Describe the picture.", [open_image(PICTURE)]))
    other = Chat(chat.model, chat.tokenizer, chat.processor)
    other.messages, other.images = list(chat.messages), list(chat.images)
    chat.forget_cache()
    assert chat._cache is None
    answer = "".join(chat.ask("How many things are there?"))
    assert chat.kept == 0 and answer == "".join(other.ask("How many things are there?"))


def test_what_is_known_of_the_last_answer(chat):
    answer = "".join(chat.ask("Where is the square?", [open_image(PICTURE)]))
    assert chat.kept == 0 and chat.tokens == len(chat.answer_ids) and chat.answer_ids[-1] in chat.model.config.eos_ids
    assert chat.tokenizer.decode(chat.answer_ids[:-1]).strip() == answer
    prompt = chat.encode(chat.prompt("Where is the square?"))
    list(chat.ask("Where is the square?"))
    assert chat.model.config.features_per_image < chat.kept < len(prompt)


# The repetition penalty


def test_a_second_turn_penalises_what_the_cache_holds(chat):
    """With the cache, or without one, the ids that count are the same."""
    picture = [open_image(PICTURE)]
    options = dict(max_new_tokens=12, repetition_penalty=100.0)
    first = "".join(chat.ask("Describe the picture.", picture, **options))
    plain = "".join(Chat(chat.model, chat.tokenizer, chat.processor).ask("Describe the picture.", picture, max_new_tokens=12))
    assert first != plain
    prompt = chat.encode(chat.prompt("Is there a star?"))
    whole = [int(t) for t in chat.model.generate(torch.tensor([prompt]), chat.processor(picture), **options)]
    second = "".join(chat.ask("Is there a star?", **options))
    assert second == "".join(chat.tokenizer.stream(whole))


def test_the_penalty_is_each_rows_own(chat):
    asked, options = mixed(6), dict(max_new_tokens=20, repetition_penalty=100.0)
    assert list(chat.answer(asked, batch_size=4, **options)) == one_by_one(chat, asked, **options)
