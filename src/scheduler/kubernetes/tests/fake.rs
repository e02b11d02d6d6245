//! A small API server in this process: lists, watches, bindings, evictions, patches and leases over HTTP, with faults, and
//! with who makes evicted pods again.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::Notify;

/// What happens to a request instead of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is refused with this status, and nothing is done.
    Refused(u16),
    /// It is done, and the answer is a status of 500.
    AnswerLost,
}

/// The scheduler dies at a request that changes something.
#[derive(Debug, Clone, Copy)]
pub struct Death {
    /// Requests before it.
    pub after: u32,
    /// Whether the request is still carried out.
    pub done: bool,
}

#[derive(Debug, Default)]
struct Inner {
    version: u64,
    /// By kind and `namespace/name`.
    objects: BTreeMap<(String, String), Value>,
    /// Changes: version, kind, type, object.
    log: Vec<(u64, String, &'static str, Value)>,
    /// Changes up to this version are forgotten.
    forgotten: u64,
    /// Watches of earlier generations end.
    generation: u64,
    faults: HashMap<&'static str, VecDeque<Fault>>,
    death: Option<Death>,
    counts: BTreeMap<&'static str, u64>,
    /// Pods by the node that they were on once.
    on_node: HashMap<String, HashSet<String>>,
    /// Uids that got a node.
    bound: HashSet<String>,
    violations: Vec<String>,
    made: u64,
    events: Vec<Value>,
}

/// The server.
#[derive(Debug, Default)]
pub struct Fake {
    inner: Mutex<Inner>,
    changed: Arc<Notify>,
    /// The moment at which the scheduler is to die has come.
    pub died: Notify,
}

fn status(code: u16, message: &str) -> Response {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code});
    (StatusCode::from_u16(code).expect("a status"), axum::Json(body)).into_response()
}

fn done(value: &Value) -> Response {
    (StatusCode::CREATED, axum::Json(value)).into_response()
}

fn created() -> Response {
    done(&json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}))
}

