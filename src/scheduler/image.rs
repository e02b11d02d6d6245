//! Which image a container has: found once, before it starts, and run by its id.
//!
//! A name may mean another image tomorrow, or for the next rank. What a job ran in is part of what its
//! outputs came from, so the supervisor asks the engine what the name means (pulling it where the engine
//! does not have it), writes that down, and starts the container by the id. Pulling may take long: it
//! ends when the task is asked to stop.

use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use super::task::{ImageFound, TaskDir, TaskSpec, engine};

/// How often it is looked whether the pull has ended, or should.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What an engine says of an image; podman and docker share these.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    id: String,
    #[serde(default)]
    digest: Option<String>,
    #[serde(default)]
    repo_digests: Option<Vec<String>>,
}

impl Inspected {
    fn found(self) -> ImageFound {
        let told = self.digest.filter(|digest| !digest.is_empty());
        let repo = || Some(self.repo_digests.as_ref()?.first()?.split_once('@')?.1.to_owned());
        let digest = told.or_else(repo).unwrap_or_else(|| match self.id.contains(':') {
            true => self.id.clone(),
            false => format!("sha256:{}", self.id),
        });
        ImageFound { id: self.id, digest }
    }
}

fn inspect(spec: &TaskSpec, program: &str, name: &str) -> io::Result<ImageFound> {
    let argv = [program, "image", "inspect", name].map(str::to_owned);
    let told: Vec<Inspected> = serde_json::from_str(&engine(&argv, &spec.env)?).map_err(io::Error::other)?;
    told.into_iter().next().map(Inspected::found).ok_or_else(|| io::Error::other("the engine knows no such image"))
}

/// Gets an image; what the engine says of it goes to the job's log.
fn pull(task: &TaskDir, spec: &TaskSpec, program: &str, name: &str) -> io::Result<()> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&spec.log)?;
    let mut command = Command::new(program);
    command.args(["pull", "--quiet", name]).env_clear().envs(&spec.env).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let mut child = command.spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            return if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) };
        }
        if task.asked_to_stop().is_some() {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::Interrupted.into());
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Finds the image of a task, writes it down and puts its id into the command.
pub(super) fn pin(task: &TaskDir, spec: &mut TaskSpec) -> io::Result<()> {
    let Some(image) = spec.image.clone() else {
        return Ok(());
    };
    let Some(name) = spec.argv.get(image.at).cloned() else {
        return Ok(());
    };
    let found = match inspect(spec, &image.engine, &name) {
        Ok(found) => found,
        Err(_) => {
            let cannot =
                |error: io::Error| io::Error::new(error.kind(), format!("cannot get the image {name}: {error}"));
            pull(task, spec, &image.engine, &name).map_err(cannot)?;
            inspect(spec, &image.engine, &name).map_err(cannot)?
        }
    };
    super::disk::write_json(&task.image_file(), &found).map_err(io::Error::other)?;
    if let Some(arg) = spec.argv.get_mut(image.at) {
        arg.clone_from(&found.id);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_the_digest_that_every_machine_knows_or_else_its_id() {
        let found = |text: &str| serde_json::from_str::<Inspected>(text).expect("reads").found();
        let podman = r#"{"Id":"ab","Digest":"sha256:cd","RepoDigests":["x@sha256:ef"],"Size":3}"#;
        assert_eq!(found(podman), ImageFound { id: "ab".to_owned(), digest: "sha256:cd".to_owned() });
        let docker = r#"{"Id":"sha256:ab","RepoDigests":["x@sha256:ef"]}"#;
        assert_eq!(found(docker).digest, "sha256:ef");
        assert_eq!(found(r#"{"Id":"sha256:ab","RepoDigests":null}"#).digest, "sha256:ab");
        assert_eq!(found(r#"{"Id":"ab"}"#).digest, "sha256:ab", "podman leaves out how");
    }
}
