//! Multipart uploads: parts as object files of their own, joined when the upload is completed.
//!
//! A part is there, whole, or not at all; an upload survives any crash and lists what arrived. The
//! parts are joined inside the kernel, which shares the blocks where the file
//! system can.

use std::io;
use std::path::{Path, PathBuf};

use md5::{Digest, Md5};

use super::StoreError;
use super::disk::{At, Bucket, Condition, OpError, Opened, TempObject, now_ms, open_object};
use super::object::{Headers, ObjectInfo};
use super::walk::is_gone;

/// S3's minimum of a part that is not the last.
const PART_BYTES_MIN: u64 = 5 << 20;

/// What is kept of an upload.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UploadInfo {
    pub key: String,
    pub begun_ms: i64,
    pub headers: Headers,
}

impl Bucket {
    fn upload_dir(&self, id: &str) -> Result<PathBuf, OpError> {
        let ours = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if ours { Ok(self.dir.join("uploads").join(id)) } else { Err(OpError::NoSuchUpload) }
    }

    /// Begins an upload; gives its id.
    pub fn upload_begin(&self, key: &str, headers: Headers) -> Result<String, OpError> {
        let id = uuid::Uuid::now_v7().simple().to_string();
        let dir = self.upload_dir(&id)?;
        let info = UploadInfo { key: key.to_owned(), begun_ms: now_ms(), headers };
        std::fs::create_dir(&dir).at(&dir, "making an upload")?;
        let path = dir.join("upload.json");
        let text = serde_json::to_vec(&info).expect("an upload's meta has only texts and numbers");
        std::fs::write(&path, text).at(&path, "writing an upload's meta")?;
        self.disk.sync_dir(&dir)?;
        Ok(id)
    }

    /// Reads what an upload is; it has to be one of this key.
    pub fn upload(&self, key: &str, id: &str) -> Result<UploadInfo, OpError> {
        let dir = self.upload_dir(id)?;
        let info = read_upload(&dir)?.ok_or(OpError::NoSuchUpload)?;
        if info.key == key { Ok(info) } else { Err(OpError::NoSuchUpload) }
    }

    /// Takes a part that was written; an earlier one of the same number is replaced.
    pub fn upload_part(&self, key: &str, id: &str, number: u32, temp: TempObject) -> Result<ObjectInfo, OpError> {
        self.upload(key, id)?;
        let etag = hex::encode(temp.md5());
        let info = ObjectInfo { size: temp.len_bytes(), etag, modified_ms: now_ms(), ..ObjectInfo::default() };
        let dir = self.upload_dir(id)?;
        match temp.place(&info, &dir.join(part_name(number))) {
            // The upload was completed or aborted meanwhile.
            Err(error) if is_gone(&error.source) => return Err(OpError::NoSuchUpload),
            placed => placed?,
        }
        self.disk.sync_dir(&dir)?;
        Ok(info)
    }

    /// Lists the parts that arrived, in order.
    pub fn upload_parts(&self, key: &str, id: &str) -> Result<Vec<(u32, ObjectInfo)>, OpError> {
        self.upload(key, id)?;
        let dir = self.upload_dir(id)?;
        let mut parts = Vec::new();
        for entry in std::fs::read_dir(&dir).at(&dir, "listing an upload")? {
            let entry = entry.at(&dir, "listing an upload")?;
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            parts.extend(open_object(&entry.path())?.map(|part| (number, part.info)));
        }
        parts.sort_by_key(|(number, _)| *number);
        Ok(parts)
    }

    /// Joins the named parts to the object.
    pub fn upload_complete(
        &self,
        key: &str,
        id: &str,
        parts: &[(u32, String)],
        when: &Condition,
    ) -> Result<ObjectInfo, OpError> {
        let upload = self.upload(key, id)?;
        let dir = self.upload_dir(id)?;
        let opened = open_parts(&dir, parts)?;
        let mut temp = self.temp()?;
        let mut digests = Md5::new();
        for part in &opened {
            temp.append(part)?;
            digests.update(hex::decode(&part.info.etag).unwrap_or_default());
        }
        let etag = format!("{}-{}", hex::encode(digests.finalize()), opened.len());
        // Of two that complete the same upload, the second still finds its parts open, and publishes
        // the same bytes once more.
        let info = self.publish(key, temp, etag, upload.headers, when)?;
        remove_upload(&dir)?;
        Ok(info)
    }

    /// Forgets an upload.
    pub fn upload_abort(&self, key: &str, id: &str) -> Result<(), OpError> {
        self.upload(key, id)?;
        Ok(remove_upload(&self.upload_dir(id)?)?)
    }

    /// Lists the uploads that run, by key and id.
    pub fn uploads(&self, prefix: &str) -> Result<Vec<(String, UploadInfo)>, StoreError> {
        let dir = self.dir.join("uploads");
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&dir).at(&dir, "listing uploads")? {
            let entry = entry.at(&dir, "listing uploads")?;
            let upload = read_upload(&entry.path())?.filter(|upload| upload.key.starts_with(prefix));
            if let (Some(upload), Ok(id)) = (upload, entry.file_name().into_string()) {
                found.push((id, upload));
            }
        }
        found.sort_by(|(a_id, a), (b_id, b)| (&a.key, a_id).cmp(&(&b.key, b_id)));
        Ok(found)
    }
}

fn part_name(number: u32) -> String {
    format!("{number:05}")
}

fn read_upload(dir: &Path) -> Result<Option<UploadInfo>, StoreError> {
    let path = dir.join("upload.json");
    match std::fs::read(&path) {
        Err(error) if is_gone(&error) => Ok(None),
        // Cut by a crash before it was acknowledged to anybody: an upload that never began.
        text => Ok(serde_json::from_slice(&text.at(&path, "reading an upload's meta")?).ok()),
    }
}

/// Removes an upload: its meta first, so that it is gone for everybody at once.
fn remove_upload(dir: &Path) -> Result<(), StoreError> {
    let gone = |done: io::Result<()>| match done {
        Err(error) if is_gone(&error) => Ok(()),
        done => done.at(dir, "removing an upload"),
    };
    gone(std::fs::remove_file(dir.join("upload.json")))?;
    gone(std::fs::remove_dir_all(dir))
}

fn open_parts(dir: &Path, parts: &[(u32, String)]) -> Result<Vec<Opened>, OpError> {
    if parts.is_empty() {
        return Err(OpError::InvalidPart);
    }
    if !parts.is_sorted_by(|(a, _), (b, _)| a < b) {
        return Err(OpError::InvalidPartOrder);
    }
    let mut opened = Vec::new();
    for (at, (number, etag)) in parts.iter().enumerate() {
        let part = open_object(&dir.join(part_name(*number)))?.filter(|part| part.info.etag == *etag);
        let part = part.ok_or(OpError::InvalidPart)?;
        if part.info.size < PART_BYTES_MIN && at + 1 < parts.len() {
            return Err(OpError::PartTooSmall);
        }
        opened.push(part);
    }
    Ok(opened)
}
