//! From object keys to the entries of a tree: which directories they imply, and which keys no tree
//! can hold.
//!
//! Pure and streaming: keys come in byte order, entries leave as soon as nothing later can change
//! them. What is kept is the path of open directories and the files whose key is a prefix of the
//! current one (`a` may still turn out to be a directory when `a/b` comes, with `a!c` between).

use serde::{Deserialize, Serialize};

/// What longer component no file system shows.
const NAME_LEN_MAX: usize = 255;

/// What is known of an object that becomes a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    pub size: u64,
    pub etag: String,
    pub version: Option<String>,
    pub modified_ms: i64,
}

/// An entry of the tree to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Found {
    File(Object),
    Dir(DirCounts),
}

/// What a directory holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirCounts {
    pub children: u64,
    pub subdirs: u64,
    pub descendants: u64,
}

/// Why a key is not simply a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Odd {
    /// `a//b`, `/a`: a name would be empty.
    EmptyName,
    /// `.` or `..` as a name.
    DotName,
    NameTooLong,
    NulByte,
    /// The key is the prefix itself.
    IsPrefix,
    /// `a` where `a/b` exists as well.
    FileAndDirectory,
    /// `a/` without contents.
    Marker,
    /// `a/` that has bytes.
    MarkerWithBytes,
    /// The listing gave it twice.
    Twice,
}

impl Odd {
    /// Says what was done with the key, in words.
    pub fn done(self) -> &'static str {
        match self {
            Self::EmptyName => "left out: it has an empty name between two slashes",
            Self::DotName => "left out: `.` and `..` are not names",
            Self::NameTooLong => "left out: a name is longer than 255 bytes",
            Self::NulByte => "left out: it has a NUL byte",
            Self::IsPrefix => "left out: it is the imported prefix itself",
            Self::FileAndDirectory => "left out: other keys make a directory of it",
            Self::Marker => "became a directory",
            Self::MarkerWithBytes => "became a directory; its own bytes are left out",
            Self::Twice => "taken once: the listing gave it twice",
        }
    }
}

/// What the walk tells.
pub trait Sink {
    type Error;
    /// An entry by its path below the root (names separated by `/`), once.
    fn entry(&mut self, path: &[u8], found: Found) -> Result<(), Self::Error>;
    /// A key that is not simply a file.
    fn odd(&mut self, path: &[u8], odd: Odd) -> Result<(), Self::Error>;
}

/// A directory that later keys may still lie in.
#[derive(Debug)]
struct OpenDir {
    /// Length of its path with the slash behind it; 0 for the root.
    path_len: usize,
    counts: DirCounts,
}

/// A file that may still turn out to be a directory.
#[derive(Debug)]
struct PendingFile {
    path: Vec<u8>,
    object: Object,
}

/// Takes keys in byte order, gives entries (in no order that matters) and odd keys.
#[derive(Debug)]
pub struct KeyWalk {
    /// The path of the innermost open directory, with the slash behind it.
    path: Vec<u8>,
    open: Vec<OpenDir>,
    root: DirCounts,
    pending: Vec<PendingFile>,
    last: Option<Vec<u8>>,
}

impl Default for KeyWalk {
    fn default() -> Self {
        Self::new()
    }
}

impl KeyWalk {
    pub fn new() -> Self {
        Self { path: Vec::new(), open: Vec::new(), root: DirCounts::default(), pending: Vec::new(), last: None }
    }

    /// Takes the next key, relative to the imported prefix.
    pub fn add<S: Sink>(&mut self, key: &[u8], object: Object, sink: &mut S) -> Result<(), S::Error> {
        if self.last.as_deref() == Some(key) {
            return sink.odd(key, Odd::Twice);
        }
        self.last = Some(key.to_vec());
        if let Some(odd) = refuse(key) {
            return sink.odd(key, odd);
        }
        self.settle(key, sink)?;
        let dir_len = key.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
        self.open_dirs(key, dir_len, sink)?;
        if dir_len == key.len() {
            let odd = if object.size == 0 { Odd::Marker } else { Odd::MarkerWithBytes };
            return sink.odd(key, odd);
        }
        self.pending.push(PendingFile { path: key.to_vec(), object });
        Ok(())
    }

    /// Ends the listing; gives the root's counts.
    pub fn finish<S: Sink>(mut self, sink: &mut S) -> Result<DirCounts, S::Error> {
        while let Some(file) = self.pending.pop() {
            self.emit_file(file, sink)?;
        }
        while !self.open.is_empty() {
            self.close_dir(sink)?;
        }
        Ok(self.root)
    }

