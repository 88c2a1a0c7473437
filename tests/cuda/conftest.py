import pytest
from cuda_tools import find_tool


@pytest.fixture(scope="session")
def nvcc() -> str:
    return find_tool("nvcc")


@pytest.fixture(scope="session")
def nvdisasm() -> str:
    return find_tool("nvdisasm")
