"""Loading: good checkpoints in every form they come in, and a table of broken ones with what their errors must say."""

import json
import shutil
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chat import Chat
from llava import Llava
from tokenizer import STYLES
from weights import checkpoint, memory
from weights.checkpoint import our_name
from weights.config import LLAVA, TEXT, VISION, LlavaConfig
from weights.load import outline

TOKENIZER = Path(__file__).parent / "fixtures" / "tokenizer"
CONFIG = {
    "model_type": "llava",
    "image_token_index": 512,
    "pad_token_id": 513,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 520,
    },
    "vision_config": {
        "hidden_size": 16,
        "image_size": 28,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 14,
    },
}
PROCESSOR = {"size": 28, "crop_size": 28, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.3, 0.3, 0.3]}
EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
NORM, LAYERS = "language_model.model.norm.weight", "language_model.model.layers."
INDEX, SHARDS = "model.safetensors.index.json", [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]

PUBLISHED = [  # from our names to the published ones
    ("projector.", "multi_modal_projector."),
    ("language_model.", "language_model.model."),
    ("language_model.model.lm_head.", "language_model.lm_head."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("vision_tower.vision_model.layers.", "vision_tower.vision_model.encoder.layers."),
    *[
        (f"vision_tower.vision_model.{name}", f"vision_tower.vision_model.embeddings.{name}")
        for name in ("class_embedding", "patch_embedding", "position_embedding")
    ],
]


def published(name):
    for ours, theirs in PUBLISHED:
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    return name


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A whole checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    model, random = Llava(LlavaConfig.from_pretrained(folder)), torch.Generator().manual_seed(0)
    weights = {published(name): torch.randn(p.shape, generator=random) for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


# Ways to change a checkpoint: each returns a function of its folder.


def edit_json(name, edit):
    def change(folder):
        raw = json.loads((folder / name).read_text())
        edit(raw)
        (folder / name).write_text(json.dumps(raw))

    return change


def config(**fields):
    return edit_json("config.json", lambda raw: raw.update(fields))


def text(**fields):
    return edit_json("config.json", lambda raw: raw["text_config"].update(fields))


def vision(**fields):
    return edit_json("config.json", lambda raw: raw["vision_config"].update(fields))


def weights(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def content(edit, name="model.safetensors"):
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def removed(name):
    return lambda folder: (folder / name).unlink()


def shard(folder):
    """Split the weights over three files, the tensors of a layer too."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: SHARDS[n % 3] for n, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def sharded(damage):
    return lambda folder: (shard(folder), damage(folder))


def index(file):
    """Shards whose index says that the last norm's weight is in this file."""
    return sharded(edit_json(INDEX, lambda raw: raw["weight_map"].update({NORM: file})))


def header(data, replace):
    """A safetensors file with its JSON header edited, its length left right."""
    length = struct.unpack("<Q", data[:8])[0]
    new = replace(data[8 : 8 + length])
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


def cast(tensors, name, dtype):
    tensors[name] = tensors[name].to(dtype)


# What loads


def test_shards_that_are_links_as_in_the_hubs_cache(folder):
    single = Llava.from_pretrained(folder).state_dict()
    shard(folder)
    (folder / "blobs").mkdir()
    for name in SHARDS:
        (folder / name).rename(folder / "blobs" / name)
        (folder / name).symlink_to(folder / "blobs" / name)
    linked = Llava.from_pretrained(str(folder)).state_dict()
    assert linked.keys() == single.keys() and all(torch.equal(linked[name], single[name]) for name in single)


def test_the_loaded_model_is_ready_to_run(good):
    model = Llava.from_pretrained(good)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad and parameter.device.type == "cpu", name
    assert not list(model.buffers())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_the_stored_type_is_kept_unless_another_is_asked_for(folder, stored):
    weights(lambda tensors: [cast(tensors, name, stored) for name in tensors])(folder)
    expected = load_file(folder / "model.safetensors")[NORM]
    for dtype in (None, torch.float16, torch.bfloat16, torch.float32):
        model = Llava.from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype or stored} == {model.dtype}
        assert torch.equal(model.language_model.norm.weight, expected.to(dtype or stored))


def test_stored_tables_are_ignored(folder):
    def add(tensors):
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        tensors[LAYERS + "0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    weights(add)(folder)
    assert Llava.from_pretrained(folder).dtype == torch.float32


@pytest.mark.parametrize("place", [config, text])
def test_a_tied_checkpoint_may_store_its_head_too(folder, place):
    place(tie_word_embeddings=True)(folder)
    weights(lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))(folder)
    model = Llava.from_pretrained(folder).language_model
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")[EMBED])


def test_a_stored_head_that_differs_is_not_tied(folder):  # transformers does the same, with a warning
    config(tie_word_embeddings=True)(folder)
    model = Llava.from_pretrained(folder).language_model
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored[HEAD]) and torch.equal(model.embed_tokens.weight, stored[EMBED])


def test_an_untied_head_is_its_own(good):
    model = Llava.from_pretrained(good).language_model
    assert not torch.equal(model.lm_head.weight, model.embed_tokens.weight)


def test_our_name_leaves_our_names_alone(good):
    names = [name for name, _ in Llava(LlavaConfig.from_pretrained(good)).named_parameters()]
    assert [our_name(name) for name in names] == names


@pytest.mark.parametrize("pad", [None, -1])  # -1 is how the first Llama's config says none
def test_no_pad_token_means_the_end_token(folder, pad):
    config(eos_token_id=5, pad_token_id=pad)(folder)
    assert LlavaConfig.from_pretrained(folder).pad_id == 5


@pytest.mark.parametrize("pad", [512, 520, 10**6])  # <image>, and no row of the vocabulary
def test_a_pad_token_that_cannot_be_one_is_replaced(folder, pad):
    config(eos_token_id=5, pad_token_id=pad)(folder)
    assert LlavaConfig.from_pretrained(folder).pad_id == 5


def test_what_only_the_other_family_knows_is_left_aside(folder):
    config(vision_feature_layers=[-1], projector_layernorm_eps=0.5)(folder)
    assert LlavaConfig.from_pretrained(folder).vision_layers == [-2]
    config(model_type="vipllava", multimodal_projector_bias=False)(folder)
    assert LlavaConfig.from_pretrained(folder).projector_bias


@pytest.mark.parametrize(
    "place, table", [("config", LLAVA), ("text", TEXT), ("vision", VISION), ("generation", ["eos_token_id", "pad_token_id"])]
)
def test_null_is_as_if_the_field_were_not_there(folder, place, table):
    def said(name, null):
        raw, generation = json.loads(json.dumps(CONFIG)), {"eos_token_id": 3}
        part = {"config": raw, "text": raw["text_config"], "vision": raw["vision_config"], "generation": generation}[place]
        part.pop(name, None)
        if null:
            part[name] = None
        (folder / "config.json").write_text(json.dumps(raw))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        try:
            return LlavaConfig.from_pretrained(folder)
        except ValueError as error:  # a default that does not go with the other fields
            return str(error)

    for name in table:
        if name != "model_type" or place != "config":  # without it nothing is a LLaVA
            assert said(name, null=True) == said(name, null=False), name


def test_a_window_that_is_null_is_none(folder):
    text(model_type="mistral", sliding_window=None)(folder)
    assert LlavaConfig.from_pretrained(folder).text.sliding_window is None
    edit_json("config.json", lambda raw: raw["text_config"].pop("sliding_window"))(folder)
    assert LlavaConfig.from_pretrained(folder).text.sliding_window == 4096


def test_json_with_nulls_in_an_index_and_a_byte_order_mark(folder):
    single = Llava.from_pretrained(folder).state_dict()
    shard(folder)
    edit_json(INDEX, lambda raw: raw.update({"metadata": None, "more": {"a": None}}))(folder)
    content(lambda data: b"\xef\xbb\xbf" + data, "config.json")(folder)
    assert Llava.from_pretrained(folder).state_dict().keys() == single.keys()


def test_a_list_is_read_where_one_is_expected(tmp_path):
    (tmp_path / "records.json").write_text('[{"image": null, "id": 1}, null]')
    assert checkpoint.read_json(tmp_path / "records.json", list) == [{"id": 1}, None]
    with pytest.raises(ValueError, match="records.json holds a list; expected a JSON object"):
        checkpoint.read_json(tmp_path / "records.json")
    (tmp_path / "records.json").write_text("{}")
    with pytest.raises(ValueError, match="records.json holds a dict; expected a JSON list"):
        checkpoint.read_json(tmp_path / "records.json", list)


def test_what_is_added_to_a_config_leaves_its_nulls(folder, tmp_path):
    text(sliding_window=None)(folder)
    config(bos_token_id=None)(folder)
    checkpoint.write_checkpoint({"a": torch.ones(1)}, folder, tmp_path / "out", "x.safetensors", {"more": 1})
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text()) | {"more": 1}


