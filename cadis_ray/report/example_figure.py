"""Images, their noisy copies and what the denoiser makes of them, with the base classifier's confidence in each."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cadis_ray.report.figures import OTHERS, STYLE
from cadis_ray.results import Examples

WRONG = OTHERS[0]
SIDE = 0.85  # inches of an image


def example_grid(examples: Examples) -> Figure:
    """A column an image; wrong answers are framed and said in colour. Values are clamped to [0, 1] to be shown."""
    lines = {"clean": examples.clean, "noisy": examples.noisy}
    if not np.array_equal(examples.seen, examples.noisy):
        lines["denoised"] = examples.seen
    columns = len(examples.idx)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(SIDE * columns + 0.6, SIDE * len(lines) + 1))
        panels = figure.subplots(len(lines), columns, squeeze=False)
        for line, (name, images) in zip(panels, lines.items(), strict=True):
            line[0].set_ylabel(name)
            for axes, image in zip(line, images, strict=True):
                axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, "gray", vmin=0, vmax=255,
                            interpolation="none")  # fmt: skip
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
        for column, axes in enumerate(panels[-1]):
            label, predict = int(examples.label[column]), int(examples.predict[column])
            text = f"{predict}: {100 * examples.confidence[column]:.0f}%"
            if wrong := label != predict:
                text += f"\nnot {label}"
                axes.spines[:].set(visible=True, color=WRONG, linewidth=2)
            axes.set_xlabel(text, color=WRONG if wrong else "black")
        figure.suptitle("What the base classifier is shown, and its answer", x=0.01, ha="left", size=11, weight="bold")
    return figure
