"""`make bench-signing`: what signatures and attested verdicts add to a registration.

One guarded vLLM server (CPU build) of a 1B-like model with random weights. Each adapter is loaded
without checks, with both, and with its scores taken from the attestation, in turns.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import yaml
from cryptography.hazmat.primitives.asymmetric import ed25519
from rich.progress import track

from s3lora_serve.offline.attest import attest_adapter
from s3lora_serve.policy.file import read_policy
from tests.runs.benchmarks import measure, report, shapes
from tests.runs.benchmarks.admission import MODEL, RANK, ROOM, make_adapter
from tests.runs.benchmarks.folders import make_model
from tests.support.server import OPEN_LOADING, Server
from tests.support.signing import KeyPair, key_pair, sign

HERE = Path(__file__).parent
ADAPTERS = 73
"""The first load is not counted. Single loads differ by half, so many are compared in pairs."""

TOUCHED = 512 * 2**20
"""Bytes of memory that are free and used before when a load begins; a load needs some 50 MB."""

KINDS = ("unchecked", "checked", "trusted")
"""Loaded as they are; signed and attested; attested, and with those scores."""

Times = dict[str, list[float]]


def main() -> None:
    """Measure, write signing.json and RESULTS.md."""
    with tempfile.TemporaryDirectory(prefix="s3lora-bench-") as folder:
        place = Path(folder)
        model = make_model(place / "model", *shapes.MODELS[MODEL])
        signer = key_pair(place, "signer")
        scanner = key_pair(place, "scanner", ed25519.Ed25519PrivateKey.generate())
        policy = _policy(place / "policy.yaml", signer, scanner)
        adapters = [_vouched(place / f"adapter-{i}", i, policy, signer, scanner)
                    for i in track(range(ADAPTERS), "adapters", transient=True)]  # fmt: skip
        environment = OPEN_LOADING | {
            "S3LORA_POLICY": str(policy),
            "S3LORA_STATE_DIR": str(place / "state"),
        }
        with Server(model, place / "server.log", ROOM, environment, one_process=False) as server:
            loads, reads = _loads(server, adapters)
        data = {
            "machine": measure.machine(),
            "model": MODEL,
            "rank": RANK,
            "megabytes": (adapters[0] / "adapter_model.safetensors").stat().st_size / 1e6,
            "loads": ADAPTERS - 1,
            "seconds": {kind: statistics.median(loads[kind]) for kind in KINDS},
            "read": {kind: statistics.median(reads[kind]) for kind in KINDS},
            "ratios": {
                kind: [a / b for a, b in zip(loads[kind], loads[KINDS[0]], strict=True)]
                for kind in KINDS[1:]
            },
        }
    (HERE / "signing.json").write_text(json.dumps(data, indent=1) + "\n")
    report.write(HERE)
    print(json.dumps(data, indent=1))


def _policy(file: Path, signer: KeyPair, scanner: KeyPair) -> Path:
    signatures, attestations = {"require": True}, {"require": True}
    everything = f"{file.parent.resolve()}/**"  # a rule relaxes for folders, never for names alone
    rules = [
        {"match": {"adapter": "checked/*"}, "signatures": signatures, "attestations": attestations},
        {
            "match": {"adapter": "trusted/*", "path": everything},
            "signatures": signatures,
            "attestations": attestations | {"trust_scores": True},
        },
        {
            "match": {"adapter": "*/*", "path": everything},
            "signatures": {"keys": []},
            "attestations": {"keys": []},
        },
    ]
    policy = {
        "on_uninformative": "admit",  # random factors have nearly equal SSI
        "signatures": {"keys": [str(signer.public)]},
        "attestations": {"keys": [str(scanner.public)]},
        "rules": rules,
    }
    file.write_text(yaml.safe_dump(policy))
    return file


def _vouched(folder: Path, seed: int, policy: Path, signer: KeyPair, scanner: KeyPair) -> Path:
    make_adapter(folder, seed)
    sign(folder, signer)
    name = f"checked/{folder.name}"
    _, envelope = attest_adapter(folder, scanner.key, read_policy(policy), "cpu", name=name)
    (folder / "s3lora-attestation.json").write_text(json.dumps(envelope))
    return folder


def _loads(server: Server, adapters: list[Path]) -> tuple[Times, Times]:
    """Seconds of `POST /v1/load_lora_adapter` by kind, and of the part that copies and verifies.

    The kinds take turns at each adapter, and each comes first equally often.
    """
    loads: Times = {kind: [] for kind in KINDS}
    reads: Times = {kind: [] for kind in KINDS}
    for kind in KINDS:  # costs of the first load only
        _load(server, f"{kind}/{adapters[0].name}", adapters[0])
    for turn, folder in enumerate(track(adapters[1:], "loads", transient=True)):
        for kind in (*KINDS[turn % 3 :], *KINDS[: turn % 3]):
            seconds, read = _load(server, f"{kind}/{folder.name}", folder)
            loads[kind].append(seconds)
            reads[kind].append(read)
    return loads, reads


def _load(server: Server, name: str, folder: Path) -> tuple[float, float]:
    _touch_memory(folder.parent)
    started = time.perf_counter()
    answer = server.load(name, folder)
    seconds = time.perf_counter() - started
    assert answer.status_code == 200, answer.text
    verdict = server.get(f"/s3lora/adapters/{name}").json()
    vouched = not name.startswith("unchecked/")
    assert bool(verdict["signed_by"]) == bool(verdict["attested_by"]) == vouched
    assert (verdict["scored_by"] == "attestation") == name.startswith("trusted/")
    assert server.unload(name).status_code == 200
    return seconds, verdict["seconds"]["read"]


def _touch_memory(place: Path) -> None:
    """Use memory and free it: a virtual machine's first use of a page costs 8 µs, by chance."""
    file = place / "touched"
    file.write_bytes(bytes(TOUCHED))
    file.unlink()


if __name__ == "__main__":
    main()
