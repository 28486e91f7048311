"""The tokenizer against golden ids of transformers' own, its streaming, the stop string, and the chat formats."""

import itertools
import json
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.make_tokenizer import random_ids, random_text
from tokenizer import SPECIAL_LITERALS, Tokenizer, chat_prompt, expand_images, stop_at

FOLDER = Path(__file__).parent / "fixtures" / "tokenizer"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
TOKENIZER = Tokenizer.from_pretrained(FOLDER)
MODEL = TOKENIZER.model
IMAGE, PAD, SPACE = 512, 513, MODEL.piece_to_id("▁")

TEXTS = ["", " ", "   two   spaces  ", "\n", "a\nb\r\n\tc\n\n", "12345 1.5", "e\u0301 é", "👩‍👩‍👧 🇳🇵 👍🏽", "这是一只猫。\u3000"]
TEXTS += ["Где кошка?", "\u00a0\u200b\ufeff", "\x00\x7f", "\U0010ffff", "<image", "< image>", "<IMAGE>", "<0x0A>"]


def byte_ids(data):
    return [MODEL.piece_to_id(f"<0x{byte:02X}>") for byte in data]


def random_texts(count):
    """Texts of words and any Unicode characters, without special literals and without "▁", which stands for a space."""
    source, texts = random.Random(1), []
    for _ in range(count):
        codes = [source.randint(1, source.choice((126, 0x10FFFF))) for _ in range(source.randint(1, 9))]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        texts.append(text.replace("▁", "") + source.choice((" picture", "猫", "\n", " ", "")))
    return texts


# Ids and text


def test_encode_equals_transformers():
    wrong = [(text, ids, TOKENIZER.encode(text)) for text, ids in GOLDEN["encode"] if TOKENIZER.encode(text) != ids]
    assert len(GOLDEN["encode"]) == 250 and not wrong


def test_decode_equals_transformers():
    # It drops ids that no token has; ours shows them.
    known = [([i for i in ids if i <= PAD], text) for ids, text in GOLDEN["decode"]]
    assert len(known) == 250 and [(ids, text) for ids, text in known if TOKENIZER.decode(ids) != text] == []


def test_ids_that_no_token_has_are_shown():
    the = MODEL.piece_to_id("▁the")
    assert TOKENIZER.decode([the, 600, *byte_ids("é".encode()), PAD + 1]) == "the<|id 600|>é<|id 514|>"


def test_ids_of_the_specials():
    ids = (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.image_id, TOKENIZER.pad_id)
    assert ids == (1, 2, IMAGE, PAD)
    assert TOKENIZER.specials == {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE, "<pad>": PAD}


@pytest.mark.parametrize("literal", SPECIAL_LITERALS)
def test_a_special_is_one_id_wherever_it_stands(literal):
    ids = TOKENIZER.encode(f"the{literal}cat{literal}{literal}")
    special, the, cat = TOKENIZER.specials[literal], MODEL.encode("the"), MODEL.encode("cat")
    assert ids == [1, *the, special, *cat, special, special]
    assert TOKENIZER.decode(ids[1:]) == "the cat"  # without the specials, and with the space that each stretch is given


@pytest.mark.parametrize("text", TEXTS)
def test_bos_stands_first_and_only_there(text):
    ids = TOKENIZER.encode(text)
    assert ids[0] == 1 and ids.count(1) == 1


def test_double_bos_comes_only_from_a_text_that_has_one():
    assert TOKENIZER.encode("<s>cat") == [1, 1, *MODEL.encode("cat")]
    for style in ("llava", "bakllava", "vip"):
        prompt = chat_prompt([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}], style)
        assert TOKENIZER.encode(prompt).count(1) == 1 and "<s>" not in prompt


def test_every_stretch_of_text_has_its_leading_space():
    ids = TOKENIZER.encode("<image>\nWhat")
    without = [1, IMAGE, *byte_ids(b"\n"), *MODEL.encode("\nWhat")[2:]]  # only the first stretch given a space
    assert ids == [1, IMAGE, SPACE, *without[2:]] and ids != without
    assert TOKENIZER.encode("<image>What")[2:] == MODEL.encode("What") == [MODEL.piece_to_id("▁What")]
    assert TOKENIZER.encode("<image> What")[2:] != TOKENIZER.encode("<image>What")[2:]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_round_trip_of_random_texts():
    assert [text for text in random_texts(500) if TOKENIZER.decode(TOKENIZER.encode(text)) != text] == []


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match="surrogate"):  # what an argument that is not UTF-8 becomes on a command line
        TOKENIZER.encode("a\udcffb")


