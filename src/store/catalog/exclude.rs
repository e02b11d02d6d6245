//! Which names a push leaves out: globs as people know them from ignore files.
//!
//! * without `/`: the name at any depth (`*.tmp`, `__pycache__`);
//! * with `/` inside or in front: the path from the pushed directory (`/build`, `logs/*.txt`);
//! * with `/` at the end: directories only; `**` crosses directories, `*` and `?` do not.
//!
//! What is below a directory that matches is left out with it and not even looked at.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

/// Says that a text is not a glob.
#[derive(Debug, thiserror::Error)]
#[error("`{glob}` is not a glob")]
pub(super) struct GlobError {
    glob: String,
    #[source]
    source: globset::Error,
}

/// Globs that were checked.
#[derive(Debug, Clone)]
pub(super) struct Excludes {
    any: GlobSet,
    dirs: GlobSet,
}

impl Excludes {
    pub(super) fn new(globs: &[String]) -> Result<Self, GlobError> {
        let mut any = GlobSetBuilder::new();
        let mut dirs = GlobSetBuilder::new();
        for text in globs {
            let error = |source| GlobError {
                glob: text.clone(),
                source,
            };
            let (body, dirs_only) = text
                .strip_suffix('/')
                .map_or((text.as_str(), false), |body| (body, true));
            let pattern = match body.strip_prefix('/') {
                Some(anchored) => anchored.to_owned(),
                None if body.contains('/') => body.to_owned(),
                None => format!("**/{body}"),
            };
            let glob = GlobBuilder::new(&pattern)
                .literal_separator(true)
                .backslash_escape(true)
                .build()
                .map_err(error)?;
            if dirs_only { &mut dirs } else { &mut any }.add(glob);
        }
        let build = |set: GlobSetBuilder| {
            set.build().map_err(|source| GlobError {
                glob: globs.join(" "),
                source,
            })
        };
        Ok(Self {
            any: build(any)?,
            dirs: build(dirs)?,
        })
    }

    pub(super) fn matches(&self, path: &[u8], is_dir: bool) -> bool {
        if self.any.is_empty() && self.dirs.is_empty() {
            return false;
        }
        let path = Path::new(OsStr::from_bytes(path));
        self.any.is_match(path) || (is_dir && self.dirs.is_match(path))
    }
}
