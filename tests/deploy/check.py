#!/usr/bin/env python3
"""Checks the files in deploy/ and what the documentation says of metrics.

- Every metric and label that a dashboard, an alert, a manifest or a page names is one of docs/metrics.md.
- YAML and JSON parse without repeated keys; panels of a dashboard have numbers and places of their own.
- Every alert is in the page, and every alert of the page exists.
- Manifests fit the schemas of Kubernetes, and agree with each other: labels, ports, volumes, secrets, probes.

usage: check.py [RULES]    writes the queries of the dashboards there, as rules for promtool
"""

import json
import re
import sys
from pathlib import Path

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
READY = ROOT / "tools/src/ready.rs"
faults = []


def fault(path, text):
    faults.append(f"{path.relative_to(ROOT)}: {text}")


class Strict(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def documents(path):
    try:
        return [document for document in yaml.load_all(path.read_text(), Loader=Strict) if document is not None]
    except yaml.YAMLError as e:
        fault(path, str(e))
        return []


# ---- metrics ----

METRIC = re.compile(r"\buccl_tcpx_[a-z0-9_]+\b")
PAGE = ROOT / "docs/metrics.md"


def declared():
    """The metrics of the page with their types, and the labels."""
    page = PAGE.read_text()
    rows = re.findall(r"^\| `(uccl_tcpx_\w+)` \| (\w+) \|", page, re.M)
    assert len(rows) > 80, f"{PAGE}: {len(rows)} metrics"
    metrics = {}
    for name, kind in rows:
        for suffix in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
            metrics[name + suffix] = kind
    labels = re.search(r"## Labels\n(.*?)\n## ", page, re.S)[1]
    return metrics, set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (`.*?) \|", labels, re.M))))


METRICS, LABELS = declared()
# Given by Prometheus, or by the queries themselves.
OTHER_LABELS = {"job", "instance", "le", "address", "gpu", "plugin", "version", "severity", "alertname", "alertstate", "namespace", "component"}


def check_query(path, query):
    for name in METRIC.findall(query):
        if name not in METRICS:
            fault(path, f"no metric is called {name}")
        elif METRICS[name] == "counter" and not re.search(rf"(rate|increase|changes)\({name}\b", query):
            fault(path, f"{name} is a counter: take its rate or increase")
    in_braces = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    in_lists = re.findall(r"(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", query)
    for label in in_braces + [label.strip() for labels in in_lists for label in labels.split(",") if label.strip()]:
        if label not in LABELS | OTHER_LABELS:
            fault(path, f"no metric has a label {label}: {query}")


def check_names_in(path):
    """Names in prose, which may be the beginning of several names."""
    for name in METRIC.findall(path.read_text()):
        known = name in METRICS or any(metric.startswith(name) for metric in METRICS)
        if not known and not re.match(r"uccl_tcpx_(endpoint|nixl)", name):
            fault(path, f"no metric is called {name}")


def check_dashboard(path):
    def unique(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            fault(path, f"a key stands twice among {[key for key, _ in pairs]}")
        return dict(pairs)

    dashboard = json.loads(path.read_text(), object_pairs_hook=unique)
    for key in ("title", "uid", "schemaVersion", "templating", "time"):
        if not dashboard.get(key):
            fault(path, f"no {key}")
    panels, cells = dashboard["panels"], {}
    if len({panel["id"] for panel in panels}) < len(panels):
        fault(path, "two panels have one id")
    queries = [query["expr"] for query in dashboard["annotations"]["list"] if "expr" in query]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in panels:
        place = panel["gridPos"]
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            if cell[0] >= 24 or cells.setdefault(cell, panel["id"]) != panel["id"]:
                fault(path, f"panel {panel['title']} lies on another one, or beside the screen")
                break
        if panel["type"] == "row":
            continue
        if not panel["targets"]:
            fault(path, f"panel {panel['title']} asks nothing")
        queries += [target["expr"] for target in panel["targets"]]
    for query in queries:
        check_query(path, query)
        for variable in re.findall(r"\$(\w+)", query):
            if variable not in variables and not variable.startswith("__"):
                fault(path, f"no variable {variable}: {query}")
    return [re.sub(r"\$__(rate_)?interval", "5m", query) for query in queries]


def check_alerts(path):
    alerts = [rule for group in documents(path)[0]["groups"] for rule in group["rules"]]
    page = PAGE.read_text()
    tests = (path.parent / "alerts_test.yml").read_text()
    for rule in alerts:
        check_query(path, rule["expr"])
        if rule["labels"].get("severity") not in ("warning", "critical") or not {"summary", "description"} <= set(rule["annotations"]):
            fault(path, f"{rule['alert']} lacks its severity, summary or description")
        if f"| `{rule['alert']}` |" not in page:
            fault(PAGE, f"does not explain {rule['alert']}")
        if f'alertname="{rule["alert"]}"' not in tests:
            fault(path, f"{rule['alert']} has no test")
    for name in re.findall(r"^\| `(Uccl\w+)` \|", page, re.M):
        if name not in {rule["alert"] for rule in alerts}:
            fault(PAGE, f"explains {name}, which does not exist")


# ---- manifests ----


def pods(manifest):
    """The pod templates of a workload."""
    spec = manifest.get("spec", {})
    template = spec.get("template") if manifest["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job") else None
    return [template] if template else [manifest] if manifest["kind"] == "Pod" else []


def check_exec(path, what, probe):
    """A probe that runs tcpx-info has its exit statuses only with --ready, and must wait for its answer."""
    command = probe.get("exec", {}).get("command", [])
    if "tcpx-info" not in command:
        return
    if "--ready" not in command:
        fault(path, f"{what} runs tcpx-info without --ready, which moves data each time")
    limit = int(re.search(r"const LIMIT: Duration = Duration::from_secs\((\d+)\)", READY.read_text())[1])
    if probe.get("timeoutSeconds", 1) <= limit:
        fault(path, f"{what} waits {probe.get('timeoutSeconds', 1)} s, and tcpx-info --ready takes up to {limit} s")


def check_pod(path, name, template, known):
    spec = template["spec"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    containers = spec["containers"] + spec.get("initContainers", [])
    mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
    for volume in mounted ^ set(volumes):
        fault(path, f"{name}: volume {volume} is mounted or declared, not both")
    for volume in volumes.values():
        for kind, key in (("secret", "secretName"), ("configMap", "name")):
            if kind in volume and (kind.lower(), volume[kind][key]) not in known:
                fault(path, f"{name}: no {kind} {volume[kind][key]}")
    for container in containers:
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            action = container.get(probe, {})
            port = action.get("httpGet", action.get("tcpSocket", {})).get("port")
            if isinstance(port, str) and port not in ports:
                fault(path, f"{name}: {probe} asks port {port}, which the container does not name")
            check_exec(path, f"{name}: {probe}", action)
        if "resources" not in container:
            fault(path, f"{name}: container {container['name']} has no resources")


def check_manifest(path, manifest, known):
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    try:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    except kubernetes_validate.ValidationError as e:
        fault(path, f"{name}: {'.'.join(str(part) for part in e.path)}: {e.message}")
    except kubernetes_validate.SchemaNotFoundError:
        fault(path, f"{name}: Kubernetes {VERSION} has no such kind")
    for template in pods(manifest):
        check_pod(path, name, template, known)
        wanted = manifest.get("spec", {}).get("selector", {}).get("matchLabels", {})
        if not wanted.items() <= template["metadata"].get("labels", {}).items():
            fault(path, f"{name}: its selector does not match its pods")


def check_kustomization(path):
    """A folder for `kubectl apply -k`."""
    (kustomization,) = documents(path)
    files = [path.parent / name for name in kustomization["resources"]]
    for file in set(path.parent.glob("*.yaml")) ^ {path, *files}:
        fault(path, f"{file.name} is not one of its resources, or does not exist")
    manifests = [(file, manifest) for file in files for manifest in documents(file)]
    known = {(m["kind"].lower(), m["metadata"]["name"]) for _, m in manifests} | EXTERNAL
    known |= {("configmap", generator["name"]) for generator in kustomization.get("configMapGenerator", [])}
    templates = [template for _, manifest in manifests for template in pods(manifest)]
    images = {container["image"] for t in templates for container in t["spec"]["containers"] + t["spec"].get("initContainers", [])}
    if images != {image["name"] for image in kustomization.get("images", [])}:
        fault(path, f"its images are not those of its pods: {images}")
    for file, manifest in manifests:
        check_manifest(file, manifest, known)
        spec, labels = manifest.get("spec", {}), [template["metadata"].get("labels", {}) for template in templates]
        selector = {"Service": spec.get("selector"), "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels")}.get(manifest["kind"])
        if selector and not any(selector.items() <= of.items() for of in labels):
            fault(file, f"{manifest['kind']} {manifest['metadata']['name']} selects no pod")
    for kind, name in EXTERNAL:
        if f"create {kind} generic {name} " not in (ROOT / "docs/kubernetes.md").read_text():
            fault(ROOT / "docs/kubernetes.md", f"does not say how to create the {kind} {name}")


# What the reader creates.
EXTERNAL = {("secret", "uccl-key")}
# The version of Kubernetes whose schemas count.
VERSION = "1.33"


def main():
    queries = []
    for path in sorted(DEPLOY.rglob("*.json")):
        queries += check_dashboard(path)
    check_alerts(DEPLOY / "prometheus/alerts.yml")
    for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *sorted(DEPLOY.rglob("*.y*ml"))]:
        check_names_in(path)
    for block in re.findall(r"```\n(.*?)```", PAGE.read_text(), re.S):
        for query in [line for line in block.splitlines() if not line.startswith("#")]:
            check_query(PAGE, query)
            queries.append(query)
    for path in sorted(DEPLOY.rglob("*.yml")) + sorted(DEPLOY.rglob("*.yaml")):
        documents(path)
    kustomizations = sorted(DEPLOY.rglob("kustomization.yaml"))
    assert len(kustomizations) > 1, kustomizations
    for path in kustomizations:
        check_kustomization(path)
    agent = DEPLOY / "devmem/daemonset.yaml"
    for manifest in documents(agent):
        check_manifest(agent, manifest, EXTERNAL)
    if len(sys.argv) > 1:
        rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
        Path(sys.argv[1]).write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    print(f"{len(queries)} queries, {len(METRICS)} metrics")
    for text in faults:
        print(text, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
