"""Checks the Helm chart without a cluster: lint, every example and every switch against the schemas of the three newest
Kubernetes versions, the README's table, and what the rendered objects promise.

    scripts/chart            checks
    scripts/chart --write    writes the README's table and the copy of the dashboard
"""

import copy
import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import unittest

import jsonschema
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "larder"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
HELM = "helm"
# The one in C is ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SMALLEST = {"lake": {"url": "s3://bucket/prefix"}}

# Everything that can be switched on, so that each key of values.yaml shows in what is rendered.
ALL = {
    "lake": {
        "url": "s3://bucket/prefix",
        "endpoint": "https://s3.example.org",
        "region": "eu",
        "pathStyle": True,
        "existingSecret": "keys",
        "ca": {"configMap": "ca"},
    },
    "scheduler": {"enabled": True, "projects": [{"name": "vision", "quota": 8}]},
    "networkPolicy": {"enabled": True},
    "api": {"enabled": True, "tlsSecret": "tls", "tokensSecret": "tokens"},
    "podMonitor": {"enabled": True, "tokenSecret": "prometheus"},
    "dashboard": {"enabled": True},
    "uninstall": {"whenInUse": "drain"},
    "test": {"dataset": "xray@v2"},
}

# What a key is changed to where text, a number plus one or the other truth value would be refused or mean nothing.
OTHER = {
    "lake.url": "s3://other/prefix",
    "lake.endpoint": "https://other.example.org",
    "tiers": [{"name": "nfs", "nfs": {"server": "nfs.example.org", "path": "/export"}, "ttl": "3d", "capacity": "4TiB"}],
    "config": '[fetch]\nrequests = 64\n',
    "policy": '[[rule]]\nwho = ["everyone"]\ndatasets = ["*"]\nrights = ["mount"]\n',
    "image.pullPolicy": "Always",
    "image.digest": "sha256:" + "0" * 64,
    "imagePullSecrets": [{"name": "registry"}],
    "kubeletDir": "/data/kubelet",
    "stateDir": "/data/larder",
    "controller.provisioner.pullPolicy": "Always",
    "test.pullPolicy": "Always",
    "node.updateStrategy": {"type": "OnDelete", "rollingUpdate": None},
    "node.csi.timeout": "90s",
    "storageClasses": [{"name": "xray", "parameters": {"dataset": "xray@v2", "uid": 1000}, "annotations": {"a": "b"}}],
    "networkPolicy.daemonEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    "podMonitor.interval": "1m",
    "podMonitor.tlsConfig": {"insecureSkipVerify": True, "serverName": "larder"},
    "uninstall.whenInUse": "refuse",
    "uninstall.timeout": "1h",
    "scheduler.projects": [{"name": "language", "quota": 0.5, "limit": 2, "trainPools": ["big"]}],
}
OTHER_BY_NAME = {
    "resources": {"limits": {"memory": "3Gi"}},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "nodeSelector": {"gpu": "true"},
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]}}},
    "podAnnotations": {"a": "b"},
    "annotations": {"a": "b"},
    "labels": {"a": "b"},
    "commonLabels": {"a": "b"},
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraArgs": ["--kube-api-qps=10"],
}
# Keys whose value is one thing, not a group of keys.
WHOLE = {"node.updateStrategy", "podMonitor.tlsConfig", "dashboard.labels"}


class Refused(Exception):
    pass


