"""What goes wrong under a run on KubeRay, done to it for real, and what the person reads.

The driver is a probe that prints numbered lines. What takes minutes is in
`test_long_faults.py`; `docs/faults.md` has the transcripts.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kubernetes.client.exceptions import ApiException

from tests.kubernetes.cluster import Team, is_gone
from tests.kubernetes.probes import make_probe, put, write_overlay
from tests.kubernetes.watching import Watched, begin, evict, name_of

pytestmark = pytest.mark.kubernetes

CLUSTER = "/spec/rayClusterSpec"


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("needs_bucket")
def test_a_run_outlasts_its_pods_and_ends_when_it_is_cancelled(team: Team, tmp_path: Path) -> None:
    """The submitter is deleted, the worker's node is drained, the head is deleted; then the run is
    cancelled."""
    overlay = write_overlay(tmp_path / "tries", put("/spec/backoffLimit", 2))
    run = begin(team, make_probe(team, "pods", 3000, 0.3, 0), overlay)
    steps = ("head has a node (", "head ready (", "workers 1 of 1 ready (", "submitter up (")
    for step in (*steps, "driver started ("):
        run.wait_for_note(step)
    run.wait_for_line(3)

    team.delete_pod(name_of(team.pods(run.job_id, component="submitter")[-1]), grace_s=1)
    run.wait_for_note("another submitter took over")
    run.wait_for_line(len(run.numbers) + 10)
    assert run.numbers == list(range(len(run.numbers)))  # none lost, none twice

    worker = name_of(team.wait_for_pod(run.job_id, component="worker"))
    evict(team, worker, grace_s=0)  # gone before the follower looks again
    run.wait_for_note(f"pod {worker} was evicted (EvictionByEvictionAPI")
    team.wait_for_pod(run.job_id, component="worker", without={worker})

    before = len(run.numbers)
    head = name_of(team.wait_for_pod(run.job_id, component="head"))
    with pytest.raises(ApiException, match="disruption budget"):
        evict(team, head)
    team.delete_pod(head, grace_s=1)
    team.wait("the driver to begin again", lambda: 0 in run.numbers[before:], 300)
    assert team.target().list()[0].id == run.job_id  # the same RayJob goes on
    assert not [line for line in run.text if "Traceback" in line or "Waiting for Ray" in line]

    leaving = {pod["metadata"]["name"] for pod in team.pods(run.job_id)}
    assert team.target().cancel(run.job_id).exit_code == 130
    assert run.end().exit_code == 130
    assert "stopped gently\n" in run.text
    _wait_until_gone(team, leaving)
    _find_the_log_of_what_was_deleted(team, run)


def _wait_until_gone(team: Team, names: set[str]) -> None:
    """Pods that have nothing left to do are gone before they have to be killed."""

    def look() -> bool:
        there = [pod for pod in team.pods() if name_of(pod) in names]
        print([name_of(pod) for pod in there])
        return not there

    start_s = time.time()
    team.wait("the pods to be gone", look, 90)
    print(f"gone after {time.time() - start_s:.0f} s")


def _find_the_log_of_what_was_deleted(team: Team, run: Watched) -> None:
    unknown = team.command("logs", run.job_id)
    assert unknown.returncode == 2
    assert "add --run URL" in unknown.stderr
    kept = team.command("logs", run.job_id, "--run", f"{team.bucket}/pods")
    assert kept.returncode == 0
    assert "stopped gently" in kept.stdout


@pytest.mark.timeout(900)
def test_the_head_that_has_no_room_is_named_and_what_waits_for_it_ends_at_once(
    team: Team, tmp_path: Path
) -> None:
    """The worker's init container waits for a head that no node has memory for."""
    head = f"{CLUSTER}/headGroupSpec/template/spec/containers/0/resources"
    huge = {"cpu": "100m", "memory": "900Gi"}
    overlay = write_overlay(tmp_path / "huge", put(head, {"requests": huge, "limits": huge}))
    run = begin(team, make_probe(team, "room", 1, 0, 0), overlay)
    run.wait_for_note("head-")
    _wait_for_init(team, run)
    time.sleep(15)  # time for probes of the worker to fail
    problems = [note for note in run.notes if note.startswith("problem: pod")]
    assert [note for note in problems if "-head-" in note and "not enough memory" in note]
    assert not [note for note in problems if "-worker-" in note], problems
    assert "-head-" in team.target().state(run.job_id).why
    names = {name_of(pod) for pod in team.pods(run.job_id)}
    team.target().cancel(run.job_id)
    assert run.end().exit_code == 130
    _wait_until_gone(team, names)