def test_expand_images():
    assert expand_images([1, IMAGE, 5, IMAGE, IMAGE], IMAGE, 3) == [1, *[IMAGE] * 3, 5, *[IMAGE] * 6]
    assert expand_images([1, 5], IMAGE, 3) == [1, 5]
    assert expand_images(TOKENIZER.encode("USER: <image>\nHi"), IMAGE, 576).count(IMAGE) == 576


# Streaming


def test_stream_joins_to_decode():
    source = random.Random(2)
    lists = [[source.randrange(PAD + 5) for _ in range(source.randint(0, 20))] for _ in range(300)]
    for ids in lists + [ids for ids, _ in GOLDEN["decode"]]:
        pieces = list(TOKENIZER.stream(ids))
        assert "".join(pieces) == TOKENIZER.decode(ids) and "" not in pieces


def test_stream_never_cuts_a_character():
    spelt = 0
    for text in TEXTS + random_texts(300):
        ids = TOKENIZER.encode(text)
        spelt += sum(MODEL.is_byte(i) for i in ids if i < len(MODEL))
        pieces = list(TOKENIZER.stream(ids))
        assert "".join(pieces) == text
        assert not any("�" in piece for piece in pieces if "�" not in text)
    assert spelt > 1000  # the test means something only where characters are spelt in bytes


def test_stream_is_as_early_as_it_can_be():
    the, is_ = MODEL.piece_to_id("▁the"), MODEL.piece_to_id("▁is")
    ids, read = [the, the, *byte_ids("👍".encode()), is_, the], []
    events = [(piece, len(read)) for piece in TOKENIZER.stream(read.append(i) or i for i in ids)]
    # Whether a run of bytes is text is known only at its end: one wrong byte in it makes all of them "�".
    assert events == [("the", 1), (" the", 2), ("👍 is", 7), (" the", 8)]


def test_stream_of_bytes_that_are_not_text():
    ids = MODEL.encode("the") + byte_ids(b"\xf0\x9f\x91") + MODEL.encode("cat")
    assert TOKENIZER.decode(ids) == "the��� cat"
    assert TOKENIZER.decode(byte_ids(b"\xc3")) == "�"


# The stop string


def every_split(text):
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        parts = [text[0]]
        for cut, character in zip(cuts, text[1:]):
            parts[-1:] = [parts[-1], character] if cut else [parts[-1] + character]
        yield parts


@pytest.mark.parametrize(
    "text, stop, kept",
    [
        ("ab###cd", "###", "ab"),
        ("##a###rest", "###", "##a"),  # a false start
        ("#a##b####c", "###", "#a##b"),
        ("###", "###", ""),
        ("ab##", "###", "ab##"),  # the text ends while its beginning is held back
        ("abc", "###", "abc"),
        ("a<</s></s>", "</s>", "a<"),
        ("aabaabaac", "aabaac", "aab"),  # the stop begins inside a failed beginning
    ],
)
def test_stop_string_split_in_every_way(text, stop, kept):
    for parts in every_split(text):
        pieces = list(stop_at(parts, stop))
        assert "".join(pieces) == kept and "" not in pieces, parts


def test_stop_holds_back_no_more_than_it_must_and_reads_no_further():
    source = iter(["ab#", "#c", "##", "#", "never read"])
    assert list(stop_at(source, "###")) == ["ab", "##c"]
    assert next(source) == "never read"


# The chat formats


def user(text, images=0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}


