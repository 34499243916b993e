from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def real_root():
    root = os.environ.get("FFF_DATA_DIR")
    if not root:
        pytest.skip("FFF_DATA_DIR is not set: no real image sets")
    return root


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One cache for all tests of a session, so that each real set is decoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
