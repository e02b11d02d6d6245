//! Pages of a bucket's keys, with common prefixes, and of their versions.

use std::path::Path;

use super::StoreError;
use super::disk::{At, Bucket, open_object};
use super::names::NameKind;
use super::object::ObjectInfo;
use super::walk::{Step, WalkFrom, walk};

/// What to list.
#[derive(Debug, Clone, Default)]
pub struct Query {
    pub prefix: String,
    /// Keys that have it behind the prefix are shown as one common prefix.
    pub delimiter: Option<String>,
    pub after: After,
    pub limit: usize,
}

/// Where the last page ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum After {
    #[default]
    Nothing,
    Key(String),
    /// A common prefix, with all its keys.
    Prefix(String),
}

impl After {
    /// Encodes to a continuation token.
    pub fn encode(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Key(key) => format!("k{}", hex::encode(key)),
            Self::Prefix(prefix) => format!("p{}", hex::encode(prefix)),
        }
    }

    /// Decodes a continuation token.
    pub fn decode(token: &str) -> Option<Self> {
        let (kind, text) = token.split_at_checked(1)?;
        let text = String::from_utf8(hex::decode(text).ok()?).ok()?;
        match kind {
            "k" => Some(Self::Key(text)),
            "p" => Some(Self::Prefix(text)),
            _ => None,
        }
    }
}

/// A page of keys.
#[derive(Debug, Clone, Default)]
pub struct Page {
    pub objects: Vec<(String, ObjectInfo)>,
    pub prefixes: Vec<String>,
    /// Where the next page begins, if there is one.
    pub next: Option<After>,
}

impl Bucket {
    /// Lists a page of the current objects.
    pub fn list(&self, query: &Query) -> Result<Page, StoreError> {
        let mut page = Page::default();
        if query.limit == 0 {
            return Ok(page);
        }
        let (after, skip) = match query.after.clone() {
            After::Nothing => (String::new(), None),
            After::Key(key) => (key, None),
            After::Prefix(prefix) => (prefix.clone(), Some(prefix.into_bytes())),
        };
        let from = WalkFrom { prefix: query.prefix.clone().into(), after: after.into(), skip };
        let mut last = After::Nothing;
        let mut visit = |key: &[u8], path: &Path| {
            let key = String::from_utf8_lossy(key).into_owned();
            let common = common_prefix(query, &key);
            if page.objects.len() + page.prefixes.len() == query.limit {
                page.next = Some(last.clone());
                return Ok(Step::Stop);
            }
            if let Some(common) = common {
                last = After::Prefix(common.clone());
                page.prefixes.push(common.clone());
                return Ok(Step::SkipPrefix(common.into_bytes()));
            }
            // An object that is gone meanwhile is left out.
            if let Some(opened) = open_object(path).map_err(|error| error.source)? {
                last = After::Key(key.clone());
                page.objects.push((key, opened.info));
            }
            Ok(Step::Next)
        };
        let root = self.objects();
        walk(&self.disk.cache, &root, NameKind::Object, from, &mut visit).at(&root, "listing the bucket")?;
        Ok(page)
    }

    /// Lists the versions of the keys behind `after`, the newest of a key first, each with whether it
    /// is the latest; then where to go on. A page ends with all versions of its last key.
    pub fn list_versions(&self, prefix: &str, after: &str, limit: usize) -> Result<VersionPage, StoreError> {
        let mut keys = self.keys_of(&self.objects(), NameKind::Object, prefix, after, limit)?;
        keys.extend(self.keys_of(&self.versions(), NameKind::Versions, prefix, after, limit)?);
        keys.sort();
        keys.dedup();
        let mut page = VersionPage::default();
        for key in keys {
            if page.versions.len() >= limit {
                page.next = page.versions.last().map(|(key, _, _)| key.clone());
                break;
            }
            let current = open_object(&self.object_path(&key))?.map(|opened| opened.info);
            let mut versions = self.older_versions(&key)?;
            if let Some(current) = current {
                versions.retain(|version| version.version_id() != current.version_id());
                versions.insert(0, current);
            }
            let versions = versions.into_iter().enumerate();
            page.versions.extend(versions.map(|(at, version)| (key.clone(), version, at == 0)));
        }
        Ok(page)
    }

    /// Lists one key more than `limit`, so that a page knows whether it is the last.
    fn keys_of(
        &self,
        root: &Path,
        kind: NameKind,
        prefix: &str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<String>, StoreError> {
        let from = WalkFrom { prefix: prefix.into(), after: after.into(), skip: None };
        let mut keys = Vec::new();
        let mut visit = |key: &[u8], _: &Path| {
            keys.push(String::from_utf8_lossy(key).into_owned());
            Ok(if keys.len() > limit { Step::Stop } else { Step::Next })
        };
        walk(&self.disk.cache, root, kind, from, &mut visit).at(root, "listing the bucket")?;
        Ok(keys)
    }
}

/// A page of versions: key, what it is, and whether it is the latest of its key.
#[derive(Debug, Clone, Default)]
pub struct VersionPage {
    pub versions: Vec<(String, ObjectInfo, bool)>,
    pub next: Option<String>,
}

fn common_prefix(query: &Query, key: &str) -> Option<String> {
    let delimiter = query.delimiter.as_deref().filter(|delimiter| !delimiter.is_empty())?;
    let rest = key.strip_prefix(&query.prefix)?;
    let end = query.prefix.len() + rest.find(delimiter)? + delimiter.len();
    key.get(..end).map(str::to_owned)
}