ONE = [user("Hi", 1)]
SEVERAL = [user("Hi", 1), assistant("Yes."), user("Why?"), assistant("So."), user("And?", 1)]
OWN = [{"role": "system", "content": "Be brief."}]
VIP = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.###Human: "
)
V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
PROMPTS = [
    ("llava", ONE, "USER: <image>\nHi ASSISTANT:"),
    ("llava", [user("Hi", 3)], "USER: <image>\n<image>\n<image>\nHi ASSISTANT:"),
    ("llava", [user("Hi")], "USER: Hi ASSISTANT:"),
    ("llava", SEVERAL[:4], "USER: <image>\nHi ASSISTANT: Yes.</s>USER: Why? ASSISTANT: So.</s>"),
    ("llava", SEVERAL[2:], "USER: Why? ASSISTANT: So.</s>USER: <image>\nAnd? ASSISTANT:"),
    ("llava", OWN + ONE, "Be brief. USER: <image>\nHi ASSISTANT:"),
    ("bakllava", ONE, "USER: <image>\nHi\nASSISTANT:"),
    ("bakllava", [user("Hi", 2)], "USER: <image>\n<image>\nHi\nASSISTANT:"),
    ("bakllava", SEVERAL[:4], "USER: <image>\nHi\nASSISTANT: Yes.</s>USER: Why?\nASSISTANT: So.</s>"),
    ("bakllava", SEVERAL[2:], "USER: Why?\nASSISTANT: So.</s>USER: <image>\nAnd?\nASSISTANT:"),
    ("bakllava", OWN + ONE, "Be brief. USER: <image>\nHi\nASSISTANT:"),
    ("v1", ONE, V1 + "USER: <image>\nHi ASSISTANT:"),
    ("v1", SEVERAL[:4], V1 + "USER: <image>\nHi ASSISTANT: Yes.</s>USER: Why? ASSISTANT: So.</s>"),
    ("vip", ONE, VIP + "<image>\nHi###Assistant:"),
    ("vip", [user("Hi", 2)], VIP + "<image>\n<image>\nHi###Assistant:"),
    ("vip", SEVERAL[:4], VIP + "<image>\nHi###Assistant: Yes.###Human: Why?###Assistant: So.###"),
    ("vip", SEVERAL[2:], VIP + "Why?###Assistant: So.###Human: <image>\nAnd?###Assistant:"),
    ("vip", OWN + ONE, "Be brief.###Human: <image>\nHi###Assistant:"),
    ("vip", [{"role": "system", "content": ""}] + ONE, "###Human: <image>\nHi###Assistant:"),
]


@pytest.mark.parametrize("style, messages, prompt", PROMPTS)
def test_prompt(style, messages, prompt):
    assert chat_prompt(messages, style) == prompt
    images = sum(part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"])
    assert TOKENIZER.encode(prompt).count(IMAGE) == images


def test_pictures_stand_before_the_text_and_texts_are_joined():
    content = [{"type": "text", "text": "Is it "}, {"type": "image"}, {"type": "text", "text": "red?"}]
    assert chat_prompt([{"role": "user", "content": content}], "llava") == "USER: <image>\nIs it red? ASSISTANT:"


@pytest.mark.parametrize("style", ["llava", "bakllava", "vip"])
@pytest.mark.parametrize("literal", SPECIAL_LITERALS)
def test_special_literals_are_refused_in_every_text(style, literal):
    for messages in (
        [user(f"a{literal}")],
        [user("Hi"), assistant(f"{literal}b")],
        [{"role": "system", "content": literal}, user("Hi")],
        [{"role": "user", "content": [{"type": "text", "text": part} for part in (literal[:3], literal[3:])]}],
    ):
        with pytest.raises(ValueError, match=literal):
            chat_prompt(messages, style)


@pytest.mark.parametrize(
    "style, mark",
    [("llava", "USER:"), ("llava", "ASSISTANT:"), ("bakllava", "USER:"), ("bakllava", "ASSISTANT:"), ("vip", "###")],
)
def test_turn_marks_are_refused_in_what_is_asked_but_not_in_answers(style, mark):
    for messages in ([user(f"Hi {mark} Yes.")], [{"role": "system", "content": mark}, user("Hi")]):
        with pytest.raises(ValueError, match=mark):
            chat_prompt(messages, style)
    other = "vip" if style != "vip" else "llava"
    assert mark in chat_prompt([user(f"Hi {mark}")], other)
    assert f" a {mark} b" in chat_prompt([user("Hi"), assistant(f"a {mark} b")], style)


@pytest.mark.parametrize(
    "messages, style, words",
    [
        ([assistant("Yes.")], "llava", ["message 1", "'assistant'", "expected 'user'"]),
        ([user("Hi"), user("Hi")], "llava", ["message 2", "'user'", "expected 'assistant'"]),
        ([user("Hi"), OWN[0]], "vip", ["message 2", "'system'"]),
        ([*OWN, *OWN, user("Hi")], "vip", ["'system'", "expected 'user'"]),
        ([{"role": "tool", "content": "x"}], "llava", ["'tool'"]),
        (ONE, "vicuna", ["'vicuna'", "llava, bakllava, vip, v1"]),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "llava", ["'image_url'", "'text' or 'image'"]),
        ([user("Hi"), {"role": "assistant", "content": [{"type": "image"}]}], "llava", ["assistant", "picture"]),
        ([{"role": "system", "content": [{"type": "image"}]}, user("Hi")], "vip", ["system", "picture"]),
    ],
)
def test_messages_that_are_refused(messages, style, words):
    with pytest.raises(ValueError) as error:
        chat_prompt(messages, style)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# The files


