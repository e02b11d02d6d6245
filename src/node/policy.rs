//! Who may do what: the policy file of this node and the grants of the dataset, both of which have to allow it.
//!
//! Root and the daemon's own user may do everything: they could read lake and tier without the daemon. For
//! everybody else each request is checked anew, so that a change of the file or of the grants counts at once;
//! what is mounted stays mounted. `docs/threat-model.md` says what this protects against whom.

use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use serde::Deserialize;

use crate::format::grants::{PodPrincipal, Principal, Right, Who};
use crate::format::refs::DatasetName;
use crate::store::catalog::grants::GrantsError;

use super::api::PermitRequest;
use super::daemon::{Daemon, blocking};
use super::error::NodeError;
use super::mounting::Caller;

/// No policy file is longer.
const POLICY_BYTES_MAX: u64 = 1 << 20;

/// Why the policy file cannot be used: nobody but root and the daemon's user may do anything.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("{}: the policy cannot be read", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: the policy is wrong: {message}", path.display())]
    Wrong { path: PathBuf, message: String },
    #[error(
        "{}: others than root and the daemon's user may write the policy; chown it to root and chmod it to 0644",
        path.display()
    )]
    Open { path: PathBuf },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    rule: Vec<RuleText>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleText {
    who: Vec<Who>,
    datasets: Vec<String>,
    rights: Vec<Right>,
}

/// One rule: these people may do this with these datasets.
#[derive(Debug)]
struct Rule {
    who: Vec<Who>,
    datasets: Vec<GlobMatcher>,
    rights: Vec<Right>,
}

/// What the policy file of a node says. What no rule allows is refused.
#[derive(Debug, Default)]
pub struct Policy {
    rules: Vec<Rule>,
}

impl Policy {
    /// Reads the file; refuses one that others may write.
    pub fn read(path: &Path) -> Result<Self, PolicyError> {
        let io = |source| PolicyError::Io { path: path.to_owned(), source };
        let meta = std::fs::metadata(path).map_err(io)?;
        let owner_is_trusted = meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
        if !owner_is_trusted || meta.mode() & 0o022 != 0 {
            return Err(PolicyError::Open { path: path.to_owned() });
        }
        let wrong = |message: String| PolicyError::Wrong { path: path.to_owned(), message };
        if meta.len() > POLICY_BYTES_MAX {
            return Err(wrong(format!("it is longer than {POLICY_BYTES_MAX} bytes")));
        }
        Self::parse(&std::fs::read_to_string(path).map_err(io)?).map_err(wrong)
    }

    /// Parses the text of a file.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let rule = |rule: RuleText| {
            let globs = rule.datasets.iter().map(|glob| {
                let built = GlobBuilder::new(glob).literal_separator(true).build();
                built.map(|glob| glob.compile_matcher()).map_err(|error| error.to_string())
            });
            Ok::<_, String>(Rule { who: rule.who, datasets: globs.collect::<Result<_, _>>()?, rights: rule.rights })
        };
        Ok(Self { rules: file.rule.into_iter().map(rule).collect::<Result<_, _>>()? })
    }

    fn rules_for(&self, dataset: &DatasetName, right: Right) -> impl Iterator<Item = &Rule> {
        self.rules.iter().filter(move |rule| {
            rule.rights.contains(&right) && rule.datasets.iter().any(|glob| glob.is_match(dataset.as_str()))
        })
    }

    /// Says whether somebody may do something.
    pub fn allows(&self, principal: &Principal, dataset: &DatasetName, right: Right) -> bool {
        self.rules_for(dataset, right).any(|rule| rule.who.iter().any(|who| who.means(principal)))
    }

    /// Says whether there is anybody who may not.
    pub fn restricts(&self, dataset: &DatasetName, right: Right) -> bool {
        !self.rules_for(dataset, right).any(|rule| rule.who.contains(&Who::Everyone))
    }
}

/// Looks up who a user is: name and groups. May ask a directory service: blocks.
pub fn principal(uid: u32, gid: u32) -> Principal {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let mut gids = vec![Gid::from_raw(gid)];
    if let Some(user) = &user
        && let Ok(name) = CString::new(user.name.as_str())
    {
        gids.extend(getgrouplist(&name, user.gid).unwrap_or_default());
    }
    gids.sort_unstable_by_key(|gid| gid.as_raw());
    gids.dedup();
    let named = |gid: Gid| (gid.as_raw(), Group::from_gid(gid).ok().flatten().map(|group| group.name));
    Principal { uid, user: user.map(|user| user.name), groups: gids.into_iter().map(named).collect(), pod: None }
}

/// Whom a mount may show its files to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Whomever the options name.
    Anybody,
    /// Nobody but who asked for it: others may not mount this dataset.
    Caller,
}

impl Daemon {
    /// Refuses what policy or grants do not allow a caller.
    pub(super) async fn permit(&self, caller: Caller, dataset: &DatasetName, right: Right) -> Result<Reach, NodeError> {
        if caller.is_master() {
            return Ok(Reach::Anybody);
        }
        let found = move || principal(caller.uid, caller.gid);
        self.decide(found, dataset, right).await.map_err(|refusal| match refusal {
            Refusal::By(by) => {
                tracing::info!(uid = caller.uid, %dataset, %right, by, "refused");
                NodeError::NotGranted { uid: caller.uid, right, dataset: dataset.to_string(), by }
            }
            Refusal::Failed(error) => *error,
        })
    }

