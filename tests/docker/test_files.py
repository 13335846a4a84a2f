"""The files of a deployment, read as compose and Docker read them: no engine is needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
PROFILES = ("cpu", "gpu", "monitoring")
ONLY_IN_V2 = ("name", "gpus", "include", "develop", "models")
"""What compose 1.29 does not know."""


def services_of(profile: str) -> set[str]:
    """Those that a profile brings up."""
    return {name for name, service in COMPOSE["services"].items() if profile in service.get("profiles", [profile])}


def variables() -> set[str]:
    """Every setting that the compose file asks for."""
    return set(re.findall(r"\$\{(\w+)", (DEPLOY / "docker-compose.yml").read_text()))


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_takes_the_file(profile: str) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("there is no docker-compose here")
    subprocess.run([compose, "--profile", profile, "config", "--quiet"], cwd=DEPLOY, check=True, timeout=60)


def test_the_file_is_written_in_what_both_versions_of_compose_know() -> None:
    assert not set(ONLY_IN_V2) & set(COMPOSE)
    for name, service in COMPOSE["services"].items():
        assert not set(ONLY_IN_V2) & set(service), name
        assert isinstance(service.get("depends_on", []), list), f"{name}: conditions are not in both"


def test_profiles_bring_up_what_they_say() -> None:
    assert services_of("cpu") == {"redis", "scheduler", "worker-cpu"}
    assert services_of("gpu") == {"redis", "scheduler", "worker-gpu-0", "worker-gpu-1"}
    assert services_of("monitoring") == {"redis", "scheduler", "prometheus", "grafana"}


def test_each_gpu_has_one_worker() -> None:
    found = []
    for name in sorted(services_of("gpu")):
        devices = COMPOSE["services"][name].get("deploy", {}).get("resources", {}).get("reservations", {})
        found += [device_id for device in devices.get("devices", []) for device_id in device["device_ids"]]
    assert found == ["0", "1"]


@pytest.mark.parametrize("name", sorted(services_of("cpu") | services_of("gpu")))
def test_our_processes_are_confined_and_watched(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["restart"] == "unless-stopped"
    if name != "redis":
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(volume.endswith(":ro") for volume in service["volumes"])


def test_redis_keeps_everything() -> None:
    lines = (DEPLOY / "redis.conf").read_text().splitlines()
    assert "appendonly yes" in lines
    assert "maxmemory-policy noeviction" in lines


def test_every_setting_is_explained_and_no_other() -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    assert set(settings) == variables()
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (DEPLOY / "docker-compose.yml").read_text()))
    assert settings == defaults


@pytest.mark.parametrize("path", sorted((DEPLOY / "docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_images_are_pinned_unprivileged_and_probed(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^USER pagoda$", text, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .* CMD", text, re.MULTILINE)
    for image in re.findall(r"^ARG \w*BASE=(\S+)$", text, re.MULTILINE):
        assert re.search(r":\d+\.\d+", image), f"{image} is not pinned"
    for source in re.findall(r"^COPY (?!--from)(.+) /\S+$", text, re.MULTILINE):
        assert all((DEPLOY.parent / name).exists() for name in source.split()), source


def test_the_scheduler_s_image_carries_no_torch() -> None:
    text = (DEPLOY / "docker" / "scheduler.Dockerfile").read_text()
    assert "[scheduler]" in text
    assert "torch==" not in text
