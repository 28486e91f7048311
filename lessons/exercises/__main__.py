"""Check an exercise: python -m lessons.exercises 1        (--hint 1 shows a hint instead)

What you wrote in lessons/exercises/e1_….py takes the place of the real function, and the project's own tests run.
"""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from pkgutil import resolve_name

import pytest

from lessons.exercises import hint

# Of each exercise: its file, what of it takes whose place, and the tests that then have to pass.
STAGES = "tests/test_parity.py::test_every_stage"
EXERCISES = {
    1: ("e1_splice", {"splice": "llava.splice"}, [STAGES, "tests/test_parity.py::test_greedy_tokens"]),
    2: ("e2_projector", {"forward": "llava.Projector.forward"}, [STAGES]),
    3: (
        "e3_vision",
        {"forward": "clip.CLIPVision.forward"},
        [STAGES, "tests/test_generate.py::test_pictures_are_encoded_once_and_no_deeper_than_read"],
    ),
    4: ("e4_block", {"norm": "llama.RMSNorm.forward", "mlp": "llama.MLP.forward"}, [STAGES, "tests/test_parity.py::test_half_precision"]),
    5: ("e5_rope", {"rope_table": "llama.rope_table", "rotate": "llama.rotate"}, [STAGES, "tests/test_parity.py::test_given_positions"]),
    6: ("e6_attention", {"attention": "llama.attention"}, [STAGES, "tests/test_parity.py::test_greedy_tokens"]),
    7: ("e7_mask", {"visible": "llama.visible"}, [STAGES, "tests/test_parity.py::test_padded_row_equals_the_row_alone"]),
    8: (
        "e8_cache",
        {"take": "llama.KVCache.take", "update": "llama.LayerCache.update"},
        [
            "tests/test_parity.py::test_cache_changes_nothing_at_any_step",
            "tests/test_parity.py::test_prompt_in_two_pieces",
            "tests/test_generate.py",
        ],
    ),
    9: (
        "e9_prompt",
        {"encode_conversation": "training.data.encode_conversation"},
        [
            "tests/test_train.py::test_labels_are_the_assistants_words_and_the_end_mark",
            "tests/test_train.py::test_a_conversation_is_encoded_as_it_will_be_read",
            "tests/test_train.py::test_a_record_that_is_no_conversation_is_an_error",
        ],
    ),
    10: (
        "e10_sampling",
        {"sample": "generate.sample"},
        [
            "tests/test_generate.py::test_draws_follow_the_tempered_softmax",
            "tests/test_generate.py::test_top_k_and_top_p",
            "tests/test_generate.py::test_each_row_draws_for_itself_whatever_the_order_of_its_logits",
            "tests/test_generate.py::test_options_that_amount_to_greedy",
            "tests/test_generate.py::test_seed",
        ],
    ),
    11: (
        "e11_preprocessing",
        {"__call__": "images.ImageProcessor.__call__"},
        [
            "tests/test_images.py::test_pad_by_hand",
            "tests/test_images.py::test_pixels_equal_transformers_to_the_last_bit",
            "tests/test_images.py::test_a_batch_is_its_pictures",
            "tests/test_images.py::test_crop_may_be_smaller_than_the_resized_picture",
        ],
    ),
    12: (
        "e12_int4",
        {name: f"weights.quantize.{name}" for name in ("quantize_int4", "pack", "unpack")},
        ["tests/test_quantize.py", "-k", "steps or rounding or packing or multiply or unpacked"],
    ),
    13: (
        "e13_memory_speed",
        {"matrix_times_vector": "hardware.kernels.matrix_times_vector"},
        ["tests/test_cpu.py", "-k", "row_times_16 or row_times_8 or begin_anywhere"],
    ),
}


def place_of(name):
    """The owner and the attribute that a name like "llama.KVCache.take" stands for."""
    path, attribute = name.rsplit(".", 1)
    return resolve_name(path), attribute


def replace(number, solution=False):
    """Put the exercise's functions, or its solution's, in the places of the real ones."""
    file, places, _ = EXERCISES[number]
    written = import_module(f"lessons.exercises.{'solutions.' * solution}{file}")
    for name, place in places.items():
        setattr(*place_of(place), getattr(written, name))


NUMBA = {13}  # the exercises that need it


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("number", type=int, choices=EXERCISES, help="of the exercise")
    parser.add_argument("--solution", action="store_true", help="check the solution that is kept beside it instead")
    parser.add_argument("--hint", type=int, metavar="K", help="show the K-th hint, the mildest first, and check nothing")
    args = parser.parse_args()
    if args.hint is not None:
        try:
            return hint(args.number, args.hint)
        except ValueError as error:
            parser.error(str(error))
    if args.number in NUMBA and find_spec("numba") is None:
        sys.exit(f"Exercise {args.number} needs numba: pip install numba")
    replace(args.number, args.solution)
    status = pytest.main(["--quiet", "--exitfirst", "--tb=short", "--no-header", "-p", "no:cacheprovider", *EXERCISES[args.number][2]])
    print(f"Exercise {args.number}: " + ("right." if status == 0 else "not yet; what failed stands above."))
    sys.exit(status)


if __name__ == "__main__":
    main()