    /// Emits what the keys from `key` on cannot change any more.
    fn settle<S: Sink>(&mut self, key: &[u8], sink: &mut S) -> Result<(), S::Error> {
        while let Some(file) = self.pending.pop_if(|file| !key.starts_with(&file.path)) {
            self.emit_file(file, sink)?;
        }
        while !key.starts_with(&self.path) {
            self.close_dir(sink)?;
        }
        Ok(())
    }

    /// Opens the directories of `key` up to `dir_len` that are not open yet.
    fn open_dirs<S: Sink>(&mut self, key: &[u8], dir_len: usize, sink: &mut S) -> Result<(), S::Error> {
        for (at, &byte) in key.iter().enumerate().take(dir_len).skip(self.path.len()) {
            self.path.push(byte);
            if byte != b'/' {
                continue;
            }
            let name = key.get(..at).unwrap_or(key);
            if let Some(found) = self.pending.iter().position(|file| file.path == name) {
                self.pending.remove(found);
                sink.odd(name, Odd::FileAndDirectory)?;
            }
            self.open.push(OpenDir { path_len: at + 1, counts: DirCounts::default() });
        }
        Ok(())
    }

    /// Counts and emits a file. Its directory is open: it is a prefix of the current key, or was.
    fn emit_file<S: Sink>(&mut self, file: PendingFile, sink: &mut S) -> Result<(), S::Error> {
        let dir_len = file.path.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
        let counts = match self.open.iter_mut().find(|dir| dir.path_len == dir_len) {
            Some(dir) => &mut dir.counts,
            None => &mut self.root,
        };
        counts.children += 1;
        counts.descendants += 1;
        sink.entry(&file.path, Found::File(file.object))
    }

    fn close_dir<S: Sink>(&mut self, sink: &mut S) -> Result<(), S::Error> {
        let Some(dir) = self.open.pop() else {
            return Ok(());
        };
        let parent = self.open.last_mut().map_or(&mut self.root, |parent| &mut parent.counts);
        parent.children += 1;
        parent.subdirs += 1;
        parent.descendants += 1 + dir.counts.descendants;
        let parent_len = self.open.last().map_or(0, |parent| parent.path_len);
        let path = self.path.get(..dir.path_len - 1).unwrap_or_default();
        sink.entry(path, Found::Dir(dir.counts))?;
        self.path.truncate(parent_len);
        Ok(())
    }
}

/// Says why no tree can hold a key, if so.
fn refuse(key: &[u8]) -> Option<Odd> {
    if key.is_empty() {
        return Some(Odd::IsPrefix);
    }
    if key.contains(&0) {
        return Some(Odd::NulByte);
    }
    let names = key.strip_suffix(b"/").unwrap_or(key);
    names.split(|&byte| byte == b'/').find_map(|name| match name {
        b"" => Some(Odd::EmptyName),
        b"." | b".." => Some(Odd::DotName),
        long if long.len() > NAME_LEN_MAX => Some(Odd::NameTooLong),
        _ => None,
    })
}

/// Gives bytes that sort entries as trees do: directory by directory in preorder, names in byte
/// order within each. The path comes back with [`path_of_sort_key`].
pub fn sort_key(path: &[u8]) -> Vec<u8> {
    let (dir, name) = match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => path.split_at(at),
        None => (&[][..], path),
    };
    let mut key: Vec<u8> = dir.iter().map(|&byte| if byte == b'/' { 0 } else { byte }).collect();
    // Two NULs sort before a NUL and a name: a directory's own entries before those of its directories.
    key.extend([0, 0]);
    key.extend_from_slice(name.strip_prefix(b"/").unwrap_or(name));
    key
}

