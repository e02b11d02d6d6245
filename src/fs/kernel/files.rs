//! Where images are kept: `<state>/images`.
//!
//! An image counts as there when its description is, which is written last. What was not finished is
//! removed when the folder is opened.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::format::erofs::{Device, IMAGE_FORMAT};
use crate::format::ids::{PackId, PlacementId, TreeId};
use crate::fs::keeper::kernel::IMAGE_SUFFIX;
use crate::fs::view::Look;

/// What unused images take at most.
const UNUSED_BYTES_MAX: u64 = 4 << 30;
const TMP: &str = ".tmp-";

/// Names an image: by all that it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ImageId(pub [u8; 16]);

impl ImageId {
    /// Computes it. `private`: the directory that keeps others out, by its rank + 1 (0: the root).
    pub fn of(tree: &TreeId, placement: &PlacementId, look: &Look, private: Option<u64>) -> Self {
        let mode = |mode: Option<u32>| mode.map_or(u64::MAX, u64::from);
        let numbers = [
            u64::from(IMAGE_FORMAT),
            u64::from(look.uid),
            u64::from(look.gid),
            u64::from(look.umask),
            mode(look.file_mode),
            mode(look.dir_mode),
            private.unwrap_or(u64::MAX),
        ];
        let mut hasher = blake3::Hasher::new();
        numbers.iter().for_each(|number| {
            hasher.update(&number.to_le_bytes());
        });
        hasher.update(tree.as_bytes()).update(placement.as_bytes());
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        Self(id)
    }

    /// Gives the name of the image's file.
    pub fn file_name(&self) -> String {
        format!("{self}{IMAGE_SUFFIX}")
    }

    /// Says whether a file is this image, by its name.
    pub fn is_file(&self, path: &Path) -> bool {
        path.file_name().is_some_and(|name| *name == *self.file_name())
    }

    /// Reads the name of an image's file.
    pub fn of_file(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(IMAGE_SUFFIX)?;
        Self::try_from(name.to_owned()).ok()
    }
}

impl std::fmt::Display for ImageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ImageId {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut id = [0; 16];
        hex::decode_to_slice(text, &mut id)?;
        Ok(Self(id))
    }
}

/// What `<id>.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    pub format: u32,
    pub tree: TreeId,
    pub placement: PlacementId,
    /// In the order of the image.
    pub packs: Vec<PackId>,
    pub inodes: u64,
    pub image_len: u64,
    /// 0: there is no file of tails.
    pub tails_len: u64,
    /// BLAKE3 of both files, hex: a disk that changed them must not change what a mount shows.
    pub image_digest: String,
    pub tails_digest: String,
}

fn digest_of(path: &Path) -> io::Result<String> {
    Ok(blake3::Hasher::new().update_reader(File::open(path)?)?.finalize().to_hex().to_string())
}

/// A complete image.
#[derive(Debug, Clone)]
pub struct Image {
    pub id: ImageId,
    pub path: PathBuf,
    pub about: Description,
}

impl Image {
    /// Gives the paths of the devices, in order.
    pub(super) fn devices(&self, packs: impl Fn(&PackId) -> PathBuf) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = self.about.packs.iter().map(packs).collect();
        if self.about.tails_len > 0 {
            paths.push(self.path.with_extension("tails"));
        }
        paths
    }

    /// Reads both files through and says whether they are as they were written. The kernel then finds the
    /// image in memory: it reads single pages, without reading ahead.
    pub(super) fn is_intact(&self) -> bool {
        let is = |path: &Path, digest: &str| digest_of(path).is_ok_and(|found| found == digest);
        is(&self.path, &self.about.image_digest)
            && (self.about.tails_len == 0 || is(&self.path.with_extension("tails"), &self.about.tails_digest))
    }
}

/// The folder of a node's images.
#[derive(Debug, Clone)]
pub struct Images {
    dir: PathBuf,
}

/// Files of an image that is being built; removed again unless it is finished.
#[derive(Debug)]
pub(super) struct Draft {
    dir: PathBuf,
    id: ImageId,
    nonce: u32,
    pub image: File,
    pub inodes: File,
    pub tails: File,
}

impl Images {
    /// Opens the folder, made where it is not there.
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// Removes what was not finished, also what got its name and no description: when nobody builds.
    pub fn remove_drafts(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let is_part = matches!(path.extension().and_then(OsStr::to_str), Some("larder" | "tails"));
            let is_draft = entry.file_name().to_string_lossy().contains(TMP);
            if is_draft || (is_part && !path.with_extension("json").exists()) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Notes that an image is used again, so that it is not the first to go.
    pub(super) fn touch(&self, id: ImageId) {
        let noted = File::options().append(true).open(self.dir.join(format!("{id}.json")));
        if let Err(error) = noted.and_then(|json| json.set_modified(SystemTime::now())) {
            tracing::debug!(%error, image = %id, "an image is taken for older than it is");
        }
    }

    /// Finds a complete image.
    pub fn find(&self, id: ImageId) -> Option<Image> {
        let path = self.dir.join(id.file_name());
        let about: Description = serde_json::from_slice(&fs::read(self.dir.join(format!("{id}.json"))).ok()?).ok()?;
        let has_len = |path: &Path, len: u64| fs::metadata(path).is_ok_and(|meta| meta.len() == len);
        let whole = about.format == IMAGE_FORMAT
            && has_len(&path, about.image_len)
            && (about.tails_len == 0 || has_len(&path.with_extension("tails"), about.tails_len));
        whole.then_some(Image { id, path, about })
    }

    pub(super) fn draft(&self, id: ImageId) -> io::Result<Draft> {
        let nonce = rand::random::<u32>();
        let create = |part: &str| {
            let path = self.dir.join(format!("{id}.{part}{TMP}{nonce:08x}"));
            File::options().read(true).write(true).create_new(true).open(path)
        };
        let (image, inodes, tails) = (create("image")?, create("inodes")?, create("tails")?);
        Ok(Draft { dir: self.dir.clone(), id, nonce, image, inodes, tails })
    }

    /// Removes the images used longest ago that nobody uses, until they take no more than their bound.
    pub fn sweep(&self, used: &HashSet<ImageId>) {
        let mut unused: Vec<(SystemTime, u64, ImageId)> = Vec::new();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let id = name.strip_suffix(".json").and_then(|id| ImageId::try_from(id.to_owned()).ok());
            if let Some(id) = id.filter(|id| !used.contains(id))
                && let Some(image) = self.find(id)
            {
                let at = entry.metadata().and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
                unused.push((at, image.about.image_len + image.about.tails_len, id));
            }
        }
        unused.sort_unstable_by_key(|(at, _, _)| std::cmp::Reverse(*at));
        let mut sum = 0_u64;
        for (_, len, id) in unused {
            sum = sum.saturating_add(len);
            if sum > UNUSED_BYTES_MAX {
                self.remove(id);
            }
        }
    }

