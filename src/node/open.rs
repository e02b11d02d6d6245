//! From the configuration to its components: the lake, tiers, limits of fetching.
//!
//! The one place where a section of the configuration becomes what a component takes. Components
//! receive their own struct and never see the configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{Checksums, Config, FetchSection, LakeSection, PrefetchLevel, Sse, TierSection, VerifyLevel};
use crate::store::catalog::lakefmt::RefChoice;
use crate::store::catalog::{Catalog, CatalogError};
use crate::store::fetch::{self, FetchConfig, FetchTier, Fetcher};
use crate::store::kv::Kv;
use crate::store::lake::s3::{self, LakeOpenError, LakeUrlError, S3Config, S3Lake, SecretKey};
use crate::store::lake::watch::{Reopen, WatchedLake};
use crate::store::lake::{Lake, LakeError};
use crate::store::tier::{InitOptions, Tier, TierConfig, TierError};

use super::place::{Place, PlaceError};
use super::siblings::Instance;

/// Why a component could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    LakeUrl(#[from] LakeUrlError),
    #[error("cannot set up the lake {url}")]
    Lake {
        url: String,
        #[source]
        source: LakeOpenError,
    },
    #[error("{}: cannot read the key for SSE-C", path.display())]
    Key {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: the key for SSE-C must be exactly 32 bytes, these are {len}", path.display())]
    KeyLength { path: PathBuf, len: usize },
    #[error("cannot open the lake {url}")]
    Catalog {
        url: String,
        #[source]
        source: Box<CatalogError>,
    },
    #[error("the tier `{name}` cannot be used")]
    Tier {
        name: String,
        #[source]
        source: TierError,
    },
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Reach(#[from] LakeError),
}

/// Gives what the S3 client is told.
pub fn s3_config(lake: &LakeSection) -> Result<S3Config, OpenError> {
    let mut config = S3Config::parse_url(&lake.url)?;
    config.endpoint = lake.endpoint.clone();
    config.region = lake.region.clone();
    config.path_style = lake.path_style;
    config.ca_file = lake.ca_file.clone();
    config.sse = match lake.sse {
        Sse::None => s3::Sse::None,
        Sse::S3 => s3::Sse::S3,
        Sse::Kms => s3::Sse::Kms { key_id: lake.sse_kms_key.clone() },
        Sse::C => s3::Sse::Customer { key: read_key(lake.sse_c_key_file.as_deref())? },
    };
    config.checksums = match lake.checksums {
        Checksums::Auto => s3::Checksums::Auto,
        Checksums::Required => s3::Checksums::WhenRequired,
        Checksums::Supported => s3::Checksums::WhenSupported,
    };
    config.connect_timeout = lake.connect_timeout.0;
    config.read_timeout = lake.read_timeout.0;
    Ok(config)
}

fn read_key(path: Option<&Path>) -> Result<SecretKey, OpenError> {
    let path = path.expect("the configuration was checked: SSE-C has a key file");
    let raw = std::fs::read(path).map_err(|source| OpenError::Key { path: path.to_owned(), source })?;
    let len = raw.len();
    let key = raw.try_into().map_err(|_| OpenError::KeyLength { path: path.to_owned(), len })?;
    Ok(SecretKey(key))
}

/// Opens the lake that is configured: an S3 store, or a directory in this process. An S3 client
/// speaks to nobody yet.
pub async fn open_lake(lake: &LakeSection) -> Result<Arc<WatchedLake>, OpenError> {
    let failed = |source| OpenError::Lake { url: lake.url.clone(), source };
    if lake.url.starts_with('/') {
        let opened = S3Lake::embedded(Path::new(&lake.url)).await.map_err(failed)?;
        return Ok(Arc::new(WatchedLake::new(Arc::new(opened), None)));
    }
    let config = s3_config(lake)?;
    let opened = S3Lake::connect(config.clone()).await.map_err(failed)?;
    let reopen: Reopen = Box::new(move || {
        let config = config.clone();
        Box::pin(async move {
            let opened = S3Lake::connect(config).await;
            let opened = opened.inspect_err(|error| tracing::warn!(%error, "the credentials cannot be asked for"));
            opened.ok().map(|lake| Arc::new(lake) as Arc<dyn Lake>)
        })
    });
    Ok(Arc::new(WatchedLake::new(Arc::new(opened), Some(reopen))))
}

/// Opens the catalog of a lake. The embedded lake is made where there is none; a prefix of a store
/// is not, because it may be a slip of the pen.
pub async fn open_catalog(lake: Arc<dyn Lake>, config: &Config) -> Result<Catalog, OpenError> {
    let url = config.lake.url.clone();
    let opened = if url.starts_with('/') {
        Catalog::open_or_create(lake, &config.state, RefChoice::Auto).await
    } else {
        Catalog::open(lake, &config.state).await
    };
    opened.map_err(|source| OpenError::Catalog { url, source: Box::new(source) })
}

/// Opens the catalog of a lake for writing: makes the lake where there is none.
pub async fn open_or_create_catalog(lake: Arc<dyn Lake>, config: &Config) -> Result<Catalog, OpenError> {
    let url = config.lake.url.clone();
    let opened = Catalog::open_or_create(lake, &config.state, RefChoice::Auto).await;
    opened.map_err(|source| OpenError::Catalog { url, source: Box::new(source) })
}

/// Makes a fetcher over a lake and a tier.
pub fn open_fetcher(
    lake: Arc<dyn Lake>,
    tier: Option<Tier>,
    kv: Kv,
    section: &FetchSection,
    rt: tokio::runtime::Handle,
) -> Fetcher {
    let port = tier.map(|tier| Arc::new(tier) as Arc<dyn FetchTier>);
    Fetcher::new(lake, port, kv, fetch_config(section), rt)
}

/// Opens a tier. The laptop's own is made on first use; any other is refused without its marker.
pub fn open_tier(name: &str, section: &TierSection, place: &Place) -> Result<Tier, OpenError> {
    let node = place.node_id()?;
    let failed = |source| OpenError::Tier { name: name.to_owned(), source };
    if section.auto_init && !Tier::is_tier(&section.path) {
        let options = InitOptions { dir_mode: 0o700, ..InitOptions::default() };
        match Tier::init(&section.path, &options) {
            Ok(_) => {}
            // Another command made it at the same time.
            Err(_) if Tier::is_tier(&section.path) => {}
            Err(source) => return Err(failed(source)),
        }
    }
    let config = tier_config(section);
    let opened = match Instance::enter(place) {
        Ok(instance) => Tier::open_as(&section.path, node, instance.id(), Arc::new(instance), config),
        Err(error) => {
            tracing::info!(%error, "if this process is killed, others learn it only by and by");
            Tier::open(&section.path, node, config)
        }
    };
    opened.map_err(failed)
}

/// Gives what a tier is told.
pub fn tier_config(section: &TierSection) -> TierConfig {
    TierConfig {
        capacity_bytes: section.capacity.map(|size| size.0),
        ttl_ms: section.ttl.map(|ttl| ttl.as_ms()),
        high_watermark_percent: section.high_watermark.0,
        low_watermark_percent: section.low_watermark.0,
        grace_ms: section.grace.as_ms(),
        space_wait_ms: section.space_wait.as_ms(),
        ..TierConfig::default()
    }
}

/// Gives what fetching is told.
pub fn fetch_config(section: &FetchSection) -> FetchConfig {
    FetchConfig {
        memory_bytes_max: section.memory.0,
        in_flight_bytes_max: section.bytes_in_flight.0,
        prefetch_requests_max: usize::try_from(section.requests).unwrap_or(usize::MAX),
        read_timeout_ms: section.give_up.as_ms(),
        stall_timeout_ms: section.stall_timeout.as_ms(),
        claim_wait_ms: section.claim_wait.as_ms(),
        ..FetchConfig::default()
    }
}

/// Gives the fetcher's word for a level of verification.
pub fn verify(level: VerifyLevel) -> fetch::Verify {
    match level {
        VerifyLevel::Tier => fetch::Verify::Tier,
        VerifyLevel::Node => fetch::Verify::Node,
        VerifyLevel::Always => fetch::Verify::Always,
    }
}

/// Gives the fetcher's word for a level of prefetching.
pub fn prefetch(level: PrefetchLevel) -> fetch::Prefetch {
    match level {
        PrefetchLevel::None => fetch::Prefetch::None,
        PrefetchLevel::Touched => fetch::Prefetch::Touched,
        PrefetchLevel::All => fetch::Prefetch::All,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;
    use crate::config::{self, Env};

    fn section(flags: &[(&str, &str)]) -> LakeSection {
        let flags = flags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let vars = BTreeMap::from([("HOME".to_owned(), "/home/ada".to_owned())]);
        let env = Env { vars, cwd: PathBuf::from("/cwd") };
        config::load::merge("", Path::new("-"), &env, &flags).expect("is valid").config.lake
    }

    #[test]
    fn what_is_configured_of_a_store_reaches_its_client() {
        let dir = tempfile::tempdir().expect("a directory");
        let key_file = dir.path().join("key");
        std::fs::write(&key_file, [7; 32]).expect("writes");
        let lake = section(&[
            ("lake.url", "s3://bucket/a/b/"),
            ("lake.endpoint", "https://s3.example.org"),
            ("lake.region", "nl-1"),
            ("lake.path_style", "false"),
            ("lake.ca_file", "/etc/ca.pem"),
            ("lake.checksums", "supported"),
            ("lake.connect_timeout", "7s"),
            ("lake.read_timeout", "9s"),
            ("lake.sse", "c"),
            ("lake.sse_c_key_file", key_file.to_str().expect("plain")),
        ]);
        let wanted = S3Config {
            endpoint: Some("https://s3.example.org".to_owned()),
            region: Some("nl-1".to_owned()),
            path_style: Some(false),
            ca_file: Some(PathBuf::from("/etc/ca.pem")),
            checksums: s3::Checksums::WhenSupported,
            connect_timeout: std::time::Duration::from_secs(7),
            read_timeout: std::time::Duration::from_secs(9),
            sse: s3::Sse::Customer { key: SecretKey([7; 32]) },
            ..S3Config::new("bucket", "a/b")
        };
        assert_eq!(s3_config(&lake).expect("a client's configuration"), wanted);
        std::fs::write(&key_file, [7; 31]).expect("writes");
        assert!(matches!(s3_config(&lake), Err(OpenError::KeyLength { len: 31, .. })));
    }

    #[test]
    fn encryption_by_the_store_and_by_its_key_service_are_told_apart() {
        let sse = |flags: &[(&str, &str)]| s3_config(&section(flags)).expect("valid").sse;
        let url = ("lake.url", "s3://bucket");
        assert_eq!(sse(&[url]), s3::Sse::None);
        assert_eq!(sse(&[url, ("lake.sse", "s3")]), s3::Sse::S3);
        assert_eq!(sse(&[url, ("lake.sse", "kms")]), s3::Sse::Kms { key_id: None });
        let with_key = sse(&[url, ("lake.sse", "kms"), ("lake.sse_kms_key", "alias/x")]);
        assert_eq!(with_key, s3::Sse::Kms { key_id: Some("alias/x".to_owned()) });
    }
}