impl Fake {
    /// Starts one; gives it and its address.
    pub async fn start() -> (Arc<Self>, String) {
        let fake = Arc::new(Self::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let router = axum::Router::new().fallback(handle).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (fake, address)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test has panicked in here")
    }

    /// Makes or replaces an object.
    pub fn put(&self, kind: &str, object: Value) {
        self.lock().put(kind, object);
        self.changed.notify_waiters();
    }

    /// Makes a node.
    pub fn node(&self, name: &str, gpus: u32) {
        self.node_with(name, gpus, json!({}));
    }

    /// Makes a node with more to allocate.
    pub fn node_with(&self, name: &str, gpus: u32, more: Value) {
        let mut allocatable =
            json!({"nvidia.com/gpu": gpus.to_string(), "cpu": "1000", "memory": "1000Gi", "pods": "1000"});
        for (key, value) in more.as_object().into_iter().flatten() {
            allocatable[key] = value.clone();
        }
        self.put("nodes", json!({"metadata": {"name": name, "uid": format!("node-{name}")},
            "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": null}]}}));
    }

    /// Makes a project.
    pub fn project(&self, name: &str, quota: f64) {
        self.put("projects", json!({"apiVersion": "larder.io/v1", "kind": "Project", "metadata": {"name": name, "uid": format!("project-{name}")}, "spec": {"quota": quota}}));
    }

    /// Makes a pod of a project: `2`, `0.5`, `1i`. It is made again when it was evicted.
    pub fn pod(&self, project: &str, name: &str, size: &str) {
        self.pod_with(project, name, size, |_| {});
    }

    /// Likewise, with changes.
    pub fn pod_with(&self, project: &str, name: &str, size: &str, change: impl FnOnce(&mut Value)) {
        let (gpus, interactive) = size.strip_suffix('i').map_or((size, false), |gpus| (gpus, true));
        let mut inner = self.lock();
        inner.made += 1;
        let mut pod = json!({
            "metadata": {
                "name": name, "namespace": "default", "uid": format!("uid-{}-{name}", inner.made),
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"larder.io/project": project},
                // The place in the queue is kept by who makes it again.
                "annotations": {"larder.io/queued-at": format!("2026-01-01T00:00:00.{:09}Z", inner.made)},
                "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": format!("job-{name}"), "controller": true}],
            },
            "spec": {"schedulerName": "larder", "containers": [{"name": "c"}]},
            "status": {"phase": "Pending"},
        });
        if interactive {
            pod["metadata"]["labels"]["larder.io/kind"] = json!("interactive");
        }
        if gpus.contains('.') {
            pod["metadata"]["annotations"]["larder.io/gpu-fraction"] = json!(gpus);
        } else {
            pod["spec"]["containers"][0]["resources"] = json!({"limits": {"nvidia.com/gpu": gpus}});
        }
        change(&mut pod);
        inner.put("pods", pod);
        drop(inner);
        self.changed.notify_waiters();
    }

    /// Gives a pod.
    pub fn get_pod(&self, name: &str) -> Option<Value> {
        self.lock().objects.get(&("pods".to_owned(), format!("default/{name}"))).cloned()
    }

    /// Gives the node of a pod.
    pub fn node_of(&self, name: &str) -> Option<String> {
        self.get_pod(name)?["spec"]["nodeName"].as_str().map(str::to_owned)
    }

    /// Gives all pods.
    pub fn pods(&self) -> Vec<Value> {
        let inner = self.lock();
        inner.objects.iter().filter(|((kind, _), _)| kind == "pods").map(|(_, pod)| pod.clone()).collect()
    }

    /// Gives what each project has in thousandths, and how many of its pods wait.
    pub fn shares(&self) -> BTreeMap<String, (u64, u64)> {
        let mut shares: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for pod in self.pods() {
            let share = shares
                .entry(pod["metadata"]["labels"]["larder.io/project"].as_str().unwrap_or("").to_owned())
                .or_default();
            match pod["spec"]["nodeName"].is_string() {
                true if pod["metadata"]["deletionTimestamp"].is_null() => share.0 += size(&pod),
                true => {}
                false => share.1 += 1,
            }
        }
        shares
    }

    /// Gives the status of a project.
    pub fn project_status(&self, name: &str) -> Value {
        self.lock()
            .objects
            .get(&("projects".to_owned(), name.to_owned()))
            .map_or(Value::Null, |project| project["status"].clone())
    }

    /// Gives who holds a lease.
    pub fn holder(&self, key: &str) -> Option<String> {
        let inner = self.lock();
        let lease = inner.objects.get(&("leases".to_owned(), key.to_owned()))?;
        lease["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }

    /// Deletes a pod.
    pub fn delete_pod(&self, name: &str) {
        self.lock().delete("pods", &format!("default/{name}"));
        self.changed.notify_waiters();
    }

    /// What ends has ended, and is made again under another name.
    pub fn reap(&self) {
        let mut inner = self.lock();
        let ending: Vec<Value> = inner
            .objects
            .iter()
            .filter(|((kind, _), object)| kind == "pods" && !object["metadata"]["deletionTimestamp"].is_null())
            .map(|(_, pod)| pod.clone())
            .collect();
        for mut pod in ending {
            let name = pod["metadata"]["name"].as_str().expect("a name").to_owned();
            inner.delete("pods", &format!("default/{name}"));
            inner.made += 1;
            let base = name.split('.').next().unwrap_or("").to_owned();
            pod["metadata"]["name"] = json!(format!("{base}.{}", inner.made));
            pod["metadata"]["uid"] = json!(format!("uid-{}-{base}", inner.made));
            let metadata = pod["metadata"].as_object_mut().expect("an object");
            metadata.remove("deletionTimestamp");
            for given in ["larder.io/gpus", "larder.io/gpu-share", "larder.io/start", "larder.io/grounds"] {
                metadata["annotations"].as_object_mut().expect("an object").remove(given);
            }
            pod["spec"].as_object_mut().expect("an object").remove("nodeName");
            pod["status"] = json!({"phase": "Pending"});
            inner.put("pods", pod);
        }
        drop(inner);
        self.changed.notify_waiters();
    }

    /// The next requests of this verb (`bind`, `evict`, `watch`, `get`, `lease`) have these faults.
    pub fn fault(&self, verb: &'static str, faults: &[Fault]) {
        self.lock().faults.entry(verb).or_default().extend(faults);
    }

    /// The scheduler dies then.
    pub fn doom(&self, death: Death) {
        self.lock().death = Some(death);
    }

    /// All watches end now; with `forget` what they would go on with is too old.
    pub fn drop_watches(&self, forget: bool) {
        let mut inner = self.lock();
        inner.generation += 1;
        if forget {
            inner.version += 1;
            inner.forgotten = inner.version;
        }
        drop(inner);
        self.changed.notify_waiters();
    }

    /// Gives how many requests of a verb came.
    pub fn count(&self, verb: &str) -> u64 {
        self.lock().counts.get(verb).copied().unwrap_or(0)
    }

    /// Gives how often a pod got a node.
    pub fn bindings(&self) -> usize {
        self.lock().bound.len()
    }

    /// Gives the reasons of the events of a pod.
    pub fn events(&self, pod: &str) -> Vec<String> {
        let of = |event: &&Value| event["involvedObject"]["name"] == *pod;
        self.lock().events.iter().filter(of).map(|event| event["reason"].as_str().unwrap_or("").to_owned()).collect()
    }

    /// No GPU was ever given twice, no pod placed twice.
    #[track_caller]
    pub fn assert_sound(&self) {
        assert!(self.lock().violations.is_empty(), "{:?}", self.lock().violations);
    }
}

/// Thousandths that a pod asks for.
fn size(pod: &Value) -> u64 {
    if let Some(part) = pod["metadata"]["annotations"]["larder.io/gpu-fraction"].as_str() {
        return part.parse::<crate::quota::MilliGpus>().expect("a part").0;
    }
    let whole = pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"].as_str();
    whole.map_or(0, |whole| whole.parse::<u64>().expect("a number") * 1000)
}

impl Inner {
    fn key(object: &Value) -> String {
        let name = object["metadata"]["name"].as_str().unwrap_or("");
        object["metadata"]["namespace"].as_str().map_or(name.to_owned(), |namespace| format!("{namespace}/{name}"))
    }

    fn put(&mut self, kind: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let key = (kind.to_owned(), Self::key(&object));
        if let Some(node) = object["spec"]["nodeName"].as_str() {
            self.on_node.entry(node.to_owned()).or_default().insert(key.1.clone());
        }
        let change = if self.objects.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        self.log.push((self.version, kind.to_owned(), change, object));
    }

    fn delete(&mut self, kind: &str, key: &str) {
        if let Some(mut object) = self.objects.remove(&(kind.to_owned(), key.to_owned())) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.log.push((self.version, kind.to_owned(), "DELETED", object));
        }
    }

    fn bind(&mut self, key: &str, binding: &Value) -> Response {
        let Some(mut pod) = self.objects.get(&("pods".to_owned(), key.to_owned())).cloned() else {
            return status(404, "no such pod");
        };
        let uid = pod["metadata"]["uid"].as_str().unwrap_or("").to_owned();
        if binding["metadata"]["uid"].as_str().is_some_and(|wanted| wanted != uid) {
            return status(409, "another pod of that name");
        }
        if pod["spec"]["nodeName"].is_string() || !pod["metadata"]["deletionTimestamp"].is_null() {
            return status(409, "the pod has a node, or is being deleted");
        }
        pod["spec"]["nodeName"] = binding["target"]["name"].clone();
        for (name, value) in binding["metadata"]["annotations"].as_object().into_iter().flatten() {
            pod["metadata"]["annotations"][name] = value.clone();
        }
        pod["status"] = json!({"phase": "Running", "conditions": [{"type": "PodScheduled", "status": "True"}]});
        if !self.bound.insert(uid) {
            self.violations.push(format!("{key} was placed twice"));
        }
        self.put("pods", pod);
        self.check(binding["target"]["name"].as_str().expect("a node"));
        created()
    }

    /// Looks whether a GPU of a node has more than it can.
    fn check(&mut self, node: &str) {
        let mut used: BTreeMap<u64, u64> = BTreeMap::new();
        for key in self.on_node.get(node).into_iter().flatten() {
            let pod = self.objects.get(&("pods".to_owned(), key.clone()));
            let Some(pod) = pod.filter(|pod| pod["spec"]["nodeName"] == *node) else {
                continue;
            };
            let given = pod["metadata"]["annotations"]["larder.io/gpus"].as_str().unwrap_or("");
            for gpu in given.split(',').filter_map(|gpu| gpu.parse().ok()) {
                *used.entry(gpu).or_default() += size(pod).min(1000);
            }
        }
        let node_object = &self.objects[&("nodes".to_owned(), node.to_owned())];
        let there =
            node_object["status"]["allocatable"]["nvidia.com/gpu"].as_str().unwrap_or("0").parse().expect("a number");
        for (gpu, used) in used {
            if used > 1000 || gpu >= there {
                self.violations.push(format!("GPU {gpu} of {node} has {used}"));
            }
        }
    }

    fn evict(&mut self, key: &str, eviction: &Value) -> Response {
        let Some(mut pod) = self.objects.get(&("pods".to_owned(), key.to_owned())).cloned() else {
            return status(404, "no such pod");
        };
        let wanted = &eviction["deleteOptions"]["preconditions"]["uid"];
        if !wanted.is_string() {
            self.violations.push(format!("{key} is evicted whoever it is"));
        }
        if *wanted != pod["metadata"]["uid"] {
            return status(409, "another pod of that name");
        }
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:30Z");
        self.put("pods", pod);
        created()
    }

    fn patch_status(&mut self, kind: &str, key: &str, patch: &Value) -> Response {
        let Some(mut object) = self.objects.get(&(kind.to_owned(), key.to_owned())).cloned() else {
            return status(404, "no such object");
        };
        let version = &patch["metadata"]["resourceVersion"];
        if version.is_string() && *version != object["metadata"]["resourceVersion"] {
            return status(409, "it has changed");
        }
        for (name, value) in patch["status"].as_object().into_iter().flatten() {
            object["status"][name] = value.clone();
        }
        self.put(kind, object.clone());
        done(&object)
    }

    /// Leases: made once, replaced only by who knows the version.
    fn lease(&mut self, method: &Method, key: &str, lease: Value) -> Response {
        let place = ("leases".to_owned(), key.to_owned());
        let known = self.objects.get(&place).cloned();
        match (method, known) {
            (&Method::GET, Some(known)) => done(&known),
            (&Method::GET, None) => status(404, "no such lease"),
            (&Method::POST, Some(_)) => status(409, "there is one"),
            (&Method::PUT, Some(known))
                if known["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"] =>
            {
                status(409, "it has changed")
            }
            _ => {
                let mut lease = lease;
                lease["metadata"]["namespace"] = json!(key.split('/').next().unwrap_or(""));
                self.put("leases", lease);
                done(&self.objects[&place])
            }
        }
    }
}