def test_a_chat_style_may_be_named(folder):
    for style in STYLES:
        config(chat_style=style)(folder)
        assert LlavaConfig.from_pretrained(folder).style == style


# What does not load


def locked(name):
    """Make a file one that may not be read, even by root: a stand-in for the system's answer."""

    def change(folder, monkeypatch):
        def allowed(function):
            def refused(path, *args, **kwargs):
                if Path(path).name == name:
                    raise PermissionError(13, "Permission denied", str(path))
                return function(path, *args, **kwargs)

            return refused

        monkeypatch.setattr(checkpoint, "open", allowed(open), raising=False)
        monkeypatch.setattr(Path, "read_text", allowed(Path.read_text))

    return change


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4991226240\n"


def looped(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


MISSING, WRONG = FileNotFoundError, ValueError
BROKEN = [
    # the folder
    (lambda folder: shutil.rmtree(folder), MISSING, ["no such folder"]),
    (removed("config.json"), MISSING, ["no config.json"]),
    (removed("model.safetensors"), MISSING, ["no model.safetensors"]),
    # config.json as a file
    (content(lambda data: b"", "config.json"), WRONG, ["config.json", "not valid JSON"]),
    (content(lambda data: data[:-9], "config.json"), WRONG, ["config.json", "not valid JSON"]),
    (content(lambda data: b"\xff\xfe", "config.json"), WRONG, ["config.json", "not valid JSON"]),
    (content(lambda data: b"[" * 100_000, "config.json"), WRONG, ["config.json", "not valid JSON", "recursion"]),
    (content(lambda data: b"9" * 5000, "config.json"), WRONG, ["config.json", "not valid JSON", "digits"]),
    (content(lambda data: b"[]", "config.json"), WRONG, ["config.json", "list", "expected a JSON object"]),
    (content(lambda data: b"null", "config.json"), WRONG, ["config.json", "expected a JSON object"]),
    (lambda folder: (folder / "generation_config.json").write_text("{"), WRONG, ["generation_config.json", "not va"]),
    (lambda folder: (folder / "config.json").write_text(POINTER), WRONG, ["config.json is a Git LFS pointer", "git lfs pull"]),
    (lambda folder: looped(folder / "config.json"), OSError, ["config.json", "symbolic links"]),
    (lambda folder: looped(folder / "generation_config.json"), OSError, ["generation_config.json", "symbolic links"]),
    # what the model is
    (config(chat_style="vicuna"), WRONG, ["chat_style 'vicuna'", "'v1'"]),
    (config(mm_vision_tower="openai/clip-vit-large-patch14-336"), WRONG, ["original authors' layout", "llava-hf/"]),
    *[(config(projector_layernorm_eps=eps), WRONG, ["projector_layernorm_eps"]) for eps in ("1e-5", [1], -1, True, float("nan"), 10**400)],
    (edit_json("config.json", lambda raw: raw.pop("model_type")), WRONG, ["model_type None", "'llava' or 'vipllava'"]),
    (config(model_type="llava_next"), WRONG, ["model_type 'llava_next'", "'llava' or 'vipllava'"]),
    (config(model_type=["llava"]), WRONG, ["model_type ['llava']"]),
    (text(model_type="qwen2"), WRONG, ["model_type 'qwen2'", "'llama' and 'mistral'"]),
    (text(hidden_act="gelu"), WRONG, ["hidden_act 'gelu'", "'silu'"]),
    (text(attention_bias=True), WRONG, ["attention_bias True", "False"]),
    (text(mlp_bias=True), WRONG, ["mlp_bias True", "False"]),
    (text(rope_scaling={"type": "linear", "factor": 2.0}), WRONG, ["rope_type 'linear'", "default"]),
    (text(rope_scaling={"rope_type": "llama3"}), WRONG, ["rope_type 'llama3'", "default"]),
    (text(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), WRONG, ["rope_type 'yarn'", "default"]),
    (text(num_key_value_heads=3), WRONG, ["4 query heads", "3 key/value heads"]),
    (vision(num_attention_heads=3), WRONG, ["hidden_size 16", "3 heads"]),
    (vision(model_type="siglip_vision_model"), WRONG, ["vision_config", "model_type 'siglip_vision_model'", "'clip_vision_model'"]),
    (vision(hidden_act="gelu"), WRONG, ["hidden_act 'gelu'", "'quick_gelu'"]),
    (config(projector_hidden_act="relu"), WRONG, ["projector_hidden_act 'relu'", "'gelu'"]),
    (config(image_grid_pinpoints=[[336, 672]]), WRONG, ["image_grid_pinpoints"]),
    (config(vision_feature_select_strategy="cls"), WRONG, ["'cls'", "'default' or 'full'"]),
    # config and weights that disagree
    (text(hidden_size=32), WRONG, ["disagree", "25 of a wrong shape", "(16, 16), expected (32, 16)", "and 22 more"]),
    (text(num_hidden_layers=3), WRONG, ["disagree", "9 missing", "layers.2", "and 6 more"]),
    (text(num_hidden_layers=1), WRONG, ["disagree", "9 unexpected", LAYERS + "1", "and 6 more"]),
    (text(num_key_value_heads=4), WRONG, ["disagree", "4 of a wrong shape", "(8, 16)", "(16, 16)"]),
    (vision(hidden_size=32), WRONG, ["disagree", "wrong shape"]),
    (vision(image_size=42), WRONG, ["1 of a wrong shape", "position_embedding.weight (5, 16)", "(10, 16)"]),
    (config(vision_feature_layer=[-2, -1]), WRONG, ["1 of a wrong shape", "linear_1.weight (16, 16)", "(16, 32)"]),
    (config(model_type="vipllava", vision_feature_layers=[-2]), WRONG, ["2 missing", "projector_layernorm"]),
    (config(multimodal_projector_bias=False), WRONG, ["2 unexpected", "multi_modal_projector.linear_1.bias"]),
    (config(vision_feature_layer=99), WRONG, ["vision layer 99 does not exist", "-4 to -1"]),
    (config(vision_feature_layer=-5), WRONG, ["vision layer -5 does not exist"]),
    (config(image_token_index=520), WRONG, ["image_token_index", "520"]),
    # tensors
    (weights(lambda t: t.pop(NORM)), WRONG, ["1 missing", "norm.weight"]),
    (weights(lambda t: t.pop(HEAD)), WRONG, ["1 missing", "lm_head.weight"]),
    (weights(lambda t: [t.pop(name) for name in sorted(t)[:10]]), WRONG, ["10 missing", "and 7 more"]),
    (weights(lambda t: t.update(extra=torch.ones(1))), WRONG, ["1 unexpected", "extra"]),
    (weights(lambda t: t.update({"text." + NORM: t.pop(NORM)})), WRONG, ["1 missing", "1 unexpected: text.", "TO_OURS in checkpoint.py"]),
    (weights(lambda t: t.update({f"extra.{n}": torch.ones(1) for n in range(9)})), WRONG, ["and 6 more"]),
    (weights(lambda t: t.update({NORM: torch.ones(17)})), WRONG, ["1 of a wrong shape", NORM, "(17,)", "(16,)"]),
    (weights(lambda t: t.update({NORM: torch.ones(1, 16)})), WRONG, ["1 of a wrong shape", "(1, 16)"]),
    (weights(lambda t: cast(t, NORM, torch.int8)), WRONG, ["1 of a type other than", NORM, "I8", "F16"]),
    (weights(lambda t: cast(t, NORM, torch.float64)), WRONG, ["1 of a type other than", NORM, "F64", "F16"]),
    (weights(lambda t: cast(t, EMBED, torch.float8_e4m3fn)), WRONG, ["1 of a type other than", EMBED, "F8_E4M3"]),
    (weights(lambda t: t.update({"lm_head.weight": t[HEAD].clone()})), WRONG, ["lm_head.weight", "second time"]),
    (weights(lambda t: t.clear()), WRONG, ["missing"]),
    # weight files
    (lambda folder: (folder / "model.safetensors").write_text(POINTER), WRONG, ["model.safetensors is a Git LFS pointer", "git lfs pull"]),
    (sharded(lambda folder: (folder / SHARDS[1]).write_text(POINTER)), WRONG, [SHARDS[1] + " is a Git LFS pointer"]),
    (lambda folder: looped(folder / "model.safetensors"), OSError, ["model.safetensors", "symbolic links"]),
    (sharded(lambda folder: looped(folder / SHARDS[1])), OSError, [SHARDS[1], "symbolic links"]),
    (sharded(lambda folder: dangling(folder / SHARDS[1])), MISSING, [SHARDS[1] + " is a link to nowhere", "fetch"]),
    (sharded(lambda folder: looped(folder / INDEX)), OSError, [INDEX, "symbolic links"]),
    (lambda folder: (removed("model.safetensors")(folder), (folder / "model.safetensors").mkdir()), OSError, ["cannot be read: Is a dir"]),
    *[
        (
            lambda folder, name=name: (folder / "model.safetensors").rename(folder / name),
            MISSING,
            ["no model.safetensors", name, "save_pretrained", "convert.py"],
        )
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "llava.gguf")
    ],
    (lambda folder: (removed("model.safetensors")(folder), (folder / "adapter_config.json").touch()), MISSING, ["--adapter"]),
    *[(content(lambda data, n=n: data[:n]), WRONG, ["damaged or cut short"]) for n in (0, 4, 8, 60, 20000, -1)],
    (content(lambda data: data + b"more"), WRONG, ["damaged or cut short"]),
    (content(lambda data: b"PK\x03\x04 a pickle, perhaps" * 9), WRONG, ["damaged or cut short"]),
    (content(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), WRONG, ["damaged or cut short"]),
    (content(lambda data: header(data, lambda h: b"{" * len(h))), WRONG, ["damaged or cut short"]),
    (content(lambda data: header(data, lambda h: h.replace(b'"F32"', b'"F99"'))), WRONG, ["damaged or cut short"]),
    (content(lambda data: header(data, lambda h: h.replace(b"[520,16]", b"[521,16]"))), WRONG, ["damaged"]),
    (sharded(content(lambda data: data[:-100], SHARDS[1])), WRONG, [SHARDS[1], "damaged or cut short"]),
    (sharded(content(lambda data: b"", SHARDS[2])), WRONG, [SHARDS[2], "damaged or cut short"]),
    # the index
    (sharded(removed(SHARDS[2])), MISSING, ["1 of its 3", SHARDS[2]]),
    (sharded(content(lambda data: b"{", INDEX)), WRONG, [INDEX, "not valid JSON"]),
    (sharded(content(lambda data: b"[]", INDEX)), WRONG, [INDEX, "expected a JSON object"]),
    (sharded(content(lambda data: b"{}", INDEX)), WRONG, [INDEX, "no weight_map"]),
    (sharded(content(lambda data: b'{"weight_map": []}', INDEX)), WRONG, [INDEX, "no weight_map"]),
    (index(1), WRONG, [INDEX, "no weight_map"]),
    (index("../x.safetensors"), WRONG, ["'../x.safetensors'", "without folders"]),
    (index("/etc/passwd"), WRONG, ["'/etc/passwd'", "without folders"]),
    (index("sub/x.safetensors"), WRONG, ["'sub/x.safetensors'", "without folders"]),
    (index("..\\x.safetensors"), WRONG, ["x.safetensors'", "without folders"]),
    (index(".."), MISSING, ["1 of its 4 weight files", ".."]),
    (lambda folder: (weights(lambda t: t.pop(NORM))(folder), index(SHARDS[0])(folder)), WRONG, ["1 missing", "norm."]),
]


