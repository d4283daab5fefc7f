"""Fixtures that several test files share, and the marker of the slow tests."""

import helpers  # first: it sets the environment of the libraries
import pytest
import torch


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    return helpers.build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(params=helpers.TRAINERS)
def trainer(request):
    """Each trainer in turn, a module."""
    return helpers.TRAINERS[request.param]


@pytest.fixture
def args(trainer, toy_folder):
    """The constants of `trainer`, with values for the toy."""
    return helpers.constants(trainer, toy_folder)


@pytest.fixture
def one_rank(monkeypatch):
    """torch.distributed as if this process were the only rank."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: launches processes, or takes some seconds")
