//! What a volume says, checked: attributes, parameters and annotations, access modes, ids. Pure.
//!
//! The same keys everywhere (`docs/formats/csi.md`); what is not one of them is refused, so that a slip does not
//! quietly mount something else.

use std::collections::{BTreeMap, HashMap};

use serde::de::DeserializeOwned;

use super::proto::csi::volume_capability::access_mode::Mode;
use super::proto::csi::volume_capability::{AccessMode, AccessType};
use super::proto::csi::{CapacityRange, VolumeCapability};
use crate::config::{EngineChoice, PrefetchLevel, Span, VerifyLevel};
use crate::format::refs::Revision;
use crate::node::api::MountRequest;

/// What a volume may say.
pub const KEYS: [&str; 12] =
    ["dataset", "subdir", "tier", "ttl", "prefetch", "verify", "engine", "uid", "gid", "umask", "fileMode", "dirMode"];
/// What comes before a key in an annotation of a claim.
pub const ANNOTATION_PREFIX: &str = "csi.larder.io/";
/// Keys of the kubelet and of the provisioner.
const FOREIGN_PREFIXES: [&str; 2] = ["csi.storage.k8s.io/", "storage.kubernetes.io/"];
/// Said by the kubelet of a volume in the pod's own manifest.
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
/// What the ids of dynamic volumes begin with, and how many hex digits follow.
const ID_PREFIX: &str = "larder-";
const ID_DIGITS: usize = 32;

/// A volume's keys with their values, in one order.
pub type Attributes = BTreeMap<String, String>;

/// Why a volume cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    #[error(
        "the volume names no dataset; write `dataset: NAME@REVISION` into its volumeAttributes or the StorageClass's parameters"
    )]
    NoDataset,
    #[error("`{key}` is no key of a larder volume; there are {}", KEYS.join(", "))]
    UnknownKey { key: String },
    #[error("{key}: `{value}` is wrong: {expected}")]
    Value { key: &'static str, value: String, expected: String },
    #[error(
        "the claim's annotation {ANNOTATION_PREFIX}{key} says `{wanted}`, its StorageClass `{fixed}`; only what the class leaves open can be annotated"
    )]
    Fixed { key: String, wanted: String, fixed: String },
    #[error("the request says nothing of how the volume is to be used (volume capability)")]
    NoCapability,
    #[error("larder volumes are directories, not block devices; write `volumeMode: Filesystem`")]
    Block,
    #[error(
        "larder volumes are read-only; write `accessModes: [ReadOnlyMany]` instead of {mode} into the claim and the PersistentVolume"
    )]
    Writer { mode: &'static str },
    #[error("larder volumes are read-only; write `readOnly: true` beside `driver:` in the pod's volume")]
    WritableInline,
    #[error("the mount option `{option}` means nothing here; the mount is always ro,nosuid,nodev, and what can be chosen are the keys {}", KEYS.join(", "))]
    MountOption { option: String },
    #[error(
        "larder volumes have no credentials of their own: take the secret reference away; the lake is read with the credentials of the node's daemon"
    )]
    Secrets,
    #[error("the request has no {what}")]
    Missing { what: &'static str },
    #[error("{what}")]
    NotOffered { what: &'static str },
}

/// What a volume wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub revision: Revision,
    /// As it is written: `xray@v2`.
    pub text: String,
    pub engine: EngineChoice,
    /// Everything else, for the daemon; without revision, directory and engine.
    pub request: MountRequest,
}

/// Gives what is ours among the attributes of a volume; refuses what nobody knows.
pub fn own_keys(given: &HashMap<String, String>) -> Result<Attributes, VolumeError> {
    let mut own = Attributes::new();
    for (key, value) in given {
        if FOREIGN_PREFIXES.iter().any(|prefix| key.starts_with(prefix)) {
            continue;
        }
        if !KEYS.contains(&key.as_str()) {
            return Err(VolumeError::UnknownKey { key: key.clone() });
        }
        own.insert(key.clone(), value.clone());
    }
    Ok(own)
}

/// Fills in what a claim's annotations say.
pub fn with_annotations(
    mut own: Attributes,
    annotations: &BTreeMap<String, String>,
) -> Result<Attributes, VolumeError> {
    for (name, wanted) in annotations {
        let Some(key) = name.strip_prefix(ANNOTATION_PREFIX) else {
            continue;
        };
        if !KEYS.contains(&key) {
            return Err(VolumeError::UnknownKey { key: name.clone() });
        }
        match own.get(key) {
            Some(fixed) if fixed != wanted => {
                let (key, wanted, fixed) = (key.to_owned(), wanted.clone(), fixed.clone());
                return Err(VolumeError::Fixed { key, wanted, fixed });
            }
            _ => own.insert(key.to_owned(), wanted.clone()),
        };
    }
    Ok(own)
}

