import pytest

from tests.programs.runs import make_clips


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """Three tiny clips with captions and labels."""
    return make_clips(tmp_path_factory.mktemp("clips"))
