"""The whole job on real data: push, history, mount, read, train, cache, age out, read again.

Every step prints one line: what it shows, how long it took, at what rate. A step that does not
hold ends the demo with status 1.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READERS = 8


def human(size):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024


class Step:
    """Times a step and prints its line."""

    number = 0

    def __init__(self, what):
        Step.number += 1
        self.what = what
        self.notes = []
        self.done = None

    def note(self, text):
        self.notes.append(text)

    def count(self, number, unit):
        """What the step's rate counts."""
        self.done = (number, unit)

    def __enter__(self):
        self.begin = time.monotonic()
        return self

    def __exit__(self, kind, error, trace):
        took = time.monotonic() - self.begin
        mark = "FAILED" if kind else "ok"
        rate = f", {self.done[0] / took:.0f} {self.done[1]}/s" if self.done else ""
        print(f"{Step.number:2}. {self.what}: {'; '.join(self.notes)} [{took:.2f} s{rate}] {mark}", flush=True)


class Demo:
    def __init__(self, options):
        self.options = options
        self.work = Path(tempfile.mkdtemp(prefix="larder-demo."))
        self.lake = None
        self.env = dict(
            os.environ,
            LARDER_LAKE="s3://demo/lake",
            LARDER_TIER=str(self.work / "tier"),
            LARDER_STATE=str(self.work / "state"),
            LARDER_PATH_STYLE="true",
            # A day would be long for a demo.
            LARDER_STEWARD_PERIOD="1s",
            AWS_ACCESS_KEY_ID="demo",
            AWS_SECRET_ACCESS_KEY="demo-secret-key",
            AWS_REGION="us-east-1",
        )
        for name in ("LARDER_CONFIG", "LARDER_SOCKET", "AWS_PROFILE"):
            self.env.pop(name, None)

    def larder(self, *words, check=True):
        done = subprocess.run([self.options.larder, *map(str, words)], env=self.env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if check and done.returncode != 0:
            raise SystemExit(f"demo: larder {' '.join(map(str, words))} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout

    def ask(self, *words):
        return json.loads(self.larder(*words, "--json"))

    # --- the steps ---------------------------------------------------------------------------

    def start_lake(self):
        with Step("an S3 object store over a local directory, reached through the AWS SDK") as step:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            self.env["LARDER_ENDPOINT"] = f"http://127.0.0.1:{port}"
            log = open(self.work / "lake.log", "wb")
            self.lake = subprocess.Popen(
                [self.options.larder, "lake", "serve", self.work / "lake", "--listen", f"127.0.0.1:{port}",
                 "--access-key", "demo", "--secret-key", "demo-secret-key", "--bucket", "demo"],
                env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port), 0.2).close()
                    break
                except OSError:
                    time.sleep(0.05)
            else:
                raise SystemExit(f"demo: the lake did not start; see {self.work / 'lake.log'}")
            self.larder("tier", "init", self.work / "tier")
            step.count(1, "stores")
            step.note(f"{self.env['LARDER_ENDPOINT']}, lake s3://demo/lake, tier {self.work / 'tier'}")

    def make_versions(self):
        """Version 1: the pictures but one category, and the source tree. Version 2: all pictures, a changed
        and a removed source file."""
        with Step("the data") as step:
            first, second = self.work / "v1", self.work / "v2"
            categories = sorted(path.name for path in self.options.pictures.iterdir() if path.is_dir())
            late = "transportation" if "transportation" in categories else categories[-1]
            for target in (first, second):
                shutil.copytree(self.options.pictures, target / "pictures", symlinks=True)
                shutil.copytree(self.options.source, target / "source", symlinks=True)
            shutil.rmtree(first / "pictures" / late)
            changed = sorted((second / "source").rglob("*.go"))
            changed[0].chmod(0o644)
            changed[0].write_bytes(changed[0].read_bytes() + b"// changed\n")
            changed[1].unlink()
            self.versions = {"v1": first, "v2": second}
            made = 0
            for name, root in self.versions.items():
                files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
                made += len(files)
                step.note(f"{name}: {len(files)} files, {human(sum(path.stat().st_size for path in files))}")
            step.note(f"v2 adds the category `{late}`, changes one file, removes one")
            step.count(made, "files")

    def push(self, name):
        with Step(f"push {name}") as step:
            result = self.ask("push", self.versions[name], "clipart", "-m", f"version {name}", "--tag", name)
            took = time.monotonic() - step.begin
            uploaded = result.get("uploaded_bytes", 0)
            step.note(f"commit {result['commit'][:12]}, {result['files']} files, {human(result['bytes'])}, "
                      f"uploaded {human(uploaded)}, {human(result['bytes'] / took)}/s of data")
            step.count(result["files"], "files")

    def push_again(self):
        with Step("push v2 again, unchanged") as step:
            result = self.ask("push", self.versions["v2"], "clipart")
            step.note(f"unchanged: {result['unchanged']}, {result['files_read']} files read again, "
                      f"uploaded {human(result['uploaded_bytes'])}")
            step.count(result["files"], "files")

    def history(self):
        with Step("history") as step:
            commits = self.ask("log", "clipart")
            rows = commits if isinstance(commits, list) else commits["commits"]
            changes = self.larder("diff", "clipart@v1", "clipart@v2").splitlines()
            step.note(f"{len(rows)} commits; {len(changes)} lines of difference between v1 and v2")
            step.count(len(changes), "lines")

    def mount(self, name):
        target = self.work / "mnt" / name
        target.mkdir(parents=True, exist_ok=True)
        with Step(f"mount clipart@{name}") as step:
            self.larder("mount", f"clipart@{name}", target)
            step.note(f"{target} is there after {1000 * (time.monotonic() - step.begin):.0f} ms")
            step.count(1, "mounts")
        return target

    def read_all(self, what, targets):
        """Reads every file of the mounts through 8 readers in shuffled order; compares with the source."""
        with Step(what) as step:
            jobs = []
            for name, target in targets.items():
                for path in self.versions[name].rglob("*"):
                    if path.is_file() and not path.is_symlink():
                        jobs.append((path, target / path.relative_to(self.versions[name])))
            random.Random(7).shuffle(jobs)
            begin = time.monotonic()
            with ThreadPoolExecutor(READERS) as pool:
                results = list(pool.map(lambda job: digest(job[1]), jobs))
            took = time.monotonic() - begin
            size = sum(count for _, count in results)
            with ThreadPoolExecutor(READERS) as pool:
                wanted = list(pool.map(lambda job: digest(job[0])[0], jobs))
            wrong = [str(job[1]) for job, have, want in zip(jobs, results, wanted) if have[0] != want]
            if wrong:
                raise SystemExit(f"demo: {len(wrong)} files differ from the source, the first is {wrong[0]}")
            step.note(f"{len(jobs)} files, {human(size)}, {len(jobs) / took:.0f} files/s, {human(size / took)}/s, "
                      "every digest equals the source's")

    def same_tree(self, targets):
        with Step("names, modes, times, links against the source (rsync -naciH --delete)") as step:
            entries = 0
            for name, target in targets.items():
                entries += sum(1 for _ in self.versions[name].rglob("*"))
                done = subprocess.run(["rsync", "-naciH", "--no-o", "--no-g", "--delete", f"{self.versions[name]}/",
                                       f"{target}/"], stdout=subprocess.PIPE, text=True, check=True)
                if done.stdout.strip():
                    raise SystemExit(f"demo: {name} differs from its source:\n{done.stdout[:2000]}")
            step.note("not one line")
            step.count(entries, "entries")

    def train(self, target):
        with Step("train a classifier from the mounted path (scikit-learn, Pillow)") as step:
            done = subprocess.run([sys.executable, Path(__file__).with_name("train.py"), target / "pictures"],
                                  stdout=subprocess.PIPE, text=True, check=True)
            step.note(done.stdout.strip())
            step.count(int(done.stdout.split()[0]), "pictures")

    def cache_state(self, what):
        with Step(what) as step:
            tier = self.ask("status")["tiers"][0]
            step.note(f"tier: {human(tier['used_bytes'])} used by cached commits, {human(tier['free_bytes'])} free")
            for commit in tier["commits"]:
                step.note(f"{commit['dataset']}@{commit['commit'][:8]} {commit['percent_cached']:.0f} % cached, "
                          f"own {human(commit['own_bytes'])}, shared {human(commit['shared_bytes'])}")
            step.count(1, "looks")
            return tier

    def age_out(self, targets):
        with Step("age out: unmount, time to live 1 s") as step:
            for target in targets.values():
                self.larder("umount", target)
            for name in targets:
                self.larder("cache", f"clipart@{name}", "--ttl", "1s")
            begin = time.monotonic()
            while self.ask("status")["tiers"][0]["commits"]:
                if time.monotonic() - begin > 60:
                    raise SystemExit("demo: the commits did not age out within a minute")
                time.sleep(0.2)
            step.note(f"the steward removed both {time.monotonic() - begin:.1f} s after the last use")
            step.count(len(targets), "commits")
        if self.cache_state("cache state after")["used_bytes"] != 0:
            raise SystemExit("demo: the tier still counts bytes of commits that aged out")

    def stop(self):
        with Step("clean up") as step:
            for target in sorted((self.work / "mnt").glob("*")) if (self.work / "mnt").is_dir() else []:
                if os.path.ismount(target):
                    self.larder("umount", target, check=False)
            self.larder("daemon", "stop", check=False)
            if self.lake:
                os.kill(self.lake.pid, signal.SIGTERM)
                self.lake.wait(20)
            files = sum(len(names) for _, _, names in os.walk(self.work))
            shutil.rmtree(self.work)
            step.count(files, "files")
            step.note("daemon, lake and every file of the demo are gone")

    def run(self):
        self.start_lake()
        self.make_versions()
        self.push("v1")
        self.push("v2")
        self.push_again()
        self.history()
        targets = {name: self.mount(name) for name in ("v1", "v2")}
        self.read_all("read every file of both versions, 8 readers, shuffled, nothing cached", targets)
        self.read_all("the same again", targets)
        self.same_tree(targets)
        self.train(targets["v2"])
        self.cache_state("cache state")
        self.age_out(targets)
        targets = {"v2": self.mount("v2")}
        self.read_all("read v2 again, from the lake", targets)


def digest(path):
    hasher, count = hashlib.blake2b(digest_size=16), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            hasher.update(block)
            count += len(block)
    return hasher.digest(), count


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--larder", required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--keep", action="store_true")
    demo = Demo(parser.parse_args())
    begin = time.monotonic()
    try:
        demo.run()
    except BaseException:
        print(f"demo: failed; what it left is in {demo.work}", file=sys.stderr)
        for log in (demo.work / "state" / "daemon.log", demo.work / "lake.log"):
            if log.exists():
                print(f"--- the end of {log}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
        if not demo.options.keep:
            if demo.lake:
                demo.larder("daemon", "stop", check=False)
                demo.lake.terminate()
        raise
    if demo.options.keep:
        exports = " ".join(f"{name}={demo.env[name]}" for name in
                           ("LARDER_LAKE", "LARDER_ENDPOINT", "LARDER_TIER", "LARDER_STATE", "LARDER_PATH_STYLE",
                            "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"))
        print(f"\nkept: look at {demo.work}/mnt/v2; to go on:\n  export {exports}\n"
              f"to end it: {demo.options.larder} umount {demo.work}/mnt/v2; {demo.options.larder} daemon stop; "
              f"kill {demo.lake.pid}; rm -r {demo.work}")
    else:
        demo.stop()
    print(f"demo: all steps hold, {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()