impl Wanted {
    /// Reads a volume's keys.
    pub fn parse(own: &Attributes) -> Result<Self, VolumeError> {
        let text = own.get("dataset").map(|text| text.trim()).filter(|text| !text.is_empty());
        let text = text.ok_or(VolumeError::NoDataset)?.to_owned();
        let wrong = |error: crate::format::refs::NameError| VolumeError::Value {
            key: "dataset",
            value: text.clone(),
            expected: error.to_string(),
        };
        let revision = Revision::parse(&text).map_err(wrong)?;
        let request = MountRequest {
            subdir: subdir(own)?,
            tier: own.get("tier").filter(|name| !name.is_empty()).cloned(),
            ttl: span(own)?,
            prefetch: word::<PrefetchLevel>(own, "prefetch", "one of none, touched, all")?,
            verify: word::<VerifyLevel>(own, "verify", "one of tier, node, always")?,
            uid: Some(number(own, "uid")?.unwrap_or(0)),
            gid: Some(number(own, "gid")?.unwrap_or(0)),
            umask: octal(own, "umask")?,
            file_mode: octal(own, "fileMode")?,
            dir_mode: octal(own, "dirMode")?,
            // Pods run as anybody; who may look in is decided by who gets the volume.
            allow_other: Some(true),
            ..MountRequest::default()
        };
        let engine = word(own, "engine", "one of fuse, kernel, auto")?.unwrap_or(EngineChoice::Fuse);
        Ok(Self { revision, text, engine, request })
    }
}

fn value_error(key: &'static str, value: &str, expected: impl Into<String>) -> VolumeError {
    VolumeError::Value { key, value: value.to_owned(), expected: expected.into() }
}

fn word<T: DeserializeOwned>(own: &Attributes, key: &'static str, expected: &str) -> Result<Option<T>, VolumeError> {
    let Some(text) = own.get(key) else {
        return Ok(None);
    };
    let value = serde_json::Value::String(text.clone());
    serde_json::from_value(value).map(Some).map_err(|_| value_error(key, text, expected))
}

fn span(own: &Attributes) -> Result<Option<Span>, VolumeError> {
    let Some(text) = own.get("ttl") else {
        return Ok(None);
    };
    text.parse().map(Some).map_err(|error: crate::config::ValueError| value_error("ttl", text, error.to_string()))
}

fn subdir(own: &Attributes) -> Result<Option<String>, VolumeError> {
    let Some(text) = own.get("subdir") else {
        return Ok(None);
    };
    let inside = text.trim_matches('/');
    if inside.split('/').any(|name| name == "..") || inside.contains('\0') {
        return Err(value_error("subdir", text, "a path inside the commit, without `..`"));
    }
    Ok(Some(inside.to_owned()).filter(|inside| !inside.is_empty()))
}

fn number(own: &Attributes, key: &'static str) -> Result<Option<u32>, VolumeError> {
    let Some(text) = own.get(key) else {
        return Ok(None);
    };
    // The last number names nobody.
    let parsed = text.trim().parse().ok().filter(|number| *number != u32::MAX);
    parsed.map(Some).ok_or_else(|| value_error(key, text, "a number, such as 1000"))
}

fn octal(own: &Attributes, key: &'static str) -> Result<Option<u32>, VolumeError> {
    let Some(text) = own.get(key) else {
        return Ok(None);
    };
    let parsed = u32::from_str_radix(text.trim(), 8).ok().filter(|mode| *mode <= 0o777);
    parsed.map(Some).ok_or_else(|| value_error(key, text, "an octal number up to 0777, such as 0022 (in quotes)"))
}

/// Says whether the kubelet speaks of a volume in the pod's own manifest.
pub fn is_ephemeral(context: &HashMap<String, String>) -> bool {
    context.get(EPHEMERAL).is_some_and(|value| value == "true")
}

