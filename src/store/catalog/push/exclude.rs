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

use super::error::PushError;

/// Globs that were checked.
#[derive(Debug, Clone)]
pub(in crate::store::catalog) struct Excludes {
    any: GlobSet,
    dirs: GlobSet,
}

impl Excludes {
    pub(in crate::store::catalog) fn new(globs: &[String]) -> Result<Self, PushError> {
        let mut any = GlobSetBuilder::new();
        let mut dirs = GlobSetBuilder::new();
        for text in globs {
            let error = |source| PushError::Glob { glob: text.clone(), source };
            let (body, dirs_only) = text.strip_suffix('/').map_or((text.as_str(), false), |body| (body, true));
            let pattern = match body.strip_prefix('/') {
                Some(anchored) => anchored.to_owned(),
                None if body.contains('/') => body.to_owned(),
                None => format!("**/{body}"),
            };
            let glob =
                GlobBuilder::new(&pattern).literal_separator(true).backslash_escape(true).build().map_err(error)?;
            if dirs_only { &mut dirs } else { &mut any }.add(glob);
        }
        let build =
            |set: GlobSetBuilder| set.build().map_err(|source| PushError::Glob { glob: globs.join(" "), source });
        Ok(Self { any: build(any)?, dirs: build(dirs)? })
    }

    pub(in crate::store::catalog) fn matches(&self, path: &[u8], is_dir: bool) -> bool {
        if self.any.is_empty() && self.dirs.is_empty() {
            return false;
        }
        let path = Path::new(OsStr::from_bytes(path));
        self.any.is_match(path) || (is_dir && self.dirs.is_match(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn excluded(glob: &str, path: &str, is_dir: bool) -> bool {
        Excludes::new(&[glob.to_owned()]).unwrap().matches(path.as_bytes(), is_dir)
    }

    #[test]
    fn a_glob_without_slash_matches_the_name_at_any_depth() {
        assert!(excluded("*.tmp", "a.tmp", false));
        assert!(excluded("*.tmp", "x/y/a.tmp", false));
        assert!(!excluded("*.tmp", "a.tmp/keep", false));
        assert!(excluded("cache", "x/cache", true));
        assert!(!excluded("cache", "x/cached", true));
    }

    #[test]
    fn a_glob_with_slash_is_a_path_from_the_pushed_directory() {
        assert!(excluded("/build", "build", true));
        assert!(!excluded("/build", "x/build", true));
        assert!(excluded("logs/*.txt", "logs/a.txt", false));
        assert!(!excluded("logs/*.txt", "logs/x/a.txt", false));
        assert!(excluded("logs/**/*.txt", "logs/x/y/a.txt", false));
    }

    #[test]
    fn a_slash_at_the_end_means_directories_only() {
        assert!(excluded("out/", "x/out", true));
        assert!(!excluded("out/", "x/out", false));
    }

    #[test]
    fn names_that_are_not_utf8_match_too() {
        let excludes = Excludes::new(&["*.bin".to_owned()]).unwrap();
        assert!(excludes.matches(b"\xff\xfe.bin", false));
    }

    #[test]
    fn a_glob_that_makes_no_sense_is_named() {
        let error = Excludes::new(&["a[".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("a["), "{error}");
    }
}
