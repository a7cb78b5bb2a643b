"""Fixtures of the family tests."""

from __future__ import annotations

import logging

import pytest
from tiny_pipelines import CASES, Case


@pytest.fixture(autouse=True)
def quiet_libraries(caplog):
    caplog.set_level(logging.ERROR, logger="diffusers")
    caplog.set_level(logging.ERROR, logger="transformers")


@pytest.fixture(params=list(CASES))
def case(request) -> Case:
    """Each family in turn."""
    return CASES[request.param]
