//! The format object at the root of a lake's prefix: `larder.json`.
//!
//! It says which format version the prefix has, which lake it is (so that a tier never mixes two),
//! and how refs move. It is written once, by whoever comes first, and never changed.
//!
//! Where the store keeps conditions, the first exclusive write wins. Where it does not, each maker
//! puts a candidate of its own, waits until every maker that also found nothing must have put its
//! own, and all write the smallest candidate's bytes. `docs/formats/lake.md` has the argument.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::future::join_all;

use crate::format::ids::LakeId;
use crate::format::paths::FORMAT_KEY;
use crate::store::lake::retry::{RetryPolicy, with_retry};
use crate::store::lake::{Lake, LakeError, PutIf, get_all, list_all};

/// The newest format version that this larder reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// No format object is longer.
const FORMAT_BYTES_MAX: u64 = 64 * 1024;
/// Where probes of the store and candidates of its format object lie, for moments.
const PROBE_PREFIX: &str = "probe/";
/// Writers that race in a probe.
const PROBE_RACERS: u32 = 8;
/// Longer than a small put may take: see [`create_without_conditions`].
const SETTLE: Duration = Duration::from_secs(3);

/// How refs move in a lake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RefMode {
    /// Conditional writes: one object per ref, compared and swapped.
    Cas,
    /// An append-only log per ref; racing writers leave two heads, both visible.
    Log,
}

impl std::fmt::Display for RefMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cas => "cas",
            Self::Log => "log",
        })
    }
}

/// What was asked for when a lake is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RefChoice {
    /// `Cas` where the store proves that it can, else `Log`.
    #[default]
    Auto,
    Cas,
    Log,
}

impl RefChoice {
    /// Says whether a lake with this mode is what was asked for.
    pub fn allows(self, mode: RefMode) -> bool {
        !matches!((self, mode), (Self::Cas, RefMode::Log) | (Self::Log, RefMode::Cas))
    }
}

/// The content of `larder.json`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LakeFormat {
    pub format: u32,
    pub lake_id: LakeId,
    pub refs: RefMode,
    /// Unix time in milliseconds.
    pub created_ms: i64,
    /// Names of features that a reader must know.
    #[serde(default)]
    pub features: Vec<String>,
}

/// The part of the format object that every version has.
#[derive(serde::Deserialize)]
struct Version {
    format: u32,
}

/// Says why a lake cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("{url}: no larder.json there: this is not a lake yet; `larder lake init` makes one")]
    Missing { url: String },
    #[error("{url}: has no larder.json but other objects, such as `{key}`; point LARDER_LAKE at an empty prefix")]
    NotEmpty { url: String, key: String },
    #[error("{url}: has format version {found}, this larder knows up to {known}; use a newer larder")]
    Newer { url: String, found: u32, known: u32 },
    #[error("{url}: needs the feature `{feature}`, which this larder does not know; use a newer larder")]
    Feature { url: String, feature: String },
    #[error("{url}: larder.json is damaged; restore it, or point LARDER_LAKE at another prefix")]
    Damaged {
        url: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("{url}: the store does not keep conditions of writes ({why}), so refs cannot move by them; use --refs log")]
    NoConditions { url: String, why: &'static str },
    #[error("{url}: the lake exists already, with refs in {found} mode, which never changes")]
    OtherMode { url: String, found: RefMode },
    #[error("{url}: cannot read or write larder.json")]
    Lake {
        url: String,
        #[source]
        source: LakeError,
    },
}

/// What a probe found out about a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conditions {
    Kept,
    /// Not, and in which way.
    Ignored(&'static str),
}

fn lake_error(lake: &dyn Lake) -> impl Fn(LakeError) -> FormatError {
    let url = lake.url();
    move |source| FormatError::Lake { url: url.clone(), source }
}

/// Reads the format object; None where the prefix holds none.
pub async fn read(lake: &dyn Lake) -> Result<Option<LakeFormat>, FormatError> {
    match get_all(lake, FORMAT_KEY, FORMAT_BYTES_MAX).await {
        Ok(bytes) => decode(&lake.url(), &bytes).map(Some),
        Err(LakeError::NotFound { .. }) => Ok(None),
        Err(error) => Err(lake_error(lake)(error)),
    }
}

