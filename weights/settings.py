"""The files that stand beside the weights of a checkpoint, as transformers reads them too: tokenizer, preprocessor, generation."""

import json

from sentencepiece import SentencePieceProcessor

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
}


def fast_tokenizer(model, special_tokens):
    """tokenizer.json, which transformers reads and their folders lack. model: a SentencePieceProcessor; special_tokens: {literal: id}.

    SentencePiece scores pieces, this format lists merges: of each piece all pairs that make it, best pieces first.
    """
    pieces, merges = {model.id_to_piece(i): i for i in range(len(model))}, []
    for piece in sorted(pieces, key=lambda piece: -model.get_score(pieces[piece])):
        pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
        merges += sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin, space = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"String": " "}
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": literal, **flags} for literal, i in special_tokens.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": space, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [special_tokens["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": pieces, "merges": merges},
    }


def write_settings(out, config, tokenizer_model):
    """Write what stands beside the weights: config, generation, tokenizer, preprocessor. As transformers reads it, too."""
    image, pad, side = config["image_token_index"], config["pad_token_id"], config["vision_config"]["image_size"]
    special_tokens = {"<unk>": 0, "<s>": config["bos_token_id"], "</s>": config["eos_token_id"], "<image>": image, "<pad>": pad}
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer",
        "processor_class": "LlavaProcessor",
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
        "added_tokens_decoder": {
            str(i): {"content": literal, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
            for literal, i in special_tokens.items()
        },
    }
    files = {
        "config.json": config,
        "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "added_tokens.json": {"<image>": image, "<pad>": pad},
        "tokenizer_config.json": tokenizer,
        "tokenizer.json": fast_tokenizer(SentencePieceProcessor(model_file=str(tokenizer_model)), special_tokens),
        "preprocessor_config.json": PREPROCESSOR | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": config["vision_config"]["patch_size"],
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