    /// Removes an image, its description first.
    pub fn remove(&self, id: ImageId) {
        for name in [format!("{id}.json"), id.file_name(), format!("{id}.tails")] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

impl Draft {
    fn tmp(&self, part: &str) -> PathBuf {
        self.dir.join(format!("{}.{part}{TMP}{:08x}", self.id, self.nonce))
    }

    /// Makes the files durable and gives them their names.
    pub fn finish(&self, about: Description) -> io::Result<Image> {
        let about = Description {
            image_digest: digest_of(&self.tmp("image"))?,
            tails_digest: digest_of(&self.tmp("tails"))?,
            ..about
        };
        let path = self.dir.join(self.id.file_name());
        if about.tails_len > 0 {
            self.tails.sync_all()?;
            fs::rename(self.tmp("tails"), path.with_extension("tails"))?;
        }
        self.image.sync_all()?;
        fs::rename(self.tmp("image"), &path)?;
        let mut json = File::create(self.tmp("json"))?;
        json.write_all(&serde_json::to_vec(&about).map_err(io::Error::other)?)?;
        json.sync_all()?;
        fs::rename(self.tmp("json"), self.dir.join(format!("{}.json", self.id)))?;
        File::open(&self.dir)?.sync_all()?;
        Ok(Image { id: self.id, path, about })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        for part in ["image", "inodes", "tails", "json"] {
            let _ = fs::remove_file(self.tmp(part));
        }
    }
}

/// Gives the packs among the devices.
pub(super) fn packs_of(devices: &[Device]) -> Vec<PackId> {
    let pack = |device: &Device| match device {
        Device::Pack(pack) => Some(*pack),
        Device::Tails => None,
    };
    devices.iter().filter_map(pack).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes an image of which nothing is there but its length.
    fn hollow(dir: &Path, number: u8, image_len: u64) -> ImageId {
        let id = ImageId([number; 16]);
        File::create(dir.join(id.file_name())).and_then(|file| file.set_len(image_len)).expect("makes a file");
        let about = Description {
            format: IMAGE_FORMAT,
            tree: TreeId([1; 32]),
            placement: PlacementId([2; 32]),
            packs: Vec::new(),
            inodes: 1,
            image_len,
            tails_len: 0,
            image_digest: String::new(),
            tails_digest: String::new(),
        };
        fs::write(dir.join(format!("{id}.json")), serde_json::to_vec(&about).expect("is text")).expect("writes");
        id
    }

    #[test]
    fn what_is_used_is_never_swept_however_large_and_what_was_used_last_stays_longest() {
        let dir = tempfile::tempdir().expect("a directory");
        let images = Images::open(dir.path().to_owned()).expect("opens");
        let ids: Vec<ImageId> = (1..=3).map(|number| hollow(dir.path(), number, UNUSED_BYTES_MAX * 3 / 4)).collect();
        for id in &ids {
            let json = File::options().append(true).open(dir.path().join(format!("{id}.json"))).expect("opens");
            json.set_modified(SystemTime::UNIX_EPOCH).expect("is set");
        }
        let large = hollow(dir.path(), 9, UNUSED_BYTES_MAX + 1);
        images.touch(ids[0]);
        images.sweep(&HashSet::from([large, ids[1]]));
        let left: Vec<bool> = ids.iter().chain([&large]).map(|id| images.find(*id).is_some()).collect();
        assert_eq!(left, [true, true, false, true]);
        images.sweep(&HashSet::new());
        assert!(images.find(large).is_none(), "nobody uses it, and it is too large");
    }

    #[test]
    fn what_was_not_finished_is_removed_and_what_was_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let images = Images::open(dir.path().to_owned()).expect("opens");
        let whole = hollow(dir.path(), 1, 4096);
        let named = hollow(dir.path(), 2, 4096);
        fs::write(dir.path().join(format!("{named}.tails")), b"tails").expect("writes");
        fs::remove_file(dir.path().join(format!("{named}.json"))).expect("removes");
        let draft = images.draft(ImageId([3; 16])).expect("begins");
        std::mem::forget(draft);
        images.remove_drafts();
        assert!(images.find(whole).is_some());
        assert_eq!(fs::read_dir(dir.path()).expect("lists").count(), 2, "one image and what says so");
    }
}
