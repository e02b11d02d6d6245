//! What the catalog's tests share: a catalog over a lake that fails on demand, and small commits.

use std::sync::Arc;

use crate::format::pack::{PackIndex, Recipe, Source};
use crate::format::refs::{DatasetName, RefName, Revision};
use crate::store::catalog::Catalog;
use crate::store::catalog::import::{ImportError, ImportOptions, ImportOutcome, ImportProgress, import};
use crate::store::catalog::lakefmt::RefChoice;
use crate::store::fetch::{FetchConfig, Fetcher};
use crate::store::kv::Kv;
use crate::testkit::faulty_lake::{FaultyLake, MemLake};

/// A catalog with its lake and its directory.
pub(crate) struct Bench {
    pub faulty: Arc<FaultyLake>,
    pub memory: Arc<MemLake>,
    pub catalog: Catalog,
    pub dir: tempfile::TempDir,
}

pub(crate) async fn bench() -> Bench {
    let (faulty, memory) = FaultyLake::over_memory();
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::open_or_create(faulty.clone(), dir.path(), RefChoice::Cas).await.unwrap();
    Bench { faulty, memory, catalog, dir }
}

impl Bench {
    /// Opens the same lake as a node that knows nothing yet.
    pub(crate) async fn fresh(&self) -> (Catalog, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(self.faulty.clone(), dir.path()).await.unwrap();
        (catalog, dir)
    }

    pub(crate) fn fetcher(&self) -> Fetcher {
        let config = FetchConfig { read_timeout_ms: 2000, ..FetchConfig::default() };
        let runtime = tokio::runtime::Handle::current();
        Fetcher::new(self.faulty.clone(), None, Kv::in_memory(), config, runtime)
    }

    pub(crate) fn object(&self, key: &str, body: &str) {
        self.memory.set_foreign("bucket", key, body.to_owned(), false);
    }

    pub(crate) async fn import(&self, prefix: &str, branch: &str, digest: bool) -> Result<ImportOutcome, ImportError> {
        let options = options(prefix, branch, digest);
        import(&self.catalog, &options, &ImportProgress::default()).await
    }

    /// Gives the assembled packs bytes of their own, as a push does.
    pub(crate) async fn make_native(&self) {
        for key in self.memory.keys() {
            let Some(stem) = key.strip_suffix(".recipe") else {
                continue;
            };
            let mut recipe = Recipe::decode(&self.memory.bytes_of(&key).unwrap()).unwrap();
            let Source::Assembled { pins } = &recipe.source else {
                continue;
            };
            let index = self.memory.bytes_of(&format!("{stem}.index")).unwrap();
            let index = PackIndex::decode(&index).unwrap();
            let mut bytes = vec![0; usize::try_from(index.len).unwrap()];
            for (content, pin) in index.contents.iter().zip(pins) {
                use crate::store::lake::Lake;
                use futures::TryStreamExt;
                let body = self.memory.get_pinned(pin, None).await.unwrap();
                let body: Vec<bytes::Bytes> = body.stream.try_collect().await.unwrap();
                let body = body.concat();
                let at = usize::try_from(content.place.start()).unwrap();
                bytes[at..at + body.len()].copy_from_slice(&body);
            }
            let name = stem.rsplit('/').next().unwrap().to_owned();
            self.memory.set(&format!("data/{name}"), bytes);
            recipe.source = Source::Native { key: name };
            self.memory.set(&key, recipe.encode());
        }
    }
}

pub(crate) fn options(prefix: &str, branch: &str, digest: bool) -> ImportOptions {
    ImportOptions {
        bucket: "bucket".to_owned(),
        prefix: prefix.to_owned(),
        dataset: DatasetName::parse("photos").unwrap(),
        message: "imported".to_owned(),
        meta: Vec::new(),
        branch: Some(RefName::parse(branch).unwrap()),
        tag: None,
        exclude: Vec::new(),
        digest,
    }
}

pub(crate) fn rev(text: &str) -> Revision {
    Revision::parse(text).unwrap()
}
