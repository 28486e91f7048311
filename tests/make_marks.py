"""Makes tests/fixtures/marks.png: every kind of mark in several ways, as drawn once and looked at.

python -m tests.make_marks
"""

from pathlib import Path

from PIL import Image

from marks import draw_marks, parse_mark

FILE = Path(__file__).parent / "fixtures" / "marks.png"
SIZE = (84, 63)  # a quarter of 336: the default width of 3 is less than a pixel, which is drawn as one
MARKS = [
    "red rectangle 10,8,70,50",
    "lime rectangle 0,0,84,63 width=20 alpha=255",
    "blue ellipse 0.1,0.1,0.9,0.9 width=12",
    "yellow triangle 10,50,40,8,78,58 width=8 alpha=200",
    "fuchsia triangle 10,8,70,50",
    "aqua point 40,30",
    "orange point 10,8,70,50 width=40 aspect=2 alpha=255",
    "purple scribble 5,5 60,12 20,50 80,58 40,2 width=12",
    "gold arrow 20,20 alpha=255",
    "#20c0ff arrow 42,31 angle=200 length=120 head=0.2 bent=12 width=12",
    "red mask 10,10 70,20 60,55 30,30",
    "lime mask 20,10,60,50 alpha=48",
    "blue mask contour 10,10 70,20 60,55 30,30 alpha=255",
    "#808000 mask contour 20,10,60,50 width=8",
]
COLUMNS = 2


def sheet():
    """All marks, each on its own small picture, on one."""
    width, height = SIZE
    page = Image.new("RGB", (width * COLUMNS, height * -(-len(MARKS) // COLUMNS)))
    for n, mark in enumerate(MARKS):
        picture = draw_marks(Image.linear_gradient("L").resize(SIZE), [parse_mark(mark)])
        page.paste(picture, (n % COLUMNS * width, n // COLUMNS * height))
    return page


if __name__ == "__main__":
    sheet().save(FILE, optimize=True)
