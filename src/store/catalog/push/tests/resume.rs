//! Failures at any step, and files that change under the push.

use super::*;

#[test]
fn a_push_that_fails_at_any_write_is_finished_by_running_it_again() {
    let mut steps = 0;
    for fail_at in 0.. {
        let bench = Bench::new();
        many(&bench);
        copy_root(&bench);
        bench.lake.reset_counters();
        bench.lake.rule(Rule::crash_after(fail_at));
        let result = bench.push_with(&bench.options());
        bench.lake.heal();
        check_refs(&bench);
        if result.is_ok() {
            break;
        }
        steps += 1;
        let again = bench.push();
        assert_eq!(again.tree, tree_of_a_push_that_nothing_stopped(&bench), "failed at write {fail_at}");
        bench.assert_round_trip(&again);
        assert_eq!(bench.memory.uploads_open(), 0, "failed at write {fail_at}");
        let leftover = bench.memory.keys().into_iter().any(|key| key.starts_with("intents/"));
        assert!(!leftover, "failed at write {fail_at}");
    }
    assert!(steps > 15, "only {steps} steps could fail");
}

fn tree_of_a_push_that_nothing_stopped(bench: &Bench) -> TreeId {
    let lone = Bench::new();
    push(&lone.catalog, lone.rt.handle(), &bench.options(), &Arc::new(Progress::default())).unwrap().tree
}

fn copy_root(bench: &Bench) {
    set_mtime(bench.source.path(), 1_000_000, 0);
}

/// No ref may point to a commit that is not complete.
fn check_refs(bench: &Bench) {
    let keys: HashSet<String> = bench.memory.keys().into_iter().collect();
    if !keys.iter().any(|key| key.contains("/refs/") || key.contains("/log/")) {
        return;
    }
    for commit in main_of(bench) {
        assert!(keys.contains(&commit_key(&commit)));
        bench.read_back(commit);
    }
}

#[test]
fn what_was_uploaded_before_a_failure_is_not_uploaded_again() {
    for fail_at in [3, 6, 9, 12, 15, 18] {
        let bench = Bench::new();
        for number in 0..60u64 {
            bench.write(&format!("f{number:02}"), noise(number, 30_000));
        }
        bench.write("large", noise(100, 900_000));
        let parts = |bench: &Bench| bench.lake.counters().of(Op::UploadPart);
        bench.lake.rule(Rule::crash_after(fail_at));
        assert!(bench.push_with(&bench.options()).is_err());
        bench.lake.heal();
        let before = parts(&bench);
        let again = bench.push();
        let total = 60 * 32_768 + 900_000;
        let sent_before = bench.lake.counters().bytes_in - again.uploaded_bytes;
        assert!(
            again.uploaded_data_bytes + (before * (64 << 10)).min(sent_before) <= total + 8 * (64 << 10) + 6 * 32_768,
            "failed at {fail_at}: {} bytes of {total} were sent again after {before} parts",
            again.uploaded_data_bytes
        );
        bench.assert_round_trip(&again);
    }
}

#[test]
fn an_interrupted_large_file_goes_on_with_its_next_part() {
    let bench = Bench::new();
    bench.write("large", noise(1, 1_000_000));
    // 16 parts; the intent, the begin and ten parts go well.
    bench.lake.rule(Rule::crash_after(12));
    assert!(bench.push_with(&bench.options()).is_err());
    bench.lake.heal();
    let again = bench.push();
    assert!(again.uploaded_data_bytes <= 1_000_000 - 8 * (64 << 10), "{}", again.uploaded_data_bytes);
    assert_eq!(again.bytes_read, 1_000_000, "it is digested again, not sent again");
    bench.assert_round_trip(&again);
    assert_eq!(bench.data_keys().len(), 1);
}