/// Decodes a format object; refuses what this larder does not know.
fn decode(url: &str, bytes: &[u8]) -> Result<LakeFormat, FormatError> {
    let damaged = |source| FormatError::Damaged { url: url.to_owned(), source };
    let version: Version = serde_json::from_slice(bytes).map_err(damaged)?;
    if version.format > FORMAT_VERSION {
        return Err(FormatError::Newer { url: url.to_owned(), found: version.format, known: FORMAT_VERSION });
    }
    let format: LakeFormat = serde_json::from_slice(bytes).map_err(damaged)?;
    match format.features.first() {
        Some(feature) => Err(FormatError::Feature { url: url.to_owned(), feature: feature.clone() }),
        None => Ok(format),
    }
}

fn encode(format: &LakeFormat) -> Bytes {
    let mut text = serde_json::to_vec_pretty(format).expect("texts and numbers encode");
    text.push(b'\n');
    text.into()
}

/// Reads the format object, or makes one; of racing makers one wins and all see its object.
pub async fn open_or_create(lake: &dyn Lake, refs: RefChoice) -> Result<LakeFormat, FormatError> {
    open_or_create_within(lake, refs, SETTLE).await
}

async fn open_or_create_within(lake: &dyn Lake, refs: RefChoice, settle: Duration) -> Result<LakeFormat, FormatError> {
    if let Some(format) = read(lake).await? {
        return check_mode(lake, refs, format);
    }
    if let Some(key) = foreign_key(lake).await? {
        // Somebody may have made the lake, and used it, since we looked.
        return match read(lake).await? {
            Some(format) => check_mode(lake, refs, format),
            None => Err(FormatError::NotEmpty { url: lake.url(), key }),
        };
    }
    let conditions = probe_again(lake).await.map_err(lake_error(lake))?;
    let mode = match (refs, conditions) {
        (RefChoice::Log, _) | (RefChoice::Auto, Conditions::Ignored(_)) => RefMode::Log,
        (_, Conditions::Kept) => RefMode::Cas,
        (RefChoice::Cas, Conditions::Ignored(why)) => {
            return Err(FormatError::NoConditions { url: lake.url(), why });
        }
    };
    let format = LakeFormat {
        format: FORMAT_VERSION,
        lake_id: LakeId(uuid::Uuid::new_v4()),
        refs: mode,
        created_ms: now_ms(),
        features: Vec::new(),
    };
    let made = match conditions {
        Conditions::Kept => create_exclusively(lake, &format).await,
        Conditions::Ignored(_) => create_without_conditions(lake, &format, settle).await,
    };
    made.map_err(lake_error(lake))?;
    let found = read(lake).await?.ok_or_else(|| FormatError::Missing { url: lake.url() })?;
    check_mode(lake, refs, found)
}

fn check_mode(lake: &dyn Lake, refs: RefChoice, format: LakeFormat) -> Result<LakeFormat, FormatError> {
    if refs.allows(format.refs) {
        return Ok(format);
    }
    Err(FormatError::OtherMode { url: lake.url(), found: format.refs })
}

fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

/// Finds an object that is none of a lake that is just being made.
async fn foreign_key(lake: &dyn Lake) -> Result<Option<String>, FormatError> {
    let policy = RetryPolicy::default();
    let page = with_retry(&policy, || lake.list("", None)).await.map_err(lake_error(lake))?;
    let ours = |key: &str| key.starts_with(PROBE_PREFIX) || key == FORMAT_KEY;
    Ok(page.objects.into_iter().map(|object| object.key).find(|key| !ours(key)))
}

