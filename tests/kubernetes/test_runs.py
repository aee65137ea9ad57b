"""Runs with the real operator, scheduler and kubelets, and a probe in place of the job."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.kuberay import api as kubernetes_api
from tests.cluster.http_proxy import FaultyProxy, Rule
from tests.kubernetes.cluster import Team
from tests.kubernetes.namespaces import ROLE
from tests.kubernetes.probes import follow, make_probe, put, write_overlay

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(600)]


@pytest.mark.usefixtures("needs_bucket")
def test_broken_logs_and_expired_watches_lose_and_repeat_no_line(
    team: Team,
) -> None:
    """The API server is in another time zone. Then all commands for a run that has ended; the Role
    of k8s/rbac is enough for them."""
    rules = [
        Rule("POST", "rayjobs", "answer", 503),
        Rule("POST", "rayjobs", "drop after"),
        Rule("GET", "watch=true", "answer", 403),  # a server that starts has not loaded its rights
        Rule("GET", "watch=true", "answer", 410, times=2),
        Rule("GET", "watch=true", "cut", after_bytes=30),
        Rule("GET", "/log?", "drop before"),
        Rule("GET", "/log?", "cut", after_bytes=333, times=3),
        Rule("GET", "/log?", "answer", 500),
        Rule("GET", "/pods?", "answer", 500, times=2),
        Rule("GET", "/events?", "drop after", times=2),
    ]
    server = str(team.cluster.server["server"])
    with FaultyProxy(server, rules, zone="+05:30") as proxy:
        target = team.target(url=proxy.url)
        asked = make_probe(team, "breaks", 80, 0.1, 3, "AWS_SECRET_ACCESS_KEY")
        started = target.submit(asked, lambda _: None)
        seen = follow(target, started.id)
        broken = {(rule.part, rule.fault) for rule in proxy.injected}
    assert seen.numbers == list(range(80))
    assert (seen.state.driver_exit_code, seen.state.exit_code) == (3, 1)
    assert f"AWS_SECRET_ACCESS_KEY is {team.environ['AWS_SECRET_ACCESS_KEY']}" in seen.lines
    assert broken >= {("/log?", "cut"), ("/pods?", "answer"), ("/events?", "drop after")}
    assert {403, 410} <= {rule.status for rule in proxy.injected if rule.part == "watch=true"}

    assert started.id in team.command("list").stdout
    status = team.command("status", started.id).stdout
    assert f"writes  {team.bucket}/breaks" in status
    assert "exit code 3" in status
    assert team.command("logs", started.id).stdout.splitlines() == list(seen.lines)
    again = team.target().submit(asked, lambda _: None)
    assert (again.id, again.already_running) == (f"{started.id}-2", False)
    assert team.command("cancel", again.id).returncode == 0
    assert [state.id for state in team.target().list()] == [started.id]
    _find_no_secret(team)
    _compare_rights(team)


def _find_no_secret(team: Team) -> None:
    """No object but the secret itself contains it."""
    paths = (team.path("ray.io/v1", "rayjobs"), team.path("v1", "pods"), team.path("v1", "events"))
    everything = yaml.safe_dump([team.cluster.ask("GET", path) for path in paths])
    assert team.environ["AWS_ENDPOINT_URL"] in everything
    assert team.environ["AWS_SECRET_ACCESS_KEY"] not in everything


def _compare_rights(team: Team) -> None:
    """The requests made are those that the Role grants and that the product says it needs."""
    granted = {
        (group, resource, verb)
        for rule in ROLE["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert {*kubernetes_api.NEEDS, *kubernetes_api.OPTIONAL_NEEDS} == granted
    if team.cluster.folder is None:
        return  # no audit log to read
    user = f"system:serviceaccount:{team.namespace}:submitter"
    asked = set()
    for line in (team.cluster.folder / "audit.log").read_text().splitlines():
        event = json.loads(line) if user in line else {}
        what = event.get("objectRef")
        if what and event["user"]["username"] == user and what["resource"] != "namespaces":
            resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
            asked.add((what.get("apiGroup", ""), resource, event["verb"]))
    # Pods are watched only where one is deleted under a follower, as in test_faults.
    asked.add(("", "pods", "watch"))
    assert {need for need in asked if need[1] != "selfsubjectaccessreviews"} == granted


def test_a_user_error_is_not_tried_again(team: Team, tmp_path: Path) -> None:
    """The driver ends with exit code 2, with attempts left."""
    overlay = write_overlay(tmp_path / "mine", put("/spec/backoffLimit", 2))
    target = team.target(overlay=overlay)
    started = target.submit(make_probe(team, "mistake", 3, 0, 2), lambda _: None)
    seen = follow(target, started.id)
    assert seen.numbers == [0, 1, 2]
    assert (seen.state.phase, seen.state.exit_code) == ("failed", 2)
    assert "your mistake, which another attempt would repeat; the run was stopped" in seen.state.why
    assert target.list() == []


@pytest.mark.usefixtures("needs_bucket")
def test_the_heads_preflight_reports_an_empty_source(team: Team) -> None:
    done = team.command(
        *("submit", "prepare", "--source", f"{team.bucket}/nowhere"),
        *("--store", f"{team.bucket}/store"),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"preflight: {team.bucket}/nowhere: nothing is there, seen from the cluster" in last
    assert "the run was stopped" in last
    assert "not sent, as they are secrets: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in done.stderr
    assert team.command("list").stdout == ""


def test_an_image_that_cannot_be_pulled_is_reported_while_it_waits(team: Team) -> None:
    target = team.target()
    image = "registry.invalid/pneumo@sha256:" + "0" * 64
    asked = make_probe(team, "image", 1, 0, 0)
    started = type(target)(target.api, target.overlay, image).submit(asked, lambda _: None)
    notes: list[str] = []

    def note(text: object) -> None:
        notes.append(str(text))
        if "cannot pull" in notes[-1]:
            target.cancel(started.id)

    state = target.follow(started.id, lambda _: None, note)
    assert state.exit_code == 130
    told = re.compile(rf"cannot pull {image} \((ErrImagePull|ImagePullBackOff)")
    assert any(told.search(note) for note in notes), notes
    assert len(notes) == len(set(notes))