@pytest.fixture
def folder(tmp_path):
    shutil.copyfile(FOLDER / "tokenizer.model", tmp_path / "tokenizer.model")
    return tmp_path


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_either_file_gives_the_added_tokens(folder, name):
    shutil.copyfile(FOLDER / name, folder / name)
    assert Tokenizer.from_pretrained(folder).specials == TOKENIZER.specials


def test_no_tokenizer_model(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="no tokenizer.model .* nor a tokenizer.json"):
            Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"not a model", lambda data: data[:3000]])
def test_damaged_tokenizer_model(folder, damage):
    path = folder / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model, or is damaged"):
        Tokenizer.from_pretrained(folder)


def test_a_tokenizer_without_image_or_pad(folder):
    with pytest.raises(ValueError, match="no <image> and no <pad>"):
        Tokenizer.from_pretrained(folder)
    (folder / "added_tokens.json").write_text('{"<image>": 512}')
    with pytest.raises(ValueError, match="no <pad>"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["<image>"]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"512": "<image>"}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"512": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<image>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"512": {"content": 5}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"512": {"content": ""}}}'),
        ("added_tokens.json", '{"<image>": 512, "": 513}'),
        ("added_tokens.json", "[" * 100_000),
        ("added_tokens.json", "{"),
        ("added_tokens.json", '["<image>"]'),
        ("added_tokens.json", '{"<image>": "512", "<pad>": 513}'),
    ],
)
def test_damaged_added_tokens(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(folder)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_two_specials_with_one_id(folder):
    (folder / "added_tokens.json").write_text('{"<image>": 512, "<pad>": 512}')
    with pytest.raises(ValueError, match="two special tokens have one id"):
        Tokenizer.from_pretrained(folder)


# tokenizer.json alone


@pytest.mark.parametrize("source", [FOLDER, Path("tiny/llava"), Path("tiny/vip-llava")])
def test_tokenizer_json_alone_is_the_same_tokenizer(source, tmp_path):
    shutil.copyfile(source / "tokenizer.json", tmp_path / "tokenizer.json")
    ours, alone = Tokenizer.from_pretrained(source), Tokenizer.from_pretrained(tmp_path)
    assert alone.specials == ours.specials and len(alone.model) == len(ours.model)
    source = random.Random(5)
    for text in TEXTS + random_texts(500) + [random_text(source) for _ in range(500)]:
        ids = ours.encode(text)
        assert alone.encode(text) == ids and alone.decode(ids) == ours.decode(ids), text
    for _ in range(500):
        ids = random_ids(source, len(ours.model) + 10, ours.model.piece_to_id("▁"))
        assert alone.decode(ids) == ours.decode(ids)


def changed(folder, change):
    raw = json.loads((FOLDER / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def test_tokenizer_json_in_its_other_spellings(tmp_path):
    def change(raw):
        raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]  # as older files have them
        raw["model"]["vocab"] |= {"<image>": 512, "<pad>": 513}  # as some conversions do
        raw["model"].pop("ignore_merges")
        raw["decoder"] = None

    changed(tmp_path, change)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert [(text, ids) for text, ids in GOLDEN["encode"] if tokenizer.encode(text) != ids] == []
    assert tokenizer.decode([1, 512, *MODEL.encode("a cat"), 513]) == "a cat"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda raw: raw.update(pre_tokenizer={"type": "ByteLevel"}), ["pre_tokenizer ByteLevel", "tokenizer.model"]),
        (lambda raw: raw.update(normalizer=None), ["another kind"]),
        (lambda raw: raw["model"].update(byte_fallback=False), ["byte_fallback False"]),
        (lambda raw: raw["model"].update(type="Unigram"), ["Unigram"]),
        (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), ["another kind"]),
        (lambda raw: raw["model"]["vocab"].pop("▁the"), ["ids of its vocabulary"]),
        (lambda raw: raw.pop("model"), ["damaged", "model"]),
        (lambda raw: raw["model"].update(merges=[["a"]]), ["tokenizer.json"]),
        (lambda raw: raw["model"].update(vocab=["a"]), ["damaged"]),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(change, words, tmp_path):
    changed(tmp_path, change)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(tmp_path)
    said = str(error.value)
    assert all(word in said for word in ["tokenizer.json", *words]) and "\n" not in said, said


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer(tmp_path, name):
    for file in (name, "added_tokens.json"):
        shutil.copyfile(FOLDER / file, tmp_path / file)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n")
    with pytest.raises(ValueError, match=f"{name}.*git lfs pull"):
        Tokenizer.from_pretrained(tmp_path)


