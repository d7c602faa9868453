"""Save a wandb workspace with the panels of our trainings: `python -m cxrdist.training.dashboard ENTITY/PROJECT`.

Once a project, by someone who is logged in (`wandb login`); it adds a saved view and changes no run and no other view.
Runs are grouped as they were trained: folds of `cxrdist folds` together. Needs `pip install wandb-workspaces`.
"""

import importlib
import re
from typing import Any

from cxrdist.cli import Parser, run_entry
from cxrdist.errors import UserError

PANELS = {  # title -> which series, a pattern of their whole names
    "training loss": "loss|focal|bce|asl",
    "validation macro AUROC": "validation/auroc_macro",
    "validation AUROC per label": "validation/auroc/.+",
    "validation loss": "validation/loss",
    "learning rate per group": "lr/.+",
    "gradient norm": "grad_norm",
    "loss scale, skipped steps": "loss_scale|skipped",
    "images/s": "images_per_s|rank[0-9]+/images_per_s",
    "share of time waiting for data": "wait_share|shards_wait_share",
}
NEEDS = "a saved workspace needs: pip install wandb-workspaces"


def workspace(entity: str, project: str, name: str) -> Any:
    """The view as an object of wandb's library, not saved yet. UserError where the library is not installed."""
    try:
        reports: Any = importlib.import_module("wandb_workspaces.reports.v2")  # its types lack what it exports
        workspaces: Any = importlib.import_module("wandb_workspaces.workspaces")
    except ImportError:
        raise UserError(NEEDS) from None
    panels = [
        reports.LinePlot(title=title, x="step", metric_regex=f"^({names})$")
        if re.search(r"[|+]", names)
        else reports.LinePlot(title=title, x="step", y=[names])
        for title, names in PANELS.items()
    ]
    layout = workspaces.SectionLayoutSettings(columns=3, rows=3)
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[workspaces.Section(name="Training", panels=panels, is_open=True, layout_settings=layout)],
        settings=workspaces.WorkspaceSettings(x_axis="step"),
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")]),
    )


def main(argv: list[str] | None = None) -> None:
    flags = Parser(prog="python -m cxrdist.training.dashboard", description=__doc__)
    flags.add_argument("project", metavar="ENTITY/PROJECT", help="as the address of the project's page has them")
    flags.add_argument("--name", default="cxrdist", help="of the saved view (default %(default)s)")
    args = flags.parse_args(argv)
    entity, _, project = args.project.partition("/")
    if not entity or not project or "/" in project:
        flags.error(f"{args.project!r} is not ENTITY/PROJECT, e.g. my-team/cxrdist")
    view = workspace(entity, project, args.name)
    try:
        view.save()
        print(f"saved: {view.url}")
    except Exception as error:  # wandb's own, of many kinds
        raise UserError(
            f"{args.project}: wandb did not save it ({type(error).__name__}: {error}); `wandb login`?"
        ) from error


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
