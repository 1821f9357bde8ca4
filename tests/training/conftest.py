import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
    """Steps are compiled whole."""