    /// Refuses what policy or grants do not allow a pod.
    pub(super) async fn permit_pod(
        &self,
        pod: &PodPrincipal,
        dataset: &DatasetName,
        right: Right,
    ) -> Result<(), NodeError> {
        let asks = Principal { pod: Some(pod.clone()), ..Principal::default() };
        let decided = self.decide(move || asks, dataset, right).await;
        decided.map(drop).map_err(|refusal| match refusal {
            Refusal::By(by) => {
                tracing::info!(%pod, %dataset, %right, by, "refused");
                NodeError::NotGrantedToPod { pod: pod.clone(), right, dataset: dataset.to_string(), by }
            }
            Refusal::Failed(error) => *error,
        })
    }

    async fn decide(
        &self,
        found: impl FnOnce() -> Principal + Send + 'static,
        dataset: &DatasetName,
        right: Right,
    ) -> Result<Reach, Refusal> {
        let path = self.config().daemon.policy.clone();
        let asked = dataset.clone();
        let (principal, by_policy) = blocking("looking up who asks", move || {
            let principal = found();
            let policy = path.map(|path| Policy::read(&path)).transpose()?;
            let said =
                policy.map(|policy| (policy.allows(&principal, &asked, right), policy.restricts(&asked, Right::Mount)));
            Ok::<_, PolicyError>((principal, said))
        })
        .await?
        .map_err(NodeError::from)?;
        let grants = self.catalog().await?.grants(dataset).await.map_err(NodeError::from)?;
        let (allowed, restricted) = by_policy.unwrap_or((true, false));
        if !allowed || !grants.allow(&principal, right) {
            return Err(Refusal::By(if allowed { "the grants of the dataset" } else { "the policy of this node" }));
        }
        let is_for_all = !restricted && !grants.restrict(Right::Mount);
        Ok(if is_for_all { Reach::Anybody } else { Reach::Caller })
    }
}

impl Daemon {
    /// Says whether somebody may do something with a dataset; an error where not, or where nobody knows.
    pub async fn permits(&self, request: PermitRequest, caller: Caller) -> Result<(), NodeError> {
        let whose = caller.asks_for(request.for_user)?;
        self.permit(whose, &DatasetName::parse(&request.dataset)?, request.right).await.map(drop)
    }
}

/// Why somebody may not.
enum Refusal {
    By(&'static str),
    /// It could not be found out.
    Failed(Box<NodeError>),
}

impl From<NodeError> for Refusal {
    fn from(error: NodeError) -> Self {
        Self::Failed(Box::new(error))
    }
}

impl From<GrantsError> for NodeError {
    fn from(error: GrantsError) -> Self {
        match error {
            GrantsError::Catalog(error) => Self::Catalog(error),
            error => Self::Grants(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TEXT: &str = r#"
        [[rule]]
        who = ["group:vision", "user:1005"]
        datasets = ["xray", "ct-*"]
        rights = ["mount", "cache"]

        [[rule]]
        who = ["everyone"]
        datasets = ["public-*"]
        rights = ["mount"]
    "#;

    fn dataset(name: &str) -> DatasetName {
        DatasetName::parse(name).expect(name)
    }

    #[test]
    fn what_no_rule_allows_is_refused() {
        let policy = Policy::parse(TEXT).expect("is right");
        let ann = Principal { uid: 1005, ..Principal::default() };
        let vision = Principal { uid: 7, user: None, groups: vec![(60, Some("vision".to_owned()))], pod: None };
        let bob = Principal { uid: 1006, ..Principal::default() };
        for (who, name, right, may) in [
            (&ann, "xray", Right::Mount, true),
            (&vision, "ct-chest", Right::Cache, true),
            (&ann, "xray", Right::Uncache, false),
            (&ann, "xray2", Right::Mount, false),
            (&bob, "xray", Right::Mount, false),
            (&bob, "public-mnist", Right::Mount, true),
            (&bob, "public-mnist", Right::Cache, false),
        ] {
            assert_eq!(policy.allows(who, &dataset(name), right), may, "{who:?} {name} {right}");
        }
        assert!(policy.restricts(&dataset("xray"), Right::Mount));
        assert!(!policy.restricts(&dataset("public-mnist"), Right::Mount));
        assert!(!Policy::default().allows(&ann, &dataset("xray"), Right::Mount), "an empty file allows nothing");
    }

    #[test]
    fn a_file_that_is_wrong_or_open_to_others_is_refused() {
        for bad in [
            "rule = 1",
            "[[rules]]\nwho=[]",
            "[[rule]]\nwho=[\"ann\"]\ndatasets=[\"*\"]\nrights=[\"mount\"]",
            "[[rule]]\nwho=[\"user:ann\"]\ndatasets=[\"*\"]\nrights=[\"read\"]",
            "[[rule]]\nwho=[\"user:ann\"]\ndatasets=[\"[\"]\nrights=[\"mount\"]",
            "[[rule]]\nwho=[\"user:ann\"]\ndatasets=[\"*\"]\nrights=[\"mount\"]\nuntil=\"1d\"",
        ] {
            assert!(Policy::parse(bad).is_err(), "{bad}");
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("policy.toml");
        assert!(matches!(Policy::read(&path), Err(PolicyError::Io { .. })));
        std::fs::write(&path, TEXT).expect("writes");
        for (mode, is_taken) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
            let read = Policy::read(&path);
            assert_eq!(read.is_ok(), is_taken, "{mode:o}: {read:?}");
        }
    }

    #[test]
    fn a_principal_has_the_names_of_the_user_database() {
        let root = principal(0, 0);
        assert_eq!((root.uid, root.user.as_deref()), (0, Some("root")));
        assert!(root.groups.iter().any(|(gid, name)| *gid == 0 && name.as_deref() == Some("root")), "{root:?}");
        let nobody = principal(3_999_999_999, 4_000_000_000);
        assert_eq!((nobody.user, nobody.groups), (None, vec![(4_000_000_000, None)]));
    }
}
