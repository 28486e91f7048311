"""From the authors' layout to the published one: random tiny models written in both, and what must be refused."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert as command
from chat import Chat
from convert import convert
from llava import Llava
from training.lora import load_adapter, merge
from weights import original
from weights.checkpoint import published_name, read_headers

TOKENIZER = Path("tests/fixtures/tokenizer/tokenizer.model")
WORDS, ROWS = 512, 576  # of the small vocabulary; with <image> and <pad>, filled up to a multiple of 64
DEPTH, TOWER, WIDTH, MLP, BLOCKS = 12, 16, 32, 48, 2
VISION = dict(hidden_size=TOWER, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=28, patch_size=14)
TEXT = dict(
    vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=BLOCKS, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5, hidden_act="silu", rope_scaling=None,
)  # fmt: skip
LLAVA = dict(
    model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"], mm_projector_type="mlp2x_gelu", mm_hidden_size=TOWER,
    mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
    mm_use_im_start_end=False, mm_use_im_patch_token=False, image_aspect_ratio="pad",
)  # fmt: skip
VIP = LLAVA | {"mm_vision_tower": "clip_4layers_336"}
BAKLLAVA = LLAVA | dict(model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], num_key_value_heads=2, sliding_window=3)


def noise(*shape):
    return torch.randn(shape) * 0.2


def language(heads=4):
    """A Llama's tensors by their names in its own repository. heads: of keys and values; a Mistral has fewer than of queries."""
    tensors = {
        "model.embed_tokens.weight": noise(WORDS, WIDTH),
        "lm_head.weight": noise(WORDS, WIDTH),
        "model.norm.weight": 1 + noise(WIDTH),
    }
    for n in range(BLOCKS):
        for name in "qkvo":
            rows = heads * WIDTH // 4 if name in "kv" else WIDTH
            tensors[f"model.layers.{n}.self_attn.{name}_proj.weight"] = noise(rows, WIDTH)
        tensors[f"model.layers.{n}.mlp.gate_proj.weight"] = noise(MLP, WIDTH)
        tensors[f"model.layers.{n}.mlp.up_proj.weight"] = noise(MLP, WIDTH)
        tensors[f"model.layers.{n}.mlp.down_proj.weight"] = noise(WIDTH, MLP)
        tensors[f"model.layers.{n}.input_layernorm.weight"] = 1 + noise(WIDTH)
        tensors[f"model.layers.{n}.post_attention_layernorm.weight"] = 1 + noise(WIDTH)
        tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = noise(4)
    return tensors


def tower():
    """A CLIP's vision tensors by their names in its own repository."""
    tensors = {"embeddings.class_embedding": noise(TOWER), "embeddings.patch_embedding.weight": noise(TOWER, 3, 14, 14)}
    tensors["embeddings.position_embedding.weight"] = noise(5, TOWER)
    for name in ("pre_layrnorm", "post_layernorm"):
        tensors |= {f"{name}.weight": 1 + noise(TOWER), f"{name}.bias": noise(TOWER)}
    for n in range(DEPTH):
        layer = f"encoder.layers.{n}."
        for name, out, into in (
            ("mlp.fc1", 24, TOWER),
            ("mlp.fc2", TOWER, 24),
            *((f"self_attn.{x}_proj", TOWER, TOWER) for x in ("q", "k", "v", "out")),
        ):
            tensors |= {f"{layer}{name}.weight": noise(out, into), f"{layer}{name}.bias": noise(out)}
        for name in ("layer_norm1", "layer_norm2"):
            tensors |= {f"{layer}{name}.weight": 1 + noise(TOWER), f"{layer}{name}.bias": noise(TOWER)}
    return {f"vision_model.{name}": tensor for name, tensor in tensors.items()}


