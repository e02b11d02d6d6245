//! Grants: who may do what with a dataset, kept beside its refs (`docs/formats/grants.md`).
//!
//! A change puts a new entry that holds the whole list and names the entries that its writer saw. The
//! heads are the entries that no other names. Without a list everybody may do everything; of two heads,
//! whose writers raced, only that counts which both allow: a mistake closes, it does not open.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::codec::DecodeError;
use super::json;

/// What may be done with a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Right {
    /// Mount it: read its files.
    Mount,
    /// Bring it into a tier, keep it there, say for how long.
    Cache,
    /// Remove it from a tier, keep it no longer.
    Uncache,
    /// Make commits, move and remove its refs.
    Push,
}

impl Right {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Mount, Self::Cache, Self::Uncache, Self::Push];

    /// Gives the word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::Cache => "cache",
            Self::Uncache => "uncache",
            Self::Push => "push",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Says what is wrong with a word of a grant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct GrantError {
    pub text: String,
    pub expected: &'static str,
}

impl FromStr for Right {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        let expected = "one of mount, cache, uncache, push";
        let found = Self::ALL.into_iter().find(|right| right.as_str() == text);
        found.ok_or_else(|| GrantError { text: text.to_owned(), expected })
    }
}

/// Whom a grant is for: `everyone`, `user:ann`, `group:vision` (a name, or a number); among pods `namespace:vision`,
/// `serviceaccount:vision/nightly`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Who {
    Everyone,
    User(String),
    Group(String),
    Namespace(String),
    ServiceAccount { namespace: String, name: String },
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everyone => f.write_str("everyone"),
            Self::User(name) => write!(f, "user:{name}"),
            Self::Group(name) => write!(f, "group:{name}"),
            Self::Namespace(name) => write!(f, "namespace:{name}"),
            Self::ServiceAccount { namespace, name } => write!(f, "serviceaccount:{namespace}/{name}"),
        }
    }
}

impl FromStr for Who {
    type Err = GrantError;

    fn from_str(text: &str) -> Result<Self, GrantError> {
        let expected = "everyone, user:NAME, group:NAME, namespace:NAME or serviceaccount:NAMESPACE/NAME";
        let is_name = |name: &str| {
            !name.is_empty() && name.len() <= 255 && !name.chars().any(|c| c.is_control() || c.is_whitespace())
        };
        match text.split_once(':') {
            None if text == "everyone" => Ok(Self::Everyone),
            Some(("user", name)) if is_name(name) => Ok(Self::User(name.to_owned())),
            Some(("group", name)) if is_name(name) => Ok(Self::Group(name.to_owned())),
            Some(("namespace", name)) if is_name(name) && !name.contains('/') => Ok(Self::Namespace(name.to_owned())),
            Some(("serviceaccount", name)) => match name.split_once('/') {
                Some((namespace, name)) if is_name(namespace) && is_name(name) && !name.contains('/') => {
                    Ok(Self::ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() })
                }
                _ => Err(GrantError { text: text.to_owned(), expected }),
            },
            _ => Err(GrantError { text: text.to_owned(), expected }),
        }
    }
}

impl Serialize for Who {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Who {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A pod that asks; what is not known of it is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodPrincipal {
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    pub service_account: String,
}

impl fmt::Display for PodPrincipal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.namespace.as_str(), self.service_account.as_str()) {
            ("", _) => f.write_str("a pod that nobody names"),
            (namespace, "") => write!(f, "a pod of namespace {namespace}"),
            (namespace, name) => write!(f, "serviceaccount:{namespace}/{name}"),
        }
    }
}

/// Who asks, as the node's user database knows them; or a pod, which is no user of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Principal {
    pub uid: u32,
    pub user: Option<String>,
    /// Numbers and, where there are some, names.
    pub groups: Vec<(u32, Option<String>)>,
    /// Where it is a pod, the fields above say nothing.
    pub pod: Option<PodPrincipal>,
}

impl Who {
    /// Says whether it means somebody.
    pub fn means(&self, principal: &Principal) -> bool {
        match self {
            Self::Everyone => true,
            Self::User(_) | Self::Group(_) if principal.pod.is_some() => false,
            Self::User(name) => is_named(name, principal.uid, principal.user.as_deref()),
            Self::Group(name) => principal.groups.iter().any(|(gid, known)| is_named(name, *gid, known.as_deref())),
            Self::Namespace(name) => principal.pod.as_ref().is_some_and(|pod| pod.namespace == *name),
            Self::ServiceAccount { namespace, name } => {
                let pod = principal.pod.as_ref();
                pod.is_some_and(|pod| pod.namespace == *namespace && pod.service_account == *name)
            }
        }
    }
}

fn is_named(wanted: &str, number: u32, name: Option<&str>) -> bool {
    // Digits mean the number, and also whoever has them for a name.
    let is_number = wanted.bytes().all(|byte| byte.is_ascii_digit());
    name.is_some_and(|name| name == wanted) || (is_number && wanted.parse() == Ok(number))
}

/// What somebody may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    pub who: Who,
    pub rights: BTreeSet<Right>,
}

/// One entry of a dataset's grants (`datasets/<name>/grants/<entry id>`), JSON, never overwritten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantsEntry {
    pub format: u32,
    /// Empty: everybody may do everything.
    pub grants: Vec<Grant>,
    /// Entry ids that this one replaces.
    pub supersedes: Vec<String>,
    pub time_ms: i64,
    /// Who wrote it.
    pub by: String,
}

