//! Watches of pods, nodes, projects and Jobs as one stream of news. A watch that breaks goes on where it was; one that is too
//! old lists everything again.

use std::pin::Pin;

use futures::{Stream, StreamExt as _, stream};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::PartialObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

use super::node::NodeRecord;
use super::pod::{PodRecord, Reading};
use super::resource::Project;
use super::world::{JobRecord, News, ProjectRecord, World};

/// News that are taken together.
const CHUNK: usize = 1000;

/// News of any kind.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "nearly all news are of pods")]
pub enum Item {
    Pod(News<PodRecord>),
    Node(News<NodeRecord>),
    Project(News<ProjectRecord>),
    Job(News<JobRecord>),
    /// A watch does not work now; it is tried again.
    Trouble(&'static str, String),
}

/// A stream that never ends.
pub type Feed = Pin<Box<dyn Stream<Item = Vec<Item>> + Send>>;

/// How to read what comes.
#[derive(Debug, Clone)]
pub struct Readings {
    pub pod: Reading,
    pub pool_label: String,
}

impl Item {
    /// Takes it into the world. True where a decision may come out otherwise.
    pub fn enter(self, world: &mut World) -> bool {
        match self {
            Self::Pod(news) => world.take_pod(news),
            Self::Node(news) => world.take_node(news),
            Self::Project(news) => world.take_project(news),
            Self::Job(news) => world.take_job(news),
            Self::Trouble(kind, error) => {
                tracing::warn!(kind, error, "a watch is broken and is tried again");
                false
            }
        }
    }
}

/// Begins to watch.
pub fn feed(client: &Client, readings: Readings) -> Feed {
    let (pod, node) = (readings.pod.clone(), readings.clone());
    let pods = watch(Api::<Pod>::all(client.clone()), "pods", Item::Pod, move |object| PodRecord::of(&object, &pod));
    let nodes = watch(Api::<Node>::all(client.clone()), "nodes", Item::Node, move |object| {
        NodeRecord::of(&object, &node.pod.gpu_resource, &node.pool_label)
    });
    let projects = watch(Api::<Project>::all(client.clone()), "projects", Item::Project, |object: Project| {
        ProjectRecord { name: object.metadata.name.unwrap_or_default(), spec: object.spec, status: object.status }
    });
    let jobs = Api::<PartialObjectMeta<Job>>::all(client.clone());
    let jobs = watch(jobs, "jobs", Item::Job, |object: PartialObjectMeta<Job>| {
        let created = object.metadata.creation_timestamp.as_ref();
        let created_ms = created.map_or(0, |time| time.0.as_millisecond());
        JobRecord { uid: object.metadata.uid.unwrap_or_default(), created_ms }
    });
    stream::select_all([pods, nodes, projects, jobs]).ready_chunks(CHUNK).boxed()
}

fn watch<K, T>(
    api: Api<K>,
    kind: &'static str,
    wrap: fn(News<T>) -> Item,
    read: impl Fn(K) -> T + Send + 'static,
) -> Pin<Box<dyn Stream<Item = Item> + Send>>
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
    T: 'static,
{
    let events = watcher(api, watcher::Config::default()).default_backoff();
    let one = move |event: Result<Event<K>, watcher::Error>| match event {
        Ok(Event::Init) => wrap(News::Begin),
        Ok(Event::InitApply(object)) => wrap(News::Listed(read(object))),
        Ok(Event::InitDone) => wrap(News::Complete),
        Ok(Event::Apply(object)) => wrap(News::Is(read(object))),
        Ok(Event::Delete(object)) => wrap(News::Gone(read(object))),
        Err(error) => Item::Trouble(kind, error.to_string()),
    };
    events.map(one).boxed()
}
