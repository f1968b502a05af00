"""A job that is run with keys all around it writes and prints none of them."""

import os
import subprocess
import sys
from pathlib import Path

import texts

SECRETS = {
    "HF_TOKEN": "hf_thisTokenIsNobodysBusiness0123",
    "HUGGING_FACE_HUB_TOKEN": "hf_thisTokenIsNobodysEither0123456",
    "AWS_ACCESS_KEY_ID": "AKIANOBODYSBUSINESS0",
    "AWS_SECRET_ACCESS_KEY": "neither/is+this-one",
    "AWS_SESSION_TOKEN": "nor-is-this-session",
    "HF_ENDPOINT": "http://somebody:her-password@127.0.0.1:9",
}
_PLAIN = ("her-password", *(value for name, value in SECRETS.items() if name != "HF_ENDPOINT"))


def _run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **SECRETS, "LOG_LEVEL": "DEBUG"}
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, check=False, timeout=300)


def _leaks(folder: Path, *runs: subprocess.CompletedProcess[bytes]) -> list[tuple[str, str]]:
    written = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    printed = {f"{number}": run.stdout + run.stderr for number, run in enumerate(runs)}
    return [(name, secret) for name, data in {**written, **printed}.items() for secret in _PLAIN if secret.encode() in data]


def test_a_run_among_secrets_writes_and_prints_none_of_them(tmp_path: Path, tiny: str) -> None:
    corpus = texts.write_corpus(tmp_path / "corpus", num_files=1, rows_per_file=4)
    common = [f"--corpus={corpus}", f"--output={tmp_path / 'embeddings'}", "--workers=1", "--precision=float32"]
    done = _run("jobs.embed", *common, f"--model={tiny}")
    assert done.returncode == 0, done.stderr[-2_000:]
    absent = _run("jobs.embed", *common, "--model=owner/no-such-model", "--replace")
    assert absent.returncode == 2
    assert b"not to be had from the hub" in absent.stderr
    assert (tmp_path / "embeddings" / "status.json").is_file()
    assert _leaks(tmp_path, done, absent) == []