@functools.lru_cache(maxsize=None)
def render_text(values):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        done = subprocess.run(
            [HELM, "template", "larder", str(CHART), "--namespace", "larder", "--include-crds", "--values", file.name],
            capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused(done.stderr)
    return done.stdout


def render(values):
    return [doc for doc in yaml.load_all(render_text(json.dumps(values)), Loader=LOADER) if doc]


def merged(base, over):
    out = copy.deepcopy(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def leaves(values, path=""):
    for key, value in values.items():
        at = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value and at not in WHOLE and key != "resources":
            yield from leaves(value, at)
        else:
            yield at, value


def lookup(values, path):
    for key in path.split("."):
        values = values[key]
    return values


def other(path, value):
    """Another value for a key."""
    if path in OTHER:
        return OTHER[path]
    name = path.rsplit(".", 1)[-1]
    if name in OTHER_BY_NAME:
        return OTHER_BY_NAME[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return "other"


def newest_versions():
    known = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    found = {match.group(1) for match in (re.match(r"v(\d+\.\d+)\.", path.name) for path in known.iterdir()) if match}
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])[-3:]


VERSIONS = newest_versions()
PROJECT = yaml.safe_load((CHART / "crds" / "project.yaml").read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
seen = set()


def validate(doc):
    """Against the schemas of Kubernetes; kinds of others against what is known of them."""
    text = json.dumps(doc, sort_keys=True)
    if text in seen:
        return
    if doc["apiVersion"] == "larder.io/v1":
        jsonschema.validate({"spec": doc["spec"]}, {**PROJECT, "additionalProperties": False})
        known = set(PROJECT["properties"]["spec"]["properties"])
        assert set(doc["spec"]) <= known, doc["spec"]
    elif doc["apiVersion"] != "monitoring.coreos.com/v1":
        for version in VERSIONS:
            kubernetes_validate.validate(doc, version, strict=True)
    seen.add(text)


def containers(doc):
    template = doc["spec"].get("template", doc) if doc["kind"] in ("DaemonSet", "Deployment", "Job", "Pod") else None
    if template is None:
        return []
    return template["spec"].get("initContainers", []) + template["spec"]["containers"]


def one(docs, kind, ending=""):
    found = [doc for doc in docs if doc["kind"] == kind and doc["metadata"]["name"].endswith(ending)]
    assert len(found) == 1, f"{len(found)} of {kind} {ending}"
    return found[0]


def config_of(docs):
    for doc in docs:
        if doc["kind"] == "ConfigMap" and "larder.toml" in doc["data"]:
            return tomllib.loads(doc["data"]["larder.toml"])
    raise AssertionError("no configuration")


class Schemas(unittest.TestCase):
    def test_every_example_is_taken_by_the_newest_versions(self):
        self.assertGreaterEqual(len(EXAMPLES), 3)
        for example in EXAMPLES:
            with self.subTest(example.name):
                for doc in render(yaml.safe_load(example.read_text())):
                    validate(doc)

    def test_helm_lint_finds_nothing(self):
        for example in EXAMPLES:
            done = subprocess.run([HELM, "lint", "--strict", "--quiet", str(CHART), "--values", str(example)],
                                  capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_switch_alone_is_taken_by_the_newest_versions(self):
        needs = {
            "podMonitor.enabled": {"api": ALL["api"], "podMonitor": ALL["podMonitor"]},
            "api.enabled": {"api": ALL["api"]},
        }
        for path, value in leaves(DEFAULTS):
            if isinstance(value, bool):
                with self.subTest(path):
                    for doc in render(merged(merged(SMALLEST, needs.get(path, {})), nested(path, not value))):
                        validate(doc)

    def test_every_value_has_an_effect_that_the_newest_versions_take(self):
        base = render_text(json.dumps(ALL))
        for path, value in leaves(DEFAULTS):
            with self.subTest(path):
                now = lookup(merged(DEFAULTS, ALL), path)
                values = merged(ALL, nested(path, other(path, now if now is not None else value)))
                if path == "api.enabled":
                    values["podMonitor"]["enabled"] = False
                self.assertNotEqual(render_text(json.dumps(values)), base, f"{path} changes nothing")
                for doc in render(values):
                    validate(doc)

    def test_the_schema_knows_the_keys_of_the_values_and_no_others(self):
        schema = json.loads((CHART / "values.schema.json").read_text())
        known = set()

        def walk(node, path):
            for key, inner in node.get("properties", {}).items():
                at = f"{path}.{key}" if path else key
                if "properties" in inner and at not in WHOLE:
                    walk(inner, at)
                else:
                    known.add(at)
        walk(schema, "")
        self.assertEqual(known - {"global"}, {path for path, _ in leaves(DEFAULTS)})

    def test_wrong_values_are_refused_with_their_path(self):
        for over, said in [
            ({"lake": {"url": ""}}, "/lake/url"),
            ({"lake": {"url": "https://bucket"}}, "/lake/url"),
            ({"lake": {"urll": "s3://b"}}, "urll"),
            ({"tiers": []}, "/tiers"),
            ({"tiers": [{"name": "a"}]}, "/tiers/0"),
            ({"tiers": [{"name": "a", "nfs": {"server": "s", "path": "/p"}, "hostPath": {"path": "/p"}}]}, "/tiers/0"),
            ({"tiers": [{"name": "A b", "hostPath": {"path": "/p"}}]}, "/tiers/0/name"),
            ({"storageClasses": [{"name": "a", "parameters": {"datasets": "x"}}]}, "datasets"),
            ({"uninstall": {"whenInUse": "hope"}}, "/uninstall/whenInUse"),
            ({"podMonitor": {"enabled": True}}, "podMonitor.enabled needs api.enabled"),
            ({"api": {"enabled": True}}, "api.tlsSecret"),
        ]:
            with self.subTest(over), self.assertRaisesRegex(Refused, re.escape(said)):
                render(merged(SMALLEST, over))


class Promises(unittest.TestCase):
    def test_nothing_is_privileged_but_the_keeper(self):
        for doc in render(ALL):
            for container in containers(doc):
                context = container["securityContext"] if "securityContext" in container else {}
                with self.subTest(container["name"]):
                    self.assertEqual(bool(context.get("privileged")), container["name"] == "keeper")
                    self.assertTrue(context["readOnlyRootFilesystem"])
                    if container["name"] == "keeper":
                        continue
                    self.assertFalse(context["allowPrivilegeEscalation"])
                    self.assertEqual(context["capabilities"]["drop"], ["ALL"])
                    self.assertEqual(context["seccompProfile"], {"type": "RuntimeDefault"})

    def test_who_needs_nothing_of_a_node_is_not_root(self):
        root = set()
        for doc in render(ALL):
            for container in containers(doc):
                if container["securityContext"]["runAsUser"] == 0:
                    root.add(container["name"])
                else:
                    self.assertTrue(container["securityContext"]["runAsNonRoot"])
                    self.assertNotIn("add", container["securityContext"]["capabilities"])
        self.assertEqual(root, {"keeper", "daemon", "csi", "tier-local"})
        controller = one(render(ALL), "Deployment", "-controller")
        self.assertTrue(all(c["securityContext"]["runAsNonRoot"] for c in containers(controller)))

    def test_the_keeper_stays_while_the_driver_is_replaced(self):
        docs = render(SMALLEST)
        self.assertEqual(one(docs, "DaemonSet", "-keeper")["spec"]["updateStrategy"], {"type": "OnDelete"})
        self.assertEqual(one(docs, "DaemonSet", "-node")["spec"]["updateStrategy"]["type"], "RollingUpdate")
        # A change of the configuration replaces the driver's pods and not the keeper's.
        other_docs = render(merged(SMALLEST, {"config": "[fetch]\nrequests = 5\n"}))
        self.assertEqual(one(docs, "DaemonSet", "-keeper"), one(other_docs, "DaemonSet", "-keeper"))
        self.assertNotEqual(one(docs, "DaemonSet", "-node"), one(other_docs, "DaemonSet", "-node"))

    def test_keeper_daemon_and_driver_see_the_same_directories(self):
        values = merged(SMALLEST, {"kubeletDir": "/data/kubelet", "stateDir": "/data/larder"})
        docs = render(values)
        kubelet = {}
        for doc in (one(docs, "DaemonSet", "-keeper"), one(docs, "DaemonSet", "-node")):
            paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in doc["spec"]["template"]["spec"]["volumes"]}
            self.assertEqual((paths["kubelet"], paths["state"]), ("/data/kubelet", "/data/larder"))
            for container in doc["spec"]["template"]["spec"]["containers"]:
                mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
                self.assertEqual(mounts["kubelet"]["mountPath"], "/data/kubelet")
                self.assertEqual(mounts["state"]["mountPath"], "/data/larder")
                kubelet[container["name"]] = mounts["kubelet"]["mountPropagation"]
        self.assertEqual(kubelet, {"keeper": "Bidirectional", "daemon": "HostToContainer", "csi": "HostToContainer"})

    def test_credentials_come_from_a_secret_to_the_daemon_alone(self):
        docs = render(ALL)
        has = {container["name"] for doc in docs for container in containers(doc) if "envFrom" in container}
        self.assertEqual(has, {"daemon", "lake"})
        text = render_text(json.dumps(ALL))
        self.assertNotIn("AWS_SECRET", text)
        self.assertFalse([doc for doc in docs if doc["kind"] == "Secret"])

    def test_roles_name_no_secrets_and_no_wildcards(self):
        for doc in render(ALL):
            if doc["kind"] in ("ClusterRole", "Role"):
                for rule in doc["rules"]:
                    self.assertNotIn("secrets", rule["resources"])
                    self.assertNotIn("*", rule["resources"] + rule["verbs"] + rule["apiGroups"])

    def test_the_node_may_only_tell_events(self):
        rules = one(render(ALL), "ClusterRole", "larder-node")["rules"]
        self.assertEqual(rules, [{"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]}])

    def test_the_configuration_is_toml_with_the_values_in_it(self):
        values = merged(ALL, {
            "lake": {"endpoint": "https://s3.example.org:10443"},
            "tiers": [{"name": "nfs", "nfs": {"server": "s", "path": "/p"}, "capacity": "4TiB"},
                      {"name": "fast", "hostPath": {"path": "/nvme"}, "ttl": "3d"}],
            "defaultTier": "fast",
            "config": "[fetch]\nrequests = 64\n",
            "policy": "[[rule]]\n",
        })
        config = config_of(render(values))
        self.assertEqual(config["lake"], {
            "url": "s3://bucket/prefix", "endpoint": "https://s3.example.org:10443", "region": "eu", "path_style": True,
            "ca_file": "/etc/larder-ca/ca.crt"})
        self.assertEqual(config["default_tier"], "fast")
        self.assertEqual(config["tier"], {"nfs": {"path": "/tiers/nfs", "capacity": "4TiB"}, "fast": {"path": "/tiers/fast", "ttl": "3d"}})
        self.assertEqual(config["fetch"], {"requests": 64})
        self.assertEqual(config["daemon"], {"policy": "/etc/larder/policy.toml"})

    def test_text_that_would_break_the_configuration_is_quoted(self):
        config = config_of(render(merged(SMALLEST, {"lake": {"region": 'a"b\\c'}})))
        self.assertEqual(config["lake"]["region"], 'a"b\\c')

    def test_the_driver_is_what_its_contract_says(self):
        self.assertEqual(one(render(SMALLEST), "CSIDriver")["spec"], {
            "attachRequired": False, "podInfoOnMount": True, "fsGroupPolicy": "None", "storageCapacity": False,
            "requiresRepublish": False, "volumeLifecycleModes": ["Persistent", "Ephemeral"]})

    def test_each_kind_of_tier_becomes_a_volume_of_the_daemon(self):
        tiers = [
            ({"hostPath": {"path": "/nvme"}}, {"hostPath": {"path": "/nvme", "type": "DirectoryOrCreate"}}),
            ({"nfs": {"server": "s", "path": "/p"}}, {"nfs": {"server": "s", "path": "/p"}}),
            ({"persistentVolumeClaim": {"claimName": "c"}}, {"persistentVolumeClaim": {"claimName": "c"}}),
        ]
        for given, wanted in tiers:
            docs = render(merged(SMALLEST, {"tiers": [{"name": "t", **given}]}))
            spec = one(docs, "DaemonSet", "-node")["spec"]["template"]["spec"]
            self.assertIn({"name": "tier-t", **wanted}, spec["volumes"])
            self.assertEqual([container["name"] for container in spec["initContainers"]], ["tier-t"])
        docs = render(merged(SMALLEST, {"tiers": [{"name": "t", "hostPath": {"path": "/nvme"}, "init": False}]}))
        self.assertNotIn("initContainers", one(docs, "DaemonSet", "-node")["spec"]["template"]["spec"])

    def test_a_drain_may_evict_and_a_refusal_may_not(self):
        for when, evicts in (("refuse", False), ("drain", True)):
            docs = render(merged(SMALLEST, {"uninstall": {"whenInUse": when}}))
            rules = one(docs, "ClusterRole", "-uninstall")["rules"]
            self.assertEqual(any("pods/eviction" in rule["resources"] for rule in rules), evicts)
            args = containers(one(docs, "Job", "-uninstall"))[0]["args"]
            self.assertEqual("--evict" in args, evicts)
        docs = render(merged(SMALLEST, {"uninstall": {"whenInUse": "ignore"}}))
        self.assertFalse([doc for doc in docs if doc["metadata"]["name"].endswith("-uninstall")])

    def test_nothing_of_the_scheduler_is_made_where_it_is_off(self):
        names = [doc["metadata"]["name"] for doc in render(SMALLEST) if doc["kind"] != "CustomResourceDefinition"]
        self.assertFalse([name for name in names if "scheduler" in name])

    def test_budgets_are_only_for_what_has_replicas(self):
        docs = render(merged(ALL, {"controller": {"replicas": 1}, "scheduler": {"replicas": 3}}))
        budgets = [doc["metadata"]["name"] for doc in docs if doc["kind"] == "PodDisruptionBudget"]
        self.assertEqual(budgets, ["larder-scheduler"])

    def test_every_object_has_the_labels_of_its_release(self):
        for doc in render(merged(ALL, {"commonLabels": {"team": "data"}})):
            if doc["kind"] == "CustomResourceDefinition":
                continue
            labels = doc["metadata"]["labels"]
            self.assertEqual((labels["app.kubernetes.io/instance"], labels["team"]), ("larder", "data"), doc["metadata"]["name"])

    def test_selectors_of_two_workloads_never_overlap(self):
        selectors = [json.dumps(doc["spec"]["selector"], sort_keys=True) for doc in render(ALL) if doc["kind"] in ("DaemonSet", "Deployment")]
        self.assertEqual(len(selectors), len(set(selectors)))


class Files(unittest.TestCase):
    def test_the_readme_has_the_table_of_the_values(self):
        self.assertEqual((CHART / "README.md").read_text(), readme(), "run scripts/chart --write")

    def test_every_value_is_documented(self):
        silent = [path for path, _, said in documented() if not said]
        self.assertFalse(silent)

    def test_the_dashboard_is_the_one_of_the_repository(self):
        ours, theirs = (CHART / "files" / "grafana-dashboard.json", ROOT / "systemd" / "grafana-dashboard.json")
        self.assertEqual(ours.read_bytes(), theirs.read_bytes(), "run scripts/chart --write")

    def test_the_chart_has_the_version_of_the_program(self):
        chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
        version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
        self.assertEqual((chart["version"], chart["appVersion"]), (version, version))


class Image(unittest.TestCase):
    """scripts/oci, which makes the images."""

    def pack(self, folder, out, *more):
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "oci"), "--name", "localhost/a:1", "--entrypoint", "/bin/a",
             "--out", str(out), *more, str(folder)], capture_output=True, text=True, check=False)

    def setUp(self):
        kept = tempfile.TemporaryDirectory()
        self.addCleanup(kept.cleanup)
        self.dir = pathlib.Path(kept.name)
        self.root = self.dir / "root"
        (self.root / "bin").mkdir(parents=True)
        (self.root / "bin" / "a").write_bytes(b"program")
        (self.root / "bin" / "a").chmod(0o755)
        (self.root / "b").symlink_to("bin/a")

    def test_the_same_directory_gives_the_same_bytes_at_any_time(self):
        first, second = self.dir / "1.tar", self.dir / "2.tar"
        self.assertEqual(self.pack(self.root, first).returncode, 0)
        os.utime(self.root / "bin" / "a", (1, 1))
        self.assertEqual(self.pack(self.root, second).returncode, 0)
        self.assertEqual(first.read_bytes(), second.read_bytes())
        (self.root / "bin" / "a").write_bytes(b"another")
        self.pack(self.root, second)
        self.assertNotEqual(first.read_bytes(), second.read_bytes())

    def test_the_archive_is_a_layout_whose_digests_hold(self):
        out = self.dir / "1.tar"
        self.pack(self.root, out, "--user", "65532:65532", "--arch", "arm64")
        with tarfile.open(out) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
        blobs = {name.rsplit("/", 1)[1]: data for name, data in files.items() if name.startswith("blobs/sha256/")}
        for digest, data in blobs.items():
            self.assertEqual(hashlib.sha256(data).hexdigest(), digest)

        def blob(of):
            return blobs[of["digest"].removeprefix("sha256:")]
        entry = json.loads(files["index.json"])["manifests"][0]
        self.assertEqual(entry["annotations"]["io.containerd.image.name"], "localhost/a:1")
        manifest = json.loads(blob(entry))
        config = json.loads(blob(manifest["config"]))
        self.assertEqual((config["architecture"], config["config"]["User"], config["config"]["Entrypoint"]), ("arm64", "65532:65532", ["/bin/a"]))
        layer = gzip.decompress(blob(manifest["layers"][0]))
        self.assertEqual(config["rootfs"]["diff_ids"], ["sha256:" + hashlib.sha256(layer).hexdigest()])
        with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
            self.assertEqual([(m.name, m.mode, m.uid, m.linkname) for m in tar.getmembers()],
                             [("b", 0o777, 0, "bin/a"), ("bin", (self.root / "bin").stat().st_mode & 0o7777, 0, ""), ("bin/a", 0o755, 0, "")])

    def test_what_is_no_file_is_refused(self):
        os.mkfifo(self.root / "pipe")
        done = self.pack(self.root, self.dir / "1.tar")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("pipe", done.stderr)


# What says itself, wherever it stands.
KNOWN = {
    "pullPolicy": "When the image is pulled: Always, IfNotPresent, Never.",
    "priorityClassName": "PriorityClass of the pods.",
    "resources": "Requests and limits of the container.",
    "extraEnv": "More environment variables.",
    "nodeSelector": "Nodes that the pods may run on.",
    "tolerations": "Taints that the pods bear.",
    "affinity": "Affinity of the pods.",
    "podAnnotations": "Annotations of the pods.",
    "annotations": "Annotations of the object.",
    "labels": "Labels of the object.",
    "replicas": "How many there are; one of them leads.",
    "port": "TCP port.",
    "interval": "How often it is scraped.",
    "updateStrategy": "How pods are replaced by new ones.",
    "create": "Whether the chart makes it.",
    "image": "The image.",
}


def documented():
    """Path, default and what the comment above says, of each key of values.yaml."""
    said, stack, rows = [], [], []
    values = {path for path, _ in leaves(DEFAULTS)}
    for line in (CHART / "values.yaml").read_text().splitlines():
        comment = re.match(r"\s*# ?(.*)", line)
        key = re.match(r"(\s*)([A-Za-z]+):", line)
        if comment:
            said.append(comment.group(1))
        elif key:
            depth = len(key.group(1)) // 2
            stack = stack[:depth] + [key.group(2)]
            path = ".".join(stack)
            if path in values and path not in [row[0] for row in rows]:
                rows.append((path, lookup(DEFAULTS, path), " ".join(said) or KNOWN.get(key.group(2), "")))
            said = []
        else:
            said = []
    assert {row[0] for row in rows} == values, values ^ {row[0] for row in rows}
    return rows


def readme():
    rows = "\n".join(
        f"| `{path}` | `{json.dumps(default)}` | {said.replace('|', chr(92) + '|')} |" for path, default, said in documented())
    head = (CHART / "README.md").read_text() if (CHART / "README.md").exists() else ""
    marker = "<!-- The table is made of values.yaml by scripts/chart --write; do not edit below. -->\n"
    return head.split(marker)[0] + marker + f"\n| key | default | meaning |\n| --- | --- | --- |\n{rows}\n"


def write():
    (CHART / "README.md").write_text(readme())
    (CHART / "files" / "grafana-dashboard.json").write_bytes((ROOT / "systemd" / "grafana-dashboard.json").read_bytes())


if __name__ == "__main__":
    HELM = sys.argv.pop(1)
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        unittest.main(verbosity=1)
