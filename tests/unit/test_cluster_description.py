"""cluster.yaml is a description that Ray accepts, of machines and their set-up only, as safe as it says."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs import reference

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((_ROOT / "cluster.yaml").read_text("utf-8"))
    return found


def _starts(described: dict[str, Any]) -> dict[str, tuple[str, dict[str, str]]]:
    """Returns the command that starts Ray and its environment, on the head and on the others."""
    commands = {name: described[f"{name}_start_ray_commands"][-1].partition("; ")[2] for name in ("head", "worker")}
    parts = {name: command.partition("ray start ") for name, command in commands.items()}
    return {name: (options, dict(own.split("=") for own in before.split())) for name, (before, _, options) in parts.items()}


def test_it_is_valid_by_ray_s_own_schema(described):
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text("utf-8"))
    jsonschema.validate(described, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**described, "max_workers": "many"}, schema)
    validate_config(prepare_config(described))


def test_workers_are_spot_machines_and_the_head_is_not(described):
    is_spot = {
        name: own["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        for name, own in described["available_node_types"].items()
    }
    assert is_spot.pop(described["head_node_type"]) is False
    assert is_spot
    assert all(is_spot.values())


def test_the_head_does_no_work_and_there_are_workers_with_and_without_gpus(described):
    resources = {name: own["resources"] for name, own in described["available_node_types"].items()}
    assert resources.pop(described["head_node_type"]) == {"CPU": 0}
    assert {"GPU" in own for own in resources.values()} == {True, False}
    assert all(own["CPU"] > 0 for own in resources.values())


def test_every_node_asks_for_the_token_and_has_it(described):
    assert all(environment["RAY_AUTH_MODE"] == "token" for _, environment in _starts(described).values())
    assert "~/.ray/auth_token" in described["file_mounts"]


def test_every_node_finds_out_as_fast_about_a_machine_that_vanished(described):
    (head, worker) = [environment for _, environment in _starts(described).values()]
    assert head == worker
    patience = sum(int(head[f"RAY_grpc_client_keepalive_{name}_ms"]) for name in ("time", "timeout"))
    assert patience <= 60_000


def test_the_dashboard_is_for_the_head_alone(described):
    starts = {name: options for name, (options, _) in _starts(described).items()}
    assert "--dashboard-host=127.0.0.1" in starts["head"].split()
    assert "dashboard" not in starts["worker"]


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield str(key)
            yield from _words(own)
    elif isinstance(value, list):
        for own in value:
            yield from _words(own)
    else:
        yield from (word.partition("=")[0] for word in str(value).split())


def test_it_has_no_option_of_any_job(described):
    options = {name for job in reference.JOBS for name in importlib.import_module(f"jobs.{job}").Settings.model_fields}
    assert len(options) > 50
    named = set(_words(described))
    assert not named & {*options, *(f"--{name.replace('_', '-')}" for name in options)}
