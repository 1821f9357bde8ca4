import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
    """Models are compiled whole, forwards and backwards."""
