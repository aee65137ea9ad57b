"""Check inside the cluster, within seconds, that a job's places can be reached and its secrets are
set.

    python -m jobs.preflight --reads s3://bucket/store --writes s3://bucket/runs/1 --needs NAME

`python -m cluster submit` runs it before a job; on Kubernetes the head's pod does, before Ray
starts. Exits 0, or 1 or 2 with one line that says which place and why.
"""

import argparse
import os
import platform
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

from jobs.terminal.entry_point import tell
from jobs.terminal.places import check_writable_folder
from pneumo import storage
from pneumo.errors import ConfigError, PneumoError, SourceError, StorageError

ANSWER_TIMEOUT_S = 20.0
"""A place without an answer for this long is out of reach; a job would wait much longer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.preflight", description=__doc__)
    parser.add_argument("--ray", help="the version that the image must have")
    parser.add_argument("--reads", action="append", default=[], metavar="URL")
    parser.add_argument("--writes", action="append", default=[], metavar="URL")
    parser.add_argument(
        "--needs", action="append", default=[], metavar="NAME", help="a variable that must be set"
    )
    options = parser.parse_args(argv)
    checks = [(url, check_readable) for url in options.reads]
    checks += [(url, check_writable) for url in options.writes]
    try:
        check_ray(options.ray)
        check_variables(options.needs, os.environ)
        run_checks(ANSWER_TIMEOUT_S, checks)
    except PneumoError as error:
        tell(f"error: preflight: {error}")
        return error.exit_code
    tell(
        f"preflight: Python {platform.python_version()}, Ray {version('ray')}; reached "
        f"{', '.join(url for url, _ in checks) or 'no place, as none was given'}"
    )
    return 0


def check_ray(expected: str | None) -> None:
    """Raise ConfigError when this environment has another Ray than `expected`."""
    installed = version("ray")
    if expected is not None and installed != expected:
        raise ConfigError(
            f"the image holds Ray {installed}, the manifest says rayVersion {expected}; build the "
            "image from this checkout (make image), or correct the manifest"
        )


def check_variables(names: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise ConfigError for variables that are not set here; shows no values."""
    missing = [name for name in names if not environ.get(name)]
    if missing:
        secret = "pneumo-hash-key" if "PNEUMO_HASH_KEY" in missing else "pneumo-secrets"
        raise ConfigError(
            f"{', '.join(missing)}: not set on the cluster, and the job needs it; on Kubernetes "
            f"put it into the secret {secret}, elsewhere set it where you submit"
        )


def check_readable(url: str) -> None:
    """Raise a PneumoError unless `url` exists."""
    if not storage.exists(storage.normalise(url)):
        raise SourceError(f"{url}: nothing is there, seen from the cluster; is the URL right?")


def check_writable(url: str) -> None:
    """Raise a PneumoError unless an object can be written below `url`; leaves no object."""
    url = storage.normalise(url)
    if storage.is_local(url):
        check_writable_folder(url)
    else:
        probe_url = storage.join(url, f".preflight-{uuid.uuid4().hex}")
        storage.write_bytes(probe_url, b"")
        storage.remove(probe_url)


def run_checks(timeout_s: float, checks: Sequence[tuple[str, Callable[[str], None]]]) -> None:
    """Run all checks in parallel; raises the first error, or StorageError after `timeout_s`."""
    pool = ThreadPoolExecutor(max(1, len(checks)))
    answers = [(url, pool.submit(check, url)) for url, check in checks]
    pool.shutdown(wait=False)
    for url, answer in answers:
        try:
            answer.result(timeout_s)
        except TimeoutError as error:
            endpoint = " (AWS_ENDPOINT_URL)" if url.startswith(("s3://", "s3a://")) else ""
            raise StorageError(
                f"{url}: no answer within {timeout_s:g} s, seen from the cluster; check the "
                f"endpoint{endpoint}, name look-up and firewalls there"
            ) from error


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stderr.flush()
    os._exit(code)  # does not wait for a check that hangs in its thread
