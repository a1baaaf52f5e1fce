from __future__ import annotations

import pytest

from hild_xr.variables import DIMS, LAYER_DIMS, SCHEMA_VERSION, VARIABLES, attrs, variable


def test_registry__says_of_every_variable_what_it_is() -> None:
    for name, declared in VARIABLES.items():
        assert declared.name == name
        assert declared.description.endswith(".")
        assert declared.long_name
        assert declared.units
        assert set(declared.dims) <= {*DIMS, LAYER_DIMS, "param_"}


def test_variable__suggests_the_nearest_name() -> None:
    with pytest.raises(KeyError, match="did you mean 'residuals'"):
        variable("residual")


def test_attrs__carry_label_units_sentence_and_version() -> None:
    found = attrs("principal_angles", source="test")
    assert found["units"] == "rad"
    assert found["schema_version"] == SCHEMA_VERSION
    assert found["source"] == "test"
