"""Settings of every test: hypothesis draws the same examples each time, and no deadline fails a busy machine."""

import os
from pathlib import Path

import hypothesis
import pytest

from sparsefold import _native

hypothesis.settings.register_profile("sparsefold", derandomize=True, deadline=None, max_examples=100)
hypothesis.settings.load_profile("sparsefold")


@pytest.fixture(params=_native.available_isas())
def isa(request):
    """Every instruction set of this processor in turn."""
    return request.param


@pytest.fixture(scope="session")
def data_folder():
    """A function: name of a corpus or model -> its folder below SPARSEFOLD_DATA; the test is skipped where it is missing."""

    def find(name: str) -> Path:
        root = os.environ.get("SPARSEFOLD_DATA")
        if not root:
            pytest.skip(f"SPARSEFOLD_DATA is not set: set it to a folder that holds {name} to run this test.")
        folder = Path(root) / name
        if not folder.is_dir():
            pytest.skip(f"SPARSEFOLD_DATA is set, but {folder} is not a folder.")
        return folder

    return find
