"""The pictures of the walkthrough. What they show is computed in the notebook; here it is drawn, and said in words for those who
cannot see it."""

import base64
import io
from itertools import groupby

GREY = (0.5, 0.5, 0.5)


def show(figure, words):
    """Put a figure below its cell. words: what a screen reader says in its place."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)
    picture = base64.b64encode(file.getvalue()).decode()
    display({"image/png": picture, "text/plain": words}, metadata={"image/png": {"alt": words}}, raw=True)


# ---------------------------------------------------------------------------------------------------------- in words


def words_of_panels(grids, captions):
    """The captions, and where each heat map is brightest, its rows and columns counted from 1."""
    said = []
    for grid, caption in zip(grids, captions):
        caption = " ".join(caption.split())
        if hasattr(grid, "tolist"):
            row, column = divmod(int(grid.argmax()), grid.shape[1])
            caption += f", brightest in row {row + 1}, column {column + 1}"
        said.append(caption)
    return "; ".join(said)


def words_of_pages(pages, captions):
    """All words, page by page and row by row."""
    said = []
    for page, caption in zip(pages, captions):
        rows = (f"row {n}: {' '.join(words)}" for n, words in enumerate(page, 1))
        said.append(f"{caption}: {'; '.join(rows)}")
    return ". ".join(said)


def words_of_strip(colours, labels, positions, legend):
    """Each run of cells of one colour: what it is, its positions and its labels."""
    said = []
    for colour, run in groupby(range(len(colours)), key=lambda n: colours[n]):
        run = [*run]
        texts = " ".join(labels[n] for n in run if labels[n])
        said.append(f"positions {positions[run[0]]} to {positions[run[-1]]}, {legend[colour]}: {texts}".removesuffix(": "))
    return "; ".join(said)


def words_of_slots(stages):
    """The rows of each stage, slot by slot."""
    said = []
    for caption, rows in stages:
        for n, row in enumerate(rows, 1):
            cells = ["free" if cell is None else cell if cell == "pad" else f"{cell[0]} at {cell[1]}" for cell in row]
            said.append(f"{caption}, row {n}: {', '.join(cells)}")
    return "; ".join(said)


def words_of_bars(charts):
    """Each chart's words and probabilities."""
    said = []
    for caption, chart in charts.items():
        shares = (f"{word} {100 * float(share):.0f} %" for word, share in chart.items())
        said.append(f"{caption}: {', '.join(shares)}")
    return "; ".join(said)


def words_of_lines(curves):
    """Where each curve begins, ends and has its lowest and highest point."""
    said = []
    for name, numbers in curves.items():
        values = [float(number) for number in numbers]
        low, high = min(values), max(values)
        said.append(f"{name}: from {values[0]:.3g} to {values[-1]:.3g} in {len(values)} points, lowest {low:.3g}, highest {high:.3g}")
    return "; ".join(said)


# ------------------------------------------------------------------------------------------------------------- drawn


