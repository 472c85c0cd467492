"""What tests of kernels leave as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ssmprune_cli.kernels import use_backend


@pytest.fixture(autouse=True)
def restore_backend_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    use_backend("auto")
    torch.set_num_threads(threads)
