from jobs.ray_cluster.worker_setup import find_interface


def test_the_interface_of_an_address_is_found() -> None:
    assert find_interface("127.0.0.1") == "lo"
    assert find_interface("192.0.2.77") is None