@pytest.mark.parametrize("damage, kind, words", BROKEN, ids=[" ".join(words) for *_, words in BROKEN])
def test_broken_checkpoint(folder, damage, kind, words):
    damage(folder)
    with pytest.raises(kind) as error:
        Llava.from_pretrained(folder)
    check_message(error, kind, words, folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", INDEX, SHARDS[2]])
def test_what_may_not_be_read(folder, name, monkeypatch):
    (folder / "generation_config.json").write_text("{}")
    if name in (INDEX, SHARDS[2]):
        shard(folder)
    locked(name)(folder, monkeypatch)
    with pytest.raises(PermissionError) as error:
        Llava.from_pretrained(folder)
    check_message(error, PermissionError, [name, "permission denied", "ask its owner"], folder)


def test_a_disk_without_mmap(folder, monkeypatch):
    def no_device(*_):
        raise OSError("No such device (os error 19)")

    monkeypatch.setattr(checkpoint, "safe_open", no_device)
    with pytest.raises(OSError) as error:
        Llava.from_pretrained(folder)
    check_message(error, OSError, ["model.safetensors", "cannot be mapped", "os error 19", "local disk"], folder)


def test_a_file_in_the_folders_place(folder):
    with pytest.raises(ValueError, match="config.json is a file; give the folder"):
        Llava.from_pretrained(folder / "config.json")


def check_message(error, kind, words, folder):
    message = str(error.value)
    assert error.type is kind and "\n" not in message  # no subclass: a JSON or Unicode error knows no file name
    said = message.replace(str(folder), "")
    assert [word for word in words if word not in said] == [], message


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ODD_VALUES = [  # (the part of config.json or None, field, values that make no sense there)
    *[("text_config", name, ("16", -16, 10**10)) for name in (*SIZES, "vocab_size", "max_position_embeddings")],
    *[("vision_config", name, ("16", 0, [16], 10**10)) for name in (*SIZES, "image_size", "patch_size", "num_channels")],
    ("text_config", "num_key_value_heads", ("2", -2)),
    ("text_config", "head_dim", ("4", -4, 5)),  # RoPE turns pairs of dimensions
    ("text_config", "rms_norm_eps", ("1e-5", -1e-5)),
    ("text_config", "rope_theta", ("1e4", 0, float("inf"), float("nan"))),
    ("text_config", "rope_scaling", ("linear", [2.0])),
    ("text_config", "rope_parameters", ("default", [1e4])),
    ("vision_config", "patch_size", (29,)),  # larger than the picture
    ("vision_config", "layer_norm_eps", ("1e-5",)),
    (None, "text_config", ("llama", ["llama"])),
    (None, "vision_config", ("clip", ["clip"])),
    (None, "vision_feature_layer", ("-2", 1.5, [], [-2, "x"], [-2, 99], {"a": 1})),
    (None, "vision_feature_select_strategy", (3, ["default"])),
    (None, "image_token_index", ("512", 1.5, -1)),
    (None, "eos_token_id", ("2", 1.5, [2, "x"])),
    (None, "pad_token_id", ("2", 1.5, [2])),
    (None, "tie_word_embeddings", ("yes", 3)),
    (None, "multimodal_projector_bias", ("yes",)),
]


@pytest.mark.parametrize("part, field, value", [(part, field, v) for part, field, values in ODD_VALUES for v in values])
def test_odd_values_in_a_config(folder, part, field, value):
    raw = json.loads((folder / "config.json").read_text())
    (raw if part is None else raw[part])[field] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError) as error:
        Llava.from_pretrained(folder)
    check_message(error, ValueError, [field], folder)


