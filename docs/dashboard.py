"""Draw a run's wandb panels from the file that an offline run leaves: python -m docs.dashboard RUN PNG.

It made docs/dashboard.png; after `wandb sync` a browser shows the same series on wandb's own page.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.faults.test_launch_dashboard import offline_records, series_of

PANELS = {
    "training loss": ("loss", "focal", "bce"),
    "validation macro AUROC": ("validation/auroc_macro",),
    "validation AUROC per label": ("validation/auroc/",),
    "validation loss": ("validation/loss",),
    "learning rate per group": ("lr/",),
    "gradient norm": ("grad_norm",),
    "loss scale, skipped steps": ("loss_scale", "skipped"),
    "images/s": ("images_per_s", "rank"),
    "share of time waiting for data": ("wait_share",),
}


def main(run: Path, picture: Path) -> None:
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = series_of(offline_records(path))
    series = {name: row for name, row in rows.items() if isinstance(row[0][1], int | float)}
    figure, axes = plt.subplots(3, 3, figsize=(15, 9), layout="constrained")
    for axis, (title, wanted) in zip(axes.flat, PANELS.items(), strict=True):
        names = [name for name in sorted(series) if any(_belongs(name, word) for word in wanted)]
        for name in names:
            steps, values = zip(*series[name], strict=True)
            axis.plot(steps, values, label=name.removeprefix("validation/auroc/"), linewidth=1.4)
        axis.set_title(title, fontsize=11, fontweight="bold")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if len(names) > 1:
            axis.legend(fontsize=6, ncols=2 if len(names) > 6 else 1)
    figure.suptitle(f"{run.name}: {path.name}", fontsize=12)
    figure.savefig(picture, dpi=75)


def _belongs(name: str, word: str) -> bool:
    if word == "rank":
        return name.startswith("rank") and name.endswith("images_per_s")
    return name.startswith(word) if word.endswith("/") else name == word


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