/// Refuses every use but reading. `inline`: for a volume of the pod's own manifest, what its `readOnly` says.
pub fn check_capability(capability: Option<&VolumeCapability>, inline: Option<bool>) -> Result<(), VolumeError> {
    let Some(capability) = capability else {
        return Err(VolumeError::NoCapability);
    };
    match &capability.access_type {
        Some(AccessType::Block(_)) => return Err(VolumeError::Block),
        Some(AccessType::Mount(mount)) => {
            if let Some(option) = mount.mount_flags.iter().find(|flag| *flag != "ro") {
                return Err(VolumeError::MountOption { option: option.clone() });
            }
        }
        None => return Err(VolumeError::NoCapability),
    }
    let Some(AccessMode { mode }) = capability.access_mode else {
        return Err(VolumeError::NoCapability);
    };
    let mode = Mode::try_from(mode).unwrap_or(Mode::Unknown);
    match (mode, inline) {
        (Mode::MultiNodeReaderOnly | Mode::SingleNodeReaderOnly, _) | (Mode::SingleNodeWriter, Some(true)) => Ok(()),
        (Mode::SingleNodeWriter, Some(false)) => Err(VolumeError::WritableInline),
        (mode, _) => Err(VolumeError::Writer { mode: kubernetes_word(mode) }),
    }
}

/// Gives the word that a manifest has for a mode.
fn kubernetes_word(mode: Mode) -> &'static str {
    match mode {
        Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter => "ReadWriteOnce",
        Mode::SingleNodeSingleWriter => "ReadWriteOncePod",
        Mode::MultiNodeMultiWriter | Mode::MultiNodeSingleWriter => "ReadWriteMany",
        Mode::MultiNodeReaderOnly | Mode::SingleNodeReaderOnly => "ReadOnlyMany",
        Mode::Unknown => "an unknown access mode",
    }
}

/// Gives the first digits of a digest, as the name of a file, a directory or a volume.
pub fn short_digest(bytes: &[u8]) -> String {
    let digits = blake3::hash(bytes).to_hex();
    digits.chars().take(ID_DIGITS).collect()
}

/// Names the volume that is made for a name.
pub fn id_for(name: &str) -> String {
    format!("{ID_PREFIX}{}", short_digest(name.as_bytes()))
}

/// Says whether an id is one that [`id_for`] gives.
pub fn is_own_id(id: &str) -> bool {
    id.strip_prefix(ID_PREFIX)
        .is_some_and(|digits| digits.len() == ID_DIGITS && digits.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')))
}

/// What a dynamic volume was made with: the same name with something else is another volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    pub attributes: Attributes,
    pub capacity: Option<(i64, i64)>,
}

