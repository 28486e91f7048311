"""Many questions at once, and the benchmarks' own measures.

    python evaluate.py --model MODEL --questions llava_pope_test.jsonl --images val2014 --answers OUT.jsonl
    python evaluate.py --score pope --questions llava_pope_test.jsonl --answers OUT.jsonl --annotations coco
    torchrun --nproc-per-node 4 evaluate.py --model …              # the questions are shared out to four GPUs
    python evaluate.py --submit vqav2 --questions FILE --answers OUT.jsonl --out UPLOAD.json

Run again, the first goes on where it was stopped. The files are those of the original authors' evaluation; docs/evaluate.md says which.
"""

import argparse
import hashlib
import json
import os
import sys
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.answers import join_parts, open_for_lines, part_path, read_answers, read_parts
from benchmarks.measures import MEASURES, PUBLISHED, interval
from benchmarks.questions import read_questions
from benchmarks.submissions import SUBMISSIONS
from chat import Chat
from hardware.device import choose_device, choose_dtype
from llava import Llava
from loading import apply_options
from tokenizer import STYLES
from training.lora import WEIGHTS
from weights.checkpoint import checkpoint_folder
from weights.config import LlavaConfig
from weights.load import outline
from weights.quantize import GROUPS


def load(args):
    """The chat that answers; of several processes each has a GPU of its own."""
    folder = checkpoint_folder(args.model)
    config = LlavaConfig.from_pretrained(folder)
    device = choose_device(args.device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    parameters = sum(parameter.numel() for parameter in outline(Llava, config).parameters())
    dtype = choose_dtype(device, parameters) if args.dtype == "auto" else getattr(torch, args.dtype)
    chat = Chat.from_pretrained(folder, device, dtype, args.quantize)
    apply_options(chat, folder, args)
    return chat


def checkpoint_hash(folder, adapter=None):
    """The first 16 digits of the SHA-256 of all weights, the adapter's too: it tells one training run's model from another's."""
    digest, files = hashlib.sha256(), sorted(checkpoint_folder(folder).glob("*.safetensors"))
    for path in files + ([] if adapter is None else [checkpoint_folder(adapter) / WEIGHTS]):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def description(chat, args):
    """What the answers depend on. It is written beside each, so that those of another model or of other settings are not mixed in."""
    return {
        "checkpoint": checkpoint_hash(args.model, args.adapter),
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "quantize": args.quantize or chat.model.config.quantized,
        "prompt": chat.prompt("…", []),
        "pad": chat.pad,
        "max_new_tokens": args.max_new_tokens,
    }


def refuse_missing_pictures(questions, folder):
    """Raises FileNotFoundError before anything is asked."""
    names = {image for question in questions for image in question.images if isinstance(image, str)}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of the {len(names)} pictures, {missing[0]} first")


def answer_all(chat, questions, args, settings, path, shown):
    """Append the answers to questions {number: Question} to a file, each as soon as it is there, with its question's number.

    Returns how many could not be asked.
    """
    numbers, unreadable, failed = list(questions), {}, 0

    def asked():
        for number, question in questions.items():
            try:
                yield question.text, question.pictures(args.images)
            except (ValueError, OSError) as error:  # a damaged picture: the others are asked all the same
                unreadable[number] = error
                yield question.text, None

    answers = chat.answer(asked(), args.batch_size, args.max_new_tokens, literal=True, numbered=True)
    with open_for_lines(path) as file:
        for n, text in tqdm(answers, total=len(questions), desc="asking", unit="question", disable=not shown):
            question = questions[numbers[n]]
            line = {
                "number": numbers[n],
                "question_id": question.id,
                "prompt": question.prompt,
                "text": text.strip(),
                "answer_id": uuid.uuid4().hex,
                "model_id": Path(args.model).name,
                "metadata": settings,
            }
            error = unreadable.get(numbers[n]) or getattr(text, "error", None)
            if error is not None:
                line["error"], failed = str(error), failed + 1
                print(f"evaluate.py: question {question.id!r} could not be asked: {error}", file=sys.stderr)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    return failed


def run(args, rank=0, size=1):
    """Answer the questions that have no answer yet; process `rank` of `size` every size-th of them. Returns how many failed.

    Answers end in another order than they were asked in. Until all are there, each process keeps its own in a part beside the file.
    """
    questions = read_questions(args.questions, args.suffix)
    refuse_missing_pictures(questions, args.images)
    if not args.answers.parent.is_dir():
        raise FileNotFoundError(f"{args.answers.parent}: no such folder, to write the answers to")
    chat = load(args)
    settings = description(chat, args)
    done = read_answers(args.answers, questions, settings)
    early = read_parts(args.answers, questions, settings)
    left = [n for n in range(len(done), len(questions)) if n not in early]
    meet(size)  # nobody writes before all have read
    failed, share = 0, {n: questions[n] for n in left[rank::size]}
    if share:
        failed = answer_all(chat, share, args, settings, part_path(args.answers, rank), rank == 0)
    meet(size)
    if rank == 0:
        join_parts(args.answers, questions, settings, len(done))
    return failed


def meet(size):
    """Wait for all processes."""
    if size > 1:
        dist.barrier()


def whole_answers(args):
    """The questions and all their answers. Raises ValueError if some are missing."""
    questions = read_questions(args.questions, args.suffix)
    answers = read_answers(args.answers, questions)
    if len(answers) < len(questions):
        raise ValueError(f"{args.answers} holds {len(answers)} answers to {len(questions)} questions; run evaluate.py to the end first")
    return questions, answers


def score(args):
    """Print one row: the measure, its interval, the published numbers, and what the answers were given with."""
    questions, answers = whole_answers(args)
    measured = MEASURES[args.score](questions, answers, args.annotations)
    result, (low, high) = measured.result(measured.rows), interval(measured)
    settings = answers[0].get("metadata") or {}
    published = ["–" if number is None else f"{number}" for number in PUBLISHED[args.score]]
    failed = sum("error" in answer for answer in answers)
    cells = {
        "benchmark": args.score,
        "result": f"{result:.1f}",
        "95 % interval": f"{low:.1f} … {high:.1f}",
        "LLaVA-1.5 7B, 13B": ", ".join(published[:2]),
        "ViP-LLaVA 7B, 13B": ", ".join(published[2:]),
        "questions": len(questions),
        "counted": len(measured.rows),
        "unreadable": measured.unreadable,
        "not asked": failed,
        "checkpoint": settings.get("checkpoint", "?"),
        "dtype": settings.get("quantize") or settings.get("dtype", "?"),
        "prompt": json.dumps(settings.get("prompt", "?"), ensure_ascii=False),
    }
    print("| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|")
    print("| " + " | ".join(str(cell) for cell in cells.values()) + " |")
    print("published: LLaVA-1.5, https://arxiv.org/abs/2310.03744; ViP-LLaVA, https://arxiv.org/abs/2312.00784")


def argument_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help=".jsonl, .json or MMBench's .tsv")
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help="written; read by --score and --submit")
    parser.add_argument("--suffix", metavar="TEXT", help="a line after each question, as ScienceQA and MMBench need one")
    parser.add_argument("--model", help="checkpoint folder, or name on the Hugging Face hub")
    parser.add_argument("--adapter", metavar="DIR", help="what train.py --lora made for this model, or PEFT")
    parser.add_argument("--images", type=Path, default=Path("."), metavar="DIR", help="where the pictures are [.]")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at once [8]")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="length of an answer at the most [128]")
    parser.add_argument("--style", choices=STYLES, help="the chat format [the checkpoint's]")
    parser.add_argument("--system", metavar="TEXT", help="a system sentence in place of the format's own")
    parser.add_argument(
        "--pad", action=argparse.BooleanOptionalAction, help="pad pictures to a square, or crop them [as config.json says; else crop]"
    )
    parser.add_argument("--device", default="auto", help="cuda (or cuda:1 …), mps or cpu [the first of them that is there]")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="[what is fast on the device]")
    parser.add_argument("--quantize", choices=GROUPS, help="the language model's weights in 8 or 4 bits [as stored]")
    parser.add_argument("--score", choices=MEASURES, help="measure the answers")
    parser.add_argument("--annotations", type=Path, metavar="PATH", help="the benchmark's own file or folder, for --score")
    parser.add_argument("--submit", choices=SUBMISSIONS, help="write the answers as the benchmark's server or judge takes them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for --submit")
    return parser