@pytest.mark.parametrize("value", ["12", 0, -1, 1.5])
def test_odd_sliding_windows(folder, value):
    text(model_type="mistral", sliding_window=value)(folder)
    with pytest.raises(ValueError, match="sliding_window"):
        Llava.from_pretrained(folder)


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub, in a folder where no name is a folder's; set hub.answer to what it shall do."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("huggingface_hub")

    def snapshot_download(name, allow_patterns):
        module.asked = name, allow_patterns
        if isinstance(module.answer, Exception):
            raise module.answer
        return str(module.answer)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_a_hub_name_is_fetched(hub, good):
    hub.answer = good
    assert Llava.from_pretrained("someone/some-llava").dtype == torch.float32
    assert hub.asked == ("someone/some-llava", ["*.json", "*.jinja", "*.model", "*.safetensors"])
    assert Chat.from_pretrained("someone/some-llava").tokenizer.image_id == 512


@pytest.mark.parametrize("error", [OSError("no network\nmore about it"), ValueError("401"), RuntimeError()])
def test_a_hub_name_that_cannot_be_fetched(hub, error):
    hub.answer = error
    with pytest.raises(FileNotFoundError) as raised:
        Llava.from_pretrained("someone/some-llava")
    words = ["someone/some-llava: no such folder", "could not be fetched", str(error).split("\n")[0] or "RuntimeError"]
    check_message(raised, FileNotFoundError, words, "nowhere")