impl Made {
    /// Notes what was asked for.
    pub fn new(attributes: &Attributes, range: Option<&CapacityRange>) -> Self {
        let capacity = range.map(|range| (range.required_bytes, range.limit_bytes));
        Self { attributes: attributes.clone(), capacity }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::csi::proto::csi::volume_capability::{BlockVolume, MountVolume};

    fn attributes(pairs: &[(&str, &str)]) -> Attributes {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn given(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        attributes(pairs).into_iter().collect()
    }

    fn capability(mode: Mode, flags: &[&str]) -> VolumeCapability {
        let mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type: Some(AccessType::Mount(MountVolume { mount_flags, ..MountVolume::default() })),
        }
    }

    #[test]
    fn the_kubelets_keys_are_left_aside_and_unknown_ones_refused() {
        let own = own_keys(&given(&[
            ("dataset", "xray@v2"),
            ("csi.storage.k8s.io/pod.name", "p"),
            ("storage.kubernetes.io/csiProvisionerIdentity", "1-csi.larder.io"),
        ]));
        assert_eq!(own, Ok(attributes(&[("dataset", "xray@v2")])));
        let wrong = own_keys(&given(&[("datset", "xray")])).expect_err("a slip");
        assert!(wrong.to_string().contains("`datset`") && wrong.to_string().contains("fileMode"), "{wrong}");
    }

    #[test]
    fn every_key_is_read_and_every_wrong_value_is_told() {
        let wanted = Wanted::parse(&attributes(&[
            ("dataset", "xray@v2"),
            ("subdir", "/train/a/"),
            ("tier", "fast"),
            ("ttl", "3d"),
            ("prefetch", "touched"),
            ("verify", "always"),
            ("engine", "auto"),
            ("uid", "1000"),
            ("umask", "0022"),
            ("fileMode", "444"),
        ]))
        .expect("is right");
        assert_eq!((wanted.text.as_str(), wanted.engine), ("xray@v2", EngineChoice::Auto));
        let request = &wanted.request;
        assert_eq!((request.subdir.as_deref(), request.tier.as_deref()), (Some("train/a"), Some("fast")));
        assert_eq!((request.uid, request.gid), (Some(1000), Some(0)));
        assert_eq!((request.umask, request.file_mode, request.dir_mode), (Some(0o022), Some(0o444), None));
        assert_eq!(request.ttl.map(|ttl| ttl.as_ms()), Some(3 * 86_400_000));
        assert_eq!((request.prefetch, request.verify), (Some(PrefetchLevel::Touched), Some(VerifyLevel::Always)));
        assert_eq!(request.allow_other, Some(true));
        for (key, value) in [
            ("dataset", "../x"),
            ("subdir", "a/../.."),
            ("ttl", "soon"),
            ("prefetch", "some"),
            ("verify", "never"),
            ("engine", "nfs"),
            ("uid", "-1"),
            ("gid", "4294967295"),
            ("umask", "0999"),
            ("fileMode", "01777"),
            ("dirMode", "rwx"),
        ] {
            let mut own = attributes(&[("dataset", "xray")]);
            own.insert(key.to_owned(), value.to_owned());
            let error = Wanted::parse(&own).expect_err(key);
            assert!(matches!(error, VolumeError::Value { key: named, .. } if named == key), "{key}: {error}");
        }
        for empty in [attributes(&[]), attributes(&[("dataset", " ")])] {
            assert_eq!(Wanted::parse(&empty), Err(VolumeError::NoDataset));
        }
    }

    #[test]
    fn annotations_fill_in_what_the_class_leaves_open_and_change_nothing_else() {
        let class = || attributes(&[("tier", "fast")]);
        let filled = with_annotations(
            class(),
            &attributes(&[("csi.larder.io/dataset", "xray"), ("csi.larder.io/tier", "fast"), ("other", "x")]),
        );
        assert_eq!(filled, Ok(attributes(&[("dataset", "xray"), ("tier", "fast")])));
        let other = with_annotations(class(), &attributes(&[("csi.larder.io/tier", "slow")]));
        assert!(matches!(other, Err(VolumeError::Fixed { .. })));
        let unknown = with_annotations(class(), &attributes(&[("csi.larder.io/teir", "slow")]));
        assert!(matches!(unknown, Err(VolumeError::UnknownKey { .. })));
    }

    #[test]
    fn only_readers_are_taken_and_writers_are_told_what_to_write() {
        for mode in [Mode::MultiNodeReaderOnly, Mode::SingleNodeReaderOnly] {
            assert_eq!(check_capability(Some(&capability(mode, &["ro"])), None), Ok(()));
        }
        let writers = [
            (Mode::SingleNodeWriter, "ReadWriteOnce"),
            (Mode::SingleNodeSingleWriter, "ReadWriteOncePod"),
            (Mode::SingleNodeMultiWriter, "ReadWriteOnce"),
            (Mode::MultiNodeMultiWriter, "ReadWriteMany"),
            (Mode::MultiNodeSingleWriter, "ReadWriteMany"),
        ];
        for (mode, word) in writers {
            let refused = check_capability(Some(&capability(mode, &[])), None).expect_err(word).to_string();
            assert!(refused.contains(word) && refused.contains("accessModes: [ReadOnlyMany]"), "{refused}");
        }
        let inline = |read_only| check_capability(Some(&capability(Mode::SingleNodeWriter, &[])), Some(read_only));
        assert_eq!(inline(true), Ok(()));
        assert!(inline(false).expect_err("writes").to_string().contains("readOnly: true"));
    }

    #[test]
    fn block_volumes_and_mount_options_are_refused() {
        let mut block = capability(Mode::MultiNodeReaderOnly, &[]);
        block.access_type = Some(AccessType::Block(BlockVolume {}));
        assert_eq!(check_capability(Some(&block), None), Err(VolumeError::Block));
        let options = capability(Mode::MultiNodeReaderOnly, &["ro", "nfsvers=4"]);
        assert!(matches!(check_capability(Some(&options), None), Err(VolumeError::MountOption { .. })));
        assert_eq!(check_capability(None, None), Err(VolumeError::NoCapability));
    }

    #[test]
    fn the_id_of_a_dynamic_volume_is_a_function_of_its_name() {
        let id = id_for("pvc-1");
        assert_eq!(id, id_for("pvc-1"));
        assert_ne!(id, id_for("pvc-2"));
        assert!(is_own_id(&id) && id.len() <= 128, "{id}");
        assert!(is_own_id(&id_for(&"x".repeat(128))));
        for foreign in ["", "larder-", "larder-x", "vol", "larder-0123456789ABCDEF0123456789ABCDEF"] {
            assert!(!is_own_id(foreign), "{foreign}");
        }
    }
}
