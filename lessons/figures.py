"""The pictures of the walkthrough. What they show is computed in the notebook; here it is only drawn."""

GREY = (0.5, 0.5, 0.5)


def panels(grids, captions, title, columns=8, under=None, colours="viridis", limits=None, scale=1.6):
    """Small pictures side by side, each with its caption.

    grids: PIL pictures, or tensors (rows, columns) that are drawn as heat maps, each with a scale of its own.
    under: a PIL picture to lay a faint copy of below each heat map. limits: (lowest, highest) for all heat maps together.
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
    plt.show()


def patch_lines(picture, grid, chosen, title):
    """A picture with the borders of its patches, and the chosen patch (row, column) enlarged beside it."""
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
    one.set_title(f"the patch in row {row}, column {column}", fontsize=9)
    whole.axis("off")
    one.axis("off")
    figure.tight_layout()
    plt.show()


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
    plt.show()


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
    plt.show()


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
    plt.show()


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
    plt.show()


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
    plt.show()
