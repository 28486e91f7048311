"""The files that stand beside the weights of a checkpoint, as transformers reads them too: config, generation, tokenizer, preprocessor.

`settings` makes their contents from a config.json and a SentencePiece model: what they say beside that is the same for every LLaVA.
"""

import json

from sentencepiece import SentencePieceProcessor

PREPROCESSOR = {  # CLIP's
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,  # bicubic
    "rescale_factor": 0.00392156862745098,  # 1 / 255
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
}
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "image_token": "<image>",
    "extra_special_tokens": {"image_token": "<image>"},
}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}  # of a special token


def write_settings(out, config, tokenizer_model):
    """Write into the folder `out` what stands beside the weights. config: for config.json; tokenizer_model: the path of a SentencePiece
    model."""
    (out / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    added = {"<image>": config["image_token_index"], "<pad>": config["pad_token_id"]}
    model = SentencePieceProcessor(model_file=str(tokenizer_model))
    write_files(out, settings(config, model) | {"added_tokens.json": added})


def write_files(out, files):
    """files: {name of a JSON file: what it holds}."""
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settings(config, model):
    """The JSON files: {name: what it holds}. config: what config.json holds; model: a SentencePieceProcessor."""
    pad, bos, eos = config["pad_token_id"], config.get("bos_token_id", 1), config.get("eos_token_id", 2)
    special = {0: "<unk>", bos: "<s>", eos: "</s>", config["image_token_index"]: "<image>", pad: "<pad>"}
    special = {i: {"content": literal, **FLAGS} for i, literal in special.items()}
    side, patch = config["vision_config"]["image_size"], config["vision_config"]["patch_size"]
    processor = {"processor_class": "LlavaProcessor"}
    return {
        "config.json": config,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad},
        "tokenizer_config.json": TOKENIZER | {"added_tokens_decoder": special},
        "tokenizer.json": fast_tokenizer(model, special, bos),
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            **processor,
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            **PREPROCESSOR,
        },
        "processor_config.json": {
            **processor,
            "image_token": "<image>",
            "patch_size": patch,
            "num_additional_image_tokens": 1,  # the class token, which the strategy "default" leaves out again
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        },
    }


def fast_tokenizer(model, special, bos):
    """tokenizer.json: the SentencePiece model in the form that transformers runs. special: {id: what is said of a special token}.

    The vocabulary is the same; the rest is Llama's fixed recipe: a space in front, "▁" for a space, a piece that is none as its bytes.
    """
    vocabulary = {model.id_to_piece(i): i for i in range(len(model))}
    begin = [{"SpecialToken": {"id": "<s>", "type_id": kind}} for kind in (0, 1)]
    text = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, **token} for i, token in special.items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replacing(" ", "▁")]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin[0], text[0]],
            "pair": [begin[0], text[0], begin[1], text[1]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replacing("▁", " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges(model, vocabulary),
        },
    }


def replacing(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def merges(model, vocabulary):
    """Of each piece all pairs of pieces that make it, best pieces first: SentencePiece scores pieces, where this format lists merges."""
    pairs = []
    for piece in sorted(vocabulary, key=lambda piece: -model.get_score(vocabulary[piece])):
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        pairs += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return pairs
