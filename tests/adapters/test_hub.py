"""Experts from the Hub: the library's own client against a small server of this machine that answers as the Hub."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

from pimerge.adapters.expert import open_expert
from pimerge.core.errors import PimergeError
from tests.support.experts import raw_expert, set_config, updates_of

NAME = "org/adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMMITS = {"main": "c" * 40, "v2": "d" * 40}


@dataclass
class Hub:
    """What the server has and says: revision → folder; an error code for every call, or for files alone."""

    endpoint: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    error: tuple[int, str] | None = None
    file_error: tuple[int, str] | None = None
    served: list[str] = field(default_factory=list)


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """The endpoints that a download of one model's snapshot uses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 6:
                self.answer_api("/".join(parts[2:4]), parts[4], "/".join(parts[5:]))
            elif len(parts) >= 5 and parts[2] == "resolve":
                self.answer_file(parts[3], "/".join(parts[4:]))
            else:
                self.fail(404, "EntryNotFound")

        do_HEAD = do_GET

        def answer_api(self, name: str, what: str, revision: str) -> None:
            folder = self.folder_of(revision)
            if hub.error:
                self.fail(*hub.error)
            elif name != NAME:
                self.fail(401, "RepoNotFound")
            elif folder is None:
                self.fail(404, "RevisionNotFound")
            elif what == "tree":
                files = sorted(file for file in folder.iterdir())
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest_of(f)[:40]} for f in files
                ]
                self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            else:
                siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                info = {"_id": "1", "id": NAME, "sha": COMMITS.get(revision, revision), "siblings": siblings}
                self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def answer_file(self, revision: str, file: str) -> None:
            error, folder = hub.error or hub.file_error, self.folder_of(revision)
            if error:
                self.fail(*error)
            elif folder is None or not (folder / file).is_file():
                self.fail(404, "EntryNotFound")
            else:
                hub.served.append(file)
                headers = {"X-Repo-Commit": COMMITS.get(revision, revision), "ETag": f'"{digest_of(folder / file)}"'}
                self.send(200, (folder / file).read_bytes(), headers)

        def folder_of(self, revision: str) -> Path | None:
            branches = {commit: branch for branch, commit in COMMITS.items()}
            return hub.folders.get(branches.get(revision, revision))

        def fail(self, status: int, code: str) -> None:
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": "said by the test"})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Keep the tests' output clean."""

    return Handler


def digest_of(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client call, with an empty cache and working folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with ``org/adapter`` at two revisions."""
    found = Hub()
    for branch, alpha in (("main", 2), ("v2", 8)):
        folder = raw_expert(tmp_path / "served" / branch, updates_of({"q": (3, 2, 4)}))
        set_config(folder, lora_alpha=alpha, alpha_pattern={})
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        (folder / "optimizer.pt").write_bytes(b"not asked for")
        found.folders[branch] = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use_endpoint(monkeypatch, found.endpoint)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(reference: str) -> str:
    with pytest.raises(PimergeError) as caught:
        open_expert(reference)
    return str(caught.value)


@pytest.mark.parametrize(("reference", "scaling"), [(NAME, 1.0), (f"{NAME}@v2", 4.0), (f"{NAME}@{'d' * 40}", 4.0)])
def test_an_expert_is_downloaded_with_its_card_and_nothing_else(hub: Hub, reference: str, scaling: float) -> None:
    expert = open_expert(reference)
    assert expert.name == "adapter"
    assert expert.modules["q"].scaling == scaling
    assert {file.name for file in expert.path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert "optimizer.pt" not in hub.served


def test_what_was_downloaded_opens_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = open_expert(NAME).path
    hub.served.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_expert(NAME).path == path
    (path / "README.md").unlink()  # as if downloaded before the card was asked for
    assert open_expert(NAME).path == path
    assert hub.served == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("field", ["error", "file_error"])
def test_a_gated_repository_says_where_its_terms_are(hub: Hub, field: str, status: int) -> None:
    setattr(hub, field, (status, "GatedRepo"))
    message = refusal(NAME)
    assert f"'{NAME}' is not a folder, and it cannot be downloaded from the Hub: the repository is gated" in message
    assert f"accept its terms at https://huggingface.co/{NAME}, then log in with 'hf auth login'" in message
    assert "gated" in refusal(NAME)  # nor is what the first attempt left behind taken for an expert


@pytest.mark.parametrize("error", [(401, "RepoNotFound"), (404, "RepoNotFound")])
def test_a_private_or_missing_repository_is_named(hub: Hub, error: tuple[int, str]) -> None:
    hub.error = error
    message = refusal(f"{NAME}@v2")
    assert "there is no such repository, or it is private" in message
    assert f"check the name '{NAME}'; if it is private, log in with 'hf auth login'" in message


def test_a_misspelt_repository_is_named(hub: Hub) -> None:
    assert "check the name 'org/adaptor'" in refusal("org/adaptor")


def test_a_missing_revision_is_named(hub: Hub) -> None:
    message = refusal(f"{NAME}@v3")
    assert f"'{NAME}@v3' is not a folder, and it cannot be downloaded from the Hub" in message
    assert "the repository has no revision 'v3'" in message
    assert f"https://huggingface.co/{NAME}/tree/main" in message


@pytest.mark.parametrize(
    ("gone", "named"),
    [([CONFIG], CONFIG), ([WEIGHTS], WEIGHTS), ([CONFIG, WEIGHTS], f"{CONFIG} and no {WEIGHTS}")],
)
def test_a_repository_that_holds_no_adapter_is_named(hub: Hub, gone: list[str], named: str) -> None:
    for file in gone:
        (hub.folders["main"] / file).rename(hub.folders["main"] / f"pytorch_{file}")
    message = refusal(NAME)
    assert f"'{NAME}' is not an adapter: its repository on the Hub has no {named}\n" in message
    assert "expected what PEFT's save_pretrained writes, as safetensors" in message


def test_without_a_network_the_cache_is_used_or_the_network_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = open_expert(NAME).path
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert open_expert(NAME).path == path
        shutil.rmtree(tmp_path / "hub")
        message = refusal(NAME)
    assert "the Hub cannot be reached, and it is missing or incomplete in the local cache" in message
    assert "check the network" in message


def test_offline_the_variable_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(NAME)
    assert "it is missing or incomplete in the local cache, and HF_HUB_OFFLINE is set" in message
    assert "without HF_HUB_OFFLINE" in message


def test_a_part_in_the_cache_is_not_taken_for_the_whole(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = open_expert(NAME).path
    (snapshot / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "without HF_HUB_OFFLINE" in refusal(NAME)
    other = tmp_path / "hub" / "models--org--other"  # one that was fetched file by file: no list of what belongs to it
    shutil.copytree(snapshot, other / "snapshots" / snapshot.name)
    (other / "refs").mkdir()
    (other / "refs" / "main").write_text(snapshot.name)
    assert f"the Hub's local cache has no {WEIGHTS} of 'org/other'" in refusal("org/other")


@pytest.mark.parametrize(("status", "hint"), [(401, "log in again"), (403, "log in again"), (500, "try again later")])
def test_a_refused_token_and_a_server_in_trouble_are_told_apart(hub: Hub, status: int, hint: str) -> None:
    hub.error = (status, "")
    message = refusal(NAME)
    assert f"the Hub responded with status {status}\n" in message
    assert hint in message
