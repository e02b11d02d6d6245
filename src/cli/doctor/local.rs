//! What this machine itself has to give: file systems, limits, and files that only some may read.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

use super::super::Context;
use super::{Findings, Level};
use crate::node::policy::Policy;
use crate::node::remote::Tokens;

/// What a daemon opens beside the files that the kernel reads itself.
const DESCRIPTORS_MIN: u64 = 4096;

/// Looks at all of it.
pub(super) fn check(ctx: &Context, found: &mut Findings) {
    check_erofs(found);
    check_descriptors(found);
    check_credentials(Path::new("/etc/larder/credentials"), found);
    let daemon = &ctx.config().daemon;
    if let Some(path) = &daemon.policy {
        match Policy::read(path) {
            Ok(_) => found.add("policy", Level::Ok, path.display().to_string(), None),
            Err(error) => {
                let fix = "until then nobody but root and the daemon's user may do anything";
                found.add("policy", Level::Fail, format!("{:#}", anyhow::Error::new(error)), Some(fix));
            }
        }
    }
    if let Some(path) = &daemon.api_tokens {
        match Tokens::read(path) {
            Ok(_) => found.add("api tokens", Level::Ok, path.display().to_string(), None),
            Err(error) => {
                let fix = "make one with `larder daemon token NAME`";
                found.add("api tokens", Level::Fail, error.to_string(), Some(fix));
            }
        }
    }
    if let Some(group) = &daemon.group
        && !matches!(nix::unistd::Group::from_name(group), Ok(Some(_)))
    {
        let fix = format!("groupadd --system {group}");
        found.add("group", Level::Fail, format!("there is no group `{group}` (daemon.group)"), Some(&fix));
    }
}

/// Whether the kernel knows EROFS at all; whether it takes images in files shows at the first such mount.
fn check_erofs(found: &mut Findings) {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == "erofs") {
        found.add("erofs", Level::Ok, "the kernel has EROFS", None);
    } else {
        let fix = "modprobe erofs; only `mount --engine kernel` needs it (CONFIG_EROFS_FS_BACKED_BY_FILE too)";
        found.add("erofs", Level::Warn, "the kernel has no EROFS, or has not loaded it", Some(fix));
    }
}

fn check_descriptors(found: &mut Findings) {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard < DESCRIPTORS_MIN => {
            let fix = "ulimit -Hn 65536, or LimitNOFILE=65536 in the service";
            found.add("open files", Level::Warn, format!("{hard} at most"), Some(fix));
        }
        Ok((soft, hard)) => found.add("open files", Level::Ok, format!("{soft}, {hard} at most"), None),
        Err(errno) => found.add("open files", Level::Warn, errno.to_string(), None),
    }
}

/// The service's credentials are for root alone.
fn check_credentials(path: &Path, found: &mut Findings) {
    let Ok(meta) = fs::metadata(path) else {
        return;
    };
    if meta.mode() & 0o077 == 0 {
        return found.add("credentials", Level::Ok, format!("{}: closed to others", path.display()), None);
    }
    let fix = format!("chmod 600 {}", path.display());
    found.add("credentials", Level::Fail, format!("{}: others may read it", path.display()), Some(&fix));
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn credentials_that_others_may_read_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("credentials");
        let level = |mode: u32| {
            fs::write(&path, "x").expect("writes");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            let mut found = Findings::default();
            check_credentials(&path, &mut found);
            found.0.first().map(|finding| finding.level)
        };
        assert_eq!((level(0o600), level(0o640)), (Some(Level::Ok), Some(Level::Fail)));
        let mut found = Findings::default();
        check_credentials(&dir.path().join("gone"), &mut found);
        assert!(found.0.is_empty(), "a laptop has none");
    }
}
