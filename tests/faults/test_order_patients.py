"""FAULTS row 33, second half: a patient in both training and validation is named, with both places."""

import numpy as np
import pytest

from cxrdist.data.folds import read_split, write_split
from cxrdist.errors import UserError
from cxrdist.shards.columns import Texts
from cxrdist.task import TASKS

pytestmark = pytest.mark.fault


def test_a_split_edited_in_a_spreadsheet_that_lists_a_patient_twice_is_named_with_both_lines(tmp_path):
    path = tmp_path / "split.csv"
    path.write_text("patient,fold\n00000211,0\n00000300,1\n211,1\n")
    with pytest.raises(UserError, match=r"patient 00000211 is in fold 0 \(line 2\) and in fold 1 \(line 4\)"):
        read_split(path, TASKS["b"])


def test_folds_that_part_a_patient_are_refused_before_anything_is_written(tmp_path):
    patients = Texts(["00000001", "00000002", "00000001"])
    with pytest.raises(UserError, match="patient 00000001 would be in folds 0 and 1"):
        write_split(tmp_path / "split.csv", patients, np.array([0, 0, 1]))
    assert list(tmp_path.iterdir()) == []