def start(args):
    """Do what is asked for. Returns how many questions could not be asked. Raises ValueError or OSError."""
    if args.score:
        if args.annotations is None and args.score not in ("v7w", "pointqa"):
            raise ValueError(f"--score {args.score} needs --annotations; docs/evaluate.md says which")
        score(args)
    elif args.submit:
        if args.out is None:
            raise ValueError("--submit needs --out, the file to write")
        SUBMISSIONS[args.submit](*whole_answers(args), args.out)
    elif args.model is None:
        raise ValueError("give --model to answer, or --score or --submit for what is answered")
    else:
        size = int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1
        if size == 1:
            return run(args)
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the fastest waits for the slowest
        failed = run(args, dist.get_rank(), size)
        dist.destroy_process_group()
        return failed
    return 0


def main():
    args = argument_parser().parse_args()
    try:
        failed = start(args)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {' '.join(str(error).split())}")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sys.exit("evaluate.py: the device ran out of memory; what is answered is kept, and a smaller --batch-size goes on from there")
    except KeyboardInterrupt:
        sys.exit(f"evaluate.py: stopped; what is answered is kept beside {args.answers}, and the same command goes on")
    if failed:
        sys.exit(f'evaluate.py: {failed} questions could not be asked; their answers are empty, with an "error" beside them')


if __name__ == "__main__":
    main()
