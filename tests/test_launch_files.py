"""Launch files for other machines: they parse, name what exists, and what they have qlora do passes a dry run."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from qlora_cli.cli.app import main

ROOT = Path(__file__).resolve().parents[1]
MANY_CARDS = ROOT / "examples" / "many_cards"


def read_kubernetes() -> dict:
    return yaml.safe_load((MANY_CARDS / "kubernetes.yaml").read_text())


def container() -> dict:
    jobs = read_kubernetes()["spec"]["replicatedJobs"]
    return jobs[0]["template"]["spec"]["template"]["spec"]["containers"][0]


def scripts() -> dict[str, str]:
    """The shell script of each launch file, as a machine runs it."""
    sky = yaml.safe_load((MANY_CARDS / "skypilot.yaml").read_text())
    return {"skypilot.yaml": sky["run"], "kubernetes.yaml": container()["args"][0]}


@pytest.mark.parametrize("name", ["skypilot.yaml", "kubernetes.yaml"])
def test_what_is_launched_passes_a_dry_run(name, tiny_model, tmp_path, monkeypatch, capsys):
    """torchrun is replaced by one that says what it was given, which is then run here with --dry-run."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "torchrun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (bin / "torchrun").chmod(0o755)
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} + {n} is {2 * n}"}) + "\n" for n in range(20))
    )
    settings = {"model": str(tiny_model("llama")), "data": [str(tmp_path / "sums.jsonl")], "max_steps": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    given |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "JOB_COMPLETION_INDEX": "1", "CONFIG": "run.yaml", "NODES": "2"}
    script = scripts()[name].replace("/opt/qlora", str(ROOT)).replace("examples/", f"{ROOT}/examples/")
    script = script.replace(f"{ROOT}/{ROOT}/", f"{ROOT}/").replace("/runs/out", str(tmp_path / "out"))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"PATH": f"{bin}:/usr/bin:/bin", **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    head = words[words.index("--master-addr") + 1]
    assert words[words.index("--node-rank") + 1] == "1" and words[words.index("--nnodes") + 1] == "2"
    assert head == ("10.0.0.1" if name == "skypilot.yaml" else "qlora-workers-0-0.qlora")
    line = words[words.index("qlora_cli") + 1 :]
    assert line[0] == "train" and "--resume" in line
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    assert main([*line, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == 2


def test_the_jobset_is_one_worker_a_machine_which_restarts_and_shares_its_volume():
    job = read_kubernetes()
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in container()["env"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == int(variables["NODES"])
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == variables["CARDS"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > 30
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # The first worker's name: JobSet, replicated job, its number, the pod's number, and the JobSet's own service.
    first = f"{job['metadata']['name']}-{replicated['name']}-0-0.{job['metadata']['name']}"
    assert f"HEAD={first} " in container()["args"][0]


def test_the_image_copies_and_installs_what_there_is():
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    assert steps[0][0] == "FROM" and {step[0] for step in steps} <= {
        "FROM",
        "RUN",
        "WORKDIR",
        "COPY",
        "ENV",
        "ENTRYPOINT",
        "CMD",
    }
    for _, copied in (step for step in steps if step[0] == "COPY"):
        assert all((ROOT / name).exists() for name in copied.split()[:-1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (install,) = (rest for name, rest in steps if name == "RUN" and "pip install" in rest)
    extras = re.search(r"\.\[([\w,]+)\]", install)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    entry = json.loads(next(rest for name, rest in steps if name == "ENTRYPOINT"))
    assert entry[0] in project["scripts"]
    version = steps[0][1].split(":")[1].split("-")[0]
    assert tuple(map(int, version.split("."))) >= (3, 11)


@pytest.mark.parametrize("script", sorted(MANY_CARDS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", shlex.quote(str(script))], capture_output=True).returncode == 0