/// What a path means.
#[derive(Debug, Default)]
struct Target {
    kind: String,
    key: String,
    sub: String,
}

fn target(path: &str) -> Target {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let rest = if parts.first() == Some(&"api") { &parts[2..] } else { &parts[3..] };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] => (Some(*namespace), rest),
        rest => (None, rest),
    };
    let name = rest.get(1).copied().unwrap_or("");
    let key = namespace.map_or(name.to_owned(), |namespace| format!("{namespace}/{name}"));
    Target { kind: rest[0].to_owned(), key, sub: rest.get(2).copied().unwrap_or("").to_owned() }
}

async fn handle(State(fake): State<Arc<Fake>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let target = target(parts.uri.path());
    let query: HashMap<String, String> = parts
        .uri
        .query()
        .unwrap_or("")
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    let body = axum::body::to_bytes(body, usize::MAX).await.expect("a body");
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let watches = query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
    let verb = match (&parts.method, target.kind.as_str(), target.sub.as_str()) {
        (_, "leases", _) => "lease",
        (_, _, "binding") => "bind",
        (_, _, "eviction") => "evict",
        (&Method::GET, _, _) if watches => "watch",
        (&Method::GET, _, _) if target.key.is_empty() => "list",
        (&Method::GET, _, _) => "get",
        _ => "tell",
    };
    if fake.meets(verb).await {
        // Whoever asked has died.
        std::future::pending::<()>().await;
    }
    let fault = fake.lock().faults.get_mut(verb).and_then(VecDeque::pop_front);
    if let Some(Fault::Refused(code)) = fault {
        return status(code, "refused by the test");
    }
    let answer = match verb {
        "watch" => {
            return watch(
                fake,
                target.kind,
                query.get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0),
            );
        }
        _ => answer(&fake, verb, &parts.method, &target, body),
    };
    fake.changed.notify_waiters();
    match fault {
        Some(Fault::AnswerLost) => status(500, "the answer is lost"),
        _ => answer,
    }
}

