"""Check manifests for clusters against published schemas, and scripts with a linter and fake commands.

A JobSet's own fields are checked by the models of kubeflow-trainer-api, which are generated from its published schema,
the Jobs in it and everything else by the published schemas of Kubernetes in kubernetes-validate.
"""

import copy
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from pydantic import ValidationError

from shampax.framework.config.check import load
from shampax.framework.distributed import cluster
from shampax.launch import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "launch" / "clusters"
KUBERNETES = "1.33"  # the version whose schemas count
JOB_SETS = ("gke_tpu.yaml", "gke_gpu.yaml")


def manifest(name):
    return yaml.safe_load((CLUSTERS / name).read_text())


def unknown(given, taken, path="") -> list[str]:
    """Return the fields of a manifest that are not in the schema."""
    if isinstance(given, dict) and isinstance(taken, dict):
        return [
            line for key, value in given.items() for line in unknown(value, taken.get(key, "nothing"), f"{path}.{key}")
        ]
    if isinstance(given, list) and isinstance(taken, list) and len(given) == len(taken):
        return [
            line
            for index, pair in enumerate(zip(given, taken, strict=True))
            for line in unknown(*pair, path + f"[{index}]")
        ]
    return [] if given == taken else [f"{path}: {given!r}"]


def check(document):
    """Raise if a manifest does not match the schemas."""
    if document["kind"] != "JobSet":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    frame = copy.deepcopy(document)
    for job in frame["spec"]["replicatedJobs"]:
        kubernetes_validate.validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **job["template"]},
            KUBERNETES,
            strict=True,
        )
        job["template"] = {"spec": {"template": {}}}
    # Not from_dict, which gives missing required fields a value.
    assert unknown(frame, JobsetV1alpha2JobSet.model_validate(frame).to_dict()) == []


@pytest.mark.parametrize("name", [*JOB_SETS, "gke_storage.yaml"])
def test_manifests_match_the_schemas(name):
    check(manifest(name))


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("spec", {"failurepolicy": {}}),
        ("spec failurePolicy rules 0", {"action": 3}),
        ("spec failurePolicy rules 0", {"name": None}),
        ("spec replicatedJobs 0 template spec", {"completionmode": "Indexed"}),
        ("spec replicatedJobs 0 template spec", {"completions": "two"}),
        ("spec replicatedJobs 0 template spec podFailurePolicy rules 0", {"action": None}),
        ("spec replicatedJobs 0 template spec template spec containers 0", {"volumesMounts": []}),
    ],
)
def test_the_schemas_find_misspelt_missing_and_mistyped_fields(place, wrong):
    document = section = manifest("gke_gpu.yaml")
    for key in place.split():
        section = section[int(key) if key.isdecimal() else key]
    for key, value in wrong.items():
        section[key] = value
        if value is None:
            del section[key]
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError, AssertionError)):
        check(document)


def pod(document, index):
    """Return the environment that Kubernetes gives a pod, its container and its Job."""
    [job] = document["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    name = document["metadata"]["name"]
    annotations = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": str(index)}
    environ = {"HOSTNAME": f"{name}-{job['name']}-0-{index}"}
    for variable in container.get("env", ()):
        value = variable.get("value")
        if value is None:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            value = annotations[re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)[1]]
        environ[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: environ[match[1]], value)
    return environ, container, job["template"]["spec"]


def test_pods_on_gpus_find_each_other():
    """Faults: the numbers of pods and processes differ; an undeclared port; the wrong host name."""
    document = manifest("gke_gpu.yaml")
    environ, container, job = pod(document, 1)
    place = cluster.place(environ)
    assert (place.count, place.index) == (job["completions"], 1)
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    assert place.host == f"{pod(document, 0)[0]['HOSTNAME']}.{document['metadata']['name']}"
    assert [port["containerPort"] for port in container["ports"]] == [place.port]


