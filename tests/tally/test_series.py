"""The series that a training logs."""

from __future__ import annotations

import pytest
import torch

from neuronscope.tally.series import Series


def test_a_value_is_the_number_that_it_was_when_it_was_noted() -> None:
    series, loss, values = Series(), torch.tensor(3.0), {"loss": 0.0}
    series.note(1, {"loss": loss})
    loss.fill_(5.0)
    series.note(2, values)
    values["loss"] = 9.0
    assert series.points() == {"loss": ((1, 3.0), (2, 0.0))}


def test_what_is_no_number_is_refused_when_it_is_noted() -> None:
    series = Series()
    with pytest.raises(ValueError, match="could not convert"):
        series.note(1, {"loss": "low"})  # type: ignore[dict-item]
    assert series.points() == {}
