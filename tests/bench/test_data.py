import json

from cxrdist.bench.__main__ import main


def test_the_loader_benchmark_runs_and_names_what_is_not_installed(capsys, tmp_path):
    main(["data", "--num-images", "8", "--batch-size", "4", "--rounds", "1", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    by_name = {(row["stage"], row["variant"]): row for row in rows}
    loader = by_name["one core", "cxrdist loader"]
    assert loader["images_per_s"] > 0
    assert loader["ratio_to_limit"] > 0
    assert {"one core", "check of a read", "all cores", "memory", "plan an epoch"} <= {row["stage"] for row in rows}
    assert by_name["check of a read", "XXH3"]["note"].endswith("% of a decode")
    for package, names in {"albumentations": "published loader", "litdata": "litdata"}.items():
        row = by_name.get(("one core", names))
        assert row is None or row["images_per_s"] or row["note"] == f"skipped: {package} is not installed"
    assert "cxrdist loader" in capsys.readouterr().out