fn answer(fake: &Fake, verb: &str, method: &Method, target: &Target, body: Value) -> Response {
    let mut inner = fake.lock();
    let place = (target.kind.clone(), target.key.clone());
    match verb {
        "lease" if target.key.ends_with('/') => {
            let key = format!("{}{}", target.key, body["metadata"]["name"].as_str().unwrap_or(""));
            inner.lease(method, &key, body)
        }
        "lease" => inner.lease(method, &target.key, body),
        "bind" => inner.bind(&target.key, &body),
        "evict" => inner.evict(&target.key, &body),
        "get" => inner.objects.get(&place).map_or(status(404, "not there"), done),
        "list" => {
            let items: Vec<&Value> =
                inner.objects.iter().filter(|((kind, _), _)| *kind == target.kind).map(|(_, v)| v).collect();
            done(
                &json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": inner.version.to_string()}, "items": items}),
            )
        }
        _ if target.kind == "events" => {
            inner.events.push(body.clone());
            done(&body)
        }
        _ => inner.patch_status(&target.kind, &target.key, &body),
    }
}

impl Fake {
    /// Counts a request. True where it is the one at which the scheduler dies and that is not carried out.
    async fn meets(self: &Arc<Self>, verb: &'static str) -> bool {
        let mut inner = self.lock();
        *inner.counts.entry(verb).or_default() += 1;
        if !["bind", "evict"].contains(&verb) {
            return false;
        }
        let Some(death) = inner.death.as_mut() else {
            return false;
        };
        if death.after > 0 {
            death.after -= 1;
            return false;
        }
        let done = death.done;
        inner.death = None;
        drop(inner);
        self.died.notify_one();
        !done
    }
}