def test_pods_on_tpus_find_each_other():
    """Test with the variables that GKE adds for pods with TPU chips."""
    document = manifest("gke_tpu.yaml")
    environ, container, job = pod(document, 3)
    hosts = [f"lm-slice-0-{index}.lm" for index in range(job["completions"])]
    place = cluster.place(environ | {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": "3"})
    assert (place.host, place.count, place.index) == (hosts[0], 4, 3)
    assert job["parallelism"] == job["completions"]
    assert [port["containerPort"] for port in container["ports"]] == [place.port]
    rows, columns = map(int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == job["completions"] * int(container["resources"]["limits"]["google.com/tpu"])


@pytest.mark.parametrize("name", JOB_SETS)
def test_pods_train_and_restart_only_after_retryable_errors(name):
    document = manifest(name)
    _, container, job = pod(document, 0)
    command, _ = train.parser().parse(container["args"])
    assert load(command.config).batch_size > 0
    [claim] = [volume["persistentVolumeClaim"]["claimName"] for volume in job["template"]["spec"]["volumes"][:1]]
    assert claim == manifest("gke_storage.yaml")["metadata"]["name"]
    assert command.workdir.startswith(container["volumeMounts"][0]["mountPath"] + "/")
    [rule] = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # or there is no podFailurePolicy
    [policy] = document["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet"
    assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]


def tool(name):
    """A linter of this environment."""
    found = shutil.which(name, path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f"{name} is not installed; make install"
    return found


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_vm.sh"])
def test_scripts_pass_the_linter(script):
    done = subprocess.run([tool("shellcheck"), CLUSTERS / script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_passes_the_linter_and_has_every_package():
    done = subprocess.run([tool("hadolint"), CLUSTERS / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    text = (CLUSTERS / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {name.split(".")[1] for name in project["tool"]["setuptools"]["packages"] if "." in name}
    assert set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE)) == folders
    base = re.search(r"^FROM python:(\d+)\.(\d+)\.", text, re.MULTILINE)
    assert f">={base[1]}.{base[2]}" == project["project"]["requires-python"]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Return a function that makes commands which log their arguments and then run a script."""
    bin_, notes = tmp_path / "bin", tmp_path / "notes"
    bin_.mkdir()
    notes.touch()
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(notes))

    def make(name, does):
        (bin_ / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> "$NOTES"\n{does}\n')
        (bin_ / name).chmod(0o755)

    make.notes = lambda: notes.read_text().splitlines()
    return make


SBATCH = ["bash", str(CLUSTERS / "slurm.sbatch"), "--config=a.py", "--workdir=w 1"]


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
        (130, 0, False),
        (75, 0, True),
        (143, 3, True),
        (137, 99, True),
        (75, 100, False),
    ],
)
def test_slurm_requeues_a_job_after_retryable_errors(code, restarts, again, fakes, monkeypatch):
    """Faults: a config error is tried a hundred times; a preempted job is not tried again."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    fakes("srun", f"exit {code}")
    fakes("scontrol", "")
    done = subprocess.run(SBATCH, capture_output=True, text=True, timeout=30, check=False)
    step, *more = fakes.notes()
    assert step == ("srun --label --kill-on-bad-exit=0 --wait=60 python -m shampax train --config=a.py --workdir=w 1")
    assert more == (["scontrol requeue 17"] if again else [])
    assert done.returncode == (0 if again else code), done.stderr


def test_a_cancelled_job_waits_for_its_processes_and_is_not_requeued(fakes, monkeypatch):
    """Faults: the script ends before a checkpoint is complete; scancel does not end the job for good."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    fakes("srun", "sleep 1.5; exit 143")
    fakes("scontrol", "")
    with subprocess.Popen(SBATCH, stdout=subprocess.DEVNULL) as script:
        end = time.monotonic() + 20
        while not fakes.notes() and time.monotonic() < end:
            time.sleep(0.02)
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 143
    assert len(fakes.notes()) == 1


GCLOUD = """
case "$*" in
  *describe*) cat "$STATE" ;;
  *' create '*) echo READY > "$STATE" ;;
  *' delete '*) rm "$STATE" ;;
  *'docker wait'*) head -n 1 "$CODES"; sed -i 1d "$CODES" ;;
esac
"""


@pytest.mark.parametrize(
    ("spot", "codes", "ends", "starts", "creations"),
    [
        ("", "75 0", 0, 2, 1),
        ("", "2", 2, 1, 1),
        ("", "143", 143, 1, 1),
        ("1", "143 0", 0, 2, 1),
        ("1", "75 75 75 75", 75, 3, 1),
    ],
)
def test_a_slice_is_created_and_trains_until_complete(spot, codes, ends, starts, creations, fakes, tmp_path):
    state, left = tmp_path / "state", tmp_path / "codes"
    left.write_text(codes.replace(" ", "\n") + "\n")
    fakes("gcloud", GCLOUD)
    settings = {"PROJECT": "p", "ZONE": "z", "IMAGE": "i", "SHARE": "h:/s", "SPOT": spot, "MAX_RESTARTS": "2"}
    environ = os.environ | settings | {"STATE": str(state), "CODES": str(left)}
    command = [str(CLUSTERS / "tpu_vm.sh"), "train", "--config=a.py", "--workdir=/runs/w 1"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ends, done.stderr
    calls = fakes.notes()
    assert len([call for call in calls if "docker run" in call]) == starts
    assert all(r"--config=a.py --workdir=/runs/w\ 1" in call for call in calls if "docker run" in call)
    made = [call for call in calls if " create " in call]
    assert len(made) == creations
    assert all(("--spot" in call) == bool(spot) for call in made)
    assert all("--project=p --zone=z" in call for call in calls)


def test_a_preempted_slice_is_created_again(fakes, tmp_path):
    """Faults: the script waits for a preempted slice; it gives up the run."""
    state, left = tmp_path / "state", tmp_path / "codes"
    state.write_text("READY\n")
    left.write_text("0\n")
    gone = '*"docker wait"*) [ -e "$STATE.once" ] || { touch "$STATE.once"; echo PREEMPTED > "$STATE"; exit 255; }\n'
    fakes("gcloud", GCLOUD.replace("*'docker wait'*)", gone.replace(";; }", "}")))
    settings = {"PROJECT": "p", "ZONE": "z", "IMAGE": "i", "SHARE": "h:/s", "STATE": str(state), "CODES": str(left)}
    command = [str(CLUSTERS / "tpu_vm.sh"), "train", "--config=a.py", "--workdir=/runs/w"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    verbs = [call.split()[4] for call in fakes.notes()]
    assert [verb for verb in verbs if verb in ("create", "delete")] == ["delete", "create"]
    assert "the machine is gone" in done.stderr


def test_the_machines_of_a_slice_get_their_numbers(fakes, tmp_path):
    """Faults: each machine trains alone; all have the same number."""
    state, left = tmp_path / "state", tmp_path / "codes"
    state.write_text("READY\n")
    left.write_text("0\n")
    fakes(
        "gcloud", GCLOUD.replace("esac", """*'docker run'*) remote=${@: -1}; bash -c "${remote#--command=}" ;;\nesac""")
    )
    fakes("curl", "case $* in *worker-network-endpoints) echo -n u:u:10.1.0.9,u:u:10.1.0.8 ;; *) echo -n 1 ;; esac")
    fakes("sudo", "")
    settings = {"PROJECT": "p", "ZONE": "z", "IMAGE": "i", "SHARE": "h:/s", "STATE": str(state), "CODES": str(left)}
    command = [str(CLUSTERS / "tpu_vm.sh"), "train", "--config=a.py", "--workdir=/runs/w"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    [started] = [call for call in fakes.notes() if call.startswith("sudo docker run ")]
    assert " -e JAX_COORDINATOR_ADDRESS=10.1.0.9:8482 -e JAX_NUM_PROCESSES=2 -e JAX_PROCESS_ID=1 i " in started