#[test]
fn a_large_file_that_changed_between_the_pushes_is_sent_as_it_is_now() {
    let bench = Bench::new();
    bench.write("large", noise(1, 1_000_000));
    bench.lake.rule(Rule::crash_after(12));
    assert!(bench.push_with(&bench.options()).is_err());
    bench.lake.heal();
    let mut bytes = noise(1, 1_000_000);
    bytes[300_000] ^= 1;
    bench.write("large", bytes);
    let again = bench.push();
    bench.assert_round_trip(&again);
}

/// Pushes a file of 4 MiB, of which one byte changes while the first part of it is sent. The reader is
/// at most 1 MiB ahead of the parts, so it has not come to the end then.
fn push_while_it_changes(bench: &Bench, layout: Layout) -> PushOutcome {
    bench.write("large", noise(1, 4 << 20));
    let (mut changed, path) = (false, bench.path("large"));
    bench.lake.at_each_call(move |op, _| {
        if op == Op::UploadPart && !changed {
            overwrite(&path, b"!", 5);
            changed = true;
        }
    });
    let mut options = bench.options();
    options.tuning.layout = Some(layout);
    bench.push_with(&options).unwrap()
}

fn overwrite(path: &Path, bytes: &[u8], at: u64) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

#[test]
fn a_large_file_that_changes_while_it_is_sent_is_sent_once_more() {
    let bench = Bench::new();
    bench.write("calm", "calm");
    let outcome = push_while_it_changes(&bench, tuning().layout.unwrap());
    bench.assert_round_trip(&outcome);
    assert_eq!(outcome.files_read, 4, "calm, and large: sent, digested, sent");
    assert_eq!(bench.memory.uploads_open(), 0, "the first upload is given up");
    assert_eq!(bench.data_keys().len(), 2);
}

#[test]
fn a_file_that_changes_while_it_is_written_among_others_is_written_once_more() {
    let bench = Bench::new();
    bench.write("after", "after");
    bench.write("zz-after", "after all");
    let outcome = push_while_it_changes(&bench, Layout { pack_len: 64 << 20, whole_len: 64 << 20 });
    bench.assert_round_trip(&outcome);
    assert_eq!(outcome.files_read, 5, "large: digested, written, written");
    assert_eq!(outcome.packs_total, 1);
    // What was written first is a content of the pack like any other: each is what its digest says.
    let snapshot = bench.rt.block_on(bench.catalog.snapshot_of(&dataset(), &outcome.commit)).unwrap();
    assert!(pack_bytes(&bench.rt, &bench.catalog, snapshot.placement.packs[0].pack).len() > 8 << 20);
}

/// Pushes a file of 4 MiB that changes with each part of it that is sent.
fn push_of_a_restless_file(layout: Layout) {
    let bench = Bench::new();
    for number in 0..5u64 {
        bench.write(&format!("calm{number}"), noise(number, 1000));
    }
    bench.write("restless", vec![0; 4 << 20]);
    let (mut at, path) = (0u64, bench.path("restless"));
    bench.lake.at_each_call(move |op, _| {
        if op == Op::UploadPart {
            overwrite(&path, &[at as u8; 8192], (at % 16) * 8192);
            at += 1;
        }
    });
    let mut options = bench.options();
    options.tuning.layout = Some(layout);
    let result = bench.push_with(&options);
    let Err(PushError::Changed { problems }) = result else { panic!("{result:?}") };
    assert_eq!(problems.len(), 1);
    assert_eq!((problems[0].path.as_str(), problems[0].kind), ("restless", ProblemKind::Changed));
    assert!(!bench.memory.keys().iter().any(|key| key.starts_with("commits/")));
    bench.lake.at_each_call(|_, _| {});
    let again = bench.push();
    bench.assert_round_trip(&again);
}

#[test]
fn a_large_file_that_never_holds_still_fails_the_push() {
    push_of_a_restless_file(tuning().layout.unwrap());
}

#[test]
fn a_file_among_others_that_never_holds_still_fails_the_push() {
    push_of_a_restless_file(Layout { pack_len: 64 << 20, whole_len: 64 << 20 });
}
