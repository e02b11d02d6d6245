//! Object keys as file names, so that any key works and a directory walk meets keys in order.
//!
//! A key is cut at its slashes; each part becomes one file name: the part with every byte outside
//! `A-Z a-z 0-9 - _ . + = , @` as `%XX`, and two more characters that say what it is:
//!
//! ```text
//! part.d     a directory: the part was followed by a slash
//! part.c     a directory: the part goes on (it is longer than a file name may be)
//! part.o     an object: the key ends here
//! part.v     a directory: the older versions of the object whose key ends here
//! ```
//!
//! So `a`, `a/b`, `a//b`, `a/`, `..` and an empty part have names of their own, and none of them is
//! `.` or `..`. A part of [`CHUNK_BYTES`] or more always goes on, so that all keys which begin with
//! those bytes lie in one directory. Within a directory, the order of [`DirName::sort`] is the order
//! of the keys below: a `.d` name counts with its slash.

use std::path::{Path, PathBuf};

/// Bytes of a part that one file name takes: three characters each still fit in 255.
pub const CHUNK_BYTES: usize = 60;

/// What a file name in the tree of a bucket stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind {
    Dir,
    Chunk,
    Object,
    Versions,
}

impl NameKind {
    fn suffix(self) -> &'static str {
        match self {
            Self::Dir => ".d",
            Self::Chunk => ".c",
            Self::Object => ".o",
            Self::Versions => ".v",
        }
    }
}

/// A decoded file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirName {
    /// The bytes that it adds to the key: with the slash, for a directory.
    pub sort: Box<[u8]>,
    pub kind: NameKind,
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.+=,@".contains(&byte)
}

fn escape(part: &[u8], kind: NameKind) -> String {
    let mut name = String::with_capacity(part.len() + 2);
    for &byte in part {
        if is_plain(byte) {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    name + kind.suffix()
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        if byte != b'%' {
            bytes.push(byte);
            rest = after;
            continue;
        }
        let (digits, after) = after.split_at_checked(2)?;
        let mut raw = [0];
        hex::decode_to_slice(digits, &mut raw).ok()?;
        bytes.extend_from_slice(&raw);
        rest = after;
    }
    Some(bytes)
}

/// Decodes a file name; None for what is none of ours.
pub fn decode_name(name: &str) -> Option<DirName> {
    let (text, suffix) = name.split_at_checked(name.len().checked_sub(2)?)?;
    let kind = match suffix {
        ".d" => NameKind::Dir,
        ".c" => NameKind::Chunk,
        ".o" => NameKind::Object,
        ".v" => NameKind::Versions,
        _ => return None,
    };
    let mut sort = unescape(text)?;
    if kind == NameKind::Dir {
        sort.push(b'/');
    }
    Some(DirName { sort: sort.into(), kind })
}

/// Encodes the name that [`decode_name`] gives back.
pub fn encode_name(name: &DirName) -> String {
    let part = match name.kind {
        NameKind::Dir => name.sort.strip_suffix(b"/").unwrap_or(&name.sort),
        _ => &name.sort,
    };
    escape(part, name.kind)
}

/// Gives the path of a key below `root`; its last name has `kind`.
pub fn key_path(root: &Path, key: &str, kind: NameKind) -> PathBuf {
    let mut path = root.to_path_buf();
    let mut parts = key.as_bytes().split(|&byte| byte == b'/').peekable();
    while let Some(mut part) = parts.next() {
        while let Some((chunk, rest)) = part.split_at_checked(CHUNK_BYTES) {
            path.push(escape(chunk, NameKind::Chunk));
            part = rest;
        }
        let last = parts.peek().is_none();
        path.push(escape(part, if last { kind } else { NameKind::Dir }));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(key: &str) -> Vec<DirName> {
        let path = key_path(Path::new(""), key, NameKind::Object);
        path.iter().map(|name| decode_name(name.to_str().unwrap()).unwrap()).collect()
    }

    fn keys() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-b/.%! ~]{1,12}",
            "[a-c]{58,62}[/!0a]{0,3}[a-b]{0,3}",
            proptest::collection::vec(any::<char>(), 1..20).prop_map(|chars| chars.into_iter().collect()),
        ]
    }

    proptest! {
        #[test]
        fn a_key_comes_back_from_its_path(key in keys()) {
            let joined: Vec<u8> = names(&key).iter().flat_map(|name| name.sort.to_vec()).collect();
            prop_assert_eq!(joined, key.as_bytes());
            let path = key_path(Path::new(""), &key, NameKind::Object);
            for name in path.iter() {
                let text = name.to_str().unwrap();
                prop_assert!(text.len() <= 255 && text != "." && text != "..");
                prop_assert_eq!(encode_name(&decode_name(text).unwrap()), text);
            }
        }

        #[test]
        fn the_first_names_that_differ_order_two_keys(a in keys(), b in keys()) {
            let (x, y) = (names(&a), names(&b));
            let at = x.iter().zip(&y).take_while(|(x, y)| x == y).count();
            if let (Some(x), Some(y)) = (x.get(at), y.get(at)) {
                prop_assert_eq!(x.sort.cmp(&y.sort), a.as_bytes().cmp(b.as_bytes()));
            } else {
                prop_assert_eq!(a, b, "no path is the beginning of another one's");
            }
        }
    }

    #[test]
    fn the_longest_keys_fit_into_a_path() {
        for key in ["/".repeat(1024), "ä".repeat(512), "\u{1}/".repeat(512), "x".repeat(1024)] {
            let path = key_path(Path::new("/a/directory/of/an/embedded/lake"), &key, NameKind::Object);
            assert!(path.as_os_str().len() < 3500, "{}", path.as_os_str().len());
        }
    }
}