/// Version of the entries that this larder writes, and the newest it reads.
pub const GRANTS_FORMAT: u32 = 1;
/// Longest encoding of an entry.
pub const GRANTS_LEN_MAX: usize = 256 << 10;

impl GrantsEntry {
    /// Encodes to the stored JSON.
    pub fn encode(&self) -> Vec<u8> {
        json::encode(self)
    }

    /// Decodes and checks the version.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        json::decode("grants", bytes, GRANTS_FORMAT, GRANTS_LEN_MAX)
    }
}

/// A dataset's grants: the lists of all heads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    pub heads: Vec<Vec<Grant>>,
}

impl Grants {
    /// Says whether somebody may do something.
    pub fn allow(&self, principal: &Principal, right: Right) -> bool {
        let allows = |list: &Vec<Grant>| {
            list.is_empty() || list.iter().any(|grant| grant.rights.contains(&right) && grant.who.means(principal))
        };
        self.heads.iter().all(allows)
    }

    /// Says whether there is anybody who may not.
    pub fn restrict(&self, right: Right) -> bool {
        let is_for_all = |list: &Vec<Grant>| {
            list.is_empty() || list.iter().any(|grant| grant.rights.contains(&right) && grant.who == Who::Everyone)
        };
        !self.heads.iter().all(is_for_all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(who: &str, rights: &[Right]) -> Grant {
        Grant { who: who.parse().expect(who), rights: rights.iter().copied().collect() }
    }

    fn ann() -> Principal {
        Principal {
            uid: 1005,
            user: Some("ann".to_owned()),
            groups: vec![(1005, Some("ann".to_owned())), (60, Some("vision".to_owned())), (61, None)],
            pod: None,
        }
    }

    #[test]
    fn without_a_list_everybody_may_do_everything() {
        for grants in [Grants::default(), Grants { heads: vec![vec![]] }] {
            assert!(Right::ALL.into_iter().all(|right| grants.allow(&ann(), right) && !grants.restrict(right)));
        }
    }

    #[test]
    fn a_grant_is_by_name_or_number_of_a_user_or_a_group() {
        for (who, means) in [
            ("user:ann", true),
            ("user:1005", true),
            ("user:+1005", false),
            ("group:vision", true),
            ("group:60", true),
            ("group:61", true),
            ("everyone", true),
            ("user:bob", false),
            ("user:60", false),
            ("group:audio", false),
            ("group:62", false),
        ] {
            let grants = Grants { heads: vec![vec![grant(who, &[Right::Mount])]] };
            assert_eq!(grants.allow(&ann(), Right::Mount), means, "{who}");
            assert!(!grants.allow(&ann(), Right::Push), "{who}: nothing else");
            assert_eq!(grants.restrict(Right::Mount), who != "everyone", "{who}");
        }
    }

    #[test]
    fn a_pod_is_meant_by_its_namespace_or_service_account_and_is_no_user_of_the_node() {
        let pod = |namespace: &str, service_account: &str| {
            let (namespace, service_account) = (namespace.to_owned(), service_account.to_owned());
            Principal { pod: Some(PodPrincipal { namespace, service_account }), ..ann() }
        };
        let nightly = pod("vision", "nightly");
        for (who, means) in [
            ("everyone", true),
            ("namespace:vision", true),
            ("serviceaccount:vision/nightly", true),
            ("namespace:nightly", false),
            ("serviceaccount:vision/default", false),
            ("serviceaccount:audio/nightly", false),
            ("user:ann", false),
            ("user:1005", false),
            ("group:60", false),
        ] {
            let who: Who = who.parse().expect(who);
            assert_eq!(who.means(&nightly), means, "{who}");
            assert_eq!(who.means(&pod("", "")), who == Who::Everyone, "{who}: a pod that nobody names");
            assert_eq!(who.to_string().parse(), Ok(who));
        }
        assert!(!"namespace:ann".parse::<Who>().expect("is one").means(&ann()), "a user is in no namespace");
    }

    #[test]
    fn of_two_heads_only_what_both_allow_counts() {
        let all = grant("user:ann", &Right::ALL);
        let less = grant("group:vision", &[Right::Mount]);
        let grants = Grants { heads: vec![vec![all], vec![less], vec![]] };
        assert!(grants.allow(&ann(), Right::Mount) && !grants.allow(&ann(), Right::Cache));
    }

    #[test]
    fn what_is_no_grant_is_refused() {
        for bad in [
            "",
            "ann",
            "user:",
            "group:a b",
            "user:a\nb",
            "Everyone",
            "role:x",
            "namespace:",
            "namespace:a/b",
            "serviceaccount:a",
            "serviceaccount:a/",
            "serviceaccount:a/b/c",
        ] {
            assert!(bad.parse::<Who>().is_err(), "{bad}");
        }
        let entry = GrantsEntry { format: 1, grants: vec![], supersedes: vec![], time_ms: 1, by: "a@b".into() };
        let entry = GrantsEntry { grants: vec![grant("user:ann", &[Right::Mount, Right::Push])], ..entry };
        assert_eq!(GrantsEntry::decode(&entry.encode()), Ok(entry.clone()));
        let text = String::from_utf8(entry.encode()).expect("JSON");
        assert!(text.contains(r#"{"who":"user:ann","rights":["mount","push"]}"#), "{text}");
        // A right or a field that this version does not know may be the one that closes: nothing is guessed.
        for (old, new) in
            [("\"push\"", "\"read\""), ("\"who\"", "\"only\":1,\"who\""), ("\"format\":1", "\"format\":2")]
        {
            assert!(GrantsEntry::decode(text.replace(old, new).as_bytes()).is_err(), "{new}");
        }
    }
}