def _wait_for_init(team: Team, run: Watched) -> None:
    def look() -> bool:
        [pod] = team.pods(run.job_id, component="worker")
        waiting = (pod.get("status") or {}).get("initContainerStatuses", [])
        return any("running" in each["state"] for each in waiting)

    team.wait("the worker's init container to run", look)


REFUSED = {
    "secret": (
        put(
            f"{CLUSTER}/headGroupSpec/template/spec/containers/0/envFrom",
            [{"secretRef": {"name": "not-there"}}],
        ),
        "an administrator creates the secret not-there",
    ),
    "account": (
        put(f"{CLUSTER}/headGroupSpec/template/spec/serviceAccountName", "nobody"),
        'serviceaccount "nobody" not found; an administrator applies the overlay, once',
    ),
    "security": (
        put(f"{CLUSTER}/headGroupSpec/template/spec/hostNetwork", True),
        "the namespace forbids it: Failed to create head Pod",
    ),
    "image": (
        put(f"{CLUSTER}/headGroupSpec/template/spec/containers/0/image", "nowhere.invalid/x:1"),
        "cannot pull nowhere.invalid/x:1 (",
    ),
    "name": (
        put(f"{CLUSTER}/headGroupSpec/template/spec/containers/0/image", "No/Image"),
        "cannot pull No/Image (InvalidImageName",
    ),
    "spot": (
        put(f"{CLUSTER}/headGroupSpec/template/spec/nodeSelector", {"tests/none": "x"}),
        "the overlay asks for nodes that the cluster does not have",
    ),
    "operator": (
        put("/spec/managedBy", "kueue.x-k8s.io/multikueue"),  # KubeRay's leaves it alone
        "no KubeRay operator has processed it within 60 s",
    ),
}
"""A step of a patch of the overlay, and what `status` then says that the run waits for."""


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("needs_bucket")
def test_what_keeps_a_pod_from_starting_is_said(team: Team, tmp_path: Path) -> None:
    """All of them at once: none of these runs has a head that could run."""
    for name, (step, _) in REFUSED.items():
        overlay = write_overlay(tmp_path / name, step)
        team.target(overlay=overlay).submit(make_probe(team, name, 1, 0, 0), print)
    missing = dict(REFUSED)

    def look() -> bool:
        for state in team.target().list():
            name = state.id.removeprefix("probe-")
            why = team.target().state(state.id).why if name in missing else ""
            if name in missing and missing[name][1] in why:
                assert "\n" not in why
                print(f"{name}: {why}")
                del missing[name]
        return not missing

    team.wait(f"{missing}", look, 240)


def test_two_people_submit_the_same_run_at_the_same_moment(idle_team: Team) -> None:
    asked = make_probe(idle_team, "both", 1, 0, 0)
    with ThreadPoolExecutor(4) as people:
        futures = [
            people.submit(idle_team.target().submit, asked, lambda _: None) for _ in range(4)
        ]
    assert {future.result().id for future in futures} == {"probe-both"}
    assert [state.id for state in idle_team.target().list()] == ["probe-both"]


@pytest.mark.timeout(600)
def test_a_run_that_the_operator_gives_up_is_submitted_again_by_who_follows(
    idle_team: Team,
) -> None:
    """An operator of 1.7 does so when the head did not answer for 300 s. Its word is written by the
    administrator here, for the operator of the tests may be older, and 300 s are long."""
    team = idle_team
    watched = begin(team, make_probe(team, "given-up", 1, 0, 0))
    watched.wait_for_note("waiting: for the KubeRay operator")
    for number, name in enumerate(("probe-given-up", "probe-given-up-2"), start=1):
        _give_up(team, name)
        again = f"submitted again as probe-given-up-{number + 1} ({number} of 2)"
        assert f"ended it; {again}" in watched.wait_for_note(again)
    newest = team.rayjob("probe-given-up-3")
    assert newest["metadata"]["labels"]["pneumo/run"] == "probe-given-up-3"
    assert "/logs/probe-given-up-3 python /probe/probe.py" in newest["spec"]["entrypoint"]
    _give_up(team, "probe-given-up-3")
    state = watched.end()
    assert (state.id, state.exit_code) == ("probe-given-up-3", 1)
    status = team.command("status", "probe-given-up-3")
    assert "does not try again by itself" in status.stdout
    assert "resumes from its last checkpoint with:" in status.stdout
    assert [state.id for state in team.target().list()][-1] == "probe-given-up-3"  # no fourth


def _give_up(team: Team, name: str) -> None:
    """What the operator writes."""
    path = f"{team.path('ray.io/v1', 'rayjobs')}/{name}"
    team.wait(f"{name} to be there", lambda: not is_gone(team.cluster, path))
    word = {"jobDeploymentStatus": "Failed", "reason": "JobStatusCheckTimeoutExceeded"}
    team.cluster.ask("PATCH", f"{path}/status", {"status": word})
