//! One object as one file: its bytes, then what is to be known of them.
//!
//! ```text
//! body        size bytes
//! meta        JSON
//! meta_len    u32, little-endian
//! magic       "LARDEROB"
//! ```
//!
//! Body and metadata in one file are published by one rename, so a reader that has the file open has
//! one version, whole. A file whose length does not add up is damaged and is served to nobody.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The last bytes of each object file.
const MAGIC: &[u8; 8] = b"LARDEROB";
/// Bytes behind the meta: its length and the magic.
const TAIL_BYTES: u64 = 12;
/// One read of so many bytes at the end usually gets all of the meta.
const GUESS_BYTES: u64 = 1024;
/// No meta is longer.
const META_BYTES_MAX: u64 = 64 * 1024;

/// What is known of an object beside its bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ObjectInfo {
    pub size: u64,
    /// Without quotes.
    pub etag: String,
    /// Unix time in milliseconds.
    pub modified_ms: i64,
    /// None: written while the bucket kept no versions ("null").
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// This version says that the object was deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub delete_marker: bool,
    #[serde(default)]
    pub headers: Headers,
}

/// What the client said of the object.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Headers {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// `AES256` or `aws:kms`, as it was asked for. Nothing is encrypted here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sse: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sse_kms_key_id: Option<String>,
    /// MD5 of the customer's key: a reader has to show the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sse_customer_key_md5: Option<String>,
}

impl ObjectInfo {
    /// The version id as clients see it.
    pub fn version_id(&self) -> &str {
        self.version.as_deref().unwrap_or("null")
    }

    /// Encodes what follows the body.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("an object's meta has only texts and numbers");
        let len = u32::try_from(bytes.len()).expect("an object's meta is shorter than 4 GiB");
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(MAGIC);
        bytes
    }

    /// Reads it from the end of an object file.
    pub fn read(file: &File) -> io::Result<Self> {
        let file_len = file.metadata()?.len();
        let guess = read_end(file, file_len, GUESS_BYTES.min(file_len))?;
        let meta_len = meta_len(&guess).ok_or_else(|| damaged("its end is not that of an object"))?;
        let whole = match meta_len + TAIL_BYTES {
            len if len <= guess.len() as u64 => guess,
            len if len <= file_len && meta_len <= META_BYTES_MAX => read_end(file, file_len, len)?,
            _ => return Err(damaged("its meta is longer than it can be")),
        };
        let skip = whole.len() - (meta_len + TAIL_BYTES) as usize;
        let meta = whole.get(skip..skip + meta_len as usize).unwrap_or_default();
        let info: Self = serde_json::from_slice(meta).map_err(io::Error::other)?;
        if info.size + meta_len + TAIL_BYTES != file_len {
            return Err(damaged("its length does not add up"));
        }
        Ok(info)
    }
}

fn read_end(file: &File, file_len: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, file_len - len)?;
    Ok(bytes)
}

fn meta_len(end: &[u8]) -> Option<u64> {
    let (rest, magic) = end.split_last_chunk::<8>()?;
    let (_, len) = rest.split_last_chunk::<4>()?;
    (magic == MAGIC).then(|| u64::from(u32::from_le_bytes(*len)))
}

fn damaged(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn info(size: u64, text_bytes: usize) -> ObjectInfo {
        let headers = Headers { content_type: Some("x".repeat(text_bytes)), ..Headers::default() };
        ObjectInfo { size, etag: "e".into(), modified_ms: 5, headers, ..ObjectInfo::default() }
    }

    #[test]
    fn meta_of_any_length_comes_back() {
        for (size, text_bytes) in [(0, 0), (5, 10), (100_000, 900), (3, 5000)] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&vec![7; size]).unwrap();
            let written = info(size as u64, text_bytes);
            file.write_all(&written.encode()).unwrap();
            assert_eq!(ObjectInfo::read(&file).unwrap(), written);
        }
    }

    #[test]
    fn a_file_that_was_cut_or_grew_is_damaged() {
        let whole = [vec![7; 100], info(100, 3).encode()].concat();
        let longer = [vec![7; 1], whole.clone()].concat();
        for bytes in [&whole[..whole.len() - 1], &whole[1..], &whole[..50], &[], &longer[..]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            assert!(ObjectInfo::read(&file).is_err());
        }
    }
}