def projector(vip=False):
    """A projector's tensors by the authors' names, and by the published ones."""
    width = 5 * TOWER if vip else TOWER
    shapes = {"0.weight": (WIDTH, width), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}
    theirs, ours = {}, {}
    for name, shape in shapes.items():
        tensor = noise(*shape)
        theirs[f"model.mm_projector.{'final_linear.' if vip else ''}{name}"] = tensor
        ours[f"multi_modal_projector.linear_{1 if name[0] == '0' else 2}.{name[2:]}"] = tensor
    if vip:
        for leaf in ("weight", "bias"):
            theirs[f"model.mm_projector.clip_layernorm.{leaf}"] = ours[f"multi_modal_projector.projector_layernorm.{leaf}"] = noise(width)
    return theirs, ours


def expected(words, clip, projected):
    """What must come out, tensor by tensor."""
    tensors = dict(projected)
    for name, tensor in words.items():
        if not name.endswith("inv_freq"):
            if len(tensor) == WORDS:
                tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(ROWS - WORDS, -1)])
            tensors[f"language_model.{name}"] = tensor
    return tensors | {f"vision_tower.{name}": tensor for name, tensor in clip.items()}


def put(folder, tensors, config, form):
    """A folder in the authors' layout. form: "safetensors" or "bin", in one file, or "sharded" .bin files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = list(tensors)
        weight_map = {name: f"pytorch_model-0000{1 + n % 3}-of-00003.bin" for n, name in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return language(), tower()


@pytest.fixture
def clip(tmp_path, parts):
    """A CLIP in its repository's layout: with the text tower, which is left out, and the vision tower's config within another."""
    extra = {"text_model.final_layer_norm.weight": noise(4), "logit_scale": torch.tensor(1.0), "visual_projection.weight": noise(4, 4)}
    extra |= {"text_projection.weight": noise(4, 4), "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": VISION}))
    torch.save(parts[1] | extra, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def vicuna(tmp_path, parts):
    return put(tmp_path / "vicuna", parts[0], TEXT | {"model_type": "llama"}, "bin")


def stored(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7, msg=name)  # the mean of rows is rounded


def as_published(folder, tensors, vip=False, **text):
    """The same model as transformers would save it, for the comparison of logits. text: more of its text_config."""
    folder.mkdir()
    config = {"model_type": "vipllava" if vip else "llava", "image_token_index": WORDS, "vision_config": VISION}
    config |= {"text_config": TEXT | {"model_type": "llama", "vocab_size": ROWS} | text}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def logits(model):
    torch.manual_seed(1)
    ids = torch.tensor([[1, WORDS, 5, 7, 300]])
    return model(ids, torch.randn(1, 3, 28, 28)).logits


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize("vip", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@torch.no_grad()
def test_a_whole_model(tmp_path, parts, clip, form, vip, inside):
    (words, eyes), (theirs, ours) = parts, projector(vip)
    tensors = words | theirs
    if inside:  # as DeepSpeed saves it; the CLIP given beside it has other weights, and only says the shape
        tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in eyes.items()}
        torch.save({name: tensor + 1 for name, tensor in eyes.items()}, clip / "pytorch_model.bin")
    source = put(tmp_path / "in", tensors, (VIP if vip else LLAVA) | TEXT, form)
    convert(source, tmp_path / "out", vision=clip)
    wanted = expected(words, eyes, ours)
    assert_equal(stored(tmp_path / "out"), wanted)
    model = Llava.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(Llava.from_pretrained(as_published(tmp_path / "published", stored(tmp_path / "out"), vip))))
    assert model.config.vision_layers == ([-2, -5, -8, -11, 6] if vip else [-2])
    assert (model.config.image_id, model.config.pad_id, model.config.eos_ids) == (WORDS, WORDS + 1, (2,))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["chat_style"], config["image_aspect_ratio"]) == ("v1", "pad")
    assert not list(tmp_path.glob("*.partial"))
    assert "".join(Chat.from_pretrained(tmp_path / "out").ask("Hello?", max_new_tokens=2)) is not None


@pytest.mark.parametrize("window", [3, None, "left out"])
@torch.no_grad()
def test_bakllava(tmp_path, parts, clip, window):
    """A Mistral: fewer heads of keys and values, and a window; where none is named, 4,096 tokens."""
    (words, eyes), (theirs, ours) = (language(heads=2), parts[1]), projector()
    settings = TEXT | BAKLLAVA | {"sliding_window": window}
    if window == "left out":
        del settings["sliding_window"]
    convert(put(tmp_path / "in", words | theirs, settings, "bin"), tmp_path / "out", vision=clip)
    assert_equal(stored(tmp_path / "out"), expected(words, eyes, ours))
    model = Llava.from_pretrained(tmp_path / "out")
    assert (model.config.text.num_key_value_heads, model.config.text.sliding_window) == (2, {"left out": 4096}.get(window, window))
    more = dict(model_type="mistral", num_key_value_heads=2, sliding_window=model.config.text.sliding_window)
    published = Llava.from_pretrained(as_published(tmp_path / "published", stored(tmp_path / "out"), **more))
    assert torch.equal(logits(model), logits(published))
    without = Llava.from_pretrained(as_published(tmp_path / "no window", stored(tmp_path / "out"), **more | {"sliding_window": None}))
    assert torch.equal(logits(model), logits(without)) == (window != 3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["chat_style"] == "v1"


def test_large_models_come_out_in_several_files(tmp_path, parts, clip, monkeypatch):
    theirs, ours = projector()
    source = put(tmp_path / "in", parts[0] | theirs, LLAVA | TEXT, "bin")
    monkeypatch.setattr(original, "SHARD", 80_000)  # one matrix of the vocabulary has 73,728 bytes
    convert(source, tmp_path / "out", vision=clip)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert_equal(stored(tmp_path / "out"), expected(*parts, ours))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "out").values())
    assert {file for file in index["weight_map"].values()} == set(files)


def test_one_type_that_of_the_language_model(tmp_path, parts, clip):
    theirs, _ = projector()
    words = {name: tensor.half() for name, tensor in parts[0].items()}
    convert(put(tmp_path / "in", words | theirs, LLAVA | TEXT, "bin"), tmp_path / "out", vision=clip)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("vip", [False, True])
def test_a_projector_alone(tmp_path, parts, clip, vicuna, with_config, vip):
    theirs, ours = projector(vip)
    (tmp_path / "in").mkdir()
    torch.save(theirs, tmp_path / "in" / "mm_projector.bin")
    if with_config:
        (tmp_path / "in" / "config.json").write_text(json.dumps((VIP if vip else LLAVA) | TEXT))
    convert(tmp_path / "in", tmp_path / "out", vision=clip, base=vicuna)
    assert_equal(stored(tmp_path / "out"), expected(*parts, ours))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == ("vipllava" if vip else "llava")


@pytest.mark.parametrize("vip", [False, True])
def test_a_projector_put_into_a_checkpoint(tmp_path, parts, clip, vip):
    """All else stays as it is, the files beside the weights too."""
    convert(put(tmp_path / "in", parts[0] | projector(vip)[0], (VIP if vip else LLAVA) | TEXT, "bin"), tmp_path / "base", vision=clip)
    theirs, ours = projector(vip)
    (tmp_path / "aligned").mkdir()
    torch.save(theirs, tmp_path / "aligned" / "mm_projector.bin")
    with torch.no_grad():
        convert(tmp_path / "aligned", tmp_path / "out", base=tmp_path / "base")
    assert_equal(stored(tmp_path / "out"), expected(*parts, ours))
    for file in (tmp_path / "base").glob("*.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_bases_that_a_projector_is_not_put_into(tmp_path, parts, clip):
    theirs, _ = projector()
    convert(put(tmp_path / "in", parts[0] | theirs, LLAVA | TEXT, "bin"), tmp_path / "base", vision=clip)
    convert(tmp_path / "base", tmp_path / "int8", "int8")
    (tmp_path / "aligned").mkdir()
    torch.save(theirs, tmp_path / "aligned" / "mm_projector.bin")
    for options, problem in (
        (dict(), "give the checkpoint that it was trained in as --base"),
        (dict(base=tmp_path / "base", vision=clip), "--vision is for a --base without a vision tower"),
        (dict(base=tmp_path / "int8"), "is quantised; give the checkpoint that it was made from"),
        (dict(base="tiny/llava"), "is the projector of another model: linear_1.weight"),
    ):
        with pytest.raises(ValueError, match=problem):
            convert(tmp_path / "aligned", tmp_path / "out", **options)


@pytest.mark.parametrize("vip", [False, True])
def test_a_projector_written_as_they_write_it(tmp_path, vip):
    theirs, ours = projector(vip)
    model = torch.nn.Module()
    for layer in {name.split(".")[1] for name in ours}:
        module = torch.nn.Module()
        for leaf in ("weight", "bias"):
            setattr(module, leaf, torch.nn.Parameter(ours[f"multi_modal_projector.{layer}.{leaf}"]))
        setattr(model, layer, module)
    original.save_projector(model, tmp_path / "mm_projector.bin")
    written = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert_equal(written, theirs)
    assert_equal(original.read_projector(tmp_path / "mm_projector.bin"), ours)


def test_a_language_model_and_a_clip_are_what_stage_1_begins_with(tmp_path, parts, clip, vicuna):
    convert(vicuna, tmp_path / "out", vision=clip)
    tensors = stored(tmp_path / "out")
    fresh = {name: tensor for name, tensor in tensors.items() if name.startswith("multi_modal_projector.")}
    assert_equal(tensors, expected(*parts, fresh))
    assert {tuple(tensor.shape) for tensor in fresh.values()} == {(WIDTH, TOWER), (WIDTH, WIDTH), (WIDTH,)}
    assert all(0 < tensor.abs().max() <= 1 / TOWER**0.5 for tensor in fresh.values())


def lora_run(folder, form):
    """A LoRA run as their code leaves it: its changes in PEFT's format, and all else that it trained in a second file."""
    theirs, ours = projector()
    folder.mkdir()
    changes = {}
    for n in range(BLOCKS):
        for name, out, into in (("self_attn.q_proj", WIDTH, WIDTH), ("mlp.down_proj", WIDTH, MLP)):
            changes[f"base_model.model.model.layers.{n}.{name}.lora_A.weight"] = noise(4, into)
            changes[f"base_model.model.model.layers.{n}.{name}.lora_B.weight"] = noise(out, 4)
    if form == "bin":
        torch.save(changes, folder / "adapter_model.bin")
    else:
        save_file(changes, folder / "adapter_model.safetensors")
    torch.save({f"base_model.model.{name}": tensor for name, tensor in theirs.items()}, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(LLAVA | TEXT))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "down_proj"]}))
    return changes, ours


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@torch.no_grad()
def test_a_lora_run(tmp_path, parts, clip, vicuna, form):
    changes, ours = lora_run(tmp_path / "lora", form)
    convert(vicuna, tmp_path / "base", vision=clip)
    convert(tmp_path / "lora", tmp_path / "adapter")
    convert(tmp_path / "lora", tmp_path / "merged", base=tmp_path / "base")

    wanted = expected(*parts, ours)
    for name, change in changes.items():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
            wanted[f"language_model.{layer}"] = wanted[f"language_model.{layer}"] + 2 * changes[name.replace("lora_A", "lora_B")] @ change
    found = stored(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)

    model = Llava.from_pretrained(tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(Llava.from_pretrained(tmp_path / "merged")), rtol=0, atol=1e-5)
    merge(model)
    assert {published_name(name) for name, _ in model.named_parameters()} == wanted.keys()