/// Gives the path back that a sort key was made from.
pub fn path_of_sort_key(key: &[u8]) -> Vec<u8> {
    let at = key.windows(2).position(|pair| pair == [0, 0]).unwrap_or(0);
    let (dir, name) = key.split_at(at);
    let mut path: Vec<u8> = dir.iter().map(|&byte| if byte == 0 { b'/' } else { byte }).collect();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name.get(2..).unwrap_or_default());
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    #[derive(Default)]
    struct Collected {
        entries: BTreeMap<String, Found>,
        odd: Vec<(String, Odd)>,
    }

    impl Sink for Collected {
        type Error = Infallible;
        fn entry(&mut self, path: &[u8], found: Found) -> Result<(), Infallible> {
            let path = String::from_utf8(path.to_vec()).unwrap();
            assert!(self.entries.insert(path.clone(), found).is_none(), "{path} came twice");
            Ok(())
        }
        fn odd(&mut self, path: &[u8], odd: Odd) -> Result<(), Infallible> {
            self.odd.push((String::from_utf8_lossy(path).into_owned(), odd));
            Ok(())
        }
    }

    fn walk(keys: &[&str]) -> (Collected, DirCounts) {
        let mut sorted = keys.to_vec();
        sorted.sort_unstable();
        let mut collected = Collected::default();
        let mut walk = KeyWalk::new();
        for key in sorted {
            let size = if key.ends_with('/') { 0 } else { 5 };
            let object = Object { size, etag: "e".into(), version: None, modified_ms: 0 };
            let Ok(()) = walk.add(key.as_bytes(), object, &mut collected);
        }
        let Ok(root) = walk.finish(&mut collected);
        (collected, root)
    }

    fn dirs(collected: &Collected) -> Vec<(&str, u64, u64, u64)> {
        collected
            .entries
            .iter()
            .filter_map(|(path, found)| match found {
                Found::Dir(counts) => Some((path.as_str(), counts.children, counts.subdirs, counts.descendants)),
                Found::File(_) => None,
            })
            .collect()
    }

    #[test]
    fn slashes_imply_directories_with_their_counts() {
        let (got, root) = walk(&["a/b/c", "a/b/d", "a/e", "f", "a!x"]);
        assert_eq!(dirs(&got), [("a", 2, 1, 4), ("a/b", 2, 0, 2)]);
        assert_eq!(root, DirCounts { children: 3, subdirs: 1, descendants: 7 });
        assert_eq!(got.entries.len(), 7);
        assert!(got.odd.is_empty());
    }

    #[test]
    fn a_file_that_is_a_directory_too_is_left_out_and_named() {
        // `a!c` sorts between the two.
        let (got, root) = walk(&["a", "a!c", "a/b"]);
        assert_eq!(got.odd, [("a".to_owned(), Odd::FileAndDirectory)]);
        assert_eq!(got.entries.keys().collect::<Vec<_>>(), ["a", "a!c", "a/b"]);
        assert_eq!(dirs(&got), [("a", 1, 0, 1)]);
        assert_eq!(root, DirCounts { children: 2, subdirs: 1, descendants: 3 });
    }

    #[test]
    fn keys_that_no_tree_can_hold_are_named_and_left_out() {
        let long = "x".repeat(256);
        let (got, root) = walk(&["", "a//b", "/c", "d/../e", "./f", "nul\0", long.as_str(), "good"]);
        assert_eq!(root.descendants, 1);
        let odd: BTreeMap<&str, Odd> = got.odd.iter().map(|(key, odd)| (key.as_str(), *odd)).collect();
        assert_eq!(odd[""], Odd::IsPrefix);
        assert_eq!(odd["a//b"], Odd::EmptyName);
        assert_eq!(odd["/c"], Odd::EmptyName);
        assert_eq!(odd["d/../e"], Odd::DotName);
        assert_eq!(odd["./f"], Odd::DotName);
        assert_eq!(odd["nul\0"], Odd::NulByte);
        assert_eq!(odd[long.as_str()], Odd::NameTooLong);
    }

    #[test]
    fn a_marker_becomes_an_empty_directory() {
        let (got, root) = walk(&["a/", "b/", "b/c"]);
        assert_eq!(dirs(&got), [("a", 0, 0, 0), ("b", 1, 0, 1)]);
        assert_eq!(root, DirCounts { children: 2, subdirs: 2, descendants: 3 });
        assert_eq!(got.odd.len(), 2);
    }

    #[test]
    fn sort_keys_order_paths_as_trees_do() {
        let mut paths = ["b", "a/x", "a", "a!/z", "a/b/c", "a/b", "a!", "a/b!", "c"];
        paths.sort_by_key(|path| sort_key(path.as_bytes()));
        assert_eq!(paths, ["a", "a!", "b", "c", "a/b", "a/b!", "a/x", "a/b/c", "a!/z"]);
        for path in paths {
            assert_eq!(path_of_sort_key(&sort_key(path.as_bytes())), path.as_bytes());
        }
    }
}
