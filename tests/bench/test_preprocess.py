"""The preprocessing benchmark, in small: every path runs and keeps what its note claims."""

import argparse

import pytest

from cxrdist.bench import preprocess
from cxrdist.shards.dicom import dicom_available


@pytest.mark.slow
def test_the_benchmark_reports_identical_pixels() -> None:
    parser = argparse.ArgumentParser()
    preprocess.add_arguments(parser)
    rows = preprocess.run(parser.parse_args(["--size-px", "2400", "--num-images", "1", "--rounds", "2"]))
    with_dicom = ["skipped"] * 2 if dicom_available() else ["pydicom", "exact"] * 2
    assert [row.variant for row in rows] == ["published", "exact", "fast"] * 3 + with_dicom
    assert all(row.note == "1 of 1 images have the published pixels" for row in rows[:9] if row.variant == "exact")