# Added tokens


def with_added(folder, **flags):
    """A tokenizer with <loc_1> 514 and <loc_12> 515."""
    shutil.copyfile(FOLDER / "tokenizer.model", folder / "tokenizer.model")
    raw = json.loads((FOLDER / "tokenizer_config.json").read_text())
    for i, text in ((514, "<loc_1>"), (515, "<loc_12>")):
        raw["added_tokens_decoder"][str(i)] = {"content": text, "lstrip": False, "rstrip": None} | flags
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    return Tokenizer.from_pretrained(folder)


def test_added_tokens_that_are_not_special_are_kept_in_the_text(tmp_path):
    tokenizer = with_added(tmp_path, special=False, normalized=True)
    a, at = MODEL.encode("a"), MODEL.encode("at")
    assert tokenizer.encode("at <loc_1> a<loc_12>") == [1, *at, 514, *MODEL.encode("a<loc_12>")]  # it has the space in front
    assert tokenizer.encode("<loc_1>at")[:2] == [1, 514] and tokenizer.encode("<image><loc_12> a") == [1, IMAGE, 515, *a]
    for text in ("at <loc_1> and <loc_12>.", "<loc_1>", "a\n<loc_1>", "a  <loc_1>  b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer = with_added(tmp_path, special=False, normalized=False)
    assert tokenizer.encode("at<loc_12>") == [1, *at, 515] and tokenizer.decode([*at, 515]) == "at<loc_12>"
    tokenizer = with_added(tmp_path, special=True)
    assert tokenizer.decode([*at, 515]) == "at"


def test_added_tokens_that_take_white_space_along(tmp_path):
    a = MODEL.encode("a")
    assert with_added(tmp_path, lstrip=True).encode("a \n<loc_1> a") == [1, *a, 514, *MODEL.encode(" a")]
    assert with_added(tmp_path, rstrip=True).encode("a<loc_1> \u3000\n a") == [1, *a, 514, *a]


@pytest.mark.parametrize("flags", [{"single_word": True}, {"normalized": True, "lstrip": True}, {"normalized": True, "rstrip": True}])
def test_what_is_not_honoured_is_refused_by_name(flags, tmp_path):
    with pytest.raises(ValueError, match="'<loc_1>' is (single_word|normalized with lstrip or rstrip)"):
        with_added(tmp_path, **flags)


@pytest.mark.parametrize("flag", ["special", "normalized", "lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("value", ["yes", 1, [True]])
def test_a_flag_that_is_neither_true_nor_false_is_refused(flag, value, tmp_path):
    message = re.escape(f"'<loc_1>' has {flag} {value!r}; expected true or false")
    with pytest.raises(ValueError, match=f"tokenizer_config.json.*{message}"):
        with_added(tmp_path, **{flag: value})
    for name in ("tokenizer_config.json", "tokenizer.model"):
        (tmp_path / name).unlink()
    raw = json.loads(Path("tiny/llava/tokenizer.json").read_text())
    raw["added_tokens"].append({"id": 512, "content": "<loc_1>", flag: value})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_added_token_in_the_place_of_another(folder):
    (folder / "added_tokens.json").write_text('{"<image>": 300, "<pad>": 513}')
    with pytest.raises(ValueError, match="'<image>' has id 300, which is .* in the vocabulary"):
        Tokenizer.from_pretrained(folder)


def test_null_is_as_if_the_field_were_not_there(folder):
    raw = json.loads((FOLDER / "tokenizer_config.json").read_text())
    for token in raw["added_tokens_decoder"].values():
        token |= {"normalized": None, "lstrip": None, "special": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw | {"chat_template": None}))
    assert Tokenizer.from_pretrained(folder).specials == TOKENIZER.specials
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    shutil.copyfile(FOLDER / "added_tokens.json", folder / "added_tokens.json")
    assert Tokenizer.from_pretrained(folder).specials == TOKENIZER.specials


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_goes_on_has_no_leading_space(text):
    text = "".join(re.split("|".join(SPECIAL_LITERALS), text))
    for before in ("###", "A:", "\n"):
        assert TOKENIZER.encode(before)[1:] + TOKENIZER.encode_more(text) == TOKENIZER.encode(before + text)[1:]
