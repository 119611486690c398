"""A program on throttled hosts returns its result, or why it failed."""

import pytest

import throttled

pytestmark = pytest.mark.cluster


def test_a_program_gives_each_hosts_last_line_and_a_failure_its_log(clusters, tmp_path):
    hosts = clusters(2)
    code = "import json, socket; print('first'); print(json.dumps(socket.gethostname()))"
    names = throttled.run_on(hosts, tmp_path, 2, ["-c", code], joined=False)
    assert names == ["node0", "node1"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        throttled.run_on(hosts, tmp_path, 1, ["-c", "1 / 0"], joined=False)
