"""Checks JobSet manifests: `python scripts/check_k8s.py FILE ...`, for `make lint`.

The jobs in them are held against Kubernetes' own schema, unknown keys refused. JobSet is no part of
Kubernetes; of its keys those are checked that we use (CRD jobset.x-k8s.io/v1alpha2).
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

VERSION = "1.34"
TEXT = {"type": "string", "minLength": 1}


def shape(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object of these keys and no other."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | optional,
        "additionalProperties": False,
    }


RULE = shape(
    {
        "name": TEXT,
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    },
    onJobFailureReasons={"type": "array", "items": TEXT},
    targetReplicatedJobs={"type": "array", "items": TEXT},
)
JOB = shape(
    {"name": TEXT, "template": shape({"spec": {"type": "object"}})}, replicas={"minimum": 1}
)
JOBSET = shape(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": shape(
            {"replicatedJobs": {"type": "array", "minItems": 1, "items": JOB}},
            failurePolicy=shape(
                {"maxRestarts": {"type": "integer", "minimum": 0}},
                rules={"type": "array", "items": RULE},
            ),
        ),
    }
)


def check(jobset: Any) -> None:
    """Raises what is wrong with a JobSet."""
    jsonschema.validate(jobset, JOBSET)
    for job in jobset["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        kubernetes_validate.validate(whole | {"spec": spec}, VERSION, strict=True)
        pods = spec["template"]["spec"]
        environ = {e["name"]: e.get("value") for c in pods["containers"] for e in c.get("env", ())}
        # Three places say how many there are; what differs waits for processes that never come.
        counts = {spec["parallelism"], spec["completions"]}
        counts.add(int(environ["SPMD_TRAIN_NUM_PROCESSES"]))
        if len(counts) != 1:
            raise ValueError(f"parallelism, completions and NUM_PROCESSES differ: {counts}")
        name, port = environ["SPMD_TRAIN_COORDINATOR_ADDRESS"].split(":")
        jobset_name = jobset["metadata"]["name"]
        if name != f"{jobset_name}-{job['name']}-0-0.{jobset_name}":
            raise ValueError(f"{name} is no pod of this JobSet")
        ports = {p["containerPort"] for c in pods["containers"] for p in c.get("ports", ())}
        if int(port) not in ports:
            raise ValueError(f"the coordinator's port {port} is not among {ports}")


def main() -> int:
    for path in sys.argv[1:]:
        try:
            check(yaml.safe_load(pathlib.Path(path).read_text()))
        except (
            jsonschema.ValidationError,
            kubernetes_validate.ValidationError,
            ValueError,
            KeyError,
        ) as error:
            print(f"{path}: {getattr(error, 'message', error)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