class Runs:
    """A pickle that runs code when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_pickle_that_would_run_code(tmp_path, parts, clip):
    source = put(tmp_path / "in", parts[0] | projector()[0], LLAVA | TEXT, "bin")
    torch.save({"model.norm.weight": Runs(str(tmp_path / "ran"))}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than weights"):
        convert(source, tmp_path / "out", vision=clip)
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(str(tmp_path / "ran"))))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        convert(source, tmp_path / "out", vision=clip)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "setting, value",
    [
        ("mm_projector_type", "linear"),
        ("mm_projector_type", None),
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_use_im_start_end", True),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("image_aspect_ratio", "anyres"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("mm_vision_tower", "google/siglip-so400m-patch14-384"),
    ],
)
def test_settings_that_these_models_do_not_have(tmp_path, parts, clip, setting, value):
    source = put(tmp_path / "in", parts[0] | projector()[0], LLAVA | TEXT | {setting: value}, "bin")
    with pytest.raises(ValueError, match="rope_type" if setting == "rope_scaling" else setting):
        convert(source, tmp_path / "out", vision=None if setting == "mm_vision_tower" else clip)


@pytest.mark.parametrize("wrong", ["cut short", "missing shard", "no tower", "another tensor", "no tokenizer", "no weights", "outside"])
def test_one_line_for_what_is_not_whole(tmp_path, parts, clip, wrong, monkeypatch, capsys):
    tensors = parts[0] | projector()[0]
    if wrong == "another tensor":
        tensors["vision_resampler.query"] = noise(3)
    source = put(tmp_path / "in", tensors, LLAVA | TEXT, "sharded")
    shard, index = source / "pytorch_model-00002-of-00003.bin", source / "pytorch_model.bin.index.json"
    if wrong == "cut short":
        shard.write_bytes(shard.read_bytes()[:-500])
    elif wrong == "missing shard":
        shard.unlink()
    elif wrong == "no tokenizer":
        (source / "tokenizer.model").unlink()
    elif wrong == "no weights":
        index.unlink()
    elif wrong == "outside":
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../x.bin"}}))
    argv = ["convert.py", str(source), str(tmp_path / "out")] + ["--vision", str(clip)] * (wrong != "no tower")
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        command.main()
    line = str(stopped.value)
    assert line.startswith("convert.py: ") and "\n" not in line
    about = {"no tower": "mm_vision_tower", "another tensor": "vision_resampler.query", "no weights": "no weights"}
    about |= {"no tokenizer": "tokenizer.model", "outside": "weight_map"}
    assert about.get(wrong, "00002-of-00003") in line or wrong == "no tower"
    assert not (tmp_path / "out").exists()


def test_a_tower_that_is_nowhere(tmp_path, parts):
    source = put(tmp_path / "in", parts[0] | projector()[0], LLAVA | TEXT, "bin")
    with pytest.raises(ValueError, match="no vision tower in it.* --vision"):
        convert(source, tmp_path / "out")


def test_options_that_do_not_fit(tmp_path, parts, clip, vicuna):
    source = put(tmp_path / "in", parts[0] | projector()[0], LLAVA | TEXT, "bin")
    for options, problem in (
        (dict(source=source, scheme="int8", vision=clip), "first convert it"),
        (dict(source=source, vision=clip, base=vicuna), "--base is for"),
        (dict(source=vicuna), "--vision"),
        (dict(source="tiny/llava", vision=clip), "--vision and --base are for"),
        (dict(source="tiny/llava"), "give --quantize or --adapter"),
    ):
        with pytest.raises(ValueError, match=problem):
            convert(out=tmp_path / "out", **options)
    with pytest.raises(ValueError, match="exists"):
        convert(source, vicuna, vision=clip)


def test_names_that_are_read_are_those_that_are_written(tmp_path, parts, clip):
    """read_headers knows the result's names: none is ignored."""
    convert(put(tmp_path / "in", parts[0] | projector()[0], LLAVA | TEXT, "bin"), tmp_path / "out", vision=clip)
    assert len(read_headers(tmp_path / "out")) == len(stored(tmp_path / "out"))
