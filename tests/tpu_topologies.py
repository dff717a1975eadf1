"""Devices of TPU topologies that programs are compiled for on a host without a TPU."""

import pytest
from jax.experimental import topologies


def devices(topology):
    """The devices of, say, "v5e:4x4"; needs libtpu."""
    with pytest.MonkeyPatch.context() as patch:
        # Without it libtpu asks a cloud metadata server which machine it is on, and waits.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests run in several processes
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
