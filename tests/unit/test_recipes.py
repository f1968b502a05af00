"""The README's recipes for schedulers: each block is what its scheduler takes, and runs jobs that there are."""

import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs import reference
from jobs.entry import ExitCode

_README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def _recipe(name: str) -> str:
    """Returns the block whose first line has this name."""
    found: dict[str, str] = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", _README, re.DOTALL | re.MULTILINE))
    if name not in found:
        pytest.skip(f"the README has no {name}")
    return found[name]


def _refuse_unknown_job(command: str) -> None:
    match = re.search(r"python -m jobs\.(\w+) --config \S+", command)
    assert match, command
    assert match[1] in reference.JOBS


def test_cron_submits_a_job_every_night():
    (line,) = _recipe("crontab").splitlines()
    *moment, command = line.split(maxsplit=5)
    assert all(re.fullmatch(r"[\d*/,-]+", field) for field in moment)
    assert "%" not in command, "cron takes it for the end of a line"
    assert "RAY_AUTH_MODE=token" in command
    assert "ray job submit" in command
    assert "--working-dir . -- " in command
    _refuse_unknown_job(command)


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_WORDS, _WORD, _NUMBER, _FLAG = (
    {"additionalProperties": {"type": "string"}},
    {"type": "string"},
    {"type": "integer"},
    {"type": "boolean"},
)
_NAMED = ("name",)
_POD = _object(
    ("spec",),
    spec=_object(
        ("containers",),
        containers={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ("name", "image"), name=_WORD, image=_WORD, resources=_object(requests=_WORDS, limits=_WORDS),
                env={"type": "array", "items": _object(("name", "value"), name=_WORD, value=_WORD)},
                volumeMounts={"type": "array", "items": _object(("name", "mountPath"), name=_WORD, mountPath=_WORD)},
            ),
        },
        volumes={
            "type": "array",
            "items": _object(("name",), name=_WORD, persistentVolumeClaim=_object(("claimName",), claimName=_WORD)),
        },
    ),
)  # fmt: skip
_RAY_JOB = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object(generateName=_WORD),
    spec=_object(
        entrypoint=_WORD, backoffLimit=_NUMBER, activeDeadlineSeconds=_NUMBER, shutdownAfterJobFinishes=_FLAG,
        rayClusterSpec=_object(
            ("headGroupSpec",),
            rayVersion=_WORD,
            authOptions=_object(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=_FLAG,
            headGroupSpec=_object(("rayStartParams", "template"), rayStartParams=_WORDS, template=_POD),
            workerGroupSpecs={
                "type": "array",
                "items": _object(
                    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
                    groupName=_WORD, replicas=_NUMBER, minReplicas=_NUMBER, maxReplicas=_NUMBER,
                    rayStartParams=_WORDS, template=_POD,
                ),
            },
        ),
    ),
)  # fmt: skip
"""The fields of KubeRay's custom resource that the recipe uses.

Source: ray-project/kuberay, ray-operator/apis/ray/v1 (rayjob_types.go, raycluster_types.go), 1.5.1.
"""


def test_the_ray_job_has_only_fields_of_kuberay_s_resource_and_its_job_is_there():
    found = yaml.safe_load(_recipe("rayjob.yaml"))
    jsonschema.validate(found, _RAY_JOB)
    _refuse_unknown_job(found["spec"]["entrypoint"])
    cluster = found["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for own in pod["containers"] for mount in own["volumeMounts"]} == volumes
    (head, *others) = [own["env"] for group in groups for own in group["template"]["spec"]["containers"]]
    assert all(own == head for own in others), "nodes must agree on how often they ask for each other"


def test_airflow_s_command_is_a_job_that_is_there():
    _refuse_unknown_job(_recipe("dags/nightly_index.py"))


_STATES = {
    ExitCode.DONE: "success",
    ExitCode.NO_GAIN: "skipped",
    ExitCode.BAD_INPUT: "failed",
    ExitCode.HOPELESS: "failed",
}


@pytest.fixture(scope="module")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The DAG folder of an Airflow with a database of its own."""
    if not importlib.util.find_spec("airflow"):
        pytest.skip("Airflow is not installed")
    home = tmp_path_factory.mktemp("airflow")
    (home / "dags").mkdir()
    (home / "dags" / "nightly_index.py").write_text(_recipe("dags/nightly_index.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(home))
        patch.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", "False")
        subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True)
        yield home / "dags"


@pytest.mark.parametrize("code", _STATES, ids=lambda code: code.name)
def test_airflow_runs_the_task_and_takes_each_exit_code_for_what_it_is(code, dags, tmp_path, monkeypatch):
    script = tmp_path / "ends.py"
    script.write_text(f"raise SystemExit({int(code)})")
    monkeypatch.setenv("MATRYOSHKA_COMMAND", f"{sys.executable} {script}")
    monkeypatch.setenv("MATRYOSHKA_FOLDER", str(tmp_path))
    run = runpy.run_path(str(dags / "nightly_index.py"))["NIGHTLY"].test()
    (task,) = run.get_task_instances()
    assert task.state == _STATES[code]
