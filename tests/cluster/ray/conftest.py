"""A client of the session's Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.ray.client import Client, connect

if TYPE_CHECKING:
    from tests.cluster.conftest import RayCluster


@pytest.fixture(scope="module")
def client(ray_cluster: RayCluster) -> Client:
    return connect(ray_cluster.address, ray_cluster.environ)
