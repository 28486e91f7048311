"""A page that shows, for each word of an answer, where in the picture the model looked and which words it weighed.

    python -m lessons.explain -o explained.html                      # the bundled picture, question and model
    python -m lessons.explain --image photo.jpg --model … "What is this?" -o explained.html

The arguments are sample.py's. What the page shows is made by explanation.py.
"""

from pathlib import Path

import sample
from explanation import page


def main():
    parser = sample.argument_parser("python -m lessons.explain", __doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("explained.html"), help="the page [explained.html]")
    parser.add_argument("--cells", type=int, default=8, metavar="N", help="grey the picture in N × N cells, one after the other [8]")

    def write(chat, args, images, marks):
        if args.chat:
            raise ValueError("--chat: the page is of one question")
        if args.cells < 1:
            raise ValueError(f"--cells is {args.cells}; expected at least 1")
        options = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
        args.out.write_text(page(chat, args.question, images, args.cells, **options), encoding="utf-8")
        print(args.out)

    sample.run(parser, write)


if __name__ == "__main__":
    main()