fn watch(fake: Arc<Fake>, kind: String, from: u64) -> Response {
    let generation = fake.lock().generation;
    let next = move |(fake, kind, from): (Arc<Fake>, String, u64)| async move {
        loop {
            let notify = fake.changed.clone();
            let changed = notify.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let inner = fake.lock();
                if inner.generation != generation {
                    return None;
                }
                if from < inner.forgotten {
                    let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "too old resource version", "reason": "Expired", "code": 410}});
                    drop(inner);
                    return Some((Ok::<_, std::io::Error>(Bytes::from(format!("{gone}\n"))), (fake, kind, u64::MAX)));
                }
                let at = inner.log.partition_point(|(version, ..)| *version <= from);
                let news: Vec<String> = inner.log[at..]
                    .iter()
                    .filter(|(_, of, ..)| *of == kind)
                    .map(|(_, _, change, object)| format!("{}\n", json!({"type": change, "object": object})))
                    .collect();
                let last = inner.log.last().map_or(from, |(version, ..)| (*version).max(from));
                if !news.is_empty() {
                    drop(inner);
                    return Some((Ok(Bytes::from(news.concat())), (fake, kind, last)));
                }
            }
            let _ = tokio::time::timeout(Duration::from_secs(1), changed).await;
        }
    };
    let events = stream::unfold((fake, kind, from), next);
    ([("content-type", "application/json")], Body::from_stream(events)).into_response()
}
