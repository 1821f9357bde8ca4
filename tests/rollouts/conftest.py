import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
    """Samplers are compiled whole."""
