"""The hub's own client against a server that stands in for the hub.

The client runs in processes of its own, where HF_ENDPOINT points to the server; each imports the
package, so there are few of them and each goes through several cases.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save

from clip_jax.errors import WeightsError
from clip_jax.weights import hub

ROOT = Path(__file__).parents[2]
COMMIT = {"main": "a" * 40, "v2": "b" * 40}
WEIGHTS = save({"w": np.arange(1000, dtype=np.float32)})
SHARD_INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})

REPOSITORIES = {
    "owner/open": {"open_clip_config.json": b"{}", "open_clip_model.safetensors": WEIGHTS},
    "owner/bin": {"open_clip_config.json": b"{}", "open_clip_pytorch_model.bin": b"PK"},
    "owner/hf": {"config.json": b"{}", "model.safetensors": WEIGHTS, "spiece.model": b"sp"},
    "owner/shards": {
        "config.json": b"{}",
        "preprocessor_config.json": b"{}",
        "model.safetensors.index.json": SHARD_INDEX.encode(),
        "model-1.safetensors": WEIGHTS,
        "model-2.safetensors": WEIGHTS,
    },
    "owner/other": {"README.md": b"nothing"},
    "owner/broken": {"config.json": b"{}", "model.safetensors": WEIGHTS},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what the client asks for when it resolves and downloads files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def fail(self, code, error):
        message = json.dumps({"error": error}).encode()
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("X-Error-Message", error)
        if error == "EntryNotFound":
            self.send_header("X-Repo-Commit", COMMIT["main"])
        self.send_header("Content-Length", str(len(message)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(message)

    def answer(self, body):
        self.server.asked.append(f"{self.command} {self.path}")
        owner, name, kind, revision, *rest = [*self.path.strip("/").split("/"), "", "", ""]
        files = REPOSITORIES.get(f"{owner}/{name}")
        filename = "/".join(part for part in rest if part)
        if files is None or kind != "resolve":
            return self.fail(401 if files is None else 404, "RepoNotFound")
        if revision not in {*COMMIT, *COMMIT.values()}:
            return self.fail(404, "RevisionNotFound")
        if filename not in files:
            return self.fail(404, "EntryNotFound")
        content = files[filename]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT.get(revision, revision))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return None
        if name == "broken" and filename == "model.safetensors" and self.server.breaks:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        self.wfile.write(content)
        return None


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    httpd.asked, httpd.breaks = [], True
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


PROGRAM = """
import json, sys
from clip_jax.errors import WeightsError
from clip_jax.weights import hub
for name in sys.argv[1:]:
    try:
        folder = hub.fetch(name, ("spiece.model",))
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        print(json.dumps({"folder": folder.name, "files": files}), flush=True)
    except WeightsError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


def fetch(names, endpoint, cache, **environment):
    """What a fresh process gets for each name."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        | environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_client_downloads_once_and_names_what_goes_wrong(server, tmp_path):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    names = ["owner/open", "owner/open", "owner/bin", "owner/hf", "owner/hf@v2", "owner/shards"]
    names += ["owner/other", "owner/none", "owner/open@no-such", "owner/broken"]
    found = fetch(names, endpoint, tmp_path)
    first, second, binary, hf, revision, shards, other, none, no_revision, broken = found

    assert first["files"] == {
        "open_clip_config.json": 2,
        "open_clip_model.safetensors": len(WEIGHTS),
    }
    assert first["folder"] == COMMIT["main"]
    assert second == first
    downloads = [line for line in server.asked if line.startswith("GET /owner/open/")]
    assert len(downloads) == 2  # each file once
    assert set(binary["files"]) == {"open_clip_config.json", "open_clip_pytorch_model.bin"}
    assert set(hf["files"]) == {"config.json", "model.safetensors", "spiece.model"}
    assert revision["folder"] == COMMIT["v2"]
    assert len(shards["files"]) == 5

    assert "owner/other holds no CLIP in a known form" in other["error"]
    assert "hf:owner/none: no such repository on the hub" in none["error"]
    assert "hf:owner/open@no-such: the repository has no such revision" in no_revision["error"]
    assert "the download of model.safetensors failed" in broken["error"]

    # The network is back: the same name works. And no half file was taken for a whole one.
    server.breaks = False
    (again,) = fetch(["owner/broken"], endpoint, tmp_path)
    assert again["files"]["model.safetensors"] == len(WEIGHTS)


@pytest.mark.slow
def test_without_a_network_the_cache_serves_what_it_has(server, tmp_path):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    before = fetch(["owner/hf", "owner/shards"], endpoint, tmp_path)
    server.shutdown()
    server.server_close()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        *cached, missing = fetch(
            ["owner/hf", "owner/shards", "owner/open"], endpoint, tmp_path, **environment
        )
        assert cached == before
        assert "not in the cache, and the hub cannot be reached" in missing["error"]


def test_once_out_of_reach_the_hub_is_not_asked_again(monkeypatch):
    asked = []

    def download(repository, filename, *, local_files_only, **_):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    no_such_file = huggingface_hub.file_download._CACHED_NO_EXIST
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: no_such_file)
    with pytest.raises(WeightsError, match="holds no CLIP in a known form"):
        hub.fetch("owner/name")
    assert asked == [False, True]
