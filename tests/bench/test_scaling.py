import json

import pytest

from cxrdist.bench.__main__ import main
from cxrdist.errors import UserError


@pytest.mark.slow
def test_the_scaling_benchmark_runs_every_kind_and_names_a_failed_training(tmp_path):
    small = ["scaling", "--model", "eva_x_tiny", "--image-size", "64", "--rounds", "1", "--batch-size", "4"]
    main([*small, "--json", str(tmp_path / "rows.json")])
    one, separate, two = json.loads((tmp_path / "rows.json").read_text())
    assert [row["variant"].split(", ")[1] for row in (one, separate, two)] == [
        "one process",
        "two separate",
        "two processes",
    ]
    assert one["ratio_to_limit"] is None
    for row in (separate, two):
        assert row["ratio_to_baseline"] == pytest.approx(row["images_per_s"] / one["images_per_s"])
        assert row["ratio_to_limit"] == pytest.approx(row["ratio_to_baseline"] / 2)
    with pytest.raises(UserError, match="image_size"):
        main([*small, "--image-size", "63"])