def test_a_hub_name_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="someone/some-llava.*pip install huggingface_hub"):
        Llava.from_pretrained("someone/some-llava")


@pytest.mark.parametrize("name", ["absent", "./absent/folder", "../absent", "/absent/folder", "~/absent", "a/b/c"])
def test_what_is_no_hub_name_is_not_fetched(hub, name):
    hub.answer = AssertionError("asked")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Llava.from_pretrained(name)
    assert not hasattr(hub, "asked")


@pytest.mark.parametrize("mapped", [True, False])
def test_weights_are_mapped_or_copied(good, monkeypatch, mapped):
    read, kept = checkpoint.Stored.read, []
    monkeypatch.setattr(checkpoint.Stored, "read", lambda *args: kept.append(read(*args)) or kept[-1])
    model = Llava.from_pretrained(good, mapped=mapped)
    in_file = {tensor.data_ptr() for tensor in kept}
    assert len(kept) > 20 and all((parameter.data_ptr() in in_file) == mapped for parameter in model.parameters())


@pytest.mark.parametrize("free, copied", [(10**9, True), (1000, False), (None, False)])
def test_weights_are_worth_copying_where_they_fit_twice(good, monkeypatch, free, copied):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    weights = memory.weight_bytes(outline(Llava, LlavaConfig.from_pretrained(good)), torch.float32)
    assert memory.worth_copying(weights) == copied


# A chat is a model, a tokenizer and an image processor that fit together


def test_a_chat_loads(good):
    chat = Chat.from_pretrained(good, dtype=torch.float16)
    assert chat.model.dtype == torch.float16 and chat.tokenizer.pad_id == 513 and chat.processor.crop_size == 28


@pytest.mark.parametrize(
    "damage, kind, words",
    [
        (config(image_token_index=511), WRONG, ["<image>", "512", "511"]),
        (content(lambda data: data.replace(b"28", b"42"), "preprocessor_config.json"), WRONG, ["42", "28"]),
        (removed("tokenizer.model"), MISSING, ["tokenizer.model"]),
        (removed("added_tokens.json"), WRONG, ["<image>"]),
        (removed("preprocessor_config.json"), MISSING, ["preprocessor_config.json"]),
        (removed("config.json"), MISSING, ["config.json"]),
        (removed("model.safetensors"), MISSING, ["model.safetensors"]),
    ],
)
def test_a_chat_that_does_not_fit_together(folder, damage, kind, words):
    damage(folder)
    with pytest.raises(kind) as error:
        Chat.from_pretrained(folder)
    check_message(error, kind, words, folder)
