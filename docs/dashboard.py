"""Draw a run's wandb panels from the file that an offline run leaves: python -m docs.dashboard RUN PNG.

It made docs/dashboard.png; after `wandb sync` a browser shows the same series on wandb's own page.
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cxrdist.training.dashboard import PANELS
from tests.faults.test_launch_dashboard import offline_records, series_of


def main(run: Path, picture: Path) -> None:
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = series_of(offline_records(path))
    series = {name: row for name, row in rows.items() if isinstance(row[0][1], int | float)}
    figure, axes = plt.subplots(3, 3, figsize=(15, 9), layout="constrained")
    for axis, (title, wanted) in zip(axes.flat, PANELS.items(), strict=True):
        names = [name for name in sorted(series) if re.fullmatch(wanted, name)]
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
