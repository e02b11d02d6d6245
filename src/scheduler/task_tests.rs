//! Tasks with real processes, supervised by threads of the test.

use std::sync::atomic::{AtomicU32, Ordering};

use super::super::supervise;
use super::*;

/// A task in a directory of its own, that runs a shell script.
struct Rig {
    dir: tempfile::TempDir,
}

impl Rig {
    /// Closes the task. A process that another test starts may have the lock for a moment: then again.
    fn close(&self) -> Result<TaskExit, EndError> {
        loop {
            if let Some(exit) = self.task().close(7)? {
                return Ok(exit);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn new(script: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().expect("a directory");
        let marker = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let spec = TaskSpec {
            marker,
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: [("PATH".to_owned(), std::env::var("PATH").unwrap_or_default())].into(),
            inherits: false,
            cwd: dir.path().to_owned(),
            user: None,
            log: dir.path().join("log"),
            stdout: None,
            kill: Vec::new(),
            left: Vec::new(),
            image: None,
            log_bytes_max: None,
        };
        let rig = Self { dir };
        rig.task().prepare(&spec).expect("prepares");
        rig
    }

    fn task(&self) -> TaskDir {
        TaskDir::at(&self.dir.path().join("task"))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Supervises in a thread of the test's process.
    fn supervise(&self) -> std::thread::JoinHandle<()> {
        let dir = self.task().path().to_owned();
        std::thread::spawn(move || supervise::supervise(&dir, None).expect("supervises"))
    }

    fn spec(&self) -> TaskSpec {
        disk::read_json(&self.task().spec_file()).expect("reads").expect("is there")
    }

    fn left(&self) -> Vec<Pid> {
        self.task().family(&self.spec(), None).expect("reads").left().expect("lists")
    }
}

fn wait_until(mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "not within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn many_supervisors_of_one_task_run_it_once() {
    let rig = Rig::new("echo ran; exit 3");
    assert_eq!(rig.task().look().expect("looks"), Sight::Fresh);
    let all: Vec<_> = (0..5).map(|_| rig.supervise()).collect();
    all.into_iter().for_each(|one| one.join().expect("ends"));
    rig.supervise().join().expect("ends");
    assert_eq!(rig.log(), "ran\n");
    let Sight::Ended(exit) = rig.task().look().expect("looks") else { panic!("ended") };
    assert_eq!((exit.code, exit.stopped, exit.lost), (Some(3), false, false));
}

#[test]
fn a_task_that_is_asked_to_stop_hears_sigterm_and_its_exit_is_written_down() {
    let rig = Rig::new("trap 'echo saved; exit 0' TERM; echo up; while :; do sleep 0.05; done");
    let supervisor = rig.supervise();
    wait_until(|| rig.log().contains("up"));
    assert_eq!(rig.task().look().expect("looks"), Sight::Alive { started: true });
    rig.task().ask_to_stop(Duration::from_secs(600)).expect("asks");
    supervisor.join().expect("ends");
    // A shell may say in between that its sleep was terminated.
    assert!(rig.log().starts_with("up\n") && rig.log().ends_with("\nsaved\n"), "{}", rig.log());
    let Sight::Ended(exit) = rig.task().look().expect("looks") else { panic!("ended") };
    assert_eq!((exit.code, exit.stopped), (Some(0), true));
}

#[test]
fn after_the_grace_time_everything_of_the_task_is_killed_also_what_left_its_group() {
    let rig = Rig::new("trap '' TERM; setsid sleep 1000 & echo up; sleep 1000");
    let supervisor = rig.supervise();
    wait_until(|| rig.log().contains("up") && rig.left().len() >= 2);
    rig.task().ask_to_stop(Duration::ZERO).expect("asks");
    supervisor.join().expect("ends");
    assert_eq!(rig.left(), []);
    let Sight::Ended(exit) = rig.task().look().expect("looks") else { panic!("ended") };
    assert_eq!(exit.signal, Some(9));
}

#[test]
fn a_task_whose_supervisor_is_gone_is_lost_and_closed_with_all_that_is_left_of_it() {
    let rig = Rig::new("sleep 1000");
    // As after the death of a supervisor that had begun: the marks are there, nobody holds the lock.
    assert!(disk::make_once(&rig.task().started_file()).expect("marks"));
    let mut left = Command::new("sleep").arg("1000").env(MARKER, rig.spec().marker).spawn().expect("starts");
    assert_eq!(rig.task().look().expect("looks"), Sight::Lost);
    // It is reaped at once, as init would.
    let reaper = std::thread::spawn(move || left.wait().expect("waits"));
    let exit = rig.close().expect("closes");
    assert!(exit.lost && !exit.succeeded(), "{exit:?}");
    assert!(!reaper.join().expect("ends").success());
    assert_eq!(rig.task().look().expect("looks"), Sight::Ended(exit));
}

#[test]
fn a_task_that_was_closed_before_it_started_never_starts() {
    let rig = Rig::new("echo ran");
    let exit = rig.close().expect("closes");
    assert!(exit.stopped && !exit.lost);
    rig.supervise().join().expect("ends");
    assert_eq!(rig.log(), "");
}

#[test]
fn a_command_that_is_not_there_is_an_end_with_its_reason() {
    let rig = Rig::new("true");
    let mut spec: TaskSpec = disk::read_json(&rig.task().spec_file()).expect("reads").expect("is there");
    spec.argv = vec!["no-such-command".to_owned()];
    disk::write_json(&rig.task().spec_file(), &spec).expect("writes");
    rig.supervise().join().expect("ends");
    let Sight::Ended(exit) = rig.task().look().expect("looks") else { panic!("ended") };
    assert_eq!(exit.code, Some(127));
    assert!(exit.to_string().contains("could not be started"), "{exit}");
}

#[test]
fn what_saves_its_state_has_its_grace_time_also_when_the_shell_around_it_has_gone() {
    // The outer shell dies at once; the inner one needs what only the test gives it.
    let script = "(trap 'until test -e go; do sleep 0.05; done; echo saved; exit 0' TERM; echo up; \
                  while :; do sleep 0.05; done) & wait";
    let rig = Rig::new(script);
    let supervisor = rig.supervise();
    wait_until(|| rig.log().contains("up"));
    rig.task().ask_to_stop(Duration::from_secs(600)).expect("asks");
    // Reaped: the shell, whose pid is that of the group, has gone, and what it started has not.
    let birth = fs::read_to_string(rig.task().birth_file()).expect("reads");
    let birth: serde_json::Value = serde_json::from_str(&birth).expect("is JSON");
    wait_until(|| !Path::new(&format!("/proc/{}", birth["group"])).exists());
    assert!(!rig.task().exit_file().exists());
    fs::write(rig.dir.path().join("go"), "").expect("lets it go on");
    supervisor.join().expect("ends");
    assert!(rig.log().ends_with("saved\n"), "{}", rig.log());
    let Sight::Ended(exit) = rig.task().look().expect("looks") else { panic!("ended") };
    assert!(exit.stopped, "{exit:?}");
}

#[test]
fn what_hides_its_environment_goes_with_its_task() {
    let rig = Rig::new("env -i sleep 1000 & echo up; exit 5");
    rig.supervise().join().expect("ends");
    assert_eq!(rig.left(), []);
    let Sight::Ended(exit) = rig.task().look().expect("looks") else { panic!("ended") };
    assert_eq!((exit.code, exit.stopped), (Some(5), false));
}

#[test]
fn a_task_is_not_over_before_its_container_is_gone() {
    let rig = Rig::new("true");
    let there = rig.dir.path().join("container");
    fs::write(&there, "").expect("makes it");
    let shell = |script: String| ["sh".to_owned(), "-c".to_owned(), script].to_vec();
    let mut spec = rig.spec();
    spec.kill = shell("exit 1".to_owned());
    spec.left = shell(format!("if test -e {0}; then echo {0}; fi", there.display()));
    disk::write_json(&rig.task().spec_file(), &spec).expect("writes");
    disk::make_once(&rig.task().started_file()).expect("marks");
    assert!(matches!(rig.close(), Err(EndError::Container { .. })));
    spec.left = shell("exit 1".to_owned());
    disk::write_json(&rig.task().spec_file(), &spec).expect("writes");
    assert!(matches!(rig.close(), Err(EndError::Engine { .. })), "an engine that fails says nothing");
    wait_until(|| rig.task().look().expect("looks") == Sight::Lost);
    fs::remove_file(&there).expect("removes it");
    spec.left = shell(format!("if test -e {0}; then echo {0}; fi", there.display()));
    disk::write_json(&rig.task().spec_file(), &spec).expect("writes");
    assert!(rig.close().expect("closes").lost);
}

#[test]
fn a_shorter_grace_time_replaces_a_longer_one() {
    let rig = Rig::new("trap '' TERM; echo up; while :; do sleep 0.05; done");
    let supervisor = rig.supervise();
    wait_until(|| rig.log().contains("up"));
    rig.task().ask_to_stop(Duration::from_secs(100_000)).expect("asks");
    rig.task().ask_to_stop(Duration::ZERO).expect("asks again");
    rig.task().ask_to_stop(Duration::from_secs(100_000)).expect("a longer one changes nothing");
    supervisor.join().expect("ends");
    let Sight::Ended(exit) = rig.task().look().expect("looks") else { panic!("ended") };
    assert_eq!((exit.signal, exit.stopped), (Some(9), true));
}

fn makes_holes() -> bool {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 20).expect("grows");
    let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&file, flags, 0, 1 << 19).is_ok()
}

#[test]
fn a_log_is_kept_within_its_bound_while_the_command_goes_on() {
    if !makes_holes() {
        eprintln!("skipped: the file system makes no holes");
        return;
    }
    let rig = Rig::new("while ! test -e enough; do echo 0123456789012345678901234567890123456789; done; echo the end");
    let mut spec = rig.spec();
    spec.log_bytes_max = Some(256 << 10);
    disk::write_json(&rig.task().spec_file(), &spec).expect("writes");
    let supervisor = rig.supervise();
    let log = rig.dir.path().join("log");
    let blocks = || fs::metadata(&log).map_or(0, |meta| std::os::unix::fs::MetadataExt::blocks(&meta) * 512);
    let len = || fs::metadata(&log).map_or(0, |meta| meta.len());
    // The supervisor looks now and then; each look gives up what is too much.
    wait_until(|| len() > 1 << 20);
    let mut given_up = false;
    let begun = Instant::now();
    while !given_up && begun.elapsed() < Duration::from_secs(120) {
        given_up = blocks() + (1 << 19) < len();
        std::thread::sleep(Duration::from_millis(50));
    }
    fs::write(rig.dir.path().join("enough"), "").expect("tells it");
    supervisor.join().expect("ends");
    assert!(given_up, "{} of {} bytes are there", blocks(), len());
    assert!(fs::read(&log).expect("reads").ends_with(b"the end\n"));
}
