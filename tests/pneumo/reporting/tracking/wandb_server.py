"""A W&B backend on this machine, as much of one as wandb-core needs to send a run; and its faults.

It answers the GraphQL operations by name, keeps what is sent, and can fail in the ways of FAULTS.
"""

import base64
import gzip
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

Fault = Literal["away", "uploads 503", "uploads 403", "uploads hang", "GraphQL hangs"]
"""away: every request ends in a broken connection. The others leave the rest of the server well:
an upload is refused, or no answer ever comes."""
FAULTS: tuple[Fault, ...] = get_args(Fault)
ENTITY = "tester"
PROJECT = {"id": "UDox", "internalId": "UDox", "name": "pneumo", "entity": {"name": ENTITY}}


@dataclass
class Backend:
    """What has arrived."""

    key: str
    url: str = ""
    fault: Fault | None = None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    stream: dict[str, dict[str, dict[int, str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    """Lines by run, file and offset."""
    exit_codes: dict[str, int] = field(default_factory=dict)
    """Of the runs that have ended; 0: finished."""
    deleted: set[str] = field(default_factory=set)
    """Ids that are not taken again."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    clients: dict[str, str] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    manifests: int = 0
    unknown: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: threading.Event = field(default_factory=threading.Event)
    """Whoever hangs may go."""

    def history(self, run: str | None = None) -> list[dict[str, Any]]:
        """The rows of a run, or of the only one, in order."""
        with self.lock:
            if run is None:
                (run,) = self.runs or [""]
            lines = self.stream[run]["wandb-history.jsonl"]
            return [json.loads(lines[at]) for at in sorted(lines)]

    def epochs(self, run: str | None = None) -> list[int]:
        """Of the rows of a run."""
        return [row["epoch"] for row in self.history(run) if "epoch" in row]

    def summary(self, run: str) -> dict[str, Any]:
        """What stands in the run's summary."""
        found: dict[str, Any] = json.loads(self.uploads[f"run/{run}/wandb-summary.json"])
        return found

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL operation; None where it is not known."""
        handler: Callable[[dict[str, Any]], dict[str, Any]] | None
        handler = getattr(self, f"_on_{operation}", None)
        return None if handler is None else handler(given)

    def _on_Viewer(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        teams = {"edges": [{"node": {"id": "1", "name": ENTITY}}]}
        return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "name": ENTITY,
                           "email": "t@example.org", "flags": "{}", "admin": False,
                           "teams": teams, "apiKeys": {"edges": []}}}  # fmt: skip

    def _on_ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _on_ServerInfo(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        versions = {"max_cli_version": "99.0.0", "min_cli_version": "0.0.1"}
        latest = {
            "outOfDate": False,
            "latestVersionString": "99.0.0",
            "versionOnThisInstanceString": "99.0.0",
        }
        return {"serverInfo": {"cliVersionInfo": versions, "latestLocalVersionInfo": latest}}

    def _on_OrgFeatureFlags(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"organization": {"featureFlags": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        entity = {"id": "RTox", "name": ENTITY}
        return {"model": {"id": "UDox", "name": "pneumo", "entity": entity,
                          "bucket": self._describe_run(given["name"])}}  # fmt: skip

    def _describe_run(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run, lines = self.runs[name], self.stream[name]
        history = lines["wandb-history.jsonl"]
        summary = self.uploads.get(f"run/{name}/wandb-summary.json", b"{}").decode()
        tail = [history[max(history)]] if history else []
        return {"id": base64.b64encode(name.encode()).decode(), "name": name, "config":
                run.get("config") or "{}", "displayName": run.get("displayName"), "tags": [],
                "notes": "", "summaryMetrics": summary, "logLineCount": 0, "eventsLineCount":
                len(lines["wandb-events.jsonl"]), "historyLineCount": len(history),
                "historyTail": json.dumps(tail), "eventsTail": "[]", "wandbConfig": '{"t": 1}',
                "state": "finished", "group": None, "jobType": None, "commit": None,
                "readOnly": False, "createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": None,
                "description": None, "systemMetrics": "{}", "historyKeys": None, "sweepName": None,
                "user": {"name": ENTITY, "username": ENTITY}}  # fmt: skip

    def _on_GetDefaultEntity(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"viewer": {"id": "u", "entity": ENTITY}}

    def _on_Run(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"internalId": "UDox", "run": self._describe_run(given["name"])}}

    def _on_RunFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        start = f"run/{given['name']}/"
        names = sorted(name for name in self.uploads if name.startswith(start))
        edges = [
            {"cursor": name, "node": {"id": name, "name": name.removeprefix(start), "url": name,
             "directUrl": name, "sizeBytes": len(self.uploads[name]), "mimetype": "", "md5": "",
             "updatedAt": "2026-01-01T00:00:00Z"}}
            for name in names
        ]  # fmt: skip
        files = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        run = {"fileCount": len(names), "files": files}
        return {"project": {"internalId": "UDox", "run": run}}

    def _on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        known = base64.b64decode(given.get("id") or "").decode()
        name = given.get("name") or known
        run = self.runs.setdefault(name, {})
        is_new = not run
        run.update({key: value for key, value in given.items() if value is not None})
        project = {"id": "UDox", "name": run.get("project", "pneumo"),
                   "entity": {"id": "RTox", "name": run.get("entity", ENTITY)}}  # fmt: skip
        bucket = {"id": base64.b64encode(name.encode()).decode(), "name": name,
                  "displayName": run.get("displayName") or name, "description": None,
                  "config": run.get("config") or "{}", "sweepName": None, "project": project,
                  "historyLineCount": len(self.stream[name]["wandb-history.jsonl"])}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _on_RunStoppedStatus(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"run": {"stopped": False}}}

    def _on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [{"name": f, "uploadUrl": f"{self.url}/upload/run/{given['run']}/{f}"}
                 for f in given["files"]]  # fmt: skip
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _on_MarkRunFilesUploaded(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"markRunFilesUploaded": {"success": True}}

    def _on_CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        wanted = given["input"]
        names = wanted.get("artifactCollectionNames") or [wanted.get("artifactCollectionName")]
        key = f"{names[0]}:{wanted['digest']}"
        made = self.artifacts.setdefault(
            key, {"id": f"A{len(self.artifacts)}", "name": names[0], "state": "PENDING",
                  "type": wanted["artifactTypeName"], "input": wanted},
        )  # fmt: skip
        self.clients[wanted.get("clientID", "")] = made["id"]
        latest = {"id": "seq", "latestArtifact": {"id": made["id"]}}
        artifact = {"id": made["id"], "state": made["state"], "artifactSequence": latest}
        return {"createArtifact": {"artifact": artifact}}

    def _on_CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.manifests += 1
        return self._describe_manifest("createArtifactManifest", f"m{self.manifests}")

    def _on_UpdateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return self._describe_manifest("updateArtifactManifest", given["artifactManifestID"])

    def _describe_manifest(self, operation: str, name: str) -> dict[str, Any]:
        file = {"id": name, "name": name, "displayName": name, "uploadHeaders": [],
                "uploadUrl": f"{self.url}/upload/manifest/{name}"}  # fmt: skip
        return {operation: {"artifactManifest": {"id": name, "file": file}}}

    def _on_CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        edges = []
        for file in (given.get("input") or given)["artifactFiles"]:
            place = f"{file['artifactID']}/{file['name']}"
            node = {"id": "f", "name": file["name"], "displayName": file["name"],
                    "storagePath": place, "uploadUrl": f"{self.url}/upload/artifact/{place}",
                    "uploadHeaders": [], "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]}}  # fmt: skip
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        made = self._find(given["artifactID"])
        made["state"] = "COMMITTED"
        artifact = {"id": made["id"], "digest": made["input"]["digest"]}
        return {"commitArtifact": {"artifact": artifact}}

    def _on_ClientIDMapping(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"clientIDMapping": {"serverID": self.clients.get(given["clientID"])}}

    def _on_ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}

    def _on_UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        wanted = given.get("input") or given
        self.used.append(self._find(wanted["artifactID"])["name"])
        return {"useArtifact": {"artifact": self._describe(wanted["artifactID"])}}

    def _on_ArtifactByID(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"artifact": self._describe(given["id"])}

    def _find(self, identity: str) -> dict[str, Any]:
        return next(a for a in self.artifacts.values() if a["id"] == identity)

    def _describe(self, identity: str) -> dict[str, Any]:
        made = self._find(identity)
        given = made["input"]
        sequence = {"__typename": "ArtifactSequence", "name": made["name"], "project": PROJECT}
        return {"__typename": "Artifact", "id": identity, "artifactSequence": sequence,
                "versionIndex": 0, "artifactType": {"name": made["type"]}, "description": None,
                "metadata": given.get("metadata"), "ttlDurationSeconds": -2,
                "ttlIsInherited": True, "tags": [], "historyStep": None, "state": made["state"],
                "size": 0, "digest": given["digest"], "digestAlgorithm": "MANIFEST_MD5",
                "commitHash": "c", "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z",
                "updatedAt": None, "aliases": []}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    backend: Backend

    def log_message(self, *arguments: object) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        body = self._read()
        if self._fail():
            return
        with self.backend.lock:
            if self.path == "/graphql":
                self._answer_query(json.loads(body))
            elif self.path.endswith("/file_stream"):
                run, said = self.path.split("/")[-2], json.loads(body)
                for name, part in (said.get("files") or {}).items():
                    for at, line in enumerate(part["content"], part["offset"]):
                        self.backend.stream[run][name][at] = line
                if said.get("complete"):
                    self.backend.exit_codes[run] = said["exitcode"]
                self._send(200, {"exitcode": None, "limits": {}})
            elif self.path.startswith("/upload/"):
                self.backend.uploads[self.path.removeprefix("/upload/")] = body
                self._send(200, {})
            else:
                self._send(404, {})

    do_PUT = do_GET = do_HEAD = do_POST  # noqa: N815

    def _fail(self) -> bool:
        """Whether the fault has met this request."""
        fault, is_upload = self.backend.fault, self.path.startswith("/upload/")
        if fault in ("uploads 503", "uploads 403") and is_upload:
            self._send(int(fault[-3:]), {})
            return True
        is_silent = (fault == "uploads hang" and is_upload) or (
            fault == "GraphQL hangs" and self.path == "/graphql"
        )
        if is_silent:
            self.backend.closed.wait()
        if is_silent or fault == "away":
            self.close_connection = True
            self.connection.close()
            return True
        return False

    def _answer_query(self, query: dict[str, Any]) -> None:
        named = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
        operation = query.get("operationName") or (named[1] if named else "Viewer")
        wanted = "Basic " + base64.b64encode(f"api:{self.backend.key}".encode()).decode()
        if self.headers.get("Authorization") != wanted:
            self._send(401, {"errors": [{"message": "user is not logged in"}]})
            return
        given = query.get("variables") or {}
        if operation == "UpsertBucket" and given.get("name") in self.backend.deleted:
            said = f"run {given['name']} was previously created and deleted; try a new run name"
            self._send(409, {"errors": [{"message": said}]})
            return
        found = self.backend.answer(operation, given)
        if found is None:
            self.backend.unknown.append(operation)
            self._send(200, {"data": None, "errors": [{"message": f"unknown {operation}"}]})
            return
        self._send(200, {"data": found})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_packed = self.headers.get("Content-Encoding") == "gzip"
        return gzip.decompress(body) if is_packed else body

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing on the terminal of a client that did not wait."""


@contextmanager
def serve(key: str, host: str = "127.0.0.1") -> Iterator[Backend]:
    """A backend that takes `key`, on an address of this machine and a port of its own."""
    backend = Backend(key)
    server = _Server((host, 0), type("Handler", (_Handler,), {"backend": backend}))
    server.daemon_threads = True
    backend.url = f"http://{host}:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield backend
    finally:
        backend.closed.set()
        server.shutdown()
        server.server_close()


KEY = "0123456789" * 4


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No login, no W&B setting, and a home folder in which nothing may appear."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)
    return home


@pytest.fixture
def backend(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A backend that whatever is started now sends to, with its key."""
    with serve(KEY) as found:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        yield found