async fn create_exclusively(lake: &dyn Lake, format: &LakeFormat) -> Result<(), LakeError> {
    let body = encode(format);
    let policy = RetryPolicy::default();
    match with_retry(&policy, || lake.put(FORMAT_KEY, body.clone(), PutIf::Absent)).await {
        // Somebody else was first, or our own answer was lost: what is there counts.
        Ok(_) | Err(LakeError::Precondition { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Agrees on one format object among makers on a store without conditions.
///
/// Each puts a candidate, waits, and all who put one before the first of them chose see the same
/// candidates. A later one looks at the format object once more before it chooses, and finds it.
async fn create_without_conditions(lake: &dyn Lake, format: &LakeFormat, settle: Duration) -> Result<(), LakeError> {
    let policy = RetryPolicy::default();
    let prefix = format!("{PROBE_PREFIX}format/");
    let mine = format!("{prefix}{}", uuid::Uuid::now_v7());
    with_retry(&policy, || lake.put(&mine, encode(format), PutIf::Always)).await?;
    tokio::time::sleep(settle).await;
    let there = get_all(lake, FORMAT_KEY, FORMAT_BYTES_MAX).await;
    if matches!(there, Err(LakeError::NotFound { .. })) {
        let candidates = list_all(lake, &prefix).await?;
        let smallest = candidates.into_iter().map(|candidate| candidate.key).min();
        let smallest = smallest.unwrap_or_else(|| mine.clone());
        match get_all(lake, &smallest, FORMAT_BYTES_MAX).await {
            Ok(body) => {
                with_retry(&policy, || lake.put(FORMAT_KEY, body.clone(), PutIf::Always)).await?;
            }
            // Its maker chose already, and cleaned up: the format object is there.
            Err(LakeError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(settle).await;
    }
    with_retry(&policy, || lake.delete(&mine)).await
}

/// Probes up to three times until conditions are kept: an answer that was lost and asked for again
/// looks like a refusal, and the mode of a lake is for ever.
async fn probe_again(lake: &dyn Lake) -> Result<Conditions, LakeError> {
    let mut found = probe(lake).await?;
    for _ in 0..2 {
        if found == Conditions::Kept {
            break;
        }
        found = probe(lake).await?;
    }
    Ok(found)
}

/// Finds out whether the store keeps conditions of writes: exclusive puts, one after the other and
/// at once, and replacing by ETag. What it cannot find out is whether overwrites are seen at once by
/// everybody; where they are not, `--refs log` has to be asked for.
pub async fn probe(lake: &dyn Lake) -> Result<Conditions, LakeError> {
    let prefix = format!("{PROBE_PREFIX}{}/", uuid::Uuid::now_v7());
    let result = probe_below(lake, &prefix).await;
    for object in list_all(lake, &prefix).await? {
        lake.delete(&object.key).await?;
    }
    match result {
        Ok(()) => Ok(Conditions::Kept),
        Err(ProbeEnd::Ignored(why)) => Ok(Conditions::Ignored(why)),
        Err(ProbeEnd::Failed(error)) => Err(error),
    }
}

async fn probe_below(lake: &dyn Lake, prefix: &str) -> Result<(), ProbeEnd> {
    let key = format!("{prefix}one");
    let Some(first) = try_put(lake, &key, "first", PutIf::Absent).await? else {
        return Err(ProbeEnd::Ignored("an exclusive write of a new key was refused"));
    };
    if try_put(lake, &key, "second", PutIf::Absent).await?.is_some() {
        return Err(ProbeEnd::Ignored("If-None-Match is not honoured"));
    }
    let other = "\"00000000000000000000000000000000\"".to_owned();
    if try_put(lake, &key, "third", PutIf::Match(other)).await?.is_some() {
        return Err(ProbeEnd::Ignored("If-Match is not honoured"));
    }
    if try_put(lake, &key, "fourth", PutIf::Match(first)).await?.is_none() {
        return Err(ProbeEnd::Ignored("a write with the right ETag was refused"));
    }
    let race = format!("{prefix}race");
    let racers = (0..PROBE_RACERS).map(|n| {
        let (lake, race, text) = (lake, &race, format!("racer {n}"));
        async move { try_put(lake, race, &text, PutIf::Absent).await }
    });
    let mut winners = 0;
    for outcome in join_all(racers).await {
        winners += u32::from(outcome?.is_some());
    }
    match winners {
        1 => Ok(()),
        _ => Err(ProbeEnd::Ignored("of exclusive writes at once not exactly one won")),
    }
}

/// Puts a probe's object; None where its condition was refused.
async fn try_put(lake: &dyn Lake, key: &str, text: &str, when: PutIf) -> Result<Option<String>, ProbeEnd> {
    match lake.put(key, Bytes::copy_from_slice(text.as_bytes()), when).await {
        Ok(etag) => Ok(Some(etag)),
        Err(LakeError::Precondition { .. }) => Ok(None),
        // A store that does not know conditional writes may refuse them.
        Err(LakeError::Permanent { .. }) => Err(ProbeEnd::Ignored("it refuses them")),
        Err(error) => Err(ProbeEnd::Failed(error)),
    }
}

/// Why a probe did not find conditions kept.
enum ProbeEnd {
    Ignored(&'static str),
    Failed(LakeError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::faulty_lake::{Fault, FaultyLake, MemLake, Op, Rule};
    use std::sync::Arc;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn the_format_object_is_read_and_written_as_version_1_did() {
        let lake_id = LakeId(uuid::Uuid::from_u128(0x1234));
        let format = |refs, features| LakeFormat { format: 1, lake_id, refs, created_ms: 1_700_000_000_000, features };
        crate::testkit::golden::assert_golden("lake-cas", &format(RefMode::Cas, Vec::new()));
        crate::testkit::golden::assert_golden("lake-log", &format(RefMode::Log, vec!["a-feature".to_owned()]));
    }

    #[tokio::test]
    async fn a_lake_is_made_once_and_read_afterwards() {
        let lake = MemLake::new();
        assert!(read(&lake).await.unwrap().is_none());
        let made = open_or_create(&lake, RefChoice::Auto).await.unwrap();
        assert_eq!((made.refs, made.format), (RefMode::Cas, 1));
        assert_eq!(open_or_create(&lake, RefChoice::Auto).await.unwrap(), made);
        assert_eq!(lake.keys(), ["larder.json"], "probes are cleaned up");
        let other = open_or_create(&lake, RefChoice::Log).await;
        assert!(matches!(other, Err(FormatError::OtherMode { found: RefMode::Cas, .. })));
    }

    #[tokio::test]
    async fn a_store_without_conditions_gets_logs_unless_told_otherwise() {
        let lake = MemLake::without_conditions();
        let refused = open_or_create(&lake, RefChoice::Cas).await;
        assert!(matches!(refused, Err(FormatError::NoConditions { .. })));
        let made = open_or_create_within(&lake, RefChoice::Auto, SHORT).await.unwrap();
        assert_eq!(made.refs, RefMode::Log);
        assert_eq!(lake.keys(), ["larder.json"]);
    }

    #[tokio::test]
    async fn a_store_that_refuses_conditions_gets_logs() {
        let (lake, _) = FaultyLake::over_memory();
        lake.rule(Rule::every(Op::Put, Fault::Permanent).on("probe/0"));
        let made = open_or_create_within(&*lake, RefChoice::Auto, SHORT).await.unwrap();
        assert_eq!(made.refs, RefMode::Log);
    }

    #[tokio::test]
    async fn racing_makers_agree_in_both_kinds_of_store() {
        for lake in [Arc::new(MemLake::new()), Arc::new(MemLake::without_conditions())] {
            let makers = (0..12).map(|n| {
                let lake = lake.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(n * 5)).await;
                    open_or_create_within(&*lake, RefChoice::Auto, SHORT).await.unwrap()
                })
            });
            let made = join_all(makers).await.into_iter().map(Result::unwrap);
            let mut ids: Vec<_> = made.map(|format| format.lake_id).collect();
            ids.dedup();
            assert_eq!(ids.len(), 1);
            assert_eq!(read(&*lake).await.unwrap().unwrap().lake_id, ids[0]);
        }
    }

    #[tokio::test]
    async fn a_lost_answer_does_not_make_a_second_lake() {
        let (lake, _) = FaultyLake::over_memory();
        lake.rule(Rule::next(Op::Put, Fault::LostAnswer).on(FORMAT_KEY));
        let made = open_or_create(&*lake, RefChoice::Auto).await.unwrap();
        assert_eq!(read(&*lake).await.unwrap().unwrap(), made);
    }

    #[tokio::test]
    async fn what_is_newer_damaged_or_foreign_is_refused() {
        let lake = MemLake::new();
        lake.set(FORMAT_KEY, r#"{"format":2,"shape":"unknown"}"#);
        assert!(matches!(read(&lake).await, Err(FormatError::Newer { found: 2, .. })));
        lake.set(FORMAT_KEY, "{");
        assert!(matches!(read(&lake).await, Err(FormatError::Damaged { .. })));
        let id = "8f14e45f-ceea-467f-a8d5-0b1a2c3d4e5f";
        let text = format!(r#"{{"format":1,"lake_id":"{id}","refs":"cas","created_ms":1,"features":["warp"]}}"#);
        lake.set(FORMAT_KEY, text);
        let error = read(&lake).await.unwrap_err();
        assert!(error.to_string().contains("warp"), "{error}");
        lake.unset(FORMAT_KEY);
        lake.set("holiday.jpg", "x");
        let refused = open_or_create(&lake, RefChoice::Auto).await;
        assert!(matches!(refused, Err(FormatError::NotEmpty { .. })));
    }
}