def panels(grids, captions, title, columns=8, under=None, colours="viridis", limits=None, scale=1.6, shows=None):
    """Small pictures side by side, each with its caption.

    grids: PIL pictures, or tensors (rows, columns) that are drawn as heat maps, each with a scale of its own.
    under: a PIL picture to lay a faint copy of below each heat map. limits: (lowest, highest) for all heat maps together.
    shows: what is to be seen, in words; without it the captions are said, and where each heat map is brightest.
    """
    import matplotlib.pyplot as plt

    columns = min(columns, len(grids))
    rows = -(-len(grids) // columns)
    size = max(5, scale * columns), (scale + 0.25) * rows + 0.5  # wide enough for the title
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.suptitle(title)
    for axis in axes.flat:
        axis.axis("off")
    low, high = limits or (None, None)
    for axis, grid, caption in zip(axes.flat, grids, captions):
        axis.set_title(caption, fontsize=8)
        if not hasattr(grid, "tolist"):
            axis.imshow(grid)
            continue
        height, width = grid.shape
        box = (0, width, height, 0)
        if under is not None:
            axis.imshow(under, extent=box)
        axis.imshow(grid.float().cpu(), extent=box, cmap=colours, vmin=low, vmax=high, alpha=1 if under is None else 0.75)
    figure.tight_layout()
    show(figure, f"{title}. {shows or words_of_panels(grids, captions)}.")


def patch_lines(picture, grid, chosen, title):
    """A picture with the borders of its patches, and the chosen patch enlarged beside it: (row, column), counted from 0."""
    import matplotlib.pyplot as plt

    figure, (whole, one) = plt.subplots(1, 2, figsize=(6, 3.4))
    figure.suptitle(title)
    size, (row, column) = picture.width / grid, chosen
    box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
    whole.imshow(picture, extent=(0, picture.width, picture.height, 0))
    for n in range(grid + 1):
        whole.axhline(n * size, color=GREY, linewidth=0.7)
        whole.axvline(n * size, color=GREY, linewidth=0.7)
    whole.add_patch(plt.Rectangle(box[:2], size, size, fill=False, edgecolor="red", linewidth=2))
    one.imshow(picture.crop(tuple(map(round, box))))
    whole.set_title(f"{grid} × {grid} patches", fontsize=9)
    one.set_title(f"the patch in row {row + 1}, column {column + 1}", fontsize=9)
    whole.axis("off")
    one.axis("off")
    figure.tight_layout()
    which = f"the patch in row {row + 1}, column {column + 1}"
    show(figure, f"{title}. A picture in {grid} × {grid} patches; {which} is framed, and enlarged beside it.")


def words_on_patches(picture, pages, captions, title):
    """The picture, once for each page, with a word on each patch. pages: lists of rows of words."""
    import matplotlib.pyplot as plt

    columns = min(2, len(pages))
    rows = -(-len(pages) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 5.4 * rows + 0.4), squeeze=False)
    figure.suptitle(title)
    for axis, page, caption in zip(axes.flat, pages, captions):
        grid = len(page)
        axis.imshow(picture, extent=(0, grid, grid, 0), alpha=0.45)
        for row, words in enumerate(page):
            for column, word in enumerate(words):
                axis.text(column + 0.5, row + 0.5, word, ha="center", va="center", fontsize=7.5)
        axis.set_title(caption, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    show(figure, f"{title}. {words_of_pages(pages, captions)}.")


def strip(colours, labels, positions, title, legend):
    """A row of coloured cells, each with a label and its position below. legend: {colour: what it means}."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 2.1))
    axis.bar(range(len(colours)), 1, width=1, color=colours, edgecolor="white", linewidth=0.5)
    for n, label in enumerate(labels):
        axis.text(n, 0.5, label, ha="center", va="center", rotation=90, fontsize=7)
    axis.set(title=title, yticks=[], xlim=(-0.5, len(colours) - 0.5), ylim=(0, 1))
    axis.set_xticks(range(len(colours)), positions, fontsize=7)
    keys = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in legend]
    axis.legend(keys, legend.values(), fontsize=8, ncols=len(legend), loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.tight_layout()
    show(figure, f"{title}. {words_of_strip(colours, labels, positions, legend)}.")


def slots(stages, title):
    """What the slots of a cache hold, stage by stage. stages: [(caption, rows)], a row a list of (text, position) for slots
    that hold a real token, "pad" for padding and None for what is not taken yet."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(stages), 1, figsize=(11, 1.25 * len(stages) + 0.4))
    figure.suptitle(title)
    for axis, (caption, rows) in zip(axes, stages):
        for y, row in enumerate(rows):
            for x, cell in enumerate(row):
                colour = "white" if cell is None else "lightgrey" if cell == "pad" else "lightblue"
                axis.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="black", linewidth=0.5))
                text = "" if cell is None else "pad" if cell == "pad" else f"{cell[0]}\n{cell[1]}"
                axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7)
        axis.set(xlim=(0, len(rows[0])), ylim=(len(rows), 0), yticks=[], xticks=[])
        axis.set_title(caption, fontsize=9, loc="left")
    figure.tight_layout()
    show(figure, f"{title}. {words_of_slots(stages)}.")


def bars(charts, title, dots=None):
    """Bar charts side by side with one scale. charts: {caption: {word: probability}}; dots: the same, drawn as points."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(charts), figsize=(3 * len(charts), 2.8), sharey=True, squeeze=False)
    figure.suptitle(title)
    for axis, (caption, chart) in zip(axes.flat, charts.items()):
        axis.bar(range(len(chart)), chart.values(), color="lightblue", edgecolor="black", linewidth=0.5)
        if dots is not None:
            axis.plot(range(len(chart)), dots[caption].values(), "k.", markersize=5)
        axis.set_xticks(range(len(chart)), chart, rotation=60, fontsize=7)
        axis.set_title(caption, fontsize=9)
    axes[0, 0].set_ylabel("probability")
    figure.tight_layout()
    show(figure, f"{title}. {words_of_bars(charts)}.")


def lines(curves, title, x, y, log=False):
    """Curves over their index. curves: {name: numbers}."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 2.8))
    for name, numbers in curves.items():
        axis.plot(numbers, label=name, linewidth=1.2)
    axis.set(title=title, xlabel=x, ylabel=y, yscale="log" if log else "linear")
    if len(curves) > 1:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    show(figure, f"{title}. {words_of_lines(curves)}.")
